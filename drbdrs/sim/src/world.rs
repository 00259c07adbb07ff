//! Two nodes, time, and what happens between them.

use std::collections::{BTreeMap, BTreeSet};

use drbd_core::action::{DiskOp, Handler, MetaOp};
use drbd_core::admin::{Command, Reply};
use drbd_core::event::{AppOp, AppRequest, Event, IoFailure, WriteFlags};
use drbd_core::ids::{AppId, CallId, IoId, Ticket};
use drbd_core::link::{HangUp, LinkEvent};
use drbd_types::{ByteLen, Dstate, Fields, Role, SectorRange, Tick, VolumeNr};

use crate::agenda::Agenda;
use crate::chance::Chance;
use crate::disk::SimDisk;
use crate::net::{ConnId, Item, Message, Net};
use crate::node::{AppResult, Node, Wish};

/// Something that will happen.
#[derive(Debug)]
enum Happening {
    Timer(usize),
    Disk(usize, IoId, VolumeNr, DiskOp, u64),
    Meta(usize, IoId, VolumeNr, MetaOp, u64),
    Handler(usize, CallId, i32),
    /// The handler that fences the peer runs, and waits for these tickets on the peer.
    Fence(usize, CallId, Option<(u64, Vec<u32>)>),
    Event(usize, Box<Event>),
    /// A message that was taken from a connection reaches the engine.
    Received(usize, Box<Event>),
    /// Something arrives at this side.
    Arrive(ConnId, usize, Item),
    /// A connection attempt reaches the other side, or not.
    Connect(usize, u32),
    /// The send queue of this side is reported.
    Queue(usize, ConnId),
    /// A connection that is none of ours is closed.
    Stray(ConnId, usize),
    /// A direction of the network works again.
    Unblock(usize, u32),
}

/// What goes wrong by itself. Rates are per million.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// A write to the data disk fails.
    pub write_error: u32,
    /// A read of the data disk fails; the sectors stay bad until they are written.
    pub read_error: u32,
    /// A meta-data operation fails.
    pub meta_error: u32,
    /// A disk operation takes up to `stall` microseconds.
    pub slow_disk: u32,
    /// Longest stall of disk or network, microseconds.
    pub stall: u64,
    /// A message is lost, and its connection with it.
    pub reset: u32,
    /// A message makes its direction stall.
    pub slow_net: u32,
    /// A connection attempt brings a second one that is no use.
    pub stray: u32,
}

impl Faults {
    /// Nothing goes wrong.
    pub const NONE: Self = Self {
        write_error: 0,
        read_error: 0,
        meta_error: 0,
        slow_disk: 0,
        stall: 0,
        reset: 0,
        slow_net: 0,
        stray: 0,
    };
}

/// How `fence-peer` behaves. It never lies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FenceStyle {
    /// It is broken: exit code 1.
    #[default]
    Broken,
    /// It outdates the peer over another way.
    Outdate,
    /// It shoots the peer.
    Shoot,
}

/// A clock of a node: it starts somewhere and is a little too fast or slow.
#[derive(Clone, Copy, Debug, Default)]
pub struct Clock {
    /// Microseconds at the start.
    pub offset: u64,
    /// Parts per million too fast (or slow).
    pub drift: i64,
}

impl Clock {
    fn here(self, world: u64) -> Tick {
        Tick(self.offset + scaled(world, self.rate(), 1_000_000))
    }

    fn world(self, here: Tick) -> u64 {
        scaled(here.0.saturating_sub(self.offset), 1_000_000, self.rate()) + 1
    }

    const fn rate(self) -> u64 {
        1_000_000_u64.saturating_add_signed(self.drift)
    }
}

/// Divisions of 128 bits are slow, and only needed for times of a year and more.
fn scaled(time: u64, by: u64, of: u64) -> u64 {
    match time.checked_mul(by) {
        Some(product) => product / of,
        None => {
            u64::try_from(u128::from(time) * u128::from(by) / u128::from(of)).unwrap_or(u64::MAX)
        }
    }
}

