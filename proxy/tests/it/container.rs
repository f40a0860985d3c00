//! The container image, built and run by podman without a registry: it has the proxy alone,
//! which needs no right and writes nowhere.

use std::fs::{self, File, Permissions};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::process::Command;
use std::thread;

use ppv2_lab::*;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/container");
const IMAGE: &str = "localhost/ppv2-proxy:test";
/// The image's user, which the manifests for Kubernetes name, too.
const USER: u32 = 53_553;

/// What a careful operator runs it with.
const RESTRICTED: [&str; 4] = [
    "--read-only",
    "--read-only-tmpfs=false",
    "--cap-drop=all",
    "--security-opt=no-new-privileges",
];

/// What concerns the place alone: this host may have no control groups or systemd that podman
/// can use, and limits that it can't raise.
const ANYWHERE: [&str; 4] = [
    "--cgroups=disabled",
    "--ulimit=nofile=4096:4096",
    "--ulimit=nproc=1024:1024",
    // Docker adds none to the image's.
    "--passwd=false",
];

fn podman(arguments: &[&str]) -> Command {
    let mut command = Command::new("podman");
    command.env("DISABLE_HC_SYSTEMD", "true").args(arguments);
    command
}

/// What podman prints, if it succeeds.
#[track_caller]
fn says(arguments: &[&str]) -> String {
    let (code, out, error) = output_of(&mut podman(arguments));
    assert_eq!(code, Some(0), "podman {arguments:?}: {out}{error}");
    out.trim_end().to_owned()
}

/// Builds the image as `make image` does.
fn build() {
    let mut build = Command::new(format!("{FOLDER}/build"));
    build.args([binary(), preload_library(), preload_library_musl()]);
    build.arg(IMAGE).env("ENGINE", "podman");
    let (code, out, error) = output_of(&mut build);
    assert_eq!(
        code,
        Some(0),
        "podman and crun are in the Debian packages of these names: {out}{error}"
    );
}

/// Mounts of the libraries that the tests' binary needs. The image's own is static.
fn libraries() -> Vec<String> {
    // It fails for static binaries.
    let (_, out, _) = output_of(Command::new("ldd").arg(binary()));
    let words = out.split_whitespace();
    let paths = words.filter(|word| word.starts_with('/'));
    paths
        .map(|path| format!("--volume={path}:{path}:ro"))
        .collect()
}

/// A configuration in a folder that the image's user can read.
fn folder_with(config: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let file = write(&folder, "proxy.toml", config);
    fs::set_permissions(file, Permissions::from_mode(0o644)).unwrap();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    folder
}

/// A container that has said `ready`.
fn start(name: &str, folder: &tempfile::TempDir, options: &[&str]) -> Process {
    start_with(name, folder, options, &[])
}

/// As [`start`], with other arguments than the image has.
fn start_with(
    name: &str,
    folder: &tempfile::TempDir,
    options: &[&str],
    arguments: &[&str],
) -> Process {
    let mut command = podman(&["run", "--name", name]);
    command
        .args(ANYWHERE)
        .args(RESTRICTED)
        .args(options)
        .args(libraries());
    let volume = format!("{}:/etc/ppv2:ro", folder.path().display());
    command.arg("--volume").arg(volume).arg(IMAGE);
    let mut process = Process::start(command.args(arguments));
    process.wait_for("ready");
    process
}

/// The process of a container, as /proc has it.
fn proc_of(name: &str) -> String {
    format!(
        "/proc/{}",
        says(&["inspect", "--format", "{{.State.Pid}}", name])
    )
}

/// The words of a line of /proc/PID/status.
fn field(process: &str, name: &str) -> Vec<String> {
    let status = fs::read_to_string(format!("{process}/status")).unwrap();
    let mut lines = status.lines();
    let line = lines.find_map(|line| line.strip_prefix(name)).unwrap();
    line.split_whitespace().map(str::to_owned).collect()
}

