//! The kernel's DRBD and drbdrs with ublk as Primary, in turn, in one guest, on the same disk and
//! with the same peer. Processors are emulated: only ratios mean anything. Build it optimised:
//! `cargo run --release -p drbdrs-tests --bin device-bench [ROUNDS]`.

use std::time::Duration;

use anyhow::{Context as _, Result};
use drbdrs_tests::device_pair::DevicePair;
use drbdrs_tests::kernel_pair::LONG;
use serde_json::Value;

/// Name, and what fio is told.
const LOADS: [(&str, &str); 4] = [
    ("4 KiB random writes, depth 1", "--rw=randwrite --bs=4k --iodepth=1"),
    ("4 KiB random writes, depth 32", "--rw=randwrite --bs=4k --iodepth=32"),
    ("4 KiB random reads, depth 32", "--rw=randread --bs=4k --iodepth=32"),
    ("256 KiB sequential writes, depth 4", "--rw=write --bs=256k --iodepth=4"),
];
const SECONDS: u64 = 6;

fn main() -> Result<()> {
    let rounds = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(2);
    let mut pair = DevicePair::new("[\"ublk\"]", &["ublk_drv", "drbd"], 128 << 20)?;
    let mut sums = [[0.0; 2]; LOADS.len()];
    for round in 1..=rounds {
        let own = measure(&pair)?;
        pair.adm("secondary r0")?;
        pair.adm("down r0")?;
        pair.end_daemon("TERM")?;
        pair.guest.ok("drbdadm up r0")?;
        let seen = "grep -q 'cs:Connected .* ds:UpToDate/UpToDate' /proc/drbd";
        pair.guest.wait_for(seen, LONG)?;
        pair.guest.ok("drbdadm primary r0")?;
        let kernel = measure(&pair)?;
        pair.guest.ok("drbdadm secondary r0 && drbdadm down r0")?;
        for (sum, (own, kernel)) in sums.iter_mut().zip(own.into_iter().zip(kernel)) {
            sum[0] += own;
            sum[1] += kernel;
        }
        for ((name, _), [own, kernel]) in LOADS.iter().zip(&sums) {
            let n = f64::from(round);
            let (own, kernel) = (own / n, kernel / n);
            println!("{name}: drbdrs {own:.0}/s, kernel {kernel:.0}/s, ratio {:.2}", own / kernel);
        }
        if round < rounds {
            pair.start_daemon()?;
            pair.adm("adjust r0")?;
            pair.in_sync()?;
            pair.adm("primary r0")?;
        }
    }
    pair.guest.shutdown()
}

/// Requests per second for each load.
fn measure(pair: &DevicePair) -> Result<Vec<f64>> {
    let run = |words: &str| {
        let script = format!(
            "fio --name=b --filename=/dev/drbd0 --direct=1 --ioengine=libaio --size=96m {words} \
             --time_based --runtime={SECONDS} --output-format=json --output=/tmp/fio && cat /tmp/fio"
        );
        let output = pair.guest.run_for(&script, LONG + Duration::from_secs(SECONDS))?;
        let json: Value = serde_json::from_str(&output.out).with_context(|| output.out.clone())?;
        let job = json.pointer("/jobs/0").context("no job")?;
        let of = |way: &str| job.pointer(&format!("/{way}/iops")).and_then(Value::as_f64);
        Ok(of("read").unwrap_or(0.0) + of("write").unwrap_or(0.0))
    };
    LOADS.iter().map(|(_, words)| run(words)).collect()
}
