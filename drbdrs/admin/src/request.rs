//! What can be asked of the daemon.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{OptionError, OptionSet, Section};

/// One line to the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Envelope {
    /// [`crate::VERSION`].
    pub version: u32,
    /// The client gives up after so many milliseconds; absent: never. The daemon stops waiting
    /// then, too; what has been begun is not undone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// The request.
    pub request: Request,
}

/// Whom a request is about: `{"minor":0}`, `{"resource":"r0"}` or `"all"`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// One volume.
    Minor(u32),
    /// A resource; for commands that work on volumes every volume of it, in ascending order.
    Resource(String),
    /// Everything.
    All,
}

/// As the original shows the object of a command.
impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Minor(minor) => write!(f, "{minor}"),
            Self::Resource(name) => f.write_str(name),
            Self::All => f.write_str("all"),
        }
    }
}

/// Kind of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
    /// Sockets direct protocol; IPv4 addresses.
    Sdp,
    /// Dolphin super sockets; IPv4 addresses.
    Ssocks,
}

impl Family {
    /// The word in configurations.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ipv4 => "ipv4",
            Self::Ipv6 => "ipv6",
            Self::Sdp => "sdp",
            Self::Ssocks => "ssocks",
        }
    }
}

/// One end of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Address {
    /// Kind.
    pub family: Family,
    /// The numeric address without brackets, for IPv6 possibly with `%zone`.
    pub addr: String,
    /// Port.
    pub port: u16,
}

/// `ipv4 192.168.7.1:7789`, `ipv6 [fe80::1]:7789`.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (family, addr, port) = (self.family.name(), &self.addr, self.port);
        match self.family {
            Family::Ipv6 => write!(f, "{family} [{addr}]:{port}"),
            Family::Ipv4 | Family::Sdp | Family::Ssocks => write!(f, "{family} {addr}:{port}"),
        }
    }
}

/// Where the meta-data is on its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MetaIndex {
    /// At the end of the data disk.
    Internal,
    /// Alone on its device.
    Flexible,
    /// In this slot of 128 MiB.
    Index(u32),
}

/// A request. The tag `command` is the word of `drbdsetup` where there is one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Creates a resource.
    NewResource {
        /// Its name.
        resource: String,
        /// Section `options`.
        #[serde(default)]
        options: OptionSet,
    },
    /// Changes options of a resource.
    ResourceOptions {
        /// Which.
        resource: String,
        /// What is not named gets its default.
        #[serde(default)]
        set_defaults: bool,
        /// Section `options`.
        #[serde(default)]
        options: OptionSet,
    },
    /// Removes a resource without volumes and connection.
    DelResource {
        /// Which.
        resource: String,
    },
    /// Creates a volume.
    NewMinor {
        /// Of this resource.
        resource: String,
        /// Its minor number.
        minor: u32,
        /// Its volume number.
        volume: u16,
    },
    /// Removes a Diskless, Secondary volume.
    DelMinor {
        /// Which.
        minor: u32,
    },
    /// Attaches a disk.
    Attach {
        /// To which volume.
        minor: u32,
        /// The data disk.
        disk: String,
        /// The meta-data device; the same as `disk` for internal meta-data.
        meta_disk: String,
        /// The place on it.
        meta_index: MetaIndex,
        /// Section `disk`.
        #[serde(default)]
        options: OptionSet,
    },
    /// Changes options of a disk.
    DiskOptions {
        /// Of which volumes.
        target: Target,
        /// What is not named gets its default.
        #[serde(default)]
        set_defaults: bool,
        /// Section `disk`, without `size` and `max-bio-bvecs`.
        #[serde(default)]
        options: OptionSet,
    },
    /// Detaches the disk.
    Detach {
        /// Of which volumes.
        target: Target,
        /// Without waiting for the disk.
        #[serde(default)]
        force: bool,
    },
    /// Configures the connection and tries it.
    Connect {
        /// Of which resource.
        resource: String,
        /// Own end.
        local: Address,
        /// The peer's end.
        peer: Address,
        /// Section `net`.
        #[serde(default)]
        options: OptionSet,
        /// Give up the own changes of a split brain; one attempt.
        #[serde(default)]
        discard_my_data: bool,
        /// Only find out what would happen.
        #[serde(default)]
        tentative: bool,
    },
    /// Changes options of a connection.
    NetOptions {
        /// Own end.
        local: Address,
        /// The peer's end.
        peer: Address,
        /// What is not named gets its default.
        #[serde(default)]
        set_defaults: bool,
        /// Section `net`.
        #[serde(default)]
        options: OptionSet,
    },
    /// Ends a connection.
    Disconnect {
        /// Own end.
        local: Address,
        /// The peer's end.
        peer: Address,
        /// Without asking the peer.
        #[serde(default)]
        force: bool,
    },
    /// Disconnects, detaches, removes the volumes and the resource.
    Down {
        /// A resource, or all of them.
        target: Target,
    },
    /// Makes this node Primary.
    Primary {
        /// For which volumes.
        target: Target,
        /// Data that is not known to be good is declared good.
        #[serde(default)]
        force: bool,
    },
    /// Makes this node Secondary.
    Secondary {
        /// For which volumes.
        target: Target,
    },
    /// Fetches all data of this node anew.
    Invalidate {
        /// Which volumes.
        target: Target,
    },
    /// Sends all data of the peer anew.
    InvalidateRemote {
        /// Which volumes.
        target: Target,
    },
    /// Declares the own data old.
    Outdate {
        /// Which volumes.
        target: Target,
    },
    /// Starts online verify.
    Verify {
        /// Which volumes.
        target: Target,
        /// First sector; absent: where the last run was interrupted.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        start: Option<u64>,
        /// Sector behind the last.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        stop: Option<u64>,
    },
    /// Pauses the resync.
    PauseSync {
        /// Which volumes.
        target: Target,
    },
    /// Lets the resync go on.
    ResumeSync {
        /// Which volumes.
        target: Target,
    },
    /// Lets application I/O wait.
    SuspendIo {
        /// Which volumes.
        target: Target,
    },
    /// Lets application I/O go on.
    ResumeIo {
        /// Which volumes.
        target: Target,
    },
    /// Begins a new data generation.
    NewCurrentUuid {
        /// Which volumes.
        target: Target,
        /// Both disks are declared equal.
        #[serde(default)]
        clear_bitmap: bool,
    },
    /// Uses another size of the disks.
    Resize {
        /// Which volumes.
        target: Target,
        /// Sectors; 0: as large as possible.
        #[serde(default)]
        size: u64,
        /// The peer is not asked.
        #[serde(default)]
        assume_peer_has_space: bool,
        /// The new part is not resynced.
        #[serde(default)]
        assume_clean: bool,
        /// Stripes of the activity log; absent: as they are.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        al_stripes: Option<u32>,
        /// Size of a stripe in KiB; absent: as it is.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        al_stripe_size_kib: Option<u32>,
    },
    /// The state of everything asked for: answered by one snapshot.
    Status {
        /// What is wanted.
        target: Target,
    },
    /// The same, and then every change: answered by a snapshot and then by updates, helper calls,
    /// progress and skips, until the client closes the connection.
    Watch {
        /// What is wanted; something that does not exist yet may come.
        target: Target,
    },
    /// What waits for what, and since when, as text.
    ShowStuck {
        /// What is wanted.
        target: Target,
    },
    /// What a resource does or waits for, why, and what to do next, as text.
    Why {
        /// A resource or all.
        target: Target,
    },
    /// Switches a fault on, for rehearsals. The status is loud about it.
    FaultSet {
        /// Which.
        fault: Fault,
    },
    /// Switches faults off.
    FaultClear {
        /// Number of the fault, as the snapshot shows it; absent: all.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        id: Option<u32>,
    },
}

