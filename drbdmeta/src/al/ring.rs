//! The writer's side: which block comes next, and which window of slots it repeats.

use super::{CONTEXT_SLOTS, EncodeError, SLOTS_MAX, Transaction};
use crate::layout::{BLOCK_BYTES, Layout};
use crate::units::{AlExtentNr, ByteOffset};

/// Position of a writer in the ring.
///
/// [`AlRing::next`] makes a block; after it is on stable storage call [`AlRing::written`], so that
/// a block whose write failed is written again to the same place.
/// Spec: metadata.md §3.4, §5.
#[derive(Clone, Debug)]
pub struct AlRing {
    layout: Layout,
    number: u32,
    context_first: u16,
}

impl AlRing {
    /// A writer for an initialised ring.
    pub const fn new(layout: Layout) -> Self {
        Self { layout, number: 0, context_first: 0 }
    }

    /// The ring is elsewhere or has another shape now, or it carries another number of slots. The
    /// numbers go on, so that whatever is left of the old ring counts as older.
    pub const fn restart(&mut self, layout: Layout) {
        self.layout = layout;
        self.context_first = 0;
    }

    /// Blocks of the ring.
    pub fn blocks(&self) -> u64 {
        self.layout.al_geometry.blocks()
    }

    /// How many slots this ring can carry: one block may be torn, the others must hold them all.
    pub fn slots_max(&self) -> u16 {
        let blocks = self.blocks();
        let all = if blocks > 72 {
            u64::from(SLOTS_MAX)
        } else {
            blocks.saturating_sub(1) * u64::from(CONTEXT_SLOTS)
        };
        u16::try_from(all.min(u64::from(SLOTS_MAX))).unwrap_or(0)
    }

    /// Number of the next transaction.
    pub const fn number(&self) -> u32 {
        self.number
    }

    /// The next block and its place. `slots` are all slots before these updates.
    ///
    /// # Errors
    /// It says more than fits.
    pub fn next(
        &mut self,
        updates: &[(u16, Option<AlExtentNr>)],
        slots: &[Option<AlExtentNr>],
    ) -> Result<(ByteOffset, [u8; BLOCK_BYTES]), EncodeError> {
        if slots.len() > usize::from(self.slots_max()) {
            return Err(EncodeError::TooManySlots(slots.len()));
        }
        let context_first = self.context_first;
        let block = Transaction { number: self.number, updates, slots, context_first }.to_disk()?;
        // The window moves on even if the write fails; the number does not.
        let next = usize::from(context_first) + usize::from(CONTEXT_SLOTS);
        self.context_first = if next < slots.len() { u16::try_from(next).unwrap_or(0) } else { 0 };
        let t = u64::from(self.number) % self.blocks().max(1);
        Ok((self.layout.al_block(t), block))
    }

    /// The block is stable: the next one goes to the next place.
    pub const fn written(&mut self) {
        self.number = self.number.wrapping_add(1);
    }
}
