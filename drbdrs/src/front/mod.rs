//! Ways for applications to use a device.

pub mod nbd;
