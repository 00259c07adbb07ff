//! The operations of a scenario: requests, commands, faults, and how a node goes down and up.

use drbd_core::admin::Command;
use drbd_core::config::{NetConfig, Protocol};
use drbd_core::event::{AppOp, WriteFlags};
use drbd_types::{ByteLen, Dstate, Minor, SectorCount, VolumeNr};
use drbdmeta::al::replay;
use drbdmeta::layout::Placement;
use drbdmeta::ops::{ApplyPlan, apply, plan_apply};
use drbdmeta::superblock::Superblock;

use super::{Checked, Pending, Run, Script, broken};
use crate::meta::DiskIo;
use crate::scenario::{How, Op};
use crate::world::range;

impl Run {
    pub(super) fn carry_out(&mut self, op: &Op) -> Checked {
        self.world.tell(|| format!("* {op:?}"));
        match op {
            Op::Write { node, volume, start, len, how } => {
                self.begin_write(*node, *volume, *start, *len, *how);
            }
            Op::Read { node, volume, start, len } => {
                self.begin_read(*node, *volume, *start, *len);
            }
            Op::Flush { node, volume } => {
                if let Some(node) = self.primary(*node, *volume) {
                    let since = self.oracle.tick();
                    let id = self.world.next_request();
                    let pending = Pending::Flush { volume: *volume, since };
                    self.pending[node].insert(id, (*volume, pending));
                    self.world.request(node, *volume, AppOp::Flush);
                }
            }
            Op::Admin { node, command } => self.command(*node, command.clone()),
            Op::Attach { node, volume } => {
                // What `drbdadm attach` does first; it fails where the attach will fail too.
                let is_diskless =
                    self.state(*node, *volume).is_some_and(|s| s.disk == Dstate::Diskless);
                if is_diskless {
                    let _ = self.apply_log(*node, *volume);
                }
                let command = self.attach(*node, *volume);
                self.command(*node, command);
            }
            Op::Connect { node } => {
                let net = self.net(false);
                self.script(*node, [Command::Disconnect { force: false }, net]);
            }
            Op::Stop { node, power_cut, down } => self.stop(*node, *power_cut, *down),
            Op::Block { zero, one, time } => {
                for (node, is_blocked) in [zero, one].into_iter().enumerate() {
                    if *is_blocked {
                        self.world.block(node, *time);
                    }
                }
            }
            Op::Reset => self.world.reset_all(),
            Op::Bad { node, volume, sector } => {
                if let Some(disk) = self.world.nodes[*node].disks.get_mut(volume) {
                    disk.bad.insert(*sector);
                }
            }
            Op::Dead { node, volume, is_dead } => {
                if let Some(disk) = self.world.nodes[*node].disks.get_mut(volume) {
                    disk.is_dead = *is_dead;
                }
            }
        }
        self.after_step()
    }

    pub(super) fn begin_write(&mut self, node: usize, volume: u16, start: u64, len: u64, how: How) {
        let Some(node) = self.primary(node, volume) else { return };
        let Some(offer) = self.world.nodes[node].offers.get(&volume).copied() else { return };
        if start + len > offer.size.0 {
            return;
        }
        let is_zero = match how {
            How::Discard => offer.max_discard > 0,
            How::Zeroes => offer.max_write_zeroes > 0,
            How::Plain | How::Fua | How::Preflush => false,
        };
        let id = self.world.next_request();
        let tags: Vec<u64> = (1..=len).map(|i| if is_zero { 0 } else { id * 4096 + i }).collect();
        self.oracle.begin(id, volume, node, start, &tags);
        self.pending[node].insert(id, (volume, Pending::Write));
        let place = range(start, len);
        if is_zero {
            let op = match how {
                How::Discard => AppOp::Discard { range: place },
                _ => AppOp::WriteZeroes { range: place, may_unmap: id.is_multiple_of(2) },
            };
            self.world.request(node, volume, op);
        } else {
            let flags = WriteFlags {
                fua: how == How::Fua,
                preflush: how == How::Preflush,
                ..WriteFlags::default()
            };
            self.world.write_with(node, volume, start, tags, flags);
        }
    }

    pub(super) fn begin_read(&mut self, node: usize, volume: u16, start: u64, len: u64) {
        let Some(node) = self.primary(node, volume) else { return };
        let size = self.world.nodes[node].offers.get(&volume).map_or(0, |offer| offer.size.0);
        if start + len > size {
            return;
        }
        let since = self.oracle.tick();
        let nodes = self.responsible(node, volume);
        let id = self.world.next_request();
        let pending = Pending::Read { volume, start, since, nodes };
        self.pending[node].insert(id, (volume, pending));
        self.world.read(node, volume, start, len);
    }

    // ---- administration ----

    pub(super) fn net(&self, discard_my_data: bool) -> Command {
        Command::Connect(Box::new(NetConfig { discard_my_data, ..self.setup.net.clone() }))
    }

    pub(super) fn attach(&self, node: usize, volume: u16) -> Command {
        let mut config = self.setup.disk[node].clone();
        // Without this a device as large as its disk grows at once.
        config.size = SectorCount(0);
        Command::Attach { volume: VolumeNr(volume), config: Box::new(config) }
    }

