//! Memory that datagrams are received into: mapped by the kernel, on huge pages
//! where it has them.
//!
//! Slots stand far from each other, so that each holds the longest datagram, and
//! mostly hold a short one: of ordinary pages, each slot in use takes one of its
//! own, and a batch each way more of them than a processor's translation cache
//! remembers. With 64 clients that each have one datagram of 64 bytes in flight,
//! huge pages saved 2 to 3 % of the CPU of a virtual machine (medians of 30 turns
//! beside the same program without, divided by a bare loop's), for 4 MiB a worker.

use std::ops::{Deref, DerefMut};

use memmap2::MmapMut;

use super::{BATCH, STRIDE};

/// Bytes of a huge page on x86-64, and on arm64 with pages of 4 KiB. Where it is
/// another number, the kernel makes of it what it can.
const HUGE_PAGE: usize = 2 << 20;

const _: () = assert!(BATCH * STRIDE <= HUGE_PAGE, "one is enough for a batch");

/// Zeroes at first; begins with a huge page.
#[derive(Debug)]
pub(super) struct Buffer {
    map: MmapMut,
    start: usize,
    len: usize,
}

impl Buffer {
    /// `len` bytes. Memory is taken when it is first written to.
    ///
    /// # Panics
    ///
    /// If the process may have no more memory.
    pub(super) fn new(len: usize) -> Self {
        let len = len.next_multiple_of(HUGE_PAGE);
        let map = MmapMut::map_anon(len + HUGE_PAGE).expect("there is memory for a batch");
        let start = map.as_ptr().align_offset(HUGE_PAGE);
        // Best effort: without huge pages it is only slower.
        #[cfg(target_os = "linux")]
        let _ = map.advise_range(memmap2::Advice::HugePage, start, len);
        Self { map, start, len }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map[self.start..][..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.map[self.start..][..self.len]
    }
}
