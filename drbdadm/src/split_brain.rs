//! `split-brain explain` and `split-brain resolve`: what the original leaves to a manual page.
//!
//! What is known comes from the daemon's snapshot, the words from `drbd_admin::render`, names from
//! the configuration. Resolving runs the same backend calls that an administrator would type.

use std::io::BufRead;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bstr::{BString, ByteSlice};
use drbd_admin::render::{Reader, Side, SplitBrain, split_brain, split_brain_loss};
use drbd_admin::{Resource as Known, Snapshot};
use drbd_conf::model::Resource;
use drbd_types::Cstate;

use crate::app::{App, Exit};
use crate::lines::Lines;
use crate::run::{ends, needs_peer, run_steps};
use crate::select::volumes;
use crate::{print, setup};

/// How long a resolution may take to be seen.
const SEEN_MAX: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(200);
/// The daemon answers a question about its state at once.
const DEADLINE: Duration = Duration::from_secs(30);
/// Longest answer of a person.
const ANSWER_MAX: u64 = 256;
/// The other node has to do something before it is over.
const NOT_YET: i32 = 5;

struct Names {
    own: String,
    peer: String,
}

/// As the configuration calls the two nodes.
fn names(app: &App, resource: &Resource) -> Names {
    let peer = app.peer(resource).and_then(|host| host.names.first());
    Names {
        own: app.node.to_string(),
        peer: peer.map_or_else(|| "the peer".into(), ToString::to_string),
    }
}

fn now_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

fn reader(names: &Names) -> Reader<'_> {
    let now_us = now_us();
    Reader { own: &names.own, peer: &names.peer, now_us, east: setup::offset(now_us) }
}

fn known(name: &BString) -> Result<Known, Exit> {
    let snapshot: Snapshot = setup::snapshot(DEADLINE).map_err(|why| {
        print::stderr(why.text.as_bytes());
        Exit(20)
    })?;
    let found = snapshot.resources.into_iter().find(|r| *name == r.name.as_str());
    found.ok_or_else(|| {
        print::complain(format!("{name}: it is not up on this node"));
        Exit(10)
    })
}

/// Says what the daemon knows of a split brain of this resource.
///
/// # Errors
/// It is not up, or the daemon does not answer.
pub fn explain(app: &App, resource: &Resource) -> Result<i32, Exit> {
    let names = names(app, resource);
    let known = known(&resource.name)?;
    print::stdout(split_brain(&known, &reader(&names)).as_bytes());
    Ok(0)
}

/// What the command line asks for.
struct Wish {
    keep: Side,
    /// The node whose changes are given up, as the script knows it.
    lose: Option<BString>,
}

impl Wish {
    fn of(options: &[BString]) -> Result<Self, String> {
        let value = |name: &str| {
            let start = format!("--{name}=");
            options.iter().rev().find_map(|o| o.strip_prefix(start.as_bytes())).map(BString::from)
        };
        let keep = match value("keep").as_ref().map(|v| v.as_slice()) {
            Some(b"local") => Side::Own,
            Some(b"peer") => Side::Peer,
            _ => return Err("say whose data is kept: --keep local, or --keep peer".into()),
        };
        Ok(Self { keep, lose: value("yes-lose-changes-of") })
    }

    fn victim(&self) -> Side {
        if self.keep == Side::Own { Side::Peer } else { Side::Own }
    }
}

/// Gives up the changes of one of the two nodes.
///
/// # Errors
/// There is nothing to resolve, nobody confirmed it, or a command failed.
pub fn resolve(app: &App, resource: &Resource) -> Result<i32, Exit> {
    let refuse = |text: String| {
        print::complain(text);
        Exit(1)
    };
    let wish = Wish::of(&app.invocation.backend_options).map_err(refuse)?;
    if app.backend.dry_run {
        return Ok(give_up(app, resource, &wish, true)?.unwrap_or(0));
    }
    let names = names(app, resource);
    let name = &resource.name;
    let before = known(name)?;
    if is_connected(&before) {
        print::stdout(split_brain(&before, &reader(&names)).as_bytes());
        return Err(refuse(format!("{name}: there is no split brain to be resolved")));
    }
    if SplitBrain::of(&before) != SplitBrain::Open {
        // It may be known to the other node only. If there is none, nothing is given up.
        print::stdout(split_brain(&before, &reader(&names)).as_bytes());
    }
    confirm(&before, &wish, &names).map_err(refuse)?;
    if let Some(code) = give_up(app, resource, &wish, before.connection.is_some())? {
        return Ok(code);
    }
    let after = until_seen(name, &before)?;
    let (code, text) = report(&after, &before, wish.keep, &names);
    print::stdout(text.as_bytes());
    Ok(code)
}

