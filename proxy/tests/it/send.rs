//! `send`: what it puts on the wire, and what it says of the replies.

use std::net::{SocketAddr, UdpSocket};
use std::process::Command;
use std::thread;

use ppv2::spp::{self, SppHeader};
use ppv2::{Origin, TlvType};
use ppv2_lab::*;

const CLIENT: &str = "203.0.113.11:54321";
const DESTINATION: &str = "198.51.100.10:9000";

/// `send` to `server`, which must end with `code`: what it printed, and its error.
#[track_caller]
fn send(server: SocketAddr, more: &[&str], code: i32) -> (String, String) {
    let server = server.to_string();
    let arguments = [&["send", &server][..], more].concat();
    let (status, stdout, stderr) = output(&arguments);
    assert_eq!(status, Some(code), "{arguments:?}\n{stdout}\n{stderr}");
    (stdout, stderr)
}

#[track_caller]
fn has(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "no `{part}` in\n{text}");
    }
}

/// `send` while a server answers its datagrams: what it printed, and the datagrams.
#[track_caller]
fn served(
    count: usize,
    more: &[&str],
    reply: impl Fn(usize, &[u8]) -> Option<Vec<u8>> + Send,
) -> (String, Vec<Vec<u8>>) {
    let server = socket("127.0.0.1");
    let address = server.local_addr().unwrap();
    thread::scope(|scope| {
        let serving = scope.spawn(move || {
            let serve = |number| {
                let (datagram, from) = receive(&server);
                if let Some(reply) = reply(number, &datagram) {
                    server.send_to(&reply, from).unwrap();
                }
                datagram
            };
            (0..count).map(serve).collect()
        });
        let (stdout, _) = send(address, more, 0);
        (stdout, serving.join().unwrap())
    })
}

fn whoami(ip: &str, more: &[&str]) -> (Process, SocketAddr) {
    let listen = address(ip);
    let arguments = ["--listen", &listen.to_string(), "--trusted", ip];
    let mut command = Command::new(binary());
    command.arg("whoami").args(arguments).args(more);
    let mut whoami = Process::start(&mut command);
    whoami.wait_for("ready");
    (whoami, listen)
}

#[test]
fn the_server_sees_the_client_of_the_header() {
    for (ip, client) in [("127.0.0.1", CLIENT), ("::1", "[2001:db8::11]:54321")] {
        let (_whoami, server) = whoami(ip, &[]);
        let (text, _) = send(server, &["--client", client, "--crc32c"], 0);
        has(
            &text,
            &[&format!("\n{client}\n"), " client ", "payload of 5 bytes"],
        );
        assert!(
            text.contains(&format!("client {client}, destination {server}")),
            "{text}"
        );

        // The port is the socket's own.
        let client_ip = client.parse::<SocketAddr>().unwrap().ip().to_string();
        let (text, _) = send(server, &["--client", &client_ip], 0);
        let without_port = client.strip_suffix("54321").unwrap();
        has(&text, &[&format!("client {without_port}")]);
        assert!(!text.contains(":54321"), "{text}");

        // Replies of whoami are addresses: here, the one that was sent from.
        let (text, _) = send(server, &["--local"], 0);
        let (_, sender) = text.split_once("from ").unwrap();
        let (sender, _) = sender.split_once(' ').unwrap();
        has(&text, &["LOCAL", &format!("\n{sender}\n")]);

        let tag = "reply_tag=hex:01 00 0102030405060708";
        let (text, _) = send(server, &["--client", client, "--tlv", tag], 0);
        has(
            &text,
            &["behind a header with this client and its reply tag", client],
        );

        let (text, stderr) = send(server, &["--format", "none", "--timeout", "300ms"], 1);
        has(
            &text,
            &["no header; payload of 5 bytes", "no reply within 300ms"],
        );
        has(
            &stderr,
            &["1 of 1 datagrams had no reply", "expects headers from"],
        );
        let (_, stderr) = send(server, &["--format", "v1", "--timeout", "300ms"], 1);
        has(&stderr, &["servers must drop PROXY v1 over UDP"]);
    }
}

#[test]
fn spp_and_headers_that_are_said_once_reach_servers_that_read_them() {
    for (ip, client) in [("127.0.0.1", CLIENT), ("::1", "[2001:db8::11]:54321")] {
        let answer = format!("\n{client}\n");
        let (_spp, server) = whoami(ip, &["--format", "spp"]);
        let (text, _) = send(server, &["--format", "spp", "--client", client], 0);
        has(&text, &["behind the SPP header of this client", &answer]);
        let (_, stderr) = send(server, &["--client", client, "--timeout", "300ms"], 1);
        has(&stderr, &["1 of 1 datagrams had no reply"]);

        let (_remembering, server) = whoami(ip, &["--remember", "1m"]);
        for emit in ["every", "first", "alone"] {
            let more = ["--emit", emit, "--count", "3", "--client", client];
            let (text, _) = send(server, &more, 0);
            assert_eq!(text.matches(&answer).count(), 3, "{emit}: {text}");
        }
    }
}

