//! Changes that the reference logged, against our rules: it accepted them, they are what
//! sanitising leads to, and our lines read the same.

use alloc::string::{String, ToString};
use alloc::vec::Vec;

use drbd_types::{Cstate, Dstate, Fields, Refusal, Role};

use super::check::{Cx, NetView, check, hard, hard_conn};
use super::line::{change, connection_change, suspension};
use super::sanitize::{Surroundings, sanitize};
use crate::config::{Fencing, OnNoData};

const RECORDED: &str = include_str!("recorded.txt");

/// One recorded change.
struct Row {
    by_connection: bool,
    old: Fields,
    new: Fields,
    text: String,
    items: Vec<String>,
}

fn named<T: Copy + ToString>(all: &[T], name: &str) -> T {
    *all.iter().find(|t| t.to_string() == name).unwrap_or_else(|| panic!("no state {name:?}"))
}

/// Changes one item of a line.
fn set(f: &mut Fields, item: &str, value: &str) {
    match item {
        "role" => f.role = named(Role::ALL, value),
        "peer" => f.peer = named(Role::ALL, value),
        "conn" => f.conn = named(Cstate::ALL, value),
        "disk" => f.disk = named(Dstate::ALL, value),
        "pdsk" => f.pdsk = named(Dstate::ALL, value),
        "aftr_isp" => f.aftr_isp = value == "1",
        "peer_isp" => f.peer_isp = value == "1",
        "user_isp" => f.user_isp = value == "1",
        "susp" => f.susp = value == "1",
        other => panic!("no item {other:?}"),
    }
}

fn rows() -> Vec<Row> {
    RECORDED.lines().filter(|line| !line.starts_with('#')).map(row).collect()
}

fn row(line: &str) -> Row {
    let (state, text) = line.split_once(" | ").unwrap();
    let words: Vec<&str> = state.split(' ').collect();
    let mut old = Fields::NEW;
    for (item, word) in ["role", "peer", "conn", "disk", "pdsk"].into_iter().zip(&words[1..6]) {
        set(&mut old, item, word);
    }
    let flags = ["aftr_isp", "peer_isp", "user_isp", "susp"];
    for (item, bit) in flags.into_iter().zip(words[6].split("").filter(|bit| !bit.is_empty())) {
        set(&mut old, item, bit);
    }
    let mut new = old;
    let mut items = Vec::new();
    for part in text.split_terminator(" )") {
        let (item, states) = part.trim_start().split_once("( ").unwrap();
        let (_, to) = states.split_once(" -> ").unwrap();
        set(&mut new, item, to);
        items.push(item.to_string());
    }
    Row { by_connection: words[0] == "c", old, new, text: alloc::format!("{text} "), items }
}

#[test]
fn our_lines_read_the_same() {
    for row in rows() {
        let line = if row.by_connection {
            let lines = connection_change((row.old.conn, row.new.conn), &[(row.old, row.new)]);
            assert_eq!(lines.volumes, [None], "{}", row.text);
            lines.connection
        } else {
            assert_eq!(suspension(&row.old, &row.new), None, "{}", row.text);
            change(&row.old, &row.new)
        };
        assert_eq!(line.as_deref(), Some(row.text.as_str()), "{:?}", row.old);
    }
}

#[test]
fn recorded_states_are_sanitised_ones() {
    for row in rows() {
        assert_eq!(hard(&row.old, &row.new), Ok(()), "{:?} {}", row.old, row.text);
        let (ns, _) = sanitize(&row.old, row.new, &Surroundings::default());
        assert_eq!(ns, row.new, "{:?} {}", row.old, row.text);
    }
}

