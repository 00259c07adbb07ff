//! drbdsetup against a daemon that is a thread of the test: requests, texts, exit codes, deadlines.

#![allow(clippy::unwrap_used, reason = "a scene that cannot be set up fails its test")]

mod daemon;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use daemon::{Daemon, Say, texts};
use drbd_admin::{
    Answer, Generations, OptionValue, Reply, Request, Resource, Snapshot, Target, Update, Volume,
    WaitClass,
};
use drbd_types::{Cstate, Dstate, Failure, Refusal, Role};

fn done(reply: Reply) -> Vec<Say> {
    vec![Say::Line(Answer::Done(reply))]
}

/// r0 with volume 0 (Connected, Primary) and volume 1 (Diskless).
fn sample() -> Snapshot {
    let mut first = Volume::new(0, 0);
    first.role = Role::Primary;
    first.peer_role = Role::Secondary;
    first.cstate = Cstate::Connected;
    first.disk = Dstate::UpToDate;
    first.peer_disk = Dstate::UpToDate;
    first.devices = vec!["/dev/null".into()];
    first.generations = Some(Generations { consistent: true, ..Generations::default() });
    let mut second = Volume::new(1, 1);
    second.cstate = Cstate::Connected;
    second.wait_class = WaitClass::Degraded;
    let resource =
        Resource { name: "r0".into(), volumes: vec![first, second], ..Resource::default() };
    let lonely =
        Resource { name: "r1".into(), volumes: vec![Volume::new(0, 7)], ..Resource::default() };
    Snapshot {
        at_us: 1_795_353_488_281_961,
        resources: vec![resource, lonely],
        ..Snapshot::default()
    }
}

/// Answers questions about [`sample`]; everything else is done.
fn sample_script(request: &Request) -> Vec<Say> {
    match request {
        Request::Status { target } => match sample().select(target) {
            Ok(snapshot) => vec![
                Say::Line(Answer::Snapshot(Box::new(snapshot))),
                Say::Line(Answer::Done(Reply::SUCCESS)),
            ],
            Err(reply) => done(reply),
        },
        Request::Watch { target } => {
            let snapshot = sample().select(target).unwrap_or_default();
            vec![Say::Line(Answer::Snapshot(Box::new(snapshot))), Say::Hang]
        }
        _ => done(Reply::SUCCESS),
    }
}

