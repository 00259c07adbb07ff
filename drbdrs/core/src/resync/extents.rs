//! Exclusion between application writes and resync or verify, by extents of 16 MiB.
//!
//! ```text
//!            try_lock, serve_lock                      the same, no write in the extent
//!   open ------------------------------------> closed -------------------------------> locked
//!    ^   an activity-log extent inside is in use  |                                       |
//!    |                                            | steps aside                           |
//!    +--------------------------------------------+------------------- last put ----------+
//! ```
//!
//! *Closed*: application writes take no new references to the four activity-log extents inside; the
//! ones that have some go on, so they run out. *Locked*: there are none, so no write of this node
//! is in flight there, neither here nor on the way to the peer nor on it; requests of the resync may
//! run. *Priority*: a write of the application waits.
//!
//! Invariants: an extent is locked exactly while requests of the resync hold references, and never
//! while a write is in flight inside; the generating side keeps at most one extent closed that is
//! not locked (the half-way one). The caller asks [`RsExtents::is_closed_for_writes`] before it
//! takes a reference of the activity log, and lets waiting writes try again whenever
//! [`RsExtents::take_opened`] says so.
//!
//! Nothing here blocks: who is told to wait asks again when a write has dropped its references.
//! Spec: io-path-and-resync.md §6.7.

use alloc::vec::Vec;
use core::ops::Range;

use drbd_types::{AlExtentNr, RsExtentNr};

/// Extents that are remembered.
pub const ENTRIES: usize = 61;
/// The generating side closes no further one while more than these are held.
const GENERATE_MAX: usize = 58;
/// The serving side holds at most these.
const SERVE_MAX: usize = 31;
/// Extents of the activity log in one of resync.
const AL_EXTENTS: u32 = 4;

/// Answer to the side that generates requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TryLock {
    /// One reference more: the request may be made.
    Locked,
    /// No request for this extent in this step.
    GiveUp,
}

/// Answer to the side that serves requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServeLock {
    /// One reference more: the request may be served.
    Locked,
    /// Ask again when a write or a resync request has dropped its references. The extent stays
    /// closed, except when there was no room to close it.
    Wait,
    /// A write of the application goes first: the extent was opened. Ask again in 100 ms.
    StepAside,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    extent: RsExtentNr,
    /// Requests of the resync; more than none means locked.
    references: u32,
    closed: bool,
    priority: bool,
    /// Bits of blocks that could not be synced.
    failed: u64,
    /// Grows with every use; the entry that was not used for longest makes room.
    used: u64,
}

impl Entry {
    const fn is_held(&self) -> bool {
        self.references > 0 || self.closed
    }

    const fn open(&mut self) {
        self.references = 0;
        self.closed = false;
        self.priority = false;
    }
}

/// The extents of one volume that a resync or verify is about.
#[derive(Clone, Debug)]
pub struct RsExtents {
    entries: Vec<Entry>,
    /// Of the generating side: closed, not locked.
    half_way: Option<RsExtentNr>,
    opened: bool,
    uses: u64,
}

impl Default for RsExtents {
    fn default() -> Self {
        Self::new()
    }
}

/// The resync extent that an extent of the activity log lies in.
#[must_use]
pub const fn rs_extent_of(extent: AlExtentNr) -> RsExtentNr {
    RsExtentNr(extent.0 / AL_EXTENTS)
}

/// The extents of the activity log inside. The last ones may be behind the end of the device.
pub fn al_extents_of(extent: RsExtentNr) -> impl Iterator<Item = AlExtentNr> {
    let first = extent.0.saturating_mul(AL_EXTENTS);
    let inside: Range<u32> = first..first.saturating_add(AL_EXTENTS);
    inside.map(AlExtentNr)
}

impl RsExtents {
    /// All extents are open.
    #[must_use]
    pub fn new() -> Self {
        let entries = Vec::with_capacity(ENTRIES);
        Self { entries, half_way: None, opened: false, uses: 0 }
    }

    /// The extents in which requests of the resync run.
    #[cfg(any(test, feature = "check"))]
    pub(crate) fn locked(&self) -> impl Iterator<Item = RsExtentNr> {
        self.entries.iter().filter(|entry| entry.references > 0).map(|entry| entry.extent)
    }

