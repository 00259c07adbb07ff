//! The device grows while it is in use: whatever a power cut leaves must know of every block that
//! may differ from the peer's.

use super::rig::*;
use drbd_core::action::{DiskOp, MetaOp};
use drbd_core::admin::{AlChange, Command};
use drbd_core::config::DiskConfig;
use drbd_sim::script::{Held, Script, ScriptDisk};
use drbd_types::SectorCount;
use drbdmeta::bitmap::Region;
use drbdmeta::layout::{AlGeometry, Layout};
use drbdmeta::superblock::{Flags, Superblock};
use drbdmeta::units::ByteLen;

/// Blocks of one extent of the activity log.
const EXTENT: u64 = 1024;
/// What the device grows by.
const NEW: std::ops::Range<u64> = SECTORS / 8..SECTORS / 4;
/// A write may be torn at each of these, and the whole of it is one.
const SECTOR: usize = 512;

/// A Primary without a peer that writes at these sectors, without ever hearing of it.
fn writing(sectors: &[u64]) -> Script {
    let mut script = alone();
    assert_eq!(script.command(Command::Primary { volume: V0, force: false }).code, 1);
    script.holds = true;
    for sector in sectors {
        write(&mut script, *sector);
        answer_meta(&mut script, |_| ());
    }
    let writes = script.held.iter().filter(|h| matches!(h, Held::Disk(..))).count();
    assert_eq!(writes, sectors.len(), "{:?}", script.held);
    script
}

/// Lets the meta-data do what it is told; the data disk flushes, and is silent about all else.
fn answer_meta(script: &mut Script, mut each: impl FnMut(&MetaOp)) {
    let is_wanted = |held: &Held| matches!(held, Held::Meta(..) | Held::Disk(_, _, DiskOp::Flush));
    while let Some(at) = script.held.iter().position(is_wanted) {
        if let Held::Meta(_, _, op) = &script.held[at] {
            each(op);
        }
        script.answer(at, None);
    }
}

/// The device grows to twice its size. Returns the disk as it was, and what was written to it.
fn grow(script: &mut Script) -> (ScriptDisk, Vec<MetaOp>) {
    script.disks.get_mut(&0).unwrap().sectors *= 2;
    let (before, written) = resize(script, AlChange::default());
    assert_eq!(script.volume(0).unwrap().size, SectorCount(2 * SECTORS));
    (before, written)
}

fn resize_to(al: AlChange) -> Command {
    Command::Resize { volume: V0, size: SectorCount(0), force: true, assume_clean: false, al }
}

/// The device becomes as large as it can. Returns the disk as it was, and what was written to it.
fn resize(script: &mut Script, al: AlChange) -> (ScriptDisk, Vec<MetaOp>) {
    let before = script.disks[&0].clone();
    let ticket = script.begin(resize_to(al));
    let mut written = Vec::new();
    answer_meta(script, |op| {
        if matches!(op, MetaOp::Write { .. } | MetaOp::Fill { .. }) {
            written.push(op.clone());
        }
    });
    assert_eq!(script.replies[&ticket.0].code, 1, "{:?}", script.log);
    (before, written)
}

/// Blocks that count as out of sync after the node has come up again; none: all of them.
fn after_power_cut(mut disk: ScriptDisk) -> Option<Vec<std::ops::Range<u64>>> {
    disk.apply_al();
    let (superblock, layout) = read(&disk);
    assert!(superblock.is_clean());
    // The engine takes it.
    let mut script = without_disk(disk.clone());
    script.attach(0, Default::default());
    if superblock.flags.contains(Flags::FULL_SYNC) {
        return None;
    }
    let mut dirty = Vec::new();
    let region = Region::new(&layout, superblock.la_size);
    region.each_dirty_range(&mut disk, |range| dirty.push(range.start.0..range.end.0)).unwrap();
    Some(dirty)
}

fn read(disk: &ScriptDisk) -> (Superblock, Layout) {
    let superblock = Superblock::from_disk(&disk.blocks[&0][..]).unwrap();
    let layout = superblock.check(disk.placement(), ByteLen(disk.meta_len)).unwrap();
    (superblock, layout)
}

fn covers(dirty: Option<&[std::ops::Range<u64>]>, blocks: &std::ops::Range<u64>) -> bool {
    dirty.is_none_or(|all| all.iter().any(|r| r.start <= blocks.start && blocks.end <= r.end))
}

/// A power cut after each write, and within it.
fn each_cut(before: &ScriptDisk, written: &[MetaOp], mut each: impl FnMut(ScriptDisk)) {
    let mut disk = before.clone();
    each(disk.clone());
    for op in written {
        let MetaOp::Write { at, block, .. } = op else { panic!("{op:?}") };
        for torn in (SECTOR..4096).step_by(SECTOR) {
            let mut cut = disk.clone();
            let into = cut.blocks.entry(at.0).or_insert_with(|| Box::new([0; 4096]));
            into[..torn].copy_from_slice(&block[..torn]);
            each(cut);
        }
        disk.blocks.insert(at.0, block.clone());
        each(disk.clone());
    }
}

