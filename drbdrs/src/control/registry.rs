//! What control knows of the resources of this node, and the one place where everything that their
//! threads tell arrives.
//!
//! ```text
//!   plane threads -- Told --> pump: records, dependencies -> status file -> watchers -> replies
//!   commands -- ask --> plane threads
//! ```
//!
//! Everything here runs on one thread; nothing borrows a record across an `await`.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use drbd_admin::{
    Address, Answer, Backing, Daemon, OptionSet, Reply, Resource, Snapshot, Target, Update,
};
use drbd_conf::settings::{FrontEnd, Settings};
use drbd_core::admin::Command;
use drbd_core::engine::status::{Status, VolumeStatus};
use drbd_core::event::Event;
use drbd_core::ids::Ticket;
use drbd_core::resync::dependency::{Row, Table};
use drbd_types::{Cstate, Dstate, Failure, Minor, VolumeNr};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tokio::sync::{Notify, broadcast, oneshot};

use super::machine::{Id, Line, Machine, Told};
use super::past::Past;
use super::{devices, exports, faults, handlers, snapshot, takeover, why};
use crate::front::kernel::Driver;
use crate::front::nbd::door;
use crate::plane::run::{self, Handle, Notice, SendError};
use crate::status::file::StatusFile;

/// Lines that a slow watcher may be behind.
const WATCH_MAX: usize = 1024;
/// Pause before a full queue of commands is tried again.
const BUSY_PAUSE: Duration = Duration::from_millis(10);
/// Longest time that a thread may take to tell its state.
const FRESH_MAX: Duration = Duration::from_secs(1);
/// How often counters and progress are looked at while they move.
pub(super) const REFRESH: Duration = Duration::from_millis(500);
/// Progress is announced at most this often.
const PROGRESS: Duration = Duration::from_secs(2);

/// A network configuration.
pub(super) struct Network {
    pub(super) local: Address,
    pub(super) peer: Address,
    pub(super) peer_socket: SocketAddr,
    /// What is not default.
    pub(super) options: OptionSet,
    /// The command that brings it has no answer yet.
    pub(super) is_pending: bool,
}

/// A volume.
#[derive(Default)]
pub(super) struct VolumeRecord {
    pub(super) minor: u32,
    /// The disk, as it was attached.
    pub(super) backing: Option<Backing>,
    /// Why the disk could not be opened, for the reply to the attach.
    pub(super) open_error: Option<String>,
    /// URIs of its export.
    pub(super) exports: Vec<String>,
    /// Its block device, and links to that.
    pub(super) nodes: Vec<String>,
    pub(super) slot: Rc<devices::Slot>,
    /// A client made it Primary; the end of the last one makes it Secondary.
    pub(super) is_promoted_by_client: bool,
    /// What was said about its progress last.
    pub(super) progress: Option<(Instant, u32)>,
}

/// A log line that somebody should know of.
#[derive(Clone)]
pub(super) struct Problem {
    pub(super) at: Instant,
    pub(super) text: String,
}

/// A resource.
pub(super) struct Record {
    pub(super) id: Id,
    pub(super) name: String,
    /// Section `options`, what is not default.
    pub(super) options: OptionSet,
    pub(super) network: Option<Network>,
    pub(super) volumes: BTreeMap<u16, VolumeRecord>,
    /// The last that was heard.
    pub(super) status: Status,
    pub(super) problem: Option<Problem>,
    /// When an administrator ended the connection.
    pub(super) disconnected: Option<Instant>,
    pub(super) past: Past,
    /// Handlers that run: name and since when.
    pub(super) handlers: BTreeMap<u32, (String, Instant)>,
    /// One command after the other.
    pub(super) order: Arc<tokio::sync::Mutex<()>>,
    handle: Handle<Machine>,
    line: Line,
    thread: Option<JoinHandle<()>>,
    waiting: BTreeMap<u32, Waiting>,
    /// The thread ended without having been asked to.
    pub(super) is_broken: bool,
}

