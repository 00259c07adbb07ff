//! The thread of a resource: events to the engine, actions from it, and nothing in between.
//!
//! ```text
//!   commands, completions, packets, requests --> Machine --> actions --> disks, link, NBD, notices
//!                      ^                                                        |
//!                      +---------------- wait (the only place that does) <------+
//! ```
//!
//! An idle resource waits in the kernel without a limit, or until the engine's next deadline.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use drbd_core::action::{Action, Actions, DeviceOffer, Handler};
use drbd_core::admin::Reply;
use drbd_core::event::Event;
use drbd_core::ids::{BufId, CallId, Ticket};
use drbd_core::log_line::LogLine;
use drbd_types::{Minor, SectorRange, Tick, VolumeNr};
use drbd_wire::{Algorithm, Stream};
use rustix::event::{EventfdFlags, eventfd};

use super::buf::{Pool, PoolSize, Zone};
use super::disk::{Disk, DiskPaths, OpenError};
use super::fault::{Faults, Rule};
use super::helpers::ring_bell;
use super::io::{Backend, Choice, Done, Fd, Op, Part, Tag, backend};
use super::link::{Addresses, Link, StreamRule};
use super::spin::{self, Spin};
use super::status::Statuses;
use super::{Env, ZEROES_LEN};
use crate::front::nbd::server::{CLIENT_BYTES_MAX, Extent, Nbd, Session};
use crate::front::ublk::server::{Queue, Ublk};

/// Commands that may wait for the plane.
const COMMANDS_MAX: usize = 256;
/// Wait when the engine's deadline lies in the past even after its timer was called.
const LATE: Duration = Duration::from_millis(1);
/// More packets than these on the meta stream acknowledge more than one write and its barrier.
const ANSWERS_MAX: u32 = 2;
/// So often disks in memory are given work before the kernel is asked for news.
const ROUNDS_MAX: u32 = 8;

/// What the plane drives: the engine, or a double of it in tests.
pub trait Machine {
    /// Feeds one event; what must happen is appended, in the order in which to start it.
    fn handle(&mut self, now: Tick, event: Event, out: &mut Actions);

    /// Latest time for the next [`Event::Timer`].
    fn next_deadline(&self) -> Option<Tick>;

    /// What of a range the peer, or this node, has not got: at most `most` extents from its
    /// beginning on, flag 1 where it is out of sync. False: nothing is known.
    fn out_of_sync(
        &self,
        volume: VolumeNr,
        range: SectorRange,
        most: usize,
        out: &mut Vec<Extent>,
    ) -> bool {
        let _ = (volume, range, most, out);
        false
    }
}

impl Machine for drbd_core::Engine {
    fn handle(&mut self, now: Tick, event: Event, out: &mut Actions) {
        Self::handle(self, now, event, out);
    }

    fn next_deadline(&self) -> Option<Tick> {
        Self::next_deadline(self)
    }

    fn out_of_sync(
        &self,
        volume: VolumeNr,
        range: SectorRange,
        most: usize,
        out: &mut Vec<Extent>,
    ) -> bool {
        let Some(runs) = Self::out_of_sync(self, volume, range, most) else { return false };
        out.extend(runs.into_iter().map(|(len, is_set)| Extent {
            len: len.0.saturating_mul(512),
            flags: u32::from(is_set),
        }));
        true
    }
}

/// What control asks of the plane.
pub enum Command<M> {
    /// An event for the engine: a command of the administrator, the end of a handler.
    Event(Event),
    /// What the next attach of a volume opens.
    Disk(VolumeNr, DiskPaths),
    /// Where to listen and connect.
    Addresses(Addresses),
    /// Fault points of disks.
    Faults(Vec<Rule>),
    /// Fault points of the streams.
    StreamFaults(Vec<StreamRule>),
    /// A stream breaks.
    Cut(Stream),
    /// A client of the NBD server.
    Client(Session),
    /// A ublk device to be served.
    Serve(Queue),
    /// Clients of a volume, or all, are sent away.
    DetachClients(Option<VolumeNr>),
    /// Look at the engine between two events.
    Inspect(Box<dyn FnOnce(&M) + Send>),
    /// The end. What is in flight is given up.
    Stop,
}

