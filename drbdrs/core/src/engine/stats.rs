//! Counters of a volume. Spec: io-path-and-resync.md §12. Amounts are sectors.

use drbd_types::{Dstate, Role, SectorCount, Tick, VolumeNr};

use crate::generation::Slots;
use crate::generation::compare::{Relation, Side};
use crate::generation::decide::{Decision, Handshake, Outcome};
use crate::generation::explain::Reason;

use super::Core;

/// A handshake and what came of it: what is remembered of a peer that is gone again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Met {
    /// When.
    pub at: Tick,
    /// The rule that compared the two nodes.
    pub rule: u32,
    /// Why it came out as it did.
    pub reason: Reason,
    /// What was decided.
    pub outcome: Outcome,
    /// Both nodes had changed a common ancestor, whatever was decided then.
    pub is_split_brain: bool,
    /// This node, as it was then.
    pub own: MetSide,
    /// The peer.
    pub peer: MetSide,
}

/// One of the two nodes of a handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MetSide {
    /// Its generations.
    pub slots: Slots,
    /// Its set bits.
    pub bits: u64,
    /// Its role.
    pub role: Role,
    /// Its disk.
    pub disk: Dstate,
}

impl Met {
    pub(super) fn new(at: Tick, handshake: &Handshake, decision: &Decision) -> Self {
        let Handshake { own, peer, own_bits_sent, peer_bits, own_disk, peer_disk, .. } = *handshake;
        let side =
            |side: Side, bits, disk| MetSide { slots: side.slots, bits, role: side.role, disk };
        let relation = decision.comparison.relation;
        Self {
            at,
            rule: u32::from(decision.comparison.rule),
            reason: decision.reason,
            outcome: decision.outcome,
            is_split_brain: matches!(relation, Relation::SplitBrain | Relation::SplitBrainUnclear),
            own: side(own, own_bits_sent, own_disk),
            peer: side(peer, peer_bits, peer_disk),
        }
    }
}

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
    /// The last handshake.
    pub(super) met: Option<Met>,
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
