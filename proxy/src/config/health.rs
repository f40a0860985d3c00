//! Health checks: how servers are probed, what of their clients' traffic counts, and
//! how much of it takes a server down.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use hickory_resolver::proto::op::{Message, Query};
use hickory_resolver::proto::rr;
use regex::bytes::{Regex, RegexBuilder};
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};

use super::options::words;
use super::values::{Hex, MS, Number, OnByDefault, S, Time, WEEK, read_from_text};
use super::{ConfigError, Server};
use clap::ValueEnum;

/// The most bytes that a regular expression may take when compiled, and each cache
/// of its searches. It bounds how long a server's answer can make a search last:
/// some 25 ms for the bytes that are searched.
const REGEX_SIZE: usize = 1 << 16;

/// The longest payload of a probe: what fits into a packet nearly everywhere.
const MAX_PAYLOAD: usize = 1200;

/// Health checks of an upstream's servers
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Health {
    /// Time between probes of a server
    #[serde(default)]
    pub every: Time<{ 10 * MS }, WEEK, { 2 * S }>,
    /// How long an answer may take; at most `every` [default: 500ms, or `every` if that is
    /// shorter]
    pub(super) timeout: Option<Time<MS, WEEK>>,
    /// So many failures in a row take a server down
    #[serde(default)]
    pub fall: Number<u32, 1, 1000, 3>,
    /// So many successes in a row bring it back
    #[serde(default)]
    pub rise: Number<u32, 1, 1000, 2>,
    /// By how many percent of `every`, at random, a probe comes earlier
    #[serde(default)]
    pub jitter_percent: Number<u32, 0, 90, 10>,
    /// Whether all servers get sessions when all are down
    #[serde(default)]
    pub fail_open: OnByDefault,
    /// What a server is asked [default: an empty datagram, which only a refusal fails]
    #[serde(default = "Probe::usual", deserialize_with = "Probe::read")]
    #[schemars(with = "Option<ProbeOptions>")]
    pub probe: Option<Probe>,
    /// Failures that clients' traffic shows [default: none]
    pub passive: Option<Passive>,
}

/// What a server is asked.
#[derive(Clone, Debug, PartialEq)]
pub enum Probe {
    /// A datagram.
    Udp {
        /// Its payload.
        payload: Vec<u8>,
        /// Its port, if it is not the server's.
        port: Option<u16>,
        /// What must come back.
        expect: Expect,
        /// What is put in front.
        header: Header,
    },
    /// A DNS query.
    Dns {
        /// Its bytes, the first two of which are replaced by an id.
        query: Vec<u8>,
        /// The port, if it is not the server's.
        port: Option<u16>,
        /// What is put in front.
        header: Header,
    },
    /// A connection.
    Tcp {
        /// Its port, if it is not the server's.
        port: Option<u16>,
    },
    /// A request for this path, to be answered by 2xx or 3xx.
    Http {
        /// The port, if it is not the server's.
        port: Option<u16>,
        /// The path.
        path: String,
    },
}

/// What is an answer.
#[derive(Clone, Debug)]
pub enum Expect {
    /// Any datagram.
    Any,
    /// Nothing either; a refusal alone is a failure.
    Silence,
    /// This one.
    Bytes(Vec<u8>),
    /// One in which this is found.
    Matching(Arc<Regex>),
}

impl PartialEq for Expect {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Any, Self::Any) | (Self::Silence, Self::Silence) => true,
            (Self::Bytes(a), Self::Bytes(b)) => a == b,
            (Self::Matching(a), Self::Matching(b)) => a.as_str() == b.as_str(),
            (Self::Any | Self::Silence | Self::Bytes(_) | Self::Matching(_), _) => false,
        }
    }
}

words! {
    /// Which header a probe has in front
    pub Header {
        /// One of the format of clients' datagrams, if these have one: PROXY v2 with the command LOCAL, or Simple Proxy Protocol
        #[default]
        Auto,
        /// PROXY v2 with the command LOCAL
        Local,
        /// None
        None,
    }

    /// What kind of probe a server gets
    pub(super) ProbeKind {
        /// A datagram
        #[default]
        Udp,
        /// A DNS query
        Dns,
        /// A connection
        Tcp,
        /// A request, to be answered by 2xx or 3xx
        Http,
        /// No probe: `passive` alone
        None,
    }
}