/// What the plane tells control.
#[derive(Clone, Debug)]
pub enum Notice {
    /// A command has ended.
    Reply(Ticket, Reply),
    /// A handler is to be run; answered by [`Event::Handler`].
    Call(CallId, Handler, Option<Minor>),
    /// A line of the log; it was logged already.
    Log(LogLine),
    /// What a device offers has changed.
    Device(VolumeNr, DeviceOffer),
    /// How many users a device has.
    Users(VolumeNr, u32),
    /// The kernel has lost a connection to a device.
    KernelLost(VolumeNr),
    /// A disk could not be opened.
    OpenFailed(VolumeNr, OpenError),
    /// Something that status views show has changed. At most once per round.
    Changed,
    /// The thread has ended; with an error, it could not go on.
    Stopped(Option<String>),
}

/// Where notices go. Called on the plane's thread: it must not block, and keeps what it cannot
/// handle at once in bounds by leaving out log lines.
pub type Sink = Box<dyn FnMut(Notice) + Send>;

/// How a plane is set up.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Which way to the kernel.
    pub io: Choice,
    /// Memory.
    pub pool: PoolSize,
    /// Keep it from being paged out, and tell the kernel that it must not wait for us to free
    /// memory; where that is not permitted, the log says so.
    pub is_pinned: bool,
    /// For fault points.
    pub seed: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self { io: Choice::Auto, pool: PoolSize::default(), is_pinned: true, seed: 0 }
    }
}

/// The other end of a plane.
pub struct Handle<M> {
    commands: SyncSender<Command<M>>,
    bell: Fd,
}

impl<M> Clone for Handle<M> {
    fn clone(&self) -> Self {
        Self { commands: self.commands.clone(), bell: Arc::clone(&self.bell) }
    }
}

/// The plane is gone, or has more commands than it can take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// Its thread has ended.
    #[error("the resource is shut down")]
    Gone,
    /// Try again later.
    #[error("the resource has too many commands waiting")]
    Busy,
}

impl<M> Handle<M> {
    /// Sends a command, without waiting.
    ///
    /// # Errors
    /// It cannot be taken.
    pub fn send(&self, command: Command<M>) -> Result<(), SendError> {
        self.commands.try_send(command).map_err(|error| match error {
            TrySendError::Full(_) => SendError::Busy,
            TrySendError::Disconnected(_) => SendError::Gone,
        })?;
        ring_bell(&self.bell);
        Ok(())
    }
}

/// Starts the thread of a resource. The machine is made there, since it need not be able to move.
///
/// # Errors
/// No memory, no descriptors, no thread, or a ring was demanded and is not possible.
pub fn spawn<M: Machine + 'static>(
    name: &str,
    config: Config,
    make: impl FnOnce() -> M + Send + 'static,
    sink: Sink,
) -> io::Result<(Handle<M>, JoinHandle<()>)> {
    let (commands, queue) = sync_channel(COMMANDS_MAX);
    let bell = Fd::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    let handle = Handle { commands, bell: Arc::clone(&bell) };
    let (ready, started) = sync_channel(1);
    let builder = std::thread::Builder::new().name(format!("drbdrs-{name}"));
    let thread = builder.spawn(move || {
        let mut plane = match Plane::new(config, make, queue, bell, sink) {
            Ok(plane) => plane,
            Err(error) => {
                let _ = ready.send(Err(error));
                return;
            }
        };
        let _ = ready.send(Ok(()));
        let result = plane.run();
        let text = result.err().map(|error| error.to_string());
        if let Some(text) = &text {
            tracing::error!("the data plane cannot go on: {text}");
        }
        (plane.sink)(Notice::Stopped(text));
    })?;
    started.recv().map_err(|_| io::Error::other("the thread has panicked"))??;
    Ok((handle, thread))
}

