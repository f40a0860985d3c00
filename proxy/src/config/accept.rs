//! `accept`: the proxies in front of a listener, whose datagrams begin with a header.

use std::collections::HashSet;
use std::fmt::{self, Display, Formatter};
use std::hash::Hash;

use clap::ValueEnum;
use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use ppv2_engine::accept;
use ppv2_engine::mode::{Mode, RewriteOn};

use super::error::{Within, key_path, refuse};
use super::options::{ReplyKind, Upstream, words};
use super::validate::family;
use super::values::{DAY, Network, Number, S, Time};
use super::{Config, ConfigError, Listener};

/// Proxies in front of the listener, whose datagrams begin with a header that names the client
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(
    deny_unknown_fields,
    default,
    expecting = "a table such as { from = [\"192.0.2.1\"] }"
)]
pub struct Accept {
    /// Their networks: a datagram from there must begin with a header, and can name any client
    pub from: Vec<Network>,
    /// How their headers are written
    #[serde(default = "v2_alone")]
    pub(crate) formats: Vec<Format>,
    /// What happens to datagrams from other addresses
    pub(crate) direct: Direct,
    /// What happens to datagrams with a LOCAL header, such as health checks of the sender
    pub(crate) local: LocalHeaders,
    /// What happens to the TLVs of their headers, besides CRC32C, NOOP and the tag of replies
    pub(crate) tlvs: Tlvs,
    /// Senders may leave the header out once they have sent one, which the specification forbids
    /// [default: no]
    pub(crate) remember: Option<Remember>,
}

/// Senders may leave the header out once they have sent one, which the specification forbids
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(
    deny_unknown_fields,
    default,
    expecting = "a table such as { idle = \"30s\" }"
)]
pub(crate) struct Remember {
    /// How long the client of a sender's address and port is remembered since its latest datagram
    pub(crate) idle: Time<S, DAY, { 30 * S }>,
    /// The most senders, by address and port, that the listener remembers, divided evenly among
    /// the workers; further ones must send a header with each datagram
    pub(crate) max: Number<usize, 1, 10_000_000, 100_000>,
    /// What a header without payload is
    pub(crate) header_alone: HeaderAlone,
}

words! {
    /// How a header is written
    #[derive(Hash)]
    pub(crate) Format {
        /// PROXY protocol v2
        #[default]
        V2,
        /// Simple Proxy Protocol, 38 bytes
        Spp,
    }

    /// What happens to datagrams from other addresses
    pub(crate) Direct {
        /// They are dropped
        #[default]
        Drop,
        /// Their senders are clients, and every byte is payload
        Accept,
    }

    /// What happens to datagrams with a LOCAL header
    pub(crate) LocalHeaders {
        /// They go to a server; their sender is the client
        #[default]
        Forward,
        /// They are dropped and counted
        Drop,
    }

    /// What happens to the TLVs of headers
    pub(crate) Tlvs {
        /// They end here
        #[default]
        Drop,
        /// They are in the headers to servers, too
        Pass,
    }

    /// What a header without payload is
    pub(crate) HeaderAlone {
        /// It names the client of later datagrams; servers get nothing
        #[default]
        Announce,
        /// An empty datagram, which goes to a server
        Forward,
    }
}

impl Format {
    /// As it is written.
    fn label(self) -> &'static str {
        match self {
            Self::V2 => "v2",
            Self::Spp => "spp",
        }
    }
}

fn v2_alone() -> Vec<Format> {
    vec![Format::V2]
}

impl Accept {
    /// As it is without other settings.
    pub(super) fn from_networks(from: Vec<Network>) -> Self {
        Self {
            from,
            formats: v2_alone(),
            ..Self::default()
        }
    }

    pub(super) fn check(&self) -> Result<(), ConfigError> {
        if self.from.is_empty() {
            return refuse(
                "`accept` without networks in `from`",
                "list the addresses of the proxies that write headers, as in from = [\"192.0.2.1\"], or leave `accept` out",
            )
            .within(key_path!["from"]);
        }
        if self.formats.is_empty() {
            return refuse(
                "an empty `formats` reads no header",
                "list \"v2\", \"spp\" or both, or leave the key out for \"v2\"",
            )
            .within(key_path!["formats"]);
        }
        if self.remember.is_some() && self.formats.contains(&Format::Spp) {
            return refuse(
                "`remember` with \"spp\" in `formats`: without a header in front, a payload that begins with the two bytes of Simple Proxy Protocol would be read as one",
                "leave `remember` out, since senders of Simple Proxy Protocol write it on each datagram, or \"spp\"; a listener for each does both",
            )
            .within(key_path!["remember"]);
        }
        let from = self.from.iter().map(|network| network.0);
        let formats = self.formats.iter().map(|format| format.label());
        refuse_twice("from", from)?;
        refuse_twice("formats", formats)
    }

