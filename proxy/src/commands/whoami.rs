//! `whoami`: a server behind a proxy that tells each client its own address.

use std::io;

use ppv2_sdk::{Trust, TrustError, UdpSocket};

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
    pub fn bind(listen: std::net::SocketAddr, trusted: &[String]) -> Result<Self, WhoamiError> {
        let trust = Trust::networks(trusted.iter().map(String::as_str))?;
        UdpSocket::bind(listen, trust)
            .map(Self)
            .map_err(|error| WhoamiError::Bind(listen, error))
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
    /// The address could not be bound.
    #[error("--listen {0} can't be bound")]
    Bind(std::net::SocketAddr, #[source] io::Error),
}
