//! What a peer can do wrong.

use crate::command::CommandName;

/// The peer broke the protocol; the connection must end. The texts of the first group are the
/// original's log lines. Spec: wire-protocol.md §2, §4.2, §8.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// The first bytes are no header.
    #[error("Wrong magic value {magic:#010x} in protocol version {version}")]
    Magic {
        /// As found.
        magic: u32,
        /// Agreed version, 0 before that.
        version: u32,
    },
    /// Header 100 with a pad that is not zero.
    #[error("Header padding is not zero")]
    Padding,
    /// A packet that does not belong on the data stream.
    #[error("Unexpected data packet {0}")]
    UnexpectedData(CommandName),
    /// A packet that does not belong on the meta stream.
    #[error("Unexpected meta packet {0}")]
    UnexpectedMeta(CommandName),
    /// More bytes than the packet can have.
    #[error("No payload expected {command} l:{length}", command = .command.log_name())]
    NoPayloadExpected {
        /// Which packet.
        command: CommandName,
        /// Length of the header.
        length: u32,
    },
    /// Fewer bytes than the packet must have.
    #[error("{command}: unexpected packet size, expected:{expected} received:{length}",
        command = .command.log_name())]
    TooShort {
        /// Which packet.
        command: CommandName,
        /// Bytes of its fixed part.
        expected: u32,
        /// Length of the header.
        length: u32,
    },
    /// A meta packet of another length than it must have.
    #[error("Wrong packet size on meta (c: {}, l: {length})", .command.number())]
    MetaSize {
        /// Which packet.
        command: CommandName,
        /// Length of the header.
        length: u32,
    },
    /// Resync parameters that are too long for the version.
    #[error("SyncParam packet too long: received {length}, expected <= {limit} bytes")]
    SyncParamTooLong {
        /// Length of the header.
        length: u32,
        /// Largest possible.
        limit: u32,
    },
    /// A packet of another size than its contents demand.
    #[error("{command}: {length} bytes are not possible (allowed: {allowed})",
        command = .command.log_name())]
    Length {
        /// Which packet.
        command: CommandName,
        /// Length of the header, or of its data.
        length: u32,
        /// What would have been right.
        allowed: &'static str,
    },
    /// A field with an impossible value.
    #[error("{command}: field {field} has the impossible value {value:#x}",
        command = .command.log_name())]
    Field {
        /// Which packet.
        command: CommandName,
        /// Which field.
        field: &'static str,
        /// As found.
        value: u64,
    },
    /// A name that does not end.
    #[error("{command}: the name in field {field} is not terminated",
        command = .command.log_name())]
    Unterminated {
        /// Which packet.
        command: CommandName,
        /// Which field.
        field: &'static str,
    },
    /// A compressed bitmap without code.
    #[error("ReportCBitmap packet too small (l:{0})")]
    BitmapTooSmall(u32),
    /// A compressed bitmap that does not fit into 4096 bytes with its header.
    #[error("ReportCBitmap packet too large (l:{0})")]
    BitmapTooLarge(u32),
    /// Run-length code of an unknown kind.
    #[error("receive_bitmap_c: unknown encoding {0}")]
    BitmapEncoding(u8),
    /// A run of set bits that leaves the bitmap.
    #[error("bitmap overflow (e:{end}) while decoding bm RLE packet")]
    BitmapOverflow {
        /// Last bit of the run.
        end: u64,
    },
    /// A code word that is cut off or means nothing.
    #[error("bitmap decoding error: {left} bits left")]
    BitmapCode {
        /// Bits that are left of the code.
        left: u32,
    },
    /// A plain bitmap packet of the wrong length.
    #[error("receive_bitmap_plain:want ({want}) != size ({size})")]
    BitmapPlain {
        /// What must come.
        want: u32,
        /// What came.
        size: u32,
    },
}
