//! Attaching, detaching and losing a disk. Spec: states-and-generations.md §6; metadata.md §5, §6.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};

use drbd_types::{
    AlExtentNr, Cstate, Dstate, Failure, Fields, Gi, Role, SectorCount, Tick, VolumeNr,
};
use drbdmeta::layout::Layout;
use drbdmeta::superblock::{AttachError, DecodeError, Flags, Superblock};

use crate::action::{Handler, MetaOp};
use crate::al::ActivityLog;
use crate::bitmap::Bitmap;
use crate::config::{DiskConfig, Fencing, OnIoError, Protocol};
use crate::event::{IoFailure, MetaAnswer, Opened};
use crate::log_line::Severity;
use crate::size::{self, Attach, Quantities};
use crate::state::facts;

use super::change::{Changed, Done, Opt, Wanted, request, settled};
use super::io::{flush_data, meta as meta_op};
use super::proc::Cx;
use super::volume::Disk;
use super::{Core, call_handler, meta, resize, resume};

/// Pages of the bitmap that are read with one action.
const PAGES_PER_READ: u32 = 4096;
/// A disk is Negotiating no longer than this, microseconds.
const NEGOTIATING_MAX: u64 = 60_000_000;

/// Why a disk is not attached.
pub(super) struct Refused {
    pub(super) code: i32,
    pub(super) info: Option<String>,
}

impl From<Failure> for Refused {
    fn from(failure: Failure) -> Self {
        Self { code: failure.number(), info: None }
    }
}

/// The attach command. Spec: states §6.2.
pub(super) async fn attach(cx: &Cx, nr: VolumeNr, config: DiskConfig) -> Result<(), Refused> {
    let is_protocol_a =
        cx.with(|core| core.conn.net.as_ref().is_some_and(|net| net.protocol == Protocol::A));
    if config.fencing == Fencing::ResourceAndStonith && is_protocol_a {
        return Err(Failure::StonithProtocol.into());
    }
    let is_free = cx.with(|core| {
        let Some(volume) = core.volume_mut(nr) else { return false };
        let is_free = volume.state.disk == Dstate::Diskless && volume.disk.is_none();
        if is_free {
            volume.marks.was_io_error = false;
            volume.marks.was_read_error = false;
            volume.marks.force_detach = false;
            volume.stats.reset();
            core.hold_io(nr);
        }
        is_free
    });
    if !is_free {
        return Err(Failure::DiskConfigured.into());
    }
    let result = attach_held(cx, nr, config).await;
    cx.with(|core| {
        core.release_io(nr);
        if core.state(nr).disk == Dstate::Negotiating {
            core.start(move |cx| async move { give_up_negotiating(&cx, nr).await });
        }
    });
    result
}

/// A peer that refuses the attach says nothing (defect D6): after a while the disk is left.
async fn give_up_negotiating(cx: &Cx, nr: VolumeNr) {
    let end = cx.with(|core| {
        let end = Tick(core.now.0 + NEGOTIATING_MAX);
        core.sleepers.push(end);
        end
    });
    cx.until(move |core| {
        let is_over = core.state(nr).disk != Dstate::Negotiating;
        if !is_over && core.now >= end {
            let text = "The peer does not answer to the attach; giving up.";
            core.log(Severity::Error, Some(nr), text);
            let _ = core.force(nr, |s| s.disk = Dstate::Failed);
            return Some(());
        }
        is_over.then_some(())
    })
    .await;
}

async fn attach_held(cx: &Cx, nr: VolumeNr, config: DiskConfig) -> Result<(), Refused> {
    cx.until(move |core| (!core.has_pending_writes(nr) || core.is_suspended()).then_some(())).await;
    settled(cx).await;
    let asked = request(cx, nr, Wanted::disk(Dstate::Attaching), Opt::VERBOSE).await;
    if let Err(refusal) = asked {
        return Err(Refused { code: refusal.number(), info: None });
    }
    let result = take_disk(cx, nr, config).await;
    if result.is_err() {
        give_up(cx, nr).await;
    }
    result
}

/// After a failure: Diskless again.
async fn give_up(cx: &Cx, nr: VolumeNr) {
    cx.with(|core| {
        let _ = core.force(nr, |s| s.disk = Dstate::Diskless);
        if let Some(volume) = core.volume_mut(nr) {
            volume.disk = None;
        }
    });
    let _ = meta_op(cx, nr, MetaOp::Close).await;
}

