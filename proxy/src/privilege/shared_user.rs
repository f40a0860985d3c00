//! Other processes of the proxy's user. If workers share addresses (SO_REUSEPORT), the
//! kernel lets every process of that user bind them too, and gives it some of the clients
//! (socket(7)).

use std::fs;
use std::path::Path;

use nix::unistd::{Uid, geteuid};

use super::{DEFAULT_USER, name_of};
use crate::config::{Config, printable};

/// Processes that are examined. It bounds the delay of the start.
const MAX_PROCESSES: usize = 20_000;

/// Ancestors of this process that are examined.
const MAX_ANCESTORS: usize = 64;

/// A warning if the listeners of `config` share their addresses and the current user is
/// `nobody` or has other processes too. Ancestors of this process don't count, nor do
/// processes that are known to be in another network namespace.
#[must_use]
pub fn shared_user(config: &Config) -> Option<String> {
    if !config.shares_addresses() {
        return None;
    }
    let uid = geteuid();
    let user = name_of(uid);
    let other = other_process(Path::new("/proc"), std::process::id(), uid);
    let why = match other {
        Some(other) => format!("also runs {other}"),
        None if user == DEFAULT_USER => "is what other services may run as too".to_owned(),
        None => return None,
    };
    Some(format!(
        "user `{user}` {why}: a process of the same user can bind the listeners' addresses as well and get a part of the clients; run the proxy as a user of its own (`user`, or User= of systemd), or set reuse_port = false"
    ))
}

/// A process of user `uid`, by name and id, that is not an ancestor of process `own`.
fn other_process(proc: &Path, own: u32, uid: Uid) -> Option<String> {
    let folder = |pid: u32| proc.join(pid.to_string());
    let mut ours = vec![own];
    while ours.len() < MAX_ANCESTORS {
        let last = ours.last().copied()?;
        match Process::of(&folder(last)) {
            Some(process) if process.parent != 0 => ours.push(process.parent),
            _ => break,
        }
    }
    let network = |pid| fs::read_link(folder(pid).join("ns/net")).ok();
    let own_network = network(own);
    let entries = fs::read_dir(proc).ok()?.take(MAX_PROCESSES).flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| !ours.contains(pid)).find_map(|pid| {
        let process = Process::of(&folder(pid)).filter(|p| p.uids.contains(&uid.as_raw()))?;
        let is_elsewhere = network(pid).is_some_and(|other| Some(other) != own_network);
        (!is_elsewhere).then(|| format!("{} (pid {pid})", printable(&process.name)))
    })
}

/// From /proc/PID/status (proc_pid_status(5)).
struct Process {
    name: String,
    parent: u32,
    /// Its real, effective, saved and file system user.
    uids: Vec<u32>,
}

impl Process {
    fn of(folder: &Path) -> Option<Self> {
        let status = fs::read(folder.join("status")).ok()?;
        let status = String::from_utf8_lossy(&status);
        let line = |key: &str| status.lines().find_map(|line| line.strip_prefix(key));
        let uids = line("Uid:")?.split_whitespace().map(str::parse);
        Some(Self {
            name: line("Name:")?.trim().to_owned(),
            parent: line("PPid:")?.trim().parse().ok()?,
            uids: uids.collect::<Result<_, _>>().ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// Makes /proc/PID below `proc`.
    fn process(proc: &Path, pid: u32, name: &str, parent: u32, uid: u32, network: u32) {
        let folder = proc.join(pid.to_string());
        fs::create_dir_all(folder.join("ns")).unwrap();
        let status = format!(
            "Name:\t{name}\nState:\tS\nPid:\t{pid}\nPPid:\t{parent}\nUid:\t0\t{uid}\t{uid}\t{uid}\n"
        );
        fs::write(folder.join("status"), status).unwrap();
        symlink(format!("net:[{network}]"), folder.join("ns/net")).unwrap();
    }

    #[test]
    fn another_process_of_the_user_is_reported() {
        let folder = tempfile::tempdir().unwrap();
        let proc = folder.path();
        fs::write(proc.join("uptime"), "1 1\n").unwrap();
        let other = |uid| other_process(proc, 50, Uid::from_raw(uid));
        process(proc, 1, "init", 0, 0, 7);
        process(proc, 40, "sh", 1, 99, 7);
        process(proc, 50, "ppv2-proxy", 40, 99, 7);
        process(proc, 60, "sshd", 1, 98, 7);
        // The shell that started it is of the same user.
        assert_eq!(other(99), None);
        // Another container's can't bind here.
        process(proc, 61, "elsewhere", 1, 99, 8);
        assert_eq!(other(99), None);
        process(proc, 62, "dns\u{1b}masq", 1, 99, 7);
        let named = Some("dns\\u{1b}masq (pid 62)".to_owned());
        assert_eq!(other(99), named);
        // One whose namespace can't be seen may be in ours.
        fs::remove_file(proc.join("62/ns/net")).unwrap();
        assert_eq!(other(99), named);
    }

    #[test]
    fn without_shared_addresses_there_is_no_warning() {
        let config = |more: &str| {
            let content = format!(
                "{more}\n[[listener]]\nbind = [\"127.0.0.1:5300\"]\nupstream = \"u\"\n\
                 [upstream.u]\nservers = [\"192.0.2.1:53\"]\n"
            );
            Config::from_toml("x", &content).unwrap()
        };
        for alone in ["workers = 1", "workers = 2\nreuse_port = false"] {
            assert_eq!(shared_user(&config(alone)), None);
        }
        assert!(config("workers = 2").shares_addresses());
    }
}
