//! Clients that number what they send, and servers that answer with what they got: together
//! they show whether sessions go on. They find what is lost, what comes by another server or
//! from another port of the proxy than before, and what is wrong in any other way.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use socket2::SockRef;

use crate::eventually;
use crate::fake_proxy::from_client_at;

/// How long the last answers may take once nothing comes any more.
const QUIET: Duration = Duration::from_secs(3);

/// A load generator that lags this much behind its rate gives up what it has missed, rather
/// than send it all at once.
const MOST_BEHIND: Duration = Duration::from_millis(50);

/// Examples of what was wrong that are kept.
const EXAMPLES: usize = 5;

/// Bytes of the buffers of servers, as far as the kernel grants them.
const SERVER_BUFFER: usize = 4 << 20;

/// A server that answers each datagram with its own address, the address that it came from,
/// the client that its header names and its payload.
pub struct Server {
    pub address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// With `tagged`, replies carry the tag of the header.
    pub fn start(address: SocketAddr, tagged: bool) -> Self {
        let socket = crate::bind(address);
        let _ = SockRef::from(&socket).set_recv_buffer_size(SERVER_BUFFER);
        let address = socket.local_addr().unwrap();
        let stop = Arc::<AtomicBool>::default();
        let told = Arc::clone(&stop);
        socket
            .set_read_timeout(Some(Duration::from_millis(20)))
            .unwrap();
        let thread = thread::spawn(move || answer(&socket, address, tagged, &told));
        Self {
            address,
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(
            matches!(ended, Some(Ok(()))) || thread::panicking(),
            "a server failed"
        );
    }
}

fn answer(socket: &UdpSocket, address: SocketAddr, tagged: bool, stop: &AtomicBool) {
    // Who the sessions belong to whose datagrams come without a header.
    let mut clients = HashMap::new();
    let mut datagram = [0; 2000];
    while !stop.load(Ordering::Relaxed) {
        let Ok((len, from)) = socket.recv_from(&mut datagram) else {
            continue;
        };
        let datagram = &datagram[..len];
        let mut head = Vec::new();
        let payload = match ppv2::decode(datagram) {
            Ok((header, payload)) => {
                if let Some(client) = header.client() {
                    clients.insert(from, client);
                }
                if tagged {
                    let (client, to) = (header.client().unwrap(), header.destination().unwrap());
                    let tag = header.tlvs().reply_tag().unwrap();
                    let mut buffer = [0; ppv2::MAX_TAGGED_HEADER_LEN];
                    let header = ppv2::encode_udp_tagged(client, to, tag, &mut buffer);
                    head.extend_from_slice(header.unwrap());
                }
                payload
            }
            Err(_) => datagram,
        };
        let client = clients.get(&from).map(ToString::to_string);
        let client = client.as_deref().unwrap_or("-");
        head.extend_from_slice(format!("{address} {from} {client} ").as_bytes());
        head.extend_from_slice(payload);
        // The proxy may be gone for a moment.
        let _ = socket.send_to(&head, from);
    }
}

/// Clients of one listener, each with a socket of its own.
#[derive(Clone, Debug)]
pub struct Clients {
    pub to: SocketAddr,
    pub count: usize,
    /// They are a proxy in front, which names another client in front of the first datagram
    /// of each of its ports.
    pub in_front: bool,
    /// A client's datagrams all come to its server from one port.
    pub one_session: bool,
}

impl Clients {
    pub fn new(to: SocketAddr, count: usize) -> Self {
        Self {
            to,
            count,
            in_front: false,
            one_session: true,
        }
    }
}

struct Client {
    socket: UdpSocket,
    to: SocketAddr,
    /// What the server must say of it.
    address: SocketAddr,
    one_session: bool,
    /// Goes in front of the first datagram.
    header: Vec<u8>,
    number: u64,
    waiting: VecDeque<(u64, Instant)>,
    /// The server, and where it is written to from.
    path: Option<(SocketAddr, SocketAddr)>,
    last: Option<Instant>,
}

impl Client {
    fn new(of: &Clients, number: usize) -> Self {
        // 125 clients an address, so that each has many ports.
        let address = u8::try_from(number / 125 % 250 + 1).unwrap();
        let ip = match of.to.ip() {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::new(127, 0, 1, address)),
            IpAddr::V6(ip) => ip.into(),
        };
        let socket = UdpSocket::bind((ip, 0)).unwrap();
        socket.connect(of.to).unwrap();
        socket.set_nonblocking(true).unwrap();
        let own = socket.local_addr().unwrap();
        let (mut address, mut header) = (own, Vec::new());
        if of.in_front {
            let ip = match ip {
                IpAddr::V4(_) => "198.51.100.7".parse().unwrap(),
                IpAddr::V6(_) => "2001:db8::7".parse().unwrap(),
            };
            address = SocketAddr::new(ip, own.port());
            header = from_client_at(address, of.to, b"");
        }
        Self {
            socket,
            to: of.to,
            address,
            one_session: of.one_session,
            header,
            number: 0,
            waiting: VecDeque::new(),
            path: None,
            last: None,
        }
    }

