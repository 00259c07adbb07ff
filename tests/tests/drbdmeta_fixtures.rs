//! All recorded devices: decoded values, and every recorded command repeated with ours.
//!
//! Exit status, stdout and stderr must be those of 9.22 or of the newer original tools, but for
//! the runs that `metadata-differences.toml` lists with a reason; a listed run that does not
//! differ is an error too.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use drbdmeta::al::{Outcome, replay};
use drbdmeta::io::{IoError, IoOp, Memory, MetaIo};
use drbdmeta::layout::Placement;
use drbdmeta::superblock::Superblock;
use drbdmeta::units::{ByteLen, ByteOffset};
use drbdrs_tests::metagen::{Fixture, Recorded, read_all, read_part, run};
use drbdrs_tests::need::{Need, trial};
use drbdrs_tests::{fixtures, program};
use libtest_mimic::{Arguments, Failed};
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
struct Differences {
    difference: Vec<Difference>,
}

#[derive(Deserialize)]
struct Difference {
    fixture: String,
    command: String,
    #[serde(rename = "reason")]
    _reason: String,
}

fn main() {
    let args = Arguments::from_args();
    let tests = vec![
        trial("decoded_values", &[], || checked(decoded)),
        trial("recorded_commands", &[], || checked(commands)),
        trial("images_after_commands", &[], || checked(images)),
        trial("activity_log_text", &[], || checked(al_text)),
        trial("the_reader_in_format_md", &[Need::Program("python3")], || checked(reader)),
    ];
    libtest_mimic::run(&args, tests).exit();
}

fn checked(body: fn() -> Result<()>) -> Result<(), Failed> {
    body().map_err(|e| format!("{e:#}").into())
}

/// A large device of which only pieces are not zero.
struct Sparse {
    len: u64,
    pieces: Vec<(u64, Memory)>,
}

impl Sparse {
    fn new(fixture: &Fixture) -> Result<Self> {
        let pieces = fixture.extract.iter();
        let pieces = pieces.map(|p| Ok((p.offset, Memory { bytes: p.bytes()? })));
        Ok(Self { len: fixture.md_device_size, pieces: pieces.collect::<Result<_>>()? })
    }
}

impl MetaIo for Sparse {
    fn device_len(&self) -> ByteLen {
        ByteLen(self.len)
    }

    fn read_at(&mut self, at: ByteOffset, into: &mut [u8]) -> Result<(), IoError> {
        for (i, byte) in into.iter_mut().enumerate() {
            let here = at.0 + i as u64;
            let piece = self.pieces.iter().find(|(start, memory)| {
                (*start..*start + memory.bytes.len() as u64).contains(&here)
            });
            *byte = piece.map_or(0, |(start, memory)| {
                memory.bytes[usize::try_from(here - start).unwrap_or(0)]
            });
        }
        Ok(())
    }

    fn write_at(&mut self, at: ByteOffset, data: &[u8]) -> Result<(), IoError> {
        Err(IoError { op: IoOp::Write, at, len: data.len(), errno: 30 })
    }

    fn flush(&mut self) -> Result<(), IoError> {
        Ok(())
    }
}

fn placement(text: &str) -> Placement {
    match text {
        "internal" => Placement::Internal,
        "flex-external" => Placement::FlexExternal,
        index => Placement::Indexed(index.parse().unwrap_or(u8::MAX)),
    }
}

fn decoded() -> Result<()> {
    for fixture in read_all()? {
        // Granularities other than 4 KiB count as invalid for us.
        if fixture.id != "x04-bytes-per-bit-8192" {
            decoded_one(&fixture).with_context(|| fixture.id.clone())?;
        }
    }
    Ok(())
}

fn decoded_one(fixture: &Fixture) -> Result<()> {
    let mut io = Sparse::new(fixture)?;
    let placement = placement(&fixture.placement);
    let at = placement.superblock(io.device_len()).context("too small")?;
    let mut block = [0; 4096];
    io.read_at(at, &mut block)?;
    let found = Superblock::from_disk(&block)
        .ok()
        .and_then(|sb| Some((sb, sb.check(placement, io.device_len()).ok()?)));
    let expect = &fixture.expect;
    ensure!(found.is_some() == expect["valid"].as_bool().unwrap_or(true), "validity");
    let Some((mut sb, layout)) = found else { return Ok(()) };
    let want = &expect["superblock"];
    let hex = |n: u64| format!("0x{n:016X}");
    let got = serde_json::json!({
        "la_size_sect": sb.la_size.0,
        "current": hex(sb.current.0),
        "bitmap": hex(sb.bitmap.0),
        "history1": hex(sb.history[0].0),
        "history2": hex(sb.history[1].0),
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
    });
    ensure!(&got == want, "superblock: {got} instead of {want}");
    sb.la_size = sb.la_size.min(layout.usable());
    let log = replay(&mut io, &layout, &sb)?;
    let (status, extents) = match &log.outcome {
        Outcome::Updates(e) if log.is_old_format => ("updates-old", e.as_slice()),
        Outcome::Updates(e) => ("updates", e.as_slice()),
        Outcome::Initialised => ("initialized", &[][..]),
        Outcome::NoData => ("nodata", &[][..]),
        Outcome::Unusable => ("inval", &[][..]),
    };
    ensure!(expect["al_status"] == *status, "status {status}");
    ensure!(expect["al_bad_blocks"] == log.bad, "bad blocks {}", log.bad);
    let extents: Vec<Value> = extents.iter().map(|e| e.0.into()).collect();
    ensure!(expect["active_extents"] == Value::from(extents.clone()), "active extents {extents:?}");
    Ok(())
}

