//! The admin protocol between `drbdsetup`/`drbdadm` and the daemon, and every status view as a
//! pure function of a [`Snapshot`].
//!
//! The protocol is described for people in `drbdrs/docs/admin-protocol.md`; a test keeps the
//! examples there and these types equal.

#![forbid(unsafe_code)]

mod answer;
mod handshake;
mod latency;
pub mod names;
mod options;
pub mod render;
mod request;
mod snapshot;
pub mod wire;

pub use answer::{Answer, HelperCall, HelperPhase, Reply, Update};
pub use handshake::{Handshake, HandshakeSide, Outcome};
pub use latency::{Histogram, Latencies};
pub use options::{OptionError, OptionSet, OptionValue, Section};
pub use request::{
    Address, DiskOperation, Effect, Envelope, Family, Fault, MetaIndex, NetStream, Request, Target,
};
pub use snapshot::{
    Backing, Cache, Connection, Counters, Daemon, Generations, Progress, Reason, Resource,
    Snapshot, Suspended, Volume, WaitClass, Window, WriteOrdering,
};

/// Version of the protocol. A request with another one is answered with failure 126.
pub const VERSION: u32 = 1;

/// Longest line in bytes, line end included; a longer one ends the connection.
pub const LINE_MAX: usize = 64 << 20;

/// Longest line of a request in bytes.
pub const REQUEST_MAX: usize = 64 << 10;