    fn send(&mut self, now: Instant) -> Result<(), String> {
        self.number += 1;
        let payload = format!("{} {}", self.number, "x".repeat(40));
        let mut datagram = std::mem::take(&mut self.header);
        datagram.extend_from_slice(payload.as_bytes());
        match self.socket.send(&datagram) {
            Ok(_) => {
                self.waiting.push_back((self.number, now));
                Ok(())
            }
            Err(error) => Err(format!("can't send to {}: {error}", self.to)),
        }
    }

    /// What came, and what is wrong with it: nothing if it came again from another session.
    fn note(
        &mut self,
        answer: &[u8],
        now: Instant,
        outcome: &mut Outcome,
        progress: &Progress,
    ) -> Result<(), String> {
        let text = String::from_utf8_lossy(answer);
        let wrong = |why: &str| Err(format!("{}, {}: {why}: {text}", self.to, self.address));
        let mut words = text.split(' ');
        let mut next = || words.next().unwrap_or_default();
        let (server, from, client, number) = (next(), next(), next(), next());
        if client != self.address.to_string() {
            return wrong("the server was told of another client");
        }
        let (Ok(server), Ok(from), Ok(number)) =
            (server.parse(), from.parse(), number.parse::<u64>())
        else {
            return wrong("an answer that no server gives");
        };
        let place = self.waiting.iter().position(|(sent, _)| *sent == number);
        let Some((_, sent)) = place.and_then(|place| self.waiting.remove(place)) else {
            return wrong("an answer that came before, or to nothing that was sent");
        };
        let gap = now - self.last.replace(now).unwrap_or(sent);
        outcome.longest_gap = outcome.longest_gap.max(gap);
        outcome.longest_wait = outcome.longest_wait.max(now - sent);
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        progress.gap.fetch_max(micros(gap), Ordering::Relaxed);
        progress
            .wait
            .fetch_max(micros(now - sent), Ordering::Relaxed);
        let path: (SocketAddr, SocketAddr) = (server, from);
        let before = self.path.replace(path).unwrap_or(path);
        let is_moved = before.0 != path.0 || self.one_session && before.1 != path.1;
        if is_moved {
            outcome.moved += 1;
            outcome.keep(format!(
                "{} {}: from {} at {} to {from} at {server}",
                self.to, self.address, before.1, before.0
            ));
        }
        Ok(())
    }
}

/// What came of all clients.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    pub clients: usize,
    pub sent: u64,
    pub answered: u64,
    pub lost: u64,
    /// Answers by another server or port than the one before.
    pub moved: u64,
    pub wrong: u64,
    /// The first of what was moved or wrong.
    pub examples: Vec<String>,
    /// The longest time between two answers to one client.
    pub longest_gap: Duration,
    /// The longest time until an answer came.
    pub longest_wait: Duration,
}

impl Outcome {
    fn keep(&mut self, example: String) {
        if self.examples.len() < EXAMPLES {
            self.examples.push(example);
        }
    }

    /// Whether every datagram was answered, each by the session of its client.
    pub fn is_clean(&self) -> bool {
        (self.lost, self.moved, self.wrong) == (0, 0, 0)
    }

    #[track_caller]
    pub fn assert_clean(&self) {
        assert!(self.is_clean(), "{self}");
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} clients, {} sent, {} answered, {} lost, {} moved, {} wrong; longest gap {:?}, longest wait {:?}",
            self.clients,
            self.sent,
            self.answered,
            self.lost,
            self.moved,
            self.wrong,
            self.longest_gap,
            self.longest_wait
        )?;
        for example in &self.examples {
            write!(f, "\n{example}")?;
        }
        Ok(())
    }
}

/// What the clients' thread tells meanwhile.
#[derive(Default)]
struct Progress {
    stop: AtomicBool,
    answered: AtomicU64,
    /// Clients that have had an answer.
    served: AtomicU64,
    faults: AtomicU64,
    /// The longest since they were asked for, in microseconds.
    gap: AtomicU64,
    wait: AtomicU64,
}

/// Clients that send in turn, until they are stopped.
pub struct Load {
    clients: u64,
    progress: Arc<Progress>,
    thread: JoinHandle<Outcome>,
}

