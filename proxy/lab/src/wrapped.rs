//! Programs that know nothing of headers, run by `ppv2-proxy wrap` behind a real proxy,
//! and clients that check each answer.
//!
//! A test enters a namespace with [`setup`], starts its program by [`wrapped`], puts a
//! [`Scene`] in front of each of the program's addresses, has [`Scene::exchange`] ask a
//! thousand questions, and looks for the clients in the program's log or in its answers.
//!
//! With `PPV2_DIRECT=1` in the environment, neither library nor proxy takes part: a test that
//! fails then has its program configured wrongly.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::dig::{clients, setup_clients};
use crate::fake_proxy::from_client_at;
use crate::{
    Process, TIMEOUT, address, binary, bind, preload_library, preload_library_musl, proxy_between,
    receive,
};

/// Clients of a scene, each with an address of its own.
pub const CLIENTS: usize = 50;

/// Questions that each client asks.
pub const ROUNDS: usize = 20;

/// Networks of the clients, as an access list has them.
pub const CLIENT_NETWORKS: [&str; 2] = ["127.10.0.0/24", "fd00:10::/64"];

/// Networks whose clients an access list refuses.
pub const REFUSED_NETWORKS: [&str; 2] = ["127.11.0.0/24", "fd00:11::/64"];

/// The addresses that programs serve, and from which proxies send.
pub const LOOPBACK: [&str; 2] = ["127.0.0.1", "::1"];

/// Clients of a network that is refused.
const REFUSED: usize = 5;

/// Addresses from which nobody may send headers.
const STRANGERS: [&str; 2] = ["127.0.0.77", "fd00:77::1"];

/// How long a question of [`Scene::until_answered`] waits for its answer.
const PATIENCE: Duration = Duration::from_millis(200);

/// Shell commands for [`namespace::enter`](crate::namespace::enter): they give `lo` the
/// addresses of all clients.
pub fn setup() -> String {
    setup_clients(&[
        (prefix(CLIENT_NETWORKS[1]), CLIENTS),
        (prefix(REFUSED_NETWORKS[1]), REFUSED),
        ("fd00:77::", 1),
    ])
}

/// A command that runs a program by `ppv2-proxy wrap`, which trusts proxies at both loopback
/// addresses. `options` are more of `wrap`; the caller adds the program's arguments.
pub fn wrap(options: &[&str], program: &Path) -> Command {
    wrap_with(preload_library(), options, program)
}

fn wrap_with(library: &Path, options: &[&str], program: &Path) -> Command {
    if is_direct() {
        return Command::new(program);
    }
    let mut command = Command::new(binary());
    command.arg("wrap").arg("--library").arg(library);
    for proxy in LOOPBACK {
        command.args(["--trusted", proxy]);
    }
    command.args(options).arg("--").arg(program);
    command
}

/// Starts a program as [`wrap`] does, and gathers its log, from standard output and standard
/// error.
pub fn wrapped(options: &[&str], program: &Path, arguments: &[&str]) -> Process {
    start(&wrap(options, program), arguments)
}

/// As [`wrapped`], for a program that uses musl.
pub fn wrapped_for_musl(options: &[&str], program: &Path, arguments: &[&str]) -> Process {
    start(
        &wrap_with(preload_library_musl(), options, program),
        arguments,
    )
}

fn start(wrap: &Command, arguments: &[&str]) -> Process {
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$0\" \"$@\" >&2"]);
    command.arg(wrap.get_program()).args(wrap.get_args());
    Process::start(command.args(arguments))
}

/// Whether clients ask the program itself.
pub fn is_direct() -> bool {
    std::env::var_os("PPV2_DIRECT").is_some()
}

/// A proxy in front of a wrapped program, and clients that write to it.
pub struct Scene {
    pub listener: SocketAddr,
    pub server: SocketAddr,
    /// Each has an address of [`CLIENT_NETWORKS`].
    pub clients: Vec<UdpSocket>,
    /// Each has an address of [`REFUSED_NETWORKS`].
    pub refused: Vec<UdpSocket>,
    pub proxy: Process,
}

impl Scene {
    /// With clients of the server's own family.
    pub fn new(server: SocketAddr) -> Self {
        Self::with(usize::from(server.is_ipv6()), server, &[])
    }

