//! One run: carries a scenario out, watches everything, and after the faults have stopped brings the
//! pair back together as an administrator would.
//!
//! ```text
//!   set-up -> operations and faults -> faults stop -> operator -> at rest -> last checks
//!                  \---------- after every step: oracle, invariants ---------/
//! ```

use std::collections::{BTreeMap, VecDeque};

use drbd_core::action::AppError;
use drbd_core::admin::Command;
use drbd_core::config::{Fencing, NetConfig, Protocol};
use drbd_core::event::{AppOp, WriteFlags};
use drbd_types::{ByteLen, Cstate, Dstate, Fields, Gi, Minor, Role, SectorCount, VolumeNr};
use drbdmeta::al::{initialised_block, replay};
use drbdmeta::layout::{AlGeometry, Layout, Placement};
use drbdmeta::ops::{ApplyPlan, apply, plan_apply};
use drbdmeta::superblock::{Flags, Superblock};

use crate::disk::SimDisk;
use crate::meta::DiskIo;
use crate::node::AppResult;
use crate::oracle::{End, Oracle};
use crate::scenario::{How, Op, Scenario, Setup};
use crate::world::{Faults, World, range};

/// What is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// A name that stays the same while a scenario is made smaller.
    pub kind: &'static str,
    /// In words.
    pub text: String,
}

/// A request without answer.
#[derive(Clone, Debug)]
enum Pending {
    Write,
    Read { volume: u16, start: u64, since: u64, nodes: [bool; 2] },
    Flush { volume: u16, since: u64 },
}

/// What an administrator's script is doing on a node.
#[derive(Debug, Default)]
struct Script {
    rest: VecDeque<Command>,
    ticket: Option<u32>,
}

/// Steps that no honest run needs.
const STEPS_MAX: u64 = 3_000_000;
/// Everything has to be well again after this time, microseconds.
const PATIENCE: u64 = 900_000_000;

/// A run.
pub struct Run {
    /// The world.
    pub world: World,
    setup: Setup,
    oracle: Oracle,
    pending: [BTreeMap<u64, (u16, Pending)>; 2],
    scripts: [Script; 2],
    /// Nodes to be started then.
    boots: Vec<(u64, usize)>,
    /// States as they were seen last.
    seen: [Vec<Option<Fields>>; 2],
    versions: [u64; 2],
    lines: [usize; 2],
    /// A split brain was found and waits for a decision.
    is_split: bool,
    /// Who gives its data up then.
    victim: usize,
    /// Operations by the operator.
    pub repairs: u64,
}

type Checked = Result<(), Violation>;

fn broken(kind: &'static str, text: impl Into<String>) -> Checked {
    Err(Violation { kind, text: text.into() })
}

fn fresh_disk(setup: &Setup, sectors: u64) -> SimDisk {
    let meta_len = 1 << 20;
    let mut disk = SimDisk::new(sectors + setup.spare, meta_len);
    let placement = Placement::FlexExternal;
    let layout = Layout::for_new(placement, ByteLen(meta_len), AlGeometry::default())
        .expect("1 MiB is enough");
    for t in 0..layout.al_geometry.blocks() {
        disk.write_block(layout.al_block(t).0, Box::new(initialised_block()), true);
    }
    let mut superblock = Superblock::new(&layout, 0);
    if setup.is_in_sync {
        superblock.la_size = SectorCount(sectors);
        superblock.current = Gi(0x1234_5678_9ABC_DEF0);
        superblock.bitmap = Gi(0);
        superblock.flags |= Flags::CONSISTENT | Flags::WAS_UP_TO_DATE;
    }
    disk.write_block(layout.superblock.0, Box::new(superblock.to_disk()), true);
    disk.is_volatile = setup.is_volatile;
    disk.atom = setup.atom;
    disk.flush_all();
    disk
}

impl Run {
    /// Two nodes that run, without any configuration yet.
    pub fn new(scenario: &Scenario) -> Self {
        let setup = scenario.setup.clone();
        let disks = || {
            let numbered = (0..).zip(&setup.volumes);
            numbered.map(|(nr, sectors)| (nr, fresh_disk(&setup, *sectors))).collect()
        };
        let mut world = World::new(scenario.seed, [disks(), disks()]);
        world.net_delay = setup.net_delay;
        world.disk_delay = setup.disk_delay;
        world.send_buffer = setup.send_buffer;
        world.fence_style = setup.fence_style;
        world.clocks = setup.clocks;
        let volumes = setup.volumes.len();
        Self {
            world,
            setup,
            oracle: Oracle::default(),
            pending: [BTreeMap::new(), BTreeMap::new()],
            scripts: [Script::default(), Script::default()],
            boots: Vec::new(),
            seen: [vec![None; volumes], vec![None; volumes]],
            versions: [0; 2],
            lines: [0; 2],
            is_split: false,
            victim: 1,
            repairs: 0,
        }
    }

