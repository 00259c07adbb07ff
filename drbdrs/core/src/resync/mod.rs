//! Bringing two disks back in sync: the arithmetic and the exclusion, each piece on its own.
//!
//! Nothing here keeps a bitmap, sends a packet or looks at a clock; the modules answer questions
//! with numbers. Spec: io-path-and-resync.md §6.7, §8, states-and-generations.md §11.4.

#[cfg(test)]
pub(crate) mod chance;
pub mod controller;
pub mod dependency;
pub mod extents;
pub mod progress;
pub mod throttle;
