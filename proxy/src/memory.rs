//! How much memory this process may use: its control group's limit (cgroups(7)), of
//! version 1 or 2, or that of a group around it, or what the machine has.

use std::fs;
use std::path::{Path, PathBuf};

/// The memory that bounds this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryLimit {
    /// How much, in bytes.
    pub bytes: u64,
    /// The file that says so, such as `/sys/fs/cgroup/system.slice/a.service/memory.max`.
    pub said_by: PathBuf,
}

/// The least limit of the process's control group and of those around it, or the
/// machine's memory if that is less. `None` where the kernel tells none of them.
#[must_use]
pub fn limit() -> Option<MemoryLimit> {
    limit_below(Path::new("/"))
}

/// As [`limit`], with the kernel's files below `root`.
fn limit_below(root: &Path) -> Option<MemoryLimit> {
    let read = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
    let groups = read("proc/self/cgroup");
    let mounts = read("proc/self/mountinfo");
    let of_groups = mounts
        .lines()
        .filter_map(Mount::of)
        .filter_map(|mount| Some((mount.version, mount.folders(&groups)?)))
        .flat_map(|(version, folders)| {
            let files = version.files().iter();
            files.flat_map(move |file| folders.clone().into_iter().map(move |f| f.join(file)))
        });
    let of_groups = of_groups.filter_map(|file| {
        let below = file.strip_prefix("/").unwrap_or(&file);
        let text = fs::read_to_string(root.join(below)).ok()?;
        // "max" is no number, and no limit.
        Some((text.trim().parse().ok()?, file))
    });
    let total = in_bytes(&read("proc/meminfo")).map(|bytes| (bytes, "/proc/meminfo".into()));
    let least = of_groups.chain(total).min_by_key(|(bytes, _)| *bytes);
    least.map(|(bytes, said_by)| MemoryLimit { bytes, said_by })
}

/// The machine's memory, by /proc/meminfo.
fn in_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kilobytes.checked_mul(1024)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Version {
    /// With a hierarchy for memory.
    One,
    Two,
}

impl Version {
    /// What may hold a limit. The kernel slows a group down beyond `memory.high`, and
    /// ends a process of it beyond the others.
    fn files(self) -> &'static [&'static str] {
        match self {
            Self::One => &["memory.limit_in_bytes"],
            Self::Two => &["memory.max", "memory.high"],
        }
    }
}

/// Where a hierarchy of control groups can be seen.
struct Mount {
    version: Version,
    /// The group that is seen there.
    shows: PathBuf,
    at: PathBuf,
}

impl Mount {
    /// Of a line of /proc/self/mountinfo (proc_pid_mountinfo(5)).
    fn of(line: &str) -> Option<Self> {
        let (ours, of_file_system) = line.split_once(" - ")?;
        let mut fields = ours.split(' ').skip(3);
        let (shows, at) = (fields.next()?, fields.next()?);
        let mut fields = of_file_system.split(' ');
        let kind = fields.next()?;
        let mut options = fields.nth(1).unwrap_or_default().split(',');
        let version = match kind {
            "cgroup2" => Version::Two,
            "cgroup" if options.any(|option| option == "memory") => Version::One,
            _ => return None,
        };
        Some(Self {
            version,
            shows: unescaped(shows).into(),
            at: unescaped(at).into(),
        })
    }

    /// The folders of the process's group and of those around it, as far as they can be
    /// seen here. `groups` is /proc/self/cgroup.
    fn folders(&self, groups: &str) -> Option<Vec<PathBuf>> {
        let group = groups.lines().find_map(|line| {
            let (_, rest) = line.split_once(':')?;
            let (controllers, group) = rest.split_once(':')?;
            let is_ours = match self.version {
                Version::One => controllers.split(',').any(|one| one == "memory"),
                Version::Two => controllers.is_empty(),
            };
            is_ours.then_some(group)
        })?;
        // In a container the path may be that of the host, of which only the
        // container's own part can be seen.
        let below = Path::new(group).strip_prefix(&self.shows);
        let folder = below.map_or_else(|_| self.at.clone(), |below| self.at.join(below));
        let folders = folder.ancestors().take_while(|f| f.starts_with(&self.at));
        Some(folders.map(Path::to_owned).collect())
    }
}

/// Spaces and the like in paths are written as octal numbers.
fn unescaped(text: &str) -> String {
    let escapes = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n")];
    let mut text = text.to_owned();
    for (written, meant) in escapes {
        text = text.replace(written, meant);
    }
    text.replace("\\134", "\\")
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
        fn allows(&self, bytes: u64, said_by: &str) {
            let limit = limit_below(self.0.path()).unwrap();
            assert_eq!((limit.bytes, limit.said_by), (bytes, said_by.into()));
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
    fn the_least_limit_of_a_group_and_those_around_it_counts() {
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
        // Another service's is no matter.
        host.has("/sys/fs/cgroup/system.slice/b.service/memory.max", "1\n");
        host.allows(16 << 20, high);
    }

    #[test]
    fn the_hierarchy_of_version_1_is_read_too() {
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
    fn this_machine_tells_something() {
        assert!(limit().unwrap().bytes > 1 << 20);
    }
}
