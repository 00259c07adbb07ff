//! Units, numbers and every user-visible spelling of drbdrs.
//!
//! No clock, socket or file can be named here.

#![no_std]
#![forbid(unsafe_code)]

mod gi;
mod state;
pub mod units;

pub use gi::Gi;
pub use state::{Dstate, Role};
pub use units::{
    AlExtentNr, BitCount, BitNr, ByteLen, ByteOffset, Deciseconds, HumanKib, Minor, RsExtentNr,
    Sector, SectorCount, SectorRange, Tick, VolumeNr,
};
