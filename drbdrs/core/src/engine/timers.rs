//! Everything that happens because time has passed. Spec: wire-protocol.md §13; io-path §11.

use alloc::format;

use drbd_types::{ByteLen, Cstate, Deciseconds, Tick, VolumeNr};
use drbd_wire::{Packet, Stream};

use crate::log_line::Severity;

use super::Core;
use super::after::Work;
use super::meta::DIRTY_LIMIT;
use super::proc::Cx;

/// Microseconds of a tenth of a second.
const DECI: u64 = 100_000;

impl Core {
    pub(super) fn next_deadline(&self) -> Option<Tick> {
        let mut earliest: Option<Tick> = None;
        let mut add = |tick: Option<Tick>| {
            if let Some(tick) = tick {
                earliest = Some(earliest.map_or(tick, |e| e.min(tick)));
            }
        };
        add(self.conn.link.as_ref().and_then(crate::link::Link::next_deadline));
        // A connection that is lost already has no deadlines, even if its end takes time.
        if self.conn.is_up && !self.conn.is_ending() {
            add(self.ping_deadline());
            add(self.request_deadline());
            add(self
                .conn
                .waits_for_seq
                .map(|(_, _, since)| self.after(since, self.ping_timeout())));
            add(self.conn.closed_by_peer_at.map(|at| self.after(at, self.ping_timeout())));
            for queue in &self.conn.send_queues {
                add(queue.stuck_since.map(|since| self.stall_deadline(since, queue.expired)));
            }
        }
        for volume in self.volumes.values() {
            add(volume.resync.next_step);
            add(volume.serves.deadline());
            add(volume.ahead_return_at);
            let dirty = volume.disk.as_ref().and_then(|disk| disk.dirty_since);
            add(dirty.map(|since| Tick(since.0 + DIRTY_LIMIT)));
            add(self.disk_deadline(volume.nr));
        }
        add(self.sleepers.iter().copied().min());
        earliest
    }

    const fn after(&self, since: Tick, tenths: u32) -> Tick {
        Tick(since.0.saturating_add(tenths as u64 * DECI))
    }

    fn ping_timeout(&self) -> u32 {
        self.conn.net.as_ref().map_or(5, |net| net.ping_timeout.0)
    }

    pub(super) fn run_timers(&mut self) {
        let now = self.now;
        if let Some(deadline) = self.conn.link.as_ref().and_then(crate::link::Link::next_deadline)
            && deadline <= now
        {
            self.with_link(|link, actions| link.on_timer(now, actions));
        }
        if self.conn.is_up && !self.conn.is_ending() {
            self.run_ping();
            self.run_request_timeout();
            self.run_stalls();
            self.run_sequence_timeout();
            if let Some(at) = self.conn.closed_by_peer_at
                && self.after(at, self.ping_timeout()) <= now
            {
                self.conn.closed_by_peer_at = None;
                self.log(Severity::Error, None, "sock was shut down by peer");
                self.force_conn(Cstate::BrokenPipe);
            }
        }
        for nr in self.volume_numbers() {
            self.run_volume_timers(nr);
        }
        let sleeping = self.sleepers.len();
        self.sleepers.retain(|tick| *tick > now);
        if self.sleepers.len() != sleeping {
            self.touch();
        }
    }

    fn run_volume_timers(&mut self, nr: VolumeNr) {
        let now = self.now;
        let Some(volume) = self.volume(nr) else { return };
        if volume.resync.next_step.is_some_and(|at| at <= now) {
            match volume.state.conn {
                Cstate::SyncTarget => self.run_resync_step(nr),
                Cstate::VerifyS => self.run_verify_step(nr),
                _ => {
                    if let Some(volume) = self.volume_mut(nr) {
                        volume.resync.next_step = None;
                    }
                }
            }
        }
        self.run_ahead_timer(nr);
        let Some(volume) = self.volume_mut(nr) else { return };
        if let Some(disk) = volume.disk.as_mut()
            && disk.dirty_since.is_some_and(|since| since.0 + DIRTY_LIMIT <= now.0)
        {
            disk.dirty_since = None;
            self.queue_work(Work::Sync { nr, is_late: true });
        }
        if self.disk_deadline(nr).is_some_and(|at| at <= now) {
            let text = "Local backing device failed to meet the disk-timeout";
            self.log(Severity::Warn, Some(nr), text);
            self.force_detach(nr);
        }
    }

