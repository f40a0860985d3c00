//! The server on the Rust SDK, as an application would write it.

use std::net::UdpSocket as StdSocket;
use std::sync::Arc;
use std::thread;

use anyhow::Result;
use ppv2_sdk::{Batch, Datagram, DatagramRef, Trust, UdpSocket};

use super::{answer_questions, is_client, saw};
use crate::tag::Shape;
use crate::wire::BATCH;

/// Where the proxy sends from: all that it may be given on loopback, or between hosts.
const PROXIES: [&str; 2] = ["127.0.0.0/8", "10.0.0.0/8"];

/// More than any load has.
const MOST_CLIENTS: usize = 200_000;

fn wrap(socket: StdSocket) -> Result<Arc<UdpSocket>> {
    socket.set_nonblocking(false)?;
    let trust = Trust::networks(PROXIES).max_clients(MOST_CLIENTS).build()?;
    let socket = Arc::new(UdpSocket::from_std(socket, trust)?);
    let asked = Arc::clone(&socket);
    thread::spawn(move || answer_questions(|| asked.stats().dropped_total()));
    Ok(socket)
}

/// Answers each datagram before it receives the next.
pub(super) fn one_by_one(socket: StdSocket, shape: Shape) -> Result<()> {
    let socket = wrap(socket)?;
    loop {
        let datagram = socket.recv_datagram()?;
        let Datagram {
            client, payload, ..
        } = &datagram;
        saw(1, u64::from(!is_client(Some(*client), payload, shape)));
        // A reply that can't be sent is lost, and the client counts it.
        let _ = socket.reply(&datagram, payload);
    }
}

/// Receives and answers as many at once as there are.
pub(super) fn in_batches(socket: StdSocket, shape: Shape) -> Result<()> {
    let socket = wrap(socket)?;
    socket.enable_gro()?;
    let mut batch = Batch::new(BATCH);
    loop {
        let count = socket.recv_batch(&mut batch)?;
        let is_wrong =
            |datagram: &DatagramRef<'_>| !is_client(Some(datagram.client), datagram.payload, shape);
        let wrong = batch.iter().filter(is_wrong).count();
        saw(count as u64, wrong as u64);
        let replies: Vec<_> = batch.iter().map(|one| (one.payload, one)).collect();
        let mut left = &replies[..];
        while let Some(rest) = left.get(1..) {
            left = match socket.send_batch(left) {
                Ok(sent) => &left[sent..],
                Err(_) => rest,
            };
        }
    }
}
