//! The packets of the data stream. Most are handled at once; those that need time (meta-data,
//! handlers, decisions) hold the receiver, so that the next packet is handled after them.
//! Spec: wire-protocol.md §4.

use alloc::format;

use drbd_types::{Cstate, StateWord, VolumeNr};
use drbd_wire::Packet;
use drbd_wire::packet::DpFlags;

use crate::event::WriteFlags;
use crate::log_line::Severity;

use super::Core;
use super::connection::Received;
use super::peer_write::What;
use super::proc::Cx;
use super::{bitmap_exchange, handshake, params, resize, resync};

/// Can it be handled without waiting for anything?
pub(super) const fn is_quick(packet: &Packet) -> bool {
    !matches!(
        packet,
        Packet::Bitmap(_)
            | Packet::CompressedBitmap(_)
            | Packet::Uuids(_)
            | Packet::Sizes(_)
            | Packet::State(_)
            | Packet::SyncUuid(_)
            | Packet::StateChgReq(..)
            | Packet::ConnStChgReq(..)
    )
}

/// Any packet.
pub(super) async fn receive(cx: &Cx, received: Received) {
    if is_quick(&received.packet) {
        cx.with(|core| core.receive_quick(received));
        return;
    }
    let nr = received.nr;
    let name = cx.with(|core| received.packet.command(core.conn.version).log_name());
    let is_transfer = matches!(received.packet, Packet::Bitmap(_) | Packet::CompressedBitmap(_));
    if !is_transfer && cx.with(|core| core.breaks_bitmap(name)) {
        return;
    }
    let is_known = cx.with(|core| core.volume(nr).is_some());
    let is_for_volume = !matches!(received.packet, Packet::ConnStChgReq(..));
    if is_for_volume && !is_known {
        cx.with(|core| core.unknown_volume(nr, &received.packet, name));
        return;
    }
    let ok = match received.packet {
        Packet::Bitmap(body) => bitmap_exchange::receive(cx, nr, &body, false).await,
        Packet::CompressedBitmap(body) => bitmap_exchange::receive(cx, nr, &body, true).await,
        Packet::Uuids(uuids) => params::on_uuids(cx, nr, uuids).await,
        Packet::Sizes(sizes) => resize::on_sizes(cx, nr, sizes).await,
        Packet::State(word) => handshake::on_state(cx, nr, word).await,
        Packet::SyncUuid(gi) => {
            resync::on_sync_uuid(cx, nr, gi).await;
            true
        }
        Packet::StateChgReq(mask, val) => {
            on_state_request(cx, nr, mask, val, false).await;
            true
        }
        Packet::ConnStChgReq(mask, val) => {
            on_state_request(cx, nr, mask, val, true).await;
            true
        }
        _ => true,
    };
    if !ok {
        cx.with(|core| core.receive_failed(name));
    }
}

async fn on_state_request(cx: &Cx, nr: VolumeNr, mask: StateWord, val: StateWord, is_conn: bool) {
    cx.with(|core| {
        // Below version 100 a request to disconnect comes as one for volume 0.
        let disconnects = mask.0 & StateWord::CONN.0 == StateWord::CONN.0
            && val.0 & StateWord::CONN.0 == u32::from(Cstate::Disconnecting.number()) << 4;
        let is_connection = is_conn || (core.conn.version < 100 && disconnects);
        let code = core.answer_state_request(nr, mask, val, is_connection);
        let reply = if is_connection && core.conn.version >= 100 {
            Packet::ConnStChgReply(code)
        } else {
            Packet::StateChgReply(code)
        };
        core.send_meta(if is_connection { VolumeNr(0) } else { nr }, reply);
    });
    if !is_conn {
        let _ = super::meta::sync(cx, nr).await;
    }
}

