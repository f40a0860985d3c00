//! An unmodified server sees its clients: Python's `socketserver` under the library, sent
//! to as the proxy does.

#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::io::{BufRead, BufReader, ErrorKind};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::process::{Child, ChildStdout, Command, Stdio};

use ppv2_lab::fake_proxy::{CLIENT, OTHER_CLIENT, from_client};
use ppv2_lab::{TIMEOUT, address, eventually, port, preload_library};

/// Serves by the socket that is its standard input, as inetd has it.
const INHERITOR: &str = r#"
import socket

inherited = socket.socket(fileno=0)
print("ready", flush=True)
while True:
    data, (host, port) = inherited.recvfrom(1000)
    inherited.sendto(f"{host}:{port} said {data.decode()}".encode(), (host, port))
"#;

/// Binds, executes itself again with the socket, and answers whether packet info is on and how
/// many control messages came with the question.
const SUCCESSOR: &str = r#"
import os, socket, sys

family, port, asks, *descriptor = sys.argv[1:]
is_ipv4 = family == "4"
option = (socket.IPPROTO_IP, 8) if is_ipv4 else (socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO)
if not descriptor:
    server = socket.socket(socket.AF_INET if is_ipv4 else socket.AF_INET6, socket.SOCK_DGRAM)
    server.bind(("0.0.0.0" if is_ipv4 else "::", int(port)))
    if asks == "1":
        server.setsockopt(*option, 1)
    os.set_inheritable(server.fileno(), True)
    os.execvp("python3", [*sys.orig_argv, str(server.fileno())])
server = socket.socket(fileno=int(descriptor[0]))
print("ready", flush=True)
data, control, _, client = server.recvmsg(1000, 1000)
server.sendto(f"{server.getsockopt(*option)} {len(control)}".encode(), client[:2])
"#;

/// Connects to its first client, executes itself again with the socket, and sends back what it
/// receives.
const CONNECTED: &str = r#"
import os, socket, sys

port, *descriptor = sys.argv[1:]
if not descriptor:
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", int(port)))
    print("bound", flush=True)
    server.connect(server.recvfrom(1000)[1])
    os.set_inheritable(server.fileno(), True)
    os.execvp("python3", [*sys.orig_argv, str(server.fileno())])
server = socket.socket(fileno=int(descriptor[0]))
print("ready", flush=True)
while True:
    server.send(server.recv(1000))
"#;

/// Receives a datagram, and has another program, which gets the socket, read the statistics.
const SERVER_WITH_HELPER: &str = r#"
import os, socket, subprocess, sys

server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.1", int(sys.argv[1])))
os.set_inheritable(server.fileno(), True)
print("ready", flush=True)
server.recvfrom(1000)
subprocess.run(["grep", "received_total [0-9]", os.environ["PPV2_STATS"]], close_fds=False)
"#;

const SERVER: &str = r#"
import socketserver

class Handler(socketserver.BaseRequestHandler):
    def handle(self):
        data, socket = self.request
        host, port = self.client_address
        socket.sendto(f"{host}:{port} said {data.decode()}".encode(), self.client_address)

server = socketserver.UDPServer(("127.0.0.1", PORT), Handler)
print("ready", flush=True)
server.serve_forever()
"#;

/// A library that serves, as an extension of PHP does.
const EXTENSION: &str = r#"
#include <arpa/inet.h>
#include <stdio.h>
#include <sys/socket.h>

void serve(int port)
{
    struct sockaddr_in name = {.sin_family = AF_INET, .sin_port = htons(port)};
    inet_pton(AF_INET, "127.0.0.1", &name.sin_addr);
    int server = socket(AF_INET, SOCK_DGRAM, 0);
    bind(server, (struct sockaddr *)&name, sizeof name);
    puts("ready");
    fflush(stdout);
    for (;;) {
        char data[1000], reply[1100], ip[16];
        socklen_t len = sizeof name;
        int received = recvfrom(server, data, sizeof data, 0, (struct sockaddr *)&name, &len);
        inet_ntop(AF_INET, &name.sin_addr, ip, sizeof ip);
        int said = snprintf(reply, sizeof reply, "%s:%d said %.*s", ip, ntohs(name.sin_port), received, data);
        sendto(server, reply, said, 0, (struct sockaddr *)&name, len);
    }
}
"#;