/// What of clients' traffic takes a server down
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Passive {
    /// The time that is judged at once. A window fails if at least two datagrams were refused and
    /// none was answered
    pub window: Time<MS, WEEK, { 10 * S }>,
    /// A window also fails if so many percent of its datagrams have no reply [default: however
    /// many]
    pub unanswered_percent: Option<Number<u32, 1, 100>>,
    /// A window with fewer datagrams is not judged
    pub min_datagrams: Number<u64, 1, 1_000_000, 10>,
    /// How long the server is left alone; doubled each time that it fails again
    pub hold: Time<MS, WEEK, { 30 * S }>,
}

/// A probe
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ProbeOptions {
    /// What kind of probe
    kind: ProbeKind,
    /// Kind udp: the payload as text [default: empty]
    send: Option<String>,
    /// Kind udp: the payload as hexadecimal digits
    send_hex: Option<Hex>,
    /// Kind udp: the answer as text [default: any]
    expect: Option<String>,
    /// Kind udp: the answer as hexadecimal digits
    expect_hex: Option<Hex>,
    /// Kind udp: a regular expression, over bytes, that is found in the answer
    expect_regex: Option<Pattern>,
    /// Kind udp: whether an answer must come; false: only a refusal fails [default: true]
    expect_reply: Option<bool>,
    /// Kinds udp and dns: which header is in front
    /// [default: auto]
    header: Option<Header>,
    /// Kind dns: the name to ask for
    name: Option<DnsQuery>,
    /// The port [default: the server's, or the first of several]
    port: Option<Number<u16, 1, 65_535>>,
    /// Kind http: the path [default: /]
    path: Option<HttpPath>,
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match &self.probe {
            Some(Probe::Udp { .. }) => "udp probe",
            Some(Probe::Dns { .. }) => "dns probe",
            Some(Probe::Tcp { .. }) => "tcp probe",
            Some(Probe::Http { .. }) => "http probe",
            None => "no probe",
        };
        let (every, fall, rise) = (self.every, self.fall, self.rise);
        write!(f, "{kind} every {every}, fall {fall}, rise {rise}")?;
        if self.passive.is_some() {
            f.write_str(", passive")?;
        }
        if !self.fail_open.0 {
            f.write_str(", no sessions when all are down")?;
        }
        Ok(())
    }
}

impl Server {
    /// Whether anything is sent to it to find out whether it serves.
    #[must_use]
    pub fn is_probed(&self) -> bool {
        self.health
            .as_ref()
            .is_some_and(|health| health.probe.is_some())
    }
}

impl Health {
    /// How long an answer may take; at most `every`.
    #[must_use]
    pub fn timeout(&self) -> Duration {
        let usual = Duration::from_millis(500).min(*self.every);
        self.timeout.map_or(usual, |timeout| *timeout)
    }
}

impl Probe {
    #[expect(
        clippy::unnecessary_wraps,
        reason = "serde wants the type of the field"
    )]
    fn usual() -> Option<Self> {
        Some(Self::Udp {
            payload: Vec::new(),
            port: None,
            expect: Expect::Silence,
            header: Header::Auto,
        })
    }

    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Self>, D::Error> {
        let options = ProbeOptions::deserialize(deserializer)?;
        options.probe().map_err(ConfigError::into_serde)
    }
}

impl ProbeOptions {
    fn probe(self) -> Result<Option<Probe>, ConfigError> {
        use ProbeKind::{Dns, Http, Tcp, Udp};
        let of_kinds: [(_, _, &[ProbeKind]); 10] = [
            ("send", self.send.is_some(), &[Udp]),
            ("send_hex", self.send_hex.is_some(), &[Udp]),
            ("expect", self.expect.is_some(), &[Udp]),
            ("expect_hex", self.expect_hex.is_some(), &[Udp]),
            ("expect_regex", self.expect_regex.is_some(), &[Udp]),
            ("expect_reply", self.expect_reply.is_some(), &[Udp]),
            ("header", self.header.is_some(), &[Udp, Dns]),
            ("name", self.name.is_some(), &[Dns]),
            ("port", self.port.is_some(), &[Udp, Dns, Tcp, Http]),
            ("path", self.path.is_some(), &[Http]),
        ];
        for (key, is_given, kinds) in of_kinds {
            if is_given && !kinds.contains(&self.kind) {
                let message = format!("`{key}` is not for a probe of this kind");
                return Err(
                    ConfigError::new(message).hint("leave it out, or give the kind that it is for")
                );
            }
        }
        let header = self.header.unwrap_or_default();
        let port = self.port.map(|port| *port);
        Ok(Some(match self.kind {
            Udp => Probe::Udp {
                payload: payload(self.send, self.send_hex)?,
                port,
                expect: expect(
                    self.expect,
                    self.expect_hex,
                    self.expect_regex,
                    self.expect_reply,
                )?,
                header,
            },
            Dns => Probe::Dns {
                port,
                query: self.name.map(|name| name.0).ok_or_else(|| {
                    ConfigError::new("a probe of kind dns without `name`")
                        .hint("add the name to ask for, one that the servers can always answer")
                })?,
                header,
            },
            Tcp => Probe::Tcp { port },
            Http => Probe::Http {
                port,
                path: self.path.map_or_else(|| "/".to_owned(), |path| path.0),
            },
            ProbeKind::None => return Ok(None),
        }))
    }
}

