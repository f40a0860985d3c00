//! How long one receive call goes on when what arrives is dropped, and a send
//! call when there is no room.
//!
//! A socket's read timeout begins again with every call to the kernel, so a trickle
//! of bad datagrams would keep a receive call waiting for ever. From the first drop
//! on, the call measures the time itself.

use std::io;
use std::net::UdpSocket;
use std::time::Instant;

/// Datagrams that a call which must not wait drops before it returns. Otherwise a
/// flood of bad ones would hold up its caller for as long as it lasts.
pub(crate) const MOST_DROPS_IN_A_ROW: usize = 64;

/// The waiting of one receive call.
pub(crate) struct Patience {
    /// When the call began, if the socket had a timeout then.
    started: Option<Instant>,
    how: How,
}

enum How {
    /// Nothing was dropped so far: the kernel keeps the time.
    Undisturbed,
    /// The socket waits for as long as it takes.
    Forever,
    /// The socket does not wait, and so many datagrams were dropped.
    AtOnce(usize),
    /// The call ends then.
    Until(Instant),
}

impl Patience {
    /// Of a call that begins now on a socket that has a timeout or, as far as is
    /// known, none.
    pub(crate) fn new(has_timeout: bool) -> Self {
        Self {
            started: has_timeout.then(Instant::now),
            how: How::Undisturbed,
        }
    }

    /// Receives by `receive`, which waits as the socket does when it is handed
    /// `true`, and not at all when `false`. An error of the kind that `std` uses
    /// for a timeout when the time is over.
    pub(crate) fn receive<T>(
        &self,
        socket: &UdpSocket,
        mut receive: impl FnMut(bool) -> io::Result<T>,
    ) -> io::Result<T> {
        match self.how {
            How::Undisturbed | How::Forever | How::AtOnce(_) => receive(true),
            How::Until(deadline) => receive_until(socket, receive, deadline),
        }
    }

    /// Notes that what was received, so many datagrams, was none for the
    /// application; an error if those were the last that the call had time for.
    pub(crate) fn dropped(&mut self, socket: &UdpSocket, datagrams: usize) -> io::Result<()> {
        if let How::Undisturbed = self.how {
            self.how = if is_blocking(socket)? {
                let deadline = socket.read_timeout()?.and_then(|timeout| {
                    let started = self.started.unwrap_or_else(Instant::now);
                    started.checked_add(timeout)
                });
                deadline.map_or(How::Forever, How::Until)
            } else {
                How::AtOnce(0)
            };
        }
        match &mut self.how {
            How::Until(deadline) if Instant::now() >= *deadline => Err(timed_out()),
            How::AtOnce(dropped) => {
                *dropped += datagrams;
                if *dropped >= MOST_DROPS_IN_A_ROW {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                Ok(())
            }
            How::Undisturbed | How::Forever | How::Until(_) => Ok(()),
        }
    }
}

#[cfg(unix)]
fn timed_out() -> io::Error {
    io::ErrorKind::WouldBlock.into()
}

#[cfg(unix)]
fn is_blocking(socket: &UdpSocket) -> io::Result<bool> {
    use rustix::fs::{OFlags, fcntl_getfl};

    Ok(!fcntl_getfl(socket)?.contains(OFlags::NONBLOCK))
}

/// Other threads may share the socket, so its timeout can't be changed for one
/// call; and a datagram that `poll` saw may be taken by another thread, so the
/// receiving itself must not wait.
#[cfg(unix)]
fn receive_until<T>(
    socket: &UdpSocket,
    mut receive: impl FnMut(bool) -> io::Result<T>,
    deadline: Instant,
) -> io::Result<T> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::io::Errno;

    loop {
        match receive(false) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            result => return result,
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(|_| Errno::INVAL)?;
        if poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&left))? == 0 {
            return Err(timed_out());
        }
    }
}

/// Sends by `send` on `sender`, which doesn't wait, waiting for room as long as
/// `own` would. If that doesn't wait either, nobody else can wait for `sender`,
/// so it is given a moment rather than be asked again and again.
#[cfg(unix)]
pub(crate) fn until_there_is_room<T>(
    sender: &UdpSocket,
    own: &UdpSocket,
    mut send: impl FnMut() -> io::Result<T>,
) -> io::Result<T> {
    use std::time::Duration;

    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::io::Errno;

    const MOMENT: Duration = Duration::from_millis(1);

    loop {
        match send() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            result => return result,
        }
        let timeout = match is_blocking(own)? {
            true => own.write_timeout()?,
            false => Some(MOMENT),
        };
        let timeout = timeout
            .map(|timeout| Timespec::try_from(timeout).map_err(|_| Errno::INVAL))
            .transpose()?;
        if poll(&mut [PollFd::new(sender, PollFlags::OUT)], timeout.as_ref())? == 0 {
            return Err(timed_out());
        }
    }
}

/// Here `sender` waits by itself.
#[cfg(not(unix))]
pub(crate) fn until_there_is_room<T>(
    _sender: &UdpSocket,
    _own: &UdpSocket,
    mut send: impl FnMut() -> io::Result<T>,
) -> io::Result<T> {
    send()
}

#[cfg(not(unix))]
fn timed_out() -> io::Error {
    io::ErrorKind::TimedOut.into()
}

#[cfg(not(unix))]
fn is_blocking(_socket: &UdpSocket) -> io::Result<bool> {
    Ok(true)
}

/// Without `poll` the last wait is as long as the socket's timeout, so that the
/// call may take up to twice as long.
#[cfg(not(unix))]
fn receive_until<T>(
    _socket: &UdpSocket,
    mut receive: impl FnMut(bool) -> io::Result<T>,
    _deadline: Instant,
) -> io::Result<T> {
    receive(true)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(1);

    /// A call that began `ago` and has just dropped a datagram.
    fn after_a_drop(socket: &UdpSocket, ago: Duration) -> io::Result<()> {
        let started = Instant::now().checked_sub(ago);
        let how = How::Undisturbed;
        Patience { started, how }.dropped(socket, 1)
    }

    #[test]
    fn even_a_flood_without_a_gap_can_not_prolong_a_call() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(after_a_drop(&socket, 2 * TIMEOUT).is_ok());
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        assert!(after_a_drop(&socket, Duration::ZERO).is_ok());
        let error = after_a_drop(&socket, 2 * TIMEOUT).unwrap_err();
        assert_eq!(error.kind(), timed_out().kind());
    }

    #[cfg(unix)]
    #[test]
    fn a_full_socket_is_asked_again_once_it_has_room() {
        let [sender, own] = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
        for nonblocking in [false, true] {
            own.set_nonblocking(nonblocking).unwrap();
            let mut answers = [Err(timed_out()), Err(timed_out()), Ok(5)].into_iter();
            let sent = until_there_is_room(&sender, &own, || answers.next().unwrap());
            assert_eq!(sent.unwrap(), 5);
            let refused = || Err::<(), _>(io::ErrorKind::InvalidInput.into());
            let error = until_there_is_room(&sender, &own, refused).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
    }

    #[test]
    fn a_socket_that_does_not_block_has_no_timeout() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        socket.set_nonblocking(true).unwrap();
        assert!(after_a_drop(&socket, 2 * TIMEOUT).is_ok());
    }
}
