//! How long an iSCSI client waits when the active node of a Heartbeat pair leaves: cleanly stopped,
//! or without current. Needs root, and the Debian packages that `cargo xtask test --install` has.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Parser;
use drbdrs_tests::heartbeat::{Leaving, Site};
use drbdrs_tests::nodes::Programs;

/// Distribution of the service's outage over many fail-overs.
#[derive(Parser)]
struct Arguments {
    /// Fail-overs of each kind.
    #[arg(long, default_value_t = 30)]
    runs: u32,
    /// Only this kind.
    #[arg(long, value_parser = ["clean", "power-off"])]
    only: Option<String>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let mut site = Site::new(Programs::beside()?)?;
    let mut active = 0;
    for (name, how) in [("clean", Leaving::Clean), ("power-off", Leaving::PowerOff)] {
        if arguments.only.as_deref().is_some_and(|only| only != name) {
            continue;
        }
        let mut stalls = Vec::new();
        for run in 1..=arguments.runs {
            let stall = one(&mut site, active, how)?;
            println!("{name} {run}: {:.2} s", stall.as_secs_f64());
            stalls.push(stall);
            active = 1 - active;
        }
        report(name, &mut stalls);
    }
    Ok(())
}

fn one(site: &mut Site, active: usize, how: Leaving) -> Result<Duration> {
    let mut client = site.client().with_context(|| site.logs())?;
    let stop = AtomicBool::new(false);
    let stall = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let stall = client.write_until(&stop)?;
            client.verify()?;
            Ok::<_, anyhow::Error>(stall)
        });
        std::thread::sleep(Duration::from_secs(1));
        let start = Instant::now();
        let left = site.leave(active, how).and_then(|()| site.until_active(1 - active));
        if let Err(error) = left {
            // The client would wait for ever: it fails instead.
            eprintln!("failover-bench: {error:#}");
            site.end_client();
        }
        println!("  other node active after {:.2} s", start.elapsed().as_secs_f64());
        // The client finds it when it next tries.
        std::thread::sleep(Duration::from_secs(5));
        stop.store(true, Ordering::Relaxed);
        writer.join().map_err(|_| anyhow::anyhow!("the client panicked"))?
    });
    let stall = stall.with_context(|| site.logs())?;
    drop(client);
    site.come_back(active)?;
    Ok(stall)
}

fn report(name: &str, stalls: &mut [Duration]) {
    stalls.sort();
    let at = |part: usize| {
        let index = (stalls.len() * part / 100).min(stalls.len().saturating_sub(1));
        stalls.get(index).map_or(0.0, Duration::as_secs_f64)
    };
    println!(
        "| {name} | {} | {:.2} | {:.2} | {:.2} | {:.2} |",
        stalls.len(),
        at(0),
        at(50),
        at(90),
        at(100)
    );
}
