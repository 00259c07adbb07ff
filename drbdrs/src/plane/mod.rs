//! The data plane. It decides nothing about roles, connections or disks: `drbd_core` does.
//!
//! ```text
//!   front::nbd --\                /--> disk ---\
//!                 run (the engine)              io: ring | threads --> kernel
//!   commands ----/                \--> link ---/
//!                      buf (all payload)
//! ```

use drbd_core::event::Event;
use drbd_core::ids::BufId;
use drbd_types::Tick;
use drbd_wire::Algorithm;

pub mod buf;
pub mod disk;
pub mod fault;
pub mod helpers;
pub(crate) mod inbox;
pub mod io;
pub mod link;
pub(crate) mod outbox;
pub mod ring;
pub mod run;
mod socket;
mod spin;
pub mod status;
pub mod sys;
pub mod threads;
pub mod ublk;

/// Length of the shared buffer of zeroes, bytes.
pub const ZEROES_LEN: usize = 65_536;

/// What the parts of the plane work with; borrowed from it for each call.
pub struct Env<'a> {
    /// The kernel.
    pub io: &'a mut dyn io::Backend,
    /// Memory.
    pub pool: &'a mut buf::Pool,
    /// Fault points.
    pub faults: &'a mut fault::Faults,
    /// [`ZEROES_LEN`] zero bytes.
    pub zeroes: BufId,
    /// For `csums-alg` and `verify-alg`.
    pub digests: [Option<Algorithm>; 2],
    /// Now.
    pub now: Tick,
    /// For the engine.
    pub events: &'a mut Vec<Event>,
}
