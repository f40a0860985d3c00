//! The server behind every proxy: sends back what it gets, in batches and
//! bursts. Told that headers come, it takes them off, and counts each whose
//! client address is not the one that the client wrote into the payload.

mod sdk;

use std::io::{self, BufRead};
use std::net::{SocketAddr, SocketAddrV4};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
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
    /// Whether a header comes that names the client
    #[arg(long, value_enum, default_value_t = Header::None)]
    pub(crate) header: Header,
    /// What serves
    #[arg(long, value_enum, default_value_t = Server::Plain)]
    pub(crate) server: Server,
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

/// How a datagram tells of its client, if at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Header {
    None,
    /// A PROXY v2 header before each datagram
    Every,
    /// A PROXY v1 header, which is text, before the first datagram of a session
    FirstText,
}

impl Header {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Every => "every",
            Self::FirstText => "first-text",
        }
    }
}

/// What serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Server {
    /// A loop around recvmmsg and sendmmsg
    Plain,
    /// The Rust SDK, a datagram at a time
    Sdk,
    /// The Rust SDK, in batches
    SdkBatch,
}

impl Server {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Sdk => "sdk",
            Self::SdkBatch => "sdk-batch",
        }
    }
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
    match echo.server {
        Server::Plain => serve(echo, &socket),
        Server::Sdk => sdk::one_by_one(socket.inner, shape(echo)),
        Server::SdkBatch => sdk::in_batches(socket.inner, shape(echo)),
    }
}

fn shape(echo: &Echo) -> Shape {
    if echo.dns { Shape::Dns } else { Shape::Plain }
}

fn serve(echo: &Echo, socket: &Socket) -> Result<()> {
    socket.receive_bursts()?;
    let aside = match echo.reply_from {
        Some(from) => Some(Socket::bind(from).with_context(|| format!("binding {from}"))?),
        None => None,
    };
    let exit = aside.as_ref().unwrap_or(socket);
    std::thread::spawn(|| answer_questions(|| 0));
    let shape = shape(echo);
    let mut inbox = Batch::new(BATCH);
    let mut replies = Vec::new();
    loop {
        let received = socket.receive(&mut inbox, 0..BATCH)?;
        if received == 0 {
            poll(&mut [PollFd::new(socket, PollFlags::IN)], None)?;
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
fn turn_round(burst: &mut [u8], segment: usize, header: Header, shape: Shape) -> (usize, usize) {
    let (mut written, mut size, mut at) = (0, 0, 0);
    let (mut count, mut wrong) = (0, 0);
    while at < burst.len() {
        let end = (at + segment).min(burst.len());
        let datagram = &burst[at..end];
        let before = match header {
            Header::None => Some(0),
            Header::Every => after_header(datagram, shape),
            Header::FirstText => after_text(datagram, shape),
        };
        if before.is_none() {
            wrong += 1;
        }
        let payload = before.map_or(end, |len| at + len);
        shape.answer(&mut burst[payload..end]);
        burst.copy_within(payload..end, written);
        size = size.max(end - payload);
        written += end - payload;
        count += 1;
        at = end;
    }
    saw(count, wrong);
    (written, size)
}

fn saw(count: u64, wrong: u64) {
    RECEIVED.fetch_add(count, Ordering::Relaxed);
    if wrong > 0 {
        WRONG.fetch_add(wrong, Ordering::Relaxed);
    }
}

/// Bytes of the header in front of a datagram, if it names the right client.
fn after_header(datagram: &[u8], shape: Shape) -> Option<usize> {
    let (header, payload) = ppv2::decode(datagram).ok()?;
    is_client(header.client(), payload, shape).then_some(datagram.len() - payload.len())
}

/// As [`after_header`] for one of PROXY v1: "PROXY TCP4 client proxy port port". None
/// is right, too.
fn after_text(datagram: &[u8], shape: Shape) -> Option<usize> {
    if !datagram.starts_with(b"PROXY ") {
        return Some(0);
    }
    let end = datagram.windows(2).position(|two| two == b"\r\n")?;
    let text = std::str::from_utf8(&datagram[..end]).ok()?;
    let words: Vec<_> = text.split(' ').collect();
    let [_, _, client, _, port, _] = words[..] else {
        return None;
    };
    let client = SocketAddr::new(client.parse().ok()?, port.parse().ok()?);
    is_client(Some(client), &datagram[end + 2..], shape).then_some(end + 2)
}

/// Whether a client is the one that the payload says has sent it.
fn is_client(client: Option<SocketAddr>, payload: &[u8], shape: Shape) -> bool {
    let tag = Tag::read(payload, shape);
    tag.is_some_and(|tag| client == Some(SocketAddr::V4(tag.client)))
}

/// Answers each line of standard input, until it ends. What the server had to drop counts
/// as wrong.
fn answer_questions(dropped: impl Fn() -> u64) {
    for line in io::stdin().lock().lines() {
        let seen = Seen {
            received: RECEIVED.load(Ordering::Relaxed),
            wrong: WRONG.load(Ordering::Relaxed) + dropped(),
        };
        let text = serde_json::to_string(&seen).unwrap_or_default();
        if line.is_err() || output::line(&text).is_err() {
            break;
        }
    }
    std::process::exit(0);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(client: SocketAddrV4) -> Vec<u8> {
        let mut payload = Shape::Plain.template(40).unwrap();
        let tag = Tag {
            client,
            load: 1,
            sequence: 2,
            sent: 3,
        };
        tag.write(&mut payload, Shape::Plain);
        payload
    }

    #[test]
    fn text_header_is_taken_off_if_it_names_the_client() {
        let payload = payload("127.1.0.1:20000".parse().unwrap());
        let with = |text: &str| [text.as_bytes(), &payload].concat();
        let right = "PROXY TCP4 127.1.0.1 127.0.0.1 20000 7001\r\n";
        let len = after_text(&with(right), Shape::Plain);
        assert_eq!(len, Some(right.len()));
        assert_eq!(after_text(&payload, Shape::Plain), Some(0));
        let other = "PROXY TCP4 127.1.0.2 127.0.0.1 20000 7001\r\n";
        assert_eq!(after_text(&with(other), Shape::Plain), None);
        assert_eq!(after_text(b"PROXY TCP4 127.1.0.1", Shape::Plain), None);
    }

    #[test]
    fn burst_is_turned_round_without_its_headers() {
        let client = "127.1.0.1:20000".parse().unwrap();
        let payload = payload(client);
        let mut buffer = [0; ppv2::MAX_UDP_HEADER_LEN];
        let listener = "127.0.0.1:7001".parse().unwrap();
        let header = ppv2::encode_udp(client.into(), listener, &mut buffer).unwrap();
        let one = [header, &payload].concat();
        let mut burst = one.repeat(3);
        let turned = turn_round(&mut burst, one.len(), Header::Every, Shape::Plain);
        assert_eq!(turned, (3 * payload.len(), payload.len()));
        assert_eq!(burst[..turned.0], payload.repeat(3));
    }
}
