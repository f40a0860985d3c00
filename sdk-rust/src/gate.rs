//! The core: decides for each datagram whose it is, and where a reply goes. It
//! takes `now` as an argument and does no I/O; the sockets stand around it.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use ppv2::{DecodeError, Decoder, Header, Origin, Tlvs};
use tracing::{trace, warn};

use crate::address::{canonical, is_one_client};
use crate::clock::Tick;
#[cfg(feature = "quinn")]
use crate::drop_warning::Occasionally;
use crate::routes::{Evicted, Routes};
use crate::stats::Counters;
use crate::trust::{Direct, Limits, Trust, TrustError};
use crate::{DropReason, DropWarnings, Recipient, ReplyFrom, ReplyTo, Stats, Way};

/// What [`UdpSocket`](crate::UdpSocket) does between its socket and the
/// application, for those who bring a socket of their own: hand every received
/// datagram to [`admit`](Self::admit), and ask [`route`](Self::route) where to
/// send.
///
/// All methods take `&self` and may be called from several threads. Time is an
/// argument, and should not run backwards by much.
///
/// ```
/// use std::time::{Duration, Instant};
/// use ppv2_sdk::{Gate, Trust};
///
/// let gate = Gate::new(Trust::networks(["192.0.2.10"])?)?;
/// let now = Instant::now();
/// let proxy = "192.0.2.10:40000".parse().unwrap();
/// let datagram = b"\r\n\r\n\0\r\nQUIT\n\x21\x12\x00\x0c\
///                  \xcb\x00\x71\x0b\xc6\x33\x64\x0a\xd4\x31\x23\x28hello";
///
/// let admitted = gate.admit(now, proxy, datagram).unwrap();
/// assert_eq!(admitted.client, "203.0.113.11:54321".parse().unwrap());
/// assert_eq!(admitted.payload, b"hello");
///
/// assert_eq!(gate.route(now, admitted.client).unwrap().to, proxy);
/// let later = now + Duration::from_secs(3600);
/// assert_eq!(gate.route(later, admitted.client), None);
/// # Ok::<(), ppv2_sdk::TrustError>(())
/// ```
#[derive(Debug)]
pub struct Gate {
    trust: Trust,
    decoder: Decoder,
    known: Mutex<Known>,
    counters: Counters,
    warnings: DropWarnings,
    #[cfg(feature = "quinn")]
    lost_pushes: Occasionally,
}

/// Two tables, so that senders whom nobody vouches for can neither replace nor
/// crowd out the way to a client behind a proxy.
#[derive(Debug)]
struct Known {
    /// Clients that a trusted peer named, and trusted peers themselves.
    through_proxies: Routes,
    /// Clients from outside the trusted networks.
    direct: Routes,
    /// Datagrams let in. Counted here, where the lock is held anyway.
    delivered: u64,
}

/// A datagram that was let in. It borrows from the received bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Admitted<'d> {
    /// The client's bytes, without any header; possibly none.
    pub payload: &'d [u8],
    /// The client's address, an IPv4 one never in IPv6 form.
    pub client: SocketAddr,
    /// The address that the client sent to. `None` for a direct client, and for
    /// a proxy that speaks for itself.
    pub destination: Option<SocketAddr>,
    /// The proxy that passed the datagram on; equal to `client` if the proxy
    /// speaks for itself (a LOCAL header: a health check). `None` for a direct
    /// client.
    pub proxy: Option<SocketAddr>,
    /// What else the header says of the client.
    pub tlvs: Tlvs<'d>,
    /// The way of a reply to this very datagram: back to the peer as it was given
    /// to [`Gate::admit`], unless [`Trust::reply_from`] says otherwise. Take it
    /// within [`FORMER_CLIENT_GRACE`](crate::FORMER_CLIENT_GRACE); later the peer's
    /// address may be another client's, and [`Gate::route`] knows.
    pub way: Way,
    /// When it was let in.
    pub(crate) heard: Tick,
}

