//! Two nodes and a network that delays, loses, cuts and lets strangers in. Afterwards both must
//! have chosen the same two connections, with opposite flags, and keep them.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec;
use alloc::vec::Vec;

use drbd_types::{Deciseconds, Tick};
use drbd_wire::packet::Features;
use drbd_wire::{Algorithm, Reader, Stream, Want, encode};
use proptest::prelude::*;

use super::pair_reference::Reference;
use super::*;
use crate::config::Secret;

const MS: u64 = 1000;
const S: u64 = 1_000_000;

/// What the world is like.
#[derive(Clone, Debug)]
struct Setting {
    seed: u64,
    /// Who goes step by step, as the original does.
    is_reference: [bool; 2],
    /// Longest way of a packet, µs.
    delay_max: u64,
    /// All ways take the longest time: both nodes stay in step.
    is_even: bool,
    /// Until then packets and connections get lost, nodes restart, strangers come.
    faults_until: u64,
    /// The node whose port can not be reached, and whether it answers (with a reset) at all.
    unreachable: Option<(usize, bool)>,
    versions: [RangeInclusive<u32>; 2],
    features: [u32; 2],
    secret: Option<Algorithm>,
}

#[derive(Debug)]
enum Happening {
    Timer(usize),
    Syn { from: usize, attempt: u32 },
    Accepted { conn: usize, node: usize },
    Event(usize, LinkEvent),
    Bytes { conn: usize, node: usize, bytes: Vec<u8> },
    Fin { conn: usize, node: usize, how: HangUp },
    Restart(usize),
    Stranger(usize),
    Watchdog(usize, SocketId),
}

/// One end of a connection.
#[derive(Debug)]
struct End {
    socket: SocketId,
    is_open: bool,
    incoming: Vec<u8>,
    reader: Option<Reader>,
    /// Nothing arrives before what was sent earlier.
    last_arrival: u64,
}

/// The ends at the two nodes; strangers have none.
#[derive(Debug, Default)]
struct Conn {
    ends: [Option<End>; 2],
    /// Nothing passes any more, and nobody is told.
    is_dead: bool,
    /// It was never accepted, and the opener is told.
    is_refused: bool,
    /// What came before it was accepted.
    queued: Vec<u8>,
    queued_fin: Option<HangUp>,
}

/// Who it is.
#[derive(Debug)]
enum Peer {
    Ours(Link),
    Reference(Reference),
}

impl Peer {
    fn new(setting: &Setting, node: usize, seed: u64) -> Self {
        let config = config(setting, node);
        if setting.is_reference[node] {
            return Self::Reference(Reference::new(config, seed));
        }
        Self::Ours(Link::new(config, seed))
    }

    fn start(&mut self, now: Tick, out: &mut Vec<LinkAction>) {
        match self {
            Self::Ours(link) => link.start(now, out),
            Self::Reference(reference) => reference.start(now, out),
        }
    }

    fn on_timer(&mut self, now: Tick, out: &mut Vec<LinkAction>) {
        match self {
            Self::Ours(link) => link.on_timer(now, out),
            Self::Reference(reference) => reference.on_timer(now, out),
        }
    }

    fn handle(&mut self, now: Tick, event: LinkEvent, out: &mut Vec<LinkAction>) {
        match self {
            Self::Ours(link) => link.handle(now, event, out),
            Self::Reference(reference) => reference.handle(now, event, out),
        }
    }

    fn next_deadline(&self) -> Option<Tick> {
        match self {
            Self::Ours(link) => link.next_deadline(),
            Self::Reference(reference) => reference.next_deadline(),
        }
    }

    fn is_backlog_full(&self) -> bool {
        match self {
            Self::Ours(_) => false,
            Self::Reference(reference) => reference.is_backlog_full(),
        }
    }

    fn stream_of(&self, socket: SocketId) -> Option<Stream> {
        match self {
            Self::Ours(link) => link.stream_of(socket),
            Self::Reference(reference) => reference.stream_of(socket),
        }
    }
}

