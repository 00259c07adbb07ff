//! Bodies for fuzzing: any bytes are allowed, and none may panic or read without bound.

use crate::al::{AlBlock, replay, scan_old};
use crate::bitmap::Region;
use crate::io::Memory;
use crate::last_known::LastKnown;
use crate::layout::Placement;
use crate::ops::MoveJournal;
use crate::parse::{Dump, ParseError};
use crate::superblock::Superblock;
use crate::units::ByteLen;
use crate::v07::OldSuperblock;

/// A superblock: decoded, checked for all placements, and written back.
pub fn superblock(data: &[u8]) {
    let mut block = [0; 4096];
    for (to, from) in block.iter_mut().zip(data) {
        *to = *from;
    }
    let _ = OldSuperblock::from_disk(&block);
    // Any magic is found less often than every other fault: give it one.
    for magic in [None, Some([0x83, 0x74, 0x02, 0x6B]), Some([0x83, 0x74, 0x02, 0x6C])] {
        if let (Some(magic), Some(place)) = (magic, block.get_mut(60..64)) {
            place.copy_from_slice(&magic);
        }
        let Ok(sb) = Superblock::from_disk(&block) else { continue };
        for placement in [Placement::Internal, Placement::FlexExternal, Placement::Indexed(3)] {
            for len in [69_632, 1 << 20, (1 << 20) + 512, 1 << 30, 1 << 44] {
                let checked = sb.check(placement, ByteLen(len));
                let attached = sb.check_attach(placement, ByteLen(len));
                assert!(attached.is_err() || checked.is_ok());
            }
        }
        assert_eq!(Superblock::from_disk(&sb.to_disk()), Ok(sb));
    }
}

/// One block of the activity log.
pub fn al_block(data: &[u8]) {
    if let Ok(block) = AlBlock::from_disk(data) {
        assert!(block.context().count() <= 919 && block.updates().count() <= 64);
    }
}

/// A whole device: superblock at the end, activity log and bitmap before it.
pub fn al_replay(data: &[u8]) {
    let mut device = Memory::zeroed(69_632);
    let start = device.bytes.len().saturating_sub(data.len());
    for (to, from) in device.bytes.iter_mut().skip(start).zip(data) {
        *to = *from;
    }
    let block = device.bytes.get(65_536..).unwrap_or_default();
    let Ok(sb) = Superblock::from_disk(block) else { return };
    let Ok(layout) = sb.check(Placement::Internal, ByteLen(69_632)) else { return };
    let _ = replay(&mut device, &layout, &sb);
    let region = Region::new(&layout, sb.la_size);
    let set = region.count_set(&mut device);
    assert!(set.is_ok_and(|set| set <= region.bits));
}

/// An activity log of 8.3.
pub fn al_old(data: &[u8]) {
    let _ = scan_old(data, 257);
    let _ = scan_old(data, u32::MAX);
}

/// The text of a dump.
pub fn dump_text(data: &[u8]) {
    let mut dump = Dump::new(data);
    if dump.version().is_ok() && dump.head().is_ok() {
        let _ = dump.bitmap::<ParseError>(|_, _| Ok(()));
    }
}

/// A last-known file, and the journal of a move.
pub fn notes(data: &[u8]) {
    if let Ok(text) = core::str::from_utf8(data)
        && let Some(note) = LastKnown::parse(text)
    {
        let again = LastKnown::parse(&note.to_text());
        assert_eq!(again.map(|n| n.device_len), Some(note.device_len));
    }
    if let Some(journal) = MoveJournal::from_bytes(data.to_vec()) {
        assert_eq!([&journal.header()[..], &journal.content].concat(), data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::al::initialised_block;
    use crate::io::IoError;
    use crate::layout::{AlGeometry, Layout};
    use alloc::vec::Vec;
    use proptest::prelude::*;

    /// A valid device with some bytes changed comes further than noise does.
    fn nearly_valid(changes: &[(prop::sample::Index, u8)]) -> Vec<u8> {
        let layout =
            Layout::for_new(Placement::Internal, ByteLen(69_632), AlGeometry::default()).unwrap();
        let mut device = Memory::zeroed(69_632);
        let sb = Superblock::new(&layout, 0);
        crate::ops::create(&mut device, &layout, &sb, false, |_, _| Ok::<_, IoError>(())).unwrap();
        let mut bytes = device.bytes.split_off(28_672);
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = *value;
        }
        bytes
    }

    proptest! {
        #[test]
        fn noise_never_panics(data in prop::collection::vec(any::<u8>(), 0..5000)) {
            superblock(&data);
            al_block(&data);
            al_replay(&data);
            al_old(&data);
            dump_text(&data);
            notes(&data);
        }

        #[test]
        fn damaged_devices_never_panic(
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        ) {
            let data = nearly_valid(&changes);
            al_replay(&data);
            superblock(&data[36_864..]);
        }

        #[test]
        fn damaged_dumps_never_panic(
            at in any::<prop::sample::Index>(),
            value in any::<u8>(),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut text = b"version \"v08\";\nuuid {\n 0x0000000000000004; 0x0000000000000000; \
                0x0000000000000000; 0x0000000000000000;\n flags 0x00000080;\n}\nla-size-sect 16;\n\
                bm-byte-per-bit 4096;\ndevice-uuid 0x0000000000000000;\n\
                la-peer-max-bio-size 0;\n\
                al-stripes 1;\nal-stripe-size-4k 8;\nbm {\n 3 times 0xFFFFFFFFFFFFFFFF;\n}\n".to_vec();
            let at = at.index(text.len());
            text[at] = value;
            dump_text(&text);
            text.truncate(cut.index(text.len()));
            dump_text(&text);
        }
    }

    #[test]
    fn an_initialised_block_is_one() {
        assert!(AlBlock::from_disk(&initialised_block()).is_ok());
    }
}
