//! Bytes of a packet to its typed form and back. Spec: wire-protocol.md §4.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;

use drbd_types::{ByteLen, Gi, Sector, SectorCount, StateWord};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::command::Command;
use crate::digest::Digest;
use crate::error::PeerError;
use crate::frame::Context;
use crate::layout;
use crate::packet::{
    AckKind, BarrierId, Block, BlockAck, BlockDesc, BlockId, BlockRequest, ControllerParams,
    DpFlags, FeatureOffer, Features, Packet, ProtocolParams, QueueLimits, RequestKind, Sizes,
    SyncParams, Uuids,
};

/// Longest name of an algorithm, with its terminating zero.
pub(crate) const NAME_MAX: usize = 64;

/// Decodes the inline part of a packet, whose length [`crate::frame`] has checked.
///
/// # Errors
/// A field with a value that means nothing.
pub fn decode(context: &Context, command: Command, bytes: &[u8]) -> Result<Packet, PeerError> {
    let body = Body { command, bytes };
    Ok(match command {
        Command::Data => body.with_digest(Packet::Data)?,
        Command::DataReply => body.with_digest(Packet::DataReply)?,
        Command::RsDataReply => body.with_digest(Packet::RsDataReply)?,
        Command::Trim => body.block_size(Packet::Trim)?,
        Command::Zeroes => body.block_size(Packet::Zeroes)?,
        Command::Barrier => Packet::Barrier(BarrierId(body.all::<layout::Barrier>()?.number)),
        Command::Bitmap => Packet::Bitmap(bytes.into()),
        Command::CompressedBitmap => Packet::CompressedBitmap(bytes.into()),
        Command::UnplugRemote => Packet::UnplugRemote,
        Command::DataRequest => body.request(RequestKind::Data)?,
        Command::RsDataRequest => body.request(RequestKind::Resync)?,
        Command::RsThinReq => body.request(RequestKind::ThinResync)?,
        Command::OvRequest => body.request(RequestKind::Verify)?,
        Command::CsumRsRequest => body.request_digest(Packet::CsumRequest)?,
        Command::OvReply => body.request_digest(Packet::OvReply)?,
        Command::SyncParam | Command::SyncParam89 => Packet::SyncParam(body.sync_params(context)?),
        Command::Protocol => Packet::Protocol(body.protocol(context)?),
        Command::ProtocolUpdate => Packet::ProtocolUpdate(body.protocol(context)?),
        Command::Uuids => Packet::Uuids(body.uuids()?),
        Command::Sizes => Packet::Sizes(body.sizes()?),
        Command::State => Packet::State(StateWord(body.all::<layout::One>()?.value.get())),
        Command::SyncUuid => Packet::SyncUuid(Gi(body.all::<layout::Long>()?.value.get())),
        Command::StateChgReq => body.masked(Packet::StateChgReq)?,
        Command::ConnStChgReq => body.masked(Packet::ConnStChgReq)?,
        Command::OutOfSync => body.describe(Packet::OutOfSync)?,
        Command::RsDeallocated => body.describe(Packet::RsDeallocated)?,
        Command::AuthChallenge => Packet::AuthChallenge(bytes.into()),
        Command::AuthResponse => Packet::AuthResponse(bytes.into()),
        Command::ConnectionFeatures => Packet::Features(body.features()?),
        Command::DelayProbe => {
            let pair = body.all::<layout::Pair>()?;
            Packet::DelayProbe(pair.first.get(), pair.second.get())
        }
        Command::Ping => Packet::Ping,
        Command::PingAck => Packet::PingAck,
        Command::RecvAck => body.ack(AckKind::RecvAck)?,
        Command::WriteAck => body.ack(AckKind::WriteAck)?,
        Command::RsWriteAck => body.ack(AckKind::RsWriteAck)?,
        Command::Superseded => body.ack(AckKind::Superseded)?,
        Command::NegAck => body.ack(AckKind::NegAck)?,
        Command::NegDataReply => body.ack(AckKind::NegDataReply)?,
        Command::NegRsDataReply => body.ack(AckKind::NegRsDataReply)?,
        Command::OvResult => body.ack(AckKind::OvResult)?,
        Command::RsIsInSync => body.ack(AckKind::RsIsInSync)?,
        Command::RsCancel => body.ack(AckKind::RsCancel)?,
        Command::RetryWrite => body.ack(AckKind::RetryWrite)?,
        Command::BarrierAck => {
            let raw = body.all::<layout::Barrier>()?;
            Packet::BarrierAck(BarrierId(raw.number), raw.second.get())
        }
        Command::StateChgReply => Packet::StateChgReply(body.all::<layout::Signed>()?.value.get()),
        Command::ConnStChgReply => {
            Packet::ConnStChgReply(body.all::<layout::Signed>()?.value.get())
        }
        Command::InitialData => Packet::InitialData,
        Command::InitialMeta => Packet::InitialMeta,
        Command::BecomeSyncTarget | Command::BecomeSyncSource | Command::WriteSame => {
            return Err(PeerError::UnexpectedData(command.into()));
        }
    })
}

