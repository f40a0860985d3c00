//! Senders that say a client once, as nginx, frp and Spectrum do: with `remember`, what comes
//! bare from the same port is that client's; without, it is dropped.

use std::thread;
use std::time::Duration;

use ppv2_lab::senders::{Front, Says, Session};
use ppv2_lab::*;

use super::*;

/// Senders that say it once.
const ONCE: [Says; 2] = [Says::First, Says::Alone];

fn session(says: Says, client: &str) -> Session {
    Session::new(SENDER, says, addr(client), addr(VIP))
}

/// All that a sender of a kind sends of a client is the client's, and so are the replies.
fn is_served(it: &In, sender: &mut Session) {
    for payload in [&b"first"[..], b"second", b"", b"PROXY, but bare", b"last"] {
        // A header without payload says the client alone.
        if payload.is_empty() && sender.says == Says::Every {
            continue;
        }
        sender.send(it.listener, payload);
        let session = it.gets(sender.client, sender.destination, payload);
        it.answers(session, b"answer");
        assert_eq!(sender.receive(), (b"answer".to_vec(), it.listener));
    }
}

#[test]
fn what_each_kind_of_sender_sends_is_its_clients() {
    let it = In::start("remember = {}");
    for says in [Says::First, Says::Alone, Says::Every] {
        for (client, destination) in [(CLIENT, VIP), (CLIENT_V6, VIP_V6)] {
            let mut sender = Session::new(SENDER, says, addr(client), addr(destination));
            is_served(&it, &mut sender);
            // nginx ends sessions, and the next one says the client again, or another.
            sender.becomes(addr(OTHER_CLIENT));
            sender.destination = addr(VIP);
            is_served(&it, &mut sender);
        }
    }
    receive_nothing(&it.server);
    // Spectrum's headers alone, two for each family.
    assert_eq!(all_dropped(&it.proxy), [("header_alone".to_owned(), 4)]);
    let bare = "ppv2_datagrams_without_header_total";
    eventually(bare, || it.count(bare) == 4 * 4 + 4 * 5);
}

#[test]
fn without_it_what_comes_bare_is_dropped() {
    let it = In::start("");
    for says in ONCE {
        let mut sender = session(says, CLIENT);
        sender.send(it.listener, b"first");
        let first: &[u8] = if says == Says::First { b"first" } else { b"" };
        let session = it.gets(addr(CLIENT), addr(VIP), first);
        it.answers(session, b"answer");
        assert_eq!(sender.receive(), (b"answer".to_vec(), it.listener));
        sender.send(it.listener, b"second");
        sender.send(it.listener, b"third");
    }
    it.eventually_dropped("no_header", 2 + 3);
    receive_nothing(&it.server);
}

#[test]
fn a_header_alone_makes_an_empty_datagram_on_request_alone() {
    let forwards = In::start("remember = { header_alone = \"forward\" }");
    let announces = In::start("remember = { header_alone = \"announce\" }");
    let mut sender = session(Says::Every, CLIENT);
    sender.send(forwards.listener, b"");
    forwards.gets(addr(CLIENT), addr(VIP), b"");
    for round in 1..=3 {
        sender.send(announces.listener, b"");
        announces.eventually_dropped("header_alone", round);
    }
    receive_nothing(&announces.server);
    // It opens no session either.
    assert_eq!(announces.count("ppv2_sessions"), 0);
    for it in [&forwards, &announces] {
        sender.send_bare(it.listener, b"bare");
        it.gets(addr(CLIENT), addr(VIP), b"bare");
        // Bare, an empty datagram is the client's own.
        sender.send_bare(it.listener, b"");
        it.gets(addr(CLIENT), addr(VIP), b"");
    }
    assert_eq!(all_dropped(&forwards.proxy), []);
}

#[test]
fn a_port_is_its_latest_headers_clients() {
    let it = In::start("remember = {}");
    let mut sender = session(Says::First, CLIENT);
    sender.send(it.listener, b"one");
    let one = it.gets(addr(CLIENT), addr(VIP), b"one");
    sender.becomes(addr(OTHER_CLIENT));
    sender.send(it.listener, b"two");
    let two = it.gets(addr(OTHER_CLIENT), addr(VIP), b"two");
    sender.send_bare(it.listener, b"bare");
    assert_eq!(it.gets(addr(OTHER_CLIENT), addr(VIP), b"bare"), two);
    // Another destination is another session, too.
    sender.becomes(addr(OTHER_CLIENT));
    sender.destination = addr(VIP_V6);
    sender.send(it.listener, b"three");
    let three = it.next().3;
    assert!(three != two && three != one);
    sender.send_bare(it.listener, b"bare");
    assert_eq!(it.next().3, three);
}

