//! `drbdsetup get-gi` and `show-gi` of an attached disk. Spec: metadata.md §8.4.1, §8.4.2.

use drbd_types::{LEGEND_ABOVE, LEGEND_BELOW};

use crate::Generations;

/// The line of `get-gi`, with its end.
#[must_use]
pub fn get_gi(generations: &Generations) -> String {
    line(generations) + "\n"
}

fn line(g: &Generations) -> String {
    let mut line = g.slots.map(|slot| slot.to_string()).join(":");
    let flags = [
        g.consistent,
        g.up_to_date,
        g.primary,
        g.connected,
        g.full_sync,
        g.peer_outdated,
        g.crashed_primary,
    ];
    for flag in flags {
        line.push_str(if flag { ":1" } else { ":0" });
    }
    line
}

/// The page of `show-gi`. The activity log of an attached disk always needs a replay.
#[must_use]
pub fn show_gi(g: &Generations) -> String {
    let pick = |set, yes, no| if set { yes } else { no };
    let data = match (g.consistent, g.up_to_date) {
        (true, true) => "UpToDate",
        (true, false) => "Outdated",
        (false, _) => "Inconsistent",
    };
    format!(
        "{LEGEND_ABOVE}{}{LEGEND_BELOW}flags:{} {}, {}, {data}{}{}\nmeta-data: need apply-al\n",
        line(g),
        pick(g.crashed_primary, " crashed", ""),
        pick(g.primary, "Primary", "Secondary"),
        pick(g.connected, "Connected", "StandAlone"),
        pick(g.full_sync, ", need full sync", ""),
        pick(g.peer_outdated, ", peer Outdated", ""),
    )
}
