//! Every state and every change of it, against what the rules promise as a whole.

use alloc::vec::Vec;

use drbd_types::{Cstate, Dstate, Fields, Refusal, Role};

use super::check::{Cx, NetView, check, check_cluster_wide, soft, valid};
use super::cluster::cluster_wide;
use super::facts::{has_disk, lacks_data, must_replicate, report_out_of_sync};
use super::line;
use super::sanitize::{Surroundings, Warning, bounds, sanitize};
use crate::config::{Fencing, OnNoData};

/// Every own role, peer's role, connection, disk and peer's disk.
fn all_states() -> impl Iterator<Item = Fields> {
    [Role::Primary, Role::Secondary].into_iter().flat_map(|role| {
        Role::ALL.iter().flat_map(move |&peer| {
            Cstate::ALL.iter().flat_map(move |&conn| {
                Dstate::ALL.iter().flat_map(move |&disk| {
                    Dstate::ALL.iter().map(move |&pdsk| Fields {
                        role,
                        peer,
                        conn,
                        disk,
                        pdsk,
                        ..Fields::NEW
                    })
                })
            })
        })
    })
}

/// Every state that can be stored: what sanitising makes of all states.
fn stored_states() -> Vec<Fields> {
    let mut all: Vec<Fields> =
        all_states().map(|f| sanitize(&f, f, &Surroundings::default()).0).collect();
    all.sort_unstable_by_key(|f| f.pack().0);
    all.dedup();
    all
}

/// Changes of one field, of the pause bits, and those of several fields that commands ask for.
fn requests(f: Fields) -> Vec<Fields> {
    let mut out = Vec::new();
    out.extend([Role::Primary, Role::Secondary].map(|role| Fields { role, ..f }));
    out.extend(Role::ALL.iter().map(|&peer| Fields { peer, ..f }));
    out.extend(Cstate::ALL.iter().map(|&conn| Fields { conn, ..f }));
    out.extend(Dstate::ALL.iter().map(|&disk| Fields { disk, ..f }));
    out.extend(Dstate::ALL.iter().map(|&pdsk| Fields { pdsk, ..f }));
    out.push(Fields { user_isp: !f.user_isp, ..f });
    out.push(Fields { aftr_isp: !f.aftr_isp, ..f });
    out.push(Fields { peer_isp: !f.peer_isp, ..f });
    out.push(Fields { role: Role::Primary, disk: Dstate::UpToDate, ..f });
    out.push(Fields { role: Role::Primary, pdsk: Dstate::Outdated, ..f });
    out.push(Fields { conn: Cstate::Disconnecting, pdsk: Dstate::Outdated, ..f });
    out.push(Fields { conn: Cstate::Disconnecting, disk: Dstate::Outdated, ..f });
    // A handshake ends: everything of the peer becomes known at once.
    for conn in [Cstate::Connected, Cstate::WFBitMapS, Cstate::WFBitMapT] {
        for pdsk in [Dstate::Diskless, Dstate::Inconsistent, Dstate::Outdated, Dstate::UpToDate] {
            out.push(Fields { conn, pdsk, peer: Role::Primary, ..f });
            out.push(Fields { conn, pdsk, peer: Role::Secondary, peer_isp: true, ..f });
        }
    }
    out
}

fn all_surroundings() -> Vec<Surroundings> {
    let plain = Surroundings::default();
    let mut out = Vec::new();
    for fencing in [Fencing::DontCare, Fencing::ResourceOnly, Fencing::ResourceAndStonith] {
        out.push(Surroundings { fencing, on_no_data: OnNoData::SuspendIo, ..plain });
    }
    let good = (Dstate::UpToDate, Dstate::DUnknown);
    let old = (Dstate::Outdated, Dstate::Outdated);
    for candidate in [None, Some(good), Some(old)] {
        out.push(Surroundings { candidate, exposed_is_current: true, ..plain });
    }
    out
}

fn cx(two_primaries: bool, fencing: Fencing) -> Cx {
    let net = NetView {
        present: true,
        two_primaries,
        has_verify_alg: true,
        version: 101,
        peer_is_primary_elsewhere: false,
    };
    Cx { net, fencing, ..Cx::default() }
}

fn in_bounds(f: &Fields, conn: Cstate) -> bool {
    let (disk, pdsk) = bounds(conn);
    (disk.0..=disk.1).contains(&f.disk) && (pdsk.0..=pdsk.1).contains(&f.pdsk)
}

