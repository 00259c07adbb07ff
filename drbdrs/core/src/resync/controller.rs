//! How much a resync or verify may ask for in one step of 100 ms.
//!
//! Two ways: a fixed rate, or a controller that keeps a wanted amount on its way to the peer and
//! spreads every correction over the next `c-plan-ahead` steps. All arithmetic is that of whole
//! numbers, as in the original, because the resulting rates are visible.
//!
//! What a step may ask for but has no room for is asked for as soon as there is: the step decides
//! about the rate, `max-buffers` about the amount at one moment. (The original lets go of the rest,
//! and so never exceeds `max-buffers / 2` blocks in 100 ms, 40 MiB/s by default.)
//!
//! Invariants kept: the amount in flight is never negative, and apart from the one block by which
//! the last request of a step may be too long it is at most half of `max-buffers` (spec invariant
//! 37); a step never grants more than `c-max-rate`. Settings come from the peer too, so none of
//! them can make a number overflow or a table grow.
//! Spec: io-path-and-resync.md §8.4, §8.5.

use alloc::vec;
use alloc::vec::Vec;

use drbd_types::units::SECTORS_PER_BIT;
use drbd_types::{BitCount, SectorCount};

use crate::config::ResyncConfig;

/// The longest plan, in steps: the upper limit of `c-plan-ahead`. The peer may send more.
pub const PLAN_STEPS_MAX: u32 = 300;
/// Blocks per step for one KiB/s are 1/40: ten steps in a second, four KiB in a block.
const RATE_PER_BLOCK: u32 = 40;
/// Sectors per step for one KiB/s are 1/5: ten steps in a second, two sectors in a KiB.
const RATE_PER_SECTOR: u32 = 5;

/// Decides about the amount of each step.
#[derive(Clone, Debug)]
pub struct Controller {
    config: ResyncConfig,
    /// Corrections that are due in the coming steps, in sectors; `next` is the one of this step.
    plan: Vec<i64>,
    next: usize,
    /// Of all entries of `plan`.
    sum: i64,
    /// Sectors asked for and not answered before the last step.
    in_flight: u64,
    /// Of these, answered since then.
    arrived: u64,
    /// Blocks asked for and not finished: in flight, or with data that is being written.
    unfinished: u64,
    /// Blocks that the last step granted and had no room for yet.
    owed: u64,
    /// What the last step wanted, KiB/s.
    want: u64,
}

impl Controller {
    /// At rest, nothing in flight.
    #[must_use]
    pub fn new(config: ResyncConfig) -> Self {
        let plan = empty_plan(&config);
        Self {
            config,
            plan,
            next: 0,
            sum: 0,
            in_flight: 0,
            arrived: 0,
            unfinished: 0,
            owed: 0,
            want: 0,
        }
    }

    /// A resync or verify begins: everything is zero.
    pub fn start(&mut self) {
        *self = Self::new(self.config);
    }

    /// Other settings, from the configuration or from the peer. A plan of another length begins
    /// empty; what is in flight stays in flight.
    pub fn set_config(&mut self, config: ResyncConfig) {
        let plan = empty_plan(&config);
        self.config = config;
        if plan.len() != self.plan.len() {
            self.plan = plan;
            self.next = 0;
            self.sum = 0;
        }
    }

    /// An answer of any kind came for this many sectors. Refusals and cancellations count as well
    /// (defect 14.6: in the original they stay in flight for ever, and enough of them stop the
    /// resync). More than was asked for is not counted.
    pub fn on_answer(&mut self, sectors: SectorCount) {
        self.arrived = self.arrived.saturating_add(sectors.0).min(self.in_flight);
    }

    /// The next step: how many blocks may be asked for now. Requests are then reported with
    /// [`Self::on_requested`].
    pub fn step(&mut self, max_buffers: u32) -> BitCount {
        let arrived = core::mem::take(&mut self.arrived);
        self.in_flight -= arrived;
        let blocks = if self.plan.is_empty() {
            self.want = u64::from(self.config.resync_rate);
            u64::from(self.config.resync_rate / RATE_PER_BLOCK)
        } else {
            let blocks = self.dynamic(arrived) / SECTORS_PER_BIT;
            self.want = blocks * u64::from(RATE_PER_BLOCK);
            blocks
        };
        // Rounded up: a part of a block needs a buffer too.
        let waiting = self.in_flight.div_ceil(SECTORS_PER_BIT);
        let room = u64::from(max_buffers / 2).saturating_sub(waiting);
        self.owed = blocks;
        BitCount(blocks.min(room))
    }

