//! Who holds a UDP address that could not be bound, as far as /proc tells.

use std::net::SocketAddr;

use procfs::net::UdpNetEntry;
use procfs::process::{FDTarget, Process};

/// The processes that have an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holders {
    /// What they are called, with their numbers.
    pub names: String,
    /// This process is one of them.
    pub with_us: bool,
}

/// Names the processes that have `address`, or a wildcard of its port, bound.
/// `None` if the sockets belong to processes that we may not look into.
#[must_use]
pub fn of(address: SocketAddr) -> Option<Holders> {
    let entries = if address.is_ipv4() {
        procfs::net::udp()
    } else {
        procfs::net::udp6()
    };
    let inodes: Vec<u64> = entries
        .ok()?
        .into_iter()
        .filter(|entry| conflicts(entry, address))
        .map(|entry| entry.inode)
        .collect();
    let holders: Vec<_> = procfs::process::all_processes()
        .ok()?
        .flatten()
        .filter(|process| has_socket(process, &inodes))
        .collect();
    let names: Vec<_> = holders.iter().map(describe).collect();
    let ours = i64::from(std::process::id());
    (!names.is_empty()).then(|| Holders {
        names: names.join(", "),
        with_us: holders.iter().any(|holder| i64::from(holder.pid) == ours),
    })
}

fn conflicts(entry: &UdpNetEntry, address: SocketAddr) -> bool {
    let held = entry.local_address;
    held.port() == address.port()
        && (held.ip() == address.ip()
            || held.ip().is_unspecified()
            || address.ip().is_unspecified())
}

fn has_socket(process: &Process, inodes: &[u64]) -> bool {
    let Ok(descriptors) = process.fd() else {
        return false;
    };
    descriptors.flatten().any(|descriptor| {
        matches!(descriptor.target, FDTarget::Socket(inode) if inodes.contains(&inode))
    })
}

fn describe(process: &Process) -> String {
    match process.stat() {
        Ok(stat) => format!("{} (pid {})", stat.comm, process.pid),
        Err(_) => format!("pid {}", process.pid),
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    #[test]
    fn our_own_socket_is_found_under_our_pid() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let socket = UdpSocket::bind(address).unwrap();
            let address = socket.local_addr().unwrap();
            let pid = format!("(pid {})", std::process::id());
            // What /proc lists may leave one out while others come and go.
            let is_us = |holders: Holders| holders.with_us && holders.names.contains(&pid);
            let found = |_| of(address).is_some_and(is_us);
            assert!((0..10).any(found), "{:?}", of(address));
        }
    }
}
