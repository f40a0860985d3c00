//! Privileges: after the start, the proxy is an ordinary user with only the capabilities
//! that its configuration needs.
//!
//! A process started as root switches to another user; one with capabilities (by setcap or
//! systemd) drops those that it does not need. This must happen while there is one thread,
//! since the kernel keeps both for each thread.

use std::fs;
use std::io;
use std::net::SocketAddr;

use nix::unistd::{Gid, Uid, User, geteuid, setgid, setgroups, setuid};
use ppv2_engine::mode::Mode;
use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set, set_capabilities,
    set_keep_capabilities, set_no_new_privs,
};
use thiserror::Error;

use crate::config::{AdminAddress, Config, Listener};

mod shared_user;

pub use shared_user::shared_user;

/// The user that a process started as root switches to by default.
const DEFAULT_USER: &str = "nobody";

/// Lower ports are privileged (ip(7)), unless net.ipv4.ip_unprivileged_port_start says
/// otherwise.
const PRIVILEGED_PORTS: u16 = 1024;

/// The capabilities that the proxy ever needs.
const CAPABILITIES: [(CapabilitySet, &str); 3] = [
    (CapabilitySet::NET_RAW, "CAP_NET_RAW"),
    (CapabilitySet::NET_ADMIN, "CAP_NET_ADMIN"),
    (CapabilitySet::NET_BIND_SERVICE, "CAP_NET_BIND_SERVICE"),
];

/// Capabilities that the proxy may keep where a sandbox refuses to drop them.
const HARMLESS: CapabilitySet = CapabilitySet::NET_RAW.union(CapabilitySet::NET_BIND_SERVICE);

/// Why privileges can't be dropped.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PrivilegeError {
    /// There is no such user.
    #[error("there is no user `{0}`; name one of /etc/passwd, or its number")]
    NoUser(String),
    /// The user is root.
    #[error("`{0}` is root, which the proxy never runs as; name an ordinary user")]
    IsRoot(String),
    /// An ordinary user can't become another one.
    #[error("only root can become `{0}`; start the proxy as that user, or leave `user` out")]
    NotRoot(String),
    /// The kernel refused, as it does if a container's root has no capabilities.
    #[error(
        "can't {what}: {error}; start the proxy as an ordinary user (docker run --user, User= of \
         systemd), or leave it CAP_SETUID and CAP_SETGID"
    )]
    Refused {
        /// What it refused.
        what: String,
        /// Its error.
        error: io::Error,
    },
}

/// Names what the kernel refused.
fn refused<E: Into<io::Error>>(what: impl Into<String>) -> impl Fn(E) -> PrivilegeError {
    let what = what.into();
    move |error| PrivilegeError::Refused {
        what: what.clone(),
        error: error.into(),
    }
}

/// The capabilities that a configuration needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// CAP_NET_RAW: the proxy sends to IPv4 servers from clients' addresses.
    pub net_raw: bool,
    /// CAP_NET_BIND_SERVICE: a listener or the admin address has a port below 1024, or
    /// the proxy sends to servers from clients' ports.
    pub net_bind_service: bool,
}

impl Needs {
    /// What `config` needs, where the service manager has bound some addresses.
    #[must_use]
    pub fn of(config: &Config, is_bound: impl Fn(SocketAddr) -> bool) -> Self {
        let mut served = config.served();
        // A name may lead to IPv4 servers at any time.
        let net_raw = served.any(|(_, server, mode)| mode.spoofs() && server.address.0.is_ipv4())
            || config.named().any(|(_, _, mode)| mode.spoofs());
        let admin = config.admin().and_then(AdminAddress::ip);
        let privileged = |address: &SocketAddr| address.port() < PRIVILEGED_PORTS;
        let mut privileged = config.addresses().chain(admin).filter(privileged);
        let mut modes = config.listeners.iter().flat_map(Listener::modes);
        let own_ports = modes.any(Mode::spoofs_ports);
        Self {
            net_raw,
            net_bind_service: own_ports || privileged.any(|address| !is_bound(address)),
        }
    }

