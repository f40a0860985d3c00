//! TLVs of the configuration: servers read exactly these, in this order, also after a reload,
//! and the id of a session is the same in all of its headers and nowhere else.

use std::collections::HashSet;
use std::net::{SocketAddr, UdpSocket};

use ppv2::{Header, TlvType};
use ppv2_lab::service::Proxy;
use ppv2_lab::*;

const TLVS: &str = "authority = \"a.example\", tlvs = [ { type = \"0xE1\", value = \"text\" }, \
                    { type = \"0xE2\", hex = \"0a0b\" }, { type = \"unique_id\", from = \"session\" } ]";

/// The types of a header's TLVs.
fn types(header: &Header<'_>) -> Vec<TlvType> {
    header.tlvs().iter().map(|tlv| tlv.kind).collect()
}

/// That the header has [`TLVS`] in front, and the id of the session.
#[track_caller]
fn id_of(header: &Header<'_>) -> Vec<u8> {
    let tlvs = header.tlvs();
    assert_eq!(tlvs.authority(), Some(Ok("a.example")));
    assert_eq!(tlvs.get(TlvType(0xe1)), Some(&b"text"[..]));
    assert_eq!(tlvs.get(TlvType(0xe2)), Some(&b"\x0a\x0b"[..]));
    let first = [
        TlvType::AUTHORITY,
        TlvType(0xe1),
        TlvType(0xe2),
        TlvType::UNIQUE_ID,
    ];
    assert_eq!(types(header)[..4], first);
    let id = tlvs.unique_id().unwrap();
    assert_eq!(id.len(), 16);
    id.to_vec()
}

struct Setup {
    listener: SocketAddr,
    server: UdpSocket,
}

impl Setup {
    fn new(ip: &str) -> Self {
        Self {
            listener: address(ip),
            server: socket(ip),
        }
    }

    fn config(&self, of_listener: &str, of_upstream: &str) -> String {
        format!(
            "[[listener]]\nname = \"l\"\nbind = [\"{}\"]\nupstream = \"u\"\n{of_listener}\n\
             [upstream.u]\nservers = [\"{}\"]\n{of_upstream}\n",
            self.listener,
            self.server.local_addr().unwrap()
        )
    }

    /// Sends a datagram, and returns what came to the server and from where.
    fn passed(&self, client: &UdpSocket) -> (Vec<u8>, SocketAddr) {
        client.send_to(b"question", self.listener).unwrap();
        receive(&self.server)
    }

