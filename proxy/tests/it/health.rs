//! Servers that die, hang, answer wrongly and return, under load: which clients fail over,
//! and which stay.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use ppv2_lab::*;

const SERVE: u8 = 0;
const HANG: u8 = 1;
const ANSWER_WRONGLY: u8 = 2;
const ANSWER_PROBES_ALONE: u8 = 3;
const DIE: u8 = 4;

const PROBE: &str = "probe = { kind = \"udp\", send = \"ping\", expect_regex = '^pong$' }";

/// Answers clients with its address, and probes with "pong", as long as it is told
/// to.
struct Server {
    address: SocketAddr,
    manner: Arc<AtomicU8>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start(address: SocketAddr) -> Self {
        let manner = Arc::new(AtomicU8::new(SERVE));
        let socket = bind(address);
        socket
            .set_read_timeout(Some(Duration::from_millis(20)))
            .unwrap();
        let told = Arc::clone(&manner);
        let thread = std::thread::spawn(move || answer(&socket, address, &told));
        Self {
            address,
            manner,
            thread: Some(thread),
        }
    }

    fn four() -> Vec<Self> {
        let one = |_| Self::start(address("127.0.0.1"));
        (0..4).map(one).collect()
    }

    fn tell(&self, manner: u8) {
        self.manner.store(manner, Ordering::Relaxed);
    }

    /// Closes its socket.
    fn die(&mut self) {
        self.tell(DIE);
        self.thread.take().map(JoinHandle::join);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.die();
    }
}

fn answer(socket: &UdpSocket, address: SocketAddr, manner: &AtomicU8) {
    let mut datagram = [0; 2000];
    loop {
        let received = socket.recv_from(&mut datagram);
        let manner = manner.load(Ordering::Relaxed);
        let (len, from) = match (manner, received) {
            (DIE, _) => return,
            (HANG, _) => continue,
            (_, Ok(received)) => received,
            (_, Err(error)) if error.kind() == ErrorKind::WouldBlock => continue,
            (_, Err(error)) => panic!("{error}"),
        };
        let (header, payload) = ppv2::decode(&datagram[..len]).unwrap();
        if header.origin() == ppv2::Origin::Local {
            assert_eq!(payload, b"ping");
            let wrong = manner == ANSWER_WRONGLY;
            let answer: &[u8] = if wrong { b"pang" } else { b"pong" };
            let _ = socket.send_to(answer, from);
        } else if manner != ANSWER_PROBES_ALONE {
            let _ = socket.send_to(address.to_string().as_bytes(), from);
        }
    }
}

struct Proxy {
    process: Process,
    listener: SocketAddr,
    admin: SocketAddr,
    _folder: tempfile::TempDir,
}

fn start(servers: &[Server], keys: &str) -> Proxy {
    start_with(servers, "balance = \"round_robin\"", keys)
}

fn start_with(servers: &[Server], upstream: &str, keys: &str) -> Proxy {
    let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
    let folder = tempfile::tempdir().unwrap();
    let addresses: Vec<_> = servers
        .iter()
        .map(|s| format!("\"{}\"", s.address))
        .collect();
    let config = format!(
        "workers = 2\n[admin]\nlisten = \"{admin}\"\n[[listener]]\nbind = [\"{listener}\"]\n\
         upstream = \"u\"\n[upstream.u]\n{upstream}\nhealth = {{ \
         every = \"200ms\", timeout = \"100ms\", fall = 3, rise = 2, {keys} }}\n\
         servers = [{}]\n",
        addresses.join(", ")
    );
    let process = proxy_with(&folder, &config);
    Proxy {
        process,
        listener,
        admin,
        _folder: folder,
    }
}

impl Proxy {
    fn is_up(&self, server: &Server) -> bool {
        let name = format!(
            "ppv2_upstream_up{{upstream=\"u\",server=\"{}\"}}",
            server.address
        );
        metric(self.admin, &name) == 1
    }

    /// Which server answers this client now, if one does at once.
    fn server_of(&self, client: &UdpSocket) -> Option<SocketAddr> {
        client.send_to(b"who", self.listener).unwrap();
        let mut answer = [0; 100];
        let len = client.recv(&mut answer).ok()?;
        Some(
            std::str::from_utf8(&answer[..len])
                .unwrap()
                .parse()
                .unwrap(),
        )
    }
}

/// Clients that soon give up on an answer.
fn clients(count: usize) -> Vec<UdpSocket> {
    clients_at("127.0.0.1", count)
}

fn clients_at(ip: &str, count: usize) -> Vec<UdpSocket> {
    let client = |_| {
        let client = socket(ip);
        let soon = Some(Duration::from_millis(100));
        client.set_read_timeout(soon).unwrap();
        client
    };
    (0..count).map(client).collect()
}

