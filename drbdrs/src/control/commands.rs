//! Requests that change something, carried out. Exact numbers: status-and-integration.md §2.12,
//! §2.13; which states allow what is the engine's business.

use std::rc::Rc;

use drbd_admin::{Address, Backing, MetaIndex, OptionSet, Reply, Request, Section, Target};
use drbd_core::admin::{AlChange, Command};
use drbd_types::{Dstate, Failure, Minor, Refusal, Role, Sector, SectorCount, VolumeNr};

use super::machine::Id;
use super::registry::{Network, Node, Record, VolumeRecord, gone};
use super::{convert, devices, exports};
use crate::plane::run;

/// Largest minor number.
const MINOR_MAX: u32 = (1 << 20) - 1;
/// Largest volume number.
const VOLUME_MAX: u16 = 65_534;
/// "Nothing to do", a success.
const NOTHING: i32 = 2;

fn fail(failure: Failure, info: &str) -> Reply {
    Reply::failed(failure, info)
}

fn unknown_resource() -> Reply {
    fail(Failure::ResourceUnknown, "unknown resource")
}

fn unknown_minor() -> Reply {
    fail(Failure::MinorUnknown, "unknown minor")
}

fn unknown_connection() -> Reply {
    fail(Failure::InvalidRequest, "unknown connection")
}

type Done = Result<(), Reply>;

/// Success, or the refusal.
fn check(reply: Reply) -> Done {
    if reply.is_success() { Ok(()) } else { Err(reply) }
}

/// Carries out a request that changes something.
pub(super) async fn run(node: &Rc<Node>, request: Request) -> Reply {
    let done = match request {
        Request::NewResource { resource, options } => new_resource(node, resource, options),
        Request::ResourceOptions { resource, set_defaults, options } => {
            resource_options(node, &resource, set_defaults, &options).await
        }
        Request::DelResource { resource } => del_resource(node, &resource).await,
        Request::NewMinor { resource, minor, volume } => {
            new_minor(node, &resource, minor, volume).await
        }
        Request::DelMinor { minor } => match node.volume_of(minor) {
            Some((id, nr)) => del_minor(node, id, nr).await,
            None => Err(unknown_minor()),
        },
        Request::Attach { minor, disk, meta_disk, meta_index, options } => {
            attach(node, minor, Backing { disk, meta_disk, meta_index, device_uuid: 0, options })
                .await
        }
        Request::DiskOptions { target, set_defaults, options } => {
            return over(node, &target, async |id, nr| {
                disk_options(node, id, nr, set_defaults, &options).await
            })
            .await;
        }
        Request::Connect { resource, local, peer, options, discard_my_data, tentative } => {
            let attempt = Attempt { local, peer, options, discard_my_data, tentative };
            connect(node, &resource, attempt).await
        }
        Request::NetOptions { local, peer, set_defaults, options } => {
            net_options(node, &local, &peer, set_defaults, &options).await
        }
        Request::Disconnect { local, peer, force } => match find_connection(node, &local, &peer) {
            Some(id) => {
                let commit = Box::new(|record: &mut Record, reply: &Reply| {
                    if reply.is_success() {
                        record.disconnected = Some(std::time::Instant::now());
                    }
                });
                let command = Command::Disconnect { force };
                check(node.ask_then(id, command, Some(commit)).await)
            }
            None => Err(unknown_connection()),
        },
        Request::Secondary { target } => {
            return over(node, &target, async |id, nr| {
                devices::give_up(node, id, nr).await;
                Ok(devices::demote(node, id, nr).await)
            })
            .await;
        }
        Request::Down { target } => down(node, &target).await,
        Request::FaultSet { fault } => super::faults::set(node, fault).await,
        Request::FaultClear { id } => super::faults::clear(node, id).await,
        request => return on_volumes(node, request).await,
    };
    done.err().unwrap_or(Reply::SUCCESS)
}

