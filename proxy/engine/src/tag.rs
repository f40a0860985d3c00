//! Tags: what the header of a client's datagram carries so that the server's reply can
//! carry it back. A tag proves for which client a reply is, and from which of the proxy's
//! addresses it leaves; only a holder of the key can make one. So the proxy needs no memory
//! of clients, and neither a server nor an attacker with a forged source can have it write
//! to an address of their choice. A tag says nothing of the server or the request: until its
//! epoch is over, it is valid from every server of the key, as often as it comes.
//!
//! # What is hashed
//!
//! The tag is SipHash-2-4 with a key of 128 bits, over 45 bytes in network byte order:
//!
//! | bytes | |
//! |---|---|
//! | 1 | version of the tag: 1 |
//! | 8 | epoch: hours since 1970 |
//! | 18 | the client's address, IPv4 ones mapped into IPv6, and port |
//! | 18 | the listener's address and port, as the client's |
//!
//! A header writes an IPv4 address in the same way whether its socket is an IPv4 or an IPv6
//! one, so both are the same here. The scope of a link-local address is no part of a
//! header, and none of this: a reply to such a client can't be sent by the tag alone.
//!
//! # Epochs
//!
//! The tag's flags have the parity of its epoch. Of the epochs with this parity the nearest
//! is taken: at each time two epochs are valid, the current one and the one that ended
//! less than half an hour ago or begins in less than half an hour. A tag is valid for
//! 30 to 90 minutes after it was made, and clocks of replicas may differ by up to 30
//! minutes.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use ppv2::ReplyTag;
use siphasher::sip::SipHasher24;

/// The length of an epoch.
pub const EPOCH: Duration = Duration::from_secs(3600);

/// The key that tags are made and checked with.
#[derive(Clone, PartialEq, Eq)]
pub struct TagKeys {
    key: [u8; 16],
}

/// Leaves out the key, whose holder can make a valid tag for any client.
impl fmt::Debug for TagKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TagKeys").finish_non_exhaustive()
    }
}

/// Why a tag is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TagError {
    /// It was not made with this key for this client and listener, or long ago.
    #[error("the tag was not made with this key for this client and listener")]
    Wrong,
    /// It was made with this key for this client and listener, but in an epoch that is
    /// no longer valid, or not yet: it is repeated, or the clocks of replicas differ by more
    /// than half an hour. Only the nearest such epochs of the tag's parity are tried; a tag
    /// of any other epoch is [`Wrong`](Self::Wrong).
    #[error("the tag's epoch is over or has not begun")]
    OtherEpoch,
}

impl TagKeys {
    /// Tags with this key. Replicas with the same key accept each other's.
    #[must_use]
    pub fn new(key: [u8; 16]) -> Self {
        Self { key }
    }

    /// The key, for another process of this proxy alone.
    pub(crate) fn key(&self) -> [u8; 16] {
        self.key
    }

    /// Tags with a key that nobody else knows.
    ///
    /// # Errors
    ///
    /// Those of the kernel's random numbers.
    pub fn random() -> std::io::Result<Self> {
        let mut key = [0; 16];
        getrandom::fill(&mut key)?;
        Ok(Self { key })
    }

    /// The tag of a client's datagram to a listener, made at so many seconds after 1970.
    #[must_use]
    pub fn tag(&self, client: SocketAddr, listener: SocketAddr, now: u64) -> ReplyTag {
        let epoch = now / EPOCH.as_secs();
        let hash = self.hash(client, listener, epoch);
        ReplyTag::new(flags(epoch), hash.to_be_bytes())
    }

    /// Checks the tag of a reply to this client from this listener's address, which came
    /// at so many seconds after 1970.
    ///
    /// # Errors
    ///
    /// [`TagError`] if the reply must not be sent to the client.
    pub fn verify(
        &self,
        tag: ReplyTag,
        client: SocketAddr,
        listener: SocketAddr,
        now: u64,
    ) -> Result<(), TagError> {
        let hash = u64::from_be_bytes(tag.tag());
        // Numbers of 64 bits are compared in one step, whose time shows nothing of the
        // right tag.
        let is_of = |epoch| self.hash(client, listener, epoch) == hash;
        let valid = nearest_epoch(tag.is_odd_epoch(), now);
        if tag.flags() != flags(valid) {
            // Flags that no tag of this version has.
            Err(TagError::Wrong)
        } else if is_of(valid) {
            Ok(())
        } else if is_of(valid.wrapping_sub(2)) || is_of(valid.wrapping_add(2)) {
            Err(TagError::OtherEpoch)
        } else {
            Err(TagError::Wrong)
        }
    }

    fn hash(&self, client: SocketAddr, listener: SocketAddr, epoch: u64) -> u64 {
        let mut bytes = [0; 45];
        bytes[0] = ReplyTag::VERSION;
        bytes[1..9].copy_from_slice(&epoch.to_be_bytes());
        bytes[9..27].copy_from_slice(&address_bytes(client));
        bytes[27..].copy_from_slice(&address_bytes(listener));
        SipHasher24::new_with_key(&self.key).hash(&bytes)
    }
}

fn is_odd(epoch: u64) -> bool {
    !epoch.is_multiple_of(2)
}

fn flags(epoch: u64) -> u8 {
    if is_odd(epoch) {
        ReplyTag::ODD_EPOCH
    } else {
        0
    }
}

/// Of the epochs with this parity the one that is nearest to `now`.
fn nearest_epoch(odd: bool, now: u64) -> u64 {
    let (epoch, into) = (now / EPOCH.as_secs(), now % EPOCH.as_secs());
    if is_odd(epoch) == odd {
        epoch
    } else if into < EPOCH.as_secs() / 2 {
        // Before the first epoch there is none, and no tag.
        epoch.wrapping_sub(1)
    } else {
        epoch + 1
    }
}

fn address_bytes(of: SocketAddr) -> [u8; 18] {
    let ip = match of {
        SocketAddr::V4(v4) => v4.ip().to_ipv6_mapped(),
        SocketAddr::V6(v6) => *v6.ip(),
    };
    let mut bytes = [0; 18];
    bytes[..16].copy_from_slice(&ip.octets());
    bytes[16..].copy_from_slice(&of.port().to_be_bytes());
    bytes
}

#[cfg(test)]
mod tests;
