//! The data generation identifiers of a volume: every change marks the superblock dirty and keeps
//! the exposed identifier. Spec: states-and-generations.md §3.

use alloc::format;

use drbd_types::{Gi, Role, VolumeNr};

use crate::generation::Slots;
use crate::log_line::Severity;
use crate::plant::{self, Bug};

use super::Core;

impl Core {
    /// Changes the identifiers of a volume with a disk.
    pub(super) fn change_slots<R>(
        &mut self,
        nr: VolumeNr,
        change: impl FnOnce(&mut Slots, Role) -> R,
    ) -> Option<R> {
        let volume = self.volume_mut(nr)?;
        let role = volume.state.role;
        let disk = volume.disk.as_mut()?;
        let before = disk.slots();
        let mut slots = before;
        let result = change(&mut slots, role);
        if slots != before {
            let sb = &mut disk.superblock;
            (sb.current, sb.bitmap, sb.history) = (slots.current, slots.bitmap, slots.history);
            if slots.current != before.current {
                volume.exposed = slots.current;
                volume.marks.current_is_known &= slots.current.same(before.current);
            }
            self.mark_dirty(nr);
        }
        Some(result)
    }

    fn random_gi(&mut self) -> Gi {
        loop {
            // The lowest bit is no part of the identity; the smallest numbers have a meaning.
            let value = self.random.next() & !1;
            if value > 4 {
                return Gi(value);
            }
        }
    }

    /// A new generation, after an event that demands one in any case. Spec §3.2 "new-current".
    /// The caller makes it stable.
    pub(super) fn new_current_uuid(&mut self, nr: VolumeNr) {
        let random = self.random_gi();
        let lost = self.change_slots(nr, |slots, role| slots.new_current(random, role)).flatten();
        if let Some(lost) = lost {
            self.log(Severity::Warn, Some(nr), format!("bm UUID was already set: {:X}", lost.0));
        }
        self.log_slots(nr, "new current UUID");
    }

    /// A new generation because this node writes without its peer from now on. While the bitmap
    /// slot is in use, the original has none; see [`Slots::begin_generation`]. The caller makes it
    /// stable. Returns whether there is a new one.
    pub(super) fn begin_generation(&mut self, nr: VolumeNr) -> bool {
        let Some(volume) = self.volume(nr) else { return false };
        let slots = volume.slots();
        let keeps = plant::has(Bug::KeepGeneration);
        if keeps || !slots.bitmap.is_none() && !volume.marks.current_is_known {
            return false;
        }
        let random = self.random_gi();
        self.change_slots(nr, |slots, role| slots.begin_generation(random, role));
        self.log_slots(nr, "new current UUID");
        true
    }

    /// The source starts a resync: the identifier that the target gets. Spec §3.4.
    pub(super) fn start_as_source(&mut self, nr: VolumeNr) -> Option<Gi> {
        let random = self.random_gi();
        let sync = self.change_slots(nr, |slots, _| slots.start_as_source(random));
        self.log_slots(nr, "updated sync UUID");
        sync
    }

    pub(super) fn log_slots(&mut self, nr: VolumeNr, what: &str) {
        let slots = self.volume(nr).map_or_else(Slots::default, |v| v.slots());
        self.info(nr, format!("{what} {slots}"));
    }

    /// An identifier for data that nobody has.
    pub(super) fn expose_nothing(&mut self, nr: VolumeNr) {
        let random = self.random_gi();
        if let Some(volume) = self.volume_mut(nr) {
            volume.exposed = random;
        }
    }
}