/// A folder with one device in it.
struct Place {
    folder: tempfile::TempDir,
    device: PathBuf,
}

impl Place {
    fn new(fixture: &Fixture) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let device = folder.path().join("device");
        fixture.write_device(&device)?;
        if let Some(note) = fixture.more.get("lkbd").and_then(Value::as_str) {
            let note = note.replace("{DEV}", "/dev/loopX");
            std::fs::write(folder.path().join("drbd-minor-77.lkbd"), note)?;
        }
        Ok(Self { folder, device })
    }

    fn run(&self, drbdmeta: &Path, fixture: &Fixture, command: &str) -> Result<Recorded> {
        let device = self.device.display().to_string();
        let folder = self.folder.path().display().to_string();
        let mut words = command.split(' ');
        let name = words.next().unwrap_or_default();
        let mut args = vec!["--var-lib-drbd", &folder];
        args.extend(words);
        args.extend(["77", "v08", &device, &fixture.placement, name]);
        let mut got = run(drbdmeta, &args)?;
        for text in [&mut got.stdout, &mut got.stderr] {
            *text = text.replace(&device, "{DEV}").replace(&folder, "/var/lib/drbd");
        }
        Ok(got)
    }
}

/// Leaves out what only we say, and what depends on date and machine.
fn loosened(text: &str) -> String {
    let mut lines: Vec<&str> = text.lines().collect();
    if let Some(head) = lines.iter().position(|l| *l == "# DRBD meta data dump") {
        lines.drain(head..head + 3);
    }
    lines.retain(|l| {
        !l.starts_with("Saved bytes ")
            && *l != "{internal assertion message}"
            && !l.starts_with("unknown AL transaction type")
            // The original prints a zero instead of the identity that it has found.
            && !l.starts_with("0000000000000099 != ")
    });
    lines.join("\n")
}

fn is_equal(want: &Recorded, got: &Recorded) -> bool {
    // 1 in 9.4 to 9.31, 255 before and after.
    let rc = want.rc == got.rc || (want.rc == 1 && got.rc == 255);
    rc && loosened(&want.stdout) == loosened(&got.stdout)
        && loosened(&want.stderr) == loosened(&got.stderr)
}

fn commands() -> Result<()> {
    let drbdmeta = program("drbdmeta");
    let listed: Differences =
        toml::from_str(&std::fs::read_to_string(fixtures().join("metadata-differences.toml"))?)?;
    let mut listed: BTreeSet<(String, String)> =
        listed.difference.into_iter().map(|d| (d.fixture, d.command)).collect();
    let (mut total, mut problems) = (0, Vec::new());
    for fixture in read_all()? {
        for command in fixture.reference.keys() {
            total += 1;
            let place = Place::new(&fixture)?;
            let got = place.run(&drbdmeta, &fixture, command)?;
            let wanted = wanted(&fixture, command)?;
            let is_listed = listed.remove(&(fixture.id.clone(), command.clone()));
            if wanted.iter().any(|w| is_equal(w, &got)) == is_listed {
                let id = &fixture.id;
                problems.push(format!("{id} {command}\n got {got:?}\nwant {wanted:?}"));
            }
        }
    }
    println!("{total} recorded commands, {} problems", problems.len());
    ensure!(listed.is_empty(), "listed, but never run: {listed:?}");
    ensure!(problems.is_empty(), "{}", problems.join("\n"));
    ensure!(total > 500, "only {total} recorded commands");
    Ok(())
}

/// What the original tools say; of dumps, only the ones with right flags count.
fn wanted(fixture: &Fixture, command: &str) -> Result<Vec<Recorded>> {
    let maps = [&fixture.reference_new_differs, &fixture.reference];
    let recorded = maps.iter().filter_map(|map| map.get(command)).cloned();
    let mut recorded =
        recorded.map(|v| Ok(serde_json::from_value::<Recorded>(v)?)).collect::<Result<Vec<_>>>()?;
    if command.starts_with("dump-md") {
        let dump = fixture.text("dump_fixed")?;
        for run in &mut recorded {
            if let (0, Some(dump)) = (run.rc, &dump) {
                run.stdout.clone_from(dump);
            }
        }
    }
    Ok(recorded)
}

