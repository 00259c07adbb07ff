//! Writes that the peer sends: replicated ones and resync data.
//!
//! ```text
//!   received -> counted in its epoch -> (P_RECV_ACK) -> gates -> disk -> ack -> epoch accounting
//! ```
//! Gates, in order: its turn in the sequence and conflicts (two Primaries only), a resync write of
//! the same sectors, the activity log (diskless Primary only), all earlier writes (discards). A
//! write that waits at a gate keeps its place; the receiver goes on. Writes are given to the disk in
//! the order of the stream wherever they overlap. Spec: io-path-and-resync.md §2, §5, §8.8.

use alloc::collections::VecDeque;
use alloc::format;
use alloc::vec::Vec;

use drbd_types::{Cstate, Dstate, SectorCount, SectorRange, Tick, VolumeNr};
use drbd_wire::packet::{AckKind, Block, BlockDesc, BlockId, DpFlags, Features};

use crate::action::DiskOp;
use crate::al::GetResult;
use crate::config::Protocol;
use crate::event::{IoFailure, Payload, WriteFlags};
use crate::ids::BufId;
use crate::interval::Intervals;
use crate::log_line::Severity;
use crate::peer_write::epochs::EpochId;
use crate::plant::{self, Bug};
use crate::request::log::ReqKey;
use crate::request::progress::Local;
use crate::slab::{Key, Slab};

use super::Core;
use super::app::Writer;
use super::barriers::Written;
use super::claims::Claim;
use super::io::Purpose;
use super::volume::Volume;

/// What is to be done with the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    Data(BufId, WriteFlags),
    Discard,
    Zeroes { may_unmap: bool },
}

/// One write of the peer.
#[derive(Clone, Copy, Debug)]
pub(super) struct PeerWrite {
    range: SectorRange,
    what: What,
    /// Replicated: its epoch. Resync data: none.
    epoch: Option<EpochId>,
    id: BlockId,
    seq: u32,
    /// Bytes, for the acknowledgement.
    size: u32,
    may_set_in_sync: bool,
    wants_write_ack: bool,
    /// Its place in the order of the stream, over all volumes.
    order: u64,
    /// It is entered among the writes in progress of the application (two Primaries).
    is_in_tree: bool,
    /// References in the activity log (diskless Primary).
    extents_held: u32,
    /// The sender had no disk: this is the only copy.
    is_only_copy: bool,
    since: Tick,
    /// Result, until it can be acknowledged.
    result: Result<(), IoFailure>,
    /// A connection ago: nobody wants an acknowledgement.
    is_orphan: bool,
    /// Its conflict with an own write was logged.
    is_told: bool,
}

pub(super) type PeerWriteKey = Key<PeerWrite>;

impl PeerWrite {
    /// Data of a resync, of so many bytes.
    fn new(range: SectorRange, what: What, size: u32, order: u64, since: Tick) -> Self {
        Self {
            range,
            what,
            epoch: None,
            id: BlockId::SYNCER,
            seq: 0,
            size,
            may_set_in_sync: true,
            wants_write_ack: true,
            order,
            is_in_tree: false,
            extents_held: 0,
            is_only_copy: false,
            since,
            result: Ok(()),
            is_orphan: false,
            is_told: false,
        }
    }
}

impl Volume {
    /// It waits for its gates.
    fn enter_peer_write(&mut self, write: PeerWrite) {
        let key = self.peer_writes.all.insert(write);
        if write.may_set_in_sync {
            self.claims.make(write.range, Claim::Peer(key));
        }
        self.peer_writes.undone.insert(write.range, (write.order, key));
        self.peer_writes.waiting.push_back(key);
    }
}

/// Writes of the peer to one volume.
#[derive(Default)]
pub(super) struct PeerWrites {
    all: Slab<PeerWrite>,
    /// Those that are not at the disk yet, in the order of the stream.
    waiting: VecDeque<PeerWriteKey>,
    /// Those that the disk has not done, by place; with their place in the stream.
    undone: Intervals<(u64, PeerWriteKey)>,
    /// Written resync data that waits for a flush.
    unflushed: Vec<PeerWriteKey>,
    /// Of these, covered by the flush that runs.
    flushing: Vec<PeerWriteKey>,
}

