//! Sessions that send from their client's address, or whose replies the proxy
//! never sees: their end, their client's next one, a stop, and replies that come
//! when none should.

use std::fs;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ppv2_lab::network::*;
use ppv2_lab::*;

const OWN_PORT: &str = "mode = \"transparent\"\nsource_port = \"client\"";
const DSR: &str = "mode = \"dsr\"\nrewrite_on = \"proxy\"";
const SDK: &str = "mode = \"dsr\"\nrewrite_on = \"sdk\"";

#[test]
fn ended_session_is_replaced_at_once() {
    let Some(lab) = Lab::enter(test_name!(), Side::Private) else {
        return;
    };
    for (scheme, mode, answering) in [
        (Scheme::Transparent, OWN_PORT, Answering::Back),
        (Scheme::RewriteOnProxy, DSR, Answering::Back),
        (Scheme::SdkByProxy, SDK, Answering::ByHeader),
    ] {
        let setup = lab.set_up(scheme);
        let proxy = lab.proxy(&format!("idle_timeout = \"100ms\"\n{mode}"));
        let begins_anew = &|family| {
            let _server = Echo::new(&lab, family, answering);
            let client = Client::new(&lab, family, 1, 0);
            for number in 0..3 {
                assert_eq!(client.ask(&[number]), client.address);
                eventually("the session to end", || {
                    proxy.of(family, "ppv2_sessions") == 0
                });
            }
            // About when it ends, before and after.
            for wait in 95..105 {
                thread::sleep(Duration::from_millis(wait));
                assert_eq!(client.ask(b"about now"), client.address);
            }
            let opened = proxy.of(family, "ppv2_sessions_opened_total");
            assert!((4..=13).contains(&opened), "{opened}");
        };
        thread::scope(|scope| {
            for family in Family::BOTH {
                scope.spawn(move || begins_anew(family));
            }
        });
        drop(proxy);
        setup.undo();
    }
}

#[test]
fn sessions_without_replies_do_not_delay_shutdown() {
    let Some(lab) = Lab::enter(test_name!(), Side::Private) else {
        return;
    };
    lab.set_up(Scheme::RewriteOnProxy);
    for mode in [DSR, SDK] {
        // Longer than the test waits.
        let config = format!("drain_timeout = \"10m\"\n{}", listeners(mode));
        let mut proxy = lab.proxy_with(&config);
        for family in Family::BOTH {
            for number in [1, 2] {
                Client::new(&lab, family, number, 0).send(b"to nobody");
            }
            eventually("two sessions", || proxy.of(family, "ppv2_sessions") == 2);
        }
        proxy.process.signal("TERM");
        let (status, log) = proxy.process.wait();
        assert!(status.success(), "{log}");
        assert!(!log.contains("did not come"), "{log}");
    }
}

/// Kilobytes of memory, and clock ticks of CPU (proc(5)).
fn usage(proxy: &Proxy<'_>) -> (u64, u64) {
    let folder = format!("/proc/{}", proxy.process.pid());
    let status = fs::read_to_string(format!("{folder}/status")).unwrap();
    let memory = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let memory = memory
        .unwrap()
        .trim_end_matches("kB")
        .trim()
        .parse()
        .unwrap();
    let stat = fs::read_to_string(format!("{folder}/stat")).unwrap();
    let fields: Vec<_> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    let ticks = |field: &str| field.parse::<u64>().unwrap();
    (memory, ticks(fields[11]) + ticks(fields[12]))
}

/// Bytes that wait in all UDP sockets of the proxy's host, by /proc/net/udp.
fn waiting(lab: &Lab) -> u64 {
    let table = lab.sh("proxy", "cat /proc/net/udp /proc/net/udp6");
    let queues = table
        .lines()
        .filter_map(|line| line.split_whitespace().nth(4));
    let receive = queues.filter_map(|queues| queues.split_once(':'));
    let bytes = receive.filter_map(|(_, bytes)| u64::from_str_radix(bytes, 16).ok());
    bytes.sum()
}

/// Answers that each question brings.
const STRAY: usize = 500;

