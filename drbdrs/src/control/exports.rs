//! Volumes as exports of the NBD server: they come and go, and change with what the engine offers.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use drbd_conf::settings::{FrontEnd, SecondaryPolicy, Settings};
use drbd_core::action::DeviceOffer;
use drbd_core::admin::Command;
use drbd_types::VolumeNr;

use super::devices;
use super::machine::Id;
use super::registry::Node;
use crate::front::nbd::door::{Entry, Promote};
use crate::front::nbd::handshake::Export;
use crate::plane::run;

/// How long a client waits for a promotion by somebody else.
const PATIENCE: Duration = Duration::from_secs(25);
/// How long a client that wants to be Primary waits for the promotion to end.
const PROMOTION_MAX: Duration = Duration::from_secs(20);

/// Where the door is.
#[derive(Clone, Debug, Default)]
pub(super) struct Exports {
    unix: Option<String>,
    tcp: Vec<String>,
}

impl Exports {
    pub(super) fn of(settings: &Settings) -> Self {
        let unix = settings.nbd.unix_socket.to_string_lossy().into_owned();
        Self {
            unix: Some(unix).filter(|path| !path.is_empty()),
            tcp: settings.nbd.listen.iter().map(ToString::to_string).collect(),
        }
    }

    /// NBD URIs of an export.
    fn uris(&self, export: &str) -> Vec<String> {
        let unix = self.unix.iter().map(|path| format!("nbd+unix:///{export}?socket={path}"));
        let tcp = self.tcp.iter().map(|at| format!("nbd://{at}/{export}"));
        unix.chain(tcp).collect()
    }
}

/// Name of an export.
pub(super) fn name(resource: &str, volume: u16) -> String {
    format!("{resource}/{volume}")
}

/// Requests from other threads to make a volume Primary.
pub(super) type Wish = (Id, VolumeNr, std::sync::mpsc::SyncSender<Result<(), String>>);

/// What a device offers has changed.
pub(super) fn offer(node: &Rc<Node>, id: Id, volume: VolumeNr, offer: DeviceOffer) {
    let found = node.with(id, |r| {
        let known = r.volumes.get(&volume.0)?;
        Some((r.name.clone(), known.minor))
    });
    let Some((resource, minor)) = found.flatten() else { return };
    if !node.settings.front_ends(&resource, volume.0).contains(&FrontEnd::Nbd) {
        return;
    }
    let name = name(&resource, volume.0);
    node.with(id, |r| {
        if let Some(known) = r.volumes.get_mut(&volume.0) {
            known.exports = node.exports.uris(&name);
        }
    });
    let settings = &node.settings;
    let own = settings.resource.get(&resource);
    let policy = own.and_then(|r| r.secondary).unwrap_or(settings.nbd.secondary);
    let promotes = own.and_then(|r| r.promote_on_open).unwrap_or(settings.nbd.promote_on_open);
    let patience = match policy {
        SecondaryPolicy::Refuse => Duration::ZERO,
        SecondaryPolicy::WaitForPromotion => PATIENCE,
    };
    let Some(handle) = node.with(id, |r| r.handle()) else { return };
    let hand_over = Arc::new(move |session| handle.send(run::Command::Client(session)).is_ok());
    let wishes = node.wishes.clone();
    let promote: Promote = Arc::new(move || {
        let (to, answer) = std::sync::mpsc::sync_channel(1);
        let gone = |_| "the daemon is going away".to_owned();
        wishes.send((id, volume, to)).map_err(|_| gone(()))?;
        answer.recv_timeout(PROMOTION_MAX).map_err(|_| "the promotion takes too long".to_owned())?
    });
    node.door.set(Entry {
        export: Export { name, description: format!("DRBD minor {minor}"), volume, offer },
        hand_over,
        promote: promotes.then_some(promote),
        patience,
    });
}

/// Somebody opened a device, or closed it.
pub(super) fn users(node: &Rc<Node>, id: Id, volume: VolumeNr, users: u32) {
    let is_over = node.with(id, |r| {
        let known = r.volumes.get_mut(&volume.0)?;
        Some(users == 0 && std::mem::take(&mut known.is_promoted_by_client))
    });
    if is_over == Some(Some(true)) {
        let node = Rc::clone(node);
        tokio::task::spawn_local(async move {
            let reply = devices::demote(&node, id, volume).await;
            if !reply.is_success() {
                tracing::warn!("no demotion after the last client: {}", reply.message("volume"));
            }
        });
    }
}

/// Promotes volumes for clients that open them.
pub(super) async fn grant(node: Rc<Node>, mut wishes: tokio::sync::mpsc::UnboundedReceiver<Wish>) {
    while let Some((id, volume, to)) = wishes.recv().await {
        let node = Rc::clone(&node);
        tokio::task::spawn_local(async move {
            let reply = node.ask(id, Command::Primary { volume, force: false }).await;
            if reply.is_success() {
                node.with(id, |r| {
                    if let Some(known) = r.volumes.get_mut(&volume.0) {
                        known.is_promoted_by_client = true;
                    }
                });
            }
            let failed = || reply.message("promotion").trim_end().replace('\n', " ");
            let result = if reply.is_success() { Ok(()) } else { Err(failed()) };
            // The client may have given up.
            let _ = to.try_send(result);
        });
    }
}
