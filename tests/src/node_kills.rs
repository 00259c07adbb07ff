//! A pair whose daemons are killed again and again at random points under the verifying workload,
//! restarted or failed over, and judged.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use drbdrs_workload::ledger::Loss;
use drbdrs_workload::run::{Report, Running};
use rustix::process::Signal;

use crate::load::Load;
use crate::nodes::{Pair, Programs, eventually};

/// What happens in a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    /// The Primary is killed, the other node takes over and goes on alone; the old one comes back.
    FailOver,
    /// The Primary is killed and comes back as Primary.
    PrimaryComesBack,
    /// The Secondary is killed and comes back while writes go on.
    SecondaryComesBack,
    /// The same, but it is killed once more soon after it came back.
    SecondaryDiesTwice,
    /// The Secondary is killed and comes back, and the Primary is killed soon after that.
    PrimaryDiesInResync,
    /// Both are killed, in any order.
    BothDie,
}

const EVENTS: [Event; 6] = [
    Event::FailOver,
    Event::BothDie,
    Event::SecondaryComesBack,
    Event::PrimaryComesBack,
    Event::PrimaryDiesInResync,
    Event::SecondaryDiesTwice,
];

/// A pair and what it has promised.
struct Life {
    pair: Pair,
    load: Load,
    is_async: bool,
    random: u64,
    /// Which node is Primary.
    primary: usize,
    kills: u32,
    writes: u64,
    /// What has happened, in words.
    story: Vec<String>,
}

/// Lets them live until so many daemons were killed; `protocol` is A, B or C. Disks of more than
/// 67 * 4 MiB make the activity log change all the time.
///
/// # Errors
/// An acknowledged write is gone, or the nodes do not find together again.
pub fn live(programs: &Programs, protocol: &str, disk: u64, kills: u32, seed: u64) -> Result<()> {
    let mut life = Life::new(programs, protocol, disk, seed)?;
    let result = life.rounds(kills, seed);
    result.with_context(|| {
        format!(
            "protocol {protocol}, seed {seed}:\n{}\n{}",
            life.story.join("\n"),
            life.pair.log_tails()
        )
    })?;
    println!(
        "protocol {protocol}, seed {seed}: {} daemons killed, {} writes acknowledged, none lost",
        life.kills, life.writes
    );
    Ok(())
}

impl Life {
    fn new(programs: &Programs, protocol: &str, disk: u64, seed: u64) -> Result<Self> {
        let body = format!(
            "  disk {{ c-plan-ahead 0; resync-rate 60M; c-min-rate 0; al-extents 67; }}\n  \
             net {{ protocol {protocol}; verify-alg crc32c; }}"
        );
        let mut pair = Pair::new(programs, 1, disk, &body, "")?;
        pair.in_sync("")?;
        let load = Load::new(&pair, seed)?;
        Ok(Self {
            pair,
            load,
            is_async: protocol == "A",
            random: seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1,
            primary: 0,
            kills: 0,
            writes: 0,
            story: Vec::new(),
        })
    }

    fn rounds(&mut self, kills: u32, seed: u64) -> Result<()> {
        let mut at = usize::try_from(seed)? % EVENTS.len();
        while self.kills < kills {
            let event = EVENTS.get(at).copied().context("an event")?;
            at = (at + 1) % EVENTS.len();
            self.say(format!("{event:?}, Primary is {}", self.primary));
            self.round(event)?;
            self.end_round()?;
        }
        Ok(())
    }

    fn say(&mut self, text: String) {
        self.story.push(text);
    }

    fn below(&mut self, end: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % end
    }

    fn pause(&mut self, most: u64) {
        let time = Duration::from_millis(self.below(most));
        self.say(format!("after {time:?}"));
        std::thread::sleep(time);
    }

    fn begin(&mut self) -> Result<Running> {
        self.load.begin(&self.pair.nodes[self.primary], self.random)
    }

    fn finish(&mut self, running: Running) -> Result<Report> {
        let report = self.load.end(running)?;
        self.writes += report.writes;
        self.say(format!("{} writes, {} clients lost", report.writes, report.lost));
        ensure!(report.errors == 0, "{} requests failed", report.errors);
        Ok(report)
    }

    fn verify(&mut self, node: usize, loss: Loss) -> Result<()> {
        let verdict = self.load.verify(&self.pair.nodes[node], loss)?;
        self.say(format!("node {node}: {} sectors, {} gone", verdict.sectors, verdict.gone));
        Ok(())
    }

