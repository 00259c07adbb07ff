//! Deliberate bugs, to see that the simulator finds them. Compiled only with the feature `plant`,
//! chosen at run time so that one build serves all; without the feature every question is a
//! constant `false`.

/// A deliberate bug. Spec: io-path-and-resync.md §15, the invariant that it breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Bug {
    /// A write of the peer is acknowledged before it is on disk (3).
    AcknowledgeEarly = 1,
    /// The activity log is not written (8, 9).
    SkipActivityLog,
    /// The target clears bits before the data is written (16).
    ClearTooSoon,
    /// P_BARRIER is not sent (26).
    ForgetBarrier,
    /// Older data is copied over newer.
    WrongDirection,
    /// The peer's bitmap is not merged (19).
    IgnorePeerBits,
    /// References of the activity log are dropped at completion (11).
    DropReferencesEarly,
    /// No new generation when the peer is lost.
    KeepGeneration,
    /// Blocks of writes that only one node has are not marked (4, 27).
    ForgetToMark,
    /// Partly written blocks are cleared (17).
    ClearPartly,
    /// A barrier is acknowledged without a flush (23, 52).
    SkipFlush,
    /// Buffers of writes are not given back.
    LeakBuffer,
    /// A write is completed twice (1).
    CompleteTwice,
    /// Overlapping writes are not serialised (5.2).
    MixOverlapping,
    /// Writes go on where a resync works (31, 32).
    IgnoreLocks,
    /// What a suspension withheld stays so (5).
    NeverThaw,
    /// The target of a resync reads marked blocks locally (33).
    ReadStale,
    /// A failed write of the peer counts as good.
    HideWriteError,
}

impl Bug {
    /// All of them.
    pub const ALL: [Self; 18] = [
        Self::AcknowledgeEarly,
        Self::SkipActivityLog,
        Self::ClearTooSoon,
        Self::ForgetBarrier,
        Self::WrongDirection,
        Self::IgnorePeerBits,
        Self::DropReferencesEarly,
        Self::KeepGeneration,
        Self::ForgetToMark,
        Self::ClearPartly,
        Self::SkipFlush,
        Self::LeakBuffer,
        Self::CompleteTwice,
        Self::MixOverlapping,
        Self::IgnoreLocks,
        Self::NeverThaw,
        Self::ReadStale,
        Self::HideWriteError,
    ];
}

#[cfg(feature = "plant")]
static CHOSEN: core::sync::atomic::AtomicU32 = core::sync::atomic::AtomicU32::new(0);

/// Plants a bug in all engines of this process, or none.
#[cfg(feature = "plant")]
pub fn plant(bug: Option<Bug>) {
    CHOSEN.store(bug.map_or(0, |bug| bug as u32), core::sync::atomic::Ordering::Relaxed);
}

/// Is this one planted?
#[cfg(feature = "plant")]
pub(crate) fn has(bug: Bug) -> bool {
    CHOSEN.load(core::sync::atomic::Ordering::Relaxed) == bug as u32
}

/// Is this one planted? Never.
#[cfg(not(feature = "plant"))]
pub(crate) const fn has(_: Bug) -> bool {
    false
}
