//! A hundred clients behind each of two proxies that name the same addresses: each reply goes
//! back by the proxy that the question came through, in whatever order replies come.

use std::collections::HashSet;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ppv2_lab::senders::{Says, Session};
use ppv2_lab::*;

use super::*;

const CLIENTS: usize = 100;
const ROUNDS: usize = 20;
/// Clients of a sender that wait for answers at the same time: few enough for the buffers of
/// all sockets.
const AT_ONCE: usize = 25;
/// Answers that a server holds back, so that they come in another order and late.
const HELD: usize = 40;

/// Answers `total` questions with themselves and the client that their header names, each
/// after some of the later ones.
fn serve(server: &UdpSocket, total: usize) {
    let pause = Some(Duration::from_millis(5));
    server.set_read_timeout(pause).unwrap();
    let mut held = Vec::new();
    let (mut datagram, mut asked) = ([0; 2048], 0);
    let deadline = Instant::now() + TIMEOUT * 3;
    while asked < total || !held.is_empty() {
        assert!(Instant::now() < deadline, "{asked} questions of {total}");
        // No more come while clients wait for their answers.
        let mut most = 0;
        if asked < total
            && let Ok((len, session)) = server.recv_from(&mut datagram)
        {
            asked += 1;
            most = HELD;
            let (client, _, payload) = read_plain_header(&datagram[..len]);
            let text = [client.to_string().as_bytes(), b" ", &payload].concat();
            held.push((text, session));
        }
        while held.len() > most {
            let (answer, session) = held.swap_remove(fastrand::usize(..held.len()));
            server.send_to(&answer, session).unwrap();
        }
    }
}

/// What a sender asks for a client, and the answer to it.
fn question(name: &str, round: usize) -> String {
    format!("by {name} {round}")
}

/// The answers of a round and the next, in any order, and no other.
fn gets_both(session: &Session, listener: SocketAddr, round: usize) {
    let name = session.address().to_string();
    let mut answers = [(); 2].map(|()| {
        let (answer, from) = session.receive();
        assert_eq!(from, listener);
        String::from_utf8(answer).unwrap()
    });
    answers.sort();
    let mut expected =
        [round, round + 1].map(|round| format!("{} {}", session.client, question(&name, round)));
    expected.sort();
    assert_eq!(answers, expected);
}

/// The same clients and destination behind two senders with a port for each client: the
/// senders alone differ.
fn each_port_gets_its_own(ip: &str, from: [&str; 2], says: Says, keys: &str) {
    let (listener, server) = (address(ip), socket(ip));
    let to = server.local_addr().unwrap();
    let from_both = format!(
        "accept = {{ from = [\"{}\", \"{}\"], {keys} }}",
        from[0], from[1]
    );
    let proxy = Proxy::start(&config(listener, to, &from_both, ""));
    thread::scope(|scope| {
        scope.spawn(|| serve(&server, 2 * CLIENTS * ROUNDS));
        for ip in from {
            scope.spawn(move || {
                let mut sessions: Vec<_> = (0..CLIENTS)
                    .map(|number| {
                        let client = format!("203.0.113.{}:{}", number / 10, 1000 + number % 10);
                        Session::new(ip, says, addr(&client), addr(VIP))
                    })
                    .collect();
                for round in (0..ROUNDS).step_by(2) {
                    for share in sessions.chunks_mut(AT_ONCE) {
                        for round in [round, round + 1] {
                            for session in &mut *share {
                                let name = session.address().to_string();
                                session.send(listener, question(&name, round).as_bytes());
                            }
                        }
                        for session in share {
                            gets_both(session, listener, round);
                        }
                    }
                }
                for session in &sessions {
                    session.socket.set_nonblocking(true).unwrap();
                    assert!(
                        session.socket.recv(&mut [0; 100]).is_err(),
                        "an answer too many"
                    );
                }
            });
        }
    });
    eventually("all replies to be counted", || {
        count_of(&proxy, "ppv2_reply_datagrams_total") == (2 * CLIENTS * ROUNDS) as u64
    });
    let opened = count_of(&proxy, "ppv2_sessions_opened_total");
    assert_eq!(opened, 2 * CLIENTS as u64);
    let drops = all_dropped(&proxy);
    assert!(
        drops.iter().all(|(reason, _)| reason == "header_alone"),
        "{drops:?}"
    );
}

