//! Establishing the connection: from nothing to two agreed streams.
//!
//! ```text
//!            start              both alive             agreed
//!   Idle ----------> Establishing -------> Handshake ----------> Up
//!    ^                  |   ^                 |                  |
//!    |  listen failed   |   | 1 s             | retry            | start (the engine
//!    +------------------+   +---- Pausing <---+                  | lost the connection)
//!    |                                        | StandAlone       v
//!    +----------------------------------------+             Establishing
//! ```
//!
//! The shell owns sockets and does as [`LinkAction`]s say; it names sockets by numbers that it
//! never uses twice in the life of a [`Link`]. Every socket it reports is closed by exactly one
//! [`LinkAction::Close`], whatever becomes of it, unless it is one of the two that were handed over
//! by [`LinkAction::Established`]; those are closed by the next [`Link::start`] or [`Link::stop`].
//!
//! What happens to the connection afterwards (P_PROTOCOL and all that follows) is none of this
//! module's business. Spec: wire-protocol.md §1, §3.1, §3.2.

use alloc::boxed::Box;
use alloc::string::ToString;
use alloc::vec::Vec;
use core::ops::RangeInclusive;

use drbd_types::{Deciseconds, Tick};
use drbd_wire::frame::Phase;
use drbd_wire::packet::Features;
use drbd_wire::{Algorithm, Context, Packet, PeerError, Stream};

use crate::config::{NetConfig, Secret};
pub use crate::ids::SocketId;
use crate::log_line::{LogLine, Severity};

mod establish;
mod failure;
mod handshake;
#[cfg(test)]
mod pair_reference;
#[cfg(test)]
mod pair_tests;
#[cfg(test)]
mod tests;

use establish::{Env, Establishing};
pub use failure::{LinkFailure, Verdict};
use handshake::{Handshake, Progress};

/// The versions that this implementation speaks. Spec: wire-protocol.md §3.1.
pub const VERSIONS: RangeInclusive<u32> = 86..=101;
/// Bytes of a challenge of ours. Spec: wire-protocol.md §3.2.
pub const CHALLENGE_LEN: usize = 64;
/// Rest after a failure that is worth another attempt. Spec: wire-protocol.md §1.5.
const PAUSE: Deciseconds = Deciseconds(10);

/// What the shell tells.
#[derive(Clone, Debug)]
pub enum LinkEvent {
    /// The listening socket could not be opened.
    ListenFailed {
        /// The errno, positive.
        errno: i32,
    },
    /// An attempt succeeded.
    Connected {
        /// Of which [`LinkAction::Connect`]. One that was cancelled may still succeed.
        attempt: u32,
        /// The new socket.
        socket: SocketId,
    },
    /// An attempt failed, for whatever reason.
    ConnectFailed {
        /// Of which [`LinkAction::Connect`].
        attempt: u32,
    },
    /// Somebody connected to the listening socket.
    Accepted {
        /// The new socket.
        socket: SocketId,
    },
    /// The packet that [`LinkAction::Receive`] asked for.
    Packet {
        /// From where.
        socket: SocketId,
        /// What came.
        packet: Packet,
    },
    /// What came is no packet that could be.
    BadPacket {
        /// From where.
        socket: SocketId,
        /// What is wrong with it.
        error: PeerError,
    },
    /// A socket is dead. Reported when it is noticed, whether or not something is being received:
    /// crossed connections are found only by this.
    Closed {
        /// Which.
        socket: SocketId,
        /// How.
        how: HangUp,
    },
    /// The random bytes that [`LinkAction::Random`] asked for, fit for cryptography.
    Random(Box<[u8; CHALLENGE_LEN]>),
}

/// How a socket died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HangUp {
    /// End of file.
    ShutDown,
    /// Reset by the peer.
    Reset,
    /// Another error; the errno, positive.
    Failed(i32),
}

/// What the shell has to do.
#[derive(Clone, Debug, PartialEq)]
pub enum LinkAction {
    /// Listen on the configured own address. Only a failure is reported.
    Listen,
    /// Close the listening socket, with what waits in its queue.
    StopListening,
    /// Connect from the configured own address (any port) to the peer's.
    Connect {
        /// Number of the attempt, for its answer.
        attempt: u32,
    },
    /// The answer of this attempt is not waited for any longer.
    CancelConnect {
        /// Which.
        attempt: u32,
    },
    /// Send a packet.
    Send {
        /// Where.
        socket: SocketId,
        /// How it looks.
        context: Context,
        /// What.
        packet: Packet,
    },
    /// Receive exactly one packet, and not a byte more: the next ones may look different.
    Receive {
        /// From where.
        socket: SocketId,
        /// Which packets may come.
        phase: Phase,
        /// How they look.
        context: Context,
    },
    /// Close a socket; nothing of it is to be reported any more.
    Close {
        /// Which.
        socket: SocketId,
    },
    /// [`LinkEvent::Random`] is wanted.
    Random,
    /// A line for the log.
    Log(LogLine),
    /// Both streams are up. The two sockets belong to the engine now (TCP_NODELAY is due), and
    /// nothing has been received beyond what was agreed upon.
    Established {
        /// The data stream.
        data: SocketId,
        /// The meta stream.
        meta: SocketId,
        /// Agreed version.
        version: u32,
        /// Agreed features.
        features: Features,
        /// Conflicts of two Primaries are resolved here. The other node has the opposite.
        we_resolve_conflicts: bool,
    },
    /// It came to nothing; all sockets are closed.
    Failed {
        /// What happens next.
        verdict: Verdict,
        /// Why.
        reason: LinkFailure,
    },
}

