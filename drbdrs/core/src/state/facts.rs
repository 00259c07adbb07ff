//! Questions about a state that are asked all over the engine.
//! Spec: states-and-generations.md §0, §2.8, §2.9, §2.11, §3.6.

use drbd_types::{Cstate, Dstate, Fields, Role};
use drbdmeta::superblock::Flags;

use crate::config::Fencing;

/// "Have a disk": data and meta-data may be used. Spec: §0.
pub fn has_disk(f: &Fields) -> bool {
    f.disk >= Dstate::Inconsistent
}

/// The fencing policy that the rules use: the one of the disk's configuration if the volume has
/// a disk, else none. `disk` is the state before the change. Spec: §2.2.
pub fn fencing_in_force(disk: Dstate, configured: Fencing) -> Fencing {
    if disk >= Dstate::Inconsistent { configured } else { Fencing::DontCare }
}

/// A Primary without access to good data (rule S8, A3).
pub fn lacks_data(f: &Fields) -> bool {
    f.role == Role::Primary && f.disk < Dstate::UpToDate && f.pdsk < Dstate::UpToDate
}

/// A Primary without connection whose peer may still take itself for current (rule S7).
pub fn peer_needs_fencing(f: &Fields) -> bool {
    f.role == Role::Primary && f.conn < Cstate::Connected && f.pdsk > Dstate::Outdated
}

/// StandAlone, Diskless and Secondary: nothing is configured.
pub fn is_unconfigured(f: &Fields) -> bool {
    f.conn == Cstate::StandAlone && f.disk == Dstate::Diskless && f.role == Role::Secondary
}

/// Writes go to the peer too. Spec: §2.8.
pub fn must_replicate(f: &Fields) -> bool {
    f.pdsk == Dstate::UpToDate
        || (f.pdsk >= Dstate::Inconsistent && Cstate::WFBitMapT <= f.conn && f.conn < Cstate::Ahead)
}

/// Writes are only reported to the peer as out of sync. Never together with
/// [`must_replicate`] in a sanitised state. Spec: §2.8.
pub fn report_out_of_sync(f: &Fields) -> bool {
    matches!(f.conn, Cstate::Ahead | Cstate::WFBitMapS)
}

/// What is written now is neither sent nor reported to the peer.
pub fn writes_alone(f: &Fields) -> bool {
    f.conn < Cstate::Connected || !(must_replicate(f) || report_out_of_sync(f))
}

/// The source of a resync, running or paused.
pub const fn is_source(f: &Fields) -> bool {
    matches!(f.conn, Cstate::SyncSource | Cstate::PausedSyncS)
}

/// Contact to the peer's data was lost. Spec: §2.9.
pub fn lost_contact(old: &Fields, new: &Fields) -> bool {
    let is_vague = |d: Dstate| matches!(d, Dstate::DUnknown | Dstate::Outdated);
    let (from, to) = (old.pdsk, new.pdsk);
    let had_it = from >= Dstate::Inconsistent && !is_vague(from);
    (had_it && (to < Dstate::Inconsistent || is_vague(to)))
        || (from == Dstate::DUnknown
            && matches!(to, Dstate::Diskless | Dstate::Failed | Dstate::Outdated))
}

/// This node's writes, or those of a Primary that uses its disk, are without the peer's data from
/// now on. Spec: §2.9 A9, A10.
pub fn goes_on_alone(old: &Fields, new: &Fields) -> bool {
    let has_primary = new.role == Role::Primary || new.peer == Role::Primary;
    let lost = has_primary && lost_contact(old, new);
    (lost
        || leaves_bad_peer(old, new)
        || serves_diskless_primary(old, new)
        || gets_disk_alone(old, new))
        && new.disk >= Dstate::UpToDate
}

/// A Primary loses a peer whose disk has errors, and no resync was under way that would have given it
/// another identifier. The original loses what this one writes then, if that one is promoted by
/// force.
fn leaves_bad_peer(old: &Fields, new: &Fields) -> bool {
    new.role == Role::Primary
        && old.conn == Cstate::Connected
        && new.conn < Cstate::Connected
        && old.pdsk == Dstate::Inconsistent
}

