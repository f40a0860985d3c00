//! Source networks between hosts: each session has an address of the network, to which
//! the server has a route and which no interface has. The proxy has no privilege for it.
//! A reply counts from the server that was asked, to the address that it was asked from.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use ipnet::IpNet;
use ppv2_engine::session::MIN_REST;
use ppv2_lab::network::{Answering, Client, Echo, Family, Lab, Proxy, Side, listener};
use ppv2_lab::*;

/// The network that sessions to the family's server have addresses of. The server's way to
/// it is that to everybody: by the proxy's host.
fn network(family: Family) -> IpNet {
    let network = match family {
        Family::V4 => "10.99.0.0/16",
        Family::V6 => "fd00:1::/64",
    };
    network.parse().unwrap()
}

/// A network beside it, for another upstream.
fn second_network(family: Family) -> IpNet {
    let network = match family {
        Family::V4 => "10.98.0.0/16",
        Family::V6 => "fd00:2::/64",
    };
    network.parse().unwrap()
}

/// The topology, with the one route that the proxy's host needs.
fn enter(test: &str) -> Option<Lab> {
    let lab = Lab::enter(test, Side::Private)?;
    for family in Family::BOTH {
        for network in [network(family), second_network(family)] {
            lab.sh("proxy", &format!("ip route add local {network} dev lo"));
        }
    }
    Some(lab)
}

/// A listener of each family with these keys, whose sessions have addresses of its network.
fn behind_networks(workers: usize, keys: &str) -> String {
    let of = |family| {
        let source = format!("source = [\"{}\"]\n", network(family));
        listener(family, keys) + &source
    };
    format!("workers = {workers}\n") + &Family::BOTH.map(of).concat()
}

/// What the server was asked and where, by sockets that a test answers from itself.
struct Asked {
    client: Client,
    /// The session's own address, and its worker's port.
    session: SocketAddr,
}

fn ask_of(lab: &Lab, family: Family, server: &UdpSocket) -> Asked {
    let client = Client::new(lab, family, 1, 0);
    client.send(b"question");
    let (datagram, session) = receive(server);
    assert_eq!(read_header(&datagram).0, client.address);
    assert!(network(family).contains(&session.ip()), "{session}");
    Asked { client, session }
}

fn other_address(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(v4) => std::net::Ipv4Addr::from_bits(v4.to_bits() ^ 4).into(),
        IpAddr::V6(v6) => std::net::Ipv6Addr::from_bits(v6.to_bits() ^ 4).into(),
    }
}

fn descriptors(proxy: &Proxy<'_>) -> usize {
    let folder = format!("/proc/{}/fd", proxy.process.pid());
    std::fs::read_dir(folder).unwrap().count()
}

#[test]
fn sessions_have_an_address_each_and_no_socket() {
    let Some(lab) = enter(test_name!()) else {
        return;
    };
    let proxy = lab.proxy_with(&behind_networks(2, "mode = \"plain\""));
    for family in Family::BOTH {
        let _server = Echo::new(&lab, family, Answering::Back);
        let clients: Vec<_> = (0..100).map(|_| Client::new(&lab, family, 1, 0)).collect();
        // Each worker opens its socket with its first session.
        for client in &clients[..30] {
            client.ask(b"first");
        }
        let before = descriptors(&proxy);
        let mut sources = HashSet::new();
        for round in 0..3u8 {
            for client in &clients {
                client.send(&[round]);
            }
            sources.extend(clients.iter().map(|client| client.answered(&[round])));
        }
        assert_eq!(descriptors(&proxy), before);
        let ips: HashSet<_> = sources.iter().map(SocketAddr::ip).collect();
        let ports: HashSet<_> = sources.iter().map(SocketAddr::port).collect();
        assert_eq!((sources.len(), ips.len(), ports.len()), (100, 100, 2));
        assert!(ips.iter().all(|ip| network(family).contains(ip)), "{ips:?}");
    }
    proxy.assert_standing(0);
}

