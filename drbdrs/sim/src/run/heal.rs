//! The end of a run: faults stop, and an operator brings everything back.

use drbd_core::admin::Command;
use drbd_types::{Cstate, Dstate, Fields, Role, VolumeNr};

use super::{Checked, PATIENCE, Run, broken, create_md};
use crate::world::Faults;

impl Run {
    /// Faults stop, and an operator brings everything back.
    pub(super) fn heal(&mut self) -> Checked {
        self.world.tell(|| "* faults stop".to_owned());
        self.world.faults = Faults::NONE;
        self.world.cut(false);
        for node in 0..2 {
            for disk in self.world.nodes[node].disks.values_mut() {
                disk.is_dead = false;
                disk.bad.clear();
            }
        }
        let mut end = self.world.now().0 + PATIENCE;
        let mut well = 0;
        let mut rounds = 0_u32;
        while self.world.now().0 < end {
            let before = self.to_resync();
            self.run_to(self.world.now().0 + 3_000_000)?;
            let after = self.to_resync();
            // A resync that gets on is not stuck, however slow its disks are.
            if before.iter().zip(&after).any(|(b, a)| a.zip(*b).is_some_and(|(a, b)| a < b)) {
                end += 3_000_000;
            }
            if self.is_at_rest() {
                well += 1;
                if well > 2 {
                    return self.last_checks();
                }
            } else {
                well = 0;
                rounds += 1;
                if rounds.is_multiple_of(60) && self.is_data_lost() {
                    self.last_resort()?;
                } else {
                    self.repair()?;
                }
            }
        }
        let mut text = format!("not well again: {}\nwho waits for what:\n", self.unrest());
        for node in 0..2 {
            text +=
                &format!("node {node}:\n{}\n", self.world.nodes[node].engine.waits().join("\n"));
            text += &format!("  requests: {:?}\n", self.pending[node]);
            text += &format!("  script: {:?}\n", self.scripts[node]);
        }
        broken("stuck", text)
    }

    /// What is left of the resyncs that run.
    fn to_resync(&self) -> Vec<Option<u64>> {
        let places = self.volumes().flat_map(|volume| [(0, volume), (1, volume)]);
        let left = |(node, volume): (usize, u16)| {
            let is_target = self.state(node, volume).is_some_and(|s| s.conn == Cstate::SyncTarget);
            is_target.then(|| self.world.nodes[node].engine.dirty_bits(volume))
        };
        places.map(left).collect()
    }

    pub(super) fn is_at_rest(&self) -> bool {
        self.boots.is_empty()
            && (0..2).all(|node| self.pending[node].is_empty() && self.is_script_idle(node))
            && self.volumes().all(|volume| {
                (0..2).all(|node| {
                    self.state(node, volume).is_some_and(|s| {
                        s.conn == Cstate::Connected
                            && s.disk == Dstate::UpToDate
                            && s.pdsk == Dstate::UpToDate
                            && !s.is_suspended()
                    }) && self.world.nodes[node].engine.log_len() == 0
                        && self.world.nodes[node].engine.dirty_bits(volume) == 0
                })
            })
    }

    /// Is there a volume of which nobody has good data?
    pub(super) fn is_data_lost(&self) -> bool {
        self.volumes().any(|volume| {
            (0..2).all(|node| self.state(node, volume).is_some_and(|s| s.disk < Dstate::UpToDate))
        })
    }

    /// Both nodes start anew, and what one of them has is declared good.
    pub(super) fn last_resort(&mut self) -> Checked {
        self.world.tell(|| "* last resort".to_owned());
        for node in 0..2 {
            if self.world.nodes[node].is_up {
                self.world.stop(node, false);
                self.has_stopped(node, false);
            }
        }
        self.boots.clear();
        for volume in self.volumes() {
            self.oracle.forgive_all(volume);
        }
        self.world.boot(0);
        self.bring_up(0)?;
        self.run_until(120_000_000, |run| run.is_script_idle(0))?;
        let force = |volume| Command::Primary { volume: VolumeNr(volume), force: true };
        let commands: Vec<Command> = self.volumes().map(force).collect();
        self.script(0, commands);
        self.run_until(120_000_000, |run| run.is_script_idle(0))?;
        self.world.boot(1);
        self.bring_up(1)
    }

