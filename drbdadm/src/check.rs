//! `check`: one line, perfdata, and an exit code of 0 to 3, for Nagios-like programs and for
//! net-snmp's `extend`.
//!
//! What counts is how many current copies of the data this node can reach: two are OK, one is a
//! WARNING, none is CRITICAL. What needs a person is CRITICAL at once: a split brain, a failed
//! handshake, suspended I/O, a resource that is not up. The thresholds are options.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bstr::{BString, ByteSlice};
use drbd_admin::render::SplitBrain;
use drbd_admin::{Outcome, Resource, Snapshot, Volume};
use drbd_conf::source::SEARCH_PATH;
use drbd_types::{Cstate, Dstate};

use crate::app::{App, Exit};
use crate::cli::Invocation;
use crate::select;
use crate::{print, setup};

/// Its options, each with a number: KiB out of sync, seconds apart, seconds of the oldest request.
pub const OPTIONS: [&str; 5] = [
    "out-of-sync-warning",
    "out-of-sync-critical",
    "apart-critical",
    "oldest-warning",
    "oldest-critical",
];

/// Exit code of wrong usage.
pub const UNKNOWN: u8 = Level::Unknown as u8;

/// A daemon that does not answer within this time is a finding.
const DEADLINE: Duration = Duration::from_secs(10);

/// How bad it is; the numbers are exit codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Ok = 0,
    Warning = 1,
    Critical = 2,
    Unknown = 3,
}

impl Level {
    const fn name(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::Warning => "WARNING",
            Self::Critical => "CRITICAL",
            Self::Unknown => "UNKNOWN",
        }
    }

    /// What is not known is worse than a warning.
    const fn rank(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Warning => 1,
            Self::Unknown => 2,
            Self::Critical => 3,
        }
    }
}

/// When numbers become findings; `None`: never.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Limits {
    /// KiB out of sync between two good copies.
    out_of_sync_warning: Option<u64>,
    /// KiB out of sync, in any state.
    out_of_sync_critical: Option<u64>,
    /// Seconds without a second copy after which it is no accident any more.
    apart_critical: Option<u64>,
    /// Seconds since the oldest request of an application.
    oldest_warning: Option<u64>,
    oldest_critical: Option<u64>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            out_of_sync_warning: Some(1),
            out_of_sync_critical: None,
            apart_critical: Some(300),
            oldest_warning: Some(10),
            oldest_critical: Some(60),
        }
    }
}

impl Limits {
    fn of(options: &[BString]) -> Result<Self, String> {
        let mut limits = Self::default();
        let Self {
            out_of_sync_warning,
            out_of_sync_critical,
            apart_critical,
            oldest_warning,
            oldest_critical,
        } = &mut limits;
        let places = [
            out_of_sync_warning,
            out_of_sync_critical,
            apart_critical,
            oldest_warning,
            oldest_critical,
        ];
        let mut places: Vec<_> = OPTIONS.iter().zip(places).collect();
        for word in options {
            let (name, value) = word
                .strip_prefix(b"--")
                .and_then(|w| w.split_once_str("="))
                .ok_or_else(|| format!("'{word}' is no option of check"))?;
            let place = places.iter_mut().find(|(option, _)| option.as_bytes() == name);
            let (_, place) = place.ok_or_else(|| format!("'{word}' is no option of check"))?;
            **place = match value {
                b"never" => None,
                _ => Some(
                    value
                        .to_str()
                        .ok()
                        .and_then(|v| v.parse().ok())
                        .ok_or_else(|| format!("'{word}': a number, or never"))?,
                ),
            };
        }
        Ok(limits)
    }
}

/// What was found.
#[derive(Debug, Default)]
struct Findings {
    list: Vec<(Level, String)>,
    perfdata: Vec<String>,
}

impl Findings {
    fn add(&mut self, level: Level, text: impl Into<String>) {
        self.list.push((level, text.into()));
    }

