//! Sockets that the program connects to one client each.
//!
//! The kernel is told to connect them to the port of the proxy that speaks for the client.
//! A socket that the program made for one client alone, with a port of its own (TFTP), is
//! first replaced by one with the listener's address and port: the proxy takes replies
//! from nowhere else, and doesn't let the client reach another port. Only if the operator
//! asked for it (PPV2_NEW_SOCKETS): a proxy passes on any client address that somebody forges,
//! that of a server which the program itself asks included. Its questions would go to the
//! proxy then, and anybody could forge the answers.

use std::iter;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};

use libc::{c_int, sockaddr, sockaddr_storage, socklen_t};

use crate::boundary::{errno, guarded, set_errno};
use crate::registry::Marks;
use crate::settings::{Fork, NewSockets};
use crate::socket::{Flag, Socket};
use crate::table::{self, Counter, Endpoint, Path, Table};
use crate::{lifecycle, names, options, real, receive, registry, settings, wait};

/// What becomes of the program's call of connect(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// The kernel is called with the program's arguments.
    Pass,
    /// As `Pass`. If it succeeds, the socket is connected to an address that is talked to
    /// directly.
    PassDirect,
    /// It has succeeded.
    Done,
    /// It fails with this error number.
    Fail(c_int),
}

/// # Safety
///
/// `name` is null, or `len` bytes can be read there.
pub(crate) unsafe fn decide(fd: c_int, name: *const sockaddr, len: socklen_t) -> Decision {
    if len as usize > size_of::<sockaddr_storage>() {
        // The kernel refuses it.
        return Decision::Pass;
    }
    let before = errno();
    let decision = match registry::get(fd) {
        // SAFETY: as the caller says.
        Some(socket) => unsafe { taken_over(fd, socket, name, len) },
        // SAFETY: as the caller says.
        None => match unsafe { names::read(name, len) } {
            Some(client) => adopt(fd, client, true),
            None => Decision::Pass,
        },
    };
    // A call that succeeds leaves it as it is.
    set_errno(before);
    decision
}

unsafe fn taken_over(
    fd: c_int,
    socket: &'static Socket,
    name: *const sockaddr,
    len: socklen_t,
) -> Decision {
    // SAFETY: as the caller of `decide` says.
    let Some(client) = (unsafe { names::read(name, len) }) else {
        // SAFETY: as the caller of `decide` says.
        return if unsafe { names::family(name, len) } == Some(libc::AF_UNSPEC) {
            disconnect(fd, socket)
        } else {
            Decision::Pass
        };
    };
    let Some(table) = table::lock() else {
        return Decision::Fail(libc::EAGAIN);
    };
    let path = table.path(socket.endpoint(), client);
    drop(table);
    match path {
        Some(Path::Direct) => Decision::PassDirect,
        Some(Path::Proxied { to, local, .. }) => connect_taken_over(fd, socket, client, to, local)
            .map_or_else(Decision::Fail, |()| Decision::Done),
        None => match replace(fd, client, true) {
            Decision::Pass => {
                table::count(Counter::RepliesWithoutPath, 1);
                Decision::Fail(libc::EHOSTUNREACH)
            }
            decision @ (Decision::Done | Decision::Fail(_) | Decision::PassDirect) => decision,
        },
    }
}

/// A socket that is bound to all addresses gets the one from the kernel that a route names.
/// If the proxy writes to another one, another socket takes its place.
fn connect_taken_over(
    fd: c_int,
    socket: &Socket,
    client: SocketAddr,
    to: SocketAddr,
    local: Option<IpAddr>,
) -> Result<(), c_int> {
    {
        let _table = table::lock().ok_or(libc::EAGAIN)?;
        kernel_connect(fd, socket.family(), to)?;
        connected(socket, client, to);
    }
    if let (Some(got), Some(local)) = (options::local(fd), local)
        && socket.is(Flag::Wildcard)
        && got.ip() != local
    {
        let place = Place {
            endpoint: socket.endpoint(),
            is_wildcard: true,
            device: 0,
            from: SocketAddr::new(local, got.port()),
            to,
        };
        match put(fd, place) {
            Ok(new) => connected(new, client, to),
            Err(errno) => {
                disconnect(fd, socket);
                return Err(errno);
            }
        }
    }
    Ok(())
}

