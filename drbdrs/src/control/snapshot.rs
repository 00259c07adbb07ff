//! The engine's state and control's records together: what every status view is made from.
//! Spec: status-and-integration.md §1, §2.4, §2.14.

use drbd_admin::{
    Backing, Cache, Connection, Counters, Generations, Handshake, HandshakeSide, Histogram,
    Latencies, OptionSet, OptionValue, Outcome, Progress, Resource, Suspended, Volume, WaitClass,
    Window, WriteOrdering,
};
use drbd_core::engine::status::{Met, MetSide, Status, VolumeStatus};
use drbd_core::generation::{Slots, decide};
use drbd_core::latency;
use drbd_core::resync::extents::ENTRIES;
use drbd_core::resync::progress::Detail;
use drbd_types::{Cstate, Dstate, Gi};
use drbdmeta::superblock::Flags;

use super::registry::{Network, Record};
use super::why;

/// Sectors of a bit.
const SECTORS_PER_BIT: u64 = 8;

/// One resource as views show it.
pub(super) fn resource(record: &Record) -> Resource {
    let status = &record.status;
    let connection = record.network.as_ref().filter(|_| status.has_net);
    let mut resource = Resource {
        name: record.name.clone(),
        options: record.options.clone(),
        suspended: suspended(status),
        write_ordering: match status.ordering {
            'n' => WriteOrdering::None,
            'd' => WriteOrdering::Drain,
            _ => WriteOrdering::Flush,
        },
        connection: connection.map(|network| connection_of(network, status)),
        apart_since_us: record.past.apart_since,
        has_been_together: record.past.has_been_together,
        volumes: status.volumes.iter().map(|v| volume(record, status, v)).collect(),
    };
    why::explain(&mut resource, record);
    resource
}

fn suspended(status: &Status) -> Suspended {
    let any = |flag: fn(&VolumeStatus) -> bool| status.volumes.iter().any(flag);
    Suspended {
        user: any(|v| v.state.susp),
        no_data: any(|v| v.state.susp_nod),
        fencing: any(|v| v.state.susp_fen),
    }
}

fn connection_of(network: &Network, status: &Status) -> Connection {
    let open = status.volumes.iter().map(|v| v.resync_in_flight).sum();
    let is_up = status.conn >= Cstate::WFReportParams;
    Connection {
        local: network.local.clone(),
        peer: network.peer.clone(),
        peer_name: None,
        options: network.options.clone(),
        state: status.conn.min(Cstate::WFReportParams),
        is_congested: status.is_congested,
        agreed: status.version.filter(|_| is_up).and_then(|v| u8::try_from(v).ok()),
        ap_in_flight: Some(status.app_in_flight),
        rs_in_flight: Some(open),
        reason: None,
    }
}

fn volume(record: &Record, status: &Status, from: &VolumeStatus) -> Volume {
    let state = &from.state;
    let known = record.volumes.get(&from.nr.0);
    let past = record.past.of(from.nr.0);
    let has_disk = state.disk > Dstate::Failed;
    let attached = known.and_then(|k| k.backing.as_ref()).filter(|_| has_disk);
    Volume {
        volume: from.nr.0,
        minor: from.minor.0,
        role: state.role,
        peer_role: state.peer,
        cstate: state.conn,
        disk: state.disk,
        peer_disk: state.pdsk,
        paused_after: state.aftr_isp,
        paused_peer: state.peer_isp,
        paused_user: state.user_isp,
        is_open: from.users > 0,
        is_blocked: from.is_blocked,
        is_al_suspended: from.al_suspended,
        size: from.size.0,
        devices: known.map_or_else(Vec::new, |k| [&k.nodes[..], &k.exports].concat()),
        backing: attached.map(|backing| Backing {
            device_uuid: from.device_uuid,
            options: with_size(&backing.options, from),
            ..backing.clone()
        }),
        generations: from.flags.map(|flags| generations(from, flags)),
        counters: Counters {
            sent: from.sent,
            received: from.received,
            written: from.written,
            read: from.read,
            al_writes: from.al_writes,
            bm_writes: 0,
            local_pending: from.local_pending,
            peer_pending: from.peer_pending,
            unacked: from.owed,
            application_pending: from.app_pending,
            epochs: u64::try_from(status.epochs).unwrap_or(u64::MAX).max(1),
            out_of_sync: from.out_of_sync_bits,
        },
        progress: progress(from),
        wait_class: wait_class(from),
        caches: from.activity_log.map(|(used, size, c)| {
            let log = Cache {
                used: wide(used),
                size: u64::from(size),
                hits: c.hits,
                misses: c.misses,
                starving: c.starving,
                locked: c.locked,
                changed: c.changed,
            };
            let held = wide(from.resync_extents);
            (Cache { used: held, size: wide(ENTRIES), ..Cache::default() }, log)
        }),
        blocked_on_al: from.blocked_on_log,
        reason: None,
        handshake: from.met.map(|met| handshake(&met, past.met_at(&met))),
        alone_since_us: past.alone_since,
        oldest_request_us: from.oldest_request,
        latencies: latencies(&from.latencies),
    }
}

