//! Nodes of the daemon as users have them: processes, files, sockets, and the commands.

use std::net::TcpListener;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use drbdrs_workload::nbd::Server;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// How long anything may take on a machine that is busy with other tests.
const PATIENCE: Duration = Duration::from_secs(60);

/// The programs, built.
#[derive(Clone, Debug)]
pub struct Programs {
    daemon: PathBuf,
    adm: PathBuf,
    setup: PathBuf,
    meta: PathBuf,
}

impl Programs {
    /// Builds them.
    pub fn build() -> Self {
        Self {
            daemon: crate::program("drbdrs"),
            adm: crate::program("drbdadm"),
            setup: crate::program_of("drbdadm", "drbdsetup"),
            meta: crate::program("drbdmeta"),
        }
    }

    /// Those in this directory.
    pub fn in_dir(dir: &Path) -> Self {
        let [daemon, adm, setup, meta] =
            ["drbdrs", "drbdadm", "drbdsetup", "drbdmeta"].map(|name| dir.join(name));
        Self { daemon, adm, setup, meta }
    }

    /// The files: daemon, drbdadm, drbdsetup and drbdmeta.
    pub fn paths(&self) -> Vec<PathBuf> {
        [&self.daemon, &self.adm, &self.setup, &self.meta].map(Clone::clone).to_vec()
    }

    /// Those beside the program that runs.
    ///
    /// # Errors
    /// It is nowhere.
    pub fn beside() -> Result<Self> {
        let own = std::env::current_exe()?;
        Ok(Self::in_dir(own.parent().context("a directory")?))
    }
}

/// What a command did.
#[derive(Clone, Debug)]
pub struct Did {
    /// Exit code; a signal counts as 128 and more.
    pub code: i32,
    /// What it printed.
    pub out: String,
    /// What it complained about.
    pub err: String,
}

