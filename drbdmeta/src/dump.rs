//! The text form of meta-data, written piece by piece.
//!
//! Spec: metadata.md §8.6.

use alloc::vec::Vec;
use core::fmt::{self, Write};

use crate::al::{AlBlock, Kind};
use crate::bitmap::{Piece, Region};
use crate::io::{IoError, MetaIo};
use crate::layout::{BLOCK_BYTES, Layout};
use crate::superblock::Superblock;

/// Why a dump is incomplete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DumpError {
    /// The device fails.
    #[error(transparent)]
    Io(#[from] IoError),
    /// The receiver of the text fails.
    #[error("the output cannot be written")]
    Output,
}

impl From<fmt::Error> for DumpError {
    fn from(_: fmt::Error) -> Self {
        Self::Output
    }
}

/// What the dump says about a device that has grown.
#[derive(Clone, Copy, Debug)]
pub struct Moved<'a> {
    /// Name of the device now.
    pub device: &'a str,
    /// Its length now, bytes.
    pub device_len: u64,
    /// Where the superblock should be.
    pub md_offset: u64,
    /// Name of the device when its length was last known.
    pub old_device: &'a str,
    /// The last known length.
    pub old_len: u64,
}

/// Writes everything between the header and the bitmap.
///
/// # Errors
/// The receiver fails.
pub fn write_superblock(
    out: &mut dyn Write,
    sb: &Superblock,
    layout: &Layout,
    moved: Option<&Moved<'_>>,
) -> fmt::Result {
    writeln!(out, "version \"v08\";\n")?;
    if !sb.is_clean() {
        out.write_str(
            "This_is_an_unclean_meta_data_dump._Don't_trust_the_bitmap.\n\
             # You should \"apply-al\" first, if you plan to restore this.\n\n",
        )?;
    }
    writeln!(out, "# md_size_sect {}", sb.md_size_sect)?;
    if let Some(m) = moved {
        write!(
            out,
            "#\n### Device seems to have been resized!\n\
             ### dumping meta data from the last known position\n\
             ### current size of {}: {} byte\n\
             ### expected position of meta data:\n\
             ## md_offset {}\n## al_offset 0\n## bm_offset 0\n\
             ### last known size of {}: {} byte\n\
             ### adjusted position of meta data:\n",
            m.device, m.device_len, m.md_offset, m.old_device, m.old_len
        )?;
    }
    write!(
        out,
        "# md_offset {}\n# al_offset {}\n# bm_offset {}\n\n\
         uuid {{\n    0x{}; 0x{}; 0x{}; 0x{};\n    flags 0x{:08X};\n}}\n\
         # al-extents {};\nla-size-sect {};\nbm-byte-per-bit {};\n\
         device-uuid 0x{:016X};\nla-peer-max-bio-size {};\n\
         al-stripes {};\nal-stripe-size-4k {};\n",
        layout.superblock.0,
        layout.al.0,
        layout.bitmap.0,
        sb.current,
        sb.bitmap,
        sb.history[0],
        sb.history[1],
        sb.flags.bits(),
        sb.al_nr_extents,
        sb.la_size.0,
        sb.bm_bytes_per_bit,
        sb.device_uuid,
        sb.la_peer_max_bio_size,
        sb.al.stripes,
        sb.al.stripe_blocks,
    )
}

/// Writes the bitmap and the number of its set bits (all of them, meaningful or not).
///
/// # Errors
/// The device or the receiver fail.
pub fn write_bitmap(
    out: &mut dyn Write,
    io: &mut dyn MetaIo,
    region: &Region,
) -> Result<(), DumpError> {
    write!(out, "# bm-bytes {};\nbm {{", region.len.0)?;
    let mut text = BitmapText::default();
    region.each_piece::<DumpError>(io, |piece| {
        match piece {
            Piece::Zeros(bytes) => text.run(out, 0, bytes / 4)?,
            // Most of a bitmap is zero; that is seen faster than it is turned into words.
            Piece::Bytes(bytes) if bytes.iter().all(|b| *b == 0) => {
                text.run(out, 0, u64::try_from(bytes.len() / 4).unwrap_or(0))?;
            }
            Piece::Bytes(bytes) => {
                let mut words = bytes
                    .chunks_exact(4)
                    .filter_map(|w| w.first_chunk())
                    .map(|w| u32::from_le_bytes(*w));
                let mut current = words.next();
                while let Some(word) = current {
                    let mut count = 1;
                    current = words.next();
                    while current == Some(word) {
                        count += 1;
                        current = words.next();
                    }
                    text.run(out, word, count)?;
                }
            }
        }
        Ok(())
    })?;
    text.end(out)?;
    write!(out, "\n}}\n# bits-set {};\n", text.set)?;
    Ok(())
}

/// Turns runs of equal 32-bit words into lines; what has not been decided yet is kept.
#[derive(Default)]
struct BitmapText {
    /// Words already printed.
    printed: u64,
    /// Runs behind them: word and count.
    pending: Vec<(u32, u64)>,
    /// Words in `pending`.
    waiting: u64,
    set: u64,
}

