//! poll, select and epoll: a socket in blocking mode is reported readable only if a
//! datagram for the program is there.
//!
//! What must be dropped at the head of the queue is discarded before the program is told;
//! if nothing is left, the call waits on. Sockets in non-blocking mode are reported as the
//! kernel says: their programs know EAGAIN.

use std::fs;
use std::ptr;
use std::slice;
use std::time::{Duration, Instant};

use libc::{c_int, c_ulong, epoll_event, fd_set, pollfd, timespec, timeval};

use crate::boundary::is_plausible;
use crate::registry::Marks;
use crate::socket::{self, Flag, Registration, Socket};
use crate::{real, receive, registry};

const READABLE: i16 = libc::POLLIN | libc::POLLRDNORM;
const EPOLL_READABLE: u32 = (libc::EPOLLIN | libc::EPOLLRDNORM) as u32;
const EDGE: u32 = libc::EPOLLET as u32;
const ONCE: u32 = libc::EPOLLONESHOT as u32;
const EXCLUSIVE: u32 = libc::EPOLLEXCLUSIVE as u32;

const ZERO: timespec = timespec {
    tv_sec: 0,
    tv_nsec: 0,
};

/// Until when a call waits.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Deadline {
    Never,
    At(Instant),
}

impl Deadline {
    fn after(wait: Duration) -> Self {
        Instant::now()
            .checked_add(wait)
            .map_or(Self::Never, Self::At)
    }

    /// Negative: never.
    pub(crate) fn after_millis(timeout: c_int) -> Self {
        u64::try_from(timeout).map_or(Self::Never, |millis| {
            Self::after(Duration::from_millis(millis))
        })
    }

    /// `None` if the kernel would not take the time.
    pub(crate) fn after_timespec(timeout: Option<&timespec>) -> Option<Self> {
        let Some(timeout) = timeout else {
            return Some(Self::Never);
        };
        let secs = u64::try_from(timeout.tv_sec).ok()?;
        let nanos = u32::try_from(timeout.tv_nsec).ok()?;
        (nanos < 1_000_000_000).then(|| Self::after(Duration::new(secs, nanos)))
    }

    /// `None` if the kernel would not take the time.
    pub(crate) fn after_timeval(timeout: Option<&timeval>) -> Option<Self> {
        let Some(timeout) = timeout else {
            return Some(Self::Never);
        };
        let secs = u64::try_from(timeout.tv_sec).ok()?;
        let micros = u64::try_from(timeout.tv_usec).ok()?;
        let secs = secs.checked_add(micros / 1_000_000)?;
        let nanos = u32::try_from(micros % 1_000_000).ok()? * 1000;
        Some(Self::after(Duration::new(secs, nanos)))
    }

    fn remaining(self) -> Option<Duration> {
        match self {
            Self::Never => None,
            Self::At(at) => Some(at.saturating_duration_since(Instant::now())),
        }
    }

    /// Rounded up: a call must not end before its time.
    pub(crate) fn millis(self) -> c_int {
        self.remaining().map_or(-1, |left| {
            c_int::try_from(left.as_nanos().div_ceil(1_000_000)).unwrap_or(c_int::MAX)
        })
    }

    pub(crate) fn timespec(self) -> Option<timespec> {
        self.remaining().map(|left| timespec {
            tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        })
    }

    pub(crate) fn timeval(self) -> Option<timeval> {
        self.remaining().map(|left| timeval {
            tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
            tv_usec: left.subsec_micros().into(),
        })
    }

    pub(crate) fn is_over(self) -> bool {
        self.remaining().is_some_and(|left| left.is_zero())
    }

    /// What the real call is given: no time if a datagram is held here.
    pub(crate) fn timespec_or_zero(self, at_once: bool) -> Option<timespec> {
        if at_once { Some(ZERO) } else { self.timespec() }
    }

    pub(crate) fn millis_or_zero(self, at_once: bool) -> c_int {
        if at_once { 0 } else { self.millis() }
    }
}

/// Whether a descriptor's readiness is looked at here.
fn concerned(fd: c_int) -> Option<&'static Socket> {
    registry::get(fd).filter(|socket| {
        !socket.is(Flag::Direct) && (!socket.is(Flag::NonBlocking) || socket.is_holding())
    })
}

