//! One node: the engine and a shell that obeys it, on simulated disks, sockets and time.

use std::collections::{BTreeMap, VecDeque};

use drbd_core::Engine;
use drbd_core::action::{
    Action, Actions, AppError, DeviceOffer, DigestUse, DiskOp, Handler, MetaOp, SendData,
};
use drbd_core::admin::Reply;
use drbd_core::event::{
    DiskAnswer, DiskLimits, Event, IoFailure, MetaAnswer, Opened, Payload, StreamLoss,
};
use drbd_core::ids::{BufId, CallId, IoId, SendToken, SocketId, Ticket};
use drbd_core::link::{HangUp, LinkAction, LinkEvent};
use drbd_core::log_line::LogLine;
use drbd_types::{ByteLen, SectorCount, SectorRange, Tick, VolumeNr};
use drbd_wire::frame::{Incoming, Phase};
use drbd_wire::{Algorithm, Context, Digest, Packet, Reader, Stream, Want, encode};
use drbdmeta::layout::Placement;

use crate::buffers::Buffers;
use crate::chance::Chance;
use crate::disk::{Part, SimDisk, Tags};
use crate::net::{ConnId, Message};

/// What a node wants from the world.
#[derive(Clone, Debug)]
pub enum Wish {
    /// A disk operation takes its time.
    Disk(IoId, VolumeNr, DiskOp),
    /// A meta-data operation takes its time.
    Meta(IoId, VolumeNr, MetaOp),
    /// Begin or end listening.
    Listen(bool),
    /// Connect to the other node.
    Connect(u32),
    /// A message for the other side of a connection, and the token to report when the transport
    /// has taken it.
    Send(ConnId, Message, Option<SendToken>),
    /// Close this side of a connection.
    Close(ConnId),
    /// A handler program runs.
    Handler(CallId, Handler),
    /// An event that comes at once.
    Event(Box<Event>),
}

/// How a request of the application ended.
pub type AppResult = Result<Option<Tags>, AppError>;

/// One node.
pub struct Node {
    /// The engine under test.
    pub engine: Engine,
    /// By volume; disks survive crashes.
    pub disks: BTreeMap<u16, SimDisk>,
    /// Volumes whose disk is open.
    open: BTreeMap<u16, bool>,
    bufs: Buffers,
    /// Few, in the order of their numbers.
    sockets: Vec<(SocketId, ConnId)>,
    next_socket: u32,
    /// What is to be received on a socket before the connection is established.
    receiving: BTreeMap<SocketId, (Phase, Context)>,
    /// The established streams.
    streams: [Option<(SocketId, Reader)>; 2],
    send_context: Context,
    attach: Option<Algorithm>,
    algorithms: (Option<Algorithm>, Option<Algorithm>),
    is_receiving: bool,
    /// What devices offer.
    pub offers: BTreeMap<u16, DeviceOffer>,
    /// Buffers of reads that are under way, by request.
    reads: BTreeMap<u64, BufId>,
    /// Ended requests.
    pub completed: VecDeque<(u64, AppResult)>,
    /// Ended commands.
    pub replies: BTreeMap<u32, Reply>,
    /// Log lines.
    pub log: Vec<LogLine>,
    /// The machine runs.
    pub is_up: bool,
    /// Handlers and their exit codes; 0 for the others.
    pub handler_exits: BTreeMap<&'static str, i32>,
    /// Handlers that were called.
    pub calls: Vec<Handler>,
    /// What the engine did wrong, as far as the shell sees it.
    pub violations: Vec<String>,
    actions: Actions,
    wishes: Vec<Wish>,
    random: Chance,
}

impl Node {
    /// A node without volumes.
    pub fn new(seed: u64, disks: BTreeMap<u16, SimDisk>) -> Self {
        Self {
            engine: Engine::new(seed),
            disks,
            open: BTreeMap::new(),
            bufs: Buffers::default(),
            sockets: Vec::new(),
            next_socket: 0,
            receiving: BTreeMap::new(),
            streams: [None, None],
            send_context: Context::FRESH,
            attach: None,
            algorithms: (None, None),
            is_receiving: true,
            offers: BTreeMap::new(),
            reads: BTreeMap::new(),
            completed: VecDeque::new(),
            replies: BTreeMap::new(),
            log: Vec::new(),
            is_up: true,
            handler_exits: BTreeMap::new(),
            calls: Vec::new(),
            violations: Vec::new(),
            actions: Vec::new(),
            wishes: Vec::new(),
            random: Chance::new(seed ^ 0x5EED),
        }
    }

