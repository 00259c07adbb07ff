//! Task runner: everything that a person or CI does with the tree, as single commands.
//!
//! `cargo xtask demo` and `cargo xtask test` are the two commands of the README.

mod coverage;
mod deb;
mod demo;
mod deps;
mod interop;
mod run;
mod test;
mod tidy;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::run::Failure;

/// Tasks of the drbdrs tree.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Builds the programs and shows a pair of nodes: a workload, a crash, a fail-over, a resync;
    /// without root, in a new directory.
    Demo {
        /// Leave the pair running and say what to try.
        #[arg(long)]
        keep: bool,
        /// A debug build: slower, but built sooner.
        #[arg(long)]
        debug: bool,
    },
    /// Runs all tests; at the end lists by name what was skipped for want of a tool.
    Test {
        /// Install the Debian packages that tests need (root only, with apt-get).
        #[arg(long)]
        install: bool,
        /// A missing tool is a failure instead of a skip (what CI uses).
        #[arg(long)]
        no_skip: bool,
        /// Further words for the test runner, for example a filter.
        #[arg(last = true)]
        rest: Vec<String>,
    },
    /// Builds the Debian package, in target/debian.
    Deb {
        /// A debug build: larger and slower, but built sooner.
        #[arg(long)]
        debug: bool,
        /// The programs are built already.
        #[arg(long)]
        no_build: bool,
        /// Where it is built.
        #[arg(long, default_value = "target/debian")]
        dir: std::path::PathBuf,
        /// Revision of the package's version.
        #[arg(long, default_value_t = 1)]
        revision: u32,
    },
    /// Formatting, clippy with warnings as errors, and the tidy checks.
    Lint,
    /// Only the checks that no lint does: file lengths, words, licences of files.
    Tidy,
    /// Licences and sources of all dependencies against deny.toml (works offline).
    Deps,
    /// Builds the image of the kernel guests anew, from what apt offers (no root needed).
    Guest {
        /// Only if there is none.
        #[arg(long)]
        if_missing: bool,
        /// Boots a guest with one disk of 64 MiB and runs a shell script in it (`-`: standard
        /// input).
        #[arg(long, value_name = "SCRIPT", conflicts_with = "if_missing")]
        run: Option<String>,
    },
    /// Runs all suites with the kernel's DRBD and rewrites the table in drbdrs/docs/interop.md.
    Interop,
    /// Lines of the engine that its tests, the simulator's and the replay of captures run (needs
    /// the llvm-tools of rustup).
    Coverage {
        /// Also which lines are not.
        #[arg(long)]
        missing: bool,
    },
    /// Long runs of a randomised suite.
    Soak {
        #[command(subcommand)]
        suite: Soak,
    },
    /// Runs a fuzz target for a while (needs cargo-fuzz).
    Fuzz {
        /// Name of the target below fuzz/fuzz_targets.
        target: String,
        /// How long, in minutes.
        #[arg(long, default_value_t = 10)]
        minutes: u32,
    },
    /// Runs a benchmark from benches/ in the release profile.
    Bench {
        /// Name without the ending: `conf`, `node`, `idle`, `failover`.
        name: String,
        /// Options for the benchmark.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
}

