//! What the shell tells the engine.
//!
//! Events are facts. The engine never asks for time, randomness or bytes: they arrive here.

use drbd_types::{ByteLen, SectorCount, SectorRange, VolumeNr};
use drbd_wire::Packet;
use drbdmeta::layout::Layout;
use drbdmeta::superblock::Superblock;

use crate::admin::Command;
use crate::ids::{AppId, BufId, CallId, IoId, SendToken, Ticket};
use crate::link::LinkEvent;
pub use crate::request::WriteFlags;

/// Which of the two streams of a connection. Spec: wire-protocol.md §1.1.
pub use drbd_wire::Stream;

/// One fact.
#[derive(Clone, Debug)]
pub enum Event {
    /// The upper layer wants something.
    App(AppRequest),
    /// A data disk answered.
    Disk {
        /// The action that is answered.
        io: IoId,
        /// What came of it.
        result: Result<DiskAnswer, IoFailure>,
    },
    /// The meta-data device answered.
    Meta {
        /// The action that is answered.
        io: IoId,
        /// What came of it.
        result: Result<MetaAnswer, IoFailure>,
    },
    /// Sockets, before and below packets.
    Link(LinkEvent),
    /// A packet came from the peer, after the two streams were established.
    Packet {
        /// On which stream.
        stream: Stream,
        /// Volume of the header; 0 where the header has none.
        volume: u16,
        /// The decoded packet.
        packet: Packet,
        /// Its data, in a buffer that belongs to the engine from now on.
        payload: Option<Payload>,
    },
    /// A send is completely in the hands of the transport.
    Sent {
        /// The token of the send.
        token: SendToken,
    },
    /// Bytes that wait in the shell's queue of the data stream, reported whenever it falls below
    /// half of the send buffer or rises above it.
    SendQueue {
        /// More than half of the send buffer is in use.
        is_congested: bool,
    },
    /// A handler program ended.
    Handler {
        /// The call that is answered.
        call: CallId,
        /// Exit code, 0 if the program could not be run or is not configured.
        exit: i32,
    },
    /// The administrator wants something.
    Admin {
        /// Answered by one [`crate::action::Action::Reply`] with the same ticket.
        ticket: Ticket,
        /// What is wanted.
        command: Command,
    },
    /// Time has passed.
    Timer,
}

/// Data of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Payload {
    /// Where it is.
    pub buf: BufId,
    /// How much it is.
    pub len: ByteLen,
    /// The digest that came with it fits; `None` if there was none.
    pub digest_ok: Option<bool>,
}

/// One request of the upper layer. The range has been checked against the size of the device
/// that the engine announced last; the engine checks it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AppRequest {
    /// Name of the request.
    pub id: AppId,
    /// The device.
    pub volume: VolumeNr,
    /// What is to be done.
    pub op: AppOp,
}

/// What the upper layer can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AppOp {
    /// Read into the buffer.
    Read {
        /// Where.
        range: SectorRange,
        /// Lent until completion.
        buf: BufId,
    },
    /// Write from the buffer.
    Write {
        /// Where.
        range: SectorRange,
        /// Lent until completion; nobody may change it meanwhile.
        buf: BufId,
        /// How.
        flags: WriteFlags,
    },
    /// The content of the range is no longer needed.
    Discard {
        /// Where.
        range: SectorRange,
    },
    /// The range must read as zeroes.
    WriteZeroes {
        /// Where.
        range: SectorRange,
        /// Space may be given back.
        may_unmap: bool,
    },
    /// What was completed before must survive a power loss.
    Flush,
}

/// Answer of a data disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskAnswer {
    /// Reads into a new buffer: which.
    pub buf: Option<BufId>,
    /// Reads that asked for it: the data is all zero.
    pub is_zero: Option<bool>,
    /// Reads that asked for it: digest of the data.
    pub digest: Option<Digest>,
}

/// A digest of up to 64 bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Digest {
    bytes: [u8; 64],
    len: u8,
}

impl Digest {
    /// From its bytes. `None` beyond 64.
    pub fn new(from: &[u8]) -> Option<Self> {
        let mut bytes = [0; 64];
        bytes.get_mut(..from.len())?.copy_from_slice(from);
        Some(Self { bytes, len: u8::try_from(from.len()).ok()? })
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..usize::from(self.len)).unwrap_or_default()
    }
}

impl core::fmt::Debug for Digest {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        for byte in self.as_bytes() {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

/// Answer of the meta-data device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetaAnswer {
    /// A write is stable.
    Done,
    /// The disk was opened and its superblock is valid and clean.
    Opened(alloc::boxed::Box<Opened>),
    /// One page of the bitmap; `None` for a page that is a hole, that is, all zero.
    BitmapPage(Option<alloc::boxed::Box<[u8; 4096]>>),
}

/// What is known of a disk after it was opened. Spec: metadata.md §6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// As read.
    pub superblock: Superblock,
    /// Where the areas are.
    pub layout: Layout,
    /// The largest size that this disk can offer. Spec: states-and-generations.md §5.1 "max".
    pub max_size: SectorCount,
    /// What the device can do.
    pub limits: DiskLimits,
}

/// Abilities of a backing device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskLimits {
    /// Largest request, bytes; at most 1 MiB counts.
    pub max_io: u32,
    /// Discards are possible.
    pub can_discard: bool,
    /// Granularity of discards, bytes.
    pub discard_granularity: u32,
    /// Logical block size, bytes.
    pub logical_block: u32,
    /// Physical block size, bytes.
    pub physical_block: u32,
}

/// Why an I/O did not happen. It may or may not have changed the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoFailure {
    /// The device reported an error; the number is the errno.
    Device(i32),
    /// Nobody tried: the device is closed.
    Gone,
}
