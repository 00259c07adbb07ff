//! The kernel's NBD driver as a driver of block devices: it gets its sockets from us through generic
//! netlink, and their other ends are clients of the server in the thread of the resource.
//!
//! When a daemon dies, the driver keeps device and requests for some time. A successor hands it new
//! sockets, and it sends again what was not answered. Whose device it is says its backend identifier.
//! Spec: linux/nbd-netlink.h, linux/nbd.h.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use drbd_conf::settings::Settings;
use drbd_core::action::DeviceOffer;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair, sockopt};

use super::netlink::{Attributes, Family};
use super::{Device, Driver, ForPlane, Volume};
use crate::front::nbd::handshake::Contexts;
use crate::front::nbd::proto::ExportFlags;
use crate::front::nbd::server::Session;

const FAMILY: &str = "nbd";
const CONNECT: u8 = 1;
const DISCONNECT: u8 = 2;
const RECONFIGURE: u8 = 3;

/// Attributes of the family.
mod attr {
    pub(super) const INDEX: u16 = 1;
    pub(super) const SIZE_BYTES: u16 = 2;
    pub(super) const BLOCK_SIZE_BYTES: u16 = 3;
    pub(super) const TIMEOUT: u16 = 4;
    pub(super) const SERVER_FLAGS: u16 = 5;
    pub(super) const CLIENT_FLAGS: u16 = 6;
    pub(super) const SOCKETS: u16 = 7;
    pub(super) const DEAD_CONN_TIMEOUT: u16 = 8;
    pub(super) const BACKEND_IDENTIFIER: u16 = 10;
    /// Within [`SOCKETS`]: one of them, and its number.
    pub(super) const SOCK_ITEM: u16 = 1;
    pub(super) const SOCK_FD: u16 = 1;
}

/// `NBD_CFLAG_DISCONNECT_ON_CLOSE`.
const DISCONNECT_ON_CLOSE: u64 = 2;
/// Room in each direction of a socket: requests for some large writes.
const SOCKET_BYTES: usize = 4 << 20;
/// With one connection the driver looks at requests that take so long (ms): if they went to a
/// connection that was replaced, they are sent again. With several connections it gives such a
/// connection up, however alive it is, and must not be so quick.
const LOOK_AGAIN_MS: u32 = 2000;
/// How long a device is asked for again whose users are about to leave: udev looks into every
/// device that was written to.
const USERS_MAX: Duration = Duration::from_secs(1);
/// How long the driver may take to notice that the sockets of a dead daemon are closed.
const NOTICE_MAX: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(20);

/// The driver.
#[derive(Clone, Debug)]
pub struct Nbd {
    /// Tells daemons of one machine apart.
    place: String,
    connections: u32,
    dead_timeout: u64,
}

impl Nbd {
    /// For a daemon with these settings.
    pub fn new(settings: &Settings) -> Self {
        Self {
            place: settings.node.admin_socket.display().to_string(),
            connections: settings.nbd_kernel.connections.clamp(1, 16),
            dead_timeout: settings.nbd_kernel.dead_timeout.into(),
        }
    }

    /// The backend identifier of a volume's device.
    fn mark(&self, volume: &Volume) -> String {
        format!("drbdrs {} {}/{}", self.place, volume.resource, volume.nr.0)
    }
}

impl Driver for Nbd {
    fn name(&self) -> &'static str {
        "nbd-kernel"
    }

    fn probe(&self) -> io::Result<()> {
        if Family::find(FAMILY).is_ok() {
            return Ok(());
        }
        // If this fails, the next line says what is missing.
        let _ = std::process::Command::new("modprobe").args(["-q", "nbd"]).status();
        Family::find(FAMILY).map(drop).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => {
                io::Error::other("the kernel has no NBD driver (module nbd)")
            }
            _ => error,
        })
    }

    fn start(&self, volume: &Volume) -> io::Result<Box<dyn Device>> {
        let mut disk = Disk::new(self, volume, 0)?;
        disk.connect(&volume.offer)?;
        Ok(Box::new(disk))
    }

    fn find(&self, volume: &Volume) -> Option<PathBuf> {
        let mark = self.mark(volume);
        let names = std::fs::read_dir("/sys/block").ok()?.flatten();
        let mut nodes = names.map(|entry| Path::new("/dev").join(entry.file_name()));
        nodes.find(|node| index_of(node).is_some_and(|index| is_marked(index, &mark)))
    }

    fn take_over(&self, volume: &Volume, node: &Path) -> io::Result<Box<dyn Device>> {
        let index = index_of(node).ok_or(io::ErrorKind::NotFound)?;
        let mut disk = Disk::new(self, volume, index)?;
        let end = Instant::now() + NOTICE_MAX;
        for nr in 0..self.connections {
            while !disk.reconnect()? {
                if Instant::now() >= end {
                    let text = format!("only {nr} of its connections are waiting");
                    return Err(io::Error::other(text));
                }
                std::thread::sleep(PAUSE);
            }
        }
        disk.change(&volume.offer)?;
        Ok(Box::new(disk))
    }

    fn discard(&self, volume: &Volume, node: &Path) -> io::Result<()> {
        Disk::new(self, volume, index_of(node).ok_or(io::ErrorKind::NotFound)?)?.stop()
    }
}

