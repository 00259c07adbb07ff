//! Why something is as it is, and what to do next: in words, and as stable codes.
//!
//! Codes of this module, in the order in which they win; beside them those of
//! `drbd_core::generation::explain` for the outcome of a handshake:
//!
//! | of a volume | meaning |
//! | --- | --- |
//! | `broken` | the thread of the resource has ended |
//! | `handler` | a handler program runs |
//! | `fencing`, `no-data`, `suspended` | I/O is suspended |
//! | `paused-user`, `paused-peer`, `paused-dependency` | a resync waits |
//! | `resync-limit`, `resync-source`, `verifying` | it runs: what limits it |
//! | `split-brain-unresolved` ... | the last handshake failed, there is no connection |
//! | `disconnected`, `standalone` | an administrator, or something else, has ended the connection |
//! | `no-disk`, `inconsistent`, `outdated` | the data here is not the best |
//!
//! | of a connection | meaning |
//! | --- | --- |
//! | `peer-unreachable` | nobody answers |
//! | `handshake` | the two nodes are talking |
//! | `reconnecting` | it was lost a moment ago |

use std::fmt::Write;
use std::time::Instant;

use drbd_admin::{Reason, Request, Resource, Section, Snapshot, Target, Volume};
use drbd_core::engine::status::{Status, VolumeStatus};
use drbd_core::generation::explain;
use drbd_types::{Cstate, Dstate, Role};

use super::registry::{Node, Record};

fn reason(code: &str, text: impl Into<String>) -> Reason {
    Reason { code: code.into(), text: text.into() }
}

fn seconds(since: Instant) -> u64 {
    since.elapsed().as_secs()
}

/// Puts reasons into a resource.
pub(super) fn explain(resource: &mut Resource, record: &Record) {
    let is_connected = resource.connection.is_some();
    if let Some(connection) = &mut resource.connection {
        let at = format!("{}:{}", connection.peer.addr, connection.peer.port);
        connection.reason = match connection.state {
            Cstate::WFReportParams if has_met(&record.status) => None,
            Cstate::WFReportParams => {
                Some(reason("handshake", format!("the two nodes compare their data ({at})")))
            }
            Cstate::WFConnection | Cstate::Unconnected => {
                let mut text = format!("nobody answers at {at} yet; this node keeps trying");
                if let Some(problem) = &record.problem {
                    let _ = write!(text, " (last problem: {})", problem.text.trim());
                }
                Some(reason("peer-unreachable", text))
            }
            Cstate::Disconnecting => Some(reason("disconnecting", "the connection is being ended")),
            Cstate::StandAlone => None,
            _ => Some(reason("reconnecting", "the connection was lost and will be tried again")),
        };
    }
    for volume in &mut resource.volumes {
        let status = record.status.volumes.iter().find(|v| v.nr.0 == volume.volume);
        if let Some(status) = status {
            volume.reason = of_volume(volume, status, record, is_connected);
        }
    }
}

/// All volumes have been compared with the peer's.
pub(super) fn has_met(status: &Status) -> bool {
    status.volumes.iter().all(|v| v.state.conn >= Cstate::Connected)
}

fn of_volume(
    volume: &Volume,
    status: &VolumeStatus,
    record: &Record,
    is_connected: bool,
) -> Option<Reason> {
    if record.is_broken {
        let text = record.problem.as_ref().map_or("", |p| p.text.as_str());
        let text = format!("the daemon can not go on with this resource ({text}): restart it");
        return Some(reason("broken", text));
    }
    if let Some((name, since)) = record.handlers.values().next() {
        let text = format!("the handler {name} runs since {} s", seconds(*since));
        return Some(reason("handler", text));
    }
    suspension(status)
        .or_else(|| running(volume, status))
        .or_else(|| handshake(volume, status, record, is_connected))
        .or_else(|| data(volume, status))
}

fn suspension(status: &VolumeStatus) -> Option<Reason> {
    let state = &status.state;
    if state.susp_fen {
        let text = "I/O waits until the peer is fenced: the fence-peer handler has not said that \
                    it is outdated or dead (resume-io lets it go on)";
        return Some(reason("fencing", text));
    }
    if state.susp_nod {
        let text = "I/O waits because neither node has usable data (on-no-data-accessible \
                    suspend-io): attach a disk or connect the peer";
        return Some(reason("no-data", text));
    }
    let text = "I/O was suspended by the administrator: resume-io lets it go on";
    state.susp.then(|| reason("suspended", text))
}

