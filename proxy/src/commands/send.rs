//! `send`: a client that writes the header itself, to try a server without a proxy.

mod dns;
mod header;

use std::io::{self, ErrorKind, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::str::FromStr;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use thiserror::Error;

pub use self::dns::{NotAQuestion, Question};
use self::header::Header;
pub use self::header::{NotATlv, Tlv};
use super::decode::{Undecodable, bytes_of_hex};
use crate::config::{Number, Time, printable};

/// The longest payload of a UDP datagram over IPv4, and over IPv6.
const MAX_PAYLOAD: [usize; 2] = [65_535 - 20 - 8, 65_535 - 8];

/// Bytes of a reply in a line of hexadecimal digits.
const BYTES_A_LINE: usize = 32;

/// What to send, and where.
#[derive(Args, Debug)]
#[allow(missing_docs, reason = "the help texts say it")]
pub struct Options {
    /// The server, as IP:PORT or HOST:PORT
    #[arg(value_name = "SERVER")]
    pub server: String,

    /// Payload, as text
    #[arg(value_name = "PAYLOAD", default_value = "hello", conflicts_with_all = ["hex", "dns"])]
    pub payload: String,

    /// Payload, as hexadecimal digits
    #[arg(long, value_name = "HEX", conflicts_with = "dns")]
    pub hex: Option<Hex>,

    /// Payload: a DNS question for the name, of type A unless one is given, as in
    /// example.org/TXT
    #[arg(long, value_name = "NAME")]
    pub dns: Option<Question>,

    /// How the client's address is written in front of the payload
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,

    /// Which datagrams have the header
    #[arg(long, value_enum, default_value_t)]
    pub emit: Emit,

    /// The client in the header, as IP:PORT or IP [default: the address that is sent from]
    #[arg(long, value_name = "ADDR")]
    pub client: Option<Address>,

    /// The destination in the header, as IP:PORT or IP [default: the server's address]
    #[arg(long, value_name = "ADDR")]
    pub destination: Option<Address>,

    /// TLV of the header: the type as 0xE1 or as a name such as authority, alpn or unique_id; the
    /// value as text, or as hex:0a0b; repeatable
    #[arg(long = "tlv", value_name = "TYPE=VALUE")]
    pub tlvs: Vec<Tlv>,

    /// Send a header of the command LOCAL, which names no client
    #[arg(long, conflicts_with_all = ["client", "destination"])]
    pub local: bool,

    /// Add the header's checksum, as the last TLV
    #[arg(long)]
    pub crc32c: bool,

    /// Address to send from, as IP:PORT or IP [default: the kernel's choice]
    #[arg(long, value_name = "ADDR")]
    pub source: Option<Address>,

    /// How many datagrams to send, each after the reply to the one before
    #[arg(long, value_name = "N", default_value_t)]
    pub count: Number<u32, 1, 1_000_000, 1>,

    /// How long a reply may take
    #[arg(long, value_name = "DURATION", default_value_t)]
    pub timeout: Time<1_000, 3_600_000_000, 2_000_000>,
}

/// How the client's address is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// PROXY protocol v2
    #[default]
    V2,
    /// Simple Proxy Protocol, 38 bytes
    Spp,
    /// Text of PROXY protocol v1, which receivers of UDP must drop
    V1,
    /// Not at all
    None,
}

/// Which datagrams have the header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Emit {
    /// All
    #[default]
    Every,
    /// The first, as nginx and frp do
    First,
    /// A datagram of its own in front of all others, as Cloudflare Spectrum does
    Alone,
}

/// Bytes, as hexadecimal digits.
#[derive(Clone, Debug)]
pub struct Hex(pub Vec<u8>);

impl FromStr for Hex {
    type Err = Undecodable;

    fn from_str(text: &str) -> Result<Self, Undecodable> {
        bytes_of_hex(text).map(Self)
    }
}

/// An address with or without a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    ip: IpAddr,
    port: Option<u16>,
}

impl Address {
    /// The address with its port, or with `port`.
    fn or_port(self, port: u16) -> SocketAddr {
        SocketAddr::new(self.ip, self.port.unwrap_or(port))
    }
}

impl FromStr for Address {
    type Err = NotAnAddress;

    fn from_str(text: &str) -> Result<Self, NotAnAddress> {
        let with_port = text.parse::<SocketAddr>();
        let alone = || text.parse().map(|ip| Self { ip, port: None });
        with_port
            .map(|address| Self {
                ip: address.ip(),
                port: Some(address.port()),
            })
            .or_else(|_| alone())
            .map_err(|_| NotAnAddress)
    }
}

/// A text is no address.
#[derive(Debug, Error)]
#[error("give IP:PORT or IP, as in 203.0.113.11:54321 or [2001:db8::11]:54321")]
pub struct NotAnAddress;

