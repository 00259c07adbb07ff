//! The meta-data of a simulated disk, as `drbdmeta` sees it.

use drbd_types::{ByteLen, ByteOffset};
use drbdmeta::io::{IoError, MetaIo};

use crate::disk::{BLOCK, Part, SimDisk};

/// The meta-data device of a disk.
pub struct DiskIo<'a>(pub &'a mut SimDisk);

fn block_of(at: u64) -> (u64, usize) {
    let inside = at % BLOCK as u64;
    (at - inside, usize::try_from(inside).unwrap_or(0))
}

impl MetaIo for DiskIo<'_> {
    fn device_len(&self) -> ByteLen {
        ByteLen(self.0.meta_len)
    }

    fn read_at(&mut self, at: ByteOffset, into: &mut [u8]) -> Result<(), IoError> {
        let mut at = at.0;
        let mut rest = into;
        while !rest.is_empty() {
            let (block, inside) = block_of(at);
            let len = rest.len().min(BLOCK - inside);
            let (now, after) = rest.split_at_mut(len);
            match self.0.read_block(block) {
                Some(bytes) => now.copy_from_slice(&bytes[inside..inside + len]),
                None => now.fill(0),
            }
            at += len as u64;
            rest = after;
        }
        Ok(())
    }

    fn write_at(&mut self, at: ByteOffset, data: &[u8]) -> Result<(), IoError> {
        let mut at = at.0;
        let mut rest = data;
        while !rest.is_empty() {
            let (block, inside) = block_of(at);
            let len = rest.len().min(BLOCK - inside);
            let (now, after) = rest.split_at(len);
            let mut bytes = Box::new(self.0.read_block(block).copied().unwrap_or([0; BLOCK]));
            bytes[inside..inside + len].copy_from_slice(now);
            self.0.write_block(block, bytes, false);
            at += len as u64;
            rest = after;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), IoError> {
        self.0.flush(Part::Meta, u64::MAX);
        Ok(())
    }
}
