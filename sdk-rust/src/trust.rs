//! Which senders a socket trusts, and the limits of what it remembers.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net};
use thiserror::Error;

/// Clients remembered at once unless configured otherwise. It bounds what a flood of
/// made-up client addresses can make a server allocate: about 10 MB.
const DEFAULT_MAX_CLIENTS: usize = 65_536;

/// How long a silent client is remembered unless configured otherwise: as long as
/// NATs keep a UDP mapping (RFC 4787, section 4.3).
const DEFAULT_FORGET_AFTER: Duration = Duration::from_secs(120);

/// Which senders a socket trusts: the networks whose datagrams must carry a header,
/// what to do with all other senders, and how much to remember.
///
/// Trust has no default. A host in a trusted network can speak for any client. So
/// name the addresses of the proxies, as few as possible, and make sure that no
/// other host can send from them.
///
/// # Example
///
/// ```
/// use std::time::Duration;
/// use ppv2_sdk::{Trust, TrustError, Untrusted};
///
/// let trust = Trust::networks(["192.0.2.1", "2001:db8:1::/64"])
///     .untrusted(Untrusted::Accept)
///     .max_clients(10_000)
///     .forget_after(Duration::from_secs(30))
///     .build()?;
///
/// let mistake = Trust::networks(["192.0.2.1"]).max_clients(0).build();
/// assert_eq!(mistake.unwrap_err(), TrustError::MaxClients);
/// # Ok::<(), ppv2_sdk::TrustError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Trust {
    networks: Vec<IpNet>,
    pub(crate) settings: Settings,
}

/// Collects the settings of a [`Trust`]; [`build`](Self::build) checks them.
#[derive(Clone, Debug)]
#[must_use = "it does nothing until it is built"]
pub struct TrustBuilder {
    networks: Vec<String>,
    settings: Settings,
}

/// All of a [`Trust`] but its networks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    pub(crate) formats: Formats,
    pub(crate) untrusted: Untrusted,
    pub(crate) reply_from: ReplyFrom,
    pub(crate) max_header_len: usize,
    pub(crate) max_clients: usize,
    pub(crate) forget_after: Duration,
    pub(crate) remember: Option<RememberSenders>,
    pub(crate) header_alone: HeaderAlone,
}

/// The formats that trusted senders may write headers in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Formats {
    pub(crate) v2: bool,
    pub(crate) spp: bool,
}

/// How long, and of how many senders at most, the clients that they speak for are remembered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RememberSenders {
    pub(crate) idle: Duration,
    pub(crate) max: usize,
}

/// How a header is written; see [`TrustBuilder::formats`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// PROXY protocol version 2
    /// ([specification](https://www.haproxy.org/download/3.4/doc/proxy-protocol.txt)).
    V2,
    /// Simple Proxy Protocol ([`ppv2::spp`]), which Cloudflare Spectrum and Tencent EdgeOne
    /// send: 38 bytes in front of each datagram, and the same 38 bytes in front of each
    /// reply, which the sockets here write. It has no TLVs.
    Spp,
}

/// What to do with a header without payload while
/// [`remember_senders`](TrustBuilder::remember_senders) is set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum HeaderAlone {
    /// It says for which client its sender speaks, and nothing else: it is not delivered,
    /// and counted as [`DropReason::HeaderAlone`](crate::DropReason::HeaderAlone).
    /// Cloudflare Spectrum begins with one.
    #[default]
    Announce,
    /// It is an empty datagram of the client's as well, and delivered.
    Deliver,
}

