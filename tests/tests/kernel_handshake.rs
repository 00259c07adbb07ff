//! The handshake decision, ours against the kernel's, on random situations.
//!
//! `DRBDRS_SEED=N` begins elsewhere, `DRBDRS_CASES=N` changes how many.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use drbdrs_tests::handshake_case::{Bench, Verdict, judge, presented, setting, situation};
use drbdrs_tests::interop::row;
use drbdrs_tests::metagen::Random;
use libtest_mimic::Arguments;

/// Cases per setting of the kernel's node, which takes as long as several cases.
const PER_SETTING: u64 = 8;
/// Cases of an ordinary run.
const CASES: u64 = 160;
/// An ordinary run ends after this time, whatever it has reached.
const TIME_MAX: Duration = Duration::from_secs(90);

fn main() {
    let args = Arguments::from_args();
    let test = row(9, "both", "decisions_are_those_of_the_kernel", decisions);
    libtest_mimic::run(&args, vec![test]).exit();
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn decisions() -> Result<()> {
    let first = number("DRBDRS_SEED").unwrap_or(1);
    let wanted = number("DRBDRS_CASES");
    let count = wanted.unwrap_or(CASES);
    let mut bench = Bench::boot()?;
    let mut table: BTreeMap<String, u64> = BTreeMap::new();
    let mut differences = Vec::new();
    let mut cases = 0;
    let start = Instant::now();
    for seed in first..first + count.div_ceil(PER_SETTING) {
        if wanted.is_none() && start.elapsed() > TIME_MAX {
            break;
        }
        let mut random = Random::new(seed);
        let setting = setting(&mut random);
        let place = || format!("DRBDRS_SEED={seed} {setting:?}");
        bench.prepare(&setting).with_context(place)?;
        for _ in 0..PER_SETTING {
            let (brought, shown, observed) =
                bench.case(&mut random, &setting, presented).with_context(place)?;
            let handshake = situation(&setting, &brought, &shown);
            let (decision, verdict) = judge(&handshake, &observed);
            cases += 1;
            let rule = decision.comparison.rule;
            let what = match &verdict {
                Verdict::Equal => "equal",
                Verdict::Explained(_) => "explained",
                Verdict::Different(_) => "DIFFERENT",
            };
            let row = format!("rule {rule:3}  {:22}  {what}", decision.reason.code());
            *table.entry(row).or_default() += 1;
            if let Verdict::Different(text) = verdict {
                differences.push(format!(
                    "{text}\n  {}\n  brought {brought:?}\n  presented {shown:?}\n  \
                     observed {observed:?}",
                    place()
                ));
            }
        }
    }
    println!("{cases} cases in {:?}", start.elapsed());
    for (row, count) in &table {
        println!("{row}  {count}");
    }
    // The first ones tell enough.
    let shown = differences.iter().take(8).map(String::as_str).collect::<Vec<_>>().join("\n");
    ensure!(differences.is_empty(), "{} differ:\n{shown}", differences.len());
    Ok(())
}