/// Everything of one resource.
struct Plane<M> {
    machine: M,
    parts: Parts,
    queue: Receiver<Command<M>>,
    bell: Fd,
    sink: Sink,
    actions: Actions,
    spare: Vec<Event>,
    spin: Spin,
    /// When the machine wants its timer.
    due: Option<Tick>,
    is_stopping: bool,
    has_changed: bool,
}

/// What [`Env`] borrows from, and what works with it.
struct Parts {
    io: Box<dyn Backend>,
    pool: Pool,
    faults: Faults,
    zeroes: BufId,
    digests: [Option<Algorithm>; 2],
    events: Vec<Event>,
    start: Instant,
    /// When this round of events began.
    now: Tick,
    disks: BTreeMap<u16, Disk>,
    link: Link,
    nbd: Nbd,
    ublk: Ublk,
    statuses: Statuses,
}

/// Splits [`Parts`] into the environment and one of those who work in it.
macro_rules! with {
    ($parts:expr, |$env:ident, $($field:ident),+| $body:expr) => {{
        let now = $parts.now;
        let Parts { io, pool, faults, zeroes, digests, events, $($field),+, .. } = &mut $parts;
        #[allow(unused_mut, reason = "not every user needs it")]
        let mut $env = Env {
            io: &mut **io,
            pool,
            faults,
            zeroes: *zeroes,
            digests: *digests,
            now,
            events,
        };
        $body
    }};
}

impl Parts {
    fn look_at_clock(&mut self) {
        self.now = Tick(u64::try_from(self.start.elapsed().as_micros()).unwrap_or(u64::MAX));
    }
}

impl<M: Machine> Plane<M> {
    fn new(
        config: Config,
        make: impl FnOnce() -> M,
        queue: Receiver<Command<M>>,
        bell: Fd,
        sink: Sink,
    ) -> io::Result<Self> {
        let mut pool = Pool::new(usable(config.pool))?;
        if config.is_pinned {
            pin(&pool);
        }
        let zeroes = pool.alloc(Zone::Disk, ZEROES_LEN).ok_or(io::ErrorKind::OutOfMemory)?;
        let mut io = backend(config.io)?;
        listen(&mut *io, &bell);
        let parts = Parts {
            io,
            pool,
            faults: Faults::new(config.seed),
            zeroes,
            digests: [None, None],
            events: Vec::new(),
            start: Instant::now(),
            now: Tick(0),
            disks: BTreeMap::new(),
            link: Link::new(),
            nbd: Nbd::new(),
            ublk: Ublk::new(),
            statuses: Statuses::default(),
        };
        Ok(Self {
            machine: make(),
            parts,
            queue,
            bell,
            sink,
            actions: Vec::new(),
            spare: Vec::new(),
            spin: Spin::new(),
            due: None,
            is_stopping: false,
            has_changed: false,
        })
    }

    fn run(&mut self) -> io::Result<()> {
        let mut done = Vec::new();
        while !self.is_stopping {
            self.settle();
            self.wait(&mut done)?;
            self.parts.look_at_clock();
            for done in done.drain(..) {
                self.dispatch(done);
            }
        }
        Ok(())
    }

    fn wait(&mut self, done: &mut Vec<Done>) -> io::Result<()> {
        let limit = self.limit();
        if !self.is_exchanging() {
            return self.parts.io.wait(limit, done);
        }
        let begin = Instant::now();
        if let Some(looking) = self.spin.begin() {
            let most = limit.map_or(spin::LIMIT, |limit| limit.min(spin::LIMIT));
            self.spin.tried(self.parts.io.look_out(most)?);
            drop(looking);
            return self.parts.io.wait(limit, done);
        }
        self.parts.io.wait(limit, done)?;
        self.spin.slept(begin.elapsed());
        Ok(())
    }

