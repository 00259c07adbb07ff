//! Requests that are frozen because I/O is suspended. Spec: io-path §1.9; states §7.

use std::collections::BTreeMap;

use super::rig::*;
use drbd_core::admin::Command;
use drbd_core::config::{DiskConfig, Fencing, NetConfig, OnNoData, Protocol, ResourceConfig};
use drbd_core::event::{AppOp, StreamLoss, WriteFlags};
use drbd_sim::script::Script;
use drbd_types::{Cstate, Dstate, VolumeNr};
use drbd_wire::packet::AckKind;
use drbd_wire::{Packet, Stream};

const V1: VolumeNr = VolumeNr(1);

/// A Primary with a write that the peer has not acknowledged, suspended, connecting again.
fn reconnecting() -> (Script, drbd_core::ids::AppId) {
    let mut script = primary();
    let id = write(&mut script, 8);
    assert_eq!(script.command(Command::SuspendIo(V0)).code, 1);
    script.lose(Stream::Data, StreamLoss::Reset);
    script.wait_until_up();
    script.sent.clear();
    (script, id)
}

#[test]
fn a_write_that_is_sent_again_is_followed_by_its_barrier() {
    let (mut script, id) = reconnecting();
    greet(&mut script, &NetConfig::default(), peer_state());
    let packets = sent(&mut script);
    let [.., data @ Packet::Data(..), end, Packet::State(_)] = &packets[..] else {
        panic!("{packets:?}")
    };
    assert_eq!(*end, barrier(0), "no later write may come that would end the epoch");
    script.peer(Stream::Meta, 0, ack(AckKind::WriteAck, 8, id_of(data)), 0);
    script.peer(Stream::Meta, 0, barrier_ack(0, 1), 0);
    script.command(Command::ResumeIo(V0));
    assert_eq!(script.completed[&id.0], Ok(()));
    assert_clean(&script);
}

/// With two Primaries the peer decided against a write, and forgot that with the connection.
#[test]
fn who_gives_way_is_decided_anew_when_a_write_is_sent_again() {
    let net = NetConfig { two_primaries: true, ..NetConfig::default() };
    let mut script = primary_with(net.clone());
    let id = write(&mut script, 8);
    let first = sent(&mut script);
    script.peer(Stream::Meta, 0, ack(AckKind::RetryWrite, 8, id_of(&first[0])), 0);
    assert_eq!(script.command(Command::SuspendIo(V0)).code, 1);
    script.lose(Stream::Data, StreamLoss::Reset);
    script.wait_until_up();
    script.sent.clear();
    greet(&mut script, &net, peer_state());
    let packets = sent(&mut script);
    let data = packets.iter().find(|p| matches!(p, Packet::Data(..))).expect("it is sent again");
    script.peer(Stream::Meta, 0, ack(AckKind::WriteAck, 8, id_of(data)), 0);
    script.command(Command::ResumeIo(V0));
    assert_eq!(script.completed[&id.0], Ok(()));
}

/// Otherwise the peer would decide by bits and identifiers from before the writes were given up.
#[test]
fn a_suspension_does_not_end_within_a_handshake() {
    let (mut script, id) = reconnecting();
    protocol(&mut script, &NetConfig::default());
    let ticket = script.begin(Command::ResumeIo(V0));
    assert!(!script.completed.contains_key(&id.0) && !script.replies.contains_key(&ticket.0));
    // The identifiers that it would begin were not told to the peer.
    assert!(!script.has_logged("new current UUID"), "{:?}", script.log);
    greet_volume(&mut script, 0);
    assert_eq!(script.replies[&ticket.0].code, 1);
    let packets = sent(&mut script);
    let data = packets.iter().find(|p| matches!(p, Packet::Data(..))).expect("it is sent again");
    script.peer(Stream::Meta, 0, ack(AckKind::WriteAck, 8, id_of(data)), 0);
    assert_eq!(script.completed[&id.0], Ok(()));
}

/// A connection of two volumes on which this node is Primary; the peer agrees to everything.
fn two_primaries_of(net: &NetConfig) -> Script {
    let mut script = Script::new(BTreeMap::from([(0, disk(&[])), (1, disk(&[]))]));
    let resource = ResourceConfig { on_no_data: OnNoData::SuspendIo };
    script.command(Command::ResourceOptions(resource));
    for volume in 0..2 {
        script.attach(volume, DiskConfig::default());
    }
    script.connect(net.clone());
    protocol(&mut script, net);
    for volume in 0..2 {
        greet_volume(&mut script, volume);
    }
    for volume in [V0, V1] {
        let command = Command::Primary { volume, force: false };
        assert_eq!(agreed(&mut script, command), 1, "{:?}", script.log);
    }
    script.sent.clear();
    script
}

fn greet_volume(script: &mut Script, volume: u16) {
    let state = peer_state();
    let sizes = Packet::Sizes(sizes());
    for packet in [sync_param(), sizes, Packet::Uuids(uuids(CURRENT)), Packet::State(state.pack())]
    {
        script.peer(Stream::Data, volume, packet, 0);
    }
}

