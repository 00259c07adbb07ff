//! Recorded status outputs of the original: read into a snapshot and rendered, they must come out
//! identically.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fmt::Write;

use drbd_admin::render::{
    Colour, Events, Events2, Events2Options, ProcOptions, ShowOptions, StatusOptions, cstate,
    dstate, get_gi, proc, role, sh_status, sh_status_unknown, show, show_gi, show_json, status,
    status_json,
};
use drbd_admin::{HelperCall, HelperPhase, Resource, Snapshot, Update};
use drbdrs_tests::fixtures;
use drbdrs_tests::statuscase::{
    EventLine, Node, from_events2, from_proc, from_show, generations, nodes, overlay_proc,
    overlay_sh_status, overlay_status,
};

/// Runs a check on all recorded nodes and shows all differences at once.
fn every_node(check: impl Fn(&Node) -> anyhow::Result<Vec<(String, String)>>) -> usize {
    let (mut count, mut differences) = (0, String::new());
    for node in nodes(&fixtures().join("status")).unwrap().iter().filter(|n| n.is_complete) {
        for (expected, rendered) in check(node).map_err(|e| e.context(node.name.clone())).unwrap() {
            count += 1;
            if expected != rendered {
                let _ =
                    writeln!(differences, "{}:\n{expected}---- rendered\n{rendered}", node.name);
            }
        }
    }
    assert!(differences.is_empty(), "{differences}");
    count
}

/// A snapshot from /proc/drbd, and from the other outputs where they were recorded.
fn with_proc(node: &Node) -> (Snapshot, u8) {
    let base = if node.is_complete { from_events2(&node.events2) } else { from_proc(&node.proc) };
    let mut snapshot = base.unwrap();
    let details = overlay_proc(&mut snapshot, &node.proc).unwrap();
    (snapshot, details)
}

#[test]
fn proc_drbd() {
    let all = nodes(&fixtures().join("status")).unwrap();
    assert_eq!(all.len(), 101);
    for node in all {
        let (snapshot, details) = with_proc(&node);
        let options = ProcOptions { details, ..ProcOptions::default() };
        assert_eq!(proc(&snapshot, &options), node.proc, "{}", node.name);
    }
}

#[test]
fn status_plain_and_verbose() {
    every_node(|node| {
        let mut snapshot = from_events2(&node.events2)?;
        overlay_status(&mut snapshot, &node.status)?;
        let plain = status(&snapshot, &StatusOptions::default());
        overlay_status(&mut snapshot, &node.verbose)?;
        let options = StatusOptions { verbose: true, statistics: true, ..StatusOptions::default() };
        let verbose = status(&snapshot, &options);
        Ok(vec![(node.status.clone(), plain), (node.verbose.clone(), verbose)])
    });
}

#[test]
fn events2_now() {
    every_node(|node| {
        let of = |text: &str, statistics| -> anyhow::Result<(String, String)> {
            let options = Events2Options { statistics, ..Events2Options::default() };
            Ok((text.to_owned(), Events2::new(options).initial(&from_events2(text)?)))
        };
        let plain = node.command("drbdsetup events2 --now")?;
        Ok(vec![of(&node.events2, true)?, of(plain, false)?])
    });
}

#[test]
fn events_initial_dump() {
    every_node(|node| {
        let text = node.command("timeout 2 drbdsetup events")?;
        // Changes that happened while it ran have small sequence numbers.
        let dump: String = text.split_inclusive('\n').filter(|l| l.find(' ') >= Some(9)).collect();
        let Some((seconds, _)) = dump.split_once(' ') else { return Ok(Vec::new()) };
        let mut snapshot = from_events2(&node.events2)?;
        overlay_proc(&mut snapshot, &node.proc)?;
        overlay_events(&mut snapshot, &dump);
        snapshot.at_us = seconds.parse::<u64>()? * 1_000_000;
        Ok(vec![(dump, Events::default().initial(&snapshot))])
    });
}

