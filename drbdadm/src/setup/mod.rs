//! drbdsetup: one request to the daemon, the original's texts and exit codes.
//!
//! `command` is the one table of commands, `getopt` and `parse` understand the command line,
//! `request` makes a request of it, `run` exchanges it and prints, `view`, `events` and `wait`
//! are the commands that only look. Spec: status-and-integration.md §2.

mod command;
mod events;
mod getopt;
mod help;
mod last_known;
mod lock;
mod object;
mod parse;
mod request;
mod run;
mod view;
mod wait;

use std::path::PathBuf;
use std::time::Duration;

use bstr::{BString, ByteSlice};
use drbd_admin::{Snapshot, Target};

use crate::print;

/// How long a command waits for the daemon, as in the original.
const DEADLINE: Duration = Duration::from_secs(120);

/// A text for stderr and an exit code.
#[derive(Debug)]
struct Failed {
    code: u8,
    stderr: String,
    stdout: String,
}

impl Failed {
    fn new(code: u8, stderr: impl Into<String>) -> Self {
        Self { code, stderr: stderr.into(), stdout: String::new() }
    }
}

/// Where the daemon is, and how long it may take.
#[derive(Clone, Debug)]
struct Context {
    /// Name of this program as messages show it.
    program: String,
    /// The daemon's socket.
    socket: PathBuf,
    /// Is it that of the machine's only daemon?
    is_default: bool,
    /// Longest time without an answer.
    deadline: Duration,
}

/// Why there is no answer from the daemon.
#[derive(Debug)]
pub struct Unanswered {
    /// For stderr.
    pub text: String,
    /// Nobody listens there.
    pub is_absent: bool,
}

/// The state of everything, for commands of drbdadm itself.
///
/// # Errors
/// The daemon does not answer within the deadline, or there is none.
pub fn snapshot(deadline: Duration) -> Result<Snapshot, Unanswered> {
    let ask = || {
        let context = parse::context("drbdadm", &mut Vec::new())?;
        let mut session = run::Session::open(&Context { deadline, ..context })?;
        Ok(session.snapshot("all", Target::All)?.unwrap_or_default())
    };
    ask().map_err(|failed: Failed| Unanswered {
        is_absent: failed.code == run::NO_DAEMON,
        text: failed.stderr,
    })
}

/// Seconds that the local clock is east of UTC at this moment.
pub fn offset(at_us: u64) -> i32 {
    let at = i64::try_from(at_us).ok().and_then(|us| jiff::Timestamp::from_microsecond(us).ok());
    at.map_or(0, |at| jiff::tz::TimeZone::system().to_offset(at).seconds())
}

/// Runs a command line, with argv[0] in front; returns the exit code.
pub fn main(args: Vec<BString>) -> u8 {
    // As the original; relative names of devices are relative to it.
    let _ = std::env::set_current_dir("/");
    let mut args = args.into_iter();
    let program = args.next().unwrap_or_else(|| "drbdsetup".into());
    let name = program.rsplit_once_str("/").map_or(program.as_slice(), |(_, name)| name);
    let rest: Vec<BString> = args.collect();
    match parse::parse(&name.to_str_lossy(), &rest).and_then(run::run) {
        Ok(code) => code,
        Err(failed) => {
            print::stderr(failed.stderr.as_bytes());
            print::stdout(failed.stdout.as_bytes());
            failed.code
        }
    }
}
