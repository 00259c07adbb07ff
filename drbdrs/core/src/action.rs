//! What the engine wants the shell to do.
//!
//! Actions are started in the order in which they stand in the list. Those with an [`IoId`] are
//! answered by exactly one event. Order on disk is never implied: whoever needs one write before
//! another waits for the answer of the first.

use alloc::boxed::Box;
use alloc::vec::Vec;

use drbd_types::{Minor, SectorCount, SectorRange, VolumeNr};
use drbd_wire::Packet;
use drbdmeta::superblock::Superblock;

use crate::al::Transaction;
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
        /// Data that follows it, lent until the send is reported or the link is gone.
        payload: Option<BufId>,
        /// Reported by [`crate::event::Event::Sent`] if given.
        token: Option<SendToken>,
    },
    /// Packets of the data stream are to be held back in the shell (or no longer).
    HoldData(bool),
    /// A request of the upper layer has ended.
    CompleteApp {
        /// Which.
        id: AppId,
        /// How. The buffer of the request goes back to its owner.
        result: Result<(), AppError>,
        /// A read was answered by the peer: its data is here, to be copied or swapped into the
        /// request's buffer and then freed.
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
    /// The device's size is now this.
    SetSize {
        /// Of which volume.
        volume: VolumeNr,
        /// In sectors.
        size: SectorCount,
    },
    /// Whether applications may write, read, or not open the device at all.
    SetAccess {
        /// Of which volume.
        volume: VolumeNr,
        /// Primary: it may be used.
        is_primary: bool,
    },
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

/// On the meta-data. Writes are stable when they are answered (if `md-flushes` is set), except
/// bitmap pages, which a following superblock or activity-log write makes stable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetaOp {
    /// Open the configured disk, apply nothing, read and check the superblock.
    Open,
    /// Close it. What is still in flight is answered first.
    Close,
    /// Write the superblock.
    WriteSuperblock(Box<Superblock>),
    /// Write one block of the activity log.
    WriteAl(Box<Transaction>),
    /// Read one page of the bitmap.
    ReadBitmapPage(u32),
    /// Write one page of the bitmap.
    WriteBitmapPage(u32, Box<[u8; 4096]>),
    /// Make earlier bitmap pages stable.
    Flush,
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