#[derive(Debug)]
struct Node {
    link: Peer,
    is_listening: bool,
    attempt: Option<u32>,
    /// For which deadline there is a [`Happening::Timer`].
    timer: Option<Tick>,
    sockets: BTreeMap<SocketId, usize>,
    next_socket: u32,
    up: Option<Up>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Up {
    conns: [usize; 2],
    version: u32,
    features: Features,
    we_resolve_conflicts: bool,
}

struct World {
    setting: Setting,
    now: u64,
    number: u64,
    queue: BTreeMap<(u64, u64), Happening>,
    random: Coin,
    nodes: [Node; 2],
    conns: Vec<Conn>,
}

impl World {
    fn new(setting: Setting) -> Self {
        let mut random = Coin(setting.seed);
        let nodes = [0, 1].map(|node| Node {
            link: Peer::new(&setting, node, word(&mut random)),
            is_listening: false,
            attempt: None,
            timer: None,
            sockets: BTreeMap::new(),
            next_socket: 0,
            up: None,
        });
        let queue = BTreeMap::new();
        let mut world = Self { setting, now: 0, number: 0, queue, random, nodes, conns: vec![] };
        world.start(0);
        let late = if world.setting.is_even { 0 } else { world.below(3 * S) };
        world.push(late, Happening::Restart(1));
        let mut at = 0;
        while world.setting.faults_until > 0 {
            at += world.below(20 * S);
            if at > world.setting.faults_until {
                break;
            }
            let node = usize::from(world.random.heads());
            let what = match world.below(4) {
                0 => Happening::Restart(node),
                _ => Happening::Stranger(node),
            };
            world.push(at, what);
        }
        world
    }

    fn below(&mut self, limit: u64) -> u64 {
        word(&mut self.random) % limit.max(1)
    }

    /// One of so many, as long as there are faults.
    fn fault(&mut self, one_of: u64) -> bool {
        self.now < self.setting.faults_until && self.below(one_of) == 0
    }

    fn delay(&mut self) -> u64 {
        if self.setting.is_even {
            return self.setting.delay_max;
        }
        1 + self.below(self.setting.delay_max)
    }

    fn push(&mut self, at: u64, what: Happening) {
        self.number += 1;
        self.queue.insert((at, self.number), what);
    }

    fn step(&mut self) {
        let ((at, _), what) = self.queue.pop_first().expect("there is always something to come");
        self.now = at;
        match what {
            Happening::Timer(node) => self.drive(node, |link, now, out| link.on_timer(now, out)),
            Happening::Syn { from, attempt } => self.on_syn(from, attempt),
            Happening::Accepted { conn, node } => self.on_accepted(conn, node),
            Happening::Event(node, event) => self.event(node, event),
            Happening::Bytes { conn, node, bytes } => self.on_bytes(conn, node, &bytes),
            Happening::Fin { conn, node, how } => self.on_fin(conn, node, how),
            Happening::Restart(node) => self.restart(node),
            Happening::Stranger(node) => self.stranger(node),
            Happening::Watchdog(node, meta) => self.watchdog(node, meta),
        }
    }

    fn drive(&mut self, node: usize, f: impl FnOnce(&mut Peer, Tick, &mut Vec<LinkAction>)) {
        let mut out = vec![];
        f(&mut self.nodes[node].link, Tick(self.now), &mut out);
        for action in out {
            self.act(node, action);
        }
        let next = self.nodes[node].link.next_deadline();
        if next != self.nodes[node].timer {
            self.nodes[node].timer = next;
            if let Some(at) = next {
                self.push(at.0.max(self.now), Happening::Timer(node));
            }
        }
    }

    fn start(&mut self, node: usize) {
        self.drive(node, |link, now, out| link.start(now, out));
    }

    /// Events of sockets that are closed are not reported.
    fn event(&mut self, node: usize, event: LinkEvent) {
        let socket = match &event {
            LinkEvent::Packet { socket, .. }
            | LinkEvent::BadPacket { socket, .. }
            | LinkEvent::Closed { socket, .. } => Some(*socket),
            LinkEvent::Connected { attempt, .. } | LinkEvent::ConnectFailed { attempt } => {
                self.nodes[node].attempt.take_if(|open| open == attempt);
                None
            }
            LinkEvent::ListenFailed { .. } | LinkEvent::Accepted { .. } | LinkEvent::Random(_) => {
                None
            }
        };
        if socket.is_some_and(|socket| !self.nodes[node].sockets.contains_key(&socket)) {
            return;
        }
        let is_death = matches!(event, LinkEvent::Closed { .. });
        let was_up = socket.is_some_and(|s| self.nodes[node].link.stream_of(s).is_some());
        self.drive(node, |link, now, out| link.handle(now, event, out));
        if is_death && was_up {
            // The engine: BrokenPipe or NetworkFailure, and again.
            self.nodes[node].up = None;
            self.start(node);
        }
    }

