//! Traps when talking to the original: one test for each that the engine can fall into. Spec:
//! wire-protocol.md §16; the table of all of them is docs/defects.md.

use super::resync::{plain, requests, send_bitmap, source, sync_target, target_with};
use super::rig::*;
use drbd_core::config::{DiskConfig, NetConfig, Protocol, ResyncConfig};
use drbd_core::event::{AppOp, WriteFlags};
use drbd_sim::script::Script;
use drbd_types::{Cstate, Fields, Gi};
use drbd_wire::packet::{
    AckKind, BlockAck, BlockDesc, BlockId, BlockRequest, ControllerParams, Features, RequestKind,
    SyncParams, Uuids,
};
use drbd_wire::{Packet, Stream};

fn barriers(packets: &[Packet]) -> usize {
    packets.iter().filter(|p| matches!(p, Packet::Barrier(_))).count()
}

#[test]
fn trap_1_all_features_are_offered_and_a_discard_needs_its_version() {
    assert_eq!(Features::OURS.bits(), 15);
    let mut script = alone();
    script.offer.max = 94;
    script.offer.features = Features::empty();
    let mut script = promote(connect(script, &NetConfig::default()));
    script.app(V0, |_| AppOp::Discard { range: range(64, 64) });
    for sent in &script.sent {
        assert!(!matches!(sent.packet, Packet::Trim(..) | Packet::Zeroes(..)), "{sent:?}");
        let is_data = matches!(sent.packet, Packet::Data(..));
        assert!(!is_data || sent.len > 0, "a write without data crashes such a peer");
    }
}

#[test]
fn trap_3_an_empty_epoch_has_no_barrier() {
    let mut script = primary();
    for _ in 0..3 {
        script.app(V0, |_| AppOp::Flush);
    }
    assert_eq!(barriers(&sent(&mut script)), 0);
    write(&mut script, 8);
    let first = sent(&mut script);
    script.peer(Stream::Meta, 0, ack(AckKind::WriteAck, 8, id_of(&first[0])), 0);
    script.app(V0, |_| AppOp::Flush);
    script.app(V0, |_| AppOp::Flush);
    assert_eq!(barriers(&sent(&mut script)), 1);
}

#[test]
fn trap_4_a_barrier_is_acknowledged_once_with_its_exact_size() {
    let mut script = secondary();
    for seq in 1..=3 {
        script.peer(Stream::Data, 0, data(u64::from(seq) * 8, seq), 4096);
    }
    script.peer(Stream::Data, 0, barrier(0), 0);
    script.peer(Stream::Data, 0, barrier(1), 0);
    script.peer(Stream::Data, 0, data(64, 4), 4096);
    script.peer(Stream::Data, 0, barrier(2), 0);
    let acks: Vec<Packet> =
        sent(&mut script).into_iter().filter(|p| matches!(p, Packet::BarrierAck(..))).collect();
    assert_eq!(acks, [barrier_ack(0, 3), barrier_ack(2, 1)]);
}

/// P_WSAME is not sent whatever was agreed: there is no such packet.
#[test]
fn trap_5_and_6_only_packets_that_the_peer_knows_are_sent() {
    let mut script = primary();
    script.app(V0, |_| AppOp::WriteZeroes { range: range(0, 64), may_unmap: false });
    script.app(V0, |_| AppOp::WriteZeroes { range: range(64, 64), may_unmap: true });
    script.app(V0, |_| AppOp::Discard { range: range(128, 64) });
    for packet in sent(&mut script) {
        let number = packet.command(101);
        assert!(!matches!(number.log_name(), "WSame" | "WriteSame"), "{packet:?}");
    }
}

#[test]
fn trap_7_sequence_numbers_are_complete() {
    let mut script = primary();
    write(&mut script, 8);
    script.app(V0, |_| AppOp::Discard { range: range(64, 64) });
    script.app(V0, |_| AppOp::WriteZeroes { range: range(256, 64), may_unmap: false });
    write(&mut script, 512);
    let seqs: Vec<u32> = sent(&mut script)
        .iter()
        .filter_map(|p| match p {
            Packet::Data(b, _) | Packet::Trim(b, _) | Packet::Zeroes(b, _) => Some(b.seq),
            _ => None,
        })
        .collect();
    assert_eq!(seqs, [1, 2, 3, 4]);
}

