//! The verifying workload on the nodes of a pair.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use drbdrs_workload::content::SECTOR;
use drbdrs_workload::journal::{Durability, Journal};
use drbdrs_workload::ledger::Loss;
use drbdrs_workload::nbd::Client;
use drbdrs_workload::run::{Plan, Report, Running, start};
use drbdrs_workload::verify::{Verdict, verify};

use crate::nodes::{Node, Pair, eventually};

/// What was promised so far.
#[derive(Debug)]
pub struct Load {
    journal: Option<Journal>,
    sectors: u64,
    disks: [PathBuf; 2],
}

impl Load {
    /// For volume 0 of a pair with new disks, whose first node is Primary.
    ///
    /// # Errors
    /// It can not be opened.
    pub fn new(pair: &Pair, seed: u64) -> Result<Self> {
        let sectors = Client::open(&pair.nodes[0].server())?.size() / SECTOR as u64;
        let path = pair.dir.path().join("journal");
        let journal = Journal::create(&path, sectors, seed, Durability::Process)?;
        let disks = [pair.nodes[0].disk(0), pair.nodes[1].disk(0)];
        Ok(Self { journal: Some(journal), sectors, disks })
    }

    /// Starts clients of a node.
    ///
    /// # Errors
    /// They can not open the device.
    pub fn begin(&mut self, node: &Node, seed: u64) -> Result<Running> {
        let plan = Plan { clients: 3, seed, ..Plan::default() };
        Ok(start(&node.server(), self.journal.take().context("a journal")?, plan)?)
    }

    /// Ends them. What they read must have been right.
    ///
    /// # Errors
    /// It was not.
    pub fn end(&mut self, running: Running) -> Result<Report> {
        let (journal, report) = running.end()?;
        self.journal = Some(journal);
        ensure!(report.complaints.is_empty(), "{}", report.complaints.join("\n"));
        Ok(report)
    }

    /// Ends clients that must not have noticed anything.
    ///
    /// # Errors
    /// Requests of them failed, or they were sent away.
    pub fn end_well(&mut self, running: Running) -> Result<Report> {
        let report = self.end(running)?;
        ensure!(report.errors == 0, "{} requests failed", report.errors);
        ensure!(report.lost == 0, "{} clients were lost", report.lost);
        ensure!(report.writes > 0, "nothing was written");
        Ok(report)
    }

    /// Reads everything on a node, and judges.
    ///
    /// # Errors
    /// Something is not as it must be.
    pub fn verify(&mut self, node: &Node, loss: Loss) -> Result<Verdict> {
        let journal = self.journal.as_mut().context("a journal")?;
        let verdict = verify(&node.server(), journal, loss)?;
        verdict.ok().with_context(|| format!("reading on {}", node.name))
    }

    /// Waits until both disks are equal; everything acknowledged is on both then.
    ///
    /// # Errors
    /// They do not become so.
    pub fn until_equal(&mut self) -> Result<()> {
        let len = usize::try_from(self.sectors)? * SECTOR;
        eventually(|| {
            let [one, two] = [std::fs::read(&self.disks[0])?, std::fs::read(&self.disks[1])?];
            let chunks = one[..len].chunks(4096).zip(two[..len].chunks(4096));
            let at = chunks.zip(0..).find(|((one, two), _)| one != two).map(|(_, n)| n * 4096);
            Ok(at.map_or(Ok(()), |at| Err(format!("the disks differ in the block at byte {at}"))))
        })?;
        Ok(self.journal.as_mut().context("a journal")?.settle()?)
    }
}