/// Requests that are one command of the engine for each volume.
async fn on_volumes(node: &Rc<Node>, request: Request) -> Reply {
    let (target, make): (Target, Box<dyn Fn(VolumeNr) -> Command>) = match request {
        Request::Detach { target, force } => {
            (target, Box::new(move |volume| Command::Detach { volume, force }))
        }
        Request::Primary { target, force } => {
            (target, Box::new(move |volume| Command::Primary { volume, force }))
        }
        Request::Invalidate { target } => (target, Box::new(Command::Invalidate)),
        Request::InvalidateRemote { target } => (target, Box::new(Command::InvalidateRemote)),
        Request::Outdate { target } => (target, Box::new(Command::Outdate)),
        Request::PauseSync { target } => (target, Box::new(Command::PauseSync)),
        Request::ResumeSync { target } => (target, Box::new(Command::ResumeSync)),
        Request::SuspendIo { target } => (target, Box::new(Command::SuspendIo)),
        Request::ResumeIo { target } => (target, Box::new(Command::ResumeIo)),
        Request::Verify { target, start, stop } => {
            let (start, stop) = (start.map(Sector), stop.map(Sector));
            (target, Box::new(move |volume| Command::Verify { volume, start, stop }))
        }
        Request::NewCurrentUuid { target, clear_bitmap } => {
            (target, Box::new(move |volume| Command::NewCurrentUuid { volume, clear_bitmap }))
        }
        Request::Resize {
            target,
            size,
            assume_peer_has_space: force,
            assume_clean,
            al_stripes: stripes,
            al_stripe_size_kib,
        } => {
            let size = SectorCount(size);
            let stripe_blocks = al_stripe_size_kib.map(|kib| kib / 4);
            let al = AlChange { stripes, stripe_blocks };
            let make = move |volume| Command::Resize { volume, size, force, assume_clean, al };
            (target, Box::new(make))
        }
        _ => return fail(Failure::UnknownRequest, ""),
    };
    over(node, &target, async |id, nr| {
        let reply = node.ask(id, make(nr)).await;
        // Whoever has the reply finds the block device as it should be.
        devices::settle(node, id, nr).await;
        Ok(reply)
    })
    .await
}

/// Volumes of a target, in ascending order within each resource.
///
/// # Errors
/// It does not exist.
fn volumes(node: &Node, target: &Target) -> Result<Vec<(Id, VolumeNr, u32)>, Reply> {
    let of = |r: &Record| -> Vec<_> {
        r.volumes.iter().map(|(nr, v)| (r.id, VolumeNr(*nr), v.minor)).collect()
    };
    node.with_all(|all| match target {
        Target::All => Ok(all.iter().flat_map(of).collect()),
        Target::Resource(name) => {
            all.iter().find(|r| r.name == *name).map(of).ok_or_else(unknown_resource)
        }
        Target::Minor(minor) => {
            let found = all.iter().find_map(|r| Some((r.id, r.volume_of(*minor)?, *minor)));
            found.map(|one| vec![one]).ok_or_else(unknown_minor)
        }
    })
}

/// The same for every volume of a target; the first refusal ends it.
async fn over(
    node: &Rc<Node>,
    target: &Target,
    act: impl AsyncFn(Id, VolumeNr) -> Result<Reply, Reply>,
) -> Reply {
    let volumes = match volumes(node, target) {
        Ok(volumes) => volumes,
        Err(reply) => return reply,
    };
    let mut code = NOTHING;
    for (id, nr, minor) in volumes {
        let reply = act(id, nr).await.unwrap_or_else(|reply| reply);
        if !reply.is_success() {
            let is_one = matches!(target, Target::Minor(_));
            let object = (!is_one).then(|| minor.to_string());
            return Reply { object: reply.object.or(object), ..reply };
        }
        if reply.code != NOTHING {
            code = reply.code;
        }
    }
    Reply { code, ..Reply::default() }
}

// ---- resources and volumes ----

fn new_resource(node: &Node, name: String, options: OptionSet) -> Done {
    if node.id_of(&name).is_some() {
        return Err(fail(Failure::InvalidRequest, "resource exists"));
    }
    let options = OptionSet::default().changed(Section::Options, &options, true);
    let config = convert::resource(&options);
    let id = node.add(name, options).map_err(|error| {
        let text = format!("the thread of the resource can not be started: {error}");
        fail(Failure::NoMemory, &text)
    })?;
    // Answers and state come through the pump; nothing refuses this one.
    let ticket = drbd_core::ids::Ticket(0);
    let event =
        drbd_core::event::Event::Admin { ticket, command: Command::ResourceOptions(config) };
    let _ = node.with(id, |r| r.send(run::Command::Event(event)));
    node.changed(id);
    Ok(())
}

