//! Commands of the administrator: each is a procedure of its own, answered once.
//! Spec: states-and-generations.md §3.8, §7.5, §8.4, §11.1; config-and-drbdadm.md.

use drbd_types::{Cstate, Dstate, Failure, Fields, Gi, Minor, Refusal, Role, StateWord, VolumeNr};
use drbd_wire::Packet;

use alloc::string::String;

use crate::action::Action;
use crate::admin::{Command, Reply};
use crate::config::{DiskConfig, NetConfig, OnCongestion, Protocol};
use crate::ids::Ticket;
use crate::log_line::Severity;

use super::change::{Changed, Done, Opt, Wanted, conn_request, lock, request};
use super::proc::Cx;
use super::volume::Volume;
use super::{Core, attach, generations, meta, resize, role};

/// Code of success.
const OK: i32 = 1;
/// "Nothing to do", a success too.
const NOTHING: i32 = 2;

impl Core {
    pub(super) fn on_admin(&mut self, ticket: Ticket, command: Command) {
        self.start(move |cx| async move {
            let reply = run(&cx, command).await;
            cx.with(|core| core.out.push(Action::Reply { ticket, reply }));
        });
    }
}

const fn code(code: i32) -> Reply {
    Reply { code, info: None }
}

fn failure(failure: Failure) -> Reply {
    code(failure.number())
}

fn changed(result: Changed) -> Reply {
    code(match result {
        Ok(Done::Changed) => OK,
        Ok(Done::Nothing) => NOTHING,
        Err(refusal) => refusal.number(),
    })
}

async fn run(cx: &Cx, command: Command) -> Reply {
    let volume = volume_of(&command);
    if let Some(nr) = volume
        && !cx.with(|core| core.volumes.contains(nr))
    {
        return failure(Failure::MinorUnknown);
    }
    match command {
        Command::NewVolume { volume, minor } => cx.with(|core| core.new_volume(volume, minor)),
        Command::DelVolume(nr) => del_volume(cx, nr).await,
        Command::Attach { volume, config } => match attach::attach(cx, volume, *config).await {
            Ok(()) => code(OK),
            Err(refused) => Reply { code: refused.code, info: refused.info },
        },
        Command::Detach { volume, force } => changed(attach::detach(cx, volume, force).await),
        Command::Connect(net) => connect(cx, *net).await,
        Command::Disconnect { force } => disconnect(cx, force).await,
        Command::Primary { volume, force } => {
            changed(role::set_role(cx, volume, Role::Primary, force).await)
        }
        Command::Secondary(nr) => changed(role::set_role(cx, nr, Role::Secondary, false).await),
        Command::Invalidate(nr) => invalidate(cx, nr).await,
        Command::InvalidateRemote(nr) => invalidate_remote(cx, nr).await,
        Command::Outdate(nr) => outdate(cx, nr).await,
        Command::Verify { volume, start, stop } => {
            cx.with(|core| {
                if let Some(v) = core.volume_mut(volume) {
                    let start = start.map_or(v.resync.verify_resume, |s| s.0);
                    v.stats.verify_start = start / 8 * 8;
                    v.stats.verify_stop = stop.map(|s| s.0);
                }
                core.hold_io(volume);
            });
            let result = request(cx, volume, Wanted::conn(Cstate::VerifyS), Opt::COMMAND).await;
            cx.with(|core| core.release_io(volume));
            changed(result)
        }
        Command::PauseSync(nr) => {
            let wanted = Wanted::flag(StateWord::USER_ISP, true);
            match request(cx, nr, wanted, Opt::COMMAND).await {
                Ok(Done::Nothing) => failure(Failure::PauseIsSet),
                other => changed(other),
            }
        }
        Command::ResumeSync(nr) => resume_sync(cx, nr).await,
        Command::SuspendIo(nr) => {
            changed(request(cx, nr, Wanted::flag(StateWord::SUSP, true), Opt::COMMAND).await)
        }
        Command::ResumeIo(nr) => resume_io(cx, nr).await,
        Command::NewCurrentUuid { volume, clear_bitmap } => {
            new_current_uuid(cx, volume, clear_bitmap).await
        }
        Command::Resize { volume, size, force, assume_clean, al } => {
            let wanted = resize::Wanted { size, forced: force, assume_clean, al };
            match resize::resize(cx, volume, &wanted).await {
                Ok(()) => code(OK),
                Err(error) => failure(error),
            }
        }
        Command::ResourceOptions(config) => {
            cx.with(|core| core.config = config);
            code(OK)
        }
        Command::NetOptions(net) => net_options(cx, *net),
        Command::DiskOptions { volume, config } => disk_options(cx, volume, *config).await,
    }
}

