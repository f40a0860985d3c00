//! Clients and servers of the lab. A server answers with the source that it saw,
//! a space, and the datagram; a client checks that this is its own.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr, SocketAddrV4, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use ppv2_sdk::{ReplyFrom, Trust};
use socket2::{Domain, Protocol, Type};

use super::{Family, Lab};
use crate::{TIMEOUT, bind, receive, receive_nothing};

/// Exchanges of each client in [`exchange`].
pub(super) const EXCHANGES: usize = 200;

/// How a server answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answering {
    /// From the socket that it was asked at, to the source.
    Back,
    /// The same without a UDP checksum, over IPv4.
    Unchecked,
    /// By our SDK: to the client that the header names, from the destination that
    /// it names.
    ByHeader,
    /// By the header, too, but from the socket that it was asked at, to the
    /// source, however many answers: what a server must not do.
    ToProxy(usize),
}

/// A server that ends with the value.
pub struct Echo {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Vec<SocketAddr>>>,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    /// One on the server's host at the family's address.
    pub fn new(lab: &Lab, family: Family, answering: Answering) -> Self {
        Self::at(lab, family.server(), answering)
    }

    pub fn at(lab: &Lab, address: SocketAddr, answering: Answering) -> Self {
        let socket = lab.at("server", || bind(address));
        let answers = lab.at("server", || match answering {
            Answering::Back | Answering::ToProxy(_) | Answering::ByHeader => None,
            Answering::Unchecked => Some(raw_udp(address.ip())),
        });
        socket
            .set_read_timeout(Some(Duration::from_millis(20)))
            .unwrap();
        let (stop, seen) = (
            Arc::<AtomicBool>::default(),
            Arc::<Mutex<Vec<_>>>::default(),
        );
        if answering == Answering::ByHeader {
            let trust = Trust::networks(["10.0.0.1", "fd00:a::1"]);
            let trust = trust.reply_from(ReplyFrom::Listener).build().unwrap();
            let socket = ppv2_sdk::UdpSocket::from_std(socket, trust).unwrap();
            let (stopped, seen_by) = (Arc::clone(&stop), Arc::clone(&seen));
            // What it binds later must be on the server's host, too.
            let serve = move || serve_by_sdk(&socket, &stopped, &seen_by);
            let thread = lab.at("server", || thread::spawn(serve));
            return Self {
                stop,
                seen,
                thread: Some(thread),
            };
        }
        let thread = thread::spawn({
            let (stop, seen) = (Arc::clone(&stop), Arc::clone(&seen));
            move || {
                let mut datagram = vec![0; 65_536];
                while !stop.load(Ordering::Relaxed) {
                    let Ok((len, source)) = socket.recv_from(&mut datagram) else {
                        continue;
                    };
                    let answer = [source.to_string().as_bytes(), b" ", &datagram[..len]].concat();
                    seen.lock().unwrap().push(source);
                    match answering {
                        Answering::Back => _ = socket.send_to(&answer, source).unwrap(),
                        Answering::ToProxy(count) => {
                            for _ in 0..count {
                                // A full buffer is none of this test's matter.
                                _ = socket.send_to(&answer, source);
                            }
                        }
                        Answering::Unchecked => {
                            let answers = answers.as_ref().unwrap();
                            let datagram = unchecked(address.port(), source.port(), &answer);
                            answers.send_to(&datagram, &without_port(source)).unwrap();
                        }
                        Answering::ByHeader => unreachable!("served by the SDK"),
                    }
                }
            }
        });
        Self {
            stop,
            seen,
            thread: Some(thread),
        }
    }

    /// Sources of the datagrams that came.
    pub fn seen(&self) -> Vec<SocketAddr> {
        self.seen.lock().unwrap().clone()
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().unwrap().join();
        assert!(ended.is_ok() || thread::panicking(), "the server failed");
    }
}

/// Answers each client from the listener that it wrote to.
fn serve_by_sdk(socket: &ppv2_sdk::UdpSocket, stop: &AtomicBool, seen: &Mutex<Vec<SocketAddr>>) {
    while !stop.load(Ordering::Relaxed) {
        let Ok(datagram) = socket.recv_datagram() else {
            continue;
        };
        let client = datagram.client.to_string();
        let answer = [client.as_bytes(), b" ", &datagram.payload].concat();
        seen.lock().unwrap().push(datagram.proxy.unwrap());
        socket.reply(&datagram, &answer).unwrap();
    }
}

/// A socket that takes UDP headers from its user, for what the kernel would not
/// write.
pub fn raw_udp(from: IpAddr) -> socket2::Socket {
    let domain = Domain::for_address(SocketAddr::new(from, 0));
    let socket = socket2::Socket::new(domain, Type::RAW, Some(Protocol::UDP)).unwrap();
    if from.is_ipv6() {
        socket.set_freebind_v6(true).unwrap();
    } else {
        socket.set_ip_transparent_v4(true).unwrap();
    }
    socket.bind(&SocketAddr::new(from, 0).into()).unwrap();
    socket
}

/// A socket that takes ICMP messages from its user; over IPv6 the kernel fills in
/// their checksum.
pub fn raw_icmp(family: Family) -> socket2::Socket {
    let (domain, protocol) = match family {
        Family::V4 => (Domain::IPV4, Protocol::ICMPV4),
        Family::V6 => (Domain::IPV6, Protocol::ICMPV6),
    };
    socket2::Socket::new(domain, Type::RAW, Some(protocol)).unwrap()
}

