//! drbdadm, its drbdsetup and a daemon that is a thread of the test: commands arrive, and what runs
//! is understood.

#![allow(clippy::unwrap_used, reason = "a scene that cannot be set up fails its test")]

mod daemon;

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use daemon::{Daemon, Say, texts};
use drbd_admin::{
    Answer, Backing, Connection, OptionSet, OptionValue, Reply, Request, Resource, Section,
    Snapshot, Target, Volume,
};
use drbd_types::{Cstate, Dstate, Failure};

const CONFIG: &str = r#"
global { disable-ip-verification; }
resource "r0" {
    net { protocol A; shared-secret "a \"b"; verify-alg sha1; max-buffers 8k; }
    options { on-no-data-accessible suspend-io; }
    disk { resync-rate 33M; c-fill-target 24k; disk-flushes no; on-io-error pass_on; }
    on alpha {
        address 10.0.0.1:7789;
        volume 0 { device minor 7; disk /dev/null; meta-disk internal; }
        volume 1 { device minor 8; disk /dev/zero; meta-disk /dev/full [1]; }
    }
    on bravo {
        address 10.0.0.2:7789;
        volume 0 { device minor 7; disk /dev/null; meta-disk internal; }
        volume 1 { device minor 8; disk /dev/zero; meta-disk /dev/full [1]; }
    }
}
"#;

/// A node that keeps what it is told, without doing anything.
fn node() -> Daemon {
    let state = Arc::new(Mutex::new(Snapshot::default()));
    Daemon::new(move |request| {
        let mut state = state.lock().unwrap();
        match answer(&mut state, request) {
            Ok(None) => vec![Say::Line(Answer::Done(Reply::SUCCESS))],
            Ok(Some(snapshot)) => vec![
                Say::Line(Answer::Snapshot(Box::new(snapshot))),
                Say::Line(Answer::Done(Reply::SUCCESS)),
            ],
            Err(reply) => vec![Say::Line(Answer::Done(reply))],
        }
    })
}

fn answer(state: &mut Snapshot, request: &Request) -> Result<Option<Snapshot>, Reply> {
    fn volumes(state: &mut Snapshot) -> impl Iterator<Item = &mut Volume> {
        state.resources.iter_mut().flat_map(|r| &mut r.volumes)
    }
    let unknown = || Reply::failed(Failure::ResourceUnknown, "unknown resource");
    match request {
        Request::Status { target } => return state.clone().select(target).map(Some),
        Request::NewResource { resource, options } => state.resources.push(Resource {
            name: resource.clone(),
            options: options.clone(),
            ..Resource::default()
        }),
        Request::NewMinor { resource, minor, volume } => {
            let found = state.resources.iter_mut().find(|r| r.name == *resource);
            found.ok_or_else(unknown)?.volumes.push(Volume::new(*volume, *minor));
        }
        Request::Attach { minor, disk, meta_disk, meta_index, options } => {
            let volume = volumes(state).find(|v| v.minor == *minor).ok_or_else(unknown)?;
            volume.disk = Dstate::UpToDate;
            volume.backing = Some(Backing {
                disk: disk.clone(),
                meta_disk: meta_disk.clone(),
                meta_index: *meta_index,
                device_uuid: 0,
                options: options.clone(),
            });
        }
        Request::DiskOptions { target: Target::Minor(minor), set_defaults, options } => {
            let volume = volumes(state).find(|v| v.minor == *minor).ok_or_else(unknown)?;
            let backing = volume.backing.as_mut().ok_or_else(unknown)?;
            backing.options = backing.options.changed(Section::Disk, options, *set_defaults);
        }
        Request::Connect { resource, local, peer, options, .. } => {
            let found = state.resources.iter_mut().find(|r| r.name == *resource);
            found.ok_or_else(unknown)?.connection = Some(Connection {
                local: local.clone(),
                peer: peer.clone(),
                peer_name: None,
                options: OptionSet::default().changed(Section::Net, options, false),
                state: Cstate::WFConnection,
                is_congested: false,
                agreed: None,
                ap_in_flight: None,
                rs_in_flight: None,
                reason: None,
            });
        }
        Request::Down { target } => {
            let gone = state.clone().select(target)?;
            state.resources.retain(|r| !gone.resources.contains(r));
        }
        _ => {}
    }
    Ok(None)
}

