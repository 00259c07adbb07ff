//! `wait-connect` and `wait-sync`. Spec: states-and-generations.md §10, status-and-integration.md §2.11.
//!
//! The time is measured from the start, not from the last event as the original does it: a link
//! that flaps must not delay the boot for ever.

use std::time::{Duration, Instant};

use bstr::ByteSlice;
use drbd_admin::{Answer, Resource, Volume, WaitClass};
use drbd_types::Cstate;

use super::Failed;
use super::parse::{Invocation, invalid};
use super::request::target;
use super::run::{Session, closed, look_up, lost};
use crate::print;

/// Longest time in seconds.
const LIMIT_MAX: i64 = 300_000;

/// Seconds; 0: for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Limits {
    wfc: u64,
    degraded: u64,
    outdated: u64,
}

impl Limits {
    /// The original's adjustments, with what it says about them.
    fn adjusted(self) -> (Self, String) {
        let Self { wfc, mut degraded, mut outdated } = self;
        let mut remarks = String::new();
        if wfc > 0 && (degraded == 0 || wfc < degraded) {
            degraded = wfc;
            remarks.push_str(&format!(
                "degr-wfc-timeout has to be shorter than wfc-timeout\n\
                 degr-wfc-timeout implicitly set to wfc-timeout ({wfc}s)\n"
            ));
        }
        if degraded > 0 && (outdated == 0 || degraded < outdated) {
            outdated = wfc;
            remarks.push_str(&format!(
                "outdated-wfc-timeout has to be shorter than degr-wfc-timeout\n\
                 outdated-wfc-timeout implicitly set to degr-wfc-timeout ({degraded}s)\n"
            ));
        }
        (Self { wfc, degraded, outdated }, remarks)
    }

    fn of(self, class: WaitClass) -> Option<Duration> {
        let seconds = match class {
            WaitClass::Default => self.wfc,
            WaitClass::Degraded => self.degraded,
            WaitClass::PeerOutdated => self.outdated,
        };
        (seconds > 0).then(|| Duration::from_secs(seconds))
    }
}

fn limit(i: &Invocation, name: &str) -> Result<u64, Failed> {
    let Some(Some(text)) = i.option(name) else { return Ok(0) };
    let seconds: i64 =
        text.to_str().ok().and_then(|t| t.parse().ok()).ok_or_else(|| invalid(name, text))?;
    u64::try_from(seconds).ok().filter(|_| seconds <= LIMIT_MAX).ok_or_else(|| {
        let name = name.replace('-', "_");
        Failed::new(20, format!("{name} => {seconds} out of range [0..{LIMIT_MAX}]\n"))
    })
}

fn waits_after_split_brain(i: &Invocation) -> Result<bool, Failed> {
    match i.option("wait-after-sb").map(|v| v.map(|v| v.as_slice())) {
        None | Some(Some(b"no")) => Ok(false),
        Some(None | Some(b"yes")) => Ok(true),
        Some(Some(other)) => Err(invalid("wait-after-sb", &other.into())),
    }
}

/// What a wait is about.
struct Wait {
    for_sync: bool,
    after_split_brain: bool,
}

impl Wait {
    /// Is there nothing to wait for any more?
    fn is_over(&self, state: Cstate) -> bool {
        let given_up = state < Cstate::Unconnected && !self.after_split_brain;
        let reached =
            if self.for_sync { state == Cstate::Connected } else { state >= Cstate::Connected };
        given_up || reached
    }

    /// What is said about a volume whose connection was given up, but is waited for.
    fn remark(&self, resource: &Resource, volume: &Volume) -> Option<String> {
        let told = volume.cstate < Cstate::Unconnected && self.after_split_brain;
        told.then(|| {
            let (minor, name, number, state) =
                (volume.minor, &resource.name, volume.volume, volume.cstate);
            format!(
                "\ndrbd{minor} ({name}[{number}]) is {state}, but I'm configured to wait anways \
                 (--wait-after-sb)\n"
            )
        })
    }
}

/// A volume that is waited for.
struct Pending {
    minor: u32,
    end: Option<Instant>,
    is_over: bool,
}