/// The state that a running resync had before S10 let it go on.
const fn before_s10(conn: Cstate) -> Option<Cstate> {
    if matches!(conn, Cstate::SyncSource) {
        Some(Cstate::PausedSyncS)
    } else if matches!(conn, Cstate::SyncTarget) {
        Some(Cstate::PausedSyncT)
    } else {
        None
    }
}

/// The result lies in the table of S6. S10 comes after the table: a resync that goes on may
/// still have the disk states of the paused one, until the next change.
#[test]
fn results_are_in_bounds_and_settle() {
    let mut late = 0;
    for s in all_surroundings() {
        for old in stored_states() {
            for new in requests(old) {
                let (ns, _) = sanitize(&old, new, &s);
                let went_on = before_s10(ns.conn).filter(|conn| *conn == new.conn);
                if !in_bounds(&ns, ns.conn) {
                    assert!(went_on.is_some_and(|c| in_bounds(&ns, c)), "{old:?}\n{new:?}\n{ns:?}");
                    late += 1;
                }
                let (again, _) = sanitize(&old, ns, &s);
                // S2 comes before S4, which may make the disk Diskless.
                let s2 = Fields { aftr_isp: again.aftr_isp, ..ns } == again && !again.aftr_isp;
                let s10 = went_on.is_some() && again.conn == ns.conn;
                assert!(again == ns || s2 || s10, "{old:?}\n{new:?}\n{ns:?}\n{again:?}");
                let (third, _) = sanitize(&old, again, &s);
                assert_eq!(third, again, "{old:?}\n{new:?}");
            }
        }
    }
    assert!(late > 0, "the exception is real");
}

/// Without connection nothing but the end of a negotiation touches the own disk; with one it gets
/// better only by agreement (S5) or with a warning (S6).
#[test]
fn sanitising_does_not_invent_good_data() {
    for s in all_surroundings() {
        for old in stored_states() {
            for new in requests(old) {
                let (ns, warning) = sanitize(&old, new, &s);
                let negotiated = new.disk == Dstate::Negotiating && old.disk >= Dstate::Negotiating;
                if ns.conn < Cstate::Connected {
                    assert!(ns.disk == new.disk || negotiated, "{old:?}\n{new:?}\n{ns:?}");
                    assert!(ns.pdsk != Dstate::UpToDate && ns.peer == Role::Unknown);
                }
                let agreed = matches!(new.disk, Dstate::Outdated | Dstate::Consistent);
                if ns.disk > new.disk && !(agreed || negotiated) {
                    let warned =
                        matches!(warning, Some(Warning::UpgradedDisk | Warning::UpgradedPdsk));
                    assert!(warned, "{old:?}\n{new:?}\n{ns:?}");
                }
            }
        }
    }
}

#[test]
fn writes_have_one_way_and_a_source_and_its_target_agree() {
    for ns in stored_states() {
        assert!(!(must_replicate(&ns) && report_out_of_sync(&ns)), "{ns:?}");
        let Some(conn) = mirrored(ns.conn) else { continue };
        if ns.disk == Dstate::DUnknown || ns.pdsk == Dstate::DUnknown {
            continue; // Nobody is both connected and unknown (V15).
        }
        if !in_bounds(&ns, ns.conn) {
            continue; // Just after S10.
        }
        let seen = Fields {
            role: if ns.peer == Role::Unknown { Role::Secondary } else { ns.peer },
            peer: ns.role,
            conn,
            disk: ns.pdsk,
            pdsk: ns.disk,
            ..ns
        };
        let (other, _) = sanitize(&seen, seen, &Surroundings::default());
        assert_eq!(other.conn, conn, "{ns:?}\n{other:?}");
        assert_eq!((other.peer, other.role), (seen.peer, seen.role));
        // A source calls its target Consistent as long as nothing is overwritten there; the target
        // itself says Outdated. Everything else is the same on both sides.
        let same =
            |a: Dstate, b: Dstate| a == b || (a == Dstate::Consistent && b == Dstate::Outdated);
        let (source, target) = if is_target(ns.conn) { (&other, &ns) } else { (&ns, &other) };
        assert!(same(source.pdsk, target.disk), "{ns:?}\n{other:?}");
        assert_eq!(source.disk, target.pdsk, "{ns:?}\n{other:?}");
        // If one of the two mirrors its writes, so does the other, or it only reports them.
        let ways = [must_replicate(&ns), must_replicate(&other)];
        assert!(ways[0] == ways[1] || ns.conn != Cstate::Connected || ns.disk != ns.pdsk);
    }
}

