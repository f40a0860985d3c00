//! What each check finds out about real sockets.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, UdpSocket as Blocking};
use std::thread;

use regex::bytes::Regex;
use rustix::io::Errno;
use tokio::time::Instant;

use super::*;
use crate::config::{Expect, Header};
use crate::health::check::Outcome;

/// Longer than an answer takes on a busy host, and what a check of wrong answers takes.
const DEADLINE: Duration = Duration::from_secs(1);

fn target(address: SocketAddr) -> Target {
    Target {
        address,
        source: None,
        freebind: false,
        reads: Reads::Payload,
    }
}

fn outcome(mut check: impl HealthCheck) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async { check.check(Instant::now() + DEADLINE).await })
}

fn udp(target: Target, expect: Expect) -> Udp {
    Udp {
        target,
        header: Header::Auto,
        payload: b"ping".to_vec(),
        expect,
    }
}

fn tcp(target: Target) -> Tcp {
    Tcp { target, port: None }
}

/// The outcome of a check whose datagram is answered by `answers`.
fn answered<C: HealthCheck>(
    check: impl Fn(Target) -> C,
    answers: impl Fn(&[u8]) -> Vec<Vec<u8>> + Sync,
) -> Outcome {
    let server = Blocking::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut question = [0; 2000];
            let (len, from) = server.recv_from(&mut question).unwrap();
            for answer in answers(&question[..len]) {
                // The check may be over, and refuse the rest.
                let _ = server.send_to(&answer, from);
            }
        });
        outcome(check(target(address)))
    })
}

#[test]
fn a_dns_answer_has_the_id_and_is_no_failure() {
    let dns = |target| Dns {
        target,
        query: vec![0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1],
        header: Header::None,
    };
    fn with(question: &[u8], flags: [u8; 2]) -> Vec<Vec<u8>> {
        let mut answer = question.to_vec();
        answer[2..4].copy_from_slice(&flags);
        vec![answer]
    }
    let nxdomain = answered(dns, |question| with(question, [0x81, 0x83]));
    assert_eq!(nxdomain, Outcome::Passed);
    let servfail = answered(dns, |question| with(question, [0x81, 0x82]));
    assert_eq!(servfail, Outcome::WrongAnswer);
    let echo = answered(dns, |question| vec![question.to_vec()]);
    assert_eq!(echo, Outcome::WrongAnswer);
    let cut_short = answered(dns, |question| {
        vec![with(question, [0x81, 0x80])[0][..11].to_vec()]
    });
    assert_eq!(cut_short, Outcome::WrongAnswer);
    let other_id = answered(dns, |question| {
        let mut answers = with(question, [0x81, 0x80]);
        answers[0][0] ^= 1;
        answers
    });
    assert_eq!(other_id, Outcome::WrongAnswer);
}

#[test]
fn a_flood_of_wrong_answers_ends_a_check() {
    let pong = |target| udp(target, Expect::Bytes(b"pong".to_vec()));
    let late = answered(pong, |_| vec![b"no".to_vec(), b"pong".to_vec()]);
    assert_eq!(late, Outcome::Passed);
    let flood = answered(pong, |_| {
        let mut answers = vec![b"no".to_vec(); 100];
        answers.push(b"pong".to_vec());
        answers
    });
    assert_eq!(flood, Outcome::WrongAnswer);
}

#[test]
fn only_the_beginning_of_an_answer_is_searched() {
    let regex = Arc::new(Regex::new("pong").unwrap());
    let matching = |target| udp(target, Expect::Matching(Arc::clone(&regex)));
    fn after(len: usize) -> Vec<Vec<u8>> {
        let mut answer = vec![b' '; len];
        answer.extend(b"pong");
        answer.resize(20_000, b' ');
        vec![answer]
    }
    assert_eq!(answered(matching, |_| after(4092)), Outcome::Passed);
    assert_eq!(answered(matching, |_| after(4093)), Outcome::WrongAnswer);
}

#[test]
fn a_server_of_simple_proxy_protocol_is_asked_by_it_and_must_return_the_header() {
    let of_spp = |target: Target| Target {
        reads: Reads::Spp,
        ..target
    };
    let any = |target| udp(of_spp(target), Expect::Any);
    let exact = |target| udp(of_spp(target), Expect::Bytes(b"pong".to_vec()));
    let returned = |question: &[u8]| {
        let (header, payload) = ppv2::spp::decode(question).unwrap();
        assert!(header.client.ip().is_loopback() && header.client != header.proxy);
        assert_eq!(payload, b"ping");
        vec![[&header.to_bytes()[..], b"pong"].concat()]
    };
    let bare = |_: &[u8]| vec![b"pong".to_vec()];
    let other = |question: &[u8]| {
        let mut answer = returned(question);
        answer[0][35] ^= 1;
        answer
    };
    assert_eq!(answered(any, returned), Outcome::Passed);
    assert_eq!(answered(exact, returned), Outcome::Passed);
    assert_eq!(answered(any, bare), Outcome::WrongAnswer);
    assert_eq!(answered(exact, other), Outcome::WrongAnswer);
    let silence = |target| udp(of_spp(target), Expect::Silence);
    assert_eq!(answered(silence, bare), Outcome::Passed);
}

