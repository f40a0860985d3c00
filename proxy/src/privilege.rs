//! What the process may do: it is an ordinary user with the one or two
//! capabilities that its configuration needs, whatever it was started as.
//!
//! A process that was given root becomes another user; one that was given
//! capabilities (by setcap or systemd) lets go of those that it does not need.
//! This must happen while there is one thread, since the kernel keeps both for
//! each thread.

use std::fs;
use std::io;

use nix::unistd::{Gid, Uid, User, geteuid, setgid, setgroups, setuid};
use thiserror::Error;

use crate::config::{Config, Listener};
use ppv2_engine::mode::Mode;

mod shared_user;

pub use shared_user::shared_user;

/// Whom a process becomes that was started as root and told nobody else.
const DEFAULT_USER: &str = "nobody";

/// Ports below this are for the privileged (ip(7)), unless
/// net.ipv4.ip_unprivileged_port_start says otherwise.
const PRIVILEGED_PORTS: u16 = 1024;

/// Why the process can't be what it should.
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
    /// The kernel refused, as it does where a container's root has no capabilities.
    #[error(
        "can't {what}: {error}; start the proxy as an ordinary user (docker run --user, User= of \
         systemd), or leave it CAP_SETUID and CAP_SETGID"
    )]
    Refused {
        /// What it refused.
        what: String,
        /// What it said.
        error: io::Error,
    },
}

impl PrivilegeError {
    fn refused(what: impl Into<String>, error: impl Into<io::Error>) -> Self {
        Self::Refused {
            what: what.into(),
            error: error.into(),
        }
    }
}

/// The capabilities that a configuration makes use of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// CAP_NET_RAW: some IPv4 servers are written to from clients' addresses.
    pub net_raw: bool,
    /// CAP_NET_BIND_SERVICE: a listener or the admin address has a port below
    /// 1024, or servers are written to from clients' own ports.
    pub net_bind_service: bool,
}

impl Needs {
    /// What `config` needs.
    #[must_use]
    pub fn of(config: &Config) -> Self {
        let mut served = config.served();
        // A name may lead to IPv4 servers at any time.
        let net_raw = served.any(|(_, server, mode)| mode.spoofs() && server.address.0.is_ipv4())
            || config.named().any(|(_, _, mode)| mode.spoofs());
        let bound = config
            .listeners
            .iter()
            .flat_map(|listener| listener.bind.clone());
        let mut bound = bound.chain(config.admin());
        let mut modes = config.listeners.iter().flat_map(Listener::modes);
        let own_ports = modes.any(Mode::spoofs_ports);
        Self {
            net_raw,
            net_bind_service: own_ports || bound.any(|a| a.port() < PRIVILEGED_PORTS),
        }
    }
}

/// What the process is from now on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Its user.
    pub user: String,
    /// The capabilities that it has kept, as capabilities(7) names them.
    pub capabilities: Vec<&'static str>,
}

/// Becomes `user`, or `nobody` if started as root, and lets go of all
/// capabilities that `needs` does not name. Call it while there is one thread.
///
/// # Errors
///
/// [`PrivilegeError`], after which the process must end.
pub fn settle(user: Option<&str>, needs: Needs) -> Result<Standing, PrivilegeError> {
    let target = whom(user)?;
    let kept = sys::prepare(needs, target.is_some())?;
    if let Some(target) = &target {
        become_user(target)?;
    }
    let capabilities = sys::reduce(kept)?;
    let uid = geteuid();
    Ok(Standing {
        user: match target {
            Some(target) => target.name,
            None => name_of(uid),
        },
        capabilities,
    })
}

/// A user to become.
struct Target {
    name: String,
    uid: Uid,
    gid: Gid,
}

