//! What the environment variables say.

mod only;

use std::env;
use std::ffi::OsStr;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net};
use ppv2_sdk::{Format, Trust, TrustError, Untrusted};
use thiserror::Error;

use only::{Only, OnlyError};

use crate::recent::Nanos;

/// The longest that a thread uses what it has decided itself: so late are the times at
/// which the table says that clients were heard.
const MOST_RECENT: Duration = Duration::from_millis(200);

const DEFAULT_MAX_CLIENTS: usize = 65_536;
const DEFAULT_FORGET_AFTER: Duration = Duration::from_secs(120);

/// Bounds the address space that the table asks for to 64 GiB.
const MOST_CLIENTS: usize = 1 << 24;

/// The settings of a process, read once.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) trust: Trust,
    pub(crate) untrusted: Untrusted,
    pub(crate) max_clients: usize,
    /// What IP_PKTINFO shows the program: the local address, or the header's destination.
    pub(crate) pktinfo: Pktinfo,
    /// What becomes of a socket with another port when it sends to a client.
    pub(crate) new_sockets: NewSockets,
    /// Whether forked processes share one table of clients.
    pub(crate) fork: Fork,
    pub(crate) stats: Option<PathBuf>,
    /// For how many nanoseconds a thread may go by what it has decided itself, see [`recent`]. `None`: it
    /// asks the table each time.
    ///
    /// [`recent`]: crate::recent
    pub(crate) recent: Option<Nanos>,
    peers: Vec<IpNet>,
    /// The trusted networks.
    proxies: Vec<IpNet>,
    only: Only,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pktinfo {
    Local,
    Destination,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NewSockets {
    /// Nothing. A sender that forges a datagram from the address of a server that the program asks
    /// must not get hold of the questions.
    Pass,
    /// It answers that client from the listener's address.
    Answer,
}

/// Whether forked processes share one table of clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fork {
    /// Any of them answers any client. They can all write to the table's memory.
    Shared,
    /// Each has a copy of its parent's table, and none can write to another's.
    Separate,
}

/// An environment variable that is missing or can't be used.
#[derive(Debug, PartialEq, Eq, Error)]
pub(crate) enum SettingsError {
    #[error(
        "PPV2_TRUSTED is not set; start the program by `ppv2-proxy wrap --trusted NETWORK -- PROGRAM`, or set PPV2_TRUSTED to the proxy's address or network, as in PPV2_TRUSTED=192.0.2.1"
    )]
    NotTrusted,

    #[error("{variable}={value:?}: {source}")]
    Trust {
        variable: &'static str,
        value: String,
        source: TrustError,
    },

    #[error("PPV2_ONLY={value:?}: {source}")]
    Only { value: String, source: OnlyError },

    #[error(
        "PPV2_PEERS={value:?}: {network:?} is not a network; write it as 192.0.2.0/24, 2001:db8::/32 or 192.0.2.1"
    )]
    Peer { value: String, network: String },

    #[error(
        "PPV2_PEERS={value:?}: {network} has bits set behind its prefix; write {} for the network or {} for the address alone",
        .network.trunc(), .network.addr()
    )]
    PeerHostBits { value: String, network: IpNet },

    #[error("{variable}={value:?} is not known; use {allowed}")]
    Choice {
        variable: &'static str,
        value: String,
        allowed: &'static str,
    },

    #[error("{variable}={value:?} is not a duration; write it as 30s, 500ms, 2m or 1h")]
    Duration {
        variable: &'static str,
        value: String,
    },

    #[error("PPV2_MAX_CLIENTS={value:?} is not a number from 1 to {MOST_CLIENTS}")]
    MaxClients { value: String },

    #[error("{variable}={value:?} is not UTF-8; write it in ASCII")]
    Encoding {
        variable: &'static str,
        value: String,
    },
}

