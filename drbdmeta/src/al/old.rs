//! The activity log of 8.3 and before, 512-byte sectors; only read, never written.
//!
//! Spec: metadata.md §3.7.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use zerocopy::byteorder::big_endian::U32;
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::{FREE, SLOTS_MAX, Warning};

const MAGIC: u32 = 0x8374_0267;
const ENTRIES: usize = 62;
const CONTEXT_ENTRIES: u32 = 61;
/// Sectors that such a log can have.
const SECTORS_MAX: u32 = 64;

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Entry {
    slot: U32,
    extent: U32,
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Sector {
    magic: U32,
    number: U32,
    entries: [Entry; ENTRIES],
    xor: U32,
    padding: U32,
}

const _: () = assert!(size_of::<Sector>() == 512);

/// What an old log says.
#[derive(Clone, Debug, Default)]
pub struct OldScan {
    /// Slots and their extents; `None`: nothing usable was found.
    pub slots: Option<BTreeMap<u32, u32>>,
    /// Sectors in use that are not readable.
    pub bad: u64,
    /// What to tell.
    pub warnings: Vec<Warning>,
}

/// Reads an old log from the first bytes of its area.
pub fn scan_old(area: &[u8], al_nr_extents: u32) -> OldScan {
    let used = 1 + al_nr_extents.div_ceil(CONTEXT_ENTRIES);
    let used = usize::try_from(used.min(SECTORS_MAX)).unwrap_or(0);
    let sectors: Vec<Option<&Sector>> = area.chunks(512).take(used).map(good).collect();
    let mut scan = OldScan::default();
    let bounds = bounds(&sectors);
    let good = sectors.iter().flatten().count();
    scan.bad = u64::try_from(sectors.len() - good).unwrap_or(u64::MAX);
    let Some((oldest, newest)) = bounds else {
        scan.warnings.push(Warning::OldNothingUsable);
        return scan;
    };
    if scan.bad > 0 {
        scan.warnings.push(Warning::OldBad(scan.bad));
    }
    let mut slots = BTreeMap::new();
    let mut t = oldest;
    loop {
        if let Some(Some(sector)) = sectors.get(t) {
            // The update is entry 0 and must win.
            for entry in sector.entries.iter().rev() {
                let (slot, extent) = (entry.slot.get(), entry.extent.get());
                if extent == FREE {
                    continue;
                }
                if slot >= SLOTS_MAX {
                    let t = u64::try_from(t).unwrap_or(0);
                    scan.warnings.push(Warning::ContextSlot { t, slot });
                } else {
                    slots.insert(slot, extent);
                }
            }
        }
        if t == newest {
            break;
        }
        t = (t + 1) % sectors.len();
    }
    scan.slots = Some(slots);
    scan
}

fn good(bytes: &[u8]) -> Option<&Sector> {
    let sector = Sector::ref_from_bytes(bytes).ok()?;
    let xor = sector.entries.iter().fold(0, |x, e| x ^ e.extent.get());
    (sector.magic.get() == MAGIC && xor == sector.xor.get()).then_some(sector)
}

fn bounds(sectors: &[Option<&Sector>]) -> Option<(usize, usize)> {
    let mut found: Option<((usize, u32), (usize, u32))> = None;
    for (t, sector) in sectors.iter().enumerate() {
        let Some(sector) = sector else { continue };
        let here = (t, sector.number.get());
        let (mut oldest, mut newest) = found.unwrap_or((here, here));
        if super::replay::is_older(here.1, oldest.1) {
            oldest = here;
        }
        if super::replay::is_older(newest.1, here.1) {
            newest = here;
        }
        found = Some((oldest, newest));
    }
    found.map(|(oldest, newest)| (oldest.0, newest.0))
}
