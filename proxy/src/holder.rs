//! Who holds a UDP address that could not be bound, as far as /proc tells.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use procfs::net::UdpNetEntry;
use procfs::process::{FDTarget, Process};

/// Looks at /proc at most: each can miss a socket or a process while others come and
/// go. The next one that finds nothing new is the last.
const LOOKS: usize = 5;

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
    let mut found = BTreeMap::new();
    for _ in 0..LOOKS {
        let before = found.len();
        found.extend(look(address)?);
        if before > 0 && found.len() == before {
            break;
        }
    }
    let ours = i32::try_from(std::process::id()).ok()?;
    let names: Vec<_> = found.values().map(String::as_str).collect();
    (!names.is_empty()).then(|| Holders {
        names: names.join(", "),
        with_us: found.contains_key(&ours),
    })
}

/// The processes that one look finds, by number, and what they are called.
fn look(address: SocketAddr) -> Option<BTreeMap<i32, String>> {
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
    let processes = procfs::process::all_processes().ok()?.flatten();
    let holders = processes.filter(|process| has_socket(process, &inodes));
    let named = holders.map(|holder| (holder.pid, describe(&holder)));
    Some(named.collect())
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
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use super::*;

    #[test]
    fn our_own_socket_is_found_under_our_pid_while_others_come_and_go() {
        let is_over = AtomicBool::new(false);
        let come_and_go = || {
            while !is_over.load(Ordering::Relaxed) {
                let _few = [(); 16].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
            }
        };
        let found: Vec<_> = thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(come_and_go);
            }
            let looks = ["127.0.0.1:0", "[::1]:0"].repeat(50).into_iter();
            let found = looks.map(|address| {
                let socket = UdpSocket::bind(address).unwrap();
                of(socket.local_addr().unwrap())
            });
            let found = found.collect();
            is_over.store(true, Ordering::Relaxed);
            found
        });
        let pid = format!("(pid {})", std::process::id());
        for holders in found {
            let holders = holders.unwrap();
            assert!(
                holders.with_us && holders.names.contains(&pid),
                "{holders:?}"
            );
        }
    }
}