    fn level(&self) -> Level {
        let levels = self.list.iter().map(|(level, _)| *level);
        levels.max_by_key(|level| level.rank()).unwrap_or(Level::Ok)
    }

    /// The line: the worst first.
    fn line(mut self, good: &str) -> (Level, String) {
        let level = self.level();
        self.list.sort_by_key(|(level, _)| std::cmp::Reverse(level.rank()));
        let texts: Vec<String> = self.list.into_iter().map(|(_, text)| text).collect();
        let text = if texts.is_empty() { good.to_owned() } else { texts.join("; ") };
        // The bar and line ends have a meaning of their own.
        let text = text.replace('|', "/").replace('\n', " ");
        let perfdata = self.perfdata.join(" ");
        let bar = if perfdata.is_empty() { "" } else { " | " };
        (level, format!("DRBD {} - {text}{bar}{perfdata}\n", level.name()))
    }
}

/// Runs it; returns the exit code.
pub fn run(invocation: Invocation) -> i32 {
    let (level, line) = match Limits::of(&invocation.backend_options) {
        Ok(limits) => look(invocation, &limits),
        Err(text) => (Level::Unknown, format!("DRBD UNKNOWN - {text}\n")),
    };
    print::stdout(line.as_bytes());
    level as i32
}

fn look(invocation: Invocation, limits: &Limits) -> (Level, String) {
    let mut findings = Findings::default();
    let is_secret = is_unreadable(&invocation);
    let names = invocation.names.clone();
    let is_all = names.is_empty() || names.first().is_some_and(|n| n == "all");
    let configured = match wanted(invocation, is_all) {
        Ok(names) => names,
        // Whoever watches need not be allowed to read the secrets: what runs is looked at.
        Err(_) if is_secret => names.iter().filter(|n| *n != "all").cloned().collect(),
        Err(Exit(code)) => {
            let text = format!("the configuration or a name is wrong (exit code {code})");
            findings.add(Level::Unknown, text);
            Vec::new()
        }
    };
    let snapshot = match setup::snapshot(DEADLINE) {
        Ok(snapshot) => snapshot,
        Err(why) => {
            let level = if why.is_absent { Level::Critical } else { Level::Unknown };
            findings.add(level, why.text.lines().next().unwrap_or_default());
            return findings.line("");
        }
    };
    let chosen = choose(&snapshot, &configured, is_all, &mut findings);
    if chosen.is_empty() && findings.list.is_empty() {
        findings.add(Level::Unknown, "there is no resource");
    }
    for (_, text) in &snapshot.daemon.faults {
        findings.add(Level::Warning, format!("a fault is switched on: {text}"));
    }
    let now = now_us();
    for resource in &chosen {
        judge(resource, limits, now, &mut findings);
    }
    findings.line(&good(&chosen))
}

fn now_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// The configuration is there, and this user may not read it.
fn is_unreadable(invocation: &Invocation) -> bool {
    let is_denied = |path: &std::path::Path| {
        File::open(path).is_err_and(|e| e.kind() == ErrorKind::PermissionDenied)
    };
    match &invocation.config_file {
        Some(file) => is_denied(std::path::Path::new(std::ffi::OsStr::from_bytes(file))),
        None => SEARCH_PATH.iter().any(|path| is_denied(std::path::Path::new(path))),
    }
}

/// Names of the resources that the configuration has for this host, or those that were named.
fn wanted(invocation: Invocation, is_all: bool) -> Result<Vec<BString>, Exit> {
    let names = invocation.names.clone();
    let app = App::prepare(invocation)?;
    let config = &app.loaded.config;
    if is_all {
        let here = config.resources.iter().filter(|r| !r.is_ignored());
        return Ok(here.map(|r| r.name.clone()).collect());
    }
    let mut stacked = app.invocation.stacked;
    let command = app.invocation.command;
    let one = |name| {
        let target = select::one(config, command, name, &mut stacked, app.node.as_bstr())?;
        Ok(app.resource(target).map(|r| r.name.clone()).unwrap_or_default())
    };
    names.iter().map(one).collect()
}

