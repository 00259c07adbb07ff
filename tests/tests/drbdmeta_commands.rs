//! What the recorded commands do not show: locks, backups, refusals, interrupted moves, dumps
//! that come back.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use drbdmeta::io::{Memory, MetaIo};
use drbdmeta::layout::{Layout, Placement};
use drbdmeta::ops::move_internal;
use drbdmeta::superblock::Superblock;
use drbdmeta::units::ByteLen;
use drbdrs_tests::metagen::{Recorded, run};
use drbdrs_tests::need::trial;
use drbdrs_tests::program;
use libtest_mimic::{Arguments, Failed};
use rustix::fs::{FlockOperation, fcntl_lock};

const MIB: u64 = 1 << 20;

type Body = fn() -> Result<()>;

fn main() {
    let args = Arguments::from_args();
    let bodies: [(&str, Body); 6] = [
        ("a_held_device_names_the_pid", held),
        ("a_backup_brings_everything_back", backup),
        ("an_interrupted_move_is_completed", interrupted_move),
        ("existing_data_is_not_destroyed", existing_data),
        ("a_dump_comes_back", dump_comes_back),
        ("usage_errors_have_their_status", usage),
    ];
    let checked = |body: Body| body().map_err(|e| Failed::from(format!("{e:#}")));
    let tests = bodies.into_iter().map(|(name, body)| trial(name, &[], move || checked(body)));
    libtest_mimic::run(&args, tests.collect()).exit();
}

struct Bench {
    program: PathBuf,
    folder: tempfile::TempDir,
    device: PathBuf,
}

impl Bench {
    fn new(size: u64) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let device = folder.path().join("device");
        File::create(&device)?.set_len(size)?;
        Ok(Self { program: program("drbdmeta"), folder, device })
    }

    fn run(&self, command: &[&str]) -> Result<Recorded> {
        let (folder, device) = (self.folder.path().display(), self.device.display());
        let (folder, device) = (folder.to_string(), device.to_string());
        let mut args = vec!["--var-lib-drbd", &folder, "-", "v08", &device, "internal"];
        args.extend(command);
        run(&self.program, &args)
    }

    fn ok(&self, command: &[&str]) -> Result<Recorded> {
        let done = self.run(command)?;
        ensure!(done.rc == 0, "{command:?}: {done:?}");
        Ok(done)
    }

    fn content(&self) -> Result<Vec<u8>> {
        Ok(std::fs::read(&self.device)?)
    }
}

fn held() -> Result<()> {
    let bench = Bench::new(4 * MIB)?;
    bench.ok(&["create-md"])?;
    let file = File::options().read(true).write(true).open(&bench.device)?;
    fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive)?;
    let pid = format!("held by pid:{}\n", std::process::id());
    for command in [&["outdate", "--force"][..], &["apply-al"], &["dump-md"]] {
        let refused = bench.run(command)?;
        ensure!(refused.rc == 20 && refused.stderr.contains(&pid), "{command:?}: {refused:?}");
    }
    let forced = bench.ok(&["dump-md", "--force"])?;
    ensure!(forced.stdout.contains("uuid {"), "{forced:?}");
    drop(file);
    bench.ok(&["dump-md"])?;
    Ok(())
}

fn backup() -> Result<()> {
    let bench = Bench::new(4 * MIB)?;
    bench.ok(&["create-md"])?;
    bench.ok(&["set-gi", "--force", "--no-backup", "A0:B0:C0:D0:1:1"])?;
    let before = bench.content()?;
    let wiped = bench.ok(&["wipe-md", "--force"])?;
    ensure!(bench.content()? != before, "nothing was wiped");
    let path = wiped.stderr.rsplit(" to ").next().unwrap_or_default().trim();
    let from = wiped.stderr.split("Saved bytes ").nth(1).and_then(|t| t.split("..").next());
    let from: u64 = from.unwrap_or_default().parse()?;
    let file = File::options().write(true).open(&bench.device)?;
    file.write_all_at(&std::fs::read(path)?, from)?;
    ensure!(bench.content()? == before, "the backup is not what was there");
    bench.ok(&["wipe-md", "--force", "--no-backup"])?;
    let count = std::fs::read_dir(bench.folder.path().join("backup"))?.count();
    ensure!(count == 1, "{count} backups");
    Ok(())
}

