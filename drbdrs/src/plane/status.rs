//! What is where on a device: holes of its disk and blocks that are out of sync, for block status.

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};

use drbd_core::slab::{Key, Slab};
use drbd_types::{Sector, SectorCount, SectorRange};
use rustix::fs::{FileType, SeekFrom, seek};

use super::disk::OpenDisk;
use super::io::{Backend, Op, Part, Tag};
use super::run::Machine;
use crate::front::nbd::handshake::Contexts;
use crate::front::nbd::server::{EXTENTS_MAX, Extent, Query};

/// A hole, and it reads as zeroes: the flags of `base:allocation`.
const HOLE: u32 = 3;

/// The answer to a query. `None`: nothing is known.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Of which query.
    pub key: u64,
    /// Holes.
    pub allocation: Option<Vec<Extent>>,
    /// Out of sync.
    pub out_of_sync: Option<Vec<Extent>>,
}

type Slot = Arc<Mutex<Option<Vec<Extent>>>>;

#[derive(Debug)]
struct Waiting {
    key: u64,
    out_of_sync: Option<Vec<Extent>>,
    wants_sync: bool,
    slot: Slot,
}

/// Queries whose holes are being looked for.
#[derive(Debug, Default)]
pub struct Statuses {
    waiting: Slab<Waiting>,
}

impl Statuses {
    /// Answers at once, or later through [`Self::done`].
    pub fn ask<M: Machine>(
        &mut self,
        machine: &M,
        disk: Option<&OpenDisk>,
        io: &mut dyn Backend,
        query: Query,
    ) -> Option<Answer> {
        let range = SectorRange::new(Sector(query.start / 512), SectorCount(query.len / 512));
        let mut extents = Vec::new();
        let is_known = range.is_some_and(|range| {
            machine.out_of_sync(query.volume, range, EXTENTS_MAX, &mut extents)
        });
        let out_of_sync = is_known.then_some(extents);
        let wants_sync = query.contexts.contains(Contexts::OUT_OF_SYNC);
        let wants_holes = query.contexts.contains(Contexts::ALLOCATION);
        // Holes of a disk say nothing where nobody knows whether it is up to date, and block
        // devices have none.
        let file = disk.map(|disk| &disk.data.file).filter(|file| {
            let stat = rustix::fs::fstat(file);
            stat.is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::RegularFile)
        });
        let (Some(file), true, true) = (file, wants_holes, is_known) else {
            let out_of_sync = out_of_sync.filter(|_| wants_sync);
            return Some(Answer { key: query.key, allocation: None, out_of_sync });
        };
        let slot = Slot::default();
        let (result, file) = (Arc::clone(&slot), Arc::clone(file));
        let look = move || {
            let found = holes(&*file, query.start, query.len);
            *result.lock().unwrap_or_else(PoisonError::into_inner) = found;
        };
        let waiting = Waiting { key: query.key, out_of_sync, wants_sync, slot };
        let key = self.waiting.insert(waiting).raw();
        io.submit(Tag { part: Part::Status, key }, Op::Call(Some(Box::new(look))));
        None
    }

    /// The holes are known.
    pub fn done(&mut self, key: u64) -> Option<Answer> {
        let Waiting { key, out_of_sync, wants_sync, slot } =
            self.waiting.remove(Key::from_raw(key))?;
        let found = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
        let sync = out_of_sync.unwrap_or_default();
        let allocation = found.map(|holes| only_in_sync(&holes, &sync));
        let out_of_sync = Some(sync).filter(|_| wants_sync);
        Some(Answer { key, allocation, out_of_sync })
    }
}

/// Holes and data of a file. `None`: the file system does not know.
fn holes(file: impl AsFd, start: u64, len: u64) -> Option<Vec<Extent>> {
    let end = start.checked_add(len)?;
    let mut extents = Vec::new();
    let mut at = start;
    while at < end && extents.len() < EXTENTS_MAX {
        let data = match seek(&file, SeekFrom::Data(at)) {
            Ok(data) => (data / 512 * 512).clamp(at, end),
            Err(rustix::io::Errno::NXIO) => end,
            Err(_) => return None,
        };
        if data > at {
            extents.push(Extent { len: data - at, flags: HOLE });
        }
        at = data;
        if at < end {
            let hole = seek(&file, SeekFrom::Hole(at)).ok()?;
            let next = hole.next_multiple_of(512).clamp(at + 512, end);
            extents.push(Extent { len: next - at, flags: 0 });
            at = next;
        }
    }
    Some(extents)
}

/// A hole counts only where the disk is known to have the newest data.
fn only_in_sync(holes: &[Extent], sync: &[Extent]) -> Vec<Extent> {
    let mut result: Vec<Extent> = Vec::new();
    let (mut holes, mut sync) = (holes.iter().copied(), sync.iter().copied());
    let (mut hole, mut known) = (holes.next(), sync.next());
    while let (Some(h), Some(k)) = (&mut hole, &mut known) {
        let len = h.len.min(k.len);
        let flags = if k.flags == 0 { h.flags } else { 0 };
        match result.last_mut() {
            Some(last) if last.flags == flags => last.len += len,
            _ => result.push(Extent { len, flags }),
        }
        h.len -= len;
        k.len -= len;
        if h.len == 0 {
            hole = holes.next();
        }
        if k.len == 0 {
            known = sync.next();
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn extents(list: &[(u64, u32)]) -> Vec<Extent> {
        list.iter().map(|(len, flags)| Extent { len: *len, flags: *flags }).collect()
    }

    #[test]
    fn holes_count_only_where_everything_is_in_sync() {
        let holes = extents(&[(4096, 0), (8192, 3), (4096, 0)]);
        let sync = extents(&[(6144, 0), (2048, 1), (8192, 0)]);
        let expected = extents(&[(4096, 0), (2048, 3), (2048, 0), (4096, 3), (4096, 0)]);
        assert_eq!(only_in_sync(&holes, &sync), expected);
        assert_eq!(only_in_sync(&holes, &extents(&[(5120, 0)])), extents(&[(4096, 0), (1024, 3)]));
    }

    #[test]
    fn holes_of_a_file_are_found() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[1; 4096], 65_536).unwrap();
        let found = holes(&file, 32_768, 65_536).unwrap();
        assert_eq!(found, extents(&[(32_768, 3), (4096, 0), (28_672, 3)]));
    }
}
