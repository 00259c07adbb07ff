//! Packets that must not come: unknown volumes, places outside of the device, wrong lengths, the
//! wrong time. Spec: io-path §13.5; wire §4.2, §16.

use super::rig::*;
use drbd_core::config::NetConfig;
use drbd_core::event::StreamLoss;
use drbd_types::{Cstate, Dstate, Fields, Gi, StateWord};
use drbd_wire::packet::{AckKind, BlockId, RequestKind};
use drbd_wire::{Digest, Packet, PeerError, Stream};

/// Packets of the data stream that belong to a volume, with the bytes of their data.
fn for_volumes() -> Vec<(Packet, u64)> {
    vec![
        (data(8, 1), 4096),
        (Packet::Trim(block(8, 1), 4096), 0),
        (Packet::Zeroes(block(8, 1), 4096), 0),
        (Packet::DataReply(block(8, 0), Digest::NONE), 4096),
        (Packet::RsDataReply(block(8, 0), Digest::NONE), 4096),
        (Packet::RsDeallocated(desc(8, 4096)), 0),
        (request(RequestKind::Data, 8, 4096), 0),
        (request(RequestKind::Resync, 8, 4096), 0),
        (request(RequestKind::ThinResync, 8, 4096), 0),
        (request(RequestKind::Verify, 8, 4096), 0),
        (Packet::OutOfSync(desc(8, 4096)), 0),
        (Packet::Bitmap(Box::default()), 0),
        (Packet::CompressedBitmap(Box::new([2])), 0),
        (Packet::SyncUuid(Gi(6)), 0),
        (Packet::StateChgReq(StateWord(3), StateWord(1)), 0),
    ]
}

#[test]
fn an_unknown_volume_ends_the_connection() {
    for (packet, len) in for_volumes() {
        let mut script = secondary();
        script.is_reachable = false;
        let text = format!("{packet:?}");
        script.peer(Stream::Data, 5, packet, len);
        assert!(!script.is_up, "{text}");
        assert!(script.has_logged("error receiving"), "{text}: {:?}", script.log);
        assert_clean(&script);
    }
}

#[test]
fn parameters_of_an_unknown_volume_are_ignored() {
    for packet in [
        sync_param(),
        Packet::Sizes(sizes()),
        Packet::Uuids(uuids(CURRENT)),
        Packet::State(peer_connected().pack()),
    ] {
        let mut script = connected();
        script.peer(Stream::Data, 5, packet, 0);
        assert!(script.is_up && script.has_logged("which is not configured locally"));
    }
}

#[test]
fn a_place_outside_of_the_device_ends_the_connection() {
    let beyond = SECTORS - 4;
    for (packet, len) in [
        (data(beyond, 1), 4096),
        (data(u64::MAX - 3, 1), 4096),
        (Packet::Trim(block(beyond, 1), 4096), 0),
        (Packet::Zeroes(block(beyond, 1), 4096), 0),
        (request(RequestKind::Data, beyond, 4096), 0),
        (request(RequestKind::Resync, u64::MAX, 4096), 0),
        (request(RequestKind::Verify, beyond, 4096), 0),
    ] {
        let mut script = secondary();
        script.is_reachable = false;
        let text = format!("{packet:?}");
        script.peer(Stream::Data, 0, packet, len);
        assert!(!script.is_up, "{text}");
        assert_clean(&script);
    }
}

#[test]
fn impossible_lengths_end_the_connection() {
    for packet in [
        Packet::Trim(block(8, 1), 100),
        Packet::Trim(block(8, 1), 0),
        Packet::Trim(block(8, 1), (128 << 20) + 512),
        Packet::Zeroes(block(8, 1), 513),
        request(RequestKind::Data, 8, 0),
        request(RequestKind::Data, 8, 4097),
        request(RequestKind::Data, 8, 2 << 20),
        request(RequestKind::Resync, 8, 2 << 20),
        Packet::OutOfSync(desc(8, 13)),
        Packet::Data(block(8, 1), Digest::NONE),
    ] {
        let mut script = secondary();
        script.is_reachable = false;
        let text = format!("{packet:?}");
        script.peer(Stream::Data, 0, packet, 0);
        assert!(!script.is_up, "{text}");
        assert_clean(&script);
    }
}

