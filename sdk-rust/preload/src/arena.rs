//! The memory that forked processes share, and the allocator that uses it while the
//! [`table`](crate::table) works.
//!
//! It is mapped once, before the program begins, so that every process of the family has
//! it at the same address; with PPV2_FORK=separate, a fork copies it instead. The table's
//! methods hold its lock, and have the thread allocate there while they call the SDK. So
//! only what belongs to the table may be allocated then:
//!
//! | what could be allocated there | why it is not |
//! |---|---|
//! | ahash's keys, the SDK's clock: made at their first use | `table::start` uses them before |
//! | tracing's call sites | registered with a subscriber alone, and this library has none |
//! | a panic's exception | the panic hook ends the allocation in the arena first |
//! | a panic's message | it is: so nobody may read it once the lock is released |
//! | what a signal handler's call allocates | `boundary::guarded` suspends the arena |
//!
//! A test drops a whole table after using it in every way, and finds no allocation left.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::{Cell, UnsafeCell};
use std::io;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};

use dlmalloc::Dlmalloc;
use libc::c_void;

use crate::settings::Fork;
use crate::this_thread::{self, ThisThread};

#[global_allocator]
static ALLOCATOR: Shared = Shared;

const PAGE: usize = 4096;

/// Address space that the table has at least, and for each client of an endpoint.
///
/// A client behind a proxy takes at most 350 bytes (its entry, its proxy's address, and
/// the hash tables while they grow), a remembered sender 150, a direct client 180. So
/// there is room for five endpoints with as many clients, direct ones and senders as each
/// of them may have, and for a dozen with as many clients behind proxies alone. Pages that
/// are never used take no memory.
const BASE_LEN: usize = 16 << 20;
const LEN_FOR_EACH_CLIENT: usize = 4096;

/// What one datagram can allocate at most, when all hash tables of an endpoint grow at
/// once: 49 bytes for each bucket of the largest, 9 for those of the three others, up to
/// 4.6 buckets for each client.
const RESERVE: usize = 1 << 20;
const RESERVE_FOR_EACH_CLIENT: usize = 512;

/// The memory itself: what is `T`'s stands in front, what is allocated behind it.
#[derive(Debug)]
pub(crate) struct Arena {
    memory: UnsafeCell<Dlmalloc<Pages>>,
    start: usize,
    end: usize,
    fork: Fork,
}

/// Hands out the arena to its allocator, in large pieces, from the start to the end.
#[derive(Debug)]
struct Pages {
    next: Cell<usize>,
    /// From here to the end is the reserve.
    reserve: usize,
    end: usize,
}

// SAFETY: pieces are handed out once each, lie within memory that is mapped for good, and
// are never taken back.
unsafe impl dlmalloc::Allocator for Pages {
    fn alloc(&self, size: usize) -> (*mut u8, usize, u32) {
        let start = self.next.get();
        match start.checked_add(size) {
            Some(end) if end <= self.end => {
                self.next.set(end);
                (ptr::with_exposed_provenance_mut(start), size, 0)
            }
            _ => (ptr::null_mut(), 0, 0),
        }
    }

    fn remap(&self, _: *mut u8, _: usize, _: usize, _: bool) -> *mut u8 {
        ptr::null_mut()
    }

    fn free_part(&self, _: *mut u8, _: usize, _: usize) -> bool {
        false
    }

    fn free(&self, _: *mut u8, _: usize) -> bool {
        false
    }

    fn can_release_part(&self, _: u32) -> bool {
        false
    }

    fn allocates_zeros(&self) -> bool {
        false
    }

    fn page_size(&self) -> usize {
        PAGE
    }
}

/// Maps memory that forked processes share, or copy, for a head of `head` bytes and tables
/// of `max_clients`. Returns its address and length. If the process may not have as much
/// address space (RLIMIT_AS), it gets less, and the table is full earlier.
pub(crate) fn map(head: usize, max_clients: usize, fork: Fork) -> io::Result<(usize, usize)> {
    let sharing = match fork {
        Fork::Shared => libc::MAP_SHARED,
        Fork::Separate => libc::MAP_PRIVATE,
    };
    let least = head + 2 * reserve(max_clients);
    let mut len = BASE_LEN
        .saturating_add(max_clients.saturating_mul(LEN_FOR_EACH_CLIENT))
        .max(least)
        .next_multiple_of(PAGE);
    loop {
        // SAFETY: a new mapping changes no other memory.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                sharing | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start != libc::MAP_FAILED {
            let start = start.expose_provenance();
            if RANGES.iter().any(|range| range.is(start, len)) {
                return Ok((start, len));
            }
            return Err(io::Error::other("too many arenas"));
        }
        if len / 2 < least {
            return Err(io::Error::last_os_error());
        }
        len = (len / 2).next_multiple_of(PAGE);
    }
}

