//! What is refused. Facts obey only the hard rules; requests obey all.
//!
//! Each rule stands on its own line with the number of the specification's tables. Among the hard
//! and the valid-state rules the first that fires counts, among the soft rules the last.
//! Spec: states-and-generations.md §2.3, §2.4, §2.5.

use drbd_types::{Cstate, Dstate, Fields, Refusal, Role};

use crate::config::Fencing;
use crate::state::facts::{fencing_in_force, lacks_data};

/// What the rules need to know of the connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetView {
    /// There is a network configuration. If not, only `version` means anything.
    pub present: bool,
    /// `allow-two-primaries`.
    pub two_primaries: bool,
    /// `verify-alg` is set.
    pub has_verify_alg: bool,
    /// The agreed protocol version, or that of the last connection.
    pub version: u32,
    /// The peer is Primary of any volume of the connection, by the states as they are stored now.
    pub peer_is_primary_elsewhere: bool,
}

/// What the rules need besides the states.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cx {
    /// The connection.
    pub net: NetView,
    /// `fencing` of the volume's disk configuration. [`check`] and [`excused_valid`] count it only
    /// if the volume has a disk; [`valid`] alone takes it as it is.
    pub fencing: Fencing,
    /// Somebody has the device open.
    pub is_open: bool,
    /// `state-sent`: handshake packets have gone out, roles and disks must not change.
    pub state_sent: bool,
}

fn refuse_if(condition: bool, refusal: Refusal) -> Result<(), Refusal> {
    if condition { Err(refusal) } else { Ok(()) }
}

/// Rules H1 to H6: those about the connection alone.
///
/// # Errors
/// The first rule that fires.
pub fn hard_conn(old: Cstate, new: Cstate) -> Result<(), Refusal> {
    use Cstate::{Connected, Disconnecting, StandAlone, Unconnected, WFReportParams};
    if old == new {
        return Ok(()); // H1
    }
    let again = matches!(new, Unconnected | Disconnecting);
    let connects = old < WFReportParams && new >= Connected;
    refuse_if(old == StandAlone && new == Disconnecting, Refusal::AlreadyStandalone)?; // H2
    refuse_if(old == StandAlone && new != Unconnected, Refusal::NeedConnection)?; // H3
    refuse_if(connects, Refusal::NeedConnection)?; // H4
    refuse_if(old.is_lost() && !again, Refusal::InTransientState)?; // H5
    refuse_if(old == Disconnecting && new != StandAlone, Refusal::InTransientState) // H6
}

/// Rules H1 to H7: what even a fact can not be.
///
/// # Errors
/// H7 if it fires, else the first of the others.
pub fn hard(old: &Fields, new: &Fields) -> Result<(), Refusal> {
    let fails_without_disk = old.disk == Dstate::Diskless && new.disk == Dstate::Failed;
    refuse_if(fails_without_disk, Refusal::IsDiskless)?; // H7
    hard_conn(old.conn, new.conn)
}

/// Rules V1 to V15: states that nobody may ask for.
///
/// # Errors
/// The first rule that fires.
pub fn valid(new: &Fields, cx: &Cx) -> Result<(), Refusal> {
    use Cstate::{Connected, PausedSyncS, StartingSyncS, StartingSyncT, SyncSource, WFBitMapS};
    use Dstate::{DUnknown, Inconsistent, Outdated, UpToDate};
    let Fields { conn, disk, pdsk, .. } = *new;
    let primary = new.role == Role::Primary;
    let one_primary = cx.net.present && !cx.net.two_primaries;
    let alone = primary && conn < Connected;
    let fenced = cx.fencing != Fencing::DontCare;
    let neither_good = disk < UpToDate && pdsk < UpToDate;
    let verify = conn.is_verify();
    let source = matches!(conn, Connected | WFBitMapS | SyncSource | PausedSyncS);
    let starting = matches!(conn, StartingSyncS | StartingSyncT);

    refuse_if(one_primary && primary && new.peer == Role::Primary, Refusal::TwoPrimaries)?; // V1
    refuse_if(
        one_primary && primary && cx.net.peer_is_primary_elsewhere,
        Refusal::OtherVolumePeerPrimary,
    )?; // V2
    refuse_if(new.role == Role::Secondary && cx.is_open, Refusal::DeviceInUse)?; // V3
    refuse_if(alone && disk < UpToDate, Refusal::NoUpToDateDisk)?; // V4
    refuse_if(fenced && alone && pdsk >= DUnknown, Refusal::PrimaryNop)?; // V5
    refuse_if(primary && disk <= Inconsistent && pdsk <= Inconsistent, Refusal::NoUpToDateDisk)?; // V6
    refuse_if(conn > Connected && disk < Inconsistent, Refusal::NoLocalDisk)?; // V7
    refuse_if(conn > Connected && pdsk < Inconsistent, Refusal::NoRemoteDisk)?; // V8
    refuse_if(conn > Connected && neither_good, Refusal::NoUpToDateDisk)?; // V9
    refuse_if(source && disk == Outdated, Refusal::ConnectedOutdates)?; // V10
    refuse_if(cx.net.present && verify && !cx.net.has_verify_alg, Refusal::NoVerifyAlg)?; // V11
    refuse_if(verify && cx.net.version < 88, Refusal::NotSupported)?; // V12
    refuse_if(lacks_data(new), Refusal::NoUpToDateDisk)?; // V13
    refuse_if(starting && pdsk == DUnknown, Refusal::NeedConnection)?; // V14
    refuse_if(conn >= Connected && pdsk == DUnknown, Refusal::ConnectedOutdates) // V15
}

