//! Application requests from their routing until they are forgotten.
//!
//! [`Core::route`] is one step: it decides about local disk and peer, enters the request into the
//! log, and starts both parts. Everything after that is an event on a request
//! ([`Core::happened`]); whether it may be completed or forgotten follows from its facts.
//! Spec: io-path-and-resync.md §1.3 to §1.10, §4.

use alloc::format;

use drbd_types::{ByteLen, Cstate, Dstate, SectorRange, Tick, VolumeNr};
use drbd_wire::Packet;
use drbd_wire::packet::{
    BarrierId, Block, BlockDesc, BlockId, BlockRequest, DpFlags, Features, RequestKind,
};

use crate::action::{Action, AppError, DiskOp, SendData};
use crate::config::{OnIoError, Protocol, ReadBalancing};
use crate::event::{AppOp, IoFailure};
use crate::latency::Stage;
use crate::log_line::Severity;
use crate::plant::{self, Bug};
use crate::request::log::ReqKey;
use crate::request::progress::{Happened, Local, Progress, Remote};
use crate::request::{Kind, Request};
use crate::state::facts;

use super::Core;
use super::app::{Parked, Writer};
use super::claims::Claim;
use super::io::Purpose;

/// A read that failed so often is not tried again.
const ATTEMPTS_MAX: u8 = 3;

impl Core {
    /// Decides about a request and starts it.
    pub(super) fn route(&mut self, nr: VolumeNr, parked: Parked) {
        let Some((kind, range)) = kind_of(&parked.request.op) else { return };
        if kind.is_write() && parked.extents_held == 0 && self.needs_log(nr) {
            // The disk has come since it was admitted, or its log goes on.
            self.queue_for_log(nr, parked);
            return;
        }
        if kind.is_write() && self.is_written_now(nr, range) {
            if let Some(volume) = self.volume_mut(nr) {
                volume.app.conflicting.push_back(parked);
            }
            return;
        }
        if kind.is_write() {
            self.check_congestion(nr);
        }
        if self.state(nr).is_suspended() || (kind.is_write() && self.must_not_write(nr)) {
            self.postpone(nr, parked, range);
            return;
        }
        let parts = if kind.is_write() {
            self.parts_of_write(nr, range)
        } else {
            self.parts_of_read(nr, range)
        };
        let Some((has_local, remote)) = parts else {
            self.fail_routed(nr, parked, range);
            return;
        };
        let request = Request {
            app: parked.request.id,
            volume: nr,
            kind,
            range,
            progress: Progress::new(has_local, remote),
            epoch: 0,
            holds_al: parked.extents_held > 0,
            is_completed: false,
            is_postponed: false,
            is_in_tree: matches!(remote, Remote::Mirror(_)),
            attempts: parked.attempts,
            asked_at: parked.asked_at,
            since: self.now,
            sent_at: None,
        };
        let key = self.log.push(request);
        if request.is_in_tree
            && let Some(volume) = self.volume_mut(nr)
        {
            volume.app.tree.insert(range, Writer::Own(key));
        }
        self.send_request(key);
        if kind.is_write() && matches!(remote, Remote::Mirror(_)) {
            let most = self.conn.net.as_ref().map_or(u32::MAX, |net| net.max_epoch_size);
            // With two Primaries each write is an epoch of its own: a kernel that decides against
            // one never acknowledges its epoch (defect 14.2), and the others must not wait for it.
            if self.log.writes_in_open_epoch() >= most || self.conn.has_two_primaries() {
                self.close_epoch();
            }
        }
        if has_local {
            self.submit_local(key);
        } else {
            self.advance(key);
        }
    }

    /// Does a write that is not completed yet touch the range?
    fn is_written_now(&self, nr: VolumeNr, range: SectorRange) -> bool {
        if plant::has(Bug::MixOverlapping) {
            return false;
        }
        let Some(volume) = self.volume(nr) else { return false };
        volume.app.tree.overlapping(range).any(|(_, writer)| match writer {
            Writer::Own(key) => self.log.get(key).is_some_and(|r| !r.is_completed),
            Writer::Peer(_) => true,
        })
    }

    /// The peer has to hear of a failed disk first, or a new generation has to be stable before
    /// anything is written alone (defect 14.9).
    fn must_not_write(&self, nr: VolumeNr) -> bool {
        let marks = self.volume(nr).map(|v| v.marks);
        marks.is_some_and(|marks| marks.failure_untold || marks.generation_due)
    }

    /// It may not go on now: the request starts again from the top. What the own disk may have
    /// already is still under way, and only waits.
    fn postpone(&mut self, nr: VolumeNr, mut parked: Parked, range: SectorRange) {
        if parked.is_begun {
            if let Some(volume) = self.volume_mut(nr) {
                volume.app.conflicting.push_back(parked);
            }
            return;
        }
        self.put_extents(nr, range, parked.extents_held);
        parked.extents_held = 0;
        if let Some(volume) = self.volume_mut(nr) {
            volume.app.admitted = volume.app.admitted.saturating_sub(1);
            volume.app.waiting.push_front(parked);
        }
    }