/// What becomes of a record with the answer to a command, in order with states.
pub(super) type Commit = Box<dyn FnOnce(&mut Record, &Reply)>;

struct Waiting {
    commit: Option<Commit>,
    to: oneshot::Sender<Reply>,
}

impl Record {
    /// A volume's last state.
    pub(super) fn status_of(&self, nr: VolumeNr) -> Option<&VolumeStatus> {
        self.status.volumes.iter().find(|v| v.nr == nr)
    }

    /// The volume with this minor.
    pub(super) fn volume_of(&self, minor: u32) -> Option<VolumeNr> {
        let found = self.volumes.iter().find(|(_, v)| v.minor == minor);
        found.map(|(nr, _)| VolumeNr(*nr))
    }

    /// Takes over a state. Returns whether counters differ from before.
    fn learn(&mut self, status: Status) -> bool {
        let numbers = |s: &Status| -> Vec<[u64; 8]> {
            let of = |v: &VolumeStatus| {
                let pending = v.local_pending + v.peer_pending + v.owed + v.app_pending;
                let bits = v.out_of_sync_bits;
                [v.sent, v.received, v.written, v.read, v.al_writes, pending, bits, v.position]
            };
            s.volumes.iter().map(of).collect()
        };
        let moves = numbers(&self.status) != numbers(&status);
        self.past.learn(&status, now_us());
        self.status = status;
        if !self.status.has_net && self.network.as_ref().is_some_and(|n| !n.is_pending) {
            self.network = None;
        }
        if self.status.conn >= Cstate::WFReportParams && why::has_met(&self.status) {
            self.problem = None;
        }
        for volume in &self.status.volumes {
            if let Some(known) = self.volumes.get_mut(&volume.nr.0)
                && volume.state.disk == Dstate::Diskless
            {
                known.backing = None;
            }
        }
        moves
    }

    /// Something moves by itself: progress has to be looked at.
    fn is_running(&self) -> bool {
        self.status.volumes.iter().any(|v| v.state.conn.is_sync() || v.state.conn.is_verify())
    }

    /// The way to the thread.
    pub(super) fn handle(&self) -> Handle<Machine> {
        self.handle.clone()
    }

    /// Sends something to the thread; a command that finds the queue full is lost.
    pub(super) fn send(&self, command: run::Command<Machine>) -> Result<(), SendError> {
        self.handle.send(command)
    }
}

/// One announcement.
#[derive(Clone, Debug)]
pub(super) struct Item {
    /// About which resource.
    pub(super) resource: String,
    /// What watchers get.
    pub(super) answer: Answer,
}

/// The node.
pub(super) struct Node {
    pub(super) settings: Settings,
    /// What this node's clients are told of how to reach its exports.
    pub(super) exports: exports::Exports,
    pub(super) door: door::Registry,
    /// Drivers of block devices, the best one first.
    pub(super) drivers: Vec<(FrontEnd, Arc<dyn Driver>)>,
    /// Wishes of clients to make a volume Primary.
    pub(super) wishes: UnboundedSender<exports::Wish>,
    pub(super) faults: RefCell<faults::List>,
    /// What is left to the next daemon.
    pub(super) will: takeover::Will,
    /// The program for handlers, and the socket that its commands are to use.
    pub(super) helper: handlers::Program,
    records: RefCell<Vec<Record>>,
    next_id: Cell<u32>,
    next_ticket: Cell<u32>,
    to: UnboundedSender<(Id, Told)>,
    watchers: broadcast::Sender<Arc<Item>>,
    file: Option<StatusFile>,
    /// Counters move: somebody has to look.
    is_moving: Notify,
}

/// Microseconds since 1970.
pub(super) fn now_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

fn initial() -> Status {
    Status {
        conn: Cstate::StandAlone,
        version: None,
        epochs: 1,
        ordering: 'f',
        has_net: false,
        is_congested: false,
        app_in_flight: 0,
        waits_for_peer: false,
        volumes: Vec::new(),
    }
}

/// The thread of the resource is gone.
pub(super) fn gone() -> Reply {
    Reply::failed(Failure::Interrupted, "the resource is being shut down")
}