fn reserve(max_clients: usize) -> usize {
    RESERVE.saturating_add(max_clients.saturating_mul(RESERVE_FOR_EACH_CLIENT))
}

impl Arena {
    /// An empty arena in the memory from `start` to `end`, which [`map`] has returned.
    pub(crate) fn new(start: usize, end: usize, max_clients: usize, fork: Fork) -> Self {
        let start = start.next_multiple_of(PAGE);
        Self {
            memory: UnsafeCell::new(Dlmalloc::new_with_allocator(Pages {
                next: Cell::new(start),
                reserve: end.saturating_sub(reserve(max_clients)),
                end,
            })),
            start,
            end,
            fork,
        }
    }

    /// Whether the table must be reset before the next datagram: less is free than that
    /// may need.
    ///
    /// # Safety
    ///
    /// The caller holds the table's lock, or nobody else knows the arena.
    pub(crate) unsafe fn is_exhausted(&self) -> bool {
        // SAFETY: nobody else uses it, as the caller promises.
        let pages = unsafe { &*self.memory.get() }.allocator();
        pages.next.get() > pages.reserve
    }

    /// The bytes that were ever used since the start or the latest reset.
    ///
    /// # Safety
    ///
    /// As of `is_exhausted`.
    #[cfg(test)]
    pub(crate) unsafe fn taken(&self) -> usize {
        // SAFETY: nobody else uses it, as the caller promises.
        let pages = unsafe { &*self.memory.get() }.allocator();
        pages.next.get() - self.start
    }

    /// Begins again. The memory goes back to the system.
    ///
    /// # Safety
    ///
    /// The caller holds the table's lock. Nothing that was allocated is used any more.
    pub(crate) unsafe fn reset(&self) {
        // SAFETY: nobody else uses it, as the caller promises.
        let pages = unsafe { &*self.memory.get() }.allocator();
        let empty = Pages {
            next: Cell::new(self.start),
            reserve: pages.reserve,
            end: self.end,
        };
        // SAFETY: as above. What was there has no destructor, and may be damaged.
        unsafe { self.memory.get().write(Dlmalloc::new_with_allocator(empty)) };
        let start = ptr::with_exposed_provenance_mut::<c_void>(self.start);
        let advice = match self.fork {
            Fork::Shared => libc::MADV_REMOVE,
            Fork::Separate => libc::MADV_DONTNEED,
        };
        // A failure means that pages stay, no more.
        // SAFETY: these pages are the arena's own, and nothing in them is used any more.
        unsafe { libc::madvise(start, self.end - self.start, advice) };
    }
}

/// While it lives, this thread allocates from an arena.
pub(crate) struct Using<'t>(&'t ThisThread);

impl<'t> Using<'t> {
    /// # Safety
    ///
    /// This thread holds the table's lock for as long as the result lives.
    #[inline]
    pub(crate) unsafe fn new(thread: &'t ThisThread, arena: &Arena) -> Self {
        let arena = ptr::from_ref(arena).cast_mut();
        thread.arena.store(arena, Ordering::Relaxed);
        Self(thread)
    }
}

impl Drop for Using<'_> {
    #[inline]
    fn drop(&mut self) {
        self.0.arena.store(ptr::null_mut(), Ordering::Relaxed);
    }
}

/// This thread allocates as usual from now on.
pub(crate) fn leave() {
    this_thread::with(|thread| thread.arena.store(ptr::null_mut(), Ordering::Relaxed));
}

/// While it lives, this thread allocates as usual, even where a signal handler has
/// interrupted its work on the table.
pub(crate) struct Suspended(*mut Arena);

#[inline]
pub(crate) fn suspend() -> Suspended {
    this_thread::with(|thread| {
        let before = thread.arena.load(Ordering::Relaxed);
        if !before.is_null() {
            thread.arena.store(ptr::null_mut(), Ordering::Relaxed);
        }
        Suspended(before)
    })
}