#[test]
fn command_lines_become_requests() {
    let daemon = Daemon::new(sample_script);
    let request = |line: &str| {
        let (code, stdout, stderr) = daemon.run(line);
        assert_eq!((code, stdout.as_str(), stderr.as_str()), (0, "", ""), "{line}");
        let told = daemon.told();
        serde_json::to_string(told.last().unwrap()).unwrap()
    };
    let rows = [
        ("primary 0 --force", r#"{"command":"primary","target":{"minor":0},"force":true}"#),
        ("/dev/drbd3 secondary", r#"{"command":"secondary","target":{"minor":3}}"#),
        ("secondary r0", r#"{"command":"secondary","target":{"resource":"r0"}}"#),
        // Through the device node of a front end.
        ("outdate /dev/null", r#"{"command":"outdate","target":{"minor":0}}"#),
        ("down all", r#"{"command":"down","target":"all"}"#),
        ("new-minor r0 5 2", r#"{"command":"new-minor","resource":"r0","minor":5,"volume":2}"#),
        (
            "attach 0 /dev/null /dev/zero flexible --resync-rate 1M --disk-flushes=no",
            r#"{"command":"attach","minor":0,"disk":"/dev/null","meta_disk":"/dev/zero","meta_index":"flexible","options":{"disk-flushes":false,"resync-rate":1024}}"#,
        ),
        (
            "connect r0 ipv4:10.0.0.1:7789 ipv6:[::2]:7790 --protocol=a --max-buffers=8k --dry-run",
            r#"{"command":"connect","resource":"r0","local":{"family":"ipv4","addr":"10.0.0.1","port":7789},"peer":{"family":"ipv6","addr":"::2","port":7790},"options":{"max-buffers":8192,"protocol":"A"},"discard_my_data":false,"tentative":true}"#,
        ),
        (
            "disk-options r0 --set-defaults --resync-after=-1 --c-fill=24k",
            r#"{"command":"disk-options","target":{"resource":"r0"},"set_defaults":true,"options":{"c-fill-target":48,"resync-after":null}}"#,
        ),
        (
            "resource-options r0 --on-no-data suspend-io",
            r#"{"command":"resource-options","resource":"r0","set_defaults":false,"options":{"on-no-data-accessible":"suspend-io"}}"#,
        ),
        (
            "resize 0 --size=20M --assume-clean",
            r#"{"command":"resize","target":{"minor":0},"size":40960,"assume_peer_has_space":false,"assume_clean":true}"#,
        ),
        ("verify 0 --start=1k", r#"{"command":"verify","target":{"minor":0},"start":2}"#),
        (
            "fault-disk 0 --operation=write --sectors=8+16 --permille=5 --effect=delay --delay=300",
            r#"{"command":"fault-set","fault":{"fault":"disk","minor":0,"operation":"write","sectors":[8,16],"permille":5,"effect":{"delay-ms":300}}}"#,
        ),
        ("fault-clear --id=3", r#"{"command":"fault-clear","id":3}"#),
    ];
    for (line, expected) in rows {
        assert_eq!(request(line), expected, "{line}");
    }
}

#[test]
fn refusals_have_the_originals_texts_and_codes() {
    let daemon = Daemon::new(|request| match request {
        Request::Primary { .. } => done(Reply::refused(Refusal::NoUpToDateDisk)),
        Request::Outdate { .. } => done(Reply::refused(Refusal::LowerThanOutdated)),
        Request::Disconnect { .. } => {
            done(Reply::failed(Failure::InvalidRequest, "unknown connection"))
        }
        Request::Down { .. } => done(Reply::failed(Failure::ResourceUnknown, "unknown resource")),
        Request::Attach { .. } => done(Reply::failed(Failure::DiskConfigured, "")),
        _ => done(Reply { code: 2, ..Reply::default() }),
    });
    let rows = [
        ("primary 0", 17, "0: State change failed: (-2) Need access to UpToDate data\n"),
        (
            "/dev/drbd0 outdate",
            5,
            "/dev/drbd0: State change failed: (-16) Disk state is lower than outdated\n",
        ),
        (
            "disconnect 10.0.0.1:7789 10.0.0.2:7789",
            10,
            "??: Failure: (162) Invalid configuration request\nadditional info from kernel:\n\
             unknown connection\n",
        ),
        (
            "attach 0 /dev/null /dev/null internal",
            10,
            "0: Failure: (124) Device is attached to a disk (use detach first)\n",
        ),
        ("down r9", 0, ""),
        ("secondary 0", 0, ""),
    ];
    for (line, code, stderr) in rows {
        assert_eq!(daemon.run(line), (code, String::new(), stderr.into()), "{line}");
    }
}

#[test]
fn bad_words_are_refused_before_the_daemon_sees_them() {
    let daemon = Daemon::new(sample_script);
    let long = format!("connect r0 10.0.0.1 10.0.0.2 --shared-secret={}", "x".repeat(64));
    let rows = [
        (
            "connect r0 10.0.0.1 10.0.0.2 --protocol=Q",
            20,
            "Option --protocol: invalid argument 'Q'\n",
        ),
        (
            "attach 0 /dev/null /dev/null internal --on-io-error=foo",
            20,
            "Option --on-io-error: invalid argument 'foo'\n",
        ),
        (
            "resource-options r0 --on-no-data-accessible=foo",
            20,
            "Option --on-no-data-accessible: invalid argument 'foo'\n",
        ),
        (
            "attach 0 /dev/nosuch /dev/nosuch internal",
            20,
            "Can not open device '/dev/nosuch': No such file or directory\n",
        ),
        (
            "attach r0 /dev/null /dev/null internal",
            20,
            "Cannot determine minor device number of device 'r0'\n",
        ),
        ("role /dev/nosuch", 20, "Cannot determine minor device number of device '/dev/nosuch'\n"),
        ("new-minor r0 0 65535", 20, "'65535' is not a volume number (0..65534)\n"),
        (
            "connect r0 999.1.2.3:7789 192.168.7.2:7789",
            20,
            "can not resolve the hostname: gethostbyname(999.1.2.3): Unknown host\n",
        ),
        ("primary 0 --force=maybe", 20, "Option --force: invalid argument 'maybe'\n"),
        ("wait-connect 0 --wfc-timeout=-5", 20, "wfc_timeout => -5 out of range [0..300000]\n"),
        (
            long.as_str(),
            10,
            "r0: Failure: (126) UnknownMandatoryTag\nadditional info from kernel:\ninvalid attribute value\n",
        ),
    ];
    for (line, code, stderr) in rows {
        assert_eq!(daemon.run(line), (code, String::new(), stderr.into()), "{line}");
        let only_looked = daemon.told().iter().all(Request::is_read_only);
        assert!(only_looked, "{line}");
    }
}

#[test]
fn views_of_one_moment() {
    let daemon = Daemon::new(sample_script);
    let unknown = "9: Failure: (127) Device minor not allocated\nadditional info from kernel:\nunknown minor\n";
    let rows = [
        ("role 0", 0, "Primary/Secondary\n", ""),
        ("role r0", 0, "Primary/Secondary\nSecondary/Unknown\n", ""),
        ("cstate 0", 0, "Connected\n", ""),
        ("7 dstate", 0, "Unconfigured\n", ""),
        ("dstate 9", 10, "", unknown),
        (
            "state 7",
            0,
            "Unconfigured\n",
            "'drbdsetup ... state' is deprecated, use 'drbdsetup ... role' instead.\n'drbdsetup ... state' is deprecated, use 'drbdsetup ... role' instead.\n",
        ),
        ("status nosuch", 10, "", "nosuch: No such resource\n"),
        ("status nosuch --json", 10, "[]\n", "nosuch: No such resource\n"),
        ("status r1", 0, "r1 role:Secondary\n  disk:Diskless\n\n", ""),
        ("show nosuch", 20, "", "received netlink error reply: No such device\n"),
        ("show 9", 10, "", unknown),
        ("sh-status nosuch", 19, "", ""),
        ("show-gi 7", 1, "", "Device is unconfigured\n"),
        ("get-gi 1", 1, "", "Device has no disk\n"),
        (
            "get-gi 0",
            0,
            "0000000000000000:0000000000000000:0000000000000000:0000000000000000:1:0:0:0:0:0:0\n",
            "",
        ),
        ("udev 0", 0, "DEVICE=drbd0\nSYMLINK_BY_RES=drbd/by-res/r0/0\n", ""),
        ("check-resize 7", 1, "", "Device has no disk\n"),
    ];
    for (line, code, stdout, stderr) in rows {
        assert_eq!(daemon.run(line), (code, stdout.into(), stderr.into()), "{line}");
    }
    let (code, stdout, _) = daemon.run("status --json");
    let json: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((code, json[0]["devices"][0]["disk-state"].as_str()), (0, Some("UpToDate")));
    let (_, proc, _) = daemon.run("proc --compat 8.3");
    assert!(proc.starts_with("version: 8.3.11 (api:88/proto:86-96)\nsrcversion: "), "{proc}");
    let (_, unknown, _) = daemon.run("sh-status 9");
    assert!(unknown.contains("_known=NA # not available"), "{unknown}");
    let (code, usage, _) = daemon.run("status --color=foo");
    assert!(code == 20 && usage.starts_with("\nUSAGE: drbdsetup command device"), "{usage}");
}

#[test]
fn without_a_daemon_it_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("nobody");
    let run = |line: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_drbdsetup"));
        let command = command.args(line.split(' ')).arg("--socket").arg(&socket);
        texts(command.output().unwrap())
    };
    let text = format!(
        "Could not connect to the drbdrs daemon at '{}': No such file or directory\n\
         Make sure that drbdrs is running!\n",
        socket.display()
    );
    for line in ["role 0", "status", "primary 0", "events2", "wait-connect 0", "show-stuck"] {
        assert_eq!(run(line), (20, String::new(), text.clone()), "{line}");
    }
    for line in ["down r0", "secondary 0", "detach 0", "disconnect 10.0.0.1 10.0.0.2"] {
        assert_eq!(run(line), (0, String::new(), String::new()), "{line}");
    }
    // A socket file that a dead daemon left.
    drop(UnixListener::bind(&socket).unwrap());
    assert!(run("role 0").2.contains("Connection refused\nMake sure"));
    assert_eq!(run("down r0").0, 0);
}

#[test]
fn a_deadline_names_what_is_waited_for() {
    let daemon = Daemon::new(|_| {
        let reason = "the peer to agree (r0)".into();
        vec![Say::Line(Answer::Waiting { reason }), Say::Hang]
    });
    let start = Instant::now();
    let (code, _, stderr) = daemon.run("primary 0 --deadline=0.3");
    assert_eq!(stderr, "0: not done within 0.3 s, waiting for the peer to agree (r0)\n");
    assert_eq!(code, 20);
    assert!(start.elapsed() >= Duration::from_millis(300));
    let envelope = daemon.requests.recv().unwrap();
    assert_eq!(envelope.timeout_ms, Some(300));
}

#[test]
fn a_daemon_that_dies_or_talks_nonsense_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("sock");
    let listener = UnixListener::bind(&socket).unwrap();
    std::thread::spawn(move || {
        for (stream, text) in listener.incoming().zip(["", "hello\n", "{\"answer\":\"done\""]) {
            let mut stream = stream.unwrap();
            let mut line = String::new();
            let _ = BufReader::new(&stream).read_line(&mut line);
            let _ = stream.write_all(text.as_bytes());
        }
    });
    for expected in [
        "0: the daemon closed the connection\n",
        "0: the connection to the daemon failed: not understood: ",
        "0: the connection to the daemon failed: the connection ended within a line\n",
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_drbdsetup"));
        let command = command.args(["outdate", "0"]).env("DRBDRS_ADMIN_SOCKET", &socket);
        let (code, _, stderr) = texts(command.output().unwrap());
        assert_eq!(code, 20);
        assert!(stderr.starts_with(expected), "{stderr}");
    }
}

#[test]
fn one_tool_at_a_time_per_minor() {
    let daemon = Daemon::new(sample_script);
    let path = daemon.socket().with_file_name("drbd-147-5");
    let file = std::fs::File::create(&path).unwrap();
    rustix::fs::fcntl_lock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let (code, _, stderr) = daemon.run("primary 5");
    let pid = std::process::id();
    let text = format!("lock on {} currently held by pid:{pid}\n", path.display());
    assert_eq!((code, stderr), (20, text));
    assert!(daemon.told().is_empty());
    // Looking needs no lock, nor does another minor.
    assert_eq!(daemon.run("cstate 5").0, 10);
    assert_eq!(daemon.run("primary 6").0, 0);
    drop(file);
    assert_eq!(daemon.run("primary 5").0, 0);
}

#[test]
fn text_of_the_daemon_is_printed() {
    let daemon = Daemon::new(|_| {
        let text = "r0: waits for its peer.\n".into();
        vec![Say::Line(Answer::Text { text }), Say::Line(Answer::Done(Reply::SUCCESS))]
    });
    assert_eq!(daemon.run("why r0"), (0, "r0: waits for its peer.\n".into(), String::new()));
    assert_eq!(daemon.told(), [Request::Why { target: Target::Resource("r0".into()) }]);
}

#[test]
fn waits_end_by_state_or_time() {
    let daemon = Daemon::new(sample_script);
    assert_eq!(
        daemon.run("wait-connect 0 --wfc-timeout=5 --degr-wfc-timeout=3 --outdated-wfc-timeout=2"),
        (0, String::new(), String::new())
    );
    let (code, stdout, stderr) = daemon.run("wait-sync 0 --wfc-timeout=2");
    assert_eq!((code, stdout.as_str(), stderr.lines().count()), (0, "", 4), "{stderr}");
    // StandAlone: nobody will come, unless told otherwise.
    assert_eq!(daemon.run("wait-connect 7").0, 0);
    let (code, _, stderr) = daemon.run("wait-connect 7 --wait-after-sb --wfc-timeout=1 --degr-wfc-timeout=1 --outdated-wfc-timeout=1");
    assert_eq!(code, 5);
    assert_eq!(
        stderr,
        "\ndrbd7 (r1[0]) is StandAlone, but I'm configured to wait anways (--wait-after-sb)\n"
    );
    assert_eq!(
        daemon.run("wait-connect 9"),
        (20, String::new(), "error determining which timeout to use: minor not available\n".into())
    );
}

#[test]
fn a_wait_sees_the_connection_come() {
    let waiting = |state| {
        let mut volume = Volume::new(0, 4);
        volume.cstate = state;
        Resource { name: "r4".into(), volumes: vec![volume], ..Resource::default() }
    };
    let daemon = Daemon::new(move |request| {
        let snapshot =
            Snapshot { resources: vec![waiting(Cstate::WFConnection)], ..Snapshot::default() };
        let mut says = vec![Say::Line(Answer::Snapshot(Box::new(snapshot)))];
        if matches!(request, Request::Watch { .. }) {
            for state in [Cstate::WFReportParams, Cstate::SyncTarget] {
                let resource = Some(waiting(state));
                let update = Update { at_us: 0, name: "r4".into(), resource };
                says.push(Say::Line(Answer::Update(Box::new(update))));
            }
            says.push(Say::Hang);
        } else {
            says.extend(done(Reply::SUCCESS));
        }
        says
    });
    assert_eq!(daemon.run("wait-connect 4").0, 0);
    let limits = "--wfc-timeout=1 --degr-wfc-timeout=1 --outdated-wfc-timeout=1";
    assert_eq!(daemon.run(&format!("wait-sync 4 {limits}")).0, 5);
}

#[test]
fn events2_now_and_until_the_reader_leaves() {
    let daemon = Daemon::new(|request| {
        let mut says = sample_script(request);
        if matches!(request, Request::Watch { .. }) {
            let update = Update { at_us: 0, name: "r1".into(), resource: None };
            says.insert(1, Say::Line(Answer::Update(Box::new(update))));
            says.insert(2, Say::Line(Answer::Skipped { count: 3 }));
        }
        says
    });
    let (code, stdout, _) = daemon.run("events2 --now r1");
    assert_eq!(code, 0);
    assert_eq!(
        stdout,
        "exists resource name:r1 role:Secondary suspended:no\n\
         exists connection name:r1 peer-node-id:0 connection:StandAlone role:Unknown\n\
         exists device name:r1 volume:0 minor:7 disk:Diskless\n\
         exists peer-device name:r1 peer-node-id:0 volume:0 replication:Off peer-disk:DUnknown resync-suspended:no\n\
         exists -\n"
    );
    assert_eq!(daemon.run("events2 --now nosuch"), (0, "exists -\n".into(), String::new()));
    let mut command = daemon.command("events2 --timestamps nosuch");
    let (_, stamped, _) = texts(command.arg("--now").env("TZ", "UTC-5:30").output().unwrap());
    assert!(stamped.ends_with("+05:30 exists -\n"), "{stamped}");

    let mut child = daemon.command("events2 r1").stdout(Stdio::piped()).spawn().unwrap();
    let mut reader = BufReader::new(child.stdout.take().unwrap());
    let mut last = String::new();
    while last != "- skipped 3\n" {
        last.clear();
        assert!(reader.read_line(&mut last).unwrap() > 0, "ended too early");
    }
    // It waits for the daemon now, and must notice that nobody reads any more.
    drop(reader);
    assert_eq!(child.wait().unwrap().code(), Some(0));

    let (code, stdout, _) = {
        let mut child = daemon.command("events r0").stdout(Stdio::piped()).spawn().unwrap();
        let mut first = vec![0; 10];
        child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
        drop(child.stdout.take());
        (child.wait().unwrap().code(), String::from_utf8(first).unwrap(), ())
    };
    assert_eq!((code, stdout.as_str()), (Some(0), "1795353488"));
}

#[test]
fn a_monitor_polls_through_stdin() {
    let reads = std::sync::atomic::AtomicU64::new(0);
    let daemon = Daemon::new(move |request| {
        let mut snapshot = sample();
        if matches!(request, Request::Status { .. }) {
            let read = reads.fetch_add(2, std::sync::atomic::Ordering::Relaxed) + 2;
            snapshot.resources[1].volumes[0].counters.read = read;
            let snapshot = Answer::Snapshot(Box::new(snapshot));
            return vec![Say::Line(snapshot), Say::Line(Answer::Done(Reply::SUCCESS))];
        }
        vec![Say::Line(Answer::Snapshot(Box::new(snapshot))), Say::Hang]
    });
    let mut command = daemon.command("events2 --full --poll");
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.any(|line| line == "exists -"));
    for read in ["read:1 ", "read:2 "] {
        stdin.write_all(b"n\n").unwrap();
        let line = lines.next().unwrap();
        assert!(line.starts_with("change device name:r1 ") && line.contains(read), "{line}");
    }
    // The end of stdin is no end of the output.
    drop(stdin);
    std::thread::sleep(Duration::from_millis(50));
    assert!(child.try_wait().unwrap().is_none());
    drop(lines);
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

/// Byte by byte what `drbdsetup-84 help CMD` of the original says, for every command.
#[test]
fn help_texts_are_the_originals() {
    let recorded: serde_json::Value =
        serde_json::from_str(include_str!("data/drbdsetup-help.json")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("drbdsetup-84");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_drbdsetup"), &program).unwrap();
    let run = |args: &[&str]| texts(Command::new(&program).args(args).output().unwrap());
    let (code, usage, _) = run(&[]);
    let recorded_usage = recorded["usage"].as_str().unwrap();
    let (list, _) = recorded_usage.split_once("\nTo get more details").unwrap();
    assert!(code == 20 && usage.starts_with(list), "{usage}");
    for (command, texts) in recorded["commands"].as_object().unwrap() {
        let (code, help, _) = run(&["help", command]);
        let (_, xml, _) = run(&["xml-help", command]);
        assert_eq!(code, 0, "{command}");
        // Options of our own stand last.
        let own = [" [--json]", " [--full]", " [--poll]", " [--watch]"]
            .iter()
            .fold(help, |h, o| h.replace(o, ""));
        assert_eq!(own.replace("\n   \n", "\n"), texts["help"].as_str().unwrap());
        let mut plain = xml;
        for option in ["json", "full", "poll", "watch"] {
            let element = format!("\t<option name=\"{option}\" type=\"flag\">\n\t</option>\n");
            plain = plain.replace(&element, "");
        }
        assert_eq!(plain, texts["xml"].as_str().unwrap());
    }
}

#[test]
fn options_survive_the_way_to_the_daemon() {
    let daemon = Daemon::new(sample_script);
    let (code, _, stderr) =
        daemon.run("net-options 10.0.0.1 10.0.0.2 --set-defaults --shared-secret=a\"b --use-rle");
    assert_eq!((code, stderr.as_str()), (0, ""));
    let told = daemon.told();
    let [Request::NetOptions { options, set_defaults: true, .. }] = told.as_slice() else {
        panic!("{told:?}")
    };
    assert_eq!(options.0["shared-secret"], OptionValue::Text("a\"b".into()));
    assert_eq!(options.0["use-rle"], OptionValue::Bool(true));
}
