//! Sockets that clients and operators write to, and what else has their addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use tokio::net::TcpListener;

use super::RunError;
use super::handover::Taking;
use super::inherited::Inherited;
use crate::admin::{self, SocketFile};
use crate::capacity::HostCapacity;
use crate::config::{AdminAddress, Config, Listener};
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
/// out. To be asked while this one may still look into others. Those that are `inherited`
/// are not asked for.
///
/// # Errors
///
/// [`RunError::Bind`], with the processes that hold the address.
pub fn probe(config: &Config, inherited: &Inherited) -> Result<(), RunError> {
    probe_but(config, &inherited.addresses(), PATIENCE)?;
    probe_sources(config, PATIENCE)?;
    probe_source_ports(config, &BTreeMap::new())
}

/// As [`probe`], beside a process that hands over the addresses that it has.
pub(super) fn probe_beside(config: &Config, other: &Taking) -> Result<(), RunError> {
    probe_but(config, &other.addresses(), PATIENCE)?;
    probe_sources(config, PATIENCE)?;
    let mut ports = source_ports(config);
    let held = other.source_ports();
    ports.retain(|port, _| !held.contains(port));
    probe_ports(ports, &BTreeMap::new())
}

/// The fixed ports of source networks, each with the number of the worker that sends from
/// it.
pub(super) fn source_ports(config: &Config) -> BTreeMap<SocketAddr, usize> {
    let mut ports = BTreeMap::new();
    for (_, source) in config.source_networks() {
        let any: IpAddr = match source.network.addr().is_ipv4() {
            true => Ipv4Addr::UNSPECIFIED.into(),
            false => Ipv6Addr::UNSPECIFIED.into(),
        };
        if let Some(first) = source.port {
            let of_workers = (first.get()..=u16::MAX).zip(0..config.worker_count());
            ports.extend(of_workers.map(|(port, worker)| (SocketAddr::new(any, port), worker)));
        }
    }
    ports
}

/// Whether the fixed ports of source networks are free, or held by the worker that is to
/// send from them: for sessions of now, or for former ones whose port comes back. `known`
/// are the ports that workers send or once sent from.
pub(super) fn probe_source_ports(
    config: &Config,
    known: &BTreeMap<SocketAddr, usize>,
) -> Result<(), RunError> {
    probe_ports(source_ports(config), known)
}

