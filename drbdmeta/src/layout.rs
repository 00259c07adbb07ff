//! Where the three areas are: superblock, activity log, bitmap.
//!
//! Spec: metadata.md §1.

use crate::units::{ByteLen, ByteOffset, SectorCount};

/// One block of meta-data; all meta-data input and output is done in these.
pub const BLOCK: u64 = 4096;
/// [`BLOCK`] for slices.
pub const BLOCK_BYTES: usize = 4096;
/// The smallest device that may carry meta-data.
pub const DEVICE_MIN: ByteLen = ByteLen(69_632);
/// Length of one slot of an indexed meta-data device.
pub const SLOT: ByteLen = ByteLen(128 << 20);
/// The largest supported data device, 1 PiB.
pub const DATA_SECTORS_MAX: SectorCount = SectorCount(1 << 41);

const SECTOR: u64 = 512;
const SECTORS_PER_BLOCK: u64 = 8;
const SECTORS_PER_BIT: u64 = 8;
/// What one bitmap sector stands for, in sectors of data.
const SECTORS_PER_BITMAP_SECTOR: u64 = 32_768;

/// Where a configuration puts the meta-data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// At the end of the data device.
    Internal,
    /// A device of its own.
    FlexExternal,
    /// One slot of 128 MiB of a shared device.
    Indexed(u8),
}

impl Placement {
    /// Does the data device carry the meta-data too?
    pub const fn is_internal(self) -> bool {
        matches!(self, Self::Internal)
    }

    /// Where the superblock of a device of this length is. May be beyond its end.
    pub fn superblock(self, device: ByteLen) -> Option<ByteOffset> {
        match self {
            Self::Internal => (device.0 / BLOCK * BLOCK).checked_sub(BLOCK).map(ByteOffset),
            Self::FlexExternal => Some(ByteOffset(0)),
            Self::Indexed(n) => Some(ByteOffset(u64::from(n) * SLOT.0)),
        }
    }
}

/// Shape of the activity log, as stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AlGeometry {
    /// Number of stripes.
    pub stripes: u32,
    /// Length of one stripe in blocks of 4 KiB.
    pub stripe_blocks: u32,
}

impl Default for AlGeometry {
    fn default() -> Self {
        Self { stripes: 1, stripe_blocks: 8 }
    }
}

/// Largest activity log that can be asked for on the command line, in blocks.
pub const AL_BLOCKS_MAX_TOOL: u64 = 8192;
/// Smallest activity log, in blocks.
pub const AL_BLOCKS_MIN: u64 = 8;
/// Largest activity log that may be attached, in blocks (16 GiB).
pub const AL_BLOCKS_MAX: u64 = 4_194_304;

impl AlGeometry {
    /// Number of blocks of the ring.
    pub fn blocks(self) -> u64 {
        u64::from(self.stripes) * u64::from(self.stripe_blocks)
    }

    /// Length of the area. Stored values whose product no device could hold give the largest
    /// length, which never fits.
    pub fn len(self) -> ByteLen {
        ByteLen(self.blocks().saturating_mul(BLOCK))
    }

    /// A ring without blocks?
    pub fn is_empty(self) -> bool {
        self.blocks() == 0
    }

    /// Length in sectors with the 32-bit arithmetic of the superblock check.
    pub(crate) const fn sectors_wrapping(self) -> u32 {
        self.stripes.wrapping_mul(self.stripe_blocks).wrapping_mul(8)
    }

    /// Disk position, in blocks, of logical block `t` of the ring.
    /// Spec: metadata.md §3.3.
    pub fn disk_block(self, t: u64) -> u64 {
        let stripes = u64::from(self.stripes).max(1);
        (t % stripes) * u64::from(self.stripe_blocks) + t / stripes
    }
}

/// Places of the three areas on one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Superblock, one block.
    pub superblock: ByteOffset,
    /// Start of the activity log.
    pub al: ByteOffset,
    /// Shape of the activity log.
    pub al_geometry: AlGeometry,
    /// Start of the bitmap.
    pub bitmap: ByteOffset,
    /// Length of the bitmap area.
    pub bitmap_len: ByteLen,
    /// As stored: length of all meta-data in sectors.
    pub md_size_sect: u32,
    /// As stored: sectors from the superblock to the activity log.
    pub al_offset: i32,
    /// As stored: sectors from the superblock to the bitmap.
    pub bm_offset: i32,
}