async fn take_disk(cx: &Cx, nr: VolumeNr, config: DiskConfig) -> Result<(), Refused> {
    let opened = match meta_op(cx, nr, MetaOp::Open).await {
        Ok(MetaAnswer::Opened(opened)) => opened,
        Err(IoFailure::Open(failure)) => return Err(failure.into()),
        Ok(_) | Err(_) => return Err(Failure::OpenBackingDevice.into()),
    };
    let (superblock, layout) = read_superblock(cx, nr, &opened).await?;
    let (max_size, lines) = size::max_size(opened.placement, &layout, opened.backing);
    cx.with(|core| core.log_lines(nr, lines));
    check_exposed(cx, nr, &superblock)?;
    check_sizes(cx, nr, &config, &opened, &superblock, max_size)?;
    cx.with(|core| core.install(nr, config, opened, superblock, layout, max_size));
    // In use from here on: stable before the first transaction or data write.
    meta::sync(cx, nr).await.map_err(|_| Failure::MetaIo)?;
    let change = resize::set_size(cx, nr, &resize::How::ATTACH).await?;
    // What an earlier process of this node wrote may still be in a volatile cache.
    flush_data(cx, nr).await;
    read_bitmap(cx, nr, change).await?;
    finish_attach(cx, nr).await
}

async fn read_superblock(
    cx: &Cx,
    nr: VolumeNr,
    opened: &Opened,
) -> Result<(Superblock, Layout), Refused> {
    let at = opened.placement.superblock(opened.meta_device).ok_or(Failure::MetaTooSmall)?;
    let block = match meta_op(cx, nr, MetaOp::Read { at, blocks: 1 }).await {
        Ok(MetaAnswer::Blocks(blocks)) => {
            blocks.into_iter().next().map_or_else(|| Box::new([0; 4096]), |(_, block)| block)
        }
        Ok(_) | Err(_) => {
            cx.with(|core| core.log(Severity::Error, Some(nr), "Error while reading metadata."));
            return Err(Failure::MetaIo.into());
        }
    };
    let superblock = match Superblock::from_disk(&block[..]) {
        Ok(superblock) => superblock,
        Err(DecodeError::Magic { .. } | DecodeError::Length { .. }) => {
            let text = "Meta data magic not found. Did you \"drbdadm create-md\"?";
            cx.with(|core| core.log(Severity::Error, Some(nr), text));
            return Err(Failure::NoMetaData.into());
        }
    };
    match superblock.check_attach(opened.placement, opened.meta_device) {
        Ok(layout) => Ok((superblock, layout)),
        Err(error) => {
            cx.with(|core| core.log(Severity::Error, Some(nr), error.to_string()));
            Err(match error {
                AttachError::Unclean => Failure::MetaUnclean,
                AttachError::BytesPerBit(_)
                | AttachError::Striping { .. }
                | AttachError::Offsets(_)
                | AttachError::SlotShape { .. }
                | AttachError::EndsBeyond { .. }
                | AttachError::BitmapTooSmall { .. } => Failure::NoMetaData,
            }
            .into())
        }
    }
}

/// Other data than the application has seen must not come under it. Spec: states §3.7.
fn check_exposed(cx: &Cx, nr: VolumeNr, superblock: &Superblock) -> Result<(), Refused> {
    cx.with(|core| {
        let Some(volume) = core.volume(nr) else { return Err(Failure::MinorUnknown.into()) };
        let state = volume.state;
        let is_used = state.role == Role::Primary || state.peer == Role::Primary;
        if state.pdsk != Dstate::UpToDate
            && volume.exposed != Gi(0)
            && is_used
            && !volume.exposed.same(superblock.current)
        {
            let exposed = volume.exposed.0;
            let text = format!("Can only attach to data with current UUID={exposed:016X}");
            core.log(Severity::Error, Some(nr), text);
            return Err(Failure::NotLastLostData.into());
        }
        Ok(())
    })
}

fn check_sizes(
    cx: &Cx,
    nr: VolumeNr,
    config: &DiskConfig,
    opened: &Opened,
    superblock: &Superblock,
    max: SectorCount,
) -> Result<(), Refused> {
    cx.with(|core| {
        let (p_size, current) =
            core.volume(nr).map_or_else(Default::default, |v| (v.peer_size, v.size));
        let request = Attach {
            sizes: Quantities {
                max,
                la_size: superblock.la_size,
                u_size: config.size,
                p_size,
                current,
            },
            placement: opened.placement,
            md_device: SectorCount(opened.meta_device.0 / 512),
            is_consistent: superblock.flags.contains(Flags::CONSISTENT),
        };
        match size::check_attach(&request) {
            Ok(lines) => {
                core.log_lines(nr, lines);
                Ok(())
            }
            Err(refused) => {
                core.log_lines(nr, refused.lines);
                Err(Refused { code: refused.failure.number(), info: refused.info })
            }
        }
    })
}

