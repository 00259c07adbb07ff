//! Settings of a resource, as the engine uses them. The daemon fills them from drbd.conf; ranges
//! and defaults are those of `conf::options`, and the defaults here are the same.
//! Spec: config-and-drbdadm.md, wire-protocol.md §13.4, io-path-and-resync.md §11.

use alloc::string::String;

use drbd_types::{Deciseconds, Minor, SectorCount};

use crate::generation::decide::RrConflict;
use crate::generation::splitbrain::Policies;

/// When a write counts as done on the peer. Spec: io-path-and-resync.md §1.8.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Protocol {
    /// When it is handed to the transport.
    A,
    /// When the peer has received it.
    B,
    /// When the peer has written it.
    #[default]
    C,
}

impl Protocol {
    /// The number on the wire.
    pub const fn number(self) -> u32 {
        match self {
            Self::A => 1,
            Self::B => 2,
            Self::C => 3,
        }
    }

    /// From the number on the wire.
    pub const fn from_number(number: u32) -> Option<Self> {
        match number {
            1 => Some(Self::A),
            2 => Some(Self::B),
            3 => Some(Self::C),
            _ => None,
        }
    }
}

/// What happens to a Primary that loses its peer. Spec: states-and-generations.md §7.1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fencing {
    /// Nothing.
    #[default]
    DontCare,
    /// The peer is outdated by a handler.
    ResourceOnly,
    /// The same, and I/O waits until it is.
    ResourceAndStonith,
}

/// What happens to a disk with an error. Spec: states-and-generations.md §6.4.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnIoError {
    /// It stays attached, Inconsistent.
    PassOn,
    /// The handler `local-io-error` is called, then as for detach.
    CallLocalIoError,
    /// It is detached.
    #[default]
    Detach,
}

/// What happens without access to good data. Spec: states-and-generations.md §7.6.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnNoData {
    /// Requests fail.
    #[default]
    IoError,
    /// Requests wait.
    SuspendIo,
}

/// Who serves reads. Spec: io-path-and-resync.md §4.1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReadBalancing {
    /// This node whenever it can.
    #[default]
    PreferLocal,
    /// The peer whenever it can.
    PreferRemote,
    /// In turns.
    RoundRobin,
    /// Whoever has less to do.
    LeastPending,
    /// The peer when the own disk is congested.
    WhenCongestedRemote,
    /// By stripes of this size: log2 of bytes, 15..=20.
    Striping(u8),
}

/// What a Primary does when the peer is too slow. Spec: io-path-and-resync.md §10.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnCongestion {
    /// It waits.
    #[default]
    Block,
    /// It stops mirroring.
    PullAhead,
    /// It disconnects.
    Disconnect,
}

/// Settings of the connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// `protocol`.
    pub protocol: Protocol,
    /// `timeout`.
    pub timeout: Deciseconds,
    /// `ko-count`; 0: never.
    pub ko_count: u32,
    /// `connect-int`, seconds.
    pub connect_int: u32,
    /// `ping-int`, seconds.
    pub ping_int: u32,
    /// `ping-timeout`.
    pub ping_timeout: Deciseconds,
    /// `socket-check-timeout`; 0: as `ping-timeout`.
    pub socket_check_timeout: Deciseconds,
    /// `max-buffers`, pages of 4 KiB.
    pub max_buffers: u32,
    /// `max-epoch-size`, writes.
    pub max_epoch_size: u32,
    /// `allow-two-primaries`.
    pub two_primaries: bool,
    /// `always-asbp`.
    pub always_asbp: bool,
    /// `after-sb-0pri`, `after-sb-1pri`, `after-sb-2pri`.
    pub after_sb: Policies,
    /// `rr-conflict`.
    pub rr_conflict: RrConflict,
    /// `cram-hmac-alg`; empty: none.
    pub cram_hmac_alg: String,
    /// `shared-secret`.
    pub shared_secret: Secret,
    /// `data-integrity-alg`; empty: none.
    pub integrity_alg: String,
    /// `verify-alg`; empty: none.
    pub verify_alg: String,
    /// `csums-alg`; empty: none.
    pub csums_alg: String,
    /// `csums-after-crash-only`.
    pub csums_after_crash_only: bool,
    /// `use-rle`.
    pub use_rle: bool,
    /// `on-congestion`.
    pub on_congestion: OnCongestion,
    /// `congestion-fill`; 0: off.
    pub congestion_fill: SectorCount,
    /// `congestion-extents`.
    pub congestion_extents: u32,
    /// `--discard-my-data` of the connect command: one attempt only.
    pub discard_my_data: bool,
    /// `--tentative` of the connect command.
    pub tentative: bool,
    /// Protocol versions that are offered to the peer; within 86..=101.
    pub versions: (u32, u32),
    /// Features that are offered to the peer; within 0..=15.
    pub features: u32,
}