/// Does a request make a disk good that is not, only because its new state demands that of it? The
/// original does: a verify declares an Inconsistent disk UpToDate, and a full resync goes from it to
/// the good one. Where nobody has good data that is a way to choose.
fn upgrades_bad_disk(old: &Fields, new: &Fields) -> bool {
    let is_bad = |disk: Dstate| disk < Dstate::UpToDate;
    if new.conn.is_verify() {
        return is_bad(old.disk) || is_bad(old.pdsk);
    }
    let starting = matches!(new.conn, Cstate::StartingSyncS | Cstate::StartingSyncT);
    let own = old.disk == Dstate::Inconsistent && new.disk == Dstate::UpToDate;
    let peer = old.pdsk == Dstate::Inconsistent && new.pdsk == Dstate::UpToDate;
    starting && (own && !is_bad(old.pdsk) || peer && !is_bad(old.disk))
}

/// Rules T1 to T13: changes that nobody may ask for; and one of our own.
///
/// # Errors
/// The last rule that fires.
pub fn soft(old: &Fields, new: &Fields, cx: &Cx) -> Result<(), Refusal> {
    use Cstate::{
        Connected, Disconnecting, StandAlone, StartingSyncS, StartingSyncT, SyncSource, SyncTarget,
        Unconnected, WFConnection, WFReportParams, WFSyncUUID,
    };
    use Dstate::{Attaching, Diskless, Outdated, UpToDate};
    let moves = new.conn != old.conn;
    let starting = matches!(new.conn, StartingSyncS | StartingSyncT);
    let disconnects = new.conn == Disconnecting;
    let handshake = (old.conn == WFConnection && new.conn == WFReportParams)
        || (old.conn == WFReportParams && new.conn >= Connected);
    let promotes = old.role != Role::Primary && new.role == Role::Primary;
    let disk_unsettled = !matches!(new.disk, UpToDate | Diskless);
    let busy = new.conn <= WFSyncUUID || moves;
    let sync = matches!(new.conn, SyncSource | SyncTarget);
    let outdates = new.disk == Outdated && old.disk < Outdated && old.disk != Attaching;

    let rules = [
        (moves && old.conn == Connected && upgrades_bad_disk(old, new), Refusal::NoUpToDateDisk),
        (moves && starting && old.conn > Connected, Refusal::ResyncRunning), // T1
        (disconnects && old.conn == StandAlone, Refusal::AlreadyStandalone), // T2
        (new.disk > Attaching && old.disk == Diskless, Refusal::IsDiskless), // T3
        (new.conn == WFConnection && old.conn < Unconnected, Refusal::NoNetConfig), // T4
        (outdates, Refusal::LowerThanOutdated),                              // T5
        (disconnects && old.conn == Unconnected, Refusal::InTransientState), // T6
        (cx.state_sent && !handshake, Refusal::InTransientState),            // T7
        (promotes && new.pdsk == UpToDate && disk_unsettled && busy, Refusal::InTransientState), // T8
        (new.conn.is_verify() && old.conn < Connected, Refusal::NeedConnection), // T9
        (new.conn.is_verify() && moves && old.conn > Connected, Refusal::ResyncRunning), // T10
        (starting && old.conn < Connected, Refusal::NeedConnection),             // T11
        (sync && old.conn < WFReportParams, Refusal::NeedConnection),            // T12
        (
            disconnects && new.pdsk == Outdated && old.conn < Connected && old.pdsk > Outdated,
            Refusal::OutdateWithoutConnection,
        ), // T13
    ];
    rules.iter().rev().find(|rule| rule.0).map_or(Ok(()), |rule| Err(rule.1))
}