/// A library that loads the other one, which only its own DT_RUNPATH leads to.
const LOADER: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>

void run(int port)
{
    void *extension = dlopen("libextension.so", RTLD_NOW | RTLD_DEEPBIND);
    if (extension)
        ((void (*)(int))dlsym(extension, "serve"))(port);
}
"#;

/// A process that is ended when it is dropped.
struct Server(Child, BufReader<ChildStdout>);

impl Server {
    fn start(script: &str, arguments: &[&str], input: Stdio) -> Self {
        let mut server = Self::spawn(script, arguments, input);
        assert_eq!(server.line(), "ready\n");
        server
    }

    fn spawn(script: &str, arguments: &[&str], input: Stdio) -> Self {
        Self::spawn_with(script, arguments, input, |_| ())
    }

    fn spawn_with(
        script: &str,
        arguments: &[&str],
        input: Stdio,
        more: impl FnOnce(&mut Command),
    ) -> Self {
        let mut command = Command::new("python3");
        more(&mut command);
        let mut child = command
            .args(["-c", script])
            .args(arguments)
            .env("LD_PRELOAD", preload_library())
            .env("PPV2_TRUSTED", "127.0.0.1,::1")
            .env("PPV2_FORGET_AFTER", "1s")
            .stdin(input)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self(child, output)
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.1.read_line(&mut line).unwrap();
        line
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Sends a bare datagram and one with a header, and checks the only answer.
fn ask(server: SocketAddr) {
    let proxy = UdpSocket::bind("127.0.0.1:0").unwrap();
    proxy.set_read_timeout(Some(TIMEOUT)).unwrap();
    proxy.send_to(b"without a header", server).unwrap();
    proxy
        .send_to(&from_client(CLIENT, b"hello"), server)
        .unwrap();
    let mut reply = [0; 256];
    let (len, from) = proxy.recv_from(&mut reply).unwrap();
    assert_eq!(from, server);
    assert_eq!(
        str::from_utf8(&reply[..len]).unwrap(),
        format!("{CLIENT} said hello"),
    );
}

#[test]
fn a_server_sees_its_client_and_answers_it() {
    let server = address("127.0.0.1");
    let script = SERVER.replace("PORT", &server.port().to_string());
    let _server = Server::start(&script, &[], Stdio::null());
    ask(server);
}

#[test]
fn a_socket_that_a_server_is_started_with_is_taken_over() {
    let server = address("127.0.0.1");
    let socket = UdpSocket::bind(server).unwrap();
    let _server = Server::start(INHERITOR, &[], OwnedFd::from(socket).into());
    ask(server);
}

#[test]
fn a_helper_that_inherits_a_socket_leaves_the_statistics_alone() {
    let address = address("127.0.0.1");
    let folder = tempfile::tempdir().unwrap();
    let stats = folder.path().join("stats.prom");
    let arguments = [&address.port().to_string()[..]];
    let mut server = Server::spawn_with(SERVER_WITH_HELPER, &arguments, Stdio::null(), |command| {
        command.env("PPV2_STATS", &stats);
    });
    assert_eq!(server.line(), "ready\n");
    let proxy = UdpSocket::bind("127.0.0.1:0").unwrap();
    proxy
        .send_to(&from_client(CLIENT, b"hello"), address)
        .unwrap();
    let expected = "ppv2_preload_datagrams_received_total 00000000000000000001\n";
    assert_eq!(server.line(), expected);
}

/// What the program didn't ask for, it didn't ask for before it was executed either.
#[test]
fn a_server_that_executes_itself_again_sees_what_it_saw_before() {
    for (family, loopback) in [("4", "127.0.0.1"), ("6", "::1")] {
        for asks in ["0", "1"] {
            let port = port();
            let arguments = [family, &port.to_string(), asks];
            let _server = Server::start(SUCCESSOR, &arguments, Stdio::null());
            let proxy = UdpSocket::bind((loopback, 0)).unwrap();
            proxy.set_read_timeout(Some(TIMEOUT)).unwrap();
            let datagram = from_client(CLIENT, b"hello");
            proxy.send_to(&datagram, (loopback, port)).unwrap();
            let mut reply = [0; 256];
            let len = proxy.recv(&mut reply).unwrap();
            // The option, and how many control messages there were.
            let expected = format!("{asks} {asks}");
            assert_eq!(str::from_utf8(&reply[..len]).unwrap(), expected);
        }
    }
}

/// By the same port of the proxy, another client's datagrams may come.
#[test]
fn a_connected_socket_that_a_server_is_executed_with_is_one_clients() {
    let server = address("127.0.0.1");
    let proxy = UdpSocket::bind("127.0.0.1:0").unwrap();
    proxy.connect(server).unwrap();
    proxy.set_read_timeout(Some(TIMEOUT)).unwrap();
    let port = server.port().to_string();
    let mut child = Server::spawn(CONNECTED, &[&port], Stdio::null());
    assert_eq!(child.line(), "bound\n");
    let mut reply = [0; 256];
    proxy.send(&from_client(CLIENT, b"first")).unwrap();
    assert_eq!(child.line(), "ready\n");
    proxy.send(&from_client(CLIENT, b"second")).unwrap();
    let len = proxy.recv(&mut reply).unwrap();
    assert_eq!(&reply[..len], b"second");
    // The port passes to another client. As soon as the former one is forgotten, the kernel
    // refuses the next one's datagrams, since there is no listener.
    let other = from_client(OTHER_CLIENT, b"of another");
    eventually("the port to be another's", || {
        let refused = proxy.send(&other).is_err();
        proxy.set_nonblocking(true).unwrap();
        let received = proxy.recv(&mut reply);
        assert!(received.is_err(), "{received:?}");
        refused || received.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
    });
}

#[test]
fn a_library_that_binds_to_the_c_library_first_sees_its_client() {
    let folder = tempfile::tempdir().unwrap();
    let built = |name: &str, code: &str, more: &[&str]| {
        let source = folder.path().join(name).with_extension("c");
        let library = folder.path().join(name);
        std::fs::write(&source, code).unwrap();
        let mut cc = Command::new("cc");
        cc.args(["-shared", "-fPIC", "-o"])
            .arg(&library)
            .arg(source);
        let status = cc.args(more).status();
        assert!(status.expect("cc is in the Debian package gcc").success());
        library
    };
    built("libextension.so", EXTENSION, &[]);
    let path = ["-Wl,-rpath,$ORIGIN", "-Wl,--enable-new-dtags", "-ldl"];
    let loader = built("libloader.so", LOADER, &path);
    let server = address("127.0.0.1");
    let script = format!(
        "import ctypes; ctypes.CDLL({:?}).run({})",
        loader.to_str().unwrap(),
        server.port()
    );
    let _server = Server::start(&script, &[], Stdio::null());
    ask(server);
}

#[test]
fn a_wrong_setting_stops_the_program_before_it_begins() {
    let output = Command::new("python3")
        .args(["-c", "print('begun')"])
        .env("LD_PRELOAD", preload_library())
        .env("PPV2_TRUSTED", "not-a-network")
        .output()
        .unwrap();
    assert_eq!(
        (output.status.code(), &output.stdout[..]),
        (Some(2), &b""[..])
    );
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.contains("PPV2_TRUSTED") && said.lines().count() == 1,
        "{said}"
    );
}
