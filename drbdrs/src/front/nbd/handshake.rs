//! Fixed newstyle negotiation: bytes in, bytes out.
//!
//! Bounded whatever the client does: at most one option is kept, and a longer one than any real
//! client sends is skipped and refused.

use zerocopy::byteorder::network_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::proto::{self, ExportFlags, info, opt, rep};
use drbd_core::action::DeviceOffer;
use drbd_types::VolumeNr;

/// Longest data of an option that is looked at: a name and some hundred queries.
const OPTION_MAX: u32 = 32 << 10;
/// Longest option that is skipped instead of ending the conversation.
const SKIP_MAX: u32 = 1 << 20;
/// Contexts of block status, with the numbers that replies use.
const CONTEXTS: [(&str, Contexts, u32); 2] = [
    ("base:allocation", Contexts::ALLOCATION, CONTEXT_ALLOCATION),
    ("drbd:out-of-sync", Contexts::OUT_OF_SYNC, CONTEXT_OUT_OF_SYNC),
];

/// Number of `base:allocation`.
pub const CONTEXT_ALLOCATION: u32 = 1;
/// Number of `drbd:out-of-sync`: flag 1 means that the peer has not got these bytes.
pub const CONTEXT_OUT_OF_SYNC: u32 = 2;

bitflags::bitflags! {
    /// Contexts that a client has chosen.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Contexts: u8 {
        /// `base:allocation`.
        const ALLOCATION = 1;
        /// `drbd:out-of-sync`.
        const OUT_OF_SYNC = 2;
    }
}

/// What can be chosen.
pub trait Exports {
    /// Names and descriptions of all.
    fn list(&self) -> Vec<(String, String)>;

    /// One of them; an empty name means the only one.
    ///
    /// # Errors
    /// It does not exist, or not here and now.
    fn find(&self, name: &str) -> Result<Export, Refusal>;

    /// The same, for a client that is about to use it; may wait for that.
    ///
    /// # Errors
    /// As for [`Self::find`].
    fn open(&self, name: &str) -> Result<Export, Refusal> {
        self.find(name)
    }
}

/// An export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// Canonical name.
    pub name: String,
    /// For humans.
    pub description: String,
    /// Which volume of its resource.
    pub volume: VolumeNr,
    /// What its device offers.
    pub offer: DeviceOffer,
}

/// Why not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// No such export.
    Unknown,
    /// Not now: the reason.
    NotNow(String),
    /// The daemon is going away.
    ShuttingDown,
}

impl Export {
    fn flags(&self, structured: bool) -> ExportFlags {
        let mut flags = ExportFlags::HAS_FLAGS
            | ExportFlags::SEND_FLUSH
            | ExportFlags::SEND_FUA
            | ExportFlags::SEND_WRITE_ZEROES
            | ExportFlags::SEND_FAST_ZERO
            | ExportFlags::SEND_CACHE
            | ExportFlags::CAN_MULTI_CONN;
        flags.set(ExportFlags::SEND_TRIM, self.offer.max_discard > 0);
        flags.set(ExportFlags::SEND_DF, structured);
        flags
    }

    fn size(&self) -> u64 {
        self.offer.size.to_bytes().map_or(0, |bytes| bytes.0)
    }
}

/// What was agreed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// The export.
    pub export: Export,
    /// Replies are structured.
    pub structured: bool,
    /// For block status.
    pub contexts: Contexts,
}

/// How far it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// More bytes are needed.
    More,
    /// Requests follow; see [`Handshake::rest`].
    Chosen(Chosen),
    /// The conversation is over, once the output is sent.
    Close,
}

/// One conversation.
#[derive(Debug)]
pub struct Handshake {
    input: Vec<u8>,
    skip: usize,
    has_flags: bool,
    is_fixed: bool,
    no_zeroes: bool,
    structured: bool,
    contexts: Contexts,
    /// The export for which contexts were chosen.
    contexts_of: Option<String>,
}

/// Head of an option.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct OptionHead {
    magic: U64,
    option: U32,
    length: U32,
}