/// Why a device can not carry the wanted meta-data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// The device ends too early.
    #[error("device of {device} bytes is too small for {needed} bytes of meta-data")]
    TooSmall {
        /// Length of the device.
        device: u64,
        /// What would be needed.
        needed: u64,
    },
    /// The bitmap would be beyond what the format can describe.
    #[error("Bitmap for that device got too large.")]
    BitmapTooLarge,
    /// An indexed slot has exactly one shape.
    #[error("an indexed meta-data slot can not have another activity log than 1 stripe of 32 KiB")]
    StripedSlot,
    /// An indexed slot that the device cuts off.
    #[error("meta-data slot {index} needs a device of {needed} bytes, this one has {device}")]
    SlotCutOff {
        /// Number of the slot.
        index: u8,
        /// What would be needed.
        needed: u64,
        /// Length of the device.
        device: u64,
    },
}

impl Layout {
    /// Places for new meta-data on a device of this length.
    ///
    /// # Errors
    /// The device is too small or too large for it.
    pub fn for_new(
        placement: Placement,
        device: ByteLen,
        al: AlGeometry,
    ) -> Result<Self, LayoutError> {
        if let Placement::Indexed(index) = placement {
            if al != AlGeometry::default() {
                return Err(LayoutError::StripedSlot);
            }
            let needed = (u64::from(index) + 1) * SLOT.0;
            if needed > device.0 {
                return Err(LayoutError::SlotCutOff { index, needed, device: device.0 });
            }
        }
        Self::expected(placement, device, al)
    }

    /// Places by the rules, also where we would not create meta-data any more.
    ///
    /// # Errors
    /// The numbers do not fit the format or the device.
    pub fn expected(
        placement: Placement,
        device: ByteLen,
        al: AlGeometry,
    ) -> Result<Self, LayoutError> {
        match placement {
            Placement::Internal => Self::internal(device, al),
            Placement::FlexExternal => Self::external(0, device.0 / SECTOR, device, al),
            Placement::Indexed(n) => {
                Self::external(u64::from(n) * SLOT.0, SLOT.0 / SECTOR, device, al)
            }
        }
    }

    fn internal(device: ByteLen, al: AlGeometry) -> Result<Self, LayoutError> {
        let too_small = |needed| LayoutError::TooSmall { device: device.0, needed };
        if device.0 / SECTOR > DATA_SECTORS_MAX.0 {
            return Err(LayoutError::BitmapTooLarge);
        }
        let superblock =
            Placement::Internal.superblock(device).ok_or_else(|| too_small(DEVICE_MIN.0))?;
        let bitmap_len = bitmap_bytes(SectorCount(device.0 / SECTOR)).0;
        let al_sectors = al.blocks() * SECTORS_PER_BLOCK;
        let above = bitmap_len / SECTOR + al_sectors;
        let md_size = above + SECTORS_PER_BLOCK;
        let bitmap =
            superblock.0.checked_sub(above * SECTOR).ok_or_else(|| too_small(md_size * SECTOR))?;
        Ok(Self {
            superblock,
            al: ByteOffset(superblock.0 - al_sectors * SECTOR),
            al_geometry: al,
            bitmap: ByteOffset(bitmap),
            bitmap_len: ByteLen(bitmap_len),
            md_size_sect: to_u32(md_size)?,
            al_offset: negative(al_sectors)?,
            bm_offset: negative(above)?,
        })
    }

    fn external(
        start: u64,
        md_size: u64,
        device: ByteLen,
        al: AlGeometry,
    ) -> Result<Self, LayoutError> {
        let bm_offset = SECTORS_PER_BLOCK + al.blocks() * SECTORS_PER_BLOCK;
        let needed = start + (bm_offset + 1) * SECTOR;
        let bitmap_sectors = md_size.saturating_sub(bm_offset);
        if bitmap_sectors == 0 || needed > device.0 {
            return Err(LayoutError::TooSmall { device: device.0, needed });
        }
        Ok(Self {
            superblock: ByteOffset(start),
            al: ByteOffset(start + BLOCK),
            al_geometry: al,
            bitmap: ByteOffset(start + bm_offset * SECTOR),
            bitmap_len: ByteLen(bitmap_sectors * SECTOR),
            md_size_sect: to_u32(md_size)?,
            al_offset: 8,
            bm_offset: i32::try_from(bm_offset).map_err(|_| LayoutError::BitmapTooLarge)?,
        })
    }

