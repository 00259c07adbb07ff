//! The bitmap on the wire: runs and plain words. Spec: wire-protocol.md §8.
//!
//! The code is a sequence of run lengths, alternating between clear and set, each a word of a
//! prefix code; bits are taken from each byte starting with the least significant.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

use crate::error::PeerError;

/// One level of the code: values from `low`, this prefix, so many data bits.
struct Level {
    prefix: u64,
    prefix_bits: u32,
    data_bits: u32,
    low: u64,
}

const fn level(prefix: u64, prefix_bits: u32, data_bits: u32, low: u64) -> Level {
    Level { prefix, prefix_bits, data_bits, low }
}

/// Spec §8.3, the table.
const LEVELS: [Level; 10] = [
    level(0x00, 1, 1, 1),
    level(0x01, 2, 1, 3),
    level(0x03, 3, 2, 5),
    level(0x07, 4, 3, 9),
    level(0x0f, 5, 5, 17),
    level(0x1f, 6, 8, 49),
    level(0x3f, 8, 13, 305),
    level(0x7f, 8, 21, 8497),
    level(0xbf, 8, 34, 2_105_649),
    level(0xff, 8, 56, 17_181_974_833),
];

/// Longest run that the code can say.
const RUN_MAX: u64 = (1 << 56) + 17_181_974_832;

/// The code word of a run length of at least 1: bits and their number.
fn code_word(run: u64) -> (u64, u32) {
    let run = run.min(RUN_MAX);
    let level = LEVELS.iter().rev().find(|level| level.low <= run).unwrap_or(&LEVELS[0]);
    (level.prefix | (run - level.low) << level.prefix_bits, level.prefix_bits + level.data_bits)
}

/// Bits of a code, least significant first.
struct BitReader<'a> {
    bytes: &'a [u8],
    /// Bits consumed.
    at: usize,
    /// Bits that there are.
    end: usize,
}

impl BitReader<'_> {
    fn left(&self) -> u32 {
        u32::try_from(self.end - self.at).unwrap_or(u32::MAX)
    }

    /// The next up to 64 bits, zeroes behind the end.
    fn peek(&self) -> u64 {
        let byte = self.at / 8;
        let shift = self.at % 8;
        let mut window = [0; 16];
        for (to, from) in window.iter_mut().zip(self.bytes.iter().skip(byte)) {
            *to = *from;
        }
        let bits = u128::from_le_bytes(window) >> shift;
        #[expect(clippy::cast_possible_truncation, reason = "the low 64 bits are wanted")]
        let low = bits as u64;
        low
    }

    /// The next run length.
    fn run(&mut self) -> Result<u64, PeerError> {
        let left = self.left();
        let bits = self.peek();
        let found = LEVELS.iter().find(|level| {
            let mask = (1_u64 << level.prefix_bits) - 1;
            bits & mask == level.prefix
        });
        let level = found.ok_or(PeerError::BitmapCode { left })?;
        let total = level.prefix_bits + level.data_bits;
        if total > left {
            return Err(PeerError::BitmapCode { left });
        }
        let data = (bits >> level.prefix_bits) & ((1_u64 << level.data_bits) - 1);
        self.at += total as usize;
        Ok(level.low + data)
    }
}

/// Decodes the body of a P_COMPRESSED_BITMAP that continues at bit `position` of a bitmap of
/// `bits`; reports the runs of set bits in ascending order, returns the new position.
///
/// # Errors
/// An unknown encoding, a cut code word, a set run that leaves the bitmap. Runs reported before
/// the error was found are inside of the bitmap.
pub fn decode_runs(
    body: &[u8],
    position: u64,
    bits: u64,
    mut set: impl FnMut(Range<u64>),
) -> Result<u64, PeerError> {
    let Some((&head, code)) = body.split_first() else {
        return Err(PeerError::BitmapCode { left: 0 });
    };
    if head & 0x0f != 2 {
        return Err(PeerError::BitmapEncoding(head & 0x0f));
    }
    let unused = usize::from(head >> 4 & 7);
    let end = (code.len() * 8).checked_sub(unused).ok_or(PeerError::BitmapCode { left: 0 })?;
    let mut reader = BitReader { bytes: code, at: 0, end };
    let mut is_set = head & 0x80 != 0;
    let mut at = position;
    while reader.left() > 0 {
        let run = reader.run()?;
        let behind = at.saturating_add(run);
        if is_set {
            if behind > bits {
                return Err(PeerError::BitmapOverflow { end: behind - 1 });
            }
            set(at..behind);
        }
        // A clear run that goes beyond the end does no harm; the position stays inside.
        at = behind.min(bits);
        is_set = !is_set;
    }
    Ok(at)
}

