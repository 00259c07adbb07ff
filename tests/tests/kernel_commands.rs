//! Commands from the kernel's side, and from both sides at once, to a pair of the engine and the
//! Linux DRBD 8.4.

use std::time::Duration;

use anyhow::{Context as _, Result};
use drbd_core::admin::Command;
use drbd_core::config::{DiskConfig, NetConfig, Protocol, ResyncConfig};
use drbd_types::{Cstate, Dstate, Minor, Role, Sector, VolumeNr};
use drbdrs_tests::interop::row;
use drbdrs_tests::kernel_pair::{Both, LONG, VOLUME, disk_config, fresh_image, net_config};
use drbdrs_tests::proxy::Direction;
use libtest_mimic::Arguments;

fn main() {
    let args = Arguments::from_args();
    let tests = vec![
        row(6, "both", "commands_of_the_kernel", one_volume),
        row(6, "both", "resync_after_on_both_sides", resync_after),
    ];
    libtest_mimic::run(&args, tests).exit();
}

/// One guest for all: each part leaves a pair in sync, or begins anew.
fn one_volume() -> Result<()> {
    let mut both = Both::boot(fresh_image(0)?)?;
    clear_bitmap(&mut both).context("new-current-uuid --clear-bitmap")?;
    invalidates(&mut both).context("invalidate")?;
    pauses(&mut both).context("pauses")?;
    verify_part(&mut both).context("verify with a stop sector")?;
    resizes(&mut both).context("resize")?;
    behind(&mut both).context("Ahead and Behind")
}

/// 1 MiB/s for the engine as SyncTarget, and for the kernel.
fn slow(both: &mut Both) -> Result<()> {
    let resync = ResyncConfig { resync_rate: 1 << 10, c_plan_ahead: 0, ..Default::default() };
    let config = Box::new(DiskConfig { resync, ..disk_config() });
    both.own.ok(Command::DiskOptions { volume: VOLUME, config })?;
    both.kernel.guest.ok("drbdadm disk-options --resync-rate=1M --c-plan-ahead=0 r0").map(drop)
}

fn clear_bitmap(both: &mut Both) -> Result<()> {
    both.up(Protocol::C)?;
    both.kernel.guest.ok("drbdadm new-current-uuid --clear-bitmap r0/0")?;
    both.in_sync()?;
    both.ensure(!both.own.log().contains("Began resync"), "no resync")?;
    both.compare()
}

fn invalidates(both: &mut Both) -> Result<()> {
    let net = NetConfig { verify_alg: "sha1".into(), ..net_config(Protocol::C) };
    both.fresh(&net, "verify-alg sha1;", "")?;
    both.own.ok(Command::Primary { volume: VOLUME, force: false })?;
    both.own.write(0, vec![b'i'; 1 << 20])?;
    both.kernel.guest.ok("drbdadm invalidate r0")?;
    both.own.wait("a resync", |s| s.conn == Cstate::SyncSource || s.pdsk < Dstate::UpToDate)?;
    both.in_sync()?;
    both.compare()?;
    // Even a Primary's disk: reads go to the peer meanwhile.
    both.kernel.guest.ok("drbdadm invalidate-remote r0")?;
    both.own.wait("a resync", |s| s.disk < Dstate::UpToDate || s.conn == Cstate::SyncTarget)?;
    let read = both.own.read(2040, 8)?;
    both.ensure(read == vec![b'i'; 4096], "what the Primary reads")?;
    both.in_sync()?;
    both.compare()?;
    both.own.ok(Command::Secondary(VOLUME))?;
    both.kernel.guest.ok("drbdadm primary r0 && drbdadm invalidate-remote r0")?;
    both.own.wait("a resync", |s| s.disk < Dstate::UpToDate || s.conn == Cstate::SyncTarget)?;
    both.in_sync()?;
    both.compare()?;
    both.kernel.guest.ok("drbdadm secondary r0").map(drop)
}

