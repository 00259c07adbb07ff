//! Writes of this node, and what the peer answers. Spec: io-path §1.5 to §1.9; wire §5, §6.

use super::rig::*;
use drbd_core::action::DiskOp;
use drbd_core::admin::Command;
use drbd_core::config::{DiskConfig, NetConfig, OnIoError, Protocol, ReadBalancing};
use drbd_core::event::{AppOp, IoFailure, StreamLoss};
use drbd_sim::script::Held;
use drbd_types::{Cstate, Dstate};
use drbd_wire::packet::{AckKind, BlockId, DpFlags};
use drbd_wire::{Packet, Stream};

fn only(packets: Vec<Packet>) -> Packet {
    assert_eq!(packets.len(), 1, "{packets:?}");
    packets.into_iter().next().unwrap()
}

#[test]
fn protocol_c_waits_for_the_write_ack() {
    let mut script = primary();
    let id = write(&mut script, 8);
    let packet = only(sent(&mut script));
    let Packet::Data(head, _) = &packet else { panic!("{packet:?}") };
    assert_eq!((head.seq, head.flags), (1, DpFlags::SEND_WRITE_ACK));
    assert!(!script.completed.contains_key(&id.0));
    script.peer(Stream::Meta, 0, ack(AckKind::WriteAck, 8, id_of(&packet)), 0);
    assert_eq!(script.completed[&id.0], Ok(()));
    assert_eq!(sent(&mut script), [barrier(0)], "what depends on it is in a later epoch");
    script.peer(Stream::Meta, 0, barrier_ack(0, 1), 0);
    assert_clean(&script);
}

#[test]
fn protocol_b_waits_for_the_receive_ack() {
    let mut script = primary_with(net(Protocol::B));
    let id = write(&mut script, 8);
    let packet = only(sent(&mut script));
    script.peer(Stream::Meta, 0, ack(AckKind::RecvAck, 8, id_of(&packet)), 0);
    assert_eq!(script.completed[&id.0], Ok(()));
}

#[test]
fn protocol_a_waits_for_the_transport() {
    let mut script = primary_with(net(Protocol::A));
    let id = write(&mut script, 8);
    assert_eq!(script.completed[&id.0], Ok(()));
    assert_eq!(sent(&mut script).len(), 2, "data and barrier");
}

#[test]
fn a_negative_ack_marks_the_block() {
    let mut script = primary();
    let id = write(&mut script, 8);
    let packet = only(sent(&mut script));
    script.peer(Stream::Meta, 0, ack(AckKind::NegAck, 8, id_of(&packet)), 0);
    assert_eq!(script.completed[&id.0], Ok(()), "the own disk has it");
    script.peer(Stream::Meta, 0, barrier_ack(0, 1), 0);
    assert_eq!(script.engine.is_dirty(0, 1), Some(true));
    assert_clean(&script);
}

#[test]
fn a_lost_connection_completes_the_write_and_marks_the_block() {
    let mut script = primary();
    let id = write(&mut script, 8);
    script.is_reachable = false;
    script.lose(Stream::Data, StreamLoss::Reset);
    assert_eq!(script.completed[&id.0], Ok(()));
    assert_eq!(script.engine.is_dirty(0, 1), Some(true));
    assert!(script.has_logged("new current UUID"), "it writes without its peer");
    assert_clean(&script);
}

#[test]
fn acks_that_belong_to_nothing_end_the_connection() {
    let kinds = [
        AckKind::WriteAck,
        AckKind::RecvAck,
        AckKind::RsWriteAck,
        AckKind::Superseded,
        AckKind::NegDataReply,
        AckKind::RetryWrite,
    ];
    for kind in kinds {
        let mut script = primary();
        script.is_reachable = false;
        let wrong = BlockId::from_number(0x0000_0005_0000_0007);
        script.peer(Stream::Meta, 0, ack(kind, 8, wrong), 0);
        assert_dropped(&script, "failed to find request");
    }
}

#[test]
fn an_ack_with_the_wrong_sector_volume_or_kind_belongs_to_nothing() {
    for (volume, sector, kind) in
        [(0, 16, AckKind::WriteAck), (3, 8, AckKind::WriteAck), (0, 8, AckKind::NegDataReply)]
    {
        let mut script = primary();
        script.is_reachable = false;
        write(&mut script, 8);
        let id = id_of(&only(sent(&mut script)));
        script.peer(Stream::Meta, volume, ack(kind, sector, id), 0);
        assert_dropped(&script, "failed to find request");
        assert_clean(&script);
    }
}

/// In protocols A and B the request may be gone when the peer's disk fails.
#[test]
fn a_late_negative_ack_marks_its_range() {
    let mut script = primary();
    script.peer(Stream::Meta, 0, ack(AckKind::NegAck, 24, BlockId::from_number(5)), 0);
    assert!(script.is_up);
    assert_eq!(script.engine.is_dirty(0, 3), Some(true));
}

