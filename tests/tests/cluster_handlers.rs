//! Handlers end to end, and in bad environments: fence-peer with every exit code and with programs
//! that are missing, hang, die or talk nonsense; outdating over a channel of the cluster; hooks around
//! a resync; our notification of a split brain; our agents without what they need.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use drbdrs_tests::machine::{Config, Lab, Machine};
use drbdrs_tests::need::{Need, trial};
use drbdrs_tests::nodes::{Programs, eventually};
use libtest_mimic::{Arguments, Failed, Trial};

const NOTIFY: &str = include_str!("../../conf/handlers/notify");
const DRBDDISK: &str = include_str!("../../conf/agents/heartbeat/drbddisk");
const OCF: &str = include_str!("../../conf/agents/ocf/drbd");

/// What listens on the cluster's network: tells the exit code of `drbdadm outdate`.
const CHANNEL: &str = "#!/usr/bin/python3
import socket, subprocess
listener = socket.create_server(('', 7000))
while True:
    connection, _ = listener.accept()
    resource = connection.recv(100).decode().strip()
    code = subprocess.run(['drbdadm', 'outdate', resource]).returncode
    connection.sendall(str(code).encode())
    connection.close()
";
/// The handler at its other end.
const FENCE: &str = "#!/usr/bin/python3
import os, socket, sys
try:
    connection = socket.create_connection(('10.7.0.2', 7000), 3)
    connection.settimeout(10)
    connection.sendall(os.environ['DRBD_RESOURCE'].encode())
    code = int(connection.recv(100))
except OSError:
    sys.exit(5)
sys.exit({0: 4, 5: 3, 17: 6, 11: 6}.get(code, 5))
";

type Body = fn() -> Result<()>;

fn main() {
    let args = Arguments::from_args();
    let tests: [(&str, Body); 5] = [
        ("fence_peer_by_exit_code", exit_codes),
        ("fence_peer_in_bad_environments", bad_handlers),
        ("the_peer_is_outdated_over_the_cluster_channel", channel),
        ("hooks_around_a_resync_and_the_news_of_a_split_brain", hooks),
        ("agents_in_bad_environments", bad_agents),
    ];
    let trials: Vec<Trial> = tests
        .into_iter()
        .map(|(name, body)| {
            let run = move || body().map_err(|e| Failed::from(format!("{e:#}")));
            trial(name, &[Need::Root, Need::Program("python3")], run)
        })
        .collect();
    libtest_mimic::run(&args, trials).exit();
}

/// Two machines; replication has addresses of its own, so that it can be cut alone.
struct Two {
    alpha: Machine,
    beta: Machine,
    _lab: Lab,
}

impl Two {
    fn new(fencing: &str, handlers: &str) -> Result<Self> {
        let lab = Lab::new()?;
        let [alpha, beta] = [("alpha", 1), ("beta", 2)].map(|(name, number)| {
            let machine = lab.boot(&Config {
                name: name.into(),
                address: format!("10.7.0.{number}/24"),
                programs: Programs::build().paths(),
                ..Config::default()
            })?;
            let address = format!("10.8.0.{number}/24");
            machine.run("ip", &["addr", "add", &address, "dev", "eth0"])?.ok()?;
            machine.write("/etc/drbd.d/drbdrs.toml", "[node]\nhandler-timeout = 2\n")?;
            machine.write("/srv/notify", NOTIFY)?;
            machine.sh("truncate -s 24M /srv/disk0")?.ok()?;
            Ok::<_, anyhow::Error>(machine)
        });
        let two = Self { alpha: alpha?, beta: beta?, _lab: lab };
        two.configure(fencing, handlers)?;
        for machine in [&two.alpha, &two.beta] {
            machine.start_daemon()?;
            machine.run("drbdadm", &["create-md", "--force", "r0"])?.ok()?;
            machine.run("drbdadm", &["up", "r0"])?.ok()?;
        }
        two.alpha.until("drbdadm cstate r0 | grep -q ^Connected")?;
        two.alpha.run("drbdadm", &["new-current-uuid", "--clear-bitmap", "r0/0"])?.ok()?;
        two.alpha.run("drbdadm", &["primary", "r0"])?.ok()?;
        two.in_sync()?;
        Ok(two)
    }

