//! Fault points of the streams: a stall, a delay, or packets of one type that wait. Off unless a rule
//! is set; a rule that is set is loud in the log, and holds for later connections too.
//!
//! TCP keeps the order, and so does this: what follows a packet that waits on its stream waits
//! with it.

use std::time::Duration;

use drbd_types::Tick;
use drbd_wire::{Command, Stream};

use super::super::outbox::Gate;

/// One rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamRule {
    /// Nothing is sent or received, as if the network swallowed it.
    Stall(Stream),
    /// What is sent leaves so much later.
    Delay(Stream, Duration),
    /// Packets of this type are neither sent nor taken, nor what comes after them.
    Hold(Command),
}

/// The rules now.
#[derive(Debug, Default)]
pub(super) struct StreamFaults {
    rules: Vec<StreamRule>,
}

impl StreamFaults {
    /// Replaces all rules.
    pub(super) fn set(&mut self, rules: Vec<StreamRule>) {
        for rule in rules.iter().filter(|rule| !self.rules.contains(rule)) {
            tracing::warn!("fault point: {rule:?}");
        }
        for rule in self.rules.iter().filter(|rule| !rules.contains(rule)) {
            tracing::warn!("fault point is off: {rule:?}");
        }
        self.rules = rules;
    }

    pub(super) fn is_stalled(&self, stream: Stream) -> bool {
        self.rules.contains(&StreamRule::Stall(stream))
    }

    pub(super) fn holds(&self, command: Command) -> bool {
        self.rules.contains(&StreamRule::Hold(command))
    }

    /// What a packet that is to be sent has to wait for.
    pub(super) fn gate(&self, now: Tick, stream: Stream, command: Command) -> Option<Gate> {
        if self.holds(command) {
            return Some(Gate::Held(command.number()));
        }
        self.rules.iter().find_map(|rule| match *rule {
            StreamRule::Delay(of, time) if of == stream => {
                let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
                Some(Gate::Until(Tick(now.0.saturating_add(micros))))
            }
            _ => None,
        })
    }

    /// Whether a packet that waits still has to.
    pub(super) fn keeps(&self, stream: Stream, gate: Gate) -> bool {
        self.rules.iter().any(|rule| match (*rule, gate) {
            (StreamRule::Delay(of, _), Gate::Until(_)) => of == stream,
            (StreamRule::Hold(command), Gate::Held(number)) => command.number() == number,
            _ => false,
        })
    }
}