impl Handshake {
    /// Begins, with a greeting.
    pub fn new(out: &mut Vec<u8>) -> Self {
        out.extend_from_slice(U64::new(proto::GREETING).as_bytes());
        out.extend_from_slice(U64::new(proto::OPTION_MAGIC).as_bytes());
        out.extend_from_slice(U16::new(proto::FIXED_NEWSTYLE | proto::NO_ZEROES).as_bytes());
        Self {
            input: Vec::new(),
            skip: 0,
            has_flags: false,
            is_fixed: false,
            no_zeroes: false,
            structured: false,
            contexts: Contexts::empty(),
            contexts_of: None,
        }
    }

    /// Takes what the client sent, and answers into `out`.
    pub fn feed(&mut self, bytes: &[u8], exports: &dyn Exports, out: &mut Vec<u8>) -> Progress {
        let skipped = self.skip.min(bytes.len());
        self.skip -= skipped;
        self.input.extend_from_slice(bytes.get(skipped..).unwrap_or_default());
        loop {
            match self.step(exports, out) {
                Some(Progress::More) => {}
                Some(end) => return end,
                None => return Progress::More,
            }
        }
    }

    /// Bytes behind the choice: the first requests.
    pub fn rest(self) -> Vec<u8> {
        self.input
    }

    /// `None`: not enough bytes.
    fn step(&mut self, exports: &dyn Exports, out: &mut Vec<u8>) -> Option<Progress> {
        if !self.has_flags {
            let (flags, _) = U32::read_from_prefix(&self.input).ok()?;
            self.input.drain(..4);
            self.has_flags = true;
            let known = u32::from(proto::FIXED_NEWSTYLE | proto::NO_ZEROES);
            if flags.get() & !known != 0 {
                return Some(Progress::Close);
            }
            self.is_fixed = flags.get() & u32::from(proto::FIXED_NEWSTYLE) != 0;
            self.no_zeroes = flags.get() & u32::from(proto::NO_ZEROES) != 0;
            return Some(Progress::More);
        }
        let (head, data) = OptionHead::read_from_prefix(&self.input).ok()?;
        let (option, length) = (head.option.get(), head.length.get());
        if head.magic.get() != proto::OPTION_MAGIC || length > SKIP_MAX {
            return Some(Progress::Close);
        }
        let len = usize::try_from(length).ok()?;
        if length > OPTION_MAX {
            let there = data.len().min(len);
            self.skip = len - there;
            self.input.drain(..size_of::<OptionHead>() + there);
            refuse(out, option, rep::ERR_TOO_BIG, "this option is too long");
            return Some(Progress::More);
        }
        let data = data.get(..len)?.to_vec();
        self.input.drain(..size_of::<OptionHead>() + len);
        Some(self.option(option, &data, exports, out))
    }

