//! The connection and its receiver: the procedure that connects, handles the packets of the data
//! stream one after the other, and cleans up afterwards.
//!
//! ```text
//!   StandAlone -> Unconnected -> WFConnection -> WFReportParams (volumes: Connected ...)
//!                     ^                               |
//!                     +-- clean-up <- BrokenPipe, NetworkFailure, Timeout, ProtocolError, TearDown
//!   StandAlone <-------- clean-up <- Disconnecting
//! ```
//! Spec: states-and-generations.md §4.1, §8; wire-protocol.md §1, §13.

use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use alloc::vec::Vec;

use drbd_types::{Cstate, Dstate, StateWord, Tick, VolumeNr};
use drbd_wire::packet::Features;
use drbd_wire::{Algorithm, Packet, Stream};

use crate::action::Action;
use crate::config::NetConfig;
use crate::event::{Payload, StreamLoss};
use crate::ids::{BufId, SendToken};
use crate::link::{Link, LinkAction, LinkConfig, LinkEvent, Verdict};
use crate::log_line::Severity;
use crate::request::log::ReqKey;
use crate::slab::Key;

use super::change::{Done, Opt, Wanted, conn_request, settled};
use super::proc::Cx;
use super::send::Gate;
use super::{Core, fence, meta, params, receive};

/// A data packet that waits for the receiver.
#[derive(Clone, Debug)]
pub(super) struct Received {
    pub(super) nr: VolumeNr,
    pub(super) packet: Packet,
    pub(super) payload: Option<Payload>,
}

/// The connection of a resource.
pub(super) struct Connection {
    /// Connection-level state.
    pub(super) level: Cstate,
    /// Settings, if there is a connection at all.
    pub(super) net: Option<NetConfig>,
    pub(super) link: Option<Link>,
    /// How the last attempt to connect ended, until the receiver sees it.
    outcome: Option<Outcome>,
    /// Both streams are established and what is sent goes out.
    pub(super) is_up: bool,
    /// Agreed version; 80 before the first agreement.
    pub(super) version: u32,
    pub(super) features: Features,
    pub(super) resolve_conflicts: bool,
    /// The handshake packets are out: roles and disks must not change.
    pub(super) state_sent: bool,
    pub(super) dry_run: bool,
    pub(super) disconnect_sent: bool,
    /// `discard-my-data` is still to count.
    pub(super) discard_my_data: bool,
    /// Grows for every volume that becomes connected.
    pub(super) connects: u64,
    /// The state mutex of the connection.
    pub(super) is_locked: bool,
    /// The peer's answer to an own request.
    pub(super) reply: Option<i32>,
    /// Data packets that wait while a bitmap is sent.
    pub(super) gate: Option<Gate>,
    /// Data packets that the receiver has not handled.
    pub(super) queue: VecDeque<Received>,
    /// The receiver waits for the next packet.
    pub(super) is_receiver_idle: bool,
    /// What was told to the shell.
    is_receiving: bool,
    /// Writes of protocol A and P_OUT_OF_SYNC that the transport has not confirmed, in order.
    pub(super) sent_tokens: VecDeque<(SendToken, ReqKey)>,
    /// The last other send that the transport has confirmed.
    pub(super) last_sent: Option<SendToken>,
    /// The log has requests of a connection that was lost while I/O was suspended: they are sent
    /// again on the next one, or lost with the end of the suspension.
    pub(super) has_stale_requests: bool,
    /// Data of remote reads, until their completion.
    pub(super) read_data: BTreeMap<u64, BufId>,
    /// Mirrored sectors on their way. Spec: io-path §10.2.
    pub(super) sectors_in_flight: u64,
    pub(super) barrier_sent_at: Option<Tick>,
    /// Places in the stream of replicated writes of the peer that the disks have not done.
    pub(super) active_writes: BTreeSet<u64>,
    pub(super) next_order: u64,
    /// Flushes of the epoch that ends which are not answered.
    pub(super) epoch_flushes: usize,
    /// Writes of the peer's epoch that are done and not flushed.
    pub(super) written: Vec<super::barriers::Written>,
    pub(super) epoch_flush_failed: bool,
    /// Writes that the peer is to send again: their epoch waits until the own write is acknowledged.
    pub(super) retried: Vec<(ReqKey, crate::peer_write::epochs::EpochId)>,
    /// A write that waits for its turn in the sequence: volume, number, since when.
    pub(super) waits_for_seq: Option<(VolumeNr, u32, Tick)>,
    /// Keep-alive.
    pub(super) ping: Ping,
    /// More than half of the send buffer is in use.
    pub(super) is_send_congested: bool,
    pub(super) send_queues: [SendQueue; 2],
    /// The peer closed a stream after an own graceful disconnect.
    pub(super) closed_by_peer_at: Option<Tick>,
    /// The data stream is lost, but packets from before are not handled yet.
    pub(super) loss_behind_queue: Option<Cstate>,
    /// Since when the connection is up.
    pub(super) up_since: Tick,
}

