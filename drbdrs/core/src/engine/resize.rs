//! The size of the device: setting it, P_SIZES, the resize command.
//! Spec: states-and-generations.md §5.

use alloc::boxed::Box;
use alloc::format;

use drbd_types::{Cstate, Dstate, Failure, SectorCount, VolumeNr};
use drbd_wire::packet::Sizes;
use drbdmeta::layout::{AlGeometry, Layout, Placement};
use drbdmeta::superblock::Flags;

use crate::action::{Action, DeviceOffer, MetaOp};
use crate::admin::AlChange;
use crate::al::{ActivityLog, Transaction};
use crate::event::MetaAnswer;
use crate::log_line::Severity;
use crate::size::{
    self, ASSUME_CLEAN, Change, FORCED, NewStorage, Peer, Quantities, Received, Surroundings,
    Verdict,
};
use crate::state::facts;

use super::io::meta as meta_op;
use super::proc::Cx;
use super::{Core, admin, meta};

/// How a size is set.
pub(super) struct How {
    /// The peer is assumed to have the space.
    pub(super) forced: bool,
    /// New storage counts as clean.
    pub(super) assume_clean: bool,
    /// Another shape of the activity log.
    pub(super) al: Option<AlGeometry>,
}

impl How {
    /// At attach.
    pub(super) const ATTACH: Self = Self { forced: false, assume_clean: false, al: None };

    const fn from_flags(flags: u16) -> Self {
        let (forced, assume_clean) = (flags & FORCED != 0, flags & ASSUME_CLEAN != 0);
        Self { forced, assume_clean, al: None }
    }

    const fn flags(&self) -> u16 {
        (if self.forced { FORCED } else { 0 }) | (if self.assume_clean { ASSUME_CLEAN } else { 0 })
    }
}

impl Core {
    pub(super) fn quantities(&self, nr: VolumeNr) -> Quantities {
        let Some(volume) = self.volume(nr) else { return Quantities::default() };
        let disk = volume.disk.as_ref();
        Quantities {
            max: disk.map_or(SectorCount(0), |disk| disk.max_size),
            la_size: disk.map_or(SectorCount(0), |disk| disk.superblock.la_size),
            u_size: volume.config.size,
            p_size: volume.peer_size,
            current: volume.size,
        }
    }
}

/// Sets the size of a device with disk. Spec §5.3.
pub(super) async fn set_size(cx: &Cx, nr: VolumeNr, how: &How) -> Result<Change, Failure> {
    if how.al.is_some() {
        // Another ring has another number of slots: what is hot now is forgotten.
        admin::close_idle_log(cx, nr).await;
        let result = set_size_closed(cx, nr, how).await;
        admin::reopen_log(cx, nr);
        return result;
    }
    cx.with(|core| core.hold_io(nr));
    let result = set_size_held(cx, nr, how).await;
    cx.with(|core| core.release_io(nr));
    result
}

/// The activity log stands still meanwhile: a transaction or a page of the bitmap must not go to a
/// place that is given up.
async fn set_size_held(cx: &Cx, nr: VolumeNr, how: &How) -> Result<Change, Failure> {
    cx.until(move |core| {
        let Some(volume) = core.volume_mut(nr) else { return Some(()) };
        let is_free = !core::mem::replace(&mut volume.app.is_log_closed, true);
        is_free.then_some(())
    })
    .await;
    cx.until(move |core| {
        let disk = core.volume(nr).and_then(|v| v.disk.as_ref());
        disk.is_none_or(|d| d.al.pending() == 0 && !d.al.is_writing()).then_some(())
    })
    .await;
    let result = set_size_closed(cx, nr, how).await;
    cx.with(|core| {
        if let Some(volume) = core.volume_mut(nr) {
            volume.app.is_log_closed = false;
        }
        core.touch();
    });
    result
}

async fn set_size_closed(cx: &Cx, nr: VolumeNr, how: &How) -> Result<Change, Failure> {
    let moved = measure(cx, nr, how.al).await?;
    let planned = cx.with(|core| {
        let bitmap = core
            .volume(nr)
            .and_then(|v| v.disk.as_ref())
            .map_or(SectorCount(0), |disk| disk.bitmap_size);
        let peer = if how.forced && core.state(nr).conn < Cstate::Connected {
            Peer::AssumedToHaveSpace
        } else {
            Peer::Counts
        };
        let new_al = how.al.is_some();
        let surroundings = Surroundings { peer, new_al, md_moved: moved.is_some(), bitmap };
        let (plan, lines) = size::set_size(&core.quantities(nr), &surroundings);
        core.log_lines(nr, lines);
        plan
    });
    let plan = match planned {
        Ok(plan) => plan,
        Err(failure) => {
            cx.with(|core| core.restore_layout(nr, moved));
            return Err(failure);
        }
    };
    if plan.resize {
        cx.with(|core| core.apply_size(nr, plan.size, how.assume_clean));
    }
    if let Some(rewrite) = plan.rewrite {
        rewrite_meta(cx, nr, rewrite).await?;
    }
    if let Some(AlGeometry { stripes, stripe_blocks }) = how.al {
        let kib = u64::from(stripe_blocks) * 4;
        let text =
            format!("Changed AL layout to al-stripes = {stripes}, al-stripe-size-kB = {kib}");
        cx.with(|core| core.info(nr, text));
    }
    Ok(plan.change)
}