    fn configure(&self, fencing: &str, handlers: &str) -> Result<()> {
        let text = format!(
            "global {{ usage-count no; }}\n\
             resource r0 {{\n\
               handlers {{ {handlers} }}\n\
               net {{ ping-int 1; ping-timeout 5; timeout 8; connect-int 1; }}\n\
               disk {{ fencing {fencing}; c-plan-ahead 0; resync-rate 100M; }}\n\
               volume 0 {{ device minor 0; disk /srv/disk0; meta-disk internal; }}\n\
               on alpha {{ address 10.8.0.1:7788; }}\n\
               on beta {{ address 10.8.0.2:7788; }}\n\
             }}\n"
        );
        self.alpha.write("/etc/drbd.conf", &text)?;
        self.beta.write("/etc/drbd.conf", &text)
    }

    fn in_sync(&self) -> Result<()> {
        for machine in [&self.alpha, &self.beta] {
            machine.until("drbdadm dstate r0 | grep -q UpToDate/UpToDate")?;
        }
        Ok(())
    }

    fn cut(&self) -> Result<()> {
        self.alpha.sh("ip route add blackhole 10.8.0.2/32")?.ok()?;
        self.beta.sh("ip route add blackhole 10.8.0.1/32")?.ok().map(drop)
    }

    fn mend(&self) -> Result<()> {
        self.alpha.sh("ip route del blackhole 10.8.0.2/32")?.ok()?;
        self.beta.sh("ip route del blackhole 10.8.0.1/32")?.ok().map(drop)
    }

    /// Waits until the status line of alpha contains all of these.
    fn until(&self, words: &[&str]) -> Result<()> {
        eventually(|| {
            let text = self.alpha.sh("cat /run/drbd/proc-drbd")?.ok()?;
            let is_so = words.iter().all(|word| text.contains(word));
            Ok(if is_so { Ok(()) } else { Err(text) })
        })
        .with_context(|| format!("{words:?}\n{}", self.alpha.tails(&["/srv/log"])))
    }
}

/// The flag `s` is frozen I/O.
fn exit_codes() -> Result<()> {
    for (code, words) in [
        (3, ["ds:UpToDate/Inconsistent", " r-----"]),
        (4, ["ds:UpToDate/Outdated", " r-----"]),
        (5, ["ds:UpToDate/Outdated", " r-----"]),
        (7, ["ds:UpToDate/Outdated", " r-----"]),
        (1, ["ds:UpToDate/DUnknown", " s-----"]),
        (0, ["ds:UpToDate/DUnknown", " s-----"]),
        (77, ["ds:UpToDate/DUnknown", " s-----"]),
    ] {
        let handlers =
            format!("fence-peer \"exit {code}\"; unfence-peer \"echo $DRBD_PEER >/srv/unfenced\";");
        let two = Two::new("resource-and-stonith", &handlers)?;
        two.cut()?;
        two.until(&words).with_context(|| format!("exit code {code}"))?;
        if code != 4 {
            continue;
        }
        two.mend()?;
        two.in_sync()?;
        two.alpha.until("grep -q beta /srv/unfenced")?;
    }
    // A peer that is Primary: we are the ones who have to give up.
    let two = Two::new("resource-only", "fence-peer \"exit 6\";")?;
    two.alpha.run("drbdadm", &["secondary", "r0"])?.ok()?;
    two.cut()?;
    two.until(&["cs:WFConnection"])?;
    let did = two.alpha.run("drbdadm", &["primary", "r0"])?;
    ensure!(did.code == 17, "{did:?}");
    two.until(&["ro:Secondary/Unknown", "ds:Outdated/DUnknown"])
}