    /// What is not at rest.
    pub(super) fn unrest(&self) -> String {
        let mut all = Vec::new();
        for node in 0..2 {
            if !self.pending[node].is_empty() {
                all.push(format!("node {node} has {} requests", self.pending[node].len()));
            }
            if !self.is_script_idle(node) {
                all.push(format!("node {node} has no answer to a command"));
            }
            let engine = &self.world.nodes[node].engine;
            if engine.log_len() > 0 {
                all.push(format!("node {node} has {} in the log", engine.log_len()));
            }
            for volume in self.volumes() {
                let bits = engine.dirty_bits(volume);
                if let Some(s) = self.state(node, volume)
                    && (s.conn, s.disk, s.pdsk)
                        != (Cstate::Connected, Dstate::UpToDate, Dstate::UpToDate)
                {
                    all.push(format!(
                        "node {node} volume {volume}: {:?} {:?}/{:?}",
                        s.conn, s.disk, s.pdsk
                    ));
                }
                if bits > 0 {
                    all.push(format!("node {node} volume {volume}: {bits} bits"));
                }
            }
        }
        all.join(", ")
    }

    /// One round of an administrator who does what is to be done.
    pub(super) fn repair(&mut self) -> Checked {
        for node in 0..2 {
            if !self.world.nodes[node].is_up && self.boots.is_empty() {
                self.world.boot(node);
                self.bring_up(node)?;
            }
            if !self.world.nodes[node].is_up || !self.is_script_idle(node) {
                continue;
            }
            let mut commands = self.demote(node);
            for volume in self.volumes() {
                let nr = VolumeNr(volume);
                let Some(state) = self.state(node, volume) else { continue };
                if state.susp {
                    commands.push(Command::ResumeIo(nr));
                }
                if state.user_isp {
                    commands.push(Command::ResumeSync(nr));
                }
                if self.is_to_be_renewed(node, volume, &state) {
                    self.outgrown.remove(&volume);
                    self.older.remove(&volume);
                    if self.unrelated.remove(&volume) {
                        self.oracle.forgive(volume, node);
                    }
                    self.renewed.insert((node, volume));
                    commands.extend(self.demotion(node, volume));
                    commands.push(Command::Detach { volume: nr, force: false });
                } else if state.disk == Dstate::Diskless {
                    if self.renewed.remove(&(node, volume)) {
                        let disk = self.world.nodes[node].disks.get_mut(&volume);
                        let _ = disk.map(create_md);
                    }
                    // Its log was kept for a crash; an orderly attach needs it applied too.
                    if let Err(text) = self.apply_log(node, volume) {
                        return broken("apply-al", format!("node {node} volume {volume}: {text}"));
                    }
                    commands.push(self.attach(node, volume));
                }
            }
            if let Some(again) = self.attach_again(node) {
                self.script(node, again);
                continue;
            }
            let conn = self.state(node, 0).map_or(Cstate::StandAlone, |s| s.conn);
            // The victim of a split brain may not have noticed: only one side decides so at times.
            let gives_up = self.is_split && node == self.victim && conn < Cstate::WFReportParams;
            if conn == Cstate::StandAlone || gives_up {
                commands.extend(self.reconnect(node));
            }
            commands.extend(self.promote_for_data(node));
            commands.extend(self.resync_marked(node));
            self.repairs += commands.len() as u64;
            self.script(node, commands);
        }
        Ok(())
    }

    /// After a split brain one node gives its data up.
    pub(super) fn reconnect(&mut self, node: usize) -> Vec<Command> {
        let mut commands = vec![Command::Disconnect { force: false }];
        let is_victim = self.is_split && node == self.victim;
        // Until a handshake finds it again.
        self.is_split &= !is_victim;
        if is_victim {
            for volume in self.volumes() {
                commands.extend(self.demotion(node, volume));
            }
        }
        commands.push(self.net(is_victim));
        commands
    }

    /// Primaries that said that they can not go on as such.
    fn demote(&mut self, node: usize) -> Vec<Command> {
        let volumes = std::mem::take(&mut self.demotions[node]);
        let is_primary =
            |volume: &u16| self.state(node, *volume).is_some_and(|s| s.role == Role::Primary);
        let primaries = volumes.into_iter().filter(is_primary);
        primaries.flat_map(|volume| self.demotion(node, volume)).collect()
    }

    /// Below protocol 91 two nodes whose last P_SYNC_UUID was lost never connect again, nor do those
    /// that have nothing in common: new meta-data for the one with the worse data is what is left.
    fn is_to_be_renewed(&self, node: usize, volume: u16, own: &Fields) -> bool {
        let loser = self.older.get(&volume).copied().unwrap_or(self.victim);
        (self.outgrown.contains(&volume) || self.unrelated.contains(&volume))
            && self
                .state(1 - node, volume)
                .is_some_and(|their| (own.disk, node != loser) < (their.disk, node == loser))
    }

