//! A recorded session is replayed against the engine: the engine is one of the two nodes, the
//! recorded packets of the other are fed to it in recorded order, and what it sends must mean what
//! the recorded node sent.
//!
//! What the recorded node was told to do (commands, reads, writes) is inferred from its packets.
//! Handles, new generation identifiers and the cut of resync requests differ of necessity; they
//! are translated or compared as sets of blocks. Pings are answered at once.

mod infer;
mod start;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use anyhow::{Result, ensure};
use drbd_sim::script::{Script, Sent};
use drbd_types::{Gi, SectorRange, VolumeNr};
use drbd_wire::packet::{
    AckKind, BarrierId, Block, BlockAck, BlockId, BlockRequest, RequestKind, Uuids,
};
use drbd_wire::{Digest, Packet, Stream};

use crate::wirecase::{Direction, Recorded, Session};

/// One difference, in words that a table can be written with.
pub type Differences = BTreeMap<String, usize>;

/// How long a packet is waited for, microseconds, in steps of [`STEP`].
const PATIENCE: u64 = 12_000_000;
const STEP: u64 = 50_000;

/// Blocks of 512 bytes.
type Sectors = BTreeSet<(u16, u64)>;

struct Replay<'a> {
    session: &'a Session,
    me: Direction,
    script: Script,
    /// What the engine has sent and nobody has compared.
    out: VecDeque<Sent>,
    /// Recorded handles of own requests, as the engine names them.
    ids: BTreeMap<(BlockId, u64), BlockId>,
    /// Recorded generation identifiers, as the engine has them.
    gis: BTreeMap<u64, u64>,
    /// Own barriers without acknowledgement: number and writes.
    barriers: VecDeque<(BarrierId, u32)>,
    /// Writes since the last barrier.
    writes: u32,
    /// Writes whose epoch the recorded peer has acknowledged, and those that the engine was told.
    acknowledged: (u64, u64),
    /// Answers of the recorded peer to resync and verify requests that were not asked for yet.
    pool: BTreeMap<(u16, u64), Answer>,
    /// Requests of the engine without answer.
    asked: Vec<(u16, RequestKind2, BlockRequest)>,
    /// Blocks that the recorded node asked for and acknowledged, and those of the engine.
    wanted: BTreeMap<&'static str, (Sectors, Sectors)>,
    /// Volumes whose first resync parameters were sent.
    is_first: BTreeSet<u16>,
    differences: Differences,
    trace: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum RequestKind2 {
    Resync,
    Thin,
    Csum,
    Verify,
}

/// What the recorded peer said about a sector.
#[derive(Clone, Copy)]
enum Answer {
    Data,
    Zero,
    Equal,
    Refused,
    Digest(Digest),
}

/// Replays a session with the engine as this node.
///
/// # Errors
/// The session can not be prepared.
pub fn replay(session: &Session, me: Direction) -> Result<Differences> {
    let start = start::of(session, me)?;
    let mut script = Script::new(start.disks);
    script.is_resolver = start.is_resolver;
    script.offer = start.offer;
    start::oracles(&mut script, session, me);
    let mut replay = Replay {
        session,
        me,
        script,
        out: VecDeque::new(),
        ids: BTreeMap::new(),
        gis: BTreeMap::new(),
        barriers: VecDeque::new(),
        writes: 0,
        acknowledged: (0, 0),
        is_first: BTreeSet::new(),
        pool: BTreeMap::new(),
        asked: Vec::new(),
        wanted: BTreeMap::new(),
        differences: Differences::new(),
        trace: std::env::var_os("REPLAY_TRACE").is_some(),
    };
    for (nr, config) in start.volumes {
        match config {
            Some(config) => replay.script.attach(nr, config),
            None => infer::new_volume(&mut replay.script, nr),
        }
    }
    for nr in start.paused {
        infer::pause(&mut replay.script, nr);
    }
    for nr in start.primaries {
        infer::promote(&mut replay.script, nr);
    }
    replay.script.connect(start.net);
    // What comes after the session is none of it.
    replay.script.is_reachable = false;
    replay.run()?;
    Ok(replay.differences)
}

