//! A peer that establishes connections step by step, literally as wire-protocol.md §1.3 tells of
//! the original: one thing after the other, and dead sockets are noticed at certain points only.

use alloc::collections::{BTreeSet, VecDeque};
use alloc::vec::Vec;

use drbd_types::Tick;
use drbd_wire::frame::Phase;
use drbd_wire::{Context, Packet, Stream};

use super::establish::Env;
use super::handshake::{Handshake, Progress};
use super::{Coin, LinkAction, LinkConfig, LinkEvent, PAUSE, Pair, SocketId, Verdict};

#[derive(Debug)]
pub(super) struct Reference {
    config: LinkConfig,
    coin: Coin,
    attempts: u32,
    step: Step,
    data: Option<SocketId>,
    meta: Option<(SocketId, bool)>,
    /// Connections that wait to be accepted.
    backlog: VecDeque<SocketId>,
    /// Ends of the peer that are closed, which is not yet noticed.
    dead: BTreeSet<SocketId>,
}

#[derive(Debug)]
enum Step {
    Idle,
    Pausing {
        until: Tick,
    },
    Connecting {
        attempt: u32,
        deadline: Tick,
    },
    /// `both_alive`, after an attempt or after an accept.
    Alive {
        deadline: Tick,
        after_connect: bool,
    },
    Accepting {
        deadline: Tick,
    },
    Initial {
        socket: SocketId,
        deadline: Tick,
    },
    Handshake(Handshake),
    Up(Pair),
}

impl Reference {
    pub(super) const fn new(config: LinkConfig, seed: u64) -> Self {
        Self {
            config,
            coin: Coin(seed),
            attempts: 0,
            step: Step::Idle,
            data: None,
            meta: None,
            backlog: VecDeque::new(),
            dead: BTreeSet::new(),
        }
    }

    pub(super) fn start(&mut self, now: Tick, out: &mut Vec<LinkAction>) {
        self.stop(out);
        out.push(LinkAction::Listen);
        self.connect(now, out);
    }

    fn stop(&mut self, out: &mut Vec<LinkAction>) {
        let mut close = |socket| out.push(LinkAction::Close { socket });
        self.data.take().into_iter().for_each(&mut close);
        self.meta.take().into_iter().for_each(|(socket, _)| close(socket));
        self.backlog.drain(..).for_each(&mut close);
        self.dead.clear();
        match core::mem::replace(&mut self.step, Step::Idle) {
            Step::Idle | Step::Pausing { .. } | Step::Handshake(_) | Step::Up(_) => return,
            Step::Connecting { attempt, .. } => out.push(LinkAction::CancelConnect { attempt }),
            Step::Initial { socket, .. } => close(socket),
            Step::Alive { .. } | Step::Accepting { .. } => {}
        }
        out.push(LinkAction::StopListening);
    }

    pub(super) fn stream_of(&self, socket: SocketId) -> Option<Stream> {
        match &self.step {
            Step::Up(pair) if pair.data == socket => Some(Stream::Data),
            Step::Up(pair) if pair.meta == socket => Some(Stream::Meta),
            _ => None,
        }
    }

    /// Then attempts to connect are not answered.
    pub(super) fn is_backlog_full(&self) -> bool {
        self.backlog.len() > 5
    }

    pub(super) fn next_deadline(&self) -> Option<Tick> {
        match &self.step {
            Step::Idle | Step::Up(_) => None,
            Step::Pausing { until: deadline }
            | Step::Connecting { deadline, .. }
            | Step::Alive { deadline, .. }
            | Step::Accepting { deadline }
            | Step::Initial { deadline, .. } => Some(*deadline),
            Step::Handshake(handshake) => Some(handshake.deadline),
        }
    }

    pub(super) fn on_timer(&mut self, now: Tick, out: &mut Vec<LinkAction>) {
        if self.next_deadline().is_none_or(|deadline| now < deadline) {
            return;
        }
        match &self.step {
            Step::Idle | Step::Up(_) => {}
            Step::Pausing { .. } => self.start(now, out),
            Step::Connecting { attempt, .. } => {
                out.push(LinkAction::CancelConnect { attempt: *attempt });
                self.accept(now, out);
            }
            Step::Alive { after_connect, .. } => {
                let after_connect = *after_connect;
                self.drop_dead(out);
                match self.data.zip(self.meta) {
                    Some((data, (meta, we_resolve_conflicts))) => {
                        out.push(LinkAction::StopListening);
                        let queued = self.backlog.drain(..);
                        out.extend(queued.map(|socket| LinkAction::Close { socket }));
                        let is_unanswered = false;
                        let pair = Pair { data, meta, we_resolve_conflicts, is_unanswered };
                        self.step =
                            Step::Handshake(Handshake::begin(&mut self.env(now, out), pair));
                    }
                    None if after_connect => self.accept(now, out),
                    None => self.connect(now, out),
                }
            }
            Step::Accepting { .. } => self.after_accept(now, out),
            Step::Initial { socket, .. } => self.on_initial(now, *socket, None, out),
            Step::Handshake(_) => self.retry(now, out),
        }
    }