/// What comes next in the bitmap of a sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Set or clear.
    pub is_set: bool,
    /// First bit behind it.
    pub end: u64,
}

/// Encodes as many runs as fit, from bit `position` of a bitmap of `bits` on. `run_at` tells the
/// run that a bit belongs to. `body_max` is the largest body, with the encoding byte.
///
/// Returns the body and the position behind it, or `None` if a plain packet would say more.
/// Spec §8.3 "The reference as sender".
pub fn encode_runs(
    position: u64,
    bits: u64,
    body_max: usize,
    mut run_at: impl FnMut(u64) -> Run,
) -> Option<(Box<[u8]>, u64)> {
    let code_max = body_max.checked_sub(1)?;
    let mut writer = BitWriter { bytes: vec![0], used: 0 };
    let mut at = position;
    let first = run_at(at).is_set;
    while at < bits {
        let end = run_at(at).end.min(bits);
        let (word, len) = code_word(end - at);
        if (writer.used + len as usize).div_ceil(8) > code_max {
            break;
        }
        writer.put(word, len);
        at = end;
    }
    let code_bytes = writer.bytes.len() - 1;
    if at == position || at - position < 8 * u64::try_from(code_bytes).unwrap_or(u64::MAX) {
        return None;
    }
    let unused = (8 - writer.used % 8) % 8;
    let head = 2 | u8::try_from(unused).unwrap_or(0) << 4 | u8::from(first) << 7;
    if let Some(place) = writer.bytes.first_mut() {
        *place = head;
    }
    Some((writer.bytes.into_boxed_slice(), at))
}

/// Collects a code behind its encoding byte.
struct BitWriter {
    bytes: Vec<u8>,
    /// Bits of code.
    used: usize,
}

impl BitWriter {
    fn put(&mut self, word: u64, len: u32) {
        for bit in 0..len {
            if self.used.is_multiple_of(8) {
                self.bytes.push(0);
            }
            if word >> bit & 1 == 1
                && let Some(last) = self.bytes.last_mut()
            {
                *last |= 1 << (self.used % 8);
            }
            self.used += 1;
        }
    }
}

/// Where a plain packet begins: at the beginning of the 64-bit word. Spec §8.3 "Mixing".
pub const fn plain_start(position: u64) -> u64 {
    position / 64 * 64
}

/// Bytes that a plain packet at `position` must have. Spec §8.2.
pub fn plain_len(position: u64, bits: u64, chunk: usize) -> usize {
    let words = bits.div_ceil(64).saturating_sub(position / 64);
    usize::try_from(words.saturating_mul(8)).unwrap_or(usize::MAX).min(chunk / 8 * 8)
}

