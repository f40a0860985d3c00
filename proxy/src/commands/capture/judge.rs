//! What is wrong with the headers of a capture: each datagram by itself, and in its flow.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use ppv2::{DEFAULT_MAX_HEADER_LEN, Header, Origin, Transport, decode_tagged};

use super::header::Front;
use super::packet::Datagram;

/// Flows that are remembered. It bounds the memory that a capture of many clients takes.
const MAX_FLOWS: usize = 1_000_000;

/// A kind of mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Mistake {
    Missing,
    Twice,
    Split,
    Invalid,
    Family,
    Client,
    Destination,
    Version1,
    TooLong,
    Reply,
}

impl Mistake {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Twice => "twice",
            Self::Split => "split",
            Self::Invalid => "invalid",
            Self::Family => "family",
            Self::Client => "client",
            Self::Destination => "destination",
            Self::Version1 => "v1",
            Self::TooLong => "too long",
            Self::Reply => "reply",
        }
    }

    /// What it leads to, and what to do.
    pub(super) fn advice(self) -> &'static str {
        match self {
            Self::Missing => {
                "receivers drop a datagram without a header. Have the sender write it on each: nginx with \
                 `proxy_requests 1; proxy_responses 1;`, sozu with `proxy_protocol_every_datagram = true`, \
                 ppv2-proxy without `emit = \"first\"`. Or have the receiver remember the first, in \
                 ppv2-proxy and its libraries with `remember`"
            }
            Self::Twice => {
                "two proxies wrote a header each, and receivers take the first proxy for the client. Have the \
                 second read the first one's, in ppv2-proxy with `accept`, or have one write none"
            }
            Self::Split => {
                "a header and its payload must share one datagram. Look for a buffer that is too short in the \
                 sender, and for a sender that writes the header by itself"
            }
            Self::Invalid => {
                "receivers drop the datagram. The sender writes a wrong header: update or report it"
            }
            Self::Family => {
                "receivers of UDP drop a header that names no client over UDP. Have the sender write family and \
                 transport 0x12 (IPv4) or 0x22 (IPv6), or LOCAL for datagrams of its own"
            }
            Self::Client => "no reply can go there. The sender does not know its client's address",
            Self::Destination => {
                "servers that answer from that address, or that choose by it, fail. Bind the sender to an address \
                 in place of a wildcard, or have it read the destination of each datagram"
            }
            Self::Version1 => {
                "receivers of UDP drop it. Have the sender write v2: nginx 1.31.4 or newer with `proxy_protocol v2;`"
            }
            Self::TooLong => {
                "dnsdist, ppv2-proxy and its libraries drop it by default. Have the sender write fewer TLVs"
            }
            Self::Reply => {
                "a reply to an SPP datagram must have the same header in front, and a reply to a PROXY v2 datagram \
                 none, but for one that returns a reply tag"
            }
        }
    }
}

/// What is said of a datagram.
#[derive(Debug)]
pub(super) struct Finding<'a> {
    pub(super) front: Front<'a>,
    pub(super) is_reply: bool,
    pub(super) mistakes: Vec<(Mistake, String)>,
    pub(super) remarks: Vec<&'static str>,
}

/// Datagrams from one address to another.
#[derive(Debug, Default)]
struct Flow {
    /// The packet with its first header.
    header: Option<u64>,
    is_spp: bool,
    /// Datagrams without a header before that.
    bare: u64,
}

/// What is known of the flows so far.
#[derive(Debug, Default)]
pub(super) struct Judge {
    /// Ports to which each datagram must have a header.
    ports: Vec<u16>,
    flows: HashMap<(SocketAddr, SocketAddr), Flow>,
    /// Datagrams whose flow found no room.
    pub(super) unfollowed: u64,
}

impl Judge {
    pub(super) fn new(ports: &[u16]) -> Self {
        Self {
            ports: ports.to_vec(),
            ..Self::default()
        }
    }

