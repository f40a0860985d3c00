//! The socket itself: single datagrams in and out, and waiting. It knows no
//! headers, and is the one place with unsafe code.

use std::cell::Cell;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pyo3::prelude::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{BorrowedFd, OwnedFd, RawFd};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recvfrom, sendto};

use super::bursts::Bursts;
#[cfg(target_os = "linux")]
use super::packet_info;

/// No UDP datagram is longer, its length field having 16 bits.
const MAX_DATAGRAM: usize = 65_535;

/// Datagrams dropped in a row before a call looks up: one that waits, whether a
/// signal came; one that may not gives way. As many as the Rust SDK's sockets.
pub(crate) const MOST_DROPS_IN_A_ROW: usize = 64;

/// A second descriptor of a socket that an object of Python's owns. It stays
/// valid while a call uses it, though another thread closes the object.
#[derive(Debug)]
pub(crate) struct Descriptor {
    fd: OwnedFd,
    /// Made when first used.
    bursts: OnceLock<Bursts>,
    /// Datagrams arrive with the address that they were sent to.
    packet_info: bool,
    /// The application asked for it, too.
    packet_info_asked: AtomicBool,
}

/// How long a call may wait.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Wait {
    /// The kernel waits: the descriptor is in blocking mode.
    Forever,
    /// Not at all.
    Never,
    /// Until then; the descriptor is in non-blocking mode.
    Until(Instant),
}

/// Why a call has nothing to return.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// It would have to wait and may not.
    WouldBlock,
    TimedOut,
    /// A signal came: Python's handlers are to run before the call goes on.
    Interrupted,
    Os(Errno),
    /// As the SDK words it, with the number that is nearest.
    Explained(Errno, String),
}

impl Wait {
    /// Whether a call goes on that has dropped so many datagrams. One that may
    /// not wait gives way in the end: a flood of bad datagrams would hold it up
    /// for ever.
    pub(crate) fn after_drops(self, dropped: usize) -> Result<(), Failure> {
        match self {
            Self::Never if dropped >= MOST_DROPS_IN_A_ROW => Err(Failure::WouldBlock),
            Self::Until(deadline) if Instant::now() >= deadline => Err(Failure::TimedOut),
            Self::Never | Self::Until(_) | Self::Forever => Ok(()),
        }
    }
}

impl Descriptor {
    /// A second descriptor of `socket`, an open `socket.socket`.
    #[expect(unsafe_code, reason = "Python hands out descriptors as numbers")]
    pub(crate) fn of(socket: &Bound<'_, PyAny>, local: SocketAddr) -> PyResult<Self> {
        let raw: RawFd = socket.call_method0("fileno")?.extract()?;
        // SAFETY: `socket` owns the descriptor, and its holder keeps it open until
        // this returns.
        let borrowed = unsafe { BorrowedFd::borrow_raw(raw) };
        let fd = borrowed.try_clone_to_owned()?;
        #[cfg(target_os = "linux")]
        let (packet_info, asked) = match local.ip().is_unspecified() {
            true => packet_info::ask(&fd, local.is_ipv6()),
            false => (false, true),
        };
        #[cfg(not(target_os = "linux"))]
        let (packet_info, asked) = (false, local.ip().is_unspecified());
        Ok(Self {
            fd,
            bursts: OnceLock::new(),
            packet_info,
            packet_info_asked: AtomicBool::new(asked),
        })
    }

    /// Whether datagrams arrive with the address that they were sent to.
    pub(crate) fn packet_info(&self) -> bool {
        self.packet_info
    }

    /// Whether the application asked for it.
    pub(crate) fn packet_info_asked(&self) -> bool {
        self.packet_info_asked.load(Ordering::Relaxed)
    }

    pub(crate) fn ask_for_packet_info(&self, asked: bool) {
        self.packet_info_asked.store(asked, Ordering::Relaxed);
    }

    #[cfg(target_os = "linux")]
    pub(crate) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// Has the kernel join datagrams; `false` if it can't.
    pub(crate) fn enable_gro(&self) -> io::Result<bool> {
        Bursts::enable_gro(self.fd.try_clone()?)
    }

    /// Listeners' sockets closed to make room for others.
    pub(crate) fn listeners_evicted(&self) -> u64 {
        self.bursts.get().map_or(0, Bursts::listeners_evicted)
    }

    /// What moves many datagrams at once, and those that leave from a listener.
    pub(crate) fn bursts(&self) -> io::Result<&Bursts> {
        if let Some(bursts) = self.bursts.get() {
            return Ok(bursts);
        }
        let bursts = Bursts::new(self.fd.try_clone()?)?;
        Ok(self.bursts.get_or_init(|| bursts))
    }

    /// Receives one datagram, its sender, and the address that it was sent to if
    /// that has to be known.
    pub(crate) fn receive(
        &self,
        buffer: &mut [u8],
        wait: Wait,
    ) -> Result<(usize, SocketAddr, Option<IpAddr>), Failure> {
        #[cfg(target_os = "linux")]
        if self.packet_info {
            loop {
                match super::slots::receive_one(&self.fd, &mut *buffer, wait) {
                    Ok(received) => return Ok(received),
                    Err(error) => self.despite_echo(error, wait, PollFlags::IN)?,
                }
            }
        }
        let flags = self.recv_flags(wait)?;
        loop {
            match recvfrom(&self.fd, &mut *buffer, flags) {
                Ok((len, _, peer)) => {
                    let peer = peer.ok_or(Failure::Os(Errno::INVAL))?;
                    let peer = SocketAddr::try_from(peer).map_err(Failure::Os)?;
                    return Ok((len, peer, None));
                }
                Err(error) => self.despite_echo(error, wait, PollFlags::IN)?,
            }
        }
    }

