//! The daemon, with its commands and its NBD export, as one node; the Linux DRBD 8.4 as the other.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use drbdrs_tests::daemon_pair::DaemonPair;
use drbdrs_tests::interop::row;
use drbdrs_tests::kernel_pair::LONG;
use drbdrs_tests::nodes::Programs;
use libtest_mimic::Arguments;
use rustix::process::Signal;

fn main() {
    let args = Arguments::from_args();
    let tests = vec![
        row(1, "both", "the_daemon_and_file_systems_that_change_sides", file_systems),
        row(4, "both", "the_daemon_is_killed_under_load", daemon_killed),
        row(4, "Primary", "the_kernel_loses_power_under_load_of_the_daemon", kernel_power_cut),
        row(4, "Secondary", "a_failed_flush_takes_acknowledgements_back", failed_flush),
        row(7, "both", "daemon_and_kernel_swap_their_disks", swap),
    ];
    libtest_mimic::run(&args, tests).exit();
}

/// First resync from the kernel, writes here, a file system there; then one here; each seen by the
/// other.
fn file_systems() -> Result<()> {
    let mut pair = DaemonPair::new(&Programs::build(), "protocol C;")?;
    pair.kernel.guest.ok("drbdadm primary --force r0")?;
    pair.in_sync()?;
    pair.kernel.guest.ok("drbdadm secondary r0")?;
    pair.promote_own()?;
    let running = pair.begin_writes(1)?;
    DaemonPair::pause(2000);
    println!("{} writes", pair.end_writes(running)?.writes);
    pair.verify()?;
    pair.in_sync()?;
    pair.demote_own()?;
    pair.promote_kernel()?;
    pair.kernel.guest.ok("mkfs.ext4 -q /dev/drbd0 && mount /dev/drbd0 /mnt && \
         dd if=/dev/urandom of=/mnt/file bs=64k count=40 2>/dev/null && \
         sha256sum < /mnt/file > /mnt/sum && umount /mnt && drbdadm secondary r0")?;
    pair.promote_own()?;
    pair.in_sync()?;
    let copy = pair.node.dir.join("copy");
    let uri = pair.node.uri(0);
    run(Command::new("qemu-img").args(["convert", "-O", "raw", &uri]).arg(&copy))?;
    run(Command::new("e2fsck").args(["-fn"]).arg(&copy))?;
    // The other way: a file system made on the host, written through NBD.
    run(Command::new("mkfs.ext4").args(["-q", "-F", "-L", "ours"]).arg(&copy))?;
    run(Command::new("qemu-img").args(["convert", "-n", "-O", "raw"]).arg(&copy).arg(&uri))?;
    pair.demote_own()?;
    pair.in_sync()?;
    pair.promote_kernel()?;
    pair.kernel.guest.ok("e2fsck -fn /dev/drbd0 && mount /dev/drbd0 /mnt && \
         echo hello > /mnt/greeting && umount /mnt && drbdadm secondary r0")?;
    pair.in_sync()
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        output.status.success(),
        "{command:?}: {}{text}",
        String::from_utf8_lossy(&output.stdout)
    );
    Ok(())
}

/// As Primary it comes back, or the kernel takes over; as Secondary it misses writes.
fn daemon_killed() -> Result<()> {
    let mut pair = DaemonPair::new(&Programs::build(), "protocol C;")?;
    pair.node.adm(&["primary", "--force", "r0"])?.ok()?;
    pair.in_sync()?;
    for round in 0..4 {
        let running = pair.begin_writes(round)?;
        DaemonPair::pause(500 + 300 * round);
        pair.kill_own()?;
        println!("round {round}: {} writes", pair.end_writes(running)?.writes);
        if round % 2 == 0 {
            pair.start_own()?;
        } else {
            // The kernel has all that was acknowledged, and its copy wins.
            pair.promote_kernel()?;
            pair.start_own()?;
            pair.in_sync()?;
            pair.kernel.guest.ok("drbdadm secondary r0")?;
        }
        pair.in_sync()?;
        pair.promote_own()?;
        pair.verify()?;
    }
    pair.demote_own()?;
    pair.promote_kernel()?;
    let job = pair.kernel.guest.spawn(
        "for i in $(seq 1 60); do dd if=/dev/urandom of=/dev/drbd0 bs=16k seek=$((i * 7)) \
         count=5 oflag=direct 2>/dev/null || exit 1; done",
    )?;
    DaemonPair::pause(500);
    pair.kill_own()?;
    DaemonPair::pause(500);
    pair.start_own()?;
    ensure!(job.wait(LONG)?.status == 0, "the kernel's writes failed");
    pair.in_sync()
}

