//! Every packet: its bytes, round trips in all versions, and everything that is refused.
//!
//! One row per packet number; the bytes are written down from the layouts of the specification.

use alloc::boxed::Box;
use alloc::collections::BTreeSet;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use drbd_types::{ByteLen, Gi, Sector, SectorCount, StateWord};

use crate::command::CommandName;
use crate::frame::{DATA_MAX, INLINE_MAX, Phase};
use crate::packet::{
    AckKind, BarrierId, Block, BlockAck, BlockDesc, BlockId, BlockRequest, ControllerParams,
    DpFlags, FeatureOffer, Features, ProtocolParams, QueueLimits, RequestKind, Sizes, SyncParams,
    Uuids,
};
use crate::{Algorithm, Command, Context, Digest, Packet, PeerError, Reader, Stream, Want, encode};

/// Where a packet may come.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    Data,
    Meta,
    /// On either stream.
    Both,
    /// As the first packet of a connection.
    First,
    /// In the handshake, before a version is agreed.
    Features,
    /// In the handshake, afterwards.
    Auth,
}

/// What may follow the fixed part.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Tail {
    Nothing,
    /// Up to so many bytes in all, the sample being one of many lengths; the least is given.
    Between(usize, usize),
    /// Data for a buffer.
    Data,
}

struct Row {
    command: Command,
    place: Place,
    tail: Tail,
    sample: fn(u32) -> Packet,
    /// The body in version 101 with all features.
    body: &'static str,
}

const SECTOR: Sector = Sector(0x0102_0304_0506_0708);
const ID: BlockId = BlockId([0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18]);

fn block() -> Block {
    let flags = DpFlags::from_bits_retain(0x3132_3334);
    Block { sector: SECTOR, id: ID, seq: 0x2122_2324, flags }
}

fn request() -> BlockRequest {
    BlockRequest { sector: SECTOR, id: ID, size: 0x4142_4344, undefined: 0x5152_5354 }
}

fn describe() -> BlockDesc {
    BlockDesc { sector: SECTOR, size: 0x4142_4344, undefined: 0x5152_5354 }
}

fn ack(kind: AckKind) -> Packet {
    let ack = BlockAck { sector: SECTOR, id: ID, size: 0x4142_4344, seq: 0x5152_5354 };
    Packet::Ack(kind, ack)
}

fn digest() -> Digest {
    Digest::new(&[0xd1, 0xd2, 0xd3, 0xd4]).unwrap()
}

fn protocol(version: u32) -> ProtocolParams {
    ProtocolParams {
        protocol: 3,
        after_sb: [4, 5, 6],
        discard_my_data: true,
        dry_run: false,
        two_primaries: 1,
        integrity_alg: if version >= 87 { "md5".into() } else { String::new() },
    }
}

fn sync_params(version: u32) -> SyncParams {
    let name = |since, name: &str| if version >= since { name.into() } else { String::new() };
    let controller =
        ControllerParams { plan_ahead: 20, delay_target: 10, fill_target: 100, max_rate: 102_400 };
    SyncParams {
        resync_rate: 250,
        verify_alg: name(88, "sha1"),
        csums_alg: name(89, "md5"),
        controller: (version >= 95).then_some(controller),
    }
}

fn uuids() -> Uuids {
    Uuids { current: Gi(0xc1), bitmap: Gi(0xb2), history: [Gi(3), Gi(4)], dirty_bits: 5, flags: 6 }
}

fn sizes() -> Sizes {
    let limits = QueueLimits {
        physical_block: 4096,
        logical_block: 512,
        alignment_offset: 0,
        io_min: 4096,
        io_opt: 65_536,
        can_discard: true,
        discard_zeroes: false,
        can_write_same: false,
    };
    Sizes {
        d_size: SectorCount(0x3fb0),
        u_size: SectorCount(0),
        c_size: SectorCount(0x3fb0),
        max_bio_size: ByteLen(1 << 20),
        queue_order_type: 0,
        dds_flags: 2,
        limits: Some(limits),
    }
}

const MASK: StateWord = StateWord(0x1e03);
const VALUE: StateWord = StateWord(0x1001);
const OFFER: FeatureOffer = FeatureOffer { min: 86, max: 101, features: Features::OURS };

