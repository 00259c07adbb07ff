//! Typed packets. Spec: wire-protocol.md §4.

use alloc::boxed::Box;
use alloc::string::String;

use drbd_types::{ByteLen, Gi, Sector, SectorCount, StateWord};

use crate::Digest;
use crate::command::Command;

/// The sender's handle of a block. Opaque: stored and echoed, never looked at, except for
/// [`BlockId::SYNCER`] and the two results of a verify. Spec: wire-protocol.md §4.3.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub [u8; 8]);

impl BlockId {
    /// Marks resync traffic.
    pub const SYNCER: Self = Self([0xff; 8]);
    /// Verify: equal. Spec §10.
    pub const IN_SYNC: Self = Self(4711_u64.to_be_bytes());
    /// Verify: different.
    pub const OUT_OF_SYNC: Self = Self(4712_u64.to_be_bytes());

    /// A handle of our own.
    pub const fn from_number(number: u64) -> Self {
        Self(number.to_be_bytes())
    }

    /// The number of a handle of our own.
    pub const fn to_number(self) -> u64 {
        u64::from_be_bytes(self.0)
    }
}

/// The sender's number of an epoch. Opaque for the receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BarrierId(pub [u8; 4]);

impl BarrierId {
    /// A number of our own. (The original writes it in the byte order of its machine.)
    pub const fn from_number(number: u32) -> Self {
        Self(number.to_le_bytes())
    }

    /// The number of an epoch of our own.
    pub const fn to_number(self) -> u32 {
        u32::from_le_bytes(self.0)
    }
}

bitflags::bitflags! {
    /// Flags of a data packet. Spec: wire-protocol.md §5.2.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct DpFlags: u32 {
        /// Somebody waits for the write.
        const RW_SYNC = 2;
        /// The receiver may mark the blocks as in sync.
        const MAY_SET_IN_SYNC = 4;
        /// Write through volatile caches.
        const FUA = 16;
        /// Flush caches before.
        const FLUSH = 32;
        /// P_TRIM: always; P_ZEROES: unmapping is allowed.
        const DISCARD = 64;
        /// P_RECV_ACK is wanted.
        const SEND_RECEIVE_ACK = 128;
        /// P_WRITE_ACK is wanted.
        const SEND_WRITE_ACK = 256;
        /// P_ZEROES: always.
        const ZEROES = 1024;
        /// Others are kept and ignored.
        const _ = !0;
    }
}

bitflags::bitflags! {
    /// Feature flags. Spec: wire-protocol.md §3.1.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Features: u32 {
        /// P_TRIM.
        const TRIM = 1;
        /// P_RS_THIN_REQ and P_RS_DEALLOCATED.
        const THIN_RESYNC = 2;
        /// Queue limits in P_SIZES, discards of 128 MiB.
        const WSAME = 4;
        /// P_ZEROES.
        const WZEROES = 8;
        /// Others are ignored.
        const _ = !0;
    }
}

impl Features {
    /// What this implementation offers, as 8.4.11 does.
    pub const OURS: Self = Self::from_bits_retain(15);
}

/// Head of a packet with data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// First sector.
    pub sector: Sector,
    /// Handle.
    pub id: BlockId,
    /// Sequence number of the volume; 0 in replies.
    pub seq: u32,
    /// How; 0 in replies.
    pub flags: DpFlags,
}

/// Head of a request for a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRequest {
    /// First sector.
    pub sector: Sector,
    /// Handle.
    pub id: BlockId,
    /// Bytes.
    pub size: u32,
    /// Left-over bytes of the sender, without meaning. We send 0.
    pub undefined: u32,
}

/// An acknowledgement of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockAck {
    /// First sector.
    pub sector: Sector,
    /// Echoed handle.
    pub id: BlockId,
    /// Bytes.
    pub size: u32,
    /// Sequence number of the volume.
    pub seq: u32,
}

/// A block without handle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockDesc {
    /// First sector.
    pub sector: Sector,
    /// Bytes.
    pub size: u32,
    /// Left-over bytes of the sender, without meaning. We send 0.
    pub undefined: u32,
}

/// Which acknowledgement. Spec: wire-protocol.md §4.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AckKind {
    /// P_RECV_ACK.
    RecvAck,
    /// P_WRITE_ACK.
    WriteAck,
    /// P_RS_WRITE_ACK.
    RsWriteAck,
    /// P_SUPERSEDED.
    Superseded,
    /// P_NEG_ACK.
    NegAck,
    /// P_NEG_DREPLY.
    NegDataReply,
    /// P_NEG_RS_DREPLY.
    NegRsDataReply,
    /// P_OV_RESULT.
    OvResult,
    /// P_RS_IS_IN_SYNC.
    RsIsInSync,
    /// P_RS_CANCEL.
    RsCancel,
    /// P_RETRY_WRITE.
    RetryWrite,
}