/// The valid-state rules with their excuse: an illegal state may stay illegal in the same way.
///
/// # Errors
/// The first rule that fires for the new state, unless it is also what is wrong with the old one.
pub fn excused_valid(old: &Fields, new: &Fields, cx: &Cx) -> Result<(), Refusal> {
    let cx = Cx { fencing: fencing_in_force(old.disk, cx.fencing), ..*cx };
    match valid(new, &cx) {
        Err(refusal) if valid(old, &cx) != Err(refusal) => Err(refusal),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Everything that a request must pass that is not a fact: hard rules, valid state (with the
/// excuse), soft rules. `new` has been sanitised.
///
/// # Errors
/// The refusal that the reference gives.
pub fn check(old: &Fields, new: &Fields, cx: &Cx) -> Result<(), Refusal> {
    hard(old, new)?;
    excused_valid(old, new, cx)?;
    soft(old, new, cx)
}

/// As [`check`], for a change that the peer is to be asked about: here "already illegal" is no
/// excuse. Spec: §2.6.
///
/// # Errors
/// The refusal that the reference gives.
pub fn check_cluster_wide(old: &Fields, new: &Fields, cx: &Cx) -> Result<(), Refusal> {
    hard(old, new)?;
    valid(new, &Cx { fencing: fencing_in_force(old.disk, cx.fencing), ..*cx })?;
    soft(old, new, cx)
}

#[cfg(test)]
mod tests {
    use super::*;
    use Cstate::{
        Connected, Disconnecting, NetworkFailure, PausedSyncS, StandAlone, StartingSyncS,
        StartingSyncT, SyncSource, SyncTarget, TearDown, Timeout, Unconnected, VerifyS, VerifyT,
        WFBitMapS, WFBitMapT, WFConnection, WFReportParams, WFSyncUUID,
    };
    use Dstate::{
        Attaching, Consistent, DUnknown, Diskless, Failed, Inconsistent, Outdated, UpToDate,
    };
    use Role::{Primary, Secondary, Unknown};

    const NET: NetView = NetView {
        present: true,
        two_primaries: false,
        has_verify_alg: true,
        version: 101,
        peer_is_primary_elsewhere: false,
    };
    const CX: Cx = Cx { net: NET, fencing: Fencing::DontCare, is_open: false, state_sent: false };
    const UP: Fields = Fields {
        role: Secondary,
        peer: Secondary,
        conn: Connected,
        disk: UpToDate,
        pdsk: UpToDate,
        ..Fields::NEW
    };
    const PRI: Fields = Fields { role: Primary, ..UP };
    const ALONE: Fields = Fields { peer: Unknown, conn: WFConnection, pdsk: DUnknown, ..PRI };

    #[test]
    fn a_bad_disk_is_not_made_good_by_asking() {
        let bad = Fields { disk: Inconsistent, ..UP };
        let good = UP;
        for (old, conn, code) in [
            (bad, VerifyS, -2),
            (Fields { pdsk: Inconsistent, ..UP }, VerifyT, -2),
            (bad, StartingSyncS, -2),
            (Fields { pdsk: Inconsistent, ..UP }, StartingSyncT, -2),
            (bad, StartingSyncT, 1),
            (good, VerifyS, 1),
            (good, StartingSyncS, 1),
            (Fields { pdsk: Inconsistent, ..bad }, StartingSyncS, 1),
        ] {
            let asked = Fields { conn, ..old };
            let (new, _) = crate::state::sanitize::sanitize(&old, asked, &Default::default());
            let got = check(&old, &new, &CX).map_or_else(Refusal::number, |()| 1);
            assert_eq!(got, code, "{old:?} {conn}");
        }
    }

    #[test]
    fn hard_rules() {
        let rows = [
            (StandAlone, StandAlone, 1),     // H1
            (StandAlone, Disconnecting, -9), // H2
            (StandAlone, WFConnection, -15), // H3, as recorded
            (StandAlone, Unconnected, 1),
            (WFConnection, Connected, -15), // H4
            (WFReportParams, Connected, 1),
            (Timeout, NetworkFailure, -18), // H5
            (TearDown, WFConnection, -18),
            (TearDown, Unconnected, 1),
            (NetworkFailure, Disconnecting, 1),
            (Disconnecting, Unconnected, -18), // H6
            (Disconnecting, StandAlone, 1),
            (Connected, WFReportParams, 1),
        ];
        for (old, new, code) in rows {
            let got = hard(&Fields { conn: old, ..UP }, &Fields { conn: new, ..UP });
            assert_eq!(got.map_or_else(Refusal::number, |()| 1), code, "{old} -> {new}");
        }
        let diskless = Fields { disk: Diskless, conn: StandAlone, ..UP };
        let failed = Fields { disk: Failed, conn: Disconnecting, ..UP };
        assert_eq!(hard(&diskless, &failed), Err(Refusal::IsDiskless)); // H7
    }

    #[test]
    #[rustfmt::skip]
    fn valid_states() {
        let two = Cx { net: NetView { two_primaries: true, ..NET }, ..CX };
        let other = Cx { net: NetView { peer_is_primary_elsewhere: true, ..NET }, ..CX };
        let no_net = Cx { net: NetView { peer_is_primary_elsewhere: true, ..NetView::default() }, ..CX };
        let open = Cx { is_open: true, ..CX };
        let only = Cx { fencing: Fencing::ResourceOnly, ..CX };
        let stonith = Cx { fencing: Fencing::ResourceAndStonith, ..CX };
        let no_alg = Cx { net: NetView { has_verify_alg: false, ..NET }, ..CX };
        let old_peer = Cx { net: NetView { version: 87, ..NET }, ..CX };
        let both = Fields { peer: Primary, ..PRI };
        let verify = |conn| Fields { conn, ..UP };
        let rows = [
            ("V1", both, CX, -1), ("V1 allowed", both, two, 1), ("V1 no net", both, no_net, 1),
            ("V2", PRI, other, -20), ("V2 Secondary", UP, other, 1),
            ("V2 allowed", PRI, Cx { net: NetView { two_primaries: true, ..other.net }, ..CX }, 1),
            ("V3", UP, open, -12), ("V3 Primary", PRI, open, 1),
            ("V4", Fields { disk: Consistent, ..ALONE }, CX, -2), ("V4 good", ALONE, CX, 1),
            ("V5", ALONE, only, -7), ("V5 stonith", ALONE, stonith, -7),
            ("V5 fenced", Fields { pdsk: Outdated, ..ALONE }, stonith, 1),
            ("V5 connected", PRI, stonith, 1),
            ("V6", Fields { disk: Inconsistent, pdsk: Diskless, ..PRI }, CX, -2),
            ("V6 peer has it", Fields { disk: Diskless, ..PRI }, CX, 1),
            ("V7", Fields { conn: SyncSource, disk: Diskless, ..UP }, CX, -4),
            ("V8", Fields { conn: SyncSource, pdsk: Diskless, ..UP }, CX, -5),
            ("V9", Fields { conn: SyncSource, disk: Inconsistent, pdsk: Inconsistent, ..UP }, CX, -2),
            ("V7 to V9 need a resync", Fields { disk: Diskless, pdsk: Diskless, ..UP }, CX, 1),
            ("V7, V8 not from Inconsistent on", Fields { conn: SyncSource, pdsk: Inconsistent, ..UP }, CX, 1),
            ("V7, V8 not from Inconsistent on", Fields { conn: SyncTarget, disk: Inconsistent, ..UP }, CX, 1),
            ("V10", Fields { disk: Outdated, ..UP }, CX, -6),
            ("V10", Fields { conn: WFBitMapS, disk: Outdated, ..UP }, CX, -6),
            ("V10", Fields { conn: PausedSyncS, disk: Outdated, ..UP }, CX, -6),
            ("V10 target", Fields { conn: WFBitMapT, disk: Outdated, ..UP }, CX, 1),
            ("V11", verify(VerifyS), no_alg, -14), ("V11 fine", verify(VerifyT), CX, 1),
            ("V12", verify(VerifyT), old_peer, -17),
            ("V13", Fields { disk: Consistent, pdsk: Consistent, ..PRI }, CX, -2),
            ("V14", Fields { conn: StartingSyncS, pdsk: DUnknown, ..UP }, CX, -15),
            ("V15", Fields { pdsk: DUnknown, ..UP }, CX, -6),
            // The order: the first that fires.
            ("V1 before V6", Fields { disk: Diskless, pdsk: Diskless, ..both }, CX, -1),
            ("V4 before V5", Fields { disk: Outdated, ..ALONE }, only, -2),
        ];
        for (what, f, cx, code) in rows {
            assert_eq!(valid(&f, &cx).map_or_else(Refusal::number, |()| 1), code, "{what}");
        }
    }

    #[test]
    #[rustfmt::skip]
    fn soft_rules() {
        let at = |conn| Fields { conn, ..UP };
        let disk = |disk| Fields { disk, ..UP };
        let sent = Cx { state_sent: true, ..CX };
        let rows = [
            ("T1", at(SyncSource), at(StartingSyncT), CX, -8),
            ("T1 only if it is a change", at(StartingSyncT), at(StartingSyncT), CX, 1),
            ("T2", at(StandAlone), at(Disconnecting), CX, -9),
            ("T3", disk(Diskless), disk(UpToDate), CX, -11),
            ("T3 attach", disk(Diskless), disk(Attaching), CX, 1),
            ("T4", at(Disconnecting), at(WFConnection), CX, -13),
            ("T5", disk(Inconsistent), disk(Outdated), CX, -16),
            ("T5 over T3", disk(Diskless), disk(Outdated), CX, -16),
            ("T5 attach", disk(Attaching), disk(Outdated), CX, 1),
            ("T6", at(Unconnected), at(Disconnecting), CX, -18),
            ("T7", at(WFReportParams), Fields { role: Primary, ..at(WFReportParams) }, sent, -18),
            ("T7 handshake", at(WFConnection), at(WFReportParams), sent, 1),
            ("T7 handshake", at(WFReportParams), at(WFBitMapS), sent, 1),
            ("T7 end", at(WFReportParams), at(Disconnecting), sent, -18),
            ("T8", Fields { conn: WFSyncUUID, disk: Outdated, ..UP }, Fields { conn: WFSyncUUID, disk: Outdated, ..PRI }, CX, -18),
            ("T8 target", Fields { conn: SyncTarget, disk: Inconsistent, ..UP }, Fields { conn: SyncTarget, disk: Inconsistent, ..PRI }, CX, 1),
            ("T8 diskless", disk(Diskless), Fields { disk: Diskless, ..PRI }, CX, 1),
            ("T9", at(WFConnection), at(VerifyS), CX, -15),
            ("T10", at(SyncSource), at(VerifyS), CX, -8),
            ("T10 from Connected", UP, at(VerifyS), CX, 1),
            ("T10 stays", at(VerifyS), at(VerifyS), CX, 1),
            ("T11", at(WFConnection), at(StartingSyncS), CX, -15),
            ("T12", at(WFConnection), at(SyncTarget), CX, -15),
            ("T12 from the handshake on", at(WFReportParams), at(SyncTarget), CX, 1),
            ("T11 from Connected on", UP, at(StartingSyncS), CX, 1),
            ("T13", ALONE, Fields { conn: Disconnecting, pdsk: Outdated, ..ALONE }, CX, -21),
            ("T13 known before", Fields { pdsk: Outdated, ..ALONE }, Fields { conn: Disconnecting, pdsk: Outdated, ..ALONE }, CX, 1),
            ("the last counts", at(Unconnected), Fields { pdsk: Outdated, ..at(Disconnecting) }, CX, -21),
        ];
        for (what, old, new, cx, code) in rows {
            assert_eq!(soft(&old, &new, &cx).map_or_else(Refusal::number, |()| 1), code, "{what}");
        }
    }

    #[test]
    fn an_illegal_state_may_stay_illegal() {
        // A Primary that lost everything may go on to be one.
        let lost = Fields { disk: Inconsistent, ..ALONE };
        let later = Fields { conn: Unconnected, ..lost };
        assert_eq!(check(&Fields { conn: NetworkFailure, ..lost }, &later, &CX), Ok(()));
        assert_eq!(valid(&later, &CX), Err(Refusal::NoUpToDateDisk));
        assert_eq!(check(&PRI, &Fields { disk: Failed, pdsk: Diskless, ..PRI }, &CX), {
            Err(Refusal::NoUpToDateDisk)
        });
        // Illegal in another way is no excuse.
        let open = Cx { is_open: true, ..CX };
        let demoted = Fields { role: Secondary, ..lost };
        assert_eq!(check(&lost, &demoted, &open), Err(Refusal::DeviceInUse));
        // Nor is it when the peer is to be asked.
        assert_eq!(check_cluster_wide(&lost, &later, &CX), Err(Refusal::NoUpToDateDisk));
    }

    #[test]
    fn the_policy_of_a_missing_disk_does_not_count() {
        let stonith = Cx { fencing: Fencing::ResourceAndStonith, ..CX };
        let diskless = Fields { disk: Diskless, ..ALONE };
        let next = Fields { conn: Unconnected, ..diskless };
        // V4 is the excuse; V5 would be another one.
        let old = Fields { conn: NetworkFailure, ..diskless };
        assert_eq!(check(&old, &next, &stonith), Ok(()));
        let fine = Fields { conn: Connected, pdsk: UpToDate, peer: Secondary, ..ALONE };
        assert_eq!(check(&fine, &ALONE, &stonith), Err(Refusal::PrimaryNop));
    }
}