/// Requests of one connection state (or pause bit) whose other items followed from the rules.
#[test]
fn what_follows_is_what_the_reference_did() {
    let rows = rows();
    let mut followed = Vec::new();
    for row in rows.iter().filter(|row| row.items.len() > 1) {
        for asked in &row.items {
            let mut request = row.old;
            match asked.as_str() {
                "conn" => request.conn = row.new.conn,
                "user_isp" => request.user_isp = row.new.user_isp,
                "peer_isp" => request.peer_isp = row.new.peer_isp,
                _ => continue,
            }
            let (ns, _) = sanitize(&row.old, request, &Surroundings::default());
            if ns == row.new {
                followed.push(row.text.as_str());
            }
        }
    }
    let has = |text: &str| followed.iter().any(|f| f.trim_end() == text);
    for text in [
        "peer( Secondary -> Unknown ) conn( Connected -> NetworkFailure ) pdsk( UpToDate -> DUnknown )",
        "peer( Secondary -> Unknown ) conn( SyncTarget -> NetworkFailure ) pdsk( UpToDate -> DUnknown )",
        "peer( Secondary -> Unknown ) conn( Connected -> Disconnecting ) pdsk( UpToDate -> DUnknown )",
        "conn( Connected -> StartingSyncT ) disk( UpToDate -> Outdated )",
        "conn( Connected -> StartingSyncS ) pdsk( UpToDate -> Consistent )",
        "conn( WFSyncUUID -> SyncTarget ) disk( Outdated -> Inconsistent )",
        "conn( WFBitMapS -> SyncSource ) pdsk( Consistent -> Inconsistent )",
        "conn( Connected -> WFBitMapT ) disk( Negotiating -> Inconsistent )",
        "conn( Connected -> Behind ) disk( UpToDate -> Outdated )",
        "conn( SyncSource -> PausedSyncS ) user_isp( 0 -> 1 )",
        "conn( PausedSyncT -> SyncTarget ) peer_isp( 1 -> 0 )",
    ] {
        assert!(has(text), "{text}\n{followed:#?}");
    }
}

/// The recorded loss of a peer with the policy resource-and-stonith, and the refused promotion
/// of an outdated node that would have frozen.
#[test]
fn recorded_freezes() {
    let s = Surroundings { fencing: Fencing::ResourceAndStonith, ..Surroundings::default() };
    let old = Fields {
        role: Role::Primary,
        peer: Role::Secondary,
        conn: Cstate::Connected,
        disk: Dstate::UpToDate,
        pdsk: Dstate::UpToDate,
        ..Fields::NEW
    };
    let (ns, _) = sanitize(&old, Fields { conn: Cstate::NetworkFailure, ..old }, &s);
    let lines = connection_change((old.conn, ns.conn), &[(old, ns)]);
    assert_eq!(
        lines.connection.as_deref(),
        Some(
            "peer( Secondary -> Unknown ) conn( Connected -> NetworkFailure ) \
             pdsk( UpToDate -> DUnknown ) susp( 0 -> 1 ) "
        )
    );
    let outdated = Fields { conn: Cstate::WFConnection, disk: Dstate::Outdated, ..Fields::NEW };
    let (wanted, _) = sanitize(&outdated, Fields { role: Role::Primary, ..outdated }, &s);
    let lines = super::line::refused(Refusal::NoUpToDateDisk, &outdated, &wanted);
    assert_eq!(
        lines.unwrap()[2],
        " wanted = { cs:WFConnection ro:Primary/Unknown ds:Outdated/DUnknown s---F- }"
    );
}

/// The refusals in the same logs.
#[test]
fn recorded_refusals() {
    let net = NetView { present: true, version: 101, ..NetView::default() };
    let up = Fields {
        role: Role::Primary,
        peer: Role::Secondary,
        conn: Cstate::Connected,
        disk: Dstate::UpToDate,
        pdsk: Dstate::UpToDate,
        ..Fields::NEW
    };
    let diskless = Fields { disk: Dstate::Diskless, ..up };
    let both_diskless = Fields { role: Role::Secondary, pdsk: Dstate::Diskless, ..diskless };
    let outdated = Fields { disk: Dstate::Outdated, ..Fields::NEW };
    let leave = |pdsk| Fields { conn: Cstate::TearDown, pdsk, ..diskless };
    let rows = [
        // The device is mounted.
        (up, Fields { role: Role::Secondary, ..up }, true, Refusal::DeviceInUse),
        (both_diskless, Fields { role: Role::Primary, ..both_diskless }, false, {
            Refusal::NoUpToDateDisk
        }),
        (outdated, Fields { role: Role::Primary, ..outdated }, false, Refusal::NoUpToDateDisk),
        // The peer, whose data a diskless Primary needs, wants to leave; then also outdated.
        (diskless, leave(Dstate::UpToDate), false, Refusal::NoUpToDateDisk),
        (diskless, leave(Dstate::Outdated), false, Refusal::NoUpToDateDisk),
    ];
    let s = Surroundings { on_no_data: OnNoData::SuspendIo, ..Surroundings::default() };
    for (old, new, is_open, refusal) in rows {
        let cx = Cx { net, is_open, ..Cx::default() };
        let (wanted, _) = sanitize(&old, new, &s);
        assert_eq!(check(&old, &wanted, &cx), Err(refusal), "{wanted:?}");
    }
    // Connecting while the administrator has just disconnected.
    assert_eq!(hard_conn(Cstate::StandAlone, Cstate::WFConnection), Err(Refusal::NeedConnection));
}