const fn volume_of(command: &Command) -> Option<VolumeNr> {
    Some(match command {
        Command::NewVolume { .. }
        | Command::Connect(_)
        | Command::Disconnect { .. }
        | Command::ResourceOptions(_)
        | Command::NetOptions(_) => return None,
        Command::DelVolume(nr)
        | Command::Secondary(nr)
        | Command::Invalidate(nr)
        | Command::InvalidateRemote(nr)
        | Command::Outdate(nr)
        | Command::PauseSync(nr)
        | Command::ResumeSync(nr)
        | Command::SuspendIo(nr)
        | Command::ResumeIo(nr) => *nr,
        Command::Attach { volume, .. }
        | Command::Detach { volume, .. }
        | Command::Primary { volume, .. }
        | Command::Verify { volume, .. }
        | Command::NewCurrentUuid { volume, .. }
        | Command::Resize { volume, .. }
        | Command::DiskOptions { volume, .. } => *volume,
    })
}

impl Core {
    fn new_volume(&mut self, nr: VolumeNr, minor: Minor) -> Reply {
        let exists = self.volumes.contains(nr) || self.volumes.values().any(|v| v.minor == minor);
        if exists {
            return failure(Failure::MinorOrVolumeExists);
        }
        let level = self.conn.level;
        let mut volume = Volume::new(nr, minor, level);
        // A running suspension holds for it too.
        if let Some(other) = self.volumes.values().next() {
            volume.state.susp = other.state.susp;
            volume.state.susp_nod = other.state.susp_nod;
            volume.state.susp_fen = other.state.susp_fen;
        }
        self.volumes.insert(volume);
        self.out.push(Action::Changed);
        if level == Cstate::WFReportParams && self.conn.is_up {
            super::params::send_volume(self, nr);
        }
        self.announce_device(nr);
        self.touch();
        code(OK)
    }
}

async fn del_volume(cx: &Cx, nr: VolumeNr) -> Reply {
    let is_free = cx.with(|core| {
        let state = core.state(nr);
        state.disk == Dstate::Diskless
            && state.role == Role::Secondary
            && core.volume(nr).is_some_and(|v| v.disk.is_none())
    });
    if !is_free {
        return failure(Failure::MinorConfigured);
    }
    let is_connected = cx.with(|core| core.state(nr).conn >= Cstate::Connected);
    if is_connected {
        let wanted = Wanted::conn(Cstate::WFReportParams);
        let opt = Opt { verbose: true, wait: true, ..Opt::QUIET };
        if let Err(refusal) = request(cx, nr, wanted, opt).await {
            return code(refusal.number());
        }
    }
    super::change::settled(cx).await;
    cx.with(|core| {
        core.fail_waiting(nr);
        core.volumes.remove(nr);
        core.out.push(Action::Changed);
        core.touch();
    });
    code(OK)
}

// ---- the connection ----

impl Core {
    /// Settings that contradict each other or the state.
    fn check_net(&self, net: &NetConfig) -> Result<(), Failure> {
        use drbd_wire::Algorithm;
        let is_known = |name: &String| name.is_empty() || Algorithm::from_name(name).is_some();
        if net.two_primaries && net.protocol != Protocol::C {
            return Err(Failure::ProtocolCRequired);
        }
        let stonith = self.volumes.values().any(|v| {
            v.disk.is_some() && v.config.fencing == crate::config::Fencing::ResourceAndStonith
        });
        if net.protocol == Protocol::A && stonith {
            return Err(Failure::StonithProtocol);
        }
        if net.on_congestion != OnCongestion::Block && net.protocol != Protocol::A {
            return Err(Failure::PullAheadProtocol);
        }
        if !net.two_primaries && self.has_two_primaries_now() {
            return Err(Failure::TwoPrimariesRunning);
        }
        if !is_known(&net.cram_hmac_alg) {
            return Err(Failure::AuthAlg);
        }
        if !is_known(&net.integrity_alg) {
            return Err(Failure::IntegrityAlg);
        }
        if !is_known(&net.verify_alg) {
            return Err(Failure::VerifyAlg);
        }
        if !is_known(&net.csums_alg) {
            return Err(Failure::ChecksumAlg);
        }
        Ok(())
    }

