//! Units: every number on disk has one, and they do not mix. They are those of `drbd-types`.

pub use drbd_types::Gi;
pub use drbd_types::units::{
    AlExtentNr, BitCount, BitNr, ByteLen, ByteOffset, HumanKib, SectorCount,
};