    /// Sends one datagram and returns its length.
    pub(crate) fn send(
        &self,
        datagram: &[u8],
        to: SocketAddr,
        wait: Wait,
    ) -> Result<usize, Failure> {
        let flags = self.send_flags(wait)?;
        let mut again = true;
        loop {
            match sendto(&self.fd, datagram, flags, &to) {
                Ok(sent) => return Ok(sent),
                // Reported in place of sending this datagram, so send it again.
                Err(error) if again && is_echo_of_earlier_send(error) => again = false,
                Err(error) => self.wait_out(error, wait, PollFlags::OUT)?,
            }
        }
    }

    /// As `wait_out`, and has the caller go on at once after the echo of a
    /// datagram sent earlier: it is reported once, and reading it clears it.
    pub(crate) fn despite_echo(
        &self,
        error: Errno,
        wait: Wait,
        what: PollFlags,
    ) -> Result<(), Failure> {
        if is_echo_of_earlier_send(error) {
            return Ok(());
        }
        self.wait_out(error, wait, what)
    }

    /// Waits for `what` if that is all that `error` asks for.
    pub(crate) fn wait_out(
        &self,
        error: Errno,
        wait: Wait,
        what: PollFlags,
    ) -> Result<(), Failure> {
        match (error, wait) {
            (Errno::INTR, _) => Err(Failure::Interrupted),
            (Errno::AGAIN, Wait::Never) => Err(Failure::WouldBlock),
            // Somebody else made the description non-blocking.
            (Errno::AGAIN, Wait::Forever) => self.poll(what, None),
            (Errno::AGAIN, Wait::Until(deadline)) => {
                let left = deadline.saturating_duration_since(Instant::now());
                self.poll(what, Some(left))
            }
            (error, _) => Err(Failure::Os(error)),
        }
    }

    #[cfg(not(windows))]
    fn recv_flags(&self, wait: Wait) -> Result<RecvFlags, Failure> {
        Ok(match wait {
            Wait::Never => RecvFlags::DONTWAIT,
            Wait::Forever | Wait::Until(_) => RecvFlags::empty(),
        })
    }

    #[cfg(not(windows))]
    fn send_flags(&self, wait: Wait) -> Result<SendFlags, Failure> {
        Ok(match wait {
            Wait::Never => SendFlags::DONTWAIT,
            Wait::Forever | Wait::Until(_) => SendFlags::empty(),
        })
    }

    /// Windows has no flag for a call that must not wait, so it asks before.
    #[cfg(windows)]
    fn recv_flags(&self, wait: Wait) -> Result<RecvFlags, Failure> {
        self.ready(wait, PollFlags::IN)?;
        Ok(RecvFlags::empty())
    }

    #[cfg(windows)]
    fn send_flags(&self, wait: Wait) -> Result<SendFlags, Failure> {
        self.ready(wait, PollFlags::OUT)?;
        Ok(SendFlags::empty())
    }

    #[cfg(windows)]
    fn ready(&self, wait: Wait, what: PollFlags) -> Result<(), Failure> {
        match wait {
            Wait::Forever | Wait::Until(_) => Ok(()),
            Wait::Never => match self.poll(what, Some(Duration::ZERO)) {
                Err(Failure::TimedOut) => Err(Failure::WouldBlock),
                result => result,
            },
        }
    }

    fn poll(&self, what: PollFlags, left: Option<Duration>) -> Result<(), Failure> {
        let left = left
            .map(|left| Timespec::try_from(left).map_err(|_| Failure::Os(Errno::INVAL)))
            .transpose()?;
        match poll(&mut [PollFd::new(&self.fd, what)], left.as_ref()) {
            Ok(0) => Err(Failure::TimedOut),
            Ok(_) => Ok(()),
            Err(Errno::INTR) => Err(Failure::Interrupted),
            Err(error) => Err(Failure::Os(error)),
        }
    }
}

/// Whether `error` is only the echo of a datagram sent earlier: some host on the
/// way answered it with an ICMP message. It says nothing of this socket, and
/// anybody could provoke it.
pub(crate) fn is_echo_of_earlier_send(error: Errno) -> bool {
    [
        Errno::CONNREFUSED,
        Errno::CONNRESET,
        Errno::HOSTUNREACH,
        Errno::NETUNREACH,
    ]
    .contains(&error)
}

thread_local! {
    static SPARE: Cell<Option<Box<[u8]>>> = const { Cell::new(None) };
}

/// This thread's buffer, with room for the longest datagram, so that a header
/// never costs the application's buffer any bytes. It is taken rather than
/// borrowed: what Python runs meanwhile, such as a signal's handler, may receive
/// too, and gets another.
pub(crate) struct Buffer(Option<Box<[u8]>>);

impl Buffer {
    pub(crate) fn take() -> Self {
        let spare = SPARE.take();
        Self(Some(
            spare.unwrap_or_else(|| vec![0; MAX_DATAGRAM].into_boxed_slice()),
        ))
    }

    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        self.0.as_deref_mut().unwrap_or_default()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        SPARE.set(self.0.take());
    }
}
