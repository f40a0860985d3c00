//! Sessions that come and go by the thousand a second with answers that come late, and
//! modes that change all the time: no client ever gets another one's answer, also where
//! ports run out. For a longer run, set `PPV2_SOAK_SECONDS`.

use std::collections::VecDeque;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ppv2_lab::*;

const THREADS: u8 = 4;

/// Clients of each thread.
const CLIENTS: u8 = 64;

fn duration() -> Duration {
    let seconds = std::env::var("PPV2_SOAK_SECONDS");
    let seconds = seconds.map_or(6, |seconds| seconds.parse().unwrap());
    Duration::from_secs(seconds)
}

/// When an answer is sent, by the number of its question.
type Delay = fn(u32) -> Duration;

/// Answers each datagram with its last eight bytes, which name client and question.
fn serve(server: &UdpSocket, delay: Delay, stop: &AtomicBool) {
    let short = Some(Duration::from_millis(1));
    server.set_read_timeout(short).unwrap();
    let mut late: VecDeque<(Instant, SocketAddr, [u8; 8])> = VecDeque::new();
    let mut datagram = [0; 200];
    while !stop.load(Ordering::Relaxed) {
        if let Ok((len, session)) = server.recv_from(&mut datagram) {
            let id: [u8; 8] = datagram[len - 8..len].try_into().unwrap();
            let delay = delay(u32::from_be_bytes(id[4..].try_into().unwrap()));
            if delay.is_zero() {
                server.send_to(&id, session).unwrap();
            } else {
                late.push_back((Instant::now() + delay, session, id));
            }
        }
        for _ in 0..late.len().min(50) {
            let (at, session, id) = late.pop_front().unwrap();
            if at <= Instant::now() {
                server.send_to(&id, session).unwrap();
            } else {
                late.push_back((at, session, id));
            }
        }
    }
}

/// What clients got.
#[derive(Default)]
struct Answers {
    own: AtomicU64,
    others: AtomicU64,
}

