//! The implicit rules: what a requested state becomes before anybody judges it.
//! Spec: states-and-generations.md §2.2.

use drbd_types::{Cstate, Dstate, Fields, Role};

use crate::config::{Fencing, OnNoData};
use crate::state::facts::{fencing_in_force, lacks_data, peer_needs_fencing};

/// What the rules look at besides the two states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Surroundings {
    /// `fencing` of the volume's disk configuration. Counts only if the volume has a disk.
    pub fencing: Fencing,
    /// `on-no-data-accessible` of the resource.
    pub on_no_data: OnNoData,
    /// The attach candidate: own and peer's disk state that an attach would have produced without
    /// a peer. Needed while the disk is Negotiating.
    pub candidate: Option<(Dstate, Dstate)>,
    /// The exposed UUID equals the current UUID of the meta-data in all 64 bits.
    pub exposed_is_current: bool,
}

impl Default for Surroundings {
    fn default() -> Self {
        Self {
            fencing: Fencing::DontCare,
            on_no_data: OnNoData::IoError,
            candidate: None,
            exposed_is_current: false,
        }
    }
}

/// What the log says before the line of the change. Spec: §1.5.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Warning {
    /// S3 ended a verify.
    VerifyAborted,
    /// S3 ended a resync, or what leads to one.
    ResyncAborted,
    /// S4 found no data to go on with.
    LostWhileNegotiating,
    /// S6 raised the own disk.
    UpgradedDisk,
    /// S6 raised the peer's disk.
    UpgradedPdsk,
}

impl Warning {
    /// The line, without prefix.
    pub const fn text(self) -> &'static str {
        match self {
            Self::VerifyAborted => "Online-verify aborted.",
            Self::ResyncAborted => "Resync aborted.",
            Self::LostWhileNegotiating => "Connection lost while negotiating, no data!",
            Self::UpgradedDisk => "Implicitly upgraded disk",
            Self::UpgradedPdsk => "Implicitly upgraded pdsk",
        }
    }
}

/// Applies rules S1 to S10 to the requested state. `old` is the state now; `new` is `old` with
/// the requested fields replaced. The suspend bits of both are those of the resource. The warning
/// is the last one that applies.
pub fn sanitize(old: &Fields, new: Fields, s: &Surroundings) -> (Fields, Option<Warning>) {
    let mut ns = new;
    let mut warning = None;
    without_connection(&mut ns); // S1
    if ns.conn == Cstate::StandAlone && ns.disk == Dstate::Diskless && ns.role == Role::Secondary {
        ns.aftr_isp = false; // S2
    }
    if ns.conn > Cstate::Connected && (ns.disk <= Dstate::Failed || ns.pdsk <= Dstate::Failed) {
        let verify = ns.conn.is_verify(); // S3
        warning = Some(if verify { Warning::VerifyAborted } else { Warning::ResyncAborted });
        lose_source(old.conn, &mut ns);
        ns.conn = Cstate::Connected;
    }
    let was_attached = old.disk >= Dstate::Negotiating;
    if ns.conn < Cstate::Connected && ns.disk == Dstate::Negotiating && was_attached {
        warning = end_negotiation(&mut ns, s).or(warning); // S4
    }
    if Cstate::Connected <= ns.conn && ns.conn < Cstate::Ahead {
        ns.disk = upgraded(ns.disk); // S5
        ns.pdsk = upgraded(ns.pdsk);
    }
    warning = clamp(&mut ns).or(warning); // S6
    if fencing_in_force(old.disk, s.fencing) == Fencing::ResourceAndStonith
        && peer_needs_fencing(&ns)
        && !peer_needs_fencing(old)
    {
        ns.susp_fen = true; // S7
    }
    if s.on_no_data == OnNoData::SuspendIo && lacks_data(&ns) && !lacks_data(old) {
        ns.susp_nod = true; // S8
    }
    pause_or_continue(&mut ns); // S9, S10
    (ns, warning)
}

/// S1.
fn without_connection(ns: &mut Fields) {
    if ns.conn < Cstate::Connected {
        ns.peer_isp = false;
        ns.peer = Role::Unknown;
        if ns.pdsk > Dstate::DUnknown || ns.pdsk < Dstate::Inconsistent {
            ns.pdsk = Dstate::DUnknown;
        }
    }
}

