//! Exhaustive tests of the handshake decision: whole input spaces, seen from both nodes.

use alloc::vec::Vec;

use drbd_types::{Dstate, Gi, Role};

use super::Slots;
use super::compare::{Extent, Link, Relation, SYNC_OFFSET, Side, compare};
use super::decide::{Decision, Handler, Handshake, Outcome, RrConflict, Step, decide};
use super::explain::Reason;
use super::splitbrain::{OnePrimary, Policies, TwoPrimaries, ZeroPrimaries};

const A: u64 = 0xA0;
const B: u64 = 0xB0;
/// Empty, just created, three generations, and the sync identifier derived from one of them.
const VALUES: [u64; 6] = [0, 4, A, B, 0xC0, A + SYNC_OFFSET];

fn slots(v: [u64; 4]) -> Slots {
    Slots { current: Gi(v[0]), bitmap: Gi(v[1]), history: [Gi(v[2]), Gi(v[3])] }
}

fn all_slots() -> Vec<[u64; 4]> {
    let mut all = Vec::new();
    for c in VALUES {
        for b in VALUES {
            for h1 in VALUES {
                for h2 in VALUES {
                    all.push([c, b, h1, h2]);
                }
            }
        }
    }
    all
}

fn side(v: [u64; 4]) -> Side {
    Side { slots: slots(v), crashed_primary: false, role: Role::Secondary }
}

/// The table of the specification, written down literally with its numbers.
fn literal(s: [u64; 4], p: [u64; 4], proto: u32) -> (i32, u8) {
    let mut result = (-1000, 100);
    if s[2] == p[2] || s[2] == p[3] || s[3] == p[2] || s[3] == p[3] {
        result = (-100, 100);
    }
    if s[1] == p[1] && s[1] != 0 {
        result = (100, 90);
    }
    if s[2] == p[0] || s[3] == p[0] {
        result = (2, 80);
    }
    let offset = 1u64 << 48;
    let own_lost = if proto >= 96 { s[2] + offset == s[1] } else { s[3] == p[2] };
    if s[2] == p[0] && own_lost {
        result = if proto < 91 { (-1091, 71) } else { (1, 71) };
    }
    if s[1] == p[0] {
        result = (1, 70);
    }
    if s[0] == p[2] || s[0] == p[3] {
        result = (-2, 60);
    }
    let peer_lost = if proto >= 96 { p[2] + offset == p[1] } else { s[2] == p[3] };
    if s[0] == p[2] && peer_lost {
        result = if proto < 91 { (-1091, 51) } else { (-1, 51) };
    }
    if s[0] == p[1] {
        result = (-1, 50);
    }
    if s[0] == p[0] {
        result = (0, 40);
        if s[1] == 0 && p[1] != 0 {
            result = if s[2] == p[1] && s[3] == p[2] { (-1, 35) } else { (-1, 37) };
        }
        if p[1] == 0 && s[1] != 0 {
            result = if s[1] == p[2] && s[2] == p[3] { (1, 34) } else { (1, 36) };
        }
        if proto < 91 && result.0 != 0 {
            result = (-1091, 30);
        }
    }
    if s[0] != 4 && (p[0] == 4 || p[0] == 0) {
        result = (2, 30);
    }
    if (s[0] == 4 || s[0] == 0) && p[0] != 4 {
        result = (-2, 20);
    }
    if s[0] == 4 && p[0] == 4 {
        result = (0, 10);
    }
    result
}

#[test]
fn every_combination_of_slots_follows_the_literal_table() {
    let all = all_slots();
    for protocol in [101, 95, 90] {
        let link = Link { protocol, wsame: true, resolve_conflicts: false };
        for own in &all {
            for peer in &all {
                let got = compare(&side(*own), &side(*peer), &link);
                let want = literal(*own, *peer, protocol);
                assert_eq!((got.relation.code(), got.rule), want, "{own:x?} {peer:x?} {protocol}");
            }
        }
    }
}

