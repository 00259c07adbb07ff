//! The superblock: 4096 bytes, big endian.
//!
//! Spec: metadata.md §2.

use zerocopy::byteorder::big_endian::{I32, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::layout::{
    AL_BLOCKS_MAX, AL_BLOCKS_MIN, AlGeometry, BLOCK, BLOCK_BYTES, Layout, Placement, bitmap_bytes,
};
use crate::units::{ByteLen, ByteOffset, Gi, SectorCount};

/// Slots of the activity log that create-md writes down.
pub const AL_EXTENTS_NEW: u32 = 257;
/// What one bit of the bitmap stands for; nothing else is supported.
pub const BYTES_PER_BIT: u32 = 4096;

bitflags::bitflags! {
    /// Flags of the superblock; unknown ones are kept.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Flags: u32 {
        /// The data is consistent.
        const CONSISTENT = 1;
        /// The node was Primary.
        const PRIMARY = 1 << 1;
        /// The node was connected.
        const CONNECTED = 1 << 2;
        /// The whole bitmap counts as set.
        const FULL_SYNC = 1 << 3;
        /// The data was up to date.
        const WAS_UP_TO_DATE = 1 << 4;
        /// The peer's disk is outdated or worse.
        const PEER_OUTDATED = 1 << 5;
        /// The node crashed as Primary and has not seen its peer since.
        const CRASHED_PRIMARY = 1 << 6;
        /// The activity log has been applied.
        const AL_CLEAN = 1 << 7;
        /// The activity log was not kept.
        const AL_DISABLED = 1 << 8;
        /// Anything else that was found.
        const _ = !0;
    }
}

/// The two valid magic numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Magic {
    /// Nothing is in use.
    Clean,
    /// In use, or was when the power failed.
    Unclean,
}

impl Magic {
    /// The number on disk.
    pub const fn to_disk(self) -> u32 {
        match self {
            Self::Clean => 0x8374_026B,
            Self::Unclean => 0x8374_026C,
        }
    }

    /// From the number on disk.
    pub const fn from_disk(raw: u32) -> Option<Self> {
        match raw {
            0x8374_026B => Some(Self::Clean),
            0x8374_026C => Some(Self::Unclean),
            _ => None,
        }
    }
}

/// Magic number of DRBD 9's format, at the same place.
pub const MAGIC_V09: u32 = 0x8374_026D;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct Raw {
    la_size: U64,
    current: U64,
    bitmap: U64,
    history: [U64; 2],
    device_uuid: U64,
    reserved: U64,
    flags: U32,
    magic: U32,
    md_size: U32,
    al_offset: I32,
    al_nr_extents: U32,
    bm_offset: I32,
    bm_bytes_per_bit: U32,
    la_peer_max_bio_size: U32,
    al_stripes: U32,
    al_stripe_size_4k: U32,
    unused: [u8; 4000],
}

const _: () = assert!(size_of::<Raw>() == BLOCK_BYTES);

/// A superblock with a valid magic number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Agreed size of the device; 0: never attached.
    pub la_size: SectorCount,
    /// Data generation.
    pub current: Gi,
    /// Generation the bitmap is relative to.
    pub bitmap: Gi,
    /// Older generations, the younger one first.
    pub history: [Gi; 2],
    /// Identity of the device; ties it to the last-known file.
    pub device_uuid: u64,
    /// Flags.
    pub flags: Flags,
    /// In use or not.
    pub magic: Magic,
    /// Length of all meta-data in sectors.
    pub md_size_sect: u32,
    /// Sectors from here to the activity log.
    pub al_offset: i32,
    /// Slots that the activity log had last.
    pub al_nr_extents: u32,
    /// Sectors from here to the bitmap.
    pub bm_offset: i32,
    /// Always [`BYTES_PER_BIT`] when valid.
    pub bm_bytes_per_bit: u32,
    /// Largest request agreed with the peer; 0: unknown.
    pub la_peer_max_bio_size: u32,
    /// Shape of the activity log.
    pub al: AlGeometry,
}

/// Why bytes are no superblock of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Not a whole block.
    #[error("superblock: {found} bytes, expected 4096")]
    Length {
        /// Length of the slice.
        found: usize,
    },
    /// Another magic number.
    #[error("v08 Magic number not found")]
    Magic {
        /// What is there instead.
        found: u32,
    },
}