fn payload(text: Option<String>, hex: Option<Hex>) -> Result<Vec<u8>, ConfigError> {
    let (key, payload) = match (text, hex) {
        (Some(_), Some(_)) => {
            return Err(ConfigError::new("`send_hex` beside `send`").hint("give one of them"));
        }
        (Some(text), None) => ("send", text.into_bytes()),
        (None, hex) => ("send_hex", hex.map(|hex| hex.0).unwrap_or_default()),
    };
    if payload.len() > MAX_PAYLOAD {
        return Err(
            ConfigError::new(format!("`{key}` has {} bytes", payload.len()))
                .hint(format!("send at most {MAX_PAYLOAD}")),
        );
    }
    Ok(payload)
}

fn expect(
    text: Option<String>,
    hex: Option<Hex>,
    regex: Option<Pattern>,
    reply: Option<bool>,
) -> Result<Expect, ConfigError> {
    let silence = reply == Some(false);
    let mut given = [
        text.map(|text| Expect::Bytes(text.into_bytes())),
        hex.map(|hex| Expect::Bytes(hex.0)),
        regex.map(|regex| Expect::Matching(regex.0)),
        silence.then_some(Expect::Silence),
    ]
    .into_iter()
    .flatten();
    let expect = given.next();
    if given.next().is_some() {
        return Err(ConfigError::new("a probe that expects two things").hint(
            "give one of `expect`, `expect_hex`, `expect_regex` and `expect_reply = false`",
        ));
    }
    Ok(expect.unwrap_or(Expect::Any))
}

/// A regular expression over bytes.
struct Pattern(Arc<Regex>);

impl FromStr for Pattern {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let regex = RegexBuilder::new(text)
            .unicode(false)
            .size_limit(REGEX_SIZE)
            .dfa_size_limit(REGEX_SIZE)
            .build();
        regex.map(|regex| Self(Arc::new(regex))).map_err(|error| {
            if let regex::Error::CompiledTooBig(limit) = error {
                return ConfigError::new(format!("it takes more than {limit} bytes when compiled"))
                    .hint("repeat less, as in '[a-z]+' instead of '[a-z]{1,1000}'");
            }
            let reason = error.to_string();
            let reason = reason.lines().last().unwrap_or_default().trim();
            ConfigError::new(format!("it can't be used: {reason}"))
                .hint("write a regular expression over bytes, as in '^pong [0-9]+$'")
        })
    }
}

/// A request for a path.
struct HttpPath(String);

impl FromStr for HttpPath {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        if text.starts_with('/') && text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Ok(Self(text.to_owned()));
        }
        Err(ConfigError::new(format!("`{text}` is not a path"))
            .hint("write it as /health, percent-encoded and without spaces"))
    }
}

/// The bytes of a DNS query for a name's address.
struct DnsQuery(Vec<u8>);

impl FromStr for DnsQuery {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        dns_query(text).map(Self).ok_or_else(|| {
            ConfigError::new(format!("`{text}` is not a domain name"))
                .hint("write it as example.com: labels of 1 to 63 letters, digits, - and _")
        })
    }
}

read_from_text!(Pattern, HttpPath, DnsQuery);

/// A query for the address of `name`, with recursion asked for.
fn dns_query(name: &str) -> Option<Vec<u8>> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || ['-', '_', '.'].contains(&c);
    let name = rr::Name::from_ascii(name)
        .ok()
        .filter(|_| name.chars().all(is_plain))?;
    let mut query = Message::query();
    query.metadata.recursion_desired = true;
    query.add_query(Query::query(name, rr::RecordType::A));
    query.to_vec().ok()
}
