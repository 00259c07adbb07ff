//! Reads the text form of meta-data.
//!
//! Spec: metadata.md §8.6.3. The bitmap is handed on value by value and never held as a whole.

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

/// Everything but the bitmap.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Head {
    /// Current, bitmap, history 1 and 2.
    pub uuids: [u64; 4],
    /// Flags.
    pub flags: u32,
    /// Agreed size in sectors.
    pub la_size: u64,
    /// Granularity of the bitmap.
    pub bytes_per_bit: u64,
    /// Identity of the device.
    pub device_uuid: u64,
    /// Largest request agreed with the peer.
    pub la_peer_max_bio_size: u64,
    /// Number of stripes of the activity log.
    pub al_stripes: u64,
    /// Blocks of one stripe.
    pub al_stripe_size_4k: u64,
}

/// What a dump may contain.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Punctuation(u8),
    Text(String),
    Number(u64),
    Hex8(u32),
    Hex16(u64),
    Keyword(&'static str),
    End,
    Bad(u8),
}

const KEYWORDS: [&str; 11] = [
    "version",
    "uuid",
    "flags",
    "la-size-sect",
    "bm-byte-per-bit",
    "device-uuid",
    "la-peer-max-bio-size",
    "al-stripes",
    "al-stripe-size-4k",
    "times",
    "bm",
];

/// A dump that can not be read. The text is the original's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ParseError {
    /// Something else was expected.
    Syntax {
        /// What the scanner said before, if it did.
        complaint: Option<String>,
        /// Where.
        line: u32,
        /// What should be there.
        expected: String,
        /// How the message ends.
        found: String,
    },
    /// A dump of another format.
    Version {
        /// As it says.
        found: String,
    },
    /// A granularity that nobody uses.
    BytesPerBit,
    /// A number that the field can not hold.
    Range {
        /// Keyword of the field.
        field: &'static str,
        /// Its value.
        found: u64,
    },
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Syntax { complaint, line, expected, found } => {
                if let Some(complaint) = complaint {
                    writeln!(f, "{complaint}")?;
                }
                write!(f, "Parse error in line {line}: {expected} expected{found}")
            }
            Self::Version { found } => write!(f, "dump is '{found}' you requested 'v08'."),
            Self::BytesPerBit => f.write_str(
                "Invalid value for bm-byte-per-bit: \
                 value must be a power-of-two multiple of 4096",
            ),
            Self::Range { field, found } => write!(f, "'{field}': {found} is out of range"),
        }
    }
}

impl core::error::Error for ParseError {}

/// Where a dump comes from, piece by piece: it may be several times as large as its bitmap.
pub trait Source {
    /// Fills the start of the slice and says how much; 0 at the end. An implementation that can
    /// fail has to remember that and to say it is at the end.
    fn read(&mut self, into: &mut [u8]) -> usize;
}

impl Source for &[u8] {
    fn read(&mut self, into: &mut [u8]) -> usize {
        let len = self.len().min(into.len());
        let (now, later) = self.split_at_checked(len).unwrap_or_default();
        into.iter_mut().zip(now).for_each(|(to, from)| *to = *from);
        *self = later;
        len
    }
}

/// What is read from the source at once.
const PIECE: usize = 1 << 16;
/// More than any token has, and than any message shows.
const AHEAD: usize = 64;

/// A dump being read.
#[derive(Debug)]
pub struct Dump<S> {
    source: S,
    /// Read, but in part not used yet.
    text: Vec<u8>,
    at: usize,
    line: u32,
    complaint: Option<String>,
    ahead: Option<Token>,
}

impl<S: Source> Dump<S> {
    /// Starts to read.
    pub const fn new(source: S) -> Self {
        Self { source, text: Vec::new(), at: 0, line: 1, complaint: None, ahead: None }
    }

    /// Makes sure that the next token is there as a whole.
    fn look_ahead(&mut self) {
        if self.text.len().saturating_sub(self.at) >= AHEAD {
            return;
        }
        self.text.drain(..self.at.min(self.text.len()));
        self.at = 0;
        while self.text.len() < AHEAD {
            let old = self.text.len();
            self.text.resize(PIECE, 0);
            let read = self.source.read(self.text.get_mut(old..).unwrap_or_default());
            self.text.truncate(old + read);
            if read == 0 {
                return;
            }
        }
    }

    /// Reads the version statement.
    ///
    /// # Errors
    /// It is missing, or names another format.
    pub fn version(&mut self) -> Result<(), ParseError> {
        self.keyword("version")?;
        let expected = "short quoted string (\"..up to 20 characters, no newline..\")";
        let found = match self.next() {
            Token::Text(found) => found,
            token => {
                self.ahead = Some(token);
                return Err(self.fail(expected));
            }
        };
        self.punctuation(b';')?;
        if found == "v08" { Ok(()) } else { Err(ParseError::Version { found }) }
    }

