//! Bytes to tokens. Spec: config-and-drbdadm.md §2.
//!
//! The longest match wins; among equal lengths the order is keyword, IPv4, IPv6, number, quoted
//! text, word. Lexical errors are tokens too: the parser complains about them where it reads a
//! word or a value, and as about any unexpected token elsewhere.

use bstr::{BString, ByteSlice};

use crate::keyword::{Keyword, keyword};
use crate::model::{FileId, Span};

/// Longest word, bytes.
pub(crate) const WORD_MAX: usize = 128;
/// Longest quoted text, units between the quotes.
pub(crate) const QUOTED_MAX: usize = 255;

/// What kind of token it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// End of the file.
    End,
    /// One of `{ } ; : [ ]`.
    Punct(u8),
    /// 1 to 8 digits and perhaps a suffix.
    Number,
    /// Unquoted word that is no keyword.
    Word,
    /// Quoted text, quotes removed.
    Quoted,
    /// Four groups of digits.
    Ipv4,
    /// Hexadecimal groups with colons.
    Ipv6,
    /// A keyword.
    Key(Keyword),
    /// Any other byte.
    Other,
    /// A word or quoted text that breaks a rule.
    Bad(Flaw),
}

/// What is wrong with a bad token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flaw {
    /// Word of more than [`WORD_MAX`] bytes.
    WordTooLong,
    /// Quoted text of more than [`QUOTED_MAX`] units.
    QuotedTooLong,
    /// Quote not closed on its line.
    Unterminated,
}

impl Flaw {
    /// The original's words.
    pub(crate) fn text(self) -> &'static str {
        match self {
            Self::WordTooLong => "Token too long",
            Self::QuotedTooLong => "Double quoted string too long",
            Self::Unterminated => {
                "Unterminated double quoted string\n  we don't allow embedded newlines\n "
            }
        }
    }
}

/// A token and where it stands.
#[derive(Clone, Debug)]
pub(crate) struct Token {
    /// Kind.
    pub(crate) kind: Kind,
    /// Text; quoted texts without quotes and escapes.
    pub(crate) text: BString,
    /// Place.
    pub(crate) span: Span,
}

impl Token {
    /// The number behind `TK` in the original's messages. Spec §6.3.
    pub(crate) fn number(&self) -> u16 {
        match self.kind {
            Kind::End => 0,
            Kind::Punct(b) => u16::from(b),
            Kind::Ipv4 => 280,
            Kind::Number => 281,
            Kind::Word | Kind::Quoted => 282,
            Kind::Other | Kind::Bad(Flaw::Unterminated) => 283,
            Kind::Bad(Flaw::WordTooLong) => 308,
            Kind::Bad(Flaw::QuotedTooLong) => 309,
            Kind::Ipv6 => 316,
            Kind::Key(k) => k.number(),
        }
    }
}

/// Reads tokens from one file.
#[derive(Clone, Debug)]
pub(crate) struct Lexer {
    bytes: std::sync::Arc<[u8]>,
    file: FileId,
    pos: usize,
    line: u32,
}

impl Lexer {
    pub(crate) fn new(bytes: std::sync::Arc<[u8]>, file: FileId) -> Self {
        Self { bytes, file, pos: 0, line: 1 }
    }

    fn rest(&self) -> &[u8] {
        self.bytes.get(self.pos..).unwrap_or_default()
    }

    fn skip_blanks(&mut self) {
        let mut pos = self.pos;
        while let Some(byte) = self.bytes.get(pos) {
            match byte {
                b'\n' => self.line = self.line.saturating_add(1),
                b' ' | b'\t' | b'\r' => {}
                b'#' => {
                    let rest = self.bytes.get(pos..).unwrap_or_default();
                    pos += rest.find_byte(b'\n').unwrap_or(rest.len());
                    continue;
                }
                _ => break,
            }
            pos += 1;
        }
        self.pos = pos;
    }

    /// The next token; [`Kind::End`] again and again at the end.
    pub(crate) fn next(&mut self) -> Token {
        self.skip_blanks();
        let (kind, len) = classify(self.rest());
        let raw = self.rest().get(..len).unwrap_or_default();
        let text = if kind == Kind::Quoted { unquote(raw) } else { BString::from(raw) };
        let span = self.span(len);
        self.pos += len;
        // The original has read the newline (or the backslash before it) when it complains, and
        // counts lines after complaining; nothing is read after such a token.
        Token { kind, text, span }
    }

