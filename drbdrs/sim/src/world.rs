//! Two nodes, time, and what happens between them.

use std::collections::BTreeMap;

use drbd_core::action::{DiskOp, Handler, MetaOp};
use drbd_core::admin::{Command, Reply};
use drbd_core::event::{AppOp, AppRequest, Event, WriteFlags};
use drbd_core::ids::{AppId, CallId, IoId, Ticket};
use drbd_core::link::{HangUp, LinkEvent};
use drbd_types::{Fields, SectorRange, Tick, VolumeNr};

use crate::chance::Chance;
use crate::disk::SimDisk;
use crate::net::{ConnId, Message, Net};
use crate::node::{AppResult, Node, Wish};

/// Something that will happen.
#[derive(Debug)]
enum Happening {
    Timer(usize),
    Disk(usize, IoId, VolumeNr, DiskOp),
    Meta(usize, IoId, VolumeNr, MetaOp),
    Handler(usize, CallId, i32),
    Event(usize, Box<Event>),
    /// A message arrives at this side.
    Arrive(ConnId, usize, Message),
    /// The other side has closed.
    Closed(ConnId, usize),
    /// A connection attempt reaches the other side, or not.
    Connect(usize, u32),
}

/// Two nodes.
pub struct World {
    /// They.
    pub nodes: [Node; 2],
    /// Grows with each crash of a node: what was under way before is void.
    lives: [u32; 2],
    net: Net,
    now: Tick,
    queue: BTreeMap<(u64, u64), (u32, Happening)>,
    next: u64,
    timers: [Option<Tick>; 2],
    /// Chance of the world.
    pub chance: Chance,
    next_id: u64,
    next_ticket: u32,
    /// Largest delay of a message, microseconds.
    pub net_delay: u64,
    /// Largest time of a disk operation, microseconds.
    pub disk_delay: u64,
    /// The last arrival per connection and side: messages stay in order.
    last_arrival: BTreeMap<(ConnId, usize), u64>,
    /// Print everything.
    pub is_loud: bool,
}

impl World {
    /// Two nodes with these disks.
    pub fn new(seed: u64, disks: [BTreeMap<u16, SimDisk>; 2]) -> Self {
        let mut chance = Chance::new(seed);
        let [a, b] = disks;
        let nodes = [Node::new(chance.any(), a), Node::new(chance.any(), b)];
        Self {
            nodes,
            lives: [0; 2],
            net: Net::default(),
            now: Tick(0),
            queue: BTreeMap::new(),
            next: 0,
            timers: [None; 2],
            chance,
            next_id: 0,
            next_ticket: 0,
            net_delay: 200,
            disk_delay: 500,
            last_arrival: BTreeMap::new(),
            is_loud: std::env::var_os("SIM_TRACE").is_some(),
        }
    }

    /// The time.
    pub const fn now(&self) -> Tick {
        self.now
    }

    /// The state of a volume.
    pub fn state(&self, node: usize, volume: u16) -> Fields {
        let status = self.nodes[node].engine.status();
        status.volumes.iter().find(|v| v.nr.0 == volume).map_or(Fields::NEW, |v| v.state)
    }

    fn at(&mut self, delay: u64, life: u32, happening: Happening) {
        self.next += 1;
        self.queue.insert((self.now.0 + delay, self.next), (life, happening));
    }

    /// Feeds an event to a node, and queues what it wants.
    pub fn feed(&mut self, node: usize, event: Event) {
        if self.is_loud {
            println!("{:>10} {node} < {event:?}", self.now.0);
        }
        let lines = self.nodes[node].log.len();
        let wishes = self.nodes[node].feed(self.now, event);
        if self.is_loud {
            for line in &self.nodes[node].log[lines..] {
                println!("{:>10} {node}   {}", self.now.0, line.text);
            }
        }
        for wish in wishes {
            self.grant(node, wish);
        }
        self.pump(node);
        self.arm(node);
    }

    fn arm(&mut self, node: usize) {
        let deadline = self.nodes[node].engine.next_deadline();
        if let Some(at) = deadline
            && self.timers[node].is_none_or(|armed| at < armed || armed <= self.now)
        {
            self.timers[node] = Some(at);
            let delay = at.0.saturating_sub(self.now.0);
            let life = self.lives[node];
            self.at(delay, life, Happening::Timer(node));
        }
    }

