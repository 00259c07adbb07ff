//! Resyncs that wait for others: `resync-after`.
//!
//! The rules look at all volumes of the node, over the borders of resources. Whoever changes
//! something that they look at asks [`Table`] which volumes pause or go on now, and gives each of
//! these its new `aftr_isp`.
//! Spec: states-and-generations.md §11.4.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use drbd_types::{Cstate, Dstate, Failure, Fields, Minor};

/// Highest minor number that `resync-after` may name.
pub const MINOR_MAX: u32 = 1_048_575;

/// What the rules know of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// `resync-after` of its disk.
    pub resync_after: Option<Minor>,
    /// Connection and replication.
    pub conn: Cstate,
    /// Own disk.
    pub disk: Dstate,
    /// Paused by a dependency.
    pub aftr_isp: bool,
    /// Paused by the peer.
    pub peer_isp: bool,
    /// Paused by the administrator.
    pub user_isp: bool,
}

impl Row {
    /// From a volume's state and its disk's setting.
    pub const fn new(f: &Fields, resync_after: Option<Minor>) -> Self {
        Self {
            resync_after,
            conn: f.conn,
            disk: f.disk,
            aftr_isp: f.aftr_isp,
            peer_isp: f.peer_isp,
            user_isp: f.user_isp,
        }
    }

    /// Others have to wait for it: a resync or verify runs or is paused, or would be paused.
    fn keeps_waiting(&self) -> bool {
        let runs = Cstate::SyncSource <= self.conn && self.conn <= Cstate::PausedSyncT;
        runs || self.aftr_isp || self.peer_isp || self.user_isp
    }

    /// Evaluated when something changes; a volume of which nothing is configured is not.
    fn counts(&self) -> bool {
        self.conn != Cstate::StandAlone || self.disk != Dstate::Diskless
    }
}

/// A volume whose `aftr_isp` becomes this. It is a fact: nothing may refuse it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Which volume.
    pub minor: Minor,
    /// Its new `aftr_isp`.
    pub aftr_isp: bool,
}

/// All volumes of the node, by minor number.
#[derive(Clone, Debug, Default)]
pub struct Table(pub BTreeMap<Minor, Row>);

impl Table {
    /// May the volume sync now? A volume that does not exist may.
    pub fn may_sync_now(&self, minor: Minor) -> bool {
        let mut at = self.0.get(&minor);
        // No chain is longer than the table; a longer walk goes in a circle that has been
        // completely looked at.
        for _ in 0..=self.0.len() {
            let Some(row) = at.filter(|row| row.disk != Dstate::Diskless) else { return true };
            let Some(before) = row.resync_after else { return true };
            at = self.0.get(&before);
            if at.is_some_and(Row::keeps_waiting) {
                return false;
            }
        }
        true
    }

    /// May `minor` be told to wait for `after`? Depending on a volume that does not exist or has
    /// no disk is fine.
    ///
    /// # Errors
    /// A number that no volume can have, or a chain that leads back to the volume.
    pub fn check(&self, minor: Minor, after: Option<Minor>) -> Result<(), Failure> {
        let Some(mut at) = after else { return Ok(()) };
        if at.0 > MINOR_MAX {
            return Err(Failure::ResyncAfterInvalid);
        }
        for _ in 0..=self.0.len() {
            if at == minor {
                return Err(Failure::ResyncAfterCycle);
            }
            let row = self.0.get(&at).filter(|row| row.disk != Dstate::Diskless);
            match row.and_then(|row| row.resync_after) {
                Some(before) => at = before,
                None => return Ok(()),
            }
        }
        Err(Failure::ResyncAfterCycle)
    }

    /// Pauses whoever may not sync now: when a resync starts, and when a volume without pause bit
    /// gets one (A15). The table is changed accordingly.
    pub fn pause(&mut self) -> Vec<Turn> {
        self.turn(|row, may| !row.aftr_isp && !may)
    }

    /// Lets go on whoever is paused and may sync now, until nothing changes: one that goes on may
    /// be what another one waits for (A23, A27). The table is changed accordingly.
    pub fn resume(&mut self) -> Vec<Turn> {
        let mut turns = Vec::new();
        // Each round but the last clears a bit that no round sets.
        loop {
            let round = self.turn(|row, may| row.aftr_isp && may);
            if round.is_empty() {
                return turns;
            }
            turns.extend(round);
        }
    }

