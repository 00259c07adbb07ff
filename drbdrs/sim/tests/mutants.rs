//! Deliberate bugs in the engine are found, each within a stated number of seeds.

use drbd_core::plant::{Bug, plant};
use drbd_sim::scenario::Scenario;
use drbd_sim::shrink::judge;

/// Runs seeds until one fails.
fn found(bug: Bug, within: u64) {
    std::panic::set_hook(Box::new(|_| {}));
    let violation = |seed, bug| {
        plant(bug);
        let verdict = judge(&Scenario::new(seed), false);
        plant(None);
        verdict.violation
    };
    // The same seed is fine without the bug.
    let at = (0..within).find_map(|seed| {
        let found = violation(seed, Some(bug))?;
        violation(seed, None).is_none().then_some((seed, found))
    });
    let _ = std::panic::take_hook();
    match at {
        Some((seed, violation)) => println!("{bug:?}: seed {seed}, {}", violation.kind),
        None => panic!("{bug:?} is not found by {within} seeds"),
    }
}

macro_rules! mutants {
    ($($name:ident: $bug:ident within $seeds:literal;)*) => {
        $(#[test]
        fn $name() {
            found(Bug::$bug, $seeds);
        })*
    };
}

mutants! {
    activity_log_skipped: SkipActivityLog within 20;
    barrier_forgotten: ForgetBarrier within 10;
    older_data_over_newer: WrongDirection within 10;
    bits_of_the_peer_ignored: IgnorePeerBits within 10;
    generation_kept: KeepGeneration within 10;
    marks_forgotten: ForgetToMark within 10;
    partly_written_blocks_cleared: ClearPartly within 130;
    buffer_leaked: LeakBuffer within 10;
    completed_twice: CompleteTwice within 10;
    overlapping_writes_mixed: MixOverlapping within 20;
    never_thawed: NeverThaw within 10;
}
