//! Packets to the peer. Order on a stream is the order of these calls; while a bitmap is being
//! sent, everything else on the data stream waits behind it. Spec: wire-protocol.md §3.3, §8.1, §14.

use alloc::collections::VecDeque;

use drbd_types::{Dstate, Fields, SectorCount, VolumeNr};
use drbd_wire::packet::{
    AckKind, BlockAck, BlockId, ControllerParams, Features, ProtocolParams, QueueLimits, Sizes,
    SyncParams, Uuids,
};
use drbd_wire::{Packet, Stream};

use crate::action::{Action, SendData};
use crate::config::ResyncConfig;
use crate::ids::SendToken;

use super::Core;

/// A packet that waits for the end of a bitmap.
#[derive(Debug)]
pub(super) struct Gated {
    volume: u16,
    packet: Packet,
    payload: Option<SendData>,
    token: Option<SendToken>,
}

/// Packets that wait for the end of a bitmap.
pub(super) type Gate = VecDeque<Gated>;

impl Core {
    /// A packet on the data stream.
    pub(super) fn send(&mut self, nr: VolumeNr, packet: Packet) {
        self.send_with(nr, packet, None, None);
    }

    /// A packet on the data stream, with data, and with a report when it is sent.
    pub(super) fn send_with(
        &mut self,
        nr: VolumeNr,
        packet: Packet,
        payload: Option<SendData>,
        token: Option<SendToken>,
    ) {
        if !self.conn.is_up {
            return;
        }
        match &mut self.conn.gate {
            Some(gate) => gate.push_back(Gated { volume: nr.0, packet, payload, token }),
            None => self.emit(Stream::Data, nr.0, packet, payload, token),
        }
    }

    /// Part of a bitmap, past all that waits for its end.
    pub(super) fn send_bitmap_part(&mut self, nr: VolumeNr, packet: Packet) -> SendToken {
        let token = self.token();
        if self.conn.is_up {
            self.emit(Stream::Data, nr.0, packet, None, Some(token));
        }
        token
    }

    /// From now on data packets wait.
    pub(super) fn close_gate(&mut self) {
        self.conn.gate = Some(Gate::new());
    }

    /// What waited goes out.
    pub(super) fn open_gate(&mut self) {
        for Gated { volume, packet, payload, token } in self.conn.gate.take().into_iter().flatten()
        {
            self.emit(Stream::Data, volume, packet, payload, token);
        }
        self.touch();
    }

    /// A packet on the meta stream.
    pub(super) fn send_meta(&mut self, nr: VolumeNr, packet: Packet) {
        if self.conn.is_up {
            self.emit(Stream::Meta, nr.0, packet, None, None);
        }
    }

    /// An acknowledgement of a block; takes the next sequence number.
    pub(super) fn send_ack(
        &mut self,
        nr: VolumeNr,
        kind: AckKind,
        sector: drbd_types::Sector,
        id: BlockId,
        size: u32,
    ) {
        let seq = self.volume_mut(nr).map_or(0, super::volume::Volume::next_seq);
        self.send_meta(nr, Packet::Ack(kind, BlockAck { sector, id, size, seq }));
    }

    fn emit(
        &mut self,
        stream: Stream,
        volume: u16,
        packet: Packet,
        payload: Option<SendData>,
        token: Option<SendToken>,
    ) {
        self.out.push(Action::Send { stream, volume, packet, payload, token });
    }

    /// P_STATE with this state.
    pub(super) fn send_state(&mut self, nr: VolumeNr, state: Fields) {
        self.send(nr, Packet::State(state.pack()));
    }

    /// P_STATE with the present state.
    pub(super) fn send_current_state(&mut self, nr: VolumeNr) {
        let state = self.state(nr);
        self.send_state(nr, state);
    }

