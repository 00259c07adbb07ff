//! Online verify. Spec: io-path-and-resync.md §9; states-and-generations.md §11.6.

use alloc::collections::BTreeMap;
use alloc::format;

use drbd_types::{
    BitCount, Cstate, Dstate, Fields, Sector, SectorCount, SectorRange, Tick, VolumeNr,
};
use drbd_wire::packet::{AckKind, BlockAck, BlockId, BlockRequest, RequestKind};
use drbd_wire::{Digest, Packet};

use crate::action::{DigestUse, DiskOp, Handler};
use crate::log_line::Severity;
use crate::resync::extents::TryLock;
use crate::resync::progress::{DoneLine, Progress, Run};

use super::acks::ack_range;
use super::after::Work;
use super::change::Opt;
use super::io::Purpose;
use super::proc::Cx;
use super::resync::{OwnBlock, STEP, rs_extent};
use super::{Core, call_handler, meta, timers};

/// A verify that runs.
pub(super) struct VerifyRun {
    /// The next block to ask for.
    position: u64,
    /// Blocks that are not compared.
    pub(super) left: u64,
    /// The first sector that is not to be verified; the asking side only.
    stop: Option<u64>,
    /// Requests without result: first sector and length.
    asked: BTreeMap<u64, u64>,
    /// Differences that are not logged: first sector and sectors.
    difference: Option<(u64, u64)>,
    /// The answering side has seen the first request.
    knows_start: bool,
    is_finishing: bool,
    /// Ended by the stop sector, or by the other side.
    is_stopping: bool,
}

impl Core {
    /// Begin and abort of a verify. Spec: states §2.8, 7 and 10.
    pub(super) fn follow_verify(&mut self, nr: VolumeNr, old: &Fields, new: &Fields) {
        let now = self.now;
        if old.conn.is_verify() && !new.conn.is_verify() {
            self.log_difference(nr);
            let Some(volume) = self.volume_mut(nr) else { return };
            let bits = volume.disk.as_ref().map_or(0, |disk| disk.bitmap.bits());
            let Some(run) = volume.resync.verify.take() else { return };
            volume.resync.next_step = None;
            // An end by the loss of a disk brings no results for what is under way.
            volume.extents.clear();
            let at = bits.saturating_sub(run.left) * 8;
            volume.resync.verify_resume = if run.left > 0 { at } else { 0 };
            if run.left > 0 {
                self.info(nr, format!("Online Verify reached sector {at}"));
            }
        }
        if old.conn == Cstate::Connected && new.conn.is_verify() {
            self.begin_verify(nr, new.conn == Cstate::VerifyS, now);
        }
    }

    fn begin_verify(&mut self, nr: VolumeNr, asks: bool, now: Tick) {
        let version = self.conn.version;
        let knows_stop = version >= 97 && version != 100;
        let Some(volume) = self.volume_mut(nr) else { return };
        let bits = volume.disk.as_ref().map_or(0, |disk| disk.bitmap.bits());
        let wanted = if asks && version >= 90 { volume.stats.verify_start / 8 } else { 0 };
        let position = wanted.min(bits.saturating_sub(1));
        let left = bits - position.min(bits);
        let stop = volume.stats.verify_stop.filter(|_| knows_stop && asks);
        volume.resync.controller.start();
        volume.resync.progress = Some(Progress::begin(now, BitCount(left)));
        volume.resync.failed = 0;
        volume.extents.clear();
        volume.resync.verify = Some(VerifyRun {
            position,
            left,
            stop,
            asked: BTreeMap::new(),
            difference: None,
            knows_start: asks,
            is_finishing: false,
            is_stopping: false,
        });
        if asks {
            volume.resync.next_step = Some(now);
            self.info(nr, format!("Starting Online Verify from sector {}", position * 8));
        }
        self.touch();
    }

    /// The answering side learns the start from the first request.
    pub(super) fn note_verify_start(&mut self, nr: VolumeNr, range: SectorRange) {
        let (now, version) = (self.now, self.conn.version);
        let Some(volume) = self.volume_mut(nr) else { return };
        let bits = volume.disk.as_ref().map_or(0, |disk| disk.bitmap.bits());
        let Some(run) = volume.resync.verify.as_mut().filter(|run| !run.knows_start) else {
            return;
        };
        run.knows_start = true;
        if version >= 90 {
            run.position = range.start.0 / 8;
            run.left = bits.saturating_sub(run.position);
            volume.resync.progress = Some(Progress::begin(now, BitCount(run.left)));
            self.info(nr, format!("Online Verify start sector: {}", range.start.0));
        }
    }

