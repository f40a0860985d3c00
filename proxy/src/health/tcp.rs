//! The checks of a TCP port beside the server: that it accepts a connection, or answers
//! an HTTP request.

use std::io::{self, ErrorKind};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{Instant, timeout_at};

use super::check::{HealthCheck, Outcome, Target, own};

pub(super) struct Tcp {
    pub(super) target: Target,
    /// Its port, if it is not the server's.
    pub(super) port: Option<u16>,
}

impl HealthCheck for Tcp {
    async fn check(&mut self, deadline: Instant) -> Outcome {
        until(deadline, async {
            self.connect().await.map(|_| Outcome::Passed)
        })
        .await
    }
}

/// A request for a path, which passes if it is answered by 2xx or 3xx.
pub(super) struct Http {
    pub(super) tcp: Tcp,
    pub(super) path: String,
}

impl HealthCheck for Http {
    async fn check(&mut self, deadline: Instant) -> Outcome {
        until(deadline, self.request()).await
    }
}

async fn until(deadline: Instant, check: impl Future<Output = io::Result<Outcome>>) -> Outcome {
    match timeout_at(deadline, check).await {
        Ok(checked) => checked.unwrap_or_else(|error| Outcome::of(&error)),
        Err(_) => Outcome::Timeout,
    }
}

impl Tcp {
    async fn connect(&self) -> io::Result<TcpStream> {
        let address = self.target.at(self.port);
        let socket = match address.is_ipv4() {
            true => TcpSocket::new_v4()?,
            false => TcpSocket::new_v6()?,
        };
        if self.target.source.is_some() {
            self.target.bind(&socket).map_err(own)?;
        }
        socket.connect(address).await
    }
}

impl Http {
    async fn request(&self) -> io::Result<Outcome> {
        let mut stream = self.tcp.connect().await?;
        let (path, host) = (&self.path, self.tcp.target.at(self.tcp.port));
        let request = format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut status = *b"HTTP/1.1 200";
        match stream.read_exact(&mut status).await {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                return Ok(Outcome::WrongAnswer);
            }
            Err(error) => return Err(error),
        }
        let passed = status.starts_with(b"HTTP/1.") && matches!(status[9], b'2' | b'3');
        Ok(match passed {
            true => Outcome::Passed,
            false => Outcome::WrongAnswer,
        })
    }
}
