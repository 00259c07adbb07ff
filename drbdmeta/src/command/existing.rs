//! What is on the device already?
//!
//! Spec: metadata.md §8.5.4.

use drbdmeta::io::MetaIo;
use drbdmeta::layout::Layout;
use drbdmeta::units::ByteOffset;

use super::Exit;
use super::open::Opened;
use super::talk::{is_confirmed, out};

/// What is looked at.
const HEAD: usize = 69_632;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Used {
    Bytes(u64),
    /// Its owner must not be overwritten: it uses everything.
    All,
    /// Its owner must not be overwritten: it may use anything.
    Anything,
    Unknown,
}

#[derive(Clone, Copy, Debug)]
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn is(&self, at: usize, text: &[u8]) -> bool {
        self.0.get(at..).is_some_and(|rest| rest.starts_with(text))
    }

    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
    }

    fn le16(&self, at: usize) -> u64 {
        u16::from_le_bytes(self.array(at)).into()
    }

    fn le32(&self, at: usize) -> u64 {
        u32::from_le_bytes(self.array(at)).into()
    }
}

fn identify(head: &[u8]) -> (&'static str, Used) {
    let r = Reader(head);
    let is_swap =
        [4086, 8182].iter().any(|at| r.is(*at, b"SWAP-SPACE") || r.is(*at, b"SWAPSPACE2"));
    let size = |blocks: u64, each: u64| match blocks.saturating_mul(each) {
        0 => Used::Unknown,
        bytes => Used::Bytes(bytes),
    };
    if is_swap {
        ("swap space signature", Used::All)
    } else if r.is(0x218, b"LVM2") {
        ("LVM2 physical volume signature", Used::Anything)
    } else if r.le16(0x438) == 0xEF53 {
        let has_journal = r.le32(0x45C) & 4 != 0;
        let block = match r.le32(0x418) {
            0 => 1024,
            1 => 2048,
            _ => 4096,
        };
        let name = if has_journal { "ext3 filesystem" } else { "ext2 filesystem" };
        (name, size(r.le32(0x404), block))
    } else if r.is(0, b"XFSB") {
        let block = u32::from_be_bytes(r.array(4));
        ("xfs filesystem", size(u64::from_be_bytes(r.array(8)), block.into()))
    } else if r.is(0x8000, b"JFS1") {
        ("JFS filesystem", size(u64::from_le_bytes(r.array(0x8008)), r.le32(0x8018)))
    } else if r.is(0x10034, b"ReIsErFs") || r.is(0x10034, b"ReIsEr2Fs") {
        ("reiser filesystem", size(r.le32(0x10000), r.le16(0x1002C)))
    } else {
        ("some data", Used::Unknown)
    }
}

const REFUSED: &str = "If you want me to do this, you need to zero out the first part
of the device (destroy the content).
You should be very sure that you mean it.
Operation refused.
";

const TRUNCATED: &str = "Device size would be truncated, which
would corrupt data and result in
'access beyond end of device' errors.
";

const ALTERNATIVES: &str = "You need to either
   * use external meta data (recommended)
   * shrink that filesystem first
   * zero out the device (destroy the filesystem)
Operation refused.
";

/// Refuses, asks, or says nothing.
pub(super) fn check(o: &mut Opened<'_>, layout: &Layout) -> Result<(), Exit> {
    let mut head = vec![0; HEAD];
    o.io.read_at(ByteOffset(0), &mut head)?;
    if head.iter().all(|b| *b == 0) {
        return Ok(());
    }
    let (name, used) = identify(&head);
    out(&format!(
        "md_offset {}\nal_offset {}\nbm_offset {}\n\nFound {name}\n",
        layout.superblock.0, layout.al.0, layout.bitmap.0
    ));
    let options = &o.run.options;
    let refused = |text: &str| {
        out(&format!("{text}\n"));
        Err(Exit::silent(40))
    };
    let usable_kib = layout.usable().0 / 2;
    let left = format!("{usable_kib:12} kB left usable by current configuration\n");
    let overridden = || out("\nIgnoring sanity check on user request.\n\n");
    match used {
        Used::Unknown => out("\n ==> This might destroy existing data! <==\n"),
        _ if !o.run.placement.is_internal() => {
            out("\nThis would corrupt existing data.\n");
            if options.ignore_sanity_checks {
                overridden();
                return Ok(());
            }
            return refused(REFUSED);
        }
        Used::All | Used::Anything => {
            out(&left);
            if used == Used::Anything {
                out("Could not determine the size of the actually used data area.\n\n");
            }
            out(TRUNCATED);
            if options.ignore_sanity_checks {
                overridden();
                return Ok(());
            }
            return refused(REFUSED);
        }
        Used::Bytes(bytes) => {
            let kib = bytes.div_ceil(1024);
            out(&format!("{kib:12} kB data area apparently used\n{left}\n"));
            if kib > usable_kib {
                out(TRUNCATED);
                return refused(ALTERNATIVES);
            }
            out("Even though it looks like this would place the new meta data into\n\
                 unused space, you still need to confirm, as this is only a guess.\n");
        }
    }
    if !is_confirmed("Do you want to proceed?", options.force) {
        out("Operation canceled.\n");
        return Err(Exit::silent(1));
    }
    Ok(())
}
