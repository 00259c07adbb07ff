//! What two nodes say to each other: bytes to typed packets and back, protocol 86 to 101.
//!
//! Nothing here opens a socket, keeps a connection or decides anything. Input is hostile: lengths
//! are checked before anything is kept, and every violation is a [`PeerError`] with a name.
//! Spec: wire-protocol.md.

#![no_std]
#![forbid(unsafe_code)]
#![deny(clippy::indexing_slicing)]
#![cfg_attr(test, allow(clippy::indexing_slicing, reason = "a panic is how a test fails"))]

extern crate alloc;

pub mod bitmap;
mod codec;
pub mod command;
pub mod digest;
mod error;
pub mod frame;
pub mod fuzz;
mod layout;
pub mod packet;
#[cfg(test)]
mod packet_tests;

pub use codec::{decode, encode};
pub use command::Command;
pub use digest::{Algorithm, Digest};
pub use error::PeerError;
pub use frame::{Context, Incoming, Reader, Stream, Want};
pub use packet::{BlockId, Packet};
