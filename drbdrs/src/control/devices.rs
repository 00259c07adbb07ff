//! Block devices of this kernel for volumes: which driver, when they come, and when they go.
//!
//! ```text
//!   Notice::Device --> wanted --> settle: start / change / stop, on a thread that may block
//!   secondary ------> demote: stop unless open --> engine --> settle
//! ```
//!
//! Whoever changes a device holds the lock of its slot; what is wanted may change meanwhile, and is
//! looked at again before the lock is let go.

use std::cell::Cell;
use std::io;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use drbd_admin::Reply;
use drbd_conf::settings::{FrontEnd, Settings};
use drbd_core::action::DeviceOffer;
use drbd_core::admin::Command;
use drbd_types::{Failure, Refusal, Role, VolumeNr};

use super::machine::Id;
use super::registry::Node;
use crate::front::kernel::guard;
use crate::front::kernel::links::Links;
use crate::front::kernel::nbd::Nbd;
use crate::front::kernel::{Device, Driver, ForPlane, Volume};
use crate::front::ublk::driver::Ublk;
use crate::plane::disk::is_rotational;
use crate::plane::run;

/// The block device of a volume.
#[derive(Default)]
pub(super) struct Slot {
    /// What it should offer; nothing while the volume is Secondary.
    wanted: Cell<Option<DeviceOffer>>,
    there: tokio::sync::Mutex<There>,
}

/// What there is.
#[derive(Default)]
struct There {
    device: Option<Box<dyn Device>>,
    links: Option<Links>,
    /// What the device was told to offer, or could not be started with.
    told: Option<DeviceOffer>,
}

/// The drivers, the best one first.
pub(super) fn drivers(settings: &Settings) -> Vec<(FrontEnd, Arc<dyn Driver>)> {
    let ublk: Arc<dyn Driver> = Arc::new(Ublk::new(settings));
    vec![(FrontEnd::Ublk, ublk), (FrontEnd::NbdKernel, Arc::new(Nbd::new(settings)))]
}

/// What a device offers has changed.
pub(super) fn offer(node: &Rc<Node>, id: Id, nr: VolumeNr, offer: DeviceOffer) {
    let Some(slot) = slot(node, id, nr) else { return };
    slot.wanted.set(offer.is_primary.then_some(offer));
    let node = Rc::clone(node);
    tokio::task::spawn_local(async move { settle(&node, id, nr).await });
}

/// Waits until the device is as it should be.
pub(super) async fn settle(node: &Rc<Node>, id: Id, nr: VolumeNr) {
    let Some(slot) = slot(node, id, nr) else { return };
    let mut there = slot.there.lock().await;
    loop {
        let wanted = slot.wanted.get();
        if there.told == wanted {
            return;
        }
        let before = std::mem::replace(&mut there.told, wanted);
        match (wanted, there.device.is_some()) {
            (Some(offer), false) if before.is_none() => {
                start(node, id, nr, offer, &mut there).await;
            }
            (Some(offer), true) => change(&mut there, offer).await,
            (None, true) => stop(node, id, nr, &mut there).await,
            // What could not be started is tried again with the next promotion.
            (_, false) => {}
        }
    }
}

/// The kernel has lost a way to us.
pub(super) fn mend(node: &Rc<Node>, id: Id, nr: VolumeNr) {
    let Some(slot) = slot(node, id, nr) else { return };
    tokio::task::spawn_local(async move {
        let mut there = slot.there.lock().await;
        if there.device.is_some()
            && let Err(error) = with_device(&mut there, |device| device.mend()).await
        {
            tracing::error!("the block device has lost a connection for good: {error}");
        }
    });
}

/// Makes a volume Secondary, unless its device is held open.
pub(super) async fn demote(node: &Rc<Node>, id: Id, nr: VolumeNr) -> Reply {
    let Some(slot) = slot(node, id, nr) else {
        return node.ask(id, Command::Secondary(nr)).await;
    };
    // One that is just coming.
    settle(node, id, nr).await;
    let mut there = slot.there.lock().await;
    if there.device.is_none() && is_awaited(node, id, nr).await {
        return Reply::refused(Refusal::DeviceInUse);
    }
    if there.device.is_some() {
        match with_device(&mut there, |device| device.stop_unless_open()).await {
            Ok(true) => gone(node, id, nr, &mut there),
            Ok(false) => return Reply::refused(Refusal::DeviceInUse),
            Err(error) => {
                let text = format!("the block device can not be taken away: {error}");
                return Reply::failed(Failure::InvalidRequest, &text);
            }
        }
        // If the demotion is refused, it comes back.
        there.told = None;
    }
    let reply = node.ask(id, Command::Secondary(nr)).await;
    drop(there);
    settle(node, id, nr).await;
    reply
}