#[test]
fn bit_0_is_not_part_of_the_identity() {
    let link = Link { protocol: 101, wsame: true, resolve_conflicts: false };
    let all = all_slots();
    for own in all.iter().step_by(7) {
        for peer in all.iter().step_by(5) {
            let plain = compare(&side(*own), &side(*peer), &link);
            // An empty slot stays empty: bit 0 of 0 would make it a value.
            let flagged = own.map(|v| if v == 0 { 0 } else { v | 1 });
            let got = compare(&side(flagged), &side(*peer), &link);
            assert_eq!(
                (plain.relation, plain.rule),
                (got.relation, got.rule),
                "{own:x?} {peer:x?}"
            );
        }
    }
}

/// One pair of slots for each row of the table.
const ROWS: [([u64; 4], [u64; 4]); 15] = [
    ([4, 0, 0, 0], [4, 0, 0, 0]),
    ([4, 0, 0, 0], [A, 0, 0, 0]),
    ([0, 0, 0, 0], [A, 0, 0, 0]),
    ([A, 0, 0, 0], [4, 0, 0, 0]),
    ([A, B, 0xC0, 0xD0], [A, 0, B, 0xC0]),
    ([A, B, 0xC0, 0xD0], [A, 0, 0xE0, 0xF0]),
    ([A, 0, B, 0xC0], [A, B, 0xC0, 0xD0]),
    ([A, 0, 0xE0, 0xF0], [A, B, 0xC0, 0xD0]),
    ([A, 0, 0, 0], [A, 0, 0, 0]),
    ([A, 0, 0, 0], [B, A, 0, 0]),
    ([A, 0xC0, 0xD0, 0], [B, A + SYNC_OFFSET, A, 0]),
    ([A, 0, 0, 0], [B, 0xC0, A, 0]),
    ([B, A, 0, 0], [A, 0, 0, 0]),
    ([B, A + SYNC_OFFSET, A, 0], [A, 0xC0, 0xD0, 0]),
    ([B, 0xC0, A, 0], [A, 0, 0, 0]),
];

/// Split brains: clear and unclear.
const SPLIT: [([u64; 4], [u64; 4]); 2] =
    [([A, 0xC0, 0, 0], [B, 0xC0, 0, 0]), ([A, 0xD0, 0xC0, 0], [B, 0xE0, 0xF0, 0xC0])];

fn handshake(own: [u64; 4], peer: [u64; 4]) -> Handshake {
    Handshake {
        own: side(own),
        peer: side(peer),
        own_disk: Dstate::UpToDate,
        candidate_disk: Dstate::UpToDate,
        peer_disk: Dstate::UpToDate,
        link: Link { protocol: 101, wsame: true, resolve_conflicts: false },
        own_bits_sent: 5,
        peer_bits: 3,
        own_bits_now: 5,
        peer_flags: 0,
        discard_mine: false,
        peer_discards: false,
        policies: Policies::default(),
        always_asbp: false,
        rr_conflict: RrConflict::Disconnect,
        dry_run: false,
        can_demote: false,
    }
}

/// The same handshake as the peer sees it; `rr_conflict` is a local setting.
fn mirrored(h: &Handshake, rr_conflict: RrConflict) -> Handshake {
    let zero = match h.policies.zero {
        ZeroPrimaries::DiscardLocal => ZeroPrimaries::DiscardRemote,
        ZeroPrimaries::DiscardRemote => ZeroPrimaries::DiscardLocal,
        other => other,
    };
    Handshake {
        own: h.peer,
        peer: h.own,
        own_disk: h.peer_disk,
        candidate_disk: h.peer_disk,
        peer_disk: h.own_disk,
        link: Link { resolve_conflicts: !h.link.resolve_conflicts, ..h.link },
        own_bits_sent: h.peer_bits,
        peer_bits: h.own_bits_sent,
        own_bits_now: h.peer_bits,
        discard_mine: h.peer_discards,
        peer_discards: h.discard_mine,
        policies: Policies { zero, ..h.policies },
        rr_conflict,
        ..*h
    }
}

