//! The figures as tables, and the ratios with their targets.

use serde::Serialize;

use crate::points::{DEPTHS, RANDOM, Row, SEQUENTIAL};
use crate::resync::{Copied, FULL, NBDCOPY};
use crate::servers::{NBDKIT_FILE, NBDKIT_MEMORY, QUORUM, pair_name};

/// A delayed acknowledgement shows as a latency near 40 ms.
const DELAYED_ACK_US: std::ops::Range<f64> = 38_000.0..44_000.0;

/// Everything that was measured.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) machine: Machine,
    pub(crate) rows: Vec<Row>,
    pub(crate) resync: Vec<Copied>,
    pub(crate) ratios: Vec<Ratio>,
    pub(crate) findings: Vec<String>,
    pub(crate) missing: Vec<String>,
}

/// Where and how.
#[derive(Debug, Serialize)]
pub(crate) struct Machine {
    pub(crate) processors: usize,
    pub(crate) kernel: String,
    pub(crate) load_before: String,
    pub(crate) load_after: String,
    pub(crate) device_mib: u64,
    pub(crate) runs_per_point: u32,
    pub(crate) seconds_per_point: f64,
}

/// A figure of ours against that of a peer in the same run.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Ratio {
    backing: &'static str,
    what: String,
    against: &'static str,
    ours: f64,
    theirs: f64,
    ratio: f64,
    /// None: no target.
    at_least: Option<f64>,
    at_most: Option<f64>,
}

impl Ratio {
    fn verdict(&self) -> String {
        match (self.at_least, self.at_most) {
            (Some(least), _) if self.ratio >= least => format!("at least {least}: reached"),
            (Some(least), _) => format!("at least {least}: MISSED"),
            (_, Some(most)) if self.ratio <= most => format!("at most {most}: reached"),
            (_, Some(most)) => format!("at most {most}: MISSED"),
            (None, None) => "no target".into(),
        }
    }
}

/// Where a row of the table is looked for.
type Place = (&'static str, &'static str, usize);

fn find<'a>(rows: &'a [Row], place: Place, server: &str) -> Option<&'a Row> {
    let (backing, pattern, depth) = place;
    rows.iter().find(|row| {
        row.backing == backing
            && row.pattern == pattern
            && (depth == 0 || row.depth == depth)
            && row.server == server
    })
}

/// Protocol C against the peers.
pub(crate) fn ratios(rows: &[Row], resync: &[Copied]) -> Vec<Ratio> {
    let mut ratios = Vec::new();
    for backing in ["ram", "disk"] {
        let is_ram = backing == "ram";
        let mut compare = |pattern, depth, against, is_latency, target: Option<f64>| {
            let place = (backing, pattern, depth);
            let ours = find(rows, place, &pair_name('C'));
            let Some((ours, theirs)) = ours.zip(find(rows, place, against)) else { return };
            let figure = |row: &Row| if is_latency { row.p50_us } else { row.iops };
            let unit = if is_latency { "median latency in µs" } else { "IOPS" };
            let target = target.filter(|_| is_ram);
            ratios.push(Ratio {
                backing,
                what: format!("{pattern} QD{}, {unit}", ours.depth),
                against,
                ours: figure(ours),
                theirs: figure(theirs),
                ratio: figure(ours) / figure(theirs),
                at_least: target.filter(|_| !is_latency),
                at_most: target.filter(|_| is_latency),
            });
        };
        compare(RANDOM, 1, NBDKIT_FILE, true, Some(2.2));
        compare(RANDOM, 1, NBDKIT_MEMORY, true, Some(2.2));
        compare(RANDOM, 32, NBDKIT_FILE, false, Some(0.35));
        compare(RANDOM, 32, NBDKIT_MEMORY, false, Some(0.35));
        compare(RANDOM, 1, QUORUM, false, Some(1.7));
        compare(RANDOM, 32, QUORUM, false, Some(2.0));
        compare(SEQUENTIAL, 0, QUORUM, false, Some(1.5));
        ratios.extend(resync_ratio(resync, backing));
    }
    ratios
}

fn resync_ratio(resync: &[Copied], backing: &'static str) -> Option<Ratio> {
    let find = |what: &str| resync.iter().find(|row| row.backing == backing && row.what == what);
    let (ours, theirs) = find(FULL).zip(find(NBDCOPY))?;
    Some(Ratio {
        backing,
        what: "full resync, GiB/s".into(),
        against: NBDCOPY,
        ours: ours.gib_per_second,
        theirs: theirs.gib_per_second,
        ratio: ours.gib_per_second / theirs.gib_per_second,
        at_least: (backing == "ram").then_some(0.6),
        at_most: None,
    })
}