#[test]
fn it_is_a_proxy_in_front_of_the_proxy() {
    let (_whoami, server) = whoami("127.0.0.1", &[]);
    let listener = address("127.0.0.1");
    let config = format!(
        "[[listener]]\nbind = [\"{listener}\"]\nupstream = \"u\"\n\
         accept = {{ from = [\"127.0.0.1\"], formats = [\"v2\", \"spp\"] }}\n\
         [upstream.u]\nservers = [\"{server}\"]\n"
    );
    let folder = tempfile::tempdir().unwrap();
    let _proxy = proxy_with(&folder, &config);
    let answer = format!("\n{CLIENT}\n");
    let named = ["--client", CLIENT, "--destination", DESTINATION];
    for (more, part) in [
        (&["--format", "v2"][..], "received 18 bytes"),
        (&["--format", "spp"], "behind the SPP header of this client"),
        (
            &["--tlv", "reply_tag=hex:01000102030405060708"],
            "its reply tag",
        ),
    ] {
        let (text, _) = send(listener, &[&named, more].concat(), 0);
        has(&text, &[&answer, part]);
    }
    let (_, stderr) = send(listener, &["--format", "none", "--timeout", "300ms"], 1);
    has(&stderr, &["expects headers from 127.0.0.1"]);
}

#[test]
fn the_datagram_is_what_was_asked_for() {
    let more = [
        "payload text",
        "--client",
        CLIENT,
        "--destination",
        DESTINATION,
        "--tlv",
        "authority=example.org",
        "--tlv",
        "0xE1=hex:0a0b",
        "--crc32c",
    ];
    let (text, datagrams) = served(1, &more, |_, _| Some(b"\xff\x00".to_vec()));
    let (header, payload) = ppv2::decode(&datagrams[0]).unwrap();
    assert_eq!(payload, b"payload text");
    assert_eq!(header.client(), Some(CLIENT.parse().unwrap()));
    assert_eq!(header.destination(), Some(DESTINATION.parse().unwrap()));
    let types: Vec<_> = header.tlvs().iter().map(|tlv| tlv.kind).collect();
    assert_eq!(types, [TlvType::AUTHORITY, TlvType(0xe1), TlvType::CRC32C]);
    assert_eq!(header.tlvs().get(TlvType(0xe1)), Some(&b"\x0a\x0b"[..]));
    has(
        &text,
        &["payload of 12 bytes", "received 2 bytes", "\nff00\n"],
    );

    let (_, datagrams) = served(1, &["--local", "--hex", "00 ff"], |_, _| Some(Vec::new()));
    let (header, payload) = ppv2::decode(&datagrams[0]).unwrap();
    assert_eq!(
        (header.origin(), payload),
        (Origin::Local, &b"\x00\xff"[..])
    );

    let v1 = [
        "x",
        "--format",
        "v1",
        "--client",
        CLIENT,
        "--destination",
        DESTINATION,
    ];
    let (_, datagrams) = served(1, &v1, |_, _| Some(Vec::new()));
    let line = "PROXY TCP4 203.0.113.11 198.51.100.10 54321 9000\r\nx";
    assert_eq!(datagrams[0], line.as_bytes());

    // One family for both: the client is v4-mapped.
    let mixed = ["--client", CLIENT, "--destination", "[2001:db8::10]:9000"];
    let (_, datagrams) = served(1, &mixed, |_, _| Some(Vec::new()));
    let (header, _) = ppv2::decode(&datagrams[0]).unwrap();
    assert_eq!(
        header.client().unwrap().to_string(),
        "[::ffff:203.0.113.11]:54321"
    );
}

#[test]
fn the_header_of_an_spp_reply_is_read_and_stripped() {
    let more = [
        "--format",
        "spp",
        "--client",
        CLIENT,
        "--destination",
        DESTINATION,
    ];
    let reply = |_, datagram: &[u8]| Some([&datagram[..spp::SPP_HEADER_LEN], b"welcome"].concat());
    let (text, datagrams) = served(1, &more, reply);
    let (header, payload) = spp::decode(&datagrams[0]).unwrap();
    let expected = SppHeader {
        client: CLIENT.parse().unwrap(),
        proxy: DESTINATION.parse().unwrap(),
    };
    assert_eq!((header, payload), (expected, &b"hello"[..]));
    has(
        &text,
        &[
            "received 7 bytes",
            "behind the SPP header of this client",
            "\nwelcome\n",
        ],
    );

    let other = SppHeader {
        client: "203.0.113.12:1".parse().unwrap(),
        ..expected
    };
    let reply = |_, _: &[u8]| Some([&other.to_bytes()[..], b"welcome"].concat());
    let (text, _) = served(1, &more, reply);
    has(
        &text,
        &["another SPP header, so that a proxy would drop it: client 203.0.113.12:1"],
    );
    let (text, _) = served(1, &more, |_, _| Some(b"welcome".to_vec()));
    has(
        &text,
        &[
            "without an SPP header, so that a proxy would drop it: byte 0",
            "\nwelcome\n",
        ],
    );
}