    /// The generating side (SyncTarget, VerifyS) wants to make a request in this extent. `in_use`:
    /// [`crate::al::ActivityLog::in_use`]. `throttled`: the resync has to step aside for the
    /// application ([`super::throttle::Throttle::look`]).
    pub fn try_lock(
        &mut self,
        extent: RsExtentNr,
        in_use: impl Fn(AlExtentNr) -> bool,
        throttled: bool,
    ) -> TryLock {
        if self.half_way != Some(extent) {
            if throttled {
                return TryLock::GiveUp;
            }
            self.release_half_way();
        }
        if self.find(extent).is_none() && self.held() > GENERATE_MAX {
            return TryLock::GiveUp;
        }
        let Some(entry) = self.entry(extent) else { return TryLock::GiveUp };
        if lock(entry, in_use) {
            self.half_way = None;
            return TryLock::Locked;
        }
        self.half_way = Some(extent);
        if throttled {
            self.release_half_way();
        }
        TryLock::GiveUp
    }

    /// The serving side (SyncSource, VerifyT) wants to serve a request in this extent. `in_use`: as
    /// for [`Self::try_lock`]. `throttled`: is the resync faster than `c-min-rate`? Asked only if a
    /// write of the application waits for this extent.
    pub fn serve_lock(
        &mut self,
        extent: RsExtentNr,
        in_use: impl Fn(AlExtentNr) -> bool,
        throttled: impl FnOnce() -> bool,
    ) -> ServeLock {
        let is_held = self.find(extent).is_some_and(|e| e.is_held());
        if !is_held && self.held() >= SERVE_MAX {
            return ServeLock::Wait;
        }
        let Some(entry) = self.entry(extent) else { return ServeLock::Wait };
        if lock(entry, in_use) {
            return ServeLock::Locked;
        }
        if entry.priority && throttled() {
            self.release(extent);
            return ServeLock::StepAside;
        }
        ServeLock::Wait
    }

    /// A request of the resync has ended; the last one opens the extent.
    ///
    /// # Panics
    /// There was no reference.
    pub fn put(&mut self, extent: RsExtentNr) {
        let entry = self.entries.iter_mut().find(|e| e.extent == extent && e.references > 0);
        let entry = entry.unwrap_or_else(|| panic!("resync extent {extent} is not locked"));
        entry.references -= 1;
        if entry.references == 0 {
            entry.open();
            self.opened = true;
        }
    }

    /// Opens an extent that is closed but not locked: the request that wanted it is not going to be
    /// made or served. Nothing happens if it is open or locked.
    pub fn release(&mut self, extent: RsExtentNr) {
        if self.half_way == Some(extent) {
            self.half_way = None;
        }
        let entry = self.entries.iter_mut().find(|e| e.extent == extent);
        if let Some(entry) = entry
            && entry.closed
            && entry.references == 0
        {
            entry.open();
            self.opened = true;
        }
    }

    /// Opens the half-way extent, if there is one: the generator pauses or ends.
    pub fn release_half_way(&mut self) {
        if let Some(extent) = self.half_way {
            self.release(extent);
        }
    }

    /// Forgets everything: the connection is lost, or the resync is over. No request of the resync
    /// may be under way to the disk any more, since writes may begin at once, and their newer data
    /// must not be overwritten; a later [`Self::put`] is a bug.
    pub fn clear(&mut self) {
        self.opened |= self.entries.iter().any(Entry::is_held);
        self.entries.clear();
        self.half_way = None;
    }

    /// May a write take no reference to this extent of the activity log now? It then waits, and
    /// says so with [`Self::set_priority`].
    ///
    /// A write that already holds a reference in the *same* resync extent must not wait for it but
    /// go on: the extent waits for that very reference and cannot be locked before.
    #[must_use]
    pub fn is_closed_for_writes(&self, extent: AlExtentNr) -> bool {
        self.find(rs_extent_of(extent)).is_some_and(|e| e.closed)
    }

    /// Do requests of the resync run in this extent?
    #[must_use]
    pub fn is_locked(&self, extent: RsExtentNr) -> bool {
        self.references(extent) > 0
    }

    /// References of requests of the resync.
    #[must_use]
    pub fn references(&self, extent: RsExtentNr) -> u32 {
        self.find(extent).map_or(0, |e| e.references)
    }

    /// A write of the application waits for this extent. Until the extent is opened.
    pub fn set_priority(&mut self, extent: RsExtentNr) {
        if let Some(entry) = self.entries.iter_mut().find(|e| e.extent == extent && e.closed) {
            entry.priority = true;
        }
    }

