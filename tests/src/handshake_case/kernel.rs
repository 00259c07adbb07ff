//! The kernel's side of a case: setting a node up, presenting a peer, watching what happens.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use drbd_core::generation::decide::Step;
use drbd_wire::Packet;

use super::generate::offered;
use super::{Brought, Line, ONE, Observed, Presented, RR, Setting, TWO, ZERO};
use crate::guest::Job;
use crate::kernel_node::KernelNode;
use crate::metagen::Random;
use crate::scripted_peer::{Parameters, first_state};

/// How long the kernel may take for anything here.
const PATIENCE: Duration = Duration::from_secs(30);

/// A kernel node, and the stream of its log.
#[derive(Debug)]
pub struct Bench {
    node: KernelNode,
    log: Job,
    /// The beginning of a line that is not complete.
    partial: String,
    /// The command that connects again.
    connect: String,
    is_standalone: bool,
}

impl Bench {
    /// Boots a node with a small disk.
    ///
    /// # Errors
    /// It does not come up.
    pub fn boot() -> Result<Self> {
        let node = KernelNode::boot(4 << 20)?;
        // Handlers do nothing, quickly; the log has to keep up.
        node.guest.ok("printf /bin/true >/sys/module/drbd/parameters/usermode_helper
             dmesg -c >/dev/null; echo on >/proc/sys/kernel/printk_devkmsg")?;
        let log = node.guest.spawn("exec cat /dev/kmsg")?;
        let connect = String::new();
        Ok(Self { node, log, partial: String::new(), connect, is_standalone: false })
    }

    /// Sets the node up; it waits for a connection then.
    ///
    /// # Errors
    /// A tool refuses.
    pub fn prepare(&mut self, setting: &Setting) -> Result<()> {
        let [zero, one, two] = setting.after_sb;
        let yes = |value| if value { "yes" } else { "no" };
        self.node.configure(
            &format!(
                "after-sb-0pri {}; after-sb-1pri {}; after-sb-2pri {}; rr-conflict {}; \
                 always-asbp {}; allow-two-primaries {};",
                ZERO[zero].0,
                ONE[one].0,
                TWO[two].0,
                RR[setting.rr_conflict].0,
                yes(setting.always_asbp),
                yes(setting.two_primaries)
            ),
            "",
        )?;
        let slots = setting.slots.map(|slot| format!("{slot:016X}")).join(":");
        let flags = setting.flags.map(|flag| if flag { "1" } else { "0" }).join(":");
        let promote = if setting.is_primary { "drbdadm primary --force r0" } else { "true" };
        let said = self.node.guest.ok(&format!(
            "drbdadm down r0 2>/dev/null
             meta='drbdmeta --force 0 v08 /dev/vda internal'
             $meta dump-md >/dev/null 2>&1 || $meta create-md >/dev/null 2>&1
             $meta set-gi {slots}:{flags} >/dev/null && drbdadm up r0 && {promote} && \
             drbdadm -d connect r0 | grep connect"
        ))?;
        let connect = said.lines().last().context("no connect command")?.trim();
        self.connect = format!("/lib/drbd/{connect}");
        self.is_standalone = false;
        Ok(())
    }

    /// One case: connects, looks at what the kernel brings in, presents something, and watches.
    ///
    /// # Errors
    /// The handshake does not get as far as the parameters.
    pub fn case(
        &mut self,
        random: &mut Random,
        setting: &Setting,
        present: impl FnOnce(&mut Random, &Setting, &Brought) -> Presented,
    ) -> Result<(Brought, Presented, Observed)> {
        let is_tentative = self.connect_again(random, setting)?;
        self.lines()?;
        let mut peer = self.node.connect()?;
        let mut offer = offered(random);
        if is_tentative {
            // With older versions the original refuses before anything is compared.
            offer.max = offer.max.max(92);
        }
        let theirs = peer.features(offer)?;
        let params = peer.receive_parameters()?;
        let brought = Brought {
            uuids: params.uuids.context("the kernel has no disk")?,
            state: params.state,
            agreed: (peer.version(), offer.features & theirs.features),
            is_tentative,
        };
        let presented = present(random, setting, &brought);
        let mut ours = Parameters::fresh(peer.version(), params.sizes.d_size.0);
        ours.protocol = params.protocol.clone();
        // The same policy, seen from the other node.
        ours.protocol.after_sb = params.protocol.after_sb.map(|policy| match policy {
            5 => 6,
            6 => 5,
            other => other,
        });
        ours.protocol.discard_my_data = false;
        ours.protocol.dry_run = presented.dry_run;
        ours.uuids = Some(presented.uuids);
        ours.state = first_state(presented.role, presented.disk);
        peer.send_parameters(&ours)?;
        let end = Instant::now() + PATIENCE;
        let state = loop {
            match peer.receive(PATIENCE) {
                Ok(Some(received)) => match received.packet {
                    Packet::State(word) => break Some(word.unpack()?),
                    // A source may send more than its state; a correction changes identifiers.
                    _ if Instant::now() < end => {}
                    other => bail!("{other:?}: {}", peer.story("no second state")),
                },
                Ok(None) => bail!("{}", peer.story("no second state")),
                Err(_) => break None,
            }
        };
        drop(peer);
        let lines = self.until_settled()?;
        Ok((brought, presented, observed(state, &lines)?))
    }

    /// Lets a node that has given up try again, sometimes with an option that counts once.
    fn connect_again(&mut self, random: &mut Random, setting: &Setting) -> Result<bool> {
        if !self.is_standalone {
            return Ok(false);
        }
        let option = match random.below(10) {
            0 | 1 if !setting.is_primary => "--discard-my-data",
            2 => "--tentative",
            _ => "",
        };
        self.node.guest.ok(&format!("{} {option}", self.connect))?;
        Ok(option == "--tentative")
    }

    /// The log until the connection has ended, one way or the other.
    fn until_settled(&mut self) -> Result<Vec<Line>> {
        let end = Instant::now() + PATIENCE;
        let mut all = Vec::new();
        loop {
            all.extend(self.lines()?);
            // What is before belongs to the case before.
            let start = all.iter().position(|l: &Line| l.text.starts_with("Handshake successful"));
            let became = |state: &str| {
                let wanted = format!("-> {state} )");
                let ours = &all[start.unwrap_or(all.len())..];
                ours.iter().any(|l| l.text.contains("conn(") && l.text.contains(&wanted))
            };
            self.is_standalone = became("StandAlone");
            if self.is_standalone || became("WFConnection") {
                return Ok(all.split_off(start.unwrap_or(0)));
            }
            ensure!(Instant::now() < end, "the connection does not end: {all:#?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// New lines of the log.
    fn lines(&mut self) -> Result<Vec<Line>> {
        self.partial.push_str(&self.log.take()?);
        let complete = self.partial.rfind('\n').map_or(0, |at| at + 1);
        let rest = self.partial.split_off(complete);
        let text = std::mem::replace(&mut self.partial, rest);
        // Lines that begin with a blank are properties of the one before.
        Ok(text.lines().filter(|l| !l.starts_with(' ')).filter_map(Line::parse).collect())
    }
}

/// What begins a line behind the decision: changes of the state, with what is implied by them.
const END: [&str; 7] =
    ["conn( ", "peer( ", "disk( ", "pdsk( ", "role( ", "error receiving", "Implicitly upgraded"];

/// Splits the log at the end of the decision: the first change of state.
fn observed(state: Option<drbd_types::Fields>, lines: &[Line]) -> Result<Observed> {
    let start = lines.iter().position(|l| l.text == "drbd_sync_handshake:");
    let start = start.with_context(|| format!("no handshake in {lines:#?}"))?;
    let mut steps: Vec<Step> = Vec::new();
    let mut rest = Vec::new();
    for line in &lines[start..] {
        let is_change = END.iter().any(|start| line.text.starts_with(start));
        let is_volume = line.subject.contains("/");
        if rest.is_empty() && is_volume && !is_change {
            steps.extend(line.step());
        } else {
            rest.push(line.text.clone());
        }
    }
    Ok(Observed { state, steps, rest })
}