/// Whether the program waits for sockets in blocking mode that are taken over.
///
/// # Safety
///
/// `count` elements can be read at `fds`, if it isn't null.
#[inline]
pub(crate) unsafe fn concerns_poll(fds: *const pollfd, count: libc::nfds_t) -> bool {
    if !registry::is_used() || !is_plausible(fds) || !may_be_polled(count) {
        return false;
    }
    // SAFETY: as the caller says.
    unsafe { polled(fds.cast_mut(), count) }
        .iter()
        .any(|polled| polled.events & READABLE != 0 && concerned(polled.fd).is_some())
}

/// Whether the kernel takes so many. It takes as many as descriptors may be open.
fn may_be_polled(count: libc::nfds_t) -> bool {
    const FEW: libc::nfds_t = 256;
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the limit can be written to.
    count <= FEW
        || unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } == 0
            && count <= limit.rlim_cur
}

/// # Safety
///
/// `count` elements can be read and written at `fds`.
unsafe fn polled<'p>(fds: *mut pollfd, count: libc::nfds_t) -> &'p mut [pollfd] {
    // SAFETY: as the caller says; there are never more of them than memory.
    unsafe { slice::from_raw_parts_mut(fds, usize::try_from(count).unwrap_or(0)) }
}

/// Whether a datagram that the program waits for is held here.
///
/// # Safety
///
/// As of `polled`.
pub(crate) unsafe fn holds_polled(fds: *mut pollfd, count: libc::nfds_t) -> bool {
    // SAFETY: as the caller says.
    unsafe { polled(fds, count) }
        .iter()
        .any(|polled| polled.events & READABLE != 0 && is_holding(polled.fd))
}

fn is_holding(fd: c_int) -> bool {
    registry::get(fd).is_some_and(Socket::is_holding)
}

/// Corrects what the kernel has reported: how many descriptors have events.
///
/// # Safety
///
/// As of `polled`.
pub(crate) unsafe fn correct_polled(fds: *mut pollfd, count: libc::nfds_t) -> c_int {
    // SAFETY: as the caller says.
    let polled = unsafe { polled(fds, count) };
    let mut ready = 0;
    for polled in polled {
        if polled.events & READABLE != 0
            && let Some(socket) = concerned(polled.fd)
        {
            if polled.revents & READABLE != 0
                && polled.revents & libc::POLLERR == 0
                && !receive::discard_dropped(polled.fd, socket)
            {
                polled.revents &= !READABLE;
            } else if socket.is_holding() {
                polled.revents |= polled.events & READABLE;
            }
        }
        ready += c_int::from(polled.revents != 0);
    }
    ready
}

const WORD: usize = c_ulong::BITS as usize;

/// The set of descriptors that a program passes to select(2), as words. It may be shorter
/// or longer than an `fd_set`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Set(*mut c_ulong);

impl Set {
    pub(crate) fn new(set: *mut fd_set) -> Self {
        Self(set.cast())
    }

    /// # Safety
    ///
    /// It is null, or `word` lies within.
    unsafe fn word(self, word: usize) -> c_ulong {
        if !is_plausible(self.0) {
            return 0;
        }
        // SAFETY: as the caller says.
        unsafe { self.0.add(word).read() }
    }

    /// # Safety
    ///
    /// It is null, or `fd` lies within.
    unsafe fn put(self, fd: c_int, is_in: bool) {
        let Ok(fd) = usize::try_from(fd) else {
            return;
        };
        let bit = 1 << (fd % WORD);
        // SAFETY: as the caller says, who passes no null here.
        unsafe {
            let word = self.0.add(fd / WORD);
            word.write(if is_in {
                word.read() | bit
            } else {
                word.read() & !bit
            });
        }
    }

    /// # Safety
    ///
    /// It is null, or `words` lie within.
    pub(crate) unsafe fn save<const N: usize>(self, words: usize) -> [c_ulong; N] {
        let mut saved = [0; N];
        for (at, saved) in saved.iter_mut().enumerate().take(words) {
            // SAFETY: as the caller says.
            *saved = unsafe { self.word(at) };
        }
        saved
    }

    /// # Safety
    ///
    /// It is null, or `words` lie within.
    pub(crate) unsafe fn restore<const N: usize>(self, saved: &[c_ulong; N], words: usize) {
        if !self.0.is_null() {
            for (at, saved) in saved.iter().enumerate().take(words) {
                // SAFETY: as the caller says.
                unsafe { self.0.add(at).write(*saved) };
            }
        }
    }

