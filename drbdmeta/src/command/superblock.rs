//! Wiping, and applying the activity log.

use drbdmeta::al::replay;
use drbdmeta::ops::{self, ApplyPlan};
use drbdmeta::units::HumanKib;

use super::open::Opened;
use super::talk::{err, is_confirmed, out};
use super::{Exit, backup};

pub(super) fn wipe(o: &mut Opened<'_>) -> Result<(), Exit> {
    let Ok((_, layout)) = o.here("") else {
        err("There appears to be no drbd meta data to wipe out?\n");
        return Ok(());
    };
    if !is_confirmed("Do you really want to wipe out the DRBD meta data?", o.run.options.force) {
        out("Operation cancelled.\n");
        return Err(Exit::silent(1));
    }
    backup::save(o, &layout, backup::What::Everything)?;
    out("Wiping meta data...\n");
    ops::wipe(&mut o.io, layout.superblock)
        .map_err(|e| Exit::failure(format!("{}\noperation failed", super::store::describe(&e))))?;
    out("DRBD meta data block successfully wiped out.\n");
    o.delete_note();
    Ok(())
}

/// Spec: metadata.md §7.
pub(super) fn apply_al(o: &mut Opened<'_>) -> Result<(), Exit> {
    let (mut sb, layout) = o.here("No valid meta data found")?;
    let replay = replay(&mut o.io, &layout, &sb).map_err(|e| match e {
        drbdmeta::al::ReplayError::Io(e) => Exit::from(e),
        drbdmeta::al::ReplayError::PersistentMemory => Exit::failure(e.to_string()),
    })?;
    for warning in &replay.warnings {
        err(&format!("{warning}\n"));
    }
    let (mark, reinitialise) = match ops::plan_apply(&sb, &replay) {
        ApplyPlan::Refuse(status) => return Err(Exit::silent(status)),
        ApplyPlan::Do { mark, reinitialise, ignored_error } => {
            if ignored_error {
                err("Error ignored, no need to apply the AL\n");
            }
            (mark, reinitialise)
        }
    };
    let outcome = &replay.outcome;
    let applied =
        ops::apply(&mut o.io, &layout, &mut sb, outcome, mark, reinitialise).map_err(|e| {
            let text = super::store::describe(&e);
            Exit::failure(format!("{text}\nupdate of super block flags failed"))
        })?;
    for (extent, at) in &applied.beyond {
        let bytes = drbdmeta::bitmap::Region::new(&layout, sb.la_size).len.0;
        err(&format!("extent {} beyond end of bitmap! ({at} >= {bytes})\n", extent.0));
    }
    match (outcome, applied.newly_set) {
        (drbdmeta::al::Outcome::Updates(e), Some(_)) if e.is_empty() => err("Nothing to do.\n"),
        (_, Some(bits)) => err(&format!(
            "Marked additional {} as out-of-sync based on AL.\n",
            HumanKib(bits.0 * 4)
        )),
        (_, None) => {}
    }
    if applied.wrote_superblock {
        o.update_note(&sb);
    }
    Ok(())
}
