//! Bodies for fuzzing: any bytes are allowed, none may panic or ask for much memory.

use alloc::vec::Vec;
use core::ops::Range;

use crate::bitmap::{self, Run};
use crate::digest::Algorithm;
use crate::encode;
use crate::frame::{Context, DATA_MAX, INLINE_MAX, Incoming, Phase, Reader, Stream, Want};
use crate::packet::{Features, Packet};

/// A stream. The first three bytes say which one, in which phase it begins, which digest its data
/// packets have, what version and which features are agreed. Data is left out of the input: it
/// never passes through a reader.
///
/// What is decoded must be the same after it was encoded and decoded again.
pub fn packets(data: &[u8]) {
    let Some(([kind, version, features], rest)) = data.split_first_chunk() else { return };
    let stream = if kind & 1 == 0 { Stream::Data } else { Stream::Meta };
    let agreed = Context {
        version: 86 + u32::from(version % 16),
        features: Features::from_bits_retain(u32::from(*features)),
        integrity: Algorithm::ALL.get(usize::from(kind >> 3)).copied(),
    };
    let (phase, context) = match kind >> 1 & 3 {
        0 => (Phase::Initial, Context::FRESH),
        1 => (Phase::Handshake, Context::FRESH),
        2 => (Phase::Handshake, agreed),
        _ => (Phase::Running, agreed),
    };
    let mut reader = Reader::new(stream, phase);
    reader.context = context;
    let mut rest = rest;
    while let Some(incoming) = next(&mut reader, &mut rest) {
        stays_the_same(&reader, &incoming);
        match incoming.packet {
            Packet::InitialData => reader.phase = Phase::Handshake,
            Packet::InitialMeta | Packet::Features(_) => {
                (reader.phase, reader.context) = (Phase::Running, agreed);
            }
            Packet::Protocol(params) | Packet::ProtocolUpdate(params) => {
                reader.context.integrity = Algorithm::from_name(&params.integrity_alg);
            }
            _ => {}
        }
    }
}

/// The next packet; `None` at the end or after an error.
fn next(reader: &mut Reader, rest: &mut &[u8]) -> Option<Incoming> {
    loop {
        match reader.want() {
            Want::Inline(len) => {
                assert!(len <= INLINE_MAX, "asked for {len} inline bytes");
                let (bytes, behind) = rest.split_at_checked(len)?;
                *rest = behind;
                if let Some(incoming) = reader.feed(bytes).ok()? {
                    return Some(incoming);
                }
            }
            Want::Data(len) => {
                assert!(len <= DATA_MAX as usize, "asked for {len} data bytes");
                reader.data_done();
            }
        }
    }
}

fn stays_the_same(reader: &Reader, incoming: &Incoming) {
    let mut again = reader.clone();
    if let Want::Data(_) = again.want() {
        again.data_done();
    }
    let mut bytes = Vec::new();
    let len = incoming.data_len as usize;
    // Old headers cannot say the lengths that a newer one brought into an old version.
    if reader.context.version < 95 && len > reader.context.data_max() as usize {
        return;
    }
    encode(&reader.context, incoming.volume, &incoming.packet, len, &mut bytes);
    assert_eq!(next(&mut again, &mut &*bytes).as_ref(), Some(incoming));
}

/// A compressed bitmap. The first bytes are the number of bits, the position, and the longest
/// packet to make of it again.
pub fn bitmap_rle(data: &[u8]) {
    let Some((head, body)) = data.split_first_chunk::<24>() else { return };
    let mut numbers = head.as_chunks::<8>().0.iter().map(|word| u64::from_be_bytes(*word));
    let mut number = || numbers.next().unwrap_or(0);
    let (bits, position, body_max) = (number(), number(), number());
    // 2^50 bits are 4 EiB of data, more than there can be.
    let bits = bits % (1 << 50);
    let position = position % (bits + 1);
    let mut runs: Vec<Range<u64>> = Vec::new();
    let result = bitmap::decode_runs(body, position, bits, |run| {
        let before = runs.last().map_or(position, |last| last.end);
        assert!(before <= run.start && run.start < run.end && run.end <= bits);
        runs.push(run);
    });
    let Ok(end) = result else { return };
    assert!(position <= end && end <= bits);
    encodes_again(&runs, position..end, usize::try_from(body_max % 4096).unwrap_or(0));
}

/// The runs, encoded into packets of limited length, decode to the same set bits.
fn encodes_again(runs: &[Range<u64>], whole: Range<u64>, body_max: usize) {
    let run_at = |bit: u64| {
        let at = runs.partition_point(|run| run.end <= bit);
        match runs.get(at) {
            Some(run) if run.start <= bit => Run { is_set: true, end: run.end },
            Some(run) => Run { is_set: false, end: run.start },
            None => Run { is_set: false, end: whole.end },
        }
    };
    let mut position = whole.start;
    let mut at = 0;
    while position < whole.end {
        let Some((body, end)) = bitmap::encode_runs(position, whole.end, body_max, run_at) else {
            return;
        };
        assert!(body.len() <= body_max && end > position);
        let decoded = bitmap::decode_runs(&body, position, whole.end, |run| {
            let expected = runs.get(at).cloned();
            assert_eq!(Some(run), expected);
            at += 1;
        });
        assert_eq!(decoded, Ok(end));
        position = end;
    }
    assert_eq!(at, runs.len());
}
