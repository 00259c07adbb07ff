//! Two sockets that both nodes agree upon. Spec: wire-protocol.md §1.3.
//!
//! ```text
//!                  failed, connect-int over, or one stream found
//!        Connecting --------------------------------------------> Waiting
//!          ^  |  ^                                                 |  |
//!          |  |  |  time is over, accepted one stream, or tails    |  |
//!          |  |  +-------------------------------------------------+  |
//!          |  +------ both streams are there ----- Checking <---------+
//!          +--- one of them died meanwhile, tails -----|  \-- heads --> Waiting
//!                                                      v
//!                                             both are alive: done
//! ```
//!
//! Whoever connects says first which stream it is; the first connection of a node is its data
//! stream. A stream of a kind that there is already is a crossing: the newer one wins, and a coin
//! decides whether this node waits or connects, so that two nodes do not cross for ever.
//!
//! Unlike the original, accepted connections are looked at all the time and at the same time, not
//! one after the other between two attempts: silent strangers do not hold up the peer, a peer that
//! is the only one that can connect is not kept waiting by our own attempts, and a crossing is
//! noticed while the streams are being checked.

use alloc::vec::Vec;

use drbd_types::Tick;
use drbd_wire::frame::Phase;
use drbd_wire::{Context, Packet, Stream};

use super::handshake::Progress;
use super::{Coin, LinkAction, LinkConfig, LinkEvent, LinkFailure, Pair, SocketId, log};
use crate::log_line::Severity;

/// Accepted connections that have not said yet which stream they are. When it is one more, the
/// oldest is dropped: the peer says it at once.
const CANDIDATES: usize = 5;

/// What every step needs.
pub(super) struct Env<'a> {
    pub(super) now: Tick,
    pub(super) config: &'a LinkConfig,
    pub(super) coin: &'a mut Coin,
    pub(super) attempts: &'a mut u32,
    pub(super) out: &'a mut Vec<LinkAction>,
}

impl Env<'_> {
    fn close(&mut self, socket: SocketId) {
        self.out.push(LinkAction::Close { socket });
    }
}

#[derive(Clone, Debug)]
pub(super) struct Establishing {
    is_listening: bool,
    data: Option<Held>,
    meta: Option<Held>,
    candidates: Vec<Candidate>,
    step: Step,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    socket: SocketId,
    /// And not opened by this node.
    is_accepted: bool,
}

/// An accepted connection that must say which stream it is.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    socket: SocketId,
    deadline: Tick,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Connecting {
        attempt: u32,
        deadline: Tick,
    },
    Waiting {
        deadline: Tick,
    },
    /// Both streams were there. They are watched for a while, because only the peer's closing of
    /// one shows that the two nodes have chosen differently.
    Checking {
        deadline: Tick,
        otherwise: Otherwise,
    },
}

/// What comes after streams that did not stay alive.
#[derive(Clone, Copy, Debug)]
enum Otherwise {
    Connect,
    Wait,
}

/// Was there a stream of the same kind?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Adopted {
    Fresh,
    Crossed,
}

impl Establishing {
    pub(super) fn begin(env: &mut Env<'_>) -> Self {
        env.out.push(LinkAction::Listen);
        let step = connect(env);
        Self { is_listening: true, data: None, meta: None, candidates: Vec::new(), step }
    }

    /// Closes everything.
    pub(super) fn stop(self, out: &mut Vec<LinkAction>) {
        if self.is_listening {
            out.push(LinkAction::StopListening);
        }
        if let Step::Connecting { attempt, .. } = self.step {
            out.push(LinkAction::CancelConnect { attempt });
        }
        let held = self.data.into_iter().chain(self.meta).map(|held| held.socket);
        let candidates = self.candidates.into_iter().map(|candidate| candidate.socket);
        let all = held.chain(candidates);
        out.extend(all.map(|socket| LinkAction::Close { socket }));
    }