    /// Frozen requests keep the device open: they have to fail first.
    fn demotion(&self, node: usize, volume: u16) -> Vec<Command> {
        let nr = VolumeNr(volume);
        let is_frozen = self.state(node, volume).is_some_and(|s| s.is_suspended());
        let resume = is_frozen.then_some(Command::ResumeIo(nr));
        resume.into_iter().chain([Command::Secondary(nr)]).collect()
    }

    /// A split brain was found by an attach: the data that was to be attached is given up.
    pub(super) fn attach_again(&mut self, node: usize) -> Option<Vec<Command>> {
        let is_refused = |s: &Fields| {
            matches!(s.disk, Dstate::Diskless | Dstate::Negotiating) && s.conn == Cstate::Connected
        };
        let refused: Vec<u16> = self
            .volumes()
            .filter(|volume| self.state(node, *volume).as_ref().is_some_and(is_refused))
            .collect();
        if !self.is_split || refused.is_empty() {
            return None;
        }
        self.victim = node;
        let mut commands = Vec::new();
        for volume in refused {
            commands.push(Command::Detach { volume: VolumeNr(volume), force: false });
        }
        commands.push(Command::Disconnect { force: true });
        for volume in self.volumes() {
            commands.extend(self.demotion(node, volume));
            commands.push(self.attach(node, volume));
        }
        commands.push(self.net(true));
        Some(commands)
    }

    /// Nobody has good data: somebody's is declared good.
    pub(super) fn promote_for_data(&self, node: usize) -> Vec<Command> {
        let mut commands = Vec::new();
        for volume in self.volumes() {
            let Some(state) = self.state(node, volume) else { continue };
            let is_hopeless = state.conn == Cstate::Connected
                && state.disk != Dstate::Negotiating
                && state.pdsk != Dstate::Negotiating
                && state.disk < Dstate::UpToDate
                && state.pdsk < Dstate::UpToDate
                && state.disk >= Dstate::Inconsistent;
            if is_hopeless && state.disk >= state.pdsk && (state.disk > state.pdsk || node == 0) {
                commands.push(Command::Primary { volume: VolumeNr(volume), force: true });
            }
        }
        commands
    }

    /// Connected and good, but with marked blocks (a verify or an error found them): a new
    /// connection resyncs them, or an invalidation.
    pub(super) fn resync_marked(&self, node: usize) -> Vec<Command> {
        let mut commands = Vec::new();
        for volume in self.volumes() {
            let Some(state) = self.state(node, volume) else { continue };
            let bits = self.world.nodes[node].engine.dirty_bits(volume);
            let is_idle = state.conn == Cstate::Connected
                && state.pdsk == Dstate::UpToDate
                && state.role == Role::Secondary;
            let needs = (state.disk == Dstate::UpToDate && bits > 0)
                || (state.disk >= Dstate::Inconsistent && state.disk < Dstate::UpToDate);
            if is_idle && needs {
                commands.push(Command::Invalidate(VolumeNr(volume)));
            }
            // A Primary does not invalidate itself: a new attach makes it the target.
            let is_bad = state.conn == Cstate::Connected
                && state.pdsk == Dstate::UpToDate
                && state.role == Role::Primary
                && state.disk >= Dstate::Inconsistent
                && state.disk < Dstate::UpToDate;
            if is_bad {
                commands.push(Command::Detach { volume: VolumeNr(volume), force: false });
                commands.push(self.attach(node, volume));
            }
            let is_source = state.conn == Cstate::Connected
                && state.disk == Dstate::UpToDate
                && state.role == Role::Primary;
            let peer_bits = self.world.nodes[1 - node].engine.dirty_bits(volume);
            if is_source && (bits > 0 || peer_bits > 0) && state.pdsk == Dstate::UpToDate {
                commands.push(Command::InvalidateRemote(VolumeNr(volume)));
            }
        }
        commands
    }

    pub(super) fn last_checks(&mut self) -> Checked {
        self.audit()?;
        for node in 0..2 {
            let found = self.world.nodes[node].engine.audit_idle();
            if !found.is_empty() {
                return broken("idle", format!("node {node} at rest: {}", found.join("; ")));
            }
            let buffers = self.world.nodes[node].buffers_in_use();
            if buffers > 0 {
                return broken("leak", format!("node {node}: {buffers} buffers are still lent"));
            }
        }
        for volume in self.volumes() {
            if let Some(sector) = self.differing(volume).first() {
                return broken("differ", format!("volume {volume}: the disks differ at {sector}"));
            }
            for node in 0..2 {
                self.check_disk(node, volume, [true; 2], "lost")?;
            }
        }
        Ok(())
    }
}
