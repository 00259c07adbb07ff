//! Running configured handlers. Spec: config-and-drbdadm.md §15.

use bstr::{BString, ByteSlice};
use drbd_conf::model::{HostSection, Resource};

use crate::app::App;
use crate::backend::{Call, Program};
use crate::run::chosen_volumes;
use crate::select::{Target, volumes};

/// Runs the handler that the command is named after; 0 if none is configured. Of two the first
/// counts, as in the original.
pub fn run(app: &App, resource: &Resource, target: Target) -> i32 {
    let command = app.invocation.command;
    let found = resource.handlers.items.iter().find(|o| o.spec.name == command.name);
    let Some(text) = found.and_then(|o| o.value.clone()) else { return 0 };
    let mut call = Call::new(Program::Shell, &resource.name, command.time).arg("-c").arg(text);
    call.export_resource = true;
    call.env.push(("DRBD_CONF", app.config_file()));
    call.env.extend(peer_environment(app, resource));
    match target.volume {
        Some(_) => {
            for volume in chosen_volumes(resource, target) {
                let minor = volume.minor.unwrap_or_default();
                call.env.push(("DRBD_MINOR", minor.to_string().into()));
                call.env.push(("DRBD_VOLUME", volume.vnr.to_string().into()));
                call.env.push(("DRBD_LL_DISK", volume.disk.clone().unwrap_or_default()));
            }
        }
        None => {
            let minors: Vec<String> =
                volumes(resource).iter().map(|v| v.minor.unwrap_or_default().to_string()).collect();
            call.env.push(("DRBD_MINOR", minors.join(" ").into()));
        }
    }
    app.backend.run(&call).code
}

fn peer_environment(app: &App, resource: &Resource) -> Vec<(&'static str, BString)> {
    let Some(peer) = find_peer(app, resource) else { return Vec::new() };
    let mut env = Vec::new();
    if let Some(address) = &peer.address {
        env.push(("DRBD_PEER_AF", BString::from(address.family.name())));
        env.push(("DRBD_PEER_ADDRESS", address.addr.clone()));
    }
    env.push(("DRBD_PEER", peer.names.first().cloned().unwrap_or_default()));
    env.push(("DRBD_PEERS", bstr::join(" ", &peer.names).into()));
    env
}

/// The peer; among three and more sections the one whose address the engine gave.
fn find_peer<'r>(app: &App, resource: &'r Resource) -> Option<&'r HostSection> {
    let chosen = app.invocation.peer.as_ref().map(|p| p.as_bstr());
    if let Ok(peer) = drbd_conf::resolve::peer(resource, chosen) {
        return Some(peer);
    }
    let family = std::env::var("DRBD_PEER_AF").ok()?;
    let address = std::env::var("DRBD_PEER_ADDRESS").ok()?;
    resource.hosts.iter().find(|h| {
        h.address
            .as_ref()
            .is_some_and(|a| a.family.name() == family && a.addr == address.as_bytes())
    })
}
