//! What a simulator may look at: invariants inside the engine, and who waits for what.
//! Compiled for tests only (feature `check`). Spec: io-path-and-resync.md §15.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use drbd_types::{AlExtentNr, Cstate, Dstate, RsExtentNr, VolumeNr};

use super::Engine;
use super::volume::Volume;
use crate::request::Request;
use crate::request::progress::Local;
use crate::resync::extents::al_extents_of;

impl Engine {
    /// Invariants that hold after every event; what is broken, in words.
    pub fn audit(&self) -> Vec<String> {
        let mut found = Vec::new();
        self.procs.with(|core| {
            for volume in core.volumes.values() {
                let nr = volume.nr;
                if let Some(disk) = &volume.disk {
                    let counted = disk.bitmap.recount();
                    if counted != disk.bitmap.count() {
                        let says = disk.bitmap.count();
                        found.push(format!("volume {nr}: {counted} bits set, {says} counted (15)"));
                    }
                }
                let admitted = volume.app.admitted as usize;
                let is_open = |r: &Request| r.volume == nr && !r.is_completed;
                let open = core.log.iter().filter(|(_, r)| is_open(r)).count();
                let queued = volume.app.queued();
                if admitted != open + queued {
                    found.push(format!(
                        "volume {nr}: ap is {admitted}, but {open} in the log and {queued} before"
                    ));
                }
                found.extend(core.audit_references(volume));
                found.extend(core.audit_locks(volume));
                found.extend(core.audit_reads(volume));
            }
        });
        found
    }

    /// Invariants of a system in which nothing is under way (7); what is broken, in words.
    pub fn audit_idle(&self) -> Vec<String> {
        let mut found = Vec::new();
        self.procs.with(|core| {
            let mut is = |what: &str, ok: bool| {
                if !ok {
                    found.push(String::from(what));
                }
            };
            is("the log is not empty", core.log.is_empty());
            is("ep is not 1", core.peer_epochs.count() == 1);
            is("sectors in flight", core.conn.sectors_in_flight == 0);
            is("I/O without answer", core.ios.is_empty());
            is("remote reads", core.conn.read_data.is_empty());
            is("sends without token", core.conn.sent_tokens.is_empty());
            is("packets without receiver", core.conn.queue.is_empty());
            is("answers that nobody fetches", core.answers.is_empty());
            is("unfinished work", core.work.is_empty());
            for volume in core.volumes.values() {
                let nr = volume.nr;
                let mut is = |what: &str, ok: bool| is(&format!("volume {nr}: {what}"), ok);
                is("ap is not 0", volume.app.admitted == 0);
                is("requests wait", volume.app.waiting.is_empty() && volume.app.queued() == 0);
                is("writes in the conflict tree", volume.app.tree.is_empty());
                is("writes of the peer", volume.peer_writes.is_empty());
                is("reads for the peer", !core.has_serves(nr));
                is("resync answers are awaited", volume.resync.pending() == 0);
                is("resync extents are held", volume.extents.is_idle());
                is("I/O is held", volume.holds == 0);
                is("the state is locked", !volume.is_locked);
                if let Some(disk) = &volume.disk {
                    is("AL references", disk.al.is_idle());
                    is("data I/O is counted", disk.in_flight == 0);
                    is("meta-data is being written", !disk.writing.is_busy());
                }
            }
        });
        found
    }

    /// Is the bit of a block set? `None` without disk.
    pub fn is_dirty(&self, volume: u16, bit: u64) -> Option<bool> {
        self.procs.with(|core| {
            let disk = core.volumes.get(VolumeNr(volume))?.disk.as_ref()?;
            Some(disk.bitmap.is_set(bit))
        })
    }

    /// Is an extent recorded in the activity log?
    pub fn is_hot(&self, volume: u16, extent: u32) -> bool {
        self.procs.with(|core| {
            let disk = core.volumes.get(VolumeNr(volume)).and_then(|v| v.disk.as_ref());
            disk.is_some_and(|disk| disk.al.is_hot(AlExtentNr(extent)))
        })
    }

    /// Is a write to one of these sectors under way, of the application or of the peer's?
    pub fn is_being_written(&self, volume: u16, sectors: drbd_types::SectorRange) -> bool {
        self.procs.with(|core| {
            let own = core.log.iter().any(|(_, r)| {
                r.volume.0 == volume && r.kind.is_write() && r.range.overlaps(sectors)
            });
            let other = core.volumes.get(VolumeNr(volume)).is_some_and(|v| {
                // A write that had to give way and is done again is in flight all the time.
                v.peer_writes.touches(sectors)
                    || v.app.begun_writes().any(|range| range.overlaps(sectors))
            });
            own || other
        })
    }

    /// Grows with every change of a state.
    pub fn state_version(&self) -> u64 {
        self.procs.with(|core| core.state_version)
    }

    /// The state of a volume.
    pub fn state(&self, volume: u16) -> Option<drbd_types::Fields> {
        self.procs.with(|core| core.volumes.get(VolumeNr(volume)).map(|v| v.state))
    }

    /// Set bits of a volume.
    pub fn dirty_bits(&self, volume: u16) -> u64 {
        self.procs.with(|core| core.volumes.get(VolumeNr(volume)).map_or(0, Volume::dirty_bits))
    }

