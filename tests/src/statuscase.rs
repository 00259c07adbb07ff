//! Recorded status outputs of the original, read back into snapshots.

use std::path::Path;

use anyhow::{Context, Result, bail};
use drbd_admin::{
    Address, Backing, Cache, Connection, Family, Generations, MetaIndex, OptionSet, OptionValue,
    Progress, Resource, Section, Snapshot, Suspended, Volume, WriteOrdering,
};
use drbd_conf::options::row_of;
use drbd_types::{Cstate, Dstate, Gi, Role};

/// Outputs of one node in one state.
#[derive(Debug)]
pub struct Node {
    /// `NN-name/node`.
    pub name: String,
    /// Were the commands recorded, too?
    pub is_complete: bool,
    /// /proc/drbd.
    pub proc: String,
    /// `status`.
    pub status: String,
    /// `status --verbose --statistics`.
    pub verbose: String,
    /// `events2 --now --statistics`.
    pub events2: String,
    /// The other commands.
    pub commands: Vec<Output>,
}

/// One command and its output.
#[derive(Debug)]
pub struct Output {
    /// As typed.
    pub command: String,
    /// Its stdout.
    pub stdout: String,
}

impl Node {
    /// stdout of a command.
    ///
    /// # Errors
    /// It was not run.
    pub fn command(&self, command: &str) -> Result<&str> {
        let found = self.commands.iter().find(|s| s.command == command);
        Ok(&found.with_context(|| format!("{}: no {command}", self.name))?.stdout)
    }
}

/// All nodes in all states.
///
/// # Errors
/// The recordings are not there or not complete.
pub fn nodes(folder: &Path) -> Result<Vec<Node>> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let dir = entry?.path();
        for node in ["alpha", "bravo"] {
            let read = |what: &str| {
                let path = dir.join(format!("{node}.{what}.txt"));
                std::fs::read_to_string(&path).with_context(|| path.display().to_string())
            };
            if !dir.join(format!("{node}.proc.txt")).exists() {
                continue;
            }
            // Of some states only /proc/drbd was recorded.
            let is_complete = dir.join(format!("{node}.commands.txt")).exists();
            let read_more = |what| if is_complete { read(what) } else { Ok(String::new()) };
            let state = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
            all.push(Node {
                name: format!("{state}/{node}"),
                is_complete,
                proc: read("proc")?,
                status: read_more("status")?,
                verbose: read_more("status-verbose-statistics")?,
                events2: read_more("events2-now-statistics")?,
                commands: sections(&read_more("commands")?),
            });
        }
    }
    all.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(all)
}

fn sections(text: &str) -> Vec<Output> {
    let mut all: Vec<Output> = Vec::new();
    let mut in_stdout = false;
    for line in text.split_inclusive('\n') {
        match line.strip_prefix("#### ").map(str::trim_end) {
            Some(end) if end.starts_with("exit ") || end == "stderr" => in_stdout = end != "stderr",
            Some(command) => {
                in_stdout = true;
                all.push(Output { command: command.into(), stdout: String::new() });
            }
            None if in_stdout => {
                if let Some(last) = all.last_mut() {
                    last.stdout.push_str(line);
                }
            }
            None => {}
        }
    }
    all
}

/// A name of one of the state enumerations.
fn named<T: Copy>(all: &[T], name: impl Fn(T) -> &'static str, text: &str) -> Result<T> {
    all.iter().copied().find(|s| name(*s) == text).with_context(|| format!("state {text}"))
}

fn role(text: &str) -> Result<Role> {
    named(Role::ALL, Role::name, text)
}

fn dstate(text: &str) -> Result<Dstate> {
    named(Dstate::ALL, Dstate::name, text)
}

fn cstate(text: &str) -> Result<Cstate> {
    named(Cstate::ALL, Cstate::name, text)
}

fn connection_state(text: &str) -> Result<Cstate> {
    match text {
        "Connecting" => Ok(Cstate::WFConnection),
        "Connected" => Ok(Cstate::WFReportParams),
        other => cstate(other),
    }
}

fn number(text: &str) -> Result<u64> {
    text.replace(',', "").parse().with_context(|| format!("number {text}"))
}

fn pair(text: &str, by: char) -> Result<(&str, &str)> {
    text.split_once(by).with_context(|| format!("no {by} in {text}"))
}

