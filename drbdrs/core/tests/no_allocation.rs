//! The paths of every write allocate nothing, or next to nothing, once the tables have their size.
//!
//! One counting allocator for the whole program; only what the measuring thread does is counted.

#![expect(unsafe_code, reason = "an allocator can not be written without")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::BTreeMap;

use drbd_core::al::{ActivityLog, GetResult};
use drbd_core::config::DiskConfig;
use drbd_core::interval::Intervals;
use drbd_sim::script::{Script, ScriptDisk};
use drbd_types::{AlExtentNr, Dstate, Gi, Sector, SectorCount, SectorRange};
use drbdmeta::layout::{AlGeometry, Placement};
use drbdmeta::superblock::Flags;
use drbdmeta::units::ByteLen;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
    static IN_USE: Cell<i64> = const { Cell::new(0) };
    static MOST: Cell<i64> = const { Cell::new(0) };
}

/// Bytes are taken or given back.
fn note(layout: Layout, sign: i64) {
    let bytes = i64::try_from(layout.size()).unwrap_or(i64::MAX);
    IN_USE.set(IN_USE.get() + sign * bytes);
    MOST.set(MOST.get().max(IN_USE.get()));
}

struct Counting;

// SAFETY: every call goes on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.set(COUNT.get() + 1);
        note(layout, 1);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        note(layout, -1);
        // SAFETY: `at` came from `alloc` above, with this layout.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// How often memory is asked for meanwhile.
fn allocations(work: impl FnOnce()) -> u64 {
    let before = COUNT.get();
    work();
    COUNT.get() - before
}

/// The most bytes that are in use meanwhile, beyond those before.
fn memory(work: impl FnOnce()) -> i64 {
    let before = IN_USE.get();
    MOST.set(before);
    work();
    MOST.get() - before
}

#[test]
fn the_allocator_counts() {
    assert_eq!(allocations(|| drop(std::hint::black_box(Box::new(1)))), 1);
}

/// Its bitmap has 512 MiB on disk.
#[test]
fn a_clean_device_of_16_tib_takes_little_memory() {
    let sectors = 16 << 31;
    let disk = ScriptDisk::new(
        sectors,
        |sb| {
            sb.la_size = SectorCount(sectors);
            sb.current = Gi(0x1111_0000);
            sb.flags |= Flags::CONSISTENT | Flags::WAS_UP_TO_DATE;
        },
        [],
    );
    let mut script = Script::new(BTreeMap::from([(0, disk)]));
    let begin = std::time::Instant::now();
    let bytes = memory(|| script.attach(0, DiskConfig::default()));
    println!("{bytes} bytes, {:?}", begin.elapsed());
    assert_eq!(script.state(0).disk, Dstate::UpToDate);
    assert!(bytes < 4 << 20, "{bytes} bytes");
}

#[test]
fn activity_log() {
    let layout = drbdmeta::layout::Layout::for_new(
        Placement::FlexExternal,
        ByteLen(1 << 20),
        AlGeometry::default(),
    );
    let mut log = ActivityLog::new(1237);
    log.set_layout(layout.expect("1 MiB is enough"));
    let count = allocations(|| {
        // More extents than slots, in steps that spread over the hash table.
        for round in 0..200u32 {
            let extents = (0..30).map(|n| AlExtentNr(round * 30 + n * 7919));
            for extent in extents.clone() {
                let got = log.get_for_change(extent);
                assert!(!matches!(got, GetResult::Refused(_)), "extent {extent}: {got:?}");
            }
            assert!(log.evicted_pages().count() <= 30);
            let _block = log.transaction();
            log.commit();
            for extent in extents {
                assert!(log.get_hot(extent) && !log.put(extent) && log.put(extent));
            }
        }
    });
    assert_eq!(count, 0);
}

/// The sorted set splits and joins its nodes now and then, but most writes cause nothing.
#[test]
fn writes_in_progress_cause_less_than_one_in_ten() {
    let write = |n: u64| {
        let place = n.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
        SectorRange::new(Sector(place), SectorCount(8)).expect("small numbers")
    };
    for depth in [1, 8, 32, 128, 1024] {
        let mut intervals = Intervals::new();
        let count = allocations(|| {
            for n in 0..10_000 {
                assert!(intervals.insert(write(n), n));
                assert_eq!(intervals.overlapping(write(n)).count(), 1);
                if n >= depth {
                    assert!(intervals.remove(write(n - depth), n - depth));
                }
            }
        });
        assert!(count < 1000, "depth {depth}: {count} for 10000 writes");
    }
}