    /// Does a client wait for nothing but the peer, or the peer perhaps for its application?
    fn is_exchanging(&mut self) -> bool {
        let Parts { disks, link, nbd, ublk, .. } = &mut self.parts;
        let answers = link.take_answers();
        let requests = nbd.open_requests() + ublk.open_pieces();
        let is_asking = requests == 1 && link.is_established();
        let is_answering = requests == 0 && (1..=ANSWERS_MAX).contains(&answers);
        (is_asking || is_answering) && disks.values().all(|disk| disk.in_flight() == 0)
    }

    /// Does everything that can be done without waiting.
    fn settle(&mut self) {
        with!(self.parts, |env, link| link.tick(&mut env));
        if self.due.is_some_and(|at| at <= self.parts.now) {
            self.tell(Event::Timer);
        }
        let mut rounds = 0;
        loop {
            self.deliver();
            let packet = with!(self.parts, |env, link| link.poll(&mut env));
            if let Some(packet) = packet {
                self.tell(packet);
                continue;
            }
            let mut is_busy =
                with!(self.parts, |env, nbd, ublk| nbd.poll(&mut env) | ublk.poll(&mut env));
            self.answer_queries();
            self.resume_disks();
            with!(self.parts, |env, link| link.flush_data(&mut env));
            let has_moved = with!(self.parts, |env, nbd| nbd.flush(&mut env));
            is_busy |= has_moved && (self.parts.nbd.is_waiting() || self.parts.ublk.is_waiting());
            if rounds < ROUNDS_MAX {
                rounds += u32::from(self.run_disks());
            }
            if is_busy || !self.parts.events.is_empty() {
                continue;
            }
            with!(self.parts, |env, link| link.flush(&mut env));
            if self.parts.events.is_empty() && !self.is_memory_back() {
                break;
            }
        }
        while let Some(volume) = self.parts.nbd.take_lost() {
            (self.sink)(Notice::KernelLost(volume));
        }
        if std::mem::take(&mut self.has_changed) {
            (self.sink)(Notice::Changed);
        }
    }

    /// Hands all events to the engine, in their order.
    fn deliver(&mut self) {
        while !self.parts.events.is_empty() {
            // Two lists in turn: what these events cause is told after them.
            let mut events = std::mem::take(&mut self.spare);
            std::mem::swap(&mut events, &mut self.parts.events);
            for event in events.drain(..) {
                self.tell(event);
            }
            self.spare = events;
        }
    }

