//! Recorded sessions of the original: every byte must decode, and encode to the same byte.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;

use drbd_wire::bitmap::{Run, decode_plain, decode_runs, encode_runs, plain_len};
use drbd_wire::digest::Digest;
use drbd_wire::packet::Block;
use drbd_wire::{Algorithm, Command, Packet, Stream, encode};
use drbdrs_tests::fixtures;
use drbdrs_tests::wirecase::{Direction, Recorded, Session, sessions};

fn all() -> Vec<Session> {
    sessions(&fixtures().join("wire")).unwrap()
}

#[test]
fn every_recorded_packet_decodes_and_encodes_identically() {
    let sessions = all();
    let mut packets = 0;
    for session in &sessions {
        for (key, stream) in &session.streams {
            for recorded in stream {
                let mut out = Vec::new();
                let len = recorded.data.len();
                encode(&recorded.context, recorded.volume, &recorded.packet, len, &mut out);
                out.extend_from_slice(&recorded.data);
                let at = recorded.offset;
                assert_eq!(
                    out, recorded.bytes,
                    "{} {key:?} @{at}: {:?}",
                    session.name, recorded.packet
                );
                packets += 1;
            }
        }
    }
    assert_eq!((sessions.len(), packets), (74, 13_595));
}

#[test]
fn packets_are_counted_as_the_recording_counts_them() {
    let mut counts = BTreeMap::new();
    for session in all() {
        for recorded in session.streams.values().flatten() {
            *counts.entry(recorded.packet.command(recorded.context.version)).or_insert(0) += 1;
        }
    }
    let expected = [
        (Command::Data, 572),
        (Command::RsDataReply, 1039),
        (Command::Barrier, 218),
        (Command::Bitmap, 31),
        (Command::Uuids, 181),
        (Command::State, 427),
        (Command::SyncUuid, 35),
        (Command::AuthChallenge, 7),
        (Command::RsWriteAck, 1191),
        (Command::Superseded, 17),
        (Command::BarrierAck, 211),
        (Command::OvReply, 2028),
        (Command::CsumRsRequest, 78),
        (Command::CompressedBitmap, 51),
        (Command::OutOfSync, 93),
        (Command::ProtocolUpdate, 5),
        (Command::Trim, 11),
        (Command::RsThinReq, 126),
        (Command::Zeroes, 8),
        (Command::ConnectionFeatures, 148),
    ];
    for (command, count) in expected {
        assert_eq!(counts.get(&command), Some(&count), "{}", command.log_name());
    }
}

#[test]
fn digests_of_data_packets_are_right() {
    let mut checked = 0;
    for session in all() {
        for recorded in session.streams.values().flatten() {
            let (Packet::Data(_, digest)
            | Packet::DataReply(_, digest)
            | Packet::RsDataReply(_, digest)) = &recorded.packet
            else {
                continue;
            };
            if let Some(algorithm) = recorded.context.integrity {
                let right: Digest = algorithm.digest(&recorded.data);
                assert_eq!(*digest, right, "{} @{}", session.name, recorded.offset);
                checked += 1;
            }
        }
    }
    assert!(checked > 50, "{checked} digests");
}

#[test]
fn responses_of_authenticated_sessions_are_right() {
    let mut checked = 0;
    for session in all() {
        let Some((algorithm, secret)) = &session.secret else { continue };
        let algorithm = Algorithm::from_name(algorithm).unwrap();
        for (from, to) in [(Direction::A2b, Direction::B2a), (Direction::B2a, Direction::A2b)] {
            let find = |direction, pick: fn(&Recorded) -> Option<&[u8]>| {
                session.streams[&(Stream::Data, direction)].iter().find_map(pick)
            };
            let challenge = find(from, |r| match &r.packet {
                Packet::AuthChallenge(bytes) => Some(bytes),
                _ => None,
            });
            let response = find(to, |r| match &r.packet {
                Packet::AuthResponse(bytes) => Some(bytes),
                _ => None,
            });
            if let (Some(challenge), Some(response)) = (challenge, response) {
                assert!(algorithm.is_response(secret.as_bytes(), challenge, response));
                checked += 1;
            }
        }
    }
    assert!(checked >= 4, "{checked} responses");
}