    fn fail_routed(&mut self, nr: VolumeNr, parked: Parked, range: SectorRange) {
        if parked.is_begun
            && let Some(volume) = self.volume_mut(nr)
        {
            volume.set_out_of_sync(range);
        }
        self.put_extents(nr, range, parked.extents_held);
        let text = format!(
            "IO ERROR: neither local nor remote data, sector {}+{}",
            range.start.0, range.len.0
        );
        self.log(Severity::Error, Some(nr), text);
        if let Some(volume) = self.volume_mut(nr) {
            volume.app.admitted = volume.app.admitted.saturating_sub(1);
        }
        let result = Err(AppError::Io);
        self.out.push(Action::CompleteApp { id: parked.request.id, result, data: None });
        if let AppOp::Write { buf, .. } = parked.request.op {
            self.free(buf);
        }
        self.touch();
    }

    /// Local part and network part of a write; `None`: it fails. Spec §1.3 steps 6 to 9.
    fn parts_of_write(&mut self, nr: VolumeNr, range: SectorRange) -> Option<(bool, Remote)> {
        let protocol = self.conn.net.as_ref().map_or(Protocol::C, |net| net.protocol);
        let volume = self.volume_mut(nr)?;
        let state = volume.state;
        if state.disk != Dstate::UpToDate && state.pdsk != Dstate::UpToDate {
            return None;
        }
        let has_local = volume.has_disk();
        let remote = if facts::must_replicate(&state) {
            Remote::Mirror(protocol)
        } else if facts::report_out_of_sync(&state) {
            // Set before the local write begins: a crash must find them. Told even if they were set
            // before: a write that is under way may be about to clear them over there.
            volume.set_out_of_sync(range);
            Remote::OutOfSync
        } else {
            Remote::None
        };
        (has_local || matches!(remote, Remote::Mirror(_))).then_some((has_local, remote))
    }

    /// Who serves a read. Spec §4.1.
    fn parts_of_read(&mut self, nr: VolumeNr, range: SectorRange) -> Option<(bool, Remote)> {
        let owed = self.pending_of_peer(nr);
        let volume = self.volume_mut(nr)?;
        let state = volume.state;
        let bits = range.bits_touched();
        let local = match (state.disk, &volume.disk) {
            (Dstate::UpToDate, Some(_)) => true,
            (Dstate::Inconsistent, Some(disk)) => {
                disk.bitmap.count_in(bits.start.0..bits.end.0) == 0 || plant::has(Bug::ReadStale)
            }
            _ => false,
        };
        let remote = state.pdsk == Dstate::UpToDate && state.conn >= Cstate::Connected;
        // A kernel reads past writes that its disk has not done yet.
        let is_peer_behind = volume.app.tree.overlapping(range).next().is_some();
        let wants_remote = local
            && remote
            && !is_peer_behind
            && match volume.config.read_balancing {
                ReadBalancing::PreferLocal | ReadBalancing::WhenCongestedRemote => false,
                ReadBalancing::PreferRemote => true,
                ReadBalancing::RoundRobin => {
                    volume.app.read_turn = !volume.app.read_turn;
                    !volume.app.read_turn
                }
                ReadBalancing::LeastPending => {
                    volume.disk.as_ref().map_or(0, |disk| disk.in_flight) > owed
                }
                ReadBalancing::Striping(log2) => (range.start.0 * 512) >> log2 & 1 == 1,
            };
        match (local, remote) {
            (true, _) if !wants_remote => Some((true, Remote::None)),
            (_, true) => Some((false, Remote::Read)),
            (_, false) => None,
        }
    }

    // ---- sending ----

    /// The network part goes out, behind the barrier of the epoch before.
    pub(super) fn send_request(&mut self, key: ReqKey) {
        let Some(request) = self.log.get(key).copied() else { return };
        let nr = request.volume;
        let remote = request.progress.remote;
        if matches!(remote, Remote::None) {
            return;
        }
        self.enter_epoch(request.epoch);
        let now = self.now;
        if let Some(request) = self.log.get_mut(key) {
            request.sent_at = Some(now);
        }
        match remote {
            Remote::None => {}
            Remote::Mirror(protocol) => {
                self.sent_epoch.wrote();
                self.send_write(key, &request, protocol);
            }
            Remote::OutOfSync => {
                let size = bytes(request.range);
                let desc = BlockDesc { sector: request.range.start, size, undefined: 0 };
                let token = self.token();
                self.send_with(nr, Packet::OutOfSync(desc), None, Some(token));
                self.conn.sent_tokens.push_back((token, key));
            }
            Remote::Read => {
                let head = BlockRequest {
                    sector: request.range.start,
                    id: BlockId::from_number(key.raw()),
                    size: bytes(request.range),
                    undefined: 0,
                };
                self.send(nr, Packet::Request(RequestKind::Data, head));
            }
        }
    }

