//! Memory that each thread keeps for datagrams.
//!
//! A signal handler may call the library's functions while its thread is in the midst of
//! one, and may leave by longjmp. So what a thread keeps is taken out while it is in use; a
//! handler that finds nothing makes its own.

use std::cell::Cell;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

use libc::{c_void, iovec, mmsghdr, sockaddr_in6};

use crate::recent::Recent;

/// How many datagrams one system call moves at most.
pub(crate) const BATCH: usize = 64;

/// Of control data for each datagram: more than all options together let the kernel tell,
/// but for the extension headers of IPv6.
pub(crate) const CONTROL: usize = 1024;

/// The longest datagram, and one byte.
const LONGEST: usize = 65_536;

/// How many parts of a datagram are sent in a batch. One of more parts is sent alone.
pub(crate) const PARTS: usize = 16;

/// What the start of a datagram has room for on the stack of the call.
pub(crate) const NEAR: usize = 2048;

/// Memory for datagrams that are longer than [`NEAR`].
#[repr(C)]
pub(crate) struct Far {
    pub(crate) bytes: [u8; LONGEST],
}

/// Memory for what recvmmsg(2) receives at a time. Untouched parts of it take none.
#[repr(C, align(8))]
pub(crate) struct Incoming {
    pub(crate) messages: [mmsghdr; BATCH],
    pub(crate) parts: [iovec; BATCH],
    pub(crate) names: [sockaddr_in6; BATCH],
    pub(crate) control: [Control; BATCH],
    pub(crate) bytes: [Bytes; BATCH],
}

#[repr(C, align(8))]
pub(crate) struct Control(pub(crate) [u8; CONTROL]);

/// Not a power of two, so that the starts of datagrams don't all compete for the same
/// lines of the processor's cache.
#[repr(C)]
pub(crate) struct Bytes(pub(crate) [u8; LONGEST + 256]);

/// Memory for what sendmmsg(2) sends at a time, but for the payloads.
#[repr(C, align(8))]
pub(crate) struct Outgoing {
    pub(crate) messages: [mmsghdr; BATCH],
    pub(crate) parts: [[iovec; PARTS + 1]; BATCH],
    pub(crate) names: [sockaddr_in6; BATCH],
    pub(crate) headers: [[u8; 128]; BATCH],
    pub(crate) header_lens: [u32; BATCH],
    pub(crate) control: [OutgoingControl; BATCH],
}

#[repr(C, align(8))]
pub(crate) struct OutgoingControl(pub(crate) [u8; 256]);

thread_local! {
    static FAR: Cell<*mut Far> = const { Cell::new(ptr::null_mut()) };
    /// How many datagrams of this thread were longer than [`NEAR`].
    static FAR_USES: Cell<u64> = const { Cell::new(0) };
    static INCOMING: Cell<*mut Incoming> = const { Cell::new(ptr::null_mut()) };
    static OUTGOING: Cell<*mut Outgoing> = const { Cell::new(ptr::null_mut()) };
    static RECENT: Cell<*mut Recent> = const { Cell::new(ptr::null_mut()) };
}

/// # Safety
///
/// All bytes zero are a valid value, and nothing must be done when it ends.
pub(crate) unsafe trait Kept: Sized + 'static {
    fn with<R>(work: impl FnOnce(&Cell<*mut Self>) -> R) -> R;
}
// SAFETY: bytes.
unsafe impl Kept for Far {
    fn with<R>(work: impl FnOnce(&Cell<*mut Self>) -> R) -> R {
        FAR.with(work)
    }
}
// SAFETY: numbers and raw pointers.
unsafe impl Kept for Incoming {
    fn with<R>(work: impl FnOnce(&Cell<*mut Self>) -> R) -> R {
        INCOMING.with(work)
    }
}
// SAFETY: numbers and raw pointers.
unsafe impl Kept for Outgoing {
    fn with<R>(work: impl FnOnce(&Cell<*mut Self>) -> R) -> R {
        OUTGOING.with(work)
    }
}

// SAFETY: numbers, and bytes of which none is looked at before it is written.
unsafe impl Kept for Recent {
    fn with<R>(work: impl FnOnce(&Cell<*mut Self>) -> R) -> R {
        RECENT.with(work)
    }
}

/// The thread's memory for long datagrams; null if there is none to be had.
///
/// It stays the thread's while a call waits that would receive into it, since the call may be
/// left by cancellation or longjmp. A handler that receives a long datagram meanwhile
/// overwrites it: see [`take_far`].
#[inline]
pub(crate) fn far() -> *mut Far {
    let kept = FAR.get();
    if !kept.is_null() {
        return kept;
    }
    let made = map();
    FAR.set(made);
    made
}

/// How many long datagrams this thread has received.
pub(crate) fn far_uses() -> u64 {
    FAR_USES.get()
}

/// The thread's memory for long datagrams, taken out while it is in use: a handler finds
/// none, and makes its own.
#[derive(Debug)]
pub(crate) struct TakenFar(*mut Far);

