//! `drbdsetup events2`. Spec: status-and-integration.md §2.9.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::{
    bits_to_kib, blocked, connection_name, events2_full, replication_name, resync_suspended,
    suspended, wrapped_kib, yes_no,
};
use crate::{HelperCall, HelperPhase, Resource, Snapshot, Update, Volume};

/// How lines are written.
#[derive(Clone, Copy, Debug, Default)]
pub struct Events2Options {
    /// `--timestamps`: seconds east of UTC of the reader's clock.
    pub timestamps: Option<i32>,
    /// `--statistics`.
    pub statistics: bool,
    /// `--full`: every line has all fields, also statistics and those of version 9.
    pub full: bool,
}

/// Writer of events: knows what it has printed.
#[derive(Debug, Default)]
pub struct Events2 {
    options: Events2Options,
    /// Objects of every resource as they were printed last.
    printed: BTreeMap<String, Vec<Object>>,
}

/// When a field is part of a change line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Repeat {
    /// When it differs; a difference makes the line.
    State,
    /// When it differs, but it makes no line.
    Sticky,
    /// Always, but it makes no line.
    Gauge,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Field {
    pub(super) name: &'static str,
    value: String,
    repeat: Repeat,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Object {
    pub(super) kind: Kind,
    /// Words that name it, with a blank in front.
    pub(super) key: String,
    pub(super) fields: Vec<Field>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Resource,
    Connection,
    Device,
    PeerDevice,
    Path,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Resource => "resource",
            Self::Connection => "connection",
            Self::Device => "device",
            Self::PeerDevice => "peer-device",
            Self::Path => "path",
        }
    }
}

impl Events2 {
    /// A writer that has printed nothing.
    #[must_use]
    pub fn new(options: Events2Options) -> Self {
        Self { options, printed: BTreeMap::new() }
    }

    /// The reader's clock has another distance to UTC from now on.
    pub const fn set_offset(&mut self, east: i32) {
        if self.options.timestamps.is_some() {
            self.options.timestamps = Some(east);
        }
    }

    /// Everything that exists, and the end mark.
    ///
    /// A resource without network configuration shows a connection without name here, and only
    /// here: that is how the original lists it.
    #[must_use]
    pub fn initial(&mut self, snapshot: &Snapshot) -> String {
        let mut text = String::new();
        for resource in &snapshot.resources {
            let all = objects(resource, true, self.options.full);
            for object in &all {
                self.line(&mut text, snapshot.at_us, "exists", object, &Shown::All);
            }
            let full = self.options.full;
            let is_real = resource.connection.is_some();
            let real = if is_real { all } else { objects(resource, false, full) };
            self.printed.insert(resource.name.clone(), real);
        }
        self.stamp(&mut text, snapshot.at_us);
        text.push_str("exists -\n");
        text
    }

    /// What an announcement changes.
    #[must_use]
    pub fn update(&mut self, update: &Update) -> String {
        self.changes(update.at_us, &update.name, update.resource.as_ref(), is_changed)
    }

    /// Everything whose numbers are others than printed last: `--poll`.
    #[must_use]
    pub fn poll(&mut self, snapshot: &Snapshot) -> String {
        let differs = |before: &Object, now: &Object| before != now;
        let one = |r: &Resource| self.changes(snapshot.at_us, &r.name, Some(r), differs);
        snapshot.resources.iter().map(one).collect()
    }

    fn changes(
        &mut self,
        at_us: u64,
        name: &str,
        resource: Option<&Resource>,
        is_shown: impl Fn(&Object, &Object) -> bool,
    ) -> String {
        let mut text = String::new();
        let old = self.printed.remove(name).unwrap_or_default();
        let full = self.options.full;
        let new = resource.map(|r| objects(r, false, full)).unwrap_or_default();
        let find = |list: &[Object], o: &Object| {
            list.iter().position(|x| x.kind == o.kind && x.key == o.key)
        };
        let mut gone: Vec<&Object> = old.iter().filter(|o| find(&new, o).is_none()).collect();
        gone.sort_by_key(|o| match o.kind {
            Kind::PeerDevice | Kind::Path => 0,
            Kind::Connection => 1,
            Kind::Device => 2,
            Kind::Resource => 3,
        });
        for object in gone {
            self.line(&mut text, at_us, "destroy", object, &Shown::Key);
        }
        let mut printed = Vec::new();
        for object in new {
            let before = find(&old, &object).and_then(|i| old.get(i));
            match before {
                None => self.line(&mut text, at_us, "create", &object, &Shown::All),
                Some(before) if is_shown(before, &object) => {
                    let shown = if full { Shown::All } else { Shown::Since(before) };
                    self.line(&mut text, at_us, "change", &object, &shown);
                }
                // Not announced: it stays as it was printed.
                Some(before) => {
                    printed.push(before.clone());
                    continue;
                }
            }
            printed.push(object);
        }
        if resource.is_some() {
            self.printed.insert(name.to_owned(), printed);
        }
        text
    }

