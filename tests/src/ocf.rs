//! Drives an OCF agent without a cluster, along the recorded trace of the original agent with the
//! kernel's DRBD.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};

use crate::machine::{Config, Lab, Machine};
use crate::nodes::Programs;

/// Programs of Pacemaker: a score that is kept in a file, a cluster that runs nothing.
const CRM_MASTER: &str = "#!/bin/sh
while [ $# -gt 0 ]; do
    case $1 in
        -v) echo $2 >/run/score; shift ;;
        -D) rm -f /run/score ;;
        -G) cat /run/score 2>/dev/null || exit 6 ;;
    esac
    shift
done
";
const NOTHING: &str = "#!/bin/sh\n";
/// In front of the programs: they leave their words.
const RECORDER: &str = "#!/bin/sh
echo \"${0##*/} $*\" >>/run/calls
exec /usr/sbin/${0##*/} \"$@\"
";
/// The device node comes and goes with the minor, as with udev.
const RECORDER_OF_DRBDADM: &str = "#!/bin/sh
echo \"drbdadm $*\" >>/run/calls
/usr/sbin/drbdadm \"$@\"
result=$?
if /usr/sbin/drbdsetup role 0 >/dev/null 2>&1; then
    [ -e /dev/drbd0 ] || mknod /dev/drbd0 b 147 0
else
    rm -f /dev/drbd0
fi
exit $result
";

const CONFIGURATION: &str = "global { usage-count no; }
resource r0 {
  net { ping-int 1; ping-timeout 10; connect-int 1; }
  disk { c-plan-ahead 0; resync-rate 200M; }
  volume 0 { device minor 0; disk /srv/disk0; meta-disk internal; }
  on alpha { address 10.7.0.1:7788; }
  on bravo { address 10.7.0.2:7788; }
}
";

/// One action of the trace.
#[derive(Debug)]
struct Step {
    action: String,
    exit: i32,
    score: String,
    calls: Vec<String>,
}

fn trace() -> Result<Vec<Step>> {
    let path = crate::fixtures().join("status/ocf-agent-trace.txt");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let mut steps: Vec<Step> = Vec::new();
    for line in text.lines() {
        if let Some(head) = line.strip_prefix("=== ") {
            let (action, rest) = head.split_once(" exit ").context("a head line")?;
            let (exit, score) = rest.split_once(" score ").context("a score")?;
            steps.push(Step {
                action: action.to_owned(),
                exit: exit.parse()?,
                score: score.to_owned(),
                calls: Vec::new(),
            });
        } else if let Some(call) = line.strip_prefix("  | ")
            && let Some(step) = steps.last_mut()
        {
            step.calls.push(call.to_owned());
        }
    }
    Ok(steps)
}

/// What has to happen before a step, where it is not the step before it.
struct Situation {
    /// Number of the step in the trace.
    step: usize,
    /// Words of the environment.
    env: &'static [(&'static str, &'static str)],
    before: fn(&Lab, &Pair) -> Result<()>,
}

struct Pair {
    alpha: Machine,
    bravo: Machine,
}

fn nothing(_: &Lab, _: &Pair) -> Result<()> {
    Ok(())
}

fn peer_comes(_: &Lab, pair: &Pair) -> Result<()> {
    pair.bravo.run("drbdadm", &["up", "r0"])?.ok()?;
    pair.alpha.until("drbdadm cstate r0 | grep -q ^Connected")?;
    pair.bravo.run("drbdadm", &["new-current-uuid", "--clear-bitmap", "r0/0"])?.ok()?;
    in_sync(pair)
}

fn in_sync(pair: &Pair) -> Result<()> {
    pair.alpha.until("drbdadm dstate r0 | grep -q UpToDate/UpToDate")
}

fn link_down(lab: &Lab, pair: &Pair) -> Result<()> {
    lab.plug(&pair.bravo, false)?;
    pair.alpha.until("drbdadm dstate r0 | grep -q UpToDate/DUnknown")
}

fn link_up(lab: &Lab, pair: &Pair) -> Result<()> {
    lab.plug(&pair.bravo, true)?;
    in_sync(pair)
}

fn peer_promoted(_: &Lab, pair: &Pair) -> Result<()> {
    pair.bravo.run("drbdadm", &["primary", "r0"])?.ok().map(drop)
}

const POST_START: &[(&str, &str)] = &[
    ("CRM_meta_notify_type", "post"),
    ("CRM_meta_notify_operation", "start"),
    ("CRM_meta_notify_start_uname", "alpha bravo"),
];
const PRE_PROMOTE: &[(&str, &str)] = &[
    ("CRM_meta_notify_type", "pre"),
    ("CRM_meta_notify_operation", "promote"),
    ("CRM_meta_notify_promote_uname", "alpha"),
];
const POST_PROMOTE: &[(&str, &str)] = &[
    ("CRM_meta_notify_type", "post"),
    ("CRM_meta_notify_operation", "promote"),
    ("CRM_meta_notify_promote_uname", "alpha"),
];
const NAMES_PEER: &[(&str, &str)] = &[("CRM_meta_notify_start_uname", "alpha bravo")];
const UNEXPECTED: &[(&str, &str)] = &[
    ("remove_master_score_if_peer_primary", "unexpected"),
    ("fail_promote_early_if_peer_primary", "true"),
];
const CONNECT_LATE: &[(&str, &str)] = &[("connect_only_after_promote", "true")];

const SITUATIONS: &[Situation] = &[
    Situation { step: 2, env: &[("CRM_meta_interval", "0")], before: nothing },
    Situation { step: 3, env: NAMES_PEER, before: nothing },
    Situation { step: 7, env: &[], before: peer_comes },
    Situation { step: 8, env: POST_START, before: nothing },
    Situation { step: 9, env: PRE_PROMOTE, before: nothing },
    Situation { step: 12, env: POST_PROMOTE, before: nothing },
    Situation { step: 16, env: &[], before: link_down },
    Situation { step: 18, env: &[], before: link_up },
    Situation { step: 21, env: UNEXPECTED, before: peer_promoted },
    Situation { step: 24, env: &[("CRM_meta_interval", "0")], before: nothing },
    Situation { step: 25, env: CONNECT_LATE, before: nothing },
    Situation { step: 27, env: &[("CRM_meta_interval", "0")], before: nothing },
];

/// Runs the agent with the steps of the trace; exit codes and scores have to be the same, and the
/// calls too if wanted.
///
/// # Errors
/// They are not.
pub fn follow_trace(agent: &Path, compares_calls: bool) -> Result<()> {
    let lab = Lab::new()?;
    let pair = boot(&lab, agent)?;
    let mut table = String::from("\n| action | exit, score with the kernel | with drbdrs |\n");
    let mut wrong = Vec::new();
    for (number, step) in trace()?.iter().enumerate() {
        let situation = SITUATIONS.iter().find(|s| s.step == number);
        if let Some(situation) = situation {
            (situation.before)(&lab, &pair)?;
        }
        let did = act(&pair.alpha, agent, step, situation.map_or(&[][..], |s| s.env))?;
        table += &format!(
            "| {} | {} {} | {} {} |\n",
            step.action, step.exit, step.score, did.exit, did.score
        );
        if (did.exit, &did.score) != (step.exit, &step.score) {
            wrong.push(format!("step {number}, {}: {did:#?}", step.action));
        }
        if compares_calls && did.calls != step.calls {
            wrong.push(format!("step {number}, {}:\n{did:#?}\n{step:#?}", step.action));
        }
    }
    println!("{table}");
    ensure!(wrong.is_empty(), "{}\n{table}\n{}", wrong.join("\n"), pair.alpha.tails(&["/srv/log"]));
    Ok(())
}

fn boot(lab: &Lab, agent: &Path) -> Result<Pair> {
    let [alpha, bravo] = [("alpha", 1), ("bravo", 2)].map(|(name, number)| {
        let machine = lab.boot(&Config {
            name: name.into(),
            address: format!("10.7.0.{number}/24"),
            programs: Programs::build().paths(),
            proc_drbd: true,
            ..Config::default()
        })?;
        machine.write("/etc/drbd.conf", CONFIGURATION)?;
        machine.sh("truncate -s 24M /srv/disk0")?.ok()?;
        machine.start_daemon()?;
        machine.run("drbdadm", &["create-md", "--force", "r0"])?.ok()?;
        Ok::<_, anyhow::Error>(machine)
    });
    let (alpha, bravo) = (alpha?, bravo?);
    for program in ["crm_resource", "crm_attribute", "attrd_updater", "crm_node"] {
        alpha.write(&format!("/srv/pacemaker/{program}"), NOTHING)?;
    }
    alpha.write("/srv/pacemaker/crm_master", CRM_MASTER)?;
    alpha.write("/srv/pacemaker/crm_node", "#!/bin/sh\nuname -n\n")?;
    let programs = ["drbdadm", "drbdsetup", "crm_master", "crm_resource"];
    for program in programs {
        let recorder = match program {
            "drbdadm" => RECORDER_OF_DRBDADM.to_owned(),
            "drbdsetup" => RECORDER.to_owned(),
            _ => RECORDER.replace("/usr/sbin", "/srv/pacemaker"),
        };
        alpha.write(&format!("/srv/recorders/{program}"), &recorder)?;
    }
    if !agent.starts_with("/usr") {
        alpha.write("/srv/agent", &std::fs::read_to_string(agent)?)?;
    }
    Ok(Pair { alpha, bravo })
}

#[derive(Debug)]
struct Did {
    exit: i32,
    score: String,
    calls: Vec<String>,
    #[expect(dead_code, reason = "shown when a step fails")]
    said: String,
}

fn act(machine: &Machine, agent: &Path, step: &Step, env: &[(&str, &str)]) -> Result<Did> {
    let (action, interval) = match step.action.split_once(" interval ") {
        Some((action, interval)) => (action, interval),
        None => (step.action.as_str(), "10000"),
    };
    let program = if agent.starts_with("/usr") { agent } else { Path::new("/srv/agent") };
    let mut words = vec![
        "PATH=/srv/recorders:/srv/pacemaker:/usr/sbin:/usr/bin:/sbin:/bin".to_owned(),
        "HA_SBIN_DIR=/srv/recorders".to_owned(),
        "OCF_ROOT=/usr/lib/ocf".to_owned(),
        "OCF_RESOURCE_INSTANCE=p_drbd_r0:0".to_owned(),
    ];
    let defaults = [
        ("drbd_resource", "r0"),
        ("crm_feature_set", "3.16.2"),
        ("CRM_meta_clone_max", "2"),
        ("CRM_meta_clone_node_max", "1"),
        ("CRM_meta_master_max", "1"),
        ("CRM_meta_master_node_max", "1"),
        ("CRM_meta_notify", "true"),
        ("CRM_meta_interval", interval),
    ];
    for (name, value) in defaults.iter().chain(env) {
        words.push(format!("OCF_RESKEY_{name}={value}"));
    }
    // A promotion that can not succeed is repeated until the cluster ends it.
    let seconds = if step.exit == 143 { "8" } else { "120" };
    machine.sh("rm -f /run/calls")?.ok()?;
    let mut command = machine.command("env");
    command.args(&words).args(["timeout", "--preserve-status", seconds]).arg(program).arg(action);
    let did = crate::nodes::Did::from(command.output()?);
    let score = machine.sh("cat /run/score 2>/dev/null || echo -")?.ok()?.trim().to_owned();
    let calls = machine.sh("cat /run/calls 2>/dev/null || true")?.ok()?;
    let said = format!("{}{}", did.out, did.err);
    // drbdmeta's question: the old order of the words, or the new one.
    let calls = calls.lines().map(|c| c.replace("drbdsetup dstate 0", "drbdsetup 0 dstate"));
    Ok(Did { exit: did.code, score, calls: calls.collect(), said })
}
