//! Commands about generation identifiers and flags.
//!
//! Spec: metadata.md §8.4.

use drbd_types::{LEGEND_ABOVE, LEGEND_BELOW};
use drbdmeta::superblock::{Flags, Superblock};
use drbdmeta::units::{Gi, HumanKib};

use super::Exit;
use super::open::Opened;
use super::talk::{is_confirmed, out};

/// Flags in the order in which they are printed.
const PRINTED: [Flags; 7] = [
    Flags::CONSISTENT,
    Flags::WAS_UP_TO_DATE,
    Flags::PRIMARY,
    Flags::CONNECTED,
    Flags::FULL_SYNC,
    Flags::PEER_OUTDATED,
    Flags::CRASHED_PRIMARY,
];

const NOT_FOUND: &str = "No valid meta data found";

fn line(sb: &Superblock) -> String {
    let [older, oldest] = sb.history;
    let mut line = format!("{}:{}:{older}:{oldest}", sb.current, sb.bitmap);
    for flag in PRINTED {
        line.push_str(if sb.flags.contains(flag) { ":1" } else { ":0" });
    }
    line
}

pub(super) fn get(o: &Opened<'_>) -> Result<(), Exit> {
    let (sb, _) = o.here("")?;
    out(&format!("{}\n", line(&sb)));
    Ok(())
}

pub(super) fn show(o: &Opened<'_>) -> Result<(), Exit> {
    let (sb, _) = o.here("")?;
    out(&format!("{LEGEND_ABOVE}{}{LEGEND_BELOW}", line(&sb)));
    let has = |flag| sb.flags.contains(flag);
    let pick = |flag, yes, no| if has(flag) { yes } else { no };
    let data = match (has(Flags::CONSISTENT), has(Flags::WAS_UP_TO_DATE)) {
        (true, true) => "UpToDate",
        (true, false) => "Outdated",
        (false, _) => "Inconsistent",
    };
    out(&format!(
        "flags:{} {}, {}, {data}{}{}\n",
        pick(Flags::CRASHED_PRIMARY, " crashed", ""),
        pick(Flags::PRIMARY, "Primary", "Secondary"),
        pick(Flags::CONNECTED, "Connected", "StandAlone"),
        pick(Flags::FULL_SYNC, ", need full sync", ""),
        pick(Flags::PEER_OUTDATED, ", peer Outdated", ""),
    ));
    out(&format!("meta-data: {}\n", pick(Flags::AL_CLEAN, "clean", "need apply-al")));
    let size = sb.la_size.0;
    if size == 0 {
        out("zero size device -- never seen peer yet?\n");
    } else {
        out(&format!(
            "last agreed size: {} ({size} sectors)\nlast agreed max bio size: {} Byte\n",
            HumanKib(size / 2),
            sb.la_peer_max_bio_size
        ));
    }
    Ok(())
}

pub(super) fn dstate(o: &Opened<'_>) -> Result<(), Exit> {
    let (sb, _) = o.here(NOT_FOUND)?;
    out(&format!("{}\n", sb.disk_state()));
    Ok(())
}

pub(super) fn outdate(o: &mut Opened<'_>) -> Result<(), Exit> {
    let (mut sb, layout) = o.here("")?;
    if !sb.flags.contains(Flags::CONSISTENT) {
        return Err(Exit::new(5, "Device is inconsistent."));
    }
    sb.flags.remove(Flags::WAS_UP_TO_DATE);
    o.write(&sb, &layout, "update failed")
}

pub(super) fn invalidate(o: &mut Opened<'_>) -> Result<(), Exit> {
    let (mut sb, layout) = o.here("")?;
    super::backup::save(o, &layout, super::backup::What::Superblock)?;
    sb.flags.remove(Flags::CONSISTENT | Flags::WAS_UP_TO_DATE);
    sb.flags.insert(Flags::FULL_SYNC);
    o.write(&sb, &layout, "update failed")
}

pub(super) fn read_dev_uuid(o: &Opened<'_>) -> Result<(), Exit> {
    let (sb, _) = o.here("")?;
    out(&format!("{:016X}\n", sb.device_uuid));
    Ok(())
}

fn argument(o: &Opened<'_>) -> Result<String, Exit> {
    let missing = || Exit::new(10, "Required Argument missing");
    o.run.arguments.first().cloned().ok_or_else(missing)
}

pub(super) fn write_dev_uuid(o: &mut Opened<'_>) -> Result<(), Exit> {
    let (mut sb, layout) = o.here("")?;
    let text = argument(o)?;
    let hex = text.trim_start().trim_start_matches("0x");
    let end = hex.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(hex.len());
    let digits = hex.get(..end).unwrap_or_default();
    // Not a number counts as 0; too large a one as the largest.
    sb.device_uuid = match digits {
        "" => 0,
        digits => u64::from_str_radix(digits, 16).unwrap_or(u64::MAX),
    };
    o.write(&sb, &layout, "update failed")
}

pub(super) fn set(o: &mut Opened<'_>) -> Result<(), Exit> {
    let (mut sb, layout) = o.here("")?;
    let list = argument(o)?;
    let before = line(&sb);
    for (i, field) in list.split(':').enumerate() {
        if !field.is_empty() {
            set_field(&mut sb, i, field)?;
        }
    }
    out(&format!("previously {before}\nset GI to  {}\n", line(&sb)));
    if !is_confirmed("Write new GI to disk?", o.run.options.force) {
        out("Operation canceled.\n");
        return Ok(());
    }
    super::backup::save(o, &layout, super::backup::What::Superblock)?;
    o.write(&sb, &layout, "update failed")
}

fn set_field(sb: &mut Superblock, index: usize, field: &str) -> Result<(), Exit> {
    let place = match index {
        0 => &mut sb.current,
        1 => &mut sb.bitmap,
        2 => &mut sb.history[0],
        3 => &mut sb.history[1],
        _ => return set_flag(sb, index - 4, field),
    };
    let digits = field.trim_start();
    let digits = digits.strip_prefix("0x").unwrap_or(digits);
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(Exit::new(10, format!("'{field}' is not a number.")));
    }
    let range = |_| Exit::new(10, format!("'{field}': Numerical result out of range"));
    *place = Gi(u64::from_str_radix(digits, 16).map_err(range)?);
    Ok(())
}

fn set_flag(sb: &mut Superblock, index: usize, field: &str) -> Result<(), Exit> {
    let Some(&flag) = PRINTED.get(index) else { return Ok(()) };
    let refuse = |text: String| Exit::new(10, text);
    let digits = field.trim_start();
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(refuse(format!("'{field}' is not a number.")));
    }
    match digits.parse::<u64>().unwrap_or(u64::MAX) {
        0 => sb.flags.remove(flag),
        1 => sb.flags.insert(flag),
        n if n > u64::from(u32::MAX) => {
            return Err(refuse(format!("'{field}' is out of range (max 0xFFffFFff).")));
        }
        _ => return Err(refuse(format!("'{field}' is not 0 or 1."))),
    }
    Ok(())
}
