//! Stand-in for drbdsetup-84, drbdmeta and drbd-proxy-ctl: notes its call and answers as told.
//!
//! The folder named by STANDIN_DIR holds `rules.json` (`running`, `backend`) and gets `calls`.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use drbdrs_tests::confcase::Answer;
use serde_json::Value;

fn main() -> ExitCode {
    ExitCode::from(u8::try_from(answer().unwrap_or(99)).unwrap_or(98))
}

fn answer() -> Option<i32> {
    let dir = PathBuf::from(std::env::var_os("STANDIN_DIR")?);
    let mut words = std::env::args();
    let program = PathBuf::from(words.next()?).file_name()?.to_string_lossy().into_owned();
    let words: Vec<String> = words.collect();
    let line = std::iter::once(&program).chain(&words).cloned().collect::<Vec<_>>().join(" ");
    let mut calls =
        std::fs::OpenOptions::new().append(true).create(true).open(dir.join("calls")).ok()?;
    calls.write_all(format!("{line}\n").as_bytes()).ok()?;
    let rules: Value = serde_json::from_slice(&std::fs::read(dir.join("rules.json")).ok()?).ok()?;
    if program.starts_with("drbdsetup") && words.len() > 1 && words.first()? == "show" {
        let resource = words.get(1)?;
        return match rules.get("running").and_then(|r| r.get(resource)).and_then(Value::as_str) {
            Some(text) => {
                print!("{text}");
                Some(0)
            }
            None => {
                eprintln!("{resource}: No such resource");
                Some(10)
            }
        };
    }
    let backend = rules.get("backend").and_then(Value::as_object);
    for (prefix, answer) in backend.into_iter().flatten() {
        if line.starts_with(prefix.as_str()) {
            let answer: Answer = serde_json::from_value(answer.clone()).ok()?;
            if let Some(seconds) = answer.sleep {
                std::thread::sleep(std::time::Duration::from_secs_f64(seconds));
            }
            print!("{}", answer.stdout);
            std::io::stdout().flush().ok()?;
            eprint!("{}", answer.stderr);
            return Some(answer.rc);
        }
    }
    Some(0)
}
