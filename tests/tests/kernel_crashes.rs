//! The engine loses power under load, with the Linux DRBD 8.4 as its peer; and disks change their
//! owner after a crash of either.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use drbd_core::admin::Command;
use drbd_core::config::Protocol;
use drbd_types::Cstate;
use drbdrs_tests::interop::row;
use drbdrs_tests::kernel_pair::{Both, LONG, VOLUME, apply_al, fresh_image, net_config};
use libtest_mimic::Arguments;

fn main() {
    let args = Arguments::from_args();
    let tests = vec![
        row(4, "Primary", "we_lose_power_as_primary_under_load", crashed_primary),
        row(4, "Secondary", "we_lose_power_as_secondary_under_load", crashed_secondary),
        row(7, "both", "disks_change_owners_after_crashes_of_either", swaps),
    ];
    libtest_mimic::run(&args, tests).exit();
}

fn pair() -> Result<Both> {
    let mut both = Both::boot(fresh_image(0)?)?;
    both.fresh(&net_config(Protocol::C), "", "")?;
    Ok(both)
}

/// What was acknowledged, by block.
type Acknowledged = BTreeMap<u64, u8>;

/// Writes with 16 requests at once; the last ones are still under way at the end.
fn load(both: &mut Both, salt: u8) -> Result<Acknowledged> {
    let mut pending = VecDeque::new();
    let mut acknowledged = Acknowledged::new();
    for n in 0..160_u64 {
        let (block, fill) = (n * 41 % 1900, salt.wrapping_add(u8::try_from(n)?));
        let op = both.own.write_op(block * 8, vec![fill; 4096])?;
        pending.push_back((block, fill, both.own.begin(0, op)?));
        if pending.len() == 16
            && let Some((block, fill, id)) = pending.pop_front()
        {
            both.own.finish(id)?;
            acknowledged.insert(block, fill);
        }
    }
    Ok(acknowledged)
}

fn nothing_lost(disk: &[u8], acknowledged: &Acknowledged) -> Result<()> {
    for (block, fill) in acknowledged {
        let at = usize::try_from(block * 4096)?;
        ensure!(disk[at..at + 4096].iter().all(|b| b == fill), "block {block} is lost");
    }
    Ok(())
}

fn reconnect(both: &mut Both) -> Result<()> {
    both.attach()?;
    both.own.ok(Command::Connect(Box::new(net_config(Protocol::C))))?;
    both.in_sync()?;
    both.compare()
}

fn crashed_primary() -> Result<()> {
    let mut both = pair()?;
    // It comes back, and its data is the good one.
    both.own.ok(Command::Primary { volume: VOLUME, force: false })?;
    let acknowledged = load(&mut both, 3)?;
    both.crash()?;
    reconnect(&mut both)?;
    nothing_lost(&both.own.image(0)?, &acknowledged)?;
    let log = both.own.log();
    both.ensure(log.contains("Began resync as SyncSource"), "what was hot is resynced")?;
    // The kernel takes over meanwhile, with everything that was acknowledged.
    both.own.ok(Command::Primary { volume: VOLUME, force: false })?;
    let acknowledged = load(&mut both, 101)?;
    both.crash()?;
    both.kernel.guest.wait_for("! grep -q cs:Connected /proc/drbd", LONG)?;
    both.kernel.guest.ok("drbdadm primary r0 && sync")?;
    let path = both.kernel.guest.disk_image(0).context("no disk")?.to_owned();
    nothing_lost(&fs::read(&path)?, &acknowledged)?;
    both.kernel
        .guest
        .ok("dd if=/dev/urandom of=/dev/drbd0 bs=4k seek=5 count=9 oflag=direct 2>&1")?;
    reconnect(&mut both)?;
    let log = both.own.log();
    both.ensure(log.contains("Began resync as SyncTarget"), "the survivor is the source")
}

fn crashed_secondary() -> Result<()> {
    let mut both = pair()?;
    both.kernel.guest.ok("drbdadm primary r0")?;
    for round in 0..3 {
        let job = both.kernel.guest.spawn(
            "fio --name=j --filename=/dev/drbd0 --direct=1 --ioengine=libaio --iodepth=32 \
             --rw=randwrite --bsrange=4k-32k --size=6m --verify=crc32c --do_verify=1 \
             --verify_fatal=1 --output=/tmp/fio || { cat /tmp/fio; exit 1; }",
        )?;
        std::thread::sleep(Duration::from_millis(700 + 500 * round));
        both.crash()?;
        std::thread::sleep(Duration::from_millis(500));
        reconnect_under_load(&mut both)?;
        let output = job.wait(LONG)?;
        both.ensure(output.status == 0, &output.out)?;
        both.in_sync()?;
        both.compare()?;
    }
    Ok(())
}

fn reconnect_under_load(both: &mut Both) -> Result<()> {
    both.attach()?;
    both.own.ok(Command::Connect(Box::new(net_config(Protocol::C))))?;
    both.in_sync()
}

fn swaps() -> Result<()> {
    let mut both = pair()?;
    // The kernel dies as Primary; the engine goes on with its disk.
    both.kernel.guest.ok("drbdadm primary r0")?;
    let job = both.kernel.guest.spawn(
        "while :; do dd if=/dev/urandom of=/dev/drbd0 bs=16k seek=$((RANDOM % 400)) count=4 oflag=direct 2>/dev/null; done",
    )?;
    std::thread::sleep(Duration::from_secs(2));
    both.kernel.guest.power_cut()?;
    drop(job);
    both.own.wait("the loss", |s| s.conn < Cstate::Connected)?;
    swap(&mut both)?;
    reconnect(&mut both)?;
    let log = both.own.log();
    both.ensure(log.contains("uuid_compare()=1 by rule 40"), "the crashed Primary's disk leads")?;
    // The engine dies as Primary; the kernel goes on with its disk.
    both.own.ok(Command::Primary { volume: VOLUME, force: false })?;
    let acknowledged = load(&mut both, 55)?;
    both.kernel.guest.power_cut()?;
    both.own.wait("the loss", |s| s.conn < Cstate::Connected)?;
    both.crash()?;
    swap(&mut both)?;
    reconnect(&mut both)?;
    nothing_lost(&both.own.image(0)?, &acknowledged)
}

/// Exchanges the disks while the guest is off, and boots it.
fn swap(both: &mut Both) -> Result<()> {
    let image = both.own.image(0)?;
    let path = both.kernel.guest.disk_image(0).context("no disk")?.to_owned();
    let theirs = fs::read(&path)?;
    fs::write(&path, &image)?;
    both.restart(apply_al(theirs)?);
    both.start_kernel("")
}