/// Is this packet part of what the engine plays, or below it?
fn is_engines(packet: &Packet) -> bool {
    !matches!(
        packet,
        Packet::InitialData
            | Packet::InitialMeta
            | Packet::Features(_)
            | Packet::AuthChallenge(_)
            | Packet::AuthResponse(_)
            | Packet::UnplugRemote
            | Packet::DelayProbe(..)
    )
}

impl Replay<'_> {
    fn run(&mut self) -> Result<()> {
        let order: Vec<_> = self
            .session
            .order
            .iter()
            .filter_map(|at| Some((at, self.session.packet(at)?)))
            .filter(|(_, recorded)| is_engines(&recorded.packet))
            .collect();
        ensure!(!order.is_empty(), "nothing to replay");

        let start = order.first().map_or(0, |(at, _)| at.micros);
        let base = self.script.now.0;
        for (index, (at, recorded)) in order.iter().enumerate() {
            let now = base + (at.micros - start);
            if now > self.script.now.0 {
                self.pass(now - self.script.now.0);
            }
            if self.trace {
                eprintln!(
                    "{:>9} {:?} {:?} {:?}",
                    at.micros, at.direction, at.stream, recorded.packet
                );
            }
            if at.direction == self.me {
                let later = order[index..].iter().filter(|(a, _)| a.direction == self.me);
                let later: Vec<&Recorded> = later.take(6).map(|(_, r)| *r).collect();
                let is_params = matches!(recorded.packet, Packet::SyncParam(_));
                let is_sent = matches!(recorded.packet, Packet::OutOfSync(_))
                    && self.find(at.stream, recorded).is_some();
                if !is_sent && (!is_params || !self.is_first.insert(recorded.volume)) {
                    infer::before(&mut self.script, recorded, &later, self.session.version);
                }
                self.collect();
                self.own(at.stream, recorded);
            } else {
                self.peer(at.stream, recorded);
            }
        }
        self.pass(500_000);
        self.finish();
        Ok(())
    }

    fn note(&mut self, what: String) {
        if self.trace {
            eprintln!("          DIFFERENCE {what}");
        }
        *self.differences.entry(what).or_insert(0) += 1;
    }

    fn pass(&mut self, micros: u64) {
        self.script.pass(micros);
        self.collect();
    }

    /// Looks at what the engine has sent: what needs no comparison is dealt with.
    fn collect(&mut self) {
        while let Some(sent) = self.script.sent.pop_front() {
            if self.trace {
                eprintln!("          > {:?} {}", sent.packet, sent.volume);
            }
            match &sent.packet {
                Packet::Ping => self.script.peer(Stream::Meta, 0, Packet::PingAck, 0),
                Packet::Barrier(id) => {
                    self.barriers.push_back((*id, self.writes));
                    self.writes = 0;
                }
                Packet::Request(kind, request) if *kind != RequestKind::Data => {
                    let kind = match kind {
                        RequestKind::ThinResync => RequestKind2::Thin,
                        RequestKind::Verify => RequestKind2::Verify,
                        _ => RequestKind2::Resync,
                    };
                    self.engine_asks(sent.volume, kind, *request);
                }
                Packet::CsumRequest(request, _) => {
                    self.engine_asks(sent.volume, RequestKind2::Csum, *request);
                }
                Packet::Ack(kind, ack)
                    if ack.id == BlockId::SYNCER
                        && matches!(kind, AckKind::RsWriteAck | AckKind::NegAck) =>
                {
                    self.mark("resync acks", sent.volume, ack.sector.0, ack.size, true);
                }
                Packet::Ack(AckKind::OvResult, ack) => {
                    let what = result_of(ack.id);
                    self.mark(what, sent.volume, ack.sector.0, ack.size, true);
                }
                Packet::Data(..) | Packet::Trim(..) | Packet::Zeroes(..) => {
                    self.writes += 1;
                    self.out.push_back(sent);
                }
                _ => self.out.push_back(sent),
            }
            self.pay_barriers();
            self.serve();
        }
    }

    fn mark(&mut self, what: &'static str, volume: u16, sector: u64, size: u32, is_engine: bool) {
        let (recorded, engine) = self.wanted.entry(what).or_default();
        let set = if is_engine { engine } else { recorded };
        set.extend((sector..sector + u64::from(size) / 512).map(|s| (volume, s)));
    }

    fn engine_asks(&mut self, volume: u16, kind: RequestKind2, request: BlockRequest) {
        let what = if kind == RequestKind2::Verify { "verify requests" } else { "resync requests" };
        self.mark(what, volume, request.sector.0, request.size, true);
        self.asked.push((volume, kind, request));
    }

    /// Answers requests of the engine for which the recorded peer has said everything.
    fn serve(&mut self) {
        let mut at = 0;
        while let Some((volume, kind, request)) = self.asked.get(at).copied() {
            let sectors = request.sector.0..request.sector.0 + u64::from(request.size) / 512;
            let answers: Vec<Answer> =
                sectors.clone().filter_map(|s| self.pool.get(&(volume, s)).copied()).collect();
            if (answers.len() as u64) < sectors.end - sectors.start {
                at += 1;
                continue;
            }
            self.asked.remove(at);
            at = 0;
            for sector in sectors {
                self.pool.remove(&(volume, sector));
            }
            let (stream, packet, len) = answer(kind, &request, &answers);
            if self.trace {
                eprintln!("          < {packet:?}");
            }
            self.script.peer(stream, volume, packet, len);
        }
    }

    /// Barriers that the recorded peer has acknowledged, under the numbers of the engine.
    fn pay_barriers(&mut self) {
        while let Some((id, count)) = self.barriers.front().copied() {
            if self.acknowledged.1 + u64::from(count) > self.acknowledged.0 {
                return;
            }
            self.barriers.pop_front();
            self.acknowledged.1 += u64::from(count);
            self.script.peer(Stream::Meta, 0, Packet::BarrierAck(id, count), 0);
        }
    }

    // ---- packets of the recorded peer ----

    fn peer(&mut self, stream: Stream, recorded: &Recorded) {
        let volume = recorded.volume;
        let packet = match recorded.packet.clone() {
            Packet::PingAck => return,
            Packet::BarrierAck(_, count) => {
                // In the recording the barrier may have come later: epochs are cut by chance.
                if self.barriers.front().is_some_and(|(_, own)| *own != count) {
                    self.note("an epoch is cut elsewhere".into());
                }
                self.acknowledged.0 += u64::from(count);
                self.pay_barriers();
                self.collect();
                return;
            }
            Packet::RsDataReply(block, _) => {
                let len = recorded.data.len();
                return self.pool(volume, block.sector.0, len as u64, Answer::Data);
            }
            Packet::RsDeallocated(desc) => {
                return self.pool(volume, desc.sector.0, desc.size.into(), Answer::Zero);
            }
            Packet::OvReply(request, digest) => {
                let answer = Answer::Digest(digest);
                return self.pool(volume, request.sector.0, request.size.into(), answer);
            }
            Packet::Ack(AckKind::RsIsInSync, ack) => {
                return self.pool(volume, ack.sector.0, ack.size.into(), Answer::Equal);
            }
            Packet::Ack(AckKind::NegRsDataReply, ack) => {
                return self.pool(volume, ack.sector.0, ack.size.into(), Answer::Refused);
            }
            Packet::Ack(kind, ack) => {
                let id = self.ids.get(&(ack.id, ack.sector.0)).copied().unwrap_or(ack.id);
                Packet::Ack(kind, BlockAck { id, ..ack })
            }
            Packet::DataReply(block, digest) => {
                let id = self.ids.get(&(block.id, block.sector.0)).copied().unwrap_or(block.id);
                Packet::DataReply(Block { id, ..block }, digest)
            }
            Packet::Uuids(uuids) => Packet::Uuids(self.translated(&uuids)),
            Packet::SyncUuid(gi) => Packet::SyncUuid(self.gi(gi)),
            other => other,
        };
        self.script.peer(stream, volume, packet, recorded.data.len() as u64);
        self.collect();
    }

    fn pool(&mut self, volume: u16, sector: u64, bytes: u64, answer: Answer) {
        for sector in sector..sector + bytes / 512 {
            self.pool.insert((volume, sector), answer);
        }
        self.serve();
        self.collect();
    }

    fn gi(&self, gi: Gi) -> Gi {
        Gi(self.gis.get(&(gi.0 & !1)).map_or(gi.0, |known| known | gi.0 & 1))
    }

    fn translated(&self, uuids: &Uuids) -> Uuids {
        Uuids {
            current: self.gi(uuids.current),
            bitmap: self.gi(uuids.bitmap),
            history: uuids.history.map(|gi| self.gi(gi)),
            ..*uuids
        }
    }

    // ---- packets of the recorded node itself ----

    fn own(&mut self, stream: Stream, recorded: &Recorded) {
        let volume = recorded.volume;
        match &recorded.packet {
            // Their number and time follow from other packets.
            Packet::Ping | Packet::Barrier(_) => return,
            Packet::Request(kind, request) if *kind != RequestKind::Data => {
                let what = match kind {
                    RequestKind::Verify => "verify requests",
                    _ => "resync requests",
                };
                return self.mark(what, volume, request.sector.0, request.size, false);
            }
            Packet::CsumRequest(request, _) => {
                return self.mark("resync requests", volume, request.sector.0, request.size, false);
            }
            Packet::Ack(kind, ack)
                if ack.id == BlockId::SYNCER
                    && matches!(kind, AckKind::RsWriteAck | AckKind::NegAck) =>
            {
                return self.mark("resync acks", volume, ack.sector.0, ack.size, false);
            }
            Packet::Ack(AckKind::OvResult, ack) => {
                return self.mark(result_of(ack.id), volume, ack.sector.0, ack.size, false);
            }
            _ => {}
        }
        let mut waited = 0;
        loop {
            if let Some(at) = self.find(stream, recorded) {
                let Some(sent) = self.out.remove(at) else { return };
                self.compare(recorded, &sent);
                return;
            }
            if waited >= PATIENCE {
                break;
            }
            waited += STEP;
            self.pass(STEP);
        }
        let name = describe(&recorded.packet);
        self.note(format!("missing: {name}"));
        if self.trace {
            for sent in &self.out {
                eprintln!("            not compared: {sent:?}");
            }
            eprintln!("            {:?}", self.script.engine.waits());
        }
    }

    /// The packet of the engine that corresponds to a recorded one.
    fn find(&self, stream: Stream, recorded: &Recorded) -> Option<usize> {
        let fits = |sent: &Sent| {
            sent.stream == stream
                && sent.volume == recorded.volume
                && is_same_place(&recorded.packet, &sent.packet)
        };
        // Exactly the same is better than something like it.
        let exact = |sent: &Sent| fits(sent) && sent.packet == recorded.packet;
        let is_write = |packet: &Packet| match packet {
            Packet::Data(b, _) | Packet::Trim(b, _) | Packet::Zeroes(b, _) => Some(b.sector),
            _ => None,
        };
        // Another way to write zeroes.
        let same_write = |sent: &Sent| {
            sent.volume == recorded.volume
                && is_write(&recorded.packet).is_some_and(|s| is_write(&sent.packet) == Some(s))
        };
        let places = [&exact as &dyn Fn(&Sent) -> bool, &fits, &same_write];
        places.iter().find_map(|test| self.out.iter().position(test))
    }

    #[expect(clippy::collapsible_match, reason = "guards would let unequal pairs fall through")]
    fn compare(&mut self, recorded: &Recorded, sent: &Sent) {
        if let (Some((old, sector)), Some((new, _))) =
            (handle(&recorded.packet), handle(&sent.packet))
        {
            self.ids.insert((old, sector), new);
        }
        let len = recorded.data.len() as u64;
        if let (Packet::Trim(..) | Packet::Zeroes(..), Packet::Data(..)) =
            (&recorded.packet, &sent.packet)
        {
            self.note(format!("zeroes as P_DATA instead of {}", describe(&recorded.packet)));
            return;
        }
        if sent.len != len {
            self.note(format!("{}: {} bytes instead of {len}", describe(&sent.packet), sent.len));
        }
        match (&recorded.packet, &sent.packet) {
            (Packet::Uuids(theirs), Packet::Uuids(ours)) => self.compare_uuids(theirs, ours),
            (Packet::SyncUuid(theirs), Packet::SyncUuid(ours)) => self.learn(*theirs, *ours),
            (Packet::Data(a, _), Packet::Data(b, _))
            | (Packet::Trim(a, _), Packet::Trim(b, _))
            | (Packet::Zeroes(a, _), Packet::Zeroes(b, _)) => {
                if a.flags != b.flags {
                    self.note(format!("write flags {:?} instead of {:?}", b.flags, a.flags));
                }
            }
            (Packet::BarrierAck(a, n), Packet::BarrierAck(b, m)) => {
                if (a, n) != (b, m) {
                    self.note(format!("barrier ack {b:?} {m} instead of {a:?} {n}"));
                }
            }
            (Packet::Ack(kind, a), Packet::Ack(_, b)) => {
                // Sequence numbers count acknowledgements in the order in which disks finish.
                if *kind != AckKind::RsIsInSync && (a.size, a.id) != (b.size, b.id) {
                    self.note(format!("ack {b:?} instead of {a:?}"));
                }
            }
            (
                Packet::DataReply(..)
                | Packet::RsDataReply(..)
                | Packet::Request(..)
                | Packet::OutOfSync(_)
                | Packet::RsDeallocated(_)
                | Packet::OvReply(..),
                _,
            ) => {}
            (a, b) if a != b => {
                self.note(format!("{} instead of {}", describe(b), describe(a)));
            }
            _ => {}
        }
    }

    fn compare_uuids(&mut self, theirs: &Uuids, ours: &Uuids) {
        self.learn(theirs.current, ours.current);
        self.learn(theirs.bitmap, ours.bitmap);
        for (a, b) in theirs.history.iter().zip(ours.history) {
            self.learn(*a, b);
        }
        let expected = self.translated(theirs);
        for (what, a, b) in [
            ("current", expected.current, ours.current),
            ("bitmap", expected.bitmap, ours.bitmap),
            ("history 0", expected.history[0], ours.history[0]),
            ("history 1", expected.history[1], ours.history[1]),
        ] {
            if a.0 & !1 != b.0 & !1 {
                self.note(format!("P_UUIDS: other {what}"));
            }
        }
        if theirs.dirty_bits != ours.dirty_bits {
            let (a, b) = (theirs.dirty_bits, ours.dirty_bits);
            self.note(format!("P_UUIDS: {b} bits instead of {a}"));
        }
        if theirs.flags != ours.flags {
            self.note(format!("P_UUIDS: flags {} instead of {}", ours.flags, theirs.flags));
        }
    }

    /// A new identifier of the recorded node, and the one that the engine drew.
    fn learn(&mut self, theirs: Gi, ours: Gi) {
        let is_special = |gi: Gi| gi.0 & !1 <= 4;
        if is_special(theirs) || is_special(ours) {
            return;
        }
        let (theirs, ours) = (theirs.0 & !1, ours.0 & !1);
        let is_known = theirs == ours || self.gis.values().any(|known| *known == ours);
        if !is_known {
            self.gis.entry(theirs).or_insert(ours);
        }
    }

    fn finish(&mut self) {
        let left: Vec<String> = self.out.iter().map(|sent| describe(&sent.packet)).collect();
        for name in left {
            self.note(format!("too many: {name}"));
        }
        for (what, (recorded, engine)) in std::mem::take(&mut self.wanted) {
            let missing = recorded.difference(&engine).count();
            let more = engine.difference(&recorded).count();
            if missing > 0 {
                self.note(format!("{what}: {missing} sectors missing"));
            }
            if more > 0 {
                self.note(format!("{what}: {more} sectors more"));
            }
        }
    }
}