    /// Reads everything up to the bitmap.
    ///
    /// # Errors
    /// It is no dump.
    pub fn head(&mut self) -> Result<Head, ParseError> {
        let mut head = Head::default();
        self.keyword("uuid")?;
        self.punctuation(b'{')?;
        for uuid in &mut head.uuids {
            *uuid = self.hex16()?;
            self.punctuation(b';')?;
        }
        self.keyword("flags")?;
        head.flags = self.hex8()?;
        self.punctuation(b';')?;
        self.punctuation(b'}')?;
        head.la_size = self.scalar("la-size-sect")?;
        head.bytes_per_bit = self.scalar("bm-byte-per-bit")?;
        self.keyword("device-uuid")?;
        head.device_uuid = self.hex16()?;
        self.punctuation(b';')?;
        // Dumps of 8.3 end here.
        let defaults = [("la-peer-max-bio-size", 0), ("al-stripes", 1), ("al-stripe-size-4k", 8)];
        let is_short = *self.peek() == Token::Keyword("bm");
        let mut values = [0; 3];
        for (value, (name, default)) in values.iter_mut().zip(defaults) {
            *value = if is_short { default } else { self.scalar(name)? };
            if u32::try_from(*value).is_err() {
                return Err(ParseError::Range { field: name, found: *value });
            }
        }
        [head.la_peer_max_bio_size, head.al_stripes, head.al_stripe_size_4k] = values;
        if head.bytes_per_bit != 4096 {
            return Err(ParseError::BytesPerBit);
        }
        Ok(head)
    }

    /// Reads the bitmap and the end; `each` gets a value and how often it is repeated.
    ///
    /// # Errors
    /// It is no dump, or whatever `each` says.
    pub fn bitmap<E: From<ParseError>>(
        &mut self,
        mut each: impl FnMut(u64, u64) -> Result<(), E>,
    ) -> Result<(), E> {
        self.keyword("bm")?;
        self.punctuation(b'{')?;
        loop {
            match self.next() {
                Token::Hex16(value) => {
                    self.punctuation(b';')?;
                    each(value, 1)?;
                }
                Token::Number(times) => {
                    self.keyword("times")?;
                    let value = self.hex16()?;
                    self.punctuation(b';')?;
                    each(value, times)?;
                }
                Token::Punctuation(b'}') => break,
                token => {
                    self.ahead = Some(token);
                    let expected = "repeat count, 16-digit hex number, or closing brace (})";
                    return Err(self.fail(expected).into());
                }
            }
        }
        match self.next() {
            Token::End => Ok(()),
            token => {
                self.ahead = Some(token);
                Err(self.fail("end of file").into())
            }
        }
    }

    fn scalar(&mut self, name: &'static str) -> Result<u64, ParseError> {
        self.keyword(name)?;
        let value = match self.next() {
            Token::Number(value) => value,
            token => {
                self.ahead = Some(token);
                return Err(self.fail("number ([0-9], up to 20 digits)"));
            }
        };
        self.punctuation(b';')?;
        Ok(value)
    }

    fn keyword(&mut self, name: &'static str) -> Result<(), ParseError> {
        match self.next() {
            Token::Keyword(found) if found == name => Ok(()),
            token => {
                self.ahead = Some(token);
                Err(self.fail(&alloc::format!("keyword '{name}'")))
            }
        }
    }

    fn punctuation(&mut self, mark: u8) -> Result<(), ParseError> {
        match self.next() {
            Token::Punctuation(found) if found == mark => Ok(()),
            token => {
                self.ahead = Some(token);
                Err(self.fail(match mark {
                    b';' => "semicolon (;)",
                    b'{' => "opening brace ({)",
                    _ => "closing brace (})",
                }))
            }
        }
    }

    fn hex16(&mut self) -> Result<u64, ParseError> {
        match self.next() {
            Token::Hex16(value) => Ok(value),
            token => {
                self.ahead = Some(token);
                Err(self.fail("a 16-digit hex number"))
            }
        }
    }

    fn hex8(&mut self) -> Result<u32, ParseError> {
        match self.next() {
            Token::Hex8(value) => Ok(value),
            token => {
                self.ahead = Some(token);
                Err(self.fail("an 8-digit hex number"))
            }
        }
    }

