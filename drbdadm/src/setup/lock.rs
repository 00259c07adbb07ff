//! One tool at a time per minor. Spec: metadata.md §8.2.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, fcntl_lock};
use rustix::process::{Flock, FlockType, fcntl_getlk};

use super::request::reason;
use super::{Context, Failed};

const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(50);

/// Minors of another daemon than the machine's own have nothing to do with the machine's.
fn path(context: &Context, minor: u32) -> PathBuf {
    let own = context.socket.parent().filter(|_| !context.is_default);
    own.unwrap_or_else(|| Path::new("/var/lock")).join(format!("drbd-147-{minor}"))
}

/// Takes the lock of the minor, waiting up to a second.
pub(super) fn take(context: &Context, minor: u32) -> Result<File, Failed> {
    let path = path(context, minor);
    let shown = path.display();
    let open = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path);
    let file =
        open.map_err(|e| Failed::new(20, format!("open({shown}) failed: {}\n", reason(&e))))?;
    for _ in 0..TRIES {
        if fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            return Ok(file);
        }
        std::thread::sleep(PAUSE);
    }
    let holder = fcntl_getlk(&file, &Flock::from(FlockType::WriteLock)).ok().flatten();
    let pid = holder
        .and_then(|h| h.pid)
        .map_or_else(|| "unknown".into(), |pid| rustix::process::Pid::as_raw_pid(pid).to_string());
    Err(Failed::new(20, format!("lock on {shown} currently held by pid:{pid}\n")))
}
