//! Which sockets have something to receive, by mio. It tells of a change alone
//! where the caller wants to hear of whatever is left, so each socket that was
//! reported is registered anew before the next wait.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};

use super::super::{READY, Socket};

const WAKER: Token = Token(usize::MAX);

/// Knows which of the sockets registered with it have something to receive. A
/// socket leaves when it is closed.
#[derive(Debug)]
pub struct Readiness {
    inner: RefCell<Inner>,
    waker: Arc<mio::Waker>,
}

#[derive(Debug)]
struct Inner {
    poll: Poll,
    events: Events,
    /// By descriptor, which is also mio's token: a closed one's number goes to
    /// another socket, which is then registered under its own key.
    keys: HashMap<RawFd, u64>,
    reported: Vec<RawFd>,
}

/// Ends a [`Readiness::wait`] from another thread.
#[derive(Clone, Debug)]
pub struct Waker(Arc<mio::Waker>);

impl Waker {
    /// Ends the wait that goes on, or else the next one.
    ///
    /// # Errors
    ///
    /// Those of writing to a pipe or its like: none is known to occur here.
    pub fn wake(&self) -> io::Result<()> {
        self.0.wake()
    }
}

impl Readiness {
    /// Knows no socket yet.
    ///
    /// # Errors
    ///
    /// Those of making the system's queue of events: no descriptors.
    pub fn new() -> io::Result<Self> {
        let poll = Poll::new()?;
        let waker = mio::Waker::new(poll.registry(), WAKER)?;
        Ok(Self {
            inner: RefCell::new(Inner {
                poll,
                events: Events::with_capacity(READY),
                keys: HashMap::new(),
                reported: Vec::with_capacity(READY),
            }),
            waker: Arc::new(waker),
        })
    }

    /// What wakes whoever waits here.
    #[must_use]
    pub fn waker(&self) -> Waker {
        Waker(Arc::clone(&self.waker))
    }

    /// Reports `socket` under `key` from now on, whenever it has something.
    ///
    /// # Errors
    ///
    /// Those of the system's queue: no memory, or too many registrations.
    pub fn register(&self, socket: &Socket, key: u64) -> io::Result<()> {
        let mut inner = self.inner.borrow_mut();
        let fd = socket.fd();
        let token = token_of(fd)?;
        let registry = inner.poll.registry();
        registry.register(&mut SourceFd(&fd), token, Interest::READABLE)?;
        inner.keys.insert(fd, key);
        Ok(())
    }

    /// Reports a registered `socket` under another `key` from now on.
    ///
    /// # Errors
    ///
    /// None.
    pub fn rename(&self, socket: &Socket, key: u64) -> io::Result<()> {
        self.inner.borrow_mut().keys.insert(socket.fd(), key);
        Ok(())
    }

    /// Waits until a socket has something, the waker is used, or `timeout` is
    /// over (`None`: without end), and adds to `ready` the keys of sockets that
    /// have something. True if anything happened but the timeout.
    ///
    /// # Errors
    ///
    /// Those of the system's queue, after which nothing can go on.
    pub fn wait(&self, timeout: Option<Duration>, ready: &mut Vec<u64>) -> io::Result<bool> {
        let inner = &mut *self.inner.borrow_mut();
        for fd in inner.reported.drain(..) {
            let registry = inner.poll.registry();
            let token = token_of(fd)?;
            // One that is closed by now is no longer known there.
            let _ = registry.reregister(&mut SourceFd(&fd), token, Interest::READABLE);
        }
        match inner.poll.poll(&mut inner.events, timeout) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(false),
            result => result?,
        }
        for event in &inner.events {
            let fd = RawFd::try_from(event.token().0).ok();
            if let Some((fd, key)) = fd.and_then(|fd| Some((fd, inner.keys.get(&fd)?))) {
                ready.push(*key);
                inner.reported.push(fd);
            }
        }
        Ok(!inner.events.is_empty())
    }
}

fn token_of(fd: RawFd) -> io::Result<Token> {
    let number = usize::try_from(fd).map_err(|_| io::ErrorKind::InvalidInput)?;
    Ok(Token(number))
}