    fn option(
        &mut self,
        option: u32,
        data: &[u8],
        exports: &dyn Exports,
        out: &mut Vec<u8>,
    ) -> Progress {
        // A client that is not "fixed" understands no answers but this one's.
        if !self.is_fixed && option != opt::EXPORT_NAME {
            return Progress::Close;
        }
        match option {
            opt::EXPORT_NAME => return self.export_name(data, exports, out),
            opt::ABORT => {
                reply(out, option, rep::ACK, &[]);
                return Progress::Close;
            }
            opt::LIST if data.is_empty() => {
                for (name, description) in exports.list() {
                    reply(out, option, rep::SERVER, &[&string(&name), description.as_bytes()]);
                }
                reply(out, option, rep::ACK, &[]);
            }
            opt::STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                reply(out, option, rep::ACK, &[]);
            }
            opt::LIST | opt::STRUCTURED_REPLY => {
                refuse(out, option, rep::ERR_INVALID, "this option has no data");
            }
            opt::INFO | opt::GO => return self.info(option, data, exports, out),
            opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT => {
                self.meta_context(option, data, exports, out);
            }
            _ => refuse(out, option, rep::ERR_UNSUP, "unknown option"),
        }
        Progress::More
    }

    /// The old way cannot refuse: the connection just ends.
    fn export_name(&self, data: &[u8], exports: &dyn Exports, out: &mut Vec<u8>) -> Progress {
        let name = std::str::from_utf8(data).ok();
        let Some(Ok(export)) = name.map(|name| exports.open(name)) else { return Progress::Close };
        out.extend_from_slice(U64::new(export.size()).as_bytes());
        out.extend_from_slice(U16::new(export.flags(self.structured).bits()).as_bytes());
        if !self.no_zeroes {
            out.extend_from_slice(&[0; 124]);
        }
        Progress::Chosen(self.chosen(export))
    }

    fn chosen(&self, export: Export) -> Chosen {
        // Contexts of another export do not count.
        let is_same = self.contexts_of.as_ref() == Some(&export.name);
        let contexts = if is_same { self.contexts } else { Contexts::empty() };
        Chosen { export, structured: self.structured, contexts }
    }

    fn info(&self, option: u32, data: &[u8], exports: &dyn Exports, out: &mut Vec<u8>) -> Progress {
        let Some((name, wanted)) = parse_info(data) else {
            refuse(out, option, rep::ERR_INVALID, "malformed option");
            return Progress::More;
        };
        let found = if option == opt::GO { exports.open(name) } else { exports.find(name) };
        let export = match found {
            Ok(export) => export,
            Err(refusal) => {
                refuse_export(out, option, name, &refusal);
                return Progress::More;
            }
        };
        let flags = U16::new(export.flags(self.structured).bits());
        let size = U64::new(export.size());
        let number = info::EXPORT.to_be_bytes();
        reply(out, option, rep::INFO, &[&number, size.as_bytes(), flags.as_bytes()]);
        for wanted in wanted {
            match wanted.get() {
                info::NAME => {
                    let number = info::NAME.to_be_bytes();
                    reply(out, option, rep::INFO, &[&number, export.name.as_bytes()]);
                }
                info::DESCRIPTION => {
                    let text = export.description.as_bytes();
                    reply(out, option, rep::INFO, &[&info::DESCRIPTION.to_be_bytes(), text]);
                }
                _ => {}
            }
        }
        // Also to those who did not ask: smaller requests will be refused.
        let least = export.offer.logical_block.max(512);
        let preferred = export.offer.physical_block.max(4096).max(least);
        let sizes = [least, preferred, proto::LENGTH_MAX].map(U32::new);
        reply(out, option, rep::INFO, &[&info::BLOCK_SIZE.to_be_bytes(), sizes.as_bytes()]);
        reply(out, option, rep::ACK, &[]);
        if option == opt::GO { Progress::Chosen(self.chosen(export)) } else { Progress::More }
    }

    fn meta_context(&mut self, option: u32, data: &[u8], exports: &dyn Exports, out: &mut Vec<u8>) {
        let is_set = option == opt::SET_META_CONTEXT;
        if is_set {
            self.contexts = Contexts::empty();
            self.contexts_of = None;
        }
        if !self.structured {
            return refuse(out, option, rep::ERR_INVALID, "structured replies come first");
        }
        let Some((name, queries)) = parse_queries(data) else {
            return refuse(out, option, rep::ERR_INVALID, "malformed option");
        };
        let export = match exports.find(name) {
            Ok(export) => export,
            Err(refusal) => return refuse_export(out, option, name, &refusal),
        };
        for (context, flag, number) in CONTEXTS {
            let namespace = context.split_inclusive(':').next().unwrap_or_default();
            let is_wanted = queries.contains(&context.as_bytes())
                || !is_set && (queries.is_empty() || queries.contains(&namespace.as_bytes()));
            if is_wanted {
                self.contexts.set(flag, is_set || self.contexts.contains(flag));
                // A list has no numbers.
                let number = U32::new(if is_set { number } else { 0 });
                reply(out, option, rep::META_CONTEXT, &[number.as_bytes(), context.as_bytes()]);
            }
        }
        if is_set {
            self.contexts_of = Some(export.name);
        }
        reply(out, option, rep::ACK, &[]);
    }
}

