//! Guests with the in-kernel DRBD 8.4: that the harness works, and that the kernel gets along with
//! a scripted peer.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use drbd_types::{Cstate, Dstate, Gi};
use drbd_wire::Algorithm;
use drbd_wire::packet::ProtocolParams;
use drbdrs_tests::guest::{Config, Disk, Guest, HOST, Pair};
use drbdrs_tests::kernel_node::KernelNode;
use drbdrs_tests::metagen::Random;
use drbdrs_tests::need::{Need, trial};
use drbdrs_tests::program;
use drbdrs_tests::scripted_peer::replica::{Counts, Replica};
use drbdrs_tests::scripted_peer::{ScriptedPeer, offer};
use libtest_mimic::{Arguments, Failed, Trial};

fn main() {
    let args = Arguments::from_args();
    let tests = vec![
        test("disks_survive_a_power_cut_and_programs_run_in_a_guest", harness),
        test("scripted_secondary_replicates_in_every_version", versions),
        test("scripted_source_syncs_the_kernel_in_every_version", sources),
        test("scripted_secondary_speaks_protocols_a_and_b_with_digests", protocols),
        test("authentication_with_right_and_wrong_secrets", authentication),
        test("two_guests_share_a_wire_and_replicate", pair),
    ];
    libtest_mimic::run(&args, tests).exit();
}

fn test(name: &str, body: fn() -> Result<()>) -> Trial {
    trial(name, &[Need::Guest], move || body().map_err(|e| Failed::from(format!("{e:#}"))))
}

fn harness() -> Result<()> {
    let start = Instant::now();
    let mut guest = Guest::boot(Config::new("alpha").disk(Disk::Size(8 << 20)))?;
    println!("up after {:?}", start.elapsed());
    ensure!(guest.proc_drbd()?.starts_with("version: 8.4."), "{}", guest.proc_drbd()?);
    files_and_scripts(&guest)?;
    links(&mut guest)?;
    guest.ok("modprobe drbd && dd if=/dev/zero bs=4k count=1 | tr '\\0' x >/dev/vda && sync")?;
    guest.ok(
        "mkfs.ext4 -q -F -E offset=1048576 /dev/vda 4m && e2fsck -fn /dev/vda?offset=1048576",
    )?;
    guest.power_cut()?;
    ensure!(guest.run("true").is_err() && !guest.is_running()?);
    guest.start()?;
    let head = guest.bytes("head -c 5000 /dev/vda")?;
    ensure!(head[..4096].iter().all(|b| *b == b'x') && head[4096] == 0);
    guest.shutdown()
}