    fn grant(&mut self, node: usize, wish: Wish) {
        if self.is_loud {
            println!("{:>10} {node} > {wish:?}", self.now.0);
        }
        let life = self.lives[node];
        match wish {
            Wish::Disk(io, volume, op) => {
                let delay = 1 + self.chance.below(self.disk_delay);
                self.at(delay, life, Happening::Disk(node, io, volume, op));
            }
            Wish::Meta(io, volume, op) => {
                let delay = 1 + self.chance.below(self.disk_delay);
                self.at(delay, life, Happening::Meta(node, io, volume, op));
            }
            Wish::Listen(is_listening) => self.net.listening[node] = is_listening,
            Wish::Connect(attempt) => {
                let delay = 1 + self.chance.below(self.net_delay);
                self.at(delay, life, Happening::Connect(node, attempt));
            }
            Wish::Send(conn, message) => self.post(conn, node, message),
            Wish::Close(conn) => self.close(conn, node),
            Wish::Handler(call, handler) => {
                let name = handler_name(handler);
                let exit = self.nodes[node].handler_exits.get(name).copied().unwrap_or(0);
                let delay = 1 + self.chance.below(2000);
                self.at(delay, life, Happening::Handler(node, call, exit));
            }
            Wish::Event(event) => self.at(0, life, Happening::Event(node, event)),
        }
    }

    /// A message leaves a node.
    fn post(&mut self, conn: ConnId, from: usize, message: Message) {
        if self.net.is_cut {
            return;
        }
        let to = 1 - from;
        let at = self.arrival(conn, to);
        self.at(at, 0, Happening::Arrive(conn, to, message));
    }

    /// When the next thing of a connection arrives: in order.
    fn arrival(&mut self, conn: ConnId, to: usize) -> u64 {
        let wanted = self.now.0 + 1 + self.chance.below(self.net_delay);
        let last = self.last_arrival.entry((conn, to)).or_insert(0);
        *last = wanted.max(*last);
        *last - self.now.0
    }

    fn close(&mut self, conn: ConnId, node: usize) {
        if let Some(end) = self.net.end(conn, node) {
            end.is_gone = true;
            end.arrived.clear();
        }
        if !self.net.is_cut {
            let at = self.arrival(conn, 1 - node);
            self.at(at, 0, Happening::Closed(conn, 1 - node));
        }
        self.net.forget_dead();
    }

    /// Delivers what has arrived, as far as the node wants it.
    fn pump(&mut self, node: usize) {
        let mut next = None;
        for conn in self.net.all() {
            let wants = self.nodes[node].wants(conn);
            let Some(end) = self.net.end(conn, node) else { continue };
            if wants && let Some(message) = end.arrived.pop_front() {
                next = self.nodes[node].received(conn, &message);
                break;
            }
            if end.is_closed && end.arrived.is_empty() && !end.is_gone {
                end.is_closed = false;
                next = self.nodes[node].hung_up(conn, HangUp::ShutDown);
                break;
            }
        }
        // One at a time: its actions come before the next one is decoded.
        if let Some(event) = next {
            self.at(0, self.lives[node], Happening::Event(node, Box::new(event)));
        }
    }

    /// The next thing happens. Returns false if nothing will.
    pub fn step(&mut self) -> bool {
        let Some(((at, _), (life, happening))) = self.queue.pop_first() else { return false };
        self.now = Tick(at.max(self.now.0));
        match happening {
            Happening::Timer(node) if life == self.lives[node] => {
                self.timers[node] = None;
                self.feed(node, Event::Timer);
            }
            Happening::Event(node, event) if life == self.lives[node] => self.feed(node, *event),
            Happening::Disk(node, io, volume, op) if life == self.lives[node] => {
                let result = self.nodes[node].do_disk(volume, &op);
                self.feed(node, Event::Disk { io, result });
            }
            Happening::Meta(node, io, volume, op) if life == self.lives[node] => {
                let result = self.nodes[node].do_meta(volume, &op);
                self.feed(node, Event::Meta { io, result });
            }
            Happening::Handler(node, call, exit) if life == self.lives[node] => {
                self.feed(node, Event::Handler { call, exit });
            }
            Happening::Arrive(conn, node, message) => {
                if !self.net.is_cut
                    && let Some(end) = self.net.end(conn, node)
                    && !end.is_gone
                {
                    end.arrived.push_back(message);
                    self.pump(node);
                }
            }
            Happening::Closed(conn, node) => {
                if let Some(end) = self.net.end(conn, node) {
                    end.is_closed = true;
                    self.pump(node);
                }
            }
            Happening::Connect(node, attempt) if life == self.lives[node] => {
                self.connect(node, attempt);
            }
            _ => {}
        }
        true
    }

    fn connect(&mut self, node: usize, attempt: u32) {
        let other = 1 - node;
        if self.net.is_cut || !self.net.listening[other] {
            self.feed(node, Event::Link(LinkEvent::ConnectFailed { attempt }));
            return;
        }
        let conn = self.net.open();
        let theirs = self.nodes[other].socket(conn);
        let ours = self.nodes[node].socket(conn);
        self.feed(other, Event::Link(LinkEvent::Accepted { socket: theirs }));
        self.feed(node, Event::Link(LinkEvent::Connected { attempt, socket: ours }));
    }