impl From<Output> for Did {
    fn from(output: Output) -> Self {
        let signal = output.status.signal().unwrap_or_default();
        Self {
            code: output.status.code().unwrap_or(128 + signal),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Did {
    /// It must have ended well; what it printed.
    ///
    /// # Errors
    /// It did not.
    pub fn ok(self) -> Result<String> {
        ensure!(self.code == 0, "exit code {}: {}{}", self.code, self.out, self.err);
        Ok(self.out)
    }
}

/// A node.
#[derive(Debug)]
pub struct Node {
    programs: Programs,
    /// Its name in the configuration.
    pub name: &'static str,
    /// Its directory: `disk0`..., `run/`, `log`.
    pub dir: PathBuf,
    conf: PathBuf,
    /// Of volume 0; those of the others follow.
    minor: u32,
    /// Network namespace of the daemon, if it has one of its own.
    pub namespace: Option<String>,
    child: Option<Child>,
}

/// Two nodes and their configuration, in a directory that goes away with them.
#[derive(Debug)]
pub struct Pair {
    /// `alpha` and `beta`.
    pub nodes: [Node; 2],
    /// Everything is in it.
    pub dir: TempDir,
    conf: PathBuf,
    /// The sections of the two hosts.
    hosts: String,
}

impl Pair {
    /// Two nodes with volumes of this size, configured as resource r0; nothing is started. `body`
    /// stands in the resource's section, `disk1` in that of volume 1. The minors are ones that no
    /// other test of this machine has, since the tools lock them: see [`Node::minors`].
    ///
    /// # Errors
    /// No files.
    pub fn new(
        programs: &Programs,
        volumes: u16,
        size: u64,
        body: &str,
        disk1: &str,
    ) -> Result<Self> {
        let minor = new_minor();
        let dir = TempDir::new()?;
        Self::make(dir, programs, minor, loopback(minor)?, (volumes, size), body, disk1)
    }

    /// The same with one volume, in this directory.
    ///
    /// # Errors
    /// No files.
    pub fn new_in(dir: TempDir, programs: &Programs, size: u64, body: &str) -> Result<Self> {
        let minor = new_minor();
        Self::make(dir, programs, minor, loopback(minor)?, (1, size), body, "")
    }

    /// The same with one volume, at other addresses.
    ///
    /// # Errors
    /// No files.
    pub fn at(programs: &Programs, addresses: [String; 2], size: u64, body: &str) -> Result<Self> {
        Self::make(TempDir::new()?, programs, new_minor(), addresses, (1, size), body, "")
    }

    fn make(
        dir: TempDir,
        programs: &Programs,
        minor: u32,
        addresses: [String; 2],
        (volumes, size): (u16, u64),
        body: &str,
        disk1: &str,
    ) -> Result<Self> {
        let conf = dir.path().join("drbd.conf");
        let mut hosts = String::new();
        for (name, address) in ["alpha", "beta"].into_iter().zip(addresses) {
            let folder = dir.path().join(name);
            std::fs::create_dir(&folder)?;
            hosts += &format!("  on {name} {{\n    address {address};\n");
            for n in 0..volumes {
                let disk = folder.join(format!("disk{n}"));
                std::fs::File::create(&disk)?.set_len(size)?;
                let options = if n == 1 { disk1 } else { "" };
                hosts += &format!(
                    "    volume {n} {{ device minor {}; disk {}; meta-disk internal; {options} }}\n",
                    minor + u32::from(n),
                    disk.display()
                );
            }
            hosts += "  }\n";
        }
        let node = |name| Node {
            programs: programs.clone(),
            name,
            dir: dir.path().join(name),
            conf: conf.clone(),
            minor,
            namespace: None,
            child: None,
        };
        let pair = Self { nodes: [node("alpha"), node("beta")], dir, conf, hosts };
        pair.configure(body)?;
        Ok(pair)
    }

    /// Writes the configuration anew, with this in the resource's section.
    ///
    /// # Errors
    /// It can not be written.
    pub fn configure(&self, body: &str) -> Result<()> {
        let hosts = &self.hosts;
        let text = format!("global {{ usage-count no; }}\nresource r0 {{\n{body}\n{hosts}}}\n");
        Ok(std::fs::write(&self.conf, text)?)
    }

    /// Starts both daemons, makes meta-data, brings the resource up and waits for the connection.
    ///
    /// # Errors
    /// Something of that fails.
    pub fn up(&mut self, settings: &str) -> Result<()> {
        for node in &mut self.nodes {
            node.start(settings)?;
            node.adm(&["create-md", "--force", "r0"])?.ok()?;
            node.adm(&["up", "r0"])?.ok()?;
        }
        self.nodes[0].until("cs:Connected")
    }

    /// Waits until both disks are good.
    ///
    /// # Errors
    /// Not within a minute.
    pub fn until_in_sync(&self) -> Result<()> {
        self.nodes.iter().try_for_each(|node| node.until("ds:UpToDate/UpToDate"))
    }

    /// A pair whose first node is Primary and whose disks are equal.
    ///
    /// # Errors
    /// As for [`Self::up`].
    pub fn in_sync(&mut self, settings: &str) -> Result<()> {
        self.up(settings)?;
        let alpha = &self.nodes[0];
        alpha.adm(&["new-current-uuid", "--clear-bitmap", "r0/0"])?.ok()?;
        alpha.adm(&["primary", "r0"])?.ok()?;
        alpha.until("ds:UpToDate/UpToDate").with_context(|| self.log_tails())
    }

    /// The ends of both logs.
    pub fn log_tails(&self) -> String {
        self.nodes.iter().map(Node::log_tail).collect()
    }
}

/// The first of two minors that no other test of this machine has.
fn new_minor() -> u32 {
    static PAIRS: AtomicU32 = AtomicU32::new(0);
    let pair = PAIRS.fetch_add(1, Ordering::Relaxed) % 16;
    10_000 + std::process::id() % 30_000 * 32 + pair * 2
}

/// Ports that nobody has now. They lie below those that outgoing connections get: else a node that
/// calls its absent peer could reach itself.
pub(crate) fn free_ports(start: u32) -> Result<[u16; 2]> {
    let mut free = (0..10_000_u32).map(|n| 20_000 + (start + n) % 12_000).filter_map(|port| {
        let port = u16::try_from(port).ok()?;
        TcpListener::bind(("127.0.0.1", port)).ok().map(|_| port)
    });
    free.next().zip(free.next()).map(<[u16; 2]>::from).context("no free port")
}

fn loopback(start: u32) -> Result<[String; 2]> {
    Ok(free_ports(start)?.map(|port| format!("127.0.0.1:{port}")))
}

/// Looks again and again until it is so.
///
/// # Errors
/// Not within a minute; the text is what was seen last.
pub fn eventually<T>(
    mut look: impl FnMut() -> Result<std::result::Result<T, String>>,
) -> Result<T> {
    let end = Instant::now() + PATIENCE;
    loop {
        match look()? {
            Ok(found) => return Ok(found),
            Err(seen) if Instant::now() > end => bail!("not within {PATIENCE:?}: {seen}"),
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

impl Node {
    /// A node with a directory in `dir` and a configuration file that is still to be written.
    ///
    /// # Errors
    /// No files.
    pub fn alone(programs: &Programs, name: &'static str, dir: &Path) -> Result<Self> {
        let folder = dir.join(name);
        std::fs::create_dir(&folder)?;
        Ok(Self {
            programs: programs.clone(),
            name,
            dir: folder,
            conf: dir.join("drbd.conf"),
            minor: new_minor(),
            namespace: None,
            child: None,
        })
    }

    /// The configuration file.
    pub fn conf(&self) -> &Path {
        &self.conf
    }

    /// Directory of sockets and status file.
    pub fn run_dir(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// The admin socket.
    pub fn socket(&self) -> PathBuf {
        self.run_dir().join("drbdrs.sock")
    }

    /// Starts the daemon with these settings and waits until it listens.
    ///
    /// # Errors
    /// It does not run.
    pub fn start(&mut self, settings: &str) -> Result<()> {
        let file = self.dir.join("drbdrs.toml");
        std::fs::write(&file, settings)?;
        let log = std::fs::File::options().create(true).append(true).open(self.dir.join("log"))?;
        let child = self
            .command_of(&self.programs.daemon)
            .arg("--run-dir")
            .arg(self.run_dir())
            .arg("--settings")
            .arg(&file)
            .env("__DRBD_NODE__", self.name)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()?;
        self.child = Some(child);
        eventually(|| match std::os::unix::net::UnixStream::connect(self.socket()) {
            Ok(_) => Ok(Ok(())),
            Err(error) => Ok(Err(error.to_string())),
        })
    }

    /// Sends a signal to the daemon.
    ///
    /// # Errors
    /// It does not run.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let id = self.pid().context("it does not run")?;
        let pid = i32::try_from(id).ok().and_then(Pid::from_raw).context("a pid")?;
        Ok(kill_process(pid, signal)?)
    }

    /// The end of the log.
    pub fn log_tail(&self) -> String {
        let log = self.log().unwrap_or_default();
        let lines: Vec<&str> = log.lines().filter(|line| !line.contains("handler: ")).collect();
        let last = lines.get(lines.len().saturating_sub(60)..).unwrap_or_default();
        format!("--- the end of the log of {}\n{}\n", self.name, last.join("\n"))
    }

    /// Ends the daemon with a signal; its exit code, or 128 and the signal.
    ///
    /// # Errors
    /// It does not run, or does not end.
    pub fn stop(&mut self, signal: Signal) -> Result<i32> {
        self.signal(signal)?;
        let mut child = self.child.take().context("it does not run")?;
        let status = eventually(|| Ok(child.try_wait()?.ok_or_else(|| "it runs".to_owned())))?;
        Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default()))
    }

    /// The minors of volume 0 and 1 for `@0` and `@1`. All words for commands, and texts to wait
    /// for, are treated so.
    pub fn minors(&self, text: &str) -> String {
        let [first, second] = [self.minor, self.minor + 1].map(|minor| minor.to_string());
        text.replace("@0", &first).replace("@1", &second)
    }

    fn words(&self, words: &[&str]) -> Vec<String> {
        words.iter().map(|word| self.minors(word)).collect()
    }

    /// Runs drbdadm for this node.
    ///
    /// # Errors
    /// It cannot be run.
    pub fn adm(&self, words: &[&str]) -> Result<Did> {
        Ok(self.adm_command(words).output()?.into())
    }

    /// A drbdadm of this node.
    pub fn adm_command(&self, words: &[&str]) -> Command {
        let mut command = self.command_of(&self.programs.adm);
        command.arg("-c").arg(&self.conf).args(["--node-name", self.name]).args(self.words(words));
        command.env("DRBDRS_ADMIN_SOCKET", self.socket());
        command
    }

    /// A directory in `dir` with the programs under their names, for a search path.
    ///
    /// # Errors
    /// No files.
    pub fn programs_on_path(&self, dir: &Path) -> Result<String> {
        let folder = dir.join("bin");
        std::fs::create_dir(&folder)?;
        let Programs { adm, setup, meta, .. } = &self.programs;
        for (name, program) in
            [("drbdadm", adm), ("drbdsetup", setup), ("drbdsetup-84", setup), ("drbdmeta", meta)]
        {
            std::os::unix::fs::symlink(program, folder.join(name))?;
        }
        Ok(folder.display().to_string())
    }

    /// A program in the node's network.
    fn command_of(&self, program: &Path) -> Command {
        match &self.namespace {
            None => Command::new(program),
            Some(name) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", name]).arg(program);
                command
            }
        }
    }

    /// A drbdsetup of this node.
    pub fn setup_command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.programs.setup);
        command
            .args(self.words(words))
            .env("DRBDRS_ADMIN_SOCKET", self.socket())
            .stdin(Stdio::null());
        command
    }

    /// Runs drbdsetup for this node.
    ///
    /// # Errors
    /// It cannot be run.
    pub fn setup(&self, words: &[&str]) -> Result<Did> {
        Ok(self.setup_command(words).output()?.into())
    }

    /// Runs drbdmeta for a volume, as minor, or as `-` if it is to know nothing of the minor.
    ///
    /// # Errors
    /// It cannot be run.
    pub fn meta(&self, device: &str, volume: u16, words: &[&str]) -> Result<Did> {
        let mut command = Command::new(&self.programs.meta);
        command.arg("--var-lib-drbd").arg(&self.dir).args([&self.minors(device), "v08"]);
        command.arg(self.disk(volume)).arg("internal").args(words);
        command.env("DRBDRS_ADMIN_SOCKET", self.socket()).stdin(Stdio::null());
        Ok(command.output()?.into())
    }

    /// The status file.
    ///
    /// # Errors
    /// There is none.
    pub fn proc(&self) -> Result<String> {
        Ok(std::fs::read_to_string(self.run_dir().join("proc-drbd"))?)
    }

    /// Waits until the status file contains this.
    ///
    /// # Errors
    /// Not within a minute.
    pub fn until(&self, words: &str) -> Result<()> {
        let words = &self.minors(words);
        let look = || {
            let text = self.proc()?;
            Ok(if text.contains(words) { Ok(()) } else { Err(text) })
        };
        eventually(look).with_context(|| format!("waiting for {words} on {}", self.name))
    }

    /// The log so far.
    ///
    /// # Errors
    /// There is none.
    pub fn log(&self) -> Result<String> {
        Ok(std::fs::read_to_string(self.dir.join("log"))?)
    }

    /// NBD URI of a volume.
    pub fn uri(&self, volume: u16) -> String {
        format!("nbd+unix:///r0/{volume}?socket={}/nbd.sock", self.run_dir().display())
    }

    /// Volume 0, for our own NBD client.
    pub fn server(&self) -> Server {
        Server::unix(self.run_dir().join("nbd.sock"), "r0/0")
    }

    /// Commands of qemu-io on a volume.
    ///
    /// # Errors
    /// It cannot be run.
    pub fn qemu_io(&self, volume: u16, commands: &[&str]) -> Result<Did> {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "raw"]);
        for words in commands {
            command.args(["-c", words]);
        }
        Ok(command.arg(self.uri(volume)).stdin(Stdio::null()).output()?.into())
    }

    /// Process of the daemon.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Runs the daemon's program in a directory that may have one already.
    ///
    /// # Errors
    /// It cannot be run.
    pub fn second_daemon(&self) -> Result<Did> {
        let mut command = Command::new(&self.programs.daemon);
        command.arg("--run-dir").arg(self.run_dir()).args(["--settings", "/nonexistent"]);
        Ok(command.stdin(Stdio::null()).output()?.into())
    }

    /// Where its disks are.
    pub fn disk(&self, volume: u16) -> PathBuf {
        Path::new(&self.dir).join(format!("disk{volume}"))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It has ended: fine.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