/// Two nodes.
pub struct World {
    /// They.
    pub nodes: [Node; 2],
    /// Grows with each crash of a node: what was under way before is void.
    lives: [u32; 2],
    net: Net,
    now: Tick,
    queue: Agenda<(u32, Happening)>,
    wishes: Vec<Wish>,
    timers: [Option<Tick>; 2],
    /// Chance of the world.
    pub chance: Chance,
    next_id: u64,
    next_ticket: u32,
    /// Largest delay of a message, microseconds.
    pub net_delay: u64,
    /// Largest time of a disk operation, microseconds.
    pub disk_delay: u64,
    /// Send buffer of a socket, bytes.
    pub send_buffer: u64,
    /// What goes wrong.
    pub faults: Faults,
    /// How fencing works.
    pub fence_style: FenceStyle,
    /// The clocks of the nodes.
    pub clocks: [Clock; 2],
    blocked: [u32; 2],
    /// A message is on its way from a connection into the engine.
    is_receiving: [bool; 2],
    /// Nodes that a fencing handler shot: to be started by whoever started them before.
    pub shot: BTreeSet<usize>,
    /// Events so far.
    pub steps: u64,
    /// What happened, if it is to be told.
    pub trace: Option<Vec<String>>,
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
            queue: Agenda::default(),
            wishes: Vec::new(),
            timers: [None; 2],
            chance,
            next_id: 0,
            next_ticket: 0,
            net_delay: 200,
            disk_delay: 500,
            send_buffer: 1 << 20,
            faults: Faults::NONE,
            fence_style: FenceStyle::Broken,
            clocks: [Clock::default(); 2],
            blocked: [0; 2],
            is_receiving: [false; 2],
            shot: BTreeSet::new(),
            steps: 0,
            trace: None,
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

    /// A line for the trace.
    pub fn tell(&mut self, text: impl FnOnce() -> String) {
        if self.is_loud || self.trace.is_some() {
            let line = format!("{:>12} {}", self.now.0, text());
            if self.is_loud {
                println!("{line}");
            }
            if let Some(trace) = &mut self.trace {
                trace.push(line);
            }
        }
    }

    fn at(&mut self, delay: u64, life: u32, happening: Happening) {
        self.queue.put(self.now.0 + delay, (life, happening));
    }

    /// Feeds an event to a node, and queues what it wants.
    pub fn feed(&mut self, node: usize, event: Event) {
        if !self.nodes[node].is_up {
            return;
        }
        self.tell(|| format!("{node} < {event:?}"));
        let lines = self.nodes[node].log.len();
        let now = self.clocks[node].here(self.now.0);
        let mut wishes = std::mem::take(&mut self.wishes);
        self.nodes[node].feed(now, event, &mut wishes);
        for at in lines..self.nodes[node].log.len() {
            let text = self.nodes[node].log[at].text.clone();
            self.tell(|| format!("{node}   {text}"));
        }
        for wish in wishes.drain(..) {
            self.grant(node, wish);
        }
        self.wishes = wishes;
        self.pump(node);
        self.arm(node);
    }

    fn arm(&mut self, node: usize) {
        let deadline = self.nodes[node].engine.next_deadline();
        let deadline = deadline.map(|at| Tick(self.clocks[node].world(at)).max(self.now));
        if let Some(at) = deadline
            && self.timers[node].is_none_or(|armed| at < armed || armed <= self.now)
        {
            self.timers[node] = Some(at);
            let delay = at.0.saturating_sub(self.now.0);
            let life = self.lives[node];
            self.at(delay, life, Happening::Timer(node));
        }
    }

    fn happens(&mut self, rate: u32) -> bool {
        rate > 0 && self.chance.chance(u64::from(rate), 1_000_000)
    }

