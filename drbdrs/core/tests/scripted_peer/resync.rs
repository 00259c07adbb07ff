//! Resync and verify with a played peer. Spec: wire §8, §9, §10; io-path §8, §9.

use super::rig::*;
use drbd_core::admin::Command;
use drbd_core::config::{DiskConfig, NetConfig, ResyncConfig};
use drbd_core::event::{IoFailure, StreamLoss};
use drbd_core::generation::Slots;
use drbd_sim::script::{Held, Script};
use drbd_types::{Cstate, Dstate, Fields, Gi, Role, StateWord};
use drbd_wire::packet::{AckKind, Block, BlockId, DpFlags, RequestKind, SyncParams, Uuids};
use drbd_wire::{Digest, Packet, Stream};

/// A disk with bits relative to the peer's generation, which is therefore the source or target.
pub(crate) fn differing(bits: &[u64], own: u64, bitmap: u64) -> Script {
    let mut disk = drbd_sim::script::ScriptDisk::new(
        SECTORS,
        |sb| {
            sb.la_size = drbd_types::SectorCount(SECTORS);
            sb.current = Gi(own);
            sb.bitmap = Gi(bitmap);
            sb.flags |= drbdmeta::superblock::Flags::CONSISTENT
                | drbdmeta::superblock::Flags::WAS_UP_TO_DATE;
        },
        bits.to_vec(),
    );
    disk.limits.can_discard = true;
    let mut script = without_disk(disk);
    script.attach(0, Default::default());
    script
}

/// WFBitMapS: this node has newer data in block 1.
pub(crate) fn source() -> Script {
    let mut script = differing(&[1], 0x2222_0000, CURRENT);
    let net = NetConfig::default();
    script.connect(net.clone());
    greet(&mut script, &net, peer_state());
    assert_eq!(script.state(0).conn, Cstate::WFBitMapS, "{:?}", script.log);
    script
}

/// WFBitMapT: the peer has newer data.
pub(crate) fn target() -> Script {
    target_with(Default::default())
}

pub(crate) fn target_with(config: DiskConfig) -> Script {
    let mut script = without_disk(disk(&[]));
    script.attach(0, config);
    let net = NetConfig::default();
    script.connect(net.clone());
    protocol(&mut script, &net);
    script.peer(Stream::Data, 0, sync_param(), 0);
    script.peer(Stream::Data, 0, Packet::Sizes(sizes()), 0);
    let theirs = Uuids { bitmap: Gi(CURRENT), dirty_bits: 1, ..uuids(0x2222_0000) };
    script.peer(Stream::Data, 0, Packet::Uuids(theirs), 0);
    script.peer(Stream::Data, 0, Packet::State(peer_state().pack()), 0);
    assert_eq!(script.state(0).conn, Cstate::WFBitMapT, "{:?}", script.log);
    script.sent.clear();
    script
}

pub(crate) fn plain(bits: &[u64]) -> Packet {
    let mut bytes = vec![0_u8; SECTORS as usize / 64];
    for bit in bits {
        bytes[*bit as usize / 8] |= 1 << (bit % 8);
    }
    Packet::Bitmap(bytes.into())
}

pub(crate) fn send_bitmap(script: &mut Script, bits: &[u64]) {
    script.peer(Stream::Data, 0, plain(bits), 0);
    script.peer(Stream::Data, 0, Packet::Bitmap(Box::default()), 0);
}

/// SyncTarget with these blocks to fetch.
pub(crate) fn sync_target(bits: &[u64]) -> Script {
    let mut script = target();
    send_bitmap(&mut script, bits);
    assert_eq!(script.state(0).conn, Cstate::WFSyncUUID);
    script.peer(Stream::Data, 0, Packet::SyncUuid(Gi(0x3333_0000)), 0);
    assert_eq!(script.state(0).conn, Cstate::SyncTarget, "{:?}", script.log);
    script.pass(100_000);
    script
}

pub(crate) fn requests(script: &mut Script) -> Vec<(u64, u32)> {
    sent(script)
        .into_iter()
        .filter_map(|p| match p {
            Packet::Request(RequestKind::Resync, r) => Some((r.sector.0, r.size)),
            _ => None,
        })
        .collect()
}

pub(crate) fn reply(sector: u64) -> Packet {
    let flags = DpFlags::empty();
    let head = Block { sector: drbd_types::Sector(sector), id: BlockId::SYNCER, seq: 0, flags };
    Packet::RsDataReply(head, Digest::NONE)
}

