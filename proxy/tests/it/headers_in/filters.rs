//! Lists, limits, sessions and the way back go by the client that the header names, and the
//! sender is named beside it.

use ppv2_lab::senders::{Says, Session};
use ppv2_lab::*;

use super::*;

fn session(client: &str) -> Session {
    Session::new(SENDER, Says::Every, addr(client), addr(VIP))
}

#[test]
fn allow_and_deny_are_about_the_client() {
    // The sender is in none of the networks, and in one that is denied.
    let lists = "allow = [\"203.0.113.0/24\"]\ndeny = [\"203.0.113.12\", \"127.0.0.0/8\"]";
    let it = In::with("", lists, "");
    let [mut allowed, mut denied, mut other] =
        [CLIENT, OTHER_CLIENT, "192.0.2.7:1000"].map(session);
    for _ in 0..3 {
        denied.send(it.listener, b"denied");
        other.send(it.listener, b"not allowed");
        allowed.send(it.listener, b"allowed");
        it.gets(allowed.client, allowed.destination, b"allowed");
    }
    it.eventually_dropped("not_allowed", 6);
    receive_nothing(&it.server);
}

#[test]
fn one_clients_rate_is_no_others() {
    let it = In::with("", "per_client = { rate = 1, burst = 3 }", "");
    // By one port of the sender's, which takes turns.
    let mut sender = session(CLIENT);
    for _ in 0..3 {
        sender.send(it.listener, b"in time");
        it.gets(addr(CLIENT), addr(VIP), b"in time");
    }
    for _ in 0..20 {
        sender.send(it.listener, b"too much");
    }
    eventually("the limit", || it.dropped("client_rate") >= 10);
    sender.becomes(addr(OTHER_CLIENT));
    sender.send(it.listener, b"another client");
    eventually("the other client's", || it.next().0 == addr(OTHER_CLIENT));
}

#[test]
fn one_clients_sessions_are_no_others() {
    let it = In::with("", "per_client = { sessions = 2 }", "");
    let ports = ["203.0.113.11:1", "203.0.113.11:2", "203.0.113.11:3"];
    for (number, client) in ports.into_iter().enumerate() {
        session(client).send(it.listener, b"hello");
        if number < 2 {
            it.gets(addr(client), addr(VIP), b"hello");
        }
    }
    it.eventually_dropped("client_sessions", 1);
    session(OTHER_CLIENT).send(it.listener, b"hello");
    it.gets(addr(OTHER_CLIENT), addr(VIP), b"hello");
}

#[test]
fn replies_leave_from_the_address_that_the_sender_wrote_to() {
    let server = socket("127.0.0.1");
    let port = port();
    let of_listener = accept(SENDER, "");
    let to = server.local_addr().unwrap();
    let config = config(addr(&format!("0.0.0.0:{port}")), to, &of_listener, "");
    let _proxy = Proxy::start(&config);
    // The same client, destination and sender, by two addresses of the listener.
    let mut sender = session(CLIENT);
    let mut sessions = Vec::new();
    for ip in ["127.0.0.1", "127.77.0.1"] {
        let asked = addr(&format!("{ip}:{port}"));
        sender.send(asked, b"question");
        let (datagram, from) = receive(&server);
        let (client, destination, _) = read_plain_header(&datagram);
        assert_eq!((client, destination), (addr(CLIENT), addr(VIP)));
        sessions.push((from, asked));
    }
    for (from, asked) in sessions.into_iter().rev() {
        server.send_to(b"answer", from).unwrap();
        assert_eq!(sender.receive(), (b"answer".to_vec(), asked));
    }
}

#[test]
fn each_port_of_a_sender_is_a_way_of_its_own() {
    let it = In::start("");
    let mut senders = [CLIENT; 3].map(session);
    let sessions = senders.each_mut().map(|sender| {
        sender.send(it.listener, b"question");
        it.gets(addr(CLIENT), addr(VIP), b"question")
    });
    for (number, from) in sessions.iter().enumerate().rev() {
        it.answers(*from, format!("answer {number}").as_bytes());
    }
    for (number, sender) in senders.iter().enumerate() {
        let answer = format!("answer {number}").into_bytes();
        assert_eq!(sender.receive(), (answer, it.listener));
        receive_nothing(&sender.socket);
    }
}

/// As dnsdist does it: the latest header of a port says the client of what follows, and each
/// client is still answered.
#[test]
fn clients_that_share_a_senders_port_are_all_answered() {
    let it = In::start("");
    let mut sender = session(CLIENT);
    let mut asked = Vec::new();
    for round in 0..2 {
        for number in 1..=20 {
            let client = addr(&format!("203.0.113.{number}:53"));
            sender.becomes(client);
            sender.send(it.listener, client.to_string().as_bytes());
            let from = it.gets(client, addr(VIP), client.to_string().as_bytes());
            asked.push((from, format!("{client} {round}")));
        }
    }
    let sessions: std::collections::HashSet<_> = asked.iter().map(|(from, _)| *from).collect();
    assert_eq!(sessions.len(), 20);
    for (from, answer) in asked.iter().rev() {
        it.answers(*from, answer.as_bytes());
        assert_eq!(sender.receive(), (answer.clone().into_bytes(), it.listener));
    }
    assert_eq!(all_dropped(&it.proxy), []);
}