/// A fault for rehearsals.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "fault", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Fault {
    /// A disk misbehaves.
    Disk {
        /// Of which volume.
        minor: u32,
        /// Which operations.
        operation: DiskOperation,
        /// Only requests that touch these sectors: first, and how many.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        sectors: Option<(u64, u64)>,
        /// How often, of 1000.
        permille: u16,
        /// What happens; `cut` is not for disks.
        effect: Effect,
    },
    /// A stream to the peer misbehaves.
    Stream {
        /// Of which resource.
        resource: String,
        /// Which of the two.
        stream: NetStream,
        /// What happens; `error` is not for streams.
        effect: Effect,
    },
    /// Packets of a type are held until the fault is cleared.
    HoldPacket {
        /// Of which resource.
        resource: String,
        /// Name of the packet in the protocol, e.g. `P_BARRIER_ACK`.
        packet: String,
    },
}

/// Operations of disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskOperation {
    /// All of them.
    Any,
    /// Reads of data.
    Read,
    /// Writes of data.
    Write,
    /// Flushes.
    Flush,
    /// Discards and zero-outs.
    Discard,
    /// Reads of meta-data.
    MetaRead,
    /// Writes of meta-data.
    MetaWrite,
}

/// What a fault does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Effect {
    /// I/O error.
    Error,
    /// So many milliseconds later.
    DelayMs(u32),
    /// Not before the fault is cleared.
    Stall,
    /// The socket is closed.
    Cut,
}

/// One of the two streams of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetStream {
    /// Data.
    Data,
    /// Acknowledgements and pings.
    Meta,
}

impl Request {
    /// An envelope without time limit around the request.
    #[must_use]
    pub const fn enveloped(self) -> Envelope {
        Envelope { version: crate::VERSION, timeout_ms: None, request: self }
    }

    /// Are names and values of options possible? The daemon asks this before it does anything;
    /// [`crate::wire::request`] includes it.
    ///
    /// # Errors
    /// The first that is not.
    pub fn check(&self) -> Result<(), OptionError> {
        let name = match self {
            Self::NewResource { resource, options } => {
                options.check(Section::Options)?;
                Some(resource)
            }
            Self::ResourceOptions { resource, options, .. } => {
                options.check(Section::Options)?;
                Some(resource)
            }
            Self::Connect { resource, options, .. } => {
                options.check(Section::Net)?;
                Some(resource)
            }
            Self::DelResource { resource } | Self::NewMinor { resource, .. } => Some(resource),
            Self::NetOptions { options, .. } => options.check(Section::Net).map(|()| None)?,
            Self::Attach { options, .. } => options.check(Section::Disk).map(|()| None)?,
            Self::DiskOptions { options, .. } => {
                let fixed = ["size", "max-bio-bvecs"].iter().find(|n| options.0.contains_key(**n));
                if let Some(name) = fixed {
                    return Err(OptionError::Unknown((*name).into()));
                }
                options.check(Section::Disk).map(|()| None)?
            }
            _ => None,
        };
        // Such names would break the lines of every status output, or lead out of a directory.
        let is_bad = |name: &&String| {
            name.is_empty() || name.contains('/') || name.chars().any(char::is_control)
        };
        match name.filter(is_bad) {
            Some(name) => Err(OptionError::Name(name.clone())),
            None => Ok(()),
        }
    }

    /// Changes nothing: allowed to everybody who can reach the socket, and while another command
    /// of the same volume runs.
    #[must_use]
    pub const fn is_read_only(&self) -> bool {
        matches!(
            self,
            Self::Status { .. } | Self::Watch { .. } | Self::ShowStuck { .. } | Self::Why { .. }
        )
    }
}
