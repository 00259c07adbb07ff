//! `drbdsetup status`. Spec: status-and-integration.md §2.4.

use drbd_types::Cstate;

use super::wrap::Wrap;
use super::{
    Colour, bits_to_kib, blocked, is_running, percent_in_sync, resync_suspended, suspended,
    wrapped_kib, yes_no,
};
use crate::{Connection, Resource, Snapshot, Volume};

/// What is shown.
#[derive(Clone, Copy, Debug)]
pub struct StatusOptions {
    /// `--verbose`: also what is as usual.
    pub verbose: bool,
    /// `--statistics`.
    pub statistics: bool,
    /// Colours.
    pub colour: Colour,
    /// Columns after which lines are broken.
    pub width: usize,
}

impl Default for StatusOptions {
    fn default() -> Self {
        Self { verbose: false, statistics: false, colour: Colour::Off, width: 80 }
    }
}

/// One block per resource, sorted by name. Faults that are switched on stand in front of all: a
/// rehearsal must not be taken for the real thing.
#[must_use]
pub fn status(snapshot: &Snapshot, options: &StatusOptions) -> String {
    let mut resources: Vec<&Resource> = snapshot.resources.iter().collect();
    resources.sort_by(|a, b| a.name.as_bytes().cmp(b.name.as_bytes()));
    let mut view = View { wrap: Wrap::new(options.width), options };
    for (id, fault) in &snapshot.daemon.faults {
        view.wrap.piece(0, &format!("# FAULT {id} SWITCHED ON: {fault}\n"));
    }
    for resource in resources {
        view.resource(resource);
    }
    view.wrap.into_text()
}

struct View<'o> {
    wrap: Wrap,
    options: &'o StatusOptions,
}

impl View<'_> {
    fn piece(&mut self, indent: usize, name: &str, value: impl std::fmt::Display) {
        self.wrap.piece(indent, &format!(" {name}:{value}"));
    }

    fn resource(&mut self, resource: &Resource) {
        let StatusOptions { verbose, statistics, colour, .. } = *self.options;
        self.wrap.piece(0, &resource.name);
        self.piece(4, "role", colour.role(resource.role(), false));
        if verbose || resource.suspended.is_any() {
            self.piece(4, "suspended", suspended(resource.suspended));
        }
        if verbose && statistics {
            self.wrap.line_end(4);
            self.piece(4, "write-ordering", resource.write_ordering.name());
        }
        self.wrap.line_end(0);
        let [first, ..] = resource.volumes.as_slice() else {
            if let Some(connection) = &resource.connection {
                self.connection(resource, connection);
            }
            self.wrap.line_end(0);
            return;
        };
        let numbered = verbose || resource.volumes.len() > 1 || first.volume != 0;
        for volume in &resource.volumes {
            self.device(volume, numbered);
        }
        if let Some(connection) = &resource.connection {
            self.connection(resource, connection);
            let shown = verbose || statistics || connection.state >= Cstate::WFReportParams;
            for volume in resource.volumes.iter().filter(|_| shown) {
                self.peer_device(volume, numbered);
            }
        }
        self.wrap.line_end(0);
    }

    fn device(&mut self, volume: &Volume, numbered: bool) {
        let StatusOptions { verbose, statistics, colour, .. } = *self.options;
        let counters = &volume.counters;
        let mut indent = 2;
        if numbered {
            self.piece(2, "volume", volume.volume);
            indent = 6;
        }
        if verbose {
            self.piece(6, "minor", volume.minor);
        }
        self.piece(indent, "disk", colour.disk(volume.disk, false));
        if statistics {
            self.wrap.line_end(6);
            if verbose {
                self.piece(6, "size", volume.size / 2);
            }
            self.piece(6, "read", wrapped_kib(counters.read));
            self.piece(6, "written", wrapped_kib(counters.written));
            if verbose {
                self.piece(6, "al-writes", counters.al_writes);
                self.piece(6, "bm-writes", counters.bm_writes);
                self.piece(6, "upper-pending", counters.application_pending);
                self.piece(6, "lower-pending", counters.local_pending);
                self.piece(6, "al-suspended", yes_no(volume.is_al_suspended));
            }
        }
        if verbose || volume.is_blocked {
            self.piece(6, "blocked", blocked(volume));
        }
        self.wrap.line_end(0);
    }

    fn connection(&mut self, resource: &Resource, connection: &Connection) {
        let StatusOptions { verbose, colour, .. } = *self.options;
        let is_connected = connection.state >= Cstate::WFReportParams;
        self.wrap.piece(2, "peer");
        if verbose || !is_connected {
            self.piece(6, "connection", colour.connection(connection.state));
        }
        if verbose || is_connected {
            self.piece(6, "role", colour.role(resource.peer_role(), true));
        }
        if verbose || connection.is_congested {
            self.piece(6, "congested", yes_no(connection.is_congested));
        }
        self.wrap.line_end(0);
    }

    fn peer_device(&mut self, volume: &Volume, numbered: bool) {
        let StatusOptions { verbose, statistics, colour, .. } = *self.options;
        let counters = &volume.counters;
        let is_off = volume.cstate <= Cstate::WFReportParams;
        let mut indent = 4;
        if numbered {
            self.piece(4, "volume", volume.volume);
            indent = 8;
        }
        if verbose || !is_off {
            self.piece(indent, "replication", colour.replication(volume.cstate));
            indent = 8;
        }
        if verbose || statistics || !is_off || volume.peer_disk != drbd_types::Dstate::DUnknown {
            self.piece(indent, "peer-disk", colour.disk(volume.peer_disk, true));
            if is_running(volume.cstate) {
                self.piece(8, "done", format_args!("{:.2}", percent_in_sync(volume)));
            }
        }
        let paused = resync_suspended(volume);
        if verbose || paused != "no" {
            self.piece(8, "resync-suspended", paused);
        }
        if statistics {
            self.wrap.line_end(8);
            self.piece(8, "received", wrapped_kib(counters.received));
            self.piece(8, "sent", wrapped_kib(counters.sent));
            if verbose || counters.out_of_sync != 0 {
                self.piece(8, "out-of-sync", bits_to_kib(counters.out_of_sync));
            }
            if verbose {
                self.piece(8, "pending", counters.peer_pending);
                self.piece(8, "unacked", counters.unacked);
            }
        }
        self.wrap.line_end(0);
    }
}
