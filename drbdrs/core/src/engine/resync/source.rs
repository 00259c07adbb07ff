//! What the source sends, and what it makes of the acknowledgements. It answers requests in
//! `serve`. Spec: io-path-and-resync.md §8.7; states-and-generations.md §3.4.

use drbd_types::{SectorCount, VolumeNr};
use drbd_wire::Packet;
use drbd_wire::packet::BlockAck;

use crate::engine::acks::ack_range;
use crate::engine::proc::Cx;
use crate::engine::{Core, meta};
use crate::state::facts;

use super::ResyncRun;

impl ResyncRun {
    /// An answer goes to the target.
    pub(in crate::engine) const fn note_answered(&mut self, sectors: SectorCount) {
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
    pub(in crate::engine) const fn sectors_unacknowledged(&self) -> u64 {
        self.unacknowledged_sectors
    }
}

/// A6, or the start itself below version 96: the identifier of this resync. Spec: states §3.4.
pub(in crate::engine) async fn send_sync_uuid(cx: &Cx, nr: VolumeNr) {
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

impl Core {
    /// P_RS_WRITE_ACK or P_NEG_ACK of a resync block, on the source.
    pub(in crate::engine) fn on_resync_ack(&mut self, nr: VolumeNr, ack: &BlockAck, ok: bool) {
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
}
