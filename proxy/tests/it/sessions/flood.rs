//! A flood of forged sources that the server doesn't answer displaces no client that is
//! answered. In a flood of short sessions, each gets its own reply.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ppv2_lab::*;

const FORGED: &[u8] = b"forged";

/// Forged datagrams at a time, and the pause after them: some 3,000 a second, which is
/// many for the two hundred sockets that there are.
const AT_ONCE: u32 = 30;
const PAUSE: Duration = Duration::from_millis(10);

/// The most forged datagrams, should the clients be slow.
const MOST: u32 = 200_000;

/// Sends from ever other addresses.
fn flood(listener: SocketAddr, stop: &AtomicBool) {
    for number in 0..MOST {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let [_, a, b, c] = number.wrapping_mul(40_503).to_be_bytes();
        let source = UdpSocket::bind((IpAddr::from([127, a | 128, b, c]), 0)).unwrap();
        source.send_to(FORGED, listener).unwrap();
        if number % AT_ONCE == 0 {
            thread::sleep(PAUSE);
        }
    }
}

/// Answers what is not forged with itself.
fn serve(server: &UdpSocket, stop: &AtomicBool) {
    server
        .set_read_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    let mut datagram = [0; 2048];
    while !stop.load(Ordering::Relaxed) {
        if let Ok((len, session)) = server.recv_from(&mut datagram) {
            let (_, _, payload) = read_header(&datagram[..len]);
            if payload != FORGED {
                server.send_to(&payload, session).unwrap();
            }
        }
    }
}

/// Whether a new client at this address gets the answer to its question, and not
/// another's.
fn is_answered(ip: &str, listener: SocketAddr) -> bool {
    let client = socket(ip);
    client
        .set_read_timeout(Some(Duration::from_secs(1)))
        .unwrap();
    let question = client.local_addr().unwrap().to_string();
    client.send_to(question.as_bytes(), listener).unwrap();
    let mut datagram = [0; 2048];
    let answer = client.recv(&mut datagram);
    answer.is_ok_and(|len| {
        assert_eq!(&datagram[..len], question.as_bytes());
        true
    })
}

#[test]
fn flood_of_forged_sources_costs_clients_no_answer() {
    let server = socket("127.0.0.1");
    let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
    let script = format!(
        "ulimit -n 300; exec \"$0\" run --workers 1 --responses 1 --listen {listener} \
         --upstream {} --admin {admin}",
        server.local_addr().unwrap()
    );
    let mut proxy = Process::start(Command::new("sh").args(["-c", &script]).arg(binary()));
    proxy.wait_for("ready");
    let (stop, stop_serving) = (AtomicBool::new(false), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| serve(&server, &stop_serving));
        let clients = scope.spawn(|| {
            let calm = (0..5)
                .filter(|_| is_answered("127.0.0.2", listener))
                .count();
            scope.spawn(|| flood(listener, &stop));
            eventually("clients to be refused", || {
                dropped(admin, "unverified_client") > 1000
            });
            let known = (0..60)
                .filter(|_| is_answered("127.0.0.2", listener))
                .count();
            // Others have to ask again, as clients do.
            eventually("a stranger's answer", || is_answered("127.0.0.3", listener));
            (calm, known)
        });
        let result = clients.join();
        // First, so that nothing outlives a failure.
        stop.store(true, Ordering::Relaxed);
        stop_serving.store(true, Ordering::Relaxed);
        let (calm, known) = result.unwrap();
        assert_eq!(calm, 5);
        assert!(known >= 57, "{known} of 60 were answered");
    });
    let gave_way = "ppv2_sessions_ended_total{listener=\"listener1\",reason=\"unanswered\"}";
    assert!(metric(admin, gave_way) > 50);
    assert_eq!(metric(admin, "ppv2_resting_ports_reclaimed_total"), 0);
}

/// Questions of the flood in which each begins a session, and none rests for long enough to be used
/// again.
const SHORT_SESSIONS: u64 = 100_000;