    /// One step of the asking side. Spec §9.2.
    pub(super) fn run_verify_step(&mut self, nr: VolumeNr) {
        let now = self.now;
        if self.state(nr).conn != Cstate::VerifyS {
            return;
        }
        let max_buffers = self.conn.net.as_ref().map_or(2048, |net| net.max_buffers);
        let Some(volume) = self.volume_mut(nr) else { return };
        volume.resync.next_step = Some(Tick(now.0 + STEP));
        let allowance = volume.resync.controller.step(max_buffers).0;
        let throttled = self.look_throttle(nr);
        let mut granted = 0;
        while granted < allowance && self.ask_verify(nr, throttled, granted) {
            granted += 1;
        }
        if let Some(volume) = self.volume_mut(nr) {
            volume.resync.controller.on_requested(BitCount(granted));
        }
    }

    /// Asks for one block. Returns false if this step has to end.
    fn ask_verify(&mut self, nr: VolumeNr, throttled: bool, granted: u64) -> bool {
        let Some(volume) = self.volume_mut(nr) else { return false };
        let size = volume.size;
        let Some(disk) = volume.disk.as_ref() else { return false };
        let Some(run) = volume.resync.verify.as_mut() else { return false };
        let start = run.position * 8;
        let is_stopped = run.stop.is_some_and(|stop| start >= stop && granted > 0);
        if run.position >= disk.bitmap.bits() || is_stopped || run.is_stopping {
            volume.resync.next_step = None;
            return false;
        }
        let al = &disk.al;
        let extent = rs_extent(run.position / 4096);
        match volume.extents.try_lock(extent, |e| al.in_use(e), throttled) {
            TryLock::Locked => {}
            TryLock::GiveUp => return false,
        }
        run.position += 1;
        let len = SectorCount(8.min(size.0.saturating_sub(start)));
        run.asked.insert(start, len.0);
        let Some(range) = SectorRange::new(Sector(start), len) else { return false };
        let size = super::request::bytes(range);
        let head = BlockRequest { sector: range.start, id: BlockId::SYNCER, size, undefined: 0 };
        self.send(nr, Packet::Request(RequestKind::Verify, head));
        true
    }

    /// P_OV_REPLY: the peer's digest; the own block is read to be compared.
    pub(super) fn on_verify_reply(
        &mut self,
        nr: VolumeNr,
        request: &BlockRequest,
        digest: Digest,
    ) -> bool {
        let Some(len) = SectorCount::from_bytes_exact(u64::from(request.size)) else {
            return false;
        };
        let Some(range) = SectorRange::new(request.sector, len) else { return false };
        let state = self.state(nr);
        let has_disk = self.volume(nr).is_some_and(|v| v.has_disk());
        if state.disk != Dstate::UpToDate || !has_disk {
            self.send_ack(nr, AckKind::OvResult, range.start, BlockId::IN_SYNC, request.size);
            return true;
        }
        let Some(volume) = self.volume_mut(nr) else { return false };
        let is_known = volume
            .resync
            .verify
            .as_mut()
            .is_some_and(|run| run.asked.get(&range.start.0) == Some(&range.len.0));
        if !is_known {
            // The verify was ended meanwhile, or this was never asked for.
            return state.conn != Cstate::VerifyS;
        }
        volume.resync.controller.on_answer(SectorCount(range.len.0.next_multiple_of(8)));
        let key = volume.resync.own.insert(OwnBlock::Verify(range, digest));
        let digest = Some(DigestUse::Verify);
        let op = DiskOp::Read { range, buf: None, check_zero: false, digest };
        self.disk_io(nr, op, Purpose::OwnBlock(key.raw()));
        true
    }

    pub(super) fn on_own_verify_block(
        &mut self,
        nr: VolumeNr,
        range: SectorRange,
        theirs: Digest,
        own: Option<Digest>,
    ) {
        let Some(volume) = self.volume_mut(nr) else { return };
        volume.stats.dr += range.len.0;
        let Some(run) = volume.resync.verify.as_mut() else { return };
        if run.asked.remove(&range.start.0).is_none() {
            return;
        }
        let is_equal = own == Some(theirs);
        self.put_resync_extent(nr, range);
        let id = if is_equal { BlockId::IN_SYNC } else { BlockId::OUT_OF_SYNC };
        let size = super::request::bytes(range);
        self.compared(nr, range, is_equal);
        self.send_ack(nr, AckKind::OvResult, range.start, id, size);
        self.check_verify_done(nr, range);
    }

