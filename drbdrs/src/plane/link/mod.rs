//! Sockets to the peer: does what [`LinkAction`]s say, and then carries the two streams.
//!
//! ```text
//!   accept, connect --> socket: one packet at a time, watched for its end while idle
//!                          | Established
//!                          v
//!                       stream: Rx (many packets per receive), Tx (many packets per send)
//! ```
//!
//! Nothing here waits: every operation is with the kernel, and [`Link::poll`] gives out one packet
//! at a time, so that what the engine says about one holds for the next.

mod faults;
mod rx;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

use drbd_core::action::SendData;
use drbd_core::event::{Event, StreamLoss};
use drbd_core::ids::{SendToken, SocketId};
use drbd_core::link::{CHALLENGE_LEN, HangUp, LinkAction, LinkEvent};
use drbd_types::{ByteLen, Tick};
use drbd_wire::frame::Phase;
use drbd_wire::{Algorithm, Command, Context, Packet, Stream};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, Shutdown, SocketFlags, SocketType, sockopt};

use self::faults::StreamFaults;
pub use self::faults::StreamRule;
use self::rx::{Polled, Rx};
use super::Env;
use super::buf::Zone;
use super::io::{Fd, Op, OpKey, Part, Tag};
use super::outbox::Outbox;

/// Where the two nodes are, and how large the buffers of the kernel are to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// Own address.
    pub own: SocketAddr,
    /// The peer's.
    pub peer: SocketAddr,
    /// `sndbuf-size`, bytes; 0: automatic.
    pub send_buffer: u32,
    /// `rcvbuf-size`, bytes; 0: automatic.
    pub receive_buffer: u32,
}

/// How often the state of a send queue that is not empty is reported, microseconds.
const REPORT_EVERY: u64 = 250_000;
/// Pause after an accept for which there was no descriptor, microseconds.
const ACCEPT_PAUSE: u64 = 1_000_000;
/// Bytes after which the transport is asked how much it holds.
const ASK_EVERY: u64 = 65_536;
/// How long a barrier waits for company, microseconds: most often the next write is close behind,
/// and a packet, its answer, and both wake-ups are saved.
const BARRIER_HOLD: u64 = 50;
/// Queue of the listening socket. Spec: wire-protocol.md §1.2.
const BACKLOG: i32 = 5;

/// One socket.
struct Socket {
    fd: Fd,
    rx: Rx,
    tx: Outbox,
    /// How packets to the peer look.
    context: Context,
    mode: Mode,
    /// Waits for anything to read, which may be the end.
    watch: Option<OpKey>,
    sending: Option<OpKey>,
    /// Nothing is sent before.
    held_until: Option<Tick>,
    /// Its end was reported.
    is_dead: bool,
    report: Report,
    /// A received packet that a fault point holds.
    held: Option<(Command, Event)>,
}

impl Socket {
    fn may_send(&self, faults: &StreamFaults) -> bool {
        let is_stalled = match self.mode {
            Mode::Stream(stream) => faults.is_stalled(stream),
            Mode::Idle | Mode::Ready | Mode::One => false,
        };
        self.sending.is_none() && !self.is_dead && !is_stalled
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Nothing is received.
    Idle,
    /// Data is there, but nobody wants it yet.
    Ready,
    /// One packet is wanted.
    One,
    /// Established.
    Stream(Stream),
}

/// What was said about the send queue.
#[derive(Clone, Copy, Debug, Default)]
struct Report {
    is_congested: bool,
    was_waiting: bool,
    due: Option<Tick>,
    asked_at: u64,
}

struct Listener {
    fd: Fd,
    accept: Option<OpKey>,
    retry: Option<Tick>,
}

struct Attempt {
    number: u32,
    fd: Fd,
    key: OpKey,
}

/// What an operation is for; in the tag of its completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    Receive,
    Send,
    Watch,
    Accept,
    Connect,
}

/// The sockets of a resource.
#[derive(Default)]
pub struct Link {
    addresses: Option<Addresses>,
    listener: Option<Listener>,
    listeners: u32,
    attempts: Vec<Attempt>,
    sockets: BTreeMap<u32, Socket>,
    next_socket: u32,
    /// Data and meta stream.
    streams: Option<[SocketId; 2]>,
    is_receiving: bool,
    faults: StreamFaults,
    /// Packets for the meta stream.
    answers: u32,
    /// For reuse.
    encoded: Vec<u8>,
}

