//! `cargo xtask tidy`: what no lint checks.

use std::path::{Path, PathBuf};

use crate::run::{self, Failure};

/// No source file is longer: a part of it wants out.
const LINES_MAX: usize = 1000;

/// Words that mark unfinished work.
const UNFINISHED: [&str; 4] = ["todo!(", "unimplemented!(", concat!("FIX", "ME"), "#[ignore"];

/// Checks every Rust file that git knows or does not ignore.
pub(crate) fn tidy() -> Result<(), Failure> {
    let list =
        run::command("git", &["ls-files", "--cached", "--others", "--exclude-standard", "*.rs"])
            .output()?;
    let mut bad = Vec::new();
    let mut files = 0;
    for name in list.lines() {
        let path: PathBuf = run::top().join(name);
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        files += 1;
        check(Path::new(name), &text, &mut bad);
    }
    if bad.is_empty() {
        println!("tidy: {files} files");
        Ok(())
    } else {
        Err(Failure(bad.join("\n")))
    }
}

fn check(name: &Path, text: &str, bad: &mut Vec<String>) {
    let shown = name.display();
    let lines = text.lines().count();
    if lines > LINES_MAX {
        bad.push(format!("{shown}: {lines} lines, more than {LINES_MAX}"));
    }
    if !text.trim_start().starts_with("//!") && !text.trim_start().starts_with("#![") {
        bad.push(format!("{shown}: has no module header (`//!`)"));
    }
    if name.ends_with("xtask/src/tidy.rs") {
        return;
    }
    for (i, line) in text.lines().enumerate() {
        for word in UNFINISHED {
            if line.contains(word) {
                bad.push(format!("{shown}:{}: `{word}` marks unfinished work", i + 1));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_long_headless_and_unfinished_files() {
        let mut bad = Vec::new();
        check(Path::new("a.rs"), &"x\n".repeat(1001), &mut bad);
        check(Path::new("b.rs"), "//! B.\nfn f() { todo!() }\n", &mut bad);
        assert_eq!(bad.len(), 3, "{bad:?}");
    }
}
