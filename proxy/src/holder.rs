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
    let found = all_of(|| look(address))?;
    let ours = i32::try_from(std::process::id()).ok()?;
    let names: Vec<_> = found.values().map(String::as_str).collect();
    (!names.is_empty()).then(|| Holders {
        names: names.join(", "),
        with_us: found.contains_key(&ours),
    })
}

/// Processes by number, and what they are called.
type Found = BTreeMap<i32, String>;

/// What several looks find together.
fn all_of(mut look: impl FnMut() -> Option<Found>) -> Option<Found> {
    let mut found = Found::new();
    for _ in 0..LOOKS {
        let before = found.len();
        found.extend(look()?);
        if before > 0 && found.len() == before {
            break;
        }
    }
    Some(found)
}

/// The processes that one look finds.
fn look(address: SocketAddr) -> Option<Found> {
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

    use super::*;

    #[test]
    fn our_own_socket_is_found_under_our_pid() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let socket = UdpSocket::bind(address).unwrap();
            let found = of(socket.local_addr().unwrap()).unwrap();
            let pid = format!("(pid {})", std::process::id());
            assert!(found.with_us && found.names.contains(&pid), "{found:?}");
        }
    }

    /// What looks find that see these processes, one after the other.
    fn found(looks: &[&[i32]]) -> Vec<i32> {
        let mut looks = looks.iter();
        let look = || {
            let seen = looks.next().expect("a look").iter();
            Some(seen.map(|pid| (*pid, String::new())).collect())
        };
        all_of(look).unwrap().into_keys().collect()
    }

    #[test]
    fn a_process_that_a_look_misses_is_found_by_the_next() {
        assert_eq!(found(&[&[], &[1], &[1]]), [1]);
        assert_eq!(found(&[&[1], &[1, 2], &[2]]), [1, 2]);
        // Those that we may not look into are never found.
        assert!(found(&[[].as_slice(); LOOKS]).is_empty());
        assert_eq!(all_of(|| None), None);
    }
}
