//! What people and monitors see of a pair of daemons: split brain in words, `drbdadm check`, the
//! original's drbdmon on a terminal.

use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use drbdrs_tests::need::{Case, Need, suite};
use drbdrs_tests::nodes::{Did, Node, Pair, Programs, eventually};
use drbdrs_workload::nbd::Client;
use rustix::process::Signal;

const DISK: u64 = 8 << 20;
const FAST: &str = "disk { c-plan-ahead 0; resync-rate 100M; }";
const SETTINGS: &str = "[node]\nhandler-program = \"/bin/true\"\n";
const DRBDMON: Need = Need::File("/usr/sbin/drbdmon");
const TMUX: Need = Need::Program("tmux");

fn main() {
    let tests: [Case<'_>; 6] = [
        ("a_split_brain_is_explained_and_resolved_for_the_peer", &[], keep_peer),
        ("a_split_brain_is_resolved_for_this_node_once_the_peer_agrees", &[], keep_local),
        ("a_split_brain_is_resolved_by_a_node_that_has_forgotten_it", &[], forgotten),
        ("nothing_is_lost_without_the_right_name", &[], unconfirmed),
        ("check_has_four_exit_codes", &[], check),
        ("the_originals_drbdmon", &[DRBDMON, TMUX], drbdmon),
    ];
    suite(&tests);
}

// ---- split brain ----

/// Two nodes that have written 5 and 3 blocks without each other and have met again.
fn split() -> Result<Pair> {
    let mut pair = Pair::new(&Programs::build(), 1, DISK, FAST, "")?;
    pair.in_sync(SETTINGS)?;
    let [alpha, beta] = &pair.nodes;
    alpha.adm(&["disconnect", "--force", "r0"])?.ok()?;
    beta.until("cs:WFConnection")?;
    beta.adm(&["disconnect", "r0"])?.ok()?;
    for (node, blocks, mark) in [(alpha, 5, 0x11), (beta, 3, 0x22)] {
        node.until("cs:StandAlone")?;
        node.adm(&["primary", "r0"])?.ok()?;
        Client::open(&node.server())?.write(0, &vec![mark; blocks * 4096])?;
        eventually(|| {
            let did = node.adm(&["secondary", "r0"])?;
            Ok(if did.code == 0 { Ok(()) } else { Err(format!("{did:?}")) })
        })?;
    }
    meet(&pair)?;
    Ok(pair)
}

/// They meet until both know: who finds out first hangs up, which the other one may not understand.
fn meet(pair: &Pair) -> Result<()> {
    for _ in 0..50 {
        for node in &pair.nodes {
            node.adm(&["disconnect", "r0"])?;
            node.adm(&["connect", "r0"])?.ok()?;
        }
        eventually(|| {
            let states = [pair.nodes[0].proc()?, pair.nodes[1].proc()?];
            let is_over = states.iter().any(|text| text.contains("cs:StandAlone"))
                && states.iter().all(|text| !text.contains("cs:WFReportParams"));
            Ok(if is_over { Ok(()) } else { Err(states.concat()) })
        })?;
        let texts = [explained(&pair.nodes[0])?, explained(&pair.nodes[1])?];
        let knowing = texts.iter().filter(|text| text.starts_with("r0: SPLIT BRAIN\n")).count();
        ensure!(knowing > 0, "nobody knows: {texts:?}");
        if knowing == 2 {
            return Ok(());
        }
        contains(&texts.concat(), &["r0: no split brain that this node knows of\n"])?;
    }
    bail!("one of the two never understood");
}

fn explained(node: &Node) -> Result<String> {
    node.adm(&["split-brain", "explain"])?.ok()
}

fn data(node: &Node) -> Result<u8> {
    node.adm(&["primary", "r0"])?.ok()?;
    let mut bytes = vec![0; 5 * 4096];
    Client::open(&node.server())?.read(0, &mut bytes)?;
    Ok(*bytes.first().context("bytes")?)
}

fn contains(text: &str, parts: &[&str]) -> Result<()> {
    for part in parts {
        ensure!(text.contains(part), "no {part:?} in\n{text}");
    }
    Ok(())
}

