//! Health checks as they are configured: how servers are probed, what is seen of
//! their traffic, and how much of it takes one down.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use hickory_resolver::proto::op::{Message, Query};
use hickory_resolver::proto::rr;
use regex::bytes::{Regex, RegexBuilder};

use super::check::Checker;
use super::file::{self, At};
use super::{ConfigError, Server};

/// The most bytes that a regular expression may take when compiled, and each cache
/// of its searches. It bounds how long a server's answer can make a search last:
/// some 25 ms for the bytes that are searched.
const REGEX_SIZE: usize = 1 << 16;

/// The shortest time between probes of one server.
const MIN_EVERY: Duration = Duration::from_millis(10);

/// The longest payload of a probe: what fits into a packet nearly everywhere.
const MAX_PAYLOAD: usize = 1200;

/// How to find out whether the servers of an upstream serve.
#[derive(Clone, Debug, PartialEq)]
pub struct Health {
    /// Time between probes.
    pub every: Duration,
    /// How long an answer may take; no more than `every`.
    pub timeout: Duration,
    /// So many failures in a row take a server down.
    pub fall: u32,
    /// So many successes in a row bring it back.
    pub rise: u32,
    /// By how much, in percent and drawn by lot, a probe comes earlier.
    pub jitter: u32,
    /// Whether all servers get sessions when all are down.
    pub fail_open: bool,
    /// What is asked; `None` for nothing.
    pub probe: Option<Probe>,
    /// What clients' traffic may show.
    pub passive: Option<Passive>,
}

