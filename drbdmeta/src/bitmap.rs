//! The bitmap: one bit per 4 KiB, set where the peer may differ.
//!
//! Spec: metadata.md §4. It is read piece by piece; nothing here needs memory for all of it.

use alloc::vec::Vec;
use core::ops::Range;

use crate::io::{IoError, MetaIo, byte_count};
use crate::layout::{BLOCK, BLOCK_BYTES, Layout, bitmap_bytes};
use crate::units::{AlExtentNr, BitCount, BitNr, ByteLen, ByteOffset, SectorCount};

/// What is read at once.
const PIECE: usize = 1 << 20;
/// What one extent of the activity log has in the bitmap.
const EXTENT_BYTES: usize = 128;

/// Bits of one page of the bitmap: 4096 bytes, which are read and written as a whole. It stands
/// for 128 MiB of data.
pub const BITS_PER_PAGE: u64 = 32_768;
/// Extents of the activity log whose bits are in one page.
pub const AL_EXTENTS_PER_PAGE: u32 = 32;

/// The page that holds a bit; `None` beyond what the format can describe.
pub fn page_of_bit(bit: BitNr) -> Option<u32> {
    u32::try_from(bit.0 / BITS_PER_PAGE).ok()
}

/// The page that holds the bits of an extent. It must be stable before the slot of the extent is
/// given to another one. Spec: metadata.md §5.
pub const fn page_of_extent(extent: AlExtentNr) -> u32 {
    extent.0 / AL_EXTENTS_PER_PAGE
}

/// The part of the bitmap that is in use for one size of the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First byte.
    pub start: ByteOffset,
    /// Length, whole blocks.
    pub len: ByteLen,
    /// Meaningful bits; the ones behind are not to be trusted.
    pub bits: BitCount,
}

/// A piece of a bitmap.
#[derive(Clone, Copy, Debug)]
pub enum Piece<'a> {
    /// That many bytes of zeros which were not even read.
    Zeros(u64),
    /// Bytes.
    Bytes(&'a [u8]),
}

impl Region {
    /// The bitmap for that much data.
    pub fn new(layout: &Layout, data: SectorCount) -> Self {
        let data = SectorCount(data.0.min(layout.usable().0));
        let bits = BitCount(data.0.div_ceil(8));
        Self { start: layout.bitmap, len: bitmap_bytes(data), bits }
    }

    /// Number of pages.
    pub fn pages(&self) -> u32 {
        u32::try_from(self.len.0 / BLOCK).unwrap_or(u32::MAX)
    }

    /// Where a page is on the device; `None` behind the last one.
    pub fn page_place(&self, page: u32) -> Option<ByteOffset> {
        (page < self.pages()).then(|| ByteOffset(self.start.0 + u64::from(page) * BLOCK))
    }

    /// Clears what means nothing in a page that was read: the bits behind the end of the data.
    pub fn clear_behind_end(&self, page: u32, content: &mut [u8; BLOCK_BYTES]) {
        for (at, byte) in (u64::from(page) * BITS_PER_PAGE..).step_by(8).zip(content) {
            *byte &= mask(at, self.bits.0);
        }
    }

