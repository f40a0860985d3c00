//! Messages with descriptors from process to process, over a Unix stream socket. What they
//! say is for others.
//!
//! A message is a head, a body in MessagePack with named fields, and descriptors:
//!
//! | bytes | |
//! |---|---|
//! | 4 | [`MAGIC`] |
//! | 4 | length of the body, big-endian |
//! | 4 | how many descriptors there are, big-endian |
//! | as told | the body, if it has at most [`MAX_INLINE`] bytes |
//! | 1 for each batch | up to [`BATCH`] descriptors come with each of these bytes |
//!
//! The first descriptor of a longer body, not counted in the head, is a sealed file in memory
//! that has it (memfd_create(2)): a message can then wait in the socket's buffer, however long
//! it is, until somebody reads it. Any other order of bytes and descriptors is an error.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use rustix::cmsg_space;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};
use rustix::io::{Errno, fcntl_dupfd_cloexec};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg, sockopt,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

/// What each message begins with.
const MAGIC: [u8; 4] = *b"ppv2";

const HEAD: usize = 12;

/// The most bytes of a body that are sent through the socket.
const MAX_INLINE: usize = 64 << 10;

/// The most descriptors that one system call sends (SCM_MAX_FD in unix(7)).
const BATCH: usize = 253;

/// Bytes of the buffer for messages that nobody reads yet. It takes memory only while they
/// wait. Without CAP_NET_ADMIN the kernel grants at most twice `net.core.wmem_max`, by default
/// enough for more than 100,000 descriptors.
const UNREAD_BUFFER: usize = 4 << 20;

/// What a file in memory must promise: that it stays as it is.
const SEALS: SealFlags = SealFlags::SEAL
    .union(SealFlags::SHRINK)
    .union(SealFlags::GROW)
    .union(SealFlags::WRITE);

