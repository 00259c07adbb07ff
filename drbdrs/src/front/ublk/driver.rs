//! ublk as a driver of block devices.
//!
//! The kernel keeps a device whose daemon has died, with all requests that were not answered, and
//! with a mark that says whose it was: a daemon that is started again needs no notes to find it.

use std::io;
use std::path::{Path, PathBuf};

use drbd_conf::settings::{IoBackend, Settings};
use drbd_core::action::DeviceOffer;

use super::abi::{DeviceInfo, state};
use super::device::{Control, Shape};
use super::server::Queue;
use crate::front::kernel::{Device, Driver, ForPlane, Volume, users};

/// Devices of this kernel's ublk driver.
const KNOWN: &str = "/sys/class/ublk-char";
const DISK: &str = "/dev/ublkb";

/// The driver.
#[derive(Debug)]
pub struct Ublk {
    /// Tells daemons of one machine apart.
    place: Vec<u8>,
    has_ring: bool,
}

impl Ublk {
    /// For a daemon with these settings.
    pub fn new(settings: &Settings) -> Self {
        let place = settings.node.admin_socket.as_os_str().as_encoded_bytes().to_vec();
        Self { place, has_ring: settings.io.backend != IoBackend::Threads }
    }

    /// What devices of a volume are marked with.
    fn mark(&self, volume: &Volume) -> u64 {
        let nr = volume.nr.0.to_be_bytes();
        let minor = volume.minor.to_be_bytes();
        let parts = [&self.place[..], b"\0", volume.resource.as_bytes(), b"\0", &nr, &minor];
        // FNV-1a
        parts.into_iter().flatten().fold(0xCBF2_9CE4_8422_2325, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01B3)
        })
    }
}

impl Driver for Ublk {
    fn name(&self) -> &'static str {
        "ublk"
    }

    fn probe(&self) -> io::Result<()> {
        if !self.has_ring {
            return Err(io::Error::other("needs io_uring, and the settings say threads"));
        }
        if !Path::new(super::abi::CONTROL).exists() {
            // If this fails, opening it says what is missing.
            let _ = std::process::Command::new("modprobe").args(["-q", "ublk_drv"]).status();
        }
        Control::open().map(drop)
    }

    fn start(&self, volume: &Volume) -> io::Result<Box<dyn Device>> {
        let control = Control::open()?;
        let mark = self.mark(volume);
        for info in existing(&control).filter(|info| info.mark == mark) {
            // It never was a disk, or is none any more.
            control.delete(info.id)?;
        }
        let mut disk = Disk { control, volume: volume.clone(), mark, id: volume.minor, size: 0 };
        disk.start()?;
        Ok(Box::new(disk))
    }

    fn find(&self, volume: &Volume) -> Option<PathBuf> {
        let control = Control::open().ok()?;
        let mark = self.mark(volume);
        let waits = |info: &DeviceInfo| info.mark == mark && info.state != state::DEAD;
        existing(&control).find(waits).map(|info| disk(info.id))
    }

    fn take_over(&self, volume: &Volume, node: &Path) -> io::Result<Box<dyn Device>> {
        let id = id_of(node).ok_or(io::ErrorKind::NotFound)?;
        let control = Control::open()?;
        let queue = control.recover(volume.nr, id)?;
        serve(volume, queue)?;
        control.recovered(id)?;
        let size = control.size(id)?;
        let mark = self.mark(volume);
        let mut disk = Disk { control, volume: volume.clone(), mark, id, size };
        if let Err(error) = disk.change(&volume.offer) {
            tracing::warn!("{}: {error}", disk.node().display());
        }
        Ok(Box::new(disk))
    }

    fn discard(&self, _: &Volume, node: &Path) -> io::Result<()> {
        let id = id_of(node).ok_or(io::ErrorKind::NotFound)?;
        let control = Control::open()?;
        control.stop(id)?;
        control.delete(id)
    }
}