macro_rules! rows {
    ($( $test:ident = $command:ident, $place:expr, $tail:expr, $sample:expr, $body:expr; )*) => {
        const ROWS: &[Row] = &[$( Row {
            command: Command::$command,
            place: $place,
            tail: $tail,
            sample: $sample,
            body: $body,
        }, )*];
        $(
            #[test]
            fn $test() {
                check(ROWS.iter().find(|row| row.command == Command::$command).unwrap());
            }
        )*
    };
}

const BLOCK: &str = "0102030405060708 1112131415161718 21222324 31323334";
const SIZED: &str = "0102030405060708 1112131415161718 21222324 31323334 41424344";
const REQUEST: &str = "0102030405060708 1112131415161718 41424344 51525354";
const HASHED: &str = "0102030405060708 1112131415161718 41424344 51525354 d1d2d3d4";
const DESCRIBED: &str = "0102030405060708 41424344 51525354";
const PROTOCOL: &str = "00000003 00000004 00000005 00000006 00000001 00000001 6d643500";
const PAIR: &str = "00001e03 00001001";
const SIZES: &str = "0000000000003fb0 0000000000000000 0000000000003fb0 00100000 0000 0002
    00001000 00000200 00000000 00001000 00010000 01 00 00 00";
const UUIDS: &str = "00000000000000c1 00000000000000b2 0000000000000003 0000000000000004
    0000000000000005 0000000000000006";
/// 64 zero bytes less four.
const SYNC_PARAM: &str = "000000fa
    73686131 00000000 00000000 00000000 00000000 00000000 00000000 00000000
    00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000
    6d643500 00000000 00000000 00000000 00000000 00000000 00000000 00000000
    00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000
    00000014 0000000a 00000064 00019000";
const FEATURES: &str = "00000056 0000000f 00000065 00000000
    00000000 00000000 00000000 00000000 00000000 00000000 00000000
    00000000 00000000 00000000 00000000 00000000 00000000 00000000";

