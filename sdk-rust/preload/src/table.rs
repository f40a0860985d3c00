//! The clients and their reply paths, in memory that forked processes share: whichever
//! process received a client's datagram, any of them can answer it.
//!
//! One [`Demux`] for each place ([`Local`]) that a socket is taken over at, all of
//! them in the [`arena`], under one lock: a robust pthread mutex that processes share. A
//! process that dies while it holds the lock leaves the table in an unknown state; the next
//! one then begins with an empty table, and counts that. The lock is held for the time of a
//! few lookups, never during a system call that waits.
//!
//! With PPV2_FORK=separate, each process has a copy of the memory: see [`forked`].

use std::cell::{Cell as StdCell, UnsafeCell};
use std::hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher};
use std::io::{self, Write as _};
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::panic::{self, PanicHookInfo};
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering, compiler_fence};
use std::thread;
use std::time::{Duration, Instant};

use libc::{c_int, pthread_mutex_t, pthread_mutexattr_t};
use ppv2_sdk::{Demux, DropReason, ReplyHeader, ReplyPath, Untrusted};
use thiserror::Error;

use crate::arena::{self, Arena};
use crate::real;
use crate::recent::{self, Seen};
use crate::settings::{Fork, Settings};
use crate::stats::{Cell, Counts, Text};
use crate::this_thread::{self, ThisThread};

/// Places that sockets are bound to and taken over. It bounds what a program that binds to
/// ever new ports can use up, as one for media streams does; it can't bind to more. All
/// ports of an address are within it.
const MAX_ENDPOINTS: usize = if cfg!(test) { 2048 } else { 1 << 16 };

/// At most half of it is in use.
const INDEX: usize = 2 * MAX_ENDPOINTS;

/// A section of code that holds the lock takes microseconds. If calls have found the
/// thread inside one for this long, and as many of them, then it was left by longjmp(3).
const ABANDONED_AFTER: i64 = if cfg!(test) {
    20_000_000
} else {
    1_000_000_000
};
const ABANDONED_CALLS: u32 = 16;

/// A call that waits for the lock for so many seconds, during which nobody gets it, fails
/// as in a handler: a process that is stopped while it holds the lock must not stop all
/// others for good.
const PATIENCE: i64 = 2;

/// The number in the table of where a socket is bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Endpoint(pub(crate) u32);

/// Where a socket is bound. Two sockets with the same address and port have no client in
/// common if they are in different network namespaces, or bound to different devices: there,
/// the same addresses may be other hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Local {
    pub(crate) address: SocketAddr,
    /// The number of the network namespace; 0 where the kernel doesn't tell.
    pub(crate) network: u64,
    /// The index of the device (SO_BINDTODEVICE); 0: all of them.
    pub(crate) device: u32,
}

/// What a datagram is to the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Judged {
    /// IPv4 addresses as such, not mapped.
    pub(crate) client: SocketAddr,
    /// The address that the client sent to, if the header says it.
    pub(crate) destination: Option<SocketAddr>,
    /// Where the payload begins.
    pub(crate) header_len: usize,
    /// Its sender is talked to directly.
    pub(crate) is_direct: bool,
}

/// A datagram, and the path of a reply to it if that is a proxy's.
struct Looked {
    datagram: Judged,
    path: Option<ReplyPath>,
}

/// How a datagram to a client leaves.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Path {
    /// By its reply path.
    Proxied {
        to: SocketAddr,
        /// The local address to leave from, of a socket that is bound to all.
        local: Option<IpAddr>,
        /// Stands in front of the payload; often empty.
        header: ReplyHeader,
    },
    /// As the program said: the address is talked to directly.
    Direct,
}

/// What only the preload library counts, beside the SDK's drop reasons.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Counter {
    /// Dropped: a client's IPv6 address, on a socket for IPv4.
    ClientFamily,
    /// Dropped: the socket is connected to another client.
    OtherClient,
    /// Dropped: there was no memory for it.
    NoMemory,
    /// Dropped: a signal handler has overwritten it, or the table could not be locked.
    Interrupted,
    /// Dropped: the program passed an address that is no memory.
    BadPointer,
    /// Datagrams sent by a reply path.
    RepliesSent,
    /// Datagrams not sent: their address is no client's, or was forgotten.
    RepliesWithoutPath,
    /// Panics of this library, each caught.
    Panics,
}