/// drbdadm as it is called from PATH, where only a drbdmeta is that agrees with everything.
fn drbdadm(daemon: &Daemon, config: &str, args: &[&str]) -> (i32, String, String) {
    texts(command(daemon, config, args).output().unwrap())
}

fn command(daemon: &Daemon, config: &str, args: &[&str]) -> Command {
    let folder = daemon.socket().parent().unwrap().to_owned();
    std::fs::write(folder.join("t.conf"), config).unwrap();
    let meta = folder.join("drbdmeta");
    std::fs::write(&meta, "#!/bin/sh\nexit 0\n").unwrap();
    std::fs::set_permissions(&meta, PermissionsExt::from_mode(0o755)).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_drbdadm"));
    command.arg0("drbdadm").args(["--node-name", "alpha", "-c"]).arg(folder.join("t.conf"));
    command.args(args).env("PATH", &folder).env("DRBDRS_ADMIN_SOCKET", daemon.socket());
    command.stdin(Stdio::null());
    command
}

/// Command words of what changed something.
fn changes(daemon: &Daemon) -> Vec<String> {
    let all = daemon.told();
    let changing = all.iter().filter(|r| !r.is_read_only());
    let name = |r| serde_json::to_value(r).unwrap()["command"].as_str().unwrap().to_owned();
    changing.map(name).collect()
}

#[test]
fn up_status_adjust_down() {
    let daemon = node();
    let run = |args: &[&str]| drbdadm(&daemon, CONFIG, args);
    let (code, stdout, stderr) = run(&["up", "r0"]);
    assert_eq!((code, stdout.as_str(), stderr.as_str()), (0, "", ""));
    assert_eq!(
        changes(&daemon),
        ["new-resource", "new-minor", "new-minor", "attach", "attach", "connect"]
    );
    let (code, stdout, _) = run(&["status", "r0"]);
    assert_eq!(code, 0);
    assert_eq!(
        stdout,
        "r0 role:Secondary\n  volume:0 disk:UpToDate\n  volume:1 disk:UpToDate\n  \
         peer connection:Connecting\n\n"
    );
    assert_eq!(run(&["role", "r0"]).1, "Secondary/Unknown\nSecondary/Unknown\n");

    // What runs is what the file says: nothing to do.
    let (code, stdout, stderr) = run(&["-d", "-vvv", "adjust", "r0"]);
    assert_eq!((code, stdout.as_str(), stderr.as_str()), (0, "", ""));
    // Another file: exactly the difference.
    let other = CONFIG.replace("33M", "20M");
    let (code, _, stderr) = drbdadm(&daemon, &other, &["adjust", "r0"]);
    assert_eq!((code, stderr.as_str()), (0, ""));
    assert_eq!(changes(&daemon), ["disk-options", "disk-options"]);
    assert_eq!(drbdadm(&daemon, &other, &["-d", "adjust", "r0"]).1, "");

    assert_eq!(run(&["down", "r0"]), (0, String::new(), String::new()));
    assert_eq!(changes(&daemon), ["down"]);
    let (code, _, stderr) = run(&["status", "r0"]);
    assert_eq!(code, 10);
    assert_eq!(
        stderr,
        "r0: No such resource\nCommand 'drbdsetup-84 status r0' terminated with exit code 10\n"
    );
}

