//! One engine and an obedient shell without a peer: tests play the peer, packet by packet.
//!
//! I/O is answered at once, or held until the test says so. Promises of the engine to its shell are
//! checked on the way: handles are not used twice, buffers are freed once and not while a disk has
//! them, requests and commands are answered once.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use drbd_core::Engine;
use drbd_core::action::{Action, AppError, DigestUse, DiskOp, Handler, MetaOp, SendData};
use drbd_core::admin::{Command, Reply};
use drbd_core::config::{DiskConfig, NetConfig};
use drbd_core::engine::status::VolumeStatus;
use drbd_core::event::{
    AppOp, AppRequest, DiskAnswer, DiskLimits, Event, IoFailure, MetaAnswer, Opened, Payload,
    StreamLoss,
};
use drbd_core::ids::{AppId, BufId, CallId, IoId, SendToken, SocketId, Ticket};
use drbd_core::link::{LinkAction, LinkEvent};
use drbd_core::log_line::LogLine;
use drbd_types::{ByteLen, ByteOffset, Fields, Minor, SectorCount, SectorRange, Tick, VolumeNr};
use drbd_wire::packet::{FeatureOffer, Features};
use drbd_wire::{Digest, Packet, Stream};
use drbdmeta::al::initialised_block;
use drbdmeta::io::{IoError, MetaIo};
use drbdmeta::layout::{AlGeometry, Layout, Placement};
use drbdmeta::ops::{ApplyPlan, apply, plan_apply};
use drbdmeta::superblock::Superblock;

/// A disk with external meta-data; of its data only the places are known.
#[derive(Clone, Debug)]
pub struct ScriptDisk {
    /// Capacity of the data disk, sectors.
    pub sectors: u64,
    /// Length of the meta-data device, bytes.
    pub meta_len: u64,
    /// Blocks of the meta-data that are not zero.
    pub blocks: BTreeMap<u64, Box<[u8; 4096]>>,
    /// What it can do.
    pub limits: DiskLimits,
}

impl ScriptDisk {
    /// As `create-md` leaves it, changed by `change`; `bits` are set in its bitmap.
    ///
    /// # Panics
    /// The meta-data does not fit.
    pub fn new(
        sectors: u64,
        change: impl FnOnce(&mut Superblock),
        bits: impl IntoIterator<Item = u64>,
    ) -> Self {
        let meta_len = (1 << 20) + sectors.div_ceil(8 * 8).next_multiple_of(4096);
        let layout =
            Layout::for_new(Placement::FlexExternal, ByteLen(meta_len), AlGeometry::default())
                .expect("the meta-data device is large enough");
        let mut blocks = BTreeMap::new();
        for t in 0..layout.al_geometry.blocks() {
            blocks.insert(layout.al_block(t).0, Box::new(initialised_block()));
        }
        let mut superblock = Superblock::new(&layout, 0);
        change(&mut superblock);
        blocks.insert(layout.superblock.0, Box::new(superblock.to_disk()));
        for bit in bits {
            let at = layout.bitmap.0 + bit / 32_768 * 4096;
            let block = blocks.entry(at).or_insert_with(|| Box::new([0; 4096]));
            let byte = usize::try_from(bit % 32_768 / 8).unwrap_or(0);
            block[byte] |= 1 << (bit % 8);
        }
        let limits = DiskLimits {
            max_io: 1 << 20,
            can_discard: true,
            discard_granularity: 512,
            logical_block: 512,
            physical_block: 512,
        };
        Self { sectors, meta_len, blocks, limits }
    }

    /// Fresh.
    pub fn fresh(sectors: u64) -> Self {
        Self::new(sectors, |_| (), [])
    }

    /// Where its meta-data is.
    pub fn placement(&self) -> Placement {
        Placement::FlexExternal
    }

    /// What `drbdadm up` does before it attaches a disk.
    ///
    /// # Panics
    /// The meta-data is none.
    pub fn apply_al(&mut self) {
        let at = Placement::FlexExternal
            .superblock(ByteLen(self.meta_len))
            .expect("the device is large enough");
        let block = self.blocks.get(&at.0).expect("there is a superblock").clone();
        let mut superblock = Superblock::from_disk(&block[..]).expect("it is one");
        let layout = superblock
            .check(Placement::FlexExternal, ByteLen(self.meta_len))
            .expect("it fits the device");
        let found = drbdmeta::al::replay(self, &layout, &superblock).expect("readable");
        if let ApplyPlan::Do { mark, reinitialise, .. } = plan_apply(&superblock, &found) {
            apply(self, &layout, &mut superblock, &found.outcome, mark, reinitialise)
                .expect("writable");
        }
    }