/// Where the replies to clients behind a proxy leave from. Direct clients, and
/// proxies that speak for themselves, are always answered by the socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ReplyFrom {
    /// They are sent to the proxy, which passes them on.
    #[default]
    Proxy,
    /// They are sent straight to the client, from the listener's address and port
    /// that the header names as destination. The proxy never sees them; it runs
    /// with `mode = "dsr"` and `rewrite_on = "sdk"`.
    ///
    /// This host needs the right to send from that address, by one of these means, tried
    /// in this order at the first reply:
    ///
    /// | the listener's address | needs |
    /// |---|---|
    /// | is one of this host's, as after `ip addr add 198.51.100.10/32 dev lo` | nothing; this host then can't reach the listener itself |
    /// | is an IPv6 one, on Linux (IPV6_FREEBIND, ipv6(7)) | nothing |
    /// | is any, on Linux (IP_TRANSPARENT, ip(7)) | CAP_NET_RAW or CAP_NET_ADMIN |
    ///
    /// For a listener whose port is the socket's own, replies leave by that socket
    /// with the listener's address as packet information (Linux alone), for which
    /// it is given the option named above. For any other port a socket is bound
    /// to the listener's address. It takes none of the host's datagrams away from
    /// others: on Linux it is connected to a port of this host that nobody sends
    /// from, elsewhere it can be bound only where nobody else is. It keeps that
    /// address and port from those who don't share it (SO_REUSEADDR), and has the
    /// system's defaults rather than the options of the socket. A port below 1024
    /// needs CAP_NET_BIND_SERVICE.
    ///
    /// Nothing can be sent from a destination that is no single host's: a multicast
    /// address or, on Linux, a broadcast address of this host's networks. Replies
    /// then fail with `InvalidInput`. A broadcast address of another network looks
    /// like any other: have the proxy listen at addresses of its own.
    ///
    /// 64 such sockets are kept; then the one longest unused makes room for
    /// another, counted in [`Stats::listeners_evicted`](crate::Stats::listeners_evicted).
    ///
    /// ICMP errors go to the listener's host, "too big" among them: where a path
    /// to clients is narrower than this host's network, its size belongs into the
    /// route (`ip route replace default via GATEWAY mtu 1280`).
    Listener,
}

/// What to do with a datagram from outside the trusted networks. The socket never
/// looks for a header in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Untrusted {
    /// Drop it, counted as [`DropReason::Untrusted`](crate::DropReason::Untrusted).
    #[default]
    Drop,
    /// Deliver it: its sender is a direct client, all of its bytes are payload, and
    /// replies go straight back.
    ///
    /// A sender's address proves nothing. A host that forges the address of a client
    /// behind a proxy could otherwise speak as that client, and draw its replies off
    /// the proxy. So a proxy's word has priority. While a client is remembered from a
    /// proxy, the socket drops datagrams that come directly from the same address and
    /// port, counted as [`DropReason::DirectConflict`](crate::DropReason::DirectConflict).
    /// A proxy that names a client known as a direct one takes over the replies to it.
    /// Direct clients have a table of their own, so that they can't crowd out those
    /// behind a proxy.
    Accept,
}

/// Why [`TrustBuilder::build`] failed.
#[derive(Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum TrustError {
    /// A trusted network is neither a network nor an address.
    #[error(
        "trusted network {value:?} is not a network; write it as 192.0.2.0/24, 2001:db8::/32 or 192.0.2.1"
    )]
    Network {
        /// The text that was given.
        value: String,
    },

    /// A trusted network has bits set behind its prefix, so that it is unclear
    /// whether the network or the one address was meant.
    #[error(
        "trusted network {value:?} has bits set behind its prefix; write {network} for the network or {address} for the address alone"
    )]
    HostBits {
        /// The text that was given.
        value: String,
        /// The network with those bits cleared.
        network: IpNet,
        /// The address without the prefix length.
        address: IpAddr,
    },

    /// No network is trusted and other senders are dropped: the socket would never
    /// receive anything.
    #[error(
        "no trusted network is given and untrusted senders are dropped, so nothing would ever be received; name the proxy's address, or accept untrusted senders"
    )]
    NoSender,

    /// [`TrustBuilder::max_header_len`] is below the shortest header that names a client.
    #[error(
        "max_header_len is {value}, a header that names a client has at least {} bytes; leave it at {} or raise it",
        ppv2::IPV4_HEADER_LEN,
        ppv2::DEFAULT_MAX_HEADER_LEN
    )]
    MaxHeaderLen {
        /// The number that was given.
        value: usize,
    },

    /// [`TrustBuilder::max_clients`] is 0.
    #[error("max_clients is 0, so no client could be answered; allow at least 1")]
    MaxClients,

    /// [`TrustBuilder::forget_after`] is 0.
    #[error("forget_after is 0, so no client could be answered; use a second or more")]
    ForgetAfter,

    /// [`TrustBuilder::formats`] names none.
    #[error("formats names none, so every datagram of a trusted sender would be dropped; name v2")]
    Formats,

    /// [`TrustBuilder::remember_senders`] was given 0.
    #[error(
        "remember_senders has an idle time or a number of senders of 0, so nothing would be remembered; leave it out, or use a second and one sender or more"
    )]
    RememberSenders,

    /// [`TrustBuilder::remember_senders`] is set, and [`TrustBuilder::formats`] names
    /// SPP, whose two bytes of magic don't tell a header from a payload.
    #[error(
        "remember_senders and format spp exclude each other: an SPP header is on every datagram, and its magic of two bytes can't be told from a payload; allow v2 alone, or leave remember_senders out"
    )]
    RememberSpp,
}