/// A Primary without its peer's data gets a disk: what it wrote when it lost contact, or would have
/// begun then, may not be there.
fn gets_disk_alone(old: &Fields, new: &Fields) -> bool {
    new.role == Role::Primary && old.disk < Dstate::Inconsistent && writes_alone(new)
}

/// From here on a Primary without a disk writes on this node's disk alone. Spec: §2.9 A10.
///
/// The original forgets the case that the disk is attached while such a Primary is there already: a
/// disk that the Primary attaches later would pass for equal.
fn serves_diskless_primary(old: &Fields, new: &Fields) -> bool {
    let is_new = old.peer != Role::Primary || old.disk < Dstate::UpToDate;
    is_only_disk_of_peer(new) && is_new
}

/// A Primary without a disk uses this node's disk.
pub fn is_only_disk_of_peer(f: &Fields) -> bool {
    f.peer == Role::Primary && f.pdsk < Dstate::Inconsistent && f.disk == Dstate::UpToDate
}

/// A Primary that is the source of a resync loses its target. As far as it knows, that one is
/// Inconsistent; so for the original no contact to data is lost.
pub fn loses_target(old: &Fields, new: &Fields) -> bool {
    new.role == Role::Primary
        && new.disk >= Dstate::UpToDate
        && is_source(old)
        && new.conn < Cstate::Connected
}

/// Nobody writes to this disk before I/O goes on: a peer that is Primary is not bound by the
/// suspension here.
pub fn writes_are_frozen(f: &Fields) -> bool {
    f.is_suspended() && f.peer != Role::Primary
}

/// New requests of applications are started; otherwise they wait. `version` is the agreed
/// protocol version; `held` says that the engine keeps them back for a moment (attach, resize,
/// invalidate, detach, bitmap I/O). Spec: §2.11.
pub fn accepts_io(f: &Fields, version: u32, held: bool) -> bool {
    let exchanging = match f.conn {
        Cstate::WFBitMapT | Cstate::WFSyncUUID => true,
        Cstate::WFBitMapS => version < 96,
        Cstate::StandAlone
        | Cstate::Disconnecting
        | Cstate::Unconnected
        | Cstate::Timeout
        | Cstate::BrokenPipe
        | Cstate::NetworkFailure
        | Cstate::ProtocolError
        | Cstate::TearDown
        | Cstate::WFConnection
        | Cstate::WFReportParams
        | Cstate::Connected
        | Cstate::StartingSyncS
        | Cstate::StartingSyncT
        | Cstate::SyncSource
        | Cstate::SyncTarget
        | Cstate::VerifyS
        | Cstate::VerifyT
        | Cstate::PausedSyncS
        | Cstate::PausedSyncT
        | Cstate::Ahead
        | Cstate::Behind => false,
    };
    let disk_unclear = matches!(f.disk, Dstate::Attaching | Dstate::Negotiating);
    !(f.is_suspended() || held || exchanging || disk_unclear)
}

/// The own disk can answer a read. `in_sync`: no bit of the range is set.
/// Spec: §2.11, io-path-and-resync.md §4.1.
pub fn may_read_locally(f: &Fields, in_sync: bool) -> bool {
    f.disk == Dstate::UpToDate || (f.disk == Dstate::Inconsistent && in_sync)
}

/// The peer can answer a read. Spec: §2.11.
pub fn may_read_remotely(f: &Fields) -> bool {
    f.pdsk == Dstate::UpToDate
}

/// A write can be accepted. Spec: §2.11.
pub fn may_write(f: &Fields) -> bool {
    f.disk == Dstate::UpToDate || f.pdsk == Dstate::UpToDate
}

/// Reads of the peer are answered with data. Spec: §2.11.
pub fn may_serve_peer(f: &Fields) -> bool {
    f.disk == Dstate::UpToDate
}