    pub(super) fn deadline(&self) -> Tick {
        let (Step::Connecting { deadline, .. }
        | Step::Waiting { deadline }
        | Step::Checking { deadline, .. }) = self.step;
        let candidates = self.candidates.iter().map(|candidate| candidate.deadline);
        candidates.fold(deadline, Tick::min)
    }

    pub(super) fn on_event(&mut self, env: &mut Env<'_>, event: LinkEvent) -> Progress {
        match event {
            LinkEvent::ListenFailed { errno } => {
                self.is_listening = false;
                return Progress::Failed(LinkFailure::Listen(errno));
            }
            LinkEvent::Connected { attempt, socket } => self.on_connected(env, attempt, socket),
            LinkEvent::ConnectFailed { attempt } => {
                if self.is_attempt(attempt) {
                    self.step = wait(env);
                }
            }
            LinkEvent::Accepted { socket } => self.on_accepted(env, socket),
            LinkEvent::Packet { socket, packet } => match packet {
                Packet::InitialData => self.on_initial(env, socket, Stream::Data),
                Packet::InitialMeta => self.on_initial(env, socket, Stream::Meta),
                // All others are refused by the reader in this phase already.
                _ => self.on_stranger(env, socket),
            },
            LinkEvent::BadPacket { socket, .. } => self.on_stranger(env, socket),
            LinkEvent::Closed { socket, .. } => self.on_closed(env, socket),
            LinkEvent::Random(_) => {}
        }
        Progress::Continue
    }

    /// A deadline has passed. Returns both streams when they have stayed alive.
    pub(super) fn on_timer(&mut self, env: &mut Env<'_>) -> Option<Pair> {
        while let Some(late) = self.candidates.iter().find(|c| c.deadline <= env.now) {
            self.on_stranger(env, late.socket);
        }
        match self.step {
            Step::Connecting { attempt, deadline } if deadline <= env.now => {
                env.out.push(LinkAction::CancelConnect { attempt });
                self.step = wait(env);
            }
            Step::Waiting { deadline } if deadline <= env.now => self.step = connect(env),
            Step::Checking { deadline, otherwise } if deadline <= env.now => {
                if let Some(pair) = self.pair() {
                    env.out.push(LinkAction::StopListening);
                    for candidate in core::mem::take(&mut self.candidates) {
                        env.close(candidate.socket);
                    }
                    return Some(pair);
                }
                self.step = match otherwise {
                    Otherwise::Connect => connect(env),
                    Otherwise::Wait => wait(env),
                };
            }
            Step::Connecting { .. } | Step::Waiting { .. } | Step::Checking { .. } => {}
        }
        None
    }

    fn pair(&self) -> Option<Pair> {
        let (data, meta) = self.data.zip(self.meta)?;
        Some(Pair {
            data: data.socket,
            meta: meta.socket,
            we_resolve_conflicts: meta.is_accepted,
            is_unanswered: !data.is_accepted && !meta.is_accepted,
        })
    }

    const fn is_attempt(&self, number: u32) -> bool {
        matches!(self.step, Step::Connecting { attempt, .. } if attempt == number)
    }

    fn on_connected(&mut self, env: &mut Env<'_>, attempt: u32, socket: SocketId) {
        if !self.is_attempt(attempt) {
            env.close(socket);
            return;
        }
        // While connecting, one of the two is missing.
        let held = Some(Held { socket, is_accepted: false });
        let packet = if self.data.is_none() {
            self.data = held;
            Packet::InitialData
        } else {
            self.meta = held;
            Packet::InitialMeta
        };
        env.out.push(LinkAction::Send { socket, context: Context::FRESH, packet });
        self.step = if self.pair().is_some() { check(env, Otherwise::Wait) } else { wait(env) };
    }

