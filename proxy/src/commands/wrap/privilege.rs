//! What a program gains when it starts, whereupon the kernel has the dynamic linker ignore
//! LD_PRELOAD: AT_SECURE of getauxval(3). The kernel decides so in `cap_bprm_creds_from_file`, by
//! what this process has and what the file says.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use rustix::fs::{StatVfsMountFlags, getxattr, statvfs};
use rustix::process::{getegid, geteuid, getgid, getuid};
use rustix::thread::{self, CapabilitySet, no_new_privs};

/// What a program gains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Privilege {
    /// The rights of its owner, by their ID.
    SetUser(u32),
    /// The rights of its group, by its ID.
    SetGroup(u32),
    /// The capabilities of its file.
    Capabilities,
    /// What this process has gained itself: its effective user or group is not the real one.
    Inherited,
}

impl fmt::Display for Privilege {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SetUser(owner) => write!(
                f,
                "is setuid, so the dynamic linker ignores LD_PRELOAD; start it as its owner (user ID {owner}), or \
                 remove the bit (chmod u-s)"
            ),
            Self::SetGroup(group) => write!(
                f,
                "is setgid, so the dynamic linker ignores LD_PRELOAD; start it with its group (ID {group}) as the \
                 primary one, or remove the bit (chmod g-s)"
            ),
            Self::Capabilities => f.write_str(
                "has file capabilities, so the dynamic linker ignores LD_PRELOAD; remove them (setcap -r) and give it \
                 the capabilities by systemd's AmbientCapabilities, or start it as root",
            ),
            Self::Inherited => f.write_str(
                "would start with an effective user or group that is not the real one, so the dynamic linker ignores \
                 LD_PRELOAD; start `ppv2-proxy wrap` without (setpriv --reuid, --regid)",
            ),
        }
    }
}

/// What a program gains, if it is anything.
pub(super) fn of(program: &Path) -> Option<Privilege> {
    // Bits of a file's mode: inode(7).
    const SETUID: u32 = 0o4000;
    const SETGID: u32 = 0o2000;
    const GROUP_EXECUTE: u32 = 0o010;

    let file = fs::metadata(program).ok()?;
    let mount = statvfs(program).map(|mount| mount.f_flag);
    let may_gain = !mount.is_ok_and(|flags| flags.contains(StatVfsMountFlags::NOSUID));
    let no_new_privs = no_new_privs().unwrap_or(false);
    let has = |bits| may_gain && !no_new_privs && file.mode() & bits == bits;
    if geteuid() != getuid() || getegid() != getgid() {
        return Some(Privilege::Inherited);
    }
    if has(SETUID) && file.uid() != getuid().as_raw() {
        return Some(Privilege::SetUser(file.uid()));
    }
    if has(SETGID | GROUP_EXECUTE) && file.gid() != getgid().as_raw() {
        return Some(Privilege::SetGroup(file.gid()));
    }
    // Root has nothing to gain.
    if !may_gain || getuid().is_root() {
        return None;
    }
    let mut attribute = [0; 24];
    let len = getxattr(program, "security.capability", &mut attribute).ok()?;
    let capabilities = FileCapabilities::read(attribute.get(..len)?)?;
    let gained = capabilities.gained(no_new_privs);
    (capabilities.are_effective || !gained.is_empty()).then_some(Privilege::Capabilities)
}

/// `struct vfs_cap_data` of linux/capability.h.
#[derive(Debug, PartialEq, Eq)]
struct FileCapabilities {
    permitted: CapabilitySet,
    inheritable: CapabilitySet,
    are_effective: bool,
}

impl FileCapabilities {
    /// None if they have no effect here.
    fn read(attribute: &[u8]) -> Option<Self> {
        const EFFECTIVE: u32 = 1;

        let (words, []) = attribute.as_chunks::<4>() else {
            return None;
        };
        let words: Vec<_> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
        let (start, permitted, inheritable) = match *words {
            [start, permitted, inheritable] => (start, [permitted, 0], [inheritable, 0]),
            [start, p0, i0, p1, i1] => (start, [p0, p1], [i0, i1]),
            // A sixth word names who is root in the namespace that they are for. Within that
            // namespace, the kernel leaves it out.
            _ => return None,
        };
        let set = |[low, high]: [u32; 2]| {
            CapabilitySet::from_bits_retain(u64::from(high) << 32 | u64::from(low))
        };
        Some(Self {
            permitted: set(permitted),
            inheritable: set(inheritable),
            are_effective: start & EFFECTIVE != 0,
        })
    }

    /// Those that this process will have.
    fn gained(&self, no_new_privs: bool) -> CapabilitySet {
        let Ok(own) = thread::capabilities(None) else {
            return self.permitted;
        };
        let bounding = self.permitted.iter().filter(|capability| {
            thread::capability_is_in_bounding_set(*capability).unwrap_or(false)
        });
        let gained = bounding.collect::<CapabilitySet>() | self.inheritable & own.inheritable;
        match no_new_privs {
            true => gained & own.permitted,
            false => gained,
        }
    }
}