fn connected(socket: &Socket, client: SocketAddr, to: SocketAddr) {
    socket.set_kernel_peer(Some(to));
    socket.set_peer(Some(client));
    socket.set(Flag::Direct, false);
    socket.set(Flag::KernelOnly, false);
    socket.set(Flag::Unnamed, false);
}

/// A datagram has come to a socket that was connected before this program was executed: its
/// client is the one that the socket is connected to.
#[cold]
pub(crate) fn named(socket: &Socket, client: SocketAddr, from: SocketAddr) {
    // What is talked to directly needs no name.
    if client != from {
        connected(socket, client, from);
    }
}

/// The kernel has connected it to an address that is talked to directly. What comes from now on
/// comes from there; what is in the queue already is looked at like before.
pub(crate) fn connected_directly(fd: c_int, socket: &Socket) {
    socket.set_peer(None);
    socket.set_kernel_peer(None);
    socket.set(Flag::KernelOnly, false);
    socket.set(Flag::Unnamed, false);
    socket.set(Flag::Direct, receive::is_empty(fd));
}

fn disconnect(fd: c_int, socket: &Socket) -> Decision {
    let name = sockaddr {
        sa_family: libc::AF_UNSPEC as libc::sa_family_t,
        sa_data: [0; 14],
    };
    let len = size_of::<sockaddr>() as socklen_t;
    // SAFETY: `len` bytes can be read at `name`.
    if unsafe { real::connect(fd, &raw const name, len) } != 0 {
        return Decision::Fail(errno());
    }
    socket.set_peer(None);
    socket.set_kernel_peer(None);
    socket.set(Flag::Direct, false);
    socket.set(Flag::KernelOnly, false);
    socket.set(Flag::Unnamed, false);
    Decision::Done
}

fn kernel_connect(fd: c_int, family: c_int, to: SocketAddr) -> Result<(), c_int> {
    let (name, len) = names::written(to, family).ok_or(libc::EHOSTUNREACH)?;
    // SAFETY: `len` bytes can be read at `name`.
    match unsafe { real::connect(fd, (&raw const name).cast(), len) } {
        0 => Ok(()),
        _ => Err(errno()),
    }
}

/// Whether the datagrams of the client that a socket is connected to come from another port
/// of the proxy by now.
#[inline]
pub(crate) fn must_follow(socket: &Socket, client: SocketAddr, to: SocketAddr) -> bool {
    socket.peer() == Some(client) && socket.kernel_peer() != Some(to)
}

/// The program sends to the client that a socket is connected to, whose datagrams come from
/// another port of the proxy by now: the kernel is told, so that they reach this socket.
#[inline]
pub(crate) fn follow(fd: c_int, socket: &Socket, client: SocketAddr, to: SocketAddr) {
    if must_follow(socket, client, to) {
        // A thread could be cancelled in connect(2).
        guarded((), || reconnect(fd, socket, to));
    }
}

#[cold]
fn reconnect(fd: c_int, socket: &Socket, to: SocketAddr) {
    let errno = errno();
    // `part` does it under the lock too, so that what is known of the kernel stays right.
    if let Some(_table) = table::lock()
        && kernel_connect(fd, socket.family(), to).is_ok()
    {
        socket.set_kernel_peer(Some(to));
    }
    set_errno(errno);
}

