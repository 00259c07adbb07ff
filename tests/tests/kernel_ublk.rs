//! Volumes as block devices of the kernel's ublk driver, replicated to another daemon.

use std::time::Instant;

use anyhow::Result;
use drbdrs_tests::device_pair::DevicePair;
use drbdrs_tests::need::{Need, trial};
use libtest_mimic::{Arguments, Failed};

fn main() {
    let args = Arguments::from_args();
    let test = |name, body: fn() -> Result<()>| {
        trial(name, &[Need::Guest, Need::Program("strip")], move || {
            body().map_err(|error| Failed::from(format!("{error:#}")))
        })
    };
    let tests = vec![test("a_file_system_on_a_ublk_device", file_system)];
    libtest_mimic::run(&args, tests).exit();
}

fn file_system() -> Result<()> {
    let start = Instant::now();
    let say = |what: &str| println!("{:.1} s: {what}", start.elapsed().as_secs_f32());
    let pair = DevicePair::new("[\"ublk\"]", &["ublk_drv"], 64 << 20)?;
    say("in sync");
    pair.tell(pair.guest.ok("ls -l /dev/drbd0 /dev/drbd/by-res/r0/0 /dev/ublk*"))?;
    pair.tell(pair.guest.ok("dd if=/dev/urandom of=/dev/drbd0 bs=64k count=16 oflag=direct 2>&1"))?;
    say("dd");
    pair.tell(pair.guest.ok("mkfs.ext4 -q /dev/drbd0 && mount /dev/drbd0 /mnt && \
         dd if=/dev/urandom of=/mnt/file bs=64k count=40 2>/dev/null && \
         sha256sum < /mnt/file > /mnt/sum && umount /mnt && /sbin/e2fsck -fn /dev/drbd0"))?;
    say("file system");
    pair.compare()?;
    say("equal");
    pair.tell(pair.adm("secondary r0"))?;
    pair.tell(pair.guest.ok("! ls /dev/drbd0"))?;
    pair.tell(pair.adm("down r0"))?;
    say("down");
    Ok(())
}
