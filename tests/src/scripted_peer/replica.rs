//! What an ordinary Secondary does: a disk in memory that takes writes, acknowledges them, is the
//! target of a resync, and answers reads.
//!
//! One volume. It plays along with a [`ScriptedPeer`]: [`Replica::handle`] gets what the test does
//! not want to handle itself. Deliberately simple: every write is done at once, resync requests go
//! out one after the other. Spec: wire-protocol.md §5, §8, §9.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use drbd_types::{Cstate, Dstate, Fields, Gi, Role, Sector, SectorCount, SectorRange};
use drbd_wire::bitmap::{Run, decode_plain, decode_runs, encode_runs, plain_len, plain_start};
use drbd_wire::packet::{
    AckKind, BarrierId, Block, BlockId, BlockRequest, DpFlags, ProtocolParams, RequestKind, Uuids,
};
use drbd_wire::{Algorithm, Digest, Packet};

use super::{Parameters, Received, ScriptedPeer};

/// Size of a resync request: what the oldest version can carry.
const RESYNC_BYTES: u64 = 32_768;

/// What was received.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// P_DATA.
    pub writes: u64,
    /// P_TRIM.
    pub trims: u64,
    /// P_ZEROES.
    pub zeroes: u64,
    /// P_BARRIER.
    pub barriers: u64,
    /// Bytes of P_RS_DATA_REPLY.
    pub resync_bytes: u64,
    /// Reads that were answered.
    pub reads: u64,
}

/// A Secondary with a disk in memory.
#[derive(Debug)]
pub struct Replica {
    /// The data.
    pub disk: Vec<u8>,
    /// Blocks of 4 KiB that are out of sync.
    pub dirty: Vec<bool>,
    /// Own identifiers.
    pub uuids: Uuids,
    /// Own state; what is not sent in packets follows from it.
    pub state: Fields,
    /// Identifiers of the other side, as last sent.
    pub peer_uuids: Option<Uuids>,
    /// Its state, as last sent.
    pub peer_state: Option<Fields>,
    /// What was received so far.
    pub counts: Counts,
    /// Settings of the connection; the protocol counts below version 100.
    pub settings: ProtocolParams,
    /// The answer to requests of state changes.
    pub consent: i32,
    epoch: u32,
    /// Bits of the other side's bitmap that have come.
    bitmap_at: u64,
    /// Is a resync request out?
    is_asking: bool,
    integrity: Option<Algorithm>,
}

impl Default for Replica {
    fn default() -> Self {
        Self::new()
    }
}

impl Replica {
    /// A new disk, which was never in sync with anything. It gets the size of the other side's
    /// when it joins.
    pub fn new() -> Self {
        let uuids = Uuids {
            current: Gi::JUST_CREATED,
            bitmap: Gi(0),
            history: [Gi(0); 2],
            dirty_bits: 0,
            flags: 0,
        };
        Self {
            disk: Vec::new(),
            dirty: Vec::new(),
            uuids,
            state: Fields { disk: Dstate::Inconsistent, ..Fields::NEW },
            peer_uuids: None,
            peer_state: None,
            counts: Counts::default(),
            settings: Parameters::fresh(0, 0).protocol,
            consent: 1,
            epoch: 0,
            bitmap_at: 0,
            is_asking: false,
            integrity: None,
        }
    }

    /// Sectors of the disk.
    pub const fn sectors(&self) -> u64 {
        self.disk.len() as u64 / 512
    }

    /// Blocks that are out of sync.
    pub fn dirty_blocks(&self) -> u64 {
        self.dirty.iter().filter(|d| **d).count() as u64
    }

    /// Own identifiers, as to be sent now.
    pub fn uuids_now(&self) -> Uuids {
        Uuids { dirty_bits: self.dirty_blocks(), ..self.uuids }
    }