impl Settings {
    /// The settings by the variables that `get` returns. An empty one is as one that is
    /// not set.
    fn read(get: impl Fn(&'static str) -> Option<String>) -> Result<Self, SettingsError> {
        let set = |variable| get(variable).filter(|value| !value.trim().is_empty());
        let trusted = set("PPV2_TRUSTED").ok_or(SettingsError::NotTrusted)?;
        let untrusted = match set("PPV2_UNTRUSTED") {
            None => Untrusted::Drop,
            Some(value) => choice(
                "PPV2_UNTRUSTED",
                value,
                "drop or accept",
                |name| match name {
                    "drop" => Some(Untrusted::Drop),
                    "accept" => Some(Untrusted::Accept),
                    _ => None,
                },
            )?,
        };
        let pktinfo = match set("PPV2_PKTINFO") {
            None => Pktinfo::Local,
            Some(value) => {
                let allowed = "local or destination";
                choice("PPV2_PKTINFO", value, allowed, |name| match name {
                    "local" => Some(Pktinfo::Local),
                    "destination" => Some(Pktinfo::Destination),
                    _ => None,
                })?
            }
        };
        let new_sockets = match set("PPV2_NEW_SOCKETS") {
            None => NewSockets::Pass,
            Some(value) => {
                let allowed = "pass or answer";
                choice("PPV2_NEW_SOCKETS", value, allowed, |name| match name {
                    "pass" => Some(NewSockets::Pass),
                    "answer" => Some(NewSockets::Answer),
                    _ => None,
                })?
            }
        };
        let fork = match set("PPV2_FORK") {
            None => Fork::Shared,
            Some(value) => {
                let allowed = "shared or separate";
                choice("PPV2_FORK", value, allowed, |name| match name {
                    "shared" => Some(Fork::Shared),
                    "separate" => Some(Fork::Separate),
                    _ => None,
                })?
            }
        };
        let max_clients = match set("PPV2_MAX_CLIENTS") {
            None => DEFAULT_MAX_CLIENTS,
            Some(value) => value
                .trim()
                .parse()
                .ok()
                .filter(|count| (1..=MOST_CLIENTS).contains(count))
                .ok_or(SettingsError::MaxClients { value })?,
        };
        let forget_after = duration("PPV2_FORGET_AFTER", set("PPV2_FORGET_AFTER"))?
            .unwrap_or(DEFAULT_FORGET_AFTER);
        let recent = MOST_RECENT.min(forget_after / 8).as_nanos();
        let mut recent = Nanos::try_from(recent).ok();
        let mut trust = Trust::networks(list(&trusted))
            .untrusted(untrusted)
            .max_clients(max_clients)
            .forget_after(forget_after);
        if let Some(value) = set("PPV2_FORMATS") {
            trust = trust.formats(formats(&value)?);
        }
        if let Some(idle) = duration("PPV2_REMEMBER", set("PPV2_REMEMBER"))? {
            trust = trust.remember_senders(idle, max_clients);
            recent = None;
        }
        let trust = trust.build().map_err(|source| {
            let variable = variable_of(&source);
            SettingsError::Trust {
                value: set(variable).unwrap_or_default(),
                variable,
                source,
            }
        })?;
        Ok(Self {
            trust,
            untrusted,
            max_clients,
            pktinfo,
            new_sockets,
            fork,
            stats: set("PPV2_STATS").map(PathBuf::from),
            recent,
            proxies: list(&trusted).filter_map(network).collect(),
            peers: set("PPV2_PEERS").map_or(Ok(Vec::new()), |value| peers(&value))?,
            only: match set("PPV2_ONLY") {
                None => Only::all(),
                Some(value) => value
                    .parse()
                    .map_err(|source| SettingsError::Only { value, source })?,
            },
        })
    }

    /// Whether sockets that are bound to this address are taken over.
    pub(crate) fn takes_over(&self, bound: SocketAddr) -> bool {
        self.only.includes(bound)
    }

    /// Whether this address is talked to directly (PPV2_PEERS). If it is in a network of
    /// proxies, too, the longer prefix counts: the headers of a proxy among the peers must not
    /// reach the program.
    #[inline]
    pub(crate) fn is_peer(&self, ip: IpAddr) -> bool {
        !self.peers.is_empty() && {
            let ip = ip.to_canonical();
            let longest = |networks: &[IpNet]| {
                let around = networks.iter().filter(|network| network.contains(&ip));
                around.map(IpNet::prefix_len).max()
            };
            longest(&self.peers) > longest(&self.proxies)
        }
    }

    /// Settings for tests, by some variables.
    #[cfg(test)]
    pub(crate) fn of(variables: &[(&str, &str)]) -> Result<Self, SettingsError> {
        Self::read(|wanted| {
            let found = variables.iter().find(|(name, _)| *name == wanted)?;
            Some(found.1.to_owned())
        })
    }
}

static SETTINGS: OnceLock<Settings> = OnceLock::new();

/// Reads the environment. Once, before the program begins.
pub(crate) fn start() -> Result<&'static Settings, SettingsError> {
    if SETTINGS.get().is_none() {
        let bad = VARIABLES
            .iter()
            .filter_map(|variable| Some((*variable, env::var_os(variable)?)))
            .find(|(variable, value)| *variable != "PPV2_STATS" && value.to_str().is_none());
        if let Some((variable, value)) = bad {
            let value = value.to_string_lossy().into_owned();
            return Err(SettingsError::Encoding { variable, value });
        }
        let mut settings = Settings::read(|variable| env::var(variable).ok())?;
        settings.stats = env::var_os("PPV2_STATS")
            .filter(|file| file.as_os_str() != OsStr::new(""))
            .map(PathBuf::from);
        return Ok(SETTINGS.get_or_init(|| settings));
    }
    SETTINGS.get().ok_or(SettingsError::NotTrusted)
}