async fn resource_options(
    node: &Rc<Node>,
    name: &str,
    set_defaults: bool,
    change: &OptionSet,
) -> Done {
    let id = node.id_of(name).ok_or_else(unknown_resource)?;
    let running = node.with(id, |r| r.options.clone()).ok_or_else(gone)?;
    let options = running.changed(Section::Options, change, set_defaults);
    let command = Command::ResourceOptions(convert::resource(&options));
    check(node.ask(id, command).await)?;
    node.with(id, |r| r.options = options);
    node.changed(id);
    Ok(())
}

async fn del_resource(node: &Rc<Node>, name: &str) -> Done {
    let id = node.id_of(name).ok_or_else(unknown_resource)?;
    node.with(id, |r| {
        if r.network.is_some() {
            return Err(fail(Failure::NetConfigured, ""));
        }
        if !r.volumes.is_empty() {
            return Err(fail(Failure::ResourceInUse, ""));
        }
        Ok(())
    })
    .ok_or_else(gone)??;
    node.remove(id).await;
    Ok(())
}

async fn new_minor(node: &Rc<Node>, resource: &str, minor: u32, volume: u16) -> Done {
    let id = node.id_of(resource).ok_or_else(unknown_resource)?;
    if minor > MINOR_MAX {
        return Err(fail(Failure::InvalidRequest, "requested minor out of range"));
    }
    if volume > VOLUME_MAX {
        return Err(fail(Failure::InvalidRequest, "requested volume id out of range"));
    }
    if node.volume_of(minor).is_some() {
        return Err(fail(Failure::MinorOrVolumeExists, ""));
    }
    let is_new = node.with(id, |r| {
        let is_new = !r.volumes.contains_key(&volume);
        if is_new {
            r.volumes.insert(volume, VolumeRecord { minor, ..VolumeRecord::default() });
        }
        is_new
    });
    if is_new != Some(true) {
        return Err(fail(Failure::MinorOrVolumeExists, ""));
    }
    let command = Command::NewVolume { volume: VolumeNr(volume), minor: Minor(minor) };
    let reply = node.ask(id, command).await;
    if !reply.is_success() {
        node.with(id, |r| r.volumes.remove(&volume));
    }
    check(reply)
}

async fn del_minor(node: &Rc<Node>, id: Id, nr: VolumeNr) -> Done {
    let commit = Box::new(move |record: &mut Record, reply: &Reply| {
        if reply.is_success() {
            record.volumes.remove(&nr.0);
        }
    });
    check(node.ask_then(id, Command::DelVolume(nr), Some(commit)).await)?;
    if let Some(name) = node.with(id, |r| exports::name(&r.name, nr.0)) {
        node.door.remove(&name);
    }
    Ok(())
}

// ---- disks ----

async fn attach(node: &Rc<Node>, minor: u32, backing: Backing) -> Done {
    let (id, nr) = node.volume_of(minor).ok_or_else(unknown_minor)?;
    let is_free =
        node.with(id, |r| r.status_of(nr).is_none_or(|v| v.state.disk == Dstate::Diskless));
    if is_free == Some(false) {
        return Err(fail(Failure::DiskConfigured, ""));
    }
    let options = OptionSet::default().changed(Section::Disk, &backing.options, true);
    let config = Box::new(convert::disk(&options));
    let after = config.resync_after.map(|minor| minor.0);
    node.check_resync_after(minor, after).map_err(|failure| fail(failure, ""))?;
    let paths = convert::disk_paths(&backing.disk, &backing.meta_disk, backing.meta_index)?;
    if backing.meta_index == MetaIndex::Internal && backing.disk != backing.meta_disk {
        let text = "with internal meta-data, disk and meta-data device must be the same";
        return Err(fail(Failure::MetaIndexInvalid, text));
    }
    node.with(id, |r| {
        if let Some(known) = r.volumes.get_mut(&nr.0) {
            known.open_error = None;
        }
    });
    node.tell(id, || run::Command::Disk(nr, paths.clone())).await?;
    let backing = Backing { options, ..backing };
    let commit = Box::new(move |record: &mut Record, reply: &Reply| {
        if let Some(known) = record.volumes.get_mut(&nr.0)
            && reply.is_success()
        {
            known.backing = Some(backing);
        }
    });
    let mut reply = node.ask_then(id, Command::Attach { volume: nr, config }, Some(commit)).await;
    let error = node.with(id, |r| r.volumes.get_mut(&nr.0)?.open_error.take()).flatten();
    if let Some(text) = error.filter(|_| !reply.is_success()) {
        reply.info.extend(text.lines().map(str::to_owned));
    }
    check(reply)
}

