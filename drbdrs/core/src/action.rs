//! What the engine wants the shell to do.
//!
//! Actions are started in the order in which they stand in the list. Those with an [`IoId`] are
//! answered by exactly one event. Order on disk is never implied: whoever needs one write before
//! another waits for the answer of the first.

use alloc::boxed::Box;
use alloc::vec::Vec;

use drbd_types::{ByteLen, ByteOffset, Minor, SectorCount, SectorRange, VolumeNr};
use drbd_wire::{Algorithm, Packet};

use crate::event::{Stream, WriteFlags};
use crate::ids::{AppId, BufId, CallId, IoId, SendToken, Ticket};
use crate::link::LinkAction;
use crate::log_line::LogLine;

/// The list that one event produces.
pub type Actions = Vec<Action>;

/// One thing to do.
#[derive(Clone, Debug)]
pub enum Action {
    /// On the data area of a volume's disk.
    Disk {
        /// To be answered.
        io: IoId,
        /// Whose disk.
        volume: VolumeNr,
        /// What.
        op: DiskOp,
    },
    /// On the meta-data of a volume's disk.
    Meta {
        /// To be answered.
        io: IoId,
        /// Whose disk.
        volume: VolumeNr,
        /// What.
        op: MetaOp,
    },
    /// Sockets, before and below packets.
    Link(LinkAction),
    /// A packet for the peer, behind all earlier ones of this stream.
    Send {
        /// On which stream.
        stream: Stream,
        /// Volume for the header.
        volume: u16,
        /// The packet. A digest that the connection wants is computed by the shell.
        packet: Packet,
        /// Data that follows it. The shell keeps a reference of its own until it is sent.
        payload: Option<SendData>,
        /// Reported by [`crate::event::Event::Sent`] if given.
        token: Option<SendToken>,
    },
    /// Whether the data stream is to be read. While not, packets that were read already are still
    /// delivered; the engine keeps them.
    Receive(bool),
    /// Data packets of the peer carry this digest from the next packet on (`None`: no digest).
    ExpectDigest(Option<Algorithm>),
    /// Data packets to the peer carry this digest from the next [`Action::Send`] on.
    AttachDigest(Option<Algorithm>),
    /// The algorithms for [`DigestUse`].
    DigestAlgorithms {
        /// For [`DigestUse::Csums`].
        csums: Option<Algorithm>,
        /// For [`DigestUse::Verify`].
        verify: Option<Algorithm>,
    },
    /// A request of the upper layer has ended.
    CompleteApp {
        /// Which.
        id: AppId,
        /// How. A read's buffer goes back to its owner; a write's is still lent, until
        /// [`Action::FreeBuf`].
        result: Result<(), AppError>,
        /// A read was answered by the peer: its data is here, to be copied or swapped into the
        /// request's buffer; it belongs to the shell from now on.
        data: Option<BufId>,
    },
    /// The engine does not need this buffer any more.
    FreeBuf(BufId),
    /// A handler program is to be run. Spec: states-and-generations.md §12.
    Call {
        /// To be answered.
        call: CallId,
        /// Which.
        handler: Handler,
        /// For a volume handler: its minor number.
        minor: Option<Minor>,
    },
    /// A command has ended.
    Reply {
        /// Which.
        ticket: Ticket,
        /// How.
        reply: crate::admin::Reply,
    },
    /// A line for the log.
    Log(LogLine),
    /// What the device of a volume offers to applications.
    Device {
        /// Of which volume.
        volume: VolumeNr,
        /// What.
        offer: DeviceOffer,
    },
    /// Something that status views show has changed: a state, or the configuration.
    Changed,
}

/// What a device offers to applications now. Requests that were split by older limits are still
/// accepted. Spec: io-path-and-resync.md §3.1, §13.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceOffer {
    /// Size, in sectors.
    pub size: SectorCount,
    /// Applications may use it: the node is Primary.
    pub is_primary: bool,
    /// It holds what this node had when it went down as Primary, and since then nobody else has
    /// written: who had the device open then, and has it still, may go on.
    pub is_continued: bool,
    /// Largest read or write, bytes.
    pub max_io: u32,
    /// Largest discard, bytes; 0: no discards.
    pub max_discard: u32,
    /// Largest zero-out, bytes; 0: zeroes must be written as data.
    pub max_write_zeroes: u32,
    /// Logical block size, bytes.
    pub logical_block: u32,
    /// Physical block size, bytes.
    pub physical_block: u32,
}

impl DeviceOffer {
    /// What nobody is offered.
    pub const NOTHING: Self = Self {
        size: SectorCount(0),
        is_primary: false,
        is_continued: false,
        max_io: 0,
        max_discard: 0,
        max_write_zeroes: 0,
        logical_block: 512,
        physical_block: 512,
    };
}