#[test]
fn failover_moves_the_clients_of_the_dead_server_alone() {
    let mut servers = Server::four();
    let proxy = start(&servers, PROBE);
    let clients = clients(40);
    let of = |client: &UdpSocket| proxy.server_of(client);
    let before: Vec<_> = clients.iter().map(|c| of(c).unwrap()).collect();
    let dead = servers[1].address;
    assert!(before.contains(&dead));
    servers[1].die();
    let asked = clients.iter().zip(&before);
    let (of_dead, of_others): (Vec<_>, Vec<_>) = asked.partition(|(_, server)| **server == dead);
    let others_are_answered = || {
        for (client, server) in &of_others {
            client.set_read_timeout(Some(TIMEOUT)).unwrap();
            assert_eq!(of(client), Some(**server));
        }
    };
    eventually("it to be down", || {
        others_are_answered();
        !proxy.is_up(&servers[1])
    });
    for (client, _) in of_dead {
        eventually("an answer of another", || {
            of(client).is_some_and(|now| now != dead)
        });
    }
    others_are_answered();
    let (status, upstreams) = http_get(proxy.admin, "/upstreams");
    assert_eq!(status, 200);
    assert_eq!(
        upstreams.matches("\"state\":\"down\"").count(),
        1,
        "{upstreams}"
    );
    assert!(
        upstreams.contains("probe refused, 3 in a row"),
        "{upstreams}"
    );

    servers[1] = Server::start(dead);
    eventually("its return", || proxy.is_up(&servers[1]));
    // It gets new clients; the old ones stay where they are.
    let more = self::clients(40);
    eventually("new clients", || more.iter().any(|c| of(c) == Some(dead)));
    assert!(clients.iter().all(|client| of(client) != Some(dead)));
    // The log is written behind what it tells of.
    let told = |words| proxy.process.log().matches(words).count();
    eventually("both lines", || {
        told("server is down") + told("server is up") >= 2
    });
    assert_eq!((told("server is down"), told("server is up")), (1, 1));
}

#[test]
fn hanging_and_wrong_servers_get_no_clients_until_they_recover() {
    let servers = Server::four();
    let proxy = start(&servers, PROBE);
    servers[0].tell(HANG);
    servers[1].tell(ANSWER_WRONGLY);
    eventually("two to go down", || {
        !proxy.is_up(&servers[0]) && !proxy.is_up(&servers[1])
    });
    assert!(proxy.is_up(&servers[2]) && proxy.is_up(&servers[3]));
    eventually("both reasons", || {
        let log = proxy.process.log();
        log.contains("probe timeout") && log.contains("probe wrong_answer")
    });
    servers[0].tell(SERVE);
    servers[1].tell(SERVE);
    eventually("all to return", || servers.iter().all(|s| proxy.is_up(s)));
}

/// Says that it is over when it is dropped.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Servers that choose each answer so that it takes longest to search, and send sixteen
/// for a probe, which fill the time of the thread that searches them.
#[test]
fn costly_probe_answers_delay_nothing_else() {
    let costly = vec![b'a'; 4096];
    let is_over = AtomicBool::new(false);
    let flood = |socket: UdpSocket| {
        let mut probe = [0; 2000];
        while !is_over.load(Ordering::Relaxed) {
            if let Ok((_, from)) = socket.recv_from(&mut probe) {
                for _ in 0..16 {
                    let _ = socket.send_to(&costly, from);
                }
            }
        }
    };
    let hostile: Vec<_> = (0..16).map(|_| socket("127.0.0.1")).collect();
    let floods: Vec<_> = hostile.iter().map(|s| s.try_clone().unwrap()).collect();
    let mut honest = Server::start(address("127.0.0.1"));
    let of = |s: &UdpSocket| s.local_addr().unwrap().to_string();
    let addresses: Vec<_> = hostile.iter().map(of).collect();
    let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
    let folder = tempfile::tempdir().unwrap();
    let config = format!(
        "drain_timeout = \"100ms\"\n[admin]\nlisten = \"{admin}\"\n[[listener]]\n\
         bind = [\"{listener}\"]\nupstream = \"u\"\n\
         [upstream.u]\nservers = {addresses:?}\nhealth = {{ every = \"100ms\", \
         timeout = \"100ms\", probe = {{ kind = \"udp\", \
         expect_regex = '([a-z]{{1,100}}){{1,5}}\\W\\W$' }} }}\n\
         [[listener]]\nbind = [\"{}\"]\nupstream = \"v\"\n\
         [upstream.v]\nservers = [\"{}\"]\nhealth = {{ every = \"100ms\", timeout = \"100ms\", \
         {PROBE} }}\n",
        address("127.0.0.1"),
        honest.address,
    );
    std::thread::scope(|scope| {
        for socket in floods {
            socket
                .set_read_timeout(Some(Duration::from_millis(100)))
                .unwrap();
            scope.spawn(|| flood(socket));
        }
        // Also where an assertion fails.
        let _over = Over(&is_over);
        let mut proxy = proxy_with(&folder, &config);
        let of = |server: &str, result: &str, upstream: &str| {
            let name = "ppv2_upstream_health_checks_total";
            let labels = format!("upstream=\"{upstream}\",server=\"{server}\",result=\"{result}\"");
            metric(admin, &format!("{name}{{{labels}}}"))
        };
        eventually("searches of answers", || {
            let searched = |server: &String| of(server, "wrong_answer", "u") > 0;
            addresses.iter().any(searched)
        });
        for _ in 0..10 {
            assert_eq!(http_get(admin, "/healthz").0, 200);
        }
        // One that found no time for a search says nothing against its server.
        assert_eq!(of(&honest.address.to_string(), "wrong_answer", "v"), 0);
        honest.die();
        eventually("what is known of others to follow", || {
            proxy.log().contains("probe refused, 3 in a row")
        });
        proxy.signal("TERM");
        assert_eq!(proxy.wait().0.code(), Some(0));
    });
}

