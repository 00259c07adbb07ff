//! Requests of the upper layer up to their routing: admission, activity log, flushes.
//!
//! ```text
//!   on_app -> waiting -> admitted -> hot extent? --yes--------------------> route
//!                                      \--no--> al_queue -> transaction --> route
//! ```
//! Neither the local write nor the transmission starts before the activity log is stable for all
//! extents of the write. Spec: io-path-and-resync.md §1.1, §1.2, §3.2, §6.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;

use drbd_types::{Cstate, Role, SectorRange, Tick, VolumeNr};

use crate::action::{Action, AppError, DiskOp, MetaOp};
use crate::al::{GetResult, Transaction};
use crate::config::Protocol;
use crate::event::{AppOp, AppRequest, IoFailure};
use crate::ids::AppId;
use crate::interval::Intervals;
use crate::latency::{self, Stage};
use crate::plant::{self, Bug};
use crate::request::Request;
use crate::request::log::ReqKey;
use crate::request::progress::Local;
use crate::slab::{Key, Slab};
use crate::state::facts;

use super::Core;
use super::io::Purpose;
use super::peer_write::PeerWriteKey;
use super::resync::rs_extent;

/// Who is writing a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Writer {
    /// An application request.
    Own(ReqKey),
    /// A write of the peer.
    Peer(PeerWriteKey),
}

/// A request on its way to the log.
#[derive(Clone, Copy, Debug)]
pub(super) struct Parked {
    pub(super) request: AppRequest,
    /// When the upper layer asked for it.
    pub(super) asked_at: Tick,
    /// How often it was tried before.
    pub(super) attempts: u8,
    /// References that it holds in the activity log: of its first extents.
    pub(super) extents_held: u32,
    /// The own disk may have it already, and only this one: it is under way, and keeps what covers
    /// it until it is routed again.
    pub(super) is_begun: bool,
}

impl Parked {
    /// A request that comes from the top.
    pub(super) const fn new(request: AppRequest, asked_at: Tick, attempts: u8) -> Self {
        Self { request, asked_at, attempts, extents_held: 0, is_begun: false }
    }
}

/// An application's flush.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flush {
    app: AppId,
    /// When it was asked for, and when the own disk was.
    asked_at: Tick,
    since: Tick,
    local: Option<Result<(), IoFailure>>,
    /// The peer has to acknowledge the epochs up to this one.
    epoch: Option<u32>,
    mirrored: bool,
}

pub(super) type FlushKey = Key<Flush>;

/// How far an activity-log transaction is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum AlStep {
    #[default]
    Idle,
    /// What belongs to extents that stop being hot becomes stable: their data, and the pages of the
    /// bitmap.
    Pages,
    /// The block is being written.
    Block,
}

/// Requests of one volume that are not in the log.
#[derive(Default)]
pub(super) struct AppQueues {
    /// Not admitted.
    pub(super) waiting: VecDeque<Parked>,
    /// Admitted and not completed; the counter `ap`.
    pub(super) admitted: u32,
    /// Wait for the activity log.
    pub(super) al_queue: VecDeque<Parked>,
    /// Part of the transaction that is being written.
    al_batch: VecDeque<Parked>,
    al_step: AlStep,
    al_pages: Vec<u32>,
    /// The data disk is being flushed for the transaction.
    is_al_flushing: bool,
    /// No extent becomes hot: the meta-data is being rewritten.
    pub(super) is_log_closed: bool,
    /// A write of a diskless Primary needs a transaction.
    pub(super) wants_transaction: bool,
    /// Wait for writes in progress of the same sectors, or until they may go on.
    pub(super) conflicting: VecDeque<Parked>,
    /// Writes in progress.
    pub(super) tree: Intervals<Writer>,
    pub(super) flushes: Slab<Flush>,
    /// Toggles for read balancing.
    pub(super) read_turn: bool,
}