/// Whatever the program does, the daemon goes on, I/O stays frozen, and the commands answer.
fn bad_handlers() -> Result<()> {
    for (name, handler) in [
        ("missing", "/nonexistent/fence"),
        ("hanging", "sleep 1000"),
        ("killed", "kill -KILL $$"),
        ("garbage", "head -c 3000000 /dev/urandom; head -c 3000000 /dev/urandom >&2; exit 99"),
    ] {
        let two = Two::new("resource-and-stonith", &format!("fence-peer \"{handler}\";"))?;
        two.cut()?;
        two.until(&["cs:WFConnection", " s-----"]).context(name)?;
        two.alpha.until("grep -q 'fence-peer helper broken' /srv/log").context(name)?;
        let start = Instant::now();
        two.alpha.run("drbdsetup", &["status", "--verbose", "r0"])?.ok()?;
        ensure!(start.elapsed() < Duration::from_secs(10), "{name}: the status waits");
        ensure!(two.alpha.sh("pidof sleep")?.code != 0, "{name}: the handler is still there");
        // The administrator knows better.
        two.alpha.run("drbdadm", &["resume-io", "r0"])?.ok()?;
        two.until(&[" r-----"]).context(name)?;
        two.mend()?;
        two.in_sync().context(name)?;
    }
    Ok(())
}

fn channel() -> Result<()> {
    let two = Two::new("resource-only", "fence-peer /srv/fence;")?;
    two.alpha.write("/srv/fence", FENCE)?;
    two.beta.write("/srv/channel", CHANNEL)?;
    two.beta.sh("setsid /srv/channel >/srv/channel.log 2>&1 </dev/null &")?.ok()?;
    two.beta.until("ss -ltn 2>/dev/null | grep -q :7000 || grep -q :1B58 /proc/net/tcp*")?;
    two.cut()?;
    two.until(&["ds:UpToDate/Outdated"])?;
    two.beta.until("drbdadm dstate r0 | grep -q ^Outdated/")?;
    let did = two.beta.run("drbdadm", &["primary", "r0"])?;
    ensure!(did.code == 17, "an outdated node became Primary: {did:?}");
    two.mend()?;
    two.in_sync()
}

fn hooks() -> Result<()> {
    let handlers = "before-resync-target \"echo before $DRBD_MINOR $DRBD_LL_DISK >>/srv/hooks\"; \
         after-resync-target \"echo after $DRBD_RESOURCE/$DRBD_VOLUME >>/srv/hooks\"; \
         initial-split-brain \"/srv/notify initial-split-brain log\"; \
         split-brain \"/srv/notify split-brain command /srv/page mail root log\";";
    let two = Two::new("dont-care", handlers)?;
    for machine in [&two.alpha, &two.beta] {
        machine.write("/srv/page", "#!/bin/sh\n{ echo $1; cat; } >/srv/paged\n")?;
        machine.write("/usr/local/bin/mail", "#!/bin/sh\n{ echo \"$@\"; cat; } >/srv/mailed\n")?;
        machine.sh("ln -sf /usr/local/bin/mail /usr/bin/mail")?.ok()?;
    }
    two.alpha.run("drbdadm", &["invalidate-remote", "r0"])?.ok()?;
    two.beta.until("grep -q '^after r0/0' /srv/hooks")?;
    let text = two.beta.sh("cat /srv/hooks")?.ok()?;
    ensure!(text == "before 0 /srv/disk0\nafter r0/0\n", "{text}");
    two.in_sync()?;
    two.cut()?;
    two.until(&["cs:WFConnection"])?;
    two.beta.until("drbdadm cstate r0 | grep -q WFConnection")?;
    two.beta.run("drbdadm", &["primary", "--force", "r0"])?.ok()?;
    two.beta.run("drbdadm", &["new-current-uuid", "r0/0"])?;
    two.alpha.run("drbdadm", &["new-current-uuid", "r0/0"])?;
    two.mend()?;
    two.alpha.until("grep -q split-brain /srv/paged && grep -q discard-my-data /srv/mailed")?;
    let mail = two.alpha.sh("cat /srv/mailed")?.ok()?;
    ensure!(mail.contains("DRBD: split-brain on alpha: r0/0 root"), "{mail}");
    ensure!(mail.contains("drbdadm connect --discard-my-data r0"), "{mail}");
    two.alpha.until("grep -q 'handler: DRBD: initial-split-brain on alpha: r0/0' /srv/log")
}

