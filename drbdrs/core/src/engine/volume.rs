//! One volume of a resource: its states, its disk, and everything that is under way on it.

use drbd_types::{
    Cstate, Dstate, Fields, Gi, Minor, Sector, SectorCount, SectorRange, Tick, VolumeNr,
};
use drbd_wire::packet::Uuids;
use drbdmeta::layout::Layout;
use drbdmeta::superblock::Superblock;

use crate::al::ActivityLog;
use crate::bitmap::Bitmap;
use crate::config::{DiskConfig, ResyncConfig};
use crate::event::{DiskLimits, Opened};
use crate::generation::Slots;
use crate::latency::Latencies;
use crate::resync::extents::RsExtents;

use super::app::AppQueues;
use super::claims::Claims;
use super::peer_write::PeerWrites;
use super::resume::Resumable;
use super::resync::ResyncRun;
use super::serve::Serves;
use super::stats::VolumeStats;

/// A volume.
pub(super) struct Volume {
    pub(super) nr: VolumeNr,
    pub(super) minor: Minor,
    /// The state vector. The three suspend bits are those of the resource, copied here.
    pub(super) state: Fields,
    /// Settings of the disk; the defaults while there is none.
    pub(super) config: DiskConfig,
    /// From Attaching until Diskless is left behind.
    pub(super) disk: Option<Disk>,
    /// Size of the device.
    pub(super) size: SectorCount,
    /// Identity of the data that the application sees. Spec: states §3.7.
    pub(super) exposed: Gi,
    /// The application counts on writes that an own disk of this generation does not have: only the
    /// peer acknowledged them.
    pub(super) lacking: Option<Gi>,
    /// The same of the peer's disk: they were only reported to it when the own disk failed.
    pub(super) peer_lacking: Option<Gi>,
    /// The peer's last P_UUIDS of this connection.
    pub(super) peer_uuids: Option<Uuids>,
    /// d_size of the peer's last P_SIZES; survives disconnects.
    pub(super) peer_size: SectorCount,
    /// max_bio_size of the peer's last P_SIZES, bytes; 0: never heard.
    pub(super) peer_max_bio: u32,
    /// Set bits that went out with the own last P_UUIDS.
    pub(super) bits_sent: u64,
    /// What an attach would have led to without a peer: disk and peer's disk. Spec: states §6.2.
    pub(super) candidate: Option<(Dstate, Dstate)>,
    pub(super) marks: Marks,
    /// Users that have the device open.
    pub(super) users: u32,
    /// A volume that this one depends on (`resync-after`) is syncing.
    pub(super) must_wait: bool,
    /// Last sequence number sent, and highest seen. Spec: io-path §5.5.
    pub(super) seq_out: u32,
    pub(super) seq_in: u32,
    /// Reasons why new application I/O waits for a moment (attach, resize, bitmap I/O ...).
    pub(super) holds: u32,
    /// The state mutex. Spec: states §2.6.
    pub(super) is_locked: bool,
    /// The peer's answer to an own P_STATE_CHG_REQ.
    pub(super) reply: Option<i32>,
    /// Settings of resync and verify that are in force: own ones, or what the peer sent last.
    pub(super) rates: ResyncConfig,
    pub(super) app: AppQueues,
    pub(super) peer_writes: PeerWrites,
    pub(super) serves: Serves,
    pub(super) resync: ResyncRun,
    pub(super) extents: RsExtents,
    pub(super) claims: Claims,
    pub(super) stats: VolumeStats,
    pub(super) latencies: Latencies,
    /// Ahead is to end then.
    pub(super) ahead_return_at: Option<Tick>,
    /// When the disk was attached.
    pub(super) attached_at: Tick,
    /// A promotion is complete: applications may write.
    pub(super) is_open_for_use: bool,
    /// What was announced to applications last.
    pub(super) offered: Option<crate::action::DeviceOffer>,
}

/// Volatile flags. Spec: states §0, "Volatile flags".
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Marks {
    pub(super) crashed_primary: bool,
    pub(super) uuid_on_thaw: bool,
    pub(super) degraded_wfc: bool,
    /// This node went down as Primary, and nobody else can have written since. See [`resume`].
    ///
    /// [`resume`]: super::resume
    pub(super) resumable: Option<Resumable>,
    pub(super) consider_resync: bool,
    pub(super) resize_pending: bool,
    pub(super) grow_resync_due: bool,
    pub(super) al_suspended: bool,
    /// Something may have been written while the activity log was suspended; no flush came since.
    pub(super) wrote_without_log: bool,
    pub(super) discard_mine: bool,
    pub(super) was_io_error: bool,
    pub(super) was_read_error: bool,
    pub(super) force_detach: bool,
    pub(super) before_handler_done: bool,
    /// A new generation has to be stable before anything that the peer does not get is completed.
    pub(super) generation_due: bool,
    /// A new generation begins with the first write of a Primary without a disk that has come with
    /// this connection: it may still refuse this disk, because it has seen newer data.
    pub(super) generation_on_write: bool,
    /// The own disk has failed and the peer does not know yet. What it gets without knowing, it does
    /// not mark, and this disk may not be able to.
    pub(super) failure_untold: bool,
    /// As its last P_STATE says.
    pub(super) peer_is_connected: bool,
    /// The own current UUID was sent to the peer at least once: it is no secret any more.
    pub(super) current_is_known: bool,
}