    /// What it sends in a handshake.
    pub fn parameters(&self, version: u32) -> Parameters {
        let mut parameters = Parameters::fresh(version, self.sectors());
        parameters.protocol = self.settings.clone();
        parameters.uuids = Some(self.uuids_now());
        let state = Fields {
            conn: Cstate::WFConnection,
            peer: Role::Unknown,
            pdsk: Dstate::DUnknown,
            ..self.state
        };
        parameters.state = state.pack();
        parameters
    }

    /// Exchanges parameters and lets the usual decision follow: Connected, or target of a resync.
    ///
    /// # Errors
    /// Something unexpected came.
    pub fn join(&mut self, peer: &mut ScriptedPeer) -> Result<()> {
        (self.epoch, self.is_asking, self.bitmap_at) = (0, false, 0);
        let theirs = peer.receive_parameters()?;
        if self.disk.is_empty() {
            let sectors = theirs.sizes.d_size;
            self.disk = vec![0; usize::try_from(sectors.0 * 512)?];
            self.dirty = vec![true; usize::try_from(sectors.bits_ceil().0)?];
        }
        peer.send_parameters(&self.parameters(peer.version()))?;
        self.integrity = Algorithm::from_name(&theirs.protocol.integrity_alg);
        self.peer_uuids = theirs.uuids;
        self.state.conn = Cstate::Connected;
        self.follow(theirs.state);
        if self.is_older() {
            self.become_target(peer)
        } else {
            peer.send(&Packet::State(self.state.pack()))
        }
    }

    /// Does the other side have newer data?
    fn is_older(&self) -> bool {
        let Some(theirs) = self.peer_uuids else { return false };
        let is_better = self.state.pdsk > Dstate::Inconsistent;
        let is_behind =
            !theirs.current.same(self.uuids.current) || self.state.disk == Dstate::Inconsistent;
        is_better && is_behind
    }

    fn follow(&mut self, theirs: Fields) {
        self.peer_state = Some(theirs);
        self.state.peer = theirs.role;
        self.state.pdsk = match theirs.disk {
            Dstate::Negotiating => Dstate::Consistent,
            other => other,
        };
        self.state.peer_isp = theirs.aftr_isp || theirs.user_isp;
    }

    fn become_target(&mut self, peer: &mut ScriptedPeer) -> Result<()> {
        self.state.conn = Cstate::WFBitMapT;
        if self.state.disk > Dstate::Outdated {
            self.state.disk = Dstate::Outdated;
        }
        let is_full = self.peer_uuids.is_some_and(|theirs| {
            !theirs.bitmap.same(self.uuids.current) && !theirs.current.same(self.uuids.current)
        });
        if is_full {
            self.dirty.fill(true);
        }
        self.bitmap_at = 0;
        peer.send(&Packet::State(self.state.pack()))
    }

