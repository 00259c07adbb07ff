//! check: what state the node is in, in sentences.

use drbdmeta::al::{Outcome, replay};
use drbdmeta::bitmap::Region;
use drbdmeta::layout::Layout;
use drbdmeta::superblock::{AttachError, DecodeError, Flags, MAGIC_V09, Superblock};
use drbdmeta::units::{Gi, HumanKib};
use drbdmeta::v07::{OldSuperblock, fixed_superblock};

use super::Exit;
use super::open::{Found, Opened};
use super::talk::out;

fn say(text: impl AsRef<str>) {
    out(&format!("{}\n", text.as_ref()));
}

/// Status 0: could be attached as it is; 1: something is to be done first.
pub(super) fn check(o: &mut Opened<'_>) -> Result<(), Exit> {
    let (sb, layout) = match o.found.clone() {
        Found::Here(sb, layout) => (*sb, layout),
        Found::Nowhere => return nothing_valid(o),
        Found::LastKnown(_, layout, note) => {
            let (then, now) = (note.device_len, o.device_len().0);
            say(format!("The device had {then} bytes and now has {now}."));
            say(format!("Its meta-data is still at the old place, byte {}.", layout.superblock.0));
            say("An attach would be refused; check-resize moves the meta-data first.");
            return Err(Exit::silent(1));
        }
    };
    say(format!("Valid v08 meta-data at byte {} of {}.", layout.superblock.0, o.run.path));
    describe_data(&sb);
    describe_generations(&sb);
    let is_log_bad = describe_log(o, &sb, &layout)?;
    describe_bitmap(o, &sb, &layout)?;
    describe_oddities(o, &sb, &layout)?;
    describe_connect(&sb);
    describe_attach(o, &sb, is_log_bad)
}

/// What is there instead?
fn nothing_valid(o: &mut Opened<'_>) -> Result<(), Exit> {
    say("There is no valid meta-data for this configuration.");
    let (at, len) = (o.superblock_at(), o.device_len());
    let block = o.read_block(at)?;
    let fixed = fixed_superblock(len).filter(|_| o.run.placement.is_internal());
    let old = match fixed {
        Some(at) => OldSuperblock::from_disk(&o.read_block(at)?),
        None => None,
    };
    let is_old = old.or_else(|| OldSuperblock::from_disk(&block)).is_some();
    let at = at.0;
    match Superblock::from_disk(&block) {
        Ok(sb) => {
            if let Err(invalid) = sb.check(o.run.placement, len) {
                say(format!("WRONG: the superblock at byte {at} does not fit: {invalid}."));
            }
            say("Either it is damaged, or it was written for another placement or size of device.");
        }
        Err(DecodeError::Magic { found: MAGIC_V09 }) => {
            say(format!("The superblock at byte {at} is DRBD 9's, which is not supported."));
        }
        Err(_) if is_old => say("There is meta-data of DRBD 0.7, which create-md can convert."),
        Err(_) if block.iter().all(|b| *b == 0) => {
            say(format!("The place of the superblock, byte {at}, is empty."));
        }
        Err(error) => say(format!("At byte {at} there is something else: {error}.")),
    }
    say("An attach would be refused; create-md makes new meta-data.");
    Err(Exit::silent(1))
}

/// What looks like damage, though nothing forbids it.
fn describe_oddities(o: &mut Opened<'_>, sb: &Superblock, layout: &Layout) -> Result<(), Exit> {
    let block = o.read_block(layout.superblock)?;
    let stray = Superblock::stray_bytes(&block);
    if stray > 0 {
        say(format!("ODD: {stray} bytes of the superblock that should be zero are not."));
    }
    let unknown = sb.flags.difference(Flags::KNOWN).bits();
    if unknown != 0 {
        say(format!("ODD: unknown flags {unknown:#010x} are set."));
    }
    if sb.flags.contains(Flags::WAS_UP_TO_DATE) && !sb.flags.contains(Flags::CONSISTENT) {
        say("ODD: the data is marked as up to date, but not as consistent.");
    }
    if sb.current.is_none() {
        say("ODD: there is no current generation.");
    }
    // What was read before has been cut to what fits.
    let stored = Superblock::from_disk(&block).map_or(sb.la_size, |stored| stored.la_size);
    if stored != sb.la_size {
        let usable = layout.usable();
        say(format!("ODD: the agreed size of {stored} sectors is more than the {usable} usable."));
    }
    if o.run.placement.is_internal() {
        let note = o.read_note();
        if note.is_none_or(|n| n.device_len != o.device_len().0) {
            say("The size of the device is not noted: after it grows, its meta-data will not be \
                 found. check-resize notes it.");
        }
    }
    Ok(())
}

