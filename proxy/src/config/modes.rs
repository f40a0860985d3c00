//! What a mode needs of its listener and of its servers: the keys that belong to it, and
//! the combinations that can't work.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use super::error::key_path;
use super::names::ServerAddress;
use super::options::{Emit, HeaderOptions, ModeKind, RewriteOn, ServerOptions, SourcePort};
use super::validate::{Group, Member, family};
use super::{Config, ConfigError, Expect, Listener, Probe, Server};
use ppv2_engine::mode::{self, Mode};

/// Whether rules on a host, the proxy's or the server's, rewrite the replies.
fn is_rewritten(mode: Mode) -> bool {
    matches!(
        mode,
        Mode::Dsr(mode::RewriteOn::Proxy | mode::RewriteOn::Server)
    )
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
type Keys = (ModeKind, Option<RewriteOn>, Option<SourcePort>);

/// The mode that the keys of a table ask for.
pub(super) fn mode(
    (kind, rewrite_on, source_port): Keys,
    header: HeaderOptions,
) -> Result<Mode, ConfigError> {
    let of_others = [
        ("rewrite_on", rewrite_on.is_some(), ModeKind::Dsr, "dsr"),
        (
            "source_port",
            source_port.is_some(),
            ModeKind::Transparent,
            "transparent",
        ),
    ];
    for (key, is_given, belongs_to, name) in of_others {
        if is_given && kind != belongs_to {
            return Err(
                ConfigError::new(format!("`{key}` is for mode `{name}` alone"))
                    .hint(format!("leave it out, or set mode = \"{name}\""))
                    .at(key_path![key]),
            );
        }
    }
    let HeaderOptions { emit, crc32c } = header;
    Ok(match kind {
        ModeKind::Ppv2 => Mode::Ppv2 {
            emit: match emit {
                Emit::Every => mode::Emit::Every,
                Emit::First => mode::Emit::First,
            },
            crc32c,
        },
        ModeKind::Transparent => Mode::Transparent {
            port: match source_port.unwrap_or_default() {
                SourcePort::Any => mode::SourcePort::Any,
                SourcePort::Client => mode::SourcePort::Client,
            },
        },
        ModeKind::Dsr => Mode::Dsr(match rewrite_on.unwrap_or_default() {
            RewriteOn::Proxy => mode::RewriteOn::Proxy,
            RewriteOn::Server => mode::RewriteOn::Server,
            RewriteOn::Sdk if emit == Emit::First => {
                return Err(ConfigError::new(
                    "mode dsr with rewrite_on = \"sdk\" and emit = \"first\"",
                )
                .hint("leave `emit` out: the server learns from each datagram where to answer from")
                .at(key_path!["mode"]));
            }
            RewriteOn::Sdk => mode::RewriteOn::Sdk { crc32c },
        }),
        ModeKind::Plain => Mode::Plain,
    })
}

impl ServerOptions {
    /// A server's own mode, if it has one.
    pub(super) fn own_mode(&self, header: HeaderOptions) -> Result<Option<Mode>, ConfigError> {
        if let Some(kind) = self.mode {
            return mode((kind, self.rewrite_on, self.source_port), header).map(Some);
        }
        let stray = [
            ("rewrite_on", self.rewrite_on.is_some(), "dsr"),
            ("source_port", self.source_port.is_some(), "transparent"),
        ];
        match stray.into_iter().find(|(_, is_given, _)| *is_given) {
            Some((key, _, mode)) => Err(ConfigError::new(format!(
                "a server with `{key}` but no `mode`"
            ))
            .hint(format!("add mode = \"{mode}\" to the server"))
            .at(key_path![key])),
            None => Ok(None),
        }
    }
}

/// Servers that a listener writes to from clients' addresses, with the first listener
/// that does and its mode.
pub(super) type Spoofed = BTreeMap<SocketAddr, (String, Mode)>;

impl Config {
    /// Refuses what the modes of a listener's servers can't do.
    pub(super) fn check_modes(
        &mut self,
        listener: &Listener,
        index: usize,
        group: &Group<'_>,
        spoofed: &mut Spoofed,
    ) -> Result<(), ConfigError> {
        self.check_families(listener, index)?;
        check_rewriting(listener, index, group)?;
        self.refuse_two_modes(listener, index, spoofed)?;
        let at = |error: ConfigError| error.at(key_path!["listener", index]);
        let modes: Vec<_> = listener.modes().collect();
        let dsr = modes.iter().filter(|mode| !mode.takes_replies()).count();
        if listener.responses > 0 && dsr == modes.len() {
            return Err(at(ConfigError::new(
                "`responses` counts replies, which the proxy never sees in mode dsr",
            )
            .hint("leave `responses` out and set `idle_timeout`")));
        }
        if listener.responses > 0 && dsr > 0 {
            self.warnings.push(format!(
                "listener `{}`: `responses` ends no session with a server in mode dsr, whose replies the proxy never sees; `idle_timeout` does",
                listener.name
            ));
        }
        if listener.amplification.is_some() && dsr > 0 {
            return Err(at(ConfigError::new(
                "`amplification` bounds replies, which the proxy never sees in mode dsr",
            )
            .hint("leave `amplification` out, or serve it by another mode")));
        }
        if listener.requests > 0 && modes.iter().any(|mode| mode.spoofs_ports()) {
            return Err(at(ConfigError::new("`requests` starts a new session beside the client's old one, and both would need the client's own port")
                .hint("leave `requests` out, or serve it by mode transparent with source_port = \"any\"")));
        }
        Ok(())
    }

    /// A client's address can be the source of datagrams only to servers of its own
    /// family. A name may resolve to servers of either.
    fn check_families(&self, listener: &Listener, index: usize) -> Result<(), ConfigError> {
        for address in &listener.bind {
            let reaches = |(server, mode): &(usize, Mode)| {
                mode.reaches(self.servers[*server].address, address.is_ipv6())
            };
            if listener.names.is_empty() && !listener.servers.iter().any(reaches) {
                let family = family(*address);
                return Err(ConfigError::new(format!("clients of {address} can't be shown to any server: in these modes that takes an {family} server"))
                    .hint(format!("add an {family} server, or one in mode ppv2, or bind no {family} address"))
                    .at(key_path!["listener", index, "bind"]));
            }
        }
        Ok(())
    }

    /// Rules identify a reply by the address and port of its server. Replies of one
    /// server in mode dsr return to one listener, whichever upstreams the server is in.
    fn refuse_two_modes(
        &self,
        listener: &Listener,
        index: usize,
        spoofed: &mut Spoofed,
    ) -> Result<(), ConfigError> {
        for (number, mode) in &listener.servers {
            let server = self.servers[*number].address.0;
            let has_clients = listener
                .bind
                .iter()
                .any(|a| a.is_ipv4() == server.is_ipv4());
            if !mode.spoofs() || !has_clients {
                continue;
            }
            let this = (listener.name.clone(), *mode);
            let (other, others_mode) = spoofed.entry(server).or_insert(this);
            if *other == listener.name || !(is_rewritten(*mode) || is_rewritten(*others_mode)) {
                continue;
            }
            let message = format!(
                "listeners `{other}` and `{}` write to server {server} from clients' addresses, in modes {} and {}: its replies would all come from one of them",
                listener.name,
                others_mode.name(),
                mode.name()
            );
            return Err(ConfigError::new(message)
                .hint("let the server listen on a second port or address for one of them, or use rewrite_on = \"sdk\"")
                .at(key_path!["listener", index]));
        }
        Ok(())
    }

    /// On a server's host, rules identify replies by the server's port, and must leave
    /// those alone that go to the proxy itself. They know its address by `source`.
    pub(super) fn require_sources(
        &self,
        groups: &BTreeMap<&str, Group<'_>>,
    ) -> Result<(), ConfigError> {
        let on_host: BTreeMap<_, _> = self
            .served()
            .filter(|(_, _, mode)| *mode == Mode::Dsr(mode::RewriteOn::Server))
            .map(|(listener, server, _)| (server.address, &listener.name))
            .collect();
        for (listener, server, mode) in self.served() {
            let (Some(rewritten), Some(why)) =
                (on_host.get(&server.address), server.answers_proxy(mode))
            else {
                continue;
            };
            if !server.sources.is_empty() {
                continue;
            }
            let error = ConfigError::new(format!(
                "server {} answers the proxy itself ({why}), and listener `{rewritten}` has its host rewrite replies: the rules there must know the proxy's address",
                server.address
            ))
            .hint(format!(
                "set `source` in [upstream.{}] to the address that the proxy sends from",
                listener.upstream
            ));
            let group = &groups[listener.upstream.as_str()];
            let is_it = |member: &&Member| self.servers[member.index].address == server.address;
            return Err(match group.servers.iter().find(is_it) {
                Some(member) => group.at(member, error),
                None => error,
            });
        }
        Ok(())
    }
}

/// A rewriting rule has one address to write for a server, whichever the client wrote
/// to, and the servers' addresses of when it was made.
fn check_rewriting(
    listener: &Listener,
    index: usize,
    group: &Group<'_>,
) -> Result<(), ConfigError> {
    let mut names = group.names.iter().zip(&listener.names);
    if let Some((member, _)) = names.find(|(_, (_, mode))| is_rewritten(*mode)) {
        let message = match &group.options.servers[member.entry].address {
            ServerAddress::Name(name) => {
                format!("`{name}` in mode dsr, whose rules on hosts can't follow a name")
            }
            ServerAddress::Host(_) => unreachable!("hosts are not among the names"),
        };
        let error = ConfigError::new(message)
            .hint("write the servers' addresses, or use rewrite_on = \"sdk\"");
        return Err(group.at(member, error));
    }
    if !listener.servers.iter().any(|(_, mode)| is_rewritten(*mode)) {
        return Ok(());
    }
    let at = |error: ConfigError| error.at(key_path!["listener", index, "bind"]);
    for (number, address) in listener.bind.iter().enumerate() {
        if address.ip().is_unspecified() {
            return Err(at(ConfigError::new(format!(
                "a wildcard, {address}, in mode dsr"
            ))
            .hint(
                "bind the address that clients write to: replies are rewritten to come from it",
            )));
        }
        let mut earlier = listener.bind[..number].iter();
        if let Some(other) = earlier.find(|other| other.is_ipv4() == address.is_ipv4()) {
            return Err(at(ConfigError::new(format!(
                "{other} and {address} in mode dsr, whose replies can come from one address alone"
            ))
            .hint("bind one address of each family, or use rewrite_on = \"sdk\"")));
        }
    }
    Ok(())
}