/// A connected socket has received a datagram of another client, which must be dropped. It
/// may have come from the port of the proxy that the kernel has connected the socket to. If
/// replies to the socket's client don't leave by this port any more, then the port speaks for
/// the other client now, whose datagrams would all come to this socket, and none to the
/// listener. (If they do, the port speaks for many clients.)
///
/// So the kernel is told to connect the socket to its own address, from which nobody sends.
/// Unconnected, it would get datagrams that are the listener's. As soon as the program sends
/// to its client, [`follow`] connects it to the port that speaks for the client by then.
#[cold]
pub(crate) fn part(table: &Table, fd: c_int, socket: &Socket, from: SocketAddr) {
    let Some(client) = socket.peer().filter(|_| socket.kernel_peer() == Some(from)) else {
        return;
    };
    if let Some(Path::Proxied { to, .. }) = table.path(socket.endpoint(), client)
        && to == from
    {
        return;
    }
    guarded((), || {
        let errno = errno();
        if let Some(own) = options::local(fd)
            && kernel_connect(fd, socket.family(), own).is_ok()
        {
            socket.set_kernel_peer(None);
        }
        set_errno(errno);
    });
}

/// Descriptors that were found to have nothing to do with clients: not looked at again
/// before they are closed.
static OTHERS: Marks = Marks::new();

/// The program sends from a descriptor that is not taken over. If it is its first datagram
/// there, and goes to a client, the socket becomes one for this client.
///
/// # Safety
///
/// `name` is null, or `len` bytes can be read there.
#[inline]
pub(crate) unsafe fn adopt_at_send(
    fd: c_int,
    name: *const sockaddr,
    len: socklen_t,
) -> Option<&'static Socket> {
    if name.is_null() || !registry::is_used() || OTHERS.has(fd) || !may_answer() {
        return None;
    }
    // SAFETY: as the caller says.
    guarded(None, || unsafe { adopt_first(fd, name, len) })
}

#[cold]
unsafe fn adopt_first(fd: c_int, name: *const sockaddr, len: socklen_t) -> Option<&'static Socket> {
    // SAFETY: as the caller of `adopt_at_send` says.
    let client = unsafe { names::read(name, len) }?;
    let errno = errno();
    let decision = adopt(fd, client, false);
    set_errno(errno);
    if decision == Decision::Done {
        registry::get(fd)
    } else {
        OTHERS.set(fd);
        None
    }
}

/// A descriptor is new, or is about to be closed.
#[inline]
pub(crate) fn forget(fd: c_int) {
    OTHERS.clear(fd);
}

/// All descriptors of a range are about to be closed.
pub(crate) fn forget_between(first: u32, last: u32) {
    OTHERS.clear_between(first, last);
}

/// Whether sockets with ports of their own may become clients'.
fn may_answer() -> bool {
    settings::get().is_some_and(|settings| settings.new_sockets == NewSockets::Answer)
}

/// Makes a UDP socket with no port, or with one of the kernel's choice, that client's.
fn adopt(fd: c_int, client: SocketAddr, visibly: bool) -> Decision {
    if !registry::is_used() || !may_answer() || options::udp_family(fd).is_none() {
        return Decision::Pass;
    }
    match options::local(fd) {
        Some(local) if local.port() == 0 || lifecycle::is_ephemeral(local.port()) => {
            replace(fd, client, visibly)
        }
        _ => Decision::Pass,
    }
}

/// Programs ask other servers at ports below this one, such as DNS forwarders, and clients
/// don't have them. A forged datagram with a server's address makes it a known client;
/// then the program's questions to it must not leave from the listener's port, where answers
/// are easily forged, but from one that nobody knows.
const FIRST_OF_CLIENTS: u16 = 1024;

