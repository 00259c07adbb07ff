//! A disk with a volatile write cache: what was not flushed may be lost in a power cut, in part.

use std::collections::BTreeMap;

use crate::chance::Chance;

/// Bytes of a block of meta-data.
pub const BLOCK: usize = 4096;

/// One write that is not flushed.
#[derive(Clone, Debug)]
enum Unflushed {
    Sectors { start: u64, tags: Vec<u64> },
    Block { at: u64, block: Box<[u8; BLOCK]> },
}

/// A data disk and its meta-data device.
#[derive(Clone, Debug, Default)]
pub struct SimDisk {
    /// What survives.
    stable: Contents,
    /// What is read.
    now: Contents,
    unflushed: Vec<Unflushed>,
    /// Capacity of the data disk in sectors.
    pub sectors: u64,
    /// Length of the meta-data device in bytes.
    pub meta_len: u64,
}

#[derive(Clone, Debug, Default)]
struct Contents {
    sectors: BTreeMap<u64, u64>,
    blocks: BTreeMap<u64, Box<[u8; BLOCK]>>,
}

impl Contents {
    fn apply(&mut self, write: &Unflushed) {
        match write {
            Unflushed::Sectors { start, tags } => {
                for (sector, tag) in (*start..).zip(tags) {
                    if *tag == 0 {
                        self.sectors.remove(&sector);
                    } else {
                        self.sectors.insert(sector, *tag);
                    }
                }
            }
            Unflushed::Block { at, block } => {
                self.blocks.insert(*at, block.clone());
            }
        }
    }
}

impl SimDisk {
    /// An empty disk with external meta-data.
    pub fn new(sectors: u64, meta_len: u64) -> Self {
        Self { sectors, meta_len, ..Self::default() }
    }

    /// What would be read now.
    pub fn read(&self, start: u64, len: u64) -> Vec<u64> {
        (start..start + len).map(|s| self.now.sectors.get(&s).copied().unwrap_or(0)).collect()
    }

    /// Writes into the cache.
    pub fn write(&mut self, start: u64, tags: Vec<u64>) {
        let write = Unflushed::Sectors { start, tags };
        self.now.apply(&write);
        self.unflushed.push(write);
    }

    /// A block of the meta-data device.
    pub fn read_block(&self, at: u64) -> Option<&[u8; BLOCK]> {
        self.now.blocks.get(&at).map(Box::as_ref)
    }

    /// Writes a block of the meta-data device into the cache.
    pub fn write_block(&mut self, at: u64, block: Box<[u8; BLOCK]>) {
        let write = Unflushed::Block { at, block };
        self.now.apply(&write);
        self.unflushed.push(write);
    }

    /// Everything in the cache becomes stable.
    pub fn flush(&mut self) {
        self.stable = self.now.clone();
        self.unflushed.clear();
    }

    /// Power is cut: any part of what was not flushed may have reached the medium.
    pub fn power_cut(&mut self, chance: &mut Chance) {
        let mut stable = self.stable.clone();
        for write in std::mem::take(&mut self.unflushed) {
            match write {
                Unflushed::Sectors { start, tags } => {
                    for (sector, tag) in (start..).zip(tags) {
                        if chance.chance(1, 2) {
                            stable.apply(&Unflushed::Sectors { start: sector, tags: vec![tag] });
                        }
                    }
                }
                Unflushed::Block { at, block } => {
                    let torn = tear(stable.blocks.get(&at).map(Box::as_ref), block, chance);
                    stable.blocks.insert(at, torn);
                }
            }
        }
        self.stable = stable.clone();
        self.now = stable;
    }

    /// Numbers of all sectors that are not zero.
    pub fn used(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.now.sectors.iter().map(|(s, t)| (*s, *t))
    }
}

/// A block of which some 512-byte sectors are new.
fn tear(old: Option<&[u8; BLOCK]>, new: Box<[u8; BLOCK]>, chance: &mut Chance) -> Box<[u8; BLOCK]> {
    let mut torn = Box::new(old.copied().unwrap_or([0; BLOCK]));
    match chance.below(4) {
        0 => torn,
        1 | 2 => new,
        _ => {
            for (to, from) in torn.chunks_mut(512).zip(new.chunks(512)) {
                if chance.chance(1, 2) {
                    to.copy_from_slice(from);
                }
            }
            torn
        }
    }
}
