//! Complaints: the original's text first, an excerpt with a caret and a hint for people.
//!
//! Spec: config-and-drbdadm.md §6.1.

use bstr::{BString, ByteSlice};

use crate::model::Span;
use crate::source::Sources;

/// How a complaint counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// The configuration is invalid (exit code 10, or the code of the fatal error).
    Error,
    /// Only said; the exit code does not change.
    Remark,
}

/// One complaint.
#[derive(Clone, Debug)]
pub struct Diagnostic {
    /// How it counts.
    pub severity: Severity,
    /// Complete text as the original prints it, with its line ends.
    pub text: BString,
    /// Where, if it is about one place.
    pub span: Option<Span>,
    /// What to do about it.
    pub hint: Option<String>,
    /// What the system said, for people.
    pub note: Option<String>,
    /// Not printed by the compatible commands, because the original says nothing here.
    pub native_only: bool,
}

/// Complaints in the order in which they were found.
#[derive(Clone, Debug, Default)]
pub struct Diagnostics {
    /// All of them.
    pub items: Vec<Diagnostic>,
    /// Exit code of the first error that ended parsing at once.
    pub(crate) fatal: Option<u8>,
}

impl Diagnostics {
    /// Adds an error; a missing final newline is supplied.
    pub fn error(&mut self, text: impl Into<Vec<u8>>, span: Option<Span>) -> &mut Diagnostic {
        self.push(Severity::Error, text, span)
    }

    /// Adds a remark.
    pub fn remark(&mut self, text: impl Into<Vec<u8>>, span: Option<Span>) -> &mut Diagnostic {
        self.push(Severity::Remark, text, span)
    }

    fn push(
        &mut self,
        severity: Severity,
        text: impl Into<Vec<u8>>,
        span: Option<Span>,
    ) -> &mut Diagnostic {
        let mut text = BString::from(text.into());
        if !text.ends_with(b"\n") {
            text.push(b'\n');
        }
        let item = Diagnostic { severity, text, span, hint: None, note: None, native_only: false };
        self.items.push(item);
        self.items.last_mut().expect("an item was pushed in the line above")
    }

    /// Adds a remark that only people see, never a program that expects the original.
    pub fn native_remark(&mut self, text: impl Into<Vec<u8>>, span: Span) {
        self.remark(text, Some(span)).native_only = true;
    }

    /// Is there an error (and not only remarks)?
    pub fn has_errors(&self) -> bool {
        self.items.iter().any(|d| d.severity == Severity::Error)
    }

    /// Number of errors.
    pub fn error_count(&self) -> usize {
        self.items.iter().filter(|d| d.severity == Severity::Error).count()
    }
}

/// Longest excerpt, bytes: a line of a hostile file can have any length.
const EXCERPT_MAX: usize = 120;

impl Diagnostic {
    /// The original's text and below it, if there is a place, the line with a caret, and the hint.
    pub fn rendered(&self, sources: &Sources) -> BString {
        let mut out = self.text.to_vec();
        if let Some(excerpt) = self.excerpt(sources) {
            out.extend_from_slice(&excerpt);
        }
        if let Some(note) = &self.note {
            out.extend_from_slice(format!("   = note: {note}\n").as_bytes());
        }
        if let Some(hint) = &self.hint {
            out.extend_from_slice(format!("   = hint: {hint}\n").as_bytes());
        }
        out.into()
    }

    fn excerpt(&self, sources: &Sources) -> Option<Vec<u8>> {
        let span = self.span?;
        let source = sources.get(span.file)?;
        let offset = usize::try_from(span.offset).ok()?.min(source.bytes.len());
        let (before, after) = source.bytes.split_at(offset);
        let start = before.rfind_byte(b'\n').map_or(0, |p| p + 1);
        let end = offset + after.find_byte(b'\n').unwrap_or(after.len());
        let line = source.bytes.get(start..end)?;
        let column = offset - start;
        // Show a window around the place.
        let from = column.saturating_sub(EXCERPT_MAX / 2);
        let window = line.get(from..line.len().min(from + EXCERPT_MAX))?;
        let shown: String =
            window.to_str_lossy().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        let lead = window.get(..column - from)?.to_str_lossy().chars().count();
        let room = shown.chars().count().saturating_sub(lead).max(1);
        let carets = usize::try_from(span.len).ok()?.clamp(1, room);
        let number = span.line.to_string();
        let pad = " ".repeat(number.len());
        // Some of the original's complaints do not say where.
        let place = format!("{}:{}", source.name, span.line);
        let place = if self.text.contains_str(format!(":{}:", span.line)) {
            String::new()
        } else {
            format!("{pad} --> {place}\n")
        };
        let text = format!(
            "{place}{pad} |\n{number} | {shown}\n{pad} | {}{}\n",
            " ".repeat(lead),
            "^".repeat(carets)
        );
        Some(text.into_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::FileId;
    use crate::source::Source;

    #[test]
    fn excerpt_points_at_the_place() {
        let mut sources = Sources::default();
        let bytes: &[u8] = b"resource r0 {\n\tnet { tmeout 6; }\n}\n";
        sources.add(Source { name: "f".into(), absolute: "/f".into(), bytes: bytes.into() });
        let mut all = Diagnostics::default();
        let span = Span { file: FileId(0), line: 2, offset: 21, len: 6 };
        all.error("f:2: wrong", Some(span)).hint = Some("did you mean timeout?".into());
        let text = all.items[0].rendered(&sources).to_string();
        assert_eq!(
            text,
            "f:2: wrong\n  |\n2 |  net { tmeout 6; }\n  |        ^^^^^^\n   = hint: did you mean timeout?\n"
        );
    }
}
