//! Opening a data disk and its meta-data device, so that nobody else writes them. Blocks: runs on
//! a helper thread.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use drbd_core::event::{DiskLimits, Opened};
use drbd_types::{ByteLen, Failure, SectorCount};
use drbdmeta::layout::Placement;
use rustix::fs::{
    AtFlags, FileType, FlockOperation, OFlags, SeekFrom, StatxFlags, fcntl_lock, flock,
};
use rustix::io::Errno;
use rustix::process::{Flock, FlockType, fcntl_getlk};

use super::super::io::Fd;

/// Largest request that counts, bytes.
const MAX_IO: u32 = 1 << 20;

/// How long an open waits for the writes of a process that is gone.
const LEFTOVERS_LAST: Duration = Duration::from_secs(5);

/// Number of tmpfs among the file systems.
const TMPFS: u64 = 0x0102_1994;

/// The devices of a volume, as configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskPaths {
    /// `disk`.
    pub backing: PathBuf,
    /// `meta-disk`; `None`: internal.
    pub meta: Option<PathBuf>,
    /// Where on its device the meta-data is.
    pub placement: Placement,
}

/// Why a device was not opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct OpenError {
    /// The errno.
    pub errno: i32,
    /// What users of the original see.
    pub failure: Failure,
    /// What an administrator should read.
    pub text: String,
}

/// One open device.
#[derive(Debug)]
pub struct Device {
    /// The file.
    pub file: Fd,
    /// Length, bytes.
    pub len: u64,
    /// All accesses must be multiples of this; 1: no limits.
    pub align: u32,
    /// It is in memory; there is no device to wait for.
    pub is_memory: bool,
    /// Its inode, where we have it for us alone; only its drop matters.
    _claim: Option<Claim>,
}

/// Both devices of a volume.
#[derive(Debug)]
pub struct OpenDisk {
    /// The data disk.
    pub data: Device,
    /// The meta-data device, unless it is the same.
    pub meta: Option<Device>,
    /// What the engine is told.
    pub opened: Opened,
}

impl OpenDisk {
    /// The device that carries the meta-data.
    pub fn meta(&self) -> &Device {
        self.meta.as_ref().unwrap_or(&self.data)
    }

    /// The files of both, for [`measure`].
    pub(super) fn files(&self) -> [Fd; 2] {
        [Fd::clone(&self.data.file), Fd::clone(&self.meta().file)]
    }

    /// The devices have these lengths now.
    pub(super) fn resized(&mut self, [data, meta]: [u64; 2]) {
        // A file may have grown by less than direct I/O can reach.
        let unit = u64::from(self.data.align.max(512));
        self.data.len = data / unit * unit;
        if let Some(device) = &mut self.meta {
            device.len = meta;
        }
        self.opened.backing = SectorCount(self.data.len / 512);
        self.opened.meta_device = ByteLen(self.meta().len);
    }

    /// Opens both. Waits a while for what a process that is gone was writing there.
    ///
    /// # Errors
    /// Not there, not permitted, in use, or neither a block device nor a file.
    pub fn open(paths: &DiskPaths) -> Result<Self, OpenError> {
        Self::open_within(paths, LEFTOVERS_LAST)
    }

    pub(super) fn open_within(paths: &DiskPaths, patience: Duration) -> Result<Self, OpenError> {
        let (data, limits) = Device::open(&paths.backing, Role::Data, true, patience)?;
        let meta = match &paths.meta {
            None => None,
            Some(path) if is_same(path, &data.file) => {
                let path = path.display();
                let text = format!("{path} is given as disk and as its own meta-disk");
                return Err(OpenError {
                    errno: libc::EINVAL,
                    failure: Failure::OpenMetaDevice,
                    text,
                });
            }
            // Several volumes have slots of an indexed device.
            Some(path) => {
                let alone = !matches!(paths.placement, Placement::Indexed(_));
                Some(Device::open(path, Role::Meta, alone, patience)?.0)
            }
        };
        let meta_len = meta.as_ref().map_or(data.len, |meta| meta.len);
        let opened = Opened {
            backing: SectorCount(data.len / 512),
            meta_device: ByteLen(meta_len),
            placement: paths.placement,
            limits,
        };
        Ok(Self { data, meta, opened })
    }
}