/// A program's port that another of its clients has now: a late reply to the former one would
/// reach the wrong client.
#[test]
fn a_reused_port_gets_no_late_reply_of_its_former_client() {
    let it = In::start("remember = {}");
    let mut sender = session(Says::First, CLIENT);
    sender.send(it.listener, b"one");
    let one = it.gets(addr(CLIENT), addr(VIP), b"one");
    // One that stays with its client, and is silent as long.
    let mut constant = session(Says::First, "203.0.113.13:1");
    constant.send(it.listener, b"constant");
    let other = it.gets(constant.client, addr(VIP), b"constant");
    sender.becomes(addr(OTHER_CLIENT));
    sender.send(it.listener, b"two");
    let two = it.gets(addr(OTHER_CLIENT), addr(VIP), b"two");
    // One that spoke for itself first, and one whose latest header is refused.
    let mut local = session(Says::Every, CLIENT);
    let mut header = local.datagrams(b"probe").remove(0);
    header[12] = 0x20;
    local.send_bare(it.listener, &header);
    let probe = it.gets(local.address(), it.listener, b"probe");
    local.send(it.listener, b"one");
    let one_of_local = it.gets(addr(CLIENT), addr(VIP), b"one");
    let mut refused = session(Says::Every, CLIENT);
    refused.send(it.listener, b"one");
    let one_of_refused = it.gets(addr(CLIENT), addr(VIP), b"one");
    let mut tcp = session(Says::Every, OTHER_CLIENT)
        .datagrams(b"two")
        .remove(0);
    tcp[13] = 0x11;
    refused.send_bare(it.listener, &tcp);
    it.eventually_dropped("tcp", 1);
    // So long it could be on its way, as in dnsdist, whose clients share a port.
    it.answers(one, b"to one");
    assert_eq!(sender.receive().0, b"to one");
    thread::sleep(Duration::from_millis(10_500));
    it.answers(one, b"late");
    it.answers(two, b"to two");
    it.answers(other, b"to the constant one");
    it.answers(probe, b"late");
    it.answers(one_of_refused, b"late");
    it.answers(one_of_local, b"to one");
    it.eventually_dropped("reply_reassigned", 3);
    assert_eq!(sender.receive().0, b"to two");
    assert_eq!(local.receive().0, b"to one");
    receive_nothing(&refused.socket);
    assert_eq!(constant.receive().0, b"to the constant one");
    receive_nothing(&sender.socket);
    // Until the former client has it again.
    sender.becomes(addr(CLIENT));
    sender.send(it.listener, b"one again");
    it.answers(it.gets(addr(CLIENT), addr(VIP), b"one again"), b"to one");
    assert_eq!(sender.receive().0, b"to one");
}

#[test]
fn another_port_or_address_is_remembered_by_itself() {
    let it = In::start("remember = {}");
    let mut sender = session(Says::First, CLIENT);
    sender.send(it.listener, b"hello");
    it.gets(addr(CLIENT), addr(VIP), b"hello");
    socket(SENDER)
        .send_to(b"by another port", it.listener)
        .unwrap();
    it.eventually_dropped("no_header", 1);
    // A stranger's is no sender at all, whatever was said before.
    let port = sender.address().port();
    let stranger = bind(addr(&format!("{STRANGER}:{port}")));
    stranger.send_to(b"by a stranger", it.listener).unwrap();
    it.eventually_dropped("untrusted", 1);
    receive_nothing(&it.server);
}

/// Another session of the sender has begun, whose client is not known.
#[test]
fn a_refused_header_ends_what_was_said() {
    let it = In::start("remember = {}, local = \"drop\"");
    let header = |client: &str| session(Says::Every, client).datagrams(b"refused").remove(0);
    let mut bad = header(OTHER_CLIENT);
    bad[15] = 11;
    let mut tcp = header(OTHER_CLIENT);
    tcp[13] = 0x11;
    let mut unspecified = header(OTHER_CLIENT);
    unspecified[13] = 0;
    let mut local = header(OTHER_CLIENT);
    local[12] = 0x20;
    let text = session(Says::Text, OTHER_CLIENT)
        .datagrams(b"refused")
        .remove(0);
    for (number, (reason, refused)) in (1..).zip([
        ("bad_header", bad),
        ("tcp", tcp),
        ("unspecified", unspecified),
        ("client_address", header("203.0.113.12:0")),
        ("local_header", local),
        ("v1_header", text),
    ]) {
        let mut sender = session(Says::First, CLIENT);
        sender.send(it.listener, b"hello");
        it.gets(addr(CLIENT), addr(VIP), b"hello");
        sender.send_bare(it.listener, &refused);
        it.eventually_dropped(reason, 1);
        sender.send_bare(it.listener, b"whose?");
        it.eventually_dropped("no_header", number);
        // Until it says one again.
        sender.becomes(addr(OTHER_CLIENT));
        sender.send(it.listener, b"hello");
        it.gets(addr(OTHER_CLIENT), addr(VIP), b"hello");
    }
    receive_nothing(&it.server);
}

