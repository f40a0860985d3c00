//! Where many datagrams are received with one call: a slot for each, or for
//! several that the kernel joined.
//!
//! The SDK's socket receives batches too, and can't stand in for this: it decides
//! with a gate of its own, whereas single calls here ask one that `core` owns;
//! it waits by the timeout of the descriptor, whereas Python's is kept beside it,
//! and goes on through a flood without a look at signals; and it keeps no header,
//! nor lets go of its slots for a signal's handler that receives.

use std::cell::Cell;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;

use super::descriptor::{Descriptor, Failure, Wait};

#[cfg(target_os = "linux")]
use self::linux as system;
#[cfg(not(target_os = "linux"))]
use self::portable as system;

/// No UDP datagram is longer, its length field having 16 bits; nor is what the
/// kernel joins.
const MAX_DATAGRAM: usize = 65_535;

/// Two cache lines over 64 KiB, since the fronts of all slots would fall into
/// the same few sets of the cache otherwise.
const SLOT: usize = MAX_DATAGRAM + 1 + 128;

thread_local! {
    static SPARE: Cell<Option<Slots>> = const { Cell::new(None) };
}

/// Slots and what is in them. Each has 64 KiB, of which the system gives only
/// what has ever been used.
pub(crate) struct Slots {
    /// Perhaps more of them than are in use.
    buffer: Vec<u8>,
    count: usize,
    filled: Vec<Filled>,
}

struct Filled {
    len: usize,
    /// Length of each datagram in the slot but the last, which may be shorter.
    stride: usize,
    peer: SocketAddr,
    /// The address that it was sent to, if that has to be known.
    local: Option<IpAddr>,
}

impl Slots {
    /// This thread's slots if it has so many, else new ones. They are taken
    /// rather than borrowed: what Python runs meanwhile, such as a signal's
    /// handler, may receive too, and makes its own.
    pub(crate) fn take(count: usize) -> Self {
        match SPARE.take() {
            Some(spare) if spare.buffer.len() >= count * SLOT => Self { count, ..spare },
            _ => Self {
                buffer: vec![0; count * SLOT],
                count,
                filled: Vec::with_capacity(count),
            },
        }
    }

    /// Leaves them to the next call.
    pub(crate) fn give_back(self) {
        SPARE.set(Some(self));
    }

    /// Waits for a datagram, and takes what else is there, up to the number of
    /// slots.
    pub(crate) fn fill(&mut self, descriptor: &Descriptor, wait: Wait) -> Result<(), Failure> {
        self.filled.clear();
        system::fill(self, descriptor, wait)
    }

    /// The datagrams in the order in which they came: their peers, and where
    /// they stand in `bytes`.
    pub(crate) fn datagrams(&self) -> impl Iterator<Item = (Received, Range<usize>)> {
        self.filled.iter().enumerate().flat_map(|(slot, filled)| {
            let front = slot * SLOT;
            let (len, stride) = (filled.len, filled.stride.max(1));
            // An empty datagram is one, too.
            (0..len.max(1)).step_by(stride).map(move |at| {
                let end = len.min(at + stride);
                ((filled.peer, filled.local), front + at..front + end)
            })
        })
    }

    pub(crate) fn bytes(&self, range: Range<usize>) -> &[u8] {
        self.buffer.get(range).unwrap_or_default()
    }

    /// The slots to fill, and where to note what is in them.
    fn parts(&mut self) -> (impl Iterator<Item = &mut [u8]>, &mut Vec<Filled>) {
        let slots = self.buffer.chunks_exact_mut(SLOT).take(self.count);
        (
            slots.map(|slot| &mut slot[..MAX_DATAGRAM]),
            &mut self.filled,
        )
    }
}

/// The sender of a datagram, and the address that it was sent to if that has to be
/// known.
pub(crate) type Received = (SocketAddr, Option<IpAddr>);

#[cfg(target_os = "linux")]
pub(crate) use linux::receive_one;

#[cfg(target_os = "linux")]
mod linux {
    use std::ffi::c_int;
    use std::io::IoSliceMut;
    use std::net::{IpAddr, SocketAddr};
    use std::os::fd::AsRawFd;

    use nix::cmsg_space;
    use nix::sys::socket::{
        ControlMessageOwned, MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg, recvmsg,
    };
    use rustix::event::PollFlags;
    use rustix::fd::OwnedFd;
    use rustix::io::Errno;

    use super::super::packet_info::{self, ROOM};
    use super::{Descriptor, Failure, Filled, Slots, Wait};

