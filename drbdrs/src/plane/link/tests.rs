//! Tests of the sockets, on both implementations of I/O.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use drbd_core::config::NetConfig;
use drbd_core::ids::BufId;
use drbd_core::link::{Link as Machine, LinkConfig};
use drbd_types::Sector;
use drbd_wire::packet::{AckKind, BarrierId, Block, BlockAck, BlockDesc, DpFlags, Features};
use drbd_wire::{BlockId, Digest, PeerError};

use super::super::ZEROES_LEN;
use super::super::buf::{Pool, PoolSize, Zone};
use super::super::fault::Faults;
use super::super::io::{Backend, Choice, backend};
use super::*;

/// Version 101 with all features.
const AGREED: Context = Context { version: 101, features: Features::OURS, integrity: None };

/// One node: sockets, and if it has one, the machine that establishes the connection.
struct Node {
    io: Box<dyn Backend>,
    pool: Pool,
    faults: Faults,
    zeroes: BufId,
    link: Link,
    machine: Option<Machine>,
    events: Vec<Event>,
    start: Instant,
    /// What was neither for the machine nor asked for yet.
    got: Vec<Event>,
    is_up: bool,
}

impl Node {
    fn new(choice: Choice) -> Option<Self> {
        let io = match backend(choice) {
            Ok(io) => io,
            Err(_) if choice == Choice::Ring => return None,
            Err(error) => panic!("{error}"),
        };
        let mut pool = Pool::new(PoolSize { net: 4 << 20, ..PoolSize::default() }).unwrap();
        let zeroes = pool.alloc(Zone::Meta, ZEROES_LEN).unwrap();
        Some(Self {
            io,
            pool,
            faults: Faults::new(1),
            zeroes,
            link: Link::new(),
            machine: None,
            events: Vec::new(),
            start: Instant::now(),
            got: Vec::new(),
            is_up: false,
        })
    }

    /// With an established connection to two sockets of the test.
    fn connected(choice: Choice) -> Option<(Self, TcpStream, TcpStream)> {
        let mut node = Self::new(choice)?;
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let mut ends = Vec::new();
        let mut ids = Vec::new();
        for _ in 0..2 {
            let theirs = TcpStream::connect(at).unwrap();
            theirs.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            ends.push(theirs);
            let ours = Fd::new(listener.accept().unwrap().0.into());
            ids.push(node.with(|link, env| link.insert(env, ours)));
        }
        let (version, features) = (101, Features::OURS);
        let (data, meta, we_resolve_conflicts) = (ids[0], ids[1], true);
        node.act(LinkAction::Established { data, meta, version, features, we_resolve_conflicts });
        let meta = ends.pop().unwrap();
        Some((node, ends.pop().unwrap(), meta))
    }

    fn now(&self) -> Tick {
        Tick(u64::try_from(self.start.elapsed().as_micros()).unwrap())
    }

