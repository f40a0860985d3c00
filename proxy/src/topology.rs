//! The part of a configuration that concerns hosts, as [`ppv2_hosts`] takes it for
//! `doctor`, `host-setup` and the check at a start.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use ipnet::IpNet;

use ppv2_engine::mode::{Mode, RewriteOn};
use ppv2_hosts::Topology;
use ppv2_hosts::doctor::{self, Finding, Options, ProbeError, QUESTION, Unfit};
use ppv2_hosts::host_setup::Role;
use ppv2_hosts::reply_path::Rewriter;
use ppv2_hosts::topology::{self, Server};
use ppv2_udp::{LISTENER_BUFFER, SHARED_BUFFER};

use ppv2::REPLY_TAG_TLV_LEN;

use crate::capacity::HostCapacity;
use crate::config::{Answers, Config, Expanded, Expect, Header, Health, Listener, Probe};
use crate::health::{Reads, header_of_own};
use crate::memory;

/// What `config` says about hosts.
#[must_use]
pub fn of(config: &Config) -> Topology {
    let servers = config.served().map(|(listener, found, mode)| Server {
        upstream: found.upstream.clone(),
        last_port: found
            .ports
            .map_or(found.address.0.port(), |ports| ports.last),
        source: found.probe_source(),
        answers_proxy: found.answers_proxy(mode),
        header_len: mode.header_len(listener.has_clients(true), found.tlvs.as_deref()),
        tag_len: found.replies.tag_keys().map_or(0, |_| REPLY_TAG_TLV_LEN),
        ..server(listener, found.address.0, mode, found.health.as_deref())
    });
    Topology {
        servers: servers.collect(),
        sources: config.sources(),
        source_networks: source_networks(config),
        max_sessions: HostCapacity::of(config).max_sessions,
        ..listeners(config)
    }
}

fn source_networks(config: &Config) -> Vec<topology::SourceNetwork> {
    let mut networks: BTreeMap<IpNet, topology::SourceNetwork> = BTreeMap::new();
    for (listener, found) in config.source_networks() {
        let network = networks.entry(found.network);
        network.or_insert_with(|| topology::SourceNetwork {
            network: found.network,
            probe: found.probe_address(),
            upstream: listener.upstream.clone(),
            servers: BTreeSet::new(),
        });
    }
    for (_, server, _) in config.served() {
        let network = server.sources.network();
        if let Some(found) = network.and_then(|net| networks.get_mut(&net.network)) {
            found.servers.insert(server.address.0);
        }
    }
    networks.into_values().collect()
}

/// Of a range, the first address: hosts see no difference between the ports of a listener.
fn first_addresses(listener: &Listener) -> impl Iterator<Item = SocketAddr> {
    listener.bind.iter().map(|bind| bind.first())
}

fn listeners(config: &Config) -> Topology {
    let listeners = config.listeners.iter();
    Topology {
        listeners: listeners.clone().flat_map(first_addresses).collect(),
        allow: listeners.flat_map(|l| &l.allow).map(|net| net.0).collect(),
        senders: config.senders().collect(),
        receive_buffer: LISTENER_BUFFER,
        shared_buffer: SHARED_BUFFER,
        ..Topology::default()
    }
}

fn server(listener: &Listener, address: SocketAddr, mode: Mode, health: Option<&Health>) -> Server {
    let (question, answers_question) = question(address, mode, health);
    Server {
        address,
        last_port: address.port(),
        upstream: String::new(),
        listener: first_addresses(listener).collect(),
        reads_headers: listener.accept.is_some(),
        rewriter: match mode {
            Mode::Ppv2 { .. } | Mode::Spp | Mode::Plain => None,
            Mode::Transparent { .. } => Some(Rewriter::Proxy),
            Mode::Dsr(RewriteOn::Proxy) => Some(Rewriter::ProxyHost),
            Mode::Dsr(RewriteOn::Server) => Some(Rewriter::ServerHost),
            Mode::Dsr(RewriteOn::Sdk { .. }) => Some(Rewriter::Sdk),
        },
        spoofs_ports: mode.spoofs_ports(),
        header_len: mode.header_len(listener.has_clients(true), None),
        dont_fragment: listener.dont_fragment,
        source: None,
        answers_proxy: None,
        tag_len: 0,
        question,
        answers_question,
    }
}

/// The datagram of the health check if it sends one, and whether it is answered.
fn question(address: SocketAddr, mode: Mode, health: Option<&Health>) -> (Vec<u8>, bool) {
    let probe = health.and_then(|health| health.probe.as_ref());
    let (payload, header, is_answered) = match probe {
        Some(Probe::Udp {
            payload,
            port: None,
            expect,
            header,
        }) => (&payload[..], *header, *expect != Expect::Silence),
        Some(Probe::Dns {
            query,
            port: None,
            header,
        }) => (&query[..], *header, true),
        // It may say nothing of the server's own port.
        Some(_) | None => (QUESTION, Header::Auto, false),
    };
    // A server that answers clients by itself has no answer for the proxy.
    let reads = if mode.takes_replies() {
        Reads::of(mode)
    } else {
        Reads::Payload
    };
    // Which address of this host it comes from is not known yet.
    let header = header_of_own(header, reads, address, address);
    ([&header, payload].concat(), is_answered)
}

