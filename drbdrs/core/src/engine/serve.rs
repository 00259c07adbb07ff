//! Reads for the peer: remote reads of an application, blocks of a resync, checksums of a verify.
//!
//! A block of a resync or verify is read only while its resync extent is locked, that is, while no
//! application write of this node is under way in it. Requests that have to wait for that keep
//! their place in a queue; the receiver goes on. Spec: io-path-and-resync.md §4.2, §6.7, §8.7, §9.2.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use drbd_types::{Cstate, Dstate, Role, SectorCount, SectorRange, Tick, VolumeNr};
use drbd_wire::packet::{AckKind, Block, BlockDesc, BlockId, BlockRequest, DpFlags, RequestKind};
use drbd_wire::{Digest, Packet};

use crate::action::{DigestUse, DiskOp, SendData};
use crate::event::{DiskAnswer, IoFailure, Payload};
use crate::log_line::Severity;
use crate::request::progress::{Happened, Remote};
use crate::resync::extents::ServeLock;
use crate::slab::{Key, Slab};

use super::Core;
use super::io::Purpose;
use super::resync::{STEP, put_extent, rs_extent};

/// What the peer wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Data,
    Resync { thin: bool },
    Checksum(Digest),
    Verify,
}

/// One read for the peer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Serve {
    wish: Wish,
    range: SectorRange,
    id: BlockId,
    /// Place in the stream, among the writes of the peer.
    order: u64,
    /// Of an earlier connection: nobody wants the answer.
    is_orphan: bool,
}

pub(super) type ServeKey = Key<Serve>;

/// Reads for the peer on one volume.
#[derive(Default)]
pub(super) struct Serves {
    all: Slab<Serve>,
    /// Wait for earlier writes of the peer to the same place: in protocols A and B its application
    /// counts on them before the disk has them. Spec §15 invariant 2.
    behind_writes: Vec<ServeKey>,
    /// Wait for their extent.
    waiting: VecDeque<ServeKey>,
    /// Nothing of a resync is begun before.
    pause_until: Tick,
}

impl Serves {
    /// The counter `ua`, this part of it.
    pub(super) const fn owed(&self) -> usize {
        self.all.len()
    }

    #[cfg(any(test, feature = "check"))]
    pub(super) fn describe(&self) -> alloc::string::String {
        let all: Vec<_> = self.all.iter().map(|(_, serve)| serve).collect();
        alloc::format!("{all:?} waiting {}", self.waiting.len())
    }

    /// Is no block of a resync or verify being read?
    pub(super) fn is_resync_idle(&self) -> bool {
        self.all.iter().all(|(_, serve)| serve.wish == Wish::Data)
    }

    /// When a queue that steps aside wants to be looked at.
    pub(super) fn deadline(&self) -> Option<Tick> {
        (!self.waiting.is_empty() && self.pause_until > Tick(0)).then_some(self.pause_until)
    }
}

impl Core {
    /// P_DATA_REQUEST, P_RS_DATA_REQUEST, P_RS_THIN_REQ, P_OV_REQUEST.
    pub(super) fn on_block_request(
        &mut self,
        nr: VolumeNr,
        kind: RequestKind,
        request: &BlockRequest,
    ) -> bool {
        let wish = match kind {
            RequestKind::Data => Wish::Data,
            RequestKind::Resync => Wish::Resync { thin: false },
            RequestKind::ThinResync => Wish::Resync { thin: true },
            RequestKind::Verify => Wish::Verify,
        };
        self.serve(nr, wish, request)
    }

    /// P_CSUM_RS_REQUEST.
    pub(super) fn on_csum_request(
        &mut self,
        nr: VolumeNr,
        request: &BlockRequest,
        digest: Digest,
    ) -> bool {
        self.serve(nr, Wish::Checksum(digest), request)
    }

