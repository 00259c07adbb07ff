//! The activity log in memory: which 4 MiB extents may have writes in flight.
//!
//! A fixed number of slots, each free or with the number of one extent, its label. A write takes
//! one reference to every extent it touches and keeps them until it is forgotten. An extent without
//! references stays recorded until its slot is needed for another one: the slot that rested longest
//! is taken first.
//!
//! ```text
//! free --- get_for_change --> changing --- commit --> in use --- put --> unused
//!                                 ^                     ^                 |  |
//!                                 |                     +---- get_* ------+  |
//!                                 +----------- get_for_change ---------------+
//! ```
//!
//! Order that the caller keeps: the changed pages of [`ActivityLog::evicted_pages`] are on disk
//! before the block of [`ActivityLog::transaction`] is written, the block is stable before
//! [`ActivityLog::commit`], and no write starts, neither here nor to the peer, before the commit of
//! its extents (spec invariants 8 to 10). With `al-updates no` only `commit` is called.
//!
//! Invariants: at most 64 changes in a transaction (13); a slot changes its label only without
//! references (10); while starving nobody gets a reference, so that some slot becomes free. Nothing
//! is allocated after [`ActivityLog::new`] and [`ActivityLog::resize`].
//!
//! Waiting requests, the disk and the suspension of the log are the caller's business.
//! Spec: io-path-and-resync.md §6; metadata.md §3, §5.

use alloc::vec;
use alloc::vec::Vec;

use drbd_types::{AlExtentNr, ByteOffset};
use drbdmeta::al::{AlRing, SLOTS_MAX, UPDATES_MAX};
use drbdmeta::bitmap::page_of_extent;
use drbdmeta::layout::{BLOCK_BYTES, Layout};

/// No slot. Slot numbers are below it.
const NONE: u16 = 0xFFFF;

/// Why there is no reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// There was no slot to give away, now or before: try again after a commit, or when
    /// [`ActivityLog::put`] says that an extent is unused.
    Starving,
    /// A transaction is being written: try again after its commit.
    Writing,
    /// 64 changes are pending: write them first.
    Full,
}

/// Answer of [`ActivityLog::get_for_change`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GetResult {
    /// Referenced; the extent is recorded.
    Hot,
    /// Referenced; the extent will be recorded by the next commit.
    Pending,
    /// Not referenced.
    Refused(Why),
}

/// The next block of the ring on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transaction {
    /// Its number.
    pub number: u32,
    /// Where it belongs, in bytes from the start of the meta-data device.
    pub at: ByteOffset,
    /// What is to be written there.
    pub block: [u8; BLOCK_BYTES],
}

/// What the status shows with `proc_details`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// References to extents that were recorded or pending.
    pub hits: u64,
    /// Questions for extents that were not.
    pub misses: u64,
    /// Refusals while starving.
    pub starving: u64,
    /// Refusals while a transaction was written.
    pub locked: u64,
    /// Labels changed.
    pub changed: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Free,
    Unused,
    InUse,
    Changing,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    /// Label after the commit; of no meaning in a free slot.
    extent: AlExtentNr,
    references: u32,
    place: Place,
    /// Neighbours in the order of last use, while unused.
    older: u16,
    newer: u16,
    /// Next slot with the same hash.
    chain: u16,
}

const FREE_SLOT: Slot = Slot {
    extent: AlExtentNr(0),
    references: 0,
    place: Place::Free,
    older: NONE,
    newer: NONE,
    chain: NONE,
};

/// The activity log of one volume.
#[derive(Clone, Debug)]
pub struct ActivityLog {
    slots: Vec<Slot>,
    /// Labels as they are on disk, in the form in which a transaction repeats them.
    labels: Vec<Option<AlExtentNr>>,
    /// First slot of each hash; the length is a power of two.
    buckets: Vec<u16>,
    /// Slots below this number were never used. The first extent gets the last slot.
    free: u16,
    /// Ends of the list of unused slots.
    oldest: u16,
    newest: u16,
    /// Slots whose change is pending, in the order of the changes.
    changing: Vec<u16>,
    starving: bool,
    writing: bool,
    /// Slots with references.
    referenced: usize,
    ring: Option<AlRing>,
    /// Blocks of the ring that still have to be written before it is in use.
    fill_left: u64,
    counters: Counters,
}

