//! `cargo xtask interop`: all suites with the kernel's DRBD, and the table of their results.

use std::fs;

use crate::run::{self, Failure};

/// The suites; each test leaves a row (`tests/src/interop.rs`).
const SUITES: &[&str] = &[
    "kernel_engine",
    "kernel_states",
    "kernel_volumes",
    "kernel_commands",
    "kernel_crashes",
    "kernel_races",
    "kernel_handshake",
    "kernel_life",
    "kernel_daemon",
    "kernel_replaced",
];
const DOCUMENT: &str = "drbdrs/docs/interop.md";
const BEGIN: &str = "<!-- table: cargo xtask interop -->\n";
const END: &str = "<!-- end of the table -->\n";

/// Runs the suites one by one and rewrites the table, also when tests fail. Only what the named
/// suites leave behind is in the table.
pub(crate) fn interop() -> Result<(), Failure> {
    let folder = run::top().join("target/interop");
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    let mut words = vec!["test", "-p", "drbdrs-tests", "--no-fail-fast"];
    for suite in SUITES {
        words.extend(["--test", suite]);
    }
    words.extend(["--", "--test-threads=1"]);
    let variable = folder.display().to_string();
    let outcome = run::command("cargo", &words).env("DRBDRS_INTEROP_DIR", &variable).run();
    let mut rows = Vec::new();
    for entry in fs::read_dir(&folder)? {
        rows.push(fs::read_to_string(entry?.path())?);
    }
    let (table, seconds) = table(rows);
    println!("{seconds} s in all");
    let path = run::top().join(DOCUMENT);
    let text = fs::read_to_string(&path)?;
    fs::write(&path, replaced(&text, &table)?)?;
    outcome
}

fn replaced(text: &str, table: &str) -> Result<String, Failure> {
    let parts = text
        .split_once(BEGIN)
        .and_then(|(before, rest)| rest.split_once(END).map(|(_, after)| (before, after)));
    let (before, after) = parts.ok_or_else(|| Failure(format!("{DOCUMENT} has no table")))?;
    Ok(format!("{before}{BEGIN}{table}{END}{after}"))
}

/// Rows have scenario, test, role, result and seconds, with tabs between them. The seconds are not
/// in the table, or it would change each time.
fn table(rows: Vec<String>) -> (String, u64) {
    let mut sorted: Vec<(u32, String, u64)> = rows
        .iter()
        .filter_map(|row| {
            let fields: Vec<&str> = row.trim_end().split('\t').collect();
            let [scenario, test, role, result, seconds] = fields.as_slice() else { return None };
            let line = format!("| {scenario} | {test} | {role} | {result} |\n");
            Some((scenario.parse().ok()?, line, seconds.parse().ok()?))
        })
        .collect();
    sorted.sort();
    let mut text = "| scenario | test | drbdrs is | result |\n|---|---|---|---|\n".to_owned();
    text.extend(sorted.iter().map(|(_, line, _)| line.as_str()));
    (text, sorted.iter().map(|(_, _, seconds)| seconds).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_takes_the_place_of_the_old_one() {
        let rows = ["10\tb\tboth\tpass\t7\n", "2\ta\tPrimary\tFAIL\t30\n"].map(str::to_owned);
        let (table, seconds) = table(rows.to_vec());
        assert_eq!(seconds, 37);
        let lines: Vec<&str> = table.lines().skip(2).collect();
        assert_eq!(lines, ["| 2 | a | Primary | FAIL |", "| 10 | b | both | pass |"]);
        let text = format!("before\n{BEGIN}old\n{END}after\n");
        let Ok(new) = replaced(&text, &table) else { panic!("there is a table") };
        assert_eq!(new, format!("before\n{BEGIN}{table}{END}after\n"));
        assert!(replaced("nothing", &table).is_err());
    }
}
