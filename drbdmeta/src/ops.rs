//! Changes of more than one block. Each has an order that a power failure may cut anywhere.
//!
//! What holds after a cut is said at each function, and tests cut after every write, with whole
//! and with torn last writes.

use alloc::vec::Vec;

use crate::al::{AlBlock, Kind, Outcome, Replay, Transaction, initialised_block};
use crate::bitmap::Region;
use crate::io::{IoError, MetaIo};
use crate::layout::{BLOCK, BLOCK_BYTES, Layout};
use crate::superblock::{Flags, Magic, Superblock};
use crate::units::{AlExtentNr, BitCount, ByteLen, ByteOffset};

/// Writes new meta-data; `fill_bitmap` does what is to be done with the bitmap area.
///
/// Order: an old superblock is made invalid · activity log · bitmap · superblock, each stable
/// before the next. After a cut there is either the old meta-data untouched, or none, or the new
/// one complete; never an old generation with a new bitmap.
///
/// # Errors
/// The device fails, or whatever `fill_bitmap` says.
pub fn create<I: MetaIo, E: From<IoError>>(
    io: &mut I,
    layout: &Layout,
    superblock: &Superblock,
    has_old: bool,
    fill_bitmap: impl FnOnce(&mut I, &Layout) -> Result<(), E>,
) -> Result<(), E> {
    if has_old {
        wipe(io, layout.superblock)?;
    }
    write_initialised_al(io, layout)?;
    fill_bitmap(io, layout)?;
    io.flush()?;
    Ok(write_superblock(io, layout, superblock)?)
}

/// Replaces a superblock of 0.7, whose activity log and bitmap stay as they are.
///
/// Order: new superblock · old one made invalid, if it was elsewhere. After a cut one of both is
/// valid, or both are; the new one counts.
///
/// # Errors
/// The device fails.
pub fn convert(
    io: &mut dyn MetaIo,
    layout: &Layout,
    superblock: &Superblock,
    old_elsewhere: Option<ByteOffset>,
) -> Result<(), IoError> {
    write_superblock(io, layout, superblock)?;
    old_elsewhere.map_or(Ok(()), |at| wipe(io, at))
}

/// Makes a superblock invalid: one block of zeros.
///
/// # Errors
/// The device fails.
pub fn wipe(io: &mut dyn MetaIo, superblock: ByteOffset) -> Result<(), IoError> {
    io.write_at(superblock, &[0; BLOCK_BYTES])?;
    io.flush()
}

/// Writes the superblock and makes it stable. Everything it relies on must be stable before.
///
/// # Errors
/// The device fails.
pub fn write_superblock(
    io: &mut dyn MetaIo,
    layout: &Layout,
    superblock: &Superblock,
) -> Result<(), IoError> {
    io.write_at(layout.superblock, &superblock.to_disk())?;
    io.flush()
}

/// Fills the ring of an activity log that nobody needs any more.
///
/// # Errors
/// The device fails.
pub fn write_initialised_al(io: &mut dyn MetaIo, layout: &Layout) -> Result<(), IoError> {
    let block = initialised_block();
    for b in 0..layout.al_geometry.blocks() {
        io.write_at(ByteOffset(layout.al.0 + b * BLOCK), &block)?;
    }
    io.flush()
}

/// What applying the activity log has to do, from the replay and the flags alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApplyPlan {
    /// The log is needed and is not readable; exit status.
    Refuse(u8),
    /// What to do.
    Do {
        /// Set the bits of the active extents.
        mark: bool,
        /// Make the ring anew.
        reinitialise: bool,
        /// The log could not be read, but is not needed either.
        ignored_error: bool,
    },
}

/// Decides what to do. Spec: metadata.md §7.
pub fn plan_apply(superblock: &Superblock, replay: &Replay) -> ApplyPlan {
    let needed = superblock.flags.contains(Flags::PRIMARY);
    let old = replay.is_old_format;
    let todo = |mark, reinitialise, ignored_error| ApplyPlan::Do {
        mark,
        reinitialise: reinitialise || old,
        ignored_error,
    };
    match &replay.outcome {
        Outcome::NoData if needed => ApplyPlan::Refuse(1),
        Outcome::Unusable if needed => ApplyPlan::Refuse(2),
        Outcome::NoData | Outcome::Unusable => todo(false, true, true),
        Outcome::Initialised => todo(false, false, false),
        Outcome::Updates(_) => todo(needed, true, false),
    }
}

