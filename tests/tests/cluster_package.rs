//! The Debian package on two machines: installed, the README's tutorial, a restart, an upgrade under
//! load, removed with nothing left over. And what systemd's units and protocol are about.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use drbdrs_tests::machine::{Config, Lab, Machine};
use drbdrs_tests::need::{Case, Need, suite};
use drbdrs_tests::nodes::{Did, Programs};

const DPKG: Need = Need::Program("dpkg-deb");
const ANALYZE: Need = Need::Program("systemd-analyze");

/// As in the README.
const RESOURCE: &str = "resource r0 {
  device minor 0;
  disk /srv/disk0;
  meta-disk internal;
  on alpha { address 10.7.0.1:7788; }
  on beta { address 10.7.0.2:7788; }
}
";

fn main() {
    let qemu = Need::Program("qemu-io");
    let tests: [Case<'_>; 3] = [
        ("installed_used_upgraded_and_removed", &[Need::Root, DPKG, qemu], life),
        ("systemd_takes_the_units", &[Need::Root, DPKG, ANALYZE], units),
        ("readiness_and_watchdog", &[], notifications),
    ];
    suite(&tests);
}

/// Packs the programs as this revision, in this folder.
fn package(dir: &Path, revision: &str) -> Result<PathBuf> {
    Programs::build();
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["run", "--quiet", "-p", "xtask", "--", "deb", "--debug", "--no-build"]);
    command.args(["--revision", revision, "--dir"]).arg(dir);
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    Did::from(command.current_dir(top).output()?).ok().context("cargo xtask deb")?;
    let ends = format!("-{revision}_");
    let mut names = std::fs::read_dir(dir)?.filter_map(|entry| Some(entry.ok()?.path()));
    names.find(|path| path.to_string_lossy().contains(&ends)).context("no package")
}

/// A machine on which drbd-utils never was.
fn boot(lab: &Lab, name: &str, number: u8, packages: &[&Path]) -> Result<Machine> {
    let address = format!("10.7.0.{number}/24");
    let machine = lab.boot(&Config { name: name.into(), address, ..Config::default() })?;
    machine.sh("dpkg --purge --force-all drbd-utils; rm -rf /etc/drbd* /var/lib/drbd")?.ok()?;
    for (package, revision) in packages.iter().zip(1..) {
        std::fs::copy(package, machine.disks.join(format!("{revision}.deb")))?;
    }
    machine.sh("truncate -s 24M /srv/disk0")?.ok()?;
    Ok(machine)
}

/// All files where packages have theirs, but for logs, caches and lists of packages.
fn files(machine: &Machine) -> Result<String> {
    let script = "find /etc /usr /var /opt -xdev \
        | grep -v '^/var/\\(log\\|cache\\|lib/dpkg\\|lib/systemd\\)/' | sort; find /run /tmp";
    machine.sh(script)?.ok()
}

fn install(machine: &Machine, revision: u8) -> Result<()> {
    let words = ["-i", "--force-confnew", &format!("/srv/{revision}.deb")];
    machine.run("dpkg", &words)?.ok().map(drop)
}

/// What systemd would run to start this unit.
fn start(machine: &Machine, unit: &str) -> Result<()> {
    let lines = format!("sed -n 's/^ExecStart=//p' /usr/lib/systemd/system/{unit}");
    let lines = machine.sh(&lines)?.ok()?;
    ensure!(!lines.is_empty(), "{unit} starts nothing");
    for line in lines.lines() {
        if unit == "drbdrs.service" {
            machine.sh(&format!("setsid {line} >>/srv/log 2>&1 </dev/null &"))?.ok()?;
            machine.until("drbdsetup status")?;
        } else {
            machine.sh(line)?.ok().with_context(|| line.to_owned())?;
        }
    }
    Ok(())
}

fn stop(machine: &Machine) -> Result<()> {
    machine.sh("drbdadm down all && kill $(pidof drbdrs)")?.ok()?;
    machine.until("! pidof drbdrs")
}

fn qemu_io(machine: &Machine, words: &str) -> Result<()> {
    let uri = "nbd+unix:///r0/0?socket=/run/drbd/nbd.sock";
    let text = machine.run("qemu-io", &["-f", "raw", "-c", words, uri])?.ok()?;
    ensure!(!text.contains("failed"), "{words}: {text}");
    Ok(())
}

