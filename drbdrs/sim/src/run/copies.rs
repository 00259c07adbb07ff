//! What has to be on which disk at this very moment. Spec: io-path-and-resync.md §15, invariants 3,
//! 16 and 33.

use drbd_core::config::Protocol;
use drbd_types::{Cstate, Dstate};

use super::{Checked, Run, broken};
use crate::oracle::WriteId;
use crate::world::range;

impl Run {
    /// A write that has just completed is on the disk of the peer, or a later one is (3).
    pub(super) fn check_copy(&mut self, peer: usize, volume: u16, id: WriteId) -> Checked {
        let is_connected =
            |node| self.state(node, volume).is_some_and(|s| s.conn >= Cstate::Connected);
        if self.setup.net.protocol != Protocol::C || !(0..2).all(is_connected) {
            return Ok(());
        }
        let now = self.oracle.tick();
        let Some(disk) = self.world.nodes[peer].disks.get(&volume) else { return Ok(()) };
        let mut nodes = [false; 2];
        nodes[peer] = true;
        for sector in self.oracle.sectors_of(id) {
            let tag = disk.sector(sector);
            if let Err(text) = self.oracle.is_legal(volume, sector, tag, nodes, now, true) {
                return broken(
                    "copies",
                    format!("on the disk of the peer, node {peer}: {text} (3)"),
                );
            }
        }
        Ok(())
    }

    /// A target has the bit of every block that it lacks, except where a write is under way: a
    /// Primary reads there what is unmarked (16, 33).
    pub(super) fn check_targets(&self, volume: u16, differing: &[u64]) -> Checked {
        for node in 0..2 {
            let (Some(target), Some(source)) =
                (self.state(node, volume), self.state(1 - node, volume))
            else {
                continue;
            };
            let is_target = target.disk == Dstate::Inconsistent
                && matches!(target.conn, Cstate::SyncTarget | Cstate::PausedSyncT);
            let is_source = source.disk == Dstate::UpToDate
                && matches!(source.conn, Cstate::SyncSource | Cstate::PausedSyncS);
            if is_target && is_source {
                self.check_target(node, volume, differing)?;
            }
        }
        Ok(())
    }

    fn check_target(&self, node: usize, volume: u16, differing: &[u64]) -> Checked {
        let [a, b] = &self.world.nodes;
        let target = &self.world.nodes[node].engine;
        for &sector in differing {
            let block = range(sector / 8 * 8, 8);
            let is_marked = target.is_dirty(volume, sector / 8) == Some(true);
            let is_written = || [a, b].iter().any(|n| n.engine.is_being_written(volume, block));
            if !is_marked && !is_written() {
                return broken(
                    "unmarked",
                    format!("node {node} volume {volume}: a target lacks sector {sector} (16)"),
                );
            }
        }
        Ok(())
    }
}
