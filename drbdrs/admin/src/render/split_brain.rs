//! A split brain for people: what happened, since when, how much differs, and what resolves it.

use std::fmt::Write;

use drbd_types::Cstate;

use super::timestamp;
use crate::{Handshake, HandshakeSide, Outcome, Resource, Volume};

/// Names and clock of the reader.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a> {
    /// This node.
    pub own: &'a str,
    /// The peer.
    pub peer: &'a str,
    /// Microseconds since 1970.
    pub now_us: u64,
    /// Seconds that its clock is east of UTC.
    pub east: i32,
}

/// Whose data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// This node's.
    Own,
    /// The peer's.
    Peer,
}

/// How a resource stands to a split brain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SplitBrain {
    /// There is none that this daemon knows of.
    None,
    /// Somebody has to decide.
    Open,
    /// It was decided for this side, and the connection was lost before it was carried out.
    Interrupted(Side),
    /// It was decided for this side, and the resync runs.
    Resyncing(Side),
    /// It was decided for this side, and is over.
    Over(Side),
}

impl SplitBrain {
    /// Of a resource: the worst of its volumes.
    #[must_use]
    pub fn of(resource: &Resource) -> Self {
        let rank = |state: &Self| match state {
            Self::None => 0,
            Self::Over(_) => 1,
            Self::Resyncing(_) => 2,
            Self::Interrupted(_) => 3,
            Self::Open => 4,
        };
        resource.volumes.iter().map(Self::of_volume).max_by_key(rank).unwrap_or(Self::None)
    }

    fn of_volume(volume: &Volume) -> Self {
        let Some(met) = volume.handshake.as_ref().filter(|met| met.is_split_brain) else {
            return Self::None;
        };
        let is_connected = volume.cstate.number() >= Cstate::Connected.number();
        let side = match met.outcome {
            // A handshake that failed for an attach leaves the connection.
            Outcome::Failed if is_connected => return Self::None,
            Outcome::Failed => return Self::Open,
            Outcome::Source => Side::Own,
            Outcome::Target => Side::Peer,
            Outcome::Connected => return Self::None,
        };
        match (is_connected, volume.cstate.is_sync()) {
            (false, _) => Self::Interrupted(side),
            (true, true) => Self::Resyncing(side),
            (true, false) => Self::Over(side),
        }
    }
}

/// The explanation.
#[must_use]
pub fn split_brain(resource: &Resource, reader: &Reader<'_>) -> String {
    let name = &resource.name;
    let kept = |side| if side == Side::Own { reader.own } else { reader.peer };
    let mut text = match SplitBrain::of(resource) {
        SplitBrain::None => return none(resource),
        SplitBrain::Open => format!(
            "{name}: SPLIT BRAIN\n\
             Both nodes have changed the data without each other, and nothing says whose changes \
             are to be kept.\nThey do not connect until somebody decides. Neither has lost \
             anything yet.\n"
        ),
        SplitBrain::Interrupted(side) => format!(
            "{name}: split brain, decided but not carried out\n\
             Both nodes had changed the data without each other. The data of {} is kept, but the \
             connection was lost.\n'drbdadm connect {name}' on both nodes goes on. If the other \
             node refuses, ask it: 'drbdadm split-brain explain {name}'.\n",
            kept(side)
        ),
        SplitBrain::Resyncing(side) => format!(
            "{name}: split brain, being resolved\n\
             Both nodes had changed the data without each other. The data of {} is kept and is \
             being copied to the other node.\n",
            kept(side)
        ),
        SplitBrain::Over(side) => format!(
            "{name}: no split brain any more\n\
             Both nodes had changed the data without each other. The data of {} was kept, the \
             other node's changes were dropped.\n",
            kept(side)
        ),
    };
    history(&mut text, resource, reader);
    for volume in &resource.volumes {
        if let Some(met) = &volume.handshake {
            two_sides(&mut text, volume, met, reader);
        }
    }
    if SplitBrain::of(resource) == SplitBrain::Open {
        ways_out(&mut text, resource, reader);
    }
    text
}

