//! The engine of one resource: its connection and its volumes. Events in, actions out.
//!
//! ```text
//!   Event -> dispatch --> app, acks, peer_write, serve     the data path: plain functions
//!                    \-> receive -> receiver procedure     packets that need time, one after the other
//!                    \-> admin   -> a procedure each
//!            state changes -> after -> worker procedure consequences, in the order of the changes
//!   maintain: parked requests, activity log, barriers, timers; after every event
//! ```
//!
//! Deterministic: the same seed and the same events give the same actions. The two lasting
//! procedures stand for the two orders that the protocol relies on: the *receiver* handles packets
//! of the data stream one after the other, the *worker* carries out the consequences of state
//! changes in the order of the changes. Spec: states-and-generations.md §0, io-path-and-resync.md §0.3.

mod acks;
mod admin;
mod after;
mod app;
mod attach;
#[cfg(any(test, feature = "check"))]
mod audit;
mod barriers;
mod bitmap_exchange;
mod change;
mod claims;
mod congestion;
mod connection;
mod fence;
mod generations;
mod handshake;
mod io;
mod meta;
mod params;
mod peer_write;
mod proc;
mod receive;
mod request;
mod resize;
pub mod resume;
mod resync;
mod role;
mod send;
mod serve;
mod stats;
pub mod status;
mod timers;
mod verify;
mod volume;
mod volumes;

use alloc::collections::{BTreeMap, VecDeque};
use alloc::format;
use alloc::vec::Vec;

use drbd_types::{Fields, Role, Tick, VolumeNr};

use crate::action::{Action, Actions, Handler};
use crate::config::ResourceConfig;
use crate::event::Event;
use crate::ids::{CallId, SendToken};
use crate::log_line::{LogLine, Severity};
use crate::peer_write::epochs::PeerEpochs;
use crate::request::log::{SentEpoch, TransferLog};
use crate::slab::Slab;

use self::after::Work;
use self::connection::Connection;
use self::io::{Answer, InFlight};
use self::proc::{Procs, Start};
use self::volume::Volume;
use self::volumes::Volumes;

/// One resource.
pub struct Engine {
    procs: Procs,
}

/// What the engine knows. Procedures and the data path work on it.
pub(crate) struct Core {
    now: Tick,
    out: Actions,
    random: Random,
    config: ResourceConfig,
    conn: Connection,
    volumes: Volumes,
    /// Application requests of all volumes, in order.
    log: TransferLog,
    /// What the peer knows about their epochs.
    sent_epoch: SentEpoch,
    /// Epochs of the writes that the peer sends.
    peer_epochs: PeerEpochs,
    /// Disk and meta-data I/O without answer.
    ios: Slab<InFlight>,
    /// Answers that procedures have not fetched.
    answers: BTreeMap<u64, Answer>,
    /// What the worker has to do.
    work: VecDeque<Work>,
    /// Numbers of queued and of finished work.
    work_queued: u64,
    work_done: u64,
    /// Answers of handlers that procedures have not fetched.
    handler_exits: BTreeMap<u32, i32>,
    next_call: u32,
    next_token: u64,
    starting: Vec<Start>,
    /// When sleeping procedures want to look.
    sleepers: Vec<Tick>,
    /// Grows with every change that a procedure may wait for.
    version: u64,
    /// Grows with every change of a state vector.
    state_version: u64,
    /// I/O was suspended when it was looked at last.
    was_suspended: bool,
}

/// Numbers that nobody can guess, from the seed that the shell gave.
struct Random(u64);

impl Random {
    /// The next number (SplitMix64).
    const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}

/// More rounds than any event can need; beyond it the engine is in a loop.
const ROUNDS_MAX: u32 = 100_000;

impl Engine {
    /// A resource without volumes, StandAlone. `seed` must be unpredictable in production: new
    /// data generations come from it.
    pub fn new(seed: u64) -> Self {
        let core = Core {
            now: Tick(0),
            out: Vec::new(),
            random: Random(seed),
            config: ResourceConfig::default(),
            conn: Connection::default(),
            volumes: Volumes::default(),
            log: TransferLog::default(),
            sent_epoch: SentEpoch::default(),
            peer_epochs: PeerEpochs::default(),
            ios: Slab::new(),
            answers: BTreeMap::new(),
            work: VecDeque::new(),
            work_queued: 0,
            work_done: 0,
            handler_exits: BTreeMap::new(),
            next_call: 0,
            next_token: 0,
            starting: Vec::new(),
            sleepers: Vec::new(),
            version: 0,
            state_version: 0,
            was_suspended: false,
        };
        let procs = Procs::new(core);
        procs.with(|core| {
            core.start(after::worker);
            core.start(connection::receiver);
        });
        Self { procs }
    }

    /// Feeds one event. What must happen is appended to `out`, in the order in which to start it.
    pub fn handle(&mut self, now: Tick, event: Event, out: &mut Actions) {
        self.procs.with(|core| {
            core.now = core.now.max(now);
            core.dispatch(event);
        });
        let mut rounds = 0;
        loop {
            let before = self.procs.with(|core| core.version);
            self.procs.round();
            let is_quiet = self.procs.with(|core| {
                core.maintain();
                core.version == before && core.starting.is_empty()
            });
            if is_quiet {
                break;
            }
            rounds += 1;
            assert!(rounds < ROUNDS_MAX, "the engine does not come to rest");
        }
        self.procs.with(|core| out.append(&mut core.out));
    }

