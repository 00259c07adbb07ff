//! Exchange of the bitmaps before a resync. Spec: wire-protocol.md §8; io-path §8.2.

use alloc::boxed::Box;
use alloc::vec::Vec;

use drbd_types::{Cstate, Fields, VolumeNr};
use drbd_wire::Packet;
use drbd_wire::bitmap::{Run, decode_plain, decode_runs, encode_runs, plain_len, plain_start};
use drbd_wire::frame::Context;

use alloc::format;

use crate::bitmap::Bitmap;
use crate::log_line::Severity;
use crate::plant::{self, Bug};

use super::change::Opt;
use super::proc::Cx;
use super::resync::Side;
use super::{Core, meta, resync};

/// Packets that are handed to the transport before it has to confirm some.
const PARTS_AT_ONCE: usize = 64;

/// The source sends its bitmap, once nothing of the application is under way: what is written
/// afterwards is reported by P_OUT_OF_SYNC. Also what was completed has to be acknowledged with its
/// epoch: a peer that had no disk refuses it, and its blocks are marked. Spec: states A8.
pub(super) async fn send_as_source(cx: &Cx, nr: VolumeNr) {
    cx.with(|core| core.hold_io(nr));
    cx.until(move |core| {
        let is_over = core.state(nr).conn != Cstate::WFBitMapS;
        let is_quiet =
            core.are_writes_decided(nr) && (core.is_app_idle(nr) || core.is_app_frozen(nr));
        (is_over || is_quiet).then_some(())
    })
    .await;
    if cx.with(|core| core.state(nr).conn == Cstate::WFBitMapS) {
        send(cx, nr).await;
    }
    cx.with(|core| core.release_io(nr));
}

/// Sends the whole bitmap; nothing else comes between its packets.
async fn send(cx: &Cx, nr: VolumeNr) {
    let must_set_all = cx.with(|core| {
        core.volume(nr).and_then(|v| v.disk.as_ref()).is_some_and(|disk| {
            disk.superblock.flags.contains(drbdmeta::superblock::Flags::FULL_SYNC)
        })
    });
    if must_set_all {
        cx.with(|core| core.info(nr, "Writing the whole bitmap, MDF_FullSync was set."));
        let _ = meta::set_all_bits(cx, nr).await;
    }
    cx.until(|core| core.conn.gate.is_none().then_some(())).await;
    cx.with(Core::close_gate);
    let mut position = 0;
    let mut tokens = alloc::collections::VecDeque::new();
    loop {
        let part = cx.with(|core| core.bitmap_part(nr, &mut position));
        let Some(packet) = part else { break };
        tokens.push_back(cx.with(|core| core.send_bitmap_part(nr, packet)));
        if tokens.len() >= PARTS_AT_ONCE
            && let Some(oldest) = tokens.pop_front()
        {
            let is_up = cx
                .until(move |core| {
                    if !core.conn.is_up {
                        return Some(false);
                    }
                    core.conn.last_sent.is_some_and(|sent| sent >= oldest).then_some(true)
                })
                .await;
            if !is_up {
                break;
            }
        }
    }
    cx.with(Core::open_gate);
}

impl Core {
    /// The next packet of an own bitmap; `None` behind the last one. `position` is u64::MAX then.
    fn bitmap_part(&self, nr: VolumeNr, position: &mut u64) -> Option<Packet> {
        if *position == u64::MAX || !self.conn.is_up {
            return None;
        }
        let context =
            Context { version: self.conn.version, features: self.conn.features, integrity: None };
        let chunk = context.bitmap_chunk();
        let bitmap = &self.volume(nr)?.disk.as_ref()?.bitmap;
        let bits = bitmap.bits();
        let may_code =
            self.conn.version >= 90 && self.conn.net.as_ref().is_some_and(|net| net.use_rle);
        if *position >= bits {
            // Only plain packets need a mark behind the last one.
            *position = u64::MAX;
            return Some(Packet::Bitmap(Box::default()));
        }
        if may_code
            && let Some((body, end)) =
                encode_runs(*position, bits, chunk, |bit| run_at(bitmap, bit))
        {
            *position = if end >= bits { u64::MAX } else { end };
            return Some(Packet::CompressedBitmap(body));
        }
        let start = plain_start(*position);
        let len = plain_len(start, bits, chunk);
        let words = start / 64..start / 64 + u64::try_from(len / 8).unwrap_or(0);
        let body: Vec<u8> = words.flat_map(|word| bitmap.word(word).to_le_bytes()).collect();
        *position = (start + u64::try_from(len).unwrap_or(0) * 8).min(bits);
        Some(Packet::Bitmap(body.into_boxed_slice()))
    }
}