fn pauses(both: &mut Both) -> Result<()> {
    slow(both)?;
    both.kernel.guest.ok("drbdadm primary r0 && drbdadm invalidate-remote r0")?;
    both.own.wait("a resync", |s| s.conn == Cstate::SyncTarget)?;
    // From both sides at once.
    let job = both.kernel.guest.spawn("drbdadm pause-sync r0")?;
    both.own.ok(Command::PauseSync(VOLUME))?;
    job.wait(LONG)?;
    both.own.wait("both pauses", |s| s.user_isp && s.peer_isp)?;
    both.ensure(both.own.state()?.conn == Cstate::PausedSyncT, "paused")?;
    both.kernel.wait_cstate("PausedSyncS", LONG)?;
    both.own.ok(Command::ResumeSync(VOLUME))?;
    std::thread::sleep(Duration::from_millis(500));
    both.ensure(both.own.state()?.conn == Cstate::PausedSyncT, "the peer's pause holds")?;
    both.kernel.guest.ok("drbdadm resume-sync r0")?;
    both.own.wait("it goes on", |s| s.conn != Cstate::PausedSyncT)?;
    both.in_sync()?;
    both.compare()?;
    both.kernel.guest.ok("drbdadm secondary r0").map(drop)
}

/// A difference before the stop sector is found, one behind it is not.
fn verify_part(both: &mut Both) -> Result<()> {
    let mut image = both.own.image(0)?;
    image[800 * 512] ^= 1;
    image[6000 * 512] ^= 1;
    both.own.set_image(0, image)?;
    both.kernel.guest.take_log()?;
    both.kernel.guest.ok("drbdadm -- --start=0 --stop=4096s verify r0")?;
    both.kernel.guest.wait_for("dmesg | grep -q 'Online verify found'", LONG)?;
    both.kernel.wait_cstate("Connected", LONG)?;
    let log = both.kernel.guest.take_log()?;
    both.ensure(log.contains("Online verify found 1 4k block out of sync!"), &log)?;
    both.own.wait("the end", |s| s.conn == Cstate::Connected)?;
    both.ensure(both.own.status()?.volumes[0].out_of_sync_bits == 1, "one bit here too")?;
    let (start, stop) = (Some(Sector(4096)), Some(Sector(8192)));
    both.own.ok(Command::Verify { volume: VOLUME, start, stop })?;
    both.own.wait("the end", |s| s.conn == Cstate::Connected)?;
    both.kernel.wait_cstate("Connected", LONG)?;
    both.ensure(both.own.status()?.volumes[0].out_of_sync_bits == 2, "the other one")?;
    // Without a Primary there would be no new generation, and nothing would be resynced.
    both.own.ok(Command::Primary { volume: VOLUME, force: false })?;
    both.kernel.guest.ok("drbdadm disconnect r0 && drbdadm connect r0")?;
    both.connected()?;
    both.in_sync()?;
    both.compare()
}

fn resizes(both: &mut Both) -> Result<()> {
    both.fresh(&net_config(Protocol::C), "", "")?;
    both.kernel.guest.ok("drbdadm primary r0")?;
    let sectors = |both: &Both| Ok::<_, anyhow::Error>(both.own.status()?.volumes[0].size.0);
    let full = sectors(both)?;
    let both_have = |both: &Both, size: u64| {
        let start = std::time::Instant::now();
        while sectors(both)? != size {
            both.ensure(start.elapsed() < LONG, &format!("a size of {size}"))?;
            std::thread::sleep(Duration::from_millis(20));
        }
        let script = format!("[ $(cat /sys/block/drbd0/size) = {size} ]");
        both.kernel.guest.wait_for(&script, LONG).map(drop)
    };
    // Not the other way: a smaller device is taken by no user of it.
    both.kernel
        .guest
        .ok("/lib/drbd/drbdsetup-84 resize 0 --size=8192s || drbdsetup-84 resize 0 --size=8192s")?;
    both_have(both, 8192)?;
    both.in_sync()?;
    let before = both.own.log().matches("Began resync").count();
    both.kernel.guest.ok("/lib/drbd/drbdsetup-84 resize 0 --size=12288s --assume-clean || drbdsetup-84 resize 0 --size=12288s --assume-clean")?;
    both_have(both, 12288)?;
    both.in_sync()?;
    let now = both.own.log().matches("Began resync").count();
    both.ensure(now == before, "nothing is resynced")?;
    both.kernel
        .guest
        .ok("/lib/drbd/drbdsetup-84 resize 0 --size=0 || drbdsetup-84 resize 0 --size=0")?;
    both_have(both, full)?;
    both.in_sync()?;
    let script = format!(
        "dd if=/dev/urandom of=/dev/drbd0 bs=4k seek={} count=1 oflag=direct 2>&1",
        full / 8 - 1
    );
    both.kernel.guest.ok(&script)?;
    both.compare()
}

