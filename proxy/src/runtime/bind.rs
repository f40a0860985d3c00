//! Sockets that clients and operators write to, and who is in the way of them.

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;

use tokio::net::TcpListener;

use super::RunError;
use super::settings::entrance_options;
use crate::config::{Config, Listener};
use crate::holder;
use crate::net::{self, Socket};

/// Finds out whether every listener's address is free. Sockets that share an
/// address would also share it with another process of the same user, and each
/// would get a part of the clients; one that doesn't share finds such a process
/// out. To be asked while this one may still look into others.
///
/// # Errors
///
/// [`RunError::Bind`], with whoever holds the address.
pub fn probe(config: &Config) -> Result<(), RunError> {
    probe_but(config, &BTreeSet::new())
}

/// As [`probe`], but for addresses that this process holds itself.
pub(super) fn probe_but(config: &Config, held: &BTreeSet<SocketAddr>) -> Result<(), RunError> {
    for listener in &config.listeners {
        for address in listener
            .bind
            .iter()
            .filter(|address| !held.contains(address))
        {
            net::probe(*address).map_err(|error| bind_error(listener, *address, &error, held))?;
        }
    }
    Ok(())
}

/// Whether all source addresses of sessions are this host's. One whose ports are all
/// taken is.
pub(super) fn probe_sources(config: &Config) -> Result<(), RunError> {
    for source in config.sources() {
        match net::probe_source(source) {
            Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
                return Err(RunError::Bind {
                    what: "source".to_owned(),
                    address: SocketAddr::new(source, 0),
                    reason: reason_of(&error),
                    mend: mend_of(&error),
                });
            }
            _ => {}
        }
    }
    Ok(())
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
        Socket::listen(address, shared, entrance_options(listener))
            .map_err(|error| bind_error(listener, address, &error, held))
    };
    let mut sockets: Vec<Vec<_>> = (0..workers).map(|_| Vec::new()).collect();
    if config.reuse_port {
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

pub(super) async fn admin(address: SocketAddr) -> Result<TcpListener, RunError> {
    TcpListener::bind(address)
        .await
        .map_err(|error| RunError::Bind {
            what: "admin address".to_owned(),
            address,
            reason: reason_of(&error),
            mend: mend_of(&error),
        })
}

/// `held` are the addresses that this process has itself.
fn bind_error(
    listener: &Listener,
    address: SocketAddr,
    error: &io::Error,
    held: &BTreeSet<SocketAddr>,
) -> RunError {
    let mut reason = reason_of(error);
    let mut mend = mend_of(error);
    let overlaps = |own: &&SocketAddr| {
        let wildcard = own.ip().is_unspecified() || address.ip().is_unspecified();
        wildcard && own.port() == address.port() && own.is_ipv4() == address.is_ipv4()
    };
    let is_in_use = error.kind() == io::ErrorKind::AddrInUse;
    if let Some(own) = held.iter().find(overlaps).filter(|_| is_in_use) {
        reason += &format!(", by this proxy, at {own}");
        mend = "first reload without that address; this one can be bound after `drain_timeout`";
    } else if is_in_use {
        match holder::of(address) {
            Some(holders) if holders.with_us => {
                reason += ", by a session of this proxy";
                mend = "choose another port, or ask again when that session has ended; a port outside net.ipv4.ip_local_port_range is no session's";
            }
            Some(holders) => reason += &format!(", by {}", holders.names),
            None => reason += ", by a process that we may not look into",
        }
    }
    RunError::Bind {
        what: format!("listener `{}`:", listener.name),
        address,
        reason,
        mend,
    }
}

/// The kernel's own text for an address in use contains the word that a
/// supervisor waits for, at the end of "already".
fn reason_of(error: &io::Error) -> String {
    if error.kind() == io::ErrorKind::AddrInUse {
        "it is in use".to_owned()
    } else {
        error.to_string()
    }
}

fn mend_of(error: &io::Error) -> &'static str {
    let kind = error.kind();
    if kind == io::ErrorKind::AddrInUse {
        "stop that process or choose another port"
    } else if kind == io::ErrorKind::AddrNotAvailable {
        "use an address that this host has (ip address)"
    } else if kind == io::ErrorKind::PermissionDenied {
        "ports below 1024 need CAP_NET_BIND_SERVICE or net.ipv4.ip_unprivileged_port_start"
    } else {
        "check that this host has the address family (net.ipv6.conf.all.disable_ipv6)"
    }
}
