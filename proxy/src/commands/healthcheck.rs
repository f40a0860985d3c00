//! `healthcheck`: asks the admin address of a running proxy, as container engines and
//! scripts do, which have no `curl` in a minimal image.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use thiserror::Error;

use crate::config::{Config, ConfigError, Time, printable};

/// Where the examples have the admin address.
const USUAL: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9901);

/// The most bytes of an answer that are read. What has the port may be another program.
const MAX_ANSWER: usize = 4096;

/// What to ask, and where.
#[derive(Args, Debug)]
#[allow(missing_docs, reason = "the help texts say it")]
pub struct Options {
    /// The proxy's admin address
    #[arg(long, value_name = "ADDR", default_value_t = USUAL, conflicts_with = "config")]
    pub admin: SocketAddr,

    /// The proxy's TOML file: its `admin.listen` is asked
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Ask whether every address takes datagrams and the proxy is not stopping (/readyz), instead of
    /// whether every worker responds (/healthz)
    #[arg(long)]
    pub ready: bool,

    /// How long the whole check may take
    #[arg(long, value_name = "DURATION", default_value_t)]
    pub timeout: Time<1_000, 3_600_000_000, 3_000_000>,
}

/// Why a proxy does not count as well.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum HealthcheckError {
    /// The file can't be read.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The file has no admin address.
    #[error(
        "{} has no admin address to ask; add `[admin]` with `listen = \"127.0.0.1:9901\"`", path.display()
    )]
    NoAdmin {
        /// The file.
        path: PathBuf,
    },
    /// The proxy answers, and says that something is wrong.
    #[error("{address} answers {status} to {path}: {why}")]
    Unwell {
        /// The admin address.
        address: SocketAddr,
        /// What was asked.
        path: &'static str,
        /// The status of HTTP.
        status: u16,
        /// What the proxy says.
        why: String,
    },
    /// There is no answer in time.
    #[error("{address} has not answered within {timeout:?}")]
    Timeout {
        /// The admin address.
        address: SocketAddr,
        /// How long it had.
        timeout: Duration,
    },
    /// There is no proxy, or the network has failed.
    #[error("{address} can't be asked: {error}; see that the proxy runs with this admin address")]
    Unreachable {
        /// The admin address.
        address: SocketAddr,
        /// What the kernel says.
        error: io::Error,
    },
    /// Another program answers.
    #[error(
        "{address} does not answer as an HTTP server; see that it is the proxy's admin address"
    )]
    NoHttp {
        /// The admin address.
        address: SocketAddr,
    },
}

impl HealthcheckError {
    /// Whether the command was used wrongly, rather than that the proxy is not well.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::Config(_) | Self::NoAdmin { .. })
    }
}

/// Asks, and returns what the proxy says if it is well.
///
/// # Errors
///
/// [`HealthcheckError`].
pub fn run(options: &Options) -> Result<String, HealthcheckError> {
    let address = match &options.config {
        None => options.admin,
        Some(path) => Config::admin_of_file(path)?
            .ok_or_else(|| HealthcheckError::NoAdmin { path: path.clone() })?,
    };
    let address = reachable(address);
    let path = if options.ready { "/readyz" } else { "/healthz" };
    let timeout = *options.timeout;
    let answer = ask(address, path, timeout).map_err(|error| {
        let kinds = [io::ErrorKind::TimedOut, io::ErrorKind::WouldBlock];
        if kinds.contains(&error.kind()) {
            HealthcheckError::Timeout { address, timeout }
        } else {
            HealthcheckError::Unreachable { address, error }
        }
    })?;
    let (status, why) = parse(&answer).ok_or(HealthcheckError::NoHttp { address })?;
    let why = printable(&why).into_owned();
    if status == 200 {
        return Ok(format!("{why}\n"));
    }
    Err(HealthcheckError::Unwell {
        address,
        path,
        status,
        why,
    })
}

/// An address that leads to a socket that is bound to `address` on this host.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
        IpAddr::V4(_) | IpAddr::V6(_) => {}
    }
    address
}

/// The answer to a request, or the first bytes of a long one.
fn ask(address: SocketAddr, path: &str, timeout: Duration) -> io::Result<Vec<u8>> {
    let deadline = Instant::now() + timeout;
    let left = || {
        let left = deadline.saturating_duration_since(Instant::now());
        match left.is_zero() {
            true => Err(io::Error::from(io::ErrorKind::TimedOut)),
            false => Ok(left),
        }
    };
    let mut stream = TcpStream::connect_timeout(&address, timeout)?;
    stream.set_write_timeout(Some(left()?))?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    let mut some = [0; MAX_ANSWER];
    while answer.len() < MAX_ANSWER {
        stream.set_read_timeout(Some(left()?))?;
        match stream.read(&mut some)? {
            0 => break,
            length => answer.extend_from_slice(&some[..length]),
        }
    }
    Ok(answer)
}

/// The status of an answer, and the first line of its body.
fn parse(answer: &[u8]) -> Option<(u16, String)> {
    let answer = String::from_utf8_lossy(answer);
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.strip_prefix("HTTP/1.")?.split(' ').nth(1)?;
    let body = body.lines().next().unwrap_or_default();
    Some((status.parse().ok()?, body.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_parsed_or_refused() {
        let ok = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nok\n";
        assert_eq!(parse(ok), Some((200, "ok".to_owned())));
        let empty = b"HTTP/1.0 503 x\r\n\r\n";
        assert_eq!(parse(empty), Some((503, String::new())));
        for other in [
            &b""[..],
            b"SSH-2.0-OpenSSH_9.2\r\n",
            b"HTTP/1.1\r\n\r\n",
            b"HTTP/1.1 abc\r\n\r\n",
            b"HTTP/1.1 99999 x\r\n\r\n",
            b"\xff\r\n\r\n",
        ] {
            assert_eq!(parse(other), None, "{other:?}");
        }
    }

    #[test]
    fn wildcards_are_asked_on_loopback() {
        for (bound, asked) in [
            ("0.0.0.0:1", "127.0.0.1:1"),
            ("[::]:1", "[::1]:1"),
            ("192.0.2.1:1", "192.0.2.1:1"),
        ] {
            let asked: SocketAddr = asked.parse().unwrap();
            assert_eq!(reachable(bound.parse().unwrap()), asked);
        }
    }
}