/// Puts a socket with a listener's address, connected to the client, in the place of
/// another. `Pass` if no listener knows the client.
fn replace(fd: c_int, client: SocketAddr, visibly: bool) -> Decision {
    if !may_answer() || client.port() < FIRST_OF_CLIENTS {
        return Decision::Pass;
    }
    if settings::get().is_none_or(|settings| settings.is_peer(client.ip())) {
        return Decision::Pass;
    }
    let Some(table) = table::lock() else {
        return Decision::Fail(libc::EAGAIN);
    };
    let found = table.find(client, options::network(fd), options::device(fd));
    drop(table);
    let Some((endpoint, listener, Path::Proxied { to, local, .. })) = found else {
        return Decision::Pass;
    };
    let (ip, port) = (listener.address.ip(), listener.address.port());
    let place = Place {
        endpoint,
        is_wildcard: ip.is_unspecified(),
        device: listener.device,
        from: SocketAddr::new(local.unwrap_or(ip), port),
        to,
    };
    match put(fd, place) {
        Ok(socket) => {
            connected(socket, client, to);
            socket.set(Flag::KernelOnly, !visibly);
            Decision::Done
        }
        Err(errno) => Decision::Fail(errno),
    }
}

/// A descriptor that is closed when it is dropped.
struct Temporary(c_int);

impl Drop for Temporary {
    fn drop(&mut self) {
        // SAFETY: it is this library's own.
        unsafe { real::close(self.0) };
    }
}

/// Where a new socket stands.
#[derive(Clone, Copy, Debug)]
struct Place {
    endpoint: Endpoint,
    /// The listener is bound to all addresses: the table is told for each datagram to which
    /// one it came.
    is_wildcard: bool,
    /// That of the listener, unless the socket is bound to one itself.
    device: u32,
    from: SocketAddr,
    to: SocketAddr,
}

fn put(fd: c_int, place: Place) -> Result<&'static Socket, c_int> {
    let Place {
        endpoint, from, to, ..
    } = place;
    let family = options::udp_family(fd).ok_or(libc::EBADF)?;
    let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC;
    // SAFETY: it takes no pointer.
    let new = match unsafe { real::socket(family, kind, libc::IPPROTO_UDP) } {
        -1 => return Err(errno()),
        new => Temporary(new),
    };
    if options::network(new.0) != options::network(fd) {
        // The thread has entered another network namespace since it made the socket.
        return Err(libc::EHOSTUNREACH);
    }
    let copied = Socket::new(family, endpoint);
    match registry::get(fd) {
        Some(former) => copied.copy_wishes(former),
        None => lifecycle::learn(fd, copied),
    }
    copy_options(fd, new.0, family);
    match options::device(fd) {
        0 => options::set_device(new.0, place.device),
        device => options::set_device(new.0, device),
    }
    if family == libc::AF_INET6 && (to.is_ipv4() || from.is_ipv4()) {
        options::set(new.0, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 0);
    }
    copied.set(Flag::Wildcard, place.is_wildcard);
    lifecycle::tell_local_addresses(new.0, copied);
    bind_beside(new.0, endpoint, of_family(from, family), to)?;
    close_kept(|fd| registry::get(fd).is_some_and(|socket| socket.endpoint() == endpoint));
    // SAFETY: it takes no pointer.
    let closed_at_exec = match unsafe { real::fcntl(fd, libc::F_GETFD, 0) } {
        -1 => 0,
        flags if flags & libc::FD_CLOEXEC != 0 => libc::O_CLOEXEC,
        _ => 0,
    };
    let registrations = wait::registrations(fd);
    // SAFETY: it takes no pointer.
    if unsafe { real::dup3(new.0, fd, closed_at_exec) } == -1 {
        return Err(errno());
    }
    registry::set(fd, copied);
    wait::register(fd, copied, registrations);
    Ok(copied)
}

/// "All addresses" of the one family is that of the other.
fn of_family(address: SocketAddr, family: c_int) -> SocketAddr {
    let ip: IpAddr = if !address.ip().is_unspecified() {
        address.ip()
    } else if family == libc::AF_INET6 {
        Ipv6Addr::UNSPECIFIED.into()
    } else {
        Ipv4Addr::UNSPECIFIED.into()
    };
    SocketAddr::new(ip, address.port())
}

