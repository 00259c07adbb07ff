//! The NBD server.
//!
//! ```text
//!   door (a thread): accept -> handshake -> Session --> plane of the resource: server
//! ```
//!
//! [`handshake`] and [`proto`] know bytes only; [`door`] owns listening sockets and everything that
//! happens before a device is chosen; [`server`] carries requests, on the thread of the resource.
//! Spec: the NBD protocol, as published with its reference implementation.

pub mod door;
pub mod handshake;
pub mod proto;
pub mod server;