    /// The next token without taking it.
    pub(crate) fn peek(&self) -> Token {
        self.clone().next()
    }

    fn span(&self, len: usize) -> Span {
        Span {
            file: self.file,
            line: self.line,
            offset: u32::try_from(self.pos).unwrap_or(u32::MAX),
            len: u32::try_from(len).unwrap_or(u32::MAX),
        }
    }
}

fn is_word_byte(b: u8) -> bool {
    b.is_ascii_alphanumeric() || matches!(b, b'/' | b'.' | b'_' | b'-')
}

/// Kind and length of the token at the start of `rest`.
fn classify(rest: &[u8]) -> (Kind, usize) {
    let Some(first) = rest.first().copied() else { return (Kind::End, 0) };
    if first == b'"' {
        return quoted(rest);
    }
    let word = rest.iter().take_while(|b| is_word_byte(**b)).count();
    let v4 = ipv4_len(rest);
    let v6 = ipv6_len(rest);
    if word > 0 && word >= v4.max(v6) {
        if word > WORD_MAX {
            return (Kind::Bad(Flaw::WordTooLong), word);
        }
        let text = rest.get(..word).unwrap_or_default();
        if let Some(k) = keyword(text) {
            return (Kind::Key(k), word);
        }
        if v4 == word {
            return (Kind::Ipv4, word);
        }
        if v6 == word {
            return (Kind::Ipv6, word);
        }
        let kind = if number_len(rest) == word { Kind::Number } else { Kind::Word };
        return (kind, word);
    }
    if v4 > 0 && v4 >= v6 {
        return (Kind::Ipv4, v4);
    }
    if v6 > 0 {
        return (Kind::Ipv6, v6);
    }
    match first {
        b'{' | b'}' | b';' | b':' | b'[' | b']' => (Kind::Punct(first), 1),
        _ => (Kind::Other, 1),
    }
}

fn number_len(rest: &[u8]) -> usize {
    let digits = rest.iter().take_while(|b| b.is_ascii_digit()).count();
    match (digits, rest.get(digits)) {
        (1..=8, Some(b'K' | b'M' | b'G' | b's')) => digits + 1,
        (1..=8, _) => digits,
        _ => 0,
    }
}

fn ipv4_len(rest: &[u8]) -> usize {
    let mut pos = 0;
    for group in 0..4 {
        if group > 0 {
            if rest.get(pos) != Some(&b'.') {
                return 0;
            }
            pos += 1;
        }
        let digits = rest.iter().skip(pos).take(3).take_while(|b| b.is_ascii_digit()).count();
        if digits == 0 {
            return 0;
        }
        pos += digits;
    }
    pos
}

/// Length of hexadecimal groups joined by colons: at most `groups`, at least one.
/// Returns the length after each number of groups, shortest first.
fn hex_groups(rest: &[u8], groups: usize) -> Vec<usize> {
    let mut ends = Vec::new();
    let mut pos = 0;
    for group in 0..groups {
        if group > 0 {
            if rest.get(pos) != Some(&b':') {
                break;
            }
            pos += 1;
        }
        let digits = rest.iter().skip(pos).take(4).take_while(|b| b.is_ascii_hexdigit()).count();
        if digits == 0 {
            break;
        }
        pos += digits;
        ends.push(pos);
    }
    ends
}

fn ipv6_len(rest: &[u8]) -> usize {
    // Cheap way out: an address has a colon within its first five bytes.
    if !rest.iter().take(5).any(|b| *b == b':') {
        return 0;
    }
    let mut best = 0;
    let mapped = rest.get(..7).is_some_and(|head| head.eq_ignore_ascii_case(b"::ffff:"));
    if mapped {
        let v4 = ipv4_len(rest.get(7..).unwrap_or_default());
        if v4 > 0 {
            best = 7 + v4;
        }
    }
    let mut lefts = vec![0];
    lefts.extend(hex_groups(rest, 6));
    for left in lefts {
        if rest.get(left) != Some(&b':') {
            continue;
        }
        let after = rest.get(left + 1..).unwrap_or_default();
        let middle = after.iter().take(4).take_while(|b| b.is_ascii_hexdigit()).count();
        for middle in [0, middle] {
            if after.get(middle) != Some(&b':') {
                continue;
            }
            let tail = after.get(middle + 1..).unwrap_or_default();
            let right = hex_groups(tail, 6).last().copied().unwrap_or(0);
            let mut len = left + 1 + middle + 1 + right;
            let rest = rest.get(len..).unwrap_or_default();
            if rest.first() == Some(&b'%') {
                let scope = rest.iter().skip(1).take_while(|b| is_word_byte(**b)).count();
                if scope > 0 {
                    len += 1 + scope;
                }
            }
            best = best.max(len);
        }
    }
    best
}