fn handshake(met: &Met, at_us: u64) -> Handshake {
    let side = |side: &MetSide| HandshakeSide {
        slots: slots(&side.slots),
        out_of_sync: side.bits,
        role: side.role,
        disk: side.disk,
    };
    Handshake {
        at_us,
        rule: met.rule,
        code: met.reason.code().into(),
        text: met.reason.meaning().into(),
        outcome: match met.outcome {
            decide::Outcome::Connected => Outcome::Connected,
            decide::Outcome::Source(_) => Outcome::Source,
            decide::Outcome::Target(_) => Outcome::Target,
            decide::Outcome::Failed => Outcome::Failed,
        },
        is_split_brain: met.is_split_brain,
        own: side(&met.own),
        peer: side(&met.peer),
    }
}

fn latencies(from: &latency::Latencies) -> Latencies {
    let one = |(kind, stage, h): (latency::Kind, latency::Stage, &latency::Histogram)| Histogram {
        kind: kind.name().into(),
        stage: stage.name().into(),
        counts: h.counts.into(),
        sum_us: h.sum,
    };
    let histograms: Vec<Histogram> = from.iter().map(one).collect();
    let limits_us = if histograms.is_empty() { Vec::new() } else { latency::LIMITS.into() };
    Latencies { limits_us, histograms }
}

const fn slots(slots: &Slots) -> [Gi; 4] {
    [slots.current, slots.bitmap, slots.history[0], slots.history[1]]
}

fn wide(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

/// The limit of the size changes without `disk-options`.
fn with_size(options: &OptionSet, from: &VolumeStatus) -> OptionSet {
    let mut options = options.clone();
    options.0.remove("size");
    if from.config.size.0 != 0 {
        options.set("size", OptionValue::Number(from.config.size.0));
    }
    options
}

fn generations(from: &VolumeStatus, flags: Flags) -> Generations {
    Generations {
        slots: slots(&from.slots),
        consistent: flags.contains(Flags::CONSISTENT),
        up_to_date: flags.contains(Flags::WAS_UP_TO_DATE),
        primary: flags.contains(Flags::PRIMARY),
        connected: flags.contains(Flags::CONNECTED),
        full_sync: flags.contains(Flags::FULL_SYNC),
        peer_outdated: flags.contains(Flags::PEER_OUTDATED),
        crashed_primary: from.crashed_primary,
    }
}

fn progress(from: &VolumeStatus) -> Option<Progress> {
    let (shown, detail) = from.progress.zip(from.detail)?;
    let is_shown = from.state.conn.is_sync() || from.state.conn.is_verify();
    if !is_shown {
        return None;
    }
    let Detail { total, left, elapsed_ms, paused_ms, recent, short, long } = detail;
    let window = |(ms, bits): (u64, u64)| Window { ms, sectors: bits * SECTORS_PER_BIT };
    let asks = matches!(from.state.conn, Cstate::SyncTarget | Cstate::VerifyS);
    Some(Progress {
        total,
        left,
        permille: shown.permille,
        finish: shown.finish,
        speed: shown.speed,
        average: shown.average,
        recent,
        is_stalled: shown.stalled,
        want: asks.then_some(from.wanted_rate),
        position: from.position,
        start_sector: from.verify.0,
        stop_sector: from.verify.1,
        elapsed_ms,
        paused_ms,
        short: window(short),
        long: window(long),
        failed: from.failed_and_equal.0,
        same_checksum: from.failed_and_equal.1,
    })
}

/// Spec: states-and-generations.md §10.
fn wait_class(from: &VolumeStatus) -> WaitClass {
    if from.state.pdsk == Dstate::Outdated {
        WaitClass::PeerOutdated
    } else if from.degraded_wfc {
        WaitClass::Degraded
    } else {
        WaitClass::Default
    }
}