    fn meta(&mut self, op: &MetaOp) -> MetaAnswer {
        match op {
            MetaOp::Open | MetaOp::Measure => MetaAnswer::Opened(Opened {
                backing: SectorCount(self.sectors),
                meta_device: ByteLen(self.meta_len),
                placement: Placement::FlexExternal,
                limits: self.limits,
            }),
            MetaOp::Close | MetaOp::Flush => MetaAnswer::Done,
            MetaOp::Read { at, blocks } => {
                let end = at.0 + u64::from(*blocks) * 4096;
                let found = self.blocks.range(at.0..end).map(|(place, block)| {
                    (u32::try_from((place - at.0) / 4096).unwrap_or(u32::MAX), block.clone())
                });
                MetaAnswer::Blocks(found.filter(|(_, b)| b.iter().any(|b| *b != 0)).collect())
            }
            MetaOp::Write { at, block, .. } => {
                self.blocks.insert(at.0, block.clone());
                MetaAnswer::Done
            }
            MetaOp::Fill { at, blocks, value } => {
                for index in 0..u64::from(*blocks) {
                    self.blocks.insert(at.0 + index * 4096, Box::new([*value; 4096]));
                }
                MetaAnswer::Done
            }
        }
    }
}

impl MetaIo for ScriptDisk {
    fn device_len(&self) -> ByteLen {
        ByteLen(self.meta_len)
    }

    fn read_at(&mut self, at: ByteOffset, into: &mut [u8]) -> Result<(), IoError> {
        for (place, byte) in (at.0..).zip(into) {
            let block = self.blocks.get(&(place / 4096 * 4096));
            *byte = block.map_or(0, |b| b[usize::try_from(place % 4096).unwrap_or(0)]);
        }
        Ok(())
    }

    fn write_at(&mut self, at: ByteOffset, data: &[u8]) -> Result<(), IoError> {
        for (place, byte) in (at.0..).zip(data) {
            let block = self.blocks.entry(place / 4096 * 4096);
            let block = block.or_insert_with(|| Box::new([0; 4096]));
            block[usize::try_from(place % 4096).unwrap_or(0)] = *byte;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), IoError> {
        Ok(())
    }
}

/// An I/O that is not answered.
#[derive(Clone, Debug)]
pub enum Held {
    /// On the data disk.
    Disk(IoId, VolumeNr, DiskOp),
    /// On the meta-data.
    Meta(IoId, VolumeNr, MetaOp),
    /// A handler program that runs.
    Call(CallId, Handler),
}

/// A packet that the engine has sent.
#[derive(Clone, Debug, PartialEq)]
pub struct Sent {
    /// On which stream.
    pub stream: Stream,
    /// Volume of the header.
    pub volume: u16,
    /// What.
    pub packet: Packet,
    /// Bytes of its data.
    pub len: u64,
}

/// What a disk would answer to a question about its data.
pub type Oracle<T> = Box<dyn FnMut(SectorRange) -> T>;

/// The engine and its shell.
pub struct Script {
    /// Under test.
    pub engine: Engine,
    /// The time.
    pub now: Tick,
    /// By volume.
    pub disks: BTreeMap<u16, ScriptDisk>,
    /// Data and meta-data I/O and handlers are held.
    pub holds: bool,
    /// What is held.
    pub held: Vec<Held>,
    /// Packets that no test has looked at.
    pub sent: VecDeque<Sent>,
    /// Log lines.
    pub log: Vec<LogLine>,
    /// Handlers that were called.
    pub calls: Vec<Handler>,
    /// Their exit codes, 0 for the others.
    pub exits: BTreeMap<&'static str, i32>,
    /// How requests ended.
    pub completed: BTreeMap<u64, Result<(), AppError>>,
    /// How commands ended.
    pub replies: BTreeMap<u32, Reply>,
    /// Digests of own data.
    pub digest: Oracle<Option<Digest>>,
    /// Is own data all zero?
    pub is_zero: Oracle<bool>,
    /// Version and features of the peer.
    pub offer: FeatureOffer,
    /// The engine is to resolve conflicts.
    pub is_resolver: bool,
    /// The peer is there.
    pub is_reachable: bool,
    /// The streams are established.
    pub is_up: bool,
    /// Whether the data stream is to be read.
    pub is_receiving: bool,
    /// Handles of I/O that is under way.
    ios: BTreeSet<u64>,
    bufs: BTreeMap<u32, u64>,
    reads: BTreeMap<u64, BufId>,
    open_apps: BTreeSet<u64>,
    open_tickets: BTreeSet<u32>,
    next: u32,
    actions: Vec<Action>,
    events: VecDeque<Event>,
}

impl core::fmt::Debug for Script {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Script").field("engine", &self.engine).finish_non_exhaustive()
    }
}

