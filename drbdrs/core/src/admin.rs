//! Commands of the administrator, as they reach the engine.
//! Spec: states-and-generations.md §8.4, §9.1, §11.1; config-and-drbdadm.md.

use alloc::boxed::Box;
use alloc::string::String;

use drbd_types::{Minor, Sector, SectorCount, VolumeNr};

use crate::config::{DiskConfig, NetConfig, ResourceConfig};

/// One command for one resource.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// A volume is added, Diskless.
    NewVolume {
        /// Its number.
        volume: VolumeNr,
        /// Its minor number.
        minor: Minor,
    },
    /// A volume that is Diskless and Secondary is removed.
    DelVolume(VolumeNr),
    /// A disk is attached.
    Attach {
        /// Of which volume.
        volume: VolumeNr,
        /// How.
        config: Box<DiskConfig>,
    },
    /// A disk is detached.
    Detach {
        /// Of which volume.
        volume: VolumeNr,
        /// Without waiting for the disk or the peer.
        force: bool,
    },
    /// The connection is configured and tried.
    Connect(Box<NetConfig>),
    /// The connection is ended.
    Disconnect {
        /// Without asking the peer.
        force: bool,
    },
    /// The volume becomes Primary.
    Primary {
        /// Which.
        volume: VolumeNr,
        /// Data that is not known to be good is declared good.
        force: bool,
    },
    /// The volume becomes Secondary.
    Secondary(VolumeNr),
    /// All data of this node is fetched anew.
    Invalidate(VolumeNr),
    /// All data of the peer is sent anew.
    InvalidateRemote(VolumeNr),
    /// The data is declared old.
    Outdate(VolumeNr),
    /// Online verify.
    Verify {
        /// Which volume.
        volume: VolumeNr,
        /// From here; `None`: where the last run was interrupted.
        start: Option<Sector>,
        /// To here.
        stop: Option<Sector>,
    },
    /// The resync pauses.
    PauseSync(VolumeNr),
    /// The resync goes on.
    ResumeSync(VolumeNr),
    /// I/O waits.
    SuspendIo(VolumeNr),
    /// I/O goes on.
    ResumeIo(VolumeNr),
    /// A new data generation is declared.
    NewCurrentUuid {
        /// Which volume.
        volume: VolumeNr,
        /// Both nodes are declared equal.
        clear_bitmap: bool,
    },
    /// The device takes another size.
    Resize {
        /// Which volume.
        volume: VolumeNr,
        /// 0: as large as possible.
        size: SectorCount,
        /// The peer is not asked.
        force: bool,
        /// The new part is not resynced.
        assume_clean: bool,
        /// Its activity log takes another shape.
        al: AlChange,
    },
    /// Options of the resource change.
    ResourceOptions(ResourceConfig),
    /// Options of the connection change.
    NetOptions(Box<NetConfig>),
    /// Options of a disk change.
    DiskOptions {
        /// Of which volume.
        volume: VolumeNr,
        /// All of them.
        config: Box<DiskConfig>,
    },
}

/// Another shape of the activity log. What is not given stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AlChange {
    /// Number of stripes.
    pub stripes: Option<u32>,
    /// Length of one stripe in blocks of 4 KiB.
    pub stripe_blocks: Option<u32>,
}

/// How a command ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// Positive: done (1, 2: nothing to do). Negative or above 101: refused; the numbers and
    /// texts are those of `drbd_types::refusal`.
    pub code: i32,
    /// More lines for the user.
    pub info: Option<String>,
}
