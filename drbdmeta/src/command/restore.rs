//! restore-md and verify-dump.
//!
//! Spec: metadata.md §8.6.3.

use std::io::Read;

use drbdmeta::bitmap::Region;
use drbdmeta::io::{IoError, MetaIo};
use drbdmeta::layout::{AlGeometry, Layout};
use drbdmeta::ops;
use drbdmeta::parse::{Dump, Head, ParseError};
use drbdmeta::superblock::{Flags, Superblock};
use drbdmeta::units::{ByteOffset, Gi, SectorCount};

use super::args::Invocation;
use super::open::{Found, Opened};
use super::store::Store;
use super::talk::{err, is_confirmed, out};
use super::{Exit, backup, existing};

fn text(run: &Invocation) -> Result<Vec<u8>, Exit> {
    match run.arguments.first() {
        Some(path) => {
            std::fs::read(path).map_err(|_| Exit::new(20, format!("open of '{path}' failed.")))
        }
        None => {
            let mut text = Vec::new();
            let read = std::io::stdin().lock().read_to_end(&mut text);
            read.map_err(|e| Exit::new(10, format!("reading standard input failed: {e}")))?;
            Ok(text)
        }
    }
}

fn syntax(error: &ParseError) -> Exit {
    Exit::new(10, error.to_string())
}

pub(super) fn verify(run: &Invocation) -> Result<(), Exit> {
    let text = text(run)?;
    let mut dump = Dump::new(&text);
    dump.version().map_err(|e| syntax(&e))?;
    dump.head().map_err(|e| syntax(&e))?;
    dump.bitmap::<ParseError>(|_, _| Ok(())).map_err(|e| syntax(&e))?;
    out("input file parsed ok\n");
    Ok(())
}

pub(super) fn restore(o: &mut Opened<'_>) -> Result<(), Exit> {
    let is_found = !matches!(o.found, Found::Nowhere);
    if is_found && !is_confirmed("Valid meta-data in place, overwrite?", o.run.options.force) {
        return Err(Exit::silent(super::FAILURE));
    }
    let text = text(o.run)?;
    let mut dump = Dump::new(&text);
    dump.version().map_err(|e| syntax(&e))?;
    err("reinitializing\n");
    // The shape of the log is in the dump; what the check says uses it.
    let head = dump.head().map_err(|e| syntax(&e))?;
    let layout = new_layout(o, &head)?;
    existing::check(o, &layout)?;
    // A faulty dump must not leave half a bitmap behind: read all of it first.
    dump.clone().bitmap::<ParseError>(|_, _| Ok(())).map_err(|e| syntax(&e))?;
    let sb = superblock(&head, &layout)?;
    match o.found.clone() {
        Found::Here(_, old) | Found::LastKnown(_, old, _) => {
            backup::save(o, &old, backup::What::Everything)?;
        }
        Found::Nowhere => {}
    }
    let region = Region::new(&layout, sb.la_size);
    let has_old = o.read_block(layout.superblock)?.iter().any(|b| *b != 0);
    let fill = |io: &mut Store, _: &Layout| write_bitmap(io, &region, &mut dump);
    ops::create(&mut o.io, &layout, &sb, has_old, fill).map_err(|e: IoError| {
        Exit::failure(format!("{}\nWriting failed", super::store::describe(&e)))
    })?;
    o.update_note(&sb);
    out("Successfully restored meta data\n");
    Ok(())
}

fn new_layout(o: &Opened<'_>, head: &Head) -> Result<Layout, Exit> {
    let small = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
    let mut al = AlGeometry {
        stripes: small(head.al_stripes),
        stripe_blocks: small(head.al_stripe_size_4k),
    };
    let options = &o.run.options;
    if options.has_al() && options.al() != al {
        err("override activity log striping from commandline\n");
        al = options.al();
    }
    let range = drbdmeta::layout::AL_BLOCKS_MIN..=drbdmeta::layout::AL_BLOCKS_MAX;
    if !range.contains(&al.blocks()) {
        return Err(Exit::new(10, "invalid al-stripe* settings in the dump"));
    }
    Layout::for_new(o.run.placement, o.device_len(), al).map_err(|e| Exit::new(10, e.to_string()))
}

fn superblock(head: &Head, layout: &Layout) -> Result<Superblock, Exit> {
    let peer_max = u32::try_from(head.la_peer_max_bio_size).unwrap_or(0);
    let mut sb = Superblock::new(layout, peer_max);
    let [current, bitmap, history @ ..] = head.uuids.map(Gi);
    (sb.current, sb.bitmap, sb.history) = (current, bitmap, history);
    sb.flags = Flags::from_bits_retain(head.flags);
    sb.device_uuid = head.device_uuid;
    let usable = layout.usable();
    if head.la_size > usable.0 {
        out(&format!("# la-size-sect was too big ({}), truncated ({})!\n", head.la_size, usable.0));
    }
    sb.la_size = SectorCount(head.la_size.min(usable.0));
    Ok(sb)
}

/// An error of the device, or of the text (which has been checked before).
enum Fill {
    Io(IoError),
    Text,
}

impl From<ParseError> for Fill {
    fn from(_: ParseError) -> Self {
        Self::Text
    }
}

const PIECE: usize = 1 << 20;

fn write_bitmap(io: &mut dyn MetaIo, region: &Region, dump: &mut Dump<'_>) -> Result<(), IoError> {
    let mut piece: Vec<u8> = Vec::with_capacity(PIECE);
    let (mut at, mut given) = (0u64, 0u64);
    let len = region.len.0;
    let result = dump.bitmap::<Fill>(|value, times| {
        given = given.saturating_add(times.saturating_mul(8));
        let fits = times.min((len - at - length(&piece)) / 8);
        for _ in 0..fits {
            piece.extend_from_slice(&value.to_le_bytes());
            if piece.len() == PIECE {
                put(io, region, &mut at, &mut piece).map_err(Fill::Io)?;
            }
        }
        Ok(())
    });
    if let Err(Fill::Io(e)) = result {
        return Err(e);
    }
    if given > len {
        err(&format!(
            "in meta_restore_md: truncating byte count from {given} to {len}\n\
             Bitmap info too large, truncated!\n"
        ));
    }
    let rest = length(&piece).div_ceil(4096) * 4096;
    piece.resize(usize::try_from(rest).unwrap_or_default(), 0);
    put(io, region, &mut at, &mut piece)?;
    let end = ByteOffset(region.start.0 + at);
    let left = (len - at).min(io.device_len().0.saturating_sub(end.0));
    io.write_zeros(end, drbdmeta::units::ByteLen(left))
}

fn put(
    io: &mut dyn MetaIo,
    region: &Region,
    at: &mut u64,
    piece: &mut Vec<u8>,
) -> Result<(), IoError> {
    let start = region.start.0 + *at;
    let behind = usize::try_from(io.device_len().0.saturating_sub(start)).unwrap_or(PIECE);
    let there = piece.get(..piece.len().min(behind)).unwrap_or_default();
    if there.iter().any(|b| *b != 0) {
        io.write_at(ByteOffset(start), there)?;
    } else {
        io.write_zeros(ByteOffset(start), drbdmeta::units::ByteLen(length(there)))?;
    }
    *at += length(piece);
    piece.clear();
    Ok(())
}

fn length(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}
