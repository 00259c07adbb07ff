//! Nodes in the states that tests begin with, and short names for packets.

use std::collections::BTreeMap;

use drbd_core::admin::Command;
use drbd_core::config::{DiskConfig, NetConfig, Protocol};
use drbd_core::event::{AppOp, WriteFlags};
use drbd_core::ids::AppId;
use drbd_sim::script::{Script, ScriptDisk, Sent};
use drbd_types::{Cstate, Dstate, Fields, Gi, Role, Sector, SectorCount, SectorRange, VolumeNr};
use drbd_wire::packet::{
    AckKind, BarrierId, Block, BlockAck, BlockDesc, BlockId, BlockRequest, DpFlags, ProtocolParams,
    RequestKind, Sizes, SyncParams, Uuids,
};
use drbd_wire::{Digest, Packet, Stream};
use drbdmeta::superblock::Flags;

pub(crate) const SECTORS: u64 = 16_384;
pub(crate) const V0: VolumeNr = VolumeNr(0);
/// Current identifier of both nodes.
pub(crate) const CURRENT: u64 = 0x1111_0000;

/// A node with a clean disk, UpToDate, alone.
pub(crate) fn alone() -> Script {
    let mut script = without_disk(disk(&[]));
    script.attach(0, DiskConfig::default());
    script
}

pub(crate) fn without_disk(disk: ScriptDisk) -> Script {
    Script::new(BTreeMap::from([(0, disk)]))
}

/// A disk that is UpToDate, with these bits set.
pub(crate) fn disk(bits: &[u64]) -> ScriptDisk {
    sized_disk(SECTORS, bits)
}

pub(crate) fn sized_disk(sectors: u64, bits: &[u64]) -> ScriptDisk {
    let bits = bits.to_vec();
    ScriptDisk::new(
        sectors,
        |sb| {
            sb.la_size = SectorCount(sectors);
            sb.current = Gi(CURRENT);
            sb.flags |= Flags::CONSISTENT | Flags::WAS_UP_TO_DATE;
        },
        bits,
    )
}

/// Connected, both Secondary and UpToDate.
pub(crate) fn connected() -> Script {
    connected_with(NetConfig::default())
}

pub(crate) fn connected_with(net: NetConfig) -> Script {
    connect(alone(), &net)
}

pub(crate) fn connect(mut script: Script, net: &NetConfig) -> Script {
    script.connect(net.clone());
    greet(&mut script, net, peer_state());
    assert_eq!(script.state(0).conn, Cstate::Connected, "{:?}", script.log);
    script.sent.clear();
    script
}

/// The flags in the superblock on disk.
pub(crate) fn stored(script: &Script) -> Flags {
    let disk = &script.disks[&0];
    let at = drbdmeta::layout::Placement::FlexExternal
        .superblock(drbd_types::ByteLen(disk.meta_len))
        .unwrap();
    drbdmeta::superblock::Superblock::from_disk(&disk.blocks[&at.0][..]).unwrap().flags
}

/// The peer's packets of the handshake.
pub(crate) fn greet(script: &mut Script, net: &NetConfig, state: Fields) {
    protocol(script, net);
    script.peer(Stream::Data, 0, sync_param(), 0);
    script.peer(Stream::Data, 0, Packet::Sizes(sizes()), 0);
    script.peer(Stream::Data, 0, Packet::Uuids(uuids(CURRENT)), 0);
    script.peer(Stream::Data, 0, Packet::State(state.pack()), 0);
}

pub(crate) fn protocol(script: &mut Script, net: &NetConfig) {
    script.peer(Stream::Data, 0, Packet::Protocol(params(net)), 0);
}

pub(crate) fn params(net: &NetConfig) -> ProtocolParams {
    ProtocolParams {
        protocol: net.protocol.number(),
        after_sb: net.after_sb.numbers(),
        discard_my_data: false,
        dry_run: false,
        two_primaries: u32::from(net.two_primaries),
        integrity_alg: net.integrity_alg.clone(),
    }
}

pub(crate) fn sync_param() -> Packet {
    Packet::SyncParam(SyncParams {
        resync_rate: 250,
        verify_alg: String::new(),
        csums_alg: String::new(),
        controller: None,
    })
}

pub(crate) fn sizes() -> Sizes {
    Sizes {
        d_size: SectorCount(SECTORS),
        u_size: SectorCount(0),
        c_size: SectorCount(SECTORS),
        max_bio_size: drbd_types::ByteLen(1 << 20),
        queue_order_type: 0,
        dds_flags: 0,
        limits: None,
    }
}

pub(crate) fn uuids(current: u64) -> Uuids {
    Uuids { current: Gi(current), bitmap: Gi(0), history: [Gi(0); 2], dirty_bits: 0, flags: 0 }
}

/// The peer's first state: Secondary, UpToDate.
pub(crate) fn peer_state() -> Fields {
    Fields { conn: Cstate::WFConnection, disk: Dstate::UpToDate, ..Fields::NEW }
}

