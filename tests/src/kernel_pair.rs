//! The engine under a plain shell on the host and the Linux DRBD 8.4 in a guest, as one pair.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use drbd_core::admin::Command;
use drbd_core::config::{DiskConfig, NetConfig, Protocol, ResyncConfig};
use drbd_types::{ByteLen, Cstate, Deciseconds, Dstate, Minor, VolumeNr};
use drbdmeta::al::{initialised_block, replay};
use drbdmeta::io::{Memory, MetaIo as _};
use drbdmeta::layout::{AlGeometry, Layout, Placement};
use drbdmeta::ops::{ApplyPlan, apply, plan_apply};
use drbdmeta::superblock::Superblock;

use crate::kernel_node::KernelNode;
use crate::packet_proxy::{Gate, Sender};
use crate::proxy::Proxy;
use crate::thin_node::{Addresses, Image, ThinNode, free_port};

/// Size of both disks, with their internal meta-data.
pub const BYTES: u64 = 8 << 20;
/// The only volume.
pub const VOLUME: VolumeNr = VolumeNr(0);
/// How long the guest may take for something.
pub const LONG: Duration = Duration::from_secs(90);

/// Bytes of the data area of both disks.
///
/// # Errors
/// Never.
pub fn data_len() -> Result<usize> {
    let layout = Layout::for_new(Placement::Internal, ByteLen(BYTES), AlGeometry::default())?;
    Ok(usize::try_from(layout.bitmap.0)?)
}

/// A disk as create-md leaves it, with this in its data area.
///
/// # Errors
/// Never.
pub fn fresh_image(fill: u8) -> Result<Image> {
    let layout = Layout::for_new(Placement::Internal, ByteLen(BYTES), AlGeometry::default())?;
    let mut image = vec![fill; usize::try_from(BYTES)?];
    image[data_len()?..].fill(0);
    for t in 0..layout.al_geometry.blocks() {
        let at = usize::try_from(layout.al_block(t).0)?;
        image[at..at + 4096].copy_from_slice(&initialised_block());
    }
    let at = usize::try_from(layout.superblock.0)?;
    image[at..at + 4096].copy_from_slice(&Superblock::new(&layout, 0).to_disk());
    Ok(image)
}

/// What `drbdmeta apply-al` does with a disk.
///
/// # Errors
/// The meta-data is unusable.
pub fn apply_al(image: Image) -> Result<Image> {
    let length = ByteLen(image.len() as u64);
    let mut io = Memory { bytes: image };
    let at = Placement::Internal.superblock(length).context("no place")?;
    let mut block = [0; 4096];
    io.read_at(at, &mut block)?;
    let mut superblock = Superblock::from_disk(&block)?;
    let layout = superblock.check(Placement::Internal, length)?;
    let replay = replay(&mut io, &layout, &superblock)?;
    match plan_apply(&superblock, &replay) {
        ApplyPlan::Refuse(exit) => anyhow::bail!("the activity log is unreadable, exit {exit}"),
        ApplyPlan::Do { mark, reinitialise, .. } => {
            apply(&mut io, &layout, &mut superblock, &replay.outcome, mark, reinitialise)?;
        }
    }
    Ok(io.bytes)
}

/// Settings of the disk: a fast, fixed resync.
#[must_use]
pub fn disk_config() -> DiskConfig {
    let resync = ResyncConfig { resync_rate: 200 << 10, c_plan_ahead: 0, ..Default::default() };
    DiskConfig { resync, ..DiskConfig::default() }
}

/// Settings of the connection that fit those of [`Both::up`].
#[must_use]
pub fn net_config(protocol: Protocol) -> NetConfig {
    NetConfig {
        protocol,
        connect_int: 2,
        socket_check_timeout: Deciseconds(1),
        // Emulated CPUs are slow.
        ping_timeout: Deciseconds(30),
        ..NetConfig::default()
    }
}