impl Admitted<'_> {
    pub(crate) fn reply_to(&self) -> ReplyTo {
        ReplyTo {
            client: self.client,
            way: self.way,
            heard: self.heard,
        }
    }
}

impl Gate {
    /// A gate that remembers nobody yet.
    ///
    /// # Errors
    ///
    /// A [`TrustError`] if nothing could ever be received or answered.
    pub fn new(trust: Trust) -> Result<Self, TrustError> {
        trust.check()?;
        let Limits {
            max_header_len,
            max_clients,
            forget_after,
        } = trust.limits();
        Ok(Self {
            decoder: Decoder::new().max_header_len(max_header_len),
            known: Mutex::new(Known {
                through_proxies: Routes::new(max_clients, forget_after),
                direct: Routes::new(max_clients, forget_after),
                delivered: 0,
            }),
            counters: Counters::default(),
            warnings: DropWarnings::new(),
            #[cfg(feature = "quinn")]
            lost_pushes: Occasionally::new(),
            trust,
        })
    }

    /// Decides on one received datagram: `peer` is the address that the socket
    /// reported, `datagram` all that it returned. The way to the client is
    /// remembered.
    ///
    /// # Errors
    ///
    /// The reason for which the datagram must be dropped. It has been counted.
    #[inline]
    pub fn admit<'d>(
        &self,
        now: Instant,
        peer: SocketAddr,
        datagram: &'d [u8],
    ) -> Result<Admitted<'d>, DropReason> {
        self.admit_at(now.into(), peer, None, datagram)
    }

    /// As [`admit`](Self::admit), for a datagram that was sent to `local`, an
    /// address of this host, as the packet information of a socket that is bound
    /// to all addresses says (IP_PKTINFO in ip(7), IPV6_PKTINFO in ipv6(7)). The
    /// way of a reply has it as [`Way::local`].
    ///
    /// # Errors
    ///
    /// As [`admit`](Self::admit).
    #[inline]
    pub fn admit_to<'d>(
        &self,
        now: Instant,
        peer: SocketAddr,
        local: Option<IpAddr>,
        datagram: &'d [u8],
    ) -> Result<Admitted<'d>, DropReason> {
        self.admit_at(now.into(), peer, local, datagram)
    }

    #[inline]
    pub(crate) fn admit_at<'d>(
        &self,
        now: Tick,
        peer: SocketAddr,
        local: Option<IpAddr>,
        datagram: &'d [u8],
    ) -> Result<Admitted<'d>, DropReason> {
        let admitted = self.judge(now, peer, local, datagram);
        let reason = match &admitted {
            Ok(admitted) => match self.remember(&mut self.known(), now, admitted) {
                Ok(()) => return Ok(*admitted),
                Err(reason) => reason,
            },
            Err(reason) => *reason,
        };
        self.drop(now, peer, datagram, reason);
        Err(reason)
    }

    /// Decides on several datagrams that were received at once, with one lock.
    pub(crate) fn admission<'d>(&self, now: Tick) -> Admission<'_, 'd> {
        Admission {
            known: self.known(),
            gate: self,
            now,
            latest: None,
        }
    }

    /// The way of a reply to `client`: that of the client's latest datagram.
    ///
    /// `None` if the client has not been heard for
    /// [`Trust::forget_after`](Trust::forget_after), or not at all; or not for
    /// [`FORMER_CLIENT_GRACE`](crate::FORMER_CLIENT_GRACE), and the address of the
    /// proxy that it came through has named another client since. A v4-mapped
    /// IPv6 address finds its IPv4 client.
    #[must_use]
    pub fn route(&self, now: Instant, client: SocketAddr) -> Option<Way> {
        self.route_at(now.into(), client)
    }

    pub(crate) fn route_at(&self, now: Tick, client: SocketAddr) -> Option<Way> {
        self.known().route(now, client)
    }

    /// The way of a reply to a datagram that was let in; `None` if the reply could
    /// reach another client by now.
    pub(crate) fn way_of(&self, now: Tick, reply: ReplyTo) -> Option<Way> {
        let sure = reply.sure_way(now);
        sure.or_else(|| self.known().way_of(now, reply))
    }

    /// The ways to several recipients, with one lock, up to the first to whom
    /// there is none.
    pub(crate) fn ways(&self, now: Tick, recipients: impl Iterator<Item = Recipient>) -> Vec<Way> {
        let known = self.known();
        recipients
            .map_while(|recipient| match recipient {
                Recipient::Client(client) => known.route(now, client),
                Recipient::Datagram(reply) => known.way_of(now, reply),
                Recipient::Way(way) => Some(way),
            })
            .collect()
    }

    /// The counters as they stand. Replies are counted by those who send them:
    /// the sockets of this crate.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let (clients, delivered) = {
            let mut known = self.known();
            let now = Tick::roughly_now();
            let clients = known.through_proxies.count_known(now) + known.direct.count_known(now);
            (clients, known.delivered)
        };
        self.counters.snapshot(clients, delivered)
    }

    /// Says now and then that something for a client was lost, where the
    /// application can't be told by an error.
    #[cfg(feature = "quinn")]
    pub(crate) fn warn_of_lost_push(&self, client: SocketAddr) {
        if self.lost_pushes.is_due(Tick::roughly_now()) {
            let forget_after = self.trust.limits().forget_after;
            warn!(
                "nothing sent to client {client}: not heard from in the last {}s, or its proxy's \
                 address has named another client since; have forget_after of Trust last at \
                 least as long as max_idle_timeout of quinn, and clients send keep-alives",
                forget_after.as_secs_f64()
            );
        }
    }

    pub(crate) fn counters(&self) -> &Counters {
        &self.counters
    }

    pub(crate) fn trust(&self) -> &Trust {
        &self.trust
    }

    /// Applies the rule of trust: who sent the datagram decides whether it has
    /// a header, never what it looks like.
    #[inline]
    fn judge<'d>(
        &self,
        now: Tick,
        peer: SocketAddr,
        local: Option<IpAddr>,
        datagram: &'d [u8],
    ) -> Result<Admitted<'d>, DropReason> {
        let sender = canonical(peer);
        let admitted = if self.trust.includes(sender.ip()) {
            let (header, payload) = self.decoder.decode(datagram).map_err(|error| {
                trace!(%peer, %error, "header not understood");
                reason_of(error)
            })?;
            let (client, destination) = client_of(&header, sender)?;
            let client = canonical(client);
            let destination = destination.map(canonical);
            let way = match (self.trust.replies_from(), destination) {
                (ReplyFrom::Listener, Some(listener)) => Way::from_listener(listener, client),
                (ReplyFrom::Listener, None) | (ReplyFrom::Proxy, _) => Way::back_from(local, peer),
            };
            Admitted {
                payload,
                client,
                destination,
                proxy: Some(sender),
                tlvs: header.tlvs(),
                way,
                heard: now,
            }
        } else {
            match self.trust.direct_policy() {
                Direct::Drop => return Err(DropReason::Untrusted),
                Direct::Accept => Admitted {
                    payload: datagram,
                    client: sender,
                    destination: None,
                    proxy: None,
                    tlvs: Tlvs::default(),
                    way: Way::back_from(local, peer),
                    heard: now,
                },
            }
        };
        if is_one_client(&admitted.client) {
            Ok(admitted)
        } else {
            Err(DropReason::ClientAddress)
        }
    }

    #[inline]
    fn remember(
        &self,
        known: &mut Known,
        now: Tick,
        admitted: &Admitted<'_>,
    ) -> Result<(), DropReason> {
        let Evicted(evicted) = known.remember(now, admitted)?;
        known.delivered += 1;
        if evicted {
            self.counters.client_evicted();
        }
        Ok(())
    }

    #[cold]
    fn drop(&self, now: Tick, peer: SocketAddr, datagram: &[u8], reason: DropReason) {
        self.counters.dropped(reason);
        if let Some(warning) = self.warnings.due_at(now, peer, reason) {
            warn!("{warning}");
        }
        trace!(%peer, %reason, bytes = datagram.len(), "datagram dropped");
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // Nothing in here panics halfway through a change, so what a panicking
        // thread leaves behind is whole.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    /// Notes the way back, unless the client is a direct one whose address a
    /// proxy has vouched for as another's.
    #[inline]
    fn remember(&mut self, now: Tick, admitted: &Admitted<'_>) -> Result<Evicted, DropReason> {
        let (client, way) = (admitted.client, admitted.way);
        if admitted.proxy.is_some() {
            Ok(self.through_proxies.learn(now, client, way))
        } else if self.through_proxies.remembers(now, client) {
            Err(DropReason::DirectConflict)
        } else {
            Ok(self.direct.learn(now, client, way))
        }
    }

    fn route(&self, now: Tick, client: SocketAddr) -> Option<Way> {
        let client = canonical(client);
        self.through_proxies
            .get(now, client)
            .or_else(|| self.direct.get(now, client))
    }

    fn way_of(&self, now: Tick, reply: ReplyTo) -> Option<Way> {
        let still = |way: &Way| *way == reply.way;
        let sure = reply.sure_way(now);
        sure.or_else(|| self.route(now, reply.client).filter(still))
    }
}