impl Default for NetConfig {
    fn default() -> Self {
        Self {
            protocol: Protocol::C,
            timeout: Deciseconds(60),
            ko_count: 7,
            connect_int: 10,
            ping_int: 10,
            ping_timeout: Deciseconds(5),
            socket_check_timeout: Deciseconds(0),
            max_buffers: 2048,
            max_epoch_size: 2048,
            two_primaries: false,
            always_asbp: false,
            after_sb: Policies::default(),
            rr_conflict: RrConflict::default(),
            cram_hmac_alg: String::new(),
            shared_secret: Secret::default(),
            integrity_alg: String::new(),
            verify_alg: String::new(),
            csums_alg: String::new(),
            csums_after_crash_only: false,
            use_rle: true,
            on_congestion: OnCongestion::Block,
            congestion_fill: SectorCount(0),
            congestion_extents: 1237,
            discard_my_data: false,
            tentative: false,
            versions: (86, 101),
            features: 15,
        }
    }
}

/// A shared secret; it is never printed.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret(pub String);

impl core::fmt::Debug for Secret {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("***")
    }
}

/// Settings of a resource.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ResourceConfig {
    /// `on-no-data-accessible`.
    pub on_no_data: OnNoData,
}

/// Settings of a volume's disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// `size`; 0: as large as possible.
    pub size: SectorCount,
    /// `on-io-error`.
    pub on_io_error: OnIoError,
    /// `fencing`.
    pub fencing: Fencing,
    /// `disk-flushes`.
    pub disk_flushes: bool,
    /// `disk-drain`.
    pub disk_drain: bool,
    /// `md-flushes`.
    pub md_flushes: bool,
    /// `al-extents`.
    pub al_extents: u16,
    /// `al-updates`.
    pub al_updates: bool,
    /// `read-balancing`.
    pub read_balancing: ReadBalancing,
    /// `resync-after`.
    pub resync_after: Option<Minor>,
    /// Rates of resync and verify.
    pub resync: ResyncConfig,
    /// `c-min-rate`, KiB/s; local, never sent.
    pub c_min_rate: u32,
    /// `disk-timeout`; 0: never.
    pub disk_timeout: Deciseconds,
    /// `rs-discard-granularity`, bytes; 0: off.
    pub rs_discard_granularity: u32,
    /// `discard-zeroes-if-aligned`.
    pub discard_zeroes_if_aligned: bool,
}

impl Default for DiskConfig {
    fn default() -> Self {
        Self {
            size: SectorCount(0),
            on_io_error: OnIoError::Detach,
            fencing: Fencing::DontCare,
            disk_flushes: true,
            disk_drain: true,
            md_flushes: true,
            al_extents: 1237,
            al_updates: true,
            read_balancing: ReadBalancing::PreferLocal,
            resync_after: None,
            resync: ResyncConfig::default(),
            c_min_rate: 250,
            disk_timeout: Deciseconds(0),
            rs_discard_granularity: 0,
            discard_zeroes_if_aligned: true,
        }
    }
}

/// The settings that the two nodes swap when they connect (P_SYNC_PARAM).
/// Spec: io-path-and-resync.md §8.5.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResyncConfig {
    /// `resync-rate`, KiB/s.
    pub resync_rate: u32,
    /// `c-plan-ahead`, 0.1 s; 0: the fixed rate is used.
    pub c_plan_ahead: u32,
    /// `c-delay-target`, 0.1 s.
    pub c_delay_target: u32,
    /// `c-fill-target`, sectors.
    pub c_fill_target: u32,
    /// `c-max-rate`, KiB/s.
    pub c_max_rate: u32,
}

impl Default for ResyncConfig {
    fn default() -> Self {
        Self {
            resync_rate: 250,
            c_plan_ahead: 20,
            c_delay_target: 10,
            c_fill_target: 100,
            c_max_rate: 102_400,
        }
    }
}
