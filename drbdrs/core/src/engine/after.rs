//! Consequences of state changes, carried out one after the other in the order of the changes by
//! one procedure, the worker. Spec: states-and-generations.md §2.9, §2.10.
//!
//! Each step is named after its row of the specification. P_STATE always carries the new state of
//! that change, even if more changes have happened since.

use alloc::vec::Vec;

use drbd_types::{Cstate, Dstate, Fields, Role, StateWord, VolumeNr};
use drbdmeta::superblock::Flags;

use crate::action::{Action, Handler};
use crate::log_line::Severity;
use crate::state::facts;

use super::change::{Opt, Wanted};
use super::proc::Cx;
use super::resync::Side;
use super::{
    Core, attach, bitmap_exchange, call_handler, fence, generations, meta, resync, verify,
};

/// One piece of work.
#[derive(Clone, Copy, Debug)]
pub(super) enum Work {
    /// The state of a volume changed.
    Volume { nr: VolumeNr, old: Fields, new: Fields },
    /// The state of the connection changed.
    Connection { old: Cstate, new: Cstate },
    /// A resync begins.
    StartResync { nr: VolumeNr, side: Side },
    /// A resync has nothing left to do.
    FinishResync { nr: VolumeNr },
    /// A verify has nothing left to do.
    FinishVerify { nr: VolumeNr },
    /// The source sends its bitmap.
    SendBitmap { nr: VolumeNr },
    /// Bits were cleared: changed pages may be written.
    WriteBitmap { nr: VolumeNr },
    /// A superblock is to be written: it has been dirty for too long, or somebody waits for it.
    Sync { nr: VolumeNr, is_late: bool },
}

impl Core {
    pub(super) fn queue_work(&mut self, work: Work) {
        self.work_queued += 1;
        self.work.push_back(work);
        self.touch();
    }
}

/// The worker: lives as long as the engine.
pub(super) async fn worker(cx: Cx) {
    loop {
        // It stays in front until it is done.
        let work = cx.until(|core| core.work.front().copied()).await;
        match work {
            Work::Volume { nr, old, new } => after_volume(&cx, nr, &old, &new).await,
            Work::Connection { old, new } => after_connection(&cx, old, new).await,
            Work::StartResync { nr, side } => resync::start(&cx, nr, side).await,
            Work::FinishResync { nr } => resync::finish(&cx, nr).await,
            Work::FinishVerify { nr } => verify::finish(&cx, nr).await,
            Work::SendBitmap { nr } => bitmap_exchange::send_as_source(&cx, nr).await,
            Work::WriteBitmap { nr } => {
                let _ = meta::write_bitmap(&cx, nr).await;
            }
            Work::Sync { nr, is_late } => {
                cx.with(|core| {
                    let text = "md_sync_timer expired! Worker calls drbd_md_sync().";
                    if is_late {
                        core.log(Severity::Warn, Some(nr), text);
                    }
                });
                let _ = meta::sync(&cx, nr).await;
            }
        }
        cx.with(|core| {
            core.work.pop_front();
            core.work_done += 1;
            core.touch();
        });
    }
}

