//! restore-md and verify-dump.
//!
//! Spec: metadata.md §8.6.3.

use std::fs::File;
use std::io::{Read, Seek};

use drbdmeta::bitmap::Region;
use drbdmeta::io::{IoError, MetaIo};
use drbdmeta::layout::{AlGeometry, Layout};
use drbdmeta::ops;
use drbdmeta::parse::{Dump, Head, ParseError, Source};
use drbdmeta::superblock::{Flags, Superblock};
use drbdmeta::units::{ByteOffset, Gi, SectorCount};

use super::args::Invocation;
use super::open::{Found, Opened};
use super::store::Store;
use super::talk::{err, is_confirmed, out};
use super::{Exit, backup, existing};

/// The dump: a file is read piece by piece, as often as needed; standard input may be a pipe and
/// is kept.
enum Input {
    File(File, Option<std::io::Error>),
    Kept(Vec<u8>, usize),
}

impl Input {
    fn open(run: &Invocation) -> Result<Self, Exit> {
        if let Some(path) = run.arguments.first() {
            let failed = |_| Exit::new(20, format!("open of '{path}' failed."));
            let file = File::open(path).map_err(failed)?;
            if file.metadata().is_ok_and(|about| about.is_file()) {
                return Ok(Self::File(file, None));
            }
            return Self::keep(file);
        }
        Self::keep(std::io::stdin().lock())
    }

    fn keep(mut from: impl Read) -> Result<Self, Exit> {
        let mut text = Vec::new();
        from.read_to_end(&mut text).map_err(|e| unreadable(&e))?;
        Ok(Self::Kept(text, 0))
    }

    fn rewind(&mut self) -> Result<(), Exit> {
        match self {
            Self::File(file, _) => file.rewind().map_err(|e| unreadable(&e)),
            Self::Kept(_, at) => {
                *at = 0;
                Ok(())
            }
        }
    }

    /// An error of the text, unless it could not be read.
    fn explain(&self, error: &ParseError) -> Exit {
        match self {
            Self::File(_, Some(e)) => unreadable(e),
            _ => Exit::new(10, error.to_string()),
        }
    }
}

fn unreadable(e: &std::io::Error) -> Exit {
    Exit::new(10, format!("reading the dump failed: {}", super::system(e)))
}

impl Source for &mut Input {
    fn read(&mut self, into: &mut [u8]) -> usize {
        match self {
            Input::File(file, error) => file.read(into).unwrap_or_else(|e| {
                *error = Some(e);
                0
            }),
            Input::Kept(text, at) => {
                let mut rest = text.get(*at..).unwrap_or_default();
                let len = Source::read(&mut rest, into);
                *at += len;
                len
            }
        }
    }
}

pub(super) fn verify(run: &Invocation) -> Result<(), Exit> {
    let mut input = Input::open(run)?;
    let mut dump = Dump::new(&mut input);
    let read = dump.version().and_then(|()| dump.head()).and_then(|_| skip_bitmap(&mut dump));
    read.map_err(|e| input.explain(&e))?;
    out("input file parsed ok\n");
    Ok(())
}

fn skip_bitmap<S: Source>(dump: &mut Dump<S>) -> Result<(), ParseError> {
    dump.bitmap(|_, _| Ok(()))
}

pub(super) fn restore(o: &mut Opened<'_>) -> Result<(), Exit> {
    let is_found = !matches!(o.found, Found::Nowhere);
    if is_found && !is_confirmed("Valid meta-data in place, overwrite?", o.run.options.force) {
        return Err(Exit::silent(super::FAILURE));
    }
    let mut input = Input::open(o.run)?;
    let mut dump = Dump::new(&mut input);
    let version = dump.version();
    if version.is_ok() {
        err("reinitializing\n");
    }
    // A faulty dump must not leave half a bitmap behind: all of it is read twice.
    let head = version.and_then(|()| dump.head());
    let head = head.map_err(|e| input.explain(&e))?;
    // The shape of the log is in the dump; what the check says uses it.
    let layout = new_layout(o, &head)?;
    existing::check(o, &layout)?;
    input.rewind()?;
    let mut dump = Dump::new(&mut input);
    let read = dump.version().and_then(|()| dump.head()).and_then(|_| skip_bitmap(&mut dump));
    read.map_err(|e| input.explain(&e))?;
    let sb = superblock(&head, &layout)?;
    match o.found.clone() {
        Found::Here(_, old) | Found::LastKnown(_, old, _) => {
            backup::save(o, &old, backup::What::Everything)?;
        }
        Found::Nowhere => {}
    }
    let region = Region::new(&layout, sb.la_size);
    let has_old = o.read_block(layout.superblock)?.iter().any(|b| *b != 0);
    input.rewind()?;
    let mut dump = Dump::new(&mut input);
    let again = dump.version().and_then(|()| dump.head()).map_err(Fill::Text);
    let fill =
        |io: &mut Store, _: &Layout| again.and_then(|_| write_bitmap(io, &region, &mut dump));
    ops::create(&mut o.io, &layout, &sb, has_old, fill).map_err(|e| match e {
        Fill::Io(e) => Exit::failure(format!("{}\nWriting failed", super::store::describe(&e))),
        Fill::Text(e) => input.explain(&e),
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

/// An error of the device, or of the text (which has been read before, but may have changed).
enum Fill {
    Io(IoError),
    Text(ParseError),
}

impl From<ParseError> for Fill {
    fn from(e: ParseError) -> Self {
        Self::Text(e)
    }
}

impl From<IoError> for Fill {
    fn from(e: IoError) -> Self {
        Self::Io(e)
    }
}

const PIECE: usize = 1 << 20;

fn write_bitmap<S: Source>(
    io: &mut dyn MetaIo,
    region: &Region,
    dump: &mut Dump<S>,
) -> Result<(), Fill> {
    let mut piece: Vec<u8> = Vec::with_capacity(PIECE);
    let (mut at, mut given) = (0u64, 0u64);
    let len = region.len.0;
    dump.bitmap::<Fill>(|value, times| {
        given = given.saturating_add(times.saturating_mul(8));
        let fits = times.min((len - at - length(&piece)) / 8);
        for _ in 0..fits {
            piece.extend_from_slice(&value.to_le_bytes());
            if piece.len() == PIECE {
                put(io, region, &mut at, &mut piece)?;
            }
        }
        Ok(())
    })?;
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
    Ok(io.write_zeros(end, drbdmeta::units::ByteLen(left))?)
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
