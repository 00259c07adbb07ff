//! The engine and the Linux DRBD 8.4 as one pair: the engine under a plain shell on the host, the
//! kernel in a guest.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Result, ensure};
use drbd_core::admin::Command;
use drbd_core::config::{DiskConfig, NetConfig, Protocol, ResyncConfig};
use drbd_types::{ByteLen, Cstate, Dstate, Minor, Role, VolumeNr};
use drbdmeta::al::initialised_block;
use drbdmeta::layout::{AlGeometry, Layout, Placement};
use drbdmeta::superblock::Superblock;
use drbdrs_tests::kernel_node::KernelNode;
use drbdrs_tests::need::{Need, trial};
use drbdrs_tests::thin_node::{Addresses, Image, ThinNode, free_port};
use libtest_mimic::{Arguments, Failed, Trial};

fn main() {
    let args = Arguments::from_args();
    let tests = vec![
        test("initial_sync_from_us_and_writes_in_all_protocols", we_are_primary),
        test("initial_sync_from_the_kernel_and_its_writes", kernel_is_primary),
    ];
    libtest_mimic::run(&args, tests).exit();
}

fn test(name: &str, body: fn() -> Result<()>) -> Trial {
    trial(name, &[Need::Guest], move || body().map_err(|e| Failed::from(format!("{e:#}"))))
}

const BYTES: u64 = 8 << 20;
const VOLUME: VolumeNr = VolumeNr(0);
const LONG: Duration = Duration::from_secs(60);

/// A disk as create-md leaves it, with this in its data area.
fn fresh_image(fill: u8) -> Result<Image> {
    let layout = Layout::for_new(Placement::Internal, ByteLen(BYTES), AlGeometry::default())?;
    let mut image = vec![fill; usize::try_from(BYTES)?];
    let data = usize::try_from(layout.bitmap.0)?;
    image[data..].fill(0);
    for t in 0..layout.al_geometry.blocks() {
        let at = usize::try_from(layout.al_block(t).0)?;
        image[at..at + 4096].copy_from_slice(&initialised_block());
    }
    let at = usize::try_from(layout.superblock.0)?;
    image[at..at + 4096].copy_from_slice(&Superblock::new(&layout, 0).to_disk());
    Ok(image)
}

/// Both nodes, connected.
struct Both {
    kernel: KernelNode,
    own: ThinNode,
}

fn disk_config() -> DiskConfig {
    let resync = ResyncConfig { resync_rate: 200 << 10, c_plan_ahead: 0, ..Default::default() };
    DiskConfig { resync, ..DiskConfig::default() }
}

fn net_config(protocol: Protocol) -> NetConfig {
    NetConfig {
        protocol,
        connect_int: 2,
        socket_check_timeout: drbd_types::Deciseconds(1),
        // Emulated CPUs are slow.
        ping_timeout: drbd_types::Deciseconds(30),
        ..NetConfig::default()
    }
}

impl Both {
    fn boot(image: Image) -> Result<Self> {
        let mut kernel = KernelNode::boot(BYTES)?;
        let port = free_port()?;
        kernel.set_peer_port(port);
        let local = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let addresses = Addresses { own: local(port), peer: local(kernel.port) };
        let own = ThinNode::start(addresses, BTreeMap::from([(0, image)]));
        Ok(Self { kernel, own })
    }

    fn up(&mut self, protocol: Protocol) -> Result<()> {
        self.kernel
            .configure(&format!("protocol {protocol:?}; connect-int 2; ping-timeout 30;"), "")?;
        self.kernel.create()?;
        self.own.ok(Command::NewVolume { volume: VOLUME, minor: Minor(0) })?;
        self.own.ok(Command::Attach { volume: VOLUME, config: Box::new(disk_config()) })?;
        self.own.ok(Command::Connect(Box::new(net_config(protocol))))?;
        self.connected()
    }

    fn connected(&self) -> Result<()> {
        let result = self.own.wait("a connection", |s| s.conn == Cstate::Connected);
        if result.is_err() {
            println!("{}\n{}", self.kernel.guest.take_log()?, self.kernel.guest.proc_drbd()?);
        }
        result?;
        self.kernel.wait_cstate("Connected", LONG).map(drop)
    }

    fn in_sync(&self) -> Result<()> {
        let result = self.own.wait("both UpToDate", |s| {
            s.conn == Cstate::Connected && s.disk == Dstate::UpToDate && s.pdsk == Dstate::UpToDate
        });
        if result.is_err() {
            println!("{}\n{}", self.kernel.guest.take_log()?, self.kernel.guest.proc_drbd()?);
        }
        result?;
        self.kernel.wait_cstate("Connected", LONG)?;
        let shown = self.kernel.shown()?;
        ensure!(shown.disks == "UpToDate/UpToDate", "{shown:?}");
        Ok(())
    }

    /// The data areas of both disks are equal.
    fn compare(&self) -> Result<()> {
        let image = self.own.image(0)?;
        let layout = Layout::for_new(Placement::Internal, ByteLen(BYTES), AlGeometry::default())?;
        self.kernel.guest.ok("sync")?;
        self.kernel.compare(&image[..usize::try_from(layout.bitmap.0)?])
    }
}

fn we_are_primary() -> Result<()> {
    for protocol in [Protocol::C, Protocol::B, Protocol::A] {
        let mut both = Both::boot(fresh_image(b'x')?)?;
        both.up(protocol)?;
        both.own.ok(Command::Primary { volume: VOLUME, force: true })?;
        both.in_sync()?;
        both.compare()?;
        for n in 0..40_u64 {
            let data = vec![b'a' + u8::try_from(n % 26)?; usize::try_from(512 * (1 + n * 3))?];
            both.own.write(n * 300, data)?;
        }
        let read = both.own.read(300, 4)?;
        ensure!(read == vec![b'b'; 2048]);
        both.own.ok(Command::Secondary(VOLUME))?;
        both.kernel.guest.wait_for("drbdadm role r0 | grep -q Secondary/Secondary", LONG)?;
        both.compare()?;
        both.own.ok(Command::Disconnect { force: false })?;
        both.kernel.guest.wait_for("! grep -q 'cs:Connected' /proc/drbd", LONG)?;
    }
    Ok(())
}

fn kernel_is_primary() -> Result<()> {
    let mut both = Both::boot(fresh_image(b'y')?)?;
    both.up(Protocol::C)?;
    both.kernel.guest.ok("drbdadm primary --force r0")?;
    both.in_sync()?;
    both.compare()?;
    both.kernel.guest.ok("for i in 1 2 3 4 5 6 7 8; do \
         dd if=/dev/urandom of=/dev/drbd0 bs=64k seek=$i count=3 oflag=direct 2>/dev/null; done; \
         /sbin/blkdiscard -o 4194304 -l 1048576 /dev/drbd0; \
         dd if=/dev/urandom of=/dev/drbd0 bs=4k seek=900 count=100 conv=fsync 2>/dev/null")?;
    ensure!(both.own.state()?.peer == Role::Primary);
    both.compare()?;
    // The other way round.
    both.kernel.guest.ok("drbdadm secondary r0")?;
    both.own.ok(Command::Primary { volume: VOLUME, force: false })?;
    both.own.write(64, vec![b'z'; 65536])?;
    both.own.ok(Command::Secondary(VOLUME))?;
    both.compare()?;
    both.kernel.guest.ok("drbdadm disconnect r0")?;
    both.own.wait("the end of the connection", |s| s.conn == Cstate::WFConnection)?;

    Ok(())
}