/// Waits; 0: over, 5: the time is.
pub(super) fn run(i: &Invocation) -> Result<u8, Failed> {
    let limits = Limits {
        wfc: limit(i, "wfc-timeout")?,
        degraded: limit(i, "degr-wfc-timeout")?,
        outdated: limit(i, "outdated-wfc-timeout")?,
    };
    let wait = Wait {
        for_sync: i.command.name == "wait-sync",
        after_split_brain: waits_after_split_brain(i)?,
    };
    let (limits, remarks) = limits.adjusted();
    let target = target(i, &mut look_up(&i.context))?;
    let object = i.shown_object();
    let start = Instant::now();
    let mut session = Session::open(&i.context)?;
    let snapshot = session.snapshot(&object, target.clone())?.unwrap_or_default();
    let mut pending: Vec<Pending> = snapshot
        .by_minor()
        .iter()
        .map(|(_, v)| Pending {
            minor: v.minor,
            end: limits.of(v.wait_class).map(|limit| start + limit),
            is_over: false,
        })
        .collect();
    if pending.is_empty() {
        return Err(not_available());
    }
    print::stderr(remarks.as_bytes());
    let mut client = session.watch(target)?;
    loop {
        let next = pending.iter().filter(|p| !p.is_over).filter_map(|p| p.end).min();
        let left = next.map(|end| end.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            return Ok(5);
        }
        match client.next(left) {
            Ok(Some(Answer::Snapshot(snapshot))) => {
                for resource in &snapshot.resources {
                    look(&wait, resource, &mut pending);
                }
                // Between the two questions it may have gone.
                let all = snapshot.by_minor();
                if pending.iter().any(|p| !all.iter().any(|(_, v)| v.minor == p.minor)) {
                    return Err(not_available());
                }
            }
            Ok(Some(Answer::Update(update))) => {
                let Some(resource) = &update.resource else { return Err(not_available()) };
                look(&wait, resource, &mut pending);
            }
            Ok(Some(Answer::Done(reply))) if !reply.is_success() => {
                return Err(Failed::new(reply.exit(), reply.message(&object)));
            }
            // Something was missed: look again.
            Ok(Some(Answer::Skipped { .. })) => {
                let session = Session::open(&i.context)?;
                client = session.watch(target_again(i)?)?;
            }
            Ok(Some(_)) => {}
            Ok(None) => return Err(closed(&object)),
            Err(e) if e.is_timeout() => {}
            Err(e) => return Err(lost(&object, &e)),
        }
        if pending.iter().all(|p| p.is_over) {
            return Ok(0);
        }
    }
}

fn target_again(i: &Invocation) -> Result<drbd_admin::Target, Failed> {
    target(i, &mut look_up(&i.context))
}

fn not_available() -> Failed {
    Failed::new(20, "error determining which timeout to use: minor not available\n")
}

fn look(wait: &Wait, resource: &Resource, pending: &mut [Pending]) {
    for volume in &resource.volumes {
        let Some(p) = pending.iter_mut().find(|p| p.minor == volume.minor) else { continue };
        p.is_over = wait.is_over(volume.cstate);
        if let Some(remark) = wait.remark(resource, volume) {
            print::stderr(remark.as_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_adjusted_as_in_the_original() {
        let of = |wfc, degraded, outdated| Limits { wfc, degraded, outdated }.adjusted();
        let (limits, remarks) = of(2, 0, 0);
        assert_eq!(limits, Limits { wfc: 2, degraded: 2, outdated: 2 });
        assert_eq!(
            remarks,
            "degr-wfc-timeout has to be shorter than wfc-timeout\n\
             degr-wfc-timeout implicitly set to wfc-timeout (2s)\n\
             outdated-wfc-timeout has to be shorter than degr-wfc-timeout\n\
             outdated-wfc-timeout implicitly set to degr-wfc-timeout (2s)\n"
        );
        assert_eq!(of(2, 1, 1), (Limits { wfc: 2, degraded: 1, outdated: 1 }, String::new()));
        assert_eq!(of(0, 0, 0), (Limits { wfc: 0, degraded: 0, outdated: 0 }, String::new()));
        // The original takes wfc-timeout here, whatever it says.
        assert_eq!(of(0, 7, 9).0, Limits { wfc: 0, degraded: 7, outdated: 0 });
    }

    #[test]
    fn what_ends_a_wait() {
        let over = |for_sync, after_split_brain| -> Vec<&str> {
            let wait = Wait { for_sync, after_split_brain };
            let all = Cstate::ALL.iter().filter(|s| wait.is_over(**s));
            all.map(|s| s.name()).collect()
        };
        assert_eq!(over(true, true), ["Connected"]);
        assert_eq!(over(true, false), ["StandAlone", "Disconnecting", "Connected"]);
        assert_eq!(over(false, true).len(), 14);
        assert!(!over(false, false).contains(&"WFReportParams"));
    }
}