/// What processes share, at the front of the memory.
struct Shared {
    mutex: UnsafeCell<pthread_mutex_t>,
    arena: Arena,
    /// How often the lock was taken.
    sections: AtomicU64,
    /// That number, and 1, when a call last waited in vain: no other call waits for the same
    /// holder.
    stuck: AtomicU64,
    /// The lock was released by somebody who didn't hold it.
    spoilt: AtomicBool,
    /// The same in all processes of the family: it was there before the first fork.
    settings: &'static Settings,
    /// The time when the table was made, by both clocks.
    start: (Instant, i64),
    counts: Counts,
    /// Entries that are in use; they never become unused.
    endpoints: AtomicU32,
    directory: [Entry; MAX_ENDPOINTS],
    /// The number of the entry for each place and 1, at the place's hash or behind it; 0:
    /// none. Under the lock.
    index: [StdCell<u32>; INDEX],
}

// SAFETY: atomics apart, only the thread that holds the lock uses it.
unsafe impl Sync for Shared {}

/// Where a socket is bound, with its clients. Under the lock.
struct Entry {
    local: StdCell<MaybeUninit<Local>>,
    /// Null until its first datagram. In the arena.
    demux: StdCell<*mut Demux>,
    /// What its demux said last, and is counted.
    clients: StdCell<i64>,
    evicted: StdCell<u64>,
    not_remembered: StdCell<u64>,
}

/// The table can't be made.
#[derive(Debug, Error)]
#[error(
    "no memory for a table of {clients} clients: {source}; lower PPV2_MAX_CLIENTS, or raise the limit of address space (ulimit -v)"
)]
pub(crate) struct TableError {
    clients: usize,
    source: io::Error,
}

static SHARED: AtomicPtr<Shared> = AtomicPtr::new(ptr::null_mut());

/// The table, locked: for one call of the program's, which may move several datagrams.
pub(crate) struct Table {
    shared: &'static Shared,
    now: Instant,
    /// The lock belongs to this thread, which the guard doesn't leave.
    thread: *const ThisThread,
}

/// Makes the shared memory. Once, before the program begins.
///
/// # Errors
///
/// The process may not have as much memory.
pub(crate) fn start(settings: &'static Settings, text: Option<Text>) -> Result<(), TableError> {
    let shared = Shared::make(settings, text)?;
    SHARED.store(ptr::from_ref(shared).cast_mut(), Ordering::Release);
    install_hook();
    Ok(())
}

/// Before a panic's exception is allocated, which outlives the section, the thread stops
/// allocating in the arena. The table is reset when the guard is dropped. The message alone
/// was in the arena before: it can't be read later on, and is freed nowhere.
fn install_hook() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = panic::take_hook();
        let stderr = identity(libc::STDERR_FILENO);
        panic::set_hook(Box::new(move |info| {
            arena::leave();
            count(Counter::Panics, 1);
            if cfg!(test) {
                before(info);
            } else if stderr.is_some() && identity(libc::STDERR_FILENO) == stderr {
                // The program has given the descriptor no other use.
                report(info);
            }
        }));
    });
}

/// The file that a descriptor refers to.
fn identity(fd: c_int) -> Option<(libc::dev_t, libc::ino_t)> {
    let mut status = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: `status` can be written to, and is if the call succeeds.
    unsafe {
        (libc::fstat(fd, status.as_mut_ptr()) == 0).then(|| {
            let status = status.assume_init();
            (status.st_dev, status.st_ino)
        })
    }
}

/// Writes a line without allocating.
fn report(info: &PanicHookInfo<'_>) {
    let mut line = [0; 512];
    let mut rest = &mut line[..];
    let payload = info.payload();
    let message = payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    // What has no room is left out.
    let _ = write!(
        rest,
        "ppv2-preload: a call failed by a fault of this library"
    );
    if let Some(location) = info.location() {
        let _ = write!(rest, " at {location}");
    }
    let _ = writeln!(rest, ": {}", message.unwrap_or_default());
    let unused = rest.len();
    let written = line.len() - unused;
    // SAFETY: so many bytes can be read.
    unsafe { real::write(libc::STDERR_FILENO, line.as_ptr().cast(), written) };
}

