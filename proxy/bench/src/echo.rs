//! The server behind every proxy: sends back what it gets, in batches and
//! bursts. Told that headers come, it takes them off, and counts each whose
//! client address is not the one that the client wrote into the payload.

use std::io::{self, BufRead};
use std::net::{SocketAddr, SocketAddrV4};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use clap::Args;
use ppv2_udp::{Batch, Transmit};
use rustix::event::{PollFd, PollFlags, poll};
use serde::{Deserialize, Serialize};

use crate::output;
use crate::tag::{Shape, Tag};
use crate::wire::{BATCH, Socket, to, v4};

#[derive(Args, Clone, Debug)]
pub(crate) struct Echo {
    /// Address to serve
    #[arg(long)]
    pub(crate) listen: SocketAddrV4,
    /// Every datagram has a PROXY v2 header, that names its client
    #[arg(long)]
    pub(crate) header: bool,
    /// Every datagram comes from the address of its client
    #[arg(long)]
    pub(crate) spoofed: bool,
    /// Answer the client that the header names, from this address
    #[arg(long)]
    pub(crate) reply_from: Option<SocketAddrV4>,
    /// Datagrams are DNS questions
    #[arg(long)]
    pub(crate) dns: bool,
}

/// What the server has seen so far.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Seen {
    pub(crate) received: u64,
    /// Datagrams without the expected header or source address, or with another
    /// client's.
    pub(crate) wrong: u64,
}

static RECEIVED: AtomicU64 = AtomicU64::new(0);
static WRONG: AtomicU64 = AtomicU64::new(0);

/// Serves until standard input ends; each line there is answered with what was
/// seen, as one line of JSON.
pub(crate) fn run(echo: &Echo) -> Result<()> {
    let socket = Socket::bind(echo.listen).with_context(|| format!("binding {}", echo.listen))?;
    socket.receive_bursts()?;
    let aside = match echo.reply_from {
        Some(from) => Some(Socket::bind(from).with_context(|| format!("binding {from}"))?),
        None => None,
    };
    let exit = aside.as_ref().unwrap_or(&socket);
    std::thread::spawn(answer_questions);
    let shape = if echo.dns { Shape::Dns } else { Shape::Plain };
    let mut inbox = Batch::new(BATCH);
    let mut replies = Vec::new();
    loop {
        let received = socket.receive(&mut inbox, 0..BATCH)?;
        if received == 0 {
            poll(&mut [PollFd::new(&socket, PollFlags::IN)], None)?;
            continue;
        }
        replies.clear();
        for slot in 0..received {
            let Some(about) = inbox.received(slot) else {
                break;
            };
            if echo.spoofed {
                let from = *v4(about.peer).ip();
                let client = Tag::read(inbox.payload(slot), shape).map(|tag| *tag.client.ip());
                WRONG.fetch_add(u64::from(client != Some(from)), Ordering::Relaxed);
            }
            let segment = about.segment.max(1);
            let (len, segment) = turn_round(inbox.payload_mut(slot), segment, echo.header, shape);
            replies.push((v4(about.peer), len, segment));
        }
        let transmits: Vec<_> = replies
            .iter()
            .enumerate()
            .filter(|(_, (_, len, _))| *len > 0)
            .filter_map(|(slot, (peer, len, segment))| {
                let payload = inbox.payload(slot);
                let client = match echo.reply_from {
                    Some(_) => Tag::read(payload, shape)?.client,
                    None => *peer,
                };
                Some(Transmit::burst(to(client), &payload[..*len], *segment))
            })
            .collect();
        // A reply that can't be sent is lost, and the client counts it.
        let _ = exit.send(&transmits);
    }
}

/// Makes a burst its own reply, headers taken off. Says how long that is, and
/// the size of its datagrams.
fn turn_round(burst: &mut [u8], segment: usize, header: bool, shape: Shape) -> (usize, usize) {
    let (mut written, mut size, mut at) = (0, 0, 0);
    let (mut count, mut wrong) = (0, 0);
    while at < burst.len() {
        let end = (at + segment).min(burst.len());
        let payload = if header {
            match after_header(&burst[at..end], shape) {
                Some(len) => at + len,
                None => {
                    wrong += 1;
                    end
                }
            }
        } else {
            at
        };
        shape.answer(&mut burst[payload..end]);
        burst.copy_within(payload..end, written);
        size = size.max(end - payload);
        written += end - payload;
        count += 1;
        at = end;
    }
    RECEIVED.fetch_add(count, Ordering::Relaxed);
    if wrong > 0 {
        WRONG.fetch_add(wrong, Ordering::Relaxed);
    }
    (written, size)
}

/// Bytes of the header in front of a datagram, if it names the right client.
fn after_header(datagram: &[u8], shape: Shape) -> Option<usize> {
    let (header, payload) = ppv2::decode(datagram).ok()?;
    let tag = Tag::read(payload, shape)?;
    (header.client() == Some(SocketAddr::V4(tag.client))).then_some(datagram.len() - payload.len())
}

fn answer_questions() {
    for line in io::stdin().lock().lines() {
        let seen = Seen {
            received: RECEIVED.load(Ordering::Relaxed),
            wrong: WRONG.load(Ordering::Relaxed),
        };
        let text = serde_json::to_string(&seen).unwrap_or_default();
        if line.is_err() || output::line(&text).is_err() {
            break;
        }
    }
    std::process::exit(0);
}
