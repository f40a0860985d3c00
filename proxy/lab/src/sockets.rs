//! UDP sockets that fail a test rather than wait for ever, and free ports.

use std::collections::HashSet;
use std::fs;
use std::io::ErrorKind;
use std::mem;
use std::net::{SocketAddr, UdpSocket};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net;
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::TIMEOUT;

/// A port that no socket has and no other test gets, of this process or another. It lies below
/// the ports that the kernel gives out, so that nothing else takes it either.
pub fn port() -> u16 {
    loop {
        let port = fastrand::u16(10_000..32_768);
        // Like ports, abstract names belong to a network namespace.
        let name = net::SocketAddr::from_abstract_name(format!("ppv2-lab-port-{port}")).unwrap();
        let Ok(reserved) = net::UnixDatagram::bind_addr(&name) else {
            continue;
        };
        if !ports_in_use().contains(&port) {
            // Held until the process ends.
            mem::forget(reserved);
            return port;
        }
    }
}

/// The ports of all sockets of this network namespace. To bind to a port would tell too whether it
/// is free, but a process that another test starts meanwhile would have that socket for a moment
/// longer.
fn ports_in_use() -> HashSet<u16> {
    let mut ports = HashSet::new();
    for protocol in ["udp", "udp6", "tcp", "tcp6"] {
        // The format is that of proc_pid_net(5).
        let sockets = fs::read_to_string(format!("/proc/thread-self/net/{protocol}")).unwrap();
        let locals = sockets.lines().skip(1).map(|line| {
            let local = line.split_whitespace().nth(1).unwrap();
            u16::from_str_radix(local.rsplit(':').next().unwrap(), 16).unwrap()
        });
        ports.extend(locals);
    }
    ports
}

/// The most ports in a row that a test gets by [`ports`].
const PORTS_IN_A_ROW: u16 = 200;

/// The first of so many free ports in a row, at most 200, that no other test gets. They lie
/// below those of [`port`].
pub fn ports(count: u16) -> u16 {
    assert!(count <= PORTS_IN_A_ROW);
    // Some tests have fixed ports between.
    let firsts = (1100..5000).chain(6000..9000);
    let firsts: Vec<u16> = firsts.step_by(PORTS_IN_A_ROW.into()).collect();
    let deadline = Instant::now() + TIMEOUT;
    while Instant::now() < deadline {
        let first = firsts[fastrand::usize(..firsts.len())];
        let name = format!("ppv2-lab-ports-{first}");
        let name = net::SocketAddr::from_abstract_name(name).unwrap();
        if let Ok(reserved) = net::UnixDatagram::bind_addr(&name)
            && ports_in_use().is_disjoint(&(first..first + count).collect())
        {
            // Held until the process ends.
            mem::forget(reserved);
            return first;
        }
        sleep(Duration::from_millis(10));
    }
    panic!("other tests have all ports");
}

/// An address of this machine that no other test uses.
pub fn address(ip: &str) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), port())
}

/// A socket that gives up waiting rather than hang.
pub fn socket(ip: &str) -> UdpSocket {
    bind(SocketAddr::new(ip.parse().unwrap(), 0))
}

/// A process that another test starts has all descriptors until it runs its program: an
/// address that was given up may be taken for a moment yet.
pub fn bind(address: SocketAddr) -> UdpSocket {
    let begun = Instant::now();
    let socket = loop {
        match UdpSocket::bind(address) {
            Err(error) if error.kind() == ErrorKind::AddrInUse && begun.elapsed() < TIMEOUT => {
                sleep(Duration::from_millis(10));
            }
            bound => break bound.unwrap(),
        }
    };
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    socket
}

pub fn receive(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut datagram = vec![0; 65_536];
    let (len, from) = socket.recv_from(&mut datagram).unwrap();
    datagram.truncate(len);
    (datagram, from)
}

/// Asserts that nothing arrives within a moment.
pub fn receive_nothing(socket: &UdpSocket) {
    socket
        .set_read_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    let mut datagram = [0; 65_536];
    if let Ok((len, from)) = socket.recv_from(&mut datagram) {
        panic!("{len} bytes from {from}: {:?}", &datagram[..len.min(100)]);
    }
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
}

/// Client, destination and payload of a datagram that must have a header.
pub fn read_header(datagram: &[u8]) -> (SocketAddr, SocketAddr, Vec<u8>) {
    let (header, payload) = ppv2::decode(datagram).unwrap();
    let (client, destination) = (header.client(), header.destination());
    (client.unwrap(), destination.unwrap(), payload.to_vec())
}

/// Sends a question, and sees that the server's answer comes back.
pub fn served(client: &UdpSocket, listener: SocketAddr, server: &UdpSocket) {
    client.send_to(b"question", listener).unwrap();
    let (_, proxy) = receive(server);
    server.send_to(b"answer", proxy).unwrap();
    assert_eq!(receive(client), (b"answer".to_vec(), listener));
}
