//! DRBD 0.7's superblock, read for conversion only.
//!
//! Spec: metadata.md §10.

use zerocopy::byteorder::big_endian::{I32, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::layout::{BLOCK, BLOCK_BYTES, Layout, SLOT};
use crate::superblock::{Flags, Superblock};
use crate::units::{ByteLen, ByteOffset, Gi, SectorCount};

const MAGIC: u32 = 0x8374_026A;

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    la_kib: U64,
    flags: U32,
    human: U32,
    timeout: U32,
    connected: U32,
    arbitrary: U32,
    magic: U32,
    md_size_kib: U32,
    al_offset: I32,
    al_nr_extents: U32,
    bm_offset: I32,
    unused: [u8; 4048],
}

const _: () = assert!(size_of::<Raw>() == BLOCK_BYTES);

/// What a 0.7 superblock says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OldSuperblock {
    /// Agreed size.
    pub la_size: SectorCount,
    /// Its flags word; the lowest four mean the same as today.
    pub flags: u32,
    /// Generation counters: human, time-out, connected, arbitrary.
    pub counters: [u32; 4],
}

impl OldSuperblock {
    /// Reads one block, if it is one.
    pub fn from_disk(block: &[u8]) -> Option<Self> {
        let raw = Raw::ref_from_bytes(block).ok().filter(|raw| raw.magic.get() == MAGIC)?;
        let counters = [&raw.human, &raw.timeout, &raw.connected, &raw.arbitrary];
        Some(Self {
            la_size: SectorCount(raw.la_kib.get().saturating_mul(2)),
            flags: raw.flags.get(),
            counters: counters.map(|c| c.get()),
        })
    }

    /// The superblock of today with the same meaning. The activity log has not been applied.
    pub fn convert(&self, layout: &Layout) -> Superblock {
        let [human, timeout, connected, arbitrary] = self.counters;
        let word = |n: u32| u64::from(n & 0xFFFF);
        let current = word(human) << 48
            | word(timeout) << 32
            | word(connected.wrapping_add(arbitrary)) << 16
            | 0xBABE;
        let mut new = Superblock::new(layout, 0);
        new.la_size = self.la_size;
        new.flags = Flags::from_bits_retain(self.flags);
        new.current = Gi(current);
        new.history = [current.wrapping_sub(0x1_0000), current.wrapping_sub(0x2_0000)].map(Gi);
        new
    }
}

/// Where 0.7 put the superblock of fixed internal meta-data, if the device is large enough.
pub fn fixed_superblock(device: ByteLen) -> Option<ByteOffset> {
    (device.0 / BLOCK * BLOCK).checked_sub(SLOT.0).map(ByteOffset)
}
