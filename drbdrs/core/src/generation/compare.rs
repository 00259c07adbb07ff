//! Comparison of the generation identifiers of two nodes: the rule table of the sync handshake.
//!
//! Spec: states-and-generations.md §4.4. Each rule is one row of [`compare`], in the order of the
//! table; the first that applies wins. Both nodes run it on the same data, seen from their side.

use drbd_types::{Gi, Role};

use super::Slots;

/// What one node brings into the comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Side {
    /// The four identifiers, from the own superblock or the peer's last P_UUIDS.
    pub slots: Slots,
    /// The node went down uncleanly as Primary (own flag; value 2 in P_UUIDS).
    pub crashed_primary: bool,
    /// Role at this moment.
    pub role: Role,
}

/// What the connection contributes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Agreed protocol version, 86..=101.
    pub protocol: u32,
    /// Feature bits agreed with the peer; only WSAME (4) matters, it tells peers that know rule 41.
    pub wsame: bool,
    /// Set on exactly one of the two nodes: it accepted the meta connection.
    pub resolve_conflicts: bool,
}

/// How much a resync copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Extent {
    /// The blocks whose bit is set on either node.
    Bitmap,
    /// Everything.
    Full,
}

/// How the data of this node and of the peer are related.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Relation {
    /// Equal: no resync.
    Equal,
    /// This node has the newer data.
    Source(Extent),
    /// The peer has the newer data.
    Target(Extent),
    /// Both modified a common ancestor.
    SplitBrain,
    /// Split brain, or data that is related in an unknown way.
    SplitBrainUnclear,
    /// Nothing in common.
    Unrelated,
    /// Can only be decided with this protocol version on both sides.
    NeedsProtocol(u32),
    /// Can only be decided with this protocol version and these feature bits on both sides.
    NeedsFeature {
        /// Protocol version.
        protocol: u32,
        /// Feature bits.
        feature: u32,
    },
}

impl Relation {
    /// The number under which logs show it (`uuid_compare()=<n>`). Spec §4.4, second table.
    pub fn code(self) -> i32 {
        match self {
            Self::Equal => 0,
            Self::Source(Extent::Bitmap) => 1,
            Self::Source(Extent::Full) => 2,
            Self::Target(Extent::Bitmap) => -1,
            Self::Target(Extent::Full) => -2,
            Self::SplitBrain => 100,
            Self::SplitBrainUnclear => -100,
            Self::Unrelated => -1000,
            Self::NeedsProtocol(version) => -1000 - version.cast_signed(),
            Self::NeedsFeature { protocol, feature } => {
                -(65536 + (feature << 8) + protocol).cast_signed()
            }
        }
    }

    /// The same relation from the peer's point of view.
    #[must_use]
    pub fn mirrored(self) -> Self {
        match self {
            Self::Source(extent) => Self::Target(extent),
            Self::Target(extent) => Self::Source(extent),
            Self::Equal
            | Self::SplitBrain
            | Self::SplitBrainUnclear
            | Self::Unrelated
            | Self::NeedsProtocol(_)
            | Self::NeedsFeature { .. } => self,
        }
    }
}

/// A correction that the comparison makes before anything else uses the identifiers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Correction {
    /// The own slots become these.
    Own(Slots, CorrectionText),
    /// The copy of the peer's slots becomes these.
    Peer(Slots, CorrectionText),
}

/// Which log line announces a correction. Spec §4.4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CorrectionText {
    /// Rule 34.
    MissedFinishSelf,
    /// Rule 35.
    MissedFinishPeer,
    /// Rule 51.
    LostSyncUuid,
    /// Rule 71.
    SyncUuidNotThrough,
}

impl CorrectionText {
    /// The original's wording.
    pub fn text(self) -> &'static str {
        match self {
            Self::MissedFinishSelf => {
                "was SyncSource, missed the resync finished event, corrected myself:"
            }
            Self::MissedFinishPeer => {
                "was SyncTarget, peer missed the resync finished event, corrected peer:"
            }
            Self::LostSyncUuid => "Lost last syncUUID packet, corrected:",
            Self::SyncUuidNotThrough => "Last syncUUID did not get through, corrected:",
        }
    }
}

