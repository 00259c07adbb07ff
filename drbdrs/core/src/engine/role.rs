//! Promotion and demotion. Spec: states-and-generations.md §9.1.

use drbd_types::{Cstate, Dstate, Refusal, Role, StateWord, VolumeNr};

use crate::log_line::Severity;

use super::change::{Changed, Done, Opt, Wanted, lock, request, settled};
use super::proc::Cx;
use super::{Core, fence, meta, timers};

/// Tries of a promotion.
const TRIES: u32 = 4;

/// The volume becomes Primary or Secondary.
pub(super) async fn set_role(cx: &Cx, nr: VolumeNr, role: Role, force: bool) -> Changed {
    if role == Role::Primary {
        // Finds a dead peer early.
        cx.with(Core::send_ping);
        return change_role(cx, nr, role, force).await;
    }
    cx.with(|core| core.hold_io(nr));
    let result = match drain(cx, nr).await {
        Ok(()) => {
            // From here on a crash does not look at the activity log any more.
            if cx.with(|core| core.volume(nr).is_some_and(|v| v.has_disk())) {
                super::io::flush_data(cx, nr).await;
            }
            change_role(cx, nr, role, force).await
        }
        Err(refusal) => Err(refusal),
    };
    cx.with(|core| {
        core.release_io(nr);
        if core.state(nr).role == Role::Secondary {
            core.fail_waiting(nr);
        }
    });
    result
}

/// Before a demotion: everything that the application has written is acknowledged by the peer for
/// good, or known to be missing there. A Secondary that loses its peer makes no new generation, so
/// nobody would miss what it alone has.
async fn drain(cx: &Cx, nr: VolumeNr) -> Result<(), Refusal> {
    cx.until(move |core| {
        if core.state(nr).role == Role::Secondary {
            return Some(Ok(()));
        }
        let is_idle =
            core.is_app_idle(nr) && !core.log.iter().any(|(_, request)| request.volume == nr);
        if is_idle {
            return Some(Ok(()));
        }
        if core.is_suspended() {
            return Some(Err(Refusal::DeviceInUse));
        }
        core.close_epoch();
        None
    })
    .await
}

async fn change_role(cx: &Cx, nr: VolumeNr, role: Role, force: bool) -> Changed {
    loop {
        let version = cx.with(|core| core.state_version);
        let lock = lock(cx, nr).await;
        let (result, forced) = try_role(cx, nr, role, force).await;
        if result == Ok(Done::Changed) {
            // No handshake begins before the identifiers are those of the new role.
            follow_change(cx, nr, role, forced).await;
        }
        lock.release(cx);
        // While the state is transient the mutex is free for others.
        if result != Err(Refusal::InTransientState) {
            return result;
        }
        cx.until(move |core| (core.state_version != version).then_some(())).await;
    }
}

/// What a change of the role brings with it.
async fn follow_change(cx: &Cx, nr: VolumeNr, role: Role, forced: bool) {
    settled(cx).await;
    if forced {
        let text = "Forced to consider local data as UpToDate!";
        cx.with(|core| core.log(Severity::Warn, Some(nr), text));
    }
    cx.until(move |core| (!core.has_pending_writes(nr) || core.is_suspended()).then_some(())).await;
    if role == Role::Primary {
        settle_writes_of_lost_peer(cx, nr).await;
    }
    cx.with(|core| core.follow_role(nr, role, forced));
    // "Was Primary" and a new generation are stable before the first write.
    let _ = meta::sync(cx, nr).await;
    cx.with(|core| {
        if core.conn.level >= Cstate::WFReportParams && core.conn.is_up {
            if forced {
                core.send_uuids(nr, 0);
            }
            core.send_current_state(nr);
        }
        if let Some(volume) = core.volume_mut(nr) {
            volume.is_open_for_use = role == Role::Primary;
        }
        core.announce_device(nr);
    });
}

/// What a lost Primary has written may still be at a slow disk: it must not come after writes of this
/// node, nor between two of its reads. The original lets it.
async fn settle_writes_of_lost_peer(cx: &Cx, nr: VolumeNr) {
    cx.until(move |core| {
        let is_over = core.state(nr).conn >= Cstate::Connected || !core.has_peer_writes(nr);
        is_over.then_some(())
    })
    .await;
}

async fn try_role(cx: &Cx, nr: VolumeNr, role: Role, force: bool) -> (Changed, bool) {
    let mut wanted = Wanted::role(role);
    let mut forced = false;
    let mut tries = 0;
    while tries < TRIES {
        tries += 1;
        let result = request(cx, nr, wanted, Opt::QUIET_ATTEMPT).await;
        let disk = cx.with(|core| core.state(nr).disk);
        match result {
            Err(Refusal::FailedByPeer) if wanted.has(StateWord::PDSK) => {
                wanted = wanted.without(StateWord::PDSK);
            }
            Err(Refusal::NoUpToDateDisk)
                if force && disk >= Dstate::Inconsistent && disk < Dstate::UpToDate =>
            {
                wanted = wanted.and_disk(Dstate::UpToDate);
                forced = true;
            }
            Err(Refusal::NoUpToDateDisk)
                if disk == Dstate::Consistent && !wanted.has(StateWord::PDSK) =>
            {
                if fence::fence_peer(cx).await {
                    wanted = wanted.and_disk(Dstate::UpToDate);
                }
            }
            Err(Refusal::PrimaryNop) if !wanted.has(StateWord::PDSK) => {
                if !fence::fence_peer(cx).await && force {
                    let text = "Forced into split brain situation!";
                    cx.with(|core| core.log(Severity::Warn, Some(nr), text));
                    wanted = wanted.and_pdsk(Dstate::Outdated);
                }
            }
            Err(Refusal::TwoPrimaries) => {
                if tries < TRIES {
                    tries = TRIES - 1;
                    let wait = cx.with(|core| {
                        core.conn.net.as_ref().map_or(5, |net| net.ping_timeout.0) + 1
                    });
                    timers::sleep(cx, wait).await;
                } else {
                    return (result, forced);
                }
            }
            Err(Refusal::InTransientState) => return (result, forced),
            Err(_) => {
                // Once more, now logged.
                let opt = Opt { verbose: true, ..Opt::QUIET_ATTEMPT };
                let result = request(cx, nr, wanted, opt).await;
                return (result, forced);
            }
            Ok(_) => return (result, forced),
        }
    }
    let opt = Opt { verbose: true, ..Opt::QUIET_ATTEMPT };
    (request(cx, nr, wanted, opt).await, forced)
}

impl Core {
    /// The identifiers follow the new role. Spec §3.3 G1, G2.
    fn follow_role(&mut self, nr: VolumeNr, role: Role, forced: bool) {
        if role == Role::Primary {
            self.conn.discard_my_data = false;
            let state = self.state(nr);
            let is_alone = state.conn < Cstate::Connected || state.pdsk <= Dstate::Failed;
            let is_clean = self.volume(nr).is_some_and(|v| v.slots().bitmap.is_none());
            if forced {
                // One new generation, even if losing the peer has just made one (defect D4).
                if is_clean || !is_alone {
                    self.new_current_uuid(nr);
                } else {
                    self.begin_generation(nr);
                }
            } else if is_alone {
                self.begin_generation(nr);
            }
        }
        self.change_slots(nr, |slots, role| slots.follow_role(role));
        // Bit 0 is stored with the next write in any case.
        self.mark_dirty(nr);
    }
}