fn result_of(id: BlockId) -> &'static str {
    if id == BlockId::OUT_OF_SYNC { "verify results: different" } else { "verify results: equal" }
}

fn answer(kind: RequestKind2, request: &BlockRequest, answers: &[Answer]) -> (Stream, Packet, u64) {
    let ack = |kind| {
        let BlockRequest { sector, id, size, .. } = *request;
        (Stream::Meta, Packet::Ack(kind, BlockAck { sector, id, size, seq: 0 }), 0)
    };
    if answers.iter().any(|a| matches!(a, Answer::Refused)) {
        return ack(AckKind::NegRsDataReply);
    }
    if let (RequestKind2::Verify, Some(Answer::Digest(digest))) = (kind, answers.first()) {
        return (Stream::Data, Packet::OvReply(*request, *digest), 0);
    }
    if kind == RequestKind2::Csum && answers.iter().all(|a| matches!(a, Answer::Equal)) {
        return ack(AckKind::RsIsInSync);
    }
    if kind == RequestKind2::Thin && answers.iter().all(|a| matches!(a, Answer::Zero)) {
        let BlockRequest { sector, size, .. } = *request;
        let desc = drbd_wire::packet::BlockDesc { sector, size, undefined: 0 };
        return (Stream::Data, Packet::RsDeallocated(desc), 0);
    }
    let flags = drbd_wire::packet::DpFlags::empty();
    let block = Block { sector: request.sector, id: request.id, seq: 0, flags };
    (Stream::Data, Packet::RsDataReply(block, Digest::NONE), request.size.into())
}

