//! What the admin API answers, as far as `top` shows it. What is unknown is ignored and what
//! is missing is empty: the proxy may be of another release.

use std::collections::BTreeMap;
use std::ops::Deref;

use serde::{Deserialize, Deserializer};

use crate::config::printable;

/// The most characters of a text. It bounds what one cell of the terminal holds, if what
/// answers is no proxy.
const MAX_TEXT: usize = 300;

/// A text of the answer, with control characters escaped.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Text(String);

impl From<&str> for Text {
    fn from(text: &str) -> Self {
        Self(printable(text).chars().take(MAX_TEXT).collect())
    }
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self::from(String::deserialize(deserializer)?.as_str()))
    }
}

impl Deref for Text {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

/// `/status`.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Status {
    pub(super) version: Text,
    pub(super) unix_seconds: f64,
    /// When the process was started: another value is another process.
    pub(super) started_unix_seconds: f64,
    pub(super) uptime_seconds: f64,
    #[serde(default)]
    pub(super) ready: bool,
    #[serde(default)]
    pub(super) workers: u64,
    #[serde(default)]
    pub(super) workers_not_responding: Vec<u64>,
    #[serde(default)]
    pub(super) sessions: u64,
    pub(super) sessions_max: Option<u64>,
    #[serde(default)]
    pub(super) session_sockets: u64,
    pub(super) session_sockets_max: Option<u64>,
    #[serde(default)]
    pub(super) reloads: Reloads,
    pub(super) listeners: Vec<Listener>,
    #[serde(default)]
    pub(super) listeners_left_out: u64,
    pub(super) upstreams: Vec<Upstream>,
    #[serde(default)]
    pub(super) servers_left_out: u64,
    #[serde(default)]
    pub(super) drop_reasons: BTreeMap<Text, Meaning>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Reloads {
    pub(super) applied: u64,
    pub(super) rejected: u64,
    pub(super) latest_is_rejected: bool,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Listener {
    pub(super) listener: Text,
    pub(super) bind: Vec<Text>,
    /// None once a reload has taken the listener out.
    pub(super) upstream: Option<Text>,
    pub(super) mode: Option<Text>,
    pub(super) client_datagrams: u64,
    pub(super) client_bytes: u64,
    pub(super) reply_datagrams: u64,
    pub(super) reply_bytes: u64,
    pub(super) receive_overflows: u64,
    pub(super) sessions: u64,
    pub(super) sessions_opened: u64,
    /// By reason.
    pub(super) drops: BTreeMap<Text, u64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Upstream {
    pub(super) upstream: Text,
    pub(super) servers: Vec<Server>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Server {
    /// What it is called in metrics, once in its upstream.
    pub(super) label: Text,
    pub(super) address: Text,
    pub(super) found_by: Option<Text>,
    pub(super) state: Text,
    pub(super) checked: bool,
    pub(super) weight: u64,
    pub(super) backup: bool,
    pub(super) why: Text,
    pub(super) since_unix_seconds: f64,
    pub(super) sessions: u64,
    pub(super) datagrams: u64,
    pub(super) bytes: u64,
    pub(super) reply_datagrams: u64,
    pub(super) reply_bytes: u64,
    pub(super) receive_overflows: u64,
    pub(super) icmp_errors: u64,
    pub(super) sessions_opened: u64,
}

/// What a reason for drops means.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Meaning {
    pub(super) description: Text,
    pub(super) fix: Text,
}

/// `/clients`.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct Clients {
    #[serde(default)]
    pub(super) window_seconds: f64,
    pub(super) clients: Vec<Client>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Client {
    pub(super) address: Text,
    pub(super) listener: Option<Text>,
    pub(super) datagrams: u64,
    pub(super) bytes: u64,
    pub(super) new_sessions: u64,
    pub(super) drops: u64,
}