fn describe_data(sb: &Superblock) {
    if sb.la_size.0 == 0 {
        say("It is new: the device has never been attached.");
    } else {
        let size = HumanKib(sb.la_size.0 / 2);
        say(format!("The replicated device has {size} ({} sectors).", sb.la_size.0));
    }
    say(match sb.disk_state() {
        "Inconsistent" => "The data is inconsistent: not usable before a sync.",
        "Outdated" => "The data is consistent but outdated: the peer has had newer data.",
        "UpToDate" => "The data is up to date, and the peer's data is known to be older.",
        _ => "The data is consistent; whether it is the newest, the peer has to say.",
    });
    let has = |flag| sb.flags.contains(flag);
    if has(Flags::PRIMARY) {
        say("The node was Primary when this was written: it stopped without being demoted.");
    }
    if has(Flags::CRASHED_PRIMARY) {
        say("It has crashed as Primary and has not seen its peer since.");
    }
    say(if has(Flags::CONNECTED) {
        "It was connected to its peer."
    } else {
        "It was not connected to its peer."
    });
    if has(Flags::AL_DISABLED) {
        say("No activity log was kept: after a crash as Primary everything counts as different.");
    }
}

fn describe_generations(sb: &Superblock) {
    if sb.current.same(Gi::JUST_CREATED) {
        say("The generation is the one of new meta-data: the data was never used.");
        return;
    }
    say(format!("The data is of generation {}.", sb.current));
    if !sb.bitmap.is_none() {
        let from = sb.bitmap;
        say(format!("The bitmap says what has changed since generation {from}."));
    }
    if sb.bitmap.is_none() && sb.history.iter().all(|h| h.is_none()) {
        say("No older generation is known.");
    }
}

fn describe_log(o: &mut Opened<'_>, sb: &Superblock, layout: &Layout) -> Result<bool, Exit> {
    let replay = replay(&mut o.io, layout, sb).map_err(|e| Exit::failure(e.to_string()))?;
    let needed = sb.flags.contains(Flags::PRIMARY);
    if replay.bad > 0 {
        say(format!("{} blocks of the activity log are not readable.", replay.bad));
    }
    let is_bad = matches!(replay.outcome, Outcome::NoData | Outcome::Unusable);
    match &replay.outcome {
        Outcome::Updates(extents) => {
            let size = HumanKib(u64::try_from(extents.len()).unwrap_or(0) * 4096);
            say(format!("The activity log names {} active extents ({size}).", extents.len()));
            say(if needed {
                "They count as out of sync once the log is applied."
            } else {
                "The node was not Primary, so they do not matter."
            });
        }
        Outcome::Initialised => say("The activity log is empty."),
        Outcome::NoData | Outcome::Unusable if needed => {
            say("WRONG: the activity log is needed, and nothing in it is usable.");
        }
        Outcome::NoData | Outcome::Unusable => {
            say("Nothing in the activity log is usable, but it is not needed either.");
        }
    }
    Ok(is_bad && needed)
}

fn describe_bitmap(o: &mut Opened<'_>, sb: &Superblock, layout: &Layout) -> Result<(), Exit> {
    if sb.flags.contains(Flags::FULL_SYNC) {
        say("A full sync is marked: the whole bitmap counts as set.");
        return Ok(());
    }
    let region = Region::new(layout, sb.la_size);
    let set = region.count_set(&mut o.io)?.0;
    let size = HumanKib(set * 4);
    say(format!("{set} of {} bits are set: {size} are out of sync.", region.bits.0));
    Ok(())
}

fn describe_connect(sb: &Superblock) {
    let is_new = sb.current.same(Gi::JUST_CREATED);
    let is_usable = sb.flags.contains(Flags::CONSISTENT);
    say(match (is_new, is_usable, sb.bitmap.is_none()) {
        (true, ..) => {
            "On connect it would get everything from a peer with data; with a new peer, one of \
             them has to be made Primary by force."
        }
        (_, false, _) => "On connect it would be the target of a sync.",
        (_, true, true) => {
            "On connect a peer of the same generation needs no sync (after a crash as Primary: \
             what the activity log names); a peer of a newer one makes this node the target."
        }
        (_, true, false) => {
            "On connect a peer of the generation that the bitmap refers to would get the \
             differences from here; a peer that has gone on without this node means split brain."
        }
    });
}

fn describe_attach(o: &Opened<'_>, sb: &Superblock, is_log_bad: bool) -> Result<(), Exit> {
    match sb.check_attach(o.run.placement, o.device_len()) {
        Ok(_) => {
            say("An attach would succeed.");
            return Ok(());
        }
        Err(AttachError::Unclean) if is_log_bad => {
            say(
                "An attach would be refused, and apply-al as well: the changes of the last moment \
                 are unknown. If the peer is good, use create-md and sync from it.",
            );
        }
        Err(AttachError::Unclean) => {
            say("An attach would be refused as it is; apply-al comes first (drbdadm does that).");
        }
        Err(e) => say(format!("An attach would be refused: {e}.")),
    }
    Err(Exit::silent(1))
}