#[test]
fn what_is_in_flight_while_the_device_grows_stays_in_the_log() {
    let mut script = writing(&[0]);
    let (before, written) = grow(&mut script);
    let mut cuts = 0;
    each_cut(&before, &written, |disk| {
        let dirty = after_power_cut(disk);
        assert!(covers(dirty.as_deref(), &(0..EXTENT)), "cut {cuts}: {dirty:?}");
        cuts += 1;
    });
    // A log of eight blocks, the bitmap, and the superblock twice.
    assert!(cuts >= 11 * 8, "{cuts}");
    // Nothing more has happened since: the log that is on the disk now has to know.
    let dirty = after_power_cut(script.disks[&0].clone());
    assert_eq!(dirty, Some(vec![0..EXTENT, NEW]));
    // Another write to the same extent needs no transaction.
    write(&mut script, 8);
    assert!(matches!(script.held.last(), Some(Held::Disk(_, _, DiskOp::Write { .. }))));
    script.holds = false;
    script.answer_all();
    assert_clean(&script);
}

#[test]
fn a_device_at_rest_grows_and_the_new_part_is_out_of_sync() {
    let mut script = writing(&[]);
    let (before, written) = grow(&mut script);
    let mut seen = [0; 2];
    each_cut(&before, &written, |disk| {
        let (superblock, _) = read(&disk);
        let has_grown = superblock.la_size == SectorCount(2 * SECTORS);
        seen[usize::from(has_grown)] += 1;
        if has_grown {
            let dirty = after_power_cut(disk);
            assert!(covers(dirty.as_deref(), &NEW), "{dirty:?}");
        }
    });
    assert!(seen.iter().all(|n| *n > 0), "{seen:?}");
    let dirty = after_power_cut(script.disks[&0].clone());
    assert_eq!(dirty, Some(vec![NEW]));
}

#[test]
fn a_transaction_that_is_under_way_ends_before_the_device_grows() {
    let mut script = writing(&[]);
    write(&mut script, 0);
    assert!(matches!(script.held.last(), Some(Held::Meta(..))), "{:?}", script.held);
    let (before, written) = grow(&mut script);
    each_cut(&before, &written, |disk| {
        let (superblock, _) = read(&disk);
        let dirty = after_power_cut(disk);
        // Before its transaction is on the disk the write is not.
        let may_lack = superblock.la_size == SectorCount(SECTORS);
        assert!(may_lack || covers(dirty.as_deref(), &(0..EXTENT)), "{dirty:?}");
    });
    // Now it goes on.
    assert!(matches!(script.held.as_slice(), [Held::Disk(_, _, DiskOp::Write { .. })]));
    script.holds = false;
    script.answer_all();
    assert_clean(&script);
}

/// The ring takes another shape while blocks are marked, and takes its old one again.
#[test]
fn the_activity_log_takes_another_shape_and_no_mark_is_lost() {
    let mut script = without_disk(disk(&[5]));
    script.attach(0, DiskConfig { al_extents: 6433, ..Default::default() });
    assert_eq!(script.command(Command::Primary { volume: V0, force: false }).code, 1);
    write(&mut script, 0);
    script.holds = true;
    for (stripes, stripe_blocks) in [(3, 4), (1, 8)] {
        let al = AlChange { stripes: Some(stripes), stripe_blocks: Some(stripe_blocks) };
        let (before, written) = resize(&mut script, al);
        assert!(written.len() as u64 >= u64::from(stripes * stripe_blocks) + 3, "{written:?}");
        each_cut(&before, &written, |disk| {
            let dirty = after_power_cut(disk);
            assert!(covers(dirty.as_deref(), &(5..6)), "{dirty:?}");
        });
        let now = &script.disks[&0];
        assert_eq!(read(now).1.al_geometry, AlGeometry { stripes, stripe_blocks });
        assert!(script.has_logged(&format!("al-stripes = {stripes}, al-stripe-size-kB")));
        // Nothing was hot any more, and what is hot next is found again.
        write(&mut script, 0);
        answer_meta(&mut script, |_| ());
        let dirty = after_power_cut(script.disks[&0].clone());
        assert!(covers(dirty.as_deref(), &(0..EXTENT)), "{stripes}: {dirty:?} {:?}", script.held);
        script.answer_all();
    }
    assert_clean(&script);
}

#[test]
fn a_shape_without_space_is_refused() {
    let mut script = alone();
    script.command(Command::Primary { volume: V0, force: false });
    let before = read(&script.disks[&0]);
    for (stripes, stripe_blocks, code) in
        [(1, 4, 168), (1024, 1 << 20, 167), (64, 1024, 169), (1, 8, 1)]
    {
        let al = AlChange { stripes: Some(stripes), stripe_blocks: Some(stripe_blocks) };
        assert_eq!(script.command(resize_to(al)).code, code, "{stripes} x {stripe_blocks}");
        assert_eq!(read(&script.disks[&0]).1, before.1);
    }
    write(&mut script, 0);
    assert_clean(&script);
}
