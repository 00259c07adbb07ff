//! The data generation identifiers of a volume: every change marks the superblock dirty and keeps
//! the exposed identifier. Spec: states-and-generations.md §3.

use alloc::format;
use alloc::vec::Vec;

use drbd_types::units::SECTORS_PER_BIT;
use drbd_types::{Cstate, Dstate, Fields, Gi, Role, VolumeNr};

use crate::generation::Slots;
use crate::log_line::Severity;
use crate::plant::{self, Bug};
use crate::state::facts;

use super::proc::Cx;
use super::volume::Volume;
use super::{Core, meta};

impl Core {
    /// Changes the identifiers of a volume with a disk.
    pub(super) fn change_slots<R>(
        &mut self,
        nr: VolumeNr,
        change: impl FnOnce(&mut Slots, Role) -> R,
    ) -> Option<R> {
        let volume = self.volume_mut(nr)?;
        let role = volume.state.role;
        let disk = volume.disk.as_mut()?;
        let before = disk.slots();
        let mut slots = before;
        let result = change(&mut slots, role);
        if slots != before {
            let sb = &mut disk.superblock;
            (sb.current, sb.bitmap, sb.history) = (slots.current, slots.bitmap, slots.history);
            if slots.current != before.current {
                // A disk that is being left is not what the application sees any more.
                if volume.state.disk >= Dstate::Inconsistent {
                    volume.exposed = slots.current;
                }
                volume.marks.current_is_known &= slots.current.same(before.current);
            }
            self.mark_dirty(nr);
        }
        Some(result)
    }

    fn random_gi(&mut self) -> Gi {
        loop {
            // The lowest bit is no part of the identity; the smallest numbers have a meaning.
            let value = self.random.next() & !1;
            if value > 4 {
                return Gi(value);
            }
        }
    }

    /// A new generation, after an event that demands one in any case. Spec §3.2 "new-current".
    /// The caller makes it stable.
    pub(super) fn new_current_uuid(&mut self, nr: VolumeNr) {
        let random = self.random_gi();
        let lost = self.change_slots(nr, |slots, role| slots.new_current(random, role)).flatten();
        if let Some(lost) = lost {
            self.log(Severity::Warn, Some(nr), format!("bm UUID was already set: {:X}", lost.0));
        }
        self.log_slots(nr, "new current UUID");
    }

    /// Does the next write without the peer belong to a new generation? While the bitmap slot is in
    /// use, the original says no; see [`Slots::begin_generation`].
    fn is_generation_due(&self, nr: VolumeNr) -> bool {
        let is_new = |v: &Volume| v.slots().bitmap.is_none() || v.marks.current_is_known;
        !plant::has(Bug::KeepGeneration) && self.volume(nr).is_some_and(is_new)
    }

    /// Does this change mean that writes go on without the peer's data? A new generation begins
    /// then: before any of them is reported as done (defect 14.9), or, if I/O is frozen, when it
    /// goes on and the peer is not back by then. What was only reported to the peer before, as in
    /// Ahead, it lacks already. Spec §2.9 A9, A10.
    pub(super) fn note_generation_due(&mut self, nr: VolumeNr, old: &Fields, new: &Fields) {
        let Some(volume) = self.volume(nr).filter(|v| v.has_disk()) else { return };
        // The target of a resync was lost before: that it is fenced now is no news.
        let is_news = old.conn >= Cstate::Connected
            || old.pdsk != Dstate::Inconsistent
            || volume.slots().bitmap.is_none();
        let is_due = (facts::goes_on_alone(old, new) && is_news
            || facts::loses_target(old, new) && self.is_target_unclear(nr))
            && self.is_generation_due(nr);
        let Some(volume) = self.volume_mut(nr) else { return };
        volume.marks.generation_on_write &= facts::is_only_disk_of_peer(new);
        if !is_due {
            return;
        }
        if old.conn < Cstate::Connected && facts::is_only_disk_of_peer(new) {
            volume.marks.generation_on_write = true;
        } else if facts::writes_are_frozen(new) && !facts::report_out_of_sync(old) {
            volume.marks.uuid_on_thaw = true;
        } else {
            volume.marks.generation_due = true;
        }
    }