/// Shapes of latency that point to a fault: delayed acknowledgements, one depth far off.
pub(crate) fn findings(rows: &[Row]) -> Vec<String> {
    let mut findings = Vec::new();
    for row in rows.iter().filter(|row| row.server.starts_with("drbdrs")) {
        let name = format!("{} {} QD{} {}", row.backing, row.pattern, row.depth, row.server);
        for (percentile, value) in
            [("p50", row.p50_us), ("p99", row.p99_us), ("p99.9", row.p999_us)]
        {
            if DELAYED_ACK_US.contains(&value) {
                findings.push(format!("{name}: {percentile} near 40 ms ({value:.0} µs)"));
            }
        }
        let at = DEPTHS.iter().position(|depth| *depth == row.depth && row.pattern == RANDOM);
        let Some(at) = at else { continue };
        let neighbours = [at.checked_sub(1), Some(at + 1)].into_iter().flatten();
        let neighbours = neighbours
            .filter_map(|at| find(rows, (row.backing, RANDOM, *DEPTHS.get(at)?), &row.server));
        // Twice the depth is twice the latency at most; only a peak is one.
        let most = neighbours.map(|row| row.p50_us).fold(f64::NAN, f64::max);
        if row.p50_us >= 5.0 * most {
            findings
                .push(format!("{name}: median {:.0} µs, its neighbours' {most:.0}", row.p50_us));
        }
    }
    findings
}

/// Prints everything.
pub(crate) fn print(report: &Report) {
    print_head(&report.machine);
    print_rows(&report.rows);
    print_resync(&report.resync);
    print_ratios(report);
}

fn print_head(machine: &Machine) {
    println!("\n{} processors, Linux {}", machine.processors, machine.kernel);
    println!("load average {} before, {} after", machine.load_before, machine.load_after);
    println!(
        "every server: {} MiB, written before; every figure: median of {} runs of {:.2} s, the \
         servers in turn; the client (one thread, one connection, unix socket) shares the \
         processors with all of them",
        machine.device_mib,
        machine.runs_per_point,
        machine.seconds_per_point / f64::from(machine.runs_per_point)
    );
    println!(
        "drbdrs A, B, C: two daemons with TCP on loopback, by protocol; nbdkit: no replication; \
         qemu quorum: qemu-storage-daemon, a local file and a remote qemu-nbd behind a unix socket"
    );
    println!("disk-backed: drbdrs and QEMU write past the page cache (O_DIRECT), nbdkit into it");
    println!(
        "CPU and system calls: both daemons together; system calls are counted by perf in a run of \
         its own, `-`: not measured"
    );
}

fn print_rows(rows: &[Row]) {
    let mut last = None;
    for row in rows {
        let point = (row.backing, row.pattern, row.depth);
        if last.replace(point) != Some(point) {
            println!(
                "\n{:<28} {:>9} {:>9} {:>9} {:>9} {:>9} {:>8} {:>9}  IOPS of the runs",
                format!("{}-backed {} QD{}", row.backing, row.pattern, row.depth),
                "IOPS",
                "MiB/s",
                "p50 µs",
                "p99 µs",
                "p99.9 µs",
                "CPU µs/IO",
                "calls/IO"
            );
        }
        let syscalls =
            row.syscalls_per_io.map_or_else(|| "-".into(), |calls| format!("{calls:.2}"));
        let least = row.iops_of_runs.iter().copied().fold(f64::INFINITY, f64::min);
        let most = row.iops_of_runs.iter().copied().fold(0.0, f64::max);
        println!(
            "  {:<26} {:>9.0} {:>9.1} {:>9.0} {:>9.0} {:>9.0} {:>8.1} {:>9}  {least:.0}..{most:.0}",
            row.server,
            row.iops,
            row.mib_per_second,
            row.p50_us,
            row.p99_us,
            row.p999_us,
            row.cpu_us_per_io,
            syscalls
        );
    }
}

fn print_resync(resync: &[Copied]) {
    if resync.is_empty() {
        return;
    }
    println!("\n{:<34} {:>8} {:>9}  seconds of the runs", "copying", "MiB", "GiB/s");
    for row in resync {
        let seconds: Vec<String> = row.seconds_of_runs.iter().map(|s| format!("{s:.3}")).collect();
        let name = format!("{}-backed {}", row.backing, row.what);
        println!(
            "  {name:<32} {:>8.0} {:>9.2}  {}",
            row.mib,
            row.gib_per_second,
            seconds.join(" ")
        );
    }
}

fn print_ratios(report: &Report) {
    println!(
        "\n{:<64} {:>9} {:>9} {:>7}  target",
        "protocol C against peers", "ours", "theirs", "ratio"
    );
    for ratio in &report.ratios {
        let name = format!("{}-backed {} / {}", ratio.backing, ratio.what, ratio.against);
        println!(
            "  {name:<62} {:>9.2} {:>9.2} {:>7.2}  {}",
            ratio.ours,
            ratio.theirs,
            ratio.ratio,
            ratio.verdict()
        );
    }
    if report.findings.is_empty() {
        println!(
            "  no percentile of ours near 40 ms, no depth with five times its neighbours' median"
        );
    }
    for finding in &report.findings {
        println!("  CONSPICUOUS: {finding}");
    }
    for missing in &report.missing {
        println!("  NOT COMPARED: {missing}");
    }
}
