//! FreeRADIUS, whose list of clients decides by address.

use std::net::SocketAddr;

use ppv2_lab::dig::program;
use ppv2_lab::wrapped::{CLIENT_NETWORKS, Scene, at, setup, wrapped};
use ppv2_lab::*;

// RFC 2865, sections 3 and 5.
const ACCESS_REQUEST: u8 = 1;
const ACCESS_ACCEPT: u8 = 2;
const USER_NAME: u8 = 1;
const REPLY_MESSAGE: u8 = 18;

fn question(client: SocketAddr, round: usize) -> Vec<u8> {
    let name = client.to_string();
    let name_len = u8::try_from(name.len()).unwrap();
    let mut packet = vec![
        ACCESS_REQUEST,
        u8::try_from(round).unwrap(),
        0,
        22 + name_len,
    ];
    packet.extend([7; 16]);
    packet.extend([USER_NAME, 2 + name_len]);
    packet.extend(name.as_bytes());
    packet
}

#[test]
fn freeradius_knows_each_client_by_its_address() {
    if !namespace::enter(test_name!(), &setup()) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().display();
    let port = port();
    let [clients4, clients6] = CLIENT_NETWORKS;
    let config = format!(
        r#"
prefix = /usr
libdir = /usr/lib/freeradius
logdir = {path}
run_dir = {path}
raddbdir = {path}
name = radiusd
max_requests = 16384
log {{
    destination = stdout
    auth = yes
}}
thread pool {{
    start_servers = 2
    max_servers = 2
    min_spare_servers = 1
    max_spare_servers = 2
}}
client four {{
    ipaddr = {clients4}
    secret = secret
}}
client six {{
    ipv6addr = {clients6}
    secret = secret
}}
server default {{
    listen {{
        type = auth
        ipaddr = 127.0.0.1
        port = {port}
    }}
    listen {{
        type = auth
        ipv6addr = ::1
        port = {port}
    }}
    authorize {{
        update control {{
            Auth-Type := Accept
        }}
        update reply {{
            Reply-Message := "%{{%{{Packet-Src-IP-Address}}:-%{{Packet-Src-IPv6-Address}}}} %{{Packet-Src-Port}}"
        }}
    }}
}}
"#
    );
    write(&folder, "radiusd.conf", &config);
    let folder = folder.path().to_str().unwrap();
    let arguments = ["-f", "-l", "stdout", "-d", folder];
    let mut server = wrapped(&[], &program("freeradius", "freeradius"), &arguments);
    server.wait_for("Ready to process requests");
    for family in [0, 1] {
        let scene = Scene::new(at(family, port));
        let stranger = SocketAddr::new(scene.clients[0].local_addr().unwrap().ip(), 1);
        scene.strangers(&question(stranger, 200));
        scene.exchange(question, |client, round, answer| {
            assert_eq!(answer[..2], [ACCESS_ACCEPT, u8::try_from(round).unwrap()]);
            // Behind the authenticator; the only attribute.
            assert_eq!(answer[20], REPLY_MESSAGE);
            let seen = String::from_utf8_lossy(&answer[22..]);
            assert_eq!(seen, format!("{} {}", client.ip(), client.port()));
        });
        let refused = &scene.refused[0];
        let address = refused.local_addr().unwrap();
        let (ip, port) = (address.ip(), address.port());
        // It logs one such line a second at most.
        eventually("a refused client in the log", || {
            let question = question(address, 1);
            refused.send_to(&question, scene.listener).unwrap();
            let seen = format!("from unknown client {ip} port {port}");
            server.log().contains(&seen)
        });
        scene.nothing_more(&scene.refused);
        assert!(!server.log().contains(&format!("[{stranger}]")));
    }
}
