//! Writes and reads of the peer. Spec: io-path §2, §4.2; wire §5.5, §6.

use super::rig::*;
use drbd_core::action::DiskOp;
use drbd_core::admin::Command;
use drbd_core::config::{NetConfig, OnCongestion, Protocol};
use drbd_core::event::{IoFailure, StreamLoss};
use drbd_sim::script::Held;
use drbd_types::{Cstate, Dstate, Fields, Role};
use drbd_wire::packet::{AckKind, Block, BlockId, DpFlags, RequestKind};
use drbd_wire::{Digest, Packet, Stream};

fn acks(script: &mut drbd_sim::script::Script) -> Vec<AckKind> {
    sent(script)
        .into_iter()
        .filter_map(|p| if let Packet::Ack(kind, _) = p { Some(kind) } else { None })
        .collect()
}

#[test]
fn a_write_is_acknowledged_when_the_disk_has_it() {
    let mut script = secondary();
    script.holds = true;
    script.peer(Stream::Data, 0, data(8, 1), 4096);
    assert!(acks(&mut script).is_empty());
    script.answer(0, None);
    assert_eq!(acks(&mut script), [AckKind::WriteAck]);
    assert_clean(&script);
}

#[test]
fn protocol_b_acknowledges_at_once() {
    let mut script = secondary_with(net(Protocol::B));
    script.holds = true;
    let mut head = block(8, 1);
    head.flags = DpFlags::SEND_RECEIVE_ACK;
    script.peer(Stream::Data, 0, Packet::Data(head, Digest::NONE), 4096);
    assert_eq!(acks(&mut script), [AckKind::RecvAck]);
    script.answer_all();
    assert!(acks(&mut script).is_empty());
}

#[test]
fn a_failed_write_is_refused_and_marked() {
    let mut script = secondary();
    script.holds = true;
    script.peer(Stream::Data, 0, data(8, 1), 4096);
    script.answer(0, Some(IoFailure::Device(5)));
    assert_eq!(acks(&mut script), [AckKind::NegAck]);
    assert_eq!(script.engine.is_dirty(0, 1), Some(true));
    assert_eq!(script.state(0).disk, Dstate::Failed);
}

/// Defect 14.4 of the original: the barrier was acknowledged before the flush.
#[test]
fn defect_14_4_a_barrier_is_acknowledged_after_the_flush() {
    let mut script = secondary();
    script.holds = true;
    script.peer(Stream::Data, 0, data(8, 1), 4096);
    script.peer(Stream::Data, 0, barrier(0), 0);
    script.peer(Stream::Data, 0, data(16, 2), 4096);
    assert_eq!(script.held.len(), 1, "the next epoch waits");
    script.answer(0, None);
    assert!(matches!(script.held[..], [Held::Disk(_, _, DiskOp::Flush)]));
    assert_eq!(acks(&mut script), [AckKind::WriteAck]);
    script.answer(0, None);
    assert_eq!(sent(&mut script), [barrier_ack(0, 1)]);
    script.answer_all();
    assert_clean(&script);
}

/// What the lost cache held is not on stable storage: the peer has to mark it.
#[test]
fn a_failed_flush_takes_its_epoch_back() {
    let mut script = secondary();
    script.holds = true;
    script.peer(Stream::Data, 0, data(8, 1), 4096);
    script.peer(Stream::Data, 0, barrier(0), 0);
    script.answer(0, None);
    assert_eq!(acks(&mut script), [AckKind::WriteAck]);
    script.answer(0, Some(IoFailure::Device(5)));
    let sent = sent(&mut script);
    let taken = sent.iter().position(|p| matches!(p, Packet::Ack(AckKind::NegAck, _)));
    let barrier = sent.iter().position(|p| *p == barrier_ack(0, 1));
    assert!(taken.is_some() && barrier.is_some() && taken < barrier, "{sent:?}");
    assert_eq!(script.state(0).disk, Dstate::Failed);
    assert_eq!(script.engine.is_dirty(0, 1), Some(true));
}