/// Flags to be stored with this state, if there is a disk; the rest is kept. Spec: §3.6.
pub fn stored_flags(old: Flags, f: &Fields, crashed_primary: bool) -> Flags {
    let peer_writes = f.pdsk < Dstate::Inconsistent && f.peer == Role::Primary;
    let mut flags = old;
    flags.set(Flags::CONSISTENT, f.disk > Dstate::Inconsistent); // bit 0
    flags.set(Flags::PRIMARY, f.role == Role::Primary || peer_writes); // bit 1
    flags.set(Flags::CONNECTED, f.conn > Cstate::WFReportParams); // bit 2
    flags.set(Flags::WAS_UP_TO_DATE, f.disk > Dstate::Outdated); // bit 4
    let outdated = Dstate::Inconsistent <= f.pdsk && f.pdsk <= Dstate::Outdated;
    flags.set(Flags::PEER_OUTDATED, outdated); // bit 5
    flags.set(Flags::CRASHED_PRIMARY, crashed_primary); // bit 6
    flags.remove(Flags::AL_CLEAN); // bit 7
    flags
}

/// Disk states that an attach without peer leads to (the "attach candidate"): own and peer's.
/// `pdsk` is what is known of the peer's disk now. Spec: §3.6.
pub fn from_flags(flags: Flags, pdsk: Dstate, fencing: Fencing) -> (Dstate, Dstate) {
    let pdsk = if flags.contains(Flags::PEER_OUTDATED) { Dstate::Outdated } else { pdsk };
    let disk = if !flags.contains(Flags::CONSISTENT) {
        Dstate::Inconsistent
    } else if !flags.contains(Flags::WAS_UP_TO_DATE) {
        Dstate::Outdated
    } else if pdsk == Dstate::Outdated || fencing == Fencing::DontCare {
        Dstate::UpToDate
    } else {
        Dstate::Consistent
    };
    (disk, pdsk)
}

/// `crashed-primary` after reading these flags. `f` is the state before the attach: a Primary
/// that froze because its disk went away has not crashed. Spec: §3.6.
pub fn crashed_primary_at_attach(flags: Flags, f: &Fields) -> bool {
    let frozen = f.role == Role::Primary && f.susp_nod;
    flags.contains(Flags::CRASHED_PRIMARY) || (flags.contains(Flags::PRIMARY) && !frozen)
}

/// `degraded-wfc` after reading these flags: crashed as a Primary without peer. Spec: §6.2.
pub fn degraded_at_attach(flags: Flags, f: &Fields) -> bool {
    f.role != Role::Primary && flags.contains(Flags::PRIMARY) && !flags.contains(Flags::CONNECTED)
}

#[cfg(test)]
mod tests {
    use super::*;
    use Dstate::{
        Attaching, Consistent, DUnknown, Diskless, Failed, Inconsistent, Negotiating, Outdated,
        UpToDate,
    };

    fn fields(conn: Cstate, disk: Dstate, pdsk: Dstate) -> Fields {
        Fields { conn, disk, pdsk, ..Fields::NEW }
    }

    #[test]
    fn where_writes_go() {
        use Cstate::{
            Ahead, Behind, Connected, StartingSyncT, SyncSource, SyncTarget, WFBitMapS, WFBitMapT,
            WFConnection,
        };
        // conn, pdsk, replicate, report
        let rows = [
            (Connected, UpToDate, true, false),
            (Connected, Inconsistent, false, false),
            (Connected, Diskless, false, false),
            (SyncSource, Inconsistent, true, false),
            (SyncTarget, UpToDate, true, false),
            (WFBitMapS, Consistent, false, true),
            (WFBitMapT, UpToDate, true, false),
            (StartingSyncT, UpToDate, true, false),
            (Ahead, Consistent, false, true),
            (Behind, UpToDate, true, false),
            (WFConnection, DUnknown, false, false),
            (WFConnection, Outdated, false, false),
        ];
        for (conn, pdsk, replicate, report) in rows {
            let f = fields(conn, UpToDate, pdsk);
            assert_eq!((must_replicate(&f), report_out_of_sync(&f)), (replicate, report), "{f:?}");
        }
    }