/// The resources to be judged. With `all` also those that run without being configured.
fn choose<'s>(
    snapshot: &'s Snapshot,
    configured: &[BString],
    is_all: bool,
    findings: &mut Findings,
) -> Vec<&'s Resource> {
    let find = |name: &BString| snapshot.resources.iter().find(|r| *name == r.name.as_str());
    for name in configured {
        if find(name).is_none() {
            findings.add(Level::Critical, format!("{name}: not up"));
        }
    }
    if is_all {
        return snapshot.resources.iter().collect();
    }
    configured.iter().filter_map(find).collect()
}

fn good(chosen: &[&Resource]) -> String {
    match chosen {
        [one] => {
            let disks = one.volumes.iter().map(|v| format!("{}/{}", v.disk, v.peer_disk));
            let disks: Vec<String> = disks.collect();
            format!("{}: {}, {}", one.name, one.role(), disks.join(" "))
        }
        all => {
            let volumes: usize = all.iter().map(|r| r.volumes.len()).sum();
            format!("{} resources with {volumes} volumes, both copies are current", all.len())
        }
    }
}

fn judge(resource: &Resource, limits: &Limits, now: u64, findings: &mut Findings) {
    let name = &resource.name;
    let s = resource.suspended;
    let mut why = [(s.user, "user"), (s.no_data, "no-data"), (s.fencing, "fencing")].into_iter();
    if s.is_any() {
        let why = why.find(|(is, _)| *is).map_or("", |(_, word)| word);
        findings.add(Level::Critical, format!("{name}: I/O is suspended ({why})"));
    }
    let is_split = match SplitBrain::of(resource) {
        SplitBrain::Open => {
            let text = format!("{name}: split brain, see drbdadm split-brain explain {name}");
            findings.add(Level::Critical, text);
            true
        }
        _ => false,
    };
    if resource.volumes.is_empty() {
        findings.add(Level::Critical, format!("{name}: it has no volumes"));
    }
    let apart = resource.apart_since_us.map(|at| now.saturating_sub(at) / 1_000_000);
    for volume in &resource.volumes {
        copies(resource, volume, limits, (apart, is_split), findings);
        numbers(resource, volume, limits, findings);
    }
}

/// How many current copies are within reach.
fn copies(
    resource: &Resource,
    volume: &Volume,
    limits: &Limits,
    (apart, is_split): (Option<u64>, bool),
    findings: &mut Findings,
) {
    let head = format!("{}/{}", resource.name, volume.volume);
    let is_connected = volume.cstate.number() >= Cstate::Connected.number();
    let is_good = |disk| u8::from(disk == Dstate::UpToDate);
    let count = is_good(volume.disk) + if is_connected { is_good(volume.peer_disk) } else { 0 };
    let Volume { cstate, disk, peer_disk, .. } = volume;
    let state = format!("{cstate}, {disk}/{peer_disk}");
    let reason = volume.reason.as_ref().or_else(|| {
        resource.connection.as_ref().and_then(|c| c.reason.as_ref()).filter(|_| !is_connected)
    });
    let reason = reason.map_or_else(String::new, |r| format!(" [{}]", r.code));
    match count {
        0 => {
            let text = format!("{head}: no current data within reach ({state}){reason}");
            findings.add(Level::Critical, text);
        }
        1 => {
            let level = match apart.zip(limits.apart_critical) {
                Some((seconds, limit)) if seconds >= limit => Level::Critical,
                _ if has_failed(volume) && !is_connected => Level::Critical,
                _ => Level::Warning,
            };
            if is_split {
                return;
            }
            let since = apart.map_or_else(String::new, |s| format!(" for {s} s"));
            let done = volume.progress.filter(|_| cstate.is_sync()).map_or_else(String::new, |p| {
                let done = p.total.saturating_sub(p.left).saturating_mul(100);
                format!(" {} % done", done / p.total.max(1))
            });
            let text = format!("{head}: one current copy ({state}){done}{since}{reason}");
            findings.add(level, text);
        }
        _ => {
            let kib = volume.counters.out_of_sync.saturating_mul(4);
            if limits.out_of_sync_warning.is_some_and(|limit| kib >= limit.max(1)) {
                let text = format!("{head}: {kib} KiB differ between the two copies ({state})");
                findings.add(Level::Warning, text);
            }
        }
    }
}

