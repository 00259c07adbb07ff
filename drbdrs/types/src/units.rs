//! Units: every number has one, and they do not mix. Roundings say their direction.

use core::fmt;
use core::ops::Range;

macro_rules! unit {
    ($(#[$doc:meta])* $name:ident($raw:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub $raw);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

unit! {
    /// A place on a device, in bytes from its start.
    ByteOffset(u64)
}
unit! {
    /// A length in bytes.
    ByteLen(u64)
}
unit! {
    /// A place on the replicated device, in 512-byte sectors from its start.
    Sector(u64)
}
unit! {
    /// A count of 512-byte sectors.
    SectorCount(u64)
}
unit! {
    /// Number of a bitmap bit; it stands for 4 KiB of data.
    BitNr(u64)
}
unit! {
    /// A count of bitmap bits.
    BitCount(u64)
}
unit! {
    /// Number of an activity-log extent; it stands for 4 MiB of data.
    AlExtentNr(u32)
}
unit! {
    /// Number of a resync extent; it stands for 16 MiB of data.
    RsExtentNr(u32)
}
unit! {
    /// Number of a volume in its resource, 0..=65534.
    VolumeNr(u16)
}
unit! {
    /// Minor number of a device.
    Minor(u32)
}
unit! {
    /// A span of time in tenths of a second, the unit of most options.
    Deciseconds(u32)
}
unit! {
    /// A moment: microseconds since the engine was started. Only the shell reads a clock.
    Tick(u64)
}

/// Sectors of one bitmap bit.
pub const SECTORS_PER_BIT: u64 = 8;
/// Bytes of one bitmap bit.
pub const BYTES_PER_BIT: u64 = 4096;
/// Bitmap bits of one activity-log extent.
pub const BITS_PER_AL_EXTENT: u64 = 1024;
/// Sectors of one activity-log extent.
pub const SECTORS_PER_AL_EXTENT: u64 = 8192;
/// Bitmap bits of one resync extent.
pub const BITS_PER_RS_EXTENT: u64 = 4096;
/// Sectors of one resync extent.
pub const SECTORS_PER_RS_EXTENT: u64 = 32_768;

impl SectorCount {
    /// From a length that must be a multiple of 512 bytes.
    pub const fn from_bytes_exact(bytes: u64) -> Option<Self> {
        if bytes.is_multiple_of(512) { Some(Self(bytes / 512)) } else { None }
    }

    /// The same length in bytes. `None` if it does not fit 64 bits.
    pub const fn to_bytes(self) -> Option<ByteLen> {
        match self.0.checked_mul(512) {
            Some(bytes) => Some(ByteLen(bytes)),
            None => None,
        }
    }

    /// Bits that a device of this size has; the last one may stand for less than 4 KiB.
    pub const fn bits_ceil(self) -> BitCount {
        BitCount(self.0.div_ceil(SECTORS_PER_BIT))
    }
}

impl Tick {
    /// This moment plus a span of time; the end of time if that does not fit.
    #[must_use]
    pub const fn after(self, span: Deciseconds) -> Self {
        Self(self.0.saturating_add((span.0 as u64) * 100_000))
    }
}

/// A run of sectors of the replicated device. Never wraps: `end` is at most 2^64 - 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SectorRange {
    /// First sector.
    pub start: Sector,
    /// Number of sectors.
    pub len: SectorCount,
}

impl SectorRange {
    /// The range, if its end can be written down.
    pub const fn new(start: Sector, len: SectorCount) -> Option<Self> {
        match start.0.checked_add(len.0) {
            Some(_) => Some(Self { start, len }),
            None => None,
        }
    }

    /// First sector behind the range.
    pub const fn end(self) -> Sector {
        Sector(self.start.0 + self.len.0)
    }

    /// Without sectors?
    pub const fn is_empty(self) -> bool {
        self.len.0 == 0
    }

    /// Do the two share a sector?
    pub const fn overlaps(self, other: Self) -> bool {
        self.start.0 < other.end().0 && other.start.0 < self.end().0
    }

    /// Does it hold every sector of the other?
    pub const fn contains(self, other: Self) -> bool {
        self.start.0 <= other.start.0 && other.end().0 <= self.end().0
    }

    /// Bits that a write here puts out of sync.
    /// Rounds outwards: one bit too many costs a copy, one too few costs data.
    pub const fn bits_touched(self) -> Range<BitNr> {
        let start = self.start.0 / SECTORS_PER_BIT;
        if self.is_empty() {
            return BitNr(start)..BitNr(start);
        }
        BitNr(start)..BitNr(self.end().0.div_ceil(SECTORS_PER_BIT))
    }

    /// Bits that are in sync after exactly this range was copied.
    /// Rounds inwards, because the rest of a partly copied block may still differ; only the last
    /// block of the device may be shorter than 4 KiB, so its end counts as a border.
    pub const fn bits_covered(self, device: SectorCount) -> Range<BitNr> {
        let start = self.start.0.div_ceil(SECTORS_PER_BIT);
        let end = if self.end().0 == device.0 {
            device.0.div_ceil(SECTORS_PER_BIT)
        } else {
            self.end().0 / SECTORS_PER_BIT
        };
        if start < end { BitNr(start)..BitNr(end) } else { BitNr(start)..BitNr(start) }
    }

    /// Activity-log extents that a write here touches, as extent numbers. The numbers are 64 bits
    /// wide: whether they fit the device is checked where the size is known.
    pub const fn al_extents_touched(self) -> Range<u64> {
        let start = self.start.0 / SECTORS_PER_AL_EXTENT;
        if self.is_empty() {
            return start..start;
        }
        start..self.end().0.div_ceil(SECTORS_PER_AL_EXTENT)
    }
}

impl fmt::Display for SectorRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}s +{}", self.start, self.len)
    }
}

