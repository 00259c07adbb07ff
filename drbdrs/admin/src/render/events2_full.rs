//! What version 9 shows in `events2` besides: only with `--full`, for its monitors.
//! Spec: status-and-integration.md §2.14, §6.1.

use drbd_types::{Cstate, Dstate, Role};

use super::events2::{Field, Kind, Object, gauge, state};
use super::{percent_in_sync, progress, yes_no};
use crate::{Connection, Resource, Section, Volume};

/// Adds the fields.
pub(super) fn extend(object: &mut Object, resource: &Resource, volume: Option<&Volume>) {
    match (object.kind, volume) {
        (Kind::Resource, _) => object.fields.extend([
            state("force-io-failures", "no"),
            state("may_promote", yes_no(may_promote(resource))),
            state("promotion_score", promotion_score(resource)),
        ]),
        (Kind::Connection, _) => {
            let of = |sectors: fn(&Connection) -> Option<u64>| {
                resource.connection.as_ref().and_then(sectors).unwrap_or(0)
            };
            object.fields.extend([
                gauge("ap-in-flight", of(|c| c.ap_in_flight)),
                gauge("rs-in-flight", of(|c| c.rs_in_flight)),
            ]);
        }
        (Kind::Device, Some(volume)) => {
            let disk = volume.backing.as_ref().map_or("none", |b| &b.disk);
            object.fields.insert(0, state("backing_dev", disk));
            insert_behind(object, "disk", [state("client", "no"), state("quorum", "yes")].into());
            object.fields.push(state("open", yes_no(volume.is_open)));
        }
        (Kind::PeerDevice, Some(volume)) => {
            insert_behind(object, "peer-disk", vec![state("peer-client", "no")]);
            insert_behind(object, "resync-suspended", resync(volume));
        }
        (Kind::Device | Kind::PeerDevice | Kind::Path, _) => {}
    }
}

fn insert_behind(object: &mut Object, name: &str, fields: Vec<Field>) {
    let place = object.fields.iter().position(|f| f.name == name).map_or(0, |i| i + 1);
    object.fields.splice(place..place, fields);
}

#[allow(clippy::cast_precision_loss, reason = "a rate with two digits")]
fn resync(volume: &Volume) -> Vec<Field> {
    let Some(run) = progress(volume) else { return Vec::new() };
    vec![
        gauge("done", format!("{:.2}", percent_in_sync(volume))),
        gauge("eta", run.finish),
        gauge("dbdt1", format!("{:.2}", run.speed as f64 / 1024.0)),
    ]
}

/// The path of the connection.
pub(super) fn path(connection: &Connection, key: &str) -> Object {
    let end = |a: &crate::Address| a.to_string().replacen(' ', ":", 1);
    let is_established = connection.state >= Cstate::WFReportParams;
    Object {
        kind: Kind::Path,
        key: format!("{key} local:{} peer:{}", end(&connection.local), end(&connection.peer)),
        fields: vec![state("established", yes_no(is_established))],
    }
}

pub(super) fn may_promote(resource: &Resource) -> bool {
    let two = |c: &Connection| c.options.flag(Section::Net, "allow-two-primaries");
    let two = resource.connection.as_ref().is_some_and(two);
    let taken = resource.role() == Role::Primary || resource.peer_role() == Role::Primary && !two;
    let all = &resource.volumes;
    !taken && !all.is_empty() && all.iter().all(|v| replicas(v) > 0)
}

/// Disks with current data that this node can reach.
fn replicas(volume: &Volume) -> usize {
    let is_good = |disk| usize::from(disk == Dstate::UpToDate);
    is_good(volume.disk) + is_good(volume.peer_disk)
}

pub(super) fn promotion_score(resource: &Resource) -> usize {
    if !may_promote(resource) {
        return 0;
    }
    let all = &resource.volumes;
    let good = all.iter().filter(|v| v.disk == Dstate::UpToDate).count();
    let complete = if good == all.len() { 10_000 } else { 0 };
    complete + 100 * good.min(99) + all.iter().map(replicas).min().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::super::{Events2, Events2Options};
    use crate::{Progress, Resource, Snapshot, Volume};
    use drbd_types::{Cstate, Dstate, Role};

    fn sample() -> Snapshot {
        let mut volume = Volume::new(0, 7);
        volume.cstate = Cstate::SyncSource;
        volume.disk = Dstate::UpToDate;
        volume.peer_disk = Dstate::Inconsistent;
        volume.peer_role = Role::Secondary;
        volume.size = 800;
        volume.counters.out_of_sync = 25;
        volume.progress = Some(Progress { finish: 3, speed: 2048, ..Progress::default() });
        let connection = serde_json::from_str(
            r#"{"local":{"family":"ipv4","addr":"1.1.1.1","port":1},
                "peer":{"family":"ipv6","addr":"::2","port":1},
                "state":"WFReportParams","is_congested":false,"ap_in_flight":8}"#,
        );
        let resource = Resource {
            name: "r0".into(),
            connection: Some(connection.unwrap()),
            volumes: vec![volume],
            ..Resource::default()
        };
        Snapshot { resources: vec![resource], ..Snapshot::default() }
    }

    /// Keys, their order and their values as monitors of version 9 know them.
    #[test]
    fn full_lines() {
        let mut events = Events2::new(Events2Options { full: true, ..Events2Options::default() });
        let mut snapshot = sample();
        assert_eq!(
            events.initial(&snapshot),
            "exists resource name:r0 role:Secondary suspended:no write-ordering:flush \
             force-io-failures:no may_promote:yes promotion_score:10101\n\
             exists connection name:r0 peer-node-id:0 conn-name:peer connection:Connected \
             role:Secondary congested:no ap-in-flight:8 rs-in-flight:0\n\
             exists device name:r0 volume:0 minor:7 backing_dev:none disk:UpToDate client:no \
             quorum:yes size:400 read:0 written:0 al-writes:0 bm-writes:0 upper-pending:0 \
             lower-pending:0 al-suspended:no blocked:no open:no\n\
             exists peer-device name:r0 peer-node-id:0 conn-name:peer volume:0 \
             replication:SyncSource peer-disk:Inconsistent peer-client:no resync-suspended:no \
             done:75.00 eta:3 dbdt1:2.00 received:0 sent:0 out-of-sync:100 pending:0 unacked:0\n\
             exists path name:r0 peer-node-id:0 conn-name:peer local:ipv4:1.1.1.1:1 \
             peer:ipv6:[::2]:1 established:yes\n\
             exists -\n"
        );
        assert_eq!(events.poll(&snapshot), "");
        snapshot.resources[0].volumes[0].counters.read = 16;
        let polled = events.poll(&snapshot);
        assert!(polled.starts_with("change device name:r0 volume:0 minor:7 backing_dev:none"));
        assert!(polled.contains(" read:8 ") && polled.lines().count() == 1, "{polled}");
        snapshot.resources[0].volumes[0].role = Role::Primary;
        let polled = events.poll(&snapshot);
        assert!(polled.contains("role:Primary suspended:no write-ordering:flush force-io-failures:no may_promote:no promotion_score:0\n"), "{polled}");
    }
}