impl PeerWrites {
    /// Acknowledgements that this node still owes, the counter `ua`.
    pub(super) fn owed(&self) -> usize {
        self.all.iter().filter(|(_, w)| w.epoch.is_none() || w.wants_write_ack).count()
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Has the disk not done a write to this range that came before this place in the stream?
    pub(super) fn has_undone(&self, range: SectorRange, order: u64) -> bool {
        self.undone.overlapping(range).any(|(_, (write, _))| write < order)
    }

    /// The activity log is gone with its disk.
    pub(super) fn forget_extents(&mut self) {
        let keys: Vec<PeerWriteKey> = self.all.iter().map(|(key, _)| key).collect();
        for key in keys {
            if let Some(write) = self.all.get_mut(key) {
                write.extents_held = 0;
            }
        }
    }

    #[cfg(any(test, feature = "check"))]
    pub(super) fn touches(&self, sectors: SectorRange) -> bool {
        let is_one = |write: &PeerWrite| write.epoch.is_some() && write.range.overlaps(sectors);
        self.all.iter().any(|(_, write)| is_one(write))
    }

    #[cfg(any(test, feature = "check"))]
    pub(super) fn describe(&self) -> alloc::string::String {
        let all: Vec<_> = self.all.iter().map(|(_, write)| write).collect();
        format!("{all:?} unflushed {} flushing {}", self.unflushed.len(), self.flushing.len())
    }
}

impl Core {
    /// P_DATA, P_TRIM, P_ZEROES. Spec: wire-protocol.md §5.5.
    pub(super) fn on_peer_data(
        &mut self,
        nr: VolumeNr,
        block: &Block,
        size: u32,
        what: What,
        payload: Option<Payload>,
    ) -> bool {
        let Some(volume) = self.volume(nr) else { return false };
        if volume.state.disk < Dstate::Inconsistent || volume.disk.is_none() {
            self.drain_peer_data(nr, block, size, what);
            return true;
        }
        let Some(range) = self.peer_range(nr, block.sector, size, what) else {
            self.free_payload(what);
            return false;
        };
        if payload.is_some_and(|p| p.digest_ok == Some(false)) {
            let text = format!("Digest integrity check FAILED: {}s +{size}", range.start.0);
            self.log(Severity::Error, Some(nr), text);
            self.free_payload(what);
            return false;
        }
        let epoch = self.peer_epochs.received();
        let (wants_recv_ack, wants_write_ack) = self.wanted_acks(block.flags);
        let is_only_copy = self.state(nr).pdsk < Dstate::Inconsistent;
        let now = self.now;
        if wants_recv_ack {
            self.send_ack(nr, AckKind::RecvAck, block.sector, block.id, size);
        }
        let is_early = wants_write_ack && plant::has(Bug::AcknowledgeEarly);
        if is_early {
            self.send_ack(nr, AckKind::WriteAck, block.sector, block.id, size);
        }
        let wants_write_ack = wants_write_ack && !is_early;
        let has_two = self.conn.has_two_primaries();
        if !has_two {
            self.note_seq(nr, block.seq);
        }
        let order = self.next_order();
        self.conn.active_writes.insert(order);
        let Some(volume) = self.volume_mut(nr) else { return false };
        volume.stats.nr += payload.map_or(0, |p| p.len.0 / 512);
        if is_only_copy {
            volume.set_out_of_sync(range);
        }
        let may_set_in_sync = block.flags.contains(DpFlags::MAY_SET_IN_SYNC) && !is_only_copy;
        volume.enter_peer_write(PeerWrite {
            epoch: Some(epoch),
            id: block.id,
            seq: block.seq,
            may_set_in_sync,
            wants_write_ack,
            is_only_copy,
            ..PeerWrite::new(range, what, size, order, now)
        });
        self.touch();
        true
    }

    /// A write that is not carried out and not answered.
    fn drop_peer_write(&mut self, nr: VolumeNr, key: PeerWriteKey) {
        self.forget_order(nr, key);
        let Some(volume) = self.volume_mut(nr) else { return };
        let Some(write) = volume.peer_writes.all.remove(key) else { return };
        volume.claims.end(write.range, Claim::Peer(key));
        if write.is_in_tree {
            volume.app.tree.remove(write.range, Writer::Peer(key));
        }
        if write.extents_held > 0 {
            self.put_extents(nr, write.range, write.extents_held);
        }
        self.free_payload(write.what);
        self.touch();
    }

