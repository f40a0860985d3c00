//! A flood of forged sources that the server doesn't answer displaces no client that is
//! answered.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

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