#[test]
fn a_closed_port_is_refused_even_where_silence_passes() {
    let free = Blocking::bind("127.0.0.1:0").unwrap();
    let target = target(free.local_addr().unwrap());
    let silence = || Udp {
        target: target.clone(),
        header: Header::Local,
        payload: Vec::new(),
        expect: Expect::Silence,
    };
    assert_eq!(outcome(silence()), Outcome::Passed);
    let mut datagram = [0; 100];
    let (len, _) = free.recv_from(&mut datagram).unwrap();
    let (header, rest) = ppv2::decode(&datagram[..len]).unwrap();
    assert_eq!(header.origin(), ppv2::Origin::Local);
    assert!(rest.is_empty());
    drop(free);
    assert_eq!(outcome(silence()), Outcome::Refused);
}

#[test]
fn an_unreachable_address_counts_against_the_server() {
    // Broadcast is a privilege, and a link-local address takes an interface.
    for address in ["255.255.255.255:9", "[fe80::1]:9"] {
        let target = target(address.parse().unwrap());
        let any = udp(target.clone(), Expect::Any);
        assert_eq!(outcome(any), Outcome::Unreachable, "{address}");
        assert_eq!(outcome(tcp(target)), Outcome::Unreachable, "{address}");
    }
    // A source address that this host lacks says nothing about the server.
    let server = Blocking::bind("127.0.0.1:0").unwrap();
    let target = Target {
        source: Some("192.0.2.1".parse().unwrap()),
        ..target(server.local_addr().unwrap())
    };
    assert_eq!(outcome(udp(target.clone(), Expect::Any)), Outcome::Unknown);
    assert_eq!(outcome(tcp(target)), Outcome::Unknown);
}

#[test]
fn a_shortage_of_this_host_says_nothing_about_the_server() {
    let of = |errno: Errno| Outcome::of(&errno.into());
    for errno in [
        Errno::MFILE,
        Errno::NFILE,
        Errno::NOBUFS,
        Errno::NOMEM,
        Errno::AGAIN,
        Errno::PERM,
    ] {
        assert_eq!(of(errno), Outcome::Unknown, "{errno:?}");
    }
    for errno in [
        Errno::ACCESS,
        Errno::INVAL,
        Errno::NETUNREACH,
        Errno::ADDRNOTAVAIL,
        Errno::NOPROTOOPT,
        Errno::HOSTDOWN,
        Errno::NONET,
    ] {
        assert_eq!(of(errno), Outcome::Unreachable, "{errno:?}");
    }
    // After a datagram was sent, other errors leave it to the timeout.
    let of_sent = |errno: Errno| Outcome::of_sent(&errno.into());
    assert_eq!(of_sent(Errno::CONNREFUSED), Some(Outcome::Refused));
    for errno in [Errno::NOPROTOOPT, Errno::HOSTDOWN, Errno::NONET] {
        assert_eq!(of_sent(errno), Some(Outcome::Unreachable), "{errno:?}");
    }
    for errno in [Errno::MSGSIZE, Errno::PROTO, Errno::OPNOTSUPP, Errno::PERM] {
        assert_eq!(of_sent(errno), None, "{errno:?}");
    }
}

#[test]
fn a_tcp_port_beside_the_server_is_checked() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let thread = thread::spawn(move || {
        let mut statuses = ["204 Fine", "503 Busy"].iter().peekable();
        while let Some(status) = statuses.peek() {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 1000];
            // The TCP check sends nothing, nor does another test that had the port.
            let len = stream.read(&mut request).unwrap_or(0);
            if request[..len].starts_with(b"GET /up HTTP/1.1\r\n") {
                write!(stream, "HTTP/1.1 {status}\r\n\r\n").unwrap();
                statuses.next();
            }
        }
    });
    let beside = || Tcp {
        // The server's own port is another one.
        target: target(SocketAddr::new(address.ip(), 1)),
        port: Some(address.port()),
    };
    let http = || Http {
        tcp: beside(),
        path: "/up".to_owned(),
    };
    assert_eq!(outcome(beside()), Outcome::Passed);
    assert_eq!(outcome(http()), Outcome::Passed);
    assert_eq!(outcome(http()), Outcome::WrongAnswer);
    thread.join().unwrap();
    assert_eq!(outcome(http()), Outcome::Refused);
}