    fn send_write(&mut self, key: ReqKey, request: &Request, protocol: Protocol) {
        let nr = request.volume;
        let version = self.conn.version;
        let features = self.conn.features;
        let conn = self.state(nr).conn;
        let may_set = conn >= Cstate::SyncSource && conn <= Cstate::PausedSyncT;
        let Some(volume) = self.volume_mut(nr) else { return };
        let seq = volume.next_seq();
        let mut flags = DpFlags::empty();
        flags.set(DpFlags::MAY_SET_IN_SYNC, may_set);
        if version >= 100 {
            flags.set(DpFlags::SEND_RECEIVE_ACK, protocol == Protocol::B);
            flags.set(DpFlags::SEND_WRITE_ACK, protocol == Protocol::C || may_set);
        }
        let size = bytes(request.range);
        let block = |flags| Block {
            sector: request.range.start,
            id: BlockId::from_number(key.raw()),
            seq,
            flags,
        };
        let zeroes = Some(SendData::Zeroes(ByteLen(u64::from(size))));
        let no_digest = drbd_wire::Digest::NONE;
        let (packet, data) = match request.kind {
            Kind::Read(_) => return,
            Kind::Write(buf, how) => {
                flags.set(DpFlags::RW_SYNC, how.sync || how.fua || how.preflush);
                if version >= 95 {
                    flags.set(DpFlags::FUA, how.fua);
                    flags.set(DpFlags::FLUSH, how.preflush);
                }
                (Packet::Data(block(flags), no_digest), Some(SendData::Buf(buf)))
            }
            Kind::Discard if features.contains(Features::TRIM) && version >= 95 => {
                (Packet::Trim(block(flags | DpFlags::RW_SYNC | DpFlags::DISCARD), size), None)
            }
            Kind::WriteZeroes { may_unmap } if self.may_send_zeroes() => {
                flags.set(DpFlags::DISCARD, may_unmap);
                (Packet::Zeroes(block(flags | DpFlags::RW_SYNC | DpFlags::ZEROES), size), None)
            }
            // The peer understands neither: the same as data. The device offers only sizes that
            // fit one packet then.
            Kind::Discard | Kind::WriteZeroes { .. } => {
                (Packet::Data(block(flags), no_digest), zeroes)
            }
        };
        let is_waiting_for_transport = protocol == Protocol::A;
        let token = is_waiting_for_transport.then(|| self.token());
        if may_set && let Some(volume) = self.volume_mut(nr) {
            volume.claims.make(request.range, Claim::Write(key));
        }
        self.conn.sectors_in_flight += request.range.len.0;
        if data.is_some() {
            self.count_sent(nr, request.range.len);
        }
        self.send_with(nr, packet, data, token);
        if let Some(token) = token {
            self.conn.sent_tokens.push_back((token, key));
        }
    }

    /// P_ZEROES would break a connection with data-integrity-alg to a kernel peer (defect 14.3).
    pub(super) fn may_send_zeroes(&self) -> bool {
        self.conn.features.contains(Features::WZEROES)
            && self.conn.net.as_ref().is_some_and(|net| net.integrity_alg.is_empty())
    }

    /// Something of this epoch is sent next.
    fn enter_epoch(&mut self, epoch: u32) {
        if let Some(number) = self.sent_epoch.enter(epoch) {
            self.send_barrier(number);
        }
    }

    fn send_barrier(&mut self, number: u32) {
        if plant::has(Bug::ForgetBarrier) {
            return;
        }
        self.conn.barrier_sent_at = Some(self.now);
        self.send(VolumeNr(0), Packet::Barrier(BarrierId::from_number(number)));
    }

    /// The open epoch ends; the barrier goes out at once, since nothing else waits to be sent.
    pub(super) fn close_epoch(&mut self) {
        self.log.close_epoch();
        // Also if the open epoch is empty: writes that are sent again belong to older ones.
        if self.conn.is_up && self.sent_epoch.is_open() {
            self.enter_epoch(self.log.open_epoch());
        }
    }

    pub(super) fn on_sent(&mut self, token: crate::ids::SendToken) {
        self.touch();
        let Some(at) = self.conn.sent_tokens.iter().position(|(t, _)| *t == token) else {
            self.conn.last_sent = Some(token);
            return;
        };
        if let Some((_, key)) = self.conn.sent_tokens.remove(at) {
            self.happened(key, Happened::Sent);
        }
    }