fn kernel_power_cut() -> Result<()> {
    let mut pair = DaemonPair::new(&Programs::build(), "protocol C; timeout 30;")?;
    pair.node.adm(&["primary", "--force", "r0"])?.ok()?;
    pair.in_sync()?;
    for round in 0..2 {
        let running = pair.begin_writes(round)?;
        DaemonPair::pause(800);
        pair.kernel.guest.power_cut()?;
        DaemonPair::pause(500);
        pair.start_kernel()?;
        DaemonPair::pause(500);
        // The link breaks in the middle of the resync, too.
        pair.cut(true);
        pair.node.until("cs:WFConnection")?;
        pair.cut(false);
        let report = pair.end_writes(running)?;
        ensure!(report.lost == 0, "clients of the Primary were lost");
        println!("round {round}: {} writes", report.writes);
        pair.in_sync()?;
        pair.verify()?;
    }
    Ok(())
}

/// What was acknowledged, and is in a cache that then fails to flush, is taken back before the epoch is
/// acknowledged: the kernel has to know that it is the only one to have it.
fn failed_flush() -> Result<()> {
    let pair = DaemonPair::new(&Programs::build(), "protocol C;")?;
    pair.kernel.guest.ok("drbdadm primary --force r0")?;
    pair.in_sync()?;
    let words = ["fault-disk", "@0", "--operation=flush", "--effect=error"];
    pair.node.setup(&words)?.ok()?;
    let write = "dd if=/dev/urandom of=/dev/drbd0 bs=64k seek=32 count=4 oflag=direct 2>/dev/null";
    pair.kernel.guest.ok(write)?;
    pair.tell(pair.node.until("ds:Diskless/UpToDate"))?;
    let marked = "grep -q 'ds:UpToDate/Diskless' /proc/drbd && grep -q 'oos:256$' /proc/drbd";
    pair.tell(pair.kernel.guest.wait_for(marked, LONG))?;
    pair.node.setup(&["fault-clear"])?.ok()?;
    pair.node.adm(&["attach", "r0"])?.ok()?;
    pair.in_sync()
}

/// Both go down, in order or not, and each goes on with the disk of the other.
fn swap() -> Result<()> {
    let mut pair = DaemonPair::new(&Programs::build(), "protocol C;")?;
    pair.node.adm(&["primary", "--force", "r0"])?.ok()?;
    pair.in_sync()?;
    // In order: nothing is to be copied.
    let running = pair.begin_writes(1)?;
    DaemonPair::pause(700);
    pair.end_writes(running)?;
    pair.demote_own()?;
    pair.node.adm(&["down", "r0"])?.ok()?;
    pair.kernel.guest.ok("drbdadm down r0")?;
    pair.kernel.guest.shutdown()?;
    ensure!(pair.node.stop(Signal::TERM)? == 0);
    let log = go_on_swapped(&mut pair)?;
    ensure!(!log.contains("Began resync"), "{log}");
    // After crashes of both under load: what the activity logs name is copied, not more.
    let running = pair.begin_writes(2)?;
    DaemonPair::pause(700);
    pair.kill_own()?;
    pair.kernel.guest.power_cut()?;
    pair.end_writes(running)?;
    let log = go_on_swapped(&mut pair)?;
    ensure!(!log.contains("full sync"), "{log}");
    Ok(())
}

/// Both start with the disk of the other, and the daemon has all that was acknowledged. What it has
/// logged.
fn go_on_swapped(pair: &mut DaemonPair) -> Result<String> {
    let before = pair.node.log()?.len();
    pair.swap_disks()?;
    pair.start_kernel()?;
    pair.start_own()?;
    pair.in_sync()?;
    let log = pair.node.log()?.split_off(before);
    pair.promote_own()?;
    pair.verify()?;
    Ok(log)
}
