//! Fault points of disks: errors, delays and stalls for rehearsals and tests. Off unless a rule is
//! set; a rule that is set is loud in the log.

use std::time::Duration;

use drbd_types::{Tick, VolumeNr};

/// Which part of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Area {
    /// The data.
    Data,
    /// The meta-data.
    Meta,
}

/// Which kind of access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Reading.
    Read,
    /// Writing, with data.
    Write,
    /// Discarding and zeroing.
    Discard,
    /// Flushing.
    Flush,
    /// Opening.
    Open,
}

/// What happens instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// It fails with this errno; the disk is not touched.
    Fail(i32),
    /// It is done later.
    Delay(Duration),
    /// It is not done until the rules change.
    Stall,
}

/// One rule. `None` fits all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Of which volume.
    pub volume: Option<VolumeNr>,
    /// Where.
    pub area: Option<Area>,
    /// What.
    pub kind: Option<Kind>,
    /// How often, parts per million; 1 000 000: always.
    pub ppm: u32,
    /// After so many times it is over; `None`: never.
    pub times: Option<u32>,
    /// What happens.
    pub effect: Effect,
}

/// What a fault point says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Go on.
    Pass,
    /// Fail with this errno.
    Fail(i32),
    /// Ask again then.
    Until(Tick),
    /// Ask again when the rules have changed.
    Stalled,
}

/// The rules of a resource.
#[derive(Clone, Debug)]
pub struct Faults {
    rules: Vec<Rule>,
    random: u64,
}

impl Faults {
    /// No rules. The seed decides what "sometimes" means.
    pub const fn new(seed: u64) -> Self {
        Self { rules: Vec::new(), random: seed | 1 }
    }

    /// The rules now.
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// Replaces all rules.
    pub fn set(&mut self, rules: Vec<Rule>) {
        for rule in &rules {
            tracing::warn!("fault point: {rule:?}");
        }
        if rules.is_empty() && !self.rules.is_empty() {
            tracing::warn!("all fault points are off");
        }
        self.rules = rules;
    }

    /// The first rule that strikes decides.
    pub fn check(&mut self, now: Tick, volume: VolumeNr, area: Area, kind: Kind) -> Verdict {
        for at in 0..self.rules.len() {
            let rule = self.rules[at];
            let fits = rule.volume.is_none_or(|v| v == volume)
                && rule.area.is_none_or(|a| a == area)
                && rule.kind.is_none_or(|k| k == kind)
                && rule.times != Some(0);
            if fits && self.strikes(rule.ppm) {
                if let Some(times) = &mut self.rules[at].times {
                    *times -= 1;
                }
                return match rule.effect {
                    Effect::Fail(errno) => Verdict::Fail(errno),
                    Effect::Stall => Verdict::Stalled,
                    Effect::Delay(time) => {
                        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
                        Verdict::Until(Tick(now.0.saturating_add(micros)))
                    }
                };
            }
        }
        Verdict::Pass
    }

    fn strikes(&mut self, ppm: u32) -> bool {
        // xorshift64: good enough to choose victims.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % 1_000_000 < u64::from(ppm)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALWAYS: Rule = Rule {
        volume: None,
        area: Some(Area::Meta),
        kind: Some(Kind::Write),
        ppm: 1_000_000,
        times: Some(2),
        effect: Effect::Fail(5),
    };

    #[test]
    fn a_rule_strikes_where_it_fits_and_as_often_as_it_says() {
        let mut faults = Faults::new(1);
        faults.set(vec![ALWAYS]);
        let mut ask = |area, kind| faults.check(Tick(0), VolumeNr(0), area, kind);
        assert_eq!(ask(Area::Data, Kind::Write), Verdict::Pass);
        assert_eq!(ask(Area::Meta, Kind::Read), Verdict::Pass);
        assert_eq!(ask(Area::Meta, Kind::Write), Verdict::Fail(5));
        assert_eq!(ask(Area::Meta, Kind::Write), Verdict::Fail(5));
        assert_eq!(ask(Area::Meta, Kind::Write), Verdict::Pass);
    }

    #[test]
    fn a_probability_is_about_what_it_says() {
        let mut faults = Faults::new(7);
        faults.set(vec![Rule { ppm: 250_000, times: None, effect: Effect::Stall, ..ALWAYS }]);
        let struck = (0..10_000)
            .filter(|_| {
                faults.check(Tick(0), VolumeNr(1), Area::Meta, Kind::Write) == Verdict::Stalled
            })
            .count();
        assert!((2300..2700).contains(&struck), "{struck}");
    }
}
