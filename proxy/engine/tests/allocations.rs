//! A worker without the rest of the proxy. Steady state allocates nothing: one that moves
//! a hundred times as many datagrams allocates no more. When it is told to stop,
//! replies that have come still pass.
#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::net::{SocketAddr, UdpSocket};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use ppv2_engine::accept::{Accept, Direct, Formats, LocalHeaders, Remember};
use ppv2_engine::address::ServerAddr;
use ppv2_engine::capacity::Capacity;
use ppv2_engine::listener::{Listener, ListenerSettings, Rules};
use ppv2_engine::mode::{Emit, Mode};
use ppv2_engine::own_tlvs::OwnTlvs;
use ppv2_engine::server::{Replies, Server, SourceNetwork, Sources, Target};
use ppv2_engine::session::MIN_REST;
use ppv2_engine::snapshot::{ListenerSnapshot, Pauses, Routing, Snapshot, Targets};
use ppv2_engine::source_addresses::SourceAddresses;
use ppv2_engine::tag::TagKeys;
use ppv2_engine::upstream::{Balance, ByFamily, Member, Plan, State};
use ppv2_engine::worker::{Command, Worker, WorkerSetup};
use ppv2_udp::{Binding, Options, Socket};

const CLIENTS: usize = 8;

const OPTIONS: Options = Options {
    dont_fragment: false,
    bursts: true,
};

fn socket() -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    socket
}

fn routing(targets: &Targets) -> Routing {
    let member = |target: &Target| Member {
        address: target.server.address,
        weight: 1,
        backup: false,
        state: State::Up,
    };
    let members: Vec<_> = targets.iter().map(member).collect();
    let plan = Arc::new(Plan::new(Balance::RoundRobin, &members));
    Routing {
        plans: ByFamily::new(|_| Arc::clone(&plan)),
        rules: Vec::new(),
    }
}

fn targets(servers: &[UdpSocket], way: &Way) -> Targets {
    let target = |socket: &UdpSocket| {
        let address = ServerAddr(socket.local_addr().unwrap());
        Target {
            server: Server::new("upstream", &address.to_string(), address, 1),
            sources: way.sources.clone(),
            replies: way.replies.clone(),
            tlvs: way.tlvs.clone(),
            repeat: None,
            ports: None,
            mode: way.mode,
        }
    };
    Targets::new(servers.iter().map(target).collect())
}

fn settings(way: &Way) -> ListenerSettings {
    let rules = Rules {
        idle_timeout: Duration::from_secs(60),
        responses: 0,
        requests: 0,
        amplification: None,
    };
    let mut settings = ListenerSettings::new(Listener::new("listener", 1), rules);
    settings.keeps_sessions = way.keeps_sessions;
    settings.accept = way.accept.clone();
    settings
}

/// How the worker sends to servers and knows whose replies are.
#[derive(Clone, Debug)]
struct Way {
    sources: Sources,
    replies: Replies,
    keeps_sessions: bool,
    accept: Option<Arc<Accept>>,
    tlvs: Option<Arc<OwnTlvs>>,
    mode: Mode,
}

/// Each session has a socket of its own.
fn own_sockets() -> Way {
    Way {
        sources: Sources::Addresses(Arc::from([])),
        replies: Replies::Session,
        keeps_sessions: true,
        accept: None,
        tlvs: None,
        mode: Mode::Ppv2 {
            emit: Emit::Every,
            crc32c: true,
        },
    }
}

/// Each session has an address of its own.
fn network() -> Way {
    Way {
        sources: Sources::Network(SourceNetwork {
            network: "127.64.0.0/10".parse().unwrap(),
            port: None,
        }),
        ..own_sockets()
    }
}

/// Replies carry tags. The servers send the header of the request back.
fn tagged(keeps_sessions: bool) -> Way {
    Way {
        replies: Replies::Tagged(Arc::new(TagKeys::new([7; 16]))),
        keeps_sessions,
        ..own_sockets()
    }
}

/// By Simple Proxy Protocol. The servers send the header of the request back.
fn spp(way: Way) -> Way {
    Way {
        mode: Mode::Spp,
        ..way
    }
}

/// Headers carry a TLV and the id of the session.
fn with_tlvs(way: Way) -> Way {
    let mut tlvs = OwnTlvs::new();
    tlvs.push(ppv2::TlvType(0xe1), b"text").unwrap();
    tlvs.add_unique_id();
    Way {
        tlvs: Some(Arc::new(tlvs)),
        ..way
    }
}