/// Why a superblock does not fit its device. The texts are the original's.
/// Spec: metadata.md §2.3.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// Offset of the activity log, internal.
    #[error("v08 al_offset: expected {expected}, found {found}")]
    AlOffset {
        /// By the rules.
        expected: i64,
        /// On disk.
        found: i64,
    },
    /// Offset of the bitmap, internal.
    #[error("strange bm_offset {found} (expected: {expected})")]
    BmOffset {
        /// By the rules.
        expected: i64,
        /// On disk.
        found: i64,
    },
    /// Length of all meta-data.
    #[error("strange md_size_sect {found} (expected: {expected})")]
    MdSize {
        /// By the rules.
        expected: u64,
        /// On disk.
        found: u64,
    },
    /// Offset of the activity log, external.
    #[error("v08 Magic number (al_offset) not found\n\texpected: 8, found {found}")]
    ExternalAlOffset {
        /// On disk.
        found: i32,
    },
    /// Offset of the bitmap, external.
    #[error("v08 bm_offset: expected {expected}, found {found}")]
    ExternalBmOffset {
        /// By the rules.
        expected: i64,
        /// On disk.
        found: i64,
    },
    /// A granularity that nobody uses.
    #[error("unexpected bm_bytes_per_bit: {found} (expected 4096)")]
    BytesPerBit {
        /// On disk.
        found: u32,
    },
    /// The areas do not lie on the device.
    #[error("meta-data does not fit on the device of {device} bytes")]
    OffDevice {
        /// Length of the device.
        device: u64,
    },
}

impl Flags {
    /// All flags that mean something.
    pub const KNOWN: Self = Self::from_bits_retain(0x1FF);
}

impl Superblock {
    /// A superblock for new meta-data.
    pub const fn new(layout: &Layout, la_peer_max_bio_size: u32) -> Self {
        Self {
            la_size: SectorCount(0),
            current: Gi::JUST_CREATED,
            bitmap: Gi(0),
            history: [Gi(0); 2],
            device_uuid: 0,
            flags: Flags::AL_CLEAN,
            magic: Magic::Clean,
            md_size_sect: layout.md_size_sect,
            al_offset: layout.al_offset,
            al_nr_extents: AL_EXTENTS_NEW,
            bm_offset: layout.bm_offset,
            bm_bytes_per_bit: BYTES_PER_BIT,
            la_peer_max_bio_size,
            al: layout.al_geometry,
        }
    }

    /// Reads one block.
    ///
    /// # Errors
    /// Not 4096 bytes, or none of our magic numbers.
    pub fn from_disk(block: &[u8]) -> Result<Self, DecodeError> {
        let raw =
            Raw::ref_from_bytes(block).map_err(|_| DecodeError::Length { found: block.len() })?;
        let found = raw.magic.get();
        let magic = Magic::from_disk(found).ok_or(DecodeError::Magic { found })?;
        let stored = AlGeometry {
            stripes: raw.al_stripes.get(),
            stripe_blocks: raw.al_stripe_size_4k.get(),
        };
        // Written by versions that did not know stripes.
        let unstriped = stored == AlGeometry { stripes: 0, stripe_blocks: 0 };
        Ok(Self {
            la_size: SectorCount(raw.la_size.get()),
            current: Gi(raw.current.get()),
            bitmap: Gi(raw.bitmap.get()),
            history: raw.history.map(|h| Gi(h.get())),
            device_uuid: raw.device_uuid.get(),
            flags: Flags::from_bits_retain(raw.flags.get()),
            magic,
            md_size_sect: raw.md_size.get(),
            al_offset: raw.al_offset.get(),
            al_nr_extents: raw.al_nr_extents.get(),
            bm_offset: raw.bm_offset.get(),
            bm_bytes_per_bit: raw.bm_bytes_per_bit.get(),
            la_peer_max_bio_size: raw.la_peer_max_bio_size.get(),
            al: if unstriped { AlGeometry::default() } else { stored },
        })
    }

    /// The block to write; reserved parts are zero.
    pub fn to_disk(&self) -> [u8; BLOCK_BYTES] {
        let mut block = [0; BLOCK_BYTES];
        if let Ok(raw) = Raw::mut_from_bytes(&mut block) {
            raw.la_size = self.la_size.0.into();
            raw.current = self.current.0.into();
            raw.bitmap = self.bitmap.0.into();
            raw.history = self.history.map(|h| h.0.into());
            raw.device_uuid = self.device_uuid.into();
            raw.flags = self.flags.bits().into();
            raw.magic = self.magic.to_disk().into();
            raw.md_size = self.md_size_sect.into();
            raw.al_offset = self.al_offset.into();
            raw.al_nr_extents = self.al_nr_extents.into();
            raw.bm_offset = self.bm_offset.into();
            raw.bm_bytes_per_bit = self.bm_bytes_per_bit.into();
            raw.la_peer_max_bio_size = self.la_peer_max_bio_size.into();
            raw.al_stripes = self.al.stripes.into();
            raw.al_stripe_size_4k = self.al.stripe_blocks.into();
        }
        block
    }

