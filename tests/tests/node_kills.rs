//! Daemons are killed at random points under a verifying workload. How many and which points:
//! `DRBDRS_KILLS` (for each protocol), `DRBDRS_SEED`, on disks of `DRBDRS_DISK_MIB`; long: `cargo xtask soak kill`.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Result, ensure};
use drbdrs_tests::need::trial;
use drbdrs_tests::node_kills::live;
use drbdrs_tests::nodes::{Did, Node, Pair, Programs, eventually};
use libtest_mimic::{Arguments, Failed, Trial};
use rustix::process::Signal;

fn main() {
    let args = Arguments::from_args();
    let mut trials: Vec<Trial> = Vec::new();
    for (protocol, n) in ["A", "B", "C"].into_iter().zip(0..) {
        trials.push(trial(&format!("no_acknowledged_write_is_lost_{protocol}"), &[], move || {
            test(protocol, n).map_err(|e| Failed::from(format!("{e:#}")))
        }));
    }
    trials.push(trial("a_workload_goes_from_process_to_process", &[], || {
        hand_over().map_err(|e| Failed::from(format!("{e:#}")))
    }));
    libtest_mimic::run(&args, trials).exit();
}

fn number(name: &str, default: u64) -> Result<u64> {
    Ok(std::env::var(name).map_or(Ok(default), |text| text.parse())?)
}

fn test(protocol: &str, n: u64) -> Result<()> {
    let kills = u32::try_from(number("DRBDRS_KILLS", 2)?)?;
    let seed = number("DRBDRS_SEED", 6)? + n;
    let disk = number("DRBDRS_DISK_MIB", 48)? << 20;
    live(&Programs::build(), protocol, disk, kills, seed)
}

fn hand_over() -> Result<()> {
    let tool = drbdrs_tests::program_of("drbdrs-workload", "workload");
    let mut pair = Pair::new(&Programs::build(), 1, 24 << 20, "", "")?;
    pair.in_sync("")?;
    let journal = pair.dir.path().join("journal");
    let [alpha, beta] = &mut pair.nodes;
    let run = |task: &str, node: &Node| {
        let mut command = Command::new(&tool);
        command.arg(task).arg("--journal").arg(&journal).arg("--socket");
        command.arg(node.run_dir().join("nbd.sock"));
        command
    };
    let verify = |node: &Node| -> Result<String> { Did::from(run("verify", node).output()?).ok() };
    let mut first = run("write", alpha).args(["--seconds", "60"]).spawn()?;
    std::thread::sleep(Duration::from_secs(1));
    first.kill()?;
    first.wait()?;
    // What it had asked for must be over before others write.
    eventually(|| {
        let did = alpha.adm(&["secondary", "r0"])?;
        Ok(if did.code == 0 { Ok(()) } else { Err(format!("{did:?}")) })
    })?;
    alpha.adm(&["primary", "r0"])?.ok()?;
    let mut second = run("write", alpha);
    let second = second.args(["--seconds", "60", "--no-sync"]).stdout(Stdio::piped()).spawn()?;
    std::thread::sleep(Duration::from_secs(1));
    ensure!(alpha.stop(Signal::KILL)? == 137, "not killed");
    let text = Did::from(second.wait_with_output()?).ok()?;
    ensure!(text.contains(" 0 errors, 4 clients lost"), "{text}");
    beta.until("cs:WFConnection")?;
    beta.adm(&["primary", "r0"])?.ok()?;
    let text = verify(beta)?;
    ensure!(text.ends_with("; 0 acknowledged are not there\n"), "{text}");

    // It does complain: of a sector that somebody else has written.
    drbdrs_workload::nbd::Client::open(&beta.server())?.write(4096, &[0x5a; 512])?;
    let did = Did::from(run("verify", beta).output()?);
    ensure!(did.code == 1 && did.err.contains("sector 8: Alien"), "{did:?}");
    Ok(())
}