    /// A handler begins or ends.
    #[must_use]
    pub fn helper(&self, call: &HelperCall) -> String {
        let mut text = String::new();
        self.stamp(&mut text, call.at_us);
        let action = match call.phase {
            HelperPhase::Call => "call",
            HelperPhase::Response { .. } => "response",
        };
        let _ = write!(text, "{action} helper name:{} peer-node-id:0", call.resource);
        if call.is_connected {
            text.push_str(" conn-name:peer");
        }
        if let Some((volume, minor)) = call.volume {
            let _ = write!(text, " volume:{volume} minor:{minor}");
        }
        let _ = write!(text, " helper:{}", call.helper);
        if let HelperPhase::Response { status } = call.phase {
            let _ = write!(text, " status:{status}");
        }
        text.push('\n');
        text
    }

    /// Events were lost.
    #[must_use]
    pub fn skipped(count: u64) -> String {
        format!("- skipped {count}\n")
    }

    fn stamp(&self, text: &mut String, at_us: u64) {
        if let Some(east) = self.options.timestamps {
            text.push_str(&timestamp(at_us, east));
            text.push(' ');
        }
    }

    fn line(
        &self,
        text: &mut String,
        at_us: u64,
        action: &str,
        object: &Object,
        shown: &Shown<'_>,
    ) {
        self.stamp(text, at_us);
        let _ = write!(text, "{action} {}{}", object.kind.name(), object.key);
        for field in &object.fields {
            if field.repeat != Repeat::State && !self.options.statistics && !self.options.full {
                continue;
            }
            let is_shown = match shown {
                Shown::All => true,
                Shown::Key => false,
                Shown::Since(before) => {
                    field.repeat == Repeat::Gauge || before.value(field.name) != Some(&field.value)
                }
            };
            if is_shown {
                let _ = write!(text, " {}:{}", field.name, field.value);
            }
        }
        text.push('\n');
    }
}

enum Shown<'o> {
    All,
    Key,
    Since(&'o Object),
}

impl Object {
    fn value(&self, name: &str) -> Option<&String> {
        self.fields.iter().find(|f| f.name == name).map(|f| &f.value)
    }
}

fn is_changed(before: &Object, now: &Object) -> bool {
    let states = |o: &Object| -> Vec<String> {
        let state = o.fields.iter().filter(|f| f.repeat == Repeat::State);
        state.map(|f| f.value.clone()).collect()
    };
    states(before) != states(now)
}

/// Objects of a resource in the order of an announcement.
fn objects(resource: &Resource, with_unnamed: bool, full: bool) -> Vec<Object> {
    let extended = |mut object: Object, volume: Option<&Volume>| {
        if full {
            events2_full::extend(&mut object, resource, volume);
        }
        object
    };
    let mut list = vec![extended(resource_object(resource), None)];
    let shown = resource.connection.is_some() || with_unnamed;
    let key = connection_key(resource);
    if shown {
        list.push(extended(connection_object(resource, &key), None));
    }
    let volumes = &resource.volumes;
    list.extend(volumes.iter().map(|v| extended(device_object(resource, v), Some(v))));
    if shown {
        list.extend(volumes.iter().map(|v| extended(peer_device_object(v, &key), Some(v))));
    }
    if full {
        list.extend(resource.connection.as_ref().map(|c| events2_full::path(c, &key)));
    }
    list
}

fn connection_key(resource: &Resource) -> String {
    let named = if resource.connection.is_some() { " conn-name:peer" } else { "" };
    format!(" name:{} peer-node-id:0{named}", resource.name)
}

const fn field(name: &'static str, value: String, repeat: Repeat) -> Field {
    Field { name, value, repeat }
}

pub(super) fn state(name: &'static str, value: impl ToString) -> Field {
    field(name, value.to_string(), Repeat::State)
}

fn sticky(name: &'static str, value: &str) -> Field {
    field(name, value.to_owned(), Repeat::Sticky)
}

pub(super) fn gauge(name: &'static str, value: impl ToString) -> Field {
    field(name, value.to_string(), Repeat::Gauge)
}

fn resource_object(resource: &Resource) -> Object {
    Object {
        kind: Kind::Resource,
        key: format!(" name:{}", resource.name),
        fields: vec![
            state("role", resource.role()),
            state("suspended", suspended(resource.suspended)),
            sticky("write-ordering", resource.write_ordering.name()),
        ],
    }
}

