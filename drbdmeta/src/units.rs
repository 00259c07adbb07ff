//! Units: every number on disk has one, and they do not mix.

use core::fmt;

/// A place on a device, in bytes from its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteOffset(pub u64);

/// A length in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteLen(pub u64);

/// A count of 512-byte sectors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct SectorCount(pub u64);

/// Number of a bitmap bit; it stands for 4 KiB of data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct BitNr(pub u64);

/// A count of bitmap bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct BitCount(pub u64);

/// Number of an activity-log extent; it stands for 4 MiB of data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct AlExtentNr(pub u32);

/// A data generation identifier. The lowest bit is a flag ("written while Primary").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gi(pub u64);

impl Gi {
    /// The identifier of meta-data that was just created.
    pub const JUST_CREATED: Self = Self(4);

    /// Same generation? The flag bit does not count.
    pub const fn is_same_generation(self, other: Self) -> bool {
        self.0 | 1 == other.0 | 1
    }

    /// No generation at all?
    pub const fn is_none(self) -> bool {
        self.0 & !1 == 0
    }
}

impl fmt::Display for Gi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016X}", self.0)
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
    use super::*;
    use alloc::string::ToString;

    #[test]
    fn amounts_keep_four_digits_and_round_half_up() {
        assert_eq!(HumanKib(9999).to_string(), "9999 KB");
        assert_eq!(HumanKib(10_000).to_string(), "10 MB");
        assert_eq!(HumanKib(65_496).to_string(), "64 MB");
        assert_eq!(HumanKib(16 << 20).to_string(), "16 GB");
    }

    #[test]
    fn the_flag_bit_is_no_part_of_a_generation() {
        assert!(Gi(6).is_same_generation(Gi(7)));
        assert!(!Gi(6).is_same_generation(Gi(8)));
        assert!(Gi(1).is_none());
    }
}
