//! The engine as the plane drives it, and what control hears of it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use drbd_core::Engine;
use drbd_core::action::{Action, Actions};
use drbd_core::admin::Command;
use drbd_core::engine::status::Status;
use drbd_core::event::Event;
use drbd_core::log_line::Severity;
use drbd_types::{SectorRange, Tick, VolumeNr};
use tokio::sync::mpsc::UnboundedSender;

use crate::front::nbd::server::Extent;
use crate::plane::run::{self, Notice};

/// Which resource; never used twice in the life of a daemon.
pub(super) type Id = u32;

/// What the threads of resources tell control, in the order in which it happened.
pub(super) enum Told {
    /// A state or setting has changed: the whole state after it.
    Status(Box<Status>),
    /// The state, because control asked; whoever asked is told that it is there.
    Fresh(Box<Status>, tokio::sync::oneshot::Sender<()>),
    /// Applications or disks are at work, after control has said that it believes in peace.
    Active,
    /// Everything else.
    Notice(Notice),
}

/// Log lines that may wait for control; more are left out (they are in the log all the same).
const LINES_MAX: u32 = 256;

/// The way from a resource's thread to control.
#[derive(Clone)]
pub(super) struct Line {
    /// Of which resource.
    pub(super) id: Id,
    /// Everything goes here. Its length is bounded by the nature of what is told: replies and
    /// calls answer control, states change at the pace of packets, log lines are counted.
    pub(super) to: UnboundedSender<(Id, Told)>,
    /// Log lines under way.
    pub(super) lines: Arc<AtomicU32>,
    /// Control wants to hear of activity.
    pub(super) is_armed: Arc<AtomicBool>,
}

impl Line {
    fn tell(&self, told: Told) {
        // Control is gone only when the daemon ends.
        let _ = self.to.send((self.id, told));
    }

    /// A notice of the plane.
    pub(super) fn notice(&self, notice: Notice) {
        // The machine tells these two itself.
        if !matches!(notice, Notice::Changed | Notice::Log(_)) {
            self.tell(Told::Notice(notice));
        }
    }
}

/// An engine that reports its state whenever that has changed, and puts names into its log lines.
pub(super) struct Machine {
    engine: Engine,
    name: String,
    /// Minor numbers of all volumes there ever were, for the prefix of log lines.
    minors: BTreeMap<u16, u32>,
    line: Line,
}

impl Machine {
    pub(super) fn new(name: String, seed: u64, line: Line) -> Self {
        Self { engine: Engine::new(seed), name, minors: BTreeMap::new(), line }
    }

    /// The state now, in order with all that was told before.
    pub(super) fn report(&self, done: tokio::sync::oneshot::Sender<()>) {
        self.line.tell(Told::Fresh(Box::new(self.engine.status()), done));
    }

    /// The prefix of the original. Spec: status-and-integration.md §7.1.
    fn prefix(&self, volume: Option<VolumeNr>) -> String {
        let Some(nr) = volume else { return format!("drbd {}: ", self.name) };
        let minor = self.minors.get(&nr.0).copied().unwrap_or_default();
        format!("drbd {}/{} drbd{minor}: ", self.name, nr.0)
    }
}

impl run::Machine for Machine {
    fn handle(&mut self, now: Tick, event: Event, out: &mut Actions) {
        let is_work = matches!(event, Event::App(_) | Event::Disk { .. });
        if is_work
            && self.line.is_armed.load(Ordering::Relaxed)
            && self.line.is_armed.swap(false, Ordering::Relaxed)
        {
            self.line.tell(Told::Active);
        }
        if let Event::Admin { command: Command::NewVolume { volume, minor }, .. } = &event {
            self.minors.insert(volume.0, minor.0);
        }
        let before = out.len();
        self.engine.handle(now, event, out);
        let mut has_changed = false;
        for action in out.iter_mut().skip(before) {
            match action {
                Action::Changed => has_changed = true,
                Action::Log(line) => {
                    let prefix = self.prefix(line.volume);
                    let is_loud = matches!(line.severity, Severity::Alert | Severity::Error);
                    if is_loud && self.line.lines.load(Ordering::Relaxed) < LINES_MAX {
                        self.line.lines.fetch_add(1, Ordering::Relaxed);
                        self.line.tell(Told::Notice(Notice::Log(line.clone())));
                    }
                    line.text.insert_str(0, &prefix);
                    line.volume = None;
                }
                _ => {}
            }
        }
        if has_changed {
            // Before any reply of the same step: the plane hands those out after this.
            self.line.tell(Told::Status(Box::new(self.engine.status())));
        }
    }

    fn next_deadline(&self) -> Option<Tick> {
        self.engine.next_deadline()
    }

    fn out_of_sync(
        &self,
        volume: VolumeNr,
        range: SectorRange,
        most: usize,
        out: &mut Vec<Extent>,
    ) -> bool {
        run::Machine::out_of_sync(&self.engine, volume, range, most, out)
    }
}
