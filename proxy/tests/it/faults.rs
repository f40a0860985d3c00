//! Servers that refuse, resources that run out, clients that flood: counted
//! under a name of their own, and everybody else is served on.

use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::time::Duration;

use ppv2_lab::*;
use socket2::{Domain, Protocol, Socket, Type};

/// Datagrams that come before there are none for half a second.
fn count_waiting(server: &UdpSocket) -> u64 {
    let short = Some(Duration::from_millis(500));
    server.set_read_timeout(short).unwrap();
    let count = std::iter::from_fn(|| server.recv(&mut [0; 100]).ok()).count();
    server.set_read_timeout(Some(TIMEOUT)).unwrap();
    count as u64
}

#[test]
fn a_server_that_refuses_loses_no_later_datagram_and_no_session() {
    // The host's kernel reports a bounded number of refusals a second, to all tests together.
    if !namespace::enter(test_name!(), "") {
        return;
    }
    let server_address = address("127.0.0.1");
    let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
    let more = ["--admin", &admin.to_string()];
    let mut proxy = proxy_between(listener, server_address, &more);
    let client = socket("127.0.0.1");
    for _ in 0..5 {
        client.send_to(b"to nobody", listener).unwrap();
        std::thread::sleep(Duration::from_millis(20));
    }
    receive_nothing(&client);
    let refusals = format!(
        "ppv2_upstream_icmp_errors_total{{upstream=\"upstream\",server=\"{server_address}\"}}"
    );
    eventually("a refusal", || metric(admin, &refusals) > 0);
    proxy.wait_for("server refuses datagrams");

    // It comes up, and the very next datagram arrives, in the same session.
    let server = bind(server_address);
    served(&client, listener, &server);
    let opened = "ppv2_sessions_opened_total{listener=\"listener1\"}";
    assert_eq!(metric(admin, opened), 1);
    for reason in ["send_failed", "unreachable", "send_buffer_full"] {
        assert_eq!(dropped(admin, reason), 0, "{reason}");
    }
}

#[test]
fn one_dead_server_does_not_harm_the_sessions_of_another() {
    let (dead, server) = (address("127.0.0.1"), socket("127.0.0.1"));
    let listener = address("127.0.0.1");
    let upstream = [dead.to_string(), server.local_addr().unwrap().to_string()];
    let listen = listener.to_string();
    let servers = ["--upstream", &upstream[0], "--upstream", &upstream[1]];
    let start = [
        &[
            "--workers",
            "1",
            "--balance",
            "round_robin",
            "--listen",
            &listen,
        ],
        &servers[..],
    ]
    .concat();
    let _proxy = proxy(&start);
    let (unlucky, lucky) = (socket("127.0.0.1"), socket("127.0.0.1"));
    unlucky.send_to(b"first turn", listener).unwrap();
    for _ in 0..200 {
        unlucky.send_to(b"to nobody", listener).unwrap();
        served(&lucky, listener, &server);
    }
    receive_nothing(&unlucky);
}

#[test]
fn a_flood_of_new_clients_is_refused_and_old_sessions_go_on() {
    let server = socket("127.0.0.1");
    let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
    let more = ["--max-sessions", "3", "--admin", &admin.to_string()];
    let mut proxy = proxy_between(listener, server.local_addr().unwrap(), &more);
    let old: Vec<_> = (0..3).map(|_| socket("127.0.0.1")).collect();
    for client in &old {
        served(client, listener, &server);
    }
    for _ in 0..100 {
        socket("127.0.0.1").send_to(b"flood", listener).unwrap();
    }
    for client in &old {
        served(client, listener, &server);
    }
    eventually("100 refusals", || dropped(admin, "max_sessions") == 100);
    proxy.wait_for("reason=\"max_sessions\"");
    proxy.wait_for("nearly all sessions are in use");
    let told = proxy.log().matches("reason=\"max_sessions\"").count();
    assert!(told <= 2, "{told} lines for one flood");
    receive_nothing(&server);
}

