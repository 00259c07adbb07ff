//! A process that dies as Primary and is started again while the machine goes on.
//!
//! A file system that was mounted on the device is still mounted, and believes that the device holds
//! what it has seen there and written. The node may be Primary again for it only if that is true:
//! nobody else may have written since. After a crash of the whole machine that does not matter, since
//! no file system has survived; here a promotion that the original's rules allow could be fatal.
//!
//! Who else may have written? Only the peer, as Primary.
//!
//! * **While this process was away.** A Primary that is alone begins a new generation before its
//!   first write (G1, spec/states-and-generations.md §3.3), so the peer's current identifier differs
//!   from ours, and the handshake makes this node the target (rules 50 and 60), or finds a split
//!   brain, whose loser becomes a target too. Both are seen as a state of a target, or as a disk that
//!   is no longer good. If the peer was promoted and wrote nothing, the identifiers are equal, the
//!   data are ours, and the handshake lets us be the source (rule 40).
//! * **Before the handshake** nothing is known of the peer. It may be Primary at this moment: a node
//!   that was connected when it died waits for the handshake, however long that takes, unless the
//!   administrator decides. A node that was alone when it died (ConnectedInd clear) goes on alone as
//!   it would have done without dying: what the peer did meanwhile is a split brain in either case.
//! * **After the handshake** the peer can become Primary before we do. That is seen as its role; with
//!   `allow-two-primaries` it is no reason to stop, because then whoever shares the device (a cluster
//!   file system) keeps its caches coherent by its own means.
//!
//! Whatever ends the right to go on, ends it for good: not even a later resync brings it back.
//! A demotion in good order ends it, too. What only a promotion decides is checked by the rules of
//! every promotion; [`Resumption::Ready`] says that it may be tried.

use drbd_types::{Cstate, Dstate, Fields, Role, VolumeNr};
use drbdmeta::superblock::Flags;

use crate::state::facts;

use super::Core;

/// The node went down as Primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Resumable {
    /// Without its peer.
    was_alone: bool,
}

/// May a node that went down as Primary be so again for those who still have its device open?
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Resumption {
    /// No, or no more.
    #[default]
    No,
    /// Not before the peer has been met.
    Waits,
    /// Now.
    Ready,
}

/// With these stored flags, in this state.
pub(super) fn at_attach(flags: Flags, state: &Fields) -> Option<Resumable> {
    let is_good = flags.contains(Flags::CONSISTENT | Flags::WAS_UP_TO_DATE);
    let was_primary = facts::crashed_primary_at_attach(flags, state);
    let is_new = state.role == Role::Secondary && state.conn < Cstate::Connected;
    let was_alone = flags.contains(Flags::PRIMARY) && !flags.contains(Flags::CONNECTED);
    (is_good && was_primary && is_new).then_some(Resumable { was_alone })
}

/// Does this change mean that others write, or may have written?
fn is_over(old: &Fields, new: &Fields, two_primaries: bool) -> bool {
    let is_target = matches!(
        new.conn,
        Cstate::StartingSyncT
            | Cstate::WFBitMapT
            | Cstate::WFSyncUUID
            | Cstate::SyncTarget
            | Cstate::PausedSyncT
            | Cstate::Behind
    );
    let is_lost = new.disk == Dstate::Diskless && old.disk > Dstate::Attaching;
    let is_bad = matches!(new.disk, Dstate::Failed | Dstate::Inconsistent | Dstate::Outdated);
    let others = new.peer == Role::Primary && new.role != Role::Primary && !two_primaries;
    let demoted = old.role == Role::Primary && new.role != Role::Primary;
    is_target || is_lost || is_bad || others || demoted
}

impl Core {
    pub(super) fn follow_resumption(&mut self, nr: VolumeNr, old: &Fields, new: &Fields) {
        let two_primaries = self.conn.net.as_ref().is_some_and(|net| net.two_primaries);
        if is_over(old, new, two_primaries)
            && let Some(volume) = self.volume_mut(nr)
        {
            volume.marks.resumable = None;
        }
    }

