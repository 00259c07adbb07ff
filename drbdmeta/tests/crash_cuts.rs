//! Power cuts: every multi-step update is cut after each of its writes, and inside each, and
//! whatever is found then must be safe.
//!
//! A cut inside a write leaves a prefix of it, in units of 512 or of 4096 bytes.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use drbdmeta::al::{AlRing, Outcome, replay};
use drbdmeta::bitmap::Region;
use drbdmeta::io::{Memory, MetaIo, Recorder, Step};
use drbdmeta::layout::{AlGeometry, Layout, Placement};
use drbdmeta::ops::{self, ApplyPlan, MoveJournal};
use drbdmeta::superblock::{Flags, Magic, Superblock};
use drbdmeta::units::{AlExtentNr, ByteLen, ByteOffset, Gi, SectorCount};
use drbdmeta::v07::{OldSuperblock, fixed_superblock};

const MIB: usize = 1 << 20;
/// A write may be torn at these.
const TORN: [usize; 2] = [512, 4096];

fn len(memory: &Memory) -> ByteLen {
    memory.device_len()
}

fn layout(size: u64, al: AlGeometry) -> Layout {
    Layout::for_new(Placement::Internal, ByteLen(size), al).unwrap()
}

/// What a disk that reorders writes between two flushes can leave: one of them, or all while one
/// is torn.
fn each_reordering(start: &Memory, steps: &[Step], each: &mut impl FnMut(Memory)) -> usize {
    let mut image = start.clone();
    let mut count = 0;
    for epoch in steps.split(|s| *s == Step::Flush) {
        for (kept, is_alone) in (0..epoch.len()).flat_map(|i| [(i, true), (i, false)]) {
            let mut cut = image.clone();
            for (i, step) in epoch.iter().enumerate() {
                let Step::Write(at, data) = step else { continue };
                if (i == kept) == is_alone {
                    cut.write_at(*at, data).unwrap();
                } else if !is_alone {
                    // The late one was under way.
                    cut.write_at(*at, &data[..512]).unwrap();
                }
            }
            each(cut);
            count += 1;
        }
        for step in epoch {
            if let Step::Write(at, data) = step {
                image.write_at(*at, data).unwrap();
            }
        }
    }
    count
}

/// All images that a power cut during these steps can leave.
fn each_cut(
    start: &Memory,
    steps: &[Step],
    units: &[usize],
    mut each: impl FnMut(Memory),
) -> usize {
    let mut image = start.clone();
    // Large devices are copied too often otherwise.
    let mut cuts = if units.is_empty() { 0 } else { each_reordering(start, steps, &mut each) };
    each(image.clone());
    for step in steps {
        let Step::Write(at, data) = step else { continue };
        for &unit in units {
            // Long writes: the first, some in between, the last unit.
            let units = data.len() / unit;
            let stride = (units / 24).max(1);
            for done in (1..units).filter(|n| n % stride == 0 || *n < 9 || *n + 9 > units) {
                let mut torn = image.clone();
                torn.write_at(*at, &data[..done * unit]).unwrap();
                each(torn);
                cuts += 1;
            }
        }
        image.write_at(*at, data).unwrap();
        each(image.clone());
        cuts += 1;
    }
    cuts
}

fn read(memory: &Memory) -> Option<(Superblock, Layout)> {
    let at = Placement::Internal.superblock(len(memory))?;
    let start = usize::try_from(at.0).unwrap();
    let sb = Superblock::from_disk(&memory.bytes[start..start + 4096]).ok()?;
    let layout = sb.check(Placement::Internal, len(memory)).ok()?;
    Some((sb, layout))
}

fn bits(memory: &mut Memory, layout: &Layout, sb: &Superblock) -> Vec<(u64, u64)> {
    let mut found = Vec::new();
    Region::new(layout, sb.la_size)
        .each_dirty_range(memory, |r| found.push((r.start.0, r.end.0)))
        .unwrap();
    found
}

/// A device that was in use: some bits, a log of `transactions`, one extent each.
fn used(size: usize, al: AlGeometry, flags: Flags, first: u32, transactions: u32) -> Memory {
    let mut memory = Memory::zeroed(size);
    let layout = layout(size as u64, al);
    let mut sb = Superblock::new(&layout, 0);
    sb.la_size = layout.usable();
    sb.current = Gi(0x1234_5678_9ABC_DEF0);
    sb.bitmap = Gi(0x1111_2222_3333_4444);
    sb.flags = flags;
    ops::create(&mut memory, &layout, &sb, false, |io, l| io.write_at(l.bitmap, &[0x81; 4096]))
        .unwrap();
    let mut ring = AlRing::new(layout);
    let mut slots = vec![None; 7];
    for n in 0..first + transactions {
        let update = (u16::try_from(n % 7).unwrap(), Some(AlExtentNr(n % 13)));
        let (at, block) = ring.next(&[update], &slots).unwrap();
        if n >= first {
            memory.write_at(at, &block).unwrap();
            slots[usize::from(update.0)] = update.1;
        }
        ring.written();
    }
    sb.magic = Magic::Unclean;
    ops::write_superblock(&mut memory, &layout, &sb).unwrap();
    memory
}