    /// The range of a write, if it is acceptable.
    fn peer_range(
        &mut self,
        nr: VolumeNr,
        sector: drbd_types::Sector,
        size: u32,
        what: What,
    ) -> Option<SectorRange> {
        let most = if matches!(what, What::Data(..)) { 1 << 20 } else { 128 << 20 };
        let len = SectorCount::from_bytes_exact(u64::from(size))?;
        if size > most {
            return None;
        }
        let range = SectorRange::new(sector, len);
        if !range.is_some_and(|range| self.range_on(nr, range)) {
            let capacity = self.volume(nr).map_or(0, |v| v.size.0);
            let text = format!(
                "request from peer beyond end of local disk: capacity: {capacity}s < sector: {}s + size: {size}",
                sector.0
            );
            self.log(Severity::Error, Some(nr), text);
            return None;
        }
        range
    }

    /// Without a disk: refused, but counted. Spec: wire-protocol.md §5.5 step 1.
    fn drain_peer_data(&mut self, nr: VolumeNr, block: &Block, size: u32, what: What) {
        self.note_seq(nr, block.seq);
        let epoch = self.peer_epochs.received();
        let shown = if matches!(what, What::Data(..)) { size } else { 0 };
        self.send_ack(nr, AckKind::NegAck, block.sector, block.id, shown);
        self.peer_epochs.finished(epoch);
        self.free_payload(what);
        self.touch();
    }

    fn free_payload(&mut self, what: What) {
        if let What::Data(buf, _) = what {
            self.free(buf);
        }
    }

    /// P_RECV_ACK, P_WRITE_ACK. Spec: wire-protocol.md §5.3.
    fn wanted_acks(&self, flags: DpFlags) -> (bool, bool) {
        if self.conn.version >= 100 {
            let recv = flags.contains(DpFlags::SEND_RECEIVE_ACK);
            return (recv, flags.contains(DpFlags::SEND_WRITE_ACK));
        }
        match self.conn.net.as_ref().map_or(Protocol::C, |net| net.protocol) {
            Protocol::A => (false, false),
            Protocol::B => (true, false),
            Protocol::C => (false, true),
        }
    }

    /// P_RS_DATA_REPLY, P_RS_DEALLOCATED. Spec: io-path §8.8.
    pub(super) fn on_resync_data(
        &mut self,
        nr: VolumeNr,
        sector: drbd_types::Sector,
        size: u32,
        what: What,
        payload: Option<Payload>,
    ) -> bool {
        let range = self.peer_range(nr, sector, size, what);
        let Some(range) = range.filter(|range| self.take_resync_request(nr, *range)) else {
            self.free_payload(what);
            return false;
        };
        if payload.is_some_and(|p| p.digest_ok == Some(false)) {
            let text = format!("Digest integrity check FAILED: {}s +{size}", sector.0);
            self.log(Severity::Error, Some(nr), text);
            self.free_payload(what);
            return false;
        }
        if !self.volume(nr).is_some_and(|v| v.has_disk()) {
            self.free_payload(what);
            self.send_ack(nr, AckKind::NegAck, sector, BlockId::SYNCER, size);
            self.resync_request_done(nr, range, true);
            return true;
        }
        if plant::has(Bug::ClearTooSoon) {
            self.clear_bits(nr, range);
        }
        let now = self.now;
        let order = self.next_order();
        let Some(volume) = self.volume_mut(nr) else { return false };
        volume.stats.nr += payload.map_or(0, |p| p.len.0 / 512);
        volume.enter_peer_write(PeerWrite::new(range, what, size, order, now));
        self.touch();
        true
    }

    // ---- gates ----

    /// Gives to the disk what has no gate before it any more.
    pub(super) fn run_peer_writes(&mut self) {
        for nr in self.volume_numbers() {
            let mut at = 0;
            loop {
                let next = self.volume(nr).and_then(|v| v.peer_writes.waiting.get(at).copied());
                let Some(key) = next else { break };
                match self.try_peer_write(nr, key) {
                    Gate::Open | Gate::Gone => {
                        if let Some(volume) = self.volume_mut(nr) {
                            volume.peer_writes.waiting.remove(at);
                        }
                    }
                    Gate::Closed => at += 1,
                    // Those behind it have to wait too.
                    Gate::ClosedForAll => break,
                }
            }
            self.flush_resync_writes(nr);
        }
    }