impl Core {
    /// A packet that needs no time.
    pub(super) fn receive_quick(&mut self, received: Received) {
        let Received { nr, packet, payload } = received;
        let name = packet.command(self.conn.version).log_name();
        if self.breaks_bitmap(name) {
            if let Some(payload) = payload {
                self.free(payload.buf);
            }
            return;
        }
        let needs_volume = !matches!(
            packet,
            Packet::Barrier(_)
                | Packet::UnplugRemote
                | Packet::DelayProbe(..)
                | Packet::Protocol(_)
                | Packet::ProtocolUpdate(_)
        );
        if needs_volume && self.volume(nr).is_none() {
            if let Some(payload) = payload {
                self.free(payload.buf);
            }
            self.unknown_volume(nr, &packet, name);
            return;
        }
        let ok = match packet {
            Packet::Data(block, _) => match payload {
                Some(data) => {
                    let size = u32::try_from(data.len.0).unwrap_or(u32::MAX);
                    let what = What::Data(data.buf, write_flags(block.flags));
                    self.on_peer_data(nr, &block, size, what, payload)
                }
                // An old sender's flush: no data.
                None => self.on_empty_data(nr, &block),
            },
            // Without a length it would be taken for an old sender's flush.
            Packet::Trim(_, 0) | Packet::Zeroes(_, 0) => false,
            Packet::Trim(block, size) => self.on_peer_data(nr, &block, size, What::Discard, None),
            Packet::Zeroes(block, size) => {
                let may_unmap = block.flags.contains(DpFlags::DISCARD);
                self.on_peer_data(nr, &block, size, What::Zeroes { may_unmap }, None)
            }
            Packet::DataReply(block, _) => self.on_data_reply(nr, &block, payload),
            Packet::RsDataReply(block, _) => match payload {
                Some(data) => {
                    let size = u32::try_from(data.len.0).unwrap_or(u32::MAX);
                    let what = What::Data(data.buf, WriteFlags::default());
                    self.on_resync_data(nr, block.sector, size, what, payload)
                }
                None => false,
            },
            Packet::RsDeallocated(desc) => {
                self.on_resync_data(nr, desc.sector, desc.size, What::Discard, None)
            }
            Packet::Barrier(id) => {
                self.on_barrier(id);
                true
            }
            Packet::Request(kind, request) => self.on_block_request(nr, kind, &request),
            Packet::CsumRequest(request, digest) => self.on_csum_request(nr, &request, digest),
            Packet::OvReply(request, digest) => self.on_verify_reply(nr, &request, digest),
            Packet::OutOfSync(desc) => self.on_out_of_sync(nr, &desc),
            Packet::SyncParam(params) => self.on_sync_param(nr, &params),
            Packet::Protocol(params) => self.on_protocol(&params),
            Packet::ProtocolUpdate(params) => self.on_protocol_update(&params),
            Packet::UnplugRemote | Packet::DelayProbe(..) => true,
            // The reader lets nothing else through on this stream.
            _ => false,
        };
        if !ok {
            self.receive_failed(name);
        }
    }

    /// The connection can not go on after this packet.
    pub(super) fn receive_failed(&mut self, name: &str) {
        self.log(Severity::Error, None, format!("error receiving {name}, e: -5 l: 0!"));
        self.force_conn(Cstate::ProtocolError);
    }

    /// A packet for a volume that is not there. Spec: wire-protocol.md §3.6, §4.2.
    fn unknown_volume(&mut self, nr: VolumeNr, packet: &Packet, name: &str) {
        let is_harmless = matches!(
            packet,
            Packet::SyncParam(_) | Packet::Sizes(_) | Packet::Uuids(_) | Packet::State(_)
        );
        if is_harmless {
            let text =
                format!("{name} packet received for volume {nr}, which is not configured locally");
            self.log(Severity::Warn, None, text);
        } else {
            self.receive_failed(name);
        }
    }

    /// Something came between two packets of a bitmap.
    fn breaks_bitmap(&mut self, name: &str) -> bool {
        if !self.volumes.values().any(|v| v.resync.is_receiving_bitmap()) {
            return false;
        }
        let text =
            format!("receive_bitmap: cmd neither ReportBitMap nor ReportCBitMap (is {name})");
        self.log(Severity::Error, None, text);
        self.force_conn(Cstate::ProtocolError);
        true
    }
}

/// How a write of the peer is to be done.
const fn write_flags(flags: DpFlags) -> WriteFlags {
    WriteFlags {
        fua: flags.contains(DpFlags::FUA),
        preflush: flags.contains(DpFlags::FLUSH),
        sync: flags.contains(DpFlags::RW_SYNC),
    }
}
