//! What is remembered of the last time that two nodes compared their data.

use drbd_types::{Dstate, Gi, Role};
use serde::{Deserialize, Serialize};

use crate::names;
use crate::snapshot::hex;

/// The last handshake of a volume. It outlasts the connection, not the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handshake {
    /// When, microseconds since 1970, UTC.
    pub at_us: u64,
    /// The rule that compared the two nodes.
    pub rule: u32,
    /// Stable code of why it came out as it did, e.g. `split-brain-unresolved`.
    pub code: String,
    /// The same in words.
    pub text: String,
    /// What was decided.
    pub outcome: Outcome,
    /// Both nodes had changed the same data without each other, whatever was decided then.
    pub is_split_brain: bool,
    /// This node, as it was then.
    pub own: HandshakeSide,
    /// The peer, as it described itself.
    pub peer: HandshakeSide,
}

/// What a handshake led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// No resync.
    Connected,
    /// A resync from this node to the peer.
    Source,
    /// A resync from the peer to this node.
    Target,
    /// No connection.
    Failed,
}

/// One of the two nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandshakeSide {
    /// Generations: current, bitmap, younger and older history.
    #[serde(with = "hex")]
    pub slots: [Gi; 4],
    /// Its set bits: what it has changed, or may have changed, since its bitmap generation.
    pub out_of_sync: u64,
    /// Its role.
    #[serde(with = "names::role")]
    pub role: Role,
    /// Its disk.
    #[serde(with = "names::dstate")]
    pub disk: Dstate,
}