impl Link {
    /// Without sockets.
    pub fn new() -> Self {
        Self { is_receiving: true, ..Self::default() }
    }

    /// For the next [`LinkAction::Listen`] and [`LinkAction::Connect`].
    pub const fn configure(&mut self, addresses: Addresses) {
        self.addresses = Some(addresses);
    }

    /// Addresses in use.
    pub const fn addresses(&self) -> Option<Addresses> {
        self.addresses
    }

    /// When [`Self::tick`] is due.
    pub fn next_deadline(&self) -> Option<Tick> {
        let sockets = self.sockets.values();
        let sockets = sockets.flat_map(|socket| [socket.report.due, socket.held_until]);
        let accept = self.listener.as_ref().and_then(|listener| listener.retry);
        let gates = self.sockets.values().filter(|socket| socket.may_send(&self.faults));
        sockets.chain([accept]).flatten().chain(gates.filter_map(|socket| socket.tx.due())).min()
    }

    /// Does what the engine's link wants.
    pub fn act(&mut self, env: &mut Env<'_>, action: LinkAction) {
        match action {
            LinkAction::Listen => {
                if let Err(errno) = self.listen(env) {
                    let errno = errno.raw_os_error();
                    env.events.push(Event::Link(LinkEvent::ListenFailed { errno }));
                }
            }
            LinkAction::StopListening => self.stop_listening(env),
            LinkAction::Connect { attempt } => {
                if let Err(error) = self.connect(env, attempt) {
                    tracing::debug!("connect: {error}");
                    env.events.push(Event::Link(LinkEvent::ConnectFailed { attempt }));
                }
            }
            LinkAction::CancelConnect { attempt } => {
                if let Some(at) = self.attempts.iter().position(|a| a.number == attempt) {
                    env.io.cancel(self.attempts.swap_remove(at).key);
                }
            }
            LinkAction::Send { socket, context, mut packet } => {
                if let Some(socket) = self.sockets.get_mut(&socket.0) {
                    push(env, socket, &mut self.encoded, &context, (0, &mut packet), None, None);
                }
            }
            LinkAction::Receive { socket, phase, context } => {
                self.receive_one(socket, phase, context);
            }
            LinkAction::Close { socket } => self.close(env, socket),
            LinkAction::Random => {
                let random = random_bytes();
                env.events.push(Event::Link(LinkEvent::Random(random)));
            }
            LinkAction::Log(line) => tracing::info!("{}", line.text),
            LinkAction::Established { data, meta, version, features, .. } => {
                let context = Context { version, features, integrity: None };
                self.establish(env, [data, meta], context);
            }
            LinkAction::Failed { reason, .. } => tracing::debug!("link: {reason:?}"),
        }
    }

    /// Queues a packet on a stream. Without a connection it is dropped.
    pub fn send(
        &mut self,
        env: &mut Env<'_>,
        stream: Stream,
        volume: u16,
        mut packet: Packet,
        data: Option<SendData>,
        token: Option<SendToken>,
    ) {
        let Some(id) = self.stream(stream) else { return };
        self.answers += u32::from(stream == Stream::Meta);
        if let Some(socket) = self.sockets.get_mut(&id.0).filter(|socket| !socket.is_dead) {
            let context = socket.context;
            let gate = self.faults.gate(env.now, stream, packet.command(context.version));
            socket.held_until = match packet {
                Packet::Barrier(_) if socket.tx.waiting() == 0 => {
                    Some(Tick(env.now.0.saturating_add(BARRIER_HOLD)))
                }
                _ => None,
            };
            let packet = (volume, &mut packet);
            push(env, socket, &mut self.encoded, &context, packet, data, token);
            if let Some(gate) = gate {
                socket.tx.close_gate(gate);
            }
        }
    }

    /// Does it carry the two streams?
    pub const fn is_established(&self) -> bool {
        self.streams.is_some()
    }

    /// Packets for the meta stream since the last call.
    pub const fn take_answers(&mut self) -> u32 {
        std::mem::replace(&mut self.answers, 0)
    }

