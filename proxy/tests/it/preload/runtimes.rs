//! Servers of a few lines in Python and for Node, each of which answers with the address
//! that it saw.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ppv2_lab::dig::program;
use ppv2_lab::wrapped::{Scene, at, is_direct, setup, wrapped};
use ppv2_lab::*;

/// A server's interpreter, its file, and what follows address and port.
struct Server {
    interpreter: PathBuf,
    file: &'static str,
    more: &'static [&'static str],
}

impl Server {
    fn python(file: &'static str, more: &'static [&'static str]) -> Self {
        // Not another Python that a shell script of the same name would choose.
        let interpreter = PathBuf::from("/usr/bin/python3");
        assert!(interpreter.is_file(), "install the Debian package python3");
        Self {
            interpreter,
            file,
            more,
        }
    }

    fn node(file: &'static str) -> Self {
        Self {
            interpreter: program("node", "nodejs"),
            file,
            more: &[],
        }
    }

    fn start(&self, options: &[&str], ip: &str, port: u16) -> Process {
        let file = Path::new(FOLDER).join(self.file);
        let port = port.to_string();
        let mut arguments = vec![file.to_str().unwrap(), ip, &port];
        arguments.extend(self.more);
        let mut process = wrapped(options, &self.interpreter, &arguments);
        process.wait_for("ready");
        process
    }
}

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/preload/servers");

/// How long a client is remembered where a test waits for the end of that.
const REMEMBERED: Duration = Duration::from_secs(1);

fn each_client_is_answered(scene: &Scene, named: impl Fn(SocketAddr) -> SocketAddr) {
    let question = |client: SocketAddr, round| format!("{round} of {client}").into_bytes();
    scene.strangers(b"stranger");
    scene.exchange(question, |client, round, answer| {
        let question = String::from_utf8(question(client, round)).unwrap();
        let expected = format!("{} {question}", named(client));
        assert_eq!(String::from_utf8_lossy(answer), expected);
    });
}

fn each_client_is_seen(test: &str, server: &Server) {
    if !namespace::enter(test, &setup()) {
        return;
    }
    for family in [0, 1] {
        let address = at(family, port());
        let _process = server.start(&[], &address.ip().to_string(), address.port());
        each_client_is_answered(&Scene::new(address), |client| client);
    }
}

/// A server that writes to a client which is forgotten is told so, and goes on.
fn a_late_push_fails(test: &str, server: &Server, error: &str) {
    if !namespace::enter(test, &setup()) || is_direct() {
        return;
    }
    let address = at(0, port());
    let forget_after = format!("{}s", REMEMBERED.as_secs());
    let options = ["--forget-after", &forget_after];
    let mut process = server.start(&options, &address.ip().to_string(), address.port());
    let scene = Scene::new(address);
    let client = &scene.clients[0];
    let name = client.local_addr().unwrap();
    let asks = |question: &str| {
        client.send_to(question.as_bytes(), scene.listener).unwrap();
        receive(client)
    };
    let in_time = format!("later {} push", REMEMBERED.as_millis() / 4);
    let answer = asks(&in_time);
    let expected = format!("{name} {in_time}").into_bytes();
    assert_eq!(answer, (expected, scene.listener));
    let late = format!("later {} push", 2 * REMEMBERED.as_millis());
    client.send_to(late.as_bytes(), scene.listener).unwrap();
    process.wait_for(error);
    // Its next datagram shows a way again.
    let expected = format!("{name} again").into_bytes();
    assert_eq!(asks("again"), (expected, scene.listener));
    scene.nothing_more(&scene.clients);
}

#[test]
fn threads_that_share_a_python_socket_see_each_client() {
    let server = Server::python("whoami_socket.py", &["threads"]);
    each_client_is_seen(test_name!(), &server);
}

#[test]
fn forked_processes_that_share_a_python_socket_see_each_client() {
    let server = Server::python("whoami_socket.py", &["fork"]);
    each_client_is_seen(test_name!(), &server);
}

#[test]
fn python_asyncio_sees_each_client() {
    let server = Server::python("whoami_asyncio.py", &[]);
    each_client_is_seen(test_name!(), &server);
}

#[test]
fn python_asyncio_answers_by_tags() {
    if !namespace::enter(test_name!(), &setup()) {
        return;
    }
    let address = at(0, port());
    let server = Server::python("whoami_asyncio.py", &[]);
    let _process = server.start(&[], &address.ip().to_string(), address.port());
    let scene = Scene::with(0, address, &["--replies", "tagged"]);
    each_client_is_answered(&scene, |client| client);
}

#[test]
fn python_asyncio_is_told_that_a_push_comes_too_late() {
    let server = Server::python("whoami_asyncio.py", &[]);
    a_late_push_fails(test_name!(), &server, "No route to host");
}

#[test]
fn a_python_socket_of_both_families_sees_each_client() {
    if !namespace::enter(test_name!(), &setup()) {
        return;
    }
    let port = port();
    let server = Server::python("whoami_socket.py", &["threads"]);
    let _process = server.start(&[], "::", port);
    for client_family in [0, 1] {
        for server_family in [0, 1] {
            // Alone, the socket can't choose the address of `lo` that an answer leaves from.
            if is_direct() && (client_family, server_family) != (0, 0) {
                continue;
            }
            let scene = Scene::with(client_family, at(server_family, port), &[]);
            each_client_is_answered(&scene, |client| match client.ip() {
                IpAddr::V4(ip) => mapped(ip, client.port()),
                IpAddr::V6(_) => client,
            });
        }
    }
}

/// An IPv4 address as a socket of both families names it.
fn mapped(ip: Ipv4Addr, port: u16) -> SocketAddr {
    SocketAddr::new(ip.to_ipv6_mapped().into(), port)
}

#[test]
fn node_sees_each_client() {
    each_client_is_seen(test_name!(), &Server::node("whoami.js"));
}

#[test]
fn processes_of_node_that_are_passed_a_socket_see_each_client() {
    each_client_is_seen(test_name!(), &Server::node("cluster.js"));
}

#[test]
fn node_is_told_that_a_push_comes_too_late() {
    a_late_push_fails(test_name!(), &Server::node("whoami.js"), "EHOSTUNREACH");
}
