//! `emit = "first"`: the header comes until the server has answered, again when the
//! server may have forgotten it, and never from a client.

use std::net::{SocketAddr, UdpSocket};

use ppv2_lab::service::Proxy;
use ppv2_lab::*;

/// What a client could have a server believe: that it is 203.0.113.66.
const FORGED: [&[u8]; 2] = [
    b"\r\n\r\n\0\r\nQUIT\n\x21\x12\x00\x0c\xcb\x00\x71\x42\x7f\x00\x00\x01\0\x01\0\x02evil",
    b"PROXY TCP4 203.0.113.66 127.0.0.1 1 2\r\nevil",
];

/// The header of these tests.
const HEADER: &str = "emit = \"first\", crc32c = true";

/// A client, the proxy and the server that it writes to, of one address family.
struct First {
    proxy: Proxy,
    client: UdpSocket,
    listener: SocketAddr,
    server: UdpSocket,
}

fn config(listener: SocketAddr, server: SocketAddr, of_upstream: &str) -> String {
    format!(
        "[[listener]]\nname = \"l\"\nbind = [\"{listener}\"]\nupstream = \"u\"\n\
         [upstream.u]\nservers = [\"{server}\"]\nheader = {{ {HEADER} }}\n\
         {of_upstream}\n"
    )
}

impl First {
    fn start(ip: &str, of_upstream: &str) -> Self {
        Self::start_with(ip, HEADER, of_upstream)
    }

    fn start_with(ip: &str, header: &str, of_upstream: &str) -> Self {
        let (listener, server) = (address(ip), bind(address(ip)));
        let to = server.local_addr().unwrap();
        Self {
            proxy: Proxy::start(&config(listener, to, of_upstream).replace(HEADER, header)),
            client: socket(ip),
            listener,
            server,
        }
    }

    /// Sends a datagram, and says what came to the server, from where, and whether the
    /// client's header was in front.
    fn passes(&self, payload: &[u8]) -> (bool, SocketAddr) {
        self.client.send_to(payload, self.listener).unwrap();
        let (datagram, session) = receive(&self.server);
        if datagram == payload {
            return (false, session);
        }
        let (header, rest) = ppv2::decode(&datagram).unwrap();
        assert_eq!(header.client(), Some(self.client.local_addr().unwrap()));
        assert_eq!(header.destination(), Some(self.listener));
        assert!(header.tlvs().crc32c().is_some());
        assert_eq!(rest, payload);
        (true, session)
    }

    fn answers(&self, session: SocketAddr) {
        self.server.send_to(b"answer", session).unwrap();
        assert_eq!(receive(&self.client), (b"answer".to_vec(), self.listener));
    }

    /// Has the server know the client.
    fn is_known(&self) {
        let (has_header, session) = self.passes(b"hello");
        assert!(has_header);
        self.answers(session);
        assert_eq!(self.passes(b"more"), (false, session));
        self.answers(session);
    }

    fn metric(&self, name: &str, reason: &str) -> u64 {
        let labels = format!("{{listener=\"l\",reason=\"{reason}\"}}");
        self.proxy.metric(&format!("{name}{labels}"))
    }
}

#[test]
fn the_header_comes_until_the_server_has_answered() {
    for ip in ["127.0.0.1", "::1"] {
        let first = First::start(ip, "");
        let mut sessions = (0..5).map(|_| {
            let (has_header, session) = first.passes(b"hello");
            assert!(has_header);
            session
        });
        let session = sessions.next_back().unwrap();
        first.answers(session);
        for _ in 0..5 {
            assert_eq!(first.passes(b"more"), (false, session));
            first.answers(session);
        }
        // Another client is another session.
        let first = First {
            client: socket(ip),
            ..first
        };
        first.is_known();
    }
}

#[test]
fn no_client_passes_off_a_header_of_its_own() {
    for ip in ["127.0.0.1", "::1"] {
        let first = First::start(ip, "");
        let dropped = || first.metric("ppv2_dropped_datagrams_total", "forged_header");
        let forge = || {
            for forged in FORGED {
                first.client.send_to(forged, first.listener).unwrap();
            }
        };
        // Behind a datagram that is lost: the first is too long to be sent.
        first.client.send_to(&[0; 65_507], first.listener).unwrap();
        forge();
        assert!(first.passes(b"PROXY, but no header").0);
        assert_eq!(dropped(), 2);
        // A server that knows the client could have restarted.
        first.is_known();
        forge();
        assert!(!first.passes(b"next").0);
        assert_eq!(dropped(), 4);
    }
}

