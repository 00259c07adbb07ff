//! The engine and the Linux DRBD 8.4 as one pair: the engine under a plain shell on the host, the
//! kernel in a guest.

use std::time::Duration;

use anyhow::{Result, ensure};
use drbd_core::admin::Command;
use drbd_core::config::{DiskConfig, NetConfig, Protocol, ResyncConfig};
use drbd_core::event::AppOp;
use drbd_types::{Cstate, Dstate, Role, Sector};
use drbdrs_tests::interop::row;
use drbdrs_tests::kernel_pair::{
    Both, LONG, VOLUME, data_len, disk_config, fresh_image, net_config,
};
use drbdrs_tests::thin_node::range;
use libtest_mimic::Arguments;

fn main() {
    let args = Arguments::from_args();
    let tests = vec![
        row(1, "Primary", "initial_sync_from_us_and_writes_in_all_protocols", we_are_primary),
        row(1, "Secondary", "initial_sync_from_the_kernel_and_its_writes", kernel_is_primary),
        row(2, "both", "every_version_that_the_kernel_accepts", versions),
        row(4, "both", "a_lost_link_leads_to_a_resync_of_what_changed", link_loss),
        row(4, "both", "the_kernel_loses_power_under_load", kernel_power_cut),
        row(6, "both", "verify_from_either_side_finds_a_changed_block", verify),
        row(3, "both", "checksums_digests_and_secrets", algorithms),
        row(6, "Primary", "commands_from_either_side", commands),
        row(6, "both", "diskless_on_either_side", diskless),
        row(6, "two Primaries", "two_primaries_write_the_same_place", two_primaries),
    ];
    libtest_mimic::run(&args, tests).exit();
}

fn we_are_primary() -> Result<()> {
    let mut both = Both::boot(fresh_image(b'x')?)?;
    for protocol in [Protocol::C, Protocol::B, Protocol::A] {
        both.restart(fresh_image(b'x')?);
        both.up(protocol)?;
        both.own.ok(Command::Primary { volume: VOLUME, force: true })?;
        both.in_sync()?;
        both.compare()?;
        for n in 0..40_u64 {
            let data = vec![b'a' + u8::try_from(n % 26)?; usize::try_from(512 * (1 + n * 3))?];
            both.own.write(n * 300, data)?;
        }
        let read = both.own.read(300, 4)?;
        ensure!(read == vec![b'b'; 2048]);
        // Discard, zeroes, flush, and 1 MiB at once.
        both.own.request(0, AppOp::Discard { range: range(2048, 512)? })?;
        let zeroes = AppOp::WriteZeroes { range: range(4096, 300)?, may_unmap: false };
        both.own.request(0, zeroes)?;
        both.own.write(6000, vec![b'M'; 1 << 20])?;
        both.own.request(0, AppOp::Flush)?;
        both.own.ok(Command::Secondary(VOLUME))?;
        both.kernel.guest.wait_for("drbdadm role r0 | grep -q Secondary/Secondary", LONG)?;
        both.compare()?;
        both.own.ok(Command::Disconnect { force: false })?;
        both.kernel.guest.wait_for("! grep -q 'cs:Connected' /proc/drbd", LONG)?;
        both.kernel.guest.ok("drbdadm down r0")?;
    }
    Ok(())
}

fn kernel_is_primary() -> Result<()> {
    let mut both = Both::boot(fresh_image(b'y')?)?;
    both.up(Protocol::C)?;
    both.kernel.guest.ok("drbdadm primary --force r0")?;
    both.in_sync()?;
    both.compare()?;
    both.kernel.guest.ok("for i in 1 2 3 4 5 6 7 8; do \
         dd if=/dev/urandom of=/dev/drbd0 bs=64k seek=$i count=3 oflag=direct 2>/dev/null; done; \
         /sbin/blkdiscard -o 4194304 -l 1048576 /dev/drbd0; \
         dd if=/dev/urandom of=/dev/drbd0 bs=4k seek=900 count=100 conv=fsync 2>/dev/null")?;
    ensure!(both.own.state()?.peer == Role::Primary);
    both.compare()?;
    // The other way round.
    both.kernel.guest.ok("drbdadm secondary r0")?;
    both.own.ok(Command::Primary { volume: VOLUME, force: false })?;
    both.own.write(64, vec![b'z'; 65536])?;
    both.own.ok(Command::Secondary(VOLUME))?;
    both.compare()?;
    both.kernel.guest.ok("drbdadm disconnect r0")?;
    both.own.wait("the end of the connection", |s| s.conn == Cstate::WFConnection)?;
    Ok(())
}

