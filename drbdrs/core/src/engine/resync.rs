//! Resynchronisation: its start on both sides, what both sides know of it; [`target`] asks and
//! [`source`] sends, [`end`] ends it. Spec: io-path-and-resync.md §8; states-and-generations.md
//! §3.4, §11.2.

mod end;
mod source;
mod target;

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::vec::Vec;

use drbd_types::{
    BitCount, Cstate, Dstate, Fields, Gi, RsExtentNr, SectorCount, SectorRange, Tick, VolumeNr,
};
use drbd_wire::Digest;

use crate::action::Handler;
use crate::config::ResyncConfig;
use crate::log_line::Severity;
use crate::plant::{self, Bug};
use crate::resync::controller::Controller;
use crate::resync::progress::{Progress, left_to_sync};
use crate::resync::throttle::Throttle;
use crate::slab::Slab;

use super::after::Work;
use super::change::{Done, Opt};
use super::proc::Cx;
use super::verify::VerifyRun;
use super::volume::Volume;
use super::{Core, call_handler, meta};

pub(super) use self::end::{finish, on_target_done};
pub(super) use self::source::send_sync_uuid;

/// Largest thin request, bytes.
const THIN_MAX: u64 = 1 << 20;
/// The period of the request generator, microseconds. Spec §8.3.
pub(super) const STEP: u64 = 100_000;
/// Changed pages are written at most so often while a resync runs, microseconds. Spec §7.4.
const PAGES_INTERVAL: u64 = 2_000_000;

/// Which side of a resync.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Source,
    Target,
}

/// An own block that is read to be compared.
#[derive(Clone, Copy, Debug)]
pub(super) enum OwnBlock {
    /// For a checksum based request.
    Checksum(SectorRange),
    /// To be compared with the peer's.
    Verify(SectorRange, Digest),
}

/// A resync or verify of one volume, and what remains of the last one.
pub(super) struct ResyncRun {
    pub(super) controller: Controller,
    throttle: Throttle,
    pub(super) progress: Option<Progress>,
    /// Blocks that could not be copied.
    pub(super) failed: u64,
    /// Blocks whose checksums were equal.
    equal: u64,
    use_checksums: bool,
    /// The generator looks from this bit on.
    cursor: u64,
    /// When it works next; `None`: it does not.
    pub(super) next_step: Option<Tick>,
    /// Requests to the peer without final answer: first sector and length.
    asked: BTreeMap<u64, u64>,
    /// Of these, with data that is being written here.
    writing: BTreeMap<u64, u64>,
    pub(super) own: Slab<OwnBlock>,
    /// Answers of this node that the peer has not acknowledged, and their sectors.
    unacknowledged: u64,
    unacknowledged_sectors: u64,
    /// The source of the bits that come: position in the transfer.
    pub(super) bitmap_position: Option<u64>,
    is_finishing: bool,
    /// The target has said that it is done.
    target_done: bool,
    /// The target is in this run too: it has sent its bitmap for it, or asked for a block.
    has_target: bool,
    last_page_write: Tick,
    pub(super) verify: Option<VerifyRun>,
    /// Where an interrupted verify goes on, in sectors.
    pub(super) verify_resume: u64,
}

impl ResyncRun {
    pub(super) fn new(rates: ResyncConfig) -> Self {
        Self {
            controller: Controller::new(rates),
            throttle: Throttle::default(),
            progress: None,
            failed: 0,
            equal: 0,
            use_checksums: false,
            cursor: 0,
            next_step: None,
            asked: BTreeMap::new(),
            writing: BTreeMap::new(),
            own: Slab::new(),
            unacknowledged: 0,
            unacknowledged_sectors: 0,
            bitmap_position: None,
            is_finishing: false,
            target_done: false,
            has_target: false,
            last_page_write: Tick(0),
            verify: None,
            verify_resume: 0,
        }
    }

    #[cfg(any(test, feature = "check"))]
    pub(super) fn describe(&self) -> alloc::string::String {
        format!(
            "(run {}, failed {}, cursor {}, next {:?}, asked {:?}, writing {:?}, own {}, \
             unacknowledged {}, position {:?}, finishing {}, target done {}, verify {})",
            self.progress.is_some(),
            self.failed,
            self.cursor,
            self.next_step,
            self.asked,
            self.writing,
            self.own.len(),
            self.unacknowledged,
            self.bitmap_position,
            self.is_finishing,
            self.target_done,
            self.verify.is_some(),
        )
    }

    pub(super) fn set_rates(&mut self, rates: ResyncConfig) {
        self.controller.set_config(rates);
    }

    pub(super) fn on_other_io(&mut self, sectors: SectorCount) {
        self.throttle.on_other_io(sectors);
    }