    fn try_peer_write(&mut self, nr: VolumeNr, key: PeerWriteKey) -> Gate {
        let Some(volume) = self.volume(nr) else { return Gate::Gone };
        let Some(write) = volume.peer_writes.all.get(key).copied() else { return Gate::Gone };
        // Nothing overtakes an earlier write of the same sectors, replicated or resync.
        let mut others = volume.peer_writes.undone.overlapping(write.range);
        if others.any(|(_, (order, _))| order < write.order) {
            return Gate::Closed;
        }
        drop(others);
        if write.epoch.is_some() && self.conn.has_two_primaries() && write.is_orphan {
            // Own writes of the same place may be complete by now: an old write of a lost peer
            // must not come after them. It was never acknowledged.
            self.drop_peer_write(nr, key);
            return Gate::Gone;
        }
        if write.epoch.is_some() && self.conn.has_two_primaries() {
            match self.resolve_conflict(nr, key, &write) {
                Verdict::Go => {}
                Verdict::Wait => return Gate::ClosedForAll,
                Verdict::Gone => return Gate::Gone,
            }
        }
        let is_exclusive =
            matches!(write.what, What::Discard | What::Zeroes { .. }) && write.epoch.is_some();
        // Not before all earlier writes of the connection are done. Spec §2.1 step 9.
        if is_exclusive && self.conn.active_writes.first().is_some_and(|first| *first < write.order)
        {
            return Gate::ClosedForAll;
        }
        if write.is_only_copy && !self.take_extents_for_peer(nr, key) {
            return Gate::ClosedForAll;
        }
        self.submit_peer_write(nr, key);
        Gate::Open
    }

    pub(super) const fn next_order(&mut self) -> u64 {
        self.conn.next_order += 1;
        self.conn.next_order
    }

    /// The disk has done a write, or nobody wants it any more.
    fn forget_order(&mut self, nr: VolumeNr, key: PeerWriteKey) {
        let Some(volume) = self.volumes.get_mut(nr) else { return };
        let Some(write) = volume.peer_writes.all.get(key) else { return };
        volume.peer_writes.undone.remove(write.range, (write.order, key));
        self.conn.active_writes.remove(&write.order);
    }

    /// This node has the only disk of a diskless Primary: it keeps the activity log for it.
    fn take_extents_for_peer(&mut self, nr: VolumeNr, key: PeerWriteKey) -> bool {
        self.begin_with_write(nr);
        let Some(volume) = self.volume_mut(nr) else { return false };
        // "The peer was Primary" must be on disk before what it writes, or nobody would look at
        // the activity log after a crash.
        if volume.disk.as_ref().is_some_and(|disk| disk.is_dirty || disk.writing.is_superblock()) {
            self.sync_soon(nr);
            return false;
        }
        if volume.marks.generation_due || volume.app.is_log_closed {
            return false;
        }
        let Some(volume) = self.volume_mut(nr) else { return false };
        if volume.marks.al_suspended {
            return true;
        }
        let Some(write) = volume.peer_writes.all.get_mut(key) else { return false };
        let Some(disk) = volume.disk.as_mut() else { return true };
        let mut all_hot = true;
        for extent in write.range.al_extents_touched().skip(write.extents_held as usize) {
            let extent = Self::al_extent(extent);
            if disk.al.get_hot(extent) {
                write.extents_held += 1;
                continue;
            }
            // Not hot: the transaction is made together with those of the application.
            all_hot = false;
            match disk.al.get_for_change(extent) {
                GetResult::Hot => {
                    write.extents_held += 1;
                    all_hot = true;
                }
                GetResult::Pending => write.extents_held += 1,
                GetResult::Refused(_) => break,
            }
        }
        if !all_hot {
            volume.app.wants_transaction = true;
            return false;
        }
        // References that were pending when they were taken are hot once no change is pending.
        disk.al.pending() == 0
    }