fn run_at(bitmap: &Bitmap, bit: u64) -> Run {
    let is_set = bitmap.is_set(bit);
    let end = if is_set { bitmap.next_clear(bit) } else { bitmap.next_set(bit) };
    Run { is_set, end: end.unwrap_or_else(|| bitmap.bits()) }
}

/// P_BITMAP, P_COMPRESSED_BITMAP. Returns false if the connection ends.
pub(super) async fn receive(cx: &Cx, nr: VolumeNr, body: &[u8], is_coded: bool) -> bool {
    let merged = cx.with(|core| core.merge_bitmap(nr, body, is_coded));
    let is_complete = match merged {
        Ok(is_complete) => is_complete,
        Err(text) => {
            cx.with(|core| core.log(Severity::Error, Some(nr), text));
            return false;
        }
    };
    if is_complete {
        received(cx, nr).await;
    }
    true
}

impl Core {
    /// Sets the bits of a packet. Returns whether it was the last one.
    fn merge_bitmap(
        &mut self,
        nr: VolumeNr,
        body: &[u8],
        is_coded: bool,
    ) -> Result<bool, alloc::string::String> {
        let context =
            Context { version: self.conn.version, features: self.conn.features, integrity: None };
        let chunk = context.bitmap_chunk();
        let others = self.volumes.values().any(|v| v.nr != nr && v.resync.is_receiving_bitmap());
        if others {
            return Err("receive_bitmap: packets of two volumes are mixed".into());
        }
        let Some(volume) = self.volume_mut(nr) else { return Err("no volume".into()) };
        volume.claims.all_marked();
        let Some(disk) = volume.disk.as_mut() else { return Ok(false) };
        let bits = disk.bitmap.bits();
        let position = volume.resync.bitmap_position.unwrap_or(0);
        let bitmap = &mut disk.bitmap;
        if is_coded {
            let at = decode_runs(body, position, bits, |run| {
                if !plant::has(Bug::IgnorePeerBits) {
                    bitmap.set(run);
                }
            });
            let at = at.map_err(|e| format!("{e}"))?;
            let is_complete = at >= bits;
            volume.resync.bitmap_position = (!is_complete).then_some(at);
            self.touch();
            return Ok(is_complete);
        }
        if body.is_empty() && position >= bits {
            volume.resync.bitmap_position = None;
            self.touch();
            return Ok(true);
        }
        let at = decode_plain(body, position, bits, chunk, |bit, word| {
            if !plant::has(Bug::IgnorePeerBits) {
                bitmap.or_word(bit / 64, word);
            }
        });
        let at = at.map_err(|e| format!("{e}"))?;
        // Behind the last plain packet comes an empty one.
        volume.resync.bitmap_position = Some(at);
        self.touch();
        Ok(false)
    }
}

/// The peer's bitmap is merged. Spec: states §11.2 "In receive-bitmap".
async fn received(cx: &Cx, nr: VolumeNr) {
    let state = cx.with(|core| core.state(nr));
    match state.conn {
        Cstate::WFBitMapT => {
            // The target answers with the union.
            send(cx, nr).await;
            cx.with(|core| {
                let new = Fields { conn: Cstate::WFSyncUUID, ..core.state(nr) };
                if core.state(nr).conn == Cstate::WFBitMapT {
                    let _ = core.set_state(nr, new, Opt::VERBOSE);
                }
            });
        }
        Cstate::WFBitMapS => {
            // Its own bitmap may still be on its way out: P_SYNC_UUID comes behind it.
            cx.until(move |core| {
                let is_over = core.state(nr).conn != Cstate::WFBitMapS;
                let is_sent =
                    core.conn.gate.is_none() && core.volume(nr).is_none_or(|v| v.holds == 0);
                (is_over || is_sent).then_some(())
            })
            .await;
            resync::start(cx, nr, Side::Source).await;
        }
        other => {
            let text = format!("unexpected cstate ({other}) in receive_bitmap");
            cx.with(|core| core.info(nr, text));
        }
    }
}
