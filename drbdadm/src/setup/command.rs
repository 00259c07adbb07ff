//! The one table of drbdsetup's commands. Spec: status-and-integration.md §2.3.

use drbd_conf::options::{OPTIONS, OptionSpec, Section, command_row};

/// What the first words are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Object {
    /// A minor, or (ours) a resource for all its volumes.
    Minor,
    /// Exactly one minor.
    OneMinor,
    /// A resource.
    Resource,
    /// A resource, or (ours) all.
    ResourceOrAll,
    /// Two addresses.
    Connection,
    /// A minor, a resource or all; all if there is none.
    Any,
    /// A resource or all; all if there is none.
    ResourceAny,
    /// Nothing.
    None,
}

/// An option of a command.
#[derive(Clone, Copy, Debug)]
pub(super) enum Opt {
    /// With a row in the option table.
    Row(&'static OptionSpec),
    /// No value.
    Flag(&'static str),
    /// Some text.
    Text(&'static str),
    /// The value may be left out.
    Maybe(&'static str),
}

impl Opt {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Row(spec) => spec.name,
            Self::Flag(name) | Self::Text(name) | Self::Maybe(name) => name,
        }
    }
}

/// Which options a command has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Options {
    /// None.
    None,
    /// `attach`.
    Attach,
    /// `disk-options`.
    Disk,
    /// `connect`.
    Connect,
    /// `net-options`.
    Net,
    /// `new-resource`.
    Resource,
    /// `resource-options`.
    ChangeResource,
    /// Rows of the table of command line options.
    Rows(&'static [&'static str]),
    /// `wait-connect`, `wait-sync`.
    Wait,
    /// Flags without value, texts, and texts that may be left out.
    Plain(&'static [&'static str], &'static [&'static str], &'static [&'static str]),
}

/// A command.
#[derive(Debug)]
pub(super) struct Command {
    pub(super) name: &'static str,
    pub(super) object: Object,
    /// Further words that it needs.
    pub(super) arguments: &'static [&'static str],
    pub(super) options: Options,
    /// Only drbdrs has it.
    pub(super) is_ours: bool,
    /// It takes the lock of the minor.
    pub(super) locks: bool,
}

macro_rules! commands {
    ($( $origin:ident $lock:ident $name:literal $object:ident [$($argument:literal)*] $options:expr; )*) => {
        /// All commands in the order of the help text.
        pub(super) static COMMANDS: &[Command] = &[ $( Command {
            name: $name,
            object: Object::$object,
            arguments: &[$($argument),*],
            options: $options,
            is_ours: commands!(@ $origin),
            locks: commands!(@ $lock),
        }, )* ];
    };
    (@ original) => { false };
    (@ ours) => { true };
    (@ locks) => { true };
    (@ free) => { false };
}

use Options::{Attach, ChangeResource, Connect, Disk, Net, Plain, Rows, Wait};

const FAULT_TEXTS: &[&str] =
    &["operation", "effect", "delay", "permille", "sectors", "stream", "packet"];

