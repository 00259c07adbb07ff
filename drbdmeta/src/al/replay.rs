//! Which extents were active when the node stopped.
//!
//! Spec: metadata.md §3.5.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;
use core::fmt;

use super::block::MAGIC;
use super::{AlBlock, FREE, Kind, SLOTS_MAX, scan_old};
use crate::io::{IoError, MetaIo};
use crate::layout::{AlGeometry, BLOCK_BYTES, Layout};
use crate::superblock::{Magic, Superblock};
use crate::units::{AlExtentNr, ByteOffset};

const MAGIC_PERSISTENT_MEMORY: u32 = 0x6AA6_67A6;

/// What the ring says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// These extents, ascending.
    Updates(Vec<AlExtentNr>),
    /// Nothing has been written since it was made.
    Initialised,
    /// Not one block is readable.
    NoData,
    /// Some blocks are readable, but none says anything.
    Unusable,
}

/// What was found on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Warning {
    /// Unreadable blocks.
    Bad(u64),
    /// Nothing readable at all.
    NothingUsable,
    /// Only blocks without information, and torn ones.
    NoUpdate,
    /// A block of an unknown type.
    UnknownType {
        /// Ring index.
        t: u64,
        /// Its type.
        kind: u16,
    },
    /// A slot in the context that can not exist.
    ContextSlot {
        /// Ring index.
        t: u64,
        /// Slot number.
        slot: u32,
    },
    /// A slot in an update that can not exist.
    UpdateSlot {
        /// Ring index.
        t: u64,
        /// Slot number.
        slot: u16,
    },
    /// An old log with unreadable sectors.
    OldBad(u64),
    /// An old log without readable sectors.
    OldNothingUsable,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bad(n) => write!(f, "{n} corrupt AL transactions found"),
            Self::NothingUsable => {
                f.write_str("No usable activity log found. Do you need to create-md?")
            }
            Self::NoUpdate => f.write_str("No valid AL update transaction found."),
            Self::UnknownType { t, kind } => {
                write!(f, "unknown AL transaction type: tr:{t} type:{kind:#06x}")
            }
            Self::ContextSlot { t, slot } => {
                write!(f, "slot number out of range: tr:{t} slot:{slot}")
            }
            Self::UpdateSlot { t, slot } => {
                write!(f, "update slot number out of range: tr:{t} slot:{slot}")
            }
            Self::OldBad(n) => write!(
                f,
                "{n} corrupt or uninitialized AL transactions found\n\
                 You can safely ignore this if this node was cleanly stopped (no crash)."
            ),
            Self::OldNothingUsable => f.write_str("No usable activity log found."),
        }
    }
}

/// Result of a replay.
#[derive(Clone, Debug)]
pub struct Replay {
    /// What the ring says.
    pub outcome: Outcome,
    /// Unreadable blocks.
    pub bad: u64,
    /// In the order in which they are to be told.
    pub warnings: Vec<Warning>,
    /// The log is in the old format and must be made anew.
    pub is_old_format: bool,
}

/// Why there is no result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReplayError {
    /// The device fails.
    #[error(transparent)]
    Io(#[from] IoError),
    /// DRBD 9 on persistent memory.
    #[error("activity log in persistent-memory format (DRBD 9): not supported")]
    PersistentMemory,
}

/// Is number `a` older than `b`? Numbers wrap.
pub(super) const fn is_older(a: u32, b: u32) -> bool {
    a.wrapping_sub(b).cast_signed() < 0
}

/// Reads the ring.
///
/// # Errors
/// The device fails, or the format is not ours.
pub fn replay(
    io: &mut dyn MetaIo,
    layout: &Layout,
    superblock: &Superblock,
) -> Result<Replay, ReplayError> {
    let first = first_word(io, layout.al)?;
    if first == MAGIC_PERSISTENT_MEMORY {
        return Err(ReplayError::PersistentMemory);
    }
    let is_new = superblock.magic == Magic::Unclean
        || superblock.al != AlGeometry::default()
        || first == MAGIC
        || first_word(io, ByteOffset(layout.al.0 + 4096))? == MAGIC;
    if is_new { replay_new(io, layout) } else { replay_old(io, layout, superblock) }
}

fn first_word(io: &mut dyn MetaIo, at: ByteOffset) -> Result<u32, IoError> {
    let mut block = [0; BLOCK_BYTES];
    io.read_at(at, &mut block)?;
    Ok(block.first_chunk().map_or(0, |word| u32::from_be_bytes(*word)))
}