const fn is_target(conn: Cstate) -> bool {
    use Cstate::{Behind, PausedSyncT, StartingSyncT, SyncTarget, WFBitMapT, WFSyncUUID};
    matches!(conn, StartingSyncT | WFBitMapT | WFSyncUUID | SyncTarget | PausedSyncT | Behind)
}

/// What the other node is in, if anything of it follows.
fn mirrored(conn: Cstate) -> Option<Cstate> {
    use Cstate::{
        Ahead, Behind, Connected, PausedSyncS, PausedSyncT, StartingSyncS, StartingSyncT,
        SyncSource, SyncTarget, VerifyS, VerifyT, WFBitMapS, WFBitMapT,
    };
    let pairs = [
        (Connected, Connected),
        (StartingSyncS, StartingSyncT),
        (WFBitMapS, WFBitMapT),
        (SyncSource, SyncTarget),
        (VerifyS, VerifyT),
        (PausedSyncS, PausedSyncT),
        (Ahead, Behind),
    ];
    pairs.into_iter().find_map(|(a, b)| match () {
        () if conn == a => Some(b),
        () if conn == b => Some(a),
        () => None,
    })
}

/// What users rely on: from a legal state no request takes the data from a Primary, makes two
/// Primaries, or goes around a fence.
#[test]
fn requests_do_no_harm() {
    let (mut accepted, mut refused) = (0, 0);
    for old in stored_states() {
        for new in requests(old) {
            for fencing in [Fencing::DontCare, Fencing::ResourceAndStonith] {
                let s = Surroundings { fencing, ..Surroundings::default() };
                let (ns, _) = sanitize(&old, new, &s);
                let cx = cx(false, fencing);
                if valid(&old, &cx).is_err() {
                    continue;
                }
                if let Err(why) = check(&old, &ns, &cx) {
                    refused += 1;
                    let lines = line::refused(why, &old, &ns);
                    assert_eq!(lines.is_none(), why == Refusal::InTransientState);
                    continue;
                }
                accepted += 1;
                let both = |f: &Fields| f.role == Role::Primary && f.peer == Role::Primary;
                assert!(!both(&ns) || both(&old), "{old:?}\n{ns:?}");
                assert!(!lacks_data(&ns) || lacks_data(&old), "{old:?}\n{ns:?}");
                let promoted = old.role != ns.role && ns.role == Role::Primary;
                if promoted
                    && fencing != Fencing::DontCare
                    && has_disk(&old)
                    && ns.conn < Cstate::Connected
                {
                    assert!(ns.pdsk <= Dstate::Outdated, "{old:?}\n{ns:?}");
                }
                if promoted {
                    let good = ns.disk == Dstate::UpToDate || ns.pdsk == Dstate::UpToDate;
                    assert!(good, "{old:?}\n{ns:?}");
                }
                assert_eq!(line::change(&old, &ns).is_none(), {
                    Fields { susp_fen: old.susp_fen, susp_nod: old.susp_nod, ..ns } == old
                });
            }
        }
    }
    assert!(accepted > 10_000 && refused > 10_000, "{accepted} {refused}");
}

/// Asking the peer is never easier than not asking it.
#[test]
fn cluster_wide_checks_are_the_stricter_ones() {
    for old in stored_states() {
        for new in requests(old) {
            let (ns, _) = sanitize(&old, new, &Surroundings::default());
            let cx = cx(true, Fencing::ResourceOnly);
            if check_cluster_wide(&old, &ns, &cx).is_ok() {
                assert_eq!(check(&old, &ns, &cx), Ok(()));
            }
            if cluster_wide(&old, &ns) {
                assert!(old.conn >= Cstate::Connected && old != ns, "{old:?}\n{ns:?}");
            }
            // Rules look at states only: asking twice gives the same.
            assert_eq!(
                (valid(&ns, &cx), soft(&old, &ns, &cx)),
                (valid(&ns, &cx), soft(&old, &ns, &cx))
            );
        }
    }
}
