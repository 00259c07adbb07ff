//! The points that are measured, and how a point is measured: several short runs, the servers in turn.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result};
use drbdrs_benches::load::{self, Job, Order, Sample};
use drbdrs_benches::process::{self, SyscallCount};
use serde::Serialize;

use crate::servers::{Servers, Target};

/// Queue depths of random writes.
pub(crate) const DEPTHS: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];
/// Queue depth of sequential writes.
const SEQUENTIAL_DEPTH: usize = 8;
/// Length of the run in which system calls are counted.
const COUNTED_TIME: Duration = Duration::from_millis(300);

/// Something to measure.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Point {
    /// For people.
    pub(crate) pattern: &'static str,
    order: Order,
    len: usize,
    pub(crate) depth: usize,
}

impl Point {
    /// All of them.
    pub(crate) fn all() -> Vec<Self> {
        let random = |depth| Self { pattern: RANDOM, order: Order::Random, len: 4 << 10, depth };
        let sequential =
            |pattern, len| Self { pattern, order: Order::Sequential, len, depth: SEQUENTIAL_DEPTH };
        let mut points: Vec<Self> = DEPTHS.map(random).into();
        points.extend([sequential(SEQUENTIAL, 256 << 10), sequential("1m-sequential", 1 << 20)]);
        points
    }
}

pub(crate) const RANDOM: &str = "4k-random";
pub(crate) const SEQUENTIAL: &str = "256k-sequential";

/// The figures of one server at one point.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) backing: &'static str,
    pub(crate) pattern: &'static str,
    pub(crate) depth: usize,
    pub(crate) server: String,
    pub(crate) iops: f64,
    pub(crate) mib_per_second: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) p999_us: f64,
    pub(crate) cpu_us_per_io: f64,
    /// None: not measured.
    pub(crate) syscalls_per_io: Option<f64>,
    /// Of every run, as a sign of how calm the machine was.
    pub(crate) iops_of_runs: Vec<f64>,
}

/// How long, and how often.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    pub(crate) runs: u32,
    pub(crate) seconds_per_point: f64,
}

/// Measures all servers at a point, in turn.
pub(crate) fn measure(
    servers: &Servers,
    backing: &'static str,
    point: &Point,
    effort: Effort,
) -> Result<Vec<Row>> {
    let time = Duration::from_secs_f64(effort.seconds_per_point / f64::from(effort.runs));
    let job = Job { order: point.order, len: point.len, depth: point.depth, time };
    let mut runs: BTreeMap<usize, (Vec<Sample>, Duration)> = BTreeMap::new();
    for round in 0..effort.runs {
        for (number, target) in servers.targets.iter().enumerate() {
            let before = process::cpu(&target.pids)?;
            let sample = load::run(&target.server, &job, seed(round))
                .with_context(|| target.name.clone())?;
            let (samples, cpu) = runs.entry(number).or_default();
            *cpu += process::cpu(&target.pids)? - before;
            samples.push(sample);
        }
    }
    let mut rows = Vec::new();
    for (number, (samples, cpu)) in runs {
        let Some(target) = servers.targets.get(number) else { continue };
        let syscalls = syscalls(target, &Job { time: COUNTED_TIME, ..job });
        rows.push(row(backing, point, target, &samples, cpu, syscalls));
    }
    Ok(rows)
}

fn seed(round: u32) -> u64 {
    (u64::from(round) + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

/// Counted in a run of its own, since counting costs time.
fn syscalls(target: &Target, job: &Job) -> Option<f64> {
    let count = SyscallCount::start(&target.pids).ok()?;
    let sample = load::run(&target.server, job, 99);
    let counted = count.end().ok()?;
    Some(ratio(counted, sample.ok()?.latencies.len()))
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn ratio(count: u64, of: usize) -> f64 {
    count as f64 / (of as f64).max(1.0)
}

fn row(
    backing: &'static str,
    point: &Point,
    target: &Target,
    samples: &[Sample],
    cpu: Duration,
    syscalls_per_io: Option<f64>,
) -> Row {
    let writes: usize = samples.iter().map(|sample| sample.latencies.len()).sum();
    let iops_of_runs: Vec<f64> = samples.iter().map(Sample::iops).collect();
    let iops = median(iops_of_runs.clone());
    let percentile = |part| {
        let of_runs = samples.iter().map(|sample| quantile(&sample.latencies, part));
        median(of_runs.collect())
    };
    Row {
        backing,
        pattern: point.pattern,
        depth: point.depth,
        server: target.name.clone(),
        iops,
        mib_per_second: iops * ratio(1, 1 << 20) * ratio(point.len as u64, 1),
        p50_us: percentile(0.5),
        p99_us: percentile(0.99),
        p999_us: percentile(0.999),
        cpu_us_per_io: cpu.as_secs_f64() * 1e6 / ratio(writes as u64, 1),
        syscalls_per_io,
        iops_of_runs,
    }
}

/// In microseconds.
#[expect(clippy::cast_precision_loss, reason = "figures for people")]
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index")]
fn quantile(latencies: &[Duration], part: f64) -> f64 {
    let mut sorted = latencies.to_vec();
    sorted.sort_unstable();
    let at = (sorted.len() as f64 * part) as usize;
    sorted.get(at.min(sorted.len().saturating_sub(1))).map_or(0.0, |l| l.as_secs_f64() * 1e6)
}

/// Of an even number the upper one.
pub(crate) fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or_default()
}
