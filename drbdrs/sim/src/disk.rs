//! A disk with a volatile write cache: what was not flushed may be lost in a power cut, in part.
//!
//! Data is kept by sector, meta-data by block. With external meta-data the two are devices of their
//! own, each with its cache.

use std::collections::{BTreeMap, BTreeSet};

use crate::chance::Chance;

/// Bytes of a block of meta-data.
pub const BLOCK: usize = 4096;

/// What a write changes.
#[derive(Clone, Debug)]
enum Change {
    Sectors { start: u64, tags: Vec<u64> },
    Block { at: u64, block: Box<[u8; BLOCK]> },
}

/// One write that is not flushed.
#[derive(Clone, Debug)]
struct Unflushed {
    /// Place in the order of completion.
    seq: u64,
    change: Change,
    /// Written through the cache: survives, but must stay in order with older ones.
    is_stable: bool,
}

/// One device.
#[derive(Clone, Debug, Default)]
struct Device {
    stable: Contents,
    now: Contents,
    unflushed: Vec<Unflushed>,
}

#[derive(Clone, Debug, Default)]
struct Contents {
    sectors: BTreeMap<u64, u64>,
    blocks: BTreeMap<u64, Box<[u8; BLOCK]>>,
}

/// Where a write goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The data disk.
    Data,
    /// The meta-data device.
    Meta,
}

/// A data disk and its meta-data device.
#[derive(Clone, Debug)]
pub struct SimDisk {
    data: Device,
    meta: Device,
    seq: u64,
    /// Capacity of the data disk in sectors.
    pub sectors: u64,
    /// Length of the meta-data device in bytes.
    pub meta_len: u64,
    /// It has a cache that forgets.
    pub is_volatile: bool,
    /// Sectors that reach the medium whole: 1, or 8 for 4 KiB.
    pub atom: u64,
    /// Sectors that can not be read until they are written.
    pub bad: BTreeSet<u64>,
    /// Nothing works any more.
    pub is_dead: bool,
}

impl Contents {
    fn apply(&mut self, change: &Change) {
        match change {
            Change::Sectors { start, tags } => {
                for (sector, tag) in (*start..).zip(tags) {
                    if *tag == 0 {
                        self.sectors.remove(&sector);
                    } else {
                        self.sectors.insert(sector, *tag);
                    }
                }
            }
            Change::Block { at, block } => {
                self.blocks.insert(*at, block.clone());
            }
        }
    }
}

impl Device {
    fn flush(&mut self, mark: u64) {
        let end = self.unflushed.partition_point(|write| write.seq <= mark);
        for write in self.unflushed.drain(..end) {
            self.stable.apply(&write.change);
        }
    }

    /// Any part of what was not flushed reaches the medium, in pieces of `atom` sectors.
    fn power_cut(&mut self, atom: u64, chance: &mut Chance) {
        let style = chance.below(3);
        for write in std::mem::take(&mut self.unflushed) {
            let survives = |chance: &mut Chance| match style {
                0 => write.is_stable,
                1 => write.is_stable || chance.chance(7, 8),
                _ => write.is_stable || chance.chance(1, 2),
            };
            match write.change {
                Change::Sectors { start, tags } => {
                    for (at, piece) in pieces(start, &tags, atom) {
                        if survives(chance) {
                            let tags = piece.to_vec();
                            self.stable.apply(&Change::Sectors { start: at, tags });
                        }
                    }
                }
                Change::Block { at, block } => {
                    let mut torn = self
                        .stable
                        .blocks
                        .get(&at)
                        .cloned()
                        .unwrap_or_else(|| Box::new([0; BLOCK]));
                    let bytes = usize::try_from(atom * 512).unwrap_or(BLOCK);
                    for (to, from) in torn.chunks_mut(bytes).zip(block.chunks(bytes)) {
                        if survives(chance) {
                            to.copy_from_slice(from);
                        }
                    }
                    self.stable.blocks.insert(at, torn);
                }
            }
        }
        self.now = self.stable.clone();
    }
}

/// Cuts a write at multiples of `atom` sectors.
fn pieces(start: u64, tags: &[u64], atom: u64) -> Vec<(u64, &[u64])> {
    let mut all = Vec::new();
    let mut rest = tags;
    let mut at = start;
    while !rest.is_empty() {
        let room = usize::try_from(atom - at % atom).unwrap_or(1);
        let (piece, after) = rest.split_at(room.min(rest.len()));
        all.push((at, piece));
        at += piece.len() as u64;
        rest = after;
    }
    all
}