#[test]
fn workers_send_from_the_ports_that_are_configured() {
    let Some(lab) = enter(test_name!()) else {
        return;
    };
    let config = behind_networks(2, "mode = \"plain\"");
    let ports = config.replace("source = ", "source_port = 7000\nsource = ");
    let proxy = lab.proxy_with(&ports);
    // Kept, so that none gets the port of an earlier one, whose session goes on.
    let mut kept = Vec::new();
    for family in Family::BOTH {
        let _server = Echo::new(&lab, family, Answering::Back);
        let clients: Vec<_> = (0..30).map(|_| Client::new(&lab, family, 1, 0)).collect();
        let ports: HashSet<_> = clients.iter().map(|one| one.ask(b"?").port()).collect();
        kept.extend(clients);
        assert_eq!(ports, HashSet::from([7000, 7001]));
    }
    // From others, once it is told so.
    proxy.reload(&ports.replace("7000", "7100"));
    for family in Family::BOTH {
        let _server = Echo::new(&lab, family, Answering::Back);
        let clients: Vec<_> = (0..30).map(|_| Client::new(&lab, family, 1, 0)).collect();
        let ports: HashSet<_> = clients.iter().map(|one| one.ask(b"?").port()).collect();
        kept.extend(clients);
        assert_eq!(ports, HashSet::from([7100, 7101]));
    }
}

#[test]
fn reply_counts_from_the_asked_server_to_the_sessions_address_alone() {
    let Some(lab) = enter(test_name!()) else {
        return;
    };
    // The kernel lets through what comes from servers: of this listener or another.
    let other = |family: Family| SocketAddr::new(family.server().ip(), 9003);
    let second = Family::BOTH.map(|family| {
        let bind = SocketAddr::new(family.listener().ip(), 9002);
        format!(
            "[[listener]]\nname = \"other{family:?}\"\nbind = [\"{bind}\"]\n\
             upstream = \"other{family:?}\"\n[upstream.other{family:?}]\n\
             servers = [\"{}\"]\nsource = [\"{}\"]\n",
            other(family),
            second_network(family)
        )
    });
    let proxy = lab.proxy_with(&(behind_networks(2, "") + &second.concat()));
    for family in Family::BOTH {
        let server = lab.at("server", || bind(family.server()));
        let (other, stranger) = lab.at("server", || {
            let unbound = SocketAddr::new(family.server().ip(), 0);
            (bind(other(family)), bind(unbound))
        });
        let mut asked: Vec<Asked> = Vec::new();
        let ports = |asked: &[Asked]| {
            let ports = asked.iter().map(|one| one.session.port());
            ports.collect::<HashSet<_>>().len()
        };
        // A session of each worker.
        while ports(&asked) < 2 {
            asked.push(ask_of(&lab, family, &server));
        }
        let first = &asked[0];
        let last = &asked[asked.len() - 1];
        let dropped = |reason| proxy.dropped(family, reason);

        other.send_to(b"another server's", first.session).unwrap();
        eventually("it to be dropped", || dropped("reply_wrong_source") == 1);

        let to_another = SocketAddr::new(other_address(first.session.ip()), first.session.port());
        server.send_to(b"to another address", to_another).unwrap();
        // An address of one worker's and the port of another's.
        for (ip, port) in [(first, last), (last, first)] {
            let crossed = SocketAddr::new(ip.session.ip(), port.session.port());
            server.send_to(b"to another worker", crossed).unwrap();
        }
        eventually("them to be dropped", || {
            dropped("reply_unknown_address") == 3
        });

        stranger.send_to(b"no server's", first.session).unwrap();
        let closed = SocketAddr::new(first.session.ip(), 9);
        server.send_to(b"to another port", closed).unwrap();

        for one in &asked {
            let true_one = one.client.address.to_string();
            server.send_to(true_one.as_bytes(), one.session).unwrap();
            assert_eq!(receive(&one.client.socket).0, true_one.as_bytes());
        }
        for one in &asked {
            receive_nothing(&one.client.socket);
        }
    }
}

#[test]
fn late_replies_to_all_addresses_reach_no_client_and_start_their_rest_again() {
    let setup = "ip -6 route add local fd00:1::/120 dev lo";
    if !namespace::enter_without_rights(test_name!(), setup) {
        return;
    }
    thread::scope(|scope| {
        scope.spawn(|| rests("127.0.0.1", "127.64.0.0/24", 253));
        scope.spawn(|| rests("::1", "fd00:1::/120", 254));
    });
}

