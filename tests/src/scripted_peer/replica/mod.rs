//! What an ordinary Secondary does: a disk in memory that takes writes, acknowledges them, is
//! target or source of a resync, and answers reads and a verify.
//!
//! One volume. It plays along with a [`ScriptedPeer`]: [`Replica::handle`] gets what the test does
//! not want to handle itself. Deliberately simple: every write is done at once, resync requests go
//! out one after the other. Spec: wire-protocol.md §5, §8, §9.

mod resync;
mod writes;

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use drbd_types::{Cstate, Dstate, Fields, Gi, Role, Sector, SectorCount, SectorRange};
use drbd_wire::packet::{AckKind, BlockId, ProtocolParams, RequestKind, Uuids};
use drbd_wire::{Algorithm, Packet};

use super::{Parameters, Received, ScriptedPeer};

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
    /// Reads and resync requests that were answered with data.
    pub reads: u64,
    /// Resync requests with a checksum that was right.
    pub in_sync: u64,
    /// Blocks of an online verify.
    pub verified: u64,
}

/// Whose data is newer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Relation {
    Equal,
    Older,
    Newer,
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
    /// The target has said that it is done.
    is_target_done: bool,
    integrity: Option<Algorithm>,
    csums: Option<Algorithm>,
    verify: Option<Algorithm>,
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
            is_target_done: false,
            integrity: None,
            csums: None,
            verify: None,
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

    /// Exchanges parameters and lets the usual decision follow: Connected, or a resync in either
    /// direction. Split brains are not recognised.
    ///
    /// # Errors
    /// Something unexpected came.
    pub fn join(&mut self, peer: &mut ScriptedPeer) -> Result<()> {
        (self.epoch, self.is_asking, self.bitmap_at) = (0, false, 0);
        self.is_target_done = false;
        let theirs = peer.receive_parameters()?;
        if self.disk.is_empty() {
            self.resize(theirs.sizes.d_size.0)?;
        }
        let mut ours = self.parameters(peer.version());
        // These must be equal on both sides.
        ours.sync.csums_alg.clone_from(&theirs.sync.csums_alg);
        ours.sync.verify_alg.clone_from(&theirs.sync.verify_alg);
        peer.send_parameters(&ours)?;
        self.integrity = Algorithm::from_name(&theirs.protocol.integrity_alg);
        self.csums = Algorithm::from_name(&theirs.sync.csums_alg);
        self.verify = Algorithm::from_name(&theirs.sync.verify_alg);
        self.peer_uuids = theirs.uuids;
        self.state.conn = Cstate::Connected;
        self.follow(theirs.state);
        match self.relation() {
            Relation::Older => self.become_target(peer),
            Relation::Newer => self.become_source(peer),
            Relation::Equal => peer.send(&Packet::State(self.state.pack())),
        }
    }

    /// Gives the disk so many sectors; everything is out of sync then.
    ///
    /// # Errors
    /// More than fits into memory.
    pub fn resize(&mut self, sectors: u64) -> Result<()> {
        self.disk.resize(usize::try_from(sectors * 512)?, 0);
        self.dirty = vec![true; usize::try_from(SectorCount(sectors).bits_ceil().0)?];
        Ok(())
    }

    fn relation(&self) -> Relation {
        let Some(theirs) = self.peer_uuids else { return Relation::Equal };
        let is_good = |disk| disk > Dstate::Inconsistent;
        match (is_good(self.state.disk), is_good(self.state.pdsk)) {
            (false, false) => Relation::Equal,
            (true, false) => Relation::Newer,
            (false, true) => Relation::Older,
            (true, true) if theirs.current.same(self.uuids.current) => Relation::Equal,
            (true, true) if theirs.current.same(self.uuids.bitmap) => Relation::Newer,
            (true, true) => Relation::Older,
        }
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
                self.finish_as_source(peer)?;
            }
            Packet::CsumRequest(request, digest) => self.compare(peer, request, *digest)?,
            Packet::Request(RequestKind::Verify, request) => self.answer_verify(peer, request)?,
            Packet::Ack(AckKind::OvResult, ack) => {
                self.counts.verified += 1;
                let is_different = ack.id == BlockId::OUT_OF_SYNC;
                if is_different {
                    self.set_dirty(ack.sector, u64::from(ack.size), true);
                }
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
        if self.state.conn == Cstate::SyncSource {
            self.is_target_done =
                theirs.conn == Cstate::Connected && theirs.disk == Dstate::UpToDate;
            return self.finish_as_source(peer);
        }
        // A forced Primary, or a source that has decided first. Spec §14.3.
        let is_asked = theirs.conn == Cstate::WFBitMapS || theirs.role == Role::Primary;
        if self.state.conn == Cstate::Connected && is_asked && self.relation() == Relation::Older {
            peer.send(&Packet::Uuids(self.uuids_now()))?;
            self.become_target(peer)?;
        }
        Ok(())
    }
}
