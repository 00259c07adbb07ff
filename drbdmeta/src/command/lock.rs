//! One tool at a time per minor.
//!
//! Spec: metadata.md §8.2.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::fs::{FlockOperation, fcntl_lock};
use rustix::process::{Flock, FlockType, fcntl_getlk};

use super::Exit;
use super::args::Invocation;

const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(50);

/// Takes the lock of the minor, waiting up to a second.
pub(super) fn take(run: &Invocation) -> Result<Option<File>, Exit> {
    let Some(minor) = run.minor else { return Ok(None) };
    let path = format!("/var/lock/drbd-147-{minor}");
    let open = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path);
    let file = match open {
        Ok(file) => file,
        Err(e) => return Err(Exit::new(20, format!("open({path}) failed: {e}"))),
    };
    for _ in 0..TRIES {
        if fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            return Ok(Some(file));
        }
        std::thread::sleep(PAUSE);
    }
    let pid = holder(&file).map_or_else(|| "unknown".into(), |pid| pid.to_string());
    Err(Exit::new(20, format!("lock on {path} currently held by pid:{pid}")))
}

/// Process that holds a lock on this file.
pub(super) fn holder(file: &File) -> Option<i32> {
    let found = fcntl_getlk(file, &Flock::from(FlockType::WriteLock)).ok()??;
    found.pid.map(rustix::process::Pid::as_raw_pid)
}

/// Is the minor attached? Whoever runs it answers through `drbdsetup`.
pub(super) fn is_attached(run: &Invocation) -> bool {
    let Some(minor) = run.minor else { return false };
    let answer = Command::new("drbdsetup")
        .args(["dstate", &minor.to_string()])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output();
    answer.is_ok_and(|answer| {
        let text = String::from_utf8_lossy(&answer.stdout);
        let nothing = ["Unconfigured", "Diskless"].iter().any(|w| text.starts_with(w));
        answer.status.success() && !text.trim().is_empty() && !nothing
    })
}