fn images() -> Result<()> {
    let drbdmeta = program("drbdmeta");
    let mut compared = 0;
    for fixture in read_all()? {
        let is_moved = fixture.id.starts_with('r');
        let after = if is_moved { None } else { fixture.pieces("after_apply_al")? };
        let after = after.unwrap_or_else(|| fixture.extract.clone());
        compared += image(&fixture, &drbdmeta, "apply-al", &after)?;
        // What 9.22 makes of v09, and of a device too small for its bitmap, is not for us.
        let of_its_own = ["w02-v09-flex-ext", "r10-grown-512-new-block"];
        if of_its_own.contains(&fixture.id.as_str()) {
            continue;
        }
        if let Some(after) = fixture.pieces("after_create_md_force")? {
            compared += image(&fixture, &drbdmeta, "create-md --force", &after)?;
        }
        if let Some(after) = fixture.pieces("after_check_resize_new")? {
            // Newer tools zero all of the old place, we and 9.22 its superblock.
            let same = image(&fixture, &drbdmeta, "check-resize", &after);
            let older = fixture.pieces("after_check_resize")?.unwrap_or_default();
            compared += same.or_else(|_| image(&fixture, &drbdmeta, "check-resize", &older))?;
        }
    }
    println!("{compared} images compared");
    ensure!(compared > 80, "only {compared} images");
    Ok(())
}

fn image(
    fixture: &Fixture,
    drbdmeta: &Path,
    command: &str,
    after: &[drbdrs_tests::metagen::Extract],
) -> Result<usize> {
    // There the bytes per bit are refused instead of used.
    if fixture.id == "x04-bytes-per-bit-8192" {
        return Ok(0);
    }
    let place = Place::new(fixture)?;
    place.run(drbdmeta, fixture, command)?;
    for piece in after {
        let got = read_part(&place.device, piece.offset, piece.length)?;
        let want = piece.bytes()?;
        let differs = got.iter().zip(&want).position(|(a, b)| a != b);
        if let Some(at) = differs {
            let at = piece.offset + at as u64;
            anyhow::bail!("{} {command}: differs from byte {at}", fixture.id);
        }
    }
    Ok(1)
}

fn al_text() -> Result<()> {
    let drbdmeta = program("drbdmeta");
    let mut compared = 0;
    for fixture in read_all()? {
        let Some(want) = fixture.text("al_print")? else { continue };
        let place = Place::new(&fixture)?;
        let got = place.run(&drbdmeta, &fixture, "dump-md -fvvvvvvvvvvv")?;
        let start = got.stdout.find("# al {").context("no log in the dump")?;
        let got = &got.stdout[start..];
        let differs = want.lines().zip(got.lines()).find(|(w, g)| w != g);
        ensure!(differs.is_none(), "{}: {differs:?}", fixture.id);
        compared += 1;
    }
    ensure!(compared == 4, "{compared} logs");
    Ok(())
}

/// The documentation must be enough to write a reader: it contains one, in another language and
/// without any code of ours.
fn reader() -> Result<()> {
    let text = include_str!("../../drbdmeta/FORMAT.md");
    let code = text.split("```python\n").nth(1).and_then(|t| t.split("```").next());
    let folder = tempfile::tempdir()?;
    let script = folder.path().join("reader.py");
    std::fs::write(&script, code.context("no reader")?)?;
    let script = script.display().to_string();
    let drbdmeta = program("drbdmeta");
    let mut read = 0;
    for fixture in read_all()? {
        let place = Place::new(&fixture)?;
        let device = place.device.display().to_string();
        let got = run(Path::new("python3"), &[&script, &device, &fixture.placement])?;
        ensure!(got.rc == 0, "{}: {got:?}", fixture.id);
        let got: Value = serde_json::from_str(&got.stdout)?;
        let expect = &fixture.expect;
        let is_valid = expect["valid"] != false && fixture.id != "x04-bytes-per-bit-8192";
        ensure!(got["valid"] == is_valid, "{}: {got}", fixture.id);
        if !is_valid {
            continue;
        }
        for key in ["al_bad_blocks", "active_extents"] {
            ensure!(got[key] == expect[key], "{} {key}: {got} {expect}", fixture.id);
        }
        for (key, want) in expect["superblock"].as_object().context("no superblock")? {
            let number = got["superblock"][key].as_i64().map(|n| n.to_string());
            let number = number.or_else(|| Some(got["superblock"][key].as_u64()?.to_string()));
            let want = match want.as_str().and_then(|w| w.strip_prefix("0x")) {
                Some(hex) => u64::from_str_radix(hex, 16)?.to_string(),
                None => want.to_string(),
            };
            ensure!(number.as_ref() == Some(&want), "{} {key}: {got}", fixture.id);
        }
        let dump = run_ours(&drbdmeta, &place, &fixture)?;
        ensure!(got["bits_set"] == dump["out_of_sync_bits"], "{}: bits {got} {dump}", fixture.id);
        read += 1;
    }
    println!("{read} devices read");
    ensure!(read > 50, "only {read}");
    Ok(())
}

fn run_ours(drbdmeta: &Path, place: &Place, fixture: &Fixture) -> Result<Value> {
    let got = place.run(drbdmeta, fixture, "dump-md --force --json")?;
    let start = got.stdout.find('{').context("no JSON")?;
    Ok(serde_json::from_str(&got.stdout[start..])?)
}
