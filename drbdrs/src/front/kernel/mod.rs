//! Block devices of this kernel: what a driver must do for a volume, and where its node is found.
//!
//! A device is there while its volume is Primary. It comes with the promotion, before that is
//! answered, and goes with the demotion, which is refused while somebody holds it open. The reasons
//! are in `drbdrs/docs/devices.md`.
//!
//! Everything here may block, and is called on threads that may.

pub mod guard;
pub mod links;
pub mod nbd;
mod netlink;
pub mod users;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use drbd_core::action::DeviceOffer;
use drbd_types::VolumeNr;

use super::nbd::server::Session;
use super::ublk::server::Queue;

/// What a device hands over to the thread of its resource.
#[derive(Debug)]
pub enum ForPlane {
    /// The server's end of a connection of the kernel's NBD driver.
    Nbd(Session),
    /// The queue of a ublk device.
    Ublk(Queue),
}

/// The way to the thread of the resource. False: it is gone.
pub type ToPlane = Arc<dyn Fn(ForPlane) -> bool + Send + Sync>;

/// For which volume a device is made.
#[derive(Clone)]
pub struct Volume {
    /// Name of its resource.
    pub resource: String,
    /// Which of its volumes.
    pub nr: VolumeNr,
    /// Minor number: N of `/dev/drbdN`.
    pub minor: u32,
    /// What the device is to offer.
    pub offer: DeviceOffer,
    /// There is a turning disk behind it.
    pub is_rotational: bool,
    /// Where its requests are carried out.
    pub to_plane: ToPlane,
}

/// A driver of block devices.
pub trait Driver: Send + Sync {
    /// Its name in messages.
    fn name(&self) -> &'static str;

    /// Makes sure that the kernel has it, loading its module if need be.
    ///
    /// # Errors
    /// It has not, or we may not use it; the text says what is missing.
    fn probe(&self) -> io::Result<()>;

    /// Makes a device. When this returns, it can be opened.
    ///
    /// # Errors
    /// The kernel refuses.
    fn start(&self, volume: &Volume) -> io::Result<Box<dyn Device>>;

    /// The device that a daemon which is gone has made for this volume, and for which the kernel
    /// still waits for a successor.
    fn find(&self, volume: &Volume) -> Option<PathBuf>;

    /// Becomes that successor. Requests that were not answered come again. Only for a volume that
    /// [`DeviceOffer::is_continued`]: whoever has the device open must find the data that it knows.
    ///
    /// # Errors
    /// The kernel waits no more.
    fn take_over(&self, volume: &Volume, node: &Path) -> io::Result<Box<dyn Device>>;

    /// Ends such a device. Whoever has it open gets errors.
    ///
    /// # Errors
    /// The kernel refuses.
    fn discard(&self, volume: &Volume, node: &Path) -> io::Result<()>;
}

/// A block device. Dropped, it is left to a successor.
pub trait Device: Send {
    /// Its node: where the kernel put it.
    fn node(&self) -> PathBuf;

    /// Takes over size and limits, as far as a device that is in use allows.
    ///
    /// # Errors
    /// The kernel refuses.
    fn change(&mut self, offer: &DeviceOffer) -> io::Result<()>;

    /// Ends the device unless somebody holds it open. What was written before is on its way.
    /// False: somebody does, and nothing has changed.
    ///
    /// # Errors
    /// The kernel refuses; nothing has changed.
    fn stop_unless_open(&mut self) -> io::Result<bool>;

    /// Makes good what the kernel has lost of its ways to us.
    ///
    /// # Errors
    /// The kernel refuses.
    fn mend(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Ends the device. Whoever holds it open gets errors.
    ///
    /// # Errors
    /// The kernel refuses.
    fn stop(&mut self) -> io::Result<()>;
}
