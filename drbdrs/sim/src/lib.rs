//! A world of two nodes in one process: virtual time, disks that forget, a network that breaks.
//!
//! The engine, the packet codec and the meta-data codec are the real ones; everything below them is
//! simulated and driven by one seed, so that the same seed gives the same run.
//!
//! ```text
//!   seed -> scenario -> run (world: nodes, disks, network) -> fine, or a violation -> smaller scenario
//!                        oracle: which values may be read
//! ```
//!
//! Data is simulated by sector: a sector holds a number, 0 for zeroes. Packets travel as encoded
//! bytes, their data beside them.

#![forbid(unsafe_code)]

pub mod agenda;
pub mod buffers;
pub mod chance;
pub mod disk;
pub mod fuzz;
pub mod meta;
pub mod net;
pub mod node;
pub mod oracle;
pub mod run;
pub mod scenario;
pub mod script;
pub mod shrink;
pub mod world;

pub use world::World;