    fn disk_time(&mut self) -> u64 {
        let stall = if self.happens(self.faults.slow_disk) {
            self.chance.below(self.faults.stall)
        } else {
            0
        };
        1 + stall + self.chance.below(self.disk_delay)
    }

    fn grant(&mut self, node: usize, wish: Wish) {
        self.tell(|| format!("{node} > {wish:?}"));
        let life = self.lives[node];
        match wish {
            Wish::Disk(io, volume, op) => {
                let delay = self.disk_time();
                let mark = self.nodes[node].mark(volume);
                self.at(delay, life, Happening::Disk(node, io, volume, op, mark));
            }
            Wish::Meta(io, volume, op) => {
                let delay = self.disk_time();
                let mark = self.nodes[node].mark(volume);
                self.at(delay, life, Happening::Meta(node, io, volume, op, mark));
            }
            Wish::Listen(is_listening) => self.net.listening[node] = is_listening,
            Wish::Connect(attempt) => {
                let delay = 1 + self.chance.below(self.net_delay);
                self.at(delay, life, Happening::Connect(node, attempt));
            }
            Wish::Send(conn, message, token) => {
                self.post(conn, node, message, token);
            }
            Wish::Close(conn) => self.close(conn, node),
            Wish::Handler(call, Handler::FencePeer) => {
                let delay = 1 + self.chance.below(20_000);
                self.at(delay, life, Happening::Fence(node, call, None));
            }
            Wish::Handler(call, handler) => {
                let name = handler.name();
                let exit = self.nodes[node].handler_exits.get(name).copied().unwrap_or(0);
                let delay = 1 + self.chance.below(2000);
                self.at(delay, life, Happening::Handler(node, call, exit));
            }
            Wish::Event(event) => self.at(0, life, Happening::Event(node, event)),
        }
    }

    // ---- network ----

    /// A message leaves a node.
    fn post(
        &mut self,
        conn: ConnId,
        from: usize,
        message: Message,
        token: Option<drbd_core::ids::SendToken>,
    ) {
        if self.happens(self.faults.reset) {
            self.reset(conn);
            return;
        }
        if self.happens(self.faults.slow_net) {
            let time = self.chance.below(self.faults.stall);
            self.block(from, time);
        }
        let room = self.send_buffer;
        let (delay, is_taken, report) = {
            let wanted = self.now.0 + 1 + self.chance.below(self.net_delay);
            let Some(end) = self.net.end(conn, from) else { return };
            let pipe = &mut end.out;
            pipe.sent += message.len();
            pipe.last_arrival = wanted.max(pipe.last_arrival);
            let waiting = pipe.sent - pipe.moved;
            let is_taken = waiting <= room;
            if let Some(token) = token
                && !is_taken
            {
                pipe.tokens.push_back((pipe.sent, token));
            }
            let crossed = waiting > room / 2 && !pipe.was_congested;
            let report = crossed || !std::mem::replace(&mut pipe.is_reporting, true);
            (pipe.last_arrival - self.now.0, is_taken, report.then_some(crossed))
        };
        let life = self.lives[from];
        if let Some(token) = token
            && is_taken
        {
            self.at(0, life, Happening::Event(from, Box::new(Event::Sent { token })));
        }
        if let Some(is_urgent) = report {
            let delay = if is_urgent { 0 } else { 250_000 };
            self.at(delay, life, Happening::Queue(from, conn));
        }
        self.at(delay, 0, Happening::Arrive(conn, 1 - from, Item::Message(message)));
    }

    /// The shell tells how its send queue is.
    fn report_queue(&mut self, node: usize, conn: ConnId) {
        let stream = self.nodes[node].stream_of(conn);
        let room = self.send_buffer;
        let Some(end) = self.net.end(conn, node) else { return };
        let pipe = &mut end.out;
        let waiting = pipe.sent - pipe.moved;
        let is_congested = waiting > room / 2;
        pipe.was_congested = is_congested;
        pipe.is_reporting = waiting > 0;
        let moved = pipe.moved;
        if waiting > 0 {
            let life = self.lives[node];
            self.at(250_000, life, Happening::Queue(node, conn));
        }
        if let Some(stream) = stream {
            let waiting = ByteLen(waiting);
            self.feed(node, Event::SendQueue { stream, waiting, is_congested, moved });
        }
    }

