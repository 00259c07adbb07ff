//! Starting programs: prints the command, turns a bad end into a [`Failure`].

use std::path::{Path, PathBuf};
use std::process::Command;

/// What went wrong, for a person.
pub(crate) struct Failure(pub(crate) String);

impl From<std::io::Error> for Failure {
    fn from(e: std::io::Error) -> Self {
        Self(e.to_string())
    }
}

/// A program to be started in the top directory of the tree.
pub(crate) struct Run {
    shown: String,
    command: Command,
}

impl Run {
    /// Sets an environment variable.
    pub(crate) fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    /// Prints the command and runs it; anything but exit code 0 is a failure.
    pub(crate) fn run(mut self) -> Result<(), Failure> {
        println!("$ {}", self.shown);
        match self.command.status() {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(Failure(format!("`{}` ended with {status}", self.shown))),
            Err(e) => Err(Failure(format!("cannot run `{}`: {e}", self.shown))),
        }
    }

    /// Runs it silently and returns what it prints on stdout.
    pub(crate) fn output(mut self) -> Result<String, Failure> {
        let shown = &self.shown;
        let output =
            self.command.output().map_err(|e| Failure(format!("cannot run `{shown}`: {e}")))?;
        if !output.status.success() {
            return Err(Failure(format!("`{shown}` ended with {}", output.status)));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// Prepares a program.
pub(crate) fn command(program: &str, words: &[&str]) -> Run {
    let mut command = Command::new(program);
    command.args(words).current_dir(top());
    Run { shown: format!("{program} {}", words.join(" ")), command }
}

/// Runs cargo with these words.
pub(crate) fn cargo(words: &[&str]) -> Result<(), Failure> {
    command("cargo", words).run()
}

/// Is this program in PATH (or in the sbin directories, which PATH of a plain user lacks)?
pub(crate) fn has(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .any(|dir| dir.join(program).is_file())
}

/// The top directory of the tree.
pub(crate) fn top() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}