async fn disk_options(
    node: &Rc<Node>,
    id: Id,
    nr: VolumeNr,
    set_defaults: bool,
    change: &OptionSet,
) -> Result<Reply, Reply> {
    let known = node.with(id, |r| {
        let known = r.volumes.get(&nr.0)?;
        Some((known.minor, known.backing.as_ref()?.options.clone()))
    });
    let (minor, mut running) = known.flatten().ok_or_else(|| fail(Failure::NoDisk, ""))?;
    // The size is no part of it.
    let size = running.0.remove("size");
    let mut options = running.changed(Section::Disk, change, set_defaults);
    if let Some(size) = size {
        options.set("size", size);
    }
    let config = Box::new(convert::disk(&options));
    let after = config.resync_after.map(|minor| minor.0);
    node.check_resync_after(minor, after).map_err(|failure| fail(failure, ""))?;
    let commit = Box::new(move |record: &mut Record, reply: &Reply| {
        let backing = record.volumes.get_mut(&nr.0).and_then(|known| known.backing.as_mut());
        if let Some(backing) = backing
            && reply.is_success()
        {
            backing.options = options;
        }
    });
    Ok(node.ask_then(id, Command::DiskOptions { volume: nr, config }, Some(commit)).await)
}

// ---- connections ----

struct Attempt {
    local: Address,
    peer: Address,
    options: OptionSet,
    discard_my_data: bool,
    tentative: bool,
}

fn find_connection(node: &Node, local: &Address, peer: &Address) -> Option<Id> {
    node.with_all(|all| {
        let is_it = |n: &Network| n.local == *local && n.peer == *peer;
        all.iter().find(|r| r.network.as_ref().is_some_and(is_it)).map(|r| r.id)
    })
}

async fn connect(node: &Rc<Node>, resource: &str, attempt: Attempt) -> Done {
    let id = node.id_of(resource).ok_or_else(unknown_resource)?;
    let Attempt { local, peer, options, discard_my_data, tentative } = attempt;
    let options = OptionSet::default().changed(Section::Net, &options, true);
    let addresses = convert::addresses(&local, &peer, &options)?;
    node.with_all(|all| {
        let mut networks = all.iter().filter_map(|r| r.network.as_ref());
        if networks.any(|n| n.local == local) {
            return Err(fail(Failure::LocalAddressInUse, ""));
        }
        let mut networks = all.iter().filter_map(|r| r.network.as_ref());
        if networks.any(|n| n.peer == peer) {
            return Err(fail(Failure::PeerAddressInUse, ""));
        }
        if all.iter().any(|r| r.id == id && r.network.is_some()) {
            return Err(fail(Failure::NetConfigured, ""));
        }
        Ok(())
    })?;
    let mut config = Box::new(convert::net(&options));
    config.discard_my_data = discard_my_data;
    config.tentative = tentative;
    let network = Network { local, peer, peer_socket: addresses.peer, options, is_pending: true };
    node.with(id, |r| {
        r.network = Some(network);
        r.problem = None;
        r.disconnected = None;
    });
    let drop_network = || {
        node.with(id, |r| r.network = None);
    };
    node.tell(id, || run::Command::Addresses(addresses)).await.inspect_err(|_| drop_network())?;
    let commit = Box::new(|record: &mut Record, reply: &Reply| match record.network.as_mut() {
        Some(network) if reply.is_success() => network.is_pending = false,
        _ => record.network = None,
    });
    check(node.ask_then(id, Command::Connect(config), Some(commit)).await)
}

