//! The superblock and the bitmap on disk, as procedures write them.
//!
//! Order on disk is never implied: whoever needs one write before another waits for the answer of
//! the first. One superblock and one copy of each bitmap page are in flight at most, so that an
//! older copy never overtakes a newer one. Spec: io-path-and-resync.md §7.4, metadata.md §6.

use alloc::boxed::Box;
use alloc::collections::BTreeSet;

use drbd_types::{ByteOffset, VolumeNr};
use drbdmeta::superblock::{Flags, Magic};

use crate::action::MetaOp;
use crate::log_line::Severity;

use super::Core;
use super::after::Work;
use super::io::{Purpose, meta};
use super::proc::Cx;

/// Pages in flight of one procedure that writes many.
const PAGES_AT_ONCE: usize = 64;
/// A dirty superblock is written after this time at the latest, microseconds. Spec: states §3.2.
pub(super) const DIRTY_LIMIT: u64 = 5_000_000;

/// What of the meta-data is being written.
#[derive(Debug, Default)]
pub(super) struct Writing {
    superblock: bool,
    /// The worker has been told to write the superblock.
    is_queued: bool,
    pages: BTreeSet<u32>,
    /// Pages that could not be written, ever.
    pub(super) errors: u32,
}

impl Writing {
    pub(super) const fn is_superblock(&self) -> bool {
        self.superblock
    }

    pub(super) fn has_pages(&self) -> bool {
        !self.pages.is_empty()
    }

    pub(super) fn is_busy(&self) -> bool {
        self.superblock || !self.pages.is_empty()
    }
}

/// The meta-data could not be written; the disk is failing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MetaError;

impl Core {
    /// The superblock has to be written, soon.
    pub(super) fn mark_dirty(&mut self, nr: VolumeNr) {
        let now = self.now;
        if let Some(disk) = self.volume_mut(nr).and_then(|v| v.disk.as_mut())
            && !disk.is_dirty
        {
            disk.is_dirty = true;
            disk.dirty_since = Some(now);
        }
    }

    /// Somebody on the data path waits for the superblock.
    pub(super) fn sync_soon(&mut self, nr: VolumeNr) {
        let Some(disk) = self.volume_mut(nr).and_then(|v| v.disk.as_mut()) else { return };
        if !core::mem::replace(&mut disk.writing.is_queued, true) {
            self.queue_work(Work::Sync { nr, is_late: false });
        }
    }

    /// The page is written, if it has changed and no copy of it is in flight.
    pub(super) fn write_page(&mut self, nr: VolumeNr, page: u32) {
        let Some(disk) = self.volume_mut(nr).and_then(|v| v.disk.as_mut()) else { return };
        if !disk.bitmap.is_changed(page) || !disk.writing.pages.insert(page) {
            return;
        }
        let block = disk.bitmap.take_for_write(page);
        let at = page_place(disk.layout.bitmap, page);
        self.meta_io(nr, MetaOp::Write { at, block, stable: false }, Purpose::Page(page));
    }

    pub(super) fn on_pages_written(&mut self, nr: VolumeNr, first: u32, pages: u32, ok: bool) {
        if let Some(disk) = self.volume_mut(nr).and_then(|v| v.disk.as_mut()) {
            for page in first..first.saturating_add(pages) {
                disk.writing.pages.remove(&page);
                if !ok {
                    disk.bitmap.write_failed(page);
                }
            }
            if !ok {
                disk.writing.errors += 1;
            }
        }
        if !ok {
            self.on_meta_error(nr);
        }
    }

    /// Is the page on disk as it is in memory (apart from volatile caches)?
    pub(super) fn is_page_written(&self, nr: VolumeNr, page: u32) -> bool {
        self.volume(nr)
            .and_then(|v| v.disk.as_ref())
            .is_none_or(|disk| !disk.writing.pages.contains(&page) && !disk.bitmap.is_changed(page))
    }

    /// The superblock as it is to be on disk now.
    fn superblock_block(&mut self, nr: VolumeNr) -> Option<(ByteOffset, Box<[u8; 4096]>)> {
        let volume = self.volume_mut(nr)?;
        let (size, slots) = (volume.size, volume.config.al_extents);
        let disk = volume.disk.as_mut()?;
        // Before the size is set at attach, the last agreed one is still needed.
        if size.0 > 0 && disk.bitmap_size == size {
            disk.superblock.la_size = size;
        }
        // While it is in use it is marked so; after a clean end the flags say what is to be done
        // with the activity log. Spec: metadata.md §3.8.
        disk.superblock.magic = Magic::Unclean;
        disk.superblock.al_nr_extents = u32::from(slots);
        disk.superblock.flags.remove(Flags::AL_CLEAN);
        Some((disk.layout.superblock, Box::new(disk.superblock.to_disk())))
    }
}

fn page_place(start: ByteOffset, page: u32) -> ByteOffset {
    ByteOffset(start.0 + u64::from(page) * 4096)
}