    /// The needed capabilities among those that the process has.
    fn among(self, has: CapabilitySet) -> CapabilitySet {
        let mut kept = CapabilitySet::empty();
        if self.net_raw {
            // Either is enough; the smaller one is better.
            let enough = [CapabilitySet::NET_RAW, CapabilitySet::NET_ADMIN];
            kept |= enough
                .into_iter()
                .find(|one| has.contains(*one))
                .unwrap_or(kept);
        }
        if self.net_bind_service {
            kept |= has & CapabilitySet::NET_BIND_SERVICE;
        }
        kept
    }
}

/// The privileges that the process has left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Its user.
    pub user: String,
    /// Its capabilities, named as in capabilities(7).
    pub capabilities: Vec<&'static str>,
}

/// Switches to `user`, or to `nobody` if started as root, and drops all capabilities that
/// `needs` does not name. Must be called while there is one thread.
///
/// # Errors
///
/// [`PrivilegeError`], after which the process must end.
pub fn reduce(user: Option<&str>, needs: Needs) -> Result<Standing, PrivilegeError> {
    let target = target(user)?;
    let failed = refused("keep capabilities over the change of user");
    let has = capabilities(None).map_err(&failed)?.permitted;
    let mut kept = needs.among(has);
    if let Some(Target { name, uid, gid }) = &target {
        set_keep_capabilities(true).map_err(failed)?;
        let failed = refused(format!("become user `{name}`"));
        setgroups(&[*gid]).map_err(&failed)?;
        setgid(*gid).map_err(&failed)?;
        setuid(*uid).map_err(failed)?;
    }
    let failed = refused("drop capabilities");
    let sets = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    clear_ambient_capability_set().map_err(&failed)?;
    match set_capabilities(None, sets) {
        // The kernel lets every process drop capabilities. A sandbox that does not, such as
        // systemd's `SystemCallFilter=~@privileged`, decides which the proxy has: none but
        // these. Its programs can't hand them on, by the next call.
        Err(Errno::PERM) if target.is_none() && HARMLESS.contains(has) => kept = has,
        result => result.map_err(&failed)?,
    }
    set_no_new_privs(true).map_err(failed)?;
    let named = CAPABILITIES.iter().filter(|(one, _)| kept.contains(*one));
    Ok(Standing {
        user: target.map_or_else(|| name_of(geteuid()), |target| target.name),
        capabilities: named.map(|(_, name)| *name).collect(),
    })
}

/// A user to switch to.
struct Target {
    name: String,
    uid: Uid,
    gid: Gid,
}

/// The user to switch to, if there is one.
fn target(user: Option<&str>) -> Result<Option<Target>, PrivilegeError> {
    let own = geteuid();
    let Some(name) = user else {
        if !own.is_root() {
            return Ok(None);
        }
        let target = find(DEFAULT_USER)?.unwrap_or(Target {
            name: DEFAULT_USER.to_owned(),
            uid: Uid::from_raw(65_534),
            gid: Gid::from_raw(65_534),
        });
        // Root of a user namespace is an ordinary user outside, and there may be no other
        // inside.
        return Ok(Some(target).filter(|target| is_mapped(target.uid)));
    };
    let target = find(name)?.ok_or_else(|| PrivilegeError::NoUser(name.to_owned()))?;
    if target.uid.is_root() {
        return Err(PrivilegeError::IsRoot(name.to_owned()));
    }
    if target.uid == own {
        return Ok(None);
    }
    if !own.is_root() {
        return Err(PrivilegeError::NotRoot(name.to_owned()));
    }
    Ok(Some(target))
}

/// Looks up a user by name or number. A number needs no entry in /etc/passwd.
fn find(name: &str) -> Result<Option<Target>, PrivilegeError> {
    let failed = refused(format!("look up user `{name}`"));
    if let Some(User { name, uid, gid, .. }) = entry(User::from_name(name)).map_err(&failed)? {
        return Ok(Some(Target { name, uid, gid }));
    }
    let Ok(number) = name.parse() else {
        return Ok(None);
    };
    let uid = Uid::from_raw(number);
    let user = entry(User::from_uid(uid)).map_err(failed)?;
    Ok(Some(Target {
        name: name.to_owned(),
        uid,
        gid: user.map_or(Gid::from_raw(number), |user| user.gid),
    }))
}