fn quoted(rest: &[u8]) -> (Kind, usize) {
    let mut units = 0;
    let mut pos = 1;
    loop {
        match (rest.get(pos), rest.get(pos + 1)) {
            (Some(b'"'), _) if units <= QUOTED_MAX => return (Kind::Quoted, pos + 1),
            (Some(b'"'), _) => return (Kind::Bad(Flaw::QuotedTooLong), pos + 1),
            (Some(b'\n'), _) => return (Kind::Bad(Flaw::Unterminated), pos + 1),
            (Some(b'\\'), Some(b'\n')) => return (Kind::Bad(Flaw::Unterminated), pos + 1),
            (None, _) | (Some(b'\\'), None) => {
                return (Kind::Bad(Flaw::Unterminated), rest.len());
            }
            (Some(b'\\'), Some(_)) => pos += 2,
            (Some(_), _) => pos += 1,
        }
        units += 1;
    }
}

/// Removes quotes and escapes.
fn unquote(raw: &[u8]) -> BString {
    let inner = raw.get(1..raw.len().saturating_sub(1)).unwrap_or_default();
    let mut out = Vec::with_capacity(inner.len());
    let mut bytes = inner.iter();
    while let Some(b) = bytes.next() {
        match b {
            b'\\' => out.extend(bytes.next()),
            b'"' => {}
            _ => out.push(*b),
        }
    }
    out.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kinds(text: &str) -> Vec<(Kind, String)> {
        let mut lexer = Lexer::new(text.as_bytes().into(), FileId(0));
        let mut out = Vec::new();
        loop {
            let t = lexer.next();
            if t.kind == Kind::End {
                return out;
            }
            out.push((t.kind, t.text.to_string()));
        }
    }

    #[test]
    fn longest_match_and_priorities() {
        let check = |text: &str, want: &[Kind]| {
            let got: Vec<Kind> = kinds(text).into_iter().map(|k| k.0).collect();
            assert_eq!(got, want, "{text}");
        };
        check(
            "10K 10k 1T 12345678 123456789",
            &[Kind::Number, Kind::Word, Kind::Word, Kind::Number, Kind::Word],
        );
        check("1.2.3.4 1.2.3.4x 1.5M", &[Kind::Ipv4, Kind::Word, Kind::Word]);
        check("::1 fe80::1%eth0 ab:cd:ef ::ffff:1.2.3.4", &[Kind::Ipv6; 4]);
        check("1:2:3:4:5:6:7:8", &[Kind::Ipv6]);
        check("a:b", &[Kind::Word, Kind::Punct(b':'), Kind::Word]);
        check("\"net\" 'x", &[Kind::Quoted, Kind::Other, Kind::Word]);
        check("net-x", &[Kind::Word]);
        check("10.0.0.1:77", &[Kind::Ipv4, Kind::Punct(b':'), Kind::Number]);
    }

    #[test]
    fn quotes_and_comments() {
        let got = kinds("\"a\\\"b\\\\c\\n\" # \"no\n x");
        assert_eq!(got[0].1, "a\"b\\cn");
        assert_eq!(got[1].1, "x");
        assert_eq!(kinds(&format!("\"{}\"", "x".repeat(255)))[0].0, Kind::Quoted);
        assert_eq!(kinds(&format!("\"{}\"", "x".repeat(256)))[0].0, Kind::Bad(Flaw::QuotedTooLong));
        assert_eq!(kinds("\"abc\n")[0].0, Kind::Bad(Flaw::Unterminated));
        assert_eq!(kinds(&"w".repeat(129))[0].0, Kind::Bad(Flaw::WordTooLong));
    }
}