/// Both nodes. Between them is a proxy that can cut the link.
pub struct Both {
    /// In the guest.
    pub kernel: KernelNode,
    /// On the host.
    pub own: ThinNode,
    addresses: Addresses,
    /// From the engine to the kernel.
    pub outgoing: Proxy,
    /// From the kernel to the engine.
    pub incoming: Proxy,
    /// In both proxies.
    pub gate: Arc<Gate>,
    volumes: u16,
}

impl Both {
    /// Boots the guest and starts the engine. Nothing is configured.
    ///
    /// # Errors
    /// The guest does not come up.
    pub fn boot(image: Image) -> Result<Self> {
        Self::boot_with(vec![image])
    }

    /// The same with several volumes.
    ///
    /// # Errors
    /// The guest does not come up.
    pub fn boot_with(images: Vec<Image>) -> Result<Self> {
        let volumes = u8::try_from(images.len())?;
        let mut kernel = KernelNode::boot_with(BYTES, volumes)?;
        let local = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let gate = Arc::new(Gate::default());
        let outgoing = Proxy::gated(local(kernel.port), Arc::clone(&gate), Sender::Own)?;
        let own_port = free_port()?;
        let incoming = Proxy::gated(local(own_port), Arc::clone(&gate), Sender::Kernel)?;
        kernel.set_peer_port(incoming.port());
        let addresses = Addresses { own: local(own_port), peer: local(outgoing.port()) };
        let own = ThinNode::start(addresses, (0..).zip(images).collect());
        Ok(Self { kernel, own, addresses, outgoing, incoming, gate, volumes: volumes.into() })
    }

    /// Replaces the engine by a new one with this disk.
    pub fn restart(&mut self, image: Image) {
        self.restart_with(BTreeMap::from([(0, image)]));
    }

    /// Replaces the engine by a new one with these disks.
    pub fn restart_with(&mut self, images: BTreeMap<u16, Image>) {
        self.own = ThinNode::start(self.addresses, images);
    }

    /// Power is cut: the engine is gone, and a new one begins with its disks, the activity log
    /// applied. Nothing is configured.
    ///
    /// # Errors
    /// The meta-data is unusable.
    pub fn crash(&mut self) -> Result<()> {
        let fresh = ThinNode::start(self.addresses, BTreeMap::new());
        let images = std::mem::replace(&mut self.own, fresh).kill()?;
        let applied: Result<BTreeMap<u16, Image>> =
            images.into_iter().map(|(nr, image)| Ok((nr, apply_al(image)?))).collect();
        self.restart_with(applied?);
        Ok(())
    }

    /// Boots a guest that was off, and brings its resource up.
    ///
    /// # Errors
    /// It does not come up.
    pub fn start_kernel(&mut self, net: &str) -> Result<()> {
        self.kernel.guest.start()?;
        self.kernel.configure(&format!("protocol C; connect-int 2; ping-timeout 30; {net}"), "")?;
        self.kernel.guest.ok("drbdadm up r0").map(drop)
    }

    /// Everything anew on both sides, UpToDate without a resync, Secondary.
    ///
    /// # Errors
    /// They do not connect.
    pub fn fresh(&mut self, net: &NetConfig, kernel_net: &str, kernel_disk: &str) -> Result<()> {
        self.gate.open();
        self.kernel.guest.run("drbdadm resume-io r0; drbdadm secondary r0; drbdadm down r0")?;
        for (_, letter) in (0..self.volumes).zip('a'..='z') {
            // Both are declared equal below.
            let script = format!("dd if=/dev/zero of=/dev/vd{letter} bs=1M count=8 && sync");
            self.kernel.guest.ok(&script)?;
        }
        self.cut(false);
        let image = fresh_image(0)?;
        self.restart_with((0..self.volumes).map(|nr| (nr, image.clone())).collect());
        self.up_with(net, kernel_net, kernel_disk)?;
        for nr in 0..self.volumes {
            let volume = VolumeNr(nr);
            self.own.ok(Command::NewCurrentUuid { volume, clear_bitmap: true })?;
        }
        self.in_sync()
    }