#[test]
fn a_target_asks_writes_acknowledges_and_ends() {
    let mut script = sync_target(&[1]);
    assert_eq!(requests(&mut script), [(8, 4096)]);
    script.peer(Stream::Data, 0, reply(8), 4096);
    let acked = sent(&mut script);
    assert!(matches!(acked[..], [Packet::Ack(AckKind::RsWriteAck, _), ..]), "{acked:?}");
    script.peer(Stream::Meta, 0, Packet::PingAck, 0);
    assert_eq!(script.state(0).conn, Cstate::Connected, "{:?}", script.engine.waits());
    assert_eq!(script.state(0).disk, Dstate::UpToDate);
    assert_eq!(script.volume(0).unwrap().out_of_sync_bits, 0);
    assert_clean(&script);
}

/// What is in flight is limited, not the rate: no time passes between the requests.
#[test]
fn a_fast_resync_does_not_wait_for_its_next_step() {
    let resync = ResyncConfig { c_plan_ahead: 0, ..Default::default() };
    let mut script = target_with(DiskConfig { resync, ..Default::default() });
    let Packet::SyncParam(rates) = sync_param() else { panic!("rates") };
    let fast = Packet::SyncParam(SyncParams { resync_rate: 4 << 20, ..rates });
    script.peer(Stream::Data, 0, fast, 0);
    let bits: Vec<u64> = (0..SECTORS / 8).collect();
    send_bitmap(&mut script, &bits);
    script.peer(Stream::Data, 0, Packet::SyncUuid(Gi(0x3333_0000)), 0);
    script.pass(100_000);
    let (mut asked, mut waiting) = (0, requests(&mut script));
    while !waiting.is_empty() {
        let in_flight: u32 = waiting.iter().map(|(_, size)| size / 4096).sum();
        assert!(in_flight <= 1024, "{in_flight} blocks at once with max-buffers 2048");
        asked += in_flight;
        for (sector, size) in waiting {
            script.peer(Stream::Data, 0, reply(sector), size.into());
        }
        waiting = requests(&mut script);
    }
    assert_eq!(asked, 2048, "all blocks of the device");
}

/// Defect 14.4: a cleared bit must not outlive its data in a power cut.
#[test]
fn defect_14_4_resync_data_is_flushed_before_it_is_acknowledged() {
    let mut script = sync_target(&[1]);
    script.sent.clear();
    script.holds = true;
    script.peer(Stream::Data, 0, reply(8), 4096);
    script.answer(0, None);
    assert!(sent(&mut script).is_empty());
    assert_eq!(script.engine.is_dirty(0, 1), Some(true));
    script.answer(0, None);
    assert!(matches!(sent(&mut script)[..], [Packet::Ack(AckKind::RsWriteAck, _), ..]));
}

#[test]
fn data_of_the_wrong_place_or_length_ends_the_resync() {
    for (sector, len) in [(16, 4096), (8, 8192), (8, 512)] {
        let mut script = sync_target(&[1]);
        script.is_reachable = false;
        script.peer(Stream::Data, 0, reply(sector), len);
        assert!(!script.is_up, "{sector} {len}");
        assert_eq!(script.engine.is_dirty(0, 1), Some(true));
        assert_clean(&script);
    }
}

#[test]
fn a_refused_block_stays_dirty_and_the_disk_inconsistent() {
    let mut script = sync_target(&[1]);
    script.peer(Stream::Meta, 0, ack(AckKind::NegRsDataReply, 8, BlockId::SYNCER), 0);
    for _ in 0..20 {
        script.pass(100_000);
        answer_pings(&mut script);
    }
    assert_eq!(script.state(0).disk, Dstate::Inconsistent, "{:?}", script.log);
    assert_eq!(script.state(0).conn, Cstate::Connected);
    assert_eq!(script.engine.is_dirty(0, 1), Some(true));
}

#[test]
fn a_lost_connection_ends_a_resync_at_any_point() {
    let mut script = sync_target(&[1, 2, 3]);
    script.is_reachable = false;
    script.holds = true;
    script.peer(Stream::Data, 0, reply(8), 4096);
    script.lose(Stream::Data, StreamLoss::Reset);
    script.holds = false;
    script.answer_all();
    assert_eq!(conn(&script), Cstate::WFConnection, "{:?}", script.engine.waits());
    assert_eq!(script.state(0).disk, Dstate::Inconsistent);
    assert_clean(&script);
}

