//! Opening the device and finding its meta-data.
//!
//! Spec: metadata.md §8.3, §9.1.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use drbdmeta::hold::Hold;
use drbdmeta::io::MetaIo;
use drbdmeta::last_known::LastKnown;
use drbdmeta::layout::{BLOCK_BYTES, DEVICE_MIN, Layout, Placement};
use drbdmeta::ops::MoveJournal;
use drbdmeta::superblock::{DecodeError, MAGIC_V09, Superblock};
use drbdmeta::units::{ByteLen, ByteOffset};
use rustix::fs::{FileType, OFlags};

use super::args::{Command, Invocation};
use super::store::Store;
use super::talk::{err, is_confirmed, out};
use super::{Exit, lock};

/// Where valid meta-data was found.
#[derive(Clone, Debug)]
pub(super) enum Found {
    Nowhere,
    Here(Box<Superblock>, Layout),
    /// The device has grown since.
    LastKnown(Box<Superblock>, Layout, LastKnown),
}

/// A device with what was found on it.
#[derive(Debug)]
pub(super) struct Opened<'a> {
    pub(super) run: &'a Invocation,
    pub(super) io: Store,
    pub(super) found: Found,
    _hold: Option<Hold>,
}

impl<'a> Opened<'a> {
    pub(super) fn open(run: &'a Invocation) -> Result<Self, Exit> {
        let (file, is_direct, hold) = open_file(run)?;
        let io = Store::new(file, is_direct, run.options.dry_run)
            .map_err(|e| Exit::new(20, format!("size of {}: {e}", run.path)))?;
        let mut opened = Self { run, io, found: Found::Nowhere, _hold: hold };
        opened.check_size()?;
        if run.command.modifies() {
            opened.finish_cut_move()?;
        }
        opened.look(true)?;
        Ok(opened)
    }

    pub(super) fn device_len(&self) -> ByteLen {
        self.io.device_len()
    }

    /// Where the superblock belongs. (The size was checked.)
    pub(super) fn superblock_at(&self) -> ByteOffset {
        self.run.placement.superblock(self.device_len()).unwrap_or_default()
    }

    fn check_size(&self) -> Result<(), Exit> {
        let (path, len) = (&self.run.path, self.device_len().0);
        if len < DEVICE_MIN.0 {
            return Err(Exit::new(10, format!("{path} is only {len} bytes. That's not enough.")));
        }
        let at = self.superblock_at().0;
        if at > len - 4096 {
            return Err(Exit::new(
                10,
                format!(
                    "Device too small: expecting meta data block at\n\
                     byte offset {at}, but {path} is only {len} bytes."
                ),
            ));
        }
        Ok(())
    }

    pub(super) fn read_block(&mut self, at: ByteOffset) -> Result<[u8; BLOCK_BYTES], Exit> {
        let mut block = [0; BLOCK_BYTES];
        self.io.read_at(at, &mut block)?;
        Ok(block)
    }

    /// Looks at the expected place, then at the last known one.
    pub(super) fn look(&mut self, with_last_known: bool) -> Result<(), Exit> {
        let run = self.run;
        let at = self.superblock_at();
        let block = self.read_block(at)?;
        match Superblock::from_disk(&block) {
            Ok(sb) => match sb.check(run.placement, self.device_len()) {
                Ok(layout) => {
                    self.found = Found::Here(Box::new(clipped(sb, &layout)), layout);
                    return Ok(());
                }
                Err(invalid) => err(&format!("{invalid}\n")),
            },
            Err(DecodeError::Magic { found: MAGIC_V09 }) if run.command != Command::CreateMd => {
                let path = &run.path;
                err(&format!(
                    "v09 meta-data found on {path}: this is a DRBD 9 device, not supported; \
                     use \"create-md\" to replace it\n"
                ));
            }
            Err(error) if run.options.verbose > 0 => err(&format!("{error}\n")),
            Err(_) => {}
        }
        if with_last_known && run.placement.is_internal() {
            self.look_at_last_known()?;
        }
        Ok(())
    }