impl Node {
    pub(super) fn new(
        settings: Settings,
        helper: handlers::Program,
        file: Option<StatusFile>,
        wishes: UnboundedSender<exports::Wish>,
    ) -> (Rc<Self>, UnboundedReceiver<(Id, Told)>) {
        let (to, told) = tokio::sync::mpsc::unbounded_channel();
        let exports = exports::Exports::of(&settings);
        let drivers = devices::drivers(&settings);
        let will = takeover::Will::beside(&settings.node.admin_socket);
        let node = Self {
            settings,
            exports,
            door: door::Registry::default(),
            drivers,
            wishes,
            faults: RefCell::default(),
            will,
            helper,
            records: RefCell::default(),
            next_id: Cell::new(1),
            next_ticket: Cell::new(1),
            to,
            watchers: broadcast::channel(WATCH_MAX).0,
            file,
            is_moving: Notify::new(),
        };
        (Rc::new(node), told)
    }

    // ---- records ----

    /// Does something with all records.
    pub(super) fn with_all<R>(&self, act: impl FnOnce(&mut Vec<Record>) -> R) -> R {
        act(&mut self.records.borrow_mut())
    }

    /// Does something with one; `None`: it is gone.
    pub(super) fn with<R>(&self, id: Id, act: impl FnOnce(&mut Record) -> R) -> Option<R> {
        self.records.borrow_mut().iter_mut().find(|r| r.id == id).map(act)
    }

    /// The resource of this name.
    pub(super) fn id_of(&self, name: &str) -> Option<Id> {
        self.records.borrow().iter().find(|r| r.name == name).map(|r| r.id)
    }

    /// The volume with this minor number.
    pub(super) fn volume_of(&self, minor: u32) -> Option<(Id, VolumeNr)> {
        self.records.borrow().iter().find_map(|r| Some((r.id, r.volume_of(minor)?)))
    }

    /// Starts the thread of a new resource.
    ///
    /// # Errors
    /// No memory or no threads.
    pub(super) fn add(&self, name: String, options: OptionSet) -> std::io::Result<Id> {
        let id = self.next_id.get();
        self.next_id.set(id.wrapping_add(1));
        let line = Line {
            id,
            to: self.to.clone(),
            lines: Arc::default(),
            is_armed: Arc::new(true.into()),
        };
        let mut seeds = [0; 16];
        rustix::rand::getrandom(&mut seeds, rustix::rand::GetRandomFlags::empty())?;
        let (first, second) = seeds.split_at(8);
        let word = |bytes: &[u8]| bytes.iter().fold(0, |sum, b| (sum << 8) | u64::from(*b));
        let (engine_seed, seed) = (word(first), word(second));
        let io = match self.settings.io.backend {
            drbd_conf::settings::IoBackend::Auto => crate::plane::io::Choice::Auto,
            drbd_conf::settings::IoBackend::IoUring => crate::plane::io::Choice::Ring,
            drbd_conf::settings::IoBackend::Threads => crate::plane::io::Choice::Threads,
        };
        let config = run::Config { io, seed, ..run::Config::default() };
        let (machine_name, machine_line) = (name.clone(), line.clone());
        let make = move || Machine::new(machine_name, engine_seed, machine_line);
        let sink_line = line.clone();
        let sink = Box::new(move |notice| sink_line.notice(notice));
        let (handle, thread) = run::spawn(&name, config, make, sink)?;
        let record = Record {
            id,
            name,
            options,
            network: None,
            volumes: BTreeMap::new(),
            status: initial(),
            problem: None,
            disconnected: None,
            past: Past::new(now_us()),
            handlers: BTreeMap::new(),
            order: Arc::default(),
            handle,
            line,
            thread: Some(thread),
            waiting: BTreeMap::new(),
            is_broken: false,
        };
        self.records.borrow_mut().push(record);
        Ok(id)
    }