fn health(name: &str) -> (Option<i32>, String) {
    let (code, ..) = output_of(&mut podman(&["healthcheck", "run", name]));
    let state = says(&["inspect", "--format", "{{.State.Health.Status}}", name]);
    (code, state)
}

#[test]
fn image_runs_without_rights_and_drains() {
    if !namespace::enter_for_containers(test_name!(), "") {
        return;
    }
    build();
    let server = socket("127.0.0.1");
    let example = fs::read_to_string(format!("{FOLDER}/example.toml")).unwrap();
    let address = server.local_addr().unwrap();
    let config = example.replace("192.0.2.10:5353", &address.to_string());
    assert_ne!(config, example);
    let folder = folder_with(&config);
    let mut proxy = start("proxy", &folder, &["--network=host"]);
    let process = proc_of("proxy");

    for id in ["Uid:", "Gid:"] {
        let expected = USER.to_string();
        assert_eq!(field(&process, id), [expected.as_str(); 4], "{id}");
    }
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(field(&process, set), [format!("{:016x}", 0)], "{set}");
    }
    assert_eq!(field(&process, "NoNewPrivs:"), ["1"]);
    // A filter of system calls.
    assert_eq!(field(&process, "Seccomp:"), ["2"]);
    let mounts = fs::read_to_string(format!("{process}/mounts")).unwrap();
    let root = mounts
        .lines()
        .find(|line| line.split(' ').nth(1) == Some("/"));
    let options = root.unwrap().split(' ').nth(3).unwrap();
    assert!(options.split(',').any(|option| option == "ro"), "{options}");

    let listener = "127.0.0.1:5300".parse().unwrap();
    let client = socket("127.0.0.1");
    client.send_to(b"question", listener).unwrap();
    let (datagram, session) = receive(&server);
    let expected = (client.local_addr().unwrap(), listener, b"question".to_vec());
    assert_eq!(read_header(&datagram), expected);
    server.send_to(b"answer", session).unwrap();
    assert_eq!(receive(&client), (b"answer".to_vec(), listener));

    let (healthy, unhealthy) = ("healthy".to_owned(), "unhealthy".to_owned());
    assert_eq!(health("proxy"), (Some(0), healthy.clone()));
    says(&["kill", "--signal=STOP", "proxy"]);
    // As many as the image says.
    let states = [healthy.clone(), healthy.clone(), unhealthy];
    for state in states {
        assert_eq!(health("proxy"), (Some(1), state));
    }
    says(&["kill", "--signal=CONT", "proxy"]);
    assert_eq!(health("proxy"), (Some(0), healthy));

    client.send_to(b"slow question", listener).unwrap();
    let (_, session) = receive(&server);
    // podman passes it on.
    proxy.signal("TERM");
    proxy.wait_for("shutting down");
    assert!(!proxy.has_ended(), "it waits for the reply");
    server.send_to(b"answer", session).unwrap();
    assert_eq!(receive(&client), (b"answer".to_vec(), listener));
    let (status, log) = proxy.wait();
    assert_eq!(status.code(), Some(0), "{log}");
    assert!(log.contains("stopped"), "{log}");
    // Nothing but the folders to which podman has mounted something.
    let changes = says(&["diff", "proxy"]);
    let mut files = changes.lines().filter_map(|line| line.split_once(' '));
    let written = files.find(|(_, path)| path.contains("ppv2") || path.starts_with("/var"));
    assert_eq!(written, None, "{changes}");
}

/// A host beside this one, which has the address 198.51.100.10.
const CLIENT: &str = "
ip netns add client
ip link add pub type veth peer name c0 netns client
ip addr add 198.51.100.10/24 dev pub; ip link set pub up
ip -n client addr add 198.51.100.1/24 dev c0; ip -n client link set c0 up";

fn socket_of_client() -> UdpSocket {
    let make = || {
        let namespace = File::open("/run/netns/client").unwrap();
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        socket("198.51.100.1")
    };
    thread::spawn(make).join().unwrap()
}

fn config(listener: &str, server: SocketAddr) -> String {
    format!(
        "[[listener]]\nbind = [\"{listener}\"]\nupstream = \"u\"\n\
         [upstream.u]\nservers = [\"{server}\"]\n"
    )
}