impl AppQueues {
    /// Requests in the transaction that is being written.
    #[cfg(any(test, feature = "check"))]
    pub(super) fn in_batch(&self) -> usize {
        self.al_batch.len()
    }

    /// Admitted requests outside of the log for which no disk works.
    fn at_rest(&self) -> usize {
        let flushed = self.flushes.iter().filter(|(_, flush)| flush.local.is_some()).count();
        self.al_queue.len() + self.conflicting.len() + flushed
    }

    /// Writes that are done again, and perhaps on the own disk already.
    pub(super) fn begun_writes(&self) -> impl Iterator<Item = SectorRange> + '_ {
        let begun = self.conflicting.iter().filter(|parked| parked.is_begun);
        begun.filter_map(|parked| parked.request.op.range())
    }

    /// Does a write wait for the activity log?
    pub(super) fn waits_for_log(&self) -> bool {
        !self.al_queue.is_empty() || !self.al_batch.is_empty()
    }

    /// How many do.
    pub(super) fn waiting_for_log(&self) -> u64 {
        let all = self.al_queue.len() + self.al_batch.len();
        u64::try_from(all).unwrap_or(u64::MAX)
    }
}

/// Requests that are admitted at once without a connection. Spec §1.1.
const ADMITTED_MAX: u32 = 1_000_000;

impl Core {
    pub(super) fn on_app(&mut self, request: AppRequest) {
        let nr = request.volume;
        let Some(volume) = self.volume(nr) else {
            self.refuse(&request, AppError::Invalid);
            return;
        };
        // "Was Primary" must be on disk before the first write.
        if volume.state.role != Role::Primary || !volume.is_open_for_use {
            self.refuse(&request, AppError::ReadOnly);
            return;
        }
        let is_valid = request
            .op
            .range()
            .is_none_or(|range| !range.is_empty() && range.end().0 <= volume.size.0);
        if !is_valid {
            self.refuse(&request, AppError::Invalid);
            return;
        }
        let parked = Parked::new(request, self.now, 0);
        let Some(volume) = self.volume_mut(nr) else { return };
        volume.app.waiting.push_back(parked);
        self.admit_waiting(nr);
    }

    /// A request that was never admitted fails.
    fn refuse(&mut self, request: &AppRequest, error: AppError) {
        self.out.push(Action::CompleteApp { id: request.id, result: Err(error), data: None });
        if let AppOp::Write { buf, .. } = request.op {
            self.free(buf);
        }
    }

    /// May a new request begin now?
    pub(super) fn may_admit(&self, nr: VolumeNr) -> bool {
        let Some(volume) = self.volume(nr) else { return false };
        let state = &volume.state;
        let limit = self.conn.net.as_ref().map_or(ADMITTED_MAX, |net| net.max_buffers);
        let is_held =
            volume.holds > 0 || volume.marks.generation_due || volume.marks.failure_untold;
        facts::accepts_io(state, self.conn.version, is_held) && volume.app.admitted <= limit
    }

    pub(super) fn admit_waiting(&mut self, nr: VolumeNr) {
        while self.volume(nr).is_some_and(|v| !v.app.waiting.is_empty()) && self.may_admit(nr) {
            let Some(volume) = self.volume_mut(nr) else { return };
            let Some(parked) = volume.app.waiting.pop_front() else { return };
            volume.app.admitted += 1;
            self.begin(nr, parked);
        }
    }

    /// An admitted request sets out.
    fn begin(&mut self, nr: VolumeNr, mut parked: Parked) {
        match parked.request.op {
            AppOp::Flush => self.begin_flush(nr, &parked),
            AppOp::Read { .. } => self.route(nr, parked),
            AppOp::Write { range, .. } => {
                if !self.needs_log(nr) || self.take_if_hot(nr, range) {
                    if self.needs_log(nr) {
                        parked.extents_held = 1;
                    }
                    self.route(nr, parked);
                } else {
                    self.queue_for_log(nr, parked);
                }
            }
            AppOp::Discard { .. } | AppOp::WriteZeroes { .. } => {
                if self.needs_log(nr) {
                    self.queue_for_log(nr, parked);
                } else {
                    self.route(nr, parked);
                }
            }
        }
    }

