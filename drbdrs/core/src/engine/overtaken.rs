//! Bits that the source clears because the target has done so, and what it wrote meanwhile.
//!
//! The target clears its bit of a block when it has the data, and says so on the other stream. Until
//! that answer comes this node may write the block again without the peer: the peer has just lost
//! its disk, or is Behind. The answer is then about older data, and the bit stays. The original
//! clears it, and nobody knows any more that the disks differ. Spec: io-path-and-resync.md §15,
//! invariants 16 and 36.

use alloc::vec::Vec;

use drbd_types::{Cstate, Sector, SectorCount, SectorRange, VolumeNr};

use crate::request::Request;
use crate::state::facts;

use super::Core;

impl Core {
    /// Both nodes have the same bits now: what the peer cleared before no longer counts.
    pub(super) fn begin_as_source(&mut self, nr: VolumeNr) {
        for key in self.log.keys(|r| r.volume == nr) {
            if let Some(request) = self.log.get_mut(key) {
                request.progress.forget_in_sync();
            }
        }
        if let Some(volume) = self.volume_mut(nr) {
            volume.resync.overtaken.clear();
        }
    }

    /// Only this node wrote here: answers of the peer to what it got before are no longer about
    /// what is on this disk.
    pub(super) fn overtake(&mut self, nr: VolumeNr, range: SectorRange) {
        let is_awaited = |r: &Request| {
            r.volume == nr && r.progress.is_unacknowledged_mirror() && r.range.overlaps(range)
        };
        let has_sent = self.log.iter().any(|(_, request)| is_awaited(request));
        let Some(volume) = self.volume_mut(nr) else { return };
        // A source sends all writes; one that ends only now was begun before.
        let is_alone = volume.state.conn >= Cstate::Connected && !facts::is_source(&volume.state);
        if is_alone && (has_sent || volume.resync.unacknowledged > 0) {
            let bits = range.bits_touched();
            volume.resync.overtaken.extend(bits.start.0..bits.end.0);
        }
    }

    /// The peer has what it was sent here, and cleared its bits: so does this node, except where it
    /// wrote again meanwhile.
    pub(super) fn clear_current(&mut self, nr: VolumeNr, range: SectorRange) {
        let Some(volume) = self.volume(nr) else { return };
        let bits = range.bits_touched();
        let overtaken = &volume.resync.overtaken;
        if overtaken.range(bits.start.0..bits.end.0).next().is_none() {
            self.clear_bits(nr, range);
            return;
        }
        let covered = range.bits_covered(volume.size);
        let current = (covered.start.0..covered.end.0).filter(|bit| !overtaken.contains(bit));
        for bit in current.collect::<Vec<_>>() {
            let block = SectorRange { start: Sector(bit * 8), len: SectorCount(8) };
            self.clear_bits(nr, block);
        }
    }
}