rows! {
    p_data = Data, Place::Data, Tail::Data, |_| Packet::Data(block(), Digest::NONE), BLOCK;
    p_data_reply =
        DataReply, Place::Data, Tail::Data, |_| Packet::DataReply(block(), Digest::NONE), BLOCK;
    p_rs_data_reply =
        RsDataReply, Place::Data, Tail::Data, |_| Packet::RsDataReply(block(), Digest::NONE), BLOCK;
    p_barrier = Barrier, Place::Data, Tail::Nothing,
        |_| Packet::Barrier(BarrierId::from_number(1)), "01000000 00000000";
    p_bitmap = Bitmap, Place::Data, Tail::Between(0, 4080),
        |_| Packet::Bitmap(Box::new([1, 2, 3, 4, 5, 6, 7, 8])), "01020304 05060708";
    p_unplug_remote = UnplugRemote, Place::Data, Tail::Nothing, |_| Packet::UnplugRemote, "";
    p_data_request = DataRequest, Place::Data, Tail::Nothing,
        |_| Packet::Request(RequestKind::Data, request()), REQUEST;
    p_rs_data_request = RsDataRequest, Place::Data, Tail::Nothing,
        |_| Packet::Request(RequestKind::Resync, request()), REQUEST;
    p_sync_param = SyncParam, Place::Data, Tail::Nothing, |v| Packet::SyncParam(sync_params(v)), SYNC_PARAM;
    p_protocol = Protocol, Place::Data, Tail::Between(24, 88), |v| Packet::Protocol(protocol(v)), PROTOCOL;
    p_uuids = Uuids, Place::Data, Tail::Nothing, |_| Packet::Uuids(uuids()), UUIDS;
    p_sizes = Sizes, Place::Data, Tail::Nothing, |_| Packet::Sizes(sizes()), SIZES;
    p_state = State, Place::Data, Tail::Nothing, |_| Packet::State(StateWord(0x0001_10a9)), "000110a9";
    p_sync_uuid = SyncUuid, Place::Data, Tail::Nothing,
        |_| Packet::SyncUuid(Gi(0x0123_4567_89ab_cdef)), "0123456789abcdef";
    p_auth_challenge = AuthChallenge, Place::Auth, Tail::Between(0, INLINE_MAX),
        |_| Packet::AuthChallenge(Box::new([1, 2, 3])), "010203";
    p_auth_response = AuthResponse, Place::Auth, Tail::Between(0, INLINE_MAX),
        |_| Packet::AuthResponse(Box::new([4, 5, 6])), "040506";
    p_state_chg_req =
        StateChgReq, Place::Data, Tail::Nothing, |_| Packet::StateChgReq(MASK, VALUE), PAIR;
    p_ping = Ping, Place::Meta, Tail::Nothing, |_| Packet::Ping, "";
    p_ping_ack = PingAck, Place::Meta, Tail::Nothing, |_| Packet::PingAck, "";
    p_recv_ack = RecvAck, Place::Meta, Tail::Nothing, |_| ack(AckKind::RecvAck), REQUEST;
    p_write_ack = WriteAck, Place::Meta, Tail::Nothing, |_| ack(AckKind::WriteAck), REQUEST;
    p_rs_write_ack = RsWriteAck, Place::Meta, Tail::Nothing, |_| ack(AckKind::RsWriteAck), REQUEST;
    p_superseded = Superseded, Place::Meta, Tail::Nothing, |_| ack(AckKind::Superseded), REQUEST;
    p_neg_ack = NegAck, Place::Meta, Tail::Nothing, |_| ack(AckKind::NegAck), REQUEST;
    p_neg_dreply = NegDataReply, Place::Meta, Tail::Nothing, |_| ack(AckKind::NegDataReply), REQUEST;
    p_neg_rs_dreply = NegRsDataReply, Place::Meta, Tail::Nothing, |_| ack(AckKind::NegRsDataReply), REQUEST;
    p_barrier_ack = BarrierAck, Place::Meta, Tail::Nothing,
        |_| Packet::BarrierAck(BarrierId::from_number(1), 5), "01000000 00000005";
    p_state_chg_reply =
        StateChgReply, Place::Meta, Tail::Nothing, |_| Packet::StateChgReply(-10), "fffffff6";
    p_ov_request = OvRequest, Place::Data, Tail::Nothing,
        |_| Packet::Request(RequestKind::Verify, request()), REQUEST;
    p_ov_reply = OvReply, Place::Data, Tail::Between(24, 88),
        |_| Packet::OvReply(request(), digest()), HASHED;
    p_ov_result = OvResult, Place::Meta, Tail::Nothing, |_| ack(AckKind::OvResult), REQUEST;
    p_csum_rs_request = CsumRsRequest, Place::Data, Tail::Between(24, 88),
        |_| Packet::CsumRequest(request(), digest()), HASHED;
    p_rs_is_in_sync = RsIsInSync, Place::Meta, Tail::Nothing, |_| ack(AckKind::RsIsInSync), REQUEST;
    p_sync_param89 =
        SyncParam89, Place::Data, Tail::Nothing, |v| Packet::SyncParam(sync_params(v)), SYNC_PARAM;
    p_compressed_bitmap = CompressedBitmap, Place::Data, Tail::Between(2, 4080),
        |_| Packet::CompressedBitmap(Box::new([0xb2, 0x3f, 0xc5, 6])), "b23fc506";
    p_delay_probe =
        DelayProbe, Place::Both, Tail::Nothing, |_| Packet::DelayProbe(7, 1000), "00000007 000003e8";
    p_out_of_sync = OutOfSync, Place::Data, Tail::Nothing, |_| Packet::OutOfSync(describe()), DESCRIBED;
    p_rs_cancel = RsCancel, Place::Meta, Tail::Nothing, |_| ack(AckKind::RsCancel), REQUEST;
    p_conn_st_chg_req =
        ConnStChgReq, Place::Data, Tail::Nothing, |_| Packet::ConnStChgReq(MASK, VALUE), PAIR;
    p_conn_st_chg_reply =
        ConnStChgReply, Place::Meta, Tail::Nothing, |_| Packet::ConnStChgReply(1), "00000001";
    p_retry_write = RetryWrite, Place::Meta, Tail::Nothing, |_| ack(AckKind::RetryWrite), REQUEST;
    p_protocol_update = ProtocolUpdate, Place::Data, Tail::Between(24, 88),
        |v| Packet::ProtocolUpdate(protocol(v)), PROTOCOL;
    p_trim = Trim, Place::Data, Tail::Nothing, |_| Packet::Trim(block(), 0x4142_4344), SIZED;
    p_rs_thin_req = RsThinReq, Place::Data, Tail::Nothing,
        |_| Packet::Request(RequestKind::ThinResync, request()), REQUEST;
    p_rs_deallocated =
        RsDeallocated, Place::Data, Tail::Nothing, |_| Packet::RsDeallocated(describe()), DESCRIBED;
    p_zeroes = Zeroes, Place::Data, Tail::Nothing, |_| Packet::Zeroes(block(), 0x4142_4344), SIZED;
    p_initial_meta = InitialMeta, Place::First, Tail::Nothing, |_| Packet::InitialMeta, "";
    p_initial_data = InitialData, Place::First, Tail::Nothing, |_| Packet::InitialData, "";
    p_connection_features = ConnectionFeatures, Place::Features, Tail::Nothing,
        |_| Packet::Features(OFFER), FEATURES;
}