    /// When the oldest I/O of a disk has lasted too long. Spec: io-path §11 "disk-timeout".
    fn disk_deadline(&self, nr: VolumeNr) -> Option<Tick> {
        let volume = self.volume(nr)?;
        let Deciseconds(limit) = volume.config.disk_timeout;
        if limit == 0 || volume.disk.as_ref()?.is_failing || !volume.has_disk() {
            return None;
        }
        let oldest =
            self.ios.iter().filter(|(_, io)| io.volume == nr).map(|(_, io)| io.since).min()?;
        Some(self.after(oldest.max(volume.attached_at), limit))
    }

    // ---- keep-alive ----

    fn ping_deadline(&self) -> Option<Tick> {
        let ping = &self.conn.ping;
        let heard = ping.last_meta.max(ping.last_data);
        Some(match ping.sent_at {
            Some(at) => self.after(at, self.ping_timeout()),
            None => {
                let seconds = self.conn.net.as_ref().map_or(10, |net| net.ping_int);
                self.after(heard, seconds.saturating_mul(10))
            }
        })
    }

    fn run_ping(&mut self) {
        let now = self.now;
        if self.ping_deadline().is_none_or(|at| at > now) {
            return;
        }
        let ping = self.conn.ping;
        match ping.sent_at {
            None => self.send_ping(),
            Some(at) if ping.last_meta.max(ping.last_data) > at => {
                // Something came since: the peer lives. The answer is waited for once more.
                self.conn.ping.sent_at = Some(now);
            }
            Some(_) => {
                self.log(Severity::Error, None, "PingAck did not arrive in time.");
                self.force_conn(Cstate::NetworkFailure);
            }
        }
    }

    pub(super) fn send_ping(&mut self) {
        if !self.conn.is_up {
            return;
        }
        self.conn.ping.sent_at = Some(self.now);
        self.conn.ping.sent += 1;
        self.send_meta(VolumeNr(0), Packet::Ping);
    }

    pub(super) fn on_ping_ack(&mut self) {
        self.conn.ping.answered += 1;
        if self.conn.ping.answered >= self.conn.ping.sent {
            self.conn.ping.sent_at = None;
        }
        self.touch();
    }

    // ---- requests without answer ----

    /// ko-count times timeout, microseconds; `None`: never.
    pub(super) fn request_limit(&self) -> Option<u64> {
        let net = self.conn.net.as_ref()?;
        let limit = u64::from(net.ko_count) * u64::from(net.timeout.0) * DECI;
        (limit > 0).then_some(limit)
    }

    fn request_deadline(&self) -> Option<Tick> {
        let limit = self.request_limit()?;
        let since = match self.log.oldest_pending() {
            Some(at) => at,
            None => {
                self.log.oldest_unacknowledged()?;
                self.conn.barrier_sent_at?
            }
        };
        // The time before this connection does not count.
        Some(Tick(since.max(self.conn.up_since).0.saturating_add(limit)))
    }

    fn run_request_timeout(&mut self) {
        let now = self.now;
        if self.request_deadline().is_none_or(|at| at > now) {
            return;
        }
        let (ko, timeout) =
            self.conn.net.as_ref().map_or((0, 0), |net| (net.ko_count, net.timeout.0));
        let text = match self.log.oldest_pending() {
            Some(at) => {
                let ms = now.0.saturating_sub(at.0) / 1000;
                format!(
                    "Remote failed to finish a request within {ms}ms > ko-count ({ko}) * timeout ({timeout} * 0.1s)"
                )
            }
            None => format!(
                "Remote failed to answer a P_BARRIER within ko-count ({ko}) * timeout ({timeout} * 0.1s)"
            ),
        };
        self.log(Severity::Warn, None, text);
        self.force_conn(Cstate::Timeout);
    }

