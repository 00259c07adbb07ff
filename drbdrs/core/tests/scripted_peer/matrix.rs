//! Every packet in every state of the connection: whether it ends the connection, is answered, or
//! is taken in silence; and that whatever it does, the connection can end afterwards and nothing is
//! left behind. Spec: wire-protocol.md §4.2, io-path-and-resync.md §13.5.

use std::fmt::Write as _;

use super::resync::{plain, send_bitmap, source, sync_target, target};
use super::rig::*;
use drbd_core::admin::Command;
use drbd_core::config::{NetConfig, OnCongestion, Protocol};
use drbd_core::event::StreamLoss;
use drbd_sim::script::Script;
use drbd_types::{Cstate, Dstate, Fields, Gi, SectorCount, StateWord};
use drbd_wire::packet::{AckKind, BlockId, RequestKind};
use drbd_wire::{Digest, Packet, Stream};

/// Names of the states, and how a node gets there.
const STATES: [(Cstate, fn() -> Script); 16] = [
    (Cstate::StandAlone, alone),
    (Cstate::WFConnection, waiting),
    (Cstate::WFReportParams, reporting),
    (Cstate::Connected, secondary),
    (Cstate::WFBitMapS, source),
    (Cstate::WFBitMapT, target),
    (Cstate::WFSyncUUID, wf_sync_uuid),
    (Cstate::SyncSource, sync_source),
    (Cstate::SyncTarget, || sync_target(&[1])),
    (Cstate::VerifyS, verify_s),
    (Cstate::VerifyT, verify_t),
    (Cstate::PausedSyncS, || paused(sync_source())),
    (Cstate::PausedSyncT, || paused(sync_target(&[1]))),
    (Cstate::Ahead, ahead),
    (Cstate::Behind, behind),
    (Cstate::Connected, diskless),
];

fn waiting() -> Script {
    let mut script = connected();
    script.is_reachable = false;
    script.lose(Stream::Data, StreamLoss::Reset);
    script
}

fn reporting() -> Script {
    let mut script = alone();
    script.connect(NetConfig::default());
    script
}

fn wf_sync_uuid() -> Script {
    let mut script = target();
    send_bitmap(&mut script, &[1]);
    script
}

fn sync_source() -> Script {
    let mut script = source();
    send_bitmap(&mut script, &[1]);
    script
}

fn paused(mut script: Script) -> Script {
    script.begin(Command::PauseSync(V0));
    script
}

fn verifying() -> Script {
    let net = NetConfig { verify_alg: "crc32c".into(), ..NetConfig::default() };
    let mut script = alone();
    script.digest = Box::new(|_| Some(Digest::NONE));
    script.connect(net.clone());
    protocol(&mut script, &net);
    let theirs = drbd_wire::packet::SyncParams {
        resync_rate: 250,
        verify_alg: "crc32c".into(),
        csums_alg: String::new(),
        controller: None,
    };
    script.peer(Stream::Data, 0, Packet::SyncParam(theirs), 0);
    script.peer(Stream::Data, 0, Packet::Sizes(sizes()), 0);
    script.peer(Stream::Data, 0, Packet::Uuids(uuids(CURRENT)), 0);
    script.peer(Stream::Data, 0, Packet::State(peer_state().pack()), 0);
    script
}

fn verify_s() -> Script {
    let mut script = verifying();
    script.begin(Command::Verify { volume: V0, start: None, stop: None });
    answer_pings(&mut script);
    script.peer(Stream::Meta, 0, Packet::StateChgReply(1), 0);
    script
}

fn verify_t() -> Script {
    let mut script = verifying();
    let (mask, val) = (StateWord(0x1f0), StateWord((Cstate::VerifyS as u32) << 4));
    script.peer(Stream::Data, 0, Packet::StateChgReq(mask, val), 0);
    script
}

fn ahead() -> Script {
    let net = NetConfig {
        protocol: Protocol::A,
        on_congestion: OnCongestion::PullAhead,
        congestion_fill: SectorCount(8),
        ..NetConfig::default()
    };
    let mut script = primary_with(net);
    write(&mut script, 8);
    write(&mut script, 64);
    script
}

fn behind() -> Script {
    let mut script = secondary();
    let state = Fields { conn: Cstate::Ahead, ..peer_connected() };
    script.peer(Stream::Data, 0, Packet::State(state.pack()), 0);
    script
}

