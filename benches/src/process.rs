//! What processes cost, from /proc and from perf.

use std::fs;
use std::io::{Error, Result};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

/// Unit of processor time in /proc, part of the kernel's interface.
const TICK: Duration = Duration::from_millis(10);

/// Processor time that these processes have used, with threads that have ended.
///
/// # Errors
/// One of them is gone.
pub fn cpu(pids: &[u32]) -> Result<Duration> {
    pids.iter().map(|pid| cpu_of(*pid)).sum()
}

fn cpu_of(pid: u32) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name may contain anything; fields 14 and 15 are counted from the number before it.
    let fields = stat.rsplit_once(") ").map_or("", |(_, fields)| fields);
    let ticks = fields.split(' ').skip(11).take(2).map(str::parse::<u64>);
    let ticks = ticks.sum::<std::result::Result<u64, _>>().map_err(Error::other)?;
    Ok(TICK.saturating_mul(ticks.try_into().map_err(Error::other)?))
}

/// Memory that a process has resident, in bytes, and how many threads it has.
///
/// # Errors
/// It is gone.
pub fn memory_and_threads(pid: u32) -> Result<(u64, u64)> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let word = line.and_then(|line| line.split_whitespace().next());
        word.and_then(|word| word.parse::<u64>().ok()).ok_or_else(|| Error::other(name.to_owned()))
    };
    Ok((field("VmRSS:")? * 1024, field("Threads:")?))
}

/// The three load averages.
pub fn load_average() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').take(3).collect::<Vec<_>>().join(" ")
}

/// Counts system calls of processes, with perf.
#[derive(Debug)]
pub struct SyscallCount {
    perf: Child,
}

impl SyscallCount {
    /// Begins. Fails where there is no perf, or it may not count.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(pids: &[u32]) -> Result<Self> {
        let pids = pids.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        let perf = Command::new("perf")
            .args(["stat", "-x", ",", "-e", "raw_syscalls:sys_enter", "-p", &pids])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        // It says nothing when it has attached.
        std::thread::sleep(Duration::from_millis(300));
        Ok(Self { perf })
    }

    /// How many there were.
    ///
    /// # Errors
    /// It could not count.
    pub fn end(self) -> Result<u64> {
        let pid = i32::try_from(self.perf.id()).ok().and_then(Pid::from_raw);
        kill_process(pid.ok_or_else(|| Error::other("a pid"))?, Signal::INT)?;
        let output = self.perf.wait_with_output()?;
        let text = String::from_utf8_lossy(&output.stderr);
        let counted = text.lines().find(|line| line.contains("sys_enter"));
        let number = counted.and_then(|line| line.split(',').next()).and_then(|n| n.parse().ok());
        number.ok_or_else(|| Error::other(format!("perf: {}", text.trim())))
    }
}
