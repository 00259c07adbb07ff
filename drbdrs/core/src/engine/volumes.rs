//! The volumes of a resource, in the order of their numbers. They are few and looked up several
//! times for every event.

use alloc::vec::Vec;

use drbd_types::VolumeNr;

use super::volume::Volume;

/// See above.
#[derive(Default)]
pub(super) struct Volumes {
    /// Sorted; each number has its volume at the same place.
    numbers: Vec<u16>,
    volumes: Vec<Volume>,
}

impl Volumes {
    fn place(&self, nr: VolumeNr) -> Result<usize, usize> {
        // Almost always they are numbered from 0 on.
        let guess = usize::from(nr.0);
        if self.numbers.get(guess) == Some(&nr.0) {
            return Ok(guess);
        }
        self.numbers.binary_search(&nr.0)
    }

    pub(super) fn get(&self, nr: VolumeNr) -> Option<&Volume> {
        self.volumes.get(self.place(nr).ok()?)
    }

    pub(super) fn get_mut(&mut self, nr: VolumeNr) -> Option<&mut Volume> {
        let place = self.place(nr).ok()?;
        self.volumes.get_mut(place)
    }

    /// Takes a new one in.
    ///
    /// # Panics
    /// Its number is in use.
    pub(super) fn insert(&mut self, volume: Volume) {
        let place = self.place(volume.nr).expect_err("numbers are unique");
        self.numbers.insert(place, volume.nr.0);
        self.volumes.insert(place, volume);
    }

    pub(super) fn remove(&mut self, nr: VolumeNr) {
        if let Ok(place) = self.place(nr) {
            self.numbers.remove(place);
            self.volumes.remove(place);
        }
    }

    pub(super) fn contains(&self, nr: VolumeNr) -> bool {
        self.place(nr).is_ok()
    }

    pub(super) const fn len(&self) -> usize {
        self.volumes.len()
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.volumes.is_empty()
    }

    pub(super) fn numbers(&self) -> &[u16] {
        &self.numbers
    }

    pub(super) fn values(&self) -> core::slice::Iter<'_, Volume> {
        self.volumes.iter()
    }

    pub(super) fn values_mut(&mut self) -> core::slice::IterMut<'_, Volume> {
        self.volumes.iter_mut()
    }
}
