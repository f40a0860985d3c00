//! Replies that carry the tag of the header: a tag that the proxy didn't make for the client
//! and listener that a reply names leads nowhere, replicas with one key take each other's
//! replies, and sessions move between sockets of their own and the one for tagged replies
//! without losing a reply.

use std::collections::HashSet;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ppv2::ReplyTag;
use ppv2_engine::tag::{EPOCH, TagKeys};
use ppv2_lab::network::{Family, Lab, Side};
use ppv2_lab::*;

const KEY: [u8; 16] = *b"key of the tests";

/// A file with [`KEY`], as `tag_key_file` asks for.
fn key_file(folder: &tempfile::TempDir) -> String {
    use std::os::unix::fs::PermissionsExt;

    let hex: String = KEY.iter().map(|byte| format!("{byte:02x}")).collect();
    let file = write(folder, "tag.key", &hex);
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    file.to_str().unwrap().to_owned()
}

struct Setup {
    folder: tempfile::TempDir,
    listener: SocketAddr,
    admin: SocketAddr,
    server: UdpSocket,
}

impl Setup {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            listener: address("127.0.0.1"),
            admin: address("127.0.0.1"),
            server: socket("127.0.0.1"),
        }
    }

    fn config(&self, admin: SocketAddr, listener_keys: &str, replies: &str) -> String {
        format!(
            "workers = 2\n[admin]\nlisten = \"{admin}\"\n\
             [[listener]]\nbind = [\"{}\"]\nupstream = \"u\"\n{listener_keys}\n\
             [upstream.u]\nservers = [\"{}\"]\nreplies = \"{replies}\"\ntag_key_file = \"{}\"\n",
            self.listener,
            self.server.local_addr().unwrap(),
            key_file(&self.folder)
        )
    }

    fn proxy(&self, listener_keys: &str, replies: &str) -> Process {
        let config = self.config(self.admin, listener_keys, replies);
        proxy_with(&self.folder, &config)
    }

    fn dropped(&self, reason: &str) -> u64 {
        dropped(self.admin, reason)
    }

    /// What a client asked, as it came to the server.
    fn ask(&self, client: &UdpSocket, question: &[u8]) -> Asked {
        client.send_to(question, self.listener).unwrap();
        let asked = self.next();
        assert_eq!(asked.payload, question);
        assert_eq!(asked.client, client.local_addr().unwrap());
        asked
    }

    fn next(&self) -> Asked {
        let (datagram, session) = receive(&self.server);
        Asked::read(&datagram, session)
    }

    fn answer(&self, asked: &Asked, tagged: bool, answer: &[u8]) {
        let datagram = match tagged {
            true => tagged_reply(asked.client, asked.listener, asked.tag, answer),
            false => answer.to_vec(),
        };
        self.server.send_to(&datagram, asked.session).unwrap();
    }
}

struct Asked {
    client: SocketAddr,
    listener: SocketAddr,
    tag: ReplyTag,
    payload: Vec<u8>,
    /// Where it came from.
    session: SocketAddr,
}

impl Asked {
    fn read(datagram: &[u8], session: SocketAddr) -> Self {
        let (header, payload) = ppv2::decode(datagram).unwrap();
        Self {
            client: header.client().unwrap(),
            listener: header.destination().unwrap(),
            tag: header.tlvs().reply_tag().unwrap(),
            payload: payload.to_vec(),
            session,
        }
    }
}

fn tagged_reply(
    client: SocketAddr,
    listener: SocketAddr,
    tag: ReplyTag,
    payload: &[u8],
) -> Vec<u8> {
    let mut buffer = [0; ppv2::MAX_TAGGED_HEADER_LEN];
    let header = ppv2::encode_udp_tagged(client, listener, tag, &mut buffer).unwrap();
    [header, payload].concat()
}

fn unix() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    now.as_secs()
}

fn changed(tag: ReplyTag, byte: usize) -> ReplyTag {
    let mut value = *tag.value();
    value[byte] ^= 1;
    ReplyTag::from_value(&value).unwrap()
}

