//! CRC32C as section 2.2.3 applies it: over the header alone, with the four
//! bytes that hold the checksum counted as zero.

use crc::{CRC_32_ISCSI, Crc, Table};

/// RFC 4960, appendix B, is the checksum that catalogues call CRC-32/ISCSI.
static CRC32C: Crc<u32, Table<16>> = Crc::<u32, Table<16>>::new(&CRC_32_ISCSI);

/// The checksum of `header` with the four bytes at `value_at` taken as zero.
///
/// `value_at + 4` must not be past the end of `header`; bytes that are not
/// there are taken as absent rather than as a reason to panic.
pub(crate) fn of_header(header: &[u8], value_at: usize) -> u32 {
    let before = header.get(..value_at).unwrap_or(header);
    let after = header.get(value_at + 4..).unwrap_or(&[]);
    let mut digest = CRC32C.digest();
    digest.update(before);
    digest.update(&[0; 4]);
    digest.update(after);
    digest.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_the_check_values_of_rfc_3720() {
        // RFC 3720, appendix B.4: 32 bytes of zeroes, and 32 ascending bytes.
        assert_eq!(of_header(&[0; 32], 0), 0x8a91_36aa);
        let mut ascending = [0; 32];
        for (value, byte) in (0u8..).zip(&mut ascending) {
            *byte = value;
        }
        assert_eq!(CRC32C.checksum(&ascending), 0x46dd_794e);
    }

    #[test]
    fn ignores_what_stands_in_the_checksum_field() {
        let mut header = *b"some header bytes, four of them ????";
        let at = header.len() - 4;
        let first = of_header(&header, at);
        header[at..].copy_from_slice(&first.to_be_bytes());
        assert_eq!(of_header(&header, at), first);
    }
}