#[test]
fn a_disk_that_fails_during_a_resync_is_left() {
    let mut script = sync_target(&[1]);
    script.holds = true;
    script.peer(Stream::Data, 0, reply(8), 4096);
    script.answer(0, Some(IoFailure::Device(5)));
    script.holds = false;
    script.answer_all();
    assert_eq!(script.state(0).disk, Dstate::Diskless, "{:?}", script.engine.waits());
    assert_clean(&script);
}

#[test]
fn a_source_sends_its_bitmap_and_serves() {
    let mut script = source();
    let packets = sent(&mut script);
    assert!(matches!(packets.last(), Some(Packet::CompressedBitmap(_))), "{packets:?}");
    send_bitmap(&mut script, &[1]);
    assert_eq!(script.state(0).conn, Cstate::SyncSource, "{:?}", script.log);
    assert!(matches!(sent(&mut script)[..], [Packet::SyncUuid(_), ..]));
    script.peer(Stream::Data, 0, request(RequestKind::Resync, 8, 4096), 0);
    assert!(matches!(sent(&mut script)[..], [Packet::RsDataReply(..)]));
    script.peer(Stream::Meta, 0, ack(AckKind::RsWriteAck, 8, BlockId::SYNCER), 0);
    assert_eq!(script.engine.is_dirty(0, 1), Some(false));
    script.peer(Stream::Data, 0, Packet::State(peer_connected().pack()), 0);
    answer_pings(&mut script);
    assert_eq!(script.state(0).conn, Cstate::Connected, "{:?}", script.engine.waits());
    assert_clean(&script);
}

/// The target would take over an identifier that this node does not know when its disk comes back.
#[test]
fn a_sync_uuid_that_is_not_stable_is_not_sent() {
    let mut script = source();
    script.holds = true;
    send_bitmap(&mut script, &[1]);
    sent(&mut script);
    let is_meta = |held: &Held| matches!(held, Held::Meta(..));
    while !script.held.is_empty() && !script.held.iter().any(is_meta) {
        script.answer(0, None);
    }
    let at = script.held.iter().position(is_meta).expect("the identifier is written");
    script.answer(at, Some(IoFailure::Device(5)));
    script.holds = false;
    script.answer_all();
    let packets = sent(&mut script);
    assert!(!packets.iter().any(|p| matches!(p, Packet::SyncUuid(_))), "{packets:?}");
    assert_eq!(script.state(0).disk, Dstate::Diskless, "{:?}", script.log);
}

/// It could not read its own blocks for their checksums.
#[test]
fn a_source_leaves_a_resync_whose_target_gave_up_before_it_asked() {
    let mut script = source();
    send_bitmap(&mut script, &[1]);
    assert_eq!(script.state(0).conn, Cstate::SyncSource, "{:?}", script.log);
    let gave_up = Fields { disk: Dstate::Inconsistent, ..peer_connected() };
    script.peer(Stream::Data, 0, Packet::State(gave_up.pack()), 0);
    answer_pings(&mut script);
    let state = script.state(0);
    assert_eq!((state.conn, state.pdsk), (Cstate::Connected, Dstate::Inconsistent));
    assert_eq!(script.engine.is_dirty(0, 1), Some(true));
}

/// The target may have finished just before it went away: a new generation begins (decision 1).
#[test]
fn a_primary_source_that_loses_its_target_begins_a_generation() {
    for is_frozen in [false, true] {
        let (mut script, before) = loses_target(true, is_frozen);
        if is_frozen {
            assert_eq!(script.volume(0).unwrap().slots, before, "not before I/O goes on");
            script.command(Command::ResumeIo(V0));
        }
        let after = script.volume(0).unwrap().slots;
        assert!(!after.current.same(before.current), "{is_frozen} {after:?}");
        // The bits still count from there, and the target may not have got that identifier.
        assert_eq!((after.bitmap, after.history[0]), (before.bitmap, before.history[0]));
        assert!(after.history[1].same(before.current), "{is_frozen} {after:?}");
    }
}

/// Otherwise the history would be full after two bad links, and the target unknown.
#[test]
fn a_target_that_lacks_blocks_needs_no_new_generation() {
    let (script, before) = loses_target(false, false);
    assert_eq!(script.volume(0).unwrap().slots, before);
}

/// A Primary source whose link breaks, perhaps when the only block was under way, and what its
/// identifiers were.
fn loses_target(is_answered: bool, is_frozen: bool) -> (Script, Slots) {
    let mut script = source();
    send_bitmap(&mut script, &[1]);
    script.begin(Command::Primary { volume: V0, force: false });
    script.peer(Stream::Meta, 0, Packet::StateChgReply(1), 0);
    assert_eq!(script.state(0).role, Role::Primary);
    if is_answered {
        script.peer(Stream::Data, 0, request(RequestKind::Resync, 8, 4096), 0);
    }
    if is_frozen {
        script.command(Command::SuspendIo(V0));
    }
    let before = script.volume(0).unwrap().slots;
    script.is_reachable = false;
    script.lose(Stream::Data, StreamLoss::Reset);
    (script, before)
}

