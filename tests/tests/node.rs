//! The whole product on one machine: two daemons, files as disks, drbdadm, drbdsetup, drbdmeta, and
//! an NBD client. Nothing is privileged, everything is on loopback.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use drbd_admin::wire::Client;
use drbd_admin::{Answer, Request, Target};
use drbdrs_tests::need::{Need, trial};
use drbdrs_tests::nodes::{Pair, Programs, eventually};
use libtest_mimic::{Arguments, Failed};
use rustix::process::Signal;

const MIB: u64 = 1 << 20;
/// A resync that can be watched, and one that takes no time.
const SLOW: &str = "  disk { c-plan-ahead 0; resync-rate 4M; }";
const FAST: &str = "  disk { c-plan-ahead 0; resync-rate 100M; }\n  net { verify-alg crc32c; }";

type Body = fn(&Programs) -> Result<()>;

fn main() {
    let args = Arguments::from_args();
    let tests: [(&str, &[Need], Body); 11] = [
        ("a_killed_primary_loses_nothing", &[Need::File("/usr/bin/qemu-io")], failover),
        ("commands_end_as_the_originals", &[], exit_codes),
        ("the_status_file_is_current_and_rests", &[Need::File("/usr/bin/qemu-io")], status_file),
        ("events_come_in_order", &[], events),
        ("handlers_are_called_and_their_exit_codes_count", &[], handlers),
        ("handlers_find_the_configuration", &[], handlers_of_configuration),
        ("sigterm_leaves_clean_meta_data", &[Need::File("/usr/bin/qemu-io")], sigterm),
        ("meta_data_in_use_is_left_alone", &[], meta_data_in_use),
        ("a_resync_waits_for_another_one", &[], resync_after),
        (
            "bad_clients_and_stuck_commands_harm_nobody",
            &[Need::File("/usr/bin/qemu-io")],
            admin_socket,
        ),
        ("faults_are_loud_and_what_is_stuck_is_shown", &[Need::File("/usr/bin/qemu-io")], faults),
    ];
    let trials = tests.into_iter().map(|(name, needs, body)| {
        trial(name, needs, move || {
            let programs = Programs::build();
            body(&programs).map_err(|e| Failed::from(format!("{e:#}")))
        })
    });
    libtest_mimic::run(&args, trials.collect()).exit();
}

/// Amount of the last resync that a log tells of, in KB.
fn resynced(log: &str) -> Result<u64> {
    let words = "Began resync as SyncTarget (will sync ";
    let (_, rest) = log.rsplit_once(words).context("no resync in the log")?;
    Ok(rest.split(' ').next().context("an amount")?.parse()?)
}

fn failover(programs: &Programs) -> Result<()> {
    let mut pair = Pair::new(programs, 1, 32 * MIB, FAST, "")?;
    pair.up("")?;
    let [alpha, beta] = &mut pair.nodes;
    alpha.until("ro:Secondary/Secondary ds:Inconsistent/Inconsistent")?;
    ensure!(alpha.qemu_io(0, &["read 0 512"])?.code != 0, "a Secondary can be read");
    alpha.adm(&["primary", "--force", "r0"])?.ok()?;
    alpha.qemu_io(0, &["write -P 0x5a 1M 1M", "flush"])?.ok()?;
    alpha.until("ro:Primary/Secondary ds:UpToDate/UpToDate")?;
    beta.until("ro:Secondary/Primary ds:UpToDate/UpToDate")?;
    let expected = "r0 role:Primary\n  disk:UpToDate\n  peer role:Secondary\n    \
                    replication:Established peer-disk:UpToDate\n\n";
    // What is still on its way after the resync may show as congestion.
    eventually(|| {
        let status = alpha.adm(&["status", "r0"])?.ok()?;
        Ok(if status == expected { Ok(()) } else { Err(status) })
    })?;
    alpha.qemu_io(0, &["write -P 0x33 8M 64k"])?.ok()?;

    ensure!(alpha.stop(Signal::KILL)? == 137, "not killed");
    beta.until("cs:WFConnection ro:Secondary/Unknown ds:UpToDate/DUnknown")?;
    beta.adm(&["primary", "r0"])?.ok()?;
    let read = ["read -P 0x5a 1M 1M", "read -P 0x33 8M 64k", "write -P 0x77 9M 64k"];
    beta.qemu_io(0, &read)?.ok()?;

    alpha.start("")?;
    alpha.adm(&["up", "r0"])?.ok()?;
    alpha.until("cs:Connected ro:Secondary/Primary ds:UpToDate/UpToDate")?;
    let amount = resynced(&alpha.log()?)?;
    // 64 KiB were written alone; the two extents of 4 MiB that were hot here may differ too.
    ensure!((64..=3 * 4096 + 64).contains(&amount), "{amount} KB were resynced");

    beta.adm(&["secondary", "r0"])?.ok()?;
    alpha.adm(&["primary", "r0"])?.ok()?;
    let read = ["read -P 0x5a 1M 1M", "read -P 0x33 8M 64k", "read -P 0x77 9M 64k"];
    alpha.qemu_io(0, &read)?.ok()?;
    alpha.adm(&["verify", "r0"])?.ok()?;
    eventually(|| {
        let log = alpha.log()?;
        Ok(if log.contains("Online verify done") { Ok(()) } else { Err(log) })
    })?;
    ensure!(alpha.proc()?.contains("oos:0\n"), "{}", alpha.proc()?);
    Ok(())
}