#[test]
fn forged_old_and_foreign_tags_lead_nowhere() {
    for sessions in [true, false] {
        let setup = Setup::new();
        let keys = format!("sessions = {sessions}\nallow = [\"127.0.0.1\"]");
        let _proxy = setup.proxy(&keys, "tagged");
        let [client, other] = [socket("127.0.0.1"), socket("127.0.0.1")];
        let denied = socket("127.0.0.9");
        let asked = setup.ask(&client, b"question");
        setup.ask(&other, b"question");
        let (at, victim) = (asked.client, other.local_addr().unwrap());
        let send = |datagram: &[u8]| _ = setup.server.send_to(datagram, asked.session).unwrap();
        let is_dropped = |reason: &str, times: u64| {
            eventually(reason, || setup.dropped(reason) == times);
        };
        let keys = TagKeys::new(KEY);
        let listener = setup.listener;
        let own = |client, listener, now| keys.tag(client, listener, now);

        for byte in 1..10 {
            let tag = changed(asked.tag, byte);
            send(&tagged_reply(at, listener, tag, b"another tag"));
        }
        // The right tag of one client with the name of another, or another listener.
        send(&tagged_reply(victim, listener, asked.tag, b"to another"));
        let elsewhere = SocketAddr::new(listener.ip(), listener.port() ^ 1);
        send(&tagged_reply(at, elsewhere, asked.tag, b"from elsewhere"));
        send(&tagged_reply(listener, at, asked.tag, b"the other way"));
        let other_key = TagKeys::new(*b"key of a foreign").tag(at, listener, unix());
        send(&tagged_reply(at, listener, other_key, b"another key"));
        is_dropped("reply_wrong_tag", 13);

        let old = own(at, listener, unix() - 2 * EPOCH.as_secs());
        send(&tagged_reply(at, listener, old, b"repeated"));
        is_dropped("reply_old_tag", 1);
        let stranger: SocketAddr = "127.0.0.1:9".parse().unwrap();
        let unknown = own(at, stranger, unix());
        send(&tagged_reply(at, stranger, unknown, b"no listener"));
        is_dropped("reply_unknown_listener", 1);
        let at_denied = denied.local_addr().unwrap();
        let tag = own(at_denied, listener, unix());
        send(&tagged_reply(at_denied, listener, tag, b"not allowed"));
        is_dropped("reply_not_allowed", 1);
        send(b"without a tag");
        send(b"");
        send(&ppv2::SIGNATURE);
        is_dropped("reply_untagged", 3);

        // As do others than the server.
        let reply = tagged_reply(at, listener, asked.tag, b"forged");
        socket("127.0.0.1").send_to(&reply, asked.session).unwrap();

        send(&tagged_reply(at, listener, asked.tag, b"true"));
        assert_eq!(receive(&client), (b"true".to_vec(), listener));
        // The tag of the epoch before or after, which is valid for half of this one.
        let into = unix() % EPOCH.as_secs();
        let neighbour = match into < EPOCH.as_secs() / 2 {
            true => unix() - EPOCH.as_secs(),
            false => unix() + EPOCH.as_secs(),
        };
        let tag = own(at, listener, neighbour);
        send(&tagged_reply(at, listener, tag, b"also true"));
        assert_eq!(receive(&client).0, b"also true");
        for one in [&client, &other, &denied] {
            receive_nothing(one);
        }
    }
}

#[test]
fn sessions_follow_a_server_that_begins_and_ceases_to_tag() {
    let setup = Setup::new();
    let _proxy = setup.proxy("", "auto");
    let clients: Vec<_> = (0..20).map(|_| socket("127.0.0.1")).collect();
    let ask_all = || -> Vec<Asked> {
        clients
            .iter()
            .map(|client| setup.ask(client, b"question"))
            .collect()
    };
    let sockets = |asked: &[Asked]| {
        let sockets: HashSet<_> = asked.iter().map(|one| one.session).collect();
        sockets.len()
    };
    let answer_all = |asked: &[Asked], tagged: bool, answer: &[u8]| {
        for one in asked {
            setup.answer(one, tagged, answer);
        }
        for client in &clients {
            assert_eq!(receive(client), (answer.to_vec(), setup.listener));
        }
    };
    // It ignores the tag: each session has a socket.
    for _ in 0..2 {
        let own = ask_all();
        assert_eq!(sockets(&own), clients.len());
        answer_all(&own, false, b"without");
    }
    let in_flight = ask_all();

    // It returns tags: by few sockets, one of each worker.
    setup.answer(&in_flight[0], true, b"the first tag");
    assert_eq!(receive(&clients[0]).0, b"the first tag");
    let shared = ask_all();
    assert!(sockets(&shared) <= 2, "{}", sockets(&shared));
    // What was asked by sockets of sessions is still answered there, with tags and without.
    for (number, (one, client)) in in_flight.iter().zip(&clients).enumerate().skip(1) {
        setup.answer(one, number % 2 == 0, b"late");
        assert_eq!(receive(client).0, b"late");
    }
    answer_all(&shared, true, b"with");

    // It is rolled back: one reply without a tag is lost.
    let in_flight = ask_all();
    assert!(sockets(&in_flight) <= 2, "{}", sockets(&in_flight));
    setup.answer(&in_flight[0], false, b"of no client");
    eventually("it to be dropped", || setup.dropped("reply_untagged") == 1);
    let own = ask_all();
    assert_eq!(sockets(&own), clients.len());
    for (one, client) in in_flight.iter().zip(&clients).skip(1) {
        setup.answer(one, true, b"in time");
        assert_eq!(receive(client).0, b"in time");
    }
    answer_all(&own, false, b"without");
    // What was tagged and came late moves no session back.
    let own = ask_all();
    assert_eq!(sockets(&own), clients.len());
    answer_all(&own, false, b"without");
    assert_eq!(setup.dropped("reply_untagged"), 1);
    for client in &clients {
        receive_nothing(client);
    }
}

