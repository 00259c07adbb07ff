//! Random situations, with the relations between identifiers that the rules ask about.

use drbd_types::{Dstate, Gi, Role};
use drbd_wire::packet::{FeatureOffer, Features, Uuids};

use super::{Brought, ONE, Presented, RR, Setting, TWO, ZERO};
use crate::metagen::Random;
use crate::scripted_peer::OFFER;

/// Between the identifier of a resync and the one that it was derived from.
const OFFSET: u64 = 1 << 48;
/// Names of generations, so that equal ones come up.
const NAMES: [u64; 6] = [
    0xAAAA_0000_1111_2220,
    0xBBBB_0000_1111_2220,
    0xCCCC_0000_1111_2220,
    0xDDDD_0000_1111_2220,
    0xEEEE_0000_1111_2220,
    0xFFF0_0000_1111_2220,
];

fn pick<T: Copy>(random: &mut Random, from: &[T]) -> T {
    let index = random.below(from.len() as u64);
    from[usize::try_from(index).unwrap_or(0)]
}

fn chance(random: &mut Random, percent: u64) -> bool {
    random.below(100) < percent
}

/// How the kernel's node is set up.
pub fn setting(random: &mut Random) -> Setting {
    let name = |random: &mut Random| pick(random, &NAMES) | random.below(2);
    let mut slots = [0; 4];
    for (i, slot) in slots.iter_mut().enumerate() {
        let is_empty = chance(random, if i == 0 { 3 } else { 35 });
        *slot = if is_empty { 0 } else { name(random) };
    }
    match random.below(10) {
        0 => slots = [4, 0, 0, 0],
        // The second condition of rule 71.
        1 => slots[1] = (slots[2] & !1).wrapping_add(OFFSET),
        _ => {}
    }
    let is_primary = chance(random, 35);
    let is_consistent = chance(random, 80);
    let is_up_to_date = chance(random, 80);
    let has_crashed = chance(random, 20);
    let position =
        |random: &mut Random, len: usize| usize::try_from(random.below(len as u64)).unwrap_or(0);
    Setting {
        slots,
        flags: [is_consistent, is_up_to_date, has_crashed, false, false, false, has_crashed],
        is_primary,
        after_sb: [
            position(random, ZERO.len()),
            position(random, ONE.len()),
            position(random, TWO.len()),
        ],
        always_asbp: chance(random, 40),
        rr_conflict: position(random, RR.len()),
        two_primaries: chance(random, 40),
    }
}

/// What is presented to a node that brings this.
pub fn presented(random: &mut Random, setting: &Setting, brought: &Brought) -> Presented {
    let own = [
        brought.uuids.current.0,
        brought.uuids.bitmap.0,
        brought.uuids.history[0].0,
        brought.uuids.history[1].0,
    ];
    let slots = related(random, own);
    let is_primary =
        chance(random, 30) && (setting.two_primaries || brought.state.role != Role::Primary);
    let own_bits = brought.uuids.dirty_bits;
    let bits = [0, 0, 1, 100, own_bits, own_bits + 1, own_bits.saturating_sub(1)];
    let mut flags = 0;
    if chance(random, 15) {
        flags |= 1;
    }
    if chance(random, 15) {
        flags |= 2;
    }
    let disks = [
        Dstate::UpToDate,
        Dstate::UpToDate,
        Dstate::UpToDate,
        Dstate::Consistent,
        Dstate::Outdated,
        Dstate::Inconsistent,
    ];
    Presented {
        uuids: Uuids {
            current: Gi(slots[0]),
            bitmap: Gi(slots[1]),
            history: [Gi(slots[2]), Gi(slots[3])],
            dirty_bits: pick(random, &bits),
            flags,
        },
        role: if is_primary { Role::Primary } else { Role::Secondary },
        disk: pick(random, &disks),
        dry_run: brought.agreed.0 >= 92 && chance(random, 3),
    }
}

/// What is offered.
pub(super) fn offered(random: &mut Random) -> FeatureOffer {
    if chance(random, 55) {
        return OFFER;
    }
    let max = pick(random, &[101, 101, 100, 97, 96, 95, 94, 91, 90, 89, 86]);
    let features = pick(random, &[15, 15, 11, 4, 0]);
    FeatureOffer { max, features: Features::from_bits_retain(features), ..OFFER }
}

/// Four identifiers that have something to do with the other node's.
fn related(random: &mut Random, own: [u64; 4]) -> [u64; 4] {
    let [s0, s1, s2, s3] = own;
    let other = |random: &mut Random| pick(random, &NAMES) | random.below(2);
    // The second condition of rule 71 does not come up by itself.
    if s1 & !1 == (s2 & !1).wrapping_add(OFFSET) && chance(random, 30) {
        return [s2, 0, other(random), 0];
    }
    let slots = match random.below(21) {
        // Equal current ones: rules 34 to 41.
        0 => [s0, 0, s1, s2],
        1 => [s0, s2, s3, 0],
        2 => [s0, other(random), other(random), 0],
        3 | 4 => [s0, s1, s2, s3],
        5 => [s0, 0, s2, s3],
        // Own current one is the peer's older: 50, 51, 60.
        6 => [other(random), s0, s2, s3],
        7 => [other(random), (s0 & !1).wrapping_add(OFFSET), s0, s1],
        8 => [other(random), other(random), s0, 0],
        9 => [other(random), other(random), other(random), s0],
        // The peer's current one is our older: 70, 71, 80.
        10 => [s1, 0, other(random), 0],
        11 => [s2, 0, other(random), s3],
        12 => [pick(random, &[s2, s3]), 0, 0, 0],
        // Split brain: 90, 100.
        13 | 14 => [other(random), s1, other(random), 0],
        15 => [other(random), other(random), pick(random, &[s2, s3]), other(random)],
        16 => [4, 0, 0, 0],
        // Nothing in common.
        17 => [random.next(), random.next(), random.next(), random.next()],
        _ => {
            let mut slots = [0; 4];
            for slot in &mut slots {
                let pool = [s0, s1, s2, s3, 0, 0, 4, other(random), s0.wrapping_add(OFFSET)];
                *slot = pick(random, &pool);
            }
            slots
        }
    };
    // Bit 0 does not count, except where a whole slot is compared with 0.
    slots.map(|slot| if slot > 4 && chance(random, 30) { slot ^ 1 } else { slot })
}
