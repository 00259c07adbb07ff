//! Defects of the original in states and generations: one test each. Spec:
//! states-and-generations.md §14; the table of all of them is docs/defects.md.

use super::defects::reconnect;
use super::resync::{reply, source, sync_target};
use super::rig::*;
use drbd_core::action::Handler;
use drbd_core::admin::Command;
use drbd_core::config::{DiskConfig, Fencing, NetConfig, OnCongestion, Protocol};
use drbd_core::event::StreamLoss;
use drbd_core::generation::splitbrain::{OnePrimary, Policies, ZeroPrimaries};
use drbd_sim::script::{Script, ScriptDisk};
use drbd_types::{Cstate, Dstate, Fields, Gi, Minor, Role, SectorCount, StateWord};
use drbd_wire::packet::{AckKind, BlockId, ProtocolParams, RequestKind, Uuids};
use drbd_wire::{Packet, Stream};
use drbdmeta::superblock::Flags;

/// How often a line was logged.
fn count(script: &Script, text: &str) -> usize {
    script.log.iter().filter(|line| line.text.contains(text)).count()
}

/// The peer's handshake with these identifiers and parameters.
fn greet_as(script: &mut Script, params: ProtocolParams, uuids: Uuids, state: Fields) {
    script.peer(Stream::Data, 0, Packet::Protocol(params), 0);
    script.peer(Stream::Data, 0, sync_param(), 0);
    script.peer(Stream::Data, 0, Packet::Sizes(sizes()), 0);
    script.peer(Stream::Data, 0, Packet::Uuids(uuids), 0);
    script.peer(Stream::Data, 0, Packet::State(state.pack()), 0);
}

#[test]
fn defect_d1_call_pri_lost_calls_the_handler_and_ends_the_connection() {
    let net = NetConfig {
        after_sb: Policies {
            zero: ZeroPrimaries::DiscardLeastChanges,
            one: OnePrimary::CallPriLost,
            ..Policies::default()
        },
        ..NetConfig::default()
    };
    let mut script = alone();
    script.command(Command::Primary { volume: V0, force: true });
    script.connect(net.clone());
    let theirs = Uuids { bitmap: Gi(CURRENT), dirty_bits: 9, ..uuids(0x9999_0000) };
    greet_as(&mut script, params(&net), theirs, peer_state());
    assert!(script.calls.contains(&Handler::PriLostAfterSb), "{:?}", script.log);
    assert_eq!((conn(&script), script.state(0).role), (Cstate::StandAlone, Role::Primary));
}

#[test]
fn defect_d2_two_nodes_without_identifiers_do_not_hang() {
    let none = ScriptDisk::new(
        SECTORS,
        |sb| {
            sb.la_size = SectorCount(SECTORS);
            sb.current = Gi(0);
            sb.flags |= Flags::CONSISTENT;
        },
        [],
    );
    let mut script = without_disk(none);
    script.attach(0, DiskConfig::default());
    let net = NetConfig::default();
    script.connect(net.clone());
    let state = Fields { disk: Dstate::Consistent, ..peer_state() };
    greet_as(&mut script, params(&net), uuids(0), state);
    assert_ne!(script.state(0).conn, Cstate::WFBitMapT, "{:?}", script.log);
}

#[test]
fn defect_d3_unrelated_data_is_a_split_brain_for_both() {
    let mut script = alone();
    let net = NetConfig::default();
    script.connect(net.clone());
    greet_as(&mut script, params(&net), uuids(0x9999_0000), peer_state());
    assert!(script.has_logged("uuid_compare()=-100 by rule 100"), "{:?}", script.log);
    assert_eq!(conn(&script), Cstate::StandAlone);
}

#[test]
fn defect_d4_a_forced_promotion_makes_one_generation() {
    let mut script = without_disk(disk(&[]));
    script.attach(0, DiskConfig { fencing: Fencing::ResourceOnly, ..DiskConfig::default() });
    script.exits.insert("FencePeer", 4);
    let reply = script.command(Command::Primary { volume: V0, force: true });
    assert_eq!(reply.code, 1, "{:?}", script.log);
    assert_eq!(count(&script, "new current UUID"), 1, "{:?}", script.log);
    assert!(script.has_logged(":0000000011110000:"), "the ancestor is kept: {:?}", script.log);
}

