//! The engine against a peer that is played packet by packet: every packet type, at the right and at
//! the wrong time. Spec: wire-protocol.md §4.2, §5.5, §6, §8, §9, §16; io-path-and-resync.md §13.5.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::cast_possible_truncation, reason = "small numbers")]

mod bad;
mod conflicts;
mod disk;
mod frozen;
mod peer;
mod resync;
mod rig;
mod writes;
