//! Packets between the engine and the Linux DRBD 8.4 that come late, one type at a time, while
//! commands run on both sides: the pair always finds together again, with equal disks.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use drbd_wire::Command;
use drbdrs_tests::interop::row;
use drbdrs_tests::kernel_life::{ACTS, Act, Life};
use drbdrs_tests::packet_proxy::Sender;
use libtest_mimic::Arguments;

fn main() {
    let args = Arguments::from_args();
    let tests = vec![
        row(8, "Primary", "late_packets_while_we_are_primary", || races(Sender::Own)),
        row(8, "Secondary", "late_packets_while_the_kernel_is_primary", || races(Sender::Kernel)),
    ];
    libtest_mimic::run(&args, tests).exit();
}

/// What makes a packet travel.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Trigger {
    /// The link breaks, the Primary writes, the link is mended.
    Reconnect,
    /// The Primary writes.
    Write,
    /// This command of its sender does it, or, for a reply, of the other side.
    Command(Act),
}

/// All types that matter, by who can send them when the Primary is given.
fn kinds(primary: Sender) -> Vec<((Sender, Command), Trigger)> {
    let mut kinds = Vec::new();
    for from in [Sender::Own, Sender::Kernel] {
        for command in [Command::Sizes, Command::Uuids, Command::State] {
            kinds.push(((from, command), Trigger::Reconnect));
        }
        kinds.push(((from, Command::CompressedBitmap), Trigger::Reconnect));
        for (command, act) in [
            (Command::StateChgReq, Act::Verify),
            (Command::StateChgReply, Act::Verify),
            (Command::ConnStChgReq, Act::Reconnect),
            (Command::ConnStChgReply, Act::Reconnect),
        ] {
            kinds.push(((from, command), Trigger::Command(act)));
        }
    }
    kinds.push(((primary, Command::SyncUuid), Trigger::Reconnect));
    kinds.push(((primary.other(), Command::RsWriteAck), Trigger::Reconnect));
    kinds.push(((primary.other(), Command::BarrierAck), Trigger::Write));
    kinds
}

/// Each type is held once, and delayed once, with other commands each time. `DRBDRS_CASES` is how
/// many more rounds there are, `DRBDRS_SEED` where the pairs of commands begin.
fn races(primary: Sender) -> Result<()> {
    let variable = |name| std::env::var(name).ok().and_then(|v| v.parse::<usize>().ok());
    let rounds = variable("DRBDRS_CASES").unwrap_or(1);
    let mut pair = variable("DRBDRS_SEED").unwrap_or(if primary == Sender::Own { 0 } else { 18 });
    let mut life = Life::begin(primary)?;
    let mut reached = 0;
    for round in 0..rounds {
        for (index, (kind, trigger)) in kinds(primary).into_iter().enumerate() {
            // All 36 pairs come up in turn.
            let mut acts = (ACTS[pair % 6], ACTS[(pair / 6 + pair) % 6]);
            pair += 1;
            if let Trigger::Command(act) = trigger {
                let is_reply = matches!(kind.1, Command::StateChgReply | Command::ConnStChgReply);
                let actor = if is_reply { kind.0.other() } else { kind.0 };
                *if actor == Sender::Own { &mut acts.0 } else { &mut acts.1 } = act;
            }
            let is_held = (index + round) % 4 != 3;
            let start = Instant::now();
            let what = format!("{kind:?} {trigger:?} {acts:?} held {is_held}");
            let was_reached = one(&mut life, kind, trigger, acts, is_held);
            let was_reached = was_reached.and_then(|reached| life.settle().map(|()| reached));
            let was_reached = was_reached.with_context(|| what.clone())?;
            println!("{what}: reached {was_reached}, {:.1?}", start.elapsed());
            // The other side's command may have come first.
            let is_sure = !matches!(trigger, Trigger::Command(_));
            ensure!(was_reached || !is_sure, "{what}: no such packet came");
            reached += usize::from(was_reached);
        }
    }
    let all = rounds * kinds(primary).len();
    println!("{reached} of {all} cases met their packet");
    ensure!(reached * 5 >= all * 4, "only {reached} of {all} cases met their packet");
    Ok(())
}

fn one(
    life: &mut Life,
    kind: (Sender, Command),
    trigger: Trigger,
    acts: (Act, Act),
    is_held: bool,
) -> Result<bool> {
    let before = life.both.gate.seen(kind);
    if trigger == Trigger::Reconnect {
        life.cut()?;
        life.write()?;
        // It is written before the link comes back.
        sleep(Duration::from_millis(200));
    }
    if is_held {
        life.both.gate.hold(kind);
    } else {
        life.both.gate.delay(kind, Duration::from_millis(300));
    }
    match trigger {
        Trigger::Reconnect => life.both.cut(false),
        Trigger::Write => life.write()?,
        Trigger::Command(_) => {}
    }
    let start = Instant::now();
    while !matches!(trigger, Trigger::Command(_))
        && life.both.gate.seen(kind) == before
        && start.elapsed() < Duration::from_secs(20)
    {
        sleep(Duration::from_millis(5));
    }
    life.act(Some(acts.0), Some(acts.1), |life| {
        if acts.0 != Act::Role && acts.1 != Act::Role {
            life.write()?;
        }
        sleep(Duration::from_millis(600));
        life.both.gate.open();
        Ok(())
    })?;
    Ok(life.both.gate.seen(kind) > before)
}
