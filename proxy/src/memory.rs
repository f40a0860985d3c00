//! How much memory this process may use: the limit of its control group (cgroups(7)), of
//! version 1 or 2, or of a group around it, or what the machine has.

use std::fs;
use std::path::{Path, PathBuf};

use procfs::process::MountInfo;
use procfs::{FromRead, ProcessCGroups};

/// The memory that this process may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryLimit {
    /// In bytes.
    pub bytes: u64,
    /// The file that says so, such as `/sys/fs/cgroup/system.slice/a.service/memory.max`.
    pub source: PathBuf,
}

/// The lowest limit of the process's control group and of those around it, or the
/// machine's memory if that is less. `None` if the kernel says nothing.
#[must_use]
pub fn limit() -> Option<MemoryLimit> {
    limit_below(Path::new("/"))
}

/// As [`limit`], with the kernel's files below `root`.
fn limit_below(root: &Path) -> Option<MemoryLimit> {
    let read = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
    let groups = ProcessCGroups::from_read(read("proc/self/cgroup").as_bytes()).ok();
    let mounts = read("proc/self/mountinfo");
    let mounts = mounts
        .lines()
        .filter_map(|line| MountInfo::from_line(line).ok());
    let files = mounts.flat_map(|mount| limit_files(&mount, groups.as_ref()));
    let of_groups = files.filter_map(|file| {
        let below = file.strip_prefix("/").unwrap_or(&file);
        let text = fs::read_to_string(root.join(below)).ok()?;
        // "max" is not a number, and no limit.
        Some((text.trim().parse().ok()?, file))
    });
    let total = total(&read("proc/meminfo")).map(|bytes| (bytes, "/proc/meminfo".into()));
    let lowest = of_groups.chain(total).min_by_key(|(bytes, _)| *bytes);
    lowest.map(|(bytes, source)| MemoryLimit { bytes, source })
}

/// The machine's memory in bytes, by /proc/meminfo.
fn total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kilobytes.checked_mul(1024)
}

/// The files that may hold a limit of the process's group or of those around it, as far
/// as they are visible at this mount.
fn limit_files(mount: &MountInfo, groups: Option<&ProcessCGroups>) -> Vec<PathBuf> {
    let is_memory = |controller: &String| controller == "memory";
    let is_v2 = mount.fs_type == "cgroup2";
    let is_v1 = mount.fs_type == "cgroup" && mount.super_options.keys().any(is_memory);
    // The kernel slows a group down beyond `memory.high`, and ends one of its processes
    // beyond the other limits.
    let names: &[&str] = match (is_v1, is_v2) {
        (true, _) => &["memory.limit_in_bytes"],
        (_, true) => &["memory.max", "memory.high"],
        _ => return Vec::new(),
    };
    let mut groups = groups.into_iter().flat_map(|groups| &groups.0);
    let group = groups.find(|group| match is_v2 {
        true => group.controllers.is_empty(),
        false => group.controllers.iter().any(is_memory),
    });
    let Some(group) = group else {
        return Vec::new();
    };
    let visible = PathBuf::from(unescaped(&mount.root));
    let mounted_at = PathBuf::from(unescaped(&mount.mount_point.to_string_lossy()));
    // In a container the path may be the host's, of which only the container's own part
    // is visible.
    let folder = match Path::new(&group.pathname).strip_prefix(visible) {
        Ok(below) => mounted_at.join(below),
        Err(_) => mounted_at.clone(),
    };
    let folders = folder.ancestors();
    let folders = folders.take_while(|folder| folder.starts_with(&mounted_at));
    folders
        .flat_map(|folder| names.iter().map(|name| folder.join(name)))
        .collect()
}