    /// Between two steps: how much of what the last one granted may be asked for now that requests
    /// have been finished. Small rooms are left to grow, so that requests stay large.
    #[must_use]
    pub fn more(&self, max_buffers: u32) -> BitCount {
        let most = u64::from(max_buffers / 2);
        let may = self.owed.min(most.saturating_sub(self.unfinished));
        BitCount(if may >= self.owed.min(most / 4) { may } else { 0 })
    }

    /// A request was finished, after its answer: it needs no buffers any more.
    pub fn on_finished(&mut self, sectors: SectorCount) {
        self.unfinished = self.unfinished.saturating_sub(sectors.0 / SECTORS_PER_BIT);
    }

    /// Nothing more is asked for until the next step.
    pub fn end_step(&mut self) {
        self.owed = 0;
    }

    /// This many blocks were asked for. The last, shorter block of the device counts as a whole
    /// one here; its answer is reported as a whole one too.
    pub fn on_requested(&mut self, blocks: BitCount) {
        self.in_flight = self.in_flight.saturating_add(blocks.0.saturating_mul(SECTORS_PER_BIT));
        self.unfinished = self.unfinished.saturating_add(blocks.0);
        self.owed = self.owed.saturating_sub(blocks.0);
    }

    /// What is not answered yet.
    #[must_use]
    pub const fn in_flight(&self) -> SectorCount {
        SectorCount(self.in_flight - self.arrived)
    }

    /// The rate that the last step aimed at, KiB/s; before the limit by `max-buffers`.
    #[must_use]
    pub const fn want(&self) -> u64 {
        self.want
    }

    /// Sectors of this step by the dynamic rule.
    fn dynamic(&mut self, arrived: u64) -> u64 {
        let steps = self.plan.len().try_into().unwrap_or(i64::MAX);
        let arrived = signed(arrived);
        let in_flight = signed(self.in_flight);
        let target = if in_flight.saturating_add(arrived) == 0 {
            // Start: nothing to measure yet, so as if the fixed rate had run for a whole plan.
            i64::from(self.config.resync_rate / RATE_PER_SECTOR) * steps
        } else if self.config.c_fill_target != 0 {
            i64::from(self.config.c_fill_target)
        } else {
            arrived.saturating_mul(i64::from(self.config.c_delay_target))
        };
        let correction = target.saturating_sub(in_flight).saturating_sub(self.sum);
        let each = correction / steps;
        for entry in &mut self.plan {
            *entry = entry.saturating_add(each);
        }
        self.sum = self.sum.saturating_add(each.saturating_mul(steps));
        let now = arrived.saturating_add(self.take_entry());
        u64::try_from(now).unwrap_or(0).min(u64::from(self.config.c_max_rate / RATE_PER_SECTOR))
    }

    /// Takes the entry of this step and puts a zero behind the last one.
    fn take_entry(&mut self) -> i64 {
        let Some(entry) = self.plan.get_mut(self.next) else { return 0 };
        let due = core::mem::take(entry);
        self.next = (self.next + 1) % self.plan.len();
        self.sum = self.sum.saturating_sub(due);
        due
    }
}

fn empty_plan(config: &ResyncConfig) -> Vec<i64> {
    let steps = usize::try_from(config.c_plan_ahead.min(PLAN_STEPS_MAX)).unwrap_or(0);
    vec![0; steps]
}

