//! Which descriptors of this process are taken over: one array lookup, without a lock,
//! for every call of the program on any descriptor.

use std::process;
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU32, AtomicU64, Ordering};

use libc::c_int;

use crate::socket::{self, Socket};

const CHUNK: usize = 1024;

type Chunk = [AtomicPtr<Socket>; CHUNK];

/// By descriptor: chunks are made when the first of their descriptors is taken over, and
/// stay. Descriptors beyond a million are not taken over.
static CHUNKS: [AtomicPtr<Chunk>; CHUNK] = [const { AtomicPtr::new(ptr::null_mut()) }; CHUNK];

/// The process that the registry belongs to. Another one that runs in the same memory is
/// a child between vfork and exec: what it closes stays open here.
///
/// It is in a page that the kernel clears in a process with memory of its own, so that a
/// child is known however it was made: raw clone(2) calls no handler of pthread_atfork(3).
static OWNER: AtomicPtr<AtomicU32> = AtomicPtr::new(ptr::null_mut());

/// The highest descriptor that was ever taken over; -1: none was.
static HIGHEST: AtomicI32 = AtomicI32::new(-1);

/// The socket behind a descriptor, if it is taken over.
#[inline]
pub(crate) fn get(fd: c_int) -> Option<&'static Socket> {
    let slot = slot(fd)?;
    // SAFETY: sockets are never freed, see `Socket::recycle`.
    unsafe { slot.load(Ordering::Acquire).as_ref() }
}

/// Takes a descriptor over. One that was there before is let go.
pub(crate) fn set(fd: c_int, socket: &'static Socket) {
    if is_owner()
        && let Some(slot) = slot_made(fd)
    {
        HIGHEST.fetch_max(fd, Ordering::AcqRel);
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

/// `to` now refers to what `from` refers to.
pub(crate) fn share(from: c_int, to: c_int) {
    if from != to {
        match get(from) {
            Some(socket) => set(to, socket),
            None => remove(to),
        }
    }
}

/// Whether a descriptor was ever taken over.
#[inline]
pub(crate) fn is_used() -> bool {
    highest() >= 0
}

/// The highest descriptor that was ever taken over; -1: none was.
#[inline]
pub(crate) fn highest() -> c_int {
    HIGHEST.load(Ordering::Relaxed)
}

/// The descriptors that are taken over, from `first` to `last`.
pub(crate) fn between(first: u32, last: u32) -> impl Iterator<Item = c_int> {
    let chunks = CHUNKS
        .iter()
        .enumerate()
        .filter(|(_, chunk)| !chunk.load(Ordering::Acquire).is_null());
    chunks
        .flat_map(|(chunk, _)| (0..CHUNK).map(move |at| chunk * CHUNK + at))
        .skip_while(move |fd| *fd < first as usize)
        .take_while(move |fd| {
            *fd <= last as usize && *fd <= usize::try_from(highest()).unwrap_or(0)
        })
        .filter_map(|fd| c_int::try_from(fd).ok())
        .filter(|fd| get(*fd).is_some())
}

/// Whether this process is the one that the registry describes.
pub(crate) fn is_owner() -> bool {
    // SAFETY: the page stays.
    let Some(owner) = (unsafe { OWNER.load(Ordering::Acquire).as_ref() }) else {
        return true;
    };
    match owner.load(Ordering::Relaxed) {
        0 => {
            forked();
            true
        }
        owner => owner == process::id(),
    }
}

/// The registry is this process's. Once, before anything is taken over.
pub(crate) fn own() {
    let len = size_of::<AtomicU32>();
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new page somewhere takes nothing away.
    let page = unsafe { libc::mmap(ptr::null_mut(), len, access, flags, -1, 0) };
    if page == libc::MAP_FAILED {
        return;
    }
    // SAFETY: the page was made above. Linux before 4.14 can't do this; there, the handler
    // of pthread_atfork(3) alone tells of a fork.
    unsafe { libc::madvise(page, 4096, libc::MADV_WIPEONFORK) };
    let owner: *mut AtomicU32 = page.cast();
    // SAFETY: a page begins at a multiple of 4, and is full of zeros.
    unsafe { (*owner).store(process::id(), Ordering::Relaxed) };
    OWNER.store(owner, Ordering::Release);
}

/// In a new process with memory of its own: the registry is this process's, and describes
/// what the parent's described.
pub(crate) fn forked() {
    // SAFETY: the page stays.
    let Some(owner) = (unsafe { OWNER.load(Ordering::Acquire).as_ref() }) else {
        return;
    };
    if owner.swap(process::id(), Ordering::Relaxed) == process::id() {
        return;
    }
    socket::forked();
    for fd in between(0, u32::MAX) {
        if let Some(socket) = get(fd) {
            socket.forked();
        }
    }
}

/// A set of descriptors below 65,536, which is looked up and changed without a lock.
pub(crate) struct Marks([AtomicU64; 1024]);

impl Marks {
    pub(crate) const fn new() -> Self {
        Self([const { AtomicU64::new(0) }; 1024])
    }

    #[inline]
    fn at(&self, fd: c_int) -> Option<(&AtomicU64, u64)> {
        let fd = usize::try_from(fd).ok()?;
        Some((self.0.get(fd / 64)?, 1 << (fd % 64)))
    }

    #[inline]
    pub(crate) fn has(&self, fd: c_int) -> bool {
        self.at(fd)
            .is_some_and(|(word, bit)| word.load(Ordering::Relaxed) & bit != 0)
    }

    #[inline]
    pub(crate) fn set(&self, fd: c_int) {
        if let Some((word, bit)) = self.at(fd)
            && word.load(Ordering::Relaxed) & bit == 0
        {
            word.fetch_or(bit, Ordering::Relaxed);
        }
    }

    /// Whether it was set.
    #[inline]
    pub(crate) fn clear(&self, fd: c_int) -> bool {
        self.has(fd)
            && self.at(fd).is_some_and(|(word, bit)| {
                word.fetch_and(!bit, Ordering::Relaxed);
                true
            })
    }

    pub(crate) fn clear_between(&self, first: u32, last: u32) {
        for fd in self.iter() {
            if u32::try_from(fd).is_ok_and(|fd| (first..=last).contains(&fd)) {
                self.clear(fd);
            }
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = c_int> {
        let words = (0..).zip(&self.0);
        let words = words.map(|(word, bits)| (word, bits.load(Ordering::Relaxed)));
        words
            .filter(|(_, bits)| *bits != 0)
            .flat_map(|(word, bits)| {
                (0..64)
                    .filter(move |bit| bits >> bit & 1 != 0)
                    .map(move |bit| word * 64 + bit)
            })
    }
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
