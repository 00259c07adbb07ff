//! What is watched after every step: the oracle, and the invariants of spec
//! `io-path-and-resync.md`, section 13.

use drbd_core::action::AppError;
use drbd_core::config::{Fencing, Protocol};
use drbd_core::log_line::LogLine;
use drbd_types::{Cstate, Dstate, Fields, Role};

use super::{Checked, Pending, Run, broken};
use crate::node::AppResult;
use crate::oracle::End;
use crate::world::range;

impl Run {
    pub(super) fn audit(&self) -> Checked {
        for node in 0..2 {
            if let Some(text) = self.world.nodes[node].engine.audit().first() {
                return broken("audit", format!("node {node}: {text}"));
            }
        }
        for volume in self.volumes() {
            let differing = self.differing(volume);
            self.check_covered(volume, &differing)?;
            self.check_targets(volume, &differing)?;
        }
        Ok(())
    }

    /// See [`SimDisk::differing`](crate::disk::SimDisk::differing); none if a disk is not there.
    pub(super) fn differing(&self, volume: u16) -> Vec<u64> {
        let [a, b] = &self.world.nodes;
        match (a.disks.get(&volume), b.disks.get(&volume)) {
            (Some(left), Some(right)) => left.differing(right),
            _ => Vec::new(),
        }
    }

    /// Invariant 14: blocks that differ are marked, or being written, or in the activity log.
    pub(super) fn check_covered(&self, volume: u16, differing: &[u64]) -> Checked {
        let [a, b] = &self.world.nodes;
        let (Some(x), Some(y)) = (self.state(0, volume), self.state(1, volume)) else {
            return Ok(());
        };
        if x.disk < Dstate::Inconsistent || y.disk < Dstate::Inconsistent {
            return Ok(());
        }
        for &sector in differing {
            let bit = sector / 8;
            let is_marked =
                || [a, b].iter().any(|node| node.engine.is_dirty(volume, bit) == Some(true));
            let extent = u32::try_from(sector >> 13).unwrap_or(0);
            let is_hot = || {
                [(a, &x), (b, &y)].iter().any(|(node, state)| {
                    let keeps_log = state.role == Role::Primary || state.peer == Role::Primary;
                    keeps_log && node.engine.is_hot(volume, extent)
                })
            };
            let block = range(sector / 8 * 8, 8);
            let is_written = || [a, b].iter().any(|n| n.engine.is_being_written(volume, block));
            if !is_marked() && !is_hot() && !is_written() {
                let [left, right] = [a, b].map(|node| node.disks[&volume].sector(sector));
                return broken(
                    "uncovered",
                    format!(
                        "volume {volume} sector {sector} differs ({left} and {right}) and nobody \
                         knows (14)"
                    ),
                );
            }
        }
        Ok(())
    }

    // ---- states ----

    pub(super) fn read_log(&mut self, node: usize) {
        if self.lines[node] == self.world.nodes[node].log.len() {
            return;
        }
        let new = self.lines[node].min(self.world.nodes[node].log.len());
        let lines = self.world.nodes[node].log[new..].to_vec();
        self.lines[node] = self.world.nodes[node].log.len();
        for LogLine { volume, text, .. } in lines {
            if let Some(volume) = volume
                && asks_for_demotion(&text)
            {
                self.demotions[node].insert(volume.0);
            }
            // Old peers can not tell which of two equal disks a crash has left behind, unless both
            // are Secondary. Spec: states §4.4, rule 41.
            if let Some(volume) = volume
                && text == "Equivalent unrotated UUIDs, but current primary present."
            {
                for node in &mut self.demotions {
                    node.insert(volume.0);
                }
            }
            if text.starts_with("Split-Brain detected") && text.contains("solved. Sync from") {
                let loser = if text.contains("Sync from peer") { node } else { 1 - node };
                for volume in self.volumes() {
                    self.oracle.forgive(volume, loser);
                }
            }
            if let Some(volume) = volume
                && text == "To resolve this both sides have to support at least protocol 91"
            {
                self.outgrown.insert(volume.0);
            }
            // Somebody asked for it, perhaps long ago: a command waits until it may be carried out.
            // Spec: states §9.1.
            if let Some(volume) = volume
                && text == "Forced to consider local data as UpToDate!"
            {
                self.oracle.forgive_all(volume.0);
            }
            // Rule 51 is the target's, 71 the source's, also where the version is too old for them.
            let older = match text.as_str() {
                "uuid_compare()=-1091 by rule 51" => Some(node),
                "uuid_compare()=-1091 by rule 71" => Some(1 - node),
                _ => None,
            };
            if let (Some(volume), Some(older)) = (volume, older) {
                self.older.insert(volume.0, older);
            }
            // Two histories of promotions without each other are longer than the two slots for them:
            // no connect option helps then, only new meta-data for one. Spec: states §4.4, §4.5.
            if let Some(volume) = volume
                && text == "Unrelated data, aborting!"
            {
                self.unrelated.insert(volume.0);
            }
            if text.starts_with("Split-Brain detected but unresolved")
                || text == "State change failed: Multiple primaries not allowed by config"
            {
                self.is_split = true;
                // A policy may be against it: then the other one.
                self.splits += 1;
                if self.splits.is_multiple_of(4) {
                    self.victim = 1 - self.victim;
                }
            }
        }
    }

