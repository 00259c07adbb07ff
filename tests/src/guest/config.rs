//! What a guest consists of.

use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Result;

/// A disk of a guest.
#[derive(Clone, Debug)]
pub enum Disk {
    /// A new, empty one of so many bytes; goes away with the guest.
    Size(u64),
    /// An existing raw image, which stays.
    Image(PathBuf),
}

/// What the guest's second network card is connected to.
#[derive(Clone, Debug)]
pub enum Link {
    /// The host's loopback.
    Host,
    /// Another guest.
    Wire {
        /// Address of this end, with prefix length.
        address: String,
        /// UDP port of this end, on the host.
        local: u16,
        /// UDP port of the other end.
        remote: u16,
    },
}

/// What to boot.
#[derive(Clone, Debug)]
pub struct Config {
    pub(super) name: String,
    pub(super) disks: Vec<Disk>,
    pub(super) link: Link,
    pub(super) modules: Vec<String>,
    pub(super) memory_mib: u32,
    pub(super) capture: Option<PathBuf>,
}

impl Config {
    /// A guest with this host name, without disks, linked to the host, with drbd loaded.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            disks: Vec::new(),
            link: Link::Host,
            modules: vec!["drbd".to_owned()],
            memory_mib: 512,
            capture: capture_of(name),
        }
    }

    /// One disk more.
    #[must_use]
    pub fn disk(mut self, disk: Disk) -> Self {
        self.disks.push(disk);
        self
    }

    /// Another link.
    #[must_use]
    pub fn link(mut self, link: Link) -> Self {
        self.link = link;
        self
    }

    /// Modules to load instead of drbd. There are brd, dm-delay, dm-flakey, loop, nbd, null_blk,
    /// ublk_drv and more.
    #[must_use]
    pub fn modules(mut self, modules: &[&str]) -> Self {
        self.modules = modules.iter().map(|m| (*m).to_owned()).collect();
        self
    }

    /// Main memory.
    #[must_use]
    pub const fn memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// A file that receives all frames of the link, in pcap form.
    #[must_use]
    pub fn capture(mut self, file: &Path) -> Self {
        self.capture = Some(file.to_owned());
        self
    }
}

/// Names a folder that gets a capture of the link of every guest.
const CAPTURES: &str = "DRBDRS_CAPTURE_DIR";

fn capture_of(name: &str) -> Option<PathBuf> {
    static GUESTS: AtomicU32 = AtomicU32::new(0);
    let nr = GUESTS.fetch_add(1, Ordering::Relaxed);
    let file = format!("{}-{nr}-{name}.pcap", std::process::id());
    std::env::var_os(CAPTURES).map(|folder| Path::new(&folder).join(file))
}

/// The two ends of a wire between two guests.
#[derive(Clone, Debug)]
pub struct Pair {
    /// For one guest: 192.168.7.1.
    pub one: Link,
    /// For the other: 192.168.7.2.
    pub other: Link,
}

impl Pair {
    /// A new wire.
    ///
    /// # Errors
    /// No ports are free.
    pub fn new() -> Result<Self> {
        // Both are held until both are known, so they differ.
        let sockets = [UdpSocket::bind("127.0.0.1:0")?, UdpSocket::bind("127.0.0.1:0")?];
        let [a, b] = [sockets[0].local_addr()?.port(), sockets[1].local_addr()?.port()];
        let end = |host, local, remote| Link::Wire {
            address: format!("192.168.7.{host}/24"),
            local,
            remote,
        };
        Ok(Self { one: end(1, a, b), other: end(2, b, a) })
    }
}