/// Lengths of files or devices, bytes. May block.
pub(super) fn measure(files: &[Fd; 2]) -> Result<[u64; 2], i32> {
    let len = |file: &Fd| rustix::fs::seek(file, SeekFrom::End(0)).map_err(Errno::raw_os_error);
    Ok([len(&files[0])?, len(&files[1])?])
}

impl Device {
    fn open(
        path: &Path,
        role: Role,
        alone: bool,
        patience: Duration,
    ) -> Result<(Self, DiskLimits), OpenError> {
        let shown = path.display();
        let failure = role.cannot_open();
        let busy = |who: &str| OpenError {
            errno: libc::EBUSY,
            failure,
            text: format!("open({shown}) failed: Device or resource busy\n{who}"),
        };
        let failed = |error: io::Error| OpenError {
            errno: error.raw_os_error().unwrap_or(libc::EIO),
            failure,
            text: format!("open({shown}) failed: {error}"),
        };
        let info = std::fs::metadata(path).map_err(failed)?;
        match FileType::from_raw_mode(info.mode()) {
            FileType::BlockDevice => {
                let is_busy = |opened: &io::Result<OwnedFd>| {
                    opened.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::ResourceBusy)
                };
                let mut opened = open_block(path, alone);
                if is_busy(&opened) {
                    if let Some(user) = user_of_block(info.rdev()) {
                        return Err(busy(&user));
                    }
                    let is_free = wait_for(patience, || {
                        opened = open_block(path, alone);
                        !is_busy(&opened)
                    });
                    if !is_free {
                        return Err(busy("opened exclusively by somebody else"));
                    }
                }
                block_device(opened.map_err(failed)?, info.rdev()).map_err(failed)
            }
            FileType::RegularFile => {
                let pid = std::process::id();
                let taken = || busy(&format!("used by another volume of this daemon, pid:{pid}"));
                let claim = || Claim::take(info.dev(), info.ino()).ok_or_else(taken);
                let claim = alone.then(claim).transpose()?;
                let (file, align) = open_plain(path, info.len()).map_err(failed)?;
                if alone && fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
                    let holder = fcntl_getlk(&file, &Flock::from(FlockType::WriteLock));
                    let pid = holder.ok().flatten().and_then(|found| found.pid);
                    let pid = pid.map_or_else(|| "unknown".into(), |pid| pid.to_string());
                    return Err(busy(&format!("lock currently held by pid:{pid}")));
                }
                // That lock goes with the process that has it. What the process was writing then may
                // still be on its way, and keeps the open file and this lock, as it keeps the claim
                // on a block device.
                let lock = FlockOperation::NonBlockingLockExclusive;
                let is_free = || flock(&file, lock) != Err(Errno::WOULDBLOCK);
                if alone && !wait_for(patience, is_free) {
                    return Err(busy("writes of a process that is gone have not ended"));
                }
                Ok(plain_file(file, &info, align, claim))
            }
            _ => Err(OpenError {
                errno: libc::ENOTBLK,
                failure: role.is_no_device(),
                text: format!("'{shown}' is neither a block device nor a file"),
            }),
        }
    }
}

/// Which of the two devices.
#[derive(Clone, Copy)]
enum Role {
    Data,
    Meta,
}

impl Role {
    const fn cannot_open(self) -> Failure {
        match self {
            Self::Data => Failure::OpenBackingDevice,
            Self::Meta => Failure::OpenMetaDevice,
        }
    }