    /// Ends the thread of a resource and forgets it.
    pub(super) async fn remove(&self, id: Id) {
        let record = self.with_all(|all| {
            let at = all.iter().position(|r| r.id == id)?;
            Some(all.remove(at))
        });
        let Some(mut record) = record else { return };
        for nr in record.volumes.keys() {
            self.door.remove(&exports::name(&record.name, *nr));
        }
        while record.send(run::Command::Stop) == Err(SendError::Busy) {
            tokio::time::sleep(BUSY_PAUSE).await;
        }
        if let Some(thread) = record.thread.take() {
            let _ = tokio::task::spawn_blocking(move || thread.join()).await;
        }
        self.faults.borrow_mut().forget(&record.name);
        self.write_file();
        self.announce(&record.name, None);
    }

    // ---- commands to a resource ----

    /// Sends something to a thread, waiting for room.
    pub(super) async fn tell(
        &self,
        id: Id,
        make: impl Fn() -> run::Command<Machine>,
    ) -> Result<(), Reply> {
        loop {
            match self.with(id, |r| r.send(make())) {
                Some(Ok(())) => return Ok(()),
                Some(Err(SendError::Busy)) => tokio::time::sleep(BUSY_PAUSE).await,
                Some(Err(SendError::Gone)) | None => return Err(gone()),
            }
        }
    }

    /// A command for the engine, and its answer.
    pub(super) async fn ask(&self, id: Id, command: Command) -> Reply {
        self.ask_then(id, command, None).await
    }

    /// The same; `commit` is done with the answer, before anything that happens later.
    pub(super) async fn ask_then(&self, id: Id, command: Command, commit: Option<Commit>) -> Reply {
        let ticket = self.next_ticket.get();
        self.next_ticket.set(ticket.wrapping_add(1));
        let (to, answer) = oneshot::channel();
        let waiting = Waiting { commit, to };
        if self.with(id, |r| r.waiting.insert(ticket, waiting)).is_none() {
            return gone();
        }
        let event = || {
            let command = command.clone();
            run::Command::Event(Event::Admin { ticket: Ticket(ticket), command })
        };
        if let Err(reply) = self.tell(id, event).await {
            if let Some(Some(Waiting { commit: Some(commit), .. })) =
                self.with(id, |r| r.waiting.remove(&ticket))
            {
                self.with(id, |r| commit(r, &reply));
            }
            return reply;
        }
        answer.await.unwrap_or_else(|_| gone())
    }

    // ---- what threads tell ----

    /// Takes in what is told, for ever.
    pub(super) async fn pump(self: Rc<Self>, mut told: UnboundedReceiver<(Id, Told)>) {
        let mut batch = Vec::new();
        while told.recv_many(&mut batch, 256).await > 0 {
            let mut later: Vec<Box<dyn FnOnce()>> = Vec::new();
            let mut items = Vec::new();
            let mut is_changed = false;
            for (id, told) in batch.drain(..) {
                is_changed |= matches!(told, Told::Status(_) | Told::Fresh(..));
                self.take_in(id, told, &mut items, &mut later);
            }
            if is_changed {
                self.settle_dependencies();
                // Whoever is told of a change finds it in the file already.
                self.write_file();
            }
            for item in items {
                let _ = self.watchers.send(Arc::new(item));
            }
            for act in later {
                act();
            }
        }
    }

    fn take_in(
        self: &Rc<Self>,
        id: Id,
        told: Told,
        items: &mut Vec<Item>,
        later: &mut Vec<Box<dyn FnOnce()>>,
    ) {
        match told {
            Told::Status(status) => {
                let is_watched = self.watchers.receiver_count() > 0;
                let update = self.with(id, |record| {
                    record.learn(*status);
                    if record.is_running() {
                        self.is_moving.notify_one();
                    }
                    is_watched.then(|| update_of(record))
                });
                items.extend(update.flatten());
            }
            Told::Fresh(status, done) => {
                let moves = self.with(id, |record| {
                    let moves = record.learn(*status);
                    items.extend(progress_of(record));
                    moves || record.is_running()
                });
                if moves == Some(true) {
                    self.is_moving.notify_one();
                }
                let _ = done.send(());
            }
            Told::Active => self.is_moving.notify_one(),
            Told::Notice(notice) => self.notice(id, notice, items, later),
        }
    }