fn exit_codes(programs: &Programs) -> Result<()> {
    let mut pair = Pair::new(programs, 2, 8 * MIB, FAST, "")?;
    pair.up("")?;
    let alpha = &pair.nodes[0];
    let show = alpha.setup(&["show", "r0"])?.ok()?;
    let address = |word: &str| {
        let (_, rest) = show.split_once(word)?;
        let (_, rest) = rest.split_once("ipv4 ")?;
        rest.split(';').next().map(str::to_owned)
    };
    let local = address("_this_host").context("an address")?;
    let peer = address("_remote_host").context("an address")?;
    // Command, exit code, and what is said.
    let rows: &[(&[&str], i32, &str)] = &[
        (&["status", "nosuch"], 10, "nosuch: No such resource"),
        (&["role", "7"], 10, "(127) Device minor not allocated"),
        (&["new-minor", "nosuch", "7", "0"], 10, "(158) Unknown resource"),
        (&["new-minor", "r0", "@0", "5"], 10, "(161) Minor or volume exists already"),
        (&["new-minor", "r0", "7", "0"], 10, "(161) Minor or volume exists already"),
        (&["new-resource", "r0"], 10, "(162) Invalid configuration request"),
        (&["del-minor", "@0"], 10, "(160) Minor still configured"),
        (&["del-resource", "r0"], 10, "(125) Device has a net-config"),
        (&["connect", "r0", &local, &peer], 10, "(102) Local address(port) already in use."),
        (
            &["connect", "r0", "127.0.0.1:1", &peer],
            10,
            "(103) Remote address(port) already in use.",
        ),
        (&["connect", "r0", "127.0.0.1:1", "127.0.0.1:2"], 10, "(125) Device has a net-config"),
        (&["disconnect", "127.0.0.1:1", "127.0.0.1:2"], 10, "unknown connection"),
        (&["primary", "@0"], 17, "(-2) Need access to UpToDate data"),
        (&["resume-sync", "@0"], 10, "(135) Sync-pause flag is already cleared"),
        (&["pause-sync", "@0"], 0, ""),
        (&["pause-sync", "@0"], 10, "(134) Sync-pause flag is already set"),
        (&["resume-sync", "@0"], 0, ""),
        (&["new-resource", "r1"], 0, ""),
        (&["new-minor", "r1", "950", "0"], 0, ""),
        (&["invalidate", "950"], 10, "(138) Device does not have a disk-config"),
        (&["resize", "950"], 10, "(138) Device does not have a disk-config"),
        (&["secondary", "950"], 0, ""),
        (&["detach", "950"], 0, ""),
        (&["connect", "r1", "127.0.0.1:3", "127.0.0.1:4", "--cram-hmac-alg=nonsense"], 10, "(120)"),
        (
            &[
                "connect",
                "r1",
                "127.0.0.1:3",
                "127.0.0.1:4",
                "--protocol=A",
                "--allow-two-primaries",
            ],
            10,
            "(139) Protocol C required",
        ),
        (&["del-resource", "r1"], 10, "(159) Resource still in use"),
        (&["del-minor", "950"], 0, ""),
        (&["del-resource", "r1"], 0, ""),
        (&["down", "r1"], 0, ""),
        (&["disk-options", "@0", "--resync-after=@0"], 10, "(133) This would cause a resync-after"),
        (&["disk-options", "@0", "--resync-after=@1"], 0, ""),
        (&["disk-options", "@1", "--resync-after=@0"], 10, "(133) This would cause a resync-after"),
        (&["disk-options", "@0", "--set-defaults", "--fencing=resource-only"], 0, ""),
        (&["net-options", &local, &peer, "--ping-int=7"], 0, ""),
        (&["net-options", &local, &peer, "--csums-alg=nonsense"], 10, "(144) CSUMSAlgNotAvail"),
        (&["resource-options", "r0", "--on-no-data-accessible=suspend-io"], 0, ""),
    ];
    for (words, code, text) in rows {
        let did = alpha.setup(words)?;
        ensure!(did.code == *code && did.err.contains(text), "{words:?}: {did:?}");
    }
    let show = alpha.setup(&["show", "r0"])?.ok()?;
    for line in ["fencing", "resource-only", "ping-int", "on-no-data-accessible", "suspend-io"] {
        ensure!(show.contains(line), "{line} is not in {show}");
    }
    // adjust makes it what the configuration says.
    alpha.adm(&["adjust", "r0"])?.ok()?;
    let show = alpha.setup(&["show", "r0"])?.ok()?;
    ensure!(!show.contains("fencing") && !show.contains("suspend-io"), "{show}");
    ensure!(alpha.adm(&["-d", "adjust", "r0"])?.ok()?.is_empty(), "adjust is never content");

    alpha.adm(&["disconnect", "r0"])?.ok()?;
    let why = alpha.adm(&["why", "r0"])?.ok()?;
    ensure!(why.contains("[disconnected]") && !why.contains("problem"), "{why}");
    alpha.adm(&["connect", "r0"])?.ok()?;
    let why = alpha.adm(&["why", "r0"])?.ok()?;
    ensure!(!why.contains("[disconnected]"), "{why}");
    alpha.adm(&["down", "r0"])?.ok()?;
    ensure!(alpha.setup(&["status"])?.ok()?.is_empty(), "not down");
    alpha.adm(&["up", "r0"])?.ok()?;
    alpha.until("cs:Connected")
}

