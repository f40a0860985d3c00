//! The clients of a case, the relay that stands for a proxy, and those who send what must
//! be dropped.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use ppv2_lab::{eventually, fake_proxy};
use socket2::SockRef;

/// The addresses of the namespace. The relay's are trusted.
const RELAYS: [&str; 2] = ["192.0.2.1", "2001:db8:1::1"];
const SERVERS: [&str; 2] = ["192.0.2.10", "2001:db8:2::10"];
const OTHER_SERVERS: [&str; 2] = ["192.0.2.11", "2001:db8:2::11"];
const STRANGERS: [&str; 2] = ["203.0.113.66", "2001:db8:4::66"];
const CLIENTS: [[&str; 3]; 2] = [
    ["198.51.100.1", "198.51.100.2", "198.51.100.3"],
    ["2001:db8:3::1", "2001:db8:3::2", "2001:db8:3::3"],
];
/// Where the clients sent to, as the relay's headers say.
const LISTENERS: [&str; 2] = ["198.51.100.200:9000", "[2001:db8:5::1]:9000"];

/// The shell commands that give the namespace its addresses.
pub(crate) fn setup() -> String {
    let others = [RELAYS, SERVERS, OTHER_SERVERS, STRANGERS];
    let others = others.iter().flatten();
    let addresses = others.chain(CLIENTS.iter().flatten());
    let addresses = addresses.map(|ip| format!("ip addr add {ip} dev lo\n"));
    // To an address of its own, a host sends from the same address, if it may choose. The
    // server sends from its own, as it would to other hosts.
    let route = |(ip, server): (&str, &str)| {
        format!("ip route replace local {ip} dev lo table local src {server}\n")
    };
    let clients = CLIENTS.iter().zip(SERVERS);
    let routes = clients.flat_map(|(ips, server)| ips.map(|ip| route((ip, server))));
    let routes = routes.chain(RELAYS.into_iter().zip(SERVERS).map(route));
    addresses
        .chain(routes)
        .chain([ALL_REFUSALS.to_owned()])
        .collect()
}

/// Has the kernel tell each sender that nobody listens: else it does so some hundred times
/// a second (icmp(7)).
const ALL_REFUSALS: &str = "echo 0 >/proc/sys/net/ipv4/icmp_ratemask
echo >/proc/sys/net/ipv6/icmp/ratemask
echo 0 >/proc/sys/net/ipv6/icmp/ratelimit
";

/// How long an expected datagram may take, which has been sent already.
const TIMEOUT: Duration = Duration::from_secs(5);

/// How clients' datagrams reach the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Path {
    /// From the clients' own addresses.
    Direct,
    /// Through the relay, with a header, by a socket for each client.
    Relayed { junk: bool },
    /// Through the relay, by one socket for all clients, with reply tags.
    Tagged,
    /// From the clients' own addresses, which the library knows as those of peers.
    Peers,
    /// The same, where the library takes everybody for a client who is not trusted.
    Accepted,
}

impl Path {
    fn has_junk(self) -> bool {
        ![Self::Direct, Self::Relayed { junk: false }].contains(&self)
    }

    /// Whether clients send from their own addresses.
    fn is_direct(self) -> bool {
        [Self::Direct, Self::Peers, Self::Accepted].contains(&self)
    }

