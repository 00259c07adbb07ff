//! Which values may legally be read.
//!
//! Every sector has a history of writes, each with the number that it put there. A number X may be
//! read on a node unless it is *dominated* there: some later write W, begun after X had ended,
//! succeeded, ended before the read began, and the node is *obliged* to have W. Who is obliged:
//!
//! * the node that the write went through, if its own disk is UpToDate;
//! * in protocol C the peer, if its disk is UpToDate and connected; in A and B only from the moment
//!   on at which nothing is under way any more;
//! * whoever becomes UpToDate by a resync: to everything that its source is obliged to.
//!
//! A power cut ends the obligation to what no flush covers, and such a write may then be lost
//! altogether ("lossy"). Everything else that gets lost is a violation, unless somebody asked for it
//! (invalidate, discard-my-data, forced promotion, a policy after a split brain).
//! Spec: io-path-and-resync.md §1.11, §15 invariants 2, 3, 5, 6, 34.

use std::collections::BTreeMap;

/// A write and what is known of it.
#[derive(Clone, Debug)]
struct Write {
    begun: u64,
    /// It completed, failed, or was lost in a crash.
    ended: Option<u64>,
    is_ok: bool,
    /// Who must have it.
    obliged: [bool; 2],
    /// On whose disk it must survive a power cut.
    durable: [bool; 2],
    /// It may disappear.
    is_lossy: bool,
    volume: u16,
    through: usize,
}

/// Number of a write.
pub type WriteId = u64;

/// The history of all sectors.
#[derive(Clone, Debug, Default)]
pub struct Oracle {
    writes: BTreeMap<WriteId, Write>,
    /// By volume and sector: writes and the number that each put there; the oldest first.
    sectors: BTreeMap<(u16, u64), Vec<(WriteId, u64)>>,
    /// A clock that never stands still.
    clock: u64,
}

/// How a write ended.
#[derive(Clone, Copy, Debug)]
pub struct End {
    /// With success.
    pub is_ok: bool,
    /// Who has to have it.
    pub obliged: [bool; 2],
    /// It may disappear.
    pub is_lossy: bool,
    /// It is on stable storage of these.
    pub durable: [bool; 2],
}

impl Oracle {
    /// The time now; later than all before.
    pub const fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// A write sets out.
    pub fn begin(&mut self, id: WriteId, volume: u16, through: usize, start: u64, tags: &[u64]) {
        let begun = self.tick();
        self.writes.insert(
            id,
            Write {
                begun,
                ended: None,
                is_ok: false,
                obliged: [false; 2],
                durable: [false; 2],
                is_lossy: false,
                volume,
                through,
            },
        );
        for (sector, tag) in (start..).zip(tags) {
            self.sectors.entry((volume, sector)).or_default().push((id, *tag));
        }
    }

    /// A write has ended.
    pub fn end(&mut self, id: WriteId, end: End) {
        let now = self.tick();
        if let Some(write) = self.writes.get_mut(&id) {
            write.ended = Some(now);
            write.is_ok = end.is_ok;
            write.obliged = end.obliged;
            write.durable = end.durable;
            write.is_lossy = end.is_lossy;
        }
    }

    /// A write never came to an end: nothing is known of it.
    pub fn lose(&mut self, id: WriteId) {
        let now = self.tick();
        if let Some(write) = self.writes.get_mut(&id) {
            write.ended = Some(now);
            write.is_ok = false;
        }
    }

    /// A flush that began at `since` has ended: what had completed before is durable on the disks of
    /// these nodes.
    pub fn flushed(&mut self, volume: u16, since: u64, nodes: [bool; 2]) {
        for write in self.writes.values_mut() {
            let is_before = write.ended.is_some_and(|ended| ended < since);
            if write.volume != volume || !write.is_ok || !is_before {
                continue;
            }
            for (at, is_flushed) in nodes.into_iter().enumerate() {
                write.durable[at] |= is_flushed && write.obliged[at];
            }
        }
    }

    /// Nothing is under way between the nodes: everything that completed is on both, for good.
    pub fn settled(&mut self, volume: u16) {
        for write in self.writes.values_mut() {
            if write.volume == volume && write.is_ok && (write.obliged != [false; 2]) {
                write.obliged = [true; 2];
                write.durable = [true; 2];
            }
        }
        self.prune(volume);
    }

    /// A node has lost what it had not flushed.
    pub fn power_cut(&mut self, node: usize) {
        for write in self.writes.values_mut() {
            if write.obliged[node] && !write.durable[node] {
                write.obliged[node] = false;
                write.is_lossy = true;
            }
        }
    }