    fn has_two_primaries_now(&self) -> bool {
        self.volumes
            .values()
            .any(|v| v.state.role == Role::Primary && v.state.peer == Role::Primary)
    }
}

async fn connect(cx: &Cx, net: NetConfig) -> Reply {
    let checked = cx.with(|core| {
        if core.conn.net.is_some() {
            return Err(Failure::NetConfigured);
        }
        if net.discard_my_data && core.is_primary_anywhere() {
            return Err(Failure::DiscardImpossible);
        }
        core.check_net(&net)?;
        core.conn.discard_my_data = net.discard_my_data;
        core.conn.net = Some(net);
        for volume in core.volumes.values_mut() {
            volume.stats.ns = 0;
            volume.stats.nr = 0;
            volume.rates = volume.config.resync;
        }
        Ok(())
    });
    if let Err(error) = checked {
        return failure(error);
    }
    let result = conn_request(cx, Wanted::conn(Cstate::Unconnected), Opt::VERBOSE).await;
    if result.is_err() {
        cx.with(|core| core.conn.net = None);
    }
    changed(result)
}

/// Spec: states §8.4.
async fn disconnect(cx: &Cx, force: bool) -> Reply {
    if cx.with(|core| core.conn.net.is_none()) {
        return Reply {
            code: Failure::InvalidRequest.number(),
            info: Some("unknown connection".into()),
        };
    }
    let opt = Opt { hard: force, ..Opt::QUIET };
    let leave = Wanted::conn(Cstate::Disconnecting);
    let result = loop {
        let version = cx.with(|core| core.state_version);
        match conn_request(cx, leave, opt).await {
            Err(Refusal::AlreadyStandalone) => return code(OK),
            Err(Refusal::PrimaryNop) => {
                let outdating = leave.and_pdsk(Dstate::Outdated);
                break match conn_request(cx, outdating, Opt::QUIET).await {
                    Err(Refusal::OutdateWithoutConnection) => {
                        conn_request(cx, leave, Opt::VERBOSE).await
                    }
                    other => other,
                };
            }
            Err(Refusal::FailedByPeer) => {
                if cx.with(|core| core.conn.level <= Cstate::WFConnection) {
                    continue;
                }
                // The peer wants this node to be outdated first.
                let outdated = leave.and_disk(Dstate::Outdated);
                break match conn_request(cx, outdated, Opt::QUIET).await {
                    Err(Refusal::IsDiskless | Refusal::LowerThanOutdated) => {
                        conn_request(cx, leave, Opt::HARD).await
                    }
                    other => other,
                };
            }
            Err(Refusal::InTransientState) => {
                cx.until(move |core| (core.state_version != version).then_some(())).await;
            }
            other => break other,
        }
    };
    if result.is_err() {
        cx.with(|core| core.conn.disconnect_sent = false);
        return changed(result);
    }
    // The receiver cleans up and ends in StandAlone.
    cx.until(|core| (core.conn.level == Cstate::StandAlone).then_some(())).await;
    super::change::settled(cx).await;
    code(OK)
}

// ---- resync and verify ----

/// Half an attach is no disk: what its bitmap and its activity log say is still to come, and what the
/// peer says.
async fn disk_when_attached(cx: &Cx, nr: VolumeNr) -> Dstate {
    cx.until(move |core| {
        let disk = core.state(nr).disk;
        (!matches!(disk, Dstate::Attaching | Dstate::Negotiating)).then_some(disk)
    })
    .await
}