fn connection_object(resource: &Resource, key: &str) -> Object {
    let connection = resource.connection.as_ref();
    let name = connection.map_or("StandAlone", |c| connection_name(c.state));
    let is_congested = connection.is_some_and(|c| c.is_congested);
    Object {
        kind: Kind::Connection,
        key: key.to_owned(),
        fields: vec![
            state("connection", name),
            state("role", resource.peer_role()),
            sticky("congested", yes_no(is_congested)),
        ],
    }
}

fn device_object(resource: &Resource, volume: &Volume) -> Object {
    let c = &volume.counters;
    Object {
        kind: Kind::Device,
        key: format!(" name:{} volume:{} minor:{}", resource.name, volume.volume, volume.minor),
        fields: vec![
            state("disk", volume.disk),
            gauge("size", volume.size / 2),
            gauge("read", wrapped_kib(c.read)),
            gauge("written", wrapped_kib(c.written)),
            gauge("al-writes", c.al_writes),
            gauge("bm-writes", c.bm_writes),
            gauge("upper-pending", c.application_pending),
            gauge("lower-pending", c.local_pending),
            sticky("al-suspended", yes_no(volume.is_al_suspended)),
            sticky("blocked", blocked(volume)),
        ],
    }
}

fn peer_device_object(volume: &Volume, key: &str) -> Object {
    let c = &volume.counters;
    Object {
        kind: Kind::PeerDevice,
        key: format!("{key} volume:{}", volume.volume),
        fields: vec![
            state("replication", replication_name(volume.cstate)),
            state("peer-disk", volume.peer_disk),
            state("resync-suspended", resync_suspended(volume)),
            gauge("received", wrapped_kib(c.received)),
            gauge("sent", wrapped_kib(c.sent)),
            gauge("out-of-sync", bits_to_kib(c.out_of_sync)),
            gauge("pending", c.peer_pending),
            gauge("unacked", c.unacked),
        ],
    }
}

/// `2026-11-22T13:18:08.281961+00:00` on a clock that is so many seconds east of UTC.
#[must_use]
pub fn timestamp(at_us: u64, east: i32) -> String {
    let seconds = i64::try_from(at_us / 1_000_000).unwrap_or(i64::MAX / 2) + i64::from(east);
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3600, second % 3600 / 60, second % 60);
    let sign = if east < 0 { '-' } else { '+' };
    let (off_hour, off_minute) = (east.unsigned_abs() / 3600, east.unsigned_abs() % 3600 / 60);
    let micros = at_us % 1_000_000;
    format!(
        "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}\
         {sign}{off_hour:02}:{off_minute:02}"
    )
}

/// Year, month and day of a number of days since 1970 in the Gregorian calendar.
///
/// Years are counted from March, so that the leap day is the last; 400 years have 146097 days.
const fn civil(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_index = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_index + 2) / 5 + 1;
    let month = if month_index < 10 { month_index + 3 } else { month_index - 9 };
    let year = year_of_era + era * 400 + if month <= 2 { 1 } else { 0 };
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps() {
        let rows = [
            (0, 0, "1970-01-01T00:00:00.000000+00:00"),
            (1_795_353_488_281_961, 0, "2026-11-22T13:18:08.281961+00:00"),
            (1_795_353_488_281_961, 19_800, "2026-11-22T18:48:08.281961+05:30"),
            (1_709_164_800_000_001, -3600, "2024-02-28T23:00:00.000001-01:00"),
            (1_709_164_800_000_000, 0, "2024-02-29T00:00:00.000000+00:00"),
            (4_107_542_400_000_000, 0, "2100-03-01T00:00:00.000000+00:00"),
        ];
        for (at, east, text) in rows {
            assert_eq!(timestamp(at, east), text);
        }
        assert!(!timestamp(u64::MAX, i32::MIN).is_empty(), "no overflow");
    }

    #[test]
    fn nothing_is_said_when_nothing_is_visible() {
        let mut events = Events2::new(Events2Options { statistics: true, ..Default::default() });
        let resource = |read| {
            let mut volume = Volume::new(0, 0);
            volume.counters.read = read;
            Resource { name: "r0".into(), volumes: vec![volume], ..Resource::default() }
        };
        let _ = events.initial(&Snapshot { resources: vec![resource(0)], ..Snapshot::default() });
        let update = |resource| Update { at_us: 0, name: "r0".into(), resource };
        assert_eq!(events.update(&update(Some(resource(8)))), "");
        assert_eq!(
            events.update(&update(None)),
            "destroy device name:r0 volume:0 minor:0\ndestroy resource name:r0\n"
        );
        assert_eq!(events.update(&update(None)), "");
    }
}
