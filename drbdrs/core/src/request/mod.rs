//! Requests of the upper layer, and the log of those that are not completely finished.
//!
//! ```text
//!   admitted -> (activity log hot) -> in the log -> completed -> epoch acknowledged -> forgotten
//!                                      |  local write, packet to the peer, in parallel  |
//!                                      +------------------------------------------------+
//! ```
//!
//! [`progress`] is what one request knows about itself, [`log`] is the transfer log: the order of
//! all requests of a connection, over all its volumes, and the epochs that cut it.
//! Spec: io-path-and-resync.md §1.

pub mod log;
pub mod progress;

use drbd_types::{SectorRange, VolumeNr};

use self::progress::Progress;
use crate::ids::{AppId, BufId};

/// How a write is to be done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriteFlags {
    /// Through volatile caches before completion.
    pub fua: bool,
    /// Caches are to be flushed before this write.
    pub preflush: bool,
    /// Somebody waits for it.
    pub sync: bool,
}

/// What a request wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Read into the buffer.
    Read(BufId),
    /// Write from the buffer.
    Write(BufId, WriteFlags),
    /// Discard.
    Discard,
    /// Write zeroes.
    WriteZeroes {
        /// Space may be given back.
        may_unmap: bool,
    },
}

impl Kind {
    /// Does it change data?
    pub const fn is_write(self) -> bool {
        !matches!(self, Self::Read(_))
    }

    /// The buffer, if there is one.
    pub const fn buf(self) -> Option<BufId> {
        match self {
            Self::Read(buf) | Self::Write(buf, _) => Some(buf),
            Self::Discard | Self::WriteZeroes { .. } => None,
        }
    }
}

/// One request.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// The upper layer's name for it.
    pub app: AppId,
    /// The device.
    pub volume: VolumeNr,
    /// What it wants.
    pub kind: Kind,
    /// Where.
    pub range: SectorRange,
    /// How far it has come.
    pub progress: Progress,
    /// The epoch it belongs to.
    pub epoch: u32,
    /// It holds references in the activity log.
    pub holds_al: bool,
    /// The upper layer has its answer.
    pub is_completed: bool,
    /// Two Primaries wrote the same place, and this write is to be done again after the peer's.
    pub is_postponed: bool,
    /// It is entered among the writes in progress, where others wait for it.
    pub is_in_tree: bool,
    /// How often it was tried before.
    pub attempts: u8,
    /// When the upper layer asked for it.
    pub asked_at: drbd_types::Tick,
    /// When it was accepted.
    pub since: drbd_types::Tick,
    /// When it was given to the transport for the first time on this connection, microseconds.
    pub sent_at: Option<drbd_types::Tick>,
}
