//! Disks on which the kernel's DRBD was writing when the power failed: `apply-al` of both tools
//! must give the same, bit for bit, and the kernel must accept what ours left.
//!
//! `DRBDRS_SEED=N` repeats the moments and places, `DRBDRS_ROUNDS=N` changes how many power cuts.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use drbdmeta::layout::{AlGeometry, Layout, Placement};
use drbdmeta::units::ByteLen;
use drbdrs_tests::guest::{Config, Disk, GUEST, Guest, HOST};
use drbdrs_tests::metagen::{Random, blocks, run};
use drbdrs_tests::need::{Need, trial};
use drbdrs_tests::program;
use libtest_mimic::{Arguments, Failed};

const ORIGINAL: &str = "/usr/sbin/drbdmeta";
const MIB: u64 = 1 << 20;

fn main() {
    let args = Arguments::from_args();
    let needs = [Need::Guest, Need::File(ORIGINAL)];
    let tests = vec![trial("power_cuts_under_load", &needs, || {
        power_cuts().map_err(|e| Failed::from(format!("{e:#}")))
    })];
    libtest_mimic::run(&args, tests).exit();
}

/// One replicated device of the guest, and where its meta-data is.
struct Volume {
    /// Data device, in the guest.
    disk: &'static str,
    /// What the configuration says.
    meta: &'static str,
    /// What drbdmeta says.
    index: &'static str,
    placement: Placement,
    /// Length of the data, bytes.
    data: u64,
    /// Length of the device with the meta-data, and its file on the host.
    md: (u64, PathBuf),
    al: AlGeometry,
    al_extents: u32,
}

impl Volume {
    fn sectors(&self) -> Result<u64> {
        let layout = Layout::for_new(self.placement, ByteLen(self.md.0), self.al)?;
        Ok(layout.usable().0.min(self.data / 512))
    }

    /// A node in sync, by our tool, so that the kernel keeps its log from the first write on.
    fn prepare(&self, ours: &Path, folder: &Path, generation: u64) -> Result<()> {
        let dump = folder.join("dump");
        std::fs::write(
            &dump,
            format!(
                "version \"v08\"; uuid {{ 0x{:016X}; 0x0000000000000000; 0x0000000000000000; \
             0x0000000000000000; flags 0x000000B1; }} la-size-sect {}; bm-byte-per-bit 4096; \
             device-uuid 0x{generation:016X}; la-peer-max-bio-size 4096; al-stripes {}; \
             al-stripe-size-4k {}; bm {{ }}",
                generation << 1,
                self.sectors()?,
                self.al.stripes,
                self.al.stripe_blocks
            ),
        )?;
        let dump = dump.display().to_string();
        drbdmeta(ours, folder, &self.md.1, self.index, &["restore-md", &dump, "--force"]).map(drop)
    }
}

fn drbdmeta(
    program: &Path,
    folder: &Path,
    device: &Path,
    index: &str,
    command: &[&str],
) -> Result<(String, String)> {
    let device = device.display().to_string();
    let folder = folder.display().to_string();
    let mut args = Vec::new();
    if program != Path::new(ORIGINAL) {
        args.extend(["--var-lib-drbd", &folder, "--no-backup"]);
    }
    args.extend(["-", "v08", &device, index]);
    args.extend(command);
    let got = run(program, &args)?;
    ensure!(got.rc == 0, "{args:?}: {got:?}");
    let told = got.stderr.lines().filter(|l| !l.contains("BLKSSZGET") && !l.contains("ASSERT"));
    Ok((got.stdout, told.collect::<Vec<_>>().join("\n")))
}

