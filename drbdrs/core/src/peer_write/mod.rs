//! Writes that this node does for its peer: application writes that are mirrored to it, and the
//! blocks of a resync. Spec: io-path-and-resync.md §2.
//!
//! ```text
//!  received -> (P_RECV_ACK) -> on the disk -> P_WRITE_ACK -> finished in its epoch
//!                                                                   |
//!  P_BARRIER -> receiving stops -> all of the epoch finished -> flush -> P_BARRIER_ACK -> goes on
//! ```
//!
//! The original acknowledges the barrier before the flush, so its peer may forget writes that a
//! power loss still takes away (defect 14.4). Here the flush comes first; nobody can see that on
//! the wire.

pub mod epochs;