    /// Can the target of the resync have got all that it lacks, or never have begun? Otherwise it is
    /// known to be Inconsistent, and needs no new generation to be told from this node.
    fn is_target_unclear(&self, nr: VolumeNr) -> bool {
        let Some(volume) = self.volume(nr) else { return false };
        if !volume.resync.has_target() {
            return true;
        }
        let answered = volume.resync.sectors_unacknowledged();
        let mirrored = self.log.iter().filter(|(_, r)| {
            r.volume == nr && r.kind.is_write() && r.progress.is_unacknowledged_mirror()
        });
        let under_way = answered + mirrored.map(|(_, r)| r.range.len.0).sum::<u64>();
        volume.dirty_bits() <= under_way.div_ceil(SECTORS_PER_BIT)
    }

    /// A new generation because this node writes without its peer from now on. The caller makes it
    /// stable. Returns whether there is a new one.
    pub(super) fn begin_generation(&mut self, nr: VolumeNr) -> bool {
        if !self.is_generation_due(nr) {
            return false;
        }
        let random = self.random_gi();
        self.change_slots(nr, |slots, role| slots.begin_generation(random, role));
        self.log_slots(nr, "new current UUID");
        true
    }

    /// A Primary without a disk writes: the generation that was put off until then begins.
    pub(super) fn begin_with_write(&mut self, nr: VolumeNr) {
        let Some(volume) = self.volume_mut(nr) else { return };
        if core::mem::take(&mut volume.marks.generation_on_write) {
            volume.marks.generation_due = true;
            self.start(move |cx| async move { begin(&cx, nr).await });
        }
    }

    /// The source starts a resync: the identifier that the target gets. Spec §3.4.
    pub(super) fn start_as_source(&mut self, nr: VolumeNr) -> Option<Gi> {
        let random = self.random_gi();
        let sync = self.change_slots(nr, |slots, _| slots.start_as_source(random));
        self.log_slots(nr, "updated sync UUID");
        sync
    }

    pub(super) fn log_slots(&mut self, nr: VolumeNr, what: &str) {
        let slots = self.volume(nr).map_or_else(Slots::default, |v| v.slots());
        self.info(nr, format!("{what} {slots}"));
    }

    /// An identifier for data that nobody has.
    pub(super) fn expose_nothing(&mut self, nr: VolumeNr) {
        let random = self.random_gi();
        if let Some(volume) = self.volume_mut(nr) {
            volume.exposed = random;
        }
    }
}

/// A9, A10: a new generation, if one is still due. Stable before it is told to anybody, and before
/// any write completes that belongs to it.
pub(super) async fn begin(cx: &Cx, nr: VolumeNr) {
    if cx.with(|core| core.begin_generation(nr)) {
        let _ = meta::sync(cx, nr).await;
        cx.with(|core| core.send_uuids(nr, 0));
    }
    cx.with(|core| {
        if let Some(volume) = core.volume_mut(nr) {
            volume.marks.generation_due = false;
        }
        core.touch();
    });
}

/// I/O goes on without the peer: the generations that became due while it was frozen begin, stable
/// before any write ends that the peer does not have. Returns the volumes without a disk.
/// Spec: states §2.10 (4), §7.5; io-path defect 14.9.
pub(super) async fn begin_on_thaw(cx: &Cx) -> Vec<VolumeNr> {
    let mut without_disk = Vec::new();
    for nr in cx.with(|core| core.all_volumes()) {
        let taken = cx.with(|core| {
            let volume = core.volume_mut(nr)?;
            let is_due = core::mem::take(&mut volume.marks.uuid_on_thaw);
            // With the peer back, it gets what was frozen.
            (is_due && facts::writes_alone(&volume.state)).then(|| volume.disk.is_some())
        });
        match taken {
            Some(true) => begin(cx, nr).await,
            Some(false) => without_disk.push(nr),
            None => {}
        }
    }
    without_disk
}