#[test]
fn defect_d5_both_discarding_is_an_unresolved_split_brain() {
    let net = NetConfig { discard_my_data: true, ..NetConfig::default() };
    let mut script = alone();
    script.command(Command::Primary { volume: V0, force: true });
    script.command(Command::Secondary(V0));
    script.connect(net.clone());
    let theirs = Uuids { bitmap: Gi(CURRENT), flags: 1, ..uuids(0x9999_0000) };
    let both = ProtocolParams { discard_my_data: true, ..params(&net) };
    greet_as(&mut script, both, theirs, peer_state());
    assert!(!script.has_logged("incompatible"), "{:?}", script.log);
    assert!(script.has_logged("Split-Brain detected but unresolved"), "{:?}", script.log);
}

#[test]
fn defect_d6_an_attach_that_nobody_answers_is_given_up() {
    let mut script = without_disk(disk(&[]));
    script.command(Command::NewVolume { volume: V0, minor: Minor(0) });
    let net = NetConfig::default();
    script.connect(net.clone());
    greet(&mut script, &net, peer_state());
    script.begin(Command::Attach { volume: V0, config: Box::default() });
    assert_eq!(script.state(0).disk, Dstate::Negotiating, "{:?}", script.log);
    for _ in 0..600 {
        script.pass(100_000);
        answer_pings(&mut script);
    }
    assert_eq!(script.state(0).disk, Dstate::Diskless, "{:?}", script.engine.waits());
    assert!(script.is_up);
}

#[test]
fn defect_d7_a_congested_connection_is_ended() {
    let net = NetConfig {
        protocol: Protocol::A,
        on_congestion: OnCongestion::Disconnect,
        congestion_fill: SectorCount(8),
        ..NetConfig::default()
    };
    let mut script = primary_with(net);
    write(&mut script, 8);
    write(&mut script, 64);
    answer_pings(&mut script);
    assert_eq!(conn(&script), Cstate::StandAlone, "{:?}", script.engine.waits());
    assert_eq!(script.state(0).conn, Cstate::StandAlone);
}

/// Flag 4 of P_UUIDS speaks of the attach under way. A stale one is taken without harm.
#[test]
fn defect_d8_a_stale_flag_of_an_attach_does_no_harm() {
    let mut script = alone();
    let net = NetConfig::default();
    script.connect(net.clone());
    let stale = Uuids { flags: 4, ..uuids(CURRENT) };
    greet_as(&mut script, params(&net), stale, peer_state());
    let state = script.state(0);
    assert_eq!((state.conn, state.pdsk), (Cstate::Connected, Dstate::UpToDate));
    // It is about a disk that is being attached, and about this one alone.
    for (flags, real) in [(4, "Inconsistent"), (0, "Consistent")] {
        script.lose(Stream::Data, StreamLoss::Reset);
        script.wait_until_up();
        let attaching = Fields { disk: Dstate::Negotiating, ..peer_state() };
        greet_as(&mut script, params(&net), Uuids { flags, ..uuids(CURRENT) }, attaching);
        let said = script.log.iter().rfind(|line| line.text.starts_with("real peer disk state"));
        let said = said.map(|line| &line.text[..]);
        assert_eq!(said, Some(&format!("real peer disk state = {real}")[..]));
    }
}

#[test]
fn defect_d9_a_resync_ends_the_mark_of_a_crash_at_once() {
    let mut crashed = disk(&[1]);
    let at = drbdmeta::layout::Placement::FlexExternal
        .superblock(drbd_types::ByteLen(crashed.meta_len))
        .unwrap();
    let mut sb = drbdmeta::superblock::Superblock::from_disk(&crashed.blocks[&at.0][..]).unwrap();
    sb.flags |= Flags::PRIMARY | Flags::CONNECTED | Flags::AL_CLEAN;
    crashed.blocks.insert(at.0, Box::new(sb.to_disk()));
    let mut script = without_disk(crashed);
    script.attach(0, DiskConfig::default());
    let net = NetConfig::default();
    script.connect(net.clone());
    greet(&mut script, &net, peer_state());
    assert_eq!(script.state(0).conn, Cstate::WFBitMapS, "{:?}", script.log);
    assert!(stored(&script).contains(Flags::CRASHED_PRIMARY));
    super::resync::send_bitmap(&mut script, &[1]);
    script.peer(Stream::Data, 0, request(RequestKind::Resync, 8, 4096), 0);
    script.peer(Stream::Meta, 0, ack(AckKind::RsWriteAck, 8, BlockId::SYNCER), 0);
    script.peer(Stream::Data, 0, Packet::State(peer_connected().pack()), 0);
    answer_pings(&mut script);
    assert_eq!(script.state(0).conn, Cstate::Connected, "{:?}", script.engine.waits());
    script.pass(10_000_000);
    assert!(!stored(&script).contains(Flags::CRASHED_PRIMARY), "{:?}", stored(&script));
}

