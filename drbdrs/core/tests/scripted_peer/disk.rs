//! Attach and what it leaves.

use std::collections::BTreeSet;

use super::rig::*;
use drbd_core::action::DiskOp;
use drbd_core::admin::Command;
use drbd_core::config::{DiskConfig, NetConfig, OnIoError};
use drbd_core::event::{AppOp, IoFailure};
use drbd_core::ids::BufId;
use drbd_sim::script::{Held, Script, ScriptDisk};
use drbd_types::{Cstate, Dstate, Fields, Gi, Minor, Role, VolumeNr};
use drbd_wire::packet::{AckKind, RequestKind};
use drbd_wire::{Packet, Stream};
use drbdmeta::superblock::Flags;

/// Pages of the bitmap that are entirely zero are not delivered by the shell: they must not stay as
/// setting the size has left them.
#[test]
fn a_clean_disk_attaches_clean() {
    let script = alone();
    assert_eq!(script.state(0).disk, Dstate::UpToDate);
    assert_eq!(script.volume(0).unwrap().out_of_sync_bits, 0);
}

#[test]
fn bits_on_disk_are_found_at_attach() {
    let mut script = without_disk(disk(&[3, 17, 2047]));
    script.attach(0, Default::default());
    assert_eq!(script.volume(0).unwrap().out_of_sync_bits, 3);
}

#[test]
fn a_write_to_no_volume_gives_its_buffer_back() {
    let mut script = alone();
    let id = script.app(VolumeNr(9), |script| {
        let buf: BufId = script.buf(4096);
        AppOp::Write { range: range(0, 8), buf, flags: Default::default() }
    });
    assert!(script.completed[&id.0].is_err());
    assert_clean(&script);
}

#[test]
fn a_secondary_does_not_write() {
    let mut script = alone();
    let id = write(&mut script, 0);
    assert_eq!(script.completed[&id.0], Err(drbd_core::action::AppError::ReadOnly));
    assert_clean(&script);
}

/// Its writes belong to a generation of their own, or a disk that it attaches later would pass for
/// equal.
#[test]
fn a_disk_that_comes_to_a_diskless_primary_begins_a_generation() {
    let mut script = without_disk(disk(&[]));
    script.command(Command::NewVolume { volume: V0, minor: Minor(0) });
    let net = NetConfig::default();
    script.connect(net.clone());
    let state = Fields { role: Role::Primary, disk: Dstate::Diskless, ..peer_state() };
    greet(&mut script, &net, state);
    assert_eq!(script.state(0).conn, Cstate::Connected, "{:?}", script.log);
    script.begin(Command::Attach { volume: V0, config: Box::default() });
    let crossing = Fields { pdsk: Dstate::Diskless, conn: Cstate::Connected, ..state };
    script.peer(Stream::Data, 0, Packet::State(crossing.pack()), 0);
    assert_eq!(script.state(0).disk, Dstate::Negotiating, "{:?}", script.log);
    assert!(!script.has_logged("new current UUID"));
    let state = Fields { pdsk: Dstate::UpToDate, conn: Cstate::Connected, ..state };
    script.peer(Stream::Data, 0, Packet::State(state.pack()), 0);
    assert_eq!(script.state(0).disk, Dstate::UpToDate, "{:?}", script.log);
    assert!(script.has_logged("new current UUID"), "{:?}", script.log);
}

/// After a crash nobody looks at an extent that is not hot: what was written there must be stable.
#[test]
fn the_disk_is_flushed_before_an_extent_stops_being_hot() {
    let mut script = without_disk(sized_disk(80 * 8192, &[]));
    script.attach(0, DiskConfig { al_extents: 67, ..Default::default() });
    script.command(Command::Primary { volume: V0, force: false });
    for extent in 0..67 {
        write(&mut script, extent * 8192);
    }
    script.holds = true;
    write(&mut script, 67 * 8192);
    let is_flush = |held: &Held| matches!(held, Held::Disk(_, _, DiskOp::Flush));
    while let Some(other) = script.held.iter().position(|held| !is_flush(held)) {
        script.answer(other, None);
    }
    assert_eq!(script.held.len(), 1, "the flush: {:?}", script.held);
    script.answer(0, None);
    assert!(matches!(script.held[..], [Held::Meta(..)]), "the transaction: {:?}", script.held);
}