    fn submit_peer_write(&mut self, nr: VolumeNr, key: PeerWriteKey) {
        let zero_out_trims = !self.conn.features.contains(Features::WZEROES);
        let Some(volume) = self.volume_mut(nr) else { return };
        let may_discard = volume.config.discard_zeroes_if_aligned
            && volume.disk.as_ref().is_some_and(|disk| disk.limits().can_discard);
        let has_disk = volume.has_disk();
        let Some(write) = volume.peer_writes.all.get_mut(key) else { return };
        let range = write.range;
        let what = write.what;
        if write.epoch.is_some() {
            volume.resync.on_other_io(range.len);
        }
        if !has_disk {
            self.on_peer_write_io(nr, key, Err(IoFailure::Gone));
            return;
        }
        let op = match what {
            // An old sender's flush.
            _ if range.is_empty() => DiskOp::Flush,
            What::Data(buf, flags) => DiskOp::Write { range, buf, flags },
            What::Discard if zero_out_trims || !may_discard => {
                DiskOp::WriteZeroes { range, may_unmap: true }
            }
            What::Discard => DiskOp::Discard { range },
            What::Zeroes { may_unmap } => DiskOp::WriteZeroes { range, may_unmap },
        };
        self.disk_io(nr, op, Purpose::PeerWrite(key));
    }

    // ---- completion ----

    pub(super) fn on_peer_write_io(
        &mut self,
        nr: VolumeNr,
        key: PeerWriteKey,
        result: Result<(), IoFailure>,
    ) {
        let Some(volume) = self.volume_mut(nr) else { return };
        let wants_flush = volume.config.disk_flushes;
        let Some(write) = volume.peer_writes.all.get_mut(key) else { return };
        let result = if plant::has(Bug::HideWriteError) { Ok(()) } else { result };
        write.result = result;
        let (is_resync, range) = (write.epoch.is_none(), write.range);
        volume.stats.dw += range.len.0;
        self.forget_order(nr, key);
        let Some(volume) = self.volume_mut(nr) else { return };
        if result.is_err() {
            if !is_resync {
                volume.set_out_of_sync(range);
            }
            self.on_data_error(nr, false);
        } else if is_resync && wants_flush {
            // A cleared bit must not outlive the data in a power loss (defect 14.4).
            volume.peer_writes.unflushed.push(key);
            return;
        }
        self.finish_peer_write(nr, key);
    }

    /// Flushes written resync data, many blocks at once.
    fn flush_resync_writes(&mut self, nr: VolumeNr) {
        let Some(volume) = self.volume_mut(nr) else { return };
        let writes = &mut volume.peer_writes;
        if writes.unflushed.is_empty() || !writes.flushing.is_empty() {
            return;
        }
        writes.flushing = core::mem::take(&mut writes.unflushed);
        if volume.has_disk() {
            self.disk_io(nr, DiskOp::Flush, Purpose::ResyncFlush);
        } else {
            self.on_resync_flush(nr, Err(IoFailure::Gone));
        }
    }

    pub(super) fn on_resync_flush(&mut self, nr: VolumeNr, result: Result<(), IoFailure>) {
        let Some(volume) = self.volume_mut(nr) else { return };
        let flushed = core::mem::take(&mut volume.peer_writes.flushing);
        if result.is_err() {
            self.on_flush_error(nr);
        }
        for key in flushed {
            if let Some(write) = self.volume_mut(nr).and_then(|v| v.peer_writes.all.get_mut(key))
                && result.is_err()
            {
                write.result = Err(IoFailure::Gone);
            }
            self.finish_peer_write(nr, key);
        }
    }

    /// Acknowledges a write, then counts it as finished in its epoch.
    fn finish_peer_write(&mut self, nr: VolumeNr, key: PeerWriteKey) {
        let conn = self.state(nr).conn;
        let Some(volume) = self.volume_mut(nr) else { return };
        let Some(write) = volume.peer_writes.all.remove(key) else { return };
        if write.is_in_tree {
            volume.app.tree.remove(write.range, Writer::Peer(key));
        }
        let claimed = volume.claims.end(write.range, Claim::Peer(key));
        let ok = write.result.is_ok();
        let is_connected = conn >= Cstate::Connected && !write.is_orphan;
        match write.epoch {
            None => {
                if ok {
                    self.clear_claimed(nr, claimed);
                }
                if is_connected {
                    let kind = if ok { AckKind::RsWriteAck } else { AckKind::NegAck };
                    self.send_ack(nr, kind, write.range.start, BlockId::SYNCER, write.size);
                }
                self.resync_request_done(nr, write.range, !ok);
            }
            Some(epoch) => {
                // The sender clears its bits when it is told so, hence never without an ack
                // (protocols A and B below version 100).
                let in_sync = ok
                    && write.wants_write_ack
                    && write.may_set_in_sync
                    && (Cstate::SyncSource..=Cstate::PausedSyncT).contains(&conn);
                if in_sync {
                    self.clear_claimed(nr, claimed);
                }
                let kind = match (ok, in_sync) {
                    (false, _) => AckKind::NegAck,
                    (true, true) => AckKind::RsWriteAck,
                    (true, false) => AckKind::WriteAck,
                };
                if is_connected && (write.wants_write_ack || !ok) {
                    self.send_ack(nr, kind, write.range.start, write.id, write.size);
                }
                if !write.is_orphan {
                    self.peer_epochs.finished(epoch);
                    if ok {
                        let PeerWrite { range, id, size, .. } = write;
                        self.note_written(Written { nr, range, id, size });
                    }
                }
                if write.extents_held > 0 {
                    self.put_extents(nr, write.range, write.extents_held);
                }
                self.restart_postponed(nr, write.range);
            }
        }
        self.free_payload(write.what);
        self.touch();
    }