    /// Spec: states-and-generations.md §2.9, last paragraph but one, cell by cell.
    #[test]
    fn contact_is_lost() {
        let all = Dstate::ALL;
        let from_good = [Diskless, Attaching, Failed, Negotiating, Outdated, DUnknown];
        let from_unknown = [Diskless, Failed, Outdated];
        for &from in all {
            let lossy: &[Dstate] = match from {
                Inconsistent | Consistent | UpToDate => &from_good,
                DUnknown => &from_unknown,
                Diskless | Attaching | Failed | Negotiating | Outdated => &[],
            };
            for &to in all {
                let old = fields(Cstate::Connected, UpToDate, from);
                let new = Fields { pdsk: to, ..old };
                assert_eq!(lost_contact(&old, &new), lossy.contains(&to), "{from} -> {to}");
            }
        }
    }

    #[test]
    fn what_a_primary_lacks() {
        let primary =
            Fields { role: Role::Primary, ..fields(Cstate::WFConnection, UpToDate, DUnknown) };
        assert!(!lacks_data(&primary) && peer_needs_fencing(&primary));
        let bad = Fields { disk: Consistent, ..primary };
        assert!(lacks_data(&bad) && !lacks_data(&Fields { role: Role::Secondary, ..bad }));
        assert!(lacks_data(&Fields { pdsk: Consistent, ..bad }));
        assert!(!lacks_data(&Fields { pdsk: UpToDate, ..bad }));
        for f in [
            Fields { role: Role::Secondary, ..primary },
            Fields { conn: Cstate::Connected, ..primary },
            Fields { pdsk: Outdated, ..primary },
        ] {
            assert!(!peer_needs_fencing(&f), "{f:?}");
        }
    }

    #[test]
    fn unconfigured_means_all_three() {
        assert!(is_unconfigured(&Fields::NEW));
        for f in [
            Fields { conn: Cstate::Unconnected, ..Fields::NEW },
            Fields { disk: Attaching, ..Fields::NEW },
            Fields { role: Role::Primary, ..Fields::NEW },
        ] {
            assert!(!is_unconfigured(&f), "{f:?}");
        }
        let configured = Fencing::ResourceOnly;
        assert_eq!(fencing_in_force(Inconsistent, configured), configured);
        assert_eq!(fencing_in_force(Negotiating, configured), Fencing::DontCare);
    }

    #[test]
    fn requests_wait_while_anything_is_unclear() {
        let good = fields(Cstate::Connected, UpToDate, UpToDate);
        assert!(accepts_io(&good, 101, false) && !accepts_io(&good, 101, true));
        for f in [
            Fields { susp: true, ..good },
            Fields { susp_nod: true, ..good },
            Fields { susp_fen: true, ..good },
            Fields { conn: Cstate::WFBitMapT, ..good },
            Fields { conn: Cstate::WFSyncUUID, ..good },
            Fields { disk: Attaching, ..good },
            Fields { disk: Negotiating, ..good },
        ] {
            assert!(!accepts_io(&f, 101, false), "{f:?}");
        }
        let source = Fields { conn: Cstate::WFBitMapS, ..good };
        assert!(accepts_io(&source, 96, false) && !accepts_io(&source, 95, false));
        assert!(accepts_io(&Fields { disk: Diskless, ..good }, 101, false));
    }

    #[test]
    fn who_can_read_and_write() {
        for &disk in Dstate::ALL {
            for &pdsk in Dstate::ALL {
                let f = fields(Cstate::Connected, disk, pdsk);
                assert_eq!(may_read_locally(&f, false), disk == UpToDate);
                let partly = matches!(disk, UpToDate | Inconsistent);
                assert_eq!(may_read_locally(&f, true), partly, "{disk}");
                assert_eq!(may_read_remotely(&f), pdsk == UpToDate);
                assert_eq!(may_write(&f), disk == UpToDate || pdsk == UpToDate);
                assert_eq!(may_serve_peer(&f), disk == UpToDate);
                assert_eq!(has_disk(&f), disk.number() >= 4);
            }
        }
    }

