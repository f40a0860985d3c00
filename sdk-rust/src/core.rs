//! What the blocking socket and that of tokio share: single attempts to receive and to
//! send, with a [`Demux`] between the kernel and the application.

use std::cell::RefCell;
use std::io;
use std::net::{self, IpAddr, SocketAddr};
use std::sync::Arc;

use ppv2_udp::{AsFd, MAX_DATAGRAM, SocketState, Transmit};

use crate::clock::Tick;
use crate::datagram::Parts;
use crate::errors::{check_length, is_echo_of_earlier_send, received_in_batches};
use crate::listeners::{Listeners, Source};
use crate::reply_path::Outgoing;
use crate::{Batch, DatagramRef, Demux, ReplyPath};

#[derive(Debug)]
pub(crate) struct Core<S> {
    pub(crate) socket: S,
    pub(crate) demux: Arc<Demux>,
    state: SocketState,
    /// The address that the socket is bound to.
    local: SocketAddr,
    listeners: Listeners<Sender<S>>,
}

/// A socket that is bound to a listener's address.
#[derive(Debug)]
pub(crate) struct Sender<S> {
    socket: S,
    state: SocketState,
}

/// What sends some datagrams that leave from one address.
pub(crate) enum Exit<S> {
    /// The socket that received, from this address if it is named.
    Own(Option<IpAddr>),
    Listener(Arc<Sender<S>>),
}

impl<S: AsFd> Core<S> {
    /// Around a socket that is bound to `local`.
    pub(crate) fn new(socket: S, local: SocketAddr, demux: Arc<Demux>) -> Self {
        Self {
            state: SocketState::new(&socket, local),
            socket,
            local,
            demux,
            listeners: Listeners::new(),
        }
    }

    pub(crate) fn enable_gro(&self) -> io::Result<bool> {
        self.state.enable_gro(&self.socket)
    }

    pub(crate) fn gro(&self) -> bool {
        self.state.gro()
    }