    /// The peer has no data for a block that was asked for.
    pub(super) fn on_verify_refused(&mut self, nr: VolumeNr, range: SectorRange) {
        let Some(run) = self.volume_mut(nr).and_then(|v| v.resync.verify.as_mut()) else { return };
        if run.asked.remove(&range.start.0).is_none() {
            return;
        }
        if let Some(volume) = self.volume_mut(nr) {
            volume.resync.controller.on_answer(SectorCount(range.len.0.next_multiple_of(8)));
        }
        self.put_resync_extent(nr, range);
        self.compared(nr, range, true);
        self.check_verify_done(nr, range);
    }

    /// P_OV_RESULT: the answering side.
    pub(super) fn on_verify_result(&mut self, nr: VolumeNr, ack: &BlockAck) {
        let Some(range) = ack_range(ack).filter(|range| self.range_on(nr, *range)) else { return };
        self.put_resync_extent(nr, range);
        self.compared(nr, range, ack.id != BlockId::OUT_OF_SYNC);
        self.check_verify_done(nr, range);
    }

    /// One block was compared.
    fn compared(&mut self, nr: VolumeNr, range: SectorRange, is_equal: bool) {
        let now = self.now;
        if is_equal {
            self.log_difference(nr);
        } else if let Some(volume) = self.volume_mut(nr) {
            volume.set_out_of_sync(range);
            let run = volume.resync.verify.as_mut();
            let before = run.and_then(|run| run.difference);
            let merged = match before {
                Some((start, len)) if start + len == range.start.0 => (start, len + range.len.0),
                _ => {
                    self.log_difference(nr);
                    (range.start.0, range.len.0)
                }
            };
            if let Some(run) = self.volume_mut(nr).and_then(|v| v.resync.verify.as_mut()) {
                run.difference = Some(merged);
            }
        }
        let Some(volume) = self.volume_mut(nr) else { return };
        let Some(run) = volume.resync.verify.as_mut() else { return };
        run.left = run.left.saturating_sub(1);
        let left = BitCount(run.left);
        if let Some(progress) = &mut volume.resync.progress {
            progress.on_verified(now, left);
        }
        self.touch();
    }

    /// The differences that lie side by side, in one line.
    fn log_difference(&mut self, nr: VolumeNr) {
        let run = self.volume_mut(nr).and_then(|v| v.resync.verify.as_mut());
        if let Some((start, len)) = run.and_then(|run| run.difference.take()) {
            let text = format!("Out of sync: start={start}, size={len} (sectors)");
            self.log(Severity::Error, Some(nr), text);
        }
    }

    fn check_verify_done(&mut self, nr: VolumeNr, range: SectorRange) {
        let Some(run) = self.volume_mut(nr).and_then(|v| v.resync.verify.as_mut()) else { return };
        if run.stop.is_some_and(|stop| range.end().0 >= stop) {
            run.is_stopping = true;
        }
        let is_done = run.left == 0 || (run.is_stopping && run.asked.is_empty());
        if is_done && !core::mem::replace(&mut run.is_finishing, true) {
            self.queue_work(Work::FinishVerify { nr });
        }
    }

    /// Length of the digests of a verify.
    pub(super) fn verify_digest_len(&self) -> usize {
        let name = self.conn.net.as_ref().map_or("", |net| net.verify_alg.as_str());
        drbd_wire::Algorithm::from_name(name).map_or(0, drbd_wire::Algorithm::len)
    }
}

/// The asking side has ended the verify.
pub(super) fn on_source_done(core: &mut Core, nr: VolumeNr) {
    if let Some(run) = core.volume_mut(nr).and_then(|v| v.resync.verify.as_mut())
        && !core::mem::replace(&mut run.is_finishing, true)
    {
        core.queue_work(Work::FinishVerify { nr });
    }
}

/// The worker ends a verify. Spec: states §11.6.
pub(super) async fn finish(cx: &Cx, nr: VolumeNr) {
    if !timers::ping(cx).await || !cx.with(|core| core.state(nr).conn.is_verify()) {
        return;
    }
    let found = cx.with(|core| {
        core.log_difference(nr);
        let now = core.now;
        let progress = core.volume(nr).and_then(|v| v.resync.progress.clone());
        if let Some(progress) = progress {
            core.info(nr, format!("{}", DoneLine(Run::Verify, progress.finished(now))));
        }
        let found = core.volume(nr).map_or(0, |v| v.dirty_bits());
        if found > 0 {
            let text = format!("Online verify found {found} 4k block out of sync!");
            core.log(Severity::Alert, Some(nr), text);
        }
        let new = Fields { conn: Cstate::Connected, ..core.state(nr) };
        let _ = core.set_state(nr, new, Opt::VERBOSE);
        if let Some(volume) = core.volume_mut(nr) {
            volume.resync.progress = None;
        }
        found
    });
    if found > 0 {
        call_handler(cx, Handler::OutOfSync, Some(nr)).await;
    }
    let _ = meta::sync(cx, nr).await;
}