    #[test]
    fn flags_follow_the_state() {
        let kept = Flags::FULL_SYNC | Flags::AL_DISABLED | Flags::AL_CLEAN;
        let primary = Fields { role: Role::Primary, ..Fields::NEW };
        let up = fields(Cstate::Connected, UpToDate, UpToDate);
        let rows = [
            (up, false, Flags::CONSISTENT | Flags::WAS_UP_TO_DATE | Flags::CONNECTED),
            (
                Fields { disk: UpToDate, pdsk: Outdated, ..primary },
                true,
                Flags::CONSISTENT
                    | Flags::WAS_UP_TO_DATE
                    | Flags::PRIMARY
                    | Flags::PEER_OUTDATED
                    | Flags::CRASHED_PRIMARY,
            ),
            // A diskless Primary writes through this node.
            (
                Fields { peer: Role::Primary, pdsk: Diskless, ..up },
                false,
                Flags::CONSISTENT | Flags::WAS_UP_TO_DATE | Flags::CONNECTED | Flags::PRIMARY,
            ),
            (Fields { peer: Role::Primary, disk: Outdated, ..up }, false, {
                Flags::CONSISTENT | Flags::CONNECTED
            }),
            (fields(Cstate::WFReportParams, Inconsistent, Inconsistent), false, {
                Flags::PEER_OUTDATED
            }),
        ];
        for (f, crashed, expected) in rows {
            let expected = expected | Flags::FULL_SYNC | Flags::AL_DISABLED;
            assert_eq!(stored_flags(kept, &f, crashed), expected, "{f:?}");
        }
        let unknown = Flags::from_bits_retain(1 << 20);
        let survives = stored_flags(unknown | Flags::all(), &Fields::NEW, false);
        assert!(survives.contains(unknown), "bits that nobody knows are kept");
    }

    #[test]
    fn states_from_flags() {
        let (c, w, p) = (Flags::CONSISTENT, Flags::WAS_UP_TO_DATE, Flags::PEER_OUTDATED);
        let none = Flags::empty();
        let (care_not, only, stonith) =
            (Fencing::DontCare, Fencing::ResourceOnly, Fencing::ResourceAndStonith);
        let rows = [
            (none, care_not, Inconsistent, DUnknown),
            (w, care_not, Inconsistent, DUnknown),
            (p, only, Inconsistent, Outdated),
            (c, care_not, Outdated, DUnknown),
            (c | p, care_not, Outdated, Outdated),
            (c | w, care_not, UpToDate, DUnknown),
            (c | w, only, Consistent, DUnknown),
            (c | w, stonith, Consistent, DUnknown),
            (c | w | p, stonith, UpToDate, Outdated),
        ];
        for (flags, fencing, disk, pdsk) in rows {
            assert_eq!(from_flags(flags, DUnknown, fencing), (disk, pdsk), "{flags:?} {fencing:?}");
        }
    }

    /// What is stored by a state comes back from the flags, as far as a flag exists.
    #[test]
    fn a_restart_never_makes_data_better() {
        for &disk in Dstate::ALL.iter().filter(|d| **d >= Inconsistent && **d != DUnknown) {
            for &pdsk in Dstate::ALL {
                let f = fields(Cstate::WFConnection, disk, pdsk);
                let flags = stored_flags(Flags::empty(), &f, false);
                let (again, peer) = from_flags(flags, DUnknown, Fencing::ResourceOnly);
                assert!(again <= disk || (disk == Consistent && peer == Outdated), "{f:?}");
                assert_eq!(peer == Outdated, matches!(pdsk, Inconsistent | Outdated));
            }
        }
    }

    #[test]
    fn who_has_crashed() {
        let secondary = Fields::NEW;
        let primary = Fields { role: Role::Primary, ..Fields::NEW };
        let frozen = Fields { susp_nod: true, ..primary };
        let (ind, crashed) = (Flags::PRIMARY, Flags::CRASHED_PRIMARY);
        let rows = [
            (Flags::empty(), secondary, false),
            (ind, secondary, true),
            (ind, primary, true),
            (ind, frozen, false),
            (crashed, frozen, true),
            (ind, Fields { susp_nod: true, ..secondary }, true),
        ];
        for (flags, f, expected) in rows {
            assert_eq!(crashed_primary_at_attach(flags, &f), expected, "{flags:?} {f:?}");
        }
        assert!(degraded_at_attach(ind, &secondary));
        assert!(!degraded_at_attach(ind, &primary));
        assert!(!degraded_at_attach(ind | Flags::CONNECTED, &secondary));
    }
}
