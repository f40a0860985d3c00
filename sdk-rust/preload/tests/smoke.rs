//! An unmodified server sees its clients: Python's `socketserver` under the library, sent
//! to as the proxy does.

#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};

use ppv2_lab::fake_proxy::{CLIENT, from_client};
use ppv2_lab::{TIMEOUT, preload_library};

/// Serves by the socket that is its standard input, as inetd has it.
const INHERITOR: &str = r#"
import socket

inherited = socket.socket(fileno=0)
print("ready", flush=True)
while True:
    data, (host, port) = inherited.recvfrom(1000)
    inherited.sendto(f"{host}:{port} said {data.decode()}".encode(), (host, port))
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
struct Server(Child);

impl Server {
    fn start(script: &str, input: Stdio) -> Self {
        let mut child = Command::new("python3")
            .args(["-c", script])
            .env("LD_PRELOAD", preload_library())
            .env("PPV2_TRUSTED", "127.0.0.1")
            .stdin(input)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let output = child.stdout.take().unwrap();
        BufReader::new(output).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        Self(child)
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
    let unused = UdpSocket::bind("127.0.0.1:0").unwrap();
    let server = unused.local_addr().unwrap();
    drop(unused);
    let script = SERVER.replace("PORT", &server.port().to_string());
    let _server = Server::start(&script, Stdio::null());
    ask(server);
}

#[test]
fn a_socket_that_a_server_is_started_with_is_taken_over() {
    // The kernel hands out none of these ports.
    let socket = (20_000..30_000)
        .find_map(|port| UdpSocket::bind(("127.0.0.1", port)).ok())
        .unwrap();
    let server = socket.local_addr().unwrap();
    let _server = Server::start(INHERITOR, OwnedFd::from(socket).into());
    ask(server);
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
    let unused = UdpSocket::bind("127.0.0.1:0").unwrap();
    let server = unused.local_addr().unwrap();
    drop(unused);
    let script = format!(
        "import ctypes; ctypes.CDLL({:?}).run({})",
        loader.to_str().unwrap(),
        server.port()
    );
    let _server = Server::start(&script, Stdio::null());
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
