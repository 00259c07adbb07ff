//! How long requests took: histograms of a volume.

use serde::{Deserialize, Serialize};

/// Histograms of a volume since its creation, those that have counted something.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latencies {
    /// Upper limits of the buckets, microseconds, inclusive; one more bucket has no limit.
    pub limits_us: Vec<u64>,
    /// The histograms.
    pub histograms: Vec<Histogram>,
}

/// How long one kind of request spent in one stage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Histogram {
    /// `read`, `write`, `discard`, `write-zeroes`, `flush`.
    pub kind: String,
    /// `total`, or the part of it that was spent waiting before the start (`queue`), at the own disk
    /// (`disk`), or for the peer's answer (`peer`).
    pub stage: String,
    /// Requests per bucket.
    pub counts: Vec<u64>,
    /// Sum of all, microseconds.
    pub sum_us: u64,
}
