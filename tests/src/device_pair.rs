//! The daemon in a guest, whose kernel gives its volumes out as block devices, and another daemon
//! on the host, as one pair.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;

use crate::guest::{Config, Disk, GUEST, Guest, HOST};
use crate::kernel_pair::LONG;
use crate::nodes::{Node, Programs, free_ports};
use crate::program_of;

/// Where our programs are in the guest.
pub const OURS: &str = "/opt/drbdrs";
/// A configuration of two guests, the same for the original's tools and ours.
pub const TWO_NODES: &str = "\
global { usage-count no; }
resource r0 {
  device /dev/drbd0; disk /dev/vda; meta-disk internal;
  net { protocol C; connect-int 2; ping-timeout 30; }
  disk { resync-rate 200M; c-plan-ahead 0; }
  on one { address 192.168.7.1:7789; }
  on other { address 192.168.7.2:7789; }
}
";
/// Port of the guest.
const PORT: u16 = 7789;
/// Settings of the guest's daemon.
const SETTINGS: &str = "/etc/drbd.d/drbdrs.toml";

/// Writes everywhere on the device, and reads again what it has written before.
const FIO: &str = "fio --name=f --filename=/dev/drbd0 --direct=1 --rw=randwrite --bsrange=4k-64k \
                       --size=24m --ioengine=libaio --iodepth=16 --verify=crc32c --verify_fatal=1";

/// Both nodes.
#[derive(Debug)]
pub struct DevicePair {
    /// The node with the block devices. Its daemon logs to `/tmp/log`.
    pub guest: Guest,
    /// The other one.
    pub peer: Node,
    /// What the guest's tools and daemon are told.
    conf: String,
    settings: String,
    _dir: TempDir,
}

impl DevicePair {
    /// Both new, connected, the guest Primary and both disks equal. `front_ends` is the setting of
    /// the guest, `modules` are what its kernel loads; the backing disks have `bytes`.
    ///
    /// # Errors
    /// They do not connect.
    pub fn new(front_ends: &str, modules: &[&str], bytes: u64) -> Result<Self> {
        let programs = Programs::build();
        let config = Config::new("alpha").disk(Disk::Size(bytes)).modules(modules);
        let mut guest = Guest::boot(config)?;
        let to_guest = guest.forward(PORT)?;
        let [to_peer, _] = free_ports(std::process::id())?;
        let dir = TempDir::new()?;
        let mut peer = Node::alone(&programs, "bravo", dir.path())?;
        fs::File::create(peer.disk(0))?.set_len(bytes)?;
        let text = |minor: &str, disk: &str, [alpha, bravo]: [String; 2]| {
            format!(
                "global {{ usage-count no; }}\n\
                 resource r0 {{\n\
                 \x20 volume 0 {{ device minor {minor}; disk {disk}; meta-disk internal; }}\n\
                 \x20 net {{ protocol C; connect-int 1; ping-timeout 30; timeout 300; }}\n\
                 \x20 disk {{ resync-rate 200M; c-plan-ahead 0; }}\n\
                 \x20 on alpha {{ address {alpha}; }}\n\
                 \x20 on bravo {{ address {bravo}; }}\n\
                 }}\n"
            )
        };
        let host = [to_guest, to_peer].map(|port| format!("127.0.0.1:{port}"));
        let disk = peer.disk(0).display().to_string();
        fs::write(peer.conf(), text(&peer.minors("@0"), &disk, host))?;
        let inside = [format!("{GUEST}:{PORT}"), format!("{HOST}:{to_peer}")];
        let conf = text("0", "/dev/vda", inside);
        let settings = format!("[node]\nfront-ends = {front_ends}\n");
        peer.start("")?;
        peer.adm(&["create-md", "--force", "r0"])?.ok()?;
        peer.adm(&["up", "r0"])?.ok()?;
        let pair = Self { guest, peer, conf, settings, _dir: dir };
        pair.prepare()?;
        let ready = pair.adm("create-md --force r0").and_then(|_| pair.adm("up r0"));
        pair.tell(ready)?;
        pair.tell(pair.peer.until("cs:Connected"))?;
        let equal = pair.adm("new-current-uuid --clear-bitmap r0/0");
        pair.tell(equal.and_then(|_| pair.adm("primary r0")))?;
        pair.in_sync()?;
        Ok(pair)
    }

    /// The guest has just booted: it gets our programs, and its daemon is started.
    fn prepare(&self) -> Result<()> {
        install(&self.guest)?;
        self.guest.put("/etc/drbd.conf", self.conf.as_bytes())?;
        self.guest.put(SETTINGS, self.settings.as_bytes())?;
        self.start_daemon()
    }

    /// The guest boots again after a power cut, with its resource up.
    ///
    /// # Errors
    /// It does not.
    pub fn boot_again(&mut self) -> Result<()> {
        self.guest.start()?;
        // Without a port that leads into the guest: it is the one that connects.
        self.prepare()?;
        self.tell(self.adm("up r0")).map(drop)
    }