fn status_file(programs: &Programs) -> Result<()> {
    let mut pair = Pair::new(programs, 1, 16 * MIB, FAST, "")?;
    pair.in_sync("[node]\nstatus-format = \"8.3\"\n")?;
    let alpha = &pair.nodes[0];
    ensure!(alpha.proc()?.starts_with("version: 8.3.11 (api:88/proto:86-96)\n"));
    let path = alpha.run_dir().join("proc-drbd");
    for n in 1..=3_u64 {
        alpha.qemu_io(0, &["write -P 0x11 1M 1M"])?.ok()?;
        let done = Instant::now();
        eventually(|| {
            let text = alpha.proc()?;
            let words = format!(" dw:{} ", n * 1024);
            Ok(if text.contains(&words) { Ok(()) } else { Err(text) })
        })?;
        ensure!(done.elapsed() < Duration::from_secs(2), "late: {:?}", done.elapsed());
    }
    // Nothing moves any more: after a moment nothing is written, and no time is used.
    std::thread::sleep(Duration::from_secs(2));
    let pid = alpha.pid().context("it runs")?;
    let look = || -> Result<(u64, u64)> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let (_, rest) = stat.rsplit_once(')').context("a name")?;
        let mut words = rest.split(' ').skip(12);
        let user: u64 = words.next().context("utime")?.parse()?;
        let system: u64 = words.next().context("stime")?.parse()?;
        Ok((std::fs::metadata(&path)?.ino(), user + system))
    };
    let before = look()?;
    std::thread::sleep(Duration::from_secs(3));
    let after = look()?;
    ensure!(before.0 == after.0, "the file is written again and again");
    ensure!(after.1 - before.1 <= 1, "{} ticks of CPU time while idle", after.1 - before.1);
    Ok(())
}