#[test]
fn barrier_acks_that_do_not_fit_end_the_connection() {
    for (number, count, text) in [
        (0, 2, "BAD! BarrierAck #0 received with n_writes=2, expected n_writes=1!"),
        (4, 1, "BAD! BarrierAck #4 received, expected #0!"),
    ] {
        let mut script = primary();
        script.is_reachable = false;
        write(&mut script, 8);
        let id = id_of(&only(sent(&mut script)));
        script.peer(Stream::Meta, 0, ack(AckKind::WriteAck, 8, id), 0);
        script.peer(Stream::Meta, 0, barrier_ack(number, count), 0);
        assert_dropped(&script, text);
        assert_clean(&script);
    }
    let mut script = primary();
    script.is_reachable = false;
    script.peer(Stream::Meta, 0, barrier_ack(0, 1), 0);
    assert_dropped(&script, "BAD! BarrierAck #0 received, but no epoch in tl!?");
}

#[test]
fn a_barrier_ack_before_the_write_ack_ends_the_connection() {
    let mut script = primary();
    script.is_reachable = false;
    let id = write(&mut script, 8);
    script.peer(Stream::Meta, 0, barrier_ack(0, 1), 0);
    assert!(!script.is_up);
    assert_eq!(script.engine.is_dirty(0, 1), Some(true), "nobody knows whether the peer has it");
    assert_eq!(script.completed[&id.0], Ok(()));
}

#[test]
fn an_ack_that_comes_twice_does_no_harm() {
    let mut script = primary();
    let id = write(&mut script, 8);
    let packet = only(sent(&mut script));
    script.peer(Stream::Meta, 0, ack(AckKind::WriteAck, 8, id_of(&packet)), 0);
    script.peer(Stream::Meta, 0, ack(AckKind::WriteAck, 8, id_of(&packet)), 0);
    assert_eq!(script.completed[&id.0], Ok(()));
}

#[test]
fn discards_and_zeroes_have_packets_of_their_own() {
    let mut script = primary();
    script.app(V0, |_| AppOp::Discard { range: range(64, 64) });
    assert!(matches!(only(sent(&mut script)), Packet::Trim(_, 32_768)));
    script.app(V0, |_| AppOp::WriteZeroes { range: range(256, 64), may_unmap: true });
    assert!(matches!(only(sent(&mut script)), Packet::Zeroes(b, 32_768)
        if b.flags.contains(DpFlags::DISCARD | DpFlags::ZEROES)));
}

/// The handler that is called first may start this node anew: until then nothing is written that
/// nobody has marked.
#[test]
fn writes_wait_for_the_handler_of_a_failed_disk() {
    let mut script = primary();
    let config = DiskConfig { on_io_error: OnIoError::CallLocalIoError, ..DiskConfig::default() };
    script.command(Command::DiskOptions { volume: V0, config: Box::new(config) });
    sent(&mut script);
    write(&mut script, 8);
    let id = id_of(&only(sent(&mut script)));
    script.peer(Stream::Meta, 0, ack(AckKind::WriteAck, 8, id), 0);
    sent(&mut script);
    script.holds = true;
    let failed = write(&mut script, 8);
    let id = id_of(&only(sent(&mut script)));
    script.answer(0, Some(IoFailure::Device(5)));
    script.peer(Stream::Meta, 0, ack(AckKind::WriteAck, 8, id), 0);
    // A handler that stops the machine would make the old block here win over the peer's.
    assert!(!script.completed.contains_key(&failed.0), "{:?}", script.log);
    write(&mut script, 16);
    let packets = sent(&mut script);
    assert!(
        !packets.iter().any(|p| matches!(p, Packet::Data(..) | Packet::State(..))),
        "{packets:?}"
    );
    script.answer_all();
    let packets = sent(&mut script);
    let news = packets.iter().position(|p| matches!(p, Packet::State(..)));
    let data = packets.iter().position(|p| matches!(p, Packet::Data(..)));
    assert!(news.is_some() && news < data, "{packets:?}");
    assert_eq!(script.completed[&failed.0], Ok(()));
}

/// Defect 14.5 of the original: a flush did not wait for the peer.
#[test]
fn defect_14_5_a_flush_waits_for_the_epoch() {
    let mut script = primary();
    write(&mut script, 8);
    let packet = only(sent(&mut script));
    let flush = script.app(V0, |_| AppOp::Flush);
    assert_eq!(sent(&mut script), [barrier(0)]);
    script.peer(Stream::Meta, 0, ack(AckKind::WriteAck, 8, id_of(&packet)), 0);
    assert!(!script.completed.contains_key(&flush.0));
    script.peer(Stream::Meta, 0, barrier_ack(0, 1), 0);
    assert_eq!(script.completed[&flush.0], Ok(()));
    assert_clean(&script);
}

