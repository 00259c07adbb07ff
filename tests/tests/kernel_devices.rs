//! What holds for block devices of this kernel, whichever driver they go through: with a kernel's DRBD
//! as the other node, when the node fails, when its peer has taken over, and when memory is short.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use drbdrs_tests::device_pair::{DevicePair, OURS, TWO_NODES, install};
use drbdrs_tests::guest::{Config, Disk, Guest, Pair};
use drbdrs_tests::kernel_pair::LONG;
use drbdrs_tests::need::{Need, trial};
use libtest_mimic::{Arguments, Failed};

/// A driver: the name in the settings, and the kernel's module.
#[derive(Clone, Copy)]
struct Driver(&'static str, &'static str);

const DRIVERS: [Driver; 1] = [Driver("nbd-kernel", "nbd")];
/// What is tried with each.
type Case = fn(Driver) -> Result<()>;
/// Size of the backing disks.
const BYTES: u64 = 64 << 20;

fn main() {
    let args = Arguments::from_args();
    let cases: [(&str, Case); 4] = [
        ("a_kernel_takes_over_a_file_system_and_gives_it_back", kernel_peer),
        ("a_node_with_a_mounted_file_system_fails", node_failure),
        ("a_node_whose_peer_took_over_does_not_go_on", taken_over),
        ("memory_is_short", short_of_memory),
    ];
    let needs = [Need::Guest, Need::Program("strip"), Need::Program("e2fsck")];
    let tests = DRIVERS.iter().flat_map(|driver| {
        cases.map(|(name, body)| {
            let name = format!("{name}_{}", driver.0.replace('-', "_"));
            trial(&name, &needs, move || {
                body(*driver).map_err(|error| Failed::from(format!("{error:#}")))
            })
        })
    });
    let tests = tests.collect();
    libtest_mimic::run(&args, tests).exit();
}

impl Driver {
    fn pair(self) -> Result<DevicePair> {
        DevicePair::new(&format!("[{:?}]", self.0), &[self.1], BYTES)
    }
}

/// A file with random content, and its checksum.
fn write_file(name: &str) -> String {
    format!(
        "dd if=/dev/urandom of=/mnt/{name} bs=64k count=30 2>/dev/null && \
         sha256sum < /mnt/{name} > /mnt/{name}.sum && sync"
    )
}

fn check_file(name: &str) -> String {
    format!("sha256sum < /mnt/{name} | cmp - /mnt/{name}.sum")
}

fn kernel_peer(driver: Driver) -> Result<()> {
    let wire = Pair::new()?;
    let config =
        |name, link: &_| Config::new(name).disk(Disk::Size(BYTES)).link(Clone::clone(link));
    let kernel = Guest::boot(config("one", &wire.one))?;
    let ours = Guest::boot(config("other", &wire.other).modules(&[driver.1]))?;
    install(&ours)?;
    let settings = format!("[node]\nfront-ends = [{:?}]\n", driver.0);
    ours.put("/etc/drbd.d/drbdrs.toml", settings.as_bytes())?;
    for guest in [&kernel, &ours] {
        guest.put("/etc/drbd.conf", TWO_NODES.as_bytes())?;
    }
    kernel.ok("drbdadm create-md --force r0 2>&1 && drbdadm up r0")?;
    ours.ok(&format!(
        "( setsid {OURS}/drbdrs < /dev/null > /dev/null 2>> /tmp/log & ); \
         for i in $(seq 300); do [ -S /run/drbd/drbdrs.sock ] && break; sleep 0.1; done; \
         {OURS}/drbdadm create-md --force r0 2>&1 && {OURS}/drbdadm up r0"
    ))?;
    let told = change_sides(&kernel, &ours).with_context(|| {
        let log = ours.run("cat /tmp/log /run/drbd/proc-drbd; dmesg | tail -n 20");
        format!("ours:\n{}\nkernel:\n{}", log.map(|o| o.out).unwrap_or_default(), {
            kernel.log().unwrap_or_default()
        })
    });
    told?;
    let [one, other] = [&kernel, &ours].map(|guest| guest.disk_image(0).map(std::fs::read));
    let data = usize::try_from(BYTES - (1 << 20))?;
    let (one, other) = (one.context("a disk")??, other.context("a disk")??);
    ensure!(one[..data] == other[..data], "contents differ");
    Ok(())
}