    pub(super) fn needs_log(&self, nr: VolumeNr) -> bool {
        self.volume(nr).is_some_and(|v| v.has_disk() && !v.marks.al_suspended)
    }

    /// The fast path: one extent, hot and open.
    fn take_if_hot(&mut self, nr: VolumeNr, range: SectorRange) -> bool {
        let Some(volume) = self.volume_mut(nr) else { return false };
        let extents = range.al_extents_touched();
        if extents.end - extents.start != 1 || is_closed(volume, extents.start) {
            return false;
        }
        let extent = Self::al_extent(extents.start);
        volume.disk.as_mut().is_some_and(|disk| disk.al.get_hot(extent))
    }

    pub(super) fn queue_for_log(&mut self, nr: VolumeNr, parked: Parked) {
        if let Some(volume) = self.volume_mut(nr) {
            volume.app.al_queue.push_back(parked);
        }
    }

    /// Collects writes, makes their extents hot with one transaction, lets them go. Spec §6.4, §6.5.
    pub(super) fn run_activity_log(&mut self, nr: VolumeNr) {
        loop {
            let Some(volume) = self.volume_mut(nr) else { return };
            match volume.app.al_step {
                AlStep::Block => return,
                AlStep::Pages => {
                    if !self.write_evicted_pages(nr) {
                        return;
                    }
                }
                AlStep::Idle => {
                    let wanted = core::mem::take(&mut volume.app.wants_transaction);
                    if volume.app.al_queue.is_empty() && !wanted {
                        return;
                    }
                    if !self.needs_log(nr) {
                        // The disk has gone meanwhile: they go on without it.
                        self.release_queue(nr);
                        continue;
                    }
                    if !self.collect(nr) {
                        return;
                    }
                }
            }
        }
    }

    fn release_queue(&mut self, nr: VolumeNr) {
        while let Some(parked) = self.volume_mut(nr).and_then(|v| v.app.al_queue.pop_front()) {
            self.route(nr, parked);
        }
    }

    /// Returns whether anything could be collected.
    fn collect(&mut self, nr: VolumeNr) -> bool {
        let Some(volume) = self.volume_mut(nr) else { return false };
        let mut rest = VecDeque::new();
        // What is pending ends also while the log is closed; nothing joins it.
        let mut is_full = volume.app.is_log_closed;
        while let Some(mut parked) = volume.app.al_queue.pop_front() {
            if is_full {
                rest.push_back(parked);
                continue;
            }
            match take_extents(volume, &mut parked) {
                Taken::All => volume.app.al_batch.push_back(parked),
                Taken::Closed => rest.push_back(parked),
                Taken::Full => {
                    is_full = true;
                    rest.push_back(parked);
                }
            }
        }
        volume.app.al_queue = rest;
        let Some(disk) = volume.disk.as_mut() else { return false };
        let updates = volume.config.al_updates && !plant::has(Bug::SkipActivityLog);
        if disk.al.pending() == 0 {
            if volume.app.al_batch.is_empty() {
                return false;
            }
            self.route_batch(nr);
            return true;
        }
        if updates {
            volume.app.al_pages.clear();
            volume.app.al_pages.extend(disk.al.evicted_pages());
            volume.app.al_step = AlStep::Pages;
            // After a crash nobody looks at these extents any more. Spec §15 invariant 52.
            if !volume.app.al_pages.is_empty() && volume.config.disk_flushes {
                volume.app.is_al_flushing = true;
                self.disk_io(nr, DiskOp::Flush, Purpose::AlFlush);
            }
        } else {
            disk.al.commit();
            self.route_batch(nr);
        }
        true
    }

