//! A received datagram, borrowed or owned, with all that is known of it.

use std::net::SocketAddr;

use bytes::Bytes;
use ppv2::Tlvs;

use crate::ReplyPath;

/// A client's datagram, borrowed from the buffer that it was received into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DatagramRef<'d> {
    /// The client's bytes, without any header; possibly none.
    pub payload: &'d [u8],
    /// The client's address, an IPv4 one never in IPv6 form.
    pub client: SocketAddr,
    /// The address that the client sent to. `None` for a direct client, and for
    /// a proxy that speaks for itself.
    pub destination: Option<SocketAddr>,
    /// The proxy that passed the datagram on; equal to `client` if the proxy
    /// speaks for itself (a LOCAL header: a health check). `None` for a direct
    /// client.
    pub proxy: Option<SocketAddr>,
    /// The header's bytes; none for a direct client.
    pub header: &'d [u8],
    /// The header's TLVs.
    pub tlvs: Tlvs<'d>,
    /// The path of a reply to this datagram. Use it within
    /// [`FORMER_CLIENT_GRACE`](crate::FORMER_CLIENT_GRACE); later the peer's address
    /// may be another client's, and [`Demux::reply_path`](crate::Demux::reply_path) tells.
    pub reply_path: ReplyPath,
}

impl DatagramRef<'_> {
    /// Copies what fits of the payload to the front of `buffer`. The rest is lost, as
    /// with any datagram socket. Returns the length and the client's address.
    pub(crate) fn copy_to(&self, buffer: &mut [u8]) -> (usize, SocketAddr) {
        let len = self.payload.len().min(buffer.len());
        buffer[..len].copy_from_slice(&self.payload[..len]);
        (len, self.client)
    }

    /// As `copy_to`, to the end of what grows.
    #[cfg(feature = "tokio")]
    pub(crate) fn append_to(&self, buffer: &mut impl bytes::BufMut) -> (usize, SocketAddr) {
        let len = self.payload.len().min(buffer.remaining_mut());
        buffer.put_slice(&self.payload[..len]);
        (len, self.client)
    }
}

/// A client's datagram that owns its bytes. [`UdpSocket::reply`] answers it.
///
/// [`UdpSocket::reply`]: crate::UdpSocket::reply
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Datagram {
    /// The client's bytes, without any header; possibly none.
    pub payload: Bytes,
    /// The client's address, an IPv4 one never in IPv6 form.
    pub client: SocketAddr,
    /// As [`DatagramRef::destination`].
    pub destination: Option<SocketAddr>,
    /// As [`DatagramRef::proxy`].
    pub proxy: Option<SocketAddr>,
    /// As [`DatagramRef::reply_path`].
    pub reply_path: ReplyPath,
    tlvs: Bytes,
}

impl Datagram {
    /// The header's TLVs; none for a direct client.
    ///
    /// # Example
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
        parse(&self.tlvs)
    }
}

impl From<DatagramRef<'_>> for Datagram {
    fn from(datagram: DatagramRef<'_>) -> Self {
        Self {
            payload: Bytes::copy_from_slice(datagram.payload),
            client: datagram.client,
            destination: datagram.destination,
            proxy: datagram.proxy,
            reply_path: datagram.reply_path,
            tlvs: Bytes::copy_from_slice(datagram.tlvs.as_bytes()),
        }
    }
}

/// Of a datagram, all but its bytes.
#[derive(Clone, Copy)]
pub(crate) struct Parts {
    pub(crate) header_len: usize,
    /// The TLVs are the end of the header.
    pub(crate) tlvs_len: usize,
    pub(crate) destination: Option<SocketAddr>,
    pub(crate) proxy: Option<SocketAddr>,
    pub(crate) reply_path: ReplyPath,
}

impl Parts {
    /// The datagram that these are the parts of.
    #[inline]
    pub(crate) fn of<'d>(&self, bytes: &'d [u8]) -> DatagramRef<'d> {
        let (header, payload) = bytes.split_at(self.header_len);
        DatagramRef {
            payload,
            client: self.reply_path.client,
            destination: self.destination,
            proxy: self.proxy,
            header,
            tlvs: parse(&header[self.header_len - self.tlvs_len..]),
            reply_path: self.reply_path,
        }
    }
}

/// The TLVs of a header that was decoded, so they decode again.
#[inline]
fn parse(tlvs: &[u8]) -> Tlvs<'_> {
    if tlvs.is_empty() {
        return Tlvs::default();
    }
    Tlvs::parse(tlvs).unwrap_or_default()
}