#[test]
fn a_server_that_restarts_gets_the_header_again() {
    // The host's kernel reports a bounded number of refusals a second, to all tests together.
    if !namespace::enter(test_name!(), "") {
        return;
    }
    let network = "source = [\"127.64.0.0/10\"]";
    for (ip, source) in [("127.0.0.1", ""), ("::1", ""), ("127.0.0.1", network)] {
        let mut first = First::start(ip, source);
        first.is_known();
        let address = first.server.local_addr().unwrap();
        let refusals =
            format!("ppv2_upstream_icmp_errors_total{{upstream=\"u\",server=\"{address}\"}}");

        // The host of the server says that no socket listens there.
        drop(std::mem::replace(&mut first.server, socket(ip)));
        first.client.send_to(b"lost", first.listener).unwrap();
        eventually("the refusal", || first.proxy.metric(&refusals) > 0);
        first.server = bind(address);
        first.is_known();

        // No error comes: it comes back before the client writes again.
        drop(std::mem::replace(&mut first.server, socket(ip)));
        first.server = bind(address);
        eventually("the header", || first.passes(b"anybody there?").0);
        let (has_header, session) = first.passes(b"hello");
        assert!(has_header);
        first.answers(session);
        assert!(!first.passes(b"more").0);
    }
}

#[test]
fn a_server_that_was_down_gets_the_header_again() {
    // It is the only one, so that its sessions stay.
    let health = "health = { every = \"200ms\", timeout = \"100ms\", fall = 2, rise = 1,\n  \
                  probe = { kind = \"tcp\", port = PORT } }";
    let companion = std::net::TcpListener::bind(address("127.0.0.1")).unwrap();
    let port = companion.local_addr().unwrap().port().to_string();
    let first = First::start("127.0.0.1", &health.replace("PORT", &port));
    first.is_known();
    let server = first.server.local_addr().unwrap();
    let up = format!("ppv2_upstream_up{{upstream=\"u\",server=\"{server}\"}}");
    drop(companion);
    eventually("it to be down", || first.proxy.metric(&up) == 0);
    // The worker is told at its own time.
    eventually("the header", || {
        let (has_header, session) = first.passes(b"hello");
        first.answers(session);
        has_header
    });
    assert!(!first.passes(b"more").0);

    // It answered though its companion did not: what answers when it has come back may be
    // another process.
    let _companion = std::net::TcpListener::bind(("127.0.0.1", port.parse().unwrap())).unwrap();
    eventually("it to be up", || first.proxy.metric(&up) == 1);
    eventually("the header", || {
        let (has_header, session) = first.passes(b"hello");
        first.answers(session);
        has_header
    });
    assert!(!first.passes(b"more").0);
    let moved = first.metric("ppv2_sessions_ended_total", "moved");
    assert_eq!(moved, 0);
}

#[test]
fn a_session_that_moves_takes_its_header_along() {
    let keys = "lame_duck = \"0s\"";
    let mut first = First::start("127.0.0.1", keys);
    first.is_known();
    let other = bind(address("127.0.0.1"));
    let to = other.local_addr().unwrap();
    first.proxy.reload(&config(first.listener, to, keys));
    let moved = || first.metric("ppv2_sessions_ended_total", "moved");
    eventually("the move", || {
        first.client.send_to(b"hello", first.listener).unwrap();
        moved() == 1
    });
    first.server = other;
    let (has_header, session) = first.passes(b"hello");
    assert!(has_header);
    first.answers(session);
}

#[test]
fn the_header_is_repeated_though_the_server_answers() {
    let first = First::start_with("127.0.0.1", &format!("{HEADER}, repeat = \"300ms\""), "");
    let mut had_it = Vec::new();
    let changes = |had_it: &[bool]| had_it.windows(2).filter(|two| two[0] != two[1]).count();
    // With it, without, with, without, with.
    eventually("headers and datagrams without one, in turn", || {
        let (has_header, session) = first.passes(b"hello");
        first.answers(session);
        had_it.push(has_header);
        changes(&had_it) >= 4
    });
    assert!(had_it[0]);
    // A reload turns it off for the session that goes on.
    let to = first.server.local_addr().unwrap();
    first.proxy.reload(&config(first.listener, to, ""));
    let mut in_a_row = 0;
    eventually("no header for longer than it is repeated after", || {
        let (has_header, session) = first.passes(b"hello");
        first.answers(session);
        std::thread::sleep(std::time::Duration::from_millis(100));
        in_a_row = if has_header { 0 } else { in_a_row + 1 };
        in_a_row > 6
    });
    let moved = first.metric("ppv2_sessions_ended_total", "moved");
    assert_eq!(moved, 0);
}