    fn serve(&mut self, nr: VolumeNr, wish: Wish, request: &BlockRequest) -> bool {
        let len = SectorCount::from_bytes_exact(u64::from(request.size));
        let len = len.filter(|len| len.0 > 0 && request.size <= 1 << 20);
        let range = len.and_then(|len| SectorRange::new(request.sector, len));
        let Some(range) = range.filter(|range| self.range_on(nr, *range)) else { return false };
        if wish == Wish::Verify {
            self.note_verify_start(nr, range);
        }
        let state = self.state(nr);
        if state.disk != Dstate::UpToDate || !self.volume(nr).is_some_and(|v| v.has_disk()) {
            let text = "Can not satisfy peer's read request, no local data.";
            self.log(Severity::Error, Some(nr), text);
            let kind =
                if wish == Wish::Data { AckKind::NegDataReply } else { AckKind::NegRsDataReply };
            self.send_ack(nr, kind, request.sector, request.id, request.size);
            return true;
        }
        let order = self.next_order();
        let Some(volume) = self.volume_mut(nr) else { return false };
        let serve = Serve { wish, range, id: request.id, order, is_orphan: false };
        let key = volume.serves.all.insert(serve);
        if matches!(wish, Wish::Resync { .. } | Wish::Checksum(_)) {
            volume.resync.note_asked();
        }
        if wish == Wish::Data {
            volume.serves.behind_writes.push(key);
            self.run_reads(nr);
        } else {
            volume.serves.waiting.push_back(key);
            self.touch();
        }
        true
    }

    /// Begins the reads of the peer's application that wait for none of its writes any more.
    fn run_reads(&mut self, nr: VolumeNr) {
        let Some(volume) = self.volume_mut(nr) else { return };
        for key in core::mem::take(&mut volume.serves.behind_writes) {
            let Some(volume) = self.volume_mut(nr) else { return };
            let Some(serve) = volume.serves.all.get(key) else { continue };
            if volume.peer_writes.has_undone(serve.range, serve.order) {
                volume.serves.behind_writes.push(key);
            } else {
                self.read_for_peer(nr, key);
            }
        }
    }

    fn read_for_peer(&mut self, nr: VolumeNr, key: ServeKey) {
        let Some(serve) = self.volume(nr).and_then(|v| v.serves.all.get(key)).copied() else {
            return;
        };
        if !self.volume(nr).is_some_and(|v| v.has_disk()) {
            self.on_serve_io(nr, key, Err(IoFailure::Gone));
            return;
        }
        let digest = match serve.wish {
            Wish::Checksum(_) => Some(DigestUse::Csums),
            Wish::Verify => Some(DigestUse::Verify),
            Wish::Data | Wish::Resync { .. } => None,
        };
        let check_zero = serve.wish == Wish::Resync { thin: true };
        let op = DiskOp::Read { range: serve.range, buf: None, check_zero, digest };
        self.disk_io(nr, op, Purpose::Serve(key));
    }

    /// Begins what can lock its extent now.
    pub(super) fn run_serves(&mut self, nr: VolumeNr) {
        self.run_reads(nr);
        let now = self.now;
        let Some(volume) = self.volume_mut(nr) else { return };
        if volume.serves.waiting.is_empty() || volume.serves.pause_until > now {
            return;
        }
        volume.serves.pause_until = Tick(0);
        let first_extent = volume
            .serves
            .waiting
            .front()
            .and_then(|key| volume.serves.all.get(*key))
            .map(|serve| rs_extent(serve.range.start.0 >> 15));
        let peer_is_primary = volume.state.peer == Role::Primary;
        let is_wanted = first_extent.is_some_and(|extent| volume.extents.has_priority(extent));
        if !peer_is_primary && !is_wanted && self.is_time_to_look(nr) && self.look_throttle(nr) {
            if let Some(volume) = self.volume_mut(nr) {
                volume.serves.pause_until = Tick(now.0 + STEP);
            }
            return;
        }
        let Some(volume) = self.volume_mut(nr) else { return };
        let waiting: Vec<ServeKey> = volume.serves.waiting.drain(..).collect();
        for key in waiting {
            let Some(volume) = self.volume_mut(nr) else { return };
            let Some(serve) = volume.serves.all.get(key).copied() else { continue };
            let extent = rs_extent(serve.range.start.0 >> 15);
            let is_fast = volume.extents.has_priority(extent) && self.look_throttle(nr);
            let Some(volume) = self.volume_mut(nr) else { return };
            let lock = match &volume.disk {
                Some(disk) => {
                    let al = &disk.al;
                    volume.extents.serve_lock(extent, |e| al.in_use(e), || is_fast)
                }
                // The read fails at once, and that answers it.
                None => ServeLock::Locked,
            };
            match lock {
                ServeLock::Locked => self.read_for_peer(nr, key),
                ServeLock::Wait => volume.serves.waiting.push_back(key),
                ServeLock::StepAside => {
                    volume.serves.waiting.push_back(key);
                    volume.serves.pause_until = Tick(now.0 + STEP);
                }
            }
        }
    }

