//! P_STATE of the peer, and the decision about a resync that it may lead to.
//! Spec: states-and-generations.md §4.2, §4.3, §4.5.

use alloc::format;

use drbd_types::{Cstate, Dstate, Fields, Role, StateWord, VolumeNr};
use drbd_wire::packet::Features;

use crate::action;
use crate::generation::compare::{Correction, Extent, Link, Side};
use crate::generation::decide::{Decision, Handler, Handshake, Outcome, Step, decide};
use crate::log_line::Severity;
use crate::plant::{self, Bug};

use super::change::{Done, Opt};
use super::proc::Cx;
use super::stats::Met;
use super::{Core, call_handler, meta, resync, verify};

/// P_STATE. Returns false if the connection ends with a protocol error.
pub(super) async fn on_state(cx: &Cx, nr: VolumeNr, word: StateWord) -> bool {
    let Ok(packet) = word.unpack() else { return false };
    let real = cx.with(|core| {
        if let Some(volume) = core.volume_mut(nr) {
            volume.marks.peer_is_connected = packet.conn >= Cstate::Connected;
        }
        core.real_peer_disk(nr, &packet)
    });
    loop {
        let old = cx.with(|core| core.state(nr));
        match one_round(cx, nr, &packet, real, &old).await {
            Round::Again => {}
            Round::Over(ok) => return ok,
        }
    }
}

enum Round {
    /// The own state changed meanwhile.
    Again,
    Over(bool),
}

async fn one_round(cx: &Cx, nr: VolumeNr, packet: &Fields, real: Dstate, old: &Fields) -> Round {
    if old.conn <= Cstate::TearDown {
        return Round::Over(false);
    }
    let mut real = real;
    // Step 4: the end of a resync, as the target tells it.
    if matches!(old.pdsk, Dstate::Inconsistent | Dstate::Consistent)
        && real == Dstate::UpToDate
        && old.conn > Cstate::Connected
        && old.disk == Dstate::UpToDate
    {
        if packet.conn >= Cstate::StartingSyncS && packet.conn <= Cstate::WFSyncUUID {
            real = Dstate::Inconsistent;
        } else if old.conn == Cstate::Ahead {
            // It is about the time before the peer heard of that.
            real = old.pdsk;
        } else if old.conn >= Cstate::SyncSource && packet.conn == Cstate::Connected {
            if cx.with(|core| resync::on_target_done(core, nr)) {
                // The rest of the packet is about the time after the resync.
                return after_end(cx, nr).await;
            }
            real = Dstate::Inconsistent;
        }
    }
    // Not in the original, which stays SyncSource: the target ended with blocks that could not be
    // copied.
    if matches!(old.conn, Cstate::SyncSource | Cstate::PausedSyncS)
        && packet.conn == Cstate::Connected
        && packet.disk == Dstate::Inconsistent
        && cx.with(|core| core.volume(nr).is_some_and(|v| v.resync.has_target()))
    {
        cx.with(|core| core.queue_finish(nr));
        return after_end(cx, nr).await;
    }
    // Step 5: the end of a verify, as the other side tells it. Also if that has ended it because of
    // an error of its disk, which the original waits for in vain.
    if old.conn == Cstate::VerifyT
        && old.disk == Dstate::UpToDate
        && packet.conn == Cstate::Connected
        && matches!(real, Dstate::UpToDate | Dstate::Inconsistent)
    {
        cx.with(|core| verify::on_source_done(core, nr));
        return after_end(cx, nr).await;
    }
    if old.pdsk == Dstate::UpToDate
        && real == Dstate::Inconsistent
        && old.conn == Cstate::Connected
        && packet.conn > Cstate::SyncSource
    {
        real = Dstate::UpToDate;
    }
    if is_same_side(old.conn, packet.conn) {
        return cx.with(|core| drop_same_side(core, nr, Cstate::Disconnecting));
    }
    let mut conn = if old.conn == Cstate::WFReportParams { Cstate::Connected } else { old.conn };
    if packet.conn == Cstate::Ahead {
        conn = Cstate::Behind;
    }
    let mut peer_disk = real;
    if cx.with(|core| core.wants_decision(nr, packet, old)) {
        match decide_and_prepare(cx, nr, packet, real).await {
            // Of two attaches at a time one was decided with generations that are no more: a new
            // handshake knows better.
            Some(decided) if is_same_side(decided, packet.conn) => {
                return cx.with(|core| drop_same_side(core, nr, Cstate::NetworkFailure));
            }
            Some(decided) => conn = decided,
            None => match decision_failed(cx, nr, packet) {
                Failed::AttachHere => conn = Cstate::Connected,
                Failed::AttachThere => {
                    conn = Cstate::Connected;
                    peer_disk = Dstate::Diskless;
                }
                Failed::Connection(ok) => return Round::Over(ok),
            },
        }
    }
    if cx.with(|core| core.state(nr)) != *old && !is_own_attach_failure(cx, nr, old) {
        return Round::Again;
    }
    let ok = store(cx, nr, packet, old, conn, peer_disk).await;
    Round::Over(ok)
}