#[test]
fn defect_d10_after_a_dry_run_of_the_peer_this_node_goes_on_connecting() {
    let mut script = alone();
    let net = NetConfig::default();
    script.connect(net.clone());
    let theirs = ProtocolParams { dry_run: true, ..params(&net) };
    script.is_reachable = false;
    greet_as(&mut script, theirs, uuids(CURRENT), peer_state());
    assert!(!script.is_up, "{:?}", script.log);
    assert_eq!(conn(&script), Cstate::WFConnection);
}

/// An UpToDate target is a matter of rr-conflict, with the original's words.
#[test]
fn defect_d11_the_line_about_stable_data_is_as_it_was() {
    let net = NetConfig {
        rr_conflict: drbd_core::generation::decide::RrConflict::Violently,
        ..NetConfig::default()
    };
    let mut script = connected_with(net.clone());
    script.begin(Command::Primary { volume: V0, force: false });
    answer_pings(&mut script);
    script.peer(Stream::Meta, 0, Packet::StateChgReply(1), 0);
    script.command(Command::SuspendIo(V0));
    script.lose(Stream::Data, StreamLoss::Reset);
    script.wait_until_up();
    let theirs = Uuids { bitmap: Gi(CURRENT), ..uuids(0x9999_0000) };
    greet_as(&mut script, params(&net), theirs, peer_state());
    let text = "Becoming SyncTarget, violating the stable-dataassumption";
    assert!(script.has_logged(text), "{:?}", script.log);
}

#[test]
fn defect_d12_after_a_reconnect_resume_io_makes_no_generation() {
    let mut script = primary();
    assert_eq!(script.command(Command::SuspendIo(V0)).code, 1);
    reconnect(&mut script);
    assert_eq!(script.state(0).pdsk, Dstate::UpToDate, "{:?}", script.log);
    assert_eq!(script.command(Command::ResumeIo(V0)).code, 1);
    assert_eq!(count(&script, "new current UUID"), 0, "{:?}", script.log);
}

/// The target takes the identifiers of the source from its last P_UUIDS, however old.
#[test]
fn defect_d13_the_target_takes_over_the_identifiers_it_was_told() {
    let mut script = sync_target(&[1]);
    script.peer(Stream::Data, 0, reply(8), 4096);
    script.peer(Stream::Meta, 0, Packet::PingAck, 0);
    assert_eq!(script.state(0).conn, Cstate::Connected);
    let text = "updated UUIDs 0000000022220000:0000000000000000:";
    assert!(script.has_logged(text), "{:?}", script.log);
    let mut script = source();
    assert!(matches!(sent(&mut script).last(), Some(Packet::CompressedBitmap(_))));
}

/// What was written in Ahead is gone with the disk, as long as that does not come back: the peer's
/// data has the same identifier, and is older. The original goes on with it.
#[test]
fn a_primary_that_lost_its_disk_while_ahead_takes_no_older_data() {
    let net = NetConfig {
        protocol: Protocol::A,
        on_congestion: OnCongestion::PullAhead,
        congestion_fill: SectorCount(8),
        ..NetConfig::default()
    };
    let mut script = primary_with(net.clone());
    write(&mut script, 8);
    write(&mut script, 16);
    assert_eq!(script.state(0).conn, Cstate::Ahead, "{:?}", script.log);
    script.command(Command::Detach { volume: V0, force: true });
    assert_eq!(script.state(0).pdsk, Dstate::Inconsistent, "{:?}", script.log);
    script.lose(Stream::Data, StreamLoss::Reset);
    script.wait_until_up();
    greet(&mut script, &net, peer_state());
    assert!(script.has_logged("Can only connect to data with current UUID="), "{:?}", script.log);
    assert_eq!(conn(&script), Cstate::StandAlone);
    script.disks.get_mut(&0).unwrap().apply_al();
    script.command(Command::Attach { volume: V0, config: Box::default() });
    assert_eq!(script.state(0).disk, Dstate::UpToDate, "{:?}", script.log);
    assert_eq!(count(&script, "new current UUID"), 1, "what was written in Ahead is newer");
}