/// The peer that a datagram came from, and the address that it was sent to.
type Received = (SocketAddr, Option<IpAddr>);

/// A gate that is held open for several datagrams.
pub(crate) struct Admission<'g, 'd> {
    gate: &'g Gate,
    known: MutexGuard<'g, Known>,
    now: Tick,
    /// The datagram that was let in last, and its peer and header. Those of a
    /// burst have the same, byte for byte, which then says the same again.
    latest: Option<(Admitted<'d>, Received, &'d [u8])>,
}

impl<'d> Admission<'_, 'd> {
    /// As [`Gate::admit`].
    #[inline]
    pub(crate) fn admit(
        &mut self,
        peer: SocketAddr,
        local: Option<IpAddr>,
        datagram: &'d [u8],
    ) -> Result<Admitted<'d>, DropReason> {
        if let Some((latest, received, header)) = &self.latest
            && *received == (peer, local)
            && let Some(payload) = datagram.strip_prefix(*header)
        {
            self.known.delivered += 1;
            return Ok(Admitted { payload, ..*latest });
        }
        let admitted = self.gate.judge(self.now, peer, local, datagram);
        let reason = match &admitted {
            Ok(admitted) => match self.gate.remember(&mut self.known, self.now, admitted) {
                Ok(()) => {
                    let header = &datagram[..datagram.len() - admitted.payload.len()];
                    self.latest = Some((*admitted, (peer, local), header));
                    return Ok(*admitted);
                }
                Err(reason) => reason,
            },
            Err(reason) => *reason,
        };
        self.gate.drop(self.now, peer, datagram, reason);
        Err(reason)
    }
}

/// The client that a header from `proxy` names, and where it sent to.
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
        // What a later codec may tell apart names no UDP client either.
        Origin::Unspecified | _ => Err(DropReason::Unspecified),
    }
}

#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "whatever else is wrong with a header, it is a bad one"
)]
fn reason_of(error: DecodeError) -> DropReason {
    match error {
        DecodeError::Signature { .. } | DecodeError::TooShort { .. } => DropReason::NoHeader,
        DecodeError::TooLong { .. } => DropReason::HeaderTooLong,
        _ => DropReason::BadHeader,
    }
}

#[cfg(test)]
mod tests;
