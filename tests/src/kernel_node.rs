//! A guest with one resource, `r0`, of one volume on `/dev/vda`, or of several on the disks that
//! follow, whose peer is on the host.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::guest::{Config, DEADLINE, Disk, GUEST, Guest, HOST};
use crate::scripted_peer::ScriptedPeer;

/// The port in the guest.
const PORT: u16 = 7789;
/// A port of the host where nobody listens: the kernel never succeeds with its own attempts.
const NOBODY: u16 = 1;

/// A guest with DRBD. The configuration file lets the kernel look for its peer at `peer_port`.
#[derive(Debug)]
pub struct KernelNode {
    /// The guest.
    pub guest: Guest,
    /// Port of the host that leads to its DRBD.
    pub port: u16,
    peer_port: u16,
    volumes: u8,
}

/// State as in `/proc/drbd`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    /// `cs`.
    pub cstate: String,
    /// `ro`, both roles.
    pub roles: String,
    /// `ds`, both disks.
    pub disks: String,
}

impl KernelNode {
    /// Boots a guest with one disk of so many bytes. Nothing is configured yet.
    ///
    /// # Errors
    /// The guest does not come up.
    pub fn boot(bytes: u64) -> Result<Self> {
        Self::boot_with(bytes, 1)
    }

    /// The same with a disk for each of so many volumes.
    ///
    /// # Errors
    /// The guest does not come up.
    pub fn boot_with(bytes: u64, volumes: u8) -> Result<Self> {
        let mut config = Config::new("alpha");
        for _ in 0..volumes {
            config = config.disk(Disk::Size(bytes));
        }
        let mut guest = Guest::boot(config)?;
        let port = guest.forward(PORT)?;
        Ok(Self { guest, port, peer_port: NOBODY, volumes })
    }

    /// Lets the kernel connect to this port of the host.
    pub const fn set_peer_port(&mut self, port: u16) {
        self.peer_port = port;
    }

    /// Writes the configuration: options of the `net` and of the `disk` section. Waiting times
    /// suit a busy machine: the kernel gives its peer 12 s for each step of a handshake.
    ///
    /// # Errors
    /// The guest is gone.
    pub fn configure(&self, net: &str, disk: &str) -> Result<()> {
        self.configure_with(net, disk, &vec![""; usize::from(self.volumes)])
    }

    /// The same with options of the `disk` section of each volume.
    ///
    /// # Errors
    /// The guest is gone.
    pub fn configure_with(&self, net: &str, disk: &str, of_volumes: &[&str]) -> Result<()> {
        let peer_port = self.peer_port;
        let mut volumes = String::new();
        for (nr, (letter, options)) in ('a'..='z').zip(of_volumes).enumerate() {
            volumes += &format!(
                "\x20volume {nr} {{ device minor {nr}; disk /dev/vd{letter}; \
                 meta-disk internal; disk {{ {options} }} }}\n"
            );
        }
        let text = format!(
            "global {{ usage-count no; }}\n\
             resource r0 {{\n\
             {volumes}\
             \x20 net {{ socket-check-timeout 1; ping-timeout 30; {net} }}\n\
             \x20 disk {{ resync-rate 200M; c-plan-ahead 0; {disk} }}\n\
             \x20 on alpha {{ address {GUEST}:{PORT}; }}\n\
             \x20 on bravo {{ address {HOST}:{peer_port}; }}\n\
             }}\n"
        );
        self.guest.put("/etc/drbd.conf", text.as_bytes())
    }

    /// Makes new meta-data and brings the resource up.
    ///
    /// # Errors
    /// A tool refuses.
    pub fn create(&self) -> Result<()> {
        self.guest.ok("drbdadm create-md --force r0 2>&1 && drbdadm up r0").map(drop)
    }

    /// Both connections, with the kernel having spoken first.
    ///
    /// # Errors
    /// The kernel does not listen.
    pub fn connect(&self) -> Result<ScriptedPeer> {
        ScriptedPeer::connect_within(self.port, DEADLINE)
    }

    /// The line of volume 0 in `/proc/drbd`.
    ///
    /// # Errors
    /// There is no such volume.
    pub fn shown(&self) -> Result<Shown> {
        self.shown_of(0)
    }

    /// A volume's line of `/proc/drbd`.
    ///
    /// # Errors
    /// There is no such volume.
    pub fn shown_of(&self, volume: u16) -> Result<Shown> {
        let text = self.guest.proc_drbd()?;
        let line = text.lines().find(|l| l.trim_start().starts_with(&format!("{volume}: ")));
        let line = line.with_context(|| format!("no minor {volume} in {text}"))?;
        if line.contains("Unconfigured") {
            bail!("minor {volume} is not configured");
        }
        let field = |name: &str| {
            let word = line.split_whitespace().find_map(|w| w.strip_prefix(name));
            word.map(str::to_owned).with_context(|| format!("no {name} in {line}"))
        };
        Ok(Shown { cstate: field("cs:")?, roles: field("ro:")?, disks: field("ds:")? })
    }

    /// Waits for a connection state.
    ///
    /// # Errors
    /// It does not come.
    pub fn wait_cstate(&self, cstate: &str, deadline: Duration) -> Result<String> {
        self.guest.wait_for(&format!("grep -q '^ 0: cs:{cstate} ' /proc/drbd"), deadline)
    }

    /// Compares the beginning of the backing disk of volume 0 with this.
    ///
    /// # Errors
    /// It differs.
    pub fn compare(&self, expected: &[u8]) -> Result<()> {
        self.compare_of(0, expected)
    }

    /// Compares the beginning of the backing disk of a volume with this.
    ///
    /// # Errors
    /// It differs.
    pub fn compare_of(&self, volume: u16, expected: &[u8]) -> Result<()> {
        let image = self.guest.disk_image(usize::from(volume)).context("no disk")?;
        let found = fs::read(image)?;
        let found = found.get(..expected.len()).context("the disk is shorter")?;
        let bad = expected.chunks(4096).zip(found.chunks(4096)).position(|(a, b)| a != b);
        ensure!(bad.is_none(), "contents differ, first in block {bad:?}");
        Ok(())
    }
}