/// Inline bytes of a packet.
struct Body<'a> {
    command: Command,
    bytes: &'a [u8],
}

impl<'a> Body<'a> {
    fn head<T: FromBytes + KnownLayout + Immutable + Unaligned>(
        &self,
    ) -> Result<(T, &'a [u8]), PeerError> {
        T::read_from_prefix(self.bytes).map_err(|_| PeerError::TooShort {
            command: self.command.into(),
            expected: u32::try_from(size_of::<T>()).unwrap_or(u32::MAX),
            length: u32::try_from(self.bytes.len()).unwrap_or(u32::MAX),
        })
    }

    fn all<T: FromBytes + KnownLayout + Immutable + Unaligned>(&self) -> Result<T, PeerError> {
        match self.head::<T>()? {
            (value, []) => Ok(value),
            _ => Err(self.length("exactly its fixed part")),
        }
    }

    fn length(&self, allowed: &'static str) -> PeerError {
        let length = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        PeerError::Length { command: self.command.into(), length, allowed }
    }

    fn digest(&self, bytes: &[u8]) -> Result<Digest, PeerError> {
        Digest::new(bytes).ok_or_else(|| self.length("a digest of at most 64 bytes"))
    }

    fn with_digest(&self, make: fn(Block, Digest) -> Packet) -> Result<Packet, PeerError> {
        let (raw, rest) = self.head::<layout::Block>()?;
        Ok(make(block(&raw), self.digest(rest)?))
    }

    fn block_size(&self, make: fn(Block, u32) -> Packet) -> Result<Packet, PeerError> {
        let raw = self.all::<layout::BlockSize>()?;
        Ok(make(block(&raw.block), raw.size.get()))
    }

    fn request(&self, kind: RequestKind) -> Result<Packet, PeerError> {
        Ok(Packet::Request(kind, block_request(&self.all()?)))
    }

    fn request_digest(
        &self,
        make: fn(BlockRequest, Digest) -> Packet,
    ) -> Result<Packet, PeerError> {
        let (raw, rest) = self.head::<layout::BlockRequest>()?;
        Ok(make(block_request(&raw), self.digest(rest)?))
    }

    fn ack(&self, kind: AckKind) -> Result<Packet, PeerError> {
        let raw = self.all::<layout::BlockRequest>()?;
        Ok(Packet::Ack(
            kind,
            BlockAck {
                sector: Sector(raw.sector.get()),
                id: BlockId(raw.block_id),
                size: raw.size.get(),
                seq: raw.last.get(),
            },
        ))
    }

    fn describe(&self, make: fn(BlockDesc) -> Packet) -> Result<Packet, PeerError> {
        let raw = self.all::<layout::BlockDesc>()?;
        Ok(make(BlockDesc {
            sector: Sector(raw.sector.get()),
            size: raw.size.get(),
            undefined: raw.undefined.get(),
        }))
    }

    fn masked(&self, make: fn(StateWord, StateWord) -> Packet) -> Result<Packet, PeerError> {
        let raw = self.all::<layout::Pair>()?;
        Ok(make(StateWord(raw.first.get()), StateWord(raw.second.get())))
    }

    fn name(&self, field: &'static str, bytes: &[u8]) -> Result<String, PeerError> {
        let command = self.command.into();
        let end = bytes
            .iter()
            .position(|byte| *byte == 0)
            .ok_or(PeerError::Unterminated { command, field })?;
        let name = bytes.get(..end).unwrap_or_default();
        // Names are ASCII; anything else is none that we could know.
        Ok(name.iter().map(|byte| if byte.is_ascii() { char::from(*byte) } else { '?' }).collect())
    }