fn none(resource: &Resource) -> String {
    let name = &resource.name;
    let failed = resource.volumes.iter().find_map(|v| {
        let met = v.handshake.as_ref().filter(|met| met.outcome == Outcome::Failed)?;
        let is_connected = v.cstate.number() >= Cstate::Connected.number();
        (!is_connected).then_some(met)
    });
    match failed {
        Some(met) => format!(
            "{name}: no split brain\nThe last handshake failed for another reason: {} [{}].\n",
            met.text, met.code
        ),
        None if is_apart(resource) => format!(
            "{name}: no split brain that this node knows of\n\
             It is not connected. If the other node is StandAlone, ask that one: it may have found \
             out and hung up first.\n"
        ),
        None => format!("{name}: no split brain\n"),
    }
}

/// At least one volume is not connected.
fn is_apart(resource: &Resource) -> bool {
    resource.volumes.iter().any(|v| v.cstate.number() < Cstate::Connected.number())
}

/// When what happened.
fn history(text: &mut String, resource: &Resource, reader: &Reader<'_>) {
    text.push('\n');
    let mut line = |words: &str, at_us: u64| {
        let _ = writeln!(text, "  {}  {words}", moment(at_us, reader));
    };
    if let Some(at) = resource.apart_since_us.filter(|_| resource.has_been_together) {
        line("the two nodes lost each other", at);
    }
    if let Some(at) = resource.volumes.iter().filter_map(|v| v.alone_since_us).min() {
        line(&format!("{} began to go on alone (a new data generation)", reader.own), at);
    }
    let met = resource.volumes.iter().filter_map(|v| v.handshake.as_ref());
    if let Some(met) = met.filter(|met| met.is_split_brain).max_by_key(|met| met.at_us) {
        let (rule, code) = (met.rule, &met.code);
        line(&format!("they met and compared their data (rule {rule}, {code})"), met.at_us);
    }
    if !resource.has_been_together {
        let _ = writeln!(
            text,
            "  They have not been together since this daemon runs: it does not know when they parted."
        );
    }
}

fn moment(at_us: u64, reader: &Reader<'_>) -> String {
    let stamp = timestamp(at_us, reader.east).replacen('T', " ", 1);
    let stamp = stamp.split('.').next().unwrap_or_default().to_owned();
    format!("{stamp} ({:>8} ago)", span(reader.now_us.saturating_sub(at_us) / 1_000_000))
}