const DATA: SocketId = SocketId(1);
const META: SocketId = SocketId(2);

impl Script {
    /// A node without volumes and these disks.
    pub fn new(disks: BTreeMap<u16, ScriptDisk>) -> Self {
        Self {
            engine: Engine::new(7),
            now: Tick(1_000_000),
            disks,
            holds: false,
            held: Vec::new(),
            sent: VecDeque::new(),
            log: Vec::new(),
            calls: Vec::new(),
            exits: BTreeMap::new(),
            completed: BTreeMap::new(),
            replies: BTreeMap::new(),
            digest: Box::new(|_| None),
            is_zero: Box::new(|_| false),
            offer: FeatureOffer { min: 86, max: 101, features: Features::OURS },
            is_resolver: true,
            is_reachable: true,
            is_up: false,
            is_receiving: true,
            ios: BTreeSet::new(),
            bufs: BTreeMap::new(),
            reads: BTreeMap::new(),
            open_apps: BTreeSet::new(),
            open_tickets: BTreeSet::new(),
            next: 0,
            actions: Vec::new(),
            events: VecDeque::new(),
        }
    }

    // ---- events ----

    /// Feeds an event, and all that follow from it at once.
    pub fn feed(&mut self, event: Event) {
        self.events.push_back(event);
        while let Some(event) = self.events.pop_front() {
            self.engine.handle(self.now, event, &mut self.actions);
            for action in std::mem::take(&mut self.actions) {
                self.obey(action);
            }
        }
    }

    /// Time passes; all deadlines on the way are kept.
    pub fn pass(&mut self, micros: u64) {
        let end = Tick(self.now.0 + micros);
        let mut late = 0;
        while let Some(at) = self.engine.next_deadline().filter(|at| *at <= end) {
            self.now = self.now.max(at);
            self.feed(Event::Timer);
            if self.engine.next_deadline().is_some_and(|again| again <= at) {
                // A deadline that is kept does not come again at once, or a shell would spin.
                self.now.0 += 1;
                late += 1;
                assert!(late < 1000, "a deadline is not kept: {:#?}", self.engine.waits());
            }
        }
        self.now = self.now.max(end);
        self.feed(Event::Timer);
    }

    /// A command, which need not end at once.
    pub fn begin(&mut self, command: Command) -> Ticket {
        self.next += 1;
        let ticket = Ticket(self.next);
        self.open_tickets.insert(ticket.0);
        self.feed(Event::Admin { ticket, command });
        ticket
    }

    /// A command that ends without the peer.
    ///
    /// # Panics
    /// It does not.
    pub fn command(&mut self, command: Command) -> Reply {
        let text = format!("{command:?}");
        let ticket = self.begin(command);
        self.replies.remove(&ticket.0).unwrap_or_else(|| panic!("{text} is not answered"))
    }

    /// A request of the application.
    pub fn app(&mut self, volume: VolumeNr, op: impl FnOnce(&mut Self) -> AppOp) -> AppId {
        let op = op(self);
        self.next += 1;
        let id = AppId(u64::from(self.next));
        if let AppOp::Read { buf, .. } = op {
            self.reads.insert(id.0, buf);
        }
        self.open_apps.insert(id.0);
        self.feed(Event::App(AppRequest { id, volume, op }));
        id
    }

    /// A packet of the peer with so many bytes of data.
    pub fn peer(&mut self, stream: Stream, volume: u16, packet: Packet, len: u64) {
        let payload =
            (len > 0).then(|| Payload { buf: self.buf(len), len: ByteLen(len), digest_ok: None });
        self.feed(Event::Packet { stream, volume, packet, payload });
    }

    /// A stream of the peer ends.
    pub fn lose(&mut self, stream: Stream, how: StreamLoss) {
        self.feed(Event::StreamLost { stream, how });
    }

    /// A new buffer.
    pub fn buf(&mut self, len: u64) -> BufId {
        self.next += 1;
        self.bufs.insert(self.next, len);
        BufId(self.next)
    }

    // ---- steps that most tests begin with ----

