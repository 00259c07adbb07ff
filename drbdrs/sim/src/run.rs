//! One run: carries a scenario out, watches everything, and after the faults have stopped brings the
//! pair back together as an administrator would.
//!
//! ```text
//!   set-up -> operations and faults -> faults stop -> operator -> at rest -> last checks
//!                  \---------- after every step: oracle, invariants ---------/
//! ```

mod carry_out;
mod check;
mod copies;
mod heal;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use drbd_core::admin::Command;
use drbd_types::{ByteLen, Cstate, Fields, Gi, SectorCount};
use drbdmeta::al::initialised_block;
use drbdmeta::layout::{AlGeometry, Layout, Placement};
use drbdmeta::superblock::{Flags, Superblock};

use crate::disk::SimDisk;
use crate::oracle::Oracle;
use crate::scenario::{Scenario, Setup};
use crate::world::World;

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
    /// Volumes whose generations the agreed protocol version is too old for.
    outgrown: BTreeSet<u16>,
    /// Of these, who has the older data, as far as the log says.
    older: BTreeMap<u16, usize>,
    /// Volumes whose nodes have nothing in common any more.
    unrelated: BTreeSet<u16>,
    /// Nodes and volumes that get new meta-data.
    renewed: BTreeSet<(usize, u16)>,
    /// Who gives its data up then.
    victim: usize,
    /// Volumes of a node that can only become well again as Secondary.
    demotions: [BTreeSet<u16>; 2],
    /// How often a split brain stayed unresolved.
    splits: u32,
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
    let (layout, mut superblock) = create_md(&mut disk);
    if setup.is_in_sync {
        superblock.la_size = SectorCount(sectors);
        superblock.current = Gi(0x1234_5678_9ABC_DEF0);
        superblock.bitmap = Gi(0);
        superblock.flags |= Flags::CONSISTENT | Flags::WAS_UP_TO_DATE;
        disk.write_block(layout.superblock.0, Box::new(superblock.to_disk()), true);
    }
    disk.is_volatile = setup.is_volatile;
    disk.atom = setup.atom;
    disk.flush_all();
    disk
}

/// What `drbdmeta create-md` does.
fn create_md(disk: &mut SimDisk) -> (Layout, Superblock) {
    let meta_len = ByteLen(disk.meta_len);
    let layout = Layout::for_new(Placement::FlexExternal, meta_len, AlGeometry::default())
        .expect("1 MiB is enough");
    for t in 0..layout.al_geometry.blocks() {
        disk.write_block(layout.al_block(t).0, Box::new(initialised_block()), true);
    }
    let superblock = Superblock::new(&layout, 0);
    disk.write_block(layout.superblock.0, Box::new(superblock.to_disk()), true);
    (layout, superblock)
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
            outgrown: BTreeSet::new(),
            older: BTreeMap::new(),
            unrelated: BTreeSet::new(),
            renewed: BTreeSet::new(),
            victim: 1,
            demotions: [BTreeSet::new(), BTreeSet::new()],
            splits: 0,
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
}
