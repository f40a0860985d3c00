//! Which processes own a UDP address that could not be bound, by /proc.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use procfs::net::UdpNetEntry;
use procfs::process::{FDTarget, Process};

/// The most readings of /proc. A reading can miss a socket or a process while others come
/// and go; one that finds nothing new is the last.
const MAX_READINGS: usize = 5;

/// The processes that own an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owners {
    /// Their names, with their process ids.
    pub names: String,
    /// Whether this process is one of them.
    pub with_us: bool,
}

/// The processes that have bound `address`, or a wildcard of its port. `None` if the
/// sockets belong to processes that this one may not look into.
#[must_use]
pub fn of(address: SocketAddr) -> Option<Owners> {
    let found = repeated(|| read(address))?;
    let ours = i32::try_from(std::process::id()).ok()?;
    let names: Vec<_> = found.values().map(String::as_str).collect();
    (!names.is_empty()).then(|| Owners {
        names: names.join(", "),
        with_us: found.contains_key(&ours),
    })
}

/// Names of processes by id.
type Found = BTreeMap<i32, String>;

/// What several readings find together.
fn repeated(mut read: impl FnMut() -> Option<Found>) -> Option<Found> {
    let mut found = Found::new();
    for _ in 0..MAX_READINGS {
        let before = found.len();
        found.extend(read()?);
        if before > 0 && found.len() == before {
            break;
        }
    }
    Some(found)
}

fn read(address: SocketAddr) -> Option<Found> {
    let entries = match address {
        SocketAddr::V4(_) => procfs::net::udp(),
        SocketAddr::V6(_) => procfs::net::udp6(),
    };
    let entries = entries.ok()?.into_iter();
    let conflicting = entries.filter(|entry| conflicts(entry, address));
    let inodes: Vec<_> = conflicting.map(|entry| entry.inode).collect();
    let processes = procfs::process::all_processes().ok()?.flatten();
    let owners = processes.filter(|process| has_socket(process, &inodes));
    Some(owners.map(|owner| (owner.pid, describe(&owner))).collect())
}

fn conflicts(entry: &UdpNetEntry, address: SocketAddr) -> bool {
    let (bound, ip) = (entry.local_address, address.ip());
    let is_wildcard = bound.ip().is_unspecified() || ip.is_unspecified();
    bound.port() == address.port() && (bound.ip() == ip || is_wildcard)
}

fn has_socket(process: &Process, inodes: &[u64]) -> bool {
    let mut descriptors = process.fd().into_iter().flatten().flatten();
    descriptors.any(|descriptor| {
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
    fn our_own_socket_is_found_with_our_pid() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let socket = UdpSocket::bind(address).unwrap();
            let found = of(socket.local_addr().unwrap()).unwrap();
            let pid = format!("(pid {})", std::process::id());
            assert!(found.with_us && found.names.contains(&pid), "{found:?}");
        }
    }

    /// What readings that see these processes find together.
    fn found(readings: &[&[i32]]) -> Vec<i32> {
        let mut readings = readings.iter();
        let read = || {
            let seen = readings.next().expect("a reading").iter();
            Some(seen.map(|pid| (*pid, String::new())).collect())
        };
        repeated(read).unwrap().into_keys().collect()
    }

    #[test]
    fn a_process_that_one_reading_misses_is_found_by_the_next() {
        assert_eq!(found(&[&[], &[1], &[1]]), [1]);
        assert_eq!(found(&[&[1], &[1, 2], &[2]]), [1, 2]);
        // Processes of other users are never found.
        assert!(found(&[[].as_slice(); MAX_READINGS]).is_empty());
        assert_eq!(repeated(|| None), None);
    }
}
