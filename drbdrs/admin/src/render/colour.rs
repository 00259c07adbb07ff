//! Colours of the status output. Spec: status-and-integration.md §2.4.

use drbd_types::{Cstate, Dstate, Role};

/// Colours or not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Colour {
    /// Plain text.
    #[default]
    Off,
    /// Escape codes around values.
    On,
}

impl Colour {
    fn paint(self, start: &str, value: &str) -> String {
        match self {
            Self::On if !start.is_empty() => format!("\x1b[{start}m{value}\x1b[0m"),
            Self::On | Self::Off => value.into(),
        }
    }

    pub(super) fn role(self, role: Role, is_peer: bool) -> String {
        let start = match (role, is_peer) {
            (Role::Primary, false) => "1;36",
            (Role::Primary, true) => "36",
            (Role::Unknown, false) => "1",
            (Role::Unknown, true) | (Role::Secondary, _) => "",
        };
        self.paint(start, role.name())
    }

    pub(super) fn disk(self, disk: Dstate, is_peer: bool) -> String {
        let start = match (disk, is_peer) {
            (Dstate::UpToDate, false) => "1;32",
            (Dstate::UpToDate, true) => "32",
            (Dstate::Diskless | Dstate::Inconsistent | Dstate::Outdated, false) => "1;31",
            (Dstate::Diskless | Dstate::Inconsistent | Dstate::Outdated, true) => "31",
            (_, false) => "1",
            (_, true) => "",
        };
        self.paint(start, disk.name())
    }

    pub(super) fn connection(self, state: Cstate) -> String {
        let start = match state {
            Cstate::StandAlone | Cstate::WFConnection => "1;31",
            _ if state >= Cstate::WFReportParams => "",
            _ => "1",
        };
        self.paint(start, super::connection_name(state))
    }

    pub(super) fn replication(self, state: Cstate) -> String {
        let start = match state {
            Cstate::SyncTarget | Cstate::PausedSyncT => "1;31",
            Cstate::SyncSource => "31",
            Cstate::Behind => "1",
            _ => "",
        };
        self.paint(start, super::replication_name(state))
    }
}
