//! The table of docs/interop.md: each test of a suite with a real kernel leaves its row.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result};
use libtest_mimic::{Failed, Trial};

use crate::need::{Need, trial};

/// Names the folder of the rows; without it none are written.
pub const FOLDER: &str = "DRBDRS_INTEROP_DIR";

/// A test of a scenario. `role` is what drbdrs is in it.
pub fn row(scenario: u8, role: &str, name: &str, body: fn() -> Result<()>) -> Trial {
    let (role, test) = (role.to_owned(), name.to_owned());
    trial(name, &[Need::Guest], move || {
        let start = Instant::now();
        let outcome = body();
        let mut text = format!("{scenario}\t{}\t{role}\t", test.replace('_', " "));
        text += if outcome.is_ok() { "pass" } else { "FAIL" };
        let _ = writeln!(text, "\t{}", start.elapsed().as_secs());
        record(&test, &text).map_err(|e| Failed::from(format!("{e:#}")))?;
        outcome.map_err(|e| Failed::from(format!("{e:#}")))
    })
}

/// One file for each test: scenario, test, role, result and seconds with tabs between them.
fn record(test: &str, text: &str) -> Result<()> {
    let Some(folder) = std::env::var_os(FOLDER) else { return Ok(()) };
    let folder = Path::new(&folder);
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    fs::write(folder.join(test), text).context("cannot write the row")
}