async fn after_volume(cx: &Cx, nr: VolumeNr, old: &Fields, new: &Fields) {
    // A2
    let both = |s: &Fields| s.disk == Dstate::UpToDate && s.pdsk == Dstate::UpToDate;
    if !both(old) && both(new) {
        cx.with(|core| {
            if let Some(volume) = core.volume_mut(nr) {
                volume.marks.crashed_primary = false;
                volume.marks.uuid_on_thaw = false;
                if let Some(uuids) = &mut volume.peer_uuids {
                    uuids.flags &= !2;
                }
                // Stored with the next write, not only with the next change (defect D9).
                let state = volume.state;
                core.follow_flags_now(nr, &state);
            }
        });
    }
    // A3
    let is_lost = |s: &Fields| {
        s.role == Role::Primary && s.disk < Dstate::UpToDate && s.pdsk < Dstate::UpToDate
    };
    if !is_lost(old) && is_lost(new) {
        call_handler(cx, Handler::PriOnInconDegr, Some(nr)).await;
    }
    thaw(cx, old); // A4, A5
    // A6
    if !facts::is_source(old) && facts::is_source(new) && cx.with(|core| core.conn.version >= 96) {
        resync::send_sync_uuid(cx, nr).await;
    }
    // A7
    if old.pdsk == Dstate::Diskless && new.pdsk > Dstate::Diskless && new.pdsk != Dstate::DUnknown {
        cx.with(|core| {
            core.reset_resync_counters(nr);
            core.send_uuids(nr, 0);
            core.send_state(nr, *new);
        });
    }
    // A8: behind the state that announces it.
    if old.conn != Cstate::WFBitMapS && new.conn == Cstate::WFBitMapS {
        cx.with(|core| core.queue_work(Work::SendBitmap { nr }));
    }
    // A9, A10
    if cx.with(|core| core.volume(nr).is_some_and(|v| v.marks.generation_due)) {
        generations::begin(cx, nr).await;
    }
    // A11, A12
    let was_peer_primary = old.peer == Role::Primary && new.peer == Role::Secondary;
    let was_primary = old.role == Role::Primary && new.role == Role::Secondary;
    let writes = cx.with(|core| {
        core.volume(nr).is_some_and(|v| v.has_disk())
            && (core.is_still_marked_primary(nr)
                || (new.pdsk < Dstate::Inconsistent && was_peer_primary)
                || (was_primary && core.state(nr).conn <= Cstate::Connected))
    });
    if writes && meta::write_bitmap(cx, nr).await.is_ok() {
        cx.with(|core| {
            let state = core.state(nr);
            core.follow_flags_now(nr, &state);
        });
    }
    announce(cx, nr, old, new); // A13 to A17
    // A18
    let starting = matches!(new.conn, Cstate::StartingSyncS | Cstate::StartingSyncT);
    if starting && old.conn != new.conn {
        start_full_sync(cx, nr, new).await;
    }
    // A19, A20
    if old.disk != Dstate::Failed && new.disk == Dstate::Failed {
        attach::disk_failed(cx, nr, new).await;
    }
    if old.disk != Dstate::Diskless && new.disk == Dstate::Diskless {
        attach::disk_gone(cx, nr, new).await;
    }
    finish_steps(cx, nr, old, new).await; // A21 to A28
}

/// A4, A5: requests that were frozen go on.
///
/// Not while a handshake runs: what was sent on the connection before may have to be sent again, and
/// nothing that is new may overtake it.
fn thaw(cx: &Cx, old: &Fields) {
    cx.with(|core| {
        if !core.is_suspended() {
            return;
        }
        let all_connected = core.are_all_connected();
        if all_connected {
            // The original forgets requests that only the administrator had suspended (defect 14.7).
            core.resend_frozen();
        }
        let reconnected = old.conn < Cstate::Connected && all_connected;
        // The original hangs if good data comes back in another way, as by a resync.
        let has_data = |s: &Fields| {
            s.role != Role::Primary || s.disk == Dstate::UpToDate || s.pdsk == Dstate::UpToDate
        };
        // What a volume wrote alone meanwhile, without a generation of its own, the peer would miss.
        let shakes_hands = core.conn.level >= Cstate::WFReportParams && !all_connected;
        let regained = !shakes_hands
            && !core.owes_resend()
            && core.volumes.values().all(|v| has_data(&v.state));
        let is_set =
            |core: &Core, flag: fn(&Fields) -> bool| core.volumes.values().any(|v| flag(&v.state));
        if is_set(core, |s| s.susp_nod) && (reconnected || regained) {
            core.restart_frozen();
            let _ = core.set_conn(Wanted::flag(StateWord::SUSP_NOD, false), Opt::HARD);
        }
        if is_set(core, |s| s.susp_fen) && all_connected {
            for volume in core.volumes.values_mut() {
                volume.marks.uuid_on_thaw &= facts::writes_alone(&volume.state);
            }
            let _ = core.set_conn(Wanted::flag(StateWord::SUSP_FEN, false), Opt::HARD);
        }
    });
}

/// A13 to A17: what the peer is told.
fn announce(cx: &Cx, nr: VolumeNr, old: &Fields, new: &Fields) {
    cx.with(|core| {
        let is_connected = new.conn >= Cstate::Connected;
        // A13
        if is_connected && old.disk == Dstate::Attaching && new.disk == Dstate::Negotiating {
            core.send_sizes(nr, false, 0);
            core.send_uuids(nr, 0);
            core.send_state(nr, *new);
        }
        // A14
        if is_connected && (old.aftr_isp != new.aftr_isp || old.user_isp != new.user_isp) {
            core.send_state(nr, *new);
        }
        // A16
        if old.conn == Cstate::WFReportParams && is_connected {
            core.send_state(nr, *new);
        }
        // A17 is done where the state becomes Ahead: before the first P_OUT_OF_SYNC.
    });
}