#[test]
fn passive_check_finds_a_server_that_answers_probes_alone() {
    let servers = Server::four();
    let passive = "passive = { window = \"200ms\", unanswered_percent = 80, min_datagrams = 5, hold = \"1m\" }";
    let proxy = start(&servers, &format!("{PROBE}, {passive}"));
    servers[2].tell(ANSWER_PROBES_ALONE);
    let clients = clients(40);
    eventually("clients to leave it", || {
        for client in &clients {
            client.send_to(b"who", proxy.listener).unwrap();
        }
        !proxy.is_up(&servers[2])
    });
    eventually("the reason", || proxy.process.log().contains("unanswered"));
    let others = [0, 1, 3].map(|number: usize| &servers[number]);
    assert!(others.iter().all(|server| proxy.is_up(server)));
}

#[test]
fn with_all_servers_down_sessions_go_on_or_are_refused_as_configured() {
    for fail_open in [true, false] {
        let servers = Server::four();
        let proxy = start(&servers, &format!("{PROBE}, fail_open = {fail_open}"));
        let client = &clients(1)[0];
        assert!(proxy.server_of(client).is_some());
        for server in &servers {
            // To clients it does answer.
            server.tell(ANSWER_WRONGLY);
        }
        eventually("all to go down", || servers.iter().all(|s| !proxy.is_up(s)));
        if fail_open {
            assert!(proxy.server_of(client).is_some());
            assert_eq!(dropped(proxy.admin, "no_server"), 0);
        } else {
            eventually("a drop", || {
                let _ = proxy.server_of(client);
                dropped(proxy.admin, "no_server") > 0
            });
            assert_eq!(proxy.server_of(client), None);
        }
    }
}

#[test]
fn sessions_move_back_to_their_server_if_configured() {
    let mut servers = Server::four();
    let upstream = "hash_on = \"client_addr\"\non_return = \"return\"";
    let proxy = start_with(&servers, upstream, PROBE);
    let clients = clients(40);
    let of = |client: &UdpSocket| proxy.server_of(client);
    let before: Vec<_> = clients.iter().map(|c| of(c).unwrap()).collect();
    let dead = servers[1].address;
    let of_dead = before.iter().filter(|server| **server == dead).count();
    assert!(of_dead > 0);
    servers[1].die();
    eventually("its clients to move", || {
        clients
            .iter()
            .all(|client| of(client).is_some_and(|now| now != dead))
    });
    servers[1] = Server::start(dead);
    // All are where they began, those of the others without ever having left.
    eventually("its clients to return", || {
        let now = clients.iter().map(&of);
        now.zip(&before).all(|(now, before)| now == Some(*before))
    });
    let moved = "ppv2_sessions_ended_total{listener=\"listener1\",reason=\"moved\"}";
    assert_eq!(metric(proxy.admin, moved), 2 * of_dead as u64);

    // A drain moves nobody, though their server has returned once.
    let path = format!("POST /drain?upstream=u&server={}", servers[0].address);
    assert_eq!(http(proxy.admin, &path, "").0, 200);
    let more = self::clients(20);
    eventually("new clients to go elsewhere", || {
        more.iter().all(|client| {
            let new = self::clients(1);
            of(client).is_some() && of(&new[0]).is_some_and(|now| now != servers[0].address)
        })
    });
    for (client, before) in clients.iter().zip(&before) {
        assert_eq!(of(client), Some(*before));
    }
}

#[test]
fn slow_start_raises_the_share_of_a_returning_server() {
    let mut servers = Server::four();
    let upstream = "balance = \"round_robin\"\nslow_start = \"6s\"";
    let proxy = start_with(&servers, upstream, PROBE);
    let slow = servers[1].address;
    let mut asked = 0;
    let mut shares = || {
        // An address that had no sessions before, whatever port the kernel gives.
        asked += 1;
        let clients = clients_at(&format!("127.2.{}.{}", asked / 200, 1 + asked % 200), 80);
        let of = clients.iter().map(|client| proxy.server_of(client));
        of.filter(|now| *now == Some(slow)).count()
    };
    // Each of two workers takes turns of its own.
    assert!((18..=22).contains(&shares()));
    servers[1].die();
    eventually("it to go down", || !proxy.is_up(&servers[1]));
    servers[1] = Server::start(slow);
    eventually("its return", || proxy.is_up(&servers[1]));
    let first = shares();
    let mut all = vec![first];
    eventually("its whole share", || {
        // Sessions are bounded.
        std::thread::sleep(Duration::from_millis(100));
        all.push(shares());
        all.last() == Some(&20)
    });
    assert!(
        first < 10 && all.iter().any(|share| (5..18).contains(share)),
        "{all:?}"
    );
}
