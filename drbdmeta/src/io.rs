//! The small border to devices: whoever has a file, a block device or memory implements it.

use alloc::vec::Vec;

use crate::units::{ByteLen, ByteOffset};

/// What was being done when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoOp {
    /// Reading.
    Read,
    /// Writing.
    Write,
    /// Making stable.
    Flush,
}

/// A failed access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{op:?} of {len} bytes at byte {at} failed (error {errno})", at = at.0)]
pub struct IoError {
    /// What was being done.
    pub op: IoOp,
    /// Where.
    pub at: ByteOffset,
    /// How much.
    pub len: usize,
    /// The system's error number; 0: fewer bytes than asked for.
    pub errno: i32,
}

/// The device that carries the meta-data.
///
/// All accesses of this crate are whole 4096-byte blocks at multiples of 4096, save at the end of
/// a device whose length is no such multiple; implementations may use direct I/O.
pub trait MetaIo {
    /// Length of the device.
    fn device_len(&self) -> ByteLen;

    /// Reads exactly that much.
    ///
    /// # Errors
    /// The device fails, or ends before.
    fn read_at(&mut self, at: ByteOffset, into: &mut [u8]) -> Result<(), IoError>;

    /// Writes all of it.
    ///
    /// # Errors
    /// The device fails, or ends before.
    fn write_at(&mut self, at: ByteOffset, data: &[u8]) -> Result<(), IoError>;

    /// Makes all earlier writes stable.
    ///
    /// # Errors
    /// The device fails.
    fn flush(&mut self) -> Result<(), IoError>;

    /// The first place at or behind `at` that may not be zero. Where holes are unknown: `at`.
    fn next_data(&mut self, at: ByteOffset) -> ByteOffset {
        at
    }

    /// Writes zeros, by whatever means the device has.
    ///
    /// # Errors
    /// The device fails, or ends before.
    fn write_zeros(&mut self, at: ByteOffset, len: ByteLen) -> Result<(), IoError> {
        write_zeros_plainly(self, at, len)
    }
}

/// Writes zeros with ordinary writes.
///
/// # Errors
/// The device fails, or ends before.
pub fn write_zeros_plainly<I: MetaIo + ?Sized>(
    io: &mut I,
    at: ByteOffset,
    len: ByteLen,
) -> Result<(), IoError> {
    const PIECE: usize = 1 << 20;
    let zeros = alloc::vec![0; PIECE.min(usize::try_from(len.0).unwrap_or(PIECE))];
    let mut done = 0;
    while done < len.0 {
        let left = usize::try_from(len.0 - done).unwrap_or(usize::MAX);
        let piece = zeros.get(..left.min(zeros.len())).unwrap_or(&zeros);
        io.write_at(ByteOffset(at.0 + done), piece)?;
        done += byte_count(piece);
    }
    Ok(())
}

/// Length of a slice as a number on disk.
pub(crate) fn byte_count(slice: &[u8]) -> u64 {
    u64::try_from(slice.len()).unwrap_or(u64::MAX)
}

/// A device in memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Its content.
    pub bytes: Vec<u8>,
}

impl Memory {
    /// A device of zeros.
    pub fn zeroed(len: usize) -> Self {
        Self { bytes: alloc::vec![0; len] }
    }

    fn range(&mut self, op: IoOp, at: ByteOffset, len: usize) -> Result<&mut [u8], IoError> {
        let error = IoError { op, at, len, errno: 0 };
        let start = usize::try_from(at.0).map_err(|_| error)?;
        let end = start.checked_add(len).ok_or(error)?;
        self.bytes.get_mut(start..end).ok_or(error)
    }
}

impl MetaIo for Memory {
    fn device_len(&self) -> ByteLen {
        ByteLen(byte_count(&self.bytes))
    }

    fn read_at(&mut self, at: ByteOffset, into: &mut [u8]) -> Result<(), IoError> {
        let len = into.len();
        into.copy_from_slice(self.range(IoOp::Read, at, len)?);
        Ok(())
    }

    fn write_at(&mut self, at: ByteOffset, data: &[u8]) -> Result<(), IoError> {
        self.range(IoOp::Write, at, data.len())?.copy_from_slice(data);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), IoError> {
        Ok(())
    }
}

/// One thing that was done to a [`Recorder`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// These bytes went there.
    Write(ByteOffset, Vec<u8>),
    /// Everything before is stable.
    Flush,
}

/// A device in memory that remembers every write, so that tests can cut the power after each.
#[derive(Clone, Debug, Default)]
pub struct Recorder {
    /// The content with all writes done.
    pub memory: Memory,
    /// What was done, in order.
    pub steps: Vec<Step>,
}

impl Recorder {
    /// Starts from this content.
    pub const fn new(memory: Memory) -> Self {
        Self { memory, steps: Vec::new() }
    }
}

impl MetaIo for Recorder {
    fn device_len(&self) -> ByteLen {
        self.memory.device_len()
    }

    fn read_at(&mut self, at: ByteOffset, into: &mut [u8]) -> Result<(), IoError> {
        self.memory.read_at(at, into)
    }

    fn write_at(&mut self, at: ByteOffset, data: &[u8]) -> Result<(), IoError> {
        self.memory.write_at(at, data)?;
        self.steps.push(Step::Write(at, data.to_vec()));
        Ok(())
    }

    fn flush(&mut self) -> Result<(), IoError> {
        self.steps.push(Step::Flush);
        Ok(())
    }
}
