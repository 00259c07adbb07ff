//! Before something is destroyed it is saved.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use drbdmeta::io::MetaIo;
use drbdmeta::layout::Layout;
use drbdmeta::units::ByteOffset;

use super::Exit;
use super::open::Opened;
use super::talk::err;

/// How much is in danger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    Superblock,
    Everything,
}

const PIECE: u64 = 1 << 20;

/// Saves a byte-for-byte copy of the meta-data area to a dated file and says where on stderr.
/// Holes stay holes.
pub(super) fn save(o: &mut Opened<'_>, layout: &Layout, what: What) -> Result<(), Exit> {
    match what {
        What::Superblock => save_block(o, layout.superblock),
        What::Everything => {
            let (from, to) = layout.span();
            save_range(o, from, to)
        }
    }
}

/// The same for one block.
pub(super) fn save_block(o: &mut Opened<'_>, at: ByteOffset) -> Result<(), Exit> {
    save_range(o, at, ByteOffset(at.0 + 4096))
}

fn save_range(o: &mut Opened<'_>, from: ByteOffset, to: ByteOffset) -> Result<(), Exit> {
    let options = &o.run.options;
    if options.no_backup || options.dry_run {
        return Ok(());
    }
    let to = ByteOffset(to.0.min(o.device_len().0));
    let minor = o.run.minor.map_or(-1, i64::from);
    let name = format!("drbd-minor-{minor}-{}-{}.md", stamp(), o.run.command.name());
    let folder = Path::new(&options.var_lib).join("backup");
    let path = folder.join(name);
    let failed = |e: &std::io::Error| {
        let path = path.display();
        Exit::new(20, format!("cannot save the old meta-data to {path}: {e} (or use --no-backup)"))
    };
    std::fs::create_dir_all(&folder).map_err(|e| failed(&e))?;
    let mut file = File::create(&path).map_err(|e| failed(&e))?;
    copy(&mut o.io, &mut file, from.0, to.0, &failed)?;
    file.sync_all().map_err(|e| failed(&e))?;
    err(&format!("Saved bytes {}..{} of {} to {}\n", from.0, to.0, o.run.path, path.display()));
    Ok(())
}

fn copy(
    io: &mut dyn MetaIo,
    file: &mut File,
    from: u64,
    to: u64,
    failed: &dyn Fn(&std::io::Error) -> Exit,
) -> Result<(), Exit> {
    let mut buffer = Vec::new();
    let mut at = from;
    while at < to {
        let data = io.next_data(ByteOffset(at)).0.clamp(at, to);
        at += (data - at) / 4096 * 4096;
        let len = (to - at).min(PIECE);
        buffer.resize(usize::try_from(len).unwrap_or_default(), 0);
        io.read_at(ByteOffset(at), &mut buffer)?;
        if buffer.iter().any(|b| *b != 0) {
            file.seek(SeekFrom::Start(at - from)).map_err(|e| failed(&e))?;
            file.write_all(&buffer).map_err(|e| failed(&e))?;
        }
        at += len;
        if len == 0 {
            break;
        }
    }
    file.set_len(to - from).map_err(|e| failed(&e))
}

/// Date and time of the file's name, UTC, to the microsecond so that no name comes twice.
fn stamp() -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now = now.unwrap_or_default();
    let (y, m, d, second) = super::dump::civil(i64::try_from(now.as_secs()).unwrap_or(0));
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let micros = now.subsec_micros();
    format!("{y:04}{m:02}{d:02}-{hour:02}{minute:02}{second:02}.{micros:06}")
}
