//! From the comparison of two nodes to what the connection does: resync, in which direction, or
//! not at all.
//!
//! The numbered steps of [`decide`] are those of the specification. The decision is pure: it
//! returns what is to be logged and which handlers are to be called, in order; the engine carries
//! that out. Besides the original's rules there are two checks of our own, both of which only turn
//! a hang into a refusal: identifiers that make both nodes the target (defect D2, or identifiers
//! edited by hand into a circle) end the connection with a reason.
//! Spec: states-and-generations.md §4.5.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use drbd_types::{Dstate, Gi, Role};

use super::Slots;
use super::compare::{Comparison, Correction, Extent, Link, Relation, Remark, Side, compare};
use super::explain::Reason;
use super::splitbrain::{Contest, Policies, Verdict, Winner, solve};

/// `rr-conflict`: what a Primary does that should become target. Spec §4.5 step 8.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RrConflict {
    /// Drop the connection (default).
    #[default]
    Disconnect,
    /// Call handler `pri-lost`, then drop the connection.
    CallPriLost,
    /// Become target all the same.
    Violently,
}

/// Everything that a decision depends on.
#[derive(Clone, Copy, Debug)]
pub struct Handshake {
    /// This node.
    pub own: Side,
    /// The peer, from its last P_UUIDS and P_STATE.
    pub peer: Side,
    /// Own disk state; [`Dstate::Negotiating`] while attaching under a connection.
    pub own_disk: Dstate,
    /// Disk state that the attach would have without a peer; counts while Negotiating.
    pub candidate_disk: Dstate,
    /// The peer's disk state, with Negotiating already resolved.
    pub peer_disk: Dstate,
    /// What was agreed with the peer.
    pub link: Link,
    /// Set bits that went out with the own last P_UUIDS.
    pub own_bits_sent: u64,
    /// Set bits that the peer reported.
    pub peer_bits: u64,
    /// Set bits now, for the remark of step 11.
    pub own_bits_now: u64,
    /// Flags word of the peer's P_UUIDS, as logged.
    pub peer_flags: u64,
    /// `discard-my-data` counted for this handshake.
    pub discard_mine: bool,
    /// The peer discards its data.
    pub peer_discards: bool,
    /// `after-sb-*`.
    pub policies: Policies,
    /// `always-asbp`.
    pub always_asbp: bool,
    /// `rr-conflict`.
    pub rr_conflict: RrConflict,
    /// `connect --tentative`, here or (dry-run bit) at the peer.
    pub dry_run: bool,
    /// See [`Contest::can_demote`].
    pub can_demote: bool,
}

/// What the volume does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// No resync: Connected.
    Connected,
    /// WFBitMapS; with [`Extent::Full`] all bits are set and written first.
    Source(Extent),
    /// WFBitMapT; with [`Extent::Full`] all bits are set and written first.
    Target(Extent),
    /// Failure in the sense of spec §4.3 step 8.
    Failed,
}

/// How important a log line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// Information.
    Info,
    /// Warning.
    Warn,
    /// Error.
    Error,
    /// Somebody must act.
    Alert,
}

/// Handlers that a decision can call; their exit codes do not change it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handler {
    /// `initial-split-brain`.
    InitialSplitBrain,
    /// `split-brain`.
    SplitBrain,
    /// `pri-lost-after-sb`.
    PriLostAfterSb,
    /// `pri-lost`.
    PriLost,
}

/// One thing to do on the way to the outcome.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Log a line, in the original's wording.
    Log(Severity, String),
    /// Call a handler and wait for it.
    Call(Handler),
    /// Give up the Primary role.
    Demote,
}

/// Result of [`decide`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// What the volume does.
    pub outcome: Outcome,
    /// What the comparison said, with the correction to be carried out.
    pub comparison: Comparison,
    /// What to do on the way, in this order.
    pub steps: Vec<Step>,
    /// Why, for people and programs.
    pub reason: Reason,
}

/// Decides about a resync. Spec §4.5.
pub fn decide(h: &Handshake) -> Decision {
    let mut d = Decider { h, steps: Vec::new() };
    let comparison = d.compare();
    let (outcome, reason) = match d.run(comparison) {
        Ok(decided) => decided,
        Err(reason) => (Outcome::Failed, reason),
    };
    Decision { outcome, comparison, steps: d.steps, reason }
}