fn both_have(pair: &Pair, mark: u8) -> Result<()> {
    pair.until_in_sync()?;
    let [alpha, beta] = &pair.nodes;
    ensure!(data(alpha)? == mark, "alpha has something else");
    eventually(|| {
        let did = alpha.adm(&["secondary", "r0"])?;
        Ok(if did.code == 0 { Ok(()) } else { Err(format!("{did:?}")) })
    })?;
    ensure!(data(beta)? == mark, "beta has something else");
    Ok(())
}

fn keep_peer() -> Result<()> {
    let pair = split()?;
    let [alpha, beta] = &pair.nodes;
    contains(
        &explained(alpha)?,
        &[
            "the two nodes lost each other",
            "alpha began to go on alone (a new data generation)",
            "they met and compared their data (rule 90, split-brain-unresolved)",
            "alpha                 beta\n",
            "at most 20 KiB        at most 12 KiB\n",
            "drbdadm split-brain resolve r0 --keep peer\n    Lost: everything that alpha has \
             written since the two parted: at most 20 KiB of volume 0.",
        ],
    )?;
    // The same identifiers that the tools show, on both sides.
    for (n, [own, peer]) in [(0, [alpha, beta]), (1, [beta, alpha])] {
        let text = explained(own)?;
        for (node, column) in [(own, "own"), (peer, "peer")] {
            let all = node.setup(&["get-gi", "@0"])?.ok()?;
            let current = all.split(':').next().context("a generation")?;
            ensure!(text.contains(current), "node {n}: no {column} {current} in\n{text}");
        }
    }
    // The survivor waits, and the other one agrees to lose.
    alpha.adm(&["disconnect", "r0"])?;
    alpha.adm(&["connect", "r0"])?.ok()?;
    let words = ["split-brain", "resolve", "r0", "--keep", "peer", "--yes-lose-changes-of=beta"];
    let text = beta.adm(&words)?.ok()?;
    contains(
        &text,
        &[
            "r0: the data of alpha is kept.\nLost is everything that beta has written since the \
             two parted: at most 12 KiB of volume 0.\n",
            "r0: resolved. The data of alpha is on its way to both nodes.\n",
        ],
    )?;
    both_have(&pair, 0x11)?;
    contains(&explained(beta)?, &["r0: no split brain any more\n", "The data of alpha was kept"])
}

fn keep_local() -> Result<()> {
    let pair = split()?;
    let [alpha, beta] = &pair.nodes;
    let words = ["split-brain", "resolve", "r0", "--keep", "local", "--yes-lose-changes-of=alpha"];
    let did = beta.adm(&words)?;
    ensure!(did.code == 5, "{did:?}");
    contains(&did.out, &["  on alpha:  drbdadm split-brain resolve r0 --keep peer\n"])?;
    // Whatever state that left beta in: it waits once it is told so, and alpha gives up.
    if beta.proc()?.contains("cs:StandAlone") {
        beta.adm(&["connect", "r0"])?.ok()?;
    }
    let words = ["split-brain", "resolve", "r0", "--keep", "peer", "--yes-lose-changes-of=alpha"];
    alpha.adm(&words)?.ok()?;
    both_have(&pair, 0x22)
}

fn forgotten() -> Result<()> {
    let mut pair = split()?;
    pair.nodes[0].adm(&["disconnect", "r0"])?;
    let beta = &mut pair.nodes[1];
    beta.stop(Signal::TERM)?;
    beta.start(SETTINGS)?;
    beta.adm(&["up", "r0"])?.ok()?;
    let [alpha, beta] = &pair.nodes;
    alpha.until("cs:StandAlone")?;
    beta.until("cs:WFConnection")?;
    contains(&explained(beta)?, &["r0: no split brain that this node knows of\n"])?;
    let words = ["split-brain", "resolve", "r0", "--keep", "peer", "--yes-lose-changes-of=beta"];
    let did = beta.adm(&words)?;
    ensure!(did.code == 5, "{did:?}");
    contains(
        &did.out,
        &[
            "beta has written since the two parted: at most 12 KiB of volume 0.\n",
            "beta gives up its changes as soon as alpha connects.",
            "  on alpha:  drbdadm connect r0\n",
        ],
    )?;
    alpha.adm(&["connect", "r0"])?.ok()?;
    both_have(&pair, 0x11)
}