#[test]
fn no_descriptors_left_costs_new_clients_only() {
    let server = socket("127.0.0.1");
    let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
    let more = ["--workers", "1", "--admin", &admin.to_string()];
    let mut proxy = proxy_between(listener, server.local_addr().unwrap(), &more);
    // Asked for before descriptors run out, since asking takes one.
    assert_eq!(dropped(admin, "no_descriptors"), 0);
    // Only the user that it has become may lower its limit.
    let pid = proxy.pid().to_string();
    let lower = ["prlimit", "--nofile=40", "--pid", &pid];
    let become_nobody = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
    ];
    let lower = match rustix::process::geteuid().is_root() {
        true => [&become_nobody[..], &lower].concat(),
        false => lower.to_vec(),
    };
    let lowered = Command::new(lower[0]).args(&lower[1..]).status();
    assert!(lowered.unwrap().success());
    let clients: Vec<_> = (0..60).map(|_| socket("127.0.0.1")).collect();
    for client in &clients {
        client.send_to(b"hello", listener).unwrap();
    }
    let passed = count_waiting(&server);
    assert!(
        (10..40).contains(&passed),
        "{passed} sessions with 40 descriptors"
    );
    served(&clients[0], listener, &server);
    proxy.wait_for("reason=\"no_descriptors\"");
    assert!(!proxy.has_ended());
}

/// However many sessions are configured, the admin address has the descriptors for all its
/// connections.
#[test]
fn sessions_leave_the_admin_address_its_descriptors() {
    let server = socket("127.0.0.1");
    let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
    let script = format!(
        "ulimit -n 200; exec \"$0\" run --workers 1 --max-sessions 1000 \
         --listen {listener} --upstream {} --admin {admin}",
        server.local_addr().unwrap()
    );
    let mut proxy = Process::start(Command::new("sh").args(["-c", &script]).arg(binary()));
    proxy.wait_for("ready");
    let allowed = metric(admin, "ppv2_sessions_max");
    let told = format!("max_sessions is 1000, open files allow {allowed}, so {allowed} apply");
    assert!(proxy.log().contains(&told), "{told}\n{}", proxy.log());
    let clients: Vec<_> = (0..200).map(|_| socket("127.0.0.1")).collect();
    for client in &clients {
        client.send_to(b"hello", listener).unwrap();
    }
    eventually("a refusal of each beyond", || {
        dropped(admin, "max_sessions") == 200 - allowed
    });
    // As many as it takes at a time, of which each waits for a request.
    let waiting: Vec<_> = (0..31)
        .map(|_| TcpStream::connect(admin).unwrap())
        .collect();
    for _ in 0..3 {
        assert_eq!(dropped(admin, "no_descriptors"), 0);
    }
    assert_eq!(
        metric(admin, "ppv2_sessions{listener=\"listener1\"}"),
        allowed
    );
    drop(waiting);
    assert_eq!(count_waiting(&server), allowed);
    served(&clients[0], listener, &server);
}

#[test]
fn no_local_ports_left_costs_new_clients_only() {
    let setup = "echo 40000 40009 > /proc/sys/net/ipv4/ip_local_port_range";
    if !namespace::enter(test_name!(), setup) {
        return;
    }
    let (server_address, listener) = (address("127.0.0.1"), address("127.0.0.1"));
    let (server, admin) = (bind(server_address), address("127.0.0.1"));
    // Of several workers, another one could have all ports before the first
    // client's has one.
    let admin_address = admin.to_string();
    let more = [
        &["--workers", "1", "--max-sessions", "1000"][..],
        &["--admin", &admin_address],
    ];
    let proxy = proxy_between(listener, server_address, &more.concat());
    assert!(
        proxy.log().contains("local ports allow 10"),
        "{}",
        proxy.log()
    );
    let clients: Vec<_> = (0..30).map(|_| bind(address("127.0.0.1"))).collect();
    for client in &clients {
        client.send_to(b"hello", listener).unwrap();
    }
    let passed = count_waiting(&server);
    assert!(
        (1..=10).contains(&passed),
        "{passed} sessions with 10 ports"
    );
    assert_eq!(dropped(admin, "no_ports") + passed, 30);
    served(&clients[0], listener, &server);
}