/// Binds to the address of listeners that are bound already, and connects at once: in
/// between, the kernel gives this socket what others send to the listener.
///
/// Linux allows it if both sockets have SO_REUSEPORT when the later one is bound and were made
/// by the same user, or if both have SO_REUSEADDR. Where the program has not set that, the
/// listeners of this process get the option for this moment alone. With SO_REUSEADDR, any
/// user could take datagrams away from a port that needs no privileges; so it is the last
/// resort, for programs that have changed their user since they made the listener.
fn bind_beside(
    new: c_int,
    endpoint: Endpoint,
    address: SocketAddr,
    to: SocketAddr,
) -> Result<(), c_int> {
    // Forked processes share their listeners, so that one of them should do this at a time.
    let _one = table::lock();
    let family = options::udp_family(new).ok_or(libc::EBADF)?;
    let set = |fd, option, on: bool| options::set(fd, libc::SOL_SOCKET, option, on.into());
    // It keeps the first, for the sockets of clients that come later.
    set(new, libc::SO_REUSEADDR, true);
    set(new, libc::SO_REUSEPORT, true);
    let mut bound = bind(new, family, address);
    // Where processes have a lock each, one may take the option away from another.
    let tries = match settings::get().map(|settings| settings.fork) {
        Some(Fork::Separate) => 20,
        Some(Fork::Shared) | None => 1,
    };
    for option in [libc::SO_REUSEPORT, libc::SO_REUSEADDR]
        .into_iter()
        .flat_map(|option| iter::repeat_n(option, tries))
    {
        if bound != Err(libc::EADDRINUSE) {
            break;
        }
        let lent: Vec<c_int> = registry::between(0, u32::MAX)
            .filter(|fd| registry::get(*fd).is_some_and(|socket| socket.endpoint() == endpoint))
            .filter(|fd| options::get(*fd, libc::SOL_SOCKET, option) == Some(0))
            .collect();
        for listener in &lent {
            set(*listener, option, true);
        }
        // The kernel lets tens of thousands of sockets share a port by SO_REUSEPORT, and any
        // number by SO_REUSEADDR alone.
        set(new, libc::SO_REUSEPORT, option == libc::SO_REUSEPORT);
        bound = bind(new, family, address);
        set(new, libc::SO_REUSEPORT, false);
        for listener in &lent {
            set(*listener, option, false);
        }
    }
    bound?;
    kernel_connect(new, family, to)
}

/// Where the numbers of descriptors begin that the program doesn't know of.
const FIRST_KEPT: u64 = 512;

/// Whether something is kept.
static KEEPS: AtomicBool = AtomicBool::new(false);

/// The program is about to close a descriptor. A child process that does away with its
/// parent's listener, where the parent has received and itself has not, may be about to make
/// a socket for one client (tftpd). Only a process that has the listener can bind beside it,
/// so it stays open until then. Until then nobody else can have the port, so it is closed,
/// too, if the child waits for something first, binds to the port, executes another program
/// or ends.
pub(crate) fn keep(fd: c_int) {
    let Some(socket) = registry::get(fd) else {
        return;
    };
    if !socket.is(Flag::Inherited)
        || socket.is(Flag::Received)
        || socket.is(Flag::Kept)
        || socket.peer().is_some()
        || !socket.is_at_its_last()
        || !may_answer()
        || !registry::is_owner()
    {
        return;
    }
    // SAFETY: it takes no pointer.
    let kept = unsafe { real::fcntl(fd, libc::F_DUPFD_CLOEXEC, FIRST_KEPT) };
    if kept != -1 {
        socket.set(Flag::Kept, true);
        registry::set(kept, socket);
        KEEPS.store(true, Ordering::Relaxed);
    }
}

/// The program is about to wait: it is not about to make a socket for a client.
#[inline]
pub(crate) fn waits() {
    if KEEPS.load(Ordering::Relaxed) {
        guarded((), || close_kept(|_| true));
    }
}

