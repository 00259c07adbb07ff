//! What control remembers of the two nodes: since when they are apart, and when they last compared
//! their data. It lasts as long as the resource, not longer than the daemon.

use std::collections::BTreeMap;

use drbd_core::engine::status::{Met, Status, VolumeStatus};
use drbd_types::{Cstate, Gi, Tick};

/// Of a resource. Times are microseconds since 1970.
pub(super) struct Past {
    /// Since when there is no connection; `None`: there is one.
    pub(super) apart_since: Option<u64>,
    /// There has been one.
    pub(super) has_been_together: bool,
    volumes: BTreeMap<u16, VolumePast>,
}

/// Of a volume.
#[derive(Clone, Copy, Default)]
pub(super) struct VolumePast {
    /// Its generation, without the bit of the role.
    current: Gi,
    /// When it began a generation that the peer does not have.
    pub(super) alone_since: Option<u64>,
    /// The last handshake in the engine's time and in that of the world.
    met: Option<(Tick, u64)>,
}

impl VolumePast {
    /// When this handshake was.
    pub(super) fn met_at(&self, met: &Met) -> u64 {
        self.met.filter(|(at, _)| *at == met.at).map_or(0, |(_, us)| us)
    }

    fn learn(&mut self, volume: &VolumeStatus, now: u64) {
        if let Some(met) = volume.met.filter(|met| self.met.is_none_or(|(at, _)| at != met.at)) {
            self.met = Some((met.at, now));
        }
        if volume.state.conn >= Cstate::Connected {
            self.alone_since = None;
        }
        let current = volume.slots.current.with_flag(false);
        // No disk.
        if current == Gi(0) {
            return;
        }
        let is_new = self.current != Gi(0) && current != self.current;
        if is_new && volume.state.conn < Cstate::Connected {
            self.alone_since = Some(now);
        }
        self.current = current;
    }
}

impl Past {
    /// Of a new resource.
    pub(super) fn new(now: u64) -> Self {
        Self { apart_since: Some(now), has_been_together: false, volumes: BTreeMap::new() }
    }

    /// One more state.
    pub(super) fn learn(&mut self, status: &Status, now: u64) {
        let is_together = |v: &VolumeStatus| v.state.conn >= Cstate::Connected;
        let are_together = !status.volumes.is_empty() && status.volumes.iter().all(is_together);
        if are_together {
            self.apart_since = None;
            self.has_been_together = true;
        } else if self.apart_since.is_none() {
            self.apart_since = Some(now);
        }
        self.volumes.retain(|nr, _| status.volumes.iter().any(|v| v.nr.0 == *nr));
        for volume in &status.volumes {
            self.volumes.entry(volume.nr.0).or_default().learn(volume, now);
        }
    }

    /// Of a volume.
    pub(super) fn of(&self, nr: u16) -> VolumePast {
        self.volumes.get(&nr).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use drbd_core::Engine;
    use drbd_core::admin::Command;
    use drbd_core::event::Event;
    use drbd_core::ids::Ticket;
    use drbd_types::{Minor, VolumeNr};

    use super::*;

    /// A resource with one volume.
    fn status() -> Status {
        let mut engine = Engine::new(1);
        let command = Command::NewVolume { volume: VolumeNr(0), minor: Minor(7) };
        let event = Event::Admin { ticket: Ticket(1), command };
        engine.handle(Tick(0), event, &mut Vec::new());
        engine.status()
    }

    #[test]
    fn since_when_they_are_apart() {
        let mut past = Past::new(5);
        let mut status = status();
        past.learn(&status, 10);
        assert_eq!((past.apart_since, past.has_been_together), (Some(5), false));
        // Half a handshake changes nothing.
        status.volumes[0].state.conn = Cstate::WFReportParams;
        past.learn(&status, 20);
        assert_eq!((past.apart_since, past.has_been_together), (Some(5), false));
        status.volumes[0].state.conn = Cstate::SyncSource;
        past.learn(&status, 30);
        assert_eq!((past.apart_since, past.has_been_together), (None, true));
        status.volumes[0].state.conn = Cstate::NetworkFailure;
        past.learn(&status, 40);
        past.learn(&status, 50);
        assert_eq!((past.apart_since, past.has_been_together), (Some(40), true));
        status.volumes.clear();
        past.learn(&status, 60);
        assert_eq!(past.apart_since, Some(40), "nothing is connected if there is nothing");
    }

    #[test]
    fn since_when_it_writes_alone() {
        let mut past = Past::new(0);
        let mut status = status();
        let mut see = |gi, conn, now| {
            status.volumes[0].slots.current = Gi(gi);
            status.volumes[0].state.conn = conn;
            past.learn(&status, now);
            past.of(0).alone_since
        };
        assert_eq!(see(16, Cstate::StandAlone, 1), None, "an attach is no new generation");
        assert_eq!(see(17, Cstate::StandAlone, 2), None, "a promotion is none either");
        assert_eq!(see(33, Cstate::WFConnection, 3), Some(3));
        assert_eq!(see(0, Cstate::StandAlone, 4), Some(3));
        assert_eq!(see(33, Cstate::StandAlone, 5), Some(3));
        assert_eq!(see(33, Cstate::WFBitMapT, 6), None);
        assert_eq!(see(48, Cstate::SyncTarget, 7), None, "the peer's");
    }
}
