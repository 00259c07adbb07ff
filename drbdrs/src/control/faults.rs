//! Fault points: off unless an administrator sets one, and then in every status.

use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use drbd_admin::{DiskOperation, Effect as Asked, Fault, NetStream, Reply};
use drbd_core::event::Stream;
use drbd_types::{Failure, VolumeNr};
use drbd_wire::Command;

use super::registry::Node;
use crate::plane::fault::{Area, Effect, Kind, Rule};
use crate::plane::link::StreamRule;
use crate::plane::run;

/// A fault that is on.
struct Active {
    id: u32,
    resource: String,
    what: What,
    words: String,
}

#[derive(Clone)]
enum What {
    Disk(Rule),
    Stream(StreamRule),
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

    fn rules(&self, resource: &str) -> (Vec<Rule>, Vec<StreamRule>) {
        let (mut disks, mut streams) = (Vec::new(), Vec::new());
        for active in self.active.iter().filter(|a| a.resource == resource) {
            match &active.what {
                What::Disk(rule) => disks.push(rule.clone()),
                What::Stream(rule) => streams.push(*rule),
            }
        }
        (disks, streams)
    }
}

fn refuse(text: &str) -> Reply {
    Reply::failed(Failure::InvalidRequest, text)
}

/// Switches one on.
pub(super) async fn set(node: &Rc<Node>, fault: Fault) -> Result<(), Reply> {
    match fault {
        Fault::Disk { minor, operation, sectors, permille, effect } => {
            set_disk(node, minor, operation, sectors, permille, effect).await
        }
        Fault::Stream { resource, stream, effect } => {
            set_stream(node, resource, stream, effect).await
        }
        Fault::HoldPacket { resource, packet } => hold_packet(node, resource, &packet).await,
    }
}

async fn set_disk(
    node: &Rc<Node>,
    minor: u32,
    operation: DiskOperation,
    sectors: Option<(u64, u64)>,
    permille: u16,
    effect: Asked,
) -> Result<(), Reply> {
    if permille == 0 || permille > 1000 {
        return Err(refuse("the probability must be 1 to 1000 of 1000"));
    }
    let found = node.volume_of(minor).and_then(|(id, nr)| node.with(id, |r| (r.name.clone(), nr)));
    let (resource, volume) =
        found.ok_or_else(|| Reply::failed(Failure::MinorUnknown, "unknown minor"))?;
    let mut rule = rule(volume, operation, permille, effect)
        .ok_or_else(|| refuse("disks can not be cut, only fail, be late or stall"))?;
    if let Some(sectors) = sectors {
        rule.bytes = Some(bytes_of(operation, sectors)?);
        rule.area = Some(Area::Data);
    }
    let place = sectors.map(|(first, count)| format!(", sectors {first}+{count}"));
    let operation = serde_json::to_string(&operation).unwrap_or_default();
    let effect = serde_json::to_string(&effect).unwrap_or_default();
    let (operation, effect) = (operation.replace('"', ""), effect.replace(['"', '{', '}'], ""));
    let place = place.unwrap_or_default();
    let words = format!("disk of minor {minor}: {operation}{place}, {permille} of 1000: {effect}");
    node.faults.borrow_mut().add(&resource, What::Disk(rule), words);
    apply(node, &resource).await
}

async fn set_stream(
    node: &Rc<Node>,
    resource: String,
    stream: NetStream,
    effect: Asked,
) -> Result<(), Reply> {
    let id = node.id_of(&resource).ok_or_else(unknown_resource)?;
    let (stream, word) = match stream {
        NetStream::Data => (Stream::Data, "data"),
        NetStream::Meta => (Stream::Meta, "meta"),
    };
    match effect {
        // It is over at once.
        Asked::Cut => node.tell(id, || run::Command::Cut(stream)).await,
        Asked::Stall => {
            let words = format!("{word} stream of {resource}: stall");
            add_stream(node, &resource, StreamRule::Stall(stream), words).await
        }
        Asked::DelayMs(ms) => {
            let words = format!("{word} stream of {resource}: what is sent is {ms} ms late");
            let rule = StreamRule::Delay(stream, Duration::from_millis(ms.into()));
            add_stream(node, &resource, rule, words).await
        }
        Asked::Error => Err(refuse("streams can be cut, stall or be late, but not fail")),
    }
}

async fn hold_packet(node: &Rc<Node>, resource: String, packet: &str) -> Result<(), Reply> {
    node.id_of(&resource).ok_or_else(unknown_resource)?;
    let command = Command::from_name(packet)
        .ok_or_else(|| refuse(&format!("there is no packet {packet}; one is P_BARRIER_ACK")))?;
    if HANDSHAKE.contains(&command) {
        return Err(refuse(&format!("{packet} belongs to the handshake, which can not be held")));
    }
    let words = format!("{packet} of {resource}, and what follows on its stream: held");
    add_stream(node, &resource, StreamRule::Hold(command), words).await
}

/// What is sent before there are streams.
const HANDSHAKE: [Command; 5] = [
    Command::InitialData,
    Command::InitialMeta,
    Command::ConnectionFeatures,
    Command::AuthChallenge,
    Command::AuthResponse,
];

async fn add_stream(
    node: &Rc<Node>,
    resource: &str,
    rule: StreamRule,
    words: String,
) -> Result<(), Reply> {
    node.faults.borrow_mut().add(resource, What::Stream(rule), words);
    apply(node, resource).await
}

fn unknown_resource() -> Reply {
    Reply::failed(Failure::ResourceUnknown, "unknown resource")
}

/// Only accesses to data have a place that an administrator knows.
fn bytes_of(operation: DiskOperation, (first, count): (u64, u64)) -> Result<Range<u64>, Reply> {
    use DiskOperation::{Any, Discard, Flush, MetaRead, MetaWrite, Read, Write};
    match operation {
        Any | Read | Write | Discard => {}
        Flush | MetaRead | MetaWrite => {
            return Err(refuse("sectors are for reads, writes and discards of data"));
        }
    }
    let end = first.checked_add(count).and_then(|end| end.checked_mul(512));
    let end = end.filter(|_| count > 0).ok_or_else(|| refuse("there are no such sectors"))?;
    Ok(first * 512..end)
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
        apply(node, &fault.resource).await?;
    }
    Ok(())
}

async fn apply(node: &Rc<Node>, resource: &str) -> Result<(), Reply> {
    let Some(id) = node.id_of(resource) else { return Ok(()) };
    let (disks, streams) = node.faults.borrow().rules(resource);
    node.tell(id, || run::Command::Faults(disks.clone())).await?;
    node.tell(id, || run::Command::StreamFaults(streams.clone())).await?;
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
    Some(Rule { volume: Some(volume), area, kind, bytes: None, ppm, times: None, effect })
}
