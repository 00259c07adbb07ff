//! Internal meta-data follows the end of its device.
//!
//! Spec: metadata.md §9.2.

use drbdmeta::io::IoError;
use drbdmeta::layout::Layout;
use drbdmeta::ops::{self, MoveError};
use drbdmeta::superblock::Superblock;

use super::open::{Found, Opened, replace_file};
use super::talk::{err, out};
use super::{Exit, backup};

pub(super) fn check_resize(o: &mut Opened<'_>) -> Result<(), Exit> {
    match o.found.clone() {
        Found::Here(sb, _) => {
            if o.run.placement.is_internal() {
                let known = o.read_note();
                let len = o.device_len().0;
                let is_current =
                    known.is_some_and(|n| n.device_len == len && n.device_uuid == sb.device_uuid);
                if !is_current {
                    o.update_note(&sb);
                }
            } else {
                o.delete_note();
            }
            Ok(())
        }
        Found::Nowhere if !o.run.placement.is_internal() => {
            Err(Exit::failure("Operation only supported for >= v8 internal meta data"))
        }
        Found::Nowhere => Err(Exit::failure("no suitable meta data found :(")),
        Found::LastKnown(sb, layout, _) => {
            err("Moving the internal meta data to its proper location\n");
            move_here(o, &sb, &layout)
        }
    }
}

/// Moves meta-data from its last known place to where it belongs now.
pub(super) fn move_here(o: &mut Opened<'_>, sb: &Superblock, old: &Layout) -> Result<(), Exit> {
    let new = Layout::expected(o.run.placement, o.device_len(), sb.al)
        .map_err(|e| Exit::failure(format!("{e}\noperation failed")))?;
    if sb.la_size <= new.usable() {
        backup::save(o, old, backup::What::Everything)?;
    }
    let journal = o.journal_path();
    let dry_run = o.run.options.dry_run;
    let mut save = |j: &ops::MoveJournal| {
        if dry_run {
            return Ok(());
        }
        replace_file(&journal, &[&j.header(), &j.content]).map_err(|e| IoError {
            op: drbdmeta::io::IoOp::Write,
            at: j.start,
            len: j.content.len(),
            errno: e.raw_os_error().unwrap_or(5),
        })
    };
    let moved = ops::move_internal(&mut o.io, old, &new, sb, &mut save);
    let moved = moved.map_err(|e| {
        let text = match e {
            MoveError::Io(e) => super::store::describe(&e),
            MoveError::OverData { .. } => e.to_string(),
        };
        Exit::failure(format!("{text}\noperation failed"))
    })?;
    o.update_note(&moved);
    if !dry_run {
        // It is there only if old and new place overlapped.
        let _ = std::fs::remove_file(o.journal_path());
    }
    out("Internal drbd meta data successfully moved.\n");
    Ok(())
}
