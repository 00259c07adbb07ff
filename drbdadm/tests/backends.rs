//! Backend calls with real processes: time limits, codes, children that die with their parent.

#![allow(clippy::unwrap_used, reason = "a scene that cannot be set up fails its test")]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const CONFIG: &str = "global { disable-ip-verification; cmd-timeout-short 1; }
resource r0 { device minor 7; disk /dev/x; meta-disk internal;
    handlers { fence-peer \"kill -9 $$\"; unfence-peer \"echo $DRBD_PEERS $DRBD_MINOR; exit 3\"; }
    on alpha { address 10.0.0.1:7789; } on bravo { address 10.0.0.2:7789; } }
";

struct Scene {
    folder: tempfile::TempDir,
}

impl Scene {
    /// A folder with a configuration and a drbdsetup-84 of this text.
    fn new(backend: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("t.conf"), CONFIG).unwrap();
        for name in ["drbdsetup-84", "drbdmeta"] {
            let path = folder.path().join(name);
            std::fs::write(&path, format!("#!/bin/sh\n{backend}\n")).unwrap();
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        }
        Self { folder }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_drbdadm"));
        command.args(["--node-name", "alpha", "-c"]).arg(self.path("t.conf")).args(args);
        command.args(["-s", "/nonexistent/drbdsetup"]).stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> (Option<i32>, String, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_drbdadm"));
        command.args(["--node-name", "alpha", "-c"]).arg(self.path("t.conf")).args(args);
        command.arg("-s").arg(self.path("drbdsetup-84")).arg("-m").arg(self.path("drbdmeta"));
        let output = command.stdin(Stdio::null()).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

#[test]
fn a_backend_that_hangs_is_ended_and_named() {
    let scene = Scene::new("exec sleep 60");
    let start = Instant::now();
    let (code, _, stderr) = scene.run(&["verify", "r0"]);
    assert_eq!(code, Some(20), "{stderr}");
    assert!(stderr.contains("verify 7' did not terminate within 1 seconds"), "{stderr}");
    assert!(start.elapsed() < Duration::from_secs(30));
}

#[test]
fn codes_of_ten_and_more_are_reported() {
    let scene = Scene::new("exit 17");
    let (code, _, stderr) = scene.run(&["primary", "r0"]);
    assert_eq!(code, Some(17));
    assert!(stderr.contains("primary 7' terminated with exit code 17"), "{stderr}");
    let scene = Scene::new("exit 5");
    assert_eq!(scene.run(&["primary", "r0"]), (Some(5), String::new(), String::new()));
}

#[test]
fn a_backend_that_was_killed_did_not_succeed() {
    let scene = Scene::new("kill -9 $$");
    assert_eq!(scene.run(&["primary", "r0"]).0, Some(20));
    assert_eq!(scene.run(&["fence-peer", "r0"]).0, Some(20), "handlers too");
}

#[test]
fn handlers_see_their_environment_and_pass_their_code_on() {
    let scene = Scene::new("exit 0");
    assert_eq!(scene.run(&["unfence-peer", "r0"]), (Some(3), "bravo 7\n".into(), String::new()));
}

#[test]
fn a_backend_that_is_not_there_is_said_so() {
    let scene = Scene::new("exit 0");
    let output = scene.command(&["primary", "r0"]).output().unwrap();
    assert_eq!(output.status.code(), Some(20));
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(stderr, "Can not find command (drbdsetup/drbdmeta)\n");
}

#[test]
fn what_a_fallback_replaces_is_not_shown() {
    let scene = Scene::new("echo \"said by $(basename $0)\" >&2; [ \"${0##*/}\" = drbdmeta ]");
    let (code, _, stderr) = scene.run(&["dstate", "r0"]);
    assert_eq!((code, stderr.as_str()), (Some(0), "said by drbdmeta\n"));
}

#[test]
fn a_backend_dies_with_its_drbdadm() {
    let scene = Scene::new("echo $$ > pid.new; mv pid.new pid; exec sleep 60");
    let mut command = Command::new(env!("CARGO_BIN_EXE_drbdadm"));
    command.args(["--node-name", "alpha", "-c"]).arg(scene.path("t.conf"));
    command.arg("-s").arg(scene.path("drbdsetup-84")).args(["secondary", "r0"]);
    command.current_dir(scene.folder.path()).stdin(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    let pid = loop {
        if let Ok(text) = std::fs::read_to_string(scene.path("pid")) {
            break text.trim().to_owned();
        }
        assert!(Instant::now() < deadline, "the backend never started");
        std::thread::yield_now();
    };
    child.kill().unwrap();
    child.wait().unwrap();
    let process = Path::new("/proc").join(&pid).join("stat");
    let is_gone = || std::fs::read_to_string(&process).map_or(true, |stat| stat.contains(") Z "));
    while !is_gone() {
        assert!(Instant::now() < deadline, "the backend outlived its parent");
        std::thread::yield_now();
    }
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let scene = Scene::new("exit 0");
    let mut command = scene.command(&["dump"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!stderr.contains("panicked"), "{stderr}");
}