fn events(programs: &Programs) -> Result<()> {
    let mut pair = Pair::new(programs, 1, 8 * MIB, FAST, "")?;
    pair.up("")?;
    let alpha = &pair.nodes[0];
    let mut child = alpha.setup_command(&["events2", "r0"]).stdout(Stdio::piped()).spawn()?;
    let out = child.stdout.take().context("a pipe")?;
    let (to, lines) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(out).lines().map_while(Result::ok) {
            let _ = to.send(line);
        }
    });
    let mut seen = Vec::new();
    let mut next = |wanted: &str| -> Result<()> {
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let line = lines
                .recv_timeout(left)
                .with_context(|| format!("waiting for {wanted}, after {seen:#?}"))?;
            let is_it = wanted.split('*').all(|part| line.contains(part));
            seen.push(line);
            if is_it {
                return Ok(());
            }
        }
    };
    next("exists resource name:r0 role:Secondary")?;
    next("exists -")?;
    alpha.adm(&["primary", "--force", "r0"])?.ok()?;
    next("change resource name:r0 role:Primary")?;
    next("call helper name:r0*helper:before-resync-source")?;
    next("response helper name:r0*helper:before-resync-source*status:0")?;
    next("change peer-device name:r0*replication:SyncSource")?;
    next("change peer-device name:r0*replication:Established")?;
    alpha.adm(&["down", "r0"])?.ok()?;
    next("change resource name:r0 role:Secondary")?;
    next("destroy connection name:r0")?;
    next("destroy resource name:r0")?;
    child.kill()?;
    child.wait()?;
    Ok(())
}

fn handlers(programs: &Programs) -> Result<()> {
    let mut pair = Pair::new(programs, 1, 8 * MIB, FAST, "")?;
    let script = pair.dir.path().join("helper");
    let out = pair.dir.path().join("calls");
    let text = format!(
        "#!/bin/sh\necho \"$@\" $DRBD_PEER_AF $DRBD_PEER_ADDRESS >> {}\n\
         [ \"$1\" != before-resync-target ] || [ ! -e {}/refuse ] || exit 4\n",
        out.display(),
        pair.dir.path().display()
    );
    std::fs::write(&script, text)?;
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755))?;
    std::fs::write(pair.dir.path().join("refuse"), "")?;
    pair.up(&format!("[node]\nhandler-program = \"{}\"\n", script.display()))?;
    let [alpha, beta] = &pair.nodes;
    alpha.adm(&["primary", "--force", "r0"])?.ok()?;
    // The target's handler says no.
    beta.until("cs:StandAlone")?;
    let log = beta.log()?;
    let line = beta.minors("before-resync-target minor-@0 exit code 4 (0x400)");
    ensure!(log.contains(&line), "{log}");
    ensure!(log.contains("before-resync-target handler returned 4, dropping connection."), "{log}");
    std::fs::remove_file(pair.dir.path().join("refuse"))?;
    beta.adm(&["connect", "r0"])?.ok()?;
    beta.until("cs:Connected ro:Secondary/Primary ds:UpToDate/UpToDate")?;
    let calls = eventually(|| {
        let calls = std::fs::read_to_string(&out)?;
        let is_all = calls.contains(&beta.minors("after-resync-target minor-@0 ipv4 127.0.0.1"));
        Ok(if is_all { Ok(calls) } else { Err(calls) })
    })?;
    let line = beta.minors("before-resync-source minor-@0 ipv4 127.0.0.1");
    ensure!(calls.contains(&line), "{calls}");
    Ok(())
}

/// The daemon knows no configuration: drbdadm, which it calls, finds the file that was given with `-c`.
fn handlers_of_configuration(programs: &Programs) -> Result<()> {
    let mut pair = Pair::new(programs, 1, 8 * MIB, FAST, "")?;
    let out = pair.dir.path().join("calls");
    let say = |handler: &str| {
        format!("{handler} \"echo {handler} $DRBD_RESOURCE $DRBD_MINOR >> {}\";", out.display())
    };
    let [before, after] = ["before-resync-target", "after-resync-target"].map(say);
    pair.configure(&format!("{FAST}\n  handlers {{ {before} {after} }}"))?;
    pair.up("")?;
    let [alpha, beta] = &pair.nodes;
    alpha.adm(&["primary", "--force", "r0"])?.ok()?;
    beta.until("ds:UpToDate/UpToDate")?;
    let minor = beta.minors("@0");
    let expected = format!("before-resync-target r0 {minor}\nafter-resync-target r0 {minor}\n");
    let called = eventually(|| {
        let calls = std::fs::read_to_string(&out).unwrap_or_default();
        Ok(if calls == expected { Ok(()) } else { Err(calls) })
    });
    called.with_context(|| beta.log_tail())?;
    let link = beta.run_dir().join(beta.minors("drbd-minor-@0.conf"));
    ensure!(std::fs::read_link(&link)? == beta.conf(), "{}", link.display());
    beta.adm(&["down", "r0"])?.ok()?;
    ensure!(std::fs::read_link(&link).is_err(), "{} is left", link.display());
    Ok(())
}