/// Reports the runs of set bits of a plain packet that begins at `position`, cut at the end of
/// the bitmap; returns the new position.
///
/// # Errors
/// Another length than [`plain_len`].
pub fn decode_plain(
    body: &[u8],
    position: u64,
    bits: u64,
    chunk: usize,
    mut word_at: impl FnMut(u64, u64),
) -> Result<u64, PeerError> {
    let start = plain_start(position);
    let want = plain_len(start, bits, chunk);
    if body.len() != want {
        let number = |len| u32::try_from(len).unwrap_or(u32::MAX);
        return Err(PeerError::BitmapPlain { want: number(want), size: number(body.len()) });
    }
    let mut at = start;
    for word in body.as_chunks::<8>().0 {
        let valid = bits - at;
        let mask = if valid >= 64 { u64::MAX } else { (1 << valid) - 1 };
        word_at(at, u64::from_le_bytes(*word) & mask);
        at = (at + 64).min(bits);
    }
    Ok(at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use core::iter;
    use proptest::prelude::*;

    fn decoded(body: &[u8], bits: u64) -> Result<(Vec<Range<u64>>, u64), PeerError> {
        let mut runs = Vec::new();
        let end = decode_runs(body, 0, bits, |run| runs.push(run))?;
        Ok((runs, end))
    }

    /// Spec §8.4: recorded packets.
    #[test]
    fn recorded_packets_decode() {
        let body = [
            0x12, 0xe1, 0x98, 0xb7, 0xfd, 0x18, 0xfc, 0x11, 0x02, 0x7c, 0xe3, 0x7c, 0xad, 0x7c,
            0xe6, 0xdf, 0xc3, 0xb7, 0xe6, 0x0f, 0x30, 0xe0, 0x55,
        ];
        let expected = vec![
            3..4,
            17..20,
            64..66,
            127..129,
            500..501,
            777..778,
            1000..1001,
            1280..1344,
            1500..1502,
            1999..2000,
        ];
        assert_eq!(decoded(&body, 2038), Ok((expected.clone(), 2038)));
        let run_at = |bit: u64| match expected.iter().find(|run| run.end > bit) {
            Some(run) if run.start <= bit => Run { is_set: true, end: run.end },
            Some(run) => Run { is_set: false, end: run.start },
            None => Run { is_set: false, end: 2038 },
        };
        let (again, end) = encode_runs(0, 2038, 4080, run_at).unwrap();
        assert_eq!((&*again, end), (&body[..], 2038));
        let clean = [0x62, 0xbf, 0x36, 0xde, 0x27, 0, 0];
        assert_eq!(decoded(&clean, 4_718_439), Ok((vec![], 4_718_439)));
        assert_eq!(
            decoded(&[0xb2, 0x3f, 0xc5, 0x06], 2038),
            Ok((iter::once(0..2038).collect(), 2038))
        );
    }

    #[test]
    fn faults_are_named() {
        assert_eq!(decoded(&[0x03, 0], 10), Err(PeerError::BitmapEncoding(3)));
        let overflow = PeerError::BitmapOverflow { end: 2037 };
        assert_eq!(decoded(&[0xb2, 0x3f, 0xc5, 0x06], 2037), Err(overflow));
        assert!(matches!(decoded(&[0x02, 0xff], 10), Err(PeerError::BitmapCode { .. })));
        assert!(matches!(decoded(&[], 10), Err(PeerError::BitmapCode { .. })));
        assert!(matches!(decoded(&[0x72], 10), Err(PeerError::BitmapCode { .. })));
    }

    #[test]
    fn every_level_goes_both_ways_at_its_borders() {
        let lows: Vec<u64> = LEVELS.iter().map(|level| level.low).collect();
        let highs = lows.iter().skip(1).map(|low| low - 1).chain([RUN_MAX]);
        for run in lows.iter().copied().chain(highs) {
            let (word, len) = code_word(run);
            let bytes = word.to_le_bytes();
            let mut reader = BitReader { bytes: &bytes, at: 0, end: len as usize };
            assert_eq!(reader.run(), Ok(run), "{run}");
            assert_eq!(reader.left(), 0, "{run}");
        }
    }

    proptest! {
        #[test]
        fn bitmaps_survive_any_mixture(
            lens in prop::collection::vec(1_u64..5000, 1..60),
            first in any::<bool>(),
            body_max in 3_usize..40,
        ) {
            let mut runs = Vec::new();
            let mut at = 0;
            for (index, len) in lens.iter().enumerate() {
                runs.push(Run { is_set: first ^ (index % 2 == 1), end: at + len });
                at += len;
            }
            let bits = at;
            let run_at = |bit| *runs.iter().find(|run| run.end > bit).unwrap();
            let mut model = vec![false; usize::try_from(bits).unwrap()];
            let mut position = 0;
            while position < bits {
                if let Some((body, end)) = encode_runs(position, bits, body_max, run_at) {
                    let got = decode_runs(&body, position, bits, |run| {
                        for bit in run { model[usize::try_from(bit).unwrap()] = true; }
                    });
                    prop_assert_eq!(got, Ok(end));
                    prop_assert!(end > position);
                    position = end;
                } else {
                    let start = plain_start(position);
                    let len = plain_len(start, bits, 64);
                    let mut body = vec![0_u8; len];
                    for (index, byte) in body.iter_mut().enumerate() {
                        for bit in 0..8 {
                            let nr = start + index as u64 * 8 + bit;
                            if nr < bits && run_at(nr).is_set { *byte |= 1 << bit; }
                        }
                    }
                    let got = decode_plain(&body, position, bits, 64, |at, word| {
                        for bit in 0..64 {
                            if word >> bit & 1 == 1 { model[usize::try_from(at + bit).unwrap()] = true; }
                        }
                    });
                    position = got.unwrap();
                }
            }
            for bit in 0..bits {
                prop_assert_eq!(model[usize::try_from(bit).unwrap()], run_at(bit).is_set);
            }
        }

        #[test]
        fn noise_never_panics(data in prop::collection::vec(any::<u8>(), 0..300)) {
            crate::fuzz::packets(&data);
            crate::fuzz::bitmap_rle(&data);
        }
    }
}