#[inline]
fn shared() -> Option<&'static Shared> {
    // SAFETY: it is mapped for good, and was written before its address was stored.
    unsafe { SHARED.load(Ordering::Acquire).as_ref() }
}

/// This process is a new one.
pub(crate) fn forked() {
    if let Some(shared) = shared() {
        shared.forked();
    }
}

/// The number for where a socket is bound; `None` if the table holds no more.
pub(crate) fn endpoint(local: Local) -> Option<Endpoint> {
    lock()?.endpoint(local)
}

/// `None` if a signal handler has interrupted this thread while it held the lock.
#[inline]
pub(crate) fn lock() -> Option<Table> {
    shared()?.lock()
}

/// As [`Table::receive`] for a datagram of a client that has sent the same way a moment ago,
/// without the lock. `None` for others, which are not counted.
#[inline]
pub(crate) fn receive_again(
    seen: &Seen<'_>,
    is_for: impl FnOnce(&Judged) -> bool,
) -> Option<Judged> {
    let shared = shared()?;
    let recent = shared.settings.recent?;
    recent::judged(rough_clock(), recent, seen).filter(is_for)
}

/// As [`Table::path`] for a client that this thread has heard a moment ago, without the lock,
/// where a datagram needs nothing but another address to be sent to. `None` for others.
#[inline]
pub(crate) fn path_again(
    endpoint: Endpoint,
    to: SocketAddr,
) -> Option<(SocketAddr, Option<IpAddr>)> {
    let recent = shared()?.settings.recent?;
    recent::path(rough_clock(), recent, endpoint, to)
}

/// How many places sockets have been taken over at.
#[cfg(test)]
pub(crate) fn endpoints() -> usize {
    shared().map_or(0, |shared| shared.entries().len())
}

/// Whether this thread is in a section that holds the lock: a signal handler is running.
#[inline]
pub(crate) fn is_inside() -> bool {
    this_thread::with(|thread| thread.inside.load(Ordering::Relaxed))
}

/// The program serves: what is counted is its own.
pub(crate) fn show_counts() {
    if let Some(shared) = shared() {
        shared.counts.show();
    }
}

/// Counts; needs no lock.
pub(crate) fn count(counter: Counter, by: u64) {
    if let Some(shared) = shared() {
        shared.count(counter, by);
    }
}

/// Counts datagrams that the program has got, `direct` of them from peers; needs no lock.
#[inline]
pub(crate) fn count_delivered(by: u64, direct: u64) {
    if let Some(shared) = shared() {
        shared.count_delivered(by, direct);
    }
}

#[cfg(test)]
pub(crate) fn counted(cell: Cell) -> u64 {
    shared().map_or(0, |shared| shared.counts.get(cell))
}

