//! What the parser produces: the configuration as written, with the place of every value.
//!
//! Nothing here is inherited or defaulted; `crate::expand` and `crate::effective` do that on top.
//! Texts are bytes ([`BString`]): a quoted word may hold any byte but newline.
//! Spec: config-and-drbdadm.md §3, §4.

use std::collections::BTreeMap;

use bstr::BString;

use crate::options::OptionSpec;

/// Number of a file in [`crate::source::Sources`], in the order in which files were first opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(pub u32);

/// A place in a configuration file: where a word, a section or a value was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span {
    /// The file.
    pub file: FileId,
    /// Line, counted from 1, as the original reports it.
    pub line: u32,
    /// Byte offset of the first byte within the file.
    pub offset: u32,
    /// Length in bytes; 0 where a place between bytes is meant (end of file).
    pub len: u32,
}

/// One option as written: `name value;`, `name;`, `no-name;`.
#[derive(Clone, Debug)]
pub struct Opt {
    /// The row of the option table, already under its 8.4 name.
    pub spec: &'static OptionSpec,
    /// The value as text (unquoted; `yes`/`no` for booleans), `None` for bare flags.
    pub value: Option<BString>,
    /// Where it was written.
    pub span: Span,
}

/// A list of options in the order in which the backend would get them (spec §4.5).
#[derive(Clone, Debug, Default)]
pub struct OptionList {
    /// First to last; the last one of a name wins in net and options, see spec §4.5.
    pub items: Vec<Opt>,
}

/// Address family keyword of an `address` statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// `ipv4`, also the default.
    Ipv4,
    /// `ipv6`.
    Ipv6,
    /// `ssocks` (and the old `sci`, which is reported as `ssocks`).
    Ssocks,
    /// `sdp`.
    Sdp,
}

impl Family {
    /// The keyword.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ipv4 => "ipv4",
            Self::Ipv6 => "ipv6",
            Self::Ssocks => "ssocks",
            Self::Sdp => "sdp",
        }
    }
}

impl Address {
    /// `addr:port`, with brackets for IPv6.
    pub fn endpoint(&self) -> BString {
        match self.family {
            Family::Ipv6 => format!("[{}]:{}", self.addr, self.port).into(),
            Family::Ipv4 | Family::Ssocks | Family::Sdp => {
                format!("{}:{}", self.addr, self.port).into()
            }
        }
    }
}

/// `address` as written.
#[derive(Clone, Debug)]
pub struct Address {
    /// Family.
    pub family: Family,
    /// Address text without brackets; for IPv6 with scope as written.
    pub addr: BString,
    /// Port text as written (`7789`).
    pub port: BString,
    /// Where the statement was written.
    pub span: Span,
}

/// Second part of `meta-disk`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetaIndex {
    /// `meta-disk internal`.
    Internal,
    /// External without an index (`flexible-meta-disk dev`, `meta-disk dev`).
    Flexible,
    /// External with `[n]`; the text as written.
    Indexed(BString),
}

/// Meta-data placement of a volume.
#[derive(Clone, Debug)]
pub struct MetaDisk {
    /// Device text; `internal` for internal meta-data.
    pub device: BString,
    /// Which slot.
    pub index: MetaIndex,
    /// Where it was written.
    pub span: Span,
}

/// A volume of a host section or of a resource.
#[derive(Clone, Debug, Default)]
pub struct Volume {
    /// Volume number, 0..=65535.
    pub vnr: u32,
    /// Written without `volume n { }` (always volume 0 then).
    pub implicit: bool,
    /// Device name as written (with `/dev/` put in front of the short form).
    pub device: Option<BString>,
    /// Minor number, 0..=1048575.
    pub minor: Option<u32>,
    /// Backing device or file.
    pub disk: Option<BString>,
    /// Meta-data placement.
    pub meta_disk: Option<MetaDisk>,
    /// `disk { }` of this volume.
    pub disk_options: OptionList,
    /// Where the volume begins.
    pub span: Span,
    /// Where its unique names are claimed: at `device`, or at the end of a host section that
    /// inherits it.
    pub device_span: Option<Span>,
    /// Where the device's name was written.
    pub name_span: Option<Span>,
    /// Where the minor was written; in a device's name too.
    pub minor_span: Option<Span>,
    /// Where the backing device was written.
    pub disk_span: Option<Span>,
    /// Its minor is entered among the unique names already.
    pub(crate) claimed: bool,
}

impl Volume {
    /// The device's name: as written, or made from the minor.
    pub fn device_name(&self) -> BString {
        match (&self.device, self.minor) {
            (Some(name), _) => name.clone(),
            (None, Some(minor)) => format!("/dev/drbd{minor}").into(),
            (None, None) => BString::default(),
        }
    }
}