    /// That the client's datagram has a header, and what that says.
    #[track_caller]
    fn header<T>(&self, client: &UdpSocket, read: impl FnOnce(&Header<'_>) -> T) -> T {
        let (datagram, _) = self.passed(client);
        let (header, payload) = ppv2::decode(&datagram).unwrap();
        assert_eq!(header.client(), Some(client.local_addr().unwrap()));
        assert_eq!(header.destination(), Some(self.listener));
        assert_eq!(payload, b"question");
        read(&header)
    }
}

#[test]
fn a_server_reads_them_and_a_reload_changes_them_for_sessions_that_go_on() {
    for ip in ["127.0.0.1", "::1"] {
        let (setup, client) = (Setup::new(ip), socket(ip));
        let first = setup.config("", &format!("header = {{ crc32c = true, {TLVS} }}"));
        let proxy = Proxy::start(&first);
        let id = setup.header(&client, |header| {
            assert_eq!(types(header).last(), Some(&TlvType::CRC32C));
            id_of(header)
        });
        // The listing of sessions names the id.
        let (status, sessions) = http_get(proxy.admin, "/sessions");
        let hex: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
        assert!(
            status == 200 && sessions.contains(&format!("\"unique_id\":\"{hex}\"")),
            "{sessions}"
        );
        assert_eq!(setup.header(&client, id_of), id);

        let other = "header = { crc32c = true, tlvs = [ { type = \"netns\", value = \"blue\" } ] }";
        proxy.reload(&setup.config("", other));
        eventually("the TLVs of the new configuration", || {
            setup.header(&client, |header| {
                types(header) == [TlvType::NETNS, TlvType::CRC32C]
            })
        });
        proxy.reload(&setup.config("", "header = { crc32c = true }"));
        eventually("no TLVs", || {
            setup.header(&client, |header| types(header) == [TlvType::CRC32C])
        });
        // The session is the same, and so is its id.
        proxy.reload(&first);
        eventually("the first TLVs", || {
            setup.header(&client, |header| types(header).len() > 1)
        });
        assert_eq!(setup.header(&client, id_of), id);
        let moved = "ppv2_sessions_ended_total{listener=\"l\",reason=\"moved\"}";
        assert_eq!(proxy.metric(moved), 0);
    }
}

#[test]
fn no_two_sessions_have_the_same_id() {
    let setup = Setup::new("127.0.0.1");
    let config = setup.config("requests = 2", &format!("header = {{ {TLVS} }}"));
    let mut ids = HashSet::new();
    // Also of one client, and after a restart.
    for _ in 0..2 {
        let _proxy = Proxy::start(&config);
        for _ in 0..20 {
            let client = socket("127.0.0.1");
            for _ in 0..3 {
                let id = setup.header(&client, id_of);
                assert_eq!(setup.header(&client, id_of), id);
                assert!(ids.insert(id));
            }
        }
    }
}

#[test]
fn they_come_with_tags_and_where_the_header_comes_once() {
    let (setup, client) = (Setup::new("127.0.0.1"), socket("127.0.0.1"));
    for replies in ["tagged", "auto"] {
        let header = format!("replies = \"{replies}\"\nheader = {{ {TLVS} }}");
        let _proxy = Proxy::start(&setup.config("", &header));
        let id = setup.header(&client, |header| {
            assert!(header.tlvs().reply_tag().is_some());
            id_of(header)
        });
        // The server returns client, destination and tag alone, as our SDKs do.
        let (datagram, session) = setup.passed(&client);
        let (header, _) = ppv2::decode(&datagram).unwrap();
        assert_eq!(id_of(&header), id);
        let mut buffer = [0; ppv2::MAX_TAGGED_HEADER_LEN];
        let (from, to) = (header.client().unwrap(), header.destination().unwrap());
        let tag = header.tlvs().reply_tag().unwrap();
        let returned = ppv2::encode_udp_tagged(from, to, tag, &mut buffer).unwrap();
        let reply = [returned, b"answer"].concat();
        setup.server.send_to(&reply, session).unwrap();
        assert_eq!(receive(&client), (b"answer".to_vec(), setup.listener));
    }

    let _proxy =
        Proxy::start(&setup.config("", &format!("header = {{ emit = \"first\", {TLVS} }}")));
    let id = setup.header(&client, id_of);
    assert_eq!(setup.header(&client, id_of), id);
    let (_, session) = setup.passed(&client);
    setup.server.send_to(b"answer", session).unwrap();
    assert_eq!(receive(&client).0, b"answer");
    assert_eq!(setup.passed(&client).0, b"question");
}

#[test]
fn they_come_without_sessions_and_to_servers_that_answer_by_themselves() {
    let (setup, client) = (Setup::new("127.0.0.1"), socket("127.0.0.1"));
    let fixed = "header = { tlvs = [ { type = \"0xE1\", value = \"text\" } ] }";
    for (of_listener, of_upstream, is_tagged) in [
        (
            "sessions = false",
            format!("replies = \"tagged\"\n{fixed}"),
            true,
        ),
        (
            "mode = \"dsr\"\nrewrite_on = \"sdk\"",
            fixed.to_owned(),
            false,
        ),
    ] {
        let _proxy = Proxy::start(&setup.config(of_listener, &of_upstream));
        setup.header(&client, |header| {
            assert_eq!(types(header)[0], TlvType(0xe1));
            assert_eq!(header.tlvs().reply_tag().is_some(), is_tagged);
        });
    }
    let of_listener = "mode = \"dsr\"\nrewrite_on = \"sdk\"";
    let _proxy = Proxy::start(&setup.config(of_listener, &format!("header = {{ {TLVS} }}")));
    let id = setup.header(&client, id_of);
    assert_eq!(setup.header(&client, id_of), id);
}

/// Each datagram of a burst has all that a header can have, and nothing of it is cut off.
#[test]
fn the_longest_header_stands_in_front_of_each_datagram_of_a_burst() {
    let (setup, client) = (Setup::new("::1"), socket("::1"));
    let value = "x".repeat(509);
    let header = format!(
        "replies = \"tagged\"\nheader = {{ crc32c = true, tlvs = [ {{ type = \"0xE1\", value = \"{value}\" }}, \
         {{ type = \"unique_id\", from = \"session\" }} ] }}"
    );
    let _proxy = Proxy::start(&setup.config("", &header));
    for number in 0..100u8 {
        client.send_to(&[number; 100], setup.listener).unwrap();
    }
    let decoder = ppv2::Decoder::new().max_header_len(1024);
    for number in 0..100 {
        let (datagram, _) = receive(&setup.server);
        let (header, payload) = decoder.decode(&datagram).unwrap();
        assert_eq!(header.as_bytes().len(), 52 + 512 + 19 + 13 + 7);
        assert_eq!(header.tlvs().get(TlvType(0xe1)), Some(value.as_bytes()));
        assert_eq!(payload, [number; 100]);
    }
}
