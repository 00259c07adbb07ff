//! Calling the backends: printing, time limits, exit codes. Spec: config-and-drbdadm.md §8.

use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use bstr::{BStr, BString, ByteSlice};
use drbd_conf::dump::TEXT_MAX;
use drbd_conf::model::Global;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open};

use crate::command::TimeClass;
use crate::print;
use crate::registry::Link;

/// First argument of the helper process that ends with its parent; see [`exec_bound`].
pub const BOUND: &str = "__bound-exec";

/// A backend program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// drbdsetup-84.
    Setup,
    /// drbdmeta.
    Meta,
    /// drbd-proxy-ctl.
    ProxyCtl,
    /// /bin/sh, for handlers.
    Shell,
}

/// What becomes of a call's stderr.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stderr {
    /// Passed through.
    Inherit,
    /// Thrown away.
    Discard,
    /// Kept; a fallback follows.
    Capture,
}

/// One backend call.
#[derive(Clone, Debug)]
pub struct Call {
    /// Which program.
    pub program: Program,
    /// Arguments.
    pub args: Vec<BString>,
    /// Time limit.
    pub time: TimeClass,
    /// stderr.
    pub stderr: Stderr,
    /// Resource it is about, for `--sh-varname` and DRBD_RESOURCE.
    pub resource: BString,
    /// Set DRBD_RESOURCE.
    pub export_resource: bool,
    /// Further environment.
    pub env: Vec<(&'static str, BString)>,
    /// Never printed, not even with -v.
    pub silent: bool,
    /// stdout is kept instead of passed through.
    pub capture_stdout: bool,
    /// Say `terminated with exit code`.
    pub report_code: bool,
}

impl Call {
    /// A plain call.
    pub fn new(program: Program, resource: &BString, time: TimeClass) -> Self {
        Self {
            program,
            args: Vec::new(),
            time,
            stderr: Stderr::Inherit,
            resource: resource.clone(),
            export_resource: false,
            env: Vec::new(),
            silent: false,
            capture_stdout: false,
            report_code: true,
        }
    }

    /// Adds a word.
    #[must_use]
    pub fn arg(mut self, word: impl Into<BString>) -> Self {
        self.args.push(word.into());
        self
    }

    /// Adds words.
    #[must_use]
    pub fn args(mut self, words: impl IntoIterator<Item = BString>) -> Self {
        self.args.extend(words);
        self
    }

    /// Sets what becomes of stderr.
    #[must_use]
    pub fn stderr(mut self, stderr: Stderr) -> Self {
        self.stderr = stderr;
        self
    }
}

/// A call within a job.
#[derive(Clone, Debug)]
pub struct Step {
    /// The call.
    pub call: Call,
    /// Its exit code does not count.
    pub ignore_code: bool,
    /// What to register when it succeeded.
    pub link: Option<Link>,
    /// Name that adjust-with-progress shows when it fails.
    pub name: &'static str,
}

/// Result of a call.
#[derive(Clone, Debug, Default)]
pub struct Result {
    /// Exit code.
    pub code: i32,
    /// Captured stdout.
    pub stdout: Vec<u8>,
    /// Captured stderr.
    pub stderr: Vec<u8>,
    /// The time limit expired.
    pub expired: bool,
}

/// Names of the programs, and how calls are to be made.
#[derive(Clone, Debug)]
pub struct Backend {
    /// drbdsetup-84.
    pub setup: BString,
    /// drbdmeta.
    pub meta: BString,
    /// drbd-proxy-ctl.
    pub proxy_ctl: BString,
    /// Print instead of running.
    pub dry_run: bool,
    /// Print and run.
    pub verbose: bool,
    /// `--sh-varname`.
    pub varname: Option<BString>,
    /// Limits in seconds: short, medium, long; 0: none.
    pub limits: [u32; 3],
}

/// The limits of a configuration; what is not written has its effective default.
pub fn limits(global: &Global) -> [u32; 3] {
    [
        global.cmd_timeout_short.unwrap_or(5),
        global.cmd_timeout_medium.unwrap_or(600),
        global.cmd_timeout_long.unwrap_or(0),
    ]
}

/// A word as printed commands show it. Spec §8.1.
pub fn escape(word: &BStr) -> BString {
    let mut out = Vec::with_capacity(word.len());
    for byte in word.iter() {
        let plain = byte.is_ascii_alphanumeric()
            || matches!(byte, b'%' | b'+' | b'-' | b'.' | b'/' | b':' | b'=' | b'@' | b'_');
        if !plain {
            out.push(b'\\');
        }
        out.push(*byte);
        if out.len() >= TEXT_MAX {
            break;
        }
    }
    out.into()
}

impl Backend {
    fn name(&self, program: Program) -> BString {
        match program {
            Program::Setup => self.setup.clone(),
            Program::Meta => self.meta.clone(),
            Program::ProxyCtl => self.proxy_ctl.clone(),
            Program::Shell => "/bin/sh".into(),
        }
    }

    fn limit(&self, class: TimeClass) -> Option<u32> {
        let [short, medium, long] = self.limits;
        let seconds = match class {
            TimeClass::Short => short,
            TimeClass::Medium => medium,
            TimeClass::Long => long,
            TimeClass::None => 0,
        };
        (seconds > 0).then_some(seconds)
    }

    /// Prints the call if that is wanted.
    fn show(&self, call: &Call) {
        if call.silent || !(self.dry_run || self.verbose) {
            return;
        }
        let mut line = Vec::new();
        if let Some(name) = &self.varname {
            line.extend_from_slice(&bstr::concat([
                name.as_slice(),
                b"=",
                &escape(call.resource.as_bstr()),
                b"\n",
            ]));
        }
        line.extend_from_slice(&escape(self.name(call.program).as_bstr()));
        for word in &call.args {
            line.push(b' ');
            line.extend_from_slice(&escape(word.as_bstr()));
        }
        line.push(b'\n');
        print::stdout(&line);
    }

