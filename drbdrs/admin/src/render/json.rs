//! `drbdsetup status --json` in the form of DRBD 9. Spec: status-and-integration.md §2.14.
//!
//! Statistics are always there: monitors ask without `--statistics` and read them. Counters have 64
//! bits here. Members of our own come last: `reason` and `faults`.

use drbd_types::Cstate;
use serde_json::{Map, Value, json};

use super::{
    bits_to_kib, connection_name, percent_in_sync, progress, replication_name, resync_suspended,
};
use crate::{Connection, Progress, Reason, Resource, Snapshot, Volume};

/// Our node number and that of the peer; 8.4 has none, and its events call the peer 0.
const NODE_ID: u8 = 1;
const PEER_NODE_ID: u8 = 0;

/// An array with one object per resource.
#[must_use]
pub fn status_json(snapshot: &Snapshot) -> Value {
    let faults: Vec<&str> = snapshot.daemon.faults.iter().map(|(_, text)| text.as_str()).collect();
    let mut resources: Vec<&Resource> = snapshot.resources.iter().collect();
    resources.sort_by(|a, b| a.name.as_bytes().cmp(b.name.as_bytes()));
    resources.into_iter().map(|r| resource(r, &faults)).collect()
}

fn resource(resource: &Resource, faults: &[&str]) -> Value {
    let s = resource.suspended;
    let mut object = json!({
        "name": resource.name,
        "node-id": NODE_ID,
        "role": resource.role().name(),
        "suspended": s.is_any(),
        "suspended-user": s.user,
        "suspended-no-data": s.no_data,
        "suspended-fencing": s.fencing,
        "suspended-quorum": false,
        "force-io-failures": false,
        "write-ordering": resource.write_ordering.name(),
        "devices": resource.volumes.iter().map(device).collect::<Value>(),
        "connections":
            resource.connection.iter().map(|c| connection(resource, c)).collect::<Value>(),
    });
    if let (Some(object), false) = (object.as_object_mut(), faults.is_empty()) {
        object.insert("faults".into(), json!(faults));
    }
    object
}

fn with_reason(mut object: Map<String, Value>, reason: Option<&Reason>) -> Value {
    if let Some(Reason { code, text }) = reason {
        object.insert("reason".into(), json!({ "code": code, "text": text }));
    }
    Value::Object(object)
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(object) => object,
        _ => Map::new(),
    }
}

fn device(volume: &Volume) -> Value {
    let c = &volume.counters;
    let device = json!({
        "volume": volume.volume,
        "minor": volume.minor,
        "disk-state": volume.disk.name(),
        "client": false,
        "quorum": true,
        "size": volume.size / 2,
        "read": c.read / 2,
        "written": c.written / 2,
        "al-writes": c.al_writes,
        "bm-writes": c.bm_writes,
        "upper-pending": c.application_pending,
        "lower-pending": c.local_pending,
    });
    with_reason(object(device), volume.reason.as_ref())
}

fn connection(resource: &Resource, connection: &Connection) -> Value {
    let mut object = object(json!({
        "peer-node-id": PEER_NODE_ID,
        "name": connection.peer_name.as_deref().unwrap_or("peer"),
        "connection-state": connection_name(connection.state),
        "congested": connection.is_congested,
        "peer-role": resource.peer_role().name(),
    }));
    if let Some(sectors) = connection.ap_in_flight {
        object.insert("ap-in-flight".into(), sectors.into());
    }
    if let Some(sectors) = connection.rs_in_flight {
        object.insert("rs-in-flight".into(), sectors.into());
    }
    let peers = resource.volumes.iter().map(peer_device).collect();
    object.insert("peer_devices".into(), peers);
    with_reason(object, connection.reason.as_ref())
}

fn peer_device(volume: &Volume) -> Value {
    let c = &volume.counters;
    let run = progress(volume);
    let percent = rounded(percent_in_sync(volume));
    let mut object = object(json!({
        "volume": volume.volume,
        "replication-state": replication_name(volume.cstate),
        "peer-disk-state": volume.peer_disk.name(),
        "peer-client": false,
        "resync-suspended": resync_suspended(volume),
        "received": c.received / 2,
        "sent": c.sent / 2,
        "out-of-sync": bits_to_kib(c.out_of_sync),
        "pending": c.peer_pending,
        "unacked": c.unacked,
        "has-sync-details": run.is_some_and(|r| r.total != 0),
        "has-online-verify-details": run.is_some() && volume.cstate.is_verify(),
        "percent-in-sync": percent,
    }));
    match run {
        Some(run) if run.total != 0 => object.extend(details(volume.cstate, run)),
        Some(_) => {
            object.insert("percent-resync-done".into(), percent.into());
        }
        None => {}
    }
    Value::Object(object)
}

fn details(state: Cstate, run: &Progress) -> Map<String, Value> {
    let sectors = |bits: u64| bits.saturating_mul(8);
    let mut object = object(json!({
        "rs-total": sectors(run.total),
        "rs-dt-start-ms": run.elapsed_ms,
        "rs-paused-ms": run.paused_ms,
        "rs-dt0-ms": run.short.ms,
        "rs-db0-sectors": run.short.sectors,
        "rs-dt1-ms": run.long.ms,
        "rs-db1-sectors": run.long.sectors,
    }));
    object.extend(match (state.is_verify(), run) {
        (true, run) => self::object(json!({
            "ov-start-sector": run.start_sector,
            "ov-stop-sector": run.stop_sector.unwrap_or(u64::MAX),
            "ov-position": sectors(run.position),
            "ov-left": sectors(run.left),
            "ov-skipped": 0,
        })),
        (false, run) => self::object(json!({
            "rs-failed": sectors(run.failed),
            "rs-same-csum": sectors(run.same_checksum),
        })),
    });
    if let Some(want) = run.want {
        object.insert("want".into(), mib(want).into());
    }
    let done = run.total.saturating_sub(run.left);
    let finish = if run.speed == 0 && run.left > 0 { 987_654_321 } else { run.finish };
    object.extend(self::object(json!({
        "db0/dt0 [MiB/s]": mib(run.recent),
        "db1/dt1 [MiB/s]": mib(run.speed),
        "estimated-seconds-to-finish": finish,
        "db/dt [MiB/s]": mib(run.average),
        "percent-resync-done": percent(done, run.total),
    })));
    object
}

#[allow(clippy::cast_precision_loss, reason = "a rate with two digits")]
fn mib(kib: u64) -> f64 {
    rounded(kib as f64 / 1024.0)
}

#[allow(clippy::cast_precision_loss, reason = "a percentage with two digits")]
fn percent(part: u64, all: u64) -> f64 {
    if all == 0 { 100.0 } else { rounded(part as f64 * 100.0 / all as f64) }
}

fn rounded(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}
