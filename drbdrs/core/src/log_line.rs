//! Lines for the log, in the original's wording where it has one.

use alloc::string::String;

use drbd_types::VolumeNr;

pub use crate::generation::decide::Severity;

/// One line. The shell puts the prefix (resource, volume, minor) in front.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogLine {
    /// How urgent.
    pub severity: Severity,
    /// Whom it concerns; `None`: the connection.
    pub volume: Option<VolumeNr>,
    /// The text, without prefix and line end.
    pub text: String,
}