/// Both nodes decide; panics where the pair would not fit together.
fn both(h: &Handshake, peer_rr: RrConflict) -> (Decision, Decision) {
    let ours = decide(h);
    let theirs = decide(&mirrored(h, peer_rr));
    let fits = match (ours.outcome, theirs.outcome) {
        (Outcome::Connected, Outcome::Connected) | (Outcome::Failed, _) | (_, Outcome::Failed) => {
            true
        }
        (Outcome::Source(a), Outcome::Target(b)) | (Outcome::Target(a), Outcome::Source(b)) => {
            a == b
        }
        _ => false,
    };
    assert!(fits, "{h:#?}\nours {ours:#?}\ntheirs {theirs:#?}");
    (ours, theirs)
}

/// A target gives up its data: something must say that this is right.
fn target_is_justified(h: &Handshake, d: &Decision) {
    if !matches!(d.outcome, Outcome::Target(_)) {
        return;
    }
    let disk = if h.own_disk == Dstate::Negotiating { h.candidate_disk } else { h.own_disk };
    let policy = match h.own.role == Role::Primary || h.peer.role == Role::Primary {
        false => h.policies.zero != ZeroPrimaries::Disconnect,
        true if h.own.role == h.peer.role => h.policies.two != TwoPrimaries::Disconnect,
        true => h.policies.one != OnePrimary::Disconnect,
    };
    let manual = h.discard_mine && !h.peer_discards;
    let allowed = match d.comparison.relation {
        Relation::Target(_) => true,
        Relation::SplitBrain => policy || manual,
        Relation::SplitBrainUnclear => (policy && h.always_asbp) || manual,
        _ => false,
    };
    assert!(allowed || disk == Dstate::Inconsistent, "{h:#?}\n{d:#?}");
    if h.own.role == Role::Primary && h.own_disk >= Dstate::Consistent {
        assert_eq!(h.rr_conflict, RrConflict::Violently, "{h:#?}\n{d:#?}");
    }
    assert!(
        h.peer_disk > Dstate::Inconsistent || d.outcome == Outcome::Failed || {
            // Both Inconsistent: the source refuses, so this target never gets anything.
            decide(&mirrored(h, RrConflict::Violently)).outcome == Outcome::Failed
        }
    );
}

const ROLES: [Role; 2] = [Role::Primary, Role::Secondary];
const RR: [RrConflict; 3] =
    [RrConflict::Disconnect, RrConflict::CallPriLost, RrConflict::Violently];
const DISKS: [Dstate; 4] =
    [Dstate::Inconsistent, Dstate::Outdated, Dstate::Consistent, Dstate::UpToDate];

#[test]
fn rows_of_the_table_with_all_roles_disks_and_crashes_are_mirrored() {
    let mut decided = 0u32;
    for (own, peer) in ROWS.iter().chain(&SPLIT) {
        for own_role in ROLES {
            for peer_role in ROLES {
                for own_disk in DISKS {
                    for peer_disk in DISKS {
                        for bits in 0..64u8 {
                            let bit = |n: u8| bits & (1 << n) != 0;
                            let mut h = handshake(*own, *peer);
                            h.own.role = own_role;
                            h.peer.role = peer_role;
                            h.own_disk = own_disk;
                            h.peer_disk = peer_disk;
                            h.own.crashed_primary = bit(0);
                            h.peer.crashed_primary = bit(1);
                            h.link.resolve_conflicts = bit(2);
                            h.link.wsame = bit(3);
                            h.discard_mine = bit(4);
                            h.peer_discards = bit(5);
                            for rr in RR {
                                h.rr_conflict = rr;
                                let (ours, _) = both(&h, RR[usize::from(bits % 3)]);
                                target_is_justified(&h, &ours);
                                decided += 1;
                            }
                        }
                    }
                }
            }
        }
    }
    assert_eq!(decided, 17 * 4 * 16 * 64 * 3);
}

