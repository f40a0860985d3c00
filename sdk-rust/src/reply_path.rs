//! Where a reply goes, and what stands in front of it.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::ops::Deref;

use ppv2::{MAX_TAGGED_HEADER_LEN, ReplyTag, spp};

use crate::address::{Compact, canonical};
use crate::clock::{Span, Tick};
use crate::{Datagram, DatagramRef, FORMER_CLIENT_GRACE};

/// The path of a reply to a client: which address it is sent to, and from which.
///
/// Each datagram has the path of a reply to it. [`Demux::reply_path`] returns that of
/// a client's latest datagram. The sockets of this crate keep to the addresses in it
/// by themselves; they are public for sockets of other kinds. Those must put
/// [`header`](Self::header) in front of each reply too.
///
/// Two paths are equal if replies by them are sent to the same address from the same
/// address, and reach the client from the same listener where the proxy is told it.
///
/// [`Demux::reply_path`]: crate::Demux::reply_path
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct ReplyPath {
    /// The address to send to: the peer as the socket reported it, or with
    /// [`from`](Self::from) the client itself, an IPv4 one never in IPv6 form.
    pub to: SocketAddr,
    /// The listener's address and port, which the reply must leave from, an IPv4
    /// one never in IPv6 form: set with
    /// [`ReplyFrom::Listener`](crate::ReplyFrom::Listener) for a client that a
    /// header names. `None`: the reply leaves by the socket that received.
    pub from: Option<SocketAddr>,
    /// The address of this host that the datagram was sent to, and that the reply
    /// must leave from: known for sockets that are bound to all addresses. `None`:
    /// the system chooses the address.
    pub local: Option<IpAddr>,
    pub(crate) client: SocketAddr,
    /// When the datagram came.
    pub(crate) heard: Tick,
    /// The reply names its client, as the datagram's header asks for.
    pub(crate) naming: Option<Naming>,
}

/// What the header of a reply that names its client says besides the client. In as little
/// room as can be, since it is remembered for each client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Naming {
    /// The address that the client sent to.
    destination: Compact,
    format: NamingFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NamingFormat {
    /// PROXY v2 with the reply tag of the datagram.
    Tag(ReplyTag),
    /// Simple Proxy Protocol, as the datagram's.
    Spp,
}

impl Naming {
    pub(crate) fn tag(destination: SocketAddr, tag: ReplyTag) -> Self {
        Self {
            destination: destination.into(),
            format: NamingFormat::Tag(tag),
        }
    }

    pub(crate) fn spp(destination: SocketAddr) -> Self {
        Self {
            destination: destination.into(),
            format: NamingFormat::Spp,
        }
    }
}

/// What must stand in front of a reply, in the same datagram: a header that names the
/// reply's client, of PROXY protocol v2 (41 or 65 bytes) or Simple Proxy Protocol (38
/// bytes), or nothing. [`ReplyPath::header`] returns it; use it as a slice of bytes.
#[derive(Clone, Copy)]
pub struct ReplyHeader {
    /// SPP headers are shorter.
    bytes: [u8; MAX_TAGGED_HEADER_LEN],
    len: u8,
}

impl ReplyHeader {
    const NONE: Self = Self {
        bytes: [0; MAX_TAGGED_HEADER_LEN],
        len: 0,
    };
}

impl Deref for ReplyHeader {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.len.into()]
    }
}

impl AsRef<[u8]> for ReplyHeader {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for ReplyHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

impl ReplyPath {
    /// Back to the peer, from an address of this host.
    pub(crate) fn to_peer(
        peer: SocketAddr,
        local: Option<IpAddr>,
        client: SocketAddr,
        heard: Tick,
    ) -> Self {
        Self {
            to: peer,
            from: None,
            local,
            client,
            heard,
            naming: None,
        }
    }

    /// Back to a peer, for tests in which the client doesn't matter.
    #[cfg(test)]
    pub(crate) fn back(peer: SocketAddr) -> Self {
        Self::to_peer(peer, None, peer, Tick::roughly_now())
    }

    /// Straight to the client, from the listener's address.
    pub(crate) fn from_listener(listener: SocketAddr, client: SocketAddr, heard: Tick) -> Self {
        Self {
            to: client,
            from: Some(listener),
            local: None,
            client,
            heard,
            naming: None,
        }
    }

