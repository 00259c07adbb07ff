//! What is loaded: pairs of our nodes, and the peers that they are compared with.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result};
use drbdrs_benches::load::random_bytes;
use drbdrs_tests::nodes::{Pair, Programs, eventually};
use drbdrs_workload::nbd::{Client, Server};
use tempfile::TempDir;

/// A server as the client sees it.
pub(crate) struct Target {
    pub(crate) name: String,
    pub(crate) server: Server,
    /// Its processes.
    pub(crate) pids: Vec<u32>,
}

/// All servers of one kind of disk.
pub(crate) struct Servers {
    pub(crate) targets: Vec<Target>,
    /// Protocols A, B and C.
    pub(crate) pairs: Vec<Pair>,
    /// What could not be had, and why.
    pub(crate) missing: Vec<String>,
    peers: Vec<Started>,
    dir: TempDir,
    size: u64,
}

/// A process that ends with its owner.
struct Started(Child);

impl Drop for Started {
    fn drop(&mut self) {
        // It has ended: fine.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Name of our pair of this protocol.
pub(crate) fn pair_name(protocol: char) -> String {
    format!("drbdrs {protocol}")
}

pub(crate) const NBDKIT_FILE: &str = "nbdkit file";
pub(crate) const NBDKIT_MEMORY: &str = "nbdkit memory";
pub(crate) const QUORUM: &str = "qemu quorum";

impl Servers {
    /// Starts all of them with their disks in a new directory below this one.
    pub(crate) fn start(
        place: &Path,
        programs: &Programs,
        size: u64,
        is_ram: bool,
    ) -> Result<Self> {
        let mut servers = Self {
            targets: Vec::new(),
            pairs: Vec::new(),
            missing: Vec::new(),
            peers: Vec::new(),
            dir: new_dir(place)?,
            size,
        };
        if is_ram {
            let plugin = ["memory".to_owned(), format!("size={size}")];
            servers.add(NBDKIT_MEMORY, |s| s.nbdkit("memory", &plugin));
        }
        servers.add(NBDKIT_FILE, |s| s.nbdkit_file("nbdkit"));
        servers.add(QUORUM, |s| s.quorum(is_ram));
        for protocol in ['C', 'B', 'A'] {
            let pair = pair(place, programs, protocol, size)?;
            let [a, b] = &pair.nodes;
            servers.targets.push(Target {
                name: pair_name(protocol),
                server: Server::unix(a.run_dir().join("nbd.sock"), "r0/0"),
                pids: [a.pid(), b.pid()].into_iter().flatten().collect(),
            });
            servers.pairs.push(pair);
        }
        Ok(servers)
    }

    fn add(&mut self, name: &str, start: impl FnOnce(&mut Self) -> Result<(Server, Vec<u32>)>) {
        match start(self) {
            Ok((server, pids)) => self.targets.push(Target { name: name.into(), server, pids }),
            Err(error) => self.missing.push(format!("{name}: {error:#}")),
        }
    }

    /// nbdkit with a file of its own.
    pub(crate) fn nbdkit_file(&mut self, name: &str) -> Result<(Server, Vec<u32>)> {
        let file = self.file(name)?;
        self.nbdkit(name, &["file".to_owned(), file.display().to_string()])
    }

    fn nbdkit(&mut self, name: &str, plugin: &[String]) -> Result<(Server, Vec<u32>)> {
        let socket = self.dir.path().join(format!("{name}.sock"));
        let mut command = Command::new("nbdkit");
        command.args(["--foreground", "--unix"]).arg(&socket).args(plugin);
        let pid = self.run(&mut command)?;
        ready(Server::unix(&socket, ""), vec![pid])
    }

    /// A mirror of a local file and one behind a second server.
    fn quorum(&mut self, is_ram: bool) -> Result<(Server, Vec<u32>)> {
        let (local, remote) = (self.file("quorum-local")?, self.file("quorum-remote")?);
        let socket = |name: &str| self.dir.path().join(name);
        let (far, near) = (socket("qemu-nbd.sock"), socket("quorum.sock"));
        // As we do: past the cache where there is a disk behind it.
        let (cache, options) =
            if is_ram { ("writeback", "") } else { ("none", ",cache.direct=on,aio=io_uring") };
        let mut server = Command::new("qemu-nbd");
        server.args(["--persistent", "--format", "raw", "--cache", cache, "--socket"]);
        if !is_ram {
            server.arg(&far).args(["--aio", "io_uring"]).arg(&remote);
        } else {
            server.arg(&far).arg(&remote);
        }
        let server = self.run(&mut server)?;
        ready(Server::unix(&far, ""), vec![server])?;
        let mut daemon = Command::new("qemu-storage-daemon");
        let blockdev = |text: String| ["--blockdev".to_owned(), text];
        daemon
            .args(blockdev(format!(
                "driver=file,node-name=local,filename={}{options}",
                local.display()
            )))
            .args(blockdev(format!(
                "driver=nbd,node-name=remote,server.type=unix,server.path={}",
                far.display()
            )))
            .args(blockdev(
                "driver=quorum,node-name=both,children.0=local,children.1=remote,vote-threshold=2"
                    .into(),
            ))
            .args(["--nbd-server", &format!("addr.type=unix,addr.path={}", near.display())])
            .args(["--export", "type=nbd,id=e,node-name=both,name=both,writable=on"]);
        let daemon = self.run(&mut daemon)?;
        ready(Server::unix(&near, "both"), vec![daemon, server])
    }

    fn run(&mut self, command: &mut Command) -> Result<u32> {
        let log = self.dir.path().join("log");
        let log = fs::File::options().create(true).append(true).open(log)?;
        let name = command.get_program().to_string_lossy().into_owned();
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
        let child = child.with_context(|| format!("{name} can not be started"))?;
        let pid = child.id();
        self.peers.push(Started(child));
        Ok(pid)
    }

    fn file(&self, name: &str) -> Result<PathBuf> {
        let path = self.dir.path().join(name);
        fill(&path, self.size)?;
        Ok(path)
    }

    /// The pair of protocol C.
    pub(crate) fn pair_c(&self) -> Result<&Pair> {
        self.pairs.first().context("no pair")
    }

    /// A server by its name.
    pub(crate) fn target(&self, name: &str) -> Option<&Target> {
        self.targets.iter().find(|target| target.name == name)
    }
}

fn new_dir(place: &Path) -> Result<TempDir> {
    let dir = tempfile::Builder::new().prefix("drbdrs-bench-").tempdir_in(place);
    dir.with_context(|| format!("a directory in {}", place.display()))
}

fn pair(place: &Path, programs: &Programs, protocol: char, size: u64) -> Result<Pair> {
    let body =
        format!("  net {{ protocol {protocol}; }}\n  disk {{ c-plan-ahead 0; resync-rate 4G; }}");
    let mut pair = Pair::new_in(new_dir(place)?, programs, size, &body)?;
    for node in &pair.nodes {
        fill(&node.disk(0), size)?;
    }
    pair.in_sync("")?;
    Ok(pair)
}

/// Writes a file to its whole size, so that no run pays for its allocation.
fn fill(path: &Path, size: u64) -> Result<()> {
    let chunk = random_bytes(1 << 20);
    let mut file = fs::File::create(path)?;
    for _ in 0..size >> 20 {
        file.write_all(&chunk)?;
    }
    file.sync_all()?;
    Ok(())
}

fn ready(server: Server, pids: Vec<u32>) -> Result<(Server, Vec<u32>)> {
    eventually(|| Ok(Client::open(&server).map_err(|error| error.to_string())))?;
    Ok((server, pids))
}