#[test]
fn a_ping_is_answered_and_silence_is_noticed() {
    let mut script = connected();
    script.peer(Stream::Meta, 0, Packet::Ping, 0);
    assert_eq!(sent(&mut script), [Packet::PingAck]);
    script.is_reachable = false;
    script.pass(10_000_000);
    assert!(script.sent.iter().any(|s| s.packet == Packet::Ping));
    script.pass(600_000);
    assert_dropped(&script, "PingAck did not arrive in time.");
}

#[test]
fn a_request_without_answer_ends_the_connection() {
    let mut script = primary();
    script.is_reachable = false;
    let id = write(&mut script, 8);
    for _ in 0..45 {
        script.pass(1_000_000);
        answer_pings(&mut script);
    }
    assert_dropped(&script, "Remote failed to finish a request within");
    assert_eq!(script.completed[&id.0], Ok(()));
    assert_eq!(conn(&script), Cstate::WFConnection);
}

#[test]
fn without_a_disk_reads_go_to_the_peer() {
    let mut script = primary();
    let ticket = script.begin(Command::Detach { volume: V0, force: false });
    script.peer(Stream::Meta, 0, Packet::StateChgReply(1), 0);
    assert_eq!(script.replies[&ticket.0].code, 1, "{:?}", script.log);
    script.sent.clear();
    let id = read(&mut script, 8);
    let packet = only(sent(&mut script));
    let head = drbd_wire::packet::Block {
        sector: drbd_types::Sector(8),
        id: id_of(&packet),
        seq: 0,
        flags: DpFlags::empty(),
    };
    script.peer(Stream::Data, 0, Packet::DataReply(head, drbd_wire::Digest::NONE), 4096);
    assert_eq!(script.completed[&id.0], Ok(()));
    // The next one is refused: nobody has the data.
    let id = read(&mut script, 16);
    let packet = only(sent(&mut script));
    script.peer(Stream::Meta, 0, ack(AckKind::NegDataReply, 16, id_of(&packet)), 0);
    for _ in 0..5 {
        let Some(again) = sent(&mut script).pop() else { break };
        script.peer(Stream::Meta, 0, ack(AckKind::NegDataReply, 16, id_of(&again)), 0);
    }
    assert!(script.completed[&id.0].is_err());
    assert_clean(&script);
}

/// What the peer gets without knowing that it has the only copy, it does not mark.
#[test]
fn the_peer_learns_of_a_failed_disk_before_it_gets_the_only_copy() {
    let mut script = primary();
    script.holds = true;
    write(&mut script, 8);
    assert!(sent(&mut script).is_empty(), "the activity log comes first");
    script.answer(0, Some(IoFailure::Device(5)));
    script.answer_all();
    let sent = sent(&mut script);
    let failed = sent.iter().position(
        |p| matches!(p, Packet::State(word) if word.unpack().unwrap().disk == Dstate::Failed),
    );
    let data = sent.iter().position(|p| matches!(p, Packet::Data(..)));
    assert!(failed.is_some() && data.is_some() && failed < data, "{sent:?}");
}

/// With protocol A the peer may not have done it, and a kernel reads past it.
#[test]
fn what_the_peer_may_lack_is_read_here() {
    let mut script = without_disk(disk(&[]));
    let read_balancing = ReadBalancing::PreferRemote;
    script.attach(0, DiskConfig { read_balancing, ..DiskConfig::default() });
    let mut script = promote(connect(script, &net(Protocol::A)));
    write(&mut script, 8);
    script.sent.clear();
    let id = read(&mut script, 12);
    assert_eq!(script.completed[&id.0], Ok(()));
    read(&mut script, 16);
    assert!(matches!(only(sent(&mut script)), Packet::Request(..)));
}

/// The original goes on reading there what is not on the peer any more.
#[test]
fn a_disk_that_fails_to_discard_writes_zeroes() {
    let mut disk = disk(&[]);
    disk.limits.can_discard = true;
    let mut script = without_disk(disk);
    script.attach(0, DiskConfig::default());
    let mut script = promote(connect(script, &NetConfig::default()));
    script.holds = true;
    let id = script.app(V0, |_| AppOp::Discard { range: range(8, 8) });
    let is_data = |held: &Held| matches!(held, Held::Disk(..));
    while let Some(other) = script.held.iter().position(|held| !is_data(held)) {
        script.answer(other, None);
    }
    let packet = only(sent(&mut script));
    assert!(matches!(packet, Packet::Trim(..)), "{packet:?}");
    script.answer(0, Some(IoFailure::Device(95)));
    assert!(matches!(script.held[..], [Held::Disk(_, _, DiskOp::WriteZeroes { .. })]));
    script.answer(0, None);
    script.peer(Stream::Meta, 0, ack(AckKind::WriteAck, 8, id_of(&packet)), 0);
    assert_eq!(script.completed[&id.0], Ok(()));
    assert_eq!(script.state(0).disk, Dstate::UpToDate, "{:?}", script.log);
    assert_eq!(script.engine.is_dirty(0, 1), Some(false));
}