    /// A node stopped. What it had completed but perhaps not sent (protocols A and B) may be lost.
    pub fn stopped(&mut self, node: usize, is_synchronous: bool) {
        for write in self.writes.values_mut() {
            if !is_synchronous && write.is_ok && write.through == node && !write.obliged[1 - node] {
                write.is_lossy = true;
            }
        }
    }

    /// Both nodes say that they have the same: they are obliged to the same.
    pub fn merged(&mut self, volume: u16) {
        for write in self.writes.values_mut() {
            if write.volume == volume && write.is_ok {
                let [a, b] = write.obliged;
                write.obliged = if write.is_lossy { [a && b; 2] } else { [a || b; 2] };
            }
        }
    }

    /// A node has copied everything from the other.
    pub fn copied(&mut self, volume: u16, from: usize, to: usize) {
        for write in self.writes.values_mut() {
            if write.volume == volume && write.is_ok {
                write.obliged[to] = write.obliged[from];
                write.durable[to] = write.obliged[from];
            }
        }
    }

    /// What only this node has may be lost: somebody asked for it.
    pub fn forgive(&mut self, volume: u16, node: usize) {
        for write in self.writes.values_mut() {
            if write.volume == volume && write.obliged[node] && !write.obliged[1 - node] {
                write.obliged[node] = false;
                write.is_lossy = true;
            }
        }
    }

    /// Everything that completed may be lost.
    pub fn forgive_all(&mut self, volume: u16) {
        for write in self.writes.values_mut() {
            if write.volume == volume {
                write.obliged = [false; 2];
                write.is_lossy = true;
            }
        }
    }

    /// May this number be on a node's disk, or be read there by a read that began at `since`?
    /// `nodes`: who is responsible; a write dominates if any of them is obliged to have it. With
    /// `is_merging` writes that may be lost do not count.
    pub fn is_legal(
        &self,
        volume: u16,
        sector: u64,
        tag: u64,
        nodes: [bool; 2],
        since: u64,
        is_merging: bool,
    ) -> Result<(), String> {
        let history = self.sectors.get(&(volume, sector)).map_or(&[][..], Vec::as_slice);
        let dominating = |begun_after: u64| {
            history.iter().find_map(|(id, tag)| {
                let write = self.writes.get(id)?;
                let is_obliged = (0..2).any(|at| nodes[at] && write.obliged[at]);
                let is_over = write.ended.is_some_and(|ended| ended < since);
                let counts = write.is_ok && !(is_merging && write.is_lossy);
                (counts && is_obliged && is_over && write.begun > begun_after)
                    .then_some((*id, *tag))
            })
        };
        let mut by = None;
        let mut is_known = false;
        // A sector without history is zero.
        let origin = (tag == 0).then_some(0);
        let ends = history
            .iter()
            .filter(|(_, t)| *t == tag)
            .map(|(id, _)| self.writes.get(id).map_or(0, |w| w.ended.unwrap_or(u64::MAX)));
        for ended in origin.into_iter().chain(ends) {
            is_known = true;
            match dominating(ended) {
                None => return Ok(()),
                Some(write) => by = Some(write),
            }
        }
        if !is_known {
            return Err(format!("volume {volume} sector {sector}: {tag} was never written there"));
        }
        let (id, newer) = by.unwrap_or_default();
        Err(format!(
            "volume {volume} sector {sector}: found {tag}, but write {id} had put {newer} there \
             before and was acknowledged: {:?}",
            self.writes.get(&id)
        ))
    }

    /// Does a disk hold all that a write put there, or what was written at the same time or later?
    pub fn is_held(&self, id: WriteId, disk: impl Fn(u64) -> u64) -> bool {
        let Some(own) = self.writes.get(&id) else { return false };
        let is_newer = |(write, _): &&(WriteId, u64)| {
            self.writes.get(write).is_some_and(|w| w.ended.is_none_or(|ended| ended >= own.begun))
        };
        self.sectors_of(id).into_iter().all(|sector| {
            let history = self.sectors.get(&(own.volume, sector)).map_or(&[][..], Vec::as_slice);
            history.iter().filter(is_newer).any(|(_, tag)| *tag == disk(sector))
        })
    }