/// Uses up a network that has so many addresses for sessions.
fn rests(host: &str, network: &str, addresses: u64) {
    let server = socket(host);
    let (listener, admin) = (address(host), address("127.0.0.1"));
    let folder = tempfile::tempdir().unwrap();
    let config = format!(
        "workers = 1\n[limits]\nmax_sessions = 100\n[admin]\nlisten = \"{admin}\"\n\
         [[listener]]\nbind = [\"{listener}\"]\nupstream = \"u\"\nresponses = 1\n\
         [upstream.u]\nsource = [\"{network}\"]\nservers = [\"{}\"]\n",
        server.local_addr().unwrap()
    );
    let _proxy = proxy_with(&folder, &config);
    let client = socket(host);
    let mut sessions = HashSet::new();
    for number in 0..addresses {
        client.send_to(&number.to_be_bytes(), listener).unwrap();
        let (datagram, session) = receive(&server);
        server.send_to(&read_header(&datagram).2, session).unwrap();
        assert_eq!(receive(&client).0, number.to_be_bytes());
        assert!(sessions.insert(session), "{session} again");
    }
    let refused = |times| {
        client.send_to(b"too soon", listener).unwrap();
        eventually("it to be refused", || {
            dropped(admin, "no_addresses") == times
        });
    };
    refused(1);
    let mut late = 0;
    for _ in 0..2 {
        thread::sleep(MIN_REST / 2 + Duration::from_secs(1));
        for session in &sessions {
            server.send_to(b"late", *session).unwrap();
            late += 1;
        }
        eventually("late replies to be dropped", || {
            dropped(admin, "reply_unknown_address") == late
        });
    }
    // They have rested since their ends, and not since the late replies.
    refused(2);
    thread::sleep(MIN_REST + Duration::from_millis(500));
    let mut again = HashSet::new();
    for number in 0..addresses {
        client.send_to(&number.to_be_bytes(), listener).unwrap();
        let (datagram, session) = receive(&server);
        server.send_to(&read_header(&datagram).2, session).unwrap();
        assert_eq!(receive(&client).0, number.to_be_bytes());
        again.insert(session);
    }
    assert_eq!(again, sessions);
    receive_nothing(&client);
}

/// Has the server's host report each datagram to a closed port.
fn unlimited_refusals(lab: &Lab) {
    lab.sh("server", "echo 0 >/proc/sys/net/ipv4/icmp_ratelimit");
    lab.sh("server", "echo 0 >/proc/sys/net/ipv6/icmp/ratelimit");
}

/// Refusals that count for the family's server.
fn icmp_errors(proxy: &Proxy<'_>, family: Family) -> u64 {
    let labels = format!("{{upstream=\"{family:?}\",server=\"{}\"}}", family.server());
    proxy.metric(&format!("ppv2_upstream_icmp_errors_total{labels}"))
}

#[test]
fn refusals_count_for_the_server_that_refuses_and_lose_no_others_datagram() {
    let Some(lab) = enter(test_name!()) else {
        return;
    };
    // Beside each server that refuses one that answers, by the same socket.
    let healthy = |family: Family| SocketAddr::new(family.server().ip(), 9003);
    let second = Family::BOTH.map(|family| {
        let bind = SocketAddr::new(family.listener().ip(), 9002);
        format!(
            "[[listener]]\nname = \"healthy{family:?}\"\nbind = [\"{bind}\"]\nmode = \"plain\"\n\
             upstream = \"healthy{family:?}\"\n[upstream.healthy{family:?}]\n\
             servers = [\"{}\"]\nsource = [\"{}\"]\n",
            healthy(family),
            second_network(family)
        )
    });
    let proxy = lab.proxy_with(&(behind_networks(1, "mode = \"plain\"") + &second.concat()));
    unlimited_refusals(&lab);
    for family in Family::BOTH {
        let _healthy = Echo::at(&lab, healthy(family), Answering::Back);
        let refused: Vec<_> = (0..20).map(|_| Client::new(&lab, family, 1, 0)).collect();
        let mut served = Client::new(&lab, family, 2, 0);
        served.listener.set_port(9002);
        for round in 0..100u8 {
            for client in &refused {
                client.send(b"to nobody");
            }
            for number in 0..5 {
                served.send(&[round, number]);
            }
            for number in 0..5 {
                served.answered(&[round, number]);
            }
        }
        let sent = 100 * 20;
        let count = || icmp_errors(&proxy, family);
        // The host reports no more than so many a second.
        eventually("refusals to be counted", || count() >= 20);
        assert!(count() <= sent, "{} of {sent}", count());
        let labels = format!(
            "{{upstream=\"healthy{family:?}\",server=\"{}\"}}",
            healthy(family)
        );
        let of_healthy = proxy.metric(&format!("ppv2_upstream_icmp_errors_total{labels}"));
        assert_eq!(of_healthy, 0);

        // A server that comes is found by the next datagram.
        let _server = Echo::new(&lab, family, Answering::Back);
        for client in &refused {
            client.ask(b"to somebody");
        }
    }
}

