//! Congestion: what a Primary does whose peer is too slow. Spec: io-path-and-resync.md §10.

use drbd_types::{Cstate, Dstate, Fields, Tick, VolumeNr};

use crate::config::OnCongestion;

use super::Core;
use super::after::Work;
use super::change::{Done, Opt};
use super::resync::{STEP, Side};

/// Ahead ends so long after everything in flight was acknowledged, microseconds.
const RETURN_DELAY: u64 = 1_000_000;

impl Core {
    /// Before a write is routed.
    pub(super) fn check_congestion(&mut self, nr: VolumeNr) {
        let Some(net) = &self.conn.net else { return };
        let policy = net.on_congestion;
        let (fill, extents) = (net.congestion_fill.0, net.congestion_extents);
        let state = self.state(nr);
        let is_possible = policy != OnCongestion::Block
            && self.conn.version >= 96
            && state.disk == Dstate::UpToDate
            && state.conn >= Cstate::Connected
            && state.conn != Cstate::Ahead
            && crate::state::facts::must_replicate(&state);
        if !is_possible {
            return;
        }
        let active =
            self.volume(nr).and_then(|v| v.disk.as_ref()).map_or(0, |disk| disk.al.references());
        if fill > 0 && self.conn.sectors_in_flight >= fill {
            self.info(nr, "Congestion-fill threshold reached");
        } else if active >= extents as usize {
            self.info(nr, "Congestion-extents threshold reached");
        } else {
            return;
        }
        self.close_epoch();
        match policy {
            OnCongestion::PullAhead => {
                let new = Fields { conn: Cstate::Ahead, ..state };
                if self.set_state(nr, new, Opt::QUIET) == Ok(Done::Changed) {
                    // The peer must be Behind when it hears of the first block that it misses.
                    self.send_current_state(nr);
                }
            }
            // The original leaves the volume hanging in Disconnecting (defect D7).
            OnCongestion::Disconnect => self.force_conn(Cstate::Disconnecting),
            OnCongestion::Block => {}
        }
    }

    /// A barrier was acknowledged: perhaps nothing is in flight any more.
    pub(super) fn on_epoch_acknowledged(&mut self) {
        if self.conn.sectors_in_flight > 0 {
            return;
        }
        let at = Tick(self.now.0 + RETURN_DELAY);
        for volume in self.volumes.values_mut() {
            if volume.state.conn == Cstate::Ahead && volume.ahead_return_at.is_none() {
                volume.ahead_return_at = Some(at);
            }
        }
    }

    /// Time to leave Ahead?
    pub(super) fn run_ahead_timer(&mut self, nr: VolumeNr) {
        let now = self.now;
        let Some(volume) = self.volume_mut(nr) else { return };
        let Some(at) = volume.ahead_return_at else { return };
        if volume.state.conn != Cstate::Ahead {
            volume.ahead_return_at = None;
            return;
        }
        if at > now {
            return;
        }
        if volume.serves.owed() > 0 || volume.resync.pending() > 0 {
            volume.ahead_return_at = Some(Tick(now.0 + STEP));
            self.info(nr, "postponing start_resync ...");
            return;
        }
        volume.ahead_return_at = None;
        self.queue_work(Work::StartResync { nr, side: Side::Source });
    }
}