fn change_sides(kernel: &Guest, ours: &Guest) -> Result<()> {
    let adm = |words: &str| format!("{OURS}/drbdadm {words}");
    kernel.wait_for("[ $(drbdadm cstate r0) = Connected ]", LONG)?;
    ours.ok(&adm("new-current-uuid --clear-bitmap r0/0"))?;
    ours.ok(&format!(
        "{} && test -b /dev/drbd0 && mkfs.ext4 -q /dev/drbd0 && mount /dev/drbd0 /mnt && {} && \
         umount /mnt && {}",
        adm("primary r0"),
        write_file("a"),
        adm("secondary r0")
    ))?;
    kernel.ok(&format!(
        "drbdadm primary r0 && e2fsck -fn /dev/drbd0 && mount /dev/drbd0 /mnt && {} && {} && \
         rm /mnt/a && umount /mnt && drbdadm secondary r0",
        check_file("a"),
        write_file("b")
    ))?;
    ours.ok(&format!(
        "{} && /sbin/e2fsck -fn /dev/drbd0 && mount /dev/drbd0 /mnt && {} && fstrim /mnt && \
         umount /mnt && {} && sync",
        adm("primary r0"),
        check_file("b"),
        adm("secondary r0")
    ))?;
    kernel.wait_for("grep -q 'cs:Connected .* ds:UpToDate/UpToDate' /proc/drbd", LONG)?;
    kernel.ok("sync").map(drop)
}

/// The machine dies under a mounted file system; the other node has all that was synced.
fn node_failure(driver: Driver) -> Result<()> {
    let mut pair = driver.pair()?;
    let rounds = std::env::var("DRBDRS_FAILURES").ok().and_then(|n| n.parse().ok()).unwrap_or(2);
    pair.tell(pair.guest.ok("mkfs.ext4 -q /dev/drbd0"))?;
    for round in 0..rounds {
        // Each line of the list is of a file that was synced before.
        pair.tell(pair.guest.ok("mount /dev/drbd0 /mnt && : > /mnt/list && sync"))?;
        let mut job = pair.guest.spawn(
            "for i in $(seq 1 400); do f=/mnt/f$((i % 40)); \
             dd if=/dev/urandom of=$f.new bs=16k count=$((i % 7 + 1)) conv=fsync 2>/dev/null && \
             mv $f.new $f && sync && echo \"$(sha256sum < $f | cut -c 1-64) ${f#/mnt/}\"; done",
        )?;
        let mut said = String::new();
        while synced(&said).len() < 8 + round % 40 {
            std::thread::sleep(Duration::from_millis(100));
            said += &pair.tell(job.take())?;
        }
        let listed = synced(&said);
        pair.guest.power_cut()?;
        look_at_peer(&pair, &listed)?;
        pair.boot_again()?;
        pair.tell(pair.in_sync())?;
        pair.tell(pair.peer.adm(&["secondary", "r0"])?.ok())?;
        pair.tell(pair.adm("primary r0"))?;
        println!("round {round}: {} files", listed.len());
    }
    pair.tell(pair.guest.ok("/sbin/e2fsck -fp /dev/drbd0; [ $? -le 1 ]"))?;
    pair.compare()
}

/// Checksum and name of files whose `sync` has returned, as the guest has said.
fn synced(said: &str) -> Vec<(String, String)> {
    let complete = said.rsplit_once('\n').map_or("", |(complete, _)| complete);
    let lines = complete.lines().filter_map(|line| line.split_once(' '));
    lines.map(|(sum, name)| (sum.to_owned(), name.to_owned())).collect()
}

/// The peer takes over: its file system is sound, and the files that were synced last have their
/// content. Older ones may have been written anew.
fn look_at_peer(pair: &DevicePair, listed: &[(String, String)]) -> Result<()> {
    pair.tell(pair.peer.until("cs:WFConnection"))?;
    pair.tell(pair.peer.adm(&["primary", "r0"])?.ok())?;
    let folder = tempfile::TempDir::new()?;
    let copy = folder.path().join("copy");
    run(Command::new("qemu-img").args(["convert", "-O", "raw", &pair.peer.uri(0)]).arg(&copy))?;
    // The journal is replayed, as by a mount; nothing else may be wrong.
    let mut replay = Command::new("e2fsck");
    let replayed = replay.arg("-fp").arg(&copy).output()?;
    ensure!(replayed.status.code().is_some_and(|code| code <= 1), "{replayed:?}");
    run(Command::new("e2fsck").arg("-fn").arg(&copy))?;
    let script = format!("rdump / {}", folder.path().display());
    run(Command::new("debugfs").args(["-R", &script]).arg(&copy))?;
    let last = listed.len().saturating_sub(30);
    for (sum, name) in &listed[last..] {
        let found = Command::new("sha256sum").arg(folder.path().join(name)).output()?;
        let found = String::from_utf8_lossy(&found.stdout).into_owned();
        ensure!(found.starts_with(sum.as_str()), "{name}: {found}, and {sum} was synced");
    }
    Ok(())
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {output:?}");
    Ok(())
}