    /// Starts the guest's daemon, and no more.
    ///
    /// # Errors
    /// It does not run.
    pub fn start_daemon(&self) -> Result<()> {
        self.guest
            .ok(&format!(
                "rm -f /run/drbd/drbdrs.sock; ulimit -c 0; \
                 ( setsid {OURS}/drbdrs < /dev/null > /dev/null 2>> /tmp/log & ); \
                 for i in $(seq 300); do [ -S /run/drbd/drbdrs.sock ] && exit 0; sleep 0.05; done; \
                 exit 1"
            ))
            .map(drop)
    }

    /// Ends the guest's daemon with a signal.
    ///
    /// # Errors
    /// It did not run, or does not end.
    pub fn end_daemon(&self, signal: &str) -> Result<()> {
        let script = format!(
            "pid=$(pidof drbdrs) && kill -{signal} $pid && \
             for i in $(seq 600); do [ -d /proc/$pid ] || exit 0; sleep 0.05; done; exit 1"
        );
        self.tell(self.guest.ok(&script)).map(drop)
    }

    /// How often the daemon ends in a test of that: `DRBDRS_KILLS`, or 4 times.
    pub fn rounds() -> usize {
        std::env::var("DRBDRS_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(4)
    }

    /// The guest's daemon ends again and again, in several ways, while fio writes and reads again
    /// what it has written. Nobody brings the next one's resources up, nobody sees an error, and in
    /// the end both disks are equal.
    ///
    /// # Errors
    /// It is otherwise.
    pub fn survive(&mut self, rounds: usize) -> Result<()> {
        let fio = format!("{FIO} --loops=100000 --do_verify=1 --verify_backlog=32");
        let fio = self.guest.spawn(&fio)?;
        let start = Instant::now();
        for (round, millis) in (0..rounds).zip([500, 900, 1300, 1700].into_iter().cycle()) {
            std::thread::sleep(Duration::from_millis(millis));
            let signal = ["KILL", "TERM", "ABRT"][round % 3];
            self.end_daemon(signal)?;
            self.tell(self.start_daemon())?;
            let is_primary = "grep -q 'ro:Primary/' /run/drbd/proc-drbd";
            self.tell(self.guest.wait_for(is_primary, LONG))?;
            println!("round {round}: {signal}, {:.1} s", start.elapsed().as_secs_f32());
        }
        std::thread::sleep(Duration::from_secs(2));
        // The resync need not end beside the load.
        self.tell(self.guest.ok("kill -INT $(pidof fio)"))?;
        let fio = fio.wait(LONG)?;
        let counted = fio.out.lines().find(|line| line.contains("issued rwts")).unwrap_or_default();
        println!("{}", counted.trim());
        ensure!(!fio.out.contains("error") && counted.contains("total="), "{fio:?}");
        ensure!(!counted.contains("total=0,"), "nothing was verified");
        let log = self.guest.log()?;
        ensure!(!log.contains("I/O error"), "{log}");
        self.compare()?;
        self.tell(self.adm("secondary r0"))?;
        self.guest.shutdown()
    }

    /// Everything that people do with a disk: load, a file system that is used, trimmed, checked and
    /// grown, discards and zeroes. In the end both disks are equal, and the device is gone with the
    /// role. `own` and `gone` are scripts of what only this kind of
    /// device has to hold while it is there, and afterwards.
    ///
    /// # Errors
    /// It is otherwise.
    pub fn carry_a_file_system(mut self, own: &str, gone: &str) -> Result<()> {
        let start = Instant::now();
        let say = |what: &str| println!("{:.1} s: {what}", start.elapsed().as_secs_f32());
        let run = |script: &str| self.tell(self.guest.ok(script));
        run("test -b /dev/drbd0 && test -b /dev/drbd/by-res/r0/0")?;
        run(own)?;
        run(FIO)?;
        say("fio");
        run("mkfs.ext4 -q -b 4096 /dev/drbd0 8192 && mount /dev/drbd0 /mnt && \
             dd if=/dev/urandom of=/mnt/file bs=64k count=40 2>/dev/null && \
             sha256sum < /mnt/file > /mnt/sum && \
             dd if=/dev/urandom of=/mnt/gone bs=64k count=80 2>/dev/null && sync && rm /mnt/gone")?;
        let held = self.guest.run("/opt/drbdrs/drbdadm secondary r0 2>&1")?;
        ensure!(held.status != 0 && held.out.contains("held open"), "{held:?}");
        let trimmed = run("fstrim -v /mnt")?;
        ensure!(!trimmed.contains(": 0 B"), "{trimmed}");
        run("umount /mnt && /sbin/e2fsck -fp /dev/drbd0")?;
        run("resize2fs /dev/drbd0 12288 2>&1 && /sbin/e2fsck -fn /dev/drbd0 && \
             mount /dev/drbd0 /mnt && sha256sum < /mnt/file | cmp - /mnt/sum && umount /mnt")?;
        say("file system");
        self.compare()?;
        run("/sbin/blkdiscard -f -o 1048576 -l 8388608 /dev/drbd0 && \
             /sbin/blkdiscard -f -z -o 16777216 -l 4194304 /dev/drbd0")?;
        let zeroes = |at: u32, mib: u32| {
            let read = format!("dd if=/dev/drbd0 bs=1M skip={at} count={mib} 2>/dev/null");
            format!("{read} | cmp -n {} - /dev/zero", mib << 20)
        };
        run(&format!("{} && {}", zeroes(1, 8), zeroes(16, 4)))?;
        self.compare()?;
        say("discards and zeroes");
        self.tell(self.adm("secondary r0"))?;
        self.tell(
            self.guest.ok(&format!("! ls /dev/drbd0 && ! ls /dev/drbd/by-res/r0/0 && {gone}")),
        )?;
        self.tell(self.adm("down r0"))?;
        say("down");
        let log = self.guest.log()?;
        ensure!(!log.contains("I/O error"), "{log}");
        self.guest.shutdown()
    }

    /// drbdadm in the guest.
    ///
    /// # Errors
    /// It is refused.
    pub fn adm(&self, words: &str) -> Result<String> {
        self.guest.ok(&format!("{OURS}/drbdadm {words} 2>&1"))
    }

    /// Waits until both are UpToDate.
    ///
    /// # Errors
    /// They do not become so.
    pub fn in_sync(&self) -> Result<()> {
        self.tell(self.peer.until("ds:UpToDate/UpToDate"))?;
        let pattern = "cs:Connected ro:[^ ]* ds:UpToDate/UpToDate";
        self.tell(self.guest.wait_for(&format!("grep -q '{pattern}' /run/drbd/proc-drbd"), LONG))
            .map(drop)
    }

    /// Both are in sync, and the data areas of both disks are equal.
    ///
    /// # Errors
    /// They are not.
    pub fn compare(&self) -> Result<()> {
        let sectors =
            self.guest.ok("cat /sys/class/block/$(readlink /dev/drbd0 | xargs basename)/size")?;
        self.compare_len(sectors.trim().parse::<usize>()? * 512)
    }

    /// The same for so many bytes; the device need not be there.
    ///
    /// # Errors
    /// As for [`Self::compare`].
    pub fn compare_len(&self, len: usize) -> Result<()> {
        self.in_sync()?;
        self.guest.ok("sync")?;
        let [own, other] =
            [self.guest.disk_image(0).context("a disk")?.to_owned(), self.peer.disk(0)]
                .map(fs::read);
        let (own, other) = (own?, other?);
        let (own, other) =
            (own.get(..len).context("too short")?, other.get(..len).context("too short")?);
        let different = own.chunks(4096).zip(other.chunks(4096)).filter(|(a, b)| a != b).count();
        self.tell(
            (different == 0).then_some(()).with_context(|| format!("{different} blocks differ")),
        )
    }

    /// Adds what both sides logged to a failure.
    ///
    /// # Errors
    /// The failure.
    pub fn tell<T>(&self, result: Result<T>) -> Result<T> {
        result.with_context(|| {
            let script = "tail -n 60 /tmp/log; cat /run/drbd/proc-drbd; dmesg | tail -n 30";
            let own = self.guest.run(script).map(|output| output.out).unwrap_or_default();
            format!("guest:\n{own}\nhost:\n{}", self.peer.log_tail())
        })
    }
}

/// Puts our programs into a guest.
///
/// # Errors
/// They do not run there.
pub fn install(guest: &Guest) -> Result<()> {
    guest.ok(&format!("mkdir -p {OURS} /etc/drbd.d"))?;
    let packages = [
        ("drbdrs", "drbdrs"),
        ("drbdadm", "drbdadm"),
        ("drbdadm", "drbdsetup"),
        ("drbdmeta", "drbdmeta"),
    ];
    packages.into_iter().try_for_each(|(package, name)| install_program(guest, package, name))
}

/// Puts one program of a package beside them.
///
/// # Errors
/// It can not be stripped or copied.
pub fn install_program(guest: &Guest, package: &str, name: &str) -> Result<()> {
    // Without what only a debugger needs it is copied in a third of the time.
    let folder = TempDir::new()?;
    let stripped = folder.path().join(name);
    let mut strip = Command::new("strip");
    let output = strip.arg("-o").arg(&stripped).arg(program_of(package, name)).output()?;
    ensure!(output.status.success(), "strip: {}", String::from_utf8_lossy(&output.stderr));
    guest.put_program(&stripped, &format!("{OURS}/{name}"))
}
