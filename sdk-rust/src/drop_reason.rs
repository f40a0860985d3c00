//! The names under which datagrams are dropped and counted.

use std::fmt;

/// Why a datagram was dropped instead of delivered.
///
/// ```
/// use ppv2_sdk::DropReason;
///
/// assert_eq!(DropReason::Untrusted.as_str(), "untrusted");
/// assert!(DropReason::ALL.contains(&DropReason::Untrusted));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DropReason {
    /// It came from outside the trusted networks, and
    /// [`Untrusted::Drop`](crate::Untrusted::Drop) is set.
    Untrusted,
    /// It came from outside the trusted networks under the address of a client
    /// that is known through a proxy. See
    /// [`Untrusted::Accept`](crate::Untrusted::Accept).
    DirectConflict,
    /// It came from a trusted peer and does not begin with a header of the
    /// [`formats`](crate::TrustBuilder::formats) that it may have. The proxy probably has
    /// its header switched off, or sends it once per session
    /// ([`remember_senders`](crate::TrustBuilder::remember_senders)).
    NoHeader,
    /// It came from a trusted peer and begins with a header of PROXY protocol version 1,
    /// which is text and has no place in a datagram ([`ppv2::is_v1`]). nginx up to 1.31.3
    /// sends it with `proxy_protocol on`.
    V1Header,
    /// Its header is malformed: [`ppv2::DecodeError`] says how, in the log at
    /// level TRACE.
    BadHeader,
    /// Its header is longer than [`max_header_len`](crate::TrustBuilder::max_header_len).
    HeaderTooLong,
    /// Its header is a PROXY header that names no client (UNSPEC).
    Unspecified,
    /// Its header names a client of a TCP connection.
    Tcp,
    /// Its header names a UNIX socket.
    Unix,
    /// No client can have its client's address: port 0, or an unspecified, multicast or
    /// broadcast IP address.
    ClientAddress,
    /// It is a header without payload, by which its sender says for which client it speaks
    /// from now on. Nothing is lost: see
    /// [`remember_senders`](crate::TrustBuilder::remember_senders).
    HeaderAlone,
}

impl DropReason {
    /// Every reason, in a stable order.
    pub const ALL: &'static [Self] = &[
        Self::Untrusted,
        Self::DirectConflict,
        Self::NoHeader,
        Self::V1Header,
        Self::BadHeader,
        Self::HeaderTooLong,
        Self::Unspecified,
        Self::Tcp,
        Self::Unix,
        Self::ClientAddress,
        Self::HeaderAlone,
    ];

    /// The reason's name, fit for a metric's label: lower case and underscores.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Untrusted => "untrusted",
            Self::DirectConflict => "direct_conflict",
            Self::NoHeader => "no_header",
            Self::V1Header => "v1_header",
            Self::BadHeader => "bad_header",
            Self::HeaderTooLong => "header_too_long",
            Self::Unspecified => "unspecified",
            Self::Tcp => "tcp",
            Self::Unix => "unix",
            Self::ClientAddress => "client_address",
            Self::HeaderAlone => "header_alone",
        }
    }

    /// Position in [`ALL`](Self::ALL).
    pub(crate) const fn index(self) -> usize {
        self as usize
    }
}

impl std::error::Error for DropReason {}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_reason_has_its_own_index_and_name() {
        for (position, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(reason.index(), position, "{reason}");
        }
        let names: HashSet<_> = DropReason::ALL.iter().map(|r| r.as_str()).collect();
        assert_eq!(names.len(), DropReason::ALL.len());
    }
}