async fn outdate(cx: &Cx, nr: VolumeNr) -> Reply {
    let disk = disk_when_attached(cx, nr).await;
    // What is less than that does not become better by it. The original promotes an Inconsistent disk
    // of a connected node that way, even to UpToDate.
    if matches!(disk, Dstate::Inconsistent | Dstate::Failed) {
        return changed(Ok(Done::Nothing));
    }
    changed(request(cx, nr, Wanted::disk(Dstate::Outdated), Opt::COMMAND).await)
}

async fn invalidate(cx: &Cx, nr: VolumeNr) -> Reply {
    let _ = disk_when_attached(cx, nr).await;
    if !cx.with(|core| core.volume(nr).is_some_and(|v| v.disk.is_some())) {
        return failure(Failure::NoDisk);
    }
    let is_local = cx.with(|core| {
        core.conn.level == Cstate::StandAlone && core.state(nr).role == Role::Secondary
    });
    if !is_local {
        return hold_and_request(cx, nr, Wanted::conn(Cstate::StartingSyncT)).await;
    }
    let result = request(cx, nr, Wanted::disk(Dstate::Inconsistent), Opt::COMMAND).await;
    if result.is_ok() {
        cx.with(|core| core.hold_io(nr));
        let written = meta::set_all_bits(cx, nr).await;
        cx.with(|core| core.release_io(nr));
        if written.is_err() {
            return failure(Failure::MetaIo);
        }
    }
    changed(result)
}

async fn invalidate_remote(cx: &Cx, nr: VolumeNr) -> Reply {
    let _ = disk_when_attached(cx, nr).await;
    if !cx.with(|core| core.volume(nr).is_some_and(|v| v.disk.is_some())) {
        return failure(Failure::NoDisk);
    }
    let is_local = cx
        .with(|core| core.conn.level == Cstate::StandAlone && core.state(nr).role == Role::Primary);
    if !is_local {
        return hold_and_request(cx, nr, Wanted::conn(Cstate::StartingSyncS)).await;
    }
    let result = request(cx, nr, Wanted::pdsk(Dstate::Inconsistent), Opt::COMMAND).await;
    cx.with(|core| core.hold_io(nr));
    let written = meta::set_all_bits(cx, nr).await;
    cx.with(|core| {
        if written.is_ok()
            && core.state(nr).conn < Cstate::Connected
            && let Some(volume) = core.volume_mut(nr)
        {
            // Every block is marked, on disk too: nothing could get more out of sync.
            volume.marks.al_suspended = true;
            core.info(nr, "Suspended AL updates");
        }
        core.release_io(nr);
    });
    if written.is_err() {
        return failure(Failure::MetaIo);
    }
    changed(result)
}

async fn hold_and_request(cx: &Cx, nr: VolumeNr, wanted: Wanted) -> Reply {
    cx.with(|core| core.hold_io(nr));
    let result = request(cx, nr, wanted, Opt::COMMAND).await;
    cx.with(|core| core.release_io(nr));
    changed(result)
}

async fn resume_sync(cx: &Cx, nr: VolumeNr) -> Reply {
    let result = request(cx, nr, Wanted::flag(StateWord::USER_ISP, false), Opt::COMMAND).await;
    if result != Ok(Done::Nothing) {
        return changed(result);
    }
    let state = cx.with(|core| core.state(nr));
    let is_paused = matches!(state.conn, Cstate::PausedSyncS | Cstate::PausedSyncT);
    failure(if is_paused && state.aftr_isp {
        Failure::PauseIsClearAfter
    } else if is_paused && state.peer_isp {
        Failure::PauseIsClearPeer
    } else {
        Failure::PauseIsClear
    })
}

// ---- suspension ----