/// Why nothing was sent, or why it was not answered.
#[derive(Debug, Error)]
pub enum SendError {
    /// The server's name or address leads nowhere.
    #[error("server `{0}`; give IP:PORT or HOST:PORT, as in 192.0.2.10:53")]
    Server(String, #[source] io::Error),
    /// An option that the format has no room for.
    #[error("{0} is for --format v2 alone; leave it out, or choose that format")]
    NotForFormat(&'static str),
    /// The header can't be written.
    #[error("--tlv")]
    Header(#[from] ppv2::EncodeError),
    /// More than a datagram holds.
    #[error(
        "the header of {header} bytes and the payload of {payload} are more than the {max} bytes \
         that a datagram to {server} can have; send a shorter payload"
    )]
    TooLong {
        /// Bytes of the header.
        header: usize,
        /// Bytes of the payload.
        payload: usize,
        /// The most of both.
        max: usize,
        /// Where they should go.
        server: SocketAddr,
    },
    /// No socket can send to the server.
    #[error("can't send from {from} to {server}; choose another --source, or leave it out")]
    Socket {
        /// The address to send from.
        from: SocketAddr,
        /// The server.
        server: SocketAddr,
        /// What the kernel says.
        #[source]
        error: io::Error,
    },
    /// No reply, or not to all datagrams.
    #[error("{missing} of {count} datagrams had no reply; {hint}")]
    NoReply {
        /// Datagrams without a reply.
        missing: u32,
        /// All datagrams.
        count: u32,
        /// What to look at.
        hint: String,
    },
    /// The result could not be written.
    #[error("writing the result")]
    Output(#[from] io::Error),
}

impl SendError {
    /// Whether the arguments are wrong, rather than the host or the server.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Server(..) | Self::NotForFormat(_) | Self::Header(_) | Self::TooLong { .. } => {
                true
            }
            Self::Socket { .. } | Self::NoReply { .. } | Self::Output(_) => false,
        }
    }
}

/// Sends the datagrams, and writes what was sent and what came back to `out`.
///
/// # Errors
///
/// [`SendError`]; [`SendError::NoReply`] if a datagram had no reply.
pub fn run(options: &Options, out: &mut impl Write) -> Result<(), SendError> {
    let peer = Peer::connect(options)?;
    let header = Header::new(options, peer.local, peer.server)?;
    let mut missing = 0;
    let mut is_refused = false;
    if options.emit == Emit::Alone {
        let sent = peer.datagram(Some(&header), &[])?;
        // What fails here fails for the next datagram too.
        let _ = peer.socket.send(&sent.bytes);
        writeln!(out, "{}", sent.text)?;
    }
    for number in 0..*options.count {
        let with_header = match options.emit {
            Emit::Every => true,
            Emit::First => number == 0,
            Emit::Alone => false,
        };
        let payload = options.payload();
        let sent = peer.datagram(with_header.then_some(&header), &payload)?;
        writeln!(out, "{}", sent.text)?;
        let begin = Instant::now();
        let is_reply = |reply: &[u8]| {
            options.dns.is_none() || dns::is_answer(header.split_reply(reply).1, &payload)
        };
        match peer.exchange(&sent.bytes, is_reply, *options.timeout) {
            Ok(Some(reply)) => {
                let took = begin.elapsed();
                let (in_front, payload) = header.split_reply(&reply);
                let text = match &options.dns {
                    Some(_) => dns::described(payload),
                    None => described(payload),
                };
                writeln!(
                    out,
                    "received {} bytes after {took:.1?}{in_front}\n{text}",
                    payload.len()
                )?;
            }
            Ok(None) => {
                missing += 1;
                writeln!(out, "no reply within {}", options.timeout)?;
            }
            Err(error) => {
                missing += 1;
                is_refused |= error.kind() == ErrorKind::ConnectionRefused;
                writeln!(out, "no reply: {error}")?;
            }
        }
    }
    if missing == 0 {
        return Ok(());
    }
    let hint = match is_refused {
        true => format!("nothing listens at {}", peer.server),
        false => header.hint(options.format, peer.local.ip()),
    };
    Err(SendError::NoReply {
        missing,
        count: *options.count,
        hint,
    })
}

impl Options {
    /// The payload of the next datagram; each DNS question has an id of its own.
    fn payload(&self) -> Vec<u8> {
        match (&self.hex, &self.dns) {
            (Some(hex), _) => hex.0.clone(),
            (None, Some(question)) => question.bytes(),
            (None, None) => self.payload.clone().into_bytes(),
        }
    }
}

/// A datagram, and what it is.
struct Datagram {
    bytes: Vec<u8>,
    text: String,
}

/// The server and a socket that is connected to it.
struct Peer {
    server: SocketAddr,
    local: SocketAddr,
    socket: UdpSocket,
}