/// Answers each question with itself, and once more when its session has ended, up to a
/// second later. Returns how many late answers it has sent.
fn answer_twice(server: &UdpSocket, stop: &AtomicBool) -> u64 {
    let moment = Some(Duration::from_millis(100));
    server.set_read_timeout(moment).unwrap();
    socket2::SockRef::from(server)
        .set_recv_buffer_size(4 << 20)
        .unwrap();
    let (mut datagram, mut sent) = ([0; 200], 0);
    let mut late: VecDeque<(Instant, SocketAddr, Vec<u8>)> = VecDeque::new();
    loop {
        let received = server.recv_from(&mut datagram);
        if let Ok((len, session)) = received {
            let (_, question) = ppv2::decode(&datagram[..len]).unwrap();
            server.send_to(question, session).unwrap();
            late.push_back((Instant::now(), session, question.to_vec()));
        } else if stop.load(Ordering::Relaxed) && late.is_empty() {
            return sent;
        }
        let is_due = |at: Instant| at.elapsed() >= Duration::from_secs(1) || received.is_err();
        while late.front().is_some_and(|(at, ..)| is_due(*at))
            && let Some((_, session, question)) = late.pop_front()
        {
            server.send_to(&question, session).unwrap();
            sent += 1;
        }
    }
}

/// Each question is another session's, and has one answer: no late one of an earlier session
/// comes in its place.
#[test]
fn late_replies_reach_nobody_under_a_flood_of_short_sessions_of_a_source_network() {
    let setup = "ip -6 route add local fd00:1::/64 dev lo";
    if !namespace::enter_without_rights(test_name!(), setup) {
        return;
    }
    for (host, network) in [("127.0.0.1", "127.64.0.0/10"), ("::1", "fd00:1::/64")] {
        let server = socket(host);
        let (listener, admin) = (address(host), address("127.0.0.1"));
        let (to, admin_text) = (server.local_addr().unwrap(), admin.to_string());
        let more = [
            "--responses",
            "1",
            "--source",
            network,
            "--admin",
            &admin_text,
        ];
        let proxy = proxy_between(listener, to, &more);
        let folder = format!("/proc/{}/fd", proxy.pid());
        let stop = AtomicBool::new(false);
        let begun = Instant::now();
        let (late, clients) = thread::scope(|scope| {
            let serving = scope.spawn(|| answer_twice(&server, &stop));
            let clients = (0..2u64).map(|number| {
                scope.spawn(move || {
                    let clients: Vec<_> = (0..64).map(|_| socket(host)).collect();
                    let each = SHORT_SESSIONS / 2 / clients.len() as u64;
                    for question in 0..each {
                        for (client, place) in clients.iter().zip(0u64..) {
                            let question = [number, place, question].map(u64::to_be_bytes);
                            client.send_to(&question.concat(), listener).unwrap();
                        }
                        for (client, place) in clients.iter().zip(0u64..) {
                            let question = [number, place, question].map(u64::to_be_bytes);
                            assert_eq!(receive(client).0, question.concat());
                        }
                    }
                    clients
                })
            });
            let clients: Vec<_> = clients.collect();
            let ended: Vec<_> = clients.into_iter().map(|client| client.join()).collect();
            let took = begun.elapsed();
            stop.store(true, Ordering::Relaxed);
            let late = serving.join().unwrap();
            println!("{network}: {late} sessions in {took:?}");
            let clients = ended.into_iter().flat_map(|ended| ended.unwrap());
            (late, clients.collect::<Vec<_>>())
        });
        eventually("late replies to be dropped", || {
            dropped(admin, "reply_unknown_address") == late
        });
        let opened = metric(admin, "ppv2_sessions_opened_total{listener=\"listener1\"}");
        assert_eq!((opened, dropped(admin, "no_addresses")), (late, 0));
        for client in &clients {
            client.set_nonblocking(true).unwrap();
            assert!(client.recv(&mut [0; 100]).is_err(), "a reply too many");
        }
        // No session has had a descriptor.
        assert!(std::fs::read_dir(folder).unwrap().count() < 100);
    }
}
