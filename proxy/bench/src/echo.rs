//! The server behind every proxy: sends back what it gets, in batches and
//! bursts. Told that headers come, it takes them off, and counts each whose
//! client address is not the one that the client wrote into the payload.

use std::io::{self, BufRead};
use std::net::{SocketAddr, SocketAddrV4};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use clap::Args;
use rustix::event::{PollFd, PollFlags, poll};
use serde::{Deserialize, Serialize};

use crate::output;
use crate::tag::{Shape, Tag};
use crate::wire::{self, BURST_CAPACITY, Inbox, Packet};

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
    let socket = wire::socket(echo.listen).with_context(|| format!("binding {}", echo.listen))?;
    wire::receive_bursts(&socket)?;
    let aside = match echo.reply_from {
        Some(from) => Some(wire::socket(from).with_context(|| format!("binding {from}"))?),
        None => None,
    };
    let exit = aside.as_ref().unwrap_or(&socket);
    std::thread::spawn(answer_questions);
    let shape = if echo.dns { Shape::Dns } else { Shape::Plain };
    let mut inbox = Inbox::new(BURST_CAPACITY);
    let mut replies = Vec::new();
    loop {
        let received = inbox.receive(&socket)?;
        if received == 0 {
            poll(&mut [PollFd::new(&socket, PollFlags::IN)], None)?;
            continue;
        }
        replies.clear();
        for slot in 0..received {
            let segment = inbox.arrivals()[slot].segment.max(1);
            if echo.spoofed {
                let from = *inbox.arrivals()[slot].from.ip();
                let client = Tag::read(inbox.bytes(slot), shape).map(|tag| *tag.client.ip());
                WRONG.fetch_add(u64::from(client != Some(from)), Ordering::Relaxed);
            }
            let reply = turn_round(inbox.bytes_mut(slot), segment, echo.header, shape);
            replies.push(reply);
        }
        let packets: Vec<_> = replies
            .iter()
            .enumerate()
            .filter(|(_, (len, _))| *len > 0)
            .map(|(slot, (len, segment))| Packet {
                to: match echo.reply_from {
                    Some(_) => Tag::read(inbox.bytes(slot), shape).map(|tag| tag.client),
                    None => Some(inbox.arrivals()[slot].from),
                },
                from: None,
                parts: [&[], &inbox.bytes(slot)[..*len]],
                segment: u16::try_from(*segment)
                    .ok()
                    .filter(|segment| usize::from(*segment) < *len),
            })
            .collect();
        let mut gone = 0;
        while gone < packets.len() {
            // One that can't be sent is lost, and the client counts it.
            gone += wire::send(exit, &packets[gone..]).unwrap_or(1);
        }
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