fn files_and_scripts(guest: &Guest) -> Result<()> {
    let big: Vec<u8> =
        (0..10_u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let start = Instant::now();
    guest.put("/tmp/a/b/big file", &big)?;
    println!("10 MiB put in {:?}", start.elapsed());
    ensure!(guest.get("/tmp/a/b/big file")? == big);
    guest.put("/tmp/empty", b"")?;
    ensure!(guest.get("/tmp/empty")?.is_empty());
    ensure!(guest.put("/proc/nothing", b"x").is_err() && guest.get("/nothing").is_err());
    let output = guest.run("echo 'quoted \"$HOME\"'; echo wrong >&2; exit 3")?;
    ensure!((output.status, output.out.as_str()) == (3, "quoted \"$HOME\"\nwrong\n"), "{output:?}");
    ensure!(
        guest.run("sleep 60 & echo on")?.out == "on\n",
        "a background process holds nothing up"
    );
    let slow = guest.run_for("echo first; sleep 30", Duration::from_secs(1));
    ensure!(slow.is_err_and(|e| e.to_string().contains("first")));
    let mut job = guest.spawn("sleep 1; echo late")?;
    ensure!(!job.is_done()?);
    ensure!(job.wait(Duration::from_secs(20))?.out == "late\n");
    guest.put_program(&program("drbdmeta"), "/usr/local/sbin/our-drbdmeta")?;
    let output =
        guest.run("our-drbdmeta --version; our-drbdmeta 0 v08 /dev/vda internal get-gi")?;
    ensure!(output.status != 127 && !output.out.contains("not found"), "{output:?}");
    ensure!(guest.put_program("/bin/sh".as_ref(), "/usr/local/bin/host-sh").is_ok());
    Ok(())
}

fn links(guest: &mut Guest) -> Result<()> {
    // From the guest to the host.
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port = listener.local_addr()?.port();
    let job = guest.spawn(&format!("echo hello | nc -w 5 {HOST} {port}"))?;
    let mut text = String::new();
    listener.accept()?.0.read_to_string(&mut text)?;
    ensure!(text == "hello\n");
    job.wait(Duration::from_secs(20))?;
    // From the host to the guest, and a pulled cable.
    let job = guest.spawn("nc -l -p 5000 -e cat")?;
    let port = guest.forward(5000)?;
    guest.wait_for("netstat -ltn | grep -q :5000", Duration::from_secs(10))?;
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    stream.write_all(b"1")?;
    stream.read_exact(&mut [0])?;
    guest.set_link(false)?;
    stream.write_all(b"2")?;
    ensure!(stream.read_exact(&mut [0]).is_err(), "the cable is pulled");
    guest.set_link(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.read_exact(&mut [0])?;
    guest.freeze()?;
    ensure!(guest.run_for("true", Duration::from_secs(1)).is_err(), "frozen");
    guest.thaw()?;
    drop(stream);
    job.wait(Duration::from_secs(20))?;
    ensure!(guest.run("ip route | grep default")?.status != 0);
    Ok(())
}

const TWO_NODES: &str = "
global { usage-count no; }
resource r0 {
  device minor 0; disk /dev/vda; meta-disk internal; protocol C;
  on one { address 192.168.7.1:7789; }
  on other { address 192.168.7.2:7789; }
}
";

fn pair() -> Result<()> {
    let wire = Pair::new()?;
    let config =
        |name, link: &_| Config::new(name).disk(Disk::Size(4 << 20)).link(Clone::clone(link));
    let boots = [config("one", &wire.one), config("other", &wire.other)]
        .map(|config| std::thread::spawn(move || Guest::boot(config)));
    let mut guests = Vec::new();
    for boot in boots {
        guests.push(boot.join().map_err(|_| anyhow::anyhow!("a boot panicked"))??);
    }
    for guest in &guests {
        guest.put("/etc/drbd.conf", TWO_NODES.as_bytes())?;
        guest.ok("drbdadm create-md --force r0 && drbdadm up r0")?;
    }
    let long = Duration::from_secs(60);
    guests[0].wait_for("[ $(drbdadm cstate r0) = Connected ]", long)?;
    guests[0].ok("drbdadm primary --force r0")?;
    guests[0].wait_for("[ $(drbdadm dstate r0) = UpToDate/UpToDate ]", long)?;
    guests[0].ok("dd if=/dev/urandom of=/dev/drbd0 bs=64k count=8 oflag=direct")?;
    let sums = [0, 1].map(|i| guests[i].ok("head -c 1M /dev/vda | sha256sum"));
    let [a, b] = sums;
    ensure!(a? == b?, "contents differ");
    guests[1].set_link(false)?;
    guests[0].wait_for("[ $(drbdadm cstate r0) = WFConnection ]", long)?;
    guests[1].set_link(true)?;
    guests[0].wait_for("[ $(drbdadm cstate r0) = Connected ]", long)?;
    Ok(())
}

const LONG: Duration = Duration::from_secs(60);
/// All that differ from the one before.
const VERSIONS: [u32; 13] = [86, 87, 88, 89, 90, 91, 94, 95, 96, 97, 99, 100, 101];
const WRITE: &str = "dd if=/dev/urandom of=/dev/drbd0 oflag=direct";

/// Runs a script in the guest while the replica does its part.
fn run(
    node: &KernelNode,
    peer: &mut ScriptedPeer,
    replica: &mut Replica,
    script: &str,
) -> Result<()> {
    let mut job = node.guest.spawn(script)?;
    replica.play(peer, LONG, |_| job.is_done())?;
    let output = job.wait(LONG)?;
    ensure!(output.status == 0, "exit status {} of {script}: {}", output.status, output.out);
    Ok(())
}

/// A new resource and a new replica, connected with this offer; the kernel becomes Primary by
/// force and syncs the replica.
fn synced(
    node: &KernelNode,
    max: u32,
    settings: ProtocolParams,
) -> Result<(ScriptedPeer, Replica)> {
    node.create()?;
    let mut peer = node.connect()?;
    peer.features(offer(max))?;
    let mut replica = Replica::new();
    replica.settings = settings;
    replica.join(&mut peer)?;
    run(node, &mut peer, &mut replica, "drbdadm primary --force r0")?;
    sync(&mut peer, &mut replica)?;
    Ok((peer, replica))
}

fn sync(peer: &mut ScriptedPeer, replica: &mut Replica) -> Result<()> {
    replica.play(peer, LONG, |r| Ok(r.state.disk == Dstate::UpToDate))
}

/// The replica and the kernel's disk become equal, and the kernel says so.
fn check(node: &KernelNode, peer: &mut ScriptedPeer, replica: &mut Replica) -> Result<()> {
    let script = "for i in $(seq 50); do grep -q 'cs:Connected.*ds:UpToDate/UpToDate' /proc/drbd \
                  && grep -q ' oos:0$' /proc/drbd && exit; sleep 0.1; done; cat /proc/drbd; exit 1";
    run(node, peer, replica, script)?;
    // With protocol A the last write may still be on its way.
    let end = Instant::now() + LONG;
    replica.play(peer, LONG, |r| match node.compare(&r.disk) {
        Err(e) if Instant::now() > end => Err(e),
        other => Ok(other.is_ok()),
    })
}

fn versions() -> Result<()> {
    let node = KernelNode::boot(4 << 20)?;
    node.configure("protocol C;", "")?;
    let (mut peer, mut replica) = synced(&node, VERSIONS[0], Replica::new().settings)?;
    ensure!(replica.counts.resync_bytes == replica.disk.len() as u64, "a full sync");
    for version in VERSIONS {
        if version != VERSIONS[0] {
            // Changes that the replica misses, then a resync by bitmap.
            drop(peer);
            node.wait_cstate("WFConnection", LONG)?;
            node.guest.ok(&format!("{WRITE} bs=64k count=1 seek=7"))?;
            peer = node.connect()?;
            peer.features(offer(version))?;
            replica.counts = Counts::default();
            replica.join(&mut peer)?;
            sync(&mut peer, &mut replica)?;
            let resynced = replica.counts.resync_bytes;
            ensure!((65_536..1 << 20).contains(&resynced), "{version}: {resynced} bytes");
        }
        ensure!(peer.version() == version, "{} instead of {version}", peer.version());
        let seek = version - 80;
        let script = format!("{WRITE} bs=4k count=3 seek={seek} && {WRITE} bs=200k count=2 seek=1");
        run(&node, &mut peer, &mut replica, &script)?;
        if version >= 95 {
            // Below, a discard crashes the kernel. Spec: wire-protocol.md §16.
            let script = "/sbin/blkdiscard -o 262144 -l 65536 /dev/drbd0 && \
                          /sbin/blkdiscard -z -o 393216 -l 65536 /dev/drbd0";
            run(&node, &mut peer, &mut replica, script)?;
        }
        check(&node, &mut peer, &mut replica).with_context(|| format!("version {version}"))?;
        let counts = replica.counts;
        println!("version {version}: {counts:?}");
        ensure!(counts.writes >= 5 && counts.barriers > 0, "{counts:?}");
        ensure!(version < 95 || counts.trims > 0, "{counts:?}");
    }
    Ok(())
}

fn sources() -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut node = KernelNode::boot(4 << 20)?;
    node.set_peer_port(listener.local_addr()?.port());
    node.configure("csums-alg md5; verify-alg sha1; connect-int 1;", "")?;
    node.create()?;
    let mut replica = Replica::new();
    replica.resize(node.guest.ok("cat /sys/block/drbd0/size")?.trim().parse()?)?;
    let mut random = Random::new(1);
    replica.disk.fill_with(|| random.next().to_le_bytes()[0]);
    replica.uuids.current = Gi(0x1234_0000_0000_0000);
    replica.state.disk = Dstate::UpToDate;
    // Once the kernel makes both connections.
    let mut peer = ScriptedPeer::accept(&listener, LONG)?;
    drop(listener);
    ensure!(peer.is_resolver);
    peer.features(offer(101))?;
    join_as_source(&node, &mut peer, &mut replica)?;
    ensure!(replica.counts.reads + replica.counts.in_sync > 30, "{:?}", replica.counts);
    for version in VERSIONS {
        drop(peer);
        node.wait_cstate("WFConnection", LONG)?;
        // The kernel misses changes: four blocks have new contents, one only looks so.
        for block in [3, 17, 18, 500] {
            replica.dirty[block] = true;
            replica.disk[block * 4096..][..4096].fill(random.next().to_le_bytes()[0]);
        }
        replica.dirty[900] = true;
        replica.uuids.bitmap = replica.uuids.current;
        replica.uuids.current = Gi(random.next() & !1);
        replica.counts = Counts::default();
        peer = node.connect()?;
        peer.features(offer(version))?;
        join_as_source(&node, &mut peer, &mut replica)
            .with_context(|| format!("version {version}"))?;
        println!("version {version}: {:?}", replica.counts);
        let counts = replica.counts;
        let asks_with_checksums = u64::from(version >= 89);
        ensure!(counts.in_sync == asks_with_checksums, "{counts:?}");
        // Neighbours come in one request; one more block is left by each verify.
        ensure!((4..=6).contains(&(counts.reads + counts.in_sync)), "{counts:?}");
        if [88, 97, 101].contains(&version) {
            verify(&node, &mut peer, &mut replica)?;
        }
    }
    Ok(())
}

fn join_as_source(node: &KernelNode, peer: &mut ScriptedPeer, replica: &mut Replica) -> Result<()> {
    replica.join(peer)?;
    ensure!(replica.state.conn == Cstate::WFBitMapS, "{:?}", replica.state);
    replica.play(peer, LONG, |r| Ok(r.state.conn == Cstate::Connected))?;
    check(node, peer, replica)
}

/// An online verify finds one block that was changed behind its back.
fn verify(node: &KernelNode, peer: &mut ScriptedPeer, replica: &mut Replica) -> Result<()> {
    replica.disk[77 * 4096] ^= 1;
    let script = "drbdadm verify r0 && while grep -q cs:Verify /proc/drbd; do sleep 0.1; done
                  dmesg | grep 'Out of sync: start=616, size=8' && grep ' oos:4$' /proc/drbd";
    run(node, peer, replica, script)?;
    let blocks = replica.dirty.len() as u64;
    ensure!(
        replica.counts.verified == blocks && replica.dirty_blocks() == 1,
        "{:?}",
        replica.counts
    );
    // Both have marked it; the next resync copies it.
    Ok(())
}

fn protocols() -> Result<()> {
    let node = KernelNode::boot(4 << 20)?;
    for (letter, protocol, algorithm) in [("A", 1, "crc32c"), ("B", 2, "sha1"), ("C", 3, "md5")] {
        node.configure(&format!("protocol {letter}; data-integrity-alg {algorithm};"), "")?;
        let mut settings = Replica::new().settings;
        settings.protocol = protocol;
        settings.integrity_alg = algorithm.to_owned();
        let (mut peer, mut replica) = synced(&node, 101, settings)?;
        let script = format!("{WRITE} bs=4k count=9 && {WRITE} bs=1M count=1 conv=fsync seek=1");
        run(&node, &mut peer, &mut replica, &script)?;
        check(&node, &mut peer, &mut replica).with_context(|| format!("protocol {letter}"))?;
        println!("protocol {letter}, {algorithm}: {:?}", replica.counts);
        run(&node, &mut peer, &mut replica, "drbdadm secondary r0")?;
        // An orderly disconnect: it asks first, then both connections end.
        let job = node.guest.spawn("drbdadm down r0")?;
        let ended = replica.play(&mut peer, LONG, |_| Ok(false));
        ensure!(ended.is_err_and(|e| e.to_string().contains("closed by the other side")));
        ensure!(job.wait(LONG)?.status == 0);
    }
    Ok(())
}

fn authentication() -> Result<()> {
    let node = KernelNode::boot(4 << 20)?;
    let algorithms = [Algorithm::Md5, Algorithm::Sha1, Algorithm::Sha256, Algorithm::Sha512];
    for (max, algorithm) in [86, 95, 100, 101].into_iter().zip(algorithms) {
        let name = algorithm.name();
        node.configure(&format!("cram-hmac-alg {name}; shared-secret \"Zebra 1\";"), "")?;
        node.create()?;
        let mut peer = node.connect()?;
        peer.features(offer(max))?;
        peer.authenticate(algorithm, b"Zebra 1")?;
        let mut replica = Replica::new();
        replica.join(&mut peer)?;
        replica.play(&mut peer, LONG, |r| Ok(r.peer_state.is_some()))?;
        node.wait_cstate("Connected", LONG)?;
        drop(peer);
        node.wait_cstate("WFConnection", LONG)?;
        let mut peer = node.connect()?;
        peer.features(offer(max))?;
        let refused = peer.authenticate(algorithm, b"Zebra 2");
        ensure!(refused.is_err(), "{name}: a wrong secret");
        node.wait_cstate("StandAlone", LONG)?;
        ensure!(node.guest.take_log()?.contains("Authentication of peer failed"));
        node.guest.ok("drbdadm down r0")?;
    }
    Ok(())
}