    /// Is a connection configured?
    pub fn has_net(&self) -> bool {
        self.procs.with(|core| core.conn.net.is_some())
    }

    /// Requests in the log.
    pub fn log_len(&self) -> usize {
        self.procs.with(|core| core.log.len())
    }

    /// Who waits for what.
    pub fn waits(&self) -> Vec<String> {
        let mut lines = Vec::new();
        self.procs.with(|core| {
            let conn = &core.conn;
            lines.push(format!(
                "connection {:?}: up {}, state sent {}, locked {}, receiver idle {}, queue {:?}, \
                 epochs {:?}, work {:?} ({} of {} done), open epoch {}, last sent {:?}, \
                 stale requests {}",
                conn.level,
                conn.is_up,
                conn.state_sent,
                conn.is_locked,
                conn.is_receiver_idle,
                conn.queue.iter().map(|r| &r.packet).collect::<Vec<_>>(),
                core.peer_epochs,
                core.work,
                core.work_done,
                core.work_queued,
                core.log.open_epoch(),
                core.sent_epoch,
                conn.has_stale_requests,
            ));
            for (_, request) in core.log.iter() {
                lines.push(format!("  in the log: {request:?}"));
            }
            for (_, io) in core.ios.iter() {
                lines.push(format!("  I/O without answer: {io:?}"));
            }
            for volume in core.volumes.values() {
                lines.push(format!(
                    "  volume {}: {:?} holds {} locked {} marks {:?} waiting {} ap {} {} \
                     peer writes {} serves {} resync {} extents held {} bits {} of {}",
                    volume.nr,
                    volume.state,
                    volume.holds,
                    volume.is_locked,
                    volume.marks,
                    volume.app.waiting.len(),
                    volume.app.admitted,
                    volume.app.describe(),
                    volume.peer_writes.describe(),
                    volume.serves.describe(),
                    volume.resync.describe(),
                    volume.extents.held(),
                    volume.dirty_bits(),
                    volume.disk.as_ref().map_or(0, |d| d.bitmap.bits()),
                ));
            }
        });
        lines
    }
}

impl super::Core {
    /// A write that only this node is known to have on stable storage keeps its extents hot, or its
    /// blocks are marked (11).
    fn audit_references(&self, volume: &Volume) -> Option<String> {
        // What marks them is only on disk while that is being read.
        let disk = volume.disk.as_ref().filter(|_| volume.state.disk > Dstate::Attaching)?;
        let is_safe = |request: &Request| {
            let bits = request.range.bits_touched();
            let extents = request.range.al_extents_touched();
            let are_hot = extents.clone().all(|e| disk.al.in_use(Self::al_extent(e)));
            are_hot || disk.bitmap.count_in(bits.start.0..bits.end.0) == bits.end.0 - bits.start.0
        };
        let (_, request) = self.log.iter().find(|(_, r)| {
            let is_local = r.volume == volume.nr && r.progress.local == Local::Ok;
            is_local && r.progress.is_unacknowledged_mirror() && !is_safe(r)
        })?;
        Some(format!("volume {}: {request:?} is neither hot nor marked (11)", volume.nr))
    }

    /// What a target still lacks is not read from its own disk (33).
    fn audit_reads(&self, volume: &Volume) -> Option<String> {
        let disk = volume.disk.as_ref()?;
        let is_target = volume.state.disk == Dstate::Inconsistent
            && matches!(volume.state.conn, Cstate::SyncTarget | Cstate::PausedSyncT);
        let began = volume.resync.progress.as_ref()?.started();
        // One that set out before was right when it did.
        let is_stale = |request: &Request| {
            let bits = request.range.bits_touched();
            !request.kind.is_write()
                && request.since > began
                && request.progress.local == Local::Pending
                && disk.bitmap.count_in(bits.start.0..bits.end.0) > 0
        };
        let (_, request) =
            self.log.iter().find(|(_, r)| is_target && r.volume == volume.nr && is_stale(r))?;
        Some(format!("volume {}: {request:?} reads what is out of date (33)", volume.nr))
    }

    /// No write of this node is in flight where a resync works (31).
    fn audit_locks(&self, volume: &Volume) -> Option<String> {
        let disk = volume.disk.as_ref()?;
        // The answers to what the peer asked before it lost its disk reach nobody.
        if volume.state.pdsk < Dstate::Inconsistent {
            return None;
        }
        let is_written =
            |extent: &RsExtentNr| al_extents_of(*extent).any(|extent| disk.al.in_use(extent));
        let extent = volume.extents.locked().find(is_written)?;
        Some(format!("volume {}: a write in the locked extent {extent:?} (31)", volume.nr))
    }
}

impl super::app::AppQueues {
    /// Admitted requests that are not in the log.
    fn queued(&self) -> usize {
        self.al_queue.len() + self.in_batch() + self.conflicting.len() + self.flushes.len()
    }

    fn describe(&self) -> String {
        format!(
            "(for the log {} + {}, conflicting {}, flushes {:?})",
            self.al_queue.len(),
            self.in_batch(),
            self.conflicting.len(),
            self.flushes.iter().map(|(_, f)| *f).collect::<Vec<_>>()
        )
    }
}