impl ActivityLog {
    /// A log without labels. `slots`: `al-extents`, 1..=65534, at most what the ring can carry
    /// ([`Self::slots_for`]).
    ///
    /// # Panics
    /// No slot, or more than 65534.
    #[must_use]
    pub fn new(slots: u16) -> Self {
        let mut log = Self {
            slots: Vec::new(),
            labels: Vec::new(),
            buckets: Vec::new(),
            free: 0,
            oldest: NONE,
            newest: NONE,
            changing: Vec::with_capacity(UPDATES_MAX),
            starving: false,
            writing: false,
            referenced: 0,
            ring: None,
            fill_left: 0,
            counters: Counters::default(),
        };
        log.resize(slots);
        log
    }

    /// The number of slots that can be used if so many are configured: one block of the ring may be
    /// torn, the others must be able to show all slots. Spec: metadata.md §3.4.
    #[must_use]
    pub fn slots_for(configured: u16, layout: Layout) -> u16 {
        configured.min(AlRing::new(layout).slots_max())
    }

    /// Where the ring is. Must be known before the first transaction, and be told anew when the
    /// meta-data moves; transaction numbers go on.
    pub fn set_layout(&mut self, layout: Layout) {
        match &mut self.ring {
            Some(ring) => ring.restart(layout),
            None => self.ring = Some(AlRing::new(layout)),
        }
    }

    /// Another number of slots. All labels are forgotten, so all changed pages of the bitmap must
    /// be stable before the next transaction. `slots` as in [`Self::new`].
    ///
    /// # Panics
    /// The log is not idle, or the number is out of range.
    pub fn resize(&mut self, slots: u16) {
        assert!(self.is_idle(), "resize with {} extents in use", self.referenced);
        assert!(slots > 0 && u32::from(slots) <= SLOTS_MAX, "{slots} slots");
        let count = usize::from(slots);
        self.slots = vec![FREE_SLOT; count];
        self.labels = vec![None; count];
        self.buckets = vec![NONE; count.next_power_of_two()];
        self.free = slots;
        (self.oldest, self.newest) = (NONE, NONE);
        self.starving = false;
    }

    /// Number of slots.
    #[must_use]
    pub fn slots(&self) -> u16 {
        u16::try_from(self.slots.len()).expect("checked when made")
    }

    /// Takes a reference if the extent is recorded. Refused while starving.
    #[must_use = "a reference must be put back"]
    pub fn get_hot(&mut self, extent: AlExtentNr) -> bool {
        if self.starving {
            self.counters.starving += 1;
            return false;
        }
        match self.find(extent) {
            Some(at) if self.slot(at).place != Place::Changing => {
                self.reference(at);
                true
            }
            _ => {
                self.counters.misses += 1;
                false
            }
        }
    }

    /// Takes a reference, and if necessary and possible a slot for the extent. Requests of a batch
    /// may share a pending change.
    #[must_use = "a reference must be put back"]
    pub fn get_for_change(&mut self, extent: AlExtentNr) -> GetResult {
        if self.starving {
            self.counters.starving += 1;
            return GetResult::Refused(Why::Starving);
        }
        if let Some(at) = self.find(extent) {
            self.reference(at);
            let is_pending = self.slot(at).place == Place::Changing;
            return if is_pending { GetResult::Pending } else { GetResult::Hot };
        }
        self.counters.misses += 1;
        match self.slot_for_change() {
            Ok(at) => {
                self.give(at, extent);
                GetResult::Pending
            }
            Err(why) => GetResult::Refused(why),
        }
    }

    /// Gives a reference back. True if it was the last one: who waits for a slot or for the extent
    /// may try again.
    ///
    /// # Panics
    /// There was none.
    pub fn put(&mut self, extent: AlExtentNr) -> bool {
        let at = self.find(extent).filter(|at| self.slot(*at).references > 0);
        let at = at.unwrap_or_else(|| panic!("extent {extent} is put back but not in use"));
        let slot = self.slot_mut(at);
        slot.references -= 1;
        let (is_last, place) = (slot.references == 0, slot.place);
        if is_last {
            self.referenced -= 1;
            if place == Place::InUse {
                self.rest(at);
            }
        }
        is_last
    }

