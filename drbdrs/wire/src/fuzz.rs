//! Bodies for fuzzing: any bytes are allowed, none may panic or ask for much memory.

use alloc::vec::Vec;

use crate::digest::Algorithm;
use crate::frame::{Context, DATA_MAX, INLINE_MAX, Phase, Reader, Stream, Want};
use crate::packet::Features;
use crate::{bitmap, encode};

/// A stream: the first bytes say which one, which version and which features.
pub fn packets(data: &[u8]) {
    let Some(([kind, version, features], mut rest)) = data.split_first_chunk() else { return };
    let stream = if kind & 1 == 0 { Stream::Data } else { Stream::Meta };
    let phase = match kind >> 1 & 3 {
        0 => Phase::Initial,
        1 => Phase::Handshake,
        _ => Phase::Running,
    };
    let mut reader = Reader::new(stream, phase);
    reader.context = Context {
        version: if phase == Phase::Running { 86 + u32::from(version % 16) } else { 0 },
        features: Features::from_bits_retain(u32::from(*features)),
        integrity: Algorithm::ALL.get(usize::from(kind >> 3)).copied(),
    };
    loop {
        match reader.want() {
            Want::Inline(len) => {
                assert!(len <= INLINE_MAX, "asked for {len} inline bytes");
                let Some((bytes, behind)) = rest.split_at_checked(len) else { return };
                rest = behind;
                match reader.feed(bytes) {
                    Ok(Some(incoming)) => {
                        let mut out = Vec::new();
                        let data_len = incoming.data_len as usize;
                        encode(
                            &reader.context,
                            incoming.volume,
                            &incoming.packet,
                            data_len,
                            &mut out,
                        );
                    }
                    Ok(None) => {}
                    Err(_) => return,
                }
            }
            Want::Data(len) => {
                assert!(len <= DATA_MAX as usize, "asked for {len} data bytes");
                let Some((_, behind)) = rest.split_at_checked(len) else { return };
                rest = behind;
                reader.data_done();
            }
        }
    }
}

/// A compressed bitmap: the first four bytes are the number of bits.
pub fn bitmap_rle(data: &[u8]) {
    let Some((bits, packet)) = data.split_first_chunk() else { return };
    let bits = u64::from(u32::from_be_bytes(*bits));
    let mut end = 0;
    let result = bitmap::decode_runs(packet, 0, bits, |run| {
        assert!(run.start < run.end && run.end <= bits && run.start >= end);
        end = run.end;
    });
    if let Ok(position) = result {
        assert!(position <= bits);
    }
}