#[test]
fn an_idle_sender_is_forgotten() {
    let it = In::start("remember = { idle = \"1s\" }");
    let mut sender = session(Says::First, CLIENT);
    sender.send(it.listener, b"hello");
    it.gets(addr(CLIENT), addr(VIP), b"hello");
    thread::sleep(Duration::from_millis(2500));
    sender.send_bare(it.listener, b"late");
    it.eventually_dropped("no_header", 1);
    receive_nothing(&it.server);
    sender.becomes(addr(CLIENT));
    sender.send(it.listener, b"again");
    it.gets(addr(CLIENT), addr(VIP), b"again");
    sender.send_bare(it.listener, b"bare");
    it.gets(addr(CLIENT), addr(VIP), b"bare");
}

#[test]
fn the_newest_of_too_many_senders_are_not_remembered() {
    let of_accept = "remember = { max = 8 }";
    // The limit is the listener's, whose workers share it.
    let it = In::start(of_accept);
    let mut senders: Vec<_> = (0..40)
        .map(|number| session(Says::First, &format!("203.0.113.{}:53", number + 1)))
        .collect();
    for sender in &mut senders {
        // What has a header is served, remembered or not.
        sender.send(it.listener, b"hello");
        it.gets(sender.client, sender.destination, b"hello");
    }
    let mut remembered = 0;
    for sender in &senders {
        let before = it.dropped("no_header");
        sender.send_bare(it.listener, b"bare");
        // Either it is dropped, or it comes.
        let mut has_come = false;
        it.server.set_nonblocking(true).unwrap();
        eventually("one or the other", || {
            let mut datagram = [0; 100];
            if let Ok((len, _)) = it.server.recv_from(&mut datagram) {
                assert_eq!(read_plain_header(&datagram[..len]).0, sender.client);
                has_come = true;
            }
            has_come || it.dropped("no_header") > before
        });
        it.server.set_nonblocking(false).unwrap();
        remembered += u64::from(has_come);
    }
    assert!((1..=8).contains(&remembered), "{remembered}");
    let name = "ppv2_senders_unremembered_total";
    eventually(name, || it.count(name) >= 40 - remembered);
}

/// A listener that a reload renames, and whose new name has as many senders as it may.
#[test]
fn a_sender_that_is_no_longer_remembered_is_not_its_former_client() {
    let it = In::start("remember = { max = 2 }");
    let mut sender = session(Says::First, CLIENT);
    sender.send(it.listener, b"hello");
    it.gets(addr(CLIENT), addr(VIP), b"hello");
    sender.send_bare(it.listener, b"bare");
    it.gets(addr(CLIENT), addr(VIP), b"bare");
    let to = it.server.local_addr().unwrap();
    let of_listener = accept(SENDER, "remember = { max = 2 }");
    let renamed = config(it.listener, to, &of_listener, "").replace("\"l\"", "\"m\"");
    it.proxy.reload(&renamed);
    let others = [(); 20].map(|()| session(Says::First, "203.0.113.13:53"));
    for mut other in others {
        other.send(it.listener, b"hello");
        it.gets(other.client, addr(VIP), b"hello");
    }
    sender.becomes(addr(OTHER_CLIENT));
    sender.send(it.listener, b"hello");
    it.gets(addr(OTHER_CLIENT), addr(VIP), b"hello");
    sender.send_bare(it.listener, b"whose?");
    let no_header = "ppv2_dropped_datagrams_total{listener=\"m\",reason=\"no_header\"}";
    eventually("the drop", || it.proxy.metric(no_header) == 1);
    receive_nothing(&it.server);
}

/// Real clients behind a program of each kind, which passes their replies on.
#[test]
fn clients_behind_programs_that_say_it_once_are_served() {
    let it = In::start("remember = {}");
    for says in [Says::First, Says::Alone, Says::Every] {
        let front = Front::start(says, address("127.0.0.1"), SENDER, it.listener);
        let clients: Vec<_> = (0..10).map(|_| socket("127.0.0.9")).collect();
        for round in 0..3 {
            for client in &clients {
                let own = client.local_addr().unwrap();
                client
                    .send_to(format!("{own} {round}").as_bytes(), front.address)
                    .unwrap();
            }
            for _ in &clients {
                let (client, destination, payload, session) = it.next();
                assert_eq!(destination, front.address);
                assert_eq!(payload, format!("{client} {round}").into_bytes());
                it.answers(session, &payload);
            }
            for client in &clients {
                let own = client.local_addr().unwrap();
                let answer = format!("{own} {round}").into_bytes();
                assert_eq!(receive(client), (answer, front.address));
            }
        }
        eventually("the count", || front.passed() == 30);
    }
}
