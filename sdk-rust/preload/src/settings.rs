//! What the environment variables say.

use std::env;
use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net};
use ppv2_preload_settings::{Sockets, SocketsError};
use ppv2_sdk::{Format, Trust, TrustError, Untrusted};
use thiserror::Error;

use crate::recent::Nanos;

/// The longest that a thread uses what it has decided itself: so late are the times at
/// which the table says that clients were heard.
const MOST_RECENT: Duration = Duration::from_millis(200);

const DEFAULT_MAX_CLIENTS: usize = 65_536;
const DEFAULT_FORGET_AFTER: Duration = Duration::from_secs(120);

const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

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
    /// For how many nanoseconds a thread may use what it has decided itself, see [`recent`].
    /// `None`: it asks the table each time.
    ///
    /// [`recent`]: crate::recent
    pub(crate) recent: Option<Nanos>,
    peers: Vec<IpNet>,
    /// The trusted networks.
    proxies: Vec<IpNet>,
    /// Empty: all sockets.
    only: Vec<Sockets>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Pktinfo {
    #[default]
    Local,
    Destination,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum NewSockets {
    /// Nothing. A sender that forges a datagram from the address of a server that the program asks
    /// must not get hold of the questions.
    #[default]
    Pass,
    /// It answers that client from the listener's address.
    Answer,
}

/// Whether forked processes share one table of clients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Fork {
    /// Any of them answers any client. They can all write to the table's memory.
    #[default]
    Shared,
    /// Each has a copy of its parent's table, and none can write to another's.
    Separate,
}

/// A variable that is missing or can't be used.
#[derive(Debug, PartialEq, Eq, Error)]
pub(crate) enum SettingsError {
    #[error(
        "PPV2_TRUSTED is not set; start the program by `ppv2-proxy wrap --trusted NETWORK -- PROGRAM`, or set PPV2_TRUSTED to the proxy's address or network, as in PPV2_TRUSTED=192.0.2.1"
    )]
    NotTrusted,

    #[error("{variable}={value:?}: {problem}")]
    Wrong {
        variable: &'static str,
        value: String,
        problem: Problem,
    },
}

/// What is wrong with a variable's value.
#[derive(Debug, PartialEq, Eq, Error)]
pub(crate) enum Problem {
    #[error("{0:?} is not a network; write it as 192.0.2.0/24, 2001:db8::/32 or 192.0.2.1")]
    Network(String),

    #[error(
        "{network} has bits set behind its prefix; write {} for the network or {} for the address alone",
        .network.trunc(), .network.addr()
    )]
    HostBits { network: IpNet },

    #[error(transparent)]
    Sockets(#[from] SocketsError),

    #[error("{word:?} is not known; use {known}")]
    Word { word: String, known: String },

    #[error("it is not a duration from 1s to 24h; write it as 30s, 1500ms, 2m or 1h")]
    Duration,

    #[error("it is not a number from 1 to {MOST_CLIENTS}")]
    MaxClients,

    #[error(
        "PPV2_FORMATS has spp, whose headers are on every datagram; leave out PPV2_REMEMBER, or spp"
    )]
    RememberSpp,

    #[error("it is not UTF-8; write it in ASCII")]
    Encoding,

    #[error(transparent)]
    Trust(#[from] TrustError),
}

