//! Both roles in a resync. Spec: wire-protocol.md §8, §9.

use anyhow::{Result, ensure};
use drbd_types::{Cstate, Dstate, Gi, Sector};
use drbd_wire::Packet;
use drbd_wire::bitmap::{Run, decode_plain, decode_runs, encode_runs, plain_len, plain_start};
use drbd_wire::packet::{AckKind, Block, BlockId, BlockRequest, RequestKind};

use super::{Received, Replica, ScriptedPeer};

/// Size of a resync request: what the oldest version can carry.
const RESYNC_BYTES: u64 = 32_768;
/// From the identifier of the bitmap to that of the resync. Spec §9.1.
const SYNC_OFFSET: u64 = 1 << 48;

impl Replica {
    pub(super) fn become_target(&mut self, peer: &mut ScriptedPeer) -> Result<()> {
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

    pub(super) fn become_source(&mut self, peer: &mut ScriptedPeer) -> Result<()> {
        let is_full = self.peer_uuids.is_some_and(|theirs| {
            !theirs.current.same(self.uuids.bitmap) && !theirs.current.same(self.uuids.current)
        });
        if is_full {
            self.dirty.fill(true);
        }
        self.state.conn = Cstate::WFBitMapS;
        peer.send(&Packet::State(self.state.pack()))?;
        self.send_bitmap(peer)
    }

    /// Both bitmaps are equal now. Spec §9.1.
    fn start_as_source(&mut self, peer: &mut ScriptedPeer) -> Result<()> {
        let base = self.uuids.bitmap;
        let sync = if base.is_none() || base == Gi::JUST_CREATED {
            Gi(self.uuids.current.0.rotate_left(20) & !1)
        } else {
            Gi(base.without_flag().0.wrapping_add(SYNC_OFFSET))
        };
        if !base.is_none() {
            self.uuids.history = [base, self.uuids.history[0]];
        }
        self.uuids.bitmap = sync;
        (self.state.conn, self.state.pdsk) = (Cstate::SyncSource, Dstate::Inconsistent);
        peer.send(&Packet::SyncUuid(sync))
    }

    /// When the target is done and its last acknowledgement has come. Spec §9.5.
    pub(super) fn finish_as_source(&mut self, peer: &mut ScriptedPeer) -> Result<()> {
        if !self.is_target_done || self.dirty_blocks() > 0 {
            return Ok(());
        }
        peer.ping()?;
        self.is_target_done = false;
        self.uuids.history = [self.uuids.bitmap, self.uuids.history[0]];
        self.uuids.bitmap = Gi(0);
        (self.state.conn, self.state.pdsk) = (Cstate::Connected, Dstate::UpToDate);
        Ok(())
    }

    pub(super) fn on_bitmap(&mut self, peer: &mut ScriptedPeer, received: &Received) -> Result<()> {
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
        if !is_complete {
            return Ok(());
        }
        self.bitmap_at = 0;
        if self.state.conn == Cstate::WFBitMapS {
            return self.start_as_source(peer);
        }
        self.state.conn = Cstate::WFSyncUUID;
        self.send_bitmap(peer)
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
    pub(super) fn ask(&mut self, peer: &mut ScriptedPeer) -> Result<()> {
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

    pub(super) fn resynced(
        &mut self,
        peer: &mut ScriptedPeer,
        block: &Block,
        data: &[u8],
    ) -> Result<()> {
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
}
