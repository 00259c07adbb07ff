//! Two nodes under Heartbeat 3.0.6 with an iSCSI target on the replicated device: the active one is
//! stopped, then loses its current, and the client notices nothing but a pause.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use drbdrs_tests::heartbeat::{Leaving, Site};
use drbdrs_tests::need::{Need, trial};
use drbdrs_tests::nodes::Programs;
use libtest_mimic::{Arguments, Failed};

/// Pauses are measured by `cargo xtask bench failover`; here the machine may be busy.
const PAUSE_MAX: Duration = Duration::from_secs(60);

fn main() {
    let args = Arguments::from_args();
    let needs = [
        Need::Root,
        Need::File("/usr/libexec/heartbeat/heartbeat"),
        Need::File("/usr/sbin/tgtd"),
        Need::File("/usr/bin/nbdfuse"),
        Need::File("/usr/lib/x86_64-linux-gnu/qemu/block-iscsi.so"),
        Need::File("/usr/sbin/ifconfig"),
        Need::File("/dev/fuse"),
    ];
    let test = trial("the_active_node_is_stopped_and_then_loses_its_current", &needs, || {
        fail_over().map_err(|e| Failed::from(format!("{e:#}")))
    });
    libtest_mimic::run(&args, vec![test]).exit();
}

fn fail_over() -> Result<()> {
    let mut site = Site::new(Programs::build())?;
    let mut client = site.client()?;
    for (active, how) in [(0, Leaving::Clean), (1, Leaving::PowerOff)] {
        let stop = AtomicBool::new(false);
        let pause = std::thread::scope(|scope| {
            let writer = scope.spawn(|| client.write_until(&stop));
            std::thread::sleep(Duration::from_secs(1));
            let left = site.leave(active, how).and_then(|()| site.until_active(1 - active));
            if left.is_ok() {
                std::thread::sleep(Duration::from_secs(2));
            } else {
                // The client waits for a service that does not come.
                site.end_client();
            }
            stop.store(true, Ordering::Relaxed);
            let pause = writer.join().map_err(|_| anyhow::anyhow!("the client panicked"))?;
            left.and(pause)
        });
        let pause = pause.with_context(|| format!("{how:?}: {}", site.logs()))?;
        ensure!(pause < PAUSE_MAX, "{how:?}: the client waited {pause:?}");
        client.verify().with_context(|| site.logs())?;
        if how == Leaving::Clean {
            site.come_back(active)?;
        }
    }
    let survivor = site.node(0)?.run("drbdadm", &["role", "r0"])?.ok()?;
    ensure!(survivor.trim() == "Primary/Unknown", "{survivor}");
    // The one without current comes back as a Secondary that catches up.
    site.come_back(1)?;
    let roles = site.node(1)?.run("drbdadm", &["role", "r0"])?.ok()?;
    ensure!(roles.trim() == "Secondary/Primary", "{roles}");
    client.verify()
}
