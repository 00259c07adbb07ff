//! DRBD meta-data on disk: library and command.
//!
//! The library works on byte slices and on whatever implements [`io::MetaIo`]; only the command
//! opens devices. Nothing else in the project knows an offset or a magic number of this format.
//! The format itself is described in `FORMAT.md`. The library is `no_std`; the feature `std` (on by
//! default) adds [`hold`] and builds the command.

#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(feature = "std")]
extern crate std;

pub mod al;
pub mod bitmap;
pub mod dump;
pub mod fuzz;
#[cfg(feature = "std")]
pub mod hold;
pub mod io;
pub mod last_known;
pub mod layout;
pub mod ops;
pub mod parse;
pub mod superblock;
pub mod units;
pub mod v07;
