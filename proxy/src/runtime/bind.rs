//! Sockets that clients and operators write to, and what else has their addresses.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use tokio::net::TcpListener;

use super::RunError;
use crate::config::{Config, Listener};
use crate::port_owner;
use ppv2_hosts::kernel::{self, Unusable};
use ppv2_udp::{Binding, Options, Socket};

/// How long a start waits for duplicate address detection, which takes a second or two
/// from when an interface comes up.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often to look whether it has ended.
const LOOK: Duration = Duration::from_millis(50);

/// Finds out whether every listener's address is free. Sockets that share an
/// address would also share it with another process of the same user, and each
/// would get a part of the clients; one that doesn't share finds such a process
/// out. To be asked while this one may still look into others.
///
/// # Errors
///
/// [`RunError::Bind`], with the processes that hold the address.
pub fn probe(config: &Config) -> Result<(), RunError> {
    probe_but(config, &BTreeSet::new(), PATIENCE)?;
    probe_sources(config, PATIENCE)?;
    probe_source_ports(config, None)
}

/// Whether the fixed ports of source networks are free, but for those of the configuration
/// that is in force.
pub(super) fn probe_source_ports(
    config: &Config,
    in_force: Option<&Config>,
) -> Result<(), RunError> {
    let ports = |config: &Config| -> BTreeSet<SocketAddr> {
        let networks = config.source_networks().into_iter();
        let fixed = networks.filter_map(|(_, source)| {
            let any: IpAddr = match source.network.addr().is_ipv4() {
                true => Ipv4Addr::UNSPECIFIED.into(),
                false => Ipv6Addr::UNSPECIFIED.into(),
            };
            Some((any, source.port?.get()))
        });
        let workers = u16::try_from(config.worker_count()).unwrap_or(u16::MAX);
        fixed
            .flat_map(|(any, first)| {
                let ports = (0..workers).map(move |worker| first.saturating_add(worker));
                ports.map(move |port| SocketAddr::new(any, port))
            })
            .collect()
    };
    let held = in_force.map(ports).unwrap_or_default();
    for address in ports(config).difference(&held) {
        ppv2_udp::probe(*address, false).map_err(|error| {
            let mut reason = reason_of(address.ip(), &error);
            if let Some(owners) = port_owner::of(*address) {
                reason += &format!(", by {}", owners.names);
            }
            RunError::Bind {
                what: "source_port, address".to_owned(),
                address: *address,
                reason,
                hint: "stop that process or choose another `source_port`; those outside net.ipv4.ip_local_port_range are taken by nobody by chance",
            }
        })?;
    }
    Ok(())
}

/// As [`probe`], but for addresses that this process holds itself. Tentative addresses
/// are waited for so long.
pub(super) fn probe_but(
    config: &Config,
    held: &BTreeSet<SocketAddr>,
    patience: Duration,
) -> Result<(), RunError> {
    let deadline = Instant::now() + patience;
    for listener in &config.listeners {
        let new = listener.bind.iter().filter(|ip| !held.contains(ip));
        for address in new {
            let probed = patiently(address.ip(), deadline, || {
                ppv2_udp::probe(*address, listener.freebind)
            });
            probed.map_err(|error| bind_error(listener, *address, &error, held))?;
        }
    }
    Ok(())
}

/// Whether all source addresses of sessions are this host's. One whose ports are all
/// taken is. Tentative ones are waited for so long.
pub(super) fn probe_sources(config: &Config, patience: Duration) -> Result<(), RunError> {
    let deadline = Instant::now() + patience;
    for source in config.sources() {
        match patiently(source, deadline, || ppv2_udp::probe_source(source)) {
            Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
                return Err(RunError::Bind {
                    what: "source".to_owned(),
                    address: SocketAddr::new(source, 0),
                    reason: reason_of(source, &error),
                    hint: hint_of(source, &error),
                });
            }
            _ => {}
        }
    }
    Ok(())
}

/// Binds to `ip`, again and again while it is tentative.
fn patiently(ip: IpAddr, deadline: Instant, bind: impl Fn() -> io::Result<()>) -> io::Result<()> {
    loop {
        match bind() {
            Err(error)
                if error.kind() == io::ErrorKind::AddrNotAvailable
                    && kernel::unusable(ip) == Some(Unusable::Tentative)
                    && Instant::now() < deadline =>
            {
                thread::sleep(LOOK);
            }
            result => return result,
        }
    }
}