    fn act(&mut self, node: usize, action: LinkAction) {
        match action {
            LinkAction::Listen => {
                assert!(!self.nodes[node].is_listening, "listens twice");
                self.nodes[node].is_listening = true;
            }
            LinkAction::StopListening => {
                assert!(self.nodes[node].is_listening, "does not listen");
                self.nodes[node].is_listening = false;
            }
            LinkAction::Connect { attempt } => {
                let before = self.nodes[node].attempt.replace(attempt);
                assert_eq!(before, None, "two attempts at once");
                if !self.fault(3) {
                    let at = self.now + self.delay();
                    self.push(at, Happening::Syn { from: node, attempt });
                }
            }
            LinkAction::CancelConnect { attempt } => {
                let open = self.nodes[node].attempt.take();
                assert_eq!(open, Some(attempt), "cancelled without need");
            }
            LinkAction::Send { socket, context, packet } => {
                let conn = self.nodes[node].sockets[&socket];
                let mut bytes = vec![];
                encode(&context, 0, &packet, 0, &mut bytes);
                self.send(conn, 1 - node, bytes);
            }
            LinkAction::Receive { socket, phase, context } => {
                let conn = self.nodes[node].sockets[&socket];
                let mut reader = Reader::new(Stream::Data, phase);
                reader.context = context;
                let end = self.conns[conn].ends[node].as_mut().expect("this end is ours");
                assert!(end.reader.is_none(), "receives twice");
                end.reader = Some(reader);
                self.read(conn, node);
            }
            LinkAction::Close { socket } => {
                let conn = self.nodes[node].sockets.remove(&socket);
                self.close(conn.expect("closed once"), node, HangUp::ShutDown);
            }
            LinkAction::Random => {
                let mut bytes = [0; CHALLENGE_LEN];
                bytes[..8].copy_from_slice(&word(&mut self.random).to_be_bytes());
                let event = LinkEvent::Random(Box::new(bytes));
                self.push(self.now + MS, Happening::Event(node, event));
            }
            LinkAction::Log(_) => {}
            LinkAction::Established { data, meta, version, features, we_resolve_conflicts } => {
                assert!(!self.nodes[node].is_listening && self.nodes[node].attempt.is_none());
                assert_eq!(self.nodes[node].sockets.len(), 2, "all others are closed");
                let conns = [data, meta].map(|socket| self.nodes[node].sockets[&socket]);
                assert_ne!(conns[0], conns[1]);
                // Whoever did not look at them during the handshake learns it now.
                for (socket, conn) in [data, meta].into_iter().zip(conns) {
                    let peer = self.conns[conn].ends[1 - node].as_ref();
                    if peer.is_none_or(|end| !end.is_open) && !self.conns[conn].is_dead {
                        let event = LinkEvent::Closed { socket, how: HangUp::ShutDown };
                        let at = self.now + self.setting.delay_max;
                        self.push(at, Happening::Event(node, event));
                    }
                }
                let up = Up { conns, version, features, we_resolve_conflicts };
                self.nodes[node].up = Some(up);
                self.push(self.now + 10 * S + S / 2, Happening::Watchdog(node, meta));
            }
            LinkAction::Failed { verdict, reason } => {
                assert_eq!(verdict, Verdict::Retry, "{reason}");
                assert!(self.nodes[node].sockets.is_empty() && !self.nodes[node].is_listening);
            }
        }
    }

