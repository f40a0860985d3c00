//! Decides for each datagram which client it is from, and where a reply goes. It takes
//! `now` as an argument and does no I/O; the sockets around it do.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use ppv2::{DecodeError, Decoder, Header, Origin, SIGNATURE, spp};
use tracing::{trace, warn};

use crate::address::{canonical, is_one_client};
use crate::clients::{Clients, Evicted};
use crate::clock::{Span, Tick};
use crate::datagram::Parts;
#[cfg(feature = "quinn")]
use crate::drop_warning::Occasionally;
use crate::drop_warning::Warnings;
use crate::reply_path::Naming;
use crate::senders::{Sender, Senders};
use crate::stats::Counters;
use crate::trust::{Formats, HeaderAlone, Settings, Trust, Untrusted};
use crate::{DatagramRef, DropReason, DropWarning, Recipient, ReplyFrom, ReplyPath, Stats};

/// Tells the clients behind a proxy apart: what [`UdpSocket`](crate::UdpSocket) does
/// between its socket and the application, for sockets of other kinds.
///
/// Hand every received datagram to [`receive`](Self::receive), and ask
/// [`reply_path`](Self::reply_path) where to send. All methods take `&self` and may be
/// called from several threads. Time is an argument, and should not run backwards by
/// much.
///
/// # Example
///
/// ```
/// use std::time::{Duration, Instant};
/// use ppv2_sdk::{Demux, Trust};
///
/// let demux = Demux::new(Trust::networks(["192.0.2.1"]).build()?);
/// let now = Instant::now();
/// let proxy = "192.0.2.1:40000".parse().unwrap();
/// let bytes = b"\r\n\r\n\0\r\nQUIT\n\x21\x12\x00\x0c\
///               \xcb\x00\x71\x0b\xc6\x33\x64\x0a\xd4\x31\x23\x28hello";
///
/// let datagram = demux.receive(now, proxy, None, bytes).unwrap();
/// assert_eq!(datagram.client, "203.0.113.11:54321".parse().unwrap());
/// assert_eq!(datagram.payload, b"hello");
///
/// assert_eq!(demux.reply_path(now, datagram.client).unwrap().to, proxy);
/// let later = now + Duration::from_secs(3600);
/// assert_eq!(demux.reply_path(later, datagram.client), None);
/// # Ok::<(), ppv2_sdk::TrustError>(())
/// ```
#[derive(Debug)]
pub struct Demux {
    trust: Trust,
    decoder: Decoder,
    known: Mutex<Known>,
    counters: Counters,
    warnings: Warnings,
    #[cfg(feature = "quinn")]
    lost_sends: Occasionally,
}

/// Two tables, so that untrusted senders can neither replace nor crowd out a client
/// behind a proxy.
#[derive(Debug)]
struct Known {
    /// Clients that a trusted peer named, and trusted peers themselves.
    through_proxies: Clients,
    /// Clients from outside the trusted networks.
    direct: Clients,
    /// Senders that may leave the header out, if there may be any.
    senders: Option<Senders>,
    /// Datagrams delivered. Counted here, where the lock is held anyway.
    delivered: u64,
    forget_after: Span,
}

impl Demux {
    /// A demux that remembers no client yet.
    #[must_use]
    pub fn new(trust: Trust) -> Self {
        let Settings {
            max_header_len,
            max_clients,
            forget_after,
            remember,
            ..
        } = trust.settings;
        Self {
            decoder: Decoder::new().max_header_len(max_header_len),
            known: Mutex::new(Known {
                through_proxies: Clients::new(max_clients, forget_after),
                direct: Clients::new(max_clients, forget_after),
                senders: remember.map(Senders::new),
                delivered: 0,
                forget_after: forget_after.into(),
            }),
            counters: Counters::default(),
            warnings: Warnings::new(),
            #[cfg(feature = "quinn")]
            lost_sends: Occasionally::new(),
            trust,
        }
    }