    pub(super) fn on_al_flush(&mut self, nr: VolumeNr, ok: bool) {
        if let Some(volume) = self.volume_mut(nr) {
            volume.app.is_al_flushing = false;
        }
        if !ok {
            self.on_flush_error(nr);
        }
    }

    /// The bits of an extent that stops being hot must be on disk before the block that says so.
    /// Returns whether the block could be handed over.
    fn write_evicted_pages(&mut self, nr: VolumeNr) -> bool {
        let Some(volume) = self.volume_mut(nr) else { return false };
        let pages = core::mem::take(&mut volume.app.al_pages);
        for page in &pages {
            self.write_page(nr, *page);
        }
        let are_written = pages.iter().all(|page| self.is_page_written(nr, *page));
        let Some(volume) = self.volume_mut(nr) else { return false };
        volume.app.al_pages = pages;
        if !volume.has_disk() {
            self.on_al_block(nr, false);
            return true;
        }
        if !are_written || volume.app.is_al_flushing {
            return false;
        }
        let stable = volume.config.md_flushes;
        let Some(disk) = volume.disk.as_mut() else { return false };
        let Transaction { at, block, .. } = disk.al.transaction();
        volume.app.al_step = AlStep::Block;
        volume.stats.al_writes += 1;
        let write = MetaOp::Write { at, block: Box::new(block), stable };
        self.meta_io(nr, write, Purpose::AlBlock);
        true
    }

    /// The block is stable (or the disk is failing): the writes go on.
    pub(super) fn on_al_block(&mut self, nr: VolumeNr, ok: bool) {
        if !ok {
            self.on_meta_error(nr);
        }
        let Some(volume) = self.volume_mut(nr) else { return };
        volume.app.al_step = AlStep::Idle;
        volume.app.al_pages.clear();
        if let Some(disk) = volume.disk.as_mut() {
            if !ok {
                disk.al.transaction_failed();
            }
            disk.al.commit();
        }
        self.route_batch(nr);
    }

    fn route_batch(&mut self, nr: VolumeNr) {
        while let Some(parked) = self.volume_mut(nr).and_then(|v| v.app.al_batch.pop_front()) {
            self.route(nr, parked);
        }
    }

    /// Gives back references of a request that does not go on.
    pub(super) fn put_extents(&mut self, nr: VolumeNr, range: SectorRange, held: u32) {
        let Some(disk) = self.volume_mut(nr).and_then(|v| v.disk.as_mut()) else { return };
        for extent in range.al_extents_touched().take(held as usize) {
            disk.al.put(Self::al_extent(extent));
        }
        self.touch();
    }

    /// The activity log is gone with its disk: nobody holds anything in it, or in the next one. That
    /// has nothing of what is not acknowledged, as far as anybody knows.
    pub(super) fn forget_extents(&mut self, nr: VolumeNr) {
        for key in self.log.keys(|r| r.volume == nr) {
            if let Some(request) = self.log.get_mut(key) {
                request.holds_al = false;
                if request.kind.is_write() && request.progress.local == Local::Ok {
                    request.progress.local = Local::None;
                }
            }
        }
        let Some(volume) = self.volume_mut(nr) else { return };
        let app = &mut volume.app;
        for queue in [&mut app.al_queue, &mut app.al_batch, &mut app.conflicting] {
            for parked in queue {
                parked.extents_held = 0;
                parked.is_begun = false;
            }
        }
        volume.peer_writes.forget_extents();
    }

    /// Requests that wait for admission or for others to finish.
    pub(super) fn run_waiting_requests(&mut self, nr: VolumeNr) {
        self.retry_conflicting(nr);
        self.admit_waiting(nr);
        self.finish_flushes(nr);
    }