    fn with<T>(&mut self, act: impl FnOnce(&mut Link, &mut Env<'_>) -> T) -> T {
        let now = self.now();
        let mut env = Env {
            io: &mut *self.io,
            pool: &mut self.pool,
            faults: &mut self.faults,
            zeroes: self.zeroes,
            digests: [None, None],
            now,
            events: &mut self.events,
        };
        act(&mut self.link, &mut env)
    }

    fn act(&mut self, action: LinkAction) {
        self.is_up |= matches!(action, LinkAction::Established { .. });
        self.with(|link, env| link.act(env, action));
    }

    fn tell(&mut self, event: Event) {
        let now = self.now();
        let mut actions = Vec::new();
        match (&mut self.machine, event) {
            (Some(machine), Event::Link(event)) => machine.handle(now, event, &mut actions),
            (_, event) => self.got.push(event),
        }
        actions.into_iter().for_each(|action| self.act(action));
    }

    /// One round of the plane's loop.
    fn turn(&mut self, limit: Duration) {
        self.with(Link::tick);
        loop {
            for event in std::mem::take(&mut self.events) {
                self.tell(event);
            }
            match self.with(Link::poll) {
                Some(event) => self.tell(event),
                None if self.events.is_empty() => break,
                None => {}
            }
        }
        let now = self.now();
        if let Some(machine) = &mut self.machine
            && machine.next_deadline().is_some_and(|at| at <= now)
        {
            let mut actions = Vec::new();
            machine.on_timer(now, &mut actions);
            actions.into_iter().for_each(|action| self.act(action));
        }
        self.with(Link::flush);
        let mut done = Vec::new();
        self.io.wait(Some(limit), &mut done).unwrap();
        for done in done {
            self.with(|link, env| link.done(env, done.tag.key, done.op, done.result));
        }
    }

    /// System calls for sending.
    fn sends(&self) -> u32 {
        self.link.sockets.values().map(|socket| socket.tx.sends).sum()
    }

    /// Turns until something came that fits.
    fn wait(&mut self, fits: impl Fn(&Event) -> bool) -> Event {
        for _ in 0..2000 {
            if let Some(at) = self.got.iter().position(&fits) {
                return self.got.remove(at);
            }
            self.turn(Duration::from_millis(5));
        }
        panic!("nothing came that fits: {:?}", self.got);
    }

    fn packet(&mut self) -> (Stream, Packet, Option<drbd_core::event::Payload>) {
        match self.wait(|event| matches!(event, Event::Packet { .. })) {
            Event::Packet { stream, packet, payload, .. } => (stream, packet, payload),
            _ => unreachable!(),
        }
    }

    fn loss(&mut self) -> (Stream, StreamLoss) {
        match self.wait(|event| matches!(event, Event::StreamLost { .. })) {
            Event::StreamLost { stream, how } => (stream, how),
            _ => unreachable!(),
        }
    }

    fn send(&mut self, stream: Stream, packet: Packet, data: Option<SendData>, token: Option<u64>) {
        let token = token.map(SendToken);
        self.with(|link, env| link.send(env, stream, 0, packet, data, token));
    }

    /// After closing, everything is given back.
    fn finish(mut self) {
        let ids: Vec<_> = self.link.sockets.keys().copied().collect();
        for id in ids {
            self.act(LinkAction::Close { socket: SocketId(id) });
        }
        self.act(LinkAction::StopListening);
        for _ in 0..200 {
            if self.io.in_flight() == 0 {
                break;
            }
            self.turn(Duration::from_millis(5));
        }
        assert_eq!(self.io.in_flight(), 0);
        self.pool.release(self.zeroes);
        assert!(self.pool.is_idle(), "buffers are lost");
    }
}

fn block(sector: u64) -> Block {
    Block { sector: Sector(sector), id: BlockId([1; 8]), seq: 1, flags: DpFlags::empty() }
}

fn ack(seq: u32) -> Packet {
    let ack = BlockAck { sector: Sector(8), id: BlockId([2; 8]), size: 4096, seq };
    Packet::Ack(AckKind::WriteAck, ack)
}

fn bytes_of(context: &Context, packet: &Packet, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    drbd_wire::encode(context, 0, packet, data.len(), &mut bytes);
    bytes.extend_from_slice(data);
    bytes
}

fn on_both(test: impl Fn(Node, TcpStream, TcpStream)) {
    for choice in [Choice::Ring, Choice::Threads] {
        match Node::connected(choice) {
            Some((node, data, meta)) => test(node, data, meta),
            None => println!("skipped: no ring here"),
        }
    }
}

#[test]
fn two_nodes_find_each_other_and_swap_data() {
    for choices in [[Choice::Ring, Choice::Threads], [Choice::Threads, Choice::Ring]] {
        let [Some(mut a), Some(mut b)] = choices.map(Node::new) else { continue };
        let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let (own, peer) = (free(), free());
        let addresses = Addresses { own, peer, send_buffer: 0, receive_buffer: 65_536 };
        a.link.configure(addresses);
        b.link.configure(Addresses { own: peer, peer: own, ..addresses });
        let net = NetConfig {
            cram_hmac_alg: "sha256".into(),
            shared_secret: drbd_core::config::Secret("secret".into()),
            socket_check_timeout: drbd_types::Deciseconds(1),
            connect_int: 1,
            ..NetConfig::default()
        };
        for (seed, node) in [&mut a, &mut b].into_iter().enumerate() {
            let config = LinkConfig::new(&net).unwrap();
            let mut machine = Machine::new(config, seed as u64);
            let mut actions = Vec::new();
            machine.start(node.now(), &mut actions);
            node.machine = Some(machine);
            actions.into_iter().for_each(|action| node.act(action));
        }
        let end = Instant::now() + Duration::from_secs(30);
        while !(a.is_up && b.is_up) {
            assert!(Instant::now() < end, "no connection");
            a.turn(Duration::from_millis(2));
            b.turn(Duration::from_millis(2));
        }
        let buf = a.pool.alloc(Zone::Disk, 1 << 20).unwrap();
        a.pool.bytes_mut(buf).iter_mut().zip(0_u32..).for_each(|(b, n)| *b = n.to_le_bytes()[0]);
        for attach in [None, Some(Algorithm::Sha1)] {
            a.link.attach_digest(attach);
            b.link.expect_digest(attach);
            for n in 0..4 {
                let data = Some(SendData::Buf(buf));
                a.send(Stream::Data, Packet::Data(block(n), Digest::NONE), data, None);
            }
            for n in 0..4 {
                a.turn(Duration::from_millis(1));
                let (_, packet, payload) = loop {
                    b.turn(Duration::from_millis(1));
                    a.turn(Duration::from_millis(1));
                    if b.got.iter().any(|event| matches!(event, Event::Packet { .. })) {
                        break b.packet();
                    }
                };
                let payload = payload.unwrap();
                assert!(matches!(packet, Packet::Data(head, _) if head.sector == Sector(n)));
                assert!(b.pool.bytes(payload.buf) == a.pool.bytes(buf), "block {n}");
                assert_eq!(payload.digest_ok, attach.map(|_| true));
                b.pool.release(payload.buf);
            }
        }
        a.pool.release(buf);
        b.send(Stream::Meta, ack(5), None, None);
        b.turn(Duration::from_millis(1));
        assert_eq!(a.packet().0, Stream::Meta);
        a.finish();
        assert!(matches!(b.loss().1, StreamLoss::Closed | StreamLoss::Reset));
        b.finish();
    }
}

#[test]
fn packets_arrive_in_any_pieces() {
    on_both(|mut node, mut data, meta| {
        let mut all = Vec::new();
        for n in 0..20_u64 {
            let content = vec![u8::try_from(n).unwrap(); usize::try_from(n % 5).unwrap() * 2048];
            all.extend(bytes_of(&AGREED, &Packet::Data(block(n), Digest::NONE), &content));
            all.extend(bytes_of(&AGREED, &Packet::UnplugRemote, &[]));
        }
        let writer = std::thread::spawn(move || {
            for (n, piece) in all.chunks(1777).enumerate() {
                data.write_all(piece).unwrap();
                if n % 4 == 0 {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            data
        });
        for n in 0..20_u64 {
            let (stream, packet, payload) = node.packet();
            assert!(stream == Stream::Data);
            assert!(matches!(packet, Packet::Data(head, _) if head.sector == Sector(n)));
            let len = payload.map_or(0, |payload| {
                let bytes = node.pool.bytes(payload.buf);
                assert!(bytes.iter().all(|b| u64::from(*b) == n));
                let len = bytes.len();
                node.pool.release(payload.buf);
                len as u64
            });
            assert_eq!(len, n % 5 * 2048);
            assert!(matches!(node.packet().1, Packet::UnplugRemote));
        }
        drop((writer.join().unwrap(), meta));
        node.finish();
    });
}

#[test]
fn many_small_packets_leave_with_few_calls_and_tokens_come_in_order() {
    on_both(|mut node, data, mut meta| {
        for n in 0..500 {
            node.send(Stream::Meta, ack(n), None, Some(n.into()));
        }
        let mut tokens = Vec::new();
        while tokens.len() < 500 {
            match node.wait(|event| matches!(event, Event::Sent { .. })) {
                Event::Sent { token } => tokens.push(token.0),
                _ => unreachable!(),
            }
        }
        assert!(tokens.is_sorted() && node.sends() <= 2, "{} sends", node.sends());
        let mut got = vec![0; 500 * 40];
        meta.read_exact(&mut got).unwrap();
        let expected: Vec<_> = (0..500).flat_map(|n| bytes_of(&AGREED, &ack(n), &[])).collect();
        assert!(got == expected);
        drop(data);
        node.finish();
    });
}

#[test]
fn data_zeroes_and_heads_leave_in_order_through_a_slow_reader() {
    on_both(|mut node, mut data, meta| {
        let mut expected = Vec::new();
        for n in 0..40_u32 {
            let buf = node.pool.alloc(Zone::Disk, 128 << 10).unwrap();
            let mark = u8::try_from(n).unwrap();
            node.pool.bytes_mut(buf).fill(mark);
            let packet = Packet::Data(block(n.into()), Digest::NONE);
            expected.extend(bytes_of(&AGREED, &packet, &vec![mark; 128 << 10]));
            node.send(Stream::Data, packet, Some(SendData::Buf(buf)), None);
            node.pool.release(buf);
            let packet = Packet::RsDataReply(block(n.into()), Digest::NONE);
            expected.extend(bytes_of(&AGREED, &packet, &vec![0; 200 << 10]));
            let zeroes = Some(SendData::Zeroes(ByteLen(200 << 10)));
            node.send(Stream::Data, packet, zeroes, Some(n.into()));
            let packet =
                Packet::OutOfSync(BlockDesc { sector: Sector(1), size: 512, undefined: 0 });
            expected.extend(bytes_of(&AGREED, &packet, &[]));
            node.send(Stream::Data, packet, None, None);
        }
        let total = expected.len();
        let reader = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            let mut got = vec![0; total];
            data.read_exact(&mut got).unwrap();
            assert!(got == expected, "bytes differ");
            data
        });
        node.wait(|event| matches!(event, Event::Sent { token: SendToken(39) }));
        while node.link.sockets.values().any(|socket| socket.tx.waiting() > 0) {
            node.turn(Duration::from_millis(5));
        }
        drop((reader.join().unwrap(), meta));
        node.finish();
    });
}

#[test]
fn a_full_transport_is_reported_and_so_is_its_end() {
    on_both(|mut node, mut data, meta| {
        for _ in 0..60 {
            let zeroes = Some(SendData::Zeroes(ByteLen(1 << 20)));
            node.send(Stream::Data, Packet::Data(block(0), Digest::NONE), zeroes, None);
        }
        let report = |event: &Event| matches!(event, Event::SendQueue { .. });
        let Event::SendQueue { waiting, is_congested, moved, .. } = node.wait(report) else {
            unreachable!()
        };
        assert!(is_congested && waiting.0 > 0, "{waiting} {moved}");
        // Nothing moves: the same is said again after a while.
        let later = node.wait(|event| {
            matches!(event, Event::SendQueue { waiting, is_congested: true, .. } if waiting.0 > 0)
        });
        assert!(node.start.elapsed() >= Duration::from_millis(200), "{later:?}");
        let reader = std::thread::spawn(move || {
            let mut got = vec![0; 60 * ((1 << 20) + 40)];
            data.read_exact(&mut got).unwrap();
            data
        });
        let end = node.wait(|event| {
            matches!(event, Event::SendQueue { waiting: ByteLen(0), is_congested: false, .. })
        });
        let total = 60 * ((1 << 20) + 40);
        assert!(matches!(end, Event::SendQueue { moved, .. } if moved == total), "{end:?}");
        drop((reader.join().unwrap(), meta));
        node.finish();
    });
}

#[test]
fn ends_resets_and_garbage_are_told_apart() {
    on_both(|mut node, data, meta| {
        drop(data);
        assert_eq!(node.loss(), (Stream::Data, StreamLoss::Closed));
        drop(meta);
        node.finish();
    });
    on_both(|mut node, data, mut meta| {
        meta.write_all(&[0x55; 16]).unwrap();
        let (stream, how) = node.loss();
        assert!(stream == Stream::Meta);
        assert!(matches!(how, StreamLoss::Bad { error: PeerError::Magic { .. } }), "{how:?}");
        drop(data);
        node.finish();
    });
    on_both(|mut node, mut data, meta| {
        // Unread bytes make a close a reset.
        node.send(Stream::Data, Packet::UnplugRemote, None, Some(1));
        node.wait(|event| matches!(event, Event::Sent { .. }));
        data.write_all(&bytes_of(&AGREED, &Packet::UnplugRemote, &[])).unwrap();
        assert!(matches!(node.packet().1, Packet::UnplugRemote), "delivered before the loss");
        drop(data);
        assert_eq!(node.loss(), (Stream::Data, StreamLoss::Reset));
        drop(meta);
        node.finish();
    });
}

#[test]
fn reading_stops_when_it_is_not_wanted() {
    on_both(|mut node, mut data, mut meta| {
        let unplug = bytes_of(&AGREED, &Packet::UnplugRemote, &[]);
        data.write_all(&unplug).unwrap();
        assert!(matches!(node.packet().1, Packet::UnplugRemote));
        // The receive that is with the kernel already may still bring something.
        node.turn(Duration::ZERO);
        node.link.receive(false);
        data.write_all(&unplug).unwrap();
        assert!(matches!(node.packet().1, Packet::UnplugRemote));
        data.write_all(&unplug).unwrap();
        meta.write_all(&bytes_of(&AGREED, &Packet::Ping, &[])).unwrap();
        assert!(matches!(node.packet().1, Packet::Ping), "the other stream goes on");
        node.turn(Duration::from_millis(20));
        assert!(node.got.is_empty());
        node.link.receive(true);
        assert!(matches!(node.packet().1, Packet::UnplugRemote));
        drop((data, meta));
        node.finish();
    });
}

#[test]
fn a_barrier_waits_for_company_but_not_for_long() {
    on_both(|mut node, mut data, meta| {
        let barrier = |link: &mut Link, env: &mut Env<'_>, n| {
            let packet = Packet::Barrier(BarrierId::from_number(n));
            link.send(env, Stream::Data, 0, packet, None, None);
            link.flush_data(env);
            link.flush(env);
        };
        let until = node.with(|link, env| {
            barrier(link, env, 1);
            assert_eq!(link.next_deadline(), Some(Tick(env.now.0 + BARRIER_HOLD)));
            link.send(env, Stream::Data, 0, Packet::UnplugRemote, None, None);
            link.flush_data(env);
            barrier(link, env, 2);
            link.next_deadline()
        });
        assert_eq!(node.sends(), 1, "the first two together, the third not yet");
        let bytes = |packet: &Packet| bytes_of(&AGREED, packet, &[]);
        let mut expected = bytes(&Packet::Barrier(BarrierId::from_number(1)));
        expected.extend(bytes(&Packet::UnplugRemote));
        expected.extend(bytes(&Packet::Barrier(BarrierId::from_number(2))));
        while until.is_some_and(|until| node.now() < until) {
            std::thread::yield_now();
        }
        node.with(Link::flush);
        let mut got = vec![0; expected.len()];
        data.read_exact(&mut got).unwrap();
        assert_eq!((node.sends(), got), (2, expected));
        assert_eq!(node.with(|link, _| link.next_deadline()), None);
        drop(meta);
        node.finish();
    });
}