    fn kill(&mut self, node: usize) -> Result<()> {
        self.say(format!("node {node} is killed"));
        self.kills += 1;
        ensure!(self.pair.nodes[node].stop(Signal::KILL)? == 137, "it had ended");
        Ok(())
    }

    fn restart(&mut self, node: usize) -> Result<()> {
        self.say(format!("node {node} starts"));
        let node = &mut self.pair.nodes[node];
        node.start("")?;
        node.adm(&["up", "r0"])?.ok().map(drop)
    }

    fn promote(&mut self, node: usize) -> Result<()> {
        self.say(format!("node {node} becomes Primary"));
        self.pair.nodes[node].adm(&["primary", "r0"])?.ok()?;
        self.primary = node;
        Ok(())
    }

    fn round(&mut self, event: Event) -> Result<()> {
        let (old, other) = (self.primary, 1 - self.primary);
        let running = self.begin()?;
        self.pause(700);
        match event {
            Event::FailOver => {
                self.kill(old)?;
                self.finish(running)?;
                self.fail_over(other)?;
                self.restart(old)?;
            }
            Event::PrimaryComesBack => {
                self.kill(old)?;
                self.finish(running)?;
                self.restart(old)?;
                self.pause(1000);
                self.promote(old)?;
                self.verify(old, Loss::Nothing)?;
            }
            Event::SecondaryComesBack | Event::SecondaryDiesTwice => {
                self.kill(other)?;
                self.pause(400);
                self.restart(other)?;
                if event == Event::SecondaryDiesTwice {
                    self.pause(1500);
                    self.kill(other)?;
                    self.pause(300);
                    self.restart(other)?;
                }
                self.pair.until_in_sync()?;
                ensure!(self.finish(running)?.lost == 0, "clients of the Primary were lost");
            }
            Event::PrimaryDiesInResync => {
                self.kill(other)?;
                self.pause(400);
                self.restart(other)?;
                self.pause(1500);
                self.kill(old)?;
                self.finish(running)?;
                self.inconsistent_is_refused(other)?;
                self.restart(old)?;
                self.pause(1000);
                self.promote(old)?;
                self.verify(old, Loss::Nothing)?;
            }
            Event::BothDie => {
                let is_primary_first = self.below(2) == 0;
                let order = if is_primary_first { [old, other] } else { [other, old] };
                self.kill(order[0])?;
                self.pause(30);
                self.kill(order[1])?;
                self.finish(running)?;
                self.restart(other)?;
                self.pause(500);
                self.restart(old)?;
                self.pair.until_in_sync()?;
                let next = usize::from(self.below(2) == 0);
                self.promote(next)?;
                self.verify(next, Loss::Nothing)?;
            }
        }
        self.pair.until_in_sync()
    }

    /// The other node takes over; under protocol A it may lack the newest writes. It goes on alone.
    fn fail_over(&mut self, node: usize) -> Result<()> {
        self.pair.nodes[node].until("cs:WFConnection")?;
        self.promote(node)?;
        self.verify(node, if self.is_async { Loss::Newest } else { Loss::Nothing })?;
        let running = self.begin()?;
        self.pause(400);
        ensure!(self.finish(running)?.lost == 0, "clients of the survivor were lost");
        Ok(())
    }

    /// A node that is in the middle of a resync must not take over.
    fn inconsistent_is_refused(&mut self, node: usize) -> Result<()> {
        let node = &self.pair.nodes[node];
        node.until("cs:WFConnection")?;
        if node.proc()?.contains("ds:Inconsistent/") {
            let did = node.adm(&["primary", "r0"])?;
            ensure!(did.code == 17, "half a copy became Primary: {did:?}");
            self.say("it was Inconsistent".into());
        }
        Ok(())
    }

    /// Everything is as the journal says, on both nodes; sometimes the roles change.
    fn end_round(&mut self) -> Result<()> {
        self.verify(self.primary, Loss::Nothing)?;
        self.load.until_equal()?;
        if self.below(3) == 0 {
            let (old, new) = (self.primary, 1 - self.primary);
            eventually(|| {
                let did = self.pair.nodes[old].adm(&["secondary", "r0"])?;
                Ok(if did.code == 0 { Ok(()) } else { Err(format!("{did:?}")) })
            })?;
            self.promote(new)?;
            self.verify(new, Loss::Nothing)?;
        }
        Ok(())
    }
}
