//! Block devices and plain files as carriers of meta-data.

use std::fs::File;
use std::os::unix::fs::FileExt;

use drbdmeta::io::{IoError, IoOp, MetaIo, write_zeros_plainly};
use drbdmeta::units::{ByteLen, ByteOffset};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};

use super::talk;

/// Direct input and output wants memory at such addresses.
const ALIGN: usize = 4096;
/// What goes through the aligned buffer at once.
const PIECE: usize = 1 << 20;

/// An opened device.
#[derive(Debug)]
pub(super) struct Store {
    file: File,
    len: u64,
    is_direct: bool,
    dry_run: bool,
    /// Larger than needed: an aligned part of it is used.
    buffer: Vec<u8>,
    /// Start and length of the aligned part.
    aligned: (usize, usize),
}

impl Store {
    pub(super) fn new(file: File, is_direct: bool, dry_run: bool) -> std::io::Result<Self> {
        let len = seek(&file, SeekFrom::End(0))?;
        let buffer = if is_direct { vec![0; PIECE + ALIGN] } else { Vec::new() };
        let start = buffer.as_ptr().align_offset(ALIGN).min(ALIGN);
        Ok(Self { file, len, is_direct, dry_run, buffer, aligned: (start, PIECE) })
    }

    fn bounce(&mut self, len: usize) -> (&File, &mut [u8]) {
        let (start, size) = self.aligned;
        let part = self.buffer.get_mut(start..start + len.min(size)).unwrap_or_default();
        (&self.file, part)
    }
}

fn failure(op: IoOp, at: u64, len: usize, error: &std::io::Error) -> IoError {
    IoError { op, at: ByteOffset(at), len, errno: error.raw_os_error().unwrap_or(0) }
}

fn offset(done: usize) -> u64 {
    u64::try_from(done).unwrap_or(u64::MAX)
}

impl MetaIo for Store {
    fn device_len(&self) -> ByteLen {
        ByteLen(self.len)
    }

    fn read_at(&mut self, at: ByteOffset, into: &mut [u8]) -> Result<(), IoError> {
        let len = into.len();
        if !self.is_direct {
            let read = self.file.read_exact_at(into, at.0);
            return read.map_err(|e| failure(IoOp::Read, at.0, len, &e));
        }
        for (i, piece) in into.chunks_mut(PIECE).enumerate() {
            let here = at.0 + offset(i * PIECE);
            let (file, part) = self.bounce(piece.len());
            let read = file.read_exact_at(part, here);
            read.map_err(|e| failure(IoOp::Read, here, len, &e))?;
            piece.copy_from_slice(part);
        }
        Ok(())
    }

    fn write_at(&mut self, at: ByteOffset, data: &[u8]) -> Result<(), IoError> {
        if self.dry_run {
            let len = data.len();
            talk::err(&format!("pwrite(...,{len},{}) SKIPPED DUE TO DRY-RUN\n", at.0));
            return Ok(());
        }
        if offset(data.len()).checked_add(at.0).is_none_or(|end| end > self.len) {
            return Err(IoError { op: IoOp::Write, at, len: data.len(), errno: 0 });
        }
        if !self.is_direct {
            let written = self.file.write_all_at(data, at.0);
            return written.map_err(|e| failure(IoOp::Write, at.0, data.len(), &e));
        }
        for (i, piece) in data.chunks(PIECE).enumerate() {
            let here = at.0 + offset(i * PIECE);
            let (file, part) = self.bounce(piece.len());
            part.copy_from_slice(piece);
            let written = file.write_all_at(part, here);
            written.map_err(|e| failure(IoOp::Write, here, data.len(), &e))?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), IoError> {
        if self.dry_run {
            return Ok(());
        }
        self.file.sync_all().map_err(|e| failure(IoOp::Flush, 0, 0, &e))
    }

    fn next_data(&mut self, at: ByteOffset) -> ByteOffset {
        if self.is_direct {
            return at;
        }
        match seek(&self.file, SeekFrom::Data(at.0)) {
            Ok(found) => ByteOffset(found),
            // Only a hole follows.
            Err(rustix::io::Errno::NXIO) => ByteOffset(u64::MAX),
            Err(_) => at,
        }
    }

    fn write_zeros(&mut self, at: ByteOffset, len: ByteLen) -> Result<(), IoError> {
        if self.dry_run {
            talk::err(&format!("zero-out({}, {}) SKIPPED DUE TO DRY-RUN\n", at.0, len.0));
            return Ok(());
        }
        self.zero_range(at, len).or_else(|_| write_zeros_plainly(self, at, len))
    }
}

impl Store {
    /// Asks the device to zero a range by itself.
    pub(super) fn zero_range(&self, at: ByteOffset, len: ByteLen) -> rustix::io::Result<()> {
        if self.dry_run || len.0 == 0 {
            return Ok(());
        }
        let keep = FallocateFlags::KEEP_SIZE;
        // A hole in a file costs nothing and reads as zero.
        let punched = if self.is_direct {
            Err(rustix::io::Errno::OPNOTSUPP)
        } else {
            fallocate(&self.file, FallocateFlags::PUNCH_HOLE | keep, at.0, len.0)
        };
        punched.or_else(|_| fallocate(&self.file, FallocateFlags::ZERO_RANGE | keep, at.0, len.0))
    }
}

/// A failed access in the original's words.
pub(super) fn describe(error: &IoError) -> String {
    let (at, len) = (error.at.0, error.len);
    if error.errno == 0 {
        return match error.op {
            IoOp::Read => format!("confused in pread: expected to read {len} bytes at {at}"),
            _ => format!("confused in pwrite: expected to write {len} bytes at {at}"),
        };
    }
    let text = super::system(&std::io::Error::from_raw_os_error(error.errno));
    match error.op {
        IoOp::Read => format!("pread(...,{len},{at}) failed: {text}"),
        IoOp::Write => format!("pwrite(...,{len},{at}) failed: {text}"),
        IoOp::Flush => format!("fsync() failed: {text}"),
    }
}
