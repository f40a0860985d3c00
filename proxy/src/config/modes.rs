//! What a mode needs of its listener and of its servers: the keys that belong to it, and
//! the combinations that can't work.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use super::accept::Format;
use super::error::{Within, key_path, refuse};
use super::header::HeaderOptions;
use super::options::{Emit, ModeKind, RewriteOn, ServerOptions, SourcePort};
use super::validate::{Groups, Member, family};
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
            Mode::Ppv2 { .. } | Mode::Spp => Some("mode ppv2"),
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
    header: &HeaderOptions,
) -> Result<Mode, ConfigError> {
    for (key, is_given, belongs_to, name) in of_one_mode(rewrite_on, source_port) {
        if is_given && kind != belongs_to {
            return refuse(
                format!("`{key}` is for mode `{name}` alone"),
                format!("leave it out, or set mode = \"{name}\""),
            )
            .within(key_path![key]);
        }
    }
    let crc32c = header.crc32c;
    let emit = match header.emit {
        Emit::Every => mode::Emit::Every,
        Emit::First => mode::Emit::First,
    };
    let port = match source_port.unwrap_or_default() {
        SourcePort::Any => mode::SourcePort::Any,
        SourcePort::Client => mode::SourcePort::Client,
    };
    let rewrite_on = match rewrite_on.unwrap_or_default() {
        RewriteOn::Proxy => mode::RewriteOn::Proxy,
        RewriteOn::Server => mode::RewriteOn::Server,
        RewriteOn::Sdk => mode::RewriteOn::Sdk { crc32c },
    };
    let mode = match kind {
        ModeKind::Ppv2 if header.format == Format::Spp => Mode::Spp,
        ModeKind::Ppv2 => Mode::Ppv2 { emit, crc32c },
        ModeKind::Transparent => Mode::Transparent { port },
        ModeKind::Dsr => Mode::Dsr(rewrite_on),
        ModeKind::Plain => Mode::Plain,
    };
    if header.format == Format::Spp && matches!(mode, Mode::Dsr(mode::RewriteOn::Sdk { .. })) {
        return refuse(
            "mode dsr with rewrite_on = \"sdk\" and format = \"spp\", whose replies have a header for the proxy in front",
            "leave `format` out: the server answers clients by a PROXY v2 header",
        )
        .within(key_path!["mode"]);
    }
    if emit == mode::Emit::First && mode == Mode::Dsr(mode::RewriteOn::Sdk { crc32c }) {
        return refuse(
            "mode dsr with rewrite_on = \"sdk\" and emit = \"first\"",
            "leave `emit` out: the server learns from each datagram where to answer from",
        )
        .within(key_path!["mode"]);
    }
    Ok(mode)
}

/// The keys that have a meaning in one mode alone, whether they are given, and the mode.
fn of_one_mode(
    rewrite_on: Option<RewriteOn>,
    source_port: Option<SourcePort>,
) -> [(&'static str, bool, ModeKind, &'static str); 2] {
    let (dsr, transparent) = (ModeKind::Dsr, ModeKind::Transparent);
    [
        ("rewrite_on", rewrite_on.is_some(), dsr, "dsr"),
        (
            "source_port",
            source_port.is_some(),
            transparent,
            "transparent",
        ),
    ]
}