impl Shared {
    fn make(settings: &'static Settings, text: Option<Text>) -> Result<&'static Self, TableError> {
        // What is made at its first use must be made outside of the arena: the keys of
        // the hash tables, and the clock of the SDK.
        drop(warmed(settings));
        let clients = settings.max_clients;
        let failed = |source| TableError { clients, source };
        let mapped = arena::map(size_of::<Self>(), clients, settings.fork);
        let (address, len) = mapped.map_err(failed)?;
        let counts = Counts::new(text, settings.fork).map_err(failed)?;
        let shared = ptr::with_exposed_provenance_mut::<Self>(address);
        let end = address + len;
        let arena = Arena::new(address + size_of::<Self>(), end, clients, settings.fork);
        let start = (Instant::now(), rough_clock());
        // SAFETY: the memory is new, large enough, and aligned to a page. What is not
        // written here may be all zeros.
        unsafe {
            (&raw mut (*shared).arena).write(arena);
            (&raw mut (*shared).settings).write(settings);
            (&raw mut (*shared).start).write(start);
            (&raw mut (*shared).counts).write(counts);
            make_mutex((*shared).mutex.get()).map_err(failed)?;
            Ok(&*shared)
        }
    }

    fn count(&self, counter: Counter, by: u64) {
        let (cell, is_drop) = match counter {
            Counter::ClientFamily => (Cell::DroppedClientFamily, true),
            Counter::OtherClient => (Cell::DroppedOtherClient, true),
            Counter::NoMemory => (Cell::DroppedNoMemory, true),
            Counter::Interrupted => (Cell::DroppedInterrupted, true),
            Counter::BadPointer => (Cell::DroppedBadPointer, true),
            Counter::RepliesSent => (Cell::RepliesSent, false),
            Counter::RepliesWithoutPath => (Cell::RepliesWithoutPath, false),
            Counter::Panics => (Cell::Panics, false),
        };
        if is_drop {
            self.counts.add(Cell::Received, by);
        }
        self.counts.add(cell, by);
    }

    #[inline]
    fn count_delivered(&self, by: u64, direct: u64) {
        self.counts.add(Cell::Received, by);
        self.counts.add(Cell::Delivered, by);
        if direct > 0 {
            self.counts.add(Cell::Direct, direct);
        }
    }

    #[inline]
    fn lock(&'static self) -> Option<Table> {
        let this = this_thread::get();
        // SAFETY: this function doesn't leave the thread.
        let thread = unsafe { &*this };
        let mut abandoned = false;
        if thread.inside.load(Ordering::Relaxed) {
            abandoned = is_abandoned(thread);
            if !abandoned {
                self.counts.add(Cell::Interrupted, 1);
                return None;
            }
        }
        thread.inside.store(true, Ordering::Relaxed);
        compiler_fence(Ordering::SeqCst);
        let result = self.lock_mutex(abandoned);
        let reset = match result {
            0 => false,
            libc::EOWNERDEAD => {
                // SAFETY: the mutex was made with the memory, and this thread now holds it.
                unsafe { libc::pthread_mutex_consistent(self.mutex.get()) };
                true
            }
            // This thread holds it, since the section that it left did.
            libc::EDEADLK if abandoned => true,
            // EBUSY and EDEADLK: its holder has been stopped, or has left the section by
            // longjmp and called nothing since.
            _ => {
                thread.inside.store(false, Ordering::Relaxed);
                self.counts.add(Cell::Interrupted, 1);
                return None;
            }
        };
        // A handler may have taken the lock, and released it, while this thread waited.
        thread.inside.store(true, Ordering::Relaxed);
        thread.found.store(0, Ordering::Relaxed);
        let sections = self.sections.load(Ordering::Relaxed);
        self.sections
            .store(sections.wrapping_add(1), Ordering::Relaxed);
        // It still is set if a section was left.
        thread.arena.store(ptr::null_mut(), Ordering::Relaxed);
        compiler_fence(Ordering::SeqCst);
        if reset || self.spoilt.load(Ordering::Relaxed) {
            self.reset();
        }
        Some(Table {
            shared: self,
            now: self.now(),
            thread: this,
        })
    }

    #[inline]
    fn lock_mutex(&self, abandoned: bool) -> c_int {
        // SAFETY: the mutex was made with the memory.
        let result = unsafe { libc::pthread_mutex_trylock(self.mutex.get()) };
        if result == libc::EBUSY || result == libc::EDEADLK && !abandoned {
            self.wait_for_mutex(abandoned)
        } else {
            result
        }
    }

    #[cold]
    fn wait_for_mutex(&self, abandoned: bool) -> c_int {
        loop {
            let sections = self.sections.load(Ordering::Relaxed);
            let is_stuck = self.stuck.load(Ordering::Relaxed) == sections.wrapping_add(1);
            // A time that is over. Only a function that could wait tells by EDEADLK, with
            // musl, that this very thread holds the lock.
            let mut until = libc::timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            if !is_stuck {
                // SAFETY: `until` can be written to.
                unsafe { libc::clock_gettime(libc::CLOCK_REALTIME, &raw mut until) };
                until.tv_sec += PATIENCE;
            }
            let result = self.lock_until(until, abandoned);
            if result != libc::ETIMEDOUT {
                return result;
            }
            if is_stuck {
                return libc::EBUSY;
            }
            // While others get it, this thread's turn comes.
            if sections == self.sections.load(Ordering::Relaxed) {
                self.stuck
                    .store(sections.wrapping_add(1), Ordering::Relaxed);
                // SAFETY: the mutex was made with the memory.
                return unsafe { libc::pthread_mutex_trylock(self.mutex.get()) };
            }
        }
    }

    /// As pthread_mutex_timedlock(3), but if another thread of this one's number has the lock,
    /// it waits, too: the C library tells threads apart by their numbers. One of another
    /// process may have the same in another PID namespace, or be a copy of this thread that was
    /// made without the C library's knowledge.
    fn lock_until(&self, until: libc::timespec, abandoned: bool) -> c_int {
        loop {
            // SAFETY: the mutex was made with the memory.
            let result =
                unsafe { libc::pthread_mutex_timedlock(self.mutex.get(), &raw const until) };
            if result != libc::EDEADLK || abandoned {
                return result;
            }
            let mut now = until;
            // SAFETY: `now` can be written to.
            unsafe { libc::clock_gettime(libc::CLOCK_REALTIME, &raw mut now) };
            if (now.tv_sec, now.tv_nsec) >= (until.tv_sec, until.tv_nsec) {
                return libc::ETIMEDOUT;
            }
            // The lock is held for microseconds, and a thread can't be cancelled here.
            thread::yield_now();
        }
    }

    /// In the child of a fork, before anything else of the library's. Where processes have a
    /// table each, the child begins with a copy of its parent's. If another thread of the
    /// parent was at work on it, nobody in the child will end that work.
    fn forked(&self) {
        if self.settings.fork == Fork::Shared {
            return;
        }
        self.stuck.store(0, Ordering::Relaxed);
        // SAFETY: the mutex was made with the memory.
        unsafe {
            if libc::pthread_mutex_trylock(self.mutex.get()) == 0 {
                libc::pthread_mutex_unlock(self.mutex.get());
                return;
            }
            // The owner of this copy of the mutex is no thread of this process.
            self.mutex.get().write_bytes(0, 1);
            if make_mutex(self.mutex.get()).is_ok() {
                self.spoilt.store(true, Ordering::Relaxed);
            }
        }
    }

    /// Forgets all clients. Under the lock.
    #[cold]
    fn reset(&self) {
        self.spoilt.store(false, Ordering::Relaxed);
        for entry in self.entries() {
            // Without its destructor: what it points to may be damaged.
            entry.demux.set(ptr::null_mut());
            entry.clients.set(0);
            entry.evicted.set(0);
            entry.not_remembered.set(0);
        }
        self.counts.clear(Cell::Clients);
        // SAFETY: this thread holds the lock, and no entry refers to the arena any more.
        unsafe { self.arena.reset() };
        self.counts.add_locked(Cell::TableResets, 1);
    }

    /// Runs `work` as if it were the table's, which the SDK calls.
    #[cfg(test)]
    fn arena_is_used_by(&'static self, work: impl FnOnce()) {
        let table = self.lock();
        let using = table.as_ref().map(Table::using_arena);
        work();
        drop(using);
    }

    /// The places of the index that the number may be in, in their order.
    fn index_from(&self, local: Local) -> impl Iterator<Item = &StdCell<u32>> {
        // The program chooses the places, so the hash needs no secret.
        let hash = BuildHasherDefault::<DefaultHasher>::default().hash_one(local);
        let (behind, from) = self.index.split_at(hash as usize % INDEX);
        from.iter().chain(behind)
    }

    fn entries(&self) -> &[Entry] {
        let used = self.endpoints.load(Ordering::Acquire) as usize;
        self.directory.get(..used).unwrap_or_default()
    }

    /// The time, as exact as the kernel's tick, for a fraction of what the exact one costs.
    #[inline]
    fn now(&self) -> Instant {
        let (instant, rough) = self.start;
        let since = rough_clock().saturating_sub(rough);
        instant + Duration::from_nanos(u64::try_from(since).unwrap_or_default())
    }
}

impl Entry {
    /// Of an entry that is in use.
    fn local(&self) -> Local {
        // SAFETY: it was written before the entry came into use.
        unsafe { self.local.get().assume_init() }
    }

