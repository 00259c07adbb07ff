//! `drbdsetup show --json` in the form of DRBD 9. Spec: status-and-integration.md §2.14.

use drbd_conf::options::{OPTIONS, Section};
use serde_json::{Map, Value, json};

use super::ShowOptions;
use crate::{Connection, MetaIndex, OptionSet, OptionValue, Resource, Snapshot, Volume};

/// An array with one object per resource.
#[must_use]
pub fn show_json(snapshot: &Snapshot, options: &ShowOptions) -> Value {
    snapshot.resources.iter().map(|r| resource(r, options.defaults)).collect()
}

fn options(section: Section, set: &OptionSet, defaults: bool) -> Map<String, Value> {
    let mut all = Map::new();
    for spec in OPTIONS.iter().filter(|o| o.section == section) {
        let value = set.effective(spec);
        if defaults || value != OptionValue::default_of(spec) {
            let value = match value {
                OptionValue::Bool(b) => json!(b),
                OptionValue::Number(n) => json!(n),
                OptionValue::Text(t) => json!(t),
                OptionValue::None => continue,
            };
            all.insert(spec.name.into(), value);
        }
    }
    all
}

fn resource(resource: &Resource, defaults: bool) -> Value {
    let mut own = options(Section::Options, &resource.options, defaults);
    if defaults {
        // Options of version 9 that readers rely on, with what 8.4 does.
        own.insert("auto-promote".into(), false.into());
        own.insert("quorum".into(), "off".into());
        own.insert("on-no-quorum".into(), "io-error".into());
        own.insert("on-suspended-primary-outdated".into(), "disconnect".into());
    }
    let volumes: Value = resource.volumes.iter().map(|v| volume(v, defaults)).collect();
    let connect = |c| connection(resource, c, defaults);
    json!({
        "resource": resource.name,
        "options": own,
        "_this_host": { "node-id": 1, "volumes": volumes },
        "connections": resource.connection.iter().map(connect).collect::<Value>(),
    })
}

fn volume(volume: &Volume, defaults: bool) -> Value {
    let mut object = json!({ "volume_nr": volume.volume, "device_minor": volume.minor });
    if let (Some(object), Some(backing)) = (object.as_object_mut(), &volume.backing) {
        let meta = match backing.meta_index {
            MetaIndex::Internal => "internal".into(),
            MetaIndex::Flexible => backing.meta_disk.clone(),
            MetaIndex::Index(n) => format!("{} [ {n} ]", backing.meta_disk),
        };
        object.insert("backing-disk".into(), backing.disk.clone().into());
        object.insert("meta-disk".into(), meta.into());
        object.insert("disk".into(), options(Section::Disk, &backing.options, defaults).into());
    }
    object
}

fn connection(resource: &Resource, connection: &Connection, defaults: bool) -> Value {
    let mut net = Map::new();
    net.insert("_name".into(), connection.peer_name.as_deref().unwrap_or("peer").into());
    net.extend(options(Section::Net, &connection.options, defaults));
    // Version 9 has it here, 8.4 with the disks; the strictest one counts.
    let policy = |v: &Volume| v.backing.as_ref().map(|b| b.options.text(Section::Disk, "fencing"));
    let policies: Vec<String> = resource.volumes.iter().filter_map(policy).collect();
    let order = ["resource-and-stonith", "resource-only", "dont-care"];
    let strictest = order.iter().find(|o| policies.iter().any(|p| p == *o));
    if let Some(fencing) = strictest.filter(|f| defaults || **f != "dont-care") {
        net.insert("fencing".into(), (*fencing).into());
    }
    json!({
        "_peer_node_id": 0,
        "path": {
            "_this_host": connection.local.to_string(),
            "_remote_host": connection.peer.to_string(),
        },
        "net": net,
    })
}