/// Data of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendData {
    /// In a buffer.
    Buf(BufId),
    /// So many zero bytes.
    Zeroes(ByteLen),
}

/// On the data area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskOp {
    /// Read.
    Read {
        /// Where.
        range: SectorRange,
        /// Into this buffer; `None`: into a new one, which the answer names.
        buf: Option<BufId>,
        /// Look whether it is all zero.
        check_zero: bool,
        /// Compute this digest.
        digest: Option<DigestUse>,
    },
    /// Write.
    Write {
        /// Where.
        range: SectorRange,
        /// From this buffer.
        buf: BufId,
        /// How.
        flags: WriteFlags,
    },
    /// Discard what is aligned to the device's granularity and zero the rest.
    Discard {
        /// Where.
        range: SectorRange,
    },
    /// Write zeroes.
    WriteZeroes {
        /// Where.
        range: SectorRange,
        /// Space may be given back.
        may_unmap: bool,
    },
    /// Flush volatile caches.
    Flush,
}

/// Which of the configured digests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DigestUse {
    /// `csums-alg`.
    Csums,
    /// `verify-alg`.
    Verify,
}

/// On the meta-data device. Blocks are 4096 bytes at offsets from the start of that device.
#[derive(Clone, PartialEq, Eq)]
pub enum MetaOp {
    /// Open the configured data disk and meta-data device, exclusively.
    Open,
    /// Look again how large they are; answered like [`Self::Open`].
    Measure,
    /// Close both. What is still in flight is answered first.
    Close,
    /// Read this many blocks.
    Read {
        /// Where.
        at: ByteOffset,
        /// How many.
        blocks: u32,
    },
    /// Write one block.
    Write {
        /// Where.
        at: ByteOffset,
        /// What.
        block: Box<[u8; 4096]>,
        /// With a flush before and through volatile caches: when it is answered, this block and
        /// all that were answered before survive a power loss.
        stable: bool,
    },
    /// Write many blocks of equal bytes.
    Fill {
        /// Where.
        at: ByteOffset,
        /// How many.
        blocks: u32,
        /// With what.
        value: u8,
    },
    /// What was answered before is to survive a power loss.
    Flush,
}

impl core::fmt::Debug for MetaOp {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Open => f.write_str("Open"),
            Self::Measure => f.write_str("Measure"),
            Self::Close => f.write_str("Close"),
            Self::Read { at, blocks } => write!(f, "Read({}, {blocks} blocks)", at.0),
            Self::Write { at, stable, .. } => write!(f, "Write({}, stable: {stable})", at.0),
            Self::Fill { at, blocks, value } => write!(f, "Fill({}, {blocks}, {value})", at.0),
            Self::Flush => f.write_str("Flush"),
        }
    }
}

/// Why a request of the upper layer failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AppError {
    /// Neither disk could do it.
    Io,
    /// Not here, not now: the node is not Primary.
    ReadOnly,
    /// Outside of the device, not a multiple of 512 bytes, or too large.
    Invalid,
}

/// The handlers that 8.4 calls. Spec: states-and-generations.md §12.2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handler {
    /// A Primary lost access to good data.
    PriOnInconDegr,
    /// A disk failed.
    LocalIoError,
    /// A split brain was found, before any policy.
    InitialSplitBrain,
    /// A split brain stays unresolved.
    SplitBrain,
    /// A Primary should lose its data after a split brain.
    PriLostAfterSb,
    /// A Primary should become target.
    PriLost,
    /// Before a resync, on its target.
    BeforeResyncTarget,
    /// After a resync, on its target.
    AfterResyncTarget,
    /// Before a resync, on its source.
    BeforeResyncSource,
    /// A verify found differences.
    OutOfSync,
    /// The peer is to be outdated or shot.
    FencePeer,
    /// The peer is good again.
    UnfencePeer,
}

impl Handler {
    /// Its name in the configuration, and the first argument of the helper program. Spec:
    /// states-and-generations.md §12.2.
    pub const fn name(self) -> &'static str {
        match self {
            Self::PriOnInconDegr => "pri-on-incon-degr",
            Self::LocalIoError => "local-io-error",
            Self::InitialSplitBrain => "initial-split-brain",
            Self::SplitBrain => "split-brain",
            Self::PriLostAfterSb => "pri-lost-after-sb",
            Self::PriLost => "pri-lost",
            Self::BeforeResyncTarget => "before-resync-target",
            Self::AfterResyncTarget => "after-resync-target",
            Self::BeforeResyncSource => "before-resync-source",
            Self::OutOfSync => "out-of-sync",
            Self::FencePeer => "fence-peer",
            Self::UnfencePeer => "unfence-peer",
        }
    }
}