    fn demux(&self) -> Option<&Demux> {
        // SAFETY: it is null, or what was made for this entry since the latest reset.
        unsafe { self.demux.get().as_ref() }
    }

    fn demux_made(&self, settings: &Settings) -> &Demux {
        if self.demux.get().is_null() {
            let demux = Box::new(Demux::new(settings.trust.clone()));
            self.demux.set(Box::into_raw(demux));
        }
        // SAFETY: as in `demux`, and not null.
        unsafe { &*self.demux.get() }
    }
}

impl Table {
    /// The number for where a socket is bound; `None` if the table holds no more.
    #[expect(
        clippy::needless_pass_by_ref_mut,
        reason = "what the guard refers to changes"
    )]
    fn endpoint(&mut self, local: Local) -> Option<Endpoint> {
        let local = Local {
            address: canonical(local.address),
            ..local
        };
        let shared = self.shared;
        for slot in shared.index_from(local) {
            match slot.get().checked_sub(1) {
                Some(number) if shared.entries().get(number as usize)?.local() != local => {}
                Some(number) => return Some(Endpoint(number)),
                None => {
                    let number = shared.endpoints.load(Ordering::Relaxed);
                    let entry = shared.directory.get(number as usize)?;
                    entry.local.set(MaybeUninit::new(local));
                    // A process that ends here leaves an entry without use.
                    shared.endpoints.store(number + 1, Ordering::Release);
                    slot.set(number + 1);
                    return Some(Endpoint(number));
                }
            }
        }
        None
    }

    /// Decides on a datagram: `peer` and `local` as the kernel told, IPv4 or mapped.
    /// `None`: it must be dropped, and has been counted. Another one is counted once it is
    /// known what became of it.
    #[inline]
    pub(crate) fn receive(
        &mut self,
        endpoint: Endpoint,
        peer: SocketAddr,
        local: Option<IpAddr>,
        bytes: &[u8],
    ) -> Option<Judged> {
        let shared = self.shared;
        let judged = self
            .look(endpoint, peer, local, bytes)
            .inspect_err(|reason| {
                shared.counts.add(Cell::Received, 1);
                shared.counts.add_locked(Cell::Dropped(*reason), 1);
            })
            .ok()?;
        if let Some(path) = judged.path
            && shared.settings.recent.is_some()
        {
            let seen = Seen {
                endpoint,
                peer,
                local,
                bytes,
            };
            recent::note(rough_clock(), &seen, judged.datagram, &path);
        }
        Some(judged.datagram)
    }

    /// As `receive`, for a look at a datagram (MSG_PEEK) that will be received again: none is
    /// counted.
    #[inline]
    pub(crate) fn peek(
        &mut self,
        endpoint: Endpoint,
        peer: SocketAddr,
        local: Option<IpAddr>,
        bytes: &[u8],
    ) -> Option<Judged> {
        let looked = self.look(endpoint, peer, local, bytes).ok()?;
        Some(looked.datagram)
    }

    #[expect(
        clippy::needless_pass_by_ref_mut,
        reason = "what the guard refers to changes"
    )]
    #[inline]
    fn look(
        &mut self,
        endpoint: Endpoint,
        peer: SocketAddr,
        local: Option<IpAddr>,
        bytes: &[u8],
    ) -> Result<Looked, DropReason> {
        let shared = self.shared;
        let peer = canonical(peer);
        if shared.settings.is_peer(peer.ip()) {
            return Ok(Looked {
                datagram: Judged {
                    client: peer,
                    destination: None,
                    header_len: 0,
                    is_direct: true,
                },
                path: None,
            });
        }
        // Each socket's endpoint is there.
        let entry = shared.entries().get(endpoint.0 as usize);
        let entry = entry.ok_or(DropReason::Untrusted)?;
        let local = local.map(|ip| ip.to_canonical());
        let judged = self.judge(entry, peer, local, bytes);
        // SAFETY: this thread holds the lock.
        if unsafe { shared.arena.is_exhausted() } {
            shared.reset();
            // Once more, so that this client can be answered.
            let _ = self.judge(entry, peer, local, bytes);
        }
        if shared.counts.are_shown() {
            self.follow(entry);
        }
        judged
    }

    #[inline]
    fn judge(
        &self,
        entry: &Entry,
        peer: SocketAddr,
        local: Option<IpAddr>,
        bytes: &[u8],
    ) -> Result<Looked, DropReason> {
        let _using = self.using_arena();
        let settings = self.shared.settings;
        let demux = entry.demux_made(settings);
        let datagram = demux.receive(self.now, peer, local, bytes)?;
        // A client whose address is that of a host which is talked to directly: whoever forges
        // it must not be taken for this host.
        if settings.is_peer(datagram.client.ip()) {
            return Err(DropReason::ClientAddress);
        }
        // Otherwise the client is talked to directly, or may be.
        let is_proxied = datagram.proxy.is_some();
        Ok(Looked {
            datagram: Judged {
                client: datagram.client,
                destination: datagram.destination,
                header_len: datagram.header.len(),
                is_direct: false,
            },
            path: is_proxied.then_some(datagram.reply_path),
        })
    }

    #[inline]
    fn thread(&self) -> &ThisThread {
        // SAFETY: the guard doesn't leave the thread.
        unsafe { &*self.thread }
    }

    #[inline]
    fn using_arena(&self) -> arena::Using<'_> {
        // SAFETY: this thread holds the lock until the table is dropped.
        unsafe { arena::Using::new(self.thread(), &self.shared.arena) }
    }

    /// Counts what the demux of an endpoint counts by itself.
    fn follow(&self, entry: &Entry) {
        let _using = self.using_arena();
        let Some(stats) = entry.demux().map(Demux::stats) else {
            return;
        };
        let counts = &self.shared.counts;
        let clients = i64::try_from(stats.clients).unwrap_or_default();
        counts.add_signed(Cell::Clients, clients - entry.clients.replace(clients));
        for (cell, now, before) in [
            (Cell::ClientsEvicted, stats.clients_evicted, &entry.evicted),
            (
                Cell::SendersNotRemembered,
                stats.senders_not_remembered,
                &entry.not_remembered,
            ),
        ] {
            let before = before.replace(now);
            if now != before {
                counts.add_locked(cell, now.saturating_sub(before));
            }
        }
    }

    /// How to send to an address; `None` if it is no client's that is known. Not counted:
    /// see [`Counter::RepliesSent`] and [`Counter::RepliesWithoutPath`].
    #[inline]
    pub(crate) fn path(&self, endpoint: Endpoint, to: SocketAddr) -> Option<Path> {
        let settings = self.shared.settings;
        let to = canonical(to);
        if settings.is_peer(to.ip()) {
            return Some(Path::Direct);
        }
        let entry = self.shared.entries().get(endpoint.0 as usize)?;
        match self.path_of(entry, to) {
            Some(path) => Some(path.into()),
            None if settings.untrusted == Untrusted::Accept => Some(Path::Direct),
            None => None,
        }
    }

    #[inline]
    fn path_of(&self, entry: &Entry, client: SocketAddr) -> Option<ReplyPath> {
        let _using = self.using_arena();
        entry.demux()?.reply_path(self.now, client)
    }

    /// The endpoint that knows a client by a proxy, with where it is bound and the path:
    /// the one that heard the client latest, of those in the same network as a socket that is
    /// bound there. `None` for an address that is talked to directly, be it a peer or, where
    /// untrusted senders are accepted, a direct client.
    pub(crate) fn find(
        &self,
        client: SocketAddr,
        network: u64,
        device: u32,
    ) -> Option<(Endpoint, Local, Path)> {
        let client = canonical(client);
        if self.shared.settings.is_peer(client.ip()) {
            return None;
        }
        let accepts = self.shared.settings.untrusted == Untrusted::Accept;
        let mut latest: Option<(u32, &Entry, ReplyPath)> = None;
        for (number, entry) in (0..).zip(self.shared.entries()) {
            let local = entry.local();
            if local.network == network
                && (local.device == device || local.device == 0 || device == 0)
                && let Some(path) = self.path_of(entry, client)
                && !(accepts && canonical(path.to) == client)
                && latest.is_none_or(|(_, _, other)| path.is_newer_than(&other))
            {
                latest = Some((number, entry, path));
            }
        }
        latest.map(|(number, entry, path)| (Endpoint(number), entry.local(), path.into()))
    }
}