const ZERO: [ZeroPrimaries; 7] = [
    ZeroPrimaries::Disconnect,
    ZeroPrimaries::DiscardYoungerPrimary,
    ZeroPrimaries::DiscardOlderPrimary,
    ZeroPrimaries::DiscardZeroChanges,
    ZeroPrimaries::DiscardLeastChanges,
    ZeroPrimaries::DiscardLocal,
    ZeroPrimaries::DiscardRemote,
];
const ONE: [OnePrimary; 5] = [
    OnePrimary::Disconnect,
    OnePrimary::Consensus,
    OnePrimary::DiscardSecondary,
    OnePrimary::CallPriLost,
    OnePrimary::ViolentlyAs0p,
];
const TWO: [TwoPrimaries; 3] =
    [TwoPrimaries::Disconnect, TwoPrimaries::CallPriLost, TwoPrimaries::ViolentlyAs0p];

/// Calls `f` with every combination of the three policies.
fn each_policy(mut f: impl FnMut(Policies)) {
    for zero in ZERO {
        for one in ONE {
            for two in TWO {
                f(Policies { zero, one, two });
            }
        }
    }
}

#[test]
fn split_brain_policies_with_all_inputs_are_mirrored() {
    let bits = [(0, 0), (0, 3), (5, 0), (5, 3), (3, 5), (4, 4)];
    for (own, peer) in SPLIT {
        each_policy(|policies| {
            for (own_bits, peer_bits) in bits {
                for flags in 0..64u64 {
                    let bit = |n: u64| (flags >> n) & 1;
                    // Who was Primary when the generations parted: bit 0 of the bitmap slot.
                    let own = [own[0], own[1] | bit(0), own[2], own[3]];
                    let peer = [peer[0], peer[1] | bit(1), peer[2], peer[3]];
                    let mut h = handshake(own, peer);
                    h.own.role = ROLES[usize::from(bit(2) == 1)];
                    h.peer.role = ROLES[usize::from(bit(3) == 1)];
                    h.link.resolve_conflicts = bit(4) == 1;
                    h.always_asbp = bit(5) == 1;
                    h.policies = policies;
                    (h.own_bits_sent, h.peer_bits) = (own_bits, peer_bits);
                    for rr in [RrConflict::Disconnect, RrConflict::Violently] {
                        h.rr_conflict = rr;
                        let (ours, _) = both(&h, rr);
                        target_is_justified(&h, &ours);
                    }
                }
            }
        });
    }
}

#[test]
fn both_current_identifiers_empty_is_refused_instead_of_hanging() {
    // Defect D2 of the original: both nodes become target and wait for each other.
    let (ours, theirs) = both(&handshake([0; 4], [0; 4]), RrConflict::Disconnect);
    assert_eq!((ours.outcome, ours.reason), (Outcome::Failed, Reason::NoGeneration));
    assert_eq!((theirs.outcome, theirs.reason), (Outcome::Failed, Reason::NoGeneration));
}

#[test]
fn identifiers_in_a_circle_are_refused() {
    let d = decide(&handshake([A, B, 0, 0], [B, A, 0, 0]));
    assert_eq!((d.outcome, d.reason), (Outcome::Failed, Reason::Contradiction));
}

#[test]
fn all_slots_give_a_pair_that_fits() {
    let all = all_slots();
    let mut refused = 0u32;
    for own in all.iter().step_by(3) {
        for peer in all.iter().step_by(4) {
            let h = handshake(*own, *peer);
            let (ours, _) = both(&h, RrConflict::Disconnect);
            target_is_justified(&h, &ours);
            refused += u32::from(ours.reason == Reason::Contradiction);
        }
    }
    assert!(refused > 0, "the space contains circles, and they must be seen");
}

#[test]
fn unclear_split_brain_solved_by_policy_is_a_full_sync() {
    let (own, peer) = SPLIT[1];
    let mut h = handshake(own, peer);
    h.policies.zero = ZeroPrimaries::DiscardLocal;
    assert_eq!(decide(&h).outcome, Outcome::Failed, "only with always-asbp");
    h.always_asbp = true;
    assert_eq!(decide(&h).outcome, Outcome::Target(Extent::Full));
}

