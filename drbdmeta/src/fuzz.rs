//! Bodies for fuzzing: any bytes are allowed, and none may panic or read without bound.

use crate::al::{AlBlock, replay, scan_old};
use crate::bitmap::Region;
use crate::io::Memory;
use crate::last_known::LastKnown;
use crate::layout::Placement;
use crate::ops::MoveJournal;
use crate::parse::{Dump, Head, ParseError, Source};
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

/// The text of a dump, which says the same however it comes in pieces.
pub fn dump_text(data: &[u8]) {
    assert_eq!(read_dump(data), read_dump(Trickle { data, step: 1 }));
}

fn read_dump(source: impl Source) -> Result<(Head, u64, u64), ParseError> {
    let mut dump = Dump::new(source);
    dump.version()?;
    let head = dump.head()?;
    let (mut values, mut sum) = (0u64, 0u64);
    dump.bitmap::<ParseError>(|value, times| {
        values = values.saturating_add(times);
        sum = sum.rotate_left(1) ^ value;
        Ok(())
    })?;
    Ok((head, values, sum))
}

/// A source that gives a few bytes at a time, now more and now less.
struct Trickle<'a> {
    data: &'a [u8],
    step: usize,
}

impl Source for Trickle<'_> {
    fn read(&mut self, into: &mut [u8]) -> usize {
        self.step = self.step % 90 + 7;
        let len = self.step.min(into.len());
        self.data.read(into.get_mut(..len).unwrap_or_default())
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
    use alloc::string::ToString;
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
    fn long_dumps_are_read_in_pieces() {
        let mut text = b"version \"v08\";uuid{0x0000000000000004;0x0000000000000000;\
            0x0000000000000000;0x0000000000000000;flags 0x00000080;}la-size-sect 16;\
            bm-byte-per-bit 4096;device-uuid 0x0000000000000000;bm {"
            .to_vec();
        text.extend([b'#'; 200_000]);
        for n in 0..20_000u64 {
            text.extend(alloc::format!("\n{n} times 0x{n:016X};").bytes());
        }
        let whole = [&text[..], b"}"].concat();
        let (_, values, _) = read_dump(&whole[..]).unwrap();
        assert_eq!(values, (0..20_000).sum::<u64>());
        dump_text(&whole);
        let error = read_dump(&text[..]).unwrap_err().to_string();
        assert!(error.starts_with("Parse error in line 20001: "), "{error}");
    }

    #[test]
    fn an_initialised_block_is_one() {
        assert!(AlBlock::from_disk(&initialised_block()).is_ok());
    }
}