    /// A state has changed.
    pub(super) fn look(&mut self, node: usize) -> Checked {
        for volume in self.volumes() {
            let at = usize::from(volume);
            let was = self.seen[node][at];
            let is = self.state(node, volume);
            if was == is {
                continue;
            }
            self.seen[node][at] = is;
            let Some(is) = is else { continue };
            self.check_state(node, volume, &is)?;
            // A disk with errors counts as worthless when another one is good, even if it was the
            // only one with the newest data.
            let fails = was.is_some_and(|was| was.disk == Dstate::UpToDate)
                && is.disk == Dstate::Inconsistent
                && !matches!(is.conn, Cstate::WFBitMapT | Cstate::WFSyncUUID | Cstate::SyncTarget);
            if fails {
                self.oracle.forgive(volume, node);
            }
            // With protocols A and B what it had completed may still have been on the way: it is lost
            // with the disk if the peer is promoted, as in a crash of the whole node. Spec:
            // io-path-and-resync.md §1.11, first row.
            let is_cut_off =
                |s: &Fields| s.disk < Dstate::Inconsistent && s.conn < Cstate::Connected;
            if was.is_some_and(|was| !is_cut_off(&was)) && is_cut_off(&is) {
                self.oracle.stopped(node, self.setup.net.protocol == Protocol::C);
            }
            self.check_covered(volume, &self.differing(volume))?;
            let is_good = |s: &Fields| {
                s.disk == Dstate::UpToDate
                    && s.pdsk == Dstate::UpToDate
                    && s.conn >= Cstate::Connected
            };
            if is_good(&is) && !was.as_ref().is_some_and(is_good) {
                self.became_equal(node, volume)?;
            }
        }
        Ok(())
    }

    /// Both disks are UpToDate and connected, says this node: it must have everything (34).
    pub(super) fn became_equal(&mut self, node: usize, volume: u16) -> Checked {
        let other = 1 - node;
        let other_is_good = self
            .state(other, volume)
            .is_some_and(|s| s.disk == Dstate::UpToDate && s.conn >= Cstate::Connected);
        if !other_is_good || self.setup.net.protocol != Protocol::C {
            return Ok(());
        }
        for at in [node, other] {
            self.check_disk(at, volume, [true; 2], "lost")?;
        }
        self.oracle.merged(volume);
        Ok(())
    }

    /// Everything on a disk is what it may be.
    pub(super) fn check_disk(
        &mut self,
        node: usize,
        volume: u16,
        nodes: [bool; 2],
        kind: &'static str,
    ) -> Checked {
        let now = self.oracle.tick();
        let Some(disk) = self.world.nodes[node].disks.get(&volume) else { return Ok(()) };
        for sector in self.oracle.known_sectors(volume) {
            let legal = self.oracle.is_legal(volume, sector, disk.sector(sector), nodes, now, true);
            if let Err(text) = legal {
                return broken(kind, format!("on the disk of node {node}: {text}"));
            }
        }
        Ok(())
    }

    pub(super) fn check_state(&self, node: usize, volume: u16, is: &Fields) -> Checked {
        let are_two = is.role == Role::Primary && is.peer == Role::Primary;
        if are_two && !self.setup.net.two_primaries && is.conn >= Cstate::Connected {
            return broken("two", format!("node {node} volume {volume}: two Primaries: {is:?}"));
        }
        Ok(())
    }

    // ---- requests ----

    /// Who answers for what a node reads now.
    pub(super) fn responsible(&self, node: usize, volume: u16) -> [bool; 2] {
        let mut nodes = [false; 2];
        let Some(state) = self.state(node, volume) else { return nodes };
        // An Inconsistent disk of a node that is alone still answers with its good blocks.
        if state.disk == Dstate::UpToDate || state.conn < Cstate::Connected {
            nodes[node] = true;
        } else {
            nodes[1 - node] = true;
        }
        nodes
    }