    fn retry_conflicting(&mut self, nr: VolumeNr) {
        let Some(volume) = self.volume_mut(nr) else { return };
        for _ in 0..volume.app.conflicting.len() {
            let Some(parked) = self.volume_mut(nr).and_then(|v| v.app.conflicting.pop_front())
            else {
                return;
            };
            // Still in the way? Then it goes to the end of the queue, in its old order.
            self.route(nr, parked);
        }
    }

    // ---- flushes ----

    fn begin_flush(&mut self, nr: VolumeNr, parked: &Parked) {
        let (app, asked_at, since) = (parked.request.id, parked.asked_at, self.now);
        let state = self.state(nr);
        let mirrored = facts::must_replicate(&state);
        let is_strict =
            mirrored && self.conn.net.as_ref().is_some_and(|net| net.protocol == Protocol::C);
        let last = self.log.open_epoch();
        let has_writes = self.log.writes_in_open_epoch() > 0;
        if mirrored {
            self.close_epoch();
        }
        // The original does not wait for the peer here (defect 14.5).
        let epoch = is_strict.then_some(if has_writes { last } else { last.wrapping_sub(1) });
        let has_disk = self.volume(nr).is_some_and(|v| v.has_disk());
        let local = if has_disk { None } else { Some(Ok(())) };
        if !has_disk && !mirrored {
            self.complete_flush(nr, app, Err(AppError::Io));
            return;
        }
        let Some(volume) = self.volume_mut(nr) else { return };
        let key = volume.app.flushes.insert(Flush { app, asked_at, since, local, epoch, mirrored });
        if has_disk {
            self.disk_io(nr, DiskOp::Flush, Purpose::Flush(key));
        }
    }

    pub(super) fn on_flush_io(
        &mut self,
        nr: VolumeNr,
        key: FlushKey,
        result: Result<(), IoFailure>,
    ) {
        let now = self.now;
        let Some(volume) = self.volume_mut(nr) else { return };
        if let Some(flush) = volume.app.flushes.get_mut(key) {
            flush.local = Some(result);
            let micros = now.0.saturating_sub(flush.since.0);
            volume.latencies.note(latency::Kind::Flush, Stage::Disk, micros);
        }
        if result.is_err() {
            self.on_flush_error(nr);
        }
    }

    fn finish_flushes(&mut self, nr: VolumeNr) {
        let Some(volume) = self.volume(nr) else { return };
        if volume.app.flushes.is_empty() || volume.state.is_suspended() {
            return;
        }
        let oldest = self.log.oldest_unacknowledged();
        let is_connected = volume.state.conn >= Cstate::Connected;
        let done: Vec<(FlushKey, AppId, bool)> = volume
            .app
            .flushes
            .iter()
            .filter_map(|(key, flush)| {
                let local = flush.local?;
                let waits = flush.epoch.zip(oldest).is_some_and(|(epoch, oldest)| {
                    // Numbers wrap: a smaller or equal one is at most half of the range behind.
                    oldest.wrapping_sub(epoch).cast_signed() <= 0
                });
                let ok = local.is_ok() || (flush.mirrored && is_connected);
                (!waits).then_some((key, flush.app, ok))
            })
            .collect();
        for (key, app, ok) in done {
            let now = self.now;
            if let Some(volume) = self.volume_mut(nr)
                && let Some(flush) = volume.app.flushes.remove(key)
            {
                let micros = now.0.saturating_sub(flush.asked_at.0);
                volume.latencies.note(latency::Kind::Flush, Stage::Total, micros);
            }
            self.complete_flush(nr, app, if ok { Ok(()) } else { Err(AppError::Io) });
        }
    }

    fn complete_flush(&mut self, nr: VolumeNr, id: AppId, result: Result<(), AppError>) {
        if let Some(volume) = self.volume_mut(nr) {
            volume.app.admitted = volume.app.admitted.saturating_sub(1);
        }
        self.touch();
        self.out.push(Action::CompleteApp { id, result, data: None });
    }