    /// Whether the data stream is read.
    pub const fn receive(&mut self, wanted: bool) {
        self.is_receiving = wanted;
    }

    /// Digest of the peer's data packets, from the next one on.
    pub fn expect_digest(&mut self, algorithm: Option<Algorithm>) {
        let id = self.stream(Stream::Data);
        if let Some(socket) = id.and_then(|id| self.sockets.get_mut(&id.0)) {
            socket.rx.expect_digest(algorithm);
        }
    }

    /// Digest of our data packets, from the next one on.
    pub fn attach_digest(&mut self, algorithm: Option<Algorithm>) {
        let id = self.stream(Stream::Data);
        if let Some(socket) = id.and_then(|id| self.sockets.get_mut(&id.0)) {
            socket.context.integrity = algorithm;
        }
    }

    /// Replaces the fault points of this and of later connections.
    pub fn set_faults(&mut self, rules: Vec<StreamRule>) {
        self.faults.set(rules);
        for socket in self.sockets.values_mut() {
            if let Mode::Stream(stream) = socket.mode {
                socket.tx.open_gates(|gate| self.faults.keeps(stream, gate));
            }
        }
    }

    /// A fault point: the connection breaks, now.
    pub fn cut(&mut self, stream: Stream) {
        tracing::warn!("fault point: the {stream:?} stream is cut");
        let id = self.stream(stream);
        if let Some(socket) = id.and_then(|id| self.sockets.get(&id.0)) {
            // Whatever is with the kernel ends by it.
            let _ = rustix::net::shutdown(&socket.fd, Shutdown::Both);
        }
    }

