//! A consistent moment of the engine, for status views.
//! Spec: status-and-integration.md; io-path-and-resync.md §12.

use alloc::vec::Vec;

use drbd_types::units::SECTORS_PER_BIT;
use drbd_types::{Cstate, Dstate, Fields, Minor, Sector, SectorCount, SectorRange, VolumeNr};

use crate::generation::Slots;
use crate::generation::explain::Reason;
use crate::resync::progress::{Shown, left_to_sync};

use super::Engine;

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
    /// Rule and reason of the last handshake.
    pub last_decision: Option<(u32, Reason)>,
    /// The wanted rate of the resync, KiB/s.
    pub wanted_rate: u64,
    /// Memory of the bitmap, bytes.
    pub bitmap_memory: usize,
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
            let now = core.now;
            let numbers: Vec<VolumeNr> = core.all_volumes();
            let volumes = numbers
                .into_iter()
                .filter_map(|nr| {
                    let pending = u64::from(core.pending_of_peer(nr));
                    let volume = core.volume(nr)?;
                    let dirty = volume.dirty_bits();
                    let left = match &volume.resync.verify {
                        Some(run) => drbd_types::BitCount(run.left),
                        None => left_to_sync(
                            drbd_types::BitCount(dirty),
                            drbd_types::BitCount(volume.resync.failed),
                        ),
                    };
                    let owed = volume.peer_writes.owed() + volume.serves.owed();
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
                        local_pending: u64::from(core.data_in_flight(nr)),
                        peer_pending: pending,
                        owed: u64::try_from(owed).unwrap_or(u64::MAX),
                        app_pending: u64::from(volume.app.admitted),
                        waiting: u64::try_from(volume.app.waiting.len()).unwrap_or(u64::MAX),
                        out_of_sync_bits: dirty,
                        progress: volume.resync.progress.as_ref().map(|p| p.shown(now, left)),
                        al_suspended: volume.marks.al_suspended,
                        last_decision: volume.stats.last_decision,
                        wanted_rate: volume.resync.controller.want(),
                        bitmap_memory: volume.disk.as_ref().map_or(0, |d| d.bitmap.memory()),
                    })
                })
                .collect();
            Status {
                conn: core.conn.level,
                version: (version >= 86).then_some(version),
                epochs: core.peer_epochs.count(),
                ordering: core.peer_epochs.ordering.letter(),
                volumes,
            }
        })
    }
}
