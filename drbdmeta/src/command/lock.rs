//! One tool at a time per minor.
//!
//! Spec: metadata.md §8.2.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use drbdmeta::hold::{self, Held, Hold, HoldError};

use super::Exit;
use super::args::Invocation;

const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(50);

/// Takes the lock of the minor, waiting up to a second.
pub(super) fn take(run: &Invocation) -> Result<Option<File>, Exit> {
    let Some(minor) = run.minor else { return Ok(None) };
    let path = hold::minor_lock_path(minor);
    let file = hold::open_lock_file(&path).map_err(|e| refused(&path, e))?;
    for _ in 1..TRIES {
        match hold::lock(&file, &path) {
            Ok(()) => return Ok(Some(file)),
            Err(HoldError::Held(_)) => std::thread::sleep(PAUSE),
            Err(e) => return Err(refused(&path, e)),
        }
    }
    hold::lock(&file, &path).map(|()| Some(file)).map_err(|e| refused(&path, e))
}

fn refused(path: &Path, error: HoldError) -> Exit {
    Exit::new(
        20,
        match error {
            HoldError::Held(held) => {
                let path = held.lock_file.as_deref().unwrap_or(path).display();
                format!("lock on {path} currently held by pid:{}", pid(&held))
            }
            HoldError::Io(path, e) => {
                format!("open({}) failed: {}", path.display(), super::system(&e))
            }
        },
    )
}

fn pid(held: &Held) -> String {
    held.pid.map_or_else(|| "unknown".into(), |pid| pid.to_string())
}

/// Takes the device. Nobody may write under whoever holds it, forced or not; reading may be
/// forced.
pub(super) fn device(run: &Invocation, file: &File) -> Result<Option<Hold>, Exit> {
    let error = match hold::hold(file, Path::new(&run.path), run.placement) {
        Ok(hold) => return Ok(Some(hold)),
        Err(error) => error,
    };
    let is_held = matches!(error, HoldError::Held(_));
    let mut exit = refused(Path::new(&run.path), error);
    if is_held {
        exit.text = format!("open({}) failed: Device or resource busy\n{}", run.path, exit.text);
    }
    if run.command.modifies() || !is_held {
        return Err(exit);
    }
    super::open::busy(run, &exit.text)?;
    Ok(None)
}

/// Who has a block device that could not be opened exclusively.
pub(super) fn holders(path: &str) -> String {
    let found = hold::who_has_open(Path::new(path)).into_iter();
    let lines: Vec<_> =
        found.map(|(pid, name)| format!("{path} is open in pid:{pid} ({name})")).collect();
    if lines.is_empty() {
        return format!("{path} is used by the kernel: mounted, or part of another device");
    }
    lines.join("\n")
}

/// Is the minor attached? Whoever runs it answers through `drbdsetup`: the daemon through the one
/// beside this program, a kernel's driver through the one that is in the path.
pub(super) fn is_attached(run: &Invocation) -> bool {
    let Some(minor) = run.minor else { return false };
    let name = "drbdsetup";
    let beside = std::env::current_exe().ok().map(|me| me.with_file_name(name));
    let beside = beside.filter(|program| program.exists());
    beside.into_iter().chain([name.into()]).any(|program| says_attached(&program, minor))
}

fn says_attached(drbdsetup: &Path, minor: u32) -> bool {
    let answer = Command::new(drbdsetup)
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
