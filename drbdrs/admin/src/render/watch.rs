//! `status --watch`: the status with exact progress and reasons, for people. Ours.

use std::fmt::Write;

use super::{StatusOptions, bits_to_kib, progress, status};
use crate::{Progress, Reason, Resource, Snapshot, Volume};

const BAR: u64 = 40;

/// The status of every resource, then a line per resync or verify and per reason.
#[must_use]
pub fn watch(snapshot: &Snapshot, options: &StatusOptions) -> String {
    let daemon = &snapshot.daemon;
    let faults = Snapshot { daemon: daemon.clone(), ..Snapshot::default() };
    let mut text = status(&faults, options);
    let mut resources: Vec<&Resource> = snapshot.resources.iter().collect();
    resources.sort_by(|a, b| a.name.as_bytes().cmp(b.name.as_bytes()));
    for resource in resources {
        let one = Snapshot { resources: vec![resource.clone()], ..Snapshot::default() };
        text.push_str(status(&one, options).trim_end_matches('\n'));
        text.push('\n');
        let reason = resource.connection.as_ref().and_then(|c| c.reason.as_ref());
        explain(&mut text, reason);
        for volume in &resource.volumes {
            if let Some(run) = progress(volume) {
                progress_line(&mut text, volume, run);
            }
            explain(&mut text, volume.reason.as_ref());
        }
        text.push('\n');
    }
    text
}

fn explain(text: &mut String, reason: Option<&Reason>) {
    if let Some(Reason { code, text: words }) = reason {
        let _ = writeln!(text, "  {words} [{code}]");
    }
}

fn progress_line(text: &mut String, volume: &Volume, run: &Progress) {
    let done = run.total.saturating_sub(run.left);
    // Of ten thousand, rounded down: 100.00 only at the end.
    let share = |all: u64| u128::from(done) * u128::from(all) / u128::from(run.total.max(1));
    let (hundredths, filled) = (share(10_000), share(BAR).min(u128::from(BAR)));
    let filled = usize::try_from(filled).unwrap_or(0);
    let open = usize::try_from(BAR).unwrap_or(0) - filled;
    let bar = format!("{}{}", "#".repeat(filled), ".".repeat(open));
    let _ = write!(
        text,
        "  volume:{} [{bar}] {}.{:02}% {} left",
        volume.volume,
        hundredths / 100,
        hundredths % 100,
        amount(bits_to_kib(run.left)),
    );
    if volume.paused_user || volume.paused_peer || volume.paused_after {
        let _ = writeln!(text, ", paused ({})", super::resync_suspended(volume));
        return;
    }
    let _ = write!(text, ", {}/s", amount(run.speed));
    if run.is_stalled {
        let _ = writeln!(text, ", stalled");
    } else {
        let (hours, minutes, seconds) =
            (run.finish / 3600, run.finish % 3600 / 60, run.finish % 60);
        let _ = writeln!(text, ", {hours}:{minutes:02}:{seconds:02} to go");
    }
}

/// An amount with a unit that keeps it below ten thousand.
fn amount(kib: u64) -> String {
    let mut value = kib;
    for unit in ["KiB", "MiB", "GiB"] {
        if value < 10_000 {
            return format!("{value} {unit}");
        }
        value /= 1024;
    }
    format!("{value} TiB")
}

#[cfg(test)]
mod tests {
    use drbd_types::Cstate;

    use super::*;

    #[test]
    fn progress_is_exact_and_reasons_are_shown() {
        let mut volume = Volume::new(0, 0);
        volume.cstate = Cstate::SyncSource;
        volume.reason = Some(Reason { code: "c-min-rate".into(), text: "yields to I/O".into() });
        volume.progress = Some(Progress {
            total: 16_374,
            left: 12_726,
            permille: 250,
            finish: 159,
            speed: 304,
            ..Progress::default()
        });
        let resource = |volume| Snapshot {
            resources: vec![Resource {
                name: "r0".into(),
                volumes: vec![volume],
                ..Resource::default()
            }],
            ..Snapshot::default()
        };
        let options = StatusOptions::default();
        assert_eq!(
            watch(&resource(volume.clone()), &options),
            "r0 role:Secondary\n  disk:Diskless\n  \
             volume:0 [########................................] 22.27% 49 MiB left, 304 KiB/s, \
             0:02:39 to go\n  yields to I/O [c-min-rate]\n\n"
        );
        volume.cstate = Cstate::PausedSyncS;
        volume.paused_user = true;
        let text = watch(&resource(volume), &options);
        assert!(text.contains("49 MiB left, paused (user)\n"), "{text}");
    }

    #[test]
    fn impossible_numbers_are_no_panic() {
        let mut volume = Volume::new(0, 0);
        volume.cstate = Cstate::VerifyS;
        for (total, left) in [(0, 0), (0, 5), (5, u64::MAX), (u64::MAX, 0), (u64::MAX, u64::MAX)] {
            volume.progress = Some(Progress { total, left, ..Progress::default() });
            let resource = Resource { volumes: vec![volume.clone()], ..Resource::default() };
            let snapshot = Snapshot { resources: vec![resource], ..Snapshot::default() };
            assert!(!watch(&snapshot, &StatusOptions::default()).is_empty());
        }
    }
}