    fn protocol(&self, context: &Context) -> Result<ProtocolParams, PeerError> {
        let (raw, rest) = self.head::<layout::Protocol>()?;
        let integrity_alg = match (context.version, rest) {
            (87.., name) => self.name("integrity_alg", name)?,
            (_, []) => String::new(),
            _ => return Err(self.length("24 bytes")),
        };
        let conn_flags = raw.conn_flags.get();
        Ok(ProtocolParams {
            protocol: raw.protocol.get(),
            after_sb: [raw.after_sb_0p.get(), raw.after_sb_1p.get(), raw.after_sb_2p.get()],
            discard_my_data: conn_flags & 1 != 0,
            dry_run: conn_flags & 2 != 0,
            two_primaries: raw.two_primaries.get(),
            integrity_alg,
        })
    }

    fn sync_params(&self, context: &Context) -> Result<SyncParams, PeerError> {
        let mut params = SyncParams {
            resync_rate: 0,
            verify_alg: String::new(),
            csums_alg: String::new(),
            controller: None,
        };
        if context.version < 89 {
            let (raw, rest) = self.head::<layout::One>()?;
            params.resync_rate = raw.value.get();
            match (context.version, rest) {
                (88, name) => params.verify_alg = self.name("verify_alg", name)?,
                (_, []) => {}
                _ => return Err(self.length("4 bytes")),
            }
            return Ok(params);
        }
        let (raw, rest) = self.head::<layout::SyncNames>()?;
        params.resync_rate = raw.resync_rate.get();
        params.verify_alg = self.name("verify_alg", &raw.verify_alg)?;
        params.csums_alg = self.name("csums_alg", &raw.csums_alg)?;
        if context.version < 95 {
            if !rest.is_empty() {
                return Err(self.length("132 bytes"));
            }
        } else {
            let raw = layout::SyncController::read_from_bytes(rest)
                .map_err(|_| self.length("148 bytes"))?;
            params.controller = Some(ControllerParams {
                plan_ahead: raw.c_plan_ahead.get(),
                delay_target: raw.c_delay_target.get(),
                fill_target: raw.c_fill_target.get(),
                max_rate: raw.c_max_rate.get(),
            });
        }
        Ok(params)
    }

    fn uuids(&self) -> Result<Uuids, PeerError> {
        let raw = self.all::<layout::Uuids>()?;
        Ok(Uuids {
            current: Gi(raw.current.get()),
            bitmap: Gi(raw.bitmap.get()),
            history: [Gi(raw.history_1.get()), Gi(raw.history_2.get())],
            dirty_bits: raw.dirty_bits.get(),
            flags: raw.flags.get(),
        })
    }

    fn sizes(&self) -> Result<Sizes, PeerError> {
        let (raw, rest) = self.head::<layout::Sizes>()?;
        let limits = if rest.is_empty() {
            None
        } else {
            let raw = layout::QueueLimits::read_from_bytes(rest)
                .map_err(|_| self.length("32 or 56 bytes"))?;
            Some(QueueLimits {
                physical_block: raw.physical_block_size.get(),
                logical_block: raw.logical_block_size.get(),
                alignment_offset: raw.alignment_offset.get(),
                io_min: raw.io_min.get(),
                io_opt: raw.io_opt.get(),
                can_discard: raw.discard_enabled != 0,
                discard_zeroes: raw.discard_zeroes_data != 0,
                can_write_same: raw.write_same_capable != 0,
            })
        };
        Ok(Sizes {
            d_size: SectorCount(raw.d_size.get()),
            u_size: SectorCount(raw.u_size.get()),
            c_size: SectorCount(raw.c_size.get()),
            max_bio_size: ByteLen(u64::from(raw.max_bio_size.get())),
            queue_order_type: raw.queue_order_type.get(),
            dds_flags: raw.dds_flags.get(),
            limits,
        })
    }

    fn features(&self) -> Result<FeatureOffer, PeerError> {
        let raw = self.all::<layout::Features>()?;
        Ok(FeatureOffer {
            min: raw.protocol_min.get(),
            max: raw.protocol_max.get(),
            features: Features::from_bits_retain(raw.feature_flags.get()),
        })
    }
}