    /// Changes that wait for a commit, 0..=64.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.changing.len()
    }

    /// Pages of the bitmap that cover the extents which the pending changes throw out, ascending,
    /// each once. Those of them that changed must be on disk before the transaction.
    pub fn evicted_pages(&self) -> impl Iterator<Item = u32> + use<> {
        let mut pages = [0; UPDATES_MAX];
        let old = self.changing.iter().filter_map(|at| self.labels[usize::from(*at)]);
        let mut count = 0;
        for (page, extent) in pages.iter_mut().zip(old) {
            *page = page_of_extent(extent);
            count += 1;
        }
        pages[..count].sort_unstable();
        let mut last = None;
        pages.into_iter().take(count).filter(move |page| last.replace(*page) != Some(*page))
    }

    /// The next block of the ring: the pending changes (there may be none), and a window of all
    /// slots that moves on with every block. Until [`Self::commit`] or [`Self::transaction_failed`]
    /// no further change is accepted.
    ///
    /// # Panics
    /// The place of the ring is not known, it cannot carry so many slots, or the last transaction
    /// is still being written.
    #[must_use]
    pub fn transaction(&mut self) -> Transaction {
        assert!(!self.writing, "one transaction after the other");
        let mut updates = [(NONE, None); UPDATES_MAX];
        for (update, at) in updates.iter_mut().zip(&self.changing) {
            *update = (*at, Some(self.slots[usize::from(*at)].extent));
        }
        let ring = self.ring.as_mut().expect("the place of the ring is known when attached");
        let number = ring.number();
        let (at, block) = ring
            .next(&updates[..self.changing.len()], &self.labels)
            .expect("the number of slots was limited to what the ring can carry");
        self.writing = true;
        Transaction { number, at, block }
    }

    /// The pending changes are valid from now on. After [`Self::transaction`] it means that the
    /// block is stable.
    pub fn commit(&mut self) {
        if core::mem::take(&mut self.writing) {
            if let Some(ring) = &mut self.ring {
                ring.written();
            }
            self.fill_left = self.fill_left.saturating_sub(1);
        }
        for i in 0..self.changing.len() {
            let at = self.changing[i];
            let slot = self.slot(at);
            self.labels[usize::from(at)] = Some(slot.extent);
            if slot.references > 0 {
                self.slot_mut(at).place = Place::InUse;
            } else {
                self.rest(at);
            }
        }
        self.counters.changed += u64::try_from(self.changing.len()).unwrap_or(0);
        self.changing.clear();
    }

    /// The block could not be written, so the disk is given up (spec §6.5): what is pending never
    /// becomes hot on it. [`Self::commit`] then only lets the waiting requests go on; their local
    /// part fails.
    pub fn transaction_failed(&mut self) {
        self.writing = false;
    }

    /// The ring is new, or its place or shape has changed: every block of it has to be written,
    /// by so many transactions as [`Self::ring_fill_left`] says. Spec: metadata.md §3.4.
    pub fn begin_ring_fill(&mut self) {
        self.fill_left = self.ring.as_ref().map_or(0, AlRing::blocks);
    }

    /// Transactions that are still needed to fill the ring; the commit of each counts.
    #[must_use]
    pub const fn ring_fill_left(&self) -> u64 {
        self.fill_left
    }

    /// May a write be in flight here, or is one about to be? Such an extent is closed to a resync.
    #[must_use]
    pub fn in_use(&self, extent: AlExtentNr) -> bool {
        self.find(extent).is_some_and(|at| {
            let slot = self.slot(at);
            slot.references > 0 || slot.place == Place::Changing
        })
    }

    /// Is the extent recorded, and going to stay so at the next commit?
    #[must_use]
    pub fn is_hot(&self, extent: AlExtentNr) -> bool {
        self.find(extent).is_some_and(|at| self.slot(at).place != Place::Changing)
    }

    /// Extents with references.
    #[must_use]
    pub const fn references(&self) -> usize {
        self.referenced
    }

    /// Without references, pending changes, and transactions under way?
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.referenced == 0 && self.changing.is_empty() && !self.writing
    }

    /// Is a transaction being written?
    #[must_use]
    pub const fn is_writing(&self) -> bool {
        self.writing
    }

    /// Does it give no references until some extent is unused?
    #[must_use]
    pub const fn is_starving(&self) -> bool {
        self.starving
    }

    /// What happened so far.
    #[must_use]
    pub const fn counters(&self) -> Counters {
        self.counters
    }

    fn slot(&self, at: u16) -> Slot {
        self.slots[usize::from(at)]
    }

    fn slot_mut(&mut self, at: u16) -> &mut Slot {
        &mut self.slots[usize::from(at)]
    }

    fn bucket(&self, extent: AlExtentNr) -> usize {
        // Neighbours shall not collide, and multiples of large powers of two neither.
        let hash = extent.0.wrapping_mul(0x9E37_79B1);
        let bits = self.buckets.len().trailing_zeros();
        usize::try_from(u64::from(hash) >> (32 - bits)).unwrap_or(0)
    }

    fn find(&self, extent: AlExtentNr) -> Option<u16> {
        let mut at = self.buckets[self.bucket(extent)];
        while at != NONE {
            let slot = self.slot(at);
            if slot.extent == extent {
                return Some(at);
            }
            at = slot.chain;
        }
        None
    }

    /// One more reference to an extent that is there.
    fn reference(&mut self, at: u16) {
        self.counters.hits += 1;
        if self.slot(at).place == Place::Unused {
            self.unlink(at);
            self.slot_mut(at).place = Place::InUse;
        }
        let slot = self.slot_mut(at);
        slot.references += 1;
        self.referenced += usize::from(slot.references == 1);
    }

    fn slot_for_change(&mut self) -> Result<u16, Why> {
        if self.writing {
            self.counters.locked += 1;
            return Err(Why::Writing);
        }
        if self.free == 0 && self.oldest == NONE {
            self.starving = true;
            self.counters.starving += 1;
            return Err(Why::Starving);
        }
        if self.changing.len() == UPDATES_MAX {
            return Err(Why::Full);
        }
        if self.free > 0 {
            self.free -= 1;
            return Ok(self.free);
        }
        let at = self.oldest;
        self.unlink(at);
        self.unchain(at);
        Ok(at)
    }

    /// Begins a change.
    fn give(&mut self, at: u16, extent: AlExtentNr) {
        let bucket = self.bucket(extent);
        let chain = core::mem::replace(&mut self.buckets[bucket], at);
        let place = Place::Changing;
        *self.slot_mut(at) = Slot { extent, references: 1, place, chain, ..FREE_SLOT };
        self.referenced += 1;
        self.changing.push(at);
    }

    /// The slot has no references any more: it is the last one to be given away.
    fn rest(&mut self, at: u16) {
        let older = self.newest;
        let slot = self.slot_mut(at);
        slot.place = Place::Unused;
        (slot.older, slot.newer) = (older, NONE);
        match older {
            NONE => self.oldest = at,
            _ => self.slot_mut(older).newer = at,
        }
        self.newest = at;
        self.starving = false;
    }

    fn unlink(&mut self, at: u16) {
        let Slot { older, newer, .. } = self.slot(at);
        match older {
            NONE => self.oldest = newer,
            _ => self.slot_mut(older).newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            _ => self.slot_mut(newer).older = older,
        }
    }

    fn unchain(&mut self, at: u16) {
        let Slot { extent, chain, .. } = self.slot(at);
        let bucket = self.bucket(extent);
        let mut before = self.buckets[bucket];
        if before == at {
            self.buckets[bucket] = chain;
            return;
        }
        while self.slot(before).chain != at {
            before = self.slot(before).chain;
        }
        self.slot_mut(before).chain = chain;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::{BTreeMap, BTreeSet};
    use drbdmeta::al::{AlBlock, Outcome, replay};
    use drbdmeta::io::{Memory, MetaIo};
    use drbdmeta::layout::{AlGeometry, Placement};
    use drbdmeta::ops;
    use drbdmeta::superblock::{Magic, Superblock};
    use drbdmeta::units::ByteLen;
    use proptest::prelude::*;
    use proptest::sample::Index;

    const MIB: usize = 1 << 20;

    fn layout() -> Layout {
        let device = ByteLen(1 << 20);
        Layout::for_new(Placement::FlexExternal, device, AlGeometry::default()).unwrap()
    }

    fn log(slots: u16) -> ActivityLog {
        let mut log = ActivityLog::new(slots);
        log.set_layout(layout());
        log
    }

    fn extent(n: usize) -> AlExtentNr {
        AlExtentNr(u32::try_from(n).unwrap())
    }

    /// Makes these extents hot and puts them back.
    fn warm(log: &mut ActivityLog, extents: core::ops::Range<u32>) {
        for e in extents.clone() {
            assert_eq!(log.get_for_change(AlExtentNr(e)), GetResult::Pending, "extent {e}");
        }
        log.commit();
        for e in extents {
            assert!(log.put(AlExtentNr(e)));
        }
    }

    fn updates(t: &Transaction) -> Vec<(u16, u32)> {
        AlBlock::from_disk(&t.block).unwrap().updates().map(|(_, s, e)| (s, e)).collect()
    }

    #[test]
    fn first_extent_gets_the_last_slot() {
        // Observed: with 67 slots it goes to slot 66. Spec §6.2.
        let mut log = log(67);
        for e in [5, 9, 5] {
            assert_eq!(log.get_for_change(AlExtentNr(e)), GetResult::Pending);
        }
        let t = log.transaction();
        assert_eq!((t.number, t.at, updates(&t)), (0, layout().al, vec![(66, 5), (65, 9)]));
        log.commit();
        assert_eq!((log.references(), log.pending()), (2, 0));
        assert!(!log.put(AlExtentNr(5)) && log.put(AlExtentNr(5)) && log.put(AlExtentNr(9)));
        assert!(log.is_idle() && log.is_hot(AlExtentNr(5)) && !log.in_use(AlExtentNr(5)));
    }

    #[test]
    fn pending_extents_are_not_hot_yet() {
        let mut log = log(67);
        assert!(!log.get_hot(AlExtentNr(1)));
        assert_eq!(log.get_for_change(AlExtentNr(1)), GetResult::Pending);
        assert!(!log.get_hot(AlExtentNr(1)) && !log.is_hot(AlExtentNr(1)));
        assert!(log.in_use(AlExtentNr(1)));
        let _block = log.transaction();
        assert!(!log.get_hot(AlExtentNr(1)), "not before the commit");
        assert_eq!(log.get_for_change(AlExtentNr(2)), GetResult::Refused(Why::Writing));
        assert_eq!(log.get_for_change(AlExtentNr(1)), GetResult::Pending, "shares the change");
        log.commit();
        assert!(log.get_hot(AlExtentNr(1)) && log.is_hot(AlExtentNr(1)));
    }

    #[test]
    fn a_put_before_the_commit_leaves_the_extent_unused() {
        let mut log = log(1);
        assert_eq!(log.get_for_change(AlExtentNr(1)), GetResult::Pending);
        assert_eq!(log.get_for_change(AlExtentNr(2)), GetResult::Refused(Why::Starving));
        assert!(log.put(AlExtentNr(1)));
        assert!(!log.is_idle() && log.is_starving() && log.in_use(AlExtentNr(1)));
        log.commit();
        assert!(log.is_idle() && !log.is_starving() && !log.in_use(AlExtentNr(1)));
        assert_eq!(log.get_for_change(AlExtentNr(2)), GetResult::Pending);
    }

    #[test]
    fn starving_gives_nothing_until_something_is_unused() {
        let mut log = log(2);
        warm(&mut log, 1..3);
        assert!(log.get_hot(AlExtentNr(1)) && log.get_hot(AlExtentNr(2)));
        assert!(log.get_hot(AlExtentNr(1)));
        assert_eq!(log.get_for_change(AlExtentNr(3)), GetResult::Refused(Why::Starving));
        assert!(!log.get_hot(AlExtentNr(1)), "not even what is hot");
        assert_eq!(log.get_for_change(AlExtentNr(1)), GetResult::Refused(Why::Starving));
        assert!(!log.put(AlExtentNr(1)) && log.is_starving());
        assert!(log.put(AlExtentNr(2)) && !log.is_starving());
        assert!(log.get_hot(AlExtentNr(1)));
    }

    #[test]
    fn a_transaction_takes_64_changes_and_throws_out_the_longest_unused() {
        let mut log = log(128);
        warm(&mut log, 0..64);
        warm(&mut log, 64..128);
        warm(&mut log, 0..0);
        assert!(log.get_hot(AlExtentNr(3)) && log.put(AlExtentNr(3)));
        for e in 1000..1064 {
            assert_eq!(log.get_for_change(AlExtentNr(e)), GetResult::Pending);
        }
        assert_eq!(log.get_for_change(AlExtentNr(2000)), GetResult::Refused(Why::Full));
        assert_eq!(log.pending(), 64);
        assert!(log.is_hot(AlExtentNr(3)) && !log.is_hot(AlExtentNr(64)));
        // 0..=64 without 3: pages 0, 1 and 2.
        assert_eq!(log.evicted_pages().collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(updates(&log.transaction())[0], (127, 1000));
    }

    #[test]
    fn a_new_ring_is_filled_block_by_block() {
        let mut log = log(1237);
        log.begin_ring_fill();
        let mut places = BTreeSet::new();
        let mut windows = Vec::new();
        while log.ring_fill_left() > 0 {
            let t = log.transaction();
            assert_eq!(updates(&t), []);
            let block = AlBlock::from_disk(&t.block).unwrap();
            windows.push(block.context().next().map(|(_, slot, _)| slot).unwrap());
            places.insert(t.at);
            log.commit();
        }
        assert_eq!(places.len(), 8);
        assert_eq!(windows, [0, 919, 0, 919, 0, 919, 0, 919]);
    }

    #[test]
    fn without_a_block_the_number_stays() {
        // With `al-updates no` nothing is written; after a failure the number is not used up.
        let mut log = log(67);
        warm(&mut log, 0..2);
        assert_eq!(log.transaction().number, 0);
        log.transaction_failed();
        log.commit();
        assert_eq!(log.transaction().number, 0);
        log.commit();
        assert_eq!(log.transaction().number, 1);
    }

    #[test]
    fn numbers_go_on_after_resize_and_move() {
        let mut log = log(1000);
        let _block = log.transaction();
        log.commit();
        log.resize(67);
        log.set_layout(layout());
        let t = log.transaction();
        assert_eq!((t.number, AlBlock::from_disk(&t.block).unwrap().context().count()), (1, 67));
        assert_eq!(ActivityLog::slots_for(65_534, layout()), 6433);
        assert_eq!(ActivityLog::slots_for(1237, layout()), 1237);
    }

    #[test]
    #[should_panic(expected = "extent 4 is put back but not in use")]
    fn a_put_too_many_is_a_bug() {
        let mut log = log(67);
        warm(&mut log, 4..5);
        log.put(AlExtentNr(4));
    }

    #[derive(Clone, Debug, Default)]
    struct ModelSlot {
        label: Option<AlExtentNr>,
        new: Option<AlExtentNr>,
        references: u32,
        rested: u64,
    }

    /// Looks at every slot for every question, and at the ring on disk after every step.
    struct Model {
        slots: Vec<ModelSlot>,
        changing: Vec<usize>,
        starving: bool,
        now: u64,
        disk: Memory,
        superblock: Superblock,
        /// Extents with bits that are only in memory; they must be recorded on disk.
        unsaved: BTreeSet<AlExtentNr>,
        window: usize,
    }

    impl Model {
        fn new(slots: u16) -> Self {
            let mut superblock = Superblock::new(&layout(), 0);
            superblock.magic = Magic::Unclean;
            let mut disk = Memory::zeroed(MIB);
            ops::write_initialised_al(&mut disk, &layout()).unwrap();
            Self {
                slots: vec![ModelSlot::default(); usize::from(slots)],
                changing: Vec::new(),
                starving: false,
                now: 0,
                disk,
                superblock,
                unsaved: BTreeSet::new(),
                window: 0,
            }
        }

        fn find(&self, e: AlExtentNr) -> Option<usize> {
            self.slots.iter().position(|s| s.new == Some(e))
        }

        fn get_for_change(&mut self, e: AlExtentNr) -> GetResult {
            if self.starving {
                return GetResult::Refused(Why::Starving);
            }
            if let Some(at) = self.find(e) {
                self.slots[at].references += 1;
                let pending = self.changing.contains(&at);
                return if pending { GetResult::Pending } else { GetResult::Hot };
            }
            let free = self.slots.iter().rposition(|s| s.new.is_none());
            let rests = |(at, s): &(usize, &ModelSlot)| {
                s.references == 0 && !self.changing.contains(at) && s.new.is_some()
            };
            let unused = self.slots.iter().enumerate().filter(rests);
            let Some(at) = free.or_else(|| unused.min_by_key(|(_, s)| s.rested).map(|(at, _)| at))
            else {
                self.starving = true;
                return GetResult::Refused(Why::Starving);
            };
            if self.changing.len() == 64 {
                return GetResult::Refused(Why::Full);
            }
            self.slots[at].new = Some(e);
            self.slots[at].references = 1;
            self.changing.push(at);
            GetResult::Pending
        }

        fn rest(&mut self, at: usize) {
            self.now += 1;
            self.slots[at].rested = self.now;
            self.starving = false;
        }

        fn put(&mut self, e: AlExtentNr) {
            let at = self.find(e).unwrap();
            self.slots[at].references -= 1;
            if self.slots[at].references == 0 && !self.changing.contains(&at) {
                self.rest(at);
            }
        }

        fn commit(&mut self) {
            for at in core::mem::take(&mut self.changing) {
                self.slots[at].label = self.slots[at].new;
                if self.slots[at].references == 0 {
                    self.rest(at);
                }
            }
        }

        /// Extents whose writes may have begun.
        fn referenced(&self) -> BTreeSet<AlExtentNr> {
            let hot = self.slots.iter().filter(|s| s.references > 0 && s.label == s.new);
            hot.filter_map(|s| s.label).collect()
        }

        /// A crash now would find all that may be different.
        fn check_covered(&self, disk: &Memory, when: &str) {
            let found = replay(&mut disk.clone(), &layout(), &self.superblock).unwrap();
            let recorded: BTreeSet<_> = match found.outcome {
                Outcome::Updates(extents) => extents.into_iter().collect(),
                Outcome::Initialised => BTreeSet::new(),
                other => panic!("{when}: {other:?}"),
            };
            let needed = &self.referenced() | &self.unsaved;
            assert!(needed.is_subset(&recorded), "{when}: {:?}", &needed - &recorded);
        }

        /// Writes what is pending, with a look at what a power cut before, in and after it leaves.
        fn write(&mut self, log: &mut ActivityLog, torn: usize) {
            let olds = self.changing.iter().filter_map(|at| self.slots[*at].label);
            let pages: BTreeSet<u32> = olds.map(page_of_extent).collect();
            assert!(log.evicted_pages().eq(pages.iter().copied()));
            self.unsaved.retain(|e| !pages.contains(&page_of_extent(*e)));
            let t = log.transaction();
            let want: Vec<_> = self.changing.iter().map(|at| (*at, self.slots[*at].new)).collect();
            let block = AlBlock::from_disk(&t.block).unwrap();
            let got = block.updates().map(|(_, s, e)| (usize::from(s), Some(AlExtentNr(e))));
            assert!(got.eq(want.iter().copied()));
            let window = self.slots.iter().enumerate().skip(self.window).take(919);
            let window = window.map(|(at, s)| (at, s.label.map_or(u32::MAX, |e| e.0)));
            let got = block.context().map(|(_, s, e)| (usize::try_from(s).unwrap(), e));
            assert!(got.eq(window), "window {}", self.window);
            self.window += 919;
            if self.window >= self.slots.len() {
                self.window = 0;
            }
            self.disk.write_at(t.at, &t.block[..torn * 512]).unwrap();
            self.check_covered(&self.disk, "torn");
            self.disk.write_at(t.at, &t.block).unwrap();
            log.commit();
            self.commit();
            self.check_covered(&self.disk, "written");
        }
    }

    #[derive(Clone, Debug)]
    enum Op {
        Hot(Index),
        Change(Index),
        Put(Index),
        Bits(Index),
        Write(usize),
        /// 64 extents from here on, written and put back.
        Sweep(Index, usize),
        Resize(u16),
    }

    fn slots() -> impl Strategy<Value = u16> {
        prop::sample::select(vec![1, 2, 67, 100, 918, 919, 920, 2000, 6433])
    }

    fn op() -> impl Strategy<Value = Op> {
        let any = any::<Index>;
        prop_oneof![
            20 => any().prop_map(Op::Hot),
            30 => any().prop_map(Op::Change),
            30 => any().prop_map(Op::Put),
            20 => any().prop_map(Op::Bits),
            10 => (0..8usize).prop_map(Op::Write),
            15 => (any(), 0..8usize).prop_map(|(i, t)| Op::Sweep(i, t)),
            1 => slots().prop_map(Op::Resize),
        ]
    }

    fn apply(op: Op, log: &mut ActivityLog, model: &mut Model, held: &mut Vec<AlExtentNr>) {
        let range = model.slots.len() + model.slots.len() / 2 + 3;
        match op {
            Op::Hot(i) => {
                let e = extent(i.index(range));
                let at = model.find(e).filter(|at| !model.changing.contains(at));
                let want = at.is_some() && !model.starving;
                assert_eq!(log.get_hot(e), want);
                if want {
                    model.slots[at.unwrap()].references += 1;
                    held.push(e);
                }
            }
            Op::Change(i) => get(log, model, held, extent(i.index(range))),
            Op::Put(i) => {
                if !held.is_empty() {
                    let e = held.swap_remove(i.index(held.len()));
                    assert_eq!(log.put(e), !held.contains(&e));
                    model.put(e);
                }
            }
            Op::Bits(i) => {
                // Only a write sets bits, and it holds a reference.
                let referenced: Vec<_> = model.referenced().into_iter().collect();
                if !referenced.is_empty() {
                    model.unsaved.insert(referenced[i.index(referenced.len())]);
                }
            }
            Op::Write(torn) => model.write(log, torn),
            Op::Sweep(i, torn) => {
                let (from, before) = (i.index(range), held.len());
                for e in from..from + 64 {
                    get(log, model, held, extent(e));
                }
                model.write(log, torn);
                for e in held.drain(before..) {
                    log.put(e);
                    model.put(e);
                }
            }
            Op::Resize(slots) => {
                if log.is_idle() {
                    log.resize(slots);
                    log.set_layout(layout());
                    model.slots = vec![ModelSlot::default(); usize::from(slots)];
                    model.unsaved.clear();
                    model.window = 0;
                    model.starving = false;
                }
            }
        }
    }

    fn get(log: &mut ActivityLog, model: &mut Model, held: &mut Vec<AlExtentNr>, e: AlExtentNr) {
        let got = log.get_for_change(e);
        assert_eq!(got, model.get_for_change(e));
        if !matches!(got, GetResult::Refused(_)) {
            held.push(e);
        }
    }

    fn compare(log: &ActivityLog, model: &Model, held: &[AlExtentNr]) {
        assert_eq!(log.pending(), model.changing.len());
        assert_eq!(log.is_starving(), model.starving);
        let mut references: BTreeMap<AlExtentNr, u32> = BTreeMap::new();
        held.iter().for_each(|e| *references.entry(*e).or_default() += 1);
        assert_eq!(log.references(), references.len());
        for (at, slot) in model.slots.iter().enumerate() {
            assert_eq!(log.labels[at], slot.label);
            let Some(e) = slot.new else { continue };
            let pending = model.changing.contains(&at);
            assert_eq!(references.get(&e).copied().unwrap_or(0), slot.references);
            assert_eq!(log.in_use(e), pending || slot.references > 0);
            assert_eq!(log.is_hot(e), !pending);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn does_what_the_slow_model_does_and_a_crash_finds_all(
            slots in slots(),
            ops in prop::collection::vec(op(), 1..200),
        ) {
            let (mut log, mut model, mut held) = (log(slots), Model::new(slots), Vec::new());
            for op in ops {
                apply(op, &mut log, &mut model, &mut held);
                compare(&log, &model, &held);
            }
        }
    }
}
