//! `/clients`: who sends and gets the most, as an operator asks for it.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};

use ppv2_lab::fake_proxy::from_client;
use ppv2_lab::*;
use serde_json::Value;

/// Where another proxy is, on this host.
const IN_FRONT: &str = "127.0.0.2";

struct Setup {
    _proxy: Process,
    server: UdpSocket,
    listener: SocketAddr,
    admin: SocketAddr,
    _folder: tempfile::TempDir,
}

fn setup(of_listener: &str) -> Setup {
    let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
    let server = socket("127.0.0.1");
    let folder = tempfile::tempdir().unwrap();
    let config = format!(
        "workers = 2\n[admin]\nlisten = \"{admin}\"\n[[listener]]\n\
         bind = [\"{listener}\"]\nupstream = \"u\"\n{of_listener}\n[upstream.u]\n\
         servers = [\"{}\"]\n",
        server.local_addr().unwrap()
    );
    Setup {
        _proxy: proxy_with(&folder, &config),
        server,
        listener,
        admin,
        _folder: folder,
    }
}

impl Setup {
    fn busiest(&self, query: &str) -> Value {
        let (status, body) = http_get(self.admin, &format!("/clients{query}"));
        assert_eq!(status, 200, "{body}");
        serde_json::from_str(&body).unwrap()
    }

    /// The addresses in the answer, in its order.
    fn order(&self, query: &str) -> Vec<String> {
        let answer = self.busiest(query);
        let clients = answer["clients"].as_array().unwrap().iter();
        let address = |client: &Value| client["address"].as_str().unwrap().to_owned();
        clients.map(address).collect()
    }

    /// What there is of this client: datagrams, bytes, new sessions and drops.
    fn figures(&self, address: &str) -> [u64; 4] {
        let mut all = Vec::new();
        for by in ["datagrams", "sessions", "drops"] {
            let answer = self.busiest(&format!("?by={by}"));
            all.extend(answer["clients"].as_array().unwrap().clone());
        }
        let found = all.iter().find(|client| client["address"] == address);
        let figure = |name| found.map_or(0, |found| found[name].as_u64().unwrap());
        ["datagrams", "bytes", "new_sessions", "drops"].map(figure)
    }
}

#[test]
fn clients_are_ranked_by_what_they_send_get_and_lose() {
    let it = setup("deny = [\"127.0.7.0/24\"]");
    let answer = it.busiest("");
    assert_eq!(answer["clients"], Value::Array(Vec::new()));
    assert_eq!(answer["by"], "datagrams");

    // Each question and each answer is a datagram of 8 or 6 bytes.
    let one = socket("127.0.0.2");
    for _ in 0..4 {
        served(&one, it.listener, &it.server);
    }
    for _ in 0..3 {
        served(&socket("127.0.0.3"), it.listener, &it.server);
    }
    let denied = socket("127.0.7.7");
    for _ in 0..2 {
        denied.send_to(b"question", it.listener).unwrap();
    }
    let bytes = |times: u64| times * (b"question".len() + b"answer".len()) as u64;
    eventually("all to be counted", || {
        it.figures("127.0.0.2") == [8, bytes(4), 1, 0]
            && it.figures("127.0.0.3") == [6, bytes(3), 3, 0]
            && it.figures("127.0.7.7") == [0, 0, 0, 2]
    });
    assert_eq!(it.order(""), ["127.0.0.2", "127.0.0.3"]);
    assert_eq!(it.order("?by=bytes"), ["127.0.0.2", "127.0.0.3"]);
    assert_eq!(it.order("?by=sessions"), ["127.0.0.3", "127.0.0.2"]);
    assert_eq!(it.order("?by=sessions&top=1"), ["127.0.0.3"]);
    assert_eq!(it.order("?by=drops&top=9999"), ["127.0.7.7"]);
    let answer = it.busiest("?by=drops");
    assert_eq!(answer["clients"][0]["listener"], "listener1");
    assert_eq!(answer["error"]["drops"], 0);
    assert!(answer["window_seconds"].as_f64().unwrap() > 0.0);

    let (status, body) = http_get(it.admin, "/clients?by=port");
    let expected = "by: expected datagrams, bytes, sessions or drops\n";
    assert_eq!((status, body.as_str()), (400, expected));
}

#[test]
fn clients_behind_a_proxy_are_those_that_headers_name() {
    let it = setup(&format!(
        "deny = [\"2001:db8:1::/48\"]\naccept = {{ from = [\"{IN_FRONT}\"] }}"
    ));
    let in_front = socket(IN_FRONT);
    let send = |client: &str| {
        let datagram = from_client(client, b"question");
        in_front.send_to(&datagram, it.listener).unwrap();
    };
    // One client by its /64, whichever address it has there.
    send("[2001:db8::1]:1000");
    send("[2001:db8::2]:1000");
    send("[2001:db8:1::1]:1000");
    send("198.51.100.7:1000");
    // Of no client that is known.
    in_front.send_to(b"no header", it.listener).unwrap();
    // Its address is its own.
    let stranger = socket("127.0.0.3");
    stranger.send_to(b"question", it.listener).unwrap();
    let question = b"question".len() as u64;
    eventually("all to be counted", || {
        it.figures("2001:db8::/64") == [2, 2 * question, 2, 0]
            && it.figures("198.51.100.7") == [1, question, 1, 0]
            && it.figures("2001:db8:1::/64") == [0, 0, 0, 1]
            && it.figures("127.0.0.3") == [0, 0, 0, 1]
            && dropped(it.admin, "no_header") == 1
    });
    assert_eq!(it.figures(IN_FRONT), [0; 4]);
}

#[test]
fn many_forged_clients_hide_no_busy_one() {
    let it = setup(&format!(
        "deny = [\"10.0.0.0/8\"]\naccept = {{ from = [\"{IN_FRONT}\"] }}"
    ));
    let in_front = socket(IN_FRONT);
    let send = |client: Ipv4Addr| {
        let datagram = from_client(&format!("{client}:1000"), b"question");
        in_front.send_to(&datagram, it.listener).unwrap();
    };
    let busy = Ipv4Addr::new(10, 255, 0, 1);
    let (rounds, forged) = (100, 60);
    for round in 0..rounds {
        for number in 0..forged {
            send(Ipv4Addr::from_bits(0x0a00_0000 + round * forged + number));
        }
        for _ in 0..20 {
            send(busy);
        }
        // The listener's buffer holds as many.
        let sent = u64::from((round + 1) * (forged + 20));
        eventually("the proxy to take them", || {
            dropped(it.admin, "not_allowed") == sent
        });
    }
    let answer = it.busiest("?by=drops&top=500");
    assert_eq!(answer["clients"][0]["address"], busy.to_string());
    assert_eq!(answer["clients"].as_array().unwrap().len(), 500);
    // There are two halves of the window, of one worker.
    let error = answer["error"]["drops"].as_u64().unwrap();
    let all = u64::from(rounds * (forged + 20));
    assert!((1..=2 * all / 512).contains(&error), "{error}");
}
