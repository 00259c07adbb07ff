//! The parameters that the nodes exchange: protocol, resync settings, generations.
//! Spec: wire-protocol.md §3.3, §3.4, §4.4; states-and-generations.md §3.5, §4.1.

use alloc::format;

use drbd_types::{Cstate, Dstate, Fields, Gi, Role, VolumeNr};
use drbd_wire::Algorithm;
use drbd_wire::packet::{ProtocolParams, SyncParams, Uuids};

use crate::action::Action;
use crate::config::{NetConfig, Protocol, ResyncConfig};
use crate::generation::splitbrain::Policies;
use crate::log_line::Severity;

use super::change::Opt;
use super::proc::Cx;
use super::{Core, meta};

/// The four packets of a volume, in their order.
pub(super) fn send_volume(core: &mut Core, nr: VolumeNr) {
    core.send_sync_param(nr);
    core.send_sizes(nr, false, 0);
    core.send_uuids(nr, 0);
    // The first P_STATE is that before the handshake.
    core.send_current_state(nr);
}

impl Core {
    /// P_PROTOCOL: what both nodes must have configured alike. Spec: wire-protocol.md §3.4.
    pub(super) fn on_protocol(&mut self, params: &ProtocolParams) -> bool {
        let Some(net) = self.conn.net.clone() else { return false };
        if params.dry_run {
            self.conn.dry_run = true;
        }
        if let Some(name) = incompatible(&net, params) {
            self.log(Severity::Error, None, format!("incompatible {name} settings"));
            self.force_conn(Cstate::Disconnecting);
            return true;
        }
        if !params.integrity_alg.is_empty() && Algorithm::from_name(&params.integrity_alg).is_none()
        {
            let text = format!("peer data-integrity-alg {} not supported", params.integrity_alg);
            self.log(Severity::Error, None, text);
            self.force_conn(Cstate::Disconnecting);
        }
        true
    }

    /// P_PROTOCOL_UPDATE: the peer's settings are adopted.
    pub(super) fn on_protocol_update(&mut self, params: &ProtocolParams) -> bool {
        if !params.integrity_alg.is_empty() && Algorithm::from_name(&params.integrity_alg).is_none()
        {
            let text = format!("peer data-integrity-alg {} not supported", params.integrity_alg);
            self.log(Severity::Error, None, text);
            self.force_conn(Cstate::Disconnecting);
            return true;
        }
        let protocol = Protocol::from_number(params.protocol);
        let policies = Policies::from_peer(params.after_sb);
        let (Some(protocol), Some(policies), Some(net)) = (protocol, policies, &mut self.conn.net)
        else {
            return false;
        };
        net.protocol = protocol;
        net.after_sb = policies;
        net.two_primaries = params.two_primaries != 0;
        self.out.push(Action::Changed);
        true
    }

    /// P_SYNC_PARAM, P_SYNC_PARAM89. Spec: wire-protocol.md §4.4.
    pub(super) fn on_sync_param(&mut self, nr: VolumeNr, params: &SyncParams) -> bool {
        let version = self.conn.version;
        let level = self.state(nr).conn;
        let Some(volume) = self.volume_mut(nr) else { return true };
        if volume.disk.is_some() {
            let mut rates = ResyncConfig { resync_rate: params.resync_rate, ..volume.rates };
            if let Some(controller) = &params.controller {
                rates.c_plan_ahead = controller.plan_ahead;
                rates.c_delay_target = controller.delay_target;
                rates.c_fill_target = controller.fill_target;
                rates.c_max_rate = controller.max_rate;
            }
            volume.rates = rates;
            volume.resync.set_rates(rates);
        }
        if version < 88 {
            return true;
        }
        let is_handshake = level == Cstate::WFReportParams;
        self.adopt_algorithm("verify-alg", &params.verify_alg, is_handshake, |n| &mut n.verify_alg)
            && (version < 89
                || self.adopt_algorithm("csums-alg", &params.csums_alg, is_handshake, |n| {
                    &mut n.csums_alg
                }))
    }

    /// Returns false only if the connection ends.
    fn adopt_algorithm(
        &mut self,
        what: &str,
        theirs: &str,
        is_handshake: bool,
        place: impl FnOnce(&mut NetConfig) -> &mut alloc::string::String,
    ) -> bool {
        let Some(net) = &mut self.conn.net else { return true };
        let mine = place(net);
        if mine == theirs {
            return true;
        }
        if is_handshake {
            let text = format!("Different {what} settings. me=\"{mine}\" peer=\"{theirs}\"");
            self.log(Severity::Error, None, text);
            self.force_conn(Cstate::Disconnecting);
            return true;
        }
        if !theirs.is_empty() && Algorithm::from_name(theirs).is_none() {
            let text = format!("Can not allocate \"{theirs}\" as {what} (reason: -2)");
            self.log(Severity::Error, None, text);
            self.force_conn(Cstate::Disconnecting);
            return true;
        }
        *mine = theirs.into();
        self.log(Severity::Info, None, format!("using {what}: \"{theirs}\""));
        self.announce_algorithms();
        true
    }
}

