//! A reply reaches the client of its session and no other: a hundred
//! clients behind one address, and a hundred addresses with one port, with a
//! thousand exchanges each, all at the same time. So it is where each session has a socket
//! or an address of a source network, and where replies carry tags.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::thread;

use ppv2_lab::*;
use ppv2_sdk::Trust;

const CLIENTS: u16 = 100;
const EXCHANGES: u32 = 1000;
const THREADS: usize = 4;

/// Answers every datagram with the client that its header names, and its payload.
fn serve(server: &UdpSocket, total: u32) {
    let mut datagram = [0; 2048];
    for _ in 0..total {
        let (len, proxy) = server.recv_from(&mut datagram).unwrap();
        let (header, payload) = ppv2::decode(&datagram[..len]).unwrap();
        let mut answer = header.client().unwrap().to_string().into_bytes();
        answer.push(b' ');
        answer.extend(payload);
        server.send_to(&answer, proxy).unwrap();
    }
}

/// Every client of the share asks, then each takes one answer, a thousand times.
fn ask(clients: &[UdpSocket], target: SocketAddr) {
    let own: Vec<_> = clients.iter().map(|c| c.local_addr().unwrap()).collect();
    let mut answer = [0; 2048];
    for exchange in 0..EXCHANGES {
        for (client, own) in clients.iter().zip(&own) {
            let question = format!("{own} {exchange}");
            client.send_to(question.as_bytes(), target).unwrap();
        }
        for (client, own) in clients.iter().zip(&own) {
            let (len, from) = client.recv_from(&mut answer).unwrap();
            let expected = format!("{own} {own} {exchange}");
            assert_eq!(String::from_utf8_lossy(&answer[..len]), expected);
            assert_eq!(from, target);
        }
    }
    for client in clients {
        client.set_nonblocking(true).unwrap();
        assert!(client.recv(&mut answer).is_err(), "an answer too many");
    }
}

/// As [`serve`], by the SDK, whose replies carry the tag of the header.
fn serve_by_sdk(server: UdpSocket, total: u32) {
    let trust = Trust::networks(["127.0.0.1", "::1"]).build().unwrap();
    let server = ppv2_sdk::UdpSocket::from_std(server, trust).unwrap();
    for _ in 0..total {
        let datagram = server.recv_datagram().unwrap();
        let mut answer = datagram.client.to_string().into_bytes();
        answer.push(b' ');
        answer.extend(&datagram.payload[..]);
        server.reply(&datagram, &answer).unwrap();
    }
}

fn every_client_gets_its_own(host: &str, clients: Vec<UdpSocket>) {
    gets_its_own(host, clients, serve, "", "");
}

/// `keys` are those of the listener and of the upstream.
fn gets_its_own(
    host: &str,
    clients: Vec<UdpSocket>,
    serve: impl FnOnce(&UdpSocket, u32) + Send,
    listener_keys: &str,
    upstream_keys: &str,
) {
    let server = socket(host);
    let (listener, admin) = (address(host), address(host));
    let upstream = server.local_addr().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let config = format!(
        "workers = 2\n[admin]\nlisten = \"{admin}\"\n\
         [[listener]]\nbind = [\"{listener}\"]\nupstream = \"u\"\n{listener_keys}\n\
         [upstream.u]\nservers = [\"{upstream}\"]\n{upstream_keys}\n"
    );
    let _proxy = proxy_with(&folder, &config);
    assert_eq!(clients.len(), usize::from(CLIENTS));
    thread::scope(|scope| {
        scope.spawn(|| serve(&server, u32::from(CLIENTS) * EXCHANGES));
        for share in clients.chunks(clients.len().div_ceil(THREADS)) {
            scope.spawn(move || ask(share, listener));
        }
    });
    let total = u64::from(CLIENTS) * u64::from(EXCHANGES);
    for (name, expected) in [
        ("ppv2_client_datagrams_total", total),
        ("ppv2_reply_datagrams_total", total),
    ] {
        let name = format!("{name}{{listener=\"listener1\"}}");
        // The last reply may be at its client before it is counted.
        eventually(&name, || metric(admin, &name) == expected);
    }
    let opened = metric(admin, "ppv2_sessions_opened_total{listener=\"listener1\"}");
    if listener_keys.contains("sessions = false") {
        assert_eq!(opened, 0);
    } else if upstream_keys.contains("auto") {
        // Some began before the first tag came.
        assert!(opened >= u64::from(CLIENTS), "{opened}");
    } else {
        assert_eq!(opened, u64::from(CLIENTS));
    }
}

#[test]
fn each_of_100_ports_of_one_ipv4_address_gets_its_own_replies() {
    let clients = (0..CLIENTS).map(|_| socket("127.0.0.30")).collect();
    every_client_gets_its_own("127.0.0.1", clients);
}

#[test]
fn each_of_100_ipv4_addresses_with_one_port_gets_its_own_replies() {
    let port = port();
    let client = |n| bind(SocketAddr::new(IpAddr::from([127, 0, 20, n]), port));
    let clients = (1..=100).map(client).collect();
    every_client_gets_its_own("127.0.0.1", clients);
}

#[test]
fn each_of_100_ports_of_one_ipv6_address_gets_its_own_replies() {
    let clients = (0..CLIENTS).map(|_| socket("::1")).collect();
    every_client_gets_its_own("::1", clients);
}

#[test]
fn each_of_100_ipv6_addresses_with_one_port_gets_its_own_replies() {
    let setup =
        "for n in $(seq 1 100); do echo addr add fd00:20::$n/128 dev lo nodad; done | ip -batch -";
    if !namespace::enter(test_name!(), setup) {
        return;
    }
    let port = port();
    let clients = (1..=100)
        .map(|n| bind(format!("[fd00:20::{n}]:{port}").parse().unwrap()))
        .collect();
    every_client_gets_its_own("::1", clients);
}

#[test]
fn each_client_of_a_source_network_gets_its_own_replies() {
    let setup = "ip -6 route add local fd00:1::/64 dev lo; ip route add local 10.99.0.0/16 dev lo";
    if !namespace::enter_without_rights(test_name!(), setup) {
        return;
    }
    for (host, network) in [
        ("127.0.0.1", "127.64.0.0/10"),
        ("127.0.0.1", "10.99.0.0/16"),
        ("::1", "fd00:1::/64"),
    ] {
        let clients = (0..CLIENTS).map(|_| socket(host)).collect();
        gets_its_own(
            host,
            clients,
            serve,
            "",
            &format!("source = [\"{network}\"]"),
        );
    }
}

#[test]
fn each_client_gets_its_own_tagged_replies() {
    for host in ["127.0.0.1", "::1"] {
        for (sessions, replies) in [(true, "auto"), (true, "tagged"), (false, "tagged")] {
            let clients = (0..CLIENTS).map(|_| socket(host)).collect();
            let serve = |server: &UdpSocket, total| {
                serve_by_sdk(server.try_clone().unwrap(), total);
            };
            gets_its_own(
                host,
                clients,
                serve,
                &format!("sessions = {sessions}"),
                &format!("replies = \"{replies}\""),
            );
        }
    }
}