    /// Sectors left for data (internal) or describable by the bitmap (external).
    pub fn usable(&self) -> SectorCount {
        if self.al_offset < 0 {
            SectorCount(self.bitmap.0 / SECTOR)
        } else {
            SectorCount(self.bitmap_len.0 / SECTOR * SECTORS_PER_BITMAP_SECTOR)
        }
    }

    /// Place of one logical block of the activity log.
    pub fn al_block(&self, t: u64) -> ByteOffset {
        ByteOffset(self.al.0 + self.al_geometry.disk_block(t) * BLOCK)
    }

    /// First and last-plus-one byte of all meta-data.
    pub fn span(&self) -> (ByteOffset, ByteOffset) {
        if self.al_offset < 0 {
            (self.bitmap, ByteOffset(self.superblock.0 + BLOCK))
        } else {
            (self.superblock, ByteOffset(self.bitmap.0 + self.bitmap_len.0))
        }
    }
}

/// Bytes of bitmap in use for that much data: whole blocks. Rounds up.
/// Spec: metadata.md §4.
pub const fn bitmap_bytes(data: SectorCount) -> ByteLen {
    let words = data.0.div_ceil(SECTORS_PER_BIT).div_ceil(64);
    ByteLen((words * 8).div_ceil(BLOCK) * BLOCK)
}

fn negative(sectors: u64) -> Result<i32, LayoutError> {
    i32::try_from(sectors).map(|n| -n).map_err(|_| LayoutError::BitmapTooLarge)
}

fn to_u32(sectors: u64) -> Result<u32, LayoutError> {
    u32::try_from(sectors).map_err(|_| LayoutError::BitmapTooLarge)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Spec: metadata.md §1.1, the table of observed values.
    #[test]
    fn internal_layouts_are_the_observed_ones() {
        let default = AlGeometry::default();
        let al = |stripes, kib: u32| AlGeometry { stripes, stripe_blocks: kib / 4 };
        let rows = [
            (69_632, default, 65_536, -64, -72, 80, 56),
            (1_048_576, default, 1_044_480, -64, -72, 80, 1968),
            (1_050_112, default, 1_044_480, -64, -72, 80, 1968),
            (134_217_728, default, 134_213_632, -64, -72, 80, 262_064),
            (134_218_240, default, 134_213_632, -64, -80, 88, 262_056),
            (134_221_824, default, 134_217_728, -64, -80, 88, 262_064),
            (314_572_800, default, 314_568_704, -64, -88, 96, 614_304),
            (33_554_432, al(2, 64), 33_550_336, -256, -264, 272, 65_264),
            (8_589_934_592, al(7, 64), 8_589_930_496, -896, -1408, 1416, 16_775_800),
            (1 << 42, default, (1 << 42) - 4096, -64, -262_208, 262_216, 8_589_672_376),
        ];
        for (size, al, superblock, al_offset, bm_offset, md_size, usable) in rows {
            let l = Layout::for_new(Placement::Internal, ByteLen(size), al).unwrap();
            let got = (l.superblock.0, l.al_offset, l.bm_offset, l.md_size_sect, l.usable().0);
            assert_eq!(got, (superblock, al_offset, bm_offset, md_size, usable), "size {size}");
        }
    }

    #[test]
    fn external_layouts() {
        let al = AlGeometry::default();
        let flex = Layout::for_new(Placement::FlexExternal, ByteLen(1 << 20), al).unwrap();
        assert_eq!(flex.usable(), SectorCount(64_749_568));
        let slot = Layout::for_new(Placement::Indexed(1), ByteLen(256 << 20), al).unwrap();
        assert_eq!(slot.superblock, ByteOffset(128 << 20));
        assert_eq!(slot.usable(), SectorCount(8_587_575_296));
        let cut = Layout::for_new(Placement::Indexed(1), ByteLen((256 << 20) - 512), al);
        assert!(matches!(cut, Err(LayoutError::SlotCutOff { .. })));
        let big = Layout::for_new(Placement::FlexExternal, ByteLen(2 << 40), al);
        assert_eq!(big, Err(LayoutError::BitmapTooLarge));
    }

    #[test]
    fn striped_blocks_take_turns() {
        let al = AlGeometry { stripes: 4, stripe_blocks: 8 };
        let places: [u64; 6] = core::array::from_fn(|t| al.disk_block(u64::try_from(t).unwrap()));
        assert_eq!(places, [0, 8, 16, 24, 1, 9]);
    }
}