    /// Decides on one received datagram, and remembers the path to its client.
    ///
    /// `peer` is the address that the socket reported, `bytes` all that it returned.
    /// `local` is the address of this host that the datagram was sent to, from the
    /// packet information of a socket that is bound to all addresses (IP_PKTINFO in
    /// ip(7), IPV6_PKTINFO in ipv6(7)); it becomes [`ReplyPath::local`].
    ///
    /// # Errors
    ///
    /// The reason for which the datagram must be dropped. It has been counted.
    #[inline]
    pub fn receive<'d>(
        &self,
        now: Instant,
        peer: SocketAddr,
        local: Option<IpAddr>,
        bytes: &'d [u8],
    ) -> Result<DatagramRef<'d>, DropReason> {
        let parts = self.receive_at(now.into(), peer, local, bytes)?;
        Ok(parts.of(bytes))
    }

    #[inline]
    pub(crate) fn receive_at(
        &self,
        now: Tick,
        peer: SocketAddr,
        local: Option<IpAddr>,
        bytes: &[u8],
    ) -> Result<Parts, DropReason> {
        let received = Received { now, peer, local };
        let decided = if self.trust.settings.remember.is_none() {
            self.judge(received, bytes)
                .and_then(|parts| self.remember(&mut self.known(), parts))
        } else {
            let noted = self.note(&mut self.known(), received, bytes);
            noted.map(|noted| noted.parts)
        };
        decided.inspect_err(|reason| self.drop(now, peer, bytes, *reason))
    }

    /// Decides on several datagrams that were received together, with one lock.
    pub(crate) fn lock(&self, now: Tick) -> Locked<'_, '_> {
        Locked {
            known: self.known(),
            demux: self,
            now,
            latest: None,
        }
    }

    /// The path of a reply to a client: with its address that of its latest datagram,
    /// with the path of an earlier datagram that path itself.
    ///
    /// `None` if the client has been silent for
    /// [`forget_after`](crate::TrustBuilder::forget_after) or is not known at all; or if
    /// it has been silent for [`FORMER_CLIENT_GRACE`](crate::FORMER_CLIENT_GRACE) and
    /// the address of its proxy has named another client since. `None` for a path through
    /// a proxy that is older than [`FORMER_CLIENT_GRACE`](crate::FORMER_CLIENT_GRACE) and
    /// not that of the client's latest datagram. Neither of the two holds for datagrams
    /// with a reply tag or an SPP header: their replies name their clients. A v4-mapped IPv6
    /// address finds its IPv4 client.
    #[must_use]
    pub fn reply_path(&self, now: Instant, to: impl Into<Recipient>) -> Option<ReplyPath> {
        self.path_to(now.into(), to.into())
    }

    /// As [`reply_path`](Self::reply_path), now, for a reply that is about to be sent.
    ///
    /// # Errors
    ///
    /// `NotConnected` if there is no path. It is counted in
    /// [`Stats::replies_without_path`].
    pub fn require_reply_path(&self, to: impl Into<Recipient>) -> io::Result<ReplyPath> {
        let to = to.into();
        self.path_to(Tick::roughly_now(), to)
            .ok_or_else(|| self.no_reply_path(to))
    }

    /// Counts a reply that a socket of another kind has sent, in
    /// [`Stats::replies_sent`].
    pub fn count_reply_sent(&self) {
        self.counters.replies_sent(1);
    }

    /// The path to a recipient; `None` if the reply could reach another client.
    pub(crate) fn path_to(&self, now: Tick, recipient: Recipient) -> Option<ReplyPath> {
        match recipient {
            Recipient::Path(path) if path.is_certain(now, self.forget_after()) => Some(path),
            Recipient::Path(_) | Recipient::Client(_) => self.known().path_to(now, recipient),
        }
    }

    /// The paths to several recipients, with one lock, up to the first that has none.
    pub(crate) fn paths_to(
        &self,
        now: Tick,
        recipients: impl Iterator<Item = Recipient>,
    ) -> Vec<ReplyPath> {
        let known = self.known();
        recipients
            .map_while(|recipient| known.path_to(now, recipient))
            .collect()
    }

    /// The counters as they stand.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let (clients, delivered) = {
            let mut known = self.known();
            let now = Tick::roughly_now();
            let clients = known.through_proxies.count(now) + known.direct.count(now);
            (clients, known.delivered)
        };
        self.counters.snapshot(clients, delivered)
    }

    /// Takes the warnings of drops that have become due since the last call: for each
    /// reason the first drop, then at most one a minute. `tracing` has logged them at
    /// level WARN; this is for applications that log by other means.
    ///
    /// # Example
    ///
    /// ```
    /// # use std::time::Instant;
    /// # use ppv2_sdk::{Demux, Trust};
    /// let demux = Demux::new(Trust::networks(["192.0.2.1"]).build()?);
    /// let stranger = "198.51.100.7:4000".parse().unwrap();
    /// demux.receive(Instant::now(), stranger, None, b"hello").unwrap_err();
    ///
    /// let warning = demux.take_warnings().pop().unwrap();
    /// assert!(warning.to_string().starts_with("dropped a datagram from 198.51.100.7:4000"));
    /// assert!(demux.take_warnings().is_empty());
    /// # Ok::<(), ppv2_sdk::TrustError>(())
    /// ```
    #[must_use]
    pub fn take_warnings(&self) -> Vec<DropWarning> {
        self.warnings.take()
    }

    /// Warns, at most once a minute, that a datagram for a client was not sent, where
    /// no error can tell the application.
    #[cfg(feature = "quinn")]
    pub(crate) fn warn_of_lost_send(&self, client: SocketAddr) {
        if self.lost_sends.is_due(Tick::roughly_now()) {
            let forget_after = self.trust.settings.forget_after;
            warn!(
                "nothing sent to client {client}: silent for {}s, or its proxy's address has \
                 named another client since; set forget_after of Trust to at least the \
                 max_idle_timeout of quinn, and have clients send keep-alives",
                forget_after.as_secs_f64()
            );
        }
    }

    fn forget_after(&self) -> Span {
        self.trust.settings.forget_after.into()
    }

    pub(crate) fn counters(&self) -> &Counters {
        &self.counters
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.trust.settings
    }

    /// Applies the rule of trust: the sender decides whether a datagram has a header,
    /// never its bytes.
    #[inline]
    fn judge(&self, received: Received, bytes: &[u8]) -> Result<Parts, DropReason> {
        let sender = canonical(received.peer);
        let parts = if self.trust.includes(sender.ip()) {
            let Formats { v2, spp } = self.trust.settings.formats;
            if spp && bytes.starts_with(&spp::SPP_MAGIC) {
                self.read_spp(received, sender, bytes)?
            } else if v2 {
                self.read_v2(received, sender, bytes)?
            } else {
                return Err(missing_header(bytes));
            }
        } else if self.trust.settings.untrusted == Untrusted::Accept {
            let Received { now, peer, local } = received;
            Parts {
                header_len: 0,
                tlvs_len: 0,
                destination: None,
                proxy: None,
                reply_path: ReplyPath::to_peer(peer, local, sender, now),
            }
        } else {
            return Err(DropReason::Untrusted);
        };
        if is_one_client(&parts.reply_path.client) {
            Ok(parts)
        } else {
            Err(DropReason::ClientAddress)
        }
    }

    #[inline(always)]
    fn read_v2(
        &self,
        received: Received,
        sender: SocketAddr,
        bytes: &[u8],
    ) -> Result<Parts, DropReason> {
        let (header, payload) = self.decoder.decode(bytes).map_err(|error| {
            trace!(peer = %received.peer, %error, "header not understood");
            reason_of(error, bytes)
        })?;
        let (client, destination) = client_of(&header, sender)?;
        let destination = destination.map(canonical);
        let tag = header.tlvs().reply_tag();
        let naming = destination.zip(tag).map(|(to, tag)| Naming::tag(to, tag));
        Ok(Parts {
            header_len: bytes.len() - payload.len(),
            tlvs_len: header.tlvs().as_bytes().len(),
            destination,
            proxy: Some(sender),
            reply_path: self.path_back(received, canonical(client), destination, naming),
        })
    }

    /// Not in line, since most sockets never need it.
    #[inline(never)]
    fn read_spp(
        &self,
        received: Received,
        sender: SocketAddr,
        bytes: &[u8],
    ) -> Result<Parts, DropReason> {
        let (header, payload) = spp::decode(bytes).map_err(|error| {
            trace!(peer = %received.peer, %error, "header not understood");
            DropReason::BadHeader
        })?;
        let destination = canonical(header.proxy);
        let naming = Some(Naming::spp(destination));
        Ok(Parts {
            header_len: bytes.len() - payload.len(),
            tlvs_len: 0,
            destination: Some(destination),
            proxy: Some(sender),
            reply_path: self.path_back(
                received,
                canonical(header.client),
                Some(destination),
                naming,
            ),
        })
    }

    /// The path of a reply to a client that a trusted sender named.
    #[inline]
    fn path_back(
        &self,
        Received { now, peer, local }: Received,
        client: SocketAddr,
        destination: Option<SocketAddr>,
        naming: Option<Naming>,
    ) -> ReplyPath {
        match (self.trust.settings.reply_from, destination) {
            (ReplyFrom::Listener, Some(listener)) => {
                ReplyPath::from_listener(listener, client, now)
            }
            (ReplyFrom::Listener, None) | (ReplyFrom::Proxy, _) => ReplyPath {
                naming,
                ..ReplyPath::to_peer(peer, local, client, now)
            },
        }
    }

    /// Remembers the path to the client of a datagram that is delivered, and counts it.
    #[inline]
    fn remember(&self, known: &mut Known, parts: Parts) -> Result<Parts, DropReason> {
        let Evicted(evicted) = known.remember(&parts)?;
        known.delivered += 1;
        if evicted {
            self.counters.client_evicted();
        }
        Ok(parts)
    }

    /// As `remember`, where senders may leave the header out: remembers the client that they speak
    /// for, too.
    #[inline(never)]
    fn note(
        &self,
        known: &mut Known,
        received: Received,
        bytes: &[u8],
    ) -> Result<Noted, DropReason> {
        let judged = self.judge(received, bytes);
        let noted = match &mut known.senders {
            None => Noted::with_header(judged?),
            Some(senders) => self.attribute(senders, received, bytes, judged)?,
        };
        if noted.announces {
            let Evicted(evicted) = known.remember(&noted.parts)?;
            if evicted {
                self.counters.client_evicted();
            }
            return Err(DropReason::HeaderAlone);
        }
        self.remember(known, noted.parts)?;
        Ok(noted)
    }

    /// Decides for which client a datagram is, where senders may leave the header out, and
    /// for which its sender speaks from now on.
    fn attribute(
        &self,
        senders: &mut Senders,
        received: Received,
        bytes: &[u8],
        judged: Result<Parts, DropReason>,
    ) -> Result<Noted, DropReason> {
        let Received { now, peer, local } = received;
        let sender = Sender::new(peer, local);
        let parts = match judged {
            Ok(parts) => parts,
            Err(DropReason::NoHeader) if is_bare(bytes) => {
                let said = senders.client_of(now, &sender);
                let (client, destination) = said.ok_or(DropReason::NoHeader)?;
                let parts = Parts {
                    header_len: 0,
                    tlvs_len: 0,
                    destination: Some(destination),
                    proxy: Some(canonical(peer)),
                    reply_path: self.path_back(received, client, Some(destination), None),
                };
                return Ok(Noted {
                    parts,
                    alike: Alike::Bare,
                    announces: false,
                });
            }
            Err(reason) => {
                // It may have been another client's header. Datagrams without one that
                // follow it must not go to the client that was there before.
                senders.forget(&sender);
                return Err(reason);
            }
        };
        let noted = Noted::with_header(parts);
        let names_many = || parts.of(bytes).tlvs.reply_tag().is_some();
        let Some(destination) = parts.destination.filter(|_| !names_many()) else {
            // A direct client, who is none of the senders; or a proxy that speaks for
            // itself; or one whose address stands for many clients, each with its tag.
            senders.forget(&sender);
            return Ok(noted);
        };
        let remembered = senders.learn(now, sender, parts.reply_path.client, destination);
        if !remembered {
            self.counters.sender_not_remembered();
        }
        let alone = parts.header_len == bytes.len();
        Ok(Noted {
            // What is not remembered is counted for each.
            alike: if remembered {
                Alike::Header
            } else {
                Alike::None
            },
            announces: alone && self.trust.settings.header_alone == HeaderAlone::Announce,
            ..noted
        })
    }

    #[cold]
    fn drop(&self, now: Tick, peer: SocketAddr, bytes: &[u8], reason: DropReason) {
        self.counters.dropped(reason);
        // An announcement is no fault.
        if reason != DropReason::HeaderAlone
            && let Some(warning) = self.warnings.due(now, peer, reason)
        {
            warn!("{warning}");
        }
        trace!(%peer, %reason, bytes = bytes.len(), "datagram dropped");
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // Nothing panics halfway through a change, so what a panicking thread leaves
        // behind is whole.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    /// Notes the reply path, unless the client is a direct one with the address of a
    /// client behind a proxy.
    #[inline]
    fn remember(&mut self, parts: &Parts) -> Result<Evicted, DropReason> {
        let path = &parts.reply_path;
        if parts.proxy.is_some() {
            Ok(self.through_proxies.learn(path))
        } else if self.through_proxies.remembers(path.heard, path.client) {
            Err(DropReason::DirectConflict)
        } else {
            Ok(self.direct.learn(path))
        }
    }

    fn reply_path(&self, now: Tick, client: SocketAddr) -> Option<ReplyPath> {
        let client = canonical(client);
        self.through_proxies
            .path(now, client)
            .or_else(|| self.direct.path(now, client))
    }

    fn path_to(&self, now: Tick, recipient: Recipient) -> Option<ReplyPath> {
        match recipient {
            Recipient::Client(client) => self.reply_path(now, client),
            Recipient::Path(path) if path.is_certain(now, self.forget_after) => Some(path),
            Recipient::Path(path) => self
                .reply_path(now, path.client)
                .filter(|latest| *latest == path),
        }
    }
}

