//! The SNMP agent of net-snmp.

use std::net::SocketAddr;

use ppv2_lab::dig::program;
use ppv2_lab::wrapped::{CLIENT_NETWORKS, Scene, at, setup, wrapped};
use ppv2_lab::*;

const COMMUNITY: &[u8] = b"public";
const NAME: &[u8] = b"the agent's name";

/// sysName.0: 1.3.6.1.2.1.1.5.0.
const SYS_NAME: &[u8] = &[0x2b, 6, 1, 2, 1, 1, 5, 0];

/// A BER value of fewer than 128 bytes.
fn ber(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let value = parts.concat();
    let len = u8::try_from(value.len()).unwrap();
    [&[tag, len], value.as_slice()].concat()
}

/// The request's number, which no other client's request has in the same round.
fn id(client: SocketAddr, round: usize) -> [u8; 4] {
    let [high, low] = client.port().to_be_bytes();
    [1, u8::try_from(round).unwrap(), high, low]
}

/// What the agent's answer begins with, and a question: RFC 3416, section 3.
fn message(pdu: u8, id: [u8; 4], value: &[u8]) -> Vec<u8> {
    let zero = ber(2, &[&[0]]);
    let variable = ber(0x30, &[&ber(6, &[SYS_NAME]), value]);
    let pdu = ber(
        pdu,
        &[&ber(2, &[&id]), &zero, &zero, &ber(0x30, &[&variable])],
    );
    let version_2c = ber(2, &[&[1]]);
    ber(0x30, &[&version_2c, &ber(4, &[COMMUNITY]), &pdu])
}

fn question(client: SocketAddr, round: usize) -> Vec<u8> {
    message(0xa0, id(client, round), &[5, 0])
}

#[test]
fn snmpd_knows_each_client_by_its_address() {
    if !namespace::enter(test_name!(), &setup()) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let port = port();
    let [clients4, clients6] = CLIENT_NETWORKS;
    let name = String::from_utf8_lossy(NAME);
    let config = format!(
        "rocommunity public {clients4}\nrocommunity6 public {clients6}\nsysName {name}\n\
         [snmp] persistentDir {}\n",
        folder.path().display()
    );
    let config = write(&folder, "snmpd.conf", &config);
    let config = config.to_str().unwrap();
    let addresses = [
        format!("udp:127.0.0.1:{port}"),
        format!("udp6:[::1]:{port}"),
    ];
    // `-a`: each client is logged by its address.
    let arguments = ["-f", "-Lo", "-a", "-C", "-c", config, "-M", ""];
    let arguments = [&arguments[..], &[&addresses[0], &addresses[1]]].concat();
    let server = wrapped(&[], &program("snmpd", "snmpd"), &arguments);
    for family in [0, 1] {
        let scene = Scene::new(at(family, port));
        scene.until_answered(&message(0xa0, [7; 4], &[5, 0]));
        scene.strangers(&message(0xa0, [8; 4], &[5, 0]));
        scene.exchange(question, |client, round, answer| {
            let expected = message(0xa2, id(client, round), &ber(4, &[NAME]));
            assert_eq!(answer, expected, "{}", String::from_utf8_lossy(answer));
        });
        for client in &scene.refused {
            let question = question(client.local_addr().unwrap(), 0);
            client.send_to(&question, scene.listener).unwrap();
        }
        for client in scene.refused.iter().chain(&scene.clients) {
            let client = client.local_addr().unwrap();
            let seen = match family {
                0 => format!("UDP: [{}]:{}->", client.ip(), client.port()),
                _ => format!("UDP/IPv6: {client}"),
            };
            eventually("the client in the log", || server.log().contains(&seen));
        }
        scene.nothing_more(&scene.refused);
    }
    assert!(!server.log().contains("[127.0.0.77]"));
}