    fn notice(
        self: &Rc<Self>,
        id: Id,
        notice: Notice,
        items: &mut Vec<Item>,
        later: &mut Vec<Box<dyn FnOnce()>>,
    ) {
        match notice {
            Notice::Reply(ticket, reply) => {
                let info = reply.info.map(|text| text.lines().map(str::to_owned).collect());
                let reply =
                    Reply { code: reply.code, info: info.unwrap_or_default(), object: None };
                let to = self.with(id, |record| {
                    let waiting = record.waiting.remove(&ticket.0)?;
                    if let Some(commit) = waiting.commit {
                        commit(record, &reply);
                        items.push(update_of(record));
                    }
                    Some(waiting.to)
                });
                if let Some(to) = to.flatten() {
                    later.push(Box::new(move || drop(to.send(reply))));
                }
            }
            Notice::Call(call, handler, minor) => {
                let node = Rc::clone(self);
                later.push(Box::new(move || handlers::start(&node, id, call, handler, minor)));
            }
            Notice::Log(line) => {
                self.with(id, |record| {
                    record.line.lines.fetch_sub(1, Ordering::Relaxed);
                    record.problem = Some(Problem { at: Instant::now(), text: line.text });
                });
            }
            Notice::Device(volume, offer) => {
                exports::offer(self, id, volume, offer);
                devices::offer(self, id, volume, offer);
            }
            Notice::KernelLost(volume) => devices::mend(self, id, volume),
            Notice::Users(volume, users) => exports::users(self, id, volume, users),
            Notice::OpenFailed(volume, error) => {
                self.with(id, |record| {
                    if let Some(known) = record.volumes.get_mut(&volume.0) {
                        known.open_error = Some(error.text);
                    }
                });
            }
            Notice::Changed => {}
            Notice::Stopped(None) => {}
            Notice::Stopped(Some(text)) => {
                self.with(id, |record| {
                    record.is_broken = true;
                    record.problem = Some(Problem { at: Instant::now(), text });
                    // Nobody answers them any more.
                    record.waiting.clear();
                });
            }
        }
    }

    /// `resync-after` over all resources. Spec: states-and-generations.md §11.4.
    fn settle_dependencies(&self) {
        let records = self.records.borrow();
        let mut table = Table(BTreeMap::new());
        let mut owners = BTreeMap::new();
        for record in records.iter() {
            for volume in &record.status.volumes {
                table.0.insert(volume.minor, row(volume));
                owners.insert(volume.minor, (record, volume.nr));
            }
        }
        if table.0.values().all(|row| row.resync_after.is_none() && !row.aftr_isp) {
            return;
        }
        for turn in table.settle() {
            let Some((record, volume)) = owners.get(&turn.minor) else { continue };
            let event = Event::Dependency { volume: *volume, must_wait: turn.aftr_isp };
            // A full queue is no harm: the state is looked at again with the next change.
            let _ = record.send(run::Command::Event(event));
        }
    }

    /// May a volume wait for another one? As [`Table::check`].
    ///
    /// # Errors
    /// 132, 133.
    pub(super) fn check_resync_after(&self, minor: u32, after: Option<u32>) -> Result<(), Failure> {
        let records = self.records.borrow();
        let volumes = records.iter().flat_map(|r| &r.status.volumes);
        let table = Table(volumes.map(|v| (v.minor, row(v))).collect());
        table.check(Minor(minor), after.map(Minor))
    }

    // ---- views ----

    /// The daemon as views show it.
    fn daemon(&self) -> Daemon {
        Daemon {
            release: env!("CARGO_PKG_VERSION").into(),
            build: format!("drbdrs-{}", env!("CARGO_PKG_VERSION")),
            pid: std::process::id(),
            faults: self.faults.borrow().shown(),
        }
    }