/// Remarks of rules that correct nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remark {
    /// Rule 36.
    PeerFailedToWriteSyncUuid,
    /// Rule 37.
    FailedToWriteSyncUuid,
    /// Rule 41 without the feature bit.
    UnrotatedButPrimary,
    /// Rule 41 with two Primaries.
    UnrotatedBothPrimary,
}

impl Remark {
    /// The original's wording.
    pub fn text(self) -> &'static str {
        match self {
            Self::PeerFailedToWriteSyncUuid => "was SyncSource (peer failed to write sync_uuid)",
            Self::FailedToWriteSyncUuid => "was SyncTarget (failed to write sync_uuid)",
            Self::UnrotatedButPrimary => "Equivalent unrotated UUIDs, but current primary present.",
            Self::UnrotatedBothPrimary => {
                "Equivalent unrotated UUIDs, but both are primary. Can not resolve this."
            }
        }
    }
}

/// Result of [`compare`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Comparison {
    /// How the data are related.
    pub relation: Relation,
    /// Number of the rule that decided.
    pub rule: u8,
    /// What has to be corrected first.
    pub correction: Option<Correction>,
    /// What the rule wants to be logged besides.
    pub remark: Option<Remark>,
}

/// The sync UUID is the bitmap UUID plus this. Spec §3.1.
pub const SYNC_OFFSET: u64 = 0x0001_0000_0000_0000;

const JUST_CREATED: Gi = Gi(4);
const EMPTY: Gi = Gi(0);

fn plain(relation: Relation, rule: u8) -> Comparison {
    Comparison { relation, rule, correction: None, remark: None }
}

/// Compares the data of this node with the peer's. Spec §4.4.
pub fn compare(own: &Side, peer: &Side, link: &Link) -> Comparison {
    use Extent::{Bitmap, Full};
    use Relation::{Source, SplitBrain, SplitBrainUnclear, Target, Unrelated};
    let (s, p) = (own.slots, peer.slots);
    let created = |gi: Gi| gi.same(JUST_CREATED);
    let unused = |gi: Gi| created(gi) || gi.same(EMPTY);

    if created(s.current) && created(p.current) {
        return plain(Relation::Equal, 10);
    }
    if unused(s.current) && !created(p.current) {
        return plain(Target(Full), 20);
    }
    if !created(s.current) && unused(p.current) {
        return plain(Source(Full), 30);
    }
    if s.current.same(p.current) {
        return compare_equal(own, peer, link);
    }
    if s.current.same(p.bitmap) {
        return plain(Target(Bitmap), 50);
    }
    if s.current.same(p.history[0]) && lost_sync_uuid(p, s, link) {
        return corrected(
            Target(Bitmap),
            51,
            Correction::Peer(rotated_back(p), CorrectionText::LostSyncUuid),
            link,
        );
    }
    if s.current.same(p.history[0]) || s.current.same(p.history[1]) {
        return plain(Target(Full), 60);
    }
    if s.bitmap.same(p.current) {
        return plain(Source(Bitmap), 70);
    }
    if s.history[0].same(p.current) && lost_sync_uuid(s, p, link) {
        return corrected(
            Source(Bitmap),
            71,
            Correction::Own(rotated_back(s), CorrectionText::SyncUuidNotThrough),
            link,
        );
    }
    if s.history[0].same(p.current) || s.history[1].same(p.current) {
        return plain(Source(Full), 80);
    }
    if s.bitmap.same(p.bitmap) && s.bitmap != EMPTY {
        return plain(SplitBrain, 90);
    }
    // Empty slots match each other here, as in the original: both sides must come to the same
    // result, and a kernel peer sees a split brain (defect D3, kept).
    if s.history.iter().any(|h| p.history.iter().any(|g| h.same(*g))) {
        return plain(SplitBrainUnclear, 100);
    }
    plain(Unrelated, 100)
}

