//! Policies that solve a split brain without a person.
//!
//! Spec: states-and-generations.md §4.6. All inputs are what both nodes know from the packets of
//! this handshake, so that both come to mirrored results.

use drbd_types::Role;

use super::Slots;

/// `after-sb-0pri`. Spec §4.6.1; the numbers are those of P_PROTOCOL.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ZeroPrimaries {
    /// Give up (default).
    #[default]
    Disconnect,
    /// The node that was Primary last loses.
    DiscardYoungerPrimary,
    /// The node that was Primary first loses.
    DiscardOlderPrimary,
    /// A node without changes loses.
    DiscardZeroChanges,
    /// The node with fewer changes loses.
    DiscardLeastChanges,
    /// This node loses.
    DiscardLocal,
    /// The peer loses.
    DiscardRemote,
}

/// `after-sb-1pri`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnePrimary {
    /// Give up (default).
    #[default]
    Disconnect,
    /// Discard the Secondary if the policy for no Primary would do so too.
    Consensus,
    /// The Secondary loses.
    DiscardSecondary,
    /// As for no Primary; a Primary that loses calls its handler.
    CallPriLost,
    /// As for no Primary, even if the Primary loses.
    ViolentlyAs0p,
}

/// `after-sb-2pri`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TwoPrimaries {
    /// Give up (default).
    #[default]
    Disconnect,
    /// As for no Primary; the one that loses calls its handler.
    CallPriLost,
    /// As for no Primary.
    ViolentlyAs0p,
}

/// The three policies of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policies {
    /// No Primary.
    pub zero: ZeroPrimaries,
    /// One Primary.
    pub one: OnePrimary,
    /// Two Primaries.
    pub two: TwoPrimaries,
}

impl Policies {
    /// The numbers of P_PROTOCOL, in the order 0pri, 1pri, 2pri. Spec §4.6.1.
    pub const fn numbers(&self) -> [u32; 3] {
        let zero = match self.zero {
            ZeroPrimaries::Disconnect => 0,
            ZeroPrimaries::DiscardYoungerPrimary => 1,
            ZeroPrimaries::DiscardOlderPrimary => 2,
            ZeroPrimaries::DiscardZeroChanges => 3,
            ZeroPrimaries::DiscardLeastChanges => 4,
            ZeroPrimaries::DiscardLocal => 5,
            ZeroPrimaries::DiscardRemote => 6,
        };
        let one = match self.one {
            OnePrimary::Disconnect => 0,
            OnePrimary::Consensus => 7,
            OnePrimary::DiscardSecondary => 8,
            OnePrimary::CallPriLost => 9,
            OnePrimary::ViolentlyAs0p => 10,
        };
        let two = match self.two {
            TwoPrimaries::Disconnect => 0,
            TwoPrimaries::CallPriLost => 9,
            TwoPrimaries::ViolentlyAs0p => 10,
        };
        [zero, one, two]
    }

    /// From the numbers of the peer's P_PROTOCOL, seen from here: its local is our remote.
    /// `None` for numbers that mean nothing at their place.
    pub const fn from_peer(numbers: [u32; 3]) -> Option<Self> {
        let [zero, one, two] = numbers;
        let zero = match zero {
            0 => ZeroPrimaries::Disconnect,
            1 => ZeroPrimaries::DiscardYoungerPrimary,
            2 => ZeroPrimaries::DiscardOlderPrimary,
            3 => ZeroPrimaries::DiscardZeroChanges,
            4 => ZeroPrimaries::DiscardLeastChanges,
            5 => ZeroPrimaries::DiscardRemote,
            6 => ZeroPrimaries::DiscardLocal,
            _ => return None,
        };
        let one = match one {
            0 => OnePrimary::Disconnect,
            7 => OnePrimary::Consensus,
            8 => OnePrimary::DiscardSecondary,
            9 => OnePrimary::CallPriLost,
            10 => OnePrimary::ViolentlyAs0p,
            _ => return None,
        };
        let two = match two {
            0 => TwoPrimaries::Disconnect,
            9 => TwoPrimaries::CallPriLost,
            10 => TwoPrimaries::ViolentlyAs0p,
            _ => return None,
        };
        Some(Self { zero, one, two })
    }
}

/// Who wins a split brain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Winner {
    /// This node becomes the source.
    Own,
    /// The peer becomes the source.
    Peer,
}

/// What both nodes know about each other when they have to solve a split brain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contest {
    /// Own identifiers.
    pub own: Slots,
    /// The peer's identifiers.
    pub peer: Slots,
    /// Set bits that went out with the own last P_UUIDS.
    pub own_bits: u64,
    /// Set bits that the peer reported.
    pub peer_bits: u64,
    /// Own role.
    pub own_role: Role,
    /// The peer's role.
    pub peer_role: Role,
    /// This node accepted the meta connection: breaks ties.
    pub resolve_conflicts: bool,
    /// What an attempt to give up the Primary role would come to: `true` if it would succeed.
    /// During the handshake of a new connection it never does (defect D1, kept: both sides and the
    /// handlers of existing clusters rely on the outcome).
    pub can_demote: bool,
}