#[test]
fn data_that_nobody_asked_for_ends_the_connection() {
    for packet in [
        Packet::DataReply(block(8, 0), Digest::NONE),
        Packet::RsDataReply(block(8, 0), Digest::NONE),
    ] {
        let mut script = secondary();
        script.is_reachable = false;
        script.peer(Stream::Data, 0, packet, 4096);
        assert!(!script.is_up);
        assert_clean(&script);
    }
}

#[test]
fn a_bitmap_at_the_wrong_time_is_said() {
    let mut script = secondary();
    script.peer(Stream::Data, 0, Packet::CompressedBitmap(Box::new([0x02, 0xff])), 0);
    let is_told = script.has_logged("receive_bitmap") || !script.is_up;
    assert!(is_told, "{:?}", script.log);
}

#[test]
fn a_sync_uuid_at_the_wrong_time_is_ignored_when_it_can_not_come_true() {
    let mut script = connected();
    script.is_reachable = false;
    script.peer(Stream::Data, 0, Packet::SyncUuid(Gi(0x5000)), 0);
    // The receiver waits until the state fits; the end of the connection ends that.
    script.lose(Stream::Data, StreamLoss::Reset);
    assert!(!script.is_up);
    assert_eq!(conn(&script), Cstate::WFConnection, "{:?}", script.engine.waits());
}

#[test]
fn resync_acks_without_a_resync_do_no_harm() {
    for kind in [
        AckKind::RsWriteAck,
        AckKind::RsIsInSync,
        AckKind::RsCancel,
        AckKind::NegRsDataReply,
        AckKind::OvResult,
        AckKind::NegAck,
    ] {
        let mut script = connected();
        script.peer(Stream::Meta, 0, ack(kind, u64::MAX - 1, BlockId::SYNCER), 0);
        script.peer(Stream::Meta, 0, ack(kind, 8, BlockId::SYNCER), 0);
        assert!(script.is_up, "{kind:?}");
        assert_clean(&script);
    }
}

#[test]
fn replies_that_nobody_waits_for_do_no_harm() {
    let mut script = connected();
    script.peer(Stream::Meta, 0, Packet::StateChgReply(1), 0);
    script.peer(Stream::Meta, 0, Packet::ConnStChgReply(-10), 0);
    script.peer(Stream::Meta, 0, Packet::PingAck, 0);
    script.peer(Stream::Data, 0, Packet::UnplugRemote, 0);
    script.peer(Stream::Data, 0, Packet::DelayProbe(1, 2), 0);
    assert!(script.is_up);
}

#[test]
fn settings_that_differ_end_the_connection_for_good() {
    let own = NetConfig::default();
    let other = [
        ("protocol", NetConfig { protocol: drbd_core::config::Protocol::A, ..own.clone() }),
        ("allow-two-primaries", NetConfig { two_primaries: true, ..own.clone() }),
        ("data-integrity-alg", NetConfig { integrity_alg: "md5".into(), ..own.clone() }),
    ];
    for (name, theirs) in other {
        let mut script = alone();
        script.connect(own.clone());
        protocol(&mut script, &theirs);
        assert_dropped(&script, &format!("incompatible {name} settings"));
        assert_eq!(conn(&script), Cstate::StandAlone);
    }
}

#[test]
fn a_split_brain_is_refused() {
    let mut script = alone();
    let net = NetConfig::default();
    script.connect(net.clone());
    protocol(&mut script, &net);
    script.peer(Stream::Data, 0, sync_param(), 0);
    script.peer(Stream::Data, 0, Packet::Sizes(sizes()), 0);
    script.peer(Stream::Data, 0, Packet::Uuids(uuids(0x9999_0000)), 0);
    script.peer(Stream::Data, 0, Packet::State(peer_state().pack()), 0);
    assert_dropped(&script, "Split-Brain detected but unresolved, dropping connection!");
    assert_eq!(conn(&script), Cstate::StandAlone);
}

#[test]
fn an_impossible_state_word_ends_the_connection() {
    let mut script = connected();
    script.is_reachable = false;
    script.peer(Stream::Data, 0, Packet::State(StateWord(u32::MAX)), 0);
    assert_dropped(&script, "error receiving");
}

#[test]
fn a_smaller_peer_disk_is_refused() {
    let mut script = alone();
    let net = NetConfig::default();
    script.connect(net.clone());
    protocol(&mut script, &net);
    let small = drbd_wire::packet::Sizes {
        d_size: drbd_types::SectorCount(800),
        c_size: drbd_types::SectorCount(800),
        ..sizes()
    };
    script.peer(Stream::Data, 0, Packet::Sizes(small), 0);
    assert!(!script.is_up && conn(&script) == Cstate::StandAlone, "{:?}", script.log);
}

