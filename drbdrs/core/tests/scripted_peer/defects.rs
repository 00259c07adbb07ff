//! Defects of the original in the I/O path: one test each. Spec: io-path-and-resync.md §14; the
//! table of all of them is docs/defects.md.

use super::resync::{reply, requests, source, sync_target};
use super::rig::*;
use drbd_core::admin::Command;
use drbd_core::config::{DiskConfig, NetConfig, Protocol, ReadBalancing};
use drbd_core::event::{AppOp, StreamLoss};
use drbd_sim::script::{Held, Script};
use drbd_types::{Cstate, Dstate, Fields, Role};
use drbd_wire::packet::{AckKind, BlockId, RequestKind};
use drbd_wire::{Packet, Stream};

/// The connection is lost and comes back; the peer has the same generation.
pub(crate) fn reconnect(script: &mut Script) {
    script.lose(Stream::Data, StreamLoss::Reset);
    script.wait_until_up();
    script.sent.clear();
    greet(script, &NetConfig::default(), peer_state());
}

#[test]
fn defect_14_1_an_attach_keeps_the_last_64_bits() {
    let all: Vec<u64> = (0..SECTORS / 8).collect();
    let mut script = without_disk(disk(&all));
    script.attach(0, DiskConfig::default());
    assert_eq!(script.volume(0).unwrap().out_of_sync_bits, SECTORS / 8);
}

/// Both are Primary; this node decides conflicts.
fn arbiter() -> Script {
    let net = NetConfig { two_primaries: true, ..NetConfig::default() };
    let mut script = primary_with(net);
    let state = Fields { role: Role::Primary, peer: Role::Primary, ..peer_connected() };
    script.peer(Stream::Data, 0, Packet::State(state.pack()), 0);
    assert_eq!(script.state(0).peer, Role::Primary, "{:?}", script.log);
    script.sent.clear();
    script
}

#[test]
fn defect_14_2_a_conflict_does_not_keep_its_epoch_open() {
    let mut script = arbiter();
    write(&mut script, 8);
    script.sent.clear();
    script.peer(Stream::Data, 0, data(8, 1), 4096);
    assert!(matches!(sent(&mut script)[..], [Packet::Ack(AckKind::Superseded, _)]));
    script.peer(Stream::Data, 0, data(64, 2), 4096);
    script.peer(Stream::Data, 0, barrier(0), 0);
    let answers = sent(&mut script);
    assert!(answers.contains(&barrier_ack(0, 1)), "the superseded one is not counted: {answers:?}");
    script.peer(Stream::Data, 0, data(8, 3), 4096);
    script.peer(Stream::Data, 0, barrier(1), 0);
    let answers = sent(&mut script);
    assert!(matches!(answers[..], [Packet::Ack(AckKind::Superseded, _)]), "{answers:?}");
}

#[test]
fn defect_14_2_with_two_primaries_each_write_is_an_epoch() {
    let mut script = arbiter();
    write(&mut script, 8);
    write(&mut script, 64);
    let packets = sent(&mut script);
    let barriers = packets.iter().filter(|p| matches!(p, Packet::Barrier(_))).count();
    assert_eq!(barriers, 2, "{packets:?}");
}

#[test]
fn defect_14_3_zeroes_are_data_where_data_has_a_digest() {
    let net = NetConfig { integrity_alg: "crc32c".into(), ..NetConfig::default() };
    let mut script = primary_with(net.clone());
    script.app(V0, |_| AppOp::WriteZeroes { range: range(8, 8), may_unmap: false });
    let first = script.sent.pop_front().unwrap();
    assert!(matches!(first.packet, Packet::Data(..)), "{first:?}");
    assert_eq!(first.len, 4096);
    let mut script = secondary_with(net);
    script.peer(Stream::Data, 0, Packet::Zeroes(block(8, 1), 4096), 0);
    assert!(matches!(sent(&mut script)[..], [Packet::Ack(AckKind::WriteAck, _)]));
    script.peer(Stream::Data, 0, Packet::Trim(block(8, 2), 4096), 0);
    assert!(matches!(sent(&mut script)[..], [Packet::Ack(AckKind::WriteAck, _)]));
}

