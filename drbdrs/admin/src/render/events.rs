//! `drbdsetup events`, the old format. Spec: status-and-integration.md §2.10.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::{HelperCall, HelperPhase, Resource, Snapshot, Update, Volume};

/// Writer of events in the old format: knows what it has printed, and counts.
#[derive(Debug, Default)]
pub struct Events {
    sequence: u64,
    /// Minor number: name and state as printed last.
    printed: BTreeMap<u32, (String, String)>,
    /// Only this minor number.
    only: Option<u32>,
}

impl Events {
    /// A writer for everything, or for one minor number.
    #[must_use]
    pub const fn new(only: Option<u32>) -> Self {
        Self { sequence: 0, printed: BTreeMap::new(), only }
    }

    /// The initial dump; its lines have the present time as sequence number.
    #[must_use]
    pub fn initial(&mut self, snapshot: &Snapshot) -> String {
        let seconds = snapshot.at_us / 1_000_000;
        let mut text = String::new();
        for resource in &snapshot.resources {
            for volume in &resource.volumes {
                if !self.is_wanted(volume.minor) {
                    continue;
                }
                let (name, state) = (named(resource, volume), state(resource, volume));
                let _ = writeln!(text, "{seconds} ST {name} {{ {state} }}");
                self.printed.insert(volume.minor, (name, state));
            }
            if resource.volumes.is_empty() {
                let _ = writeln!(text, "{seconds} R - {}", resource.name);
            }
        }
        text
    }

    fn is_wanted(&self, minor: u32) -> bool {
        self.only.is_none_or(|only| only == minor)
    }

    fn next(&mut self) -> u64 {
        self.sequence += 1;
        self.sequence
    }

    /// What an announcement changes.
    #[must_use]
    pub fn update(&mut self, update: &Update) -> String {
        let mut text = String::new();
        let volumes = update.resource.as_ref().map_or(&[][..], |r| &r.volumes);
        let gone = |minor: &u32, (name, _): &mut (String, String)| {
            let owner = name.split_once(',').map_or("", |(_, n)| n);
            let owner = owner.rsplit_once('[').map_or("", |(n, _)| n);
            owner != update.name || volumes.iter().any(|v| v.minor == *minor)
        };
        self.printed.retain(gone);
        let Some(resource) = &update.resource else { return text };
        for volume in &resource.volumes {
            let (name, new) = (named(resource, volume), state(resource, volume));
            // A volume is born StandAlone and Diskless; that is not announced.
            let old = self.printed.get(&volume.minor).map_or_else(
                || state(&Resource::default(), &Volume::new(volume.volume, volume.minor)),
                |(_, state)| state.clone(),
            );
            self.printed.insert(volume.minor, (name.clone(), new.clone()));
            if old == new || !self.is_wanted(volume.minor) {
                continue;
            }
            let n = self.next();
            let _ = writeln!(text, "{n} ST-prev {name} {{ {old} }}");
            let _ = writeln!(text, "{n} ST-new {name} {{ {new} }}");
            let _ = writeln!(text, "{n} ST {name} {{ {new} }}");
        }
        text
    }

    /// A handler of a volume begins or ends.
    #[must_use]
    pub fn helper(&mut self, call: &HelperCall) -> String {
        let Some((volume, minor)) = call.volume.filter(|(_, m)| self.is_wanted(*m)) else {
            return String::new();
        };
        let n = self.next();
        let name = format!("{minor},{}[{volume}] {}", call.resource, call.helper);
        match call.phase {
            HelperPhase::Call => format!("{n} UH {name}\n"),
            HelperPhase::Response { status } => format!("{n} UH-post {name} 0x{status:04x}\n"),
        }
    }

    /// A resync or verify came forward.
    #[must_use]
    pub fn progress(&mut self, minor: u32, permille: u32) -> String {
        let Some(name) = self.printed.get(&minor).map(|(name, _)| name.clone()) else {
            return String::new();
        };
        if !self.is_wanted(minor) {
            return String::new();
        }
        format!("{} SP {name} {}.{}\n", self.next(), permille / 10, permille % 10)
    }
}

fn named(resource: &Resource, volume: &Volume) -> String {
    format!("{},{}[{}]", volume.minor, resource.name, volume.volume)
}

fn state(resource: &Resource, v: &Volume) -> String {
    let pick = |set, letter| if set { letter } else { '-' };
    let flags: String = [
        if resource.suspended.user { 's' } else { 'r' },
        pick(v.paused_after, 'a'),
        pick(v.paused_peer, 'p'),
        pick(v.paused_user, 'u'),
    ]
    .iter()
    .collect();
    format!("cs:{} ro:{}/{} ds:{}/{} {flags}", v.cstate, v.role, v.peer_role, v.disk, v.peer_disk)
}
