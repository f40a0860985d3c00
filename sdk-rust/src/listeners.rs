//! The source addresses of replies that go straight to clients: a bounded table of
//! listeners' addresses. `linux` and `portable` make what sends from one.

#[cfg_attr(target_os = "linux", path = "listeners/linux.rs")]
#[cfg_attr(not(target_os = "linux"), path = "listeners/portable.rs")]
mod system;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};

use ahash::RandomState;
use hashlink::LinkedHashMap;
use ppv2_udp::AsFd;
use thiserror::Error;

use crate::address::is_one_client;
use crate::stats::Counters;

/// Listeners that are remembered. Only trusted proxies name them; it bounds the
/// descriptors that a faulty one could take.
const MAX_LISTENERS: usize = 64;

/// The addresses that one socket's replies leave from, the longest unused first.
pub(crate) struct Listeners<S>(Mutex<Table<S>>);

/// The hasher is keyed, since other hosts choose the addresses.
type Table<S> = LinkedHashMap<SocketAddr, Source<S>, RandomState>;

/// What sends from a listener's address.
pub(crate) enum Source<S> {
    /// The socket that received, when told to use this IP address.
    Own(IpAddr),
    /// A socket bound to the address.
    Bound(Arc<S>),
}

impl<S> Listeners<S> {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(LinkedHashMap::with_hasher(RandomState::new())))
    }

    /// What sends from `listener`: the socket that received, which is bound to
    /// `local` and is `None` if it is out of reach, or what `wrap` makes of a
    /// socket that doesn't wait.
    ///
    /// # Errors
    ///
    /// What was tried, and how to fix it.
    pub(crate) fn source(
        &self,
        receiver: Option<&impl AsFd>,
        local: SocketAddr,
        listener: SocketAddr,
        counters: &Counters,
        wrap: impl FnOnce(UdpSocket) -> io::Result<S>,
    ) -> io::Result<Source<S>> {
        // Nothing panics halfway through a change.
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = table.to_back(&listener) {
            return Ok(known.clone());
        }
        if !is_one_client(&listener) || system::is_broadcast(listener) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                NotOneHosts(listener),
            ));
        }
        let source = match system::sender(receiver, local, listener)? {
            None => Source::Own(listener.ip()),
            Some(socket) => Source::Bound(Arc::new(wrap(socket)?)),
        };
        table.insert(listener, source.clone());
        if table.len() > MAX_LISTENERS {
            table.pop_front();
            counters.listener_evicted();
        }
        Ok(source)
    }
}

impl<S> fmt::Debug for Listeners<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        f.debug_set().entries(table.keys()).finish()
    }
}

impl<S> Clone for Source<S> {
    fn clone(&self) -> Self {
        match self {
            Self::Own(ip) => Self::Own(*ip),
            Self::Bound(socket) => Self::Bound(Arc::clone(socket)),
        }
    }
}

/// No socket can be bound to the listener's address.
#[derive(Error)]
#[error("can't send from listener {listener}: {error}; {fix}")]
struct NotBound {
    listener: SocketAddr,
    #[source]
    error: io::Error,
    fix: String,
}

message_as_debug!(NotBound);

impl From<NotBound> for io::Error {
    fn from(error: NotBound) -> Self {
        Self::new(error.error.kind(), error)
    }
}

/// A proxy wrote a destination that no host can send from.
#[derive(Error)]
#[error(
    "can't send from listener {0}, which the client's header names as destination, since it is no single host's address and port; have the proxy write the address that the client sent to"
)]
struct NotOneHosts(SocketAddr);

message_as_debug!(NotOneHosts);
