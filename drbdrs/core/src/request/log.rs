//! The transfer log: all requests of a connection in the order in which they were accepted, and
//! the epochs that cut this order. Spec: io-path-and-resync.md §1.6, §1.7.
//!
//! Invariants: a request is in the log from its routing until it is forgotten; epoch numbers never
//! go back and are never reset; mirrored and other writes never share an epoch (the caller closes
//! the epoch when mirroring changes).

use alloc::vec::Vec;

use drbd_types::Tick;

use crate::request::Request;
use crate::slab::{Key, Slab};

/// Key of a request; its number travels to the peer as block_id.
pub type ReqKey = Key<Entry>;

/// A request with its neighbours.
#[derive(Debug)]
pub struct Entry {
    /// The request.
    pub request: Request,
    before: Option<ReqKey>,
    after: Option<ReqKey>,
}

/// Why a P_BARRIER_ACK is refused, with the original's wording.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadBarrierAck {
    /// No write waits for one.
    #[error("BAD! BarrierAck #{number} received, but no epoch in tl!?")]
    NoEpoch {
        /// As received.
        number: u32,
    },
    /// Another epoch is the oldest.
    #[error("BAD! BarrierAck #{number} received, expected #{expected}!")]
    WrongNumber {
        /// As received.
        number: u32,
        /// Of the oldest epoch.
        expected: u32,
    },
    /// The peer counted otherwise.
    #[error(
        "BAD! BarrierAck #{number} received with n_writes={found}, expected n_writes={expected}!"
    )]
    WrongCount {
        /// As received.
        number: u32,
        /// As received.
        found: u32,
        /// Writes of this epoch in the log.
        expected: u32,
    },
}

/// The log.
#[derive(Debug, Default)]
pub struct TransferLog {
    entries: Slab<Entry>,
    head: Option<ReqKey>,
    tail: Option<ReqKey>,
    open_epoch: u32,
    writes_in_open_epoch: u32,
}

impl TransferLog {
    /// Appends a request; it gets the number of the open epoch.
    pub fn push(&mut self, mut request: Request) -> ReqKey {
        request.epoch = self.open_epoch;
        if request.kind.is_write() {
            self.writes_in_open_epoch += 1;
        }
        let before = self.tail;
        let key = self.entries.insert(Entry { request, before, after: None });
        match before.and_then(|tail| self.entries.get_mut(tail)) {
            Some(entry) => entry.after = Some(key),
            None => self.head = Some(key),
        }
        self.tail = Some(key);
        key
    }

    /// Takes a request out.
    pub fn remove(&mut self, key: ReqKey) -> Option<Request> {
        let entry = self.entries.remove(key)?;
        match entry.before.and_then(|before| self.entries.get_mut(before)) {
            Some(before) => before.after = entry.after,
            None => self.head = entry.after,
        }
        match entry.after.and_then(|after| self.entries.get_mut(after)) {
            Some(after) => after.before = entry.before,
            None => self.tail = entry.before,
        }
        Some(entry.request)
    }

    /// A request.
    pub fn get(&self, key: ReqKey) -> Option<&Request> {
        self.entries.get(key).map(|entry| &entry.request)
    }

    /// A request, to be changed.
    pub fn get_mut(&mut self, key: ReqKey) -> Option<&mut Request> {
        self.entries.get_mut(key).map(|entry| &mut entry.request)
    }