/// Keep-alive on the meta stream.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Ping {
    pub(super) last_meta: Tick,
    pub(super) last_data: Tick,
    /// A ping without answer, since when.
    pub(super) sent_at: Option<Tick>,
    /// Pings and answers so far.
    pub(super) sent: u64,
    pub(super) answered: u64,
}

/// What the shell said last about a send queue.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct SendQueue {
    pub(super) waiting: u64,
    pub(super) moved: u64,
    /// Since when nothing moves although something waits.
    pub(super) stuck_since: Option<Tick>,
    /// Expired timeouts without progress.
    pub(super) expired: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Established,
    StandAlone,
}

impl Default for Connection {
    fn default() -> Self {
        Self {
            level: Cstate::StandAlone,
            net: None,
            link: None,
            outcome: None,
            is_up: false,
            version: 80,
            features: Features::empty(),
            resolve_conflicts: false,
            state_sent: false,
            dry_run: false,
            disconnect_sent: false,
            discard_my_data: false,
            connects: 0,
            is_locked: false,
            reply: None,
            gate: None,
            queue: VecDeque::new(),
            is_receiver_idle: false,
            is_receiving: true,
            sent_tokens: VecDeque::new(),
            last_sent: None,
            has_stale_requests: false,
            read_data: BTreeMap::new(),
            sectors_in_flight: 0,
            barrier_sent_at: None,
            active_writes: BTreeSet::new(),
            next_order: 0,
            epoch_flushes: 0,
            written: Vec::new(),
            epoch_flush_failed: false,
            retried: Vec::new(),
            waits_for_seq: None,
            ping: Ping::default(),
            is_send_congested: false,
            send_queues: [SendQueue::default(); 2],
            closed_by_peer_at: None,
            loss_behind_queue: None,
            up_since: Tick(0),
        }
    }
}

impl Connection {
    pub(super) fn has_two_primaries(&self) -> bool {
        self.net.as_ref().is_some_and(|net| net.two_primaries)
    }

    /// The connection is given up, or about to be.
    pub(super) fn is_ending(&self) -> bool {
        self.level.is_lost() || self.level == Cstate::Disconnecting
    }
}

/// Data packets that may wait in the engine before reading stops.
const QUEUE_MAX: usize = 16;

impl Core {
    // ---- establishing ----

    pub(super) fn on_link(&mut self, event: LinkEvent) {
        let now = self.now;
        self.with_link(|link, actions| link.handle(now, event, actions));
    }

    /// Lets the link work, and carries out what it wants.
    pub(super) fn with_link(&mut self, act: impl FnOnce(&mut Link, &mut Vec<LinkAction>)) {
        let mut actions = Vec::new();
        if let Some(link) = &mut self.conn.link {
            act(link, &mut actions);
        }
        for action in actions {
            match action {
                LinkAction::Established { version, features, we_resolve_conflicts, .. } => {
                    self.conn.version = version;
                    self.conn.features = features;
                    self.conn.resolve_conflicts = we_resolve_conflicts;
                    self.conn.outcome = Some(Outcome::Established);
                    self.touch();
                    // Before anything is read from the streams.
                    self.out.push(Action::Link(action));
                }
                LinkAction::Failed { verdict: Verdict::StandAlone, .. } => {
                    self.conn.outcome = Some(Outcome::StandAlone);
                    self.touch();
                }
                LinkAction::Failed { verdict: Verdict::Retry, .. } => {}
                LinkAction::Log(line) => self.out.push(Action::Log(line)),
                LinkAction::Listen
                | LinkAction::StopListening
                | LinkAction::Connect { .. }
                | LinkAction::CancelConnect { .. }
                | LinkAction::Send { .. }
                | LinkAction::Receive { .. }
                | LinkAction::Close { .. }
                | LinkAction::Random => self.out.push(Action::Link(action)),
            }
        }
    }

    // ---- packets ----

