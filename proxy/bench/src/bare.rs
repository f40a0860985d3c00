//! The floor: what a proxy with a header costs that does nothing else. One
//! epoll loop, recvmmsg on the listener, a connected socket per client, one
//! send each with the header as its first part, and sendmmsg back. No limits,
//! no expiry, no counters, no bursts.
//!
//! `--careful` adds what no proxy may leave out, and nothing else: it asks for
//! the ECN bits of every datagram, and for the source of every reply. `--join` sends
//! neighbouring datagrams of one session as one burst, both ways, and receives all
//! replies of a session that are there.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::ops::Range;

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
    /// Send what is neighbouring, of one session and of equal length, as one burst
    #[arg(long, conflicts_with = "careful")]
    pub(crate) join: bool,
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
    let mut batch = Batch::with_capacity(BATCH, DATAGRAM_CAPACITY);
    let mut events = Vec::with_capacity(BATCH);
    loop {
        events.clear();
        match epoll::wait(&epoll, rustix::buffer::spare_capacity(&mut events), None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        // The sessions of replies, and the lengths of those.
        let mut gathered: Vec<(usize, usize)> = Vec::with_capacity(BATCH);
        for event in &events {
            let number = event.data.u64();
            if number == LISTENER {
                let count = listener.receive(&mut inbox, 0..BATCH)?;
                let mut run = Run::default();
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
                    if bare.join {
                        run.add(number, range, &sessions, &inbox);
                        continue;
                    }
                    // What the kernel won't take is lost.
                    let session = &sessions[number];
                    let _ = session.socket.send(&[session.transmit(&inbox, range)]);
                }
                run.send(&sessions, &inbox);
                continue;
            }
            let number = usize::try_from(number)?;
            let session = &sessions[number];
            let place = gathered.len();
            if bare.join || bare.careful {
                let room = if bare.join { BATCH - place } else { 1 };
                if room == 0 {
                    // The rest is reported again.
                    break;
                }
                let slots = place..place + room;
                let received = session.socket.receive(&mut batch, slots).unwrap_or(0);
                for slot in place..place + received {
                    // An error takes no slot.
                    let Some(reply) = batch.received(slot) else {
                        break;
                    };
                    let from = v4(reply.peer);
                    ensure!(!bare.careful || from == bare.server, "a reply from {from}");
                    gathered.push((number, reply.len));
                }
            } else if let Ok(len) = session.socket.inner.recv(&mut replies[place]) {
                gathered.push((number, len));
            }
        }
        let transmits: Vec<_> = gathered
            .iter()
            .enumerate()
            .map(|(slot, (session, len))| {
                let payload = if bare.join || bare.careful {
                    batch.payload(slot)
                } else {
                    &replies[slot][..*len]
                };
                Transmit::datagram(to(sessions[*session].client), payload)
            })
            .collect();
        let _ = if bare.join {
            listener.send_joined(&transmits)
        } else {
            listener.send(&transmits)
        };
    }
}

impl Session {
    fn transmit<'d>(&'d self, inbox: &'d Batch, range: Range<usize>) -> Transmit<'d> {
        let outgoing = Outgoing {
            header: &self.header,
            ..Outgoing::default()
        };
        Transmit::datagram(outgoing, &inbox.bytes()[range])
    }
}

/// Neighbouring datagrams of one session, not sent yet.
#[derive(Default)]
struct Run {
    session: usize,
    datagrams: Vec<Range<usize>>,
}

impl Run {
    fn add(&mut self, session: usize, datagram: Range<usize>, sessions: &[Session], inbox: &Batch) {
        if session != self.session {
            self.send(sessions, inbox);
        }
        self.session = session;
        self.datagrams.push(datagram);
    }

    fn send(&mut self, sessions: &[Session], inbox: &Batch) {
        let datagrams = self.datagrams.drain(..);
        if datagrams.len() == 0 {
            return;
        }
        let session = &sessions[self.session];
        let transmits: Vec<_> = datagrams
            .map(|range| session.transmit(inbox, range))
            .collect();
        let _ = session.socket.send_joined(&transmits);
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