#[test]
fn passive_check_takes_a_server_that_refuses_down() {
    let Some(lab) = enter(test_name!()) else {
        return;
    };
    let health = "health = { probe = { kind = \"none\" }, passive = { window = \"200ms\", \
                  min_datagrams = 5, hold = \"1m\" } }\n";
    let config = behind_networks(1, "mode = \"plain\"");
    let proxy = lab.proxy_with(&config.replace("source = ", &format!("{health}source = ")));
    unlimited_refusals(&lab);
    for family in Family::BOTH {
        let client = Client::new(&lab, family, 1, 0);
        let up = format!(
            "ppv2_upstream_up{{upstream=\"{family:?}\",server=\"{}\"}}",
            family.server()
        );
        eventually("it to be down", || {
            for _ in 0..10 {
                client.send(b"to nobody");
            }
            proxy.metric(&up) == 0
        });
    }
}

#[test]
fn new_sessions_follow_a_reload_and_others_stay() {
    let Some(lab) = enter(test_name!()) else {
        return;
    };
    let with_network = behind_networks(2, "");
    let is_other = |line: &&str| !line.starts_with("source");
    let lines = with_network.lines().filter(is_other);
    let without: String = lines.map(|line| format!("{line}\n")).collect();
    let with_second = Family::BOTH
        .iter()
        .fold(with_network.clone(), |config, family| {
            config.replace(
                &network(*family).to_string(),
                &second_network(*family).to_string(),
            )
        });
    type Of = fn(Family) -> Option<IpNet>;
    let steps: [(&str, Of); 5] = [
        (&without, |_| None),
        (&with_network, |family| Some(network(family))),
        (&with_second, |family| Some(second_network(family))),
        (&without, |_| None),
        (&with_network, |family| Some(network(family))),
    ];
    let proxy = lab.proxy_with(&without);
    for family in Family::BOTH {
        let server = lab.at("server", || bind(family.server()));
        let mut sessions: Vec<(Client, SocketAddr)> = Vec::new();
        let ask = |client: &Client, question: &[u8]| {
            client.send(question);
            let (datagram, session) = receive(&server);
            let (seen, _, payload) = read_header(&datagram);
            assert_eq!((seen, payload.as_slice()), (client.address, question));
            session
        };
        for (turn, (config, network)) in (0u8..).zip(steps) {
            // Their answers come after the reload.
            for (client, session) in &sessions {
                assert_eq!(ask(client, &[turn]), *session);
            }
            proxy.reload(config);
            for (client, session) in &sessions {
                server.send_to(&[turn], *session).unwrap();
                assert_eq!(receive(&client.socket).0, [turn]);
                assert_eq!(ask(client, b"again"), *session);
            }
            for _ in 0..10 {
                let client = Client::new(&lab, family, 1, 0);
                let session = ask(&client, b"first");
                let proxy = IpNet::from(family.proxy());
                let expected = network(family).unwrap_or(proxy);
                assert!(expected.contains(&session.ip()), "{session} {expected}");
                sessions.push((client, session));
            }
        }
    }
}