/// Why a message was not sent or received. The channel is of no use afterwards.
#[derive(Debug, Error)]
pub(in crate::runtime) enum ChannelError {
    #[error("the other process has closed the connection")]
    Closed,
    #[error("the other process was silent for {0:?}")]
    TimedOut(Duration),
    #[error(
        "the buffer of the Unix socket is full: the kernel grants too little; raise net.core.wmem_max"
    )]
    Full,
    #[error("the other process does not speak as ppv2-proxy does")]
    Foreign,
    #[error("the message has {found} {what}, and may have {limit}")]
    TooMany {
        what: &'static str,
        found: usize,
        limit: usize,
    },
    #[error("the message has {found} descriptors where {expected} belong")]
    Descriptors { found: usize, expected: usize },
    #[error("this process may not open so many descriptors: raise its limit (ulimit -n)")]
    OpenFiles,
    #[error(
        "this user has more descriptors on the way than a process may open: raise its limit (ulimit -n)"
    )]
    InFlight,
    #[error("the message's file in memory is not as it should be: {0}")]
    Body(&'static str),
    #[error("the message can't be understood: {0}")]
    Decode(#[from] rmp_serde::decode::Error),
    #[error("the message can't be written: {0}")]
    Encode(#[from] rmp_serde::encode::Error),
    #[error("the Unix socket does not work: {0}")]
    Io(#[from] io::Error),
}

impl From<Errno> for ChannelError {
    fn from(error: Errno) -> Self {
        match error {
            Errno::PIPE | Errno::CONNRESET => Self::Closed,
            Errno::TOOMANYREFS => Self::InFlight,
            error => Self::Io(error.into()),
        }
    }
}

/// What a received message may have. It limits what another process can make this one
/// allocate and open.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Bytes of its body.
    pub(super) body: usize,
    /// Descriptors.
    pub(super) descriptors: usize,
}

impl Limits {
    /// A greeting, a request, an answer.
    pub(super) const WORDS: Self = Self {
        body: MAX_INLINE,
        descriptors: 0,
    };

    /// All sockets and sessions. As many descriptors are kept as this process may open.
    pub(super) const STATE: Self = Self {
        body: 1 << 30,
        descriptors: 1 << 20,
    };
}

/// One end of a connection.
#[derive(Debug)]
pub(super) struct Channel {
    stream: UnixStream,
    /// How long one message may take.
    timeout: Option<Duration>,
}

impl Channel {
    /// A channel over a connected socket that blocks.
    pub(super) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            timeout: None,
        }
    }

    /// A channel whose messages wait until somebody reads them from the descriptor, by
    /// [`new`](Self::new). To send what there is no room for fails at once.
    pub(super) fn unread() -> io::Result<(Self, OwnedFd)> {
        let (stream, unread) = UnixStream::pair()?;
        stream.set_nonblocking(true)?;
        if sockopt::set_socket_send_buffer_size_force(&stream, UNREAD_BUFFER).is_err() {
            sockopt::set_socket_send_buffer_size(&stream, UNREAD_BUFFER)?;
        }
        Ok((Self::new(stream), unread.into()))
    }

    /// Has each message fail that is not sent or received in this time, or at most twice as
    /// long if the other process is slow.
    pub(super) fn set_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream.set_read_timeout(timeout)?;
        self.stream.set_write_timeout(timeout)?;
        self.timeout = timeout;
        Ok(())
    }

    /// Whether nobody has the other end any more.
    pub(super) fn is_closed(&self) -> bool {
        let mut ends = [PollFd::new(&self.stream, PollFlags::empty())];
        let polled = poll(&mut ends, Some(&Timespec::default()));
        polled.is_err() || ends[0].revents().contains(PollFlags::HUP)
    }

    /// Closes the connection, also where other threads hold this end.
    pub(super) fn close(&self) {
        // It may be closed already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Sends a message.
    pub(super) fn send<T: Serialize>(
        &self,
        message: &T,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        self.send_body(Body::of(message)?, descriptors)
    }

    /// As [`send`](Self::send), of a body that was written before.
    pub(super) fn send_body(
        &self,
        body: Body,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        let clock = Clock::start(self.timeout);
        let number = |what, found: usize, limit: usize| match u32::try_from(found) {
            Ok(number) if found <= limit => Ok(number),
            _ => Err(ChannelError::TooMany { what, found, limit }),
        };
        let limits = Limits::STATE;
        let len = number("bytes", body.len(), limits.body)?;
        let count = number("descriptors", descriptors.len(), limits.descriptors)?;
        let mut head = [MAGIC, len.to_be_bytes(), count.to_be_bytes()].concat();
        let file = match body {
            Body::Long { file, .. } => Some(file),
            Body::Short(body) => {
                head.extend(body);
                None
            }
        };
        let mut rest = head.as_slice();
        while !rest.is_empty() {
            let sent = self.send_once(rest, &[], &clock)?;
            rest = &rest[sent..];
        }
        let file = file.as_ref().map(AsFd::as_fd);
        let descriptors: Vec<_> = file
            .into_iter()
            .chain(descriptors.iter().copied())
            .collect();
        for batch in descriptors.chunks(BATCH) {
            self.send_once(&[0], batch, &clock)?;
        }
        Ok(())
    }

    fn send_once(
        &self,
        bytes: &[u8],
        descriptors: &[BorrowedFd<'_>],
        clock: &Clock,
    ) -> Result<usize, ChannelError> {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(BATCH))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        let pieces = [IoSlice::new(bytes)];
        loop {
            match sendmsg(&self.stream, &pieces, &mut control, SendFlags::NOSIGNAL) {
                Ok(sent) => return clock.in_time(sent),
                Err(Errno::INTR) => clock.in_time(())?,
                Err(Errno::AGAIN) => return Err(clock.timed_out()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Waits for a message within `limits`. The descriptors of one that fails are closed.
    pub(super) fn receive<T: DeserializeOwned>(
        &self,
        limits: Limits,
    ) -> Result<(T, Vec<OwnedFd>), ChannelError> {
        let (body, descriptors) = self.receive_body(limits)?;
        Ok((body.read()?, descriptors))
    }

    /// As [`receive`](Self::receive), of a body that is to be read later.
    pub(super) fn receive_body(
        &self,
        limits: Limits,
    ) -> Result<(Body, Vec<OwnedFd>), ChannelError> {
        let clock = Clock::start(self.timeout);
        let mut head = [0; HEAD];
        self.fill(&mut head, &clock)?;
        let [m0, m1, m2, m3, l0, l1, l2, l3, c0, c1, c2, c3] = head;
        if [m0, m1, m2, m3] != MAGIC {
            return Err(ChannelError::Foreign);
        }
        let number = |what, bytes, limit| match usize::try_from(u32::from_be_bytes(bytes)) {
            Ok(found) if found <= limit => Ok(found),
            found => Err(ChannelError::TooMany {
                what,
                found: found.unwrap_or(usize::MAX),
                limit,
            }),
        };
        let len = number("bytes", [l0, l1, l2, l3], limits.body)?;
        let count = number("descriptors", [c0, c1, c2, c3], limits.descriptors)?;
        if len <= MAX_INLINE {
            let mut body = vec![0; len];
            self.fill(&mut body, &clock)?;
            let descriptors = self.receive_descriptors(count, &clock)?;
            return Ok((Body::Short(body), descriptors));
        }
        let mut descriptors = self.receive_descriptors(count + 1, &clock)?;
        let file = File::from(descriptors.remove(0));
        Ok((Body::Long { file, len }, descriptors))
    }

    /// Receives as many bytes as `buffer` has, without descriptors.
    fn fill(&self, mut buffer: &mut [u8], clock: &Clock) -> Result<(), ChannelError> {
        while !buffer.is_empty() {
            let mut none = RecvAncillaryBuffer::default();
            let (received, has_all) = self.receive_once(buffer, &mut none, clock)?;
            if !has_all {
                return Err(ChannelError::Descriptors {
                    found: 1,
                    expected: 0,
                });
            }
            buffer = &mut buffer[received..];
        }
        Ok(())
    }

    fn receive_descriptors(
        &self,
        count: usize,
        clock: &Clock,
    ) -> Result<Vec<OwnedFd>, ChannelError> {
        let mut descriptors = Vec::new();
        while descriptors.len() < count {
            let before = descriptors.len();
            let expected = BATCH.min(count - before);
            let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(BATCH))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let (_, has_all) = self.receive_once(&mut [0], &mut control, clock)?;
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(batch) = message {
                    descriptors.extend(batch);
                }
            }
            if !has_all {
                return Err(ChannelError::OpenFiles);
            }
            let found = descriptors.len() - before;
            if found != expected {
                return Err(ChannelError::Descriptors { found, expected });
            }
        }
        Ok(descriptors)
    }

    /// Receives some bytes, and whether all descriptors that came with them are there.
    fn receive_once(
        &self,
        buffer: &mut [u8],
        control: &mut RecvAncillaryBuffer<'_>,
        clock: &Clock,
    ) -> Result<(usize, bool), ChannelError> {
        let mut pieces = [IoSliceMut::new(buffer)];
        loop {
            match recvmsg(&self.stream, &mut pieces, control, RecvFlags::CMSG_CLOEXEC) {
                Ok(received) if received.bytes == 0 => return Err(ChannelError::Closed),
                Ok(received) => {
                    let has_all = !received.flags.contains(ReturnFlags::CTRUNC);
                    return clock.in_time((received.bytes, has_all));
                }
                Err(Errno::INTR) => clock.in_time(())?,
                Err(Errno::AGAIN) => return Err(clock.timed_out()),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// The user that the other process ran as when it connected or began to listen (SO_PEERCRED
/// in unix(7)).
///
/// Not by rustix, which takes the process's number for one above 0: a process of another
/// container has none here.
pub(super) fn peer_uid(stream: &UnixStream) -> io::Result<u32> {
    Ok(getsockopt(stream, PeerCredentials)?.uid())
}

/// Has the kernel make room for `more` descriptors, as far as the process may open them,
/// before a message comes with them: as it receives them it would enlarge its table again and
/// again, and with several threads wait for all processors each time, 10 ms and more.
pub(super) fn make_room(more: usize) -> io::Result<()> {
    let lowest = fcntl_dupfd_cloexec(io::stderr(), 0)?;
    let (limit, _) = rlimit::Resource::NOFILE.get()?;
    let last = i32::try_from(limit.saturating_sub(1)).unwrap_or(i32::MAX);
    let wanted = i32::try_from(more).unwrap_or(i32::MAX);
    let wanted = lowest.as_raw_fd().saturating_add(wanted).min(last);
    match fcntl_dupfd_cloexec(&lowest, wanted) {
        // The last one is in use: there is room already.
        Err(Errno::MFILE) => Ok(()),
        done => Ok(done.map(drop)?),
    }
}

/// How long a message takes. The socket's own timeouts limit each system call alone.
struct Clock {
    timeout: Option<Duration>,
    began: Instant,
}

impl Clock {
    fn start(timeout: Option<Duration>) -> Self {
        Self {
            timeout,
            began: Instant::now(),
        }
    }

    fn in_time<T>(&self, value: T) -> Result<T, ChannelError> {
        match self.timeout {
            Some(timeout) if self.began.elapsed() > timeout => Err(ChannelError::TimedOut(timeout)),
            _ => Ok(value),
        }
    }

    /// What it means that the socket would block. Without timeout it never does, but for one
    /// that nobody reads.
    fn timed_out(&self) -> ChannelError {
        self.timeout
            .map_or(ChannelError::Full, ChannelError::TimedOut)
    }
}

/// The body of a message.
#[derive(Debug)]
pub(super) enum Body {
    /// It goes through the socket.
    Short(Vec<u8>),
    /// It is in a file in memory, of which the socket passes on the descriptor.
    Long {
        /// The file.
        file: File,
        /// Bytes in it.
        len: usize,
    },
}

impl Body {
    /// Writes a message.
    pub(super) fn of<T: Serialize>(message: &T) -> Result<Self, ChannelError> {
        let body = rmp_serde::to_vec_named(message)?;
        if body.len() <= MAX_INLINE {
            return Ok(Self::Short(body));
        }
        let len = body.len();
        let file = in_memory(&body)?;
        Ok(Self::Long { file, len })
    }

    fn len(&self) -> usize {
        match self {
            Self::Short(body) => body.len(),
            Self::Long { len, .. } => *len,
        }
    }

    /// Reads a message.
    pub(super) fn read<T: DeserializeOwned>(self) -> Result<T, ChannelError> {
        let body = match self {
            Self::Short(body) => body,
            Self::Long { file, len } => read_sealed(&file, len)?,
        };
        let mut rest = body.as_slice();
        let message = rmp_serde::from_read(&mut rest)?;
        if !rest.is_empty() {
            return Err(ChannelError::Body("there are bytes after it"));
        }
        Ok(message)
    }
}

/// A file in memory that has `body` and does not change.
fn in_memory(body: &[u8]) -> Result<File, ChannelError> {
    let create = |more: MemfdFlags| {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | more;
        memfd_create("ppv2-handover", flags)
    };
    // Linux before 6.3 does not know it, later ones may demand it.
    let file = create(MemfdFlags::NOEXEC_SEAL).or_else(|_| create(MemfdFlags::empty()))?;
    let mut file = File::from(file);
    file.write_all(body)?;
    fcntl_add_seals(&file, SEALS)?;
    Ok(file)
}

/// Reads what [`in_memory`] has written, of `len` bytes.
fn read_sealed(file: &File, len: usize) -> Result<Vec<u8>, ChannelError> {
    let seals = fcntl_get_seals(file).map_err(|_| ChannelError::Body("it is another file"))?;
    if !seals.contains(SEALS) {
        return Err(ChannelError::Body("it may change"));
    }
    let metadata = file.metadata()?;
    if metadata.len() != len as u64 {
        return Err(ChannelError::Body("it has another length"));
    }
    // Holes cost the sender nothing, and would cost memory here.
    if metadata.blocks().saturating_mul(512) < metadata.len() {
        return Err(ChannelError::Body("it has holes"));
    }
    let mut body = vec![0; len];
    file.read_exact_at(&mut body, 0)?;
    Ok(body)
}

#[cfg(test)]
mod tests;
