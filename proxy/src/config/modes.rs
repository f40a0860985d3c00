//! What a configured mode asks of its listener and of its servers: the keys that
//! belong to it, and the combinations that can't work.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::Range;

use super::check::{CheckedUpstream, Checker};
use super::file::{self, At};
use super::{ConfigError, Expect, Listener, Probe, Server};
use ppv2_engine::mode::{Emit, Mode, RewriteOn, SourcePort};

/// Whether rules on a host, the proxy's or the server's, rewrite the replies.
pub(super) fn is_rewritten(mode: Mode) -> bool {
    matches!(mode, Mode::Dsr(RewriteOn::Proxy | RewriteOn::Server))
}

impl Server {
    /// Why the server sends datagrams to the proxy's own address, if it does when it
    /// is served in this mode.
    pub(crate) fn answers_proxy(&self, mode: Mode) -> Option<&'static str> {
        let probe = self
            .health
            .as_ref()
            .and_then(|health| health.probe.as_ref());
        match mode {
            Mode::Ppv2 { .. } => Some("mode ppv2"),
            Mode::Plain => Some("mode plain"),
            Mode::Transparent { .. } | Mode::Dsr(_) => match probe? {
                Probe::Udp { expect, .. } if *expect != Expect::Silence => Some("a udp probe"),
                Probe::Dns { .. } => Some("a dns probe"),
                Probe::Udp { .. } | Probe::Tcp { .. } | Probe::Http { .. } => None,
            },
        }
    }
}

/// The keys that choose a mode, as a listener or a server has them.
pub(super) struct Wanted<'a> {
    mode: Option<&'a At<String>>,
    rewrite_on: Option<&'a At<String>>,
    source_port: Option<&'a At<String>>,
}

impl<'a> Wanted<'a> {
    pub(super) fn by_listener(listener: &'a file::Listener) -> Self {
        Self {
            mode: listener.mode.as_ref(),
            rewrite_on: listener.rewrite_on.as_ref(),
            source_port: listener.source_port.as_ref(),
        }
    }

    fn by_server(server: &'a file::Server) -> Self {
        Self {
            mode: server.mode.as_ref(),
            rewrite_on: server.rewrite_on.as_ref(),
            source_port: server.source_port.as_ref(),
        }
    }
}

/// A listener's other settings, which not every mode goes with.
pub(super) struct Whole<'a> {
    pub(super) name: &'a str,
    pub(super) bind: (&'a [SocketAddr], Range<usize>),
    /// Its names, with the mode that the servers of each are served in.
    pub(super) names: &'a [(usize, Mode)],
    pub(super) responses: u64,
    pub(super) requests: u64,
    pub(super) amplification: bool,
    /// Where the listener stands.
    pub(super) span: Range<usize>,
}