    /// Does a write of the application wait for it?
    #[must_use]
    pub fn has_priority(&self, extent: RsExtentNr) -> bool {
        self.find(extent).is_some_and(|e| e.priority)
    }

    /// The extent that the generating side has closed and could not lock yet.
    #[must_use]
    pub const fn half_way(&self) -> Option<RsExtentNr> {
        self.half_way
    }

    /// Has an extent become open since this was asked last?
    #[must_use = "the answer is given once"]
    pub const fn take_opened(&mut self) -> bool {
        core::mem::replace(&mut self.opened, false)
    }

    /// So many bits of this extent could not be synced. Remembered while the extent is cached.
    pub fn add_failed(&mut self, extent: RsExtentNr, bits: u64) {
        if let Some(entry) = self.entries.iter_mut().find(|e| e.extent == extent) {
            entry.failed = entry.failed.saturating_add(bits);
        }
    }

    /// Bits of this extent that could not be synced, as far as is remembered.
    #[must_use]
    pub fn failed(&self, extent: RsExtentNr) -> u64 {
        self.find(extent).map_or(0, |e| e.failed)
    }

    /// Extents that are closed or locked.
    #[must_use]
    pub fn held(&self) -> usize {
        self.entries.iter().filter(|e| e.is_held()).count()
    }

    /// Are all extents open?
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.held() == 0
    }

    fn find(&self, extent: RsExtentNr) -> Option<&Entry> {
        self.entries.iter().find(|e| e.extent == extent)
    }

    /// The entry of the extent; if there is none, a new one in a free place or in that of the open
    /// extent that was not used for longest.
    fn entry(&mut self, extent: RsExtentNr) -> Option<&mut Entry> {
        self.uses += 1;
        let used = self.uses;
        let known = self.entries.iter().position(|e| e.extent == extent);
        let at = known.or_else(|| self.place_for(extent))?;
        let entry = self.entries.get_mut(at)?;
        entry.used = used;
        Some(entry)
    }

    fn place_for(&mut self, extent: RsExtentNr) -> Option<usize> {
        let new =
            Entry { extent, references: 0, closed: false, priority: false, failed: 0, used: 0 };
        if self.entries.len() < ENTRIES {
            self.entries.push(new);
            return Some(self.entries.len() - 1);
        }
        let open = self.entries.iter().enumerate().filter(|(_, e)| !e.is_held());
        let (at, _) = open.min_by_key(|(_, e)| e.used)?;
        self.entries[at] = new;
        Some(at)
    }
}

