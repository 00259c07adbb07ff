//! Units, numbers and every user-visible spelling of drbdrs.
//!
//! No clock, socket or file can be named here.

#![no_std]
#![forbid(unsafe_code)]

pub mod failure;
mod gi;
pub mod refusal;
mod state;
mod state_word;
pub mod units;

pub use failure::Failure;
pub use gi::{Gi, LEGEND_ABOVE, LEGEND_BELOW};
pub use refusal::Refusal;
pub use state::{Cstate, Dstate, Role};
pub use state_word::{BadStateWord, Fields, StateWord};
pub use units::{
    AlExtentNr, BitCount, BitNr, ByteLen, ByteOffset, Deciseconds, HumanKib, Minor, RsExtentNr,
    Sector, SectorCount, SectorRange, Tick, VolumeNr,
};
