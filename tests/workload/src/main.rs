//! The workload as a program: `write`, `verify` and `settle`, one process after the other with the
//! same journal.

use std::io::{Error, Result};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, Parser, Subcommand, ValueEnum};
use drbdrs_workload::content::SECTOR;
use drbdrs_workload::journal::{Durability, Journal};
use drbdrs_workload::ledger::Loss;
use drbdrs_workload::nbd::{Address, Client, Server};
use drbdrs_workload::run::{Plan, start};
use drbdrs_workload::verify::verify;

/// Writes through NBD, and judges after a crash what may be read.
#[derive(Parser)]
#[command(name = "workload")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Writes until the time is over or the server is gone. Makes the journal if there is none;
    /// the device must read as zeroes then.
    Write {
        #[command(flatten)]
        server: ServerArgs,
        /// The journal.
        #[arg(long)]
        journal: PathBuf,
        /// How long.
        #[arg(long, default_value_t = 10)]
        seconds: u64,
        /// Connections.
        #[arg(long, default_value_t = 4)]
        clients: u64,
        /// Requests in flight on each.
        #[arg(long, default_value_t = 8)]
        depth: usize,
        /// Longest request, in sectors of 512 bytes.
        #[arg(long, default_value_t = 128)]
        sectors_max: u32,
        /// Decides what is random.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// The journal need not survive a power cut of this machine (faster).
        #[arg(long)]
        no_sync: bool,
    },
    /// Reads everything and judges; exit code 1 if something is there that may not be.
    Verify {
        #[command(flatten)]
        server: ServerArgs,
        /// The journal.
        #[arg(long)]
        journal: PathBuf,
        /// What has happened.
        #[arg(long, value_enum, default_value_t = After::Kill)]
        after: After,
    },
    /// Notes that all acknowledged writes are on both nodes: connected, UpToDate, nothing pending.
    Settle {
        /// The journal.
        #[arg(long)]
        journal: PathBuf,
    },
}

#[derive(Args)]
struct ServerArgs {
    /// Unix socket of the server.
    #[arg(long, required_unless_present = "tcp")]
    socket: Option<PathBuf>,
    /// Host and port of the server.
    #[arg(long, conflicts_with = "socket")]
    tcp: Option<String>,
    /// Name of the export.
    #[arg(long, default_value = "r0/0")]
    export: String,
}

#[derive(Clone, Copy, ValueEnum)]
enum After {
    /// Processes ended; every acknowledged write must be there.
    Kill,
    /// The power was cut; every flushed write must be there.
    PowerCut,
    /// A node took over that may lack the newest writes (protocol A).
    FailOver,
}

impl ServerArgs {
    fn server(self) -> Result<Server> {
        let address = match (self.socket, self.tcp) {
            (Some(path), _) => Address::Unix(path),
            (None, Some(address)) => Address::Tcp(address),
            (None, None) => return Err(Error::other("no server")),
        };
        Ok(Server { address, export: self.export })
    }
}

fn main() -> ExitCode {
    match run(Cli::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("workload: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<()> {
    match task {
        Task::Write { server, journal, seconds, clients, depth, sectors_max, seed, no_sync } => {
            let durability = if no_sync { Durability::Process } else { Durability::Machine };
            let plan = Plan { clients, depth, sectors_max, seed };
            write(&server.server()?, &journal, durability, plan, Duration::from_secs(seconds))
        }
        Task::Verify { server, journal, after } => {
            let loss = match after {
                After::Kill => Loss::Nothing,
                After::PowerCut => Loss::Unflushed,
                After::FailOver => Loss::Newest,
            };
            let mut journal = Journal::open(&journal, Durability::Machine)?;
            let verdict = verify(&server.server()?, &mut journal, loss)?.ok()?;
            let (sectors, gone) = (verdict.sectors, verdict.gone);
            println!("{sectors} sectors are as they may be; {gone} acknowledged are not there");
            Ok(())
        }
        Task::Settle { journal } => Journal::open(&journal, Durability::Machine)?.settle(),
    }
}

fn write(
    server: &Server,
    path: &Path,
    durability: Durability,
    plan: Plan,
    time: Duration,
) -> Result<()> {
    let journal = if path.exists() {
        Journal::open(path, durability)?
    } else {
        let sectors = Client::open(server)?.size() / SECTOR as u64;
        Journal::create(path, sectors, plan.seed, durability)?
    };
    let end = Instant::now() + time;
    let running = start(server, journal, plan)?;
    while Instant::now() < end && !running.is_finished() {
        std::thread::sleep(Duration::from_millis(20));
    }
    let report = running.end()?.1;
    println!("{} writes, {} errors, {} clients lost", report.writes, report.errors, report.lost);
    if report.complaints.is_empty() {
        Ok(())
    } else {
        Err(Error::other(report.complaints.join("\n")))
    }
}
