//! The handshake decision of the kernel compared with [`drbd_core::generation::decide`]: a
//! scripted peer presents identifiers, flags, roles, disk states and versions; what the kernel
//! sends and logs then must be what `decide` says about the same situation.
//!
//! What the kernel brings in is taken from its packets, not from what was written into its
//! meta-data, so every case is judged by what was really on the table.
//! Spec: states-and-generations.md §4.

mod generate;
mod kernel;

use drbd_core::generation::Slots;
use drbd_core::generation::compare::{Link, Side};
use drbd_core::generation::decide::{
    Decision, Handler, Handshake, Outcome, RrConflict, Severity, Step, decide,
};
use drbd_core::generation::explain::Reason;
use drbd_core::generation::splitbrain::{OnePrimary, Policies, TwoPrimaries, ZeroPrimaries};
use drbd_types::{Dstate, Fields, Role};
use drbd_wire::packet::{Features, Uuids};

pub use self::generate::{presented, setting};
pub use self::kernel::Bench;

/// How the kernel's node is set up for a row of cases.
#[derive(Clone, Debug)]
pub struct Setting {
    /// For `drbdmeta set-gi`.
    pub slots: [u64; 4],
    /// Consistent, was up to date, Primary, connected, full sync, peer outdated, crashed.
    pub flags: [bool; 7],
    /// It is Primary.
    pub is_primary: bool,
    /// `after-sb-*`: position in [`ZERO`], [`ONE`] and [`TWO`].
    pub after_sb: [usize; 3],
    /// `always-asbp`.
    pub always_asbp: bool,
    /// `rr-conflict`: position in [`RR`].
    pub rr_conflict: usize,
    /// `allow-two-primaries`.
    pub two_primaries: bool,
}

/// `after-sb-0pri` with the numbers of the wire. `discard-node-<name>` is 5 for the own node.
pub const ZERO: [(&str, u32, ZeroPrimaries); 7] = [
    ("disconnect", 0, ZeroPrimaries::Disconnect),
    ("discard-younger-primary", 1, ZeroPrimaries::DiscardYoungerPrimary),
    ("discard-older-primary", 2, ZeroPrimaries::DiscardOlderPrimary),
    ("discard-zero-changes", 3, ZeroPrimaries::DiscardZeroChanges),
    ("discard-least-changes", 4, ZeroPrimaries::DiscardLeastChanges),
    ("discard-node-alpha", 5, ZeroPrimaries::DiscardLocal),
    ("discard-node-bravo", 6, ZeroPrimaries::DiscardRemote),
];
/// `after-sb-1pri`.
pub const ONE: [(&str, OnePrimary); 5] = [
    ("disconnect", OnePrimary::Disconnect),
    ("consensus", OnePrimary::Consensus),
    ("discard-secondary", OnePrimary::DiscardSecondary),
    ("call-pri-lost-after-sb", OnePrimary::CallPriLost),
    ("violently-as0p", OnePrimary::ViolentlyAs0p),
];
/// `after-sb-2pri`.
pub const TWO: [(&str, TwoPrimaries); 3] = [
    ("disconnect", TwoPrimaries::Disconnect),
    ("call-pri-lost-after-sb", TwoPrimaries::CallPriLost),
    ("violently-as0p", TwoPrimaries::ViolentlyAs0p),
];
/// `rr-conflict`.
pub const RR: [(&str, RrConflict); 3] = [
    ("disconnect", RrConflict::Disconnect),
    ("call-pri-lost", RrConflict::CallPriLost),
    ("violently", RrConflict::Violently),
];

/// What the scripted peer presents.
#[derive(Clone, Copy, Debug)]
pub struct Presented {
    /// P_UUIDS.
    pub uuids: Uuids,
    /// Role in P_STATE.
    pub role: Role,
    /// Disk state in P_STATE.
    pub disk: Dstate,
    /// Dry run, in P_PROTOCOL.
    pub dry_run: bool,
}

/// What the kernel brought in, from its packets.
#[derive(Clone, Copy, Debug)]
pub struct Brought {
    /// P_UUIDS.
    pub uuids: Uuids,
    /// P_STATE.
    pub state: Fields,
    /// Agreed version and features.
    pub agreed: (u32, Features),
    /// It was connected with `--tentative`.
    pub is_tentative: bool,
}

/// What the kernel did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observed {
    /// State of the second P_STATE; `None` if the connection was closed instead.
    pub state: Option<Fields>,
    /// Log lines and calls of handlers on the way to the decision.
    pub steps: Vec<Step>,
    /// The volume's log lines behind those, and the connection's.
    pub rest: Vec<String>,
}