    /// Feeds an event and obeys; what the world has to do is put into `wishes`.
    pub fn feed(&mut self, now: Tick, event: Event, wishes: &mut Vec<Wish>) {
        std::mem::swap(&mut self.wishes, wishes);
        self.engine.handle(now, event, &mut self.actions);
        let mut actions = std::mem::take(&mut self.actions);
        for action in actions.drain(..) {
            self.obey(action);
        }
        self.actions = actions;
        std::mem::swap(&mut self.wishes, wishes);
    }

    /// A buffer with this data.
    pub fn buf(&mut self, data: impl Into<Tags>) -> BufId {
        self.bufs.insert(data.into())
    }

    /// A read of the application: its buffer is looked at when it ends.
    pub fn note_read(&mut self, id: u64, buf: BufId) {
        self.reads.insert(id, buf);
    }

    /// Buffers that nobody has freed.
    pub fn buffers_in_use(&self) -> usize {
        self.bufs.len()
    }

    /// What the disk of a volume has written so far, see [`SimDisk::mark`].
    pub fn mark(&self, volume: VolumeNr) -> u64 {
        self.disks.get(&volume.0).map_or(0, SimDisk::mark)
    }

    /// An operation that was under way when the node stopped: the disk may have done it in part.
    pub fn do_torn(&mut self, volume: VolumeNr, op: &DiskOp, chance: &mut Chance) {
        let Some(disk) = self.disks.get_mut(&volume.0) else { return };
        match *op {
            DiskOp::Write { range, buf, .. } => {
                let Some(data) = self.bufs.get(buf) else { return };
                let len = chance.below(data.len() as u64 + 1);
                let part = data.get(..usize::try_from(len).unwrap_or(0)).unwrap_or_default();
                disk.write(range.start.0, part);
            }
            DiskOp::Discard { range } | DiskOp::WriteZeroes { range, .. } => {
                let part = usize::try_from(chance.below(range.len.0 + 1)).unwrap_or(0);
                disk.write(range.start.0, vec![0; part]);
            }
            DiskOp::Read { .. } | DiskOp::Flush => {}
        }
    }

    /// The same for the meta-data.
    pub fn do_torn_meta(&mut self, volume: VolumeNr, op: &MetaOp, chance: &mut Chance) {
        let Some(disk) = self.disks.get_mut(&volume.0) else { return };
        if let MetaOp::Write { at, block, .. } = op
            && chance.chance(1, 2)
        {
            disk.write_block(at.0, **block, false);
        }
    }

    /// A new socket for a connection.
    pub fn socket(&mut self, conn: ConnId) -> SocketId {
        self.next_socket += 1;
        let socket = SocketId(self.next_socket);
        self.sockets.push((socket, conn));
        socket
    }

    fn socket_of(&self, conn: ConnId) -> Option<SocketId> {
        self.sockets.iter().find(|(_, c)| *c == conn).map(|(s, _)| *s)
    }

    fn conn_of(&self, socket: SocketId) -> Option<ConnId> {
        self.sockets.iter().find(|(s, _)| *s == socket).map(|(_, c)| *c)
    }

    fn obey(&mut self, action: Action) {
        match action {
            Action::Disk { io, volume, op } => self.wishes.push(Wish::Disk(io, volume, op)),
            Action::Meta { io, volume, op } => self.wishes.push(Wish::Meta(io, volume, op)),
            Action::Link(action) => self.link(action),
            Action::Send { stream, volume, packet, payload, token } => {
                self.send(stream, volume, packet, payload, token);
            }
            Action::Receive(is_receiving) => self.is_receiving = is_receiving,
            Action::ExpectDigest(algorithm) => {
                if let Some((_, reader)) = &mut self.streams[0] {
                    reader.context.integrity = algorithm;
                }
            }
            Action::AttachDigest(algorithm) => self.attach = algorithm,
            Action::DigestAlgorithms { csums, verify } => self.algorithms = (csums, verify),
            Action::CompleteApp { id, result, data } => self.complete(id.0, result, data),
            Action::FreeBuf(buf) => {
                if self.bufs.remove(buf).is_none() {
                    self.violations.push(format!("buffer {buf:?} freed twice"));
                }
            }
            Action::Call { call, handler, .. } => {
                self.calls.push(handler);
                self.wishes.push(Wish::Handler(call, handler));
            }
            Action::Reply { ticket: Ticket(ticket), reply } => {
                self.replies.insert(ticket, reply);
            }
            Action::Log(line) => self.log.push(line),
            Action::Device { volume, offer } => {
                self.offers.insert(volume.0, offer);
            }
            Action::Changed => {}
        }
    }