/// Closes the extent and, if no write is in flight inside, takes a reference.
fn lock(entry: &mut Entry, in_use: impl Fn(AlExtentNr) -> bool) -> bool {
    entry.closed = true;
    if entry.references == 0 && al_extents_of(entry.extent).any(in_use) {
        return false;
    }
    entry.references += 1;
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::BTreeMap;
    use alloc::vec;
    use proptest::prelude::*;
    use proptest::sample::Index;

    const FREE: fn(AlExtentNr) -> bool = |_| false;

    fn only(used: u32) -> impl Fn(AlExtentNr) -> bool {
        move |e| e.0 == used
    }

    fn closed(extents: &RsExtents, extent: u32) -> bool {
        let mut inside = al_extents_of(RsExtentNr(extent));
        let first = inside.next().is_some_and(|e| extents.is_closed_for_writes(e));
        assert!(inside.all(|e| extents.is_closed_for_writes(e) == first), "all four or none");
        first
    }

    #[test]
    fn four_log_extents_are_in_one_resync_extent() {
        assert!(al_extents_of(RsExtentNr(3)).map(|e| e.0).eq(12..16));
        assert_eq!((rs_extent_of(AlExtentNr(15)), rs_extent_of(AlExtentNr(16))).0.0, 3);
        assert_eq!(al_extents_of(RsExtentNr(u32::MAX)).count(), 0);
    }

    #[test]
    fn last_put_opens() {
        let mut extents = RsExtents::new();
        for _ in 0..2 {
            assert_eq!(extents.try_lock(RsExtentNr(1), FREE, false), TryLock::Locked);
        }
        assert!(closed(&extents, 1) && !closed(&extents, 0) && !closed(&extents, 2));
        extents.set_priority(RsExtentNr(1));
        extents.put(RsExtentNr(1));
        assert!(closed(&extents, 1) && extents.has_priority(RsExtentNr(1)));
        assert!(!extents.take_opened());
        extents.put(RsExtentNr(1));
        assert!(!closed(&extents, 1) && !extents.has_priority(RsExtentNr(1)));
        assert!(extents.take_opened() && !extents.take_opened() && extents.is_idle());
    }

    #[test]
    fn a_write_in_flight_keeps_the_extent_half_way() {
        for used in 4..8 {
            let mut extents = RsExtents::new();
            assert_eq!(extents.try_lock(RsExtentNr(1), only(used), false), TryLock::GiveUp);
            assert_eq!(extents.half_way(), Some(RsExtentNr(1)));
            assert!(closed(&extents, 1) && !extents.is_locked(RsExtentNr(1)));
            assert_eq!(extents.try_lock(RsExtentNr(1), FREE, false), TryLock::Locked);
            assert_eq!(extents.half_way(), None);
        }
    }

    #[test]
    fn another_extent_opens_the_half_way_one() {
        let mut extents = RsExtents::new();
        assert_eq!(extents.try_lock(RsExtentNr(1), only(4), false), TryLock::GiveUp);
        assert_eq!(extents.try_lock(RsExtentNr(2), FREE, false), TryLock::Locked);
        assert!(!closed(&extents, 1) && extents.half_way().is_none() && extents.take_opened());
    }

    #[test]
    fn throttled_goes_on_only_with_the_half_way_extent() {
        let mut extents = RsExtents::new();
        assert_eq!(extents.try_lock(RsExtentNr(1), FREE, true), TryLock::GiveUp);
        assert!(extents.is_idle());
        assert_eq!(extents.try_lock(RsExtentNr(1), only(4), false), TryLock::GiveUp);
        assert_eq!(extents.try_lock(RsExtentNr(2), FREE, true), TryLock::GiveUp);
        assert_eq!(extents.half_way(), Some(RsExtentNr(1)), "left alone");
        assert_eq!(extents.try_lock(RsExtentNr(1), FREE, true), TryLock::Locked);
        assert_eq!(extents.try_lock(RsExtentNr(1), FREE, true), TryLock::GiveUp, "not even more");
        extents.put(RsExtentNr(1));
        assert_eq!(extents.try_lock(RsExtentNr(1), only(4), false), TryLock::GiveUp);
        assert_eq!(extents.try_lock(RsExtentNr(1), only(4), true), TryLock::GiveUp);
        assert!(extents.is_idle() && extents.half_way().is_none(), "opened again");
    }

    #[test]
    fn serving_steps_aside_only_for_a_waiting_write_and_above_c_min_rate() {
        let mut extents = RsExtents::new();
        let never = || panic!("asked though nobody waits");
        assert_eq!(extents.serve_lock(RsExtentNr(1), only(7), never), ServeLock::Wait);
        assert!(closed(&extents, 1));
        extents.set_priority(RsExtentNr(1));
        assert_eq!(extents.serve_lock(RsExtentNr(1), only(7), || false), ServeLock::Wait);
        assert!(closed(&extents, 1));
        assert_eq!(extents.serve_lock(RsExtentNr(1), only(7), || true), ServeLock::StepAside);
        assert!(!closed(&extents, 1) && extents.take_opened());
        assert_eq!(extents.serve_lock(RsExtentNr(1), only(7), never), ServeLock::Wait);
        extents.set_priority(RsExtentNr(1));
        assert_eq!(extents.serve_lock(RsExtentNr(1), FREE, || true), ServeLock::Locked);
    }

    #[test]
    fn each_side_holds_a_bounded_number() {
        let mut extents = RsExtents::new();
        for n in 0..31 {
            assert_eq!(extents.serve_lock(RsExtentNr(n), FREE, || false), ServeLock::Locked);
        }
        assert_eq!(extents.serve_lock(RsExtentNr(99), FREE, || false), ServeLock::Wait);
        assert!(!closed(&extents, 99), "no room, so not closed");
        assert_eq!(extents.serve_lock(RsExtentNr(30), FREE, || false), ServeLock::Locked);
        for n in 31..59 {
            assert_eq!(extents.try_lock(RsExtentNr(n), FREE, false), TryLock::Locked, "{n}");
        }
        assert_eq!(extents.try_lock(RsExtentNr(99), FREE, false), TryLock::GiveUp);
        assert_eq!(extents.try_lock(RsExtentNr(58), FREE, false), TryLock::Locked);
        assert_eq!(extents.held(), 59);
    }

    #[test]
    fn open_extents_make_room_and_held_ones_do_not() {
        let mut extents = RsExtents::new();
        assert_eq!(extents.try_lock(RsExtentNr(0), FREE, false), TryLock::Locked);
        for n in 1..200 {
            assert_eq!(extents.try_lock(RsExtentNr(n), FREE, false), TryLock::Locked);
            extents.add_failed(RsExtentNr(n), u64::from(n));
            extents.put(RsExtentNr(n));
        }
        assert_eq!(extents.entries.len(), ENTRIES);
        assert!(extents.is_locked(RsExtentNr(0)));
        assert_eq!([198, 199, 1].map(|n| extents.failed(RsExtentNr(n))), [198, 199, 0]);
    }

    #[test]
    fn release_and_clear_open() {
        let mut extents = RsExtents::new();
        assert_eq!(extents.serve_lock(RsExtentNr(1), only(4), || false), ServeLock::Wait);
        extents.release(RsExtentNr(1));
        assert!(extents.is_idle() && extents.take_opened());
        assert_eq!(extents.try_lock(RsExtentNr(1), FREE, false), TryLock::Locked);
        extents.release(RsExtentNr(1));
        assert!(extents.is_locked(RsExtentNr(1)), "only what is not locked");
        extents.clear();
        assert!(extents.is_idle() && extents.take_opened());
        extents.clear();
        assert!(!extents.take_opened());
    }

    #[test]
    #[should_panic(expected = "resync extent 5 is not locked")]
    fn a_put_too_many_is_a_bug() {
        RsExtents::new().put(RsExtentNr(5));
    }

    /// A node: application writes that need runs of log extents, and requests of a resync.
    #[derive(Default)]
    struct Node {
        extents: RsExtents,
        /// References of writes to log extents.
        log: BTreeMap<u32, u32>,
        /// Writes that wait: next and last extent they need, and where they began.
        waiting: Vec<(u32, Range<u32>)>,
        /// Writes in flight.
        writes: Vec<Range<u32>>,
        /// Requests of the resync that run.
        requests: Vec<u32>,
        /// Requests that wait to be served, in order.
        queue: Vec<u32>,
    }

    const LOG_EXTENTS: u32 = 24;

    impl Node {
        fn check(&self) {
            for n in 0..LOG_EXTENTS / 4 {
                let used = al_extents_of(RsExtentNr(n)).any(|e| self.log.contains_key(&e.0));
                let locked = self.requests.contains(&n);
                assert_eq!(self.extents.is_locked(RsExtentNr(n)), locked);
                assert!(!(used && locked), "extent {n}: writes and resync at once");
            }
        }

        /// A write goes as far as it gets; `patience` extents at most in this round (a transaction
        /// of the log has room for 64), and what it holds it keeps.
        fn advance(&mut self, at: usize, mut patience: u32) {
            let (mut next, range) = self.waiting[at].clone();
            while next < range.end && patience > 0 {
                let rs = rs_extent_of(AlExtentNr(next));
                let holds_inside = next > range.start && rs_extent_of(AlExtentNr(next - 1)) == rs;
                if self.extents.is_closed_for_writes(AlExtentNr(next)) && !holds_inside {
                    self.extents.set_priority(rs);
                    break;
                }
                *self.log.entry(next).or_default() += 1;
                next += 1;
                patience -= 1;
            }
            self.waiting[at].0 = next;
            if next == range.end {
                self.waiting.remove(at);
                self.writes.push(range);
            }
        }

        fn finish_write(&mut self, at: usize) {
            for e in self.writes.swap_remove(at) {
                let count = self.log.get_mut(&e).unwrap();
                *count -= 1;
                if *count == 0 {
                    self.log.remove(&e);
                }
            }
        }

        fn try_lock(&mut self, n: u32, throttled: bool) -> bool {
            let log = &self.log;
            let got = self.extents.try_lock(RsExtentNr(n), |e| log.contains_key(&e.0), throttled);
            if got == TryLock::Locked {
                self.requests.push(n);
            }
            got == TryLock::Locked
        }

        /// The first in the queue, as the receiver does it.
        fn serve(&mut self, throttled: bool) {
            let Some(&n) = self.queue.first() else { return };
            let log = &self.log;
            let in_use = |e: AlExtentNr| log.contains_key(&e.0);
            if self.extents.serve_lock(RsExtentNr(n), in_use, || throttled) == ServeLock::Locked {
                self.queue.remove(0);
                self.requests.push(n);
            }
        }

        fn finish_request(&mut self, at: usize) {
            let n = self.requests.swap_remove(at);
            self.extents.put(RsExtentNr(n));
        }
    }

    #[derive(Clone, Debug)]
    enum Op {
        Write(u32, u32),
        Advance(Index, u32),
        FinishWrite(Index),
        Try(u32, bool),
        Ask(u32),
        Serve(bool),
        FinishRequest(Index),
    }

    fn op() -> impl Strategy<Value = Op> {
        let any_index = any::<Index>;
        prop_oneof![
            3 => (0..LOG_EXTENTS, 1..12u32).prop_map(|(s, n)| Op::Write(s, n)),
            4 => (any_index(), 1..5u32).prop_map(|(i, n)| Op::Advance(i, n)),
            3 => any_index().prop_map(Op::FinishWrite),
            3 => (0..LOG_EXTENTS / 4, any::<bool>()).prop_map(|(n, t)| Op::Try(n, t)),
            2 => (0..LOG_EXTENTS / 4).prop_map(Op::Ask),
            3 => any::<bool>().prop_map(Op::Serve),
            3 => any_index().prop_map(Op::FinishRequest),
        ]
    }

    fn run(ops: Vec<Op>, generates: bool) -> Node {
        let mut node = Node::default();
        for op in ops {
            match op {
                Op::Write(start, len) => {
                    let end = (start + len).min(LOG_EXTENTS);
                    node.waiting.push((start, start..end));
                }
                Op::Advance(i, n) if !node.waiting.is_empty() => {
                    // A write that holds something is alone with that, and goes first.
                    let partly = node.waiting.iter().position(|(next, r)| *next > r.start);
                    node.advance(partly.unwrap_or_else(|| i.index(node.waiting.len())), n);
                }
                Op::FinishWrite(i) if !node.writes.is_empty() => {
                    node.finish_write(i.index(node.writes.len()));
                }
                Op::Try(n, throttled) if generates => {
                    node.try_lock(n, throttled);
                }
                Op::Ask(n) if !generates => node.queue.push(n),
                Op::Serve(throttled) if !generates => node.serve(throttled),
                Op::FinishRequest(i) if !node.requests.is_empty() => {
                    node.finish_request(i.index(node.requests.len()));
                }
                _ => {}
            }
            node.check();
        }
        node
    }

    /// Everything that has begun ends, also if the resync never steps aside (`c-min-rate 0`).
    fn settle(mut node: Node, wanted: Option<u32>) {
        let mut wanted = wanted;
        for _ in 0..500 {
            if node.waiting.is_empty() && node.queue.is_empty() && wanted.is_none() {
                node.writes.clear();
                node.requests.clear();
                return;
            }
            for at in (0..node.requests.len()).rev() {
                node.finish_request(at);
            }
            for at in (0..node.writes.len()).rev() {
                node.finish_write(at);
            }
            node.serve(false);
            wanted = wanted.filter(|n| !node.try_lock(*n, false));
            let partly = node.waiting.iter().position(|(next, r)| *next > r.start);
            match partly {
                Some(at) => node.advance(at, 3),
                None => {
                    for at in (0..node.waiting.len()).rev() {
                        node.advance(at, u32::MAX);
                        if node.waiting.iter().any(|(next, r)| *next > r.start) {
                            break;
                        }
                    }
                }
            }
            node.check();
        }
        panic!("{:?} {:?} {wanted:?} are stuck", node.waiting, node.queue);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]
        #[test]
        fn generating_side_excludes_writes_and_nobody_waits_for_ever(
            ops in prop::collection::vec(op(), 1..120),
            wanted in 0..LOG_EXTENTS / 4,
        ) {
            settle(run(ops, true), Some(wanted));
        }

        #[test]
        fn serving_side_excludes_writes_and_nobody_waits_for_ever(
            ops in prop::collection::vec(op(), 1..120),
        ) {
            settle(run(ops, false), None);
        }
    }

    #[test]
    fn a_write_that_is_half_in_does_not_wait_for_itself() {
        // Log extent 0 is held, then the resync closes the extent; the write needs extent 1 too.
        let mut node = Node { waiting: vec![(0, 0..2)], ..Node::default() };
        node.advance(0, 1);
        assert!(!node.try_lock(0, false) && node.extents.is_closed_for_writes(AlExtentNr(1)));
        settle(node, Some(0));
    }
}
