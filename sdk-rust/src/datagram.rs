//! A received datagram that owns its bytes.

use std::net::SocketAddr;

use bytes::Bytes;
use ppv2::Tlvs;

use crate::clock::Tick;
use crate::{Admitted, ReplyTo, Way};

/// A client's datagram with all that is known of it.
///
/// It remembers the way by which it came, for
/// [`UdpSocket::reply`](crate::UdpSocket::reply).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Datagram {
    /// The client's bytes, without any header; possibly none.
    pub payload: Bytes,
    /// The client's address, an IPv4 one never in IPv6 form.
    pub client: SocketAddr,
    /// The address that the client sent to, as the proxy saw it. `None` for a
    /// direct client, and for a proxy that speaks for itself.
    pub destination: Option<SocketAddr>,
    /// The proxy that passed the datagram on; equal to `client` if the proxy
    /// speaks for itself (a LOCAL header: a health check). `None` for a direct
    /// client.
    pub proxy: Option<SocketAddr>,
    tlvs: Bytes,
    way: Way,
    heard: Tick,
}

impl Datagram {
    pub(crate) fn new(admitted: &Admitted<'_>) -> Self {
        Self {
            payload: Bytes::copy_from_slice(admitted.payload),
            client: admitted.client,
            destination: admitted.destination,
            proxy: admitted.proxy,
            tlvs: Bytes::copy_from_slice(admitted.tlvs.as_bytes()),
            way: admitted.way,
            heard: admitted.heard,
        }
    }

    /// What else the header says of the client; nothing for a direct client.
    ///
    /// ```no_run
    /// # fn serve(datagram: ppv2_sdk::Datagram) {
    /// if let Some(Ok(host)) = datagram.tlvs().authority() {
    ///     println!("{} asked for {host}", datagram.client);
    /// }
    /// # }
    /// ```
    #[must_use]
    pub fn tlvs(&self) -> Tlvs<'_> {
        // The bytes come from TLVs that were read, so they read again.
        Tlvs::parse(&self.tlvs).unwrap_or_default()
    }

    pub(crate) fn reply_to(&self) -> ReplyTo {
        ReplyTo {
            client: self.client,
            way: self.way,
            heard: self.heard,
        }
    }
}