    /// Runs until something holds. Returns whether it came to that within the time (microseconds).
    pub fn run_until(&mut self, limit: u64, mut holds: impl FnMut(&Self) -> bool) -> bool {
        let end = self.now.0 + limit;
        loop {
            if holds(self) {
                return true;
            }
            let next = self.queue.first_key_value().map(|((at, _), _)| *at);
            if next.is_none_or(|at| at > end) || !self.step() {
                self.now = Tick(end);
                return holds(self);
            }
        }
    }

    /// Runs for some time, microseconds.
    pub fn run_for(&mut self, time: u64) {
        self.run_until(time, |_| false);
    }

    // ---- what people and applications do ----

    /// Gives a command; the ticket is for [`Self::reply`].
    pub fn command(&mut self, node: usize, command: Command) -> u32 {
        self.next_ticket += 1;
        let ticket = self.next_ticket;
        self.feed(node, Event::Admin { ticket: Ticket(ticket), command });
        ticket
    }

    /// Gives a command and waits for its answer.
    ///
    /// # Panics
    /// There is none within two minutes.
    pub fn admin(&mut self, node: usize, command: Command) -> Reply {
        let text = format!("{command:?}");
        let ticket = self.command(node, command);
        self.run_until(120_000_000, |w| w.nodes[node].replies.contains_key(&ticket));
        let reply = self.nodes[node].replies.remove(&ticket);
        reply.unwrap_or_else(|| panic!("no answer to {text}"))
    }

    /// Begins a request; its number is for [`Self::result`].
    pub fn request(&mut self, node: usize, volume: u16, op: AppOp) -> u64 {
        self.next_id += 1;
        let id = self.next_id;
        if let AppOp::Read { buf, .. } = op {
            self.nodes[node].note_read(id, buf);
        }
        let request = AppRequest { id: AppId(id), volume: VolumeNr(volume), op };
        self.feed(node, Event::App(request));
        id
    }

    /// Begins a write of these numbers.
    pub fn write(&mut self, node: usize, volume: u16, start: u64, tags: Vec<u64>) -> u64 {
        let range = range(start, tags.len() as u64);
        let buf = self.nodes[node].buf(tags);
        let flags = WriteFlags::default();
        self.request(node, volume, AppOp::Write { range, buf, flags })
    }

    /// Begins a read.
    pub fn read(&mut self, node: usize, volume: u16, start: u64, len: u64) -> u64 {
        let buf = self.nodes[node].buf(vec![u64::MAX; usize::try_from(len).unwrap_or(0)]);
        self.request(node, volume, AppOp::Read { range: range(start, len), buf })
    }

    /// Waits for the end of a request; `None` if it does not end within two minutes.
    pub fn result(&mut self, node: usize, id: u64) -> Option<AppResult> {
        let has = |w: &Self| w.nodes[node].completed.iter().any(|(i, _)| *i == id);
        if !self.run_until(120_000_000, has) {
            return None;
        }
        let at = self.nodes[node].completed.iter().position(|(i, _)| *i == id)?;
        self.nodes[node].completed.remove(at).map(|(_, result)| result)
    }

    /// The network is cut, or whole again. Connections that were cut stay silent.
    pub fn cut(&mut self, is_cut: bool) {
        self.net.is_cut = is_cut;
    }

    /// A node loses its memory, and power if `power_cut`; its disks stay.
    pub fn crash(&mut self, node: usize, power_cut: bool) {
        self.lives[node] += 1;
        self.timers[node] = None;
        let mut disks = std::mem::take(&mut self.nodes[node].disks);
        if power_cut {
            for disk in disks.values_mut() {
                disk.power_cut(&mut self.chance);
            }
        }
        for conn in self.net.all() {
            if self.nodes[node].knows(conn) {
                self.close(conn, node);
            }
        }
        self.net.listening[node] = false;
        let exits = std::mem::take(&mut self.nodes[node].handler_exits);
        self.nodes[node] = Node::new(self.chance.any(), disks);
        self.nodes[node].handler_exits = exits;
    }
}

/// A range of sectors.
///
/// # Panics
/// It wraps.
pub fn range(start: u64, len: u64) -> SectorRange {
    SectorRange::new(drbd_types::Sector(start), drbd_types::SectorCount(len)).expect("no wrap")
}

const fn handler_name(handler: Handler) -> &'static str {
    match handler {
        Handler::PriOnInconDegr => "pri-on-incon-degr",
        Handler::LocalIoError => "local-io-error",
        Handler::InitialSplitBrain => "initial-split-brain",
        Handler::SplitBrain => "split-brain",
        Handler::PriLostAfterSb => "pri-lost-after-sb",
        Handler::PriLost => "pri-lost",
        Handler::BeforeResyncTarget => "before-resync-target",
        Handler::AfterResyncTarget => "after-resync-target",
        Handler::BeforeResyncSource => "before-resync-source",
        Handler::OutOfSync => "out-of-sync",
        Handler::FencePeer => "fence-peer",
        Handler::UnfencePeer => "unfence-peer",
    }
}
