//! Two nodes that behave: the ordinary ways of a pair.

use std::collections::BTreeMap;

use drbd_core::admin::Command;
use drbd_core::config::{DiskConfig, NetConfig, Protocol};
use drbd_sim::World;
use drbd_sim::disk::SimDisk;
use drbd_types::{ByteLen, Cstate, Dstate, Minor, Role, VolumeNr};
use drbdmeta::al::initialised_block;
use drbdmeta::layout::{AlGeometry, Layout, Placement};
use drbdmeta::superblock::{Flags, Magic, Superblock};

const SECTORS: u64 = 16_384; // 8 MiB
const META: u64 = 1 << 20;

/// A disk as create-md leaves it.
fn fresh_disk() -> SimDisk {
    let mut disk = SimDisk::new(SECTORS, META);
    let layout = Layout::for_new(Placement::FlexExternal, ByteLen(META), AlGeometry::default())
        .expect("1 MiB is enough");
    for t in 0..layout.al_geometry.blocks() {
        disk.write_block(layout.al_block(t).0, Box::new(initialised_block()), true);
    }
    let superblock = Superblock::new(&layout, 0);
    disk.write_block(layout.superblock.0, Box::new(superblock.to_disk()), true);
    disk.flush_all();
    disk
}

fn world(seed: u64) -> World {
    let disks = || BTreeMap::from([(0, fresh_disk())]);
    World::new(seed, [disks(), disks()])
}

fn up(world: &mut World, node: usize, net: &NetConfig) {
    let volume = VolumeNr(0);
    let reply = world.admin(node, Command::NewVolume { volume, minor: Minor(0) });
    assert_eq!(reply.code, 1, "{reply:?}");
    let config = Box::new(DiskConfig::default());
    let reply = world.admin(node, Command::Attach { volume, config });
    assert_eq!(reply.code, 1, "{reply:?} {:?}", world.nodes[node].log);
    let reply = world.admin(node, Command::Connect(Box::new(net.clone())));
    assert_eq!(reply.code, 1, "{reply:?}");
}

fn connected(seed: u64, protocol: Protocol) -> World {
    let net = NetConfig { protocol, ..NetConfig::default() };
    let mut world = world(seed);
    up(&mut world, 0, &net);
    up(&mut world, 1, &net);
    let ok = world.run_until(60_000_000, |w| {
        w.state(0, 0).conn == Cstate::Connected && w.state(1, 0).conn == Cstate::Connected
    });
    assert!(ok, "{:#?} {:#?}", world.nodes[0].log, world.nodes[1].log);
    world
}

fn in_sync(seed: u64, protocol: Protocol) -> World {
    let mut world = connected(seed, protocol);
    let reply = world.admin(0, Command::Primary { volume: VolumeNr(0), force: true });
    assert_eq!(reply.code, 1, "{reply:?}");
    let ok = world.run_until(600_000_000, |w| {
        let state = w.state(1, 0);
        state.conn == Cstate::Connected
            && state.disk == Dstate::UpToDate
            && w.state(0, 0).pdsk == Dstate::UpToDate
            && w.state(0, 0).conn == Cstate::Connected
    });
    assert!(ok, "{:?} {:?}", world.state(0, 0), world.state(1, 0));
    world
}

#[test]
fn two_fresh_nodes_connect() {
    let world = connected(1, Protocol::C);
    let state = world.state(0, 0);
    assert_eq!((state.disk, state.pdsk), (Dstate::Inconsistent, Dstate::Inconsistent));
}

#[test]
fn a_forced_promotion_leads_to_a_full_resync() {
    let world = in_sync(2, Protocol::C);
    assert_eq!(world.state(0, 0).role, Role::Primary);
    let lines: Vec<_> = world.nodes[1].log.iter().map(|l| l.text.as_str()).collect();
    assert!(
        lines.iter().any(|l| l.starts_with("Began resync as SyncTarget (will sync 8192 KB")),
        "{lines:#?}"
    );
    assert_eq!(world.nodes[0].engine.status().volumes[0].out_of_sync_bits, 0);
}

