//! Running a scenario to its verdict, and making a failing one smaller.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::run::{Run, Violation};
use crate::scenario::Scenario;
use crate::world::Faults;

/// What came of a run.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// What is wrong, if anything.
    pub violation: Option<Violation>,
    /// Steps that it took.
    pub steps: u64,
    /// What happened, if it was asked for.
    pub trace: Vec<String>,
}

/// Runs a scenario.
pub fn judge(scenario: &Scenario, with_trace: bool) -> Verdict {
    let mut run = Run::new(scenario);
    if with_trace {
        run.world.trace = Some(Vec::new());
    }
    let result = catch_unwind(AssertUnwindSafe(|| run.all(scenario)));
    let violation = match result {
        Ok(Ok(())) => None,
        Ok(Err(violation)) => Some(violation),
        Err(panic) => {
            let text = panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
                .unwrap_or_default();
            Some(Violation { kind: "panic", text })
        }
    };
    let trace = run.world.trace.take().unwrap_or_default();
    Verdict { violation, steps: run.world.steps, trace }
}

/// A smaller scenario that fails in the same way. Takes at most so many runs.
pub fn shrink(scenario: &Scenario, kind: &str, mut runs: u32) -> Scenario {
    let mut best = scenario.clone();
    let mut fails = |candidate: &Scenario| {
        if runs == 0 {
            return false;
        }
        runs -= 1;
        judge(candidate, false).violation.is_some_and(|v| v.kind == kind)
    };
    // Faults first: they make everything else hard to follow.
    let none = Faults { stall: best.setup.faults.stall, ..Faults::NONE };
    let all = best.setup.faults;
    let candidates = [
        none,
        Faults { write_error: 0, ..all },
        Faults { read_error: 0, ..all },
        Faults { meta_error: 0, ..all },
        Faults { slow_disk: 0, ..all },
        Faults { reset: 0, ..all },
        Faults { slow_net: 0, ..all },
        Faults { stray: 0, ..all },
    ];
    for faults in candidates {
        let merged = merge(best.setup.faults, faults);
        if merged != best.setup.faults {
            let mut candidate = best.clone();
            candidate.setup.faults = merged;
            if fails(&candidate) {
                best = candidate;
            }
        }
    }
    let mut piece = best.ops.len().div_ceil(2).max(1);
    loop {
        let mut at = 0;
        let mut has_changed = false;
        while at < best.ops.len() {
            let end = (at + piece).min(best.ops.len());
            let mut candidate = best.clone();
            candidate.ops.drain(at..end);
            if fails(&candidate) {
                best = candidate;
                has_changed = true;
            } else {
                at = end;
            }
        }
        if piece == 1 && !has_changed {
            return best;
        }
        piece = if piece == 1 { 1 } else { piece.div_ceil(2) };
    }
}

fn merge(a: Faults, b: Faults) -> Faults {
    Faults {
        write_error: a.write_error.min(b.write_error),
        read_error: a.read_error.min(b.read_error),
        meta_error: a.meta_error.min(b.meta_error),
        slow_disk: a.slow_disk.min(b.slow_disk),
        stall: a.stall,
        reset: a.reset.min(b.reset),
        slow_net: a.slow_net.min(b.slow_net),
        stray: a.stray.min(b.stray),
    }
}
