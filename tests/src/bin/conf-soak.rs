//! Random configurations, the original drbdadm against ours: `conf-soak --cases N --seed S`.
//!
//! Also the body of the test with fewer cases. Ends with 1 if there was an unexplained difference.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use drbdrs_tests::confgen::{Tally, Tools, one};
use drbdrs_tests::{need, program};

/// More differences than this are not collected.
const PROBLEMS_MAX: usize = 20;

fn main() -> ExitCode {
    let (mut cases, mut seed) = (2000u64, 1u64);
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value = words.next().and_then(|v| v.parse().ok());
        match (word.as_str(), value) {
            ("--cases", Some(n)) => cases = n,
            ("--seed", Some(n)) => seed = n,
            _ => {
                eprintln!("usage: conf-soak [--cases N] [--seed S]");
                return ExitCode::from(2);
            }
        }
    }
    match soak(cases, seed) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("conf-soak: {e}");
            ExitCode::from(2)
        }
    }
}

fn soak(cases: u64, seed: u64) -> anyhow::Result<bool> {
    let ours = match std::env::var_os("DRBDADM") {
        Some(path) => path.into(),
        None => program("drbdadm"),
    };
    let scratch = tempfile::tempdir()?;
    let tools = Tools::new(scratch.path(), Path::new(need::ORIGINAL_DRBDADM), &ours)?;
    let next = AtomicU64::new(seed);
    let found = Mutex::new((Tally::default(), Vec::new()));
    let work = || {
        let mut tally = Tally::default();
        let mut problems = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at >= seed.saturating_add(cases) || problems.len() >= PROBLEMS_MAX {
                break;
            }
            if let Err(text) = one(&tools, scratch.path(), at, &mut tally) {
                problems.push(text);
            }
        }
        if let Ok(mut found) = found.lock() {
            found.0.add(&tally);
            found.1.extend(problems);
        }
    };
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(work);
        }
    });
    let (tally, problems) = found.into_inner().unwrap_or_default();
    for problem in &problems {
        println!("{problem}");
    }
    let accepted = tally.accepted * 100 / tally.runs.max(1);
    println!(
        "{cases} cases from seed {seed}: {} runs, {accepted} % accepted by the original, {} \
         unexplained differences",
        tally.runs,
        problems.len()
    );
    let mut refused: Vec<_> = tally.refused.iter().collect();
    refused.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    for (kind, count) in refused.into_iter().take(12) {
        println!("  {count:6} refused by both: {kind}");
    }
    for (reason, count) in &tally.intended {
        println!("  {count:6} intended: {reason}");
    }
    Ok(problems.is_empty())
}