    /// Does it describe meta-data on a device of this length? Then where its areas are.
    ///
    /// # Errors
    /// The first field that does not fit.
    pub fn check(&self, placement: Placement, device: ByteLen) -> Result<Layout, Invalid> {
        if placement.is_internal() {
            self.check_internal(device)?;
        } else {
            self.check_external()?;
        }
        if self.bm_bytes_per_bit != BYTES_PER_BIT {
            return Err(Invalid::BytesPerBit { found: self.bm_bytes_per_bit });
        }
        self.locate(placement, device).ok_or(Invalid::OffDevice { device: device.0 })
    }

    fn check_internal(&self, device: ByteLen) -> Result<(), Invalid> {
        let al_sectors = self.al.sectors_wrapping();
        let expected = i64::from(al_sectors.wrapping_neg().cast_signed());
        let found = i64::from(self.al_offset);
        if expected != found {
            return Err(Invalid::AlOffset { expected, found });
        }
        let bitmap = bitmap_bytes(SectorCount(device.0 / 512)).0 / 512;
        let md_size = bitmap + u64::from(al_sectors) + 8;
        let expected = 8 - i64::try_from(md_size).unwrap_or(i64::MAX);
        let found = i64::from(self.bm_offset);
        if expected != found {
            return Err(Invalid::BmOffset { expected, found });
        }
        let found = u64::from(self.md_size_sect);
        if md_size != found {
            return Err(Invalid::MdSize { expected: md_size, found });
        }
        Ok(())
    }

    fn check_external(&self) -> Result<(), Invalid> {
        if self.al_offset != 8 {
            return Err(Invalid::ExternalAlOffset { found: self.al_offset });
        }
        let expected = 8 + i64::from(self.al.sectors_wrapping());
        let found = i64::from(self.bm_offset);
        if expected != found {
            return Err(Invalid::ExternalBmOffset { expected, found });
        }
        Ok(())
    }

    /// The areas by the stored offsets, if they lie on the device. (A bitmap area that ends
    /// beyond it is cut: only what the data needs is ever read.)
    fn locate(&self, placement: Placement, device: ByteLen) -> Option<Layout> {
        let superblock = placement.superblock(device)?;
        let al = by_sectors(superblock, self.al_offset)?;
        let bitmap = by_sectors(superblock, self.bm_offset)?;
        // Stripes whose product overflows 32 bits are caught here.
        let al_end = al.0.checked_add(self.al.len().0)?;
        let bitmap_len = if placement.is_internal() {
            al.0.checked_sub(bitmap.0)?
        } else {
            let behind = i64::from(self.md_size_sect) - i64::from(self.bm_offset);
            u64::try_from(behind).ok()? * 512
        };
        let on_device = superblock.0.checked_add(BLOCK)? <= device.0
            && al_end <= device.0
            && bitmap.0 <= device.0;
        on_device.then_some(Layout {
            superblock,
            al,
            al_geometry: self.al,
            bitmap,
            bitmap_len: ByteLen(bitmap_len),
            md_size_sect: self.md_size_sect,
            al_offset: self.al_offset,
            bm_offset: self.bm_offset,
        })
    }

    /// Bytes of a block that every writer leaves zero and that are not: a hint at damage, as the
    /// superblock has no checksum.
    pub fn stray_bytes(block: &[u8; BLOCK_BYTES]) -> usize {
        let reserved = block.get(48..56).unwrap_or_default();
        let unused = block.get(96..).unwrap_or_default();
        reserved.iter().chain(unused).filter(|b| **b != 0).count()
    }

    /// May a dump be trusted, that is, has the activity log been applied?
    pub const fn is_clean(&self) -> bool {
        matches!(self.magic, Magic::Clean) && self.flags.contains(Flags::AL_CLEAN)
    }

    /// The disk state that the flags stand for.
    pub const fn disk_state(&self) -> &'static str {
        let flags = self.flags;
        if !flags.contains(Flags::CONSISTENT) {
            "Inconsistent"
        } else if !flags.contains(Flags::WAS_UP_TO_DATE) {
            "Outdated"
        } else if flags.contains(Flags::PEER_OUTDATED) {
            "UpToDate"
        } else {
            "Consistent"
        }
    }
}

fn by_sectors(from: ByteOffset, sectors: i32) -> Option<ByteOffset> {
    from.0.checked_add_signed(i64::from(sectors) * 512).map(ByteOffset)
}