/// Writes the superblock if it is dirty, and waits until what was dirty at the call is stable.
pub(super) async fn sync(cx: &Cx, nr: VolumeNr) -> Result<(), MetaError> {
    loop {
        // Somebody else may be writing an older copy.
        let is_dirty = cx
            .until(move |core| match core.volume(nr).and_then(|v| v.disk.as_ref()) {
                None => Some(false),
                Some(disk) if disk.writing.superblock => None,
                Some(disk) => Some(disk.is_dirty),
            })
            .await;
        if !is_dirty {
            cx.with(|core| {
                if let Some(disk) = core.volume_mut(nr).and_then(|v| v.disk.as_mut()) {
                    disk.writing.is_queued = false;
                }
            });
            return Ok(());
        }
        let write = cx.with(|core| {
            let (at, block) = core.superblock_block(nr)?;
            let volume = core.volume_mut(nr)?;
            let stable = volume.config.md_flushes;
            let disk = volume.disk.as_mut()?;
            disk.is_dirty = false;
            disk.dirty_since = None;
            disk.writing.superblock = true;
            disk.writing.is_queued = false;
            Some(MetaOp::Write { at, block, stable })
        });
        let Some(write) = write else { return Ok(()) };
        let result = meta(cx, nr, write).await;
        let failed = cx.with(|core| {
            if let Some(disk) = core.volume_mut(nr).and_then(|v| v.disk.as_mut()) {
                disk.writing.superblock = false;
            }
            if result.is_err() {
                core.log(Severity::Error, Some(nr), "meta data update failed!");
                core.on_meta_error(nr);
            }
            result.is_err()
        });
        if failed {
            return Err(MetaError);
        }
    }
}

/// Writes the superblocks of all volumes that are dirty.
pub(super) async fn sync_all(cx: &Cx) {
    for nr in cx.with(|core| core.volume_numbers().collect::<alloc::vec::Vec<_>>()) {
        // A failure has been dealt with where it happened.
        let _ = sync(cx, nr).await;
    }
}

/// Writes all pages that have changed, and waits for them. They are not flushed: the next stable
/// write of the meta-data does that.
pub(super) async fn write_bitmap(cx: &Cx, nr: VolumeNr) -> Result<(), MetaError> {
    let errors = cx.with(|core| page_errors(core, nr));
    let mut from = 0;
    loop {
        // One pass in ascending order: pages that change behind it are for the next one.
        let next = cx
            .until(move |core| {
                let Some(disk) = core.volume(nr).and_then(|v| v.disk.as_ref()) else {
                    return Some(None);
                };
                let Some(page) = disk.bitmap.next_changed(from) else { return Some(None) };
                let is_free =
                    disk.writing.pages.len() < PAGES_AT_ONCE && !disk.writing.pages.contains(&page);
                is_free.then_some(Some(page))
            })
            .await;
        let Some(page) = next else { break };
        from = cx.with(|core| core.write_run(nr, page));
    }
    cx.until(move |core| {
        let disk = core.volume(nr).and_then(|v| v.disk.as_ref());
        disk.is_none_or(|disk| disk.writing.pages.is_empty()).then_some(())
    })
    .await;
    if cx.with(|core| page_errors(core, nr)) == errors { Ok(()) } else { Err(MetaError) }
}

fn page_errors(core: &Core, nr: VolumeNr) -> u32 {
    core.volume(nr).and_then(|v| v.disk.as_ref()).map_or(0, |disk| disk.writing.errors)
}

impl Core {
    /// Writes a changed page, or a run of equal ones at once. Returns the page behind them.
    fn write_run(&mut self, nr: VolumeNr, first: u32) -> u32 {
        let Some(disk) = self.volume_mut(nr).and_then(|v| v.disk.as_mut()) else {
            return u32::MAX;
        };
        let Some(value) = disk.bitmap.uniform(first) else {
            self.write_page(nr, first);
            return first + 1;
        };
        let mut end = first;
        while end < disk.bitmap.pages()
            && disk.bitmap.is_changed(end)
            && disk.bitmap.uniform(end) == Some(value)
            && disk.writing.pages.insert(end)
        {
            disk.bitmap.mark_written(end);
            end += 1;
        }
        if end == first {
            return first + 1;
        }
        let at = page_place(disk.layout.bitmap, first);
        let op = MetaOp::Fill { at, blocks: end - first, value };
        self.meta_io(nr, op, Purpose::Pages(first, end - first));
        end
    }
}

/// Sets all bits and makes that stable. The flag in the superblock covers a crash on the way:
/// whoever attaches with it set takes all bits as set. Spec: io-path §7.4.
pub(super) async fn set_all_bits(cx: &Cx, nr: VolumeNr) -> Result<(), MetaError> {
    set_flag(cx, nr, Flags::FULL_SYNC, true).await?;
    cx.with(|core| {
        if let Some(volume) = core.volume_mut(nr)
            && let Some(disk) = volume.disk.as_mut()
        {
            disk.bitmap.set_all();
            disk.bitmap.mark_all_changed();
            volume.claims.all_marked();
        }
        core.touch();
    });
    write_bitmap(cx, nr).await?;
    // The superblock is written with a flush before it: the pages are stable when it is.
    set_flag(cx, nr, Flags::FULL_SYNC, false).await
}

/// Changes a flag of the superblock and makes that stable.
pub(super) async fn set_flag(
    cx: &Cx,
    nr: VolumeNr,
    flag: Flags,
    is_set: bool,
) -> Result<(), MetaError> {
    cx.with(|core| {
        if let Some(disk) = core.volume_mut(nr).and_then(|v| v.disk.as_mut())
            && disk.superblock.flags.contains(flag) != is_set
        {
            disk.superblock.flags.set(flag, is_set);
            core.mark_dirty(nr);
        }
    });
    sync(cx, nr).await
}
