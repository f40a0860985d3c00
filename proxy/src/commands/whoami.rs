//! `whoami`: a server behind a proxy that tells each client its own address.

use std::io;
use std::net::SocketAddr;

use clap::{Args, ValueEnum};
use ppv2_sdk::{Trust, TrustError, UdpSocket};

use ppv2_engine::address::is_no_host;

use crate::config::Time;

/// The senders that are remembered, of which each takes about 100 bytes.
const MAX_SENDERS: usize = 100_000;

#[derive(Args)]
#[allow(missing_docs, reason = "the help texts say it")]
pub struct Options {
    /// Address to listen on
    #[arg(long, value_name = "ADDR")]
    pub listen: SocketAddr,

    /// Network of the proxies, whose datagrams must carry a header; repeatable, or with
    /// commas between
    #[arg(long, value_name = "NET", required = true, value_delimiter = ',')]
    pub trusted: Vec<String>,

    /// How the proxies write their header; repeatable
    #[arg(long, value_enum, default_value = "v2", value_delimiter = ',')]
    pub format: Vec<Format>,

    /// For proxies that write the header once: how long a sender's client is remembered after the
    /// sender's latest datagram
    #[arg(long, value_name = "DURATION")]
    pub remember: Option<Remember>,
}

/// How long a sender is remembered.
pub type Remember = Time<1_000_000, 86_400_000_000, 30_000_000>;

/// Why senders can't be remembered, if SPP is among the formats.
pub(super) const NOT_WITH_SPP: &str =
    "with `--format spp`, every datagram has a header; leave out one of the two options";

/// How a header is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// PROXY protocol v2
    V2,
    /// Simple Proxy Protocol, 38 bytes
    Spp,
}

impl From<Format> for ppv2_sdk::Format {
    fn from(format: Format) -> Self {
        match format {
            Format::V2 => Self::V2,
            Format::Spp => Self::Spp,
        }
    }
}

/// A bound socket that has answered nobody yet.
#[derive(Debug)]
pub struct Whoami(UdpSocket);

impl Whoami {
    /// Binds the address to listen on; datagrams from the trusted networks must carry a
    /// header, all others are dropped.
    ///
    /// # Errors
    ///
    /// [`WhoamiError`] naming the value at fault.
    pub fn bind(options: &Options) -> Result<Self, WhoamiError> {
        let listen = options.listen;
        if is_no_host(listen.ip()) && !listen.ip().is_unspecified() {
            return Err(WhoamiError::NoHost(listen));
        }
        let formats = options.format.iter().copied().map(ppv2_sdk::Format::from);
        let mut trust = Trust::networks(&options.trusted).formats(formats);
        if let Some(idle) = options.remember {
            if options.format.contains(&Format::Spp) {
                return Err(WhoamiError::Remember(idle));
            }
            trust = trust.remember_senders(*idle, MAX_SENDERS);
        }
        let trust = trust.build().map_err(WhoamiError::Trust)?;
        UdpSocket::bind(listen, trust)
            .map(Self)
            .map_err(|error| WhoamiError::Bind(listen, error))
    }

    /// The address that it has, with the port that the kernel chose for port 0.
    ///
    /// # Errors
    ///
    /// Those of getsockname(2), of which none is known for a bound socket.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }

    /// Answers for ever.
    ///
    /// # Errors
    ///
    /// Those of a socket that no longer works.
    pub fn serve(&self) -> io::Result<()> {
        loop {
            let datagram = self.0.recv_datagram()?;
            let answer = datagram.client.to_string();
            if let Err(error) = self.0.reply(&datagram, answer.as_bytes()) {
                tracing::debug!(client = %datagram.client, "no answer: {error}");
            }
        }
    }
}

/// Why `whoami` could not start.
#[derive(Debug, thiserror::Error)]
pub enum WhoamiError {
    /// A network that is none.
    #[error("--trusted")]
    Trust(#[source] TrustError),
    /// A format with which no sender can be remembered.
    #[error("--remember {0}: {NOT_WITH_SPP}")]
    Remember(Remember),
    /// An address that no answer can come from.
    #[error("--listen {0} is no host's address; give one of this host, 0.0.0.0 or [::]")]
    NoHost(SocketAddr),
    /// The address could not be bound.
    #[error("--listen {0} can't be bound")]
    Bind(SocketAddr, #[source] io::Error),
}
