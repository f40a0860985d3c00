//! Closed loop: a client sends a datagram or a burst, and the next when all
//! replies are there or their time is up; or it keeps several in flight, for each of
//! which that holds. What comes out is throughput.
//!
//! Order is checked too: a reply that is older than the client's latest is counted.

use std::collections::VecDeque;
use std::net::{SocketAddr, SocketAddrV4};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use ppv2_udp::{Batch, Outgoing, Transmit};

use super::{Clients, Clocks, Load, Report, TIMEOUT, write_header};
use crate::tag::Tag;
use crate::wire::{BATCH, to};

/// Datagrams of a burst; the replies that are missing are bits of a `u64`.
const MAX_BURST: usize = 64;

/// How often lost datagrams are looked for.
const SWEEP: Duration = Duration::from_millis(20);

/// What all clients together have in flight at most: as many can wait in the proxy's
/// receive buffer without loss. Each socket has its share, and the client that has waited
/// longest is the next.
const MOST_IN_FLIGHT: usize = 4_096;

/// One of those that a client keeps in flight, or under `fresh` a place that one client
/// after another takes.
struct Slot {
    socket: usize,
    client: SocketAddrV4,
    /// Number of the client.
    owner: usize,
    generation: u32,
    missing: u64,
    since: Instant,
    /// The burst, ready to be sent but for its tags.
    burst: Vec<u8>,
}

struct Loop {
    clients: Clients,
    slots: Vec<Slot>,
    /// Slots that have something to send, by socket, the one that waits longest first.
    ready: Vec<VecDeque<usize>>,
    /// Number of slots that wait for replies, by socket.
    waiting: Vec<usize>,
    /// By client: the number of the latest of its datagrams that was answered.
    answered: Vec<u64>,
    /// Datagrams sent, warm-up included.
    number: u64,
    reordered: u64,
    burst: usize,
    next_client: usize,
    fresh: bool,
    sent: u64,
    received: u64,
    lost: u64,
}

pub(super) fn run(load: &Load) -> Result<Report> {
    ensure!(
        (1..=MAX_BURST).contains(&load.burst)
            && load.burst * (load.senders.header_len() + load.size) <= 65_000,
        "a burst is at most {MAX_BURST} datagrams and 65,000 bytes"
    );
    let clocks = Clocks::of(load)?;
    let mut state = Loop::new(load)?;
    let mut inbox = Batch::new(BATCH);
    let start = Instant::now();
    state.until(start + Duration::from_millis(load.warm_up), &mut inbox)?;
    let (sent_before, lost_before) = (state.sent, state.lost);
    (state.sent, state.received, state.lost) = (0, 0, 0);
    let before = clocks.now();
    let start = Instant::now();
    state.until(start + Duration::from_millis(load.time), &mut inbox)?;
    let seconds = start.elapsed().as_secs_f64();
    Ok(Report {
        seconds,
        sent: state.sent,
        received: state.received,
        lost: state.lost,
        wrong: state.clients.wrong,
        reordered: state.reordered,
        cpu: clocks.now().since(before),
        sent_before,
        lost_before,
        latency: None,
    })
}

impl Loop {
    fn new(load: &Load) -> Result<Self> {
        let clients = Clients::open(load)?;
        let now = Instant::now();
        let slots: Vec<_> = (0..load.clients * load.flight)
            .map(|number| {
                let owner = number / load.flight;
                let (socket, address) = clients.address(load.first + owner);
                Slot {
                    socket,
                    client: address,
                    owner,
                    generation: 0,
                    missing: 0,
                    since: now,
                    burst: clients.blank().repeat(load.burst),
                }
            })
            .collect();
        let mut ready = vec![VecDeque::new(); clients.sockets.len()];
        for (number, slot) in slots.iter().enumerate() {
            ready[slot.socket].push_back(number);
        }
        Ok(Self {
            waiting: vec![0; clients.sockets.len()],
            clients,
            slots,
            ready,
            answered: vec![0; load.clients],
            number: 0,
            reordered: 0,
            burst: load.burst,
            next_client: load.first + load.clients,
            fresh: load.fresh,
            sent: 0,
            received: 0,
            lost: 0,
        })
    }

    fn until(&mut self, end: Instant, inbox: &mut Batch) -> Result<()> {
        let mut sweep = Instant::now() + SWEEP;
        loop {
            let sent = self.send()?;
            let received = self.receive(inbox)?;
            let now = Instant::now();
            if now >= end {
                return Ok(());
            }
            if now >= sweep {
                sweep = now + SWEEP;
                self.give_up(now);
            }
            if sent == 0 && received == 0 {
                self.clients.wait(SWEEP)?;
            }
        }
    }