/// What a server is asked.
#[derive(Clone, Debug, PartialEq)]
pub enum Probe {
    /// A datagram.
    Udp {
        /// Its payload.
        payload: Vec<u8>,
        /// What must come back.
        expect: Expect,
        /// What is put in front.
        header: Header,
    },
    /// A DNS query.
    Dns {
        /// Its bytes, the first two of which are replaced by an id.
        query: Vec<u8>,
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

/// Whether a probe has a PROXY header of the command LOCAL in front.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Header {
    /// If clients' datagrams have a header.
    Auto,
    /// Yes.
    Local,
    /// No.
    None,
}

/// What clients' traffic must show to take a server down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Passive {
    /// The time that is judged at once.
    pub window: Duration,
    /// Datagrams in percent without a reply from which on a window is bad, if at
    /// all; beside that one is bad whose datagrams were refused and in which no
    /// reply came.
    pub unanswered: Option<u32>,
    /// A window with fewer datagrams says nothing.
    pub at_least: u64,
    /// How long the server is left alone; doubled each time that it fails again.
    pub hold: Duration,
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
        let every = humantime::format_duration(self.every);
        write!(
            f,
            "{kind} every {every}, fall {}, rise {}",
            self.fall, self.rise
        )?;
        if self.passive.is_some() {
            f.write_str(", passive")?;
        }
        if !self.fail_open {
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

impl Checker<'_> {
    pub(super) fn health(
        &self,
        wanted: Option<At<file::Health>>,
    ) -> Result<Option<Health>, ConfigError> {
        let Some(wanted) = wanted else {
            return Ok(None);
        };
        let span = wanted.span();
        let wanted = wanted.into_inner();
        let every = self.time(
            "health.every",
            wanted.every.as_ref(),
            Duration::from_secs(2),
        )?;
        if every < MIN_EVERY {
            let span = wanted.every.map_or(span, |every| every.span());
            return Err(self
                .error(span, "health.every is less than \"10ms\"")
                .mend("give at least \"10ms\": what probes more often than that is load"));
        }
        let usual = Duration::from_millis(500).min(every);
        let timeout = self.time("health.timeout", wanted.timeout.as_ref(), usual)?;
        if timeout > every {
            let span = wanted.timeout.map_or(span, |timeout| timeout.span());
            return Err(self
                .error(span, "health.timeout is longer than health.every")
                .mend("give at most the time between probes, since the next waits for the last"));
        }
        let number = |key: &str, value, usual: u32| {
            let number = self.count(key, value, 1000)?;
            Ok(number.map_or(usual, |number| u32::try_from(number).unwrap_or(u32::MAX)))
        };
        let jitter = match &wanted.jitter {
            None => 10,
            Some(jitter) if *jitter.get_ref() <= 90 => *jitter.get_ref(),
            Some(jitter) => {
                return Err(self
                    .error(
                        jitter.span(),
                        format!("health.jitter is {}", jitter.get_ref()),
                    )
                    .mend("give percent of `every`, from 0 to 90"));
            }
        };
        let probe = match wanted.probe {
            None => Some(Probe::Udp {
                payload: Vec::new(),
                expect: Expect::Silence,
                header: Header::Auto,
            }),
            Some(probe) => self.probe(&probe)?,
        };
        let passive = wanted.passive.map(|passive| self.passive(&passive));
        let passive = passive.transpose()?;
        if probe.is_none() && passive.is_none() {
            return Err(self
                .error(span, "health without anything to go by")
                .mend("add `passive`, give a probe of another kind, or leave `health` out"));
        }
        Ok(Some(Health {
            every,
            timeout,
            fall: number("health.fall", wanted.fall, 3)?,
            rise: number("health.rise", wanted.rise, 2)?,
            jitter: u32::try_from(jitter).unwrap_or(90),
            fail_open: wanted.fail_open.unwrap_or(true),
            probe,
            passive,
        }))
    }

    fn time(
        &self,
        key: &str,
        value: Option<&At<String>>,
        usual: Duration,
    ) -> Result<Duration, ConfigError> {
        value.map_or(Ok(usual), |value| self.duration(key, value))
    }

    fn passive(&self, wanted: &At<file::Passive>) -> Result<Passive, ConfigError> {
        let wanted = wanted.get_ref();
        let ten = Duration::from_secs(10);
        let unanswered = self.count("passive.unanswered", wanted.unanswered.clone(), 100)?;
        let at_least = self.count("passive.at_least", wanted.at_least.clone(), 1_000_000)?;
        Ok(Passive {
            window: self.time("passive.window", wanted.window.as_ref(), ten)?,
            unanswered: unanswered.map(|share| u32::try_from(share).unwrap_or(100)),
            at_least: at_least.map_or(10, |number| number as u64),
            hold: self.time("passive.hold", wanted.hold.as_ref(), 3 * ten)?,
        })
    }

    fn probe(&self, wanted: &At<file::Probe>) -> Result<Option<Probe>, ConfigError> {
        let (span, wanted) = (wanted.span(), wanted.get_ref());
        let kind = wanted.kind.get_ref().as_str();
        let keys = |udp: bool, header: bool, name: bool, port: bool, path: bool| {
            [
                ("send", wanted.send.as_ref().map(At::span), udp),
                ("send_hex", wanted.send_hex.as_ref().map(At::span), udp),
                ("expect", wanted.expect.as_ref().map(At::span), udp),
                ("expect_hex", wanted.expect_hex.as_ref().map(At::span), udp),
                (
                    "expect_regex",
                    wanted.expect_regex.as_ref().map(At::span),
                    udp,
                ),
                ("answer", wanted.answer.as_ref().map(At::span), udp),
                ("header", wanted.header.as_ref().map(At::span), header),
                ("name", wanted.name.as_ref().map(At::span), name),
                ("port", wanted.port.as_ref().map(At::span), port),
                ("path", wanted.path.as_ref().map(At::span), path),
            ]
        };
        let keys = match kind {
            "udp" => keys(true, true, false, false, false),
            "dns" => keys(false, true, true, false, false),
            "tcp" => keys(false, false, false, true, false),
            "http" => keys(false, false, false, true, true),
            "none" => keys(false, false, false, false, false),
            _ => {
                let known = ["udp", "dns", "tcp", "http", "none"];
                return Err(self.unknown_value("probe.kind", &wanted.kind, &known));
            }
        };
        for (key, span, fits) in keys {
            if let (Some(span), false) = (span, fits) {
                return Err(self
                    .error(span, format!("`{key}` is not for a probe of kind {kind}"))
                    .mend("leave it out, or give the kind that it is for"));
            }
        }
        let header = match &wanted.header {
            None => Header::Auto,
            Some(header) => match header.get_ref().as_str() {
                "auto" => Header::Auto,
                "local" => Header::Local,
                "none" => Header::None,
                _ => {
                    let known = ["auto", "local", "none"];
                    return Err(self.unknown_value("probe.header", header, &known));
                }
            },
        };
        let port = self.count("probe.port", wanted.port.clone(), 65_535)?;
        let port = port.and_then(|port| u16::try_from(port).ok());
        Ok(match kind {
            "udp" => Some(Probe::Udp {
                payload: self.payload(wanted)?,
                expect: self.expect(wanted)?,
                header,
            }),
            "dns" => {
                let Some(name) = &wanted.name else {
                    return Err(self
                        .error(span, "a probe of kind dns without `name`")
                        .mend("add the name to ask for, one that the servers can always answer"));
                };
                let query = dns_query(name.get_ref()).ok_or_else(|| {
                    let what = format!("probe.name `{}` is no domain name", name.get_ref());
                    self.error(name.span(), what)
                        .mend("write it as example.com: labels of 1 to 63 letters, digits, - and _")
                })?;
                Some(Probe::Dns { query, header })
            }
            "tcp" => Some(Probe::Tcp { port }),
            "http" => Some(Probe::Http {
                port,
                path: self.path(wanted.path.as_ref())?,
            }),
            _ => None,
        })
    }

    fn payload(&self, wanted: &file::Probe) -> Result<Vec<u8>, ConfigError> {
        let (payload, span) = match (&wanted.send, &wanted.send_hex) {
            (None, None) => return Ok(Vec::new()),
            (Some(text), None) => (text.get_ref().clone().into_bytes(), text.span()),
            (None, Some(hex)) => (self.hex("probe.send_hex", hex)?, hex.span()),
            (Some(_), Some(hex)) => {
                return Err(self
                    .error(hex.span(), "both `send` and `send_hex`")
                    .mend("give one of them"));
            }
        };
        if payload.len() > MAX_PAYLOAD {
            return Err(self
                .error(span, format!("a probe of {} bytes", payload.len()))
                .mend(format!("send at most {MAX_PAYLOAD}")));
        }
        Ok(payload)
    }

    fn expect(&self, wanted: &file::Probe) -> Result<Expect, ConfigError> {
        let mut given = Vec::new();
        if let Some(text) = &wanted.expect {
            given.push((
                text.span(),
                Expect::Bytes(text.get_ref().clone().into_bytes()),
            ));
        }
        if let Some(hex) = &wanted.expect_hex {
            given.push((
                hex.span(),
                Expect::Bytes(self.hex("probe.expect_hex", hex)?),
            ));
        }
        if let Some(pattern) = &wanted.expect_regex {
            let regex = RegexBuilder::new(pattern.get_ref())
                .unicode(false)
                .size_limit(REGEX_SIZE)
                .dfa_size_limit(REGEX_SIZE)
                .build();
            let regex = regex.map_err(|error| self.unusable(pattern, &error))?;
            given.push((pattern.span(), Expect::Matching(Arc::new(regex))));
        }
        if let Some(answer) = &wanted.answer
            && !answer.get_ref()
        {
            given.push((answer.span(), Expect::Silence));
        }
        if let Some((span, _)) = given.get(1) {
            return Err(self
                .error(span.clone(), "a probe that expects two things")
                .mend("give one of `expect`, `expect_hex`, `expect_regex` and `answer = false`"));
        }
        Ok(given.pop().map_or(Expect::Any, |(_, expect)| expect))
    }

    fn unusable(&self, pattern: &At<String>, error: &regex::Error) -> ConfigError {
        if let regex::Error::CompiledTooBig(limit) = error {
            let what = format!("probe.expect_regex takes more than {limit} bytes when compiled");
            return self
                .error(pattern.span(), what)
                .mend("repeat less, as in '[a-z]+' instead of '[a-z]{1,1000}'");
        }
        let reason = error.to_string();
        let reason = reason.lines().last().unwrap_or_default().trim();
        let what = format!("probe.expect_regex can't be used: {reason}");
        self.error(pattern.span(), what)
            .mend("write a regular expression over bytes, as in '^pong [0-9]+$'")
    }

    fn hex(&self, key: &str, value: &At<String>) -> Result<Vec<u8>, ConfigError> {
        let digits = value.get_ref().chars().filter(|c| !c.is_whitespace());
        let digits: Option<Vec<u8>> = digits
            .map(|c| c.to_digit(16).and_then(|digit| u8::try_from(digit).ok()))
            .collect();
        match digits {
            Some(digits) if digits.len() % 2 == 0 => Ok(digits
                .chunks(2)
                .map(|pair| pair[0] << 4 | pair[1])
                .collect()),
            _ => Err(self
                .error(value.span(), format!("{key} is not hexadecimal"))
                .mend("write two digits for each byte, as in \"00ff 0d0a\"")),
        }
    }

    fn path(&self, path: Option<&At<String>>) -> Result<String, ConfigError> {
        let Some(path) = path else {
            return Ok("/".to_owned());
        };
        let text = path.get_ref();
        if text.starts_with('/') && text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Ok(text.clone());
        }
        Err(self
            .error(path.span(), format!("probe.path `{text}` is no path"))
            .mend("write it as /health, percent-encoded and without spaces"))
    }
}

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