/// Brings states to what the old events say; they may have moved on.
fn overlay_events(snapshot: &mut Snapshot, dump: &str) {
    for line in dump.lines().filter(|l| l.contains(" ST ")) {
        let minor: u32 = line.split([' ', ',']).nth(2).unwrap().parse().unwrap();
        for resource in &mut snapshot.resources {
            let place = resource.volumes.iter().position(|v| v.minor == minor);
            let Some(i) = place else { continue };
            let mut volume = resource.volumes[i].clone();
            set_state(resource, &mut volume, line);
            resource.volumes[i] = volume;
        }
    }
}

#[test]
fn show_for_adjust() {
    every_node(|node| {
        let text = node.command("drbdsetup show")?;
        Ok(vec![(text.into(), show(&from_show(text)?, &ShowOptions::default()))])
    });
}

#[test]
fn show_with_defaults() {
    let text = result_of("drbdsetup show r0 --show-defaults");
    // The driver of the reference keeps numbers beyond their range; we do not.
    let text = text.replace("99999; # seconds\n", "10; # seconds, default\n");
    let text = text.replace("99999; # 1/10 seconds\n", "0; # 1/10 seconds, default\n");
    let snapshot = from_show(&text).unwrap();
    assert_eq!(show(&snapshot, &ShowOptions { defaults: true }), text);
}

/// stdout of a recorded command.
fn result_of(command: &str) -> String {
    let file = fixtures().join("status/command-results.json");
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let list = json.as_array().or_else(|| json["records"].as_array()).unwrap();
    let found = list.iter().rev().find(|r| r["command"] == command).unwrap();
    found["stdout"].as_str().unwrap().to_owned()
}

#[test]
fn sh_status_for_shells() {
    every_node(|node| {
        let text = node.command("drbdsetup sh-status")?;
        let mut snapshot = from_events2(&node.events2)?;
        overlay_sh_status(&mut snapshot, text)?;
        Ok(vec![(text.into(), sh_status(&snapshot))])
    });
}