#[test]
fn trap_8_left_over_bytes_and_foreign_handles_are_ignored() {
    let mut script = source();
    send_bitmap(&mut script, &[1]);
    script.sent.clear();
    let head = BlockRequest {
        sector: drbd_types::Sector(8),
        id: BlockId::from_number(0xDEAD_BEEF),
        size: 4096,
        undefined: 0xDEAD_BEEF,
    };
    script.peer(Stream::Data, 0, Packet::Request(RequestKind::Resync, head), 0);
    assert!(matches!(sent(&mut script)[..], [Packet::RsDataReply(b, _)] if b.id == head.id));
    let oos = BlockDesc { undefined: 0xDEAD_BEEF, ..desc(80, 4096) };
    script.peer(Stream::Data, 0, Packet::OutOfSync(oos), 0);
    assert!(script.is_up);
    assert_eq!(script.engine.is_dirty(0, 10), Some(true));
    // P_RS_IS_IN_SYNC has a memory address for a handle.
    let mut script = sync_target(&[1]);
    let equal = ack(AckKind::RsIsInSync, 8, BlockId::from_number(0xFFFF_8000_1234_5678));
    script.peer(Stream::Meta, 0, equal, 0);
    assert_eq!(script.engine.is_dirty(0, 1), Some(false));
}

#[test]
fn trap_9_only_plain_bitmaps_end_with_an_empty_packet() {
    let own = |use_rle| {
        let mut script = super::resync::differing(&[1], 0x2222_0000, CURRENT);
        let net = NetConfig { use_rle, ..NetConfig::default() };
        script.connect(net.clone());
        greet(&mut script, &net, peer_state());
        assert_eq!(script.state(0).conn, Cstate::WFBitMapS);
        sent(&mut script)
    };
    assert!(matches!(own(true).last(), Some(Packet::CompressedBitmap(_))));
    let packets = own(false);
    let empty = Packet::Bitmap(Box::default());
    assert_eq!(packets.last(), Some(&empty));
    assert_eq!(packets.iter().filter(|p| matches!(p, Packet::Bitmap(_))).count(), 2);
    // As receiver: after plain bitmaps the empty one ends it.
    let mut script = super::resync::target();
    script.peer(Stream::Data, 0, plain(&[1]), 0);
    assert_eq!(script.state(0).conn, Cstate::WFBitMapT);
    script.peer(Stream::Data, 0, empty, 0);
    assert_eq!(script.state(0).conn, Cstate::WFSyncUUID);
}

#[test]
fn trap_10_a_refused_discard_of_size_0_marks_its_blocks() {
    let mut script = primary();
    script.app(V0, |_| AppOp::Discard { range: range(64, 64) });
    let first = sent(&mut script);
    let refused =
        BlockAck { sector: drbd_types::Sector(64), id: id_of(&first[0]), size: 0, seq: 1 };
    script.peer(Stream::Meta, 0, Packet::Ack(AckKind::NegAck, refused), 0);
    script.peer(Stream::Meta, 0, barrier_ack(0, 1), 0);
    assert!(script.is_up, "{:?}", script.log);
    for bit in 8..16 {
        assert_eq!(script.engine.is_dirty(0, bit), Some(true));
    }
    assert_clean(&script);
}

/// The other stream may be faster: the last P_STATE comes before the last acknowledgement.
#[test]
fn trap_11_an_early_end_of_the_target_is_remembered() {
    let mut script = source();
    send_bitmap(&mut script, &[1]);
    script.peer(Stream::Data, 0, request(RequestKind::Resync, 8, 4096), 0);
    script.peer(Stream::Data, 0, Packet::State(peer_connected().pack()), 0);
    answer_pings(&mut script);
    assert_eq!(script.state(0).conn, Cstate::SyncSource, "the block is not acknowledged");
    script.peer(Stream::Meta, 0, ack(AckKind::RsWriteAck, 8, BlockId::SYNCER), 0);
    answer_pings(&mut script);
    assert_eq!(script.state(0).conn, Cstate::Connected, "{:?}", script.engine.waits());
}