    /// What an administrator's tool may do.
    pub(super) fn resumption(&self, nr: VolumeNr) -> Resumption {
        let Some(volume) = self.volume(nr) else { return Resumption::No };
        let Some(resumable) = volume.marks.resumable else { return Resumption::No };
        let state = &volume.state;
        let has_met = state.conn >= Cstate::Connected;
        let is_attached = state.disk >= Dstate::Consistent;
        let is_alone = resumable.was_alone && !self.conn.is_up;
        if is_attached && (has_met || is_alone) { Resumption::Ready } else { Resumption::Waits }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRIMARY: Flags = Flags::CONSISTENT.union(Flags::WAS_UP_TO_DATE).union(Flags::PRIMARY);

    fn fields(conn: Cstate, role: Role, peer: Role, disk: Dstate) -> Fields {
        Fields { conn, role, peer, disk, ..Fields::NEW }
    }

    #[test]
    fn only_a_primary_with_good_data_can_go_on() {
        let new = Fields::NEW;
        let check = |flags, expected: Option<bool>| {
            assert_eq!(at_attach(flags, &new).map(|r| r.was_alone), expected, "{flags:?}");
        };
        check(PRIMARY, Some(true));
        check(PRIMARY | Flags::CONNECTED, Some(false));
        // Died again before it was Primary again.
        let again = PRIMARY.difference(Flags::PRIMARY) | Flags::CRASHED_PRIMARY;
        check(again, Some(false));
        check(again | Flags::CONNECTED, Some(false));
        check(PRIMARY.difference(Flags::PRIMARY), None);
        check(PRIMARY.difference(Flags::WAS_UP_TO_DATE), None);
        check(PRIMARY.difference(Flags::CONSISTENT), None);
        // A disk that comes back to a Primary.
        let primary = Fields { role: Role::Primary, ..new };
        assert_eq!(at_attach(PRIMARY, &primary), None);
    }

    #[test]
    fn the_right_to_go_on_ends_when_others_may_write() {
        use Role::{Primary, Secondary, Unknown};
        let good = Dstate::UpToDate;
        let met = fields(Cstate::Connected, Secondary, Secondary, good);
        let away = fields(Cstate::WFConnection, Secondary, Unknown, good);
        let check = |old: &Fields, new: Fields, expected| {
            assert_eq!(is_over(old, &new, false), expected, "{old:?} {new:?}");
        };
        check(&away, met, false);
        check(&met, away, false);
        check(&away, fields(Cstate::WFBitMapS, Secondary, Secondary, good), false);
        check(&away, fields(Cstate::WFBitMapT, Secondary, Secondary, good), true);
        check(&met, fields(Cstate::PausedSyncT, Secondary, Secondary, Dstate::Inconsistent), true);
        check(&away, fields(Cstate::Connected, Secondary, Primary, good), true);
        check(&met, fields(Cstate::Connected, Secondary, Primary, good), true);
        assert!(!is_over(&met, &fields(Cstate::Connected, Secondary, Primary, good), true));
        check(&met, fields(Cstate::Connected, Primary, Secondary, good), false);
        check(&fields(Cstate::Connected, Primary, Secondary, good), met, true);
        check(&met, fields(Cstate::Connected, Secondary, Secondary, Dstate::Outdated), true);
        check(&met, fields(Cstate::Connected, Secondary, Secondary, Dstate::Diskless), true);
        // On the way up.
        let steps = [Dstate::Attaching, Dstate::Negotiating, Dstate::Consistent, good];
        for pair in [&[Dstate::Diskless][..], &steps].concat().windows(2) {
            let of = |disk| fields(Cstate::StandAlone, Secondary, Unknown, disk);
            check(&of(pair[0]), of(pair[1]), false);
        }
    }
}