#[test]
fn streams_can_be_stalled_and_cut_for_rehearsals() {
    on_both(|mut node, mut data, meta| {
        node.link.set_faults(vec![StreamRule::Stall(Stream::Data)]);
        data.write_all(&bytes_of(&AGREED, &Packet::UnplugRemote, &[])).unwrap();
        node.send(Stream::Data, Packet::UnplugRemote, None, Some(1));
        node.turn(Duration::from_millis(20));
        assert!(node.got.is_empty() && node.sends() == 0, "{:?}", node.got);
        node.link.set_faults(Vec::new());
        assert!(matches!(node.packet().1, Packet::UnplugRemote));
        node.wait(|event| matches!(event, Event::Sent { .. }));
        node.link.cut(Stream::Meta);
        assert_eq!(node.loss(), (Stream::Meta, StreamLoss::Closed));
        drop((data, meta));
        node.finish();
    });
}

#[test]
fn what_is_sent_can_be_late() {
    on_both(|mut node, mut data, meta| {
        let delay = Duration::from_millis(60);
        node.link.set_faults(vec![StreamRule::Delay(Stream::Data, delay)]);
        let start = Instant::now();
        node.send(Stream::Data, Packet::UnplugRemote, None, Some(1));
        node.send(Stream::Data, Packet::UnplugRemote, None, Some(2));
        assert!(node.link.next_deadline().is_some());
        node.wait(|event| matches!(event, Event::Sent { .. }));
        assert!(start.elapsed() >= delay, "{:?}", start.elapsed());
        let unplug = bytes_of(&AGREED, &Packet::UnplugRemote, &[]);
        let mut got = vec![0; 2 * unplug.len()];
        data.read_exact(&mut got).unwrap();
        assert_eq!(got, unplug.repeat(2));
        // What is late goes at once when the fault is over.
        node.link.set_faults(vec![StreamRule::Delay(Stream::Data, Duration::from_secs(1000))]);
        node.send(Stream::Data, Packet::UnplugRemote, None, Some(3));
        node.turn(Duration::from_millis(5));
        node.link.set_faults(Vec::new());
        node.wait(|event| matches!(event, Event::Sent { .. }));
        drop((data, meta));
        node.finish();
    });
}

