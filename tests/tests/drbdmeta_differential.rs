//! Random devices and random commands, by the original drbdmeta or by ours on the same loop
//! device; after every step both must say the same about it.
//!
//! `DRBDRS_SEED=N` repeats one sequence, `DRBDRS_SEQUENCES=N` changes how many run.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use drbdmeta::al::AlRing;
use drbdmeta::layout::{Layout, Placement};
use drbdmeta::superblock::{Flags, Magic, Superblock};
use drbdmeta::units::{AlExtentNr, ByteLen, SectorCount};
use drbdrs_tests::metagen::{Random, Recorded, read_part, run};
use drbdrs_tests::need::{Need, trial};
use drbdrs_tests::program;
use libtest_mimic::{Arguments, Failed};

const ORIGINAL: &str = "/usr/sbin/drbdmeta";
const LOOP_CONTROL: &str = "/dev/loop-control";
const SEQUENCES: u64 = 500;
/// Set in the copy of this program that has its own mounts.
const INSIDE: &str = "DRBDRS_OWN_MOUNTS";

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
    let ours = program("drbdmeta");
    if let Some(seed) = number("DRBDRS_SEED") {
        return sequence(&ours, seed).with_context(|| format!("DRBDRS_SEED={seed}"));
    }
    let count = number("DRBDRS_SEQUENCES").unwrap_or(SEQUENCES);
    let mut steps = 0;
    for seed in 1..=count {
        steps += STEPS;
        sequence(&ours, seed).with_context(|| format!("DRBDRS_SEED={seed}"))?;
    }
    println!("{count} sequences, {steps} steps");
    Ok(())
}

/// A loop device; it goes away with this value.
struct Loop {
    name: String,
}

impl Loop {
    fn new(file: &Path) -> Result<Self> {
        let output = Command::new("losetup").args(["-f", "--show"]).arg(file).output()?;
        ensure!(output.status.success(), "losetup: {}", String::from_utf8_lossy(&output.stderr));
        Ok(Self { name: String::from_utf8(output.stdout)?.trim().to_string() })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.name]).status();
    }
}

const STEPS: u64 = 5;

struct Bench<'a> {
    ours: &'a Path,
    original: PathBuf,
    device: Loop,
    image: PathBuf,
    folder: tempfile::TempDir,
    index: &'static str,
    placement: Placement,
    size: u64,
    random: Random,
    history: Vec<String>,
}

fn sequence(ours: &Path, seed: u64) -> Result<()> {
    let mut random = Random::new(seed);
    let folder = tempfile::tempdir()?;
    let image = folder.path().join("image");
    let (index, placement, size) = match random.below(4) {
        0 => ("flex-external", Placement::FlexExternal, 136 + random.below(20_000)),
        1 => ("0", Placement::Indexed(0), 262_144 + random.below(100)),
        _ => ("internal", Placement::Internal, 136 + random.below(40_000)),
    };
    let size = size * 512;
    File::create(&image)?.set_len(size)?;
    let device = Loop::new(&image)?;
    let original = PathBuf::from(ORIGINAL);
    let history = Vec::new();
    let mut bench =
        Bench { ours, original, device, image, folder, index, placement, size, random, history };
    bench.create()?;
    for _ in 0..STEPS {
        bench.step().and_then(|()| bench.compare()).with_context(|| {
            format!("{} bytes, {index}: {}", bench.size, bench.history.join(" · "))
        })?;
    }
    Ok(())
}

