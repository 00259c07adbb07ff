//! What happens to a pair under load when disks are full or fail, a peer stops, or connections
//! half die: clients go on, and no acknowledged write is lost.

use std::os::unix::fs::{FileExt as _, symlink};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use drbdrs_tests::load::Load;
use drbdrs_tests::need::{Need, trial};
use drbdrs_tests::nodes::{Node, Pair, Programs, eventually};
use drbdrs_workload::ledger::Loss;
use drbdrs_workload::nbd::Client;
use libtest_mimic::{Arguments, Failed, Trial};
use rustix::process::Signal;

const MIB: u64 = 1 << 20;
const FAST: &str = "disk { c-plan-ahead 0; resync-rate 100M; c-min-rate 0; }";
const SETTINGS: &str = "[node]\nhandler-program = \"/bin/true\"\n";

type Body = fn(&Programs) -> Result<()>;

fn main() {
    let args = Arguments::from_args();
    let tests: [(&str, &[Need], Body); 13] = [
        ("a_full_disk_of_the_secondary", &[Need::Root], |p| disk_full(p, 1)),
        ("a_full_disk_of_the_primary", &[Need::Root], |p| disk_full(p, 0)),
        ("a_failing_disk_and_every_policy", &[], failing_disk),
        ("a_failing_disk_without_a_peer", &[], failing_alone),
        ("a_stopped_secondary", &[], |p| stopped(p, 1)),
        ("a_stopped_primary", &[], |p| stopped(p, 0)),
        ("half_dead_connections", &[], half_dead),
        ("packets_of_one_type_are_held", &[], held_packets),
        ("a_slow_link", &[], slow_link),
        ("a_bad_area_of_a_disk", &[], bad_area),
        ("online_verify_finds_a_corruption", &[], corruption),
        ("a_device_grows_under_load", &[], grow),
        ("the_activity_log_is_reshaped_under_load", &[], reshape),
    ];
    let trials: Vec<Trial> = tests
        .into_iter()
        .map(|(name, needs, body)| {
            trial(name, needs, move || {
                body(&Programs::build()).map_err(|e| Failed::from(format!("{e:#}")))
            })
        })
        .collect();
    libtest_mimic::run(&args, trials).exit();
}

/// Adds the logs to an error.
fn told<T>(pair: &Pair, result: Result<T>) -> Result<T> {
    result.with_context(|| pair.log_tails())
}

fn work(time: u64) {
    std::thread::sleep(Duration::from_millis(time));
}

/// Waits until the disk of a node that failed is gone, or only good for a resync.
fn until_degraded(node: &Node, disk: &str) -> Result<()> {
    node.until(&format!("ds:{disk}/"))
}

/// A file system of its own for a disk; it goes away when dropped.
struct Small(PathBuf);

impl Small {
    fn mount(dir: PathBuf, options: &str) -> Result<Self> {
        std::fs::create_dir(&dir)?;
        mount(&["-t", "tmpfs", "-o", options, "none"], &dir)?;
        Ok(Self(dir))
    }