    pub(super) fn handle(&mut self, now: Tick, event: LinkEvent, out: &mut Vec<LinkAction>) {
        match event {
            LinkEvent::Connected { attempt, socket } => match self.step {
                Step::Connecting { attempt: own, .. } if own == attempt => {
                    self.on_connected(now, socket, out);
                }
                _ => out.push(LinkAction::Close { socket }),
            },
            LinkEvent::ConnectFailed { attempt } => match self.step {
                Step::Connecting { attempt: own, .. } if own == attempt => self.accept(now, out),
                _ => {}
            },
            LinkEvent::Accepted { socket } => self.backlog.push_back(socket),
            LinkEvent::Closed { socket, .. } => {
                self.dead.insert(socket);
                let reads = matches!(self.step, Step::Initial { socket: s, .. } if s == socket);
                let is_data = matches!(&self.step, Step::Handshake(h) if h.pair.data == socket);
                if reads {
                    self.on_initial(now, socket, None, out);
                } else if is_data {
                    self.retry(now, out);
                }
            }
            LinkEvent::Packet { socket, packet } if self.is_initial(socket) => {
                let stream = match packet {
                    Packet::InitialData => Some(Stream::Data),
                    Packet::InitialMeta => Some(Stream::Meta),
                    _ => None,
                };
                self.on_initial(now, socket, stream, out);
            }
            LinkEvent::BadPacket { socket, .. } if self.is_initial(socket) => {
                self.on_initial(now, socket, None, out);
            }
            event => self.on_handshake(now, event, out),
        }
        if matches!(self.step, Step::Accepting { .. }) && !self.backlog.is_empty() {
            self.take(now, out);
        }
    }

    fn is_initial(&self, socket: SocketId) -> bool {
        matches!(self.step, Step::Initial { socket: s, .. } if s == socket)
    }

    fn on_connected(&mut self, now: Tick, socket: SocketId, out: &mut Vec<LinkAction>) {
        let packet = if self.data.is_none() {
            self.data = Some(socket);
            Packet::InitialData
        } else {
            self.meta = Some((socket, false));
            Packet::InitialMeta
        };
        out.push(LinkAction::Send { socket, context: Context::FRESH, packet });
        if self.meta.is_some() {
            self.alive(now, true);
        } else {
            self.accept(now, out);
        }
    }

    fn on_initial(
        &mut self,
        now: Tick,
        socket: SocketId,
        stream: Option<Stream>,
        out: &mut Vec<LinkAction>,
    ) {
        self.drop_dead(out);
        let old = match stream {
            Some(Stream::Data) => self.data.replace(socket),
            Some(Stream::Meta) => self.meta.replace((socket, true)).map(|(old, _)| old),
            None => Some(socket),
        };
        if let Some(socket) = old {
            out.push(LinkAction::Close { socket });
            self.dead.remove(&socket);
            if self.coin.heads() {
                self.accept(now, out);
                return;
            }
        }
        self.after_accept(now, out);
    }

    fn after_accept(&mut self, now: Tick, out: &mut Vec<LinkAction>) {
        if self.data.is_some() && self.meta.is_some() {
            self.alive(now, false);
        } else {
            self.connect(now, out);
        }
    }

    fn drop_dead(&mut self, out: &mut Vec<LinkAction>) {
        let data = self.data.take_if(|socket| self.dead.contains(socket));
        let meta = self.meta.take_if(|(socket, _)| self.dead.contains(socket));
        for socket in data.into_iter().chain(meta.map(|(socket, _)| socket)) {
            out.push(LinkAction::Close { socket });
        }
    }

    fn connect(&mut self, now: Tick, out: &mut Vec<LinkAction>) {
        self.attempts += 1;
        let attempt = self.attempts;
        out.push(LinkAction::Connect { attempt });
        self.step = Step::Connecting { attempt, deadline: now.after(self.config.connect_int) };
    }

    fn alive(&mut self, now: Tick, after_connect: bool) {
        self.step = Step::Alive { deadline: now.after(self.config.check_time()), after_connect };
    }

    fn accept(&mut self, now: Tick, out: &mut Vec<LinkAction>) {
        let whole = now.after(self.config.connect_int).0 - now.0;
        let time = if self.coin.heads() { whole + whole / 7 } else { whole - whole / 7 };
        self.step = Step::Accepting { deadline: Tick(now.0 + time) };
        self.take(now, out);
    }

    /// Accepts what waits; only its first packet is looked at.
    fn take(&mut self, now: Tick, out: &mut Vec<LinkAction>) {
        let Some(socket) = self.backlog.pop_front() else { return };
        // Of a dead one, what it has said before is still there.
        let is_dead = self.dead.contains(&socket);
        let time = if is_dead { 1 } else { now.after(self.config.packet_time()).0 - now.0 };
        self.step = Step::Initial { socket, deadline: Tick(now.0 + time) };
        out.push(LinkAction::Receive { socket, phase: Phase::Initial, context: Context::FRESH });
    }

    fn on_handshake(&mut self, now: Tick, event: LinkEvent, out: &mut Vec<LinkAction>) {
        let step = core::mem::replace(&mut self.step, Step::Idle);
        let Step::Handshake(mut handshake) = step else {
            self.step = step;
            return;
        };
        let progress = handshake.on_event(&mut self.env(now, out), event);
        self.step = Step::Handshake(handshake);
        match progress {
            Progress::Continue => {}
            Progress::Failed(failure) => {
                assert_eq!(failure.verdict(), Verdict::Retry, "{failure}");
                self.retry(now, out);
            }
            Progress::Agreed { pair, version, features } => {
                self.step = Step::Up(pair);
                out.push(LinkAction::Established {
                    data: pair.data,
                    meta: pair.meta,
                    version,
                    features,
                    we_resolve_conflicts: pair.we_resolve_conflicts,
                });
            }
        }
    }

    fn retry(&mut self, now: Tick, out: &mut Vec<LinkAction>) {
        self.stop(out);
        self.step = Step::Pausing { until: now.after(PAUSE) };
    }

    fn env<'a>(&'a mut self, now: Tick, out: &'a mut Vec<LinkAction>) -> Env<'a> {
        let (config, coin, attempts) = (&self.config, &mut self.coin, &mut self.attempts);
        Env { now, config, coin, attempts, out }
    }
}
