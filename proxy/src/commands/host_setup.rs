//! `host-setup`: the commands that a proxy's or a server's host needs for the modes
//! `transparent` and `dsr`, as a shell script. It is printed and never run here.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use thiserror::Error;

use crate::config::Config;
use crate::host;
use crate::host::route::{NoRoute, Packet};
use crate::returns::{self, Return};
use ppv2_engine::address::is_no_host;

use script::Script;

mod proxy;
mod script;
mod server;
#[cfg(test)]
mod tests;

pub(crate) use server::is_here;

pub use script::{PROXY_NFT_TABLE, SERVER_NFT_TABLE};

/// The MTU of the way back in mode dsr. What a reply meets beyond the proxy's
/// host, its sender never hears of; IPv6 passes this everywhere (RFC 8200, 5).
const DSR_MTU: u32 = 1280;

/// On which host the script is to be run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Role {
    /// That of the proxy
    Proxy,
    /// That of a server
    Server,
}

impl Role {
    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Proxy => "proxy",
            Self::Server => "server",
        }
    }

    /// The number of the routing table, and of the preference of the rules that
    /// lead to it. Each role has its own: a host may have both.
    #[must_use]
    pub fn table(self) -> u32 {
        match self {
            Self::Proxy => 9022,
            Self::Server => 9023,
        }
    }
}

/// What is printed, and what this host can't tell.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// The proxy's TOML file; not read for --undo
    #[arg(long, value_name = "FILE", required_unless_present = "undo")]
    pub config: Option<PathBuf>,

    /// The host that the script is for
    #[arg(long)]
    pub role: Role,

    /// Print the reverse, which puts back what was there before; besides, only --role matters
    #[arg(long)]
    pub undo: bool,

    /// Interface towards clients [default: the one with the listener's address; for servers the one of the route to clients]
    #[arg(long, value_name = "NAME", value_parser = interface)]
    pub public_interface: Option<String>,

    /// Interface between proxy and server [default: that of this host's route to the server, or the one with the server's address]
    #[arg(long, value_name = "NAME", value_parser = interface)]
    pub server_interface: Option<String>,

    /// Role server: the proxy's address, which replies are routed to and those to the proxy itself
    /// are known by; one for each family
    #[arg(long, value_name = "IP", value_parser = gateway)]
    pub gateway: Vec<IpAddr>,

    /// Role server: address of the server that the script is for, repeatable [default: those that this host has]
    #[arg(long, value_name = "IP", value_parser = unicast)]
    pub server: Vec<IpAddr>,

    /// Mode dsr by the SDK: address that clients write to, where the listener is bound to a wildcard; repeatable
    #[arg(long, value_name = "IP", value_parser = unicast)]
    pub listener_address: Vec<IpAddr>,

    /// Role proxy, mode dsr by the SDK: servers route their replies through this host
    #[arg(long)]
    pub is_gateway: bool,

    /// Role server: MTU of the way back through the proxy's host [default: 1280 in mode dsr, else the interface's]
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(576..=65_535))]
    pub mtu: Option<u32>,

    /// Routing table and preference of its rules [default: 9022 for the proxy, 9023 for a server]
    #[arg(long, value_name = "N", value_parser = table)]
    pub table: Option<u32>,
}

