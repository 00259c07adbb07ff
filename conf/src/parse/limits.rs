//! How much a configuration may hold.
//!
//! The original has no limits. These are far above anything that works, and keep a hostile file
//! from asking for more time or memory than its size can justify.

use super::{Parsed, Parser, Stop};
use crate::model::HostSection;

/// Resources. Each needs a minor of its own, of which there are 2^20.
const RESOURCES_MAX: usize = 1 << 17;
/// Volumes of all host sections together, each counted once per host name.
const VOLUMES_MAX: usize = 1 << 20;
/// Options of all sections together.
const OPTIONS_MAX: usize = 1 << 22;
/// Names in one list of hosts: every volume and every message is there once for each name.
pub(super) const NAMES_MAX: usize = 256;
/// Complaints: then reading stops.
pub(super) const COMPLAINTS_MAX: usize = 1000;
/// Errors after which even the forgiving mode stops.
pub(super) const ERRORS_MAX: usize = 100;

/// What has been read so far.
#[derive(Default)]
pub(super) struct Amount {
    volumes: usize,
    options: usize,
}

impl Parser<'_> {
    pub(super) fn count_resource(&mut self) -> Parsed {
        self.keep_limit(self.config.resources.len() + 1, RESOURCES_MAX, "resources")
    }

    pub(super) fn count_option(&mut self) -> Parsed {
        self.amount.options += 1;
        self.keep_limit(self.amount.options, OPTIONS_MAX, "options")
    }

    /// Before `host` gets what it inherits from `volumes` of the resource.
    pub(super) fn count_volumes(&mut self, volumes: usize, host: &HostSection) -> Parsed {
        let own = volumes.max(host.volumes.len()).saturating_mul(host.names.len().max(1));
        self.amount.volumes = self.amount.volumes.saturating_add(own);
        self.keep_limit(self.amount.volumes, VOLUMES_MAX, "volumes on all hosts together")
    }

    fn keep_limit(&mut self, count: usize, limit: usize, what: &str) -> Parsed {
        if count <= limit {
            return Ok(());
        }
        self.later(&format!("more than {limit} {what}"));
        Err(Stop(10))
    }

    /// Reading stops: says so once.
    pub(super) fn too_many_complaints(&mut self) -> Stop {
        if self.diagnostics.items.len() == COMPLAINTS_MAX {
            let text = format!("more than {COMPLAINTS_MAX} complaints: the rest is not read");
            self.diagnostics.error(text, None);
        }
        Stop(10)
    }
}