/// A connection about which nothing is known yet.
#[must_use]
pub fn new_connection() -> Connection {
    let nowhere = Address { family: Family::Ipv4, addr: "0.0.0.0".into(), port: 0 };
    Connection {
        local: nowhere.clone(),
        peer: nowhere,
        peer_name: None,
        options: OptionSet::default(),
        state: Cstate::StandAlone,
        is_congested: false,
        agreed: Some(101),
        ap_in_flight: None,
        rs_in_flight: None,
        reason: None,
    }
}

/// Sets a field of the resource, its connection or one of its volumes, by the name that status and
/// events2 give it. `is_peer`: `role` is that of the peer.
///
/// # Errors
/// An unknown field or value.
pub fn set(
    resource: &mut Resource,
    volume: Option<u16>,
    is_peer: bool,
    key: &str,
    value: &str,
) -> Result<()> {
    let offline = resource.connection.as_ref().map_or(Cstate::StandAlone, |c| c.state);
    match key {
        "role" => {
            for v in &mut resource.volumes {
                *(if is_peer { &mut v.peer_role } else { &mut v.role }) = role(value)?;
            }
            return Ok(());
        }
        "suspended" => {
            let has = |word| value.split(',').any(|w| w == word);
            let (user, no_data, fencing) = (has("user"), has("no-data"), has("fencing"));
            resource.suspended = Suspended { user, no_data, fencing };
            return Ok(());
        }
        "write-ordering" => {
            let all = [WriteOrdering::None, WriteOrdering::Drain, WriteOrdering::Flush];
            resource.write_ordering = named(&all, WriteOrdering::name, value)?;
            return Ok(());
        }
        "connection" | "congested" => {
            if let Some(connection) = &mut resource.connection {
                match key {
                    "connection" => connection.state = connection_state(value)?,
                    _ => connection.is_congested = value == "yes",
                }
            }
            return Ok(());
        }
        _ => {}
    }
    let wanted = volume.unwrap_or(0);
    let v = resource.volumes.iter_mut().find(|v| v.volume == wanted).context("no such volume")?;
    let sectors = |text| number(text).map(|kib| kib * 2);
    let c = &mut v.counters;
    match key {
        "volume" => {}
        "minor" => v.minor = u32::try_from(number(value)?)?,
        "disk" => v.disk = dstate(value)?,
        "size" => v.size = sectors(value)?,
        "read" => c.read = sectors(value)?,
        "written" => c.written = sectors(value)?,
        "al-writes" => c.al_writes = number(value)?,
        "bm-writes" => c.bm_writes = number(value)?,
        "upper-pending" => c.application_pending = number(value)?,
        "lower-pending" => c.local_pending = number(value)?,
        "al-suspended" => v.is_al_suspended = value == "yes",
        "blocked" => v.is_blocked = value == "upper",
        "replication" => {
            v.cstate = match value {
                "Off" => offline,
                "Established" => Cstate::Connected,
                other => cstate(other)?,
            }
        }
        "peer-disk" => v.peer_disk = dstate(value)?,
        "resync-suspended" => {
            let has = |word| value.split(',').any(|w| w == word);
            v.paused_user = has("user");
            v.paused_peer = has("peer");
            v.paused_after = has("dependency");
        }
        "received" => c.received = sectors(value)?,
        "sent" => c.sent = sectors(value)?,
        "out-of-sync" => c.out_of_sync = number(value)? / 4,
        "pending" => c.peer_pending = number(value)?,
        "unacked" => c.unacked = number(value)?,
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "a percentage of few bits"
        )]
        "done" => {
            let open = 1.0 - value.parse::<f64>()? / 100.0;
            c.out_of_sync = (open * (v.size / 8) as f64).round() as u64;
        }
        other => bail!("unknown field {other}"),
    }
    Ok(())
}

/// One line of events2 in words.
#[derive(Debug)]
pub struct EventLine<'t> {
    /// `exists`, `change`, ...
    pub action: &'t str,
    /// `resource`, `device`, ...
    pub object: &'t str,
    /// Fields in order.
    pub fields: Vec<(&'t str, &'t str)>,
}

impl<'t> EventLine<'t> {
    /// Reads a line without timestamp.
    #[must_use]
    pub fn parse(line: &'t str) -> Option<Self> {
        let mut words = line.split(' ');
        let (action, object) = (words.next()?, words.next()?);
        let fields = words.map(|w| w.split_once(':')).collect::<Option<_>>()?;
        Some(Self { action, object, fields })
    }

