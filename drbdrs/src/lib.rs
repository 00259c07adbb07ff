//! The daemon: what connects the replication engine with disks, sockets and applications.
//!
//! [`plane`] is the data plane: one thread per resource, which obeys the engine's actions and
//! reports events to it. [`front`] is how applications reach a device.

#![deny(unsafe_code)]

pub mod front;
pub mod plane;
