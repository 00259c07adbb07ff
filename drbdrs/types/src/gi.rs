//! Generation identifiers. Spec: states-and-generations.md §3.1.

use core::fmt;

/// Generation identifier: names a state of the data.
///
/// Bit 0 is no part of the identity. In the current slot it says whether the node is Primary; in
/// the bitmap slot whether it was when the generations parted. Compare with [`Gi::same`]; `==`
/// compares all 64 bits, which is meant only for "is this slot empty".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Gi(pub u64);

impl Gi {
    /// The identifier of meta-data that was just created.
    pub const JUST_CREATED: Self = Self(4);

    /// No generation at all? The flag bit does not count.
    pub const fn is_none(self) -> bool {
        self.0 & !1 == 0
    }

    /// The same generation?
    pub const fn same(self, other: Self) -> bool {
        self.0 | 1 == other.0 | 1
    }

    /// Bit 0.
    pub const fn flag(self) -> bool {
        self.0 & 1 == 1
    }

    /// With bit 0 set or cleared.
    #[must_use]
    pub const fn with_flag(self, flag: bool) -> Self {
        if flag { Self(self.0 | 1) } else { Self(self.0 & !1) }
    }

    /// With bit 0 cleared.
    #[must_use]
    pub const fn without_flag(self) -> Self {
        self.with_flag(false)
    }
}

/// 16 upper-case hexadecimal digits.
impl fmt::Display for Gi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016X}", self.0)
    }
}

/// What stands above the line of identifiers on the page `show-gi`. Spec: metadata.md §8.4.2.
pub const LEGEND_ABOVE: &str = "
       +--<  Current data generation UUID  >-
       |               +--<  Bitmap's base data generation UUID  >-
       |               |                 +--<  younger history UUID  >-
       |               |                 |         +-<  older history  >-
       V               V                 V         V
";

/// What stands below it.
pub const LEGEND_BELOW: &str = "
                                                                    ^ ^ ^ ^ ^ ^ ^
                                      -<  Data consistency flag  >--+ | | | | | |
                             -<  Data was/is currently up-to-date  >--+ | | | | |
                                  -<  Node was/is currently primary  >--+ | | | |
                                  -<  Node was/is currently connected  >--+ | | |
         -<  Node was in the progress of setting all bits in the bitmap  >--+ | |
                        -<  The peer's disk was out-dated or inconsistent  >--+ |
      -<  This node was a crashed primary, and has not seen its peer since   >--+

";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bit_0_does_not_count() {
        assert!(Gi(0x10).same(Gi(0x11)));
        assert!(!Gi(0x10).same(Gi(0x12)));
        assert!(Gi(0x11).flag() && !Gi(0x10).flag());
        assert_eq!(Gi(0x10).with_flag(true), Gi(0x11));
        assert_eq!(Gi(0x11).without_flag(), Gi(0x10));
    }
}
