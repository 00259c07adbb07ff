//! The one table of options: sections, types, units, ranges, defaults, old names, token numbers.
//!
//! Parsing, limits, dumps, help texts, completion and the man page all read it; nothing else knows
//! an option's name. The order within a section is that of the original's help and `show` output.
//! Spec: config-and-drbdadm.md §5.

use std::collections::HashMap;
use std::fmt;
use std::sync::OnceLock;

use bstr::{BStr, BString, ByteSlice};

use self::Kind::{Address, Bool, Enum, Flag, Number, ResyncAfter, Text};
use self::Unit::{Byte, Kib, KibPerSecond, One, Page, Second, Sector, Tenth};

/// The section that an option belongs to in 8.4.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Section {
    /// `disk { }`.
    Disk,
    /// `net { }`.
    Net,
    /// `options { }`.
    Options,
    /// `startup { }`.
    Startup,
    /// `handlers { }`.
    Handlers,
    /// `proxy { }`.
    Proxy,
    /// Only on the command line (spec §5.6).
    Command,
}

/// Unit of a number without a suffix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// A count.
    One,
    /// Bytes.
    Byte,
    /// Pages of 4096 bytes.
    Page,
    /// Seconds.
    Second,
    /// Tenths of a second.
    Tenth,
    /// 1024 bytes.
    Kib,
    /// 1024 bytes per second.
    KibPerSecond,
    /// 512 bytes.
    Sector,
}

impl Unit {
    /// Bytes (or ones) per unit, as a power of two.
    pub fn shift(self) -> u32 {
        match self {
            One | Byte | Page | Second | Tenth => 0,
            Kib | KibPerSecond => 10,
            Sector => 9,
        }
    }

    /// The letter that messages put behind numbers.
    pub fn letter(self) -> &'static str {
        match self {
            One | Byte | Page | Second | Tenth => "",
            Kib | KibPerSecond => "k",
            Sector => "s",
        }
    }

    /// Name for programs and people; `1` for a count.
    pub fn symbol(self) -> &'static str {
        match self {
            One => "1",
            Byte => "bytes",
            Page => "pages of 4096 bytes",
            Second => "s",
            Tenth => "0.1 s",
            Kib => "KiB",
            KibPerSecond => "KiB/s",
            Sector => "sectors of 512 bytes",
        }
    }
}

/// Type, range and default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Unsigned number; `min..=max` and `default` count in `unit`.
    Number {
        /// Unit without suffix.
        unit: Unit,
        /// Smallest value.
        min: u64,
        /// Largest value.
        max: u64,
        /// Default.
        default: u64,
    },
    /// `yes`, `no`, or nothing for yes.
    Bool {
        /// Default.
        default: bool,
    },
    /// One of these texts; the first one is the default.
    Enum {
        /// All values.
        values: &'static [&'static str],
        /// Default.
        default: &'static str,
    },
    /// Any text of at most this many bytes; default empty.
    Text {
        /// Longest value in bytes.
        max: usize,
    },
    /// Name of a resource or `res/vol`; default none.
    ResyncAfter,
    /// No value.
    Flag,
    /// An address (command line only).
    Address,
}

/// Who notices a bad value. Spec §5.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checked {
    /// The parser.
    Parser,
    /// The backend when the command runs.
    Backend,
}

/// One row of the table.
#[derive(Debug, PartialEq, Eq)]
pub struct OptionSpec {
    /// Name in 8.4.
    pub name: &'static str,
    /// Section in 8.4.
    pub section: Section,
    /// Type, range, default.
    pub kind: Kind,
    /// Who checks.
    pub checked: Checked,
    /// 8.3 had it in `syncer { }`.
    pub syncer: bool,
    /// One line for manuals and completions.
    pub help: &'static str,
}