/// Names what is lost, and has somebody say the name of the node that loses it.
fn confirm(known: &Known, wish: &Wish, names: &Names) -> Result<(), String> {
    let victim = if wish.victim() == Side::Own { &names.own } else { &names.peer };
    let kept = if wish.keep == Side::Own { &names.own } else { &names.peer };
    let loss = split_brain_loss(known, wish.victim(), &reader(names));
    let name = &known.name;
    print::stdout(format!("{name}: the data of {kept} is kept.\nLost is {loss}.\n").as_bytes());
    if let Some(said) = &wish.lose {
        if *said == victim.as_str() {
            return Ok(());
        }
        return Err(format!(
            "{name}: not done: --yes-lose-changes-of={said}, but it is {victim} whose changes \
             would be lost"
        ));
    }
    print::stdout(
        format!("Type the name of the node whose changes are to be lost ({victim}): ").as_bytes(),
    );
    let mut said = String::new();
    let mut input = std::io::Read::take(std::io::stdin().lock(), ANSWER_MAX);
    // An input that can not be read says nothing.
    let _ = input.read_line(&mut said);
    if said.trim() == victim {
        return Ok(());
    }
    Err(format!("{name}: not done, everything is as it was"))
}

/// Runs the commands; `Some`: one of them failed.
fn give_up(
    app: &App,
    resource: &Resource,
    wish: &Wish,
    has_connection: bool,
) -> Result<Option<i32>, Exit> {
    let (ends, is_known) = ends(app, resource)?;
    needs_peer(app, resource, is_known)?;
    let bare = Lines { resource, extra: &[] };
    let failed = |code: i32| (code != 0).then_some(code);
    if has_connection {
        let call = bare.of_connection("disconnect", ends.me.as_bstr(), ends.peer.as_bstr());
        if let Some(code) = failed(app.backend.run(&call).code) {
            return Ok(Some(code));
        }
    }
    let discard = [BString::from("--discard-my-data")];
    let mut connect = bare;
    if wish.victim() == Side::Own {
        for volume in volumes(resource) {
            let minor = volume.minor.unwrap_or_default();
            let call = bare.setup_minor("secondary", minor, crate::command::TimeClass::Medium);
            if let Some(code) = failed(app.backend.run(&call).code) {
                print::complain(format!(
                    "{}: nothing is lost yet. Stop what uses the device, then try again.",
                    resource.name
                ));
                return Ok(Some(code));
            }
        }
        connect = Lines { resource, extra: &discard };
    }
    Ok(failed(run_steps(app, &[connect.connect(&ends)])))
}

fn is_connected(known: &Known) -> bool {
    let is_up = |cstate: Cstate| cstate.number() >= Cstate::Connected.number();
    known.volumes.iter().all(|v| is_up(v.cstate))
}

/// Another handshake than before.
fn has_met_again(now: &Known, before: &Known) -> bool {
    let times = |r: &Known| -> Vec<Option<u64>> {
        r.volumes.iter().map(|v| v.handshake.as_ref().map(|met| met.at_us)).collect()
    };
    times(now) != times(before)
}

/// The state once the two nodes have met again, or after a while.
fn until_seen(name: &BString, before: &Known) -> Result<Known, Exit> {
    let end = Instant::now() + SEEN_MAX;
    loop {
        let now = known(name)?;
        let is_over = is_connected(&now) || (has_met_again(&now, before) && has_ended(&now));
        if is_over || Instant::now() >= end {
            return Ok(now);
        }
        std::thread::sleep(LOOK);
    }
}

/// No connection is being tried.
fn has_ended(known: &Known) -> bool {
    known.volumes.iter().all(|v| v.cstate == Cstate::StandAlone)
}

/// What has come of it: exit code and words.
fn report(after: &Known, before: &Known, keep: Side, names: &Names) -> (i32, String) {
    let Names { own, peer } = names;
    let name = &after.name;
    let there = if keep == Side::Own { "peer" } else { "local" };
    let on_peer = format!("  on {peer}:  drbdadm split-brain resolve {name} --keep {there}\n");
    if is_connected(after) {
        let kept = if keep == Side::Own { own } else { peer };
        return (0, format!("{name}: resolved. The data of {kept} is on its way to both nodes.\n"));
    }
    if has_met_again(after, before) && has_ended(after) {
        let text = after.volumes.iter().find_map(|v| v.handshake.as_ref());
        let why = text.map_or("", |met| met.text.as_str());
        let again = match keep {
            Side::Own => format!("  on {own}:  drbdadm connect {name}\n"),
            Side::Peer => String::new(),
        };
        let both = format!(
            "{name}: the other node was there, but does not agree ({why}).\nNothing is lost yet. \
             Run\n{on_peer}{again}"
        );
        return (NOT_YET, both);
    }
    let text = match keep {
        Side::Own => format!(
            "{name}: {own} waits for its peer, which has to give up its changes itself. Run\n\
             {on_peer}"
        ),
        Side::Peer => format!(
            "{name}: {own} gives up its changes as soon as {peer} connects. If that is StandAlone, \
             run\n  on {peer}:  drbdadm connect {name}\n"
        ),
    };
    (NOT_YET, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wishes() {
        let wish = |words: &str| {
            let words: Vec<BString> = words.split_whitespace().map(BString::from).collect();
            Wish::of(&words).map(|w| (w.keep, w.lose))
        };
        assert_eq!(wish("--keep=local"), Ok((Side::Own, None)));
        let both = wish("--yes-lose-changes-of=alpha --keep=peer");
        assert_eq!(both, Ok((Side::Peer, Some("alpha".into()))));
        for bad in ["", "--keep=both", "--yes-lose-changes-of=alpha"] {
            assert!(wish(bad).is_err(), "{bad}");
        }
    }
}