#[test]
fn a_disk_that_is_gone_before_the_flush_takes_its_epoch_back() {
    let mut script = secondary();
    script.holds = true;
    script.peer(Stream::Data, 0, data(8, 1), 4096);
    script.peer(Stream::Data, 0, data(16, 2), 4096);
    script.answer(0, None);
    script.answer(0, Some(IoFailure::Device(5)));
    script.answer_all();
    assert_eq!(acks(&mut script), [AckKind::WriteAck, AckKind::NegAck]);
    script.peer(Stream::Data, 0, barrier(0), 0);
    let sent = sent(&mut script);
    assert!(
        matches!(sent[..], [Packet::Ack(AckKind::NegAck, ack), Packet::BarrierAck(..)]
            if ack.sector.0 == 8),
        "{sent:?}"
    );
}

#[test]
fn a_disk_without_flush_lowers_the_method() {
    let mut script = secondary();
    script.holds = true;
    script.peer(Stream::Data, 0, data(8, 1), 4096);
    script.peer(Stream::Data, 0, barrier(0), 0);
    script.answer(0, None);
    script.answer(0, Some(IoFailure::Device(95)));
    assert!(script.has_logged("Method to ensure write ordering: drain"), "{:?}", script.log);
    assert_eq!(script.state(0).disk, Dstate::UpToDate);
    assert!(matches!(
        sent(&mut script)[..],
        [Packet::Ack(AckKind::WriteAck, _), Packet::BarrierAck(..)]
    ));
}

/// The flush of a lost connection must not confirm an epoch of the next one.
#[test]
fn a_flush_that_outlives_its_connection_confirms_nothing() {
    let mut script = secondary();
    script.holds = true;
    script.peer(Stream::Data, 0, data(8, 1), 4096);
    script.peer(Stream::Data, 0, barrier(0), 0);
    script.answer(0, None);
    let old = script.held.remove(0);
    script.holds = false;
    script.lose(Stream::Data, StreamLoss::Reset);
    script.wait_until_up();
    greet(&mut script, &NetConfig::default(), peer_state());
    script.sent.clear();
    script.holds = true;
    script.peer(Stream::Data, 0, data(16, 1), 4096);
    script.peer(Stream::Data, 0, barrier(7), 0);
    script.answer(0, None);
    script.held.push(old);
    let last = script.held.len() - 1;
    script.answer(last, None);
    assert!(!sent(&mut script).contains(&barrier_ack(7, 1)), "nothing has flushed it");
    script.answer_all();
    assert!(sent(&mut script).contains(&barrier_ack(7, 1)));
}

#[test]
fn an_empty_epoch_is_not_acknowledged() {
    let mut script = secondary();
    script.peer(Stream::Data, 0, barrier(3), 0);
    assert!(sent(&mut script).is_empty());
    script.peer(Stream::Data, 0, data(8, 1), 4096);
    assert_eq!(acks(&mut script), [AckKind::WriteAck]);
}

#[test]
fn without_a_disk_writes_are_refused_but_counted() {
    let mut script = without_disk(disk(&[]));
    script.command(Command::NewVolume { volume: V0, minor: drbd_types::Minor(0) });
    let net = NetConfig::default();
    script.connect(net.clone());
    greet(&mut script, &net, peer_state());
    script.sent.clear();
    script.peer(Stream::Data, 0, data(8, 1), 4096);
    script.peer(Stream::Data, 0, barrier(0), 0);
    assert_eq!(
        sent(&mut script).iter().map(|p| p.command(101).log_name()).collect::<Vec<_>>(),
        ["NegAck", "BarrierAck"]
    );
    for (kind, answer) in [
        (RequestKind::Data, AckKind::NegDataReply),
        (RequestKind::Resync, AckKind::NegRsDataReply),
        (RequestKind::Verify, AckKind::NegRsDataReply),
    ] {
        script.peer(Stream::Data, 0, request(kind, 8, 4096), 0);
        assert_eq!(acks(&mut script), [answer], "{kind:?}");
    }
    assert_clean(&script);
}

#[test]
fn reads_of_the_peer_are_served() {
    let mut script = secondary();
    script.peer(Stream::Data, 0, request(RequestKind::Data, 8, 4096), 0);
    assert!(matches!(sent(&mut script)[..], [Packet::DataReply(b, _)] if b.id == BlockId::SYNCER));
    assert_clean(&script);
}

