//! Writes, their acknowledgements, and reads. Spec: wire-protocol.md §5, §7.

use anyhow::{Context as _, Result, ensure};
use drbd_wire::packet::{AckKind, BarrierId, Block, BlockRequest, DpFlags, RequestKind};
use drbd_wire::{Digest, Packet};

use super::{Replica, ScriptedPeer};

impl Replica {
    pub(super) fn check_digest(&self, digest: Digest, data: &[u8]) -> Result<()> {
        let right = self.integrity.map_or(Digest::NONE, |algorithm| algorithm.digest(data));
        ensure!(digest == right, "wrong digest {digest:?}, should be {right:?}");
        Ok(())
    }

    pub(super) fn write(
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

    pub(super) fn zero(&mut self, peer: &mut ScriptedPeer, block: &Block, size: u32) -> Result<()> {
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

    pub(super) fn barrier(&mut self, peer: &mut ScriptedPeer, id: BarrierId) -> Result<()> {
        self.counts.barriers += 1;
        let size = std::mem::take(&mut self.epoch);
        peer.send(&Packet::BarrierAck(id, size))
    }

    /// Answers a read or a resync request.
    pub(super) fn read(
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

    /// A resync request with the digest of what the target has. Spec §9.3.
    pub(super) fn compare(
        &mut self,
        peer: &mut ScriptedPeer,
        request: &BlockRequest,
        digest: Digest,
    ) -> Result<()> {
        let range = self.range(request.sector, u64::from(request.size))?;
        let algorithm = self.csums.context("a checksum without csums-alg")?;
        if algorithm.digest(&self.disk[range]) != digest {
            return self.read(peer, &Packet::Request(RequestKind::Resync, *request), request);
        }
        self.counts.in_sync += 1;
        self.set_dirty(request.sector, u64::from(request.size), false);
        peer.acknowledge(AckKind::RsIsInSync, request.sector, request.id, request.size)
    }

    /// Spec §10.
    pub(super) fn answer_verify(
        &mut self,
        peer: &mut ScriptedPeer,
        request: &BlockRequest,
    ) -> Result<()> {
        let range = self.range(request.sector, u64::from(request.size))?;
        let algorithm = self.verify.context("a verify without verify-alg")?;
        let digest = algorithm.digest(&self.disk[range]);
        peer.send(&Packet::OvReply(BlockRequest { undefined: 0, ..*request }, digest))
    }
}