/// One socket per worker for every address of every listener that is not `held`,
/// or one for each address, in turn; by worker.
pub(super) fn listeners(
    config: &Config,
    held: &BTreeSet<SocketAddr>,
) -> Result<Vec<Vec<Socket>>, RunError> {
    let workers = config.worker_count();
    let addresses = || {
        let all = config.listeners.iter();
        let all = all.flat_map(|listener| listener.bind.iter().map(move |a| (listener, *a)));
        all.filter(|(_, address)| !held.contains(address))
    };
    let shared = config.shares_addresses();
    let bind_one = |(listener, address): (&Listener, SocketAddr)| {
        let binding = Binding {
            shared,
            free: listener.freebind,
        };
        Socket::listen(address, binding, options(listener))
            .map_err(|error| bind_error(listener, address, &error, held))
    };
    let mut sockets: Vec<Vec<_>> = (0..workers).map(|_| Vec::new()).collect();
    if config.reuse_port.0 {
        for sockets in &mut sockets {
            *sockets = addresses().map(bind_one).collect::<Result<_, _>>()?;
        }
    } else {
        // The first one after those that have an address already.
        for (turn, address) in (held.len()..).zip(addresses()) {
            sockets[turn % workers].push(bind_one(address)?);
        }
    }
    Ok(sockets)
}

/// What a listener's sockets are made for.
fn options(listener: &Listener) -> Options {
    Options {
        dont_fragment: listener.dont_fragment,
        bursts: !listener.rules().count_requests(),
    }
}

pub(super) async fn admin(address: SocketAddr) -> Result<TcpListener, RunError> {
    TcpListener::bind(address)
        .await
        .map_err(|error| RunError::Bind {
            what: "admin address".to_owned(),
            address,
            reason: reason_of(address.ip(), &error),
            hint: hint_of(address.ip(), &error),
        })
}

/// `held` are the addresses that this process has itself.
fn bind_error(
    listener: &Listener,
    address: SocketAddr,
    error: &io::Error,
    held: &BTreeSet<SocketAddr>,
) -> RunError {
    let mut reason = reason_of(address.ip(), error);
    let mut hint = hint_of(address.ip(), error);
    let overlaps = |own: &&SocketAddr| {
        let wildcard = own.ip().is_unspecified() || address.ip().is_unspecified();
        wildcard && own.port() == address.port() && own.is_ipv4() == address.is_ipv4()
    };
    let is_in_use = error.kind() == io::ErrorKind::AddrInUse;
    if let Some(own) = held.iter().find(overlaps).filter(|_| is_in_use) {
        reason += &format!(", by this proxy, at {own}");
        hint = "first reload without that address; this one can be bound after `drain_timeout`";
    } else if is_in_use {
        match port_owner::of(address) {
            Some(owners) if owners.with_us => {
                reason += ", by a session of this proxy";
                hint = "choose another port, or ask again when that session has ended; sessions never use ports outside net.ipv4.ip_local_port_range";
            }
            Some(owners) => reason += &format!(", by {}", owners.names),
            None => {
                reason += ", by a process of another user or container (run as root on the host to see which)"
            }
        }
    }
    RunError::Bind {
        what: format!("listener `{}`:", listener.name),
        address,
        reason,
        hint,
    }
}

/// The kernel's own text for an address in use contains the word that a
/// supervisor waits for, at the end of "already".
fn reason_of(ip: IpAddr, error: &io::Error) -> String {
    if error.kind() == io::ErrorKind::AddrInUse {
        return "it is in use".to_owned();
    }
    let is_missing = error.kind() == io::ErrorKind::AddrNotAvailable;
    match kernel::unusable(ip).filter(|_| is_missing) {
        Some(Unusable::Tentative) => {
            "it is not usable yet: duplicate address detection is running (tentative)".to_owned()
        }
        Some(Unusable::Duplicate) => {
            "duplicate address detection has found another host that has it".to_owned()
        }
        None => error.to_string(),
    }
}

fn hint_of(ip: IpAddr, error: &io::Error) -> &'static str {
    let no_ipv6 = || ip.is_ipv6() && kernel::parameter("net/ipv6/conf/all/disable_ipv6") == Some(1);
    let is_link_local = matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
    match Errno::from_io_error(error) {
        Some(Errno::ADDRINUSE) => "stop that process or choose another port",
        Some(Errno::ADDRNOTAVAIL) => match kernel::unusable(ip) {
            Some(Unusable::Tentative) => "try again in a second, or add the address with `nodad`",
            Some(Unusable::Duplicate) => "give one of the two another address",
            None if no_ipv6() => "switch IPv6 on (sysctl net.ipv6.conf.all.disable_ipv6=0)",
            None => {
                "use an address that this host has (ip address), or for a listener whose address comes later set `freebind = true`"
            }
        },
        Some(Errno::ACCESS) => {
            "ports below 1024 need CAP_NET_BIND_SERVICE or net.ipv4.ip_unprivileged_port_start"
        }
        Some(Errno::AFNOSUPPORT) => {
            "this kernel does not support this address family; use the other"
        }
        Some(Errno::INVAL) if is_link_local => {
            "name its interface by the number that `ip link` shows, as in [fe80::1%2]:53"
        }
        _ => "use an address of one interface of this host (ip address)",
    }
}
