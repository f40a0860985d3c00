//! Receiving and sending on a socket that somebody else owns.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::{ControlFlow, Range};
#[cfg(target_os = "linux")]
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::{AtomicBool, Ordering};

#[cfg(target_os = "linux")]
use crate::linux as sys;
#[cfg(not(target_os = "linux"))]
use crate::portable as sys;
use crate::{AsFd, Batch, Outgoing, Received, SendFault, Sent, Transmit, portable};

/// What is known of a UDP socket, besides its descriptor.
///
/// The socket itself is handed to each call, and always has to be the same one. It may
/// be shared by threads, and may block or not.
#[derive(Debug)]
pub struct SocketState {
    /// The address that the socket is bound to.
    bound: SocketAddr,
    /// Datagrams arrive with the address that they were sent to.
    packet_info: bool,
    /// Datagrams arrive joined.
    gro: AtomicBool,
    /// Longer datagrams are not sent as a burst: the kernel refused.
    #[cfg(target_os = "linux")]
    burst_limit: AtomicUsize,
}

impl SocketState {
    /// The state of `socket`, which is bound to `bound`. If that is a wildcard address,
    /// the socket reports from now on which address each datagram was sent to, as far as
    /// the system can (IP_PKTINFO in ip(7), IPV6_RECVPKTINFO in ipv6(7)).
    #[must_use]
    pub fn new(socket: &impl AsFd, bound: SocketAddr) -> Self {
        Self {
            packet_info: bound.ip().is_unspecified()
                && sys::report_packet_info(socket.as_fd(), bound.is_ipv6()).is_ok(),
            gro: AtomicBool::new(sys::has_gro(socket.as_fd())),
            ..Self::unasked(bound)
        }
    }

    /// As [`new`](Self::new), for a socket that only sends, or whose owner knows its options:
    /// it leaves them as they are, and asks the kernel nothing.
    #[must_use]
    pub fn unasked(bound: SocketAddr) -> Self {
        Self {
            bound,
            packet_info: false,
            gro: AtomicBool::new(false),
            #[cfg(target_os = "linux")]
            burst_limit: AtomicUsize::new(sys::longest_in_burst()),
        }
    }

    /// Whether datagrams arrive joined, several in a slot. A caller that receives one at
    /// a time can't take them apart.
    #[must_use]
    pub fn gro(&self) -> bool {
        self.gro.load(Ordering::Relaxed)
    }

    /// The address that a reply to `received` must leave from
    /// ([`Received::reply_from`]); `None` if the kernel is to choose, as for a socket
    /// that is bound to one address.
    #[must_use]
    pub fn reply_from(&self, received: &Received) -> Option<IpAddr> {
        received.reply_from().filter(|_| self.packet_info)
    }

    /// Has the kernel join datagrams that arrive in a row from one sender (UDP_GRO in
    /// udp(7)); `false` if it can't. There is no way back: the kernel joins by the option
    /// as it is when a datagram arrives, and reports the size of each datagram by the
    /// option as it is when they are received.
    ///
    /// # Errors
    ///
    /// Those of `setsockopt`, but for "unknown option".
    pub fn enable_gro(&self, socket: &impl AsFd) -> io::Result<bool> {
        let is_enabled = sys::enable_gro(socket.as_fd())?;
        self.gro.store(is_enabled, Ordering::Relaxed);
        Ok(is_enabled)
    }

    /// Receives into the slots `slots` of `batch`, from the first on, and returns how many
    /// it filled. Fewer than there are means that nothing is left.
    ///
    /// With `wait`, it waits for the first datagram as the socket does: forever, until the
    /// socket's timeout, or not at all on a non-blocking socket. Without `wait` it never
    /// waits; Windows has no such call, so it then reports that there is nothing.
    ///
    /// On Linux one system call fills up to 64 slots.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::WouldBlock`] if there is nothing, [`io::ErrorKind::Interrupted`] if
    /// a signal ended the wait, and otherwise what the kernel reports, which may be what
    /// became of an earlier datagram.
    pub fn receive(
        &self,
        socket: &impl AsFd,
        batch: &mut Batch,
        slots: Range<usize>,
        wait: bool,
    ) -> io::Result<usize> {
        let (buffers, received) = batch.fill(slots);
        sys::receive(socket.as_fd(), self.bound, buffers, received, wait)
    }

    /// Receives one datagram into `buffer`, and waits as [`receive`](Self::receive) does.
    /// Unless the state was made by [`new`](Self::new) for a wildcard, only its sender and its
    /// length are known, for which there is a cheaper system call.
    ///
    /// # Errors
    ///
    /// As [`receive`](Self::receive).
    pub fn receive_one(
        &self,
        socket: &impl AsFd,
        buffer: &mut [u8],
        wait: bool,
    ) -> io::Result<Received> {
        if !self.packet_info {
            return portable::receive_one(socket.as_fd(), self.bound, buffer, wait);
        }
        let mut received = [None];
        let buffers = std::iter::once(buffer);
        sys::receive(socket.as_fd(), self.bound, buffers, &mut received, wait)?;
        received[0].ok_or_else(|| io::ErrorKind::WouldBlock.into())
    }