    /// The connection breaks: what is under way is lost.
    pub fn reset(&mut self, conn: ConnId) {
        self.tell(|| format!("- connection {conn} breaks"));
        for side in 0..2 {
            if let Some(end) = self.net.end(conn, side) {
                end.is_broken = true;
                end.out.held.clear();
            }
            self.at(1, 0, Happening::Arrive(conn, side, Item::End(HangUp::Reset)));
        }
    }

    /// All connections break.
    pub fn reset_all(&mut self) {
        for conn in self.net.all() {
            self.reset(conn);
        }
    }

    /// What one node sends is held for some time.
    pub fn block(&mut self, from: usize, time: u64) {
        self.blocked[from] += 1;
        self.net.blocked[from] = true;
        let nr = self.blocked[from];
        self.at(time.max(1), 0, Happening::Unblock(from, nr));
    }

    fn unblock(&mut self, from: usize) {
        self.net.blocked[from] = false;
        for conn in self.net.all() {
            let items: Vec<Item> = match self.net.end(conn, from) {
                Some(end) => end.out.held.drain(..).collect(),
                None => continue,
            };
            for item in items {
                self.deliver(conn, 1 - from, item);
            }
        }
        self.pump(1 - from);
    }

    fn close(&mut self, conn: ConnId, node: usize) {
        if let Some(end) = self.net.end(conn, node) {
            end.is_gone = true;
            end.arrived.clear();
            let wanted = self.now.0 + 1 + self.chance.below(self.net_delay);
            end.out.last_arrival = wanted.max(end.out.last_arrival);
            let delay = end.out.last_arrival - self.now.0;
            self.at(delay, 0, Happening::Arrive(conn, 1 - node, Item::End(HangUp::ShutDown)));
        }
        self.net.forget_dead();
    }

    /// Something reaches a side.
    fn arrive(&mut self, conn: ConnId, to: usize, item: Item) {
        let from = 1 - to;
        let is_reset = matches!(item, Item::End(HangUp::Reset));
        if self.net.blocked[from] && !is_reset {
            if let Some(end) = self.net.end(conn, from) {
                end.out.held.push_back(item);
            }
            return;
        }
        self.deliver(conn, to, item);
        self.pump(to);
    }

    fn deliver(&mut self, conn: ConnId, to: usize, item: Item) {
        let from = 1 - to;
        let is_up = self.nodes[to].is_up;
        let room = self.send_buffer;
        let Some(end) = self.net.end(conn, to) else { return };
        let is_end = matches!(item, Item::End(_));
        if end.is_gone {
            // The kernel of a machine that knows nothing of the connection refuses it.
            if is_up && !is_end {
                self.at(1, 0, Happening::Arrive(conn, from, Item::End(HangUp::Reset)));
            }
            return;
        }
        if end.is_broken && !is_end {
            return;
        }
        let len = if let Item::Message(message) = &item { message.len() } else { 0 };
        end.arrived.push_back(item);
        let Some(pipe) = self.net.end(conn, from).map(|end| &mut end.out) else { return };
        pipe.moved += len;
        let taken = pipe.moved + room;
        let life = self.lives[from];
        while let Some((_, token)) = pipe.tokens.pop_front_if(|(end, _)| *end <= taken) {
            let event = Box::new(Event::Sent { token });
            self.queue.put(self.now.0, (life, Happening::Event(from, event)));
        }
    }