/// Result of [`apply`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Bits that were clear before; `None`: nothing was to be marked.
    pub newly_set: Option<BitCount>,
    /// Extents behind the end, with their place in the bitmap.
    pub beyond: Vec<(AlExtentNr, u64)>,
    /// The superblock was written.
    pub wrote_superblock: bool,
}

/// Sets the bits of the active extents, empties the ring, says so in the superblock.
///
/// Order: bitmap · ring · superblock, each stable before the next. The ring is emptied from its
/// end, and its first block carries an empty transaction meanwhile: only that block may be
/// unreadable in an otherwise empty ring (it then counts as never used). After a cut the same
/// command brings the same result.
///
/// # Errors
/// The device fails.
pub fn apply(
    io: &mut dyn MetaIo,
    layout: &Layout,
    superblock: &mut Superblock,
    outcome: &Outcome,
    mark: bool,
    reinitialise: bool,
) -> Result<Applied, IoError> {
    let mut applied = Applied::default();
    if let (true, Outcome::Updates(extents)) = (mark, outcome) {
        let region = Region::new(layout, superblock.la_size);
        let beyond = &mut applied.beyond;
        let set = region.set_extents(io, extents, |e, at| beyond.push((e, at)))?;
        io.flush()?;
        applied.newly_set = Some(set);
    }
    if reinitialise {
        empty_ring(io, layout)?;
    }
    if applied.newly_set.is_some() || !superblock.is_clean() {
        superblock.flags |= Flags::AL_CLEAN;
        superblock.magic = Magic::Clean;
        write_superblock(io, layout, superblock)?;
        applied.wrote_superblock = true;
    }
    Ok(applied)
}

fn empty_ring(io: &mut dyn MetaIo, layout: &Layout) -> Result<(), IoError> {
    let blocks = layout.al_geometry.blocks();
    if needs_stand_in(io, layout, blocks)? {
        let nothing = Transaction { number: 0, updates: &[], slots: &[], context_first: 0 };
        if let Ok(block) = nothing.to_disk() {
            io.write_at(layout.al_block(0), &block)?;
            io.flush()?;
        }
    }
    let block = initialised_block();
    for t in (1..blocks).rev() {
        io.write_at(layout.al_block(t), &block)?;
    }
    io.flush()?;
    io.write_at(layout.al_block(0), &block)?;
    io.flush()
}

/// The first block is no transaction, but another one is.
fn needs_stand_in(io: &mut dyn MetaIo, layout: &Layout, blocks: u64) -> Result<bool, IoError> {
    let mut bytes = [0; BLOCK_BYTES];
    for t in 0..blocks {
        io.read_at(layout.al_block(t), &mut bytes)?;
        let says_something =
            AlBlock::from_disk(&bytes).is_ok_and(|b| b.kind() != Kind::Initialised);
        match (t, says_something) {
            (0, true) => return Ok(false),
            (0, false) | (_, false) => {}
            (_, true) => return Ok(true),
        }
    }
    Ok(false)
}

/// Why internal meta-data can not follow the end of its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MoveError {
    /// The device fails.
    #[error(transparent)]
    Io(#[from] IoError),
    /// The new bitmap would begin inside the data.
    #[error(
        "the meta-data would need {needed} sectors of the data area, \
         the device must grow by at least 4 KiB more; nothing was changed"
    )]
    OverData {
        /// Sectors of data that would be lost.
        needed: u64,
    },
}

/// Moves internal meta-data to the place where `new` says it belongs.
///
/// Everything that could be overwritten is read before the first write, and `save` gets the
/// complete new content first ([`MoveJournal`]): when it has been kept, a cut move is completed
/// with [`MoveJournal::redo`]. Without overlap the old superblock stays valid until the new one
/// is, so nothing needs to be kept.
///
/// # Errors
/// The device fails, or the new place overlaps the data.
pub fn move_internal(
    io: &mut dyn MetaIo,
    old: &Layout,
    new: &Layout,
    superblock: &Superblock,
    save: &mut dyn FnMut(&MoveJournal) -> Result<(), IoError>,
) -> Result<Superblock, MoveError> {
    if superblock.la_size.0 > new.usable().0 {
        return Err(MoveError::OverData { needed: superblock.la_size.0 - new.usable().0 });
    }
    let mut moved = *superblock;
    moved.md_size_sect = new.md_size_sect;
    moved.al_offset = new.al_offset;
    moved.bm_offset = new.bm_offset;
    let overlaps = new.bitmap.0 < old.superblock.0 + BLOCK;
    if overlaps {
        let journal = MoveJournal::collect(io, old, new, &moved)?;
        save(&journal)?;
        journal.redo(io)?;
    } else {
        copy(io, old.al, new.al, old.al_geometry.len().0)?;
        copy(io, old.bitmap, new.bitmap, old.bitmap_len.0)?;
        let rest = new.bitmap_len.0.saturating_sub(old.bitmap_len.0);
        io.write_zeros(ByteOffset(new.bitmap.0 + old.bitmap_len.0), ByteLen(rest))?;
        io.flush()?;
        write_superblock(io, new, &moved)?;
    }
    if old.superblock.0 + BLOCK <= new.bitmap.0 {
        wipe(io, old.superblock)?;
    }
    Ok(moved)
}

