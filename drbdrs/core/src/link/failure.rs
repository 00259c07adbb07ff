//! Why it came to nothing, and what happens next. Spec: wire-protocol.md §1.3, §1.5, §3.1, §3.2.

use drbd_wire::PeerError;
use drbd_wire::command::CommandName;

/// What happens next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Another attempt, after a second; the link does it by itself.
    Retry,
    /// Nothing: the administrator must look at it.
    StandAlone,
}

/// Why. Displayed as the original logs it, where it logs something.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkFailure {
    /// The own address can not be used; the errno.
    #[error("bind before listen failed, err = -{0}")]
    Listen(i32),
    /// A stream died during the handshake.
    #[error("connection lost during the handshake")]
    Closed,
    /// The peer was too slow.
    #[error("the peer sent nothing in time during the handshake")]
    TimedOut,
    /// No header, or one that can not be.
    #[error("{0}")]
    Garbage(PeerError),
    /// Another packet instead of the features.
    #[error("expected ConnectionFeatures packet, received: {0}")]
    FeaturesExpected(CommandName),
    /// Features of a wrong length.
    #[error("{0}")]
    FeaturesSize(PeerError),
    /// No common version.
    #[error(
        "incompatible DRBD dialects: I support {min}-{max}, peer supports {peer_min}-{peer_max}"
    )]
    Dialects {
        /// My oldest version.
        min: u32,
        /// My newest version.
        max: u32,
        /// The peer's oldest version.
        peer_min: u32,
        /// The peer's newest version.
        peer_max: u32,
    },
    /// Another packet instead of the challenge.
    #[error("expected AuthChallenge packet, received: {0}")]
    ChallengeExpected(CommandName),
    /// A challenge of more than 128 bytes.
    #[error("expected AuthChallenge payload too big.")]
    ChallengeTooBig,
    /// A challenge of less than 64 bytes.
    #[error("AuthChallenge payload too small.")]
    ChallengeTooSmall,
    /// My own challenge came back.
    #[error("Peer presented the same challenge!")]
    Reflection,
    /// Another packet instead of the response.
    #[error("expected AuthResponse packet, received: {0}")]
    ResponseExpected(CommandName),
    /// A response of a wrong length.
    #[error("expected AuthResponse payload of wrong size")]
    ResponseSize,
    /// The peer does not know the secret.
    #[error("the peer's response does not fit the shared secret")]
    WrongResponse,
    /// A dry run needs version 92.
    #[error("--dry-run is not supported by peer")]
    NoDryRun,
}

impl LinkFailure {
    /// What happens next.
    pub const fn verdict(&self) -> Verdict {
        match self {
            Self::Closed
            | Self::TimedOut
            | Self::Garbage(_)
            | Self::ResponseExpected(_)
            | Self::ResponseSize => Verdict::Retry,
            Self::Listen(_)
            | Self::FeaturesExpected(_)
            | Self::FeaturesSize(_)
            | Self::Dialects { .. }
            | Self::ChallengeExpected(_)
            | Self::ChallengeTooBig
            | Self::ChallengeTooSmall
            | Self::Reflection
            | Self::WrongResponse
            | Self::NoDryRun => Verdict::StandAlone,
        }
    }
}