/// What keeps a script from being made.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum HostSetupError {
    /// Something is not known here.
    #[error("{what} is not known: {why}; name it with {option}")]
    Unknown {
        /// What.
        what: String,
        /// Why not.
        why: String,
        /// The option that tells.
        option: &'static str,
    },
    /// There is no such interface.
    #[error("{option} {name}: {error}; `ip link` shows this host's interfaces")]
    NoInterface {
        /// The option that names it.
        option: &'static str,
        /// Its name.
        name: String,
        /// What the kernel said.
        error: std::io::Error,
    },
    /// An interface's name can't stand in a script.
    #[error(
        "interface {name:?} has a name that is not safe in a script: letters, digits, and . _ - are; rename it (ip link set … name …)"
    )]
    OddName {
        /// Its name.
        name: String,
    },
    /// One host can't do both.
    #[error(
        "replies of server {server} would return in two ways, by {first} and by {second}, which the host tells apart by the server's address; give the server two addresses, or one mode"
    )]
    TwoWays {
        /// Its address.
        server: IpAddr,
        /// As the operator set it.
        first: &'static str,
        /// As the operator set it.
        second: &'static str,
    },
    /// Two servers of one host have one port.
    #[error(
        "servers {} ({}) and {} ({}) of this host have the same port, by which it knows their replies, but theirs are for listeners {} and {}; let one of them listen on another port",
        both[0].server, both[0].by.mode(), both[1].server, both[1].by.mode(), both[0].listener, both[1].listener
    )]
    OnePort {
        /// Their ways.
        both: Box<[Return; 2]>,
    },
    /// A server on the proxy's own host in a mode that can't be.
    #[error(
        "server {server} is this host's own, and its replies are never passed on here, as {mode} needs; use mode transparent or ppv2 for it"
    )]
    OwnServer {
        /// The server.
        server: SocketAddr,
        /// As the operator set it.
        mode: &'static str,
    },
    /// None of the servers is here.
    #[error(
        "none of the servers in mode transparent or dsr ({servers}) has an address of this host; name the one that the script is for with --server"
    )]
    NoServerHere {
        /// All of them.
        servers: String,
    },
}

/// Prints the script for `config`.
///
/// # Errors
///
/// [`HostSetupError`], naming the option that tells what this host can't.
pub fn script(config: &Config, options: &Options) -> Result<String, HostSetupError> {
    let interfaces = [
        ("--public-interface", &options.public_interface),
        ("--server-interface", &options.server_interface),
    ];
    for (option, name) in interfaces {
        if let Some(name) = name {
            host::interface_index(name).map_err(|error| HostSetupError::NoInterface {
                option,
                name: name.clone(),
                error,
            })?;
        }
    }
    compose(config, options)
}

/// Prints the reverse of what was set up for `role`, whatever it was set up for.
#[must_use]
pub fn undo(role: Role) -> String {
    Script::new(role, None).undo()
}

fn compose(config: &Config, options: &Options) -> Result<String, HostSetupError> {
    let mut script = Script::new(options.role, options.table);
    let returns = returns::of(config);
    refuse_two_ways(&returns)?;
    let host = HostFacts { config, options };
    match options.role {
        Role::Proxy => proxy::set_up(&mut script, &returns, &host)?,
        Role::Server => server::set_up(&mut script, &returns, &host)?,
    }
    Ok(script.set_up())
}

/// A server's address tells its replies from others, so all of them return alike.
fn refuse_two_ways(returns: &[Return]) -> Result<(), HostSetupError> {
    let mut ways = BTreeMap::new();
    for Return { by, server, .. } in returns.iter().filter(|found| found.by.spoofs()) {
        let first = *ways.entry(server.ip()).or_insert(*by);
        if first != *by {
            return Err(HostSetupError::TwoWays {
                server: server.ip(),
                first: first.mode(),
                second: by.mode(),
            });
        }
    }
    Ok(())
}

/// What the options say, and this host where they don't.
struct HostFacts<'a> {
    config: &'a Config,
    options: &'a Options,
}