/// The peer as it is when connected.
pub(crate) fn peer_connected() -> Fields {
    Fields {
        conn: Cstate::Connected,
        disk: Dstate::UpToDate,
        pdsk: Dstate::UpToDate,
        peer: Role::Secondary,
        ..Fields::NEW
    }
}

/// Connected; this node is Primary and the peer has agreed.
pub(crate) fn primary_with(net: NetConfig) -> Script {
    promote(connected_with(net))
}

pub(crate) fn promote(mut script: Script) -> Script {
    let ticket = script.begin(Command::Primary { volume: V0, force: false });
    answer_pings(&mut script);
    assert!(script.sent.iter().any(|s| matches!(s.packet, Packet::StateChgReq(..))));
    script.peer(Stream::Meta, 0, Packet::StateChgReply(1), 0);
    assert_eq!(script.replies[&ticket.0].code, 1, "{:?}", script.log);
    script.sent.clear();
    script
}

pub(crate) fn primary() -> Script {
    primary_with(NetConfig::default())
}

/// Connected; the peer has become Primary.
pub(crate) fn secondary() -> Script {
    secondary_with(NetConfig::default())
}

pub(crate) fn secondary_with(net: NetConfig) -> Script {
    let mut script = connected_with(net);
    let state = Fields { role: Role::Primary, ..peer_connected() };
    script.peer(Stream::Data, 0, Packet::State(state.pack()), 0);
    assert_eq!(script.state(0).peer, Role::Primary);
    script.sent.clear();
    script
}

pub(crate) fn net(protocol: Protocol) -> NetConfig {
    NetConfig { protocol, ..NetConfig::default() }
}

pub(crate) fn answer_pings(script: &mut Script) {
    while let Some(at) = script.sent.iter().position(|s| s.packet == Packet::Ping) {
        script.sent.remove(at);
        script.peer(Stream::Meta, 0, Packet::PingAck, 0);
    }
}

pub(crate) fn range(sector: u64, sectors: u64) -> SectorRange {
    SectorRange { start: Sector(sector), len: SectorCount(sectors) }
}

/// Writes 4 KiB.
pub(crate) fn write(script: &mut Script, sector: u64) -> AppId {
    script.app(V0, |script| AppOp::Write {
        range: range(sector, 8),
        buf: script.buf(4096),
        flags: WriteFlags::default(),
    })
}

pub(crate) fn read(script: &mut Script, sector: u64) -> AppId {
    script.app(V0, |script| AppOp::Read { range: range(sector, 8), buf: script.buf(4096) })
}

/// Everything that was sent, without pings.
pub(crate) fn sent(script: &mut Script) -> Vec<Packet> {
    let all: Vec<Sent> = script.sent.drain(..).collect();
    all.into_iter().map(|s| s.packet).filter(|p| *p != Packet::Ping).collect()
}

pub(crate) fn id_of(packet: &Packet) -> BlockId {
    match packet {
        Packet::Data(block, _) | Packet::Trim(block, _) | Packet::Zeroes(block, _) => block.id,
        Packet::Request(_, request) => request.id,
        other => panic!("{other:?} has no handle"),
    }
}

pub(crate) fn ack(kind: AckKind, sector: u64, id: BlockId) -> Packet {
    Packet::Ack(kind, BlockAck { sector: Sector(sector), id, size: 4096, seq: 1 })
}

pub(crate) fn block(sector: u64, seq: u32) -> Block {
    Block {
        sector: Sector(sector),
        id: BlockId::from_number(77),
        seq,
        flags: DpFlags::SEND_WRITE_ACK,
    }
}

pub(crate) fn data(sector: u64, seq: u32) -> Packet {
    Packet::Data(block(sector, seq), Digest::NONE)
}

pub(crate) fn request(kind: RequestKind, sector: u64, size: u32) -> Packet {
    let id = BlockId::SYNCER;
    Packet::Request(kind, BlockRequest { sector: Sector(sector), id, size, undefined: 0 })
}

pub(crate) fn desc(sector: u64, size: u32) -> BlockDesc {
    BlockDesc { sector: Sector(sector), size, undefined: 0 }
}

pub(crate) fn barrier(number: u32) -> Packet {
    Packet::Barrier(BarrierId::from_number(number))
}

pub(crate) fn barrier_ack(number: u32, count: u32) -> Packet {
    Packet::BarrierAck(BarrierId::from_number(number), count)
}

pub(crate) fn conn(script: &Script) -> Cstate {
    script.engine.status().conn
}

/// The connection was given up, with this line in the log.
pub(crate) fn assert_dropped(script: &Script, text: &str) {
    assert!(!script.is_up, "still up: {:?}", script.state(0));
    assert!(script.has_logged(text), "{text} is not in {:#?}", script.log);
}

/// Nothing is lent or unanswered.
pub(crate) fn assert_clean(script: &Script) {
    assert_eq!((script.buffers(), script.unanswered()), (0, 0), "{:#?}", script.engine.waits());
    assert_eq!(script.engine.audit(), Vec::<String>::new());
}
