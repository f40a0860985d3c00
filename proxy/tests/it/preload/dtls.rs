//! A DTLS server, which gives each address a cookie and connects its listening socket to the
//! client that shows one.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use ppv2_lab::dig::program;
use ppv2_lab::wrapped::{CLIENTS, Scene, at, setup, wrapped};
use ppv2_lab::*;

/// A handshake's first message, with nothing in it that openssl reads before the cookie:
/// RFC 6347, section 4.2.
fn client_hello() -> Vec<u8> {
    let mut body = vec![254, 253];
    body.extend([7; 32]);
    // No session, no cookie, one cipher suite, one kind of compression.
    body.extend([0, 0, 0, 2, 0xc0, 0x2b, 1, 0]);
    let len = u8::try_from(body.len()).unwrap();
    let mut record = vec![22, 254, 255, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12 + len];
    record.extend([1, 0, 0, len, 0, 0, 0, 0, 0, 0, 0, len]);
    record.extend(body);
    record
}

/// The cookie of a HelloVerifyRequest. openssl makes it from the client's address and port.
fn cookie(answer: &[u8]) -> Vec<u8> {
    assert_eq!((answer[0], answer[13]), (22, 3), "{answer:?}");
    let len = usize::from(answer[27]);
    answer[28..28 + len].to_vec()
}

fn ask(client: &UdpSocket, scene: &Scene) -> Vec<u8> {
    client.send_to(&client_hello(), scene.listener).unwrap();
    let (answer, from) = receive(client);
    assert_eq!(from, scene.listener);
    cookie(&answer)
}

/// Serves one client, and sends it what is written to the file `input`.
fn serve(openssl: &Path, folder: &Path, server: SocketAddr) -> Process {
    let script = r#"
cd "$1"
"$0" req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=test \
    -keyout key -out certificate -days 2
mkfifo input
exec <>input
exec "$0" s_server -dtls -listen -accept "$2" "$3" -key key -cert certificate -quiet
"#;
    let arguments = [
        "-ec",
        script,
        openssl.to_str().unwrap(),
        folder.to_str().unwrap(),
        &server.to_string(),
        if server.is_ipv6() { "-6" } else { "-4" },
    ];
    wrapped(&[], Path::new("/bin/sh"), &arguments)
}

/// A client that ends with the test.
struct Client(Child);

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn openssl_gives_each_client_a_cookie_and_connects_to_one() {
    if !namespace::enter(test_name!(), &setup()) {
        return;
    }
    let openssl = program("openssl", "openssl");
    for family in [0, 1] {
        let folder = tempfile::tempdir().unwrap();
        let address = at(family, port());
        let mut server = serve(&openssl, folder.path(), address);
        let scene = Scene::new(address);
        scene.until_answered(&client_hello());
        scene.strangers(&client_hello());
        let given = scene.clients.iter().map(|client| ask(client, &scene));
        let given: Vec<_> = given.collect();
        assert_eq!(given.iter().collect::<BTreeSet<_>>().len(), CLIENTS);
        // By another proxy, whose ports are others, and in another order.
        let other = Scene::new(address);
        for (client, given) in scene.clients.iter().zip(&given).rev() {
            assert_eq!(ask(client, &other), *given);
        }
        scene.nothing_more(&scene.clients);
        let ip = scene.clients[0].local_addr().unwrap().ip();
        let mut client = Command::new(&openssl);
        client
            .args(["s_client", "-dtls", "-quiet", "-connect"])
            .arg(scene.listener.to_string())
            .args(["-bind", &SocketAddr::new(ip, 0).to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut client = Client(client.spawn().unwrap());
        let mut input = client.0.stdin.take().unwrap();
        input.write_all(b"greeting of the client\n").unwrap();
        server.wait_for("greeting of the client");
        std::fs::write(folder.path().join("input"), "greeting of the server\n").unwrap();
        let mut line = String::new();
        let mut output = BufReader::new(client.0.stdout.take().unwrap());
        output.read_line(&mut line).unwrap();
        assert_eq!(line, "greeting of the server\n");
    }
}
