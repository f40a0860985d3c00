//! `port = "same"`: servers that are written to at the port that the client wrote to.

use ppv2_engine::address::PortRange;
use ppv2_engine::upstream::{Balance, HashOn};

use super::error::{Within, key_path, refuse};
use super::names::ServerAddress;
use super::options::{ReplyKind, ServerOptions, Upstream};
use super::{Config, ConfigError, Listener, Name};

impl ServerOptions {
    /// The ports of a server that is written to at the port that the client wrote to; `None`
    /// of all others.
    pub(super) fn ports(&self, of: &Upstream) -> Result<Option<PortRange>, ConfigError> {
        let address = &self.address;
        let range = address.range().within(key_path!["address"])?;
        if self.port.is_none() {
            return match range {
                None => Ok(None),
                Some(_) => refuse(
                    format!("server `{address}` has a range of ports"),
                    format!(
                        "write {{ address = \"{address}\", port = \"same\" }} to have it written to at the port that the client wrote to, or give one port"
                    ),
                )
                .within(key_path!["address"]),
            };
        }
        if of.replies != ReplyKind::Session {
            return refuse(
                format!(
                    "port = \"same\" with replies = {}, by which all datagrams go to one port",
                    of.replies.quoted()
                ),
                "set replies = \"session\" in the upstream, or give the server one port",
            )
            .within(key_path!["port"]);
        }
        match (range, address) {
            (Some(range), _) => Ok(Some(range)),
            (None, ServerAddress::Name(Name::Srv { .. })) => refuse(
                format!(
                    "`{address}` with port = \"same\": SRV records say on which port servers listen"
                ),
                "write dns:HOST:FIRST-LAST, or leave `port` out",
            )
            .within(key_path!["port"]),
            (None, _) => refuse(
                format!("port = \"same\" with the single port of `{address}`"),
                "write the ports that the server listens on, as in \"192.0.2.10:40000-40999\", or leave `port` out",
            )
            .within(key_path!["port"]),
        }
    }
}

/// The first port of `bound` that is not in `ports`.
fn missing(bound: PortRange, ports: PortRange) -> Option<u16> {
    if bound.first < ports.first {
        Some(bound.first)
    } else if bound.last > ports.last {
        Some(bound.first.max(ports.last + 1))
    } else {
        None
    }
}

impl Config {
    /// Refuses a listener, number `index`, with ports that a server of its upstream has not,
    /// although it is to be written to there. Where all datagrams come with a header, the port
    /// that this names counts, when it comes.
    pub(super) fn check_same_ports(
        &mut self,
        listener: &Listener,
        index: usize,
    ) -> Result<(), ConfigError> {
        let servers = listener.servers.iter();
        let servers = servers.map(|(index, _)| {
            let server = &self.servers[*index];
            (server.ports, server.name.clone())
        });
        let names = listener.names.iter().map(|(index, _)| {
            let named = &self.names[*index];
            (named.server.ports, named.name.to_string())
        });
        let all: Vec<_> = servers.chain(names).collect();
        let of_same_port = all
            .iter()
            .filter_map(|(ports, name)| Some(((*ports)?, name)));
        let mut bound = listener.bind.iter().enumerate();
        let mut bound = bound.by_ref().filter(|_| listener.takes_direct_clients());
        let is_missing = bound.find_map(|(number, bind)| {
            let mut servers = of_same_port.clone();
            servers.find_map(|(ports, server)| {
                let port = missing(bind.ports(), ports)?;
                Some((number, *bind, port, server))
            })
        });
        if let Some((number, bind, port, server)) = is_missing {
            return refuse(
                format!("{bind} has port {port}, which server `{server}` does not listen on"),
                "bind ports of its range alone, or write all of its ports in its `address`",
            )
            .within(key_path!["listener", index, "bind", number]);
        }
        let keeps_together = matches!(listener.balance, Balance::Maglev(HashOn::ClientIp { .. }));
        let is_one = all.len() == 1 && listener.names.is_empty();
        if of_same_port.count() > 0 && !keeps_together && !is_one {
            self.warnings.push(format!(
                "listener `{}`: balance {} can send what a client writes to several ports, such as RTP and RTCP, to several servers; balance = \"maglev\" with hash_on = \"client_ip\" keeps it together",
                listener.name, listener.balance
            ));
        }
        Ok(())
    }
}
