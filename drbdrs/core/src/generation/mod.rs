//! Data generations: the four identifiers of a volume, how they change, and how two nodes compare.
//!
//! Purpose: names for "which data is this" that survive crashes, so that two nodes can tell whose
//! data is newer. Invariant kept: a value leaves `bitmap` only into the history, except in
//! [`Slots::new_current`], where the original loses it too (spec §3.2).
//! Spec: states-and-generations.md §3, §4.

pub mod compare;
pub mod decide;
#[cfg(test)]
mod exhaustive;
pub mod explain;
#[cfg(test)]
mod history;
pub mod splitbrain;

use core::fmt;

use drbd_types::{Gi, Role};

use self::compare::SYNC_OFFSET;

/// The four generation identifiers of a volume. Spec §3.1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Slots {
    /// Names the data on the disk; bit 0 says whether this node is Primary.
    pub current: Gi,
    /// The generation that the bitmap refers to; 0: in sync, or nothing recorded.
    pub bitmap: Gi,
    /// Older generations, newest first.
    pub history: [Gi; 2],
}

/// "Just created": meta-data was initialised, the data was never used.
pub const JUST_CREATED: Gi = Gi(4);

impl Slots {
    /// What create-md stores.
    pub const CREATED: Self =
        Self { current: JUST_CREATED, bitmap: Gi(0), history: [Gi(0), Gi(0)] };

    /// Sets the current identifier; its bit 0 follows the role. Spec §3.2 "set".
    pub fn set_current(&mut self, value: Gi, role: Role) {
        self.current = value.with_flag(role == Role::Primary);
    }

    /// Bit 0 of the current identifier follows a change of the role.
    pub fn follow_role(&mut self, role: Role) {
        self.current = self.current.with_flag(role == Role::Primary);
    }

    /// Puts a new value into the bitmap slot; the old one goes to the history.
    /// Spec §3.2 "rotate-set".
    pub fn rotate_bitmap(&mut self, value: Gi) {
        if self.bitmap != Gi(0) {
            self.push_history(self.bitmap);
        }
        self.bitmap = value;
    }

    /// Empties the bitmap slot into the history. Spec §3.2 "clear-bitmap-uuid".
    pub fn clear_bitmap(&mut self) {
        if self.bitmap != Gi(0) {
            self.push_history(self.bitmap);
            self.bitmap = Gi(0);
        }
    }

    /// A new generation begins: the bitmap now counts from the old one.
    /// Returns the bitmap identifier that was lost, if there was one (the caller logs it).
    /// Spec §3.2 "new-current", §3.3.
    pub fn new_current(&mut self, random: Gi, role: Role) -> Option<Gi> {
        let lost = (self.bitmap != Gi(0)).then_some(self.bitmap);
        self.bitmap = self.current;
        self.set_current(random, role);
        lost
    }

    /// A Primary writes without its peer from now on: it lost the peer's data, or was promoted
    /// without it. What it writes belongs to a new generation. Spec §3.3 G1, G3.
    ///
    /// The original begins none while the bitmap slot is in use, that is after a resync was
    /// interrupted. If its target had just finished (and the source missed that), both nodes then
    /// have the same current identifier; if both are promoted before they meet again, rule 50
    /// throws the source's writes away without noticing a split brain. Here a generation begins in
    /// that case too: the bitmap keeps its base, so an interrupted resync goes on with the bitmap,
    /// and the old identifier goes to the history, so a target that had finished gets a full resync
    /// (rule 80), and one that was promoted is a split brain.
    ///
    /// If the bitmap counts from a sync identifier, its base stays in front: the target may not have
    /// got that identifier (rule 71).
    ///
    /// To be called only if the current identifier was ever sent to the peer: otherwise nobody
    /// else can have it, and nothing is gained by using up the history.
    pub fn begin_generation(&mut self, random: Gi, role: Role) {
        if self.bitmap == Gi(0) {
            self.new_current(random, role);
        } else {
            let base = self.history[0];
            let is_sync = self.bitmap.same(Gi(base.0.wrapping_add(SYNC_OFFSET)));
            if is_sync && base != Gi(0) {
                self.history[1] = self.current;
            } else {
                self.push_history(self.current);
            }
            self.set_current(random, role);
        }
    }

