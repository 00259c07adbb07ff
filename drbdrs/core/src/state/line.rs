//! Log lines of state changes, without their prefix.
//!
//! Lines of changes end with a space, as the reference's do. Severities: changes are information,
//! refusals are errors, the warnings of [`crate::state::sanitize`] warnings.
//! Spec: states-and-generations.md §1.5.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::{Display, Write};

use drbd_types::{Cstate, Dstate, Fields, Refusal, Role, StateWord, refusal};

/// The five main items of a state.
type Main = (Role, Role, Cstate, Dstate, Dstate);

const fn main_items(f: &Fields) -> Main {
    (f.role, f.peer, f.conn, f.disk, f.pdsk)
}

/// One item, if it changed.
fn item<T: PartialEq + Display>(line: &mut String, name: &str, old: T, new: T) {
    if old != new {
        // Writing to a string can not fail.
        let _ = write!(line, "{name}( {old} -> {new} ) ");
    }
}

fn flag(line: &mut String, name: &str, old: bool, new: bool) {
    item(line, name, u8::from(old), u8::from(new));
}

/// Main items for which `printed` says yes.
fn main_line(line: &mut String, old: Main, new: Main, printed: [bool; 5]) {
    let [role, peer, conn, disk, pdsk] = printed;
    if role {
        item(line, "role", old.0, new.0);
    }
    if peer {
        item(line, "peer", old.1, new.1);
    }
    if conn {
        item(line, "conn", old.2, new.2);
    }
    if disk {
        item(line, "disk", old.3, new.3);
    }
    if pdsk {
        item(line, "pdsk", old.4, new.4);
    }
}

fn volume_line(old: &Fields, new: &Fields, printed: [bool; 5]) -> Option<String> {
    let mut line = String::new();
    main_line(&mut line, main_items(old), main_items(new), printed);
    flag(&mut line, "aftr_isp", old.aftr_isp, new.aftr_isp);
    flag(&mut line, "peer_isp", old.peer_isp, new.peer_isp);
    flag(&mut line, "user_isp", old.user_isp, new.user_isp);
    (!line.is_empty()).then_some(line)
}

/// The volume's line of a change that was requested for this volume. `None` if nothing of it is
/// to be printed.
pub fn change(old: &Fields, new: &Fields) -> Option<String> {
    volume_line(old, new, [true; 5])
}

/// The connection's line that follows [`change`] if the suspension of I/O changed.
pub fn suspension(old: &Fields, new: &Fields) -> Option<String> {
    let mut line = String::new();
    flag(&mut line, "susp", old.is_suspended(), new.is_suspended());
    (!line.is_empty()).then_some(line)
}

/// The lines of a change that was requested for the connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionLines {
    /// One per volume, in the order of the volumes; `None`: nothing to be printed.
    pub volumes: Vec<Option<String>>,
    /// The connection's, behind those.
    pub connection: Option<String>,
}

/// Lines of a change of the connection. `level` is its connection-level state before and after;
/// it is what the line shows if there are no volumes. `volumes` are the states of all volumes
/// before and after.
pub fn connection_change(level: (Cstate, Cstate), volumes: &[(Fields, Fields)]) -> ConnectionLines {
    let mut line = String::new();
    let Some((first, _)) = volumes.first() else {
        item(&mut line, "conn", level.0, level.1);
        return ConnectionLines {
            volumes: Vec::new(),
            connection: (!line.is_empty()).then_some(line),
        };
    };
    let same =
        |is_same: fn(&Fields, &Fields) -> bool| volumes.iter().all(|(old, _)| is_same(old, first));
    let common = [
        same(|a, b| a.role == b.role),
        same(|a, b| a.peer == b.peer),
        same(|a, b| a.conn == b.conn),
        same(|a, b| a.disk == b.disk),
        same(|a, b| a.pdsk == b.pdsk),
    ];
    let new = volumes.iter().map(|(_, new)| main_items(new)).reduce(highest);
    let new = new.unwrap_or_else(|| main_items(first));
    main_line(&mut line, main_items(first), new, common);
    let suspended = |pick: fn(&(Fields, Fields)) -> &Fields| {
        volumes.iter().any(|change| pick(change).is_suspended())
    };
    flag(&mut line, "susp", suspended(|c| &c.0), suspended(|c| &c.1));
    let own = common.map(|is_common| !is_common);
    ConnectionLines {
        volumes: volumes.iter().map(|(old, new)| volume_line(old, new, own)).collect(),
        connection: (!line.is_empty()).then_some(line),
    }
}

/// Item by item the higher of two.
fn highest(a: Main, b: Main) -> Main {
    (highest_role(a.0, b.0), highest_role(a.1, b.1), a.2.max(b.2), a.3.max(b.3), a.4.max(b.4))
}

/// Primary before Secondary before Unknown. Spec: §1.2.
pub const fn highest_role(a: Role, b: Role) -> Role {
    match (a, b) {
        (Role::Primary, _) | (_, Role::Primary) => Role::Primary,
        (Role::Secondary, _) | (_, Role::Secondary) => Role::Secondary,
        (Role::Unknown, Role::Unknown) => Role::Unknown,
    }
}

