//! Cutting the streams into packets. Spec: wire-protocol.md §2, §4.2.
//!
//! ```text
//!   Header --(length checked against the packet's type)--> Inline --> Data --> Header ...
//! ```
//!
//! The reader tells the shell how many bytes to read next and whether they belong to the packet
//! itself or are data for a buffer of its own; data never passes through here.

use drbd_types::units::SectorCount;
use zerocopy::{FromBytes, IntoBytes};

use crate::codec::{NAME_MAX, decode};
use crate::command::{Command, CommandName};
use crate::digest::{Algorithm, Digest};
use crate::error::PeerError;
use crate::layout;
use crate::packet::{Features, Packet};

/// Which of the two connections. Spec §1.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stream {
    /// Handshake, writes, reads, resync, bitmaps, states.
    Data,
    /// Acknowledgements, pings, answers to state requests.
    Meta,
}

/// What was agreed, and what the sender of a stream announced. Decides how packets look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    /// Agreed version; 0 until the features are exchanged.
    pub version: u32,
    /// Agreed features.
    pub features: Features,
    /// Digest on data packets, as announced by their sender.
    pub integrity: Option<Algorithm>,
}

/// Largest data of one packet, bytes.
pub const DATA_MAX: u32 = 1 << 20;
/// Largest inline part of any packet, bytes: a header and this fit into 4096.
pub const INLINE_MAX: usize = 4096 - 8;

const MAGIC_80: u32 = 0x8374_0267;
const MAGIC_95: u16 = 0x835a;
const MAGIC_100: u32 = 0x8620_ec20;

impl Context {
    /// Before anything is agreed.
    pub const FRESH: Self = Self { version: 0, features: Features::empty(), integrity: None };

    /// Length of a header, bytes.
    pub const fn header_len(&self) -> usize {
        if self.version >= 100 { 16 } else { 8 }
    }

    /// Bytes of the digest on data packets.
    pub const fn digest_len(&self) -> usize {
        match self.integrity {
            Some(algorithm) => algorithm.len(),
            None => 0,
        }
    }

    /// Largest data of one packet that this version can carry, bytes. Spec §14.1.
    pub const fn data_max(&self) -> u32 {
        match self.version {
            0..95 => 32_768,
            95..100 => 131_072,
            _ => DATA_MAX,
        }
    }

    /// Bytes of a plain bitmap packet: what fits into 4096 with its header. Spec §8.2.
    pub const fn bitmap_chunk(&self) -> usize {
        4096 - self.header_len()
    }

    pub(crate) fn write_header(
        &self,
        volume: u16,
        command: Command,
        length: u32,
        place: &mut [u8],
    ) {
        let written = if self.version >= 100 {
            let raw = layout::Header100 {
                magic: MAGIC_100.into(),
                volume: volume.into(),
                command: command.number().into(),
                length: length.into(),
                pad: 0.into(),
            };
            raw.write_to(place).is_ok()
        } else if self.version >= 95 && length > 32_768 {
            let raw = layout::Header95 {
                magic: MAGIC_95.into(),
                command: command.number().into(),
                length: length.into(),
            };
            raw.write_to(place).is_ok()
        } else {
            let length = u16::try_from(length).expect("data_max keeps old packets below 64 KiB");
            let raw = layout::Header80 {
                magic: MAGIC_80.into(),
                command: command.number().into(),
                length: length.into(),
            };
            raw.write_to(place).is_ok()
        };
        assert!(written, "the caller made room for this header");
    }

    fn read_header(&self, bytes: &[u8]) -> Result<Header, PeerError> {
        if self.version >= 100 {
            let wrong = PeerError::Magic { magic: first_word(bytes), version: self.version };
            let raw = layout::Header100::read_from_bytes(bytes).map_err(|_| wrong)?;
            if raw.magic.get() != MAGIC_100 {
                return Err(wrong);
            }
            if raw.pad.get() != 0 {
                return Err(PeerError::Padding);
            }
            return Ok(Header {
                volume: raw.volume.get(),
                command: raw.command.get(),
                length: raw.length.get(),
            });
        }
        if let Ok(raw) = layout::Header80::read_from_bytes(bytes)
            && raw.magic.get() == MAGIC_80
        {
            let length = u32::from(raw.length.get());
            return Ok(Header { volume: 0, command: raw.command.get(), length });
        }
        if let Ok(raw) = layout::Header95::read_from_bytes(bytes)
            && raw.magic.get() == MAGIC_95
        {
            return Ok(Header { volume: 0, command: raw.command.get(), length: raw.length.get() });
        }
        Err(PeerError::Magic { magic: first_word(bytes), version: self.version })
    }
}