fn block(raw: &layout::Block) -> Block {
    Block {
        sector: Sector(raw.sector.get()),
        id: BlockId(raw.block_id),
        seq: raw.seq_num.get(),
        flags: DpFlags::from_bits_retain(raw.dp_flags.get()),
    }
}

fn block_request(raw: &layout::BlockRequest) -> BlockRequest {
    BlockRequest {
        sector: Sector(raw.sector.get()),
        id: BlockId(raw.block_id),
        size: raw.size.get(),
        undefined: raw.last.get(),
    }
}

/// Appends a packet: header and inline part. `data_len` bytes of data follow it on the stream;
/// the caller sends them.
///
/// # Panics
/// If the packet does not fit the version: larger than its header can say, or with fields that it
/// does not have. The engine never makes such a packet.
pub fn encode(context: &Context, volume: u16, packet: &Packet, data_len: usize, out: &mut Vec<u8>) {
    let header = context.header_len();
    let start = out.len();
    out.resize(start + header, 0);
    encode_body(context, packet, out);
    let length = out.len() - start - header + data_len;
    let length = u32::try_from(length).expect("packets are at most 1 MiB and a header");
    let command = packet.command(context.version);
    let place = out.get_mut(start..start + header).unwrap_or_default();
    context.write_header(volume, command, length, place);
}

fn encode_body(context: &Context, packet: &Packet, out: &mut Vec<u8>) {
    match packet {
        Packet::Data(head, digest)
        | Packet::DataReply(head, digest)
        | Packet::RsDataReply(head, digest) => {
            put(out, &raw_block(head));
            out.extend_from_slice(digest.as_bytes());
        }
        Packet::Trim(head, size) | Packet::Zeroes(head, size) => {
            put(out, &layout::BlockSize { block: raw_block(head), size: (*size).into() });
        }
        Packet::Barrier(id) => put(out, &layout::Barrier { number: id.0, second: 0.into() }),
        Packet::Bitmap(bytes)
        | Packet::CompressedBitmap(bytes)
        | Packet::AuthChallenge(bytes)
        | Packet::AuthResponse(bytes) => out.extend_from_slice(bytes),
        Packet::UnplugRemote
        | Packet::Ping
        | Packet::PingAck
        | Packet::InitialData
        | Packet::InitialMeta => {}
        Packet::Request(_, request) => put(out, &raw_request(request)),
        Packet::CsumRequest(request, digest) | Packet::OvReply(request, digest) => {
            put(out, &raw_request(request));
            out.extend_from_slice(digest.as_bytes());
        }
        Packet::SyncParam(params) => encode_sync_params(context, params, out),
        Packet::Protocol(params) | Packet::ProtocolUpdate(params) => {
            encode_protocol(context, params, out);
        }
        Packet::Uuids(uuids) => put(
            out,
            &layout::Uuids {
                current: uuids.current.0.into(),
                bitmap: uuids.bitmap.0.into(),
                history_1: uuids.history[0].0.into(),
                history_2: uuids.history[1].0.into(),
                dirty_bits: uuids.dirty_bits.into(),
                flags: uuids.flags.into(),
            },
        ),
        Packet::Sizes(sizes) => encode_sizes(context, sizes, out),
        Packet::State(word) => put(out, &layout::One { value: word.0.into() }),
        Packet::SyncUuid(gi) => put(out, &layout::Long { value: gi.0.into() }),
        Packet::StateChgReq(mask, value) | Packet::ConnStChgReq(mask, value) => {
            put(out, &layout::Pair { first: mask.0.into(), second: value.0.into() });
        }
        Packet::OutOfSync(desc) | Packet::RsDeallocated(desc) => put(
            out,
            &layout::BlockDesc {
                sector: desc.sector.0.into(),
                size: desc.size.into(),
                undefined: desc.undefined.into(),
            },
        ),
        Packet::Features(offer) => put(
            out,
            &layout::Features {
                protocol_min: offer.min.into(),
                feature_flags: offer.features.bits().into(),
                protocol_max: offer.max.into(),
                reserved: [0; 60],
            },
        ),
        Packet::DelayProbe(first, second) => {
            put(out, &layout::Pair { first: (*first).into(), second: (*second).into() });
        }
        Packet::Ack(_, ack) => put(
            out,
            &layout::BlockRequest {
                sector: ack.sector.0.into(),
                block_id: ack.id.0,
                size: ack.size.into(),
                last: ack.seq.into(),
            },
        ),
        Packet::BarrierAck(id, count) => {
            put(out, &layout::Barrier { number: id.0, second: (*count).into() });
        }
        Packet::StateChgReply(code) | Packet::ConnStChgReply(code) => {
            put(out, &layout::Signed { value: (*code).into() });
        }
    }
}