    const fn is_no_device(self) -> Failure {
        match self {
            Self::Data => Failure::DiskNotBlockDevice,
            Self::Meta => Failure::MetaNotBlockDevice,
        }
    }
}

fn is_same(path: &Path, file: &OwnedFd) -> bool {
    let (Ok(a), Ok(b)) = (std::fs::metadata(path), rustix::fs::fstat(file)) else { return false };
    let is_block = FileType::from_raw_mode(a.mode()) == FileType::BlockDevice;
    if is_block { a.rdev() == b.st_rdev } else { (a.dev(), a.ino()) == (b.st_dev, b.st_ino) }
}

fn open_flags(path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    let flags = flags.bits().cast_signed();
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(path).map(Into::into)
}

/// With direct I/O where the device can do it.
fn open_block(path: &Path, alone: bool) -> io::Result<OwnedFd> {
    let flags = if alone { OFlags::EXCL } else { OFlags::empty() };
    match open_flags(path, flags | OFlags::DIRECT) {
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => open_flags(path, flags),
        other => other,
    }
}

/// With direct I/O where the file system can do it in blocks that divide the file; else through
/// the page cache.
fn open_plain(path: &Path, len: u64) -> io::Result<(OwnedFd, u32)> {
    let direct = match open_flags(path, OFlags::DIRECT) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
            return Ok((open_flags(path, OFlags::empty())?, 1));
        }
        Err(error) => return Err(error),
    };
    match direct_align(&direct) {
        Some(align) if align <= 4096 && len.is_multiple_of(u64::from(align)) => Ok((direct, align)),
        // Closing a file drops this process' locks on it; there are none yet.
        _ => Ok((open_flags(path, OFlags::empty())?, 1)),
    }
}

/// Alignment that direct I/O needs; `None`: it is not possible.
fn direct_align(file: impl AsFd) -> Option<u32> {
    const DIOALIGN: StatxFlags = StatxFlags::from_bits_retain(0x2000);
    let stat = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, DIOALIGN).ok();
    match stat {
        Some(stat) if stat.stx_mask & DIOALIGN.bits() != 0 => {
            (stat.stx_dio_offset_align > 0).then_some(stat.stx_dio_offset_align.max(512))
        }
        // Kernels before 6.1 do not say; all disks can do whole pages.
        _ => Some(4096),
    }
}

fn plain_file(
    file: OwnedFd,
    info: &std::fs::Metadata,
    align: u32,
    claim: Option<Claim>,
) -> (Device, DiskLimits) {
    // Beyond the end there is nothing to lose.
    let punch = super::super::helpers::allocate_flags(super::super::io::Allocate::Punch);
    let beyond = info.len().next_multiple_of(1 << 20);
    let can_discard = rustix::fs::fallocate(&file, punch, beyond, 4096).is_ok();
    let block = u32::try_from(info.blksize()).unwrap_or(4096).clamp(512, 1 << 20);
    let limits = DiskLimits {
        max_io: MAX_IO,
        can_discard,
        discard_granularity: if can_discard { block } else { 0 },
        // Smaller than what direct I/O wants is served through bounce buffers.
        logical_block: 512,
        physical_block: block.min(4096),
    };
    let is_memory =
        rustix::fs::fstatfs(&file).is_ok_and(|fs| u64::try_from(fs.f_type) == Ok(TMPFS));
    let len = info.len() / 512 * 512;
    (Device { file: Fd::new(file), len, align, is_memory, _claim: claim }, limits)
}