fn replay_old(
    io: &mut dyn MetaIo,
    layout: &Layout,
    superblock: &Superblock,
) -> Result<Replay, ReplayError> {
    let mut area = alloc::vec![0; 8 * BLOCK_BYTES];
    io.read_at(layout.al, &mut area)?;
    let scan = scan_old(&area, superblock.al_nr_extents);
    let outcome = scan.slots.map_or(Outcome::Initialised, |slots| active(&slots));
    Ok(Replay { outcome, bad: scan.bad, warnings: scan.warnings, is_old_format: true })
}

#[derive(Default)]
struct Survey {
    bad: u64,
    first_is_bad: bool,
    warnings: Vec<Warning>,
    /// Ring index and number of the oldest and of the newest update.
    updates: Option<((u64, u32), (u64, u32))>,
}

fn replay_new(io: &mut dyn MetaIo, layout: &Layout) -> Result<Replay, ReplayError> {
    let blocks = layout.al_geometry.blocks();
    let mut survey = survey(io, layout, blocks)?;
    let mut warnings = Vec::new();
    let outcome = if survey.bad == blocks {
        warnings.push(Warning::NothingUsable);
        Outcome::NoData
    } else {
        if survey.bad > 0 {
            warnings.push(Warning::Bad(survey.bad));
        }
        warnings.append(&mut survey.warnings);
        match survey.updates {
            Some((oldest, newest)) => walk(io, layout, blocks, oldest.0, newest.0, &mut warnings)?,
            // The very first transaction was torn: nothing had been written under it yet.
            None if survey.bad == 0 || (survey.bad == 1 && survey.first_is_bad) => {
                Outcome::Initialised
            }
            None => {
                warnings.push(Warning::NoUpdate);
                Outcome::Unusable
            }
        }
    };
    Ok(Replay { outcome, bad: survey.bad, warnings, is_old_format: false })
}

fn survey(io: &mut dyn MetaIo, layout: &Layout, blocks: u64) -> Result<Survey, IoError> {
    let mut survey = Survey::default();
    let mut bytes = [0; BLOCK_BYTES];
    for t in 0..blocks {
        io.read_at(layout.al_block(t), &mut bytes)?;
        let Ok(block) = AlBlock::from_disk(&bytes) else {
            survey.bad += 1;
            survey.first_is_bad |= t == 0;
            continue;
        };
        match block.kind() {
            Kind::Initialised => continue,
            Kind::Unknown(kind) => survey.warnings.push(Warning::UnknownType { t, kind }),
            Kind::Update => {}
        }
        let here = (t, block.number());
        let (mut oldest, mut newest) = survey.updates.unwrap_or((here, here));
        if is_older(here.1, oldest.1) {
            oldest = here;
        }
        if is_older(newest.1, here.1) {
            newest = here;
        }
        survey.updates = Some((oldest, newest));
    }
    Ok(survey)
}

fn walk(
    io: &mut dyn MetaIo,
    layout: &Layout,
    blocks: u64,
    oldest: u64,
    newest: u64,
    warnings: &mut Vec<Warning>,
) -> Result<Outcome, IoError> {
    let mut slots = BTreeMap::new();
    let mut bytes = [0; BLOCK_BYTES];
    let mut t = oldest;
    loop {
        io.read_at(layout.al_block(t), &mut bytes)?;
        if let Ok(block) = AlBlock::from_disk(&bytes)
            && block.kind() != Kind::Initialised
        {
            apply(&block, t, &mut slots, warnings);
        }
        if t == newest {
            return Ok(active(&slots));
        }
        t = (t + 1) % blocks;
    }
}

fn apply(block: &AlBlock<'_>, t: u64, slots: &mut BTreeMap<u32, u32>, warnings: &mut Vec<Warning>) {
    for (_, slot, extent) in block.context() {
        if slot < SLOTS_MAX {
            slots.insert(slot, extent);
        } else {
            warnings.push(Warning::ContextSlot { t, slot });
        }
    }
    for (_, slot, extent) in block.updates() {
        if u32::from(slot) < SLOTS_MAX {
            slots.insert(u32::from(slot), extent);
        } else {
            warnings.push(Warning::UpdateSlot { t, slot });
        }
    }
}

fn active(slots: &BTreeMap<u32, u32>) -> Outcome {
    let extents: BTreeSet<u32> = slots.values().copied().filter(|e| *e != FREE).collect();
    Outcome::Updates(extents.into_iter().map(AlExtentNr).collect())
}
