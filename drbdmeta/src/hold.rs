//! Who may write a device: at most one process at a time, and it can be named.
//!
//! Spec: metadata.md §8.2, §8.3. Three things keep tools and daemon apart. The lock file of a
//! minor is taken by the original drbdmeta too. Block devices are opened exclusively by both. On
//! top of that every one of our programs holds a POSIX write lock: on the device or file itself,
//! or, as slots share their device, on a lock file of the slot.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::string::String;
use std::vec::Vec;

use rustix::fs::{FlockOperation, fcntl_lock};
use rustix::process::{Flock, FlockType, fcntl_getlk};

use crate::layout::Placement;

/// Where lock files are.
const LOCK_FOLDER: &str = "/var/lock";

/// Somebody else has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// What is locked, if it is a lock file.
    pub lock_file: Option<PathBuf>,
    /// Who holds it; `None`: a process that can not be seen from here.
    pub pid: Option<i32>,
}

/// Why there is no lock.
#[derive(Debug)]
pub enum HoldError {
    /// Somebody else has it.
    Held(Held),
    /// The lock file can not be opened, or the file can not be locked.
    Io(PathBuf, std::io::Error),
}

/// A lock. It ends with this value and, by the rules of POSIX, already when this process closes
/// *any* descriptor of the same file: open a device once.
#[derive(Debug)]
pub struct Hold {
    _lock_file: Option<File>,
}

/// Path of the lock file that all drbdmeta take, ours and the original.
pub fn minor_lock_path(minor: u32) -> PathBuf {
    Path::new(LOCK_FOLDER).join(std::format!("drbd-147-{minor}"))
}

/// Opens (and makes) a lock file.
///
/// # Errors
/// It can not be opened.
pub fn open_lock_file(path: &Path) -> Result<File, HoldError> {
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true).create(true).truncate(false).mode(0o600);
    options.open(path).map_err(|e| HoldError::Io(path.into(), e))
}

/// Takes a whole file, at once or not at all.
///
/// # Errors
/// Somebody else has it, or it can not be locked.
pub fn lock(file: &File, path: &Path) -> Result<(), HoldError> {
    match fcntl_lock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::ACCESS | rustix::io::Errno::AGAIN) => {
            Err(HoldError::Held(Held { lock_file: None, pid: holder(file) }))
        }
        Err(e) => Err(HoldError::Io(path.into(), e.into())),
    }
}

/// Takes the meta-data on an opened device or file. Slots of one device do not exclude each other.
///
/// # Errors
/// Somebody else has it, or it can not be locked.
pub fn hold(file: &File, path: &Path, placement: Placement) -> Result<Hold, HoldError> {
    let Placement::Indexed(slot) = placement else {
        return lock(file, path).map(|()| Hold { _lock_file: None });
    };
    let about = file.metadata().map_err(|e| HoldError::Io(path.into(), e))?;
    let is_device = about.file_type().is_block_device();
    let (device, inode) = if is_device { (about.rdev(), 0) } else { (about.dev(), about.ino()) };
    let lock_path =
        Path::new(LOCK_FOLDER).join(std::format!("drbd-slot-{device:x}-{inode:x}-{slot}"));
    let lock_file = open_lock_file(&lock_path)?;
    match lock(&lock_file, &lock_path) {
        Ok(()) => Ok(Hold { _lock_file: Some(lock_file) }),
        Err(HoldError::Held(held)) => {
            Err(HoldError::Held(Held { lock_file: Some(lock_path), ..held }))
        }
        Err(e) => Err(e),
    }
}

/// The process that holds a lock on this file.
pub fn holder(file: &File) -> Option<i32> {
    let found = fcntl_getlk(file, &Flock::from(FlockType::WriteLock)).ok()??;
    found.pid.map(rustix::process::Pid::as_raw_pid)
}

/// Other processes that have this block device open, with their names: whoever opened it
/// exclusively is one of them, unless the kernel itself uses it.
pub fn who_has_open(device: &Path) -> Vec<(i32, String)> {
    let mut found = Vec::new();
    let Ok(about) = std::fs::metadata(device) else { return found };
    let Ok(processes) = std::fs::read_dir("/proc") else { return found };
    for process in processes.flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
        let Ok(files) = std::fs::read_dir(process.path().join("fd")) else { continue };
        // Following the link of a descriptor leads to the file itself.
        let has_it = files
            .flatten()
            .filter_map(|f| std::fs::metadata(f.path()).ok())
            .any(|f| f.file_type().is_block_device() && f.rdev() == about.rdev());
        if has_it && pid != std::process::id().cast_signed() {
            let name = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            found.push((pid, name.trim_end().into()));
        }
    }
    found.sort_unstable();
    found
}
