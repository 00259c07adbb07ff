//! Volumes as block devices of the kernel's NBD driver, replicated to another daemon.

use anyhow::Result;
use drbdrs_tests::device_pair::DevicePair;
use drbdrs_tests::need::{Need, suite};

fn main() {
    let needs = [Need::Guest, Need::Program("strip")];
    suite(&[
        ("a_file_system_on_an_nbd_device", &needs, file_system),
        ("the_daemon_is_killed_under_an_nbd_device", &needs, killed),
    ]);
}

/// Size of the backing disks.
const BYTES: u64 = 64 << 20;

fn nbd() -> Result<DevicePair> {
    DevicePair::new("[\"nbd-kernel\"]", &["nbd"], BYTES)
}

fn file_system() -> Result<()> {
    nbd()?.carry_a_file_system("true", "true")
}

/// Requests wait for the next daemon, and none fails.
fn killed() -> Result<()> {
    nbd()?.survive(DevicePair::rounds())
}