const fn is_same_side(own: Cstate, peer: Cstate) -> bool {
    matches!(
        (own, peer),
        (Cstate::WFBitMapS, Cstate::WFBitMapS) | (Cstate::WFBitMapT, Cstate::WFBitMapT)
    )
}

/// The original waits for ever then, for its own data or the peer's. A kernel may decide so.
fn drop_same_side(core: &mut Core, nr: VolumeNr, conn: Cstate) -> Round {
    let text = "The peer wants the same side of the resync, dropping connection!";
    core.log(Severity::Error, Some(nr), text);
    core.force_conn(conn);
    Round::Over(false)
}

/// A resync or verify is being ended by the worker: what the packet says besides is looked at
/// afterwards.
async fn after_end(cx: &Cx, nr: VolumeNr) -> Round {
    cx.until(move |core| {
        let conn = core.state(nr).conn;
        (!conn.is_sync() && !conn.is_verify()).then_some(())
    })
    .await;
    Round::Again
}

/// The decision itself made the own disk fail: that is no reason to decide again.
fn is_own_attach_failure(cx: &Cx, nr: VolumeNr, old: &Fields) -> bool {
    let now = cx.with(|core| core.state(nr));
    old.disk == Dstate::Negotiating && now == Fields { disk: now.disk, ..*old }
}

/// Steps 10 to 15.
async fn store(
    cx: &Cx,
    nr: VolumeNr,
    packet: &Fields,
    old: &Fields,
    conn: Cstate,
    peer_disk: Dstate,
) -> bool {
    let is_thaw_impossible = cx.with(|core| {
        if let Some(volume) = core.volume_mut(nr) {
            volume.marks.consider_resync = false;
        }
        // Step 12: the peer may have been started anew; what it had in memory is gone.
        peer_disk == Dstate::Consistent
            && core.state(nr).is_suspended()
            && conn == Cstate::Connected
            && old.conn < Cstate::Connected
            && core.volume(nr).is_some_and(|v| v.marks.uuid_on_thaw)
    });
    if is_thaw_impossible {
        abort_thaw(cx, nr).await;
        return false;
    }
    let result = cx.with(|core| {
        let mut new = core.state(nr);
        new.conn = conn;
        new.peer = packet.role;
        new.pdsk = peer_disk;
        new.peer_isp = packet.aftr_isp || packet.user_isp;
        let volume = core.volume(nr);
        let candidate = volume.and_then(|v| v.candidate);
        // Without its identifiers nothing is known about the peer's data: it did not take part in
        // the attach. The original takes the own disk for good then.
        let is_known =
            peer_disk < Dstate::Inconsistent || volume.is_some_and(|v| v.peer_uuids.is_some());
        if matches!(conn, Cstate::Connected | Cstate::WFBitMapS)
            && new.disk == Dstate::Negotiating
            && is_known
            // A packet that crossed the attach is no answer to it.
            && packet.pdsk >= Dstate::Negotiating
            && let Some((disk, _)) = candidate
        {
            new.disk = disk;
        }
        let is_new = old.conn < Cstate::Connected && conn >= Cstate::Connected;
        let opt = Opt { hard: !is_new, ..Opt::VERBOSE };
        core.set_state(nr, new, opt)
    });
    if result.is_err() {
        cx.with(|core| core.force_conn(Cstate::Disconnecting));
        return false;
    }
    cx.with(|core| {
        let now = core.state(nr);
        // Step 14: this node decided to resync, the peer has not noticed.
        if old.conn > Cstate::WFReportParams
            && now.conn > Cstate::Connected
            && packet.conn <= Cstate::Connected
            && packet.disk != Dstate::Negotiating
            && result == Ok(Done::Changed)
        {
            core.send_uuids(nr, 0);
            core.send_current_state(nr);
        }
        if let Some(volume) = core.volume_mut(nr) {
            volume.marks.discard_mine = false;
        }
    });
    let _ = meta::sync(cx, nr).await;
    true
}