    /// The next packet or end of one of the streams, or of the handshake.
    /// The meta stream comes first: acknowledgements free what data waits for.
    pub fn poll(&mut self, env: &mut Env<'_>) -> Option<Event> {
        if let Some([data, meta]) = self.streams {
            let poll = |link: &mut Self, env: &mut Env<'_>, stream, id: SocketId, wanted| {
                if link.faults.is_stalled(stream) {
                    None
                } else {
                    link.poll_socket(env, id.0, wanted)
                }
            };
            let found = poll(self, env, Stream::Meta, meta, true);
            let is_receiving = self.is_receiving;
            return found.or_else(|| poll(self, env, Stream::Data, data, is_receiving));
        }
        let mut from = 0;
        while let Some((&id, _)) = self.sockets.range(from..).next() {
            if let Some(event) = self.poll_socket(env, id, true) {
                return Some(event);
            }
            from = id + 1;
        }
        None
    }

    /// Sends what is queued for the data stream. Called before this node works for itself: the peer
    /// begins meanwhile.
    pub fn flush_data(&mut self, env: &mut Env<'_>) {
        if let Some([data, _]) = self.streams {
            self.flush_socket(env, data.0);
        }
    }

    /// Sends what is queued. Called once after a round of events, so that many packets go out
    /// together.
    pub fn flush(&mut self, env: &mut Env<'_>) {
        let mut from = 0;
        while let Some((&id, _)) = self.sockets.range(from..).next() {
            self.flush_socket(env, id);
            if let Some(socket) = self.sockets.get_mut(&id) {
                report(env, socket);
            }
            from = id + 1;
        }
    }

    fn flush_socket(&mut self, env: &mut Env<'_>, id: u32) {
        let Some(socket) = self.sockets.get_mut(&id) else { return };
        if socket.held_until.is_some_and(|until| until > env.now) {
            return;
        }
        socket.held_until = None;
        if !socket.may_send(&self.faults) {
            return;
        }
        match socket.tx.flush(env, &socket.fd, tag(Purpose::Send, id)) {
            Ok(sending) => socket.sending = sending,
            Err(errno) => self.send_failed(env, SocketId(id), errno),
        }
    }

    /// What is due by time.
    pub fn tick(&mut self, env: &mut Env<'_>) {
        if let Some(listener) = &mut self.listener
            && listener.retry.is_some_and(|at| at <= env.now)
        {
            listener.retry = None;
            self.accept(env);
        }
    }

    /// An operation has ended.
    pub fn done(&mut self, env: &mut Env<'_>, key: u64, op: Op, result: Result<u32, i32>) {
        let (purpose, id) = from_tag(key);
        match (purpose, op) {
            (Purpose::Accept, Op::Accept { accepted, .. }) => {
                self.accepted(env, id, accepted, result);
            }
            (Purpose::Connect, _) => self.connected(env, id, result),
            (Purpose::Receive, Op::Recv { into, socket }) => match self.sockets.get_mut(&id) {
                Some(socket) => socket.rx.done(env, into, result),
                None => Op::Recv { into, socket }.give_back(env.pool),
            },
            (Purpose::Send, Op::Send { from, socket }) => match self.sockets.get_mut(&id) {
                Some(socket) => {
                    socket.sending = None;
                    if let Err(errno) = socket.tx.done(env, from, result) {
                        self.send_failed(env, SocketId(id), errno);
                    }
                }
                None => Op::Send { from, socket }.give_back(env.pool),
            },
            (Purpose::Watch, _) => self.watched(env, id),
            (_, op) => op.give_back(env.pool),
        }
    }

    fn stream(&self, stream: Stream) -> Option<SocketId> {
        self.streams.map(|[data, meta]| match stream {
            Stream::Data => data,
            Stream::Meta => meta,
        })
    }

    fn listen(&mut self, env: &mut Env<'_>) -> Result<(), Errno> {
        self.stop_listening(env);
        let addresses = self.addresses.ok_or(Errno::ADDRNOTAVAIL)?;
        let fd = new_socket(&addresses)?;
        sockopt::set_socket_reuseaddr(&fd, true)?;
        rustix::net::bind(&fd, &addresses.own)?;
        rustix::net::listen(&fd, BACKLOG)?;
        self.listeners = self.listeners.wrapping_add(1);
        self.listener = Some(Listener { fd: Fd::new(fd), accept: None, retry: None });
        self.accept(env);
        Ok(())
    }

    fn accept(&mut self, env: &mut Env<'_>) {
        if let Some(listener) = &mut self.listener {
            let op = Op::Accept { socket: Fd::clone(&listener.fd), accepted: None };
            listener.accept = Some(env.io.submit(tag(Purpose::Accept, self.listeners), op));
        }
    }

    fn stop_listening(&mut self, env: &mut Env<'_>) {
        if let Some(listener) = self.listener.take() {
            // Refuses from now on, whenever the last reference goes.
            let _ = rustix::net::shutdown(&listener.fd, Shutdown::Both);
            if let Some(key) = listener.accept {
                env.io.cancel(key);
            }
        }
    }

    fn accepted(
        &mut self,
        env: &mut Env<'_>,
        listener: u32,
        accepted: Option<OwnedFd>,
        result: Result<u32, i32>,
    ) {
        if self.listener.is_none() || listener != self.listeners {
            return;
        }
        match (accepted, result) {
            (Some(fd), Ok(_)) => {
                let socket = self.insert(env, Fd::new(fd));
                env.events.push(Event::Link(LinkEvent::Accepted { socket }));
                self.accept(env);
            }
            // The client was gone before it was accepted.
            (_, Err(libc::ECONNABORTED | libc::EINTR | libc::EAGAIN)) => self.accept(env),
            // No descriptor or memory for now.
            (_, result) => {
                let errno = result.err().unwrap_or(libc::EIO);
                tracing::warn!(
                    "accept: {}; trying again in a second",
                    Errno::from_raw_os_error(errno)
                );
                if let Some(listener) = &mut self.listener {
                    listener.accept = None;
                    listener.retry = Some(Tick(env.now.0.saturating_add(ACCEPT_PAUSE)));
                }
            }
        }
    }

    fn connect(&mut self, env: &mut Env<'_>, attempt: u32) -> Result<(), Errno> {
        let addresses = self.addresses.ok_or(Errno::ADDRNOTAVAIL)?;
        let fd = new_socket(&addresses)?;
        let mut own = addresses.own;
        own.set_port(0);
        rustix::net::bind(&fd, &own)?;
        let fd = Fd::new(fd);
        let op = Op::Connect { socket: Fd::clone(&fd), to: addresses.peer };
        let key = env.io.submit(tag(Purpose::Connect, attempt), op);
        self.attempts.push(Attempt { number: attempt, fd, key });
        Ok(())
    }

    fn connected(&mut self, env: &mut Env<'_>, attempt: u32, result: Result<u32, i32>) {
        let Some(at) = self.attempts.iter().position(|a| a.number == attempt) else { return };
        let known = self.attempts.swap_remove(at);
        let event = match result {
            Ok(_) => LinkEvent::Connected { attempt, socket: self.insert(env, known.fd) },
            Err(errno) => {
                tracing::debug!("connect: {}", Errno::from_raw_os_error(errno));
                LinkEvent::ConnectFailed { attempt }
            }
        };
        env.events.push(Event::Link(event));
    }

    fn insert(&mut self, env: &mut Env<'_>, fd: Fd) -> SocketId {
        let id = self.next_socket;
        self.next_socket = id.checked_add(1).expect("2^32 connections take a century");
        // Acknowledgements must not wait for each other. Failing means that the socket is dead,
        // which shows with its first use.
        let _ = sockopt::set_tcp_nodelay(&fd, true);
        let mut socket = Socket {
            fd,
            rx: Rx::new(),
            tx: Outbox::new(Zone::Net),
            context: Context::FRESH,
            mode: Mode::Idle,
            watch: None,
            sending: None,
            held_until: None,
            is_dead: false,
            report: Report::default(),
            held: None,
        };
        watch(env, &mut socket, id);
        self.sockets.insert(id, socket);
        SocketId(id)
    }

    fn receive_one(&mut self, id: SocketId, phase: Phase, context: Context) {
        if let Some(socket) = self.sockets.get_mut(&id.0) {
            socket.rx.expect_one(phase, context);
            socket.mode = Mode::One;
        }
    }

    fn establish(&mut self, env: &mut Env<'_>, ids: [SocketId; 2], context: Context) {
        self.streams = Some(ids);
        self.is_receiving = true;
        for (id, stream) in ids.into_iter().zip([Stream::Data, Stream::Meta]) {
            if let Some(socket) = self.sockets.get_mut(&id.0) {
                socket.mode = Mode::Stream(stream);
                socket.context = context;
                socket.rx.become_stream(env, stream, context);
                socket.tx.start_count();
            }
        }
    }

    fn close(&mut self, env: &mut Env<'_>, id: SocketId) {
        let Some(mut socket) = self.sockets.remove(&id.0) else { return };
        if self.streams.is_some_and(|ids| ids.contains(&id)) {
            self.streams = None;
        }
        // The peer is to know at once, not when the last operation has ended.
        let _ = rustix::net::shutdown(&socket.fd, Shutdown::Both);
        let keys = [socket.watch, socket.sending, socket.rx.in_flight()];
        keys.into_iter().flatten().for_each(|key| env.io.cancel(key));
        socket.rx.drop_all(env);
        socket.tx.drop_all(env);
        if let Some((_, Event::Packet { payload: Some(payload), .. })) = socket.held {
            env.pool.release(payload.buf);
        }
    }

    fn poll_socket(&mut self, env: &mut Env<'_>, id: u32, may_receive: bool) -> Option<Event> {
        let socket = self.sockets.get_mut(&id)?;
        let is_wanted = matches!(socket.mode, Mode::One | Mode::Stream(_));
        // One reader per socket: first the watcher has to come back.
        if !is_wanted || socket.watch.is_some() || socket.is_dead {
            return None;
        }
        if let Some((command, event)) = socket.held.take() {
            if !self.faults.holds(command) {
                return Some(event);
            }
            socket.held = Some((command, event));
            return None;
        }
        let tag = tag(Purpose::Receive, id);
        let polled = socket.rx.poll(env, &socket.fd, tag, may_receive);
        match (socket.mode, polled) {
            (_, Polled::Nothing) => None,
            (Mode::Stream(stream), Polled::Packet(incoming, payload)) => {
                let command = incoming.packet.command(socket.context.version);
                let (volume, packet) = (incoming.volume, incoming.packet);
                let event = Event::Packet { stream, volume, packet, payload };
                if self.faults.holds(command) {
                    socket.held = Some((command, event));
                    return None;
                }
                Some(event)
            }
            (Mode::Stream(stream), Polled::Lost(how)) => {
                socket.is_dead = true;
                Some(Event::StreamLost { stream, how })
            }
            (_, Polled::Packet(incoming, _)) => {
                socket.mode = Mode::Idle;
                watch(env, socket, id);
                let (socket, packet) = (SocketId(id), incoming.packet);
                Some(Event::Link(LinkEvent::Packet { socket, packet }))
            }
            (_, Polled::Lost(loss)) => {
                socket.is_dead = true;
                Some(Event::Link(loss_of_socket(SocketId(id), loss)))
            }
        }
    }

    /// Something is to be read on an idle socket: its end?
    fn watched(&mut self, env: &mut Env<'_>, id: u32) {
        let Some(socket) = self.sockets.get_mut(&id) else { return };
        socket.watch = None;
        if socket.mode != Mode::Idle || socket.is_dead {
            return;
        }
        let mut byte = [0];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let how = match rustix::net::recv(&socket.fd, &mut byte, flags) {
            Ok((_, 1..)) => {
                socket.mode = Mode::Ready;
                return;
            }
            Err(Errno::AGAIN | Errno::INTR) => return watch(env, socket, id),
            Ok(_) => HangUp::ShutDown,
            Err(Errno::CONNRESET) => HangUp::Reset,
            Err(errno) => HangUp::Failed(errno.raw_os_error()),
        };
        socket.is_dead = true;
        env.events.push(Event::Link(LinkEvent::Closed { socket: SocketId(id), how }));
    }

    fn send_failed(&mut self, env: &mut Env<'_>, id: SocketId, errno: i32) {
        let Some(socket) = self.sockets.get_mut(&id.0) else { return };
        if std::mem::replace(&mut socket.is_dead, true) {
            return;
        }
        socket.tx.drop_all(env);
        env.events.push(match socket.mode {
            Mode::Stream(stream) => {
                let how = match errno {
                    libc::ECONNRESET | libc::EPIPE => StreamLoss::Reset,
                    errno => StreamLoss::SendFailed(errno),
                };
                Event::StreamLost { stream, how }
            }
            Mode::Idle | Mode::Ready | Mode::One => {
                let how = match errno {
                    libc::ECONNRESET | libc::EPIPE => HangUp::Reset,
                    errno => HangUp::Failed(errno),
                };
                Event::Link(LinkEvent::Closed { socket: id, how })
            }
        });
    }
}