    /// Does what follows from a packet. Returns whether it was one that a Secondary handles.
    ///
    /// # Errors
    /// A violation of the protocol, or the connection is gone.
    pub fn handle(&mut self, peer: &mut ScriptedPeer, received: &Received) -> Result<bool> {
        match &received.packet {
            Packet::Data(block, digest) => self.write(peer, block, *digest, &received.data)?,
            Packet::Trim(block, size) => {
                self.counts.trims += 1;
                self.zero(peer, block, *size)?;
            }
            Packet::Zeroes(block, size) => {
                self.counts.zeroes += 1;
                self.zero(peer, block, *size)?;
            }
            Packet::Barrier(id) => self.barrier(peer, *id)?,
            Packet::State(word) => self.on_state(peer, word.unpack()?)?,
            Packet::Uuids(uuids) => self.on_uuids(*uuids),
            Packet::Sizes(_) | Packet::SyncParam(_) => {}
            Packet::StateChgReq(mask, value) => {
                self.on_request(mask.0, value.0);
                peer.send(&Packet::StateChgReply(self.consent))?;
            }
            Packet::ConnStChgReq(..) => peer.send(&Packet::ConnStChgReply(self.consent))?,
            Packet::Bitmap(_) | Packet::CompressedBitmap(_) => self.on_bitmap(peer, received)?,
            Packet::SyncUuid(uuid) => {
                (self.uuids.current, self.uuids.bitmap) = (*uuid, Gi(0));
                (self.state.conn, self.state.disk) = (Cstate::SyncTarget, Dstate::Inconsistent);
                self.ask(peer)?;
            }
            Packet::RsDataReply(block, digest) => {
                self.check_digest(*digest, &received.data)?;
                self.resynced(peer, block, &received.data)?;
            }
            Packet::Request(RequestKind::Data | RequestKind::Resync, request) => {
                self.read(peer, &received.packet, request)?;
            }
            Packet::OutOfSync(block) => {
                self.set_dirty(block.sector, u64::from(block.size), true);
            }
            // We are the source: the target has written a block.
            Packet::Ack(AckKind::RsWriteAck, ack) if ack.id == BlockId::SYNCER => {
                self.set_dirty(ack.sector, u64::from(ack.size), false);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Handles packets until the condition holds.
    ///
    /// # Errors
    /// It does not within the deadline; a packet that a Secondary does not handle; see
    /// [`Self::handle`].
    pub fn play(
        &mut self,
        peer: &mut ScriptedPeer,
        deadline: Duration,
        mut until: impl FnMut(&Self) -> Result<bool>,
    ) -> Result<()> {
        let end = Instant::now() + deadline;
        while !until(self)? {
            ensure!(Instant::now() < end, "{:?}: {}", self.state, peer.story("nothing happens"));
            let Some(received) = peer.receive(Duration::from_millis(20))? else { continue };
            if !self.handle(peer, &received)? {
                bail!("{:?} {}", received.packet, peer.story("is not for a Secondary"));
            }
        }
        Ok(())
    }

    fn range(&self, sector: Sector, size: u64) -> Result<std::ops::Range<usize>> {
        let start = usize::try_from(sector.0.checked_mul(512).context("overflow")?)?;
        let end = start.checked_add(usize::try_from(size)?).context("overflow")?;
        ensure!(end <= self.disk.len(), "{sector} + {size} bytes is beyond the end of the disk");
        Ok(start..end)
    }

    /// Sets bits outwards, clears them inwards.
    fn set_dirty(&mut self, sector: Sector, size: u64, is_dirty: bool) {
        let device = SectorCount(self.sectors());
        let Some(range) = SectorRange::new(sector, SectorCount(size / 512)) else { return };
        let bits = if is_dirty { range.bits_touched() } else { range.bits_covered(device) };
        let (start, end) = (bits.start.0, bits.end.0.min(self.dirty.len() as u64));
        for bit in start..end {
            if let Some(place) = usize::try_from(bit).ok().and_then(|b| self.dirty.get_mut(b)) {
                *place = is_dirty;
            }
        }
    }

    fn check_digest(&self, digest: Digest, data: &[u8]) -> Result<()> {
        let right = self.integrity.map_or(Digest::NONE, |algorithm| algorithm.digest(data));
        ensure!(digest == right, "wrong digest {digest:?}, should be {right:?}");
        Ok(())
    }

    fn write(
        &mut self,
        peer: &mut ScriptedPeer,
        block: &Block,
        digest: Digest,
        data: &[u8],
    ) -> Result<()> {
        self.check_digest(digest, data)?;
        let size = u32::try_from(data.len())?;
        let range = self.range(block.sector, data.len() as u64)?;
        self.counts.writes += 1;
        self.disk[range].copy_from_slice(data);
        self.written(peer, block, size)
    }

    fn zero(&mut self, peer: &mut ScriptedPeer, block: &Block, size: u32) -> Result<()> {
        let range = self.range(block.sector, u64::from(size))?;
        self.disk[range].fill(0);
        self.written(peer, block, size)
    }

    /// Acknowledges as wanted. Spec §5.3.
    fn written(&mut self, peer: &mut ScriptedPeer, block: &Block, size: u32) -> Result<()> {
        self.epoch += 1;
        let has = |flag| block.flags.contains(flag);
        let is_syncing = self.state.conn.is_sync() && has(DpFlags::MAY_SET_IN_SYNC);
        let (wants_receipt, wants_ack) = if peer.version() >= 100 {
            (has(DpFlags::SEND_RECEIVE_ACK), has(DpFlags::SEND_WRITE_ACK))
        } else {
            (self.settings.protocol == 2, self.settings.protocol == 3)
        };
        if wants_receipt {
            peer.acknowledge(AckKind::RecvAck, block.sector, block.id, size)?;
        }
        if wants_ack {
            let kind = if is_syncing { AckKind::RsWriteAck } else { AckKind::WriteAck };
            peer.acknowledge(kind, block.sector, block.id, size)?;
            if is_syncing {
                self.set_dirty(block.sector, u64::from(size), false);
            }
        }
        Ok(())
    }

    fn barrier(&mut self, peer: &mut ScriptedPeer, id: BarrierId) -> Result<()> {
        self.counts.barriers += 1;
        let size = std::mem::take(&mut self.epoch);
        peer.send(&Packet::BarrierAck(id, size))
    }

    fn on_request(&mut self, mask: u32, value: u32) {
        let is_primary = mask & 3 != 0 && value & 3 == u32::from(Role::Primary.number());
        if is_primary && self.consent >= 1 {
            self.state.peer = Role::Primary;
        }
    }

    fn on_uuids(&mut self, uuids: Uuids) {
        self.peer_uuids = Some(uuids);
        let skips = uuids.flags & 8 != 0 && self.uuids.current == Gi::JUST_CREATED;
        if skips && self.state.conn == Cstate::Connected {
            self.dirty.fill(false);
            self.uuids.current = uuids.current.without_flag();
            self.uuids.bitmap = Gi(0);
            (self.state.disk, self.state.pdsk) = (Dstate::UpToDate, Dstate::UpToDate);
        }
    }

    fn on_state(&mut self, peer: &mut ScriptedPeer, theirs: Fields) -> Result<()> {
        self.follow(theirs);
        // A forced Primary, or a source that has decided first. Spec §14.3.
        let is_asked = theirs.conn == Cstate::WFBitMapS || theirs.role == Role::Primary;
        if self.state.conn == Cstate::Connected && is_asked && self.is_older() {
            peer.send(&Packet::Uuids(self.uuids_now()))?;
            self.become_target(peer)?;
        }
        Ok(())
    }

    fn on_bitmap(&mut self, peer: &mut ScriptedPeer, received: &Received) -> Result<()> {
        let bits = self.dirty.len() as u64;
        let dirty = &mut self.dirty;
        let mut set = |bit: u64| {
            if let Some(place) = usize::try_from(bit).ok().and_then(|b| dirty.get_mut(b)) {
                *place = true;
            }
        };
        let is_complete = match &received.packet {
            Packet::CompressedBitmap(body) => {
                self.bitmap_at =
                    decode_runs(body, self.bitmap_at, bits, |run| run.for_each(&mut set))?;
                self.bitmap_at == bits
            }
            // An empty one ends the transfer.
            Packet::Bitmap(body) if body.is_empty() => true,
            Packet::Bitmap(body) => {
                let chunk = peer.data.context.bitmap_chunk();
                self.bitmap_at = decode_plain(body, self.bitmap_at, bits, chunk, |at, word| {
                    (0..64).filter(|bit| word >> bit & 1 == 1).for_each(|bit| set(at + bit));
                })?;
                false
            }
            _ => false,
        };
        if is_complete {
            self.bitmap_at = 0;
            self.send_bitmap(peer)?;
            self.state.conn = Cstate::WFSyncUUID;
        }
        Ok(())
    }

    /// Sends the whole bitmap.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn send_bitmap(&self, peer: &mut ScriptedPeer) -> Result<()> {
        let bits = self.dirty.len() as u64;
        let is_set =
            |bit: u64| usize::try_from(bit).is_ok_and(|b| self.dirty.get(b) == Some(&true));
        let run_at = |bit: u64| {
            let first = is_set(bit);
            let end = (bit..bits).find(|b| is_set(*b) != first).unwrap_or(bits);
            Run { is_set: first, end }
        };
        let body_max = 4096 - peer.data.context.header_len();
        let chunk = peer.data.context.bitmap_chunk();
        let mut at = 0;
        let mut is_plain = false;
        while at < bits {
            let coded =
                if peer.version() >= 90 { encode_runs(at, bits, body_max, run_at) } else { None };
            if let Some((body, end)) = coded {
                peer.send(&Packet::CompressedBitmap(body))?;
                (at, is_plain) = (end, false);
                continue;
            }
            let start = plain_start(at);
            let len = plain_len(start, bits, chunk);
            let byte = |index: usize| {
                let first = start + index as u64 * 8;
                (0..8).fold(0, |byte, bit| byte | u8::from(is_set(first + bit)) << bit)
            };
            let body: Vec<u8> = (0..len).map(byte).collect();
            peer.send(&Packet::Bitmap(body.into()))?;
            (at, is_plain) = ((start + len as u64 * 8).min(bits), true);
        }
        if is_plain { peer.send(&Packet::Bitmap([].into())) } else { Ok(()) }
    }

    /// Asks for the next dirty blocks, or finishes. Spec §9.2, §9.5.
    fn ask(&mut self, peer: &mut ScriptedPeer) -> Result<()> {
        let Some(first) = self.dirty.iter().position(|d| *d) else { return self.finish(peer) };
        let first = first as u64;
        let boundary = RESYNC_BYTES / 4096;
        let end = (first + 1..(first / boundary + 1) * boundary)
            .find(|bit| usize::try_from(*bit).ok().and_then(|b| self.dirty.get(b)) != Some(&true))
            .unwrap_or((first / boundary + 1) * boundary);
        let size = ((end - first) * 4096).min(self.disk.len() as u64 - first * 4096);
        let request = BlockRequest {
            sector: Sector(first * 8),
            id: BlockId::SYNCER,
            size: u32::try_from(size)?,
            undefined: 0,
        };
        self.is_asking = true;
        peer.send(&Packet::Request(RequestKind::Resync, request))
    }

    fn resynced(&mut self, peer: &mut ScriptedPeer, block: &Block, data: &[u8]) -> Result<()> {
        ensure!(std::mem::take(&mut self.is_asking), "resync data that was not asked for");
        let range = self.range(block.sector, data.len() as u64)?;
        self.disk[range].copy_from_slice(data);
        self.counts.resync_bytes += data.len() as u64;
        self.set_dirty(block.sector, data.len() as u64, false);
        let size = u32::try_from(data.len())?;
        peer.acknowledge(AckKind::RsWriteAck, block.sector, BlockId::SYNCER, size)?;
        self.ask(peer)
    }

    /// All acknowledgements must have been processed before the state arrives.
    fn finish(&mut self, peer: &mut ScriptedPeer) -> Result<()> {
        peer.ping()?;
        if let Some(theirs) = self.peer_uuids {
            self.uuids.current = theirs.current.without_flag();
            self.uuids.bitmap = Gi(0);
            self.uuids.history = theirs.history;
        }
        (self.state.conn, self.state.disk) = (Cstate::Connected, Dstate::UpToDate);
        peer.send(&Packet::State(self.state.pack()))
    }

    /// Answers a read or a resync request.
    fn read(
        &mut self,
        peer: &mut ScriptedPeer,
        packet: &Packet,
        request: &BlockRequest,
    ) -> Result<()> {
        let range = self.range(request.sector, u64::from(request.size))?;
        let data = self.disk[range].to_vec();
        self.counts.reads += 1;
        let digest = peer.data.context.integrity.map_or(Digest::NONE, |a| a.digest(&data));
        let block =
            Block { sector: request.sector, id: request.id, seq: 0, flags: DpFlags::empty() };
        let reply = match packet {
            Packet::Request(RequestKind::Data, _) => Packet::DataReply(block, digest),
            _ => Packet::RsDataReply(block, digest),
        };
        peer.send_with(&reply, &data)
    }
}