fn typed(node: &Node, words: &[&str], answer: &str) -> Result<Did> {
    let mut child = node
        .adm_command(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    // It may have refused before it asks.
    let _ = child.stdin.take().context("stdin")?.write_all(answer.as_bytes());
    Ok(child.wait_with_output()?.into())
}

fn unconfirmed() -> Result<()> {
    let pair = split()?;
    let [_, beta] = &pair.nodes;
    let resolve = ["split-brain", "resolve", "r0", "--keep", "peer"];
    let before = beta.setup(&["get-gi", "@0"])?.ok()?;
    for answer in ["", "\n", "yes\n", "alpha\n", "bet\n"] {
        let did = typed(beta, &resolve, answer)?;
        ensure!(did.code == 1, "{answer:?}: {did:?}");
        contains(&did.err, &["r0: not done, everything is as it was"])?;
    }
    for option in ["--yes-lose-changes-of=alpha", "--yes-lose-changes-of="] {
        let words: Vec<&str> = resolve.iter().copied().chain([option]).collect();
        let did = beta.adm(&words)?;
        ensure!(did.code == 1 && did.err.contains("it is beta whose changes"), "{did:?}");
    }
    for words in [&["split-brain", "resolve", "r0"][..], &["split-brain", "resolve"]] {
        ensure!(beta.adm(words)?.code == 1, "{words:?}");
    }
    ensure!(beta.setup(&["get-gi", "@0"])?.ok()? == before, "something has happened");
    // A dry run needs no confirmation, and does nothing.
    let words = ["-d", "split-brain", "resolve", "r0", "--keep", "peer"];
    let text = beta.adm(&words)?.ok()?;
    let calls: Vec<&str> = text.lines().filter_map(|line| line.split(' ').nth(1)).collect();
    ensure!(calls == ["disconnect", "secondary", "connect"], "{text}");
    ensure!(text.ends_with(" --discard-my-data\n"), "{text}");
    ensure!(beta.setup(&["get-gi", "@0"])?.ok()? == before, "something has happened");
    // The right name is enough, with the peer waiting.
    pair.nodes[0].adm(&["disconnect", "r0"])?;
    pair.nodes[0].adm(&["connect", "r0"])?.ok()?;
    let did = typed(beta, &resolve, "beta\n")?;
    ensure!(did.code == 0, "{did:?}");
    both_have(&pair, 0x11)?;
    let did = beta.adm(&resolve)?;
    ensure!(did.code == 1 && did.err.contains("no split brain to be resolved"), "{did:?}");
    // The handler of the same name is still there: it has no command here.
    ensure!(beta.adm(&["split-brain", "minor-@0"])?.code == 0, "the handler");
    Ok(())
}

// ---- check ----

fn check() -> Result<()> {
    let mut pair = Pair::new(&Programs::build(), 1, DISK, FAST, "")?;
    let sees = |node: &Node, words: &[&str], code: i32, part: &str| -> Result<()> {
        let did = node.adm(words)?;
        let name = ["OK", "WARNING", "CRITICAL", "UNKNOWN"][usize::try_from(code)?];
        let start = format!("DRBD {name} - ");
        ensure!(did.code == code && did.out.starts_with(&start), "{words:?}: {did:?}");
        ensure!(did.out.contains(part) && did.out.lines().count() == 1, "{words:?}: {did:?}");
        Ok(())
    };
    sees(&pair.nodes[0], &["check"], 2, "Could not connect to the drbdrs daemon")?;
    pair.nodes[0].start(SETTINGS)?;
    sees(&pair.nodes[0], &["check"], 2, "r0: not up")?;
    drop(pair);
    let pair = split()?;
    let [alpha, beta] = &pair.nodes;
    sees(alpha, &["check", "r0"], 2, "r0: split brain")?;
    alpha.adm(&["disconnect", "r0"])?;
    alpha.adm(&["connect", "r0"])?.ok()?;
    let words = ["split-brain", "resolve", "r0", "--keep", "peer", "--yes-lose-changes-of=beta"];
    beta.adm(&words)?.ok()?;
    pair.until_in_sync()?;
    sees(alpha, &["check"], 0, "r0: Secondary, UpToDate/UpToDate | 'r0/0 out of sync'=0B;1024;")?;
    beta.adm(&["disconnect", "r0"])?.ok()?;
    sees(alpha, &["check", "r0"], 1, "r0/0: one current copy (WFConnection, UpToDate/")?;
    sees(alpha, &["check", "--apart-critical=0"], 2, "r0/0: one current copy (WFConnection")?;
    sees(alpha, &["check", "nosuch"], 3, "the configuration or a name is wrong")?;
    sees(alpha, &["check", "--oldest-warning=soon"], 3, "a number, or never")?;
    for words in [&["check", "--frobnicate"][..], &["check", "--keep=local"]] {
        ensure!(alpha.adm(words)?.code == 3, "wrong usage is no warning: {words:?}");
    }
    Ok(())
}

// ---- drbdmon ----

/// A program in a terminal of its own.
struct Terminal {
    socket: String,
}

impl Terminal {
    fn run(pair: &Pair, command: &str) -> Result<Self> {
        let terminal = Self { socket: pair.dir.path().join("tmux").display().to_string() };
        terminal.tmux(&["new-session", "-d", "-x", "120", "-y", "30", command])?;
        Ok(terminal)
    }

    fn tmux(&self, words: &[&str]) -> Result<String> {
        let mut command = Command::new("tmux");
        command.args(["-f", "/dev/null", "-S", &self.socket]).args(words);
        Did::from(command.env("LC_ALL", "C.UTF-8").stdin(Stdio::null()).output()?).ok()
    }

    fn until(&self, is_there: impl Fn(&str) -> bool) -> Result<String> {
        eventually(|| {
            let screen = self.tmux(&["capture-pane", "-p"])?;
            Ok(if is_there(&screen) { Ok(screen) } else { Err(screen) })
        })
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It ends with its program, too.
        let _ = self.tmux(&["kill-server"]);
    }
}

fn drbdmon() -> Result<()> {
    let mut pair = Pair::new(&Programs::build(), 1, DISK, FAST, "")?;
    pair.in_sync(SETTINGS)?;
    let [alpha, beta] = &pair.nodes;
    // It looks for drbdsetup where the shell does.
    let path = alpha.programs_on_path(pair.dir.path())?;
    let socket = alpha.socket();
    let errors = pair.dir.path().join("errors");
    let terminal = Terminal::run(
        &pair,
        &format!(
            "env PATH={path}:/usr/bin:/bin DRBDRS_ADMIN_SOCKET={} /usr/sbin/drbdmon 2>{}",
            socket.display(),
            errors.display()
        ),
    )?;
    let has = |screen: &str, parts: &[&str]| {
        screen.lines().any(|line| parts.iter().all(|part| line.contains(part)))
    };
    let minor = alpha.minors("@0");
    let good = |screen: &str| {
        has(screen, &["RES: r0", "Primary", &minor])
            && has(screen, &["peer"])
            && screen.contains("Resources:      1")
            && !screen.contains("degraded")
    };
    terminal.until(good)?;
    beta.adm(&["disconnect", "r0"])?.ok()?;
    terminal.until(|screen| {
        has(screen, &["peer", "Connecting", "Unknown"]) && screen.contains("(1 degraded)")
    })?;
    terminal.tmux(&["send-keys", "p"])?;
    terminal.until(|screen| has(screen, &["RES: r0"]) && has(screen, &["Connecting"]))?;
    beta.adm(&["connect", "r0"])?.ok()?;
    terminal.until(|screen| screen.contains("No resources with problems to display"))?;
    terminal.tmux(&["send-keys", "p"])?;
    beta.adm(&["detach", "r0"])?.ok()?;
    terminal.until(|screen| has(screen, &["peer"]) && screen.contains("Diskless"))?;
    beta.adm(&["attach", "r0"])?.ok()?;
    terminal.until(good)?;
    alpha.adm(&["secondary", "r0"])?.ok()?;
    alpha.adm(&["down", "r0"])?.ok()?;
    terminal.until(|screen| screen.contains("No active DRBD resources"))?;
    alpha.adm(&["up", "r0"])?.ok()?;
    let screen = terminal.until(|screen| has(screen, &["RES: r0", "Secondary"]))?;
    ensure!(!screen.contains("rror"), "{screen}");
    let said = std::fs::read_to_string(&errors)?;
    ensure!(said.is_empty(), "{said}");
    Ok(())
}
