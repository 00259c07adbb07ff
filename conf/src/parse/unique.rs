//! Names that may be used only once. Spec: config-and-drbdadm.md §6.4, first table.

use std::collections::HashMap;

use bstr::{BStr, BString};

use crate::diag::Diagnostics;
use crate::model::Span;
use crate::source::Sources;

/// Everything that was used so far, with its first place.
///
/// One table for all kinds: the keys carry their kind where the original tells kinds apart, and
/// share a name space where the original's do.
#[derive(Clone, Debug, Default)]
pub struct Uniques {
    first: HashMap<BString, Span>,
}

impl Uniques {
    /// Notes that `key` is used at `span`.
    ///
    /// # Errors
    /// It was used before: the two-line complaint has been added.
    pub fn claim(
        &mut self,
        what: &str,
        key: &BStr,
        span: Span,
        sources: &Sources,
        diagnostics: &mut Diagnostics,
    ) -> Result<(), Conflict> {
        let Some(first) = self.first.get(key) else {
            self.first.insert(key.into(), span);
            return Ok(());
        };
        let mut text =
            format!("{}:{}: conflicting use of {what} '", sources.name(span.file), span.line)
                .into_bytes();
        text.extend_from_slice(key);
        let middle =
            format!("' ...\n{}:{}: {what} '", sources.name(first.file), first.line).into_bytes();
        text.extend_from_slice(&middle);
        text.extend_from_slice(key);
        text.extend_from_slice(b"' first used here.");
        diagnostics.error(text, Some(span));
        Err(Conflict)
    }
}

/// The complaint about a second use has been made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conflict;