    // ---- the local part ----

    /// Hands the local part to the disk; without a disk it has failed.
    fn submit_local(&mut self, key: ReqKey) {
        let Some(request) = self.log.get(key).copied() else { return };
        let nr = request.volume;
        if !self.volume(nr).is_some_and(|v| v.has_disk()) {
            self.happened(key, Happened::LocalError);
            return;
        }
        let range = request.range;
        let op = match request.kind {
            Kind::Read(buf) => {
                DiskOp::Read { range, buf: Some(buf), check_zero: false, digest: None }
            }
            Kind::Write(buf, flags) => DiskOp::Write { range, buf, flags },
            Kind::Discard => DiskOp::Discard { range },
            Kind::WriteZeroes { may_unmap } => DiskOp::WriteZeroes { range, may_unmap },
        };
        if let Some(volume) = self.volume_mut(nr) {
            volume.resync.on_other_io(range.len);
        }
        self.disk_io(nr, op, Purpose::Request(key));
    }

    pub(super) fn on_request_io(
        &mut self,
        nr: VolumeNr,
        key: ReqKey,
        result: Result<(), IoFailure>,
    ) {
        let Some(request) = self.log.get(key).copied() else { return };
        let range = request.range;
        if request.progress.local == Local::Aborted {
            self.log(
                Severity::Alert,
                Some(nr),
                format!(
                    "delayed completion of aborted I/O, sector {}+{}",
                    range.start.0, range.len.0
                ),
            );
        }
        if result.is_ok() {
            let Some(volume) = self.volume_mut(nr) else { return };
            let counter =
                if request.kind.is_write() { &mut volume.stats.dw } else { &mut volume.stats.dr };
            *counter += range.len.0;
            self.happened(key, Happened::LocalOk);
            return;
        }
        if request.kind == Kind::Discard && request.progress.local == Local::Pending {
            self.write_zeroes_instead(key);
            return;
        }
        // The peer has to be asked for it from now on, and a later resync repairs the area.
        if let Some(volume) = self.volume_mut(nr) {
            volume.set_out_of_sync(range);
        }
        let is_read = !request.kind.is_write();
        let what = if is_read { "READ" } else { "WRITE" };
        let text = format!("local {what} IO error sector {}+{}", range.start.0, range.len.0);
        self.log(Severity::Warn, Some(nr), text);
        self.on_data_error(nr, is_read);
        self.happened(key, Happened::LocalError);
    }

    /// The disk does not discard. That alone is no reason to leave it (spec §3.7), but the range reads
    /// as zeroes on the peer.
    fn write_zeroes_instead(&mut self, key: ReqKey) {
        if let Some(request) = self.log.get_mut(key) {
            request.kind = Kind::WriteZeroes { may_unmap: false };
        }
        self.submit_local(key);
    }

    /// A data I/O failed: what `on-io-error` says. Spec: states §6.4.
    pub(super) fn on_data_error(&mut self, nr: VolumeNr, is_read: bool) {
        let Some(volume) = self.volume(nr) else { return };
        if volume.config.on_io_error == OnIoError::PassOn {
            self.log(Severity::Error, Some(nr), "Local IO failed in request.");
            if self.state(nr).disk > Dstate::Inconsistent {
                let _ = self.force(nr, |s| s.disk = Dstate::Inconsistent);
            }
            if self.state(nr).disk > Dstate::Inconsistent {
                // The source of a resync can not be Inconsistent: the original stays UpToDate with
                // a stale block. The peer's requests are refused from here on.
                let _ = self.force(nr, |s| {
                    s.conn = Cstate::Connected;
                    s.disk = Dstate::Inconsistent;
                });
            }
            return;
        }
        self.detach_on_error(nr, is_read);
    }

    /// A flush failed. What was in the lost cache is unknown. A disk that is left is covered by its
    /// activity log when it comes back; one that stays has to be marked whole.
    pub(super) fn on_flush_error(&mut self, nr: VolumeNr) {
        self.on_data_error(nr, false);
        if self.volume(nr).is_some_and(|v| v.has_disk()) {
            self.start(move |cx| async move {
                // A failure has been dealt with where it happened.
                let _ = super::meta::set_all_bits(&cx, nr).await;
            });
        }
    }

    // ---- events ----

    /// One more fact about a request, and what follows.
    pub(super) fn happened(&mut self, key: ReqKey, happened: Happened) {
        let Some(request) = self.log.get_mut(key) else { return };
        let was_mirror = request.progress.is_unacknowledged_mirror();
        let was_pending = request.progress.is_pending();
        request.progress.on(happened);
        let is_answer = was_pending && !request.progress.is_pending();
        let request = *request;
        self.note_stage(&request, happened, is_answer);
        let is_over = was_mirror && !request.progress.is_unacknowledged_mirror();
        let len = request.range.len.0;
        if is_over {
            self.conn.sectors_in_flight = self.conn.sectors_in_flight.saturating_sub(len);
        }
        self.advance(key);
    }