#[test]
fn sh_status_of_an_unknown_minor() {
    let file = std::fs::read_to_string(fixtures().join("status/command-results.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&file).unwrap();
    let list = json.as_array().or_else(|| json["records"].as_array()).unwrap();
    let found = list
        .iter()
        .find(|r| r["command"] == "drbdsetup sh-status 0" && r["context"] == "nothing configured");
    assert_eq!(found.unwrap()["stdout"].as_str().unwrap(), sh_status_unknown(0));
}

/// `drbdadm role all` and the like: one line per minor that exists; drbdmeta answers for others.
#[test]
fn role_cstate_dstate() {
    every_node(|node| {
        if node.command("drbdadm role all").is_err() {
            return Ok(Vec::new());
        }
        let mut snapshot = from_events2(&node.events2)?;
        overlay_sh_status(&mut snapshot, node.command("drbdsetup sh-status")?)?;
        let minors = node.command("drbdadm sh-minor all")?;
        let (mut roles, mut conns, mut disks) = (String::new(), String::new(), Vec::new());
        for minor in minors.lines() {
            let all = snapshot.by_minor();
            match all.iter().find(|(_, v)| v.minor.to_string() == minor) {
                Some((_, v)) => {
                    roles += &(role(v) + "\n");
                    conns += &(cstate(v) + "\n");
                    disks.push((dstate(v) != "Unconfigured").then(|| dstate(v)));
                }
                None => disks.push(None),
            }
        }
        let recorded = node.command("drbdadm dstate all")?;
        let ours: String = disks
            .iter()
            .zip(recorded.lines())
            .map(|(own, meta)| own.clone().unwrap_or_else(|| meta.to_owned()) + "\n")
            .collect();
        // What changes every second in a cut link is not of the same moment.
        let moving = [
            "34-link-lost/bravo",
            "35-suspended-by-fencing/alpha",
            "35-suspended-by-fencing/bravo",
            "36-fenced-peer-outdated/bravo",
            "40-primary-after-fencing/bravo",
        ];
        if moving.contains(&node.name.as_str()) {
            return Ok(Vec::new());
        }
        Ok(vec![
            (node.command("drbdadm role all")?.into(), roles),
            (node.command("drbdadm cstate all")?.into(), conns),
            (recorded.into(), ours),
        ])
    });
}

#[test]
fn show_gi_and_get_gi() {
    let count = every_node(|node| {
        let Ok(page) = node.command("drbdadm show-gi all") else { return Ok(Vec::new()) };
        let lines = node.command("drbdadm get-gi all")?;
        let pages = page.split("\n       +--<  Current").skip(1);
        let mut pairs = Vec::new();
        for (line, page) in lines.lines().zip(pages) {
            // drbdmeta answers for disks that are not attached, with one more line or two.
            if page.contains("last agreed") || page.contains("zero size") {
                continue;
            }
            // It went on between the two commands.
            if !page.contains(line) {
                continue;
            }
            let parsed = generations(line)?;
            pairs.push((format!("{line}\n"), get_gi(&parsed)));
            pairs.push((format!("\n       +--<  Current{page}"), show_gi(&parsed)));
        }
        Ok(pairs)
    });
    assert!(count > 200, "{count}");
}

/// The one recorded resource of a stream, and what was announced about it.
struct Replay {
    resources: Vec<Resource>,
    events2: Events2,
}

/// Lines that belong to one announcement: what is created or destroyed together.
fn announcements(lines: &[String]) -> Vec<Vec<&str>> {
    let mut all: Vec<Vec<&str>> = Vec::new();
    for line in lines {
        let kind = |l: &str| -> (String, String) {
            let mut words = l.split(' ').skip_while(|w| w.contains('T'));
            let mut next = || words.next().unwrap_or_default().to_owned();
            (next(), next())
        };
        let (action, object) = kind(line);
        let joins = all.last().and_then(|group| group.last()).is_some_and(|last| {
            let (before, of) = kind(last);
            match (action.as_str(), object.as_str()) {
                ("create", "peer-device") => before == "create",
                ("destroy", "connection") => before == "destroy" && of == "peer-device",
                _ => false,
            }
        });
        match all.last_mut() {
            Some(group) if joins => group.push(line),
            _ => all.push(vec![line]),
        }
    }
    all
}

impl Replay {
    fn of(text: &str, options: Events2Options) -> Self {
        let plain: String = text
            .split_inclusive('\n')
            .map(|l| l.split_once(' ').filter(|(t, _)| t.contains('T')).map_or(l, |(_, r)| r))
            .collect();
        let end = plain.find("exists -\n").unwrap();
        let snapshot = from_events2(&plain[..end]).unwrap();
        let mut events2 = Events2::new(options);
        let _ = events2.initial(&snapshot);
        Self { resources: snapshot.resources, events2 }
    }

    /// Applies an announcement; returns what the writer says.
    fn step(&mut self, at_us: u64, lines: &[&str]) -> String {
        let mut update = Update { at_us, name: String::new(), resource: None };
        for line in lines {
            let event = EventLine::parse(line).unwrap();
            let name = event.get("name").unwrap().to_owned();
            if event.object == "helper" {
                return self.events2.helper(&helper(at_us, &event));
            }
            if event.action == "create" && event.object == "resource" {
                self.resources.push(Resource { name: name.clone(), ..Resource::default() });
            }
            let i = self.resources.iter().position(|r| r.name == name).unwrap();
            let exists = event.apply(&mut self.resources[i]).unwrap();
            update.resource = exists.then(|| self.resources[i].clone());
            if !exists {
                self.resources.remove(i);
            }
            update.name = name;
        }
        self.events2.update(&update)
    }
}

fn helper(at_us: u64, event: &EventLine<'_>) -> HelperCall {
    let volume = event.get("volume").map(|v| v.parse().unwrap());
    let minor = event.get("minor").map(|m| m.parse().unwrap());
    let status = event.get("status").map(|s| s.parse().unwrap());
    HelperCall {
        at_us,
        resource: event.get("name").unwrap().into(),
        volume: volume.zip(minor),
        is_connected: event.get("conn-name").is_some(),
        helper: event.get("helper").unwrap().into(),
        phase: status.map_or(HelperPhase::Call, |status| HelperPhase::Response { status }),
    }
}

fn recording(name: &str) -> String {
    std::fs::read_to_string(fixtures().join("status/events").join(name)).unwrap()
}

/// Lines behind the initial dump.
fn later(text: &str) -> Vec<String> {
    let lines = text.lines().skip_while(|l| !l.ends_with("exists -")).skip(1);
    lines.map(str::to_owned).collect()
}

/// A change without fields: the original announces some things twice, we do not.
fn is_empty_change(line: &str) -> bool {
    line.starts_with("change ")
        && EventLine::parse(line).is_some_and(|e| {
            e.fields.iter().all(|(n, _)| {
                matches!(*n, "name" | "peer-node-id" | "conn-name" | "volume" | "minor")
            })
        })
}

#[test]
fn events2_streams() {
    for name in
        ["alpha.events2.txt", "alpha.events2-r0.txt", "alpha.events2-fencing-and-split-brain.txt"]
    {
        let text = recording(name);
        let mut replay = Replay::of(&text, Events2Options::default());
        let lines = later(&text);
        assert!(lines.len() > 25, "{name}");
        for group in announcements(&lines) {
            let expected: String =
                group.iter().filter(|l| !is_empty_change(l)).map(|l| format!("{l}\n")).collect();
            assert_eq!(replay.step(0, &group), expected, "{name}");
        }
    }
}

/// Microseconds of a timestamp of the recordings, all of which are of one day in UTC.
fn micros(stamp: &str) -> u64 {
    let time = stamp.strip_prefix("2026-11-22T").unwrap().strip_suffix("+00:00").unwrap();
    let (clock, fraction) = time.split_once('.').unwrap();
    let seconds = clock.split(':').fold(0, |all, part| all * 60 + part.parse::<u64>().unwrap());
    (1_795_305_600 + seconds) * 1_000_000 + fraction.parse::<u64>().unwrap()
}

#[test]
fn events2_stream_with_timestamps_and_statistics() {
    let text = recording("alpha.events2-timestamps-statistics.txt");
    let options = Events2Options { timestamps: Some(0), statistics: true, full: false };
    let mut replay = Replay::of(&text, options);
    let lines = later(&text);
    for group in announcements(&lines) {
        let stamps: Vec<(&str, &str)> = group.iter().map(|l| l.split_once(' ').unwrap()).collect();
        let plain: Vec<&str> = stamps.iter().map(|(_, l)| *l).collect();
        let rendered = replay.step(micros(stamps[0].0), &plain);
        let twice = plain[0].starts_with("change") && rendered.is_empty();
        let expected: String = group.iter().map(|l| format!("{l}\n")).collect();
        if twice {
            let gauges = ["received", "sent", "out-of-sync", "pending", "unacked"];
            let event = EventLine::parse(plain[0]).unwrap();
            let fields = event.fields.iter().map(|(n, _)| *n);
            let visible = fields.filter(|n| !gauges.contains(n));
            let key = ["name", "peer-node-id", "conn-name", "volume"];
            assert!(visible.into_iter().all(|n| key.contains(&n)), "{expected}");
        } else {
            assert_eq!(rendered, expected);
        }
    }
}

#[test]
fn events_old_format_stream() {
    for name in ["alpha.events.txt", "alpha.events-fencing-and-split-brain.txt"] {
        let text = recording(name);
        let mut resource = Resource { name: "r0".into(), ..Resource::default() };
        let mut events = Events::default();
        let mut offset = None;
        let mut volume = drbd_admin::Volume::new(0, 0);
        let mut expected = Vec::new();
        let mut rendered = String::new();
        for line in text.lines().filter(|l| !l.contains(" R - ")) {
            let (sequence, rest) = line.split_once(' ').unwrap();
            let sequence: u64 = sequence.parse().unwrap();
            if sequence > 1_000_000 {
                // The initial dump.
                if rest.contains(",r0[0]") {
                    set_state(&mut resource, &mut volume, rest);
                    resource.volumes = vec![volume.clone()];
                    let all = Snapshot { resources: vec![resource.clone()], ..Snapshot::default() };
                    let _ = events.initial(&all);
                }
                continue;
            }
            let offset = *offset.get_or_insert(sequence - 1);
            expected.push(format!("{} {rest}", sequence - offset));
            let word = rest.split(' ').next().unwrap();
            rendered += &match word {
                "ST-new" => {
                    set_state(&mut resource, &mut volume, rest);
                    resource.volumes = vec![volume.clone()];
                    let resource = Some(resource.clone());
                    events.update(&Update { at_us: 0, name: "r0".into(), resource })
                }
                "SP" => {
                    let permille = rest.rsplit(' ').next().unwrap().replace('.', "");
                    events.progress(0, permille.parse().unwrap())
                }
                "UH" | "UH-post" => {
                    let words: Vec<&str> = rest.split(' ').collect();
                    let status = words.get(3).map(|s| u32::from_str_radix(&s[2..], 16).unwrap());
                    events.helper(&HelperCall {
                        at_us: 0,
                        resource: "r0".into(),
                        volume: Some((0, 0)),
                        is_connected: true,
                        helper: words[2].into(),
                        phase: status
                            .map_or(HelperPhase::Call, |status| HelperPhase::Response { status }),
                    })
                }
                _ => String::new(),
            };
        }
        let rendered: Vec<&str> = rendered.lines().collect();
        assert_eq!(rendered.len(), expected.len(), "{name}");
        for (ours, theirs) in rendered.into_iter().zip(expected) {
            // The third line of a change shows the state of a little later in the original.
            let is_state = ours.split(' ').nth(1) == Some("ST");
            let end = if is_state { ours.find('{').unwrap() } else { ours.len() };
            assert_eq!(ours[..end], theirs[..end.min(theirs.len())], "{name}");
        }
    }
}

fn set_state(resource: &mut Resource, volume: &mut drbd_admin::Volume, text: &str) {
    use drbd_types::{Cstate, Dstate, Role};
    let inner = text.split(['{', '}']).nth(1).unwrap();
    let words: Vec<&str> = inner.split_whitespace().collect();
    let value = |i: usize| words[i].split_once(':').unwrap().1;
    let two = |i: usize| value(i).split_once('/').unwrap();
    let role = |t: &str| *Role::ALL.iter().find(|s| s.name() == t).unwrap();
    let disk = |t: &str| *Dstate::ALL.iter().find(|s| s.name() == t).unwrap();
    volume.cstate = *Cstate::ALL.iter().find(|s| s.name() == value(0)).unwrap();
    (volume.role, volume.peer_role) = (role(two(1).0), role(two(1).1));
    (volume.disk, volume.peer_disk) = (disk(two(2).0), disk(two(2).1));
    let flags = words[3].as_bytes();
    resource.suspended.user = flags[0] == b's';
    volume.paused_after = flags[1] == b'a';
    volume.paused_peer = flags[2] == b'p';
    volume.paused_user = flags[3] == b'u';
}

#[test]
fn colours() {
    let text = result_of("drbdsetup status --color=always --verbose --statistics");
    let plain: String = text
        .split('\u{1b}')
        .enumerate()
        .map(|(i, part)| if i == 0 { part } else { part.split_once('m').unwrap().1 })
        .collect();
    let mut snapshot = from_events2(
        "exists resource name:r0 role:Primary suspended:no write-ordering:flush\n\
         exists connection name:r0 peer-node-id:0 conn-name:peer connection:Connected role:Secondary congested:no\n\
         exists device name:r0 volume:0 minor:0 disk:UpToDate\n\
         exists peer-device name:r0 peer-node-id:0 conn-name:peer volume:0 replication:VerifyS peer-disk:UpToDate\n",
    ).unwrap();
    overlay_status(&mut snapshot, &plain).unwrap();
    let options = StatusOptions {
        verbose: true,
        statistics: true,
        colour: Colour::On,
        ..StatusOptions::default()
    };
    assert_eq!(status(&snapshot, &options), text);
}

/// Names of the members of an object, in order.
fn members(value: &serde_json::Value) -> String {
    let names = value.as_object().unwrap().keys().map(String::as_str);
    names.collect::<Vec<_>>().join(" ")
}

/// Members and their order: status-and-integration.md §2.14.
#[test]
fn status_in_json() {
    let all = nodes(&fixtures().join("status")).unwrap();
    let snapshot_of = |name: &str| {
        let node = all.iter().find(|n| n.name == name).unwrap();
        with_proc(node).0
    };
    let json = status_json(&snapshot_of("10-sync-proc-details-1/bravo"));
    let r0 = &json[0];
    assert_eq!(
        members(r0),
        "name node-id role suspended suspended-user suspended-no-data suspended-fencing \
         suspended-quorum force-io-failures write-ordering devices connections"
    );
    assert_eq!(
        members(&r0["devices"][0]),
        "volume minor disk-state client quorum size read written al-writes bm-writes \
         upper-pending lower-pending"
    );
    let connection = &r0["connections"][0];
    assert_eq!(
        members(connection),
        "peer-node-id name connection-state congested peer-role peer_devices"
    );
    let peer = &connection["peer_devices"][0];
    assert_eq!(
        members(peer),
        "volume replication-state peer-disk-state peer-client resync-suspended received sent \
         out-of-sync pending unacked has-sync-details has-online-verify-details percent-in-sync \
         rs-total rs-dt-start-ms rs-paused-ms rs-dt0-ms rs-db0-sectors rs-dt1-ms rs-db1-sectors \
         rs-failed rs-same-csum want db0/dt0 [MiB/s] db1/dt1 [MiB/s] estimated-seconds-to-finish \
         db/dt [MiB/s] percent-resync-done"
    );
    // 14496 of 65496 KiB; the text form says 25.0.
    assert_eq!(peer["percent-resync-done"].as_f64(), Some(22.13));
    assert_eq!(peer["rs-total"].as_u64(), Some(130_992));
    assert_eq!(peer["out-of-sync"].as_u64(), Some(51_000));
    assert_eq!(peer["want"].as_f64(), Some(0.29));
    assert_eq!(peer["estimated-seconds-to-finish"].as_u64(), Some(159));

    let verify = status_json(&snapshot_of("32-verify-stop-sector-details/alpha"));
    let peer = &verify[0]["connections"][0]["peer_devices"][0];
    assert_eq!(peer["has-online-verify-details"], true);
    assert_eq!(peer["ov-stop-sector"].as_u64(), Some(65_536));
    assert_eq!(peer["ov-position"].as_u64(), Some(4944));
    assert_eq!(peer["percent-in-sync"].as_f64(), Some(100.0));

    let alone = status_json(&snapshot_of("46-suspended-no-data/alpha"));
    assert_eq!(alone[0]["suspended-no-data"], true);
    assert_eq!(alone[0]["connections"][0]["connection-state"], "Connecting");
    assert_eq!(status_json(&Snapshot::default()), serde_json::json!([]));
}

#[test]
fn show_in_json() {
    let all = nodes(&fixtures().join("status")).unwrap();
    let node = all.iter().find(|n| n.name == "47-multi-volume-resync-after/alpha").unwrap();
    let snapshot = from_show(node.command("drbdsetup show").unwrap()).unwrap();
    let json = show_json(&snapshot, &ShowOptions::default());
    let web = &json[1];
    assert_eq!(members(web), "resource options _this_host connections");
    assert_eq!(web["_this_host"]["volumes"][1]["disk"]["resync-after"], 10);
    assert_eq!(web["connections"][0]["net"]["shared-secret"], "a b\"c");
    assert_eq!(web["connections"][0]["path"]["_this_host"], "ipv4 192.168.7.1:7790");
    // What a promoter of resources reads.
    let json = show_json(&snapshot, &ShowOptions { defaults: true });
    assert_eq!(json[0]["options"]["auto-promote"], false);
    assert_eq!(json[0]["options"]["on-no-data-accessible"], "io-error");
    assert_eq!(json[0]["connections"][0]["net"]["fencing"], "dont-care");
    assert_eq!(json[0]["connections"][0]["net"]["rr-conflict"], "disconnect");
}

#[test]
fn faults_are_loud() {
    let mut snapshot = Snapshot::default();
    snapshot.daemon.faults.push((3, "disk of minor 0: error".into()));
    let text = status(&snapshot, &StatusOptions::default());
    assert_eq!(text, "# FAULT 3 SWITCHED ON: disk of minor 0: error\n");
}