impl AckKind {
    /// The packet number.
    pub const fn command(self) -> Command {
        match self {
            Self::RecvAck => Command::RecvAck,
            Self::WriteAck => Command::WriteAck,
            Self::RsWriteAck => Command::RsWriteAck,
            Self::Superseded => Command::Superseded,
            Self::NegAck => Command::NegAck,
            Self::NegDataReply => Command::NegDataReply,
            Self::NegRsDataReply => Command::NegRsDataReply,
            Self::OvResult => Command::OvResult,
            Self::RsIsInSync => Command::RsIsInSync,
            Self::RsCancel => Command::RsCancel,
            Self::RetryWrite => Command::RetryWrite,
        }
    }
}

/// Which request for a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// P_DATA_REQUEST.
    Data,
    /// P_RS_DATA_REQUEST.
    Resync,
    /// P_RS_THIN_REQ.
    ThinResync,
    /// P_OV_REQUEST.
    Verify,
}

impl RequestKind {
    /// The packet number.
    pub const fn command(self) -> Command {
        match self {
            Self::Data => Command::DataRequest,
            Self::Resync => Command::RsDataRequest,
            Self::ThinResync => Command::RsThinReq,
            Self::Verify => Command::OvRequest,
        }
    }
}

/// P_PROTOCOL, P_PROTOCOL_UPDATE. Numbers are those of the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProtocolParams {
    /// 1 = A, 2 = B, 3 = C.
    pub protocol: u32,
    /// after-sb-0pri, -1pri, -2pri.
    pub after_sb: [u32; 3],
    /// discard-my-data.
    pub discard_my_data: bool,
    /// Dry run.
    pub dry_run: bool,
    /// allow-two-primaries.
    pub two_primaries: u32,
    /// data-integrity-alg of the sender; not sent below 87.
    pub integrity_alg: String,
}

/// P_SYNC_PARAM, P_SYNC_PARAM89; fields that the version does not have are empty or `None`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SyncParams {
    /// resync-rate, KiB/s.
    pub resync_rate: u32,
    /// verify-alg.
    pub verify_alg: String,
    /// csums-alg.
    pub csums_alg: String,
    /// Controller settings.
    pub controller: Option<ControllerParams>,
}

/// Controller settings of P_SYNC_PARAM89.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControllerParams {
    /// c-plan-ahead, 0.1 s.
    pub plan_ahead: u32,
    /// c-delay-target, 0.1 s.
    pub delay_target: u32,
    /// c-fill-target, sectors.
    pub fill_target: u32,
    /// c-max-rate, KiB/s.
    pub max_rate: u32,
}

/// P_UUIDS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uuids {
    /// Current identifier.
    pub current: Gi,
    /// Identifier that the bitmap refers to.
    pub bitmap: Gi,
    /// Older ones, the younger first.
    pub history: [Gi; 2],
    /// Set bits of the sender.
    pub dirty_bits: u64,
    /// 1 discard-my-data, 2 crashed Primary, 4 will be Inconsistent, 8 skip initial sync.
    pub flags: u64,
}

/// P_SIZES.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// What the sender's disk can offer.
    pub d_size: SectorCount,
    /// What its administrator wants; 0: as much as possible.
    pub u_size: SectorCount,
    /// What it is now; 0: "answer with your sizes".
    pub c_size: SectorCount,
    /// Largest request.
    pub max_bio_size: ByteLen,
    /// Always 0.
    pub queue_order_type: u16,
    /// 1 forced, 2 do not resync the new part.
    pub dds_flags: u16,
    /// Only with [`Features::WSAME`].
    pub limits: Option<QueueLimits>,
}

/// Queue limits of P_SIZES, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueLimits {
    /// Physical block.
    pub physical_block: u32,
    /// Logical block.
    pub logical_block: u32,
    /// Offset of the first physical block.
    pub alignment_offset: u32,
    /// Best small request.
    pub io_min: u32,
    /// Best large request.
    pub io_opt: u32,
    /// Discards are possible.
    pub can_discard: bool,
    /// Discarded data reads as zero.
    pub discard_zeroes: bool,
    /// Write-same is possible.
    pub can_write_same: bool,
}

/// P_CONNECTION_FEATURES.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FeatureOffer {
    /// Oldest version.
    pub min: u32,
    /// Newest version; 0 means the same as the oldest.
    pub max: u32,
    /// Features.
    pub features: Features,
}

