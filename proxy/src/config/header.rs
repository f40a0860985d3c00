//! `header`: how the header in front of a client's datagram is written to servers, and what
//! it says besides the client.

use std::borrow::Cow;
use std::net::{Ipv4Addr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use clap::ValueEnum;
use ppv2::TlvType;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use ppv2_engine::mode::Mode;
use ppv2_engine::own_tlvs::{OwnTlvError, OwnTlvs};

use super::accept::{Accept, Format};
use super::error::{Within, is_hidden, key_path, nearest, refuse};
use super::options::{Emit, Upstream, words};
use super::values::{DAY, Hex, MS, Time, read_from_text};
use super::{Config, ConfigError, Listener, Probe, Server};

/// Where DNS servers listen.
const DNS_PORT: u16 = 53;

/// The longest name in the DNS.
const MAX_AUTHORITY: usize = 255;

/// The header in front of clients' datagrams
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(
    deny_unknown_fields,
    default,
    expecting = "a table such as { emit = \"every\" }"
)]
pub(crate) struct HeaderOptions {
    /// How it is written
    pub(crate) format: Format,
    /// Which datagrams of a session have it
    pub(crate) emit: Emit,
    /// Emit first: how long after a header a datagram has it again, though the server answers
    /// [default: only when the server may have forgotten it]
    pub(crate) repeat: Option<Time<{ 100 * MS }, DAY>>,
    /// Whether it has a checksum, 7 bytes more
    pub(crate) crc32c: bool,
    /// The host name that clients ask for, as a TLV of type AUTHORITY [default: none]
    pub(crate) authority: Option<String>,
    /// What it says besides, at most 512 bytes together [default: nothing]
    pub(crate) tlvs: Vec<TlvOptions>,
}

/// A TLV of each header
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct TlvOptions {
    /// A name such as alpn, authority, unique_id, ssl or netns, or 0x and two hexadecimal digits
    #[serde(rename = "type")]
    kind: TlvKind,
    /// Its value as text
    value: Option<String>,
    /// Its value as hexadecimal digits
    hex: Option<Hex>,
    /// Type unique_id: where its value comes from
    from: Option<TlvSource>,
}

words! {
    /// Where the value of a TLV comes from
    pub(crate) TlvSource {
        /// 16 bytes that no other session has
        #[default]
        Session,
    }
}

/// The type of a TLV.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TlvKind(TlvType);
read_from_text!(TlvKind);

impl FromStr for TlvKind {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        text.parse().map(Self).map_err(|error| {
            let names: Vec<_> = (0..=u8::MAX)
                .filter_map(|byte| name(TlvType(byte)))
                .collect();
            let hint = match nearest(&text.to_lowercase(), names.iter().map(String::as_str)) {
                Some(near) => format!("did you mean `{near}`?"),
                None => error.to_string(),
            };
            ConfigError::new(format!("`{text}` is not a type of TLV")).hint(hint)
        })
    }
}

/// The type's name as it is written, if it has one.
fn name(kind: TlvType) -> Option<String> {
    let name = kind.to_string();
    (!name.starts_with("TLV ")).then(|| name.to_lowercase())
}

/// The type as it is written.
fn written(kind: TlvType) -> String {
    name(kind).unwrap_or_else(|| format!("0x{:02X}", kind.0))
}

impl HeaderOptions {
    /// Refuses what a header of its format can't be or say.
    pub(super) fn check_format(&self) -> Result<(), ConfigError> {
        if self.format == Format::V2 {
            return Ok(());
        }
        let of_v2 = [
            ("emit", self.emit != Emit::Every),
            ("crc32c", self.crc32c),
            ("authority", self.authority.is_some()),
            ("tlvs", !self.tlvs.is_empty()),
        ];
        let Some((key, _)) = of_v2.iter().find(|(_, is_set)| *is_set) else {
            return Ok(());
        };
        refuse(
            format!(
                "`{key}` with format = \"spp\": Simple Proxy Protocol has 38 bytes in front of each datagram, and nothing but addresses"
            ),
            format!("leave `{key}` out, or set format = \"v2\""),
        )
        .within(key_path![*key])
    }

    /// How long after a header the first datagram has it again.
    pub(super) fn repeat(&self) -> Result<Option<Duration>, ConfigError> {
        if self.repeat.is_some() && self.emit == Emit::Every {
            return refuse(
                "`repeat` with emit = \"every\", where each datagram has the header",
                "leave `repeat` out, or set emit = \"first\"",
            )
            .within(key_path!["repeat"]);
        }
        Ok(self.repeat.map(|repeat| *repeat))
    }

