//! The writes in progress of one volume, to be asked which of them overlap a range.
//!
//! Entries are kept in one sorted set by class of length (powers of two), then by start. A question
//! looks, for each class in use, only at entries that start less than the longest length of the
//! class before the range; one zero-out of 128 MiB therefore does not make questions about 4 KiB
//! slower. Cost: a search per class (19 up to 128 MiB, usually one or two) and one step per hit,
//! plus a step for each entry that just misses; unless many entries of like length overlap each
//! other, that is one per class.
//!
//! Who conflicts with whom, and which entries count as completed, is the caller's business.
//! Spec: io-path-and-resync.md §5.2.

use alloc::collections::BTreeSet;

use drbd_types::{Sector, SectorCount, SectorRange};

/// One for each number of leading zeros that the length of an entry can have.
const CLASSES: usize = 64;

/// Orders entries of one class and start; `Lowest` is where a search begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Id<K> {
    Lowest,
    Entry(K, u64),
}

/// Class, first sector, key and length.
type Entry<K> = (u8, u64, Id<K>);

/// A set of ranges, each with a key. Ranges may overlap and even be equal.
#[derive(Clone, Debug)]
pub struct Intervals<K> {
    entries: BTreeSet<Entry<K>>,
    /// Entries of each class.
    counts: [usize; CLASSES],
    /// Bit n: class n has entries.
    used: u64,
}

impl<K: Copy + Ord> Default for Intervals<K> {
    fn default() -> Self {
        Self::new()
    }
}

impl<K: Copy + Ord> Intervals<K> {
    /// Without entries.
    #[must_use]
    pub const fn new() -> Self {
        Self { entries: BTreeSet::new(), counts: [0; CLASSES], used: 0 }
    }

    /// Number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Without entries?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Takes in a range of any length, up to 128 MiB in practice. An empty one shares no sector
    /// with anything and is not kept; neither is the same range with the same key a second time.
    /// True if it is new.
    pub fn insert(&mut self, range: SectorRange, key: K) -> bool {
        let Some(class) = class(range) else { return false };
        let is_new = self.entries.insert(entry(class, range, key));
        if is_new {
            self.used |= 1 << class;
            self.count(class, |n| n + 1);
        }
        is_new
    }

    /// Takes out what was taken in with the same range and key. False if it is not there.
    pub fn remove(&mut self, range: SectorRange, key: K) -> bool {
        let Some(class) = class(range) else { return false };
        let is_there = self.entries.remove(&entry(class, range, key));
        if is_there && self.count(class, |n| n - 1) == 0 {
            self.used &= !(1 << class);
        }
        is_there
    }

    /// All entries that share a sector with the range: the shorter classes first, then by start,
    /// then by key.
    pub fn overlapping(&self, range: SectorRange) -> impl Iterator<Item = (SectorRange, K)> {
        let near = self.near(range).filter_map(range_and_key);
        near.filter(move |(other, _)| other.overlaps(range))
    }

    /// All entries, in the order of [`Self::overlapping`].
    pub fn iter(&self) -> impl Iterator<Item = (SectorRange, K)> {
        self.entries.iter().filter_map(range_and_key)
    }

    /// The entries that have to be looked at.
    fn near(&self, range: SectorRange) -> impl Iterator<Item = &Entry<K>> {
        let used = if range.is_empty() { 0 } else { self.used };
        let classes = (0..64u8).filter(move |class| used >> class & 1 == 1);
        classes.flat_map(move |class| {
            // An entry of this class is shorter than 2^(class + 1) sectors.
            let longest = (1u64 << class) - 1 + (1 << class);
            let from = (class, range.start.0.saturating_sub(longest - 1), Id::Lowest);
            self.entries.range(from..(class, range.end().0, Id::Lowest))
        })
    }

    fn count(&mut self, class: u8, change: impl FnOnce(usize) -> usize) -> usize {
        let count = &mut self.counts[usize::from(class)];
        *count = change(*count);
        *count
    }
}

/// Lengths of class n are 2^n up to just below 2^(n + 1) sectors; an empty range has none.
fn class(range: SectorRange) -> Option<u8> {
    range.len.0.checked_ilog2().and_then(|class| u8::try_from(class).ok())
}

const fn entry<K: Copy>(class: u8, range: SectorRange, key: K) -> Entry<K> {
    (class, range.start.0, Id::Entry(key, range.len.0))
}

