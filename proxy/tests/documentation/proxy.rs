//! A running proxy to ask.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(20);

/// A proxy with every kind of thing that metrics and the admin API show.
pub struct Proxy {
    child: Child,
    pub admin: SocketAddr,
    pub listener: SocketAddr,
    pub server: UdpSocket,
    _folder: tempfile::TempDir,
}

impl Proxy {
    pub fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        server.set_read_timeout(Some(TIMEOUT)).unwrap();
        // Free at this moment. Should another process take one first, the start fails.
        let sockets = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
        let [listener, other] = sockets.map(|socket| socket.local_addr().unwrap());
        let admin = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr());
        let admin = admin.unwrap();
        let config = format!(
            "[admin]\nlisten = \"{admin}\"\n\
             [[listener]]\nname = \"dns\"\nbind = [\"{listener}\"]\nupstream = \"resolvers\"\n\
             [upstream.resolvers]\nservers = [\"{}\"]\nhealth = {{ every = \"1h\" }}\n\
             [[listener]]\nname = \"other\"\nbind = [\"{other}\"]\nupstream = \"names\"\n\
             [upstream.names]\nservers = [\"dns:localhost:9\"]\n",
            server.local_addr().unwrap(),
        );
        let file = folder.path().join("proxy.toml");
        std::fs::write(&file, config).unwrap();
        #[expect(clippy::zombie_processes, reason = "one that did not start has ended")]
        let mut child = Command::new(super::BINARY)
            .args(["run", "--config"])
            .arg(&file)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        let mut lines = log.lines().map(Result::unwrap);
        let mut seen = Vec::new();
        while let Some(line) = lines.next() {
            if line.contains("ready") {
                // What comes later must find a reader.
                std::thread::spawn(move || lines.count());
                return Self {
                    child,
                    admin,
                    listener,
                    server,
                    _folder: folder,
                };
            }
            seen.push(line);
        }
        panic!("the proxy did not start:\n{}", seen.join("\n"));
    }

    /// The body of what is answered.
    pub fn get(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(self.admin).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: {}\r\n\r\n",
            self.admin
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.split_once("\r\n\r\n").unwrap().1.to_owned()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// All metrics, in the classic text format.
pub fn metrics() -> String {
    Proxy::start().get("/metrics")
}
