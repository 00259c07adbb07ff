//! `cargo xtask demo`: two nodes, a workload, a crash, a fail-over, a resync; without root, in a new
//! directory, on loopback.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use drbdrs_workload::journal::{Durability, Journal};
use drbdrs_workload::ledger::Loss;
use drbdrs_workload::nbd::Server;
use drbdrs_workload::run::{Plan, Running, start};
use drbdrs_workload::verify::verify;
use rustix::process::{Pid, Signal, kill_process};

use crate::run::{self, Failure};

const EXPORT: &str = "r0/0";
/// Sectors that the workload uses: 32 MiB.
const SECTORS: u64 = 32 << 11;
/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(60);

/// Builds, and shows it. With `keep` the pair stays.
pub(crate) fn demo(keep: bool, debug: bool) -> Result<(), Failure> {
    let mut words = vec!["build", "--bins", "-p", "drbdrs", "-p", "drbdadm", "-p", "drbdmeta"];
    if !debug {
        words.push("--release");
    }
    run::cargo(&words)?;
    let start = Instant::now();
    let bin = target_dir()?.join(if debug { "debug" } else { "release" });
    let dir = std::env::temp_dir().join(format!("drbdrs-demo-{}", std::process::id()));
    fs::create_dir(&dir)?;
    let mut pair = Pair::new(&bin, &dir)?;
    let result = walk(&mut pair);
    if result.is_err() {
        for node in &pair.nodes {
            println!("\nthe end of the log of {}:", node.name);
            let log = fs::read_to_string(node.dir.join("log")).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            println!("{}", lines[lines.len().saturating_sub(15)..].join("\n"));
        }
    }
    if keep && result.is_ok() {
        next_steps(&pair);
        for node in &mut pair.nodes {
            node.child = None;
        }
    } else {
        println!("\n== both daemons are ended");
        for node in &mut pair.nodes {
            node.terminate();
        }
        fs::remove_dir_all(&dir)?;
        println!("`cargo xtask demo --keep` leaves them running, to try things.");
    }
    println!("(took {} s after the build)", start.elapsed().as_secs());
    result
}

fn target_dir() -> Result<PathBuf, Failure> {
    let metadata = cargo_metadata::MetadataCommand::new()
        .current_dir(run::top())
        .no_deps()
        .exec()
        .map_err(|e| Failure(e.to_string()))?;
    Ok(metadata.target_directory.into_std_path_buf())
}

struct Node {
    name: &'static str,
    dir: PathBuf,
    bin: PathBuf,
    conf: PathBuf,
    child: Option<Child>,
}

struct Pair {
    nodes: [Node; 2],
    conf: PathBuf,
}

impl Pair {
    fn new(bin: &Path, dir: &Path) -> Result<Self, Failure> {
        let conf = dir.join("drbd.conf");
        let minor = 20_000 + std::process::id() % 400_000 * 2;
        let mut text = String::from(
            "global { usage-count no; }\nresource r0 {\n  disk { c-plan-ahead 0; resync-rate 40M; }\n  \
             net { verify-alg crc32c; }\n",
        );
        for (name, (minor, port)) in ["alpha", "bravo"].into_iter().zip((minor..).zip(ports()?)) {
            fs::create_dir(dir.join(name))?;
            let disk = dir.join(name).join("disk");
            fs::File::create(&disk)?.set_len(128 << 20)?;
            text += &format!(
                "  on {name} {{\n    device minor {minor};\n    disk {};\n    meta-disk internal;\n    \
                 address 127.0.0.1:{port};\n  }}\n",
                disk.display()
            );
        }
        text += "}\n";
        fs::write(&conf, &text)?;
        println!("\n== {}\n{text}", conf.display());
        let node = |name| Node {
            name,
            dir: dir.join(name),
            bin: bin.into(),
            conf: conf.clone(),
            child: None,
        };
        Ok(Self { nodes: [node("alpha"), node("bravo")], conf })
    }
}