    /// Whether TLVs of headers go on to servers.
    pub(crate) fn passes_tlvs(&self) -> bool {
        self.tlvs == Tlvs::Pass
    }

    /// As a worker needs it, one of `workers` that share the listener's senders.
    pub(crate) fn of_worker(&self, workers: usize) -> accept::Accept {
        accept::Accept {
            from: self.from.iter().map(|network| network.0).collect(),
            formats: accept::Formats {
                v2: self.formats.contains(&Format::V2),
                spp: self.formats.contains(&Format::Spp),
            },
            direct: match self.direct {
                Direct::Drop => accept::Direct::Drop,
                Direct::Accept => accept::Direct::Accept,
            },
            local: match self.local {
                LocalHeaders::Forward => accept::LocalHeaders::Forward,
                LocalHeaders::Drop => accept::LocalHeaders::Drop,
            },
            passes_tlvs: self.tlvs == Tlvs::Pass,
            remember: self.remember.map(|remember| accept::Remember {
                idle: *remember.idle,
                max: remember.max.div_ceil(workers.max(1)),
                forwards_empty: remember.header_alone == HeaderAlone::Forward,
            }),
        }
    }
}

/// On one line, for `check` and the log.
impl Display for Accept {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let formats: Vec<_> = self.formats.iter().map(|format| format.label()).collect();
        let from: Vec<_> = self.from.iter().map(ToString::to_string).collect();
        let (formats, from) = (formats.join(" or "), from.join(" "));
        write!(f, "headers ({formats}) from {from}")?;
        match self.remember {
            None => f.write_str(" on each datagram")?,
            Some(Remember { idle, max, .. }) => {
                write!(f, ", remembered for {idle}, of at most {max} senders")?;
            }
        }
        let forwards = |remember: Remember| remember.header_alone == HeaderAlone::Forward;
        if self.remember.is_some_and(forwards) {
            f.write_str("; headers alone are forwarded")?;
        }
        if self.tlvs == Tlvs::Pass {
            f.write_str("; TLVs pass")?;
        }
        if self.local == LocalHeaders::Drop {
            f.write_str("; LOCAL is dropped")?;
        }
        f.write_str(match self.direct {
            Direct::Drop => "; other sources are dropped",
            Direct::Accept => "; other sources are clients",
        })
    }
}

fn refuse_twice<T: Display + Eq + Hash>(
    key: &str,
    values: impl Iterator<Item = T>,
) -> Result<(), ConfigError> {
    let mut known = HashSet::new();
    for (index, value) in values.enumerate() {
        let text = value.to_string();
        if !known.insert(value) {
            return refuse(format!("{text} is twice in `{key}`"), "name each once")
                .within(key_path![key, index]);
        }
    }
    Ok(())
}

impl Listener {
    /// Whether anybody may write to it as a client. Otherwise all its datagrams come from the
    /// networks that headers are accepted from.
    pub(super) fn takes_direct_clients(&self) -> bool {
        let accept = self.accept.as_ref();
        accept.is_none_or(|accept| accept.direct == Direct::Accept)
    }

    /// Whether it can have clients of IPv6, or of IPv4: a header names clients of either.
    pub(crate) fn has_clients(&self, v6: bool) -> bool {
        self.accept.is_some() || self.bind.iter().any(|address| address.is_ipv4() != v6)
    }
}

impl Config {
    /// Refuses `accept` beside what can't serve the clients of other proxies, and warns of
    /// senders that are trusted by mistake.
    pub(super) fn check_accept(
        &mut self,
        listener: &Listener,
        upstream: &Upstream,
        index: usize,
    ) -> Result<(), ConfigError> {
        let Some(accept) = &listener.accept else {
            return Ok(());
        };
        let name = &listener.upstream;
        if !listener.sessions.0 {
            return refuse(
                "`accept` with sessions = false: only a session knows which proxy a reply goes back through",
                "leave `sessions` or `accept` out",
            )
            .within(key_path!["listener", index, "accept"]);
        }
        if upstream.replies != ReplyKind::Session {
            return refuse(
                format!(
                    "`accept` with replies = {} in [upstream.{name}]: a tag names the client, not the proxy that a reply goes back through",
                    upstream.replies.quoted()
                ),
                format!("set replies = \"session\" in [upstream.{name}], with a network as `source` for many clients, or leave `accept` out"),
            )
            .within(key_path!["listener", index, "accept"]);
        }
        let warnings = self.warnings_of(listener, accept);
        self.warnings.extend(warnings);
        Ok(())
    }

