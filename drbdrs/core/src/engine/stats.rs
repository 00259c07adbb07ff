//! Counters of a volume. Spec: io-path-and-resync.md §12. Amounts are sectors.

use drbd_types::{SectorCount, VolumeNr};

use crate::generation::explain::Reason;

use super::Core;

/// Counters and other numbers of a volume that only views look at.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct VolumeStats {
    /// Payload sent.
    pub(super) ns: u64,
    /// Payload received.
    pub(super) nr: u64,
    /// Written to the local disk.
    pub(super) dw: u64,
    /// Read from the local disk.
    pub(super) dr: u64,
    /// Transactions of the activity log.
    pub(super) al_writes: u64,
    /// Rule and reason of the last handshake.
    pub(super) last_decision: Option<(u32, Reason)>,
    /// Where the next verify starts and stops, in sectors.
    pub(super) verify_start: u64,
    pub(super) verify_stop: Option<u64>,
}

impl VolumeStats {
    /// A disk is attached.
    pub(super) const fn reset(&mut self) {
        self.ns = 0;
        self.nr = 0;
        self.dw = 0;
        self.dr = 0;
    }
}

impl Core {
    /// Payload of this length goes to the peer.
    pub(super) fn count_sent(&mut self, nr: VolumeNr, sectors: SectorCount) {
        if let Some(volume) = self.volume_mut(nr) {
            volume.stats.ns += sectors.0;
        }
    }
}