    /// Adds a volume and attaches its disk.
    ///
    /// # Panics
    /// The engine refuses.
    pub fn attach(&mut self, nr: u16, config: DiskConfig) {
        let volume = VolumeNr(nr);
        let reply = self.command(Command::NewVolume { volume, minor: Minor(u32::from(nr)) });
        assert_eq!(reply.code, 1, "{reply:?}");
        let reply = self.command(Command::Attach { volume, config: Box::new(config) });
        assert_eq!(reply.code, 1, "{reply:?} {:?}", self.log);
    }

    /// Connects: up to and with the agreement on version and features.
    ///
    /// # Panics
    /// It does not come to that.
    pub fn connect(&mut self, net: NetConfig) {
        let reply = self.command(Command::Connect(Box::new(net)));
        assert_eq!(reply.code, 1, "{reply:?} {:?}", self.log);
        self.wait_until_up();
    }

    /// Lets time pass until the streams are established.
    ///
    /// # Panics
    /// They are not.
    pub fn wait_until_up(&mut self) {
        for _ in 0..400 {
            if self.is_up {
                return;
            }
            self.pass(100_000);
        }
        panic!("not connected: {:?}", self.log);
    }

    /// The state of a volume.
    pub fn state(&self, volume: u16) -> Fields {
        self.volume(volume).map_or(Fields::NEW, |v| v.state)
    }

    /// What a volume shows.
    pub fn volume(&self, volume: u16) -> Option<VolumeStatus> {
        self.engine.status().volumes.into_iter().find(|v| v.nr.0 == volume)
    }

    /// Buffers that are lent.
    pub fn buffers(&self) -> usize {
        self.bufs.len()
    }

    /// Requests and commands without answer.
    pub fn unanswered(&self) -> usize {
        self.open_apps.len() + self.open_tickets.len()
    }

    /// Was such a line logged?
    pub fn has_logged(&self, text: &str) -> bool {
        self.log.iter().any(|line| line.text.contains(text))
    }

    /// Answers a held I/O or handler, by its place in [`Self::held`].
    pub fn answer(&mut self, at: usize, failure: Option<IoFailure>) {
        if at >= self.held.len() {
            return;
        }
        let held = self.held.remove(at);
        let event = self.event_of(held, failure);
        self.feed(event);
    }

    /// Answers everything that is held, and what follows from that.
    pub fn answer_all(&mut self) {
        while !self.held.is_empty() {
            self.answer(0, None);
        }
    }

    fn event_of(&mut self, held: Held, failure: Option<IoFailure>) -> Event {
        match held {
            Held::Disk(io, volume, op) => {
                self.ios.remove(&io.0);
                let gone = (!self.disks.contains_key(&volume.0)).then_some(IoFailure::Gone);
                let result = match failure.or(gone) {
                    Some(failure) => Err(failure),
                    None => Ok(self.do_disk(&op)),
                };
                Event::Disk { io, result }
            }
            Held::Meta(io, volume, op) => {
                self.ios.remove(&io.0);
                let result = match (failure, self.disks.get_mut(&volume.0)) {
                    (None, Some(disk)) => Ok(disk.meta(&op)),
                    _ if op == MetaOp::Close => Ok(MetaAnswer::Done),
                    (Some(failure), _) => Err(failure),
                    (None, None) => Err(IoFailure::Open(drbd_types::Failure::OpenBackingDevice)),
                };
                Event::Meta { io, result }
            }
            Held::Call(call, handler) => {
                let name = format!("{handler:?}");
                let exit = self.exits.iter().find(|(n, _)| **n == name).map_or(0, |(_, e)| *e);
                Event::Handler { call, exit }
            }
        }
    }

    fn do_disk(&mut self, op: &DiskOp) -> DiskAnswer {
        match *op {
            DiskOp::Read { range, buf, check_zero, digest } => DiskAnswer {
                buf: match buf {
                    Some(_) => None,
                    None => Some(self.buf(range.len.0 * 512)),
                },
                is_zero: check_zero.then(|| (self.is_zero)(range)),
                digest: digest.and_then(|_: DigestUse| (self.digest)(range)),
            },
            DiskOp::Write { .. }
            | DiskOp::Discard { .. }
            | DiskOp::WriteZeroes { .. }
            | DiskOp::Flush => DiskAnswer::default(),
        }
    }

    // ---- actions ----