    /// How long a disk or the peer took.
    fn note_stage(&mut self, request: &Request, happened: Happened, is_answer: bool) {
        let (stage, since) = match happened {
            Happened::LocalOk => (Stage::Disk, Some(request.since)),
            // Protocol A takes the transport's word for it.
            Happened::ConnectionLost | Happened::Sent => return,
            _ if is_answer => (Stage::Peer, request.sent_at),
            _ => return,
        };
        if let Some(since) = since {
            self.note_latency(request, stage, since);
        }
    }

    fn note_latency(&mut self, request: &Request, stage: Stage, since: Tick) {
        let micros = self.now.0.saturating_sub(since.0);
        if let Some(volume) = self.volume_mut(request.volume) {
            volume.latencies.note(request.kind.into(), stage, micros);
        }
    }

    /// Completes and forgets a request if its facts allow it.
    pub(super) fn advance(&mut self, key: ReqKey) {
        let Some(request) = self.log.get(key).copied() else { return };
        let is_suspended = self.state(request.volume).is_suspended();
        let progress = request.progress;
        let may_complete = !request.is_completed
            && progress.is_finished()
            && !self.waits_for_handler(&request)
            && (!is_suspended || progress.outlasts_suspension());
        if may_complete {
            self.complete(key, &request);
        }
        let Some(request) = self.log.get(key) else { return };
        if request.is_completed && request.progress.may_be_forgotten() {
            self.forget(key);
        }
    }

    /// The own disk has refused this write. Until the handler of that has ended and the peer is told,
    /// nobody but this process knows that the block here is old: if the handler stops the machine, as
    /// many do, the disk comes back as that of a crashed Primary, and its block replaces the peer's.
    fn waits_for_handler(&self, request: &Request) -> bool {
        request.kind.is_write()
            && request.progress.local == Local::Error
            && self.volume(request.volume).is_some_and(|v| v.marks.failure_untold)
    }

    /// Goes on with what waited for that.
    pub(super) fn failure_is_told(&mut self, nr: VolumeNr) {
        if let Some(volume) = self.volume_mut(nr) {
            volume.marks.failure_untold = false;
        }
        for key in self.log.keys(|r| r.volume == nr && r.progress.local == Local::Error) {
            self.advance(key);
        }
    }

    fn complete(&mut self, key: ReqKey, request: &Request) {
        let nr = request.volume;
        if !request.kind.is_write() && !request.progress.is_success() {
            self.retry_read(key, request);
            return;
        }
        if request.is_postponed {
            return;
        }
        if self.will_be_overwritten(request) {
            self.restart(alloc::vec![key]);
            return;
        }
        // What the application writes because of this completion is in a later epoch.
        if request.kind.is_write() && request.epoch == self.log.open_epoch() {
            self.close_epoch();
        }
        if plant::has(Bug::DropReferencesEarly) && request.holds_al {
            self.put_extents(nr, request.range, u32::MAX);
        }
        if let Some(request) = self.log.get_mut(key) {
            request.is_completed = true;
            request.holds_al &= !plant::has(Bug::DropReferencesEarly);
        }
        if plant::has(Bug::CompleteTwice) && request.kind.is_write() {
            self.out.push(Action::CompleteApp { id: request.app, result: Ok(()), data: None });
        }
        if let Some(volume) = self.volume_mut(nr) {
            volume.app.admitted = volume.app.admitted.saturating_sub(1);
        }
        // Frozen ones are started again instead.
        let is_good = request.progress.is_success()
            && (self.state(nr).disk != Dstate::Inconsistent || !self.is_stale(request));
        if is_good && request.kind.is_write() && request.progress.local != Local::Ok {
            self.note_lacking(nr, request.progress.remote);
        }
        let result = if is_good { Ok(()) } else { Err(AppError::Io) };
        let data = self.conn.read_data.remove(&key.raw());
        self.touch();
        let queued = request.since.0.saturating_sub(request.asked_at.0);
        if let Some(volume) = self.volume_mut(nr) {
            volume.latencies.note(request.kind.into(), Stage::Queue, queued);
        }
        self.note_latency(request, Stage::Total, request.asked_at);
        self.out.push(Action::CompleteApp { id: request.app, result, data });
    }

    /// A write was completed that the own disk does not have, and the peer's good one has. With
    /// protocol A nobody knows.
    fn note_lacking(&mut self, nr: VolumeNr, remote: Remote) {
        let Some(volume) = self.volume_mut(nr) else { return };
        let is_there = matches!(remote, Remote::Mirror(Protocol::B | Protocol::C));
        if is_there && volume.state.pdsk == Dstate::UpToDate {
            volume.lacking.get_or_insert(volume.exposed);
        }
    }