    /// The descriptors in it that are concerned. Words behind the highest that was taken
    /// over are not looked at: the kernel doesn't either, if no such descriptor is open.
    ///
    /// # Safety
    ///
    /// The kernel may read the set up to `count`.
    unsafe fn concerned(self, count: c_int) -> impl Iterator<Item = (c_int, &'static Socket)> {
        let count = count.min(registry::highest() + 1);
        let words = usize::try_from(count).unwrap_or(0).div_ceil(WORD);
        (0..words).flat_map(move |word| {
            // SAFETY: as the caller says.
            let bits = unsafe { self.word(word) };
            (0..WORD)
                .filter(move |bit| bits >> bit & 1 != 0)
                .filter_map(move |bit| c_int::try_from(word * WORD + bit).ok())
                .filter(move |fd| *fd < count)
                .filter_map(|fd| Some((fd, concerned(fd)?)))
        })
    }
}

/// # Safety
///
/// As of `Set::concerned`.
#[inline]
pub(crate) unsafe fn concerns_select(count: c_int, read: Set) -> bool {
    registry::is_used()
        && is_plausible(read.0)
        // SAFETY: as the caller says.
        && unsafe { read.concerned(count) }.next().is_some()
}

/// # Safety
///
/// As of `Set::concerned`.
pub(crate) unsafe fn holds_selected(count: c_int, read: Set) -> bool {
    // SAFETY: as the caller says.
    unsafe { read.concerned(count) }.any(|(_, socket)| socket.is_holding())
}

/// How many words of its sets the kernel reads and writes: programs that pass the limit of
/// descriptors as `count` may have sets for fewer.
pub(crate) fn words(count: c_int) -> usize {
    let count = usize::try_from(count).unwrap_or(0);
    let known = if count <= libc::FD_SETSIZE {
        count
    } else {
        let size = fs::read_to_string("/proc/self/status").ok();
        let size = size.as_deref().and_then(|status| {
            let line = status.lines().find_map(|line| line.strip_prefix("FDSize:"));
            line?.trim().parse::<usize>().ok()
        });
        size.map_or(count, |size| count.min(size))
    };
    known.div_ceil(WORD)
}

/// Corrects what the kernel has reported in the program's set `read`, in which `asked` is
/// what the program had asked for: how many bits of all sets are set.
///
/// # Safety
///
/// As of `Set::concerned`.
pub(crate) unsafe fn correct_selected(
    count: c_int,
    mut ready: c_int,
    read: Set,
    asked: Set,
) -> c_int {
    // SAFETY: as the caller says.
    for (fd, socket) in unsafe { asked.concerned(count) } {
        let at = usize::try_from(fd).unwrap_or(0);
        // SAFETY: as the caller says.
        let reported = unsafe { read.word(at / WORD) } >> (at % WORD) & 1 != 0;
        let readable = if reported {
            receive::has_error(fd) || receive::discard_dropped(fd, socket)
        } else {
            socket.is_holding()
        };
        if readable != reported {
            // SAFETY: as the caller says; `concerned` would have found nothing in null.
            unsafe { read.put(fd, readable) };
            ready += if readable { 1 } else { -1 };
        }
    }
    ready
}

/// Descriptors that were passed to epoll_ctl(2) as epoll instances.
static EPOLLS: Marks = Marks::new();

/// The program has called epoll_ctl(2), which has succeeded.
#[inline]
pub(crate) fn saw(epoll: c_int, operation: c_int, fd: c_int, event: *const epoll_event) {
    EPOLLS.set(epoll);
    if let Some(socket) = registry::get(fd) {
        // SAFETY: the kernel has read it, if there is one.
        let event = unsafe { event.as_ref() };
        remember(epoll, operation, fd, socket, event.copied());
    }
}

fn remember(
    epoll: c_int,
    operation: c_int,
    fd: c_int,
    socket: &Socket,
    event: Option<epoll_event>,
) {
    let Ok(mut known) = socket.epolls.try_lock() else {
        return;
    };
    known.retain(|known| (known.epoll, known.fd) != (epoll, fd));
    if let (libc::EPOLL_CTL_ADD | libc::EPOLL_CTL_MOD, Some(event)) = (operation, event) {
        known.push(Registration { epoll, fd, event });
    }
}

/// A descriptor is about to be closed: if it is an epoll instance, nobody waits there any
/// more.
#[inline]
pub(crate) fn forget(fd: c_int) {
    if EPOLLS.has(fd) {
        forget_epoll(fd);
    }
}