/// Rules 34 to 41: the current identifiers are equal.
fn compare_equal(own: &Side, peer: &Side, link: &Link) -> Comparison {
    use Extent::Bitmap;
    use Relation::{Source, Target};
    let (s, p) = (own.slots, peer.slots);
    if p.bitmap == EMPTY && s.bitmap != EMPTY {
        if link.protocol < 91 {
            return plain(Relation::NeedsProtocol(91), 30);
        }
        if s.bitmap.same(p.history[0]) && s.history[0].same(p.history[1]) {
            let fixed = Slots { bitmap: EMPTY, history: [s.bitmap, s.history[0]], ..s };
            let correction = Correction::Own(fixed, CorrectionText::MissedFinishSelf);
            return corrected(Source(Bitmap), 34, correction, link);
        }
        let remark = Some(Remark::PeerFailedToWriteSyncUuid);
        return Comparison { remark, ..plain(Source(Bitmap), 36) };
    }
    if s.bitmap == EMPTY && p.bitmap != EMPTY {
        if link.protocol < 91 {
            return plain(Relation::NeedsProtocol(91), 30);
        }
        if s.history[0].same(p.bitmap) && s.history[1].same(p.history[0]) {
            let fixed = Slots { bitmap: EMPTY, history: [p.bitmap, p.history[0]], ..p };
            let correction = Correction::Peer(fixed, CorrectionText::MissedFinishPeer);
            return corrected(Target(Bitmap), 35, correction, link);
        }
        let remark = Some(Remark::FailedToWriteSyncUuid);
        return Comparison { remark, ..plain(Target(Bitmap), 37) };
    }
    compare_crashed(own, peer, link)
}

/// Rules 40 and 41: nothing in the identifiers tells the nodes apart.
fn compare_crashed(own: &Side, peer: &Side, link: &Link) -> Comparison {
    use Extent::Bitmap;
    use Relation::{Source, Target};
    let crashed = (own.crashed_primary, peer.crashed_primary);
    if crashed == (false, false) {
        return plain(Relation::Equal, 40);
    }
    let primary = (own.role == Role::Primary, peer.role == Role::Primary);
    if primary != (false, false) {
        if !link.wsame {
            let relation = Relation::NeedsFeature { protocol: 101, feature: 4 };
            let remark = Some(Remark::UnrotatedButPrimary);
            return Comparison { remark, ..plain(relation, 41) };
        }
        return match primary {
            (true, true) => Comparison {
                remark: Some(Remark::UnrotatedBothPrimary),
                ..plain(Relation::SplitBrainUnclear, 41)
            },
            (true, false) => plain(Source(Bitmap), 41),
            (false, _) => plain(Target(Bitmap), 41),
        };
    }
    match crashed {
        (true, false) => plain(Source(Bitmap), 40),
        (false, _) => plain(Target(Bitmap), 40),
        (true, true) if link.resolve_conflicts => plain(Target(Bitmap), 40),
        (true, true) => plain(Source(Bitmap), 40),
    }
}

/// Second condition of rules 51 and 71: `newer` rotated in a sync UUID that `older` never stored.
fn lost_sync_uuid(newer: Slots, older: Slots, link: &Link) -> bool {
    if link.protocol >= 96 {
        newer.history[0].without_flag().0.wrapping_add(SYNC_OFFSET) == newer.bitmap.without_flag().0
    } else {
        older.history[0].same(newer.history[1])
    }
}

/// Takes the lost sync UUID back out of the bitmap slot.
fn rotated_back(slots: Slots) -> Slots {
    Slots { bitmap: slots.history[0], history: [slots.history[1]; 2], ..slots }
}

/// A rule that corrects; below protocol 91 the peer would not do the same.
fn corrected(relation: Relation, rule: u8, correction: Correction, link: &Link) -> Comparison {
    if link.protocol < 91 {
        return plain(Relation::NeedsProtocol(91), rule);
    }
    Comparison { relation, rule, correction: Some(correction), remark: None }
}
