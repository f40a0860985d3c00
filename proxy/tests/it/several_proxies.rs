//! Three proxies announce one address by BGP with BFD, as `packaging/bird` has it, and a router
//! spreads clients over them by ECMP. One is drained, one loses its power, one is stopped:
//! clients keep their servers, and lose at most what was on its way to a proxy that was dead
//! or stopped, until the router knew.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ppv2_lab::dig::program;
use ppv2_lab::namespace::enter;
use ppv2_lab::*;

/// Clients and servers are on the test's own host; the router is between clients and proxies.
/// Bridges keep a link up although the host at its other end is off, as switches do.
const SETUP: &str = r#"
mount -t tmpfs tmpfs /run
for family in all default; do echo 0 >/proc/sys/net/ipv6/conf/$family/accept_dad; done
for host in router proxy1 proxy2 proxy3; do
    ip netns add $host
    ip netns exec $host sh -ec '
        ip link set lo up; cd /proc/sys/net
        echo 0 >ipv6/conf/default/accept_dad; echo 0 >ipv6/conf/all/accept_dad'
done
up() { # HOST DEVICE ADDRESS...
    host=$1 device=$2; shift 2
    { for address; do echo addr add $address dev $device; done; echo link set $device up; } |
        ip $host -batch -
}
ip link add clients type veth peer name clients netns router
ip -n router link add lan type bridge
ip link add servers type bridge
for n in 1 2 3; do
    ip -n router link add p$n master lan type veth peer name pub netns proxy$n
    ip -n router link set p$n up
    ip link add s$n master servers type veth peer name priv netns proxy$n
    ip link set s$n up
    up "-n proxy$n" pub 192.0.2.1$n/24 2001:db8:a::1$n/64
    up "-n proxy$n" priv 10.0.0.1$n/24 fd00:a::1$n/64
    up "-n proxy$n" lo 198.51.100.53/32 2001:db8:53::53/128
    ip -n proxy$n route add default via 192.0.2.1
    ip -n proxy$n -6 route add default via 2001:db8:a::1
done
up '-n router' lan 192.0.2.1/24 2001:db8:a::1/64
up '-n router' clients 203.0.113.1/24 2001:db8:c:ffff::1/64
up '' clients 203.0.113.2/24 2001:db8:c:ffff::2/64 \
    $(for n in $(seq 40); do echo 203.0.113.$((n + 100))/24 2001:db8:c:$n::1/64; done)
up '' servers 10.0.0.21/24 10.0.0.22/24 fd00:a::21/64 fd00:a::22/64
ip route add default via 203.0.113.1
ip -6 route add default via 2001:db8:c:ffff::1
ip -n router -6 route add 2001:db8:c::/48 via 2001:db8:c:ffff::2
ip netns exec router sh -ec 'cd /proc/sys/net
    echo 1 >ipv4/ip_forward; echo 1 >ipv6/conf/all/forwarding
    echo 1 >ipv4/fib_multipath_hash_policy; echo 1 >ipv6/fib_multipath_hash_policy'
"#;

/// Of each family.
const CLIENTS: u8 = 40;

/// What the clients write to.
fn service(client: IpAddr) -> SocketAddr {
    let text = match client {
        IpAddr::V4(_) => "198.51.100.53:9000",
        IpAddr::V6(_) => "[2001:db8:53::53]:9000",
    };
    text.parse().unwrap()
}

const SERVERS: [&str; 4] = [
    "10.0.0.21:9001",
    "10.0.0.22:9001",
    "[fd00:a::21]:9001",
    "[fd00:a::22]:9001",
];

fn packaging() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/bird")
}

/// A command of one of the hosts.
fn at(host: &str, program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", host]).arg(program);
    command
}

/// BIRD on a host, by the file that we ship. On a busy machine it may be late for some
/// intervals of BFD in a row.
fn bird(host: &str, folder: &Path, config: &str) -> Process {
    let file = folder.join(format!("{host}.conf"));
    let config = config.replace("log syslog all", "log stderr all");
    fs::write(&file, config.replace("multiplier 3", "multiplier 10")).unwrap();
    let mut command = at(host, program("bird", "bird2"));
    command.arg("-f").arg("-c").arg(file);
    command.arg("-s").arg(socket_of(host, folder));
    command.arg("-P").arg(folder.join(format!("{host}.pid")));
    Process::start(&mut command)
}

