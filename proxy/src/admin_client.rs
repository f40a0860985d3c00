//! Asks the admin API of a running proxy, for every command with `--admin`.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use socket2::{Domain, SockAddr, Socket, Type};
use thiserror::Error;

use crate::config::AdminAddress;

/// Where the examples have the admin address.
pub const USUAL: &str = "127.0.0.1:9901";

/// The most bytes of an answer's head.
const MAX_HEAD: usize = 4096;

/// What the admin API answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The status of HTTP.
    pub status: u16,
    /// As much of the body as was asked for.
    pub body: Vec<u8>,
}

/// Why there is no answer.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AdminError {
    /// There is no answer in time.
    #[error("{address} has not answered within {timeout:?}")]
    Timeout {
        /// The admin address.
        address: AdminAddress,
        /// How long it had.
        timeout: Duration,
    },
    /// There is no proxy, or the network has failed.
    #[error("{address} can't be asked: {error}; see that the proxy runs with this admin address")]
    Unreachable {
        /// The admin address.
        address: AdminAddress,
        /// What the kernel says.
        error: io::Error,
    },
    /// Another program answers.
    #[error(
        "{address} does not answer as an HTTP server; see that it is the proxy's admin address"
    )]
    NoHttp {
        /// The admin address.
        address: AdminAddress,
    },
}

/// Asks for `path`, and returns the first `most` bytes of the body: what has the address may
/// be another program. All of it takes `timeout` at most.
///
/// # Errors
///
/// [`AdminError`].
pub fn get(
    address: &AdminAddress,
    path: &str,
    timeout: Duration,
    most: usize,
) -> Result<Answer, AdminError> {
    let address = reachable(address);
    let answer = ask(&address, path, timeout, most).map_err(|error| {
        let kinds = [io::ErrorKind::TimedOut, io::ErrorKind::WouldBlock];
        if kinds.contains(&error.kind()) {
            let address = address.clone();
            AdminError::Timeout { address, timeout }
        } else {
            let address = address.clone();
            AdminError::Unreachable { address, error }
        }
    })?;
    parse(&answer, most).ok_or(AdminError::NoHttp { address })
}

/// An address that leads to a socket that is bound to `address` on this host.
#[must_use]
pub fn reachable(address: &AdminAddress) -> AdminAddress {
    let mut address = address.clone();
    if let AdminAddress::Ip(address) = &mut address {
        match address.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
            IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
            IpAddr::V4(_) | IpAddr::V6(_) => {}
        }
    }
    address
}

/// A connection, made within `timeout`.
fn connect(address: &AdminAddress, timeout: Duration) -> io::Result<Socket> {
    match address {
        AdminAddress::Ip(address) => {
            let socket = Socket::new(Domain::for_address(*address), Type::STREAM, None)?;
            socket.connect_timeout(&(*address).into(), timeout)?;
            Ok(socket)
        }
        AdminAddress::Unix(path) => {
            let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
            // It bounds the wait for a place in the queue, too: SO_SNDTIMEO in socket(7).
            socket.set_write_timeout(Some(timeout))?;
            socket.connect(&SockAddr::unix(path)?)?;
            Ok(socket)
        }
    }
}

/// The bytes of the answer, or the first ones of a long one.
fn ask(address: &AdminAddress, path: &str, timeout: Duration, most: usize) -> io::Result<Vec<u8>> {
    let deadline = Instant::now() + timeout;
    let left = || {
        let left = deadline.saturating_duration_since(Instant::now());
        match left.is_zero() {
            true => Err(io::Error::from(io::ErrorKind::TimedOut)),
            false => Ok(left),
        }
    };
    let mut stream = connect(address, timeout)?;
    stream.set_write_timeout(Some(left()?))?;
    let host = match address {
        AdminAddress::Ip(address) => address.to_string(),
        AdminAddress::Unix(_) => "localhost".to_owned(),
    };
    let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    let mut some = [0; 4096];
    while answer.len() < MAX_HEAD + most {
        stream.set_read_timeout(Some(left()?))?;
        match stream.read(&mut some)? {
            0 => break,
            length => answer.extend_from_slice(&some[..length]),
        }
    }
    Ok(answer)
}

/// The status of an answer, and its body.
fn parse(answer: &[u8], most: usize) -> Option<Answer> {
    let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(&answer[..end]);
    let status = head.strip_prefix("HTTP/1.")?.split([' ', '\r']).nth(1)?;
    let body = &answer[end + 4..];
    Some(Answer {
        status: status.parse().ok()?,
        body: body[..body.len().min(most)].to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_parsed_or_refused() {
        let answer = |status, body: &str| {
            let body = body.as_bytes().to_vec();
            Some(Answer { status, body })
        };
        let ok = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nok\n";
        assert_eq!(parse(ok, 3), answer(200, "ok\n"));
        assert_eq!(parse(ok, 1), answer(200, "o"));
        assert_eq!(parse(b"HTTP/1.0 503 x\r\n\r\n", 9), answer(503, ""));
        for other in [
            &b""[..],
            b"SSH-2.0-OpenSSH_9.2\r\n",
            b"HTTP/1.1\r\n\r\n",
            b"HTTP/1.1 abc\r\n\r\n",
            b"HTTP/1.1 99999 x\r\n\r\n",
            b"\xff\r\n\r\n",
        ] {
            assert_eq!(parse(other, 9), None, "{other:?}");
        }
    }

    #[test]
    fn wildcards_are_asked_on_loopback() {
        for (bound, asked) in [
            ("0.0.0.0:1", "127.0.0.1:1"),
            ("[::]:1", "[::1]:1"),
            ("192.0.2.1:1", "192.0.2.1:1"),
            ("unix:/a", "unix:/a"),
        ] {
            let asked: AdminAddress = asked.parse().unwrap();
            assert_eq!(reachable(&bound.parse().unwrap()), asked);
        }
    }
}
