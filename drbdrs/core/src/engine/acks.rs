//! The meta stream: acknowledgements, pings, answers to state requests. Handled as they come; none
//! of them waits. Spec: wire-protocol.md §4.2, §5.3, §6, §9.2; io-path-and-resync.md §1.5, §1.7.

use drbd_types::{Cstate, SectorCount, SectorRange, VolumeNr};
use drbd_wire::Packet;
use drbd_wire::packet::{AckKind, BlockAck, BlockId};

use alloc::format;

use crate::log_line::Severity;
use crate::request::log::ReqKey;
use crate::request::progress::{Happened, Remote};
use crate::slab::Key;

use super::Core;

impl Core {
    pub(super) fn on_meta_packet(&mut self, nr: VolumeNr, packet: Packet) {
        self.conn.note_meta_traffic(self.now);
        match packet {
            Packet::Ping => self.send_meta(VolumeNr(0), Packet::PingAck),
            Packet::PingAck => self.on_ping_ack(),
            Packet::BarrierAck(id, count) => self.on_barrier_ack(id.to_number(), count),
            Packet::StateChgReply(code) => self.on_state_reply(nr, code, false),
            Packet::ConnStChgReply(code) => self.on_state_reply(nr, code, true),
            Packet::DelayProbe(..) => {}
            Packet::Ack(kind, ack) => {
                if self.on_ack(nr, kind, &ack).is_none() {
                    let text = format!(
                        "failed to find request {:#x}, sector {}s",
                        ack.id.to_number(),
                        ack.sector.0
                    );
                    self.log(Severity::Error, Some(nr), text);
                    self.force_conn(Cstate::NetworkFailure);
                }
            }
            // The reader lets nothing else through on this stream.
            _ => self.force_conn(Cstate::NetworkFailure),
        }
    }

    /// `None`: it belongs to nothing, which ends the connection.
    fn on_ack(&mut self, nr: VolumeNr, kind: AckKind, ack: &BlockAck) -> Option<()> {
        self.volume(nr)?;
        self.note_seq(nr, ack.seq);
        match kind {
            AckKind::OvResult => {
                self.on_verify_result(nr, ack);
                return Some(());
            }
            AckKind::RsIsInSync => {
                self.on_resync_equal(nr, ack);
                return Some(());
            }
            AckKind::RsCancel => {
                self.on_resync_cancelled(nr, ack);
                return Some(());
            }
            AckKind::NegRsDataReply => {
                self.on_resync_refused(nr, ack);
                return Some(());
            }
            AckKind::NegAck | AckKind::RecvAck | AckKind::WriteAck | AckKind::RsWriteAck => {
                if ack.id == BlockId::SYNCER {
                    self.on_resync_ack(nr, ack, kind != AckKind::NegAck);
                    return Some(());
                }
            }
            AckKind::NegDataReply | AckKind::Superseded | AckKind::RetryWrite => {}
        }
        let key = self.find(nr, ack, kind == AckKind::NegDataReply);
        let happened = match kind {
            AckKind::RecvAck => Happened::RecvAck,
            AckKind::WriteAck => Happened::WriteAck,
            AckKind::RsWriteAck => Happened::RsWriteAck,
            // Below version 100 this says that the own write met one of the peer, not that the peer's
            // covers it.
            AckKind::Superseded if self.conn.version < 100 => {
                self.postpone_write(key?);
                return Some(());
            }
            AckKind::Superseded => Happened::Superseded,
            AckKind::NegDataReply => Happened::NegDataReply,
            AckKind::NegAck => {
                // In protocols A and B the request may be forgotten already.
                match key {
                    Some(key) => self.happened(key, Happened::NegAck),
                    None => self.mark_range(nr, ack),
                }
                return Some(());
            }
            AckKind::RetryWrite => {
                self.postpone_write(key?);
                return Some(());
            }
            AckKind::OvResult
            | AckKind::RsIsInSync
            | AckKind::RsCancel
            | AckKind::NegRsDataReply => return Some(()),
        };
        self.happened(key?, happened);
        Some(())
    }

    /// The request that an answer belongs to: by its handle, its place, and what it waits for.
    fn find(&self, nr: VolumeNr, ack: &BlockAck, is_read: bool) -> Option<ReqKey> {
        let key: ReqKey = Key::from_raw(ack.id.to_number());
        let request = self.log.get(key)?;
        let fits = match request.progress.remote {
            Remote::Read => is_read,
            Remote::Mirror(_) => !is_read,
            Remote::None | Remote::OutOfSync => false,
        };
        (fits && request.volume == nr && request.range.start == ack.sector).then_some(key)
    }

    /// Marks what the peer could not write.
    fn mark_range(&mut self, nr: VolumeNr, ack: &BlockAck) {
        if let Some(range) = ack_range(ack)
            && let Some(volume) = self.volume_mut(nr)
        {
            volume.set_out_of_sync(range);
        }
    }

    /// The highest sequence number that was seen. Spec: io-path §5.5.
    pub(super) fn note_seq(&mut self, nr: VolumeNr, seq: u32) {
        if let Some(volume) = self.volume_mut(nr)
            && seq.wrapping_sub(volume.seq_in).cast_signed() > 0
        {
            volume.seq_in = seq;
            self.touch();
        }
    }
}

/// The range of an acknowledgement, if it is plausible: positive, whole sectors, at most 128 MiB.
pub(super) fn ack_range(ack: &BlockAck) -> Option<SectorRange> {
    let len = SectorCount::from_bytes_exact(u64::from(ack.size))?;
    (len.0 > 0 && ack.size <= 128 << 20).then(|| SectorRange::new(ack.sector, len))?
}