impl Load {
    /// All clients together send `rate` datagrams a second.
    pub fn start(groups: &[Clients], rate: u32) -> Self {
        let mut clients = Vec::new();
        for group in groups {
            clients.extend((0..group.count).map(|number| Client::new(group, number)));
        }
        let (progress, count) = (Arc::<Progress>::default(), clients.len() as u64);
        let thread = thread::spawn({
            let progress = Arc::clone(&progress);
            move || run(clients, rate, &progress)
        });
        Self {
            clients: count,
            progress,
            thread,
        }
    }

    /// How many datagrams have been answered.
    pub fn answered(&self) -> u64 {
        self.progress.answered.load(Ordering::Relaxed)
    }

    /// The longest time between two answers to one client, and the longest time until an
    /// answer came, each since the last call.
    pub fn take_longest(&self) -> (Duration, Duration) {
        let take = |longest: &AtomicU64| Duration::from_micros(longest.swap(0, Ordering::Relaxed));
        (take(&self.progress.gap), take(&self.progress.wait))
    }

    /// Waits until every client has had an answer.
    #[track_caller]
    pub fn wait_for_all(&self) {
        self.wait("every client to be served", || {
            self.progress.served.load(Ordering::Relaxed) == self.clients
        });
    }

    /// Waits for as many more answers as there are clients.
    #[track_caller]
    pub fn wait_for_a_round(&self) {
        let until = self.answered() + self.clients;
        self.wait("a round of answers", || self.answered() >= until);
    }

    #[track_caller]
    fn wait(&self, what: &str, done: impl Fn() -> bool) {
        eventually(what, || {
            // `finish` shows what they are.
            let has_failed = self.progress.faults.load(Ordering::Relaxed) > 0;
            done() || has_failed || self.thread.is_finished()
        });
    }

    /// Stops sending, and waits for the last answers.
    pub fn finish(self) -> Outcome {
        self.progress.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

fn run(mut clients: Vec<Client>, rate: u32, progress: &Progress) -> Outcome {
    let ready = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    for (number, client) in (0..).zip(&clients) {
        let data = epoll::EventData::new_u64(number);
        epoll::add(&ready, &client.socket, data, epoll::EventFlags::IN).unwrap();
    }
    let mut outcome = Outcome {
        clients: clients.len(),
        ..Outcome::default()
    };
    let pace = Duration::from_secs(1) / rate;
    let mut due = Instant::now();
    let (mut turn, mut last) = (0, Instant::now());
    let mut events = Vec::with_capacity(256);
    let mut datagram = [0; 2000];
    loop {
        let mut now = Instant::now();
        let is_stopping = progress.stop.load(Ordering::Relaxed);
        if is_stopping && (outcome.answered >= outcome.sent || last.elapsed() > QUIET) {
            break;
        }
        if due + MOST_BEHIND < now {
            due = now;
        }
        while !is_stopping && due <= now {
            match clients[turn].send(now) {
                Ok(()) => outcome.sent += 1,
                Err(why) => fault(&mut outcome, progress, why),
            }
            turn = (turn + 1) % clients.len();
            due += pace;
        }
        let wait = Timespec {
            tv_sec: 0,
            tv_nsec: i64::from(due.saturating_duration_since(now).subsec_nanos()).max(10_000),
        };
        events.clear();
        let waited = epoll::wait(&ready, spare_capacity(&mut events), Some(&wait));
        if waited.is_err() {
            continue;
        }
        now = Instant::now();
        for event in &events {
            let client = &mut clients[usize::try_from(event.data.u64()).unwrap()];
            let is_first = client.path.is_none();
            let noted = match client.socket.recv(&mut datagram) {
                Ok(len) => client.note(&datagram[..len], now, &mut outcome, progress),
                Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
                Err(error) => Err(format!("{} {}: {error}", client.to, client.address)),
            };
            match noted {
                Ok(()) => {
                    last = now;
                    outcome.answered += 1;
                    progress.answered.fetch_add(1, Ordering::Relaxed);
                    if is_first {
                        progress.served.fetch_add(1, Ordering::Relaxed);
                    }
                }
                Err(why) => fault(&mut outcome, progress, why),
            }
        }
    }
    outcome.lost = outcome.sent - outcome.answered;
    let lossy = clients.iter().filter(|client| !client.waiting.is_empty());
    for client in lossy.take(EXAMPLES) {
        let numbers: Vec<_> = client
            .waiting
            .iter()
            .map(|(number, _)| *number)
            .take(10)
            .collect();
        let (to, address, of) = (client.to, client.address, client.number);
        outcome.keep(format!("{to} {address}: lost {numbers:?} of {of}"));
    }
    outcome
}

fn fault(outcome: &mut Outcome, progress: &Progress, why: String) {
    outcome.wrong += 1;
    outcome.keep(why);
    progress.faults.fetch_add(1, Ordering::Relaxed);
}