/// The only disk with the newest data is gone: the other one, which was about to get it, is not good
/// by that. In the original it counts as UpToDate from then on, by S5, and what it lacks is forgotten.
fn lose_source(was: Cstate, ns: &mut Fields) {
    use Cstate::{Ahead, Behind, StartingSyncS, StartingSyncT, WFBitMapS, WFBitMapT, WFSyncUUID};
    let is_source = matches!(was, StartingSyncS | WFBitMapS | Ahead);
    if is_source && ns.disk <= Dstate::Failed && ns.pdsk >= Dstate::Inconsistent {
        ns.pdsk = Dstate::Inconsistent;
    }
    let is_target = matches!(was, StartingSyncT | WFBitMapT | WFSyncUUID | Behind);
    if is_target && ns.pdsk <= Dstate::Failed && ns.disk >= Dstate::Inconsistent {
        ns.disk = Dstate::Inconsistent;
    }
}

/// S4. Without a candidate there is nothing that could be gone on with.
fn end_negotiation(ns: &mut Fields, s: &Surroundings) -> Option<Warning> {
    match s.candidate {
        Some((disk, pdsk)) if s.exposed_is_current => {
            ns.disk = disk;
            ns.pdsk = pdsk;
            None
        }
        Some(_) | None => {
            ns.disk = Dstate::Diskless;
            ns.pdsk = Dstate::DUnknown;
            Some(Warning::LostWhileNegotiating)
        }
    }
}

/// S5, of one disk.
const fn upgraded(disk: Dstate) -> Dstate {
    match disk {
        Dstate::Consistent | Dstate::Outdated => Dstate::UpToDate,
        Dstate::Diskless
        | Dstate::Attaching
        | Dstate::Failed
        | Dstate::Negotiating
        | Dstate::Inconsistent
        | Dstate::DUnknown
        | Dstate::UpToDate => disk,
    }
}

/// Lowest and highest state.
pub type Bounds = (Dstate, Dstate);

/// The table of S6: bounds of the own disk and of the peer's.
pub const fn bounds(conn: Cstate) -> (Bounds, Bounds) {
    use Cstate::{
        Ahead, Behind, BrokenPipe, Connected, Disconnecting, NetworkFailure, PausedSyncS,
        PausedSyncT, ProtocolError, StandAlone, StartingSyncS, StartingSyncT, SyncSource,
        SyncTarget, TearDown, Timeout, Unconnected, VerifyS, VerifyT, WFBitMapS, WFBitMapT,
        WFConnection, WFReportParams, WFSyncUUID,
    };
    use Dstate::{Consistent, DUnknown, Diskless, Inconsistent, Outdated, UpToDate};
    match conn {
        StartingSyncT | WFBitMapT | WFSyncUUID | PausedSyncT | Behind => {
            ((Inconsistent, Outdated), (UpToDate, UpToDate))
        }
        SyncTarget => ((Inconsistent, Inconsistent), (UpToDate, UpToDate)),
        StartingSyncS | WFBitMapS | PausedSyncS | Ahead => {
            ((UpToDate, UpToDate), (Inconsistent, Consistent))
        }
        SyncSource => ((UpToDate, UpToDate), (Inconsistent, Inconsistent)),
        VerifyS | VerifyT => ((UpToDate, UpToDate), (UpToDate, UpToDate)),
        Connected => ((Diskless, UpToDate), (Diskless, UpToDate)),
        StandAlone | Disconnecting | Unconnected | Timeout | BrokenPipe | NetworkFailure
        | ProtocolError | TearDown | WFConnection | WFReportParams => {
            ((Diskless, UpToDate), (Inconsistent, DUnknown))
        }
    }
}

/// S6.
fn clamp(ns: &mut Fields) -> Option<Warning> {
    let (disk, pdsk) = bounds(ns.conn);
    let mut warning = None;
    if ns.disk < disk.0 {
        warning = Some(Warning::UpgradedDisk);
    }
    if ns.pdsk < pdsk.0 {
        warning = Some(Warning::UpgradedPdsk);
    }
    ns.disk = ns.disk.clamp(disk.0, disk.1);
    ns.pdsk = ns.pdsk.clamp(pdsk.0, pdsk.1);
    warning
}