impl Drop for Table {
    #[inline]
    fn drop(&mut self) {
        let shared = self.shared;
        if thread::panicking() {
            shared.reset();
        }
        compiler_fence(Ordering::SeqCst);
        // SAFETY: the mutex was made with the memory.
        if unsafe { libc::pthread_mutex_unlock(shared.mutex.get()) } != 0 {
            // A signal handler forked, and this is the child, which went on with what the
            // handler had interrupted: both have changed the table.
            shared.spoilt.store(true, Ordering::Relaxed);
        }
        self.thread().inside.store(false, Ordering::Relaxed);
    }
}

impl From<ReplyPath> for Path {
    #[inline]
    fn from(path: ReplyPath) -> Self {
        Self::Proxied {
            to: canonical(path.to),
            local: path.local,
            header: path.header(),
        }
    }
}

/// An IPv4-mapped address as the IPv4 address.
#[inline]
fn canonical(address: SocketAddr) -> SocketAddr {
    let SocketAddr::V6(v6) = address else {
        return address;
    };
    match v6.ip().to_ipv4_mapped() {
        Some(ip) => SocketAddr::from((ip, v6.port())),
        None => address,
    }
}

/// Whether a thread that is in a section has left it by longjmp(3). If not, a signal handler
/// has interrupted it.
#[cold]
fn is_abandoned(thread: &ThisThread) -> bool {
    let now = rough_clock();
    let found = thread.found.fetch_add(1, Ordering::Relaxed);
    if found == 0 {
        thread.found_at.store(now, Ordering::Relaxed);
    }
    let since = now - thread.found_at.load(Ordering::Relaxed);
    found >= ABANDONED_CALLS && since >= ABANDONED_AFTER
}