fn copy(io: &mut dyn MetaIo, from: ByteOffset, to: ByteOffset, len: u64) -> Result<(), IoError> {
    const PIECE: u64 = 1 << 20;
    let mut buffer = Vec::new();
    let mut done = 0;
    while done < len {
        let piece = (len - done).min(PIECE);
        buffer.resize(usize::try_from(piece).unwrap_or(0), 0);
        io.read_at(ByteOffset(from.0 + done), &mut buffer)?;
        io.write_at(ByteOffset(to.0 + done), &buffer)?;
        done += piece;
    }
    Ok(())
}

/// The complete new content of meta-data that moves over itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MoveJournal {
    /// Where the new bitmap begins, followed by log and superblock.
    pub start: ByteOffset,
    /// Bitmap, activity log, superblock.
    pub content: Vec<u8>,
}

const JOURNAL_MAGIC: [u8; 8] = *b"drbdmv01";
/// Length of the header of a kept journal.
pub const JOURNAL_HEADER: usize = 20;

impl MoveJournal {
    fn collect(
        io: &mut dyn MetaIo,
        old: &Layout,
        new: &Layout,
        superblock: &Superblock,
    ) -> Result<Self, IoError> {
        let bytes = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        let (bitmap, al) = (bytes(new.bitmap_len.0), bytes(old.al_geometry.len().0));
        // Of large devices this is large: it exists only once.
        let mut content = alloc::vec![0; bitmap + al + BLOCK_BYTES];
        let (to_bitmap, rest) = content.split_at_mut(bitmap);
        let (to_al, to_superblock) = rest.split_at_mut(al);
        if let Some(kept) = to_bitmap.get_mut(..bytes(old.bitmap_len.0)) {
            io.read_at(old.bitmap, kept)?;
        }
        io.read_at(old.al, to_al)?;
        to_superblock.copy_from_slice(&superblock.to_disk());
        Ok(Self { start: new.bitmap, content })
    }

    /// Writes everything; may be repeated.
    ///
    /// # Errors
    /// The device fails.
    pub fn redo(&self, io: &mut dyn MetaIo) -> Result<(), IoError> {
        let (body, superblock) =
            self.content.split_at(self.content.len().saturating_sub(BLOCK_BYTES));
        io.write_at(self.start, body)?;
        io.flush()?;
        let at = ByteOffset(self.start.0 + crate::io::byte_count(body));
        io.write_at(at, superblock)?;
        io.flush()
    }

    /// First byte behind everything that it writes.
    pub fn end(&self) -> u64 {
        self.start.0.saturating_add(crate::io::byte_count(&self.content))
    }

    /// What to keep before the content: magic, place, checksum.
    pub fn header(&self) -> [u8; JOURNAL_HEADER] {
        let mut header = [0; JOURNAL_HEADER];
        let sum = crc32c::crc32c(&self.content).to_be_bytes();
        let start = self.start.0.to_be_bytes();
        let parts = JOURNAL_MAGIC.iter().chain(&start).chain(&sum);
        header.iter_mut().zip(parts).for_each(|(to, from)| *to = *from);
        header
    }

    /// From kept bytes, header and content; `None` if they were not kept completely.
    pub fn from_bytes(mut bytes: Vec<u8>) -> Option<Self> {
        let (header, content) = bytes.split_at_checked(JOURNAL_HEADER)?;
        let (magic, rest) = header.split_first_chunk::<8>()?;
        let (start, sum) = rest.split_first_chunk::<8>()?;
        let sum = u32::from_be_bytes(*sum.first_chunk()?);
        let is_whole = *magic == JOURNAL_MAGIC
            && sum == crc32c::crc32c(content)
            && content.len() > BLOCK_BYTES
            && content.len().is_multiple_of(BLOCK_BYTES);
        let start = ByteOffset(u64::from_be_bytes(*start));
        is_whole.then(|| {
            bytes.drain(..JOURNAL_HEADER);
            Self { start, content: bytes }
        })
    }
}
