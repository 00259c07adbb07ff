//! Epochs of the receiving side: which writes must be finished before which barrier is
//! acknowledged. Spec: io-path-and-resync.md §2.3, §2.4.
//!
//! Invariants (§15, 22 and 23): a barrier is acknowledged exactly once, in order, with the number of
//! writes received in its epoch, after all of them are finished and, with [`Ordering::Flush`],
//! flushed; no later write is received before that, except with [`Ordering::None`].
//!
//! A write that the peer has to send again is not carried out, so nothing is kept in order behind
//! it: it delays the acknowledgement of its epoch, but not the writes behind the barrier.

use alloc::collections::VecDeque;

/// How writes of different epochs are kept in order on the disk, the strongest last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ordering {
    /// Not at all.
    None,
    /// An epoch begins when the one before is written.
    Drain,
    /// An epoch begins when the one before is written and flushed.
    Flush,
}

impl Ordering {
    /// As the log names it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Drain => "drain",
            Self::Flush => "flush",
        }
    }

    /// As `/proc/drbd` names it.
    pub const fn letter(self) -> char {
        match self {
            Self::None => 'n',
            Self::Drain => 'd',
            Self::Flush => 'f',
        }
    }

    /// What the options of the attached disks allow: the weakest of all.
    /// `disks` are pairs of `disk-flushes` and `disk-drain`.
    pub fn allowed(disks: impl IntoIterator<Item = (bool, bool)>) -> Self {
        disks.into_iter().fold(Self::Flush, |weakest, (flushes, drain)| {
            let this = match (flushes, drain) {
                (true, _) => Self::Flush,
                (false, true) => Self::Drain,
                (false, false) => Self::None,
            };
            weakest.min(this)
        })
    }
}

/// Which epoch a write belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct EpochId(u64);

/// The number that the peer gave the epoch; echoed, never looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarrierNr(pub u32);

#[derive(Clone, Copy, Debug)]
struct Epoch {
    id: EpochId,
    barrier: Option<BarrierNr>,
    /// Writes received.
    size: u32,
    /// Of these, not finished.
    active: u32,
    /// Writes that the peer has not taken back yet, to send them again.
    retried: u32,
    /// Its writes are on stable storage.
    is_flushed: bool,
}

impl Epoch {
    /// Did it end, and are all its writes written?
    const fn is_written(&self) -> bool {
        self.barrier.is_some() && self.active == 0
    }
}

/// All epochs that are not acknowledged; the last one is the one that writes are received in.
#[derive(Debug)]
pub struct PeerEpochs {
    open: VecDeque<Epoch>,
    next: u64,
    /// Method now in force.
    pub ordering: Ordering,
    flush: Flush,
    /// Counts flushes: an answer from an earlier connection is none of this one's.
    round: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flush {
    Idle,
    /// Of all epochs up to this one.
    Running(EpochId),
}

impl Default for PeerEpochs {
    fn default() -> Self {
        let mut new = Self {
            open: VecDeque::new(),
            next: 0,
            ordering: Ordering::Flush,
            flush: Flush::Idle,
            round: 0,
        };
        new.begin();
        new
    }
}

impl PeerEpochs {
    fn begin(&mut self) {
        let id = EpochId(self.next);
        self.next += 1;
        let epoch = Epoch { id, barrier: None, size: 0, active: 0, retried: 0, is_flushed: false };
        self.open.push_back(epoch);
    }

    /// Number of open epochs, the counter `ep`: at least 1.
    pub fn count(&self) -> usize {
        self.open.len()
    }

    /// A write was received.
    pub fn received(&mut self) -> EpochId {
        let Some(last) = self.open.back_mut() else { return EpochId(0) };
        last.size += 1;
        last.active += 1;
        last.id
    }

    /// A write is finished: its acknowledgement, if any, is on its way.
    pub fn finished(&mut self, id: EpochId) {
        if let Some(epoch) = self.find(id) {
            epoch.active = epoch.active.saturating_sub(1);
        }
    }

    /// A write turned out not to be one: two Primaries wrote the same place and this node
    /// decided against the peer's write. It must not count, or its epoch would never be
    /// acknowledged (defect 14.2).
    pub fn uncount(&mut self, id: EpochId) {
        if let Some(epoch) = self.find(id) {
            epoch.active = epoch.active.saturating_sub(1);
            epoch.size = epoch.size.saturating_sub(1);
        }
    }

    /// As [`Self::uncount`], but the epoch stays open until [`Self::taken_back`] is called for it.
    pub fn uncount_later(&mut self, id: EpochId) {
        self.uncount(id);
        if let Some(epoch) = self.find(id) {
            epoch.retried += 1;
        }
    }

    /// The peer does not count a write any more that it will send again.
    pub fn taken_back(&mut self, id: EpochId) {
        if let Some(epoch) = self.find(id) {
            epoch.retried = epoch.retried.saturating_sub(1);
        }
    }