    /// Judges `payload`, which is that of `datagram` or a part of it.
    pub(super) fn look<'a>(
        &mut self,
        number: u64,
        datagram: &Datagram<'_>,
        payload: &'a [u8],
    ) -> Finding<'a> {
        let front = Front::read(payload);
        let Datagram { from, to, .. } = *datagram;
        let answered = self.flows.get(&(to, from));
        let (asked_at, asked_by_spp) = answered
            .and_then(|flow| Some((flow.header?, flow.is_spp)))
            .map_or((None, false), |(at, is_spp)| (Some(at), is_spp));
        let own_header = self.flows.get(&(from, to)).and_then(|flow| flow.header);
        let is_reply = asked_at.is_some_and(|asked| own_header.is_none_or(|own| asked < own));
        let mut finding = Finding {
            front,
            is_reply,
            mistakes: Vec::new(),
            remarks: Vec::new(),
        };
        finding.look_at_header(datagram, payload);
        let header = match &finding.front {
            Front::V2(..) => Some(false),
            Front::Spp(..) => Some(true),
            Front::V1(..) | Front::Split(_) | Front::Invalid(_) | Front::Bare(_) => None,
        };
        if is_reply {
            finding.look_at_reply(asked_by_spp, payload);
        }
        let is_bare = matches!(finding.front, Front::Bare(_));
        let must_have = self.ports.contains(&to.port()) && !is_reply;
        match self.flow(from, to) {
            Some(flow) => match (header, flow.header) {
                (Some(is_spp), None) => {
                    let bare = flow.bare;
                    *flow = Flow {
                        header: Some(number),
                        is_spp,
                        bare: 0,
                    };
                    if bare > 0 && !must_have && !is_reply {
                        let text = format!("{bare} datagrams of this flow before had no header");
                        finding.add(Mistake::Missing, text);
                    }
                }
                (None, Some(first)) if is_bare && !is_reply => {
                    let text = format!("no header; the flow's first was in packet {first}");
                    finding.add(Mistake::Missing, text);
                }
                (None, None) if is_bare && must_have => {
                    let text = format!("no header; --port {} wants one", to.port());
                    finding.add(Mistake::Missing, text);
                }
                (None, None) if is_bare => flow.bare += 1,
                _ => {}
            },
            None => self.unfollowed += 1,
        }
        finding
    }

    /// The state of a flow. `None` if there is no room for a new one.
    fn flow(&mut self, from: SocketAddr, to: SocketAddr) -> Option<&mut Flow> {
        let key = (from, to);
        if self.flows.len() >= MAX_FLOWS && !self.flows.contains_key(&key) {
            return None;
        }
        Some(self.flows.entry(key).or_default())
    }
}