    /// What must stand in front of a reply by this path, in the same datagram. Empty
    /// unless the datagram came with a reply tag
    /// ([specification](https://github.com/ppv2/ppv2/blob/main/docs/reference/reply-tag.md))
    /// or an SPP header ([`Format::Spp`](crate::Format::Spp)).
    ///
    /// ```
    /// # use std::time::Instant;
    /// # use ppv2_sdk::{Demux, Trust};
    /// let demux = Demux::new(Trust::networks(["192.0.2.1"]).build()?);
    /// let (client, listener) = ("203.0.113.11:54321", "198.51.100.10:9000");
    /// let tag = ppv2::ReplyTag::new(0, *b"abcdefgh");
    /// let mut buffer = [0; ppv2::MAX_TAGGED_HEADER_LEN];
    /// let request = ppv2::encode_udp_tagged(
    ///     client.parse().unwrap(),
    ///     listener.parse().unwrap(),
    ///     tag,
    ///     &mut buffer,
    /// ).unwrap();
    ///
    /// let proxy = "192.0.2.1:40000".parse().unwrap();
    /// let datagram = demux.receive(Instant::now(), proxy, None, request).unwrap();
    ///
    /// let reply = [&datagram.reply_path.header()[..], b"pong"].concat();
    /// assert_eq!(reply, [request, b"pong"].concat());
    /// # Ok::<(), ppv2_sdk::TrustError>(())
    /// ```
    #[must_use]
    pub fn header(&self) -> ReplyHeader {
        let mut header = ReplyHeader::NONE;
        if let Some(naming) = self.naming {
            let (destination, buffer) = (naming.destination.into(), &mut header.bytes);
            let written = match naming.format {
                NamingFormat::Tag(tag) => {
                    ppv2::encode_udp_tagged(self.client, destination, tag, buffer)
                }
                NamingFormat::Spp => spp::encode(self.client, destination, buffer),
            };
            // At most 65, and never 0: the buffer has room for the longest.
            header.len = written.map_or(0, |bytes| u8::try_from(bytes.len()).unwrap_or_default());
        }
        header
    }

    /// Whether the datagram of this path came later than that of `other`: which of two
    /// demuxes heard a client last.
    ///
    /// ```
    /// # use std::time::{Duration, Instant};
    /// # use ppv2_sdk::{Demux, Trust};
    /// let demux = Demux::new(Trust::networks(["192.0.2.1"]).build()?);
    /// let bytes = b"\r\n\r\n\0\r\nQUIT\n\x21\x12\x00\x0c\
    ///               \xcb\x00\x71\x0b\xc6\x33\x64\x0a\xd4\x31\x23\x28hello";
    /// let proxy = "192.0.2.1:40000".parse().unwrap();
    /// let now = Instant::now();
    /// let later = now + Duration::from_secs(1);
    ///
    /// let first = demux.receive(now, proxy, None, bytes).unwrap().reply_path;
    /// let second = demux.receive(later, proxy, None, bytes).unwrap().reply_path;
    /// assert!(second.is_newer_than(&first));
    /// assert!(!first.is_newer_than(&second) && !first.is_newer_than(&first));
    /// # Ok::<(), ppv2_sdk::TrustError>(())
    /// ```
    #[must_use]
    pub fn is_newer_than(&self, other: &Self) -> bool {
        self.heard > other.heard
    }

    /// Whether a reply by this path certainly reaches its client or nobody: it passes no
    /// proxy; or it names its client, and the client would still be remembered; or the
    /// datagram came so lately that its proxy's address can't be another client's by now.
    pub(crate) fn is_certain(&self, now: Tick, forget_after: Span) -> bool {
        self.from.is_some()
            || self.naming.is_some() && !now.is_past(self.heard, forget_after)
            || canonical(self.to) == self.client
            || !now.is_past(self.heard, FORMER_CLIENT_GRACE.into())
    }

    /// Whether replies by both leave from one address, so that one call can send them.
    pub(crate) fn same_source(&self, other: &Self) -> bool {
        (self.from, self.local) == (other.from, other.local)
    }
}

impl PartialEq for ReplyPath {
    fn eq(&self, other: &Self) -> bool {
        let listener = |path: &Self| path.naming.map(|naming| naming.destination);
        self.to == other.to && self.same_source(other) && listener(self) == listener(other)
    }
}

impl Eq for ReplyPath {}

/// One datagram to send, and where to.
pub(crate) struct Outgoing<'d> {
    pub(crate) header: ReplyHeader,
    pub(crate) payload: &'d [u8],
    pub(crate) path: ReplyPath,
}

impl<'d> Outgoing<'d> {
    pub(crate) fn new(payload: &'d [u8], path: ReplyPath) -> Self {
        Self {
            header: path.header(),
            payload,
            path,
        }
    }
}

/// The recipient of a reply: a client by its address, or the sender of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Recipient {
    /// This client, by the path of its latest datagram.
    Client(SocketAddr),
    /// The client of a datagram, by the datagram's own path.
    Path(ReplyPath),
}

impl From<SocketAddr> for Recipient {
    fn from(client: SocketAddr) -> Self {
        Self::Client(client)
    }
}

impl From<ReplyPath> for Recipient {
    fn from(path: ReplyPath) -> Self {
        Self::Path(path)
    }
}

impl From<DatagramRef<'_>> for Recipient {
    fn from(datagram: DatagramRef<'_>) -> Self {
        Self::Path(datagram.reply_path)
    }
}

impl From<&DatagramRef<'_>> for Recipient {
    fn from(datagram: &DatagramRef<'_>) -> Self {
        Self::Path(datagram.reply_path)
    }
}

impl From<&Datagram> for Recipient {
    fn from(datagram: &Datagram) -> Self {
        Self::Path(datagram.reply_path)
    }
}
