//! Deliberate bugs in the engine are found, each within a stated number of seeds.

use drbd_core::plant::{Bug, plant};
use drbd_sim::scenario::Scenario;
use drbd_sim::shrink::judge;

/// Runs seeds until one fails.
fn found(bug: Bug, within: u64) {
    std::panic::set_hook(Box::new(|_| {}));
    plant(Some(bug));
    let at = (0..within).find_map(|seed| {
        judge(&Scenario::new(seed), false).violation.map(|violation| (seed, violation))
    });
    plant(None);
    let _ = std::panic::take_hook();
    match at {
        Some((seed, violation)) => {
            // The same seed is fine without the bug.
            let clean = judge(&Scenario::new(seed), false).violation;
            assert_eq!(clean, None, "seed {seed} fails without {bug:?} too");
            println!("{bug:?}: seed {seed}, {}", violation.kind);
        }
        None => panic!("{bug:?} is not found by {within} seeds"),
    }
}

macro_rules! mutants {
    ($($name:ident: $bug:ident within $seeds:literal;)*) => {
        $(#[test]
        fn $name() {
            found(Bug::$bug, $seeds);
        })*

        #[test]
        fn every_bug_has_its_test() {
            let here = [$(Bug::$bug),*];
            assert!(Bug::ALL.iter().all(|bug| here.contains(bug)));
        }
    };
}

mutants! {
    acknowledged_early: AcknowledgeEarly within 30;
    activity_log_skipped: SkipActivityLog within 30;
    bits_cleared_too_soon: ClearTooSoon within 30;
    barrier_forgotten: ForgetBarrier within 30;
    older_data_over_newer: WrongDirection within 30;
    bits_of_the_peer_ignored: IgnorePeerBits within 30;
    references_dropped_early: DropReferencesEarly within 30;
    generation_kept: KeepGeneration within 30;
    marks_forgotten: ForgetToMark within 30;
    partly_written_blocks_cleared: ClearPartly within 30;
    flush_skipped: SkipFlush within 30;
    buffer_leaked: LeakBuffer within 30;
    completed_twice: CompleteTwice within 30;
    overlapping_writes_mixed: MixOverlapping within 30;
    locks_ignored: IgnoreLocks within 30;
    never_thawed: NeverThaw within 30;
    stale_data_read: ReadStale within 30;
    write_error_hidden: HideWriteError within 30;
}