    /// P_UUIDS; nothing without disk. `flags` are added to those of the volume.
    pub(super) fn send_uuids(&mut self, nr: VolumeNr, flags: u64) {
        let discards = self.conn.discard_my_data;
        let Some(volume) = self.volumes.get_mut(nr) else { return };
        if volume.state.disk < Dstate::Negotiating || !self.conn.is_up {
            return;
        }
        let slots = volume.slots();
        let bits = volume.dirty_bits();
        volume.bits_sent = bits;
        volume.marks.current_is_known = true;
        let becomes_inconsistent = volume.state.disk == Dstate::Negotiating
            && volume.candidate.is_some_and(|(disk, _)| disk == Dstate::Inconsistent);
        let flags = flags
            | u64::from(discards)
            | u64::from(volume.marks.crashed_primary) << 1
            | u64::from(becomes_inconsistent) << 2;
        let packet = Uuids {
            current: slots.current,
            bitmap: slots.bitmap,
            history: slots.history,
            dirty_bits: bits,
            flags,
        };
        self.send(nr, Packet::Uuids(packet));
    }

    /// P_SIZES. `wants_answer`: the peer is to answer with its own. Spec: states §5.4.
    pub(super) fn send_sizes(&mut self, nr: VolumeNr, wants_answer: bool, dds_flags: u16) {
        let has_limits = self.conn.features.contains(Features::WSAME);
        let most = crate::size::max_request(self.conn.version).0;
        let Some(volume) = self.volume(nr) else { return };
        let disk = volume.disk.as_ref().filter(|_| volume.state.disk >= Dstate::Negotiating);
        let (d_size, u_size, max_io) = match disk {
            Some(disk) => (disk.max_size, volume.config.size, disk.limits().max_io),
            None => (SectorCount(0), SectorCount(0), 1 << 20),
        };
        let limits = has_limits.then(|| match disk {
            Some(disk) => QueueLimits {
                physical_block: disk.limits().physical_block,
                logical_block: disk.limits().logical_block,
                alignment_offset: 0,
                io_min: disk.limits().physical_block,
                io_opt: 0,
                can_discard: disk.limits().can_discard,
                discard_zeroes: false,
                can_write_same: false,
            },
            None => QueueLimits {
                physical_block: 512,
                logical_block: 512,
                alignment_offset: 0,
                io_min: 512,
                io_opt: 0,
                can_discard: false,
                discard_zeroes: false,
                can_write_same: false,
            },
        });
        let packet = Sizes {
            d_size,
            u_size,
            c_size: if wants_answer { SectorCount(0) } else { volume.size },
            max_bio_size: drbd_types::ByteLen(u64::from(max_io).min(most)),
            queue_order_type: 0,
            dds_flags,
            limits,
        };
        self.send(nr, Packet::Sizes(packet));
    }

    /// P_SYNC_PARAM or P_SYNC_PARAM89. A node without disk sends the defaults.
    pub(super) fn send_sync_param(&mut self, nr: VolumeNr) {
        let version = self.conn.version;
        let Some(volume) = self.volume(nr) else { return };
        let rates =
            if volume.disk.is_some() { volume.config.resync } else { ResyncConfig::default() };
        let Some(net) = &self.conn.net else { return };
        let controller = (version >= 95).then_some(ControllerParams {
            plan_ahead: rates.c_plan_ahead,
            delay_target: rates.c_delay_target,
            fill_target: rates.c_fill_target,
            max_rate: rates.c_max_rate,
        });
        let packet = SyncParams {
            resync_rate: rates.resync_rate,
            verify_alg: if version >= 88 { net.verify_alg.clone() } else { Default::default() },
            csums_alg: if version >= 89 { net.csums_alg.clone() } else { Default::default() },
            controller,
        };
        self.send(nr, Packet::SyncParam(packet));
    }

    /// The fields of P_PROTOCOL and P_PROTOCOL_UPDATE.
    pub(super) fn protocol_params(&self) -> Option<ProtocolParams> {
        let net = self.conn.net.as_ref()?;
        Some(ProtocolParams {
            protocol: net.protocol.number(),
            after_sb: net.after_sb.numbers(),
            discard_my_data: self.conn.discard_my_data,
            dry_run: net.tentative,
            two_primaries: u32::from(net.two_primaries),
            integrity_alg: net.integrity_alg.clone(),
        })
    }
}