fn index_of(node: &Path) -> Option<u32> {
    node.to_str()?.strip_prefix("/dev/nbd")?.parse().ok()
}

fn folder(index: u32) -> PathBuf {
    format!("/sys/block/nbd{index}").into()
}

fn is_marked(index: u32, mark: &str) -> bool {
    // Not there before Linux 5.14: then nothing can be taken over.
    let found = std::fs::read_to_string(folder(index).join("backend"));
    found.is_ok_and(|found| found.trim_end() == mark)
}

fn is_connected(index: u32) -> bool {
    folder(index).join("pid").exists()
}

/// What the driver is told of the server.
fn flags_of(offer: &DeviceOffer, connections: u32) -> ExportFlags {
    let mut flags = ExportFlags::HAS_FLAGS
        | ExportFlags::SEND_FLUSH
        | ExportFlags::SEND_FUA
        | ExportFlags::SEND_WRITE_ZEROES;
    flags.set(ExportFlags::SEND_TRIM, offer.max_discard > 0);
    flags.set(ExportFlags::CAN_MULTI_CONN, connections > 1);
    flags
}

fn size_of(offer: &DeviceOffer) -> u64 {
    offer.size.to_bytes().map_or(0, |bytes| bytes.0)
}

/// A disk.
struct Disk {
    family: Family,
    volume: Volume,
    mark: String,
    connections: u32,
    dead_timeout: u64,
    index: u32,
    /// Bytes that the driver knows.
    size: u64,
}

impl Disk {
    fn new(driver: &Nbd, volume: &Volume, index: u32) -> io::Result<Self> {
        Ok(Self {
            family: Family::find(FAMILY)?,
            volume: volume.clone(),
            mark: driver.mark(volume),
            connections: driver.connections,
            dead_timeout: driver.dead_timeout,
            index,
            size: 0,
        })
    }

    /// Takes the first free device.
    fn connect(&mut self, offer: &DeviceOffer) -> io::Result<()> {
        let size = size_of(offer);
        let pairs = (0..self.connections).map(|_| pair()).collect::<io::Result<Vec<_>>>()?;
        let kernel: Vec<_> = pairs.iter().map(|(theirs, _)| theirs).collect();
        let attributes = Attributes::new()
            .u64(attr::SIZE_BYTES, size)
            .u64(attr::BLOCK_SIZE_BYTES, offer.logical_block.into())
            .u64(attr::TIMEOUT, 0)
            .u64(attr::SERVER_FLAGS, flags_of(offer, self.connections).bits().into())
            .u64(attr::CLIENT_FLAGS, 0)
            .u64(attr::DEAD_CONN_TIMEOUT, self.dead_timeout)
            .text(attr::BACKEND_IDENTIFIER, &self.mark)
            .nested(attr::SOCKETS, &sockets(&kernel));
        // Whoever opens the device at once has somebody to answer.
        let answer = self.family.ask(CONNECT, &attributes)?;
        self.index = answer.u32(attr::INDEX).ok_or(io::ErrorKind::InvalidData)?;
        self.size = size;
        let served = pairs.into_iter().try_for_each(|(_, ours)| self.serve(ours));
        if let Err(error) = served {
            let _ = self.stop();
            return Err(error);
        }
        if self.connections == 1 {
            let path = folder(self.index).join("queue/io_timeout");
            if let Err(error) = std::fs::write(&path, LOOK_AGAIN_MS.to_string()) {
                tracing::debug!("{}: {error}", path.display());
            }
        }
        Ok(())
    }

    fn serve(&self, socket: OwnedFd) -> io::Result<()> {
        let session = Session {
            socket,
            volume: self.volume.nr,
            is_kernel: true,
            structured: false,
            contexts: Contexts::empty(),
            rest: Vec::new(),
        };
        let is_taken = (self.volume.to_plane)(ForPlane::Nbd(session));
        is_taken.then_some(()).ok_or_else(|| io::Error::other("the resource is shut down"))
    }