fn diskless() -> Script {
    let mut script = without_disk(disk(&[]));
    script.command(Command::NewVolume { volume: V0, minor: drbd_types::Minor(0) });
    let net = NetConfig::default();
    script.connect(net.clone());
    greet(&mut script, &net, peer_state());
    script
}

/// Every packet that may follow the handshake, with the bytes of its data.
fn packets() -> Vec<(&'static str, Stream, Packet, u64)> {
    let unknown = BlockId::from_number(0x0000_0005_0000_0007);
    let acks = [
        ("RecvAck", AckKind::RecvAck, unknown),
        ("WriteAck", AckKind::WriteAck, unknown),
        ("RsWriteAck", AckKind::RsWriteAck, BlockId::SYNCER),
        ("RsWriteAck of a write", AckKind::RsWriteAck, unknown),
        ("Superseded", AckKind::Superseded, unknown),
        ("NegAck", AckKind::NegAck, unknown),
        ("NegAck of a resync", AckKind::NegAck, BlockId::SYNCER),
        ("NegDReply", AckKind::NegDataReply, unknown),
        ("NegRSDReply", AckKind::NegRsDataReply, BlockId::SYNCER),
        ("OVResult", AckKind::OvResult, BlockId::SYNCER),
        ("RsIsInSync", AckKind::RsIsInSync, BlockId::SYNCER),
        ("RsCancel", AckKind::RsCancel, BlockId::SYNCER),
        ("RetryWrite", AckKind::RetryWrite, unknown),
    ];
    let all = StateWord(3);
    let head = |sector| drbd_wire::packet::BlockRequest {
        sector: drbd_types::Sector(sector),
        id: BlockId::SYNCER,
        size: 4096,
        undefined: 0,
    };
    let net = NetConfig::default();
    let compressed = sent(&mut source()).pop().unwrap();
    let mut packets = vec![
        ("Data", data(8, 1), 4096),
        ("DataReply", Packet::DataReply(block(8, 0), Digest::NONE), 4096),
        ("RSDataReply", Packet::RsDataReply(block(16, 0), Digest::NONE), 4096),
        ("Trim", Packet::Trim(block(8, 1), 4096), 0),
        ("Zeroes", Packet::Zeroes(block(8, 1), 4096), 0),
        ("Barrier", barrier(0), 0),
        ("ReportBitMap", plain(&[1]), 0),
        ("ReportBitMap without bits", Packet::Bitmap(Box::default()), 0),
        ("CBitmap", compressed, 0),
        ("CBitmap that is broken", Packet::CompressedBitmap(Box::new([0x02, 0xff])), 0),
        ("UnplugRemote", Packet::UnplugRemote, 0),
        ("DataRequest", request(RequestKind::Data, 8, 4096), 0),
        ("RSDataRequest", request(RequestKind::Resync, 8, 4096), 0),
        ("RSThinReq", request(RequestKind::ThinResync, 8, 4096), 0),
        ("OVRequest", request(RequestKind::Verify, 8, 4096), 0),
        ("CsumRSRequest", Packet::CsumRequest(head(8), Digest::NONE), 0),
        ("OVReply", Packet::OvReply(head(16), Digest::NONE), 0),
        ("SyncParam", sync_param(), 0),
        ("ReportProtocol", Packet::Protocol(params(&net)), 0),
        ("ProtocolUpdate", Packet::ProtocolUpdate(params(&net)), 0),
        ("ReportUUIDs", Packet::Uuids(uuids(CURRENT)), 0),
        ("ReportSizes", Packet::Sizes(sizes()), 0),
        ("ReportState", Packet::State(peer_connected().pack()), 0),
        ("SyncUUID", Packet::SyncUuid(Gi(0x5000)), 0),
        ("StateChgRequest", Packet::StateChgReq(all, StateWord(2)), 0),
        ("ConnStChgRequest", Packet::ConnStChgReq(StateWord(0x1f0), StateWord(0x10)), 0),
        ("OutOfSync", Packet::OutOfSync(desc(80, 4096)), 0),
        ("RsDeallocated", Packet::RsDeallocated(desc(16, 4096)), 0),
        ("DelayProbe", Packet::DelayProbe(1, 2), 0),
    ]
    .into_iter()
    .map(|(name, packet, len)| (name, Stream::Data, packet, len))
    .collect::<Vec<_>>();
    let meta = [
        ("Ping", Packet::Ping),
        ("PingAck", Packet::PingAck),
        ("BarrierAck", barrier_ack(99, 1)),
        ("StateChgReply", Packet::StateChgReply(1)),
        ("ConnStChgReply", Packet::ConnStChgReply(1)),
    ];
    packets.extend(meta.map(|(name, packet)| (name, Stream::Meta, packet, 0)));
    packets.extend(acks.map(|(name, kind, id)| (name, Stream::Meta, ack(kind, 8, id), 0)));
    packets
}