/// The runs of a transfer, and the packets of it made again from the bits.
#[test]
fn bitmap_transfers_decode_and_encode_identically() {
    let mut transfers = 0;
    let mut compressed = 0;
    for session in all() {
        for direction in [Direction::A2b, Direction::B2a] {
            let stream = &session.streams[&(Stream::Data, direction)];
            let mut sizes: BTreeMap<u16, u64> = BTreeMap::new();
            let mut at = 0;
            while let Some(recorded) = stream.get(at) {
                at += 1;
                if let Packet::Sizes(packet) = &recorded.packet {
                    // The size of the device: what it is now, or what both could offer.
                    let size = if packet.c_size.0 > 0 { packet.c_size.0 } else { packet.d_size.0 };
                    sizes.insert(recorded.volume, size);
                }
                if !is_bitmap(&recorded.packet) {
                    continue;
                }
                let first = at - 1;
                // The transfer of another volume may follow directly.
                let volume = recorded.volume;
                while stream
                    .get(at)
                    .is_some_and(|next| next.volume == volume && is_bitmap(&next.packet))
                {
                    at += 1;
                }
                let transfer = &stream[first..at];
                let bits = agreed_bits(&session, volume, &sizes);
                compressed += check_transfer(&session.name, transfer, bits);
                transfers += 1;
            }
        }
    }
    assert!(transfers > 40 && compressed > 40, "{transfers} transfers, {compressed} compressed");
}

/// What both nodes can offer decides in the recorded sessions.
fn agreed_bits(session: &Session, volume: u16, own: &BTreeMap<u16, u64>) -> u64 {
    let offers = session.streams.values().flatten().filter(|r| r.volume == volume);
    let offers = offers.filter_map(|r| match &r.packet {
        Packet::Sizes(sizes) => Some(sizes),
        _ => None,
    });
    let agreed = offers.filter(|s| s.d_size.0 > 0).map(|s| s.d_size.0).min();
    own.get(&volume).copied().into_iter().chain(agreed).min().unwrap_or(0).div_ceil(8)
}

fn is_bitmap(packet: &Packet) -> bool {
    matches!(packet, Packet::Bitmap(_) | Packet::CompressedBitmap(_))
}

/// Returns the number of compressed packets that were made again.
fn check_transfer(name: &str, transfer: &[Recorded], bits: u64) -> usize {
    let chunk = transfer[0].context.bitmap_chunk();
    let mut map = vec![false; usize::try_from(bits).unwrap() + 64];
    let mut position = 0;
    for recorded in transfer {
        position = match &recorded.packet {
            Packet::CompressedBitmap(body) => decode_runs(body, position, bits, |run| {
                for bit in run {
                    map[usize::try_from(bit).unwrap()] = true;
                }
            }),
            Packet::Bitmap(body) if body.is_empty() => Ok(position),
            Packet::Bitmap(body) => decode_plain(body, position, bits, chunk, |at, word| {
                for bit in 0..64 {
                    if word >> bit & 1 == 1 {
                        map[usize::try_from(at + bit).unwrap()] = true;
                    }
                }
            }),
            other => panic!("{other:?}"),
        }
        .unwrap_or_else(|e| panic!("{name} @{}: {e}", recorded.offset));
    }
    // Sessions that end in a transfer, and those of the script that skips packets, are shorter.
    if position != bits {
        return 0;
    }
    let run_at = |bit: u64| {
        let from = usize::try_from(bit).unwrap();
        let is_set = map[from];
        let end = (bit..bits).find(|b| map[usize::try_from(*b).unwrap()] != is_set);
        Run { is_set, end: end.unwrap_or(bits) }
    };
    let mut made = 0;
    let mut position = 0;
    for recorded in transfer {
        match &recorded.packet {
            Packet::CompressedBitmap(body) => {
                let (again, end) = encode_runs(position, bits, chunk, run_at)
                    .unwrap_or_else(|| panic!("{name} @{}: not compressed", recorded.offset));
                assert_eq!(again, *body, "{name} @{}", recorded.offset);
                position = end;
                made += 1;
            }
            Packet::Bitmap(body) if !body.is_empty() => {
                let start = position / 64 * 64;
                assert_eq!(body.len(), plain_len(start, bits, chunk), "{name}");
                position = (start + 8 * body.len() as u64).min(bits);
            }
            _ => {}
        }
    }
    made
}

#[test]
fn block_heads_keep_opaque_handles() {
    let session = all().into_iter().find(|s| s.name.starts_with("steady-c")).unwrap();
    let handles: Vec<_> = session
        .streams
        .values()
        .flatten()
        .filter_map(|r| match r.packet {
            Packet::Data(Block { id, .. }, _) => Some(id),
            _ => None,
        })
        .collect();
    let acked = session.streams.values().flatten().filter(|r| match &r.packet {
        Packet::Ack(_, ack) => handles.contains(&ack.id),
        _ => false,
    });
    assert_eq!(acked.count(), 92);
}
