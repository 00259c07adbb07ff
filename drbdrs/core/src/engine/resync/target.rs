//! What the target asks for, and what it makes of the answers. Spec: io-path-and-resync.md §8.3,
//! §8.8.

use drbd_types::{BitCount, Cstate, Sector, SectorCount, SectorRange, Tick, VolumeNr};
use drbd_wire::Packet;
use drbd_wire::packet::{BlockAck, BlockId, BlockRequest, Features, RequestKind};

use crate::action::{DigestUse, DiskOp};
use crate::engine::Core;
use crate::engine::acks::ack_range;
use crate::engine::io::Purpose;
use crate::engine::request::bytes;
use crate::event::{DiskAnswer, IoFailure};
use crate::resync::extents::TryLock;
use crate::resync::progress::left_to_sync;
use crate::resync::throttle::Look;
use crate::slab::Key;

use super::{OwnBlock, STEP, THIN_MAX, put_extent, rs_extent};

impl Core {
    /// One step of the generator. Spec §8.3.
    pub(in crate::engine) fn run_resync_step(&mut self, nr: VolumeNr) {
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
    pub(in crate::engine) fn look_throttle(&mut self, nr: VolumeNr) -> bool {
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
        let start = Sector(first * 8);
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
        let size = bytes(range);
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

    pub(in crate::engine) fn on_own_block(
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
                        let size = bytes(range);
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
    pub(in crate::engine) fn take_resync_request(
        &mut self,
        nr: VolumeNr,
        range: SectorRange,
    ) -> bool {
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
    pub(in crate::engine) fn resync_request_done(
        &mut self,
        nr: VolumeNr,
        range: SectorRange,
        failed: bool,
    ) {
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

    pub(in crate::engine) fn count_failed(&mut self, nr: VolumeNr, range: SectorRange) {
        let Some(volume) = self.volume_mut(nr) else { return };
        let bits = range.bits_touched();
        let Some(disk) = &volume.disk else { return };
        volume.resync.failed += disk.bitmap.count_in(bits.start.0..bits.end.0);
    }

    /// P_RS_IS_IN_SYNC.
    pub(in crate::engine) fn on_resync_equal(&mut self, nr: VolumeNr, ack: &BlockAck) {
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
    pub(in crate::engine) fn on_resync_cancelled(&mut self, nr: VolumeNr, ack: &BlockAck) {
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
    pub(in crate::engine) fn on_resync_refused(&mut self, nr: VolumeNr, ack: &BlockAck) {
        let Some(range) = ack_range(ack) else { return };
        if self.state(nr).conn == Cstate::VerifyS {
            self.on_verify_refused(nr, range);
        } else if self.take_resync_request(nr, range) {
            self.resync_request_done(nr, range, true);
        }
    }
}