/// The original takes an Inconsistent disk for UpToDate then, since it is connected.
#[test]
fn to_be_outdated_makes_no_disk_better() {
    let mut script = without_disk(disk(&[]));
    script.attach(0, DiskConfig { on_io_error: OnIoError::PassOn, ..Default::default() });
    let mut script = connect(script, &NetConfig::default());
    script.holds = true;
    script.peer(Stream::Data, 0, data(8, 1), 4096);
    script.answer(0, Some(IoFailure::Device(5)));
    script.holds = false;
    script.answer_all();
    assert_eq!(script.state(0).disk, Dstate::Inconsistent, "{:?}", script.log);
    script.command(Command::Outdate(V0));
    assert_eq!(script.state(0).disk, Dstate::Inconsistent, "{:?}", script.log);
}

/// The peer has it, this disk does not: until the epoch of the write is acknowledged, and after it,
/// the peer has to be asked.
#[test]
fn what_the_own_disk_refused_is_read_from_the_peer_at_once() {
    for is_zeroes in [false, true] {
        let mut script = without_disk(disk(&[]));
        script.attach(0, DiskConfig { on_io_error: OnIoError::PassOn, ..Default::default() });
        let mut script = promote(connect(script, &NetConfig::default()));
        script.holds = true;
        let id = if is_zeroes {
            let op = AppOp::WriteZeroes { range: range(8, 8), may_unmap: false };
            script.app(V0, |_| op)
        } else {
            write(&mut script, 8)
        };
        while matches!(script.held[..], [Held::Meta(..)]) {
            script.answer(0, None);
        }
        let packet = sent(&mut script).remove(0);
        script.answer(0, Some(IoFailure::Device(5)));
        script.peer(Stream::Meta, 0, ack(AckKind::WriteAck, 8, id_of(&packet)), 0);
        assert_eq!(script.completed[&id.0], Ok(()), "one copy is there");
        assert_eq!(script.state(0).disk, Dstate::Inconsistent, "{:?}", script.log);
        sent(&mut script);
        read(&mut script, 8);
        let asked = sent(&mut script);
        assert!(
            matches!(asked[..], [Packet::Request(RequestKind::Data, _)]),
            "{is_zeroes}: {asked:?} {:?}",
            script.held
        );
        read(&mut script, 64);
        assert!(sent(&mut script).is_empty(), "what is good here is read here");
    }
}

/// The original takes it for UpToDate then, whatever the peer has got meanwhile.
#[test]
fn a_disk_that_is_being_attached_is_not_outdated() {
    let mut script = without_disk(disk(&[]));
    script.command(Command::NewVolume { volume: V0, minor: Minor(0) });
    let net = NetConfig::default();
    script.connect(net.clone());
    greet(&mut script, &net, peer_state());
    script.begin(Command::Attach { volume: V0, config: Box::default() });
    assert_eq!(script.state(0).disk, Dstate::Negotiating, "{:?}", script.log);
    script.begin(Command::Outdate(V0));
    assert_eq!(script.state(0).disk, Dstate::Negotiating, "{:?}", script.log);
}