fn volumes(folder: &Path) -> Result<Vec<Volume>> {
    let file = |name: &str, len: u64| -> Result<(u64, PathBuf)> {
        let path = folder.join(name);
        File::create(&path)?.set_len(len)?;
        Ok((len, path))
    };
    let wide = AlGeometry { stripes: 3, stripe_blocks: 5 };
    // Numbers of bits that are no multiple of 64: else the kernel forgets the last word.
    Ok(vec![
        Volume {
            disk: "vda",
            meta: "internal",
            index: "internal",
            placement: Placement::Internal,
            data: 600 * MIB,
            md: file("a", 600 * MIB + 12_288)?,
            al: AlGeometry::default(),
            al_extents: 67,
        },
        Volume {
            disk: "vdb",
            meta: "internal",
            index: "internal",
            placement: Placement::Internal,
            data: 300 * MIB,
            md: file("b", 300 * MIB + 512)?,
            al: wide,
            al_extents: 1237,
        },
        Volume {
            disk: "vdc",
            meta: "/dev/vdd",
            index: "flex-external",
            placement: Placement::FlexExternal,
            data: 900 * MIB + 4096,
            md: file("d", 2 * MIB)?,
            al: AlGeometry { stripes: 1, stripe_blocks: 10 },
            al_extents: 97,
        },
    ])
}

