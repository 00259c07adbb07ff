//! Block devices through the kernel's ublk driver.
//!
//! ```text
//!   control --> driver --> device: add, start, recover, stop --> /dev/ublk-control
//!                   \--Queue--> plane of the resource: server <--> /dev/ublkcN
//! ```
//!
//! [`abi`] knows the kernel's structures, [`driver`] and [`device`] block and run on threads that
//! may, [`server`] carries requests, on the thread of the resource, through its ring. Data is moved by
//! reading and writing the device of the queue (`UBLK_F_USER_COPY`): a request has memory only
//! while it is worked on, and of its own size.

pub mod abi;
pub mod device;
pub mod driver;
pub mod server;