    // ---- the connection is gone ----

    /// Nothing of this connection is acknowledged any more. What was received is still written.
    pub(super) fn orphan_peer_writes(&mut self) {
        self.peer_epochs.lost();
        self.conn.written.clear();
        for volume in self.volumes.values_mut() {
            let keys: Vec<PeerWriteKey> =
                volume.peer_writes.all.iter().map(|(key, _)| key).collect();
            for key in keys {
                if let Some(write) = volume.peer_writes.all.get_mut(key) {
                    write.is_orphan = true;
                }
            }
        }
        self.touch();
    }

    /// Is anything being written for the peer?
    pub(super) fn has_peer_writes(&self, nr: VolumeNr) -> bool {
        self.volume(nr).is_some_and(|v| !v.peer_writes.is_empty())
    }

    // ---- two Primaries ----

    /// A write of the peer meets own ones. Spec: io-path §5.3.
    fn resolve_conflict(&mut self, nr: VolumeNr, key: PeerWriteKey, write: &PeerWrite) -> Verdict {
        if !write.is_in_tree {
            let is_resolver = self.conn.resolve_conflicts;
            let Some(volume) = self.volume_mut(nr) else { return Verdict::Wait };
            // Data may overtake acknowledgements that were sent before it.
            let missing = write.seq.wrapping_sub(volume.seq_in).cast_signed() > 1;
            if is_resolver && missing {
                self.conn.waits_for_seq = Some((nr, write.seq, write.since));
                return Verdict::Wait;
            }
            self.note_seq(nr, write.seq);
            let Some(volume) = self.volume_mut(nr) else { return Verdict::Wait };
            volume.app.tree.insert(write.range, Writer::Peer(key));
            if let Some(write) = volume.peer_writes.all.get_mut(key) {
                write.is_in_tree = true;
            }
        }
        let Some(own) = self.undecided_conflict(nr, write.range) else { return Verdict::Go };
        let Some(request) = self.log.get(own).copied() else { return Verdict::Go };
        let is_equal = request.range == write.range;
        if self.conn.resolve_conflicts {
            // The peer acknowledged the own write before it sent this one, or waits for none: they
            // do not meet, only the own disk is the slower one. To refuse this write would leave
            // it postponed for good, since the peer is done with what it would wait for.
            if !request.progress.is_pending() {
                return Verdict::Wait;
            }
            let covers = request.range.contains(write.range);
            if !is_equal {
                self.log_concurrent(nr, request.range, write, Some(covers));
            }
            self.refuse_peer_write(nr, key, write, own, covers);
            return Verdict::Gone;
        }
        let is_told = self.volume_mut(nr).and_then(|v| v.peer_writes.all.get_mut(key));
        let is_told = is_told.is_none_or(|w| core::mem::replace(&mut w.is_told, true));
        if !is_equal && !is_told {
            self.log_concurrent(nr, request.range, write, None);
        }
        // The resolver decides about the own writes; until then the peer's waits.
        Verdict::Wait
    }

    /// An own write of this range that is under way, and not both decided (acknowledged, or
    /// postponed) and done with its local part.
    fn undecided_conflict(&self, nr: VolumeNr, range: SectorRange) -> Option<ReqKey> {
        let volume = self.volume(nr)?;
        volume.app.tree.overlapping(range).find_map(|(_, writer)| {
            let Writer::Own(key) = writer else { return None };
            let request = self.log.get(key)?;
            let is_decided = request.is_postponed || !request.progress.is_pending();
            let gives_way = is_decided && request.progress.local != Local::Pending;
            (!request.is_completed && !gives_way).then_some(key)
        })
    }

