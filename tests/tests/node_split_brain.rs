//! Split brain with every policy: two daemons, drbdadm, and data on both sides.
//!
//! Every row begins with two equal nodes. The connection breaks, both become Primary and write, and
//! they meet again. Spec: states-and-generations.md §4.6, §15.2.

use std::os::unix::fs::FileExt as _;

use anyhow::{Context as _, Result, ensure};
use drbdrs_tests::need::trial;
use drbdrs_tests::nodes::{Node, Pair, Programs, eventually};
use drbdrs_workload::nbd::Client;
use libtest_mimic::{Arguments, Failed, Trial};

const DISK: u64 = 8 << 20;
const BLOCK: usize = 4096;
/// Where alpha writes, and where beta does.
const PLACES: [u64; 2] = [1 << 20, 3 << 20];
const FAST: &str = "disk { c-plan-ahead 0; resync-rate 100M; }";

const UNRESOLVED: &str = "Split-Brain detected but unresolved, dropping connection!";
const BUT_PRIMARY: &str = "I shall become SyncTarget, but I am primary!";
const NO_DECISION: &str = "Using discard-least-changes instead";
const CALLED: &str = "pri-lost-after-sb minor-@0 exit code 0";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// Alpha's data is on both.
    Alpha,
    /// Beta's.
    Beta,
    /// Somebody has to decide.
    Undecided,
}

#[derive(Clone, Copy, Debug)]
struct Row {
    /// Options of the connection.
    net: &'static str,
    /// Blocks that each node writes.
    blocks: [usize; 2],
    /// Was alpha Primary when the connection broke? Else nobody was.
    alpha_is_older: bool,
    /// Which are Primary when they meet.
    primary: [bool; 2],
    end: End,
    /// What one of them says.
    says: &'static str,
}

const fn row(net: &'static str, end: End, says: &'static str) -> Row {
    Row { net, blocks: [5, 3], alpha_is_older: true, primary: [false, false], end, says }
}

impl Row {
    const fn wrote(mut self, alpha: usize, beta: usize) -> Self {
        self.blocks = [alpha, beta];
        self
    }

    const fn none_older(mut self) -> Self {
        self.alpha_is_older = false;
        self
    }
}

const SOLVED_0: &str = "Split-Brain detected, 0 primaries, automatically solved.";
const SOLVED_1: &str = "Split-Brain detected, 1 primaries, automatically solved.";
const SOLVED_2: &str = "Split-Brain detected, 2 primaries, automatically solved.";

const NO_PRIMARY: &[Row] = &[
    row("", End::Undecided, UNRESOLVED),
    row("after-sb-0pri disconnect;", End::Undecided, UNRESOLVED),
    row("after-sb-0pri discard-younger-primary;", End::Alpha, SOLVED_0),
    row("after-sb-0pri discard-younger-primary;", End::Alpha, NO_DECISION).none_older(),
    row("after-sb-0pri discard-older-primary;", End::Beta, SOLVED_0),
    row("after-sb-0pri discard-older-primary;", End::Alpha, NO_DECISION).none_older(),
    row("after-sb-0pri discard-zero-changes;", End::Beta, SOLVED_0).wrote(0, 3),
    row("after-sb-0pri discard-zero-changes;", End::Alpha, SOLVED_0).wrote(5, 0),
    row("after-sb-0pri discard-zero-changes;", End::Undecided, UNRESOLVED),
    row("after-sb-0pri discard-least-changes;", End::Alpha, SOLVED_0),
    row("after-sb-0pri discard-least-changes;", End::Beta, SOLVED_0).wrote(2, 3),
    row("after-sb-0pri discard-node-alpha;", End::Beta, SOLVED_0),
    row("after-sb-0pri discard-node-beta;", End::Alpha, SOLVED_0),
];