fn range_and_key<K: Copy>(entry: &Entry<K>) -> Option<(SectorRange, K)> {
    match entry.2 {
        Id::Entry(key, len) => Some((SectorRange::new(Sector(entry.1), SectorCount(len))?, key)),
        Id::Lowest => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    fn range(start: u64, len: u64) -> SectorRange {
        SectorRange::new(Sector(start), SectorCount(len)).unwrap()
    }

    fn keys(intervals: &Intervals<u8>, start: u64, len: u64) -> Vec<u8> {
        intervals.overlapping(range(start, len)).map(|(_, key)| key).collect()
    }

    #[test]
    fn neighbours_do_not_overlap() {
        let mut intervals = Intervals::new();
        for (start, len, key) in [(0, 8, 1), (8, 8, 2), (16, 8, 3), (9, 1, 4)] {
            assert!(intervals.insert(range(start, len), key));
        }
        assert_eq!(keys(&intervals, 8, 8), [4, 2]);
        assert_eq!(keys(&intervals, 10, 1), [2]);
        assert_eq!(keys(&intervals, 7, 10), [4, 1, 2, 3]);
        assert_eq!(keys(&intervals, 24, 100), []);
        assert_eq!(keys(&intervals, 8, 0), [], "nothing to share");
    }

    #[test]
    fn same_range_with_other_keys_is_kept_apart() {
        let mut intervals = Intervals::new();
        assert!(intervals.insert(range(5, 3), 1) && intervals.insert(range(5, 3), 2));
        assert!(!intervals.insert(range(5, 3), 1), "already there");
        assert!(!intervals.insert(range(5, 0), 1) && !intervals.remove(range(5, 0), 1));
        assert!(!intervals.remove(range(5, 2), 1), "another length");
        assert!(intervals.remove(range(5, 3), 1) && !intervals.remove(range(5, 3), 1));
        assert_eq!((keys(&intervals, 7, 1), intervals.len()), (vec![2], 1));
    }

    #[test]
    fn ends_of_the_number_range_are_reached() {
        let mut intervals = Intervals::new();
        intervals.insert(range(0, u64::MAX), 1);
        intervals.insert(range(u64::MAX - 1, 1), 2);
        assert_eq!(keys(&intervals, u64::MAX - 1, 1), [2, 1]);
        assert_eq!(keys(&intervals, 0, 1), [1]);
    }

    #[test]
    fn a_long_entry_does_not_slow_down_short_questions() {
        // 64 Ki writes of 4 KiB below a zero-out of 128 MiB: a search that goes back by the longest
        // length would step over 32 Ki of them for each question.
        let mut intervals = Intervals::new();
        for n in 0..65_536u64 {
            intervals.insert(range(n * 8, 8), n);
        }
        intervals.insert(range(262_144, 262_144), u64::MAX);
        let looked_at = intervals.near(range(400_000, 8)).count();
        assert!(looked_at <= 3, "{looked_at}");
        let found: Vec<_> = intervals.overlapping(range(400_000, 8)).map(|(_, k)| k).collect();
        assert_eq!(found, [50_000, u64::MAX]);
    }

    #[derive(Clone, Debug)]
    enum Op {
        Insert(SectorRange, u8),
        Remove(prop::sample::Index),
        RemoveOther(SectorRange, u8),
        Ask(SectorRange),
    }

    fn any_range() -> impl Strategy<Value = SectorRange> {
        let len = prop_oneof![0..20u64, prop::sample::select(vec![8, 2048, 4096, 262_144])];
        (prop_oneof![0..64u64, 0..600_000u64], len).prop_map(|(start, len)| range(start, len))
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            3 => (any_range(), 0..4u8).prop_map(|(r, k)| Op::Insert(r, k)),
            2 => any::<prop::sample::Index>().prop_map(Op::Remove),
            1 => (any_range(), 0..4u8).prop_map(|(r, k)| Op::RemoveOther(r, k)),
            3 => any_range().prop_map(Op::Ask),
        ]
    }

    proptest! {
        #[test]
        fn finds_what_looking_at_all_finds(ops in prop::collection::vec(op(), 1..200)) {
            let (mut intervals, mut model) = (Intervals::new(), Vec::new());
            for op in ops {
                match op {
                    Op::Insert(r, k) => {
                        let is_new = !r.is_empty() && !model.contains(&(r, k));
                        prop_assert_eq!(intervals.insert(r, k), is_new);
                        if is_new {
                            model.push((r, k));
                        }
                    }
                    Op::Remove(i) => {
                        if !model.is_empty() {
                            let (r, k) = model.swap_remove(i.index(model.len()));
                            prop_assert!(intervals.remove(r, k));
                        }
                    }
                    Op::RemoveOther(r, k) => {
                        let at = model.iter().position(|e| *e == (r, k));
                        prop_assert_eq!(intervals.remove(r, k), at.is_some());
                        if let Some(at) = at {
                            model.swap_remove(at);
                        }
                    }
                    Op::Ask(r) => {
                        let mut found: Vec<_> = intervals.overlapping(r).collect();
                        let shares = |o: &SectorRange| {
                            o.start.0.max(r.start.0) < o.end().0.min(r.end().0)
                        };
                        let mut want: Vec<_> =
                            model.iter().copied().filter(|(o, _)| shares(o)).collect();
                        found.sort_unstable();
                        want.sort_unstable();
                        prop_assert_eq!(found, want);
                    }
                }
                prop_assert_eq!(intervals.len(), model.len());
                prop_assert_eq!(intervals.is_empty(), model.is_empty());
                prop_assert_eq!(intervals.iter().count(), model.len());
            }
        }
    }
}