    fn look_at_last_known(&mut self) -> Result<(), Exit> {
        let is_verbose = self.run.options.verbose > 0;
        let Some(note) = self.read_note() else {
            if is_verbose {
                err("no last-known offset information available.\n");
            }
            return Ok(());
        };
        if note.device_len == self.device_len().0 {
            return Ok(());
        }
        let at = self.run.placement.superblock(ByteLen(note.device_len)).unwrap_or_default();
        let is_beyond = at.0 > self.device_len().0 - 4096;
        let mut there = None;
        if !is_beyond {
            let block = self.read_block(at)?;
            let sb = Superblock::from_disk(&block).ok();
            there = sb.and_then(|sb| {
                let layout = sb.check(self.run.placement, ByteLen(note.device_len)).ok()?;
                Some((clipped(sb, &layout), layout))
            });
        }
        if is_verbose {
            self.tell_search(&note, at, there.is_some(), is_beyond);
        }
        let Some((sb, layout)) = there else { return Ok(()) };
        if note.device_uuid != 0 && note.device_uuid != sb.device_uuid {
            err(&format!(
                "Last known and found uuid differ!?\n{:016X} != {:016X}\n",
                note.device_uuid, sb.device_uuid
            ));
            if !self.run.options.force {
                err("You may --force me to ignore that.\n");
                return Ok(());
            }
            err("You --force'ed me to ignore that.\n");
        }
        self.found = Found::LastKnown(Box::new(sb), layout, note);
        Ok(())
    }

    fn tell_search(&self, note: &LastKnown, at: ByteOffset, is_there: bool, is_beyond: bool) {
        let (path, name) = (&self.run.path, note.device.as_deref().unwrap_or_default());
        let minor = self.run.minor.map_or(-1, i64::from);
        let on = if name == path { String::new() } else { format!("on {name} ") };
        let end =
            if is_there { ", and seems to still be valid." } else { ", but I cannot find it now." };
        err(&format!(
            " last known info: {} {name}\n last known uuid: {:016X}\n\
             While checking for internal meta data for drbd{minor} on {path},\n\
             it appears that it may have been relocated.\n\
             It used to be {on}at byte offset {}{end}\n",
            note.device_len, note.device_uuid, at.0
        ));
        if is_beyond {
            err("Device is too small now!\n");
        }
    }

    fn file(&self, suffix: &str) -> PathBuf {
        let minor = self.run.minor.map_or(-1, i64::from);
        Path::new(&self.run.options.var_lib).join(format!("drbd-minor-{minor}.{suffix}"))
    }

    pub(super) fn note_path(&self) -> PathBuf {
        self.file("lkbd")
    }

    /// Reads the last-known file.
    pub(super) fn read_note(&self) -> Option<LastKnown> {
        let path = self.note_path();
        match std::fs::read(&path) {
            Ok(text) => {
                let note = LastKnown::parse(&String::from_utf8_lossy(&text));
                if note.is_none() {
                    err(&format!("lk_bdev_load({}): parse error\n", path.display()));
                }
                note
            }
            Err(e) if e.kind() == ErrorKind::NotFound => None,
            Err(e) => {
                err(&format!("lk_bdev_load({}) failed: {e}\n", path.display()));
                None
            }
        }
    }

    /// After every write of a superblock: remembers where it is, or forgets it.
    pub(super) fn update_note(&self, superblock: &Superblock) {
        if self.run.options.dry_run {
            return;
        }
        if !self.run.placement.is_internal() {
            return self.delete_note();
        }
        let note = LastKnown {
            device_len: self.device_len().0,
            device: Some(self.run.path.clone()),
            device_uuid: superblock.device_uuid,
        };
        let path = self.note_path();
        if let Err(e) = replace_file(&path, &[note.to_text().as_bytes()]) {
            err(&format!("lk_bdev_save({}) failed: {e}\n", path.display()));
        }
    }

    pub(super) fn delete_note(&self) {
        if !self.run.options.dry_run {
            // Nothing there is the usual case.
            let _ = std::fs::remove_file(self.note_path());
        }
    }

    /// Valid meta-data at its place, or this text and a failure.
    pub(super) fn here(&self, text: &str) -> Result<(Superblock, Layout), Exit> {
        match &self.found {
            Found::Here(sb, layout) => Ok((**sb, *layout)),
            Found::Nowhere | Found::LastKnown(..) => Err(Exit::failure(text)),
        }
    }

    /// Writes a changed superblock.
    pub(super) fn write(
        &mut self,
        sb: &Superblock,
        layout: &Layout,
        failed: &str,
    ) -> Result<(), Exit> {
        let written = drbdmeta::ops::write_superblock(&mut self.io, layout, sb);
        written.map_err(|e| Exit::failure(format!("{}\n{failed}", super::store::describe(&e))))?;
        self.update_note(sb);
        Ok(())
    }

