//! What the shell tells the engine.
//!
//! Events are facts. The engine never asks for time, randomness or bytes: they arrive here.

use alloc::boxed::Box;
use alloc::vec::Vec;

use drbd_types::{ByteLen, Failure, SectorCount, SectorRange, VolumeNr};
use drbd_wire::{Packet, PeerError};
use drbdmeta::layout::Placement;

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
    /// How many users have the device open (NBD clients, file systems): a Primary with users is
    /// not demoted.
    OpenCount {
        /// Of which volume.
        volume: VolumeNr,
        /// Users now.
        users: u32,
    },
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
    /// Sockets, before there is a connection.
    Link(LinkEvent),
    /// A packet came from the peer, after the two streams were established.
    ///
    /// Actions that this causes must be carried out before the next packet is decoded:
    /// [`crate::action::Action::ExpectDigest`] changes how that is done.
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
    /// An established stream came to its end or broke. Nothing more is received on it.
    StreamLost {
        /// Which.
        stream: Stream,
        /// How.
        how: StreamLoss,
    },
    /// Everything up to and including this send is in the hands of the transport.
    Sent {
        /// The token of the send.
        token: SendToken,
    },
    /// State of the shell's send queue of an established stream. Reported when the queue runs
    /// empty, when it crosses half of the send buffer, and while it is not empty about every 0.25 s.
    SendQueue {
        /// Of which stream.
        stream: Stream,
        /// Bytes that wait in the shell and in the transport.
        waiting: ByteLen,
        /// More than half of the send buffer is in use.
        is_congested: bool,
        /// Bytes that the transport has taken since the connection was established.
        moved: u64,
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
    /// Another volume of this node, on which this one depends (`resync-after`), began or ended a
    /// resync. Spec: states-and-generations.md §11.4.
    Dependency {
        /// The dependent volume.
        volume: VolumeNr,
        /// It must wait.
        must_wait: bool,
    },
    /// Time has passed.
    Timer,
}

/// How an established stream ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StreamLoss {
    /// The peer closed it.
    Closed,
    /// The peer, or something in between, reset it.
    Reset,
    /// Receiving failed; the number is the errno.
    ReceiveFailed(i32),
    /// Sending failed; the number is the errno.
    SendFailed(i32),
    /// The peer broke the protocol; `packet` is what the original calls the packet, if it got as far.
    Bad {
        /// What is wrong.
        error: PeerError,
    },
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

/// A digest, at most 64 bytes.
pub use drbd_wire::Digest;

/// Answer of the meta-data device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetaAnswer {
    /// It is done.
    Done,
    /// The devices are open.
    Opened(Opened),
    /// The blocks that are not entirely zero, with their index in the range that was read.
    Blocks(Vec<(u32, Box<[u8; 4096]>)>),
}

/// What is known of a disk after it was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// Capacity of the backing device.
    pub backing: SectorCount,
    /// Length of the device that carries the meta-data (the same for internal meta-data).
    pub meta_device: ByteLen,
    /// Where the meta-data is.
    pub placement: Placement,
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
    /// It could not be opened.
    Open(Failure),
}
