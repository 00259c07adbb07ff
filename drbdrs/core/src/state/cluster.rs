//! Changes that the peer must agree to, and raw state words from outside.
//! Spec: states-and-generations.md §2.7.

use drbd_types::{BadStateWord, Cstate, Dstate, Fields, Role, StateWord};

/// Must the peer agree to this change? `new` has been sanitised.
pub fn cluster_wide(old: &Fields, new: &Fields) -> bool {
    use Cstate::{Connected, Disconnecting, StartingSyncS, StartingSyncT, VerifyS, WFReportParams};
    let connected = old.conn >= Connected;
    let stays_connected = connected && new.conn >= Connected;
    let becomes = |conn| old.conn != conn && new.conn == conn;
    (stays_connected
        && ((old.role != Role::Primary && new.role == Role::Primary)
            || becomes(StartingSyncT)
            || becomes(StartingSyncS)
            || (old.disk != Dstate::Failed && new.disk == Dstate::Failed)))
        || (connected && new.conn == Disconnecting)
        || (old.conn == Connected && new.conn == VerifyS)
        || (old.conn == Connected && new.conn == WFReportParams)
}

/// Mask and value of the peer's request from the own point of view. Numbers that stand for
/// nothing are passed on, for [`apply`] to refuse.
pub const fn from_peer(mask: StateWord, val: StateWord) -> (StateWord, StateWord) {
    (turned(mask), turned(val))
}

/// One word from the other point of view.
const fn turned(word: StateWord) -> StateWord {
    let w = word.0;
    let role = (w & StateWord::ROLE.0) << 2;
    let peer = (w & StateWord::PEER.0) >> 2;
    let disk = (w & StateWord::DISK.0) << 4;
    let pdsk = (w & StateWord::PDSK.0) >> 4;
    let conn = turned_conn(w >> 4 & 31) << 4;
    let paused = word.has(StateWord::AFTR_ISP) || word.has(StateWord::USER_ISP);
    let peer_isp = if paused { StateWord::PEER_ISP.0 } else { 0 };
    let replaced = StateWord::ROLE.0
        | StateWord::PEER.0
        | StateWord::CONN.0
        | StateWord::DISK.0
        | StateWord::PDSK.0
        | StateWord::PEER_ISP.0;
    StateWord(w & !replaced | role | peer | disk | pdsk | conn | peer_isp)
}

/// The connection state that corresponds to the sender's, by number; 31 is the mask.
const fn turned_conn(sender: u32) -> u32 {
    if sender == StateWord::CONN.0 >> 4 {
        return sender;
    }
    let receiver = match sender {
        9 => Cstate::WFReportParams,
        10 => Cstate::Connected,
        11 => Cstate::StartingSyncT,
        12 => Cstate::StartingSyncS,
        1 => Cstate::TearDown,
        18 => Cstate::VerifyT,
        _ => Cstate::StandAlone,
    };
    receiver.number() as u32
}

/// The fields with those under the mask replaced.
///
/// # Errors
/// The result has a number that stands for nothing.
pub const fn apply(f: Fields, mask: StateWord, val: StateWord) -> Result<Fields, BadStateWord> {
    StateWord(f.pack().0 & !mask.0 | val.0 & mask.0).unpack()
}

#[cfg(test)]
mod tests {
    use super::*;
    use Cstate::{
        Connected, Disconnecting, NetworkFailure, StandAlone, StartingSyncS, StartingSyncT,
        TearDown, VerifyS, VerifyT, WFBitMapT, WFConnection, WFReportParams,
    };
    use Dstate::{Attaching, Diskless, Failed, Outdated, UpToDate};
    use Role::{Primary, Secondary};

    const UP: Fields = Fields {
        role: Secondary,
        peer: Secondary,
        conn: Connected,
        disk: UpToDate,
        pdsk: UpToDate,
        ..Fields::NEW
    };

    #[test]
    #[rustfmt::skip]
    fn what_the_peer_is_asked_about() {
        let alone = Fields { conn: WFConnection, ..UP };
        let at = |conn| Fields { conn, ..UP };
        let rows = [
            ("promote", UP, Fields { role: Primary, ..UP }, true),
            ("demote", Fields { role: Primary, ..UP }, UP, false),
            ("promote alone", alone, Fields { role: Primary, ..alone }, false),
            ("invalidate", UP, at(StartingSyncT), true),
            ("invalidate-remote", UP, at(StartingSyncS), true),
            ("still starting", at(StartingSyncS), at(StartingSyncS), false),
            ("detach", UP, Fields { disk: Failed, ..UP }, true),
            ("detached", Fields { disk: Failed, ..UP }, Fields { disk: Diskless, ..UP }, false),
            ("detach and lose the peer", UP, Fields { disk: Failed, ..at(NetworkFailure) }, false),
            ("attach", Fields { disk: Diskless, ..UP }, Fields { disk: Attaching, ..UP }, false),
            ("disconnect", UP, at(Disconnecting), true),
            ("disconnect in a resync", at(WFBitMapT), at(Disconnecting), true),
            ("disconnect while waiting", alone, at(Disconnecting), false),
            ("loss", UP, at(NetworkFailure), false),
            ("verify", UP, at(VerifyS), true),
            ("verify answered", UP, at(VerifyT), false),
            ("remove a volume", UP, at(WFReportParams), true),
            ("pause", UP, Fields { user_isp: true, ..UP }, false),
            ("outdate", alone, Fields { disk: Outdated, ..alone }, false),
        ];
        for (what, old, new, expected) in rows {
            assert_eq!(cluster_wide(&old, &new), expected, "{what}");
        }
    }

