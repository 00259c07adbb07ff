//! When it pays to look out for an answer instead of sleeping.
//!
//! Waking a processor that sleeps takes tens of microseconds where there is a hypervisor, more than
//! everything else that a small write needs. While two nodes answer each other at once, their threads
//! stay awake for [`LIMIT`] after each step. An idle node sleeps, and so does one that was kept
//! waiting [`PATIENCE`] times in a row: each time that happens doubles the number of short waits that
//! must come before the next try.

use std::num::NonZero;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::available_parallelism;
use std::time::Duration;

/// How long it looks out: about what the two wake-ups cost that it saves.
pub(super) const LIMIT: Duration = Duration::from_micros(50);
/// A wait that sleeping made longer, and that was short nevertheless.
const SHORT: Duration = Duration::from_micros(150);
/// So many short waits come before a try.
const ROW_MIN: u32 = 8;
const ROW_MAX: u32 = 4096;
/// So often in a row in vain: the scheduler needs some rounds to let those who sleep share a
/// processor and to leave the other one to those who do not.
const PATIENCE: u32 = 4;

/// The threads that look out now: never more than half of the processors.
static LOOKING: AtomicUsize = AtomicUsize::new(0);

/// What is known about the waits of one thread.
#[derive(Debug)]
pub(super) struct Spin {
    /// Short waits, one after the other.
    row: u32,
    /// So many are needed.
    needed: u32,
    /// Tries in vain, one after the other.
    in_vain: u32,
}

/// Permission to look out.
pub(super) struct Looking(());

impl Drop for Looking {
    fn drop(&mut self) {
        LOOKING.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Spin {
    pub(super) const fn new() -> Self {
        Self { row: 0, needed: ROW_MIN, in_vain: 0 }
    }

    /// Is it worth a try?
    pub(super) fn begin(&self) -> Option<Looking> {
        static PROCESSORS: OnceLock<usize> = OnceLock::new();
        if self.row < self.needed {
            return None;
        }
        let all = *PROCESSORS.get_or_init(|| available_parallelism().map_or(1, NonZero::get));
        let looking = Looking(());
        (LOOKING.fetch_add(1, Ordering::Relaxed) < all / 2).then_some(looking)
    }

    /// It was tried.
    pub(super) const fn tried(&mut self, was_seen: bool) {
        if was_seen {
            self.in_vain = 0;
            if self.needed > ROW_MIN {
                self.needed -= 1;
            }
            return;
        }
        self.in_vain += 1;
        if self.in_vain == PATIENCE {
            (self.in_vain, self.row) = (0, 0);
            self.needed = if self.needed < ROW_MAX { self.needed * 2 } else { ROW_MAX };
        }
    }

    /// It was not tried, and this is how long the wait was.
    pub(super) fn slept(&mut self, waited: Duration) {
        self.row = if waited <= SHORT { self.row.saturating_add(1) } else { 0 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn short_waits(spin: &mut Spin) -> u32 {
        let mut waits = 0;
        while spin.row < spin.needed {
            spin.slept(LIMIT);
            waits += 1;
        }
        waits
    }

    #[test]
    fn only_short_waits_lead_to_a_try_and_each_in_vain_needs_more_of_them() {
        let mut spin = Spin::new();
        assert_eq!(short_waits(&mut spin), ROW_MIN);
        spin.tried(true);
        assert_eq!(short_waits(&mut spin), 0, "it goes on as long as it pays");
        (1..PATIENCE).for_each(|_| spin.tried(false));
        assert_eq!(short_waits(&mut spin), 0);
        spin.tried(false);
        assert_eq!(short_waits(&mut spin), 2 * ROW_MIN);
        (0..20 * PATIENCE).for_each(|_| spin.tried(false));
        assert_eq!(short_waits(&mut spin), ROW_MAX);
        (0..ROW_MAX).for_each(|_| spin.tried(true));
        spin.slept(SHORT + LIMIT);
        assert_eq!(short_waits(&mut spin), ROW_MIN);
    }

    #[test]
    fn not_all_processors_look_out() {
        let spin = Spin { row: ROW_MIN, ..Spin::new() };
        let all = available_parallelism().map_or(1, NonZero::get);
        let looking: Vec<_> = (0..2 * all).filter_map(|_| spin.begin()).collect();
        assert_eq!(looking.len(), all / 2);
        drop(looking);
        assert_eq!(spin.begin().is_some(), all > 1);
    }
}