/// Settings of a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkConfig {
    /// Versions to offer, a part of [`VERSIONS`].
    pub versions: RangeInclusive<u32>,
    /// Features to offer.
    pub features: Features,
    /// `connect-int`.
    pub connect_int: Deciseconds,
    /// `ping-timeout`.
    pub ping_timeout: Deciseconds,
    /// `socket-check-timeout`; 0: as `ping-timeout`.
    pub socket_check_timeout: Deciseconds,
    /// `cram-hmac-alg` and `shared-secret`, if the peer must prove itself.
    pub auth: Option<Auth>,
    /// A dry run (`--tentative`) is wanted.
    pub is_dry_run: bool,
}

/// How the peer must prove itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Auth {
    /// `cram-hmac-alg`; one that [`Algorithm::respond`] knows.
    pub algorithm: Algorithm,
    /// `shared-secret`.
    pub secret: Secret,
}

/// `cram-hmac-alg` names nothing that could be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cram-hmac-alg: this algorithm is not available")]
pub struct UnknownAuth;

impl LinkConfig {
    /// From the settings of the connection.
    ///
    /// # Errors
    /// Authentication is wanted by an algorithm that is not available; without it the link must
    /// not be started.
    pub fn new(net: &NetConfig) -> Result<Self, UnknownAuth> {
        let auth = match net.cram_hmac_alg.as_str() {
            "" => None,
            name => {
                let algorithm = Algorithm::from_name(name).ok_or(UnknownAuth)?;
                algorithm.respond(&[], &[]).ok_or(UnknownAuth)?;
                Some(Auth { algorithm, secret: net.shared_secret.clone() })
            }
        };
        Ok(Self {
            versions: net.versions.0..=net.versions.1,
            features: Features::from_bits_retain(net.features),
            connect_int: Deciseconds(net.connect_int.saturating_mul(10)),
            ping_timeout: net.ping_timeout,
            socket_check_timeout: net.socket_check_timeout,
            auth,
            is_dry_run: net.tentative,
        })
    }

    /// How long the sockets are watched before they count as alive. Spec §1.3.
    fn check_time(&self) -> Deciseconds {
        match self.socket_check_timeout {
            Deciseconds(0) => self.ping_timeout,
            set => set,
        }
    }

    /// How long a packet of the handshake may take. Spec §1.5.
    const fn packet_time(&self) -> Deciseconds {
        Deciseconds(self.ping_timeout.0.saturating_mul(4))
    }
}

/// The two sockets of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pair {
    data: SocketId,
    meta: SocketId,
    /// This node accepted the meta connection. Spec §1.1.
    we_resolve_conflicts: bool,
    /// The peer has opened neither: both may still wait to be accepted by it.
    is_unanswered: bool,
}

/// One connection in the making. Deterministic: the same seed, settings and events give the same
/// actions.
#[derive(Clone, Debug)]
pub struct Link {
    config: LinkConfig,
    coin: Coin,
    /// Number of the last attempt to connect.
    attempts: u32,
    state: State,
}

#[derive(Clone, Debug)]
enum State {
    Idle,
    Pausing { until: Tick },
    Establishing(Establishing),
    Handshake(Handshake),
    Up(Pair),
}

impl Link {
    /// Idle. The seed decides about the coins of crossed connections; any two nodes must have
    /// different ones.
    pub const fn new(config: LinkConfig, seed: u64) -> Self {
        Self { config, coin: Coin(seed), attempts: 0, state: State::Idle }
    }

    /// Changed settings; they hold from the next step on.
    pub fn set_config(&mut self, config: LinkConfig) {
        self.config = config;
    }

    /// Begins from the beginning; what there was is closed.
    pub fn start(&mut self, now: Tick, out: &mut Vec<LinkAction>) {
        self.stop(out);
        let establishing = Establishing::begin(&mut self.env(now, out));
        self.state = State::Establishing(establishing);
    }

    /// Closes everything; nothing happens until the next start.
    pub fn stop(&mut self, out: &mut Vec<LinkAction>) {
        match core::mem::replace(&mut self.state, State::Idle) {
            State::Idle | State::Pausing { .. } => {}
            State::Establishing(establishing) => establishing.stop(out),
            State::Handshake(handshake) => handshake.pair.close(out),
            State::Up(pair) => pair.close(out),
        }
    }

