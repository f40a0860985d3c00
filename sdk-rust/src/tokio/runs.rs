//! Sending what leaves from one address: the socket's own, or a listener's.

use std::io;
use std::net::{self, SocketAddr};

use ::tokio::io::Interest;
use ppv2_udp::SocketState;

use super::UdpSocket;
use crate::errors::despite_echo;
use crate::listeners::Source;
use crate::offload::{self, Outgoing};

/// A socket that is bound to a listener's address.
#[derive(Debug)]
pub(super) struct Sender {
    pub(super) inner: ::tokio::net::UdpSocket,
    state: SocketState,
}

impl UdpSocket {
    /// Sends datagrams that leave from one address, from the front, and returns
    /// how many were sent; an error if it is the first that can't be.
    pub(super) async fn send_run(&self, run: &[Outgoing<'_>]) -> io::Result<usize> {
        let source = self.source_of(run)?;
        let once = || self.send_by(source.as_ref(), run);
        match &source {
            Some(Source::Bound(sender)) => sender.inner.async_io(Interest::WRITABLE, once).await,
            Some(Source::Own(_)) | None => self.inner.async_io(Interest::WRITABLE, once).await,
        }
    }

    /// As `send_run`, without waiting.
    pub(super) fn try_send_run(&self, run: &[Outgoing<'_>]) -> io::Result<usize> {
        let source = self.source_of(run)?;
        let once = || self.send_by(source.as_ref(), run);
        match &source {
            Some(Source::Bound(sender)) => sender.inner.try_io(Interest::WRITABLE, once),
            Some(Source::Own(_)) | None => self.inner.try_io(Interest::WRITABLE, once),
        }
    }

    fn send_by(&self, source: Option<&Source<Sender>>, run: &[Outgoing<'_>]) -> io::Result<usize> {
        let (socket, state, ip) = match source {
            None => (
                &self.inner,
                &self.state,
                run.first().and_then(|(_, way)| way.local),
            ),
            Some(Source::Own(ip)) => (&self.inner, &self.state, Some(*ip)),
            Some(Source::Bound(sender)) => (&sender.inner, &sender.state, None),
        };
        let sent = despite_echo(|| offload::send(socket, state, run, ip))?;
        self.gate.counters().replies_sent_many(sent);
        Ok(sent)
    }

    pub(super) fn source_of(&self, run: &[Outgoing<'_>]) -> io::Result<Option<Source<Sender>>> {
        let listener = run.first().and_then(|(_, way)| way.from);
        listener.map(|listener| self.source(listener)).transpose()
    }

    pub(super) fn source(&self, listener: SocketAddr) -> io::Result<Source<Sender>> {
        let local = self.inner.local_addr()?;
        let counters = self.gate.counters();
        let wrap = |socket: net::UdpSocket| {
            let _context = self.runtime.enter();
            socket.set_nonblocking(true)?;
            let inner = ::tokio::net::UdpSocket::from_std(socket)?;
            Ok(Sender {
                state: SocketState::unasked(listener),
                inner,
            })
        };
        self.listeners
            .source(Some(&self.inner), local, listener, counters, wrap)
    }
}

/// Those from the front that leave from one address.
pub(super) fn first_run<'o, 'd>(outgoing: &'o [Outgoing<'d>]) -> &'o [Outgoing<'d>] {
    let mut runs = outgoing.chunk_by(|(_, one), (_, next)| one.same_source(next));
    runs.next().unwrap_or_default()
}
