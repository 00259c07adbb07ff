//! `cargo xtask coverage`: which lines of the engine its tests run.
//!
//! Test code does not count: files and modules that are compiled for tests only are left out.

use std::collections::BTreeMap;
use std::path::Path;

use crate::run::{self, Failure};

/// What is measured.
const PARTS: &[&str] = &["drbdrs/core/src/", "drbdrs/wire/src/", "drbdmeta/src/"];

/// Line numbers and how often each was run.
type Lines = BTreeMap<usize, u64>;

/// Runs the tests of the engine, a piece of the simulator's and the replay of captures; prints the
/// share of lines that were run.
pub(crate) fn coverage(missing: bool) -> Result<(), Failure> {
    if !run::has("cargo-llvm-cov") {
        let how = "`cargo install cargo-llvm-cov` and `rustup component add llvm-tools`";
        return Err(Failure(format!("coverage needs {how}")));
    }
    let common = ["llvm-cov", "--no-report", "--profile", "sim"];
    let runs: [&[&str]; 3] = [
        &["-p", "drbd-core", "-p", "drbd-wire", "-p", "drbdmeta"],
        &["-p", "drbd-sim"],
        &["-p", "drbdrs-tests", "--test", "replay_fixtures"],
    ];
    run::cargo(&["llvm-cov", "clean", "--workspace"])?;
    for words in runs {
        run::cargo(&[&common[..], words].concat())?;
    }
    let words = ["llvm-cov", "report", "--profile", "sim", "--lcov"];
    let files = read(&run::command("cargo", &words).output()?);
    for part in PARTS {
        let of_part = files.iter().filter(|(file, _)| file.starts_with(part));
        print(part, &of_part.collect::<Vec<_>>(), missing);
    }
    Ok(())
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
    let mod_file = path.with_file_name("mod.rs");
    let lib_file = path.with_file_name("lib.rs");
    let is_test = [mod_file, lib_file]
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