/// As target this node says that it is done only when its acknowledgements have been answered for.
#[test]
fn trap_11_the_own_end_follows_the_last_acknowledgement() {
    let mut script = sync_target(&[1]);
    script.sent.clear();
    script.peer(Stream::Data, 0, super::resync::reply(8), 4096);
    let is_done =
        |script: &Script| script.sent.iter().any(|s| matches!(s.packet, Packet::State(_)));
    assert!(!is_done(&script), "{:?}", script.sent);
    script.peer(Stream::Meta, 0, Packet::PingAck, 0);
    assert!(is_done(&script));
}

#[test]
fn trap_12_settings_of_a_resync_are_taken_from_the_peer() {
    // The own ones are faster and have a controller, which waits for answers.
    let resync = ResyncConfig { resync_rate: 4 << 20, c_plan_ahead: 20, ..Default::default() };
    let config = DiskConfig { resync, ..Default::default() };
    let fixed =
        ControllerParams { plan_ahead: 0, delay_target: 10, fill_target: 0, max_rate: 4000 };
    for resync_rate in [400, 4000] {
        let mut script = target_with(config.clone());
        let theirs = SyncParams {
            resync_rate,
            verify_alg: String::new(),
            csums_alg: String::new(),
            controller: Some(fixed),
        };
        script.peer(Stream::Data, 0, Packet::SyncParam(theirs), 0);
        let bits: Vec<u64> = (0..SECTORS / 8).collect();
        send_bitmap(&mut script, &bits);
        script.peer(Stream::Data, 0, Packet::SyncUuid(Gi(0x3333_0000)), 0);
        script.pass(1_000_000);
        let asked: u32 = requests(&mut script).iter().map(|(_, size)| size / 1024).sum();
        let expected = resync_rate..=resync_rate * 5 / 4;
        assert!(expected.contains(&asked), "{asked} KiB in a second: {expected:?}");
    }
}

#[test]
fn trap_13_and_16_numbers_of_barriers_are_free() {
    let mut script = secondary();
    for (seq, number) in [(1, 7), (2, 1000), (3, 3), (4, u32::MAX)] {
        script.peer(Stream::Data, 0, data(8, seq), 4096);
        script.peer(Stream::Data, 0, barrier(number), 0);
        assert!(sent(&mut script).contains(&barrier_ack(number, 1)));
    }
}

#[test]
fn trap_15_a_primary_survives_a_peer_with_smaller_requests() {
    let mut script = primary();
    let small = drbd_wire::packet::Sizes { max_bio_size: drbd_types::ByteLen(4096), ..sizes() };
    script.peer(Stream::Data, 0, Packet::Sizes(small), 0);
    let id = script.app(V0, |script| AppOp::Write {
        range: range(0, 64),
        buf: script.buf(32_768),
        flags: WriteFlags::default(),
    });
    assert!(script.is_up, "{:?}", script.log);
    for packet in sent(&mut script) {
        if let Packet::Data(head, _) = packet {
            let answer = BlockAck { sector: head.sector, id: head.id, size: 32_768, seq: 1 };
            script.peer(Stream::Meta, 0, Packet::Ack(AckKind::WriteAck, answer), 0);
        }
    }
    assert_eq!(script.completed[&id.0], Ok(()));
}

/// Barriers of protocol A need no acknowledgement of single writes.
#[test]
fn trap_4_protocol_a_is_acknowledged_by_barriers_alone() {
    let mut script = secondary_with(net(Protocol::A));
    let mut head = block(8, 1);
    head.flags = drbd_wire::packet::DpFlags::empty();
    script.peer(Stream::Data, 0, Packet::Data(head, drbd_wire::Digest::NONE), 4096);
    script.peer(Stream::Data, 0, barrier(0), 0);
    assert_eq!(sent(&mut script), [barrier_ack(0, 1)]);
}

/// A stale snapshot of the identifiers does not make a resync twice.
#[test]
fn identifiers_that_come_again_change_nothing() {
    let mut script = connected();
    let again = Uuids { current: Gi(CURRENT), ..uuids(CURRENT) };
    script.peer(Stream::Data, 0, Packet::Uuids(again), 0);
    let state = Fields { ..peer_connected() };
    script.peer(Stream::Data, 0, Packet::State(state.pack()), 0);
    assert_eq!(script.state(0).conn, Cstate::Connected);
}