/// What a packet does: `x` it ends the connection, `a` it is answered, `.` nothing is to be seen,
/// `-` there is no connection.
fn effect(name: &str, make: fn() -> Script, stream: Stream, packet: Packet, len: u64) -> char {
    let mut script = make();
    let was_up = script.is_up;
    script.is_reachable = false;
    script.sent.clear();
    script.peer(stream, 0, packet, len);
    let effect = match (was_up, script.is_up, script.sent.is_empty()) {
        (false, ..) => '-',
        (true, false, _) => 'x',
        (true, true, false) => 'a',
        (true, true, true) => '.',
    };
    let state = script.state(0);
    script.lose(Stream::Data, StreamLoss::Reset);
    script.lose(Stream::Meta, StreamLoss::Reset);
    script.pass(1_000_000);
    let waits = script.engine.waits();
    assert!(
        matches!(conn(&script), Cstate::StandAlone | Cstate::WFConnection),
        "{name} in {state:?}: {waits:#?}"
    );
    assert_eq!(script.buffers(), 0, "{name} in {state:?}: {waits:#?}");
    assert_eq!(script.engine.audit(), Vec::<String>::new(), "{name} in {state:?}");
    assert!(state.disk != Dstate::Failed, "{name}: {state:?}");
    effect
}

#[test]
fn every_state_is_reached() {
    for (state, make) in STATES {
        let script = make();
        assert_eq!(script.state(0).conn, state, "{:?}", script.log);
    }
}

#[test]
fn every_packet_in_every_state() {
    let mut found = String::new();
    for (name, stream, packet, len) in packets() {
        let row: String = STATES
            .iter()
            .map(|(_, make)| effect(name, *make, stream, packet.clone(), len))
            .collect();
        writeln!(found, "{row} {name}").unwrap();
    }
    assert_eq!(found.trim(), TABLE.trim(), "\n{found}");
}

/// Columns: StandAlone, WFConnection, WFReportParams, Connected, WFBitMapS, WFBitMapT, WFSyncUUID,
/// SyncSource, SyncTarget, VerifyS, VerifyT, PausedSyncS, PausedSyncT, Ahead, Behind, Connected
/// without a disk.
const TABLE: &str = "
--.aaaaaaaaaaaaa Data
--xxxxxxxxxxxxxx DataReply
--xxxxxxxxxxxxxx RSDataReply
--.aaaaaaaaaaaaa Trim
--.aaaaaaaaaaaaa Zeroes
--.............. Barrier
--.............. ReportBitMap
--xxxxxxxxxxxxx. ReportBitMap without bits
--..aa.......... CBitmap
--xxxxxxxxxxxxx. CBitmap that is broken
--.............. UnplugRemote
--aaaaaaaaaaaaaa DataRequest
--aaaaaaaaaaa.aa RSDataRequest
--aaaaaaaaaaa.aa RSThinReq
--aaaaaaaaaaa.aa OVRequest
--aaaaaaaaaaa.aa CsumRSRequest
--...aa.aa..a.aa OVReply
--.............. SyncParam
--...........x.. ReportProtocol
--.............. ProtocolUpdate
--.............. ReportUUIDs
--.............. ReportSizes
--a.......a..... ReportState
--....a.......a. SyncUUID
--aaaaaaaaaaaaaa StateChgRequest
--axxxxxxxxxxxxx ConnStChgRequest
--.............. OutOfSync
--xxxxxxxxxxxxxx RsDeallocated
--.............. DelayProbe
--aaaaaaaaaaaaaa Ping
--.............. PingAck
--xxxxxxxxxxxxxx BarrierAck
--.............. StateChgReply
--.............. ConnStChgReply
--xxxxxxxxxxxxxx RecvAck
--xxxxxxxxxxxxxx WriteAck
--.............. RsWriteAck
--xxxxxxxxxxxxxx RsWriteAck of a write
--xxxxxxxxxxxxxx Superseded
--.............. NegAck
--.............. NegAck of a resync
--xxxxxxxxxxxxxx NegDReply
--......a...a... NegRSDReply
--.............. OVResult
--......a...a... RsIsInSync
--.............. RsCancel
--xxxxxxxxxxxxxx RetryWrite
";