fn first_word(bytes: &[u8]) -> u32 {
    bytes.first_chunk().map_or(0, |word| u32::from_be_bytes(*word))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    volume: u16,
    command: u16,
    length: u32,
}

/// How long a packet may be, besides its header.
struct Shape {
    /// Bytes that must be there.
    fixed: usize,
    /// What may follow.
    tail: Tail,
}

enum Tail {
    /// Nothing.
    None,
    /// At most this many inline bytes.
    Inline(usize),
    /// Data for a buffer.
    Data,
}

const fn exactly(fixed: usize) -> Shape {
    Shape { fixed, tail: Tail::None }
}

/// Spec §4.2, first table. `None`: does not belong on the data stream.
fn shape_on_data(context: &Context, command: Command) -> Option<Shape> {
    let inline = |fixed, tail| Shape { fixed, tail: Tail::Inline(tail) };
    let data = || Shape { fixed: 24 + context.digest_len(), tail: Tail::Data };
    Some(match command {
        Command::UnplugRemote => exactly(0),
        Command::Bitmap => inline(0, 4096 - context.header_len()),
        Command::CompressedBitmap => inline(2, 4096 - context.header_len() - 2),
        Command::SyncParam | Command::SyncParam89 => sync_param_shape(context.version),
        Command::State => exactly(4),
        Command::Barrier
        | Command::SyncUuid
        | Command::StateChgReq
        | Command::DelayProbe
        | Command::ConnStChgReq => exactly(8),
        Command::OutOfSync | Command::RsDeallocated => exactly(16),
        Command::DataRequest | Command::RsDataRequest | Command::OvRequest | Command::RsThinReq => {
            exactly(24)
        }
        Command::Data | Command::DataReply | Command::RsDataReply => data(),
        Command::Protocol | Command::ProtocolUpdate if context.version < 87 => exactly(24),
        Command::Protocol | Command::ProtocolUpdate => inline(24, NAME_MAX),
        Command::OvReply | Command::CsumRsRequest => inline(24, Digest::MAX),
        Command::Trim | Command::Zeroes => exactly(28),
        Command::Sizes if context.features.contains(Features::WSAME) => exactly(56),
        Command::Sizes => exactly(32),
        Command::Uuids => exactly(48),
        Command::AuthChallenge
        | Command::AuthResponse
        | Command::InitialMeta
        | Command::InitialData
        | Command::ConnectionFeatures
        | Command::BecomeSyncTarget
        | Command::BecomeSyncSource
        | Command::WriteSame
        | Command::Ping
        | Command::PingAck
        | Command::RecvAck
        | Command::WriteAck
        | Command::RsWriteAck
        | Command::Superseded
        | Command::NegAck
        | Command::NegDataReply
        | Command::NegRsDataReply
        | Command::BarrierAck
        | Command::StateChgReply
        | Command::OvResult
        | Command::RsIsInSync
        | Command::RsCancel
        | Command::ConnStChgReply
        | Command::RetryWrite => return None,
    })
}

/// Spec §4.4 "P_SYNC_PARAM".
const fn sync_param_shape(version: u32) -> Shape {
    match version {
        0..88 => exactly(4),
        88 => Shape { fixed: 4, tail: Tail::Inline(NAME_MAX) },
        89..95 => exactly(132),
        _ => exactly(148),
    }
}