    /// Everything, from the beginning to the end.
    ///
    /// # Errors
    /// Something is wrong.
    pub fn all(&mut self, scenario: &Scenario) -> Checked {
        for node in 0..2 {
            self.bring_up(node)?;
        }
        let is_well = |run: &Self| run.is_connected();
        self.run_until(100_000_000, is_well)?;
        self.world.faults = scenario.setup.faults;
        let start = self.world.now().0;
        for (at, op) in &scenario.ops {
            self.run_to(start + at)?;
            self.carry_out(op)?;
        }
        let rest = self.world.chance.below(3_000_000);
        self.run_to(self.world.now().0 + rest)?;
        self.heal()
    }

    fn volumes(&self) -> std::ops::Range<u16> {
        0..u16::try_from(self.setup.volumes.len()).unwrap_or(0)
    }

    fn state(&self, node: usize, volume: u16) -> Option<Fields> {
        let node = &self.world.nodes[node];
        if node.is_up { node.engine.state(volume) } else { None }
    }

    fn is_connected(&self) -> bool {
        self.volumes().all(|volume| {
            (0..2).all(|node| self.state(node, volume).is_some_and(|s| s.conn == Cstate::Connected))
        })
    }

    // ---- time ----

    fn run_to(&mut self, end: u64) -> Checked {
        self.run_until(end.saturating_sub(self.world.now().0), |_| false)
    }

    fn run_until(&mut self, limit: u64, holds: impl Fn(&Self) -> bool) -> Checked {
        let end = self.world.now().0 + limit;
        loop {
            if holds(self) {
                return Ok(());
            }
            let boot = self.boots.iter().map(|(at, _)| *at).min();
            let next = self.world.next_at().into_iter().chain(boot).min();
            let Some(next) = next.filter(|at| *at <= end) else {
                self.world.advance_to(end);
                return Ok(());
            };
            if boot == Some(next) {
                self.world.advance_to(next);
                self.boot_due()?;
            } else {
                self.world.step();
            }
            self.after_step()?;
        }
    }

    fn boot_due(&mut self) -> Checked {
        let now = self.world.now().0;
        let due: Vec<usize> =
            self.boots.iter().filter(|(at, _)| *at <= now).map(|(_, node)| *node).collect();
        self.boots.retain(|(at, _)| *at > now);
        for node in due {
            if !self.world.nodes[node].is_up {
                self.world.boot(node);
                self.bring_up(node)?;
            }
        }
        Ok(())
    }

    /// What is looked at after every step.
    fn after_step(&mut self) -> Checked {
        if self.world.steps > STEPS_MAX {
            return broken("livelock", format!("more than {STEPS_MAX} steps"));
        }
        let shot: Vec<usize> = self.world.shot.iter().copied().collect();
        for node in shot {
            self.world.shot.remove(&node);
            self.has_stopped(node, true);
            self.boots.push((self.world.now().0 + 2_000_000, node));
        }
        for node in 0..2 {
            if let Some(text) = self.world.nodes[node].violations.first() {
                return broken("shell", format!("node {node}: {text}"));
            }
            self.read_log(node);
            while let Some((id, result)) = self.world.nodes[node].completed.pop_front() {
                self.completed(node, id, result)?;
            }
            self.go_on(node);
            let version = self.world.nodes[node].engine.state_version();
            if version != self.versions[node] {
                self.versions[node] = version;
                self.look(node)?;
            }
        }
        if self.world.steps.is_multiple_of(64) {
            self.audit()?;
        }
        Ok(())
    }

    fn audit(&self) -> Checked {
        for node in 0..2 {
            if let Some(text) = self.world.nodes[node].engine.audit().first() {
                return broken("audit", format!("node {node}: {text}"));
            }
        }
        for volume in self.volumes() {
            self.check_covered(volume)?;
        }
        Ok(())
    }

