//! A consistent moment of the engine, for status views.
//! Spec: status-and-integration.md; io-path-and-resync.md §12.

use alloc::vec::Vec;

use drbd_types::units::SECTORS_PER_BIT;
use drbd_types::{
    BitCount, Cstate, Dstate, Fields, Minor, Sector, SectorCount, SectorRange, Tick, VolumeNr,
};

use drbdmeta::superblock::Flags;

use crate::al::Counters;
use crate::config::DiskConfig;
use crate::generation::Slots;
use crate::latency::Latencies;
use crate::resync::progress::{Detail, Shown, left_to_sync};

use super::resume::Resumption;
pub use super::stats::{Met, MetSide};
use super::{Core, Engine};

/// One resource.
#[derive(Clone, Debug)]
pub struct Status {
    /// Connection-level state.
    pub conn: Cstate,
    /// Agreed version; `None` before the first agreement.
    pub version: Option<u32>,
    /// Open epochs of the receiving side.
    pub epochs: usize,
    /// Letter of the write ordering method.
    pub ordering: char,
    /// There is a network configuration.
    pub has_net: bool,
    /// More than half of the send buffer is in use.
    pub is_congested: bool,
    /// Sectors of application writes that the peer has not acknowledged.
    pub app_in_flight: u64,
    /// A change of the connection waits for the peer's answer.
    pub waits_for_peer: bool,
    /// Volumes, by number.
    pub volumes: Vec<VolumeStatus>,
}

/// One volume.
#[derive(Clone, Debug)]
pub struct VolumeStatus {
    /// Its number.
    pub nr: VolumeNr,
    /// Its minor number.
    pub minor: Minor,
    /// The state vector.
    pub state: Fields,
    /// Size of the device.
    pub size: SectorCount,
    /// The generations; empty without disk.
    pub slots: Slots,
    /// Users of the device.
    pub users: u32,
    /// Sectors sent, received, written, read.
    pub sent: u64,
    /// Sectors received.
    pub received: u64,
    /// Sectors written to the local disk.
    pub written: u64,
    /// Sectors read from the local disk.
    pub read: u64,
    /// Activity-log transactions.
    pub al_writes: u64,
    /// Local disk I/O under way.
    pub local_pending: u64,
    /// Answers expected from the peer.
    pub peer_pending: u64,
    /// Answers owed to the peer.
    pub owed: u64,
    /// Application requests under way.
    pub app_pending: u64,
    /// Application requests that wait to be admitted.
    pub waiting: u64,
    /// Set bits.
    pub out_of_sync_bits: u64,
    /// A resync or verify.
    pub progress: Option<Shown>,
    /// Activity-log updates rest.
    pub al_suspended: bool,
    /// The last handshake.
    pub met: Option<Met>,
    /// The wanted rate of the resync, KiB/s.
    pub wanted_rate: u64,
    /// Memory of the bitmap, bytes.
    pub bitmap_memory: usize,
    /// The same run as `progress`, not rounded.
    pub detail: Option<Detail>,
    /// Bit that the run has come to.
    pub position: u64,
    /// Where a verify began and ends, in sectors.
    pub verify: (u64, Option<u64>),
    /// Bits that could not be copied, and bits whose checksums were equal.
    pub failed_and_equal: (u64, u64),
    /// Sectors of resync requests without answer.
    pub resync_in_flight: u64,
    /// Settings of the disk in force.
    pub config: DiskConfig,
    /// Flags as they are, or are being, stored; `None` without disk.
    pub flags: Option<Flags>,
    /// Identity of the device in the meta-data; 0: none.
    pub device_uuid: u64,
    /// Crashed as Primary, and has not seen its peer since.
    pub crashed_primary: bool,
    /// Crashed as Primary without connection: `degr-wfc-timeout` applies.
    pub degraded_wfc: bool,
    /// May this node, which went down as Primary, be Primary again as if nothing had happened?
    pub resumption: Resumption,
    /// New application I/O is not accepted now.
    pub is_blocked: bool,
    /// Extents in use, places and counters of the activity log.
    pub activity_log: Option<(usize, u16, Counters)>,
    /// Resync extents that are locked.
    pub resync_extents: usize,
    /// Requests that wait for the activity log.
    pub blocked_on_log: u64,
    /// A change of the volume waits for the peer's answer.
    pub waits_for_peer: bool,
    /// The age of the oldest data I/O that the disk has not answered, microseconds.
    pub oldest_disk_io: Option<u64>,
    /// The age of the oldest application request, microseconds.
    pub oldest_request: Option<u64>,
    /// `resync-after` makes it wait.
    pub must_wait: bool,
    /// How long requests took.
    pub latencies: Latencies,
}