const POLICY_0: &[&str] = &[
    "disconnect",
    "discard-younger-primary",
    "discard-older-primary",
    "discard-zero-changes",
    "discard-least-changes",
    "discard-local",
    "discard-remote",
];
const POLICY_1: &[&str] =
    &["disconnect", "consensus", "discard-secondary", "call-pri-lost-after-sb", "violently-as0p"];
const POLICY_2: &[&str] = &["disconnect", "call-pri-lost-after-sb", "violently-as0p"];
const READ_BALANCING: &[&str] = &[
    "prefer-local",
    "prefer-remote",
    "round-robin",
    "least-pending",
    "when-congested-remote",
    "32K-striping",
    "64K-striping",
    "128K-striping",
    "256K-striping",
    "512K-striping",
    "1M-striping",
];

const fn row(
    section: Section,
    name: &'static str,
    kind: Kind,
    checked: Checked,
    help: &'static str,
) -> OptionSpec {
    OptionSpec { name, section, kind, checked, syncer: false, help }
}

const fn number(unit: Unit, min: u64, max: u64, default: u64) -> Kind {
    Number { unit, min, max, default }
}

const fn syncer(spec: OptionSpec) -> OptionSpec {
    OptionSpec { syncer: true, ..spec }
}

macro_rules! table {
    ($( $section:ident $mark:ident $name:literal $kind:expr, $checked:ident, $help:literal; )*) => {
        &[ $( table!(@ $mark row(Section::$section, $name, $kind, Checked::$checked, $help)), )* ]
    };
    (@ plain $e:expr) => { $e };
    (@ syncer $e:expr) => { syncer($e) };
}