/// Looks at the size of the devices again. Returns the old layout if the meta-data has to move.
///
/// # Errors
/// There is no space for the wanted activity log.
async fn measure(cx: &Cx, nr: VolumeNr, al: Option<AlGeometry>) -> Result<Option<Layout>, Failure> {
    let Ok(MetaAnswer::Opened(opened)) = meta_op(cx, nr, MetaOp::Measure).await else {
        return al.map_or(Ok(None), |_| Err(Failure::MetaIo));
    };
    let expected = |al| Layout::expected(opened.placement, opened.meta_device, al);
    // The place of an indexed one is fixed.
    let is_indexed = matches!(opened.placement, Placement::Indexed(_));
    if al.is_some_and(|al| is_indexed || expected(al).is_err()) {
        return Err(Failure::MetaSpace);
    }
    let moved = cx.with(|core| {
        let disk = core.volume_mut(nr)?.disk.as_mut()?;
        let before = disk.layout;
        let has_grown =
            opened.backing != disk.opened.backing || opened.meta_device != disk.opened.meta_device;
        disk.opened = opened;
        if !has_grown && al.is_none() {
            return None;
        }
        let layout = expected(al.unwrap_or(before.al_geometry)).ok()?;
        let (max, _) = size::max_size(opened.placement, &layout, opened.backing);
        disk.max_size = max;
        disk.layout = layout;
        disk.superblock.md_size_sect = layout.md_size_sect;
        disk.superblock.al_offset = layout.al_offset;
        disk.superblock.bm_offset = layout.bm_offset;
        disk.superblock.al = layout.al_geometry;
        (layout != before).then_some(before)
    });
    Ok(moved)
}

impl Core {
    fn restore_layout(&mut self, nr: VolumeNr, before: Option<Layout>) {
        let Some(before) = before else { return };
        if let Some(disk) = self.volume_mut(nr).and_then(|v| v.disk.as_mut()) {
            disk.layout = before;
            disk.superblock.md_size_sect = before.md_size_sect;
            disk.superblock.al_offset = before.al_offset;
            disk.superblock.bm_offset = before.bm_offset;
            disk.superblock.al = before.al_geometry;
        }
    }

    /// Device and bitmap take the new size.
    fn apply_size(&mut self, nr: VolumeNr, size: SectorCount, assume_clean: bool) {
        let Some(volume) = self.volume_mut(nr) else { return };
        volume.size = size;
        if let Some(disk) = volume.disk.as_mut() {
            disk.bitmap.resize(size, !assume_clean);
            disk.bitmap_size = size;
        }
        let text = size::size_line(size);
        self.info(nr, text);
        self.mark_dirty(nr);
        self.announce_device(nr);
        self.touch();
    }
}

/// Superblock, activity log and bitmap at their (perhaps new) places. The order keeps a crash
/// harmless: the flags "all is out of sync" and "no activity log" are stable first, and are taken
/// back when everything else is.
async fn rewrite_meta(cx: &Cx, nr: VolumeNr, rewrite: size::Rewrite) -> Result<(), Failure> {
    let before = cx.with(|core| {
        core.volume(nr)
            .and_then(|v| v.disk.as_ref())
            .map_or(Flags::empty(), |disk| disk.superblock.flags)
    });
    set_flags(cx, nr, before | Flags::FULL_SYNC | Flags::AL_DISABLED).await?;
    fill_ring(cx, nr).await?;
    cx.with(|core| {
        core.info(nr, rewrite.text());
        if rewrite.is_whole()
            && let Some(disk) = core.volume_mut(nr).and_then(|v| v.disk.as_mut())
        {
            disk.bitmap.mark_all_changed();
        }
    });
    meta::write_bitmap(cx, nr).await.map_err(|_| Failure::MetaIo)?;
    // This write is preceded by a flush: bitmap and activity log are stable when it is.
    set_flags(cx, nr, before).await
}

