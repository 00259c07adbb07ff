//! The end of a resync, good or bad. Spec: io-path-and-resync.md §8.9; states-and-generations.md
//! §3.4, §11.3.

use alloc::format;

use drbd_types::{BitCount, Cstate, Dstate, Fields, VolumeNr};

use crate::action::Handler;
use crate::engine::after::Work;
use crate::engine::change::Opt;
use crate::engine::proc::Cx;
use crate::engine::{Core, call_handler, fence, meta, timers};
use crate::log_line::Severity;
use crate::resync::progress::{ChecksumLine, DoneLine, Run};

impl Core {
    /// Is nothing left? The target notices; below version 96 the source does too.
    pub(super) fn check_finished(&mut self, nr: VolumeNr) {
        let version = self.conn.version;
        let Some(volume) = self.volume(nr) else { return };
        let conn = volume.state.conn;
        let is_done = volume.dirty_bits() <= volume.resync.failed;
        let decides = match conn {
            Cstate::SyncTarget | Cstate::PausedSyncT => true,
            Cstate::SyncSource | Cstate::PausedSyncS => version <= 95 || volume.resync.target_done,
            _ => false,
        };
        if is_done && decides {
            self.queue_finish(nr);
        }
    }

    pub(in crate::engine) fn queue_finish(&mut self, nr: VolumeNr) {
        let Some(volume) = self.volume_mut(nr) else { return };
        if !core::mem::replace(&mut volume.resync.is_finishing, true) {
            self.queue_work(Work::FinishResync { nr });
        }
    }

    /// The connection is gone, or the disk: what was asked for will not come.
    pub(in crate::engine) fn cancel_resync(&mut self, nr: VolumeNr) {
        let Some(volume) = self.volume_mut(nr) else { return };
        let run = &mut volume.resync;
        run.asked.clear();
        run.writing.clear();
        run.next_step = None;
        run.unacknowledged = 0;
        run.unacknowledged_sectors = 0;
        run.bitmap_position = None;
        run.failed = 0;
        run.is_finishing = false;
        run.target_done = false;
        run.controller.start();
        volume.extents.clear();
        self.touch();
    }
}

/// P_STATE of a target that is done. Returns whether that ends the resync now. If it comes before
/// the last acknowledgement is processed, it is remembered: the original ignores it then and stays
/// SyncSource for ever. Spec: wire-protocol.md §9.5.
pub(in crate::engine) fn on_target_done(core: &mut Core, nr: VolumeNr) -> bool {
    if let Some(volume) = core.volume_mut(nr) {
        volume.resync.target_done = true;
    }
    core.check_finished(nr);
    core.volume(nr).is_some_and(|v| v.resync.is_finishing)
}

/// The worker ends a resync. Spec §8.9; states §11.3.
pub(in crate::engine) async fn finish(cx: &Cx, nr: VolumeNr) {
    let _ = meta::write_bitmap(cx, nr).await;
    // No request is in progress any more.
    cx.until(move |core| {
        let is_over = core.state(nr).conn <= Cstate::Connected;
        let is_quiet = core.volume(nr).is_none_or(|v| {
            v.resync.asked.is_empty() && v.resync.writing.is_empty() && v.serves.is_resync_idle()
        });
        (is_over || is_quiet).then_some(())
    })
    .await;
    if !timers::ping(cx).await || !cx.with(|core| core.state(nr).conn.is_sync()) {
        return;
    }
    let (old, failed) = cx.with(|core| core.finish_numbers(nr));
    let was_target = matches!(old.conn, Cstate::SyncTarget | Cstate::PausedSyncT);
    cx.with(|core| {
        let mut new = Fields { conn: Cstate::Connected, ..core.state(nr) };
        // The target may know of failures that this node has not counted.
        let has_failed = failed > 0 || core.volume(nr).is_some_and(|v| v.dirty_bits() > 0);
        if has_failed {
            if was_target {
                (new.disk, new.pdsk) = (Dstate::Inconsistent, Dstate::UpToDate);
            } else {
                (new.disk, new.pdsk) = (Dstate::UpToDate, Dstate::Inconsistent);
            }
        } else {
            (new.disk, new.pdsk) = (Dstate::UpToDate, Dstate::UpToDate);
            core.finish_generations(nr, was_target);
        }
        let _ = core.set_state(nr, new, Opt::VERBOSE);
        if let Some(volume) = core.volume_mut(nr) {
            volume.resync.failed = 0;
            volume.resync.progress = None;
            volume.resync.next_step = None;
            volume.resync.is_finishing = false;
            volume.resync.target_done = false;
        }
    });
    let _ = meta::sync(cx, nr).await;
    if old.conn == Cstate::SyncSource {
        fence::unfence(cx, nr).await;
    }
    if was_target {
        call_handler(cx, Handler::AfterResyncTarget, Some(nr)).await;
    }
}

impl Core {
    /// The lines at the end of a run.
    fn finish_numbers(&mut self, nr: VolumeNr) -> (Fields, u64) {
        let now = self.now;
        let state = self.state(nr);
        let Some(volume) = self.volume(nr) else { return (state, 0) };
        let (failed, equal, with_checksums) =
            (volume.resync.failed, volume.resync.equal, volume.resync.use_checksums);
        let progress = volume.resync.progress.clone();
        if let Some(progress) = progress {
            self.info(nr, format!("{}", DoneLine(Run::Resync, progress.finished(now))));
            if with_checksums {
                let total = progress.total();
                self.info(nr, format!("{}", ChecksumLine { equal: BitCount(equal), total }));
            }
        }
        if failed > 0 {
            self.log(Severity::Error, Some(nr), format!("            {failed} failed blocks"));
        }
        (state, failed)
    }

    /// Both nodes have the same generations now. Spec: states §3.4.
    fn finish_generations(&mut self, nr: VolumeNr, was_target: bool) {
        let peer = self.volume(nr).and_then(|v| v.peer_slots());
        match peer {
            Some(peer) if was_target => {
                self.change_slots(nr, |slots, role| slots.finish_as_target(&peer, role));
            }
            None if was_target => {
                self.log(Severity::Error, Some(nr), "no peer UUIDs at the end of the resync");
            }
            _ => {}
        }
        self.change_slots(nr, |slots, _| slots.clear_bitmap());
        self.log_slots(nr, "updated UUIDs");
        let slots = self.volume(nr).map(|v| v.slots());
        if let Some(volume) = self.volume_mut(nr)
            && let (Some(uuids), Some(slots)) = (&mut volume.peer_uuids, slots)
        {
            uuids.current = slots.current;
            uuids.bitmap = slots.bitmap;
            uuids.history = slots.history;
            // The peer has these identifiers too.
            volume.marks.current_is_known = true;
        }
    }
}