/// Numbers with a name that nobody may send.
const REFUSED: [Command; 3] =
    [Command::BecomeSyncTarget, Command::BecomeSyncSource, Command::WriteSame];

#[test]
fn every_command_has_a_row() {
    let rows = ROWS.iter().map(|row| row.command);
    let named: BTreeSet<_> = rows.chain(REFUSED).collect();
    assert_eq!(named, Command::ALL.iter().copied().collect());
}

#[test]
fn p_become_sync_target_p_become_sync_source_p_wsame_and_unknown_numbers_are_refused() {
    let known = Command::ALL.iter().map(|command| command.number());
    let unknown = (0..=u16::MAX).filter(|number| Command::from_number(*number).is_none());
    let numbers: Vec<_> =
        unknown.chain(known.filter(|n| REFUSED.iter().any(|r| r.number() == *n))).collect();
    for number in numbers {
        for stream in [Stream::Data, Stream::Meta] {
            for phase in [Phase::Initial, Phase::Handshake, Phase::Running] {
                let mut reader = reader(stream, phase, context(101, 15, None));
                let error = reader.feed(&header(101, 0, number, 24)).unwrap_err();
                assert!(is_unexpected(&error, number), "{number:#x}: {error}");
            }
        }
    }
}

fn is_unexpected(error: &PeerError, number: u16) -> bool {
    let name = CommandName::new(number);
    matches!(error, PeerError::UnexpectedData(n) | PeerError::UnexpectedMeta(n) if *n == name)
}

fn hex(text: &str) -> Vec<u8> {
    let digits: String = text.split_whitespace().collect();
    let pairs = digits.as_bytes().chunks(2).map(|pair| str::from_utf8(pair).unwrap());
    pairs.map(|pair| u8::from_str_radix(pair, 16).unwrap()).collect()
}

/// A header, written down from the specification.
fn header(version: u32, volume: u16, command: u16, length: u32) -> Vec<u8> {
    let command = command.to_be_bytes();
    let long = length.to_be_bytes();
    let parts: &[&[u8]] = match version {
        100.. => &[&[0x86, 0x20, 0xec, 0x20], &volume.to_be_bytes(), &command, &long, &[0; 4]],
        95.. if length > 32_768 => &[&[0x83, 0x5a], &command, &long],
        _ => &[&[0x83, 0x74, 0x02, 0x67], &command, &long[2..]],
    };
    parts.concat()
}

fn context(version: u32, features: u32, integrity: Option<Algorithm>) -> Context {
    Context { version, features: Features::from_bits_retain(features), integrity }
}

fn reader(stream: Stream, phase: Phase, context: Context) -> Reader {
    let mut reader = Reader::new(stream, phase);
    reader.context = context;
    reader
}

/// Where and how the packet is right.
fn readers(row: &Row) -> Vec<Reader> {
    let fresh = |phase| vec![Reader::new(Stream::Data, phase)];
    let streams: &[Stream] = match row.place {
        Place::First => return fresh(Phase::Initial),
        Place::Features => return fresh(Phase::Handshake),
        Place::Meta => &[Stream::Meta],
        Place::Both => &[Stream::Data, Stream::Meta],
        Place::Data | Place::Auth => &[Stream::Data],
    };
    let phase = if row.place == Place::Auth { Phase::Handshake } else { Phase::Running };
    let mut all = vec![];
    for version in 86..=101 {
        for features in [0, 15] {
            for integrity in [None, Some(Algorithm::Md5), Some(Algorithm::Sha512)] {
                let context = context(version, features, integrity);
                all.extend(streams.iter().map(|stream| reader(*stream, phase, context)));
            }
        }
    }
    all
}

