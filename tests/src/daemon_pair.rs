//! The daemon as users have it, with its commands and NBD, and a kernel's DRBD as one pair.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use drbdrs_workload::content::SECTOR;
use drbdrs_workload::journal::{Durability, Journal};
use drbdrs_workload::ledger::Loss;
use drbdrs_workload::nbd::{Client, Server};
use drbdrs_workload::run::{Plan, Report, Running, start};
use drbdrs_workload::verify::verify;
use rustix::process::Signal;
use tempfile::TempDir;

use crate::kernel_node::KernelNode;
use crate::kernel_pair::LONG;
use crate::nodes::{Node, Programs, free_ports};
use crate::proxy::Proxy;

/// Size of both disks, with their internal meta-data.
const BYTES: u64 = 32 << 20;

/// Both nodes, the link between them, and what the workload was promised.
#[derive(Debug)]
pub struct DaemonPair {
    /// In the guest.
    pub kernel: KernelNode,
    /// On the host.
    pub node: Node,
    outgoing: Proxy,
    incoming: Proxy,
    net: String,
    journal: Option<Journal>,
    dir: TempDir,
}

impl DaemonPair {
    /// Both new and connected, with the first resync still to come; `net` stands in the net section
    /// of both.
    ///
    /// # Errors
    /// They do not connect.
    pub fn new(programs: &Programs, net: &str) -> Result<Self> {
        let mut kernel = KernelNode::boot(BYTES)?;
        let local = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let outgoing = Proxy::new(local(kernel.port))?;
        let [own_port, _] = free_ports(std::process::id())?;
        let incoming = Proxy::new(local(own_port))?;
        kernel.set_peer_port(incoming.port());
        let net = format!("connect-int 2; {net}");
        let dir = TempDir::new()?;
        let node = Node::alone(programs, "bravo", dir.path())?;
        fs::File::create(node.disk(0))?.set_len(BYTES)?;
        let text = format!(
            "global {{ usage-count no; }}\n\
             resource r0 {{\n\
             \x20 volume 0 {{ device minor {}; disk {}; meta-disk internal; }}\n\
             \x20 net {{ socket-check-timeout 1; ping-timeout 30; {net} }}\n\
             \x20 disk {{ resync-rate 200M; c-plan-ahead 0; }}\n\
             \x20 on bravo {{ address 127.0.0.1:{own_port}; }}\n\
             \x20 on alpha {{ address 127.0.0.1:{}; }}\n\
             }}\n",
            node.minors("@0"),
            node.disk(0).display(),
            outgoing.port()
        );
        fs::write(node.conf(), text)?;
        let mut pair = Self { kernel, node, outgoing, incoming, net, journal: None, dir };
        pair.kernel.configure(&pair.net, "")?;
        pair.kernel.create()?;
        pair.node.start("")?;
        pair.node.adm(&["create-md", "--force", "r0"])?.ok()?;
        pair.node.adm(&["up", "r0"])?.ok()?;
        pair.tell(pair.node.until("cs:Connected"))?;
        Ok(pair)
    }

    /// Cuts or mends the link.
    pub fn cut(&self, is_cut: bool) {
        Proxy::set_cut([&self.outgoing, &self.incoming], is_cut);
    }

    /// Adds what both sides logged to a failure.
    ///
    /// # Errors
    /// The failure.
    pub fn tell<T>(&self, result: Result<T>) -> Result<T> {
        result.with_context(|| {
            let log = self.kernel.guest.take_log().unwrap_or_default();
            let shown = self.kernel.guest.proc_drbd().unwrap_or_default();
            let own = self.node.log().unwrap_or_default();
            format!(
                "kernel:\n{log}\n{shown}\nown:\n{own}\n{}",
                self.node.proc().unwrap_or_default()
            )
        })
    }

    /// Waits until both are UpToDate, and compares both disks.
    ///
    /// # Errors
    /// They are not equal.
    pub fn in_sync(&self) -> Result<()> {
        self.tell(self.node.until("ds:UpToDate/UpToDate"))?;
        let pattern = "^ *0: cs:Connected ro:[^ ]* ds:UpToDate/UpToDate ";
        let seen = self.kernel.guest.wait_for(&format!("grep -q '{pattern}' /proc/drbd"), LONG);
        self.tell(seen)?;
        self.kernel.guest.ok("sync")?;
        let own = fs::read(self.node.disk(0))?;
        let data = own.get(..self.data_len()?).context("the disk is shorter")?;
        self.tell(self.kernel.compare(data))
    }