/// While the daemon is gone the peer becomes Primary and writes. The file system that is mounted here
/// gets errors, not the peer's blocks.
fn taken_over(driver: Driver) -> Result<()> {
    let mut pair = driver.pair()?;
    let script =
        "mkfs.ext4 -q /dev/drbd0 && mount /dev/drbd0 /mnt && echo before > /mnt/file && sync";
    pair.tell(pair.guest.ok(script))?;
    pair.end_daemon("KILL")?;
    pair.tell(pair.peer.until("cs:WFConnection"))?;
    pair.tell(pair.peer.adm(&["primary", "r0"])?.ok())?;
    let uri = pair.peer.uri(0);
    run(Command::new("qemu-io").args(["-f", "raw", "-c", "write -P 7 46M 64k", &uri]))?;
    pair.tell(pair.start_daemon())?;
    pair.tell(pair.peer.until("ro:Primary/Secondary ds:UpToDate/UpToDate"))?;
    // The device is gone, and whoever writes to it is told so.
    pair.tell(pair.guest.wait_for("! [ -e /dev/drbd0 ]", LONG))?;
    let write = "if dd if=/dev/zero of=/mnt/other bs=4k count=1 conv=fsync; then exit 1; fi; \
                 dmesg | grep -q 'I/O error'";
    pair.tell(pair.guest.ok(write))?;
    pair.tell(pair.guest.ok("umount /mnt; ! grep -q ' /mnt ' /proc/mounts"))?;
    // It has what the peer has written, and works again after an ordinary promotion.
    pair.compare_len(60 << 20)?;
    pair.tell(pair.peer.adm(&["secondary", "r0"])?.ok())?;
    let again = "/sbin/e2fsck -fp /dev/drbd0; [ $? -le 1 ] && mount /dev/drbd0 /mnt && \
                 grep -q before /mnt/file && ! [ -e /mnt/other ] && umount /mnt";
    pair.tell(pair.adm("primary r0").and_then(|_| pair.guest.ok(again)))?;
    pair.tell(pair.adm("secondary r0"))?;
    pair.guest.shutdown()
}

/// The daemon and whoever fills its device have hardly any memory together.
fn short_of_memory(driver: Driver) -> Result<()> {
    let mut pair = driver.pair()?;
    pair.tell(pair.guest.ok("mkfs.ext4 -q /dev/drbd0 && mount /dev/drbd0 /mnt && \
         mkdir -p /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && \
         echo '+memory +io' > /sys/fs/cgroup/cgroup.subtree_control && mkdir /sys/fs/cgroup/small && \
         echo 24M > /sys/fs/cgroup/small/memory.max && \
         echo $(pidof drbdrs) > /sys/fs/cgroup/small/cgroup.procs"))?;
    // Never so much at once that the limit is full of what is not written yet: whoever writes that
    // would be killed, with any disk.
    let fill = "echo $$ > /sys/fs/cgroup/small/cgroup.procs && for i in $(seq 8); do \
                dd if=/dev/urandom of=/mnt/big$i bs=1M count=5 conv=fsync 2>/dev/null || exit 1; \
                done && cat /sys/fs/cgroup/small/memory.events";
    let job = pair.guest.spawn(fill)?.wait(LONG)?;
    println!("{}", job.out);
    let events = pair.tell((job.status == 0).then_some(job.out).context("it was not filled"))?;
    // The limit was reached, and nobody was killed.
    ensure!(!events.contains("\nmax 0\n") && events.contains("\noom_kill 0\n"), "{events}");
    pair.tell(pair.guest.ok(
        "umount /mnt && /sbin/e2fsck -fn /dev/drbd0 && ! dmesg | grep -e 'I/O error' -e 'blocked for'",
    ))?;
    pair.compare()?;
    pair.tell(pair.adm("secondary r0"))?;
    pair.guest.shutdown()
}