fn life() -> Result<()> {
    let lab = Lab::new()?;
    let packages = [package(lab.dir(), "1")?, package(lab.dir(), "2")?];
    let packages = [packages[0].as_path(), packages[1].as_path()];
    let [alpha, beta] =
        [("alpha", 1), ("beta", 2)].map(|(name, number)| boot(&lab, name, number, &packages));
    let (alpha, beta) = (alpha?, beta?);
    let both = [&alpha, &beta];
    let before = files(&alpha)?;
    for machine in both {
        install(machine, 1)?;
        machine.write("/etc/drbd.d/r0.res", RESOURCE)?;
        start(machine, "drbdrs.service")?;
        machine.run("drbdadm", &["create-md", "--force", "r0"])?.ok()?;
        machine.run("drbdadm", &["up", "r0"])?.ok()?;
    }
    alpha.run("drbdadm", &["primary", "--force", "r0"])?.ok()?;
    qemu_io(&alpha, "write -P 7 0 1M")?;
    alpha.until("drbdadm dstate r0 | grep -q UpToDate/UpToDate")?;
    restart(both).context("a restart")?;
    upgrade(both).context("an upgrade")?;
    for machine in both {
        stop(machine)?;
        machine.run("dpkg", &["-r", "drbdrs"])?.ok()?;
        ensure!(machine.sh("test -e /etc/drbd.d/r0.res")?.code == 0, "the configuration is gone");
        machine.sh("rm /etc/drbd.d/r0.res")?.ok()?;
        machine.run("dpkg", &["-P", "drbdrs"])?.ok()?;
    }
    let after = files(&alpha)?;
    let [before, after] = [&before, &after].map(|text| text.lines().collect::<BTreeSet<_>>());
    let left: Vec<_> = after.difference(&before).collect();
    ensure!(left.is_empty(), "left over: {left:#?}");
    let gone: Vec<_> = before.difference(&after).collect();
    ensure!(gone.is_empty(), "missing: {gone:#?}");
    Ok(())
}

/// Both machines go down and come up, as units do it.
fn restart(both: [&Machine; 2]) -> Result<()> {
    let [alpha, beta] = both;
    for machine in both {
        stop(machine)?;
    }
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            start(beta, "drbdrs.service")?;
            start(beta, "drbd.service")
        });
        start(alpha, "drbdrs.service")?;
        start(alpha, "drbd.service")?;
        other.join().map_err(|_| anyhow::anyhow!("a panic"))?
    })?;
    // wait-con-int has waited for the peer.
    let state = beta.run("drbdadm", &["cstate", "r0"])?.ok()?;
    ensure!(state.trim() == "Connected", "{state}");
    beta.run("drbdadm", &["primary", "r0"])?.ok()?;
    qemu_io(beta, "read -P 7 0 1M")?;
    beta.until("drbdadm secondary r0")
}

/// The daemon that runs goes on; the next start is the new one.
fn upgrade(both: [&Machine; 2]) -> Result<()> {
    let [alpha, _] = both;
    alpha.run("drbdadm", &["primary", "r0"])?.ok()?;
    let pid = alpha.sh("pidof drbdrs")?.ok()?;
    for machine in both {
        install(machine, 2)?;
    }
    ensure!(alpha.sh("pidof drbdrs")?.ok()? == pid, "the upgrade has ended the daemon");
    qemu_io(alpha, "write -P 8 1M 1M")?;
    let state = alpha.run("drbdadm", &["dstate", "r0"])?.ok()?;
    ensure!(state.trim() == "UpToDate/UpToDate", "{state}");
    alpha.until("drbdadm secondary r0")?;
    stop(alpha)?;
    start(alpha, "drbdrs.service")?;
    start(alpha, "drbd.service")?;
    alpha.run("drbdadm", &["primary", "r0"])?.ok()?;
    qemu_io(alpha, "read -P 8 1M 1M")?;
    alpha.until("drbdadm secondary r0")
}

fn units() -> Result<()> {
    let lab = Lab::new()?;
    let package = package(lab.dir(), "1")?;
    let machine = boot(&lab, "alpha", 1, &[&package])?;
    install(&machine, 1)?;
    let names =
        "drbdrs.service drbd.service drbd@r0.service drbd@r0.target drbd-promote@r0.service";
    let did = machine.sh(&format!("systemd-analyze verify --man=no {names} 2>&1"))?;
    let ours: Vec<&str> = did.out.lines().filter(|line| line.contains("drbd")).collect();
    ensure!(ours.is_empty(), "{ours:#?}");
    Ok(())
}

/// The daemon tells a service manager that it is ready, and again and again that it lives.
fn notifications() -> Result<()> {
    let dir = tempfile::TempDir::new()?;
    let path = dir.path().join("notify");
    let socket = std::os::unix::net::UnixDatagram::bind(&path)?;
    socket.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut command = Command::new(drbdrs_tests::program("drbdrs"));
    command.arg("--run-dir").arg(dir.path()).args(["--settings", "/nonexistent"]);
    command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "200000").env_remove("WATCHDOG_PID");
    let mut daemon = command.stdin(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let receive = || {
        let mut text = [0; 256];
        let n = socket.recv(&mut text).context("a message")?;
        Ok::<_, anyhow::Error>(String::from_utf8_lossy(&text[..n]).into_owned())
    };
    let messages = (0..3).map(|_| receive()).collect::<Result<Vec<_>>>();
    daemon.kill()?;
    daemon.wait()?;
    ensure!(messages? == ["READY=1", "WATCHDOG=1", "WATCHDOG=1"], "other messages");
    Ok(())
}