#[test]
fn a_header_can_be_on_the_first_datagram_or_in_one_of_its_own() {
    let echo = |_, datagram: &[u8]| Some(datagram.to_vec());
    let (text, datagrams) = served(3, &["x", "--emit", "first", "--count", "3"], echo);
    assert_eq!(ppv2::decode(&datagrams[0]).unwrap().1, b"x");
    assert_eq!(datagrams[1..], [b"x", b"x"]);
    has(
        &text,
        &[
            "which begin like a header: PROXY protocol v2",
            "no header; payload of 1 bytes",
        ],
    );

    let alone = ["x", "--emit", "alone", "--count", "2"];
    let (_, datagrams) = served(3, &alone, |number, _| (number > 0).then(|| b"y".to_vec()));
    assert_eq!(ppv2::decode(&datagrams[0]).unwrap().1, b"");
    assert_eq!(datagrams[1..], [b"x", b"x"]);
}

#[test]
fn a_server_that_is_not_there_and_one_that_is_silent_are_told_apart() {
    let nobody = address("127.0.0.1");
    let (_, stderr) = send(nobody, &["--count", "2", "--timeout", "5s"], 1);
    has(
        &stderr,
        &[
            "2 of 2 datagrams had no reply",
            &format!("nothing listens at {nobody}"),
        ],
    );

    let silent = socket("127.0.0.1");
    let server = silent.local_addr().unwrap();
    let (_, stderr) = send(server, &["--timeout", "100ms", "--client", CLIENT], 1);
    has(
        &stderr,
        &["expect PROXY v2 headers from 127.0.0.1, and allow the client 203.0.113.11"],
    );
}

#[test]
fn it_sends_from_the_given_address() {
    let source = address("127.0.0.2");
    let server = socket("127.0.0.1");
    let to = server.local_addr().unwrap().to_string();
    thread::scope(|scope| {
        scope.spawn(|| {
            let (_, from) = receive(&server);
            assert_eq!(from, source);
            server.send_to(b"y", from).unwrap();
        });
        let source = source.to_string();
        let (status, _, stderr) = output(&["send", &to, "--source", &source]);
        assert_eq!(status, Some(0), "{stderr}");
    });
    let taken = UdpSocket::bind(source).unwrap();
    let (_, stderr) = send(
        server.local_addr().unwrap(),
        &["--source", &taken.local_addr().unwrap().to_string()],
        1,
    );
    has(
        &stderr,
        &["can't send from 127.0.0.2:", "choose another --source"],
    );
}

#[test]
fn wrong_arguments_exit_with_2_and_name_the_fix() {
    let server = "127.0.0.1:9";
    let unique_id = format!("unique_id={}", "x".repeat(129));
    let cases: [(&[&str], &[&str]); 13] = [
        (&[], &["<SERVER>"]),
        (
            &["127.0.0.1"],
            &["server `127.0.0.1`; give IP:PORT or HOST:PORT"],
        ),
        (
            &[server, "--client", "here"],
            &["'here' for '--client", "give IP:PORT or IP"],
        ),
        (&[server, "--tlv", "authority"], &["give TYPE=VALUE"]),
        (
            &[server, "--tlv", "host=x"],
            &["type `host`: expected a name such as alpn"],
        ),
        (&[server, "--tlv", "crc32c=x"], &["give --crc32c instead"]),
        (
            &[server, "--tlv", &unique_id],
            &["--tlv: UNIQUE_ID may have at most 128 bytes"],
        ),
        (
            &[server, "--hex", "0g"],
            &["`g` at character 2", "two digits for each byte"],
        ),
        (&[server, "x", "--hex", "00"], &["cannot be used with"]),
        (
            &[server, "--dns", "example.org/NOPE"],
            &["as in example.org or example.org/TXT"],
        ),
        (
            &[server, "--format", "spp", "--local"],
            &["--local is for --format v2 alone"],
        ),
        (
            &[server, "--local", "--client", CLIENT],
            &["cannot be used with"],
        ),
        (&[server, "--count", "0"], &["0 is out of range"]),
    ];
    for (arguments, parts) in cases {
        let arguments = [&["send"][..], arguments].concat();
        let (status, stdout, stderr) = output(&arguments);
        assert_eq!(
            (status, stdout.as_str()),
            (Some(2), ""),
            "{arguments:?}\n{stderr}"
        );
        has(&stderr, parts);
    }
    let (status, _, stderr) = output(&["send", server, &"x".repeat(65_507)]);
    assert_eq!(status, Some(2), "{stderr}");
    has(
        &stderr,
        &[
            "the header of 28 bytes and the payload of 65507",
            "send a shorter payload",
        ],
    );
}