message_as_debug!(TrustError);

impl From<TrustError> for io::Error {
    fn from(error: TrustError) -> Self {
        Self::new(io::ErrorKind::InvalidInput, error)
    }
}

impl Trust {
    /// Begins a trust in these networks: `192.0.2.0/24`, `2001:db8::/32`, or a single
    /// address, as text or as a type that prints one, such as [`IpAddr`].
    ///
    /// An IPv4 network stands for the same addresses on a dual-stack IPv6 socket;
    /// `::/0` does not include them.
    ///
    /// # Example
    ///
    /// ```
    /// use ppv2_sdk::Trust;
    ///
    /// let error = Trust::networks(["192.0.2.1/24"]).build().unwrap_err();
    /// assert_eq!(
    ///     error.to_string(),
    ///     "trusted network \"192.0.2.1/24\" has bits set behind its prefix; \
    ///      write 192.0.2.0/24 for the network or 192.0.2.1 for the address alone",
    /// );
    /// ```
    pub fn networks<I>(networks: I) -> TrustBuilder
    where
        I: IntoIterator<Item: ToString>,
    {
        TrustBuilder {
            networks: networks.into_iter().map(|one| one.to_string()).collect(),
            settings: Settings {
                formats: Formats {
                    v2: true,
                    spp: false,
                },
                untrusted: Untrusted::default(),
                reply_from: ReplyFrom::default(),
                max_header_len: ppv2::DEFAULT_MAX_HEADER_LEN,
                max_clients: DEFAULT_MAX_CLIENTS,
                forget_after: DEFAULT_FORGET_AFTER,
                remember: None,
                header_alone: HeaderAlone::default(),
            },
        }
    }

    /// Whether a peer of this canonical address is trusted.
    pub(crate) fn includes(&self, ip: IpAddr) -> bool {
        self.networks.iter().any(|network| network.contains(&ip))
    }
}

impl TrustBuilder {
    /// Sets what to do with datagrams from outside the trusted networks;
    /// [`Untrusted::Drop`] unless set.
    pub fn untrusted(mut self, untrusted: Untrusted) -> Self {
        self.settings.untrusted = untrusted;
        self
    }

