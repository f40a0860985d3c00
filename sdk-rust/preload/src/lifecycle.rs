//! The start of the library, and the life of sockets: which are taken over, and what of
//! them the kernel is told then.

use std::fs;
use std::net::SocketAddr;
use std::sync::OnceLock;

use libc::{c_int, rlimit, sockaddr, socklen_t};

use crate::boundary::set_errno;
use crate::settings::{self, Settings};
use crate::socket::{Flag, Socket};
use crate::table::{Endpoint, Local};
use crate::{names, options, real, registry, stats, table, wait};

/// Linux's, where /proc can't be read.
const DEFAULT_EPHEMERAL: (u16, u16) = (32768, 60999);

/// Descriptors that are looked at for inherited sockets where /proc can't be read.
const MAX_LOOKED_AT: c_int = 1024;

/// Reads the settings, makes the shared memory, and takes over what was inherited. Ends the
/// process if a setting can't be used.
pub(crate) fn start() {
    real::find_all();
    let settings = match settings::start() {
        Ok(settings) => settings,
        Err(error) => refuse(&error.to_string()),
    };
    let text = match stats::start(settings.stats.as_deref()) {
        Ok(text) => text,
        Err(error) => refuse(&error.to_string()),
    };
    if let Err(error) = table::start(settings, text) {
        refuse(&error.to_string());
    }
    own();
    for fd in open_descriptors() {
        if options::udp_family(fd).is_some() {
            inherit(fd, settings);
        }
    }
    // As C promises it at the start of a program.
    set_errno(0);
}

/// The registry is this process's; a forked one gets its own.
pub(crate) fn own() {
    unsafe extern "C" fn forked() {
        table::forked();
        registry::forked();
    }
    registry::own();
    // SAFETY: the function can be called in any new process.
    unsafe { libc::pthread_atfork(None, None, Some(forked)) };
}

/// Ends the process, as programs do whose settings can't be used.
fn refuse(error: &str) -> ! {
    let line = format!("ppv2-preload: {error}\n");
    // SAFETY: the bytes can be read.
    unsafe { real::write(libc::STDERR_FILENO, line.as_ptr().cast(), line.len()) };
    // Destructors of libraries that have not been started must not run.
    // SAFETY: it only ends the process.
    unsafe { libc::_exit(2) }
}

/// The descriptors of this process.
pub(crate) fn open_descriptors() -> Vec<c_int> {
    let listed = fs::read_dir("/proc/self/fd").map(|entries| {
        entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .collect()
    });
    listed.unwrap_or_else(|_| {
        let mut limit = rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: the limit can be written to.
        unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
        let limit = c_int::try_from(limit.rlim_cur).unwrap_or(MAX_LOOKED_AT);
        (0..limit.min(MAX_LOOKED_AT)).collect()
    })
}

/// Takes over a socket that the program was started with, or has received: one by which it serves,
/// as its port tells.
fn inherit(fd: c_int, settings: &Settings) {
    if let Some(local) = options::local(fd)
        && !is_ephemeral(local.port())
    {
        take_over(fd, settings);
        if let Some(socket) = registry::get(fd) {
            socket.set(Flag::Unnamed, options::is_connected(fd));
        }
    }
}

/// The program has received a descriptor from another process.
pub(crate) fn received(fd: c_int) {
    if let Some(settings) = settings::get()
        && options::udp_family(fd).is_some()
    {
        inherit(fd, settings);
    }
}

/// Whether the kernel chooses such ports (ip_local_port_range).
pub(crate) fn is_ephemeral(port: u16) -> bool {
    let (first, last) = ephemeral_ports();
    (first..=last).contains(&port)
}

/// Read once: before the program leaves /proc behind by chroot(2), as tftpd does.
fn ephemeral_ports() -> (u16, u16) {
    static PORTS: OnceLock<(u16, u16)> = OnceLock::new();
    *PORTS.get_or_init(|| {
        fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")
            .ok()
            .and_then(|range| {
                let mut ends = range.split_whitespace().map(|port| port.parse().ok());
                Some((ends.next()??, ends.next()??))
            })
            .unwrap_or(DEFAULT_EPHEMERAL)
    })
}

/// The program has bound a descriptor to this name. `false` if it must not use it: it is to
/// be taken over, and can't be.
///
/// # Safety
///
/// `len` bytes can be read at `name`.
pub(crate) unsafe fn bound(fd: c_int, name: *const sockaddr, len: socklen_t) -> bool {
    let Some(settings) = settings::get() else {
        return true;
    };
    // SAFETY: as the caller says.
    let port = unsafe { names::port(name, len) };
    if port == 0 || options::udp_family(fd).is_none() {
        return true;
    }
    let may_be_used = take_over(fd, settings);
    if registry::get(fd).is_some() {
        table::show_counts();
    }
    may_be_used
}

