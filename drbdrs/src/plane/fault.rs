//! Fault points of disks: errors, delays and stalls for rehearsals and tests. Off unless a rule is
//! set; a rule that is set is loud in the log.

use std::ops::Range;
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

/// An access to a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    /// Where.
    pub area: Area,
    /// What.
    pub kind: Kind,
    /// Which bytes of the device; none for an access that has no place.
    pub bytes: Range<u64>,
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Of which volume.
    pub volume: Option<VolumeNr>,
    /// Where.
    pub area: Option<Area>,
    /// What.
    pub kind: Option<Kind>,
    /// Only where one of these bytes of the device is touched.
    pub bytes: Option<Range<u64>>,
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

impl Rule {
    fn fits(&self, volume: VolumeNr, access: &Access) -> bool {
        let touches =
            |bytes: &Range<u64>| bytes.start < access.bytes.end && access.bytes.start < bytes.end;
        self.volume.is_none_or(|v| v == volume)
            && self.area.is_none_or(|a| a == access.area)
            && self.kind.is_none_or(|k| k == access.kind)
            && self.bytes.as_ref().is_none_or(touches)
            && self.times != Some(0)
    }
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
    pub fn check(&mut self, now: Tick, volume: VolumeNr, access: &Access) -> Verdict {
        for at in 0..self.rules.len() {
            let rule = &self.rules[at];
            let (ppm, effect) = (rule.ppm, rule.effect);
            if rule.fits(volume, access) && self.strikes(ppm) {
                if let Some(times) = &mut self.rules[at].times {
                    *times -= 1;
                }
                return match effect {
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
        bytes: None,
        ppm: 1_000_000,
        times: Some(2),
        effect: Effect::Fail(5),
    };

    #[test]
    fn a_rule_strikes_where_it_fits_and_as_often_as_it_says() {
        let mut faults = Faults::new(1);
        faults.set(vec![ALWAYS]);
        let mut ask =
            |area, kind| faults.check(Tick(0), VolumeNr(0), &Access { area, kind, bytes: 0..4096 });
        assert_eq!(ask(Area::Data, Kind::Write), Verdict::Pass);
        assert_eq!(ask(Area::Meta, Kind::Read), Verdict::Pass);
        assert_eq!(ask(Area::Meta, Kind::Write), Verdict::Fail(5));
        assert_eq!(ask(Area::Meta, Kind::Write), Verdict::Fail(5));
        assert_eq!(ask(Area::Meta, Kind::Write), Verdict::Pass);
    }

    fn write(bytes: Range<u64>) -> Access {
        Access { area: Area::Meta, kind: Kind::Write, bytes }
    }

    #[test]
    fn a_rule_with_a_place_strikes_only_there() {
        let mut faults = Faults::new(1);
        faults.set(vec![Rule { bytes: Some(4096..8192), times: None, ..ALWAYS }]);
        for (bytes, strikes) in [
            (0..4096, false),
            (0..4097, true),
            (8191..9000, true),
            (8192..9000, false),
            (0..0, false),
        ] {
            let expected = if strikes { Verdict::Fail(5) } else { Verdict::Pass };
            let verdict = faults.check(Tick(0), VolumeNr(0), &write(bytes.clone()));
            assert_eq!(verdict, expected, "{bytes:?}");
        }
    }

    #[test]
    fn a_probability_is_about_what_it_says() {
        let mut faults = Faults::new(7);
        faults.set(vec![Rule { ppm: 250_000, times: None, effect: Effect::Stall, ..ALWAYS }]);
        let struck = (0..10_000)
            .filter(|_| faults.check(Tick(0), VolumeNr(1), &write(0..4096)) == Verdict::Stalled)
            .count();
        assert!((2300..2700).contains(&struck), "{struck}");
    }
}