/// The administrator does not want a Secondary volume, which a daemon that is gone has left as
/// Primary, to be Primary again: whoever has its device open need not wait any more.
pub(super) async fn give_up(node: &Rc<Node>, id: Id, nr: VolumeNr) {
    let role = node.with(id, |r| r.status_of(nr).map(|v| v.state.role)).flatten();
    if role != Some(Role::Secondary) {
        return;
    }
    let Some(volume) = volume(node, id, nr, DeviceOffer::NOTHING) else { return };
    node.will.forget_role(volume.minor);
    let drivers = all_drivers(node);
    // A panic there was said already.
    let folder = node.settings.node.device_dir.clone();
    let _ = tokio::task::spawn_blocking(move || inherit(&folder, &drivers, &volume)).await;
}

/// Is there a device of a daemon that is gone, not taken over yet?
async fn is_awaited(node: &Rc<Node>, id: Id, nr: VolumeNr) -> bool {
    let Some(volume) = volume(node, id, nr, DeviceOffer::NOTHING) else { return false };
    let drivers = all_drivers(node);
    let any = move || drivers.iter().any(|driver| driver.find(&volume).is_some());
    tokio::task::spawn_blocking(any).await.unwrap_or(true)
}

fn all_drivers(node: &Node) -> Vec<Arc<dyn Driver>> {
    node.drivers.iter().map(|(_, driver)| Arc::clone(driver)).collect()
}

fn slot(node: &Node, id: Id, nr: VolumeNr) -> Option<Rc<Slot>> {
    node.with(id, |r| r.volumes.get(&nr.0).map(|v| Rc::clone(&v.slot))).flatten()
}

/// Does something that may block with a device.
async fn with_device<R: Send + 'static>(
    there: &mut There,
    act: impl FnOnce(&mut Box<dyn Device>) -> io::Result<R> + Send + 'static,
) -> io::Result<R> {
    let Some(mut device) = there.device.take() else { return Err(io::ErrorKind::NotFound.into()) };
    let done = tokio::task::spawn_blocking(move || {
        let result = act(&mut device);
        (device, result)
    });
    let (device, result) = done.await.map_err(io::Error::other)?;
    there.device = Some(device);
    result
}

async fn start(node: &Rc<Node>, id: Id, nr: VolumeNr, offer: DeviceOffer, there: &mut There) {
    let Some(volume) = volume(node, id, nr, offer) else { return };
    let (drivers, is_demanded) = chosen(node, &volume);
    let name = format!("{}/{} drbd{}", volume.resource, nr.0, volume.minor);
    let all = all_drivers(node);
    let folder = node.settings.node.device_dir.clone();
    let made = tokio::task::spawn_blocking(move || match inherit(&folder, &all, &volume) {
        Some(device) => Ok(device),
        None => start_first(&drivers, &volume),
    });
    match made.await.unwrap_or_else(|panic| Err(vec![panic.to_string()])) {
        Ok(device) => arrived(node, id, nr, there, device),
        Err(problems) if problems.is_empty() => {}
        Err(problems) if is_demanded => {
            let text = problems.join("; ");
            tracing::error!("drbd {name}: no block device: {text}");
        }
        Err(problems) => tracing::info!("drbd {name}: no block device: {}", problems.join("; ")),
    }
}

/// Drivers in the order in which they are wanted, and whether one of them was named.
fn chosen(node: &Node, volume: &Volume) -> (Vec<Arc<dyn Driver>>, bool) {
    let mut drivers = Vec::new();
    let mut is_demanded = false;
    for front_end in node.settings.front_ends(&volume.resource, volume.nr.0) {
        let is_auto = *front_end == FrontEnd::Auto;
        let fitting = node.drivers.iter().filter(|(kind, _)| is_auto || kind == front_end);
        drivers.extend(fitting.map(|(_, driver)| Arc::clone(driver)));
        is_demanded |= matches!(front_end, FrontEnd::Ublk | FrontEnd::NbdKernel);
    }
    (drivers, is_demanded)
}