    #[test]
    fn every_connection_state_of_the_peer() {
        for n in 0..32 {
            let expected = match n {
                9 => 9,
                10 => 10,
                11 => 12,
                12 => 11,
                1 => 7,
                18 => 19,
                31 => 31,
                _ => 0,
            };
            let (_, val) = from_peer(StateWord::CONN, StateWord(n << 4));
            assert_eq!(val, StateWord(expected << 4), "{n}");
        }
    }

    /// The recorded requests. Spec: states-and-generations.md §13.
    #[test]
    fn recorded_requests() {
        let primary = from_peer(StateWord(0x3), StateWord(0x1));
        assert_eq!(primary, (StateWord(0xC), StateWord(0x4)));
        assert_eq!(apply(UP, primary.0, primary.1), Ok(Fields { peer: Primary, ..UP }));
        let disconnect = from_peer(StateWord(0x1F0), StateWord(0x10));
        assert_eq!(disconnect, (StateWord(0x1F0), StateWord(0x70)), "TearDown, as in a log");
        assert_eq!(apply(UP, disconnect.0, disconnect.1), Ok(Fields { conn: TearDown, ..UP }));
        let detach = from_peer(StateWord(0x1E00), StateWord(0x400));
        assert_eq!(apply(UP, detach.0, detach.1), Ok(Fields { pdsk: Failed, ..UP }));
        let invalidate = from_peer(StateWord(0x1F0), StateWord(0xC0));
        let source = apply(UP, invalidate.0, invalidate.1);
        assert_eq!(source, Ok(Fields { conn: StartingSyncS, ..UP }));
        // The log of a node whose peer wants to leave and be Outdated: mask 0x1e1f0 val 0xa070.
        let leave = from_peer(StateWord(0x1FF0), StateWord(0xA10));
        assert_eq!(leave, (StateWord(0x1_E1F0), StateWord(0xA070)));
    }

    #[test]
    fn pauses_become_the_peers() {
        let rows = [
            (StateWord::AFTR_ISP, StateWord(StateWord::AFTR_ISP.0 | StateWord::PEER_ISP.0)),
            (StateWord::USER_ISP, StateWord(StateWord::USER_ISP.0 | StateWord::PEER_ISP.0)),
            (StateWord::PEER_ISP, StateWord(0)),
            (StateWord::SUSP, StateWord::SUSP),
        ];
        for (word, expected) in rows {
            assert_eq!(from_peer(word, word), (expected, expected));
        }
    }

    #[test]
    fn numbers_that_stand_for_nothing_are_refused() {
        for (mask, val) in [(0x3, 0x3), (0xC, 0xC), (0x1F0, 0x1F0), (0x1E00, 0x1E00)] {
            let (mask, val) = (StateWord(mask), StateWord(val));
            assert!(apply(UP, mask, val).is_err(), "{mask:?}");
        }
        // A mask that covers a part of a field only.
        assert!(apply(UP, StateWord(0x1), StateWord(0x1)).is_err(), "Secondary | 1");
        assert_eq!(apply(UP, StateWord(0), StateWord(u32::MAX)), Ok(UP));
        let unused = StateWord(0xFF80_0000);
        assert_eq!(apply(UP, unused, unused), Ok(UP));
    }

    /// A hostile peer: any mask and value is either a state or refused, and unknown bits do nothing.
    #[test]
    fn no_word_is_a_surprise() {
        let mut chance = crate::resync::chance::Chance::new(7);
        for _ in 0..100_000 {
            let mask = StateWord(chance.below_u32(u32::MAX));
            let val = StateWord(chance.below_u32(u32::MAX));
            let (mask, val) = from_peer(mask, val);
            if let Ok(f) = apply(UP, mask, val) {
                assert_eq!(f.pack().0 & !mask.0, UP.pack().0 & !mask.0);
            }
        }
        assert_eq!(from_peer(StateWord(0), StateWord(0)).0, StateWord(0));
        assert_eq!(StandAlone.number(), 0);
        assert_eq!(StartingSyncT.number(), 12);
    }
}