/// Where a server sends its answer.
#[derive(Clone, Copy, PartialEq)]
enum Answering {
    /// To the proxy that asked.
    Asker,
    /// In turn to all proxies that it has heard of.
    AnyProxy,
}

/// Answers each datagram, with its tag, with what came.
fn serve(server: &UdpSocket, answering: Answering, stop: &AtomicBool) {
    let short = Some(Duration::from_millis(20));
    server.set_read_timeout(short).unwrap();
    let (mut proxies, mut turn): (Vec<SocketAddr>, usize) = (Vec::new(), 0);
    let mut datagram = [0; 2000];
    while !stop.load(Ordering::Relaxed) {
        let Ok((len, session)) = server.recv_from(&mut datagram) else {
            continue;
        };
        let asked = Asked::read(&datagram[..len], session);
        if !proxies.contains(&session) {
            proxies.push(session);
        }
        turn = turn.wrapping_add(7);
        let to = match answering {
            Answering::Asker => session,
            Answering::AnyProxy => proxies[turn % proxies.len()],
        };
        let reply = tagged_reply(asked.client, asked.listener, asked.tag, &asked.payload);
        // A proxy that is gone may refuse an earlier one.
        let _ = server
            .send_to(&reply, to)
            .or_else(|_| server.send_to(&reply, to));
    }
}

/// How long a client waits for an answer.
const MOMENT: Duration = Duration::from_millis(500);