/// The device that a daemon which is gone has left, if whoever has it open may go on; otherwise that
/// comes to its end.
fn inherit(folder: &Path, drivers: &[Arc<dyn Driver>], volume: &Volume) -> Option<Box<dyn Device>> {
    for driver in drivers {
        let Some(node) = driver.find(volume) else { continue };
        let shown = node.display();
        if volume.offer.is_continued {
            match driver.take_over(volume, &node) {
                Ok(device) => return Some(device),
                Err(error) => tracing::error!("{shown} can not be taken over: {error}"),
            }
        }
        let Volume { resource, nr, minor, .. } = volume;
        match driver.discard(volume, &node) {
            Ok(()) => tracing::warn!("{shown}: ended, its data may be others now"),
            Err(error) => tracing::error!("{shown} can not be ended: {error}"),
        }
        Links::left(folder, &node, resource, nr.0, *minor).remove();
    }
    None
}

fn start_first(
    drivers: &[Arc<dyn Driver>],
    volume: &Volume,
) -> Result<Box<dyn Device>, Vec<String>> {
    let mut problems = Vec::new();
    for driver in drivers {
        match driver.probe().and_then(|()| driver.start(volume)) {
            Ok(device) => return Ok(device),
            Err(error) => problems.push(format!("{}: {error}", driver.name())),
        }
    }
    Err(problems)
}

fn volume(node: &Node, id: Id, nr: VolumeNr, offer: DeviceOffer) -> Option<Volume> {
    node.with(id, |r| {
        let known = r.volumes.get(&nr.0)?;
        let minor = known.minor;
        let disk = known.backing.as_ref().map(|backing| Path::new(&backing.disk));
        let is_rotational = disk.is_some_and(is_rotational);
        let handle = r.handle();
        let to_plane = Arc::new(move |thing| {
            let command = match thing {
                ForPlane::Nbd(session) => run::Command::Client(session),
                ForPlane::Ublk(queue) => run::Command::Serve(queue),
            };
            handle.send(command).is_ok()
        });
        Some(Volume { resource: r.name.clone(), nr, minor, offer, is_rotational, to_plane })
    })
    .flatten()
}

fn arrived(node: &Node, id: Id, nr: VolumeNr, there: &mut There, device: Box<dyn Device>) {
    guard::enter();
    let path = device.node();
    there.device = Some(device);
    let folder = &node.settings.node.device_dir;
    let known = node.with(id, |r| Some((r.name.clone(), r.volumes.get(&nr.0)?.minor))).flatten();
    let Some((resource, minor)) = known else { return };
    let mut paths = vec![path.display().to_string()];
    if !folder.as_os_str().is_empty() {
        let (links, problems) = Links::make(folder, &path, &resource, nr.0, minor);
        for problem in problems {
            tracing::warn!("drbd {resource}/{} drbd{minor}: {problem}", nr.0);
        }
        paths.extend(links.paths().iter().map(|path| path.display().to_string()));
        there.links = Some(links);
    }
    tracing::info!("drbd {resource}/{} drbd{minor}: block device {}", nr.0, paths.join(", "));
    show(node, id, nr, paths);
}

fn gone(node: &Node, id: Id, nr: VolumeNr, there: &mut There) {
    there.device = None;
    if let Some(links) = there.links.take() {
        links.remove();
    }
    show(node, id, nr, Vec::new());
}

fn show(node: &Node, id: Id, nr: VolumeNr, paths: Vec<String>) {
    node.with(id, |r| {
        if let Some(known) = r.volumes.get_mut(&nr.0) {
            known.nodes = paths;
        }
    });
    node.changed(id);
}

async fn change(there: &mut There, offer: DeviceOffer) {
    if let Err(error) = with_device(there, move |device| device.change(&offer)).await {
        tracing::error!("the block device does not take its new size or limits: {error}");
    }
}

/// The volume is Secondary: whoever still uses the device must not go on.
async fn stop(node: &Rc<Node>, id: Id, nr: VolumeNr, there: &mut There) {
    if let Err(error) = with_device(there, |device| device.stop()).await {
        tracing::error!("the block device can not be taken away: {error}");
    }
    gone(node, id, nr, there);
}