#[test]
fn packets_of_one_type_can_be_held() {
    on_both(|mut node, mut data, mut meta| {
        node.link.set_faults(vec![StreamRule::Hold(Command::UnplugRemote)]);
        // Sent: those before it go, it and those after it wait.
        let barrier = || Packet::Barrier(BarrierId([1; 4]));
        node.send(Stream::Data, barrier(), None, Some(1));
        node.send(Stream::Data, Packet::UnplugRemote, None, Some(2));
        node.send(Stream::Data, barrier(), None, Some(3));
        node.wait(|event| matches!(event, Event::Sent { .. }));
        node.turn(Duration::from_millis(20));
        assert_eq!(node.sends(), 1);
        // Received: the same, and the other stream goes on.
        let payload = bytes_of(&AGREED, &Packet::Data(block(0), Digest::NONE), &[7; 512]);
        data.write_all(&bytes_of(&AGREED, &Packet::UnplugRemote, &[])).unwrap();
        data.write_all(&payload).unwrap();
        node.turn(Duration::from_millis(20));
        assert!(node.got.is_empty(), "{:?}", node.got);
        meta.write_all(&bytes_of(&AGREED, &Packet::Ping, &[])).unwrap();
        assert!(matches!(node.packet().1, Packet::Ping));
        node.link.set_faults(vec![StreamRule::Hold(Command::Data)]);
        assert!(matches!(node.packet().1, Packet::UnplugRemote));
        node.wait(|event| matches!(event, Event::Sent { token: SendToken(2) }));
        node.wait(|event| matches!(event, Event::Sent { token: SendToken(3) }));
        node.turn(Duration::from_millis(20));
        assert!(node.got.is_empty(), "{:?}", node.got);
        // What is held when the connection ends goes with it, and its memory comes back.
        drop((data, meta));
        node.finish();
    });
}