impl Settings {
    /// The settings by the variables that `get` returns. An empty one is as one that is
    /// not set.
    fn read(get: impl Fn(&str) -> Option<OsString>) -> Result<Self, SettingsError> {
        let get = &get;
        let untrusted = optional(get, "PPV2_UNTRUSTED", |text| {
            let words = [("drop", Untrusted::Drop), ("accept", Untrusted::Accept)];
            word(text, &words)
        })?;
        let untrusted = untrusted.unwrap_or_default();
        let formats = optional(get, "PPV2_FORMATS", |text| {
            let words = [("v2", Format::V2), ("spp", Format::Spp)];
            list(text, |text| word(text, &words))
        })?;
        let formats = formats.unwrap_or_else(|| vec![Format::V2]);
        let has_spp = formats.contains(&Format::Spp);
        let remember = optional(get, "PPV2_REMEMBER", |text| match has_spp {
            true => Err(Problem::RememberSpp),
            false => duration(text),
        })?;
        let forget_after = optional(get, "PPV2_FORGET_AFTER", duration)?;
        let forget_after = forget_after.unwrap_or(DEFAULT_FORGET_AFTER);
        let max_clients = optional(get, "PPV2_MAX_CLIENTS", max_clients)?;
        let max_clients = max_clients.unwrap_or(DEFAULT_MAX_CLIENTS);
        let trusted = optional(get, "PPV2_TRUSTED", |text| {
            let proxies = list(text, network)?;
            let mut trust = Trust::networks(&proxies)
                .formats(formats.iter().copied())
                .untrusted(untrusted)
                .max_clients(max_clients)
                .forget_after(forget_after);
            if let Some(idle) = remember {
                trust = trust.remember_senders(idle, max_clients);
            }
            Ok((trust.build()?, proxies))
        })?;
        let (trust, proxies) = trusted.ok_or(SettingsError::NotTrusted)?;
        let recent = MOST_RECENT.min(forget_after / 8).as_nanos();
        let pktinfo = optional(get, "PPV2_PKTINFO", |text| {
            let (local, destination) = (Pktinfo::Local, Pktinfo::Destination);
            word(text, &[("local", local), ("destination", destination)])
        })?;
        let new_sockets = optional(get, "PPV2_NEW_SOCKETS", |text| {
            let words = [("pass", NewSockets::Pass), ("answer", NewSockets::Answer)];
            word(text, &words)
        })?;
        let fork = optional(get, "PPV2_FORK", |text| {
            let words = [("shared", Fork::Shared), ("separate", Fork::Separate)];
            word(text, &words)
        })?;
        let peers = optional(get, "PPV2_PEERS", |text| list(text, network))?;
        let only = optional(get, "PPV2_ONLY", |text| {
            list(text, |text| Ok(text.parse::<Sockets>()?))
        })?;
        let stats = get("PPV2_STATS").filter(|file| !file.is_empty());
        Ok(Self {
            trust,
            untrusted,
            max_clients,
            pktinfo: pktinfo.unwrap_or_default(),
            new_sockets: new_sockets.unwrap_or_default(),
            fork: fork.unwrap_or_default(),
            stats: stats.map(PathBuf::from),
            recent: match remember {
                Some(_) => None,
                None => Nanos::try_from(recent).ok(),
            },
            proxies,
            peers: peers.unwrap_or_default(),
            only: only.unwrap_or_default(),
        })
    }

    /// Whether sockets that are bound to this address are taken over.
    pub(crate) fn takes_over(&self, bound: SocketAddr) -> bool {
        self.only.is_empty() || self.only.iter().any(|part| part.includes(bound))
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
            Some(found.1.into())
        })
    }
}

static SETTINGS: OnceLock<Settings> = OnceLock::new();

/// Reads the environment. Once, before the program begins.
pub(crate) fn start() -> Result<&'static Settings, SettingsError> {
    let settings = Settings::read(|variable| env::var_os(variable))?;
    Ok(SETTINGS.get_or_init(|| settings))
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

/// What `read` makes of a variable's value, if it is set.
fn optional<T>(
    get: impl Fn(&str) -> Option<OsString>,
    variable: &'static str,
    read: impl FnOnce(&str) -> Result<T, Problem>,
) -> Result<Option<T>, SettingsError> {
    let Some(value) = get(variable) else {
        return Ok(None);
    };
    let result = match value.to_str().map(str::trim) {
        Some("") => return Ok(None),
        Some(text) => read(text),
        None => Err(Problem::Encoding),
    };
    result.map(Some).map_err(|problem| SettingsError::Wrong {
        variable,
        value: value.to_string_lossy().into_owned(),
        problem,
    })
}