/// Both roles, with a resync, in each version.
fn versions() -> Result<()> {
    let mut both = Both::boot(fresh_image(b'v')?)?;
    for version in [86, 87, 88, 89, 90, 91, 94, 95, 96, 97, 99, 100, 101] {
        let net = NetConfig { versions: (86, version), ..net_config(Protocol::C) };
        both.restart(fresh_image(u8::try_from(version)?)?);
        both.up_with(&net, "", "")?;
        let status = both.own.status()?;
        ensure!(status.version == Some(version), "{status:?}");
        both.own.ok(Command::Primary { volume: VOLUME, force: true })?;
        both.in_sync()?;
        both.own.write(100, vec![b'1'; 8192])?;
        both.own.write(800, vec![b'2'; 32768])?;
        both.own.ok(Command::Secondary(VOLUME))?;
        both.kernel.guest.ok("drbdadm primary r0 && \
             dd if=/dev/urandom of=/dev/drbd0 bs=256k seek=9 count=1 oflag=direct 2>/dev/null && \
             drbdadm secondary r0")?;
        both.compare()?;
        both.own.ok(Command::Disconnect { force: false })?;
        both.own.ok(Command::Detach { volume: VOLUME, force: false })?;
        both.kernel.guest.ok("drbdadm down r0")?;
        println!("version {version}");
    }
    Ok(())
}

fn link_loss() -> Result<()> {
    let mut both = Both::boot(fresh_image(b'l')?)?;
    both.up(Protocol::C)?;
    both.own.ok(Command::Primary { volume: VOLUME, force: true })?;
    both.in_sync()?;
    // We are Primary.
    both.cut(true);
    let op = both.own.write_op(0, vec![b'1'; 4096])?;
    let id = both.own.begin(0, op)?;
    both.own.wait("the loss", |s| s.conn < Cstate::Connected)?;
    both.own.finish(id)?;
    both.own.write(8000, vec![b'2'; 8192])?;
    both.cut(false);
    both.in_sync()?;
    both.compare()?;
    let log = both.own.log();
    both.ensure(
        log.contains("Began resync as SyncSource (will sync 12 KB [3 bits set])"),
        "12 KB",
    )?;
    // The kernel is.
    both.own.ok(Command::Secondary(VOLUME))?;
    both.kernel.guest.ok("drbdadm primary r0")?;
    both.cut(true);
    both.kernel.guest.wait_for("! grep -q 'cs:Connected' /proc/drbd", LONG)?;
    both.kernel.guest.ok("dd if=/dev/urandom of=/dev/drbd0 bs=4k seek=77 count=5 oflag=direct")?;
    both.cut(false);
    both.in_sync()?;
    both.compare()?;
    let log = both.own.log();
    both.ensure(log.contains("Began resync as SyncTarget (will sync 20 KB [5 bits set])"), "20 KB")
}

fn kernel_power_cut() -> Result<()> {
    let mut both = Both::boot(fresh_image(b'p')?)?;
    both.up(Protocol::C)?;
    // As Secondary.
    both.own.ok(Command::Primary { volume: VOLUME, force: true })?;
    both.in_sync()?;
    both.kernel.guest.power_cut()?;
    for n in 0..10 {
        both.own.write(n * 16, vec![b'a'; 8192])?;
    }
    both.kernel.guest.start()?;
    both.kernel.configure("protocol C; connect-int 2; ping-timeout 30;", "")?;
    both.kernel.guest.ok("drbdadm up r0")?;
    both.in_sync()?;
    both.compare()?;
    // As Primary, under load; we take over.
    both.own.ok(Command::Secondary(VOLUME))?;
    both.kernel.guest.ok("drbdadm primary r0")?;
    let load = both.kernel.guest.spawn(
        "while :; do dd if=/dev/urandom of=/dev/drbd0 bs=16k seek=$((RANDOM % 400)) count=4 oflag=direct; done",
    )?;
    std::thread::sleep(Duration::from_secs(2));
    both.kernel.guest.power_cut()?;
    drop(load);
    both.own.wait("the loss", |s| s.conn < Cstate::Connected)?;
    both.own.ok(Command::Primary { volume: VOLUME, force: false })?;
    both.own.write(5000, vec![b'q'; 4096])?;
    both.kernel.guest.start()?;
    both.kernel.configure("protocol C; connect-int 2; ping-timeout 30;", "")?;
    both.kernel.guest.ok("drbdadm up r0")?;
    both.in_sync()?;
    both.compare()
}