    /// Nobody works for the application any more?
    pub(super) fn is_app_idle(&self, nr: VolumeNr) -> bool {
        self.volume(nr).is_none_or(|v| v.app.admitted == 0)
    }

    /// Is I/O suspended, and does nothing under way go on before it is resumed? Then it can not be
    /// waited for. The blocks of finished writes are marked, as far as the peer may lack them.
    pub(super) fn is_app_frozen(&mut self, nr: VolumeNr) -> bool {
        if !self.is_suspended() {
            return false;
        }
        let Some(volume) = self.volume(nr) else { return true };
        let is_stale = self.conn.has_stale_requests;
        let is_busy = |r: &Request| {
            r.progress.local == Local::Pending || !(is_stale || r.progress.is_finished())
        };
        let in_log = self.log.iter().filter(|(_, r)| r.volume == nr && !r.is_completed).count();
        if volume.app.admitted as usize != in_log + volume.app.at_rest()
            || self.log.iter().any(|(_, r)| r.volume == nr && is_busy(r))
        {
            return false;
        }
        let keys =
            self.log.keys(|r| r.volume == nr && r.kind.is_write() && !r.progress.is_on_both());
        let logged = keys.into_iter().filter_map(|key| self.log.get(key)).map(|r| r.range);
        let begun = volume.app.begun_writes();
        let ranges: Vec<SectorRange> = logged.chain(begun).collect();
        let Some(volume) = self.volume_mut(nr) else { return true };
        for range in ranges {
            volume.set_out_of_sync(range);
        }
        true
    }

    /// A volume ends: what waits for it fails.
    pub(super) fn fail_waiting(&mut self, nr: VolumeNr) {
        while let Some(parked) = self.volume_mut(nr).and_then(|v| v.app.waiting.pop_front()) {
            self.refuse(&parked.request, AppError::ReadOnly);
        }
    }
}

enum Taken {
    All,
    /// A resync has one of its extents.
    Closed,
    /// No slot is free.
    Full,
}

/// Takes references for all extents of a request, or as many as there are slots for.
fn take_extents(volume: &mut super::volume::Volume, parked: &mut Parked) -> Taken {
    let Some(range) = parked.request.op.range() else { return Taken::All };
    let extents = range.al_extents_touched();
    let held = extents.clone().take(parked.extents_held as usize);
    let rest = extents.clone().skip(parked.extents_held as usize);
    // What is closed but waits for a reference that this very write holds can not be locked.
    let is_own = |extent: u64| held.clone().any(|own| own / 4 == extent / 4);
    if rest.clone().any(|extent| is_closed(volume, extent) && !is_own(extent)) {
        for extent in rest {
            volume.extents.set_priority(rs_extent(extent / 4));
        }
        // It must not keep others out while it waits.
        if let Some(disk) = volume.disk.as_mut() {
            for extent in held {
                disk.al.put(Core::al_extent(extent));
            }
        }
        parked.extents_held = 0;
        return Taken::Closed;
    }
    let Some(disk) = volume.disk.as_mut() else { return Taken::All };
    for extent in extents.skip(parked.extents_held as usize) {
        match disk.al.get_for_change(Core::al_extent(extent)) {
            GetResult::Hot | GetResult::Pending => parked.extents_held += 1,
            GetResult::Refused(_) => return Taken::Full,
        }
    }
    Taken::All
}

/// Is the extent closed for writes by a resync?
fn is_closed(volume: &super::volume::Volume, extent: u64) -> bool {
    volume.extents.is_closed_for_writes(Core::al_extent(extent)) && !plant::has(Bug::IgnoreLocks)
}

impl AppOp {
    /// Where; a flush is nowhere.
    pub fn range(&self) -> Option<SectorRange> {
        match *self {
            Self::Read { range, .. }
            | Self::Write { range, .. }
            | Self::Discard { range }
            | Self::WriteZeroes { range, .. } => Some(range),
            Self::Flush => None,
        }
    }
}