    /// The TLVs that they have each header carry, if any.
    pub(super) fn own_tlvs(&self) -> Result<Option<Arc<OwnTlvs>>, ConfigError> {
        let mut own = OwnTlvs::new();
        if let Some(authority) = &self.authority {
            check_authority(authority)
                .and_then(|()| push(&mut own, TlvType::AUTHORITY, authority.as_bytes()))
                .within(key_path!["authority"])?;
        }
        for (number, tlv) in self.tlvs.iter().enumerate() {
            self.add(&mut own, tlv).within(key_path!["tlvs", number])?;
        }
        Ok((!own.is_empty()).then(|| Arc::new(own)))
    }

    fn add(&self, own: &mut OwnTlvs, tlv: &TlvOptions) -> Result<(), ConfigError> {
        let kind = tlv.kind.0;
        let shown = written(kind);
        if kind == TlvType::AUTHORITY && self.authority.is_some() {
            return refuse(
                "the type `authority` beside the key `authority`",
                "give one of them: servers read the first alone",
            );
        }
        let value: Cow<'_, [u8]> = match (&tlv.value, &tlv.hex, tlv.from) {
            (Some(value), None, None) => value.as_bytes().into(),
            (None, Some(hex), None) => (&hex.0).into(),
            (None, None, Some(TlvSource::Session)) => {
                let others = self.tlvs.iter().filter(|other| other.kind == tlv.kind);
                return match () {
                    () if kind != TlvType::UNIQUE_ID => refuse(
                        format!("`from` for the type `{shown}`"),
                        "give `value` or `hex`: only a unique_id comes from the session",
                    ),
                    () if others.count() > 1 => refuse(
                        "two TLVs of type `unique_id`",
                        "give one of them: servers read the first alone",
                    ),
                    () => {
                        own.add_unique_id();
                        Ok(())
                    }
                };
            }
            (value, hex, from) => {
                let given = [
                    ("value", value.is_some()),
                    ("hex", hex.is_some()),
                    ("from", from.is_some()),
                ];
                let given = given.iter().filter(|(_, is_given)| *is_given);
                let given: Vec<_> = given.map(|(key, _)| format!("`{key}`")).collect();
                return match given.as_slice() {
                    [] => refuse(
                        format!("a TLV of type `{shown}` without a value"),
                        "give `value`, text, or `hex`, hexadecimal digits; for a unique_id also from = \"session\"",
                    ),
                    given => refuse(
                        format!("a TLV of type `{shown}` with {}", given.join(" and ")),
                        "give one of them",
                    ),
                };
            }
        };
        check_value(kind, &value)?;
        push(own, kind, &value)
    }
}

fn push(own: &mut OwnTlvs, kind: TlvType, value: &[u8]) -> Result<(), ConfigError> {
    own.push(kind, value).or_else(|error| match error {
        OwnTlvError::Reserved => {
            let (shown, hint) = (
                written(kind),
                match kind {
                    TlvType::CRC32C => "set crc32c = true for a checksum",
                    TlvType::NOOP => "leave it out: padding says nothing",
                    _ => "take another type, as from 0xE0 to 0xEF: tags of replies have this one",
                },
            );
            refuse(
                format!("the proxy writes no TLV of type `{shown}` from the configuration"),
                hint,
            )
        }
        OwnTlvError::UniqueIdTooLong { len } => refuse(
            format!("a unique_id of {len} bytes"),
            format!("give at most {}", ppv2::MAX_UNIQUE_ID_LEN),
        ),
        OwnTlvError::TooLong { len } => refuse(
            format!("TLVs of {len} bytes up to here, 3 for each besides its value"),
            format!(
                "give at most {} bytes: each datagram carries them",
                OwnTlvs::MAX_LEN
            ),
        ),
    })
}

/// Refuses a host name that no log shows as it is.
fn check_authority(host: &str) -> Result<(), ConfigError> {
    let what = match host.len() {
        0 => "is empty".to_owned(),
        len if len > MAX_AUTHORITY => format!("has {len} bytes"),
        _ if host.contains(is_hidden) => "has a character that can't be shown".to_owned(),
        _ => return Ok(()),
    };
    refuse(
        format!("`authority` {what}"),
        format!("give a host name of at most {MAX_AUTHORITY} bytes, or leave the key out"),
    )
}

/// Refuses what a receiver could not read as a TLV of this type.
fn check_value(kind: TlvType, value: &[u8]) -> Result<(), ConfigError> {
    if value.len() > OwnTlvs::MAX_LEN {
        // Which is said with its own words.
        return Ok(());
    }
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
    let mut buffer = [0; ppv2::IPV4_HEADER_LEN + 3 + OwnTlvs::MAX_LEN];
    let header =
        ppv2::Encoder::udp(&mut buffer, any, any).and_then(|header| header.tlv(kind, value));
    let Ok(header) = header.map(ppv2::Encoder::finish) else {
        return Ok(());
    };
    let decoder = ppv2::Decoder::new().max_header_len(header.len());
    let error = match decoder.decode(header) {
        Err(error) => Some(error.to_string()),
        Ok((header, _)) => {
            let tlvs = header.tlvs();
            let errors = [
                tlvs.authority().and_then(Result::err),
                tlvs.netns().and_then(Result::err),
                tlvs.ssl().and_then(Result::err),
            ];
            errors
                .into_iter()
                .flatten()
                .next()
                .map(|error| error.to_string())
        }
    };
    match error {
        None => Ok(()),
        Some(error) => refuse(
            format!("no server could read this `{}`: {error}", written(kind)),
            "give the bytes that the PROXY protocol has for this type, or take a type from 0xE0 to 0xEF",
        ),
    }
}