    fn tell(&mut self, event: Event) {
        if let Event::OpenCount { volume, users } = event {
            (self.sink)(Notice::Users(volume, users));
        }
        tracing::trace!(?event);
        let mut actions = std::mem::take(&mut self.actions);
        self.machine.handle(self.parts.now, event, &mut actions);
        for action in actions.drain(..) {
            tracing::trace!(?action);
            self.act(action);
        }
        self.actions = actions;
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Disk { io, volume, op } => with!(self.parts, |env, disks| {
                disk(disks, volume).data(&mut env, io, op);
            }),
            Action::Meta { io, volume, op } => with!(self.parts, |env, disks| {
                disk(disks, volume).meta(&mut env, io, op);
            }),
            Action::Link(action) => with!(self.parts, |env, link| link.act(&mut env, action)),
            Action::Send { stream, volume, packet, payload, token } => {
                with!(self.parts, |env, link| {
                    link.send(&mut env, stream, volume, packet, payload, token);
                });
            }
            Action::Receive(wanted) => self.parts.link.receive(wanted),
            Action::ExpectDigest(algorithm) => self.parts.link.expect_digest(algorithm),
            Action::AttachDigest(algorithm) => self.parts.link.attach_digest(algorithm),
            Action::DigestAlgorithms { csums, verify } => self.parts.digests = [csums, verify],
            Action::CompleteApp { id, result, data } => with!(self.parts, |env, nbd, ublk| {
                if Ublk::owns(id) {
                    ublk.complete(&mut env, id, result, data);
                } else {
                    nbd.complete(&mut env, id, result, data);
                }
            }),
            Action::FreeBuf(buf) => self.parts.pool.release(buf),
            Action::Call { call, handler, minor } => {
                (self.sink)(Notice::Call(call, handler, minor));
            }
            Action::Reply { ticket, reply } => (self.sink)(Notice::Reply(ticket, reply)),
            Action::Log(line) => {
                log(&line);
                (self.sink)(Notice::Log(line));
            }
            Action::Device { volume, offer } => {
                self.parts.nbd.offer(volume, offer);
                self.parts.ublk.offer(volume, offer);
                (self.sink)(Notice::Device(volume, offer));
            }
            Action::Changed => self.has_changed = true,
        }
    }

    fn dispatch(&mut self, done: Done) {
        let Done { tag, op, result } = done;
        match tag.part {
            Part::Disk(volume) => {
                with!(self.parts, |env, disks| {
                    disk(disks, VolumeNr(volume)).done(&mut env, tag.key, op, result);
                });
                self.notice_failed_open(volume);
            }
            Part::Link => with!(self.parts, |env, link| link.done(&mut env, tag.key, op, result)),
            Part::Nbd => with!(self.parts, |env, nbd| nbd.done(&mut env, tag.key, op, result)),
            Part::Ublk => with!(self.parts, |env, ublk| ublk.done(&mut env, tag.key, result)),
            Part::Status => {
                let answer = self.parts.statuses.done(tag.key);
                self.answer(answer);
            }
            Part::Control => {
                self.obey();
                listen(&mut *self.parts.io, &self.bell);
            }
        }
    }

    fn notice_failed_open(&mut self, volume: u16) {
        let disk = self.parts.disks.get_mut(&volume);
        if let Some(error) = disk.and_then(Disk::take_open_error) {
            (self.sink)(Notice::OpenFailed(VolumeNr(volume), error));
        }
    }

    /// Carries out the commands that wait.
    fn obey(&mut self) {
        let mut count = [0; 8];
        // Nothing in it is fine: the commands count.
        let _ = rustix::io::read(&self.bell, &mut count);
        for _ in 0..COMMANDS_MAX {
            let command = match self.queue.try_recv() {
                Ok(command) => command,
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => Command::Stop,
            };
            match command {
                Command::Event(event) => self.parts.events.push(event),
                Command::Disk(volume, paths) => {
                    disk(&mut self.parts.disks, volume).configure(paths);
                }
                Command::Addresses(addresses) => self.parts.link.configure(addresses),
                Command::Faults(rules) => {
                    self.parts.faults.set(rules);
                    with!(self.parts, |env, disks| {
                        disks.values_mut().for_each(|disk| disk.faults_changed(&mut env));
                    });
                }
                Command::StreamFaults(rules) => self.parts.link.set_faults(rules),
                Command::Cut(stream) => self.parts.link.cut(stream),
                Command::Client(session) => {
                    with!(self.parts, |env, nbd| nbd.attach(&mut env, session));
                }
                Command::Serve(queue) => {
                    with!(self.parts, |env, ublk| ublk.attach(&mut env, queue));
                }
                Command::DetachClients(volume) => {
                    with!(self.parts, |env, nbd| nbd.detach(&mut env, volume));
                }
                Command::Inspect(look) => look(&self.machine),
                Command::Stop => {
                    self.is_stopping = true;
                    return;
                }
            }
        }
        // More than the queue can hold at once: the rest comes with the next round.
        ring_bell(&self.bell);
    }

    /// Has the link or a disk been refused memory that it would get now?
    fn is_memory_back(&mut self) -> bool {
        let pool = &mut self.parts.pool;
        // Of the others it is asked when the disks go on.
        pool.take_wake(Zone::Net) || pool.is_woken(Zone::Disk) || pool.is_woken(Zone::Meta)
    }

    /// Lets disks in memory work. False: there was nothing to do.
    fn run_disks(&mut self) -> bool {
        let is_ready = self.parts.disks.values().any(Disk::is_ready);
        if is_ready {
            with!(self.parts, |env, disks| {
                disks.values_mut().for_each(|disk| disk.run(&mut env));
            });
        }
        is_ready
    }

    fn resume_disks(&mut self) {
        let now = self.parts.now;
        let pool = &mut self.parts.pool;
        let is_awake = pool.take_wake(Zone::Disk) | pool.take_wake(Zone::Meta);
        let is_due = |disk: &Disk| disk.next_deadline().is_some_and(|at| at <= now);
        if is_awake || self.parts.disks.values().any(is_due) {
            with!(self.parts, |env, disks| {
                disks.values_mut().for_each(|disk| disk.resume(&mut env));
            });
        }
    }

    /// Questions of NBD clients about the state of blocks.
    fn answer_queries(&mut self) {
        while let Some(query) = self.parts.nbd.take_query() {
            let Parts { statuses, disks, io, .. } = &mut self.parts;
            let devices = disks.get(&query.volume.0).and_then(Disk::devices);
            let machine = &self.machine;
            let answer = statuses.ask(machine, devices, &mut **io, query);
            self.answer(answer);
        }
    }

    fn answer(&mut self, answer: Option<super::status::Answer>) {
        if let Some(answer) = answer {
            let (allocation, sync) = (answer.allocation.as_deref(), answer.out_of_sync.as_deref());
            with!(self.parts, |env, nbd| {
                nbd.answer_status(&mut env, answer.key, allocation, sync);
            });
        }
    }

    /// How long nothing happens by itself.
    fn limit(&mut self) -> Option<Duration> {
        self.due = self.machine.next_deadline();
        if self.is_stopping || self.parts.disks.values().any(Disk::is_ready) {
            return Some(Duration::ZERO);
        }
        let now = self.parts.now;
        let engine = self.due.map(|at| match at.0.checked_sub(now.0) {
            None | Some(0) => LATE,
            Some(micros) => Duration::from_micros(micros),
        });
        let disks = self.parts.disks.values().filter_map(Disk::next_deadline);
        let until = |at: Tick| Duration::from_micros(at.0.saturating_sub(now.0));
        let disks = disks.map(|at| until(at).max(LATE));
        // What is due there is dealt with: nothing stays due.
        disks.chain(self.parts.link.next_deadline().map(until)).chain(engine).min()
    }
}