impl Bench<'_> {
    fn call(&mut self, program: &Path, device: &str, command: &[&str]) -> Result<Recorded> {
        let mut args = vec!["-", "v08", device, self.index];
        args.extend(command);
        args.push("--force");
        run(program, &args)
    }

    /// One of the tools changes the device.
    fn either(&mut self, command: &[&str]) -> Result<Recorded> {
        let is_ours = self.random.below(2) == 0;
        let program = if is_ours { self.ours.to_path_buf() } else { self.original.clone() };
        self.history.push(format!("{}{}", if is_ours { "ours " } else { "" }, command.join(" ")));
        let device = self.device.name.clone();
        self.call(&program, &device, command)
    }

    fn create(&mut self) -> Result<()> {
        let stripes = (1 + self.random.below(4)).to_string();
        let kib = (32 + 4 * self.random.below(20)).to_string();
        let bio = (self.random.below(257) * 4096).to_string();
        let mut command = vec!["create-md", "--peer-max-bio-size", &bio];
        // A small device may be too small for a large log, a slot has one shape.
        if self.index != "0" && self.size > 4 << 20 && self.random.below(2) == 0 {
            command.extend(["--al-stripes", &stripes, "--al-stripe-size-kB", &kib]);
        }
        self.either(&command)?;
        Ok(())
    }

    fn step(&mut self) -> Result<()> {
        match self.random.below(10) {
            0 => {
                self.either(&["wipe-md"])?;
                self.create()
            }
            1 => self.either(&["outdate"]).map(drop),
            2 => self.either(&["invalidate"]).map(drop),
            3 => {
                let uuid = format!("{:016X}", self.random.next());
                self.either(&["write-dev-uuid", &uuid]).map(drop)
            }
            4 | 5 => self.set_gi(),
            6 | 7 => self.restore(),
            _ => self.apply_al(),
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
        self.either(&["set-gi", &list]).map(drop)
    }

    /// Random content through the text form.
    fn restore(&mut self) -> Result<()> {
        let Some((sb, layout)) = self.read()? else { return Ok(()) };
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
        self.either(&["restore-md", &path.display().to_string()]).map(drop)
    }

    fn read(&self) -> Result<Option<(Superblock, Layout)>> {
        let mut block = [0; 4096];
        let len = ByteLen(self.size);
        let at = self.placement.superblock(len).context("too small")?;
        File::open(&self.device.name)?.read_exact_at(&mut block, at.0)?;
        let found = Superblock::from_disk(&block).ok();
        Ok(found.and_then(|sb| Some((sb, sb.check(self.placement, len).ok()?))))
    }

    /// A node that stopped somewhere: then apply-al by both, on a copy each, must give the same
    /// bytes and texts; the device goes on with one of them.
    fn apply_al(&mut self) -> Result<()> {
        if let Some((mut sb, layout)) = self.read()?
            && self.random.below(4) != 0
        {
            sb.magic = Magic::Unclean;
            sb.flags.remove(Flags::AL_CLEAN);
            sb.flags.set(Flags::PRIMARY, self.random.below(3) != 0);
            let file = File::options().write(true).open(&self.device.name)?;
            file.write_all_at(&sb.to_disk(), layout.superblock.0)?;
            self.transactions(&file, layout)?;
            file.sync_all()?;
            self.history.push("crash".into());
        }
        let copy = self.folder.path().join("copy").display().to_string();
        // Everything outside the meta-data is zero all the time.
        let (from, len) = match self.read()? {
            Some((_, layout)) => {
                let (from, to) = layout.span();
                (from.0, to.0.min(self.size) - from.0)
            }
            None => (0, self.size.min(1 << 20)),
        };
        let file = File::create(&copy)?;
        file.set_len(self.size)?;
        file.write_all_at(&read_part(&self.image, from, len)?, from)?;
        let (ours, original) = (self.ours.to_path_buf(), self.original.clone());
        let mine = self.call(&ours, &copy, &["apply-al"])?;
        let device = self.device.name.clone();
        let theirs = self.call(&original, &device, &["apply-al"])?;
        self.history.push("apply-al".into());
        ensure!((mine.rc == 0) == (theirs.rc == 0), "apply-al: {mine:?}, original {theirs:?}");
        let plain = |r: &Recorded| {
            let lines =
                r.stderr.lines().filter(|l| !l.contains("BLKSSZGET") && !l.contains("ASSERT"));
            let mut lines = lines.map(ToString::to_string).collect::<Vec<_>>();
            // An extent in two slots is complained about twice by the original.
            lines.dedup();
            lines
        };
        ensure!(plain(&mine) == plain(&theirs), "apply-al: {mine:?}, original {theirs:?}");
        let mine = read_part(Path::new(&copy), from, len)?;
        ensure!(mine == read_part(&self.image, from, len)?, "apply-al: images differ");
        Ok(())
    }

    fn transactions(&mut self, file: &File, layout: Layout) -> Result<()> {
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
            file.write_all_at(&block, at.0)?;
            ring.written();
        }
        Ok(())
    }

    fn compare(&mut self) -> Result<()> {
        let device = self.device.name.clone();
        let (ours, original) = (self.ours.to_path_buf(), self.original.clone());
        for command in ["dump-md", "get-gi", "show-gi", "dstate"] {
            let mine = self.call(&ours, &device, &[command])?;
            let theirs = self.call(&original, &device, &[command])?;
            let (a, b) = (loosened(&mine), loosened(&theirs));
            ensure!(a == b, "{command}:\n{a}\noriginal:\n{b}");
        }
        Ok(())
    }
}

/// Without head, and without the flags of dumps, which the original always prints as 0.
fn loosened(r: &Recorded) -> String {
    let head = |l: &&str| !(l.starts_with("# 2") || l.contains("> ") || l.contains("flags 0x"));
    let lines: Vec<&str> = r.stdout.lines().filter(head).collect();
    format!("{}\n{}\nsuccess {}", lines.join("\n"), r.stderr, r.rc == 0)
}
