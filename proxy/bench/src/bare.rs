//! The floor: what a proxy with a header costs that does nothing else. One
//! epoll loop, recvmmsg on the listener, a connected socket per client, one
//! send each with the header as its first part, and sendmmsg back. No limits,
//! no expiry, no counters, no bursts.
//!
//! `--careful` adds what no proxy may leave out, and nothing else: it asks for
//! the ECN bits of every datagram, and for the source of every reply.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::{Context, Result, ensure};
use clap::Args;
use ppv2_udp::{Batch, Outgoing, Transmit};
use rustix::event::epoll;

use crate::wire::{BATCH, DATAGRAM_CAPACITY, Socket, to, v4};

#[derive(Args, Clone, Debug)]
pub(crate) struct Bare {
    #[arg(long)]
    pub(crate) listen: SocketAddrV4,
    #[arg(long)]
    pub(crate) server: SocketAddrV4,
    /// Ask for ECN bits, and check the sources of replies
    #[arg(long)]
    pub(crate) careful: bool,
}

struct Session {
    socket: Socket,
    client: SocketAddrV4,
    header: [u8; ppv2::IPV4_HEADER_LEN],
}

/// In epoll's data, the listener among the numbers of sessions.
const LISTENER: u64 = u64::MAX;

pub(crate) fn run(bare: &Bare) -> Result<()> {
    let listener = Socket::bind(bare.listen)?;
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    watch(&epoll, &listener, LISTENER)?;
    if bare.careful {
        listener.report_traffic_class()?;
    }
    let mut sessions: Vec<Session> = Vec::new();
    let mut by_client: HashMap<SocketAddrV4, usize> = HashMap::new();
    let mut inbox = Batch::with_capacity(BATCH, DATAGRAM_CAPACITY);
    let mut replies = vec![[0; DATAGRAM_CAPACITY]; BATCH];
    let mut careful_replies = Batch::with_capacity(BATCH, DATAGRAM_CAPACITY);
    let mut events = Vec::with_capacity(BATCH);
    loop {
        events.clear();
        match epoll::wait(&epoll, rustix::buffer::spare_capacity(&mut events), None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut gathered = Vec::with_capacity(BATCH);
        for event in &events {
            let number = event.data.u64();
            if number == LISTENER {
                let count = listener.receive(&mut inbox, 0..BATCH)?;
                for (about, range) in inbox.datagrams(count) {
                    let client = v4(about.peer);
                    let number = match by_client.get(&client) {
                        Some(number) => *number,
                        None => {
                            let Ok(session) = open(client, bare) else {
                                continue;
                            };
                            watch(&epoll, &session.socket, sessions.len() as u64)?;
                            by_client.insert(client, sessions.len());
                            sessions.push(session);
                            sessions.len() - 1
                        }
                    };
                    let session = &sessions[number];
                    let outgoing = Outgoing {
                        header: &session.header,
                        ..Outgoing::default()
                    };
                    let transmit = Transmit::datagram(outgoing, &inbox.bytes()[range]);
                    // What the kernel won't take is lost.
                    let _ = session.socket.send(&[transmit]);
                }
                continue;
            }
            let session = &sessions[usize::try_from(number)?];
            let place = gathered.len();
            if bare.careful {
                let slots = place..place + 1;
                let received = session.socket.receive(&mut careful_replies, slots);
                // An error takes no slot.
                if let (Ok(1), Some(reply)) = (received, careful_replies.received(place)) {
                    let from = v4(reply.peer);
                    ensure!(from == bare.server, "a reply from {from}");
                    gathered.push((session.client, reply.len));
                }
            } else if let Ok(len) = session.socket.inner.recv(&mut replies[place]) {
                gathered.push((session.client, len));
            }
        }
        let transmits: Vec<_> = gathered
            .iter()
            .enumerate()
            .map(|(slot, (client, len))| {
                let payload = if bare.careful {
                    careful_replies.payload(slot)
                } else {
                    &replies[slot][..*len]
                };
                Transmit::datagram(to(*client), payload)
            })
            .collect();
        let _ = listener.send(&transmits);
    }
}

fn watch(epoll: &impl std::os::fd::AsFd, socket: &Socket, data: u64) -> io::Result<()> {
    let data = epoll::EventData::new_u64(data);
    Ok(epoll::add(epoll, socket, data, epoll::EventFlags::IN)?)
}

fn open(client: SocketAddrV4, bare: &Bare) -> Result<Session> {
    let socket = Socket::bind(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0))?;
    if bare.careful {
        socket.report_traffic_class()?;
    }
    socket.inner.connect(bare.server).context("connecting")?;
    let mut header = [0; ppv2::IPV4_HEADER_LEN];
    let mut buffer = [0; ppv2::MAX_UDP_HEADER_LEN];
    let written = ppv2::encode_udp(client.into(), bare.listen.into(), &mut buffer)?;
    header.copy_from_slice(written);
    Ok(Session {
        socket,
        client,
        header,
    })
}
