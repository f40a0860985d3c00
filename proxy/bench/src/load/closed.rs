//! Closed loop: a client sends a datagram or a burst, and the next when all
//! replies are there or their time is up. What comes out is throughput.

use std::net::{SocketAddr, SocketAddrV4};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use ppv2_udp::{Batch, Outgoing, Transmit};

use super::{Clients, Load, Report, TIMEOUT};
use crate::output;
use crate::tag::Tag;
use crate::wire::{BATCH, to};

/// Datagrams of a burst; the replies that are missing are bits of a `u64`.
const MAX_BURST: usize = 64;

/// How often lost datagrams are looked for.
const SWEEP: Duration = Duration::from_millis(20);

/// A client, or under `fresh` a place that one client after another takes.
struct Slot {
    socket: usize,
    client: SocketAddrV4,
    generation: u32,
    missing: u64,
    since: Instant,
    /// The burst, ready to be sent but for its tags.
    burst: Vec<u8>,
}

struct Loop {
    clients: Clients,
    slots: Vec<Slot>,
    /// Slots that have something to send, by socket.
    ready: Vec<Vec<usize>>,
    burst: usize,
    next_client: usize,
    fresh: bool,
    sent: u64,
    received: u64,
    lost: u64,
}

pub(super) fn run(load: &Load) -> Result<Report> {
    ensure!(
        (1..=MAX_BURST).contains(&load.burst) && load.burst * load.size <= 65_000,
        "a burst is at most {MAX_BURST} datagrams and 65,000 bytes"
    );
    let mut state = Loop::new(load)?;
    let mut inbox = Batch::new(BATCH);
    let start = Instant::now();
    state.until(start + Duration::from_millis(load.warm_up), &mut inbox)?;
    let (sent_before, lost_before) = (state.sent, state.lost);
    (state.sent, state.received, state.lost) = (0, 0, 0);
    output::line("start")?;
    let start = Instant::now();
    state.until(start + Duration::from_millis(load.time), &mut inbox)?;
    Ok(Report {
        seconds: start.elapsed().as_secs_f64(),
        sent: state.sent,
        received: state.received,
        lost: state.lost,
        wrong: state.clients.wrong,
        sent_before,
        lost_before,
        latency: None,
    })
}

impl Loop {
    fn new(load: &Load) -> Result<Self> {
        let clients = Clients::open(load)?;
        let now = Instant::now();
        let slots: Vec<_> = (load.first..load.first + load.clients)
            .map(|client| {
                let (socket, address) = clients.address(client);
                Slot {
                    socket,
                    client: address,
                    generation: 0,
                    missing: 0,
                    since: now,
                    burst: clients.template.repeat(load.burst),
                }
            })
            .collect();
        let mut ready = vec![Vec::new(); clients.sockets.len()];
        for (number, slot) in slots.iter().enumerate() {
            ready[slot.socket].push(number);
        }
        Ok(Self {
            clients,
            slots,
            ready,
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
        let Self { slots, ready, .. } = self;
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
            if slot.missing == 0 {
                ready[slot.socket].push(number);
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
        self.ready = vec![Vec::new(); ready.len()];
        for number in ready.into_iter().flatten() {
            let (socket, client) = self.clients.address(self.next_client);
            self.next_client += 1;
            let slot = &mut self.slots[number];
            (slot.socket, slot.client) = (socket, client);
            self.ready[socket].push(number);
        }
    }

    fn give_up(&mut self, now: Instant) {
        for (number, slot) in self.slots.iter_mut().enumerate() {
            if slot.missing != 0 && now - slot.since > TIMEOUT {
                self.lost += u64::from(slot.missing.count_ones());
                slot.missing = 0;
                self.ready[slot.socket].push(number);
            }
        }
    }

    fn send(&mut self) -> Result<usize> {
        let mut total = 0;
        for socket in 0..self.ready.len() {
            let ready = std::mem::take(&mut self.ready[socket]);
            for numbers in ready.chunks(BATCH) {
                total += self.send_batch(socket, numbers)?;
            }
            // Keeps the allocation.
            self.ready[socket] = ready;
            self.ready[socket].clear();
        }
        Ok(total)
    }

    fn send_batch(&mut self, socket: usize, numbers: &[usize]) -> Result<usize> {
        let now = Instant::now();
        let sent_at = self.clients.now();
        let size = self.clients.template.len();
        for &number in numbers {
            let slot = &mut self.slots[number];
            slot.generation = slot.generation.wrapping_add(1);
            slot.missing = u64::MAX >> (MAX_BURST - self.burst);
            slot.since = now;
            for (index, payload) in slot.burst.chunks_mut(size).enumerate() {
                let tag = Tag {
                    client: slot.client,
                    load: self.clients.number,
                    sequence: sequence(slot.generation, number, index),
                    sent: sent_at,
                };
                tag.write(payload, self.clients.shape);
            }
        }
        let transmits: Vec<_> = numbers
            .iter()
            .map(|&number| {
                let outgoing = Outgoing {
                    from: Some(SocketAddr::V4(self.slots[number].client)),
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