fn verify() -> Result<()> {
    let mut both = Both::boot(fresh_image(b'w')?)?;
    let net = NetConfig { verify_alg: "sha1".into(), ..net_config(Protocol::C) };
    both.up_with(&net, "verify-alg sha1;", "")?;
    both.own.ok(Command::Primary { volume: VOLUME, force: true })?;
    both.in_sync()?;
    both.own.ok(Command::Verify { volume: VOLUME, start: Some(Sector(0)), stop: None })?;
    both.own.wait("the end of a verify", |s| s.conn == Cstate::Connected)?;
    both.ensure(both.own.status()?.volumes[0].out_of_sync_bits == 0, "nothing is found")?;
    both.kernel.wait_cstate("Connected", LONG)?;
    // Behind DRBD's back.
    let mut image = both.own.image(0)?;
    image[800 * 512] ^= 1;
    both.own.set_image(0, image)?;
    both.own.ok(Command::Verify { volume: VOLUME, start: Some(Sector(0)), stop: None })?;
    both.own.wait("the end of a verify", |s| s.conn == Cstate::Connected)?;
    both.ensure(both.own.status()?.volumes[0].out_of_sync_bits == 1, "one block")?;
    both.ensure(both.own.log().contains("Out of sync: start=800, size=8 (sectors)"), "line")?;
    both.kernel.wait_cstate("Connected", LONG)?;
    // From the other side.
    both.kernel.guest.ok("drbdadm verify r0")?;
    both.kernel.wait_cstate("Connected", LONG)?;
    let log = both.kernel.guest.take_log()?;
    both.ensure(
        log.contains("Online verify found 1 4k block out of sync!"),
        "the kernel's verify",
    )?;
    both.own.ok(Command::Disconnect { force: false })?;
    both.own.ok(Command::Connect(Box::new(net)))?;
    both.in_sync()?;
    both.compare()
}

fn algorithms() -> Result<()> {
    let mut both = Both::boot(fresh_image(b'd')?)?;
    for algorithm in ["md5", "sha1", "sha256", "sha512", "crc32c"] {
        let has_secret = algorithm != "crc32c";
        let net = NetConfig {
            integrity_alg: algorithm.into(),
            csums_alg: algorithm.into(),
            cram_hmac_alg: if has_secret { algorithm.into() } else { String::new() },
            shared_secret: drbd_core::config::Secret("a secret".into()),
            ..net_config(Protocol::C)
        };
        let secret = if has_secret {
            format!("cram-hmac-alg {algorithm}; shared-secret \"a secret\";")
        } else {
            String::new()
        };
        let text = format!("data-integrity-alg {algorithm}; csums-alg {algorithm}; {secret}");
        both.restart(fresh_image(b'd')?);
        both.up_with(&net, &text, "")?;
        both.own.ok(Command::Primary { volume: VOLUME, force: true })?;
        both.in_sync()?;
        both.own.write(40, vec![b'i'; 40960])?;
        let zeroes = AppOp::WriteZeroes { range: range(400, 64)?, may_unmap: false };
        both.own.request(0, zeroes)?;
        both.own.ok(Command::Secondary(VOLUME))?;
        both.kernel.guest.ok("drbdadm primary r0")?;
        both.kernel
            .guest
            .ok("dd if=/dev/urandom of=/dev/drbd0 bs=64k seek=4 count=2 oflag=direct")?;
        // Checksums: mostly equal blocks.
        both.kernel.guest.ok("drbdadm invalidate-remote r0")?;
        both.in_sync()?;
        both.compare()?;
        both.kernel.guest.ok("drbdadm secondary r0")?;
        both.own.ok(Command::Invalidate(VOLUME))?;
        both.in_sync()?;
        both.ensure(both.own.log().contains("had equal checksums"), "checksums were used")?;
        both.own.ok(Command::Disconnect { force: false })?;
        both.own.ok(Command::Detach { volume: VOLUME, force: false })?;
        both.kernel.guest.ok("drbdadm down r0")?;
        println!("{algorithm}");
    }
    // A wrong secret.
    both.restart(fresh_image(b'd')?);
    both.kernel.configure("cram-hmac-alg sha1; shared-secret right;", "")?;
    both.kernel.create()?;
    both.attach()?;
    let net = NetConfig {
        cram_hmac_alg: "sha1".into(),
        shared_secret: drbd_core::config::Secret("wrong".into()),
        ..net_config(Protocol::C)
    };
    both.own.ok(Command::Connect(Box::new(net)))?;
    both.own.wait("the refusal", |s| s.conn == Cstate::StandAlone)?;
    both.kernel.wait_cstate("StandAlone", LONG).map(drop)
}