    /// Which stream a socket is, once both are handed over.
    pub fn stream_of(&self, socket: SocketId) -> Option<Stream> {
        match &self.state {
            State::Up(pair) if pair.data == socket => Some(Stream::Data),
            State::Up(pair) if pair.meta == socket => Some(Stream::Meta),
            State::Up(_)
            | State::Idle
            | State::Pausing { .. }
            | State::Establishing(_)
            | State::Handshake(_) => None,
        }
    }

    /// Latest time for the next [`Self::on_timer`]; coming earlier is harmless.
    pub fn next_deadline(&self) -> Option<Tick> {
        match &self.state {
            State::Idle | State::Up(_) => None,
            State::Pausing { until } => Some(*until),
            State::Establishing(establishing) => Some(establishing.deadline()),
            State::Handshake(handshake) => Some(handshake.deadline),
        }
    }

    /// Time has passed.
    pub fn on_timer(&mut self, now: Tick, out: &mut Vec<LinkAction>) {
        match self.next_deadline() {
            Some(deadline) if deadline <= now => {}
            _ => return,
        }
        let mut state = core::mem::replace(&mut self.state, State::Idle);
        match &mut state {
            State::Idle | State::Up(_) => self.state = state,
            State::Pausing { .. } => self.start(now, out),
            State::Establishing(establishing) => {
                let pair = establishing.on_timer(&mut self.env(now, out));
                self.state = match pair {
                    None => state,
                    Some(pair) => {
                        let handshake = Handshake::begin(&mut self.env(now, out), pair);
                        State::Handshake(handshake)
                    }
                };
            }
            State::Handshake(handshake) => {
                let failure = handshake.timed_out();
                self.state = state;
                self.fail(now, failure, out);
            }
        }
    }

    /// Feeds one event.
    pub fn handle(&mut self, now: Tick, event: LinkEvent, out: &mut Vec<LinkAction>) {
        let mut state = core::mem::replace(&mut self.state, State::Idle);
        let progress = match &mut state {
            State::Idle | State::Pausing { .. } | State::Up(_) => {
                close_late(&event, out);
                Progress::Continue
            }
            State::Establishing(establishing) => {
                establishing.on_event(&mut self.env(now, out), event)
            }
            State::Handshake(handshake) => handshake.on_event(&mut self.env(now, out), event),
        };
        self.state = state;
        match progress {
            Progress::Continue => {}
            Progress::Failed(failure) => self.fail(now, failure, out),
            Progress::Agreed { pair, version, features } => {
                self.state = State::Up(pair);
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

    fn fail(&mut self, now: Tick, reason: LinkFailure, out: &mut Vec<LinkAction>) {
        let was_authenticating = match &self.state {
            State::Handshake(handshake) => {
                handshake.is_authenticating() && reason != LinkFailure::NoDryRun
            }
            State::Idle | State::Pausing { .. } | State::Establishing(_) | State::Up(_) => false,
        };
        self.stop(out);
        out.push(log(Severity::Error, reason.to_string()));
        let verdict = reason.verdict();
        match verdict {
            Verdict::Retry if was_authenticating => {
                out.push(log(Severity::Error, "Authentication of peer failed, trying again."));
            }
            Verdict::StandAlone if was_authenticating => {
                out.push(log(Severity::Error, "Authentication of peer failed"));
            }
            Verdict::Retry | Verdict::StandAlone => {}
        }
        match verdict {
            Verdict::Retry => self.state = State::Pausing { until: now.after(PAUSE) },
            Verdict::StandAlone => {
                out.push(log(Severity::Error, "Discarding network configuration."));
            }
        }
        out.push(LinkAction::Failed { verdict, reason });
    }

    fn env<'a>(&'a mut self, now: Tick, out: &'a mut Vec<LinkAction>) -> Env<'a> {
        Env { now, config: &self.config, coin: &mut self.coin, attempts: &mut self.attempts, out }
    }
}

/// A socket that came too late for anything.
fn close_late(event: &LinkEvent, out: &mut Vec<LinkAction>) {
    match event {
        LinkEvent::Connected { socket, .. } | LinkEvent::Accepted { socket } => {
            out.push(LinkAction::Close { socket: *socket });
        }
        LinkEvent::ListenFailed { .. }
        | LinkEvent::ConnectFailed { .. }
        | LinkEvent::Packet { .. }
        | LinkEvent::BadPacket { .. }
        | LinkEvent::Closed { .. }
        | LinkEvent::Random(_) => {}
    }
}

impl Pair {
    fn close(self, out: &mut Vec<LinkAction>) {
        out.push(LinkAction::Close { socket: self.data });
        out.push(LinkAction::Close { socket: self.meta });
    }
}

fn log(severity: Severity, text: impl Into<alloc::string::String>) -> LinkAction {
    LinkAction::Log(LogLine { severity, volume: None, text: text.into() })
}

/// A fair coin: a fixed sequence that starts at a seed (splitmix64).
#[derive(Clone, Debug)]
struct Coin(u64);

impl Coin {
    fn heads(&mut self) -> bool {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (word ^ word >> 31) & 1 == 1
    }
}
