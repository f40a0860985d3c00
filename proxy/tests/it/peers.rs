//! Two proxies that reach each other's listeners, and a datagram that has them take
//! each other for a client.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use ppv2_lab::namespace::enter;
use ppv2_lab::service::{Proxy, listener};
use ppv2_lab::*;

/// A server that answers whatever comes, until it is dropped.
struct Echo {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Echo {
    fn start(socket: UdpSocket) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let is_over = Arc::clone(&stop);
        socket
            .set_read_timeout(Some(Duration::from_millis(50)))
            .unwrap();
        let thread = thread::spawn(move || {
            let mut datagram = [0; 2048];
            while !is_over.load(Ordering::Relaxed) {
                if let Ok((len, proxy)) = socket.recv_from(&mut datagram) {
                    let _ = socket.send_to(&datagram[..len], proxy);
                }
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(thread::JoinHandle::join);
    }
}

#[test]
fn proxies_that_are_peers_never_answer_each_other() {
    let addresses = "for n in 1 2 3; do ip addr add 2001:db8::$n/128 dev lo; done";
    if !enter(test_name!(), addresses) {
        return;
    }
    for [a, b, server] in [
        ["127.0.0.1", "127.0.0.2", "127.0.0.3"],
        ["2001:db8::1", "2001:db8::2", "2001:db8::3"],
    ] {
        let port = port();
        let [a, b] = [a, b].map(|ip| SocketAddr::new(ip.parse().unwrap(), port));
        let (client, server) = (socket(server), socket(server));
        let to = server.local_addr().unwrap();
        let config = |listen, peers: &str| {
            format!(
                "{peers}\n{}[upstream.u]\nservers = [\"{to}\"]\n",
                listener("l", listen, "u")
            )
        };
        let of = |proxy: &Proxy, name: &str| proxy.metric(&format!("{name}{{listener=\"l\"}}"));
        let refused = |proxy: &Proxy| {
            proxy.metric("ppv2_dropped_datagrams_total{listener=\"l\",reason=\"bad_source\"}")
        };

        // A datagram from the address that the second proxy is to have.
        let forge = || bind(b).send_to(b"forged", a).unwrap();
        let first = Proxy::start(&config(a, ""));
        forge();
        let (question, session) = receive(&server);
        let second = Proxy::start(&config(b, ""));
        server.send_to(&question, session).unwrap();
        let _echo = Echo::start(server);
        for proxy in [&first, &second] {
            eventually("an exchange without end", || {
                of(proxy, "ppv2_client_datagrams_total") > 1000
            });
        }

        // A reload of one ends it.
        first.reload(&config(a, &format!("peers = [\"{}\"]", b.ip())));
        eventually("the session to end", || of(&first, "ppv2_sessions") == 0);
        let denied = "ppv2_sessions_ended_total{listener=\"l\",reason=\"denied\"}";
        assert_eq!(first.metric(denied), 1);
        drop(second);

        // None begins any more, and honest clients are served.
        let before = refused(&first);
        forge();
        eventually("the drop", || refused(&first) == before + 1);
        assert_eq!(of(&first, "ppv2_sessions"), 0);
        client.send_to(b"question", a).unwrap();
        assert_eq!(receive(&client), (b"question".to_vec(), a));
    }
}

#[test]
fn check_asks_for_peers_where_other_proxies_may_have_the_address() {
    let anycast = "ip addr add 203.0.113.1/32 dev lo; ip addr add 2001:db8::1/128 dev lo
        ip link add eth0 type veth peer name other; ip addr add 192.0.2.7/24 dev eth0
        echo 1 >/proc/sys/net/ipv4/ip_nonlocal_bind";
    if !enter(test_name!(), anycast) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let warns = |bind: &str, peers: &str| {
        let listener = listener("l", bind.parse().unwrap(), "u");
        let config = format!("{peers}\n{listener}[upstream.u]\nservers = [\"192.0.2.9:53\"]\n");
        let file = write(&folder, "proxy.toml", &config);
        let (code, report, error) = output(&["check", "--config", file.to_str().unwrap()]);
        assert_eq!(code, Some(0), "{error}");
        let warning = report.lines().find(|line| line.contains("`peers`"));
        warning.map(str::to_owned)
    };
    for (bind, why) in [
        ("203.0.113.1:53", "an address of lo"),
        ("[2001:db8::1]:53", "an address of lo"),
        ("203.0.113.2:53", "net.ipv4.ip_nonlocal_bind is 1"),
    ] {
        let warning = warns(bind, "").unwrap();
        assert!(warning.contains(why), "{warning}");
        assert_eq!(warns(bind, "peers = [\"203.0.113.7\"]"), None);
        assert_eq!(warns(bind, "peers = []"), None);
    }
    for bind in [
        "127.0.0.1:53",
        "0.0.0.0:53",
        "192.0.2.7:53",
        "[2001:db8::2]:53",
    ] {
        assert_eq!(warns(bind, ""), None, "{bind}");
    }
}