/// S9 and S10.
fn pause_or_continue(ns: &mut Fields) {
    let paused = ns.is_paused();
    ns.conn = match (ns.conn, paused) {
        (Cstate::SyncSource, true) => Cstate::PausedSyncS,
        (Cstate::SyncTarget, true) => Cstate::PausedSyncT,
        (Cstate::PausedSyncS, false) => Cstate::SyncSource,
        (Cstate::PausedSyncT, false) => Cstate::SyncTarget,
        (conn, _) => conn,
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use Cstate::{
        Ahead, Behind, Connected, NetworkFailure, PausedSyncS, PausedSyncT, StandAlone,
        StartingSyncS, StartingSyncT, SyncSource, SyncTarget, TearDown, VerifyS, WFBitMapS,
        WFBitMapT, WFConnection, WFReportParams, WFSyncUUID,
    };
    use Dstate::{
        Attaching, Consistent, DUnknown, Diskless, Failed, Inconsistent, Negotiating, Outdated,
        UpToDate,
    };
    use Role::{Primary, Secondary, Unknown};

    fn fields(role: Role, peer: Role, conn: Cstate, disk: Dstate, pdsk: Dstate) -> Fields {
        Fields { role, peer, conn, disk, pdsk, ..Fields::NEW }
    }

    const UP: Fields = Fields {
        role: Primary,
        peer: Secondary,
        conn: Connected,
        disk: UpToDate,
        pdsk: UpToDate,
        ..Fields::NEW
    };

    type Row = (&'static str, Fields, Fields, (Role, Cstate, Dstate, Dstate), Option<Warning>);

    /// One row per rule and per example of the specification, and changes seen in the log of the
    /// reference. Columns: what, old, requested, expected (peer, conn, disk, pdsk), warning.
    #[test]
    #[rustfmt::skip]
    fn rules() {
        let params = fields(Secondary, Unknown, WFReportParams, UpToDate, DUnknown);
        let rows: &[Row] = &[
            ("S1: a good peer becomes unknown", UP, Fields { conn: NetworkFailure, ..UP },
                (Unknown, NetworkFailure, UpToDate, DUnknown), None),
            ("S1: a diskless peer becomes unknown", Fields { pdsk: Diskless, ..UP },
                Fields { conn: TearDown, pdsk: Diskless, ..UP },
                (Unknown, TearDown, UpToDate, DUnknown), None),
            ("S1: Inconsistent survives", Fields { pdsk: Inconsistent, ..UP },
                Fields { conn: TearDown, pdsk: Inconsistent, ..UP },
                (Unknown, TearDown, UpToDate, Inconsistent), None),
            ("S1: Outdated survives", UP, Fields { conn: TearDown, pdsk: Outdated, ..UP },
                (Unknown, TearDown, UpToDate, Outdated), None),
            ("S3: verify ends with the disk", Fields { conn: VerifyS, ..UP },
                Fields { conn: VerifyS, disk: Failed, ..UP },
                (Secondary, Connected, Failed, UpToDate), Some(Warning::VerifyAborted)),
            ("S3: resync ends with the disk", Fields { conn: SyncSource, pdsk: Inconsistent, ..UP },
                Fields { conn: SyncSource, pdsk: Diskless, ..UP },
                (Secondary, Connected, UpToDate, Diskless), Some(Warning::ResyncAborted)),
            ("S3: who was ahead loses its disk", Fields { conn: Ahead, pdsk: Consistent, ..UP },
                Fields { conn: Ahead, disk: Failed, pdsk: Consistent, ..UP },
                (Secondary, Connected, Failed, Inconsistent), Some(Warning::ResyncAborted)),
            ("S3: ... as the other side sees it", Fields { conn: Behind, disk: Outdated, ..UP },
                Fields { conn: Behind, disk: Outdated, pdsk: Failed, ..UP },
                (Secondary, Connected, Inconsistent, Failed), Some(Warning::ResyncAborted)),
            ("S3: a target loses its disk", Fields { conn: WFBitMapT, disk: Outdated, ..UP },
                Fields { conn: WFBitMapT, disk: Failed, ..UP },
                (Secondary, Connected, Failed, UpToDate), Some(Warning::ResyncAborted)),
            ("S3: invalidate-remote without a disk there", Fields { pdsk: Diskless, ..UP },
                Fields { conn: StartingSyncS, pdsk: Diskless, ..UP },
                (Secondary, Connected, UpToDate, Diskless), Some(Warning::ResyncAborted)),
            ("S4: no data", Fields { disk: Negotiating, ..UP },
                Fields { conn: NetworkFailure, disk: Negotiating, ..UP },
                (Unknown, NetworkFailure, Diskless, DUnknown), Some(Warning::LostWhileNegotiating)),
            ("S4: only for an attached disk", Fields { disk: Attaching, ..UP },
                Fields { conn: NetworkFailure, disk: Negotiating, ..UP },
                (Unknown, NetworkFailure, Negotiating, DUnknown), None),
            ("S4: not while Connected", Fields { disk: Attaching, ..UP }, Fields { disk: Negotiating, ..UP },
                (Secondary, Connected, Negotiating, UpToDate), None),
            ("S4: nor when the peer's state changes", Fields { disk: Negotiating, ..UP },
                Fields { disk: Negotiating, pdsk: Diskless, ..UP },
                (Secondary, Connected, Negotiating, Diskless), None),
            ("S5: Outdated and equal is UpToDate", params,
                Fields { conn: Connected, peer: Primary, disk: Outdated, pdsk: UpToDate, ..params },
                (Primary, Connected, UpToDate, UpToDate), None),
            ("S5: Consistent and equal is UpToDate", params,
                Fields { conn: Connected, disk: Consistent, pdsk: Consistent, ..params },
                (Unknown, Connected, UpToDate, UpToDate), None),
            ("S6: a source shows its target as Consistent", params,
                Fields { conn: WFBitMapS, peer: Secondary, pdsk: UpToDate, ..params },
                (Secondary, WFBitMapS, UpToDate, Consistent), None),
            ("S6: ... and an Inconsistent one as that", params,
                Fields { conn: WFBitMapS, peer: Secondary, pdsk: Inconsistent, ..params },
                (Secondary, WFBitMapS, UpToDate, Inconsistent), None),
            ("S6: a target becomes Outdated", params,
                Fields { conn: WFBitMapT, peer: Primary, pdsk: UpToDate, ..params },
                (Primary, WFBitMapT, Outdated, UpToDate), None),
            ("S6: ... and Inconsistent when it starts",
                Fields { conn: WFSyncUUID, disk: Outdated, ..UP },
                Fields { conn: SyncTarget, disk: Outdated, ..UP },
                (Secondary, SyncTarget, Inconsistent, UpToDate), None),
            ("S6: the source likewise", Fields { conn: WFBitMapS, pdsk: Consistent, ..UP },
                Fields { conn: SyncSource, pdsk: Consistent, ..UP },
                (Secondary, SyncSource, UpToDate, Inconsistent), None),
            ("S6: attach as target", Fields { disk: Negotiating, ..UP },
                Fields { conn: WFBitMapT, disk: Negotiating, ..UP },
                (Secondary, WFBitMapT, Inconsistent, UpToDate), Some(Warning::UpgradedDisk)),
            ("S6: both raised, the last counts", UP,
                Fields { conn: VerifyS, disk: Negotiating, pdsk: Negotiating, ..UP },
                (Secondary, VerifyS, UpToDate, UpToDate), Some(Warning::UpgradedPdsk)),
            ("invalidate", UP, Fields { conn: StartingSyncT, ..UP },
                (Secondary, StartingSyncT, Outdated, UpToDate), None),
            ("invalidate-remote", UP, Fields { conn: StartingSyncS, ..UP },
                (Secondary, StartingSyncS, UpToDate, Consistent), None),
            ("outdate while Connected changes nothing", UP, Fields { disk: Outdated, ..UP },
                (Secondary, Connected, UpToDate, UpToDate), None),
            ("pull-ahead", UP, Fields { conn: Ahead, ..UP },
                (Secondary, Ahead, UpToDate, Consistent), None),
            ("the other side of it", UP, Fields { conn: Behind, ..UP },
                (Secondary, Behind, Outdated, UpToDate), None),
            ("S9", Fields { conn: SyncTarget, disk: Inconsistent, ..UP },
                Fields { conn: SyncTarget, disk: Inconsistent, user_isp: true, ..UP },
                (Secondary, PausedSyncT, Inconsistent, UpToDate), None),
            ("S9, and only then the range of PausedSyncS counts",
                Fields { conn: WFBitMapS, pdsk: Consistent, ..UP },
                Fields { conn: SyncSource, pdsk: Consistent, peer_isp: true, ..UP },
                (Secondary, PausedSyncS, UpToDate, Inconsistent), None),
            ("S10", Fields { conn: PausedSyncS, pdsk: Inconsistent, user_isp: true, ..UP },
                Fields { conn: PausedSyncS, pdsk: Inconsistent, ..UP },
                (Secondary, SyncSource, UpToDate, Inconsistent), None),
        ];
        for (what, old, new, expected, warning) in rows {
            let (ns, said) = sanitize(old, *new, &Surroundings::default());
            assert_eq!((ns.peer, ns.conn, ns.disk, ns.pdsk), *expected, "{what}");
            assert_eq!(said, *warning, "{what}");
        }
    }

    #[test]
    fn s2_forgets_the_dependency_of_an_unconfigured_volume() {
        let old = Fields { aftr_isp: true, disk: UpToDate, ..Fields::NEW };
        let (ns, _) = sanitize(&old, Fields { disk: Diskless, ..old }, &Surroundings::default());
        assert!(!ns.aftr_isp);
        let primary = Fields { role: Primary, disk: Diskless, ..old };
        assert!(sanitize(&old, primary, &Surroundings::default()).0.aftr_isp);
    }

    #[test]
    fn s4_takes_the_candidate_if_the_data_is_the_one_that_was_seen() {
        let s = Surroundings {
            candidate: Some((UpToDate, Outdated)),
            exposed_is_current: true,
            ..Surroundings::default()
        };
        let old = Fields { disk: Negotiating, ..UP };
        let (ns, warning) = sanitize(&old, Fields { conn: NetworkFailure, ..old }, &s);
        assert_eq!((ns.disk, ns.pdsk, warning), (UpToDate, Outdated, None));
        let other = Surroundings { exposed_is_current: false, ..s };
        let (ns, warning) = sanitize(&old, Fields { conn: NetworkFailure, ..old }, &other);
        assert_eq!((ns.disk, ns.pdsk), (Diskless, DUnknown));
        assert_eq!(warning.map(Warning::text), Some("Connection lost while negotiating, no data!"));
    }

    #[test]
    fn s7_freezes_once() {
        let s = Surroundings { fencing: Fencing::ResourceAndStonith, ..Surroundings::default() };
        let lost = Fields { conn: NetworkFailure, ..UP };
        let frozen = sanitize(&UP, lost, &s).0;
        assert!(frozen.susp_fen && frozen.pdsk == DUnknown);
        let thawed = Fields { susp_fen: false, ..frozen };
        let later = sanitize(&thawed, Fields { conn: WFConnection, ..thawed }, &s).0;
        assert!(!later.susp_fen, "was true before: resume-io must not freeze again");
        let outdated = Fields { pdsk: Outdated, ..lost };
        assert!(!sanitize(&UP, outdated, &s).0.susp_fen);
        let only = Surroundings { fencing: Fencing::ResourceOnly, ..s };
        assert!(!sanitize(&UP, lost, &only).0.susp_fen);
        let diskless = Fields { disk: Diskless, ..UP };
        let lost = Fields { conn: NetworkFailure, ..diskless };
        assert!(!sanitize(&diskless, lost, &s).0.susp_fen, "no disk, no policy");
    }

    /// The recorded refusal "ds:Diskless/DUnknown s----N" of a Primary that freezes.
    #[test]
    fn s8_freezes_once() {
        let s = Surroundings { on_no_data: OnNoData::SuspendIo, ..Surroundings::default() };
        let diskless = Fields { disk: Diskless, ..UP };
        let lost = Fields { conn: TearDown, ..diskless };
        let frozen = sanitize(&diskless, lost, &s).0;
        assert!(frozen.susp_nod);
        let thawed = Fields { susp_nod: false, ..frozen };
        assert!(!sanitize(&thawed, Fields { conn: StandAlone, ..thawed }, &s).0.susp_nod);
        assert!(!sanitize(&diskless, lost, &Surroundings::default()).0.susp_nod);
        assert!(!sanitize(&UP, Fields { conn: TearDown, ..UP }, &s).0.susp_nod);
    }
}
