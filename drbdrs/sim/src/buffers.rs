//! The buffers that are lent to an engine. No number is used twice.

use std::collections::VecDeque;

use drbd_core::ids::BufId;

use crate::disk::Tags;

/// See above.
#[derive(Debug, Default)]
pub struct Buffers {
    /// By number, without those at the beginning that were given back.
    all: VecDeque<Option<Tags>>,
    /// Numbers before `all`.
    before: u32,
    len: usize,
}

impl Buffers {
    /// Takes in a buffer.
    ///
    /// # Panics
    /// After 2^32 buffers.
    pub fn insert(&mut self, data: Tags) -> BufId {
        self.all.push_back(Some(data));
        self.len += 1;
        // The first is 1.
        BufId(self.before + u32::try_from(self.all.len()).expect("a run has fewer"))
    }

    fn place(&self, buf: BufId) -> Option<usize> {
        usize::try_from(buf.0.checked_sub(self.before)?.checked_sub(1)?).ok()
    }

    /// A buffer that is lent.
    pub fn get(&self, buf: BufId) -> Option<&Tags> {
        self.all.get(self.place(buf)?)?.as_ref()
    }

    /// The same, to be changed.
    pub fn get_mut(&mut self, buf: BufId) -> Option<&mut Tags> {
        let place = self.place(buf)?;
        self.all.get_mut(place)?.as_mut()
    }

    /// A buffer is given back.
    pub fn remove(&mut self, buf: BufId) -> Option<Tags> {
        let place = self.place(buf)?;
        let data = self.all.get_mut(place)?.take()?;
        self.len -= 1;
        while self.all.pop_front_if(|first| first.is_none()).is_some() {
            self.before += 1;
        }
        Some(data)
    }

    /// How many are lent.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// None is lent?
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }
}

#[cfg(test)]
mod tests {
    use super::Buffers;

    #[test]
    fn numbers_are_not_used_again() {
        let mut buffers = Buffers::default();
        let [a, b, c] = [1, 2, 3].map(|tag| buffers.insert([tag].into()));
        assert_eq!(buffers.remove(b).as_deref(), Some(&[2][..]));
        assert_eq!(buffers.remove(b), None);
        assert_eq!(buffers.remove(a).as_deref(), Some(&[1][..]));
        assert_eq!((buffers.get(a), buffers.len()), (None, 1));
        let d = buffers.insert([4].into());
        assert_eq!(buffers.get(c).map(|data| data[0]), Some(3));
        assert_eq!(buffers.get_mut(d).map(|data| data[0]), Some(4));
        assert!(![a, b, c].contains(&d));
    }
}