/// All options of files, in the original's order within each section. Spec §5.2 to §5.4.
pub static OPTIONS: &[OptionSpec] = table! {
    Disk plain "size" number(Sector, 0, 2_199_023_255_552, 0), Parser, "largest size of the device; 0: as large as possible";
    Disk plain "max-bio-bvecs" number(One, 0, 128, 0), Backend, "limit of memory segments per request; 0: no limit";
    Disk plain "on-io-error" Enum { values: &["pass_on", "call-local-io-error", "detach"], default: "detach" }, Backend, "what to do when the backing disk fails";
    Disk plain "fencing" Enum { values: &["dont-care", "resource-only", "resource-and-stonith"], default: "dont-care" }, Backend, "whether a lost peer must be outdated first";
    Disk plain "disk-barrier" Bool { default: false }, Parser, "accepted, no effect in 8.4";
    Disk plain "disk-flushes" Bool { default: true }, Parser, "order writes on the peer's disk by flushes";
    Disk plain "disk-drain" Bool { default: true }, Parser, "order writes on the peer's disk by waiting";
    Disk plain "md-flushes" Bool { default: true }, Parser, "flush meta-data writes";
    Disk syncer "resync-rate" number(KibPerSecond, 1, 4_194_304, 250), Parser, "fixed or first rate of a resync";
    Disk syncer "resync-after" ResyncAfter, Parser, "resync only after this resource or volume";
    Disk syncer "al-extents" number(One, 67, 65_534, 1237), Backend, "extents of 4 MiB that may be hot at once";
    Disk plain "al-updates" Bool { default: true }, Parser, "keep the activity log up to date";
    Disk plain "discard-zeroes-if-aligned" Bool { default: true }, Parser, "aligned discards read back as zeroes";
    Disk plain "disable-write-same" Bool { default: false }, Parser, "do not offer write-same";
    Disk syncer "c-plan-ahead" number(Tenth, 0, 300, 20), Parser, "planning time of the resync controller; 0: fixed rate";
    Disk syncer "c-delay-target" number(Tenth, 1, 100, 10), Parser, "delay on the way that the controller aims at";
    Disk syncer "c-fill-target" number(Sector, 0, 1_048_576, 100), Parser, "data on the way that the controller aims at; 0: use the delay";
    Disk syncer "c-max-rate" number(KibPerSecond, 250, 4_194_304, 102_400), Parser, "highest rate of a resync";
    Disk syncer "c-min-rate" number(KibPerSecond, 0, 4_194_304, 250), Parser, "rate that a resync keeps beside application I/O";
    Disk plain "disk-timeout" number(Tenth, 0, 6000, 0), Backend, "a request older than this fails the disk; 0: never";
    Disk plain "read-balancing" Enum { values: READ_BALANCING, default: "prefer-local" }, Backend, "which node serves reads";
    Disk plain "rs-discard-granularity" number(Byte, 0, 1_048_576, 0), Backend, "resync zeroed ranges of this size as discards; 0: off";

    Net plain "protocol" Enum { values: &["A", "B", "C"], default: "C" }, Parser, "when a write counts as done: A sent, B received, C written";
    Net plain "timeout" number(Tenth, 1, 600, 60), Parser, "peer must answer within";
    Net plain "max-epoch-size" number(One, 1, 20_000, 2048), Parser, "writes between two barriers";
    Net plain "max-buffers" number(Page, 32, 131_072, 2048), Parser, "buffers for the peer's data";
    Net plain "unplug-watermark" number(One, 1, 131_072, 128), Backend, "accepted, no effect";
    Net plain "connect-int" number(Second, 1, 120, 10), Parser, "pause between connection attempts";
    Net plain "ping-int" number(Second, 1, 120, 10), Parser, "idle time before a ping";
    Net plain "sndbuf-size" number(Byte, 0, 10_485_760, 0), Parser, "send buffer of the data connection; 0: automatic";
    Net plain "rcvbuf-size" number(Byte, 0, 10_485_760, 0), Parser, "receive buffer; 0: automatic";
    Net plain "ko-count" number(One, 0, 200, 7), Parser, "time-outs until the peer counts as dead; 0: never";
    Net plain "allow-two-primaries" Bool { default: false }, Parser, "both nodes may be Primary";
    Net plain "cram-hmac-alg" Text { max: 63 }, Backend, "digest that authenticates the peer";
    Net plain "shared-secret" Text { max: 63 }, Backend, "secret for it";
    Net plain "after-sb-0pri" Enum { values: POLICY_0, default: "disconnect" }, Backend, "split brain without Primary";
    Net plain "after-sb-1pri" Enum { values: POLICY_1, default: "disconnect" }, Backend, "split brain with one Primary";
    Net plain "after-sb-2pri" Enum { values: POLICY_2, default: "disconnect" }, Backend, "split brain with two Primaries";
    Net plain "always-asbp" Bool { default: false }, Parser, "use these policies also for unclear histories";
    Net plain "rr-conflict" Enum { values: &["disconnect", "call-pri-lost", "violently"], default: "disconnect" }, Backend, "a Primary should become sync target";
    Net plain "ping-timeout" number(Tenth, 1, 300, 5), Backend, "peer must answer a ping within";
    Net plain "data-integrity-alg" Text { max: 63 }, Backend, "digest over all data on the wire";
    Net plain "tcp-cork" Bool { default: true }, Parser, "collect small packets";
    Net plain "on-congestion" Enum { values: &["block", "pull-ahead", "disconnect"], default: "block" }, Backend, "the connection is too slow (protocol A)";
    Net plain "congestion-fill" number(Sector, 0, 20_971_520, 0), Parser, "data on the way that counts as congestion; 0: off";
    Net plain "congestion-extents" number(One, 67, 65_534, 1237), Parser, "hot extents that count as congestion";
    Net syncer "csums-alg" Text { max: 63 }, Backend, "digest to skip equal blocks in a resync";
    Net plain "csums-after-crash-only" Bool { default: false }, Parser, "use it only after a crash of a Primary";
    Net syncer "verify-alg" Text { max: 63 }, Backend, "digest for online verify";
    Net syncer "use-rle" Bool { default: true }, Parser, "send bitmaps run-length coded";
    Net plain "socket-check-timeout" number(Tenth, 0, 300, 0), Backend, "wait for a working connection; 0: as ping-timeout";

    Options syncer "cpu-mask" Text { max: 31 }, Backend, "processors to run on, hexadecimal";
    Options syncer "on-no-data-accessible" Enum { values: &["io-error", "suspend-io"], default: "io-error" }, Backend, "neither node has usable data";

    Startup plain "wfc-timeout" number(Second, 0, 300_000, 0), Parser, "wait for the peer at boot; 0: for ever";
    Startup plain "degr-wfc-timeout" number(Second, 0, 300_000, 0), Parser, "the same after a degraded cluster went down";
    Startup plain "outdated-wfc-timeout" number(Second, 0, 300_000, 0), Parser, "the same if the peer was outdated";
    Startup plain "wait-after-sb" Bool { default: false }, Parser, "go on waiting after a split brain";

    Handlers plain "pri-on-incon-degr" Text { max: 1020 }, Backend, "a Primary lost its last good data";
    Handlers plain "pri-lost-after-sb" Text { max: 1020 }, Backend, "a Primary lost a split brain";
    Handlers plain "pri-lost" Text { max: 1020 }, Backend, "a Primary should become sync target";
    Handlers plain "initial-split-brain" Text { max: 1020 }, Backend, "a split brain was detected";
    Handlers plain "split-brain" Text { max: 1020 }, Backend, "a split brain stays unresolved";
    Handlers plain "fence-peer" Text { max: 1020 }, Backend, "outdate the peer";
    Handlers plain "unfence-peer" Text { max: 1020 }, Backend, "the peer is up to date again";
    Handlers plain "local-io-error" Text { max: 1020 }, Backend, "the backing disk failed";
    Handlers plain "before-resync-target" Text { max: 1020 }, Backend, "a resync to this node begins";
    Handlers plain "after-resync-target" Text { max: 1020 }, Backend, "a resync to this node ended";
    Handlers plain "before-resync-source" Text { max: 1020 }, Backend, "a resync from this node begins";
    Handlers plain "out-of-sync" Text { max: 1020 }, Backend, "online verify found differences";

    Proxy plain "memlimit" Text { max: 255 }, Backend, "memory of the proxy";
    Proxy plain "read-loops" Text { max: 255 }, Backend, "read loops of the proxy";
    Proxy plain "compression" Text { max: 255 }, Backend, "compression of the proxy";
    Proxy plain "bwlimit" Text { max: 255 }, Backend, "bandwidth of the proxy";
    Proxy plain "sndbuf-size" number(Byte, 0, 10_485_760, 0), Parser, "send buffer of the proxy";
    Proxy plain "rcvbuf-size" number(Byte, 0, 10_485_760, 0), Parser, "receive buffer of the proxy";
    Proxy plain "ping-timeout" Text { max: 255 }, Backend, "ping time-out of the proxy";
};

