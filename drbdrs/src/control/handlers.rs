//! Handler programs: called as the original calls its user-mode helper.
//! Spec: states-and-generations.md §12.

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

use drbd_admin::{Answer, HelperCall, HelperPhase};
use drbd_core::action::Handler;
use drbd_core::event::Event;
use drbd_core::ids::CallId;
use drbd_types::Minor;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};

use super::convert::peer_environment;
use super::machine::Id;
use super::registry::{Node, now_us};
use crate::plane::run;

/// Output of one call that reaches the log, bytes.
const OUTPUT_MAX: u64 = 64 << 10;
/// Longest line of it.
const LINE_MAX: u64 = 4096;
/// How long output is waited for after the end of a program: its children may hold the pipe open.
const OUTPUT_GRACE: Duration = Duration::from_millis(200);

/// How handlers are run.
#[derive(Clone, Debug)]
pub struct Program {
    /// The program; called with the name of the handler and its object.
    pub path: PathBuf,
    /// It is ended after so long.
    pub timeout: Option<Duration>,
    /// The admin socket of this daemon, so that its commands reach it.
    pub socket: PathBuf,
}

/// One call.
struct Call {
    resource: String,
    volume: Option<(u16, u32)>,
    peer: Option<std::net::SocketAddr>,
    name: &'static str,
}

impl Call {
    fn object(&self) -> String {
        self.volume.map_or_else(|| self.resource.clone(), |(_, minor)| format!("minor-{minor}"))
    }

    fn prefix(&self) -> String {
        match self.volume {
            Some((volume, minor)) => format!("drbd {}/{volume} drbd{minor}", self.resource),
            None => format!("drbd {}", self.resource),
        }
    }

    fn announcement(&self, phase: HelperPhase) -> Answer {
        Answer::Helper(HelperCall {
            at_us: now_us(),
            resource: self.resource.clone(),
            volume: self.volume,
            is_connected: self.peer.is_some(),
            helper: self.name.into(),
            phase,
        })
    }
}

/// Runs a handler; its end is told to the engine.
pub(super) fn start(node: &Rc<Node>, id: Id, call: CallId, handler: Handler, minor: Option<Minor>) {
    let name = handler.name();
    let described = node.with(id, |record| {
        record.handlers.insert(call.0, (name.into(), Instant::now()));
        let volume = minor.and_then(|m| Some((record.volume_of(m.0)?.0, m.0)));
        let peer = record.network.as_ref().map(|n| n.peer_socket);
        Call { resource: record.name.clone(), volume, peer, name }
    });
    let Some(described) = described else { return };
    let node = Rc::clone(node);
    tokio::task::spawn_local(async move {
        node.publish(&described.resource, described.announcement(HelperPhase::Call));
        let status = run_program(&node.helper, &described).await;
        let phase = HelperPhase::Response { status };
        node.publish(&described.resource, described.announcement(phase));
        node.with(id, |record| record.handlers.remove(&call.0));
        // A negative errno has bits there too, but does not count.
        let exit = if status > 0xffff { 0 } else { i32::try_from(status >> 8 & 0xff).unwrap_or(0) };
        // When the resource is gone nobody waits for it.
        let _ = node.tell(id, || run::Command::Event(Event::Handler { call, exit })).await;
    });
}

/// Returns the raw wait status, or a negative errno as the original shows it.
async fn run_program(program: &Program, call: &Call) -> u32 {
    let (path, object, prefix) = (program.path.display(), call.object(), call.prefix());
    let words = format!("{path} {} {object}", call.name);
    tracing::info!("{prefix}: helper command: {words}");
    let status = match spawn(program, call, &object) {
        Ok(child) => finish(child, program.timeout, &prefix).await,
        Err(error) => {
            tracing::warn!("{prefix}: {path} can not be run: {error}");
            error.raw_os_error().unwrap_or(libc::EIO).wrapping_neg().cast_unsigned()
        }
    };
    let (code, shown) = (status >> 8 & 0xff, format!("0x{status:x}"));
    if status == 0 {
        tracing::info!("{prefix}: helper command: {words} exit code {code} ({shown})");
    } else {
        tracing::warn!("{prefix}: helper command: {words} exit code {code} ({shown})");
    }
    status
}

fn spawn(program: &Program, call: &Call, object: &str) -> std::io::Result<Child> {
    let mut command = Command::new(&program.path);
    command.arg(call.name).arg(object);
    command.env_clear();
    command.env("HOME", "/").env("TERM", "linux");
    command.env("PATH", "/sbin:/usr/sbin:/bin:/usr/bin");
    command.env("DRBDRS_ADMIN_SOCKET", &program.socket);
    // The name of this node may differ from the host's, where several run on one machine.
    if let Some(node) = std::env::var_os("__DRBD_NODE__") {
        command.env("__DRBD_NODE__", node);
    }
    if let Some(peer) = &call.peer {
        let (family, address) = peer_environment(peer);
        command.env("DRBD_PEER_AF", family).env("DRBD_PEER_ADDRESS", address);
    }
    command.current_dir("/").process_group(0);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn()
}

