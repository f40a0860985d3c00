//! A proxy with an admin address that can be reloaded, and servers that answer with the
//! address of the session that asked.

use std::net::{SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::*;

/// A server that answers each datagram with its own address, the address that it
/// came from, which tells sessions apart, and what came.
pub struct Server {
    pub address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub fn start() -> Self {
        Self::at(address("127.0.0.1"))
    }

    pub fn at(address: SocketAddr) -> Self {
        let socket = bind(address);
        socket
            .set_read_timeout(Some(Duration::from_millis(20)))
            .unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut datagram = [0; 2000];
            while !told.load(Ordering::Relaxed) {
                let Ok((len, from)) = socket.recv_from(&mut datagram) else {
                    continue;
                };
                let mut answer = format!("{address} {from} ").into_bytes();
                answer.extend_from_slice(&datagram[..len]);
                socket.send_to(&answer, from).unwrap();
            }
        });
        Self {
            address,
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().map(JoinHandle::join);
    }
}

pub fn list(servers: &[&Server]) -> String {
    let servers = servers
        .iter()
        .map(|server| format!("\"{}\"", server.address));
    servers.collect::<Vec<_>>().join(", ")
}

pub struct Proxy {
    pub process: Process,
    pub admin: SocketAddr,
    pub file: PathBuf,
    pub folder: tempfile::TempDir,
}

impl Proxy {
    /// Runs with this configuration, to which the admin's address is added.
    pub fn start(config: &str) -> Self {
        let admin = address("127.0.0.1");
        let folder = tempfile::tempdir().unwrap();
        let file = write(&folder, "proxy.toml", &Self::whole(admin, config));
        let process = proxy(&["--config", file.to_str().unwrap()]);
        Self {
            process,
            admin,
            file,
            folder,
        }
    }

    pub fn whole(admin: SocketAddr, config: &str) -> String {
        format!("workers = 2\ndrain_timeout = \"2s\"\n{config}\n[admin]\nlisten = \"{admin}\"\n")
    }

    pub fn write(&self, config: &str) {
        std::fs::write(&self.file, Self::whole(self.admin, config)).unwrap();
    }

    pub fn try_reload(&self, config: &str) -> (u16, String) {
        self.write(config);
        http(self.admin, "POST /reload", "")
    }

    pub fn reload(&self, config: &str) -> String {
        let (status, said) = self.try_reload(config);
        assert_eq!(status, 200, "{said}");
        said
    }

    pub fn metric(&self, name: &str) -> u64 {
        metric(self.admin, name)
    }

    pub fn has_metric(&self, name: &str) -> bool {
        http_get(self.admin, "/metrics").1.contains(name)
    }
}

pub fn listener(name: &str, bind: SocketAddr, upstream: &str) -> String {
    format!(
        "[[listener]]\nname = \"{name}\"\nbind = [\"{bind}\"]\nupstream = \"{upstream}\"\n\
         mode = \"plain\"\n"
    )
}

/// The server that answered, and the address that it was asked from.
pub fn ask(client: &UdpSocket, listener: SocketAddr) -> (SocketAddr, SocketAddr) {
    client.send_to(b"?", listener).unwrap();
    let (answer, from) = receive(client);
    assert_eq!(from, listener);
    let answer = String::from_utf8(answer).unwrap();
    let mut words = answer.split(' ').map(str::parse);
    let mut next = || words.next().unwrap().unwrap();
    (next(), next())
}
