//! Whether a resync steps aside because the disk has other work (`c-min-rate`).
//!
//! The original compares the counters of the whole backing device with its own; here the volume
//! counts its own application I/O, so that other users of the same disk do not slow a resync down
//! for no gain of this volume. Spec: io-path-and-resync.md §8.6.

use drbd_types::SectorCount;

/// More than this since the last look, and the disk counts as busy.
const BUSY_ABOVE: u64 = 64;

/// Counts what is not resync, verify or bitmap.
#[derive(Clone, Copy, Debug, Default)]
pub struct Throttle {
    /// Since the last look.
    other: u64,
}

/// What a look needs to know.
#[derive(Clone, Copy, Debug)]
pub struct Look {
    /// Does a request of the application wait for the activity log?
    pub waiting_for_log: bool,
    /// `c-min-rate`, KiB/s; 0: never step aside.
    pub c_min_rate: u32,
    /// The speed of the last seconds, KiB/s: [`super::progress::Progress::recent_speed`].
    pub speed: u64,
}

impl Throttle {
    /// Reads and writes of the application, on this disk.
    pub fn on_other_io(&mut self, sectors: SectorCount) {
        self.other = self.other.saturating_add(sectors.0);
    }

    /// Must the resync wait? Each look begins a new count.
    pub fn look(&mut self, look: Look) -> bool {
        let other = core::mem::take(&mut self.other);
        let busy = look.waiting_for_log || other > BUSY_ABOVE;
        busy && look.c_min_rate > 0 && look.speed > u64::from(look.c_min_rate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(other: u64, waiting_for_log: bool, c_min_rate: u32, speed: u64) -> bool {
        let mut throttle = Throttle::default();
        throttle.on_other_io(SectorCount(other));
        throttle.look(Look { waiting_for_log, c_min_rate, speed })
    }

    #[test]
    fn steps_aside_only_if_busy_and_faster_than_promised() {
        // other sectors, waits for the log, c-min-rate, speed: result
        let rows = [
            (0, false, 250, 9999, false),
            (64, false, 250, 9999, false),
            (65, false, 250, 9999, true),
            (65, false, 250, 251, true),
            (65, false, 250, 250, false),
            (0, true, 250, 251, true),
            (0, true, 250, 250, false),
            (u64::MAX, true, 0, u64::MAX, false),
            (65, false, 1, 0, false),
        ];
        for (other, waits, rate, speed, expected) in rows {
            assert_eq!(look(other, waits, rate, speed), expected, "{other} {waits} {rate} {speed}");
        }
    }

    #[test]
    fn each_look_begins_a_new_count() {
        let mut throttle = Throttle::default();
        let ask = Look { waiting_for_log: false, c_min_rate: 1, speed: 2 };
        throttle.on_other_io(SectorCount(40));
        assert!(!throttle.look(ask));
        throttle.on_other_io(SectorCount(40));
        assert!(!throttle.look(ask), "40, not 80");
        throttle.on_other_io(SectorCount(40));
        throttle.on_other_io(SectorCount(40));
        assert!(throttle.look(ask));
        assert!(!throttle.look(ask));
        throttle.on_other_io(SectorCount(u64::MAX));
        throttle.on_other_io(SectorCount(u64::MAX));
        assert!(throttle.look(ask), "no overflow");
    }
}