/// Clients are proxies. The datagrams of some, and every other of the others', have a header
/// with a TLV, which goes on to the server.
fn with_headers_in(way: Way) -> Way {
    let accept = Accept {
        from: vec!["127.0.0.0/8".parse().unwrap()],
        formats: Formats {
            v2: true,
            spp: false,
        },
        direct: Direct::Drop,
        local: LocalHeaders::Forward,
        passes_tlvs: true,
        remember: Some(Remember {
            idle: Duration::from_secs(60),
            max: CLIENTS,
            forwards_empty: false,
        }),
    };
    Way {
        accept: Some(Arc::new(accept)),
        ..way
    }
}

/// Whether the client of this number is a proxy that tags, and wants each reply to have a
/// header.
fn has_tag(client: usize) -> bool {
    client.is_multiple_of(2)
}

/// What the client of this number sends, if it is a proxy.
fn header_in(client: usize) -> Vec<u8> {
    let is_tagged = has_tag(client);
    let port = 1000 + u16::try_from(client).unwrap();
    let client = SocketAddr::from(([203, 0, 113, 11], port));
    let destination = SocketAddr::from(([198, 51, 100, 10], 53));
    let mut buffer = [0; 128];
    let encoder = ppv2::Encoder::udp(&mut buffer, client, destination).unwrap();
    let encoder = encoder.authority("example.org").unwrap();
    let encoder = match is_tagged {
        true => encoder.reply_tag(ppv2::ReplyTag::new(0, [7; 8])).unwrap(),
        false => encoder,
    };
    encoder.finish().to_vec()
}

/// Replies turn out to carry tags.
fn auto() -> Way {
    Way {
        replies: Replies::Auto(Arc::new(TagKeys::new([7; 16]))),
        ..own_sockets()
    }
}

/// Asks and answers so many times for each client, and takes some more
/// datagrams in a row now and then.
fn exchange(listener: SocketAddr, servers: &[UdpSocket], rounds: usize, way: &Way) {
    let clients: Vec<_> = (0..CLIENTS).map(|_| socket()).collect();
    let mut datagram = [0; 2000];
    for round in 0..rounds {
        let in_a_row = if round % 10 == 0 { 3 } else { 1 };
        for (number, client) in clients.iter().enumerate() {
            let has_header = way.accept.is_some() && (has_tag(number) || round % 2 == 0);
            let header = if has_header {
                header_in(number)
            } else {
                Vec::new()
            };
            for _ in 0..in_a_row {
                let datagram = [&header[..], &[7; 1200]].concat();
                client.send_to(&datagram, listener).unwrap();
            }
        }
        for server in servers {
            for _ in 0..CLIENTS / servers.len() * in_a_row {
                let (len, proxy) = server.recv_from(&mut datagram).unwrap();
                server.send_to(&datagram[..len], proxy).unwrap();
            }
        }
        for client in &clients {
            for _ in 0..in_a_row {
                client.recv(&mut datagram).unwrap();
            }
        }
    }
}

/// A worker between its clients and servers, and what tells it to stop.
struct Running {
    worker: Worker,
    address: SocketAddr,
    snapshot: Arc<Snapshot>,
    stop: Box<dyn FnOnce()>,
}

fn worker(servers: &[UdpSocket], way: &Way, pauses: Pauses) -> Running {
    let listener =
        Socket::listen("127.0.0.1:0".parse().unwrap(), Binding::default(), OPTIONS).unwrap();
    let address = listener.bound();
    let (commands, receiver) = mpsc::channel();
    let targets = targets(servers, way);
    let snapshot = Arc::new(Snapshot {
        listeners: [ListenerSnapshot {
            settings: Arc::new(settings(way)),
            routing: routing(&targets),
            targets: Arc::new(targets),
        }]
        .into_iter()
        .collect(),
        bound: [(address, 0)].into(),
        pauses,
        ..Snapshot::default()
    });
    let (worker, waker) = Worker::new(WorkerSetup {
        number: 0,
        workers: 1,
        sockets: vec![listener],
        snapshot: Arc::clone(&snapshot),
        capacity: Capacity::new(100, 110),
        client_ports: Arc::default(),
        counters: Arc::default(),
        commands: receiver,
    })
    .unwrap();
    let stop = Box::new(move || {
        commands.send(Command::Stop).unwrap();
        waker.wake().unwrap();
    });
    Running {
        worker,
        address,
        snapshot,
        stop,
    }
}