/// Every block of the ring, at its (perhaps new) place. They repeat what is hot, so that it stays
/// known.
async fn fill_ring(cx: &Cx, nr: VolumeNr) -> Result<(), Failure> {
    cx.with(|core| {
        let Some(volume) = core.volume_mut(nr) else { return };
        let wanted = volume.config.al_extents;
        if let Some(disk) = volume.disk.as_mut() {
            disk.al.set_layout(disk.layout);
            let slots = ActivityLog::slots_for(wanted, disk.layout);
            if slots != disk.al.slots() {
                disk.al.resize(slots);
            }
            disk.al.begin_ring_fill();
        }
    });
    while let Some(Transaction { at, block, .. }) = cx.with(|core| {
        let volume = core.volume_mut(nr)?;
        let al = &mut volume.disk.as_mut()?.al;
        let next = (al.ring_fill_left() > 0).then(|| al.transaction())?;
        volume.stats.al_writes += 1;
        Some(next)
    }) {
        let write = MetaOp::Write { at, block: Box::new(block), stable: false };
        let result = meta_op(cx, nr, write).await;
        cx.with(|core| {
            if let Some(disk) = core.volume_mut(nr).and_then(|v| v.disk.as_mut()) {
                if result.is_err() {
                    disk.al.transaction_failed();
                }
                disk.al.commit();
            }
        });
        result.map_err(|_| Failure::MetaIo)?;
    }
    Ok(())
}

async fn set_flags(cx: &Cx, nr: VolumeNr, flags: Flags) -> Result<(), Failure> {
    cx.with(|core| {
        if let Some(disk) = core.volume_mut(nr).and_then(|v| v.disk.as_mut()) {
            disk.superblock.flags = flags;
        }
        core.mark_dirty(nr);
    });
    meta::sync(cx, nr).await.map_err(|_| Failure::MetaIo)
}

/// P_SIZES. Spec §5.4.
pub(super) async fn on_sizes(cx: &Cx, nr: VolumeNr, packet: Sizes) -> bool {
    let how = How::from_flags(packet.dds_flags);
    let verdict = cx.with(|core| {
        let fields = core.state(nr);
        let own = core.quantities(nr);
        let decision = size::received(&Received { packet: &packet, fields: &fields, own: &own });
        core.log_lines(nr, decision.lines);
        let version = core.conn.version;
        let limit = size::max_request_to_send(version, packet.max_bio_size);
        if let Some(volume) = core.volume_mut(nr) {
            volume.peer_size = decision.p_size;
            volume.peer_max_bio = u32::try_from(limit.0).unwrap_or(u32::MAX);
            if let Some(disk) = volume.disk.as_mut()
                && disk.superblock.la_peer_max_bio_size != volume.peer_max_bio
            {
                disk.superblock.la_peer_max_bio_size = volume.peer_max_bio;
                core.mark_dirty(nr);
            }
        }
        decision.verdict
    });
    let mut grown = Change::Unchanged;
    let before = cx.with(|core| backing(core, nr));
    match verdict {
        Verdict::SetSize { u_size } => {
            cx.with(|core| {
                if let Some(volume) = core.volume_mut(nr) {
                    volume.config.size = u_size;
                }
            });
            match set_size(cx, nr, &how).await {
                Ok(change) => grown = change,
                Err(_) => return false,
            }
            let _ = meta::sync(cx, nr).await;
        }
        Verdict::TakeSize(size) => cx.with(|core| core.apply_size(nr, size, false)),
        Verdict::Keep => {}
        Verdict::Disconnect => {
            cx.with(|core| core.force_conn(Cstate::Disconnecting));
            return false;
        }
    }
    cx.with(|core| {
        let capacity_changed = backing(core, nr) != before;
        core.after_sizes(nr, &packet, capacity_changed, grown);
        core.announce_device(nr);
    });
    true
}

fn backing(core: &Core, nr: VolumeNr) -> SectorCount {
    core.volume(nr).and_then(|v| v.disk.as_ref()).map_or(SectorCount(0), |disk| disk.opened.backing)
}

impl Core {
    fn after_sizes(&mut self, nr: VolumeNr, packet: &Sizes, capacity_changed: bool, grown: Change) {
        let fields = self.state(nr);
        let current = self.volume(nr).map_or(SectorCount(0), |v| v.size);
        let pending = self.volume(nr).is_some_and(|v| v.marks.resize_pending);
        let answer = size::answer(packet, &fields, current, capacity_changed, pending, grown);
        if fields.conn > Cstate::WFReportParams
            && let Some(volume) = self.volume_mut(nr)
        {
            volume.marks.resize_pending = false;
        }
        if answer.send_sizes {
            self.send_sizes(nr, false, packet.dds_flags);
        }
        match answer.new_storage {
            NewStorage::None => {}
            NewStorage::Suppressed => self.info(nr, NewStorage::SUPPRESSED),
            NewStorage::Resync => self.resync_new_storage(nr),
            NewStorage::Due => {
                if let Some(volume) = self.volume_mut(nr) {
                    volume.marks.grow_resync_due = true;
                }
            }
        }
    }