/// Values with commas between them.
fn list<T>(text: &str, read: impl Fn(&str) -> Result<T, Problem>) -> Result<Vec<T>, Problem> {
    text.split(',').map(|part| read(part.trim())).collect()
}

fn word<T: Copy>(text: &str, words: &[(&str, T)]) -> Result<T, Problem> {
    let found = words.iter().find(|(word, _)| *word == text);
    found.map(|(_, meaning)| *meaning).ok_or_else(|| {
        let known: Vec<_> = words.iter().map(|(word, _)| *word).collect();
        Problem::Word {
            word: text.to_owned(),
            known: known.join(" or "),
        }
    })
}

fn max_clients(text: &str) -> Result<usize, Problem> {
    let number = text.parse().ok();
    let number = number.filter(|number| (1..=MOST_CLIENTS).contains(number));
    number.ok_or(Problem::MaxClients)
}

/// A network, or an address alone.
fn network(text: &str) -> Result<IpNet, Problem> {
    let network = match text.parse::<IpAddr>() {
        Ok(ip) => ip.to_canonical().into(),
        Err(_) => text
            .parse()
            .map(unmapped)
            .map_err(|_| Problem::Network(text.to_owned()))?,
    };
    match network.addr() == network.network() {
        true => Ok(network),
        false => Err(Problem::HostBits { network }),
    }
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

fn duration(text: &str) -> Result<Duration, Problem> {
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
    parsed
        .and_then(|(number, unit)| number.checked_mul(unit))
        .map(Duration::from_millis)
        .filter(|duration| (SHORTEST..=LONGEST).contains(duration))
        .ok_or(Problem::Duration)
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt as _;

    use ppv2_preload_settings::VARIABLES;

    use super::*;

    const TRUSTED: (&str, &str) = ("PPV2_TRUSTED", "192.0.2.1");

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
            (
                "PPV2_ONLY",
                "53,http",
                "\"http\" names no socket; write a port",
            ),
            ("PPV2_UNTRUSTED", "allow", "use drop or accept"),
            ("PPV2_PEERS", "10.0.0.1/8", "write 10.0.0.0/8"),
            ("PPV2_PEERS", "10.0.0.300", "write it as 192.0.2.0/24"),
            (
                "PPV2_FORMATS",
                "v2,v1",
                "\"v1\" is not known; use v2 or spp",
            ),
            ("PPV2_REMEMBER", "30", "write it as 30s"),
            ("PPV2_REMEMBER", "0s", "from 1s to 24h"),
            ("PPV2_FORGET_AFTER", "-1s", "write it as 30s"),
            ("PPV2_FORGET_AFTER", "99999999999999999h", "write it as 30s"),
            ("PPV2_FORGET_AFTER", "999ms", "from 1s to 24h"),
            ("PPV2_FORGET_AFTER", "25h", "from 1s to 24h"),
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
        let expected = "PPV2_REMEMBER=\"30s\": PPV2_FORMATS has spp";
        assert!(error.starts_with(expected), "{error}");
    }

    #[test]
    fn text_that_is_no_text_is_named() {
        let value = OsString::from_vec(vec![b'5', 0xff]);
        let error = Settings::read(|wanted| match wanted {
            "PPV2_TRUSTED" => Some("192.0.2.1".into()),
            "PPV2_ONLY" => Some(value.clone()),
            // A path may be anything.
            "PPV2_STATS" => Some(value.clone()),
            _ => None,
        });
        let error = error.unwrap_err().to_string();
        assert!(
            error.starts_with("PPV2_ONLY=\"5\u{fffd}\": it is not UTF-8"),
            "{error}"
        );
    }

    #[test]
    fn durations_have_units() {
        for (text, milliseconds) in [
            ("1500ms", 1_500),
            ("30s", 30_000),
            ("2m", 120_000),
            ("1 h", 3_600_000),
            ("24h", 86_400_000),
        ] {
            let expected = Duration::from_millis(milliseconds);
            assert_eq!(duration(text), Ok(expected), "{text}");
        }
        assert_eq!(duration("s"), Err(Problem::Duration));
    }
}