#[test]
fn defect_14_6_refused_blocks_do_not_starve_a_resync() {
    let bits: Vec<u64> = (0..SECTORS / 8).collect();
    let mut script = sync_target(&bits);
    let mut refused = 0;
    for _ in 0..200 {
        for (sector, size) in requests(&mut script) {
            let answer = drbd_wire::packet::BlockAck {
                sector: drbd_types::Sector(sector),
                id: BlockId::SYNCER,
                size,
                seq: 1,
            };
            script.peer(Stream::Meta, 0, Packet::Ack(AckKind::NegRsDataReply, answer), 0);
            refused += u64::from(size) / 4096;
        }
        script.pass(100_000);
        answer_pings(&mut script);
    }
    assert_eq!(refused, SECTORS / 8, "every block was asked for: {:?}", script.engine.waits());
}

/// The administrator suspends I/O, the connection is lost and comes back.
#[test]
fn defect_14_7_a_suspended_write_is_sent_again() {
    let mut script = primary();
    let id = write(&mut script, 8);
    assert_eq!(script.command(Command::SuspendIo(V0)).code, 1);
    reconnect(&mut script);
    let again = sent(&mut script);
    let write = again.iter().find(|p| matches!(p, Packet::Data(..))).expect("it is sent again");
    script.peer(Stream::Meta, 0, ack(AckKind::WriteAck, 8, id_of(write)), 0);
    assert!(!script.completed.contains_key(&id.0));
    assert_eq!(script.command(Command::ResumeIo(V0)).code, 1);
    assert_eq!(script.completed[&id.0], Ok(()));
}

/// What the peer had in a volatile cache may be lost with a crash that nobody notices.
#[test]
fn defect_14_8_what_was_acknowledged_but_not_flushed_is_sent_again() {
    for protocol in [Protocol::A, Protocol::B, Protocol::C] {
        let mut script = primary_with(net(protocol));
        write(&mut script, 8);
        let first = sent(&mut script);
        let kind = if protocol == Protocol::B { AckKind::RecvAck } else { AckKind::WriteAck };
        if protocol != Protocol::A {
            script.peer(Stream::Meta, 0, ack(kind, 8, id_of(&first[0])), 0);
        }
        assert_eq!(script.command(Command::SuspendIo(V0)).code, 1);
        script.lose(Stream::Data, StreamLoss::Reset);
        script.wait_until_up();
        script.sent.clear();
        greet(&mut script, &net(protocol), peer_state());
        let again = sent(&mut script);
        assert!(again.iter().any(|p| matches!(p, Packet::Data(..))), "{protocol:?}: {again:?}");
    }
}

#[test]
fn defect_14_9_the_new_generation_is_stable_before_a_write_completes_alone() {
    let mut script = primary();
    let id = write(&mut script, 8);
    script.is_reachable = false;
    script.holds = true;
    script.lose(Stream::Data, StreamLoss::Reset);
    assert!(!script.completed.contains_key(&id.0));
    let is_super = |held: &Held| matches!(held, Held::Meta(..));
    for _ in 0..20 {
        if script.completed.contains_key(&id.0) {
            break;
        }
        assert!(script.held.iter().any(is_super), "{:?}", script.held);
        script.answer(0, None);
    }
    assert_eq!(script.completed[&id.0], Ok(()));
    let is_new = script.log.iter().position(|l| l.text.contains("new current UUID"));
    assert!(is_new.is_some());
}

/// Also one that the activity log has kept back.
#[test]
fn defect_14_9_the_new_generation_is_stable_before_a_write_begins_alone() {
    let mut script = primary();
    script.is_reachable = false;
    script.holds = true;
    let id = write(&mut script, 8);
    assert!(matches!(script.held[..], [Held::Meta(..)]), "the log: {:?}", script.held);
    script.lose(Stream::Data, StreamLoss::Reset);
    script.answer(0, None);
    let is_data = |held: &Held| matches!(held, Held::Disk(..));
    assert!(!script.held.iter().any(is_data), "{:?}", script.held);
    script.answer_all();
    assert!(script.has_logged("new current UUID"), "{:?}", script.log);
    assert_eq!(script.completed[&id.0], Ok(()));
}

#[test]
fn defect_14_10_an_idle_node_reads_for_itself() {
    for read_balancing in [ReadBalancing::LeastPending, ReadBalancing::WhenCongestedRemote] {
        let mut script = without_disk(disk(&[]));
        script.attach(0, DiskConfig { read_balancing, ..DiskConfig::default() });
        let mut script = promote(connect(script, &NetConfig::default()));
        let id = read(&mut script, 8);
        assert_eq!(script.completed[&id.0], Ok(()), "{read_balancing:?}");
        assert_eq!(sent(&mut script), []);
    }
}