/// What a policy comes to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// The winner; `None`: unresolved.
    pub winner: Option<Winner>,
    /// The two-line warning about the missing younger or older primary is due.
    pub fell_back_to_changes: bool,
    /// This node has to give up the Primary role now (it can: [`Contest::can_demote`]).
    pub demote: bool,
    /// Handler `pri-lost-after-sb` is due.
    pub call_pri_lost: bool,
}

impl Verdict {
    fn unresolved() -> Self {
        Self::default()
    }

    fn won_by(winner: Winner) -> Self {
        Self { winner: Some(winner), ..Self::default() }
    }
}

/// Applies the policy for the number of Primaries there are. Spec §4.6.2 to §4.6.4.
pub fn solve(policies: &Policies, contest: &Contest) -> Verdict {
    let primaries = [contest.own_role, contest.peer_role];
    match primaries.iter().filter(|r| **r == Role::Primary).count() {
        0 => zero_primaries(policies.zero, contest),
        1 => one_primary(policies, contest),
        _ => match policies.two {
            TwoPrimaries::Disconnect => Verdict::unresolved(),
            TwoPrimaries::ViolentlyAs0p => zero_primaries(policies.zero, contest),
            TwoPrimaries::CallPriLost => {
                give_up_if_lost(zero_primaries(policies.zero, contest), contest)
            }
        },
    }
}

fn zero_primaries(policy: ZeroPrimaries, contest: &Contest) -> Verdict {
    // Bit 0 of the bitmap identifier: this node was Primary when the generations parted.
    let was_primary = (contest.own.bitmap.flag(), contest.peer.bitmap.flag());
    let winner = match policy {
        ZeroPrimaries::Disconnect => return Verdict::unresolved(),
        ZeroPrimaries::DiscardLocal => Winner::Peer,
        ZeroPrimaries::DiscardRemote => Winner::Own,
        ZeroPrimaries::DiscardYoungerPrimary => match was_primary {
            (false, true) => Winner::Peer,
            (true, false) => Winner::Own,
            (false, false) | (true, true) => return fall_back(contest),
        },
        ZeroPrimaries::DiscardOlderPrimary => match was_primary {
            (false, true) => Winner::Own,
            (true, false) => Winner::Peer,
            (false, false) | (true, true) => return fall_back(contest),
        },
        ZeroPrimaries::DiscardZeroChanges => match zero_changes(contest) {
            Some(winner) => winner,
            None => return Verdict::unresolved(),
        },
        ZeroPrimaries::DiscardLeastChanges => least_changes(contest),
    };
    Verdict::won_by(winner)
}

fn fall_back(contest: &Contest) -> Verdict {
    let winner = zero_changes(contest).unwrap_or_else(|| least_changes(contest));
    Verdict { fell_back_to_changes: true, ..Verdict::won_by(winner) }
}

fn zero_changes(contest: &Contest) -> Option<Winner> {
    match (contest.own_bits, contest.peer_bits) {
        (0, 0) => Some(tie(contest)),
        (_, 0) => Some(Winner::Own),
        (0, _) => Some(Winner::Peer),
        (_, _) => None,
    }
}

fn least_changes(contest: &Contest) -> Winner {
    match contest.own_bits.cmp(&contest.peer_bits) {
        core::cmp::Ordering::Less => Winner::Peer,
        core::cmp::Ordering::Greater => Winner::Own,
        core::cmp::Ordering::Equal => tie(contest),
    }
}

fn tie(contest: &Contest) -> Winner {
    if contest.resolve_conflicts { Winner::Peer } else { Winner::Own }
}

fn one_primary(policies: &Policies, contest: &Contest) -> Verdict {
    let own_is_primary = contest.own_role == Role::Primary;
    match policies.one {
        OnePrimary::Disconnect => Verdict::unresolved(),
        OnePrimary::DiscardSecondary => {
            Verdict::won_by(if own_is_primary { Winner::Own } else { Winner::Peer })
        }
        OnePrimary::ViolentlyAs0p => zero_primaries(policies.zero, contest),
        OnePrimary::Consensus => {
            let verdict = zero_primaries(policies.zero, contest);
            let agrees = match verdict.winner {
                Some(Winner::Peer) => !own_is_primary,
                Some(Winner::Own) => own_is_primary,
                None => false,
            };
            if agrees { verdict } else { Verdict { winner: None, ..verdict } }
        }
        OnePrimary::CallPriLost => give_up_if_lost(zero_primaries(policies.zero, contest), contest),
    }
}

/// A Primary that loses gives up its role, or has the handler called and stays unresolved.
fn give_up_if_lost(verdict: Verdict, contest: &Contest) -> Verdict {
    let lost = verdict.winner == Some(Winner::Peer) && contest.own_role == Role::Primary;
    match (lost, contest.can_demote) {
        (false, _) => verdict,
        (true, true) => Verdict { demote: true, ..verdict },
        (true, false) => Verdict { winner: None, call_pri_lost: true, ..verdict },
    }
}