/// Alpha is Primary.
const ONE_PRIMARY: &[Row] = &[
    // The policy for no Primary says that the Primary loses ...
    row("after-sb-0pri discard-older-primary;", End::Undecided, UNRESOLVED),
    row(
        "after-sb-0pri discard-older-primary; after-sb-1pri consensus;",
        End::Undecided,
        UNRESOLVED,
    ),
    row(
        "after-sb-0pri discard-older-primary; after-sb-1pri discard-secondary;",
        End::Alpha,
        SOLVED_1,
    ),
    row(
        "after-sb-0pri discard-older-primary; after-sb-1pri violently-as0p;",
        End::Undecided,
        BUT_PRIMARY,
    ),
    row(
        "after-sb-0pri discard-older-primary; after-sb-1pri violently-as0p; rr-conflict violently;",
        End::Beta,
        SOLVED_1,
    ),
    row(
        "after-sb-0pri discard-older-primary; after-sb-1pri call-pri-lost-after-sb;",
        End::Undecided,
        CALLED,
    ),
    // ... or the Secondary.
    row("after-sb-0pri discard-younger-primary; after-sb-1pri consensus;", End::Alpha, SOLVED_1),
    row(
        "after-sb-0pri discard-younger-primary; after-sb-1pri discard-secondary;",
        End::Alpha,
        SOLVED_1,
    ),
    row(
        "after-sb-0pri discard-younger-primary; after-sb-1pri violently-as0p;",
        End::Alpha,
        SOLVED_1,
    ),
    row(
        "after-sb-0pri discard-younger-primary; after-sb-1pri call-pri-lost-after-sb;",
        End::Alpha,
        SOLVED_1,
    ),
];

const TWO_PRIMARIES: &[Row] = &[
    row("after-sb-0pri discard-least-changes;", End::Undecided, UNRESOLVED),
    row(
        "after-sb-0pri discard-least-changes; after-sb-2pri violently-as0p;",
        End::Undecided,
        BUT_PRIMARY,
    ),
    row(
        "after-sb-0pri discard-least-changes; after-sb-2pri violently-as0p; rr-conflict violently;",
        End::Alpha,
        SOLVED_2,
    ),
    row(
        "after-sb-0pri discard-least-changes; after-sb-2pri call-pri-lost-after-sb;",
        End::Undecided,
        CALLED,
    ),
];

fn main() {
    let args = Arguments::from_args();
    let suites: [(&str, &[Row], [bool; 2]); 3] = [
        ("no_primary", NO_PRIMARY, [false, false]),
        ("one_primary", ONE_PRIMARY, [true, false]),
        ("two_primaries", TWO_PRIMARIES, [true, true]),
    ];
    let trials: Vec<Trial> = suites
        .into_iter()
        .map(|(name, rows, primary)| {
            trial(&format!("split_brain_with_{name}"), &[], move || {
                all(rows, primary).map_err(|e| Failed::from(format!("{e:#}")))
            })
        })
        .collect();
    libtest_mimic::run(&args, trials).exit();
}

fn all(rows: &[Row], primary: [bool; 2]) -> Result<()> {
    let mut pair = Pair::new(&Programs::build(), 1, DISK, FAST, "")?;
    pair.in_sync("[node]\nhandler-program = \"/bin/true\"\n")?;
    pair.nodes[0].adm(&["secondary", "r0"])?.ok()?;
    for (n, row) in (1..).zip(rows) {
        let row = Row { primary, ..*row };
        let split = Split { pair: &pair, row, mark: n };
        let logs = split.logs()?;
        split.run().with_context(|| {
            let since = split.logs_since(&logs).unwrap_or_default();
            format!("{row:?}\nalpha:\n{}\nbeta:\n{}", since[0], since[1])
        })?;
    }
    Ok(())
}

struct Split<'a> {
    pair: &'a Pair,
    row: Row,
    /// Differs from row to row.
    mark: u8,
}