/// An option of 8.3 that files may still have, beside the table: it is shown and handed to
/// `attach`, which ignores it. Spec §5.2.
pub static USE_BMBV: OptionSpec =
    row(Section::Disk, "use-bmbv", Bool { default: false }, Checked::Parser, "no effect");

/// Options that exist only on command lines. Spec §5.6.
pub static COMMAND_OPTIONS: &[OptionSpec] = table! {
    Command plain "force" Bool { default: false }, Backend, "do it in spite of the danger";
    Command plain "overwrite-data-of-peer" Bool { default: false }, Backend, "old name of force";
    Command plain "tentative" Bool { default: false }, Backend, "only find out what would happen";
    Command plain "dry-run" Bool { default: false }, Backend, "old name of tentative";
    Command plain "discard-my-data" Bool { default: false }, Backend, "give up the own changes of a split brain";
    Command plain "alternate-address" Address, Backend, "second local address";
    Command plain "alternate-peer-address" Address, Backend, "second address of the peer";
    Command plain "set-defaults" Bool { default: false }, Backend, "reset everything that is not named";
    Command plain "clear-bitmap" Bool { default: false }, Backend, "the disks are known to be equal";
    Command plain "size" number(Sector, 0, 2_199_023_255_552, 0), Backend, "new size; 0: as large as possible";
    Command plain "assume-peer-has-space" Bool { default: false }, Backend, "do not ask the peer";
    Command plain "assume-clean" Bool { default: false }, Backend, "the new part needs no resync";
    Command plain "al-stripes" number(One, 1, 1024, 1), Backend, "stripes of the activity log";
    Command plain "al-stripe-size-kB" number(Kib, 4, 16_777_216, 32), Backend, "size of a stripe";
    Command plain "start" number(Sector, 0, 2_199_023_255_552, 0), Backend, "first sector";
    Command plain "stop" number(Sector, 0, 2_199_023_255_552, 0), Backend, "sector behind the last";
};