impl Core {
    pub(super) fn log_lines(&mut self, nr: VolumeNr, lines: size::Lines) {
        for (severity, text) in lines {
            self.log(severity, Some(nr), text);
        }
    }

    /// The disk belongs to the volume from here on.
    fn install(
        &mut self,
        nr: VolumeNr,
        config: DiskConfig,
        opened: Opened,
        superblock: Superblock,
        layout: Layout,
        max_size: SectorCount,
    ) {
        let is_up = self.conn.is_up;
        let Some(volume) = self.volume_mut(nr) else { return };
        let state = volume.state;
        volume.marks.crashed_primary = facts::crashed_primary_at_attach(superblock.flags, &state);
        volume.marks.degraded_wfc = facts::degraded_at_attach(superblock.flags, &state);
        volume.marks.resumable = resume::at_attach(superblock.flags, &state);
        // Whether the peer has seen it is not known: assume that it has.
        volume.marks.current_is_known = superblock.current != Gi::JUST_CREATED;
        if !is_up {
            volume.rates = config.resync;
        }
        volume.resync.set_rates(volume.rates);
        let mut al = ActivityLog::new(ActivityLog::slots_for(config.al_extents, layout));
        al.set_layout(layout);
        let mut superblock = superblock;
        // Without an activity log nobody knows what a Primary was writing, be it a crash or only the
        // loss of this disk: its bitmap may have been lost with it.
        let needs_full_sync = superblock.flags.contains(Flags::AL_DISABLED)
            && superblock.flags.intersects(Flags::PRIMARY | Flags::CRASHED_PRIMARY);
        superblock.flags.set(Flags::AL_DISABLED, !config.al_updates);
        // It could not record that it failed, nor perhaps has the peer.
        let lacks_writes = volume.lacking.is_some_and(|lacking| lacking.same(superblock.current));
        if lacks_writes {
            superblock.flags.remove(Flags::CONSISTENT | Flags::WAS_UP_TO_DATE);
        }
        volume.claims.all_marked();
        volume.disk = Some(Disk {
            superblock,
            is_dirty: false,
            dirty_since: None,
            layout,
            opened,
            max_size,
            bitmap: Bitmap::new(SectorCount(0)),
            al,
            writing: meta::Writing::default(),
            in_flight: 0,
            is_failing: false,
            needs_full_sync,
            bitmap_size: SectorCount(0),
        });
        volume.config = config;
        if lacks_writes {
            self.info(nr, "This disk lacks writes that the peer alone has acknowledged.");
        }
        self.mark_dirty(nr);
        self.update_ordering();
    }
}

/// The bitmap as it is on disk, or all bits.
async fn read_bitmap(cx: &Cx, nr: VolumeNr, _change: size::Change) -> Result<(), Refused> {
    let must_set_all = cx.with(|core| {
        core.volume(nr).and_then(|v| v.disk.as_ref()).is_some_and(|disk| {
            disk.superblock.flags.contains(Flags::FULL_SYNC) || disk.needs_full_sync
        })
    });
    if must_set_all {
        cx.with(|core| {
            core.info(nr, "Assuming that all blocks are out of sync (aka FullSync)");
        });
        meta::set_all_bits(cx, nr).await.map_err(|_| Failure::MetaIo)?;
    } else {
        load_pages(cx, nr).await?;
    }
    cx.with(|core| {
        let Some(volume) = core.volume_mut(nr) else { return };
        let is_full = volume.disk.as_ref().is_some_and(|disk| {
            disk.bitmap.bits() > 0 && disk.bitmap.count() == disk.bitmap.bits()
        });
        // Nothing could get more out of sync: the activity log rests.
        if is_full && volume.state.conn < Cstate::Connected {
            volume.marks.al_suspended = true;
            core.info(nr, "Suspended AL updates");
        }
    });
    Ok(())
}