/// The two nodes did meet, and refused each other.
fn has_failed(volume: &Volume) -> bool {
    volume.handshake.as_ref().is_some_and(|met| met.outcome == Outcome::Failed)
}

fn numbers(resource: &Resource, volume: &Volume, limits: &Limits, findings: &mut Findings) {
    let head = format!("{}/{}", resource.name, volume.volume);
    let c = &volume.counters;
    let kib = c.out_of_sync.saturating_mul(4);
    if limits.out_of_sync_critical.is_some_and(|limit| kib >= limit) {
        findings.add(Level::Critical, format!("{head}: {kib} KiB are out of sync"));
    }
    let oldest = volume.oldest_request_us.unwrap_or(0);
    let exceeds = |limit: Option<u64>| limit.is_some_and(|s| oldest / 1_000_000 >= s);
    if exceeds(limits.oldest_critical) || exceeds(limits.oldest_warning) {
        let level = if exceeds(limits.oldest_critical) { Level::Critical } else { Level::Warning };
        let text = format!("{head}: a request waits for {} s", oldest / 1_000_000);
        findings.add(level, text);
    }
    let shown = |limit: Option<u64>, unit: u64| {
        limit.map_or_else(String::new, |l| l.saturating_mul(unit).to_string())
    };
    let (warn, crit) = (limits.out_of_sync_warning, limits.out_of_sync_critical);
    findings.perfdata.push(format!(
        "'{head} out of sync'={}B;{};{};0;{}",
        kib.saturating_mul(1024),
        shown(warn, 1024),
        shown(crit, 1024),
        volume.size.saturating_mul(512)
    ));
    findings.perfdata.push(format!(
        "'{head} oldest request'={}.{:03}s;{};{};0;",
        oldest / 1_000_000,
        oldest / 1000 % 1000,
        shown(limits.oldest_warning, 1),
        shown(limits.oldest_critical, 1)
    ));
    findings.perfdata.push(format!("'{head} pending'={};;;0;", c.application_pending));
}

#[cfg(test)]
mod tests {
    use drbd_admin::{Suspended, Volume};

    use super::*;

    fn pair() -> Resource {
        let mut volume = Volume::new(0, 7);
        volume.cstate = Cstate::Connected;
        volume.disk = Dstate::UpToDate;
        volume.peer_disk = Dstate::UpToDate;
        volume.size = 2048;
        Resource { name: "r0".into(), volumes: vec![volume], ..Resource::default() }
    }

    fn checked(limits: &str, change: impl FnOnce(&mut Resource)) -> (Level, String) {
        let mut resource = pair();
        change(&mut resource);
        let words: Vec<BString> = limits.split_whitespace().map(BString::from).collect();
        let limits = Limits::of(&words).unwrap();
        let mut findings = Findings::default();
        judge(&resource, &limits, 1_000_000_000, &mut findings);
        findings.line(&good(&[&resource]))
    }

    fn row(limits: &str, level: Level, part: &str, change: impl FnOnce(&mut Resource)) {
        let (found, line) = checked(limits, change);
        assert_eq!(found, level, "{line}");
        assert!(line.starts_with(&format!("DRBD {} - ", level.name())), "{line}");
        assert!(line.contains(part) && line.ends_with('\n'), "no {part:?} in {line}");
        assert_eq!(line.matches('\n').count(), 1, "{line}");
        assert_eq!(line.matches('|').count(), 1, "{line}");
    }

