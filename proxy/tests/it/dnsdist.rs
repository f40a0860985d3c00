//! dnsdist, a server that is not ours, reads the client's and the listener's
//! address and port from the proxy's headers, with and without a checksum: its
//! answers consist of what it read. It answers nothing that lacks a header, or
//! has one and comes from elsewhere than the proxy. As a sender of headers it serves
//! many clients from one port, and all of them are answered by the SDK behind it.

use std::net::SocketAddr;

use std::sync::Barrier;
use std::thread;

use ppv2_lab::dig::{answered, clients, for_each, program, server, setup_clients, unanswered};
use ppv2_lab::*;

const CLIENTS4: (&str, usize) = ("127.10.0.", 30);
const CLIENTS6: (&str, usize) = ("fd00:10::", 20);

/// TLV type and length of a checksum, as the Lua below writes it.
const CHECKSUM: &str = "3:4";

/// dnsdist on one port of both loopback addresses, which takes headers from
/// `proxies` alone. A and AAAA answers are the client's IP; TXT answers are the
/// client, the destination, and type and length of each TLV.
pub(crate) fn dnsdist(folder: &tempfile::TempDir, proxies: &str) -> (Process, [SocketAddr; 2]) {
    let port = port();
    let config = format!(
        r#"
setSecurityPollSuffix("")
setLocal("127.0.0.1:{port}")
addLocal("[::1]:{port}")
setACL({{"0.0.0.0/0", "::/0"}})
setProxyProtocolACL({{{proxies}}})

addAction(QTypeRule(DNSQType.TXT), LuaAction(function(dq)
    local words = {{ dq.remoteaddr:toStringWithPort(), dq.localaddr:toStringWithPort() }}
    for kind, value in pairs(dq:getProxyProtocolValues()) do
        -- dnsdist 1.7 adds an empty entry of type 0 to what it has read.
        if kind ~= 0 then
            table.insert(words, kind .. ":" .. #value)
        end
    end
    -- No commas: they would make several records of it.
    local text = table.concat(words, " ")
    return DNSAction.SpoofRaw, string.char(#text) .. text
end))
addAction(AllRule(), LuaAction(function(dq)
    return DNSAction.Spoof, dq.remoteaddr:toString()
end))
"#
    );
    let file = write(folder, "dnsdist.conf", &config);
    let mut process = server(
        &program("dnsdist", "dnsdist"),
        &[
            "--supervised",
            "--disable-syslog",
            "-C",
            file.to_str().unwrap(),
        ],
    );
    process.wait_for(&format!("Listening on [::1]:{port}"));
    let addresses = ["127.0.0.1", "::1"].map(|ip| SocketAddr::new(ip.parse().unwrap(), port));
    (process, addresses)
}

pub(crate) const PROXIES: &str = r#""127.0.0.1/32", "::1/128""#;

/// Asks from `client` and asserts that the answers tell of it, of the address
/// `asked` and of these TLVs.
pub(crate) fn is_told_its_address(client: SocketAddr, asked: SocketAddr, tlvs: &str) {
    let kind = if client.is_ipv4() { "A" } else { "AAAA" };
    let answers = answered(client, asked, &[kind, "TXT"]);
    assert_eq!(answers[0].only(), client.ip().to_string());
    let mut text = format!("{client} {asked}");
    if !tlvs.is_empty() {
        text = format!("{text} {tlvs}");
    }
    assert_eq!(answers[1].only(), format!("\"{text}\""));
}

/// Clients of both families behind listeners of both, in front of servers of
/// both.
fn everybody_is_told_its_address(crc32c: bool) {
    let tlvs = if crc32c { CHECKSUM } else { "" };
    let header = format!("header = {{ crc32c = {crc32c} }}");
    each_is_told_its_address(PROXIES, |_| header.clone(), tlvs);
}

/// `keys` are those of the upstream of a server at an address.
fn each_is_told_its_address(proxies: &str, keys: impl Fn(SocketAddr) -> String, tlvs: &str) {
    let folder = tempfile::tempdir().unwrap();
    let (_dnsdist, upstreams) = dnsdist(&folder, proxies);
    let mut config = String::new();
    let mut questions = Vec::new();
    for (ip, (prefix, count)) in [("127.0.0.1", CLIENTS4), ("::1", CLIENTS6)] {
        for (number, upstream) in upstreams.iter().enumerate() {
            let listener = address(ip);
            let name = format!("to{number}from{}", listener.port());
            config += &format!(
                "[[listener]]\nname = \"{name}\"\nbind = [\"{listener}\"]\nupstream = \"{name}\"\n\
                 [upstream.{name}]\nservers = [\"{upstream}\"]\n{}\n",
                keys(*upstream)
            );
            let clients = clients(prefix, count, port());
            questions.extend(clients.into_iter().map(|client| (client, listener)));
        }
    }
    let _proxy = proxy_with(&folder, &config);
    assert_eq!(questions.len(), 2 * 30 + 2 * 20);
    for_each(&questions, |&(client, listener)| {
        is_told_its_address(client, listener, tlvs);
    });
}

#[test]
fn clients_and_destinations_are_read() {
    let setup = setup_clients(&[CLIENTS6]);
    if namespace::enter(test_name!(), &setup) {
        everybody_is_told_its_address(false);
    }
}

/// By its list of proxies that may send headers, which has networks in place of addresses.
#[test]
fn clients_behind_source_networks_are_read() {
    let setup = setup_clients(&[CLIENTS6]);
    let routes = "for net in fd00:1::/64 fd00:2::/64; do ip -6 route add local $net dev lo; done";
    if !namespace::enter(test_name!(), &format!("{routes}\n{setup}")) {
        return;
    }
    let turn = std::cell::Cell::new(0);
    // Each upstream needs a network of its own.
    let keys = |upstream: SocketAddr| {
        turn.set(turn.get() + 1);
        match upstream.is_ipv4() {
            true => format!("source = [\"127.{}.0.0/16\"]", 64 + turn.get()),
            false => format!("source = [\"fd00:{}::/64\"]", turn.get() / 2),
        }
    };
    let networks = r#""127.64.0.0/10", "fd00:1::/64", "fd00:2::/64""#;
    each_is_told_its_address(networks, keys, "");
}

/// TLV type and length of a tag, as the Lua above writes it.
const TAG: &str = "235:10";

#[test]
fn a_tag_is_ignored() {
    if namespace::enter(test_name!(), &setup_clients(&[CLIENTS6])) {
        each_is_told_its_address(PROXIES, |_| "replies = \"auto\"".to_owned(), TAG);
    }
}

#[test]
fn a_checksum_is_accepted() {
    if namespace::enter(test_name!(), &setup_clients(&[CLIENTS6])) {
        everybody_is_told_its_address(true);
    }
}

#[test]
fn on_a_wildcard_the_destination_is_the_address_written_to() {
    if !namespace::enter(test_name!(), &setup_clients(&[CLIENTS6])) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (_dnsdist, upstreams) = dnsdist(&folder, PROXIES);
    let (listeners, from) = (port(), port());
    let (v4, v6) = (format!("0.0.0.0:{listeners}"), format!("[::]:{listeners}"));
    let upstream = upstreams[0].to_string();
    let _proxy = proxy(&["--listen", &v4, "--listen", &v6, "--upstream", &upstream]);
    for ((prefix, count), asked) in [
        (CLIENTS4, ["127.0.0.1", "127.77.0.1"]),
        (CLIENTS6, ["::1", "fd00:10::14"]),
    ] {
        let client = clients(prefix, count, from)[0];
        for ip in asked {
            let asked = SocketAddr::new(ip.parse().unwrap(), listeners);
            is_told_its_address(client, asked, "");
        }
    }
}

#[test]
fn a_header_is_needed_and_from_the_proxy_alone() {
    if !namespace::enter(test_name!(), "") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (_dnsdist, upstreams) = dnsdist(&folder, PROXIES);
    let without = address("127.0.0.1");
    let _without = proxy_between(without, upstreams[0], &["--mode", "plain"]);
    unanswered(clients(CLIENTS4.0, 1, port())[0], without);
    unanswered(address("127.0.0.1"), upstreams[0]);

    // One that trusts another proxy takes our header for a question.
    let folder = tempfile::tempdir().unwrap();
    let (_dnsdist, upstreams) = dnsdist(&folder, "\"127.0.0.99/32\"");
    let listener = address("127.0.0.1");
    let _proxy = proxy_between(listener, upstreams[0], &[]);
    let client = clients(CLIENTS4.0, 1, port())[0];
    unanswered(client, listener);
    is_told_its_address(client, upstreams[0], "");
}

/// A question turned into its answer: no error, and no records.
fn answer(question: &[u8]) -> Vec<u8> {
    let mut answer = question.to_vec();
    // The flag QR (RFC 1035, section 4.1.1); the rest of the flags and NOERROR stay.
    answer[2] |= 0x80;
    answer
}

/// dnsdist that passes questions on, from one port and with a header in front of each. It
/// takes headers from 127.0.0.1.
pub(crate) fn writing_headers(
    folder: &tempfile::TempDir,
    listen: SocketAddr,
    upstream: SocketAddr,
) -> Process {
    let config = format!(
        "setSecurityPollSuffix(\"\")\nsetLocal(\"{listen}\")\nsetACL({{\"127.0.0.0/8\"}})\n\
         setProxyProtocolACL({{\"127.0.0.1/32\"}})\n\
         newServer({{address=\"{upstream}\", useProxyProtocol=true, sockets=1, \
         healthCheckMode=\"up\"}})\ngetServer(0):setUp()\n"
    );
    let file = write(folder, "front.conf", &config);
    let arguments = [
        "--supervised",
        "--disable-syslog",
        "-C",
        file.to_str().unwrap(),
    ];
    let mut process = server(&program("dnsdist", "dnsdist"), &arguments);
    process.wait_for(&format!("Listening on {listen}"));
    process
}

/// Clients of dnsdist ask in turn, and are answered by address once all of them
/// have asked, twice.
#[test]
fn clients_that_share_its_port_are_all_answered_by_the_sdk() {
    const CLIENTS: usize = 8;
    if !namespace::enter(test_name!(), "") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let trust = ppv2_sdk::Trust::networks(["127.0.0.1"]).build().unwrap();
    let server_socket = ppv2_sdk::UdpSocket::bind("127.0.0.1:0", trust).unwrap();
    server_socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    let (listen, upstream) = (address("127.0.0.1"), server_socket.local_addr().unwrap());
    let _dnsdist = writing_headers(&folder, listen, upstream);

    let asked = Barrier::new(CLIENTS);
    thread::scope(|scope| {
        for number in 0..CLIENTS {
            let asked = &asked;
            scope.spawn(move || {
                let ip = format!("127.10.1.{}", number + 1);
                let client = std::net::UdpSocket::bind((ip.as_str(), 0)).unwrap();
                client.set_read_timeout(Some(TIMEOUT)).unwrap();
                for round in 0..2u8 {
                    let number = u8::try_from(number).unwrap();
                    let mut question = vec![round, number, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
                    question.extend(b"\x06answer\x04ppv2\x04test\0\0\x01\0\x01");
                    client.send_to(&question, listen).unwrap();
                    let mut buffer = [0; 512];
                    let (len, _) = client.recv_from(&mut buffer).unwrap();
                    assert_eq!(buffer[..len], answer(&question));
                    asked.wait();
                }
            });
        }
        let mut proxies = Vec::new();
        for _ in 0..2 {
            let mut questions = Vec::new();
            for _ in 0..CLIENTS {
                let datagram = server_socket.recv_datagram().unwrap();
                proxies.push(datagram.proxy);
                questions.push((datagram.client, datagram.payload));
            }
            for (client, question) in questions {
                server_socket.send_to(&answer(&question), client).unwrap();
            }
        }
        proxies.dedup();
        assert_eq!(proxies.len(), 1, "one port for all: {proxies:?}");
    });
    assert_eq!(server_socket.stats().replies_without_path, 0);
}
