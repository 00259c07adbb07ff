//! How far a resync or verify is: what the status shows, and the lines at its end.
//!
//! The roundings are the original's, also where they look odd (small devices seem to be done
//! early): programs compare these numbers. Nothing here panics or wraps, even if the clock of the
//! caller stands still or more bits are set than there were at the beginning.
//! Spec: io-path-and-resync.md §8.9, §8.12, §8.13; status-and-integration.md §1.5.

use core::fmt;

use drbd_types::{BitCount, Tick};

const MARKS: usize = 8;
const MICROS_PER_SECOND: u64 = 1_000_000;
/// Marks are at least this far apart.
const MARK_DISTANCE: u64 = 3 * MICROS_PER_SECOND;
/// Verify sets marks only while the number of blocks left has this bit.
const VERIFY_MARK_BIT: u64 = 1 << 9;
/// Without any mark for this many seconds the resync counts as stalled.
const STALLED_ABOVE: u64 = 180;
/// From this many bits on amounts are shown in MiB: 4 GiB.
const SHOWN_IN_MIB_ABOVE: u64 = 1 << 20;
const KIB_PER_BIT: u64 = 4;

#[derive(Clone, Copy, Debug)]
struct Mark {
    at: Tick,
    left: u64,
}

/// One run of a resync or verify.
#[derive(Clone, Debug)]
pub struct Progress {
    total: u64,
    started: Tick,
    marks: [Mark; MARKS],
    last: usize,
    /// Microseconds of finished pauses.
    paused: u64,
    /// Is it paused now?
    pausing: bool,
}

/// What is to be synced still. Failed blocks keep their bits but are not tried again.
#[must_use]
pub const fn left_to_sync(set: BitCount, failed: BitCount) -> BitCount {
    BitCount(set.0.saturating_sub(failed.0))
}

/// Unit of the amounts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AmountUnit {
    /// KiB, letter `K`.
    Kib,
    /// MiB, letter `M`; the values are multiples of 4.
    Mib,
}

/// A moment of a run in numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shown {
    /// Done, of 1000.
    pub permille: u32,
    /// Left, in `unit`.
    pub left: u64,
    /// All of it, in `unit`.
    pub total: u64,
    /// Of both.
    pub unit: AmountUnit,
    /// Estimated seconds to go.
    pub finish: u64,
    /// KiB/s of about the last twenty seconds.
    pub speed: u64,
    /// KiB/s since the start, without pauses.
    pub average: u64,
    /// Has nothing moved for three minutes?
    pub stalled: bool,
}

impl Shown {
    /// How far the bar reaches, 0 to 20.
    #[must_use]
    pub const fn bar(&self) -> u32 {
        self.permille / 50
    }
}

/// The same moment for programs, without the roundings for people.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Detail {
    /// Bits at the beginning.
    pub total: u64,
    /// Bits left, at most `total`.
    pub left: u64,
    /// Milliseconds since the start, pauses included.
    pub elapsed_ms: u64,
    /// Milliseconds of pauses.
    pub paused_ms: u64,
    /// KiB/s of the last three to six seconds.
    pub recent: u64,
    /// Milliseconds and bits of the last three to six seconds.
    pub short: (u64, u64),
    /// Milliseconds and bits of about the last twenty seconds.
    pub long: (u64, u64),
}

/// The numbers of the line at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finished {
    /// Seconds since the start, with pauses.
    pub total: u64,
    /// Seconds of pauses.
    pub paused: u64,
    /// KiB/s without pauses.
    pub rate: u64,
}

impl Progress {
    /// A run over so many blocks begins.
    #[must_use]
    pub const fn begin(now: Tick, total: BitCount) -> Self {
        Self {
            total: total.0,
            started: now,
            marks: [Mark { at: now, left: total.0 }; MARKS],
            last: 0,
            paused: 0,
            pausing: false,
        }
    }

    /// When the run began.
    #[cfg(any(test, feature = "check"))]
    pub(crate) const fn started(&self) -> Tick {
        self.started
    }

    /// Blocks that the run is about.
    #[must_use]
    pub const fn total(&self) -> BitCount {
        BitCount(self.total)
    }

    /// Bits were cleared.
    pub fn on_cleared(&mut self, now: Tick, left: BitCount) {
        let last = self.mark(0);
        let far = now.0 >= last.at.0.saturating_add(MARK_DISTANCE);
        if !far || left.0 == last.left || self.pausing {
            return;
        }
        self.last = (self.last + 1) % MARKS;
        if let Some(mark) = self.marks.get_mut(self.last) {
            *mark = Mark { at: now, left: left.0 };
        }
    }

