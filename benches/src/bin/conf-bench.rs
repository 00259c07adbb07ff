//! A configuration of 10,000 resources: time and memory of our drbdadm, and the original's.
//!
//! `cargo xtask bench conf [-- --json FILE]`. Both programs run in turn on the same files, several
//! times after a warm-up. Targets are printed with the figures; nothing fails on them.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use clap::Parser;
use serde::Serialize;

/// The original drbdadm for 8.4.
const ORIGINAL: &str = "/lib/drbd/drbdadm-84";

/// Options.
#[derive(Parser)]
struct Args {
    /// Resources in the large file.
    #[arg(long, default_value_t = 10_000)]
    resources: u32,
    /// Counted runs of each command.
    #[arg(long, default_value_t = 7)]
    runs: u32,
    /// Write the figures to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Our program; default: beside this one.
    #[arg(long)]
    drbdadm: Option<PathBuf>,
}

/// One command's figures.
#[derive(Debug, Serialize)]
struct Row {
    program: &'static str,
    resources: u32,
    command: String,
    exit_code: Option<i32>,
    wall_ms_min: f64,
    wall_ms_median: f64,
    wall_ms_max: f64,
    cpu_ms_median: f64,
    rss_kib_max: u64,
}

fn main() -> std::io::Result<()> {
    let args = Args::parse();
    let ours = match &args.drbdadm {
        Some(path) => path.clone(),
        None => std::env::current_exe()?.with_file_name("drbdadm"),
    };
    let folder = std::env::temp_dir().join(format!("drbdrs-conf-bench-{}", std::process::id()));
    std::fs::create_dir(&folder)?;
    let result = measure(&args, &ours, &folder);
    std::fs::remove_dir_all(&folder)?;
    let rows = result?;
    print_table(&args, &rows);
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_vec_pretty(&rows)?)?;
    }
    Ok(())
}

fn measure(args: &Args, ours: &Path, folder: &Path) -> std::io::Result<Vec<Row>> {
    // The original's table of unique names is full at some 440 such resources (exit code 42); a file
    // that both can read shows
    // the ratio.
    let mut rows = Vec::new();
    for resources in [args.resources, 400.min(args.resources)] {
        let file = folder.join(format!("{resources}.conf"));
        generate(&file, resources)?;
        for command in ["sh-nop", "dump"] {
            let programs = [("drbdrs", ours), ("original", Path::new(ORIGINAL))];
            let present: Vec<_> = programs.into_iter().filter(|p| p.1.exists()).collect();
            let mut figures: Vec<Vec<Figure>> = present.iter().map(|_| Vec::new()).collect();
            for run in 0..=args.runs {
                for ((_, program), list) in present.iter().zip(&mut figures) {
                    let figure = one(program, &file, command, folder)?;
                    if run > 0 {
                        list.push(figure);
                    }
                }
            }
            for ((name, _), list) in present.iter().zip(figures) {
                rows.push(row(name, resources, command, list));
            }
        }
    }
    Ok(rows)
}

/// A two-node resource of the usual size, many times.
fn generate(path: &Path, resources: u32) -> std::io::Result<()> {
    let mut out = std::io::BufWriter::new(std::fs::File::create(path)?);
    writeln!(out, "global {{ disable-ip-verification; usage-count no; }}")?;
    writeln!(out, "common {{ net {{ protocol C; timeout 60; }} disk {{ resync-rate 10M; }} }}")?;
    for i in 0..resources {
        writeln!(
            out,
            "resource res{i} {{\n    net {{ shared-secret \"secret {i}\"; max-buffers 8000; }}"
        )?;
        for (host, last) in [("alpha", 1), ("bravo", 2)] {
            writeln!(
                out,
                "    on {host} {{\n        device    /dev/drbd{i};\n        disk      /dev/vg0/lv{i};\n        \
                 meta-disk internal;\n        address   10.0.0.{last}:{};\n    }}",
                7000 + i
            )?;
        }
        writeln!(out, "}}")?;
    }
    out.flush()
}

#[derive(Clone, Copy)]
struct Figure {
    wall_ms: f64,
    cpu_ms: f64,
    rss_kib: u64,
    exit_code: Option<i32>,
}

/// One run; time(1)'s own accounting gives the peak memory.
fn one(program: &Path, file: &Path, command: &str, folder: &Path) -> std::io::Result<Figure> {
    let report = folder.join("rss");
    let start = Instant::now();
    let status = Command::new("/usr/bin/time")
        .args(["-f", "%M %U %S", "-o"])
        .arg(&report)
        .arg(program)
        .arg("-c")
        .arg(file)
        .arg(command)
        .env("__DRBD_NODE__", "alpha")
        .env("DRBD_DONT_WARN_ON_VERSION_MISMATCH", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .map_err(|e| std::io::Error::other(format!("/usr/bin/time (package time): {e}")))?;
    let wall_ms = start.elapsed().as_secs_f64() * 1000.0;
    let text = std::fs::read_to_string(&report).unwrap_or_default();
    let mut words = text.lines().last().unwrap_or_default().split(' ');
    let rss_kib = words.next().and_then(|w| w.parse().ok()).unwrap_or(0);
    let cpu_ms = words.filter_map(|w| w.parse::<f64>().ok()).sum::<f64>() * 1000.0;
    Ok(Figure { wall_ms, cpu_ms, rss_kib, exit_code: status.code() })
}

fn row(program: &'static str, resources: u32, command: &str, mut list: Vec<Figure>) -> Row {
    let mut cpu: Vec<f64> = list.iter().map(|f| f.cpu_ms).collect();
    cpu.sort_by(f64::total_cmp);
    list.sort_by(|a, b| a.wall_ms.total_cmp(&b.wall_ms));
    let at = |i: usize| list.get(i).map_or(0.0, |f| f.wall_ms);
    Row {
        program,
        resources,
        command: command.to_owned(),
        exit_code: list.first().and_then(|f| f.exit_code),
        wall_ms_min: at(0),
        wall_ms_median: at(list.len() / 2),
        wall_ms_max: at(list.len().saturating_sub(1)),
        cpu_ms_median: cpu.get(cpu.len() / 2).copied().unwrap_or(0.0),
        rss_kib_max: list.iter().map(|f| f.rss_kib).max().unwrap_or(0),
    }
}

fn print_table(args: &Args, rows: &[Row]) {
    println!("{} runs each, wall time and median CPU time in ms, largest memory in MiB", args.runs);
    println!(
        "{:>9} {:<8} {:<9} {:>9} {:>9} {:>9} {:>8} {:>8} {:>5}",
        "resources", "command", "program", "min", "median", "max", "CPU", "MiB", "exit"
    );
    for r in rows {
        println!(
            "{:>9} {:<8} {:<9} {:>9.1} {:>9.1} {:>9.1} {:>8.0} {:>8.1} {:>5}",
            r.resources,
            r.command,
            r.program,
            r.wall_ms_min,
            r.wall_ms_median,
            r.wall_ms_max,
            r.cpu_ms_median,
            mib(r.rss_kib_max),
            r.exit_code.map_or_else(|| "-".into(), |c| c.to_string())
        );
    }
    let ours: Vec<&Row> =
        rows.iter().filter(|r| r.program == "drbdrs" && r.resources == args.resources).collect();
    let good = ours.iter().all(|r| r.wall_ms_median < 1000.0 && r.rss_kib_max < 200 * 1024);
    println!(
        "target for {} resources, under 1 s and 200 MiB: {}",
        args.resources,
        if good { "met" } else { "missed" }
    );
}

#[expect(clippy::cast_precision_loss, reason = "memory sizes are far below 2^52 KiB")]
fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}