    /// Everything, as it was heard last.
    pub(super) fn snapshot(&self) -> Snapshot {
        let records = self.records.borrow();
        let resources = records.iter().map(snapshot::resource).collect();
        Snapshot { at_us: now_us(), daemon: self.daemon(), resources }
    }

    /// Asks all threads concerned for their present state. One that does not answer in time, which
    /// none should, keeps what was heard last.
    pub(super) async fn refresh(&self, target: &Target) {
        let mut answers = Vec::new();
        for record in self.records.borrow().iter() {
            let is_meant = match target {
                Target::All => true,
                Target::Resource(name) => record.name == *name,
                Target::Minor(minor) => record.volume_of(*minor).is_some(),
            };
            if !is_meant {
                continue;
            }
            let (done, answer) = oneshot::channel();
            let look = run::Command::Inspect(Box::new(move |machine: &Machine| {
                machine.report(done);
            }));
            if record.send(look).is_ok() {
                answers.push(answer);
            }
        }
        let all = async {
            for answer in answers {
                let _ = answer.await;
            }
        };
        let _ = tokio::time::timeout(FRESH_MAX, all).await;
    }

    /// Keeps counters and progress in the status file current while they move; sleeps otherwise.
    pub(super) async fn follow_counters(self: Rc<Self>) {
        loop {
            self.is_moving.notified().await;
            tokio::time::sleep(REFRESH).await;
            // Whoever moves from here on says so.
            self.with_all(|all| {
                all.iter().for_each(|r| r.line.is_armed.store(true, Ordering::Relaxed));
            });
            self.refresh(&Target::All).await;
        }
    }

    /// A receiver of announcements. Subscribe before the snapshot is made.
    pub(super) fn subscribe(&self) -> broadcast::Receiver<Arc<Item>> {
        self.watchers.subscribe()
    }

    /// Tells watchers something.
    pub(super) fn publish(&self, resource: &str, answer: Answer) {
        // Nobody watches: fine.
        let _ = self.watchers.send(Arc::new(Item { resource: resource.into(), answer }));
    }

    /// The record of a resource was changed by a command.
    pub(super) fn changed(&self, id: Id) {
        self.write_file();
        if let Some(item) = self.with(id, |record| update_of(record)) {
            let _ = self.watchers.send(Arc::new(item));
        }
    }

    fn announce(&self, name: &str, resource: Option<Resource>) {
        let update = Update { at_us: now_us(), name: name.into(), resource };
        self.publish(name, Answer::Update(Box::new(update)));
    }

    /// Writes the status file, and what the next daemon needs.
    pub(super) fn write_file(&self) {
        self.will.write(&self.records.borrow());
        if let Some(file) = &self.file {
            file.write(&self.snapshot());
        }
    }

    /// The end: a file that nobody keeps current would lie.
    pub(super) fn remove_file(&self) {
        if let Some(file) = &self.file {
            file.remove();
        }
    }
}

fn row(volume: &VolumeStatus) -> Row {
    Row::new(&volume.state, volume.config.resync_after)
}

fn update_of(record: &Record) -> Item {
    let resource = Some(snapshot::resource(record));
    let update = Update { at_us: now_us(), name: record.name.clone(), resource };
    Item { resource: record.name.clone(), answer: Answer::Update(Box::new(update)) }
}

/// Progress worth an announcement.
fn progress_of(record: &mut Record) -> Vec<Item> {
    let mut items = Vec::new();
    for volume in &record.status.volumes {
        let is_shown = volume.state.conn.is_sync() || volume.state.conn.is_verify();
        let Some(shown) = volume.progress.filter(|_| is_shown) else { continue };
        let Some(known) = record.volumes.get_mut(&volume.nr.0) else { continue };
        let is_due = known
            .progress
            .is_none_or(|(at, permille)| at.elapsed() >= PROGRESS && permille != shown.permille);
        if is_due {
            known.progress = Some((Instant::now(), shown.permille));
            let answer = Answer::Progress { minor: known.minor, permille: shown.permille };
            items.push(Item { resource: record.name.clone(), answer });
        }
    }
    items
}