    pub(super) fn on_packet(
        &mut self,
        stream: Stream,
        volume: u16,
        packet: Packet,
        payload: Option<Payload>,
    ) {
        let nr = VolumeNr(volume);
        if !self.conn.is_up {
            if let Some(payload) = payload {
                self.free(payload.buf);
            }
            return;
        }
        if stream == Stream::Meta {
            self.on_meta_packet(nr, packet);
            return;
        }
        self.conn.ping.last_data = self.now;
        self.note_digest(&packet);
        let received = Received { nr, packet, payload };
        let is_free = self.conn.is_receiver_idle
            && self.conn.queue.is_empty()
            && !self.peer_epochs.holds_receiver();
        if is_free && receive::is_quick(&received.packet) {
            self.receive_quick(received);
        } else {
            self.conn.queue.push_back(received);
            self.touch();
        }
    }

    /// The digest of the peer's data packets, which the reader has to know before the next one.
    fn note_digest(&mut self, packet: &Packet) {
        if let Packet::Protocol(params) | Packet::ProtocolUpdate(params) = packet {
            let algorithm = Algorithm::from_name(&params.integrity_alg);
            self.out.push(Action::ExpectDigest(algorithm));
        }
    }

    /// Reading stops while the receiver is behind.
    pub(super) fn run_receive_window(&mut self) {
        let wants = self.conn.queue.len() < QUEUE_MAX;
        if wants != self.conn.is_receiving {
            self.conn.is_receiving = wants;
            self.out.push(Action::Receive(wants));
        }
    }

    /// The next packet, or the end of the connection.
    fn next_packet(&mut self) -> Option<Option<Received>> {
        if self.conn.is_ending() {
            self.conn.is_receiver_idle = false;
            return Some(None);
        }
        if self.peer_epochs.holds_receiver() {
            return None;
        }
        let next = self.conn.queue.pop_front();
        if next.is_none()
            && let Some(state) = self.conn.loss_behind_queue.take()
        {
            self.force_conn(state);
            self.conn.is_receiver_idle = false;
            return Some(None);
        }
        self.conn.is_receiver_idle = next.is_none();
        next.map(Some)
    }

    // ---- loss ----

    pub(super) fn on_stream_lost(&mut self, stream: Stream, how: StreamLoss) {
        if !self.conn.is_up {
            return;
        }
        // After an own graceful disconnect the peer is expected to close.
        let is_expected = self.conn.disconnect_sent;
        let (state, text) = match (&how, stream) {
            (StreamLoss::Bad { error }, Stream::Data) => {
                (Cstate::ProtocolError, Some(alloc::format!("{error}")))
            }
            (
                StreamLoss::Bad { error: error @ drbd_wire::PeerError::UnexpectedMeta(_) },
                Stream::Meta,
            ) => (Cstate::Disconnecting, Some(alloc::format!("{error}"))),
            (StreamLoss::Bad { error }, Stream::Meta) => {
                (Cstate::NetworkFailure, Some(alloc::format!("{error}")))
            }
            (StreamLoss::Closed, Stream::Data) => {
                (Cstate::BrokenPipe, Some("sock was shut down by peer".into()))
            }
            (StreamLoss::Reset, Stream::Data) => {
                (Cstate::BrokenPipe, Some("sock was reset by peer".into()))
            }
            (StreamLoss::Closed | StreamLoss::Reset, Stream::Meta) => {
                (Cstate::NetworkFailure, Some("meta connection shut down by peer.".into()))
            }
            (StreamLoss::ReceiveFailed(errno), Stream::Data) => {
                (Cstate::BrokenPipe, Some(alloc::format!("sock_recvmsg returned -{errno}")))
            }
            (StreamLoss::ReceiveFailed(errno), Stream::Meta) => {
                (Cstate::NetworkFailure, Some(alloc::format!("sock_recvmsg returned -{errno}")))
            }
            (StreamLoss::SendFailed(errno), Stream::Data) => {
                (Cstate::BrokenPipe, Some(alloc::format!("sock_sendmsg returned -{errno}")))
            }
            (StreamLoss::SendFailed(errno), Stream::Meta) => {
                (Cstate::BrokenPipe, Some(alloc::format!("msock_sendmsg returned -{errno}")))
            }
        };
        if is_expected && matches!(how, StreamLoss::Closed | StreamLoss::Reset) {
            // The own change of state follows at once; if not, the ping notices.
            self.conn.closed_by_peer_at = Some(self.now);
            return;
        }
        if let Some(text) = text {
            self.log(Severity::Error, None, text);
        }
        // Packets before the loss are still handled, up to and including the last whole one.
        if stream == Stream::Data && !self.conn.queue.is_empty() && state != Cstate::Disconnecting {
            self.conn.loss_behind_queue = Some(state);
            return;
        }
        self.force_conn(state);
    }
}