/// The first setting that differs. Spec: wire-protocol.md §3.4.
fn incompatible(net: &NetConfig, peer: &ProtocolParams) -> Option<&'static str> {
    let theirs = Policies::from_peer(peer.after_sb);
    let mine = net.after_sb;
    let differs =
        |part: fn(&Policies) -> u32| theirs.as_ref().is_none_or(|t| part(t) != part(&mine));
    if Protocol::from_number(peer.protocol) != Some(net.protocol) {
        Some("protocol")
    } else if differs(|p| p.numbers()[0]) {
        Some("after-sb-0pri")
    } else if differs(|p| p.numbers()[1]) {
        Some("after-sb-1pri")
    } else if differs(|p| p.numbers()[2]) {
        Some("after-sb-2pri")
    } else if (peer.two_primaries != 0) != net.two_primaries {
        Some("allow-two-primaries")
    } else if peer.integrity_alg != net.integrity_alg {
        Some("data-integrity-alg")
    } else {
        None
    }
}

/// P_UUIDS. Spec: states §3.5. Returns false if the connection ends.
pub(super) async fn on_uuids(cx: &Cx, nr: VolumeNr, uuids: Uuids) -> bool {
    let step = cx.with(|core| {
        let version = core.conn.version;
        let Some(volume) = core.volume_mut(nr) else { return Step::Done };
        volume.peer_uuids = Some(uuids);
        let state = volume.state;
        let own_current = volume.slots().current;
        let no_data = state.disk < Dstate::Inconsistent && state.role == Role::Primary;
        let lacks_writes = volume.peer_lacking.is_some_and(|lacking| lacking.same(uuids.current));
        if (state.conn < Cstate::Connected || state.pdsk == Dstate::Diskless)
            && no_data
            && (!volume.exposed.same(uuids.current) || lacks_writes)
        {
            let text =
                format!("Can only connect to data with current UUID={:016X}", volume.exposed.0);
            core.log(Severity::Error, Some(nr), text);
            core.force_conn(Cstate::Disconnecting);
            return Step::Failed;
        }
        if volume.has_disk() {
            let skips = state.conn == Cstate::Connected
                && version >= 90
                && own_current == Gi::JUST_CREATED
                && uuids.flags & 8 != 0;
            if skips {
                return Step::SkipInitialSync;
            }
        } else if no_data {
            volume.exposed = uuids.current;
        }
        Step::Done
    });
    match step {
        Step::Failed => return false,
        Step::SkipInitialSync => {
            skip_initial_sync(cx, nr, &uuids).await;
            cx.with(|core| core.log_slots(nr, "receiver updated UUIDs to"));
        }
        Step::Done => {}
    }
    // What the peer's data are counts when a change of the state that is under way has ended. The
    // original lets all packets wait for that, and hangs if the peer waits for an answer, too: the
    // requests of both are behind such a packet.
    cx.with(|core| {
        if core.is_state_locked(nr) {
            core.start(move |cx| async move {
                super::change::lock(&cx, nr).await.release(&cx);
                cx.with(|core| core.follow_uuids(nr));
            });
        } else {
            core.follow_uuids(nr);
        }
    });
    true
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    Done,
    Failed,
    SkipInitialSync,
}

/// The peer declared both disks equal.
async fn skip_initial_sync(cx: &Cx, nr: VolumeNr, uuids: &Uuids) {
    let current = uuids.current;
    cx.with(|core| {
        core.info(nr, "Accepted new current UUID, preparing to skip initial sync");
        if let Some(disk) = core.volume_mut(nr).and_then(|v| v.disk.as_mut()) {
            disk.bitmap.clear_all();
            disk.bitmap.mark_all_changed();
        }
        core.touch();
    });
    let _ = meta::write_bitmap(cx, nr).await;
    cx.with(|core| {
        core.change_slots(nr, |slots, role| {
            slots.set_current(current, role);
            slots.bitmap = Gi(0);
        });
        let state = core.state(nr);
        let new = Fields { disk: Dstate::UpToDate, pdsk: Dstate::UpToDate, ..state };
        let _ = core.set_state(nr, new, Opt::VERBOSE);
    });
    let _ = meta::sync(cx, nr).await;
}

impl Core {
    /// Without a disk the application sees the data of the peer.
    fn follow_uuids(&mut self, nr: VolumeNr) {
        let Some(volume) = self.volume_mut(nr) else { return };
        let Some(current) = volume.peer_uuids.map(|uuids| uuids.current) else { return };
        if volume.state.conn >= Cstate::Connected
            && volume.state.disk < Dstate::Inconsistent
            && !volume.exposed.same(current)
        {
            volume.exposed = current;
            let text = format!("receiver updated UUIDs to effective data uuid: {:016X}", current.0);
            self.info(nr, text);
        }
    }
}