fn socket_of(host: &str, folder: &Path) -> PathBuf {
    folder.join(format!("{host}.ctl"))
}

/// What a host's BIRD answers.
fn birdc(host: &str, folder: &Path, command: &str) -> String {
    let mut birdc = Command::new(program("birdc", "bird2"));
    birdc.arg("-s").arg(socket_of(host, folder)).arg(command);
    let (status, said, error) = output_of(&mut birdc);
    assert_eq!(status, Some(0), "{said}{error}");
    said
}

/// A host that announces the service addresses.
struct Proxy {
    number: usize,
    proxy: Process,
    bird: Process,
    check: Process,
}

impl Proxy {
    fn start(number: usize, folder: &Path) -> Self {
        let host = format!("proxy{number}");
        let servers = SERVERS.map(|server| format!("\"{server}\"")).join(", ");
        let config = format!(
            "workers = 1\ndrain_timeout = \"1h\"\npeers = [\"198.51.100.53\", \"2001:db8:53::53\"]\n\
             [admin]\nlisten = \"{}\"\n[[listener]]\nidle_timeout = \"2s\"\nupstream = \"u\"\n\
             bind = [\"198.51.100.53:9000\", \"[2001:db8:53::53]:9000\"]\n\
             [upstream.u]\nservers = [{servers}]\n",
            admin(number)
        );
        let file = folder.join(format!("{host}.toml"));
        fs::write(&file, config).unwrap();
        // It comes before BIRD, as after the start of a host.
        let mut check = Self::check(number, folder);
        check.wait_for("BIRD can't be asked");
        let config = fs::read_to_string(packaging().join("proxy.conf")).unwrap();
        let config = config.replace("192.0.2.11;", &format!("192.0.2.1{number};"));
        let config = config.replace("2001:db8:a::11;", &format!("2001:db8:a::1{number};"));
        let bird = bird(&host, folder, &config);
        let mut proxy = Process::start(at(&host, binary()).args(["run", "--config"]).arg(file));
        proxy.wait_for("ready");
        Self {
            number,
            proxy,
            bird,
            check,
        }
    }

    /// The script that enables and disables BIRD's routes.
    fn check(number: usize, folder: &Path) -> Process {
        let host = format!("proxy{number}");
        let path = std::env::var("PATH").unwrap_or_default();
        let own = binary().parent().unwrap().display();
        let mut command = at(&host, packaging().join("ppv2-bird"));
        command
            .env("PATH", format!("{own}:{path}:/usr/sbin"))
            .env("PPV2_ADMIN", admin(number))
            .env("PPV2_INTERVAL", "0.1")
            .env("PPV2_SETTLE", "0")
            .env("BIRD_SOCKET", socket_of(&host, folder));
        Process::start(&mut command)
    }

    /// The host loses its power: it says nothing to anybody any more.
    fn power_off(&mut self) {
        let host = format!("proxy{}", self.number);
        for device in ["pub", "priv"] {
            let off = ["-n", &host, "link", "set", device, "down"];
            assert!(Command::new("ip").args(off).status().unwrap().success());
        }
        for process in [&mut self.check, &mut self.proxy, &mut self.bird] {
            process.signal("KILL");
            process.wait();
        }
    }

    fn sessions(&self) -> u64 {
        metric(
            admin(self.number).parse().unwrap(),
            "ppv2_sessions{listener=\"listener1\"}",
        )
    }
}

fn admin(number: usize) -> String {
    format!("10.0.0.1{number}:9901")
}

/// To which proxies the router sends datagrams of each family.
fn routes() -> [BTreeSet<usize>; 2] {
    [["-4", "198.51.100.53"], ["-6", "2001:db8:53::53"]].map(|[family, address]| {
        let arguments = [family, "-n", "router", "route", "show", address];
        let output = Command::new("ip").args(arguments).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let gateways = text.split("via ").skip(1);
        let address = |text: &str| text.split(' ').next().unwrap().parse::<IpAddr>().unwrap();
        gateways.map(|text| number_of(address(text))).collect()
    })
}

#[track_caller]
fn await_routes(what: &str, proxies: &[usize]) {
    let wanted: BTreeSet<_> = proxies.iter().copied().collect();
    eventually(what, || routes().iter().all(|route| *route == wanted));
}

