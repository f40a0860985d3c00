//! What forged and misleading datagrams must not achieve: Python servers under the library,
//! sent to as a proxy does whose clients lie about their addresses.

#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::io::{BufRead, BufReader, Lines};
use std::net::{SocketAddr, UdpSocket};
use std::process::{Child, ChildStdout, Command, Stdio};

use ppv2_lab::fake_proxy::{CLIENT, OTHER_CLIENT, from_client};
use ppv2_lab::{TIMEOUT, address, preload_library};

/// A program that tells of what it does by lines. It is ended when this is dropped.
struct Server {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    address: SocketAddr,
}

impl Server {
    /// Runs a script, in which `ADDRESS` is the address to bind to, until it says "ready".
    fn start(variables: &[(&str, &str)], script: &str) -> Self {
        let address = address("127.0.0.1");
        let place = format!("(\"127.0.0.1\", {})", address.port());
        let script = format!(
            "from socket import *\n{}",
            script.replace("ADDRESS", &place)
        );
        let mut child = Command::new("python3")
            .args(["-u", "-c", &script])
            .env("LD_PRELOAD", preload_library())
            .env("PPV2_TRUSTED", "127.0.0.1")
            .envs(variables.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut server = Self {
            child,
            lines,
            address,
        };
        assert_eq!(server.line(), "ready");
        server
    }

    /// Writes a line to the program.
    fn go_on(&mut self) {
        use std::io::Write as _;
        let input = self.child.stdin.as_mut().unwrap();
        writeln!(input).unwrap();
    }

    fn line(&mut self) -> String {
        self.lines.next().unwrap().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

fn bind(address: &str) -> UdpSocket {
    let socket = UdpSocket::bind(address).unwrap();
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    socket
}

fn receive(socket: &UdpSocket) -> (String, SocketAddr) {
    let mut bytes = [0; 2048];
    let (len, from) = socket.recv_from(&mut bytes).unwrap();
    (bytes[..len].escape_ascii().to_string(), from)
}

#[test]
fn a_client_with_the_address_of_an_upstream_server_does_not_get_the_questions() {
    const RESOLVER: &str = r#"
listener = socket(AF_INET, SOCK_DGRAM)
listener.bind(ADDRESS)
print("ready")
_, upstream = listener.recvfrom(100)
asking = socket(AF_INET, SOCK_DGRAM)
if WAY == "connect":
    asking.connect(upstream)
    asking.send(b"question")
else:
    asking.sendto(b"question", upstream)
print(asking.recv(100).decode())
"#;
    for way in ["'sendto'", "'connect'"] {
        let upstream = bind("127.0.0.2:0");
        let forged = upstream.local_addr().unwrap().to_string();
        let proxy = bind("127.0.0.1:0");
        let mut server = Server::start(&[], &RESOLVER.replace("WAY", way));
        let forge = |payload| from_client(&forged, payload);
        proxy.send_to(&forge(b"hello"), server.address).unwrap();
        let (question, from) = receive(&upstream);
        assert_eq!(question, "question", "{way}");
        assert_ne!(from.port(), server.address.port(), "{way}");
        proxy.send_to(&forge(b"forged"), server.address).unwrap();
        upstream.send_to(b"answer", from).unwrap();
        assert_eq!(server.line(), "answer", "{way}");
    }
}

#[test]
fn what_is_sent_to_a_forgotten_client_reaches_nobody_else() {
    const SERVER: &str = r#"
listener = socket(AF_INET, SOCK_DGRAM)
listener.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
listener.bind(ADDRESS)
print("ready")
_, client = listener.recvfrom(100)
own = socket(AF_INET, SOCK_DGRAM)
own.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
own.bind(ADDRESS)
own.connect(client)
own.send(b"for the first")
print("connected")
input()
try:
    print(own.send(b"for the first"))
except OSError as error:
    print(error.strerror)
"#;
    for untrusted in ["drop", "accept"] {
        let variables = [("PPV2_UNTRUSTED", untrusted), ("PPV2_FORGET_AFTER", "1s")];
        let proxy = bind("127.0.0.1:0");
        let mut server = Server::start(&variables, SERVER);
        proxy
            .send_to(&from_client(CLIENT, b"hello"), server.address)
            .unwrap();
        assert_eq!(server.line(), "connected");
        assert_eq!(receive(&proxy).0, "for the first");
        // The proxy's port is another client's by now.
        std::thread::sleep(std::time::Duration::from_millis(1500));
        proxy
            .send_to(&from_client(OTHER_CLIENT, b"hello"), server.address)
            .unwrap();
        server.go_on();
        assert_eq!(server.line(), "No route to host", "{untrusted}");
        drop(server);
        proxy.set_nonblocking(true).unwrap();
        proxy.recv_from(&mut [0; 100]).unwrap_err();
    }
}

#[test]
fn no_client_can_pass_for_a_peer() {
    const SERVER: &str = r#"
listener = socket(AF_INET, SOCK_DGRAM)
listener.bind(ADDRESS)
print("ready")
while True:
    payload, (host, _) = listener.recvfrom(100)
    print(host, payload.decode("latin1"))
"#;
    // The proxy is in the network of the peers, too.
    let networks = [("PPV2_PEERS", "127.0.0.0/8,10.0.0.0/8")];
    let mut server = Server::start(&networks, SERVER);
    let (proxy, peer) = (bind("127.0.0.1:0"), bind("127.0.0.2:0"));
    for (sender, datagram) in [
        (&proxy, from_client("10.0.0.5:5060", b"forged")),
        (&proxy, from_client("127.0.0.2:5060", b"forged")),
        (&proxy, b"without a header".to_vec()),
        (&peer, b"true".to_vec()),
        (&proxy, from_client(CLIENT, b"true")),
    ] {
        sender.send_to(&datagram, server.address).unwrap();
    }
    assert_eq!(server.line(), "127.0.0.2 true");
    assert_eq!(server.line(), "203.0.113.11 true");
}