fn signed(sectors: u64) -> i64 {
    i64::try_from(sectors).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resync::chance::Chance;

    const MAX_BUFFERS: u32 = 2048;

    /// Blocks asked for per step if every step asks for one block more than it may (the original
    /// does, whenever blocks next to each other are out of sync) and all answers come in time.
    fn steps(config: ResyncConfig, count: usize) -> Vec<u64> {
        let mut controller = Controller::new(config);
        let mut asked = Vec::new();
        for _ in 0..count {
            let allowed = controller.step(MAX_BUFFERS).0;
            let blocks = if allowed == 0 { 0 } else { allowed + 1 };
            controller.on_requested(BitCount(blocks));
            controller.on_answer(SectorCount(blocks * 8));
            asked.push(blocks);
        }
        asked
    }

    #[test]
    fn defaults_give_the_recorded_steps() {
        // Spec §8.5, "Test vector"; the first 19 were seen on the wire.
        let expected = [
            7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31, 33, 35, 37, 39, 42, 45, 48, 45, 47,
            49, 51, 53, 55, 57, 59, 61, 63,
        ];
        assert_eq!(steps(ResyncConfig::default(), 30), expected);
    }

    #[test]
    fn fixed_rate_is_a_fortieth_in_blocks() {
        let rows =
            [(0, 0), (39, 0), (40, 1), (79, 1), (250, 6), (4096, 102), (u32::MAX, 107_374_182)];
        for (resync_rate, blocks) in rows {
            let config = ResyncConfig { resync_rate, c_plan_ahead: 0, ..ResyncConfig::default() };
            let mut controller = Controller::new(config);
            assert_eq!(controller.step(u32::MAX).0, blocks, "rate {resync_rate}");
            assert_eq!(controller.want(), u64::from(resync_rate));
        }
    }

    #[test]
    fn what_had_no_room_is_asked_for_when_there_is_some() {
        let config =
            ResyncConfig { resync_rate: 80_000, c_plan_ahead: 0, ..ResyncConfig::default() };
        let mut controller = Controller::new(config);
        assert_eq!(controller.step(MAX_BUFFERS).0, 1024, "2000 wanted, room for 1024");
        controller.on_requested(BitCount(1024));
        controller.on_answer(SectorCount(1024 * 8));
        assert_eq!(controller.more(MAX_BUFFERS).0, 0, "answered, and not yet written");
        controller.on_finished(SectorCount(255 * 8));
        assert_eq!(controller.more(MAX_BUFFERS).0, 0, "too little to be worth it");
        controller.on_finished(SectorCount(8));
        assert_eq!(controller.more(MAX_BUFFERS).0, 256);
        controller.on_requested(BitCount(256));
        controller.on_finished(SectorCount(1024 * 8));
        assert_eq!(controller.more(MAX_BUFFERS).0, 720, "all that the step granted");
        controller.on_requested(BitCount(720));
        assert_eq!(controller.more(MAX_BUFFERS).0, 0);
        controller.end_step();
        assert_eq!(controller.more(MAX_BUFFERS).0, 0);
    }

    #[test]
    fn wanted_rate_is_shown_before_the_limit_by_buffers() {
        let config = ResyncConfig { resync_rate: 4096, ..ResyncConfig::default() };
        let mut controller = Controller::new(config);
        // 4096 / 5 sectors, as blocks 102.
        assert_eq!((controller.step(64).0, controller.want()), (32, 4080));
    }

    #[test]
    fn delay_target_follows_what_arrives() {
        let config = ResyncConfig {
            c_plan_ahead: 1,
            c_fill_target: 0,
            c_delay_target: 3,
            ..ResyncConfig::default()
        };
        let mut controller = Controller::new(config);
        assert_eq!(controller.step(MAX_BUFFERS), BitCount(6), "start: 50 sectors");
        controller.on_requested(BitCount(100));
        controller.on_answer(SectorCount(160));
        // 3 * 160 wanted, 640 in flight: 160 too much, all of it corrected at once.
        assert_eq!(controller.step(MAX_BUFFERS), BitCount(0));
        controller.on_answer(SectorCount(400));
        // 3 * 400 wanted, 240 in flight: 400 + 960 sectors.
        assert_eq!(controller.step(MAX_BUFFERS), BitCount(170));
    }

    #[test]
    fn corrections_are_rounded_towards_zero() {
        let config = ResyncConfig { c_plan_ahead: 7, c_fill_target: 1, ..ResyncConfig::default() };
        let mut controller = Controller::new(config);
        controller.on_requested(BitCount(1));
        // 1 - 8 = -7 over seven steps; then -7 + 6 left = -1 / 7 = 0.
        assert_eq!(controller.step(MAX_BUFFERS), BitCount(0));
        assert_eq!((controller.sum, controller.plan.iter().sum()), (-6, -6));
        controller.step(MAX_BUFFERS);
        assert_eq!(controller.sum, -5);
    }

    #[test]
    fn another_plan_length_begins_anew_and_the_same_goes_on() {
        let config = ResyncConfig::default();
        let mut controller = Controller::new(config);
        controller.step(MAX_BUFFERS);
        controller.on_requested(BitCount(7));
        let sum = controller.sum;
        assert_ne!(sum, 0);
        controller.set_config(ResyncConfig { c_fill_target: 50, ..config });
        assert_eq!(controller.sum, sum);
        controller.set_config(ResyncConfig { c_plan_ahead: 10, ..config });
        assert_eq!((controller.sum, controller.plan.len()), (0, 10));
        assert_eq!(controller.in_flight(), SectorCount(56));
        controller.set_config(ResyncConfig { c_plan_ahead: 0, ..config });
        assert_eq!(controller.step(MAX_BUFFERS), BitCount(6), "fixed");
        controller.start();
        assert_eq!(controller.in_flight(), SectorCount(0));
    }

    #[test]
    fn negative_answers_do_not_starve_the_resync() {
        // Defect 14.6: after max-buffers / 2 failed blocks the original asks for nothing any more.
        let config = ResyncConfig { c_plan_ahead: 0, ..ResyncConfig::default() };
        let mut controller = Controller::new(config);
        for _ in 0..1000 {
            let blocks = controller.step(32);
            assert_eq!(blocks, BitCount(6));
            controller.on_requested(blocks);
            controller.on_answer(SectorCount(blocks.0 * 8));
        }
    }

    #[test]
    fn settings_of_the_peer_cannot_make_the_plan_grow() {
        let config = ResyncConfig { c_plan_ahead: u32::MAX, ..ResyncConfig::default() };
        assert_eq!(Controller::new(config).plan.len(), 300);
    }

    fn any_config(chance: &mut Chance) -> ResyncConfig {
        let ends = [1, 2, 10, 1000, 1 << 20, u32::MAX];
        let mut pick = || {
            let end = chance.of(&ends);
            chance.below_u32(end)
        };
        ResyncConfig {
            resync_rate: pick(),
            c_plan_ahead: pick(),
            c_delay_target: pick(),
            c_fill_target: pick(),
            c_max_rate: pick(),
        }
    }

    #[test]
    fn no_settings_and_no_answers_break_the_bounds() {
        // Spec invariant 37, and never above c-max-rate.
        for seed in 0..2000 {
            let mut chance = Chance::new(seed);
            let mut config = any_config(&mut chance);
            let mut controller = Controller::new(config);
            let max_buffers = chance.of(&[32, 2048, 131_072]);
            for _ in 0..60 {
                if chance.percent(5) {
                    config = any_config(&mut chance);
                    controller.set_config(config);
                }
                let blocks = controller.step(max_buffers).0;
                if config.c_plan_ahead != 0 {
                    assert!(blocks <= u64::from(config.c_max_rate / 40), "seed {seed}");
                    assert!(controller.want() <= u64::from(config.c_max_rate), "seed {seed}");
                }
                let asked = blocks + u64::from(blocks > 0 && chance.percent(50));
                controller.on_requested(BitCount(asked));
                let limit = u64::from(max_buffers / 2) + 1;
                assert!(controller.in_flight().0 <= limit * 8, "seed {seed}");
                assert_eq!(controller.sum, controller.plan.iter().sum::<i64>(), "seed {seed}");
                let answered = match chance.below(4) {
                    0 => 0,
                    1 => chance.any(),
                    2 => controller.in_flight().0,
                    _ => chance.below(controller.in_flight().0 + 1),
                };
                controller.on_answer(SectorCount(answered));
            }
            controller.on_answer(SectorCount(u64::MAX));
            assert_eq!(controller.in_flight(), SectorCount(0), "seed {seed}");
        }
    }
}
