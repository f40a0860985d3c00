//! Steady state allocates nothing: a worker that moves a hundred times as many
//! datagrams allocates not once more.
#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::net::{SocketAddr, UdpSocket};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use ppv2_proxy::address::ServerAddr;
use ppv2_proxy::counters::WorkerCounters;
use ppv2_proxy::mode::{Emit, Mode};
use ppv2_proxy::net::{Options, Socket};
use ppv2_proxy::session::{Budget, Rules};
use ppv2_proxy::upstream::Server;
use ppv2_proxy::worker::{Command, ListenerSettings, Pace, Share, Worker};

const CLIENTS: usize = 8;

fn socket() -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    socket
}

fn settings(server: SocketAddr) -> ListenerSettings {
    ListenerSettings {
        rules: Rules {
            idle_timeout: Duration::from_secs(60),
            responses: 0,
            requests: 0,
        },
        allow: vec!["0.0.0.0/0".parse().unwrap()],
        dont_fragment: false,
        dscp: false,
        servers: vec![Server {
            number: 0,
            address: ServerAddr(server),
            sources: Arc::from([]),
            mode: Mode::Ppv2 {
                emit: Emit::Every,
                crc32c: true,
            },
        }],
    }
}

/// Asks and answers so many times for each client, and takes some more
/// datagrams in a row now and then.
fn exchange(listener: SocketAddr, server: &UdpSocket, rounds: usize) {
    let clients: Vec<_> = (0..CLIENTS).map(|_| socket()).collect();
    let mut datagram = [0; 2000];
    for round in 0..rounds {
        let in_a_row = if round % 10 == 0 { 3 } else { 1 };
        for client in &clients {
            for _ in 0..in_a_row {
                client.send_to(&[7; 1200], listener).unwrap();
            }
        }
        for _ in 0..CLIENTS * in_a_row {
            let (len, proxy) = server.recv_from(&mut datagram).unwrap();
            server.send_to(&datagram[..len], proxy).unwrap();
        }
        for client in &clients {
            for _ in 0..in_a_row {
                client.recv(&mut datagram).unwrap();
            }
        }
    }
}

/// Allocations of a worker that moves datagrams for so many rounds.
fn allocations(rounds: usize) -> u64 {
    let server = socket();
    let options = Options {
        dont_fragment: false,
        bursts: true,
    };
    let listener = Socket::listen("127.0.0.1:0".parse().unwrap(), false, options).unwrap();
    let address = listener.bound();
    let (commands, receiver) = mpsc::sync_channel(1);
    let counters = Arc::new(WorkerCounters::new(1, 1));
    let (worker, waker) = Worker::new(Share {
        number: 0,
        entrances: vec![(listener, 0)],
        listeners: vec![settings(server.local_addr().unwrap())],
        pace: Pace::default(),
        budget: Budget::new(100, 110),
        max_retired: 10,
        counters: Arc::clone(&counters),
        commands: receiver,
    })
    .unwrap();
    let running = thread::spawn(move || {
        let mut result = Ok(());
        let measured = allocation_counter::measure(|| result = worker.run());
        result.unwrap();
        measured.count_total
    });
    exchange(address, &server, rounds);
    commands.send(Command::Stop).unwrap();
    waker.wake().unwrap();
    let allocations = running.join().unwrap();
    assert!(counters.listeners[0].received.get() >= (CLIENTS * rounds) as u64);
    allocations
}

#[test]
fn a_hundred_times_the_datagrams_take_no_allocation_more() {
    let few = allocations(30);
    assert!(few > 0, "beginning sessions allocates, and is counted");
    assert_eq!(allocations(3000), few);
}