    /// The library's settings; `None` without it.
    pub(crate) fn settings(self) -> Option<[(&'static str, String); 3]> {
        let networks = match self {
            Self::Direct => return None,
            Self::Peers => CLIENTS
                .iter()
                .flatten()
                .copied()
                .collect::<Vec<_>>()
                .join(","),
            Self::Relayed { .. } | Self::Tagged | Self::Accepted => String::new(),
        };
        let way = if self == Self::Accepted {
            "accept"
        } else {
            "drop"
        };
        Some([
            ("PPV2_TRUSTED", RELAYS.join(",")),
            ("PPV2_PEERS", networks),
            ("PPV2_UNTRUSTED", way.to_owned()),
        ])
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
    /// An IPv6 socket whose clients have IPv4 addresses.
    Mapped,
}

impl Family {
    pub(crate) fn parse(text: &str) -> Self {
        match text {
            "v4" => Self::V4,
            "v6" => Self::V6,
            "mapped" => Self::Mapped,
            _ => panic!("no family {text}"),
        }
    }

    /// The column of the addresses above.
    fn column(self) -> usize {
        usize::from(self == Self::V6)
    }
}

/// A client's socket is closed if there is none.
struct Client {
    address: SocketAddr,
    /// That of `session`, if there is one.
    session_address: Option<SocketAddr>,
    direct: Option<UdpSocket>,
    /// The relay's socket that stands for the client, unless one stands for all.
    session: Option<UdpSocket>,
    /// Where its latest datagram came from.
    latest: Option<SocketAddr>,
    /// What came for it through the socket that stands for all.
    waiting: VecDeque<(Vec<u8>, SocketAddr)>,
}

pub(crate) struct Network {
    path: Path,
    clients: Vec<Client>,
    servers: Vec<(String, SocketAddr)>,
    hosts: Vec<(&'static str, IpAddr)>,
    listener: SocketAddr,
    junk: Arc<Junk>,
    streams: Vec<(Arc<AtomicBool>, JoinHandle<()>)>,
    /// With reply tags.
    shared: UdpSocket,
}

impl Network {
    /// The addresses of a case: its ports are its own.
    pub(crate) fn new(path: Path, family: Family, index: u16) -> Self {
        let column = family.column();
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let bind = |address: SocketAddr| {
            UdpSocket::bind(address).unwrap_or_else(|error| panic!("{address}: {error}"))
        };
        let relay_socket = || {
            let socket = bind(SocketAddr::new(ip(RELAYS[column]), 0));
            socket.set_read_timeout(Some(TIMEOUT)).unwrap();
            socket
        };
        let clients: Vec<_> = (0..)
            .zip(CLIENTS[column])
            .map(|(n, client)| {
                let address = SocketAddr::new(ip(client), 10_000 + 4 * index + n);
                // A port that nobody gets while the client is closed.
                let session = SocketAddr::new(ip(RELAYS[column]), address.port());
                let session = matches!(path, Path::Relayed { .. }).then_some(session);
                Client {
                    address,
                    session_address: session,
                    direct: Some(open(address)),
                    session: session.map(open),
                    latest: None,
                    waiting: VecDeque::new(),
                }
            })
            .collect();
        let mut servers: Vec<_> = (0..4)
            .map(|n| {
                let port = 2_000 + 4 * index + n;
                (
                    format!("s{}", n + 1),
                    SocketAddr::new(ip(SERVERS[column]), port),
                )
            })
            .collect();
        servers.push((
            "s1b".to_owned(),
            SocketAddr::new(ip(OTHER_SERVERS[column]), servers[0].1.port()),
        ));
        let junk = Junk {
            trusted: relay_socket(),
            stranger: (path != Path::Accepted)
                .then(|| bind(SocketAddr::new(ip(STRANGERS[column]), 0))),
            hostile: hostile(clients[0].address),
            forged: fake_proxy::from_client_at(
                clients[0].address,
                LISTENERS[column].parse().unwrap(),
                b"forged",
            ),
        };
        Self {
            path,
            clients,
            servers,
            hosts: vec![
                ("relay", ip(RELAYS[column])),
                ("server", ip(SERVERS[column])),
                ("other server", ip(OTHER_SERVERS[column])),
                ("client 1", ip(CLIENTS[column][0])),
                ("client 2", ip(CLIENTS[column][1])),
                ("client 3", ip(CLIENTS[column][2])),
            ],
            listener: LISTENERS[column].parse().unwrap(),
            junk: Arc::new(junk),
            streams: Vec::new(),
            shared: relay_socket(),
        }
    }

    /// What the program is told of the addresses.
    pub(crate) fn names(&self) -> Vec<String> {
        let servers = self.servers.iter().map(|(name, at)| format!("{name}={at}"));
        let clients = self.clients.iter().enumerate();
        let clients = clients.map(|(n, client)| format!("c{}={}", n + 1, client.address));
        let hosts = self.hosts.iter().map(|(name, ip)| format!("@{name}={ip}"));
        clients.chain(servers).chain(hosts).collect()
    }

    fn name_of(&self, address: SocketAddr) -> String {
        let known = self.servers.iter().find(|(_, at)| *at == address);
        known.map_or_else(|| address.to_string(), |(name, _)| name.clone())
    }

    fn server(&self, name: &str) -> SocketAddr {
        let found = self.servers.iter().find(|(known, _)| known == name);
        found.unwrap_or_else(|| panic!("no server {name}")).1
    }

    /// Does what the program asks for, and answers.
    pub(crate) fn answer(&mut self, request: &str) -> String {
        for (stop, thread) in self.streams.drain(..) {
            stop.store(true, Ordering::Relaxed);
            thread.join().unwrap();
        }
        let words: Vec<&str> = request.splitn(5, ' ').collect();
        let word = |n: usize| words.get(n).copied().unwrap_or_default();
        match word(0) {
            "send" => {
                let tos = word(3).parse().unwrap();
                self.send(
                    client(word(1)),
                    self.server(word(2)),
                    tos,
                    word(4).as_bytes(),
                );
            }
            "bytes" => {
                let payload: Vec<u8> = (0..word(3).parse::<u32>().unwrap())
                    .map(|n| (n * 31 + n / 251).to_le_bytes()[0])
                    .collect();
                self.send(client(word(1)), self.server(word(2)), 0, &payload);
            }
            "junk" => {
                for n in 0..word(2).parse().unwrap() {
                    self.junk(n, self.server(word(1)), None);
                }
            }
            "stream" => self.start_stream(self.server(word(1)), Duration::from_micros(300)),
            "flood" => (0..2).for_each(|_| self.start_stream(self.server(word(1)), Duration::ZERO)),
            "expect" => return self.expect(client(word(1)), true),
            "anywhere" => return self.expect(client(word(1)), false),
            "directly" => return self.expect_directly(client(word(1))),
            "now" => return self.now(client(word(1))),
            "rest" => return self.rest(),
            "reply" => {
                let to = self.clients[client(word(1))].latest.expect("a datagram");
                let text = words[2..].join(" ");
                self.send(client(word(1)), to, 0, text.as_bytes());
            }
            "close" => {
                let client = &mut self.clients[client(word(1))];
                let sockets = [client.direct.take(), client.session.take()];
                sockets.into_iter().flatten().for_each(close);
            }
            "open" => {
                let client = &mut self.clients[client(word(1))];
                client.direct = Some(open(client.address));
                client.session = client.session_address.map(open);
            }
            _ => panic!("no request {request}"),
        }
        "done".to_owned()
    }

    /// A datagram of a client, with what must be dropped before it and behind it. On
    /// loopback it is in the receiver's queue when this returns.
    pub(crate) fn send(&self, client: usize, to: SocketAddr, tos: u32, payload: &[u8]) {
        let from = &self.clients[client];
        let mut buffer = [0; ppv2::MAX_TAGGED_HEADER_LEN];
        let (socket, header) = match self.path {
            Path::Direct | Path::Peers | Path::Accepted => (from.direct.as_ref(), &[][..]),
            Path::Relayed { .. } => (
                from.session.as_ref(),
                ppv2::encode_udp(from.address, self.listener, &mut buffer).unwrap(),
            ),
            Path::Tagged => (
                Some(&self.shared),
                ppv2::encode_udp_tagged(from.address, self.listener, tag(client), &mut buffer)
                    .unwrap(),
            ),
        };
        let socket = socket.expect("a client that is open");
        // What a client sends itself is good.
        let session = Some(socket).filter(|_| !self.path.is_direct());
        self.junk(payload.len(), to, session);
        let options = SockRef::from(socket);
        let set_tos = |tos| match to {
            SocketAddr::V4(_) => options.set_tos_v4(tos).unwrap(),
            SocketAddr::V6(_) => options.set_tclass_v6(tos).unwrap(),
        };
        if tos != 0 {
            set_tos(tos);
        }
        let datagram = [header, payload].concat();
        // Nobody may listen there, of which an earlier datagram has told.
        while let Err(error) = socket.send_to(&datagram, to) {
            assert!(was_refused(&error), "{to}: {error}");
        }
        if tos != 0 {
            set_tos(0);
        }
        self.junk(payload.len() + 1, to, session);
    }

    fn junk(&self, n: usize, to: SocketAddr, session: Option<&UdpSocket>) {
        if self.path.has_junk() {
            self.junk.send(n, to, session);
            if let Some(direct) = self.clients[n % 3]
                .direct
                .as_ref()
                .filter(|_| n.is_multiple_of(5) && !self.path.is_direct())
            {
                // The client itself is a stranger, too.
                let _ = direct.send_to(b"past the proxy", to);
            }
        }
    }

    /// Sends until the next request, with so long a pause after each datagram.
    fn start_stream(&mut self, to: SocketAddr, pause: Duration) {
        if !self.path.has_junk() {
            return;
        }
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let (stop, junk) = (Arc::clone(&stop), Arc::clone(&self.junk));
            move || {
                for n in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    junk.send(n, to, None);
                    if !pause.is_zero() {
                        std::thread::sleep(pause);
                    }
                }
            }
        });
        self.streams.push((stop, thread));
    }