    /// The check of c-min-rate is made once for what came together.
    fn is_time_to_look(&mut self, nr: VolumeNr) -> bool {
        self.volume(nr).is_some_and(|v| v.resync.progress.is_some())
    }

    pub(super) fn on_serve_io(
        &mut self,
        nr: VolumeNr,
        key: ServeKey,
        result: Result<DiskAnswer, IoFailure>,
    ) {
        let Some(volume) = self.volume_mut(nr) else { return };
        let Some(serve) = volume.serves.all.remove(key) else { return };
        volume.stats.dr += serve.range.len.0;
        self.touch();
        // A verify keeps its extent until the result is known.
        if !matches!(serve.wish, Wish::Data | Wish::Verify) || serve.is_orphan {
            self.put_resync_extent(nr, serve.range);
        }
        let answer = match result {
            Ok(answer) => answer,
            Err(failure) => {
                if failure != IoFailure::Gone {
                    self.on_data_error(nr, true);
                }
                if !serve.is_orphan {
                    self.answer_failed_read(nr, &serve);
                }
                return;
            }
        };
        if !serve.is_orphan {
            self.answer_read(nr, &serve, &answer);
        }
        // What is being sent is kept by the shell.
        if let Some(buf) = answer.buf {
            self.free(buf);
        }
    }

    fn answer_failed_read(&mut self, nr: VolumeNr, serve: &Serve) {
        let size = super::request::bytes(serve.range);
        match serve.wish {
            Wish::Data => {
                self.send_ack(nr, AckKind::NegDataReply, serve.range.start, serve.id, size);
            }
            Wish::Verify => {
                // A digest that fits nothing. Spec §9.2.
                let len = self.verify_digest_len();
                let zero = Digest::new(&[0; 64][..len.min(64)]).unwrap_or(Digest::NONE);
                self.send(nr, Packet::OvReply(request_of(serve, size), zero));
            }
            Wish::Resync { .. } | Wish::Checksum(_) => {
                self.send_ack(nr, AckKind::NegRsDataReply, serve.range.start, serve.id, size);
                self.count_failed(nr, serve.range);
            }
        }
    }