/// Handle and sector of a request that the peer answers.
fn handle(packet: &Packet) -> Option<(BlockId, u64)> {
    match packet {
        Packet::Data(block, _) | Packet::Trim(block, _) | Packet::Zeroes(block, _) => {
            Some((block.id, block.sector.0))
        }
        Packet::Request(RequestKind::Data, request) => Some((request.id, request.sector.0)),
        _ => None,
    }
}

/// Do both say the same kind of thing about the same place?
fn is_same_place(recorded: &Packet, sent: &Packet) -> bool {
    match (recorded, sent) {
        (Packet::Data(a, _), Packet::Data(b, _))
        | (Packet::DataReply(a, _), Packet::DataReply(b, _))
        | (Packet::RsDataReply(a, _), Packet::RsDataReply(b, _)) => a.sector == b.sector,
        (Packet::Trim(a, n), Packet::Trim(b, m)) | (Packet::Zeroes(a, n), Packet::Zeroes(b, m)) => {
            (a.sector, n) == (b.sector, m)
        }
        (Packet::Request(k, a), Packet::Request(l, b)) => {
            (k, a.sector, a.size) == (l, b.sector, b.size)
        }
        (Packet::OvReply(a, d), Packet::OvReply(b, e)) => {
            (a.sector, a.size, d) == (b.sector, b.size, e)
        }
        (Packet::OutOfSync(a), Packet::OutOfSync(b))
        | (Packet::RsDeallocated(a), Packet::RsDeallocated(b)) => {
            (a.sector, a.size) == (b.sector, b.size)
        }
        // The original sends an address of its own instead of the handle.
        (Packet::Ack(AckKind::RsIsInSync, a), Packet::Ack(AckKind::RsIsInSync, b)) => {
            (a.sector, a.size) == (b.sector, b.size)
        }
        (Packet::Ack(k, a), Packet::Ack(l, b)) => (k, a.sector, a.id) == (l, b.sector, b.id),
        // Fields are compared, and differences named, afterwards.
        _ => core::mem::discriminant(recorded) == core::mem::discriminant(sent),
    }
}

fn describe(packet: &Packet) -> String {
    match packet {
        Packet::State(word) => match word.unpack() {
            Ok(s) => format!("P_STATE {}/{} {} {}/{}", s.role, s.peer, s.conn, s.disk, s.pdsk),
            Err(_) => format!("P_STATE {:#x}", word.0),
        },
        Packet::Bitmap(body) => format!("P_BITMAP of {} bytes", body.len()),
        Packet::CompressedBitmap(body) => format!("P_COMPRESSED_BITMAP of {} bytes", body.len()),
        Packet::Sizes(_)
        | Packet::SyncParam(_)
        | Packet::Protocol(_)
        | Packet::ProtocolUpdate(_) => format!("{packet:?}"),
        Packet::StateChgReply(code) | Packet::ConnStChgReply(code) => {
            format!("{} {code}", packet.command(101).log_name())
        }
        other => other.command(101).log_name().to_owned(),
    }
}

/// The range of a request.
pub(crate) fn range(sector: u64, bytes: u64) -> SectorRange {
    SectorRange { start: drbd_types::Sector(sector), len: drbd_types::SectorCount(bytes / 512) }
}

/// Volume 0.
pub(crate) const fn volume(nr: u16) -> VolumeNr {
    VolumeNr(nr)
}
