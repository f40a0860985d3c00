//! One probe of one server, from a socket of its own.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use rustix::io::Errno;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, UdpSocket};
use tokio::time::Instant;

use super::search;
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
    /// This host could not ask, for want of descriptors, memory or its source
    /// address, or by its own firewall, or it had no time to search the answer. It
    /// says nothing of the server.
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

    /// What an error says that came before a datagram was sent, or of a connection.
    fn of(error: &io::Error) -> Self {
        match Errno::from_io_error(error) {
            // A server may end a connection before it has read what it was asked.
            Some(Errno::CONNREFUSED | Errno::CONNRESET | Errno::CONNABORTED | Errno::PIPE) => {
                Self::Refused
            }
            Some(Errno::TIMEDOUT) => Self::Timeout,
            // This host lacks something, or its own firewall is in the way.
            Some(
                Errno::MFILE
                | Errno::NFILE
                | Errno::NOBUFS
                | Errno::NOMEM
                | Errno::AGAIN
                | Errno::PERM,
            )
            | None => Self::NotSent,
            // An address that can't be written to, for clients' datagrams either.
            Some(_) => Self::Unreachable,
        }
    }

    /// What an error says that came after a datagram was sent, if anything: most of
    /// them are ICMP errors (`icmp_err_convert` of Linux).
    fn of_sent(error: &io::Error) -> Option<Self> {
        match Errno::from_io_error(error)? {
            Errno::CONNREFUSED => Some(Self::Refused),
            Errno::NETUNREACH
            | Errno::HOSTUNREACH
            | Errno::NETDOWN
            | Errno::HOSTDOWN
            | Errno::NONET
            | Errno::NOPROTOOPT => Some(Self::Unreachable),
            _ => None,
        }
    }
}

