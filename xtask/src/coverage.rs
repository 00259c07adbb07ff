//! `cargo xtask coverage`: which lines of the engine its tests run.
//!
//! Only the crates of this tree are compiled for it: cargo calls this program in place of rustc for
//! them, which adds the instrumentation. Test code does not count: files and modules that are
//! compiled for tests only are left out.

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use cargo_metadata::Message;

use crate::run::{self, Failure};

/// What is measured.
const PARTS: &[&str] = &["drbdrs/core/src/", "drbdrs/wire/src/", "drbdmeta/src/"];

/// Tests that are run: words for `cargo test`.
const RUNS: &[&[&str]] = &[
    &["--tests", "-p", "drbd-core", "-p", "drbd-wire", "-p", "drbdmeta"],
    &["--tests", "-p", "drbd-sim", "--profile", "sim"],
    &["-p", "drbdrs-tests", "--test", "replay_fixtures"],
];

/// Set: this program stands in for rustc.
const STAND_IN: &str = "DRBDRS_COVERAGE_RUSTC";

/// Line numbers and how often each was run.
type Lines = BTreeMap<usize, u64>;

/// Where cargo has asked for rustc: runs it, with instrumentation.
pub(crate) fn stand_in() -> Option<ExitCode> {
    std::env::var_os(STAND_IN)?;
    let mut words = std::env::args_os().skip(1);
    let error = Command::new(words.next()?).args(words).arg("-Cinstrument-coverage").exec();
    eprintln!("xtask: rustc: {error}");
    Some(ExitCode::FAILURE)
}

/// Runs the tests of the engine, those of the simulator and the replay of captures; prints the
/// share of lines that were run.
pub(crate) fn coverage(missing: bool) -> Result<(), Failure> {
    let tools = tools()?;
    let scratch = run::top().join("target/coverage");
    let _ = std::fs::remove_dir_all(&scratch);
    std::fs::create_dir_all(&scratch)?;
    let mut programs = Vec::new();
    for words in RUNS {
        programs.extend(build(words)?);
        let words = [&["test", "--quiet"], *words].concat();
        let profiles = scratch.join("%p-%m.profraw").display().to_string();
        instrumented(&words).env("LLVM_PROFILE_FILE", &profiles).run()?;
    }
    let data = scratch.join("all.profdata").display().to_string();
    let raw = std::fs::read_dir(&scratch)?.filter_map(|file| Some(file.ok()?.path()));
    let raw: Vec<String> = raw.map(|path| path.display().to_string()).collect();
    let words: Vec<&str> = ["merge", "--sparse", "-o", &data].into_iter().collect();
    let words = [words, raw.iter().map(String::as_str).collect()].concat();
    run::command(&tools.join("llvm-profdata").display().to_string(), &words).output()?;
    let profile = format!("--instr-profile={data}");
    let mut words = vec!["export", "--format=lcov", &profile];
    for program in &programs {
        words.extend(["--object", program]);
    }
    let lcov = run::command(&tools.join("llvm-cov").display().to_string(), &words).output()?;
    let files = read(&lcov);
    for part in PARTS {
        let of_part = files.iter().filter(|(file, _)| file.starts_with(part));
        print(part, &of_part.collect::<Vec<_>>(), missing);
    }
    Ok(())
}

/// Where rustup has put llvm-cov and llvm-profdata.
fn tools() -> Result<PathBuf, Failure> {
    let root = run::command("rustc", &["--print", "sysroot"]).output()?;
    let hosts = std::fs::read_dir(Path::new(root.trim()).join("lib/rustlib"))?;
    let mut dirs = hosts.filter_map(|host| Some(host.ok()?.path().join("bin")));
    let found = dirs.find(|dir| dir.join("llvm-cov").is_file());
    found.ok_or_else(|| Failure("coverage needs `rustup component add llvm-tools`".to_owned()))
}

fn instrumented(words: &[&str]) -> run::Run {
    let own = std::env::current_exe().unwrap_or_default().display().to_string();
    run::command("cargo", words).env("RUSTC_WORKSPACE_WRAPPER", &own).env(STAND_IN, "1")
}

/// Builds test programs and says where they are.
fn build(words: &[&str]) -> Result<Vec<String>, Failure> {
    let how = ["test", "--no-run", "--message-format", "json-render-diagnostics"];
    let messages = instrumented(&[&how[..], words].concat()).output()?;
    let mut programs = Vec::new();
    for message in Message::parse_stream(messages.as_bytes()) {
        if let Message::CompilerArtifact(artifact) = message? {
            programs.extend(artifact.executable.map(|path| path.to_string()));
        }
    }
    Ok(programs)
}

/// The lines of all files of [`PARTS`], by their path in the tree.
fn read(lcov: &str) -> BTreeMap<String, Lines> {
    let mut files: BTreeMap<String, Lines> = BTreeMap::new();
    let mut file = None;
    let mut end = 0;
    let top = run::top();
    for line in lcov.lines() {
        if let Some(path) = line.strip_prefix("SF:") {
            let path = Path::new(path).strip_prefix(&top).map(|path| path.display().to_string());
            file = path.ok().filter(|path| PARTS.iter().any(|part| path.starts_with(part)));
            end = file.as_ref().map_or(0, |path| end_of_product(&top.join(path)));
        } else if let (Some(path), Some(data)) = (&file, line.strip_prefix("DA:"))
            && let Some((number, count)) = data.split_once(',')
            && let (Ok(number), Ok(count)) = (number.parse(), count.parse::<u64>())
            && number < end
        {
            *files.entry(path.clone()).or_default().entry(number).or_default() += count;
        }
    }
    files
}

/// The line at which the tests of a file begin; the first of a file that is nothing else.
fn end_of_product(path: &Path) -> usize {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let only_for_tests = format!("#[cfg(test)]\nmod {name};");
    let parents = ["mod.rs", "lib.rs"].map(|parent| path.with_file_name(parent));
    let is_test = parents
        .iter()
        .any(|file| std::fs::read_to_string(file).is_ok_and(|text| text.contains(&only_for_tests)));
    if is_test {
        return 0;
    }
    let end = text.find("#[cfg(test)]\nmod tests {").unwrap_or(text.len());
    text[..end].lines().count() + 1
}

fn print(part: &str, files: &[(&String, &Lines)], missing: bool) {
    let mut all = (0, 0);
    for (file, lines) in files {
        let run = lines.values().filter(|count| **count > 0).count();
        all = (all.0 + run, all.1 + lines.len());
        if missing && run < lines.len() {
            let not: Vec<String> =
                lines.iter().filter(|(_, n)| **n == 0).map(|(line, _)| line.to_string()).collect();
            println!("{file}: {run} of {}; not: {}", lines.len(), not.join(" "));
        }
    }
    let (run, of) = all;
    let tenths = run * 1000 / of.max(1);
    println!("{part}: {run} of {of} lines, {}.{} %", tenths / 10, tenths % 10);
}