    fn on_accepted(&mut self, env: &mut Env<'_>, socket: SocketId) {
        if self.candidates.len() >= CANDIDATES {
            let oldest = self.candidates.remove(0);
            env.close(oldest.socket);
        }
        let deadline = env.now.after(env.config.packet_time());
        self.candidates.push(Candidate { socket, deadline });
        let (phase, context) = (Phase::Initial, Context::FRESH);
        env.out.push(LinkAction::Receive { socket, phase, context });
    }

    fn take_candidate(&mut self, socket: SocketId) -> Option<Candidate> {
        let at = self.candidates.iter().position(|candidate| candidate.socket == socket)?;
        Some(self.candidates.remove(at))
    }

    fn on_initial(&mut self, env: &mut Env<'_>, socket: SocketId, stream: Stream) {
        if self.take_candidate(socket).is_none() {
            return;
        }
        let held = Held { socket, is_accepted: true };
        let (letter, old) = match stream {
            Stream::Data => ('S', self.data.replace(held)),
            Stream::Meta => ('M', self.meta.replace(held)),
        };
        let adopted = match old {
            None => Adopted::Fresh,
            Some(old) => {
                let line = alloc::format!("initial packet {letter} crossed");
                env.out.push(log(Severity::Warn, line));
                env.close(old.socket);
                Adopted::Crossed
            }
        };
        self.after_adoption(env, adopted);
    }

    fn after_adoption(&mut self, env: &mut Env<'_>, adopted: Adopted) {
        let otherwise = if adopted == Adopted::Crossed && env.coin.heads() {
            Otherwise::Wait
        } else {
            Otherwise::Connect
        };
        if self.pair().is_some() {
            self.cancel(env);
            self.step = check(env, otherwise);
            return;
        }
        match (&mut self.step, otherwise) {
            (Step::Checking { otherwise: then, .. }, _) => *then = otherwise,
            (Step::Connecting { .. }, Otherwise::Connect) => {}
            (Step::Waiting { .. }, Otherwise::Connect) => self.step = connect(env),
            (Step::Connecting { .. } | Step::Waiting { .. }, Otherwise::Wait) => {
                self.cancel(env);
                self.step = wait(env);
            }
        }
    }

    fn cancel(&self, env: &mut Env<'_>) {
        if let Step::Connecting { attempt, .. } = self.step {
            env.out.push(LinkAction::CancelConnect { attempt });
        }
    }

    /// A connection that did not say which stream it is, or said nonsense.
    fn on_stranger(&mut self, env: &mut Env<'_>, socket: SocketId) {
        if self.take_candidate(socket).is_none() {
            return;
        }
        env.out.push(log(Severity::Warn, "Error receiving initial packet"));
        env.close(socket);
        // It may have been a connection of the peer that crossed with ours.
        if matches!(self.step, Step::Waiting { .. }) && !env.coin.heads() {
            self.step = connect(env);
        }
    }

    fn on_closed(&mut self, env: &mut Env<'_>, socket: SocketId) {
        let is_it = |held: &mut Held| held.socket == socket;
        if self.data.take_if(is_it).or_else(|| self.meta.take_if(is_it)).is_some() {
            env.close(socket);
        } else {
            self.on_stranger(env, socket);
        }
    }
}

fn connect(env: &mut Env<'_>) -> Step {
    *env.attempts = env.attempts.wrapping_add(1);
    let attempt = *env.attempts;
    env.out.push(LinkAction::Connect { attempt });
    Step::Connecting { attempt, deadline: env.now.after(env.config.connect_int) }
}

/// For one seventh more or less than `connect-int`, so that two nodes fall out of step.
fn wait(env: &mut Env<'_>) -> Step {
    let whole = env.now.after(env.config.connect_int).0.saturating_sub(env.now.0);
    let time = if env.coin.heads() { whole + whole / 7 } else { whole - whole / 7 };
    Step::Waiting { deadline: Tick(env.now.0.saturating_add(time)) }
}

fn check(env: &Env<'_>, otherwise: Otherwise) -> Step {
    Step::Checking { deadline: env.now.after(env.config.check_time()), otherwise }
}