    /// Invariant 14: blocks that differ are marked, or being written, or in the activity log.
    fn check_covered(&self, volume: u16) -> Checked {
        let [a, b] = &self.world.nodes;
        let (Some(x), Some(y)) = (self.state(0, volume), self.state(1, volume)) else {
            return Ok(());
        };
        if x.disk < Dstate::Inconsistent || y.disk < Dstate::Inconsistent {
            return Ok(());
        }
        let (Some(left), Some(right)) = (a.disks.get(&volume), b.disks.get(&volume)) else {
            return Ok(());
        };
        for sector in left.differing(right) {
            let bit = sector / 8;
            let is_marked =
                [a, b].iter().any(|node| node.engine.is_dirty(volume, bit) == Some(true));
            let extent = u32::try_from(sector >> 13).unwrap_or(0);
            let is_hot = [(a, &x), (b, &y)].iter().any(|(node, state)| {
                let keeps_log = state.role == Role::Primary || state.peer == Role::Primary;
                keeps_log && node.engine.is_hot(volume, extent)
            });
            let block = range(sector / 8 * 8, 8);
            let is_written = [a, b].iter().any(|n| n.engine.is_being_written(volume, block));
            if !is_marked && !is_hot && !is_written {
                return broken(
                    "uncovered",
                    format!(
                        "volume {volume} sector {sector} differs ({} and {}) and nobody knows (14)",
                        left.sector(sector),
                        right.sector(sector)
                    ),
                );
            }
        }
        Ok(())
    }

    // ---- states ----

    fn read_log(&mut self, node: usize) {
        let texts: Vec<String> = self.world.nodes[node].log
            [self.lines[node].min(self.world.nodes[node].log.len())..]
            .iter()
            .map(|line| line.text.clone())
            .collect();
        self.lines[node] = self.world.nodes[node].log.len();
        for text in texts {
            if text.starts_with("Split-Brain detected") && text.contains("solved. Sync from") {
                let loser = if text.contains("Sync from peer") { node } else { 1 - node };
                for volume in self.volumes() {
                    self.oracle.forgive(volume, loser);
                }
            }
            if text.starts_with("Split-Brain detected but unresolved")
                || text == "State change failed: Multiple primaries not allowed by config"
            {
                self.is_split = true;
            }
        }
    }

    /// A state has changed.
    fn look(&mut self, node: usize) -> Checked {
        for volume in self.volumes() {
            let at = usize::from(volume);
            let was = self.seen[node][at];
            let is = self.state(node, volume);
            if was == is {
                continue;
            }
            self.seen[node][at] = is;
            let Some(is) = is else { continue };
            self.check_state(node, volume, &is)?;
            // A disk with errors counts as worthless when another one is good, even if it was the
            // only one with the newest data.
            let fails = was.is_some_and(|was| was.disk == Dstate::UpToDate)
                && is.disk == Dstate::Inconsistent
                && !matches!(is.conn, Cstate::WFBitMapT | Cstate::WFSyncUUID | Cstate::SyncTarget);
            if fails {
                self.oracle.forgive(volume, node);
            }
            self.check_covered(volume)?;
            let is_good = |s: &Fields| {
                s.disk == Dstate::UpToDate
                    && s.pdsk == Dstate::UpToDate
                    && s.conn >= Cstate::Connected
            };
            if is_good(&is) && !was.as_ref().is_some_and(is_good) {
                self.became_equal(node, volume)?;
            }
        }
        Ok(())
    }

    /// Both disks are UpToDate and connected, says this node: it must have everything (34).
    fn became_equal(&mut self, node: usize, volume: u16) -> Checked {
        let other = 1 - node;
        let other_is_good = self
            .state(other, volume)
            .is_some_and(|s| s.disk == Dstate::UpToDate && s.conn >= Cstate::Connected);
        if !other_is_good || self.setup.net.protocol != Protocol::C {
            return Ok(());
        }
        for at in [node, other] {
            self.check_disk(at, volume, [true; 2], "lost")?;
        }
        self.oracle.merged(volume);
        Ok(())
    }

    /// Everything on a disk is what it may be.
    fn check_disk(
        &mut self,
        node: usize,
        volume: u16,
        nodes: [bool; 2],
        kind: &'static str,
    ) -> Checked {
        let now = self.oracle.tick();
        let Some(disk) = self.world.nodes[node].disks.get(&volume) else { return Ok(()) };
        for sector in self.oracle.known_sectors(volume) {
            let legal = self.oracle.is_legal(volume, sector, disk.sector(sector), nodes, now, true);
            if let Err(text) = legal {
                return broken(kind, format!("on the disk of node {node}: {text}"));
            }
        }
        Ok(())
    }

    fn check_state(&self, node: usize, volume: u16, is: &Fields) -> Checked {
        let are_two = is.role == Role::Primary && is.peer == Role::Primary;
        if are_two && !self.setup.net.two_primaries && is.conn >= Cstate::Connected {
            return broken("two", format!("node {node} volume {volume}: two Primaries: {is:?}"));
        }
        Ok(())
    }

    // ---- requests ----

    /// Who answers for what a node reads now.
    fn responsible(&self, node: usize, volume: u16) -> [bool; 2] {
        let mut nodes = [false; 2];
        let Some(state) = self.state(node, volume) else { return nodes };
        if state.disk == Dstate::UpToDate {
            nodes[node] = true;
        } else {
            nodes[1 - node] = true;
        }
        nodes
    }