async fn load_pages(cx: &Cx, nr: VolumeNr) -> Result<(), Refused> {
    let (start, pages) = cx.with(|core| {
        let disk = core.volume_mut(nr).and_then(|v| v.disk.as_mut());
        disk.map_or((drbd_types::ByteOffset(0), 0), |disk| {
            // Pages that are entirely zero are not delivered: they are clear in a new bitmap. What
            // setting the size has added is on disk already.
            disk.bitmap = Bitmap::new(disk.bitmap_size);
            (disk.layout.bitmap, disk.bitmap.pages())
        })
    });
    let mut page = 0;
    while page < pages {
        let blocks = PAGES_PER_READ.min(pages - page);
        let at = drbd_types::ByteOffset(start.0 + u64::from(page) * 4096);
        let Ok(MetaAnswer::Blocks(found)) = meta_op(cx, nr, MetaOp::Read { at, blocks }).await
        else {
            cx.with(|core| core.log(Severity::Error, Some(nr), "reading the bitmap failed"));
            return Err(Failure::MetaIo.into());
        };
        cx.with(|core| {
            if let Some(disk) = core.volume_mut(nr).and_then(|v| v.disk.as_mut()) {
                for (index, block) in found.into_iter().filter(|(index, _)| *index < blocks) {
                    disk.bitmap.load_page(page + index, &block);
                }
            }
        });
        page += blocks;
    }
    let bits = cx.with(|core| core.volume(nr).map_or(0, super::volume::Volume::dirty_bits));
    let amount = bits.saturating_mul(4);
    cx.with(|core| {
        core.info(nr, format!("{amount} KB ({bits} bits) marked out-of-sync by on disk bit-map."));
    });
    Ok(())
}

/// Steps 7 to 9.
async fn finish_attach(cx: &Cx, nr: VolumeNr) -> Result<(), Refused> {
    let result = cx.with(|core| {
        let fencing = core.volume(nr).map_or(Fencing::DontCare, |v| v.config.fencing);
        let state = core.state(nr);
        let flags = core
            .volume(nr)
            .and_then(|v| v.disk.as_ref())
            .map_or(Flags::empty(), |disk| disk.superblock.flags);
        let (disk, pdsk) = facts::from_flags(flags, state.pdsk, fencing);
        let mut new = state;
        let now = core.now;
        if let Some(volume) = core.volume_mut(nr) {
            volume.candidate = Some((disk, pdsk));
            if state.conn >= Cstate::Connected {
                volume.peer_uuids = None;
                new.disk = Dstate::Negotiating;
            } else {
                new.disk = disk;
                new.pdsk = pdsk;
            }
            volume.attached_at = now;
        }
        core.set_state(nr, new, Opt::VERBOSE)
    });
    if let Err(refusal) = result {
        return Err(Refused { code: refusal.number(), info: None });
    }
    cx.with(|core| {
        core.change_slots(nr, |slots, role| slots.follow_role(role));
        core.mark_dirty(nr);
        core.announce_device(nr);
    });
    meta::sync(cx, nr).await.map_err(|_| Failure::MetaIo)?;
    Ok(())
}

// ---- detach ----

/// The detach command. Spec: states §6.3.
pub(super) async fn detach(cx: &Cx, nr: VolumeNr, force: bool) -> Changed {
    if force {
        cx.with(|core| core.force_detach(nr));
    } else {
        if cx.with(|core| would_lose_data(&core.state(nr))) {
            return Err(drbd_types::Refusal::NoUpToDateDisk);
        }
        cx.with(|core| core.hold_io(nr));
        let result = request(cx, nr, Wanted::disk(Dstate::Failed), Opt::COMMAND).await;
        cx.with(|core| core.release_io(nr));
        match result {
            Err(drbd_types::Refusal::IsDiskless) => return Ok(Done::Nothing),
            Err(refusal) => return Err(refusal),
            Ok(_) => {}
        }
    }
    cx.until(move |core| {
        let Some(volume) = core.volume(nr) else { return Some(()) };
        (volume.state.disk == Dstate::Diskless && volume.disk.is_none()).then_some(())
    })
    .await;
    Ok(Done::Changed)
}

/// A Primary's disk with writes that the peer does not have. The original lets it go while the two
/// exchange their bitmaps: then it counts the peer's older data as UpToDate, and a split brain
/// comes of it.
fn would_lose_data(state: &Fields) -> bool {
    state.role == Role::Primary && state.disk > Dstate::Failed && state.pdsk != Dstate::UpToDate
}

impl Core {
    /// Without waiting for the disk or the peer; also when the disk is too slow.
    pub(super) fn force_detach(&mut self, nr: VolumeNr) {
        if let Some(volume) = self.volume_mut(nr) {
            volume.marks.force_detach = true;
        }
        let _ = self.force(nr, |s| s.disk = Dstate::Failed);
    }