#[test]
fn status_as_json_and_watched() {
    let daemon = node();
    assert_eq!(drbdadm(&daemon, CONFIG, &["up", "r0"]).0, 0);
    for args in [["status", "--json"].as_slice(), &["status", "r0", "--json"]] {
        let (code, stdout, stderr) = drbdadm(&daemon, CONFIG, args);
        let json: serde_json::Value = serde_json::from_str(&stdout).unwrap();
        assert_eq!((code, stderr.as_str(), json[0]["name"].as_str()), (0, "", Some("r0")));
    }
    let (code, _, stderr) = drbdadm(&daemon, CONFIG, &["status", "r0", "r1", "--json"]);
    assert_eq!(
        (code, stderr.as_str()),
        (1, "status --json and --watch take one resource, or all\n")
    );
    let (code, _, stderr) = drbdadm(&daemon, CONFIG, &["role", "r0", "--json"]);
    assert!(code == 1 && stderr.contains("unrecognized option '--json'"), "{stderr}");

    let mut watch = command(&daemon, CONFIG, &["status", "--watch"]);
    let mut child = watch.stdout(Stdio::piped()).spawn().unwrap();
    let mut reader = BufReader::new(child.stdout.take().unwrap());
    let mut frames = 0;
    while frames < 2 {
        let mut line = String::new();
        assert!(reader.read_line(&mut line).unwrap() > 0, "ended too early");
        frames += usize::from(line == "r0 role:Secondary\n");
    }
    drop(reader);
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn values_arrive_typed() {
    let daemon = node();
    assert_eq!(drbdadm(&daemon, CONFIG, &["up", "r0"]).0, 0);
    let (mut disk, mut net) = (None, None);
    for request in daemon.told() {
        match request {
            Request::Attach { minor: 8, meta_index, options, .. } => {
                assert_eq!(meta_index, drbd_admin::MetaIndex::Index(1));
                disk = Some(options);
            }
            Request::Connect { options, .. } => net = Some(options),
            _ => {}
        }
    }
    let (disk, net) = (disk.unwrap(), net.unwrap());
    assert_eq!(disk.check(Section::Disk), Ok(()));
    assert_eq!(disk.number(Section::Disk, "resync-rate"), 33 * 1024);
    assert_eq!(disk.number(Section::Disk, "c-fill-target"), 48);
    assert_eq!(net.number(Section::Net, "max-buffers"), 8192);
    assert_eq!(net.0["shared-secret"], OptionValue::Text("a \"b".into()));
}

#[test]
fn an_option_that_means_nothing_any_more_is_in_nobodys_way() {
    let daemon = node();
    let config = CONFIG.replace("disk { resync", "disk { use-bmbv; resync");
    let (code, stdout, _) = drbdadm(&daemon, &config, &["-d", "attach", "r0/0"]);
    assert!(code == 0 && stdout.ends_with(" --use-bmbv=yes\n"), "as the original: {stdout}");
    assert_eq!(drbdadm(&daemon, &config, &["up", "r0"]), (0, String::new(), String::new()));
    let adjust = drbdadm(&daemon, &config, &["-d", "-vvv", "adjust", "r0"]);
    assert_eq!(adjust, (0, String::new(), String::new()), "nothing to do");
    changes(&daemon);
    let other = config.replace("33M", "20M");
    let (code, _, stderr) = drbdadm(&daemon, &other, &["adjust", "r0"]);
    assert_eq!((code, stderr.as_str()), (0, ""));
    assert_eq!(changes(&daemon), ["disk-options", "disk-options"]);
}

#[test]
fn without_a_daemon_the_backend_says_so() {
    let daemon = node();
    std::fs::remove_file(daemon.socket()).unwrap();
    let (code, stdout, stderr) = drbdadm(&daemon, CONFIG, &["cstate", "r0/0"]);
    assert_eq!((code, stdout.as_str()), (20, ""));
    assert!(stderr.starts_with("Could not connect to the drbdrs daemon at '"), "{stderr}");
    assert!(
        stderr.ends_with("Command 'drbdsetup-84 cstate 7' terminated with exit code 20\n"),
        "{stderr}"
    );
    assert_eq!(drbdadm(&daemon, CONFIG, &["down", "r0"]).0, 0);
}