/// What `apply-al` does, as the command does it.
fn apply(io: &mut dyn MetaIo, sb: &mut Superblock, layout: &Layout) -> Result<(), u8> {
    let found = replay(io, layout, sb).unwrap();
    match ops::plan_apply(sb, &found) {
        ApplyPlan::Refuse(status) => Err(status),
        ApplyPlan::Do { mark, reinitialise, .. } => {
            ops::apply(io, layout, sb, &found.outcome, mark, reinitialise).unwrap();
            Ok(())
        }
    }
}

#[test]
fn apply_al_cut_anywhere_and_repeated_gives_the_same() {
    let shapes = [AlGeometry::default(), AlGeometry { stripes: 3, stripe_blocks: 4 }];
    let mut cuts = 0;
    for al in shapes {
        for (first, count) in [(0, 1), (0, 3), (0, 40), (3, 2), (7, 1), (5, 9), (8, 3)] {
            let start = used(4 * MIB, al, Flags::PRIMARY | Flags::CONSISTENT, first, count);
            let mut recorder = Recorder::new(start.clone());
            let (mut sb, layout) = read(&start).unwrap();
            apply(&mut recorder, &mut sb, &layout).unwrap();
            let done = recorder.memory.clone();
            let want = bits(&mut done.clone(), &layout, &sb);
            cuts += each_cut(&start, &recorder.steps, &TORN, |mut image| {
                let (mut sb, layout) = read(&image).expect("the superblock was torn");
                let again = apply(&mut image, &mut sb, &layout);
                assert_eq!(again, Ok(()), "first {first} count {count} {al:?}");
                assert_eq!(bits(&mut image, &layout, &sb), want);
                assert!(sb.is_clean() && read(&image) == read(&done));
                // A torn first block in an otherwise empty ring may stay: it counts as empty.
                let log = replay(&mut image, &layout, &sb).unwrap();
                assert!(log.outcome == Outcome::Initialised, "first {first} count {count} {al:?}");
            });
        }
    }
    println!("{cuts} cuts");
    assert!(cuts > 500);
}

#[test]
fn create_over_old_meta_data_is_old_or_nothing_or_new() {
    let al = AlGeometry { stripes: 2, stripe_blocks: 8 };
    let start = used(4 * MIB, AlGeometry::default(), Flags::CONSISTENT, 0, 5);
    let (old, old_layout) = read(&start).unwrap();
    let old_bits = bits(&mut start.clone(), &old_layout, &old);
    let new_layout = layout(4 << 20, al);
    let new = Superblock::new(&new_layout, 0);
    let mut recorder = Recorder::new(start.clone());
    ops::create(&mut recorder, &new_layout, &new, true, |io, l| {
        io.write_zeros(l.bitmap, l.bitmap_len)
    })
    .unwrap();
    let done = recorder.memory.clone();
    let mut seen = [0; 3];
    each_cut(&start, &recorder.steps, &TORN, |mut image| match read(&image) {
        None => seen[1] += 1,
        Some((sb, layout)) if sb == old => {
            assert_eq!(bits(&mut image, &layout, &sb), old_bits, "old generation, new bitmap");
            seen[0] += 1;
        }
        Some((sb, _)) => {
            assert_eq!(sb, new);
            assert!(image == done, "not complete");
            seen[2] += 1;
        }
    });
    assert!(seen.iter().all(|n| *n > 0), "{seen:?}");
}

#[test]
fn wipe_is_old_or_nothing() {
    let start = used(4 * MIB, AlGeometry::default(), Flags::CONSISTENT, 0, 2);
    let (old, layout) = read(&start).unwrap();
    let mut recorder = Recorder::new(start.clone());
    ops::wipe(&mut recorder, layout.superblock).unwrap();
    each_cut(&start, &recorder.steps, &TORN, |image| {
        assert!(read(&image).is_none_or(|(sb, _)| sb == old));
    });
    assert!(read(&recorder.memory).is_none());
}