    /// Value of a field.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&'t str> {
        self.fields.iter().find(|(n, _)| *n == name).map(|(_, v)| *v)
    }

    /// Brings the resource to what the line says; returns false if the resource is gone.
    ///
    /// # Errors
    /// An unknown field or value.
    pub fn apply(&self, resource: &mut Resource) -> Result<bool> {
        let volume = self.get("volume").map(str::parse).transpose()?;
        let volumes = &mut resource.volumes;
        match (self.action, self.object) {
            ("destroy", "resource") => return Ok(false),
            ("destroy", "device") => volumes.retain(|v| Some(v.volume) != volume),
            ("destroy", "connection") => resource.connection = None,
            ("destroy", _) => {}
            ("exists" | "create", "connection") if self.get("conn-name").is_some() => {
                resource.connection = Some(new_connection());
            }
            ("exists" | "create", "device") => {
                let number = volume.context("device without volume")?;
                volumes.push(Volume::new(number, 0));
                volumes.sort_by_key(|v| v.volume);
                // A role is one of the resource here; a new volume has that of the others.
                let (own, peer) = volumes
                    .first()
                    .map_or((Role::Secondary, Role::Unknown), |v| (v.role, v.peer_role));
                for v in volumes.iter_mut() {
                    (v.role, v.peer_role) = (own, peer);
                }
            }
            _ => {}
        }
        if self.action == "destroy" {
            return Ok(true);
        }
        let is_peer = self.object == "connection";
        for (key, value) in &self.fields {
            if !matches!(*key, "name" | "peer-node-id" | "conn-name") {
                set(resource, volume, is_peer, key, value)?;
            }
        }
        Ok(true)
    }
}

/// A snapshot from the output of `events2 --now`.
///
/// # Errors
/// A line is not understood.
pub fn from_events2(text: &str) -> Result<Snapshot> {
    let mut snapshot = Snapshot::default();
    // Roles belong to volumes, which come later.
    let mut later = Vec::new();
    for line in text.lines().filter(|l| *l != "exists -") {
        let event = EventLine::parse(line).with_context(|| line.to_owned())?;
        let name = event.get("name").context("name")?;
        if event.object == "resource" {
            snapshot.resources.push(Resource { name: name.into(), ..Resource::default() });
        }
        let found = snapshot.resources.iter_mut().find(|r| r.name == name);
        let resource = found.context("unknown resource")?;
        event.apply(resource)?;
        later.push(event);
    }
    for event in later.iter().filter(|e| matches!(e.object, "resource" | "connection")) {
        let name = event.get("name").unwrap_or_default();
        let (is_peer, value) = (event.object == "connection", event.get("role"));
        for resource in snapshot.resources.iter_mut().filter(|r| r.name == name) {
            set(resource, None, is_peer, "role", value.unwrap_or_default())?;
        }
    }
    Ok(snapshot)
}

/// Brings a snapshot to what an output of `status` says.
///
/// # Errors
/// A word is not understood.
pub fn overlay_status(snapshot: &mut Snapshot, text: &str) -> Result<()> {
    let (mut current, mut is_peer, mut volume) = (None, false, None);
    for word in text.split_whitespace() {
        match word.split_once(':') {
            None if word == "peer" => (is_peer, volume) = (true, None),
            None => {
                let found = snapshot.resources.iter_mut().find(|r| r.name == word);
                (current, is_peer, volume) = (Some(found.context("resource")?), false, None);
            }
            Some((key, value)) => {
                if key == "volume" {
                    volume = Some(value.parse()?);
                }
                let resource = current.as_deref_mut().context("a field before any resource")?;
                set(resource, volume, is_peer, key, value)?;
            }
        }
    }
    Ok(())
}

/// A snapshot with the devices of /proc/drbd, each in a resource of its own.
///
/// # Errors
/// A line is not understood.
pub fn from_proc(text: &str) -> Result<Snapshot> {
    let mut snapshot = Snapshot::default();
    for line in text.lines() {
        let Some((minor, rest)) = line.split_once(": cs:") else { continue };
        let volumes = vec![Volume::new(0, minor.trim().parse()?)];
        let connection = (rest.split_whitespace().count() == 5).then(new_connection);
        let suspended = Suspended { user: rest.contains(" s"), ..Suspended::default() };
        let name = format!("r{minor}");
        let resource = Resource { name, volumes, connection, suspended, ..Resource::default() };
        snapshot.resources.push(resource);
    }
    overlay_proc(&mut snapshot, text)?;
    Ok(snapshot)
}

