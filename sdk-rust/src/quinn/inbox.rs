//! Where datagrams of a QUIC endpoint land with their headers, and wait until
//! they are handed on without.
//!
//! quinn's own buffers are made for the payload that it announces, so that a
//! header would cut it off; it takes data from offset 0; and a burst that the
//! kernel coalesced has a header before each of its datagrams, which may name
//! different clients, whereas quinn takes a burst for one client's.

use std::array;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::task::{Context, Poll, ready};

use ::quinn::AsyncUdpSocket;
use ::quinn::udp::{BATCH_SIZE, EcnCodepoint, RecvMeta};
use ppv2_udp::{MAX_DATAGRAM, SLOT};

use crate::Demux;
use crate::clock::Tick;

/// Receive calls of which all was dropped, after which other tasks get their
/// turn. tokio sees to that sooner, other runtimes may not.
const MOST_DROPPED_IN_A_ROW: usize = 16;

/// Received datagrams that quinn has not taken yet, which are at most what one
/// receive call brought.
#[derive(Default)]
pub(super) struct Inbox {
    buffer: Vec<u8>,
    waiting: Vec<Waiting>,
    /// How many of those that wait were taken.
    taken: usize,
}

struct Waiting {
    payload: Range<usize>,
    about: About,
}

/// What quinn wants to know of a burst, all of which must be the same.
#[derive(Clone, Copy, PartialEq, Eq)]
struct About {
    client: SocketAddr,
    ecn: Option<EcnCodepoint>,
    /// The server's own address, not the one in the header: replies are sent
    /// from there.
    dst_ip: Option<IpAddr>,
}

impl Inbox {
    pub(super) fn poll_recv(
        &mut self,
        cx: &mut Context<'_>,
        socket: &dyn AsyncUdpSocket,
        demux: &Demux,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        for _ in 0..MOST_DROPPED_IN_A_ROW {
            let handed_on = self.hand_on(bufs, meta);
            if handed_on > 0 {
                return Poll::Ready(Ok(handed_on));
            }
            ready!(self.receive(cx, socket, demux))?;
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Receives what is there, and keeps what `demux` lets in.
    fn receive(
        &mut self,
        cx: &mut Context<'_>,
        socket: &dyn AsyncUdpSocket,
        demux: &Demux,
    ) -> Poll<io::Result<()>> {
        self.buffer.resize(BATCH_SIZE * SLOT, 0);
        let mut metas = [RecvMeta::default(); BATCH_SIZE];
        let mut slots = self.buffer.chunks_exact_mut(SLOT);
        let mut slots: [_; BATCH_SIZE] = array::from_fn(|_| {
            let slot = slots.next().expect("as many as the buffer was made for");
            IoSliceMut::new(&mut slot[..MAX_DATAGRAM])
        });
        let received = ready!(socket.poll_recv(cx, &mut slots, &mut metas))?;

        self.waiting.clear();
        self.taken = 0;
        let mut demux = demux.lock(Tick::roughly_now());
        for (slot, meta) in metas[..received].iter().enumerate() {
            let end = slot * SLOT + meta.len;
            for start in (slot * SLOT..end).step_by(meta.stride.max(1)) {
                let range = start..end.min(start + meta.stride.max(1));
                let bytes = &self.buffer[range.clone()];
                if let Ok(parts) = demux.receive(meta.addr, meta.dst_ip, bytes) {
                    self.waiting.push(Waiting {
                        payload: range.start + parts.header_len..range.end,
                        about: About {
                            client: parts.reply_path.client,
                            ecn: meta.ecn,
                            dst_ip: meta.dst_ip,
                        },
                    });
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Fills quinn's buffers from the front, each with what can pass for one
    /// burst: consecutive datagrams of one client and one length, save that the
    /// last may be shorter. Returns how many buffers were filled.
    fn hand_on(&mut self, bufs: &mut [IoSliceMut<'_>], meta: &mut [RecvMeta]) -> usize {
        let mut filled = 0;
        for (buf, meta) in bufs.iter_mut().zip(meta) {
            let Some(about) = self.next_about(buf.len()) else {
                break;
            };
            let (mut len, mut stride) = (0, 0);
            while let Some(next) = self.waiting.get(self.taken) {
                let payload = &self.buffer[next.payload.clone()];
                let fits = payload.len() <= buf.len() - len;
                let goes_on = len == 0 || (len % stride == 0 && payload.len() <= stride);
                if next.about != about || !fits || !goes_on || payload.is_empty() {
                    break;
                }
                if len == 0 {
                    stride = payload.len();
                }
                buf[len..][..payload.len()].copy_from_slice(payload);
                len += payload.len();
                self.taken += 1;
            }
            *meta = RecvMeta {
                addr: about.client,
                len,
                stride,
                ecn: about.ecn,
                dst_ip: about.dst_ip,
            };
            filled += 1;
        }
        filled
    }

    /// What is known of the next that quinn can take. An empty datagram is none
    /// of QUIC's, nor is one longer than the buffer: that is as long as what
    /// quinn announced.
    fn next_about(&mut self, room: usize) -> Option<About> {
        loop {
            let next = self.waiting.get(self.taken)?;
            if (1..=room).contains(&next.payload.len()) {
                return Some(next.about);
            }
            self.taken += 1;
        }
    }
}

#[cfg(test)]
mod tests;