/// The six characters behind the states.
fn six(f: &Fields) -> String {
    let of = |is_set, c| if is_set { c } else { '-' };
    [
        if f.is_suspended() { 's' } else { 'r' },
        of(f.aftr_isp, 'a'),
        of(f.peer_isp, 'p'),
        of(f.user_isp, 'u'),
        of(f.susp_fen, 'F'),
        of(f.susp_nod, 'N'),
    ]
    .into_iter()
    .collect()
}

fn state(name: &str, f: &Fields) -> String {
    let Fields { conn, role, peer, disk, pdsk, .. } = f;
    let six = six(f);
    format!("{name:>7} = {{ cs:{conn} ro:{role}/{peer} ds:{disk}/{pdsk} {six} }}")
}

fn failed(why: Refusal) -> String {
    format!("State change failed: {why}")
}

/// The lines of a refused request for a volume. `wanted` is the sanitised new state. `None` for
/// the refusal that is never logged, -18.
pub fn refused(why: Refusal, old: &Fields, wanted: &Fields) -> Option<[String; 3]> {
    (why != Refusal::InTransientState)
        .then(|| [failed(why), state("state", old), state("wanted", wanted)])
}

/// The lines of a refused request for the connection. `None` for -18. `level` is the
/// connection-level state.
pub fn refused_connection(
    why: Refusal,
    level: Cstate,
    mask: StateWord,
    val: StateWord,
) -> Option<[String; 3]> {
    (why != Refusal::InTransientState).then(|| {
        let wanted = val.0 >> 4 & 31;
        let wanted = u8::try_from(wanted).ok().and_then(Cstate::from_number);
        let wanted = wanted.map_or("TOO_LARGE", Cstate::name);
        [
            failed(why),
            format!(" mask = 0x{:x} val = 0x{:x}", mask.0, val.0),
            format!(" old_conn:{level} wanted_conn:{wanted}"),
        ]
    })
}

/// The line about a request that the peer refused with this code.
pub fn refused_by_peer(code: i32) -> String {
    format!("Requested state change failed by peer: {} ({code})", refusal::text_of(code))
}

#[cfg(test)]
mod tests {
    use super::*;
    use Cstate::{
        Connected, NetworkFailure, PausedSyncT, StandAlone, SyncTarget, TearDown, Unconnected,
        WFConnection, WFReportParams,
    };
    use Dstate::{DUnknown, Diskless, Failed, Inconsistent, Outdated, UpToDate};
    use Role::{Primary, Secondary, Unknown};

    fn fields(role: Role, peer: Role, conn: Cstate, disk: Dstate, pdsk: Dstate) -> Fields {
        Fields { role, peer, conn, disk, pdsk, ..Fields::NEW }
    }

    /// Lines of the reference's log.
    #[test]
    fn a_volume_prints_what_changed() {
        let up = fields(Primary, Secondary, Connected, UpToDate, UpToDate);
        let lost = fields(Primary, Unknown, NetworkFailure, UpToDate, DUnknown);
        assert_eq!(
            change(&up, &lost).as_deref(),
            Some(
                "peer( Secondary -> Unknown ) conn( Connected -> NetworkFailure ) pdsk( UpToDate -> DUnknown ) "
            )
        );
        let paused = Fields { aftr_isp: true, ..up };
        assert_eq!(change(&up, &paused).as_deref(), Some("aftr_isp( 0 -> 1 ) "));
        let target = fields(Secondary, Primary, SyncTarget, Inconsistent, UpToDate);
        let waits = Fields { conn: PausedSyncT, user_isp: true, peer_isp: true, ..target };
        assert_eq!(
            change(&target, &waits).as_deref(),
            Some("conn( SyncTarget -> PausedSyncT ) peer_isp( 0 -> 1 ) user_isp( 0 -> 1 ) ")
        );
        assert_eq!(change(&up, &up), None);
        let frozen = Fields { susp_nod: true, ..up };
        assert_eq!(change(&up, &frozen), None);
        assert_eq!(suspension(&up, &frozen).as_deref(), Some("susp( 0 -> 1 ) "));
        assert_eq!(suspension(&frozen, &Fields { susp: true, ..frozen }), None, "still so");
    }

    #[test]
    fn with_one_volume_everything_is_common() {
        let up = fields(Primary, Secondary, Connected, UpToDate, UpToDate);
        let lost = Fields {
            susp_fen: true,
            ..fields(Primary, Unknown, NetworkFailure, UpToDate, DUnknown)
        };
        let lines = connection_change((WFReportParams, NetworkFailure), &[(up, lost)]);
        assert_eq!(lines.volumes, [None]);
        assert_eq!(
            lines.connection.as_deref(),
            Some(
                "peer( Secondary -> Unknown ) conn( Connected -> NetworkFailure ) pdsk( UpToDate -> DUnknown ) susp( 0 -> 1 ) "
            )
        );
    }

