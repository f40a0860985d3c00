//! The packets of a capture file, pcap or pcapng.

use std::io::{self, Cursor, Read};

use pcap_parser::traits::PcapNGPacketBlock;
use pcap_parser::{Block, Linktype, PcapBlockOwned, PcapError, create_reader};
use thiserror::Error;

/// Bytes of the longest block that is read. Packets have 262,144 bytes at most unless a
/// program was told otherwise.
const MAX_BLOCK: usize = 1 << 20;

/// Bytes that are read at a time, unless a block is longer.
const AT_A_TIME: usize = 1 << 16;

/// Interfaces of one section that are remembered. It bounds what a hostile file takes.
const MAX_INTERFACES: usize = 1 << 16;

/// Bytes that tell the format and the length of the first block.
const HEAD: usize = 12;

/// The first bytes of a pcapng file.
const PCAPNG: [u8; 4] = [0x0a, 0x0d, 0x0d, 0x0a];

/// A packet.
pub(super) struct Record<'a> {
    /// Counted from 1, as other programs do.
    pub(super) number: u64,
    /// Seconds since an unknown moment.
    pub(super) time: f64,
    pub(super) link: Linktype,
    pub(super) data: &'a [u8],
}

/// How a file ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    Whole,
    /// In the middle of a packet, as when the capturing program was killed.
    Cut,
}

/// Why a file can't be read on.
#[derive(Debug, Error)]
pub enum Unreadable {
    /// It can't be opened or read.
    #[error("reading it")]
    Io(#[from] io::Error),
    /// It is something else.
    #[error("it is no pcap or pcapng file; write one with `tcpdump -ni any -w FILE udp`")]
    NoCapture,
    /// A block makes no sense.
    #[error("it is damaged behind packet {0}")]
    Damaged(u64),
    /// No packet has a link type that is known here.
    #[error(
        "link type {0} is not known here; capture on an Ethernet or loopback interface, or with `tcpdump -i any`"
    )]
    LinkType(i32),
}

/// An interface of a pcapng section.
struct Interface {
    link: Linktype,
    /// Units of time in a second.
    resolution: f64,
}

/// Calls `each` for every packet of `input`.
pub(super) fn read<E: From<Unreadable>>(
    mut input: impl Read + Send,
    mut each: impl FnMut(&Record<'_>) -> Result<(), E>,
) -> Result<Ending, E> {
    let head = first_block(&mut input).map_err(Unreadable::from)?;
    let input = Cursor::new(head).chain(input);
    let mut reader = create_reader(AT_A_TIME, input).map_err(|_| Unreadable::NoCapture)?;
    let mut interfaces = Vec::new();
    let mut number = 0;
    let mut is_grown = false;
    loop {
        let block = match reader.next() {
            Ok((len, block)) => Some((len, block)),
            Err(PcapError::Eof) => return Ok(Ending::Whole),
            Err(PcapError::UnexpectedEof) => return Ok(Ending::Cut),
            Err(PcapError::Incomplete(_)) => None,
            Err(PcapError::BufferTooSmall) if !is_grown => {
                is_grown = true;
                reader.grow(MAX_BLOCK);
                continue;
            }
            Err(_) => return Err(Unreadable::Damaged(number).into()),
        };
        let Some((len, block)) = block else {
            let before = reader.data().len();
            reader.refill().map_err(|_| Unreadable::Damaged(number))?;
            if reader.data().len() == before && !reader.reader_exhausted() {
                // A block that never ends.
                return Err(Unreadable::Damaged(number).into());
            }
            continue;
        };
        match block {
            PcapBlockOwned::LegacyHeader(header) => {
                let nanoseconds = header.is_nanosecond_precision();
                interfaces = vec![Interface {
                    link: header.network,
                    resolution: if nanoseconds { 1e9 } else { 1e6 },
                }];
            }
            PcapBlockOwned::Legacy(packet) => {
                number += 1;
                let (link, resolution) = of(&interfaces, 0);
                each(&Record {
                    number,
                    time: f64::from(packet.ts_sec) + f64::from(packet.ts_usec) / resolution,
                    link,
                    data: packet.data,
                })?;
            }
            PcapBlockOwned::NG(Block::SectionHeader(_)) => interfaces.clear(),
            PcapBlockOwned::NG(Block::InterfaceDescription(interface)) => {
                if interfaces.len() == MAX_INTERFACES {
                    return Err(Unreadable::Damaged(number).into());
                }
                #[allow(clippy::cast_precision_loss, reason = "a power of ten or of two")]
                let resolution = interface.ts_resolution().unwrap_or(1_000_000) as f64;
                interfaces.push(Interface {
                    link: interface.linktype,
                    resolution,
                });
            }
            PcapBlockOwned::NG(Block::EnhancedPacket(packet)) => {
                number += 1;
                let index = usize::try_from(packet.if_id).unwrap_or(usize::MAX);
                let (link, resolution) = of(&interfaces, index);
                let units = f64::from(packet.ts_high) * 4_294_967_296.0 + f64::from(packet.ts_low);
                each(&Record {
                    number,
                    time: units / resolution,
                    link,
                    data: packet.packet_data(),
                })?;
            }
            PcapBlockOwned::NG(Block::SimplePacket(packet)) => {
                number += 1;
                each(&Record {
                    number,
                    time: 0.0,
                    link: of(&interfaces, 0).0,
                    data: packet.packet_data(),
                })?;
            }
            PcapBlockOwned::NG(_) => {}
        }
        reader.consume(len);
    }
}

/// Link type and resolution of an interface; a link type that nothing has if the file
/// does not describe it.
fn of(interfaces: &[Interface], index: usize) -> (Linktype, f64) {
    let interface = interfaces.get(index);
    interface.map_or((Linktype(-1), 1e6), |it| (it.link, it.resolution))
}

/// The bytes of the first block. The parser wants them at once, and a pipe may bring them
/// in pieces.
fn first_block(input: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    input.take(HEAD as u64).read_to_end(&mut head)?;
    let rest = match head.first_chunk() {
        Some(&PCAPNG) if head.len() == HEAD => {
            let length = |at: usize| head.get(at..at + 4)?.first_chunk().copied();
            let length = length(4).unwrap_or_default();
            let little_endian = head.get(8) == Some(&0x4d);
            let length = match little_endian {
                true => u32::from_le_bytes(length),
                false => u32::from_be_bytes(length),
            };
            u64::from(length).min(AT_A_TIME as u64 / 2)
        }
        // A pcap file's header has 24 bytes.
        _ => 24,
    };
    let rest = rest.saturating_sub(HEAD as u64);
    input.take(rest).read_to_end(&mut head)?;
    Ok(head)
}
