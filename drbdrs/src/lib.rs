//! The daemon: what connects the replication engine with disks, sockets and applications.
//!
//! [`plane`] is the data plane: one thread per resource, which obeys the engine's actions and
//! reports events to it. [`front`] is how applications reach a device. [`control`] is what
//! administrators talk to, [`status`] what they look at, and [`daemon`] holds all of it together.

#![deny(unsafe_code)]

pub mod control;
pub mod daemon;
pub mod front;
pub mod log;
pub mod plane;
pub mod status;