    /// Sets where replies to clients behind a proxy leave from;
    /// [`ReplyFrom::Proxy`] unless set.
    ///
    /// # Example
    ///
    /// ```no_run
    /// use ppv2_sdk::{ReplyFrom, Trust, UdpSocket};
    ///
    /// let trust = Trust::networks(["192.0.2.1"]).reply_from(ReplyFrom::Listener).build()?;
    /// let socket = UdpSocket::bind("0.0.0.0:9001", trust)?;
    /// let mut buffer = [0; 1500];
    /// let (len, client) = socket.recv_from(&mut buffer)?;
    /// // To the client itself, from the address that it wrote to.
    /// socket.send_to(&buffer[..len], client)?;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    pub fn reply_from(mut self, reply_from: ReplyFrom) -> Self {
        self.settings.reply_from = reply_from;
        self
    }

    /// Sets the formats that headers of trusted senders may have; [`Format::V2`] alone
    /// unless set.
    ///
    /// Nothing is guessed: each datagram of a trusted sender must begin with a header of
    /// one of these. Where several are named, the first bytes tell which it is: 12 bytes of
    /// signature open a v2 header, two bytes of magic an SPP header.
    ///
    /// # Example
    ///
    /// ```
    /// use std::time::Instant;
    /// use ppv2_sdk::{Demux, Format, Trust};
    ///
    /// let trust = Trust::networks(["192.0.2.1"]).formats([Format::Spp]).build()?;
    /// let demux = Demux::new(trust);
    /// let header = ppv2::spp::SppHeader {
    ///     client: "203.0.113.11:54321".parse().unwrap(),
    ///     proxy: "198.51.100.10:9000".parse().unwrap(),
    /// };
    /// let request = [&header.to_bytes()[..], b"ping"].concat();
    ///
    /// let proxy = "192.0.2.1:40000".parse().unwrap();
    /// let datagram = demux.receive(Instant::now(), proxy, None, &request).unwrap();
    /// assert_eq!(datagram.client, header.client);
    /// assert_eq!(datagram.payload, b"ping");
    ///
    /// // The sockets of this crate write it by themselves.
    /// assert_eq!(&datagram.reply_path.header()[..], header.to_bytes());
    /// # Ok::<(), ppv2_sdk::TrustError>(())
    /// ```
    pub fn formats(mut self, formats: impl IntoIterator<Item = Format>) -> Self {
        let mut named = Formats {
            v2: false,
            spp: false,
        };
        for format in formats {
            match format {
                Format::V2 => named.v2 = true,
                Format::Spp => named.spp = true,
            }
        }
        self.settings.formats = named;
        self
    }

    /// Lets trusted senders say a header once: a datagram without one belongs to the client
    /// that the latest header from the same address and port named, if the sender's latest
    /// datagram is not older than `idle`. Off unless set.
    ///
    /// For senders that put the header in front of the first datagram of a session alone,
    /// such as nginx, frp 0.67 and later, and `emit = "first"` of ppv2-proxy, or that send it
    /// in a datagram of its own, as Cloudflare Spectrum does.
    ///
    /// This is outside the specification, which requires a header in each datagram
    /// ([HAProxy 3.4's text](https://www.haproxy.org/download/3.4/doc/proxy-protocol.txt)),
    /// and it costs certainty:
    ///
    /// - A sender hands a port on to its next client. If the datagram with that client's
    ///   header is lost or comes late, the next ones are taken for the client that had the
    ///   port before. Set `idle` above the time for which the sender keeps a silent session,
    ///   and below that after which it uses a port again.
    /// - Whatever begins with the signature of a header is read as one. A client can send
    ///   that in a datagram which its sender passes on without header, and so speak as any
    ///   client. Trust only senders that drop such datagrams (ppv2-proxy does, as
    ///   `forged_header`), or clients that don't forge.
    ///
    /// - A server that restarts has forgotten all senders. It drops their datagrams until they
    ///   say a header again: ppv2-proxy does so after three seconds without an answer, and
    ///   every so often with `repeat`; others do in their next session.
    ///
    /// At most `max` senders are remembered, at about 100 bytes each. At `max`, those that
    /// are remembered keep their place. The header of another is delivered and counted in
    /// [`Stats::senders_not_remembered`](crate::Stats::senders_not_remembered), and its
    /// datagrams without header are dropped as
    /// [`DropReason::NoHeader`](crate::DropReason::NoHeader).
    ///
    /// | datagram of a trusted sender | is | and from then on the sender speaks for |
    /// |---|---|---|
    /// | header of a UDP client, with payload | delivered | that client |
    /// | the same, without payload | what [`header_alone`](Self::header_alone) says | that client |
    /// | the same, with a reply tag | delivered | nobody: its address stands for many clients |
    /// | LOCAL header | delivered, as from the sender itself | nobody |
    /// | header of any other kind, or malformed; v1 text | dropped | nobody |
    /// | no header | delivered, or dropped if it speaks for nobody | the same client as before |
    ///
    /// A datagram without header has no TLVs: those come with the header alone.
    ///
    /// # Example
    ///
    /// ```
    /// use std::time::{Duration, Instant};
    /// use ppv2_sdk::{Demux, DropReason, Trust};
    ///
    /// let trust = Trust::networks(["192.0.2.1"]);
    /// let trust = trust.remember_senders(Duration::from_secs(30), 100_000);
    /// let demux = Demux::new(trust.build()?);
    /// let now = Instant::now();
    /// let proxy = "192.0.2.1:40000".parse().unwrap();
    /// let bytes = b"\r\n\r\n\0\r\nQUIT\n\x21\x12\x00\x0c\
    ///               \xcb\x00\x71\x0b\xc6\x33\x64\x0a\xd4\x31\x23\x28hello";
    ///
    /// let first = demux.receive(now, proxy, None, bytes).unwrap();
    /// let second = demux.receive(now, proxy, None, b"again").unwrap();
    /// assert_eq!((second.client, second.payload), (first.client, &b"again"[..]));
    ///
    /// let later = now + Duration::from_secs(30);
    /// let third = demux.receive(later, proxy, None, b"late");
    /// assert_eq!(third, Err(DropReason::NoHeader));
    /// # Ok::<(), ppv2_sdk::TrustError>(())
    /// ```
    pub fn remember_senders(mut self, idle: Duration, max: usize) -> Self {
        self.settings.remember = Some(RememberSenders { idle, max });
        self
    }

    /// Sets what to do with a header without payload while
    /// [`remember_senders`](Self::remember_senders) is set; [`HeaderAlone::Announce`] unless
    /// set. Otherwise such a header is always an empty datagram of its client's.
    pub fn header_alone(mut self, header_alone: HeaderAlone) -> Self {
        self.settings.header_alone = header_alone;
        self
    }

    /// Sets the longest PROXY v2 header to accept, TLVs included; 512 bytes unless set.
    /// The socket drops longer ones as
    /// [`DropReason::HeaderTooLong`](crate::DropReason::HeaderTooLong).
    pub fn max_header_len(mut self, bytes: usize) -> Self {
        self.settings.max_header_len = bytes;
        self
    }

    /// Sets how many clients are remembered; 65,536 unless set. Beyond that a new
    /// client replaces the one that has been silent for longest. Clients behind
    /// proxies and direct clients are counted separately.
    pub fn max_clients(mut self, clients: usize) -> Self {
        self.settings.max_clients = clients;
        self
    }

    /// Sets for how long a client is remembered after its latest datagram; 120
    /// seconds unless set. Sending to a client does not prolong it. After the address
    /// of its proxy has named another client, the time is
    /// [`FORMER_CLIENT_GRACE`](crate::FORMER_CLIENT_GRACE) at most.
    pub fn forget_after(mut self, idle: Duration) -> Self {
        self.settings.forget_after = idle;
        self
    }

    /// Checks the settings.
    ///
    /// # Errors
    ///
    /// A [`TrustError`] that names the value and what to write instead.
    pub fn build(self) -> Result<Trust, TrustError> {
        let settings = self.settings;
        let parsed: Result<Vec<_>, _> = self.networks.iter().map(|text| parse(text)).collect();
        let networks = parsed?;
        if networks.is_empty() && settings.untrusted == Untrusted::Drop {
            return Err(TrustError::NoSender);
        }
        if settings.max_header_len < ppv2::IPV4_HEADER_LEN {
            let value = settings.max_header_len;
            return Err(TrustError::MaxHeaderLen { value });
        }
        if settings.max_clients == 0 {
            return Err(TrustError::MaxClients);
        }
        if settings.forget_after.is_zero() {
            return Err(TrustError::ForgetAfter);
        }
        if !(settings.formats.v2 || settings.formats.spp) {
            return Err(TrustError::Formats);
        }
        if let Some(RememberSenders { idle, max }) = settings.remember {
            if settings.formats.spp {
                return Err(TrustError::RememberSpp);
            }
            if idle.is_zero() || max == 0 {
                return Err(TrustError::RememberSenders);
            }
        }
        Ok(Trust { networks, settings })
    }
}