/// Old names that stand for a row of the table, with the value that a bare old name means.
static OLD_NAMES: &[(&str, Section, &str, Option<&str>)] = &[
    ("rate", Section::Disk, "resync-rate", None),
    ("after", Section::Disk, "resync-after", None),
    ("no-disk-barrier", Section::Disk, "disk-barrier", Some("no")),
    ("no-disk-flushes", Section::Disk, "disk-flushes", Some("no")),
    ("no-disk-drain", Section::Disk, "disk-drain", Some("no")),
    ("no-md-flushes", Section::Disk, "md-flushes", Some("no")),
    ("no-tcp-cork", Section::Net, "tcp-cork", Some("no")),
    ("outdate-peer", Section::Handlers, "fence-peer", None),
];

/// How an option was spelled.
#[derive(Clone, Copy, Debug)]
pub struct Found {
    /// The row.
    pub spec: &'static OptionSpec,
    /// The value that the name itself means (`no-…`).
    pub implied: Option<&'static str>,
    /// The word may stand in 8.3's `syncer { }`.
    pub syncer: bool,
    /// The number that the original's messages show for the word.
    pub token: u16,
}

type Index = HashMap<(&'static [u8], Section), Found>;

fn index() -> &'static Index {
    static INDEX: OnceLock<Index> = OnceLock::new();
    INDEX.get_or_init(build_index)
}

fn build_index() -> Index {
    let mut index = Index::new();
    for spec in OPTIONS {
        // The old names of these two are what 8.3 had in `syncer`; the new names were never there.
        let renamed = matches!(spec.name, "resync-rate" | "resync-after");
        let syncer = spec.syncer && !renamed;
        let found = Found { spec, implied: None, syncer, token: token(spec, syncer) };
        index.insert((spec.name.as_bytes(), spec.section), found);
    }
    for (old, section, name, implied) in OLD_NAMES {
        let Some(spec) = lookup_row(*section, name) else { continue };
        let token = match (implied, spec.section) {
            (Some(_), Section::Net) => 288,
            (Some(_), _) => 285,
            (None, _) => token(spec, spec.syncer),
        };
        let found = Found { spec, implied: *implied, syncer: spec.syncer, token };
        index.insert((old.as_bytes(), *section), found);
    }
    index
}

fn lookup_row(section: Section, name: &str) -> Option<&'static OptionSpec> {
    OPTIONS.iter().find(|o| o.section == section && o.name == name)
}

/// Token numbers of spec §6.3.
fn token(spec: &OptionSpec, syncer: bool) -> u16 {
    let base = match (spec.section, spec.kind) {
        (Section::Disk, Bool { .. }) => 284,
        (Section::Disk, _) => 286,
        (Section::Net, Bool { .. }) => 287,
        (Section::Net, _) => 289,
        (Section::Startup, Bool { .. }) => 292,
        (Section::Startup, _) => 293,
        (Section::Handlers, _) => 295,
        (Section::Options, _) => 326,
        (Section::Proxy, _) => 306,
        (Section::Command, _) => 317,
    };
    match (spec.name, syncer) {
        ("sndbuf-size" | "rcvbuf-size" | "ping-timeout", _) => 12_577,
        (_, _) if spec.section == Section::Proxy => 12_594,
        (_, true) => base + 8192,
        (_, false) => base,
    }
}