#[derive(Subcommand)]
enum Soak {
    /// Random configurations, ours against the original drbdadm-84.
    Conf {
        /// How many configurations.
        #[arg(long, default_value_t = 100_000)]
        cases: u64,
        /// First seed.
        #[arg(long)]
        seed: Option<u64>,
    },
    /// Random handshakes, our decision against the kernel's, in a guest (three to five a second).
    Handshake {
        /// How many.
        #[arg(long, default_value_t = 2_000)]
        cases: u64,
        /// First seed.
        #[arg(long, default_value_t = 1_000)]
        seed: u64,
    },
    /// Daemons of a pair are killed at random points under a verifying workload.
    Kill {
        /// How many daemons are killed, a third of them under each protocol.
        #[arg(long, default_value_t = 200)]
        rounds: u32,
        /// First seed.
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// Random runs of two engines in the simulator, in all cores.
    Sim {
        /// How many.
        #[arg(long, default_value_t = 2_000_000)]
        seeds: u64,
        /// Number of the first.
        #[arg(long, default_value_t = 0)]
        start: u64,
        /// Of the runs with a large volume, which take most of the time, each so many.
        #[arg(long, default_value_t = 1)]
        large: u64,
    },
    /// Random operations on a pair of the engine and the kernel's DRBD.
    Kernel {
        /// How long.
        #[arg(long, default_value_t = 60)]
        minutes: u64,
        /// What happens.
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
}

fn main() -> ExitCode {
    if let Some(code) = coverage::stand_in() {
        return code;
    }
    let outcome = match Args::parse().task {
        Task::Demo { keep, debug } => demo::demo(keep, debug),
        Task::Test { install, no_skip, rest } => test::test(install, no_skip, &rest),
        Task::Deb { debug, no_build, dir, revision } => deb::deb(debug, no_build, &dir, revision),
        Task::Lint => lint(),
        Task::Tidy => tidy::tidy(),
        Task::Deps => deps::deps(),
        Task::Guest { if_missing, run } => guest(if_missing, run.as_deref()),
        Task::Interop => interop::interop(),
        Task::Coverage { missing } => coverage::coverage(missing),
        Task::Soak { suite } => soak(&suite),
        Task::Fuzz { target, minutes } => fuzz(&target, minutes),
        Task::Bench { name, rest } => bench(&name, &rest),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure(text)) => {
            eprintln!("xtask: {text}");
            ExitCode::FAILURE
        }
    }
}

fn lint() -> Result<(), Failure> {
    run::cargo(&["fmt", "--all", "--check"])?;
    run::cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"])?;
    tidy::tidy()
}

fn soak(suite: &Soak) -> Result<(), Failure> {
    let (cases, seed) = match suite {
        Soak::Conf { cases, seed } => (cases, seed),
        Soak::Handshake { cases, seed } => {
            let words = ["test", "-p", "drbdrs-tests", "--test", "kernel_handshake"];
            let run = run::command("cargo", &words).env("DRBDRS_CASES", &cases.to_string());
            return run.env("DRBDRS_SEED", &seed.to_string()).run();
        }
        Soak::Kill { rounds, seed } => {
            let words = ["test", "--release", "-p", "drbdrs-tests", "--test", "node_kills", "--"];
            let words = [&words[..], &["--nocapture", "--test-threads", "1"]].concat();
            let kills = rounds.div_ceil(3).to_string();
            // Larger than what the activity log can keep hot.
            let run = run::command("cargo", &words).env("DRBDRS_KILLS", &kills);
            let run = run.env("DRBDRS_DISK_MIB", "320");
            return run.env("DRBDRS_SEED", &seed.to_string()).run();
        }
        Soak::Sim { seeds, start, large } => {
            let threads = std::thread::available_parallelism().map_or(1, usize::from);
            let numbers = [*seeds, *start, *large].map(|n| n.to_string());
            let [seeds, start, large] = numbers.each_ref().map(String::as_str);
            let threads = threads.to_string();
            let words = ["sim", "--seeds", seeds, "--start", start, "--large", large];
            let more = ["--threads", &threads, "--keep-going", "--shrink", "0"];
            return run::cargo(&[&words[..], &more[..]].concat());
        }
        Soak::Kernel { minutes, seed } => {
            let words = [
                "test",
                "-p",
                "drbdrs-tests",
                "--test",
                "kernel_life",
                "--",
                "--nocapture",
                "a_long_life",
            ];
            let seconds = minutes.saturating_mul(60).to_string();
            let run = run::command("cargo", &words).env("DRBDRS_SECONDS", &seconds);
            return run.env("DRBDRS_SEED", &seed.to_string()).run();
        }
    };
    run::cargo(&["build", "--release", "-p", "drbdadm"])?;
    let cases = cases.to_string();
    let seed = seed.map(|s| s.to_string());
    let mut words =
        vec!["run", "--release", "-p", "drbdrs-tests", "--bin", "conf-soak", "--", "--cases"];
    words.push(&cases);
    if let Some(seed) = &seed {
        words.extend(["--seed", seed]);
    }
    run::cargo(&words)
}

fn guest(if_missing: bool, script: Option<&str>) -> Result<(), Failure> {
    let mut words = vec!["run", "--quiet", "-p", "drbdrs-tests", "--bin", "guest", "--"];
    if if_missing {
        words.push("--if-missing");
    }
    // cargo runs in the top directory.
    let script = match script {
        Some("-") | None => script.map(str::to_owned),
        Some(file) => Some(std::fs::canonicalize(file)?.display().to_string()),
    };
    if let Some(script) = &script {
        words.extend(["--run", script]);
    }
    run::cargo(&words)
}

fn fuzz(target: &str, minutes: u32) -> Result<(), Failure> {
    let seconds = format!("-max_total_time={}", u64::from(minutes) * 60);
    // Without AddressSanitizer: the bodies are safe Rust, and what it keeps of freed memory alone
    // exceeds the limit. libFuzzer's instrumentation flags are unstable; the variable makes the
    // pinned compiler take them.
    let words = ["fuzz", "run", "--sanitizer", "none", target, "--", &seconds, "-rss_limit_mb=256"];
    run::command("cargo", &words).env("RUSTC_BOOTSTRAP", "1").run()
}

fn bench(name: &str, rest: &[String]) -> Result<(), Failure> {
    run::cargo(&["build", "--release", "-p", "drbdrs", "-p", "drbdadm", "-p", "drbdmeta"])?;
    let bin = format!("{name}-bench");
    let mut words = vec!["run", "--release", "-p", "drbdrs-benches", "--bin", &bin, "--"];
    words.extend(rest.iter().map(String::as_str));
    run::cargo(&words)
}
