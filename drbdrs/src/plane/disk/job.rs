//! What one action on a disk consists of: a stack of steps, done one after the other.

use drbd_core::action::DigestUse;
use drbd_core::ids::{BufId, IoId};
use drbd_types::SectorRange;

use super::super::fault::{Access, Area, Kind};

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Make stable what was written before.
    Flush,
    /// Read into a part of a buffer.
    Read { at: u64, part: Part },
    /// Write from a part of a buffer.
    Write { at: u64, part: Part, durable: bool },
    /// Give space back; what cannot be given back is zeroed.
    Punch { at: u64, len: u64 },
    /// Zero, and keep the space; what the device cannot zero is written.
    Zero { at: u64, len: u64 },
    /// Write zeroes as data.
    ZeroData { at: u64, len: u64 },
    /// Get the job's own buffer.
    Own { len: u32, fill: Option<u8> },
    /// Copy between two parts of equal length.
    Copy { from: Part, to: Part },
    /// Zero a part of a buffer.
    Clear { part: Part },
    /// Write the job's own buffer again and again.
    Repeat { at: u64, len: u64 },
}

/// A part of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) buf: Which,
    pub(super) start: u32,
    pub(super) len: u32,
}

/// Which buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Which {
    /// One of the engine.
    Lent(BufId),
    /// The job's own.
    Own,
    /// The shared buffer of zeroes.
    Zeroes,
}

/// Bounded: the deepest stack is a bounced head of zeroes in front of the rest.
const STEPS_MAX: usize = 8;

/// A stack of steps; the last one is next.
#[derive(Clone, Copy, Debug)]
pub(super) struct Steps {
    items: [Step; STEPS_MAX],
    len: usize,
}

impl Steps {
    /// In the order in which they are to be done.
    pub(super) fn new(steps: &[Step]) -> Self {
        let mut new = Self { items: [Step::Flush; STEPS_MAX], len: 0 };
        new.push_all(steps);
        new
    }

    /// Before all others, in this order.
    pub(super) fn push_all(&mut self, steps: &[Step]) {
        for step in steps.iter().rev() {
            self.items[self.len] = *step;
            self.len += 1;
        }
    }

    pub(super) const fn pop(&mut self) -> Option<Step> {
        match self.len {
            0 => None,
            _ => {
                self.len -= 1;
                Some(self.items[self.len])
            }
        }
    }
}

/// What the answer is to contain.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Wanted {
    /// A read's buffer; `is_new`: the answer names it.
    pub(super) buf: Option<BufId>,
    pub(super) is_new: bool,
    /// Bytes of the read; the buffer may be longer.
    pub(super) len: u32,
    pub(super) check_zero: bool,
    pub(super) digest: Option<DigestUse>,
}

/// Bytes, from and to, that are locked on devices with large blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Lock {
    /// Not needed.
    #[default]
    None,
    /// Before the first step.
    Wanted(u64, u64),
    /// Until the end.
    Held(u64, u64),
}

/// One action.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) io: IoId,
    pub(super) area: Area,
    pub(super) steps: Steps,
    pub(super) wanted: Wanted,
    /// A read without buffer, and its length: it gets one when there is memory.
    pub(super) new_buf: Option<(SectorRange, u32)>,
    /// A buffer of its own: bounced data, a block of meta-data.
    pub(super) own: Option<BufId>,
    /// The block that is to be copied into the own buffer.
    pub(super) block: Option<Box<[u8; 4096]>>,
    /// Bytes that nobody else may write meanwhile.
    pub(super) lock: Lock,
    /// The step that is with the kernel, or held at a fault point.
    pub(super) current: Option<Step>,
}

impl Step {
    /// As a fault point sees it; `None`: it does not touch the device.
    pub(super) fn access(&self, area: Area) -> Option<Access> {
        let (kind, at, len) = match *self {
            Self::Flush => (Kind::Flush, 0, 0),
            Self::Read { at, part } => (Kind::Read, at, part.len.into()),
            Self::Write { at, part, .. } => (Kind::Write, at, part.len.into()),
            Self::Punch { at, len } | Self::Zero { at, len } => (Kind::Discard, at, len),
            Self::ZeroData { .. }
            | Self::Own { .. }
            | Self::Copy { .. }
            | Self::Clear { .. }
            | Self::Repeat { .. } => return None,
        };
        Some(Access { area, kind, bytes: at..at.saturating_add(len) })
    }
}

impl Part {
    /// Without its first bytes.
    pub(super) const fn rest(self, done: u32) -> Self {
        Self { start: self.start + done, len: self.len - done, ..self }
    }
}
