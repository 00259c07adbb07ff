//! Deliberate bugs in the engine are found, each within a stated number of seeds and by the check
//! that is meant to find it. The same seed is fine without the bug.

use drbd_core::plant::{Bug, plant};
use drbd_sim::scenario::Scenario;
use drbd_sim::shrink::judge;

/// Runs seeds until one shows the bug.
fn found(bug: Bug, scenario: fn(u64) -> Scenario, within: u64, by: &[&str]) {
    std::panic::set_hook(Box::new(|_| {}));
    let violation = |seed, bug| {
        plant(bug);
        let verdict = judge(&scenario(seed), false);
        plant(None);
        verdict.violation
    };
    let at = (0..within).find_map(|seed| {
        let found = violation(seed, Some(bug)).filter(|found| by.contains(&found.kind))?;
        violation(seed, None).is_none().then_some((seed, found))
    });
    let _ = std::panic::take_hook();
    match at {
        Some((seed, violation)) => println!("{bug:?}: seed {seed}, {}", violation.kind),
        None => panic!("{bug:?} is not found by {within} seeds"),
    }
}

macro_rules! mutants {
    ($($name:ident: $bug:ident within $seeds:literal seeds of $scenario:ident by $($by:literal),+;)*) => {
        $(#[test]
        fn $name() {
            found(Bug::$bug, Scenario::$scenario, $seeds, &[$($by),+]);
        })*

        #[test]
        fn every_bug_has_its_test() {
            let tested = [$(Bug::$bug),*];
            for bug in Bug::ALL {
                assert!(tested.contains(&bug), "{bug:?}");
            }
        }
    };
}

mutants! {
    write_acknowledged_early: AcknowledgeEarly within 10 seeds of new by "copies";
    activity_log_skipped: SkipActivityLog within 20 seeds of new by "uncovered";
    bits_cleared_too_soon: ClearTooSoon within 10 seeds of new by "unmarked";
    barrier_forgotten: ForgetBarrier within 10 seeds of new by "stuck";
    older_data_over_newer: WrongDirection within 10 seeds of new by "lost";
    bits_of_the_peer_ignored: IgnorePeerBits within 10 seeds of new by "unmarked", "lost";
    references_dropped_early: DropReferencesEarly within 10 seeds of new by "audit";
    generation_kept: KeepGeneration within 10 seeds of new by "lost";
    marks_forgotten: ForgetToMark within 10 seeds of new by "lost", "differ", "unmarked";
    partly_written_blocks_cleared: ClearPartly within 130 seeds of new by "unmarked", "lost";
    flush_skipped: SkipFlush within 140 seeds of new by "uncovered", "unmarked", "differ";
    buffer_leaked: LeakBuffer within 10 seeds of new by "leak";
    completed_twice: CompleteTwice within 10 seeds of new by "twice";
    overlapping_writes_mixed: MixOverlapping within 30 seeds of new by "uncovered", "differ";
    locks_of_a_resync_ignored: IgnoreLocks within 20 seeds of new by "audit";
    never_thawed: NeverThaw within 10 seeds of new by "stuck";
    stale_blocks_read: ReadStale within 10 seeds of primary_as_target by "audit", "read";
    error_of_the_peer_hidden: HideWriteError within 90 seeds of new by "copies", "unmarked";
}
