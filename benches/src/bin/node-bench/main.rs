//! Two nodes on loopback under load, and their peers in the same run.
//!
//! `cargo xtask bench node [--quick] [--seconds-per-point S] [--only TEXT]... [--json FILE]`. Targets
//! are printed with the figures; nothing fails on them.

mod points;
mod report;
mod resync;
mod servers;

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use clap::Parser;
use drbdrs_benches::process::load_average;
use drbdrs_tests::nodes::Programs;

use crate::points::{Effort, Point};
use crate::report::{Machine, Report};
use crate::servers::Servers;

/// Options.
#[derive(Parser)]
struct Args {
    /// A run of about two minutes.
    #[arg(long)]
    quick: bool,
    /// How long each server is measured at each point, over all its runs.
    #[arg(long)]
    seconds_per_point: Option<f64>,
    /// Only points whose name contains this, for example `ram/`, `4k`, `qd32/`, `resync`; several
    /// times: all of these texts.
    #[arg(long)]
    only: Vec<String>,
    /// Where our programs are; default: beside this one.
    #[arg(long)]
    programs: Option<PathBuf>,
    /// Write the figures to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Size of all devices in MiB.
    #[arg(long, default_value_t = 256)]
    size: u64,
    /// Where memory is.
    #[arg(long, default_value = "/dev/shm")]
    ram: PathBuf,
    /// Where a disk is.
    #[arg(long, default_value = "/var/tmp")]
    disk: PathBuf,
}

impl Args {
    fn effort(&self) -> Effort {
        let (runs, seconds) = if self.quick { (3, 0.6) } else { (5, 10.0) };
        Effort { runs, seconds_per_point: self.seconds_per_point.unwrap_or(seconds) }
    }

    fn wants(&self, name: &str) -> bool {
        self.only.iter().all(|text| name.contains(text.as_str()))
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    let effort = args.effort();
    ensure!(effort.seconds_per_point > 0.0, "--seconds-per-point must be positive");
    let programs = match &args.programs {
        Some(dir) => Programs::in_dir(dir),
        None => Programs::beside()?,
    };
    let mut report = Report {
        machine: Machine {
            processors: std::thread::available_parallelism()?.get(),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            load_before: load_average(),
            load_after: String::new(),
            device_mib: args.size,
            runs_per_point: effort.runs,
            seconds_per_point: effort.seconds_per_point,
        },
        rows: Vec::new(),
        resync: Vec::new(),
        ratios: Vec::new(),
        findings: Vec::new(),
        missing: Vec::new(),
    };
    for (backing, place) in [("ram", &args.ram), ("disk", &args.disk)] {
        measure(&args, &programs, backing, place, &mut report)?;
    }
    report.machine.load_after = load_average();
    report.ratios = report::ratios(&report.rows, &report.resync);
    report.findings = report::findings(&report.rows);
    report::print(&report);
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_string_pretty(&report)?)?;
    }
    Ok(())
}

/// Everything with disks of one kind.
fn measure(
    args: &Args,
    programs: &Programs,
    backing: &'static str,
    place: &Path,
    report: &mut Report,
) -> Result<()> {
    let effort = args.effort();
    let name = |point: &Point| format!("{backing}/{}/qd{}/", point.pattern, point.depth);
    let mut points = Point::all();
    points.retain(|point| args.wants(&name(point)));
    let wants_resync = args.wants(&format!("{backing}/resync/"));
    if points.is_empty() && !wants_resync {
        return Ok(());
    }
    eprintln!("{backing}: starting the servers");
    let mut servers = Servers::start(place, programs, args.size << 20, backing == "ram")?;
    for point in &points {
        eprintln!("{}", name(point));
        report.rows.extend(points::measure(&servers, backing, point, effort)?);
    }
    if wants_resync {
        eprintln!("{backing}/resync/");
        report.resync.extend(resync::measure(&mut servers, backing, effort.runs)?);
    }
    report.missing.extend(servers.missing.iter().map(|text| format!("{backing}: {text}")));
    Ok(())
}
