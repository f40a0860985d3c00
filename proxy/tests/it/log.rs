//! The log on standard error, where that can't be written: lines are lost and counted, and
//! all else goes on. `usage` has what datagrams notice of it.

use std::fs::{File, OpenOptions};
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Child, Command, Stdio};

use ppv2_lab::*;

const LOST: &str = "ppv2_log_lines_lost_total";

/// A proxy whose standard error is this.
struct Running {
    child: Child,
    admin: SocketAddr,
    listener: SocketAddr,
    server: UdpSocket,
}

impl Running {
    fn start(stderr: impl Into<Stdio>) -> Self {
        let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
        let server = socket("127.0.0.1");
        let mut command = Command::new(binary());
        command.args(["run", "--listen", &listener.to_string()]);
        command.args(["--upstream", &server.local_addr().unwrap().to_string()]);
        command.args(["--admin", &admin.to_string()]);
        let child = command.stdin(Stdio::null()).stderr(stderr).spawn().unwrap();
        let it = Self {
            child,
            admin,
            listener,
            server,
        };
        eventually("the start", || std::net::TcpStream::connect(admin).is_ok());
        eventually("readiness", || http_get(admin, "/readyz").0 == 200);
        served(&socket("127.0.0.1"), it.listener, &it.server);
        it
    }

    fn lost(&self) -> u64 {
        metric(self.admin, LOST)
    }

    /// Has a line logged.
    fn say(&self) {
        let (status, _) = http(self.admin, "POST /reload", "");
        assert_eq!(status, 422);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn lines_that_a_full_disk_or_a_closed_pipe_does_not_take_are_counted() {
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    for stderr in [Stdio::from(full), Stdio::from(writer)] {
        let it = Running::start(stderr);
        eventually("all lines of the start to be counted", || it.lost() >= 3);
        let lost = it.lost();
        it.say();
        eventually("another line to be counted", || it.lost() > lost);
        served(&socket("127.0.0.1"), it.listener, &it.server);
    }
}

#[test]
fn the_log_says_once_that_lines_were_lost() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pipe");
    let made = Command::new("mkfifo").arg(&path).status();
    assert!(made.unwrap().success());
    let without_waiting = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let read = || {
        let mut options = File::options();
        options.read(true).custom_flags(without_waiting);
        options.open(&path).unwrap()
    };
    let reader = read();
    let writer = OpenOptions::new().write(true).open(&path).unwrap();
    drop(reader);
    let it = Running::start(writer);
    eventually("lines to be lost", || it.lost() >= 3);
    let lost = it.lost();

    let mut reader = read();
    let mut text = String::new();
    let mut read_on = |until: &str| {
        eventually(until, || {
            let mut some = [0; 4096];
            while let Ok(count @ 1..) = std::io::Read::read(&mut reader, &mut some) {
                text += &String::from_utf8_lossy(&some[..count]);
            }
            text.contains(until)
        });
        text.clone()
    };
    it.say();
    let said = format!(
        "lines of this log are lost: standard error could not be written, or not fast enough lines={lost}"
    );
    read_on(&said);
    it.say();
    it.say();
    served(&socket("127.0.0.1"), it.listener, &it.server);
    let text = read_on("not reloaded");
    assert_eq!(text.matches("lines of this log").count(), 1, "{text}");
    assert_eq!(it.lost(), lost);
}
