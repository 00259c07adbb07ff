//! Who has a block device open: the drivers do not tell.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

/// A device that is ours alone: nobody can mount it, or use it for another device, while this
/// exists.
#[derive(Debug)]
pub struct Claim(#[expect(dead_code, reason = "it is the open file that counts")] File);

/// Claims a device that nobody has open. `None`: somebody has. Another process may open it without
/// a claim of its own at any moment; then its requests fail when the device goes away.
///
/// # Errors
/// It can not be opened.
pub fn claim(node: &Path) -> io::Result<Option<Claim>> {
    let exclusive = i32::try_from(rustix::fs::OFlags::EXCL.bits()).unwrap_or(0);
    // A mount, a swap, or a device on top of it.
    let file = match OpenOptions::new().read(true).custom_flags(exclusive).open(node) {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => return Ok(None),
        other => other?,
    };
    let own = rustix::process::getpid().as_raw_nonzero().to_string();
    let rdev = file.metadata()?.rdev();
    let is_open = std::fs::read_dir("/proc")?.flatten().any(|process| {
        let name = process.file_name();
        let is_process = name.as_encoded_bytes().iter().all(u8::is_ascii_digit);
        is_process && name != *own && has_open(&process.path().join("fd"), rdev)
    });
    Ok((!is_open).then_some(Claim(file)))
}

/// A process that has ended meanwhile has nothing open.
fn has_open(fds: &Path, rdev: u64) -> bool {
    let Ok(fds) = std::fs::read_dir(fds) else { return false };
    fds.flatten().any(|fd| {
        let info = std::fs::metadata(fd.path());
        info.is_ok_and(|info| info.file_type().is_block_device() && info.rdev() == rdev)
    })
}
