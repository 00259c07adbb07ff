//! What packets that come late, and commands during a handshake, must not do.

use std::collections::BTreeMap;

use drbd_core::admin::Command;
use drbd_core::config::{DiskConfig, NetConfig};
use drbd_sim::script::{Script, ScriptDisk};
use drbd_types::{
    ByteLen, Cstate, Dstate, Fields, Gi, Minor, Refusal, Role, SectorCount, VolumeNr,
};
use drbd_wire::packet::{ProtocolParams, QueueLimits, Sizes, Uuids};
use drbd_wire::{Packet, Stream};
use drbdmeta::superblock::Flags;

const SECTORS: u64 = 8192;
const OLD: Gi = Gi(0xB0);
const NEW: Gi = Gi(0xA0);
const VOLUME: VolumeNr = VolumeNr(0);

/// A node whose disk has good data of this generation.
fn node(current: Gi, bitmap: Gi, bits: &[u64]) -> Script {
    let disk = ScriptDisk::new(
        SECTORS,
        |superblock| {
            superblock.la_size = SectorCount(SECTORS);
            superblock.current = current;
            superblock.bitmap = bitmap;
            superblock.flags |= Flags::CONSISTENT | Flags::WAS_UP_TO_DATE;
        },
        bits.iter().copied(),
    );
    Script::new(BTreeMap::from([(0, disk)]))
}

/// What the peer says first, with its generation.
fn peer_speaks(script: &mut Script, current: Gi, bitmap: Gi, state: Fields) {
    let protocol = Packet::Protocol(ProtocolParams {
        protocol: 3,
        after_sb: [0; 3],
        discard_my_data: false,
        dry_run: false,
        two_primaries: 0,
        integrity_alg: String::new(),
    });
    let sizes = Packet::Sizes(Sizes {
        d_size: SectorCount(SECTORS),
        u_size: SectorCount(0),
        c_size: SectorCount(SECTORS),
        max_bio_size: ByteLen(1 << 20),
        queue_order_type: 0,
        dds_flags: 0,
        limits: Some(QueueLimits {
            physical_block: 512,
            logical_block: 512,
            ..QueueLimits::default()
        }),
    });
    script.peer(Stream::Data, 0, protocol, 0);
    script.peer(Stream::Data, 0, sizes, 0);
    peer_state(script, current, bitmap, state);
}

fn peer_state(script: &mut Script, current: Gi, bitmap: Gi, state: Fields) {
    let uuids = Uuids { current, bitmap, history: [Gi(0); 2], dirty_bits: 1, flags: 0 };
    script.peer(Stream::Data, 0, Packet::Uuids(uuids), 0);
    script.peer(Stream::Data, 0, Packet::State(state.pack()), 0);
}

/// The peer's state as it tells it.
fn peer_fields(role: Role, conn: Cstate) -> Fields {
    Fields { role, conn, disk: Dstate::UpToDate, ..Fields::NEW }
}

#[test]
fn a_primary_keeps_its_disk_while_the_peer_lacks_its_writes() {
    let mut script = node(NEW, OLD, &[7]);
    script.attach(0, DiskConfig::default());
    assert_eq!(script.command(Command::Primary { volume: VOLUME, force: false }).code, 1);
    script.connect(NetConfig::default());
    let peer = peer_fields(Role::Secondary, Cstate::WFReportParams);
    peer_speaks(&mut script, OLD, Gi(0), peer);
    let state = script.state(0);
    assert_eq!((state.conn, state.pdsk), (Cstate::WFBitMapS, Dstate::Consistent), "{state:?}");
    let reply = script.command(Command::Detach { volume: VOLUME, force: false });
    assert_eq!(reply.code, Refusal::NoUpToDateDisk.number(), "{reply:?}");
    let state = script.state(0);
    assert_eq!((state.conn, state.disk), (Cstate::WFBitMapS, Dstate::UpToDate), "{state:?}");
}

#[test]
fn a_primary_that_asks_for_the_same_is_refused() {
    let mut script = node(OLD, Gi(0), &[]);
    script.attach(0, DiskConfig::default());
    script.connect(NetConfig::default());
    let peer = peer_fields(Role::Primary, Cstate::WFReportParams);
    peer_speaks(&mut script, NEW, OLD, peer);
    let state = script.state(0);
    assert_eq!((state.conn, state.disk), (Cstate::WFBitMapT, Dstate::Outdated), "{state:?}");
    let (mask, val) = (drbd_types::StateWord::DISK, drbd_types::StateWord(2 << 9));
    script.sent.clear();
    script.peer(Stream::Data, 0, Packet::StateChgReq(mask, val), 0);
    let refused = Packet::StateChgReply(Refusal::NoUpToDateDisk.number());
    assert!(script.sent.iter().any(|sent| sent.packet == refused), "{:?}", script.sent);
    assert_eq!(script.state(0).pdsk, Dstate::UpToDate);
}

#[test]
fn a_sync_uuid_for_the_disk_before_does_not_stop_an_attach() {
    let mut script = node(OLD, Gi(0), &[]);
    let reply = script.command(Command::NewVolume { volume: VOLUME, minor: Minor(0) });
    assert_eq!(reply.code, 1);
    script.connect(NetConfig::default());
    let peer = peer_fields(Role::Secondary, Cstate::WFReportParams);
    peer_speaks(&mut script, NEW, OLD, peer);
    assert_eq!(script.state(0).conn, Cstate::Connected, "{:?}", script.log);
    let config = Box::new(DiskConfig::default());
    script.begin(Command::Attach { volume: VOLUME, config });
    assert_eq!(script.state(0).disk, Dstate::Negotiating, "{:?}", script.log);
    script.peer(Stream::Data, 0, Packet::SyncUuid(Gi(0xC0)), 0);
    assert!(script.has_logged("Ignoring SyncUUID packet!"));
    // The peer's answer to the attach, behind it.
    peer_state(&mut script, NEW, OLD, peer_fields(Role::Secondary, Cstate::WFBitMapS));
    assert_eq!(script.state(0).conn, Cstate::WFBitMapT, "{:?}", script.log);
}