#[test]
fn where_each_client_has_a_port_of_its_sender() {
    each_port_gets_its_own("127.0.0.1", [SENDER, "127.0.0.4"], Says::Every, "");
}

#[test]
fn where_headers_come_once() {
    for says in [Says::First, Says::Alone] {
        each_port_gets_its_own("127.0.0.1", [SENDER, "127.0.0.4"], says, "remember = {}");
    }
}

#[test]
fn where_headers_are_of_simple_proxy_protocol() {
    each_port_gets_its_own(
        "127.0.0.1",
        [SENDER, "127.0.0.4"],
        Says::Spp,
        "formats = [\"spp\"]",
    );
}

#[test]
fn over_ipv6() {
    let setup = "for n in 2 4; do ip addr add fd00::$n/128 dev lo nodad; done";
    if namespace::enter(test_name!(), setup) {
        each_port_gets_its_own("::1", ["fd00::2", "fd00::4"], Says::Every, "");
    }
}

/// All clients behind one port of each sender, as dnsdist has them: an answer says whose it is.
#[test]
fn where_all_clients_share_a_port_of_their_sender() {
    let (listener, server) = (address("127.0.0.1"), socket("127.0.0.1"));
    let to = server.local_addr().unwrap();
    let from = "accept = { from = [\"127.0.0.2\", \"127.0.0.4\"] }";
    let proxy = Proxy::start(&config(listener, to, from, ""));
    thread::scope(|scope| {
        scope.spawn(|| serve(&server, 2 * CLIENTS * ROUNDS));
        for ip in [SENDER, "127.0.0.4"] {
            scope.spawn(move || {
                let mut sender = Session::new(ip, Says::Every, addr(CLIENT), addr(VIP));
                let mut expected = HashSet::new();
                for round in 0..ROUNDS {
                    for number in 0..CLIENTS {
                        let client = format!("203.0.113.{number}:5353");
                        sender.becomes(addr(&client));
                        let asked = question(ip, round);
                        sender.send(listener, asked.as_bytes());
                        assert!(expected.insert(format!("{client} {asked}")));
                        while expected.len() > 2 * AT_ONCE {
                            let answer = String::from_utf8(sender.receive().0).unwrap();
                            assert!(expected.remove(&answer), "{answer}");
                        }
                    }
                }
                while !expected.is_empty() {
                    let answer = String::from_utf8(sender.receive().0).unwrap();
                    assert!(expected.remove(&answer), "{answer}");
                }
            });
        }
    });
    let opened = count_of(&proxy, "ppv2_sessions_opened_total");
    assert_eq!(opened, 2 * CLIENTS as u64);
    assert_eq!(all_dropped(&proxy), []);
}

/// Clients that write to two of our proxies at once, from the same ports.
#[test]
fn behind_two_of_our_proxies() {
    let (fronts, listener) = (
        [address("127.0.0.1"), address("127.0.0.1")],
        address("127.0.0.1"),
    );
    let server = socket("127.0.0.1");
    let to = server.local_addr().unwrap();
    let last = Proxy::start(&config(listener, to, &accept("127.0.0.1", ""), ""));
    let _proxies = fronts.map(|front| Proxy::start(&config(front, listener, "", "")));
    let clients: Vec<_> = (0..CLIENTS).map(|_| socket("127.0.0.30")).collect();
    thread::scope(|scope| {
        scope.spawn(|| serve(&server, 2 * CLIENTS * ROUNDS));
        for half in clients.chunks(CLIENTS / 2) {
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    for share in half.chunks(AT_ONCE) {
                        for client in share {
                            for front in fronts {
                                let asked = question(&front.to_string(), round);
                                client.send_to(asked.as_bytes(), front).unwrap();
                            }
                        }
                        for client in share {
                            let own = client.local_addr().unwrap();
                            for _ in fronts {
                                let (answer, front) = receive(client);
                                let asked = question(&front.to_string(), round);
                                let expected = format!("{own} {asked}");
                                assert_eq!(String::from_utf8(answer).unwrap(), expected);
                            }
                        }
                    }
                }
            });
        }
    });
    let opened = count_of(&last, "ppv2_sessions_opened_total");
    assert_eq!(opened, 2 * CLIENTS as u64);
    assert_eq!(all_dropped(&last), []);
}