/// A packet without the data that may follow it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Packet {
    /// P_DATA; data follows.
    Data(Block, Digest),
    /// P_DATA_REPLY; data follows.
    DataReply(Block, Digest),
    /// P_RS_DATA_REPLY; data follows.
    RsDataReply(Block, Digest),
    /// P_TRIM, bytes.
    Trim(Block, u32),
    /// P_ZEROES, bytes.
    Zeroes(Block, u32),
    /// P_BARRIER.
    Barrier(BarrierId),
    /// P_BITMAP: the next words, little endian; empty ends the transfer.
    Bitmap(Box<[u8]>),
    /// P_COMPRESSED_BITMAP: encoding byte and code.
    CompressedBitmap(Box<[u8]>),
    /// P_UNPLUG_REMOTE.
    UnplugRemote,
    /// A request for a block.
    Request(RequestKind, BlockRequest),
    /// P_CSUM_RS_REQUEST.
    CsumRequest(BlockRequest, Digest),
    /// P_OV_REPLY.
    OvReply(BlockRequest, Digest),
    /// P_SYNC_PARAM, P_SYNC_PARAM89.
    SyncParam(SyncParams),
    /// P_PROTOCOL.
    Protocol(ProtocolParams),
    /// P_PROTOCOL_UPDATE.
    ProtocolUpdate(ProtocolParams),
    /// P_UUIDS.
    Uuids(Uuids),
    /// P_SIZES.
    Sizes(Sizes),
    /// P_STATE.
    State(StateWord),
    /// P_SYNC_UUID.
    SyncUuid(Gi),
    /// P_STATE_CHG_REQ: mask and value.
    StateChgReq(StateWord, StateWord),
    /// P_CONN_ST_CHG_REQ: mask and value.
    ConnStChgReq(StateWord, StateWord),
    /// P_OUT_OF_SYNC.
    OutOfSync(BlockDesc),
    /// P_RS_DEALLOCATED.
    RsDeallocated(BlockDesc),
    /// P_AUTH_CHALLENGE.
    AuthChallenge(Box<[u8]>),
    /// P_AUTH_RESPONSE.
    AuthResponse(Box<[u8]>),
    /// P_CONNECTION_FEATURES.
    Features(FeatureOffer),
    /// P_DELAY_PROBE: sequence and microseconds.
    DelayProbe(u32, u32),
    /// P_PING.
    Ping,
    /// P_PING_ACK.
    PingAck,
    /// An acknowledgement of a block.
    Ack(AckKind, BlockAck),
    /// P_BARRIER_ACK: number and count.
    BarrierAck(BarrierId, u32),
    /// P_STATE_CHG_REPLY.
    StateChgReply(i32),
    /// P_CONN_ST_CHG_REPLY.
    ConnStChgReply(i32),
    /// P_INITIAL_DATA.
    InitialData,
    /// P_INITIAL_META.
    InitialMeta,
}

impl Packet {
    /// The packet number. For the resync parameters it depends on the version.
    pub const fn command(&self, version: u32) -> Command {
        match self {
            Self::Data(..) => Command::Data,
            Self::DataReply(..) => Command::DataReply,
            Self::RsDataReply(..) => Command::RsDataReply,
            Self::Trim(..) => Command::Trim,
            Self::Zeroes(..) => Command::Zeroes,
            Self::Barrier(_) => Command::Barrier,
            Self::Bitmap(_) => Command::Bitmap,
            Self::CompressedBitmap(_) => Command::CompressedBitmap,
            Self::UnplugRemote => Command::UnplugRemote,
            Self::Request(kind, _) => kind.command(),
            Self::CsumRequest(..) => Command::CsumRsRequest,
            Self::OvReply(..) => Command::OvReply,
            Self::SyncParam(_) if version < 89 => Command::SyncParam,
            Self::SyncParam(_) => Command::SyncParam89,
            Self::Protocol(_) => Command::Protocol,
            Self::ProtocolUpdate(_) => Command::ProtocolUpdate,
            Self::Uuids(_) => Command::Uuids,
            Self::Sizes(_) => Command::Sizes,
            Self::State(_) => Command::State,
            Self::SyncUuid(_) => Command::SyncUuid,
            Self::StateChgReq(..) => Command::StateChgReq,
            Self::ConnStChgReq(..) => Command::ConnStChgReq,
            Self::OutOfSync(_) => Command::OutOfSync,
            Self::RsDeallocated(_) => Command::RsDeallocated,
            Self::AuthChallenge(_) => Command::AuthChallenge,
            Self::AuthResponse(_) => Command::AuthResponse,
            Self::Features(_) => Command::ConnectionFeatures,
            Self::DelayProbe(..) => Command::DelayProbe,
            Self::Ping => Command::Ping,
            Self::PingAck => Command::PingAck,
            Self::Ack(kind, _) => kind.command(),
            Self::BarrierAck(..) => Command::BarrierAck,
            Self::StateChgReply(_) => Command::StateChgReply,
            Self::ConnStChgReply(_) => Command::ConnStChgReply,
            Self::InitialData => Command::InitialData,
            Self::InitialMeta => Command::InitialMeta,
        }
    }
}