/// A18: a full resync that the administrator asked for.
async fn start_full_sync(cx: &Cx, nr: VolumeNr, new: &Fields) {
    cx.with(|core| core.hold_io(nr));
    let written = meta::set_all_bits(cx, nr).await;
    cx.with(|core| {
        core.release_io(nr);
        if written.is_err() {
            let text = "Writing the bitmap failed not starting resync.";
            core.log(Severity::Error, Some(nr), text);
            let state = Fields { conn: Cstate::Connected, ..core.state(nr) };
            let _ = core.set_state(nr, state, Opt::VERBOSE);
        } else if new.conn == Cstate::StartingSyncT {
            let state = Fields { conn: Cstate::WFSyncUUID, ..core.state(nr) };
            let _ = core.set_state(nr, state, Opt::VERBOSE);
        }
    });
    if written.is_ok() && new.conn == Cstate::StartingSyncS {
        resync::start(cx, nr, Side::Source).await;
    }
}

/// A21 to A28.
async fn finish_steps(cx: &Cx, nr: VolumeNr, old: &Fields, new: &Fields) {
    let is_connected = new.conn >= Cstate::Connected;
    let writes_bitmap = cx.with(|core| {
        // A21
        if old.disk == Dstate::UpToDate && new.disk == Dstate::Inconsistent && is_connected {
            core.send_state(nr, *new);
        }
        // A22
        if new.disk > Dstate::Negotiating
            && new.pdsk > Dstate::Negotiating
            && core.volume_mut(nr).is_some_and(|v| core::mem::take(&mut v.marks.grow_resync_due))
            && new.conn == Cstate::Connected
        {
            core.resync_new_storage(nr);
        }
        // A24
        if old.disk < Dstate::UpToDate
            && old.conn >= Cstate::SyncSource
            && new.conn == Cstate::Connected
        {
            core.send_state(nr, *new);
        }
        // A25
        let knows_stop = core.conn.version >= 97 && core.conn.version != 100;
        if old.conn == Cstate::VerifyS && new.conn == Cstate::Connected && knows_stop {
            core.send_state(nr, *new);
        }
        // A26
        let was_working = old.conn >= Cstate::StartingSyncS && old.conn <= Cstate::PausedSyncT;
        let is_over = new.conn == Cstate::Connected || new.conn >= Cstate::Ahead;
        was_working && is_over && core.volume(nr).is_some_and(|v| v.has_disk())
    });
    if writes_bitmap {
        let _ = meta::write_bitmap(cx, nr).await;
    }
    let _ = meta::sync(cx, nr).await; // A28
}

async fn after_connection(cx: &Cx, old: Cstate, new: Cstate) {
    if old == Cstate::Disconnecting && new == Cstate::StandAlone {
        cx.with(|core| {
            core.conn.net = None;
            core.out.push(Action::Changed);
        });
    }
    fence::after_connection(cx).await;
    meta::sync_all(cx).await;
}

impl Core {
    /// The stored flags follow a mark that changed without the state.
    pub(super) fn follow_flags_now(&mut self, nr: VolumeNr, state: &Fields) {
        let Some(volume) = self.volume_mut(nr).filter(|v| v.has_disk()) else { return };
        let crashed = volume.marks.crashed_primary;
        let Some(disk) = volume.disk.as_mut() else { return };
        let flags = facts::stored_flags(disk.superblock.flags, state, crashed);
        if flags != disk.superblock.flags {
            disk.superblock.flags = flags;
            self.mark_dirty(nr);
        }
    }

    /// Does the stored flag still say that this node, or its diskless peer, is Primary, because the
    /// bitmap was not written?
    fn is_still_marked_primary(&self, nr: VolumeNr) -> bool {
        self.volume(nr).is_some_and(|volume| {
            volume.disk.as_ref().is_some_and(|disk| {
                let flags = disk.superblock.flags;
                let crashed = volume.marks.crashed_primary;
                let wanted = facts::stored_flags(flags, &volume.state, crashed);
                flags.contains(Flags::PRIMARY) && !wanted.contains(Flags::PRIMARY)
            })
        })
    }

    /// New application I/O waits, until [`Self::release_io`].
    pub(super) fn hold_io(&mut self, nr: VolumeNr) {
        if let Some(volume) = self.volume_mut(nr) {
            volume.holds += 1;
        }
    }

    /// It goes on.
    pub(super) fn release_io(&mut self, nr: VolumeNr) {
        if let Some(volume) = self.volume_mut(nr) {
            volume.holds = volume.holds.saturating_sub(1);
        }
        self.touch();
    }

    /// Numbers of all volumes, for procedures.
    pub(super) fn all_volumes(&self) -> Vec<VolumeNr> {
        self.volume_numbers().collect()
    }
}