    /// Prints and runs a call; a dry run only prints and counts as success.
    pub fn run(&self, call: &Call) -> Result {
        self.show(call);
        if self.dry_run {
            return Result::default();
        }
        self.execute(call)
    }

    /// Runs a call even in a dry run (reading the running configuration).
    pub fn execute(&self, call: &Call) -> Result {
        let Ok(mut child) = self.spawn(call) else {
            print::complain("Can not exec");
            return Result { code: 20, ..Result::default() };
        };
        let result = self.finish(call, &mut child);
        let reported = call.stderr != Stderr::Discard && call.report_code && !result.expired;
        if result.code >= 10 && reported && call.stderr == Stderr::Inherit {
            let words = self.words(call);
            print::complain(format!("Command '{words}' terminated with exit code {}", result.code));
        }
        result
    }

    /// The words of a call joined by blanks, for messages.
    fn words(&self, call: &Call) -> BString {
        let name = self.name(call.program);
        let words = std::iter::once(&name).chain(&call.args);
        bstr::join(" ", words).into()
    }

    fn spawn(&self, call: &Call) -> std::io::Result<Child> {
        let me = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("/proc/self/exe"));
        let mut command = Command::new(me);
        command.arg0("drbdadm").arg(BOUND);
        command.arg(OsStr::from_bytes(&self.name(call.program)));
        command.args(call.args.iter().map(|a| OsStr::from_bytes(a)));
        if call.export_resource {
            command.env("DRBD_RESOURCE", OsStr::from_bytes(&call.resource));
        }
        for (name, value) in &call.env {
            command.env(name, OsStr::from_bytes(value));
        }
        match call.stderr {
            Stderr::Inherit => {}
            Stderr::Discard => {
                command.stderr(Stdio::null());
            }
            Stderr::Capture => {
                command.stderr(Stdio::piped());
            }
        }
        if call.capture_stdout {
            command.stdout(Stdio::piped());
        }
        command.spawn()
    }

    /// Waits with the time limit, reading what is captured meanwhile.
    fn finish(&self, call: &Call, child: &mut Child) -> Result {
        let stdout = child.stdout.take().map(reader);
        let stderr = child.stderr.take().map(reader);
        let limit = self.limit(call.time);
        let status = wait(child, limit.map(|s| Duration::from_secs(u64::from(s))));
        let mut result = Result::default();
        match status {
            Some(status) => result.code = code_of(status),
            None => {
                let _ = child.kill();
                let _ = child.wait();
                result.expired = true;
                result.code = 20;
                if call.stderr == Stderr::Inherit {
                    let (words, seconds) = (self.words(call), limit.unwrap_or(0));
                    print::complain(format!(
                        "Command '{words}' did not terminate within {seconds} seconds"
                    ));
                }
            }
        }
        // After an expired limit a grandchild may hold the pipes open for ever.
        if !result.expired {
            let join = |t: Option<std::thread::JoinHandle<Vec<u8>>>| {
                t.and_then(|t| t.join().ok()).unwrap_or_default()
            };
            result.stdout = join(stdout);
            result.stderr = join(stderr);
        }
        result
    }
}

fn reader(mut pipe: impl Read + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        bytes
    })
}

/// A backend that was killed did not succeed (the original takes it for success).
pub fn code_of(status: ExitStatus) -> i32 {
    match (status.code(), status.signal()) {
        (Some(code), _) => code,
        (None, _) => 20,
    }
}

/// Waits for a child, at most `limit`; `None`: it still runs.
fn wait(child: &mut Child, limit: Option<Duration>) -> Option<ExitStatus> {
    let Some(limit) = limit else { return child.wait().ok() };
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw)?;
    let Ok(fd) = pidfd_open(pid, PidfdFlags::empty()) else { return child.wait().ok() };
    let end = now() + limit;
    loop {
        let left = end.saturating_duration_since(now());
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        let mut fds = [PollFd::new(&fd, PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) => return child.try_wait().ok().flatten(),
            Ok(_) => return child.wait().ok(),
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return child.wait().ok(),
        }
    }
}

fn now() -> Instant {
    Instant::now()
}

/// Becomes another program that dies with its parent: the body of the helper process.
///
/// A plain name is searched in PATH, then beside this program: freshly built programs find each
/// other, and an installed drbdsetup needs no second name.
///
/// The parent's death is asked for here, between fork and exec of the backend, because doing it in
/// the forked child of this program would need unsafe code. Returns the exit code on failure.
pub fn exec_bound(args: &[BString]) -> i32 {
    let Some((program, args)) = args.split_first() else { return 20 };
    let _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
    let become_it = |path: &OsStr| {
        let args = args.iter().map(|a| OsStr::from_bytes(a));
        // exec only returns when it failed.
        Command::new(path).arg0(OsStr::from_bytes(program)).args(args).exec()
    };
    let error = become_it(OsStr::from_bytes(program));
    if error.kind() == std::io::ErrorKind::NotFound && !program.contains(&b'/') {
        let own = std::env::current_exe().ok();
        let folder = own.as_deref().and_then(std::path::Path::parent);
        let second = if program == "drbdsetup-84" { "drbdsetup".into() } else { program.clone() };
        for name in [program, &second] {
            if let Some(folder) = folder {
                let _ = become_it(folder.join(OsStr::from_bytes(name)).as_os_str());
            }
        }
    }
    print::complain("Can not exec");
    20
}