/// Length and bytes.
fn string(text: &str) -> Vec<u8> {
    let len = u32::try_from(text.len()).unwrap_or(u32::MAX);
    let mut bytes = U32::new(len).as_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

fn take_string(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (len, rest) = U32::read_from_prefix(data).ok()?;
    if len.get() > proto::STRING_MAX {
        return None;
    }
    rest.split_at_checked(usize::try_from(len.get()).ok()?)
}

fn parse_info(data: &[u8]) -> Option<(&str, Vec<U16>)> {
    let (name, rest) = take_string(data)?;
    let (count, rest) = U16::read_from_prefix(rest).ok()?;
    let wanted = <[U16]>::ref_from_bytes(rest).ok()?;
    if wanted.len() != usize::from(count.get()) {
        return None;
    }
    Some((std::str::from_utf8(name).ok()?, wanted.to_vec()))
}

fn parse_queries(data: &[u8]) -> Option<(&str, Vec<&[u8]>)> {
    let (name, rest) = take_string(data)?;
    let (count, mut rest) = U32::read_from_prefix(rest).ok()?;
    let mut queries = Vec::new();
    for _ in 0..count.get() {
        let (query, behind) = take_string(rest)?;
        queries.push(query);
        rest = behind;
    }
    if !rest.is_empty() {
        return None;
    }
    Some((std::str::from_utf8(name).ok()?, queries))
}

fn reply(out: &mut Vec<u8>, option: u32, kind: u32, parts: &[&[u8]]) {
    let len: usize = parts.iter().map(|part| part.len()).sum();
    out.extend_from_slice(U64::new(proto::OPTION_REPLY_MAGIC).as_bytes());
    for number in [option, kind, u32::try_from(len).unwrap_or(u32::MAX)] {
        out.extend_from_slice(U32::new(number).as_bytes());
    }
    parts.iter().for_each(|part| out.extend_from_slice(part));
}

fn refuse(out: &mut Vec<u8>, option: u32, kind: u32, text: &str) {
    reply(out, option, kind, &[text.as_bytes()]);
}

fn refuse_export(out: &mut Vec<u8>, option: u32, name: &str, refusal: &Refusal) {
    match refusal {
        Refusal::Unknown => {
            let text = format!("there is no export {name:?} here");
            refuse(out, option, rep::ERR_UNKNOWN, &text);
        }
        Refusal::NotNow(text) => refuse(out, option, rep::ERR_POLICY, text),
        Refusal::ShuttingDown => refuse(out, option, rep::ERR_SHUTDOWN, "shutting down"),
    }
}

/// Fuzz body: any bytes in any pieces; the output stays in proportion.
pub fn fuzz(data: &[u8]) {
    struct Two;
    impl Exports for Two {
        fn list(&self) -> Vec<(String, String)> {
            vec![("r0/0".into(), "one".into()), ("r1/0".into(), "two".into())]
        }
        fn find(&self, name: &str) -> Result<Export, Refusal> {
            match name {
                "r0/0" => Ok(tests_export(name)),
                "r1/0" => Err(Refusal::NotNow("r1 is Secondary here".into())),
                _ => Err(Refusal::Unknown),
            }
        }
    }
    let Some((piece, data)) = data.split_first() else { return };
    let mut out = Vec::new();
    let mut handshake = Handshake::new(&mut out);
    for bytes in data.chunks(usize::from(*piece).max(1)) {
        let progress = handshake.feed(bytes, &Two, &mut out);
        assert!(handshake.input.len() <= OPTION_MAX as usize + 16 + bytes.len());
        if progress != Progress::More {
            return;
        }
    }
    assert!(out.len() <= 18 + data.len() * 300, "{} bytes of output", out.len());
}

/// For tests and fuzzing.
fn tests_export(name: &str) -> Export {
    let offer = DeviceOffer {
        size: drbd_types::SectorCount(2048),
        is_primary: true,
        is_continued: false,
        max_io: 1 << 20,
        max_discard: 1 << 20,
        max_write_zeroes: 1 << 20,
        logical_block: 512,
        physical_block: 4096,
    };
    Export { name: name.into(), description: "test".into(), volume: VolumeNr(0), offer }
}

#[cfg(test)]
#[path = "handshake_tests.rs"]
mod tests;