    fn complete(&mut self, id: u64, result: Result<(), AppError>, data: Option<BufId>) {
        let own = self.reads.remove(&id).and_then(|buf| self.bufs.remove(buf));
        let data = match data {
            Some(buf) => self.bufs.remove(buf),
            None => own,
        };
        self.completed.push_back((id, result.map(|()| data)));
    }

    // ---- sockets ----

    fn link(&mut self, action: LinkAction) {
        match action {
            LinkAction::Listen => self.wishes.push(Wish::Listen(true)),
            LinkAction::StopListening => self.wishes.push(Wish::Listen(false)),
            LinkAction::Connect { attempt } => self.wishes.push(Wish::Connect(attempt)),
            LinkAction::CancelConnect { .. } | LinkAction::Failed { .. } => {}
            LinkAction::Send { socket, context, packet } => {
                let mut bytes = Vec::new();
                encode(&context, 0, &packet, 0, &mut bytes);
                if let Some(conn) = self.conn_of(socket) {
                    let message = Message { bytes, data: Tags::default() };
                    self.wishes.push(Wish::Send(conn, message, None));
                }
            }
            LinkAction::Receive { socket, phase, context } => {
                self.receiving.insert(socket, (phase, context));
            }
            LinkAction::Close { socket } => {
                self.receiving.remove(&socket);
                for stream in &mut self.streams {
                    if stream.as_ref().is_some_and(|(s, _)| *s == socket) {
                        *stream = None;
                    }
                }
                if let Some(conn) = self.conn_of(socket) {
                    self.sockets.retain(|(s, _)| *s != socket);
                    self.wishes.push(Wish::Close(conn));
                }
            }
            LinkAction::Random => {
                let mut bytes = Box::new([0; 64]);
                for chunk in bytes.chunks_mut(8) {
                    chunk.copy_from_slice(&self.random.any().to_be_bytes());
                }
                let event = Event::Link(LinkEvent::Random(bytes));
                self.wishes.push(Wish::Event(Box::new(event)));
            }
            LinkAction::Log(line) => self.log.push(line),
            LinkAction::Established { data, meta, version, features, .. } => {
                let context = Context { version, features, integrity: None };
                self.send_context = context;
                self.attach = None;
                self.is_receiving = true;
                for (place, (socket, stream)) in
                    [(data, Stream::Data), (meta, Stream::Meta)].into_iter().enumerate()
                {
                    let mut reader = Reader::new(stream, Phase::Running);
                    reader.context = context;
                    self.receiving.remove(&socket);
                    self.streams[place] = Some((socket, reader));
                }
            }
        }
    }

    fn send(
        &mut self,
        stream: Stream,
        volume: u16,
        mut packet: Packet,
        payload: Option<SendData>,
        token: Option<SendToken>,
    ) {
        let place = usize::from(stream == Stream::Meta);
        let Some((socket, _)) = &self.streams[place] else { return };
        let Some(conn) = self.conn_of(*socket) else { return };
        let data = match payload {
            None => Tags::default(),
            Some(SendData::Buf(buf)) => {
                self.bufs.get(buf).cloned().unwrap_or_else(|| panic!("{buf:?} is not lent"))
            }
            Some(SendData::Zeroes(len)) => {
                std::iter::repeat_n(0, usize::try_from(len.0 / 512).unwrap_or(0)).collect()
            }
        };
        if let Some(algorithm) = self.attach {
            let digest = digest_of(algorithm, &data);
            if let Packet::Data(_, place)
            | Packet::DataReply(_, place)
            | Packet::RsDataReply(_, place) = &mut packet
            {
                *place = digest;
            }
        }
        let mut bytes = Vec::with_capacity(64);
        encode(&self.send_context, volume, &packet, data.len() * 512, &mut bytes);
        self.wishes.push(Wish::Send(conn, Message { bytes, data }, token));
    }

    /// May the next message of this connection be consumed?
    pub fn wants(&self, conn: ConnId) -> bool {
        let Some(socket) = self.socket_of(conn) else { return false };
        if self.receiving.contains_key(&socket) {
            return true;
        }
        match &self.streams {
            [Some((data, _)), _] if *data == socket => self.is_receiving,
            [_, Some((meta, _))] if *meta == socket => true,
            _ => false,
        }
    }