    /// Replaces one dead connection. False: there is none.
    fn reconnect(&mut self) -> io::Result<bool> {
        let (theirs, ours) = pair()?;
        match self.reconfigure(|with| with.nested(attr::SOCKETS, &sockets(&[&theirs]))) {
            Ok(()) => self.serve(ours).map(|()| true),
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn reconfigure(&mut self, with: impl FnOnce(Attributes) -> Attributes) -> io::Result<()> {
        let attributes = Attributes::new()
            .u32(attr::INDEX, self.index)
            .u64(attr::DEAD_CONN_TIMEOUT, self.dead_timeout)
            .text(attr::BACKEND_IDENTIFIER, &self.mark);
        self.family.ask(RECONFIGURE, &with(attributes)).map(drop)
    }

    fn open(&self) -> io::Result<File> {
        File::open(self.node())
    }

    /// The driver ends a device with this flag when its last user closes it; we become the last one
    /// unless there is another.
    fn end_if_last(&mut self) -> io::Result<bool> {
        self.reconfigure(|with| with.u64(attr::CLIENT_FLAGS, DISCONNECT_ON_CLOSE))?;
        let opened = self.open();
        drop(opened);
        if !is_connected(self.index) {
            return Ok(true);
        }
        self.reconfigure(|with| with.u64(attr::CLIENT_FLAGS, 0)).map(|()| false).or_else(|error| {
            // The last user left in between.
            if is_connected(self.index) { Err(error) } else { Ok(true) }
        })
    }
}

impl Device for Disk {
    fn node(&self) -> PathBuf {
        format!("/dev/nbd{}", self.index).into()
    }

    fn change(&mut self, offer: &DeviceOffer) -> io::Result<()> {
        let size = size_of(offer);
        if size != self.size {
            self.reconfigure(|with| with.u64(attr::SIZE_BYTES, size))?;
            self.size = size;
        }
        Ok(())
    }

    fn stop_unless_open(&mut self) -> io::Result<bool> {
        let end = Instant::now() + USERS_MAX;
        loop {
            if self.end_if_last()? {
                return Ok(true);
            }
            if Instant::now() >= end {
                return Ok(false);
            }
            std::thread::sleep(PAUSE);
        }
    }

    fn stop(&mut self) -> io::Result<()> {
        let attributes = Attributes::new().u32(attr::INDEX, self.index);
        self.family.ask(DISCONNECT, &attributes).map(drop)
    }

    fn mend(&mut self) -> io::Result<()> {
        for _ in 0..self.connections {
            if !self.reconnect()? {
                break;
            }
        }
        Ok(())
    }
}

fn sockets(fds: &[&OwnedFd]) -> Attributes {
    fds.iter().fold(Attributes::new(), |list, fd| {
        let fd = Attributes::new().u32(attr::SOCK_FD, fd.as_raw_fd().cast_unsigned());
        list.nested(attr::SOCK_ITEM, &fd)
    })
}

/// The driver's end and ours.
fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (family, kind) = (AddressFamily::UNIX, SocketType::STREAM);
    let (theirs, ours) = socketpair(family, kind, SocketFlags::CLOEXEC, None)?;
    for end in [&theirs, &ours] {
        // Without the privilege for more than the system's limit, that limit is it.
        let _ = sockopt::set_socket_send_buffer_size_force(end, SOCKET_BYTES);
    }
    Ok((theirs, ours))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_nodes_of_the_driver_have_an_index() {
        for (node, index) in [
            ("/dev/nbd0", Some(0)),
            ("/dev/nbd12", Some(12)),
            ("/dev/ublkb0", None),
            ("/dev/nbd", None),
        ] {
            assert_eq!(index_of(Path::new(node)), index, "{node}");
        }
    }

    #[test]
    fn a_device_that_cannot_discard_is_not_asked_to() {
        let mut offer = DeviceOffer {
            size: drbd_types::SectorCount(8),
            is_primary: true,
            is_continued: false,
            max_io: 4096,
            max_discard: 0,
            max_write_zeroes: 0,
            logical_block: 512,
            physical_block: 4096,
        };
        assert!(!flags_of(&offer, 1).contains(ExportFlags::SEND_TRIM));
        assert!(!flags_of(&offer, 1).contains(ExportFlags::CAN_MULTI_CONN));
        offer.max_discard = 4096;
        assert!(flags_of(&offer, 2).contains(ExportFlags::SEND_TRIM | ExportFlags::CAN_MULTI_CONN));
    }
}