/// The UDP header with checksum 0, which over IPv4 means none, and the payload
/// (RFC 768).
pub fn unchecked(from: u16, to: u16, payload: &[u8]) -> Vec<u8> {
    let len = u16::try_from(8 + payload.len()).unwrap();
    let mut datagram = Vec::new();
    for field in [from, to, len, 0] {
        datagram.extend(field.to_be_bytes());
    }
    datagram.extend(payload);
    datagram
}

fn without_port(address: SocketAddr) -> socket2::SockAddr {
    SocketAddr::new(address.ip(), 0).into()
}

/// A client, who waits for its answers alone.
pub struct Client {
    pub socket: UdpSocket,
    pub address: SocketAddr,
    /// The address that it writes to.
    pub listener: SocketAddr,
}

impl Client {
    /// Client 1 or 2, at this port or any.
    pub fn new(lab: &Lab, family: Family, number: usize, port: u16) -> Self {
        let host = format!("client{number}");
        let address = SocketAddr::new(family.client(number), port);
        let socket = lab.at(&host, || bind(address));
        Self {
            address: socket.local_addr().unwrap(),
            socket,
            listener: family.listener(),
        }
    }

    pub fn send(&self, payload: &[u8]) {
        self.socket.send_to(payload, self.listener).unwrap();
    }

    /// Asserts that the next datagram is the answer to `payload`, from the
    /// listener; returns the source that the server saw.
    #[track_caller]
    pub fn answered(&self, payload: &[u8]) -> SocketAddr {
        let (datagram, from) = receive(&self.socket);
        self.check(&datagram, from, payload)
    }

    #[track_caller]
    fn check(&self, datagram: &[u8], from: SocketAddr, payload: &[u8]) -> SocketAddr {
        assert_eq!(from, self.listener, "an answer to {}", self.address);
        let space = datagram.iter().position(|&byte| byte == b' ').unwrap();
        let (seen, rest) = (&datagram[..space], &datagram[space + 1..]);
        let shown =
            |bytes: &[u8]| String::from_utf8_lossy(&bytes[..bytes.len().min(60)]).into_owned();
        assert!(
            rest == payload,
            "{} got {} bytes, {}, for {} bytes, {}",
            self.address,
            rest.len(),
            shown(rest),
            payload.len(),
            shown(payload)
        );
        std::str::from_utf8(seen).unwrap().parse().unwrap()
    }

    /// Asks and is answered.
    #[track_caller]
    pub fn ask(&self, payload: &[u8]) -> SocketAddr {
        self.send(payload);
        self.answered(payload)
    }

    /// Asks; `None` if there is no answer within a moment.
    #[track_caller]
    pub fn try_ask(&self, payload: &[u8]) -> Option<SocketAddr> {
        self.send(payload);
        let moment = Some(Duration::from_millis(300));
        self.socket.set_read_timeout(moment).unwrap();
        let mut datagram = vec![0; 65_536];
        let received = self.socket.recv_from(&mut datagram);
        self.socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        let (len, from) = received.ok()?;
        Some(self.check(&datagram[..len], from, payload))
    }

    /// Reads past answers that come within a moment.
    pub fn pass_over_answers(&self) {
        let moment = Some(Duration::from_millis(300));
        self.socket.set_read_timeout(moment).unwrap();
        let mut datagram = vec![0; 65_536];
        while self.socket.recv(&mut datagram).is_ok() {}
        self.socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    }

    /// Asks, and gets nothing at all, not even an empty datagram.
    #[track_caller]
    pub fn unanswered(&self, payload: &[u8]) {
        self.send(payload);
        receive_nothing(&self.socket);
    }
}

/// Has both clients ask `EXCHANGES` times at once, each question but once; no
/// answer is lost or another's. Servers must have seen the client's address, and
/// its port if `port` says so, in one session alone.
pub fn exchange(clients: &[Client], port: bool) {
    let ask = |client: &Client| {
        let mut ports = HashSet::new();
        for number in 0..EXCHANGES {
            let question = format!("{} asks {number}", client.address);
            let seen = client.ask(question.as_bytes());
            assert_eq!(seen.ip(), client.address.ip());
            ports.insert(seen.port());
        }
        assert_eq!(ports.len(), 1, "{}: {ports:?}", client.address);
        if port {
            assert!(ports.contains(&client.address.port()), "{ports:?}");
        }
    };
    thread::scope(|scope| {
        let threads: Vec<_> = clients
            .iter()
            .map(|client| scope.spawn(move || ask(client)))
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
    });
    for client in clients {
        let mut datagram = [0; 2048];
        client.socket.set_nonblocking(true).unwrap();
        assert!(
            client.socket.recv(&mut datagram).is_err(),
            "an answer too many"
        );
        client.socket.set_nonblocking(false).unwrap();
    }
}

/// A raw IPv4 datagram, header included, from any source (RFC 791).
pub fn forged_v4(from: SocketAddrV4, to: SocketAddrV4, payload: &[u8]) -> Vec<u8> {
    let udp = unchecked(from.port(), to.port(), payload);
    let len = u16::try_from(20 + udp.len()).unwrap();
    let mut datagram = vec![0x45, 0];
    datagram.extend(len.to_be_bytes());
    // Identification and checksum are the kernel's to fill in (raw(7)).
    datagram.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    datagram.extend(from.ip().octets());
    datagram.extend(to.ip().octets());
    datagram.extend(udp);
    datagram
}
