//! Disk and meta-data I/O: handing it to the shell, and telling its answers from each other.
//!
//! Every action with an id is answered by exactly one event. What is in flight keeps its place in
//! the table until then, also if nobody waits for it any more (forced detach): buffers of such I/O
//! stay lent.

use drbd_types::{SectorRange, Tick, VolumeNr};

use crate::action::{Action, DiskOp, MetaOp};
use crate::event::{DiskAnswer, IoFailure, MetaAnswer};
use crate::ids::{BufId, IoId};
use crate::request::log::ReqKey;
use crate::slab::Key;

use super::Core;
use super::app::FlushKey;
use super::peer_write::PeerWriteKey;
use super::proc::Cx;
use super::serve::ServeKey;

/// What an I/O is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Local part of an application request.
    Request(ReqKey),
    /// Local part of an application's flush.
    Flush(FlushKey),
    /// A write of the peer, replicated or resync.
    PeerWrite(PeerWriteKey),
    /// Flush at the end of an epoch of the peer, by number.
    EpochFlush(u32),
    /// Flush before resync blocks are acknowledged.
    ResyncFlush,
    /// Flush before extents stop being hot.
    AlFlush,
    /// A read for the peer.
    Serve(ServeKey),
    /// The own block of a checksum based resync or of a verify.
    OwnBlock(u64),
    /// A page of the bitmap, by number.
    Page(u32),
    /// Many pages of the bitmap: first and number.
    Pages(u32, u32),
    /// A block of the activity log.
    AlBlock,
    /// A procedure waits for it.
    Procedure,
}

/// One I/O without answer.
#[derive(Clone, Copy, Debug)]
pub(super) struct InFlight {
    pub(super) volume: VolumeNr,
    pub(super) purpose: Purpose,
    pub(super) since: Tick,
}

/// An answer for a procedure.
pub(super) type Answer = Result<MetaAnswer, IoFailure>;

impl Core {
    /// Hands an I/O on the data disk to the shell. The caller has checked that there is a disk.
    pub(super) fn disk_io(&mut self, nr: VolumeNr, op: DiskOp, purpose: Purpose) -> IoId {
        let since = self.now;
        if let Some(disk) = self.volume_mut(nr).and_then(|v| v.disk.as_mut()) {
            disk.in_flight += 1;
        }
        let key = self.ios.insert(InFlight { volume: nr, purpose, since });
        let io = IoId(key.raw());
        self.out.push(Action::Disk { io, volume: nr, op });
        io
    }

    /// Hands an I/O on the meta-data to the shell.
    pub(super) fn meta_io(&mut self, nr: VolumeNr, op: MetaOp, purpose: Purpose) -> IoId {
        let since = self.now;
        let key = self.ios.insert(InFlight { volume: nr, purpose, since });
        let io = IoId(key.raw());
        self.out.push(Action::Meta { io, volume: nr, op });
        io
    }

    pub(super) fn on_disk(&mut self, io: IoId, result: Result<DiskAnswer, IoFailure>) {
        let Some(known) = self.ios.remove(Key::from_raw(io.0)) else { return };
        let nr = known.volume;
        if let Some(disk) = self.volume_mut(nr).and_then(|v| v.disk.as_mut()) {
            disk.in_flight = disk.in_flight.saturating_sub(1);
        }
        self.touch();
        match known.purpose {
            Purpose::Request(key) => self.on_request_io(nr, key, result.map(|_| ())),
            Purpose::Flush(key) => self.on_flush_io(nr, key, result.map(|_| ())),
            Purpose::PeerWrite(key) => self.on_peer_write_io(nr, key, result.map(|_| ())),
            Purpose::EpochFlush(round) => self.on_epoch_flush(nr, round, result.map(|_| ())),
            Purpose::ResyncFlush => self.on_resync_flush(nr, result.map(|_| ())),
            Purpose::AlFlush => self.on_al_flush(nr, result.is_ok()),
            Purpose::Serve(key) => self.on_serve_io(nr, key, result),
            Purpose::OwnBlock(key) => self.on_own_block(nr, key, result),
            Purpose::Procedure => {
                self.answers.insert(io.0, result.map(|_| MetaAnswer::Done));
            }
            Purpose::Page(_) | Purpose::Pages(..) | Purpose::AlBlock => {}
        }
    }

    pub(super) fn on_meta(&mut self, io: IoId, result: Result<MetaAnswer, IoFailure>) {
        let Some(known) = self.ios.remove(Key::from_raw(io.0)) else { return };
        self.touch();
        match known.purpose {
            Purpose::Page(page) => self.on_pages_written(known.volume, page, 1, result.is_ok()),
            Purpose::Pages(page, n) => self.on_pages_written(known.volume, page, n, result.is_ok()),
            Purpose::AlBlock => self.on_al_block(known.volume, result.is_ok()),
            Purpose::Procedure => {
                self.answers.insert(io.0, result);
            }
            Purpose::Request(_)
            | Purpose::Flush(_)
            | Purpose::PeerWrite(_)
            | Purpose::EpochFlush(_)
            | Purpose::ResyncFlush
            | Purpose::AlFlush
            | Purpose::Serve(_)
            | Purpose::OwnBlock(_) => {}
        }
    }

    /// Data I/O of a volume without answer.
    pub(super) fn data_in_flight(&self, nr: VolumeNr) -> u32 {
        self.volume(nr).and_then(|v| v.disk.as_ref()).map_or(0, |disk| disk.in_flight)
    }

    pub(super) fn free(&mut self, buf: BufId) {
        self.out.push(Action::FreeBuf(buf));
    }

    /// A range of the application or the peer, if it lies on the device.
    pub(super) fn range_on(&self, nr: VolumeNr, range: SectorRange) -> bool {
        self.volume(nr).is_some_and(|v| range.end().0 <= v.size.0)
    }
}

/// An I/O on the meta-data, for procedures.
pub(super) async fn meta(cx: &Cx, nr: VolumeNr, op: MetaOp) -> Result<MetaAnswer, IoFailure> {
    let io = cx.with(|core| core.meta_io(nr, op, Purpose::Procedure));
    cx.until(move |core| core.answers.remove(&io.0)).await
}

/// Flushes the data disk, for procedures: what is only in a volatile cache of this node while the
/// peer has it on its medium would be missed by nobody after a power cut.
pub(super) async fn flush_data(cx: &Cx, nr: VolumeNr) {
    let io = cx.with(|core| {
        let has_disk = core.volume(nr).is_some_and(|v| v.disk.is_some());
        has_disk.then(|| core.disk_io(nr, DiskOp::Flush, Purpose::Procedure))
    });
    let Some(io) = io else { return };
    let failed = cx.until(move |core| core.answers.remove(&io.0)).await.is_err();
    if failed {
        cx.with(|core| core.on_flush_error(nr));
    }
}