/// One server for a client, whichever ports of whichever senders it comes by.
#[test]
fn servers_are_chosen_by_the_client() {
    let (listener, servers) = (address("127.0.0.1"), [(); 2].map(|()| socket("127.0.0.1")));
    let [first, second] = servers
        .each_ref()
        .map(|server| server.local_addr().unwrap());
    let from = format!("accept = {{ from = [\"{SENDER}\", \"{STRANGER}\"] }}");
    let both = config(listener, first, &from, "").replace(
        &format!("\"{first}\""),
        &format!("\"{first}\", \"{second}\""),
    );
    let _proxy = Proxy::start(&both);
    for server in &servers {
        let short = std::time::Duration::from_millis(5);
        server.set_read_timeout(Some(short)).unwrap();
    }
    let mut used = std::collections::HashSet::new();
    for number in 1..=16 {
        let client = addr(&format!("203.0.113.{number}:53"));
        let mut of_client = std::collections::HashSet::new();
        for ip in [SENDER, STRANGER, SENDER, STRANGER] {
            Session::new(ip, Says::Every, client, addr(VIP)).send(listener, b"which?");
            let mut datagram = [0; 200];
            eventually("a datagram", || {
                let heard = |server: &UdpSocket| server.recv_from(&mut datagram).is_ok();
                let number = servers.iter().position(heard);
                of_client.extend(number);
                number.is_some()
            });
        }
        assert_eq!(of_client.len(), 1, "{client} has several servers");
        used.extend(of_client);
    }
    assert_eq!(used.len(), 2);
}

/// Sessions take `requests` datagrams each, also of a burst that comes in one piece.
#[test]
fn requests_and_responses_are_counted_by_client() {
    let it = In::with("", "requests = 2\nresponses = 1", "");
    let sender = crate::bursts::Peer::new(socket(SENDER));
    let [one, other] = [CLIENT, OTHER_CLIENT]
        .map(|client| fake_proxy::from_client_at(addr(client), addr(VIP), b"question"));
    let burst = [&one, &one, &other, &one, &one, &other].map(|datagram| &datagram[..]);
    sender.send(it.listener, &burst.concat(), one.len());
    let mut sessions = std::collections::BTreeMap::<_, Vec<_>>::new();
    for _ in burst {
        let (client, _, payload, from) = it.next();
        assert_eq!(payload, b"question");
        sessions.entry((client, from)).or_default().push(payload);
    }
    let of = |client: &str| {
        let client = addr(client);
        let counts = sessions.iter().filter(|((of, _), _)| *of == client);
        counts
            .map(|(_, datagrams)| datagrams.len())
            .collect::<Vec<_>>()
    };
    assert_eq!((of(CLIENT), of(OTHER_CLIENT)), (vec![2, 2], vec![2]));
    for (_, session) in sessions.keys() {
        it.answers(*session, b"answer");
        it.answers(*session, b"answer");
    }
    eventually("all sessions to end", || it.count("ppv2_sessions") == 0);
}

/// The bytes of headers are the sender's: what a client sent is its payload.
#[test]
fn amplification_is_of_payload() {
    let limit = "amplification = { limit = 10, action = \"enforce\" }";
    let it = In::with("", limit, "");
    let mut sender = session(CLIENT);
    sender.send(it.listener, &[1; 10]);
    let way = it.gets(addr(CLIENT), addr(VIP), &[1; 10]);
    it.answers(way, &[2; 101]);
    it.eventually_dropped("reply_amplified", 1);
    it.answers(way, &[2; 100]);
    assert_eq!(sender.receive().0, [2; 100]);
    assert_eq!(it.count("ppv2_client_bytes_total"), 10);
}

#[test]
fn sessions_name_the_sender() {
    let it = In::with("direct = \"accept\"", "", "");
    let mut sender = session(CLIENT);
    sender.send(it.listener, b"by a sender");
    it.gets(addr(CLIENT), addr(VIP), b"by a sender");
    let direct = socket(STRANGER);
    direct.send_to(b"direct", it.listener).unwrap();
    it.gets(direct.local_addr().unwrap(), it.listener, b"direct");
    let (status, sessions) = http_get(it.proxy.admin, "/sessions");
    assert_eq!(status, 200);
    let named = format!("\"proxy\":\"{}\"", sender.address());
    let of = |client: &SocketAddr| {
        let client = format!("\"client\":\"{client}\"");
        let mut entries = sessions.split('{').filter(|entry| entry.contains(&client));
        entries
            .next()
            .unwrap_or_else(|| panic!("{client}: {sessions}"))
    };
    assert!(of(&addr(CLIENT)).contains(&named), "{sessions}");
    let direct = of(&direct.local_addr().unwrap());
    assert!(!direct.contains("\"proxy\":\""), "{sessions}");
}