/// Spec §4.2, meta connection: exact lengths.
fn length_on_meta(command: Command) -> Option<usize> {
    Some(match command {
        Command::Ping | Command::PingAck => 0,
        Command::RecvAck
        | Command::WriteAck
        | Command::RsWriteAck
        | Command::Superseded
        | Command::NegAck
        | Command::NegDataReply
        | Command::NegRsDataReply
        | Command::OvResult
        | Command::RsIsInSync
        | Command::RsCancel
        | Command::RetryWrite => 24,
        Command::BarrierAck | Command::DelayProbe => 8,
        Command::StateChgReply | Command::ConnStChgReply => 4,
        Command::Data
        | Command::DataReply
        | Command::RsDataReply
        | Command::Barrier
        | Command::Bitmap
        | Command::BecomeSyncTarget
        | Command::BecomeSyncSource
        | Command::UnplugRemote
        | Command::DataRequest
        | Command::RsDataRequest
        | Command::SyncParam
        | Command::Protocol
        | Command::Uuids
        | Command::Sizes
        | Command::State
        | Command::SyncUuid
        | Command::AuthChallenge
        | Command::AuthResponse
        | Command::StateChgReq
        | Command::OvRequest
        | Command::OvReply
        | Command::CsumRsRequest
        | Command::SyncParam89
        | Command::CompressedBitmap
        | Command::OutOfSync
        | Command::ConnStChgReq
        | Command::ProtocolUpdate
        | Command::Trim
        | Command::RsThinReq
        | Command::RsDeallocated
        | Command::WriteSame
        | Command::Zeroes
        | Command::InitialMeta
        | Command::InitialData
        | Command::ConnectionFeatures => return None,
    })
}

/// What phase a connection is in; decides which packets may come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The first packet of an accepted connection. Spec §1.4.
    Initial,
    /// Features, then perhaps authentication, on the data stream. Spec §3.1, §3.2. Any packet is
    /// taken as it is: which one was expected is for the caller to say.
    Handshake,
    /// The normal packet loop. Spec §4.2.
    Running,
}

/// A whole packet, as far as it is inline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Incoming {
    /// Volume of the header, 0 below version 100.
    pub volume: u16,
    /// The packet.
    pub packet: Packet,
    /// Bytes of data that follow it.
    pub data_len: u32,
}

/// What the shell reads next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// This many bytes, to be given to [`Reader::feed`]; may be 0.
    Inline(usize),
    /// This many bytes into a buffer of its own, then [`Reader::data_done`].
    Data(usize),
}

/// Cuts one stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reader {
    stream: Stream,
    /// What was agreed; to be changed between packets only.
    pub context: Context,
    /// Which packets may come; to be changed between packets only.
    pub phase: Phase,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Header,
    Inline { header: Header, command: Command, inline: usize, data: u32 },
    Data(usize),
}

impl Reader {
    /// For a new connection.
    pub const fn new(stream: Stream, phase: Phase) -> Self {
        Self { stream, context: Context::FRESH, phase, state: State::Header }
    }

    /// What to read next. Never more than [`INLINE_MAX`] inline or [`DATA_MAX`] data bytes.
    pub const fn want(&self) -> Want {
        match self.state {
            State::Header => Want::Inline(self.context.header_len()),
            State::Inline { inline, .. } => Want::Inline(inline),
            State::Data(len) => Want::Data(len),
        }
    }