    /// Latest time for the next [`Event::Timer`]; coming earlier is harmless.
    pub fn next_deadline(&self) -> Option<Tick> {
        self.procs.with(|core| core.next_deadline())
    }
}

impl Core {
    fn dispatch(&mut self, event: Event) {
        match event {
            Event::App(request) => self.on_app(request),
            Event::OpenCount { volume, users } => {
                if let Some(volume) = self.volumes.get_mut(volume) {
                    volume.users = users;
                    self.touch();
                }
            }
            Event::Disk { io, result } => self.on_disk(io, result),
            Event::Meta { io, result } => self.on_meta(io, result),
            Event::Link(event) => self.on_link(event),
            Event::Packet { stream, volume, packet, payload } => {
                self.on_packet(stream, volume, packet, payload);
            }
            Event::StreamLost { stream, how } => self.on_stream_lost(stream, how),
            Event::Sent { token } => self.on_sent(token),
            Event::SendQueue { stream, waiting, is_congested, moved } => {
                self.on_send_queue(stream, waiting, is_congested, moved);
            }
            Event::Handler { call, exit } => {
                self.handler_exits.insert(call.0, exit);
                self.touch();
            }
            Event::Admin { ticket, command } => self.on_admin(ticket, command),
            Event::Dependency { volume, must_wait } => self.on_dependency(volume, must_wait),
            Event::Timer => self.touch(),
        }
    }

    /// What may go on, goes on. Cheap, and done after every event.
    fn maintain(&mut self) {
        self.run_timers();
        self.run_thaw();
        for nr in self.volume_numbers() {
            self.run_activity_log(nr);
            self.run_waiting_requests(nr);
            self.run_serves(nr);
        }
        self.run_peer_writes();
        self.run_barriers();
        self.run_receive_window();
    }

    fn volume_numbers(&self) -> impl Iterator<Item = VolumeNr> + use<> {
        let mut numbers = [0; 4];
        let all = self.volumes.numbers().iter().copied();
        // Almost always a handful: no allocation then.
        if self.volumes.len() <= numbers.len() {
            let len = self.volumes.len();
            for (to, from) in numbers.iter_mut().zip(all) {
                *to = from;
            }
            return Numbers::Few(numbers, 0, len);
        }
        Numbers::Many(all.collect::<Vec<u16>>().into_iter())
    }

    fn volume(&self, nr: VolumeNr) -> Option<&Volume> {
        self.volumes.get(nr)
    }

    fn volume_mut(&mut self, nr: VolumeNr) -> Option<&mut Volume> {
        self.volumes.get_mut(nr)
    }

    /// The state of a volume; that of a new one if there is none.
    fn state(&self, nr: VolumeNr) -> Fields {
        self.volumes.get(nr).map_or(Fields::NEW, |v| v.state)
    }

    fn is_primary_anywhere(&self) -> bool {
        self.volumes.values().any(|v| v.state.role == Role::Primary)
    }

    fn log(
        &mut self,
        severity: Severity,
        volume: Option<VolumeNr>,
        text: impl Into<alloc::string::String>,
    ) {
        self.out.push(Action::Log(LogLine { severity, volume, text: text.into() }));
    }

    fn info(&mut self, nr: VolumeNr, text: impl Into<alloc::string::String>) {
        self.log(Severity::Info, Some(nr), text);
    }

    fn token(&mut self) -> SendToken {
        self.next_token += 1;
        SendToken(self.next_token)
    }
}

/// Runs a handler program and waits for its end. Spec: states §12.
async fn call_handler(cx: &proc::Cx, handler: Handler, volume: Option<VolumeNr>) -> i32 {
    // It may start this node anew.
    meta::sync_all(cx).await;
    let call = cx.with(|core| {
        core.next_call = core.next_call.wrapping_add(1);
        let call = CallId(core.next_call);
        let minor = volume.and_then(|nr| core.volume(nr)).map(|v| v.minor);
        core.out.push(Action::Call { call, handler, minor });
        call
    });
    cx.until(move |core| core.handler_exits.remove(&call.0)).await
}

enum Numbers {
    Few([u16; 4], usize, usize),
    Many(alloc::vec::IntoIter<u16>),
}

impl Iterator for Numbers {
    type Item = VolumeNr;

    fn next(&mut self) -> Option<VolumeNr> {
        match self {
            Self::Few(numbers, at, len) => {
                let nr = numbers.get(*at).filter(|_| *at < *len).copied()?;
                *at += 1;
                Some(VolumeNr(nr))
            }
            Self::Many(all) => all.next().map(VolumeNr),
        }
    }
}

impl core::fmt::Debug for Engine {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let states = self.procs.with(|core| {
            core.volumes.values().map(|v| format!("{}: {:?}", v.nr, v.state)).collect::<Vec<_>>()
        });
        f.debug_list().entries(states).finish()
    }
}