    #[test]
    fn good_data() {
        let (level, line) = checked("", |_| {});
        assert_eq!(level, Level::Ok);
        assert_eq!(
            line,
            "DRBD OK - r0: Secondary, UpToDate/UpToDate | 'r0/0 out of sync'=0B;1024;;0;1048576 \
             'r0/0 oldest request'=0.000s;10;60;0; 'r0/0 pending'=0;;;0;\n"
        );
    }

    #[test]
    fn copies_within_reach() {
        let apart = |us: u64| {
            move |r: &mut Resource| {
                r.apart_since_us = Some(1_000_000_000 - us);
                r.volumes[0].cstate = Cstate::WFConnection;
                r.volumes[0].peer_disk = Dstate::DUnknown;
            }
        };
        row("", Level::Warning, "r0/0: one current copy (WFConnection, ", apart(299_999_999));
        row("", Level::Critical, "UpToDate/DUnknown) for 300 s", apart(300_000_000));
        row("--apart-critical=never", Level::Warning, "for 900 s", apart(900_000_000));
        row("--apart-critical=0", Level::Critical, "for 0 s", apart(1));
        row("", Level::Critical, "no current data within reach (Connected, Outdated/Dis", |r| {
            r.volumes[0].disk = Dstate::Outdated;
            r.volumes[0].peer_disk = Dstate::Diskless;
        });
        // What the peer had when it was seen last is not within reach.
        row("", Level::Critical, "no current data", |r| {
            r.volumes[0].disk = Dstate::Outdated;
            r.volumes[0].cstate = Cstate::WFConnection;
        });
        row("", Level::Warning, "(SyncTarget, Inconsistent/UpToDate) 75 % done", |r| {
            let v = &mut r.volumes[0];
            (v.cstate, v.disk) = (Cstate::SyncTarget, Dstate::Inconsistent);
            v.progress = Some(drbd_admin::Progress { total: 8, left: 2, ..Default::default() });
        });
        row("", Level::Ok, "UpToDate/UpToDate", |r| r.volumes[0].cstate = Cstate::VerifyS);
    }

    #[test]
    fn what_needs_a_person() {
        row("", Level::Critical, "r0: I/O is suspended (fencing)", |r| {
            r.suspended = Suspended { fencing: true, ..Suspended::default() };
        });
        let mut findings = Findings::default();
        let empty = Resource { name: "r2".into(), ..Resource::default() };
        judge(&empty, &Limits::default(), 0, &mut findings);
        assert_eq!(findings.list, [(Level::Critical, "r2: it has no volumes".into())]);
    }

    #[test]
    fn numbers_beyond_their_limits() {
        let dirty = |r: &mut Resource| r.volumes[0].counters.out_of_sync = 3;
        row("", Level::Warning, "r0/0: 12 KiB differ between the two copies", dirty);
        row("--out-of-sync-warning=13", Level::Ok, "=12288B;13312;;0;", dirty);
        row("--out-of-sync-critical=12", Level::Critical, "r0/0: 12 KiB are out of sync;", dirty);
        let slow = |r: &mut Resource| r.volumes[0].oldest_request_us = Some(12_345_678);
        row("", Level::Warning, "r0/0: a request waits for 12 s", slow);
        row(
            "--oldest-critical=12",
            Level::Critical,
            "'r0/0 oldest request'=12.345s;10;12;0;",
            slow,
        );
        row("--oldest-warning=never --oldest-critical=never", Level::Ok, "=12.345s;;;0;", slow);
    }

    #[test]
    fn options_are_checked() {
        for bad in ["--apart-critical=x", "--nosuch=1", "word", "--oldest-warning=-1"] {
            assert!(Limits::of(&[bad.into()]).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_worst_counts_and_stands_first() {
        let mut findings = Findings::default();
        findings.add(Level::Warning, "a|b");
        findings.add(Level::Critical, "c\nd");
        findings.add(Level::Unknown, "e");
        assert_eq!(findings.line("").1, "DRBD CRITICAL - c d; e; a/b\n");
        assert_eq!(Findings::default().line("fine").1, "DRBD OK - fine\n");
    }
}