impl Engine {
    /// Which parts of a range are out of sync: runs of sectors from its start on, at most `most` of
    /// them, clear and set in turn. `None` without disk, or outside of the device.
    pub fn out_of_sync(
        &self,
        nr: VolumeNr,
        range: SectorRange,
        most: usize,
    ) -> Option<Vec<(SectorCount, bool)>> {
        self.procs.with(|core| {
            let volume = core.volume(nr)?;
            let bitmap = &volume.disk.as_ref()?.bitmap;
            if volume.state.disk < Dstate::Inconsistent || range.end() > Sector(volume.size.0) {
                return None;
            }
            let mut runs = Vec::new();
            let mut at = range.start;
            while at < range.end() && runs.len() < most {
                let bit = at.0 / SECTORS_PER_BIT;
                let is_set = bitmap.is_set(bit);
                let next = if is_set { bitmap.next_clear(bit) } else { bitmap.next_set(bit) };
                let end = next.map_or(u64::MAX, |next| next.saturating_mul(SECTORS_PER_BIT));
                let end = Sector(end).min(range.end());
                runs.push((SectorCount(end.0 - at.0), is_set));
                at = end;
            }
            Some(runs)
        })
    }

    /// The present moment.
    pub fn status(&self) -> Status {
        self.procs.with(|core| {
            let version = core.conn.version;
            let volumes = core.all_volumes().into_iter().filter_map(|nr| core.volume_status(nr));
            Status {
                conn: core.conn.level,
                version: (version >= 86).then_some(version),
                epochs: core.peer_epochs.count(),
                ordering: core.peer_epochs.ordering.letter(),
                has_net: core.conn.net.is_some(),
                is_congested: core.conn.is_send_congested,
                app_in_flight: core.conn.sectors_in_flight,
                waits_for_peer: core.conn.is_locked,
                volumes: volumes.collect(),
            }
        })
    }
}

impl Core {
    fn volume_status(&self, nr: VolumeNr) -> Option<VolumeStatus> {
        let now = self.now;
        let age = |since: Tick| now.0.saturating_sub(since.0);
        let volume = self.volume(nr)?;
        let run = &volume.resync;
        let disk = volume.disk.as_ref();
        let dirty = volume.dirty_bits();
        let bits = disk.map_or(0, |d| d.bitmap.bits());
        let left = match &run.verify {
            Some(verify) => BitCount(verify.left),
            None => left_to_sync(BitCount(dirty), BitCount(run.failed)),
        };
        let owed = volume.peer_writes.owed() + volume.serves.owed();
        let oldest_app = self.log.iter().filter(|(_, r)| r.volume == nr && !r.is_completed);
        let disk_ios = self.ios.iter().filter(|(_, io)| io.volume == nr);
        Some(VolumeStatus {
            nr,
            minor: volume.minor,
            state: volume.state,
            size: volume.size,
            slots: volume.slots(),
            users: volume.users,
            sent: volume.stats.ns,
            received: volume.stats.nr,
            written: volume.stats.dw,
            read: volume.stats.dr,
            al_writes: volume.stats.al_writes,
            local_pending: u64::from(self.data_in_flight(nr)),
            peer_pending: u64::from(self.pending_of_peer(nr)),
            owed: u64::try_from(owed).unwrap_or(u64::MAX),
            app_pending: u64::from(volume.app.admitted),
            waiting: u64::try_from(volume.app.waiting.len()).unwrap_or(u64::MAX),
            out_of_sync_bits: dirty,
            progress: run.progress.as_ref().map(|p| p.shown(now, left)),
            al_suspended: volume.marks.al_suspended,
            met: volume.stats.met,
            wanted_rate: run.controller.want(),
            bitmap_memory: disk.map_or(0, |d| d.bitmap.memory()),
            detail: run.progress.as_ref().map(|p| p.detail(now, left)),
            position: if run.verify.is_some() {
                bits.saturating_sub(left.0)
            } else {
                run.cursor().min(bits)
            },
            verify: (volume.stats.verify_start, volume.stats.verify_stop),
            failed_and_equal: (run.failed, run.equal()),
            resync_in_flight: run.sectors_asked(),
            config: volume.config.clone(),
            flags: disk.map(|d| d.superblock.flags),
            device_uuid: disk.map_or(0, |d| d.superblock.device_uuid),
            crashed_primary: volume.marks.crashed_primary,
            degraded_wfc: volume.marks.degraded_wfc,
            resumption: self.resumption(nr),
            is_blocked: !self.may_admit(nr),
            activity_log: disk.map(|d| (d.al.references(), d.al.slots(), d.al.counters())),
            resync_extents: volume.extents.held(),
            blocked_on_log: volume.app.waiting_for_log(),
            waits_for_peer: volume.is_locked,
            oldest_disk_io: disk_ios.map(|(_, io)| age(io.since)).max(),
            oldest_request: oldest_app.map(|(_, r)| age(r.since)).max(),
            must_wait: volume.must_wait,
            latencies: volume.latencies,
        })
    }
}