    /// Pauses and lets go on until nothing changes: after a new `resync-after`, and after an
    /// attach. The table is changed accordingly; the turns are one per volume that ends up
    /// different.
    pub fn settle(&mut self) -> Vec<Turn> {
        let before = self.0.clone();
        // Without circles a volume settles one round after the one that it waits for.
        for _ in 0..=self.0.len() {
            let changed = !self.pause().is_empty() | !self.resume().is_empty();
            if !changed {
                break;
            }
        }
        let changed = |(minor, row): (&Minor, &Row)| {
            let was = before.get(minor).is_some_and(|old| old.aftr_isp);
            (was != row.aftr_isp).then_some(Turn { minor: *minor, aftr_isp: row.aftr_isp })
        };
        self.0.iter().filter_map(changed).collect()
    }

    /// One round in the order of the minor numbers; each turn counts for those behind it.
    fn turn(&mut self, turns_over: impl Fn(&Row, bool) -> bool) -> Vec<Turn> {
        let minors: Vec<Minor> = self.0.keys().copied().collect();
        let mut turns = Vec::new();
        for minor in minors {
            let may = self.may_sync_now(minor);
            let Some(row) = self.0.get_mut(&minor) else { continue };
            if row.counts() && turns_over(row, may) {
                row.aftr_isp = !row.aftr_isp;
                turns.push(Turn { minor, aftr_isp: row.aftr_isp });
            }
        }
        turns
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resync::chance::Chance;
    use Cstate::{Ahead, Connected, PausedSyncT, StandAlone, SyncSource, SyncTarget, VerifyS};
    use Dstate::{Diskless, Inconsistent, UpToDate};

    const IDLE: Row = Row {
        resync_after: None,
        conn: Connected,
        disk: UpToDate,
        aftr_isp: false,
        peer_isp: false,
        user_isp: false,
    };

    fn after(n: u32) -> Row {
        Row { resync_after: Some(Minor(n)), ..IDLE }
    }

    fn table(rows: &[(u32, Row)]) -> Table {
        Table(rows.iter().map(|(n, row)| (Minor(*n), *row)).collect())
    }

    fn turns(list: &[Turn]) -> Vec<(u32, bool)> {
        list.iter().map(|t| (t.minor.0, t.aftr_isp)).collect()
    }

    #[test]
    #[rustfmt::skip]
    fn who_may_sync() {
        let rows = [
            ("nobody before it", IDLE, true),
            ("a resync before it", Row { conn: SyncSource, ..IDLE }, false),
            ("a paused one", Row { conn: PausedSyncT, disk: Inconsistent, ..IDLE }, false),
            ("a verify", Row { conn: VerifyS, ..IDLE }, false),
            ("congestion is no resync", Row { conn: Ahead, ..IDLE }, true),
            ("paused by the administrator", Row { user_isp: true, ..IDLE }, false),
            ("paused by the peer", Row { peer_isp: true, ..IDLE }, false),
            ("paused by a dependency", Row { aftr_isp: true, ..IDLE }, false),
            ("its state counts even without a disk", Row { user_isp: true, disk: Diskless, ..IDLE }, false),
        ];
        for (what, before, expected) in rows {
            let t = table(&[(0, before), (1, after(0))]);
            assert_eq!(t.may_sync_now(Minor(1)), expected, "{what}");
            assert!(t.may_sync_now(Minor(0)), "{what}");
            let chain = table(&[(0, before), (1, after(0)), (2, after(1))]);
            assert_eq!(chain.may_sync_now(Minor(2)), expected, "{what}, two steps away");
            let cut = table(&[(0, before), (1, Row { disk: Diskless, ..after(0) }), (2, after(1))]);
            assert!(cut.may_sync_now(Minor(2)), "{what}: a diskless volume ends the chain");
        }
        let missing = table(&[(1, after(0))]);
        assert!(missing.may_sync_now(Minor(1)) && missing.may_sync_now(Minor(7)));
    }

    #[test]
    fn cycles_are_refused() {
        let t = table(&[
            (0, IDLE),
            (1, after(0)),
            (2, after(1)),
            (3, Row { disk: Diskless, ..after(2) }),
        ]);
        assert_eq!(t.check(Minor(0), Some(Minor(0))), Err(Failure::ResyncAfterCycle), "itself");
        assert_eq!(t.check(Minor(0), Some(Minor(1))), Err(Failure::ResyncAfterCycle));
        assert_eq!(t.check(Minor(0), Some(Minor(2))), Err(Failure::ResyncAfterCycle));
        assert_eq!(t.check(Minor(0), Some(Minor(3))), Ok(()), "a diskless volume ends the chain");
        assert_eq!(t.check(Minor(0), Some(Minor(99))), Ok(()), "missing is allowed");
        assert_eq!(t.check(Minor(2), Some(Minor(0))), Ok(()));
        assert_eq!(t.check(Minor(0), None), Ok(()));
        assert_eq!(t.check(Minor(0), Some(Minor(MINOR_MAX))), Ok(()));
        let invalid = t.check(Minor(0), Some(Minor(MINOR_MAX + 1))).unwrap_err();
        assert_eq!((invalid.number(), Failure::ResyncAfterCycle.number()), (132, 133));
    }

    /// Two volumes swap roles: the chain that a check ends at a diskless volume may become a
    /// circle when that one is attached, so the attach checks too.
    #[test]
    fn an_existing_circle_does_not_hang_anything() {
        let mut t = table(&[(0, after(1)), (1, after(0)), (2, after(0))]);
        assert!(t.may_sync_now(Minor(2)));
        assert_eq!(t.check(Minor(2), Some(Minor(0))), Err(Failure::ResyncAfterCycle));
        assert_eq!(t.settle(), []);
        t.0.get_mut(&Minor(1)).unwrap().conn = SyncTarget;
        assert!(!t.may_sync_now(Minor(2)));
        t.settle();
    }

    #[test]
    fn a_chain_runs_one_after_the_other() {
        let sync = |row: Row| Row { conn: SyncTarget, disk: Inconsistent, ..row };
        let mut t = table(&[(0, sync(IDLE)), (1, sync(after(0))), (2, sync(after(1)))]);
        assert_eq!(turns(&t.pause()), [(1, true), (2, true)]);
        assert_eq!(t.pause(), []);
        assert_eq!(t.resume(), []);
        t.0.insert(Minor(0), IDLE);
        assert_eq!(turns(&t.resume()), [(1, false)], "the third waits for the second");
        t.0.insert(Minor(1), after(0));
        assert_eq!(turns(&t.resume()), [(2, false)]);
        assert_eq!(t.settle(), []);
    }

    #[test]
    fn numbers_against_the_order_of_the_chain_settle_too() {
        let paused = |row: Row| Row { aftr_isp: true, ..row };
        let mut t = table(&[(1, paused(after(2))), (2, paused(after(3))), (3, IDLE)]);
        assert_eq!(turns(&t.resume()), [(2, false), (1, false)]);
    }

    #[test]
    fn unconfigured_volumes_are_left_alone() {
        let gone = Row { conn: StandAlone, disk: Diskless, aftr_isp: true, ..IDLE };
        let mut t = table(&[(0, gone)]);
        assert_eq!(t.settle(), []);
        let alone = Row { disk: UpToDate, ..gone };
        assert_eq!(turns(&table(&[(0, alone)]).settle()), [(0, false)]);
    }

    #[test]
    fn a_new_setting_settles() {
        let mut t =
            table(&[(0, Row { conn: SyncSource, ..IDLE }), (1, Row { conn: SyncSource, ..IDLE })]);
        t.0.get_mut(&Minor(1)).unwrap().resync_after = Some(Minor(0));
        assert_eq!(turns(&t.settle()), [(1, true)]);
        t.0.get_mut(&Minor(1)).unwrap().resync_after = None;
        assert_eq!(turns(&t.settle()), [(1, false)]);
    }

    /// Any table without circles: afterwards exactly those are paused that may not sync, and
    /// somebody who has something to sync may.
    #[test]
    fn settled_means_settled() {
        let mut chance = Chance::new(11);
        for _ in 0..20_000 {
            let count = 1 + chance.below_u32(7);
            let mut t = Table::default();
            for n in 0..count {
                let (user_isp, peer_isp) = (chance.percent(10), chance.percent(10));
                let conn = chance.of(Cstate::ALL);
                let disk = chance.of(&[Diskless, Inconsistent, UpToDate]);
                let aftr_isp = chance.percent(40);
                let row = Row { resync_after: None, conn, disk, aftr_isp, user_isp, peer_isp };
                t.0.insert(Minor(n * 7 % 8), row);
            }
            for n in 0..8 {
                let after = chance.percent(70).then(|| Minor(chance.below_u32(9)));
                if t.check(Minor(n), after).is_ok()
                    && let Some(row) = t.0.get_mut(&Minor(n))
                {
                    row.resync_after = after;
                }
            }
            let before = t.clone();
            let list = t.settle();
            for turn in &list {
                assert_ne!(before.0[&turn.minor].aftr_isp, turn.aftr_isp);
                assert_eq!(t.0[&turn.minor].aftr_isp, turn.aftr_isp);
            }
            for (minor, row) in t.0.iter().filter(|(_, row)| row.counts()) {
                assert_eq!(row.aftr_isp, !t.may_sync_now(*minor), "{before:?}\n{t:?}");
            }
            assert_eq!(t.settle(), [], "{before:?}\n{t:?}");
        }
    }
}