    /// Blocks were compared.
    pub fn on_verified(&mut self, now: Tick, left: BitCount) {
        if left.0 & VERIFY_MARK_BIT != 0 {
            self.on_cleared(now, left);
        }
    }

    /// The run pauses.
    pub fn pause(&mut self, now: Tick) {
        if !self.pausing {
            self.pausing = true;
            if let Some(mark) = self.marks.get_mut(self.last) {
                mark.at = now;
            }
        }
    }

    /// It goes on.
    pub fn resume(&mut self, now: Tick) {
        if self.pausing {
            self.paused = self.paused_at(now);
            self.pausing = false;
        }
    }

    /// KiB/s of the last three to six seconds, for `c-min-rate`. Spec: io-path §8.6.
    #[must_use]
    pub fn recent_speed(&self, now: Tick, left: BitCount) -> u64 {
        // The mark before the most recent one.
        self.since_mark(MARKS - 1, now, left.0).speed()
    }

    /// The numbers of the status.
    #[must_use]
    pub fn shown(&self, now: Tick, left: BitCount) -> Shown {
        let (left, permille) = self.permille(left.0);
        let unit = if self.total > SHOWN_IN_MIB_ABOVE { AmountUnit::Mib } else { AmountUnit::Kib };
        // Six marks back: the oldest one that is not about to be overwritten.
        let since = self.since_mark(2, now, left);
        let done = self.total.saturating_sub(left);
        Shown {
            permille,
            left: amount(left, unit),
            total: amount(self.total, unit),
            unit,
            finish: since.seconds.saturating_mul(left / (since.done / 100 + 1)) / 100,
            speed: since.speed(),
            average: (done / self.active_seconds(now)).saturating_mul(KIB_PER_BIT),
            stalled: since.stalled,
        }
    }

    /// The same moment, not rounded.
    #[must_use]
    pub fn detail(&self, now: Tick, left: BitCount) -> Detail {
        let millis = |from: Tick| now.0.saturating_sub(from.0) / 1000;
        let left = left.0.min(self.total);
        let window = |ahead| {
            let mark = self.mark(ahead);
            (millis(mark.at), mark.left.saturating_sub(left))
        };
        Detail {
            total: self.total,
            left,
            elapsed_ms: millis(self.started),
            paused_ms: self.paused_at(now) / 1000,
            recent: self.recent_speed(now, BitCount(left)),
            short: window(MARKS - 1),
            long: window(2),
        }
    }

    /// The numbers of the line `Resync done (...)`.
    #[must_use]
    pub fn finished(&self, now: Tick) -> Finished {
        let paused = self.paused_at(now) / MICROS_PER_SECOND;
        let active = self.active_seconds(now);
        Finished {
            total: active.saturating_add(paused),
            paused,
            rate: (self.total / active).saturating_mul(KIB_PER_BIT),
        }
    }

    fn permille(&self, left: u64) -> (u64, u32) {
        if left > self.total {
            return (self.total, if self.total == 0 { 1000 } else { 0 });
        }
        let shift = if self.total > u64::from(u32::MAX) { 16 } else { 10 };
        let open = (left >> shift) * 1000 / (1 + (self.total >> shift));
        (left, 1000 - u32::try_from(open).unwrap_or(1000).min(1000))
    }

    /// The mark so many places behind the last one, in the ring.
    fn mark(&self, ahead: usize) -> Mark {
        let index = (self.last + ahead) % MARKS;
        self.marks.get(index).copied().unwrap_or(Mark { at: self.started, left: self.total })
    }

    fn since_mark(&self, ahead: usize, now: Tick, left: u64) -> Since {
        let mark = self.mark(ahead);
        let seconds = whole_seconds(mark.at, now);
        Since {
            seconds: seconds.max(1),
            // More may be left than at the mark: new differences were found meanwhile.
            done: mark.left.saturating_sub(left),
            stalled: seconds > STALLED_ABOVE,
        }
    }

    /// Microseconds of all pauses up to now. The last mark has the beginning of the present one.
    fn paused_at(&self, now: Tick) -> u64 {
        let present = if self.pausing { now.0.saturating_sub(self.mark(0).at.0) } else { 0 };
        self.paused.saturating_add(present)
    }

    /// Whole seconds since the start without pauses, at least one.
    fn active_seconds(&self, now: Tick) -> u64 {
        let all = now.0.saturating_sub(self.started.0);
        (all.saturating_sub(self.paused_at(now)) / MICROS_PER_SECOND).max(1)
    }
}

struct Since {
    seconds: u64,
    done: u64,
    stalled: bool,
}

impl Since {
    fn speed(&self) -> u64 {
        (self.done / self.seconds).saturating_mul(KIB_PER_BIT)
    }
}

