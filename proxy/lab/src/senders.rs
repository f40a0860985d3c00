//! Programs in front of the proxy that write headers: what each of them sends, as its source
//! or its documentation has it.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::fake_proxy::from_client_at;
use crate::{receive, socket};

/// How a program says which client a datagram is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Says {
    /// By PROXY v2 in front of each datagram, as the specification asks: caddy-l4, dnsdist,
    /// frp 0.63 to 0.66.
    Every,
    /// By PROXY v2 in front of the first datagram of a session, whose others come bare from the
    /// same port: nginx since 1.31.4 with `proxy_protocol v2`, frp since 0.67.
    First,
    /// By PROXY v2 in a datagram of its own; all payload comes bare from the same port:
    /// Cloudflare Spectrum.
    Alone,
    /// By Simple Proxy Protocol in front of each datagram; replies must carry it back:
    /// Cloudflare Spectrum, Tencent EdgeOne.
    Spp,
    /// By the text of PROXY v1 in front of the first datagram: nginx up to 1.31.3 with
    /// `proxy_protocol on`.
    Text,
}

/// The header of Simple Proxy Protocol: magic number, client and proxy as IPv6 addresses, and
/// their ports, all big-endian. Written here by Cloudflare's description, not by the codec.
pub fn spp(client: SocketAddr, proxy: SocketAddr) -> [u8; 38] {
    let ip = |address: SocketAddr| -> [u8; 16] {
        let ip: Ipv6Addr = match address.ip() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped(),
            IpAddr::V6(ip) => ip,
        };
        ip.octets()
    };
    let mut header = [0; 38];
    header[..2].copy_from_slice(&[0x56, 0xec]);
    header[2..18].copy_from_slice(&ip(client));
    header[18..34].copy_from_slice(&ip(proxy));
    header[34..36].copy_from_slice(&client.port().to_be_bytes());
    header[36..].copy_from_slice(&proxy.port().to_be_bytes());
    header
}

/// What a program sends from one port of its own, for one client at a time.
pub struct Session {
    pub socket: UdpSocket,
    pub says: Says,
    pub client: SocketAddr,
    /// Where the client wrote to.
    pub destination: SocketAddr,
    has_said: bool,
}

impl Session {
    /// From any port of an address.
    pub fn new(ip: &str, says: Says, client: SocketAddr, destination: SocketAddr) -> Self {
        Self::by(socket(ip), says, client, destination)
    }

    pub fn by(socket: UdpSocket, says: Says, client: SocketAddr, destination: SocketAddr) -> Self {
        Self {
            socket,
            says,
            client,
            destination,
            has_said: false,
        }
    }

    pub fn address(&self) -> SocketAddr {
        self.socket.local_addr().unwrap()
    }

    /// Gives the port to another client, as programs do when sessions end.
    pub fn becomes(&mut self, client: SocketAddr) {
        self.client = client;
        self.has_said = false;
    }

    /// The datagrams that the program sends when the client sends `payload`.
    pub fn datagrams(&mut self, payload: &[u8]) -> Vec<Vec<u8>> {
        let is_first = !std::mem::replace(&mut self.has_said, true);
        let header = from_client_at(self.client, self.destination, b"");
        match (self.says, is_first) {
            (Says::Every, _) | (Says::First, true) => vec![[&header, payload].concat()],
            (Says::Alone, true) => vec![header, payload.to_vec()],
            (Says::Spp, _) => {
                let header = spp(self.client, self.destination);
                vec![[&header, payload].concat()]
            }
            (Says::Text, true) => {
                let (client, to) = (self.client, self.destination);
                let family = if client.is_ipv4() { "TCP4" } else { "TCP6" };
                let text = format!(
                    "PROXY {family} {} {} {} {}\r\n",
                    client.ip(),
                    to.ip(),
                    client.port(),
                    to.port()
                );
                vec![[text.as_bytes(), payload].concat()]
            }
            (Says::First | Says::Alone | Says::Text, false) => vec![payload.to_vec()],
        }
    }