/// All descriptors of a range are about to be closed.
pub(crate) fn forget_between(first: u32, last: u32) {
    for epoll in EPOLLS.iter() {
        if u32::try_from(epoll).is_ok_and(|epoll| (first..=last).contains(&epoll)) {
            forget_epoll(epoll);
        }
    }
}

#[cold]
fn forget_epoll(epoll: c_int) {
    if !registry::is_owner() {
        return;
    }
    EPOLLS.clear(epoll);
    for socket in registry::between(0, u32::MAX).filter_map(registry::get) {
        if let Ok(mut known) = socket.epolls.try_lock() {
            known.retain(|known| known.epoll != epoll);
        }
    }
}

/// Where the program waits for a descriptor that is taken over only now.
pub(crate) fn learn(fd: c_int, socket: &Socket) {
    for known in registrations(fd) {
        remember(
            known.epoll,
            libc::EPOLL_CTL_ADD,
            fd,
            socket,
            Some(known.event),
        );
    }
}

/// Where the program waits for any descriptor, as the kernel tells in /proc.
pub(crate) fn registrations(fd: c_int) -> Vec<Registration> {
    let mut found = Vec::new();
    for epoll in EPOLLS.iter() {
        let Ok(info) = fs::read_to_string(format!("/proc/self/fdinfo/{epoll}")) else {
            continue;
        };
        let events = info.lines().filter_map(registration);
        found.extend(
            events
                .filter(|(registered, _)| *registered == fd)
                .map(|(fd, event)| Registration { epoll, fd, event }),
        );
    }
    found
}

/// A line as `tfd:        5 events:       19 data:                5  pos:0 ino:… sdev:…`.
fn registration(line: &str) -> Option<(c_int, epoll_event)> {
    let mut words = line.strip_prefix("tfd:")?.split_whitespace();
    let fd = words.next()?.parse().ok()?;
    let mut after = |label| {
        words.next().filter(|word| *word == label)?;
        u64::from_str_radix(words.next()?, 16).ok()
    };
    let events = u32::try_from(after("events:")?).ok()?;
    let u64 = after("data:")?;
    Some((fd, epoll_event { events, u64 }))
}

/// The descriptor refers to another socket than when the program registered it.
pub(crate) fn register(fd: c_int, socket: &Socket, registrations: Vec<Registration>) {
    for mut known in registrations {
        // SAFETY: the event can be read and written.
        let result =
            unsafe { real::epoll_ctl(known.epoll, libc::EPOLL_CTL_ADD, fd, &raw mut known.event) };
        if result == 0 {
            remember(
                known.epoll,
                libc::EPOLL_CTL_ADD,
                fd,
                socket,
                Some(known.event),
            );
        }
    }
}

/// Has edge-triggered epoll instances report again what is still queued: a call has
/// given up after many drops, and the program believes the queue to be empty.
pub(crate) fn rearm(fd: c_int, socket: &Socket) {
    let Ok(mut known) = socket.epolls.try_lock() else {
        return;
    };
    // The program may wait for another descriptor of the socket than the one it reads.
    let is_same =
        |other| other == fd || registry::get(other).is_some_and(|known| ptr::eq(known, socket));
    for known in known.iter_mut().filter(|known| is_same(known.fd)) {
        let events = known.event.events;
        if events & EDGE != 0 && events & ONCE == 0 {
            register_again(known);
        }
    }
}

/// Has the kernel look again whether there is something to report.
fn register_again(known: &mut Registration) {
    let event = &raw mut known.event;
    // SAFETY: the event can be read and written.
    let control = |operation| unsafe { real::epoll_ctl(known.epoll, operation, known.fd, event) };
    if known.event.events & EXCLUSIVE == 0 {
        control(libc::EPOLL_CTL_MOD);
    } else {
        // Linux changes no registration that has this flag.
        control(libc::EPOLL_CTL_DEL);
        control(libc::EPOLL_CTL_ADD);
    }
}

/// Whether a socket in blocking mode may be waited for by epoll.
#[inline]
pub(crate) fn concerns_epoll() -> bool {
    registry::is_used() && socket::any_blocking()
}