/// The sample as this version and these features have it.
fn sample(row: &Row, context: &Context) -> Packet {
    let mut packet = (row.sample)(context.version);
    match &mut packet {
        Packet::Sizes(sizes) if !context.features.contains(Features::WSAME) => sizes.limits = None,
        Packet::Data(_, digest) | Packet::DataReply(_, digest) | Packet::RsDataReply(_, digest) => {
            if let Some(algorithm) = context.integrity {
                *digest = algorithm.digest(b"data");
            }
        }
        _ => {}
    }
    packet
}

/// Shortest and longest length, and that of the sample without data. Spec §4.2, §4.4, §15.
fn lengths(row: &Row, context: &Context) -> (usize, usize, usize) {
    let len = hex(row.body).len();
    let exactly = |len| (len, len, len);
    let version = context.version;
    match (row.command, row.tail) {
        (Command::Sizes, _) => {
            exactly(if context.features.contains(Features::WSAME) { 56 } else { 32 })
        }
        (Command::Protocol | Command::ProtocolUpdate, _) if version < 87 => exactly(24),
        (Command::SyncParam | Command::SyncParam89, _) => match version {
            86 | 87 => exactly(4),
            88 => (4, 68, 9),
            89..=94 => exactly(132),
            _ => exactly(148),
        },
        (Command::Bitmap | Command::CompressedBitmap, Tail::Between(min, max)) => {
            (min, if version < 100 { max + 8 } else { max }, len)
        }
        (_, Tail::Nothing) => exactly(len),
        (_, Tail::Between(min, max)) => (min, max, len),
        (_, Tail::Data) => {
            let fixed = 24 + context.integrity.map_or(0, Algorithm::len);
            (fixed, fixed + DATA_MAX as usize, fixed)
        }
    }
}

fn check(row: &Row) {
    check_bytes(row);
    for reader in readers(row) {
        check_round_trip(row, &reader);
        check_lengths(row, &reader);
    }
    check_places(row);
}

/// The bytes in version 101, as the specification lays them out.
fn check_bytes(row: &Row) {
    let is_fresh = matches!(row.place, Place::First | Place::Features);
    let context = if is_fresh { Context::FRESH } else { context(101, 15, None) };
    let mut out = vec![];
    encode(&context, 7, &(row.sample)(101), 0, &mut out);
    let body = hex(row.body);
    // Of the two numbers for resync parameters, the newer one is sent.
    let command =
        if row.command == Command::SyncParam { Command::SyncParam89 } else { row.command };
    let length = u32::try_from(body.len()).unwrap();
    let version = context.version;
    assert_eq!(out, [header(version, 7, command.number(), length), body].concat());
}

fn check_round_trip(row: &Row, reader: &Reader) {
    let context = reader.context;
    let packet = sample(row, &context);
    let volume = if context.version >= 100 { 7 } else { 0 };
    let data_lens: &[usize] = match row.tail {
        Tail::Data => &[0, 512, 32_768],
        Tail::Nothing | Tail::Between(..) => &[0],
    };
    for data_len in data_lens {
        let mut out = vec![];
        encode(&context, volume, &packet, *data_len, &mut out);
        let len = lengths(row, &context).2;
        let length = u32::try_from(len + data_len).unwrap();
        let command = packet.command(context.version).number();
        let head = header(context.version, volume, command, length);
        assert_eq!(out[..head.len()], head, "{context:?}");
        assert_eq!(out.len(), head.len() + len, "{context:?}");
        let mut reader = reader.clone();
        let incoming = feed(&mut reader, &out).unwrap();
        assert_eq!((incoming.volume, &incoming.packet), (volume, &packet), "{context:?}");
        assert_eq!(incoming.data_len as usize, *data_len);
        if *data_len > 0 {
            assert_eq!(reader.want(), Want::Data(*data_len));
            assert!(!reader.is_between_packets());
            reader.data_done();
        }
        assert!(reader.is_between_packets());
    }
}

