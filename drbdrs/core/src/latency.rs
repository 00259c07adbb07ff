//! How long requests take: histograms of fixed size, counted where the thing happens.

use crate::request::Kind as RequestKind;

/// Upper limits of the buckets, microseconds, inclusive. One more bucket takes what is longer.
pub const LIMITS: [u64; 17] = [
    50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000,
    1_000_000, 2_000_000, 5_000_000, 10_000_000,
];

/// What was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A read.
    Read,
    /// A write of data.
    Write,
    /// A discard.
    Discard,
    /// A write of zeroes.
    WriteZeroes,
    /// A flush.
    Flush,
}

impl Kind {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 5] =
        [Self::Read, Self::Write, Self::Discard, Self::WriteZeroes, Self::Flush];

    /// The word in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Discard => "discard",
            Self::WriteZeroes => "write-zeroes",
            Self::Flush => "flush",
        }
    }
}

impl From<RequestKind> for Kind {
    fn from(kind: RequestKind) -> Self {
        match kind {
            RequestKind::Read(_) => Self::Read,
            RequestKind::Write(..) => Self::Write,
            RequestKind::Discard => Self::Discard,
            RequestKind::WriteZeroes { .. } => Self::WriteZeroes,
        }
    }
}

/// A part of a request's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// From the front end's request to the answer.
    Total,
    /// Before it started: admission, activity log, other writes of the same sectors.
    Queue,
    /// At the own disk.
    Disk,
    /// From the packet to the peer's answer.
    Peer,
}

impl Stage {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 4] = [Self::Total, Self::Queue, Self::Disk, Self::Peer];

    /// The word in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Total => "total",
            Self::Queue => "queue",
            Self::Disk => "disk",
            Self::Peer => "peer",
        }
    }
}

/// One distribution.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Histogram {
    /// Requests per bucket.
    pub counts: [u64; LIMITS.len() + 1],
    /// Sum of all, microseconds.
    pub sum: u64,
}

impl Histogram {
    fn note(&mut self, micros: u64) {
        let at = LIMITS.partition_point(|limit| *limit < micros);
        if let Some(count) = self.counts.get_mut(at) {
            *count += 1;
        }
        self.sum = self.sum.saturating_add(micros);
    }

    /// Has nothing been counted?
    pub fn is_empty(&self) -> bool {
        self.counts.iter().all(|count| *count == 0)
    }
}

/// All histograms of a volume.
#[derive(Clone, Copy, Debug, Default)]
pub struct Latencies([[Histogram; Stage::ALL.len()]; Kind::ALL.len()]);

impl Latencies {
    pub(crate) fn note(&mut self, kind: Kind, stage: Stage, micros: u64) {
        let stages = self.0.get_mut(kind as usize);
        if let Some(histogram) = stages.and_then(|s| s.get_mut(stage as usize)) {
            histogram.note(micros);
        }
    }

    /// Those that have counted something.
    pub fn iter(&self) -> impl Iterator<Item = (Kind, Stage, &Histogram)> {
        Kind::ALL.into_iter().zip(&self.0).flat_map(|(kind, stages)| {
            let all = Stage::ALL.into_iter().zip(stages);
            all.filter(|(_, h)| !h.is_empty()).map(move |(stage, h)| (kind, stage, h))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_counted_in_the_first_bucket_that_holds_it() {
        let mut histogram = Histogram::default();
        for micros in [0, 50, 51, 10_000_000, 10_000_001, u64::MAX] {
            histogram.note(micros);
        }
        assert_eq!(histogram.counts[..3], [2, 1, 0]);
        assert_eq!(histogram.counts[16..], [1, 2]);
        assert_eq!(histogram.sum, u64::MAX, "it does not wrap");
        assert!(LIMITS.is_sorted());
    }

    #[test]
    fn every_kind_and_stage_has_its_own() {
        let mut all = Latencies::default();
        for (n, kind) in (1..).zip(Kind::ALL) {
            for stage in Stage::ALL {
                all.note(kind, stage, n);
            }
        }
        assert_eq!(all.iter().count(), 20);
        assert!(all.iter().all(|(kind, _, h)| h.sum == kind as u64 + 1));
        assert_eq!(Latencies::default().iter().count(), 0);
    }
}