#[test]
fn published_port_keeps_the_addresses_of_other_hosts() {
    if !namespace::enter_for_containers(test_name!(), CLIENT) {
        return;
    }
    build();
    let (client, server) = (socket_of_client(), socket("198.51.100.10"));
    let folder = folder_with(&config("0.0.0.0:5300", server.local_addr().unwrap()));
    let _proxy = start("proxy", &folder, &["--publish=53:5300/udp"]);
    let listener = "198.51.100.10:53".parse().unwrap();
    client.send_to(b"question", listener).unwrap();
    let (datagram, session) = receive(&server);
    let (named, destination, _) = read_header(&datagram);
    assert_eq!(named, client.local_addr().unwrap());
    // The network address translation has replaced it.
    let format = "{{.NetworkSettings.IPAddress}}:5300";
    let container = says(&["inspect", "--format", format, "proxy"]);
    assert_eq!(destination.to_string(), container);
    server.send_to(b"answer", session).unwrap();
    assert_eq!(receive(&client), (b"answer".to_vec(), listener));
}

/// What another process is numbered differs from container to container.
#[test]
fn container_takes_over_from_another() {
    if !namespace::enter_for_containers(test_name!(), "") {
        return;
    }
    build();
    let (client, server) = (socket("127.0.0.1"), socket("127.0.0.1"));
    let upgrade = "[upgrade]\nsocket = \"/run/ppv2/upgrade.sock\"\n";
    let config = config("127.0.0.1:5300", server.local_addr().unwrap());
    let folder = folder_with(&format!("{upgrade}{config}"));
    let shared = tempfile::tempdir().unwrap();
    chown(shared.path(), Some(USER), Some(USER)).unwrap();
    let volume = format!("--volume={}:/run/ppv2", shared.path().display());
    let options = ["--network=host", &volume];
    let mut one = start("one", &folder, &options);

    let listener = "127.0.0.1:5300".parse().unwrap();
    client.send_to(b"slow question", listener).unwrap();
    let (_, session) = receive(&server);
    let takeover = ["run", "--config", "/etc/ppv2/proxy.toml", "--takeover"];
    let mut two = start_with("two", &folder, &options, &takeover);
    let (status, log) = one.wait();
    assert_eq!(status.code(), Some(0), "{log}");

    server.send_to(b"answer", session).unwrap();
    assert_eq!(receive(&client), (b"answer".to_vec(), listener));
    client.send_to(b"question", listener).unwrap();
    assert_eq!(receive(&server).1, session);
    two.signal("TERM");
    let (status, log) = two.wait();
    assert_eq!(status.code(), Some(0), "{log}");
}

#[test]
fn low_port_of_the_host_takes_one_capability() {
    if !namespace::enter_for_containers(test_name!(), "") {
        return;
    }
    build();
    let server = socket("127.0.0.1");
    let folder = folder_with(&config("127.0.0.1:53", server.local_addr().unwrap()));
    let ways: [(&str, &[&str]); 2] = [
        ("53553", &["--cap-add=NET_BIND_SERVICE"]),
        // Docker gives capabilities to root alone, which the proxy does not stay.
        (
            "65534",
            &["--user=0", "--cap-add=NET_BIND_SERVICE,SETUID,SETGID"],
        ),
    ];
    for (user, options) in ways {
        let options = [&["--network=host", "--replace"], options].concat();
        let mut proxy = start("proxy", &folder, &options);
        let process = proc_of("proxy");
        assert_eq!(field(&process, "Uid:"), [user; 4]);
        let net_bind_service = format!("{:016x}", 1 << 10);
        assert_eq!(field(&process, "CapPrm:"), [net_bind_service]);
        served(
            &socket("127.0.0.1"),
            "127.0.0.1:53".parse().unwrap(),
            &server,
        );
        proxy.signal("TERM");
        let (status, log) = proxy.wait();
        assert_eq!(status.code(), Some(0), "{log}");
    }
}