async fn abort_thaw(cx: &Cx, nr: VolumeNr) {
    cx.with(|core| {
        let text = "Aborting Connect, can not thaw IO with an only Consistent peer";
        core.log(Severity::Error, Some(nr), text);
    });
    // Stable before any write that the peer may not have is reported as done; in all volumes, since
    // the requests of all of them end.
    for nr in cx.with(|core| core.all_volumes()) {
        let is_due = cx.with(|core| {
            // A volume that is connected already has forgotten that it was alone: its frozen writes
            // were to be sent again.
            let is_frozen = core.has_frozen_writes(nr);
            core.volume_mut(nr).is_some_and(|v| {
                core::mem::take(&mut v.marks.uuid_on_thaw)
                    || (is_frozen && v.state.disk == Dstate::UpToDate)
            })
        });
        if is_due {
            let _ = cx.with(|core| core.begin_generation(nr));
            let _ = meta::sync(cx, nr).await;
        }
    }
    cx.with(|core| {
        core.requests_lost_connection();
        let wanted = super::change::Wanted::conn(Cstate::ProtocolError);
        let susp = super::change::Wanted::flag(StateWord::SUSP, false);
        let wanted = super::change::Wanted {
            mask: StateWord(wanted.mask.0 | susp.mask.0),
            val: StateWord(wanted.val.0 | susp.val.0),
        };
        let _ = core.set_conn(wanted, Opt::HARD);
    });
}

enum Failed {
    /// The own attach is given up.
    AttachHere,
    /// The peer's attach is.
    AttachThere,
    /// The connection is; with a protocol error?
    Connection(bool),
}

/// Step 8, "failure".
fn decision_failed(cx: &Cx, nr: VolumeNr, packet: &Fields) -> Failed {
    cx.with(|core| {
        let own = core.state(nr).disk;
        if own == Dstate::Negotiating {
            let _ = core.force(nr, |s| s.disk = Dstate::Failed);
            return Failed::AttachHere;
        }
        if packet.disk == Dstate::Negotiating {
            let text = "Disk attach process on the peer node was aborted.";
            core.log(Severity::Error, Some(nr), text);
            return Failed::AttachThere;
        }
        if core::mem::take(&mut core.conn.dry_run) {
            return Failed::Connection(false);
        }
        core.force_conn(Cstate::Disconnecting);
        Failed::Connection(false)
    })
}

/// Decides, logs, calls handlers, sets all bits if that is the decision.
/// `None`: failure.
async fn decide_and_prepare(
    cx: &Cx,
    nr: VolumeNr,
    packet: &Fields,
    real: Dstate,
) -> Option<Cstate> {
    let decision = cx.with(|core| {
        let handshake = core.handshake(nr, packet, real)?;
        let decision = decide(&handshake);
        core.correct(nr, &decision);
        core.note_decision(nr, &handshake, &decision);
        Some(decision)
    })?;
    for step in &decision.steps {
        match step {
            Step::Log(severity, text) => {
                cx.with(|core| core.log(*severity, Some(nr), text.clone()));
            }
            Step::Call(handler) => {
                let _ = meta::sync(cx, nr).await;
                call_handler(cx, name(*handler), Some(nr)).await;
            }
            Step::Demote => {
                cx.with(|core| {
                    let new = Fields { role: Role::Secondary, ..core.state(nr) };
                    let _ = core.set_state(nr, new, Opt::VERBOSE);
                });
            }
        }
    }
    let outcome = match decision.outcome {
        Outcome::Source(extent) if plant::has(Bug::WrongDirection) => Outcome::Target(extent),
        Outcome::Target(extent) if plant::has(Bug::WrongDirection) => Outcome::Source(extent),
        outcome => outcome,
    };
    let (conn, extent) = match outcome {
        Outcome::Failed => return None,
        Outcome::Connected => return Some(Cstate::Connected),
        Outcome::Source(extent) => (Cstate::WFBitMapS, extent),
        Outcome::Target(extent) => (Cstate::WFBitMapT, extent),
    };
    if extent == Extent::Full {
        cx.with(|core| core.hold_io(nr));
        let written = meta::set_all_bits(cx, nr).await;
        cx.with(|core| core.release_io(nr));
        written.ok()?;
    }
    Some(conn)
}