/// Checks this host for what is certain to leave clients without replies. Servers that
/// names lead to don't matter here: see [`expand`].
///
/// # Errors
///
/// [`Unfit`] with each fatal finding.
pub fn check_host(config: &Config) -> Result<(), Unfit> {
    doctor::check_proxy_host(&of(&config.as_written()))
}

/// The configuration with the servers that its names lead to, without those that this
/// host is not set up for: DNS answers must not be able to keep the proxy from starting.
#[must_use]
pub fn expand(config: &Config, answers: &Answers) -> Expanded {
    config.expand_but(answers, |name, address| {
        let named = config.named().filter(|(_, n, _)| std::ptr::eq(*n, name));
        let servers = named.map(|(listener, _, mode)| server(listener, address, mode, None));
        let topology = Topology {
            servers: servers.collect(),
            ..listeners(config)
        };
        let unfit = doctor::check_proxy_host(&topology).err()?;
        Some(format!(
            "this host lacks what its mode needs; fix: {}",
            unfit.fix()
        ))
    })
}

/// The report of `doctor`, and whether anything in it is fatal.
///
/// # Errors
///
/// [`ProbeError`].
pub fn doctor(config: &Config, options: &Options) -> Result<(String, bool), ProbeError> {
    let more = match options.role {
        Role::Proxy => [capacity(config), unknown_sources(config)].concat(),
        Role::Server => Vec::new(),
    };
    doctor::report(&of(config), options, more)
}

/// Mode dsr by the SDK behind other proxies: the servers send from addresses that only headers
/// tell.
fn unknown_sources(config: &Config) -> Vec<Finding> {
    let is_unknown = |listener: &&Listener| {
        let by_sdk = |mode| matches!(mode, Mode::Dsr(RewriteOn::Sdk { .. }));
        listener.accept.is_some() && listener.modes().any(by_sdk)
    };
    let listeners = config.listeners.iter().filter(is_unknown);
    let finding = |listener: &Listener| {
        Finding::advice(
            format!(
                "replies of listener {} (mode dsr, rewrite_on sdk)",
                listener.name
            ),
            "servers send them from the address that the client wrote to at a proxy in front, which only its header tells",
            "let the servers' hosts send from the addresses of the proxies in front, and route such packets; or use mode ppv2",
        )
    };
    listeners.map(finding).collect()
}

fn capacity(config: &Config) -> Vec<Finding> {
    let capacity = HostCapacity::of(config);
    let what = "sessions (open files, local ports and memory)";
    let sessions = match capacity.shortfall() {
        Some(shortfall) => Finding::advice(
            what,
            shortfall,
            "LimitNOFILE= or MemoryMax= in the systemd unit, `ulimit -n`, sysctl -w net.ipv4.ip_local_port_range=…, or a (larger) source network",
        ),
        None => Finding::ok(what, format!("at most {}", capacity.max_sessions)),
    };
    // A service has a control group of its own, so its limit may be another.
    let memory = memory::limit().map(|limit| {
        let (megabytes, source) = (limit.bytes >> 20, limit.source.display());
        let each = match config.uses_session_sockets() {
            true => "4 kB, most of it the kernel's",
            false => "500 bytes",
        };
        let found = format!("{megabytes} MiB, by {source}; a session takes about {each}");
        Finding::ok("memory", found)
    });
    [sessions].into_iter().chain(memory).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rewriter_and_header_follow_from_the_mode() {
        let servers = |mode: &str| {
            let content = format!(
                "[[listener]]\nbind = [\"198.51.100.10:9000\", \"[2001:db8:a::10]:9000\"]\n\
                 mode = {mode}\nupstream = \"u\"\n[upstream.u]\n\
                 servers = [\"192.0.2.2:9001\", \"[2001:db8:b::2]:9001\"]\n"
            );
            of(&Config::from_toml("x", &content).unwrap()).servers
        };
        for (mode, rewriter, spoofs_ports, header_len) in [
            ("\"ppv2\"", None, false, ppv2::IPV6_HEADER_LEN),
            ("\"plain\"", None, false, 0),
            ("\"transparent\"", Some(Rewriter::Proxy), false, 0),
            ("\"dsr\"", Some(Rewriter::ProxyHost), true, 0),
            (
                "\"dsr\"\nrewrite_on = \"sdk\"",
                Some(Rewriter::Sdk),
                false,
                ppv2::IPV6_HEADER_LEN,
            ),
        ] {
            let servers = servers(mode);
            assert_eq!(servers.len(), 2, "{mode}");
            for server in servers {
                let is = (server.rewriter, server.spoofs_ports, server.header_len);
                assert_eq!(is, (rewriter, spoofs_ports, header_len), "{mode}");
            }
        }
    }
}