fn agreed(script: &mut Script, command: Command) -> i32 {
    let ticket = script.begin(command);
    answer_pings(script);
    let asked = script.sent.iter().rfind(|s| matches!(s.packet, Packet::StateChgReq(..)));
    let volume = asked.map_or(0, |s| s.volume);
    script.peer(Stream::Meta, volume, Packet::StateChgReply(1), 0);
    script.replies[&ticket.0].code
}

/// The first volume has its data back before the second one is connected.
#[test]
fn writes_of_all_volumes_are_sent_again_behind_the_whole_handshake() {
    let net = net(Protocol::A);
    let mut script = two_primaries_of(&net);
    assert_eq!(agreed(&mut script, Command::Detach { volume: V0, force: false }), 1);
    let id = script.app(V1, |script| AppOp::Write {
        range: range(8, 8),
        buf: script.buf(4096),
        flags: WriteFlags::default(),
    });
    assert_eq!(script.completed[&id.0], Ok(()), "protocol A");
    script.lose(Stream::Data, StreamLoss::Reset);
    assert!(script.state(0).susp_nod);
    script.wait_until_up();
    protocol(&mut script, &net);
    greet_volume(&mut script, 0);
    script.sent.clear();
    assert!(script.state(1).is_suspended(), "an application could overtake what is sent again");
    greet_volume(&mut script, 1);
    assert!(!script.state(1).is_suspended());
    let all = sent(&mut script);
    let number = all.iter().find_map(|p| match p {
        Packet::Barrier(number) => Some(number.0),
        _ => None,
    });
    assert!(all.iter().any(|p| matches!(p, Packet::Data(..))), "{all:?}");
    let number = number.expect("a barrier follows");
    script.peer(Stream::Meta, 0, Packet::BarrierAck(drbd_wire::packet::BarrierId(number), 1), 0);
    assert_clean(&script);
    assert_eq!(script.engine.log_len(), 0);
}

/// Who waits for it waits for the end of the suspension, which may need the resync.
#[test]
fn a_frozen_flush_does_not_keep_the_bitmap_back() {
    let mut script = alone();
    assert_eq!(script.command(Command::Primary { volume: V0, force: false }).code, 1);
    script.holds = true;
    let flush = script.app(V0, |_| AppOp::Flush);
    script.begin(Command::SuspendIo(V0));
    script.answer_all();
    script.holds = false;
    let net = NetConfig::default();
    script.connect(net.clone());
    script.sent.clear();
    greet(&mut script, &net, peer_state());
    assert_eq!(script.state(0).conn, Cstate::WFBitMapS, "{:?}", script.log);
    let is_bitmap = |p: &Packet| matches!(p, Packet::Bitmap(_) | Packet::CompressedBitmap(_));
    assert!(sent(&mut script).iter().any(is_bitmap));
    assert!(!script.completed.contains_key(&flush.0), "still suspended");
    script.begin(Command::ResumeIo(V0));
    assert_eq!(script.completed[&flush.0], Ok(()));
}

/// It was routed when this node had no disk.
#[test]
fn a_write_that_is_sent_again_goes_to_the_disk_that_has_come() {
    let mut script = alone();
    let on_no_data = OnNoData::SuspendIo;
    script.command(Command::ResourceOptions(ResourceConfig { on_no_data }));
    let mut script = promote(connect(script, &NetConfig::default()));
    script.command(Command::Detach { volume: V0, force: true });
    assert_eq!(script.state(0).disk, Dstate::Diskless, "{:?}", script.log);
    let id = write(&mut script, 8);
    script.lose(Stream::Data, StreamLoss::Reset);
    assert!(script.state(0).susp_nod, "{:?}", script.log);
    script.disks.get_mut(&0).unwrap().apply_al();
    // With fencing it is only Consistent until it has met the peer.
    let config = DiskConfig { fencing: Fencing::ResourceOnly, ..DiskConfig::default() };
    script.command(Command::Attach { volume: V0, config: Box::new(config) });
    assert_eq!(script.state(0).disk, Dstate::Consistent, "{:?}", script.log);
    script.wait_until_up();
    script.sent.clear();
    greet(&mut script, &NetConfig::default(), peer_state());
    assert_eq!(script.state(0).disk, Dstate::UpToDate, "{:?}", script.log);
    let packets = sent(&mut script);
    let data = packets.iter().find(|p| matches!(p, Packet::Data(..))).expect("it is sent again");
    script.peer(Stream::Meta, 0, ack(AckKind::WriteAck, 8, id_of(data)), 0);
    script.peer(Stream::Meta, 0, barrier_ack(1, 1), 0);
    assert_eq!(script.completed[&id.0], Ok(()));
    assert_eq!(script.engine.is_dirty(0, 1), Some(false), "both have it");
    assert_eq!(script.state(0).conn, Cstate::Connected);
}