/// The situation in the form of the engine.
pub fn situation(setting: &Setting, brought: &Brought, presented: &Presented) -> Handshake {
    let side = |uuids: &Uuids, role| Side {
        slots: Slots { current: uuids.current, bitmap: uuids.bitmap, history: uuids.history },
        crashed_primary: uuids.flags & 2 != 0,
        role,
    };
    let [zero, one, two] = setting.after_sb;
    Handshake {
        own: side(&brought.uuids, brought.state.role),
        peer: side(&presented.uuids, presented.role),
        own_disk: brought.state.disk,
        candidate_disk: brought.state.disk,
        peer_disk: presented.disk,
        link: Link {
            protocol: brought.agreed.0,
            wsame: brought.agreed.1.contains(Features::WSAME),
            // We opened the meta connection.
            resolve_conflicts: true,
        },
        own_bits_sent: brought.uuids.dirty_bits,
        peer_bits: presented.uuids.dirty_bits,
        own_bits_now: brought.uuids.dirty_bits,
        peer_flags: presented.uuids.flags,
        discard_mine: brought.uuids.flags & 1 != 0,
        peer_discards: presented.uuids.flags & 1 != 0,
        policies: Policies { zero: ZERO[zero].2, one: ONE[one].1, two: TWO[two].1 },
        always_asbp: setting.always_asbp,
        rr_conflict: RR[setting.rr_conflict].1,
        dry_run: presented.dry_run || brought.is_tentative,
        can_demote: false,
    }
}

/// How a case came out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The kernel did what we decide.
    Equal,
    /// It did not, and that is meant so.
    Explained(&'static str),
    /// It did not.
    Different(String),
}

/// Compares the kernel's behaviour with our decision.
pub fn judge(handshake: &Handshake, observed: &Observed) -> (Decision, Verdict) {
    let decision = decide(handshake);
    let verdict = verdict(&decision, observed);
    (decision, verdict)
}

fn verdict(decision: &Decision, observed: &Observed) -> Verdict {
    if [Reason::NoGeneration, Reason::Contradiction].contains(&decision.reason) {
        // The refusal is our own last step; until then both agree.
        let (_, common) = decision.steps.split_last().unwrap_or((&Step::Demote, &[]));
        if observed.steps.starts_with(common) {
            return Verdict::Explained("both would be the target and wait for ever: we refuse");
        }
        return Verdict::Different(first_difference(common, &observed.steps));
    }
    if decision.steps != observed.steps {
        return Verdict::Different(first_difference(&decision.steps, &observed.steps));
    }
    let theirs = observed.state.map(|state| state.conn.name());
    let ours = match decision.outcome {
        Outcome::Connected => Some("Connected"),
        Outcome::Source(_) => Some("WFBitMapS"),
        Outcome::Target(_) => Some("WFBitMapT"),
        Outcome::Failed => None,
    };
    if theirs == ours {
        return Verdict::Equal;
    }
    let text = |name: Option<&str>| name.unwrap_or("closed").to_owned();
    Verdict::Different(format!(
        "outcome {}, the kernel's {}: {}",
        text(ours),
        text(theirs),
        observed.rest.join(" | ")
    ))
}

fn first_difference(ours: &[Step], theirs: &[Step]) -> String {
    let count = ours.len().max(theirs.len());
    let at = (0..count).find(|i| ours.get(*i) != theirs.get(*i)).unwrap_or(0);
    format!("step {at}: {:?}, the kernel's {:?}", ours.get(at), theirs.get(at))
}

/// A log line of the kernel, split.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Line {
    pub(crate) severity: Severity,
    pub(crate) subject: String,
    pub(crate) text: String,
}

impl Line {
    /// From the form of `/dev/kmsg`: `level,number,time,flags;subject: text`.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let (head, text) = line.split_once(';')?;
        let level: u8 = head.split(',').next()?.parse().ok()?;
        let severity = match level & 7 {
            0..=2 => Severity::Alert,
            3 => Severity::Error,
            4 => Severity::Warn,
            _ => Severity::Info,
        };
        let text = text.replace("\\x0a", "\n");
        let (subject, text) = text.split_once(": ")?;
        Some(Self { severity, subject: subject.to_owned(), text: text.trim_end().to_owned() })
    }

    /// As a step of a decision; other lines are none.
    pub(crate) fn step(&self) -> Option<Step> {
        if let Some(call) = self.text.strip_prefix("helper command: ") {
            let name = call.split(' ').nth(1)?;
            let handler = match name {
                "initial-split-brain" => Handler::InitialSplitBrain,
                "split-brain" => Handler::SplitBrain,
                "pri-lost-after-sb" => Handler::PriLostAfterSb,
                "pri-lost" => Handler::PriLost,
                _ => return None,
            };
            return (!call.contains("exit code")).then_some(Step::Call(handler));
        }
        // Reports of the bitmap I/O that a full sync begins with.
        let is_bitmap_io =
            self.text.starts_with("bitmap WRITE") || self.text.ends_with("on disk bit-map.");
        (!is_bitmap_io).then(|| Step::Log(self.severity, self.text.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_log_becomes_steps() {
        let line = |text: &str| Line::parse(text).and_then(|line| line.step());
        assert_eq!(
            line("1,2,3,-;drbd r0/0 drbd0: Unrelated data, aborting!"),
            Some(Step::Log(Severity::Alert, "Unrelated data, aborting!".into()))
        );
        let call = "6,2,3,-;drbd r0/0 drbd0: helper command: /bin/true split-brain minor-0";
        assert_eq!(line(call), Some(Step::Call(Handler::SplitBrain)));
        assert_eq!(line(&format!("{call} exit code 0 (0x0)")), None);
        let two = Line::parse("4,2,3,-;drbd r0/0 drbd0: one\\x0atwo").map(|line| line.text);
        assert_eq!(two.as_deref(), Some("one\ntwo"));
    }
}
