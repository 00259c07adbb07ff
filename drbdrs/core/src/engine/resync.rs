//! Resynchronisation: its start on both sides, the requests of the target, the accounting, its end.
//! Spec: io-path-and-resync.md §8; states-and-generations.md §3.4, §11.2, §11.3.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::vec::Vec;

use drbd_types::{
    BitCount, Cstate, Dstate, Fields, Gi, RsExtentNr, SectorCount, SectorRange, Tick, VolumeNr,
};
use drbd_wire::packet::{BlockAck, BlockId, BlockRequest, Features, RequestKind};
use drbd_wire::{Digest, Packet};

use crate::action::{DigestUse, DiskOp, Handler};
use crate::config::ResyncConfig;
use crate::event::{DiskAnswer, IoFailure};
use crate::log_line::Severity;
use crate::plant::{self, Bug};
use crate::resync::controller::Controller;
use crate::resync::extents::TryLock;
use crate::resync::progress::{ChecksumLine, DoneLine, Progress, Run, left_to_sync};
use crate::resync::throttle::{Look, Throttle};
use crate::slab::{Key, Slab};
use crate::state::facts;

use super::acks::ack_range;
use super::after::Work;
use super::change::{Done, Opt};
use super::io::Purpose;
use super::proc::Cx;
use super::verify::VerifyRun;
use super::volume::Volume;
use super::{Core, call_handler, meta, timers};

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

    /// An answer goes to the target.
    pub(super) const fn note_answered(&mut self, sectors: SectorCount) {
        self.unacknowledged += 1;
        self.unacknowledged_sectors += sectors.0;
    }

    /// The target has one of the answers, of so many bytes.
    fn note_acknowledged(&mut self, bytes: u32) {
        self.unacknowledged = self.unacknowledged.saturating_sub(1);
        let sectors = u64::from(bytes) / 512;
        self.unacknowledged_sectors = self.unacknowledged_sectors.saturating_sub(sectors);
    }

    /// Sectors of answers that the target may have written without the source knowing.
    pub(super) const fn sectors_unacknowledged(&self) -> u64 {
        self.unacknowledged_sectors
    }

    /// Requests and answers under way, part of the counter `pe`.
    pub(super) fn pending(&self) -> u64 {
        self.unacknowledged + u64::try_from(self.asked.len()).unwrap_or(u64::MAX)
    }
}

// ---- start ----

