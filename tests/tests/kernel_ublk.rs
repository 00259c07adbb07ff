//! Volumes as block devices of the kernel's ublk driver, replicated to another daemon.

use std::time::Instant;

use anyhow::{Result, ensure};
use drbdrs_tests::device_pair::{DevicePair, FIO};
use drbdrs_tests::need::{Need, trial};
use libtest_mimic::{Arguments, Failed};

fn main() {
    let args = Arguments::from_args();
    let test = |name, body: fn() -> Result<()>| {
        trial(name, &[Need::Guest, Need::Program("strip")], move || {
            body().map_err(|error| Failed::from(format!("{error:#}")))
        })
    };
    let tests = vec![
        test("a_file_system_on_a_ublk_device", file_system),
        test("the_daemon_is_killed_under_a_ublk_device", killed),
    ];
    libtest_mimic::run(&args, tests).exit();
}

/// Size of the backing disks.
const BYTES: u64 = 64 << 20;
fn ublk() -> Result<DevicePair> {
    DevicePair::new("[\"ublk\"]", &["ublk_drv"], BYTES)
}

/// What was done when.
struct Clock(Instant);

impl Clock {
    fn say(&self, what: &str) {
        println!("{:.1} s: {what}", self.0.elapsed().as_secs_f32());
    }
}

fn file_system() -> Result<()> {
    let clock = Clock(Instant::now());
    let mut pair = ublk()?;
    clock.say("in sync");
    let run = |script: &str| pair.tell(pair.guest.ok(script));
    run("test -b /dev/drbd0 && test -b /dev/drbd/by-res/r0/0")?;
    run("cd /sys/block/ublkb0/queue && [ \"$(cat write_cache fua)\" = \"write back\n1\" ] && \
         for x in rotational logical_block_size; do cmp $x /sys/block/vda/queue/$x || exit; done")?;
    run(FIO)?;
    clock.say("fio");
    run("mkfs.ext4 -q -b 4096 /dev/drbd0 8192 && mount /dev/drbd0 /mnt && \
         dd if=/dev/urandom of=/mnt/file bs=64k count=40 2>/dev/null && \
         sha256sum < /mnt/file > /mnt/sum && \
         dd if=/dev/urandom of=/mnt/gone bs=64k count=80 2>/dev/null && sync && rm /mnt/gone")?;
    let held = pair.guest.run("/opt/drbdrs/drbdadm secondary r0 2>&1")?;
    ensure!(held.status != 0 && held.out.contains("held open"), "{held:?}");
    let trimmed = run("fstrim -v /mnt")?;
    ensure!(!trimmed.contains(": 0 B"), "{trimmed}");
    run("umount /mnt && /sbin/e2fsck -fp /dev/drbd0")?;
    run("resize2fs /dev/drbd0 12288 2>&1 && /sbin/e2fsck -fn /dev/drbd0 && \
         mount /dev/drbd0 /mnt && sha256sum < /mnt/file | cmp - /mnt/sum && umount /mnt")?;
    clock.say("file system");
    pair.compare()?;
    run("/sbin/blkdiscard -f -o 1048576 -l 8388608 /dev/drbd0 && \
         /sbin/blkdiscard -f -z -o 16777216 -l 4194304 /dev/drbd0")?;
    let zeroes = |at: u32, mib: u32| {
        format!(
            "dd if=/dev/drbd0 bs=1M skip={at} count={mib} 2>/dev/null | \
                 cmp -n {} - /dev/zero",
            mib << 20
        )
    };
    run(&format!("{} && {}", zeroes(1, 8), zeroes(16, 4)))?;
    pair.compare()?;
    clock.say("discards and zeroes");
    pair.tell(pair.adm("secondary r0"))?;
    pair.tell(pair.guest.ok("! ls /dev/drbd0 && ! ls /dev/ublkb0"))?;
    pair.tell(pair.adm("down r0"))?;
    clock.say("down");
    let log = pair.guest.log()?;
    ensure!(!log.contains("I/O error"), "{log}");
    pair.guest.shutdown()
}

/// Requests wait for the next daemon, and none fails.
fn killed() -> Result<()> {
    ublk()?.survive(DevicePair::rounds())
}