impl Checker<'_> {
    /// A server's own mode, if it has one.
    pub(super) fn mode_of_server(
        &self,
        server: &file::Server,
        upstream: &CheckedUpstream,
    ) -> Result<Option<Mode>, ConfigError> {
        let wanted = Wanted::by_server(server);
        if wanted.mode.is_some() {
            return self.mode(&wanted, upstream).map(Some);
        }
        let stray = [
            ("rewrite_on", wanted.rewrite_on, "dsr"),
            ("source_port", wanted.source_port, "transparent"),
        ];
        for (key, value, mode) in stray {
            if let Some(value) = value {
                return Err(self
                    .error(value.span(), format!("a server with `{key}` but no `mode`"))
                    .mend(format!("add mode = \"{mode}\" to the server")));
            }
        }
        Ok(None)
    }

    /// The mode that the keys ask for, `ppv2` if they don't say.
    pub(super) fn mode(
        &self,
        wanted: &Wanted<'_>,
        upstream: &CheckedUpstream,
    ) -> Result<Mode, ConfigError> {
        let name = wanted.mode.map_or("ppv2", |mode| mode.get_ref());
        let mode = match name {
            "ppv2" => Mode::Ppv2 {
                emit: upstream.emit,
                crc32c: upstream.crc32c,
            },
            "transparent" => Mode::Transparent {
                port: self.source_port(wanted.source_port)?,
            },
            "dsr" => Mode::Dsr(self.rewrite_on(wanted.rewrite_on, upstream)?),
            "plain" => Mode::Plain,
            _ => {
                let known = ["ppv2", "transparent", "dsr", "plain"];
                let mode = wanted.mode.expect("the default is known");
                return Err(self.unknown_value("mode", mode, &known));
            }
        };
        self.refuse_stray("rewrite_on", wanted.rewrite_on, "dsr", name)?;
        self.refuse_stray("source_port", wanted.source_port, "transparent", name)?;
        if matches!(mode, Mode::Dsr(RewriteOn::Sdk { .. })) && upstream.emit == Emit::First {
            let mode = wanted.mode.expect("not the default");
            return Err(self
                .error(
                    mode.span(),
                    "mode dsr with rewrite_on = \"sdk\" and emit = \"first\"",
                )
                .mend(
                    "leave `emit` out: the server learns from each datagram where to answer from",
                ));
        }
        Ok(mode)
    }

    /// Refuses a key of another mode than the one that is wanted.
    fn refuse_stray(
        &self,
        key: &str,
        value: Option<&At<String>>,
        belongs_to: &str,
        mode: &str,
    ) -> Result<(), ConfigError> {
        match value {
            Some(value) if mode != belongs_to => Err(self
                .error(
                    value.span(),
                    format!("`{key}` means nothing in mode `{mode}`"),
                )
                .mend(format!("leave it out, or set mode = \"{belongs_to}\""))),
            _ => Ok(()),
        }
    }

    fn source_port(&self, value: Option<&At<String>>) -> Result<SourcePort, ConfigError> {
        let Some(value) = value else {
            return Ok(SourcePort::default());
        };
        match value.get_ref().as_str() {
            "any" => Ok(SourcePort::Any),
            "client" => Ok(SourcePort::Client),
            _ => Err(self.unknown_value("source_port", value, &["any", "client"])),
        }
    }

    fn rewrite_on(
        &self,
        value: Option<&At<String>>,
        upstream: &CheckedUpstream,
    ) -> Result<RewriteOn, ConfigError> {
        let Some(value) = value else {
            return Ok(RewriteOn::default());
        };
        match value.get_ref().as_str() {
            "proxy" => Ok(RewriteOn::Proxy),
            "server" => Ok(RewriteOn::Server),
            "sdk" => Ok(RewriteOn::Sdk {
                crc32c: upstream.crc32c,
            }),
            _ => Err(self.unknown_value("rewrite_on", value, &["proxy", "server", "sdk"])),
        }
    }

    /// Refuses what the modes of a listener's servers can't do.
    pub(super) fn check_modes(
        &mut self,
        listener: &Whole<'_>,
        servers: &[(usize, Mode)],
        upstream: &CheckedUpstream,
    ) -> Result<(), ConfigError> {
        self.check_families(listener, servers, upstream)?;
        self.check_rewriting(listener, servers, upstream)?;
        self.refuse_two_ways(listener, servers)?;
        let all = servers.iter().chain(listener.names);
        let modes: Vec<_> = all.map(|(_, mode)| *mode).collect();
        let dsr = modes.iter().filter(|mode| !mode.takes_replies()).count();
        if listener.responses > 0 && dsr == modes.len() {
            return Err(self
                .error(
                    listener.span.clone(),
                    "`responses` counts replies, which the proxy never sees in mode dsr",
                )
                .mend("leave `responses` out and set `idle_timeout`"));
        }
        if listener.responses > 0 && dsr > 0 {
            self.warnings.push(format!(
                "listener `{}`: `responses` ends no session with a server in mode dsr, whose replies the proxy never sees; `idle_timeout` does",
                listener.name
            ));
        }
        if listener.amplification && dsr > 0 {
            return Err(self
                .error(
                    listener.span.clone(),
                    "`amplification` bounds replies, which the proxy never sees in mode dsr",
                )
                .mend("leave `amplification` out, or serve it by another mode"));
        }
        if listener.requests > 0 && modes.iter().any(|mode| mode.spoofs_ports()) {
            return Err(self
                .error(listener.span.clone(), "`requests` begins a client's session anew beside the old one, and both would need the client's own port")
                .mend("leave `requests` out, or serve it by mode transparent with source_port = \"any\""));
        }
        Ok(())
    }

    /// A client's address can stand in datagrams to servers of its own family
    /// alone. A name may lead to servers of either.
    fn check_families(
        &self,
        listener: &Whole<'_>,
        servers: &[(usize, Mode)],
        upstream: &CheckedUpstream,
    ) -> Result<(), ConfigError> {
        if !listener.names.is_empty() {
            return Ok(());
        }
        let (bind, span) = &listener.bind;
        let reaches = |v6: bool| {
            let mut servers = upstream.servers.iter().zip(servers);
            servers.any(|(server, (_, mode))| mode.reaches(server.address, v6))
        };
        let (reaches_v4, reaches_v6) = (reaches(false), reaches(true));
        for address in *bind {
            if !(if address.is_ipv4() {
                reaches_v4
            } else {
                reaches_v6
            }) {
                let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
                return Err(self
                    .error(
                        span.clone(),
                        format!("clients of {address} can't be shown to any server: in these modes that takes an {family} server"),
                    )
                    .mend(format!("add an {family} server, or one in mode ppv2, or bind no {family} address")));
            }
        }
        Ok(())
    }

    /// A rewriting rule knows one address to write for a server, whichever the
    /// client wrote to, and servers by the addresses that they had when it was made.
    fn check_rewriting(
        &self,
        listener: &Whole<'_>,
        servers: &[(usize, Mode)],
        upstream: &CheckedUpstream,
    ) -> Result<(), ConfigError> {
        let mut names = upstream.names.iter().zip(listener.names);
        if let Some((named, _)) = names.find(|(_, (_, mode))| is_rewritten(*mode)) {
            return Err(self
                .error(
                    named.span.clone(),
                    format!(
                        "`{}` in mode dsr, whose rules on hosts can't follow a name",
                        named.name
                    ),
                )
                .mend("write the servers' addresses, or use rewrite_on = \"sdk\""));
        }
        let rewritten = servers.iter().filter(|(_, mode)| is_rewritten(*mode));
        let rewritten: Vec<_> = rewritten.map(|(number, _)| *number).collect();
        if rewritten.is_empty() {
            return Ok(());
        }
        let (bind, span) = &listener.bind;
        for (index, address) in bind.iter().enumerate() {
            if address.ip().is_unspecified() {
                return Err(self
                    .error(span.clone(), format!("a wildcard, {address}, in mode dsr"))
                    .mend("bind the address that clients write to: replies are rewritten to come from it"));
            }
            let earlier = &bind[..index];
            if let Some(other) = earlier.iter().find(|a| a.is_ipv4() == address.is_ipv4()) {
                return Err(self
                    .error(
                        span.clone(),
                        format!("{other} and {address} in mode dsr, whose replies can come from one address alone"),
                    )
                    .mend("bind one address of each family, or use rewrite_on = \"sdk\""));
            }
        }
        Ok(())
    }

    /// Rules know a reply by the address and port of its server. Replies of one
    /// server that return in mode dsr return to one listener, whichever upstreams
    /// the server is in.
    fn refuse_two_ways(
        &mut self,
        listener: &Whole<'_>,
        servers: &[(usize, Mode)],
    ) -> Result<(), ConfigError> {
        let (bind, _) = &listener.bind;
        let has_clients = |v4: bool| bind.iter().any(|a| a.is_ipv4() == v4);
        let (has_v4, has_v6) = (has_clients(true), has_clients(false));
        for (number, mode) in servers {
            let server = self.servers[*number].address.0;
            let has_clients = if server.is_ipv4() { has_v4 } else { has_v6 };
            if !mode.spoofs() || !has_clients {
                continue;
            }
            let this = (listener.name.to_owned(), *mode);
            let (other, others_mode) = self.spoofed.entry(server).or_insert(this);
            if other == listener.name || !(is_rewritten(*mode) || is_rewritten(*others_mode)) {
                continue;
            }
            let message = format!(
                "listeners `{other}` and `{}` write to server {server} from clients' addresses, in modes {} and {}: its replies would all come from one of them",
                listener.name,
                others_mode.name(),
                mode.name()
            );
            return Err(self
                .error(listener.span.clone(), message)
                .mend("let the server listen on a second port or address for one of them, or use rewrite_on = \"sdk\""));
        }
        Ok(())
    }

    /// On a server's host, rules know replies by the server's port, and must leave
    /// those alone that go to the proxy itself. They know its address by `source`.
    pub(super) fn require_sources(
        &self,
        listeners: &[Listener],
        upstreams: &BTreeMap<String, CheckedUpstream>,
    ) -> Result<(), ConfigError> {
        let served = || {
            listeners.iter().flat_map(|listener| {
                let servers = listener.servers.iter();
                servers.map(move |(number, mode)| (listener, *number, *mode))
            })
        };
        let on_host: BTreeMap<_, _> = served()
            .filter(|(_, _, mode)| *mode == Mode::Dsr(RewriteOn::Server))
            .map(|(listener, number, _)| (self.servers[number].address, &listener.name))
            .collect();
        for (listener, number, mode) in served() {
            let server = &self.servers[number];
            let (Some(rewritten), Some(why)) =
                (on_host.get(&server.address), server.answers_proxy(mode))
            else {
                continue;
            };
            if !server.sources.is_empty() {
                continue;
            }
            let listed = upstreams.get(&listener.upstream).map(|u| &u.servers);
            let listed = listed.and_then(|all| all.iter().find(|s| s.number == number));
            let message = format!(
                "server {} answers the proxy itself ({why}), and listener `{rewritten}` has its host rewrite replies: the rules there must know the proxy's address",
                server.address
            );
            return Err(self
                .error(listed.map_or(0..0, |server| server.span.clone()), message)
                .mend(format!(
                    "set `source` in [upstream.{}] to the address that the proxy sends from",
                    listener.upstream
                )));
        }
        Ok(())
    }
}
