//! `host-setup`: the commands that a proxy's or a server's host needs for the modes
//! `transparent` and `dsr`, as a shell script. It is printed and never run here.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use clap::Args;
use thiserror::Error;

use crate::kernel;
use crate::reply_path::ReplyPath;
use crate::route::Packet;
use crate::topology::Topology;

use script::Script;

mod proxy;
mod script;
mod server;
#[cfg(test)]
mod tests;

pub use crate::role::Role;
pub(crate) use server::is_here;

/// The MTU of replies that the proxy's host forwards. ICMP errors from hops beyond it
/// never reach the server; IPv6 passes this MTU everywhere (RFC 8200, 5).
const DSR_MTU: u32 = 1280;

impl Role {
    fn name(self) -> &'static str {
        match self {
            Self::Proxy => "proxy",
            Self::Server => "server",
        }
    }

    /// The number of the routing table, and the preference of the rules that lead to it.
    /// Each role has its own, since a host may have both.
    fn table(self) -> u32 {
        match self {
            Self::Proxy => 9022,
            Self::Server => 9023,
        }
    }

    /// How an operator sets such a host up.
    pub(crate) fn set_up(self) -> String {
        let (role, more) = match self {
            Self::Proxy => ("proxy", ""),
            Self::Server => ("server", " --gateway PROXY"),
        };
        format!(
            "as root, run the output of `ppv2-proxy host-setup --config FILE --role {role}{more}`"
        )
    }
}

/// Options of the command.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// The proxy's TOML file; not read for --undo
    #[arg(long, value_name = "FILE", required_unless_present = "undo")]
    pub config: Option<PathBuf>,

    /// The host that the script is for
    #[arg(long)]
    pub role: Role,

    /// Print the script that reverts all changes; all other options but --role are ignored
    #[arg(long)]
    pub undo: bool,

    /// Interface towards clients [default: the one with the listener's address; for servers the one
    /// of the route to clients]
    #[arg(long, value_name = "NAME", value_parser = interface)]
    pub public_interface: Option<String>,

    /// Interface between proxy and server [default: that of this host's route to the server, or the
    /// one with the server's address]
    #[arg(long, value_name = "NAME", value_parser = interface)]
    pub server_interface: Option<String>,

    /// Role server: the proxy's address, which replies are routed to; replies to this address
    /// itself are not rewritten; one for each family
    #[arg(long, value_name = "IP", value_parser = other_host)]
    pub gateway: Vec<IpAddr>,

    /// Role server: address of a server that the script is for, repeatable [default: servers with
    /// an address of this host]
    #[arg(long, value_name = "IP", value_parser = unicast)]
    pub server: Vec<IpAddr>,

    /// Mode dsr by the SDK: address that clients write to, if the listener is bound to a wildcard;
    /// repeatable
    #[arg(long, value_name = "IP", value_parser = unicast)]
    pub listener_address: Vec<IpAddr>,

    /// Role proxy, mode dsr by the SDK: servers route their replies through this host
    #[arg(long)]
    pub is_gateway: bool,

    /// Role server: MTU of the route through the proxy's host [default: 1280 in mode dsr, else the
    /// interface's]
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(576..=65_535))]
    pub mtu: Option<u32>,

    /// Routing table and preference of its rules [default: 9022 for the proxy, 9023 for a server]
    #[arg(long, value_name = "N", value_parser = table)]
    pub table: Option<u32>,
}

/// Why there is no script, and what to change.
#[derive(Debug, Error)]
#[error("{0}")]
pub struct HostSetupError(String);

/// Something that this host can't tell, but `option` can.
fn unknown(what: &str, why: &str, option: &str) -> HostSetupError {
    HostSetupError(format!("{what} is not known: {why}; name it with {option}"))
}

/// The script for `topology`.
///
/// # Errors
///
/// [`HostSetupError`], with the option that tells what this host can't.
pub fn script(topology: &Topology, options: &Options) -> Result<String, HostSetupError> {
    for (option, name) in [
        ("--public-interface", &options.public_interface),
        ("--server-interface", &options.server_interface),
    ] {
        let unknown = |error| {
            format!(
                "{option} {}: {error}; `ip link` shows this host's interfaces",
                name.as_deref().unwrap_or_default()
            )
        };
        let index = name.as_deref().map(kernel::interface_index).transpose();
        index.map_err(|error| HostSetupError(unknown(error)))?;
    }
    compose(topology, options)
}

/// The script that reverts all changes of the script for `role`.
#[must_use]
pub fn undo(role: Role) -> String {
    Script::new(role, None).undo()
}

fn compose(topology: &Topology, options: &Options) -> Result<String, HostSetupError> {
    let mut script = Script::new(options.role, options.table);
    let paths = topology.reply_paths();
    refuse_two_paths(&paths)?;
    let host = Host { topology, options };
    match options.role {
        Role::Proxy => proxy::set_up(&mut script, &paths, &host)?,
        Role::Server => server::set_up(&mut script, &paths, &host)?,
    }
    Ok(script.set_up())
}

/// A host recognizes a server's replies by the server's address, so all must take the
/// same path.
fn refuse_two_paths(paths: &[ReplyPath]) -> Result<(), HostSetupError> {
    let mut by_server = BTreeMap::new();
    for path in paths.iter().filter(|path| path.rewriter.spoofs()) {
        let (server, rewriter) = (path.server.ip(), path.rewriter);
        let first = *by_server.entry(server).or_insert(rewriter);
        if first != rewriter {
            return Err(HostSetupError(format!(
                "replies of server {server} would take two paths, by {} and by {}, but the host tells paths apart by the server's address; give the server two addresses, or one mode",
                first.mode(),
                rewriter.mode()
            )));
        }
    }
    Ok(())
}

