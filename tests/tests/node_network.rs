//! Two nodes in network namespaces of their own with a cable between them that is cut, flaps and
//! delays. The test makes the namespaces and takes them away again. Needs root.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use drbdrs_tests::load::Load;
use drbdrs_tests::need::{Need, trial};
use drbdrs_tests::nodes::{Pair, Programs};
use drbdrs_workload::ledger::Loss;
use libtest_mimic::{Arguments, Failed, Trial};
use rustix::process::Signal;

const IMPATIENT: &str = "disk { c-plan-ahead 0; resync-rate 100M; c-min-rate 0; }
  net { ping-int 1; ping-timeout 3; timeout 8; ko-count 2; connect-int 1; }";
/// For lines on which an answer takes its time.
const PATIENT: &str = "disk { c-plan-ahead 0; resync-rate 100M; c-min-rate 0; }";
const SETTINGS: &str = "[node]\nhandler-program = \"/bin/true\"\n";

type Body = fn(&Network, &Pair, &mut Load) -> Result<()>;

fn main() {
    let args = Arguments::from_args();
    let tests: [(&str, &[Need], &'static str, Body); 4] = [
        ("a_cable_is_cut_and_mended", &[Need::Root], IMPATIENT, cut),
        ("a_cable_flaps", &[Need::Root], IMPATIENT, flap),
        ("a_slow_line_that_loses_packets", &[Need::Root], PATIENT, slow),
        ("a_cable_is_cut_and_nobody_writes", &[Need::Root], IMPATIENT, idle),
    ];
    let mut trials: Vec<Trial> = tests
        .into_iter()
        .map(|(name, needs, conf, body)| {
            trial(name, needs, move || {
                with_pair(conf, |network, pair, load| body(network, pair, load))
                    .map_err(|e| Failed::from(format!("{e:#}")))
            })
        })
        .collect();
    trials.push(trial("a_peer_dies_behind_a_cut_cable", &[Need::Root], || {
        with_pair(PATIENT, dies).map_err(|e| Failed::from(format!("{e:#}")))
    }));
    libtest_mimic::run(&args, trials).exit();
}

fn ip(words: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(words).output()?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {words:?}: {errors}");
    Ok(())
}

/// Two namespaces and a pair of virtual Ethernet devices, `cable` in both.
struct Network {
    names: [String; 2],
}

impl Network {
    fn new() -> Result<Self> {
        let names = ["alpha", "beta"].map(|name| format!("drbdrs-{}-{name}", std::process::id()));
        let network = Self { names };
        let [alpha, beta] = &network.names;
        ip(&["netns", "add", alpha])?;
        ip(&["netns", "add", beta])?;
        let cable = ["link", "add", "cable", "netns", alpha, "type", "veth"];
        ip(&[&cable[..], &["peer", "name", "cable", "netns", beta]].concat())?;
        for (name, address) in network.names.iter().zip(["10.77.0.1/24", "10.77.0.2/24"]) {
            ip(&["-n", name, "address", "add", address, "dev", "cable"])?;
            ip(&["-n", name, "link", "set", "lo", "up"])?;
            ip(&["-n", name, "link", "set", "cable", "up"])?;
        }
        Ok(network)
    }

    fn cable(&self, how: &str) -> Result<()> {
        ip(&["-n", &self.names[0], "link", "set", "cable", how])
    }

    /// Both directions: packets come late and some are lost. Not every kernel has netem; there the
    /// line is a narrow one, whose queue makes packets late and drops what is too much.
    fn slow(&self) -> Result<()> {
        let netem = ["netem", "delay", "20ms", "10ms", "loss", "1%"];
        let narrow = ["tbf", "rate", "20mbit", "burst", "16kb", "latency", "30ms"];
        for name in &self.names {
            let tc = ["netns", "exec", name, "tc", "qdisc", "add", "dev", "cable", "root"];
            if ip(&[&tc[..], &netem].concat()).is_ok() {
                println!("{name}: netem");
            } else {
                ip(&[&tc[..], &narrow].concat())?;
                println!("{name}: no netem in this kernel, a narrow line");
            }
        }
        Ok(())
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in &self.names {
            // There is none if its making has failed.
            let _ = Command::new("ip").args(["netns", "del", name]).status();
        }
    }
}

fn with_pair(
    conf: &str,
    body: impl FnOnce(&Network, &mut Pair, &mut Load) -> Result<()>,
) -> Result<()> {
    let programs = Programs::build();
    let network = Network::new()?;
    let addresses = ["10.77.0.1:7788", "10.77.0.2:7788"].map(str::to_owned);
    let mut pair = Pair::at(&programs, addresses, 24 << 20, conf)?;
    for (node, name) in pair.nodes.iter_mut().zip(&network.names) {
        node.namespace = Some(name.clone());
    }
    pair.in_sync(SETTINGS)?;
    let mut load = Load::new(&pair, 1)?;
    let result = body(&network, &mut pair, &mut load).and_then(|()| finish(&pair, &mut load));
    result.with_context(|| pair.log_tails())
}

/// Everything acknowledged is on both.
fn finish(pair: &Pair, load: &mut Load) -> Result<()> {
    let [alpha, beta] = &pair.nodes;
    pair.until_in_sync()?;
    load.verify(alpha, Loss::Nothing)?;
    load.until_equal()?;
    alpha.adm(&["secondary", "r0"])?.ok()?;
    beta.adm(&["primary", "r0"])?.ok()?;
    load.verify(beta, Loss::Nothing).map(drop)
}

fn work(time: u64) {
    std::thread::sleep(Duration::from_millis(time));
}

/// Nothing tells a node that its cable is cut: no packet comes any more.
fn cut(network: &Network, pair: &Pair, load: &mut Load) -> Result<()> {
    let [alpha, beta] = &pair.nodes;
    let running = load.begin(alpha, 1)?;
    work(300);
    network.cable("down")?;
    alpha.until("cs:WFConnection")?;
    beta.until("cs:WFConnection")?;
    let before = running.count();
    work(500);
    ensure!(running.count() > before, "nothing was written without the peer");
    network.cable("up")?;
    pair.until_in_sync()?;
    work(200);
    load.end_well(running).map(drop)
}

fn idle(network: &Network, pair: &Pair, _: &mut Load) -> Result<()> {
    network.cable("down")?;
    pair.nodes.iter().try_for_each(|node| node.until("cs:WFConnection"))?;
    network.cable("up")
}

/// Sometimes shorter than anybody notices, sometimes longer.
fn flap(network: &Network, pair: &Pair, load: &mut Load) -> Result<()> {
    let running = load.begin(&pair.nodes[0], 1)?;
    for time in [50, 900, 300, 1500, 100, 700, 20] {
        network.cable("down")?;
        work(time);
        network.cable("up")?;
        work(300);
    }
    pair.until_in_sync()?;
    load.end_well(running).map(drop)
}

fn slow(network: &Network, pair: &Pair, load: &mut Load) -> Result<()> {
    network.slow()?;
    let running = load.begin(&pair.nodes[0], 1)?;
    work(4000);
    let text = pair.nodes[0].proc()?;
    ensure!(text.contains("cs:Connected"), "{text}");
    load.end_well(running).map(drop)
}

/// The connection of a peer that is gone and back looks alive: nobody has heard of its end.
fn dies(network: &Network, pair: &mut Pair, load: &mut Load) -> Result<()> {
    let running = load.begin(&pair.nodes[0], 1)?;
    work(300);
    network.cable("down")?;
    ensure!(pair.nodes[1].stop(Signal::KILL)? == 137, "not killed");
    pair.nodes[1].start(SETTINGS)?;
    pair.nodes[1].adm(&["up", "r0"])?.ok()?;
    let text = pair.nodes[0].proc()?;
    ensure!(text.contains("cs:Connected"), "it was noticed: {text}");
    network.cable("up")?;
    pair.until_in_sync()?;
    work(200);
    load.end_well(running).map(drop)
}