    /// Delivers what has arrived, as far as the node wants it.
    fn pump(&mut self, node: usize) {
        if self.is_receiving[node] {
            return;
        }
        let mut next = None;
        let receiver = &mut self.nodes[node];
        for (conn, end) in self.net.side(node).filter(|(_, end)| !end.is_gone) {
            next = match end.arrived.front() {
                Some(Item::End(how)) => {
                    let how = *how;
                    end.arrived.clear();
                    receiver.hung_up(conn, how)
                }
                Some(Item::Message(message)) if receiver.wants(conn) => {
                    let event = receiver.received(conn, message);
                    end.arrived.pop_front();
                    event
                }
                Some(Item::Message(_)) | None => None,
            };
            if next.is_some() {
                break;
            }
        }
        // One at a time: its actions come before the next one is decoded.
        if let Some(event) = next {
            self.is_receiving[node] = true;
            self.at(0, self.lives[node], Happening::Received(node, Box::new(event)));
        }
    }

    fn connect(&mut self, node: usize, attempt: u32) {
        let other = 1 - node;
        let is_cut = self.net.blocked.contains(&true) || !self.nodes[other].is_up;
        if is_cut || !self.net.listening[other] {
            self.feed(node, Event::Link(LinkEvent::ConnectFailed { attempt }));
            return;
        }
        if self.happens(self.faults.stray) {
            let conn = self.net.open();
            let socket = self.nodes[other].socket(conn);
            self.feed(other, Event::Link(LinkEvent::Accepted { socket }));
            let delay = self.chance.below(2_000_000);
            self.at(delay, 0, Happening::Stray(conn, node));
        }
        let conn = self.net.open();
        let theirs = self.nodes[other].socket(conn);
        let ours = self.nodes[node].socket(conn);
        self.feed(other, Event::Link(LinkEvent::Accepted { socket: theirs }));
        self.feed(node, Event::Link(LinkEvent::Connected { attempt, socket: ours }));
    }

    // ---- disks ----

    fn disk_done(&mut self, node: usize, io: IoId, volume: VolumeNr, op: &DiskOp, mark: u64) {
        let rate = match op {
            DiskOp::Read { .. } => self.faults.read_error,
            DiskOp::Write { .. } | DiskOp::Discard { .. } | DiskOp::WriteZeroes { .. } => {
                self.faults.write_error
            }
            DiskOp::Flush => self.faults.write_error / 4,
        };
        let result = if self.happens(rate) {
            match *op {
                DiskOp::Read { range, .. } => {
                    let bad = range.start.0 + self.chance.below(range.len.0);
                    if let Some(disk) = self.nodes[node].disks.get_mut(&volume.0) {
                        disk.bad.insert(bad);
                    }
                }
                _ => {
                    let mut chance = self.chance.fork();
                    self.nodes[node].do_torn(volume, op, &mut chance);
                }
            }
            Err(IoFailure::Device(5))
        } else {
            self.nodes[node].do_disk(volume, op, mark)
        };
        self.feed(node, Event::Disk { io, result });
    }

    fn meta_done(&mut self, node: usize, io: IoId, volume: VolumeNr, op: &MetaOp, mark: u64) {
        let result = if *op != MetaOp::Close && self.happens(self.faults.meta_error) {
            let mut chance = self.chance.fork();
            self.nodes[node].do_torn_meta(volume, op, &mut chance);
            Err(match op {
                MetaOp::Open => IoFailure::Open(drbd_types::Failure::OpenBackingDevice),
                _ => IoFailure::Device(5),
            })
        } else {
            self.nodes[node].do_meta(volume, op, mark)
        };
        self.feed(node, Event::Meta { io, result });
    }

    // ---- fencing ----