/// The entry that a lookup has found. Without /etc/passwd, as in minimal images, some lookups
/// fail instead of finding none (getpwnam(3)).
fn entry(result: nix::Result<Option<User>>) -> nix::Result<Option<User>> {
    match result {
        Err(nix::errno::Errno::ENOENT | nix::errno::Errno::ESRCH) => Ok(None),
        result => result,
    }
}

fn name_of(uid: Uid) -> String {
    let user = User::from_uid(uid).ok().flatten();
    user.map_or_else(|| uid.to_string(), |user| user.name)
}

/// Whether the process's user namespace has this user (user_namespaces(7)).
fn is_mapped(uid: Uid) -> bool {
    let Ok(map) = fs::read_to_string("/proc/self/uid_map") else {
        return true;
    };
    map.lines().any(|line| {
        let numbers = line.split_whitespace().map(str::parse::<u64>);
        let numbers: Result<Vec<_>, _> = numbers.collect();
        let Ok([first, _, count]) = numbers.as_deref() else {
            return false;
        };
        (*first..first.saturating_add(*count)).contains(&u64::from(uid.as_raw()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn needs(listener: &str, mode: &str, server: &str) -> Needs {
        let content = format!(
            "[[listener]]\nbind = [\"{listener}\"]\nupstream = \"u\"\n{mode}\n\
             [upstream.u]\nservers = [\"{server}\"]\n"
        );
        Needs::of(&Config::from_toml("x", &content).unwrap(), |_| false)
    }

    #[test]
    fn addresses_that_are_bound_need_no_capability() {
        let content = "[[listener]]\nbind = [\"192.0.2.1:53\", \"[::]:53\"]\nupstream = \"u\"\n\
                       [upstream.u]\nservers = [\"10.0.0.1:53\"]\n[admin]\nlisten = \"127.0.0.1:900\"\n";
        let config = Config::from_toml("x", content).unwrap();
        let needs = |left: Option<&str>| {
            let left = left.map(|left| left.parse().unwrap());
            Needs::of(&config, |address| Some(address) != left).net_bind_service
        };
        assert!(!needs(None));
        for left in ["192.0.2.1:53", "[::]:53", "127.0.0.1:900"] {
            assert!(needs(Some(left)), "{left}");
        }
    }

    #[test]
    fn each_mode_needs_the_capabilities_that_the_kernel_requires() {
        let none = Needs::default();
        let raw = Needs {
            net_raw: true,
            ..none
        };
        let ports = Needs {
            net_bind_service: true,
            ..none
        };
        let both = Needs {
            net_raw: true,
            net_bind_service: true,
        };
        let (v4, v6) = ("192.0.2.1:5300", "[2001:db8::1]:5300");
        let (server4, server6) = ("10.0.0.1:53", "[fd00::1]:53");
        assert_eq!(needs(v4, "", server4), none);
        assert_eq!(needs("192.0.2.1:53", "", server4), ports);
        let transparent = "mode = \"transparent\"";
        assert_eq!(needs(v4, transparent, server4), raw);
        assert_eq!(needs(v6, transparent, server6), none);
        let own = "mode = \"transparent\"\nsource_port = \"client\"";
        assert_eq!(needs(v4, own, server4), both);
        let dsr = "mode = \"dsr\"";
        assert_eq!(needs(v4, dsr, server4), both);
        assert_eq!(needs(v6, dsr, server6), ports);
        let sdk = "mode = \"dsr\"\nrewrite_on = \"sdk\"";
        assert_eq!(needs(v4, sdk, server4), none);
    }

    #[test]
    fn users_that_it_can_not_become_are_refused() {
        assert!(matches!(
            target(Some("root")),
            Err(PrivilegeError::IsRoot(_))
        ));
        assert!(matches!(target(Some("0")), Err(PrivilegeError::IsRoot(_))));
        let error = target(Some("no such user")).err().unwrap().to_string();
        assert!(error.contains("there is no user `no such user`"), "{error}");
        assert_eq!(find("65534").unwrap().unwrap().uid.as_raw(), 65_534);
    }
}