    /// Only a disk has it that is given up, or about to be synced from the peer, which does not have
    /// it: this is no copy. The write finds its way to the peer, or fails.
    fn will_be_overwritten(&self, request: &Request) -> bool {
        request.kind.is_write()
            && !request.progress.is_on_peer()
            && request.progress.local != Local::Aborted
            && self.state(request.volume).disk < Dstate::Consistent
            && request.attempts < ATTEMPTS_MAX
    }

    /// A read failed here or there: again from the top, where another way may be found.
    fn retry_read(&mut self, key: ReqKey, request: &Request) {
        let Kind::Read(buf) = request.kind else { return };
        let nr = request.volume;
        self.log.remove(key);
        self.touch();
        let op = AppOp::Read { range: request.range, buf };
        let again = crate::event::AppRequest { id: request.app, volume: nr, op };
        let parked = Parked::new(again, request.asked_at, request.attempts + 1);
        if parked.attempts > ATTEMPTS_MAX {
            self.fail_routed(nr, parked, request.range);
            return;
        }
        if let Some(volume) = self.volume_mut(nr) {
            volume.app.admitted = volume.app.admitted.saturating_sub(1);
            volume.app.waiting.push_front(parked);
        }
    }

    /// The end of a request. Spec §1.7: in this order.
    fn forget(&mut self, key: ReqKey) {
        let Some(request) = self.log.remove(key) else { return };
        let nr = request.volume;
        self.touch();
        let Some(volume) = self.volumes.get_mut(nr) else { return };
        if request.is_in_tree {
            volume.app.tree.remove(request.range, Writer::Own(key));
        }
        if request.kind.is_write() {
            let claimed = volume.claims.end(request.range, Claim::Write(key));
            if !request.progress.is_on_both() && !plant::has(Bug::ForgetToMark) {
                volume.set_out_of_sync(request.range);
            } else if request.progress.is_in_sync_on_peer() {
                self.clear_claimed(nr, claimed);
            }
        }
        if request.holds_al {
            self.put_extents(nr, request.range, u32::MAX);
        }
        if let Kind::Write(buf, _) = request.kind
            && !plant::has(Bug::LeakBuffer)
        {
            self.free(buf);
        }
    }

    // ---- the connection is gone, or back ----

    /// P_BARRIER_ACK.
    pub(super) fn on_barrier_ack(&mut self, number: u32, count: u32) {
        if self.conn.has_two_primaries() && !self.conn.resolve_conflicts {
            self.forgive_missing_barriers(number);
        }
        let keys = match self.log.acknowledge(number, count) {
            Ok(keys) => keys,
            Err(error) => {
                self.log(Severity::Error, None, format!("{error}"));
                self.force_conn(Cstate::ProtocolError);
                return;
            }
        };
        if keys.iter().any(|key| self.log.get(*key).is_some_and(|r| r.progress.is_pending())) {
            self.log(
                Severity::Error,
                None,
                "BarrierAck received, but a write of its epoch was not acknowledged",
            );
            self.force_conn(Cstate::ProtocolError);
            return;
        }
        for key in keys {
            self.happened(key, Happened::BarrierAck);
        }
        self.on_epoch_acknowledged();
    }

    /// A kernel that decides conflicts never acknowledges the epoch of a write that it decided
    /// against. All writes of older epochs were acknowledged one by one: that is enough.
    /// Spec: wire-protocol.md §6.3.
    fn forgive_missing_barriers(&mut self, number: u32) {
        let keys = self.log.keys(|r| {
            r.progress.is_unacknowledged_mirror()
                && !r.progress.is_pending()
                && number.wrapping_sub(r.epoch).cast_signed() > 0
        });
        for key in keys {
            self.happened(key, Happened::BarrierAck);
        }
    }

    /// The connection is gone for good as far as the requests are concerned: they end with what
    /// the local disk says, and their blocks are marked.
    pub(super) fn requests_lost_connection(&mut self) {
        for key in self.log.keys(|_| true) {
            if let Some(request) = self.log.get_mut(key) {
                request.is_postponed = false;
            }
            self.happened(key, Happened::ConnectionLost);
        }
        self.conn.sectors_in_flight = 0;
        self.conn.sent_tokens.clear();
        self.conn.has_stale_requests = false;
    }

    /// I/O goes on without the peer. A handshake that runs counted on bits and identifiers as they
    /// were before: it has to begin again.
    pub(super) fn go_on_alone(&mut self) {
        self.requests_lost_connection();
        if self.conn.state_sent {
            self.force_conn(Cstate::NetworkFailure);
        }
    }