    // ---- blocked sending ----

    pub(super) fn on_send_queue(
        &mut self,
        stream: Stream,
        waiting: ByteLen,
        is_congested: bool,
        moved: u64,
    ) {
        let now = self.now;
        let Some(queue) = self.conn.send_queues.get_mut(usize::from(stream == Stream::Meta)) else {
            return;
        };
        let has_moved = moved != queue.moved;
        queue.waiting = waiting.0;
        queue.moved = moved;
        if waiting.0 == 0 {
            queue.stuck_since = None;
            queue.expired = 0;
        } else if has_moved || queue.stuck_since.is_none() {
            queue.stuck_since = Some(now);
            queue.expired = 0;
        }
        if stream == Stream::Data {
            self.conn.is_send_congested = is_congested;
            self.touch();
        }
    }

    fn stall_deadline(&self, since: Tick, expired: u32) -> Tick {
        let timeout = self.conn.net.as_ref().map_or(60, |net| net.timeout.0);
        self.after(since, timeout.saturating_mul(expired + 1))
    }

    fn run_stalls(&mut self) {
        let now = self.now;
        let ko_count = self.conn.net.as_ref().map_or(0, |net| net.ko_count);
        for index in 0..2 {
            let Some(queue) = self.conn.send_queues.get(index).copied() else { continue };
            let Some(since) = queue.stuck_since else { continue };
            if self.stall_deadline(since, queue.expired) > now {
                continue;
            }
            let expired = queue.expired + 1;
            if let Some(queue) = self.conn.send_queues.get_mut(index) {
                queue.expired = expired;
            }
            let is_meta = index == 1;
            let left = ko_count.saturating_sub(expired);
            if !is_meta {
                let text = format!("sock_sendmsg time expired, ko = {left}");
                self.log(Severity::Error, None, text);
            }
            if is_meta || (ko_count > 0 && left == 0) {
                self.force_conn(Cstate::Timeout);
                return;
            }
            if self.conn.ping.sent_at.is_none() {
                self.send_ping();
            }
        }
    }

    /// Two Primaries: data that waits for acknowledgements sent before it. Spec: io-path §5.5.
    fn run_sequence_timeout(&mut self) {
        let Some((nr, seq, since)) = self.conn.waits_for_seq else { return };
        let seen = self.volume(nr).map_or(seq, |v| v.seq_in);
        if seq.wrapping_sub(seen).cast_signed() <= 1 {
            self.conn.waits_for_seq = None;
            return;
        }
        if self.after(since, self.ping_timeout()) <= self.now {
            self.conn.waits_for_seq = None;
            let text = "Timed out waiting for missing ack packets; disconnecting";
            self.log(Severity::Error, Some(nr), text);
            self.force_conn(Cstate::NetworkFailure);
        }
    }
}

/// Sends a ping and waits for its answer: everything that the peer sent before on the meta stream
/// has been processed then. Returns false if the connection is lost meanwhile.
pub(super) async fn ping(cx: &Cx) -> bool {
    let wanted = cx.with(|core| {
        core.send_ping();
        core.conn.ping.sent
    });
    cx.until(move |core| {
        if !core.conn.is_up || core.conn.level != Cstate::WFReportParams {
            return Some(false);
        }
        (core.conn.ping.answered >= wanted).then_some(true)
    })
    .await
}

/// Waits for this span of time.
pub(super) async fn sleep(cx: &Cx, tenths: u32) {
    let until = cx.with(|core| {
        let now = core.now;
        let until = core.after(now, tenths);
        core.sleepers.push(until);
        until
    });
    cx.until(move |core| (core.now >= until).then_some(())).await;
}

impl super::connection::Connection {
    pub(super) const fn note_meta_traffic(&mut self, now: Tick) {
        self.ping.last_meta = now;
    }
}