    /// Bytes of the device.
    fn data_len(&self) -> Result<usize> {
        let sectors = self.kernel.guest.ok("cat /sys/class/block/drbd0/size")?;
        Ok(sectors.trim().parse::<usize>()? * SECTOR)
    }

    /// The daemon becomes Primary; the kernel is not, before.
    ///
    /// # Errors
    /// It is refused.
    pub fn promote_own(&self) -> Result<()> {
        self.tell(self.node.adm(&["primary", "r0"])?.ok().map(drop))
    }

    /// The daemon becomes Secondary.
    ///
    /// # Errors
    /// It is refused.
    pub fn demote_own(&self) -> Result<()> {
        // The clients of the export may just be leaving.
        crate::nodes::eventually(|| {
            let did = self.node.adm(&["secondary", "r0"])?;
            Ok(if did.code == 0 { Ok(()) } else { Err(format!("{did:?}")) })
        })
    }

    /// The kernel becomes Primary.
    ///
    /// # Errors
    /// It is refused.
    pub fn promote_kernel(&self) -> Result<()> {
        let done = self.kernel.guest.wait_for("drbdadm primary r0", LONG);
        self.tell(done).map(drop)
    }

    /// The daemon dies as by SIGKILL.
    ///
    /// # Errors
    /// It did not run.
    pub fn kill_own(&mut self) -> Result<()> {
        ensure!(self.node.stop(Signal::KILL)? == 137, "it had ended");
        Ok(())
    }

    /// The daemon starts and brings its resource up.
    ///
    /// # Errors
    /// It does not.
    pub fn start_own(&mut self) -> Result<()> {
        self.node.start("")?;
        let done = self.node.adm(&["up", "r0"])?.ok();
        self.tell(done).map(drop)
    }

    /// The guest starts and brings its resource up.
    ///
    /// # Errors
    /// It does not.
    pub fn start_kernel(&mut self) -> Result<()> {
        self.kernel.guest.start()?;
        self.kernel.configure(&self.net, "")?;
        self.kernel.guest.ok("drbdadm up r0").map(drop)
    }

    /// Each node gets the disk of the other. Both are off.
    ///
    /// # Errors
    /// The files can not be copied.
    pub fn swap_disks(&self) -> Result<()> {
        let kernel = self.kernel.guest.disk_image(0).context("no disk")?;
        let aside = self.dir.path().join("aside");
        fs::copy(kernel, &aside)?;
        fs::copy(self.node.disk(0), kernel)?;
        fs::copy(aside, self.node.disk(0))?;
        Ok(())
    }

    fn server(&self) -> Server {
        let socket: PathBuf = self.node.run_dir().join("nbd.sock");
        Server::unix(socket, "r0/0")
    }

    /// Clients begin to write; the daemon is Primary.
    ///
    /// # Errors
    /// The export can not be opened.
    pub fn begin_writes(&mut self, seed: u64) -> Result<Running> {
        let journal = match self.journal.take() {
            Some(journal) => journal,
            None => {
                let sectors = Client::open(&self.server())?.size() / SECTOR as u64;
                let path = self.dir.path().join("journal");
                Journal::create(&path, sectors, seed, Durability::Process)?
            }
        };
        Ok(start(&self.server(), journal, Plan { clients: 2, seed, ..Plan::default() })?)
    }

    /// The clients stop, or have lost their server.
    ///
    /// # Errors
    /// A request failed, or an answer was wrong.
    pub fn end_writes(&mut self, running: Running) -> Result<Report> {
        let (journal, report) = running.end()?;
        self.journal = Some(journal);
        ensure!(report.complaints.is_empty(), "{}", report.complaints.join("\n"));
        ensure!(report.errors == 0, "{} requests failed", report.errors);
        ensure!(report.writes > 0, "nothing was written");
        Ok(report)
    }

    /// Everything acknowledged is there; the daemon is Primary.
    ///
    /// # Errors
    /// It is not.
    pub fn verify(&mut self) -> Result<()> {
        let server = self.server();
        let journal = self.journal.as_mut().context("a journal")?;
        let verdict = verify(&server, journal, Loss::Nothing)?.ok()?;
        ensure!(verdict.gone == 0, "{} sectors", verdict.gone);
        journal.settle()?;
        Ok(())
    }

    /// Lets time pass.
    pub fn pause(millis: u64) {
        std::thread::sleep(Duration::from_millis(millis));
    }
}