    /// Frozen requests after the connection came back: what the peer may not have is sent again,
    /// in the old order, with the old epoch numbers. Spec §1.9.
    pub(super) fn resend_frozen(&mut self) {
        if !core::mem::take(&mut self.conn.has_stale_requests) {
            return;
        }
        // Nobody has begun those here that an earlier disk failed to write, or that had none.
        let lacking = self.log.keys(|r| !r.is_completed && self.own_disk_lacks(r));
        self.restart(lacking);
        self.restart_stale();
        self.conn.sent_tokens.clear();
        self.conn.sectors_in_flight = 0;
        for key in self.log.keys(|_| true) {
            let Some(request) = self.log.get_mut(key) else { continue };
            // Who gives way is decided anew.
            request.is_postponed = false;
            match request.progress.remote {
                Remote::Mirror(_) => {
                    if request.progress.resend() {
                        self.send_request(key);
                    }
                }
                Remote::Read => request.progress.on(Happened::ConnectionLost),
                Remote::OutOfSync => request.progress.on(Happened::Sent),
                Remote::None => {}
            }
            self.advance(key);
        }
        self.close_epoch();
    }

    /// Frozen requests after a disk with the right data was attached: those that failed start
    /// again from the top.
    pub(super) fn restart_frozen(&mut self) {
        let failed = self.log.keys(|r| {
            let is_frozen = !r.is_completed && r.progress.is_finished();
            // A disk that is given up may still use its buffer.
            let is_at_disk = r.progress.local == Local::Aborted;
            let has_failed = !r.progress.is_success() || self.is_stale(r) || self.own_disk_lacks(r);
            is_frozen && !is_at_disk && has_failed
        });
        self.restart(failed);
    }

    /// What only an own disk has that is not good any more would be lost by the resync.
    fn restart_stale(&mut self) {
        let stale = self.log.keys(|r| {
            let is_frozen = !r.is_completed && r.progress.is_finished();
            is_frozen && (self.is_stale(r) || self.own_disk_lacks(r))
        });
        self.restart(stale);
    }

    fn is_stale(&self, request: &Request) -> bool {
        request.kind.is_write()
            && request.progress.local == Local::Ok
            && !request.progress.is_on_both()
            && self.state(request.volume).disk < Dstate::UpToDate
    }

    /// The own disk came after this write and is to have it too: because it counts as good, or since
    /// nobody else has it.
    fn own_disk_lacks(&self, request: &Request) -> bool {
        let disk = self.state(request.volume).disk;
        request.kind.is_write()
            && matches!(request.progress.local, Local::None | Local::Error)
            && (disk == Dstate::UpToDate
                || disk == Dstate::Inconsistent && !request.progress.is_success())
    }

    /// These requests start again from the top, in their order.
    fn restart(&mut self, keys: alloc::vec::Vec<ReqKey>) {
        for key in keys.into_iter().rev() {
            let Some(request) = self.log.remove(key) else { continue };
            let nr = request.volume;
            if request.progress.is_unacknowledged_mirror() {
                let in_flight = &mut self.conn.sectors_in_flight;
                *in_flight = in_flight.saturating_sub(request.range.len.0);
            }
            if request.holds_al {
                self.put_extents(nr, request.range, u32::MAX);
            }
            let Some(volume) = self.volume_mut(nr) else { continue };
            volume.claims.end(request.range, Claim::Write(key));
            if request.is_in_tree {
                volume.app.tree.remove(request.range, Writer::Own(key));
            }
            // A disk that is to be synced may hold it already, and nobody else does.
            if request.kind.is_write() && volume.state.disk < Dstate::Consistent {
                volume.set_out_of_sync(request.range);
            }
            let again = crate::event::AppRequest {
                id: request.app,
                volume: nr,
                op: op_of(request.kind, request.range),
            };
            volume.app.admitted = volume.app.admitted.saturating_sub(1);
            let attempts = request.attempts.saturating_add(1);
            let parked = Parked::new(again, request.asked_at, attempts);
            volume.app.waiting.push_front(parked);
        }
        self.touch();
    }

    /// Two Primaries: a write that had to give way is done again, as a new one. Spec §5.4.
    pub(super) fn restart_write(&mut self, key: ReqKey) {
        let Some(request) = self.log.remove(key) else { return };
        let nr = request.volume;
        self.conn.sectors_in_flight =
            self.conn.sectors_in_flight.saturating_sub(request.range.len.0);
        let again = crate::event::AppRequest {
            id: request.app,
            volume: nr,
            op: op_of(request.kind, request.range),
        };
        let Some(volume) = self.volume_mut(nr) else { return };
        volume.claims.end(request.range, Claim::Write(key));
        volume.app.tree.remove(request.range, Writer::Own(key));
        // The own disk may have it, and the peer does not: its extents stay hot.
        let extents_held = if request.holds_al {
            u32::try_from(request.range.al_extents_touched().count()).unwrap_or(u32::MAX)
        } else {
            0
        };
        let is_begun = request.progress.local != Local::None;
        let parked = Parked { extents_held, is_begun, ..Parked::new(again, request.asked_at, 0) };
        volume.app.conflicting.push_back(parked);
        self.touch();
    }