/// Brings a snapshot to what /proc/drbd says; returns `proc_details`.
///
/// # Errors
/// A line is not understood.
pub fn overlay_proc(snapshot: &mut Snapshot, text: &str) -> Result<u8> {
    let mut details = 0;
    let (mut at, mut cache) = (None, Cache::default());
    for (i, line) in text.lines().enumerate() {
        if let Some(build) = line.strip_prefix("srcversion: ") {
            snapshot.daemon.build = build.trim_end().into();
        }
        if i < 2 || line.is_empty() {
            continue;
        }
        if let Some((minor, rest)) = line.split_once(": cs:") {
            let minor: u32 = minor.trim().parse()?;
            let place = |r: &Resource| r.volumes.iter().position(|v| v.minor == minor);
            let found = snapshot.resources.iter().enumerate();
            let (r, v) = found.filter_map(|(i, r)| Some((i, place(r)?))).next().context("minor")?;
            at = Some((r, v));
            device_line(&mut snapshot.resources[r], v, rest)?;
            continue;
        }
        let (r, v) = at.context("a line before any device")?;
        let resource = &mut snapshot.resources[r];
        let words: Vec<&str> = line.split_whitespace().collect();
        if line.starts_with("    ns:") {
            counters_line(resource, v, &words)?;
        } else if line.starts_with("\t[") {
            resource.volumes[v].progress = Some(bar_line(line)?);
        } else if line.starts_with("\tfinish:") {
            finish_line(resource.volumes[v].progress.as_mut().context("bar")?, line)?;
        } else if line.contains("sector pos:") {
            details = details.max(1);
            let run = resource.volumes[v].progress.as_mut().context("bar")?;
            let (position, size) = pair(words[3], '/')?;
            run.position = number(position)? / 8;
            run.stop_sector = words.get(6).map(|w| number(w)).transpose()?;
            resource.volumes[v].size = number(size)?;
        } else if let Some(rest) = line.strip_prefix("\tresync: ") {
            details = details.max(1);
            cache = cache_line(rest)?;
        } else if let Some(rest) = line.strip_prefix("\tact_log: ") {
            resource.volumes[v].caches = Some((cache, cache_line(rest)?));
        } else if let Some(rest) = line.strip_prefix("\tblocked on activity log: ") {
            details = 2;
            resource.volumes[v].blocked_on_al = number(rest)?;
        } else {
            bail!("unknown line {line:?}");
        }
    }
    Ok(details)
}

fn device_line(resource: &mut Resource, index: usize, rest: &str) -> Result<()> {
    let mut words: Vec<&str> = rest.split_whitespace().collect();
    if words == ["Unconfigured"] {
        return Ok(());
    }
    let protocol = if words.len() == 5 { Some(words.remove(3)) } else { None };
    let (ro, ds) = (pair(words[1], ':')?.1, pair(words[2], ':')?.1);
    let (ro, ds) = (pair(ro, '/')?, pair(ds, '/')?);
    let v = &mut resource.volumes[index];
    v.cstate = cstate(words[0])?;
    (v.role, v.peer_role) = (role(ro.0)?, role(ro.1)?);
    (v.disk, v.peer_disk) = (dstate(ds.0)?, dstate(ds.1)?);
    let flags: Vec<char> = words[3].chars().collect();
    (v.paused_after, v.paused_peer) = (flags[1] == 'a', flags[2] == 'p');
    (v.paused_user, v.is_al_suspended) = (flags[3] == 'u', flags[5] == 's');
    if (flags[0] == 's') != resource.suspended.is_any() {
        bail!("suspension differs");
    }
    match (&mut resource.connection, protocol) {
        (Some(connection), Some(letter)) => {
            connection.options.set("protocol", OptionValue::Text(letter.into()));
        }
        (None, None) => {}
        _ => bail!("protocol and connection differ"),
    }
    Ok(())
}