/// A peer whose disk has errors may be promoted by force.
#[test]
fn a_primary_that_leaves_a_bad_peer_begins_a_generation() {
    let mut script = primary();
    let bad = Fields { disk: Dstate::Inconsistent, peer: Role::Primary, ..peer_connected() };
    script.peer(Stream::Data, 0, Packet::State(bad.pack()), 0);
    assert_eq!(script.state(0).pdsk, Dstate::Inconsistent, "{:?}", script.log);
    script.is_reachable = false;
    script.lose(Stream::Data, StreamLoss::Reset);
    assert_eq!(count(&script, "new current UUID"), 1, "{:?}", script.log);
}

/// The peer is promoted by force while both disks are worthless, and before this node has set all
/// bits for the resync that follows, its administrator asks for the same: the sides are clear then.
#[test]
fn a_forced_promotion_starts_no_second_resync() {
    let mut script = without_disk(ScriptDisk::fresh(SECTORS));
    script.attach(0, DiskConfig::default());
    let net = NetConfig::default();
    script.connect(net.clone());
    let state = Fields { disk: Dstate::Inconsistent, ..peer_state() };
    greet_as(&mut script, params(&net), uuids(Gi::JUST_CREATED.0), state);
    assert_eq!(script.state(0).conn, Cstate::Connected, "{:?}", script.log);
    let primary = Fields {
        role: Role::Primary,
        disk: Dstate::UpToDate,
        pdsk: Dstate::Inconsistent,
        conn: Cstate::Connected,
        ..Fields::NEW
    };
    let mask = StateWord(StateWord::ROLE.0 | StateWord::DISK.0);
    let val = StateWord(primary.pack().0 & mask.0);
    script.peer(Stream::Data, 0, Packet::StateChgReq(mask, val), 0);
    script.holds = true;
    script.peer(Stream::Data, 0, Packet::Uuids(uuids(CURRENT)), 0);
    script.peer(Stream::Data, 0, Packet::State(primary.pack()), 0);
    script.begin(Command::Invalidate(V0));
    script.peer(Stream::Meta, 0, Packet::StateChgReply(1), 0);
    assert_eq!(script.state(0).conn, Cstate::StartingSyncT, "{:?}", script.log);
    script.holds = false;
    script.answer_all();
    assert_eq!(script.state(0).conn, Cstate::WFSyncUUID, "{:?}", script.log);
}

/// `new-current-uuid --clear-bitmap` on the peer: two new disks are equal because it says so. Spec:
/// wire-protocol.md, P_UUIDS.
#[test]
fn an_initial_sync_is_skipped_between_new_disks_only() {
    let net = NetConfig::default();
    let mut script = without_disk(ScriptDisk::fresh(SECTORS));
    script.attach(0, DiskConfig::default());
    script.connect(net.clone());
    let state = Fields { disk: Dstate::Inconsistent, ..peer_state() };
    greet_as(&mut script, params(&net), uuids(Gi::JUST_CREATED.0), state);
    assert_eq!(script.state(0).conn, Cstate::Connected, "{:?}", script.log);
    assert!(script.volume(0).unwrap().out_of_sync_bits > 0);
    let equal = Packet::Uuids(Uuids { flags: 8, ..uuids(0x5555_0000) });
    script.peer(Stream::Data, 0, equal.clone(), 0);
    let state = script.state(0);
    assert_eq!((state.disk, state.pdsk), (Dstate::UpToDate, Dstate::UpToDate), "{:?}", script.log);
    assert_eq!(script.volume(0).unwrap().out_of_sync_bits, 0);
    let mut after = without_disk({
        let mut disk = script.disks[&0].clone();
        disk.apply_al();
        disk
    });
    after.attach(0, DiskConfig::default());
    assert_eq!(after.volume(0).unwrap().out_of_sync_bits, 0, "it is on disk");
    assert!(after.has_logged("attached to UUIDs 0000000055550000:0000000000000000"));

    let mut old = connected();
    old.peer(Stream::Data, 0, Packet::OutOfSync(desc(8, 4096)), 0);
    old.peer(Stream::Data, 0, equal, 0);
    assert_eq!(old.volume(0).unwrap().out_of_sync_bits, 1, "this one has data");
}