fn disk(disks: &mut BTreeMap<u16, Disk>, volume: VolumeNr) -> &mut Disk {
    disks.entry(volume.0).or_insert_with(|| Disk::new(volume))
}

/// The largest requests must fit, or they would wait for ever.
fn usable(size: PoolSize) -> PoolSize {
    PoolSize {
        front: size.front.max(2 * CLIENT_BYTES_MAX),
        disk: size.disk.max(4 << 20),
        net: size.net.max(4 << 20),
        meta: size.meta.max(1 << 20),
        clients: size.clients.max(8 << 20),
    }
}

/// Waits for commands.
fn listen(io: &mut dyn Backend, bell: &Fd) {
    io.submit(Tag { part: Part::Control, key: 0 }, Op::Readable { file: Arc::clone(bell) });
}

/// A process that serves a disk must not wait for that disk to get memory.
fn pin(pool: &Pool) {
    static SAID: std::sync::Once = std::sync::Once::new();
    let locked = pool.lock_memory();
    let flusher = rustix::process::configure_io_flusher_behavior(true);
    if locked.is_err() || flusher.is_err() {
        SAID.call_once(|| {
            let hint = "a swap or file system on this node's own device could come to a stop";
            if let Err(error) = locked {
                tracing::warn!("memory is not locked ({error}): {hint}");
            }
            if let Err(errno) = flusher {
                tracing::warn!("not marked as an I/O flusher ({errno}): {hint}");
            }
        });
    }
}

fn log(line: &LogLine) {
    use drbd_core::log_line::Severity;
    let text = &line.text;
    let volume = line.volume.map(|volume| volume.0);
    match line.severity {
        Severity::Alert | Severity::Error => tracing::error!(volume, "{text}"),
        Severity::Warn => tracing::warn!(volume, "{text}"),
        Severity::Info => tracing::info!(volume, "{text}"),
    }
}