fn counters_line(resource: &mut Resource, index: usize, words: &[&str]) -> Result<()> {
    let c = &mut resource.volumes[index].counters;
    for word in words {
        let (key, value) = pair(word, ':')?;
        match key {
            "ns" => c.sent = number(value)? * 2,
            "nr" => c.received = number(value)? * 2,
            "dw" => c.written = number(value)? * 2,
            "dr" => c.read = number(value)? * 2,
            "al" => c.al_writes = number(value)?,
            "bm" => c.bm_writes = number(value)?,
            "lo" => c.local_pending = number(value)?,
            "pe" => c.peer_pending = number(value)?,
            "ua" => c.unacked = number(value)?,
            "ap" => c.application_pending = number(value)?,
            "ep" => c.epochs = number(value)?,
            "oos" => c.out_of_sync = number(value)? / 4,
            "wo" => {}
            other => bail!("unknown counter {other}"),
        }
    }
    Ok(())
}

fn bar_line(line: &str) -> Result<Progress> {
    let rest = pair(line, ']')?.1.trim_start();
    let (percent, amounts) = pair(pair(rest, ':')?.1.trim(), ' ')?;
    let (whole, tenth) = pair(percent.trim_end_matches('%'), '.')?;
    let (amounts, unit) = pair(amounts.trim_start_matches('('), ')')?;
    let (left, total) = pair(amounts, '/')?;
    // Amounts in M are bits shifted by 10; any bits below do not show.
    let shift = if unit == "M" { 10 } else { 0 };
    Ok(Progress {
        permille: u32::try_from(number(whole)? * 10 + number(tenth)?)?,
        left: (number(left)? / 4) << shift,
        total: (number(total)? / 4) << shift,
        ..Progress::default()
    })
}

fn finish_line(run: &mut Progress, line: &str) -> Result<()> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let time: Vec<u64> = words[1].split(':').map(number).collect::<Result<_>>()?;
    run.finish = time[0] * 3600 + time[1] * 60 + time[2];
    run.speed = number(words[3])?;
    let inner = pair(pair(line, '(')?.1, ')')?.0;
    match inner.split_once(" -- ") {
        Some((recent, average)) => {
            (run.recent, run.average) = (number(recent)?, number(average)?);
        }
        None => run.average = number(inner)?,
    }
    let want = words.iter().position(|w| *w == "want:");
    run.want = want.map(|i| number(words[i + 1])).transpose()?;
    run.is_stalled = line.ends_with("(stalled)");
    Ok(())
}

fn cache_line(rest: &str) -> Result<Cache> {
    let mut values = Vec::new();
    for word in rest.split_whitespace() {
        for part in pair(word, ':')?.1.split('/') {
            values.push(number(part)?);
        }
    }
    let [used, size, hits, misses, starving, locked, changed] = values[..] else {
        bail!("cache line {rest}")
    };
    Ok(Cache { used, size, hits, misses, starving, locked, changed })
}

/// Brings a snapshot to what `sh-status` says.
///
/// # Errors
/// A line is not understood.
pub fn overlay_sh_status(snapshot: &mut Snapshot, text: &str) -> Result<()> {
    let mut minor = 0;
    for line in text.lines().filter(|l| l.contains('=')) {
        let (key, value) = pair(line, '=')?;
        if key == "_minor" {
            minor = value.parse()?;
        }
        for resource in &mut snapshot.resources {
            let user = &mut resource.suspended.user;
            for v in resource.volumes.iter_mut().filter(|v| v.minor == minor) {
                match (key, value) {
                    ("_cstate", "Unconfigured") | ("_resynced_percent", "") => {}
                    ("_cstate", _) => v.cstate = cstate(value)?,
                    ("_role" | "_peer" | "_disk" | "_pdsk", "") => {}
                    ("_role", _) => v.role = role(value)?,
                    ("_peer", _) => v.peer_role = role(value)?,
                    ("_disk", _) => v.disk = dstate(value)?,
                    ("_pdsk", _) => v.peer_disk = dstate(value)?,
                    ("_flags_susp", _) => *user = value == "1",
                    ("_flags_aftr_isp", _) => v.paused_after = value == "1",
                    ("_flags_peer_isp", _) => v.paused_peer = value == "1",
                    ("_flags_user_isp", _) => v.paused_user = value == "1",
                    ("_resynced_percent", _) => {
                        let permille = u32::try_from(number(&value.replace('.', ""))?)?;
                        v.progress = Some(Progress { permille, ..Progress::default() });
                    }
                    _ => {}
                }
            }
        }
    }
    Ok(())
}

