//! One block of the ring, 4096 bytes, big endian.

use zerocopy::byteorder::big_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{CONTEXT_LEN, FREE, NO_SLOT, UPDATES_MAX};
use crate::layout::BLOCK_BYTES;
use crate::units::AlExtentNr;

/// First word of every block.
pub(super) const MAGIC: u32 = 0x69CB_65A2;
const INITIALISED: u16 = 0xFFFF;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Debug, Clone, Copy)]
#[repr(C)]
struct Raw {
    magic: U32,
    number: U32,
    checksum: U32,
    kind: U16,
    update_count: U16,
    context_size: U16,
    context_first: U16,
    reserved: [u8; 16],
    update_slots: [U16; UPDATES_MAX],
    update_extents: [U32; UPDATES_MAX],
    context: [U32; CONTEXT_LEN],
}

const _: () = assert!(size_of::<Raw>() == BLOCK_BYTES);

/// Why a block counts as not written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    /// Not a whole block.
    #[error("activity log block: {found} bytes, expected 4096")]
    Length {
        /// Length of the slice.
        found: usize,
    },
    /// Something else is there.
    #[error("activity log block: magic {found:#010x}, expected 0x69cb65a2")]
    Magic {
        /// First word.
        found: u32,
    },
    /// Torn or damaged.
    #[error("activity log block: checksum {found:#010x}, computed {computed:#010x}")]
    Checksum {
        /// As stored.
        found: u32,
        /// As it should be.
        computed: u32,
    },
}

/// What a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A transaction.
    Update,
    /// Written when the ring was made; says nothing.
    Initialised,
    /// Counts as a transaction, with a warning.
    Unknown(u16),
}

/// A block whose checksum is right.
#[derive(Clone, Copy, Debug)]
pub struct AlBlock<'a> {
    raw: &'a Raw,
}

impl<'a> AlBlock<'a> {
    /// Checks one block.
    ///
    /// # Errors
    /// It is none.
    pub fn from_disk(block: &'a [u8]) -> Result<Self, BlockError> {
        let raw =
            Raw::ref_from_bytes(block).map_err(|_| BlockError::Length { found: block.len() })?;
        let found = raw.magic.get();
        if found != MAGIC {
            return Err(BlockError::Magic { found });
        }
        let (found, computed) = (raw.checksum.get(), checksum(raw));
        if found != computed {
            return Err(BlockError::Checksum { found, computed });
        }
        Ok(Self { raw })
    }

    /// What it is.
    pub fn kind(&self) -> Kind {
        match self.raw.kind.get() {
            0 => Kind::Update,
            INITIALISED => Kind::Initialised,
            other => Kind::Unknown(other),
        }
    }

    /// Transaction number.
    pub fn number(&self) -> u32 {
        self.raw.number.get()
    }

    /// Number of slots when it was written.
    pub fn context_size(&self) -> u16 {
        self.raw.context_size.get()
    }

    /// Number of updates as stored.
    pub fn update_count(&self) -> u16 {
        self.raw.update_count.get()
    }

    /// Checksum as stored.
    pub fn checksum(&self) -> u32 {
        self.raw.checksum.get()
    }

    /// Context that counts: slot and its extent ([`FREE`] for none), with the index.
    pub fn context(&self) -> impl Iterator<Item = (usize, u32, u32)> + use<'a> {
        let (first, size) = (self.raw.context_first.get(), u32::from(self.context_size()));
        let slots = u32::from(first)..;
        let all = self.raw.context.iter().enumerate().zip(slots);
        all.map(|((i, extent), slot)| (i, slot, extent.get()))
            .filter(move |&(_, slot, extent)| extent != FREE || slot < size)
    }

    /// Updates that count: slot and its new extent, with the index.
    pub fn updates(&self) -> impl Iterator<Item = (usize, u16, u32)> + use<'a> {
        let count = usize::from(self.update_count());
        let all = self.raw.update_slots.iter().zip(&self.raw.update_extents).enumerate();
        all.map(|(i, (slot, extent))| (i, slot.get(), extent.get()))
            .filter(move |&(i, slot, _)| i < count || slot != NO_SLOT)
    }
}

/// A transaction to write.
#[derive(Clone, Copy, Debug)]
pub struct Transaction<'a> {
    /// Its number.
    pub number: u32,
    /// "This slot now holds that extent"; `None` frees it.
    pub updates: &'a [(u16, Option<AlExtentNr>)],
    /// All slots as they were before it.
    pub slots: &'a [Option<AlExtentNr>],
    /// First slot of the window that it repeats.
    pub context_first: u16,
}

/// Why a transaction can not be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// More than [`UPDATES_MAX`].
    #[error("{0} updates in one transaction, at most 64 are possible")]
    TooManyUpdates(usize),
    /// More slots than a slot number can name.
    #[error("{0} slots, at most 65534 are possible")]
    TooManySlots(usize),
    /// An update of a slot that does not exist.
    #[error("update of slot {0}, which does not exist")]
    NoSuchSlot(u16),
}