    /// What applications are offered, if it has changed. Spec: io-path §3.1, §13.1.
    pub(super) fn announce_device(&mut self, nr: VolumeNr) {
        let max_io = self.max_data_size(nr);
        let features = self.conn.features;
        let may_zero = self.may_send_zeroes();
        let state = self.state(nr);
        let mirrors = facts::must_replicate(&state) || state.conn >= Cstate::Connected;
        let Some(volume) = self.volume_mut(nr) else { return };
        let limits = volume.disk.as_ref().map(|disk| *disk.limits());
        let has_trim = features.contains(drbd_wire::packet::Features::TRIM);
        let can_discard = limits.is_none_or(|l| l.can_discard) && (!mirrors || has_trim);
        let large = if features.contains(drbd_wire::packet::Features::WSAME) || !mirrors {
            128 << 20
        } else {
            4 << 20
        };
        let offer = DeviceOffer {
            size: volume.size,
            is_primary: volume.is_open_for_use && state.role == drbd_types::Role::Primary,
            is_continued: volume.marks.resumable.is_some(),
            max_io,
            max_discard: if can_discard { large } else { 0 },
            max_write_zeroes: if mirrors && !may_zero { 0 } else { 128 << 20 },
            logical_block: limits.map_or(512, |l| l.logical_block),
            physical_block: limits.map_or(512, |l| l.physical_block),
        };
        if volume.offered != Some(offer) {
            volume.offered = Some(offer);
            self.out.push(Action::Device { volume: nr, offer });
        }
    }

    /// Largest read, write or resync request, bytes.
    pub(super) fn max_data_size(&self, nr: VolumeNr) -> u32 {
        let Some(volume) = self.volume(nr) else { return 4096 };
        let own = volume.disk.as_ref().map(|d| drbd_types::ByteLen(u64::from(d.limits().max_io)));
        let stored = volume.disk.as_ref().map_or(0, |d| d.superblock.la_peer_max_bio_size);
        let peer = if self.conn.is_up {
            size::max_request(self.conn.version).0
        } else if stored > 0 {
            u64::from(stored)
        } else {
            1 << 20
        };
        let limit = size::max_request_of_device(
            own,
            drbd_types::ByteLen(peer),
            drbd_types::ByteLen(4096),
            false,
        );
        u32::try_from(limit.0).unwrap_or(1 << 20)
    }
}

/// What the resize command asks for.
pub(super) struct Wanted {
    pub(super) size: SectorCount,
    pub(super) forced: bool,
    pub(super) assume_clean: bool,
    pub(super) al: AlChange,
}

/// The whole shape of the activity log that is wanted; `None`: it has that already.
fn new_shape(core: &Core, nr: VolumeNr, change: AlChange) -> Option<AlGeometry> {
    let now = core.volume(nr)?.disk.as_ref()?.layout.al_geometry;
    let new = AlGeometry {
        stripes: change.stripes.unwrap_or(now.stripes),
        stripe_blocks: change.stripe_blocks.unwrap_or(now.stripe_blocks),
    };
    (new != now).then_some(new)
}

/// The resize command. Spec §5.5.
pub(super) async fn resize(cx: &Cx, nr: VolumeNr, wanted: &Wanted) -> Result<(), Failure> {
    let Wanted { size, forced, assume_clean, al } = *wanted;
    let al = cx.with(|core| new_shape(core, nr, al));
    cx.with(|core| {
        let request = size::Resize { forced, no_resync: assume_clean, al };
        size::check_resize(&core.state(nr), core.conn.version, &request)
    })?;
    let before = cx.with(|core| {
        let volume = core.volume_mut(nr)?;
        Some(core::mem::replace(&mut volume.config.size, size))
    });
    let how = How { forced, assume_clean, al };
    let change = match set_size(cx, nr, &how).await {
        Ok(change) => change,
        Err(failure) => {
            // The original keeps the wanted size although it was not set.
            cx.with(|core| {
                if let (Some(volume), Some(before)) = (core.volume_mut(nr), before) {
                    volume.config.size = before;
                }
            });
            return Err(failure);
        }
    };
    let _ = meta::sync(cx, nr).await;
    cx.with(|core| {
        if core.state(nr).conn != Cstate::Connected {
            return;
        }
        if change == Change::Grew
            && let Some(volume) = core.volume_mut(nr)
        {
            volume.marks.resize_pending = true;
        }
        core.send_uuids(nr, 0);
        core.send_sizes(nr, true, how.flags());
    });
    if cx.with(|core| core.state(nr).disk < Dstate::Inconsistent) {
        cx.with(|core| core.log(Severity::Warn, Some(nr), "the disk was lost during the resize"));
    }
    Ok(())
}
