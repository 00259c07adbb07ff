//! The engine under a plain shell: threads, blocking sockets, a disk in memory. For tests against
//! the kernel that look at the engine alone; the daemon's data plane is another matter.

use std::collections::{BTreeMap, VecDeque};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use drbd_core::Engine;
use drbd_core::action::{Action, AppError, DigestUse, DiskOp, Handler, MetaOp, SendData};
use drbd_core::admin::{Command, Reply};
use drbd_core::engine::status::{Status, VolumeStatus};
use drbd_core::event::{
    AppOp, AppRequest, DiskAnswer, DiskLimits, Event, IoFailure, MetaAnswer, Opened, Payload,
    StreamLoss, WriteFlags,
};
use drbd_core::ids::{AppId, BufId, SocketId, Ticket};
use drbd_core::link::{HangUp, LinkAction, LinkEvent};
use drbd_core::resync::dependency::{Row, Table};
use drbd_types::{ByteLen, Fields, Sector, SectorCount, SectorRange, Tick, VolumeNr};
use drbd_wire::frame::Phase;
use drbd_wire::{Algorithm, Context, Packet, Reader, Stream, Want, encode};
use drbdmeta::layout::Placement;

/// How long [`ThinNode::wait`] and commands may take.
pub const DEADLINE: Duration = Duration::from_secs(60);

enum Input {
    Event(Event),
    /// From an established stream of this generation.
    Stream(SocketId, Event),
    Ask(Box<dyn FnOnce(&mut Shell) + Send>),
    Stop,
}

/// A node with one resource.
#[derive(Debug)]
pub struct ThinNode {
    input: Sender<Input>,
    log: Arc<Mutex<Vec<String>>>,
    next: u32,
}

/// Addresses of the connection.
#[derive(Clone, Copy, Debug)]
pub struct Addresses {
    /// Where this node listens.
    pub own: SocketAddr,
    /// Where it connects to.
    pub peer: SocketAddr,
}

/// A disk in memory, as an image with internal meta-data.
pub type Image = Vec<u8>;

impl ThinNode {
    /// Starts a node. `images` are the disks of the volumes.
    pub fn start(addresses: Addresses, images: BTreeMap<u16, Image>) -> Self {
        let (input, receiver) = channel();
        let log = Arc::new(Mutex::new(Vec::new()));
        let own = input.clone();
        let lines = Arc::clone(&log);
        thread::spawn(move || Shell::new(addresses, images, own, lines).run(&receiver));
        Self { input, log, next: 0 }
    }

