//! The end of the peer's epochs: what was written is flushed, then the barrier is acknowledged.
//! Spec: io-path-and-resync.md §2.3, §2.4, §15 invariants 22, 23, 52.
//!
//! A barrier ack says that the epoch is on stable storage. A disk that fails to flush, or is gone
//! before, has writes of the epoch that were acknowledged one by one and may be lost: each is taken
//! back with a negative acknowledgement ahead of the barrier ack, so that the peer marks it.

use alloc::format;
use alloc::vec::Vec;

use drbd_types::{SectorRange, VolumeNr};
use drbd_wire::Packet;
use drbd_wire::packet::{AckKind, BarrierId, BlockId};

use crate::action::DiskOp;
use crate::event::IoFailure;
use crate::log_line::Severity;
use crate::peer_write::epochs::{BarrierNr, Ordering};
use crate::plant::{self, Bug};

use super::Core;
use super::io::Purpose;

/// The disk has no flush.
const EOPNOTSUPP: i32 = 95;

/// A write of the peer that is done and not flushed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Written {
    pub(super) nr: VolumeNr,
    pub(super) range: SectorRange,
    pub(super) id: BlockId,
    pub(super) size: u32,
}

impl Core {
    /// P_BARRIER.
    pub(super) fn on_barrier(&mut self, id: BarrierId) {
        self.peer_epochs.on_barrier(BarrierNr(id.to_number()));
        self.touch();
    }

    /// A write of the open epoch is done.
    pub(super) fn note_written(&mut self, written: Written) {
        if self.peer_epochs.ordering == Ordering::Flush {
            self.conn.written.push(written);
        }
    }

    /// Flushes at the end of an epoch, acknowledges it, lets the receiver go on.
    pub(super) fn run_barriers(&mut self) {
        self.finish_retried();
        loop {
            if let Some(round) = self.peer_epochs.take_flush() {
                self.flush_epoch(round);
            }
            let was_held = self.peer_epochs.holds_receiver();
            let acknowledged = self.peer_epochs.take_acknowledged();
            if was_held && !self.peer_epochs.holds_receiver() {
                self.touch();
            }
            let Some((nr, size)) = acknowledged else { break };
            self.touch();
            // Nobody waits for an epoch of which nothing is left. Spec: wire-protocol.md §6.3.
            if size > 0 {
                self.send_meta(VolumeNr(0), Packet::BarrierAck(BarrierId::from_number(nr.0), size));
            }
        }
    }

    /// Epochs with writes that the peer has to send again.
    fn finish_retried(&mut self) {
        if self.conn.retried.is_empty() {
            return;
        }
        let retried = core::mem::take(&mut self.conn.retried);
        for (own, epoch) in retried {
            if self.log.get(own).is_some_and(|r| r.progress.is_pending()) {
                self.conn.retried.push((own, epoch));
            } else {
                self.peer_epochs.taken_back(epoch);
            }
        }
    }

    /// One flush to the disk of every volume.
    fn flush_epoch(&mut self, round: u32) {
        let (with_disk, without): (Vec<VolumeNr>, Vec<VolumeNr>) =
            self.volume_numbers().partition(|nr| self.volume(*nr).is_some_and(|v| v.has_disk()));
        for nr in without {
            self.take_back(nr);
        }
        self.conn.epoch_flushes = with_disk.len();
        self.conn.epoch_flush_failed = false;
        if with_disk.is_empty() || plant::has(Bug::SkipFlush) {
            self.conn.written.clear();
            self.peer_epochs.flushed(round, true);
            return;
        }
        for nr in with_disk {
            self.disk_io(nr, DiskOp::Flush, Purpose::EpochFlush(round));
        }
    }

    pub(super) fn on_epoch_flush(
        &mut self,
        nr: VolumeNr,
        round: u32,
        result: Result<(), IoFailure>,
    ) {
        let is_current = self.peer_epochs.is_flushing(round);
        match result {
            Ok(()) => {}
            // Its cache, if it has one, is the user's risk.
            Err(IoFailure::Device(EOPNOTSUPP)) => {
                let text = format!("local disk FLUSH FAILED with status -{EOPNOTSUPP}");
                self.log(Severity::Info, Some(nr), text);
                self.conn.epoch_flush_failed = true;
            }
            Err(failure) => {
                self.log(
                    Severity::Error,
                    Some(nr),
                    format!("local disk FLUSH FAILED with status {failure:?}"),
                );
                if is_current {
                    self.take_back(nr);
                }
                self.on_flush_error(nr);
            }
        }
        if !is_current {
            return;
        }
        self.conn.epoch_flushes = self.conn.epoch_flushes.saturating_sub(1);
        if self.conn.epoch_flushes == 0 {
            let ok = !self.conn.epoch_flush_failed;
            self.conn.written.clear();
            self.peer_epochs.flushed(round, ok);
            if !ok {
                let name = self.peer_epochs.ordering.name();
                self.log(Severity::Info, None, format!("Method to ensure write ordering: {name}"));
            }
        }
    }

    /// What was written to this volume may be lost.
    fn take_back(&mut self, nr: VolumeNr) {
        let written = core::mem::take(&mut self.conn.written);
        for one in written {
            if one.nr != nr {
                self.conn.written.push(one);
                continue;
            }
            if let Some(volume) = self.volume_mut(nr) {
                volume.set_out_of_sync(one.range);
            }
            self.send_ack(nr, AckKind::NegAck, one.range.start, one.id, one.size);
        }
    }
}