    pub(super) const fn is_receiving_bitmap(&self) -> bool {
        self.bitmap_position.is_some()
    }

    /// Is the target in this run too, so that its reports are about it?
    pub(super) const fn has_target(&self) -> bool {
        self.has_target
    }

    /// The target asks for a block.
    pub(super) const fn note_asked(&mut self) {
        self.has_target = true;
    }

    /// Where the generator is, for views.
    pub(super) const fn cursor(&self) -> u64 {
        self.cursor
    }

    /// Blocks whose checksums were equal.
    pub(super) const fn equal(&self) -> u64 {
        self.equal
    }

    /// Sectors of requests without final answer.
    pub(super) fn sectors_asked(&self) -> u64 {
        self.asked.values().sum()
    }

    /// Requests and answers under way, part of the counter `pe`.
    pub(super) fn pending(&self) -> u64 {
        self.unacknowledged + u64::try_from(self.asked.len()).unwrap_or(u64::MAX)
    }
}

// ---- start ----

/// P_SYNC_UUID.
pub(super) async fn on_sync_uuid(cx: &Cx, nr: VolumeNr, sync: Gi) {
    // The own way to this state may not be finished.
    let may_start = cx
        .until(move |core| {
            let state = core.state(nr);
            if state.conn < Cstate::Connected || state.disk < Dstate::Negotiating {
                return Some(false);
            }
            // It belongs to a resync that ended with the disk that was there before: what is to
            // become of the new one is only said by packets behind this one.
            if state.disk == Dstate::Negotiating && state.conn == Cstate::Connected {
                return Some(false);
            }
            matches!(state.conn, Cstate::WFSyncUUID | Cstate::Behind).then_some(true)
        })
        .await;
    if !may_start {
        cx.with(|core| core.log(Severity::Error, Some(nr), "Ignoring SyncUUID packet!"));
        return;
    }
    cx.with(|core| {
        core.change_slots(nr, |slots, role| slots.start_as_target(sync, role));
        core.log_slots(nr, "updated sync uuid");
    });
    start(cx, nr, Side::Target).await;
}

/// Spec: states §11.2.
pub(super) async fn start(cx: &Cx, nr: VolumeNr, side: Side) {
    let from = cx.with(|core| core.state(nr).conn);
    if from >= Cstate::SyncSource && from < Cstate::Ahead {
        cx.with(|core| core.log(Severity::Error, Some(nr), "Resync already running!"));
        return;
    }
    if !ask_handler(cx, nr, side).await {
        return;
    }
    // A command that holds the mutex may wait for the worker, so the worker does not wait for it.
    let is_locked = cx.with(|core| core.is_state_locked(nr));
    if is_locked {
        cx.with(|core| {
            if let Some(volume) = core.volume_mut(nr) {
                volume.marks.before_handler_done = true;
            }
            core.start(move |cx| async move {
                cx.until(move |core| (!core.is_state_locked(nr)).then_some(())).await;
                cx.with(|core| {
                    if !core.is_source_ahead(nr, from) {
                        core.queue_work(Work::StartResync { nr, side });
                    }
                });
            });
        });
        return;
    }
    if side == Side::Target && cx.with(|core| core.has_checksums()) {
        // Equal blocks are not written again: what a lost connection left in the cache has to last.
        super::io::flush_data(cx, nr).await;
    }
    settle_unlogged_writes(cx, nr).await;
    let begun = cx.with(|core| !core.is_source_ahead(nr, from) && core.begin_resync(nr, side));
    if begun && side == Side::Source && cx.with(|core| core.conn.version < 96) {
        send_sync_uuid(cx, nr).await;
    }
    let finishes = cx.with(|core| {
        let total = core.volume(nr).map_or(0, |v| v.dirty_bits());
        begun && core.conn.version < 95 && total == 0
    });
    if finishes {
        cx.with(|core| core.queue_finish(nr));
    }
    let _ = meta::sync(cx, nr).await;
}

/// What was written while the activity log was suspended has only its bits, and the resync clears
/// them: it has to be on the medium before.
async fn settle_unlogged_writes(cx: &Cx, nr: VolumeNr) {
    let is_due = cx.with(|core| {
        core.volume_mut(nr).is_some_and(|v| core::mem::take(&mut v.marks.wrote_without_log))
    });
    if !is_due {
        return;
    }
    cx.until(move |core| (!core.has_unlogged_writes(nr)).then_some(())).await;
    super::io::flush_data(cx, nr).await;
}