/// Feeds all bytes, which must be one packet.
fn feed(reader: &mut Reader, mut bytes: &[u8]) -> Result<crate::Incoming, PeerError> {
    loop {
        let Want::Inline(len) = reader.want() else { panic!("data before a packet") };
        let (piece, rest) = bytes.split_at(len);
        bytes = rest;
        if let Some(incoming) = reader.feed(piece)? {
            assert!(bytes.is_empty(), "{} bytes left", bytes.len());
            return Ok(incoming);
        }
    }
}

/// Truncated, oversized and misaligned.
fn check_lengths(row: &Row, reader: &Reader) {
    let context = reader.context;
    let (min, max, len) = lengths(row, &context);
    let try_length = |length: usize| {
        let length = u32::try_from(length).unwrap();
        reader.clone().feed(&header(context.version, 0, row.command.number(), length))
    };
    assert!(try_length(min).is_ok(), "{context:?}");
    // Headers 80 can not say more than 16 bits, and only multiples of 512 bytes of data are right.
    assert!(max > 0xffff && context.version < 95 || try_length(max).is_ok(), "{context:?}");
    let mut wrong = vec![];
    if min > 0 && row.place != Place::Auth {
        wrong.extend([0, min - 1]);
    }
    // Old headers cannot say more.
    let limit = if context.version >= 95 { u32::MAX as usize } else { 0xffff };
    wrong.extend([max + 1, limit].iter().filter(|length| **length <= limit));
    if row.tail == Tail::Data {
        wrong.extend([min + 1, min + 511, min + 513]);
        wrong.extend([max + 512].iter().filter(|length| **length <= limit));
    }
    for length in wrong {
        let error = try_length(length).unwrap_err();
        assert!(is_length_error(row, reader, &error), "{context:?} {length}: {error:?}");
    }
    // A shell that hands over too few or too many bytes gets an error, not a panic.
    if min == max && len > 0 {
        for other in [len - 1, len + 1] {
            let mut reader = reader.clone();
            let length = u32::try_from(len).unwrap();
            let head = header(context.version, 0, row.command.number(), length);
            assert_eq!(reader.feed(&head), Ok(None));
            assert!(reader.feed(&vec![0; other]).is_err(), "{context:?} {other}");
        }
    }
}

fn is_length_error(row: &Row, reader: &Reader, error: &PeerError) -> bool {
    match row.place {
        Place::Meta => matches!(error, PeerError::MetaSize { .. }),
        Place::Both if reader == &meta_of(reader) => matches!(error, PeerError::MetaSize { .. }),
        Place::First => matches!(error, PeerError::UnexpectedData(_)),
        Place::Features | Place::Auth => matches!(error, PeerError::Length { .. }),
        Place::Data | Place::Both => match row.command {
            Command::CompressedBitmap => {
                matches!(error, PeerError::BitmapTooSmall(_) | PeerError::BitmapTooLarge(_))
            }
            Command::SyncParam | Command::SyncParam89 => {
                matches!(error, PeerError::TooShort { .. } | PeerError::SyncParamTooLong { .. })
            }
            _ => {
                matches!(
                    error,
                    PeerError::TooShort { .. }
                        | PeerError::NoPayloadExpected { .. }
                        | PeerError::Length { .. }
                )
            }
        },
    }
}

/// The same reader on the meta stream.
fn meta_of(of: &Reader) -> Reader {
    reader(Stream::Meta, Phase::Running, of.context)
}

/// Everywhere else it is refused.
fn check_places(row: &Row) {
    for (stream, phase) in [
        (Stream::Data, Phase::Initial),
        (Stream::Data, Phase::Handshake),
        (Stream::Data, Phase::Running),
        (Stream::Meta, Phase::Running),
    ] {
        let is_right = match (stream, phase) {
            (_, Phase::Initial) => row.place == Place::First,
            (_, Phase::Handshake) => matches!(row.place, Place::Features | Place::Auth),
            (Stream::Data, Phase::Running) => matches!(row.place, Place::Data | Place::Both),
            (Stream::Meta, Phase::Running) => matches!(row.place, Place::Meta | Place::Both),
        };
        let context = context(101, 15, None);
        let length = u32::try_from(hex(row.body).len()).unwrap();
        let number = row.command.number();
        let result = reader(stream, phase, context).feed(&header(101, 0, number, length));
        match result {
            Ok(_) => assert!(is_right, "{stream:?} {phase:?}"),
            Err(error) => {
                assert!(!is_right && is_unexpected(&error, number), "{stream:?} {phase:?} {error}");
            }
        }
    }
}