    /// A new end at a node.
    fn end(&mut self, conn: usize, node: usize) -> SocketId {
        self.nodes[node].next_socket += 1;
        let socket = SocketId(self.nodes[node].next_socket);
        let (is_open, incoming, last_arrival) = (true, vec![], self.now);
        let end = End { socket, is_open, incoming, reader: None, last_arrival };
        self.conns[conn].ends[node] = Some(end);
        self.nodes[node].sockets.insert(socket, conn);
        socket
    }

    fn on_syn(&mut self, from: usize, attempt: u32) {
        let to = 1 - from;
        let back = self.now + self.delay();
        match self.setting.unreachable {
            Some((node, answers)) if node == to => {
                if answers {
                    self.push(back, Happening::Event(from, LinkEvent::ConnectFailed { attempt }));
                }
                return;
            }
            _ => {}
        }
        if !self.nodes[to].is_listening {
            self.push(back, Happening::Event(from, LinkEvent::ConnectFailed { attempt }));
            return;
        }
        if self.nodes[to].link.is_backlog_full() {
            return;
        }
        let conn = self.conns.len();
        let is_dead = self.fault(5);
        self.conns.push(Conn { is_dead, ..Conn::default() });
        let socket = self.end(conn, from);
        // Not all shells can prevent the late success of a cancelled attempt.
        self.push(back, Happening::Event(from, LinkEvent::Connected { attempt, socket }));
        let queued = self.below(2 * MS);
        self.push(self.now + queued, Happening::Accepted { conn, node: to });
    }

    fn on_accepted(&mut self, conn: usize, node: usize) {
        if !self.nodes[node].is_listening {
            // The queue went away with the listening socket.
            self.conns[conn].is_refused = true;
            self.tell_fin(conn, 1 - node, HangUp::Reset);
            return;
        }
        let socket = self.end(conn, node);
        let queued = core::mem::take(&mut self.conns[conn].queued);
        self.event(node, LinkEvent::Accepted { socket });
        self.on_bytes(conn, node, &queued);
        if let Some(how) = self.conns[conn].queued_fin {
            self.push(self.now, Happening::Fin { conn, node, how });
        }
    }

    fn send(&mut self, conn: usize, to: usize, bytes: Vec<u8>) {
        let arrival = self.now + self.delay();
        if self.fault(20) {
            self.conns[conn].is_dead = true;
        }
        let end = self.conns[conn].ends[to].as_mut();
        let at = end.map_or(arrival, |end| {
            end.last_arrival = end.last_arrival.max(arrival);
            end.last_arrival
        });
        self.push(at, Happening::Bytes { conn, node: to, bytes });
    }

    fn on_bytes(&mut self, conn: usize, node: usize, bytes: &[u8]) {
        if self.conns[conn].is_dead || self.conns[conn].is_refused {
            return;
        }
        match &mut self.conns[conn].ends[node] {
            Some(end) if end.is_open => {
                end.incoming.extend_from_slice(bytes);
                self.read(conn, node);
            }
            Some(_) => self.tell_fin(conn, 1 - node, HangUp::Reset),
            None => self.conns[conn].queued.extend_from_slice(bytes),
        }
    }

    fn read(&mut self, conn: usize, node: usize) {
        let Some(end) = &mut self.conns[conn].ends[node] else { return };
        while let Some(reader) = &mut end.reader {
            let Want::Inline(len) = reader.want() else { panic!("data in a handshake") };
            if end.incoming.len() < len {
                return;
            }
            let bytes: Vec<u8> = end.incoming.drain(..len).collect();
            let socket = end.socket;
            let event = match reader.feed(&bytes) {
                Ok(None) => continue,
                Ok(Some(incoming)) => LinkEvent::Packet { socket, packet: incoming.packet },
                Err(error) => LinkEvent::BadPacket { socket, error },
            };
            end.reader = None;
            self.push(self.now, Happening::Event(node, event));
            return;
        }
    }

    fn close(&mut self, conn: usize, node: usize, how: HangUp) {
        let end = self.conns[conn].ends[node].as_mut().expect("this end is ours");
        end.is_open = false;
        end.reader = None;
        self.tell_fin(conn, 1 - node, how);
    }

    fn tell_fin(&mut self, conn: usize, to: usize, how: HangUp) {
        let arrival = self.now + self.delay();
        let at =
            self.conns[conn].ends[to].as_ref().map_or(arrival, |e| e.last_arrival.max(arrival));
        self.push(at, Happening::Fin { conn, node: to, how });
    }

