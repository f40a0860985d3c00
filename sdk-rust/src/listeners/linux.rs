//! Sending from an address on Linux (ip(7), ipv6(7), capabilities(7)).

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;

use socket2::{Domain, SockRef, Socket, Type};

use super::NotBound;
use crate::address::canonical;

/// What lets a socket send from an address, the one with the fewest requirements first.
#[derive(Clone, Copy, Debug)]
enum Means {
    /// The address is one of this host's.
    HostAddress,
    /// It needs no privilege.
    Ipv6Freebind,
    /// It needs CAP_NET_RAW or CAP_NET_ADMIN.
    IpTransparent,
}

/// A socket that sends from `listener`; `None` if `receiver`, bound to `local`, can do so
/// from now on.
pub(super) fn sender(
    receiver: Option<&impl AsFd>,
    local: SocketAddr,
    listener: SocketAddr,
) -> io::Result<Option<UdpSocket>> {
    let mut tried = Vec::new();
    if listener.port() == local.port()
        && let Some(receiver) = receiver.map(SockRef::from)
        && has_family(&receiver, local, listener.ip())
    {
        for &means in all_means(listener) {
            match allow(&receiver, means, listener.ip()) {
                Ok(()) => return Ok(None),
                Err(error) => tried.push((means, error)),
            }
        }
    } else {
        for &means in all_means(listener) {
            match bind_for_sending(listener, means) {
                Ok(socket) => return Ok(Some(socket)),
                Err(Failed::Means(error)) => tried.push((means, error)),
                Err(Failed::Bind(error)) => return Err(not_bound(listener, error).into()),
            }
        }
    }
    Err(io::Error::new(
        io::ErrorKind::AddrNotAvailable,
        NotOwned { listener, tried },
    ))
}

/// Whether `listener` has a broadcast address of this host's networks. A socket can
/// be bound to it, and sends from another then. One without SO_BROADCAST can't be
/// connected to it (socket(7)).
pub(super) fn is_broadcast(listener: SocketAddr) -> bool {
    let connects = |broadcast: bool| {
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
        socket.set_broadcast(broadcast)?;
        socket.connect(&listener.into())
    };
    listener.is_ipv4() && connects(false).is_err() && connects(true).is_ok()
}

fn all_means(listener: SocketAddr) -> &'static [Means] {
    match listener {
        SocketAddr::V4(_) => &[Means::HostAddress, Means::IpTransparent],
        SocketAddr::V6(_) => &[
            Means::HostAddress,
            Means::Ipv6Freebind,
            Means::IpTransparent,
        ],
    }
}

/// Whether a socket that is bound to `local` can send from an address of the
/// family of `ip`.
fn has_family(receiver: &SockRef<'_>, local: SocketAddr, ip: IpAddr) -> bool {
    match (canonical(local), ip) {
        (SocketAddr::V4(_), IpAddr::V4(_)) | (SocketAddr::V6(_), IpAddr::V6(_)) => true,
        (SocketAddr::V6(v6), IpAddr::V4(_)) => {
            v6.ip().is_unspecified() && matches!(receiver.only_v6(), Ok(false))
        }
        (SocketAddr::V4(_), IpAddr::V6(_)) => false,
    }
}

/// Gives a socket that is bound already what it needs to send from `ip`.
fn allow(receiver: &SockRef<'_>, means: Means, ip: IpAddr) -> io::Result<()> {
    match means {
        // Any port will do to find out.
        Means::HostAddress => match bind_for_sending(SocketAddr::new(ip, 0), means) {
            Ok(_) => Ok(()),
            Err(Failed::Means(error) | Failed::Bind(error)) => Err(error),
        },
        Means::Ipv6Freebind => receiver.set_freebind_v6(true),
        // It is one flag of the socket, whichever family it is set by.
        Means::IpTransparent => receiver.set_ip_transparent_v4(true),
    }
}

enum Failed {
    /// There is no such address, or no right to do without.
    Means(io::Error),
    /// The port, or the system.
    Bind(io::Error),
}