/// Cuts a move anywhere; then the command runs again, with the journal if it was kept.
fn moved(old_size: usize, new_size: usize, units: &[usize]) {
    let mut start = used(old_size, AlGeometry::default(), Flags::CONSISTENT, 0, 5);
    let (sb, old) = read(&start).unwrap();
    let want = bits(&mut start, &old, &sb);
    // Growing shows whatever was there before: not zeros.
    start.bytes.resize(new_size, 0xA5);
    let new = layout(new_size as u64, sb.al);
    let mut recorder = Recorder::new(start.clone());
    let mut kept = None;
    let result = ops::move_internal(&mut recorder, &old, &new, &sb, &mut |j| {
        kept = Some([&j.header()[..], &j.content].concat());
        Ok(())
    })
    .unwrap();
    let overlaps = new.bitmap.0 < old.superblock.0 + 4096;
    assert_eq!(kept.is_some(), overlaps);
    let check = |image: &mut Memory| {
        let (got, layout) = read(image).expect("no meta-data at the new place");
        assert_eq!((got, layout), (result, new));
        assert_eq!(bits(image, &layout, &got), want);
        let mut log = replay(image, &layout, &Superblock { magic: Magic::Unclean, ..got }).unwrap();
        log.warnings.clear();
        assert!(matches!(log.outcome, Outcome::Updates(e) if e.len() == 5));
        let data = usize::try_from(new.bitmap.0.min(old.bitmap.0)).unwrap();
        let end = &image.bytes[data - MIB..data];
        assert!(end.iter().all(|b| *b == 0), "data was overwritten");
    };
    check(&mut recorder.memory.clone());
    each_cut(&start, &recorder.steps, units, |mut image| {
        if let Some(journal) = kept.clone().and_then(MoveJournal::from_bytes) {
            journal.redo(&mut image).unwrap();
        } else if read(&image).is_none() {
            // Still found at the last known place: the command moves it.
            let at = usize::try_from(old.superblock.0).unwrap();
            let sb = Superblock::from_disk(&image.bytes[at..at + 4096]).unwrap();
            ops::move_internal(&mut image, &old, &new, &sb, &mut |_| Ok(())).unwrap();
        }
        check(&mut image);
    });
}

#[test]
fn a_move_cut_anywhere_can_be_completed() {
    moved(4 * MIB, 5 * MIB, &TORN);
    moved(4 * MIB, 4 * MIB + 4096, &TORN);
    moved(4 * MIB, 4 * MIB + 20 * 4096, &TORN);
}

#[test]
fn a_move_across_a_bitmap_block_keeps_the_bits() {
    moved(127 * MIB, 130 * MIB, &[]);
    moved(128 * MIB - 4096, 128 * MIB + 4096, &[]);
}

#[test]
fn a_move_into_the_data_is_refused() {
    let mut start = used(128 * MIB, AlGeometry::default(), Flags::CONSISTENT, 0, 1);
    let (sb, old) = read(&start).unwrap();
    assert_eq!(sb.la_size, SectorCount(262_064));
    start.bytes.resize(128 * MIB + 512, 0);
    let new = layout(start.bytes.len() as u64, sb.al);
    let mut recorder = Recorder::new(start);
    let refused = ops::move_internal(&mut recorder, &old, &new, &sb, &mut |_| Ok(()));
    assert!(refused.is_err() && recorder.steps.is_empty());
}

/// A device of 0.7: its superblock, and that it has generation counters of 1.
fn of_07(size: usize, at: u64) -> Memory {
    let mut memory = Memory::zeroed(size);
    let mut block = [0; 4096];
    block[0..8].copy_from_slice(&100u64.to_be_bytes());
    block[8..12].copy_from_slice(&1u32.to_be_bytes());
    for counter in 0..4 {
        block[12 + counter * 4..16 + counter * 4].copy_from_slice(&1u32.to_be_bytes());
    }
    block[28..32].copy_from_slice(&0x8374_026Au32.to_be_bytes());
    memory.write_at(ByteOffset(at), &block).unwrap();
    memory
}

#[test]
fn a_conversion_is_old_or_new() {
    let size = 130 * MIB;
    let new_layout = layout(size as u64, AlGeometry::default());
    for fixed in [true, false] {
        let old_at = if fixed {
            fixed_superblock(ByteLen(size as u64)).unwrap()
        } else {
            new_layout.superblock
        };
        let start = of_07(size, old_at.0);
        let place = usize::try_from(old_at.0).unwrap();
        let old = OldSuperblock::from_disk(&start.bytes[place..place + 4096]).unwrap();
        let new = old.convert(&new_layout);
        let mut recorder = Recorder::new(start.clone());
        ops::convert(&mut recorder, &new_layout, &new, fixed.then_some(old_at)).unwrap();
        let mut seen = [0; 2];
        // Both superblocks are small: all cuts inside them are tried by hand.
        let mut image = start.clone();
        for step in &recorder.steps {
            let Step::Write(at, data) = step else { continue };
            for done in (0..=4096).step_by(512) {
                image.write_at(*at, &data[..done]).unwrap();
                let is_old =
                    OldSuperblock::from_disk(&image.bytes[place..place + 4096]) == Some(old);
                match read(&image) {
                    Some((sb, _)) => assert_eq!(sb, new),
                    None => assert!(is_old, "neither old nor new"),
                }
                seen[usize::from(read(&image).is_some())] += 1;
            }
        }
        assert!(seen.iter().all(|n| *n > 0), "{seen:?}");
        assert!(
            image == recorder.memory && read(&image).unwrap().0.current.0 == 0x1_0001_0002_BABE
        );
    }
}

