//! `whoami`: a server behind a proxy that tells each client its own address.

use std::io;
use std::net::SocketAddr;

use ppv2_sdk::{Trust, TrustError, UdpSocket};

use ppv2_engine::address::is_no_host;

/// A bound socket that has answered nobody yet.
#[derive(Debug)]
pub struct Whoami(UdpSocket);

impl Whoami {
    /// Binds `listen`; datagrams from the networks in `trusted` must carry a
    /// header, all others are dropped.
    ///
    /// # Errors
    ///
    /// [`WhoamiError`] naming the value at fault.
    pub fn bind(listen: SocketAddr, trusted: &[String]) -> Result<Self, WhoamiError> {
        if is_no_host(listen.ip()) && !listen.ip().is_unspecified() {
            return Err(WhoamiError::NoHost(listen));
        }
        let trust = Trust::networks(trusted).build()?;
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
    Trust(#[from] TrustError),
    /// An address that no answer can come from.
    #[error("--listen {0} is no host's address; give one of this host, 0.0.0.0 or [::]")]
    NoHost(SocketAddr),
    /// The address could not be bound.
    #[error("--listen {0} can't be bound")]
    Bind(SocketAddr, #[source] io::Error),
}
