//! The paths of every write allocate nothing, or next to nothing, once the tables have their size.
//!
//! One counting allocator for the whole program; only what the measuring thread does is counted.

#![expect(unsafe_code, reason = "an allocator can not be written without")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use drbd_core::al::{ActivityLog, GetResult};
use drbd_core::interval::Intervals;
use drbd_types::{AlExtentNr, Sector, SectorCount, SectorRange};
use drbdmeta::layout::{AlGeometry, Placement};
use drbdmeta::units::ByteLen;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: every call goes on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.set(COUNT.get() + 1);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
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

#[test]
fn the_allocator_counts() {
    assert_eq!(allocations(|| drop(std::hint::black_box(Box::new(1)))), 1);
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