    /// The sectors that a write went to.
    pub fn sectors_of(&self, id: WriteId) -> Vec<u64> {
        let Some(volume) = self.writes.get(&id).map(|write| write.volume) else {
            return Vec::new();
        };
        let all = self.sectors.range((volume, 0)..=(volume, u64::MAX));
        let own = all.filter(|(_, history)| history.iter().any(|(write, _)| *write == id));
        own.map(|((_, sector), _)| *sector).collect()
    }

    /// All sectors that were ever written.
    pub fn known_sectors(&self, volume: u16) -> impl Iterator<Item = u64> + '_ {
        self.sectors.range((volume, 0)..=(volume, u64::MAX)).map(|((_, sector), _)| *sector)
    }

    /// Forgets what can never be read again.
    fn prune(&mut self, volume: u16) {
        let writes = &self.writes;
        for history in self
            .sectors
            .range_mut((volume, 0)..=(volume, u64::MAX))
            .map(|(_, history)| history)
            .filter(|history| history.len() > 8)
        {
            let newest = history
                .iter()
                .filter_map(|(id, _)| writes.get(id))
                .filter(|w| w.is_ok && w.obliged == [true; 2] && w.durable == [true; 2])
                .map(|w| w.begun)
                .max();
            if let Some(newest) = newest {
                history.retain(|(id, _)| {
                    writes.get(id).is_none_or(|w| w.ended.is_none_or(|ended| ended >= newest))
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: [bool; 2] = [true; 2];
    const OK: End = End { is_ok: true, obliged: BOTH, is_lossy: false, durable: [false; 2] };

    #[test]
    fn the_last_completed_write_is_read_or_one_that_is_under_way() {
        let mut oracle = Oracle::default();
        oracle.begin(1, 0, 0, 8, &[11]);
        let early = oracle.tick();
        assert!(oracle.is_legal(0, 8, 0, BOTH, early, false).is_ok(), "it may not be there yet");
        assert!(oracle.is_legal(0, 8, 11, BOTH, early, false).is_ok());
        oracle.end(1, OK);
        let now = oracle.tick();
        assert!(oracle.is_legal(0, 8, 0, BOTH, now, false).is_err(), "it was acknowledged");
        assert!(
            oracle.is_legal(0, 8, 0, BOTH, early, false).is_ok(),
            "the read was under way before"
        );
        assert!(oracle.is_legal(0, 8, 11, BOTH, now, false).is_ok());
        assert!(oracle.is_legal(0, 8, 12, BOTH, now, false).is_err(), "nobody wrote that");
    }

    #[test]
    fn a_write_is_held_until_an_older_one_is_found_in_its_place() {
        let mut oracle = Oracle::default();
        oracle.begin(1, 0, 0, 8, &[11]);
        oracle.end(1, OK);
        oracle.begin(2, 0, 0, 8, &[22, 23]);
        oracle.begin(3, 0, 0, 9, &[33]);
        let disk = |first, second| move |sector| if sector == 8 { first } else { second };
        assert!(oracle.is_held(2, disk(22, 23)));
        assert!(oracle.is_held(2, disk(22, 33)), "overwritten");
        assert!(!oracle.is_held(2, disk(11, 23)));
        assert!(!oracle.is_held(2, disk(22, 0)));
    }

    #[test]
    fn two_writes_at_a_time_may_end_in_either_order() {
        let mut oracle = Oracle::default();
        oracle.begin(1, 0, 0, 8, &[11]);
        oracle.begin(2, 0, 0, 8, &[22]);
        oracle.end(2, OK);
        oracle.end(1, OK);
        let now = oracle.tick();
        assert!(oracle.is_legal(0, 8, 11, BOTH, now, false).is_ok());
        assert!(oracle.is_legal(0, 8, 22, BOTH, now, false).is_ok());
    }

    #[test]
    fn a_power_cut_loses_what_was_not_flushed_and_nothing_else() {
        let mut oracle = Oracle::default();
        oracle.begin(1, 0, 0, 8, &[11]);
        oracle.end(1, OK);
        let since = oracle.tick();
        oracle.flushed(0, since, [true; 2]);
        oracle.begin(2, 0, 0, 8, &[22]);
        oracle.end(2, OK);
        oracle.power_cut(1);
        let now = oracle.tick();
        assert!(oracle.is_legal(0, 8, 11, [false, true], now, false).is_ok());
        assert!(oracle.is_legal(0, 8, 0, [false, true], now, false).is_err(), "11 was flushed");
        assert!(oracle.is_legal(0, 8, 11, [true, false], now, false).is_err(), "node 0 has power");
    }
}