/// What the options say about this host, and what the kernel says where they don't.
struct Host<'a> {
    topology: &'a Topology,
    options: &'a Options,
}

impl Host<'_> {
    /// On the proxy's host: the interface towards a server; `lo` if the server is on this
    /// host.
    fn interface_to(&self, server: IpAddr) -> Result<String, HostSetupError> {
        self.server_interface(
            "the interface towards server",
            server,
            || match kernel::is_own(server) {
                true => Ok("lo".to_owned()),
                false => interface_of_route(server),
            },
        )
    }

    /// On a server's host: the interface that the proxy's datagrams arrive at.
    fn interface_of(&self, server: IpAddr) -> Result<String, HostSetupError> {
        self.server_interface("the interface with the server's address", server, || {
            kernel::interface_with(server).ok_or_else(|| "this host doesn't have it".to_owned())
        })
    }

    fn server_interface(
        &self,
        what: &str,
        server: IpAddr,
        find: impl FnOnce() -> Result<String, String>,
    ) -> Result<String, HostSetupError> {
        let what = format!("{what} {server}");
        let named = self.options.server_interface.clone();
        interface_or(named, &what, "--server-interface", find)
    }

    /// The interface towards clients.
    fn public_interface(
        &self,
        find: impl FnOnce() -> Result<String, String>,
    ) -> Result<String, HostSetupError> {
        let named = self.options.public_interface.clone();
        interface_or(
            named,
            "the interface towards clients",
            "--public-interface",
            find,
        )
    }

    /// The proxy's address of the same family as `ip`.
    fn gateway(&self, ip: IpAddr) -> Option<IpAddr> {
        let mut gateways = self.options.gateway.iter();
        gateways
            .find(|gateway| gateway.is_ipv4() == ip.is_ipv4())
            .copied()
    }

    /// The addresses that clients write to at a listener's address.
    fn listener_addresses(&self, listener: IpAddr) -> Result<Vec<IpAddr>, HostSetupError> {
        if !listener.is_unspecified() {
            return Ok(vec![listener]);
        }
        let mut named = self.options.listener_address.clone();
        named.retain(|ip| ip.is_ipv4() == listener.is_ipv4());
        if named.is_empty() {
            let why = format!("the listener is bound to the wildcard {listener}");
            let what = "the address that clients write to";
            return Err(unknown(what, &why, "--listener-address"));
        }
        Ok(named)
    }
}

fn interface_of_route(to: IpAddr) -> Result<String, String> {
    let route = Packet::sent_to(to).route();
    let index = route
        .map_err(|error| format!("no route to {to} ({error})"))?
        .interface;
    kernel::interface_name(index).ok_or_else(|| format!("interface number {index} is gone"))
}

/// The named interface, or the one that `find` finds if its name is safe in a script.
fn interface_or(
    named: Option<String>,
    what: &str,
    option: &str,
    find: impl FnOnce() -> Result<String, String>,
) -> Result<String, HostSetupError> {
    match named {
        Some(name) => Ok(name),
        None => safe(find().map_err(|why| unknown(what, &why, option))?),
    }
}

/// Takes a name of the kernel's if it is safe in a shell script and in nft's rules.
fn safe(name: String) -> Result<String, HostSetupError> {
    if kernel::is_plain_name(&name) {
        return Ok(name);
    }
    Err(HostSetupError(format!(
        "interface {name:?} has a name that is not safe in a script: letters, digits, and . _ - are; rename it (ip link set … name …)"
    )))
}

/// Parses the number of a routing table: those from 253 to 255 are the kernel's own
/// (ip-route(8)), and rules have preferences below 32,766.
fn table(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(number @ (1..=252 | 256..=32_765)) => Ok(number),
        _ => Err("give a number from 1 to 252 or from 256 to 32765".to_owned()),
    }
}

/// Parses an interface's name that is safe in a shell script and in nft's rules.
fn interface(name: &str) -> Result<String, String> {
    match kernel::is_plain_name(name) {
        true => Ok(name.to_owned()),
        false => Err("give a name as `ip link` shows it, such as eth0".to_owned()),
    }
}

/// Parses an address that a host can have.
pub(crate) fn unicast(text: &str) -> Result<IpAddr, String> {
    let ip: IpAddr = text.parse().map_err(|_| "give an IP address".to_owned())?;
    let ip = ip.to_canonical();
    let broadcasts = [Ipv4Addr::BROADCAST, Ipv4Addr::new(127, 255, 255, 255)];
    let is_no_host = match ip {
        // 0.0.0.0/8 has no hosts (RFC 1122, section 3.2.1.3).
        IpAddr::V4(ip) => ip.octets()[0] == 0 || broadcasts.contains(&ip),
        IpAddr::V6(ip) => ip.is_unspecified(),
    };
    if is_no_host || ip.is_multicast() {
        return Err("no host has this address".to_owned());
    }
    Ok(ip)
}

/// Parses the address of another host.
pub(crate) fn other_host(text: &str) -> Result<IpAddr, String> {
    match unicast(text)? {
        ip if ip.is_loopback() => Err("a loopback address leads to no other host".to_owned()),
        ip => Ok(ip),
    }
}
