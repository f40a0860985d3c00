//! When sessions run out, new ones replace those that were never answered, and
//! answered ones stay.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use ppv2_lab::*;

/// What a proxy of few sessions serves.
struct Few {
    proxy: Process,
    server: UdpSocket,
    listener: SocketAddr,
    admin: SocketAddr,
    _folder: tempfile::TempDir,
}

fn few(host: &str, of_listener: &str, max_sessions: usize) -> Few {
    let (listener, admin) = (address(host), address(host));
    let server = socket(host);
    let folder = tempfile::tempdir().unwrap();
    let config = format!(
        "workers = 1\n[limits]\nmax_sessions = {max_sessions}\n[admin]\nlisten = \"{admin}\"\n\
         [[listener]]\nbind = [\"{listener}\"]\nupstream = \"u\"\n{of_listener}\n\
         [upstream.u]\nservers = [\"{}\"]\n",
        server.local_addr().unwrap()
    );
    Few {
        proxy: proxy_with(&folder, &config),
        server,
        listener,
        admin,
        _folder: folder,
    }
}

impl Few {
    /// The port that the client's question reaches the server from.
    fn ask(&self, client: &UdpSocket) -> SocketAddr {
        client.send_to(b"question", self.listener).unwrap();
        self.heard(client).unwrap()
    }

    /// As [`ask`](Self::ask), again and again until it reaches the server.
    fn ask_until_heard(&self, client: &UdpSocket) -> SocketAddr {
        let timeout = |timeout| self.server.set_read_timeout(Some(timeout)).unwrap();
        timeout(Duration::from_millis(20));
        let mut from = None;
        eventually("a question to be heard", || {
            client.send_to(b"question", self.listener).unwrap();
            from = self.heard(client);
            from.is_some()
        });
        timeout(TIMEOUT);
        from.unwrap()
    }

    /// What the server hears of this client, past what others asked more than once.
    fn heard(&self, client: &UdpSocket) -> Option<SocketAddr> {
        let own = client.local_addr().unwrap();
        let mut datagram = [0; 2048];
        loop {
            let (len, from) = self.server.recv_from(&mut datagram).ok()?;
            if read_header(&datagram[..len]).0 == own {
                return Some(from);
            }
        }
    }

    fn answer(&self, client: &UdpSocket, at: SocketAddr, answer: &[u8]) {
        self.server.send_to(answer, at).unwrap();
        assert_eq!(receive(client), (answer.to_vec(), self.listener));
    }

    fn gave_way(&self) -> u64 {
        let name = "ppv2_sessions_ended_total{listener=\"listener1\",reason=\"unanswered\"}";
        metric(self.admin, name)
    }
}

#[test]
fn full_table_replaces_unanswered_sessions_alone() {
    for host in ["127.0.0.1", "::1"] {
        let it = few(host, "", 3);
        let [old, silent, other, new] = [(); 4].map(|()| socket(host));
        let of_old = it.ask(&old);
        it.answer(&old, of_old, b"first");
        let of_silent = it.ask(&silent);
        let of_other = it.ask(&other);

        let of_new = it.ask_until_heard(&new);
        assert!(![of_old, of_silent, of_other].contains(&of_new));
        // At most one more than is needed.
        assert!((1..=2).contains(&it.gave_way()));
        // An answer that comes in spite of all reaches its own client.
        it.answer(&silent, of_silent, b"late");
        it.answer(&new, of_new, b"in time");
        assert_eq!(it.ask(&old), of_old);
        receive_nothing(&other);
    }
}

#[test]
fn unread_answer_keeps_its_session() {
    let it = few("127.0.0.1", "", 2);
    let [old, waiting, silent] = [(); 3].map(|()| socket("127.0.0.1"));
    let of_old = it.ask(&old);
    it.answer(&old, of_old, b"first");
    let of_waiting = it.ask(&waiting);
    // Both come while the proxy stands still, which takes the question first.
    it.proxy.pause();
    silent.send_to(b"question", it.listener).unwrap();
    it.server.send_to(b"answer", of_waiting).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    it.proxy.signal("CONT");
    assert_eq!(receive(&waiting).0, b"answer");
    eventually("a refusal", || dropped(it.admin, "max_sessions") == 1);
    assert_eq!(it.ask(&waiting), of_waiting);
    assert_eq!(it.gave_way(), 0);
}

#[test]
fn client_limit_replaces_unanswered_sessions() {
    for (host, forged) in [("127.0.0.2", "127.0.0.2"), ("::1", "::1")] {
        let bound = "per_client = { sessions = 3 }";
        let it = few(if host == "::1" { "::1" } else { "127.0.0.1" }, bound, 100);
        let old = socket(host);
        let of_old = it.ask(&old);
        it.answer(&old, of_old, b"first");
        let in_its_name = [(); 2].map(|()| socket(forged));
        for client in &in_its_name {
            it.ask(client);
        }
        for _ in 0..3 {
            let new = socket(host);
            let of_new = it.ask_until_heard(&new);
            assert_ne!(of_new, of_old);
        }
        assert_eq!(it.ask(&old), of_old);
        assert!(it.gave_way() >= 3);
    }
}