    /// The next datagram at a client.
    fn expect(&mut self, index: usize, with_sender: bool) -> String {
        match self.receive(index) {
            Some((payload, from)) if with_sender => {
                format!("{} from {}", describe(&payload), self.name_of(from))
            }
            Some((payload, _)) => describe(&payload),
            None => "nothing".to_owned(),
        }
    }

    /// The next datagram that reached a client past the relay.
    fn expect_directly(&self, index: usize) -> String {
        let direct = self.clients[index].direct.as_ref();
        let received = direct.and_then(|socket| receive(socket).ok());
        received.map_or_else(|| "nothing".to_owned(), |(payload, _)| describe(&payload))
    }

    /// What has arrived at a client.
    fn now(&mut self, index: usize) -> String {
        let set_nonblocking = |this: &Self, nonblocking| {
            let client = &this.clients[index];
            for socket in client.direct.iter().chain(&client.session) {
                socket.set_nonblocking(nonblocking).unwrap();
            }
            this.shared.set_nonblocking(nonblocking).unwrap();
        };
        set_nonblocking(self, true);
        let found = self.expect(index, true);
        set_nonblocking(self, false);
        found
    }

    /// What has arrived at all clients, empty if nothing has.
    fn rest(&mut self) -> String {
        let all = (0..self.clients.len()).map(|index| (index + 1, self.now(index)));
        all.filter(|(_, found)| found != "nothing")
            .map(|(number, found)| format!("c{number} has {found}"))
            .collect::<Vec<_>>()
            .join(", ")
    }