    fn completed(&mut self, node: usize, id: u64, result: AppResult) -> Checked {
        let Some((volume, pending)) = self.pending[node].remove(&id) else {
            return broken("twice", format!("node {node}: request {id} completed twice (1)"));
        };
        let Some(state) = self.state(node, volume) else { return Ok(()) };
        match pending {
            Pending::Write => self.write_completed(node, volume, id, &result, &state),
            Pending::Read { volume, start, since, nodes } => {
                let Ok(Some(data)) = result else {
                    return self.check_failure(node, volume, &result, &state);
                };
                let now = self.responsible(node, volume);
                for (sector, tag) in (start..).zip(data) {
                    let legal =
                        |nodes| self.oracle.is_legal(volume, sector, tag, nodes, since, false);
                    if let Err(text) = legal(nodes).or_else(|_| legal(now)) {
                        return broken("read", format!("node {node} read {id}: {text} (2)"));
                    }
                }
                Ok(())
            }
            Pending::Flush { volume, since } => {
                if result.is_ok() {
                    let on_both = self.setup.net.protocol == Protocol::C
                        && state.pdsk == Dstate::UpToDate
                        && state.conn >= Cstate::Connected;
                    self.oracle.flushed(volume, node, since, on_both);
                }
                Ok(())
            }
        }
    }

    fn write_completed(
        &mut self,
        node: usize,
        volume: u16,
        id: u64,
        result: &AppResult,
        state: &Fields,
    ) -> Checked {
        let other = 1 - node;
        let their = self.state(other, volume);
        let is_mirrored = state.pdsk == Dstate::UpToDate && state.conn >= Cstate::Connected;
        let mut obliged = [false; 2];
        obliged[node] = state.disk == Dstate::UpToDate;
        let mut is_lossy = false;
        if is_mirrored {
            match self.setup.net.protocol {
                Protocol::C => match their {
                    Some(their) => obliged[other] = their.disk == Dstate::UpToDate,
                    // It was there when it acknowledged.
                    None => is_lossy = true,
                },
                Protocol::A | Protocol::B => is_lossy = !obliged[node] || their.is_none(),
            }
        }
        self.oracle.end(id, End { is_ok: result.is_ok(), obliged, is_lossy, durable: [false; 2] });
        let fencing = self.setup.disk[node].fencing;
        let is_unfenced =
            state.conn < Cstate::Connected && state.pdsk == Dstate::DUnknown && state.susp_fen;
        if fencing == Fencing::ResourceAndStonith && is_unfenced && result.is_ok() {
            return broken(
                "unfenced",
                format!("node {node}: write {id} completed while the peer is not fenced (30)"),
            );
        }
        self.check_failure(node, volume, result, state)
    }

    /// A request fails only if no good data is reachable (1, 50).
    fn check_failure(
        &self,
        node: usize,
        volume: u16,
        result: &AppResult,
        state: &Fields,
    ) -> Checked {
        if *result != Err(AppError::Io) {
            return Ok(());
        }
        let their = self.state(1 - node, volume);
        let is_reachable = |s: &Fields| {
            s.conn == Cstate::Connected && s.pdsk == Dstate::UpToDate && s.disk == Dstate::UpToDate
        };
        if is_reachable(state) && their.as_ref().is_some_and(is_reachable) {
            return broken(
                "failed",
                format!(
                    "node {node} volume {volume}: a request failed while all is well: {state:?}"
                ),
            );
        }
        Ok(())
    }

    /// A node that serves applications; this one, if both do.
    fn primary(&self, node: usize, volume: u16) -> Option<usize> {
        [node, 1 - node].into_iter().find(|at| {
            let node = &self.world.nodes[*at];
            node.is_up && node.offers.get(&volume).is_some_and(|offer| offer.is_primary)
        })
    }

