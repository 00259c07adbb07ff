//! The data plane. It decides nothing about roles, connections or disks: `drbd_core` does.
//!
//! ```text
//!   front::nbd --\                /--> disk ---\
//!                 run (the engine)              io: ring | threads --> kernel
//!   commands ----/                \--> link ---/
//!                      buf (all payload)
//! ```

pub mod buf;
pub mod disk;
pub mod fault;
pub mod helpers;
pub mod io;
pub mod ring;
pub mod threads;