/// A path of mountinfo, which has spaces and the like as octal numbers.
fn unescaped(path: &str) -> String {
    let escapes = [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ];
    escapes.iter().fold(path.to_owned(), |path, (code, meant)| {
        path.replace(code, meant)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel would tell, below a folder.
    struct Host(tempfile::TempDir);

    impl Host {
        fn new(groups: &str, mounts: &str) -> Self {
            let host = Self(tempfile::tempdir().unwrap());
            host.has("/proc/self/cgroup", groups);
            host.has("/proc/self/mountinfo", mounts);
            host
        }

        fn has(&self, path: &str, content: &str) {
            let path = self.0.path().join(path.strip_prefix('/').unwrap());
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }

        #[track_caller]
        fn allows(&self, bytes: u64, source: &str) {
            let limit = limit_below(self.0.path()).unwrap();
            assert_eq!((limit.bytes, limit.source), (bytes, source.into()));
        }
    }

    const UNIFIED: &str = "\
24 30 0:22 / /proc rw,relatime - proc proc rw
31 24 0:27 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate
";
    const SPLIT: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";

    #[test]
    fn the_lowest_limit_of_a_group_and_those_around_it_applies() {
        let host = Host::new("0::/system.slice/ppv2.service\n", UNIFIED);
        host.has(
            "/proc/meminfo",
            "MemTotal:        8000000 kB\nMemFree: 1 kB\n",
        );
        host.allows(8_192_000_000, "/proc/meminfo");
        let service = "/sys/fs/cgroup/system.slice/ppv2.service/memory.max";
        let slice = "/sys/fs/cgroup/system.slice/memory.max";
        host.has(service, "max\n");
        host.has(slice, "67108864\n");
        host.allows(64 << 20, slice);
        host.has(service, "33554432\n");
        host.allows(32 << 20, service);
        let high = "/sys/fs/cgroup/system.slice/ppv2.service/memory.high";
        host.has(high, "16777216\n");
        host.allows(16 << 20, high);
        // Another service's limit does not count.
        host.has("/sys/fs/cgroup/system.slice/b.service/memory.max", "1\n");
        host.allows(16 << 20, high);
    }

    #[test]
    fn version_1_is_read_too() {
        let groups = "8:pids:/\n4:memory:/docker/a\n3:cpu,cpuacct:/docker/b\n0::/docker/c\n";
        let host = Host::new(groups, SPLIT);
        assert_eq!(limit_below(host.0.path()), None);
        let none = "9223372036854771712\n";
        let (group, root) = (
            "/sys/fs/cgroup/memory/docker/a/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        );
        host.has(group, none);
        host.has(root, none);
        host.has("/proc/meminfo", "MemTotal: 1000000 kB\n");
        host.allows(1_024_000_000, "/proc/meminfo");
        host.has(
            "/sys/fs/cgroup/memory/docker/b/memory.limit_in_bytes",
            "1\n",
        );
        host.has(group, "67108864\n");
        host.allows(64 << 20, group);
    }

    #[test]
    fn a_container_sees_its_own_group_as_the_root() {
        // Version 1: the path is the host's, and the mount shows a part of it.
        let groups = "4:memory:/docker/a b/inner\n0::/\n";
        let mounts = SPLIT.replace(
            "0:32 / /sys/fs/cgroup/memory",
            "0:32 /docker/a\\040b /sys/fs/cgroup/memory",
        );
        let host = Host::new(groups, &mounts);
        let (outer, inner) = (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/inner/memory.limit_in_bytes",
        );
        host.has(outer, "67108864\n");
        host.allows(64 << 20, outer);
        host.has(inner, "33554432\n");
        host.allows(32 << 20, inner);
        // Version 2 with a name space for groups, and without.
        for group in ["0::/\n", "0::/docker/a\n", "0::/../b\n"] {
            let host = Host::new(group, &UNIFIED.replace("0:27 / ", "0:27 /docker/a "));
            host.has("/sys/fs/cgroup/memory.max", "1048576\n");
            host.allows(1 << 20, "/sys/fs/cgroup/memory.max");
        }
    }

    #[test]
    fn this_machine_has_a_limit() {
        assert!(limit().unwrap().bytes > 1 << 20);
    }
}