impl SimDisk {
    /// An empty disk with external meta-data.
    pub fn new(sectors: u64, meta_len: u64) -> Self {
        Self {
            data: Device::default(),
            meta: Device::default(),
            seq: 0,
            sectors,
            meta_len,
            is_volatile: true,
            atom: 1,
            bad: BTreeSet::new(),
            is_dead: false,
        }
    }

    /// What would be read now.
    pub fn read(&self, start: u64, len: u64) -> Vec<u64> {
        (start..start + len).map(|s| self.sector(s)).collect()
    }

    /// One sector.
    pub fn sector(&self, sector: u64) -> u64 {
        self.data.now.sectors.get(&sector).copied().unwrap_or(0)
    }

    /// Is any of these sectors unreadable?
    pub fn is_bad(&self, start: u64, len: u64) -> bool {
        self.bad.range(start..start + len).next().is_some()
    }

    /// Writes into the cache.
    pub fn write(&mut self, start: u64, tags: Vec<u64>) {
        self.put(Part::Data, Change::Sectors { start, tags }, false);
    }

    /// Writes through the cache.
    pub fn write_through(&mut self, start: u64, tags: Vec<u64>) {
        self.put(Part::Data, Change::Sectors { start, tags }, true);
    }

    fn put(&mut self, part: Part, change: Change, is_stable: bool) {
        self.seq += 1;
        if let Change::Sectors { start, tags } = &change {
            let end = start + tags.len() as u64;
            let healed: Vec<u64> = self.bad.range(*start..end).copied().collect();
            for sector in healed {
                self.bad.remove(&sector);
            }
        }
        let (seq, is_volatile) = (self.seq, self.is_volatile);
        let device = self.device(part);
        device.now.apply(&change);
        if is_volatile {
            device.unflushed.push(Unflushed { seq, change, is_stable });
        } else {
            device.stable.apply(&change);
        }
    }

    const fn device(&mut self, part: Part) -> &mut Device {
        match part {
            Part::Data => &mut self.data,
            Part::Meta => &mut self.meta,
        }
    }

    /// A block of the meta-data device.
    pub fn read_block(&self, at: u64) -> Option<&[u8; BLOCK]> {
        self.meta.now.blocks.get(&at).map(Box::as_ref)
    }

    /// Writes a block of the meta-data device into the cache, or through it.
    pub fn write_block(&mut self, at: u64, block: Box<[u8; BLOCK]>, is_stable: bool) {
        self.put(Part::Meta, Change::Block { at, block }, is_stable);
    }

    /// What a flush that starts now covers.
    pub const fn mark(&self) -> u64 {
        self.seq
    }

    /// What was written up to the mark becomes stable.
    pub fn flush(&mut self, part: Part, mark: u64) {
        self.device(part).flush(mark);
    }

    /// Everything becomes stable.
    pub fn flush_all(&mut self) {
        self.flush(Part::Data, u64::MAX);
        self.flush(Part::Meta, u64::MAX);
    }

    /// Power is cut.
    pub fn power_cut(&mut self, chance: &mut Chance) {
        let atom = self.atom.max(1);
        self.data.power_cut(atom, chance);
        self.meta.power_cut(atom, chance);
    }

    /// Numbers of all sectors that are not zero.
    pub fn used(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.data.now.sectors.iter().map(|(s, t)| (*s, *t))
    }

    /// Sectors whose content differs from that of another disk.
    pub fn differing(&self, other: &Self) -> Vec<u64> {
        let (a, b) = (&self.data.now.sectors, &other.data.now.sectors);
        let mut all = Vec::new();
        let (mut x, mut y) = (a.iter().peekable(), b.iter().peekable());
        loop {
            match (x.peek(), y.peek()) {
                (None, None) => return all,
                (Some((s, _)), None) => {
                    all.push(**s);
                    x.next();
                }
                (None, Some((s, _))) => {
                    all.push(**s);
                    y.next();
                }
                (Some((s, t)), Some((r, u))) => match s.cmp(r) {
                    std::cmp::Ordering::Less => {
                        all.push(**s);
                        x.next();
                    }
                    std::cmp::Ordering::Greater => {
                        all.push(**r);
                        y.next();
                    }
                    std::cmp::Ordering::Equal => {
                        if t != u {
                            all.push(**s);
                        }
                        x.next();
                        y.next();
                    }
                },
            }
        }
    }
}
