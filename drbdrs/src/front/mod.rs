//! Ways for applications to use a device.

pub mod kernel;
pub mod nbd;
pub mod ublk;