/// Returns whether the handler lets the resync begin.
async fn ask_handler(cx: &Cx, nr: VolumeNr, side: Side) -> bool {
    let is_done = cx.with(|core| {
        core.volume_mut(nr).is_some_and(|v| core::mem::take(&mut v.marks.before_handler_done))
    });
    if is_done {
        return true;
    }
    let (handler, name) = match side {
        Side::Source => (Handler::BeforeResyncSource, "before-resync-source"),
        Side::Target => (Handler::BeforeResyncTarget, "before-resync-target"),
    };
    let exit = call_handler(cx, handler, Some(nr)).await;
    match (side, exit) {
        (_, ..=0) => true,
        (Side::Source, 3) => {
            let text = format!("{name} handler returned {exit}, ignoring. Old userland tools?");
            cx.with(|core| core.info(nr, text));
            true
        }
        _ => {
            let text = format!("{name} handler returned {exit}, dropping connection.");
            cx.with(|core| {
                core.log(Severity::Error, Some(nr), text);
                core.force_conn(Cstate::Disconnecting);
            });
            false
        }
    }
}

impl Core {
    /// Has the source pulled ahead since this state? Then this start is over: with its return comes
    /// another identifier, and nothing may be asked for before.
    fn is_source_ahead(&self, nr: VolumeNr, from: Cstate) -> bool {
        from != Cstate::Behind && self.state(nr).conn == Cstate::Behind
    }

    /// Returns whether the resync has begun (perhaps paused).
    fn begin_resync(&mut self, nr: VolumeNr, side: Side) -> bool {
        let state = self.state(nr);
        if state.conn < Cstate::Connected || state.disk < Dstate::Negotiating {
            return false;
        }
        let must_wait = self.volume(nr).is_some_and(|v| v.must_wait);
        let mut new = Fields { aftr_isp: must_wait, ..state };
        match side {
            Side::Source => {
                new.conn = Cstate::SyncSource;
                new.pdsk = Dstate::Inconsistent;
            }
            Side::Target => {
                new.conn = Cstate::SyncTarget;
                new.disk = Dstate::Inconsistent;
            }
        }
        let result = self.set_state(nr, new, Opt::VERBOSE);
        if result != Ok(Done::Changed) || self.state(nr).conn < Cstate::Connected {
            return false;
        }
        self.reset_run(nr, side, state.conn == Cstate::WFBitMapS);
        true
    }

    /// May a resync compare checksums?
    fn has_checksums(&self) -> bool {
        self.conn.version >= 89
            && self.conn.net.as_ref().is_some_and(|net| !net.csums_alg.is_empty())
    }

    fn reset_run(&mut self, nr: VolumeNr, side: Side, has_target: bool) {
        let now = self.now;
        let has_csums = self.has_checksums();
        let only_after_crash = self.conn.net.as_ref().is_some_and(|net| net.csums_after_crash_only);
        let Some(volume) = self.volume_mut(nr) else { return };
        let total = volume.dirty_bits();
        let conn = volume.state.conn;
        let is_paused = volume.state.is_paused();
        let crashed = volume.marks.crashed_primary;
        let run = &mut volume.resync;
        run.controller.start();
        let mut progress = Progress::begin(now, BitCount(total));
        if is_paused {
            progress.pause(now);
        }
        run.progress = Some(progress);
        run.failed = 0;
        run.equal = 0;
        run.cursor = 0;
        run.is_finishing = false;
        run.target_done = false;
        run.has_target = has_target;
        run.last_page_write = now;
        run.use_checksums = side == Side::Target && has_csums && (!only_after_crash || crashed);
        run.next_step = (side == Side::Target && !is_paused).then_some(now);
        volume.extents.clear();
        let text = format!(
            "Began resync as {conn} (will sync {} KB [{total} bits set]).",
            total.saturating_mul(4)
        );
        self.info(nr, text);
        self.touch();
    }

    /// A peer's disk came: counters of an earlier resync mean nothing. Spec: states A7.
    pub(super) fn reset_resync_counters(&mut self, nr: VolumeNr) {
        if let Some(volume) = self.volume_mut(nr) {
            volume.resync.failed = 0;
            volume.resync.progress = None;
        }
    }

    /// New blocks after a growth. Spec: states §5.6.
    pub(super) fn resync_new_storage(&mut self, nr: VolumeNr) {
        self.info(nr, "Resync of new storage after online grow");
        let state = self.state(nr);
        let is_source = if state.role == state.peer {
            self.conn.resolve_conflicts
        } else {
            state.role == drbd_types::Role::Primary
        };
        if is_source {
            self.queue_work(Work::StartResync { nr, side: Side::Source });
        } else {
            let new = Fields { conn: Cstate::WFSyncUUID, ..state };
            let _ = self.set_state(nr, new, Opt::VERBOSE);
        }
    }