#[test]
fn an_inconsistent_disk_is_the_target_whatever_the_identifiers_say() {
    for (own, peer) in ROWS.iter().chain(&SPLIT) {
        let mut h = handshake(*own, *peer);
        h.own_disk = Dstate::Inconsistent;
        let (ours, theirs) = both(&h, RrConflict::Disconnect);
        assert!(matches!(ours.outcome, Outcome::Target(_)), "{h:?} {ours:?}");
        assert!(matches!(theirs.outcome, Outcome::Source(_)), "{h:?} {theirs:?}");
        assert!(!ours.steps.contains(&Step::Call(Handler::InitialSplitBrain)));
    }
}

#[test]
fn observed_between_two_reference_nodes() {
    // Spec §15.1: slots of A and B, then what A and B logged. `+` in the table is SYNC_OFFSET.
    const C: u64 = 0xC0;
    const D: u64 = 0xD0;
    const E: u64 = 0xE0;
    const F: u64 = 0xF0;
    const A_PLUS: u64 = A + SYNC_OFFSET;
    type Row = ([u64; 4], [u64; 4], (i32, u8), (i32, u8));
    let rows: [Row; 17] = [
        ([4, 0, 0, 0], [4, 0, 0, 0], (0, 10), (0, 10)),
        ([4, 0, 0, 0], [A, 0, 0, 0], (-2, 20), (2, 30)),
        ([0, 0, 0, 0], [A, 0, 0, 0], (-2, 20), (2, 30)),
        ([0, 0, 0, 0], [4, 0, 0, 0], (2, 30), (-2, 20)),
        ([0, 0, 0, 0], [0, 0, 0, 0], (-2, 20), (-2, 20)),
        ([A, B, C, D], [A, 0, B, C], (1, 34), (-1, 35)),
        ([A, B, C, D], [A, 0, E, F], (1, 36), (-1, 37)),
        ([A, B, 0, 0], [A, B, 0, 0], (0, 40), (0, 40)),
        ([A, B, 0, 0], [A, C, 0, 0], (0, 40), (0, 40)),
        ([A, 0, 0, 0], [B, A, 0, 0], (-1, 50), (1, 70)),
        ([A, C, D, 0], [B, A_PLUS, A, 0], (-1, 51), (1, 71)),
        ([A, C, D, 0], [B, E, A, 0], (-2, 60), (2, 80)),
        ([A, 0, 0, 0], [B, C, D, A], (-2, 60), (2, 80)),
        ([A, C, 0, 0], [B, C, 0, 0], (100, 90), (100, 90)),
        ([A, D, C, 0], [B, E, F, C], (-100, 100), (-100, 100)),
        ([A, 0, 0, 0], [B, 0, 0, 0], (-100, 100), (-100, 100)),
        ([A, 0, C, D], [B, 0, E, F], (-1000, 100), (-1000, 100)),
    ];
    for (a, b, want_a, want_b) in rows {
        for (own, peer, want, resolve_conflicts) in [(a, b, want_a, false), (b, a, want_b, true)] {
            let link = Link { protocol: 101, wsame: true, resolve_conflicts };
            let got = compare(&side(own), &side(peer), &link);
            assert_eq!((got.relation.code(), got.rule), want, "{own:x?} {peer:x?}");
        }
    }
}

#[test]
fn observed_log_of_an_unresolved_split_brain() {
    let (own, peer) = SPLIT[0];
    let d = decide(&handshake(own, peer));
    let lines: Vec<&str> = d
        .steps
        .iter()
        .map(|s| match s {
            Step::Log(_, text) => text.as_str(),
            Step::Call(Handler::InitialSplitBrain) => "(initial-split-brain)",
            Step::Call(Handler::SplitBrain) => "(split-brain)",
            Step::Call(_) | Step::Demote => "(something else)",
        })
        .collect();
    let want = [
        "drbd_sync_handshake:",
        "self 00000000000000A0:00000000000000C0:0000000000000000:0000000000000000 bits:5 flags:0",
        "peer 00000000000000B0:00000000000000C0:0000000000000000:0000000000000000 bits:3 flags:0",
        "uuid_compare()=100 by rule 90",
        "(initial-split-brain)",
        "Split-Brain detected but unresolved, dropping connection!",
        "(split-brain)",
    ];
    assert_eq!(lines, want);
}
