//! All recorded runs of the original drbdadm, repeated with ours.
//!
//! Exit code, stdout and the first line of stderr must be equal, but for the runs that
//! `conf-differences.toml` lists with a reason; a listed run that does not differ is an error too.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use drbdrs_tests::confcase::{Case, Got, key, loosened, read_all, run_case};
use drbdrs_tests::need::{Need, trial};
use drbdrs_tests::{fixtures, program};
use libtest_mimic::{Arguments, Failed};
use serde::Deserialize;

/// At least this part of all runs is equal, in percent.
const EQUAL_PERCENT_MIN: u32 = 97;

#[derive(Deserialize)]
struct Differences {
    difference: Vec<Difference>,
}

#[derive(Deserialize)]
struct Difference {
    case: String,
    /// The arguments behind `-c FILE`, joined by blanks; none: every run of the case that differs.
    args: Option<String>,
    #[serde(rename = "reason")]
    _reason: String,
}

fn main() {
    let args = Arguments::from_args();
    let tests = vec![trial("recorded_runs_of_the_original", &[Need::Namespaces], recorded)];
    libtest_mimic::run(&args, tests).exit();
}

fn recorded() -> Result<(), Failed> {
    let folder = fixtures().join("conf");
    let cases = read_all(&folder)?;
    let results = run_all(&folder, &cases)?;
    let listed: Differences =
        toml::from_str(&std::fs::read_to_string(fixtures().join("conf-differences.toml"))?)?;
    let mut used = vec![false; listed.difference.len()];
    let (mut total, mut equal, mut whole, mut problems) = (0u32, 0u32, 0u32, Vec::new());
    let mut questionable = 0u32;
    for case in &cases {
        let got = results.get(&case.name).map_or(&[][..], Vec::as_slice);
        for (run, got) in case.runs.iter().zip(got) {
            total += 1;
            let args = run.args.iter().filter(|a| !a.ends_with(".conf") && *a != "-c");
            let args = args.cloned().collect::<Vec<_>>().join(" ");
            let want = key(run.rc, &run.stdout, &run.stderr);
            let have = key(got.rc, &got.stdout, &got.stderr);
            let same_calls = run.calls == got.calls;
            if want == have && same_calls {
                equal += 1;
                whole += u32::from(loosened(&run.stderr) == loosened(&got.stderr));
                continue;
            }
            questionable += u32::from(case.may_differ.is_some() || run.may_differ.is_some());
            let found = listed
                .difference
                .iter()
                .position(|d| d.case == case.name && d.args.as_ref().is_none_or(|a| *a == args));
            match found.and_then(|at| used.get_mut(at)) {
                Some(used) => *used = true,
                None => problems.push(describe(case, &args, &want, &have, &run.calls, got)),
            }
        }
    }
    for (difference, used) in listed.difference.iter().zip(&used) {
        if !used {
            let (case, args) = (&difference.case, &difference.args);
            problems.push(format!("{case} {args:?}: listed, but does not differ"));
        }
    }
    let percent = f64::from(equal) * 100.0 / f64::from(total.max(1));
    println!(
        "{total} recorded runs: {equal} equal ({percent:.2} %), of them {whole} with the whole of \
         stderr; {} differ, in {questionable} of them the original is questionable",
        total - equal
    );
    assert_eq!(total, 1419, "all recorded runs were repeated");
    if equal * 100 < total * EQUAL_PERCENT_MIN {
        problems.push(format!("only {percent:.2} % equal, {EQUAL_PERCENT_MIN} % are needed"));
    }
    if problems.is_empty() { Ok(()) } else { Err(problems.join("\n\n").into()) }
}

type Key = (i32, String, String);

fn describe(
    case: &Case,
    args: &str,
    want: &Key,
    have: &Key,
    calls: &[String],
    got: &Got,
) -> String {
    format!(
        "{}: drbdadm {args}\n  original: {want:?}\n  ours:     {have:?}\n  calls of the original: \
         {calls:?}\n  calls of ours:         {:?}",
        case.name, got.calls
    )
}

fn run_all(folder: &Path, cases: &[Case]) -> Result<BTreeMap<String, Vec<Got>>, Failed> {
    let drbdadm = program("drbdadm");
    let runner = Path::new(env!("CARGO_BIN_EXE_conf-case-runner"));
    let stand_in = Path::new(env!("CARGO_BIN_EXE_backend-standin"));
    let next = AtomicUsize::new(0);
    let results = Mutex::new(BTreeMap::new());
    let work = || -> anyhow::Result<()> {
        while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
            let got = run_case(folder, case, &drbdadm, runner, stand_in)?;
            if let Ok(mut results) = results.lock() {
                results.insert(case.name.clone(), got);
            }
        }
        Ok(())
    };
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        handles.into_iter().try_for_each(|h| match h.join() {
            Ok(result) => result.map_err(Failed::from),
            Err(_) => Err(Failed::from("a thread panicked")),
        })
    })?;
    Ok(results.into_inner().unwrap_or_default())
}