impl ServerOptions {
    /// A server's own mode, if it has one.
    pub(super) fn own_mode(&self, header: &HeaderOptions) -> Result<Option<Mode>, ConfigError> {
        if let Some(kind) = self.mode {
            return mode((kind, self.rewrite_on, self.source_port), header).map(Some);
        }
        let mut keys = of_one_mode(self.rewrite_on, self.source_port).into_iter();
        match keys.find(|(_, is_given, ..)| *is_given) {
            None => Ok(None),
            Some((key, _, _, mode)) => refuse(
                format!("a server with `{key}` but no `mode`"),
                format!("add mode = \"{mode}\" to the server"),
            )
            .within(key_path![key]),
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
        spoofed: &mut Spoofed,
    ) -> Result<(), ConfigError> {
        self.check_families(listener).within(key_path!["bind"])?;
        self.check_rewriting(listener)?;
        self.refuse_two_modes(listener, spoofed)?;
        let modes: Vec<_> = listener.modes().collect();
        let dsr = modes.iter().filter(|mode| !mode.takes_replies()).count();
        if listener.responses > 0 && dsr == modes.len() {
            return refuse(
                "`responses` counts replies, which the proxy never sees in mode dsr",
                "leave `responses` out and set `idle_timeout`",
            );
        }
        if listener.responses > 0 && dsr > 0 {
            self.warnings.push(format!(
                "listener `{}`: `responses` ends no session with a server in mode dsr, whose replies the proxy never sees; `idle_timeout` does",
                listener.name
            ));
        }
        if listener.amplification.is_some() && dsr > 0 {
            return refuse(
                "`amplification` bounds replies, which the proxy never sees in mode dsr",
                "leave `amplification` out, or serve it by another mode",
            );
        }
        if listener.requests > 0 && modes.iter().any(|mode| mode.spoofs_ports()) {
            return refuse(
                "`requests` starts a new session beside the client's old one, and both would need the client's own port",
                "leave `requests` out, or serve it by mode transparent with source_port = \"any\"",
            );
        }
        Ok(())
    }

    /// A client's address can be the source of datagrams only to servers of its own
    /// family. A name may resolve to servers of either.
    fn check_families(&self, listener: &Listener) -> Result<(), ConfigError> {
        for address in &listener.bind {
            let is_clients = |v6| listener.accept.is_some() || v6 != address.is_ipv4();
            let reaches = |(server, mode): &(usize, Mode)| {
                let server = self.servers[*server].address;
                let reached = |v6| is_clients(v6) && mode.reaches(server, v6);
                reached(true) || reached(false)
            };
            if listener.names.is_empty() && !listener.servers.iter().any(reaches) {
                let family = family(address.first());
                return refuse(
                    format!(
                        "no server can see the addresses of clients of {address}: these modes need an {family} server"
                    ),
                    format!(
                        "add an {family} server, or one in mode ppv2, or bind no {family} address"
                    ),
                );
            }
        }
        Ok(())
    }

    /// A rewriting rule has one address to write for a server, whichever the client wrote
    /// to, and the servers' addresses of when it was made.
    fn check_rewriting(&self, listener: &Listener) -> Result<(), ConfigError> {
        if let Some((index, _)) = listener.names.iter().find(|(_, mode)| is_rewritten(*mode)) {
            let name = &self.names[*index].name;
            return refuse(
                format!(
                    "`{name}`: mode dsr needs fixed addresses: the hosts' rules can't follow a name"
                ),
                "write the servers' addresses, or use rewrite_on = \"sdk\"",
            )
            .within(key_path!["upstream"]);
        }
        let mut rewritten = listener.servers.iter();
        let mut rewritten = rewritten.by_ref().filter(|(_, mode)| is_rewritten(*mode));
        let Some((first, _)) = rewritten.next() else {
            return Ok(());
        };
        let all = rewritten.map(|(index, _)| index).chain([first]);
        let mut all = all.map(|index| &self.servers[*index]);
        if let Some(server) = all.find(|server| server.ports.is_some()) {
            return refuse(
                format!(
                    "server `{}` with port = \"same\" in mode dsr: the hosts' rules give all of a server's replies one port",
                    server.name
                ),
                "use rewrite_on = \"sdk\", or mode transparent or ppv2",
            )
            .within(key_path!["upstream"]);
        }
        for (number, address) in listener.bind.iter().enumerate() {
            let mut earlier = listener.bind[..number].iter();
            let other = earlier.find(|other| other.is_ipv4() == address.is_ipv4());
            let (message, hint) = match other {
                _ if !address.is_single() => (
                    format!(
                        "a range of ports, {address}, in mode dsr, whose replies can come from one port alone"
                    ),
                    "bind one port, or use rewrite_on = \"sdk\" or mode ppv2",
                ),
                _ if address.ip().is_unspecified() => (
                    format!("a wildcard, {address}, in mode dsr"),
                    "bind the address that clients write to: replies are rewritten to come from it",
                ),
                Some(other) => (
                    format!(
                        "{other} and {address} in mode dsr, whose replies can come from one address alone"
                    ),
                    "bind one address of each family, or use rewrite_on = \"sdk\"",
                ),
                None => continue,
            };
            return refuse(message, hint).within(key_path!["bind"]);
        }
        Ok(())
    }

    /// Rules identify a reply by the address and port of its server. Replies of one
    /// server in mode dsr return to one listener, whichever upstreams the server is in.
    fn refuse_two_modes(
        &self,
        listener: &Listener,
        spoofed: &mut Spoofed,
    ) -> Result<(), ConfigError> {
        for (number, mode) in &listener.servers {
            let server = self.servers[*number].address.0;
            if !mode.spoofs() || !listener.has_clients(server.is_ipv6()) {
                continue;
            }
            let name = &listener.name;
            let (other, others_mode) = spoofed.entry(server).or_insert((name.clone(), *mode));
            if other == name || !(is_rewritten(*mode) || is_rewritten(*others_mode)) {
                continue;
            }
            let modes = [others_mode.name(), mode.name()].join(" and ");
            return refuse(
                format!(
                    "listeners `{other}` and `{name}` write to server {server} from clients' addresses, in modes {modes}: its replies would all come from one of them"
                ),
                "let the server listen on a second port or address for one of them, or use rewrite_on = \"sdk\"",
            );
        }
        Ok(())
    }

    /// A rule for the replies of one port would take those of a server on a range of ports
    /// for its own.
    fn refuse_rewritten_ranges(&self) -> Result<(), ConfigError> {
        let rewritten = self.served().filter(|(.., mode)| is_rewritten(*mode));
        let rewritten: Vec<_> = rewritten.map(|(_, server, _)| server).collect();
        let ranges = self.served().map(|(_, server, _)| server);
        for range in ranges.filter(|server| server.ports.is_some()) {
            let Some(other) = rewritten.iter().find(|other| other.overlaps(range)) else {
                continue;
            };
            return refuse(
                format!(
                    "server `{}` has the port of server `{}` in mode dsr, whose replies a rule rewrites",
                    range.name, other.name
                ),
                "let one of them listen on other ports or another address, or use rewrite_on = \"sdk\"",
            )
            .within(key_path!["upstream", range.upstream.as_str()]);
        }
        Ok(())
    }

    /// On a server's host, rules identify replies by the server's port, and must leave
    /// those alone that go to the proxy itself. They know its address by `source`.
    pub(super) fn require_sources(&self, groups: &Groups<'_>) -> Result<(), ConfigError> {
        self.refuse_rewritten_ranges()?;
        let served = self.served();
        let on_host = served.filter(|(.., mode)| *mode == Mode::Dsr(mode::RewriteOn::Server));
        let on_host: BTreeMap<_, _> = on_host
            .map(|(listener, server, _)| (server.address, &listener.name))
            .collect();
        for (listener, server, mode) in self.served() {
            let (Some(rewritten), Some(why)) =
                (on_host.get(&server.address), server.answers_proxy(mode))
            else {
                continue;
            };
            if server.sources.are_given() {
                continue;
            }
            let (upstream, address) = (listener.upstream.as_str(), server.address);
            let is_it = |member: &&Member| self.servers[member.index].address == address;
            let member = groups[upstream].servers.iter().find(is_it);
            return refuse(
                format!("server {address} replies to the proxy ({why}), but its host also rewrites replies for listener `{rewritten}`; to tell them apart its rules need the proxy's address"),
                format!("set `source` in [upstream.{upstream}] to the address that the proxy sends from"),
            )
            .within(key_path!["upstream", upstream, "servers", member.map_or(0, |m| m.entry)]);
        }
        Ok(())
    }
}