    fn ask<R: Send + 'static>(
        &self,
        question: impl FnOnce(&mut Shell) -> R + Send + 'static,
    ) -> Result<R> {
        let (answer, receiver) = channel();
        let ask = Box::new(move |shell: &mut Shell| {
            let _ = answer.send(question(shell));
        });
        self.input.send(Input::Ask(ask)).ok().context("the node has died")?;
        receiver.recv_timeout(DEADLINE).context("the node does not answer")
    }

    /// Gives a command.
    ///
    /// # Errors
    /// It is not answered in time.
    pub fn command(&mut self, command: Command) -> Result<Reply> {
        let text = format!("{command:?}");
        let ticket = self.begin_command(command)?;
        self.finish_command(ticket, &text)
    }

    /// Begins a command.
    ///
    /// # Errors
    /// The node has died.
    pub fn begin_command(&mut self, command: Command) -> Result<Ticket> {
        self.next += 1;
        let ticket = Ticket(self.next);
        self.input.send(Input::Event(Event::Admin { ticket, command })).ok().context("dead")?;
        Ok(ticket)
    }

    /// Waits for the answer of a command.
    ///
    /// # Errors
    /// It is not answered in time.
    pub fn finish_command(&self, ticket: Ticket, what: &str) -> Result<Reply> {
        let start = Instant::now();
        while start.elapsed() < DEADLINE {
            if let Some(reply) = self.ask(move |shell| shell.replies.remove(&ticket.0))? {
                return Ok(reply);
            }
            thread::sleep(Duration::from_millis(5));
        }
        bail!("no answer to {what}\n{}", self.log())
    }

    /// Gives a command that must not be refused.
    ///
    /// # Errors
    /// It is refused.
    pub fn ok(&mut self, command: Command) -> Result<()> {
        let text = format!("{command:?}");
        let reply = self.command(command)?;
        if !(1..=4).contains(&reply.code) {
            bail!("{text}: {reply:?}\n{}", self.log());
        }
        Ok(())
    }

    /// The present moment.
    ///
    /// # Errors
    /// The node has died.
    pub fn status(&self) -> Result<Status> {
        self.ask(|shell| shell.engine.status())
    }

    /// State of volume 0.
    ///
    /// # Errors
    /// The node has died.
    pub fn state(&self) -> Result<Fields> {
        self.state_of(0)
    }

    /// State of a volume.
    ///
    /// # Errors
    /// The node has died.
    pub fn state_of(&self, volume: u16) -> Result<Fields> {
        let status = self.status()?;
        let found = status.volumes.iter().find(|v| v.nr.0 == volume);
        Ok(found.map_or(Fields::NEW, |v| v.state))
    }

    /// Waits until volume 0 is in such a state.
    ///
    /// # Errors
    /// It does not come to that.
    pub fn wait(&self, what: &str, holds: impl FnMut(&Fields) -> bool) -> Result<()> {
        self.wait_of(0, what, holds)
    }

    /// Waits until a volume is in such a state.
    ///
    /// # Errors
    /// It does not come to that.
    pub fn wait_of(
        &self,
        volume: u16,
        what: &str,
        mut holds: impl FnMut(&Fields) -> bool,
    ) -> Result<()> {
        let start = Instant::now();
        loop {
            let state = self.state_of(volume)?;
            if holds(&state) {
                return Ok(());
            }
            if start.elapsed() > DEADLINE {
                bail!("waited in vain for {what}: {state:?}\n{}", self.log());
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// All log lines so far.
    pub fn log(&self) -> String {
        self.log.lock().map(|lines| lines.join("\n")).unwrap_or_default()
    }

    /// A request of the application, to its end.
    ///
    /// # Errors
    /// It fails, or does not end.
    pub fn request(&mut self, volume: u16, op: AppOp) -> Result<Option<Vec<u8>>> {
        let id = self.begin(volume, op)?;
        self.finish(id)
    }

    /// Begins a request.
    ///
    /// # Errors
    /// The node has died.
    pub fn begin(&mut self, volume: u16, op: AppOp) -> Result<u64> {
        self.next += 1;
        let id = u64::from(self.next);
        self.ask(move |shell| {
            if let AppOp::Read { buf, .. } = op {
                shell.reads.insert(id, buf);
            }
            shell.pending.push_back(Event::App(AppRequest {
                id: AppId(id),
                volume: VolumeNr(volume),
                op,
            }));
        })?;
        Ok(id)
    }

    /// Waits for the end of a request.
    ///
    /// # Errors
    /// It fails, or does not end.
    pub fn finish(&self, id: u64) -> Result<Option<Vec<u8>>> {
        let start = Instant::now();
        while start.elapsed() < DEADLINE {
            if let Some(result) = self.ask(move |shell| shell.completed.remove(&id))? {
                return result.map_err(|error| anyhow::anyhow!("the request failed: {error:?}"));
            }
            thread::sleep(Duration::from_millis(1));
        }
        bail!("the request did not end: {:?}\n{}", self.state()?, self.log())
    }

    /// A write.
    ///
    /// # Errors
    /// It fails.
    pub fn write(&mut self, sector: u64, data: Vec<u8>) -> Result<()> {
        let op = self.write_op(sector, data)?;
        self.request(0, op).map(drop)
    }

    /// A write that is not begun.
    ///
    /// # Errors
    /// The node has died.
    pub fn write_op(&self, sector: u64, data: Vec<u8>) -> Result<AppOp> {
        let range = range(sector, data.len() as u64 / 512)?;
        let buf = self.ask(move |shell| shell.buf(data))?;
        Ok(AppOp::Write { range, buf, flags: WriteFlags::default() })
    }

    /// A read.
    ///
    /// # Errors
    /// It fails.
    pub fn read(&mut self, sector: u64, sectors: u64) -> Result<Vec<u8>> {
        let range = range(sector, sectors)?;
        let len = usize::try_from(sectors * 512)?;
        let buf = self.ask(move |shell| shell.buf(vec![0; len]))?;
        self.request(0, AppOp::Read { range, buf })?.context("no data")
    }

    /// What a disk holds.
    ///
    /// # Errors
    /// There is no such disk.
    pub fn image(&self, volume: u16) -> Result<Image> {
        self.ask(move |shell| shell.images.get(&volume).cloned())?.context("no such disk")
    }

    /// Changes a disk behind the engine's back.
    ///
    /// # Errors
    /// The node has died.
    pub fn set_image(&self, volume: u16, image: Image) -> Result<()> {
        self.ask(move |shell| shell.images.insert(volume, image)).map(drop)
    }

    /// The node vanishes as in a crash: nothing more is sent or written. Returns its disks.
    ///
    /// # Errors
    /// It has died before.
    pub fn kill(self) -> Result<BTreeMap<u16, Image>> {
        let images = self.ask(|shell| {
            for connection in shell.sockets.values() {
                let _ = connection.stream.shutdown(Shutdown::Both);
            }
            shell.is_dead = true;
            std::mem::take(&mut shell.images)
        })?;
        let _ = self.input.send(Input::Stop);
        Ok(images)
    }

    /// Exit codes of handlers; 0 for the others.
    ///
    /// # Errors
    /// The node has died.
    pub fn set_handler(&self, handler: Handler, exit: i32) -> Result<()> {
        self.ask(move |shell| shell.exits.push((handler, exit)))
    }

    /// Handlers that were called.
    ///
    /// # Errors
    /// The node has died.
    pub fn calls(&self) -> Result<Vec<Handler>> {
        self.ask(|shell| shell.calls.clone())
    }
}

impl Drop for ThinNode {
    fn drop(&mut self) {
        let _ = self.input.send(Input::Stop);
    }
}

/// A range of sectors.
///
/// # Errors
/// It wraps.
pub fn range(sector: u64, sectors: u64) -> Result<SectorRange> {
    SectorRange::new(Sector(sector), SectorCount(sectors)).context("range")
}

struct Connection {
    stream: TcpStream,
    /// Orders for the thread that reads.
    reader: Sender<Order>,
    writer: Sender<Vec<u8>>,
}

enum Order {
    One(Phase, Context),
    Run(Stream, Context, Arc<Mutex<Option<Algorithm>>>),
}

struct Shell {
    addresses: Addresses,
    engine: Engine,
    images: BTreeMap<u16, Image>,
    input: Sender<Input>,
    log: Arc<Mutex<Vec<String>>>,
    start: Instant,
    bufs: BTreeMap<u32, Vec<u8>>,
    next_buf: u32,
    sockets: BTreeMap<SocketId, Connection>,
    next_socket: Arc<Mutex<u32>>,
    listener: Option<Arc<Mutex<bool>>>,
    streams: [Option<SocketId>; 2],
    context: Context,
    attach: Option<Algorithm>,
    /// What the reading threads expect; shared with them.
    expect: Arc<Mutex<Option<Algorithm>>>,
    algorithms: (Option<Algorithm>, Option<Algorithm>),
    replies: BTreeMap<u32, Reply>,
    completed: BTreeMap<u64, Result<Option<Vec<u8>>, AppError>>,
    reads: BTreeMap<u64, BufId>,
    exits: Vec<(Handler, i32)>,
    calls: Vec<Handler>,
    pending: VecDeque<Event>,
    is_dead: bool,
    has_changed: bool,
}

/// Another one for each engine: one that comes back after a crash must not begin generations of data
/// that were there before.
fn new_seed() -> u64 {
    static ENGINES: AtomicU64 = AtomicU64::new(0);
    let engine = ENGINES.fetch_add(1, Ordering::Relaxed);
    u64::from(std::process::id()) << 32 | engine
}

impl Shell {
    fn new(
        addresses: Addresses,
        images: BTreeMap<u16, Image>,
        input: Sender<Input>,
        log: Arc<Mutex<Vec<String>>>,
    ) -> Self {
        Self {
            addresses,
            engine: Engine::new(new_seed()),
            images,
            input,
            log,
            start: Instant::now(),
            bufs: BTreeMap::new(),
            next_buf: 0,
            sockets: BTreeMap::new(),
            next_socket: Arc::new(Mutex::new(0)),
            listener: None,
            streams: [None, None],
            context: Context::FRESH,
            attach: None,
            expect: Arc::new(Mutex::new(None)),
            algorithms: (None, None),
            replies: BTreeMap::new(),
            completed: BTreeMap::new(),
            reads: BTreeMap::new(),
            exits: Vec::new(),
            calls: Vec::new(),
            pending: VecDeque::new(),
            is_dead: false,
            has_changed: false,
        }
    }

    fn now(&self) -> Tick {
        Tick(u64::try_from(self.start.elapsed().as_micros()).unwrap_or(u64::MAX))
    }

    fn run(mut self, input: &Receiver<Input>) {
        loop {
            let wait = self.engine.next_deadline().map_or(Duration::from_secs(1), |at| {
                Duration::from_micros(at.0.saturating_sub(self.now().0))
            });
            match input.recv_timeout(wait) {
                Ok(Input::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                _ if self.is_dead => {}
                Ok(Input::Event(event)) => self.pending.push_back(event),
                Ok(Input::Stream(socket, event)) => {
                    if self.streams.contains(&Some(socket)) {
                        self.pending.push_back(self.with_payload(event));
                    }
                }
                Ok(Input::Ask(question)) => question(&mut self),
                Err(RecvTimeoutError::Timeout) => self.pending.push_back(Event::Timer),
            }
            while let Some(event) = self.next_event() {
                let now = self.now();
                let mut actions = Vec::new();
                self.engine.handle(now, event, &mut actions);
                for action in actions {
                    self.obey(action);
                }
            }
        }
    }

    /// The next event; when there is none, volumes that wait for another one are looked at.
    fn next_event(&mut self) -> Option<Event> {
        if self.pending.is_empty() && std::mem::take(&mut self.has_changed) {
            let volumes = self.engine.status().volumes;
            let row = |v: &VolumeStatus| (v.minor, Row::new(&v.state, v.config.resync_after));
            let turns = Table(volumes.iter().map(row).collect()).settle();
            self.pending.extend(turns.into_iter().filter_map(|turn| {
                let volume = volumes.iter().find(|v| v.minor == turn.minor)?.nr;
                Some(Event::Dependency { volume, must_wait: turn.aftr_isp })
            }));
        }
        self.pending.pop_front()
    }

    /// Payload numbers of reading threads are looked up in a common store.
    const fn with_payload(&self, event: Event) -> Event {
        event
    }

    fn buf(&mut self, data: Vec<u8>) -> BufId {
        self.next_buf += 1;
        self.bufs.insert(self.next_buf, data);
        BufId(self.next_buf)
    }

    fn obey(&mut self, action: Action) {
        match action {
            Action::Disk { io, volume, op } => {
                let result = self.do_disk(volume.0, &op);
                self.pending.push_back(Event::Disk { io, result });
            }
            Action::Meta { io, volume, op } => {
                let result = self.do_meta(volume.0, &op);
                self.pending.push_back(Event::Meta { io, result });
            }
            Action::Link(action) => self.link(action),
            Action::Send { stream, volume, mut packet, payload, token } => {
                let data = match payload {
                    None => Vec::new(),
                    Some(SendData::Buf(buf)) => self.bufs.get(&buf.0).cloned().unwrap_or_default(),
                    Some(SendData::Zeroes(len)) => vec![0; usize::try_from(len.0).unwrap_or(0)],
                };
                if let Some(algorithm) = self.attach
                    && let Packet::Data(_, digest)
                    | Packet::DataReply(_, digest)
                    | Packet::RsDataReply(_, digest) = &mut packet
                {
                    *digest = algorithm.digest(&data);
                }
                let mut bytes = Vec::new();
                encode(&self.context, volume, &packet, data.len(), &mut bytes);
                bytes.extend_from_slice(&data);
                let socket = self.streams[usize::from(stream == Stream::Meta)];
                if let Some(connection) = socket.and_then(|s| self.sockets.get(&s)) {
                    let _ = connection.writer.send(bytes);
                }
                if let Some(token) = token {
                    self.pending.push_back(Event::Sent { token });
                }
            }
            Action::Receive(_) => {}
            Action::ExpectDigest(algorithm) => {
                if let Ok(mut expect) = self.expect.lock() {
                    *expect = algorithm;
                }
            }
            Action::AttachDigest(algorithm) => self.attach = algorithm,
            Action::DigestAlgorithms { csums, verify } => self.algorithms = (csums, verify),
            Action::CompleteApp { id, result, data } => {
                let own = self.reads.remove(&id.0).and_then(|buf| self.bufs.remove(&buf.0));
                let data = match data {
                    Some(buf) => self.bufs.remove(&buf.0),
                    None => own,
                };
                self.completed.insert(id.0, result.map(|()| data));
            }
            Action::FreeBuf(buf) => {
                self.bufs.remove(&buf.0);
            }
            Action::Call { call, handler, .. } => {
                self.calls.push(handler);
                let exit = self.exits.iter().rev().find(|(h, _)| *h == handler).map_or(0, |h| h.1);
                self.pending.push_back(Event::Handler { call, exit });
            }
            Action::Reply { ticket, reply } => {
                self.replies.insert(ticket.0, reply);
            }
            Action::Log(line) => {
                if let Ok(mut log) = self.log.lock() {
                    let at = self.start.elapsed().as_secs_f64();
                    log.push(format!("{at:9.3} {}", line.text));
                }
            }
            Action::Changed => self.has_changed = true,
            Action::Device { .. } => {}
        }
    }

    // ---- sockets ----

    fn link(&mut self, action: LinkAction) {
        match action {
            LinkAction::Listen => self.listen(),
            LinkAction::StopListening => {
                if let Some(stop) = self.listener.take()
                    && let Ok(mut stop) = stop.lock()
                {
                    *stop = true;
                }
            }
            LinkAction::Connect { attempt } => {
                let (input, peer) = (self.input.clone(), self.addresses.peer);
                thread::spawn(move || {
                    let ask = match TcpStream::connect_timeout(&peer, Duration::from_secs(3)) {
                        Ok(stream) => Input::Ask(Box::new(move |shell: &mut Self| {
                            let socket = shell.take(stream);
                            let event = LinkEvent::Connected { attempt, socket };
                            shell.pending.push_back(Event::Link(event));
                        })),
                        Err(_) => Input::Event(Event::Link(LinkEvent::ConnectFailed { attempt })),
                    };
                    let _ = input.send(ask);
                });
            }
            LinkAction::CancelConnect { .. } | LinkAction::Failed { .. } => {}
            LinkAction::Send { socket, context, packet } => {
                let mut bytes = Vec::new();
                encode(&context, 0, &packet, 0, &mut bytes);
                if let Some(connection) = self.sockets.get(&socket) {
                    let _ = connection.writer.send(bytes);
                }
            }
            LinkAction::Receive { socket, phase, context } => {
                if let Some(connection) = self.sockets.get(&socket) {
                    let _ = connection.reader.send(Order::One(phase, context));
                }
            }
            LinkAction::Close { socket } => {
                for stream in &mut self.streams {
                    if *stream == Some(socket) {
                        *stream = None;
                    }
                }
                if let Some(connection) = self.sockets.remove(&socket) {
                    // What was handed over is still sent: the thread that writes closes.
                    drop(connection.writer);
                }
            }
            LinkAction::Random => {
                let mut bytes = Box::new([0; 64]);
                let mut seed =
                    u64::from(self.start.elapsed().subsec_nanos()) ^ u64::from(std::process::id());
                for byte in bytes.iter_mut() {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    *byte = seed.to_be_bytes()[0];
                }
                self.pending.push_back(Event::Link(LinkEvent::Random(bytes)));
            }
            LinkAction::Log(line) => {
                if let Ok(mut log) = self.log.lock() {
                    log.push(line.text);
                }
            }
            LinkAction::Established { data, meta, version, features, .. } => {
                self.context = Context { version, features, integrity: None };
                self.attach = None;
                self.expect = Arc::new(Mutex::new(None));
                self.streams = [Some(data), Some(meta)];
                for (socket, stream) in [(data, Stream::Data), (meta, Stream::Meta)] {
                    if let Some(connection) = self.sockets.get(&socket) {
                        let _ = connection.stream.set_nodelay(true);
                        let expect = Arc::clone(&self.expect);
                        let _ = connection.reader.send(Order::Run(stream, self.context, expect));
                    }
                }
            }
        }
    }

    fn listen(&mut self) {
        let stop = Arc::new(Mutex::new(false));
        self.listener = Some(Arc::clone(&stop));
        let (input, own) = (self.input.clone(), self.addresses.own);
        let start = Instant::now();
        // The socket of the attempt before may not be closed yet.
        let listener = loop {
            match TcpListener::bind(own) {
                Ok(listener) => break listener,
                Err(error) if start.elapsed() > Duration::from_secs(5) => {
                    let errno = error.raw_os_error().unwrap_or(0);
                    let event = Event::Link(LinkEvent::ListenFailed { errno });
                    self.pending.push_back(event);
                    return;
                }
                Err(_) => thread::sleep(Duration::from_millis(20)),
            }
        };
        thread::spawn(move || {
            let _ = listener.set_nonblocking(true);
            while !stop.lock().is_ok_and(|stop| *stop) {
                match listener.accept() {
                    Ok((stream, _)) => {
                        let _ = stream.set_nonblocking(false);
                        let ask = Input::Ask(Box::new(move |shell: &mut Self| {
                            let socket = shell.take(stream);
                            let event = LinkEvent::Accepted { socket };
                            shell.pending.push_back(Event::Link(event));
                        }));
                        if input.send(ask).is_err() {
                            return;
                        }
                    }
                    Err(_) => thread::sleep(Duration::from_millis(5)),
                }
            }
        });
    }

    fn take(&mut self, stream: TcpStream) -> SocketId {
        let socket = {
            let mut next = self.next_socket.lock().expect("never poisoned");
            *next += 1;
            SocketId(*next)
        };
        let (reader, orders) = channel();
        let (writer, parts) = channel::<Vec<u8>>();
        let mut out = stream.try_clone().expect("a second handle");
        thread::spawn(move || {
            while let Ok(part) = parts.recv() {
                if out.write_all(&part).is_err() {
                    break;
                }
            }
            let _ = out.shutdown(Shutdown::Both);
        });
        let input = self.input.clone();
        let incoming = stream.try_clone().expect("a second handle");
        thread::spawn(move || read_socket(socket, incoming, &orders, &input));
        self.sockets.insert(socket, Connection { stream, reader, writer });
        socket
    }

    // ---- disks ----

    fn do_disk(&mut self, volume: u16, op: &DiskOp) -> Result<DiskAnswer, IoFailure> {
        let Some(image) = self.images.get_mut(&volume) else { return Err(IoFailure::Gone) };
        let bytes = |range: SectorRange| {
            let start = usize::try_from(range.start.0 * 512).unwrap_or(usize::MAX);
            start..start + usize::try_from(range.len.0 * 512).unwrap_or(0)
        };
        let mut answer = DiskAnswer::default();
        match *op {
            DiskOp::Read { range, buf, check_zero, digest } => {
                let data = image[bytes(range)].to_vec();
                answer.is_zero = check_zero.then(|| data.iter().all(|b| *b == 0));
                answer.digest = digest.and_then(|which| {
                    let algorithm = match which {
                        DigestUse::Csums => self.algorithms.0,
                        DigestUse::Verify => self.algorithms.1,
                    };
                    algorithm.map(|algorithm| algorithm.digest(&data))
                });
                match buf {
                    Some(buf) => {
                        self.bufs.insert(buf.0, data);
                    }
                    None => answer.buf = Some(self.buf(data)),
                }
            }
            DiskOp::Write { range, buf, .. } => {
                let Some(data) = self.bufs.get(&buf.0) else { return Err(IoFailure::Gone) };
                image[bytes(range)].copy_from_slice(data);
            }
            DiskOp::Discard { range } | DiskOp::WriteZeroes { range, .. } => {
                image[bytes(range)].fill(0);
            }
            DiskOp::Flush => {}
        }
        Ok(answer)
    }

    fn do_meta(&mut self, volume: u16, op: &MetaOp) -> Result<MetaAnswer, IoFailure> {
        let Some(image) = self.images.get_mut(&volume) else {
            return Err(IoFailure::Open(drbd_types::Failure::OpenBackingDevice));
        };
        let place = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
        match op {
            MetaOp::Open | MetaOp::Measure => {
                let len = image.len() as u64;
                return Ok(MetaAnswer::Opened(Opened {
                    backing: SectorCount(len / 512),
                    meta_device: ByteLen(len),
                    placement: Placement::Internal,
                    limits: DiskLimits {
                        max_io: 1 << 20,
                        can_discard: true,
                        discard_granularity: 4096,
                        logical_block: 512,
                        physical_block: 4096,
                    },
                }));
            }
            MetaOp::Close | MetaOp::Flush => {}
            MetaOp::Read { at, blocks } => {
                let mut found = Vec::new();
                for index in 0..*blocks {
                    let at = place(at.0 + u64::from(index) * 4096);
                    let Some(block) = image.get(at..at + 4096) else { break };
                    if block.iter().any(|b| *b != 0)
                        && let Ok(block) = block.try_into()
                    {
                        found.push((index, Box::new(block)));
                    }
                }
                return Ok(MetaAnswer::Blocks(found));
            }
            MetaOp::Write { at, block, .. } => {
                image[place(at.0)..place(at.0) + 4096].copy_from_slice(&block[..]);
            }
            MetaOp::Fill { at, blocks, value } => {
                let len = place(u64::from(*blocks) * 4096);
                image[place(at.0)..place(at.0) + len].fill(*value);
            }
        }
        Ok(MetaAnswer::Done)
    }
}

/// The thread that reads one socket: one packet at a time, then all.
fn read_socket(
    socket: SocketId,
    mut stream: TcpStream,
    orders: &Receiver<Order>,
    input: &Sender<Input>,
) {
    let closed = |how| Input::Event(Event::Link(LinkEvent::Closed { socket, how }));
    loop {
        match orders.recv_timeout(Duration::from_millis(20)) {
            Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => {
                // Nobody reads, but a closed connection is to be noticed.
                let _ = stream.set_read_timeout(Some(Duration::from_millis(1)));
                let peeked = stream.peek(&mut [0]);
                let _ = stream.set_read_timeout(None);
                if let Ok(0) = peeked {
                    let _ = input.send(closed(HangUp::ShutDown));
                    return;
                }
            }
            Ok(Order::One(phase, context)) => {
                let mut reader = Reader::new(Stream::Data, phase);
                reader.context = context;
                let event = match read_packet(&mut stream, &mut reader) {
                    Ok((_, packet, _)) => LinkEvent::Packet { socket, packet },
                    Err(Broken::Bad(error)) => LinkEvent::BadPacket { socket, error },
                    Err(Broken::Ended) => {
                        let _ = input.send(closed(HangUp::ShutDown));
                        return;
                    }
                };
                let _ = input.send(Input::Event(Event::Link(event)));
            }
            Ok(Order::Run(which, context, expect)) => {
                run_stream(socket, &mut stream, which, context, &expect, input);
                return;
            }
        }
    }
}

enum Broken {
    Ended,
    Bad(drbd_wire::PeerError),
}

fn run_stream(
    socket: SocketId,
    stream: &mut TcpStream,
    which: Stream,
    context: Context,
    expect: &Arc<Mutex<Option<Algorithm>>>,
    input: &Sender<Input>,
) {
    let mut reader = Reader::new(which, Phase::Running);
    reader.context = context;
    loop {
        let event = match read_packet(stream, &mut reader) {
            Ok((volume, packet, data)) => {
                if let Packet::Protocol(params) | Packet::ProtocolUpdate(params) = &packet {
                    // What the engine will order; the next packet may be here already.
                    reader.context.integrity = Algorithm::from_name(&params.integrity_alg);
                    let _ = expect;
                }
                let digest_ok = match (&packet, reader.context.integrity) {
                    (
                        Packet::Data(_, d) | Packet::DataReply(_, d) | Packet::RsDataReply(_, d),
                        Some(algorithm),
                    ) => Some(*d == algorithm.digest(&data)),
                    _ => None,
                };
                let ask = Input::Ask(Box::new(move |shell: &mut Shell| {
                    if !shell.streams.contains(&Some(socket)) {
                        return;
                    }
                    let len = ByteLen(data.len() as u64);
                    let payload = (!data.is_empty()).then(|| Payload {
                        buf: shell.buf(data),
                        len,
                        digest_ok,
                    });
                    let event = Event::Packet { stream: which, volume, packet, payload };
                    shell.pending.push_back(event);
                }));
                if input.send(ask).is_err() {
                    return;
                }
                continue;
            }
            Err(Broken::Bad(error)) => StreamLoss::Bad { error },
            Err(Broken::Ended) => StreamLoss::Closed,
        };
        let event = Event::StreamLost { stream: which, how: event };
        let _ = input.send(Input::Stream(socket, event));
        return;
    }
}

fn read_packet(
    stream: &mut TcpStream,
    reader: &mut Reader,
) -> Result<(u16, Packet, Vec<u8>), Broken> {
    loop {
        let Want::Inline(want) = reader.want() else { return Err(Broken::Ended) };
        let mut bytes = vec![0; want];
        stream.read_exact(&mut bytes).map_err(|_| Broken::Ended)?;
        let Some(incoming) = reader.feed(&bytes).map_err(Broken::Bad)? else { continue };
        let mut data = vec![0; incoming.data_len as usize];
        if incoming.data_len > 0 {
            stream.read_exact(&mut data).map_err(|_| Broken::Ended)?;
            reader.data_done();
        }
        return Ok((incoming.volume, incoming.packet, data));
    }
}

/// A port of the loopback that was free a moment ago.
///
/// # Errors
/// There is none.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}
