//! A TFTP server, which opens a socket for each transfer and connects it to the client: with
//! the library its datagrams leave from the address that the proxy knows.

use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant};

use ppv2_lab::dig::program;
use ppv2_lab::wrapped::{CLIENTS, LOOPBACK, ROUNDS, Scene, at, setup, wrapped};
use ppv2_lab::*;

/// Bytes of a block, the last one of a file excepted.
const BLOCK: usize = 512;

/// The loopback addresses are found by name, which needs another address of IPv4.
const FOR_NAMES: &str = "ip addr add 198.51.100.1/32 dev lo";

/// The file that a client is given, whatever it asks for: three blocks.
fn file_of(client: SocketAddr) -> Vec<u8> {
    let ip = client.ip().to_string();
    ip.bytes().cycle().take(2 * BLOCK + 300).collect()
}

fn tftpd(folder: &Path, family: usize, port: u16) -> Process {
    let map = folder.join("map");
    std::fs::write(&map, "r ^.+$ \\i\n").unwrap();
    let files = folder.join("files");
    let (only, address) = [
        ("--ipv4", format!("{}:{port}", LOOPBACK[0])),
        ("--ipv6", format!("[{}]:{port}", LOOPBACK[1])),
    ][family]
        .clone();
    let arguments = [
        "--foreground",
        "--listen",
        only,
        "--address",
        &address,
        "--map-file",
        map.to_str().unwrap(),
        "--secure",
        files.to_str().unwrap(),
    ];
    let options = ["--new-sockets", "answer"];
    wrapped(&options, &program("in.tftpd", "tftpd-hpa"), &arguments)
}

fn request() -> &'static [u8] {
    b"\0\x01any file\0octet\0"
}

/// How long a client waits before it repeats what it has sent last.
const PATIENCE: Duration = Duration::from_millis(500);

/// Receives a file, as a client in lock-step does.
fn receive_file(client: &UdpSocket, listener: SocketAddr) -> Vec<u8> {
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let deadline = Instant::now() + TIMEOUT;
    let mut file = Vec::new();
    let mut sent = request().to_vec();
    let mut next = 1_u16;
    client.send_to(&sent, listener).unwrap();
    loop {
        let mut packet = [0; 4 + BLOCK];
        let Ok((len, from)) = client.recv_from(&mut packet) else {
            assert!(Instant::now() < deadline, "no block {next}");
            client.send_to(&sent, listener).unwrap();
            continue;
        };
        assert_eq!(from, listener);
        let (head, data) = packet[..len].split_at(4);
        assert_eq!(head[..2], [0, 3], "{}", packet.escape_ascii());
        if head[2..] != next.to_be_bytes() {
            // It comes twice if the server has not seen the answer in time.
            continue;
        }
        file.extend_from_slice(data);
        sent = [&[0, 4], &head[2..]].concat();
        client.send_to(&sent, listener).unwrap();
        if data.len() < BLOCK {
            return file;
        }
        next += 1;
    }
}

#[test]
fn tftpd_hpa_serves_each_client_by_its_own_socket() {
    let setup = format!("{FOR_NAMES}\n{}", setup());
    // It becomes another user.
    if !namespace::enter_for_containers(test_name!(), &setup) {
        return;
    }
    for family in [0, 1] {
        let folder = tempfile::tempdir().unwrap();
        let files = folder.path().join("files");
        std::fs::create_dir(&files).unwrap();
        let port = port();
        let scene = Scene::new(at(family, port));
        for client in &scene.clients {
            let client = client.local_addr().unwrap();
            std::fs::write(files.join(client.ip().to_string()), file_of(client)).unwrap();
        }
        let _server = tftpd(folder.path(), family, port);
        scene.until_answered(request());
        scene.strangers(request());
        // Each transfer is that of another port, and all clients have one at once.
        std::thread::scope(|scope| {
            for client in &scene.clients {
                let ip = client.local_addr().unwrap().ip();
                let listener = scene.listener;
                scope.spawn(move || {
                    for _ in 0..ROUNDS {
                        let client = bind(SocketAddr::new(ip, 0));
                        let file = receive_file(&client, listener);
                        assert_eq!(file, file_of(client.local_addr().unwrap()));
                    }
                });
            }
        });
        assert_eq!(scene.clients.len(), CLIENTS);
    }
}