    fn find(&mut self, id: EpochId) -> Option<&mut Epoch> {
        self.open.iter_mut().find(|epoch| epoch.id == id)
    }

    /// The epoch that writes are received in has ended. Must not be called while
    /// [`Self::holds_receiver`].
    ///
    /// A barrier without writes is not acknowledged (no sender that keeps the protocol sends one).
    pub fn on_barrier(&mut self, nr: BarrierNr) {
        let Some(last) = self.open.back_mut() else { return };
        if last.size > 0 {
            last.barrier = Some(nr);
            if self.ordering == Ordering::None {
                self.begin();
            }
        }
    }

    /// Must receiving wait, because a barrier came and the writes before it are not stable?
    pub fn holds_receiver(&self) -> bool {
        self.open.back().is_some_and(|last| last.barrier.is_some())
    }

    /// Everything of the oldest epochs is written, and it must be flushed now; the answer goes to
    /// [`Self::flushed`] with this number.
    #[must_use]
    pub fn take_flush(&mut self) -> Option<u32> {
        if self.ordering != Ordering::Flush || self.flush != Flush::Idle {
            return None;
        }
        let last = self.open.iter().take_while(|epoch| epoch.is_written()).last()?;
        if last.is_flushed {
            return None;
        }
        self.flush = Flush::Running(last.id);
        self.round = self.round.wrapping_add(1);
        Some(self.round)
    }

    /// Is this the flush that is waited for?
    pub fn is_flushing(&self, round: u32) -> bool {
        self.flush != Flush::Idle && self.round == round
    }

    /// The flush has ended. A disk that can not flush lowers the method for the rest of the time.
    pub fn flushed(&mut self, round: u32, ok: bool) {
        let Flush::Running(last) = self.flush else { return };
        if self.round != round {
            return;
        }
        self.flush = Flush::Idle;
        for epoch in self.open.iter_mut().filter(|epoch| epoch.id <= last) {
            epoch.is_flushed = true;
        }
        if !ok {
            self.ordering = self.ordering.min(Ordering::Drain);
        }
    }

    fn is_stable(&self, epoch: &Epoch) -> bool {
        epoch.is_written() && (epoch.is_flushed || self.ordering != Ordering::Flush)
    }

    /// The next acknowledgement that is due: barrier number and size of its epoch.
    #[must_use]
    pub fn take_acknowledged(&mut self) -> Option<(BarrierNr, u32)> {
        let oldest = *self.open.front()?;
        let is_due = self.is_stable(&oldest) && oldest.retried == 0;
        if is_due {
            self.open.pop_front();
        }
        if self.open.iter().all(|epoch| self.is_stable(epoch)) {
            // What is left only waits for the peer.
            self.begin();
        }
        oldest.barrier.filter(|_| is_due).map(|nr| (nr, oldest.size))
    }