#[test]
fn data_waits_for_memory() {
    on_both(|mut node, mut data, meta| {
        let packet = bytes_of(&AGREED, &Packet::Data(block(0), Digest::NONE), &vec![3; 1 << 20]);
        let writer = std::thread::spawn(move || {
            (0..8).for_each(|_| data.write_all(&packet).unwrap());
            data
        });
        let mut held = Vec::new();
        // 4 MiB hold three of them and the staging buffer.
        for _ in 0..3 {
            held.push(node.packet().2.unwrap().buf);
        }
        for _ in 0..20 {
            node.turn(Duration::from_millis(1));
        }
        assert!(node.got.is_empty(), "{:?}", node.got);
        for _ in 0..5 {
            node.pool.release(held.remove(0));
            held.push(node.packet().2.unwrap().buf);
        }
        held.into_iter().for_each(|buf| node.pool.release(buf));
        drop((writer.join().unwrap(), meta));
        node.finish();
    });
}

#[test]
fn a_wrong_digest_is_delivered_as_such() {
    on_both(|mut node, mut data, meta| {
        node.link.expect_digest(Some(Algorithm::Crc32c));
        let context = Context { integrity: Some(Algorithm::Crc32c), ..AGREED };
        let digest = Algorithm::Crc32c.digest(&[1; 512]);
        for (content, right) in [([1; 512], true), ([2; 512], false)] {
            data.write_all(&bytes_of(&context, &Packet::Data(block(0), digest), &content)).unwrap();
            let payload = node.packet().2.unwrap();
            assert_eq!(payload.digest_ok, Some(right));
            node.pool.release(payload.buf);
        }
        drop(meta);
        node.finish();
    });
}

#[test]
fn an_address_in_use_is_reported() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let own = taken.local_addr().unwrap();
    let Some(mut node) = Node::new(Choice::Threads) else { return };
    node.link.configure(Addresses { own, peer: own, send_buffer: 0, receive_buffer: 0 });
    node.act(LinkAction::Listen);
    let [Event::Link(LinkEvent::ListenFailed { errno })] = node.events[..] else {
        panic!("{:?}", node.events)
    };
    assert_eq!(errno, libc::EADDRINUSE);
    node.events.clear();
    node.finish();
}
