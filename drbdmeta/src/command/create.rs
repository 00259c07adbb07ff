//! create-md.
//!
//! Spec: metadata.md §8.5.

use drbdmeta::io::{IoError, MetaIo, write_zeros_plainly};
use drbdmeta::layout::{Layout, Placement};
use drbdmeta::ops;
use drbdmeta::superblock::{BYTES_PER_BIT, DecodeError, Invalid, MAGIC_V09, Superblock};
use drbdmeta::units::{ByteLen, ByteOffset, HumanKib};
use drbdmeta::v07::{OldSuperblock, fixed_superblock};

use super::args::{BitmapMode, Invocation};
use super::open::{Found, Opened};
use super::store::{Store, describe};
use super::talk::{err, is_confirmed, out};
use super::{Exit, backup, existing, resize};

const DONE: &str = "New drbd meta data block successfully created.\n";

/// Meta-data that is in the way.
#[derive(Clone, Debug)]
enum InTheWay {
    V08(Superblock, Layout),
    V07 { old: OldSuperblock, at: ByteOffset, is_fixed: bool },
    V09,
}

impl InTheWay {
    fn name(&self) -> &'static str {
        match self {
            Self::V08(..) => "v08",
            Self::V07 { .. } => "v07",
            Self::V09 => "v09",
        }
    }
}

pub(super) fn create(o: &mut Opened<'_>) -> Result<(), Exit> {
    if let Found::LastKnown(sb, layout, _) = o.found.clone() {
        if let Some(result) = at_last_known(o, &sb, &layout) {
            return result;
        }
        o.found = Found::Nowhere;
    }
    let layout = Layout::for_new(o.run.placement, o.device_len(), o.run.options.al())
        .map_err(|e| Exit::new(10, e.to_string()))?;
    let found = what_is_there(o)?;
    if let Some(found) = &found {
        let convert = if o.run.placement.is_internal() {
            ask_internal(o, found)?
        } else {
            ask_external(o, found)?
        };
        if let (true, InTheWay::V07 { old, at, is_fixed }) = (convert, found) {
            return converted(o, &layout, old, *at, *is_fixed);
        }
    }
    fresh(o, &layout, found.as_ref())
}

/// The device has grown. `None`: go on as if nothing had been found.
fn at_last_known(o: &mut Opened<'_>, sb: &Superblock, layout: &Layout) -> Option<Result<(), Exit>> {
    let options = &o.run.options;
    if options.has_al() && options.al() != sb.al {
        let text = "Cannot move after offline resize and change AL-striping at the same time, yet.";
        return Some(Err(Exit::new(20, text)));
    }
    if options.force {
        err("Warning: the meta data at the last-known position is abandoned\n");
        return None;
    }
    if !is_confirmed("Move internal meta data from last-known position?\n", false) {
        out("Operation canceled.\n");
        return Some(Err(Exit::silent(1)));
    }
    Some(existing::check(o, layout).and_then(|()| resize::move_here(o, sb, layout)))
}

fn what_is_there(o: &mut Opened<'_>) -> Result<Option<InTheWay>, Exit> {
    let mut found = None;
    let len = o.device_len();
    if o.run.placement.is_internal()
        && let Some(at) = fixed_superblock(len)
        && let Some(old) = OldSuperblock::from_disk(&o.read_block(at)?)
    {
        found = Some(InTheWay::V07 { old, at, is_fixed: true });
    }
    let at = o.superblock_at();
    let block = o.read_block(at)?;
    if let Some(old) = OldSuperblock::from_disk(&block) {
        found = Some(InTheWay::V07 { old, at, is_fixed: false });
    }
    match Superblock::from_disk(&block) {
        Err(DecodeError::Magic { found: MAGIC_V09 }) => found = Some(InTheWay::V09),
        Err(_) => {}
        Ok(sb) => match sb.check(o.run.placement, len) {
            Ok(layout) => found = Some(InTheWay::V08(sb, layout)),
            Err(invalid) => {
                err(&format!("{invalid}\n"));
                // Unusable for us, but somebody's: not to be overwritten without a question.
                let usual = Superblock { bm_bytes_per_bit: BYTES_PER_BIT, ..sb };
                if let (Invalid::BytesPerBit { .. }, Ok(layout)) =
                    (invalid, usual.check(o.run.placement, len))
                {
                    found = Some(InTheWay::V08(usual, layout));
                }
            }
        },
    }
    Ok(found)
}

fn cancelled() -> Exit {
    out("Operation cancelled.\n");
    Exit::silent(1)
}

/// May it be overwritten? True: convert it instead.
fn ask_internal(o: &Opened<'_>, found: &InTheWay) -> Result<bool, Exit> {
    let (at, kind) = match found {
        InTheWay::V07 { at, is_fixed: true, .. } => (*at, "fixed-size"),
        _ => (o.superblock_at(), "flexible-size"),
    };
    err(&format!(
        "You want me to create a v08 style flexible-size internal meta data block.\n\
         There appears to be a {} {kind} internal meta data block\n\
         already in place on {} at byte offset {}\n",
        found.name(),
        o.run.path,
        at.0
    ));
    let InTheWay::V08(sb, _) = found else { return ask_convert(o, found) };
    let options = &o.run.options;
    // Forced, a new log is what was asked for.
    if sb.al != options.al() && !options.force {
        let question = "Do you want to change the activity log stripe settings *only*?";
        if is_confirmed(question, false) {
            return Err(Exit::new(
                30,
                "Sorry, not yet fully implemented\n\
                 Try dump-md > dump.txt; restore-md -s x -z y dump.txt",
            ));
        }
    }
    let question = "Do you really want to overwrite the existing meta-data?";
    if is_confirmed(question, options.force) { Ok(false) } else { Err(cancelled()) }
}