    /// The connection is gone. Nothing of it will be acknowledged; writes that were received are
    /// still carried out, and report to epochs that nobody knows any more.
    pub fn lost(&mut self) {
        self.open.clear();
        self.flush = Flush::Idle;
        self.begin();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: BarrierNr = BarrierNr(1);
    const TWO: BarrierNr = BarrierNr(2);

    fn with(ordering: Ordering) -> PeerEpochs {
        PeerEpochs { ordering, ..PeerEpochs::default() }
    }

    /// Defect 14.4 of the original: the barrier ack went out before the flush.
    #[test]
    fn defect_14_4_a_barrier_is_acknowledged_after_writes_and_flush() {
        let mut epochs = with(Ordering::Flush);
        let (a, b) = (epochs.received(), epochs.received());
        epochs.on_barrier(ONE);
        assert!(epochs.holds_receiver());
        epochs.finished(a);
        assert_eq!(epochs.take_flush(), None, "one write is not finished");
        epochs.finished(b);
        assert_eq!(epochs.take_acknowledged(), None, "not flushed");
        let round = epochs.take_flush().unwrap();
        assert_eq!(epochs.take_flush(), None, "once");
        assert_eq!(epochs.take_acknowledged(), None, "still flushing");
        epochs.flushed(round, true);
        assert_eq!(epochs.take_acknowledged(), Some((ONE, 2)));
        assert_eq!(epochs.take_acknowledged(), None, "exactly once");
        assert!(!epochs.holds_receiver());
        assert_eq!(epochs.count(), 1);
    }

    #[test]
    fn drain_waits_but_does_not_flush() {
        let mut epochs = with(Ordering::Drain);
        let a = epochs.received();
        epochs.on_barrier(ONE);
        epochs.finished(a);
        assert_eq!(epochs.take_flush(), None);
        assert_eq!(epochs.take_acknowledged(), Some((ONE, 1)));
    }

    #[test]
    fn without_ordering_epochs_overlap_but_are_acknowledged_in_order() {
        let mut epochs = with(Ordering::None);
        let a = epochs.received();
        epochs.on_barrier(ONE);
        assert!(!epochs.holds_receiver());
        let b = epochs.received();
        epochs.on_barrier(TWO);
        epochs.finished(b);
        assert_eq!(epochs.take_acknowledged(), None, "the older one first");
        epochs.finished(a);
        assert_eq!(epochs.take_acknowledged(), Some((ONE, 1)));
        assert_eq!(epochs.take_acknowledged(), Some((TWO, 1)));
    }

    #[test]
    fn a_write_that_comes_again_delays_its_barrier_ack_only() {
        for ordering in [Ordering::Flush, Ordering::Drain, Ordering::None] {
            let mut epochs = with(ordering);
            let (a, b) = (epochs.received(), epochs.received());
            epochs.uncount_later(a);
            epochs.finished(b);
            epochs.on_barrier(ONE);
            for _ in 0..2 {
                if let Some(round) = epochs.take_flush() {
                    epochs.flushed(round, true);
                }
                assert_eq!(epochs.take_acknowledged(), None, "{ordering:?}: not taken back");
                assert!(!epochs.holds_receiver(), "{ordering:?}");
            }
            let c = epochs.received();
            epochs.on_barrier(TWO);
            epochs.finished(c);
            if let Some(round) = epochs.take_flush() {
                epochs.flushed(round, true);
            }
            assert_eq!(epochs.take_acknowledged(), None, "in order");
            assert!(!epochs.holds_receiver(), "{ordering:?}");
            epochs.taken_back(a);
            assert_eq!(epochs.take_acknowledged(), Some((ONE, 1)));
            assert_eq!(epochs.take_acknowledged(), Some((TWO, 1)));
            assert_eq!(epochs.take_acknowledged(), None);
            assert_eq!(epochs.count(), 1);
        }
    }

    #[test]
    fn a_barrier_without_writes_is_not_acknowledged() {
        let mut epochs = with(Ordering::Flush);
        epochs.on_barrier(ONE);
        assert!(!epochs.holds_receiver() && epochs.take_flush().is_none());
        let a = epochs.received();
        epochs.finished(a);
        assert_eq!(epochs.take_acknowledged(), None, "the stale number is forgotten");
    }

    /// Defect 14.2 of the original: an epoch with a superseded write was never acknowledged.
    #[test]
    fn defect_14_2_a_superseded_write_does_not_keep_its_epoch_open() {
        let mut epochs = with(Ordering::Drain);
        let (a, b) = (epochs.received(), epochs.received());
        epochs.uncount(a);
        epochs.finished(b);
        epochs.on_barrier(ONE);
        assert_eq!(epochs.take_acknowledged(), Some((ONE, 1)));
        let c = epochs.received();
        epochs.uncount(c);
        epochs.on_barrier(TWO);
        assert_eq!(epochs.take_acknowledged(), None, "nothing is left to count");
        assert!(!epochs.holds_receiver());
    }

    #[test]
    fn a_failing_flush_lowers_the_method_and_releases_the_epoch() {
        let mut epochs = with(Ordering::Flush);
        let a = epochs.received();
        epochs.finished(a);
        epochs.on_barrier(ONE);
        let round = epochs.take_flush().unwrap();
        epochs.flushed(round, false);
        assert_eq!(epochs.ordering, Ordering::Drain);
        assert_eq!(epochs.take_acknowledged(), Some((ONE, 1)));
    }

    #[test]
    fn writes_of_a_lost_connection_report_to_nobody() {
        let mut epochs = with(Ordering::Flush);
        let old = epochs.received();
        epochs.on_barrier(ONE);
        epochs.lost();
        assert!(!epochs.holds_receiver());
        epochs.finished(old);
        let new = epochs.received();
        epochs.on_barrier(TWO);
        assert_eq!(epochs.take_flush(), None, "the new write is not finished");
        epochs.finished(new);
        assert!(epochs.take_flush().is_some());
    }

    /// The answer of a flush that was under way when the connection broke must not count for an
    /// epoch of the next one: its writes would be acknowledged unflushed.
    #[test]
    fn a_flush_of_a_lost_connection_confirms_nothing() {
        let mut epochs = with(Ordering::Flush);
        let end_epoch = |epochs: &mut PeerEpochs, nr| {
            let write = epochs.received();
            epochs.finished(write);
            epochs.on_barrier(nr);
        };
        end_epoch(&mut epochs, ONE);
        let old = epochs.take_flush().unwrap();
        epochs.lost();
        epochs.flushed(old, true);
        end_epoch(&mut epochs, TWO);
        let new = epochs.take_flush().unwrap();
        epochs.flushed(old, true);
        assert_eq!(epochs.take_acknowledged(), None);
        epochs.flushed(new, true);
        assert_eq!(epochs.take_acknowledged(), Some((TWO, 1)));
    }

    #[test]
    fn the_weakest_disk_decides() {
        assert_eq!(Ordering::allowed([]), Ordering::Flush);
        assert_eq!(Ordering::allowed([(true, false), (false, true)]), Ordering::Drain);
        assert_eq!(Ordering::allowed([(false, false), (true, true)]), Ordering::None);
    }
}
