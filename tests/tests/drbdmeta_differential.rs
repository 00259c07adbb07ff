//! Random devices and random commands, by the original drbdmeta and by ours.
//!
//! Both get the same device (two loop devices or two plain files with the same content) and the
//! same command. Status, texts and content must agree. Then one of the two results is taken, at
//! random, for both to go on with, so that each tool works on what the other one wrote; both must
//! also say the same about it (dumps, identifiers).
//!
//! `DRBDRS_SEED=N` repeats one sequence, `DRBDRS_SEQUENCES=N` changes how many run.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use drbdmeta::al::AlRing;
use drbdmeta::layout::{Layout, Placement};
use drbdmeta::superblock::{Flags, Magic, Superblock};
use drbdmeta::units::{AlExtentNr, ByteLen, SectorCount};
use drbdrs_tests::metagen::{Loop, Random, Recorded, blocks, foreign_data, run};
use drbdrs_tests::need::{Need, trial};
use drbdrs_tests::program;
use libtest_mimic::{Arguments, Failed};

const ORIGINAL: &str = "/usr/sbin/drbdmeta";
const LOOP_CONTROL: &str = "/dev/loop-control";
const SEQUENCES: u64 = 500;
const STEPS: u64 = 5;
/// Set in the copy of this program that has its own mounts.
const INSIDE: &str = "DRBDRS_OWN_MOUNTS";
/// What the original uses; it is private to this program.
const VAR_LIB: &str = "/var/lib/drbd";
const NOTE: &str = "drbd-minor--1.lkbd";

fn main() {
    let args = Arguments::from_args();
    let needs = [Need::File(ORIGINAL), Need::File(LOOP_CONTROL)];
    let no_skip = std::env::var("DRBDRS_NO_SKIP").is_ok_and(|v| v == "1");
    let is_root = rustix::process::geteuid().is_root();
    let is_missing = !is_root || needs.iter().any(|n| !n.is_met());
    let tests = vec![
        trial("sequences_by_either_tool", &needs, || {
            let result = if std::env::var_os(INSIDE).is_some() { sequences() } else { inside() };
            result.map_err(|e| Failed::from(format!("{e:#}")))
        })
        .with_ignored_flag(is_missing && !no_skip),
    ];
    libtest_mimic::run(&args, tests).exit();
}