    fn fail(&mut self, expected: &str) -> ParseError {
        let found = match self.next() {
            _ if self.complaint.is_some() => String::new(),
            Token::End => ", but end of file encountered".to_string(),
            Token::Punctuation(mark) => alloc::format!(", not '{}'", char::from(mark)),
            Token::Keyword(word) => alloc::format!(", not '{word}'"),
            Token::Text(_) | Token::Number(_) | Token::Hex8(_) | Token::Hex16(_) => {
                ", not some number".to_string()
            }
            Token::Bad(byte) => {
                let shown = if byte.is_ascii_graphic() { char::from(byte) } else { '.' };
                alloc::format!("; got invalid input character '\\x{byte:02x}' [{shown}]")
            }
        };
        let (complaint, line) = (self.complaint.take(), self.line);
        ParseError::Syntax { complaint, line, expected: expected.to_string(), found }
    }

    fn peek(&mut self) -> &Token {
        let token = self.next();
        self.ahead.insert(token)
    }

    fn next(&mut self) -> Token {
        self.ahead.take().unwrap_or_else(|| self.scan())
    }

    fn scan(&mut self) -> Token {
        self.skip_blank();
        let mut start = [0; AHEAD];
        let rest = self.text.get(self.at..).unwrap_or_default();
        let len = rest.len().min(AHEAD);
        start.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
        let rest = start.get(..len).unwrap_or_default();
        let Some(&first) = rest.first() else { return Token::End };
        match first {
            b'{' | b'}' | b';' | b'[' | b']' => {
                self.at += 1;
                Token::Punctuation(first)
            }
            b'"' => self.scan_text(rest),
            b'-' | b'0'..=b'9' => self.scan_number(rest),
            b'a'..=b'z' => self.scan_word(rest),
            other => {
                self.at += 1;
                Token::Bad(other)
            }
        }
    }

    fn skip_blank(&mut self) {
        let mut is_comment = false;
        loop {
            self.look_ahead();
            let Some(byte) = self.text.get(self.at) else { return };
            match byte {
                b'\n' => {
                    self.line = self.line.saturating_add(1);
                    is_comment = false;
                }
                _ if is_comment => {}
                b' ' | b'\t' | b'\r' => {}
                b'#' => is_comment = true,
                _ => return,
            }
            self.at += 1;
        }
    }

    fn scan_text(&mut self, rest: &[u8]) -> Token {
        let body = rest.get(1..).unwrap_or_default();
        let end = body.iter().position(|b| matches!(b, b'"' | b'\n' | b'\r'));
        match end {
            Some(len @ 1..=20) if body.get(len) == Some(&b'"') => {
                self.at += len + 2;
                let text = body.get(..len).unwrap_or_default();
                Token::Text(String::from_utf8_lossy(text).into_owned())
            }
            _ => self.complain("invalid string", rest),
        }
    }

    fn scan_number(&mut self, rest: &[u8]) -> Token {
        let len = rest.iter().skip(1).take_while(|b| b.is_ascii_alphanumeric()).count() + 1;
        let word = rest.get(..len).unwrap_or_default();
        let text = core::str::from_utf8(word).unwrap_or_default();
        if let Some(hex) = text.strip_prefix("0x") {
            let value = u64::from_str_radix(hex, 16);
            self.at += len;
            return match (hex.len(), value) {
                (16, Ok(value)) => Token::Hex16(value),
                (8, Ok(value)) => u32::try_from(value).map_or(Token::Bad(b'0'), Token::Hex8),
                _ => {
                    self.at -= len;
                    self.complain("invalid hex number (only 8 or 16 hex digits accepted)", rest)
                }
            };
        }
        let digits = text.trim_start_matches('-');
        let count = digits.bytes().take_while(u8::is_ascii_digit).count();
        let digits = digits.get(..count).unwrap_or_default();
        if count == 0 {
            return self.complain("unknown token", rest);
        }
        if count > 19 {
            return self.complain("number too big", rest);
        }
        self.at += count + usize::from(text.starts_with('-'));
        // No field is negative; such a number is out of everybody's range.
        let value = digits.parse().unwrap_or(u64::MAX);
        Token::Number(if text.starts_with('-') { u64::MAX } else { value })
    }

    fn scan_word(&mut self, rest: &[u8]) -> Token {
        let is_word = |b: &&u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
        let len = rest.iter().take_while(is_word).count();
        let word = rest.get(..len).unwrap_or_default();
        match KEYWORDS.iter().find(|k| k.as_bytes() == word) {
            Some(keyword) => {
                self.at += len;
                Token::Keyword(keyword)
            }
            None => self.complain("unknown token", rest),
        }
    }

    fn complain(&mut self, what: &str, rest: &[u8]) -> Token {
        let line = rest.split(|b| *b == b'\n').next().unwrap_or_default();
        let shown: Vec<u8> = line.iter().copied().take(20).collect();
        let shown = String::from_utf8_lossy(&shown).into_owned();
        let number = self.line;
        self.complaint.get_or_insert_with(|| alloc::format!("line {number}: {what}: {shown} ..."));
        self.at += 1;
        Token::Bad(rest.first().copied().unwrap_or_default())
    }
}