    /// Which of the two streams a connection is, if it is established.
    pub fn stream_of(&self, conn: ConnId) -> Option<Stream> {
        let socket = self.socket_of(conn)?;
        let is = |place: usize| self.streams[place].as_ref().is_some_and(|(s, _)| *s == socket);
        if is(0) { Some(Stream::Data) } else { is(1).then_some(Stream::Meta) }
    }

    /// Does the node know this connection at all?
    pub fn knows(&self, conn: ConnId) -> bool {
        self.socket_of(conn).is_some()
    }

    /// A message was taken from a connection.
    pub fn received(&mut self, conn: ConnId, message: &Message) -> Option<Event> {
        let socket = self.socket_of(conn)?;
        if let Some((phase, context)) = self.receiving.remove(&socket) {
            let mut reader = Reader::new(Stream::Data, phase);
            reader.context = context;
            return Some(Event::Link(match read(&mut reader, &message.bytes) {
                Ok(incoming) => LinkEvent::Packet { socket, packet: incoming.packet },
                Err(error) => LinkEvent::BadPacket { socket, error },
            }));
        }
        for (place, stream) in [Stream::Data, Stream::Meta].into_iter().enumerate() {
            let Some((own, reader)) = &mut self.streams[place] else { continue };
            if *own != socket {
                continue;
            }
            let incoming = match read(reader, &message.bytes) {
                Ok(incoming) => incoming,
                Err(error) => {
                    let how = StreamLoss::Bad { error };
                    return Some(Event::StreamLost { stream, how });
                }
            };
            let integrity = reader.context.integrity;
            let payload = (incoming.data_len > 0).then(|| {
                assert_eq!(incoming.data_len as usize, message.data.len() * 512);
                let digest_ok = integrity.map(|algorithm| {
                    matches!(&incoming.packet, Packet::Data(_, d) | Packet::DataReply(_, d)
                        | Packet::RsDataReply(_, d) if *d == digest_of(algorithm, &message.data))
                });
                let len = ByteLen(u64::from(incoming.data_len));
                Payload { buf: self.buf(message.data.clone()), len, digest_ok }
            });
            let Incoming { volume, packet, .. } = incoming;
            return Some(Event::Packet { stream, volume, packet, payload });
        }
        None
    }

    /// The other side has closed a connection, or it broke.
    pub fn hung_up(&mut self, conn: ConnId, how: HangUp) -> Option<Event> {
        let socket = self.socket_of(conn)?;
        for (place, stream) in [Stream::Data, Stream::Meta].into_iter().enumerate() {
            if self.streams[place].as_ref().is_some_and(|(s, _)| *s == socket) {
                let how = match how {
                    HangUp::ShutDown => StreamLoss::Closed,
                    HangUp::Reset => StreamLoss::Reset,
                    HangUp::Failed(errno) => StreamLoss::ReceiveFailed(errno),
                };
                return Some(Event::StreamLost { stream, how });
            }
        }
        Some(Event::Link(LinkEvent::Closed { socket, how }))
    }

    // ---- disks ----

    /// Carries out a disk operation. `mark`: what a flush in it covers, from [`SimDisk::mark`] when
    /// it was given to the disk.
    pub fn do_disk(
        &mut self,
        volume: VolumeNr,
        op: &DiskOp,
        mark: u64,
    ) -> Result<DiskAnswer, IoFailure> {
        if self.open.get(&volume.0) != Some(&true) {
            return Err(IoFailure::Gone);
        }
        let Some(disk) = self.disks.get_mut(&volume.0) else { return Err(IoFailure::Gone) };
        if disk.is_dead {
            return Err(IoFailure::Device(5));
        }
        let mut answer = DiskAnswer::default();
        match *op {
            DiskOp::Read { range, .. } if disk.is_bad(range.start.0, range.len.0) => {
                return Err(IoFailure::Device(5));
            }
            DiskOp::Read { range, buf, check_zero, digest } => {
                let data = disk.read(range.start.0, range.len.0);
                answer.is_zero = check_zero.then(|| data.iter().all(|tag| *tag == 0));
                answer.digest = digest.and_then(|which| {
                    let algorithm = match which {
                        DigestUse::Csums => self.algorithms.0,
                        DigestUse::Verify => self.algorithms.1,
                    };
                    algorithm.map(|algorithm| digest_of(algorithm, &data))
                });
                match buf {
                    Some(buf) => {
                        if let Some(place) = self.bufs.get_mut(buf) {
                            *place = data;
                        }
                    }
                    None => answer.buf = Some(self.buf(data)),
                }
            }
            DiskOp::Write { range, buf, flags } => {
                let data = self.bufs.get(buf).unwrap_or_else(|| panic!("{buf:?} is not lent"));
                assert_eq!(data.len() as u64, range.len.0, "buffer and range differ");
                if flags.preflush {
                    disk.flush(Part::Data, mark);
                }
                if flags.fua {
                    disk.write_through(range.start.0, data.clone());
                } else {
                    disk.write(range.start.0, data.clone());
                }
            }
            DiskOp::Discard { range } | DiskOp::WriteZeroes { range, .. } => {
                let zeroes: Tags = std::iter::repeat_n(0, len(range)).collect();
                disk.write(range.start.0, zeroes);
            }
            DiskOp::Flush => disk.flush(Part::Data, mark),
        }
        Ok(answer)
    }