/// Encodes a packet and queues it.
fn push(
    env: &mut Env<'_>,
    socket: &mut Socket,
    encoded: &mut Vec<u8>,
    context: &Context,
    (volume, packet): (u16, &mut Packet),
    data: Option<SendData>,
    token: Option<SendToken>,
) {
    attach_digest(env, context, packet, data);
    let data_len = match data {
        None => 0,
        Some(SendData::Buf(buf)) => env.pool.len(buf),
        Some(SendData::Zeroes(len)) => usize::try_from(len.0).unwrap_or(usize::MAX),
    };
    encoded.clear();
    drbd_wire::encode(context, volume, packet, data_len, encoded);
    socket.tx.push(env, encoded, data, token);
}

/// The digest that the connection wants. Spec: wire-protocol.md §11.2.
fn attach_digest(env: &Env<'_>, context: &Context, packet: &mut Packet, data: Option<SendData>) {
    let (
        Some(algorithm),
        Packet::Data(_, digest) | Packet::DataReply(_, digest) | Packet::RsDataReply(_, digest),
    ) = (context.integrity, packet)
    else {
        return;
    };
    *digest = match data {
        None => algorithm.digest(&[]),
        Some(SendData::Buf(buf)) => algorithm.digest(env.pool.bytes(buf)),
        // Rare, and of at most a few sizes: not worth a second way to compute digests.
        Some(SendData::Zeroes(len)) => {
            algorithm.digest(&vec![0; usize::try_from(len.0).unwrap_or(0)])
        }
    };
}

