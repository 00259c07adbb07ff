//! What will happen, in the order of time; things of the same time in the order in which they were
//! put down.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// See above.
#[derive(Debug)]
pub struct Agenda<T> {
    /// Time, number, and place in `entries`: entries themselves do not move.
    order: BinaryHeap<Reverse<(u64, u64, usize)>>,
    entries: Vec<Option<T>>,
    free: Vec<usize>,
    next: u64,
}

impl<T> Default for Agenda<T> {
    fn default() -> Self {
        Self { order: BinaryHeap::new(), entries: Vec::new(), free: Vec::new(), next: 0 }
    }
}

impl<T> Agenda<T> {
    /// Takes something in.
    pub fn put(&mut self, at: u64, entry: T) {
        let place = self.free.pop().unwrap_or(self.entries.len());
        if let Some(free) = self.entries.get_mut(place) {
            *free = Some(entry);
        } else {
            self.entries.push(Some(entry));
        }
        self.next += 1;
        self.order.push(Reverse((at, self.next, place)));
    }

    /// Takes the next thing out, with its time.
    pub fn pop(&mut self) -> Option<(u64, T)> {
        let Reverse((at, _, place)) = self.order.pop()?;
        self.free.push(place);
        Some((at, self.entries.get_mut(place)?.take()?))
    }

    /// When the next thing happens.
    pub fn next_at(&self) -> Option<u64> {
        self.order.peek().map(|Reverse((at, ..))| *at)
    }

    /// Everything, in order.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        let mut order: Vec<_> = self.order.iter().map(|Reverse(key)| *key).collect();
        order.sort_unstable();
        order.into_iter().filter_map(|(_, _, place)| self.entries.get(place)?.as_ref())
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
        assert!(agenda.iter().eq(&["b", "c", "d", "e"]));
        let rest = std::iter::from_fn(|| agenda.pop());
        assert!(rest.eq([(3, "b"), (5, "c"), (5, "d"), (5, "e")]));
    }
}
