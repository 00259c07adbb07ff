//! What will happen, in the order of time; things of the same time in the order in which they were
//! put down.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

/// See above.
#[derive(Debug)]
pub struct Agenda<T> {
    /// Time, number, and place in `entries`: entries themselves do not move.
    order: BinaryHeap<Reverse<(u64, u64, usize)>>,
    entries: Vec<Option<T>>,
    free: Vec<usize>,
    /// What is to happen at once: the time and number of each are the largest so far.
    soon: VecDeque<(u64, T)>,
    now: u64,
    next: u64,
}

impl<T> Default for Agenda<T> {
    fn default() -> Self {
        Self {
            order: BinaryHeap::new(),
            entries: Vec::new(),
            free: Vec::new(),
            soon: VecDeque::new(),
            now: 0,
            next: 0,
        }
    }
}

impl<T> Agenda<T> {
    /// Takes something in; not earlier than what was taken out last.
    pub fn put(&mut self, at: u64, entry: T) {
        self.next += 1;
        if at == self.now {
            self.soon.push_back((self.next, entry));
            return;
        }
        let place = self.free.pop().unwrap_or(self.entries.len());
        if let Some(free) = self.entries.get_mut(place) {
            *free = Some(entry);
        } else {
            self.entries.push(Some(entry));
        }
        self.order.push(Reverse((at, self.next, place)));
    }

    /// Takes the next thing out, with its time.
    pub fn pop(&mut self) -> Option<(u64, T)> {
        let is_soon = self.soon.front().is_some_and(|(number, _)| {
            self.order.peek().is_none_or(|Reverse((at, n, _))| (self.now, number) < (*at, n))
        });
        if is_soon {
            return self.soon.pop_front().map(|(_, entry)| (self.now, entry));
        }
        let Reverse((at, _, place)) = self.order.pop()?;
        self.now = at;
        self.free.push(place);
        Some((at, self.entries.get_mut(place)?.take()?))
    }

    /// When the next thing happens.
    pub fn next_at(&self) -> Option<u64> {
        let later = self.order.peek().map(|Reverse((at, ..))| *at);
        if self.soon.is_empty() {
            later
        } else {
            Some(later.map_or(self.now, |at| at.min(self.now)))
        }
    }

    /// Everything, in order.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        let later = self.order.iter().filter_map(|Reverse((at, number, place))| {
            Some((*at, *number, self.entries.get(*place)?.as_ref()?))
        });
        let soon = self.soon.iter().map(|(number, entry)| (self.now, *number, entry));
        let mut all: Vec<_> = later.chain(soon).collect();
        all.sort_unstable_by_key(|(at, number, _)| (*at, *number));
        all.into_iter().map(|(.., entry)| entry)
    }
}

#[cfg(test)]
mod tests {
    use super::Agenda;

    #[test]
    fn things_of_one_time_keep_their_order() {
        let mut agenda = Agenda::default();
        for (at, entry) in [(5, "c"), (3, "a"), (5, "d"), (3, "b")] {
            agenda.put(at, entry);
        }
        assert_eq!(agenda.next_at(), Some(3));
        assert_eq!(agenda.pop(), Some((3, "a")));
        agenda.put(5, "e");
        agenda.put(3, "at once");
        assert!(agenda.iter().eq(&["b", "at once", "c", "d", "e"]));
        let rest = std::iter::from_fn(|| agenda.pop());
        assert!(rest.eq([(3, "b"), (3, "at once"), (5, "c"), (5, "d"), (5, "e")]));
        assert_eq!(agenda.next_at(), None);
    }
}
