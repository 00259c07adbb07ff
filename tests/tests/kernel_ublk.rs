//! Volumes as block devices of the kernel's ublk driver, replicated to another daemon.

use anyhow::Result;
use drbdrs_tests::device_pair::DevicePair;
use drbdrs_tests::need::{Need, suite};

fn main() {
    let needs = [Need::Guest, Need::Program("strip")];
    suite(&[
        ("a_file_system_on_a_ublk_device", &needs, file_system),
        ("the_daemon_is_killed_under_a_ublk_device", &needs, killed),
    ]);
}

/// Size of the backing disks.
const BYTES: u64 = 64 << 20;

fn ublk() -> Result<DevicePair> {
    DevicePair::new("[\"ublk\"]", &["ublk_drv"], BYTES)
}

fn file_system() -> Result<()> {
    let own = "cd /sys/block/ublkb0/queue && [ \"$(cat write_cache fua)\" = \"write back\n1\" ] && \
               for x in rotational logical_block_size; do cmp $x /sys/block/vda/queue/$x || exit; done";
    ublk()?.carry_a_file_system(own, "! ls /dev/ublkb0")
}

/// Requests wait for the next daemon, and none fails.
fn killed() -> Result<()> {
    ublk()?.survive(DevicePair::rounds())
}
