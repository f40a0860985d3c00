//! A configuration with the servers that its names resolve to, as if they had been
//! written there. DNS answers are not trusted: an address that can't be a server, or is
//! this proxy's own, is left out with a remark.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use ipnet::IpNet;

use super::loops::{Bound, Host};
use super::names::{Name, Named};
use super::values::{canonical, is_link_local, scope};
use super::{Bind, Config, Listener, Server};
use ppv2_engine::address::{PortRange, ServerAddr, is_no_host};
use ppv2_engine::upstream::{MAX_SERVERS, MAX_WEIGHT};

/// The most servers that one name resolves to. It bounds what the DNS servers of a
/// name can have the proxy hold, check and count.
pub const MAX_ADDRESSES: usize = 256;

/// The known answers of names.
pub type Answers = BTreeMap<Name, Vec<Answer>>;

/// A server that a name leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Answer {
    /// Where it listens.
    pub address: SocketAddr,
    /// Of SRV records, its share of the sessions, from 1 to
    /// [`MAX_WEIGHT`](ppv2_engine::upstream::MAX_WEIGHT). Those of `dns:` have what the
    /// configuration says.
    pub weight: u16,
    /// Of SRV records, whether others of the name are to be preferred.
    pub backup: bool,
}

/// A configuration with the servers of its names.
#[derive(Clone, Debug)]
pub struct Expanded {
    /// It, with the servers that were written there first.
    pub config: Config,
    /// What the names lead to and is left out, a line for each reason. The same
    /// answers give the same lines.
    pub remarks: Vec<String>,
}

impl Config {
    /// The configuration with the servers that its names lead to by `answers`. Those
    /// of an earlier expansion are gone. A server that is there more than once in an
    /// upstream is what it is first: as it was written, or as the first name says.
    /// Names that have no answer add nothing. Beside `answers`, only the addresses of
    /// this host's interfaces matter.
    #[must_use]
    pub fn expand(&self, answers: &Answers) -> Expanded {
        self.expand_but(answers, |_, _| None)
    }

    /// As [`expand`](Self::expand), without the servers that `refuse` has a reason to
    /// leave out. It is asked of each that could be used otherwise, with the name that
    /// leads there.
    pub(crate) fn expand_but(
        &self,
        answers: &Answers,
        refuse: impl Fn(&Named, SocketAddr) -> Option<String>,
    ) -> Expanded {
        let mut config = self.as_written();
        let mut remarks = Vec::new();
        let mut known: BTreeMap<&str, BTreeSet<ServerAddr>> = BTreeMap::new();
        for server in self.servers.iter().filter(|s| s.found_by.is_none()) {
            let of_upstream = known.entry(&server.upstream).or_default();
            of_upstream.insert(server.id());
        }
        let (host, bound) = (Host::default(), Bound::of(&self.listeners));
        let arrives_at = |address, ports: Option<PortRange>| {
            let found = bound.arrive_at(address, ports, &host);
            let (number, at) = found.into_iter().next()?;
            Some((&self.listeners[number], at))
        };
        let networks = self.source_networks().into_iter();
        let networks: Vec<_> = networks.map(|(_, network)| network.network).collect();
        let mut numbers = Vec::new();
        for named in &self.names {
            let of_upstream = known.entry(&named.server.upstream).or_default();
            let mut left_out = LeftOut::default();
            let first = config.servers.len();
            let mut taken = 0;
            for answer in in_order(answers.get(&named.name).cloned().unwrap_or_default()) {
                let address = ServerAddr(answer.address);
                let mut id = address;
                if named.server.ports.is_some() {
                    id.0.set_port(0);
                }
                if of_upstream.contains(&id) {
                    continue;
                }
                match named.server(answer, arrives_at, &networks) {
                    Err(reason) => left_out.add(reason, address),
                    Ok(_) if taken == MAX_ADDRESSES => left_out.add(
                        format!("no more than {MAX_ADDRESSES} servers of a name are used"),
                        address,
                    ),
                    Ok(_) if of_upstream.len() == MAX_SERVERS => left_out.add(
                        format!("an upstream has {MAX_SERVERS} servers at most"),
                        address,
                    ),
                    Ok(server) => match refuse(named, answer.address) {
                        Some(reason) => left_out.add(reason, address),
                        None => {
                            of_upstream.insert(id);
                            config.servers.push(server);
                            taken += 1;
                        }
                    },
                }
            }
            numbers.push(first..config.servers.len());
            remarks.extend(left_out.remarks(named));
        }
        for listener in &mut config.listeners {
            for (name, mode) in &listener.names {
                let found = numbers[*name].clone().map(|number| (number, *mode));
                listener.servers.extend(found);
            }
        }
        Expanded { config, remarks }
    }

