//! A node of a running pair of kernels is replaced by our programs on the same machine, and comes
//! back: what an administrator does who wants to try them.

use anyhow::{Context as _, Result, ensure};
use drbdrs_tests::device_pair::{self, OURS, TWO_NODES};
use drbdrs_tests::guest::{Config, Disk, Guest, Pair};
use drbdrs_tests::interop::row;
use drbdrs_tests::kernel_pair::LONG;
use libtest_mimic::Arguments;

fn main() {
    let args = Arguments::from_args();
    let tests =
        vec![row(7, "both", "a_node_of_a_kernel_pair_is_replaced_and_comes_back", replaced)];
    libtest_mimic::run(&args, tests).exit();
}

/// Two kernels as a pair. One of them is replaced by our programs, on the same machine, with the
/// same disk and the same configuration file, while the other goes on writing; and back.
fn replaced() -> Result<()> {
    let wire = Pair::new()?;
    let config =
        |name, link: &_| Config::new(name).disk(Disk::Size(32 << 20)).link(Clone::clone(link));
    let [one, other] = [config("one", &wire.one), config("other", &wire.other)]
        .map(|config| std::thread::spawn(move || Guest::boot(config)))
        .map(|boot| boot.join().map_err(|_| anyhow::anyhow!("a boot panicked")));
    let (one, other) = (one??, other??);
    for guest in [&one, &other] {
        guest.put("/etc/drbd.conf", TWO_NODES.as_bytes())?;
        guest.ok("drbdadm create-md --force r0 2>&1 && drbdadm up r0")?;
    }
    one.wait_for("[ $(drbdadm cstate r0) = Connected ]", LONG)?;
    one.ok("drbdadm primary --force r0")?;
    both_well(&one)?;
    install(&other)?;
    let outcome = exchange(&one, &other);
    outcome.with_context(|| {
        let log = other.run("cat /tmp/drbdrs.log; cat /run/drbd/proc-drbd").map(|o| o.out);
        let kernel = one.take_log().unwrap_or_default();
        format!("ours:\n{}\nkernel:\n{kernel}", log.unwrap_or_default())
    })
}

fn install(guest: &Guest) -> Result<()> {
    device_pair::install(guest)?;
    device_pair::install_program(guest, "drbdrs-workload", "workload")
}

fn both_well(kernel: &Guest) -> Result<()> {
    kernel.wait_for("grep -q 'cs:Connected .* ds:UpToDate/UpToDate' /proc/drbd", LONG).map(drop)
}

/// The data areas of both backing devices.
fn equal(one: &Guest, other: &Guest) -> Result<()> {
    let sum = |guest: &Guest| {
        guest.ok("sync; echo 3 > /proc/sys/vm/drop_caches; head -c 31M /dev/vda | sha256sum")
    };
    ensure!(sum(one)? == sum(other)?, "contents differ");
    Ok(())
}

fn exchange(one: &Guest, other: &Guest) -> Result<()> {
    one.take_log()?;
    let job = one.spawn(
        "for i in $(seq 1 150); do dd if=/dev/urandom of=/dev/drbd0 bs=16k seek=$((i * 5)) \
         count=3 oflag=direct 2>/dev/null || exit 1; done",
    )?;
    other.ok("drbdadm down r0")?;
    start_ours(other)?;
    ensure!(job.wait(LONG)?.status == 0, "writes of the Primary failed");
    both_well(one)?;
    equal(one, other)?;
    let log = one.take_log()?;
    ensure!(!log.contains("full sync") && log.contains("Began resync as SyncSource"), "{log}");
    // The other way round. The workload begins with zeroes.
    // It ends with "no space left".
    one.run("dd if=/dev/zero of=/dev/drbd0 bs=1M conv=fsync")?;
    one.ok("drbdadm secondary r0")?;
    we_are_primary(one, other)?;
    // And back.
    other.ok(&format!(
        "{OURS}/drbdadm secondary r0 && {OURS}/drbdadm down r0 && kill $(pidof drbdrs) && \
         while pidof drbdrs; do sleep 0.1; done"
    ))?;
    one.take_log()?;
    other.ok("drbdadm up r0")?;
    both_well(one)?;
    let log = one.take_log()?;
    ensure!(!log.contains("Began resync"), "nothing had changed: {log}");
    other.ok(
        "drbdadm primary r0 && dd if=/dev/urandom of=/dev/drbd0 bs=64k count=9 oflag=direct 2>&1",
    )?;
    equal(one, other)
}

/// The daemon in the background, and the resource brought up by our drbdadm.
fn start_ours(guest: &Guest) -> Result<()> {
    guest
        .ok(&format!(
            "rm -f /run/drbd/drbdrs.sock; \
             ( setsid {OURS}/drbdrs < /dev/null > /dev/null 2>> /tmp/drbdrs.log & ); \
             for i in $(seq 100); do [ -S /run/drbd/drbdrs.sock ] && break; sleep 0.1; done; \
             {OURS}/drbdadm adjust r0"
        ))
        .map(drop)
}

/// Our node is Primary under load, dies, comes back, and has all that it promised.
fn we_are_primary(one: &Guest, other: &Guest) -> Result<()> {
    let workload = |what: &str| {
        format!("{OURS}/workload {what} --socket /run/drbd/nbd.sock --journal /tmp/journal")
    };
    let write = workload("write --no-sync --seconds 6");
    let verify = workload("verify");
    other.ok(&format!("{OURS}/drbdadm primary r0"))?;
    let job = other.spawn(&write)?;
    std::thread::sleep(std::time::Duration::from_secs(3));
    other.ok("kill -9 $(pidof drbdrs)")?;
    println!("{}", job.wait(LONG)?.out);
    start_ours(other)?;
    both_well(one)?;
    other.ok(&format!("{OURS}/drbdadm primary r0"))?;
    println!("{}", other.ok(&verify)?);
    equal(one, other)
}