/// Starts this program again where /var/lib/drbd is its own.
fn inside() -> Result<()> {
    let script = "mkdir -p /var/lib/drbd && mount -t tmpfs none /var/lib/drbd && exec \"$0\"";
    let status = Command::new("unshare")
        .args(["-m", "sh", "-c", script])
        .arg(std::env::current_exe()?)
        .env(INSIDE, "1")
        .status()?;
    ensure!(status.success(), "see above");
    Ok(())
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn sequences() -> Result<()> {
    // A copy: the one in target/ may be built anew meanwhile.
    let folder = tempfile::tempdir()?;
    let ours = folder.path().join("drbdmeta");
    std::fs::copy(program("drbdmeta"), &ours)?;
    let seeds = match number("DRBDRS_SEED") {
        Some(seed) => seed..=seed,
        None => 1..=number("DRBDRS_SEQUENCES").unwrap_or(SEQUENCES),
    };
    let mut counts = BTreeMap::new();
    for seed in seeds.clone() {
        sequence(&ours, seed, &mut counts).with_context(|| format!("DRBDRS_SEED={seed}"))?;
    }
    println!("seeds {seeds:?}: {counts:?}");
    Ok(())
}

/// One tool with its device.
struct Side {
    program: PathBuf,
    var_lib: Option<String>,
    image: PathBuf,
    device: String,
    _loop: Option<Loop>,
}

impl Side {
    fn run(&self, index: &str, command: &[&str]) -> Result<Recorded> {
        let mut args = Vec::new();
        if let Some(folder) = &self.var_lib {
            args.extend(["--var-lib-drbd", folder, "--no-backup"]);
        }
        args.extend(["-", "v08", &self.device, index]);
        args.extend(command);
        let mut got = run(&self.program, &args)?;
        for text in [&mut got.stdout, &mut got.stderr] {
            *text = text.replace(&self.device, "{DEV}");
        }
        Ok(got)
    }

    fn note_path(&self) -> PathBuf {
        Path::new(self.var_lib.as_deref().unwrap_or(VAR_LIB)).join(NOTE)
    }

    fn note(&self) -> Option<String> {
        let text = std::fs::read_to_string(self.note_path()).ok()?;
        Some(text.replace(&self.device, "{DEV}"))
    }

    fn set_note(&self, note: Option<&str>) -> Result<()> {
        let _ = std::fs::remove_file(self.note_path());
        if let Some(note) = note {
            std::fs::write(self.note_path(), note.replace("{DEV}", &self.device))?;
        }
        Ok(())
    }
}

struct Bench {
    theirs: Side,
    ours: Side,
    folder: tempfile::TempDir,
    is_file: bool,
    index: &'static str,
    placement: Placement,
    size: u64,
    random: Random,
    history: Vec<String>,
}

fn sequence(ours: &Path, seed: u64, counts: &mut BTreeMap<String, u32>) -> Result<()> {
    let mut random = Random::new(seed);
    let folder = tempfile::tempdir()?;
    let (index, placement, size) = match random.below(8) {
        0 | 1 => ("flex-external", Placement::FlexExternal, 136 + random.below(20_000)),
        2 => ("0", Placement::Indexed(0), 262_144 + random.below(100)),
        3 => ("1", Placement::Indexed(1), 524_288 + random.below(100)),
        _ => ("internal", Placement::Internal, 136 + random.below(40_000)),
    };
    let size = size * 512;
    let is_file = random.below(3) == 0;
    let side = |program: &Path, name: &str, var_lib: Option<String>| -> Result<Side> {
        let image = folder.path().join(name);
        File::create(&image)?.set_len(size)?;
        let device = if is_file { None } else { Some(Loop::new(&image)?) };
        let name = device.as_ref().map_or_else(|| image.display().to_string(), |l| l.name.clone());
        Ok(Side { program: program.to_path_buf(), var_lib, image, device: name, _loop: device })
    };
    let var_lib = folder.path().join("var").display().to_string();
    std::fs::create_dir(&var_lib)?;
    let theirs = side(Path::new(ORIGINAL), "theirs", None)?;
    let ours = side(ours, "ours", Some(var_lib))?;
    theirs.set_note(None)?;
    let history = Vec::new();
    let mut bench =
        Bench { theirs, ours, folder, is_file, index, placement, size, random, history };
    if bench.random.below(4) == 0 {
        let (what, pieces) = foreign_data(&mut bench.random);
        bench.history.push(what.into());
        bench.write(&pieces)?;
    }
    let result = bench.create().and_then(|()| (0..STEPS).try_for_each(|_| bench.step()));
    for word in bench.history.iter().filter_map(|h| h.split(' ').next()) {
        *counts.entry(word.to_string()).or_default() += 1;
    }
    *counts.entry(format!("on {}", if is_file { "files" } else { "loop devices" })).or_default() +=
        1;
    result.with_context(|| {
        format!("{} bytes, file {is_file}, {index}: {}", bench.size, bench.history.join(" · "))
    })
}

impl Bench {
    /// Both tools do it; everything must agree. Then both go on with one result.
    fn both(&mut self, command: &[&str]) -> Result<()> {
        // Plain files need it, and half of the others get it: refusals are compared as well.
        let is_forced = self.is_file || self.random.below(2) == 0;
        let mut command = command.to_vec();
        if is_forced {
            command.push("--force");
        }
        self.history.push(command.join(" "));
        let before = self.read()?;
        let mine = self.ours.run(self.index, &command)?;
        let theirs = self.theirs.run(self.index, &command)?;
        let name = command.first().copied().unwrap_or_default();
        let (mut a, mut b) = (loosened(&mine), loosened(&theirs));
        if name == "restore-md" {
            // What is in the way is judged by the log of the dump, not by the usual one.
            let place = ["al_offset ", "bm_offset ", "left usable"];
            for text in [&mut a, &mut b] {
                let lines = text.lines().filter(|l| !place.iter().any(|p| l.contains(p)));
                *text = lines.collect::<Vec<_>>().join("\n");
            }
        }
        // A forced create-md with another log gives up in the original; we do it.
        let is_stripes = theirs.rc == 30 && is_forced;
        ensure!(a == b || is_stripes, "{name}:\n{a}\noriginal:\n{b}");
        if !is_stripes {
            self.same_content(name, before.map(|(_, l)| l))?;
            ensure!(
                self.ours.note() == self.theirs.note(),
                "{name}: note {:?}, original {:?}",
                self.ours.note(),
                self.theirs.note()
            );
        }
        let takes_ours = is_stripes || self.random.below(2) == 0;
        let (from, to) =
            if takes_ours { (&self.ours, &self.theirs) } else { (&self.theirs, &self.ours) };
        copy(&from.image, &to.image)?;
        to.set_note(from.note().as_deref())?;
        self.compare(is_forced)
    }

    fn create(&mut self) -> Result<()> {
        let stripes = (1 + self.random.below(4)).to_string();
        let kib = (32 + 4 * self.random.below(20)).to_string();
        let bio = (self.random.below(257) * 4096).to_string();
        let mut command = vec!["create-md", "--peer-max-bio-size", &bio];
        // A small device may be too small for a large log, a slot has one shape.
        let is_slot = matches!(self.placement, Placement::Indexed(_));
        if !is_slot && self.size > 4 << 20 && self.random.below(2) == 0 {
            command.extend(["--al-stripes", &stripes, "--al-stripe-size-kB", &kib]);
        }
        self.both(&command)
    }

    fn step(&mut self) -> Result<()> {
        match self.random.below(14) {
            0 => self.both(&["wipe-md"]),
            1 => self.create(),
            2 => self.both(&["outdate"]),
            3 => self.both(&["invalidate"]),
            4 => {
                let uuid = format!("{:016X}", self.random.next());
                self.both(&["write-dev-uuid", &uuid])
            }
            5 | 6 => self.set_gi(),
            7 | 8 => self.restore(),
            9 => self.grow(),
            10 => self.damage(),
            _ => {
                if self.random.below(4) != 0 {
                    self.crash()?;
                }
                self.both(&["apply-al"])
            }
        }
    }

    fn set_gi(&mut self) -> Result<()> {
        let mut fields = Vec::new();
        for field in 0..11 {
            fields.push(match (self.random.below(4), field) {
                (0, _) => String::new(),
                (_, 0..4) => format!("{:X}", self.random.next()),
                _ => self.random.below(2).to_string(),
            });
        }
        fields.truncate(usize::try_from(1 + self.random.below(11))?);
        let list = fields.join(":");
        self.both(&["set-gi", &list])
    }

    /// Random content through the text form.
    fn restore(&mut self) -> Result<()> {
        let Some((sb, layout)) = self.read()? else { return self.create() };
        let sectors = self.random.below(layout.usable().0.min(2_000_000));
        let words = drbdmeta::layout::bitmap_bytes(SectorCount(sectors)).0 / 8;
        let mut text = format!(
            "version \"v08\";\nuuid {{\n 0x{:016X}; 0x{:016X}; 0x{:016X}; 0x{:016X};\n \
             flags 0x00000080;\n}}\nla-size-sect {sectors};\nbm-byte-per-bit 4096;\n\
             device-uuid 0x{:016X};\nla-peer-max-bio-size 4096;\nal-stripes {};\n\
             al-stripe-size-4k {};\nbm {{\n",
            self.random.next(),
            self.random.next(),
            self.random.next(),
            self.random.next(),
            self.random.next(),
            sb.al.stripes,
            sb.al.stripe_blocks
        );
        let mut left = words;
        while left > 0 {
            let value = match self.random.below(4) {
                0 => self.random.next(),
                1 => u64::MAX,
                2 => (self.random.next() >> 32) * 0x1_0000_0001,
                _ => 0,
            };
            let times = (1 + self.random.below(60)).min(left);
            text.push_str(&format!("{times} times 0x{value:016X};\n"));
            left -= times;
        }
        text.push_str("}\n");
        let path = self.folder.path().join("dump");
        std::fs::write(&path, text)?;
        self.both(&["restore-md", &path.display().to_string()])
    }

    /// The device gets longer, by whole blocks or only by sectors; then check-resize.
    fn grow(&mut self) -> Result<()> {
        let sectors = match self.random.below(3) {
            0 => 1 + self.random.below(7),
            1 => 8 * (1 + self.random.below(40)),
            _ => 1 + self.random.below(6000),
        };
        self.history.push(format!("grow {sectors}"));
        self.size += sectors * 512;
        for side in [&self.ours, &self.theirs] {
            File::options().write(true).open(&side.image)?.set_len(self.size)?;
            if !self.is_file {
                let done = Command::new("losetup").args(["-c", &side.device]).status()?;
                ensure!(done.success(), "losetup -c");
            }
        }
        // Without the note 9.22 fails silently, newer ones and ours write it.
        if self.placement.is_internal() && self.ours.note().is_some() {
            self.compare(true)?;
            return self.both(&["check-resize"]);
        }
        Ok(())
    }

    /// Some byte of the superblock changes. (Nonsense in some fields makes the original abort or
    /// compute with it, stripes whose product overflows it believes.)
    fn damage(&mut self) -> Result<()> {
        let at = match self.random.below(96) {
            64..68 | 80..84 | 88 | 92 => 60,
            at => at,
        };
        let place = self.placement.superblock(ByteLen(self.size)).context("too small")?.0 + at;
        let mut byte = [0];
        File::open(&self.ours.image)?.read_exact_at(&mut byte, place)?;
        byte[0] ^= 1 << self.random.below(8);
        self.history.push(format!("damage {at}"));
        self.write(&[(place, byte.to_vec())])?;
        self.compare(true)
    }

    /// A node that stopped somewhere.
    fn crash(&mut self) -> Result<()> {
        let Some((mut sb, layout)) = self.read()? else { return Ok(()) };
        sb.magic = Magic::Unclean;
        sb.flags.remove(Flags::AL_CLEAN);
        sb.flags.set(Flags::PRIMARY, self.random.below(3) != 0);
        let mut writes = vec![(layout.superblock.0, sb.to_disk().to_vec())];
        let mut ring = AlRing::new(layout);
        let slot_count = 7 + self.random.below(u64::from(ring.slots_max()).min(2000) - 7);
        let mut slots = vec![None; usize::try_from(slot_count)?];
        let extents = layout.usable().0 / 8192 + 2;
        for _ in 0..self.random.below(40) {
            let slot = u16::try_from(self.random.below(slot_count))?;
            let extent = Some(AlExtentNr(u32::try_from(self.random.below(extents.min(60)))?));
            let (at, mut block) = ring.next(&[(slot, extent)], &slots)?;
            slots[usize::from(slot)] = extent;
            if self.random.below(20) == 0 {
                block[usize::try_from(self.random.below(4096))?] ^= 1;
            }
            writes.push((at.0, block.to_vec()));
            ring.written();
        }
        self.history.push("crash".into());
        self.write(&writes)
    }

    /// Both devices get the same bytes.
    fn write(&self, pieces: &[(u64, Vec<u8>)]) -> Result<()> {
        for side in [&self.ours, &self.theirs] {
            let file = File::options().write(true).open(&side.image)?;
            for (at, bytes) in pieces.iter().filter(|(at, b)| at + b.len() as u64 <= self.size) {
                file.write_all_at(bytes, *at)?;
            }
        }
        Ok(())
    }

    fn read(&self) -> Result<Option<(Superblock, Layout)>> {
        let mut block = [0; 4096];
        let len = ByteLen(self.size);
        let at = self.placement.superblock(len).context("too small")?;
        File::open(&self.ours.image)?.read_exact_at(&mut block, at.0)?;
        let found = Superblock::from_disk(&block).ok();
        Ok(found.and_then(|sb| Some((sb, sb.check(self.placement, len).ok()?))))
    }

    /// Are both devices equal, but for what we do better on purpose?
    fn same_content(&self, name: &str, before: Option<Layout>) -> Result<()> {
        let after = self.read()?.map(|(_, layout)| layout);
        let mut left_out = Vec::new();
        if let Some(layout) = after.or(before) {
            let log = (layout.al.0, layout.al.0 + layout.al_geometry.len().0);
            let map = (layout.bitmap.0, layout.bitmap.0 + layout.bitmap_len.0);
            match name {
                // The original leaves log and unnamed bits of the bitmap as they were.
                "restore-md" => left_out.extend([log, map]),
                // It computes the bitmap of external meta-data from the wrong device.
                "create-md" if !self.placement.is_internal() => left_out.push(map),
                _ => {}
            }
        }
        let (mine, theirs) = (blocks(&self.ours.image)?, blocks(&self.theirs.image)?);
        let differs = mine.keys().chain(theirs.keys()).find(|number| {
            let at = *number * 4096;
            mine.get(number) != theirs.get(number)
                && !left_out.iter().any(|(from, to)| (*from..*to).contains(&at))
        });
        ensure!(differs.is_none(), "{name}: block {differs:?} differs, {after:?}");
        Ok(())
    }

    /// Both tools say the same about the same device.
    fn compare(&self, is_forced: bool) -> Result<()> {
        for command in ["dump-md", "get-gi", "show-gi", "dstate"] {
            let mut words = vec![command];
            if is_forced || self.is_file {
                words.push("--force");
            }
            let mine = self.ours.run(self.index, &words)?;
            let theirs = self.theirs.run(self.index, &words)?;
            let (a, b) = (loosened(&mine), loosened(&theirs));
            ensure!(a == b, "{command}:\n{a}\noriginal:\n{b}");
        }
        Ok(())
    }
}

/// Makes `to` equal to `from`. (Both tools use direct I/O: nothing is cached above the files.)
fn copy(from: &Path, to: &Path) -> Result<()> {
    let (from, old) = (blocks(from)?, blocks(to)?);
    let file = File::options().write(true).open(to)?;
    for (number, block) in &old {
        if !from.contains_key(number) {
            file.write_all_at(&vec![0; block.len()], number * 4096)?;
        }
    }
    for (number, block) in &from {
        if old.get(number) != Some(block) {
            file.write_all_at(block, number * 4096)?;
        }
    }
    Ok(())
}

/// Without head, without the flags of dumps, which the original always prints as 0, and without
/// lines about the machine and how it zeroes. (The recorded commands compare these.)
fn loosened(r: &Recorded) -> String {
    let head = |l: &&str| !(l.starts_with("# 2") || l.contains("> ") || l.contains("flags 0x"));
    let lines: Vec<&str> = r.stdout.lines().filter(head).collect();
    let told = |l: &&str| {
        !["BLKSSZGET", "ASSERT", "ioctl(", "initializing bitmap", "pvs stderr"]
            .iter()
            .any(|w| l.contains(w))
    };
    let mut errors: Vec<&str> = r.stderr.lines().filter(told).collect();
    // An extent in two slots is complained about twice by the original.
    errors.dedup();
    // 1 in 9.4 to 9.31, 255 before and after.
    let rc = if r.rc == 1 { 255 } else { r.rc };
    format!("{}\n{}\nstatus {rc}", lines.join("\n"), errors.join("\n"))
}