/// Settings for all tests of this process.
#[cfg(test)]
pub(crate) fn set(settings: Settings) -> &'static Settings {
    SETTINGS.get_or_init(|| settings)
}

/// The settings; `None` before [`start`].
#[inline]
pub(crate) fn get() -> Option<&'static Settings> {
    SETTINGS.get()
}

const VARIABLES: [&str; 12] = [
    "PPV2_TRUSTED",
    "PPV2_ONLY",
    "PPV2_UNTRUSTED",
    "PPV2_PEERS",
    "PPV2_FORMATS",
    "PPV2_REMEMBER",
    "PPV2_FORGET_AFTER",
    "PPV2_MAX_CLIENTS",
    "PPV2_PKTINFO",
    "PPV2_NEW_SOCKETS",
    "PPV2_FORK",
    "PPV2_STATS",
];

fn list(value: &str) -> impl Iterator<Item = &str> {
    value.split(',').map(str::trim)
}

fn choice<T>(
    variable: &'static str,
    value: String,
    allowed: &'static str,
    known: impl Fn(&str) -> Option<T>,
) -> Result<T, SettingsError> {
    known(value.trim()).ok_or(SettingsError::Choice {
        variable,
        value,
        allowed,
    })
}

fn formats(value: &str) -> Result<Vec<Format>, SettingsError> {
    let format = |name| {
        choice(
            "PPV2_FORMATS",
            String::from(name),
            "v2, spp, or both as v2,spp",
            |name| match name {
                "v2" => Some(Format::V2),
                "spp" => Some(Format::Spp),
                _ => None,
            },
        )
    };
    list(value).map(format).collect()
}

/// A network, or an address alone.
fn network(text: &str) -> Option<IpNet> {
    match text.parse::<IpAddr>() {
        Ok(ip) => Some(ip.to_canonical().into()),
        Err(_) => text.parse().ok().map(unmapped),
    }
}

fn peers(value: &str) -> Result<Vec<IpNet>, SettingsError> {
    let peer = |text: &str| {
        let network = network(text).ok_or_else(|| SettingsError::Peer {
            value: value.to_owned(),
            network: text.to_owned(),
        })?;
        if network.addr() != network.network() {
            return Err(SettingsError::PeerHostBits {
                value: value.to_owned(),
                network,
            });
        }
        Ok(network)
    };
    list(value).map(peer).collect()
}