fn span(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

fn two_sides(text: &mut String, volume: &Volume, met: &Handshake, reader: &Reader<'_>) {
    let Volume { volume: nr, minor, .. } = volume;
    let _ = writeln!(text, "\n  volume {nr} (minor {minor}) when they met:");
    let mut row = |head: &str, own: &str, peer: &str| {
        let _ = writeln!(text, "    {head:<20}{own:<22}{peer}");
    };
    row("", reader.own, reader.peer);
    row("role", met.own.role.name(), met.peer.role.name());
    row("disk", met.own.disk.name(), met.peer.disk.name());
    let changed = |side: &HandshakeSide| format!("at most {}", amount(side.out_of_sync));
    row("changed by it", &changed(&met.own), &changed(&met.peer));
    for (n, head) in ["current generation", "bitmap generation", "history", ""].iter().enumerate() {
        let of = |side: &HandshakeSide| side.slots.get(n).map(ToString::to_string);
        row(head, &of(&met.own).unwrap_or_default(), &of(&met.peer).unwrap_or_default());
    }
    if volume.counters.out_of_sync > met.own.out_of_sync {
        let now = amount(volume.counters.out_of_sync);
        let _ = writeln!(text, "    Since then {} has gone on: at most {now} now.", reader.own);
    }
}

/// KiB, MiB or GiB of bitmap bits.
fn amount(bits: u64) -> String {
    let kib = bits.saturating_mul(4);
    let tenths = |unit: u64, name: &str| {
        let n = kib.saturating_mul(10) / unit;
        format!("{}.{} {name}", n / 10, n % 10)
    };
    match kib {
        0..10_240 => format!("{kib} KiB"),
        10_240..10_485_760 => tenths(1 << 10, "MiB"),
        _ => tenths(1 << 20, "GiB"),
    }
}

/// What is lost if a side gives up its changes.
#[must_use]
pub fn split_brain_loss(resource: &Resource, victim: Side, reader: &Reader<'_>) -> String {
    let node = if victim == Side::Own { reader.own } else { reader.peer };
    let of_volume = |v: &Volume| {
        let met = v.handshake.as_ref().filter(|met| met.is_split_brain);
        let bits = match victim {
            Side::Own => {
                let then = met.map_or(0, |met| met.own.out_of_sync);
                Some(then.max(v.counters.out_of_sync))
            }
            Side::Peer => met.map(|met| met.peer.out_of_sync),
        };
        let much = bits.map_or_else(
            || "an amount that is not known here".into(),
            |bits| format!("at most {}", amount(bits)),
        );
        format!("{much} of volume {}", v.volume)
    };
    let parts: Vec<String> = resource.volumes.iter().map(of_volume).collect();
    format!("everything that {node} has written since the two parted: {}", parts.join(", "))
}

fn ways_out(text: &mut String, resource: &Resource, reader: &Reader<'_>) {
    let name = &resource.name;
    let _ = writeln!(
        text,
        "\nWhat can be done: one of the two gives up its changes, as a whole; then its device \
         becomes equal to the other's.\nStop what uses the device there first (file system, \
         database, NBD clients), and save what is needed from it."
    );
    for (keep, kept, victim) in
        [(Side::Own, reader.own, reader.peer), (Side::Peer, reader.peer, reader.own)]
    {
        let lost = if keep == Side::Own { Side::Peer } else { Side::Own };
        let word = if keep == Side::Own { "local" } else { "peer" };
        let loss = split_brain_loss(resource, lost, reader);
        let width = reader.own.len().max(reader.peer.len());
        let _ = writeln!(
            text,
            "\n  To keep the data of {kept}:  drbdadm split-brain resolve {name} --keep {word}\n\
             \x20   Lost: {loss}.\n\
             \x20   The same by hand:\n\
             \x20     {victim:<width$}  drbdadm disconnect {name}\n\
             \x20     {victim:<width$}  drbdadm secondary {name}\n\
             \x20     {victim:<width$}  drbdadm connect --discard-my-data {name}\n\
             \x20     {kept:<width$}  drbdadm connect {name}      (unless it waits already)"
        );
    }
    text.push_str(
        "\n'At most': blocks of 4 KiB are counted, after a crash whole areas that were in use. \
         What was written to the same\nplaces by both counts on both sides.\n",
    );
}

#[cfg(test)]
mod tests {
    use drbd_types::{Dstate, Gi, Role};

    use super::*;

    fn side(current: u64, bits: u64, role: Role) -> HandshakeSide {
        HandshakeSide {
            slots: [Gi(current), Gi(0x1110), Gi(0), Gi(0)],
            out_of_sync: bits,
            role,
            disk: Dstate::UpToDate,
        }
    }

    fn sample(outcome: Outcome, cstate: Cstate) -> Resource {
        let mut volume = Volume::new(0, 7);
        volume.cstate = cstate;
        volume.disk = Dstate::UpToDate;
        volume.alone_since_us = Some(1_795_353_490_000_000);
        volume.handshake = Some(Handshake {
            at_us: 1_795_353_600_000_000,
            rule: 90,
            code: "split-brain-unresolved".into(),
            text: "words".into(),
            outcome,
            is_split_brain: true,
            own: side(0x2221, 3, Role::Primary),
            peer: side(0x3330, 5000, Role::Secondary),
        });
        Resource {
            name: "r0".into(),
            apart_since_us: Some(1_795_353_488_000_000),
            has_been_together: true,
            volumes: vec![volume],
            ..Resource::default()
        }
    }

    const READER: Reader<'_> =
        Reader { own: "alpha", peer: "beta", now_us: 1_795_353_660_000_000, east: 0 };

    #[test]
    fn an_open_one() {
        let resource = sample(Outcome::Failed, Cstate::StandAlone);
        assert_eq!(SplitBrain::of(&resource), SplitBrain::Open);
        let text = split_brain(&resource, &READER);
        for part in [
            "r0: SPLIT BRAIN\n",
            "  2026-11-22 13:18:08 (   2 min ago)  the two nodes lost each other\n",
            "  2026-11-22 13:18:10 (   2 min ago)  alpha began to go on alone",
            "  2026-11-22 13:20:00 (    60 s ago)  they met and compared their data (rule 90,",
            "    role                Primary               Secondary\n",
            "    changed by it       at most 12 KiB        at most 19.5 MiB\n",
            "    current generation  0000000000002221      0000000000003330\n",
            "To keep the data of alpha:  drbdadm split-brain resolve r0 --keep local\n    Lost: \
             everything that beta has written since the two parted: at most 19.5 MiB of volume 0.",
            "      beta   drbdadm connect --discard-my-data r0\n      alpha  drbdadm connect r0 ",
            "To keep the data of beta:  drbdadm split-brain resolve r0 --keep peer\n    Lost: \
             everything that alpha has written since the two parted: at most 12 KiB of volume 0.",
        ] {
            assert!(text.contains(part), "no {part:?} in\n{text}");
        }
        assert!(!text.contains("has gone on"));
    }

    #[test]
    fn what_was_written_after_they_met_counts() {
        let mut resource = sample(Outcome::Failed, Cstate::WFConnection);
        resource.volumes[0].counters.out_of_sync = 10;
        let text = split_brain(&resource, &READER);
        assert!(text.contains("Since then alpha has gone on: at most 40 KiB now."), "{text}");
        let loss = split_brain_loss(&resource, Side::Own, &READER);
        assert!(loss.ends_with("at most 40 KiB of volume 0"), "{loss}");
    }

    #[test]
    fn how_a_resource_stands_to_it() {
        let rows = [
            (Outcome::Failed, Cstate::WFConnection, SplitBrain::Open),
            (Outcome::Failed, Cstate::Connected, SplitBrain::None),
            (Outcome::Source, Cstate::StandAlone, SplitBrain::Interrupted(Side::Own)),
            (Outcome::Target, Cstate::SyncTarget, SplitBrain::Resyncing(Side::Peer)),
            (Outcome::Target, Cstate::Connected, SplitBrain::Over(Side::Peer)),
            (Outcome::Connected, Cstate::Connected, SplitBrain::None),
        ];
        for (outcome, cstate, expected) in rows {
            let mut resource = sample(outcome, cstate);
            assert_eq!(SplitBrain::of(&resource), expected, "{outcome:?} {cstate}");
            // The worst of all volumes counts.
            resource.volumes.push(Volume::new(1, 8));
            assert_eq!(SplitBrain::of(&resource), expected, "{outcome:?} {cstate}");
        }
        let mut resource = sample(Outcome::Failed, Cstate::StandAlone);
        let met = resource.volumes[0].handshake.as_mut();
        met.unwrap().is_split_brain = false;
        let text = split_brain(&resource, &READER);
        assert!(text.starts_with("r0: no split brain\nThe last handshake failed for another"));
        resource.volumes[0].handshake = None;
        let text = split_brain(&resource, &READER);
        assert!(text.starts_with("r0: no split brain that this node knows of\n"), "{text}");
        let loss = split_brain_loss(&resource, Side::Peer, &READER);
        assert!(loss.ends_with("an amount that is not known here of volume 0"), "{loss}");
        resource.volumes[0].cstate = Cstate::Connected;
        assert_eq!(split_brain(&resource, &READER), "r0: no split brain\n");
        assert_eq!(split_brain(&Resource::default(), &READER), ": no split brain\n");
    }

    #[test]
    fn amounts_and_spans() {
        let amounts = [(0, "0 KiB"), (2559, "10236 KiB"), (2560, "10.0 MiB"), (u64::MAX, "GiB")];
        for (bits, text) in amounts {
            assert!(amount(bits).ends_with(text), "{}", amount(bits));
        }
        let spans = [(119, "119 s"), (120, "2 min"), (7200, "2 h"), (172_800, "2 days")];
        for (seconds, text) in spans {
            assert_eq!(span(seconds), text);
        }
    }
}
