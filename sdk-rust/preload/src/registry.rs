//! Which descriptors of this process are taken over: one array lookup, without a lock,
//! for every call of the program on any descriptor.

use std::process;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

use libc::c_int;

use crate::socket::Socket;

const CHUNK: usize = 1024;

type Chunk = [AtomicPtr<Socket>; CHUNK];

/// By descriptor: chunks are made when the first of their descriptors is taken over, and
/// stay. Descriptors beyond a million are not taken over.
static CHUNKS: [AtomicPtr<Chunk>; CHUNK] = [const { AtomicPtr::new(ptr::null_mut()) }; CHUNK];

/// The process that the registry belongs to. Another one that runs in the same memory is
/// a child between vfork and exec: what it closes stays open here.
static OWNER: AtomicU32 = AtomicU32::new(0);

/// The socket behind a descriptor, if it is taken over.
#[inline]
pub(crate) fn get(fd: c_int) -> Option<&'static Socket> {
    let slot = slot(fd)?;
    // SAFETY: sockets are never freed, see `Socket::recycle`.
    unsafe { slot.load(Ordering::Acquire).as_ref() }
}

/// Takes a descriptor over. One that was there before is let go.
pub(crate) fn set(fd: c_int, socket: &'static Socket) {
    if let Some(slot) = slot_made(fd) {
        socket.hold();
        let former = slot.swap(ptr::from_ref(socket).cast_mut(), Ordering::AcqRel);
        let_go(former);
    }
}

/// Lets a descriptor go that is about to be closed, or that refers to something else.
/// Before the real `close`: afterwards, the number may already be another thread's.
pub(crate) fn remove(fd: c_int) {
    if let Some(slot) = slot(fd)
        && is_owner()
    {
        let_go(slot.swap(ptr::null_mut(), Ordering::AcqRel));
    }
}

/// `to` refers to what `from` refers to.
pub(crate) fn share(from: c_int, to: c_int) {
    if from != to
        && is_owner()
        && let Some(socket) = get(from)
    {
        set(to, socket);
    }
}

/// The descriptors that are taken over, from `first` to `last`.
pub(crate) fn between(first: u32, last: u32) -> impl Iterator<Item = c_int> {
    let chunks = CHUNKS
        .iter()
        .enumerate()
        .filter(|(_, chunk)| !chunk.load(Ordering::Acquire).is_null());
    chunks
        .flat_map(|(chunk, _)| (0..CHUNK).map(move |at| chunk * CHUNK + at))
        .filter(move |fd| (first as usize..=last as usize).contains(fd))
        .filter_map(|fd| c_int::try_from(fd).ok())
        .filter(|fd| get(*fd).is_some())
}

/// Whether this process is the one that the registry describes.
pub(crate) fn is_owner() -> bool {
    OWNER.load(Ordering::Relaxed) == process::id()
}

/// The registry is this process's, at the start and after a fork.
pub(crate) fn own() {
    OWNER.store(process::id(), Ordering::Relaxed);
}

#[inline]
fn slot(fd: c_int) -> Option<&'static AtomicPtr<Socket>> {
    let fd = usize::try_from(fd).ok()?;
    let chunk = CHUNKS.get(fd / CHUNK)?.load(Ordering::Acquire);
    // SAFETY: chunks are never freed.
    unsafe { chunk.as_ref() }.map(|chunk| &chunk[fd % CHUNK])
}

fn slot_made(fd: c_int) -> Option<&'static AtomicPtr<Socket>> {
    let chunk = CHUNKS.get(usize::try_from(fd).ok()? / CHUNK)?;
    if chunk.load(Ordering::Acquire).is_null() {
        let made: Box<Chunk> = Box::new([const { AtomicPtr::new(ptr::null_mut()) }; CHUNK]);
        let made = Box::into_raw(made);
        let lost = chunk
            .compare_exchange(ptr::null_mut(), made, Ordering::AcqRel, Ordering::Acquire)
            .is_err();
        if lost {
            // SAFETY: it was made above, and nobody else has seen it.
            drop(unsafe { Box::from_raw(made) });
        }
    }
    slot(fd)
}

fn let_go(socket: *mut Socket) {
    // SAFETY: sockets are never freed, see `Socket::recycle`.
    if let Some(socket) = unsafe { socket.as_ref() } {
        socket.let_go();
    }
}