/// An attached disk.
pub(super) struct Disk {
    /// As it is to be on disk; `is_dirty` says whether it is.
    pub(super) superblock: Superblock,
    pub(super) is_dirty: bool,
    /// Since when it is dirty, for the 5 s limit.
    pub(super) dirty_since: Option<Tick>,
    pub(super) layout: Layout,
    pub(super) opened: Opened,
    /// The largest size that this disk can offer.
    pub(super) max_size: SectorCount,
    pub(super) bitmap: Bitmap,
    pub(super) al: ActivityLog,
    /// What of the meta-data is being written.
    pub(super) writing: super::meta::Writing,
    /// Data I/O that the disk has not answered.
    pub(super) in_flight: u32,
    /// No more I/O is given to it; it is being left.
    pub(super) is_failing: bool,
    /// It was written without an activity log, and may have been lost on the way.
    pub(super) needs_full_sync: bool,
    /// Size that the bitmap is made for.
    pub(super) bitmap_size: SectorCount,
}

impl Disk {
    pub(super) const fn limits(&self) -> &DiskLimits {
        &self.opened.limits
    }

    /// Has the bitmap changed since it was written?
    pub(super) fn has_unwritten_bits(&self) -> bool {
        self.writing.has_pages() || self.bitmap.next_changed(0).is_some()
    }

    /// The four identifiers.
    pub(super) const fn slots(&self) -> Slots {
        let sb = &self.superblock;
        Slots { current: sb.current, bitmap: sb.bitmap, history: sb.history }
    }
}

impl Volume {
    pub(super) fn new(nr: VolumeNr, minor: Minor, conn: Cstate) -> Self {
        let config = DiskConfig::default();
        Self {
            nr,
            minor,
            state: Fields { conn, ..Fields::NEW },
            rates: config.resync,
            config,
            disk: None,
            size: SectorCount(0),
            exposed: Gi(0),
            lacking: None,
            peer_lacking: None,
            peer_uuids: None,
            peer_size: SectorCount(0),
            peer_max_bio: 0,
            bits_sent: 0,
            candidate: None,
            marks: Marks::default(),
            users: 0,
            must_wait: false,
            seq_out: 0,
            seq_in: 0,
            holds: 0,
            is_locked: false,
            reply: None,
            app: AppQueues::default(),
            peer_writes: PeerWrites::default(),
            serves: Serves::default(),
            resync: ResyncRun::new(DiskConfig::default().resync),
            extents: RsExtents::new(),
            claims: Claims::default(),
            stats: VolumeStats::default(),
            latencies: Latencies::default(),
            ahead_return_at: None,
            attached_at: Tick(0),
            is_open_for_use: false,
            offered: None,
        }
    }

    /// Data and meta-data may be used.
    pub(super) fn has_disk(&self) -> bool {
        self.state.disk >= Dstate::Inconsistent && self.disk.is_some()
    }

    /// Set bits; 0 without disk.
    pub(super) fn dirty_bits(&self) -> u64 {
        self.disk.as_ref().map_or(0, |disk| disk.bitmap.count())
    }

    /// The identifiers; empty without disk.
    pub(super) fn slots(&self) -> Slots {
        self.disk.as_ref().map_or_else(Slots::default, Disk::slots)
    }

    /// The next sequence number.
    pub(super) const fn next_seq(&mut self) -> u32 {
        self.seq_out = self.seq_out.wrapping_add(1);
        self.seq_out
    }

    /// Marks a range as different on both nodes. Rounds outwards.
    pub(super) fn set_out_of_sync(&mut self, range: SectorRange) {
        let size = self.size;
        let Some(disk) = self.disk.as_mut() else { return };
        let bits = range.bits_touched();
        let end = bits.end.0.min(size.bits_ceil().0);
        if bits.start.0 >= end {
            return;
        }
        disk.bitmap.set(bits.start.0..end);
        let start = Sector(bits.start.0 * 8);
        let blocks = SectorRange::new(start, SectorCount((end - bits.start.0) * 8));
        if let Some(blocks) = blocks {
            self.claims.marked(blocks);
        }
    }

    /// The peer's generations are in its last P_UUIDS.
    pub(super) fn peer_slots(&self) -> Option<Slots> {
        let peer = self.peer_uuids?;
        Some(Slots { current: peer.current, bitmap: peer.bitmap, history: peer.history })
    }
}