/// Only the peer has acknowledged a write when the own disk failed, and this could not be recorded.
#[test]
fn a_disk_that_lacks_a_completed_write_comes_back_inconsistent() {
    let mut script = promote(connect(alone(), &NetConfig::default()));
    script.holds = true;
    let id = write(&mut script, 8);
    while matches!(script.held[..], [Held::Meta(..)]) {
        script.answer(0, None);
    }
    let packet = sent(&mut script).remove(0);
    let kept = script.disks[&0].blocks.clone();
    script.answer(0, Some(IoFailure::Device(5)));
    script.peer(Stream::Meta, 0, ack(AckKind::WriteAck, 8, id_of(&packet)), 0);
    assert_eq!(script.completed[&id.0], Ok(()), "{:?}", script.log);
    script.holds = false;
    script.answer_all();
    script.is_reachable = false;
    script.lose(Stream::Data, drbd_core::event::StreamLoss::Reset);
    script.disks.get_mut(&0).unwrap().blocks = kept;
    script.disks.get_mut(&0).unwrap().apply_al();
    script.command(Command::Attach { volume: V0, config: Box::default() });
    assert_eq!(script.state(0).disk, Dstate::Inconsistent, "{:?}", script.log);
}

/// What the peer says of itself when it has just connected is older than the news that both disks
/// are UpToDate.
#[test]
fn skipping_the_initial_sync_waits_for_the_first_report_of_the_peer() {
    let mut script = without_disk(ScriptDisk::fresh(SECTORS));
    script.attach(0, DiskConfig::default());
    let net = NetConfig::default();
    script.connect(net.clone());
    protocol(&mut script, &net);
    let state = Fields { disk: Dstate::Inconsistent, ..peer_state() };
    for packet in [
        sync_param(),
        Packet::Sizes(sizes()),
        Packet::Uuids(uuids(Gi::JUST_CREATED.0)),
        Packet::State(state.pack()),
    ] {
        script.peer(Stream::Data, 0, packet, 0);
    }
    let ticket = script.begin(Command::NewCurrentUuid { volume: V0, clear_bitmap: true });
    let report = Fields { disk: Dstate::Inconsistent, ..peer_connected() };
    script.peer(Stream::Data, 0, Packet::State(report.pack()), 0);
    assert_eq!(script.replies[&ticket.0].code, 1, "{:?}", script.log);
    let state = script.state(0);
    assert_eq!((state.disk, state.pdsk), (Dstate::UpToDate, Dstate::UpToDate));
}

/// After each answer power could be cut: whatever the disk was given to write is marked then, by the
/// bitmap, the activity log, or because all is taken for different.
fn answer_all_with_cuts(script: &mut Script, given: &mut BTreeSet<u64>) {
    while !script.held.is_empty() {
        given.extend(script.held.iter().filter_map(|held| match held {
            Held::Disk(_, _, DiskOp::Write { range, .. }) => Some(range.start.0 / 8),
            _ => None,
        }));
        let mut disk = script.disks[&0].clone();
        disk.apply_al();
        let mut after = without_disk(disk);
        after.attach(0, DiskConfig::default());
        for block in &*given {
            assert_eq!(after.engine.is_dirty(0, *block), Some(true), "{block}: {:?}", script.held);
        }
        script.answer(0, None);
    }
}

#[test]
fn al_updates_may_change_while_the_device_is_in_use() {
    let mut script = without_disk(sized_disk(80 * 8192, &[]));
    script.attach(0, DiskConfig::default());
    script.command(Command::Primary { volume: V0, force: false });
    script.holds = true;
    let mut given = BTreeSet::new();
    let mut extent = 0;
    for al_updates in [false, true, false, true] {
        let before = write(&mut script, extent * 8192);
        let config = DiskConfig { al_updates, ..Default::default() };
        let ticket = script.begin(Command::DiskOptions { volume: V0, config: Box::new(config) });
        let meanwhile = write(&mut script, (extent + 1) * 8192);
        answer_all_with_cuts(&mut script, &mut given);
        assert_eq!(script.replies[&ticket.0].code, 1);
        assert_eq!(stored(&script).contains(Flags::AL_DISABLED), !al_updates);
        let after = write(&mut script, (extent + 2) * 8192);
        let is_logged = matches!(script.held[..], [Held::Meta(..)]);
        assert_eq!(is_logged, al_updates, "{:?}", script.held);
        answer_all_with_cuts(&mut script, &mut given);
        for id in [before, meanwhile, after] {
            assert_eq!(script.completed[&id.0], Ok(()));
        }
        extent += 3;
    }
    assert_clean(&script);
}
