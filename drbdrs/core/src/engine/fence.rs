//! Fencing: outdating the peer by a handler, and frozen I/O while that is not done.
//! Spec: states-and-generations.md §7, §2.10.

use alloc::format;

use drbd_types::{Cstate, Dstate, StateWord, VolumeNr};

use crate::action::Handler;
use crate::config::Fencing;
use crate::log_line::Severity;

use super::change::{Opt, Wanted, conn_request};
use super::proc::Cx;
use super::{Core, call_handler, generations, meta};

impl Core {
    /// The strongest policy of all volumes that are at least Consistent here.
    fn fencing_policy(&self) -> Option<Fencing> {
        self.volumes
            .values()
            .filter(|v| v.state.disk >= Dstate::Consistent)
            .map(|v| v.config.fencing)
            .max()
    }
}

/// Calls the handler and takes over its result. Returns whether the peer is known to be outdated.
/// Spec §7.2.
pub(super) async fn fence_peer(cx: &Cx) -> bool {
    let start = cx.with(|core| {
        if core.conn.level >= Cstate::WFReportParams {
            core.log(Severity::Error, None, "Expected cstate < C_WF_REPORT_PARAMS");
            return Err(false);
        }
        match core.fencing_policy() {
            None => {
                let text = "Not fencing peer, I'm not even Consistent myself.";
                core.log(Severity::Warn, None, text);
                if core.conn.level < Cstate::WFReportParams {
                    let _ = core.set_conn(Wanted::flag(StateWord::SUSP_FEN, false), Opt::HARD);
                    if !core.is_suspended() {
                        core.requests_lost_connection();
                    }
                }
                Err(false)
            }
            Some(Fencing::DontCare) => Err(true),
            Some(policy) => Ok((policy, core.conn.connects)),
        }
    });
    let (policy, connects) = match start {
        Ok(start) => start,
        Err(result) => return result,
    };
    meta::sync_all(cx).await;
    let exit = call_handler(cx, Handler::FencePeer, None).await;
    let wanted = cx.with(|core| core.after_fence_handler(exit, policy));
    let Some((wanted, text)) = wanted else { return false };
    cx.with(|core| {
        let text = format!("fence-peer helper returned {exit} ({text})");
        core.log(Severity::Info, None, text);
    });
    let may_apply = cx.with(|core| {
        if core.conn.level >= Cstate::WFReportParams || core.conn.state_sent {
            return false;
        }
        if core.conn.connects != connects {
            core.log(Severity::Info, None, "Ignoring fence-peer exit code");
            return false;
        }
        true
    });
    if may_apply {
        let _ = conn_request(cx, wanted, Opt::VERBOSE).await;
    }
    cx.with(|core| core.highest_pdsk() <= Dstate::Outdated)
}

impl Core {
    /// What the exit code of the handler means. `None`: it is broken.
    fn after_fence_handler(
        &mut self,
        exit: i32,
        policy: Fencing,
    ) -> Option<(Wanted, &'static str)> {
        let outdated = Wanted::pdsk(Dstate::Outdated);
        Some(match exit {
            3 => (Wanted::pdsk(Dstate::Inconsistent), "peer is inconsistent or worse"),
            4 => (outdated, "peer was fenced"),
            5 => {
                let own = self.volumes.values().map(|v| v.state.disk).max();
                if own == Some(Dstate::UpToDate) {
                    (outdated, "peer is unreachable, assumed to be dead")
                } else {
                    (Wanted::NOTHING, "peer unreachable, doing nothing since disk != UpToDate")
                }
            }
            6 => {
                self.log(Severity::Warn, None, "Peer is primary, outdating myself.");
                (Wanted::disk(Dstate::Outdated), "peer is active")
            }
            7 => {
                if policy != Fencing::ResourceAndStonith {
                    let text = "fence-peer() = 7 && fencing != Stonith !!!";
                    self.log(Severity::Error, None, text);
                }
                (outdated, "peer was stonithed")
            }
            _ => {
                let text = format!("fence-peer helper broken, returned {exit}");
                self.log(Severity::Error, None, text);
                return None;
            }
        })
    }
}

/// Fencing has succeeded while I/O was frozen: a new generation, and I/O goes on. Spec §2.10 (4).
pub(super) async fn after_connection(cx: &Cx) {
    let thaws = cx.with(|core| {
        let is_frozen = core.volumes.values().any(|v| v.state.susp_fen);
        // A handshake decides by what the peer was told: its end, or that of the connection, thaws.
        is_frozen
            && !core.conn.state_sent
            && core.highest_pdsk() <= Dstate::Outdated
            && !core.volumes.is_empty()
    });
    if !thaws {
        return;
    }
    generations::begin_on_thaw(cx).await;
    cx.with(|core| {
        core.go_on_alone();
        let _ = core.set_conn(Wanted::flag(StateWord::SUSP_FEN, false), Opt::HARD);
    });
}

/// At the end of a resync, on its source. Spec §7.4.
pub(super) async fn unfence(cx: &Cx, nr: VolumeNr) {
    let is_due = cx.with(|core| {
        let has_policy = core.volume(nr).is_some_and(|v| v.config.fencing != Fencing::DontCare);
        has_policy
            && core
                .volumes
                .values()
                .all(|v| v.state.disk == Dstate::UpToDate && v.state.pdsk == Dstate::UpToDate)
    });
    if is_due {
        call_handler(cx, Handler::UnfencePeer, None).await;
    }
}