    /// A data I/O failed, and the policy is to give the disk up.
    pub(super) fn detach_on_error(&mut self, nr: VolumeNr, is_read: bool) {
        let Some(volume) = self.volume_mut(nr) else { return };
        volume.marks.was_io_error = true;
        volume.marks.was_read_error |= is_read;
        if volume.state.disk > Dstate::Failed {
            let _ = self.force(nr, |s| s.disk = Dstate::Failed);
            self.log(Severity::Error, Some(nr), "Local IO failed in request. Detaching...");
        }
    }

    /// A meta-data I/O failed: the disk is given up whatever the policy says.
    pub(super) fn on_meta_error(&mut self, nr: VolumeNr) {
        self.detach_on_error(nr, false);
    }
}

/// A19: the disk has failed, or is being detached. Spec: states §6.5.
pub(super) async fn disk_failed(cx: &Cx, nr: VolumeNr, new: &Fields) {
    let (was_error, calls, forced) = cx.with(|core| {
        let Some(volume) = core.volume_mut(nr) else { return (false, false, false) };
        let was_error = core::mem::take(&mut volume.marks.was_io_error);
        let calls = volume.config.on_io_error == OnIoError::CallLocalIoError;
        let forced = core::mem::take(&mut volume.marks.force_detach);
        (was_error, calls, forced)
    });
    if was_error && calls {
        // Before the peer is told: the handler may start this node anew.
        call_handler(cx, Handler::LocalIoError, Some(nr)).await;
    }
    cx.with(|core| {
        if forced {
            core.abort_local(nr);
        }
        if new.conn >= Cstate::Connected {
            core.send_state(nr, *new);
        }
        core.cancel_resync(nr);
        if let Some(disk) = core.volume_mut(nr).and_then(|volume| volume.disk.as_mut()) {
            disk.is_failing = true;
        }
        core.failure_is_told(nr);
        core.touch();
    });
    let _ = meta::sync(cx, nr).await;
    // The rest waits for the disk, which may take for ever: not in the worker.
    cx.with(|core| core.start(move |cx| async move { leave_disk(&cx, nr).await }));
}

/// When the disk has answered everything: the bitmap is written, then it is Diskless.
async fn leave_disk(cx: &Cx, nr: VolumeNr) {
    cx.until(move |core| (core.data_in_flight(nr) == 0).then_some(())).await;
    let written = meta::write_bitmap(cx, nr).await;
    let was_read_error = cx.with(|core| core.volume(nr).is_some_and(|v| v.marks.was_read_error));
    if written.is_err() && was_read_error {
        let _ = meta::set_flag(cx, nr, Flags::FULL_SYNC, true).await;
    }
    let _ = meta::sync(cx, nr).await;
    cx.with(|core| {
        let _ = core.force(nr, |s| s.disk = Dstate::Diskless);
    });
}

/// A20: the disk is gone.
pub(super) async fn disk_gone(cx: &Cx, nr: VolumeNr, new: &Fields) {
    cx.with(|core| {
        if new.conn >= Cstate::Connected {
            core.send_state(nr, *new);
        }
    });
    cx.until(move |core| {
        let is_writing = core
            .volume(nr)
            .and_then(|v| v.disk.as_ref())
            .is_some_and(|disk| disk.in_flight > 0 || disk.writing.is_busy());
        (!is_writing).then_some(())
    })
    .await;
    let had_disk = cx.with(|core| {
        let Some(volume) = core.volume_mut(nr) else { return false };
        volume.candidate = None;
        let had = volume.disk.take().is_some();
        core.forget_extents(nr);
        core.update_ordering();
        core.announce_device(nr);
        core.touch();
        had
    });
    if had_disk {
        let _ = meta_op(cx, nr, MetaOp::Close).await;
    }
}

impl Core {
    /// The method of write ordering that all disks allow. Spec: io-path §2.4.
    pub(super) fn update_ordering(&mut self) {
        use crate::peer_write::epochs::Ordering;
        let disks = self
            .volumes
            .values()
            .filter(|v| v.disk.is_some())
            .map(|v| (v.config.disk_flushes, v.config.disk_drain));
        let allowed = Ordering::allowed(disks);
        let before = self.peer_epochs.ordering;
        self.peer_epochs.ordering = allowed;
        if allowed != before || allowed == Ordering::Flush {
            let text = format!("Method to ensure write ordering: {}", allowed.name());
            self.log(Severity::Info, None, text);
        }
    }

    /// An extent number for the activity log.
    pub(super) fn al_extent(extent: u64) -> AlExtentNr {
        // A device has at most 2^41 sectors, that is 2^28 extents.
        AlExtentNr(u32::try_from(extent).unwrap_or(u32::MAX))
    }
}
