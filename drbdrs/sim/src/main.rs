//! `drbd-sim`: runs many simulated pairs of nodes and reports what goes wrong.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use drbd_sim::scenario::Scenario;
use drbd_sim::shrink::{judge, shrink};

const HELP: &str = "drbd-sim - breaks simulated pairs of nodes

  --seeds N      runs (default 1000)
  --start S      number of the first (default 0)
  --large N      leaves out runs with a large volume, which take most of the time, unless their number
                 is a multiple of N (default 1: leaves out none)
  --threads T    at the same time (default 1)
  --keep-going   does not stop at the first failure; prints a line for each
  --shrink N     runs that may be spent on making a failing scenario smaller (default 300, 0: none)
  --trace FILE   with one seed: what happened, event by event
  --digest       prints a line for each seed: its steps, and a digest of all that happened
  --show         prints the scenario of the first seed
";

struct Args {
    seeds: u64,
    start: u64,
    large: u64,
    threads: u64,
    keep_going: bool,
    shrink: u32,
    trace: Option<PathBuf>,
    digest: bool,
    show: bool,
}

#[derive(Default)]
struct Counts {
    steps: AtomicU64,
    left_out: AtomicU64,
}

fn args() -> Result<Args, String> {
    let mut args = Args {
        seeds: 1000,
        start: 0,
        large: 1,
        threads: 1,
        keep_going: false,
        shrink: 300,
        trace: None,
        digest: false,
        show: false,
    };
    let mut given = std::env::args().skip(1);
    while let Some(name) = given.next() {
        let mut value = || given.next().ok_or_else(|| format!("{name} needs a value"));
        let number = |text: String| text.parse::<u64>().map_err(|e| format!("{text}: {e}"));
        match name.as_str() {
            "--seeds" => args.seeds = number(value()?)?,
            "--start" => args.start = number(value()?)?,
            "--large" => args.large = number(value()?)?.max(1),
            "--threads" => args.threads = number(value()?)?.max(1),
            "--shrink" => {
                args.shrink = u32::try_from(number(value()?)?).map_err(|e| e.to_string())?;
            }
            "--trace" => args.trace = Some(value()?.into()),
            "--keep-going" => args.keep_going = true,
            "--digest" => args.digest = true,
            "--show" => args.show = true,
            "--help" | "-h" => return Err(HELP.to_owned()),
            other => return Err(format!("{other}: unknown\n{HELP}")),
        }
    }
    Ok(args)
}

fn main() -> ExitCode {
    let args = match args() {
        Ok(args) => args,
        Err(text) => {
            eprint!("{text}");
            return ExitCode::from(2);
        }
    };
    if args.show {
        println!("{:#?}", Scenario::new(args.start));
    }
    // A panic is a finding like any other; it is told with its seed.
    std::panic::set_hook(Box::new(|info| {
        if std::env::var_os("SIM_BACKTRACE").is_some() {
            eprintln!("{info}\n{}", std::backtrace::Backtrace::force_capture());
        }
    }));
    let next = AtomicU64::new(0);
    let failures = AtomicU64::new(0);
    let counts = Counts::default();
    let stop = AtomicBool::new(false);
    let begin = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..args.threads {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    if at >= args.seeds {
                        break;
                    }
                    let is_fine = one(&args, args.start + at, &counts);
                    if !is_fine {
                        failures.fetch_add(1, Ordering::Relaxed);
                        if !args.keep_going {
                            stop.store(true, Ordering::Relaxed);
                        }
                    }
                }
            });
        }
    });
    let seconds = begin.elapsed().as_secs_f64();
    let left_out = counts.left_out.load(Ordering::Relaxed);
    let done = next.load(Ordering::Relaxed).min(args.seeds) - left_out;
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    let rate = done as f64 / seconds * 60.0;
    println!(
        "{done} seeds ({left_out} large ones left out), {} steps, {} failures, {seconds:.1} s: \
         {rate:.0} seeds per minute",
        counts.steps.load(Ordering::Relaxed),
        failures.load(Ordering::Relaxed),
    );
    if failures.load(Ordering::Relaxed) > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Returns whether all was well.
fn one(args: &Args, seed: u64, counts: &Counts) -> bool {
    let scenario = Scenario::new(seed);
    if !seed.is_multiple_of(args.large) && scenario.is_large() {
        counts.left_out.fetch_add(1, Ordering::Relaxed);
        return true;
    }
    let verdict = judge(&scenario, args.trace.is_some() || args.digest);
    counts.steps.fetch_add(verdict.steps, Ordering::Relaxed);
    if args.digest {
        let digest =
            verdict.trace.iter().fold(0, |crc, line| crc32c::crc32c_append(crc, line.as_bytes()));
        println!("seed {seed}: {} steps, {digest:08x}", verdict.steps);
    }
    if let Some(file) = &args.trace
        && let Err(error) = std::fs::write(file, verdict.trace.join("\n"))
    {
        eprintln!("{}: {error}", file.display());
    }
    let Some(violation) = verdict.violation else { return true };
    if args.keep_going {
        let first = violation.text.lines().next().unwrap_or_default();
        println!("seed {seed}: {}: {first}", violation.kind);
        return false;
    }
    let small = shrink(&scenario, violation.kind, args.shrink);
    let again = judge(&small, true);
    let first = violation.text.lines().next().unwrap_or_default();
    println!("seed {seed}: {}: {first}; smaller:", violation.kind);
    println!("with: {:?}", small.setup);
    for (at, op) in &small.ops {
        println!("{at:>12} {op:?}");
    }
    if let Some(violation) = again.violation {
        println!("ends with: {}", violation.text);
    }
    let file = std::env::temp_dir().join(format!("drbd-sim-{seed}.trace"));
    match std::fs::write(&file, again.trace.join("\n")) {
        Ok(()) => println!("trace of the smaller one: {}", file.display()),
        Err(error) => eprintln!("{}: {error}", file.display()),
    }
    false
}