/// Sessions that end all the time, answers that come late, and ports whose clients change with
/// each question: what comes to a port is the answer to one of its own questions.
#[test]
fn where_sessions_and_clients_of_ports_change_all_the_time() {
    let (listener, server) = (address("127.0.0.1"), socket("127.0.0.1"));
    let to = server.local_addr().unwrap();
    let of_listener = "accept = { from = [\"127.0.0.2\", \"127.0.0.4\"], remember = { max = 60 } }\n\
                       idle_timeout = \"100ms\"\nresponses = 1";
    let proxy = Proxy::start(&config(listener, to, of_listener, ""));
    let stop = AtomicBool::new(false);
    let answered = AtomicUsize::new(0);
    thread::scope(|scope| {
        scope.spawn(|| answer_late(&server, &stop));
        let askers = [SENDER, "127.0.0.4"].map(|ip| {
            let answered = &answered;
            scope.spawn(move || {
                let mut sessions: Vec<_> = [Says::First, Says::Alone, Says::Every]
                    .into_iter()
                    .flat_map(|says| [says; 15])
                    .map(|says| Session::new(ip, says, addr(CLIENT), addr(VIP)))
                    .collect();
                for session in &sessions {
                    session.socket.set_nonblocking(true).unwrap();
                }
                let until = Instant::now() + Duration::from_secs(3);
                while Instant::now() < until {
                    for session in &mut sessions {
                        if fastrand::bool() {
                            let number = fastrand::u8(1..=250);
                            session.becomes(addr(&format!("203.0.113.{number}:53")));
                        }
                        let asked = format!("{} of {}", session.address(), session.client);
                        session.send(listener, asked.as_bytes());
                        let mut answer = [0; 200];
                        while let Ok(len) = session.socket.recv(&mut answer) {
                            let answer = String::from_utf8_lossy(&answer[..len]);
                            let (client, asked) = answer.split_once(' ').unwrap();
                            let expected = format!("{} of {client}", session.address());
                            assert_eq!(asked, expected);
                            answered.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    thread::sleep(Duration::from_millis(2));
                }
            })
        });
        let results = askers.map(thread::ScopedJoinHandle::join);
        stop.store(true, Ordering::Relaxed);
        for result in results {
            result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
    });
    assert!(answered.into_inner() > 1000);
    let opened = count_of(&proxy, "ppv2_sessions_opened_total");
    assert!(opened > 1000, "{opened}");
}

/// Answers each question with its client and itself, at once or within 300 ms.
fn answer_late(server: &UdpSocket, stop: &AtomicBool) {
    let pause = Some(Duration::from_millis(1));
    server.set_read_timeout(pause).unwrap();
    let mut late: Vec<(Instant, SocketAddr, Vec<u8>)> = Vec::new();
    let mut datagram = [0; 2048];
    while !stop.load(Ordering::Relaxed) {
        if let Ok((len, session)) = server.recv_from(&mut datagram) {
            let (client, _, payload) = read_plain_header(&datagram[..len]);
            let answer = [client.to_string().as_bytes(), b" ", &payload].concat();
            let wait = [0, 0, 20, 300][fastrand::usize(..4)];
            late.push((
                Instant::now() + Duration::from_millis(wait),
                session,
                answer,
            ));
        }
        let now = Instant::now();
        late.retain(|(at, session, answer)| {
            let is_due = *at <= now;
            if is_due {
                // Refused where the session's socket is gone: told to the next one.
                let sent = server.send_to(answer, *session);
                sent.or_else(|_| server.send_to(answer, *session)).unwrap();
            }
            !is_due
        });
    }
}