/// From now on, the socket's datagrams have headers. `false` if there is no room for its
/// address or its number.
fn take_over(fd: c_int, settings: &Settings) -> bool {
    let Some(family) = options::udp_family(fd) else {
        return true;
    };
    let Some(local) = options::local(fd).filter(|local| local.port() != 0) else {
        return true;
    };
    if !settings.takes_over(local) {
        return true;
    }
    let Some(endpoint) = endpoint(fd, local) else {
        return false;
    };
    ephemeral_ports();
    let socket = Socket::new(family, endpoint);
    learn(fd, socket);
    socket.set(Flag::Wildcard, local.ip().is_unspecified());
    tell_local_addresses(fd, socket);
    registry::set(fd, socket);
    wait::learn(fd, socket);
    // A child between vfork and exec leaves it to the program that it executes.
    registry::get(fd).is_some() || !registry::is_owner()
}

fn endpoint(fd: c_int, address: SocketAddr) -> Option<Endpoint> {
    table::endpoint(Local {
        address,
        network: options::network(fd),
        device: options::device(fd),
    })
}

/// The program has bound a socket to a device, or to none again. `false` if there is no room
/// for where it is bound now.
pub(crate) fn moved(fd: c_int, socket: &Socket) -> bool {
    let endpoint = options::local(fd).and_then(|address| endpoint(fd, address));
    endpoint.is_some_and(|endpoint| {
        socket.set_endpoint(endpoint);
        true
    })
}

/// What the program has asked the kernel for before.
pub(crate) fn learn(fd: c_int, socket: &Socket) {
    let is_on = |level, option| options::get(fd, level, option).is_some_and(|value| value != 0);
    let (level, option, wish) = local_addresses(socket);
    for (wanted_level, wanted_option, wanted) in [
        (libc::IPPROTO_IP, libc::IP_PKTINFO, Flag::WantsPktinfo),
        (level, option, wish),
    ] {
        let is_ours = wanted == wish && is_on(libc::SOL_SOCKET, MARK);
        socket.set(wanted, is_on(wanted_level, wanted_option) && !is_ours);
    }
    if is_on(libc::IPPROTO_UDP, libc::UDP_GRO) {
        socket.set(Flag::WantsGro, true);
        options::set(fd, libc::IPPROTO_UDP, libc::UDP_GRO, 0);
    }
    if let Some(segment) = options::get(fd, libc::IPPROTO_UDP, libc::UDP_SEGMENT) {
        socket.set_segment(u16::try_from(segment).unwrap_or(0));
    }
    // SAFETY: it takes no pointer.
    let status = unsafe { real::fcntl(fd, libc::F_GETFL, 0) };
    socket.set(
        Flag::NonBlocking,
        status != -1 && status & libc::O_NONBLOCK != 0,
    );
}

/// Set on a socket on which this library, not the program, has the kernel tell local
/// addresses: a program that is executed with the socket could not know otherwise. For UDP,
/// the option (SO_OOBINLINE) has no effect, and programs don't use it.
const MARK: c_int = libc::SO_OOBINLINE;

/// The option by which the kernel tells the local address of each datagram, and the flag of
/// a program that asked for it. On an IPv6 socket, IPV6_RECVPKTINFO tells of IPv4 datagrams
/// too.
fn local_addresses(socket: &Socket) -> (c_int, c_int, Flag) {
    if socket.family() == libc::AF_INET6 {
        let option = libc::IPV6_RECVPKTINFO;
        (libc::IPPROTO_IPV6, option, Flag::WantsPktinfo6)
    } else {
        (libc::IPPROTO_IP, libc::IP_PKTINFO, Flag::WantsPktinfo)
    }
}

/// A reply must leave from the address that the proxy sent to. Where datagrams are received
/// as they come, only the program is told, if it asked.
pub(crate) fn tell_local_addresses(fd: c_int, socket: &Socket) {
    if socket.is(Flag::Wildcard) {
        let (level, option, wish) = local_addresses(socket);
        let is_asked = socket.is(wish);
        let on = is_asked || !socket.is(Flag::Direct);
        options::set(fd, level, option, on.into());
        let is_ours = on && !is_asked;
        options::set(fd, libc::SOL_SOCKET, MARK, is_ours.into());
    }
}