#[test]
fn a_read_error_is_told() {
    let mut script = secondary();
    script.holds = true;
    script.peer(Stream::Data, 0, request(RequestKind::Data, 8, 4096), 0);
    script.answer(0, Some(IoFailure::Device(5)));
    assert_eq!(acks(&mut script), [AckKind::NegDataReply]);
    assert_eq!(script.state(0).disk, Dstate::Diskless, "the disk is left");
}

#[test]
fn a_discard_waits_for_earlier_writes() {
    let mut script = secondary();
    script.holds = true;
    script.peer(Stream::Data, 0, data(8, 1), 4096);
    script.peer(Stream::Data, 0, Packet::Trim(block(512, 2), 4096), 0);
    assert_eq!(script.held.len(), 1);
    script.answer(0, None);
    assert!(matches!(script.held[..], [Held::Disk(_, _, DiskOp::Discard { .. })]));
    script.answer_all();
    assert_eq!(acks(&mut script), [AckKind::WriteAck, AckKind::WriteAck]);
    assert_clean(&script);
}

#[test]
fn overlapping_writes_keep_their_order() {
    let mut script = secondary();
    script.holds = true;
    script.peer(Stream::Data, 0, data(8, 1), 4096);
    script.peer(Stream::Data, 0, data(8, 2), 4096);
    assert_eq!(script.held.len(), 1, "the second waits for the first");
    script.answer_all();
    assert_eq!(acks(&mut script).len(), 2);
    assert_clean(&script);
}

/// What the peer said before it heard that this node is Ahead is no end of a resync: looking for one
/// went on for ever.
#[test]
fn a_state_of_the_peer_from_before_it_is_behind_changes_nothing() {
    let mut script = primary_with(NetConfig {
        protocol: Protocol::A,
        on_congestion: OnCongestion::PullAhead,
        congestion_fill: drbd_types::SectorCount(8),
        ..NetConfig::default()
    });
    write(&mut script, 8);
    write(&mut script, 16);
    let ahead = script.state(0);
    assert_eq!(ahead.conn, Cstate::Ahead, "{:?}", script.log);
    let state = Fields { peer: Role::Primary, ..peer_connected() };
    script.peer(Stream::Data, 0, Packet::State(state.pack()), 0);
    assert_eq!(script.state(0), ahead);
}

/// With protocol A its application counts on a write as soon as it has set out.
#[test]
fn a_read_of_the_peer_sees_its_earlier_writes() {
    let mut script = secondary_with(net(Protocol::A));
    script.holds = true;
    let head = Block { flags: DpFlags::empty(), ..block(8, 1) };
    script.peer(Stream::Data, 0, Packet::Data(head, Digest::NONE), 4096);
    script.peer(Stream::Data, 0, request(RequestKind::Data, 12, 4096), 0);
    script.peer(Stream::Data, 0, request(RequestKind::Data, 16, 4096), 0);
    let reads = |script: &drbd_sim::script::Script| -> Vec<u64> {
        let start = |held: &Held| match held {
            Held::Disk(_, _, DiskOp::Read { range, .. }) => Some(range.start.0),
            _ => None,
        };
        script.held.iter().filter_map(start).collect()
    };
    assert_eq!(reads(&script), [16]);
    script.answer(0, None);
    assert_eq!(reads(&script), [16, 12]);
    script.answer_all();
    let replies = sent(&mut script);
    assert_eq!(replies.iter().filter(|p| matches!(p, Packet::DataReply(..))).count(), 2);
    assert_clean(&script);
}

/// It would come after newer ones, or between two reads.
#[test]
fn a_promotion_waits_for_what_a_lost_primary_has_written() {
    let mut script = secondary();
    script.is_reachable = false;
    script.holds = true;
    script.peer(Stream::Data, 0, data(8, 1), 4096);
    script.lose(Stream::Data, StreamLoss::Reset);
    let ticket = script.begin(Command::Primary { volume: V0, force: false });
    let is_write = |held: &Held| matches!(held, Held::Disk(_, _, DiskOp::Write { .. }));
    while let Some(other) = script.held.iter().position(|held| !is_write(held)) {
        script.answer(other, None);
    }
    assert_eq!(script.held.len(), 1, "{:?}", script.held);
    assert!(!script.replies.contains_key(&ticket.0));
    script.answer_all();
    assert_eq!(script.replies[&ticket.0].code, 1, "{:?}", script.log);
}
