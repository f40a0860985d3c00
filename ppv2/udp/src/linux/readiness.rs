//! Which sockets have something to receive: a level-triggered epoll of each
//! worker's own (epoll(7)).
//!
//! Level-triggered, because a socket then need not be read until it is empty:
//! what is left is reported again. A session's socket mostly holds one reply,
//! and edge-triggered it must be asked for another one to learn that there is
//! none. Measured with 64 clients that each have one datagram of 64 bytes in
//! flight, CPU per datagram divided by that of a bare loop that adds the same
//! header and checks nothing: 1.13 edge-triggered through mio, 1.08 to 1.10 as
//! it is here (`ppv2-bench run --only scattered-64`).

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};

/// Sockets that one wait reports; more are reported by the next.
pub const READY: usize = 1024;

/// The waker's key.
const WAKER: u64 = u64::MAX;

/// Reports which of the sockets registered with it have something to receive. A socket that
/// is closed is no longer registered, unless another descriptor of it is open.
#[derive(Debug)]
pub struct Readiness {
    epoll: OwnedFd,
    waker: Arc<OwnedFd>,
}

/// Ends a [`Readiness::wait`] from another thread.
#[derive(Clone, Debug)]
pub struct Waker(Arc<OwnedFd>);

impl Waker {
    /// Ends the current wait, or else the next one.
    ///
    /// # Errors
    ///
    /// Those of writing to an eventfd: none is known to occur here.
    pub fn wake(&self) -> io::Result<()> {
        match rustix::io::write(&self.0, &1_u64.to_ne_bytes()) {
            // The counter is at its limit, so that a wake-up waits already.
            Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl Readiness {
    /// No socket is registered yet.
    ///
    /// # Errors
    ///
    /// Those of `epoll_create`, `eventfd` and `epoll_ctl`: no descriptors.
    pub fn new() -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let waker = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        // Each write is an edge of its own, so that it is never read.
        let edges = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&epoll, &waker, epoll::EventData::new_u64(WAKER), edges)?;
        Ok(Self {
            epoll,
            waker: Arc::new(waker),
        })
    }

    /// A handle that ends a [`wait`](Self::wait) from another thread.
    #[must_use]
    pub fn waker(&self) -> Waker {
        Waker(Arc::clone(&self.waker))
    }

    /// Reports `socket` under `key` from now on, whenever it has something. `u64::MAX` is
    /// reserved.
    ///
    /// # Errors
    ///
    /// Those of `epoll_ctl`: no memory, or too many registrations.
    pub fn register(&self, socket: &impl AsFd, key: u64) -> io::Result<()> {
        let data = epoll::EventData::new_u64(key);
        Ok(epoll::add(
            &self.epoll,
            socket,
            data,
            epoll::EventFlags::IN,
        )?)
    }

    /// Reports a registered `socket` under another `key` from now on.
    ///
    /// # Errors
    ///
    /// Those of `epoll_ctl`: none is known to occur here.
    pub fn rename(&self, socket: &impl AsFd, key: u64) -> io::Result<()> {
        let data = epoll::EventData::new_u64(key);
        Ok(epoll::modify(
            &self.epoll,
            socket,
            data,
            epoll::EventFlags::IN,
        )?)
    }

    /// Reports a registered `socket` no more.
    ///
    /// # Errors
    ///
    /// Those of `epoll_ctl`: it is not registered.
    pub fn unregister(&self, socket: &impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(&self.epoll, socket)?)
    }

    /// Waits until a socket has something, the waker is used, or `timeout` is over (`None`:
    /// forever), and adds to `ready` the keys of at most [`READY`] sockets that have
    /// something. True if anything but the timeout ended the wait.
    ///
    /// # Errors
    ///
    /// Those of `epoll_wait`, after which nothing can go on.
    pub fn wait(&self, timeout: Option<Duration>, ready: &mut Vec<u64>) -> io::Result<bool> {
        // A timeout beyond the range of the kernel's type is as good as none.
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let mut room = [MaybeUninit::<epoll::Event>::uninit(); READY];
        let events = match epoll::wait(&self.epoll, &mut room[..], timeout.as_ref()) {
            Ok((events, _)) => events,
            Err(rustix::io::Errno::INTR) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        let keys = events.iter().map(|event| event.data.u64());
        ready.extend(keys.filter(|key| *key != WAKER));
        Ok(!events.is_empty())
    }
}