/// A6, or the start itself below version 96: the identifier of this resync. Spec: states §3.4.
pub(super) async fn send_sync_uuid(cx: &Cx, nr: VolumeNr) {
    let sync = cx.with(|core| {
        if core.volume(nr).is_some_and(|v| v.has_disk()) { core.start_as_source(nr) } else { None }
    });
    let Some(sync) = sync else { return };
    // Stable before the target takes it over. A disk that failed meanwhile may come back with an
    // older one; a source that pulled ahead meanwhile makes another one when it comes back.
    let is_stable = meta::sync(cx, nr).await.is_ok();
    cx.with(|core| {
        if is_stable && facts::is_source(&core.state(nr)) {
            core.send(nr, Packet::SyncUuid(sync));
        }
    });
}

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
    let running = cx.with(|core| {
        let conn = core.state(nr).conn;
        conn >= Cstate::SyncSource && conn < Cstate::Ahead
    });
    if running {
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
                cx.with(|core| core.queue_work(Work::StartResync { nr, side }));
            });
        });
        return;
    }
    if side == Side::Target && cx.with(|core| core.has_checksums()) {
        // Equal blocks are not written again: what a lost connection left in the cache has to last.
        super::io::flush_data(cx, nr).await;
    }
    settle_unlogged_writes(cx, nr).await;
    let begun = cx.with(|core| core.begin_resync(nr, side));
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

    // ---- the target's requests ----

    /// One step of the generator. Spec §8.3.
    pub(super) fn run_resync_step(&mut self, nr: VolumeNr) {
        let now = self.now;
        if self.state(nr).conn != Cstate::SyncTarget
            || !self.volume(nr).is_some_and(|v| v.has_disk())
        {
            if let Some(volume) = self.volume_mut(nr) {
                volume.resync.next_step = None;
            }
            return;
        }
        let max_buffers = self.max_buffers();
        let Some(volume) = self.volume_mut(nr) else { return };
        volume.resync.next_step = Some(Tick(now.0 + STEP));
        let dirty = volume.dirty_bits();
        if dirty <= volume.resync.failed {
            self.queue_finish(nr);
            return;
        }
        let allowance = volume.resync.controller.step(max_buffers).0;
        let throttled = self.look_throttle(nr);
        self.ask_blocks(nr, allowance, throttled);
        if let Some(volume) = self.volume_mut(nr)
            && throttled
        {
            volume.resync.controller.end_step();
        }
    }

    /// Asks for what the last step granted and had no room for.
    fn go_on_with_step(&mut self, nr: VolumeNr) {
        let max_buffers = self.max_buffers();
        let Some(volume) = self.volume(nr) else { return };
        if volume.state.conn != Cstate::SyncTarget || volume.resync.next_step.is_none() {
            return;
        }
        let allowance = volume.resync.controller.more(max_buffers).0;
        if allowance > 0 && volume.has_disk() {
            self.ask_blocks(nr, allowance, false);
        }
    }

    fn max_buffers(&self) -> u32 {
        self.conn.net.as_ref().map_or(2048, |net| net.max_buffers)
    }

    fn ask_blocks(&mut self, nr: VolumeNr, allowance: u64, throttled: bool) {
        let mut granted = 0;
        while granted < allowance && !self.conn.is_send_congested {
            match self.ask_next(nr, allowance - granted, throttled) {
                Some(blocks) => granted += blocks,
                None => break,
            }
        }
        if let Some(volume) = self.volume_mut(nr) {
            volume.resync.controller.on_requested(BitCount(granted));
            if granted < allowance {
                volume.resync.controller.end_step();
            }
        }
    }

    /// Must a resync step aside? Spec §8.6.
    pub(super) fn look_throttle(&mut self, nr: VolumeNr) -> bool {
        let now = self.now;
        let Some(volume) = self.volume_mut(nr) else { return false };
        let left = left_to_sync(BitCount(volume.dirty_bits()), BitCount(volume.resync.failed));
        let speed = volume.resync.progress.as_ref().map_or(0, |p| p.recent_speed(now, left));
        let waiting_for_log = volume.app.waits_for_log();
        let c_min_rate = volume.config.c_min_rate;
        volume.resync.throttle.look(Look { waiting_for_log, c_min_rate, speed })
    }

    /// Asks for the next run of dirty blocks, at most `most` and one more. Returns how many
    /// blocks, or `None` if this step has to end.
    fn ask_next(&mut self, nr: VolumeNr, most: u64, throttled: bool) -> Option<u64> {
        let thin = self.thin_size(nr);
        let largest = u64::from(self.max_data_size(nr)) / 4096;
        let volume = self.volume_mut(nr)?;
        let size = volume.size;
        let disk = volume.disk.as_mut()?;
        let bits = disk.bitmap.bits();
        let Some(first) = disk.bitmap.next_set(volume.resync.cursor) else {
            volume.resync.cursor = bits;
            self.restart_cursor(nr);
            return None;
        };
        let extent = first / 4096;
        let al = &disk.al;
        match volume.extents.try_lock(rs_extent(extent), |e| al.in_use(e), throttled) {
            TryLock::Locked => {}
            TryLock::GiveUp => {
                volume.resync.cursor = first;
                return None;
            }
        }
        let limit = largest.min(thin.map_or(u64::MAX, |bytes| bytes / 4096)).max(1);
        let mut blocks = 1;
        while blocks < limit
            && blocks <= most
            && first.is_multiple_of((blocks + 1).next_power_of_two())
            && (first + blocks) / 4096 == extent
            && first + blocks < bits
            && disk.bitmap.is_set(first + blocks)
        {
            blocks += 1;
        }
        volume.resync.cursor = first + blocks;
        let start = drbd_types::Sector(first * 8);
        let len = SectorCount((blocks * 8).min(size.0.saturating_sub(start.0)));
        let range = SectorRange::new(start, len)?;
        volume.resync.asked.insert(start.0, len.0);
        self.ask_for(nr, range, thin);
        Some(blocks)
    }

    fn ask_for(&mut self, nr: VolumeNr, range: SectorRange, thin: Option<u64>) {
        let Some(volume) = self.volume_mut(nr) else { return };
        if volume.resync.use_checksums {
            let key = volume.resync.own.insert(OwnBlock::Checksum(range));
            let op = DiskOp::Read {
                range,
                buf: None,
                check_zero: false,
                digest: Some(DigestUse::Csums),
            };
            self.disk_io(nr, op, Purpose::OwnBlock(key.raw()));
            return;
        }
        let size = super::request::bytes(range);
        let kind = if thin == Some(u64::from(size)) {
            RequestKind::ThinResync
        } else {
            RequestKind::Resync
        };
        let head = BlockRequest { sector: range.start, id: BlockId::SYNCER, size, undefined: 0 };
        self.send(nr, Packet::Request(kind, head));
    }

    /// The size of thin requests in bytes, if they are used. Spec §8.10.
    fn thin_size(&self, nr: VolumeNr) -> Option<u64> {
        let volume = self.volume(nr)?;
        let wanted = u64::from(volume.config.rs_discard_granularity);
        let limits = volume.disk.as_ref()?.limits();
        let agreed = self.conn.features.contains(Features::THIN_RESYNC);
        // Whole blocks, and whole pieces that the disk can discard (defect 14.13).
        let piece = u64::from(limits.discard_granularity).max(4096);
        let size = wanted.next_multiple_of(piece);
        (wanted > 0 && size <= THIN_MAX && limits.can_discard && agreed).then_some(size)
    }

    /// A bit was set behind the cursor (defect 14.11): once everything asked for is answered, the
    /// generator goes through the device again.
    fn restart_cursor(&mut self, nr: VolumeNr) {
        let Some(volume) = self.volume_mut(nr) else { return };
        let dirty = volume.dirty_bits();
        let run = &mut volume.resync;
        let is_quiet = run.asked.is_empty() && run.writing.is_empty();
        if is_quiet && dirty > run.failed {
            run.cursor = 0;
            run.failed = 0;
        }
    }

    pub(super) fn on_own_block(
        &mut self,
        nr: VolumeNr,
        key: u64,
        result: Result<DiskAnswer, IoFailure>,
    ) {
        let Some(volume) = self.volume_mut(nr) else { return };
        let own = volume.resync.own.remove(Key::from_raw(key));
        let buf = result.ok().and_then(|answer| answer.buf);
        if let Some(buf) = buf {
            self.free(buf);
        }
        let digest = result.ok().and_then(|answer| answer.digest);
        if result.is_err() {
            self.on_data_error(nr, true);
        }
        match own {
            None => {}
            Some(OwnBlock::Verify(range, theirs)) => {
                self.on_own_verify_block(nr, range, theirs, digest);
            }
            Some(OwnBlock::Checksum(range)) => {
                let Some(volume) = self.volume_mut(nr) else { return };
                volume.stats.dr += range.len.0;
                match digest {
                    Some(digest) => {
                        let size = super::request::bytes(range);
                        let head = BlockRequest {
                            sector: range.start,
                            id: BlockId::SYNCER,
                            size,
                            undefined: 0,
                        };
                        self.send(nr, Packet::CsumRequest(head, digest));
                    }
                    // The original forgets the block and never ends. Spec §8.11.
                    None => {
                        self.take_resync_request(nr, range);
                        self.resync_request_done(nr, range, true);
                    }
                }
            }
        }
    }

    // ---- answers ----

    /// Data came that was asked for. The answer counts as arrived.
    pub(super) fn take_resync_request(&mut self, nr: VolumeNr, range: SectorRange) -> bool {
        let Some(volume) = self.volume_mut(nr) else { return false };
        let run = &mut volume.resync;
        if run.asked.get(&range.start.0) != Some(&range.len.0) {
            return false;
        }
        run.asked.remove(&range.start.0);
        run.writing.insert(range.start.0, range.len.0);
        // The last, shorter block of the device counts as a whole one.
        run.controller.on_answer(SectorCount(range.len.0.next_multiple_of(8)));
        self.touch();
        true
    }

    /// A request is finished: its extent is given back; a failed one counts. Spec §8.8.
    pub(super) fn resync_request_done(&mut self, nr: VolumeNr, range: SectorRange, failed: bool) {
        let Some(volume) = self.volume_mut(nr) else { return };
        if volume.resync.writing.remove(&range.start.0).is_none() {
            return;
        }
        volume.resync.controller.on_finished(SectorCount(range.len.0.next_multiple_of(8)));
        put_extent(volume, range);
        if failed {
            self.count_failed(nr, range);
        }
        self.touch();
        self.check_finished(nr);
        if !failed {
            self.go_on_with_step(nr);
        }
    }

    pub(super) fn count_failed(&mut self, nr: VolumeNr, range: SectorRange) {
        let Some(volume) = self.volume_mut(nr) else { return };
        let bits = range.bits_touched();
        let Some(disk) = &volume.disk else { return };
        volume.resync.failed += disk.bitmap.count_in(bits.start.0..bits.end.0);
    }

    /// P_RS_IS_IN_SYNC.
    pub(super) fn on_resync_equal(&mut self, nr: VolumeNr, ack: &BlockAck) {
        let Some(range) = ack_range(ack) else { return };
        if !self.take_resync_request(nr, range) {
            return;
        }
        let blocks = range.len.0.div_ceil(8);
        if let Some(volume) = self.volume_mut(nr) {
            volume.resync.equal += blocks;
        }
        self.clear_bits(nr, range);
        self.resync_request_done(nr, range, false);
    }

    /// P_RS_CANCEL: the source became Ahead. The blocks stay dirty.
    pub(super) fn on_resync_cancelled(&mut self, nr: VolumeNr, ack: &BlockAck) {
        if let Some(range) = ack_range(ack)
            && self.take_resync_request(nr, range)
        {
            if let Some(volume) = self.volume_mut(nr) {
                volume.resync.controller.end_step();
            }
            self.resync_request_done(nr, range, false);
        }
    }

    /// P_NEG_RS_DREPLY.
    pub(super) fn on_resync_refused(&mut self, nr: VolumeNr, ack: &BlockAck) {
        let Some(range) = ack_range(ack) else { return };
        if self.state(nr).conn == Cstate::VerifyS {
            self.on_verify_refused(nr, range);
        } else if self.take_resync_request(nr, range) {
            self.resync_request_done(nr, range, true);
        }
    }

    /// P_RS_WRITE_ACK or P_NEG_ACK of a resync block, on the source.
    pub(super) fn on_resync_ack(&mut self, nr: VolumeNr, ack: &BlockAck, ok: bool) {
        if let Some(volume) = self.volume_mut(nr) {
            volume.resync.note_acknowledged(ack.size);
        }
        let Some(range) = ack_range(ack).filter(|range| self.range_on(nr, *range)) else { return };
        let Some(volume) = self.volume_mut(nr) else { return };
        for range in volume.claims.block_acknowledged(range) {
            if ok {
                self.clear_bits(nr, range);
            } else {
                self.count_failed(nr, range);
            }
        }
        self.check_finished(nr);
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
        let extent = range.start.0 >> 15;
        let is_extent_clean = disk.bitmap.count_in(extent * 4096..(extent + 1) * 4096) == 0;
        let run = &mut volume.resync;
        if let Some(progress) = &mut run.progress
            && run.verify.is_none()
        {
            progress.on_cleared(now, left);
        }
        let is_due = is_extent_clean && now.0 > run.last_page_write.0 + PAGES_INTERVAL;
        if is_due {
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

    // ---- end ----

    /// Is nothing left? The target notices; below version 96 the source does too.
    fn check_finished(&mut self, nr: VolumeNr) {
        let version = self.conn.version;
        let Some(volume) = self.volume(nr) else { return };
        let conn = volume.state.conn;
        let is_done = volume.dirty_bits() <= volume.resync.failed;
        let decides = match conn {
            Cstate::SyncTarget | Cstate::PausedSyncT => true,
            Cstate::SyncSource | Cstate::PausedSyncS => version <= 95 || volume.resync.target_done,
            _ => false,
        };
        if is_done && decides {
            self.queue_finish(nr);
        }
    }

    pub(super) fn queue_finish(&mut self, nr: VolumeNr) {
        let Some(volume) = self.volume_mut(nr) else { return };
        if !core::mem::replace(&mut volume.resync.is_finishing, true) {
            self.queue_work(Work::FinishResync { nr });
        }
    }

    /// The connection is gone, or the disk: what was asked for will not come.
    pub(super) fn cancel_resync(&mut self, nr: VolumeNr) {
        let Some(volume) = self.volume_mut(nr) else { return };
        let run = &mut volume.resync;
        run.asked.clear();
        run.writing.clear();
        run.next_step = None;
        run.unacknowledged = 0;
        run.unacknowledged_sectors = 0;
        run.bitmap_position = None;
        run.failed = 0;
        run.is_finishing = false;
        run.target_done = false;
        run.controller.start();
        volume.extents.clear();
        self.touch();
    }
}

/// P_STATE of a target that is done. Returns whether that ends the resync now. If it comes before
/// the last acknowledgement is processed, it is remembered: the original ignores it then and stays
/// SyncSource for ever. Spec: wire-protocol.md §9.5.
pub(super) fn on_target_done(core: &mut Core, nr: VolumeNr) -> bool {
    if let Some(volume) = core.volume_mut(nr) {
        volume.resync.target_done = true;
    }
    core.check_finished(nr);
    core.volume(nr).is_some_and(|v| v.resync.is_finishing)
}

/// The worker ends a resync. Spec §8.9; states §11.3.
pub(super) async fn finish(cx: &Cx, nr: VolumeNr) {
    let _ = meta::write_bitmap(cx, nr).await;
    // No request is in progress any more.
    cx.until(move |core| {
        let is_over = core.state(nr).conn <= Cstate::Connected;
        let is_quiet = core.volume(nr).is_none_or(|v| {
            v.resync.asked.is_empty() && v.resync.writing.is_empty() && v.serves.is_resync_idle()
        });
        (is_over || is_quiet).then_some(())
    })
    .await;
    if !timers::ping(cx).await || !cx.with(|core| core.state(nr).conn.is_sync()) {
        return;
    }
    let (old, failed) = cx.with(|core| core.finish_numbers(nr));
    let was_target = matches!(old.conn, Cstate::SyncTarget | Cstate::PausedSyncT);
    cx.with(|core| {
        let mut new = Fields { conn: Cstate::Connected, ..core.state(nr) };
        // The target may know of failures that this node has not counted.
        let has_failed = failed > 0 || core.volume(nr).is_some_and(|v| v.dirty_bits() > 0);
        if has_failed {
            if was_target {
                (new.disk, new.pdsk) = (Dstate::Inconsistent, Dstate::UpToDate);
            } else {
                (new.disk, new.pdsk) = (Dstate::UpToDate, Dstate::Inconsistent);
            }
        } else {
            (new.disk, new.pdsk) = (Dstate::UpToDate, Dstate::UpToDate);
            core.finish_generations(nr, was_target);
        }
        let _ = core.set_state(nr, new, Opt::VERBOSE);
        if let Some(volume) = core.volume_mut(nr) {
            volume.resync.failed = 0;
            volume.resync.progress = None;
            volume.resync.next_step = None;
            volume.resync.is_finishing = false;
            volume.resync.target_done = false;
        }
    });
    let _ = meta::sync(cx, nr).await;
    if old.conn == Cstate::SyncSource {
        super::fence::unfence(cx, nr).await;
    }
    if was_target {
        call_handler(cx, Handler::AfterResyncTarget, Some(nr)).await;
    }
}

impl Core {
    /// The lines at the end of a run.
    fn finish_numbers(&mut self, nr: VolumeNr) -> (Fields, u64) {
        let now = self.now;
        let state = self.state(nr);
        let Some(volume) = self.volume(nr) else { return (state, 0) };
        let (failed, equal, with_checksums) =
            (volume.resync.failed, volume.resync.equal, volume.resync.use_checksums);
        let progress = volume.resync.progress.clone();
        if let Some(progress) = progress {
            self.info(nr, format!("{}", DoneLine(Run::Resync, progress.finished(now))));
            if with_checksums {
                let total = progress.total();
                self.info(nr, format!("{}", ChecksumLine { equal: BitCount(equal), total }));
            }
        }
        if failed > 0 {
            self.log(Severity::Error, Some(nr), format!("            {failed} failed blocks"));
        }
        (state, failed)
    }

    /// Both nodes have the same generations now. Spec: states §3.4.
    fn finish_generations(&mut self, nr: VolumeNr, was_target: bool) {
        let peer = self.volume(nr).and_then(|v| v.peer_slots());
        match peer {
            Some(peer) if was_target => {
                self.change_slots(nr, |slots, role| slots.finish_as_target(&peer, role));
            }
            None if was_target => {
                self.log(Severity::Error, Some(nr), "no peer UUIDs at the end of the resync");
            }
            _ => {}
        }
        self.change_slots(nr, |slots, _| slots.clear_bitmap());
        self.log_slots(nr, "updated UUIDs");
        let slots = self.volume(nr).map(|v| v.slots());
        if let Some(volume) = self.volume_mut(nr)
            && let (Some(uuids), Some(slots)) = (&mut volume.peer_uuids, slots)
        {
            uuids.current = slots.current;
            uuids.bitmap = slots.bitmap;
            uuids.history = slots.history;
            // The peer has these identifiers too.
            volume.marks.current_is_known = true;
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