    fn receive(&mut self, index: usize) -> Option<(Vec<u8>, SocketAddr)> {
        let received = match self.path {
            Path::Direct | Path::Peers | Path::Accepted => {
                receive(self.clients[index].direct.as_ref()?).ok()
            }
            Path::Relayed { .. } => receive(self.clients[index].session.as_ref()?).ok(),
            Path::Tagged => self.receive_tagged(index),
        };
        if let Some((_, from)) = &received {
            self.clients[index].latest = Some(*from);
        }
        received
    }

    fn receive_tagged(&mut self, index: usize) -> Option<(Vec<u8>, SocketAddr)> {
        while self.clients[index].waiting.is_empty() {
            let (datagram, from) = receive(&self.shared).ok()?;
            let Ok(reply) = ppv2::decode_tagged(&datagram) else {
                return Some(([b"WITHOUT A TAG: ", &datagram[..]].concat(), from));
            };
            let client = self
                .clients
                .iter()
                .position(|client| client.address == reply.client);
            let client = client.expect("a reply to a client that there is");
            assert_eq!((reply.destination, reply.tag), (self.listener, tag(client)));
            let payload = reply.payload.to_vec();
            self.clients[client].waiting.push_back((payload, from));
        }
        self.clients[index].waiting.pop_front()
    }