/// Neither a broadcast address nor one of a family that the host is without can be
/// connected to, which must not pass for a host that has run out of ports.
#[test]
fn unreachable_servers_harm_no_other_upstream() {
    let setup = "echo 1 > /proc/sys/net/ipv6/conf/lo/disable_ipv6\n\
                 ip address add 198.51.100.1/24 brd + dev lo";
    if !namespace::enter(test_name!(), setup) {
        return;
    }
    let [good, bad, admin] = [(); 3].map(|()| address("127.0.0.1"));
    let server = bind(address("127.0.0.1"));
    let folder = tempfile::tempdir().unwrap();
    let _proxy = proxy_with(
        &folder,
        &format!(
            "workers = 1\n[admin]\nlisten = \"{admin}\"\n\
             [[listener]]\nname = \"good\"\nbind = [\"{good}\"]\nupstream = \"good\"\nresponses = 1\n\
             [[listener]]\nname = \"bad\"\nbind = [\"{bad}\"]\nupstream = \"bad\"\n\
             [upstream.good]\nservers = [\"{}\"]\n\
             [upstream.bad]\nbalance = \"round_robin\"\n\
             servers = [\"198.51.100.255:9\", \"[2001:db8::5]:9\"]\n",
            server.local_addr().unwrap()
        ),
    );
    for _ in 0..20 {
        served(&socket("127.0.0.1"), good, &server);
        for _ in 0..2 {
            socket("127.0.0.1").send_to(b"to nobody", bad).unwrap();
        }
        served(&socket("127.0.0.1"), good, &server);
    }
    let of_bad = "ppv2_dropped_datagrams_total{listener=\"bad\",reason=\"unreachable\"}";
    eventually("all to be dropped", || metric(admin, of_bad) == 40);
    // Sessions that have ended keep their ports from others.
    assert_eq!(metric(admin, "ppv2_resting_ports_reclaimed_total"), 0);
}

#[test]
fn source_addresses_share_the_sessions_and_each_has_its_own_ports() {
    let setup = "echo 40000 40009 > /proc/sys/net/ipv4/ip_local_port_range";
    if !namespace::enter(test_name!(), setup) {
        return;
    }
    let (server, listener) = (bind(address("127.0.0.1")), address("127.0.0.1"));
    let folder = tempfile::tempdir().unwrap();
    let proxy = proxy_with(
        &folder,
        &format!(
            "workers = 1\n[[listener]]\nbind = [\"{listener}\"]\nupstream = \"u\"\n\
             [upstream.u]\nsource = [\"127.0.0.5\", \"127.0.0.6\", \"127.0.0.7\"]\n\
             servers = [\"{}\"]\n",
            server.local_addr().unwrap()
        ),
    );
    assert!(proxy.log().contains("max_sessions=29"), "{}", proxy.log());
    let clients: Vec<_> = (0..27).map(|_| bind(address("127.0.0.1"))).collect();
    let mut sessions = std::collections::BTreeMap::new();
    for client in &clients {
        client.send_to(b"question", listener).unwrap();
        let (_, session) = receive(&server);
        server.send_to(b"answer", session).unwrap();
        assert_eq!(receive(client), (b"answer".to_vec(), listener));
        *sessions.entry(session.ip().to_string()).or_insert(0) += 1;
    }
    assert_eq!(sessions.len(), 3, "{sessions:?}");
    assert!(sessions.values().all(|n| *n >= 7), "{sessions:?}");
}

#[test]
fn sessions_end_when_idle() {
    let server = socket("127.0.0.1");
    let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
    let more = ["--idle-timeout", "200ms", "--admin", &admin.to_string()];
    let _proxy = proxy_between(listener, server.local_addr().unwrap(), &more);
    let client = socket("127.0.0.1");
    served(&client, listener, &server);
    let ended = "ppv2_sessions_ended_total{listener=\"listener1\",reason=\"idle\"}";
    eventually("the end", || metric(admin, ended) == 1);
    let sessions = "ppv2_sessions{listener=\"listener1\"}";
    assert_eq!(metric(admin, sessions), 0);
    served(&client, listener, &server);
    assert_eq!(metric(admin, sessions), 1);
}

#[test]
fn requests_begin_a_new_session_after_n_datagrams() {
    let server = socket("127.0.0.1");
    let listener = address("127.0.0.1");
    let _proxy = proxy_between(listener, server.local_addr().unwrap(), &["--requests", "2"]);
    let client = socket("127.0.0.1");
    let mut from = Vec::new();
    for _ in 0..4 {
        client.send_to(b"x", listener).unwrap();
        from.push(receive(&server).1);
    }
    assert_eq!(from[0], from[1]);
    assert_ne!(from[1], from[2]);
    assert_eq!(from[2], from[3]);
    // Replies of both sessions reach the client.
    for session in [from[0], from[2]] {
        server.send_to(b"y", session).unwrap();
        assert_eq!(receive(&client), (b"y".to_vec(), listener));
    }
}