    fn fence(&mut self, node: usize, call: CallId, asked: Option<(u64, Vec<u32>)>) {
        let other = 1 - node;
        let life = self.lives[node];
        let exit = match (self.fence_style, asked) {
            (FenceStyle::Broken, _) => 1,
            (_, None) if !self.nodes[other].is_up => 5,
            (FenceStyle::Shoot, _) => {
                self.stop(other, true);
                self.shot.insert(other);
                7
            }
            (FenceStyle::Outdate, None) => {
                let status = self.nodes[other].engine.status();
                if status.volumes.iter().any(|v| v.state.role == Role::Primary) {
                    6
                } else {
                    let numbers: Vec<_> = status.volumes.iter().map(|v| v.nr).collect();
                    let tickets = numbers
                        .into_iter()
                        .map(|nr| self.command(other, Command::Outdate(nr)))
                        .collect();
                    let asked = Some((self.now.0, tickets));
                    self.at(10_000, life, Happening::Fence(node, call, asked));
                    return;
                }
            }
            // Nobody waits for ever.
            (FenceStyle::Outdate, Some((since, _))) if since + 10_000_000 < self.now.0 => 1,
            (FenceStyle::Outdate, Some((since, tickets))) => {
                if !self.nodes[other].is_up {
                    5
                } else if tickets.iter().all(|t| self.nodes[other].replies.contains_key(t)) {
                    let status = self.nodes[other].engine.status();
                    let worst = |limit| status.volumes.iter().all(|v| v.state.disk <= limit);
                    // What it says is true now, and stays true: outdated is on disk.
                    if status.volumes.is_empty() {
                        1
                    } else if worst(Dstate::Inconsistent) {
                        3
                    } else if worst(Dstate::Outdated) {
                        4
                    } else {
                        1
                    }
                } else {
                    let asked = Some((since, tickets));
                    self.at(10_000, life, Happening::Fence(node, call, asked));
                    return;
                }
            }
        };
        self.at(1, life, Happening::Handler(node, call, exit));
    }

    // ---- time ----

    /// The next thing happens. Returns false if nothing will.
    pub fn step(&mut self) -> bool {
        let Some((at, (life, happening))) = self.queue.pop() else { return false };
        self.now = Tick(at.max(self.now.0));
        self.steps += 1;
        match happening {
            // One that was armed again meanwhile rings then.
            Happening::Timer(node)
                if life == self.lives[node] && self.timers[node] == Some(self.now) =>
            {
                self.timers[node] = None;
                self.feed(node, Event::Timer);
            }
            Happening::Event(node, event) if life == self.lives[node] => self.feed(node, *event),
            Happening::Received(node, event) if life == self.lives[node] => {
                self.is_receiving[node] = false;
                self.feed(node, *event);
            }
            Happening::Disk(node, io, volume, op, mark) if life == self.lives[node] => {
                self.disk_done(node, io, volume, &op, mark);
            }
            Happening::Meta(node, io, volume, op, mark) if life == self.lives[node] => {
                self.meta_done(node, io, volume, &op, mark);
            }
            Happening::Handler(node, call, exit) if life == self.lives[node] => {
                self.feed(node, Event::Handler { call, exit });
            }
            Happening::Fence(node, call, asked) if life == self.lives[node] => {
                self.fence(node, call, asked);
            }
            Happening::Arrive(conn, node, item) => self.arrive(conn, node, item),
            Happening::Queue(node, conn) if life == self.lives[node] => {
                self.report_queue(node, conn);
            }
            Happening::Connect(node, attempt) if life == self.lives[node] => {
                self.connect(node, attempt);
            }
            Happening::Stray(conn, node) => self.close(conn, node),
            Happening::Unblock(from, nr) if nr == self.blocked[from] => self.unblock(from),
            _ => {}
        }
        true
    }

    /// When the next thing happens.
    pub fn next_at(&self) -> Option<u64> {
        self.queue.next_at()
    }

    /// The time goes on, if nothing happens before.
    pub fn advance_to(&mut self, at: u64) {
        self.now = Tick(self.now.0.max(at));
    }