/// Why a superblock must not be attached. Spec: metadata.md §6.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttachError {
    /// The activity log has not been applied.
    #[error("Found unclean meta data. Did you \"drbdadm apply-al\"?")]
    Unclean,
    /// A granularity that nobody uses.
    #[error("unexpected bm_bytes_per_bit: {0} (expected 4096)")]
    BytesPerBit(u32),
    /// Stripes of the activity log.
    #[error("invalid activity log striping: al_stripes={stripes}, al_stripe_size_4k={blocks}")]
    Striping {
        /// Number of stripes.
        stripes: u32,
        /// Blocks of one stripe.
        blocks: u32,
    },
    /// The offsets contradict each other or the device.
    #[error("meta data offsets don't make sense: {0}")]
    Offsets(#[from] Invalid),
    /// An indexed slot has exactly one shape.
    #[error(
        "meta data offsets don't make sense: a slot has md_size_sect=262144, al_s=1, al_sz4k=8, \
         found md_size_sect={md_size_sect}, al_s={stripes}, al_sz4k={blocks}"
    )]
    SlotShape {
        /// Length of all meta-data.
        md_size_sect: u32,
        /// Number of stripes.
        stripes: u32,
        /// Blocks of one stripe.
        blocks: u32,
    },
    /// The meta-data ends behind its device.
    #[error("meta data offsets don't make sense: it ends at byte {end} of a device of {device}")]
    EndsBeyond {
        /// Where it ends.
        end: u64,
        /// Length of the device.
        device: u64,
    },
    /// The bitmap has no room for the agreed size.
    #[error(
        "meta data offsets don't make sense: la_size={la_size} needs {needed} sectors of bitmap, \
         there are {found}"
    )]
    BitmapTooSmall {
        /// Agreed size in sectors.
        la_size: u64,
        /// Sectors of bitmap that it needs.
        needed: u64,
        /// Sectors of bitmap that there are.
        found: u64,
    },
}

impl Superblock {
    /// The checks before an attach, stricter and wider than [`Superblock::check`].
    ///
    /// # Errors
    /// The first check that fails.
    pub fn check_attach(
        &self,
        placement: Placement,
        device: ByteLen,
    ) -> Result<Layout, AttachError> {
        if !self.is_clean() {
            return Err(AttachError::Unclean);
        }
        if self.bm_bytes_per_bit != BYTES_PER_BIT {
            return Err(AttachError::BytesPerBit(self.bm_bytes_per_bit));
        }
        let blocks = self.al.blocks();
        if !(AL_BLOCKS_MIN..=AL_BLOCKS_MAX).contains(&blocks) {
            return Err(AttachError::Striping {
                stripes: self.al.stripes,
                blocks: self.al.stripe_blocks,
            });
        }
        let layout = self.check(placement, device)?;
        let is_slot = matches!(placement, Placement::Indexed(_));
        let is_usual = self.md_size_sect == 262_144 && self.al == AlGeometry::default();
        if is_slot && !is_usual {
            return Err(AttachError::SlotShape {
                md_size_sect: self.md_size_sect,
                stripes: self.al.stripes,
                blocks: self.al.stripe_blocks,
            });
        }
        let end = layout.span().1.0;
        if end > device.0 {
            return Err(AttachError::EndsBeyond { end, device: device.0 });
        }
        let needed = self.la_size.0.saturating_add(7) / 8 / 8 / 512;
        let found = layout.bitmap_len.0 / 512;
        if found < needed {
            return Err(AttachError::BitmapTooSmall { la_size: self.la_size.0, needed, found });
        }
        Ok(layout)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_written_is_read_again(
            numbers in prop::array::uniform6(any::<u64>()),
            words in prop::array::uniform6(any::<u32>()),
            offsets in prop::array::uniform2(any::<i32>()),
            stripes in (1u32.., 1u32..),
            unclean in any::<bool>(),
        ) {
            let sb = Superblock {
                la_size: SectorCount(numbers[0]),
                current: Gi(numbers[1]),
                bitmap: Gi(numbers[2]),
                history: [Gi(numbers[3]), Gi(numbers[4])],
                device_uuid: numbers[5],
                flags: Flags::from_bits_retain(words[0]),
                magic: if unclean { Magic::Unclean } else { Magic::Clean },
                md_size_sect: words[1],
                al_offset: offsets[0],
                al_nr_extents: words[2],
                bm_offset: offsets[1],
                bm_bytes_per_bit: words[3],
                la_peer_max_bio_size: words[4],
                al: AlGeometry { stripes: stripes.0, stripe_blocks: stripes.1 },
            };
            prop_assert_eq!(Superblock::from_disk(&sb.to_disk()), Ok(sb));
        }
    }
}