#[test]
fn writes_are_on_both_disks_when_they_are_acknowledged() {
    for protocol in [Protocol::A, Protocol::B, Protocol::C] {
        let mut world = in_sync(3, protocol);
        for n in 0..200_u64 {
            let start = world.chance.below(SECTORS - 16);
            let len = 1 + world.chance.below(16);
            let tags: Vec<u64> = (0..len).map(|i| n * 100 + i + 1).collect();
            let id = world.write(0, 0, start, tags.clone());
            assert_eq!(world.result(0, id), Some(Ok(None)), "write {n}");
            assert_eq!(*world.nodes[0].disks[&0].read(start, len), tags);
            if protocol == Protocol::C {
                assert_eq!(*world.nodes[1].disks[&0].read(start, len), tags);
            }
            let id = world.read(0, 0, start, len);
            assert_eq!(world.result(0, id), Some(Ok(Some(tags.into()))));
        }
        world.run_for(5_000_000);
        let (a, b): (Vec<_>, Vec<_>) =
            (world.nodes[0].disks[&0].used().collect(), world.nodes[1].disks[&0].used().collect());
        assert_eq!(a, b);
        assert_eq!(world.nodes[0].buffers_in_use(), 0);
        assert_eq!(world.nodes[1].buffers_in_use(), 0);
        let status = world.nodes[0].engine.status();
        assert_eq!((status.volumes[0].app_pending, status.volumes[0].peer_pending), (0, 0));
    }
}

#[test]
fn a_lost_link_leads_to_a_resync_of_what_changed() {
    let mut world = in_sync(4, Protocol::C);
    let id = world.write(0, 0, 0, vec![7; 8]);
    assert_eq!(world.result(0, id), Some(Ok(None)));
    world.cut(true);
    let id = world.write(0, 0, 800, vec![9; 8]);
    assert_eq!(world.result(0, id), Some(Ok(None)), "completed by the local disk");
    world.cut(false);
    let ok = world.run_until(120_000_000, |w| {
        w.state(0, 0).conn == Cstate::Connected
            && w.state(1, 0).disk == Dstate::UpToDate
            && w.state(0, 0).pdsk == Dstate::UpToDate
    });
    assert!(ok, "{:?} {:?} {:#?}", world.state(0, 0), world.state(1, 0), world.nodes[0].log);
    assert_eq!(world.nodes[1].disks[&0].read(800, 8)[..], [9; 8]);
}

/// What apply-al does when no extent is hot.
fn apply_empty_log(disk: &mut SimDisk) {
    let block = disk.read_block(0).expect("written by create-md");
    let mut superblock = Superblock::from_disk(block).expect("valid");
    superblock.magic = Magic::Clean;
    superblock.flags.insert(Flags::AL_CLEAN);
    disk.write_block(0, Box::new(superblock.to_disk()), true);
}

/// Blocks of the bitmap on disk that are zero are no less known than the others.
#[test]
fn a_node_that_was_killed_resyncs_only_what_changed() {
    let mut world = in_sync(5, Protocol::C);
    world.stop(1, false);
    let id = world.write(0, 0, 800, vec![9; 8]);
    assert_eq!(world.result(0, id), Some(Ok(None)), "completed by the local disk");
    apply_empty_log(world.nodes[1].disks.get_mut(&0).expect("it has one"));
    world.boot(1);
    up(&mut world, 1, &NetConfig::default());
    let ok = world.run_until(120_000_000, |w| {
        w.state(0, 0).conn == Cstate::Connected && w.state(1, 0).disk == Dstate::UpToDate
    });
    assert!(ok, "{:?} {:?} {:#?}", world.state(0, 0), world.state(1, 0), world.nodes[0].log);
    let lines: Vec<_> = world.nodes[1].log.iter().map(|l| l.text.as_str()).collect();
    let began = "Began resync as SyncTarget (will sync 4 KB [1 bits set]).";
    assert!(lines.contains(&began), "{lines:#?}");
    assert_eq!(world.nodes[1].disks[&0].read(800, 8)[..], [9; 8]);
}