/// Calls `each` with the registrations at an epoll instance of sockets in blocking mode,
/// until it returns true.
fn find_registered(
    epoll: c_int,
    mut each: impl FnMut(&'static Socket, &mut Registration) -> bool,
) -> bool {
    registry::between(0, u32::MAX).any(|fd| {
        let Some(socket) = concerned(fd) else {
            return false;
        };
        let Ok(mut known) = socket.epolls.try_lock() else {
            return false;
        };
        known
            .iter_mut()
            .filter(|known| (known.epoll, known.fd) == (epoll, fd))
            .any(|known| each(socket, known))
    })
}

/// Whether a datagram that the program waits for is held here.
pub(crate) fn holds_registered(epoll: c_int) -> bool {
    find_registered(epoll, |socket, known| {
        known.event.events & EPOLL_READABLE != 0 && socket.is_holding()
    })
}

/// Corrects the events that the kernel has reported: how many are left.
///
/// # Safety
///
/// `room` elements can be written at `events`, of which the kernel has written `count`.
pub(crate) unsafe fn correct_epoll(
    epoll: c_int,
    events: *mut epoll_event,
    count: c_int,
    room: c_int,
) -> c_int {
    let count = usize::try_from(count).unwrap_or(0);
    let room = usize::try_from(room).unwrap_or(0);
    let mut explained = Explained::new();
    let mut left = 0;
    for at in 0..count {
        // SAFETY: as the caller says.
        let mut event = unsafe { events.add(at).read_unaligned() };
        if event.events & EPOLL_READABLE != 0
            && event.events & libc::EPOLLERR as u32 == 0
            && is_for_nothing(epoll, &event, &mut explained)
        {
            event.events &= !EPOLL_READABLE;
            if event.events == 0 {
                continue;
            }
        }
        // SAFETY: as the caller says; `left` is `at` at most.
        unsafe { events.add(left).write_unaligned(event) };
        left += 1;
    }
    find_registered(epoll, |socket, known| {
        let asked = known.event.events & EPOLL_READABLE;
        if asked != 0 && left < room && socket.is_holding() {
            let data = known.event.u64;
            let reported = (0..left).any(|at| {
                // SAFETY: as the caller says.
                let event = unsafe { events.add(at).read_unaligned() };
                event.u64 == data
            });
            if !reported {
                let event = epoll_event {
                    events: asked,
                    u64: data,
                };
                // SAFETY: as the caller says; there is room.
                unsafe { events.add(left).write_unaligned(event) };
                left += 1;
            }
        }
        false
    });
    c_int::try_from(left).unwrap_or(c_int::MAX)
}

/// Which registrations have explained an event of a call: by a socket of which all that was
/// there to read has been discarded. Each explains one event, and others of the same socket
/// explain theirs though nothing is left to be discarded. Of more, some events are reported
/// without need.
struct Explained {
    count: usize,
    by: [(c_int, *const Socket); 16],
}

impl Explained {
    fn new() -> Self {
        Self {
            count: 0,
            by: [(-1, ptr::null()); 16],
        }
    }

    fn has(&self, which: impl Fn(c_int, *const Socket) -> bool) -> bool {
        let mut by = self.by[..self.count].iter();
        by.any(|(fd, socket)| which(*fd, *socket))
    }

    fn add(&mut self, fd: c_int, socket: &Socket) {
        if let Some(place) = self.by.get_mut(self.count) {
            *place = (fd, socket);
            self.count += 1;
        }
    }
}

/// Whether all that was there to read has been discarded. The event tells its socket by
/// the data that the program chose, which need not be the socket's alone: so one that has
/// nothing to discard is not taken for the cause.
fn is_for_nothing(epoll: c_int, event: &epoll_event, explained: &mut Explained) -> bool {
    find_registered(epoll, |socket, known| {
        let (reported, registered) = (event.u64, known.event.u64);
        if reported != registered || explained.has(|fd, _| fd == known.fd) {
            return false;
        }
        let nothing = if is_readable(known.fd) {
            !receive::discard_dropped(known.fd, socket)
        } else {
            explained.has(|_, other| ptr::eq(other, socket))
        };
        if nothing {
            explained.add(known.fd, socket);
            // Otherwise the program is told of the rest of the event.
            let is_all = event.events & !EPOLL_READABLE == 0;
            let is_due = if known.event.events & ONCE != 0 {
                is_all
            } else {
                // Not all that must be dropped may have been, and the kernel reports it once.
                known.event.events & EDGE != 0 && is_readable(known.fd)
            };
            if is_due {
                register_again(known);
            }
        }
        nothing
    })
}

fn is_readable(fd: c_int) -> bool {
    let mut polled = pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one element can be read and written.
    unsafe { real::poll(&raw mut polled, 1, 0) == 1 }
}