impl Split<'_> {
    fn logs(&self) -> Result<[usize; 2]> {
        let [alpha, beta] = &self.pair.nodes;
        Ok([alpha.log()?.len(), beta.log()?.len()])
    }

    fn logs_since(&self, start: &[usize; 2]) -> Result<[String; 2]> {
        let [alpha, beta] = &self.pair.nodes;
        let [alpha, beta] = [alpha.log()?, beta.log()?];
        Ok([alpha.get(start[0]..), beta.get(start[1]..)].map(|log| log.unwrap_or_default().into()))
    }

    fn run(&self) -> Result<()> {
        let before = self.disks()?;
        let start = self.logs()?;
        self.configure(self.row.net)?;
        self.part()?;
        for (node, is_primary) in self.pair.nodes.iter().zip(self.row.primary) {
            if !is_primary {
                node.adm(&["secondary", "r0"])?.ok()?;
            }
        }
        for node in &self.pair.nodes {
            node.adm(&["connect", "r0"])?.ok()?;
        }
        let wanted = self.pair.nodes[0].minors(self.row.says);
        eventually(|| {
            let logs = self.logs_since(&start)?;
            let is_said = logs.iter().any(|log| log.contains(&wanted));
            Ok(if is_said { Ok(()) } else { Err(format!("{wanted} is not in {logs:?}")) })
        })?;
        if self.row.end == End::Undecided {
            self.nobody_lost_anything()?;
            self.solve()?;
            return self.judge(End::Alpha, &before);
        }
        self.until_in_sync()?;
        self.judge(self.row.end, &before)
    }

    fn configure(&self, net: &str) -> Result<()> {
        let two = if self.row.primary == [true, true] { "allow-two-primaries;" } else { "" };
        self.pair.configure(&format!("{FAST} net {{ {two} {net} }}"))
    }

    /// The connection breaks, and both become Primary and write.
    fn part(&self) -> Result<()> {
        let [alpha, beta] = &self.pair.nodes;
        if self.row.alpha_is_older {
            alpha.adm(&["primary", "r0"])?.ok()?;
        }
        alpha.adm(&["disconnect", "--force", "r0"])?.ok()?;
        beta.until("cs:WFConnection")?;
        beta.adm(&["disconnect", "r0"])?.ok()?;
        for (n, node) in self.pair.nodes.iter().enumerate() {
            node.until("cs:StandAlone")?;
            node.adm(&["primary", "r0"])?.ok()?;
            let mut client = Client::open(&node.server())?;
            for block in 0..self.row.blocks[n] {
                let at = PLACES[n] + (block * BLOCK) as u64;
                client.write(at, &[self.mark; BLOCK])?;
            }
        }
        eventually(|| {
            let texts = [alpha.proc()?, beta.proc()?];
            let is_idle = texts.iter().all(|text| text.contains(" ap:0 "));
            Ok(if is_idle { Ok(()) } else { Err(texts.concat()) })
        })
    }

    fn disks(&self) -> Result<[Vec<u8>; 2]> {
        let read = |node: &Node| -> Result<Vec<u8>> {
            let mut bytes = vec![0; 4 << 20];
            std::fs::File::open(node.disk(0))?.read_exact_at(&mut bytes, 0)?;
            Ok(bytes)
        };
        let [alpha, beta] = &self.pair.nodes;
        Ok([read(alpha)?, read(beta)?])
    }

    /// What was written by one is on both, what the other wrote is gone.
    fn judge(&self, end: End, before: &[Vec<u8>; 2]) -> Result<()> {
        let winner = usize::from(end == End::Beta);
        let [alpha, beta] = self.disks()?;
        ensure!(alpha == beta, "the disks differ");
        ensure!(before[0] == before[1], "the disks differed before");
        let mut expected = before[winner].clone();
        let at = usize::try_from(PLACES[winner])?;
        expected[at..at + self.row.blocks[winner] * BLOCK].fill(self.mark);
        ensure!(alpha == expected, "not {end:?}'s data");
        Ok(())
    }

    /// Both still have their own; at least one of them waits for a person.
    fn nobody_lost_anything(&self) -> Result<()> {
        let [alpha, beta] = &self.pair.nodes;
        eventually(|| {
            let texts = [alpha.proc()?, beta.proc()?];
            let is_over = texts.iter().any(|text| text.contains("cs:StandAlone"))
                && texts
                    .iter()
                    .all(|text| text.contains("cs:StandAlone") || text.contains("cs:WFConnection"));
            Ok(if is_over { Ok(()) } else { Err(texts.concat()) })
        })?;
        for (n, disk) in self.disks()?.iter().enumerate() {
            let at = usize::try_from(PLACES[n])?;
            let own = &disk[at..at + self.row.blocks[n] * BLOCK];
            ensure!(own.iter().all(|byte| *byte == self.mark), "node {n} lost its data");
        }
        let why = alpha.adm(&["why", "r0"])?.ok()? + &beta.adm(&["why", "r0"])?.ok()?;
        ensure!(why.to_lowercase().contains("split"), "{why}");
        Ok(())
    }

    /// A person decides for alpha.
    fn solve(&self) -> Result<()> {
        let [alpha, beta] = &self.pair.nodes;
        for node in [alpha, beta] {
            node.adm(&["disconnect", "r0"])?;
            node.until("cs:StandAlone")?;
        }
        self.configure("")?;
        beta.adm(&["secondary", "r0"])?.ok()?;
        beta.adm(&["connect", "--discard-my-data", "r0"])?.ok()?;
        alpha.adm(&["connect", "r0"])?.ok()?;
        self.until_in_sync()?;
        let log = alpha.log()?;
        let words = "Split-Brain detected, manually solved. Sync from this node";
        ensure!(log.contains(words), "{log}");
        Ok(())
    }

    fn until_in_sync(&self) -> Result<()> {
        for node in &self.pair.nodes {
            node.until("cs:Connected")?;
        }
        self.pair.until_in_sync()?;
        for node in &self.pair.nodes {
            node.adm(&["secondary", "r0"])?.ok()?;
        }
        Ok(())
    }
}
