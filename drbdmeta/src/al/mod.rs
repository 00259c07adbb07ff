//! The activity log: a ring of transactions that say which extents may have writes in flight.
//!
//! Spec: metadata.md §3.

mod block;
mod old;
mod replay;
mod ring;

pub use block::{AlBlock, BlockError, EncodeError, Kind, Transaction, initialised_block};
pub use old::{OldScan, scan_old};
pub use replay::{Outcome, Replay, ReplayError, Warning, replay};
pub use ring::AlRing;

/// "No extent" in a slot.
pub const FREE: u32 = 0xFFFF_FFFF;
/// "No slot" in the list of updates.
pub const NO_SLOT: u16 = 0xFFFF;
/// Updates that one block holds.
pub const UPDATES_MAX: usize = 64;
/// Slots that one block repeats.
pub const CONTEXT_LEN: usize = 919;
/// [`CONTEXT_LEN`] for slot arithmetic.
pub const CONTEXT_SLOTS: u16 = 919;
/// Numbers of slots are below this.
pub const SLOTS_MAX: u32 = 65_534;
