//! dump-md, as text and as JSON.
//!
//! Spec: metadata.md §8.6.

use std::fmt::Write as _;
use std::io::Write as _;

use drbdmeta::bitmap::Region;
use drbdmeta::dump::{DumpError, Moved, write_al, write_bitmap, write_superblock};
use drbdmeta::layout::Layout;
use drbdmeta::superblock::Superblock;

use super::Exit;
use super::open::{Found, Opened};
use super::talk::{err, out};

/// Collects text and passes it on in large pieces.
struct Output {
    text: String,
    is_broken: bool,
}

const PIECE: usize = 1 << 16;

impl Output {
    fn new() -> Self {
        Self { text: String::with_capacity(PIECE + 256), is_broken: false }
    }

    fn pass_on(&mut self) {
        let written = std::io::stdout().lock().write_all(self.text.as_bytes());
        self.is_broken |= written.is_err();
        self.text.clear();
    }
}

impl std::fmt::Write for Output {
    fn write_str(&mut self, s: &str) -> std::fmt::Result {
        self.text.push_str(s);
        if self.text.len() >= PIECE {
            self.pass_on();
        }
        if self.is_broken { Err(std::fmt::Error) } else { Ok(()) }
    }
}

pub(super) fn dump(o: &mut Opened<'_>) -> Result<(), Exit> {
    let (sb, layout, note) = match o.found.clone() {
        Found::Nowhere => return Err(Exit::failure("No valid meta data found")),
        Found::Here(sb, layout) => (sb, layout, None),
        Found::LastKnown(sb, layout, note) => (sb, layout, Some(note)),
    };
    if !sb.is_clean() {
        err("Found meta data is \"unclean\", please apply-al first\n");
        if !o.run.options.force {
            return Err(Exit::silent(super::FAILURE));
        }
    }
    if o.run.options.json {
        return json(o, &sb, &layout);
    }
    out(&header(&o.run.permuted));
    let moved = note.as_ref().map(|note| Moved {
        device: &o.run.path,
        device_len: drbdmeta::io::MetaIo::device_len(&o.io).0,
        md_offset: o.superblock_at().0,
        old_device: note.device.as_deref().unwrap_or_default(),
        old_len: note.device_len,
    });
    let mut output = Output::new();
    let region = Region::new(&layout, sb.la_size);
    write_superblock(&mut output, &sb, &layout, moved.as_ref())
        .map_err(DumpError::from)
        .and_then(|()| write_bitmap(&mut output, &mut o.io, &region))
        .and_then(|()| {
            if o.run.options.verbose >= 10 {
                write_al(&mut output, &mut o.io, &layout, &sb)?;
            }
            Ok(())
        })
        .map_err(|e| match e {
            DumpError::Io(e) => Exit::from(e),
            DumpError::Output => Exit::failure("the output cannot be written"),
        })?;
    output.pass_on();
    if output.is_broken {
        return Err(Exit::failure("the output cannot be written"));
    }
    Ok(())
}

fn header(command: &str) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let seconds = now.map_or(0, |d| d.as_secs());
    let (y, m, d, second) = civil(i64::try_from(seconds).unwrap_or(0));
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let names = rustix::system::uname();
    let host = names.nodename().to_string_lossy();
    format!(
        "# DRBD meta data dump\n\
         # {y:04}-{m:02}-{d:02} {hour:02}:{minute:02}:{second:02} +0000 [{seconds}]\n\
         # {host}> {command}\n#\n\n"
    )
}

/// Year, month, day (UTC) and seconds of the day.
pub(super) fn civil(epoch_seconds: i64) -> (i64, i64, i64, i64) {
    let (days, second) = (epoch_seconds.div_euclid(86_400), epoch_seconds.rem_euclid(86_400));
    // Years that begin in March put the leap day last; 146097 days are 400 years.
    let since = days + 719_468;
    let (era, day) = (since.div_euclid(146_097), since.rem_euclid(146_097));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (era * 400 + year + i64::from(month <= 2), month, day, second)
}

/// Members as in newer original tools' JSON of the superblock, and the bitmap as ranges.
fn json(o: &mut Opened<'_>, sb: &Superblock, layout: &Layout) -> Result<(), Exit> {
    let hex = |n: u64| format!("0x{n:016X}");
    let head = serde_json::json!({
        "effective_size": sb.la_size.0,
        "current_uuid": hex(sb.current.0),
        "device_uuid": hex(sb.device_uuid),
        "flags": format!("0x{:08X}", sb.flags.bits()),
        "magic": format!("0x{:08X}", sb.magic.to_disk()),
        "md_size_sect": sb.md_size_sect,
        "al_offset": sb.al_offset,
        "al_nr_extents": sb.al_nr_extents,
        "bm_offset": sb.bm_offset,
        "bm_bytes_per_bit": sb.bm_bytes_per_bit,
        "la_peer_max_bio_size": sb.la_peer_max_bio_size,
        "al_stripes": sb.al.stripes,
        "al_stripe_size_4k": sb.al.stripe_blocks,
        "peers": [{ "bitmap_uuid": hex(sb.bitmap.0) }],
        "history_uuids": sb.history.map(|h| hex(h.0)),
        "clean": sb.is_clean(),
        "disk_state": sb.disk_state(),
        "superblock_offset": layout.superblock.0,
        "al_byte_offset": layout.al.0,
        "bitmap_byte_offset": layout.bitmap.0,
    });
    let region = Region::new(layout, sb.la_size);
    let head = serde_json::to_string_pretty(&head).unwrap_or_default();
    let open = head.trim_end().trim_end_matches('}').trim_end();
    let mut output = Output::new();
    let mut state = (String::new(), 0u64);
    // A broken pipe is noticed at the end.
    let _ = write!(output, "{open},\n  \"out_of_sync_bit_ranges\": [");
    region.each_dirty_range(&mut o.io, |range| {
        let count = range.end.0 - range.start.0;
        let _ = write!(output, "{}\n    [{}, {count}]", state.0, range.start.0);
        state.0 = ",".into();
        state.1 += count;
    })?;
    let _ = write!(output, "\n  ],\n  \"out_of_sync_bits\": {}\n}}\n", state.1);
    output.pass_on();
    if output.is_broken {
        return Err(Exit::failure("the output cannot be written"));
    }
    Ok(())
}
