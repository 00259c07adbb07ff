//! Commands to the kernel's ublk driver. They block: they are for threads that may wait.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use drbd_types::VolumeNr;

use super::abi::{self, DeviceInfo, Features, Params, control};
use super::server::Queue;
use crate::plane::io::Fd;
use crate::plane::ublk::{self, Nothing, Table};

/// Requests at a time.
const DEPTH: u16 = 128;
/// Largest request; larger ones than the device takes are cut.
const MAX_IO: u32 = 1 << 20;
/// How long a node in `/dev`, or the end of a dead server, is waited for.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(5);
const PATIENCE_FOR_NUMBER: Duration = Duration::from_secs(2);

/// What is needed of the driver.
const NEEDED: Features = Features::USER_RECOVERY
    .union(Features::USER_RECOVERY_REISSUE)
    .union(Features::IOCTL_ENCODE)
    .union(Features::USER_COPY);

/// How a disk looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Sectors.
    pub size: u64,
    /// Bytes.
    pub logical_block: u32,
    /// Bytes.
    pub physical_block: u32,
    /// Bytes; 0: no discards.
    pub max_discard: u32,
    /// Bytes; 0: zeroes are data.
    pub max_write_zeroes: u32,
    /// It turns.
    pub is_rotational: bool,
}

impl Shape {
    fn params(&self) -> Params {
        let shift = |bytes: u32| u8::try_from(bytes.clamp(512, 4096).trailing_zeros()).unwrap_or(9);
        let rotational = if self.is_rotational { abi::ATTR_ROTATIONAL } else { 0 };
        let logical = shift(self.logical_block);
        let physical = shift(self.physical_block).max(logical);
        let largest = u32::MAX >> 9 << 9;
        let params = Params {
            len: u32::try_from(size_of::<Params>()).unwrap_or(0),
            types: abi::PARAM_BASIC,
            attributes: abi::ATTR_VOLATILE_CACHE | abi::ATTR_FUA | rotational,
            logical_shift: logical,
            physical_shift: physical,
            io_min_shift: physical,
            io_opt_shift: 0,
            max_sectors: MAX_IO / 512,
            sectors: self.size,
            ..Params::default()
        };
        if self.max_discard == 0 && self.max_write_zeroes == 0 {
            return params;
        }
        Params {
            types: params.types | abi::PARAM_DISCARD,
            discard_granularity: 1 << logical,
            max_discard_sectors: self.max_discard.min(largest) / 512,
            max_zeroes_sectors: self.max_write_zeroes.min(largest) / 512,
            max_discard_segments: 1,
            ..params
        }
    }
}

/// The way to the kernel's driver.
#[derive(Debug)]
pub struct Control {
    file: OwnedFd,
    features: Features,
}