fn block_device(file: OwnedFd, rdev: u64) -> io::Result<(Device, DiskLimits)> {
    let len = rustix::fs::seek(&file, SeekFrom::End(0))?;
    let logical_block = rustix::fs::ioctl_blksszget(&file)?;
    let physical_block = rustix::fs::ioctl_blkpbszget(&file).unwrap_or(logical_block);
    let queue = queue_of(rdev);
    let limit = |name: &str| {
        let text = std::fs::read_to_string(queue.join(name)).unwrap_or_default();
        text.trim().parse::<u64>().unwrap_or(0)
    };
    // Discards are done in the way that reads back as zeroes, since both nodes must agree about
    // the content afterwards; a disk that cannot promise that gets zeroes written.
    let can_discard = limit("discard_max_bytes") > 0 && limit("write_zeroes_max_bytes") > 0;
    let granularity = u32::try_from(limit("discard_granularity")).unwrap_or(0);
    let limits = DiskLimits {
        max_io: MAX_IO,
        can_discard,
        discard_granularity: if can_discard { granularity.max(logical_block) } else { 0 },
        logical_block,
        physical_block,
    };
    let file = Fd::new(file);
    Ok((Device { file, len, align: logical_block, is_memory: false, _claim: None }, limits))
}

/// Is there a turning disk behind this path?
#[must_use]
pub fn is_rotational(path: &Path) -> bool {
    let Ok(info) = std::fs::metadata(path) else { return false };
    if FileType::from_raw_mode(info.mode()) != FileType::BlockDevice {
        return false;
    }
    let text = std::fs::read_to_string(queue_of(info.rdev()).join("rotational"));
    text.is_ok_and(|text| text.trim() == "1")
}

/// The folder with the limits; a partition has those of its disk.
fn queue_of(rdev: u64) -> PathBuf {
    let own = block_folder(rdev);
    let queue = own.join("queue");
    if queue.exists() { queue } else { own.join("../queue") }
}

fn block_folder(rdev: u64) -> PathBuf {
    let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
    let link = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    link.canonicalize().unwrap_or(link)
}

/// Who has this block device, as far as can be found out.
fn user_of_block(rdev: u64) -> Option<String> {
    let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
    let device = format!("{major}:{minor}");
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for line in mounts.lines() {
        let mut words = line.split(' ');
        if words.nth(2) == Some(&device) {
            return Some(format!("it is mounted on {}", words.nth(1).unwrap_or("?")));
        }
    }
    let holders = std::fs::read_dir(block_folder(rdev).join("holders"));
    let names: Vec<_> = holders
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .collect();
    if !names.is_empty() {
        return Some(format!("it is part of {}", names.join(", ")));
    }
    pid_with_block(rdev).map(|pid| format!("opened by pid:{pid}"))
}

/// Asks again and again.
fn wait_for(patience: Duration, mut is_free: impl FnMut() -> bool) -> bool {
    let begin = Instant::now();
    loop {
        if is_free() {
            return true;
        }
        if begin.elapsed() >= patience {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A process with this device open, if we may look.
fn pid_with_block(rdev: u64) -> Option<u32> {
    for process in std::fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let Ok(files) = std::fs::read_dir(process.path().join("fd")) else { continue };
        for file in files.flatten() {
            if std::fs::metadata(file.path()).is_ok_and(|info| {
                FileType::from_raw_mode(info.mode()) == FileType::BlockDevice && info.rdev() == rdev
            }) {
                return Some(pid);
            }
        }
    }
    None
}

/// Files that volumes of this process have. The lock on a file belongs to the whole process: it
/// does not keep two volumes of one daemon apart, and any close of the file drops it.
static CLAIMED: Mutex<BTreeSet<(u64, u64)>> = Mutex::new(BTreeSet::new());

/// A file that one volume of this process has.
#[derive(Debug)]
struct Claim(u64, u64);

impl Claim {
    /// `None`: another volume has it.
    fn take(dev: u64, ino: u64) -> Option<Self> {
        let mut claimed = CLAIMED.lock().unwrap_or_else(PoisonError::into_inner);
        // Not `then_some`: a claim that is made and dropped would take the other's away.
        claimed.insert((dev, ino)).then(|| Self(dev, ino))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        CLAIMED.lock().unwrap_or_else(PoisonError::into_inner).remove(&(self.0, self.1));
    }
}