#[test]
fn dont_fragment_drops_what_exceeds_the_path_and_says_what_would_fit() {
    let setup = "ip link add name va mtu 1280 type veth peer name vb; ip link set va up; ip link set vb up
                 ip addr add 10.7.0.1/24 dev va; ip neigh add 10.7.0.2 lladdr 02:00:00:00:00:02 dev va";
    if !namespace::enter(test_name!(), setup) {
        return;
    }
    for (df, drops) in [(true, 1), (false, 0)] {
        let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
        let folder = tempfile::tempdir().unwrap();
        let mut proxy = proxy_with(
            &folder,
            &format!(
                "[admin]\nlisten = \"{admin}\"\n\
                 [[listener]]\nbind = [\"{listener}\"]\nupstream = \"u\"\ndont_fragment = {df}\n\
                 [upstream.u]\nservers = [\"10.7.0.2:9000\"]\n"
            ),
        );
        let client = socket("127.0.0.1");
        for len in [1280 - 28 - 28, 1280 - 28 - 28 + 1] {
            client.send_to(&vec![0; len], listener).unwrap();
        }
        let sent = "ppv2_upstream_datagrams_total{upstream=\"u\",server=\"10.7.0.2:9000\"}";
        eventually("both to be handled", || metric(admin, sent) + drops == 2);
        assert_eq!(dropped(admin, "oversize"), drops);
        if df {
            proxy.wait_for("fits=1224");
        }
    }
}

#[test]
fn drops_by_full_kernel_buffers_are_counted() {
    let (server, listener) = (socket("127.0.0.1"), address("127.0.0.1"));
    let (upstream, admin) = (server.local_addr().unwrap(), address("127.0.0.1"));
    let more = ["--workers", "1", "--admin", &admin.to_string()];
    let proxy = proxy_between(listener, upstream, &more);
    let client = socket("127.0.0.1");
    client.send_to(b"first", listener).unwrap();
    let (_, session) = receive(&server);
    let totals = || {
        let of_listener = |name: &str| metric(admin, &format!("{name}{{listener=\"listener1\"}}"));
        let labels = format!("{{upstream=\"upstream\",server=\"{upstream}\"}}");
        let of_server = |name: &str| metric(admin, &format!("{name}{labels}"));
        (
            of_listener("ppv2_client_datagrams_total"),
            of_listener("ppv2_receive_overflows_total"),
            of_server("ppv2_upstream_reply_datagrams_total"),
            of_server("ppv2_upstream_receive_overflows_total"),
        )
    };
    const FLOOD: u64 = 1000;
    proxy.pause();
    for _ in 0..FLOOD {
        client.send_to(&[0; 9000], listener).unwrap();
        server.send_to(&[0; 9000], session).unwrap();
    }
    proxy.signal("CONT");
    // The kernel tells of drops with what it takes in after them.
    eventually("the buffers to be emptied", || {
        let before = totals();
        std::thread::sleep(Duration::from_millis(100));
        before.0 > 1 && before.2 > 0 && totals() == before
    });
    client.send_to(b"last", listener).unwrap();
    server.send_to(b"last", session).unwrap();
    eventually("all to be accounted for", || {
        let (requests, lost_requests, replies, lost_replies) = totals();
        assert!(requests + lost_requests <= FLOOD + 2 && replies + lost_replies <= FLOOD + 1);
        requests + lost_requests == FLOOD + 2 && replies + lost_replies == FLOOD + 1
    });
    let (_, lost_requests, _, lost_replies) = totals();
    assert!(
        lost_requests > 0 && lost_replies > 0,
        "no buffer overflowed"
    );
}