    pub(super) fn completed(&mut self, node: usize, id: u64, result: AppResult) -> Checked {
        let Some((volume, pending)) = self.pending[node].remove(&id) else {
            return broken("twice", format!("node {node}: request {id} completed twice (1)"));
        };
        let Some(state) = self.state(node, volume) else { return Ok(()) };
        match pending {
            Pending::Write => self.write_completed(node, volume, id, &result, &state),
            Pending::Read { volume, start, since, nodes } => {
                let Ok(Some(data)) = result else {
                    return self.check_failure(node, volume, &result, &state);
                };
                let now = self.responsible(node, volume);
                for (sector, tag) in (start..).zip(data.iter().copied()) {
                    let legal =
                        |nodes| self.oracle.is_legal(volume, sector, tag, nodes, since, false);
                    if let Err(text) = legal(nodes).or_else(|_| legal(now)) {
                        return broken("read", format!("node {node} read {id}: {text} (2)"));
                    }
                }
                Ok(())
            }
            Pending::Flush { volume, since } => {
                if result.is_ok() {
                    let mut nodes = [false; 2];
                    // The local part, if there is one. Spec: io-path-and-resync.md §3.2.
                    nodes[node] = state.disk >= Dstate::Inconsistent;
                    nodes[1 - node] = self.setup.net.protocol == Protocol::C
                        && state.pdsk == Dstate::UpToDate
                        && state.conn >= Cstate::Connected;
                    self.oracle.flushed(volume, since, nodes);
                }
                Ok(())
            }
        }
    }

    pub(super) fn write_completed(
        &mut self,
        node: usize,
        volume: u16,
        id: u64,
        result: &AppResult,
        state: &Fields,
    ) -> Checked {
        let other = 1 - node;
        let their = self.state(other, volume);
        let is_mirrored = state.pdsk == Dstate::UpToDate && state.conn >= Cstate::Connected;
        let mut obliged = [false; 2];
        obliged[node] = state.disk == Dstate::UpToDate;
        let mut is_lossy = false;
        if is_mirrored {
            match self.setup.net.protocol {
                Protocol::C => match their {
                    Some(their) => obliged[other] = their.disk == Dstate::UpToDate,
                    // It was there when it acknowledged.
                    None => is_lossy = true,
                },
                Protocol::A | Protocol::B => is_lossy = !obliged[node] || their.is_none(),
            }
        }
        // Before this version a write that overlaps one of the other Primary in part is dropped, not
        // done again.
        is_lossy |= self.setup.net.two_primaries && self.setup.net.versions.1 < 100;
        self.oracle.end(id, End { is_ok: result.is_ok(), obliged, is_lossy, durable: [false; 2] });
        if obliged[other] && !is_lossy {
            self.check_copy(other, volume, id)?;
        }
        let fencing = self.setup.disk[node].fencing;
        let is_unfenced =
            state.conn < Cstate::Connected && state.pdsk == Dstate::DUnknown && state.susp_fen;
        // An acknowledged epoch is on both: the own disk may have been the slower one (5).
        let is_on_peer = self.world.nodes[other]
            .disks
            .get(&volume)
            .is_some_and(|disk| self.oracle.is_held(id, |sector| disk.sector(sector)));
        if fencing == Fencing::ResourceAndStonith && is_unfenced && !is_on_peer && result.is_ok() {
            return broken(
                "unfenced",
                format!("node {node}: write {id} completed while the peer is not fenced (30)"),
            );
        }
        self.check_failure(node, volume, result, state)
    }

    /// A request fails only if no good data is reachable (1, 50).
    pub(super) fn check_failure(
        &self,
        node: usize,
        volume: u16,
        result: &AppResult,
        state: &Fields,
    ) -> Checked {
        if *result != Err(AppError::Io) {
            return Ok(());
        }
        let their = self.state(1 - node, volume);
        let is_reachable = |s: &Fields| {
            s.conn == Cstate::Connected && s.pdsk == Dstate::UpToDate && s.disk == Dstate::UpToDate
        };
        if is_reachable(state) && their.as_ref().is_some_and(is_reachable) {
            return broken(
                "failed",
                format!(
                    "node {node} volume {volume}: a request failed while all is well: {state:?}"
                ),
            );
        }
        Ok(())
    }

    /// A node that serves applications; this one, if both do.
    pub(super) fn primary(&self, node: usize, volume: u16) -> Option<usize> {
        [node, 1 - node].into_iter().find(|at| {
            let node = &self.world.nodes[*at];
            node.is_up && node.offers.get(&volume).is_some_and(|offer| offer.is_primary)
        })
    }
}

/// A Primary whose data is older than the peer's does not become the target of a resync, and one
/// that has lost its disk takes no other data than what it had last: both stay apart until an
/// administrator demotes them. Spec: states §3.7, §4.5.
fn asks_for_demotion(text: &str) -> bool {
    text == "I shall become SyncTarget, but I am primary!"
        || text.starts_with("Can only connect to data with current UUID=")
        || text.starts_with("Can only attach to data with current UUID=")
}