fn ask_external(o: &Opened<'_>, found: &InTheWay) -> Result<bool, Exit> {
    if !matches!(found, InTheWay::V08(..)) {
        return ask_convert(o, found);
    }
    let question = "Valid meta data seems to be in place.\nDo you really want to overwrite?";
    if is_confirmed(question, o.run.options.force) { Ok(false) } else { Err(cancelled()) }
}

fn ask_convert(o: &Opened<'_>, found: &InTheWay) -> Result<bool, Exit> {
    let (name, force) = (found.name(), o.run.options.force);
    let convert = format!("Valid {name} meta-data found, convert to v08?");
    let is_convertible = matches!(found, InTheWay::V07 { .. });
    if is_convertible && is_confirmed(&convert, force) {
        return Ok(true);
    }
    let replace = format!(
        "So you want me to replace the {name} meta-data\nwith newly initialized v08 meta-data?"
    );
    if is_confirmed(&replace, force) { Ok(false) } else { Err(cancelled()) }
}

fn failed(e: &IoError) -> Exit {
    Exit::failure(format!("{}\noperation failed", describe(e)))
}

/// The end of a write that failed, in this command's words.
struct Failed(Exit);

impl From<IoError> for Failed {
    fn from(e: IoError) -> Self {
        Self(failed(&e))
    }
}

fn fresh(o: &mut Opened<'_>, layout: &Layout, found: Option<&InTheWay>) -> Result<(), Exit> {
    existing::check(o, layout)?;
    let block = o.read_block(layout.superblock)?;
    // What is not valid for this configuration may be so for another one.
    let is_ours = Superblock::from_disk(&block).is_ok();
    match found {
        Some(InTheWay::V08(_, old)) => backup::save(o, old, backup::What::Everything)?,
        None if !is_ours => {}
        _ => backup::save(o, layout, backup::What::Everything)?,
    }
    if let Some(InTheWay::V07 { at, is_fixed: true, .. }) = found {
        backup::save_block(o, *at)?;
    }
    out("initializing activity log\n");
    let sb = Superblock::new(layout, o.run.options.peer_max_bio_size);
    let has_old = block.iter().any(|b| *b != 0);
    let run = o.run;
    let fill = |io: &mut Store, layout: &Layout| {
        fill_bitmap(run, io, layout).map_err(Failed)?;
        out("Writing meta data...\n");
        Ok(())
    };
    ops::create(&mut o.io, layout, &sb, has_old, fill).map_err(|Failed(exit)| exit)?;
    o.update_note(&sb);
    if let Some(InTheWay::V07 { at, is_fixed: true, .. }) = found {
        ops::wipe(&mut o.io, *at).map_err(|e| failed(&e))?;
    }
    out(DONE);
    Ok(())
}

fn fill_bitmap(run: &Invocation, io: &mut Store, layout: &Layout) -> Result<(), Exit> {
    let (at, len) = (layout.bitmap, layout.bitmap_len);
    let size = HumanKib(len.0 / 1024);
    let mode = run.options.bitmap_mode;
    match mode {
        BitmapMode::Skip => {
            err("SKIPPED initializing bitmap area\n");
            return Ok(());
        }
        BitmapMode::SetAll => {
            err(&format!("initializing bitmap ({size}) to all set using pwrite\n"));
            return set_all(io, at, len).map_err(|e| failed(&e));
        }
        BitmapMode::Pwrite => {}
        BitmapMode::Automatic | BitmapMode::Zeroout => {
            err(&format!("initializing bitmap ({size}) to all zero\n"));
            let Err(e) = io.zero_range(at, len) else { return Ok(()) };
            err(&format!("ioctl({}, BLKZEROOUT, [{}, {}]) failed: {e}\n", run.path, at.0, len.0));
            if mode == BitmapMode::Zeroout {
                return Err(Exit::new(10, "fast zero-out failed, fallback disabled"));
            }
        }
    }
    err(&format!("initializing bitmap ({size}) to all zero using pwrite\n"));
    write_zeros_plainly(io, at, len).map_err(|e| failed(&e))
}

fn set_all(io: &mut Store, at: ByteOffset, len: ByteLen) -> Result<(), IoError> {
    const PIECE: u64 = 1 << 20;
    let ones = vec![0xFF; 1 << 20];
    let mut done = 0;
    while done < len.0 {
        let now = (len.0 - done).min(PIECE);
        let piece = ones.get(..usize::try_from(now).unwrap_or_default()).unwrap_or_default();
        io.write_at(ByteOffset(at.0 + done), piece)?;
        done += now;
    }
    Ok(())
}

/// Keeps what 0.7 knew.
fn converted(
    o: &mut Opened<'_>,
    layout: &Layout,
    old: &OldSuperblock,
    at: ByteOffset,
    is_fixed: bool,
) -> Result<(), Exit> {
    out("Converting meta data...\n");
    existing::check(o, layout)?;
    backup::save(o, layout, backup::What::Everything)?;
    let mut sb = old.convert(layout);
    sb.la_size = sb.la_size.min(layout.usable());
    out("Writing meta data...\n");
    let is_elsewhere = is_fixed && o.run.placement == Placement::Internal;
    if is_elsewhere {
        backup::save_block(o, at)?;
        err("Warning: the bitmap of the old meta data is not converted. \
             Have one node synchronize completely from the other.\n");
    }
    ops::convert(&mut o.io, layout, &sb, is_elsewhere.then_some(at)).map_err(|e| failed(&e))?;
    o.update_note(&sb);
    out(DONE);
    Ok(())
}