fn behind(both: &mut Both) -> Result<()> {
    let congestion = "on-congestion pull-ahead; congestion-fill 128k; timeout 600;";
    both.fresh(&net_config(Protocol::A), congestion, "")?;
    both.kernel.guest.ok("drbdadm primary r0")?;
    for proxy in [&both.outgoing, &both.incoming] {
        proxy.hold(Direction::FromTarget);
        proxy.hold(Direction::ToTarget);
    }
    let script = "for i in $(seq 0 39); do \
         dd if=/dev/urandom of=/dev/drbd0 bs=64k seek=$i count=1 oflag=direct 2>/dev/null; done";
    let load = both.kernel.guest.spawn(script)?;
    let seen = both.kernel.wait_cstate("Ahead", LONG);
    for proxy in [&both.outgoing, &both.incoming] {
        proxy.release(Direction::FromTarget);
        proxy.release(Direction::ToTarget);
    }
    seen?;
    load.wait(LONG)?;
    both.in_sync()?;
    both.compare()?;
    both.ensure(both.own.log().contains("Connected -> Behind"), "Behind")?;
    both.ensure(both.own.state()?.peer == Role::Primary, "still Primary")
}

/// The second volume waits for the first, by the order of either side.
fn resync_after() -> Result<()> {
    let mut both = Both::boot_with(vec![fresh_image(b'a')?, fresh_image(b'b')?])?;
    let second = VolumeNr(1);
    let resync = ResyncConfig { resync_rate: 2 << 10, c_plan_ahead: 0, ..Default::default() };
    for is_own in [true, false] {
        let net = net_config(Protocol::C);
        both.fresh(&net, "", "resync-rate 2M; c-plan-ahead 0;")?;
        for volume in [VOLUME, second] {
            let resync_after = (is_own && volume == second).then_some(Minor(0));
            let config = Box::new(DiskConfig { resync, resync_after, ..disk_config() });
            both.own.ok(Command::DiskOptions { volume, config })?;
        }
        if !is_own {
            let text = "protocol C; connect-int 2; ping-timeout 30;";
            let options = "resync-rate 2M; c-plan-ahead 0;";
            both.kernel.configure_with(text, options, &["", "resync-after r0/0;"])?;
            both.kernel.guest.ok("drbdadm adjust r0")?;
        }
        both.kernel.guest.ok("drbdadm disk-options --resync-rate=2M --c-plan-ahead=0 r0")?;
        // The second first: it must give way.
        both.kernel.guest.ok("drbdadm invalidate r0/1 && drbdadm invalidate r0/0")?;
        both.own.wait_of(1, "a pause", |s| {
            s.conn == Cstate::PausedSyncS && if is_own { s.aftr_isp } else { s.peer_isp }
        })?;
        both.ensure(both.own.state()?.conn == Cstate::SyncSource, "the first runs")?;
        let flag = if is_own { "-p-" } else { "a--" };
        let script = format!("grep -q '1: cs:PausedSyncT .* r{flag}' /proc/drbd");
        both.kernel.guest.wait_for(&script, LONG)?;
        both.in_sync()?;
        both.compare()?;
        let log = both.own.log();
        both.ensure(log.matches("Resync done").count() >= 2, "two resyncs")?;
    }
    Ok(())
}
