//! Headers in: what a listener with `accept` makes of the datagrams of other proxies, by what
//! servers and clients get, through chains of our own and of foreign programs.

use std::net::{SocketAddr, UdpSocket};

use ppv2_lab::service::Proxy;
use ppv2_lab::*;

mod bursts;
mod chains;
mod filters;
mod hostile;
mod in_front;
mod own_replies;
mod remember;
mod spp;
mod tlvs;
mod unwrapper;

/// Where trusted senders are, and others.
const SENDER: &str = "127.0.0.2";
const STRANGER: &str = "127.0.0.3";

const CLIENT: &str = "203.0.113.11:54321";
const OTHER_CLIENT: &str = "203.0.113.12:54321";
const CLIENT_V6: &str = "[2001:db8::11]:54321";
/// Where clients write to.
const VIP: &str = "198.51.100.10:9000";
const VIP_V6: &str = "[2001:db8:a::10]:9000";

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// A listener and its upstream of one server.
fn config(
    listener: SocketAddr,
    server: SocketAddr,
    of_listener: &str,
    of_upstream: &str,
) -> String {
    format!(
        "[[listener]]\nname = \"l\"\nbind = [\"{listener}\"]\nupstream = \"u\"\n{of_listener}\n\
         [upstream.u]\nservers = [\"{server}\"]\n{of_upstream}\n"
    )
}

/// A setting of a listener: headers are accepted from `from`.
fn accept(from: &str, keys: &str) -> String {
    let comma = if keys.is_empty() { "" } else { ", " };
    format!("accept = {{ from = [\"{from}\"]{comma}{keys} }}")
}

/// A proxy that accepts headers from [`SENDER`], and its server.
struct In {
    proxy: Proxy,
    listener: SocketAddr,
    server: UdpSocket,
}

impl In {
    /// `keys` are those of `accept`.
    fn start(keys: &str) -> Self {
        Self::with(keys, "", "")
    }

    fn with(keys: &str, of_listener: &str, of_upstream: &str) -> Self {
        let (listener, server) = (address("127.0.0.1"), socket("127.0.0.1"));
        let of_listener = format!("{}\n{of_listener}", accept(SENDER, keys));
        let to = server.local_addr().unwrap();
        Self {
            proxy: Proxy::start(&config(listener, to, &of_listener, of_upstream)),
            listener,
            server,
        }
    }

    /// The next datagram at the server: client, destination and payload by its only header,
    /// which has no TLV, and where it came from.
    #[track_caller]
    fn next(&self) -> (SocketAddr, SocketAddr, Vec<u8>, SocketAddr) {
        let (datagram, session) = receive(&self.server);
        let (client, destination, payload) = read_plain_header(&datagram);
        (client, destination, payload, session)
    }

    /// Asserts what comes next to the server, and returns where it came from.
    #[track_caller]
    fn gets(&self, client: SocketAddr, destination: SocketAddr, payload: &[u8]) -> SocketAddr {
        let next = self.next();
        assert_eq!((next.0, next.1), (client, destination));
        assert!(
            next.2 == payload,
            "{:?} for {:?}",
            String::from_utf8_lossy(&next.2),
            String::from_utf8_lossy(payload)
        );
        next.3
    }

    fn answers(&self, session: SocketAddr, answer: &[u8]) {
        self.server.send_to(answer, session).unwrap();
    }

    fn dropped(&self, reason: &str) -> u64 {
        dropped_by(&self.proxy, reason)
    }

    /// A counter of the listener.
    fn count(&self, name: &str) -> u64 {
        count_of(&self.proxy, name)
    }

    #[track_caller]
    fn eventually_dropped(&self, reason: &str, times: u64) {
        eventually(reason, || self.dropped(reason) >= times);
        assert_eq!(self.dropped(reason), times, "{reason}");
    }
}

fn dropped_by(proxy: &Proxy, reason: &str) -> u64 {
    let name = "ppv2_dropped_datagrams_total";
    proxy.metric(&format!("{name}{{listener=\"l\",reason=\"{reason}\"}}"))
}

fn count_of(proxy: &Proxy, name: &str) -> u64 {
    proxy.metric(&format!("{name}{{listener=\"l\"}}"))
}

/// All drops, by their reasons.
fn all_dropped(proxy: &Proxy) -> Vec<(String, u64)> {
    let (_, metrics) = http_get(proxy.admin, "/metrics");
    let name = "ppv2_dropped_datagrams_total{listener=\"l\",reason=\"";
    metrics
        .lines()
        .filter_map(|line| line.strip_prefix(name)?.split_once("\"} "))
        .map(|(reason, count)| (reason.to_owned(), count.parse().unwrap()))
        .filter(|(_, count)| *count > 0)
        .collect()
}

/// Client, destination and payload of a datagram whose header has no TLVs.
#[track_caller]
fn read_plain_header(datagram: &[u8]) -> (SocketAddr, SocketAddr, Vec<u8>) {
    let (header, payload) = ppv2::decode(datagram).unwrap();
    assert!(header.tlvs().is_empty(), "{:?}", header.tlvs());
    let (client, destination) = (header.client(), header.destination());
    (client.unwrap(), destination.unwrap(), payload.to_vec())
}