    /// Carries out a meta-data operation.
    pub fn do_meta(
        &mut self,
        volume: VolumeNr,
        op: &MetaOp,
        mark: u64,
    ) -> Result<MetaAnswer, IoFailure> {
        if *op == MetaOp::Close {
            self.open.insert(volume.0, false);
            return Ok(MetaAnswer::Done);
        }
        let Some(disk) = self.disks.get_mut(&volume.0) else {
            return Err(IoFailure::Open(drbd_types::Failure::OpenBackingDevice));
        };
        let opened = Opened {
            backing: SectorCount(disk.sectors),
            meta_device: ByteLen(disk.meta_len),
            placement: Placement::FlexExternal,
            limits: DiskLimits {
                max_io: 1 << 20,
                can_discard: true,
                discard_granularity: 4096,
                logical_block: 512,
                physical_block: 512,
            },
        };
        if disk.is_dead {
            return Err(match op {
                MetaOp::Open => IoFailure::Open(drbd_types::Failure::OpenBackingDevice),
                _ => IoFailure::Device(5),
            });
        }
        match op {
            MetaOp::Open => {
                self.open.insert(volume.0, true);
                return Ok(MetaAnswer::Opened(opened));
            }
            MetaOp::Measure => return Ok(MetaAnswer::Opened(opened)),
            MetaOp::Close => {}
            MetaOp::Read { at, blocks } => {
                let found = (0..*blocks).filter_map(|index| {
                    let block = disk.read_block(at.0 + u64::from(index) * 4096)?;
                    block.iter().any(|b| *b != 0).then(|| (index, Box::new(*block)))
                });
                return Ok(MetaAnswer::Blocks(found.collect()));
            }
            MetaOp::Write { at, block, stable } => {
                if *stable {
                    disk.flush(Part::Meta, mark);
                }
                disk.write_block(at.0, **block, *stable);
            }
            MetaOp::Fill { at, blocks, value } => {
                for index in 0..*blocks {
                    disk.write_block(at.0 + u64::from(index) * 4096, [*value; 4096], false);
                }
            }
            MetaOp::Flush => disk.flush(Part::Meta, mark),
        }
        Ok(MetaAnswer::Done)
    }
}

fn len(range: SectorRange) -> usize {
    usize::try_from(range.len.0).unwrap_or(0)
}

/// The "digest" of simulated data: of the numbers, with the length of the algorithm.
fn digest_of(algorithm: Algorithm, data: &[u64]) -> Digest {
    let bytes: Vec<u8> = data.iter().flat_map(|tag| tag.to_be_bytes()).collect();
    let crc = crc32c::crc32c(&bytes).to_be_bytes();
    let repeated: Vec<u8> = crc.iter().copied().cycle().take(algorithm.len()).collect();
    Digest::new(&repeated).unwrap_or(Digest::NONE)
}

/// One whole message through a reader.
fn read(reader: &mut Reader, mut bytes: &[u8]) -> Result<Incoming, drbd_wire::PeerError> {
    loop {
        let Want::Inline(want) = reader.want() else { unreachable!("data is taken at once") };
        let Some((now, rest)) = bytes.split_at_checked(want) else {
            return Err(drbd_wire::PeerError::Padding);
        };
        bytes = rest;
        if let Some(incoming) = reader.feed(now)? {
            if incoming.data_len > 0 {
                reader.data_done();
            }
            return Ok(incoming);
        }
    }
}