/// When a datagram came, from which peer, and the address that it was sent to.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Received {
    now: Tick,
    peer: SocketAddr,
    local: Option<IpAddr>,
}

/// A datagram whose client is known.
struct Noted {
    parts: Parts,
    alike: Alike,
    /// It is for the SDK alone.
    announces: bool,
}

impl Noted {
    fn with_header(parts: Parts) -> Self {
        Self {
            parts,
            alike: Alike::Header,
            announces: false,
        }
    }
}

/// Which of the next datagrams that came together, from the same sender, have the same
/// client for certain.
#[derive(Clone, Copy)]
enum Alike {
    /// Those that begin with the same header, byte for byte; all of a direct client's.
    Header,
    /// Those without header.
    Bare,
    None,
}

/// A demux that is locked for several datagrams.
pub(crate) struct Locked<'g, 'd> {
    demux: &'g Demux,
    known: MutexGuard<'g, Known>,
    now: Tick,
    /// The latest delivered datagram, with what was received and its header. The datagrams
    /// of a burst are alike, so the first decides for all.
    latest: Option<(Parts, Received, Alike, &'d [u8])>,
}

impl<'d> Locked<'_, 'd> {
    /// As [`Demux::receive`].
    #[inline]
    pub(crate) fn receive(
        &mut self,
        peer: SocketAddr,
        local: Option<IpAddr>,
        bytes: &'d [u8],
    ) -> Result<Parts, DropReason> {
        let received = Received {
            now: self.now,
            peer,
            local,
        };
        if let Some((parts, latest, alike, header)) = &self.latest
            && *latest == received
            && match alike {
                // A header alone may be none of the application's.
                Alike::Header => {
                    bytes.starts_with(header)
                        && (self.known.senders.is_none() || bytes.len() > header.len())
                }
                Alike::Bare => is_bare(bytes) && !ppv2::is_v1(bytes),
                Alike::None => false,
            }
        {
            self.known.delivered += 1;
            return Ok(*parts);
        }
        // Whatever this one is, it may say another client.
        self.latest = None;
        let mut alike = Alike::Header;
        let decided = if self.known.senders.is_none() {
            self.demux
                .judge(received, bytes)
                .and_then(|parts| self.demux.remember(&mut self.known, parts))
        } else {
            let noted = self.demux.note(&mut self.known, received, bytes);
            noted.map(|noted| {
                alike = noted.alike;
                noted.parts
            })
        };
        let parts =
            decided.inspect_err(|reason| self.demux.drop(self.now, peer, bytes, *reason))?;
        self.latest = Some((parts, received, alike, &bytes[..parts.header_len]));
        Ok(parts)
    }
}