    /// Cuts or mends both directions.
    pub fn cut(&self, is_cut: bool) {
        Proxy::set_cut([&self.outgoing, &self.incoming], is_cut);
    }

    /// Both new, connected, with these further options of the kernel's net section.
    ///
    /// # Errors
    /// They do not connect.
    pub fn up_with(&mut self, net: &NetConfig, kernel_net: &str, kernel_disk: &str) -> Result<()> {
        let protocol = net.protocol;
        let text = format!("protocol {protocol:?}; connect-int 2; ping-timeout 30; {kernel_net}");
        self.kernel.configure(&text, kernel_disk)?;
        self.kernel.create()?;
        self.attach()?;
        self.own.ok(Command::Connect(Box::new(net.clone())))?;
        self.connected()
    }

    /// All volumes with their disks.
    ///
    /// # Errors
    /// It is refused.
    pub fn attach(&mut self) -> Result<()> {
        for nr in 0..self.volumes {
            let volume = VolumeNr(nr);
            self.own.ok(Command::NewVolume { volume, minor: Minor(nr.into()) })?;
            self.own.ok(Command::Attach { volume, config: Box::new(disk_config()) })?;
        }
        Ok(())
    }

    /// Attaches the disk again, as drbdadm does: the activity log is applied first.
    ///
    /// # Errors
    /// It is refused.
    pub fn attach_again(&mut self) -> Result<()> {
        let image = apply_al(self.own.image(0)?)?;
        self.own.set_image(0, image)?;
        self.own.ok(Command::Attach { volume: VOLUME, config: Box::new(disk_config()) })
    }

    /// Both new, connected.
    ///
    /// # Errors
    /// They do not connect.
    pub fn up(&mut self, protocol: Protocol) -> Result<()> {
        self.up_with(&net_config(protocol), "", "")
    }

    /// Adds the logs of both sides to a failure.
    ///
    /// # Errors
    /// The failure.
    pub fn tell(&self, result: Result<()>) -> Result<()> {
        result.with_context(|| {
            let log = self.kernel.guest.take_log().unwrap_or_default();
            let shown = self.kernel.guest.proc_drbd().unwrap_or_default();
            format!("kernel:\n{log}\n{shown}\nown:\n{}", self.own.log())
        })
    }

    /// Waits for a connection.
    ///
    /// # Errors
    /// There is none.
    pub fn connected(&self) -> Result<()> {
        self.tell(self.own.wait("a connection", |s| s.conn == Cstate::Connected))?;
        self.kernel.wait_cstate("Connected", LONG).map(drop)
    }

    /// Waits until both disks of all volumes are UpToDate.
    ///
    /// # Errors
    /// They do not become so.
    pub fn in_sync(&self) -> Result<()> {
        for nr in 0..self.volumes {
            self.tell(self.own.wait_of(nr, "both UpToDate", |s| {
                s.conn == Cstate::Connected
                    && s.disk == Dstate::UpToDate
                    && s.pdsk == Dstate::UpToDate
            }))?;
            let pattern = format!("^ *{nr}: cs:Connected ro:[^ ]* ds:UpToDate/UpToDate ");
            let seen = self.kernel.guest.wait_for(&format!("grep -q '{pattern}' /proc/drbd"), LONG);
            self.tell(seen.map(drop))?;
        }
        Ok(())
    }

    /// The data areas of both disks are equal, on all volumes.
    ///
    /// # Errors
    /// They are not.
    pub fn compare(&self) -> Result<()> {
        self.kernel.guest.ok("sync")?;
        for nr in 0..self.volumes {
            let image = self.own.image(nr)?;
            self.tell(self.kernel.compare_of(nr, &image[..data_len()?]))?;
        }
        Ok(())
    }

    /// Fails with the logs of both sides.
    ///
    /// # Errors
    /// The condition does not hold.
    pub fn ensure(&self, holds: bool, what: &str) -> Result<()> {
        if holds { Ok(()) } else { self.tell(Err(anyhow::anyhow!("{what}"))) }
    }
}