fn loss_of_socket(socket: SocketId, loss: StreamLoss) -> LinkEvent {
    let how = match loss {
        StreamLoss::Bad { error } => return LinkEvent::BadPacket { socket, error },
        StreamLoss::Closed => HangUp::ShutDown,
        StreamLoss::Reset => HangUp::Reset,
        StreamLoss::ReceiveFailed(errno) | StreamLoss::SendFailed(errno) => HangUp::Failed(errno),
    };
    LinkEvent::Closed { socket, how }
}

/// Tells the engine about the send queue of a stream, when there is something to tell.
fn report(env: &mut Env<'_>, socket: &mut Socket) {
    let Mode::Stream(stream) = socket.mode else { return };
    if socket.is_dead {
        socket.report.due = None;
        return;
    }
    let (waiting, moved) = (socket.tx.waiting() as u64, socket.tx.moved());
    let report = &mut socket.report;
    let is_due = report.due.is_some_and(|due| due <= env.now);
    let is_emptied = report.was_waiting && waiting == 0;
    // Asking the transport costs a system call: by time, and by amount.
    let asks = is_due || is_emptied || socket.tx.is_full() || moved - report.asked_at >= ASK_EVERY;
    if !asks {
        if waiting > 0 && report.due.is_none() && socket.held_until.is_none() {
            report.due = Some(Tick(env.now.0.saturating_add(REPORT_EVERY)));
        }
        return;
    }
    report.asked_at = moved;
    let in_transport = super::sys::unsent_bytes(&socket.fd).unwrap_or(0);
    let buffer = sockopt::socket_send_buffer_size(&socket.fd).unwrap_or(0) as u64;
    let is_congested = (waiting + in_transport) * 2 > buffer.max(1);
    let has_crossed = is_congested != report.is_congested;
    let is_busy = waiting > 0 || is_congested;
    if is_due || is_emptied || has_crossed {
        let waiting_all = if waiting > 0 { waiting + in_transport } else { 0 };
        let waiting = ByteLen(waiting_all);
        env.events.push(Event::SendQueue { stream, waiting, is_congested, moved });
    }
    *report = Report {
        is_congested,
        was_waiting: waiting > 0 && (report.was_waiting || is_due || has_crossed),
        due: match report.due {
            Some(due) if is_busy && !is_due => Some(due),
            _ if is_busy => Some(Tick(env.now.0.saturating_add(REPORT_EVERY))),
            _ => None,
        },
        asked_at: moved,
    };
}