fn commands() -> Result<()> {
    let mut both = Both::boot(fresh_image(b'c')?)?;
    both.up_with(&net_config(Protocol::C), "", "c-max-rate 4M; resync-rate 2M;")?;
    both.own.ok(Command::Primary { volume: VOLUME, force: true })?;
    both.in_sync()?;
    // Slow enough to be paused.
    let slow = ResyncConfig { resync_rate: 1 << 10, c_plan_ahead: 0, ..Default::default() };
    let config = Box::new(DiskConfig { resync: slow, ..disk_config() });
    both.own.ok(Command::DiskOptions { volume: VOLUME, config })?;
    // Pause and resume, from either side.
    both.kernel.guest.ok("drbdadm invalidate r0")?;
    both.own.ok(Command::PauseSync(VOLUME))?;
    both.kernel.guest.wait_for("grep -q PausedSync /proc/drbd", LONG)?;
    both.own.ok(Command::ResumeSync(VOLUME))?;
    both.kernel.guest.ok("drbdadm pause-sync r0")?;
    both.own.wait("the pause", |s| s.peer_isp)?;
    both.kernel.guest.ok("drbdadm resume-sync r0")?;
    both.in_sync()?;
    both.own.ok(Command::InvalidateRemote(VOLUME))?;
    both.in_sync()?;
    both.compare()?;
    // An interrupted resync goes on.
    both.own.ok(Command::InvalidateRemote(VOLUME))?;
    std::thread::sleep(Duration::from_millis(300));
    both.cut(true);
    both.own.wait("the loss", |s| s.conn < Cstate::Connected)?;
    both.cut(false);
    both.in_sync()?;
    both.compare()?;
    // The peer's data is needed.
    let refused = both.kernel.guest.run("drbdadm primary r0")?;
    both.ensure(refused.status != 0, "two Primaries are refused")?;
    both.own.ok(Command::SuspendIo(VOLUME))?;
    let op = both.own.write_op(10, vec![b's'; 512])?;
    let id = both.own.begin(0, op)?;
    both.own.ok(Command::ResumeIo(VOLUME))?;
    both.own.finish(id)?;
    both.compare()
}

fn diskless() -> Result<()> {
    let mut both = Both::boot(fresh_image(b'n')?)?;
    both.up(Protocol::C)?;
    both.own.ok(Command::Primary { volume: VOLUME, force: true })?;
    both.in_sync()?;
    both.own.write(0, vec![b'1'; 4096])?;
    both.own.ok(Command::Detach { volume: VOLUME, force: false })?;
    ensure!(both.own.state()?.disk == Dstate::Diskless);
    ensure!(both.own.read(0, 8)? == vec![b'1'; 4096]);
    both.own.write(8, vec![b'2'; 4096])?;
    ensure!(both.own.read(8, 8)? == vec![b'2'; 4096]);
    both.attach_again()?;
    both.in_sync()?;
    both.compare()?;
    // The kernel without disk, and Primary.
    both.own.ok(Command::Secondary(VOLUME))?;
    both.kernel.guest.ok("drbdadm primary r0 && drbdadm detach r0")?;
    both.own.wait("a diskless peer", |s| s.pdsk == Dstate::Diskless)?;
    both.kernel
        .guest
        .ok("dd if=/dev/urandom of=/dev/drbd0 bs=4k seek=50 count=20 oflag=direct && \
         dd if=/dev/drbd0 of=/tmp/read bs=4k count=200 iflag=direct")?;
    let read = both.kernel.guest.get("/tmp/read")?;
    let image = both.own.image(0)?;
    both.ensure(read == image[..read.len()], "read through the engine")?;
    both.kernel.guest.ok("drbdadm attach r0")?;
    both.in_sync()?;
    both.compare()?;
    ensure!(data_len()? > 0);
    Ok(())
}

fn two_primaries() -> Result<()> {
    let mut both = Both::boot(fresh_image(b't')?)?;
    let net = NetConfig { two_primaries: true, ..net_config(Protocol::C) };
    both.up_with(&net, "allow-two-primaries yes;", "")?;
    both.own.ok(Command::Primary { volume: VOLUME, force: true })?;
    both.in_sync()?;
    both.kernel.guest.ok("drbdadm primary r0")?;
    both.own.wait("two Primaries", |s| s.peer == Role::Primary)?;
    let load = both.kernel.guest.spawn(
        "for i in $(seq 60); do dd if=/dev/urandom of=/dev/drbd0 bs=4k seek=$((RANDOM % 8)) count=2 oflag=direct; done",
    )?;
    for n in 0..300_u64 {
        both.own.write(n * 5 % 64, vec![u8::try_from(n % 250)?; 2048])?;
    }
    load.wait(LONG)?;
    std::thread::sleep(Duration::from_secs(1));
    let state = both.own.state()?;
    both.ensure(state.conn == Cstate::Connected, "still connected")?;
    both.compare()
}