/// A network of IPv4-mapped addresses as the IPv4 network.
fn unmapped(network: IpNet) -> IpNet {
    let IpNet::V6(v6) = network else {
        return network;
    };
    let prefix = v6.prefix_len().checked_sub(96);
    let v4 = v6.addr().to_ipv4_mapped().zip(prefix);
    let v4 = v4.and_then(|(address, prefix)| Ipv4Net::new(address, prefix).ok());
    v4.map_or(network, IpNet::V4)
}

fn duration(
    variable: &'static str,
    value: Option<String>,
) -> Result<Option<Duration>, SettingsError> {
    let Some(value) = value else {
        return Ok(None);
    };
    let text = value.trim();
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let milliseconds = match unit.trim_start() {
        "ms" => Some(1),
        "s" => Some(1000),
        "m" | "min" => Some(60 * 1000),
        "h" => Some(60 * 60 * 1000),
        _ => None,
    };
    let parsed = number.parse::<u64>().ok().zip(milliseconds);
    let milliseconds = parsed.and_then(|(number, unit)| number.checked_mul(unit));
    milliseconds
        .map(|milliseconds| Some(Duration::from_millis(milliseconds)))
        .ok_or(SettingsError::Duration { variable, value })
}

/// The variable that a setting of the SDK comes from.
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "all other errors are about networks"
)]
fn variable_of(error: &TrustError) -> &'static str {
    match error {
        TrustError::MaxClients => "PPV2_MAX_CLIENTS",
        TrustError::ForgetAfter => "PPV2_FORGET_AFTER",
        TrustError::Formats => "PPV2_FORMATS",
        TrustError::RememberSenders | TrustError::RememberSpp => "PPV2_REMEMBER",
        _ => "PPV2_TRUSTED",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRUSTED: (&str, &str) = ("PPV2_TRUSTED", "192.0.2.1");

    fn error(variable: &str, value: &str) -> String {
        let variables = [TRUSTED, (variable, value)];
        Settings::of(&variables).unwrap_err().to_string()
    }

    #[test]
    fn trusted_alone_is_enough() {
        let settings = Settings::of(&[TRUSTED]).unwrap();
        assert!(settings.takes_over("[::]:53".parse().unwrap()));
        assert!(!settings.is_peer("192.0.2.1".parse().unwrap()));
        assert_eq!(settings.pktinfo, Pktinfo::Local);
        assert_eq!(settings.new_sockets, NewSockets::Pass);
        assert_eq!(settings.fork, Fork::Shared);
        assert_eq!(settings.untrusted, Untrusted::Drop);
        assert_eq!((settings.max_clients, settings.stats), (65_536, None));
    }

    #[test]
    fn reads_every_variable() {
        let settings = Settings::of(&[
            ("PPV2_TRUSTED", "192.0.2.1, 2001:db8::/32"),
            ("PPV2_ONLY", "53"),
            ("PPV2_UNTRUSTED", "accept"),
            (
                "PPV2_PEERS",
                "198.51.100.0/24,::ffff:203.0.113.0/120,2001:db8:1::1",
            ),
            ("PPV2_FORMATS", "v2"),
            ("PPV2_REMEMBER", "30s"),
            ("PPV2_FORGET_AFTER", "2m"),
            ("PPV2_MAX_CLIENTS", "1000"),
            ("PPV2_PKTINFO", "destination"),
            ("PPV2_NEW_SOCKETS", "answer"),
            ("PPV2_FORK", "separate"),
            ("PPV2_STATS", "/run/stats"),
        ])
        .unwrap();
        assert!(settings.takes_over("127.0.0.1:53".parse().unwrap()));
        assert!(!settings.takes_over("127.0.0.1:54".parse().unwrap()));
        for peer in [
            "198.51.100.9",
            "::ffff:198.51.100.9",
            "203.0.113.7",
            "2001:db8:1::1",
        ] {
            assert!(settings.is_peer(peer.parse().unwrap()), "{peer}");
        }
        assert!(!settings.is_peer("198.51.101.9".parse().unwrap()));
        let both = Settings::of(&[TRUSTED, ("PPV2_PEERS", "192.0.2.0/24")]).unwrap();
        assert!(both.is_peer("192.0.2.2".parse().unwrap()));
        assert!(!both.is_peer("::ffff:192.0.2.1".parse().unwrap()));
        let same = Settings::of(&[TRUSTED, ("PPV2_PEERS", "192.0.2.1")]).unwrap();
        assert!(!same.is_peer("192.0.2.1".parse().unwrap()));
        assert_eq!(settings.pktinfo, Pktinfo::Destination);
        assert_eq!(settings.new_sockets, NewSockets::Answer);
        assert_eq!(settings.fork, Fork::Separate);
        assert_eq!(settings.untrusted, Untrusted::Accept);
        assert_eq!(settings.max_clients, 1000);
        assert_eq!(settings.stats, Some(PathBuf::from("/run/stats")));
    }

    #[test]
    fn empty_variables_count_as_unset() {
        assert_eq!(
            Settings::of(&[("PPV2_TRUSTED", " ")]).unwrap_err(),
            SettingsError::NotTrusted
        );
        for variable in &VARIABLES[1..] {
            assert!(
                Settings::of(&[TRUSTED, (variable, "")]).is_ok(),
                "{variable}"
            );
        }
    }

    #[test]
    fn errors_name_the_variable_the_value_and_the_fix() {
        let missing = Settings::of(&[]).unwrap_err().to_string();
        assert!(missing.contains("ppv2-proxy wrap --trusted"), "{missing}");
        for (variable, value, fix) in [
            ("PPV2_TRUSTED", "192.0.2.1/24", "write 192.0.2.0/24"),
            ("PPV2_TRUSTED", "localhost", "write it as 192.0.2.0/24"),
            ("PPV2_TRUSTED", "192.0.2.1,", "write it as 192.0.2.0/24"),
            ("PPV2_ONLY", "53,http", "write a port"),
            ("PPV2_UNTRUSTED", "allow", "use drop or accept"),
            ("PPV2_PEERS", "10.0.0.1/8", "write 10.0.0.0/8"),
            ("PPV2_PEERS", "10.0.0.300", "write it as 192.0.2.0/24"),
            ("PPV2_FORMATS", "v1", "use v2, spp"),
            ("PPV2_REMEMBER", "30", "write it as 30s"),
            ("PPV2_REMEMBER", "0s", "leave it out"),
            ("PPV2_FORGET_AFTER", "-1s", "write it as 30s"),
            ("PPV2_FORGET_AFTER", "99999999999999999h", "write it as 30s"),
            ("PPV2_FORGET_AFTER", "0s", "use a second or more"),
            ("PPV2_MAX_CLIENTS", "0", "from 1 to"),
            ("PPV2_MAX_CLIENTS", "many", "from 1 to"),
            ("PPV2_PKTINFO", "header", "use local or destination"),
            ("PPV2_NEW_SOCKETS", "adopt", "use pass or answer"),
            ("PPV2_FORK", "private", "use shared or separate"),
        ] {
            let variables = if variable == "PPV2_TRUSTED" {
                vec![(variable, value)]
            } else {
                vec![TRUSTED, (variable, value)]
            };
            let error = Settings::of(&variables).unwrap_err().to_string();
            assert!(error.starts_with(variable), "{error}");
            assert!(error.contains(fix), "{error}");
            let shown = value.split(',').next().unwrap();
            assert!(error.contains(shown), "{error}");
        }
        let both = [
            TRUSTED,
            ("PPV2_FORMATS", "v2,spp"),
            ("PPV2_REMEMBER", "30s"),
        ];
        let error = Settings::of(&both).unwrap_err().to_string();
        assert!(error.starts_with("PPV2_REMEMBER=\"30s\": "), "{error}");
    }

    #[test]
    fn durations_have_units() {
        let read = |text: &str| duration("PPV2_REMEMBER", Some(text.to_owned())).unwrap();
        for (text, milliseconds) in [
            ("500ms", 500),
            ("30s", 30_000),
            (" 2m", 120_000),
            ("1 h", 3_600_000),
        ] {
            assert_eq!(
                read(text),
                Some(Duration::from_millis(milliseconds)),
                "{text}"
            );
        }
        assert!(error("PPV2_REMEMBER", "s").contains("30s"));
    }
}