fn probe_ports(
    ports: BTreeMap<SocketAddr, usize>,
    known: &BTreeMap<SocketAddr, usize>,
) -> Result<(), RunError> {
    for (address, worker) in ports {
        let Err(error) = ppv2_udp::probe(address, false) else {
            continue;
        };
        let mut reason = reason_of(address.ip(), &error);
        let mut hint = "stop that process or choose another `source_port`; those outside net.ipv4.ip_local_port_range are taken by nobody by chance";
        match (port_owner::of(address), known.get(&address)) {
            (Some(owners), Some(before)) if owners.with_us => {
                if *before == worker {
                    continue;
                }
                reason += &format!(
                    ", by worker {before} of this proxy, for sessions from before an earlier reload"
                );
                hint =
                    "choose another `source_port`, or reload again once those sessions have ended";
            }
            (Some(owners), None) if owners.with_us => {
                reason += ", by a session of this proxy";
                hint = "choose another `source_port`, or reload again when that session has ended; sessions never use ports outside net.ipv4.ip_local_port_range";
            }
            (Some(owners), _) => reason += &format!(", by {}", owners.names),
            (None, _) => {}
        }
        return Err(RunError::Bind {
            what: "source_port, address".to_owned(),
            address,
            reason,
            hint,
        });
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
    if let Some(lack) = HostCapacity::of(config).lack() {
        return Err(RunError::Descriptors(lack));
    }
    let deadline = Instant::now() + patience;
    for listener in &config.listeners {
        let new = listener
            .addresses()
            .filter(|address| !held.contains(address));
        for address in new {
            let probed = patiently(address.ip(), deadline, || {
                ppv2_udp::probe(address, listener.freebind)
            });
            probed.map_err(|error| bind_error(listener, address, &error, held))?;
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
/// or one for each address, in turn; by worker. What is `inherited` is not bound.
pub(super) fn listeners(
    config: &Config,
    held: &BTreeSet<SocketAddr>,
    inherited: &Inherited,
) -> Result<Vec<Vec<Socket>>, RunError> {
    let workers = config.worker_count();
    let all = config.listeners.iter();
    let all = all.flat_map(|listener| listener.addresses().map(move |a| (listener, a)));
    let addresses = all.filter(|(_, address)| !held.contains(address));
    let shared = config.shares_addresses();
    let mut sockets: Vec<Vec<_>> = (0..workers).map(|_| Vec::new()).collect();
    // The first one after those that have an address already.
    for (turn, (listener, address)) in (held.len()..).zip(addresses) {
        let bind_one = || {
            let binding = Binding {
                shared,
                free: listener.freebind,
            };
            Socket::listen(address, binding, options(listener))
                .map_err(|error| bind_error(listener, address, &error, held))
        };
        let given = of_service_manager(listener, address, config, inherited, !held.is_empty())?;
        match (config.reuse_port.0, given.len()) {
            (true, 0) => {
                for sockets in &mut sockets {
                    sockets.push(bind_one()?);
                }
            }
            (false, 0) => sockets[turn % workers].push(bind_one()?),
            // All must be read: the kernel spreads clients over them.
            (false, _) => sockets[turn % workers].extend(given),
            (true, count) => {
                let first = if count < workers { turn } else { 0 };
                for (worker, socket) in (first..).zip(given) {
                    sockets[worker % workers].push(socket);
                }
                for worker in first + count..first + workers {
                    match bind_one() {
                        Ok(socket) => sockets[worker % workers].push(socket),
                        Err(error) => {
                            tracing::warn!(
                                "{count} of {workers} workers serve listener `{}` at {address}, as many as the service manager has sockets for, since no more can be bound beside them; name the address {workers} times in the socket unit, with ReusePort=yes: {error}",
                                listener.name
                            );
                            break;
                        }
                    }
                }
            }
        }
    }
    Ok(sockets)
}

/// The sockets that the service manager has bound to `address`, ready for workers.
fn of_service_manager(
    listener: &Listener,
    address: SocketAddr,
    config: &Config,
    inherited: &Inherited,
    is_reload: bool,
) -> Result<Vec<Socket>, RunError> {
    let failed = |error: &io::Error| RunError::Inherit {
        listener: listener.name.clone(),
        address,
        reason: error.to_string(),
        hint: match error.kind() == io::ErrorKind::InvalidInput {
            true => "set BindIPv6Only=ipv6-only in the socket unit",
            false => "see that the socket unit has ListenDatagram= for it",
        },
    };
    let sockets = inherited.sockets(address, is_reload);
    let sockets = sockets.map_err(|error| failed(&error))?;
    let is_short = sockets.len() < config.worker_count();
    let binding = Binding {
        // More can be bound beside them only if they share.
        shared: config.reuse_port.0 && is_short,
        free: listener.freebind,
    };
    let inherit_one = |socket| {
        Socket::inherit(socket, binding, options(listener)).map_err(|error| failed(&error))
    };
    sockets.into_iter().map(inherit_one).collect()
}

/// What a listener's sockets are made for.
fn options(listener: &Listener) -> Options {
    Options {
        dont_fragment: listener.dont_fragment,
        bursts: !listener.rules().count_requests(),
    }
}

/// Binds the admin API's socket, with the file of a Unix socket, unless it is inherited.
pub(super) async fn admin(
    address: &AdminAddress,
    inherited: &mut Inherited,
) -> Result<(admin::Listener, Option<SocketFile>), RunError> {
    if let Some(listener) = inherited.take_admin()? {
        // The file of a Unix socket is the service manager's.
        return Ok((listener, None));
    }
    match address {
        AdminAddress::Ip(address) => {
            let bound = TcpListener::bind(address).await;
            let listener = bound.map_err(|error| RunError::Bind {
                what: "admin address".to_owned(),
                address: *address,
                reason: reason_of(address.ip(), &error),
                hint: hint_of(address.ip(), &error),
            })?;
            Ok((admin::Listener::Tcp(listener), None))
        }
        AdminAddress::Unix(path) => {
            let (listener, file) =
                admin::bind_unix(path).map_err(|error| socket_error(path, &error))?;
            Ok((listener, Some(file)))
        }
    }
}

/// Binds the socket on which upgrades are asked for.
pub(super) fn upgrade(path: &Path) -> Result<(UnixListener, SocketFile), RunError> {
    admin::bind_unix_socket(path).map_err(|error| {
        let (reason, hint) = why_no_socket(&error);
        let path = path.to_owned();
        RunError::UpgradeSocket { path, reason, hint }
    })
}

fn socket_error(path: &Path, error: &io::Error) -> RunError {
    let (reason, hint) = why_no_socket(error);
    let path = path.to_owned();
    RunError::AdminSocket { path, reason, hint }
}

fn why_no_socket(error: &io::Error) -> (String, &'static str) {
    let kind = error.kind();
    if kind == io::ErrorKind::AddrInUse {
        let reason = "a process listens there".to_owned();
        (reason, "stop it, or choose another path")
    } else if kind == io::ErrorKind::AlreadyExists {
        let reason = "there is a file that is no socket".to_owned();
        (reason, "remove it, or choose another path")
    } else {
        let hint = "make its directory, and let the proxy's user write there, as systemd's RuntimeDirectory= does";
        (error.to_string(), hint)
    }
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

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    #[test]
    fn a_port_that_a_worker_still_holds_is_its_own_again_and_no_others() {
        // As the worker's socket for sessions from before an earlier reload.
        let held = UdpSocket::bind("0.0.0.0:0").unwrap();
        let address = held.local_addr().unwrap();
        let content = format!(
            "workers = 1\n[[listener]]\nbind = [\"127.0.0.1:53\"]\nupstream = \"u\"\n[upstream.u]\n\
             source = [\"127.64.0.0/10\"]\nsource_port = {}\nservers = [\"127.0.0.1:54\"]\n",
            address.port()
        );
        let config = Config::from_toml("x", &content).unwrap();
        assert_eq!(source_ports(&config), [(address, 0)].into());
        probe_source_ports(&config, &source_ports(&config)).unwrap();
        let why = |known: BTreeMap<_, _>| {
            let error = probe_source_ports(&config, &known).unwrap_err();
            error.to_string()
        };
        let of_another = why([(address, 1)].into());
        for part in [
            "in use, by worker 1 of this proxy, for sessions from before an earlier reload",
            "once those sessions have ended",
        ] {
            assert!(of_another.contains(part), "{of_another}");
        }
        let of_session = why(BTreeMap::new());
        assert!(
            of_session.contains("by a session of this proxy"),
            "{of_session}"
        );
    }
}