#[test]
fn unexpected_replies_harm_nothing() {
    let Some(lab) = Lab::enter(test_name!(), Side::Private) else {
        return;
    };
    for (scheme, mode) in [(Scheme::SdkByProxy, SDK), (Scheme::Transparent, DSR)] {
        // What has replies come to the proxy is refused at start.
        let forwarding = (mode == DSR).then(|| lab.set_up(Scheme::RewriteOnProxy));
        let early = (mode != DSR).then(|| lab.set_up(scheme));
        let proxy = lab.proxy(mode);
        if let Some(forwarding) = forwarding {
            forwarding.undo();
        }
        let setup = early.unwrap_or_else(|| lab.set_up(scheme));
        let clients = |family| [1, 2].map(|number| Client::new(&lab, family, number, 0));
        let clients = Family::BOTH.map(clients);
        let servers = Family::BOTH.map(|family| Echo::new(&lab, family, Answering::ToProxy(STRAY)));
        let mut memory = 0;
        for number in 1..=20 {
            for client in clients.as_flattened() {
                client.send(&[b'x'; 1200]);
            }
            for server in &servers {
                eventually("questions to come", || server.seen().len() == 2 * number);
            }
            if number == 2 {
                (memory, _) = usage(&proxy);
            }
        }
        drop(servers);
        for client in clients.as_flattened() {
            receive_nothing(&client.socket);
        }
        let (after, ticks) = usage(&proxy);
        assert!(after < memory + 1024, "{memory} kB, then {after} kB");
        // What the kernel keeps of them, in small buffers, wakes nobody.
        let kept = waiting(&lab);
        assert!(kept < 32 * 1024, "{kept} bytes");
        thread::sleep(Duration::from_millis(500));
        let (_, idle) = usage(&proxy);
        assert!(
            idle - ticks < 10,
            "{} ticks while nothing came",
            idle - ticks
        );
        for (family, clients) in Family::BOTH.into_iter().zip(&clients) {
            assert_eq!(proxy.of(family, "ppv2_client_datagrams_total"), 40);
            assert_eq!(proxy.of(family, "ppv2_reply_datagrams_total"), 0);
            assert_eq!(proxy.of(family, "ppv2_sessions"), 2);
            if scheme == Scheme::SdkByProxy {
                let _server = Echo::new(&lab, family, Answering::ByHeader);
                exchange(clients, true);
            }
        }
        drop(proxy);
        setup.undo();
    }
}

/// Ports of one client's address, as of many clients behind a NAT.
const PORTS: usize = 24;

/// How long a server waits with an answer at most; sessions end sooner.
const LATE: Duration = Duration::from_millis(100);

/// Answers after up to [`LATE`], each later or sooner than the one before.
fn answer_late(lab: &Lab, family: Family, stop: &AtomicBool) {
    let socket = lab.at("server", || bind(family.server()));
    socket
        .set_read_timeout(Some(Duration::from_millis(1)))
        .unwrap();
    let mut due: Vec<(Instant, SocketAddr, Vec<u8>)> = Vec::new();
    let mut datagram = [0; 2048];
    let mut number = 0u32;
    while !stop.load(Ordering::Relaxed) {
        if let Ok((len, source)) = socket.recv_from(&mut datagram) {
            number = number.wrapping_add(7);
            let at = Instant::now() + LATE * (number % 13) / 12;
            due.push((at, source, datagram[..len].to_vec()));
        }
        let now = Instant::now();
        due.retain(|(at, source, answer)| {
            if *at <= now {
                socket.send_to(answer, source).unwrap();
            }
            *at > now
        });
    }
}

#[test]
fn no_late_reply_reaches_another_port_of_the_address() {
    let Some(lab) = Lab::enter(test_name!(), Side::Private) else {
        return;
    };
    lab.set_up(Scheme::Transparent);
    // So few that they are taken by the time that the first answers come late.
    let range = "echo 40000 40059 >/proc/sys/net/ipv4/ip_local_port_range";
    lab.sh("proxy", range);
    let proxy = lab.proxy("idle_timeout = \"50ms\"\nmode = \"transparent\"");
    for family in Family::BOTH {
        let clients: Vec<_> = (0..PORTS)
            .map(|_| Client::new(&lab, family, 1, 0))
            .collect();
        let (stop, right) = (AtomicBool::new(false), AtomicUsize::new(0));
        thread::scope(|scope| {
            scope.spawn(|| answer_late(&lab, family, &stop));
            let askers: Vec<_> = clients
                .iter()
                .map(|client| scope.spawn(|| right.fetch_add(churn(client), Ordering::Relaxed)))
                .collect();
            let ended: Vec<_> = askers.into_iter().map(|asker| asker.join()).collect();
            // First, so that the server ends if the test fails.
            stop.store(true, Ordering::Relaxed);
            assert!(ended.iter().all(Result::is_ok), "another's answer came");
        });
        // Ports rest after their sessions, so that there are none for some; were
        // they given on at once, late answers would reach others.
        let opened = proxy.of(family, "ppv2_sessions_opened_total");
        assert!(opened > 50, "{opened} sessions");
        assert!(proxy.dropped(family, "client_port_in_use") > 0);
        assert!(proxy.dropped(family, "reply_late") > 20);
        let right = right.into_inner();
        assert!(right > 20, "{right} answers were in time");
    }
}

/// Asks again and again, each time after the session has ended; what comes must
/// be an answer to this client. Returns how many came.
fn churn(client: &Client) -> usize {
    let own = client.address.to_string();
    let mut datagram = [0; 2048];
    let mut right = 0;
    for number in 0..30 {
        client.send(format!("{own} {number}").as_bytes());
        let next = Instant::now() + Duration::from_millis(75);
        while let Some(left) = next
            .checked_duration_since(Instant::now())
            .filter(|d| !d.is_zero())
        {
            client.socket.set_read_timeout(Some(left)).unwrap();
            if let Ok((len, from)) = client.socket.recv_from(&mut datagram) {
                assert_eq!(from, client.listener);
                let answer = String::from_utf8_lossy(&datagram[..len]);
                let (whose, _) = answer.split_once(' ').unwrap();
                assert_eq!(whose, own);
                right += 1;
            }
        }
    }
    right
}
