//! A daemon on whose block devices this machine lives must not wait for them, nor keep them busy.
//!
//! * Memory: what the daemon needs to write a page out must not depend on a page being written out.
//!   All threads are I/O flushers (no memory is had by writing to file systems), pages that were
//!   touched once stay, and the process is the last to be killed when memory is short.
//! * Files: the working directory is `/`, and the daemon opens nothing by itself outside `/run`,
//!   `/proc`, `/sys` and `/dev`. It has the mount table of the machine: in a copy of that table a file
//!   system would stay mounted after its `umount`, and hold its device open for ever.

use std::io;
use std::sync::Once;

use rustix::mm::MlockAllFlags;

/// For the whole process, and whatever it starts; before its first thread.
pub fn flusher() {
    // Without the privilege there are no block devices either; the data plane says so.
    let _ = rustix::process::configure_io_flusher_behavior(true);
}

/// Called with the first block device.
pub fn enter() {
    static DONE: Once = Once::new();
    DONE.call_once(|| {
        let flags = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
        let steps = [
            ("memory is not locked", rustix::mm::mlockall(flags).map_err(io::Error::from)),
            ("a shortage of memory may end this process", {
                std::fs::write("/proc/self/oom_score_adj", "-1000")
            }),
            ("the working directory is kept", std::env::set_current_dir("/")),
        ];
        for (what, done) in steps {
            if let Err(error) = done {
                tracing::warn!("{what} ({error}): block devices could come to a stop");
            }
        }
    });
}