/// The receiver: lives as long as the engine.
pub(super) async fn receiver(cx: Cx) {
    loop {
        cx.until(|core| (core.conn.level == Cstate::Unconnected).then_some(())).await;
        let result =
            cx.with(|core| core.set_conn(Wanted::conn(Cstate::WFConnection), Opt::VERBOSE));
        if result == Ok(Done::Changed) && connect(&cx).await {
            send_parameters(&cx).await;
            while let Some(received) = cx.until(Core::next_packet).await {
                receive::receive(&cx, received).await;
            }
        }
        clean_up(&cx).await;
    }
}

/// Returns whether both streams are up; if not, the connection is ending.
async fn connect(cx: &Cx) -> bool {
    cx.with(|core| {
        core.conn.outcome = None;
        let now = core.now;
        let seed = core.random.next();
        let Some(net) = &core.conn.net else { return };
        match LinkConfig::new(net) {
            Ok(config) => {
                match &mut core.conn.link {
                    Some(link) => link.set_config(config),
                    none => *none = Some(Link::new(config, seed)),
                }
                core.with_link(|link, actions| link.start(now, actions));
            }
            Err(error) => {
                core.log(Severity::Error, None, alloc::format!("{error}"));
                core.conn.outcome = Some(Outcome::StandAlone);
            }
        }
    });
    let is_up = cx
        .until(|core| {
            if core.conn.is_ending() {
                return Some(false);
            }
            match core.conn.outcome.take()? {
                Outcome::Established => Some(true),
                Outcome::StandAlone => {
                    core.force_conn(Cstate::Disconnecting);
                    Some(false)
                }
            }
        })
        .await;
    if is_up {
        cx.with(Core::begin_session);
    }
    is_up
}

impl Core {
    /// Both streams are up: everything that counts per connection starts anew.
    fn begin_session(&mut self) {
        let now = self.now;
        self.conn.is_up = true;
        self.conn.up_since = now;
        self.conn.dry_run = false;
        self.conn.disconnect_sent = false;
        self.conn.closed_by_peer_at = None;
        self.conn.loss_behind_queue = None;
        self.conn.gate = None;
        self.conn.sent_tokens.clear();
        self.conn.last_sent = None;
        self.conn.barrier_sent_at = None;
        self.conn.waits_for_seq = None;
        self.conn.retried.clear();
        self.conn.is_send_congested = false;
        self.conn.send_queues = [SendQueue::default(); 2];
        self.conn.ping = Ping { last_meta: now, last_data: now, ..Ping::default() };
        self.sent_epoch.forget();
        self.peer_epochs.lost();
        for volume in self.volumes.values_mut() {
            volume.claims.forget();
            volume.seq_out = 0;
            volume.seq_in = 0;
            volume.reply = None;
            volume.marks.degraded_wfc = false;
            volume.marks.resize_pending = false;
        }
        let own = self.conn.net.as_ref().and_then(|n| Algorithm::from_name(&n.integrity_alg));
        self.out.push(Action::AttachDigest(own));
        self.announce_algorithms();
    }

    /// The algorithms of the engine's digests.
    pub(super) fn announce_algorithms(&mut self) {
        let Some(net) = &self.conn.net else { return };
        let csums = Algorithm::from_name(&net.csums_alg);
        let verify = Algorithm::from_name(&net.verify_alg);
        self.out.push(Action::DigestAlgorithms { csums, verify });
    }
}

/// What each node sends before it looks at anything of the peer. Spec: states §4.1.
async fn send_parameters(cx: &Cx) {
    cx.with(|core| {
        if let Some(params) = core.protocol_params() {
            core.send(VolumeNr(0), Packet::Protocol(params));
        }
    });
    // From here on roles, disks and identifiers stay as they are told: promotions that run hold
    // their mutex, new generations are made by the worker.
    cx.until(|core| {
        let is_busy =
            !core.work.is_empty() || core.volume_numbers().any(|nr| core.is_state_locked(nr));
        (core.conn.is_ending() || !is_busy).then_some(())
    })
    .await;
    cx.with(|core| {
        if core.conn.is_ending() {
            return;
        }
        core.conn.state_sent = true;
        for nr in core.all_volumes() {
            params::send_volume(core, nr);
        }
        let discards = core::mem::take(&mut core.conn.discard_my_data);
        for volume in core.volumes.values_mut() {
            volume.marks.discard_mine = discards;
        }
        let result = core.set_conn(Wanted::conn(Cstate::WFReportParams), Opt::VERBOSE);
        if result != Ok(Done::Changed) {
            core.conn.state_sent = false;
            core.force_conn(Cstate::NetworkFailure);
        }
        if core.volumes.is_empty() {
            core.conn.state_sent = false;
        }
    });
}