    /// With clients of a family, 0 for IPv4 and 1 for IPv6, and more arguments of the proxy.
    pub fn with(family: usize, server: SocketAddr, arguments: &[&str]) -> Self {
        let listener = address(LOOPBACK[family]);
        let sockets = |network, count| {
            let clients = clients(prefix(network), count, 0);
            clients.into_iter().map(bind).collect()
        };
        Self {
            listener: if is_direct() { server } else { listener },
            server,
            clients: sockets(CLIENT_NETWORKS[family], CLIENTS),
            refused: sockets(REFUSED_NETWORKS[family], REFUSED),
            proxy: proxy_between(listener, server, arguments),
        }
    }

    /// Asks until the program answers, which it does a moment after its start.
    pub fn until_answered(&self, question: &[u8]) {
        // Nobody else's, so that late answers disturb no client.
        let client = bind(SocketAddr::new(
            self.clients[0].local_addr().unwrap().ip(),
            0,
        ));
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        let deadline = Instant::now() + TIMEOUT;
        loop {
            client.send_to(question, self.listener).unwrap();
            match client.recv_from(&mut [0; 65_536]) {
                Ok(_) => return,
                Err(error) => assert!(Instant::now() < deadline, "no answer: {error}"),
            }
        }
    }

    /// Has each client ask [`ROUNDS`] times, all clients at once; `question` gets the
    /// client's address and the number of the round, `check` the answer besides, which is the
    /// only one that the client has received and comes from the listener.
    pub fn exchange(
        &self,
        question: impl Fn(SocketAddr, usize) -> Vec<u8>,
        check: impl Fn(SocketAddr, usize, &[u8]),
    ) {
        for round in 0..ROUNDS {
            self.round(&self.clients, round, &question, &check);
        }
        self.nothing_more(&self.clients);
    }

    /// The same with the clients that the access list refuses, once each.
    pub fn exchange_refused(
        &self,
        question: impl Fn(SocketAddr, usize) -> Vec<u8>,
        check: impl Fn(SocketAddr, usize, &[u8]),
    ) {
        self.round(&self.refused, 0, &question, &check);
        self.nothing_more(&self.refused);
    }

    fn round(
        &self,
        clients: &[UdpSocket],
        round: usize,
        question: &impl Fn(SocketAddr, usize) -> Vec<u8>,
        check: &impl Fn(SocketAddr, usize, &[u8]),
    ) {
        for client in clients {
            let question = question(client.local_addr().unwrap(), round);
            client.send_to(&question, self.listener).unwrap();
        }
        for client in clients {
            let (answer, from) = receive(client);
            assert_eq!(from, self.listener);
            check(client.local_addr().unwrap(), round, &answer);
        }
    }

    /// Asserts that no client has an answer left, one that was another's or came twice.
    pub fn nothing_more(&self, clients: &[UdpSocket]) {
        for client in clients {
            client.set_nonblocking(true).unwrap();
            let more = client.recv_from(&mut [0; 65_536]);
            client.set_nonblocking(false).unwrap();
            match more {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                more => panic!("to {:?}: {more:?}", client.local_addr()),
            }
        }
    }

    /// Sends a question past the proxy: bare and with a header that names a client, from an
    /// address that is not trusted; bare, and with half a header, from one that is. Asserts
    /// that none is answered; the caller looks for it in the program's log.
    pub fn strangers(&self, question: &[u8]) {
        if is_direct() {
            return;
        }
        let family = usize::from(self.server.is_ipv6());
        let client = self.clients[0].local_addr().unwrap();
        let forged = from_client_at(client, self.listener, question);
        let stranger = bind(SocketAddr::new(STRANGERS[family].parse().unwrap(), 0));
        let beside = bind(SocketAddr::new(LOOPBACK[family].parse().unwrap(), 0));
        for (socket, datagrams) in [
            (&stranger, [question, &forged]),
            (&beside, [question, &forged[..20]]),
        ] {
            for datagram in datagrams {
                socket.send_to(datagram, self.server).unwrap();
            }
        }
        // Answers to what was sent before would have come by the time that this one does.
        std::thread::sleep(PATIENCE);
        self.nothing_more(&[stranger, beside]);
        self.nothing_more(&self.clients[..1]);
    }
}

/// An address of the loopback interface with a port.
pub fn at(family: usize, port: u16) -> SocketAddr {
    SocketAddr::new(LOOPBACK[family].parse::<IpAddr>().unwrap(), port)
}

/// What the addresses of a network begin with.
fn prefix(network: &str) -> &str {
    network.trim_end_matches("0/24").trim_end_matches("/64")
}