/// The client that a header from `proxy` names, and the address that it sent to.
#[inline]
fn client_of(
    header: &Header<'_>,
    proxy: SocketAddr,
) -> Result<(SocketAddr, Option<SocketAddr>), DropReason> {
    if let (Some(source), Some(destination)) = (header.client(), header.destination()) {
        return Ok((source, Some(destination)));
    }
    match header.origin() {
        Origin::Local => Ok((proxy, None)),
        Origin::Ip { .. } => Err(DropReason::Tcp),
        Origin::Unix { .. } => Err(DropReason::Unix),
        // Variants that a later codec may add name no UDP client either.
        Origin::Unspecified | _ => Err(DropReason::Unspecified),
    }
}

#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "whatever else is wrong with a header, it is a bad one"
)]
fn reason_of(error: DecodeError, bytes: &[u8]) -> DropReason {
    match error {
        DecodeError::Signature { .. } | DecodeError::TooShort { .. } => missing_header(bytes),
        DecodeError::TooLong { .. } => DropReason::HeaderTooLong,
        _ => DropReason::BadHeader,
    }
}

/// Why a datagram is dropped that must have a header and has none.
#[cold]
fn missing_header(bytes: &[u8]) -> DropReason {
    if ppv2::is_v1(bytes) {
        DropReason::V1Header
    } else {
        DropReason::NoHeader
    }
}

/// Whether a datagram whose sender may leave the header out has none. What begins with the
/// signature of one is read as a header.
#[inline]
fn is_bare(bytes: &[u8]) -> bool {
    !bytes.starts_with(&SIGNATURE)
}

#[cfg(test)]
mod tests;
