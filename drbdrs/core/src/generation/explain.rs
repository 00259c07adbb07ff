//! Why a handshake came out as it did: a stable code for programs, a sentence for people.

use core::fmt;

use super::compare::Extent;
use super::decide::{Decision, Outcome};

/// What led to an outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// Both nodes have the same data.
    InSync,
    /// The identifiers say that one node has newer data.
    NewerData,
    /// One disk is Inconsistent and the other is not.
    DiskStates,
    /// A split brain was solved by a policy or by discard-my-data.
    SplitBrainSolved,
    /// A split brain that neither policy nor administrator solved.
    SplitBrainUnresolved,
    /// The nodes have no generation in common.
    UnrelatedData,
    /// The situation needs a newer protocol version or feature on one side.
    NeedsNewerPeer,
    /// This node has the newer data, but its disk is Inconsistent.
    SourceInconsistent,
    /// This node should become target, but is Primary.
    TargetIsPrimary,
    /// Only a rehearsal was asked for.
    DryRun,
    /// Each node looks older than the other.
    Contradiction,
    /// Neither node has a current identifier.
    NoGeneration,
}

impl Reason {
    /// The reason of a handshake that did not fail.
    pub(super) fn of(outcome: Outcome, by_disks: bool, split_brain: bool) -> Self {
        match outcome {
            Outcome::Connected => Self::InSync,
            Outcome::Source(_) | Outcome::Target(_) if split_brain => Self::SplitBrainSolved,
            Outcome::Source(_) | Outcome::Target(_) if by_disks => Self::DiskStates,
            Outcome::Source(_) | Outcome::Target(_) | Outcome::Failed => Self::NewerData,
        }
    }

    /// Stable code for programs.
    pub fn code(self) -> &'static str {
        match self {
            Self::InSync => "in-sync",
            Self::NewerData => "newer-data",
            Self::DiskStates => "disk-states",
            Self::SplitBrainSolved => "split-brain-solved",
            Self::SplitBrainUnresolved => "split-brain-unresolved",
            Self::UnrelatedData => "unrelated-data",
            Self::NeedsNewerPeer => "needs-newer-peer",
            Self::SourceInconsistent => "source-inconsistent",
            Self::TargetIsPrimary => "target-is-primary",
            Self::DryRun => "dry-run",
            Self::Contradiction => "contradiction",
            Self::NoGeneration => "no-generation",
        }
    }

    /// What it means, and what to do where something has to be done.
    pub fn meaning(self) -> &'static str {
        match self {
            Self::InSync => "both nodes have the same data; nothing has to be copied",
            Self::NewerData => "the generation identifiers show which node has the newer data",
            Self::DiskStates => "one disk is Inconsistent, so the other one is copied to it",
            Self::SplitBrainSolved => {
                "both nodes were written to independently; a policy or discard-my-data said which \
                 one gives up its changes"
            }
            Self::SplitBrainUnresolved => {
                "both nodes were written to independently and no policy says which one gives up \
                 its changes: decide which node loses and connect it with --discard-my-data"
            }
            Self::UnrelatedData => {
                "the two disks have no common history: check that the right disks are connected; \
                 if one of them may be overwritten, invalidate it or create its meta-data anew"
            }
            Self::NeedsNewerPeer => {
                "only newer versions on both nodes can tell whose data is newer: upgrade the \
                 older node, or invalidate the one that may be overwritten"
            }
            Self::SourceInconsistent => {
                "this node has the newer data but its disk is Inconsistent, and so is the peer's: \
                 connect the node that it was being synchronised from, or force one to be Primary"
            }
            Self::TargetIsPrimary => {
                "the peer has newer data but this node is Primary: make it Secondary and connect \
                 again, or see rr-conflict"
            }
            Self::DryRun => "a tentative connect only says what would happen",
            Self::Contradiction => {
                "each node looks older than the other, which only happens when identifiers were \
                 edited: invalidate the node that may be overwritten"
            }
            Self::NoGeneration => {
                "neither node has a current identifier: create the meta-data of one node anew, or \
                 set its identifiers with drbdmeta set-gi"
            }
        }
    }
}

/// One line for people: outcome, rule, both sides' identifiers, meaning.
impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let outcome = match self.outcome {
            Outcome::Connected => "no resync",
            Outcome::Source(Extent::Bitmap) => "resync to the peer (changed blocks)",
            Outcome::Source(Extent::Full) => "resync to the peer (everything)",
            Outcome::Target(Extent::Bitmap) => "resync from the peer (changed blocks)",
            Outcome::Target(Extent::Full) => "resync from the peer (everything)",
            Outcome::Failed => "no connection",
        };
        let (rule, reason) = (self.comparison.rule, self.reason);
        write!(f, "{outcome}: {} (rule {rule}, {})", reason.meaning(), reason.code())
    }
}
