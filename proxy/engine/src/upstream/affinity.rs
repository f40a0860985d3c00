//! What of a client decides which server it gets, and the hash that does.
//!
//! The hash is fixed for ever: proxies on other machines, of other versions and
//! of other architectures must come to the same server. That is why it has no
//! secret key, unlike the one that finds sessions, and everybody can compute it.
//!
//! ```text
//! step(x):  x += 0x9e3779b97f4a7c15
//!           x ^= x >> 30;  x *= 0xbf58476d1ce4e5b9
//!           x ^= x >> 27;  x *= 0x94d049bb133111eb
//!           x ^= x >> 31                              (SplitMix64)
//! hash(purpose, words):  h = purpose;  for each word: h = step(h ^ word)
//! scale(h, n):           h × n / 2⁶⁴, in 128 bits
//! ```
//!
//! All of it in 64 bits that wrap. An address is two words, those of the IPv6
//! address, or of `::ffff:a.b.c.d` for IPv4, the upper half first; a port is a
//! third. The number of an interface is left out, since it differs between
//! machines.
//!
//! # What clients gain by choosing their address
//!
//! Who has many addresses can pick those that lead to one server and load that
//! one alone, where round robin would have spread the load. A secret in the hash
//! would hinder it little: a client learns which of its addresses meet at a server
//! from the answers, or from how soon they come. What bounds it is the number of
//! addresses that count as different: [`HashOn::ClientIp`] leaves one host one
//! server whatever its ports, and the prefix makes one of all IPv6 addresses that
//! a host can take. Where clients are hostile and many, and need no affinity, the
//! other balancers don't look at addresses at all.

use std::net::SocketAddr;

use crate::address::{ClientAddr, ServerAddr, network_bits};

/// What of a client is hashed. Clients of which it is the same share a server
/// and nothing else: their sessions are two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HashOn {
    /// The IP address, of IPv6 so many leading bits.
    ClientIp {
        /// From 1 to 128.
        ipv6_prefix: u8,
    },
    /// The IP address and the port.
    ClientAddr,
}

/// What a hash is for, so that one address has hashes that are unrelated.
#[derive(Clone, Copy)]
enum Purpose {
    /// Which slots a server prefers.
    Server = 1,
    /// Where a client looks.
    Client = 2,
}

impl HashOn {
    /// The hash of what counts of `client`.
    pub(super) fn hash(self, client: ClientAddr) -> u64 {
        match self {
            Self::ClientAddr => hash(Purpose::Client, &words(client.0)),
            Self::ClientIp { ipv6_prefix } => {
                let (upper, lower) = halves(network_bits(client.0.ip(), ipv6_prefix));
                hash(Purpose::Client, &[upper, lower])
            }
        }
    }
}

/// The hash of a server's address.
pub(super) fn hash_server(server: ServerAddr) -> u64 {
    hash(Purpose::Server, &words(server.0))
}

/// Maps a hash to a number below `n`.
#[expect(clippy::cast_possible_truncation, reason = "it is less than n")]
pub(super) fn scale(hash: u64, n: u32) -> u32 {
    ((u128::from(hash) * u128::from(n)) >> 64) as u32
}

/// One step of SplitMix64 from the state `x`: a bijection that mixes well.
pub(super) fn step(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn hash(purpose: Purpose, words: &[u64]) -> u64 {
    words
        .iter()
        .fold(purpose as u64, |hash, word| step(hash ^ word))
}

fn words(address: SocketAddr) -> [u64; 3] {
    let (upper, lower) = halves(network_bits(address.ip(), 128));
    [upper, lower, u64::from(address.port())]
}

#[expect(clippy::cast_possible_truncation, reason = "the two halves")]
fn halves(bits: u128) -> (u64, u64) {
    ((bits >> 64) as u64, bits as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on_ip(ipv6_prefix: u8, client: &str) -> u64 {
        let client = ClientAddr(client.parse().unwrap());
        HashOn::ClientIp { ipv6_prefix }.hash(client)
    }

    #[test]
    fn the_prefix_is_of_ipv6_alone_and_the_port_counts_only_where_asked() {
        assert_eq!(on_ip(64, "192.0.2.1:1"), on_ip(64, "192.0.2.1:65535"));
        assert_ne!(on_ip(1, "192.0.2.1:1"), on_ip(1, "192.0.2.2:1"));
        assert_eq!(on_ip(1, "192.0.2.1:1"), on_ip(64, "[::ffff:192.0.2.1]:1"));
        let (a, b, c) = (
            "[2001:db8::1]:1",
            "[2001:db8::ffff:2]:1",
            "[2001:db8:0:1::1]:1",
        );
        assert_eq!(on_ip(64, a), on_ip(64, b));
        assert_ne!(on_ip(64, a), on_ip(64, c));
        assert_eq!(on_ip(63, a), on_ip(63, c));
        assert_ne!(on_ip(128, a), on_ip(128, b));
        assert_eq!(on_ip(128, a), on_ip(128, "[2001:db8::1%3]:9"));
        let whole = |client: &str| HashOn::ClientAddr.hash(ClientAddr(client.parse().unwrap()));
        assert_ne!(whole("192.0.2.1:1"), whole("192.0.2.1:2"));
        assert_ne!(whole(a), whole(b));
    }
}