    /// Receives one datagram into `buffer`: its length and what is known of it. `None`
    /// if it was dropped, or if the kernel reported an earlier datagram instead. Waits as
    /// the socket does if `wait` is set.
    pub(crate) fn receive_parts(
        &self,
        buffer: &mut [u8],
        wait: bool,
    ) -> io::Result<Option<(usize, Parts)>> {
        if self.state.gro() {
            return Err(received_in_batches());
        }
        match self.state.receive_one(&self.socket, buffer, wait) {
            Ok(one) => {
                let (now, local) = (Tick::roughly_now(), self.state.reply_from(&one));
                let parts = self
                    .demux
                    .receive_at(now, one.peer, local, &buffer[..one.len]);
                Ok(parts.ok().map(|parts| (one.len, parts)))
            }
            Err(error) if is_echo_of_earlier_send(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// As `receive_parts`, into this thread's buffer, for `take` to copy from.
    pub(crate) fn receive_one<T>(
        &self,
        wait: bool,
        take: impl FnOnce(DatagramRef<'_>) -> T,
    ) -> io::Result<Option<T>> {
        thread_local! {
            /// Has room for the longest datagram, so that a header never costs the
            /// application's buffer any bytes.
            static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        BUFFER.with_borrow_mut(|buffer| {
            buffer.resize(MAX_DATAGRAM, 0);
            let received = self.receive_parts(buffer, wait)?;
            Ok(received.map(|(len, parts)| take(parts.of(&buffer[..len]))))
        })
    }

    /// Receives the datagrams that are there; 0 if all of them were dropped, or if the
    /// kernel reported an earlier datagram instead. Waits for the first as the socket
    /// does if `wait` is set.
    pub(crate) fn receive_batch(&self, batch: &mut Batch, wait: bool) -> io::Result<usize> {
        match batch.fill(&self.demux, &self.state, &self.socket, wait) {
            Err(error) if is_echo_of_earlier_send(&error) => Ok(0),
            result => result,
        }
    }

    /// Sends one datagram by this socket.
    pub(crate) fn send_one(&self, payload: &[u8], path: &ReplyPath) -> io::Result<usize> {
        let header = path.header();
        if !header.is_empty() {
            check_length(&header, payload, path)?;
        }
        let send = || {
            if header.is_empty() {
                let (to, local) = (path.to, path.local);
                return self.state.send_one(&self.socket, payload, to, local);
            }
            let one = transmit(&header, payload, path.to, path.local);
            self.state.send(&self.socket, 1, |_| one)?;
            Ok(payload.len())
        };
        let sent = match send() {
            // The kernel reported an earlier datagram in place of sending this one.
            Err(error) if is_echo_of_earlier_send(&error) => send(),
            result => result,
        }?;
        self.demux.counters().replies_sent(1);
        Ok(sent)
    }

    /// What sends datagrams with the source address of `path`: this socket, or what
    /// `wrap` makes of one that is bound to the listener and doesn't wait.
    pub(crate) fn exit(
        &self,
        path: &ReplyPath,
        wrap: impl FnOnce(net::UdpSocket) -> io::Result<S>,
    ) -> io::Result<Exit<S>> {
        let Some(listener) = path.from else {
            return Ok(Exit::Own(path.local));
        };
        let wrap = |socket| {
            let socket = wrap(socket)?;
            let state = SocketState::unasked(listener);
            Ok(Sender { socket, state })
        };
        let counters = self.demux.counters();
        let source =
            self.listeners
                .source(Some(&self.socket), self.local, listener, counters, wrap)?;
        Ok(match source {
            Source::Own(ip) => Exit::Own(Some(ip)),
            Source::Bound(sender) => Exit::Listener(sender),
        })
    }

    /// The socket behind `exit`.
    pub(crate) fn socket_of<'s>(&'s self, exit: &'s Exit<S>) -> &'s S {
        match exit {
            Exit::Own(_) => &self.socket,
            Exit::Listener(sender) => &sender.socket,
        }
    }

    /// Sends datagrams that leave by `exit`, from the front, and returns how many were
    /// sent; an error if the first can't be.
    pub(crate) fn send_run(&self, exit: &Exit<S>, run: &[Outgoing<'_>]) -> io::Result<usize> {
        let (socket, state, source) = match exit {
            Exit::Own(ip) => (&self.socket, &self.state, *ip),
            Exit::Listener(sender) => (&sender.socket, &sender.state, None),
        };
        let sent = state.send(socket, run.len(), |index| {
            let one = &run[index];
            transmit(&one.header, one.payload, one.path.to, source)
        })?;
        self.demux.counters().replies_sent(sent);
        Ok(sent)
    }
}

fn transmit<'d>(
    header: &'d [u8],
    payload: &'d [u8],
    to: SocketAddr,
    source: Option<IpAddr>,
) -> Transmit<'d> {
    let outgoing = ppv2_udp::Outgoing {
        to: Some(to),
        from: source.map(|ip| SocketAddr::new(ip, 0)),
        header,
        ..ppv2_udp::Outgoing::default()
    };
    Transmit::datagram(outgoing, payload)
}

/// The datagrams at the front that leave from one address.
pub(crate) fn first_run<'o, 'd>(outgoing: &'o [Outgoing<'d>]) -> &'o [Outgoing<'d>] {
    let mut runs = outgoing.chunk_by(|one, next| one.path.same_source(&next.path));
    runs.next().unwrap_or_default()
}

/// Sends all by `send`, which sends the front of datagrams that leave from one address.
/// Returns how many were sent; an error if the first can't be.
pub(crate) fn send_in_runs(
    outgoing: &[Outgoing<'_>],
    mut send: impl FnMut(&[Outgoing<'_>]) -> io::Result<usize>,
) -> io::Result<usize> {
    let mut sent = 0;
    while sent < outgoing.len() {
        match send(first_run(&outgoing[sent..])) {
            Ok(more) => sent += more,
            Err(error) if sent == 0 => return Err(error),
            Err(_) => break,
        }
    }
    Ok(sent)
}
