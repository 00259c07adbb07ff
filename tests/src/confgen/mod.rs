//! Random configurations and command lines, run by the original drbdadm and by ours.
//!
//! One seed is one case, always the same. A difference is shrunk by leaving out lines, and is an
//! error unless [`intended`] names the reason for it.

mod generate;
pub mod intended;
pub mod random;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::confcase::loosened;
pub use generate::Config;
use random::Random;

/// What a tool did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Did {
    /// Exit code; negative: signal.
    pub rc: i32,
    /// stdout.
    pub stdout: String,
    /// stderr.
    pub stderr: String,
}

impl Did {
    /// What has to be equal: exit code, stdout, first line of stderr, without token numbers.
    pub fn key(&self) -> (i32, String, String) {
        let stderr = loosened(&self.stderr);
        // Both tools say first that the node name comes from the environment.
        let mut lines = stderr.lines().skip_while(|l| {
            l.is_empty() || l.contains("found __DRBD_NODE__") || l.contains("PRETENDING")
        });
        (self.rc, loosened(&self.stdout), lines.next().unwrap_or_default().to_owned())
    }
}

/// Both tools, called as `drbdadm` through PATH.
pub struct Tools {
    original: PathBuf,
    ours: PathBuf,
}

impl Tools {
    /// Makes the two folders that PATH begins with.
    ///
    /// # Errors
    /// The folders can not be made.
    pub fn new(scratch: &Path, original: &Path, ours: &Path) -> std::io::Result<Self> {
        let make = |name: &str, program: &Path| {
            let folder = scratch.join(name);
            std::fs::create_dir_all(&folder)?;
            std::os::unix::fs::symlink(program, folder.join("drbdadm"))?;
            Ok::<_, std::io::Error>(folder)
        };
        Ok(Self { original: make("original", original)?, ours: make("ours", ours)? })
    }

    fn run(&self, folder: &Path, directory: &Path, args: &[String]) -> std::io::Result<Did> {
        let output = Command::new("sh")
            .args(["-c", "exec drbdadm \"$@\"", "sh"])
            .args(args)
            .current_dir(directory)
            .env_clear()
            .env("PATH", format!("{}:/usr/bin:/bin", folder.display()))
            .env("LC_ALL", "C")
            .env("HOME", "/")
            .env("__DRBD_NODE__", "alpha")
            .env("DRBD_DONT_WARN_ON_VERSION_MISMATCH", "1")
            .stdin(Stdio::null())
            .output()?;
        use std::os::unix::process::ExitStatusExt;
        let rc = output.status.code().or_else(|| output.status.signal().map(|s| -s));
        Ok(Did {
            rc: rc.unwrap_or(-99),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Runs both; `None`: equal, or different on purpose (then the reason is counted).
    fn compare(
        &self,
        directory: &Path,
        config: &Config,
        args: &[String],
        tally: &mut Tally,
    ) -> std::io::Result<Option<(Did, Did)>> {
        config.write(directory)?;
        let original = self.run(&self.original, directory, args)?;
        let ours = self.run(&self.ours, directory, args)?;
        tally.runs += 1;
        tally.accepted += u64::from(original.rc == 0);
        if original.rc != 0 {
            *tally.refused.entry(kind(&original.key().2)).or_default() += 1;
        }
        if original.key() == ours.key() {
            return Ok(None);
        }
        match intended::reason(config, args, &original, &ours) {
            Some(reason) => {
                *tally.intended.entry(reason).or_default() += 1;
                Ok(None)
            }
            None => Ok(Some((original, ours))),
        }
    }
}

/// A complaint without the names and numbers in it.
fn kind(line: &str) -> String {
    let text: String = line.chars().filter(|c| !c.is_ascii_digit()).collect();
    let tail = text.rsplit(": ").next().unwrap_or(&text);
    tail.split('\'').step_by(2).collect::<Vec<_>>().join("_").chars().take(60).collect()
}

/// What was seen.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Runs of both tools.
    pub runs: u64,
    /// Runs that the original accepted.
    pub accepted: u64,
    /// What the original refused, by the kind of its first complaint.
    pub refused: std::collections::BTreeMap<String, u64>,
    /// Differences on purpose, by reason.
    pub intended: std::collections::BTreeMap<&'static str, u64>,
}

impl Tally {
    /// Adds another one.
    pub fn add(&mut self, other: &Self) {
        self.runs += other.runs;
        self.accepted += other.accepted;
        for (kind, count) in &other.refused {
            *self.refused.entry(kind.clone()).or_default() += count;
        }
        for (reason, count) in &other.intended {
            *self.intended.entry(reason).or_default() += count;
        }
    }
}

/// Runs one case; `Err` holds the text about a difference that nothing explains.
///
/// # Errors
/// An unexplained difference, or a tool that can not be run.
pub fn one(tools: &Tools, scratch: &Path, seed: u64, tally: &mut Tally) -> Result<(), String> {
    let mut random = Random::new(seed);
    let config = Config::generate(&mut random);
    let directory = scratch.join(format!("case-{seed}"));
    let text = |e: std::io::Error| format!("seed {seed}: {e}");
    std::fs::create_dir_all(&directory).map_err(text)?;
    let mut result = Ok(());
    for _ in 0..3 {
        let args = generate::arguments(&mut random);
        if tools.compare(&directory, &config, &args, tally).map_err(text)?.is_some() {
            let mut shrunk = shrink(tools, &directory, config.clone(), &args).map_err(text)?;
            let _ = shrunk.write(&directory);
            let mut ignored = Tally::default();
            let pair = tools.compare(&directory, &shrunk, &args, &mut ignored).map_err(text)?;
            result = Err(report(seed, &mut shrunk, &args, pair));
            break;
        }
    }
    let _ = std::fs::remove_dir_all(&directory);
    result
}

fn report(seed: u64, config: &mut Config, args: &[String], pair: Option<(Did, Did)>) -> String {
    let mut out = format!("seed {seed}: drbdadm {}\n", args.join(" "));
    for (name, lines) in config.files() {
        out.push_str(&format!("--- {name}\n{}\n", lines.join("\n")));
    }
    if let Some((original, ours)) = pair {
        out.push_str(&format!("--- original {original:?}\n--- ours     {ours:?}\n"));
    }
    out
}

/// Leaves out lines as long as the tools still differ without a reason.
fn shrink(
    tools: &Tools,
    directory: &Path,
    mut config: Config,
    args: &[String],
) -> std::io::Result<Config> {
    let mut tally = Tally::default();
    let mut size = 16usize;
    loop {
        let mut smaller = false;
        let mut at = 0;
        while at < config.len() {
            let candidate = config.without(at, size);
            if tools.compare(directory, &candidate, args, &mut tally)?.is_some() {
                config = candidate;
                smaller = true;
            } else {
                at += size;
            }
        }
        if size > 1 {
            size /= 2;
        } else if !smaller {
            return Ok(config);
        }
    }
}