    fn remount(&self, options: &str) -> Result<()> {
        mount(&["-o", &format!("remount,{options}")], &self.0)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // Lazily: the daemon may still have it open.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn mount(words: &[&str], dir: &PathBuf) -> Result<()> {
    ensure!(Command::new("mount").args(words).arg(dir).status()?.success(), "mount {words:?}");
    Ok(())
}

fn disk_full(programs: &Programs, full: usize) -> Result<()> {
    let mut pair = Pair::new(programs, 1, 24 * MIB, FAST, "")?;
    let small = Small::mount(pair.nodes[full].dir.join("small"), "size=8m")?;
    let disk = pair.nodes[full].disk(0);
    std::fs::File::create(small.0.join("disk"))?.set_len(24 * MIB)?;
    std::fs::remove_file(&disk)?;
    symlink(small.0.join("disk"), &disk)?;
    pair.in_sync(SETTINGS)?;
    let result = full_and_back(&pair, full, &small);
    let result = told(&pair, result);
    // Before the file system goes.
    drop(pair);
    result
}

fn full_and_back(pair: &Pair, full: usize, small: &Small) -> Result<()> {
    let mut load = Load::new(pair, 1)?;
    let alpha = &pair.nodes[0];
    let running = load.begin(alpha, 1)?;
    until_degraded(&pair.nodes[full], "Diskless")?;
    work(300);
    load.end_well(running)?;
    load.verify(alpha, Loss::Nothing)?;
    small.remount("size=64m")?;
    let running = load.begin(alpha, 2)?;
    pair.nodes[full].adm(&["attach", "r0"])?.ok()?;
    pair.until_in_sync()?;
    load.end_well(running)?;
    load.verify(alpha, Loss::Nothing)?;
    load.until_equal()
}

/// Operation, effect of the policy on the disk, policy, which node, what its log says.
type Failing = (&'static str, &'static str, &'static str, usize, &'static str);

const FAILING: [Failing; 8] = [
    ("write", "detach", "Diskless", 0, "Local IO failed in"),
    ("write", "detach", "Diskless", 1, "Local IO failed in"),
    ("read", "detach", "Diskless", 0, "Local IO failed in"),
    ("meta-write", "pass_on", "Diskless", 0, "Local IO failed in"),
    ("write", "pass_on", "Inconsistent", 0, "Local IO failed in"),
    ("write", "pass_on", "Inconsistent", 1, "Local IO failed in"),
    ("read", "pass_on", "Inconsistent", 0, "Local IO failed in"),
    ("write", "call-local-io-error", "Diskless", 0, "local-io-error minor-@0 exit code 0"),
];

fn failing_disk(programs: &Programs) -> Result<()> {
    let mut pair = Pair::new(programs, 1, 12 * MIB, FAST, "")?;
    pair.in_sync(SETTINGS)?;
    let mut load = Load::new(&pair, 1)?;
    for row in FAILING {
        let result = fail(&pair, &mut load, row);
        told(&pair, result).with_context(|| format!("{row:?}"))?;
    }
    Ok(())
}

fn fail(pair: &Pair, load: &mut Load, row: Failing) -> Result<()> {
    let (operation, policy, becomes, which, says) = row;
    let (alpha, failing) = (&pair.nodes[0], &pair.nodes[which]);
    let policy = format!("on-io-error {policy}; }}");
    pair.configure(&FAST.replace('}', &policy))?;
    pair.nodes.iter().try_for_each(|node| node.adm(&["adjust", "r0"])?.ok().map(drop))?;
    let start = failing.log()?.len();
    let is_meta = operation == "meta-write";
    if is_meta {
        // The activity log of a disk that was just attached is empty: the first write changes it.
        set_fault(failing, operation, 1000)?;
    }
    let running = load.begin(alpha, 1)?;
    work(100);
    if !is_meta {
        set_fault(failing, operation, 50)?;
    }
    until_degraded(failing, becomes)?;
    work(200);
    load.end_well(running)?;
    failing.setup(&["fault-clear"])?.ok()?;
    load.verify(alpha, Loss::Nothing)?;
    let log = failing.log()?;
    let says = failing.minors(says);
    ensure!(log.get(start..).unwrap_or_default().contains(&says), "{says:?} is not in the log");
    if becomes == "Inconsistent" {
        failing.adm(&["detach", "r0"])?.ok()?;
    }
    failing.adm(&["attach", "r0"])?.ok()?;
    pair.until_in_sync()?;
    load.verify(alpha, Loss::Nothing)?;
    load.until_equal()
}

fn set_fault(node: &Node, operation: &str, permille: u32) -> Result<()> {
    let operation = format!("--operation={operation}");
    let permille = format!("--permille={permille}");
    let words = ["fault-disk", "@0", &operation, "--effect=error", &permille];
    node.setup(&words)?.ok().map(drop)
}

/// Then requests fail, and what was acknowledged before is there when the disk is.
fn failing_alone(programs: &Programs) -> Result<()> {
    let mut pair = Pair::new(programs, 1, 12 * MIB, FAST, "")?;
    pair.in_sync(SETTINGS)?;
    let mut load = Load::new(&pair, 1)?;
    ensure!(pair.nodes[1].stop(Signal::KILL)? == 137, "not killed");
    let result = alone(&pair, &mut load);
    told(&pair, result)?;
    pair.nodes[1].start(SETTINGS)?;
    pair.nodes[1].adm(&["up", "r0"])?.ok()?;
    pair.until_in_sync()?;
    load.verify(&pair.nodes[0], Loss::Nothing)?;
    load.until_equal()
}

fn alone(pair: &Pair, load: &mut Load) -> Result<()> {
    let alpha = &pair.nodes[0];
    alpha.until("cs:WFConnection")?;
    let running = load.begin(alpha, 1)?;
    work(300);
    set_fault(alpha, "write", 50)?;
    until_degraded(alpha, "Diskless")?;
    work(100);
    let report = load.end(running)?;
    ensure!(report.errors > 0 && report.lost == 0, "{report:?}");
    alpha.setup(&["fault-clear"])?.ok()?;
    alpha.adm(&["attach", "r0"])?.ok()?;
    alpha.until("ds:UpToDate/")?;
    load.verify(alpha, Loss::Nothing)?;
    let running = load.begin(alpha, 2)?;
    work(200);
    load.end_well(running).map(drop)
}

/// Short enough to see in a test that the peer is silent.
const IMPATIENT: &str = "disk { c-plan-ahead 0; resync-rate 100M; c-min-rate 0; }
  net { ping-int 1; ping-timeout 3; timeout 8; ko-count 2; connect-int 1; }";

fn stopped(programs: &Programs, which: usize) -> Result<()> {
    let mut pair = Pair::new(programs, 1, 24 * MIB, IMPATIENT, "")?;
    pair.in_sync(SETTINGS)?;
    let mut load = Load::new(&pair, 1)?;
    let result = stop_and_go_on(&pair, which, &mut load);
    told(&pair, result)
}

fn stop_and_go_on(pair: &Pair, which: usize, load: &mut Load) -> Result<()> {
    let [alpha, beta] = &pair.nodes;
    let (stopped, other) = (&pair.nodes[which], &pair.nodes[1 - which]);
    let running = load.begin(alpha, 1)?;
    work(200);
    stopped.signal(Signal::STOP)?;
    let lost = other.until("cs:WFConnection");
    let before = running.count();
    if which == 1 {
        work(500);
        ensure!(running.count() > before, "nothing was written without the peer");
    }
    stopped.signal(Signal::CONT)?;
    lost?;
    pair.until_in_sync()?;
    work(200);
    load.end_well(running)?;
    load.verify(alpha, Loss::Nothing)?;
    load.until_equal()?;
    alpha.adm(&["secondary", "r0"])?.ok()?;
    beta.adm(&["primary", "r0"])?.ok()?;
    load.verify(beta, Loss::Nothing).map(drop)
}

/// One of the two sockets of one node says and hears nothing any more, and nobody is told.
fn half_dead(programs: &Programs) -> Result<()> {
    let mut pair = Pair::new(programs, 1, 24 * MIB, IMPATIENT, "")?;
    pair.in_sync(SETTINGS)?;
    let mut load = Load::new(&pair, 1)?;
    for (which, stream) in [(0, "data"), (1, "data"), (0, "meta"), (1, "meta")] {
        let result = stall(&pair, &mut load, which, stream);
        told(&pair, result).with_context(|| format!("{stream} of node {which}"))?;
    }
    Ok(())
}

fn stall(pair: &Pair, load: &mut Load, which: usize, stream: &str) -> Result<()> {
    let alpha = &pair.nodes[0];
    let running = load.begin(alpha, 1)?;
    work(200);
    let stream = format!("--stream={stream}");
    let node = &pair.nodes[which];
    node.setup(&["fault-stream", "r0", &stream, "--effect=stall"])?.ok()?;
    for node in &pair.nodes {
        eventually(|| {
            let text = node.proc()?;
            let is_lost = !text.contains("/UpToDate");
            Ok(if is_lost { Ok(()) } else { Err(text) })
        })?;
    }
    let before = running.count();
    work(500);
    ensure!(running.count() > before, "nothing was written without the peer");
    node.setup(&["fault-clear"])?.ok()?;
    pair.until_in_sync()?;
    work(200);
    load.end_well(running)?;
    load.verify(alpha, Loss::Nothing)?;
    load.until_equal()
}

/// What the peer waits for does not come, and nothing is acknowledged too early; a held packet on the
/// way to the end of a resync delays it only.
fn held_packets(programs: &Programs) -> Result<()> {
    let mut pair = Pair::new(programs, 1, 24 * MIB, FAST, "")?;
    pair.in_sync(SETTINGS)?;
    let mut load = Load::new(&pair, 1)?;
    for (which, packet) in
        [(0, "P_DATA"), (1, "P_DATA"), (1, "P_WRITE_ACK"), (0, "P_BARRIER_ACK"), (0, "P_BARRIER")]
    {
        let result = hold(&pair, &mut load, which, packet);
        told(&pair, result).with_context(|| format!("{packet} at node {which}"))?;
    }
    for (packet, code) in [("P_DATEN", 10), ("P_AUTH_CHALLENGE", 10)] {
        let did = pair.nodes[0].setup(&["fault-packet", "r0", &format!("--packet={packet}")])?;
        ensure!(did.code == code && did.err.contains(packet), "{did:?}");
    }
    let result = hold_in_resync(&pair, &mut load);
    told(&pair, result)
}

fn hold(pair: &Pair, load: &mut Load, which: usize, packet: &str) -> Result<()> {
    let (alpha, node) = (&pair.nodes[0], &pair.nodes[which]);
    let running = load.begin(alpha, 1)?;
    work(200);
    node.setup(&["fault-packet", "r0", &format!("--packet={packet}")])?.ok()?;
    let status = node.setup(&["status", "r0"])?.ok()?;
    ensure!(status.contains(&format!("{packet} of r0")), "{status}");
    // Protocol C: what the clients wait for is stuck in that stream, or comes to stand behind it.
    let mut before = running.count();
    eventually(|| {
        work(400);
        let now = running.count();
        let has_stopped = now == before;
        before = now;
        Ok(if has_stopped || packet == "P_BARRIER_ACK" { Ok(()) } else { Err(now.to_string()) })
    })?;
    ensure!(node.proc()?.contains("cs:Connected"), "{}", node.proc()?);
    node.setup(&["fault-clear"])?.ok()?;
    eventually(|| {
        let now = running.count();
        Ok(if now > before { Ok(()) } else { Err(format!("still {now} writes")) })
    })?;
    load.end_well(running)?;
    load.verify(alpha, Loss::Nothing)?;
    load.until_equal()
}

fn hold_in_resync(pair: &Pair, load: &mut Load) -> Result<()> {
    let [alpha, beta] = &pair.nodes;
    beta.adm(&["disconnect", "r0"])?.ok()?;
    let running = load.begin(alpha, 2)?;
    work(300);
    load.end_well(running)?;
    beta.setup(&["fault-packet", "r0", "--packet=P_RS_WRITE_ACK"])?.ok()?;
    beta.adm(&["connect", "r0"])?.ok()?;
    alpha.until("cs:SyncSource")?;
    work(500);
    alpha.until("cs:SyncSource ro:Primary/Secondary ds:UpToDate/Inconsistent")?;
    beta.setup(&["fault-clear"])?.ok()?;
    pair.until_in_sync()?;
    load.verify(alpha, Loss::Nothing)?;
    load.until_equal()
}

/// Each write takes as long as the way there and back, and the connection stays.
fn slow_link(programs: &Programs) -> Result<()> {
    let mut pair = Pair::new(programs, 1, 24 * MIB, FAST, "")?;
    pair.in_sync(SETTINGS)?;
    let [alpha, beta] = &pair.nodes;
    alpha.setup(&["fault-stream", "r0", "--stream=data", "--effect=delay", "--delay=80"])?.ok()?;
    beta.setup(&["fault-stream", "r0", "--stream=meta", "--effect=delay", "--delay=70"])?.ok()?;
    let mut load = Load::new(&pair, 1)?;
    let running = load.begin(alpha, 1)?;
    work(1000);
    load.end_well(running)?;
    load.verify(alpha, Loss::Nothing)?;
    load.until_equal()?;
    let mut client = Client::open(&alpha.server())?;
    let start = std::time::Instant::now();
    client.write(0, &[1; 4096])?;
    ensure!(start.elapsed() >= Duration::from_millis(150), "{:?}", start.elapsed());
    let (start, log) = (std::time::Instant::now(), alpha.log()?);
    ensure!(!log.contains("PingAck did not arrive"), "the connection was lost");
    for node in &pair.nodes {
        node.setup(&["fault-clear"])?.ok()?;
    }
    client.write(0, &[2; 4096])?;
    ensure!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    Ok(())
}

/// Only what touches the area fails.
fn bad_area(programs: &Programs) -> Result<()> {
    let body = FAST.replace('}', "on-io-error pass_on; }");
    let mut pair = Pair::new(programs, 1, 24 * MIB, &body, "")?;
    pair.in_sync(SETTINGS)?;
    let alpha = &pair.nodes[0];
    let place = ["fault-disk", "@0", "--operation=write", "--effect=error", "--sectors=2048+8"];
    alpha.setup(&place)?.ok()?;
    let mut client = Client::open(&alpha.server())?;
    client.write(MIB - 4096, &[1; 4096])?;
    client.write(MIB + 4096, &[1; 4096])?;
    ensure!(alpha.proc()?.contains("ds:UpToDate/UpToDate"), "{}", alpha.proc()?);
    client.write(MIB - 4096, &[2; 8192])?;
    until_degraded(alpha, "Inconsistent")?;
    let mut bytes = vec![0; 8192];
    client.read(MIB - 4096, &mut bytes)?;
    ensure!(bytes == [2; 8192], "read {} and {}\n{}", bytes[0], bytes[4096], alpha.log_tail());
    let wrong = ["fault-disk", "@0", "--operation=flush", "--effect=error", "--sectors=0+8"];
    ensure!(alpha.setup(&wrong)?.code == 10, "a flush has no place");
    Ok(())
}

fn corruption(programs: &Programs) -> Result<()> {
    let net = "net { verify-alg sha1; }";
    let mut pair = Pair::new(programs, 1, 12 * MIB, &format!("{FAST} {net}"), "")?;
    pair.in_sync(SETTINGS)?;
    let mut load = Load::new(&pair, 1)?;
    let [alpha, beta] = &pair.nodes;
    let running = load.begin(alpha, 1)?;
    work(500);
    load.end_well(running)?;
    load.until_equal()?;
    // A disk that has changed by itself: in one block, and over the border of two.
    let disk = std::fs::File::options().read(true).write(true).open(beta.disk(0))?;
    for (at, len) in [(3 * MIB + 4096 + 17, 1), (5 * MIB - 512, 1024)] {
        let mut bytes = vec![0; len];
        disk.read_exact_at(&mut bytes, at)?;
        bytes.iter_mut().for_each(|byte| *byte ^= 0x40);
        disk.write_all_at(&bytes, at)?;
    }
    disk.sync_all()?;
    alpha.adm(&["verify", "r0"])?.ok()?;
    let found = "Online verify found 3 4k block out of sync!";
    let said = eventually(|| {
        let logs = alpha.log()? + &beta.log()?;
        Ok(if logs.contains(found) { Ok(()) } else { Err(pair.nodes[0].log_tail()) })
    });
    told(&pair, said)?;
    for node in &pair.nodes {
        node.until("oos:12\n")?;
    }
    // As an administrator does it: what was found is copied when they connect again.
    beta.adm(&["disconnect", "r0"])?.ok()?;
    let running = load.begin(alpha, 2)?;
    work(200);
    beta.adm(&["connect", "r0"])?.ok()?;
    alpha.until("cs:Connected ro:Primary/Secondary ds:UpToDate/UpToDate")?;
    load.end_well(running)?;
    load.verify(alpha, Loss::Nothing)?;
    load.until_equal()
}

fn grow(programs: &Programs) -> Result<()> {
    let mut pair = Pair::new(programs, 1, 12 * MIB, FAST, "")?;
    pair.in_sync(SETTINGS)?;
    let mut load = Load::new(&pair, 1)?;
    let result = grow_under_load(&pair, &mut load);
    told(&pair, result)
}

fn grow_under_load(pair: &Pair, load: &mut Load) -> Result<()> {
    let [alpha, beta] = &pair.nodes;
    let old = Client::open(&alpha.server())?.size();
    let running = load.begin(alpha, 1)?;
    for node in &pair.nodes {
        std::fs::File::options().write(true).open(node.disk(0))?.set_len(20 * MIB)?;
    }
    work(200);
    alpha.adm(&["resize", "r0"])?.ok()?;
    work(200);
    pair.until_in_sync()?;
    load.end_well(running)?;
    load.verify(alpha, Loss::Nothing)?;
    load.until_equal()?;
    let mut client = Client::open(&alpha.server())?;
    let size = client.size();
    ensure!(size >= old + 8 * MIB - 4096, "{old} bytes have become {size}");
    client.write(size - 4096, &[0x77; 4096])?;
    drop(client);
    // The meta-data have moved: both find them again.
    for node in [beta, alpha] {
        node.until("ap:0 ")?;
        node.adm(&["down", "r0"]).and_then(|did| did.ok()).or_else(|_| {
            node.adm(&["secondary", "r0"])?.ok()?;
            node.adm(&["down", "r0"])?.ok()
        })?;
    }
    for node in &pair.nodes {
        node.adm(&["up", "r0"])?.ok()?;
    }
    pair.until_in_sync()?;
    beta.adm(&["primary", "r0"])?.ok()?;
    let mut client = Client::open(&beta.server())?;
    ensure!(client.size() == size, "{} bytes after a restart", client.size());
    let mut end = vec![0; 4096];
    client.read(size - 4096, &mut end)?;
    ensure!(end == [0x77; 4096], "the new end is not there");
    load.verify(beta, Loss::Nothing)?;
    load.until_equal()
}

fn reshape(programs: &Programs) -> Result<()> {
    let mut pair = Pair::new(programs, 1, 12 * MIB, FAST, "")?;
    pair.in_sync(SETTINGS)?;
    let mut load = Load::new(&pair, 1)?;
    let result = reshape_under_load(&pair, &mut load);
    told(&pair, result)
}

fn reshape_under_load(pair: &Pair, load: &mut Load) -> Result<()> {
    let alpha = &pair.nodes[0];
    let shape = ["resize", "@0", "--al-stripes=4", "--al-stripe-size-kB=32"];
    let did = alpha.setup(&shape)?;
    ensure!(did.code == 10 && did.err.contains("(170)"), "it would shrink: {did:?}");
    let running = load.begin(alpha, 1)?;
    for node in &pair.nodes {
        std::fs::File::options().write(true).open(node.disk(0))?.set_len(14 * MIB)?;
    }
    work(200);
    alpha.setup(&shape)?.ok()?;
    let log = alpha.log()?;
    ensure!(log.contains("Changed AL layout to al-stripes = 4, al-stripe-size-kB = 32"), "{log}");
    work(200);
    pair.until_in_sync()?;
    load.end_well(running)?;
    load.verify(alpha, Loss::Nothing)?;
    load.until_equal()?;
    // The shape is found again.
    alpha.adm(&["secondary", "r0"])?.ok()?;
    alpha.adm(&["down", "r0"])?.ok()?;
    alpha.adm(&["apply-al", "r0"])?.ok()?;
    let dump = alpha.adm(&["dump-md", "r0"])?.ok()?;
    ensure!(dump.contains("al-stripes 4;") && dump.contains("al-stripe-size-4k 8;"), "{dump}");
    alpha.adm(&["up", "r0"])?.ok()?;
    pair.until_in_sync()?;
    alpha.adm(&["primary", "r0"])?.ok()?;
    let running = load.begin(alpha, 2)?;
    work(200);
    load.end_well(running)?;
    load.verify(alpha, Loss::Nothing)?;
    load.until_equal()
}