fn configuration(volumes: &[Volume]) -> String {
    let mut text = "global { usage-count no; }\n".to_string();
    for (i, v) in volumes.iter().enumerate() {
        let node = |name: &str, address: &str| {
            format!(
                " on {name} {{ device minor {i}; disk /dev/{}; meta-disk {}; \
                 address {address}:{}; }}\n",
                v.disk,
                v.meta,
                7800 + i
            )
        };
        text.push_str(&format!(
            "resource r{i} {{\n protocol C; disk {{ al-extents {}; }}\n{}{}}}\n",
            v.al_extents,
            node("alpha", GUEST),
            node("beta", HOST)
        ));
    }
    text
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn power_cuts() -> Result<()> {
    let ours = program("drbdmeta");
    let folder = tempfile::tempdir()?;
    let seed = number("DRBDRS_SEED").unwrap_or(1);
    let mut random = Random::new(seed);
    let volumes = volumes(folder.path())?;
    let data = folder.path().join("c");
    File::create(&data)?.set_len(volumes[2].data)?;
    for (i, volume) in volumes.iter().enumerate() {
        volume.prepare(&ours, folder.path(), 0x1234_5678_0000 + i as u64)?;
    }
    let images = [&volumes[0].md.1, &volumes[1].md.1, &data, &volumes[2].md.1];
    let config = images.iter().fold(Config::new("alpha"), |c, i| c.disk(Disk::Image((*i).clone())));
    let mut guest = Guest::boot(config)?;
    let text = configuration(&volumes);
    for round in 0..number("DRBDRS_ROUNDS").unwrap_or(3) {
        if round > 0 {
            guest.start()?;
        }
        guest.put("/etc/drbd.conf", text.as_bytes())?;
        // Without drbdadm: it would apply the log itself, and here it has been applied.
        attach(&guest, &volumes).with_context(|| format!("DRBDRS_SEED={seed} round {round}"))?;
        load(&guest, &volumes)?;
        // On a busy machine the writers take their time.
        let has_begun = "[ $(grep -o 'dw:[0-9]*' /proc/drbd | cut -d: -f2 | \
                         while read n; do [ $n -ge 64 ] && echo x; done | wc -l) = 3 ]";
        guest.wait_for(has_begun, Duration::from_secs(120))?;
        std::thread::sleep(Duration::from_millis(1500 + random.below(6000)));
        guest.power_cut()?;
        for (i, volume) in volumes.iter().enumerate() {
            compare(&ours, folder.path(), volume)
                .with_context(|| format!("DRBDRS_SEED={seed} round {round} r{i}"))?;
        }
    }
    guest.start()?;
    guest.put("/etc/drbd.conf", text.as_bytes())?;
    attach(&guest, &volumes)
}

/// The kernel takes the disks as our tool left them, and finds the same bits.
fn attach(guest: &Guest, volumes: &[Volume]) -> Result<()> {
    for (i, volume) in volumes.iter().enumerate() {
        let (_, name) = (volume, format!("r{i}"));
        let told = guest.ok(&format!("drbdadm -v up {name} 2>&1"))?;
        ensure!(!told.contains("Marked additional"), "the log had not been applied: {told}");
    }
    let state = guest.proc_drbd()?;
    let found: Vec<u64> = state
        .split_whitespace()
        .filter_map(|w| w.strip_prefix("oos:").and_then(|n| n.parse().ok()))
        .collect();
    let mut want = Vec::new();
    for (i, volume) in volumes.iter().enumerate() {
        let set = bits_in_bitmap(volume)?;
        want.push(set * 4);
        ensure!(guest.ok(&format!("drbdadm dstate r{i}"))?.starts_with("UpToDate"), "{state}");
    }
    ensure!(found == want, "out of sync {found:?}, on disk {want:?}\n{state}");
    Ok(())
}

/// Counted with nothing but the layout.
fn bits_in_bitmap(volume: &Volume) -> Result<u64> {
    let layout = Layout::for_new(volume.placement, ByteLen(volume.md.0), volume.al)?;
    let bits = usize::try_from(volume.sectors()?.div_ceil(8))?;
    let mut map = vec![0; bits.div_ceil(8)];
    File::open(&volume.md.1)?.read_exact_at(&mut map, layout.bitmap.0)?;
    let set = (0..bits).filter(|n| map[n / 8] >> (n % 8) & 1 == 1).count();
    Ok(set as u64)
}

/// Writers that go on until the power fails.
fn load(guest: &Guest, volumes: &[Volume]) -> Result<()> {
    for (i, volume) in volumes.iter().enumerate() {
        guest.ok(&format!("drbdadm primary r{i}"))?;
        let blocks = volume.sectors()? / 8;
        // Two writers with different habits: anywhere, and near each other.
        for places in [format!("(RANDOM * 32768 + RANDOM) % {blocks}"), "RANDOM % 9000".into()] {
            guest.ok(&format!(
                "(while :; do dd if=/dev/urandom of=/dev/drbd{i} bs=4k count=2 oflag=direct \
                 conv=notrunc seek=$(({places})); done >/dev/null 2>&1 &)"
            ))?;
        }
    }
    Ok(())
}

/// Both tools apply the log, each to its own copy; the result of ours is what goes on.
fn compare(ours: &Path, folder: &Path, volume: &Volume) -> Result<()> {
    let copy = folder.join("copy");
    let done = std::process::Command::new("cp")
        .args(["--sparse=always"])
        .args([&volume.md.1, &copy])
        .status()?;
    ensure!(done.success(), "cp");
    let original = Path::new(ORIGINAL);
    let call = |program: &Path, device: &Path, command: &[&str]| {
        drbdmeta(program, folder, device, volume.index, command)
    };
    let verbose = ["dump-md", "--force", "-vvvvvvvvvv"];
    let log = |text: &str| text.lines().skip_while(|l| *l != "# al {").map(String::from).collect();
    let mine: Vec<String> = log(&call(ours, &volume.md.1, &verbose)?.0);
    let theirs: Vec<String> = log(&call(original, &copy, &verbose)?.0);
    ensure!(mine == theirs, "the text of the log differs");
    let used = mine.iter().filter(|l| l.contains("crc32c")).count();
    // While every block is marked anyway, the kernel does not use the log.
    let is_full = bits_in_bitmap(volume)? * 8 >= volume.sectors()?;
    ensure!(used > 0 || is_full, "the log was not used: {mine:?}");
    let mine = call(ours, &volume.md.1, &["apply-al", "--force"])?;
    let theirs = call(original, &copy, &["apply-al", "--force"])?;
    ensure!(mine == theirs, "{mine:?}, original {theirs:?}");
    ensure!(used == 0 || mine.1.contains("Marked additional"), "{mine:?}");
    println!("{}: {used} transactions, {}", volume.disk, mine.1);
    let (mine, theirs) = (blocks(&volume.md.1)?, blocks(&copy)?);
    let differs = mine.keys().chain(theirs.keys()).find(|n| mine.get(n) != theirs.get(n));
    ensure!(differs.is_none(), "block {differs:?} differs");
    Ok(())
}