fn existing(control: &Control) -> impl Iterator<Item = DeviceInfo> {
    let names = std::fs::read_dir(KNOWN).into_iter().flatten().flatten();
    names.filter_map(|entry| {
        let id = entry.file_name().to_str()?.strip_prefix("ublkc")?.parse().ok()?;
        control.info(id).ok()
    })
}

fn disk(id: u32) -> PathBuf {
    format!("{DISK}{id}").into()
}

fn id_of(node: &Path) -> Option<u32> {
    node.to_str()?.strip_prefix(DISK)?.parse().ok()
}

fn serve(volume: &Volume, queue: Queue) -> io::Result<()> {
    let is_taken = (volume.to_plane)(ForPlane::Ublk(queue));
    is_taken.then_some(()).ok_or_else(|| io::Error::other("the resource is shut down"))
}

/// A disk.
struct Disk {
    control: Control,
    volume: Volume,
    mark: u64,
    id: u32,
    /// Sectors that the kernel knows.
    size: u64,
}

impl Disk {
    /// Makes it, with its id if that is free.
    fn start(&mut self) -> io::Result<()> {
        let shape = shape_of(&self.volume);
        let (id, queue) = self.control.add(self.volume.nr, self.id, self.mark, &shape)?;
        let started = serve(&self.volume, queue).and_then(|()| self.control.start(id));
        if let Err(error) = started {
            let _ = self.control.delete(id);
            return Err(error);
        }
        (self.id, self.size) = (id, shape.size);
        Ok(())
    }
}

impl Device for Disk {
    fn node(&self) -> PathBuf {
        disk(self.id)
    }

    fn change(&mut self, offer: &DeviceOffer) -> io::Result<()> {
        self.volume.offer = *offer;
        if offer.size.0 == self.size {
            // Limits of requests are kept by cutting.
            return Ok(());
        }
        if self.control.can_resize() {
            self.control.resize(self.id, offer.size.0)?;
            self.size = offer.size.0;
            return Ok(());
        }
        // Kernels before 6.16 do not change a disk: it is made anew, if nobody sees that.
        if !self.stop_unless_open()? {
            let text = "this kernel changes the size only while nobody has the device open";
            return Err(io::Error::other(text));
        }
        self.start()
    }

    fn stop_unless_open(&mut self) -> io::Result<bool> {
        let Some(claim) = users::claim(&self.node())? else { return Ok(false) };
        self.control.stop(self.id)?;
        drop(claim);
        self.control.delete(self.id)?;
        Ok(true)
    }

    fn stop(&mut self) -> io::Result<()> {
        self.control.stop(self.id)?;
        self.control.delete(self.id)
    }
}

fn shape_of(volume: &Volume) -> Shape {
    let offer = &volume.offer;
    Shape {
        size: offer.size.0,
        logical_block: offer.logical_block,
        physical_block: offer.physical_block,
        max_discard: offer.max_discard,
        max_write_zeroes: offer.max_write_zeroes,
        is_rotational: volume.is_rotational,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_tell_volumes_and_daemons_apart() {
        let volume = |resource: &str, nr| Volume {
            resource: resource.into(),
            nr: drbd_types::VolumeNr(nr),
            minor: 0,
            offer: DeviceOffer { is_primary: true, ..DeviceOffer::NOTHING },
            is_rotational: false,
            to_plane: std::sync::Arc::new(|_| false),
        };
        let here = Ublk { place: b"/run/a".to_vec(), has_ring: true };
        let there = Ublk { place: b"/run/b".to_vec(), has_ring: true };
        let marks = [
            here.mark(&volume("r0", 0)),
            here.mark(&volume("r0", 1)),
            here.mark(&volume("r1", 0)),
            there.mark(&volume("r0", 0)),
        ];
        let different: std::collections::BTreeSet<_> = marks.iter().collect();
        assert_eq!(different.len(), marks.len());
        assert_eq!(marks[0], here.mark(&volume("r0", 0)));
    }
}