impl HostFacts<'_> {
    /// The interface towards a server, seen from the proxy's host; `lo` if the
    /// server is on it.
    fn interface_to(&self, server: IpAddr) -> Result<String, HostSetupError> {
        if let Some(name) = &self.options.server_interface {
            return Ok(name.clone());
        }
        if host::is_own(server) {
            return Ok("lo".to_owned());
        }
        let found = route_interface(server).map_err(|why| HostSetupError::Unknown {
            what: format!("the interface towards server {server}"),
            why,
            option: "--server-interface",
        })?;
        plain(found)
    }

    /// The interface of a server's host that datagrams of the proxy come in by.
    fn interface_of(&self, server: IpAddr) -> Result<String, HostSetupError> {
        let named = self.options.server_interface.clone();
        let found = named.or_else(|| host::interface_with(server));
        let found = found.ok_or_else(|| HostSetupError::Unknown {
            what: format!("the interface with the server's address {server}"),
            why: "this host doesn't have it".to_owned(),
            option: "--server-interface",
        })?;
        plain(found)
    }

    /// The interface that clients' datagrams to `listener` come in by.
    fn public_interface(&self, listener: IpAddr) -> Result<String, HostSetupError> {
        if let Some(name) = &self.options.public_interface {
            return Ok(name.clone());
        }
        let why = match host::interface_with(listener) {
            Some(name) if name != "lo" => return plain(name),
            Some(_) => format!("{listener} is on lo"),
            None => format!("this host doesn't have the listener's address {listener}"),
        };
        Err(HostSetupError::Unknown {
            what: "the interface towards clients".to_owned(),
            why,
            option: "--public-interface",
        })
    }

    /// The interface that a server's host reaches clients by.
    fn interface_to_clients(&self, v4: bool) -> Result<String, HostSetupError> {
        if let Some(name) = &self.options.public_interface {
            return Ok(name.clone());
        }
        let client = host::some_client(self.config, v4);
        let found = route_interface(client).map_err(|why| HostSetupError::Unknown {
            what: "the interface towards clients".to_owned(),
            why,
            option: "--public-interface",
        })?;
        plain(found)
    }

    fn gateway(&self, server: IpAddr) -> Result<IpAddr, HostSetupError> {
        self.gateway_like(server)
            .ok_or_else(|| HostSetupError::Unknown {
                what: format!("the proxy's address that server {server} routes replies to"),
                why: "only the proxy's host has it".to_owned(),
                option: "--gateway",
            })
    }

    fn gateway_like(&self, ip: IpAddr) -> Option<IpAddr> {
        let gateways = self.options.gateway.iter();
        let mut of_family = gateways.filter(|gateway| gateway.is_ipv4() == ip.is_ipv4());
        of_family.next().copied()
    }

    /// The addresses that clients write to at a listener's address.
    fn listener_addresses(&self, listener: IpAddr) -> Result<Vec<IpAddr>, HostSetupError> {
        if !listener.is_unspecified() {
            return Ok(vec![listener]);
        }
        let named = self.options.listener_address.iter().copied();
        let named: Vec<_> = named
            .filter(|ip| ip.is_ipv4() == listener.is_ipv4())
            .collect();
        if named.is_empty() {
            return Err(HostSetupError::Unknown {
                what: "the address that clients write to".to_owned(),
                why: format!("the listener is bound to the wildcard {listener}"),
                option: "--listener-address",
            });
        }
        Ok(named)
    }
}

fn route_interface(to: IpAddr) -> Result<String, String> {
    match Packet::sent_to(to).route() {
        Ok(route) => host::interface_name(route.interface)
            .ok_or_else(|| format!("its interface, number {}, is gone", route.interface)),
        Err(NoRoute::Unreachable(error) | NoRoute::BadSource(error) | NoRoute::Unknown(error)) => {
            Err(format!("no route to {to} ({error})"))
        }
    }
}

/// A name that this host has told and that means itself in a shell and in nft's rules.
fn plain(name: String) -> Result<String, HostSetupError> {
    if host::is_plain_name(&name) {
        Ok(name)
    } else {
        Err(HostSetupError::OddName { name })
    }
}

/// Takes the number of a routing table that is no other's: those from 253 on are
/// the kernel's own (ip-route(8)), and rules have preferences below 32,766.
fn table(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(number @ (1..=252 | 256..=32_765)) => Ok(number),
        _ => Err("give a number from 1 to 252 or from 256 to 32765".to_owned()),
    }
}

/// Takes an interface's name that means itself in a shell and in nft's rules.
fn interface(name: &str) -> Result<String, String> {
    if !host::is_plain_name(name) {
        return Err("give a name as `ip link` shows it, such as eth0".to_owned());
    }
    Ok(name.to_owned())
}

/// Takes the address of one host.
pub(super) fn unicast(text: &str) -> Result<IpAddr, String> {
    let ip: IpAddr = text.parse().map_err(|_| "give an IP address".to_owned())?;
    let ip = ip.to_canonical();
    if is_no_host(ip) {
        return Err("no host has this address".to_owned());
    }
    Ok(ip)
}

/// Takes the address of another host.
pub(super) fn gateway(text: &str) -> Result<IpAddr, String> {
    match unicast(text)? {
        ip if ip.is_loopback() => Err("a loopback address leads to no other host".to_owned()),
        ip => Ok(ip),
    }
}
