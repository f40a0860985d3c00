//! The sockets of the bench's own programs. IPv4 only: everything here runs on
//! 127.0.0.0/8.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};

use ppv2_udp::{Batch, Outgoing, SendFault, SocketState, Transmit};

/// Slots of the bench's batches.
pub(crate) const BATCH: usize = 64;

/// Bytes of slots for single datagrams of up to 1500 bytes.
pub(crate) const DATAGRAM_CAPACITY: usize = 1_536;

/// Receive buffer of the bench's own sockets.
const RECEIVE_BUFFER: usize = 4 << 20;

/// A socket that does not wait.
pub(crate) struct Socket {
    pub(crate) inner: UdpSocket,
    state: SocketState,
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}

impl Socket {
    /// A socket with a receive buffer that holds a burst of every client.
    pub(crate) fn bind(address: SocketAddrV4) -> io::Result<Self> {
        let socket = socket2::Socket::new(
            socket2::Domain::IPV4,
            socket2::Type::DGRAM,
            Some(socket2::Protocol::UDP),
        )?;
        socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        Ok(Self {
            inner: socket.into(),
            state: SocketState::unasked(address.into()),
        })
    }

    /// Has each datagram report the address that it was sent to, on a socket that is
    /// bound to all addresses.
    pub(crate) fn report_local_address(&mut self) -> io::Result<()> {
        self.state = SocketState::new(&self.inner, self.inner.local_addr()?);
        Ok(())
    }

    /// Has each datagram report its ECN bits.
    pub(crate) fn report_traffic_class(&self) -> io::Result<()> {
        socket2::SockRef::from(&self.inner).set_recv_tos_v4(true)
    }

    /// Receives bursts in one piece.
    pub(crate) fn receive_bursts(&self) -> io::Result<()> {
        self.state.enable_gro(&self.inner).map(drop)
    }

    /// Receives into `slots` of `batch` what is there, and returns how many it filled.
    pub(crate) fn receive(&self, batch: &mut Batch, slots: Range<usize>) -> io::Result<usize> {
        match self.state.receive(&self.inner, batch, slots, false) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            result => result,
        }
    }

    /// Sends all of `transmits` that the kernel takes, each as a message of its own; the
    /// first error if it refuses some.
    pub(crate) fn send(&self, transmits: &[Transmit<'_>]) -> io::Result<()> {
        let mut result = Ok(());
        let fault = |_, fault| note(&mut result, fault);
        let transmit = |index: usize| transmits[index];
        self.state
            .send_each(&self.inner, transmits.len(), transmit, fault);
        result
    }

    /// As [`send`](Self::send), but neighbours of one length that go the same way leave as
    /// one burst.
    pub(crate) fn send_joined(&self, transmits: &[Transmit<'_>]) -> io::Result<()> {
        let mut result = Ok(());
        let fault = |_, fault| note(&mut result, fault);
        let transmit = |index: usize| transmits[index];
        self.state
            .send_joined(&self.inner, transmits.len(), transmit, fault);
        result
    }
}

/// Keeps the first error.
fn note(result: &mut io::Result<()>, fault: SendFault) {
    if let SendFault::Lost { error, .. } = fault
        && result.is_ok()
    {
        *result = Err(error);
    }
}

/// To an address, from the one that the socket is bound to.
pub(crate) fn to(address: SocketAddrV4) -> Outgoing<'static> {
    Outgoing {
        to: Some(address.into()),
        ..Outgoing::default()
    }
}

/// Addresses of the bench's sockets are all of IPv4.
pub(crate) fn v4(address: SocketAddr) -> SocketAddrV4 {
    match address {
        SocketAddr::V4(address) => address,
        SocketAddr::V6(_) => SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0),
    }
}
