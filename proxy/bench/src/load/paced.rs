//! Fixed rate: datagrams leave by the clock, whatever has become of those
//! before. What comes out is latency, from the actual sending: the generator
//! can't be held up by the proxy, and its own lateness is told apart.

use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::Result;
use hdrhistogram::Histogram;
use ppv2_udp::{Batch, Outgoing, Transmit};

use super::{Clients, Clocks, Cpu, Latency, Load, Report, TIMEOUT, write_header};
use crate::tag::Tag;
use crate::wire::{BATCH, to};

/// Datagrams of one run at most; each has a byte of memory.
const MAX: u64 = 50_000_000;

const SENT: u8 = 1;
const ANSWERED: u8 = 2;

/// When a datagram is to leave, in nanoseconds.
fn due_at(number: u64, rate: u64) -> u64 {
    ((number + 1) * 1_000_000_000).div_ceil(rate)
}

/// The client that sends datagram `number`.
fn client_of(load: &Load, number: u64) -> Result<usize> {
    Ok(load.first + usize::try_from(number)? % load.clients)
}

/// Sends datagrams of these numbers: in one call for each socket of the clients.
fn send(clients: &Clients, load: &Load, numbers: Range<u64>, payloads: &[Vec<u8>]) -> Result<()> {
    for (socket, from) in clients.sockets.iter().enumerate() {
        let mut transmits = Vec::with_capacity(BATCH);
        for (number, payload) in numbers.clone().zip(payloads) {
            let (own, address) = clients.address(client_of(load, number)?);
            if own == socket {
                let outgoing = Outgoing {
                    from: Some(clients.sender_of(address).into()),
                    ..to(clients.target)
                };
                transmits.push(Transmit::datagram(outgoing, payload));
            }
        }
        from.send(&transmits)?;
    }
    Ok(())
}

pub(super) fn run(load: &Load, rate: u64) -> Result<Report> {
    let warm_up = (rate * load.warm_up / 1_000).min(MAX / 2);
    let total = warm_up + (rate * load.time / 1_000).min(MAX / 2);
    let mut clients = Clients::open(load)?;
    let mut inbox = Batch::new(BATCH);
    let mut state = vec![0; usize::try_from(total)?];
    let mut payloads = vec![clients.blank(); BATCH];
    let mut latency = Histogram::<u64>::new_with_bounds(1, 10_000_000_000, 3)?;
    let mut lag = latency.clone();
    let mut answered = [0; 2];
    let mut next = 0;
    let mut last_sent = Instant::now();
    let mut measured_from = clients.start;
    let clocks = Clocks::of(load)?;
    let mut before = Cpu::default();
    while next < total || answered[0] + answered[1] < total && last_sent.elapsed() < TIMEOUT {
        let due = (clients.now() * rate / 1_000_000_000).min(total);
        while next < due {
            if next == warm_up {
                measured_from = Instant::now();
                before = clocks.now();
            }
            // The warm-up ends between two batches.
            let end = if next < warm_up {
                due.min(warm_up)
            } else {
                due
            };
            let batch = next..end.min(next + BATCH as u64);
            for (number, datagram) in batch.clone().zip(&mut payloads) {
                let client = clients.address(client_of(load, number)?).1;
                let payload = write_header(clients.senders, client, datagram)?;
                let sent = clients.now();
                let tag = Tag {
                    client,
                    load: clients.number,
                    sequence: number,
                    sent,
                };
                tag.write(payload, clients.shape);
                if number >= warm_up {
                    lag.saturating_record(sent.saturating_sub(due_at(number, rate)).max(1));
                }
                state[usize::try_from(number)?] = SENT;
            }
            send(&clients, load, batch.clone(), &payloads)?;
            next = batch.end;
            last_sent = Instant::now();
        }
        let start = clients.start;
        clients.receive(&mut inbox, |tag| {
            let now = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
            let known = usize::try_from(tag.sequence)
                .ok()
                .and_then(|number| state.get_mut(number));
            let Some(known) = known.filter(|known| **known == SENT) else {
                return false;
            };
            *known = ANSWERED;
            answered[usize::from(tag.sequence >= warm_up)] += 1;
            if tag.sequence >= warm_up {
                latency.saturating_record(now.saturating_sub(tag.sent).max(1));
            }
            true
        })?;
        let until_next = due_at(next, rate).saturating_sub(clients.now());
        match (next < total, until_next) {
            // Behind time it never waits; the server, on the same core, has its
            // turns all the same.
            (true, 0) => std::thread::yield_now(),
            (true, wait) => clients.wait(Duration::from_nanos(wait))?,
            (false, _) => clients.wait(Duration::from_millis(10))?,
        }
    }
    let microseconds = |histogram: &Histogram<u64>, quantile| {
        histogram.value_at_quantile(quantile) as f64 / 1_000.0
    };
    Ok(Report {
        seconds: (last_sent - measured_from).as_secs_f64(),
        sent: total - warm_up,
        received: answered[1],
        lost: total - warm_up - answered[1],
        wrong: clients.wrong,
        reordered: 0,
        cpu: clocks.now().since(before),
        sent_before: warm_up,
        lost_before: warm_up - answered[0],
        latency: Some(Latency {
            p50: microseconds(&latency, 0.5),
            p99: microseconds(&latency, 0.99),
            p999: microseconds(&latency, 0.999),
            lag_p99: microseconds(&lag, 0.99),
        }),
    })
}