    #[test]
    fn what_differs_is_printed_by_each_volume() {
        let first = fields(Primary, Secondary, Connected, UpToDate, UpToDate);
        let second = fields(Secondary, Secondary, SyncTarget, Inconsistent, UpToDate);
        let lost = |f: Fields| Fields { peer: Unknown, conn: TearDown, pdsk: DUnknown, ..f };
        let lines = connection_change(
            (WFReportParams, TearDown),
            &[(first, lost(first)), (second, lost(second))],
        );
        assert_eq!(
            lines.volumes,
            [
                Some("conn( Connected -> TearDown ) ".into()),
                Some("conn( SyncTarget -> TearDown ) ".into()),
            ]
        );
        assert_eq!(
            lines.connection.as_deref(),
            Some("peer( Secondary -> Unknown ) pdsk( UpToDate -> DUnknown ) ")
        );
    }

    #[test]
    fn the_connection_shows_the_highest() {
        let old = fields(Primary, Unknown, WFConnection, UpToDate, DUnknown);
        let outdated = Fields { pdsk: Outdated, ..old };
        let worse = Fields { pdsk: Inconsistent, ..old };
        let lines =
            connection_change((WFConnection, WFConnection), &[(old, worse), (old, outdated)]);
        assert_eq!(lines.volumes, [None, None]);
        assert_eq!(lines.connection.as_deref(), Some("pdsk( DUnknown -> Outdated ) "));
        let up = fields(Secondary, Secondary, Connected, UpToDate, UpToDate);
        let low = fields(Secondary, Unknown, TearDown, Outdated, DUnknown);
        let high = fields(Primary, Primary, WFReportParams, UpToDate, UpToDate);
        let lines = connection_change((WFReportParams, TearDown), &[(up, high), (up, low)]);
        let swapped = connection_change((WFReportParams, TearDown), &[(up, low), (up, high)]);
        assert_eq!(
            lines.connection.as_deref(),
            Some(
                "role( Secondary -> Primary ) peer( Secondary -> Primary ) conn( Connected -> WFReportParams ) "
            )
        );
        assert_eq!(swapped.connection, lines.connection);
        assert_eq!(highest_role(Secondary, Primary), Primary);
        assert_eq!(highest_role(Unknown, Secondary), Secondary);
    }

    #[test]
    fn a_connection_without_volumes() {
        let lines = connection_change((StandAlone, Unconnected), &[]);
        assert_eq!(lines.connection.as_deref(), Some("conn( StandAlone -> Unconnected ) "));
        assert_eq!(connection_change((StandAlone, StandAlone), &[]).connection, None);
    }

    /// From the reference's log.
    #[test]
    fn refusals_as_recorded() {
        let old = fields(Primary, Secondary, Connected, Diskless, UpToDate);
        let wanted =
            Fields { susp_nod: true, ..fields(Primary, Unknown, TearDown, Diskless, DUnknown) };
        assert_eq!(
            refused(Refusal::NoUpToDateDisk, &old, &wanted).unwrap(),
            [
                "State change failed: Need access to UpToDate data",
                "  state = { cs:Connected ro:Primary/Secondary ds:Diskless/UpToDate r----- }",
                " wanted = { cs:TearDown ro:Primary/Unknown ds:Diskless/DUnknown s----N }",
            ]
        );
        let fenced = Fields { susp_fen: true, ..wanted };
        let all = Fields { aftr_isp: true, peer_isp: true, user_isp: true, ..fenced };
        assert_eq!((six(&fenced).as_str(), six(&all).as_str()), ("s---FN", "sapuFN"));
        let (mask, val) = (StateWord(0x1_E1F0), StateWord(0xA070));
        let lines = refused_connection(Refusal::NoUpToDateDisk, WFReportParams, mask, val);
        assert_eq!(
            lines.unwrap(),
            [
                "State change failed: Need access to UpToDate data",
                " mask = 0x1e1f0 val = 0xa070",
                " old_conn:WFReportParams wanted_conn:TearDown",
            ]
        );
        let lines =
            refused_connection(Refusal::NeedConnection, StandAlone, mask, StateWord(31 << 4));
        assert_eq!(lines.unwrap()[2], " old_conn:StandAlone wanted_conn:TOO_LARGE");
    }

    #[test]
    fn transient_refusals_are_not_logged() {
        let f = fields(Primary, Secondary, Connected, Failed, UpToDate);
        assert_eq!(refused(Refusal::InTransientState, &f, &f), None);
        let word = StateWord(0);
        assert_eq!(refused_connection(Refusal::InTransientState, Connected, word, word), None);
    }

    #[test]
    fn refusals_of_the_peer() {
        assert_eq!(
            refused_by_peer(-2),
            "Requested state change failed by peer: Need access to UpToDate data (-2)"
        );
        assert_eq!(refused_by_peer(-40), "Requested state change failed by peer: TOO_SMALL (-40)");
    }
}