    /// What has reached clients past the relay.
    pub(crate) fn leaks(&self) -> Vec<String> {
        if self.path.is_direct() {
            return Vec::new();
        }
        let clients = self
            .clients
            .iter()
            .filter_map(|client| client.direct.as_ref());
        clients
            .filter_map(|socket| {
                socket.set_nonblocking(true).unwrap();
                receive(socket).ok()
            })
            .map(|(payload, _)| format!("past the relay: {}", describe(&payload)))
            .collect()
    }
}

/// The position of a client by its name.
fn client(name: &str) -> usize {
    let number: usize = name.strip_prefix('c').unwrap().parse().unwrap();
    number - 1
}

fn tag(client: usize) -> ppv2::ReplyTag {
    ppv2::ReplyTag::new(1, [u8::try_from(client).unwrap(); 8])
}

fn was_refused(error: &std::io::Error) -> bool {
    error.kind() == ErrorKind::ConnectionRefused
}

fn receive(socket: &UdpSocket) -> std::io::Result<(Vec<u8>, SocketAddr)> {
    let mut buffer = vec![0; 65_536];
    loop {
        match socket.recv_from(&mut buffer) {
            Ok((len, from)) => {
                buffer.truncate(len);
                return Ok((buffer, from));
            }
            Err(error) if was_refused(&error) => {}
            Err(error) => return Err(error),
        }
    }
}

fn open(address: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind(address).unwrap_or_else(|error| panic!("{address}: {error}"));
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    socket
}

/// Closes a socket, and waits until datagrams to it are refused: a program that is just
/// being started has a copy of it for a moment.
fn close(socket: UdpSocket) {
    let address = socket.local_addr().unwrap();
    drop(socket);
    let probe = UdpSocket::bind(SocketAddr::new(address.ip(), 0)).unwrap();
    probe.set_nonblocking(true).unwrap();
    probe.connect(address).unwrap();
    eventually("datagrams to be refused", || {
        probe.send(b"probe").is_err()
            || probe.recv(&mut [0]).is_err_and(|error| was_refused(&error))
    });
}

/// As the program prints payloads.
fn describe(bytes: &[u8]) -> String {
    if bytes.len() <= 40 && bytes.iter().all(|byte| (0x20..0x7f).contains(byte)) {
        return format!("'{}'", String::from_utf8_lossy(bytes));
    }
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{} bytes {hash:016x}", bytes.len())
}

/// Those who send what must be dropped.
struct Junk {
    trusted: UdpSocket,
    /// Nobody is a stranger where everybody is a client.
    stranger: Option<UdpSocket>,
    /// What a trusted address must not send.
    hostile: Vec<Vec<u8>>,
    /// What would be right if it came from a trusted address.
    forged: Vec<u8>,
}

impl Junk {
    fn send(&self, n: usize, to: SocketAddr, session: Option<&UdpSocket>) {
        // Nobody may listen at the address, which a later call would be told.
        let send = |socket: &UdpSocket, datagram: &[u8]| {
            let _ = socket.send_to(datagram, to);
        };
        let hostile = &self.hostile[n % self.hostile.len()];
        match (n % 4, &self.stranger) {
            (0, Some(stranger)) => send(stranger, b"bare, of a stranger"),
            (1, _) => send(session.unwrap_or(&self.trusted), hostile),
            (2, Some(stranger)) => send(stranger, &self.forged),
            _ => send(&self.trusted, hostile),
        }
    }
}

fn hostile(client: SocketAddr) -> Vec<Vec<u8>> {
    let mut buffer = [0; 128];
    let encoder = ppv2::Encoder::udp(&mut buffer, client, client).unwrap();
    let mut checksum = encoder.crc32c().unwrap().finish().to_vec();
    *checksum.last_mut().unwrap() ^= 1;
    let mut overrun = checksum.clone();
    let tlv_len = overrun.len() - 5;
    overrun[tlv_len] = 9;
    let v1 = b"PROXY UDP4 198.51.100.1 192.0.2.10 4000 53\r\nx".to_vec();
    [fake_proxy::hostile(), vec![checksum, overrun, v1]].concat()
}
