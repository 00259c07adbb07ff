//! Numbers and layouts of the NBD protocol. All integers are big endian.

use zerocopy::byteorder::network_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First eight bytes of a server.
pub const GREETING: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`: newstyle, and in front of every option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// In front of every answer to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// In front of every request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// In front of a simple reply.
pub const SIMPLE_MAGIC: u32 = 0x6744_6698;
/// In front of a chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags: fixed newstyle, no zeroes behind the export's flags.
pub const FIXED_NEWSTYLE: u16 = 1;
/// See [`FIXED_NEWSTYLE`].
pub const NO_ZEROES: u16 = 2;

/// Options.
pub mod opt {
    /// Choose an export, old way.
    pub const EXPORT_NAME: u32 = 1;
    /// Say goodbye.
    pub const ABORT: u32 = 2;
    /// List the exports.
    pub const LIST: u32 = 3;
    /// Ask about an export.
    pub const INFO: u32 = 6;
    /// Choose an export.
    pub const GO: u32 = 7;
    /// Structured replies from now on.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// List contexts of block status.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Choose contexts of block status.
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Types of answers to options.
pub mod rep {
    /// Done.
    pub const ACK: u32 = 1;
    /// One export.
    pub const SERVER: u32 = 2;
    /// One piece of information.
    pub const INFO: u32 = 3;
    /// One context.
    pub const META_CONTEXT: u32 = 4;
    /// Unknown option.
    pub const ERR_UNSUP: u32 = 1 << 31 | 1;
    /// Not allowed.
    pub const ERR_POLICY: u32 = 1 << 31 | 2;
    /// Malformed.
    pub const ERR_INVALID: u32 = 1 << 31 | 3;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = 1 << 31 | 6;
    /// The server is going away.
    pub const ERR_SHUTDOWN: u32 = 1 << 31 | 7;
    /// Too long.
    pub const ERR_TOO_BIG: u32 = 1 << 31 | 9;
}

/// Types of information.
pub mod info {
    /// Size and flags.
    pub const EXPORT: u16 = 0;
    /// The canonical name.
    pub const NAME: u16 = 1;
    /// A text for humans.
    pub const DESCRIPTION: u16 = 2;
    /// Block sizes.
    pub const BLOCK_SIZE: u16 = 3;
}

bitflags::bitflags! {
    /// What an export can do.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ExportFlags: u16 {
        /// There are flags.
        const HAS_FLAGS = 1;
        /// No writes.
        const READ_ONLY = 2;
        /// FLUSH.
        const SEND_FLUSH = 4;
        /// FUA.
        const SEND_FUA = 8;
        /// TRIM.
        const SEND_TRIM = 32;
        /// WRITE_ZEROES.
        const SEND_WRITE_ZEROES = 64;
        /// DF on reads.
        const SEND_DF = 128;
        /// A flush on one connection covers all.
        const CAN_MULTI_CONN = 256;
        /// CACHE.
        const SEND_CACHE = 1024;
        /// FAST_ZERO.
        const SEND_FAST_ZERO = 2048;
    }
}

/// Requests.
pub mod cmd {
    /// Read.
    pub const READ: u16 = 0;
    /// Write.
    pub const WRITE: u16 = 1;
    /// Goodbye.
    pub const DISC: u16 = 2;
    /// Flush.
    pub const FLUSH: u16 = 3;
    /// Discard.
    pub const TRIM: u16 = 4;
    /// Read ahead.
    pub const CACHE: u16 = 5;
    /// Write zeroes.
    pub const WRITE_ZEROES: u16 = 6;
    /// What is there?
    pub const BLOCK_STATUS: u16 = 7;
}

bitflags::bitflags! {
    /// Flags of a request.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct RequestFlags: u16 {
        /// Through volatile caches.
        const FUA = 1;
        /// Keep the space.
        const NO_HOLE = 2;
        /// One chunk only.
        const DF = 4;
        /// One extent only.
        const REQ_ONE = 8;
        /// Only if it is faster than writing.
        const FAST_ZERO = 16;
    }
}

/// Errors of requests; the numbers are those of Linux.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum NbdError {
    /// Not permitted.
    Perm = 1,
    /// Input or output failed.
    Io = 5,
    /// Out of memory.
    NoMem = 12,
    /// Not possible like this.
    Inval = 22,
    /// Behind the end.
    NoSpc = 28,
    /// Too long for one chunk.
    Overflow = 75,
    /// Not supported.
    NotSup = 95,
}

/// Types of chunks.
pub mod chunk {
    /// Flag: the last one.
    pub const DONE: u16 = 1;
    /// Nothing.
    pub const NONE: u16 = 0;
    /// Offset and data.
    pub const OFFSET_DATA: u16 = 1;
    /// Context and extents.
    pub const BLOCK_STATUS: u16 = 5;
    /// Error and text.
    pub const ERROR: u16 = 1 << 15 | 1;
}

/// Head of a request.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RequestHead {
    /// [`REQUEST_MAGIC`].
    pub magic: U32,
    /// [`RequestFlags`].
    pub flags: U16,
    /// See [`cmd`].
    pub command: U16,
    /// Opaque, echoed.
    pub cookie: [u8; 8],
    /// Bytes.
    pub offset: U64,
    /// Bytes.
    pub length: U32,
}
const _: () = assert!(size_of::<RequestHead>() == 28);

/// A simple reply; data may follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SimpleReply {
    /// [`SIMPLE_MAGIC`].
    pub magic: U32,
    /// 0, or an [`NbdError`].
    pub error: U32,
    /// Of the request.
    pub cookie: [u8; 8],
}
const _: () = assert!(size_of::<SimpleReply>() == 16);

/// Head of a chunk.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ChunkHead {
    /// [`CHUNK_MAGIC`].
    pub magic: U32,
    /// [`chunk::DONE`].
    pub flags: U16,
    /// See [`chunk`].
    pub kind: U16,
    /// Of the request.
    pub cookie: [u8; 8],
    /// Bytes that follow.
    pub length: U32,
}
const _: () = assert!(size_of::<ChunkHead>() == 20);

/// Head of a chunk with data.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DataChunk {
    /// The head.
    pub head: ChunkHead,
    /// Of the data on the device, bytes.
    pub offset: U64,
}

/// Largest read or write, bytes.
pub const LENGTH_MAX: u32 = 32 << 20;
/// Longest string, bytes.
pub const STRING_MAX: u32 = 4096;