    /// Gives a command.
    pub(super) fn command(&mut self, node: usize, command: Command) {
        if self.world.nodes[node].is_up {
            self.note_command(node, &command);
            self.world.command(node, command);
        }
    }

    /// Notes what may be lost by a command.
    pub(super) fn note_command(&mut self, node: usize, command: &Command) {
        match command {
            Command::Invalidate(nr) => self.oracle.forgive(nr.0, node),
            Command::InvalidateRemote(nr) => self.oracle.forgive(nr.0, 1 - node),
            Command::Primary { volume, force: true } => {
                // What is here is declared good, and what is only there is not.
                let is_good =
                    self.state(node, volume.0).is_some_and(|s| s.disk == Dstate::UpToDate);
                if !is_good {
                    self.oracle.forgive_all(volume.0);
                }
                self.oracle.forgive(volume.0, 1 - node);
            }
            Command::Connect(net) if net.discard_my_data => {
                for volume in self.volumes() {
                    self.oracle.forgive(volume, node);
                }
            }
            _ => {}
        }
    }

    pub(super) fn script(&mut self, node: usize, commands: impl IntoIterator<Item = Command>) {
        if self.world.nodes[node].is_up && self.is_script_idle(node) {
            self.scripts[node].rest.extend(commands);
            self.go_on(node);
        }
    }

    /// The next command of a script, when the one before was answered.
    pub(super) fn go_on(&mut self, node: usize) {
        loop {
            if let Some(ticket) = self.scripts[node].ticket {
                let Some(reply) = self.world.nodes[node].replies.remove(&ticket) else { return };
                self.world.tell(|| format!("* node {node}: {reply:?}"));
                self.scripts[node].ticket = None;
            }
            let Some(command) = self.scripts[node].rest.pop_front() else { return };
            self.note_command(node, &command);
            self.world.tell(|| format!("* node {node}: {command:?}"));
            self.scripts[node].ticket = Some(self.world.command(node, command));
        }
    }

    pub(super) fn is_script_idle(&self, node: usize) -> bool {
        self.scripts[node].ticket.is_none() && self.scripts[node].rest.is_empty()
    }

    pub(super) fn stop(&mut self, node: usize, power_cut: bool, down: u64) {
        if !self.world.nodes[node].is_up {
            return;
        }
        self.world.stop(node, power_cut);
        self.has_stopped(node, power_cut);
        self.boots.push((self.world.now().0 + down, node));
    }

    pub(super) fn has_stopped(&mut self, node: usize, power_cut: bool) {
        for id in std::mem::take(&mut self.pending[node]).into_keys() {
            // With two Primaries a write of the dead one may be on its way while the other writes.
            if !self.setup.net.two_primaries {
                self.oracle.lose(id);
            }
        }
        self.scripts[node] = Script::default();
        self.demotions[node].clear();
        self.oracle.stopped(node, self.setup.net.protocol == Protocol::C);
        if power_cut && self.setup.is_volatile {
            self.oracle.power_cut(node);
        }
        self.lines[node] = 0;
        self.versions[node] = 0;
        self.seen[node].fill(None);
    }

    /// What `drbdadm up` does.
    pub(super) fn bring_up(&mut self, node: usize) -> Checked {
        let mut commands = vec![Command::ResourceOptions(self.setup.resource)];
        for volume in self.volumes() {
            if let Err(text) = self.apply_log(node, volume) {
                return broken("apply-al", format!("node {node} volume {volume}: {text}"));
            }
            let minor = Minor(u32::from(volume));
            commands.push(Command::NewVolume { volume: VolumeNr(volume), minor });
            commands.push(self.attach(node, volume));
        }
        commands.push(self.net(false));
        self.script(node, commands);
        Ok(())
    }

    /// What `drbdmeta apply-al` does.
    pub(super) fn apply_log(&mut self, node: usize, volume: u16) -> Result<(), String> {
        let Some(disk) = self.world.nodes[node].disks.get_mut(&volume) else { return Ok(()) };
        let length = ByteLen(disk.meta_len);
        let mut io = DiskIo(disk);
        let at = Placement::FlexExternal.superblock(length).ok_or("no place")?;
        let mut block = [0; 4096];
        drbdmeta::io::MetaIo::read_at(&mut io, at, &mut block).map_err(|e| e.to_string())?;
        let mut superblock = Superblock::from_disk(&block).map_err(|e| e.to_string())?;
        let layout = superblock
            .check(Placement::FlexExternal, length)
            .map_err(|e| format!("superblock: {e:?}"))?;
        let replay = replay(&mut io, &layout, &superblock).map_err(|e| e.to_string())?;
        match plan_apply(&superblock, &replay) {
            ApplyPlan::Refuse(exit) => Err(format!("the log is unreadable, exit {exit}")),
            ApplyPlan::Do { mark, reinitialise, .. } => {
                apply(&mut io, &layout, &mut superblock, &replay.outcome, mark, reinitialise)
                    .map_err(|e| e.to_string())?;
                Ok(())
            }
        }
    }
}