#[test]
fn a_thin_request_for_zeroes_is_answered_without_data() {
    let mut script = source();
    send_bitmap(&mut script, &[1]);
    script.sent.clear();
    script.is_zero = Box::new(|_| true);
    script.peer(Stream::Data, 0, request(RequestKind::ThinResync, 8, 4096), 0);
    assert!(matches!(sent(&mut script)[..], [Packet::RsDeallocated(_)]));
}

#[test]
fn something_between_the_packets_of_a_bitmap_ends_the_connection() {
    let mut script = target();
    script.is_reachable = false;
    script.peer(Stream::Data, 0, plain(&[1]), 0);
    script.peer(Stream::Data, 0, Packet::UnplugRemote, 0);
    assert_dropped(&script, "receive_bitmap: cmd neither ReportBitMap nor ReportCBitMap");
}

#[test]
fn a_bitmap_that_is_too_long_ends_the_connection() {
    let mut script = target();
    script.is_reachable = false;
    script.peer(Stream::Data, 0, plain(&[1]), 0);
    script.peer(Stream::Data, 0, plain(&[1]), 0);
    assert!(!script.is_up, "{:?}", script.log);
    assert_eq!(conn(&script), Cstate::WFConnection, "{:?}", script.engine.waits());
}

#[test]
fn a_broken_code_ends_the_connection() {
    let mut script = target();
    script.is_reachable = false;
    script.peer(Stream::Data, 0, Packet::CompressedBitmap(Box::new([0x82, 0xff, 0xff])), 0);
    assert!(!script.is_up, "{:?}", script.log);
}

#[test]
fn blocks_that_the_source_reports_meanwhile_are_marked() {
    let mut script = target();
    script.peer(Stream::Data, 0, Packet::OutOfSync(desc(80, 4096)), 0);
    assert_eq!(script.engine.is_dirty(0, 10), Some(true));
    let mut script = connected();
    script.peer(Stream::Data, 0, Packet::OutOfSync(desc(80, 4096)), 0);
    assert!(script.is_up && script.has_logged("ASSERT FAILED cstate"), "at the wrong time too");
    assert_eq!(script.engine.is_dirty(0, 10), Some(true));
}

/// States that name resyncs which are not: none of them may hang the receiver.
#[test]
fn states_at_the_wrong_time_do_not_hang() {
    for conn_state in Cstate::ALL {
        for disk in Dstate::ALL {
            let mut script = connected();
            script.is_reachable = false;
            let state = Fields { conn: *conn_state, disk: *disk, ..peer_connected() };
            script.peer(Stream::Data, 0, Packet::State(state.pack()), 0);
            for _ in 0..20 {
                script.pass(200_000);
                answer_pings(&mut script);
            }
            script.lose(Stream::Data, StreamLoss::Reset);
            script.lose(Stream::Meta, StreamLoss::Reset);
            script.pass(1_000_000);
            let end = conn(&script);
            assert!(
                matches!(end, Cstate::WFConnection | Cstate::StandAlone),
                "{conn_state} {disk}: {end} {:#?}",
                script.engine.waits()
            );
            assert_clean(&script);
        }
    }
}

/// Acknowledgements come on another connection than the peer's states: they may be late.
#[test]
fn a_late_acknowledgement_of_a_lost_disk_clears_no_bit() {
    let mut script = source();
    send_bitmap(&mut script, &[1]);
    script.peer(Stream::Data, 0, request(RequestKind::Resync, 8, 4096), 0);
    let lost = Fields { disk: Dstate::Failed, ..peer_connected() };
    script.peer(Stream::Data, 0, Packet::State(lost.pack()), 0);
    assert_eq!(script.state(0).pdsk, Dstate::Failed);
    script.peer(Stream::Meta, 0, ack(AckKind::RsWriteAck, 8, BlockId::SYNCER), 0);
    assert!(script.is_up, "{:?}", script.log);
    assert_eq!(script.engine.is_dirty(0, 1), Some(true));
}

