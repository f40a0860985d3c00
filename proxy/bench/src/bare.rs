//! The floor: what a proxy with a header costs that does nothing else. One
//! epoll loop, recvmmsg on the listener, a connected socket per client, one
//! send each with the header as its first part, and sendmmsg back. No limits,
//! no expiry, no counters, no bursts.
//!
//! `--careful` adds what no proxy may leave out, and nothing else: it asks for
//! the ECN bits of every datagram, and for the source of every reply.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};

use anyhow::{Context, Result, ensure};
use clap::Args;
use rustix::event::epoll;

use crate::wire::{self, BATCH, DATAGRAM_CAPACITY, Inbox, Packet};

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
    socket: UdpSocket,
    client: SocketAddrV4,
    header: [u8; ppv2::IPV4_HEADER_LEN],
}

/// In epoll's data, the listener among the numbers of sessions.
const LISTENER: u64 = u64::MAX;

pub(crate) fn run(bare: &Bare) -> Result<()> {
    let listener = wire::socket(bare.listen)?;
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    watch(&epoll, &listener, LISTENER)?;
    if bare.careful {
        wire::report_traffic_class(&listener)?;
    }
    let mut sessions: Vec<Session> = Vec::new();
    let mut by_client: HashMap<SocketAddrV4, usize> = HashMap::new();
    let mut inbox = Inbox::new(DATAGRAM_CAPACITY);
    let mut replies = vec![[0; DATAGRAM_CAPACITY]; BATCH];
    let mut careful_replies = Inbox::new(DATAGRAM_CAPACITY);
    let mut events = Vec::with_capacity(BATCH);
    loop {
        events.clear();
        match epoll::wait(&epoll, rustix::buffer::spare_capacity(&mut events), None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut gathered = Vec::with_capacity(BATCH);
        careful_replies.clear();
        for event in &events {
            let number = event.data.u64();
            if number == LISTENER {
                let count = inbox.receive(&listener)?;
                for slot in 0..count {
                    let client = inbox.arrivals()[slot].from;
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
                    let packet = Packet {
                        to: None,
                        from: None,
                        parts: [&session.header, inbox.bytes(slot)],
                        segment: None,
                    };
                    // What the kernel won't take is lost.
                    let _ = wire::send(&session.socket, &[packet]);
                }
                continue;
            }
            let session = &sessions[usize::try_from(number)?];
            let place = gathered.len();
            if bare.careful {
                // An error takes no slot.
                let _ = careful_replies.receive_more(&session.socket, 1);
                if let Some(reply) = careful_replies.arrivals().get(place) {
                    ensure!(reply.from == bare.server, "a reply of {}", reply.from);
                    gathered.push((session.client, reply.len));
                }
            } else if let Ok(len) = session.socket.recv(&mut replies[place]) {
                gathered.push((session.client, len));
            }
        }
        let packets: Vec<_> = gathered
            .iter()
            .enumerate()
            .map(|(slot, (client, len))| Packet {
                to: Some(*client),
                from: None,
                parts: if bare.careful {
                    [&[], careful_replies.bytes(slot)]
                } else {
                    [&[], &replies[slot][..*len]]
                },
                segment: None,
            })
            .collect();
        let mut gone = 0;
        while gone < packets.len() {
            gone += wire::send(&listener, &packets[gone..]).unwrap_or(1);
        }
    }
}

fn watch(epoll: &impl std::os::fd::AsFd, socket: &UdpSocket, data: u64) -> io::Result<()> {
    let data = epoll::EventData::new_u64(data);
    Ok(epoll::add(epoll, socket, data, epoll::EventFlags::IN)?)
}

fn open(client: SocketAddrV4, bare: &Bare) -> Result<Session> {
    let socket = wire::socket(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0))?;
    if bare.careful {
        wire::report_traffic_class(&socket)?;
    }
    socket.connect(bare.server).context("connecting")?;
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