    /// Runs until something holds. Returns whether it came to that within the time (microseconds).
    pub fn run_until(&mut self, limit: u64, mut holds: impl FnMut(&Self) -> bool) -> bool {
        let end = self.now.0 + limit;
        loop {
            if holds(self) {
                return true;
            }
            let next = self.next_at();
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

    /// Gives a command; the ticket is the key of its reply in [`Node::replies`].
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

    /// Number of the next request.
    pub const fn next_request(&self) -> u64 {
        self.next_id + 1
    }

    /// Begins a write of these numbers.
    pub fn write(&mut self, node: usize, volume: u16, start: u64, tags: Vec<u64>) -> u64 {
        self.write_with(node, volume, start, tags, WriteFlags::default())
    }

    /// Begins a write of these numbers.
    pub fn write_with(
        &mut self,
        node: usize,
        volume: u16,
        start: u64,
        tags: Vec<u64>,
        flags: WriteFlags,
    ) -> u64 {
        let range = range(start, tags.len() as u64);
        let buf = self.nodes[node].buf(tags);
        self.request(node, volume, AppOp::Write { range, buf, flags })
    }

    /// Begins a read.
    pub fn read(&mut self, node: usize, volume: u16, start: u64, len: u64) -> u64 {
        let empty = vec![u64::MAX; usize::try_from(len).unwrap_or(0)];
        let buf = self.nodes[node].buf(empty);
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

    /// The network is cut in both directions, or whole again. What was under way is held.
    pub fn cut(&mut self, is_cut: bool) {
        for from in 0..2 {
            self.blocked[from] += 1;
            if is_cut {
                self.net.blocked[from] = true;
            } else {
                self.unblock(from);
            }
        }
    }

    /// A node stops: it loses its memory, and with `power_cut` the caches of its disks and the
    /// peer's chance to notice. It is down until [`Self::boot`].
    pub fn stop(&mut self, node: usize, power_cut: bool) {
        self.tell(|| format!("- node {node} stops, power cut: {power_cut}"));
        let life = self.lives[node];
        self.lives[node] += 1;
        self.timers[node] = None;
        self.is_receiving[node] = false;
        let mut chance = self.chance.fork();
        // What was under way may or may not be done.
        for (of, happening) in self.queue.iter() {
            match happening {
                Happening::Disk(at, _, volume, op, _) if *at == node && *of == life => {
                    self.nodes[node].do_torn(*volume, op, &mut chance);
                }
                Happening::Meta(at, _, volume, op, _) if *at == node && *of == life => {
                    self.nodes[node].do_torn_meta(*volume, op, &mut chance);
                }
                _ => {}
            }
        }
        let mut disks = std::mem::take(&mut self.nodes[node].disks);
        if power_cut {
            for disk in disks.values_mut() {
                disk.power_cut(&mut chance);
            }
        }
        for conn in self.net.all() {
            if !self.nodes[node].knows(conn) {
                continue;
            }
            if power_cut {
                if let Some(end) = self.net.end(conn, node) {
                    end.is_gone = true;
                    end.arrived.clear();
                }
            } else {
                self.close(conn, node);
            }
        }
        self.net.forget_dead();
        self.net.listening[node] = false;
        let exits = std::mem::take(&mut self.nodes[node].handler_exits);
        let violations = std::mem::take(&mut self.nodes[node].violations);
        self.nodes[node] = Node::new(self.chance.any(), disks);
        self.nodes[node].handler_exits = exits;
        self.nodes[node].violations = violations;
        self.nodes[node].is_up = false;
    }

    /// A node that was stopped runs again, without any configuration.
    pub fn boot(&mut self, node: usize) {
        self.tell(|| format!("- node {node} boots"));
        self.nodes[node].is_up = true;
        self.shot.remove(&node);
    }
}

/// A range of sectors.
///
/// # Panics
/// It wraps.
pub fn range(start: u64, len: u64) -> SectorRange {
    SectorRange::new(drbd_types::Sector(start), drbd_types::SectorCount(len)).expect("no wrap")
}