    pub(super) fn journal_path(&self) -> PathBuf {
        self.file("move")
    }

    /// A move of the meta-data over itself was cut: completes it.
    fn finish_cut_move(&mut self) -> Result<(), Exit> {
        let path = self.journal_path();
        if !self.run.placement.is_internal() || self.run.options.dry_run {
            return Ok(());
        }
        let Ok(bytes) = std::fs::read(&path) else { return Ok(()) };
        // Not kept completely: then nothing had been written yet.
        if let Some(journal) = MoveJournal::from_bytes(bytes)
            && journal.end() == self.superblock_at().0 + 4096
        {
            err("Completing an interrupted move of the internal meta data\n");
            journal.redo(&mut self.io)?;
        }
        let _ = std::fs::remove_file(&path);
        Ok(())
    }
}

/// Writes a file so that either the old or the new content survives a crash.
pub(super) fn replace_file(path: &Path, parts: &[&[u8]]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or_else(|| Path::new("."));
    std::fs::create_dir_all(folder)?;
    let temporary = path.with_extension(format!("tmp{}", std::process::id()));
    let mut file = File::create(&temporary)?;
    for part in parts {
        file.write_all(part)?;
    }
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    File::open(folder)?.sync_all()
}

fn clipped(mut sb: Superblock, layout: &Layout) -> Superblock {
    let usable = layout.usable();
    if sb.la_size > usable {
        out(&format!("# la-size-sect was too big ({}), truncated ({})!\n", sb.la_size.0, usable.0));
        sb.la_size = usable;
    }
    sb
}

fn open_file(run: &Invocation) -> Result<(File, bool, Option<Hold>), Exit> {
    let path = &run.path;
    let failed =
        |e: &std::io::Error| Exit::new(20, format!("open({path}) failed: {}", super::system(e)));
    let kind = rustix::fs::stat(path.as_str()).map_err(|e| failed(&e.into()))?;
    let (file, is_direct) = match FileType::from_raw_mode(kind.st_mode) {
        FileType::BlockDevice => open_block(run, failed)?,
        FileType::RegularFile => match OpenOptions::new().read(true).write(true).open(path) {
            Err(e) if may_only_read(run, &e) => {
                let file = File::open(path).map_err(|e| failed(&e))?;
                return Ok((file, false, None));
            }
            other => (other.map_err(|e| failed(&e))?, false),
        },
        _ => return Err(Exit::new(20, format!("'{path}' is not a block device!"))),
    };
    let hold = lock::device(run, &file)?;
    Ok((file, is_direct, hold))
}

/// A file of somebody else, or on a disk that is mounted read-only: forced, it can be read.
fn may_only_read(run: &Invocation, error: &std::io::Error) -> bool {
    let kinds = [ErrorKind::PermissionDenied, ErrorKind::ReadOnlyFilesystem];
    run.options.force && !run.command.modifies() && kinds.contains(&error.kind())
}

fn open_block(
    run: &Invocation,
    failed: impl Fn(&std::io::Error) -> Exit,
) -> Result<(File, bool), Exit> {
    let open = |extra: OFlags| {
        let flags = i32::try_from(extra.bits()).unwrap_or_default();
        OpenOptions::new().read(true).write(true).custom_flags(flags).open(&run.path)
    };
    let direct = |extra: OFlags| match open(extra | OFlags::DIRECT) {
        Err(e) if e.kind() == ErrorKind::InvalidInput => open(extra).map(|f| (f, false)),
        other => other.map(|f| (f, true)),
    };
    let is_shared = matches!(run.placement, Placement::Indexed(_));
    match direct(if is_shared { OFlags::empty() } else { OFlags::EXCL }) {
        Err(e) if e.kind() == ErrorKind::ResourceBusy => {
            busy(run, &format!("{}\n{}", failed(&e).text, lock::holders(&run.path)))?;
            direct(OFlags::empty()).map_err(|e| failed(&e))
        }
        other => other.map_err(|e| failed(&e)),
    }
}

/// Somebody else has it: go on all the same?
pub(super) fn busy(run: &Invocation, text: &str) -> Result<(), Exit> {
    err(&format!("{text}\n"));
    let force = run.options.force;
    let is_refused = run.command == Command::ApplyAl && !force;
    if is_refused || !is_confirmed("Exclusive open failed. Do it anyways?", force) {
        out("Operation canceled.\n");
        return Err(Exit::silent(20));
    }
    Ok(())
}