    /// Without the servers of an earlier expansion, which come last.
    pub(crate) fn as_written(&self) -> Self {
        let mut config = self.clone();
        config.servers.retain(|server| server.found_by.is_none());
        let written = config.servers.len();
        for listener in &mut config.listeners {
            listener.servers.retain(|(number, _)| *number < written);
        }
        config
    }
}

/// Each server but once, those that are preferred first, then by address.
pub(crate) fn in_order(mut answers: Vec<Answer>) -> Vec<Answer> {
    for answer in &mut answers {
        answer.address = canonical(answer.address);
    }
    answers.sort_unstable_by_key(|answer| {
        let Answer {
            address,
            weight,
            backup,
        } = *answer;
        (backup, address, Reverse(weight))
    });
    let mut seen = BTreeSet::new();
    answers.retain(|answer| seen.insert(answer.address));
    answers
}

impl Named {
    /// The server that an answer means, unless a listener or a source network is there.
    ///
    /// # Errors
    ///
    /// Why it can't be one.
    fn server<'l>(
        &self,
        answer: Answer,
        arrives_at: impl Fn(SocketAddr, Option<PortRange>) -> Option<(&'l Listener, Bind)>,
        networks: &[IpNet],
    ) -> Result<Server, String> {
        let Answer {
            address,
            weight,
            backup,
        } = answer;
        let ip = address.ip();
        if is_no_host(ip) || address.port() == 0 {
            return Err("no server has such an address".to_owned());
        }
        if is_link_local(ip) && scope(address) == 0 {
            return Err("it is link-local and names no interface".to_owned());
        }
        if let Some((listener, bound)) = arrives_at(address, self.server.ports) {
            return Err(format!(
                "listener `{}` is there, at {bound}: datagrams would loop",
                listener.name
            ));
        }
        if let Some(network) = networks.iter().find(|network| network.contains(&ip)) {
            return Err(format!("source network {network} has its address"));
        }
        let Some(sources) = self.sources.reaching(ip.is_ipv4()) else {
            return Err("`source` has no address of its family".to_owned());
        };
        let weight = match self.name {
            Name::Dns { .. } => self.server.weight,
            Name::Srv { .. } => weight.clamp(1, MAX_WEIGHT),
        };
        let mut server = Server {
            address: ServerAddr(address),
            found_by: Some(self.name.clone()),
            sources: sources.clone(),
            weight,
            backup: self.server.backup || backup,
            ..self.server.clone()
        };
        server.name = server.shown_address();
        Ok(server)
    }
}

/// What a name leads to and is not used: the first address for each reason, and how
/// many there are.
#[derive(Default)]
struct LeftOut(BTreeMap<String, (ServerAddr, usize)>);

impl LeftOut {
    fn add(&mut self, reason: String, address: ServerAddr) {
        self.0.entry(reason).or_insert((address, 0)).1 += 1;
    }

    fn remarks(self, of: &Named) -> impl Iterator<Item = String> {
        let (upstream, name) = (of.server.upstream.clone(), of.name.clone());
        self.0.into_iter().map(move |(reason, (first, count))| {
            let more = match count {
                1 => String::new(),
                _ => format!(" and {} more", count - 1),
            };
            format!("upstream `{upstream}`: `{name}` resolves to {first}{more}, not used: {reason}")
        })
    }
}