    pub fn send(&mut self, to: SocketAddr, payload: &[u8]) {
        for datagram in self.datagrams(payload) {
            self.socket.send_to(&datagram, to).unwrap();
        }
    }

    /// Sends these bytes as they are.
    pub fn send_bare(&self, to: SocketAddr, datagram: &[u8]) {
        self.socket.send_to(datagram, to).unwrap();
    }

    /// What the client would get of a reply.
    #[track_caller]
    pub fn payload<'r>(&self, reply: &'r [u8]) -> &'r [u8] {
        if self.says != Says::Spp {
            return reply;
        }
        let header = spp(self.client, self.destination);
        let payload = reply.strip_prefix(&header);
        payload.unwrap_or_else(|| panic!("a reply to {} without its header", self.client))
    }

    /// The next reply as the client would get it, and where it came from.
    #[track_caller]
    pub fn receive(&self) -> (Vec<u8>, SocketAddr) {
        let (reply, from) = receive(&self.socket);
        (self.payload(&reply).to_vec(), from)
    }
}

/// A program in front that clients write to. It has a port for each client towards the proxy,
/// and passes replies on.
pub struct Front {
    /// Where clients write to.
    pub address: SocketAddr,
    passed: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Front {
    /// At `listen`, sending from `source` to `to`.
    pub fn start(says: Says, listen: SocketAddr, source: &str, to: SocketAddr) -> Self {
        let (socket, source) = (crate::bind(listen), source.to_owned());
        let stop = Arc::<AtomicBool>::default();
        let passed = Arc::<AtomicUsize>::default();
        let thread = thread::spawn({
            let (stop, passed) = (Arc::clone(&stop), Arc::clone(&passed));
            move || pass_on(says, &socket, &source, to, &stop, &passed)
        });
        Self {
            address: listen,
            passed,
            stop,
            thread: Some(thread),
        }
    }

    /// How many replies it has passed to clients.
    pub fn passed(&self) -> usize {
        self.passed.load(Ordering::Relaxed)
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().unwrap().join();
        assert!(
            ended.is_ok() || thread::panicking(),
            "the program in front failed"
        );
    }
}

/// How often a program in front looks whether it is to stop.
const LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 20_000_000,
};

fn pass_on(
    says: Says,
    listener: &UdpSocket,
    source: &str,
    to: SocketAddr,
    stop: &AtomicBool,
    passed: &AtomicUsize,
) {
    let destination = listener.local_addr().unwrap();
    let mut sessions: Vec<Session> = Vec::new();
    let mut of_client = HashMap::new();
    let mut datagram = vec![0; 65_536];
    listener.set_nonblocking(true).unwrap();
    while !stop.load(Ordering::Relaxed) {
        let mut sockets: Vec<_> = [listener]
            .into_iter()
            .chain(sessions.iter().map(|session| &session.socket))
            .map(|socket| PollFd::new(socket, PollFlags::IN))
            .collect();
        poll(&mut sockets, Some(&LOOK)).unwrap();
        while let Some((len, client)) = received(listener, &mut datagram) {
            let number = *of_client.entry(client).or_insert_with(|| {
                let session = Session::new(source, says, client, destination);
                session.socket.set_nonblocking(true).unwrap();
                sessions.push(session);
                sessions.len() - 1
            });
            sessions[number].send(to, &datagram[..len]);
        }
        for session in &sessions {
            while let Some((len, from)) = received(&session.socket, &mut datagram) {
                assert_eq!(from, to, "a reply from elsewhere");
                let payload = session.payload(&datagram[..len]);
                listener.send_to(payload, session.client).unwrap();
                passed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

fn received(socket: &UdpSocket, datagram: &mut [u8]) -> Option<(usize, SocketAddr)> {
    loop {
        match socket.recv_from(datagram) {
            Ok(received) => return Some(received),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
            // What was sent before came to no socket.
            Err(_) => thread::sleep(Duration::from_millis(1)),
        }
    }
}