fn whole_seconds(from: Tick, to: Tick) -> u64 {
    to.0.saturating_sub(from.0) / MICROS_PER_SECOND
}

fn amount(bits: u64, unit: AmountUnit) -> u64 {
    match unit {
        AmountUnit::Kib => bits.saturating_mul(KIB_PER_BIT),
        AmountUnit::Mib => (bits >> 10) * KIB_PER_BIT,
    }
}

/// What is being ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    /// A resync.
    Resync,
    /// An online verify.
    Verify,
}

/// The log line at the end of a run. Spec: io-path §8.9 step 4, §9.3.
#[derive(Clone, Copy, Debug)]
pub struct DoneLine(pub Run, pub Finished);

impl fmt::Display for DoneLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.0 {
            Run::Resync => "Resync",
            Run::Verify => "Online verify",
        };
        let Finished { total, paused, rate } = self.1;
        write!(f, "{name} done (total {total} sec; paused {paused} sec; {rate} K/sec)")
    }
}

/// The second line of a resync with checksums: of `total` blocks so many needed no data.
#[derive(Clone, Copy, Debug)]
pub struct ChecksumLine {
    /// Blocks whose checksums were equal.
    pub equal: BitCount,
    /// All blocks of the resync.
    pub total: BitCount,
}

impl fmt::Display for ChecksumLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (equal, total) = (self.equal.0.min(self.total.0), self.total.0);
        let percent = (u128::from(equal) * 100).checked_div(u128::from(total)).unwrap_or(0);
        let kib = |bits: u64| u128::from(bits) * u128::from(KIB_PER_BIT);
        write!(
            f,
            "{percent} % had equal checksums, eliminated: {}K; transferred {}K total {}K",
            kib(equal),
            kib(total - equal),
            kib(total)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resync::chance::Chance;
    use alloc::string::ToString;

    fn at(seconds: u64) -> Tick {
        Tick(seconds * MICROS_PER_SECOND)
    }

    fn shown(total: u64, left: u64) -> Shown {
        Progress::begin(at(0), BitCount(total)).shown(at(1), BitCount(left))
    }

    #[test]
    fn permille_keeps_the_coarse_steps() {
        // total, left: permille, bar
        let rows = [
            (56_309, 55_847, 19, 0),  // status-and-integration.md §1.7
            (16_374, 13_638, 188, 3), // same place
            (144, 41, 1000, 20),      // 164 of 576 KiB left. io-path §8.13
            (0, 0, 1000, 20),
            (0, 1, 1000, 20),
            (10, 11, 0, 0),
            (1023, 1023, 1000, 20),
            (1024, 1024, 500, 10),
            (1 << 32, 1 << 32, 1, 0), // shift 16
            (u64::from(u32::MAX), u64::from(u32::MAX), 1, 0),
            (u64::MAX, u64::MAX, 1, 0),
        ];
        for (total, left, permille, bar) in rows {
            let shown = shown(total, left);
            assert_eq!((shown.permille, shown.bar()), (permille, bar), "{left} of {total}");
        }
    }

    #[test]
    fn amounts_are_mib_above_four_gib() {
        let small = shown(1 << 20, 13_638);
        assert_eq!((small.left, small.total, small.unit), (54_552, 4 << 20, AmountUnit::Kib));
        // 6 GiB, recorded as (6044/6140)M.
        let large = shown(1_572_807, 1_547_839);
        assert_eq!((large.left, large.total, large.unit), (6044, 6140, AmountUnit::Mib));
        assert_eq!(shown(10, 99).left, 40, "never more left than there was");
    }

    #[test]
    fn finish_and_speed_of_the_example() {
        // status-and-integration.md §1.7: 462 blocks in 7 seconds, 55847 left.
        let progress = Progress::begin(at(0), BitCount(56_309));
        let shown = progress.shown(at(7), BitCount(55_847));
        assert_eq!((shown.speed, shown.average, shown.finish), (264, 264, 781));
        let shown = progress.shown(at(0), BitCount(56_209));
        assert_eq!((shown.speed, shown.average), (400, 400), "at least one second");
    }

    #[test]
    fn stalled_above_three_minutes() {
        let progress = Progress::begin(at(0), BitCount(100));
        assert!(!progress.shown(at(180), BitCount(100)).stalled);
        assert!(progress.shown(at(181), BitCount(100)).stalled);
    }

    #[test]
    fn marks_are_three_seconds_apart_and_differ() {
        let mut progress = Progress::begin(at(0), BitCount(1000));
        let mut last = |now: u64, left: u64| {
            progress.on_cleared(Tick(now), BitCount(left));
            progress.last
        };
        assert_eq!(last(2_999_999, 900), 0, "too early");
        assert_eq!(last(3_000_000, 1000), 0, "nothing done");
        assert_eq!(last(3_000_000, 900), 1);
        assert_eq!(last(5_999_999, 800), 1);
        for round in 2..10 {
            assert_eq!(last(round * 3_000_000, 900 - round), usize::try_from(round).unwrap() % 8);
        }
    }

    #[test]
    fn verify_marks_need_bit_nine() {
        let mut progress = Progress::begin(at(0), BitCount(4096));
        for (left, last) in [(4095, 1), (3583, 1), (3072, 1), (3071, 2)] {
            progress.on_verified(at(10 * (4096 - left)), BitCount(left));
            assert_eq!(progress.last, last, "{left} left");
        }
    }

    #[test]
    fn speeds_look_back_to_different_marks() {
        let mut progress = Progress::begin(at(0), BitCount(10_000));
        for step in 1..=9 {
            // Faster and faster: step * 30 blocks in three seconds.
            let left = 10_000 - 15 * step * (step + 1);
            progress.on_cleared(at(3 * step), BitCount(left));
        }
        // Last mark: 9. Six before it: 3, at second 9, with 180 done. One before it: 8, 1080 done.
        let now = BitCount(10_000 - 1350);
        assert_eq!(progress.shown(at(27), now).speed, (1350 - 180) / 18 * 4);
        assert_eq!(progress.recent_speed(at(27), now), (1350 - 1080) / 3 * 4);
    }

    #[test]
    fn pauses_are_not_counted_in_the_average() {
        let mut progress = Progress::begin(at(0), BitCount(8182));
        progress.on_cleared(at(10), BitCount(8000));
        progress.pause(at(20));
        progress.pause(at(30));
        progress.on_cleared(at(40), BitCount(7000));
        assert_eq!(progress.last, 1, "no marks while paused");
        assert_eq!(progress.finished(at(100)).paused, 80, "also while it lasts");
        progress.resume(at(480));
        progress.resume(at(500));
        // A recorded line: "total 893 sec; paused 460 sec; 72 K/sec" for 32728 KB.
        let done = progress.finished(at(893));
        assert_eq!(done, Finished { total: 893, paused: 460, rate: 72 });
        assert_eq!(progress.shown(at(893), BitCount(0)).average, 72);
    }

    #[test]
    fn lines_at_the_end() {
        let done = Progress::begin(at(5), BitCount(16_374)).finished(at(5));
        let line = DoneLine(Run::Resync, done).to_string();
        assert_eq!(line, "Resync done (total 1 sec; paused 0 sec; 65496 K/sec)");
        let line = DoneLine(Run::Verify, Finished { total: 8, paused: 1, rate: 9356 }).to_string();
        assert_eq!(line, "Online verify done (total 8 sec; paused 1 sec; 9356 K/sec)");
        let line = |equal, total| {
            ChecksumLine { equal: BitCount(equal), total: BitCount(total) }.to_string()
        };
        assert_eq!(
            line(0, 200),
            "0 % had equal checksums, eliminated: 0K; transferred 800K total 800K"
        );
        assert_eq!(
            line(199, 200),
            "99 % had equal checksums, eliminated: 796K; transferred 4K total 800K"
        );
        assert_eq!(line(0, 0), "0 % had equal checksums, eliminated: 0K; transferred 0K total 0K");
    }

    #[test]
    fn failed_blocks_are_not_left() {
        assert_eq!(left_to_sync(BitCount(5), BitCount(3)), BitCount(2));
        assert_eq!(left_to_sync(BitCount(3), BitCount(5)), BitCount(0));
    }

    #[test]
    fn no_course_of_events_breaks_the_bounds() {
        for seed in 0..2000 {
            let mut chance = Chance::new(seed);
            let total = chance.any() >> chance.below(64);
            let start = chance.any() >> chance.below(64);
            let mut progress = Progress::begin(Tick(start), BitCount(total));
            let mut now = start;
            for _ in 0..50 {
                now = now.saturating_add(chance.any() >> chance.below(64));
                let left = BitCount(chance.any() >> chance.below(64));
                match chance.below(4) {
                    0 => progress.pause(Tick(now)),
                    1 => progress.resume(Tick(now)),
                    2 => progress.on_cleared(Tick(now), left),
                    _ => progress.on_verified(Tick(now), left),
                }
                let shown = progress.shown(Tick(now), left);
                assert!(shown.permille <= 1000 && shown.left <= shown.total, "seed {seed}");
                let done = progress.finished(Tick(now));
                assert!(done.total >= 1 && done.paused <= done.total, "seed {seed}: {done:?}");
                let recent = progress.recent_speed(Tick(now), left);
                assert_eq!(recent % 4, u64::from(recent == u64::MAX) * 3, "seed {seed}");
            }
        }
    }
}