/// A client of IPv4 that a header writes as one of IPv6.
#[test]
fn a_mapped_client_is_one_of_ipv4() {
    let it = In::with("", "allow = [\"203.0.113.0/24\"]", "");
    let sender = socket(SENDER);
    for (client, destination, to) in [
        (
            "[::ffff:203.0.113.11]:54321",
            "[::ffff:198.51.100.10]:9000",
            VIP,
        ),
        ("[::ffff:203.0.113.11]:54321", VIP_V6, VIP_V6),
    ] {
        let mut block = Vec::new();
        let ends = [client, destination].map(|end| end.parse::<std::net::SocketAddrV6>().unwrap());
        block.extend(ends.iter().flat_map(|end| end.ip().octets()));
        block.extend(ends.iter().flat_map(|end| end.port().to_be_bytes()));
        let mut datagram = [&ppv2::SIGNATURE[..], &[0x21, 0x22, 0, 36]].concat();
        datagram.extend(block);
        datagram.extend(b"mapped");
        sender.send_to(&datagram, it.listener).unwrap();
        let (seen, destination, payload, _) = it.next();
        let seen = SocketAddr::new(seen.ip().to_canonical(), seen.port());
        assert_eq!((seen, destination), (addr(CLIENT), addr(to)));
        assert_eq!(payload, b"mapped");
    }
    assert_eq!(all_dropped(&it.proxy), []);
}

/// Headers are read where they are accepted, and by no other listener of the process.
#[test]
fn each_listener_accepts_for_itself() {
    let (with, without, server) = (
        address("127.0.0.1"),
        address("127.0.0.1"),
        socket("127.0.0.1"),
    );
    let to = server.local_addr().unwrap();
    let both = config(with, to, &accept(SENDER, ""), "");
    let other =
        format!("[[listener]]\nname = \"other\"\nbind = [\"{without}\"]\nupstream = \"u\"\n");
    let _proxy = Proxy::start(&format!("{other}{both}"));
    let mut sender = session(CLIENT);
    let datagram = sender.datagrams(b"question").remove(0);
    for _ in 0..3 {
        sender.send(with, b"question");
        let (client, _, payload) = read_plain_header(&receive(&server).0);
        assert_eq!((client, payload), (addr(CLIENT), b"question".to_vec()));
        sender.send(without, b"question");
        let (client, destination, payload) = read_plain_header(&receive(&server).0);
        assert_eq!((client, destination), (sender.address(), without));
        assert_eq!(payload, datagram);
    }
}

#[test]
fn replies_in_flight_go_back_by_the_sender_while_the_proxy_stops() {
    let mut it = In::start("remember = {}");
    let mut sender = Session::new(SENDER, Says::First, addr(CLIENT), addr(VIP));
    sender.send(it.listener, b"question");
    let way = it.gets(addr(CLIENT), addr(VIP), b"question");
    it.proxy.process.signal("TERM");
    it.proxy.process.wait_for("shutting down");
    it.answers(way, b"answer");
    assert_eq!(sender.receive(), (b"answer".to_vec(), it.listener));
    assert!(it.proxy.process.wait().0.success());
}

#[test]
fn a_reload_changes_who_is_trusted() {
    let it = In::start("remember = {}");
    let to = it.server.local_addr().unwrap();
    let reload = |of_listener: &str| it.proxy.reload(&config(it.listener, to, of_listener, ""));
    let mut sender = Session::new(SENDER, Says::First, addr(CLIENT), addr(VIP));
    let mut stranger = Session::new(STRANGER, Says::First, addr(OTHER_CLIENT), addr(VIP));
    let own = |session: &Session| session.address();
    sender.send(it.listener, b"hello");
    let way = it.gets(addr(CLIENT), addr(VIP), b"hello");

    // The other way round: what the sender says is no longer believed.
    reload(&accept(STRANGER, "remember = {}"));
    sender.send_bare(it.listener, b"bare");
    sender.becomes(addr(CLIENT));
    sender.send(it.listener, b"again");
    it.eventually_dropped("untrusted", 2);
    stranger.send(it.listener, b"hello");
    it.gets(addr(OTHER_CLIENT), addr(VIP), b"hello");
    // The session that it began has ended.
    it.answers(way, b"answer");
    it.eventually_dropped("reply_late", 1);
    receive_nothing(&sender.socket);

    // Without `remember`, a header is needed on each.
    reload(&accept(STRANGER, ""));
    stranger.send_bare(it.listener, b"bare");
    it.eventually_dropped("no_header", 1);

    // Without `accept`, all are clients.
    reload("");
    let datagrams = sender.datagrams(b"bare");
    sender.send_bare(it.listener, &datagrams[0]);
    it.gets(own(&sender), it.listener, &datagrams[0]);
    stranger.send_bare(it.listener, b"direct");
    it.gets(own(&stranger), it.listener, b"direct");

    reload(&accept(SENDER, ""));
    sender.becomes(addr(CLIENT));
    sender.send(it.listener, b"hello");
    it.gets(addr(CLIENT), addr(VIP), b"hello");
    receive_nothing(&it.server);
}