impl Peer {
    fn connect(options: &Options) -> Result<Self, SendError> {
        let source = options.source.map(|source| source.or_port(0));
        let is_of_family = |server: &SocketAddr| {
            source.is_none_or(|source: SocketAddr| source.is_ipv4() == server.is_ipv4())
        };
        let unknown = |error| SendError::Server(options.server.clone(), error);
        let found: Vec<_> = options.server.to_socket_addrs().map_err(unknown)?.collect();
        let server = found.iter().find(|server| is_of_family(server));
        let server = *server
            .or(found.first())
            .ok_or_else(|| unknown(io::Error::other("the name has no address")))?;
        let from = source.unwrap_or_else(|| match server {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        });
        let connect = || {
            let socket = UdpSocket::bind(from)?;
            socket.connect(server)?;
            Ok((socket.local_addr()?, socket))
        };
        let (local, socket) = connect().map_err(|error| SendError::Socket {
            from,
            server,
            error,
        })?;
        Ok(Self {
            server,
            local,
            socket,
        })
    }

    fn datagram(&self, header: Option<&Header>, payload: &[u8]) -> Result<Datagram, SendError> {
        let (bytes, text) = match header {
            Some(header) => (header.bytes(), header.to_string()),
            None => (&[][..], "no header".to_owned()),
        };
        let max = MAX_PAYLOAD[usize::from(self.server.is_ipv6())];
        if bytes.len() + payload.len() > max {
            return Err(SendError::TooLong {
                header: bytes.len(),
                payload: payload.len(),
                max,
                server: self.server,
            });
        }
        Ok(Datagram {
            bytes: [bytes, payload].concat(),
            text: format!(
                "sent {} bytes from {} to {}: {text}; payload of {} bytes",
                bytes.len() + payload.len(),
                self.local,
                self.server,
                payload.len()
            ),
        })
    }

    /// Sends `datagram` and waits for what `is_reply` takes. `None` if nothing came in time.
    fn exchange(
        &self,
        datagram: &[u8],
        is_reply: impl Fn(&[u8]) -> bool,
        timeout: Duration,
    ) -> io::Result<Option<Vec<u8>>> {
        // The first call returns what ICMP reported of the datagram before.
        self.socket
            .send(datagram)
            .or_else(|_| self.socket.send(datagram))?;
        let begin = Instant::now();
        let mut buffer = vec![0; 1 << 16];
        loop {
            let left = timeout.saturating_sub(begin.elapsed());
            if left.is_zero() {
                return Ok(None);
            }
            self.socket.set_read_timeout(Some(left))?;
            match self.socket.recv(&mut buffer) {
                Ok(len) if is_reply(&buffer[..len]) => {
                    buffer.truncate(len);
                    return Ok(Some(buffer));
                }
                Ok(_) => {}
                Err(error) if is_of_time(error.kind()) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Whether a receive ended without a datagram and without a fault.
fn is_of_time(error: ErrorKind) -> bool {
    use ErrorKind::{Interrupted, TimedOut, WouldBlock};
    matches!(error, Interrupted | TimedOut | WouldBlock)
}

/// `payload` as text if it is text, or in hexadecimal digits that `decode` takes.
fn described(payload: &[u8]) -> String {
    let text = str::from_utf8(payload).ok();
    let is_text = |text: &&str| text.lines().all(|line| printable(line) == line);
    if let Some(text) = text.filter(is_text) {
        return text.trim_end_matches('\n').to_owned();
    }
    let lines = payload.chunks(BYTES_A_LINE).map(|line| {
        let digits = line.iter().map(|byte| format!("{byte:02x}"));
        digits.collect::<String>()
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_a_port_or_get_one() {
        for (text, expected) in [
            ("203.0.113.11:54321", "203.0.113.11:54321"),
            ("203.0.113.11", "203.0.113.11:7"),
            ("[2001:db8::11]:54321", "[2001:db8::11]:54321"),
            ("2001:db8::11", "[2001:db8::11]:7"),
        ] {
            let address: Address = text.parse().unwrap();
            assert_eq!(address.or_port(7).to_string(), expected);
        }
        for text in [
            "",
            "example.org",
            "203.0.113.11:",
            "203.0.113.11:65536",
            "[::1]",
        ] {
            assert!(text.parse::<Address>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn text_is_shown_as_text_and_other_bytes_in_hex() {
        assert_eq!(
            described("grüß dich\nzweite Zeile\n".as_bytes()),
            "grüß dich\nzweite Zeile"
        );
        assert_eq!(described(b""), "");
        assert_eq!(described(b"\x1b[2J"), "1b5b324a");
        assert_eq!(described(&[0xff; 33]), format!("{}\nff", "ff".repeat(32)));
    }
}