    /// With `recvmmsg`, which says of each message how the kernel joined it
    /// (UDP_GRO in udp(7)).
    pub(super) fn fill(
        slots: &mut Slots,
        descriptor: &Descriptor,
        wait: Wait,
    ) -> Result<(), Failure> {
        loop {
            match receive(slots, descriptor) {
                Ok(()) => return Ok(()),
                Err(error) => descriptor.despite_echo(error, wait, PollFlags::IN)?,
            }
        }
    }

    fn receive(slots: &mut Slots, descriptor: &Descriptor) -> Result<(), Errno> {
        let (buffers, filled) = slots.parts();
        let mut buffers: Vec<_> = buffers.map(|slot| [IoSliceMut::new(slot)]).collect();
        // Made anew for each call: `recvmmsg` leaves the lengths of the last call
        // in them, and would cut off a longer address or control message.
        let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(buffers.len(), {
            Some(match descriptor.packet_info() {
                true => cmsg_space!(c_int, [u8; ROOM]),
                false => cmsg_space!(c_int),
            })
        });
        let fd = descriptor.fd().as_raw_fd();
        // Waits for the first as the descriptor does.
        let flags = MsgFlags::MSG_WAITFORONE;
        let messages =
            recvmmsg(fd, &mut headers, buffers.iter_mut(), flags, None).map_err(of_nix)?;
        for message in messages {
            let peer = message.address.as_ref().and_then(to_std);
            let peer = peer.ok_or(Errno::AFNOSUPPORT)?;
            let (mut stride, mut local) = (message.bytes, None);
            for control in message.cmsgs().map_err(of_nix)? {
                if let ControlMessageOwned::UdpGroSegments(size) = control {
                    stride = usize::try_from(size).unwrap_or(stride);
                } else if descriptor.packet_info() {
                    local = packet_info::better(local, &control, peer.ip());
                }
            }
            filled.push(Filled {
                len: message.bytes,
                stride,
                peer,
                local,
            });
        }
        Ok(())
    }

    /// One datagram, its sender, and the address that it was sent to.
    pub(crate) fn receive_one(
        fd: &OwnedFd,
        buffer: &mut [u8],
        wait: Wait,
    ) -> Result<(usize, SocketAddr, Option<IpAddr>), Errno> {
        let flags = match wait {
            Wait::Never => MsgFlags::MSG_DONTWAIT,
            Wait::Forever | Wait::Until(_) => MsgFlags::empty(),
        };
        let mut parts = [IoSliceMut::new(buffer)];
        // What the owner of the socket asked for takes room, too.
        let mut controls = cmsg_space!([u8; 2 * ROOM]);
        let message =
            recvmsg::<SockaddrStorage>(fd.as_raw_fd(), &mut parts, Some(&mut controls), flags)
                .map_err(of_nix)?;
        let peer = message.address.as_ref().and_then(to_std);
        let peer = peer.ok_or(Errno::AFNOSUPPORT)?;
        let mut local = None;
        // Where there was no room for all of them, the kernel chooses the address.
        for control in message.cmsgs().into_iter().flatten() {
            local = packet_info::better(local, &control, peer.ip());
        }
        Ok((message.bytes, peer, local))
    }

    fn of_nix(error: nix::Error) -> Errno {
        Errno::from_raw_os_error(error as i32)
    }

    fn to_std(address: &SockaddrStorage) -> Option<SocketAddr> {
        let v4 = address.as_sockaddr_in().map(|v4| SocketAddr::from(*v4));
        v4.or_else(|| address.as_sockaddr_in6().map(|v6| SocketAddr::from(*v6)))
    }
}

#[cfg(not(target_os = "linux"))]
mod portable {
    use super::{Descriptor, Failure, Filled, Slots, Wait};

    /// One by one, the first as long as `wait` says.
    pub(super) fn fill(
        slots: &mut Slots,
        descriptor: &Descriptor,
        wait: Wait,
    ) -> Result<(), Failure> {
        let mut wait = wait;
        let (buffers, filled) = slots.parts();
        for slot in buffers {
            let (len, peer, local) = match descriptor.receive(slot, wait) {
                Ok(received) => received,
                Err(failure) if filled.is_empty() => return Err(failure),
                // What fails now fails again at the next call, which can say so.
                Err(_) => break,
            };
            filled.push(Filled {
                len,
                stride: len,
                peer,
                local,
            });
            wait = Wait::Never;
        }
        Ok(())
    }
}