/// An amount of data as the tools print it: at most four digits and a unit.
/// Spec: metadata.md §8.8.
#[derive(Clone, Copy, Debug)]
pub struct HumanKib(pub u64);

impl fmt::Display for HumanKib {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut value = self.0;
        let mut units = ["KB", "MB", "GB", "TB", "PB", "EB"].into_iter();
        let mut unit = units.next().unwrap_or_default();
        while value >= 10_000 {
            let Some(next) = units.next() else { break };
            unit = next;
            value = (value >> 10) + ((value >> 9) & 1);
        }
        write!(f, "{value} {unit}")
    }
}

#[cfg(test)]
mod tests {
    extern crate alloc;
    use super::*;
    use alloc::string::ToString;

    fn range(start: u64, len: u64) -> SectorRange {
        SectorRange::new(Sector(start), SectorCount(len)).unwrap()
    }

    #[test]
    fn amounts_keep_four_digits_and_round_half_up() {
        assert_eq!(HumanKib(9999).to_string(), "9999 KB");
        assert_eq!(HumanKib(10_000).to_string(), "10 MB");
        assert_eq!(HumanKib(65_496).to_string(), "64 MB");
        assert_eq!(HumanKib(16 << 20).to_string(), "16 GB");
    }

    #[test]
    fn setting_rounds_outwards_and_clearing_inwards() {
        let device = SectorCount(100);
        assert_eq!(range(7, 2).bits_touched(), BitNr(0)..BitNr(2));
        assert_eq!(range(7, 2).bits_covered(device), BitNr(1)..BitNr(1));
        assert_eq!(range(8, 8).bits_covered(device), BitNr(1)..BitNr(2));
        assert_eq!(range(7, 10).bits_covered(device), BitNr(1)..BitNr(2));
        assert_eq!(range(96, 4).bits_covered(device), BitNr(12)..BitNr(13), "short last block");
        assert_eq!(range(97, 3).bits_covered(device), BitNr(13)..BitNr(13));
        assert_eq!(range(9, 0).bits_touched(), BitNr(1)..BitNr(1));
    }

    #[test]
    fn ranges_do_not_wrap() {
        assert_eq!(SectorRange::new(Sector(u64::MAX), SectorCount(1)), None);
        assert!(range(0, 8).overlaps(range(7, 1)) && !range(0, 8).overlaps(range(8, 1)));
        assert!(range(0, 8).contains(range(7, 1)) && !range(0, 8).contains(range(7, 2)));
        assert_eq!(range(8191, 2).al_extents_touched(), 0..2);
    }
}