struct Decider<'a> {
    h: &'a Handshake,
    steps: Vec<Step>,
}

/// A decision, or the reason why there is none.
type Decided = Result<(Outcome, Reason), Reason>;

impl Decider<'_> {
    fn log(&mut self, severity: Severity, text: impl Into<String>) {
        self.steps.push(Step::Log(severity, text.into()));
    }

    /// Head lines and the rule table.
    fn compare(&mut self) -> Comparison {
        let h = self.h;
        self.log(Severity::Info, "drbd_sync_handshake:");
        self.log(Severity::Info, dump("self", &h.own.slots, h.own_bits_sent, 0));
        self.log(Severity::Info, dump("peer", &h.peer.slots, h.peer_bits, h.peer_flags));
        let comparison = compare(&h.own, &h.peer, &h.link);
        match comparison.correction {
            Some(Correction::Own(slots, text)) => {
                self.log(Severity::Info, text.text());
                self.log(Severity::Info, dump("self", &slots, h.own_bits_now, 0));
            }
            Some(Correction::Peer(slots, text)) => {
                self.log(Severity::Info, text.text());
                self.log(Severity::Info, dump("peer", &slots, h.peer_bits, h.peer_flags));
            }
            None => {}
        }
        if let Some(remark) = comparison.remark {
            let severity = match remark {
                Remark::PeerFailedToWriteSyncUuid | Remark::FailedToWriteSyncUuid => Severity::Info,
                Remark::UnrotatedButPrimary => Severity::Warn,
                Remark::UnrotatedBothPrimary => Severity::Error,
            };
            self.log(severity, remark.text());
        }
        let (code, rule) = (comparison.relation.code(), comparison.rule);
        self.log(Severity::Info, format!("uuid_compare()={code} by rule {rule}"));
        comparison
    }

    fn run(&mut self, comparison: Comparison) -> Decided {
        self.refuse_impossible(comparison)?; // step 1
        let relation = self.disk_states_decide(comparison.relation); // step 2
        let direction = self.solve_split_brain(relation)?; // steps 3 to 6
        self.check_target_and_source(direction)?; // steps 7 and 8
        if self.h.dry_run {
            self.report_dry_run(direction);
            return Err(Reason::DryRun);
        }
        Ok(self.outcome(direction, comparison, relation)) // steps 10 and 11
    }

    /// Step 1, and our own check for circles.
    fn refuse_impossible(&mut self, comparison: Comparison) -> Result<(), Reason> {
        match comparison.relation {
            Relation::Unrelated => {
                self.log(Severity::Alert, "Unrelated data, aborting!");
                return Err(Reason::UnrelatedData);
            }
            Relation::NeedsFeature { protocol, feature } => {
                self.log(
                    Severity::Alert,
                    format!(
                        "To resolve this both sides have to support at least protocol {protocol} \
                         and feature flags 0x{feature:x}"
                    ),
                );
                return Err(Reason::NeedsNewerPeer);
            }
            Relation::NeedsProtocol(version) => {
                self.log(
                    Severity::Alert,
                    format!(
                        "To resolve this both sides have to support at least protocol {version}"
                    ),
                );
                return Err(Reason::NeedsNewerPeer);
            }
            Relation::Equal
            | Relation::Source(_)
            | Relation::Target(_)
            | Relation::SplitBrain
            | Relation::SplitBrainUnclear => {}
        }
        let link = Link { resolve_conflicts: !self.h.link.resolve_conflicts, ..self.h.link };
        let theirs = compare(&self.h.peer, &self.h.own, &link).relation;
        if theirs != comparison.relation.mirrored() {
            let neither =
                [self.h.own.slots, self.h.peer.slots].iter().all(|s| s.current.same(Gi(0)));
            self.log(
                Severity::Alert,
                if neither {
                    "Neither node has a current UUID: cannot tell whose data is newer. \
                     Dropping connection!"
                } else {
                    "The UUIDs of the two nodes contradict each other: each looks older than the \
                     other. Dropping connection!"
                },
            );
            return Err(if neither { Reason::NoGeneration } else { Reason::Contradiction });
        }
        Ok(())
    }

    fn my_disk(&self) -> Dstate {
        if self.h.own_disk == Dstate::Negotiating { self.h.candidate_disk } else { self.h.own_disk }
    }

    /// Step 2: one disk is Inconsistent and the other is better.
    fn disk_states_decide(&mut self, relation: Relation) -> Relation {
        let (mine, theirs) = (self.my_disk(), self.h.peer_disk);
        let better = |d: Dstate| d > Dstate::Inconsistent;
        let source = match (mine, theirs) {
            (Dstate::Inconsistent, other) if better(other) => false,
            (other, Dstate::Inconsistent) if better(other) => true,
            _ => return relation,
        };
        let extent = match relation {
            Relation::SplitBrainUnclear
            | Relation::Source(Extent::Full)
            | Relation::Target(Extent::Full) => Extent::Full,
            Relation::Equal
            | Relation::Source(Extent::Bitmap)
            | Relation::Target(Extent::Bitmap)
            | Relation::SplitBrain
            | Relation::Unrelated
            | Relation::NeedsProtocol(_)
            | Relation::NeedsFeature { .. } => Extent::Bitmap,
        };
        let side = if source { "source" } else { "target" };
        self.log(Severity::Info, format!("Becoming sync {side} due to disk states."));
        if source { Relation::Source(extent) } else { Relation::Target(extent) }
    }

    /// Steps 3 to 6. What comes out is Equal, Source or Target.
    fn solve_split_brain(&mut self, relation: Relation) -> Result<Relation, Reason> {
        let unclear = match relation {
            Relation::SplitBrain => false,
            Relation::SplitBrainUnclear => true,
            Relation::Equal
            | Relation::Source(_)
            | Relation::Target(_)
            | Relation::Unrelated
            | Relation::NeedsProtocol(_)
            | Relation::NeedsFeature { .. } => return Ok(relation),
        };
        self.steps.push(Step::Call(Handler::InitialSplitBrain));
        let may_use_policies = !unclear || self.h.always_asbp;
        if may_use_policies && let Some(winner) = self.policy_decides() {
            if unclear {
                let text = "Doing a full sync, since UUIDs where ambiguous.";
                self.log(Severity::Warn, text);
            }
            let extent = if unclear { Extent::Full } else { Extent::Bitmap };
            return Ok(direction(winner, extent));
        }
        // The peer wins by its own policy, whatever it wants to discard.
        let has_lost = self.steps.contains(&Step::Call(Handler::PriLostAfterSb));
        let manual = match (self.h.discard_mine, self.h.peer_discards) {
            _ if has_lost => None,
            (true, false) => Some(Winner::Peer),
            (false, true) => Some(Winner::Own),
            (false, false) | (true, true) => None,
        };
        if let Some(winner) = manual {
            let from = from_text(winner);
            let text = format!("Split-Brain detected, manually solved. Sync from {from} node");
            self.log(Severity::Warn, text);
            return Ok(direction(winner, Extent::Bitmap));
        }
        self.log(Severity::Alert, "Split-Brain detected but unresolved, dropping connection!");
        self.steps.push(Step::Call(Handler::SplitBrain));
        Err(Reason::SplitBrainUnresolved)
    }

    /// Step 4.
    fn policy_decides(&mut self) -> Option<Winner> {
        let h = self.h;
        let contest = Contest {
            own: h.own.slots,
            peer: h.peer.slots,
            own_bits: h.own_bits_sent,
            peer_bits: h.peer_bits,
            own_role: h.own.role,
            peer_role: h.peer.role,
            resolve_conflicts: h.link.resolve_conflicts,
            can_demote: h.can_demote,
        };
        let Verdict { winner, fell_back_to_changes, demote, call_pri_lost } =
            solve(&h.policies, &contest);
        if fell_back_to_changes {
            let text = "Discard younger/older primary did not find a decision\n\
                        Using discard-least-changes instead";
            self.log(Severity::Warn, text);
        }
        if demote {
            self.steps.push(Step::Demote);
            self.log(Severity::Warn, "Successfully gave up primary role.");
        }
        if call_pri_lost {
            self.steps.push(Step::Call(Handler::PriLostAfterSb));
        }
        if let Some(winner) = winner {
            let primaries =
                [h.own.role, h.peer.role].iter().filter(|r| **r == Role::Primary).count();
            let from = from_text(winner);
            self.log(
                Severity::Warn,
                format!(
                    "Split-Brain detected, {primaries} primaries, automatically solved. \
                     Sync from {from} node"
                ),
            );
        }
        winner
    }

    /// Steps 7 and 8.
    fn check_target_and_source(&mut self, direction: Relation) -> Result<(), Reason> {
        let h = self.h;
        if matches!(direction, Relation::Source(_)) && self.my_disk() <= Dstate::Inconsistent {
            self.log(Severity::Error, "I shall become SyncSource, but I am inconsistent!");
            return Err(Reason::SourceInconsistent);
        }
        let has_role = h.own.role == Role::Primary && !self.demoted();
        if matches!(direction, Relation::Target(_)) && has_role && h.own_disk >= Dstate::Consistent
        {
            if h.rr_conflict == RrConflict::Violently {
                let text = "Becoming SyncTarget, violating the stable-dataassumption";
                self.log(Severity::Warn, text);
                return Ok(());
            }
            if h.rr_conflict == RrConflict::CallPriLost {
                self.steps.push(Step::Call(Handler::PriLost));
            }
            self.log(Severity::Error, "I shall become SyncTarget, but I am primary!");
            return Err(Reason::TargetIsPrimary);
        }
        Ok(())
    }

    fn demoted(&self) -> bool {
        self.steps.contains(&Step::Demote)
    }

    /// Step 9.
    fn report_dry_run(&mut self, direction: Relation) {
        let text = match direction {
            Relation::Source(extent) => would_become("SyncSource", extent),
            Relation::Target(extent) => would_become("SyncTarget", extent),
            Relation::Equal
            | Relation::SplitBrain
            | Relation::SplitBrainUnclear
            | Relation::Unrelated
            | Relation::NeedsProtocol(_)
            | Relation::NeedsFeature { .. } => {
                String::from("dry-run connect: No resync, would become Connected immediately.")
            }
        };
        self.log(Severity::Info, text);
    }

    /// Steps 10 and 11.
    fn outcome(
        &mut self,
        direction: Relation,
        comparison: Comparison,
        after_disk_states: Relation,
    ) -> (Outcome, Reason) {
        let outcome = match direction {
            Relation::Source(extent) => Outcome::Source(extent),
            Relation::Target(extent) => Outcome::Target(extent),
            Relation::Equal
            | Relation::SplitBrain
            | Relation::SplitBrainUnclear
            | Relation::Unrelated
            | Relation::NeedsProtocol(_)
            | Relation::NeedsFeature { .. } => Outcome::Connected,
        };
        match outcome {
            Outcome::Source(Extent::Full) | Outcome::Target(Extent::Full) => self.log(
                Severity::Info,
                "Writing the whole bitmap, full sync required after drbd_sync_handshake.",
            ),
            Outcome::Connected if self.h.own_bits_now > 0 => {
                let bits = self.h.own_bits_now;
                self.log(Severity::Info, format!("No resync, but {bits} bits in bitmap!"));
            }
            Outcome::Source(_) | Outcome::Target(_) | Outcome::Connected | Outcome::Failed => {}
        }
        let solved = direction != after_disk_states;
        let by_disks = after_disk_states != comparison.relation;
        (outcome, Reason::of(outcome, by_disks, solved))
    }
}

fn direction(winner: Winner, extent: Extent) -> Relation {
    match winner {
        Winner::Own => Relation::Source(extent),
        Winner::Peer => Relation::Target(extent),
    }
}

fn from_text(winner: Winner) -> &'static str {
    match winner {
        Winner::Own => "this",
        Winner::Peer => "peer",
    }
}

fn would_become(side: &str, extent: Extent) -> String {
    let kind = match extent {
        Extent::Bitmap => "bit-map based",
        Extent::Full => "full",
    };
    format!("dry-run connect: Would become {side}, doing a {kind} resync.")
}

fn dump(who: &str, slots: &Slots, bits: u64, flags: u64) -> String {
    format!("{who} {slots} bits:{bits} flags:{flags:X}")
}
