//! A table with stable keys and bounded size. Keys carry a generation, so that a late answer never
//! hits a reused place; after the table has grown to its working size nothing is allocated.

use alloc::vec::Vec;
use core::marker::PhantomData;

/// Key of an entry: place in the low half, generation in the high half. Never all ones, and never
/// zero.
#[derive(Debug)]
pub struct Key<T>(u64, PhantomData<fn() -> T>);

impl<T> Key<T> {
    /// The number, for the wire or for an [`crate::ids::IoId`].
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// From a number that came back from outside; whether it means anything is decided by the
    /// table.
    pub const fn from_raw(raw: u64) -> Self {
        Self(raw, PhantomData)
    }

    fn place(self) -> usize {
        usize::try_from(self.0 & 0xFFFF_FFFF).unwrap_or(usize::MAX)
    }
}

// Derived implementations would demand the same of `T`.
impl<T> Clone for Key<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Key<T> {}
impl<T> PartialEq for Key<T> {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}
impl<T> Eq for Key<T> {}
impl<T> PartialOrd for Key<T> {
    fn partial_cmp(&self, other: &Self) -> Option<core::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl<T> Ord for Key<T> {
    fn cmp(&self, other: &Self) -> core::cmp::Ordering {
        self.0.cmp(&other.0)
    }
}

#[derive(Debug)]
struct Place<T> {
    /// Of the entry that is or will be here; 1..=0x7FFF_FFFF, so that no key is ever all ones.
    generation: u32,
    entry: Option<T>,
}

/// The table.
#[derive(Debug)]
pub struct Slab<T> {
    places: Vec<Place<T>>,
    free: Vec<u32>,
    len: usize,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { places: Vec::new(), free: Vec::new(), len: 0 }
    }
}

impl<T> Slab<T> {
    /// An empty table.
    pub fn new() -> Self {
        Self::default()
    }

    /// Entries in it.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Without entries?
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes an entry in. Places are reused in a fixed order, so that runs repeat exactly.
    pub fn insert(&mut self, entry: T) -> Key<T> {
        self.len += 1;
        if let Some(at) = self.free.pop()
            && let Some(place) = self.places.get_mut(at as usize)
        {
            place.entry = Some(entry);
            return key(at, place.generation);
        }
        let at = u32::try_from(self.places.len()).expect("tables are bounded by max-buffers");
        self.places.push(Place { generation: 1, entry: Some(entry) });
        key(at, 1)
    }

    /// The entry, if the key is (still) good.
    pub fn get(&self, key: Key<T>) -> Option<&T> {
        let place = self.places.get(key.place())?;
        if u64::from(place.generation) != key.0 >> 32 {
            return None;
        }
        place.entry.as_ref()
    }

    /// The entry, to be changed.
    pub fn get_mut(&mut self, key: Key<T>) -> Option<&mut T> {
        let place = self.places.get_mut(key.place())?;
        if u64::from(place.generation) != key.0 >> 32 {
            return None;
        }
        place.entry.as_mut()
    }

    /// Takes an entry out.
    pub fn remove(&mut self, key: Key<T>) -> Option<T> {
        let at = key.place();
        let place = self.places.get_mut(at)?;
        if u64::from(place.generation) != key.0 >> 32 {
            return None;
        }
        let entry = place.entry.take()?;
        place.generation = if place.generation >= 0x7FFF_FFFF { 1 } else { place.generation + 1 };
        self.free.push(u32::try_from(at).expect("came from a u32"));
        self.len -= 1;
        Some(entry)
    }

    /// All entries, by place.
    pub fn iter(&self) -> impl Iterator<Item = (Key<T>, &T)> {
        self.places.iter().enumerate().filter_map(|(at, place)| {
            let at = u32::try_from(at).ok()?;
            Some((key(at, place.generation), place.entry.as_ref()?))
        })
    }
}

fn key<T>(at: u32, generation: u32) -> Key<T> {
    Key::from_raw(u64::from(generation) << 32 | u64::from(at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_of_a_gone_entry_hits_nothing() {
        let mut slab = Slab::new();
        let a = slab.insert('a');
        assert_eq!(slab.remove(a), Some('a'));
        let b = slab.insert('b');
        assert_ne!(a, b);
        assert_eq!((slab.get(a), slab.get(b)), (None, Some(&'b')));
        assert_eq!(slab.remove(a), None);
        assert_eq!(slab.len(), 1);
    }

    #[test]
    fn foreign_numbers_hit_nothing() {
        let mut slab = Slab::new();
        slab.insert('a');
        for raw in [0, 1, u64::MAX, u64::MAX >> 1, 7 << 32] {
            assert_eq!(slab.get(Key::from_raw(raw)), None, "{raw:x}");
        }
    }
}