    /// Shows the whole region piece by piece, in order. Pieces are multiples of 4096 bytes, and
    /// so are runs of zeros. What lies beyond the end of the device reads as zero.
    ///
    /// # Errors
    /// Whatever the device or `each` say.
    pub fn each_piece<E: From<IoError>>(
        &self,
        io: &mut dyn MetaIo,
        mut each: impl FnMut(Piece<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut buffer: Vec<u8> = Vec::new();
        let end = self.start.0 + self.len.0;
        let mut at = self.start.0;
        while at < end {
            // Whole blocks of the region, counted from its start.
            let data = io.next_data(ByteOffset(at)).0.clamp(at, end);
            let skipped = (data - at) / 4096 * 4096;
            if skipped > 0 {
                each(Piece::Zeros(skipped))?;
                at += skipped;
                continue;
            }
            let len = usize::try_from(end - at).unwrap_or(PIECE).min(PIECE);
            buffer.clear();
            buffer.resize(len, 0);
            let behind = io.device_len().0.saturating_sub(at);
            let there = usize::try_from(behind).unwrap_or(len).min(len);
            if let Some(into) = buffer.get_mut(..there) {
                io.read_at(ByteOffset(at), into)?;
            }
            each(Piece::Bytes(&buffer))?;
            at += byte_count(&buffer);
        }
        Ok(())
    }

    /// Counts the set bits that mean something.
    ///
    /// # Errors
    /// The device fails.
    pub fn count_set(&self, io: &mut dyn MetaIo) -> Result<BitCount, IoError> {
        let (mut set, mut at) = (0, 0u64);
        let bits = self.bits.0;
        self.each_piece::<IoError>(io, |piece| {
            match piece {
                Piece::Zeros(n) => at += n * 8,
                Piece::Bytes(bytes) => {
                    for byte in bytes {
                        set += u64::from((byte & mask(at, bits)).count_ones());
                        at += 8;
                    }
                }
            }
            Ok(())
        })?;
        Ok(BitCount(set))
    }

    /// The ranges of set bits that mean something, ascending and not touching each other.
    ///
    /// # Errors
    /// The device fails.
    pub fn each_dirty_range(
        &self,
        io: &mut dyn MetaIo,
        mut each: impl FnMut(Range<BitNr>),
    ) -> Result<(), IoError> {
        let (mut at, mut open) = (0u64, None::<u64>);
        let bits = self.bits.0;
        self.each_piece::<IoError>(io, |piece| {
            match piece {
                Piece::Zeros(n) => {
                    if let Some(from) = open.take() {
                        each(BitNr(from)..BitNr(at));
                    }
                    at += n * 8;
                }
                Piece::Bytes(bytes) => {
                    for byte in bytes {
                        scan(byte & mask(at, bits), at, &mut open, &mut each);
                        at += 8;
                    }
                }
            }
            Ok(())
        })?;
        if let Some(from) = open {
            each(BitNr(from)..BitNr(bits.min(at)));
        }
        Ok(())
    }

    /// Sets all bits of these extents, which must ascend. Says how many were clear before.
    /// Extents beyond the end are handed to `beyond` with their place in the bitmap.
    ///
    /// # Errors
    /// The device fails.
    pub fn set_extents(
        &self,
        io: &mut dyn MetaIo,
        extents: &[AlExtentNr],
        mut beyond: impl FnMut(AlExtentNr, u64),
    ) -> Result<BitCount, IoError> {
        let mut new = 0;
        let mut block = alloc::vec![0; 4096];
        let mut rest = extents;
        while let Some(first) = rest.first() {
            let number = first.0 / 32;
            let same = rest.iter().take_while(|e| e.0 / 32 == number).count();
            let (now, later) = rest.split_at(same);
            rest = later;
            let start = u64::from(number) * 4096;
            if start >= self.len.0 {
                now.iter().for_each(|e| beyond(*e, u64::from(e.0) * 128));
                continue;
            }
            let at = ByteOffset(self.start.0 + start);
            let behind = usize::try_from(io.device_len().0.saturating_sub(at.0)).unwrap_or(4096);
            block.resize(behind.min(4096), 0);
            io.read_at(at, &mut block)?;
            for extent in now {
                let from = usize::try_from(extent.0 % 32).unwrap_or(0) * EXTENT_BYTES;
                for byte in block.iter_mut().skip(from).take(EXTENT_BYTES) {
                    new += u64::from(byte.count_zeros());
                    *byte = 0xFF;
                }
            }
            io.write_at(at, &block)?;
        }
        Ok(BitCount(new))
    }
}

/// Which bits of the byte whose first bit is `at` mean something.
fn mask(at: u64, bits: u64) -> u8 {
    match bits.saturating_sub(at) {
        left @ 0..8 => !(0xFFu8 << left),
        _ => 0xFF,
    }
}

fn scan(byte: u8, at: u64, open: &mut Option<u64>, each: &mut impl FnMut(Range<BitNr>)) {
    match (byte, *open) {
        (0, None) | (0xFF, Some(_)) => return,
        _ => {}
    }
    for bit in 0..8u8 {
        let is_set = byte >> bit & 1 == 1;
        let here = at + u64::from(bit);
        match *open {
            None if is_set => *open = Some(here),
            Some(from) if !is_set => {
                each(BitNr(from)..BitNr(here));
                *open = None;
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::Memory;
    use alloc::collections::BTreeSet;
    use proptest::prelude::*;

    #[test]
    fn pages_are_counted_placed_and_cleaned_behind_the_end() {
        let region = Region { start: ByteOffset(4096), len: ByteLen(8192), bits: BitCount(32_771) };
        assert_eq!(region.pages(), 2);
        assert_eq!(region.page_place(1), Some(ByteOffset(8192)));
        assert_eq!(region.page_place(2), None);
        let mut page = [0xFF; 4096];
        region.clear_behind_end(0, &mut page);
        assert_eq!(page, [0xFF; 4096]);
        region.clear_behind_end(1, &mut page);
        assert_eq!((page[0], page[1..].iter().max()), (0b111, Some(&0)));
        assert_eq!(page_of_bit(BitNr(32_768)), Some(1));
        assert_eq!(page_of_bit(BitNr(u64::MAX)), None);
        assert_eq!((page_of_extent(AlExtentNr(31)), page_of_extent(AlExtentNr(32))), (0, 1));
    }

    proptest! {
        #[test]
        fn ranges_and_counts_agree_with_single_bits(
            set in prop::collection::btree_set(0u64..40_000, 0..60),
            runs in prop::collection::vec((0u64..40_000, 1u64..3000), 0..4),
            bits in 30_000u64..40_000,
        ) {
            let mut all: BTreeSet<u64> = set;
            for (from, len) in runs {
                all.extend(from..(from + len).min(40_000));
            }
            let mut memory = Memory::zeroed(8192);
            for bit in &all {
                memory.bytes[usize::try_from(bit / 8).unwrap()] |= 1 << (bit % 8);
            }
            let len = ByteLen(8192);
            let region = Region { start: ByteOffset(0), len, bits: BitCount(bits) };
            let want: BTreeSet<u64> = all.range(..bits).copied().collect();
            let mut got = BTreeSet::new();
            let mut last_end = None;
            region.each_dirty_range(&mut memory, |r| {
                assert!(last_end.is_none_or(|end| end < r.start.0));
                last_end = Some(r.end.0);
                got.extend(r.start.0..r.end.0);
            }).unwrap();
            prop_assert_eq!(&got, &want);
            prop_assert_eq!(region.count_set(&mut memory).unwrap().0, got.len() as u64);
        }
    }
}
