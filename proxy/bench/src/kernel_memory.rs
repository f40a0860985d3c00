//! What memory the kernel takes for a program: sockets, descriptors, entries of epoll. A
//! control group of the program's own tells, where the machine has them and root is here.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

/// How long a killed process may stay in its group: so often, with such pauses.
const TRIES: u32 = 100;
const PAUSE: Duration = Duration::from_millis(10);

/// A control group that accounts for memory. It is removed when it is dropped, which its
/// processes must not survive.
pub(crate) struct Group {
    folder: PathBuf,
    tells: Tells,
}

/// Reads the kernel's memory off a group's folder.
type Tells = fn(&Path) -> Option<u64>;

/// How groups of all runs are named, before a number.
const PREFIX: &str = "ppv2-bench-";

impl Group {
    /// A group of this number, if there can be one.
    pub(crate) fn make(number: u32) -> Option<Self> {
        let versions: [(&str, Tells); 2] = [
            ("/sys/fs/cgroup", in_version_2),
            ("/sys/fs/cgroup/memory", in_version_1),
        ];
        versions.into_iter().find_map(|(root, tells)| {
            remove_left_ones(root);
            let folder = Path::new(root).join(format!("{PREFIX}{number}"));
            fs::create_dir(&folder).ok()?;
            // Where it can't tell, it is removed again.
            let group = Self { folder, tells };
            group.bytes().is_some().then_some(group)
        })
    }

    /// Has the group account for what the process allocates from now on.
    pub(crate) fn add(&self, pid: i32) {
        // One that has ended is none of it.
        let _ = fs::write(self.folder.join("cgroup.procs"), pid.to_string());
    }

    /// Bytes of kernel memory.
    pub(crate) fn bytes(&self) -> Option<u64> {
        (self.tells)(&self.folder)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for _ in 0..TRIES {
            if fs::remove_dir(&self.folder).is_ok() {
                return;
            }
            thread::sleep(PAUSE);
        }
    }
}

/// Removes the groups of runs that were killed. Those with a process stay.
fn remove_left_ones(root: &str) {
    let entries = fs::read_dir(root).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(PREFIX)) {
        let _ = fs::remove_dir(entry.path());
    }
}

fn in_version_1(folder: &Path) -> Option<u64> {
    let text = fs::read_to_string(folder.join("memory.kmem.usage_in_bytes")).ok()?;
    text.trim().parse().ok()
}

fn in_version_2(folder: &Path) -> Option<u64> {
    kernel_of(&fs::read_to_string(folder.join("memory.stat")).ok()?)
}

/// The line `kernel` of `memory.stat`.
fn kernel_of(stat: &str) -> Option<u64> {
    let line = stat.lines().find_map(|line| line.strip_prefix("kernel "))?;
    line.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_memory_is_not_that_of_its_stacks() {
        let stat = "anon 8192\nkernel_stack 16384\nkernel 425984\nsock 4096\n";
        assert_eq!(kernel_of(stat), Some(425_984));
        assert_eq!(kernel_of("anon 8192\nkernel_stack 16384\n"), None);
    }
}