/// What the reader refuses ends the connection in the way of its stream.
#[test]
fn broken_streams_end_the_connection() {
    let bad = || StreamLoss::Bad { error: PeerError::Padding };
    for (stream, how, text) in [
        (Stream::Data, bad(), "Header padding is not zero"),
        (Stream::Meta, bad(), "Header padding is not zero"),
        (Stream::Data, StreamLoss::Closed, "sock was shut down by peer"),
        (Stream::Meta, StreamLoss::Closed, "meta connection shut down by peer."),
        (Stream::Data, StreamLoss::Reset, "sock was reset by peer"),
        (Stream::Data, StreamLoss::ReceiveFailed(110), "sock_recvmsg returned -110"),
        (Stream::Data, StreamLoss::SendFailed(32), "sock_sendmsg returned -32"),
    ] {
        let mut script = secondary();
        script.is_reachable = false;
        script.holds = true;
        script.peer(Stream::Data, 0, data(8, 1), 4096);
        script.lose(stream, how);
        script.holds = false;
        script.answer_all();
        assert_dropped(&script, text);
        assert_eq!(conn(&script), Cstate::WFConnection);
        assert_clean(&script);
    }
}

#[test]
fn packets_without_a_connection_are_dropped() {
    let mut script = alone();
    for (packet, len) in for_volumes() {
        script.peer(Stream::Data, 0, packet, len);
    }
    script.peer(Stream::Meta, 0, Packet::Ping, 0);
    assert_eq!(script.sent.len(), 0);
    assert_clean(&script);
}

#[test]
fn a_request_to_become_primary_beside_a_primary_is_refused() {
    let mut script = primary();
    script.peer(Stream::Data, 0, Packet::StateChgReq(StateWord(3), StateWord(1)), 0);
    assert_eq!(sent(&mut script), [Packet::StateChgReply(-1)]);
}

#[test]
fn a_request_to_disconnect_is_granted() {
    let mut script = connected();
    script.is_reachable = false;
    let (mask, val) = (StateWord(0x1f0), StateWord(0x10));
    script.peer(Stream::Data, 0, Packet::ConnStChgReq(mask, val), 0);
    assert_eq!(sent(&mut script), [Packet::ConnStChgReply(1)]);
    script.lose(Stream::Data, StreamLoss::Closed);
    assert_eq!(conn(&script), Cstate::WFConnection, "it tries again");
}

#[test]
fn garbage_in_a_state_request_is_refused() {
    let mut script = connected();
    let all = StateWord(u32::MAX);
    script.peer(Stream::Data, 0, Packet::StateChgReq(all, all), 0);
    let sent = sent(&mut script);
    assert!(matches!(sent[..], [Packet::StateChgReply(code)] if code < 1), "{sent:?}");
}

#[test]
fn the_peer_may_lose_its_disk() {
    let mut script = primary();
    let state = Fields { disk: Dstate::Failed, ..peer_connected() };
    script.peer(Stream::Data, 0, Packet::State(state.pack()), 0);
    assert_eq!(script.state(0).pdsk, Dstate::Failed);
    write(&mut script, 8);
    assert!(script.is_up);
}

/// It would stay behind when the connection ends, which then could not end.
#[test]
fn a_volume_is_not_taken_out_of_the_connection() {
    for conn_number in 0..9_u32 {
        let mut script = connected();
        script.is_reachable = false;
        let (mask, val) = (StateWord(0x1f0), StateWord(conn_number << 4));
        script.peer(Stream::Data, 0, Packet::StateChgReq(mask, val), 0);
        let sent = sent(&mut script);
        assert!(matches!(sent[..], [Packet::StateChgReply(code)] if code < 1), "{sent:?}");
        script.lose(Stream::Data, StreamLoss::Reset);
        assert_eq!(conn(&script), Cstate::WFConnection);
    }
}

#[test]
fn a_connection_is_not_put_into_another_state() {
    for number in (0..32_u32).filter(|n| *n != 1) {
        let mut script = connected();
        script.is_reachable = false;
        let (mask, val) = (StateWord(0x1f0), StateWord(number << 4));
        script.peer(Stream::Data, 0, Packet::ConnStChgReq(mask, val), 0);
        script.lose(Stream::Data, StreamLoss::Reset);
        assert_eq!(conn(&script), Cstate::WFConnection, "{number}: {:#?}", script.engine.waits());
    }
}