/// Spec: states §7.5.
async fn resume_io(cx: &Cx, nr: VolumeNr) -> Reply {
    // A handshake decides by the identifiers that the peer was told.
    cx.until(|core| (!core.conn.state_sent).then_some(())).await;
    // The suspension is one of the resource: every volume goes on.
    for nr in generations::begin_on_thaw(cx).await {
        cx.with(|core| {
            if core.state(nr).disk >= Dstate::Attaching {
                return;
            }
            core.expose_nothing(nr);
            let text = "Resumed without access to data; please tear down before attempting \
                        to re-configure.";
            core.log(Severity::Warn, Some(nr), text);
        });
    }
    let mask = Core::SUSPENSIONS;
    let wanted = Wanted { mask, val: StateWord(0) };
    let opt = Opt { wait: false, ..Opt::COMMAND };
    let result = request(cx, nr, wanted, opt).await;
    super::change::settled(cx).await;
    changed(result)
}

// ---- generations ----

/// Spec: states §3.8.
async fn new_current_uuid(cx: &Cx, nr: VolumeNr, clear_bitmap: bool) -> Reply {
    if !cx.with(|core| core.volume(nr).is_some_and(|v| v.has_disk())) {
        return failure(Failure::NoDisk);
    }
    // What the peer says of itself when it has just connected would come after the news that both
    // are UpToDate, and nobody would correct it (the original does not wait).
    cx.until(move |core| {
        let volume = core.volume(nr)?;
        let has_reported = volume.marks.peer_is_connected || volume.state.conn != Cstate::Connected;
        has_reported.then_some(())
    })
    .await;
    let lock = lock(cx, nr).await;
    let reply = new_current_locked(cx, nr, clear_bitmap).await;
    lock.release(cx);
    reply
}

async fn new_current_locked(cx: &Cx, nr: VolumeNr, clear_bitmap: bool) -> Reply {
    let skips = cx.with(|core| {
        let state = core.state(nr);
        let is_new = core.volume(nr).is_some_and(|v| v.slots().current == Gi::JUST_CREATED);
        let skips =
            state.conn == Cstate::Connected && core.conn.version >= 90 && is_new && clear_bitmap;
        if skips {
            core.info(nr, "Preparing to skip initial sync");
        } else if state.conn != Cstate::StandAlone {
            return Err(Failure::NeedStandAlone);
        }
        Ok(skips)
    });
    let skips = match skips {
        Ok(skips) => skips,
        Err(error) => return failure(error),
    };
    cx.with(|core| {
        core.change_slots(nr, |slots, _| slots.rotate_bitmap(Gi(0)));
        core.new_current_uuid(nr);
    });
    let mut reply = code(OK);
    if clear_bitmap {
        cx.with(|core| {
            core.hold_io(nr);
            if let Some(disk) = core.volume_mut(nr).and_then(|v| v.disk.as_mut()) {
                disk.bitmap.clear_all();
                disk.bitmap.mark_all_changed();
            }
            if let Some(volume) = core.volume_mut(nr)
                && core::mem::take(&mut volume.marks.al_suspended)
            {
                core.info(nr, "Resumed AL updates");
            }
        });
        if meta::write_bitmap(cx, nr).await.is_err() {
            cx.with(|core| core.log(Severity::Error, Some(nr), "Writing bitmap failed with -5"));
            reply = failure(Failure::MetaIo);
        }
        cx.with(|core| core.release_io(nr));
        if skips {
            cx.with(|core| {
                core.send_uuids(nr, 8);
                core.change_slots(nr, |slots, _| slots.bitmap = Gi(0));
                core.log_slots(nr, "cleared bitmap UUID");
                let new =
                    Fields { disk: Dstate::UpToDate, pdsk: Dstate::UpToDate, ..core.state(nr) };
                let _ = core.set_state(nr, new, Opt::VERBOSE);
            });
        }
    }
    let _ = meta::sync(cx, nr).await;
    reply
}

// ---- options ----