    /// All requests, oldest first.
    pub fn iter(&self) -> Iter<'_> {
        Iter { log: self, next: self.head }
    }

    /// The keys of all requests that a test picks, oldest first.
    pub fn keys(&self, mut test: impl FnMut(&Request) -> bool) -> Vec<ReqKey> {
        self.iter().filter(|(_, request)| test(request)).map(|(key, _)| key).collect()
    }

    /// Requests in it.
    pub const fn len(&self) -> usize {
        self.entries.len()
    }

    /// Nothing in it?
    pub const fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Epoch of the oldest mirrored write that is neither acknowledged by a barrier nor lost.
    pub fn oldest_unacknowledged(&self) -> Option<u32> {
        self.iter().find(|(_, r)| is_waiting_write(r)).map(|(_, r)| r.epoch)
    }

    /// When the oldest request was sent that the peer has not answered.
    pub fn oldest_pending(&self) -> Option<Tick> {
        self.iter().find(|(_, r)| r.progress.is_pending()).and_then(|(_, r)| r.sent_at)
    }

    /// Number of the epoch that new requests get.
    pub const fn open_epoch(&self) -> u32 {
        self.open_epoch
    }

    /// Writes that the open epoch has got so far.
    pub const fn writes_in_open_epoch(&self) -> u32 {
        self.writes_in_open_epoch
    }

    /// Ends the open epoch, if it has writes: what is accepted from now on belongs to the next.
    pub fn close_epoch(&mut self) {
        if self.writes_in_open_epoch > 0 {
            self.open_epoch = self.open_epoch.wrapping_add(1);
            self.writes_in_open_epoch = 0;
        }
    }

    /// Checks an acknowledgement of the peer and returns the requests of its epoch.
    ///
    /// The oldest mirrored write that still waits decides which epoch is expected; all writes of
    /// that epoch from there on count, over all volumes. Spec §1.7.
    ///
    /// # Errors
    /// The peer miscounted; the connection must end.
    pub fn acknowledge(&self, number: u32, count: u32) -> Result<Vec<ReqKey>, BadBarrierAck> {
        let mut open = self.iter().skip_while(|(_, r)| !is_waiting_write(r)).peekable();
        let Some((_, oldest)) = open.peek() else {
            return Err(BadBarrierAck::NoEpoch { number });
        };
        let expected = oldest.epoch;
        if expected != number {
            return Err(BadBarrierAck::WrongNumber { number, expected });
        }
        let keys: Vec<ReqKey> = open
            .filter(|(_, r)| r.epoch == number && is_waiting_write(r))
            .map(|(k, _)| k)
            .collect();
        let expected = u32::try_from(keys.len()).unwrap_or(u32::MAX);
        if expected != count {
            return Err(BadBarrierAck::WrongCount { number, found: count, expected });
        }
        Ok(keys)
    }
}

/// A write that the peer wants to get once more is in no epoch until then.
fn is_waiting_write(request: &Request) -> bool {
    request.kind.is_write() && !request.is_postponed && request.progress.is_unacknowledged_mirror()
}

/// Walks through the log.
#[derive(Debug)]
pub struct Iter<'a> {
    log: &'a TransferLog,
    next: Option<ReqKey>,
}

impl<'a> Iterator for Iter<'a> {
    type Item = (ReqKey, &'a Request);

    fn next(&mut self) -> Option<Self::Item> {
        let key = self.next?;
        let entry = self.log.entries.get(key)?;
        self.next = entry.after;
        Some((key, &entry.request))
    }
}

/// Which epoch the peer was told about last. Spec §1.6: before anything of another epoch is sent,
/// the old one is ended by P_BARRIER, if it had a mirrored write; an empty one never is (the
/// original's receiver would answer it at the wrong time).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SentEpoch {
    current: Option<(u32, u32)>,
}

impl SentEpoch {
    /// Was anything sent on this connection?
    pub const fn is_open(&self) -> bool {
        self.current.is_some()
    }

    /// A new connection: nothing was sent.
    pub fn forget(&mut self) {
        self.current = None;
    }

    /// Something of this epoch is sent next; returns the barrier that must go first.
    #[must_use]
    pub fn enter(&mut self, epoch: u32) -> Option<u32> {
        match self.current {
            Some((current, _)) if current == epoch => None,
            Some((current, writes)) => {
                self.current = Some((epoch, 0));
                (writes > 0).then_some(current)
            }
            None => {
                self.current = Some((epoch, 0));
                None
            }
        }
    }

