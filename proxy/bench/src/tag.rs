//! What every datagram of the bench carries, so that each reply can be checked
//! for owner and content: the client's own address, the load that it belongs to,
//! a sequence number, the time of sending, and a filling that any change would
//! show in.

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::{Result, ensure};

/// Bytes of a tag.
pub(crate) const LEN: usize = 28;

const MAGIC: u16 = 0x7b32;

/// The shape of a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// The tag, then filling.
    Plain,
    /// A DNS question whose name is one label with the tag, for proxies that
    /// take nothing else.
    Dns,
}

const DNS_BEFORE: usize = 13;
/// End of the name, type and class.
const DNS_AFTER: usize = 5;
const MAX_LABEL: usize = 63;

impl Shape {
    /// Where the tag begins.
    pub(crate) fn offset(self) -> usize {
        match self {
            Self::Plain => 0,
            Self::Dns => DNS_BEFORE,
        }
    }

    /// A payload without a tag.
    pub(crate) fn template(self, size: usize) -> Result<Vec<u8>> {
        let mut bytes: Vec<u8> = (b'a'..=b'z').cycle().take(size).collect();
        match self {
            Self::Plain => ensure!(size >= LEN, "a payload has at least {LEN} bytes"),
            Self::Dns => {
                let label = size
                    .checked_sub(DNS_BEFORE + DNS_AFTER)
                    .filter(|label| (LEN..=MAX_LABEL).contains(label));
                let label = label.and_then(|label| u8::try_from(label).ok());
                let Some(label) = label else {
                    anyhow::bail!("a DNS question of {size} bytes doesn't fit one label");
                };
                // Recursion desired, one question.
                bytes[..12].copy_from_slice(&[0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
                bytes[12] = label;
                // The root, type A, class IN.
                bytes[size - DNS_AFTER..].copy_from_slice(&[0, 0, 1, 0, 1]);
            }
        }
        Ok(bytes)
    }

    /// Turns a question into its answer: a proxy for DNS passes nothing else
    /// back.
    pub(crate) fn answer(self, payload: &mut [u8]) {
        if self == Self::Dns && payload.len() > 2 {
            payload[2] |= 0x80;
        }
    }
}

/// Who sent a datagram, and which of theirs it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tag {
    pub(crate) client: SocketAddrV4,
    /// Tells loads apart: replies of the one before may still come.
    pub(crate) load: u32,
    pub(crate) sequence: u64,
    /// Nanoseconds since the load began, or the number of the datagram in a load that
    /// doesn't measure time.
    pub(crate) sent: u64,
}

impl Tag {
    pub(crate) fn write(&self, payload: &mut [u8], shape: Shape) {
        if shape == Shape::Dns {
            // A proxy may tell questions in flight apart by id alone.
            payload[..2].copy_from_slice(&self.sequence.to_be_bytes()[6..]);
        }
        let at = &mut payload[shape.offset()..][..LEN];
        at[..2].copy_from_slice(&MAGIC.to_be_bytes());
        at[2..4].copy_from_slice(&self.client.port().to_be_bytes());
        at[4..8].copy_from_slice(&self.client.ip().octets());
        at[8..12].copy_from_slice(&self.load.to_be_bytes());
        at[12..20].copy_from_slice(&self.sequence.to_be_bytes());
        at[20..].copy_from_slice(&self.sent.to_be_bytes());
    }

    pub(crate) fn read(payload: &[u8], shape: Shape) -> Option<Self> {
        let at: &[u8; LEN] = payload.get(shape.offset()..)?.first_chunk()?;
        let [m0, m1, p0, p1, a, b, c, d, rest @ ..] = *at;
        if u16::from_be_bytes([m0, m1]) != MAGIC {
            return None;
        }
        let (load, rest) = rest.split_first_chunk()?;
        let (sequence, sent) = rest.split_first_chunk()?;
        Some(Self {
            client: SocketAddrV4::new(Ipv4Addr::new(a, b, c, d), u16::from_be_bytes([p0, p1])),
            load: u32::from_be_bytes(*load),
            sequence: u64::from_be_bytes(*sequence),
            sent: u64::from_be_bytes(*sent.first_chunk()?),
        })
    }
}

/// Whether everything around the tag is as it was sent. A DNS server's answer has records
/// behind the question.
pub(crate) fn same_filling(payload: &[u8], template: &[u8], shape: Shape) -> bool {
    let filling = shape.offset() + LEN;
    let behind = payload.len().checked_sub(template.len());
    behind.is_some_and(|behind| behind == 0 || shape == Shape::Dns)
        && payload[filling..template.len()] == template[filling..]
}