fn net_options(cx: &Cx, net: NetConfig) -> Reply {
    cx.with(|core| {
        let Some(old) = core.conn.net.clone() else {
            return Reply {
                code: Failure::InvalidRequest.number(),
                info: Some("unknown connection".into()),
            };
        };
        if let Err(error) = core.check_net(&net) {
            return failure(error);
        }
        let is_connected = core.conn.is_up;
        let is_fixed = old.protocol != net.protocol
            || old.two_primaries != net.two_primaries
            || old.integrity_alg != net.integrity_alg
            || old.after_sb != net.after_sb;
        if is_connected && is_fixed && core.conn.version < 100 {
            return failure(Failure::NeedProtocol100);
        }
        if old.csums_alg != net.csums_alg && core.volumes.values().any(|v| v.state.conn.is_sync()) {
            return failure(Failure::ChecksumsRunning);
        }
        if old.verify_alg != net.verify_alg
            && core.volumes.values().any(|v| v.state.conn.is_verify())
        {
            return failure(Failure::VerifyRunning);
        }
        core.conn.net = Some(net);
        core.announce_algorithms();
        if is_connected && core.conn.version >= 100 {
            if let Some(params) = core.protocol_params() {
                core.send(VolumeNr(0), Packet::ProtocolUpdate(params));
            }
            // It holds for the packets behind the announcement.
            let own = core
                .conn
                .net
                .as_ref()
                .and_then(|n| drbd_wire::Algorithm::from_name(&n.integrity_alg));
            core.out.push(Action::AttachDigest(own));
            for nr in core.all_volumes() {
                core.send_sync_param(nr);
            }
        }
        core.out.push(Action::Changed);
        code(OK)
    })
}

async fn disk_options(cx: &Cx, nr: VolumeNr, config: DiskConfig) -> Reply {
    if !cx.with(|core| core.volume(nr).is_some_and(|v| v.disk.is_some())) {
        return failure(Failure::NoDisk);
    }
    let al_updates = config.al_updates;
    let checked = cx.with(|core| {
        let is_a = core.conn.net.as_ref().is_some_and(|n| n.protocol == Protocol::A);
        if is_a && config.fencing == crate::config::Fencing::ResourceAndStonith {
            return Err(Failure::StonithProtocol);
        }
        Ok(())
    });
    if let Err(error) = checked {
        return failure(error);
    }
    let renews_log = cx.with(|core| {
        core.volume(nr).is_some_and(|v| {
            (v.config.al_extents, v.config.al_updates) != (config.al_extents, al_updates)
        })
    });
    if renews_log {
        close_idle_log(cx, nr).await;
    }
    cx.with(|core| {
        if let Some(volume) = core.volume_mut(nr) {
            // The limit of the size is set by resize.
            let size = volume.config.size;
            volume.config = DiskConfig { size, ..config };
            volume.rates = volume.config.resync;
            volume.resync.set_rates(volume.rates);
            let slots = volume.config.al_extents;
            if let Some(disk) = volume.disk.as_mut() {
                if renews_log {
                    disk.al.resize(crate::al::ActivityLog::slots_for(slots, disk.layout));
                }
                disk.superblock.flags.set(drbdmeta::superblock::Flags::AL_DISABLED, !al_updates);
            }
            core.mark_dirty(nr);
        }
        core.update_ordering();
        if core.state(nr).conn >= Cstate::Connected {
            core.send_sync_param(nr);
        }
        core.out.push(Action::Changed);
    });
    let _ = meta::sync(cx, nr).await;
    if renews_log {
        reopen_log(cx, nr);
    }
    code(OK)
}

/// The end of [`close_idle_log`].
pub(super) fn reopen_log(cx: &Cx, nr: VolumeNr) {
    cx.with(|core| {
        if let Some(volume) = core.volume_mut(nr) {
            volume.app.is_log_closed = false;
        }
        core.release_io(nr);
        core.touch();
    });
}

/// Waits until the activity log has no references and lets nobody take one, until it is opened
/// again. Nothing counts on its extents any more: they are flushed, their bits are on disk.
pub(super) async fn close_idle_log(cx: &Cx, nr: VolumeNr) {
    cx.with(|core| core.hold_io(nr));
    cx.until(move |core| {
        let Some(volume) = core.volume_mut(nr) else { return Some(()) };
        let is_idle = volume.disk.as_ref().is_none_or(|disk| disk.al.is_idle());
        let is_free = is_idle && !volume.app.is_log_closed;
        volume.app.is_log_closed |= is_free;
        is_free.then_some(())
    })
    .await;
    super::io::flush_data(cx, nr).await;
    // If that fails the disk is given up.
    let _ = meta::write_bitmap(cx, nr).await;
}