const WORDS_PER_LINE: u64 = 8;
const WORDS_PER_MARK: u64 = 64;

impl BitmapText {
    fn run(&mut self, out: &mut dyn Write, word: u32, count: u64) -> fmt::Result {
        self.set += u64::from(word.count_ones()) * count;
        self.waiting += count;
        match self.pending.last_mut() {
            Some(last) if last.0 == word => last.1 += count,
            _ => {
                self.pending.push((word, count));
                // The first run can not grow any more: whole lines of it can go.
                self.drain(out, false)?;
            }
        }
        Ok(())
    }

    fn end(&mut self, out: &mut dyn Write) -> fmt::Result {
        self.drain(out, true)
    }

    /// Prints all lines whose content is certain. The number of words is a multiple of 8.
    fn drain(&mut self, out: &mut dyn Write, is_end: bool) -> fmt::Result {
        while let Some(&(word, count)) = self.pending.first() {
            let may_grow = self.pending.len() == 1 && !is_end;
            let lines = count / WORDS_PER_LINE * WORDS_PER_LINE;
            if may_grow {
                return Ok(());
            }
            if lines > WORDS_PER_LINE {
                self.line_start(out)?;
                write!(out, " {} times 0x{word:08X}{word:08X};", lines / 2)?;
                self.take(lines);
            } else if self.waiting >= WORDS_PER_LINE {
                self.line_start(out)?;
                for _ in 0..WORDS_PER_LINE / 2 {
                    let (low, high) = (self.pop(), self.pop());
                    write!(out, " 0x{high:08X}{low:08X};")?;
                }
            } else {
                return Ok(());
            }
        }
        Ok(())
    }

    fn line_start(&self, out: &mut dyn Write) -> fmt::Result {
        if self.printed.is_multiple_of(WORDS_PER_MARK) {
            write!(out, "\n   # at {}kB", self.printed * 128)?;
        }
        out.write_str("\n   ")
    }

    fn pop(&mut self) -> u32 {
        let word = self.pending.first().map_or(0, |first| first.0);
        self.take(1);
        word
    }

    fn take(&mut self, count: u64) {
        self.printed += count;
        self.waiting = self.waiting.saturating_sub(count);
        if let Some(first) = self.pending.first_mut() {
            first.1 = first.1.saturating_sub(count);
            if first.1 == 0 {
                self.pending.remove(0);
            }
        }
    }
}

/// Writes the activity log as comments, block by block in disk order.
///
/// # Errors
/// The device or the receiver fail.
pub fn write_al(
    out: &mut dyn Write,
    io: &mut dyn MetaIo,
    layout: &Layout,
    sb: &Superblock,
) -> Result<(), DumpError> {
    out.write_str("# al {\n")?;
    let mut slot_max: Option<u32> = None;
    let mut bytes = [0; BLOCK_BYTES];
    for b in 0..layout.al_geometry.blocks() {
        let at = crate::units::ByteOffset(layout.al.0 + b * 4096);
        io.read_at(at, &mut bytes)?;
        match AlBlock::from_disk(&bytes) {
            Err(_) => writeln!(out, "#     block {b:2} {{ INVALID }}")?,
            Ok(block) if block.kind() == Kind::Initialised => {
                writeln!(out, "#     block {b:2} {{ INITIALIZED }}")?;
            }
            Ok(block) => {
                writeln!(out, "#     block {b:2} {{")?;
                let largest = write_al_block(out, &block)?;
                slot_max = slot_max.max(Some(largest));
            }
        }
    }
    out.write_str("# }\n")?;
    if let Some(slot) = slot_max.filter(|s| *s >= sb.al_nr_extents) {
        writeln!(out, "### CAUTION: maximum slot number found in AL: {slot}")?;
        let extents = sb.al_nr_extents;
        writeln!(out, "### CAUTION: but 'super-block' al-extents is: {extents}")?;
    }
    Ok(())
}

fn write_al_block(out: &mut dyn Write, block: &AlBlock<'_>) -> Result<u32, fmt::Error> {
    let kind = match block.kind() {
        Kind::Update => 0,
        Kind::Initialised => 0xFFFF,
        Kind::Unknown(kind) => kind,
    };
    let mut largest = u32::from(block.context_size()).saturating_sub(1);
    writeln!(out, "# \tmagic: 0x69cb65a2\n# \ttype: {kind:#06x}")?;
    writeln!(out, "# \ttr: {:10}", block.number())?;
    writeln!(out, "# \tactive set size: {}", block.context_size())?;
    for (i, slot, extent) in block.context() {
        writeln!(out, "# \t{i:2}: {slot:10} {extent:10}")?;
        largest = largest.max(slot);
    }
    writeln!(out, "# \tupdates: {}", block.update_count())?;
    for (i, slot, extent) in block.updates() {
        writeln!(out, "# \t{i:2}: {slot:10} {extent:10}")?;
        largest = largest.max(u32::from(slot));
    }
    writeln!(out, "# \tcrc32c: {:#010x}\n#     }}", block.checksum())?;
    Ok(largest)
}
