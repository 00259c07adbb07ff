//! Which bits the end of a write may clear.
//!
//! Both nodes clear the bits of a block when it has gone from one to the other: the target when it
//! is written, the source when that is acknowledged. Either may set some of these bits anew before
//! that, because of a later write that the other node does not get (it has lost its disk, or the
//! source is Ahead): acknowledgements come on a connection of their own, and a disk takes its time.
//! Hence whoever will clear bits makes a claim when the data sets out, and blocks that are marked
//! from then on are taken out of it. Spec: io-path-and-resync.md §7.3, §15 invariant 14.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use drbd_types::{Sector, SectorCount, SectorRange};

use crate::interval::Intervals;
use crate::request::log::ReqKey;

use super::peer_write::PeerWriteKey;

/// Who makes a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Claim {
    /// A block of the resync that was sent, by number.
    Block(u64),
    /// A mirrored write that was sent.
    Write(ReqKey),
    /// A write of the peer that was received.
    Peer(PeerWriteKey),
}

/// The claims of one volume.
#[derive(Debug, Default)]
pub(super) struct Claims {
    all: Intervals<Claim>,
    /// What was taken out: ranges of whole blocks, sorted.
    gone: BTreeMap<Claim, Vec<SectorRange>>,
    next: u64,
}

impl Claims {
    pub(super) fn make(&mut self, range: SectorRange, claim: Claim) {
        self.all.insert(range, claim);
    }

    /// A block of the resync is sent.
    pub(super) fn sent_block(&mut self, range: SectorRange) {
        self.next += 1;
        self.make(range, Claim::Block(self.next));
    }

    /// A block was acknowledged, for good or bad: what is left of the oldest claim to this range.
    /// Blocks that were not sent have none.
    pub(super) fn block_acknowledged(&mut self, range: SectorRange) -> Vec<SectorRange> {
        let oldest = self
            .all
            .overlapping(range)
            .find(|(found, claim)| *found == range && matches!(claim, Claim::Block(_)));
        oldest.map_or_else(Vec::new, |(range, claim)| self.end(range, claim))
    }

    /// A claim ends: what is left of it.
    pub(super) fn end(&mut self, range: SectorRange, claim: Claim) -> Vec<SectorRange> {
        if !self.all.remove(range, claim) {
            return Vec::new();
        }
        let gone = self.gone.remove(&claim).unwrap_or_default();
        let mut left = Vec::new();
        let mut at = range.start.0;
        for hole in gone {
            left.extend(between(at, hole.start.0));
            at = at.max(hole.end().0);
        }
        left.extend(between(at, range.end().0));
        left
    }

    /// Bits are set, those of these whole blocks.
    pub(super) fn marked(&mut self, blocks: SectorRange) {
        let hit: Vec<Claim> = self.all.overlapping(blocks).map(|(_, claim)| claim).collect();
        for claim in hit {
            let gone = self.gone.entry(claim).or_default();
            let at = gone.partition_point(|hole| hole.start <= blocks.start);
            gone.insert(at, blocks);
        }
    }

    /// Any bits are set, or this is another disk, or the peer's is gone.
    pub(super) fn all_marked(&mut self) {
        let all: Vec<_> = self.all.iter().collect();
        for (range, claim) in all {
            self.gone.insert(claim, Vec::from([range]));
        }
    }

    /// A new connection: nothing of the old one ends any more.
    pub(super) fn forget(&mut self) {
        *self = Self { next: self.next, ..Self::default() };
    }
}

fn between(start: u64, end: u64) -> Option<SectorRange> {
    let len = end.checked_sub(start).filter(|len| *len > 0)?;
    SectorRange::new(Sector(start), SectorCount(len))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, len: u64) -> SectorRange {
        SectorRange::new(Sector(start), SectorCount(len)).unwrap()
    }

    #[test]
    fn marked_blocks_are_taken_out_of_a_claim() {
        let mut claims = Claims::default();
        claims.sent_block(range(0, 64));
        claims.sent_block(range(64, 16));
        claims.marked(range(80, 8));
        claims.marked(range(32, 8));
        claims.marked(range(8, 16));
        claims.marked(range(16, 8));
        let left = [range(0, 8), range(24, 8), range(40, 24)];
        assert_eq!(claims.block_acknowledged(range(0, 64)), left);
        assert_eq!(claims.block_acknowledged(range(64, 16)), [range(64, 16)]);
        assert_eq!(claims.block_acknowledged(range(64, 16)), [], "it was not sent again");
    }

    #[test]
    fn marks_reach_beyond_a_claim() {
        let mut claims = Claims::default();
        claims.sent_block(range(12, 12));
        claims.marked(range(8, 8));
        assert_eq!(claims.block_acknowledged(range(12, 12)), [range(16, 8)]);
        claims.sent_block(range(12, 12));
        claims.marked(range(16, 16));
        assert_eq!(claims.block_acknowledged(range(12, 12)), [range(12, 4)]);
    }

    #[test]
    fn what_was_sent_again_is_acknowledged_second() {
        let mut claims = Claims::default();
        claims.sent_block(range(0, 16));
        claims.all_marked();
        claims.sent_block(range(0, 16));
        assert_eq!(claims.block_acknowledged(range(0, 16)), []);
        assert_eq!(claims.block_acknowledged(range(0, 16)), [range(0, 16)]);
    }

    #[test]
    fn a_new_connection_knows_nothing() {
        let mut claims = Claims::default();
        claims.sent_block(range(0, 8));
        claims.forget();
        assert_eq!(claims.block_acknowledged(range(0, 8)), []);
    }
}