fn bad_agents() -> Result<()> {
    let two = Two::new("dont-care", "")?;
    let alpha = &two.alpha;
    alpha.write("/srv/drbddisk", DRBDDISK)?;
    alpha.write("/srv/ocf", OCF)?;
    let meta = "OCF_RESKEY_drbd_resource=r0 OCF_RESKEY_CRM_meta_clone_max=2 \
                OCF_RESKEY_CRM_meta_notify=true OCF_RESKEY_CRM_meta_interval=10000";
    let cases: [(&str, String, i32); 12] = [
        ("no drbdadm", "DRBDADM=/nonexistent; status".into(), 4),
        ("drbdadm says nonsense", "DRBDADM=/srv/nonsense; status".into(), 4),
        ("drbdadm dies", "DRBDADM=/srv/dies; status".into(), 4),
        ("drbdadm can not promote", "DRBDADM=/srv/dies; start".into(), 1),
        ("no resource name", "OCF_RESKEY_drbd_resource= monitor".into(), 6),
        (
            "a name that the shell would run",
            "OCF_RESKEY_drbd_resource='r0;reboot' monitor".into(),
            6,
        ),
        ("no configuration", "OCF_RESKEY_drbdconf=/nonexistent monitor".into(), 5),
        (
            "no configuration, probe",
            "OCF_RESKEY_drbdconf=/nonexistent OCF_RESKEY_CRM_meta_interval=0 monitor".into(),
            7,
        ),
        ("unknown resource", "OCF_RESKEY_drbd_resource=nosuch monitor".into(), 5),
        ("notifications off, start", "OCF_RESKEY_CRM_meta_notify=false start".into(), 6),
        ("two masters without permission", "OCF_RESKEY_CRM_meta_master_max=2 start".into(), 6),
        ("a wrong action", "dance".into(), 3),
    ];
    alpha.write("/srv/nonsense", "#!/bin/sh\nhead -c 100000 /dev/urandom\necho '* ; reboot'\n")?;
    alpha.write("/srv/dies", "#!/bin/sh\nkill -KILL $$\n")?;
    for (name, words, expected) in &cases {
        let script = match words.split_once("; ") {
            Some((setting, action)) => {
                format!("echo '{setting}' >/etc/default/drbd; /srv/drbddisk r0 {action}")
            }
            None => format!("env {meta} sh -c '{}'", ocf_words(words)),
        };
        let did = alpha.sh(&script)?;
        ensure!(did.code == *expected, "{name}: {script}: {did:?}");
    }
    daemon_stopped(alpha, meta)
}

fn ocf_words(words: &str) -> String {
    let (env, action) = words.rsplit_once(' ').unwrap_or(("", words));
    format!("{} /srv/ocf {action}", env.replace('\'', "\""))
}

/// A daemon that does not answer is not one that is gone.
fn daemon_stopped(alpha: &Machine, meta: &str) -> Result<()> {
    let monitor = format!("env {meta} timeout 60 /srv/ocf monitor");
    ensure!(alpha.sh(&monitor)?.code == 8, "Primary");
    alpha.write("/usr/local/sbin/drbdsetup", "#!/bin/sh\nhead -c 9999 /dev/urandom\nexit 20\n")?;
    ensure!(alpha.sh(&monitor)?.code == 1, "nonsense from drbdsetup is taken for an answer");
    alpha.sh("rm /usr/local/sbin/drbdsetup; kill -KILL $(pidof drbdrs)")?.ok()?;
    ensure!(alpha.sh(&monitor)?.code == 7, "no daemon");
    let stop = format!("env {meta} timeout 60 /srv/ocf stop");
    let did = alpha.sh(&stop)?;
    ensure!(did.code == 0, "{did:?}");
    Ok(())
}