/// Allocations of a worker that moves datagrams for so many rounds, between its
/// clients and so many servers.
fn allocations(rounds: usize, servers: usize, way: &Way) -> u64 {
    let servers: Vec<_> = (0..servers).map(|_| socket()).collect();
    let Running {
        worker,
        address,
        snapshot,
        stop,
    } = worker(&servers, way, Pauses::default());
    let running = thread::spawn(move || {
        let mut result = Ok(());
        let measured = allocation_counter::measure(|| result = worker.run());
        result.unwrap();
        measured.count_total
    });
    exchange(address, &servers, rounds, way);
    stop();
    let allocations = running.join().unwrap();
    let listener = &snapshot.listeners.get(0).unwrap().settings.listener;
    assert!(listener.sum(|counters| counters.received.get()) >= (CLIENTS * rounds) as u64);
    allocations
}

#[test]
fn a_hundred_times_the_datagrams_take_no_allocation_more() {
    let ways = [
        (1, own_sockets()),
        (4, own_sockets()),
        (4, network()),
        (1, with_tlvs(own_sockets())),
        (1, spp(own_sockets())),
        (4, spp(network())),
        (4, with_tlvs(tagged(true))),
        (4, tagged(true)),
        (1, tagged(false)),
        (1, auto()),
        (1, with_headers_in(own_sockets())),
        (4, with_headers_in(with_tlvs(network()))),
    ];
    for (servers, way) in ways {
        let few = allocations(30, servers, &way);
        assert!(few > 0, "beginning sessions allocates, and is counted");
        let many = allocations(3000, servers, &way);
        // Into how many parts of the table's index the clients fall is chance.
        assert!(many <= few + CLIENTS as u64, "{few}, then {many}: {way:?}");
    }
}

#[test]
fn replies_that_wait_at_a_stop_are_passed_on() {
    for way in [
        own_sockets(),
        network(),
        tagged(true),
        tagged(false),
        auto(),
    ] {
        assert_waiting_replies_are_passed_on(&way);
    }
}

fn assert_waiting_replies_are_passed_on(way: &Way) {
    let server = [socket()];
    // They and the order to stop come in the pause after the first.
    let pauses = Pauses {
        coalesce: Duration::from_millis(300),
        ..Pauses::default()
    };
    let running = worker(&server, way, pauses);
    let worker = running.worker;
    let worker = thread::spawn(move || worker.run().unwrap());
    let client = socket();
    client.send_to(b"question", running.address).unwrap();
    let mut request = [0; 100];
    let (len, session) = server[0].recv_from(&mut request).unwrap();
    if let Some(network) = way.sources.network() {
        assert!(network.network.contains(&session.ip()), "{session}");
    }
    let header = match way.replies {
        Replies::Session => &[],
        Replies::Auto(_) | Replies::Tagged(_) => &request[..len - b"question".len()],
    };
    for number in 0..100 {
        let reply = [header, &[number]].concat();
        server[0].send_to(&reply, session).unwrap();
    }
    (running.stop)();
    for number in 0..100 {
        let mut reply = [0; 100];
        let len = client.recv(&mut reply).unwrap();
        assert_eq!(reply[..len], [number]);
    }
    worker.join().unwrap();
    let listener = running.snapshot.listeners.get(0).unwrap();
    let server = &listener.targets.get(0).unwrap().server;
    assert_eq!(server.counters(0).replies.get(), 100);
    let counters = listener.settings.listener.counters(0);
    assert_eq!(counters.replied.get(), 100);
}

#[test]
fn source_addresses_are_taken_without_allocation() {
    let network = SourceNetwork {
        network: "192.0.2.0/26".parse().unwrap(),
        port: None,
    };
    let mut now = Instant::now();
    let mut addresses = SourceAddresses::new(&network, 0, 1, now);
    let mut take_and_give_back = |times| {
        for _ in 0..times {
            let address = addresses.take(now).unwrap();
            addresses.give_back(address, now);
            addresses.heard(address, now);
            now += MIN_REST;
        }
    };
    take_and_give_back(200);
    let info = allocation_counter::measure(|| take_and_give_back(1000));
    assert_eq!(info.count_total, 0, "{info:?}");
}