    /// What changes of the state mean for a resync or verify. Spec: states §2.8, 1, 7 to 10.
    pub(super) fn follow_resync(&mut self, nr: VolumeNr, old: &Fields, new: &Fields) {
        let now = self.now;
        let was_paused = matches!(old.conn, Cstate::PausedSyncS | Cstate::PausedSyncT);
        let is_paused = matches!(new.conn, Cstate::PausedSyncS | Cstate::PausedSyncT);
        let was_running = matches!(old.conn, Cstate::SyncSource | Cstate::SyncTarget);
        let is_running = matches!(new.conn, Cstate::SyncSource | Cstate::SyncTarget);
        if was_paused && is_running {
            self.info(nr, "Syncer continues.");
        }
        if was_running && is_paused {
            self.info(nr, "Resync suspended");
        }
        let Some(volume) = self.volume_mut(nr) else { return };
        let run = &mut volume.resync;
        if !old.conn.is_sync() && new.conn.is_sync() {
            run.is_finishing = false;
            run.target_done = false;
        }
        if was_paused && is_running {
            if let Some(progress) = &mut run.progress {
                progress.resume(now);
            }
            if new.conn == Cstate::SyncTarget {
                run.next_step = Some(now);
            }
        }
        if was_running && is_paused {
            if let Some(progress) = &mut run.progress {
                progress.pause(now);
            }
            run.next_step = None;
            volume.extents.release_half_way();
        }
        if old.pdsk >= Dstate::Inconsistent && new.pdsk < Dstate::Inconsistent {
            volume.claims.all_marked();
        }
        self.follow_verify(nr, old, new);
    }

    /// Blocks are equal on both nodes: clears what the range covers completely. Spec §7.3.
    pub(super) fn clear_bits(&mut self, nr: VolumeNr, range: SectorRange) {
        let now = self.now;
        let Some(volume) = self.volume_mut(nr) else { return };
        let covered = if plant::has(Bug::ClearPartly) {
            range.bits_touched()
        } else {
            range.bits_covered(volume.size)
        };
        let Some(disk) = volume.disk.as_mut() else { return };
        let cleared = disk.bitmap.clear(covered.start.0..covered.end.0);
        if cleared == 0 {
            return;
        }
        let left = left_to_sync(BitCount(disk.bitmap.count()), BitCount(volume.resync.failed));
        let run = &mut volume.resync;
        if let Some(progress) = &mut run.progress
            && run.verify.is_none()
        {
            progress.on_cleared(now, left);
        }
        let extent = range.start.0 >> 15;
        let next_set = || disk.bitmap.next_set(extent * 4096);
        let is_extent_clean = || next_set().is_none_or(|bit| bit >= (extent + 1) * 4096);
        if now.0 > run.last_page_write.0 + PAGES_INTERVAL && is_extent_clean() {
            run.last_page_write = now;
            self.queue_work(Work::WriteBitmap { nr });
        }
        self.check_finished(nr);
    }

    /// What is left of a claim is equal on both nodes.
    pub(super) fn clear_claimed(&mut self, nr: VolumeNr, claimed: Vec<SectorRange>) {
        for range in claimed {
            self.clear_bits(nr, range);
        }
    }

    /// Another volume of this node began or ended a resync.
    pub(super) fn on_dependency(&mut self, nr: VolumeNr, must_wait: bool) {
        if let Some(volume) = self.volume_mut(nr) {
            volume.must_wait = must_wait;
        }
        if self.state(nr).aftr_isp != must_wait {
            let _ = self.force(nr, |s| s.aftr_isp = must_wait);
        }
        self.touch();
    }

    /// Answers that this volume owes and is owed, for the balancing of reads.
    pub(super) fn pending_of_peer(&self, nr: VolumeNr) -> u32 {
        let own =
            self.log.iter().filter(|(_, r)| r.volume == nr && r.progress.is_pending()).count();
        let resync = self.volume(nr).map_or(0, |v| v.resync.pending());
        u32::try_from(own)
            .unwrap_or(u32::MAX)
            .saturating_add(u32::try_from(resync).unwrap_or(u32::MAX))
    }
}

/// A resync extent by number. A device has at most 2^26 of them.
pub(super) fn rs_extent(number: u64) -> RsExtentNr {
    RsExtentNr(u32::try_from(number).unwrap_or(u32::MAX))
}

/// Gives a reference back, if there is one: the range may come from the peer.
pub(super) fn put_extent(volume: &mut Volume, range: SectorRange) {
    let extent = rs_extent(range.start.0 >> 15);
    if volume.extents.references(extent) > 0 {
        volume.extents.put(extent);
    }
}