#[test]
fn defect_14_11_a_bit_behind_the_cursor_is_synced_too() {
    let mut script = sync_target(&[5]);
    assert_eq!(requests(&mut script), [(40, 4096)]);
    script.peer(Stream::Data, 0, Packet::OutOfSync(desc(8, 4096)), 0);
    script.peer(Stream::Data, 0, reply(40), 4096);
    script.pass(300_000);
    assert_eq!(requests(&mut script), [(8, 4096)], "{:?}", script.engine.waits());
}

#[test]
fn defect_14_12_resume_io_completes_what_was_acknowledged() {
    let mut script = primary();
    let id = write(&mut script, 8);
    let first = sent(&mut script);
    assert_eq!(script.command(Command::SuspendIo(V0)).code, 1);
    script.peer(Stream::Meta, 0, ack(AckKind::WriteAck, 8, id_of(&first[0])), 0);
    assert!(!script.completed.contains_key(&id.0));
    assert_eq!(script.command(Command::ResumeIo(V0)).code, 1);
    assert_eq!(script.completed[&id.0], Ok(()));
}

/// rs-discard-granularity that is no multiple of what the disk can discard.
#[test]
fn defect_14_13_the_discard_granularity_is_rounded_up() {
    let mut script = super::resync::target_with(DiskConfig {
        rs_discard_granularity: 5000,
        ..DiskConfig::default()
    });
    let bits: Vec<u64> = (0..8).collect();
    super::resync::send_bitmap(&mut script, &bits);
    script.peer(Stream::Data, 0, Packet::SyncUuid(drbd_types::Gi(0x3333_0000)), 0);
    script.pass(100_000);
    let first = sent(&mut script).into_iter().find_map(|p| match p {
        Packet::Request(RequestKind::ThinResync, r) => Some((r.sector.0, r.size)),
        _ => None,
    });
    assert_eq!(first, Some((0, 8192)), "{:?}", script.log);
}

/// Not in the list of the specification: an answer that comes late took the mark of newer data.
#[test]
fn a_late_resync_ack_clears_no_newer_mark() {
    let mut script = source();
    super::resync::send_bitmap(&mut script, &[1]);
    script.begin(Command::Primary { volume: V0, force: false });
    answer_pings(&mut script);
    script.peer(Stream::Meta, 0, Packet::StateChgReply(1), 0);
    assert_eq!(script.state(0).role, Role::Primary, "{:?}", script.log);
    script.peer(Stream::Data, 0, request(RequestKind::Resync, 8, 4096), 0);
    // The target's disk fails; its acknowledgement of the block is still under way.
    let state = Fields { disk: Dstate::Failed, role: Role::Secondary, ..peer_connected() };
    script.peer(Stream::Data, 0, Packet::State(state.pack()), 0);
    assert_eq!(script.state(0).conn, Cstate::Connected, "{:?}", script.log);
    let id = write(&mut script, 8);
    assert_eq!(script.completed[&id.0], Ok(()));
    script.peer(Stream::Meta, 0, ack(AckKind::RsWriteAck, 8, BlockId::SYNCER), 0);
    assert_eq!(script.engine.is_dirty(0, 1), Some(true), "only this node has it");
}

/// Not in the list: the peer consented to an invalidate and lost its disk at once. It took this node
/// for Inconsistent from then on, and refused every disk.
#[test]
fn the_peer_is_told_what_did_not_come_of_its_consent() {
    let mut script = secondary();
    script.begin(Command::Invalidate(V0));
    assert!(matches!(sent(&mut script)[..], [Packet::StateChgReq(..)]));
    let state = Fields { disk: Dstate::Diskless, ..peer_connected() };
    script.peer(Stream::Data, 0, Packet::State(state.pack()), 0);
    script.peer(Stream::Meta, 0, Packet::StateChgReply(1), 0);
    assert_eq!(script.state(0).conn, Cstate::Connected, "{:?}", script.log);
    let told = sent(&mut script).into_iter().rev().find_map(|packet| match packet {
        Packet::State(word) => word.unpack().ok(),
        _ => None,
    });
    let told = told.map(|state| (state.conn, state.disk));
    assert_eq!(told, Some((Cstate::Connected, Dstate::UpToDate)), "{:?}", script.log);
}

/// Not in the list: the same on the side of the target.
#[test]
fn data_that_newer_data_has_overtaken_clears_no_bit() {
    let mut script = sync_target(&[1]);
    script.holds = true;
    script.peer(Stream::Data, 0, reply(8), 4096);
    script.peer(Stream::Data, 0, Packet::OutOfSync(desc(8, 4096)), 0);
    script.holds = false;
    script.answer_all();
    assert_eq!(script.engine.is_dirty(0, 1), Some(true), "the source has newer data");
}
