//! socat, which has a process with a connected socket for each client.

use std::net::SocketAddr;

use ppv2_lab::dig::program;
use ppv2_lab::wrapped::{Scene, at, setup, wrapped};
use ppv2_lab::*;

/// The processes that a process has started and that have not ended.
fn children(of: &Process) -> String {
    let pid = of.pid();
    std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap()
}

#[test]
fn socat_connects_to_each_client() {
    if !namespace::enter(test_name!(), &setup()) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    // First the address that socat has seen, then what the client writes.
    let script = "printf '%s:%s ' \"$SOCAT_PEERADDR\" \"$SOCAT_PEERPORT\"\nexec sed -u /end/q\n";
    let script = write(&folder, "client.sh", script);
    let execute = format!("EXEC:sh {}", script.display());
    for family in [0, 1] {
        let address = at(family, port());
        let listen = format!(
            "UDP{}-LISTEN:{},bind={},fork,reuseaddr",
            ["4", "6"][family],
            address.port(),
            ["127.0.0.1", "[::1]"][family]
        );
        // `-T`: the process of a client that is silent for so many seconds ends.
        let arguments = ["-d", "-d", "-T", "10", &listen, &execute];
        let mut server = wrapped(&[], &program("socat", "socat"), &arguments);
        server.wait_for("listening on UDP");
        let scene = Scene::new(address);
        scene.strangers(b"stranger");
        // One after the other: until a process has connected its socket, it may receive what
        // another client writes. That is so without the library too.
        for client in &scene.clients {
            client.send_to(b"first\n", scene.listener).unwrap();
            let mut received = String::new();
            while !received.ends_with(" first\n") {
                let (datagram, from) = receive(client);
                assert_eq!(from, scene.listener);
                received.push_str(&String::from_utf8(datagram).unwrap());
            }
            let (seen, _) = received.split_once(' ').unwrap();
            let seen: SocketAddr = seen.parse().unwrap();
            assert_eq!(seen, client.local_addr().unwrap());
        }
        let question = |client, round| format!("{round} of {client}\n").into_bytes();
        scene.exchange(question, |client, round, answer| {
            assert_eq!(answer, question(client, round));
        });
        for client in &scene.clients {
            client.send_to(b"end\n", scene.listener).unwrap();
        }
        eventually("the clients' processes to end", || {
            children(&server).is_empty()
        });
    }
}