    fn log_concurrent(
        &mut self,
        nr: VolumeNr,
        local: SectorRange,
        write: &PeerWrite,
        covers: Option<bool>,
    ) {
        let suffix = match covers {
            None => "",
            Some(true) => ", assuming local came first",
            Some(false) => ", assuming remote came first",
        };
        let text = format!(
            "Concurrent writes detected: local={}s +{}, remote={}s +{}{suffix}",
            local.start.0,
            local.len.0 * 512,
            write.range.start.0,
            write.size
        );
        self.log(Severity::Alert, Some(nr), text);
    }

    /// The resolver does not carry the peer's write out. It does not count in its epoch, or that
    /// would never be acknowledged (defect 14.2).
    fn refuse_peer_write(
        &mut self,
        nr: VolumeNr,
        key: PeerWriteKey,
        write: &PeerWrite,
        own: ReqKey,
        covers: bool,
    ) {
        self.forget_order(nr, key);
        let kind = if covers || self.conn.version < 100 {
            AckKind::Superseded
        } else {
            AckKind::RetryWrite
        };
        let Some(volume) = self.volume_mut(nr) else { return };
        volume.peer_writes.all.remove(key);
        volume.claims.end(write.range, Claim::Peer(key));
        volume.app.tree.remove(write.range, Writer::Peer(key));
        if kind == AckKind::Superseded && !covers {
            // A kernel does not write it again, and what the own write leaves out is only there.
            volume.set_out_of_sync(write.range);
        }
        self.send_ack(nr, kind, write.range.start, write.id, write.size);
        if let Some(epoch) = write.epoch {
            if kind == AckKind::RetryWrite {
                // The sender counts it until it has taken it back, which is when the own write is
                // acknowledged. Spec: wire-protocol.md §6.3.
                self.peer_epochs.uncount_later(epoch);
                self.conn.retried.push((own, epoch));
            } else {
                self.peer_epochs.uncount(epoch);
            }
        }
        self.free_payload(write.what);
        self.touch();
    }

    /// P_RETRY_WRITE: the own write is done again after the peer's.
    pub(super) fn postpone_write(&mut self, key: ReqKey) {
        if let Some(request) = self.log.get_mut(key) {
            request.is_postponed = true;
        }
        self.touch();
    }

    /// The peer's write is done and acknowledged: own ones that waited for it start again.
    fn restart_postponed(&mut self, nr: VolumeNr, range: SectorRange) {
        if !self.conn.has_two_primaries() {
            return;
        }
        let keys = self.log.keys(|r| r.volume == nr && r.is_postponed && r.range.overlaps(range));
        for key in keys {
            self.restart_write(key);
        }
    }

    /// P_OUT_OF_SYNC.
    pub(super) fn on_out_of_sync(&mut self, nr: VolumeNr, desc: &BlockDesc) -> bool {
        let conn = self.state(nr).conn;
        let is_expected = matches!(conn, Cstate::WFSyncUUID | Cstate::WFBitMapT | Cstate::Behind);
        if !is_expected {
            let text =
                format!("ASSERT FAILED cstate = {conn}, expected: WFSyncUUID|WFBitMapT|Behind");
            self.log(Severity::Error, Some(nr), text);
        }
        let Some(len) = SectorCount::from_bytes_exact(u64::from(desc.size)) else { return false };
        let Some(range) = SectorRange::new(desc.sector, len) else { return false };
        let Some(volume) = self.volume_mut(nr) else { return false };
        volume.set_out_of_sync(range);
        self.touch();
        true
    }

    /// An old sender's flush: a write without data.
    pub(super) fn on_empty_data(&mut self, nr: VolumeNr, block: &Block) -> bool {
        if !block.flags.contains(DpFlags::FLUSH) {
            return false;
        }
        self.on_peer_data(nr, block, 0, What::Discard, None)
    }
}

/// May a write of the peer go to the disk?
enum Gate {
    Open,
    /// Not yet.
    Closed,
    /// Not yet, and nothing behind it.
    ClosedForAll,
    /// It is no more.
    Gone,
}

/// What becomes of a write of the peer that meets own ones.
enum Verdict {
    Go,
    Wait,
    Gone,
}