/// Finds the option that `word` names in `section`, under its new or an old name.
pub fn find(section: Section, word: &[u8]) -> Option<Found> {
    let index: &HashMap<(&[u8], Section), Found> = index();
    index.get(&(word, section)).copied()
}

/// The row with this 8.4 name.
pub fn row_of(section: Section, name: &str) -> Option<&'static OptionSpec> {
    lookup_row(section, name)
}

/// The option with this name in any section, for token numbers of misplaced words.
pub(crate) fn find_anywhere(word: &[u8]) -> Option<Found> {
    use Section::{Disk, Handlers, Net, Options, Proxy, Startup};
    [Disk, Net, Options, Startup, Handlers, Proxy].into_iter().find_map(|s| find(s, word))
}

/// A typed value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// A number in the option's unit.
    Number(u64),
    /// A boolean.
    Bool(bool),
    /// One of the values of an enumeration.
    Enum(&'static str),
    /// A text.
    Text(BString),
    /// Nothing (`resync-after` unset).
    None,
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(n) => write!(f, "{n}"),
            Self::Bool(b) => f.write_str(if *b { "yes" } else { "no" }),
            Self::Enum(e) => f.write_str(e),
            Self::Text(t) => write!(f, "{t}"),
            Self::None => f.write_str("none"),
        }
    }
}

/// Why a text is not a value of an option.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    /// Not a number: exit code 20 at once.
    #[error("{0} is not a valid number")]
    NotANumber(BString),
    /// Empty where a number is needed: exit code 100 at once.
    #[error("missing number argument")]
    Empty,
    /// Does not fit 64 bits after scaling: exit code 20 at once.
    #[error("{0}: out of range")]
    Overflow(BString),
    /// Outside the range: a later error, exit code 10.
    #[error("{value} out of range [{min}..{max}]")]
    OutOfRange {
        /// Value in the option's unit.
        value: u64,
        /// Smallest.
        min: u64,
        /// Largest.
        max: u64,
    },
    /// None of the values of an enumeration.
    #[error("'{0}' is not one of the allowed values")]
    NotAllowed(BString),
    /// Longer than allowed.
    #[error("longer than {max} bytes")]
    TooLong {
        /// Longest, bytes.
        max: usize,
    },
}

/// Reads a number with optional suffix, in units of `unit`. Spec §5.1.
///
/// # Errors
/// See [`ValueError`]; the range is not checked here.
pub fn parse_number(text: &[u8], unit: Unit) -> Result<u64, ValueError> {
    if text.is_empty() {
        return Err(ValueError::Empty);
    }
    let bad = || ValueError::NotANumber(BString::from(text));
    let body = text.trim_start_with(|c| matches!(c, ' ' | '\t' | '\n' | '\r' | '\x0b' | '\x0c'));
    let (negative, body) = match body.split_first() {
        Some((b'-', rest)) => (true, rest),
        Some((b'+', rest)) => (false, rest),
        _ => (false, body),
    };
    let digits = body.iter().take_while(|b| b.is_ascii_digit()).count();
    let (number, suffix) = body.split_at(digits);
    if number.is_empty() {
        return Err(bad());
    }
    let mut value = 0u64;
    for d in number {
        let next = value.checked_mul(10).and_then(|v| v.checked_add(u64::from(d - b'0')));
        value = next.ok_or_else(bad)?;
    }
    if negative {
        value = value.wrapping_neg();
    }
    let shift = match suffix {
        b"" => return Ok(value),
        b"s" => 9,
        b"K" | b"k" => 10,
        b"M" | b"m" => 20,
        b"G" | b"g" => 30,
        _ => return Err(bad()),
    };
    let overflow = || ValueError::Overflow(BString::from(text));
    if shift >= unit.shift() {
        let by = shift - unit.shift();
        let scaled = value.checked_shl(by).filter(|s| s >> by == value);
        scaled.ok_or_else(overflow)
    } else {
        let by = unit.shift() - shift;
        let round = (1u64 << by) - 1;
        Ok(value.checked_add(round).ok_or_else(overflow)? >> by)
    }
}