async fn finish(mut child: Child, timeout: Option<Duration>, prefix: &str) -> u32 {
    let group = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let output = async {
        tokio::join!(log_lines(stdout, prefix), log_lines(stderr, prefix));
    };
    let ended = async {
        match timeout {
            None => child.wait().await,
            Some(limit) => match tokio::time::timeout(limit, child.wait()).await {
                Ok(result) => result,
                Err(_) => {
                    tracing::error!("{prefix}: the handler did not end within {limit:?}: ended");
                    // It leads a group of its own: what it started ends with it.
                    let killed = group.map(|group| kill_process_group(group, Signal::KILL));
                    if !matches!(killed, Some(Ok(()))) {
                        let _ = child.start_kill();
                    }
                    child.wait().await
                }
            },
        }
    };
    tokio::pin!(output, ended);
    let mut is_drained = false;
    let result = loop {
        tokio::select! {
            result = &mut ended => break result,
            () = &mut output, if !is_drained => is_drained = true,
        }
    };
    if !is_drained {
        let _ = tokio::time::timeout(OUTPUT_GRACE, output).await;
    }
    result.map_or(libc::ECHILD.wrapping_neg().cast_unsigned(), raw)
}

fn raw(status: ExitStatus) -> u32 {
    status.into_raw().cast_unsigned()
}

/// Output goes to the log, line by line and bounded; the rest is read and dropped, so that the
/// program does not stop for it.
async fn log_lines(pipe: Option<impl AsyncRead + Unpin>, prefix: &str) {
    let Some(pipe) = pipe else { return };
    let mut reader = BufReader::new(pipe);
    let mut line = Vec::new();
    let mut left = OUTPUT_MAX;
    while left > 0 {
        line.clear();
        match (&mut reader).take(LINE_MAX.min(left)).read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => return,
            Ok(n) => {
                left = left.saturating_sub(u64::try_from(n).unwrap_or(left));
                let text = String::from_utf8_lossy(&line);
                tracing::info!("{prefix}: handler: {}", text.trim_end().escape_debug());
            }
        }
    }
    let _ = tokio::io::copy(&mut reader, &mut tokio::io::sink()).await;
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn script(folder: &std::path::Path, text: &str) -> Program {
        let path = folder.join("helper");
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        Program { path, timeout: Some(Duration::from_secs(20)), socket: "/x.sock".into() }
    }

    fn run(program: &Program, peer: Option<std::net::SocketAddr>) -> u32 {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let call = Call {
            resource: "r0".into(),
            volume: Some((0, 7)),
            peer,
            name: "before-resync-target",
        };
        runtime.block_on(run_program(program, &call))
    }

    #[test]
    fn arguments_environment_and_exit_code() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let text = format!("echo \"$@\"; env | sort > {}; exit 5", out.display());
        let program = script(folder.path(), &text);
        assert_eq!(run(&program, "10.1.1.2:7".parse().ok()), 5 << 8);
        let environment = std::fs::read_to_string(&out).unwrap();
        for line in [
            "HOME=/",
            "TERM=linux",
            "PATH=/sbin:/usr/sbin:/bin:/usr/bin",
            "DRBD_PEER_AF=ipv4",
            "DRBD_PEER_ADDRESS=10.1.1.2",
            "DRBDRS_ADMIN_SOCKET=/x.sock",
        ] {
            assert!(environment.lines().any(|l| l == line), "{line} is not in\n{environment}");
        }
        assert!(!environment.contains("CARGO"), "{environment}");
        run(&program, None);
        assert!(!std::fs::read_to_string(&out).unwrap().contains("DRBD_PEER"));
    }

    #[test]
    fn a_program_that_is_not_there_gives_the_negative_errno() {
        let program = Program { path: "/nonexistent".into(), timeout: None, socket: "/x".into() };
        assert_eq!(run(&program, None), 0xffff_fffe);
    }

    #[test]
    fn time_is_limited_also_for_its_children() {
        let folder = tempfile::tempdir().unwrap();
        let mut program = script(folder.path(), "sleep 1000 & sleep 1000");
        program.timeout = Some(Duration::from_millis(300));
        let start = Instant::now();
        assert_eq!(run(&program, None), 9);
        assert!(start.elapsed() < Duration::from_secs(10));
        // Output does not stop it, and children that hold the pipe do not delay its end.
        let program = script(folder.path(), "head -c 300000 /dev/zero; sleep 5 & exit 0");
        let start = Instant::now();
        assert_eq!(run(&program, None), 0);
        assert!(start.elapsed() < Duration::from_secs(4));
    }
}
