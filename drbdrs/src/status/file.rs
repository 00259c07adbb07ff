//! The status file: the text of /proc/drbd, readable at any time.
//!
//! Every version of it is written beside the file and renamed over it, so a reader sees one
//! consistent moment, whatever happens meanwhile. It is written after every change of a state,
//! before anybody is told of that change, and twice a second while counters move; an idle node
//! writes nothing. Spec: status-and-integration.md §1.11.

use std::cell::RefCell;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use drbd_admin::Snapshot;
use drbd_admin::render::{ProcOptions, proc};

/// Keeps the file.
#[derive(Debug)]
pub struct StatusFile {
    path: PathBuf,
    beside: PathBuf,
    options: ProcOptions,
    state: RefCell<State>,
}

#[derive(Debug, Default)]
struct State {
    /// What stands there.
    text: String,
    /// The last attempt failed, and that was said.
    is_failing: bool,
}

impl StatusFile {
    /// A file that is not there yet.
    #[must_use]
    pub fn new(path: &Path, options: ProcOptions) -> Self {
        let mut beside = path.as_os_str().to_owned();
        beside.push(".new");
        Self { path: path.into(), beside: beside.into(), options, state: RefCell::default() }
    }

    /// Shows this moment. A failure is logged, once; the daemon goes on without.
    pub fn write(&self, snapshot: &Snapshot) {
        let text = proc(snapshot, &self.options);
        let mut state = self.state.borrow_mut();
        if state.text == text && !state.is_failing {
            return;
        }
        match self.replace(&text) {
            Ok(()) => {
                if state.is_failing {
                    tracing::info!("{}: written again", self.path.display());
                }
                *state = State { text, is_failing: false };
            }
            Err(error) => {
                if !state.is_failing {
                    tracing::warn!("{} can not be written: {error}", self.path.display());
                }
                state.is_failing = true;
            }
        }
    }

    fn replace(&self, text: &str) -> std::io::Result<()> {
        let mut options = OpenOptions::new();
        let mut file: File =
            options.write(true).create(true).truncate(true).mode(0o644).open(&self.beside)?;
        file.write_all(text.as_bytes())?;
        std::fs::rename(&self.beside, &self.path)
    }

    /// Takes the file away.
    pub fn remove(&self) {
        // Not there: fine.
        let _ = std::fs::remove_file(&self.path);
        let _ = std::fs::remove_file(&self.beside);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::os::unix::fs::MetadataExt;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use drbd_admin::{Resource, Volume};

    use super::*;

    fn moment(amount: u64) -> Snapshot {
        let volumes = (0..20).map(|n| {
            let mut volume = Volume::new(n, u32::from(n));
            volume.cstate = drbd_types::Cstate::Connected;
            volume.counters.sent = amount * 2;
            volume
        });
        let resource =
            Resource { name: "r0".into(), volumes: volumes.collect(), ..Resource::default() };
        Snapshot { resources: vec![resource], ..Snapshot::default() }
    }

    /// Readers at any time find a whole file with equal counters in all lines.
    #[test]
    fn a_reader_sees_one_moment() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("proc-drbd");
        let file = StatusFile::new(&path, ProcOptions::default());
        file.write(&moment(1));
        let is_over = Arc::new(AtomicBool::new(false));
        let reader = {
            let (is_over, path) = (Arc::clone(&is_over), path.clone());
            std::thread::spawn(move || {
                let mut seen = BTreeSet::new();
                while !is_over.load(Ordering::Relaxed) {
                    let text = std::fs::read_to_string(&path).unwrap();
                    let amounts: BTreeSet<&str> =
                        text.split_whitespace().filter_map(|w| w.strip_prefix("ns:")).collect();
                    assert_eq!(amounts.len(), 1, "{text}");
                    assert_eq!(text.matches("ns:").count(), 20, "{text}");
                    seen.extend(amounts.into_iter().map(str::to_owned));
                }
                seen.len()
            })
        };
        let mut amount = 2;
        while amount < 2000 {
            file.write(&moment(amount));
            amount += 1;
        }
        is_over.store(true, Ordering::Relaxed);
        assert!(reader.join().unwrap() > 1);
        file.remove();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn nothing_new_is_not_written_and_failures_are_survived() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/proc-drbd");
        let file = StatusFile::new(&path, ProcOptions::default());
        file.write(&moment(1));
        std::fs::create_dir(folder.path().join("deep")).unwrap();
        file.write(&moment(1));
        let before = std::fs::metadata(&path).unwrap();
        file.write(&moment(1));
        assert_eq!(before.ino(), std::fs::metadata(&path).unwrap().ino());
        file.write(&moment(2));
        assert_ne!(std::fs::metadata(&path).unwrap().ino(), before.ino());
    }
}
