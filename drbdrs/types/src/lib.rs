//! Units, numbers and every user-visible spelling of drbdrs.
//!
//! So far: generation identifiers, roles and disk states, as far as the handshake decision needs
//! them. No clock, socket or file can be named here.

#![no_std]
#![forbid(unsafe_code)]

mod gi;
mod state;

pub use gi::Gi;
pub use state::{Dstate, Role};