/// `proxy on a b { }` of a host section.
#[derive(Clone, Debug, Default)]
pub struct ProxySection {
    /// Names after `on`.
    pub on: Vec<BString>,
    /// `inside`.
    pub inside: Option<Address>,
    /// `outside`.
    pub outside: Option<Address>,
    /// `options { }`.
    pub options: OptionList,
    /// `plugin { }` lines, words joined by single blanks.
    pub plugins: Vec<BString>,
    /// Where it begins.
    pub span: Span,
}

/// What kind of host section it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostKind {
    /// `on a b { }`.
    On,
    /// `floating addr`.
    Floating,
    /// `stacked-on-top-of lower { }`.
    StackedOn(BString),
}

/// A host section.
#[derive(Clone, Debug)]
pub struct HostSection {
    /// Kind.
    pub kind: HostKind,
    /// Names: of `on`; of the lower resource's hosts once resolved (stacked);
    /// `addr:port` or `ipv6 [addr]:port` (floating).
    pub names: Vec<BString>,
    /// `address` (or the address of `floating`).
    pub address: Option<Address>,
    /// `alternate-link-address`.
    pub alternate_address: Option<Address>,
    /// Volumes, sorted by number, after inheritance from the resource level.
    pub volumes: Vec<Volume>,
    /// `options { }`: parsed and dumped, never used.
    pub options: OptionList,
    /// `proxy on`.
    pub proxy: Option<ProxySection>,
    /// `node-id` of version 9 files: kept, no effect.
    pub node_id: Option<u32>,
    /// Where the section begins.
    pub span: Span,
}

/// A resource, or the `common` section (which has no hosts).
#[derive(Clone, Debug, Default)]
pub struct Resource {
    /// Name; `common` for the common section.
    pub name: BString,
    /// Place of the `{`.
    pub span: Span,
    /// Host sections in file order.
    pub hosts: Vec<HostSection>,
    /// Resource level volumes (already copied into the hosts that ended after them).
    pub volumes: Vec<Volume>,
    /// `net { }`, with `protocol` and what 8.3's `syncer` puts here.
    pub net: OptionList,
    /// `disk { }`.
    pub disk: OptionList,
    /// `options { }`.
    pub options: OptionList,
    /// `startup { }` options with a value.
    pub startup: OptionList,
    /// `handlers { }`.
    pub handlers: OptionList,
    /// `proxy { }` options.
    pub proxy: OptionList,
    /// `plugin { }` lines of `proxy { }`.
    pub plugins: Vec<BString>,
    /// `become-primary-on`, in order.
    pub become_primary_on: Vec<BString>,
    /// Where it was written.
    pub become_primary_on_span: Option<Span>,
    /// `stacked-timeouts`: where it was written, if it was.
    pub stacked_timeouts: Option<Span>,
    /// Index of the local host section, once resolved (spec §4.1). `None`: ignored here.
    pub me: Option<usize>,
}

impl Resource {
    /// The local host section, if the resource has one for this host.
    pub fn me(&self) -> Option<&HostSection> {
        self.me.and_then(|i| self.hosts.get(i))
    }

    /// Not for this host: invisible for all commands except dump (spec §4.1).
    pub fn is_ignored(&self) -> bool {
        self.me.is_none()
    }

    /// The local section is `stacked-on-top-of`.
    pub fn is_stacked(&self) -> bool {
        self.me().is_some_and(|h| matches!(h.kind, HostKind::StackedOn(_)))
    }
}

/// `usage-count`: accepted and shown, nothing is ever sent (spec §16).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UsageCount {
    /// `yes`.
    Yes,
    /// `no`.
    No,
    /// `ask`, the default.
    #[default]
    Ask,
}

/// The `global` section.
#[derive(Clone, Debug, Default)]
pub struct Global {
    /// `minor-count` (minors), 1..=255; `None`: unset.
    pub minor_count: Option<u32>,
    /// `dialog-refresh` (seconds), 0..=600; default 1.
    pub dialog_refresh: Option<u32>,
    /// `disable-ip-verification`.
    pub disable_ip_verification: bool,
    /// `udev-always-use-vnr`.
    pub udev_always_use_vnr: bool,
    /// `usage-count`.
    pub usage_count: UsageCount,
    /// `cmd-timeout-short` (seconds), 0..=900; effective default 5.
    pub cmd_timeout_short: Option<u32>,
    /// `cmd-timeout-medium` (seconds), 0..=900; effective default 600.
    pub cmd_timeout_medium: Option<u32>,
    /// `cmd-timeout-long` (seconds), 0..=900; effective default none (0).
    pub cmd_timeout_long: Option<u32>,
    /// Where the section begins.
    pub span: Option<Span>,
    /// Where its options were written, by name.
    pub spans: BTreeMap<String, Span>,
}

/// A whole configuration as parsed.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// `global { }`, or its defaults.
    pub global: Global,
    /// `common { }`.
    pub common: Option<Resource>,
    /// Resources in file order.
    pub resources: Vec<Resource>,
}