/// Two sources, or two targets, would wait for each other for ever.
#[test]
fn a_peer_that_wants_the_same_side_ends_the_connection() {
    let mut script = source();
    let state = Fields { conn: Cstate::WFBitMapS, ..peer_connected() };
    script.peer(Stream::Data, 0, Packet::State(state.pack()), 0);
    assert_dropped(&script, "The peer wants the same side of the resync");
    let mut script = target();
    let state = Fields { conn: Cstate::WFBitMapT, ..peer_connected() };
    script.peer(Stream::Data, 0, Packet::State(state.pack()), 0);
    assert_dropped(&script, "The peer wants the same side of the resync");
}

/// It refused a write while it had no disk, and says so after that.
#[test]
fn a_bitmap_waits_for_the_answers_to_all_writes() {
    let mut script = primary();
    let id = write(&mut script, 8);
    let first = sent(&mut script);
    script.peer(Stream::Meta, 0, ack(AckKind::WriteAck, 8, id_of(&first[0])), 0);
    assert_eq!(script.completed[&id.0], Ok(()));
    let diskless = Fields { disk: Dstate::Diskless, peer: Role::Primary, ..peer_connected() };
    script.peer(Stream::Data, 0, Packet::State(diskless.pack()), 0);
    script.peer(Stream::Data, 0, Packet::Uuids(uuids(CURRENT)), 0);
    let attaching = Fields { disk: Dstate::Negotiating, ..diskless };
    script.peer(Stream::Data, 0, Packet::State(attaching.pack()), 0);
    assert_eq!(script.state(0).conn, Cstate::WFBitMapS, "{:?}", script.log);
    let is_bitmap = |p: &Packet| matches!(p, Packet::Bitmap(_) | Packet::CompressedBitmap(_));
    assert!(!sent(&mut script).iter().any(is_bitmap));
    script.peer(Stream::Meta, 0, ack(AckKind::NegAck, 8, id_of(&first[0])), 0);
    script.peer(Stream::Meta, 0, barrier_ack(0, 1), 0);
    assert_eq!(script.engine.is_dirty(0, 1), Some(true));
    assert!(sent(&mut script).iter().any(is_bitmap));
}

#[test]
fn a_verify_ends_when_the_other_disk_has_errors() {
    let net = NetConfig { verify_alg: "crc32c".to_owned(), ..NetConfig::default() };
    let mut script = alone();
    script.connect(net.clone());
    protocol(&mut script, &net);
    let Packet::SyncParam(params) = sync_param() else { panic!("settings") };
    let params = Packet::SyncParam(SyncParams { verify_alg: net.verify_alg, ..params });
    script.peer(Stream::Data, 0, params, 0);
    script.peer(Stream::Data, 0, Packet::Sizes(sizes()), 0);
    script.peer(Stream::Data, 0, Packet::Uuids(uuids(CURRENT)), 0);
    script.peer(Stream::Data, 0, Packet::State(peer_state().pack()), 0);
    let verifying = Fields { conn: Cstate::VerifyS, ..peer_connected() };
    let asked =
        Packet::StateChgReq(StateWord::CONN, StateWord(verifying.pack().0 & StateWord::CONN.0));
    script.peer(Stream::Data, 0, asked, 0);
    assert_eq!(script.state(0).conn, Cstate::VerifyT, "{:?}", script.log);
    let bad = Fields { disk: Dstate::Inconsistent, ..peer_connected() };
    script.peer(Stream::Data, 0, Packet::State(bad.pack()), 0);
    answer_pings(&mut script);
    let state = script.state(0);
    assert_eq!((state.conn, state.pdsk), (Cstate::Connected, Dstate::Inconsistent));
}

/// The newest data is gone with it: what the target has is older, and does not become good by that.
#[test]
fn a_target_whose_source_loses_its_disk_is_not_up_to_date() {
    let mut script = target();
    let lost = Fields { disk: Dstate::Failed, pdsk: Dstate::Outdated, ..peer_connected() };
    script.peer(Stream::Data, 0, Packet::State(lost.pack()), 0);
    let state = script.state(0);
    assert_eq!((state.conn, state.disk), (Cstate::Connected, Dstate::Inconsistent));
}

#[test]
fn a_handler_may_refuse_a_resync() {
    let mut script = target();
    script.exits.insert("BeforeResyncTarget", 1);
    send_bitmap(&mut script, &[1]);
    script.peer(Stream::Data, 0, Packet::SyncUuid(Gi(0x3333_0000)), 0);
    assert_dropped(&script, "before-resync-target handler returned 1, dropping connection.");
    assert_eq!(script.state(0).conn, Cstate::StandAlone, "{:?}", script.log);
    assert_eq!(script.volume(0).unwrap().out_of_sync_bits, 1);
    assert!(requests(&mut script).is_empty());
}