/// All clients of a thread ask, and take what comes, again and again.
fn churn(thread: u8, listener: SocketAddr, end: Instant, answers: &Answers) {
    // Each has an address of its own: no port is one of a session's.
    let clients: Vec<_> = (0..CLIENTS)
        .map(|client| {
            let socket = bind(SocketAddr::from(([127, 9, thread, client], 7000)));
            socket.set_nonblocking(true).unwrap();
            socket
        })
        .collect();
    let mut answer = [0; 200];
    let mut question = u32::from(thread);
    while Instant::now() < end {
        for (client, number) in clients.iter().zip(0u8..) {
            question = question.wrapping_add(1);
            let mut id = [0, 0, thread, number, 0, 0, 0, 0];
            id[4..].copy_from_slice(&question.to_be_bytes());
            let _ = client.send_to(&id, listener);
        }
        thread::sleep(Duration::from_millis(10));
        for (client, number) in clients.iter().zip(0u8..) {
            while let Ok(len) = client.recv(&mut answer) {
                let is_own = len == 8 && answer[..4] == [0, 0, thread, number];
                let count = if is_own {
                    &answers.own
                } else {
                    &answers.others
                };
                count.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// Churns sessions of a listener with these keys while `meanwhile` is done again and
/// again. Returns what the admin address counts.
fn soak(
    listener_keys: impl Fn(u32) -> String,
    delay: Delay,
    expects: impl FnOnce(SocketAddr, u64),
    flaps: bool,
) {
    soak_between("127.0.0.1", "", listener_keys, delay, expects, flaps);
}

/// As [`soak`], with a server at this address and more keys of its upstream.
fn soak_between(
    host: &str,
    upstream_keys: &str,
    listener_keys: impl Fn(u32) -> String,
    delay: Delay,
    expects: impl FnOnce(SocketAddr, u64),
    flaps: bool,
) {
    let server = bind(address(host));
    let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
    let upstream = server.local_addr().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let config = |turn| {
        format!(
            "[admin]\nlisten = \"{admin}\"\n\
             [[listener]]\nbind = [\"{listener}\"]\nupstream = \"u\"\n{}\n\
             [upstream.u]\nservers = [\"{upstream}\"]\n{upstream_keys}\n",
            listener_keys(turn)
        )
    };
    let _proxy = proxy_with(&folder, &config(0));
    let (stop, answers) = (AtomicBool::new(false), Answers::default());
    let end = Instant::now() + duration();
    thread::scope(|scope| {
        scope.spawn(|| serve(&server, delay, &stop));
        let churning: Vec<_> = (0..THREADS)
            .map(|number| {
                let answers = &answers;
                scope.spawn(move || churn(number, listener, end, answers))
            })
            .collect();
        let mut turn = 0;
        while flaps && Instant::now() < end {
            turn += 1;
            write(&folder, "proxy.toml", &config(turn));
            http(admin, "POST /reload", "");
            thread::sleep(Duration::from_millis(100));
        }
        let ended: Vec<_> = churning
            .into_iter()
            .map(thread::ScopedJoinHandle::join)
            .collect();
        // First, or the server would outlive a failure.
        stop.store(true, Ordering::Relaxed);
        assert!(ended.iter().all(Result::is_ok));
    });
    let (own, others) = (answers.own.into_inner(), answers.others.into_inner());
    let opened = metric(admin, "ppv2_sessions_opened_total{listener=\"listener1\"}");
    let count = |reason| dropped(admin, reason);
    eprintln!(
        "{own} own answers, {others} of others, {opened} sessions in {:?}; \
         {} reused early, {} late replies, {} refused",
        duration(),
        metric(admin, "ppv2_resting_ports_reclaimed_total"),
        count("reply_late") + count("reply_unknown_address"),
        count("no_ports") + count("no_addresses"),
    );
    assert_eq!(others, 0, "{own} were right");
    assert!(own > 1000, "{own} answers");
    expects(admin, opened);
}

/// So few that ports run out.
const FEW_PORTS: &str = "echo 40000 41999 > /proc/sys/net/ipv4/ip_local_port_range";

#[test]
fn no_answer_reaches_another_client_while_ports_run_out() {
    if !namespace::enter(test_name!(), FEW_PORTS) {
        return;
    }
    // One in 16 answers comes when its session has ended.
    let delay = |question: u32| match question % 16 {
        0 => Duration::from_millis(u64::from(question / 16 % 8) * 500 + 400),
        _ => Duration::ZERO,
    };
    let keys = |_| "responses = 1\nrequests = 1\nidle_timeout = \"200ms\"".to_owned();
    let expects = |admin, opened| {
        let reclaimed = metric(admin, "ppv2_resting_ports_reclaimed_total");
        assert!(opened > 2000 && reclaimed > 100, "{opened}, {reclaimed}");
    };
    soak(keys, delay, expects, false);
}

/// Another mode with each reload.
fn changing_modes(turn: u32) -> String {
    let mode = ["ppv2", "plain"][turn as usize % 2];
    format!("mode = \"{mode}\"\nidle_timeout = \"1s\"")
}

/// Most answers wait when their session has to move.
fn while_moving(question: u32) -> Duration {
    Duration::from_millis(u64::from(question % 8) * 200)
}

fn many_moved(admin: SocketAddr, opened: u64) {
    let ended = "ppv2_sessions_ended_total{listener=\"listener1\",reason=\"moved\"}";
    let moved = metric(admin, ended);
    assert!(moved > 500, "{moved} of {opened}");
}

#[test]
fn no_answer_reaches_another_client_while_modes_change() {
    if !namespace::enter(test_name!(), FEW_PORTS) {
        return;
    }
    soak(changing_modes, while_moving, many_moved, true);
}

/// One in 16 answers comes when its session has ended.
fn some_late(question: u32) -> Duration {
    match question % 16 {
        0 => Duration::from_millis(u64::from(question / 16 % 8) * 500 + 400),
        _ => Duration::ZERO,
    }
}

#[test]
fn no_answer_reaches_another_client_of_a_source_network() {
    let setup = "ip -6 route add local fd00:1::/64 dev lo; ip route add local 10.99.0.0/22 dev lo";
    if !namespace::enter_without_rights(test_name!(), setup) {
        return;
    }
    let keys = |_| "responses = 1\nrequests = 1\nidle_timeout = \"200ms\"".to_owned();
    for (host, network, is_used_up) in [
        ("127.0.0.1", "127.64.0.0/10", false),
        ("::1", "fd00:1::/64", false),
        ("127.0.0.1", "10.99.0.0/22", true),
    ] {
        let expects = |admin, opened| {
            let late = dropped(admin, "reply_unknown_address");
            let refused = dropped(admin, "no_addresses");
            assert!(opened > 900, "{opened}");
            // Where no other session can begin, one that goes on has the late answer.
            assert!(late > 0 || is_used_up, "{late}");
            // A client that has a session goes on with that.
            let exceeded = "ppv2_requests_exceeded_datagrams_total{listener=\"listener1\"}";
            let without = refused + metric(admin, exceeded);
            assert_eq!(without > 0, is_used_up, "{without}");
            assert!(refused == 0 || is_used_up, "{refused}");
        };
        let most = if is_used_up { 900 } else { 10_000 };
        let upstream = format!("source = [\"{network}\"]\n[limits]\nmax_sessions = {most}");
        soak_between(host, &upstream, keys, some_late, expects, false);
    }
}

#[test]
fn no_answer_reaches_another_client_while_modes_change_on_a_source_network() {
    if !namespace::enter_without_rights(test_name!(), "") {
        return;
    }
    let network = "source = [\"127.64.0.0/10\"]";
    soak_between(
        "127.0.0.1",
        network,
        changing_modes,
        while_moving,
        many_moved,
        true,
    );
}