/// Clients that have one datagram in flight each, one after the other.
fn churn(clients: &[UdpSocket], listener: SocketAddr, counts: &Counts, stop: &AtomicBool) {
    let mut answer = [0; 2000];
    let mut question = 0u64;
    for client in clients {
        client.set_read_timeout(Some(MOMENT)).unwrap();
    }
    while !stop.load(Ordering::Relaxed) {
        for client in clients {
            question += 1;
            let asked = format!("{} {question}", client.local_addr().unwrap());
            // Refused where no proxy listens.
            let sent = client.send_to(asked.as_bytes(), listener);
            sent.or_else(|_| client.send_to(asked.as_bytes(), listener))
                .unwrap();
            match client.recv(&mut answer) {
                Ok(len) if answer[..len] == *asked.as_bytes() => &counts.answered,
                Ok(_) => &counts.wrong,
                Err(_) => &counts.lost,
            }
            .fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[derive(Default)]
struct Counts {
    answered: AtomicU64,
    lost: AtomicU64,
    wrong: AtomicU64,
}

impl Counts {
    fn of(&self, count: impl Fn(&Self) -> &AtomicU64) -> u64 {
        count(self).load(Ordering::Relaxed)
    }

    /// Waits for so many more answers.
    fn wait_for_more(&self, more: u64) {
        let before = self.of(|counts| &counts.answered);
        eventually("more answers", || {
            self.of(|counts| &counts.answered) >= before + more
        });
    }
}

/// Runs clients and the server while `work` is done.
fn under_load(setup: &Setup, answering: Answering, work: impl FnOnce(&Counts)) -> Counts {
    let clients: Vec<_> = (0..40).map(|_| socket("127.0.0.1")).collect();
    under_load_of(setup, &clients, answering, work)
}

fn under_load_of(
    setup: &Setup,
    clients: &[UdpSocket],
    answering: Answering,
    work: impl FnOnce(&Counts),
) -> Counts {
    let [stop, stop_server] = [(); 2].map(|()| AtomicBool::new(false));
    let counts = Counts::default();
    thread::scope(|scope| {
        // Also where an assertion fails.
        let _stop_server = Stop(&stop_server);
        scope.spawn(|| serve(&setup.server, answering, &stop_server));
        // Before the server, which has questions to answer.
        thread::scope(|scope| {
            let _stop = Stop(&stop);
            for share in clients.chunks(10) {
                let (counts, stop) = (&counts, &stop);
                scope.spawn(move || churn(share, setup.listener, counts, stop));
            }
            work(&counts);
        });
    });
    counts
}

/// Says that it is over when it is dropped.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn kill_and_restart_lose_what_is_in_flight_alone() {
    for keys in ["", "sessions = false"] {
        let setup = Setup::new();
        let mut proxy = Some(setup.proxy(keys, "tagged"));
        let counts = under_load(&setup, Answering::Asker, |counts| {
            for _ in 0..3 {
                counts.wait_for_more(500);
                // Killed without a warning.
                drop(proxy.take());
                proxy = Some(setup.proxy(keys, "tagged"));
                // What was asked while none ran has been waited for.
                thread::sleep(2 * MOMENT);
                let lost = counts.of(|counts| &counts.lost);
                counts.wait_for_more(2000);
                assert_eq!(counts.of(|counts| &counts.lost), lost);
            }
        });
        let of = |count: fn(&Counts) -> &AtomicU64| counts.of(count);
        println!(
            "{} answered, {} lost at three restarts",
            of(|c| &c.answered),
            of(|c| &c.lost)
        );
        assert_eq!(of(|counts| &counts.wrong), 0);
    }
}

/// A second host for the proxy, with the same listener address, to which the router leads
/// if it is told so.
const SECOND_HOST: &str = "
ip netns add proxy2
ip -n proxy2 link set lo up
ip -n proxy2 addr add 198.51.100.10/32 dev lo
link() { ip link add $2 netns $1 type veth peer name $5 netns $4
    ip -n $1 addr add $3 dev $2; ip -n $1 link set $2 up
    ip -n $4 addr add $6 dev $5; ip -n $4 link set $5 up; }
link proxy2 pub 198.51.101.10/24 router rp2 198.51.101.1/24
link proxy2 priv 10.0.1.1/24 server s1 10.0.1.2/24
ip -n proxy2 route add 10.0.0.2 via 10.0.1.2
ip -n proxy2 route add default via 198.51.101.1
ip netns exec router sh -ec 'for file in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 0 >$file; done'
";

#[test]
fn replicas_with_one_key_pass_each_others_datagrams_both_ways() {
    let Some(lab) = Lab::enter(test_name!(), Side::Private) else {
        return;
    };
    lab.sh("router", SECOND_HOST);
    let setup = Setup {
        folder: tempfile::tempdir().unwrap(),
        listener: Family::V4.listener(),
        admin: "127.0.0.1:9901".parse().unwrap(),
        server: lab.at("server", || bind(Family::V4.server())),
    };
    let replicas = ["proxy", "proxy2"];
    let _proxies = replicas.map(|host| lab.at(host, || setup.proxy("sessions = false", "tagged")));
    let client = |host| lab.at(host, || bind(SocketAddr::new(host_ip(host), 0)));
    let clients: Vec<_> = (0..20)
        .flat_map(|_| ["client1", "client2"].map(client))
        .collect();
    let replied = |host| {
        let name = "ppv2_reply_datagrams_total{listener=\"listener1\"}";
        lab.at(host, || metric(setup.admin, name))
    };
    let counts = under_load_of(&setup, &clients, Answering::AnyProxy, |counts| {
        for _ in 0..10 {
            lab.sh(
                "router",
                "ip route replace 198.51.100.10/32 via 198.51.101.10",
            );
            counts.wait_for_more(200);
            lab.sh("router", "ip route del 198.51.100.10/32");
            counts.wait_for_more(200);
        }
    });
    let of = |count: fn(&Counts) -> &AtomicU64| counts.of(count);
    let by = replicas.map(replied);
    println!("{} answered, by {by:?}", of(|c| &c.answered));
    assert_eq!((of(|c| &c.lost), of(|c| &c.wrong)), (0, 0));
    assert!(by.iter().all(|count| *count > 500), "{by:?}");
}

fn host_ip(host: &str) -> std::net::IpAddr {
    Family::V4.client(if host == "client1" { 1 } else { 2 })
}