impl Finding<'_> {
    fn add(&mut self, mistake: Mistake, text: String) {
        self.mistakes.push((mistake, text));
    }

    fn look_at_header(&mut self, datagram: &Datagram<'_>, payload: &[u8]) {
        let is_local = datagram.from.ip().is_loopback() && datagram.to.ip().is_loopback();
        let mut mistakes = Vec::new();
        let mut behind = None;
        match &self.front {
            Front::V2(header, rest) => {
                behind = Some(*rest);
                mistakes.extend(of_v2(header, is_local));
            }
            Front::Spp(header, rest) => {
                behind = Some(*rest);
                mistakes.extend(of_addresses(header.client, header.proxy, is_local));
            }
            Front::V1(..) => {
                let text = "text of version 1, which is for TCP".to_owned();
                mistakes.push((Mistake::Version1, text));
            }
            Front::Split(_) if datagram.is_cut => {
                self.remarks
                    .push("the capture has only the beginning; use `tcpdump -s 0`");
            }
            Front::Split(_) if datagram.is_fragment => {
                self.remarks.push("the header goes on in another fragment");
            }
            Front::Split(error) => mistakes.push((Mistake::Split, error.to_string())),
            Front::Invalid(error) => mistakes.push((Mistake::Invalid, error.to_string())),
            Front::Bare(_) => {}
        }
        if let Some(second) = behind.map(Front::read).and_then(|front| front.format()) {
            let text = format!("behind the header is another, {second}");
            mistakes.push((Mistake::Twice, text));
        }
        if behind.is_some_and(<[u8]>::is_empty) && !datagram.is_cut {
            self.remarks.push("a header alone, without payload");
        }
        if datagram.is_fragment && self.front.format().is_some() {
            self.remarks.push("the first of several IP fragments: with its header it is longer than the path takes");
        }
        if self.is_reply && decode_tagged(payload).is_ok() {
            self.remarks.push("returns a reply tag");
        }
        self.mistakes.extend(mistakes);
    }

    fn look_at_reply(&mut self, asked_by_spp: bool, payload: &[u8]) {
        let text = match &self.front {
            Front::Bare(_) if asked_by_spp => "a reply without the SPP header of the request",
            Front::V2(..) if asked_by_spp => "a reply with PROXY v2 to a request with SPP",
            Front::V2(..) if decode_tagged(payload).is_err() => "a reply with a header",
            Front::Spp(..) if !asked_by_spp => "a reply with SPP to a request with PROXY v2",
            Front::V2(..) | Front::Spp(..) | Front::V1(..) => return,
            Front::Split(_) | Front::Invalid(_) | Front::Bare(_) => return,
        };
        self.add(Mistake::Reply, text.to_owned());
    }
}

fn of_v2(header: &Header<'_>, is_local: bool) -> Vec<(Mistake, String)> {
    let mut mistakes = Vec::new();
    let mut family = |text: &str| mistakes.push((Mistake::Family, text.to_owned()));
    match header.origin() {
        Origin::Ip {
            transport: Transport::Stream,
            ..
        } => family("the transport is TCP"),
        Origin::Ip {
            source,
            destination,
            ..
        } => {
            let is_mapped = |address: SocketAddr| match address.ip() {
                IpAddr::V6(ip) => ip.to_ipv4_mapped().is_some(),
                IpAddr::V4(_) => false,
            };
            if is_mapped(source) && is_mapped(destination) {
                family("both addresses are IPv4, written as IPv6");
            }
            mistakes.extend(of_addresses(source, destination, is_local));
        }
        Origin::Unix { .. } => family("the addresses are UNIX sockets"),
        Origin::Unspecified => family("the family is unspecified, so it names no client"),
        Origin::Local | _ => {}
    }
    let len = header.as_bytes().len();
    if len > DEFAULT_MAX_HEADER_LEN {
        let text = format!("{len} bytes of header, more than {DEFAULT_MAX_HEADER_LEN}");
        mistakes.push((Mistake::TooLong, text));
    }
    mistakes
}

/// Whether the addresses of a header are some that a client and a listener can have.
/// Packets on loopback may well name loopback addresses.
fn of_addresses(
    client: SocketAddr,
    destination: SocketAddr,
    is_local: bool,
) -> Vec<(Mistake, String)> {
    let fault = |address: SocketAddr| {
        let ip = address.ip().to_canonical();
        let fault = if ip.is_unspecified() {
            "is a wildcard"
        } else if ip.is_loopback() && !is_local {
            "is a loopback address"
        } else if address.port() == 0 {
            "has port 0"
        } else {
            return None;
        };
        Some(format!("{address} {fault}"))
    };
    let client_fault = match client.ip().is_multicast() {
        true => Some(format!("{client} is a multicast address")),
        false => fault(client),
    };
    let client = client_fault.map(|text| (Mistake::Client, format!("client {text}")));
    let destination =
        fault(destination).map(|text| (Mistake::Destination, format!("destination {text}")));
    client.into_iter().chain(destination).collect()
}