fn parse(text: &str) -> Result<IpNet, TrustError> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(unmapped(address.into()));
    }
    let value = || text.to_owned();
    let network: IpNet = text
        .parse()
        .map_err(|_| TrustError::Network { value: value() })?;
    if network.addr() != network.network() {
        return Err(TrustError::HostBits {
            value: value(),
            network: network.trunc(),
            address: network.addr(),
        });
    }
    Ok(unmapped(network))
}

/// A network of v4-mapped IPv6 addresses as the IPv4 network that it is, since
/// peers are compared in that form.
fn unmapped(network: IpNet) -> IpNet {
    const MAPPED_PREFIX: u8 = 96;
    let IpNet::V6(v6) = network else {
        return network;
    };
    let v4 = v6
        .prefix_len()
        .checked_sub(MAPPED_PREFIX)
        .zip(v6.addr().to_ipv4_mapped())
        .and_then(|(prefix, address): (u8, Ipv4Addr)| Ipv4Net::new(address, prefix).ok());
    v4.map_or(network, IpNet::V4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn message(network: &str) -> String {
        Trust::networks([network]).build().unwrap_err().to_string()
    }

    #[test]
    fn takes_networks_and_addresses_of_both_families() {
        let trust = Trust::networks(["192.0.2.0/24", "198.51.100.7", "2001:db8::/32", "::1"])
            .build()
            .unwrap();
        for inside in [
            "192.0.2.0",
            "192.0.2.255",
            "198.51.100.7",
            "2001:db8::9",
            "::1",
        ] {
            assert!(trust.includes(inside.parse().unwrap()), "{inside}");
        }
        for outside in ["192.0.3.0", "198.51.100.8", "2001:db9::", "::2", "0.0.0.1"] {
            assert!(!trust.includes(outside.parse().unwrap()), "{outside}");
        }
    }

    #[test]
    fn a_mapped_network_means_the_ipv4_network() {
        let trust = Trust::networks(["::ffff:192.0.2.0/120", "::ffff:198.51.100.7"])
            .build()
            .unwrap();
        assert!(trust.includes("192.0.2.9".parse().unwrap()));
        assert!(trust.includes("198.51.100.7".parse().unwrap()));
        assert!(!trust.includes("192.0.3.9".parse().unwrap()));
    }

    #[test]
    fn all_ipv6_addresses_do_not_include_the_ipv4_ones() {
        let trust = Trust::networks(["::/0"]).build().unwrap();
        assert!(!trust.includes("192.0.2.9".parse().unwrap()));
    }

    #[test]
    fn errors_name_the_value_and_the_fix() {
        assert_eq!(
            message("10.0.0.300"),
            "trusted network \"10.0.0.300\" is not a network; \
             write it as 192.0.2.0/24, 2001:db8::/32 or 192.0.2.1",
        );
        assert!(message("").contains("\"\" is not a network"));
        assert!(message("192.0.2.0/33").contains("\"192.0.2.0/33\""));
        assert!(message("localhost").contains("\"localhost\""));
        assert!(message("2001:db8::1/32").contains("write 2001:db8::/32 for the network"));
    }

    /// What `fn main() -> Result<(), TrustError>` or `io::Result<()>` prints.
    #[test]
    fn an_error_that_main_returns_is_its_message() {
        let error = Trust::networks(["localhost"]).build().unwrap_err();
        let message = error.to_string();
        assert_eq!(format!("{error:?}"), message);
        let error = io::Error::from(error);
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        let error = format!("{error:?}");
        assert!(error.contains(&message), "{error}");
    }

    #[test]
    fn build_refuses_settings_that_can_not_work() {
        let error = |trust: TrustBuilder| trust.build().err();
        let none: [&str; 0] = [];
        let no_sender = Trust::networks(none);
        assert_eq!(error(no_sender.clone()), Some(TrustError::NoSender));
        assert_eq!(error(no_sender.untrusted(Untrusted::Accept)), None);

        let trust = || Trust::networks(["192.0.2.1"]);
        assert_eq!(error(trust()), None);
        assert_eq!(error(trust().max_header_len(28)), None);
        let too_short = Some(TrustError::MaxHeaderLen { value: 27 });
        assert_eq!(error(trust().max_header_len(27)), too_short);
        assert_eq!(error(trust().max_clients(0)), Some(TrustError::MaxClients));
        let zero = trust().forget_after(Duration::ZERO);
        assert_eq!(error(zero), Some(TrustError::ForgetAfter));

        assert_eq!(error(trust().formats([])), Some(TrustError::Formats));
        let spp = || trust().formats([Format::Spp]);
        assert_eq!(error(spp()), None);
        let idle = Duration::from_secs(30);
        assert_eq!(error(trust().remember_senders(idle, 1)), None);
        for useless in [
            trust().remember_senders(idle, 0),
            trust().remember_senders(Duration::ZERO, 1),
        ] {
            assert_eq!(error(useless), Some(TrustError::RememberSenders));
        }
        for both in [spp(), trust().formats([Format::V2, Format::Spp])] {
            let both = both.remember_senders(idle, 1);
            assert_eq!(error(both), Some(TrustError::RememberSpp));
        }
    }
}
