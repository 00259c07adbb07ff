//! What the recorded commands do not show: locks, backups, refusals, interrupted moves, dumps
//! that come back.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use drbdmeta::hold::{hold, minor_lock_path, open_lock_file, who_has_open};
use drbdmeta::io::{Memory, MetaIo};
use drbdmeta::layout::{Layout, Placement};
use drbdmeta::ops::move_internal;
use drbdmeta::superblock::Superblock;
use drbdmeta::units::ByteLen;
use drbdrs_tests::metagen::{Loop, Recorded, run};
use drbdrs_tests::need::{Need, trial};
use drbdrs_tests::program;
use libtest_mimic::{Arguments, Failed};
use rustix::fs::{FlockOperation, OFlags, fcntl_lock};

const MIB: u64 = 1 << 20;
const ORIGINAL: &str = "/usr/sbin/drbdmeta";

type Body = fn() -> Result<()>;

fn main() {
    let args = Arguments::from_args();
    let bodies: [(&str, Body); 7] = [
        ("check_says_what_is_and_what_would_be", check),
        ("a_held_file_names_the_pid", held),
        ("a_backup_brings_everything_back", backup),
        ("an_interrupted_move_is_completed", interrupted_move),
        ("existing_data_is_not_destroyed", existing_data),
        ("a_dump_comes_back", dump_comes_back),
        ("usage_errors_have_their_status", usage),
    ];
    let checked = |body: Body| body().map_err(|e| Failed::from(format!("{e:#}")));
    let tests = bodies.into_iter().map(|(name, body)| trial(name, &[], move || checked(body)));
    let mut tests: Vec<_> = tests.collect();
    let is_root = rustix::process::geteuid().is_root();
    let no_skip = std::env::var("DRBDRS_NO_SKIP").is_ok_and(|v| v == "1");
    let needs = [Need::File(ORIGINAL), Need::File("/dev/loop-control")];
    let with_devices: [(&str, Body); 4] = [
        ("an_exclusive_device_names_the_pid", exclusive),
        ("slots_exclude_only_themselves", slots),
        ("the_lock_of_a_minor_keeps_both_tools_away", minor_lock),
        ("a_command_of_ours_keeps_the_original_away", ours_first),
    ];
    for (name, body) in with_devices {
        let test = trial(name, &needs, move || checked(body));
        let is_missing = test.has_ignored_flag() || !is_root;
        tests.push(test.with_ignored_flag(is_missing && !no_skip));
    }
    let large =
        trial("a_device_of_16_tib_needs_little_memory", &[Need::File("/dev/shm")], move || {
            checked(large_device)
        });
    tests.push(large);
    libtest_mimic::run(&args, tests).exit();
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

/// A loop device above the file of a bench.
fn device(bench: &Bench) -> Result<(Loop, String)> {
    let device = Loop::new(&bench.device)?;
    let name = device.name.clone();
    Ok((device, name))
}

fn exclusive() -> Result<()> {
    let bench = Bench::new(4 * MIB)?;
    bench.ok(&["create-md"])?;
    let (_loop, name) = device(&bench)?;
    let ours = |command: &[&str]| {
        run(&bench.program, &[&["-", "v08", &name, "internal"], command].concat())
    };
    let theirs = |command: &[&str]| {
        run(Path::new(ORIGINAL), &[&["-", "v08", &name, "internal"], command].concat())
    };
    let flags = i32::try_from(OFlags::EXCL.bits())?;
    let open = || File::options().read(true).write(true).custom_flags(flags).open(&name);
    let holder = open()?;
    let mine = format!("{name} is open in pid:{} (", std::process::id());
    for command in ["apply-al", "dump-md", "outdate"] {
        let (got, want) = (ours(&[command])?, theirs(&[command])?);
        ensure!(got.rc == 20 && got.stderr.contains(&mine), "{command}: {got:?}");
        let without: Vec<_> = got.stderr.lines().filter(|l| !l.starts_with(&mine)).collect();
        ensure!(without == want.stderr.lines().collect::<Vec<_>>(), "{command}: {got:?} {want:?}");
        ensure!((got.rc, &got.stdout) == (want.rc, &want.stdout), "{command}: {got:?} {want:?}");
    }
    // Forced, both go on; but not under one of our own programs.
    ensure!(ours(&["outdate", "--force"])?.rc == theirs(&["outdate", "--force"])?.rc, "forced");
    fcntl_lock(&holder, FlockOperation::NonBlockingLockExclusive)?;
    let refused = ours(&["apply-al", "--force"])?;
    let pid = format!("lock on {name} currently held by pid:{}\n", std::process::id());
    ensure!(refused.rc == 20 && refused.stderr.ends_with(&pid), "{refused:?}");
    ensure!(ours(&["dump-md", "--force"])?.rc == 0, "reading may be forced");
    drop(holder);
    ensure!(ours(&["dump-md"])?.rc == 0, "not free again");
    Ok(())
}

fn slots() -> Result<()> {
    let bench = Bench::new(256 * MIB)?;
    let (_loop, name) = device(&bench)?;
    let ours = |slot: &str, command: &[&str]| {
        let folder = bench.folder.path().display().to_string();
        let front = ["--var-lib-drbd", &folder, "-", "v08", &name, slot];
        run(&bench.program, &[&front, command].concat())
    };
    for slot in ["0", "1"] {
        // The first slot counts as data at the start of the device.
        let made = ours(slot, &["create-md", "--force"])?;
        ensure!(made.rc == 0, "{made:?}");
    }
    let file = File::options().read(true).write(true).open(&name)?;
    let hold =
        hold(&file, Path::new(&name), Placement::Indexed(1)).map_err(|e| anyhow!("{e:?}"))?;
    ensure!(ours("0", &["outdate"])?.rc == 5, "the other slot is not free");
    let refused = ours("1", &["outdate", "--force"])?;
    let pid = format!("held by pid:{}\n", std::process::id());
    ensure!(refused.rc == 20 && refused.stderr.ends_with(&pid), "{refused:?}");
    drop(hold);
    ensure!(ours("1", &["outdate"])?.rc == 5, "not free again");
    Ok(())
}

/// A minor that nobody has.
const MINOR: u32 = 1_048_000;

fn minor_lock() -> Result<()> {
    let bench = Bench::new(4 * MIB)?;
    bench.ok(&["create-md"])?;
    let (_loop, name) = device(&bench)?;
    let lock = open_lock_file(&minor_lock_path(MINOR)).map_err(|e| anyhow!("{e:?}"))?;
    fcntl_lock(&lock, FlockOperation::NonBlockingLockExclusive)?;
    let minor = MINOR.to_string();
    let args = [&minor, "v08", &name, "internal", "outdate"];
    let (got, want) = (run(&bench.program, &args)?, run(Path::new(ORIGINAL), &args)?);
    ensure!((got.rc, &got.stderr) == (want.rc, &want.stderr), "{got:?} {want:?}");
    let pid = format!("currently held by pid:{}\n", std::process::id());
    ensure!(got.rc == 20 && got.stderr.ends_with(&pid), "{got:?}");
    Ok(())
}

/// Ours waits for its input meanwhile.
fn ours_first() -> Result<()> {
    let bench = Bench::new(4 * MIB)?;
    let (_loop, name) = device(&bench)?;
    let minor = (MINOR + 1).to_string();
    let args = [&minor, "v08", &name, "internal"];
    let mut ours = std::process::Command::new(&bench.program)
        .args(args)
        .arg("restore-md")
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let pid = ours.id();
    let is_open =
        || who_has_open(Path::new(&name)).iter().any(|(p, _)| u32::try_from(*p) == Ok(pid));
    for _ in 0..100 {
        if is_open() {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let by_minor = run(Path::new(ORIGINAL), &[&args[..], &["outdate"]].concat())?;
    let by_device = run(Path::new(ORIGINAL), &["-", "v08", &name, "internal", "outdate"])?;
    drop(ours.stdin.take());
    let ended = ours.wait()?;
    let told = format!("currently held by pid:{pid}\n");
    ensure!(by_minor.rc == 20 && by_minor.stderr.ends_with(&told), "{by_minor:?}");
    ensure!(by_device.rc == 20 && by_device.stderr.contains("resource busy"), "{by_device:?}");
    ensure!(ended.code() == Some(10), "an empty dump is a syntax error: {ended:?}");
    Ok(())
}

/// 512 MiB of bitmap; the whole program gets along with 50 MiB, however little of it is a hole.
fn large_device() -> Result<()> {
    let folder = tempfile::tempdir_in("/dev/shm")?;
    let path = folder.path().join("device");
    File::create(&path)?.set_len(16 << 40)?;
    let program = program("drbdmeta");
    let limited = |command: &str| -> Result<Recorded> {
        let script = "ulimit -v 51200; exec \"$0\" \"$@\"";
        let (program, device) = (program.display().to_string(), path.display().to_string());
        let folder = folder.path().display().to_string();
        let start = std::time::Instant::now();
        let mut args = vec!["-c", script, &program, "--var-lib-drbd", &folder, "--no-backup"];
        args.extend(["-", "v08", &device, "internal"]);
        args.extend(command.split(' '));
        let got = run(Path::new("/bin/sh"), &args)?;
        println!("{command}: {} ms", start.elapsed().as_millis());
        ensure!(got.rc == 0, "{command}: {got:?}");
        Ok(got)
    };
    limited("create-md")?;
    let dump = folder.path().join("dump");
    let text = limited("dump-md")?.stdout;
    let text = text.replace("la-size-sect 0;", "la-size-sect 34358689000;");
    let text = text.replace(
        "bm {\n}",
        "bm {\n 5000 times 0x0000000000000000; 0x00000000000000FF;\n \
        50000000 times 0x0000000000000000; 7 times 0x8000000000000001;\n}",
    );
    std::fs::write(&dump, &text)?;
    limited(&format!("restore-md --force {}", dump.display()))?;
    ensure!(limited("dump-md")?.stdout.ends_with("# bits-set 22;\n"), "other bits");
    ensure!(limited("dump-md --json")?.stdout.contains("\"out_of_sync_bits\": 22"), "other bits");
    limited("check")?;
    // No holes any more, but zeros that have to be read.
    let file = File::options().write(true).open(&path)?;
    let zeros = vec![0; 1 << 20];
    for mib in 1..500 {
        file.write_all_at(&zeros, (16 << 40) - (512 - mib) * MIB)?;
    }
    ensure!(limited("dump-md")?.stdout.contains("times 0x0000000000000000;\n"), "no zeros");
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
        kept = [&journal.header()[..], &journal.content].concat();
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

fn check() -> Result<()> {
    let bench = Bench::new(4 * MIB)?;
    let says = |rc: i32, texts: &[&str]| -> Result<()> {
        let got = bench.run(&["check"])?;
        ensure!(got.rc == rc && got.stderr.is_empty(), "{got:?}");
        let missing = texts.iter().find(|t| !got.stdout.contains(**t));
        ensure!(missing.is_none(), "{missing:?} is missing: {}", got.stdout);
        Ok(())
    };
    says(1, &["no valid meta-data", "byte 4190208, is empty", "create-md makes new"])?;
    bench.ok(&["create-md"])?;
    says(
        0,
        &["It is new: the device has never been attached", "would get everything from a peer"],
    )?;
    ensure!(!bench.run(&["check"])?.stdout.contains("ODD"), "{:?}", bench.run(&["check"])?);
    bench.ok(&["set-gi", "--force", "--no-backup", "A1:B0:C0:D0:1:1:1"])?;
    says(0, &["of generation 00000000000000A1", "changed since generation 00000000000000B0"])?;
    says(0, &["The node was Primary", "The activity log is empty", "means split brain"])?;
    let sector = |at: u64, bytes: &[u8]| -> Result<()> {
        let file = File::options().write(true).open(&bench.device)?;
        Ok(file.write_all_at(bytes, 4_190_208 + at)?)
    };
    // In use, the log torn: lost, and needed.
    sector(60, &0x8374_026C_u32.to_be_bytes())?;
    says(1, &["apply-al comes first"])?;
    let file = File::options().write(true).open(&bench.device)?;
    file.write_all_at(&[0; 32_768], 4_190_208 - 32_768)?;
    says(
        1,
        &["8 blocks of the activity log are not readable", "WRONG: the activity log is needed"],
    )?;
    says(1, &["apply-al as well", "use create-md and sync from it"])?;
    bench.ok(&["create-md", "--force", "--no-backup"])?;
    sector(56, &0x8000_0090_u32.to_be_bytes())?;
    sector(3000, b"xyz")?;
    sector(0, &u64::MAX.to_be_bytes())?;
    says(
        0,
        &["ODD: 3 bytes", "ODD: unknown flags 0x80000000", "ODD: the data is marked as up to date"],
    )?;
    says(
        0,
        &["ODD: the agreed size of 18446744073709551615 sectors is more than the 8112 usable"],
    )?;
    std::fs::remove_file(bench.folder.path().join("drbd-minor--1.lkbd"))?;
    says(0, &["The size of the device is not noted"])?;
    for (at, found) in [
        (76, "WRONG: the superblock at byte 4190208 does not fit: strange bm_offset"),
        (60, "something else"),
    ] {
        sector(at, &[0x11])?;
        let got = bench.run(&["check"])?;
        ensure!(got.rc == 1 && got.stdout.contains(found), "{got:?}");
    }
    sector(60, &0x8374_026D_u32.to_be_bytes())?;
    let got = bench.run(&["check"])?;
    ensure!(got.rc == 1 && got.stdout.contains("is DRBD 9's, which is not supported"), "{got:?}");
    for command in ["dump-md", "apply-al", "get-gi", "outdate"] {
        let got = bench.run(&[command])?;
        ensure!(
            got.rc == 255 && got.stderr.contains("this is a DRBD 9 device, not supported"),
            "{got:?}"
        );
    }
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