commands! {
    original locks "primary" Minor [] Rows(&["force"]);
    original locks "secondary" Minor [] Options::None;
    original locks "attach" OneMinor ["lower_dev" "meta_data_dev" "meta_data_index"] Attach;
    original locks "disk-options" Minor [] Disk;
    original locks "detach" Minor [] Rows(&["force"]);
    original free "connect" Resource ["local_addr" "remote_addr"] Connect;
    original free "net-options" Connection [] Net;
    original free "disconnect" Connection [] Rows(&["force"]);
    original locks "resize" Minor [] Rows(&["size", "assume-peer-has-space", "assume-clean", "al-stripes", "al-stripe-size-kB"]);
    original free "resource-options" Resource [] ChangeResource;
    original locks "new-current-uuid" Minor [] Rows(&["clear-bitmap"]);
    original locks "invalidate" Minor [] Options::None;
    original locks "invalidate-remote" Minor [] Options::None;
    original locks "pause-sync" Minor [] Options::None;
    original locks "resume-sync" Minor [] Options::None;
    original locks "suspend-io" Minor [] Options::None;
    original locks "resume-io" Minor [] Options::None;
    original locks "outdate" Minor [] Options::None;
    original locks "verify" Minor [] Rows(&["start", "stop"]);
    original free "down" ResourceOrAll [] Options::None;
    original free "state" Minor [] Options::None;
    original free "role" Minor [] Options::None;
    original free "sh-status" Any [] Options::None;
    original free "cstate" Minor [] Options::None;
    original free "dstate" Minor [] Options::None;
    original free "show-gi" Minor [] Options::None;
    original free "get-gi" Minor [] Options::None;
    original free "show" Any [] Plain(&["show-defaults", "json"], &[], &[]);
    original free "status" ResourceAny [] Plain(&["verbose", "statistics", "json", "watch"], &[], &["color"]);
    original free "check-resize" Minor [] Options::None;
    original free "events" Any [] Options::None;
    original free "events2" ResourceAny [] Plain(&["timestamps", "statistics", "now", "full", "poll"], &[], &[]);
    original free "wait-connect" Minor [] Wait;
    original free "wait-sync" Minor [] Wait;
    original free "new-resource" Resource [] Options::Resource;
    original free "new-minor" Resource ["minor" "volume"] Options::None;
    original locks "del-minor" OneMinor [] Options::None;
    original free "del-resource" Resource [] Options::None;
    ours free "proc" None [] Plain(&[], &["compat", "details"], &[]);
    ours free "udev" OneMinor [] Options::None;
    ours free "show-stuck" Any [] Options::None;
    ours free "why" ResourceAny [] Options::None;
    ours free "fault-disk" OneMinor [] Plain(&[], FAULT_TEXTS, &[]);
    ours free "fault-stream" Resource [] Plain(&[], FAULT_TEXTS, &[]);
    ours free "fault-packet" Resource [] Plain(&[], FAULT_TEXTS, &[]);
    ours free "fault-clear" None [] Plain(&[], &["id"], &[]);
}

/// Options that the original does not have; they stand last.
pub(super) const OURS: [&str; 4] = ["json", "full", "poll", "watch"];

/// Finds a command by its exact name.
pub(super) fn find(name: &[u8]) -> Option<&'static Command> {
    COMMANDS.iter().find(|c| c.name.as_bytes() == name)
}

impl Command {
    /// Its options in the order of the help text.
    pub(super) fn all_options(&self) -> Vec<Opt> {
        let section = |s| OPTIONS.iter().filter(move |o| o.section == s).map(Opt::Row);
        let rows = |names: &[&str]| -> Vec<Opt> {
            names.iter().filter_map(|n| command_row(n)).map(Opt::Row).collect()
        };
        let mut list = Vec::new();
        match self.options {
            Options::None => {}
            Attach => list.extend(section(Section::Disk)),
            Disk => {
                list.push(Opt::Flag("set-defaults"));
                let fixed = |o: &Opt| matches!(o.name(), "size" | "max-bio-bvecs");
                list.extend(section(Section::Disk).filter(|o| !fixed(o)));
            }
            Connect => {
                let own = ["tentative", "discard-my-data"];
                list = rows(&own);
                list.extend(rows(&["alternate-address", "alternate-peer-address"]));
                list.extend(section(Section::Net));
            }
            Net => {
                list.push(Opt::Flag("set-defaults"));
                list.extend(section(Section::Net));
            }
            Options::Resource => list.extend(section(Section::Options)),
            ChangeResource => {
                list.push(Opt::Flag("set-defaults"));
                list.extend(section(Section::Options));
            }
            Rows(names) => list = rows(names),
            Wait => {
                let limits = ["wfc-timeout", "degr-wfc-timeout", "outdated-wfc-timeout"];
                list.extend(limits.map(Opt::Text));
                list.push(Opt::Maybe("wait-after-sb"));
            }
            Plain(flags, texts, maybe) => {
                let ours = |o: &Opt| OURS.contains(&o.name());
                list.extend(flags.iter().map(|n| Opt::Flag(n)).filter(|o| !ours(o)));
                list.extend(texts.iter().map(|n| Opt::Text(n)));
                list.extend(maybe.iter().map(|n| Opt::Maybe(n)));
                list.extend(flags.iter().map(|n| Opt::Flag(n)).filter(ours));
            }
        }
        list
    }

    /// Old names of options.
    pub(super) fn alias(&self, name: &str) -> Option<&'static str> {
        match (self.name, name) {
            ("primary", "overwrite-data-of-peer") => Some("force"),
            ("connect", "dry-run") => Some("tentative"),
            _ => None,
        }
    }
}