    fn carry_out(&mut self, op: &Op) -> Checked {
        self.world.tell(|| format!("* {op:?}"));
        match op {
            Op::Write { node, volume, start, len, how } => {
                self.begin_write(*node, *volume, *start, *len, *how);
            }
            Op::Read { node, volume, start, len } => {
                self.begin_read(*node, *volume, *start, *len);
            }
            Op::Flush { node, volume } => {
                if let Some(node) = self.primary(*node, *volume) {
                    let since = self.oracle.tick();
                    let id = self.world.next_request();
                    let pending = Pending::Flush { volume: *volume, since };
                    self.pending[node].insert(id, (*volume, pending));
                    self.world.request(node, *volume, AppOp::Flush);
                }
            }
            Op::Admin { node, command } => self.command(*node, command.clone()),
            Op::Attach { node, volume } => {
                let command = self.attach(*node, *volume);
                self.command(*node, command);
            }
            Op::Connect { node } => {
                let net = self.net(false);
                self.script(*node, [Command::Disconnect { force: false }, net]);
            }
            Op::Stop { node, power_cut, down } => self.stop(*node, *power_cut, *down),
            Op::Block { zero, one, time } => {
                for (node, is_blocked) in [zero, one].into_iter().enumerate() {
                    if *is_blocked {
                        self.world.block(node, *time);
                    }
                }
            }
            Op::Reset => self.world.reset_all(),
            Op::Bad { node, volume, sector } => {
                if let Some(disk) = self.world.nodes[*node].disks.get_mut(volume) {
                    disk.bad.insert(*sector);
                }
            }
            Op::Dead { node, volume, is_dead } => {
                if let Some(disk) = self.world.nodes[*node].disks.get_mut(volume) {
                    disk.is_dead = *is_dead;
                }
            }
        }
        self.after_step()
    }

    fn begin_write(&mut self, node: usize, volume: u16, start: u64, len: u64, how: How) {
        let Some(node) = self.primary(node, volume) else { return };
        let Some(offer) = self.world.nodes[node].offers.get(&volume).copied() else { return };
        if start + len > offer.size.0 {
            return;
        }
        let is_zero = match how {
            How::Discard => offer.max_discard > 0,
            How::Zeroes => offer.max_write_zeroes > 0,
            How::Plain | How::Fua | How::Preflush => false,
        };
        let id = self.world.next_request();
        let tags: Vec<u64> = (1..=len).map(|i| if is_zero { 0 } else { id * 4096 + i }).collect();
        self.oracle.begin(id, volume, node, start, &tags);
        self.pending[node].insert(id, (volume, Pending::Write));
        let place = range(start, len);
        if is_zero {
            let op = match how {
                How::Discard => AppOp::Discard { range: place },
                _ => AppOp::WriteZeroes { range: place, may_unmap: id.is_multiple_of(2) },
            };
            self.world.request(node, volume, op);
        } else {
            let flags = WriteFlags {
                fua: how == How::Fua,
                preflush: how == How::Preflush,
                ..WriteFlags::default()
            };
            self.world.write_with(node, volume, start, tags, flags);
        }
    }

    fn begin_read(&mut self, node: usize, volume: u16, start: u64, len: u64) {
        let Some(node) = self.primary(node, volume) else { return };
        let size = self.world.nodes[node].offers.get(&volume).map_or(0, |offer| offer.size.0);
        if start + len > size {
            return;
        }
        let since = self.oracle.tick();
        let nodes = self.responsible(node, volume);
        let id = self.world.next_request();
        let pending = Pending::Read { volume, start, since, nodes };
        self.pending[node].insert(id, (volume, pending));
        self.world.read(node, volume, start, len);
    }

    // ---- administration ----

    fn net(&self, discard_my_data: bool) -> Command {
        Command::Connect(Box::new(NetConfig { discard_my_data, ..self.setup.net.clone() }))
    }

    fn attach(&self, node: usize, volume: u16) -> Command {
        let mut config = self.setup.disk[node].clone();
        // Without this a device as large as its disk grows at once.
        config.size = SectorCount(0);
        Command::Attach { volume: VolumeNr(volume), config: Box::new(config) }
    }

    /// Gives a command.
    fn command(&mut self, node: usize, command: Command) {
        if self.world.nodes[node].is_up {
            self.note_command(node, &command);
            self.world.command(node, command);
        }
    }

    /// Notes what may be lost by a command.
    fn note_command(&mut self, node: usize, command: &Command) {
        match command {
            Command::Invalidate(nr) => self.oracle.forgive(nr.0, node),
            Command::InvalidateRemote(nr) => self.oracle.forgive(nr.0, 1 - node),
            Command::Primary { volume, force: true } => {
                // What is here is declared good, and what is only there is not.
                let is_good =
                    self.state(node, volume.0).is_some_and(|s| s.disk == Dstate::UpToDate);
                if !is_good {
                    self.oracle.forgive_all(volume.0);
                }
                self.oracle.forgive(volume.0, 1 - node);
            }
            Command::Connect(net) if net.discard_my_data => {
                for volume in self.volumes() {
                    self.oracle.forgive(volume, node);
                }
            }
            _ => {}
        }
    }

    fn script(&mut self, node: usize, commands: impl IntoIterator<Item = Command>) {
        if self.world.nodes[node].is_up && self.is_script_idle(node) {
            self.scripts[node].rest.extend(commands);
            self.go_on(node);
        }
    }