    fn on_fin(&mut self, conn: usize, node: usize, how: HangUp) {
        if self.conns[conn].is_dead {
            return;
        }
        match &self.conns[conn].ends[node] {
            Some(end) if end.is_open => {
                let event = LinkEvent::Closed { socket: end.socket, how };
                self.event(node, event);
            }
            Some(_) => {}
            None => self.conns[conn].queued_fin = Some(how),
        }
    }

    /// A crash: the peer learns of it, or not.
    fn restart(&mut self, node: usize) {
        let sockets = core::mem::take(&mut self.nodes[node].sockets);
        for conn in sockets.into_values() {
            if self.fault(2) {
                self.conns[conn].is_dead = true;
            }
            self.close(conn, node, HangUp::Reset);
        }
        let link = Peer::new(&self.setting, node, word(&mut self.random));
        let next_socket = self.nodes[node].next_socket;
        self.nodes[node] = Node {
            link,
            is_listening: false,
            attempt: None,
            timer: None,
            sockets: BTreeMap::new(),
            next_socket,
            up: None,
        };
        self.queue.retain(|_, what| match what {
            Happening::Event(n, _) => *n != node,
            Happening::Syn { from, .. } => *from != node,
            _ => true,
        });
        self.start(node);
    }

    fn stranger(&mut self, node: usize) {
        if !self.nodes[node].is_listening {
            return;
        }
        let conn = self.conns.len();
        self.conns.push(Conn::default());
        self.push(self.now, Happening::Accepted { conn, node });
        let bytes = match self.below(5) {
            0 => vec![0x47, 0x45, 0x54, 0x20, 0x2f, 0x20, 0x48, 0x54],
            1 => vec![0x83, 0x74, 0x02, 0x67, 0xff, 0xf2, 0, 0],
            2 => vec![0x83, 0x74, 0x02, 0x67, 0xff, 0xf1, 0, 0],
            3 => vec![0x83, 0x74],
            _ => vec![],
        };
        self.push(self.now + 1, Happening::Bytes { conn, node, bytes });
        if self.random.heads() {
            let at = self.now + 2 + self.below(30 * S);
            self.push(at, Happening::Fin { conn, node, how: HangUp::ShutDown });
        }
    }

    /// The engine's pings: a peer that does not answer on the same connections is none.
    fn watchdog(&mut self, node: usize, meta: SocketId) {
        if self.nodes[node].link.stream_of(meta) != Some(Stream::Meta) {
            return;
        }
        if self.is_agreed() {
            self.push(self.now + 10 * S, Happening::Watchdog(node, meta));
        } else {
            self.nodes[node].up = None;
            self.start(node);
        }
    }

    fn is_agreed(&self) -> bool {
        let [Some(a), Some(b)] = [self.nodes[0].up, self.nodes[1].up] else { return false };
        let are_alive = a.conns.iter().all(|conn| !self.conns[*conn].is_dead);
        a.conns == b.conns && are_alive
    }

    /// Runs until both nodes have agreed and kept that for a while. Returns how long it took
    /// after the last fault.
    fn settle(mut self) -> u64 {
        let mut since = None;
        loop {
            self.step();
            let before = since;
            since = if self.is_agreed() { before.or(Some(self.now)) } else { None };
            if let Some(since) = since
                && since.max(self.setting.faults_until) + 25 * S < self.now
            {
                self.check_result();
                return since.saturating_sub(self.setting.faults_until);
            }
            let limit = self.setting.faults_until + 1200 * S;
            assert!(self.now < limit, "no agreement: {:?} {:#?}", self.setting, self.nodes);
        }
    }