    /// The end of a suspension, whatever ended it: what waits for nothing else ends (defect 14.12).
    pub(super) fn run_thaw(&mut self) {
        if plant::has(Bug::NeverThaw) {
            return;
        }
        let is_suspended = self.is_suspended();
        if !core::mem::replace(&mut self.was_suspended, is_suspended) || is_suspended {
            return;
        }
        if self.are_all_connected() {
            self.resend_frozen();
        }
        // A generation that is due comes first, and nothing new before it.
        let mut is_due = false;
        for volume in self.volumes.values_mut() {
            if volume.marks.uuid_on_thaw && volume.has_disk() && facts::writes_alone(&volume.state)
            {
                volume.marks.generation_due = true;
                is_due = true;
            }
        }
        let is_connected = self.volumes.values().any(|v| v.state.conn >= Cstate::Connected);
        if is_due {
            self.start(|cx| async move { thaw_alone(&cx).await });
            return;
        }
        if !is_connected || self.conn.has_stale_requests {
            // Nobody will acknowledge what was sent before.
            self.go_on_alone();
        }
        self.release_withheld();
    }

    fn release_withheld(&mut self) {
        self.restart_stale();
        for key in self.log.keys(|_| true) {
            self.advance(key);
        }
    }

    /// The disk is given up while it still has requests. Spec §1.10.
    pub(super) fn abort_local(&mut self, nr: VolumeNr) {
        for key in self.log.keys(|r| r.volume == nr && r.progress.local == Local::Pending) {
            self.happened(key, Happened::LocalAborted);
        }
    }

    /// Are there writes that the peer may not have?
    pub(super) fn has_frozen_writes(&self, nr: VolumeNr) -> bool {
        self.log
            .iter()
            .any(|(_, r)| r.volume == nr && r.kind.is_write() && !r.progress.is_on_peer())
    }

    /// Is a write at the disk that has no references in the activity log?
    pub(super) fn has_unlogged_writes(&self, nr: VolumeNr) -> bool {
        self.log.iter().any(|(_, r)| {
            r.volume == nr && r.kind.is_write() && !r.holds_al && r.progress.local == Local::Pending
        })
    }

    /// Has the peer acknowledged all that it got, with its epoch? Otherwise that is on its way.
    pub(super) fn are_writes_decided(&mut self, nr: VolumeNr) -> bool {
        // What went out on an earlier connection is sent again or marked.
        let is_decided = self.conn.has_stale_requests
            || !self
                .log
                .iter()
                .any(|(_, r)| r.volume == nr && r.progress.is_unacknowledged_mirror());
        if !is_decided {
            self.close_epoch();
        }
        is_decided
    }

    /// Is an answer of the peer to an application request of this volume outstanding?
    pub(super) fn has_pending_writes(&self, nr: VolumeNr) -> bool {
        self.log.iter().any(|(_, r)| r.volume == nr && r.kind.is_write() && r.progress.is_pending())
    }
}

/// I/O goes on without the peer: a new generation first (defect 14.9).
async fn thaw_alone(cx: &super::proc::Cx) {
    super::generations::begin_on_thaw(cx).await;
    cx.with(|core| {
        let is_alone = core.volumes.values().all(|v| v.state.conn < Cstate::Connected);
        if is_alone || core.conn.has_stale_requests {
            core.go_on_alone();
        }
        core.release_withheld();
        core.touch();
    });
}

/// What a request wants, without its name.
fn kind_of(op: &AppOp) -> Option<(Kind, SectorRange)> {
    Some(match *op {
        AppOp::Read { range, buf } => (Kind::Read(buf), range),
        AppOp::Write { range, buf, flags } => (Kind::Write(buf, flags), range),
        AppOp::Discard { range } => (Kind::Discard, range),
        AppOp::WriteZeroes { range, may_unmap } => (Kind::WriteZeroes { may_unmap }, range),
        AppOp::Flush => return None,
    })
}

const fn op_of(kind: Kind, range: SectorRange) -> AppOp {
    match kind {
        Kind::Read(buf) => AppOp::Read { range, buf },
        Kind::Write(buf, flags) => AppOp::Write { range, buf, flags },
        Kind::Discard => AppOp::Discard { range },
        Kind::WriteZeroes { may_unmap } => AppOp::WriteZeroes { range, may_unmap },
    }
}

/// Length of a range that fits one packet.
pub(super) fn bytes(range: SectorRange) -> u32 {
    u32::try_from(range.len.0 * 512).unwrap_or(u32::MAX)
}