// --- Headers ---

#[test]
fn headers_of_other_versions_are_refused() {
    let old = header(86, 0, 0x13, 0);
    let new = header(101, 0, 0x13, 0);
    let long = [0x83, 0x5a, 0, 0x13, 0, 0, 0, 0];
    for version in 86..=101 {
        let mut reader = reader(Stream::Meta, Phase::Running, context(version, 15, None));
        let mut padded_old = old.clone();
        padded_old.resize(16, 0);
        let (right, wrong) =
            if version >= 100 { (&new[..], &padded_old[..]) } else { (&old[..], &new[..8]) };
        let magic = u32::from_be_bytes(wrong[..4].try_into().unwrap());
        assert_eq!(reader.clone().feed(wrong), Err(PeerError::Magic { magic, version }));
        assert!(reader.clone().feed(right).is_ok());
        // Below 100 both old headers are accepted for any packet.
        assert_eq!(reader.feed(&long).is_ok(), version < 100);
    }
}

#[test]
fn header_padding_must_be_zero() {
    let mut bytes = header(100, 0, 0x13, 0);
    bytes[15] = 1;
    let mut reader = reader(Stream::Meta, Phase::Running, context(100, 15, None));
    assert_eq!(reader.feed(&bytes), Err(PeerError::Padding));
}

#[test]
fn headers_of_a_wrong_number_of_bytes_are_refused() {
    for version in [86, 95, 100] {
        for len in [0, 1, 7, 9, 15, 17] {
            let mut reader = reader(Stream::Meta, Phase::Running, context(version, 15, None));
            assert!(reader.feed(&vec![0x83; len]).is_err());
        }
    }
}

// --- Names ---

#[test]
fn names_end_with_zero_and_are_ascii() {
    let try_name = |name: &[u8]| {
        let mut reader = reader(Stream::Data, Phase::Running, context(101, 15, None));
        let mut bytes = header(101, 0, 0x0b, u32::try_from(24 + name.len()).unwrap());
        bytes.extend([0; 24]);
        bytes.extend(name);
        match feed(&mut reader, &bytes).map(|incoming| incoming.packet) {
            Ok(Packet::Protocol(params)) => Ok(params.integrity_alg),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error),
        }
    };
    assert_eq!(try_name(b"\0"), Ok(String::new()));
    assert_eq!(try_name(b"md5\0"), Ok("md5".into()));
    assert_eq!(try_name(b"md5\0rest"), Ok("md5".into()), "what follows is ignored");
    assert_eq!(try_name(b"m\xff5\0"), Ok("m?5".into()));
    let longest = [[b'x'; 63].as_slice(), &[0]].concat();
    assert_eq!(try_name(&longest).map(|name| name.len()), Ok(63));
    let field = "integrity_alg";
    let unterminated = PeerError::Unterminated { command: Command::Protocol.into(), field };
    assert_eq!(try_name(b""), Err(unterminated));
    assert_eq!(try_name(&[b'x'; 64]), Err(unterminated));
}

#[test]
fn names_in_fields_end_inside() {
    for (version, len) in [(88, 68), (89, 132), (101, 148)] {
        let mut reader = reader(Stream::Data, Phase::Running, context(version, 15, None));
        let mut bytes = header(version, 0, 0x23, len);
        bytes.extend(vec![b'x'; len as usize]);
        let command = Command::SyncParam89.into();
        let unterminated = PeerError::Unterminated { command, field: "verify_alg" };
        assert_eq!(feed(&mut reader, &bytes), Err(unterminated));
    }
}

// --- Limits ---

#[test]
fn the_reader_never_wants_more_than_its_limits() {
    for row in ROWS {
        for reader in readers(row) {
            for length in [0, 1, 24, 4080, 4088, 4096, 32_768, 65_535, 1 << 20, u32::MAX] {
                let mut reader = reader.clone();
                let head = header(reader.context.version, 0, row.command.number(), length);
                if reader.feed(&head).is_err() {
                    continue;
                }
                match reader.want() {
                    Want::Inline(len) => assert!(len <= INLINE_MAX),
                    Want::Data(len) => assert!(len <= DATA_MAX as usize),
                }
            }
        }
    }
}
