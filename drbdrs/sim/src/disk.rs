//! A disk with a volatile write cache: what was not flushed may be lost in a power cut, in part.
//!
//! Data is kept by sector, meta-data by block. With external meta-data the two are devices of their
//! own, each with its cache.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use crate::chance::Chance;

/// Data: one number per sector. Shared, not copied, on its way through buffers and connections.
pub type Tags = Rc<[u64]>;

/// Bytes of a block of meta-data.
pub const BLOCK: usize = 4096;

/// What a write changes.
#[derive(Clone, Debug)]
enum Change {
    Sectors { start: u64, tags: Tags },
    Block { at: u64, block: Rc<[u8; BLOCK]> },
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
    /// Sectors that are not all zero.
    pages: BTreeMap<u64, [u64; PAGE]>,
    blocks: BTreeMap<u64, Rc<[u8; BLOCK]>>,
}

/// Sectors that are kept together.
const PAGE: usize = 64;

const EMPTY: [u64; PAGE] = [0; PAGE];

/// The page of a sector and the place in it.
fn place(sector: u64) -> (u64, usize) {
    let pages = PAGE as u64;
    (sector / pages, usize::try_from(sector % pages).unwrap_or(0))
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
            Change::Sectors { start, tags } => self.write(*start, tags),
            Change::Block { at, block } => {
                self.blocks.insert(*at, Rc::clone(block));
            }
        }
    }

    fn write(&mut self, start: u64, tags: &[u64]) {
        for (at, piece) in pieces(start, tags, PAGE as u64) {
            let (number, first) = place(at);
            if let Some(page) = self.pages.get_mut(&number) {
                page[first..first + piece.len()].copy_from_slice(piece);
            } else if piece.iter().any(|tag| *tag != 0) {
                let mut page = [0; PAGE];
                page[first..first + piece.len()].copy_from_slice(piece);
                self.pages.insert(number, page);
            }
        }
    }

    fn read(&self, start: u64, len: u64) -> Tags {
        let len = usize::try_from(len).unwrap_or(0);
        let mut tags: Tags = std::iter::repeat_n(0, len).collect();
        let mut rest = Rc::get_mut(&mut tags).expect("nobody else has it yet");
        let mut at = start;
        while !rest.is_empty() {
            let (number, first) = place(at);
            let (now, after) = rest.split_at_mut(rest.len().min(PAGE - first));
            if let Some(page) = self.pages.get(&number) {
                now.copy_from_slice(&page[first..first + now.len()]);
            }
            at += now.len() as u64;
            rest = after;
        }
        tags
    }

    fn sector(&self, sector: u64) -> u64 {
        let (number, at) = place(sector);
        self.pages.get(&number).map_or(0, |page| page[at])
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
                            self.stable.write(at, piece);
                        }
                    }
                }
                Change::Block { at, block } => {
                    let mut torn =
                        self.stable.blocks.get(&at).map_or_else(|| Rc::new([0; BLOCK]), Rc::clone);
                    let bytes = usize::try_from(atom * 512).unwrap_or(BLOCK);
                    let medium = Rc::make_mut(&mut torn);
                    for (to, from) in medium.chunks_mut(bytes).zip(block.chunks(bytes)) {
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
fn pieces(start: u64, tags: &[u64], atom: u64) -> impl Iterator<Item = (u64, &[u64])> {
    let mut rest = tags;
    let mut next = start;
    std::iter::from_fn(move || {
        let room = usize::try_from(atom - next % atom).unwrap_or(1);
        let (piece, after) = rest.split_at(room.min(rest.len()));
        let at = next;
        next += piece.len() as u64;
        rest = after;
        (!piece.is_empty()).then_some((at, piece))
    })
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
    pub fn read(&self, start: u64, len: u64) -> Tags {
        self.data.now.read(start, len)
    }

    /// One sector.
    pub fn sector(&self, sector: u64) -> u64 {
        self.data.now.sector(sector)
    }

    /// Is any of these sectors unreadable?
    pub fn is_bad(&self, start: u64, len: u64) -> bool {
        self.bad.range(start..start + len).next().is_some()
    }

    /// Writes into the cache.
    pub fn write(&mut self, start: u64, tags: impl Into<Tags>) {
        self.put(Part::Data, Change::Sectors { start, tags: tags.into() }, false);
    }

    /// Writes through the cache.
    pub fn write_through(&mut self, start: u64, tags: impl Into<Tags>) {
        self.put(Part::Data, Change::Sectors { start, tags: tags.into() }, true);
    }

    fn put(&mut self, part: Part, change: Change, is_stable: bool) {
        self.seq += 1;
        if let Change::Sectors { start, tags } = &change {
            let end = start + tags.len() as u64;
            if !self.bad.is_empty() {
                self.bad.retain(|sector| !(*start..end).contains(sector));
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
        self.meta.now.blocks.get(&at).map(Rc::as_ref)
    }

    /// Writes a block of the meta-data device into the cache, or through it.
    pub fn write_block(&mut self, at: u64, block: impl Into<Rc<[u8; BLOCK]>>, is_stable: bool) {
        self.put(Part::Meta, Change::Block { at, block: block.into() }, is_stable);
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
        let pages = self.data.now.pages.iter();
        let all =
            pages.flat_map(|(number, page)| (number * PAGE as u64..).zip(page.iter().copied()));
        all.filter(|(_, tag)| *tag != 0)
    }

    /// The first differing sector of each block of 4 KiB that differs from that of another disk, in
    /// order.
    pub fn differing(&self, other: &Self) -> Vec<u64> {
        let (own, their) = (&self.data.now.pages, &other.data.now.pages);
        let mut all = Vec::new();
        let mut compare = |number: &u64, x: &[u64; PAGE], y: &[u64; PAGE]| {
            if x == y {
                return;
            }
            let blocks = x.chunks(8).zip(y.chunks(8)).zip((number * PAGE as u64..).step_by(8));
            all.extend(blocks.filter_map(|((x, y), start)| {
                let at = x.iter().zip(y).position(|(x, y)| x != y)?;
                Some(start + at as u64)
            }));
        };
        for (number, page) in own {
            compare(number, page, their.get(number).unwrap_or(&EMPTY));
        }
        for (number, page) in their.iter().filter(|(number, _)| !own.contains_key(number)) {
            compare(number, &EMPTY, page);
        }
        // Stable: it merges what is sorted already.
        all.sort();
        all
    }
}