/// A resync or verify: who holds it, or what limits it.
fn running(volume: &Volume, status: &VolumeStatus) -> Option<Reason> {
    let is_working = volume.cstate.is_sync() || volume.cstate.is_verify();
    if !is_working {
        return None;
    }
    if volume.paused_user {
        return Some(reason("paused-user", "paused by the administrator: resume-sync continues"));
    }
    if volume.paused_after {
        let after = status.config.resync_after.map_or(0, |minor| minor.0);
        let text = format!("waits for the resync of minor {after} (resync-after)");
        return Some(reason("paused-dependency", text));
    }
    if volume.paused_peer {
        return Some(reason("paused-peer", "paused on the peer, which has its own reason for it"));
    }
    let rates = &status.config.resync;
    let want = status.wanted_rate;
    Some(match volume.cstate {
        Cstate::SyncTarget | Cstate::VerifyS if rates.c_plan_ahead == 0 => {
            let text = format!("at the fixed resync-rate of {} KiB/s", rates.resync_rate);
            reason("resync-limit", text)
        }
        Cstate::SyncTarget | Cstate::VerifyS if want >= u64::from(rates.c_max_rate) => {
            let text = format!("limited by c-max-rate, {} KiB/s", rates.c_max_rate);
            reason("resync-limit", text)
        }
        Cstate::SyncTarget | Cstate::VerifyS => {
            let (fill, delay) = (rates.c_fill_target, rates.c_delay_target);
            let aim = if fill > 0 {
                format!("c-fill-target, {fill} sectors on the way")
            } else {
                format!("c-delay-target, {delay} tenths of a second")
            };
            let text = format!(
                "the controller wants {want} KiB/s to keep to {aim}; above {} KiB/s it steps \
                 aside for application I/O (c-min-rate)",
                status.config.c_min_rate
            );
            reason("resync-limit", text)
        }
        Cstate::VerifyT => reason("verifying", "the peer compares the two disks and sets the pace"),
        _ => {
            let text = format!(
                "the peer fetches changed blocks and sets the pace; above {} KiB/s this node \
                 puts application I/O first (c-min-rate)",
                status.config.c_min_rate
            );
            reason("resync-source", text)
        }
    })
}

/// A handshake that led to no connection.
fn handshake(
    volume: &Volume,
    status: &VolumeStatus,
    record: &Record,
    is_connected: bool,
) -> Option<Reason> {
    if volume.cstate >= Cstate::WFReportParams || is_connected {
        return None;
    }
    let is_alone = volume.cstate == Cstate::StandAlone;
    let name = &record.name;
    if let Some(since) = record.disconnected.filter(|_| is_alone) {
        let text = format!(
            "disconnected by the administrator {} s ago: drbdadm connect {name} ends that",
            seconds(since)
        );
        return Some(reason("disconnected", text));
    }
    if let Some(met) = status.met.filter(|met| is_failure(met.reason)) {
        let text = format!("{} (rule {})", met.reason.meaning(), met.rule);
        return Some(reason(met.reason.code(), text));
    }
    let problem = record.problem.as_ref()?;
    is_alone.then(|| {
        let text = problem.text.trim();
        reason("standalone", format!("no connection since: {text} (drbdadm connect {name})"))
    })
}

fn is_failure(why: explain::Reason) -> bool {
    use explain::Reason as R;
    !matches!(why, R::InSync | R::NewerData | R::DiskStates | R::SplitBrainSolved)
}

/// The data here is not the best.
fn data(volume: &Volume, status: &VolumeStatus) -> Option<Reason> {
    match status.state.disk {
        Dstate::Diskless if volume.peer_disk == Dstate::UpToDate => {
            Some(reason("no-disk", "no disk is attached: all I/O goes to the peer"))
        }
        Dstate::Diskless => Some(reason("no-disk", "no disk is attached: attach one")),
        Dstate::Inconsistent if !volume.cstate.is_sync() => {
            let text = "the data is incomplete: connect a peer that is UpToDate; if this is a new \
                        pair, make the node with the right data Primary with --force";
            Some(reason("inconsistent", text))
        }
        Dstate::Outdated => {
            let text = "the peer has, or may have, newer data: connect it";
            Some(reason("outdated", text))
        }
        _ => None,
    }
}

// ---- text for people ----