async fn net_options(
    node: &Rc<Node>,
    local: &Address,
    peer: &Address,
    set_defaults: bool,
    change: &OptionSet,
) -> Done {
    let id = find_connection(node, local, peer).ok_or_else(unknown_connection)?;
    let running = node.with(id, |r| r.network.as_ref().map(|n| n.options.clone())).flatten();
    let running = running.ok_or_else(unknown_connection)?;
    let options = running.changed(Section::Net, change, set_defaults);
    // Sizes of buffers hold from the next connection on.
    let addresses = convert::addresses(local, peer, &options)?;
    node.tell(id, || run::Command::Addresses(addresses)).await?;
    let command = Command::NetOptions(Box::new(convert::net(&options)));
    let commit = Box::new(move |record: &mut Record, reply: &Reply| {
        if let Some(network) = record.network.as_mut()
            && reply.is_success()
        {
            network.options = options;
        }
    });
    check(node.ask_then(id, command, Some(commit)).await)
}

// ---- down ----

async fn down(node: &Rc<Node>, target: &Target) -> Done {
    let ids = match target {
        Target::All => node.with_all(|all| all.iter().map(|r| r.id).collect()),
        Target::Resource(name) => vec![node.id_of(name).ok_or_else(unknown_resource)?],
        Target::Minor(minor) => vec![node.volume_of(*minor).ok_or_else(unknown_minor)?.0],
    };
    for id in ids {
        let volumes = node.with(id, |r| r.volumes.keys().copied().collect::<Vec<_>>());
        for nr in volumes.unwrap_or_default() {
            devices::give_up(node, id, VolumeNr(nr)).await;
        }
        take_down(node, id).await?;
    }
    Ok(())
}

/// Everything of one resource. Spec: status-and-integration.md §2.13, last line.
pub(super) async fn take_down(node: &Rc<Node>, id: Id) -> Done {
    let step = |reply: Reply, words: &str| {
        check(reply).map_err(|mut reply| {
            reply.info.push(words.into());
            reply
        })
    };
    let volumes: Vec<VolumeNr> =
        node.with(id, |r| r.volumes.keys().map(|nr| VolumeNr(*nr)).collect()).ok_or_else(gone)?;
    for nr in &volumes {
        let is_primary =
            node.with(id, |r| r.status_of(*nr).is_some_and(|v| v.state.role == Role::Primary));
        if is_primary == Some(true) {
            step(devices::demote(node, id, *nr).await, "failed to demote")?;
        }
    }
    if node.with(id, |r| r.network.is_some()) == Some(true) {
        let reply = node.ask(id, Command::Disconnect { force: false }).await;
        // It may have ended by itself meanwhile.
        let is_over = reply.code == Failure::InvalidRequest.number();
        if !is_over {
            step(reply, "failed to disconnect")?;
        }
    }
    for nr in &volumes {
        let reply = node.ask(id, Command::Detach { volume: *nr, force: false }).await;
        let is_diskless = reply.code == Refusal::IsDiskless.number();
        if !is_diskless {
            step(reply, "failed to detach")?;
        }
    }
    for nr in &volumes {
        let result = del_minor(node, id, *nr).await;
        result.map_err(|mut reply| {
            reply.info.push("failed to delete volume".into());
            reply
        })?;
    }
    node.remove(id).await;
    Ok(())
}

/// The same, waiting for clients of the exports that are about to leave. Whoever has a block device
/// open will not.
pub(super) async fn take_down_soon(node: &Rc<Node>, id: Id) -> Done {
    loop {
        let has_nodes = |r: &mut Record| r.volumes.values().any(|v| !v.nodes.is_empty());
        match take_down(node, id).await {
            Err(reply) if node.with(id, has_nodes) == Some(true) => return Err(reply),
            Err(reply) if reply.code == Refusal::DeviceInUse.number() => {
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
            result => return result,
        }
    }
}
