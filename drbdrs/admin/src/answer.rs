//! What the daemon answers.

use drbd_types::{Failure, Refusal, failure};
use serde::{Deserialize, Serialize};

use crate::{Resource, Snapshot};

/// One line of an answer. The tag is `answer`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Answer {
    /// State of everything that was asked for; first line of `status` and `watch`.
    Snapshot(Box<Snapshot>),
    /// The new state of one resource.
    Update(Box<Update>),
    /// A handler program begins or ends.
    Helper(HelperCall),
    /// A resync or verify came forward: at most every two seconds.
    Progress {
        /// Of this volume.
        minor: u32,
        /// Done, of 1000.
        permille: u32,
    },
    /// So many lines of the watch were lost, because the client read too slowly. It starts again.
    Skipped {
        /// How many.
        count: u64,
    },
    /// The command waits for this; sent whenever that changes.
    Waiting {
        /// In words that continue "waiting for".
        reason: String,
    },
    /// Text for people: `why`, `show-stuck`.
    Text {
        /// With line ends.
        text: String,
    },
    /// Last line of every answer except that of `watch`.
    Done(Reply),
}

/// One announcement: the whole state of a resource at one moment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Update {
    /// Microseconds since 1970, UTC.
    pub at_us: u64,
    /// Name of the resource.
    pub name: String,
    /// Its state; absent: it is gone.
    pub resource: Option<Resource>,
}

/// Beginning or end of a handler.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelperCall {
    /// Microseconds since 1970, UTC.
    pub at_us: u64,
    /// Resource.
    pub resource: String,
    /// Volume and minor number, for handlers of volumes.
    pub volume: Option<(u16, u32)>,
    /// Does the resource have a connection?
    pub is_connected: bool,
    /// Name of the handler, e.g. `before-resync-target`.
    pub helper: String,
    /// Beginning or end.
    pub phase: HelperPhase,
}

/// Beginning or end of a handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HelperPhase {
    /// It is started.
    Call,
    /// It ended with this raw wait status: exit code times 256.
    Response {
        /// The status.
        status: u32,
    },
}

/// How a command ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// 1 to 4, 101: done. 0 and below: refused, see [`Refusal`]. 102 to 170: see [`Failure`].
    pub code: i32,
    /// Explanations, a line each, without line ends.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub info: Vec<String>,
    /// Which object of several was refused, if not that of the request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object: Option<String>,
}

impl Reply {
    /// Done.
    pub const SUCCESS: Self = Self { code: 1, info: Vec::new(), object: None };

    /// Refused.
    #[must_use]
    pub const fn refused(refusal: Refusal) -> Self {
        Self { code: refusal.number(), info: Vec::new(), object: None }
    }

    /// Can not be done, with an explanation.
    #[must_use]
    pub fn failed(failure: Failure, info: &str) -> Self {
        let info = if info.is_empty() { Vec::new() } else { vec![info.to_owned()] };
        Self { code: failure.number(), info, object: None }
    }

    /// Is it done, or was there nothing to do?
    #[must_use]
    pub const fn is_success(&self) -> bool {
        matches!(self.code, 1..=4 | 101)
    }

    /// Exit code of `drbdsetup`. Spec: status-and-integration.md §2.2.
    #[must_use]
    pub fn exit(&self) -> u8 {
        if self.is_success() {
            return 0;
        }
        if let Some(refusal) = Refusal::from_number(self.code) {
            return refusal.exit();
        }
        match (self.code, Failure::from_number(self.code)) {
            (0, _) => 11,
            (_, Some(_)) => failure::EXIT,
            (_, None) => 20,
        }
    }

    /// What `drbdsetup` writes to stderr, with line ends; empty after a success.
    ///
    /// `object` is the word of the command line, or `??`. Spec: status-and-integration.md §2.2.
    #[must_use]
    pub fn message(&self, object: &str) -> String {
        let (code, object) = (self.code, self.object.as_deref().unwrap_or(object));
        let mut text = match (Refusal::from_number(code), Failure::from_number(code)) {
            _ if self.is_success() => return String::new(),
            (Some(refusal), _) => format!("{object}: State change failed: ({code}) {refusal}\n"),
            (_, Some(failure)) => format!("{object}: Failure: ({code}) {failure}\n"),
            (None, None) if code == 0 => {
                format!("{object}: State change failed: (0)unknown error.\n")
            }
            (None, None) => format!(
                "{object}: Error code {code} unknown.\nYou should update the drbd userland tools.\n"
            ),
        };
        if !self.info.is_empty() {
            text.push_str("additional info from kernel:\n");
            for line in &self.info {
                text.push_str(line);
                text.push('\n');
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_and_exit_codes_are_the_originals() {
        let unknown = Reply::failed(Failure::MinorUnknown, "unknown minor");
        assert_eq!(
            unknown.message("/dev/drbd0"),
            "/dev/drbd0: Failure: (127) Device minor not allocated\n\
             additional info from kernel:\nunknown minor\n"
        );
        assert_eq!(unknown.exit(), 10);
        let refused = Reply::refused(Refusal::NoUpToDateDisk);
        assert_eq!(
            refused.message("0"),
            "0: State change failed: (-2) Need access to UpToDate data\n"
        );
        let exit = |code| Reply { code, ..Reply::default() }.exit();
        let codes = [1, 2, 3, 4, 101, 0, -1, -2, -4, -16, -3, 5, 102, 170, 171, -22];
        let exits = [0, 0, 0, 0, 0, 11, 11, 17, 16, 5, 20, 20, 10, 10, 20, 20];
        assert_eq!(codes.map(exit), exits);
        assert_eq!(Reply::SUCCESS.message("0"), "");
        let zero = Reply { code: 0, ..Reply::default() };
        assert_eq!(zero.message("0"), "0: State change failed: (0)unknown error.\n");
        let new = Reply { code: 171, object: Some("1".into()), ..Reply::default() };
        assert_eq!(
            new.message("r0"),
            "1: Error code 171 unknown.\nYou should update the drbd userland tools.\n"
        );
    }
}