/// Takes out the memory that a long datagram has been received into, since there were `uses`
/// of it. `None` if a handler has received another one, which may have overwritten it.
pub(crate) fn take_far(far: *mut Far, uses: u64) -> Option<TakenFar> {
    let taken = TakenFar(far);
    let other = FAR.replace(ptr::null_mut());
    if other != far {
        // A handler that left by longjmp has taken this one out, and the thread made another.
        unmap(other);
    }
    let is_intact = far_uses() == uses;
    count_far_use();
    is_intact.then_some(taken)
}

impl Drop for TakenFar {
    fn drop(&mut self) {
        // A handler may have put its own there.
        unmap(FAR.replace(self.0));
    }
}

pub(crate) fn count_far_use() {
    FAR_USES.set(FAR_USES.get() + 1);
}

/// Takes the thread's memory, or new one, for the time of `work`; `None` if there is none
/// to be had.
#[inline]
pub(crate) fn take<T: Kept, R>(work: impl FnOnce(&mut T) -> R) -> Option<R> {
    // One look-up of the thread's own for all.
    T::with(|cell| {
        let mut taken = cell.replace(ptr::null_mut());
        if taken.is_null() {
            taken = map();
        }
        // SAFETY: it is null, or mapped and, since it was taken out, referred to nowhere else.
        let result = work(unsafe { taken.as_mut() }?);
        let other = cell.replace(taken);
        if !other.is_null() {
            // A handler has put its own there.
            unmap(other);
        }
        Some(result)
    })
}

#[cold]
fn map<T: Kept>() -> *mut T {
    // SAFETY: new memory at an address that the kernel chooses.
    let at = unsafe {
        libc::mmap(
            ptr::null_mut(),
            size_of::<T>(),
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if at == libc::MAP_FAILED {
        return ptr::null_mut();
    }
    free_at_exit();
    at.cast()
}

fn unmap<T: Kept>(at: *mut T) {
    if !at.is_null() {
        // SAFETY: `map` made it in this size, and nothing refers to it any more.
        unsafe { libc::munmap(at.cast(), size_of::<T>()) };
    }
}

/// The key whose destructor frees a thread's memory, and 1; 0: there is none yet.
static KEY: AtomicU32 = AtomicU32::new(0);

/// Has the thread's memory freed when it ends. Not by a destructor of Rust's: those can't
/// run again when the destructor of something of the program's receives once more.
fn free_at_exit() {
    let mut key = KEY.load(Ordering::Acquire);
    if key == 0 {
        let mut made = 0;
        // SAFETY: `made` can be written to, and the function stays.
        if unsafe { libc::pthread_key_create(&raw mut made, Some(free)) } != 0 {
            return;
        }
        key = made + 1;
        if let Err(other) = KEY.compare_exchange(0, key, Ordering::AcqRel, Ordering::Acquire) {
            // SAFETY: it was made above, and no thread uses it.
            unsafe { libc::pthread_key_delete(made) };
            key = other;
        }
    }
    // SAFETY: the key exists. Any value but null has the function called.
    unsafe { libc::pthread_setspecific(key - 1, ptr::dangling::<c_void>()) };
}

unsafe extern "C" fn free(_: *mut c_void) {
    unmap(FAR.replace(ptr::null_mut()));
    unmap(INCOMING.replace(ptr::null_mut()));
    unmap(OUTGOING.replace(ptr::null_mut()));
    unmap(RECENT.replace(ptr::null_mut()));
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn addresses<T: Kept>() -> (usize, usize, usize) {
        let address = |memory: &mut T| ptr::from_mut(memory).addr();
        take(|outer: &mut T| {
            let inner = take(address);
            (address(outer), inner.unwrap(), take(address).unwrap())
        })
        .unwrap()
    }

    #[test]
    fn a_handler_gets_memory_of_its_own() {
        let (outer, inner, again) = addresses::<Incoming>();
        assert_ne!(outer, inner);
        // The thread keeps the handler's while it has no other.
        assert_eq!(inner, again);
        assert_eq!(
            take(|memory: &mut Incoming| ptr::from_mut(memory).addr()),
            Some(outer)
        );
    }

    #[test]
    fn a_thread_keeps_its_memory_and_gives_it_back_when_it_ends() {
        let mapped = |at: usize| {
            let mut resident = 0;
            let page = ptr::without_provenance_mut(at);
            // SAFETY: one byte is written, for one page.
            unsafe { libc::mincore(page, 1, &raw mut resident) == 0 }
        };
        let at = thread::spawn(move || {
            let far = far().addr();
            assert_eq!(super::far().addr(), far);
            assert!(mapped(far));
            far
        });
        // Other tests may map something there right away, but not a hundred times.
        let gone = |at: usize| !mapped(at);
        let first = at.join().unwrap();
        let again = || thread::spawn(|| far().addr()).join().unwrap();
        assert!(gone(first) || (0..100).any(|_| gone(again())));
    }
}