impl OptionSpec {
    /// The typed value of a text as written in a file.
    ///
    /// # Errors
    /// A text that is not a value of this option, see [`ValueError`].
    pub fn parse_value(&self, text: Option<&BStr>) -> Result<Value, ValueError> {
        let Some(text) = text else { return Ok(Value::Bool(true)) };
        match self.kind {
            Number { unit, min, max, .. } => {
                let value = parse_number(text, unit)?;
                if (min..=max).contains(&value) {
                    Ok(Value::Number(value))
                } else {
                    Err(ValueError::OutOfRange { value, min, max })
                }
            }
            Bool { .. } | Flag => Ok(Value::Bool(text != "no")),
            Enum { values, .. } => {
                let found = values.iter().find(|v| {
                    if self.name == "protocol" {
                        v.as_bytes().eq_ignore_ascii_case(text)
                    } else {
                        v.as_bytes() == text.as_bytes()
                    }
                });
                found.map(|v| Value::Enum(v)).ok_or_else(|| ValueError::NotAllowed(text.into()))
            }
            Text { max } if text.len() > max => Err(ValueError::TooLong { max }),
            Text { .. } | ResyncAfter | Address => Ok(Value::Text(text.into())),
        }
    }

    /// The value without any configuration.
    pub fn default_value(&self) -> Value {
        match self.kind {
            Number { default, .. } => Value::Number(default),
            Bool { default } => Value::Bool(default),
            Enum { default, .. } => Value::Enum(default),
            Text { .. } => Value::Text(BString::default()),
            Flag => Value::Bool(false),
            ResyncAfter | Address => Value::None,
        }
    }

    /// Takes `yes`, `no` or nothing.
    pub fn is_bool(&self) -> bool {
        matches!(self.kind, Bool { .. })
    }

    /// Unit of numbers.
    pub fn unit(&self) -> Unit {
        match self.kind {
            Number { unit, .. } => unit,
            _ => One,
        }
    }
}

/// The options of a command, in the order of its help text. Spec §7.2, §7.6.
pub fn command_options(command: &str) -> Vec<&'static OptionSpec> {
    let section = |s: Section| OPTIONS.iter().filter(move |o| o.section == s);
    let named = |names: &[&str]| names.iter().filter_map(|n| command_row(n)).collect::<Vec<_>>();
    let mut list = Vec::new();
    match command {
        "attach" => list.extend(section(Section::Disk)),
        "disk-options" => list.extend(section(Section::Disk).filter(|o| !is_attach_only(o))),
        "connect" => {
            list = named(&[
                "tentative",
                "discard-my-data",
                "alternate-address",
                "alternate-peer-address",
            ]);
            list.extend(section(Section::Net));
        }
        "net-options" => list.extend(section(Section::Net)),
        "resource-options" => list.extend(section(Section::Options)),
        "detach" | "disconnect" | "primary" => list = named(&["force"]),
        "new-current-uuid" => list = named(&["clear-bitmap"]),
        _ => {}
    }
    list
}

/// The row of an option that exists only on command lines.
pub fn command_row(name: &str) -> Option<&'static OptionSpec> {
    COMMAND_OPTIONS.iter().find(|o| o.name == name)
}

fn is_attach_only(option: &OptionSpec) -> bool {
    matches!(option.name, "size" | "max-bio-bvecs")
}