    /// The next command of a script, when the one before was answered.
    fn go_on(&mut self, node: usize) {
        loop {
            if let Some(ticket) = self.scripts[node].ticket {
                let Some(reply) = self.world.nodes[node].replies.remove(&ticket) else { return };
                self.world.tell(|| format!("* node {node}: {reply:?}"));
                self.scripts[node].ticket = None;
            }
            let Some(command) = self.scripts[node].rest.pop_front() else { return };
            self.note_command(node, &command);
            self.world.tell(|| format!("* node {node}: {command:?}"));
            self.scripts[node].ticket = Some(self.world.command(node, command));
        }
    }

    fn is_script_idle(&self, node: usize) -> bool {
        self.scripts[node].ticket.is_none() && self.scripts[node].rest.is_empty()
    }

    fn stop(&mut self, node: usize, power_cut: bool, down: u64) {
        if !self.world.nodes[node].is_up {
            return;
        }
        self.world.stop(node, power_cut);
        self.has_stopped(node, power_cut);
        self.boots.push((self.world.now().0 + down, node));
    }

    fn has_stopped(&mut self, node: usize, power_cut: bool) {
        for id in std::mem::take(&mut self.pending[node]).into_keys() {
            // With two Primaries a write of the dead one may be on its way while the other writes.
            if !self.setup.net.two_primaries {
                self.oracle.lose(id);
            }
        }
        self.scripts[node] = Script::default();
        self.oracle.stopped(node, self.setup.net.protocol == Protocol::C);
        if power_cut && self.setup.is_volatile {
            self.oracle.power_cut(node);
        }
        self.lines[node] = 0;
        self.versions[node] = 0;
        self.seen[node].fill(None);
    }

    /// What `drbdadm up` does.
    fn bring_up(&mut self, node: usize) -> Checked {
        let mut commands = vec![Command::ResourceOptions(self.setup.resource)];
        for volume in self.volumes() {
            if let Err(text) = self.apply_log(node, volume) {
                return broken("apply-al", format!("node {node} volume {volume}: {text}"));
            }
            let minor = Minor(u32::from(volume));
            commands.push(Command::NewVolume { volume: VolumeNr(volume), minor });
            commands.push(self.attach(node, volume));
        }
        commands.push(self.net(false));
        self.script(node, commands);
        Ok(())
    }

    /// What `drbdmeta apply-al` does.
    fn apply_log(&mut self, node: usize, volume: u16) -> Result<(), String> {
        let Some(disk) = self.world.nodes[node].disks.get_mut(&volume) else { return Ok(()) };
        let length = ByteLen(disk.meta_len);
        let mut io = DiskIo(disk);
        let at = Placement::FlexExternal.superblock(length).ok_or("no place")?;
        let mut block = [0; 4096];
        drbdmeta::io::MetaIo::read_at(&mut io, at, &mut block).map_err(|e| e.to_string())?;
        let mut superblock = Superblock::from_disk(&block).map_err(|e| e.to_string())?;
        let layout = superblock
            .check(Placement::FlexExternal, length)
            .map_err(|e| format!("superblock: {e:?}"))?;
        let replay = replay(&mut io, &layout, &superblock).map_err(|e| e.to_string())?;
        match plan_apply(&superblock, &replay) {
            ApplyPlan::Refuse(exit) => Err(format!("the log is unreadable, exit {exit}")),
            ApplyPlan::Do { mark, reinitialise, .. } => {
                apply(&mut io, &layout, &mut superblock, &replay.outcome, mark, reinitialise)
                    .map_err(|e| e.to_string())?;
                Ok(())
            }
        }
    }

    // ---- the end ----

    /// Faults stop, and an operator brings everything back.
    fn heal(&mut self) -> Checked {
        self.world.tell(|| "* faults stop".to_owned());
        self.world.faults = Faults::NONE;
        self.world.cut(false);
        for node in 0..2 {
            for disk in self.world.nodes[node].disks.values_mut() {
                disk.is_dead = false;
                disk.bad.clear();
            }
        }
        let end = self.world.now().0 + PATIENCE;
        let mut well = 0;
        let mut rounds = 0_u32;
        while self.world.now().0 < end {
            self.run_to(self.world.now().0 + 3_000_000)?;
            if self.is_at_rest() {
                well += 1;
                if well > 2 {
                    return self.last_checks();
                }
            } else {
                well = 0;
                rounds += 1;
                if rounds.is_multiple_of(60) && self.is_data_lost() {
                    self.last_resort()?;
                } else {
                    self.repair()?;
                }
            }
        }
        let mut text = format!("not well again: {}; who waits for what:\n", self.unrest());
        for node in 0..2 {
            text +=
                &format!("node {node}:\n{}\n", self.world.nodes[node].engine.waits().join("\n"));
            text += &format!("  requests: {:?}\n", self.pending[node]);
            text += &format!("  script: {:?}\n", self.scripts[node]);
        }
        broken("stuck", text)
    }