/// There is no checksum in a superblock. Whatever places something is cross-checked, so that no
/// flip there is believed; every other flip changes its own field and nothing else.
#[test]
fn superblock_flips_are_noticed_or_change_only_their_field() {
    let mut memory = used(4 * MIB, AlGeometry::default(), Flags::CONSISTENT, 0, 1);
    let (sb, layout) = read(&memory).unwrap();
    let start = usize::try_from(layout.superblock.0).unwrap();
    let mut counts = [0; 3];
    for bit in 0..4096 * 8 {
        memory.bytes[start + bit / 8] ^= 1 << (bit % 8);
        let got = read(&memory);
        let mut mended = got.map_or(sb, |(got, _)| got);
        match bit / 8 {
            0..8 => mended.la_size = sb.la_size,
            8..16 => mended.current = sb.current,
            16..24 => mended.bitmap = sb.bitmap,
            24..32 => mended.history[0] = sb.history[0],
            32..40 => mended.history[1] = sb.history[1],
            40..48 => mended.device_uuid = sb.device_uuid,
            56..60 => mended.flags = sb.flags,
            72..76 => mended.al_nr_extents = sb.al_nr_extents,
            84..88 => mended.la_peer_max_bio_size = sb.la_peer_max_bio_size,
            _ => {}
        }
        assert_eq!(mended, sb, "byte {}: another field", bit / 8);
        match bit / 8 {
            // Free values: believed, as nothing contradicts them.
            0..48 | 56..60 | 72..76 | 84..88 => {
                assert_ne!(got.unwrap().0, sb, "byte {}", bit / 8);
                counts[0] += 1;
            }
            // Reserved: harmless.
            48..56 | 96.. => {
                assert_eq!(got.unwrap(), (sb, layout), "byte {}", bit / 8);
                counts[1] += 1;
            }
            // The two magic numbers differ in three bits, so no flip makes one the other.
            _ => {
                assert!(got.is_none(), "byte {}", bit / 8);
                counts[2] += 1;
            }
        }
        memory.bytes[start + bit / 8] ^= 1 << (bit % 8);
    }
    // Free, harmless, noticed.
    assert_eq!(counts, [60 * 8, 4008 * 8, 28 * 8]);
}

/// In every block of a ring, every flip makes that block unreadable, and nothing else happens
/// than what a torn block causes.
#[test]
fn ring_flips_count_as_torn_blocks() {
    let mut memory = used(4 * MIB, AlGeometry::default(), Flags::PRIMARY, 0, 20);
    let (sb, layout) = read(&memory).unwrap();
    let whole = replay(&mut memory, &layout, &sb).unwrap();
    let Outcome::Updates(all) = &whole.outcome else { panic!("{whole:?}") };
    let mut torn = memory.clone();
    for t in 0..8 {
        let at = layout.al_block(t);
        torn.write_at(at, &[0; 4096]).unwrap();
        let want = replay(&mut torn, &layout, &sb).unwrap();
        let at = usize::try_from(at.0).unwrap();
        torn.bytes[at..at + 4096].copy_from_slice(&memory.bytes[at..at + 4096]);
        // All bits of the head, and some of every part behind it.
        for bit in (0..256).chain((256..32_768).step_by(61)) {
            memory.bytes[at + bit / 8] ^= 1 << (bit % 8);
            let got = replay(&mut memory, &layout, &sb).unwrap();
            assert_eq!((got.bad, &got.outcome), (1, &want.outcome), "block {t} bit {bit}");
            memory.bytes[at + bit / 8] ^= 1 << (bit % 8);
        }
        // The newest block alone may take an extent with it: then no data was written under it.
        let Outcome::Updates(left) = &want.outcome else { panic!("{want:?}") };
        let is_newest = t == 19 % 8;
        assert!(is_newest || all.iter().all(|e| left.contains(e)), "block {t}");
    }
}