fn sigterm(programs: &Programs) -> Result<()> {
    let mut pair = Pair::new(programs, 1, 8 * MIB, FAST, "")?;
    pair.in_sync("")?;
    let [alpha, beta] = &mut pair.nodes;
    let second = alpha.second_daemon()?;
    ensure!(second.code == 1 && second.err.contains("another drbdrs runs already"), "{second:?}");
    alpha.qemu_io(0, &["write -P 0x42 0 1M"])?.ok()?;
    // A client that stays must not keep it from ending.
    let client = drbdrs_workload::nbd::Client::open(&alpha.server())?;
    ensure!(alpha.setup(&["secondary", "@0"])?.code == 11, "demoted while it is used");
    let start = Instant::now();
    ensure!(alpha.stop(Signal::TERM)? == 0, "not a clean end");
    ensure!(start.elapsed() < Duration::from_secs(8), "slow: {:?}", start.elapsed());
    drop(client);
    for name in ["drbdrs.sock", "nbd.sock", "proc-drbd"] {
        ensure!(!alpha.run_dir().join(name).exists(), "{name} is left");
    }
    // The peer was told, and nothing is to be recovered.
    beta.until("cs:WFConnection ro:Secondary/Unknown")?;
    alpha.start("")?;
    let did = alpha.adm(&["up", "r0"])?;
    ensure!(did.code == 0 && !did.err.contains("Marked additional"), "{did:?}");
    alpha.until("cs:Connected ro:Secondary/Secondary ds:UpToDate/UpToDate")?;
    ensure!(!alpha.log()?.contains("Began resync"), "{}", alpha.log()?);
    Ok(())
}

fn meta_data_in_use(programs: &Programs) -> Result<()> {
    let mut pair = Pair::new(programs, 1, 8 * MIB, FAST, "")?;
    pair.in_sync("")?;
    let alpha = &pair.nodes[0];
    let minor = alpha.minors("@0");
    let changes: [&[&str]; 5] =
        [&["outdate"], &["wipe-md"], &["create-md"], &["apply-al"], &["set-gi", "1:2:3:4"]];
    let holder = format!("held by pid:{}", alpha.pid().context("it runs")?);
    for words in changes.iter().map(|words| [words, &["--force"][..]].concat()) {
        let did = alpha.meta("@0", 0, &words)?;
        let said = format!("Device '{minor}' is configured!\n");
        ensure!(did.code == 20 && did.err == said, "{words:?}: {did:?}");
        // Who does not say which minor it is finds the file held.
        let did = alpha.meta("-", 0, &words)?;
        ensure!(did.code == 20 && did.err.contains(&holder), "{words:?}: {did:?}");
    }
    let did = alpha.meta("@0", 0, &["show-gi", "--force"])?;
    let stale = format!("# Output might be stale, since minor {minor} is attached\n");
    ensure!(did.code == 0 && did.err.ends_with(&stale), "{did:?}");
    // The log is in use, so a dump is marked as one that is not to be restored.
    let did = alpha.meta("@0", 0, &["dump-md"])?;
    ensure!(did.code == 20 && did.err.contains(&holder), "{did:?}");
    let did = alpha.meta("@0", 0, &["dump-md", "--force"])?;
    ensure!(did.code == 0 && did.out.contains("unclean_meta_data_dump"), "{did:?}");
    alpha.adm(&["down", "r0"])?.ok()?;
    alpha.meta("@0", 0, &["outdate"])?.ok()?;
    Ok(())
}

fn resync_after(programs: &Programs) -> Result<()> {
    let mut pair = Pair::new(programs, 2, 16 * MIB, SLOW, "disk { resync-after r0/0; }")?;
    pair.up("")?;
    let [alpha, beta] = &pair.nodes;
    alpha.adm(&["primary", "--force", "r0"])?.ok()?;
    beta.until("@1: cs:PausedSyncT")?;
    let text = beta.proc()?;
    ensure!(text.contains(&beta.minors("@0: cs:SyncTarget")), "{text}");
    let why = beta.adm(&["why", "r0"])?.ok()?;
    ensure!(why.contains(&beta.minors("waits for the resync of minor @0")), "{why}");
    beta.until("@1: cs:SyncTarget")?;
    let text = beta.proc()?;
    ensure!(text.contains(&beta.minors("@0: cs:Connected")), "{text}");
    beta.until("@1: cs:Connected")
}

