//! Printing a configuration: as text, as XML, as JSON. Spec: config-and-drbdadm.md §13.

pub mod json;
pub mod text;
pub mod xml;

use bstr::{BStr, BString};

/// Longest text that the original's printer takes, bytes.
pub const TEXT_MAX: usize = 1020;

/// May the byte stand in a word without quotes?
fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'/' | b'.' | b'_' | b'-')
}

/// A word as dumps print it: quoted where it has to be. Spec §13.3.
///
/// Keywords are quoted too, which the original forgets (its own dump is not readable then).
pub fn quoted(text: &BStr) -> BString {
    let is_keyword = crate::keyword::keyword(text).is_some();
    quote_if(text, is_keyword)
}

/// A host name: quoted only where it could not be read again, whatever its length.
pub(crate) fn quoted_host(text: &BStr) -> BString {
    let is_keyword = crate::keyword::keyword(text).is_some();
    let plain = !text.is_empty() && text.iter().all(|b| is_plain(*b)) && !is_keyword;
    if plain { text.into() } else { quote_if(text, true) }
}

/// A value of an option: keywords are no problem there only where the parser takes them.
pub(crate) fn quote_if(text: &BStr, force: bool) -> BString {
    let plain = !text.is_empty() && text.len() <= 80 && text.iter().all(|b| is_plain(*b));
    if plain && !force {
        return text.into();
    }
    let mut out = vec![b'"'];
    for byte in text.iter() {
        if matches!(byte, b'"' | b'\\') {
            out.push(b'\\');
        }
        out.push(*byte);
    }
    out.push(b'"');
    out.into()
}

/// A text was longer than [`TEXT_MAX`]: exit code 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("string too long.")]
pub struct TooLong;