/// Two ports that nobody has, below those that outgoing connections get.
fn ports() -> Result<[u16; 2], Failure> {
    let start = u16::try_from(std::process::id() % 9_000).unwrap_or(0);
    let mut free =
        (20_000 + start..32_000).filter(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok());
    let found = free.next().zip(free.next()).map(<[u16; 2]>::from);
    found.ok_or_else(|| Failure("no free ports on 127.0.0.1".into()))
}

impl Node {
    fn run_dir(&self) -> PathBuf {
        self.dir.join("run")
    }

    fn nbd(&self) -> PathBuf {
        self.run_dir().join("nbd.sock")
    }

    /// Starts the clients.
    fn work(&self, journal: Journal) -> Result<Running, Failure> {
        Ok(start(&Server::unix(self.nbd(), EXPORT), journal, Plan::default())?)
    }

    /// Reads everything and judges it.
    fn check(&self, journal: &mut Journal) -> Result<(), Failure> {
        let server = Server::unix(self.nbd(), EXPORT);
        let verdict = verify(&server, journal, Loss::Nothing)?.ok()?;
        println!("  checked {} sectors: every acknowledged write is there", verdict.sectors);
        Ok(())
    }

    /// Starts the daemon.
    fn start(&mut self) -> Result<(), Failure> {
        let (bin, dir) = (self.bin.join("drbdrs"), self.run_dir());
        println!("$ drbdrs --run-dir {}   # node {}", dir.display(), self.name);
        let log = fs::File::options().create(true).append(true).open(self.dir.join("log"))?;
        let mut command = Command::new(bin);
        command.arg("--run-dir").arg(&dir).args(["--settings", "/nonexistent"]);
        command.env("__DRBD_NODE__", self.name).stdin(Stdio::null());
        self.child = Some(command.stdout(Stdio::null()).stderr(log).spawn()?);
        let end = Instant::now() + PATIENCE;
        while !self.nbd().exists() {
            if Instant::now() > end {
                return Err(Failure(format!("{} does not start", self.name)));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(self.bin.join("drbdadm"));
        command.arg("-c").arg(&self.conf).args(["--node-name", self.name]).args(words);
        command.env("DRBDRS_ADMIN_SOCKET", self.run_dir().join("drbdrs.sock"));
        command
    }

    /// drbdadm for this node.
    fn adm(&self, words: &[&str]) -> Result<(), Failure> {
        println!("$ drbdadm {}   # on {}", words.join(" "), self.name);
        match self.command(words).status()? {
            status if status.success() => Ok(()),
            status => Err(Failure(format!("drbdadm {} ended with {status}", words.join(" ")))),
        }
    }

    fn proc(&self) -> Result<String, Failure> {
        Ok(fs::read_to_string(self.run_dir().join("proc-drbd"))?)
    }

    /// Waits for words in the status file, showing what it says about progress.
    fn until(&self, words: &str) -> Result<(), Failure> {
        let end = Instant::now() + PATIENCE;
        let mut shown = String::new();
        loop {
            let text = self.proc()?;
            if text.contains(words) {
                return Ok(());
            }
            let bar = text.lines().find(|line| line.contains("% ("));
            if let Some(bar) = bar.filter(|bar| **bar != shown) {
                shown = bar.into();
                println!("  {}", bar.trim());
            }
            if Instant::now() > end {
                return Err(Failure(format!("{}: no {words} in\n{text}", self.name)));
            }
            std::thread::sleep(Duration::from_millis(700));
        }
    }

    fn cat(&self) -> Result<(), Failure> {
        println!("$ cat {}/proc-drbd", self.run_dir().display());
        for line in self.proc()?.lines().skip(3) {
            println!("  {line}");
        }
        Ok(())
    }

    fn terminate(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let asked = pid.map(|pid| kill_process(pid, Signal::TERM));
        if !matches!(asked, Some(Ok(()))) {
            let _ = child.kill();
        }
        let _ = child.wait();
    }
}

/// A demo that is broken off leaves nothing running.
impl Drop for Node {
    fn drop(&mut self) {
        self.terminate();
    }
}

fn walk(pair: &mut Pair) -> Result<(), Failure> {
    let dir = pair.conf.parent().map(Path::to_path_buf).unwrap_or_default();
    let [alpha, bravo] = &mut pair.nodes;
    println!("== two nodes on loopback, each with a file of 128 MiB as its disk");
    for node in [&mut *alpha, &mut *bravo] {
        node.start()?;
        node.adm(&["create-md", "--force", "r0"])?;
        node.adm(&["up", "r0"])?;
    }
    alpha.until("cs:Connected")?;
    println!("\n== new disks: the administrator says whose data counts, and it is copied");
    alpha.adm(&["primary", "--force", "r0"])?;
    alpha.until("ds:UpToDate/UpToDate")?;
    alpha.adm(&["status", "r0"])?;

    println!("== four NBD clients write to {EXPORT} on alpha; every acknowledged write is noted");
    let journal = Journal::create(&dir.join("journal"), SECTORS, 1, Durability::Process)?;
    let work = alpha.work(journal)?;
    for _ in 0..4 {
        std::thread::sleep(Duration::from_secs(1));
        println!("  {} writes acknowledged", work.count());
    }
    alpha.cat()?;
    println!("\n== kill -9: alpha dies in the middle of it");
    if let Some(mut child) = alpha.child.take() {
        child.kill()?;
        child.wait()?;
    }
    let (mut journal, report) = work.end()?;
    println!("  after {} acknowledged writes", report.writes);
    bravo.until("cs:WFConnection")?;
    println!("\n== fail-over to bravo");
    bravo.adm(&["primary", "r0"])?;
    bravo.adm(&["status", "r0"])?;
    bravo.check(&mut journal)?;

    println!("\n== work goes on, on bravo alone");
    let work = bravo.work(journal)?;
    std::thread::sleep(Duration::from_secs(2));
    let (mut journal, report) = work.end()?;
    println!("  {} writes acknowledged", report.writes);
    println!("\n== alpha comes back; only what differs is copied");
    alpha.start()?;
    alpha.adm(&["up", "r0"])?;
    alpha.until("cs:Connected ro:Secondary/Primary ds:UpToDate/UpToDate")?;
    let log = fs::read_to_string(alpha.dir.join("log"))?;
    let began = log.rsplit_once("Began resync as SyncTarget (").map(|(_, rest)| rest);
    let amount = began.and_then(|rest| rest.split_once(')')).map_or("?", |(amount, _)| amount);
    println!("  of {} KB: {amount}", (128 << 10) - 40);

    println!("\n== back to alpha, and both disks are compared");
    bravo.adm(&["secondary", "r0"])?;
    alpha.adm(&["primary", "r0"])?;
    alpha.check(&mut journal)?;
    alpha.adm(&["verify", "r0"])?;
    alpha.until("cs:Verify")?;
    alpha.until("cs:Connected")?;
    let log = fs::read_to_string(alpha.dir.join("log"))?;
    if log.contains("Online verify found") || !alpha.proc()?.contains("oos:0\n") {
        return Err(Failure("the disks differ".into()));
    }
    println!("  online verify: no differences");
    alpha.adm(&["why", "r0"])
}

fn next_steps(pair: &Pair) {
    let [alpha, bravo] = &pair.nodes;
    println!("\n== the pair is left running; try:");
    println!("export PATH={}:$PATH", alpha.bin.display());
    for node in [alpha, bravo] {
        println!(
            "{0}() {{ DRBDRS_ADMIN_SOCKET={1}/drbdrs.sock drbdadm -c {2} --node-name {0} \"$@\"; }}",
            node.name,
            node.run_dir().display(),
            pair.conf.display()
        );
    }
    println!("alpha status --watch");
    println!("nbdinfo 'nbd+unix:///{EXPORT}?socket={}'", alpha.nbd().display());
    println!("alpha secondary r0; bravo primary r0");
    println!("cat {}/proc-drbd", bravo.run_dir().display());
    let pids = pair.nodes.iter().filter_map(|node| node.child.as_ref()).map(Child::id);
    let pids: Vec<String> = pids.map(|pid| pid.to_string()).collect();
    println!("kill {}   # the end", pids.join(" "));
}