const fn name(handler: Handler) -> action::Handler {
    match handler {
        Handler::InitialSplitBrain => action::Handler::InitialSplitBrain,
        Handler::SplitBrain => action::Handler::SplitBrain,
        Handler::PriLostAfterSb => action::Handler::PriLostAfterSb,
        Handler::PriLost => action::Handler::PriLost,
    }
}

impl Core {
    /// Step 2.
    fn real_peer_disk(&mut self, nr: VolumeNr, packet: &Fields) -> Dstate {
        if packet.disk != Dstate::Negotiating {
            return packet.disk;
        }
        let flags = self.volume(nr).and_then(|v| v.peer_uuids).map_or(0, |u| u.flags);
        let real = if flags & 4 != 0 { Dstate::Inconsistent } else { Dstate::Consistent };
        self.info(nr, format!("real peer disk state = {real}"));
        real
    }

    /// Spec §4.2.
    fn wants_decision(&self, nr: VolumeNr, packet: &Fields, old: &Fields) -> bool {
        let Some(volume) = self.volume(nr) else { return false };
        let can = volume.peer_uuids.is_some()
            && packet.disk >= Dstate::Negotiating
            && old.disk >= Dstate::Negotiating;
        let is_attach = old.conn == Cstate::Connected
            && (packet.disk == Dstate::Negotiating || old.disk == Dstate::Negotiating);
        let is_told = old.conn == Cstate::Connected
            && packet.conn >= Cstate::StartingSyncS
            && packet.conn <= Cstate::WFBitMapT;
        // Above Connected a resync has its sides already, as one that the administrator asked for
        // while the forced promotion was considered.
        let is_forced = old.conn == Cstate::Connected && volume.marks.consider_resync;
        can && (old.conn < Cstate::Connected || is_attach || is_forced || is_told)
    }

    /// Everything that the decision depends on.
    fn handshake(&self, nr: VolumeNr, packet: &Fields, real: Dstate) -> Option<Handshake> {
        let volume = self.volume(nr)?;
        let net = self.conn.net.as_ref()?;
        let uuids = volume.peer_uuids?;
        let peer = volume.peer_slots()?;
        let state = volume.state;
        Some(Handshake {
            own: Side {
                slots: volume.slots(),
                crashed_primary: volume.marks.crashed_primary,
                role: state.role,
            },
            peer: Side { slots: peer, crashed_primary: uuids.flags & 2 != 0, role: packet.role },
            own_disk: state.disk,
            candidate_disk: volume.candidate.map_or(Dstate::Diskless, |(disk, _)| disk),
            peer_disk: real,
            link: Link {
                protocol: self.conn.version,
                wsame: self.conn.features.contains(Features::WSAME),
                resolve_conflicts: self.conn.resolve_conflicts,
            },
            own_bits_sent: volume.bits_sent,
            peer_bits: uuids.dirty_bits,
            own_bits_now: volume.dirty_bits(),
            peer_flags: uuids.flags,
            discard_mine: volume.marks.discard_mine,
            peer_discards: uuids.flags & 1 != 0,
            policies: net.after_sb,
            always_asbp: net.always_asbp,
            rr_conflict: net.rr_conflict,
            dry_run: self.conn.dry_run || net.tentative,
            can_demote: state.conn >= Cstate::Connected && volume.users == 0,
        })
    }

    /// Corrections that the comparison made.
    fn correct(&mut self, nr: VolumeNr, decision: &Decision) {
        match decision.comparison.correction {
            Some(Correction::Own(slots, _)) => {
                self.change_slots(nr, |own, _| *own = slots);
            }
            Some(Correction::Peer(slots, _)) => {
                if let Some(uuids) = self.volume_mut(nr).and_then(|v| v.peer_uuids.as_mut()) {
                    uuids.current = slots.current;
                    uuids.bitmap = slots.bitmap;
                    uuids.history = slots.history;
                }
            }
            None => {}
        }
    }

    /// Kept for the status: why the last handshake came out as it did.
    fn note_decision(&mut self, nr: VolumeNr, handshake: &Handshake, decision: &Decision) {
        let met = Met::new(self.now, handshake, decision);
        if let Some(volume) = self.volume_mut(nr) {
            volume.stats.met = Some(met);
        }
    }
}