fn put<T: IntoBytes + Immutable>(out: &mut Vec<u8>, value: &T) {
    out.extend_from_slice(value.as_bytes());
}

fn raw_block(head: &Block) -> layout::Block {
    layout::Block {
        sector: head.sector.0.into(),
        block_id: head.id.0,
        seq_num: head.seq.into(),
        dp_flags: head.flags.bits().into(),
    }
}

fn raw_request(request: &BlockRequest) -> layout::BlockRequest {
    layout::BlockRequest {
        sector: request.sector.0.into(),
        block_id: request.id.0,
        size: request.size.into(),
        last: request.undefined.into(),
    }
}

/// A name in a field of fixed size; names that do not fit are refused by the configuration.
fn padded(name: &str) -> [u8; NAME_MAX] {
    let mut field = [0; NAME_MAX];
    for (to, from) in field.iter_mut().take(NAME_MAX - 1).zip(name.bytes()) {
        *to = from;
    }
    field
}

fn put_name(out: &mut Vec<u8>, name: &str) {
    out.extend(name.bytes().take(NAME_MAX - 1));
    out.push(0);
}

fn encode_protocol(context: &Context, params: &ProtocolParams, out: &mut Vec<u8>) {
    let [zero, one, two] = params.after_sb;
    let conn_flags = u32::from(params.discard_my_data) | u32::from(params.dry_run) << 1;
    put(
        out,
        &layout::Protocol {
            protocol: params.protocol.into(),
            after_sb_0p: zero.into(),
            after_sb_1p: one.into(),
            after_sb_2p: two.into(),
            conn_flags: conn_flags.into(),
            two_primaries: params.two_primaries.into(),
        },
    );
    if context.version >= 87 {
        put_name(out, &params.integrity_alg);
    }
}

fn encode_sync_params(context: &Context, params: &SyncParams, out: &mut Vec<u8>) {
    if context.version < 89 {
        put(out, &layout::One { value: params.resync_rate.into() });
        if context.version == 88 {
            put_name(out, &params.verify_alg);
        }
        return;
    }
    put(
        out,
        &layout::SyncNames {
            resync_rate: params.resync_rate.into(),
            verify_alg: padded(&params.verify_alg),
            csums_alg: padded(&params.csums_alg),
        },
    );
    if context.version >= 95 {
        let controller = params.controller.expect("the engine fills what the version has");
        put(
            out,
            &layout::SyncController {
                c_plan_ahead: controller.plan_ahead.into(),
                c_delay_target: controller.delay_target.into(),
                c_fill_target: controller.fill_target.into(),
                c_max_rate: controller.max_rate.into(),
            },
        );
    }
}

fn encode_sizes(context: &Context, sizes: &Sizes, out: &mut Vec<u8>) {
    let max = u32::try_from(sizes.max_bio_size.0).unwrap_or(u32::MAX);
    put(
        out,
        &layout::Sizes {
            d_size: sizes.d_size.0.into(),
            u_size: sizes.u_size.0.into(),
            c_size: sizes.c_size.0.into(),
            max_bio_size: max.into(),
            queue_order_type: sizes.queue_order_type.into(),
            dds_flags: sizes.dds_flags.into(),
        },
    );
    if context.features.contains(Features::WSAME) {
        let limits = sizes.limits.unwrap_or_default();
        put(
            out,
            &layout::QueueLimits {
                physical_block_size: limits.physical_block.into(),
                logical_block_size: limits.logical_block.into(),
                alignment_offset: limits.alignment_offset.into(),
                io_min: limits.io_min.into(),
                io_opt: limits.io_opt.into(),
                discard_enabled: limits.can_discard.into(),
                discard_zeroes_data: limits.discard_zeroes.into(),
                write_same_capable: limits.can_write_same.into(),
                zero: 0,
            },
        );
    }
}

/// Bytes in a box, for packets with a variable part.
impl From<Digest> for Box<[u8]> {
    fn from(digest: Digest) -> Self {
        digest.as_bytes().into()
    }
}