#[test]
fn forged_source_starts_no_endless_exchange() {
    // Forging takes a raw socket, which a namespace of one's own allows.
    if !namespace::enter(test_name!(), "") {
        return;
    }
    let (server, other) = (socket("127.0.0.1"), address("127.0.0.1"));
    let (wildcard, admin) = (address("0.0.0.0"), address("127.0.0.1"));
    let [a, b, upstream, admin_text] =
        [wildcard, other, server.local_addr().unwrap(), admin].map(|a| a.to_string());
    let flags = [
        "--listen",
        &a,
        "--listen",
        &b,
        "--upstream",
        &upstream,
        "--admin",
        &admin_text,
    ];
    let _proxy = proxy(&flags);
    let target = SocketAddr::new(other.ip(), wildcard.port());
    // With a wildcard, any address of the host would come back.
    let elsewhere = SocketAddr::new([127, 0, 0, 3].into(), wildcard.port());
    let forged = [target, other, server.local_addr().unwrap(), elsewhere];
    for (n, source) in (1..).zip(forged) {
        forge(source, target);
        eventually("the drop", || dropped(admin, "bad_source") == n);
    }
    receive_nothing(&server);
    served(&socket("127.0.0.1"), target, &server);
}

#[test]
fn forged_icmp_errors_lose_no_datagram() {
    if !namespace::enter(test_name!(), "") {
        return;
    }
    let (server, listener) = (socket("127.0.0.1"), address("127.0.0.1"));
    let upstream = server.local_addr().unwrap();
    let proxy = proxy_between(listener, upstream, &["--workers", "1"]);
    let client = socket("127.0.0.1");
    client.send_to(b"question", listener).unwrap();
    let (_, session) = receive(&server);
    // Every code that a host or a router may send.
    for code in 0..=15 {
        // Stopped, so that error and datagram are met in one round.
        proxy.pause();
        client.send_to(&[code], listener).unwrap();
        forge_unreachable(code, session, upstream);
        proxy.signal("CONT");
        assert_eq!(read_header(&receive(&server).0).2, [code]);
    }
    server.send_to(b"answer", session).unwrap();
    assert_eq!(receive(&client), (b"answer".to_vec(), listener));
}

/// Tells the kernel that a datagram from `from` to `to` did not arrive.
fn forge_unreachable(code: u8, from: SocketAddr, to: SocketAddr) {
    let (SocketAddr::V4(from), SocketAddr::V4(to)) = (from, to) else {
        panic!("IPv4 only");
    };
    // RFC 792: type 3, code, checksum, four unused bytes (the next hop's MTU
    // for code 4), then the IP header and first 8 bytes of what did not arrive.
    let mut message = vec![3, code, 0, 0, 0, 0, 0xff, 0xff];
    message.extend([0x45, 0, 0, 100, 0, 1, 0, 0, 64, 17, 0, 0]);
    message.extend(from.ip().octets());
    message.extend(to.ip().octets());
    for field in [from.port(), to.port(), 80, 0] {
        message.extend(field.to_be_bytes());
    }
    let words = message.as_chunks::<2>().0.iter();
    let sum: u32 = words.map(|word| u32::from(u16::from_be_bytes(*word))).sum();
    let folded = u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    message[2..4].copy_from_slice(&(!folded).to_be_bytes());
    let raw = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4)).unwrap();
    let target = SocketAddr::from((*from.ip(), 0));
    raw.send_to(&message, &target.into()).unwrap();
}

/// Sends a datagram that says it comes from `source`.
fn forge(source: SocketAddr, target: SocketAddr) {
    let (SocketAddr::V4(from), SocketAddr::V4(to)) = (source, target) else {
        panic!("IPv4 only");
    };
    // Length, id and checksum of the IP header are the kernel's to fill in
    // (raw(7)); a UDP checksum of 0 means none.
    let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0];
    packet.extend(from.ip().octets());
    packet.extend(to.ip().octets());
    for field in [from.port(), to.port(), 8 + 6, 0] {
        packet.extend(field.to_be_bytes());
    }
    packet.extend(b"forged");
    let raw = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(255))).unwrap();
    raw.set_header_included_v4(true).unwrap();
    raw.send_to(&packet, &target.into()).unwrap();
}

#[test]
fn replies_from_another_port_are_reported() {
    for ip in ["127.0.0.1", "::1"] {
        let (asked, other, client) = (socket(ip), socket(ip), socket(ip));
        let listener = address(ip);
        let proxy = proxy_between(listener, asked.local_addr().unwrap(), &[]);
        served(&client, listener, &asked);
        eventually("the word of it", || {
            client.send_to(b"question", listener).unwrap();
            let (_, session) = receive(&asked);
            other.send_to(b"answer", session).unwrap();
            let told = "seems to answer from another address or port";
            proxy.log().contains(told)
        });
        receive_nothing(&client);
    }
}
