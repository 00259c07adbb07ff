//! Fault points: off unless an administrator sets one, and then in every status.

use std::rc::Rc;
use std::time::Duration;

use drbd_admin::{DiskOperation, Effect as Asked, Fault, NetStream, Reply};
use drbd_core::event::Stream;
use drbd_types::{Failure, VolumeNr};

use super::registry::Node;
use crate::plane::fault::{Area, Effect, Kind, Rule};
use crate::plane::link::StreamFault;
use crate::plane::run;

/// A fault that is on.
struct Active {
    id: u32,
    resource: String,
    what: What,
    words: String,
}

#[derive(Clone, Copy)]
enum What {
    Disk(Rule),
    /// Stalled; a cut is over at once.
    Stream(Stream),
}

/// All that are on.
#[derive(Default)]
pub(super) struct List {
    next: u32,
    active: Vec<Active>,
}

impl List {
    /// Numbers and words.
    pub(super) fn shown(&self) -> Vec<(u32, String)> {
        self.active.iter().map(|a| (a.id, a.words.clone())).collect()
    }

    fn add(&mut self, resource: &str, what: What, words: String) {
        self.next += 1;
        let id = self.next;
        self.active.push(Active { id, resource: resource.into(), what, words });
    }

    /// A resource is gone, and its faults with it.
    pub(super) fn forget(&mut self, resource: &str) {
        self.active.retain(|a| a.resource != resource);
    }

    fn rules(&self, resource: &str) -> Vec<Rule> {
        let of_resource = self.active.iter().filter(|a| a.resource == resource);
        let rule = |a: &Active| match a.what {
            What::Disk(rule) => Some(rule),
            What::Stream(_) => None,
        };
        of_resource.filter_map(rule).collect()
    }
}

fn refuse(text: &str) -> Reply {
    Reply::failed(Failure::InvalidRequest, text)
}

/// Switches one on.
pub(super) async fn set(node: &Rc<Node>, fault: Fault) -> Result<(), Reply> {
    match fault {
        Fault::Disk { minor, operation, sectors, permille, effect } => {
            if sectors.is_some() {
                return Err(refuse("a fault can not be limited to an area"));
            }
            set_disk(node, minor, operation, permille, effect).await
        }
        Fault::Stream { resource, stream, effect } => {
            set_stream(node, resource, stream, effect).await
        }
        Fault::HoldPacket { .. } => Err(refuse("single packets can not be held: stall the stream")),
    }
}

async fn set_disk(
    node: &Rc<Node>,
    minor: u32,
    operation: DiskOperation,
    permille: u16,
    effect: Asked,
) -> Result<(), Reply> {
    if permille == 0 || permille > 1000 {
        return Err(refuse("the probability must be 1 to 1000 of 1000"));
    }
    let found = node.volume_of(minor).and_then(|(id, nr)| node.with(id, |r| (r.name.clone(), nr)));
    let (resource, volume) =
        found.ok_or_else(|| Reply::failed(Failure::MinorUnknown, "unknown minor"))?;
    let rule = rule(volume, operation, permille, effect)
        .ok_or_else(|| refuse("disks can not be cut, only fail, be late or stall"))?;
    let operation = serde_json::to_string(&operation).unwrap_or_default();
    let effect = serde_json::to_string(&effect).unwrap_or_default();
    let (operation, effect) = (operation.replace('"', ""), effect.replace(['"', '{', '}'], ""));
    let words = format!("disk of minor {minor}: {operation}, {permille} of 1000: {effect}");
    node.faults.borrow_mut().add(&resource, What::Disk(rule), words);
    apply(node, &resource).await
}

async fn set_stream(
    node: &Rc<Node>,
    resource: String,
    stream: NetStream,
    effect: Asked,
) -> Result<(), Reply> {
    let unknown = || Reply::failed(Failure::ResourceUnknown, "unknown resource");
    let id = node.id_of(&resource).ok_or_else(unknown)?;
    let (stream, word) = match stream {
        NetStream::Data => (Stream::Data, "data"),
        NetStream::Meta => (Stream::Meta, "meta"),
    };
    match effect {
        Asked::Cut => node.tell(id, || run::Command::StreamFault(stream, StreamFault::Cut)).await,
        Asked::Stall => {
            node.tell(id, || run::Command::StreamFault(stream, StreamFault::Stall)).await?;
            let words = format!("{word} stream of {resource}: stall");
            node.faults.borrow_mut().add(&resource, What::Stream(stream), words);
            node.changed(id);
            Ok(())
        }
        Asked::Error | Asked::DelayMs(_) => {
            Err(refuse("streams can be cut or stalled; for delays use netem"))
        }
    }
}

/// Switches one off, or all.
pub(super) async fn clear(node: &Rc<Node>, id: Option<u32>) -> Result<(), Reply> {
    let gone: Vec<Active> = {
        let mut list = node.faults.borrow_mut();
        let all = std::mem::take(&mut list.active);
        let (gone, kept) = all.into_iter().partition(|a| id.is_none_or(|id| a.id == id));
        list.active = kept;
        gone
    };
    if let (Some(id), true) = (id, gone.is_empty()) {
        return Err(Reply::failed(Failure::InvalidRequest, &format!("there is no fault {id}")));
    }
    for fault in gone {
        if let (What::Stream(stream), Some(id)) = (fault.what, node.id_of(&fault.resource)) {
            node.tell(id, || run::Command::StreamFault(stream, StreamFault::Resume)).await?;
        }
        apply(node, &fault.resource).await?;
    }
    Ok(())
}

async fn apply(node: &Rc<Node>, resource: &str) -> Result<(), Reply> {
    let Some(id) = node.id_of(resource) else { return Ok(()) };
    let rules = node.faults.borrow().rules(resource);
    node.tell(id, || run::Command::Faults(rules.clone())).await?;
    node.changed(id);
    Ok(())
}

fn rule(volume: VolumeNr, operation: DiskOperation, permille: u16, effect: Asked) -> Option<Rule> {
    let (area, kind) = match operation {
        DiskOperation::Any => (None, None),
        DiskOperation::Read => (Some(Area::Data), Some(Kind::Read)),
        DiskOperation::Write => (Some(Area::Data), Some(Kind::Write)),
        DiskOperation::Flush => (None, Some(Kind::Flush)),
        DiskOperation::Discard => (Some(Area::Data), Some(Kind::Discard)),
        DiskOperation::MetaRead => (Some(Area::Meta), Some(Kind::Read)),
        DiskOperation::MetaWrite => (Some(Area::Meta), Some(Kind::Write)),
    };
    let effect = match effect {
        Asked::Error => Effect::Fail(libc::EIO),
        Asked::DelayMs(ms) => Effect::Delay(Duration::from_millis(ms.into())),
        Asked::Stall => Effect::Stall,
        Asked::Cut => return None,
    };
    let ppm = u32::from(permille) * 1000;
    Some(Rule { volume: Some(volume), area, kind, ppm, times: None, effect })
}
