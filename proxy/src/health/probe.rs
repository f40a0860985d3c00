//! One probe of one server, from a socket of its own.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, UdpSocket};
use tokio::time::Instant;

use crate::config::{Expect, Header, Probe};

/// Answers that a probe looks at; it bounds what a server costs that answers a
/// hundred times what it is asked.
const ANSWERS: usize = 16;

/// What came of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Passed,
    Refused,
    Timeout,
    WrongAnswer,
    Unreachable,
    /// This host could not ask, which says nothing of the server.
    NotSent,
}

impl Outcome {
    pub(super) const ALL: [Self; 6] = [
        Self::Passed,
        Self::Refused,
        Self::Timeout,
        Self::WrongAnswer,
        Self::Unreachable,
        Self::NotSent,
    ];

    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Refused => "refused",
            Self::Timeout => "timeout",
            Self::WrongAnswer => "wrong_answer",
            Self::Unreachable => "unreachable",
            Self::NotSent => "not_sent",
        }
    }

    fn of(error: &io::Error) -> Self {
        let is = |kinds: [ErrorKind; 2]| kinds.contains(&error.kind());
        if is([ErrorKind::ConnectionRefused, ErrorKind::ConnectionReset]) {
            Self::Refused
        } else if is([ErrorKind::HostUnreachable, ErrorKind::NetworkUnreachable]) {
            Self::Unreachable
        } else {
            Self::NotSent
        }
    }
}

/// Whom to ask, and from where.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) address: SocketAddr,
    pub(super) source: Option<IpAddr>,
    /// Whether clients' datagrams to it have a header.
    pub(super) reads_header: bool,
}

impl Target {
    fn local(&self) -> SocketAddr {
        let any: IpAddr = match self.address {
            SocketAddr::V4(_) => [0; 4].into(),
            SocketAddr::V6(_) => [0u16; 8].into(),
        };
        SocketAddr::new(self.source.unwrap_or(any), 0)
    }

    /// With the port of a companion.
    fn beside(&self, port: Option<u16>) -> SocketAddr {
        let mut address = self.address;
        address.set_port(port.unwrap_or(address.port()));
        address
    }
}

/// Asks, and waits for an answer.
pub(super) async fn ask(probe: &Probe, target: &Target, timeout: Duration) -> Outcome {
    let deadline = Instant::now() + timeout;
    let asked = async {
        match probe {
            Probe::Udp {
                payload,
                expect,
                header,
            } => {
                let expected = |answer: &[u8]| match expect {
                    Expect::Any | Expect::Silence => true,
                    Expect::Bytes(bytes) => answer == bytes,
                    Expect::Matching(regex) => regex.is_match(answer),
                };
                let may_be_silent = matches!(expect, Expect::Silence);
                udp(target, *header, payload, may_be_silent, deadline, expected).await
            }
            Probe::Dns { query, header } => {
                let id = lot().to_be_bytes();
                let mut query = query.clone();
                query[..2].copy_from_slice(&id[..2]);
                let expected = |answer: &[u8]| is_dns_answer(answer, &id[..2]);
                udp(target, *header, &query, false, deadline, expected).await
            }
            Probe::Tcp { port } => {
                let connected = connect(target, *port);
                let connected = tokio::time::timeout_at(deadline, connected).await;
                connected.map_or(Ok(Outcome::Timeout), |c| c.map(|_| Outcome::Passed))
            }
            Probe::Http { port, path } => {
                let answered = http(target, *port, path);
                let answered = tokio::time::timeout_at(deadline, answered).await;
                answered.unwrap_or(Ok(Outcome::Timeout))
            }
        }
    };
    asked.await.unwrap_or_else(|error| Outcome::of(&error))
}

async fn udp(
    target: &Target,
    header: Header,
    payload: &[u8],
    may_be_silent: bool,
    deadline: Instant,
    expected: impl Fn(&[u8]) -> bool,
) -> io::Result<Outcome> {
    let with_header = match header {
        Header::Auto => target.reads_header,
        Header::Local => true,
        Header::None => false,
    };
    let mut datagram = Vec::new();
    if with_header {
        let mut buffer = [0; 16];
        let encoder = ppv2::Encoder::local(&mut buffer).map_err(io::Error::other)?;
        datagram.extend_from_slice(encoder.finish());
    }
    datagram.extend_from_slice(payload);
    let socket = UdpSocket::bind(target.local()).await?;
    socket.connect(target.address).await?;
    socket.send(&datagram).await?;
    let mut outcome = if may_be_silent {
        Outcome::Passed
    } else {
        Outcome::Timeout
    };
    let mut answer = vec![0; 65_536];
    for _ in 0..ANSWERS {
        match tokio::time::timeout_at(deadline, socket.recv(&mut answer)).await {
            Err(_) => break,
            Ok(Ok(len)) if expected(&answer[..len]) => return Ok(Outcome::Passed),
            Ok(Ok(_)) => outcome = Outcome::WrongAnswer,
            // An answer that comes yet proves it forged.
            Ok(Err(error)) => outcome = Outcome::of(&error),
        }
    }
    Ok(outcome)
}

/// Whether it answers the query of this id, with anything but "I failed" (RFC
/// 1035, section 4.1.1).
fn is_dns_answer(answer: &[u8], id: &[u8]) -> bool {
    const SERVFAIL: u8 = 2;
    answer.len() >= 12
        && &answer[..2] == id
        && answer[2] & 0xf8 == 0x80
        && answer[3] & 0x0f != SERVFAIL
}

async fn connect(target: &Target, port: Option<u16>) -> io::Result<tokio::net::TcpStream> {
    let address = target.beside(port);
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    if target.source.is_some() {
        socket.bind(target.local())?;
    }
    socket.connect(address).await
}

async fn http(target: &Target, port: Option<u16>, path: &str) -> io::Result<Outcome> {
    let mut stream = connect(target, port).await?;
    let host = target.beside(port);
    let request = format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    // "HTTP/1.1 200"
    let mut status = [0; 12];
    match stream.read_exact(&mut status).await {
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(Outcome::WrongAnswer),
        Err(error) => return Err(error),
    }
    let good = status.starts_with(b"HTTP/1.") && matches!(status[9], b'2' | b'3');
    Ok(if good {
        Outcome::Passed
    } else {
        Outcome::WrongAnswer
    })
}

/// A number that nobody can foretell.
pub(super) fn lot() -> u64 {
    RandomState::new().build_hasher().finish()
}