    fn obey(&mut self, action: Action) {
        match action {
            Action::Disk { io, volume, op } => {
                assert!(self.ios.insert(io.0), "{io:?} is used twice");
                if let DiskOp::Write { buf, range, .. } = op {
                    assert_eq!(self.bufs.get(&buf.0), Some(&(range.len.0 * 512)), "{op:?}");
                }
                self.hold(Held::Disk(io, volume, op));
            }
            Action::Meta { io, volume, op } => {
                assert!(self.ios.insert(io.0), "{io:?} is used twice");
                self.hold(Held::Meta(io, volume, op));
            }
            Action::Call { call, handler, .. } => {
                self.calls.push(handler);
                self.hold(Held::Call(call, handler));
            }
            Action::Link(action) => self.link(action),
            Action::Send { stream, volume, packet, payload, token } => {
                self.send(stream, volume, packet, payload, token);
            }
            Action::Receive(wants) => self.is_receiving = wants,
            Action::CompleteApp { id, result, data } => {
                assert!(self.open_apps.remove(&id.0), "{id:?} is answered twice");
                if let Some(buf) = self.reads.remove(&id.0) {
                    self.free(buf);
                }
                if let Some(buf) = data {
                    self.free(buf);
                }
                self.completed.insert(id.0, result);
            }
            Action::FreeBuf(buf) => self.free(buf),
            Action::Reply { ticket, reply } => {
                assert!(self.open_tickets.remove(&ticket.0), "{ticket:?} is answered twice");
                self.replies.insert(ticket.0, reply);
            }
            Action::Log(line) => self.log.push(line),
            Action::ExpectDigest(_)
            | Action::AttachDigest(_)
            | Action::DigestAlgorithms { .. }
            | Action::Device { .. }
            | Action::Changed => {}
        }
    }

    fn hold(&mut self, held: Held) {
        if self.holds {
            self.held.push(held);
        } else {
            let event = self.event_of(held, None);
            self.events.push_back(event);
        }
    }

    fn free(&mut self, buf: BufId) {
        assert!(self.bufs.remove(&buf.0).is_some(), "{buf:?} is freed but not lent");
        let is_in_use = self.held.iter().any(|held| match held {
            Held::Disk(_, _, DiskOp::Write { buf: used, .. }) => *used == buf,
            _ => false,
        });
        assert!(!is_in_use, "{buf:?} is freed while the disk has it");
    }

    fn send(
        &mut self,
        stream: Stream,
        volume: u16,
        packet: Packet,
        payload: Option<SendData>,
        token: Option<SendToken>,
    ) {
        assert!(self.is_up, "{packet:?} without a connection");
        let len = match payload {
            None => 0,
            Some(SendData::Zeroes(len)) => len.0,
            Some(SendData::Buf(buf)) => {
                *self.bufs.get(&buf.0).unwrap_or_else(|| panic!("{buf:?} is sent but not lent"))
            }
        };
        self.sent.push_back(Sent { stream, volume, packet, len });
        if let Some(token) = token {
            self.events.push_back(Event::Sent { token });
        }
    }

    fn link(&mut self, action: LinkAction) {
        let event = match action {
            LinkAction::Listen if self.is_reachable => {
                // Accepted: both streams, or only the data stream.
                self.events.push_back(Event::Link(LinkEvent::Accepted { socket: DATA }));
                if self.is_resolver {
                    self.events.push_back(Event::Link(LinkEvent::Accepted { socket: META }));
                }
                return;
            }
            LinkAction::Connect { attempt } => {
                if self.is_resolver || !self.is_reachable {
                    LinkEvent::ConnectFailed { attempt }
                } else {
                    let socket = META;
                    LinkEvent::Connected { attempt, socket }
                }
            }
            LinkAction::Receive { socket, phase, .. } => {
                let packet = match (phase, socket) {
                    (drbd_wire::frame::Phase::Initial, DATA) => Packet::InitialData,
                    (drbd_wire::frame::Phase::Initial, _) => Packet::InitialMeta,
                    _ => Packet::Features(self.offer),
                };
                LinkEvent::Packet { socket, packet }
            }
            LinkAction::Random => LinkEvent::Random(Box::new([7; 64])),
            LinkAction::Log(line) => {
                self.log.push(line);
                return;
            }
            LinkAction::Established { .. } => {
                self.is_up = true;
                self.is_receiving = true;
                return;
            }
            LinkAction::Close { .. } => {
                self.is_up = false;
                return;
            }
            LinkAction::Listen
            | LinkAction::StopListening
            | LinkAction::CancelConnect { .. }
            | LinkAction::Send { .. }
            | LinkAction::Failed { .. } => return,
        };
        self.events.push_back(Event::Link(event));
    }
}