impl Transaction<'_> {
    /// The block to write.
    ///
    /// # Errors
    /// It says more than fits.
    pub fn to_disk(&self) -> Result<[u8; BLOCK_BYTES], EncodeError> {
        if self.updates.len() > UPDATES_MAX {
            return Err(EncodeError::TooManyUpdates(self.updates.len()));
        }
        let size = u16::try_from(self.slots.len()).ok().filter(|s| *s < NO_SLOT);
        let size = size.ok_or(EncodeError::TooManySlots(self.slots.len()))?;
        let mut raw = empty();
        raw.number = self.number.into();
        raw.update_count = u16::try_from(self.updates.len()).unwrap_or(0).into();
        raw.context_size = size.into();
        raw.context_first = self.context_first.into();
        let places = raw.update_slots.iter_mut().zip(&mut raw.update_extents);
        for (&(slot, extent), (to_slot, to_extent)) in self.updates.iter().zip(places) {
            if slot >= size {
                return Err(EncodeError::NoSuchSlot(slot));
            }
            *to_slot = slot.into();
            *to_extent = extent.map_or(FREE, |e| e.0).into();
        }
        let window = self.slots.iter().skip(usize::from(self.context_first));
        for (extent, to) in window.zip(&mut raw.context) {
            *to = extent.map_or(FREE, |e| e.0).into();
        }
        Ok(seal(raw))
    }
}

/// The block that fills a new ring.
pub fn initialised_block() -> [u8; BLOCK_BYTES] {
    let mut raw = Raw::read_from_bytes(&[0; BLOCK_BYTES]).unwrap_or_else(|_| empty());
    raw.magic = MAGIC.into();
    raw.kind = INITIALISED.into();
    seal(raw)
}

fn empty() -> Raw {
    Raw {
        magic: MAGIC.into(),
        number: 0.into(),
        checksum: 0.into(),
        kind: 0.into(),
        update_count: 0.into(),
        context_size: 0.into(),
        context_first: 0.into(),
        reserved: [0; 16],
        update_slots: [NO_SLOT.into(); UPDATES_MAX],
        update_extents: [FREE.into(); UPDATES_MAX],
        context: [FREE.into(); CONTEXT_LEN],
    }
}

fn seal(mut raw: Raw) -> [u8; BLOCK_BYTES] {
    raw.checksum = checksum(&raw).into();
    let mut block = [0; BLOCK_BYTES];
    block.copy_from_slice(raw.as_bytes());
    block
}

/// CRC-32C over the block with a zero checksum field, start value 0, no final inversion.
/// Spec: metadata.md §3.2.
fn checksum(raw: &Raw) -> u32 {
    let mut copy = *raw;
    copy.checksum = 0.into();
    crc_plain(copy.as_bytes())
}

/// The library inverts at the start and at the end; undoing both gives the plain remainder.
fn crc_plain(bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!0, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    #[test]
    fn checksums_are_the_published_ones() {
        assert_eq!(crc_plain(b"123456789"), 0x58E3_FA20);
        let all: Vec<u8> = (0..16).flat_map(|_| 0..=255u8).collect();
        assert_eq!(crc_plain(&all), 0x0488_BFBB);
        let start = [0x69, 0xcb, 0x65, 0xa2, 0, 0, 0, 0, 0x70, 0x9c, 0xc6, 0x51, 0xff, 0xff, 0, 0];
        assert_eq!(initialised_block()[..16], start);
    }

    proptest! {
        #[test]
        fn transactions_survive_the_disk(
            number in any::<u32>(),
            slots in prop::collection::vec(prop::option::of(0u32..1_000_000), 1..2000),
            updates in prop::collection::vec((any::<prop::sample::Index>(), 0u32..9999), 0..=64),
            window in any::<prop::sample::Index>(),
        ) {
            let slots: Vec<_> = slots.into_iter().map(|s| s.map(AlExtentNr)).collect();
            let pick = |i: prop::sample::Index| u16::try_from(i.index(slots.len())).unwrap();
            let updates: Vec<_> =
                updates.into_iter().map(|(i, e)| (pick(i), Some(AlExtentNr(e)))).collect();
            let context_first = pick(window) / 919 * 919;
            let t = Transaction { number, updates: &updates, slots: &slots, context_first };
            let block = t.to_disk().unwrap();
            let read = AlBlock::from_disk(&block).unwrap();
            prop_assert_eq!((read.kind(), read.number()), (Kind::Update, number));
            let got: Vec<_> =
                read.updates().map(|(_, s, e)| (s, Some(AlExtentNr(e)))).collect();
            prop_assert_eq!(got, updates);
            let first = usize::from(context_first);
            let want: Vec<_> = slots.iter().skip(first).take(919).copied().collect();
            let got: Vec<_> =
                read.context().map(|(_, _, e)| (e != FREE).then_some(AlExtentNr(e))).collect();
            prop_assert_eq!(got, want);
        }
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let slots = [None, Some(AlExtentNr(7))];
        let updates = [(0, Some(AlExtentNr(9)))];
        let t = Transaction { number: 5, updates: &updates, slots: &slots, context_first: 0 };
        for mut block in [t.to_disk().unwrap(), initialised_block()] {
            for bit in 0..4096 * 8 {
                block[bit / 8] ^= 1 << (bit % 8);
                assert!(AlBlock::from_disk(&block).is_err(), "bit {bit}");
                block[bit / 8] ^= 1 << (bit % 8);
            }
        }
    }
}
