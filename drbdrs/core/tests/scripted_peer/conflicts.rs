//! Two Primaries write the same place. Spec: io-path §5; wire §6.

use super::rig::*;
use drbd_core::config::NetConfig;
use drbd_sim::script::Script;
use drbd_types::{Fields, Role};
use drbd_wire::packet::AckKind;
use drbd_wire::{Packet, Stream};

/// Both are Primary, with this protocol version. The other node decides about conflicts.
fn two_primaries(version: u32) -> Script {
    two_primaries_as(version, false)
}

fn two_primaries_as(version: u32, is_resolver: bool) -> Script {
    let net = NetConfig { two_primaries: true, versions: (86, version), ..NetConfig::default() };
    let mut script = alone();
    script.is_resolver = is_resolver;
    let mut script = promote(connect(script, &net));
    let state = Fields { role: Role::Primary, peer: Role::Primary, ..peer_connected() };
    script.peer(Stream::Data, 0, Packet::State(state.pack()), 0);
    script.sent.clear();
    script
}

fn written(packets: &[Packet]) -> Vec<&Packet> {
    packets.iter().filter(|p| matches!(p, Packet::Data(..))).collect()
}

/// Below version 100 there is no other answer, also if the peer's write covers the own one only in
/// part. Were it taken as done, the rest would be on this node alone.
#[test]
fn below_version_100_a_superseded_write_is_done_again() {
    let mut script = two_primaries(95);
    let id = write(&mut script, 8);
    let first = sent(&mut script);
    let handle = id_of(written(&first)[0]);
    script.peer(Stream::Data, 0, data(12, 1), 4096);
    script.peer(Stream::Meta, 0, ack(AckKind::Superseded, 8, handle), 0);
    assert!(!script.completed.contains_key(&id.0));
    let again = sent(&mut script);
    assert!(matches!(again[0], Packet::Ack(AckKind::WriteAck, _)), "{again:?}");
    let second = id_of(written(&again)[0]);
    script.peer(Stream::Meta, 0, ack(AckKind::WriteAck, 8, second), 0);
    assert_eq!(script.completed[&id.0], Ok(()));
    // The first epoch is empty and not acknowledged.
    script.peer(Stream::Meta, 0, barrier_ack(1, 1), 0);
    assert!(script.is_up, "{:?}", script.log);
    assert_clean(&script);
}

/// The peer may acknowledge later epochs before it sends the write that a postponed one waits for.
#[test]
fn a_postponed_write_is_in_no_epoch() {
    let mut script = two_primaries(101);
    write(&mut script, 8);
    write(&mut script, 800);
    let first = sent(&mut script);
    let handles: Vec<_> = written(&first).into_iter().map(id_of).collect();
    script.peer(Stream::Meta, 0, ack(AckKind::RetryWrite, 8, handles[0]), 0);
    script.peer(Stream::Meta, 0, ack(AckKind::WriteAck, 800, handles[1]), 0);
    script.peer(Stream::Meta, 0, barrier_ack(1, 1), 0);
    assert!(script.is_up, "{:?}", script.log);
    script.peer(Stream::Data, 0, data(12, 1), 4096);
    let again = sent(&mut script);
    assert_eq!(written(&again).len(), 1, "{again:?}");
}

/// Applied after the first one is decided, it would come before the second one on the other node.
#[test]
fn a_write_of_the_peer_waits_for_all_that_it_meets() {
    let mut script = two_primaries(101);
    write(&mut script, 8);
    write(&mut script, 16);
    let first = sent(&mut script);
    let handles: Vec<_> = written(&first).into_iter().map(id_of).collect();
    script.peer(Stream::Data, 0, data(12, 1), 4096);
    script.peer(Stream::Meta, 0, ack(AckKind::RetryWrite, 8, handles[0]), 0);
    assert_eq!(sent(&mut script), [], "the second one is not decided");
    script.peer(Stream::Meta, 0, ack(AckKind::RetryWrite, 16, handles[1]), 0);
    let again = sent(&mut script);
    assert!(matches!(again[0], Packet::Ack(AckKind::WriteAck, _)), "{again:?}");
    assert_eq!(written(&again).len(), 2, "{again:?}");
}

/// The peer has written and acknowledged the own write before it sends its own: nothing there
/// would start a refused one again.
#[test]
fn an_acknowledged_write_on_a_slow_disk_is_no_conflict() {
    let mut script = two_primaries_as(101, true);
    write(&mut script, 8);
    let hot = sent(&mut script);
    script.peer(Stream::Meta, 0, ack(AckKind::WriteAck, 8, id_of(written(&hot)[0])), 0);
    script.holds = true;
    let id = write(&mut script, 8);
    let second = sent(&mut script);
    script.peer(Stream::Meta, 0, ack(AckKind::WriteAck, 8, id_of(written(&second)[0])), 0);
    script.peer(Stream::Data, 0, data(12, 2), 4096);
    assert_eq!(sent(&mut script), [], "neither refused nor written");
    assert_eq!(script.held.len(), 1, "the own write");
    script.answer(0, None);
    assert_eq!(script.completed[&id.0], Ok(()));
    script.answer_all();
    let answers = sent(&mut script);
    assert!(matches!(answers[..], [Packet::Ack(AckKind::WriteAck, _)]), "{answers:?}");
    assert!(script.is_up, "{:?}", script.log);
}