/// A socket bound to `listener` that sends only.
///
/// Otherwise it would receive what is meant for sockets of this host that are bound to
/// all addresses. So it is connected, to a port that nothing sends from: then the kernel
/// gives it nothing else, no ICMP errors either, and each datagram can still have its own
/// recipient (udp(7)).
fn bind_for_sending(listener: SocketAddr, means: Means) -> Result<UdpSocket, Failed> {
    const UNUSED_PORT: u16 = 1;
    let (domain, loopback) = match listener {
        SocketAddr::V4(_) => (Domain::IPV4, IpAddr::V4(Ipv4Addr::LOCALHOST)),
        SocketAddr::V6(_) => (Domain::IPV6, IpAddr::V6(Ipv6Addr::LOCALHOST)),
    };
    let socket = Socket::new(domain, Type::DGRAM, None).map_err(Failed::Bind)?;
    let prepare = || {
        socket.set_nonblocking(true)?;
        // The kernel makes it as small as it can be.
        socket.set_recv_buffer_size(0)?;
        // The servers of one host answer from the same listener. Two sockets share an
        // address only if both set it, so nothing is taken from those that don't. With
        // SO_REUSEPORT the kernel would balance datagrams over this socket, too.
        socket.set_reuse_address(true)?;
        if listener.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        Ok(())
    };
    prepare().map_err(Failed::Bind)?;
    match means {
        Means::HostAddress => Ok(()),
        Means::Ipv6Freebind => socket.set_freebind_v6(true),
        Means::IpTransparent if listener.is_ipv4() => socket.set_ip_transparent_v4(true),
        Means::IpTransparent => socket.set_ip_transparent_v6(true),
    }
    .map_err(Failed::Means)?;
    socket.bind(&listener.into()).map_err(|error| {
        if error.kind() == io::ErrorKind::AddrNotAvailable {
            Failed::Means(error)
        } else {
            Failed::Bind(error)
        }
    })?;
    // Fails where the address can be bound, as by ip_nonlocal_bind, but not sent from.
    socket
        .connect(&SocketAddr::new(loopback, UNUSED_PORT).into())
        .map_err(Failed::Means)?;
    Ok(socket.into())
}

fn not_bound(listener: SocketAddr, error: io::Error) -> NotBound {
    let fix = if error.kind() == io::ErrorKind::AddrInUse {
        "another socket of this host has that port; give it another, or SO_REUSEADDR".to_owned()
    } else if error.kind() == io::ErrorKind::PermissionDenied {
        format!(
            "ports this low need a right: setcap cap_net_bind_service,cap_net_raw+ep {Program}, or sysctl net.ipv4.ip_unprivileged_port_start={}",
            listener.port()
        )
    } else {
        "have its replies go through the proxy".to_owned()
    };
    NotBound {
        listener,
        error,
        fix,
    }
}

struct NotOwned {
    listener: SocketAddr,
    tried: Vec<(Means, io::Error)>,
}

message_as_debug!(NotOwned);

impl std::error::Error for NotOwned {}

impl fmt::Display for NotOwned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (listener, ip) = (self.listener, self.listener.ip());
        write!(f, "can't send from listener {listener}: tried ")?;
        for (number, (means, error)) in self.tried.iter().enumerate() {
            let separator = if number == 0 { "" } else { ", " };
            write!(f, "{separator}{means} ({error})")?;
        }
        let bits = if ip.is_ipv4() { 32 } else { 128 };
        write!(
            f,
            "; run `ip addr add {ip}/{bits} dev lo`, or `setcap cap_net_raw+ep {Program}`, or have replies go through the proxy"
        )
    }
}

impl fmt::Display for Means {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::HostAddress => "an address of this host",
            Self::Ipv6Freebind => "IPV6_FREEBIND",
            Self::IpTransparent => "IP_TRANSPARENT",
        })
    }
}

/// The file that a capability would be given to.
struct Program;

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match std::env::current_exe() {
            Ok(path) => write!(f, "{}", path.display()),
            Err(_) => f.write_str("PROGRAM"),
        }
    }
}
