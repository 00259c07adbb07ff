//! Which values may be read from each sector: a function of the records of a journal.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::content::Found;

/// What a journal consists of. Every record is a tick of the journal's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// Sets the clock.
    Clock(u64),
    /// A write is about to be asked for. Its number is the clock's next tick.
    Write(Write),
    /// It has been acknowledged.
    Done(u64),
    /// A flush has been acknowledged that was asked for at this time.
    Flushed(u64),
    /// All that has been acknowledged is on both nodes.
    Settled,
    /// The sectors were read and contain this write; it is all they may contain from now on.
    Verified {
        /// First sector.
        first: u64,
        /// Number of sectors.
        count: u32,
        /// Number of the write; 0: never written.
        number: u64,
    },
}

/// A write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Write {
    /// Its number: the time when it was asked for.
    pub number: u64,
    /// First sector.
    pub first: u64,
    /// Number of sectors.
    pub count: u32,
    /// Writes zeroes.
    pub is_zeroes: bool,
    /// Its acknowledgement is a flush of itself.
    pub fua: bool,
}

impl Write {
    /// Its sectors.
    pub fn sectors(&self) -> Range<u64> {
        self.first..self.first + u64::from(self.count)
    }
}

/// What may have been lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// No acknowledged write: the process of a node ended, or the other node has all.
    Nothing,
    /// What was not flushed: the power was cut.
    Unflushed,
    /// The newest writes, as a whole: the other node takes over under protocol A (or B, when its
    /// own process ended too). Nothing that was settled, and nothing that was acknowledged before a
    /// write was asked for that is there.
    Newest,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    write: Write,
    done: Option<u64>,
}

/// The state after some records.
#[derive(Clone, Debug)]
pub struct Ledger {
    clock: u64,
    flushed: u64,
    settled: u64,
    writes: BTreeMap<u64, Known>,
    /// For each sector the writes that may be there, in the order in which they were asked for;
    /// writes to a sector follow each other. Empty: never written.
    sectors: Vec<Vec<u64>>,
}

impl Ledger {
    /// Of a device that reads as zeroes.
    pub fn new(sectors: u64) -> Self {
        let len = usize::try_from(sectors).unwrap_or(usize::MAX);
        Self {
            clock: 0,
            flushed: 0,
            settled: 0,
            writes: BTreeMap::new(),
            sectors: vec![Vec::new(); len],
        }
    }

    /// The number of sectors.
    pub fn len(&self) -> u64 {
        self.sectors.len() as u64
    }

    /// Has it no sectors?
    pub fn is_empty(&self) -> bool {
        self.sectors.is_empty()
    }

    /// The time.
    pub fn clock(&self) -> u64 {
        self.clock
    }

    /// Takes a record in; `None` if it does not fit those before it.
    pub fn apply(&mut self, record: &Record) -> Option<()> {
        self.clock += 1;
        match *record {
            Record::Clock(clock) => self.clock = clock,
            Record::Write(write) => {
                if write.number != self.clock {
                    return None;
                }
                for sector in self.range_mut(write.sectors())? {
                    if sector.is_empty() {
                        sector.push(0);
                    }
                    sector.push(write.number);
                }
                self.writes.insert(write.number, Known { write, done: None });
            }
            Record::Done(number) => self.writes.get_mut(&number)?.done = Some(self.clock),
            Record::Flushed(asked) => self.flushed = self.flushed.max(asked),
            Record::Settled => self.settled = self.clock,
            Record::Verified { first, count, number } => {
                for sector in self.range_mut(first..first.checked_add(count.into())?)? {
                    *sector = vec![number];
                }
            }
        }
        Some(())
    }

    fn range_mut(&mut self, sectors: Range<u64>) -> Option<&mut [Vec<u64>]> {
        let range = usize::try_from(sectors.start).ok()?..usize::try_from(sectors.end).ok()?;
        self.sectors.get_mut(range)
    }

    fn history(&self, sector: u64) -> &[u64] {
        let history = usize::try_from(sector).ok().and_then(|n| self.sectors.get(n));
        history.map_or(&[], Vec::as_slice)
    }

    /// Was the sector ever written?
    pub fn is_written(&self, sector: u64) -> bool {
        !self.history(sector).is_empty()
    }

    fn is_safe(&self, number: u64, loss: Loss) -> bool {
        let Some(Known { write, done: Some(done) }) = self.writes.get(&number) else {
            return false;
        };
        match loss {
            Loss::Nothing => true,
            Loss::Unflushed => write.fua || *done <= self.flushed,
            Loss::Newest => *done <= self.settled,
        }
    }

    /// The writes of a sector that may legally be there, the oldest first.
    pub fn legal(&self, sector: u64, loss: Loss) -> &[u64] {
        let history = self.history(sector);
        let safe = history.iter().rposition(|number| self.is_safe(*number, loss)).unwrap_or(0);
        history.get(safe..).unwrap_or_default()
    }

    fn is_zeroes(&self, number: u64) -> bool {
        number == 0 || self.writes.get(&number).is_some_and(|known| known.write.is_zeroes)
    }

    /// Which of the legal writes was found; where several look the same, the newest.
    pub fn which(&self, sector: u64, found: Found, loss: Loss) -> Option<u64> {
        let legal = self.legal(sector, loss);
        let is_it = |number: &&u64| match found {
            Found::Zeroes => self.is_zeroes(**number),
            Found::Write(found) => found == **number && !self.is_zeroes(**number),
            Found::Alien => false,
        };
        if legal.is_empty() && found == Found::Zeroes {
            return Some(0);
        }
        legal.iter().rev().find(is_it).copied()
    }

