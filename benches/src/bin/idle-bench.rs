//! What a node costs that has many large resources and nothing to do: memory and processor time.
//!
//! `cargo xtask bench idle [--resources N] [--seconds S] [--json FILE]`. Two daemons on loopback, all
//! resources connected and in sync, disks of 1 TiB as sparse files. Targets are printed with the
//! figures; nothing fails on them.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Parser;
use drbdrs_benches::process::{cpu, load_average, memory_and_threads};
use drbdrs_tests::nodes::{Node, Programs, eventually};
use serde::Serialize;

/// Of the issue: of one daemon with a hundred resources.
const RSS_TARGET_MB: f64 = 150.0;
/// Percent of one processor.
const CPU_TARGET: f64 = 0.5;

/// Options.
#[derive(Parser)]
struct Args {
    /// How many resources.
    #[arg(long, default_value_t = 100)]
    resources: u16,
    /// Size of a disk in GiB.
    #[arg(long, default_value_t = 1024)]
    gib: u64,
    /// How long the idle daemons are watched.
    #[arg(long, default_value_t = 30)]
    seconds: u64,
    /// Where the sparse files go.
    #[arg(long, default_value = "/dev/shm")]
    dir: PathBuf,
    /// Where our programs are; default: beside this one.
    #[arg(long)]
    programs: Option<PathBuf>,
    /// Write the figures to this file.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Of one daemon.
#[derive(Debug, Serialize)]
struct Cost {
    node: &'static str,
    rss_mb_without_resources: f64,
    rss_mb: f64,
    threads: u64,
    cpu_percent_of_one: f64,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let dir = tempfile::Builder::new().prefix("drbdrs-idle-").tempdir_in(&args.dir)?;
    let programs = match &args.programs {
        Some(dir) => Programs::in_dir(dir),
        None => Programs::beside()?,
    };
    let mut nodes =
        [Node::alone(&programs, "alpha", dir.path())?, Node::alone(&programs, "beta", dir.path())?];
    configure(&nodes, &args)?;
    let mut before = Vec::new();
    for node in &mut nodes {
        node.start("")?;
        before.push(megabytes(pid(node)?)?.0);
    }
    let start = Instant::now();
    bring_up(&nodes, &args)?;
    println!("{} resources connected and in sync after {:?}", args.resources, start.elapsed());
    // What was begun, ends.
    std::thread::sleep(Duration::from_secs(3));
    let costs = watch(&nodes, &before, Duration::from_secs(args.seconds))?;
    print(&args, &costs);
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_string_pretty(&costs)?)?;
    }
    Ok(())
}

fn configure(nodes: &[Node; 2], args: &Args) -> Result<()> {
    let ports = free_ports(usize::from(args.resources) * 2)?;
    let mut text = "global { usage-count no; }\n".to_owned();
    for (number, ports) in (0..u32::from(args.resources)).zip(ports.chunks(2)) {
        text += &format!("resource r{number} {{\n");
        for (node, port) in nodes.iter().zip(ports) {
            let disk = node.dir.join(format!("disk{number}"));
            std::fs::File::create(&disk)?.set_len(args.gib << 30)?;
            // The tools lock minors; those of the tests are smaller.
            let minor = 500_000 + std::process::id() % 1000 * 500 + number;
            text += &format!(
                "  on {} {{ device minor {minor}; disk {}; meta-disk internal; \
                 address 127.0.0.1:{port}; }}\n",
                node.name,
                disk.display()
            );
        }
        text += "}\n";
    }
    Ok(std::fs::write(nodes[0].conf(), text)?)
}

/// They lie below those that outgoing connections get.
fn free_ports(many: usize) -> Result<Vec<u16>> {
    let start = u16::try_from(10_000 + std::process::id() % 10_000)?;
    let free =
        (start..32_000).filter(|port| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok());
    let ports: Vec<u16> = free.take(many).collect();
    (ports.len() == many).then_some(ports).context("too few free ports")
}

fn bring_up(nodes: &[Node; 2], args: &Args) -> Result<()> {
    let count = usize::from(args.resources);
    for node in nodes {
        node.adm(&["create-md", "--force", "all"])?.ok()?;
        node.adm(&["up", "all"])?.ok()?;
    }
    until(&nodes[0], "cs:Connected", count)?;
    for number in 0..count {
        nodes[0].adm(&["new-current-uuid", "--clear-bitmap", &format!("r{number}/0")])?.ok()?;
    }
    until(&nodes[0], "ds:UpToDate/UpToDate", count)?;
    until(&nodes[1], "ds:UpToDate/UpToDate", count)
}

fn until(node: &Node, words: &str, times: usize) -> Result<()> {
    eventually(|| {
        let text = node.proc()?;
        Ok(if text.matches(words).count() == times { Ok(()) } else { Err(text) })
    })
}

fn watch(nodes: &[Node; 2], before: &[f64], time: Duration) -> Result<Vec<Cost>> {
    let start = Instant::now();
    let used: Vec<Duration> =
        nodes.iter().map(|node| Ok(cpu(&[pid(node)?])?)).collect::<Result<_>>()?;
    std::thread::sleep(time);
    let took = start.elapsed().as_secs_f64();
    let each = nodes.iter().zip(used).zip(before);
    each.map(|((node, used), before)| {
        let (rss_mb, threads) = megabytes(pid(node)?)?;
        Ok(Cost {
            node: node.name,
            rss_mb_without_resources: *before,
            rss_mb,
            threads,
            cpu_percent_of_one: (cpu(&[pid(node)?])? - used).as_secs_f64() / took * 100.0,
        })
    })
    .collect()
}

fn pid(node: &Node) -> Result<u32> {
    node.pid().context("the daemon does not run")
}

#[expect(clippy::cast_precision_loss, reason = "a figure for people")]
fn megabytes(pid: u32) -> Result<(f64, u64)> {
    let (bytes, threads) = memory_and_threads(pid)?;
    Ok((bytes as f64 / 1e6, threads))
}

fn print(args: &Args, costs: &[Cost]) {
    println!(
        "\n{} connected resources of {} GiB, idle for {} s; load average {}",
        args.resources,
        args.gib,
        args.seconds,
        load_average()
    );
    println!(
        "{:<8} {:>14} {:>10} {:>8} {:>18}",
        "daemon", "RSS at start", "RSS", "threads", "CPU of one core"
    );
    for cost in costs {
        println!(
            "{:<8} {:>11.1} MB {:>7.1} MB {:>8} {:>16.2} %",
            cost.node,
            cost.rss_mb_without_resources,
            cost.rss_mb,
            cost.threads,
            cost.cpu_percent_of_one
        );
    }
    let verdict = |is_reached| if is_reached { "reached" } else { "MISSED" };
    let is_small = costs.iter().all(|cost| cost.rss_mb <= RSS_TARGET_MB);
    let is_calm = costs.iter().all(|cost| cost.cpu_percent_of_one < CPU_TARGET);
    println!("target, for 100 resources: RSS at most {RSS_TARGET_MB} MB: {}", verdict(is_small));
    println!("target, for 100 resources: CPU below {CPU_TARGET} %: {}", verdict(is_calm));
}