    fn is_at_rest(&self) -> bool {
        self.boots.is_empty()
            && (0..2).all(|node| self.pending[node].is_empty() && self.is_script_idle(node))
            && self.volumes().all(|volume| {
                (0..2).all(|node| {
                    self.state(node, volume).is_some_and(|s| {
                        s.conn == Cstate::Connected
                            && s.disk == Dstate::UpToDate
                            && s.pdsk == Dstate::UpToDate
                            && !s.is_suspended()
                    }) && self.world.nodes[node].engine.log_len() == 0
                        && self.world.nodes[node].engine.dirty_bits(volume) == 0
                })
            })
    }

    /// Is there a volume of which nobody has good data?
    fn is_data_lost(&self) -> bool {
        self.volumes().any(|volume| {
            (0..2).all(|node| self.state(node, volume).is_some_and(|s| s.disk < Dstate::UpToDate))
        })
    }

    /// Both nodes start anew, and what one of them has is declared good.
    fn last_resort(&mut self) -> Checked {
        self.world.tell(|| "* last resort".to_owned());
        for node in 0..2 {
            if self.world.nodes[node].is_up {
                self.world.stop(node, false);
                self.has_stopped(node, false);
            }
        }
        self.boots.clear();
        for volume in self.volumes() {
            self.oracle.forgive_all(volume);
        }
        self.world.boot(0);
        self.bring_up(0)?;
        self.run_until(120_000_000, |run| run.is_script_idle(0))?;
        let force = |volume| Command::Primary { volume: VolumeNr(volume), force: true };
        let commands: Vec<Command> = self.volumes().map(force).collect();
        self.script(0, commands);
        self.run_until(120_000_000, |run| run.is_script_idle(0))?;
        self.world.boot(1);
        self.bring_up(1)
    }

    /// What is not at rest.
    fn unrest(&self) -> String {
        let mut all = Vec::new();
        for node in 0..2 {
            if !self.pending[node].is_empty() {
                all.push(format!("node {node} has {} requests", self.pending[node].len()));
            }
            if !self.is_script_idle(node) {
                all.push(format!("node {node} has no answer to a command"));
            }
            let engine = &self.world.nodes[node].engine;
            if engine.log_len() > 0 {
                all.push(format!("node {node} has {} in the log", engine.log_len()));
            }
            for volume in self.volumes() {
                let bits = engine.dirty_bits(volume);
                if let Some(s) = self.state(node, volume)
                    && (s.conn, s.disk, s.pdsk)
                        != (Cstate::Connected, Dstate::UpToDate, Dstate::UpToDate)
                {
                    all.push(format!(
                        "node {node} volume {volume}: {:?} {:?}/{:?}",
                        s.conn, s.disk, s.pdsk
                    ));
                }
                if bits > 0 {
                    all.push(format!("node {node} volume {volume}: {bits} bits"));
                }
            }
        }
        all.join(", ")
    }

    /// One round of an administrator who does what is to be done.
    fn repair(&mut self) -> Checked {
        for node in 0..2 {
            if !self.world.nodes[node].is_up && self.boots.is_empty() {
                self.world.boot(node);
                self.bring_up(node)?;
            }
            if !self.world.nodes[node].is_up || !self.is_script_idle(node) {
                continue;
            }
            let mut commands = Vec::new();
            for volume in self.volumes() {
                let nr = VolumeNr(volume);
                let Some(state) = self.state(node, volume) else { continue };
                if state.susp {
                    commands.push(Command::ResumeIo(nr));
                }
                if state.user_isp {
                    commands.push(Command::ResumeSync(nr));
                }
                if state.disk == Dstate::Diskless {
                    // Its log was kept for a crash; an orderly attach needs it applied too.
                    if let Err(text) = self.apply_log(node, volume) {
                        return broken("apply-al", format!("node {node} volume {volume}: {text}"));
                    }
                    commands.push(self.attach(node, volume));
                }
            }
            if let Some(again) = self.attach_again(node) {
                self.script(node, again);
                continue;
            }
            let conn = self.state(node, 0).map_or(Cstate::StandAlone, |s| s.conn);
            if conn == Cstate::StandAlone {
                commands.extend(self.reconnect(node));
            }
            commands.extend(self.promote_for_data(node));
            commands.extend(self.resync_marked(node));
            self.repairs += commands.len() as u64;
            self.script(node, commands);
        }
        Ok(())
    }