impl Server {
    /// Bytes of the longest header in front of clients' datagrams to it, with the TLVs that are
    /// the same for all.
    #[must_use]
    pub fn header_len(&self, mode: Mode, listener: &Listener) -> usize {
        if !mode.has_header() {
            return 0;
        }
        let tag = self
            .replies
            .tag_keys()
            .map_or(0, |_| ppv2::REPLY_TAG_TLV_LEN);
        mode.header_len(listener.has_clients(true), self.tlvs.as_deref()) + tag
    }
}

impl Listener {
    /// Whether a server of its reads a header in front of datagrams.
    fn writes_headers(&self) -> bool {
        self.modes().any(Mode::has_header)
    }
}

impl Config {
    /// The servers of a listener, and what those of its names have in common.
    pub(crate) fn written_to<'c>(
        &'c self,
        listener: &'c Listener,
    ) -> impl Iterator<Item = (&'c Server, Mode)> {
        let servers = listener.servers.iter();
        let servers = servers.map(|(index, mode)| (&self.servers[*index], *mode));
        let named = listener.names.iter();
        let named = named.map(|(index, mode)| (&self.names[*index].server, *mode));
        servers.chain(named)
    }

    /// Why servers that get headers are taken to answer DNS, if they are.
    fn sign_of_dns(&self, listener: &Listener, upstream: &Upstream) -> Option<&'static str> {
        let health = upstream.health.as_ref();
        let probe = health.and_then(|health| health.probe.as_ref());
        let has_dns_port = self
            .written_to(listener)
            .any(|(server, mode)| mode.may_omit_header() && server.address.0.port() == DNS_PORT);
        match probe {
            Some(Probe::Dns { .. }) => Some("the probe asks for a name"),
            _ if has_dns_port => Some("port 53"),
            _ => None,
        }
    }

    /// Refuses what headers to a listener's servers can't say, and warns of what receivers may
    /// not read.
    pub(super) fn check_headers(
        &mut self,
        listener: &Listener,
        upstream: &Upstream,
    ) -> Result<(), ConfigError> {
        let (name, options) = (&listener.upstream, &upstream.header);
        if *options != HeaderOptions::default() && !listener.writes_headers() {
            self.warnings.push(format!(
                "upstream `{name}`: `header` changes nothing for listener `{}`, in whose mode servers get no header",
                listener.name
            ));
        }
        if listener.modes().any(Mode::may_omit_header)
            && let Some(sign) = self.sign_of_dns(listener, upstream)
        {
            self.warnings.push(format!(
                "upstream `{name}`: emit = \"first\", and its servers seem to answer DNS ({sign}): Unbound, NSD, PowerDNS, BIND, Knot and dnsdist need the header on each datagram, and drop those without; set emit = \"every\" unless they remember it, as our SDKs do with `remember_senders`"
            ));
        }
        let passes_tlvs = listener.accept.as_ref().is_some_and(Accept::passes_tlvs);
        if passes_tlvs && listener.modes().any(|mode| mode == Mode::Spp) {
            self.warnings.push(format!(
                "listener `{}`: accept.tlvs = \"pass\" changes nothing for upstream `{name}`: Simple Proxy Protocol has no TLVs",
                listener.name
            ));
        }
        let from_session = options.tlvs.iter().position(|tlv| tlv.from.is_some());
        if let Some(number) = from_session.filter(|_| !listener.sessions.0) {
            return refuse(
                format!(
                    "a unique_id from the session, of which listener `{}` has none (sessions = false)",
                    listener.name
                ),
                "leave the TLV out, or leave `sessions` out",
            )
            .within(key_path!["upstream", name.as_str(), "header", "tlvs", number]);
        }
        let longest = self
            .written_to(listener)
            .map(|(server, mode)| server.header_len(mode, listener))
            .max();
        if let Some(len) = longest.filter(|len| *len > ppv2::DEFAULT_MAX_HEADER_LEN) {
            self.warnings.push(format!(
                "upstream `{name}`: headers of up to {len} bytes; dnsdist and our SDKs refuse those of more than {} unless told otherwise",
                ppv2::DEFAULT_MAX_HEADER_LEN
            ));
        }
        Ok(())
    }
}