    /// Sends what `transmit` returns for the indices from 0 to `count`, in order, and
    /// returns how many datagrams were sent before the first that could not be.
    /// Consecutive datagrams of one length, headers included, that go the same way leave as
    /// one burst; the headers may differ.
    ///
    /// It waits for room in the socket's buffer as the socket does.
    ///
    /// # Errors
    ///
    /// What the kernel reports, if the first datagram could not be sent.
    pub fn send<'d>(
        &self,
        socket: &impl AsFd,
        count: usize,
        transmit: impl Fn(usize) -> Transmit<'d>,
    ) -> io::Result<usize> {
        let mut failed = None;
        let mut fault = |_, fault| match fault {
            SendFault::Earlier(_) => ControlFlow::Continue(()),
            SendFault::Lost { error, .. } => {
                failed = Some(error);
                ControlFlow::Break(())
            }
        };
        let sent = sys::send(self, socket.as_fd(), count, &transmit, &mut fault, true);
        match failed {
            Some(error) if sent.datagrams == 0 => Err(error),
            _ => Ok(sent.datagrams),
        }
    }

    /// Sends one datagram to `to`, from the address `from` or one of the kernel's choice, and
    /// returns its length.
    ///
    /// # Errors
    ///
    /// What the kernel reports. It may report an earlier datagram instead of sending this one
    /// (ip(7), IP_RECVERR).
    pub fn send_one(
        &self,
        socket: &impl AsFd,
        payload: &[u8],
        to: SocketAddr,
        from: Option<IpAddr>,
    ) -> io::Result<usize> {
        if from.is_none() && to.is_ipv6() == self.bound.is_ipv6() {
            // Cheaper.
            return portable::send_one(socket.as_fd(), payload, to);
        }
        let outgoing = Outgoing {
            to: Some(to),
            from: from.map(|ip| SocketAddr::new(ip, 0)),
            ..Outgoing::default()
        };
        let one = Transmit::datagram(outgoing, payload);
        self.send(socket, 1, |_| one)?;
        Ok(payload.len())
    }

    /// Sends as [`send`](Self::send) does, but goes on after a fault, which it reports to
    /// `fault` with the index that it concerns, and does not join what `transmit` returns.
    pub fn send_each<'d>(
        &self,
        socket: &impl AsFd,
        count: usize,
        transmit: impl Fn(usize) -> Transmit<'d>,
        fault: impl FnMut(usize, SendFault),
    ) -> Sent {
        self.send_all(socket, count, transmit, fault, false)
    }

    /// As [`send_each`](Self::send_each), but joins as [`send`](Self::send) does. `fault` is
    /// called for each index that it concerns.
    pub fn send_joined<'d>(
        &self,
        socket: &impl AsFd,
        count: usize,
        transmit: impl Fn(usize) -> Transmit<'d>,
        fault: impl FnMut(usize, SendFault),
    ) -> Sent {
        self.send_all(socket, count, transmit, fault, true)
    }

    fn send_all<'d>(
        &self,
        socket: &impl AsFd,
        count: usize,
        transmit: impl Fn(usize) -> Transmit<'d>,
        mut fault: impl FnMut(usize, SendFault),
        join: bool,
    ) -> Sent {
        let mut fault = |index, reported| {
            fault(index, reported);
            ControlFlow::Continue(())
        };
        sys::send(self, socket.as_fd(), count, &transmit, &mut fault, join)
    }

    #[cfg(target_os = "linux")]
    pub(crate) fn bound(&self) -> SocketAddr {
        self.bound
    }

    /// Bytes of the longest datagram, header included, that is sent in a burst.
    #[cfg(target_os = "linux")]
    pub(crate) fn burst_limit(&self) -> usize {
        self.burst_limit.load(Ordering::Relaxed)
    }

    /// Notes that datagrams longer than `limit` are refused in bursts. Returns the limit
    /// before.
    #[cfg(target_os = "linux")]
    pub(crate) fn limit_bursts(&self, limit: usize) -> usize {
        self.burst_limit.fetch_min(limit, Ordering::Relaxed)
    }

    /// Takes `limit` back, unless another thread has noted another one since.
    #[cfg(target_os = "linux")]
    pub(crate) fn unlimit_bursts(&self, limit: usize, before: usize) {
        let (set, read) = (Ordering::Relaxed, Ordering::Relaxed);
        let _ = self.burst_limit.compare_exchange(limit, before, set, read);
    }
}