/// A snapshot from the output of `show`.
///
/// # Errors
/// A line is not understood.
pub fn from_show(text: &str) -> Result<Snapshot> {
    let mut snapshot = Snapshot::default();
    let mut sections: Vec<&str> = Vec::new();
    for line in text.lines().map(str::trim).filter(|l| !l.is_empty()) {
        if line == "}" {
            sections.pop();
            continue;
        }
        if let Some(head) = line.strip_suffix(" {") {
            sections.push(head);
            if let Some(name) = head.strip_prefix("resource ") {
                snapshot.resources.push(Resource { name: name.into(), ..Resource::default() });
            }
            let resource = snapshot.resources.last_mut().context("resource")?;
            match head.split_once(' ') {
                Some(("volume", n)) => resource.volumes.push(Volume::new(n.parse()?, 0)),
                None if head == "net" => resource.connection = Some(new_connection()),
                _ => {}
            }
            continue;
        }
        let resource = snapshot.resources.last_mut().context("resource")?;
        let statement = line.rsplit_once(';').context("no end")?.0;
        let (name, value) = pair(statement, '\t')?;
        let (name, value) = (name.trim(), value.trim());
        show_line(resource, sections.last().copied().unwrap_or_default(), name, value)?;
    }
    Ok(snapshot)
}

fn show_line(resource: &mut Resource, section: &str, name: &str, value: &str) -> Result<()> {
    let plain = value.strip_prefix('"').and_then(|v| v.strip_suffix('"'));
    let plain = plain.map_or_else(|| value.to_owned(), |v| v.replace("\\\"", "\""));
    let option = |section| -> Result<OptionValue> {
        let spec = row_of(section, name).with_context(|| format!("option {name}"))?;
        // Rates and sizes beyond the ranges were set on purpose in some recordings.
        let number = plain.trim_end_matches(['s', 'k']).parse().map(OptionValue::Number);
        OptionValue::parse(spec, &plain).or(number).with_context(|| format!("{name} {value}"))
    };
    let last = resource.volumes.last_mut();
    match (section, name) {
        ("options", _) => resource.options.set(name, option(Section::Options)?),
        ("net", _) => {
            let value = option(Section::Net)?;
            resource.connection.as_mut().context("net")?.options.set(name, value);
        }
        ("disk", _) => {
            let value = option(Section::Disk)?;
            let backing = last.and_then(|v| v.backing.as_mut()).context("disk")?;
            backing.options.set(name, value);
        }
        ("_remote_host" | "_this_host", "address") => {
            let (family, rest) = pair(value, ' ')?;
            let (addr, port) = rest.rsplit_once(':').context("port")?;
            let family = if family == "ipv4" { Family::Ipv4 } else { bail!("family {family}") };
            let address = Address { family, addr: addr.into(), port: port.parse()? };
            let connection = resource.connection.as_mut().context("address without net")?;
            *(if section == "_this_host" { &mut connection.local } else { &mut connection.peer }) =
                address;
        }
        (_, "device") => {
            last.context("volume")?.minor = value.trim_start_matches("minor ").parse()?
        }
        (_, "disk") => {
            last.context("volume")?.backing = Some(Backing {
                disk: plain.clone(),
                meta_disk: plain,
                meta_index: MetaIndex::Internal,
                device_uuid: 0,
                options: OptionSet::default(),
            });
        }
        (_, "meta-disk") if value == "internal" => {}
        _ => bail!("unknown line {section}: {name} {value}"),
    }
    Ok(())
}

/// Generation identifiers and flags from a line of `get-gi`.
///
/// # Errors
/// Not such a line.
pub fn generations(line: &str) -> Result<Generations> {
    let parts: Vec<&str> = line.split(':').collect();
    let [a, b, c, d, flags @ ..] = parts.as_slice() else { bail!("line {line}") };
    let gi = |text: &str| u64::from_str_radix(text, 16).map(Gi);
    let flags: Vec<bool> = flags.iter().map(|f| *f == "1").collect();
    let [consistent, up_to_date, primary, connected, full_sync, peer_outdated, crashed_primary] =
        flags[..]
    else {
        bail!("flags of {line}")
    };
    Ok(Generations {
        slots: [gi(a)?, gi(b)?, gi(c)?, gi(d)?],
        consistent,
        up_to_date,
        primary,
        connected,
        full_sync,
        peer_outdated,
        crashed_primary,
    })
}