/// Whom to ask, and from where.
#[derive(Clone, Debug, PartialEq)]
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
                let may_be_silent = matches!(expect, Expect::Silence);
                let expected = Expected::Configured(expect);
                udp(target, *header, payload, may_be_silent, deadline, expected).await
            }
            Probe::Dns { query, header } => {
                let id = lot().to_be_bytes();
                let mut query = query.clone();
                query[..2].copy_from_slice(&id[..2]);
                let expected = Expected::Dns { id: &id[..2] };
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

/// What an answer to a datagram must be.
enum Expected<'a> {
    Configured(&'a Expect),
    Dns { id: &'a [u8] },
}

impl Expected<'_> {
    /// Whether `answer` is. `None` if this host could not find out by `deadline`.
    async fn is(&self, answer: &[u8], deadline: Instant) -> Option<bool> {
        match self {
            Self::Configured(Expect::Any | Expect::Silence) => Some(true),
            Self::Configured(Expect::Bytes(bytes)) => Some(answer == bytes),
            Self::Configured(Expect::Matching(regex)) => {
                search::is_found(regex, answer, deadline).await
            }
            Self::Dns { id } => Some(is_dns_answer(answer, id)),
        }
    }
}

async fn udp(
    target: &Target,
    header: Header,
    payload: &[u8],
    may_be_silent: bool,
    deadline: Instant,
    expected: Expected<'_>,
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
    let socket = UdpSocket::bind(target.local()).await.map_err(own)?;
    socket.connect(target.address).await?;
    socket.send(&datagram).await?;
    let mut outcome = if may_be_silent {
        Outcome::Passed
    } else {
        Outcome::Timeout
    };
    let mut answer = vec![0; 65_536];
    for _ in 0..ANSWERS {
        let len = match tokio::time::timeout_at(deadline, socket.recv(&mut answer)).await {
            Err(_) => break,
            Ok(Ok(len)) => len,
            // An answer that comes yet proves it forged.
            Ok(Err(error)) => {
                outcome = Outcome::of_sent(&error).unwrap_or(outcome);
                continue;
            }
        };
        match expected.is(&answer[..len], deadline).await {
            Some(true) => return Ok(Outcome::Passed),
            Some(false) => outcome = Outcome::WrongAnswer,
            None => return Ok(Outcome::NotSent),
        }
        // Whatever waits to be read does not prolong a probe.
        if Instant::now() >= deadline {
            break;
        }
    }
    Ok(outcome)
}

/// An error of this host's own address, without the number that would speak against
/// the server.
fn own(error: io::Error) -> io::Error {
    io::Error::other(error)
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
        socket.bind(target.local()).map_err(own)?;
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

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket as Blocking};
    use std::sync::Arc;
    use std::thread;

    use regex::bytes::Regex;

    use super::*;

    const SOON: Duration = Duration::from_millis(200);

    fn target(address: SocketAddr) -> Target {
        Target {
            address,
            source: None,
            reads_header: false,
        }
    }

    fn asked(probe: &Probe, address: SocketAddr) -> Outcome {
        asked_of(probe, &target(address))
    }

    fn asked_of(probe: &Probe, target: &Target) -> Outcome {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(ask(probe, target, SOON))
    }

    /// What comes of a probe that is answered by what `answers` makes of it.
    fn answered(probe: &Probe, answers: fn(&[u8]) -> Vec<Vec<u8>>) -> Outcome {
        let server = Blocking::bind("127.0.0.1:0").unwrap();
        let address = server.local_addr().unwrap();
        let thread = thread::spawn(move || {
            let mut question = [0; 2000];
            let (len, from) = server.recv_from(&mut question).unwrap();
            for answer in answers(&question[..len]) {
                // The probe may be over, and refuse the rest.
                let _ = server.send_to(&answer, from);
            }
            server
        });
        let outcome = asked(probe, address);
        drop(thread.join().unwrap());
        outcome
    }

    #[test]
    fn a_dns_answer_has_the_id_and_is_no_failure() {
        let probe = Probe::Dns {
            query: vec![0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1],
            header: Header::None,
        };
        fn with(question: &[u8], flags: [u8; 2]) -> Vec<Vec<u8>> {
            let mut answer = question.to_vec();
            answer[2..4].copy_from_slice(&flags);
            vec![answer]
        }
        let nxdomain = answered(&probe, |question| with(question, [0x81, 0x83]));
        assert_eq!(nxdomain, Outcome::Passed);
        let servfail = answered(&probe, |question| with(question, [0x81, 0x82]));
        assert_eq!(servfail, Outcome::WrongAnswer);
        let echo = answered(&probe, |question| vec![question.to_vec()]);
        assert_eq!(echo, Outcome::WrongAnswer);
        let other_id = answered(&probe, |question| {
            let mut answers = with(question, [0x81, 0x80]);
            answers[0][0] ^= 1;
            answers
        });
        assert_eq!(other_id, Outcome::WrongAnswer);
    }

    #[test]
    fn a_flood_of_wrong_answers_ends_a_probe() {
        let probe = Probe::Udp {
            payload: b"ping".to_vec(),
            expect: Expect::Bytes(b"pong".to_vec()),
            header: Header::None,
        };
        let late = answered(&probe, |_| vec![b"no".to_vec(), b"pong".to_vec()]);
        assert_eq!(late, Outcome::Passed);
        let flood = answered(&probe, |_| {
            let mut answers = vec![b"no".to_vec(); 100];
            answers.push(b"pong".to_vec());
            answers
        });
        assert_eq!(flood, Outcome::WrongAnswer);
    }

    #[test]
    fn only_the_beginning_of_an_answer_is_searched() {
        let probe = Probe::Udp {
            payload: b"ping".to_vec(),
            expect: Expect::Matching(Arc::new(Regex::new("pong").unwrap())),
            header: Header::None,
        };
        fn after(len: usize) -> Vec<Vec<u8>> {
            let mut answer = vec![b' '; len];
            answer.extend(b"pong");
            answer.resize(20_000, b' ');
            vec![answer]
        }
        assert_eq!(answered(&probe, |_| after(4092)), Outcome::Passed);
        assert_eq!(answered(&probe, |_| after(4093)), Outcome::WrongAnswer);
    }

    #[test]
    fn nobody_listening_is_a_refusal_also_where_silence_passes() {
        let probe = Probe::Udp {
            payload: Vec::new(),
            expect: Expect::Silence,
            header: Header::Local,
        };
        let free = Blocking::bind("127.0.0.1:0").unwrap();
        let address = free.local_addr().unwrap();
        assert_eq!(asked(&probe, address), Outcome::Passed);
        let mut datagram = [0; 100];
        let (len, _) = free.recv_from(&mut datagram).unwrap();
        let (header, rest) = ppv2::decode(&datagram[..len]).unwrap();
        assert_eq!(header.origin(), ppv2::Origin::Local);
        assert!(rest.is_empty());
        drop(free);
        assert_eq!(asked(&probe, address), Outcome::Refused);
    }

    #[test]
    fn an_address_that_can_t_be_written_to_speaks_against_the_server() {
        let any = Probe::Udp {
            payload: Vec::new(),
            expect: Expect::Any,
            header: Header::None,
        };
        // Broadcast is a privilege, and a link-local address takes an interface.
        for address in ["255.255.255.255:9", "[fe80::1]:9"] {
            let address = address.parse().unwrap();
            for probe in [&any, &Probe::Tcp { port: None }] {
                assert_eq!(asked(probe, address), Outcome::Unreachable, "{address}");
            }
        }
        // That this host lacks the source says nothing of the server.
        let server = Blocking::bind("127.0.0.1:0").unwrap();
        let target = Target {
            source: Some("192.0.2.1".parse().unwrap()),
            ..target(server.local_addr().unwrap())
        };
        for probe in [&any, &Probe::Tcp { port: None }] {
            assert_eq!(asked_of(probe, &target), Outcome::NotSent);
        }
    }

    #[test]
    fn only_what_this_host_lacks_says_nothing() {
        let of = |errno: Errno| Outcome::of(&errno.into());
        for errno in [
            Errno::MFILE,
            Errno::NFILE,
            Errno::NOBUFS,
            Errno::NOMEM,
            Errno::AGAIN,
            Errno::PERM,
        ] {
            assert_eq!(of(errno), Outcome::NotSent, "{errno:?}");
        }
        for errno in [
            Errno::ACCESS,
            Errno::INVAL,
            Errno::NETUNREACH,
            Errno::ADDRNOTAVAIL,
            Errno::NOPROTOOPT,
            Errno::HOSTDOWN,
            Errno::NONET,
        ] {
            assert_eq!(of(errno), Outcome::Unreachable, "{errno:?}");
        }
        // Once a datagram is out, whatever else is heard leaves it to the timeout.
        let of_sent = |errno: Errno| Outcome::of_sent(&errno.into());
        assert_eq!(of_sent(Errno::CONNREFUSED), Some(Outcome::Refused));
        for errno in [Errno::NOPROTOOPT, Errno::HOSTDOWN, Errno::NONET] {
            assert_eq!(of_sent(errno), Some(Outcome::Unreachable), "{errno:?}");
        }
        for errno in [Errno::MSGSIZE, Errno::PROTO, Errno::OPNOTSUPP, Errno::PERM] {
            assert_eq!(of_sent(errno), None, "{errno:?}");
        }
    }

    #[test]
    fn a_companion_answers_over_tcp() {
        use std::io::{Read, Write};
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let port = Some(address.port());
        let thread = thread::spawn(move || {
            let mut statuses = ["204 Fine", "503 Busy"].iter().peekable();
            while let Some(status) = statuses.peek() {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = [0; 1000];
                // Nothing comes from `tcp`, nor from another test that had the port.
                let len = stream.read(&mut request).unwrap_or(0);
                if request[..len].starts_with(b"GET /up HTTP/1.1\r\n") {
                    write!(stream, "HTTP/1.1 {status}\r\n\r\n").unwrap();
                    statuses.next();
                }
            }
        });
        // The server's own port is another one.
        let mut server = address;
        server.set_port(1);
        assert_eq!(asked(&Probe::Tcp { port }, server), Outcome::Passed);
        let http = Probe::Http {
            port,
            path: "/up".to_owned(),
        };
        assert_eq!(asked(&http, server), Outcome::Passed);
        assert_eq!(asked(&http, server), Outcome::WrongAnswer);
        thread.join().unwrap();
        assert_eq!(asked(&http, server), Outcome::Refused);
    }
}