    fn receive(&mut self, inbox: &mut Batch) -> Result<usize> {
        let Self {
            slots,
            ready,
            waiting,
            answered,
            reordered,
            ..
        } = self;
        let mut received = 0;
        let count = self.clients.receive(inbox, |tag| {
            let (generation, number, index) = parts(tag.sequence);
            let Some(slot) = slots.get_mut(number) else {
                return false;
            };
            if generation != slot.generation {
                // Came after it was given up.
                return generation < slot.generation;
            }
            let bit = 1 << index;
            if slot.missing & bit == 0 {
                return false;
            }
            slot.missing &= !bit;
            received += 1;
            let latest = &mut answered[slot.owner];
            *reordered += u64::from(tag.sent < *latest);
            *latest = tag.sent.max(*latest);
            if slot.missing == 0 {
                ready[slot.socket].push_back(number);
                waiting[slot.socket] -= 1;
            }
            true
        })?;
        self.received += received;
        if self.fresh {
            self.admit_new_clients();
        }
        Ok(count)
    }

    /// Gives every slot that is ready to a client that never sent before.
    fn admit_new_clients(&mut self) {
        let ready = std::mem::take(&mut self.ready);
        self.ready = vec![VecDeque::new(); ready.len()];
        for number in ready.into_iter().flatten() {
            let (socket, client) = self.clients.address(self.next_client);
            self.next_client += 1;
            let slot = &mut self.slots[number];
            (slot.socket, slot.client) = (socket, client);
            self.ready[socket].push_back(number);
        }
    }

    fn give_up(&mut self, now: Instant) {
        for (number, slot) in self.slots.iter_mut().enumerate() {
            if slot.missing != 0 && now - slot.since > TIMEOUT {
                self.lost += u64::from(slot.missing.count_ones());
                slot.missing = 0;
                // What comes after all is late, and not wrong.
                slot.generation = slot.generation.wrapping_add(1);
                self.ready[slot.socket].push_back(number);
                self.waiting[slot.socket] -= 1;
            }
        }
    }

    fn send(&mut self) -> Result<usize> {
        let mut total = 0;
        let mut numbers = Vec::with_capacity(BATCH);
        let most = MOST_IN_FLIGHT / self.ready.len();
        for socket in 0..self.ready.len() {
            loop {
                let room = most.saturating_sub(self.waiting[socket]).min(BATCH);
                let ready = &mut self.ready[socket];
                let count = room.min(ready.len());
                if count == 0 {
                    break;
                }
                numbers.clear();
                numbers.extend(ready.drain(..count));
                self.waiting[socket] += count;
                total += self.send_batch(socket, &numbers)?;
            }
        }
        Ok(total)
    }

    fn send_batch(&mut self, socket: usize, numbers: &[usize]) -> Result<usize> {
        let now = Instant::now();
        let size = self.clients.senders.header_len() + self.clients.template.len();
        for &number in numbers {
            let slot = &mut self.slots[number];
            slot.generation = slot.generation.wrapping_add(1);
            slot.missing = u64::MAX >> (MAX_BURST - self.burst);
            slot.since = now;
            for (index, datagram) in slot.burst.chunks_mut(size).enumerate() {
                let payload = write_header(self.clients.senders, slot.client, datagram)?;
                self.number += 1;
                let tag = Tag {
                    client: slot.client,
                    load: self.clients.number,
                    sequence: sequence(slot.generation, number, index),
                    // Latency isn't measured: here the order is, in its place.
                    sent: self.number,
                };
                tag.write(payload, self.clients.shape);
            }
        }
        let transmits: Vec<_> = numbers
            .iter()
            .map(|&number| {
                let sender = self.clients.sender_of(self.slots[number].client);
                let outgoing = Outgoing {
                    from: Some(SocketAddr::V4(sender)),
                    ..to(self.clients.target)
                };
                Transmit::burst(outgoing, &self.slots[number].burst, size)
            })
            .collect();
        self.clients.sockets[socket].send(&transmits)?;
        self.sent += (transmits.len() * self.burst) as u64;
        Ok(transmits.len())
    }
}

/// A sequence number says where it belongs: slot and place in the burst.
fn sequence(generation: u32, slot: usize, index: usize) -> u64 {
    u64::from(generation) << 32 | (slot as u64) << 6 | index as u64
}

#[expect(clippy::cast_possible_truncation, reason = "the parts of a u64")]
fn parts(sequence: u64) -> (u32, usize, usize) {
    let slot = (sequence as u32 >> 6) as usize;
    ((sequence >> 32) as u32, slot, (sequence & 63) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequence_number_tells_where_it_belongs() {
        for (generation, slot, index) in [(0, 0, 0), (7, 16_383, 63), (u32::MAX, 500, 1)] {
            let parts = parts(sequence(generation, slot, index));
            assert_eq!(parts, (generation, slot, index));
        }
    }
}