    fn check_result(&self) {
        let [Some(a), Some(b)] = [self.nodes[0].up, self.nodes[1].up] else { panic!("not up") };
        assert_eq!((a.conns, a.version, a.features), (b.conns, b.version, b.features));
        assert_ne!(a.we_resolve_conflicts, b.we_resolve_conflicts);
        let [one, two] = &self.setting.versions;
        assert_eq!(a.version, *one.end().min(two.end()));
        let [one, two] = self.setting.features;
        assert_eq!(a.features.bits(), one & two);
    }
}

fn word(random: &mut Coin) -> u64 {
    (0..64).fold(0, |word, _| word << 1 | u64::from(random.heads()))
}

fn config(setting: &Setting, node: usize) -> LinkConfig {
    let secret = Secret("the same".into());
    LinkConfig {
        versions: setting.versions[node].clone(),
        features: Features::from_bits_retain(setting.features[node]),
        connect_int: Deciseconds(100),
        ping_timeout: Deciseconds(5),
        socket_check_timeout: Deciseconds(0),
        auth: setting.secret.map(|algorithm| Auth { algorithm, secret }),
        is_dry_run: false,
    }
}

fn plain(seed: u64) -> Setting {
    Setting {
        seed,
        is_reference: [false; 2],
        delay_max: 200,
        is_even: false,
        faults_until: 0,
        unreachable: None,
        versions: [VERSIONS, VERSIONS],
        features: [15, 15],
        secret: None,
    }
}

/// Mean and longest time until two nodes agree, seconds.
fn times(make: impl Fn(u64) -> Setting) -> (u64, u64) {
    let all: Vec<u64> = (1..300).map(|seed| World::new(make(seed)).settle()).collect();
    (all.iter().sum::<u64>() / all.len() as u64 / S, all.iter().max().unwrap() / S)
}

#[test]
fn agreement_is_quick_without_faults() {
    let (mean, longest) = times(plain);
    assert!(mean <= 5 && longest <= 60, "{mean} s, {longest} s");
}

#[test]
fn agreement_with_the_original_is_quick() {
    for delay_max in [200, 50 * MS] {
        let make = |seed| Setting { is_reference: [false, true], delay_max, ..plain(seed) };
        let (mean, longest) = times(make);
        assert!(mean <= 5 && longest <= 60, "{mean} s, {longest} s");
        let (mean, longest) = times(|seed| Setting { is_even: true, ..make(seed) });
        assert!(mean <= 15 && longest <= 120, "in step: {mean} s, {longest} s");
    }
}

#[test]
fn nodes_in_step_do_not_cross_for_ever() {
    let (mean, longest) = times(|seed| Setting { is_even: true, ..plain(seed) });
    assert!(mean <= 15 && longest <= 120, "{mean} s, {longest} s");
    let (mean, longest) =
        times(|seed| Setting { is_even: true, delay_max: 100 * MS, ..plain(seed) });
    assert!(mean <= 15 && longest <= 120, "{mean} s, {longest} s");
}

#[test]
fn one_reachable_node_is_enough() {
    for unreachable in [(0, true), (0, false), (1, true), (1, false)] {
        for with_reference in [false, true] {
            let (mean, longest) = times(|seed| Setting {
                is_reference: [false, with_reference],
                unreachable: Some(unreachable),
                ..plain(seed)
            });
            assert!(mean <= 25 && longest <= 120, "{unreachable:?}: {mean} s, {longest} s");
        }
    }
}

prop_compose! {
    fn settings()(
        seed in any::<u64>(),
        is_reference in
            prop_oneof![Just([false, false]), Just([false, true]), Just([true, false])],
        delay_max in prop_oneof![Just(50), Just(2 * MS), Just(50 * MS), Just(200 * MS)],
        is_even in prop::bool::weighted(0.2),
        faults in 0_u64..120,
        unreachable in prop::option::weighted(0.3, (0_usize..2, any::<bool>())),
        (min, max) in ((86_u32..=101), (86_u32..=101)),
        common in 86_u32..=101,
        features in [0_u32..16, 0_u32..16],
        secret in prop::option::of(prop_oneof![Just(Algorithm::Md5), Just(Algorithm::Sha512)]),
    ) -> Setting {
        let versions = [min.min(common)..=101, 86..=max.max(common)];
        let faults_until = faults * S;
        Setting {
            seed, is_reference, delay_max, is_even, faults_until, unreachable, versions, features, secret,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]
    #[test]
    fn two_nodes_always_agree_in_the_end(setting in settings()) {
        World::new(setting).settle();
    }
}