    fn answer_read(&mut self, nr: VolumeNr, serve: &Serve, answer: &DiskAnswer) {
        let size = super::request::bytes(serve.range);
        let state = self.state(nr);
        let is_resync = matches!(serve.wish, Wish::Resync { .. } | Wish::Checksum(_));
        if is_resync && state.conn == Cstate::Ahead {
            self.send_ack(nr, AckKind::RsCancel, serve.range.start, serve.id, size);
            return;
        }
        if is_resync && state.pdsk < Dstate::Inconsistent {
            return;
        }
        let head =
            Block { sector: serve.range.start, id: serve.id, seq: 0, flags: DpFlags::empty() };
        let data = answer.buf.map(SendData::Buf);
        match serve.wish {
            Wish::Data => {
                self.count_sent(nr, serve.range.len);
                self.send_with(nr, Packet::DataReply(head, Digest::NONE), data, None);
            }
            Wish::Verify => {
                let digest = answer.digest.unwrap_or(Digest::NONE);
                self.send(nr, Packet::OvReply(request_of(serve, size), digest));
            }
            Wish::Checksum(theirs) if answer.digest == Some(theirs) => {
                self.clear_bits(nr, serve.range);
                self.send_ack(nr, AckKind::RsIsInSync, serve.range.start, serve.id, size);
            }
            Wish::Resync { thin: true } if answer.is_zero == Some(true) => {
                self.note_answered(nr, serve.range);
                let desc = BlockDesc { sector: serve.range.start, size, undefined: 0 };
                self.send(nr, Packet::RsDeallocated(desc));
            }
            Wish::Resync { .. } | Wish::Checksum(_) => {
                self.note_answered(nr, serve.range);
                self.count_sent(nr, serve.range.len);
                self.send_with(nr, Packet::RsDataReply(head, Digest::NONE), data, None);
            }
        }
    }

    fn note_answered(&mut self, nr: VolumeNr, range: SectorRange) {
        if let Some(volume) = self.volume_mut(nr) {
            volume.claims.sent_block(range);
            volume.resync.note_answered(range.len);
        }
    }

    /// The reference on the resync extent of a range is given back.
    pub(super) fn put_resync_extent(&mut self, nr: VolumeNr, range: SectorRange) {
        if let Some(volume) = self.volume_mut(nr) {
            put_extent(volume, range);
        }
        self.touch();
    }

    pub(super) fn has_serves(&self, nr: VolumeNr) -> bool {
        self.volume(nr).is_some_and(|v| v.serves.owed() > 0)
    }

    /// The connection is gone: what waits is dropped, what is being read ends unanswered.
    pub(super) fn orphan_serves(&mut self) {
        for volume in self.volumes.values_mut() {
            let Serves { all, behind_writes, waiting, .. } = &mut volume.serves;
            for key in behind_writes.drain(..).chain(waiting.drain(..)) {
                all.remove(key);
            }
            let keys: Vec<ServeKey> = volume.serves.all.iter().map(|(key, _)| key).collect();
            for key in keys {
                if let Some(serve) = volume.serves.all.get_mut(key) {
                    serve.is_orphan = true;
                }
            }
        }
        self.touch();
    }

    // ---- the other side: answers to own reads ----

    /// P_DATA_REPLY.
    pub(super) fn on_data_reply(
        &mut self,
        nr: VolumeNr,
        block: &Block,
        payload: Option<Payload>,
    ) -> bool {
        let key = Self::request_key(block.id.to_number());
        let request = self.log.get(key).copied().filter(|r| {
            r.volume == nr && r.range.start == block.sector && r.progress.remote == Remote::Read
        });
        let (Some(request), Some(payload)) = (request, payload) else {
            self.log(Severity::Error, Some(nr), "failed to find request");
            if let Some(payload) = payload {
                self.free(payload.buf);
            }
            return false;
        };
        // The original only asserts the length, and leaves the rest undefined.
        if payload.len.0 != request.range.len.0 * 512 || payload.digest_ok == Some(false) {
            if payload.digest_ok == Some(false) {
                self.log(Severity::Error, Some(nr), "Digest integrity check FAILED. Broken NICs?");
            }
            self.free(payload.buf);
            return false;
        }
        if let Some(volume) = self.volume_mut(nr) {
            volume.stats.nr += request.range.len.0;
        }
        self.conn.read_data.insert(key.raw(), payload.buf);
        self.happened(key, Happened::DataReply);
        true
    }
}

const fn request_of(serve: &Serve, size: u32) -> BlockRequest {
    BlockRequest { sector: serve.range.start, id: serve.id, size, undefined: 0 }
}