/// After a connection, or an attempt at one. Spec: states §8.3.
async fn clean_up(cx: &Cx) {
    let was_up = cx.with(|core| {
        if core.conn.level >= Cstate::WFConnection {
            core.force_conn(Cstate::NetworkFailure);
        }
        let was_up = core.conn.is_up;
        core.conn.is_up = false;
        core.conn.gate = None;
        core.conn.state_sent = false;
        core.with_link(|link, actions| link.stop(actions));
        core.drop_queue();
        core.orphan_peer_writes();
        core.orphan_serves();
        core.touch();
        was_up
    });
    for nr in cx.with(|core| core.all_volumes()) {
        // What was received is written and what is read for the peer ends.
        cx.until(move |core| {
            let is_busy = core.has_peer_writes(nr) || core.has_serves(nr);
            (!is_busy).then_some(())
        })
        .await;
        cx.with(|core| core.cancel_resync(nr));
    }
    // A new generation, if one is due, is stable before any request ends that the peer does not
    // have (defect 14.9).
    settled(cx).await;
    cx.with(|core| {
        for volume in core.volumes.values_mut() {
            volume.peer_uuids = None;
        }
        if core.is_suspended() {
            core.conn.has_stale_requests = !core.log.is_empty();
        } else {
            core.requests_lost_connection();
        }
    });
    for nr in cx.with(|core| core.all_volumes()) {
        let _ = meta::sync(cx, nr).await;
        let _ = meta::write_bitmap(cx, nr).await;
    }
    if was_up {
        cx.with(|core| core.log(Severity::Info, None, "Connection closed"));
    }
    let fences = cx.with(|core| {
        let unknown = core.volumes.values().map(|v| v.state.pdsk).max();
        core.is_primary_anywhere() && unknown >= Some(Dstate::DUnknown)
    });
    if fences {
        cx.with(|core| {
            core.start(|cx| async move {
                fence::fence_peer(&cx).await;
            })
        });
    }
    let level = cx.with(|core| core.conn.level);
    if level == Cstate::Disconnecting {
        cx.with(|core| core.force_conn(Cstate::StandAlone));
    } else if level >= Cstate::Unconnected {
        let _ = conn_request(cx, Wanted::conn(Cstate::Unconnected), Opt::VERBOSE).await;
    }
}

impl Core {
    /// Packets that nobody will handle.
    fn drop_queue(&mut self) {
        while let Some(received) = self.conn.queue.pop_front() {
            if let Some(payload) = received.payload {
                self.free(payload.buf);
            }
        }
        let reads: Vec<BufId> = core::mem::take(&mut self.conn.read_data).into_values().collect();
        for buf in reads {
            self.free(buf);
        }
    }

    /// The best disk state of the peer over all volumes.
    pub(super) fn highest_pdsk(&self) -> Dstate {
        self.volumes.values().map(|v| v.state.pdsk).max().unwrap_or(Dstate::DUnknown)
    }

    /// Have all volumes passed the handshake?
    pub(super) fn are_all_connected(&self) -> bool {
        self.volumes.values().all(|v| v.state.conn >= Cstate::Connected)
    }

    /// Does a connection come up on which requests have to be sent again?
    pub(super) fn owes_resend(&self) -> bool {
        self.conn.is_up && self.conn.has_stale_requests
    }

    /// Is I/O suspended, for whatever reason?
    pub(super) fn is_suspended(&self) -> bool {
        self.volumes.values().any(|v| v.state.is_suspended())
    }

    /// All three suspend bits.
    pub(super) const SUSPENSIONS: StateWord =
        StateWord(StateWord::SUSP.0 | StateWord::SUSP_NOD.0 | StateWord::SUSP_FEN.0);

    /// A key of the log from a number on the wire.
    pub(super) const fn request_key(number: u64) -> ReqKey {
        Key::from_raw(number)
    }
}