#[test]
fn replies_in_flight_pass_at_a_stop() {
    let Some(lab) = enter(test_name!()) else {
        return;
    };
    let mut proxy = lab.proxy_with(&behind_networks(2, ""));
    let servers = Family::BOTH.map(|family| lab.at("server", || bind(family.server())));
    let mut asked = Vec::new();
    for (family, server) in Family::BOTH.iter().zip(&servers) {
        asked.extend((0..10).map(|_| (server, ask_of(&lab, *family, server))));
    }
    proxy.process.signal("TERM");
    proxy.process.wait_for("shutting down");
    for (server, one) in &asked {
        server.send_to(b"answer", one.session).unwrap();
    }
    for (_, one) in &asked {
        assert_eq!(receive(&one.client.socket).0, b"answer");
    }
    assert_eq!(proxy.process.wait().0.code(), Some(0));
}

#[test]
fn datagrams_that_exceed_the_path_are_fragmented_or_dropped_as_configured() {
    let Some(lab) = enter(test_name!()) else {
        return;
    };
    for dont_fragment in [false, true] {
        let keys = format!("mode = \"plain\"\ndont_fragment = {dont_fragment}");
        let proxy = lab.proxy_with(&behind_networks(1, &keys));
        for family in Family::BOTH {
            let _server = Echo::new(&lab, family, Answering::Back);
            let client = Client::new(&lab, family, 1, 0);
            let long = [b'x'; 4000];
            if dont_fragment {
                client.unanswered(&long);
                eventually("the drop", || proxy.dropped(family, "oversize") == 1);
            } else {
                client.ask(&long);
            }
            client.ask(b"short");
        }
    }
}

/// Clients of a server that answers, each with one datagram in flight.
const BUSY: usize = 64;

#[test]
fn refusals_take_no_room_of_replies() {
    if !namespace::enter_without_rights(test_name!(), "") {
        return;
    }
    let server = socket("127.0.0.1");
    let [dead, busy, nobody, admin] = [(); 4].map(|()| address("127.0.0.1"));
    let of = |bind: SocketAddr, network: &str, server: SocketAddr| {
        format!(
            "[[listener]]\nname = \"{bind}\"\nbind = [\"{bind}\"]\nmode = \"plain\"\n\
             upstream = \"{bind}\"\n[upstream.\"{bind}\"]\nsource = [\"{network}\"]\n\
             servers = [\"{server}\"]\n"
        )
    };
    let folder = tempfile::tempdir().unwrap();
    // One worker, and so one socket.
    let config = format!("workers = 1\n[admin]\nlisten = \"{admin}\"\n")
        + &of(dead, "127.64.0.0/16", nobody)
        + &of(busy, "127.65.0.0/16", server.local_addr().unwrap());
    let _proxy = proxy_with(&folder, &config);
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let _over = Over(&is_over);
            // More than the buffer has room for, of each of the others' rounds.
            let clients: Vec<_> = (0..BUSY).map(|_| socket("127.0.0.1")).collect();
            for round in 0..500u32 {
                for client in &clients {
                    client.send_to(&round.to_be_bytes(), busy).unwrap();
                }
                for client in &clients {
                    assert_eq!(receive(client).0, round.to_be_bytes());
                }
            }
        });
        scope.spawn(|| {
            let client = socket("127.0.0.1");
            while !is_over.load(Ordering::Relaxed) {
                client.send_to(b"to nobody", dead).unwrap();
            }
        });
        server
            .set_read_timeout(Some(Duration::from_millis(50)))
            .unwrap();
        let mut datagram = [0; 100];
        while !is_over.load(Ordering::Relaxed) {
            if let Ok((len, session)) = server.recv_from(&mut datagram) {
                server.send_to(&datagram[..len], session).unwrap();
            }
        }
    });
    let labels = |listener, server| format!("{{upstream=\"{listener}\",server=\"{server}\"}}");
    let errors = labels(dead, nobody);
    assert!(metric(admin, &format!("ppv2_upstream_icmp_errors_total{errors}")) > 1000);
    let lost = labels(busy, server.local_addr().unwrap());
    let lost = metric(
        admin,
        &format!("ppv2_upstream_receive_overflows_total{lost}"),
    );
    assert_eq!(lost, 0);
}

/// Says that it is over when it is dropped.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