/// Whom to become, if anybody.
fn whom(user: Option<&str>) -> Result<Option<Target>, PrivilegeError> {
    let own = geteuid();
    let Some(name) = user else {
        // Elsewhere, ports below 1024 could no longer be bound.
        if !own.is_root() || cfg!(not(target_os = "linux")) {
            return Ok(None);
        }
        let target = find(DEFAULT_USER)?.unwrap_or(Target {
            name: DEFAULT_USER.to_owned(),
            uid: Uid::from_raw(65_534),
            gid: Gid::from_raw(65_534),
        });
        // Root of a user namespace is an ordinary user outside, and there may be
        // no other inside.
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
    let refused = |error| PrivilegeError::refused(format!("look up user `{name}`"), error);
    if let Some(user) = User::from_name(name).map_err(refused)? {
        return Ok(Some(Target {
            name: user.name,
            uid: user.uid,
            gid: user.gid,
        }));
    }
    let Ok(number) = name.parse() else {
        return Ok(None);
    };
    let user = User::from_uid(Uid::from_raw(number)).map_err(refused)?;
    Ok(Some(Target {
        name: name.to_owned(),
        uid: Uid::from_raw(number),
        gid: user.map_or(Gid::from_raw(number), |user| user.gid),
    }))
}

fn name_of(uid: Uid) -> String {
    let user = User::from_uid(uid).ok().flatten();
    user.map_or_else(|| uid.to_string(), |user| user.name)
}

/// Whether the process's user namespace knows this user (user_namespaces(7)).
fn is_mapped(uid: Uid) -> bool {
    let Ok(map) = fs::read_to_string("/proc/self/uid_map") else {
        return true;
    };
    map.lines().any(|line| {
        let mut numbers = line.split_whitespace().map(str::parse::<u64>);
        let (Some(Ok(first)), Some(Ok(_)), Some(Ok(count))) =
            (numbers.next(), numbers.next(), numbers.next())
        else {
            return false;
        };
        (first..first.saturating_add(count)).contains(&u64::from(uid.as_raw()))
    })
}

fn become_user(target: &Target) -> Result<(), PrivilegeError> {
    let Target { name, uid, gid } = target;
    let refused = |error| PrivilegeError::refused(format!("become user `{name}`"), error);
    setgroups(&[*gid]).map_err(refused)?;
    setgid(*gid).map_err(refused)?;
    setuid(*uid).map_err(refused)
}

#[cfg(target_os = "linux")]
mod sys {
    //! Capabilities, by capabilities(7).

    use rustix::thread::{
        CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
        set_capabilities, set_keep_capabilities, set_no_new_privs,
    };

    use super::{Needs, PrivilegeError};

    /// Those that the proxy ever needs, with their names.
    const KNOWN: [(CapabilitySet, &str); 3] = [
        (CapabilitySet::NET_RAW, "CAP_NET_RAW"),
        (CapabilitySet::NET_ADMIN, "CAP_NET_ADMIN"),
        (CapabilitySet::NET_BIND_SERVICE, "CAP_NET_BIND_SERVICE"),
    ];

    /// Decides which capabilities stay, and has them outlast the change of user.
    pub(super) fn prepare(needs: Needs, changes: bool) -> Result<CapabilitySet, PrivilegeError> {
        let refused =
            |error| PrivilegeError::refused("keep capabilities over the change of user", error);
        let has = capabilities(None).map_err(refused)?.permitted;
        let mut kept = CapabilitySet::empty();
        if needs.net_raw {
            // Either serves; the smaller one is better.
            let serving = [CapabilitySet::NET_RAW, CapabilitySet::NET_ADMIN];
            let first = serving.into_iter().find(|one| has.contains(*one));
            kept |= first.unwrap_or_else(CapabilitySet::empty);
        }
        if needs.net_bind_service {
            kept |= has & CapabilitySet::NET_BIND_SERVICE;
        }
        if changes {
            set_keep_capabilities(true).map_err(refused)?;
        }
        Ok(kept)
    }

    /// Lets go of all but `kept`, for good.
    pub(super) fn reduce(kept: CapabilitySet) -> Result<Vec<&'static str>, PrivilegeError> {
        let refused = |error| PrivilegeError::refused("let go of capabilities", error);
        let sets = CapabilitySets {
            effective: kept,
            permitted: kept,
            inheritable: CapabilitySet::empty(),
        };
        clear_ambient_capability_set().map_err(refused)?;
        set_capabilities(None, sets).map_err(refused)?;
        set_no_new_privs(true).map_err(refused)?;
        let named = KNOWN.iter().filter(|(one, _)| kept.contains(*one));
        Ok(named.map(|(_, name)| *name).collect())
    }
}

#[cfg(not(target_os = "linux"))]
mod sys {
    //! No capabilities.

    use super::{Needs, PrivilegeError};

    pub(super) fn prepare(_: Needs, _: bool) -> Result<(), PrivilegeError> {
        Ok(())
    }

    pub(super) fn reduce((): ()) -> Result<Vec<&'static str>, PrivilegeError> {
        Ok(Vec::new())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn needs(listener: &str, mode: &str, server: &str) -> Needs {
        let content = format!(
            "[[listener]]\nbind = [\"{listener}\"]\nupstream = \"u\"\n{mode}\n\
             [upstream.u]\nservers = [\"{server}\"]\n"
        );
        Needs::of(&Config::from_toml("x", &content).unwrap())
    }

    #[test]
    fn a_mode_needs_what_the_kernel_asks_for_it() {
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
    fn whom_it_can_not_become_is_named() {
        assert!(matches!(whom(Some("root")), Err(PrivilegeError::IsRoot(_))));
        assert!(matches!(whom(Some("0")), Err(PrivilegeError::IsRoot(_))));
        let error = whom(Some("no such user")).err().unwrap().to_string();
        assert!(error.contains("there is no user `no such user`"), "{error}");
        assert_eq!(find("65534").unwrap().unwrap().uid.as_raw(), 65_534);
    }
}