    /// The last write of the sector that was acknowledged before this time, if it is newer than
    /// `than`.
    pub fn newer_before(&self, sector: u64, than: u64, time: u64) -> Option<u64> {
        let was_done = |number: &&u64| {
            let done = self.writes.get(number).and_then(|known| known.done);
            **number > than && done.is_some_and(|done| done < time)
        };
        self.history(sector).iter().rev().find(was_done).copied()
    }

    /// How many acknowledged writes of the sector are newer.
    pub fn count_newer(&self, sector: u64, than: u64) -> usize {
        let is_newer = |number: &&u64| {
            **number > than && self.writes.get(number).is_some_and(|known| known.done.is_some())
        };
        self.history(sector).iter().filter(is_newer).count()
    }

    /// The records that lead to the same state, if every sector has only one legal value.
    pub fn compact(&self) -> Vec<Record> {
        let mut records: Vec<Record> = Vec::new();
        for (at, history) in (0..).zip(&self.sectors) {
            let Some(&last) = history.last() else { continue };
            let value = if self.is_zeroes(last) { 0 } else { last };
            match records.last_mut() {
                Some(Record::Verified { first, count, number })
                    if *number == value && *first + u64::from(*count) == at =>
                {
                    *count += 1;
                }
                _ => records.push(Record::Verified { first: at, count: 1, number: value }),
            }
        }
        records.push(Record::Clock(self.clock));
        records
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(number: u64, first: u64, count: u32) -> Record {
        Record::Write(Write { number, first, count, is_zeroes: false, fua: false })
    }

    fn ledger(records: &[Record]) -> Ledger {
        let mut ledger = Ledger::new(8);
        records.iter().for_each(|record| ledger.apply(record).unwrap());
        ledger
    }

    #[test]
    fn what_may_be_lost_decides_what_is_legal() {
        // 1: done and settled, 4: flushed, 7: done, 9: under way.
        let ledger = ledger(&[
            write(1, 0, 2),
            Record::Done(1),
            Record::Settled,
            write(4, 0, 1),
            Record::Done(4),
            Record::Flushed(5),
            write(7, 0, 1),
            Record::Done(7),
            write(9, 0, 1),
        ]);
        assert_eq!(ledger.legal(0, Loss::Nothing), [7, 9]);
        assert_eq!(ledger.legal(0, Loss::Unflushed), [4, 7, 9]);
        assert_eq!(ledger.legal(0, Loss::Newest), [1, 4, 7, 9]);
        assert_eq!(ledger.legal(1, Loss::Newest), [1]);
        assert_eq!(ledger.which(0, Found::Write(4), Loss::Nothing), None);
        assert_eq!(ledger.which(0, Found::Write(9), Loss::Nothing), Some(9));
        assert_eq!(ledger.which(0, Found::Zeroes, Loss::Newest), None);
        assert_eq!(ledger.which(5, Found::Zeroes, Loss::Nothing), Some(0));
        assert_eq!(ledger.which(5, Found::Write(1), Loss::Nothing), None);
    }

    #[test]
    fn a_flush_covers_what_was_done_when_it_was_asked_for() {
        let ledger = ledger(&[write(1, 0, 1), Record::Done(1), Record::Flushed(1)]);
        assert_eq!(ledger.legal(0, Loss::Unflushed), [0, 1]);
    }

    #[test]
    fn a_write_with_fua_is_safe_by_itself() {
        let fua = Write { number: 1, first: 0, count: 1, is_zeroes: true, fua: true };
        let ledger = ledger(&[Record::Write(fua), Record::Done(1)]);
        assert_eq!(ledger.legal(0, Loss::Unflushed), [1]);
        assert_eq!(ledger.which(0, Found::Zeroes, Loss::Unflushed), Some(1));
        assert_eq!(ledger.which(0, Found::Write(1), Loss::Unflushed), None);
    }

    #[test]
    fn a_failed_write_may_be_there_until_the_next_one() {
        let ledger = ledger(&[write(1, 0, 1), write(2, 0, 1), Record::Done(2), write(4, 0, 1)]);
        assert_eq!(ledger.legal(0, Loss::Nothing), [2, 4]);
    }

    #[test]
    fn order_is_what_was_acknowledged_before_something_was_asked_for() {
        let ledger = ledger(&[write(1, 0, 1), Record::Done(1), write(3, 1, 1)]);
        assert_eq!(ledger.newer_before(0, 0, 3), Some(1));
        assert_eq!(ledger.newer_before(0, 1, 3), None);
        assert_eq!(ledger.newer_before(0, 0, 1), None);
    }

    #[test]
    fn what_was_read_is_all_that_may_be_there() {
        let mut ledger = ledger(&[write(1, 0, 4), write(2, 0, 1), Record::Done(2)]);
        for (first, count, number) in [(0, 1, 2), (1, 1, 0), (2, 2, 1)] {
            ledger.apply(&Record::Verified { first, count, number }).unwrap();
        }
        let mut again = Ledger::new(8);
        ledger.compact().iter().for_each(|record| again.apply(record).unwrap());
        assert_eq!(again.clock(), ledger.clock());
        for (sector, expected) in [(0, 2), (1, 0), (2, 1), (3, 1)] {
            assert_eq!(again.legal(sector, Loss::Newest), [expected]);
            assert_eq!(ledger.legal(sector, Loss::Newest), [expected]);
            let found = if expected == 0 { Found::Zeroes } else { Found::Write(expected) };
            assert_eq!(again.which(sector, found, Loss::Nothing), Some(expected));
        }
        assert!(!again.is_written(4));
    }

    #[test]
    fn records_that_do_not_fit_are_refused() {
        let mut ledger = Ledger::new(8);
        for record in [write(2, 0, 1), write(2, 8, 1), write(3, u64::MAX - 1, 1), Record::Done(9)] {
            assert_eq!(ledger.apply(&record), None, "{record:?}");
        }
    }
}