/// `why`: what every resource does or waits for, and what to do next.
pub(super) fn why(node: &Node, snapshot: &Snapshot) -> String {
    let mut text = String::new();
    for (id, words) in &snapshot.daemon.faults {
        let _ = writeln!(text, "FAULT {id} is switched on: {words}");
    }
    for resource in &snapshot.resources {
        let name = &resource.name;
        let connection = resource.connection.as_ref();
        let state = connection.map_or("StandAlone", |c| c.state.name());
        let state = if state == "WFReportParams" { "Connected" } else { state };
        let _ = writeln!(text, "{name}: {}, {state}", resource.role());
        if let Some(why) = connection.and_then(|c| c.reason.as_ref()) {
            let _ = writeln!(text, "  connection: {} [{}]", why.text, why.code);
        }
        if connection.is_none() && !resource.volumes.iter().any(|v| v.reason.is_some()) {
            let _ = writeln!(text, "  there is no connection: drbdadm connect {name}");
        }
        for volume in &resource.volumes {
            of_one(&mut text, volume);
        }
        let id = node.id_of(name);
        let decisions = id.and_then(|id| node.with(id, decisions)).unwrap_or_default();
        text.push_str(&decisions);
    }
    text
}

fn of_one(text: &mut String, volume: &Volume) {
    let Volume { volume: nr, minor, cstate, disk, peer_disk, .. } = volume;
    let _ = writeln!(text, "  volume {nr} (minor {minor}): {cstate}, disk {disk}/{peer_disk}");
    match &volume.reason {
        Some(why) => {
            let _ = writeln!(text, "    {} [{}]", why.text, why.code);
        }
        None if volume.is_blocked && volume.counters.application_pending > 0 => {
            let _ = writeln!(text, "    new requests wait for a moment [blocked]");
        }
        None => {
            let is_good = *disk == Dstate::UpToDate && *peer_disk == Dstate::UpToDate;
            let words = if is_good { "in sync, nothing to do" } else { "nothing to wait for" };
            let _ = writeln!(text, "    {words} [ok]");
        }
    }
    if volume.role == Role::Primary && *peer_disk < Dstate::UpToDate {
        let _ = writeln!(text, "    only this node has the newest data");
    }
    if volume.counters.out_of_sync > 0 {
        let kib = volume.counters.out_of_sync.saturating_mul(4);
        let _ = writeln!(text, "    {kib} KiB are out of sync");
    }
    if let Some(g) = &volume.generations {
        let [current, bitmap, younger, older] = g.slots;
        let _ = writeln!(text, "    generations {current}:{bitmap}:{younger}:{older}");
    }
}

/// How the last handshakes were decided.
fn decisions(record: &mut Record) -> String {
    let mut text = String::new();
    for volume in &record.status.volumes {
        if let Some(met) = volume.met {
            let _ = writeln!(
                text,
                "  last handshake of volume {}: rule {}, {} [{}]",
                volume.nr.0,
                met.rule,
                met.reason.meaning(),
                met.reason.code()
            );
        }
    }
    if let Some(problem) = record.problem.as_ref().filter(|_| record.disconnected.is_none()) {
        let age = seconds(problem.at);
        let _ = writeln!(text, "  last problem, {age} s ago: {}", problem.text.trim());
    }
    text
}

/// `show-stuck`: what waits for what, and since when.
pub(super) fn stuck(node: &Node, target: &Target) -> String {
    let mut text = String::new();
    node.with_all(|all| {
        for record in all.iter() {
            let is_meant = match target {
                Target::All => true,
                Target::Resource(name) => record.name == *name,
                Target::Minor(minor) => record.volume_of(*minor).is_some(),
            };
            if is_meant {
                stuck_record(&mut text, record, target);
            }
        }
    });
    if text.is_empty() { "nothing waits\n".into() } else { text }
}

fn stuck_record(text: &mut String, record: &Record, target: &Target) {
    let name = &record.name;
    for (handler, since) in record.handlers.values() {
        let _ = writeln!(text, "{name}: handler {handler} runs since {} s", seconds(*since));
    }
    if record.status.waits_for_peer {
        let _ = writeln!(text, "{name}: a change of the connection waits for the peer's answer");
    }
    if record.status.is_congested {
        let _ = writeln!(text, "{name}: more than half of the send buffer is in use");
    }
    for volume in &record.status.volumes {
        if matches!(target, Target::Minor(minor) if *minor != volume.minor.0) {
            continue;
        }
        stuck_volume(text, name, volume);
    }
}