/// The program is about to bind a socket to this port.
#[inline]
pub(crate) fn binds(port: u16) {
    if port != 0 && KEEPS.load(Ordering::Relaxed) {
        let is_there = |fd| options::local(fd).is_some_and(|local| local.port() == port);
        guarded((), || close_kept(is_there));
    }
}

/// Closes what is kept and meant.
#[cold]
fn close_kept(is_meant: impl Fn(c_int) -> bool) {
    if !registry::is_owner() {
        return;
    }
    let errno = errno();
    let mut keeps = false;
    for fd in registry::between(0, u32::MAX) {
        if registry::get(fd).is_some_and(|socket| socket.is(Flag::Kept)) {
            if is_meant(fd) {
                registry::remove(fd);
                drop(Temporary(fd));
            } else {
                keeps = true;
            }
        }
    }
    KEEPS.store(keeps, Ordering::Relaxed);
    set_errno(errno);
}

fn bind(fd: c_int, family: c_int, address: SocketAddr) -> Result<(), c_int> {
    let (name, len) = names::written(address, family).ok_or(libc::EHOSTUNREACH)?;
    // SAFETY: `len` bytes can be read at `name`.
    match unsafe { real::bind(fd, (&raw const name).cast(), len) } {
        0 => Ok(()),
        _ => Err(errno()),
    }
}

/// What a program may have set on a socket before it connects it.
const COMMON: &[(c_int, c_int)] = &[
    (libc::SOL_SOCKET, libc::SO_BROADCAST),
    (libc::SOL_SOCKET, libc::SO_DONTROUTE),
    (libc::SOL_SOCKET, libc::SO_PRIORITY),
    (libc::SOL_SOCKET, libc::SO_MARK),
    (libc::SOL_SOCKET, libc::SO_RXQ_OVFL),
    (libc::SOL_SOCKET, libc::SO_TIMESTAMP),
    (libc::SOL_SOCKET, libc::SO_TIMESTAMPNS),
    (libc::SOL_SOCKET, libc::SO_BUSY_POLL),
    (libc::IPPROTO_IP, libc::IP_TOS),
    (libc::IPPROTO_IP, libc::IP_TTL),
    (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER),
    (libc::IPPROTO_IP, libc::IP_RECVERR),
    (libc::IPPROTO_IP, libc::IP_RECVTOS),
    (libc::IPPROTO_IP, libc::IP_RECVTTL),
    (libc::IPPROTO_IP, libc::IP_PKTINFO),
    (libc::IPPROTO_UDP, libc::UDP_SEGMENT),
];

const IPV6: &[(c_int, c_int)] = &[
    (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY),
    (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
    (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS),
    (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVERR),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVHOPLIMIT),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO),
    (libc::IPPROTO_IPV6, libc::IPV6_DONTFRAG),
];

fn copy_options(from: c_int, to: c_int, family: c_int) {
    let of_family = if family == libc::AF_INET6 { IPV6 } else { &[] };
    for &(level, option) in COMMON.iter().chain(of_family) {
        let value = options::get(from, level, option);
        if let Some(value) = value.filter(|_| value != options::get(to, level, option)) {
            options::set(to, level, option, value);
        }
    }
    for option in [libc::SO_RCVBUF, libc::SO_SNDBUF] {
        let size = options::get(from, libc::SOL_SOCKET, option);
        if let Some(size) = size.filter(|_| size != options::get(to, libc::SOL_SOCKET, option)) {
            // The kernel doubles what it is told.
            options::set(to, libc::SOL_SOCKET, option, size / 2);
        }
    }
    for option in [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO] {
        options::copy_timeout(from, to, option);
    }
    // SAFETY: these commands take no pointer.
    unsafe {
        let status = real::fcntl(from, libc::F_GETFL, 0);
        if let Ok(status) = u64::try_from(status) {
            real::fcntl(to, libc::F_SETFL, status);
        }
    }
}