    fn warnings_of(&self, listener: &Listener, accept: &Accept) -> Vec<String> {
        let name = &listener.name;
        let mut warnings = Vec::new();
        for network in accept.from.iter().filter(|net| net.0.prefix_len() == 0) {
            warnings.push(format!(
                "listener `{name}`: {network} in `accept.from`: anybody can send a header that names any client. List the addresses of the proxies in front alone"
            ));
        }
        let narrow = || accept.from.iter().filter(|net| net.0.prefix_len() > 0);
        for (number, _) in &listener.servers {
            let ip = self.servers[*number].address.0.ip();
            // Whatever runs on this host can send from any address of loopback.
            if let (false, Some(network)) =
                (ip.is_loopback(), narrow().find(|net| net.0.contains(&ip)))
            {
                warnings.push(format!(
                    "listener `{name}`: {network} in `accept.from` contains the server {ip}, which can then name any client. List the addresses of the proxies in front alone"
                ));
            }
        }
        for address in &listener.bind {
            let same_family = |net: &Network| net.0.addr().is_ipv4() == address.is_ipv4();
            if accept.direct == Direct::Drop && !accept.from.iter().any(same_family) {
                let family = family(address.first());
                warnings.push(format!(
                    "listener `{name}`: every datagram to {address} is dropped: `accept.from` has no {family} network, and `accept.direct` is drop"
                ));
            }
        }
        let is_in = |nets: &[Network], one: &Network| nets.iter().any(|net| net.0.contains(&one.0));
        let peers = self.peers.as_deref().unwrap_or_default();
        for front in narrow().filter(|_| accept.local == LocalHeaders::Forward) {
            let why = if is_in(peers, front) {
                "is in `peers`"
            } else if is_in(&listener.deny, front) {
                "is in `deny`"
            } else if !is_in(&listener.allow, front) {
                "is not in `allow`"
            } else {
                continue;
            };
            warnings.push(format!(
                "listener `{name}`: LOCAL datagrams of {front} in `accept.from`, such as its health checks, are dropped, since {front} {why}. Change that, or set `accept.local` to drop if servers are not to answer them"
            ));
        }
        let no_tlvs = match accept.formats.contains(&Format::V2) {
            false => Some("Simple Proxy Protocol has none"),
            true if !listener.modes().any(Mode::has_header) => Some("no server gets a header"),
            true => None,
        };
        if let (Tlvs::Pass, Some(why)) = (accept.tlvs, no_tlvs) {
            warnings.push(format!(
                "listener `{name}`: `accept.tlvs` = \"pass\" changes nothing: {why}"
            ));
        }
        let is_everybody = |net: &Network| net.0.prefix_len() == 0;
        let is_restricted = !listener.deny.is_empty() || !listener.allow.iter().all(is_everybody);
        if accept.remember.is_some() && is_restricted {
            warnings.push(format!(
                "listener `{name}`: `allow` and `deny` don't hold against clients of a proxy in front that leaves the header out: a client whose payload begins with a header can name any address. Leave `accept.remember` out, or have that proxy write the header on each datagram and check clients itself"
            ));
        }
        if listener
            .modes()
            .any(|mode| mode.spoofs_ports() && mode.takes_replies())
        {
            warnings.push(format!(
                "listener `{name}`: `accept` with source_port = \"client\": a client whose datagrams come from another port of a proxy in front, as after a restart of that proxy, is dropped as `client_port_in_use` until its former session has ended. Leave `source_port` out unless servers need the client's port, and keep `idle_timeout` short"
            ));
        }
        let rewrites = |mode| matches!(mode, Mode::Dsr(RewriteOn::Proxy | RewriteOn::Server));
        if listener.modes().any(rewrites) {
            warnings.push(format!(
                "listener `{name}`: `accept` with mode dsr: replies reach clients from the listener's address, and those that wrote to another address of a proxy in front ignore them. Use rewrite_on = \"sdk\", or mode ppv2 or transparent"
            ));
        }
        warnings
    }

    /// The most senders that listeners remember together.
    pub(crate) fn remembered_senders(&self) -> u64 {
        let accepts = self.listeners.iter().filter_map(|one| one.accept.as_ref());
        let remembers = accepts.filter_map(|accept| accept.remember);
        remembers.map(|remember| *remember.max as u64).sum()
    }

    /// Networks whose headers a listener believes.
    pub(crate) fn senders(&self) -> impl Iterator<Item = IpNet> {
        let accepts = self.listeners.iter().filter_map(|one| one.accept.as_ref());
        accepts.flat_map(|accept| accept.from.iter().map(|network| network.0))
    }

    /// Workers that get datagrams of a listener: with `reuse_port` all of them, otherwise at
    /// most one for each address.
    pub(crate) fn workers_of(&self, listener: &Listener) -> usize {
        let workers = self.worker_count();
        if self.reuse_port.0 {
            workers
        } else {
            workers.min(listener.address_count())
        }
    }
}
