//! Status views: text from a snapshot, and nothing else.
//!
//! All are compared with recorded outputs of the original in `tests/oracle.rs`.

mod colour;
mod events;
mod events2;
mod events2_full;
mod gi;
mod json;
mod metrics;
mod proc;
mod sh;
mod show;
mod show_json;
mod split_brain;
mod status;
mod watch;
mod wrap;

pub use colour::Colour;
pub use events::Events;
pub use events2::{Events2, Events2Options, timestamp};
pub use gi::{get_gi, show_gi};
pub use json::status_json;
pub use metrics::metrics;
pub use proc::{Compat, ProcOptions, RELEASE, proc};
pub use sh::{cstate, dstate, role, sh_status, sh_status_unknown};
pub use show::{ShowOptions, show};
pub use show_json::show_json;
pub use split_brain::{Reader, Side, SplitBrain, split_brain, split_brain_loss};
pub use status::{StatusOptions, status};
pub use watch::watch;

use drbd_types::Cstate;

use crate::{Progress, Suspended, Volume};

/// KiB of bitmap bits.
const fn bits_to_kib(bits: u64) -> u64 {
    bits.saturating_mul(4)
}

/// A sector counter as the 8.4 views show it: 32 bits, in KiB.
#[allow(
    clippy::cast_possible_truncation,
    reason = "it wraps in the original, and readers expect it"
)]
const fn wrapped_kib(sectors: u64) -> u32 {
    sectors as u32 / 2
}

/// State of a connection: from WFReportParams on it is simply Connected.
const fn connection_name(state: Cstate) -> &'static str {
    match state {
        Cstate::WFConnection => "Connecting",
        _ if state.number() >= Cstate::WFReportParams.number() => "Connected",
        _ => state.name(),
    }
}

/// Replication state of a volume.
const fn replication_name(state: Cstate) -> &'static str {
    match state {
        _ if state.number() <= Cstate::WFReportParams.number() => "Off",
        Cstate::Connected => "Established",
        _ => state.name(),
    }
}

/// Between SyncSource and PausedSyncT: resync and verify, running or paused.
const fn is_running(state: Cstate) -> bool {
    state.is_sync() || state.is_verify()
}

/// The progress of what runs or is paused.
fn progress(volume: &Volume) -> Option<&Progress> {
    volume.progress.as_ref().filter(|_| is_running(volume.cstate))
}

/// `no`, or what suspends I/O.
fn suspended(suspended: Suspended) -> String {
    list(&[
        (suspended.user, "user"),
        (suspended.no_data, "no-data"),
        (suspended.fencing, "fencing"),
    ])
}

/// `no`, or what pauses the resync.
fn resync_suspended(volume: &Volume) -> String {
    list(&[
        (volume.paused_user, "user"),
        (volume.paused_peer, "peer"),
        (volume.paused_after, "dependency"),
    ])
}

fn list(reasons: &[(bool, &str)]) -> String {
    let names: Vec<&str> = reasons.iter().filter(|(set, _)| *set).map(|(_, n)| *n).collect();
    if names.is_empty() { "no".into() } else { names.join(",") }
}

const fn yes_no(yes: bool) -> &'static str {
    if yes { "yes" } else { "no" }
}

/// `upper` is all that 8.4 knows.
const fn blocked(volume: &Volume) -> &'static str {
    if volume.is_blocked { "upper" } else { "no" }
}

/// Of the device, without failed bits subtracted; 0 while the size is not known.
#[allow(clippy::cast_precision_loss, reason = "a percentage with two digits")]
fn percent_in_sync(volume: &Volume) -> f64 {
    if volume.size == 0 {
        return 0.0;
    }
    let open = bits_to_kib(volume.counters.out_of_sync) as f64;
    (100.0 * (1.0 - open / (volume.size / 2) as f64)).max(0.0)
}