    /// The source starts a resync: returns the sync identifier that the target gets.
    /// `random` is used when there is no generation to derive it from. Spec §3.4.
    pub fn start_as_source(&mut self, random: Gi) -> Gi {
        let base = self.bitmap;
        let sync = if base == Gi(0) || base == JUST_CREATED {
            random
        } else {
            Gi(base.0.wrapping_add(SYNC_OFFSET))
        };
        self.rotate_bitmap(sync);
        sync
    }

    /// The target starts a resync. Spec §3.4.
    ///
    /// The current identifier is not kept in the history: while inconsistent, this disk is named
    /// after the generation that the source's bitmap counts from, so that an interrupted resync is
    /// continued with the bitmap (rules 50 and 70).
    pub fn start_as_target(&mut self, sync: Gi, role: Role) {
        self.set_current(sync, role);
        self.bitmap = Gi(0);
    }

    /// The target finished without failed blocks and takes over the source's identifiers.
    /// `peer` is what the source sent last. Spec §3.4, steps 1 to 3; step 4 is
    /// [`Self::clear_bitmap`] on both sides.
    pub fn finish_as_target(&mut self, peer: &Self, role: Role) {
        self.bitmap = peer.bitmap;
        self.history = peer.history;
        let own = self.current;
        self.rotate_bitmap(own);
        self.set_current(peer.current, role);
    }

    fn push_history(&mut self, value: Gi) {
        self.history = [value, self.history[0]];
    }
}

/// As everywhere in logs and tools: 16 upper-case hex digits each, joined by colons.
impl fmt::Display for Slots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [h1, h2] = self.history;
        write!(f, "{:016X}:{:016X}:{:016X}:{:016X}", self.current.0, self.bitmap.0, h1.0, h2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const N: Gi = Gi(0x1000);
    const X: Gi = Gi(0x2000);
    const R: Gi = Gi(0x3000);

    #[test]
    fn worked_example_link_lost_and_resynced() {
        // Spec §3.9, first table: A is Primary, B Secondary, both x:0.
        let mut a = Slots { current: X.with_flag(true), ..Slots::default() };
        let mut b = Slots { current: X, ..Slots::default() };
        assert_eq!(a.new_current(N, Role::Primary), None);
        assert_eq!((a.current, a.bitmap), (N.with_flag(true), X.with_flag(true)));
        let sync = a.start_as_source(R);
        assert_eq!(sync, Gi(X.0 + 1 + SYNC_OFFSET));
        assert_eq!((a.bitmap, a.history[0]), (sync, X.with_flag(true)));
        let packet = a;
        b.start_as_target(sync, Role::Secondary);
        assert_eq!((b.current, b.bitmap), (sync.with_flag(false), Gi(0)));
        // The snapshot that B finishes with is from before the rotation or after it: both give
        // the same current identifier and a history that names the sync identifier.
        b.finish_as_target(&packet, Role::Secondary);
        b.clear_bitmap();
        a.clear_bitmap();
        assert!(a.current.same(b.current));
        assert!(a.history[0].same(b.history[0]));
        assert_eq!((a.bitmap, b.bitmap), (Gi(0), Gi(0)));
    }

    #[test]
    fn forced_promotion_of_a_fresh_pair_uses_a_random_sync_identifier() {
        let mut a = Slots::CREATED;
        a.new_current(N, Role::Primary);
        assert_eq!(a.bitmap, JUST_CREATED);
        assert_eq!(a.start_as_source(R), R);
        assert_eq!((a.bitmap, a.history[0]), (R, JUST_CREATED));
    }

    #[test]
    fn a_target_that_got_no_sync_identifier_is_known_after_any_number_of_generations() {
        let mut a = Slots { current: N, bitmap: X, history: [Gi(0); 2] };
        for attempt in 0..5 {
            a.start_as_source(R);
            a.begin_generation(Gi(0x5000 + 0x10 * attempt), Role::Primary);
            // What rule 71 looks for, and how it corrects the slots.
            assert_eq!((a.bitmap, a.history[0]), (Gi(X.0 + SYNC_OFFSET), X));
            (a.bitmap, a.history[0]) = (X, a.history[1]);
        }
    }

    #[test]
    fn second_new_current_reports_the_lost_bitmap_identifier() {
        let mut a = Slots { current: X, bitmap: N, history: [Gi(0); 2] };
        assert_eq!(a.new_current(R, Role::Secondary), Some(N));
        assert_eq!(a.bitmap, X);
    }
}
