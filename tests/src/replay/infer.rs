//! What the recorded node was told to do, from what it sent next.

use drbd_core::admin::Command;
use drbd_core::event::{AppOp, WriteFlags};
use drbd_sim::script::Script;
use drbd_types::{Cstate, Dstate, Minor, Role, SectorCount, StateWord, VolumeNr};
use drbd_wire::Packet;
use drbd_wire::packet::{Block, ControllerParams, DpFlags, RequestKind};

use super::{range, volume};
use crate::wirecase::Recorded;

pub(super) fn new_volume(script: &mut Script, nr: u16) {
    let minor = Minor(u32::from(nr));
    script.begin(Command::NewVolume { volume: VolumeNr(nr), minor });
}

pub(super) fn promote(script: &mut Script, nr: u16) {
    script.begin(Command::Primary { volume: VolumeNr(nr), force: false });
}

pub(super) fn pause(script: &mut Script, nr: u16) {
    script.begin(Command::PauseSync(VolumeNr(nr)));
}

/// Gives the command or the request that leads to a recorded packet. `later` are the next packets
/// of the same node, with this one as the first.
pub(super) fn before(script: &mut Script, recorded: &Recorded, later: &[&Recorded], version: u32) {
    let nr = recorded.volume;
    let state = script.state(nr);
    match &recorded.packet {
        Packet::StateChgReq(mask, val) => state_request(script, nr, *mask, *val, version),
        Packet::ConnStChgReq(..) => {
            script.begin(Command::Disconnect { force: false });
        }
        Packet::Data(block, _) => {
            let len = recorded.data.len() as u64;
            script.app(volume(nr), |script| AppOp::Write {
                range: range(block.sector.0, len),
                buf: script.buf(len),
                flags: flags(block),
            });
        }
        Packet::OutOfSync(desc) => {
            let len = u64::from(desc.size);
            script.app(volume(nr), |script| AppOp::Write {
                range: range(desc.sector.0, len),
                buf: script.buf(len),
                flags: WriteFlags::default(),
            });
        }
        Packet::Trim(block, size) => {
            let range = range(block.sector.0, u64::from(*size));
            script.app(volume(nr), |_| AppOp::Discard { range });
        }
        Packet::Zeroes(block, size) => {
            let range = range(block.sector.0, u64::from(*size));
            let may_unmap = block.flags.contains(DpFlags::DISCARD);
            script.app(volume(nr), |_| AppOp::WriteZeroes { range, may_unmap });
        }
        Packet::Request(RequestKind::Data, request) => {
            let len = u64::from(request.size);
            script.app(volume(nr), |script| AppOp::Read {
                range: range(request.sector.0, len),
                buf: script.buf(len),
            });
        }
        Packet::State(word) => {
            let Ok(wanted) = word.unpack() else { return };
            let is_missed = |r: &&&Recorded| matches!(r.packet, Packet::OutOfSync(_));
            if wanted.conn == Cstate::Ahead
                && state.conn < Cstate::Ahead
                && let Some(next) = later.iter().find(is_missed)
            {
                // The write that detects the congestion.
                return before(script, next, &[], version);
            }
            if state.role == Role::Primary && wanted.role == Role::Secondary {
                script.begin(Command::Secondary(volume(nr)));
            } else if wanted.user_isp != state.user_isp && wanted.conn >= Cstate::Connected {
                let paused = wanted.user_isp;
                let nr = volume(nr);
                script.begin(if paused { Command::PauseSync(nr) } else { Command::ResumeSync(nr) });
            }
        }
        Packet::Sizes(_) if state.conn >= Cstate::Connected && state.disk == Dstate::Diskless => {
            let config = Box::default();
            if let Some(disk) = script.disks.get_mut(&nr) {
                disk.apply_al();
            }
            script.begin(Command::Attach { volume: volume(nr), config });
        }
        Packet::Uuids(uuids) if state.conn >= Cstate::Connected => {
            if uuids.flags & 8 != 0 {
                let volume = volume(nr);
                script.begin(Command::NewCurrentUuid { volume, clear_bitmap: true });
            } else if let Some(Packet::Sizes(sizes)) = later.get(1).map(|r| &r.packet)
                && sizes.c_size == SectorCount(0)
                && state.disk >= Dstate::Inconsistent
            {
                // The backing device has grown before.
                if let Some(disk) = script.disks.get_mut(&nr) {
                    disk.sectors = disk.sectors.max(sizes.d_size.0);
                }
                script.begin(Command::Resize {
                    volume: volume(nr),
                    size: sizes.u_size,
                    force: false,
                    assume_clean: sizes.dds_flags & 2 != 0,
                    al: Default::default(),
                });
            }
        }
        Packet::ProtocolUpdate(params) => {
            let Some(mut net) = super::start::net_of(params) else { return };
            // The resync parameters follow.
            let next = later.iter().find_map(|r| match &r.packet {
                Packet::SyncParam(params) => Some(params),
                _ => None,
            });
            if let Some(next) = next {
                net.verify_alg.clone_from(&next.verify_alg);
                net.csums_alg.clone_from(&next.csums_alg);
            }
            script.begin(Command::NetOptions(Box::new(net)));
        }
        Packet::SyncParam(params)
            if state.conn >= Cstate::Connected
                && params.controller != Some(script_controller()) =>
        {
            let config = Box::new(super::start::disk_of(params));
            script.begin(Command::DiskOptions { volume: volume(nr), config });
        }
        _ => {}
    }
}

/// The defaults.
const fn script_controller() -> ControllerParams {
    ControllerParams { plan_ahead: 20, delay_target: 10, fill_target: 100, max_rate: 102_400 }
}

fn flags(block: &Block) -> WriteFlags {
    let fua = block.flags.contains(DpFlags::FUA);
    let preflush = block.flags.contains(DpFlags::FLUSH);
    WriteFlags { fua, preflush, sync: block.flags.contains(DpFlags::RW_SYNC) }
}

fn state_request(script: &mut Script, nr: u16, mask: StateWord, val: StateWord, version: u32) {
    let has = |part: StateWord| mask.0 & part.0 != 0;
    let volume = volume(nr);
    let conn = Cstate::from_number(u8::try_from(val.0 >> 4 & 31).unwrap_or(0));
    let disk = Dstate::from_number(u8::try_from(val.0 >> 9 & 15).unwrap_or(0));
    if has(StateWord::ROLE) && val.0 & 3 == 1 {
        let force = has(StateWord::DISK);
        script.begin(Command::Primary { volume, force });
    } else if has(StateWord::CONN) {
        match conn {
            Some(Cstate::VerifyS) => {
                script.begin(Command::Verify { volume, start: None, stop: None });
            }
            Some(Cstate::StartingSyncS) => {
                script.begin(Command::InvalidateRemote(volume));
            }
            Some(Cstate::StartingSyncT) => {
                script.begin(Command::Invalidate(volume));
            }
            Some(Cstate::Disconnecting) if version < 100 => {
                script.begin(Command::Disconnect { force: false });
            }
            _ => {}
        }
    } else if has(StateWord::DISK) && disk == Some(Dstate::Failed) {
        script.begin(Command::Detach { volume, force: false });
    } else if has(StateWord::DISK) && disk == Some(Dstate::Outdated) {
        script.begin(Command::Outdate(volume));
    }
}