/// The number of the proxy's host that has this address.
fn number_of(address: IpAddr) -> usize {
    let text = address.to_string();
    text[text.len() - 1..].parse().unwrap()
}

/// A server: it answers with its address, that of the proxy and what came, once it has seen
/// that the header names the client, which the datagram begins with. An answer to a
/// datagram that ends with `slow` waits until it is let go.
struct Server {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

type Held = Arc<Mutex<Option<Vec<(UdpSocket, Vec<u8>, SocketAddr)>>>>;

impl Server {
    fn start(address: &str, held: &Held) -> Self {
        let socket = bind(address.parse().unwrap());
        socket
            .set_read_timeout(Some(Duration::from_millis(20)))
            .unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let (told, held, address) = (Arc::clone(&stop), Arc::clone(held), address.to_owned());
        let thread = std::thread::spawn(move || {
            let mut datagram = [0; 2000];
            while !told.load(Ordering::Relaxed) {
                let Ok((len, proxy)) = socket.recv_from(&mut datagram) else {
                    continue;
                };
                let (client, _, asked) = read_header(&datagram[..len]);
                let asked = String::from_utf8(asked).unwrap();
                assert!(
                    asked.starts_with(&format!("{client} ")),
                    "{client}: {asked}"
                );
                let answer = format!("{address} {} {asked}", proxy.ip()).into_bytes();
                if asked.ends_with("slow") {
                    let mut held = held.lock().unwrap();
                    let held = held.get_or_insert_default();
                    held.push((socket.try_clone().unwrap(), answer, proxy));
                } else {
                    socket.send_to(&answer, proxy).unwrap();
                }
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().unwrap().join();
        assert!(ended.is_ok() || std::thread::panicking(), "a server failed");
    }
}

/// A client with an address of its own.
struct Client {
    socket: UdpSocket,
    /// The server that has answered all of its datagrams.
    server: Option<String>,
    /// The proxy through which the answer to the datagram of each round has come.
    answers: BTreeMap<u32, usize>,
    /// The first round that it has been in since `answers` were forgotten.
    since: u32,
}

impl Client {
    fn new(address: IpAddr) -> Self {
        let socket = bind(SocketAddr::new(address, 0));
        socket.set_nonblocking(true).unwrap();
        Self {
            socket,
            server: None,
            answers: BTreeMap::new(),
            since: 0,
        }
    }

    fn address(&self) -> SocketAddr {
        self.socket.local_addr().unwrap()
    }

    fn ask(&self, what: &str) {
        let own = self.address();
        let datagram = format!("{own} {what}");
        // Without a route the router says so, by ICMP, and the kernel reports it here.
        _ = self.socket.send_to(datagram.as_bytes(), service(own.ip()));
    }

    /// Takes the answers that are there, each of which must be to this client and by its server.
    fn take_answers(&mut self) {
        let mut datagram = [0; 2000];
        while let Ok((len, from)) = self.socket.recv_from(&mut datagram) {
            assert_eq!(from, service(self.address().ip()));
            let text = str::from_utf8(&datagram[..len]).unwrap();
            let words: Vec<_> = text.split(' ').collect();
            let [server, proxy, client, round, ..] = words[..] else {
                panic!("{text}");
            };
            assert_eq!(client, self.address().to_string());
            let own = self.server.get_or_insert_with(|| server.to_owned());
            assert_eq!(own, server, "{client} has moved to another server");
            let proxy = number_of(proxy.parse().unwrap());
            let twice = self.answers.insert(round.parse().unwrap(), proxy);
            assert_eq!(twice, None, "{client}: {text} came twice");
        }
    }

    fn lost(&self, rounds: u32) -> Vec<u32> {
        let all = self.since..rounds;
        all.filter(|round| !self.answers.contains_key(round))
            .collect()
    }

    /// The proxy that its first datagram went through.
    fn first_proxy(&self) -> usize {
        self.answers[&self.since]
    }
}

/// Rounds in each of which each client sends a datagram.
#[derive(Default)]
struct Rounds {
    /// The round that is being sent.
    now: AtomicU32,
    /// All datagrams of the rounds before this one are answered.
    answered: AtomicU32,
}

impl Rounds {
    fn now(&self) -> u32 {
        self.now.load(Ordering::SeqCst)
    }

    /// The number of a round that has not begun yet.
    fn next(&self) -> u32 {
        self.now() + 1
    }

    /// Has some more rounds sent and answered. Returns the round before which all is answered.
    fn answered(&self) -> u32 {
        let until = self.next() + 8;
        let answered = || self.answered.load(Ordering::SeqCst);
        eventually("some rounds to be answered", || answered() > until);
        answered()
    }

    /// Has some more rounds sent.
    fn pass(&self) {
        let until = self.next() + 8;
        eventually("more rounds", || self.now() > until);
    }
}

/// Sends rounds while `work` is done. Returns how many there have been since the beginning
/// of the test, and what `work` does.
///
/// At the end all clients are served: each has the answer to its last datagram. If
/// `lossless`, they have all answers.
#[track_caller]
fn meanwhile<T>(
    clients: &mut [Client],
    rounds: &Rounds,
    lossless: bool,
    work: impl FnOnce() -> T,
) -> (u32, T) {
    for client in &mut *clients {
        client.answers.clear();
        client.since = rounds.now();
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                let number = rounds.now();
                for client in &mut *clients {
                    client.ask(&number.to_string());
                }
                rounds.now.store(number + 1, Ordering::SeqCst);
                let until = Instant::now() + Duration::from_millis(20);
                while Instant::now() < until {
                    clients.iter_mut().for_each(Client::take_answers);
                    if clients
                        .iter()
                        .all(|client| client.lost(number + 1).is_empty())
                    {
                        rounds.answered.store(number + 1, Ordering::SeqCst);
                    }
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
            let end = rounds.now();
            eventually("all answers", || {
                clients.iter_mut().all(|client| {
                    client.take_answers();
                    let lost = client.lost(end);
                    lost.is_empty() || !lossless && !lost.contains(&(end - 1))
                })
            });
            end
        });
        // The rounds end even if the work fails.
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        stop.store(true, Ordering::SeqCst);
        let end = sending
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        match done {
            Ok(done) => (end, done),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Through which proxies the clients' datagrams went since this round.
fn proxies_since(clients: &[Client], round: u32) -> Vec<usize> {
    let answers = clients
        .iter()
        .flat_map(|client| client.answers.range(round..));
    let all: BTreeSet<_> = answers.map(|(_, proxy)| *proxy).collect();
    all.into_iter().collect()
}

/// How many datagrams were lost: only by clients of `proxy`, and of these only what was sent
/// from round `before` on and before round `after`.
#[track_caller]
fn only_these_lose(clients: &[Client], end: u32, proxy: usize, before: u32, after: u32) -> usize {
    let mut sum = 0;
    for client in clients {
        let lost = client.lost(end);
        let may_lose = client.first_proxy() == proxy;
        assert!(
            lost.is_empty() || may_lose,
            "{} lost rounds {lost:?}, and was served by another proxy",
            client.address()
        );
        let between = lost.iter().all(|round| (before..after).contains(round));
        assert!(between, "lost rounds {lost:?}, not only {before}..{after}");
        sum += lost.len();
    }
    sum
}

#[test]
fn clients_keep_their_servers_when_one_of_three_proxies_goes() {
    if !enter(test_name!(), SETUP) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let held = Held::default();
    let _servers = SERVERS.map(|address| Server::start(address, &held));
    let router = fs::read_to_string(packaging().join("router.conf")).unwrap();
    let _router = bird("router", folder, &router);
    let [mut first, mut second, mut third] = [1, 2, 3].map(|number| Proxy::start(number, folder));
    await_routes("three proxies", &[1, 2, 3]);
    let v4 = (1..=CLIENTS).map(|n| IpAddr::from(Ipv4Addr::new(203, 0, 113, n + 100)));
    let v6 = (1..=CLIENTS).map(|n| {
        // As text, 10 follows 9.
        let address = format!("2001:db8:c:{n}::1").parse::<Ipv6Addr>();
        IpAddr::from(address.unwrap())
    });
    let mut clients: Vec<_> = v4.chain(v6).map(Client::new).collect();
    let rounds = Rounds::default();

    meanwhile(&mut clients, &rounds, true, || rounds.pass());
    assert_eq!(proxies_since(&clients, 0), [1, 2, 3]);
    let in_use: BTreeSet<_> = clients.iter().map(|client| &client.server).collect();
    assert_eq!(in_use.len(), SERVERS.len());

    // Drained, as `systemctl stop ppv2-bird` does: nothing is lost.
    let (_, after) = meanwhile(&mut clients, &rounds, true, || {
        rounds.pass();
        second.check.signal("TERM");
        await_routes("the second to be withdrawn", &[1, 3]);
        let after = rounds.next();
        rounds.pass();
        after
    });
    assert_eq!(proxies_since(&clients, after), [1, 3]);
    let (status, log) = second.check.wait();
    assert!(status.success() && log.contains("are withdrawn"), "{log}");
    assert!(second.sessions() > 0);
    eventually("its sessions to end in their time", || {
        second.sessions() == 0
    });
    // And announced again.
    let (_, after) = meanwhile(&mut clients, &rounds, true, || {
        rounds.pass();
        second.check = Proxy::check(2, folder);
        await_routes("the second to be announced", &[1, 2, 3]);
        let after = rounds.next();
        rounds.pass();
        after
    });
    assert_eq!(proxies_since(&clients, after), [1, 2, 3]);

    // Without power: the router finds out by BFD.
    let (end, (before, after)) = meanwhile(&mut clients, &rounds, false, || {
        let before = rounds.answered();
        first.power_off();
        await_routes("the first to be withdrawn", &[2, 3]);
        let after = rounds.next();
        rounds.pass();
        (before, after)
    });
    let lost = only_these_lose(&clients, end, 1, before, after);
    assert!(lost > 0, "a host without power has answered");
    println!(
        "without power: {lost} datagrams lost in {} rounds",
        after - before
    );
    assert_eq!(proxies_since(&clients, after), [2, 3]);
    let said = birdc("router", folder, "show protocols proxy1_v4");
    assert!(said.contains("BFD session down"), "{said}");

    // Stopped without a drain: /readyz says so, and what it owes is still answered.
    let of_third = clients
        .iter()
        .position(|client| client.answers.values().next_back() == Some(&3))
        .unwrap();
    let asking = UdpSocket::try_clone(&clients[of_third].socket).unwrap();
    let own = clients[of_third].address();
    let slow = format!("{own} {} slow", u32::MAX);
    asking.send_to(slow.as_bytes(), service(own.ip())).unwrap();
    eventually("the slow question", || held.lock().unwrap().is_some());
    let (end, (before, after)) = meanwhile(&mut clients, &rounds, false, || {
        let before = rounds.answered();
        third.proxy.signal("TERM");
        await_routes("the third to be withdrawn", &[2]);
        let after = rounds.next();
        rounds.pass();
        for (socket, answer, proxy) in held.lock().unwrap().take().unwrap() {
            socket.send_to(&answer, proxy).unwrap();
        }
        rounds.pass();
        (before, after)
    });
    third.check.wait_for("answers 503 to /readyz");
    let (status, log) = third.proxy.wait();
    assert!(status.success(), "{log}");
    assert_eq!(clients[of_third].answers.remove(&u32::MAX), Some(3));
    let lost = only_these_lose(&clients, end, 3, before, after);
    println!(
        "stopped: {lost} datagrams lost in {} rounds",
        after - before
    );
    assert_eq!(proxies_since(&clients, after), [2]);
    assert!(!second.proxy.has_ended() && !second.bird.has_ended());
}

#[test]
fn systemd_understands_the_unit_of_the_check_which_may_do_little() {
    let folder = tempfile::tempdir().unwrap();
    let unit = fs::read_to_string(packaging().join("ppv2-bird.service")).unwrap();
    let script = packaging().join("ppv2-bird").display().to_string();
    let with_path = unit.replace("=ppv2-bird", &format!("={script}"));
    assert_eq!(with_path.matches(&script).count(), 2);
    let unit = write(&folder, "ppv2-bird.service", &with_path);
    for arguments in [
        &["verify", "--man=no"][..],
        // The exposure is given in tenths.
        &["security", "--offline=true", "--threshold=15"],
    ] {
        let mut command = Command::new(program("systemd-analyze", "systemd"));
        command.args(arguments).arg(&unit);
        // What this host runs is no matter.
        command.env("SYSTEMD_LOG_LEVEL", "warning");
        let (status, said, error) = output_of(&mut command);
        assert_eq!(status, Some(0), "{said}{error}");
        assert!(!error.contains("ppv2-bird"), "{error}");
    }
}