    /// A mirrored write of the entered epoch was sent.
    pub const fn wrote(&mut self) {
        if let Some((_, writes)) = &mut self.current {
            *writes += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Protocol;
    use crate::ids::{AppId, BufId};
    use crate::request::progress::{Happened, Progress, Remote};
    use crate::request::{Kind, WriteFlags};
    use alloc::vec;
    use drbd_types::{Sector, SectorCount, SectorRange, VolumeNr};

    fn write(remote: Remote) -> Request {
        Request {
            app: AppId(1),
            volume: VolumeNr(0),
            kind: Kind::Write(BufId(1), WriteFlags::default()),
            range: SectorRange { start: Sector(0), len: SectorCount(8) },
            progress: Progress::new(true, remote),
            epoch: 0,
            holds_al: false,
            is_completed: false,
            is_postponed: false,
            is_in_tree: false,
            attempts: 0,
            asked_at: Tick(0),
            since: Tick(0),
            sent_at: None,
        }
    }

    fn mirrored() -> Request {
        write(Remote::Mirror(Protocol::C))
    }

    #[test]
    fn the_log_keeps_its_order_when_the_middle_leaves() {
        let mut log = TransferLog::default();
        let keys: Vec<_> = (0..4).map(|_| log.push(mirrored())).collect();
        log.remove(keys[1]);
        assert_eq!(log.keys(|_| true), vec![keys[0], keys[2], keys[3]]);
        log.remove(keys[0]);
        log.remove(keys[3]);
        assert_eq!(log.keys(|_| true), vec![keys[2]]);
        log.remove(keys[2]);
        assert!(log.is_empty());
        let again = log.push(mirrored());
        assert_eq!(log.keys(|_| true), vec![again]);
    }

    #[test]
    fn an_empty_epoch_is_not_closed() {
        let mut log = TransferLog::default();
        log.close_epoch();
        assert_eq!(log.open_epoch(), 0);
        log.push(mirrored());
        log.close_epoch();
        log.close_epoch();
        assert_eq!(log.open_epoch(), 1);
    }

    #[test]
    fn a_barrier_ack_must_fit_the_oldest_epoch() {
        let mut log = TransferLog::default();
        assert_eq!(log.acknowledge(0, 1), Err(BadBarrierAck::NoEpoch { number: 0 }));
        let a = log.push(mirrored());
        let b = log.push(mirrored());
        log.close_epoch();
        let c = log.push(mirrored());
        assert_eq!(
            log.acknowledge(1, 1),
            Err(BadBarrierAck::WrongNumber { number: 1, expected: 0 })
        );
        let miscounted = BadBarrierAck::WrongCount { number: 0, found: 3, expected: 2 };
        assert_eq!(log.acknowledge(0, 3), Err(miscounted));
        assert_eq!(log.acknowledge(0, 2), Ok(vec![a, b]));
        for key in [a, b] {
            log.get_mut(key).unwrap().progress.on(Happened::BarrierAck);
        }
        assert_eq!(log.acknowledge(1, 1), Ok(vec![c]));
    }

    #[test]
    fn writes_that_were_not_mirrored_are_not_waited_for() {
        let mut log = TransferLog::default();
        log.push(write(Remote::None));
        log.close_epoch();
        let mirrored = log.push(mirrored());
        assert_eq!(log.acknowledge(1, 1), Ok(vec![mirrored]));
    }

    #[test]
    fn a_superseded_write_is_not_counted() {
        let mut log = TransferLog::default();
        let a = log.push(mirrored());
        let b = log.push(mirrored());
        log.get_mut(a).unwrap().progress.on(Happened::Superseded);
        assert_eq!(log.acknowledge(0, 1), Ok(vec![b]));
    }

    #[test]
    fn barriers_go_before_the_next_epoch_and_never_for_an_empty_one() {
        let mut sent = SentEpoch::default();
        assert_eq!(sent.enter(3), None);
        assert_eq!(sent.enter(3), None);
        sent.wrote();
        assert_eq!(sent.enter(4), Some(3));
        assert_eq!(sent.enter(5), None, "epoch 4 had no mirrored write");
        sent.wrote();
        sent.forget();
        assert_eq!(sent.enter(7), None, "a new connection knows nothing of epoch 5");
    }
}