impl Control {
    /// Opens it.
    ///
    /// # Errors
    /// This kernel has none, or not one of the abilities that are needed.
    pub fn open() -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(abi::CONTROL);
        let file = file
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", abi::CONTROL)))?;
        let file = OwnedFd::from(file);
        let mut features = 0_u64;
        let old = |error| io::Error::other(format!("the kernel's ublk driver is too old: {error}"));
        ublk::control(&file, control::GET_FEATURES, abi::ANY_ID, 0, &mut features).map_err(old)?;
        let features = Features::from_bits_retain(features);
        if !features.contains(NEEDED) {
            return Err(old(io::Error::other(format!("{:?} is missing", NEEDED - features))));
        }
        Ok(Self { file, features })
    }

    /// A new device, with this mark; `wanted` is its id if that is free. The queue must be served
    /// before [`Self::start`].
    ///
    /// # Errors
    /// The kernel refuses; nothing is left of the device.
    pub fn add(
        &self,
        volume: VolumeNr,
        wanted: u32,
        mark: u64,
        shape: &Shape,
    ) -> io::Result<(u32, Queue)> {
        let mut info = DeviceInfo {
            queues: 1,
            depth: DEPTH,
            max_io: MAX_IO,
            id: wanted,
            flags: NEEDED.bits(),
            mark,
            ..DeviceInfo::default()
        };
        let mut added = ublk::control(&self.file, control::ADD_DEV, wanted, 0, &mut info);
        if added.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::AlreadyExists) {
            info.id = abi::ANY_ID;
            added = ublk::control(&self.file, control::ADD_DEV, abi::ANY_ID, 0, &mut info);
        }
        added?;
        let id = info.id;
        let mut params = shape.params();
        let queue = ublk::control(&self.file, control::SET_PARAMS, id, 0, &mut params)
            .and_then(|()| queue(volume, &info));
        match queue {
            Ok(queue) => Ok((id, queue)),
            Err(error) => {
                let _ = self.delete(id);
                Err(error)
            }
        }
    }

    /// Makes the disk. Waits for whoever serves the queue.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn start(&self, id: u32) -> io::Result<()> {
        let own = u64::from(std::process::id());
        ublk::control(&self.file, control::START_DEV, id, own, &mut Nothing::default())
    }

    /// The device as it is.
    ///
    /// # Errors
    /// There is none.
    pub fn info(&self, id: u32) -> io::Result<DeviceInfo> {
        let mut info = DeviceInfo::default();
        ublk::control(&self.file, control::GET_DEV_INFO, id, 0, &mut info)?;
        Ok(info)
    }

    /// Takes over a device whose server has died. The queue must be served before
    /// [`Self::recovered`].
    ///
    /// # Errors
    /// There is no such device, or its server lives.
    pub fn recover(&self, volume: VolumeNr, id: u32) -> io::Result<Queue> {
        let end = Instant::now() + PATIENCE;
        // The kernel notices the death of a server a little later.
        loop {
            let nothing = &mut Nothing::default();
            match ublk::control(&self.file, control::START_USER_RECOVERY, id, 0, nothing) {
                Ok(()) => break,
                Err(error) if error.raw_os_error() != Some(libc::EBUSY) => return Err(error),
                Err(error) if Instant::now() > end => return Err(error),
                Err(_) => std::thread::sleep(PAUSE),
            }
        }
        queue(volume, &self.info(id)?)
    }

    /// Requests go on. Waits for whoever serves the queue.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn recovered(&self, id: u32) -> io::Result<()> {
        let own = u64::from(std::process::id());
        ublk::control(&self.file, control::END_USER_RECOVERY, id, own, &mut Nothing::default())
    }

    /// Sectors of a disk.
    ///
    /// # Errors
    /// There is no such device.
    pub fn size(&self, id: u32) -> io::Result<u64> {
        let len = u32::try_from(size_of::<Params>()).unwrap_or(0);
        let mut params = Params { len, ..Params::default() };
        ublk::control(&self.file, control::GET_PARAMS, id, 0, &mut params)?;
        Ok(params.sectors)
    }

    /// Can the size of a disk be changed while it runs?
    pub const fn can_resize(&self) -> bool {
        self.features.contains(Features::UPDATE_SIZE)
    }

    /// Changes the size of a disk that runs.
    ///
    /// # Errors
    /// Not with this kernel.
    pub fn resize(&self, id: u32, sectors: u64) -> io::Result<()> {
        ublk::control(&self.file, control::UPDATE_SIZE, id, sectors, &mut Nothing::default())
    }

    /// Ends a disk: its requests are waited for; those of one without server fail.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn stop(&self, id: u32) -> io::Result<()> {
        ublk::control(&self.file, control::STOP_DEV, id, 0, &mut Nothing::default())
    }

    /// Removes a device that is stopped. The kernel keeps its number as long as somebody has the
    /// disk open; that is waited for, for a little while.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn delete(&self, id: u32) -> io::Result<()> {
        ublk::control(&self.file, control::DEL_DEV_ASYNC, id, 0, &mut Nothing::default())?;
        let end = Instant::now() + PATIENCE_FOR_NUMBER;
        while self.info(id).is_ok() && Instant::now() < end {
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }
}

/// The disk of a device.
pub fn disk(id: u32) -> PathBuf {
    format!("/dev/ublkb{id}").into()
}

/// The node of a device's queue appears when udev, or the kernel, has made it.
fn open(id: u32) -> io::Result<File> {
    let path = format!("/dev/ublkc{id}");
    let end = Instant::now() + PATIENCE;
    loop {
        match OpenOptions::new().read(true).write(true).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && Instant::now() < end => {
                std::thread::sleep(PAUSE);
            }
            other => return other,
        }
    }
}

fn queue(volume: VolumeNr, info: &DeviceInfo) -> io::Result<Queue> {
    let device = OwnedFd::from(open(info.id)?);
    let table = Table::new(&device, 0, info.depth)?;
    Ok(Queue { volume, device: Fd::new(device), table, depth: info.depth })
}