fn interrupted_move() -> Result<()> {
    let bench = Bench::new(4 * MIB)?;
    bench.ok(&["create-md"])?;
    bench.ok(&["set-gi", "--force", "A0:B0:C0:D0:1:1"])?;
    let want = bench.ok(&["get-gi"])?.stdout;
    let mut memory = Memory { bytes: bench.content()? };
    let start = memory.bytes.len() - 4096;
    let sb = Superblock::from_disk(&memory.bytes[start..])?;
    let old = sb.check(Placement::Internal, memory.device_len())?;
    let grown = 4 * MIB + 8192;
    memory.bytes.resize(usize::try_from(grown)?, 0);
    let new = Layout::for_new(Placement::Internal, ByteLen(grown), sb.al)?;
    let mut kept = Vec::new();
    let moved = move_internal(&mut memory, &old, &new, &sb, &mut |journal| {
        kept = journal.to_bytes();
        Ok(())
    })?;
    ensure!(!kept.is_empty() && moved.current == sb.current, "no journal");
    // The power fails when the old superblock is gone and the new one is not there yet.
    let mut torn = memory.bytes.clone();
    let end = torn.len();
    torn[end - 4096..].fill(0);
    std::fs::write(&bench.device, &torn)?;
    ensure!(bench.run(&["get-gi"])?.rc == 255, "it was found without the journal");
    std::fs::write(bench.folder.path().join("drbd-minor--1.move"), &kept)?;
    bench.ok(&["check-resize"])?;
    ensure!(bench.ok(&["get-gi"])?.stdout == want, "other generations");
    ensure!(bench.content()? == memory.bytes, "not complete");
    ensure!(!bench.folder.path().join("drbd-minor--1.move").exists(), "the journal stays");
    Ok(())
}

fn existing_data() -> Result<()> {
    let bench = Bench::new(4 * MIB)?;
    let file = File::options().write(true).open(&bench.device)?;
    // A file system of 4096 blocks of 1 KiB: the whole device.
    file.write_all_at(&4096u32.to_le_bytes(), 0x404)?;
    file.write_all_at(&[0x53, 0xEF], 0x438)?;
    let before = bench.content()?;
    for options in [&["create-md"][..], &["create-md", "--force", "--ignore-sanity-checks"]] {
        let refused = bench.run(options)?;
        ensure!(refused.rc == 40, "{refused:?}");
        ensure!(
            refused.stdout.contains("Found ext2 filesystem\n        4096 kB data"),
            "{refused:?}"
        );
        ensure!(bench.content()? == before, "something was written");
    }
    // One that ends before the meta-data: only with a confirmation.
    file.write_all_at(&3000u32.to_le_bytes(), 0x404)?;
    let asked = bench.run(&["create-md"])?;
    ensure!(asked.rc == 1 && asked.stdout.ends_with("Operation canceled.\n"), "{asked:?}");
    bench.ok(&["create-md", "--force"])?;
    Ok(())
}

fn dump_comes_back() -> Result<()> {
    let bench = Bench::new(40 * MIB)?;
    bench.ok(&["create-md", "--al-stripes", "3", "--al-stripe-size-kB", "64"])?;
    let text = "version \"v08\";\nuuid { 0x00000000000000A1; 0x00000000000000B0; \
        0x00000000000000C0; 0x00000000000000D0; flags 0x000000B1; }\nla-size-sect 70000;\n\
        bm-byte-per-bit 4096;\ndevice-uuid 0x00000000000000E0;\nla-peer-max-bio-size 4096;\n\
        al-stripes 3;\nal-stripe-size-4k 16;\nbm {\n 7 times 0x8000000000000001;\n}\n";
    let path = bench.folder.path().join("dump");
    std::fs::write(&path, text)?;
    let path = path.display().to_string();
    ensure!(bench.ok(&["verify-dump", &path])?.stdout == "input file parsed ok\n", "verify");
    bench.ok(&["restore-md", &path, "--force"])?;
    let body = |text: &str| text.lines().skip(3).collect::<Vec<_>>().join("\n");
    let first = bench.ok(&["dump-md"])?.stdout;
    ensure!(first.contains("flags 0x000000B1") && first.contains("# bits-set 14;"), "{first}");
    std::fs::write(&path, &first)?;
    bench.ok(&["wipe-md", "--force"])?;
    bench.ok(&["restore-md", &path])?;
    ensure!(body(&bench.ok(&["dump-md"])?.stdout) == body(&first), "another dump");
    let json: serde_json::Value = serde_json::from_str(&bench.ok(&["dump-md", "--json"])?.stdout)?;
    ensure!(json["out_of_sync_bits"] == 14 && json["al_stripes"] == 3, "{json}");
    std::fs::write(&path, text.replace("bm {", "bm {{"))?;
    let bad = bench.run(&["verify-dump", &path])?;
    ensure!(bad.rc == 10 && bad.stderr.starts_with("Parse error in line 9: "), "{bad:?}");
    Ok(())
}

fn usage() -> Result<()> {
    let bench = Bench::new(65_536)?;
    let rows: [(&[&str], i32, &str); 7] = [
        (&["show-gi"], 10, "is only 65536 bytes. That's not enough.\n"),
        (&["foo"], 20, "Unknown command 'foo'.\n"),
        (&[], 20, "command missing\n"),
        (&["dump-md", "--node-id", "1"], 10, "does not accept the --node-id option\n"),
        (&["create-md", "-p", "2M"], 10, "peer-max-bio-size out of range (0...1M)\n"),
        (&["create-md", "-z", "16"], 10, "invalid (too small) al-stripe* settings\n"),
        (&["create-md", "-b", "x"], 10, "automatic|zeroout|pwrite|skip\n"),
    ];
    for (command, rc, text) in rows {
        let got = bench.run(command)?;
        ensure!(got.rc == rc && got.stderr.ends_with(text), "{command:?}: {got:?}");
    }
    Ok(())
}