fn watch(env: &mut Env<'_>, socket: &mut Socket, id: u32) {
    let op = Op::Readable { file: Fd::clone(&socket.fd) };
    socket.watch = Some(env.io.submit(tag(Purpose::Watch, id), op));
}

fn new_socket(addresses: &Addresses) -> Result<OwnedFd, Errno> {
    let family = match addresses.own.ip() {
        IpAddr::V4(_) => AddressFamily::INET,
        IpAddr::V6(_) => AddressFamily::INET6,
    };
    let fd = rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // The options mean the kernel's own figure, which is twice what is asked for.
    if addresses.send_buffer > 0 {
        let half = addresses.send_buffer as usize / 2;
        sockopt::set_socket_send_buffer_size_force(&fd, half)
            .or_else(|_| sockopt::set_socket_send_buffer_size(&fd, half))?;
    }
    if addresses.receive_buffer > 0 {
        let half = addresses.receive_buffer as usize / 2;
        sockopt::set_socket_recv_buffer_size_force(&fd, half)
            .or_else(|_| sockopt::set_socket_recv_buffer_size(&fd, half))?;
    }
    Ok(fd)
}

fn random_bytes() -> Box<[u8; CHALLENGE_LEN]> {
    let mut random = Box::new([0; CHALLENGE_LEN]);
    let mut got = 0;
    while got < random.len() {
        match rustix::rand::getrandom(&mut random[got..], rustix::rand::GetRandomFlags::empty()) {
            Ok(more) => got += more,
            Err(Errno::INTR) => {}
            Err(errno) => panic!("the kernel has no random numbers: {errno}"),
        }
    }
    random
}

fn tag(purpose: Purpose, id: u32) -> Tag {
    Tag { part: Part::Link, key: (purpose as u64) << 32 | u64::from(id) }
}

fn from_tag(key: u64) -> (Purpose, u32) {
    let purpose = match key >> 32 {
        0 => Purpose::Receive,
        1 => Purpose::Send,
        2 => Purpose::Watch,
        3 => Purpose::Accept,
        _ => Purpose::Connect,
    };
    (purpose, u32::try_from(key & 0xFFFF_FFFF).unwrap_or(0))
}