    /// After a split brain one node gives its data up.
    fn reconnect(&mut self, node: usize) -> Vec<Command> {
        let mut commands = vec![Command::Disconnect { force: false }];
        let is_victim = self.is_split && node == self.victim;
        if is_victim {
            for volume in self.volumes() {
                commands.push(Command::Secondary(VolumeNr(volume)));
            }
        }
        commands.push(self.net(is_victim));
        commands
    }

    /// A split brain was found by an attach: the data that was to be attached is given up.
    fn attach_again(&mut self, node: usize) -> Option<Vec<Command>> {
        let is_refused = |s: &Fields| {
            matches!(s.disk, Dstate::Diskless | Dstate::Negotiating) && s.conn == Cstate::Connected
        };
        let refused: Vec<u16> = self
            .volumes()
            .filter(|volume| self.state(node, *volume).as_ref().is_some_and(is_refused))
            .collect();
        if !self.is_split || refused.is_empty() {
            return None;
        }
        self.victim = node;
        let mut commands = Vec::new();
        for volume in refused {
            commands.push(Command::Detach { volume: VolumeNr(volume), force: false });
        }
        commands.push(Command::Disconnect { force: true });
        for volume in self.volumes() {
            commands.push(Command::Secondary(VolumeNr(volume)));
            commands.push(self.attach(node, volume));
        }
        commands.push(self.net(true));
        Some(commands)
    }

    /// Nobody has good data: somebody's is declared good.
    fn promote_for_data(&self, node: usize) -> Vec<Command> {
        let mut commands = Vec::new();
        for volume in self.volumes() {
            let Some(state) = self.state(node, volume) else { continue };
            let is_hopeless = state.conn == Cstate::Connected
                && state.disk != Dstate::Negotiating
                && state.pdsk != Dstate::Negotiating
                && state.disk < Dstate::UpToDate
                && state.pdsk < Dstate::UpToDate
                && state.disk >= Dstate::Inconsistent;
            if is_hopeless && state.disk >= state.pdsk && (state.disk > state.pdsk || node == 0) {
                commands.push(Command::Primary { volume: VolumeNr(volume), force: true });
            }
        }
        commands
    }

    /// Connected and good, but with marked blocks (a verify or an error found them): a new
    /// connection resyncs them, or an invalidation.
    fn resync_marked(&self, node: usize) -> Vec<Command> {
        let mut commands = Vec::new();
        for volume in self.volumes() {
            let Some(state) = self.state(node, volume) else { continue };
            let bits = self.world.nodes[node].engine.dirty_bits(volume);
            let is_idle = state.conn == Cstate::Connected
                && state.pdsk == Dstate::UpToDate
                && state.role == Role::Secondary;
            let needs = (state.disk == Dstate::UpToDate && bits > 0)
                || (state.disk >= Dstate::Inconsistent && state.disk < Dstate::UpToDate);
            if is_idle && needs {
                commands.push(Command::Invalidate(VolumeNr(volume)));
            }
            // A Primary does not invalidate itself: a new attach makes it the target.
            let is_bad = state.conn == Cstate::Connected
                && state.pdsk == Dstate::UpToDate
                && state.role == Role::Primary
                && state.disk >= Dstate::Inconsistent
                && state.disk < Dstate::UpToDate;
            if is_bad {
                commands.push(Command::Detach { volume: VolumeNr(volume), force: false });
                commands.push(self.attach(node, volume));
            }
            let is_source = state.conn == Cstate::Connected
                && state.disk == Dstate::UpToDate
                && state.role == Role::Primary;
            let peer_bits = self.world.nodes[1 - node].engine.dirty_bits(volume);
            if is_source && (bits > 0 || peer_bits > 0) && state.pdsk == Dstate::UpToDate {
                commands.push(Command::InvalidateRemote(VolumeNr(volume)));
            }
        }
        commands
    }

    fn last_checks(&mut self) -> Checked {
        self.audit()?;
        for node in 0..2 {
            let found = self.world.nodes[node].engine.audit_idle();
            if !found.is_empty() {
                return broken("idle", format!("node {node} at rest: {}", found.join("; ")));
            }
            let buffers = self.world.nodes[node].buffers_in_use();
            if buffers > 0 {
                return broken("leak", format!("node {node}: {buffers} buffers are still lent"));
            }
        }
        for volume in self.volumes() {
            let [a, b] = &self.world.nodes;
            let differing = match (a.disks.get(&volume), b.disks.get(&volume)) {
                (Some(left), Some(right)) => left.differing(right),
                _ => Vec::new(),
            };
            if let Some(sector) = differing.first() {
                return broken("differ", format!("volume {volume}: the disks differ at {sector}"));
            }
            for node in 0..2 {
                self.check_disk(node, volume, [true; 2], "lost")?;
            }
        }
        Ok(())
    }
}