impl Drop for Suspended {
    #[inline]
    fn drop(&mut self) {
        if !self.0.is_null() {
            this_thread::with(|thread| {
                // The work may be over: the program had left it by longjmp(3), which the
                // table has found out meanwhile.
                if thread.inside.load(Ordering::Relaxed) {
                    thread.arena.store(self.0, Ordering::Relaxed);
                }
            });
        }
    }
}

#[inline]
fn used() -> Option<&'static Arena> {
    let arena = this_thread::with(|thread| thread.arena.load(Ordering::Relaxed));
    // SAFETY: an arena is never unmapped.
    unsafe { arena.as_ref() }
}

/// An arena's addresses. A process has one arena; only unit tests make several.
struct Range {
    start: AtomicUsize,
    len: AtomicUsize,
}

static RANGES: [Range; if cfg!(test) { 64 } else { 1 }] = [const {
    Range {
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
    }
}; if cfg!(test) { 64 } else { 1 }];

impl Range {
    /// Makes it this range, unless it is another already.
    fn is(&self, start: usize, len: usize) -> bool {
        let free = self
            .start
            .compare_exchange(0, start, Ordering::Relaxed, Ordering::Relaxed)
            .is_ok();
        if free {
            self.len.store(len, Ordering::Relaxed);
        }
        free
    }

    #[inline]
    fn contains(&self, address: usize) -> bool {
        address.wrapping_sub(self.start.load(Ordering::Relaxed)) < self.len.load(Ordering::Relaxed)
    }
}

#[inline]
fn is_shared(memory: *mut u8) -> bool {
    RANGES.iter().any(|range| range.contains(memory.addr()))
}

/// Allocates in the arena while this thread works on the table, otherwise by the C
/// library. Memory goes back to where it came from.
struct Shared;

// SAFETY: each request goes to one of two allocators that keep to the contract; memory
// that is freed or resized goes to that which it came from, as its address tells. Memory of
// the arena is left alone unless the thread holds the lock.
unsafe impl GlobalAlloc for Shared {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match used() {
            // SAFETY: the caller's promises are passed on.
            None => unsafe { System.alloc(layout) },
            // SAFETY: this thread holds the lock, so nobody else uses the arena.
            Some(arena) => unsafe {
                #[cfg(test)]
                count(1);
                (*arena.memory.get()).malloc(layout.size(), layout.align())
            },
        }
    }

    #[inline]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        match used() {
            // SAFETY: the caller's promises are passed on.
            None => unsafe { System.alloc_zeroed(layout) },
            // SAFETY: this thread holds the lock, so nobody else uses the arena.
            Some(arena) => unsafe {
                #[cfg(test)]
                count(1);
                (*arena.memory.get()).calloc(layout.size(), layout.align())
            },
        }
    }

    #[inline]
    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        if !is_shared(memory) {
            // SAFETY: it came from there.
            unsafe { System.dealloc(memory, layout) }
        } else if let Some(arena) = used() {
            #[cfg(test)]
            count(-1);
            // SAFETY: it came from there, and this thread holds the lock.
            unsafe { (*arena.memory.get()).free(memory, layout.size(), layout.align()) }
        }
    }

    #[inline]
    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        if !is_shared(memory) {
            // SAFETY: it came from there.
            return unsafe { System.realloc(memory, layout, new_size) };
        }
        let (size, align) = (layout.size(), layout.align());
        if let Some(arena) = used() {
            // SAFETY: it came from there, and this thread holds the lock.
            return unsafe { (*arena.memory.get()).realloc(memory, size, align, new_size) };
        }
        // SAFETY: the caller promises that the new layout is valid.
        let new = unsafe { System.alloc(Layout::from_size_align_unchecked(new_size, align)) };
        if !new.is_null() {
            // SAFETY: both are valid for as many bytes, and differ.
            unsafe { ptr::copy_nonoverlapping(memory, new, size.min(new_size)) };
        }
        new
    }
}

#[cfg(test)]
thread_local! {
    /// This thread's allocations in arenas, less those that it freed.
    static LIVE: Cell<isize> = const { Cell::new(0) };
}

#[cfg(test)]
fn count(by: isize) {
    LIVE.set(LIVE.get() + by);
}

#[cfg(test)]
pub(crate) fn live() -> isize {
    LIVE.get()
}