    /// Exactly the inline bytes that were wanted. Returns the packet when it is complete.
    ///
    /// # Errors
    /// The peer broke the protocol.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<Option<Incoming>, PeerError> {
        match self.state {
            State::Header => {
                let header = self.context.read_header(bytes)?;
                let (command, inline, data) = self.check(header)?;
                self.state = State::Inline { header, command, inline, data };
                // A packet without body is complete with its header.
                if inline == 0 { self.feed(&[]) } else { Ok(None) }
            }
            State::Inline { header, command, data, .. } => {
                let packet = decode(&self.context, command, bytes)?;
                self.state = if data > 0 { State::Data(data as usize) } else { State::Header };
                Ok(Some(Incoming { volume: header.volume, packet, data_len: data }))
            }
            // The shell mixed up the two kinds; nothing can be decoded any more.
            State::Data(_) => Err(PeerError::Magic { magic: 0, version: self.context.version }),
        }
    }

    /// The data that was wanted has been read.
    pub const fn data_done(&mut self) {
        self.state = State::Header;
    }

    /// Between two packets? (An end of the stream elsewhere is a broken one.)
    pub const fn is_between_packets(&self) -> bool {
        matches!(self.state, State::Header)
    }

    /// Which command, inline bytes, data bytes.
    fn check(&self, header: Header) -> Result<(Command, usize, u32), PeerError> {
        let name = CommandName::new(header.command);
        let unexpected = match self.stream {
            Stream::Data => PeerError::UnexpectedData(name),
            Stream::Meta => PeerError::UnexpectedMeta(name),
        };
        let command = Command::from_number(header.command).ok_or(unexpected)?;
        match (self.phase, self.stream) {
            (Phase::Initial, _) => initial_len(command, header.length).ok_or(unexpected),
            (Phase::Handshake, _) => {
                let inline = handshake_len(command, header.length)?;
                Ok((command, inline, 0))
            }
            (Phase::Running, Stream::Meta) => {
                let right = length_on_meta(command).ok_or(unexpected)?;
                if header.length as usize != right {
                    let length = header.length;
                    return Err(PeerError::MetaSize { command: name, length });
                }
                Ok((command, right, 0))
            }
            (Phase::Running, Stream::Data) => {
                let shape = shape_on_data(&self.context, command).ok_or(unexpected)?;
                let (inline, data) = split(command, &shape, header.length)?;
                Ok((command, inline, data))
            }
        }
    }
}

/// Only the command of the first packet is looked at; it has no body.
fn initial_len(command: Command, length: u32) -> Option<(Command, usize, u32)> {
    let is_initial = matches!(command, Command::InitialData | Command::InitialMeta);
    (is_initial && length == 0).then_some((command, 0, 0))
}

fn handshake_len(command: Command, length: u32) -> Result<usize, PeerError> {
    let len = length as usize;
    let (is_right, allowed) = match command {
        Command::ConnectionFeatures => (len == 72, "72 bytes"),
        // One more than allowed, so that the caller can tell "too big" from "too small".
        Command::AuthChallenge => (len <= INLINE_MAX, "64 to 128 bytes"),
        Command::AuthResponse => (len <= INLINE_MAX, "one digest"),
        _ => return Err(PeerError::UnexpectedData(command.into())),
    };
    if is_right {
        Ok(len)
    } else {
        Err(PeerError::Length { command: command.into(), length, allowed })
    }
}

fn split(command: Command, shape: &Shape, length: u32) -> Result<(usize, u32), PeerError> {
    let name = CommandName::from(command);
    let len = length as usize;
    let Some(rest) = len.checked_sub(shape.fixed) else {
        if command == Command::CompressedBitmap {
            return Err(PeerError::BitmapTooSmall(length));
        }
        let expected = u32::try_from(shape.fixed).unwrap_or(u32::MAX);
        return Err(PeerError::TooShort { command: name, expected, length });
    };
    match shape.tail {
        Tail::None if rest > 0 => match command {
            Command::SyncParam | Command::SyncParam89 => {
                let limit = u32::try_from(shape.fixed).unwrap_or(u32::MAX);
                Err(PeerError::SyncParamTooLong { length, limit })
            }
            _ => Err(PeerError::NoPayloadExpected { command: name, length }),
        },
        Tail::None => Ok((len, 0)),
        Tail::Inline(most) if rest > most => match command {
            Command::SyncParam | Command::SyncParam89 => {
                let limit = u32::try_from(shape.fixed + most).unwrap_or(u32::MAX);
                Err(PeerError::SyncParamTooLong { length, limit })
            }
            Command::CompressedBitmap => Err(PeerError::BitmapTooLarge(length)),
            _ => Err(PeerError::Length { command: name, length, allowed: "less" }),
        },
        Tail::Inline(_) => Ok((len, 0)),
        Tail::Data => {
            let data = u32::try_from(rest).unwrap_or(u32::MAX);
            if data > DATA_MAX {
                let allowed = "at most 1 MiB of data";
                return Err(PeerError::Length { command: name, length, allowed });
            }
            // Spec §5.5: a multiple of a sector.
            if SectorCount::from_bytes_exact(u64::from(data)).is_none() {
                let allowed = "a multiple of 512 bytes of data";
                return Err(PeerError::Length { command: name, length, allowed });
            }
            Ok((shape.fixed, data))
        }
    }
}