fn stuck_volume(text: &mut String, name: &str, volume: &VolumeStatus) {
    let head = format!("{name}/{}", volume.nr.0);
    let age = |micros: u64| format!("{}.{:03} s", micros / 1_000_000, micros / 1000 % 1000);
    let mut line = |words: String| {
        let _ = writeln!(text, "{head}: {words}");
    };
    if let Some(micros) = volume.oldest_request {
        let n = volume.app_pending;
        line(format!("{n} requests of applications, the oldest since {}", age(micros)));
    }
    if volume.waiting > 0 {
        let why = if volume.is_blocked { "new I/O is held back" } else { "too many are open" };
        line(format!("{} requests are not admitted: {why}", volume.waiting));
    }
    if volume.blocked_on_log > 0 {
        line(format!("{} requests wait for the activity log", volume.blocked_on_log));
    }
    if let Some(micros) = volume.oldest_disk_io {
        let n = volume.local_pending;
        line(format!("{n} requests to the disk, the oldest I/O since {}", age(micros)));
    }
    if volume.peer_pending > 0 {
        line(format!("{} answers of the peer are awaited", volume.peer_pending));
    }
    if volume.owed > 0 {
        line(format!("{} answers are owed to the peer", volume.owed));
    }
    if volume.waits_for_peer {
        line("a change of state waits for the peer's answer".into());
    }
    if volume.must_wait {
        line("its resync waits for another one (resync-after)".into());
    }
}

/// What a command waits for, to continue "waiting for".
pub(super) fn waiting(node: &Node, request: &Request) -> String {
    let general = || "the daemon".to_owned();
    let Some(name) = resource_of(node, request) else { return general() };
    let Some(id) = node.id_of(&name) else { return format!("the end of {name}") };
    let what = node.with(id, |record| {
        if let Some((handler, since)) = record.handlers.values().next() {
            return Some(format!("the handler {handler}, for {} s", seconds(*since)));
        }
        if record.status.waits_for_peer || record.status.volumes.iter().any(|v| v.waits_for_peer) {
            return Some("the peer to agree".into());
        }
        let io: u64 = record.status.volumes.iter().map(|v| v.local_pending).sum();
        match request {
            Request::Attach { disk, .. } => Some(disk.clone()),
            Request::Detach { .. } | Request::Down { .. } if io > 0 => {
                Some(format!("{io} requests to the disk"))
            }
            Request::Disconnect { .. } => Some("the connection to end".into()),
            _ => None,
        }
    });
    format!("{} ({name})", what.flatten().unwrap_or_else(general))
}

/// The resource that a command is about, if it is one.
pub(super) fn resource_of(node: &Node, request: &Request) -> Option<String> {
    let of_minor = |minor: u32| {
        let (id, _) = node.volume_of(minor)?;
        node.with(id, |r| r.name.clone())
    };
    let of_target = |target: &Target| match target {
        Target::All => None,
        Target::Minor(minor) => of_minor(*minor),
        Target::Resource(name) => Some(name.clone()),
    };
    match request {
        Request::NewResource { resource, .. }
        | Request::ResourceOptions { resource, .. }
        | Request::DelResource { resource }
        | Request::NewMinor { resource, .. }
        | Request::Connect { resource, .. } => Some(resource.clone()),
        Request::DelMinor { minor } | Request::Attach { minor, .. } => of_minor(*minor),
        Request::NetOptions { local, .. } | Request::Disconnect { local, .. } => {
            node.with_all(|all| {
                let has = |r: &&Record| r.network.as_ref().is_some_and(|n| n.local == *local);
                all.iter().find(has).map(|r| r.name.clone())
            })
        }
        Request::DiskOptions { target, .. }
        | Request::Detach { target, .. }
        | Request::Down { target }
        | Request::Primary { target, .. }
        | Request::Secondary { target }
        | Request::Invalidate { target }
        | Request::InvalidateRemote { target }
        | Request::Outdate { target }
        | Request::Verify { target, .. }
        | Request::PauseSync { target }
        | Request::ResumeSync { target }
        | Request::SuspendIo { target }
        | Request::ResumeIo { target }
        | Request::NewCurrentUuid { target, .. }
        | Request::Resize { target, .. }
        | Request::Status { target }
        | Request::Watch { target }
        | Request::ShowStuck { target }
        | Request::Why { target } => of_target(target),
        Request::FaultSet { .. } | Request::FaultClear { .. } => None,
    }
}

/// The shared secret is for those who may administer.
pub(super) fn without_secrets(snapshot: &mut Snapshot) {
    snapshot.resources.iter_mut().for_each(hide);
}

/// The same for one resource.
pub(super) fn hide(resource: &mut Resource) {
    if let Some(connection) = &mut resource.connection
        && !connection.options.text(Section::Net, "shared-secret").is_empty()
    {
        connection.options.0.remove("shared-secret");
    }
}
