//! `accept`: the proxies in front of a listener, whose datagrams begin with a header.

use std::collections::HashSet;
use std::fmt::Display;
use std::hash::Hash;

use clap::ValueEnum;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use ppv2_engine::accept;

use super::error::{Within, key_path, refuse};
use super::options::words;
use super::values::{DAY, Network, Number, S, Time};
use super::{Config, ConfigError, Listener};

/// Proxies in front of the listener, whose datagrams begin with a header that names the client
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
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
#[serde(deny_unknown_fields, default)]
pub(crate) struct Remember {
    /// How long the client of a sender's address and port is remembered since its latest datagram
    pub(crate) idle: Time<S, DAY, { 30 * S }>,
    /// The most senders, by address and port, that the listener remembers; further ones must send
    /// a header with each datagram
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
        let from = self.from.iter().map(|network| network.0);
        let formats = self.formats.iter().map(|format| format.label());
        refuse_twice("from", from)?;
        refuse_twice("formats", formats)
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

impl Config {
    /// Workers that get datagrams of a listener: with `reuse_port` all of them, otherwise at
    /// most one for each address.
    pub(crate) fn workers_of(&self, listener: &Listener) -> usize {
        let workers = self.worker_count();
        if self.reuse_port.0 {
            workers
        } else {
            workers.min(listener.bind.len())
        }
    }
}