/// A demux that has received and answered, and is of no use.
fn warmed(settings: &Settings) -> Demux {
    let demux = Demux::new(settings.trust.clone());
    let nobody = SocketAddr::from(([0, 0, 0, 0], 0));
    let _ = demux.receive(Instant::now(), nobody, None, b"");
    let _ = demux.reply_path(Instant::now(), nobody);
    let _ = demux.stats();
    demux
}

/// CLOCK_MONOTONIC_COARSE in nanoseconds.
#[inline]
fn rough_clock() -> i64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` can be written to.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &raw mut now) };
    now.tv_sec * 1_000_000_000 + now.tv_nsec
}

/// Makes the mutex that processes share.
///
/// # Safety
///
/// `mutex` can be written to, and nobody uses it.
unsafe fn make_mutex(mutex: *mut pthread_mutex_t) -> io::Result<()> {
    let mut attributes = MaybeUninit::<pthread_mutexattr_t>::uninit();
    let attributes = attributes.as_mut_ptr();
    let check = |result: c_int| match result {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    };
    // SAFETY: the attributes are made first; the mutex can be written to.
    unsafe {
        check(libc::pthread_mutexattr_init(attributes))?;
        check(libc::pthread_mutexattr_setpshared(
            attributes,
            libc::PTHREAD_PROCESS_SHARED,
        ))?;
        check(libc::pthread_mutexattr_setrobust(
            attributes,
            libc::PTHREAD_MUTEX_ROBUST,
        ))?;
        check(libc::pthread_mutexattr_settype(
            attributes,
            libc::PTHREAD_MUTEX_ERRORCHECK,
        ))?;
        check(libc::pthread_mutex_init(mutex, attributes))
    }
}

#[cfg(test)]
mod tests;