fn faults(programs: &Programs) -> Result<()> {
    let mut pair = Pair::new(programs, 1, 8 * MIB, FAST, "")?;
    pair.in_sync("")?;
    let alpha = &pair.nodes[0];
    alpha.setup(&["fault-disk", "@0", "--operation=write", "--effect=stall"])?.ok()?;
    for words in [["status", "r0"], ["why", "r0"]] {
        let text = alpha.setup(&words)?.ok()?;
        ensure!(text.to_lowercase().contains("fault"), "{words:?}: {text}");
    }
    let mut client = std::process::Command::new("qemu-io")
        .args(["-f", "raw", "-c", "write -P 0x42 0 64k", &alpha.uri(0)])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()?;
    eventually(|| {
        let text = alpha.setup(&["show-stuck", "r0"])?.ok()?;
        Ok(if text.contains("requests to the disk, the oldest I/O") { Ok(()) } else { Err(text) })
    })?;
    // The status is there although a disk stands still.
    ensure!(alpha.proc()?.contains("cs:Connected"), "{}", alpha.proc()?);
    alpha.setup(&["fault-clear"])?.ok()?;
    ensure!(client.wait()?.success(), "the write was not completed");
    let text = alpha.setup(&["status", "r0"])?.ok()?;
    ensure!(!text.to_lowercase().contains("fault"), "{text}");
    Ok(())
}

fn admin_socket(programs: &Programs) -> Result<()> {
    let mut pair = Pair::new(programs, 1, 8 * MIB, FAST, "")?;
    pair.in_sync("")?;
    let [alpha, beta] = &pair.nodes;
    let socket = beta.socket();
    let say = |bytes: &[u8]| -> Result<String> {
        let mut stream = UnixStream::connect(&socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        // The daemon may have closed it before all is sent.
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        Ok(answer)
    };
    let oversized = [b'x'; 70_000];
    let deep = [b'['; 60_000];
    let garbage: [&[u8]; 6] = [b"", b"half", b"\n", b"\xff\n", &oversized, &deep];
    for bytes in garbage {
        let answer = say(bytes)?;
        let is_fine = answer.is_empty() || answer.contains("\"code\":126");
        ensure!(is_fine, "{answer}");
    }
    let two = br#"{"version":1,"request":{"command":"status","target":"all"}}
{"version":2,"request":{"command":"status","target":"all"}}
"#;
    let answer = say(two)?;
    ensure!(answer.lines().count() == 3 && answer.contains("only 1"), "{answer}");
    // More than it takes: those beyond are refused, and all is well when they are gone.
    let crowd: Vec<_> = (0..700).map_while(|_| UnixStream::connect(&socket).ok()).collect();
    drop(crowd);
    eventually(|| {
        let did = beta.setup(&["role", "@0"])?;
        Ok(if did.code == 0 { Ok(()) } else { Err(format!("{did:?}")) })
    })?;

    // A command that cannot end says what it waits for, and others go on.
    beta.setup(&["fault-disk", "@0", "--operation=any", "--effect=stall"])?.ok()?;
    let mut writer = std::process::Command::new("qemu-io")
        .args(["-f", "raw", "-c", "write -P 0x42 0 64k", &alpha.uri(0)])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()?;
    eventually(|| {
        let text = beta.setup(&["show-stuck", "r0"])?.ok()?;
        Ok(if text.contains("answers are owed to the peer") { Ok(()) } else { Err(text) })
    })?;
    let mut envelope =
        Request::Detach { target: Target::Resource("r0".into()), force: false }.enveloped();
    envelope.timeout_ms = Some(1500);
    let mut client = Client::connect(&socket)?;
    client.send(&envelope)?;
    let start = Instant::now();
    let mut waits = Vec::new();
    let reply = loop {
        match client.next(Some(Duration::from_secs(20)))?.context("an answer")? {
            Answer::Waiting { reason } => {
                waits.push(reason);
                let asked = Instant::now();
                beta.setup(&["status"])?.ok()?;
                ensure!(asked.elapsed() < Duration::from_secs(10), "status is slow");
            }
            Answer::Done(reply) => break reply,
            other => anyhow::bail!("{other:?}"),
        }
    };
    ensure!(start.elapsed() < Duration::from_secs(15), "no deadline: {:?}", start.elapsed());
    let info = reply.info.join(" ");
    ensure!(reply.code == 129 && info.contains("waiting for"), "{reply:?}");
    ensure!(waits.iter().all(|reason| reason.contains("(r0)")) && !waits.is_empty(), "{waits:?}");
    beta.setup(&["fault-clear"])?.ok()?;
    beta.until("ds:Diskless/UpToDate")?;
    ensure!(writer.wait()?.success(), "the write was not completed");
    Ok(())
}
