//! The command line: getopt_long's rules, finding the command, options for the backend.
//!
//! Spec: config-and-drbdadm.md §7. Arguments are bytes; a file name or value need not be UTF-8.

use bstr::{BString, ByteSlice};
use drbd_conf::options::{self, OptionSpec};

use crate::command::{self, Command};
use crate::{check, usage};

/// What a general option is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum General {
    /// `-S`.
    Stacked,
    /// `-d`.
    DryRun,
    /// `-v`.
    Verbose,
    /// `-c`.
    ConfigFile,
    /// `-t`.
    ConfigToTest,
    /// `-s`.
    Drbdsetup,
    /// `-m`.
    Drbdmeta,
    /// `-p`.
    DrbdProxyCtl,
    /// `-n`.
    ShVarname,
    /// `-P`.
    Peer,
    /// `-V`.
    Version,
    /// `-W`.
    SetupOption,
    /// `-h`.
    Help,
}

/// General options in the order of the help text: letter, name, takes an argument.
pub static GENERAL: [(General, u8, &str, bool); 13] = [
    (General::Stacked, b'S', "stacked", false),
    (General::DryRun, b'd', "dry-run", false),
    (General::Verbose, b'v', "verbose", false),
    (General::ConfigFile, b'c', "config-file", true),
    (General::ConfigToTest, b't', "config-to-test", true),
    (General::Drbdsetup, b's', "drbdsetup", true),
    (General::Drbdmeta, b'm', "drbdmeta", true),
    (General::DrbdProxyCtl, b'p', "drbd-proxy-ctl", true),
    (General::ShVarname, b'n', "sh-varname", true),
    (General::Peer, b'P', "peer", true),
    (General::Version, b'V', "version", false),
    (General::SetupOption, b'W', "setup-option", true),
    (General::Help, b'h', "help", false),
];

/// Commands whose options are recognised anywhere, in getopt's table order. Spec §7.2.
const OPTION_COMMANDS: [&str; 9] = [
    "attach",
    "disk-options",
    "detach",
    "connect",
    "net-options",
    "disconnect",
    "resource-options",
    "primary",
    "new-current-uuid",
];

/// Output format of `dump` (ours).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// As the original.
    #[default]
    Text,
    /// As `dump-xml`.
    Xml,
    /// Effective configuration for programs.
    Json,
}

/// A command line, understood.
#[derive(Clone, Debug)]
pub struct Invocation {
    /// argv[0] as messages show it.
    pub program: BString,
    /// The command.
    pub command: &'static Command,
    /// `-S`.
    pub stacked: bool,
    /// How often `-d` was given.
    pub dry_run: u32,
    /// How often `-v` was given.
    pub verbose: u32,
    /// `-c`.
    pub config_file: Option<BString>,
    /// `-t`.
    pub config_to_test: Option<BString>,
    /// `-s`.
    pub drbdsetup: Option<BString>,
    /// `-m`.
    pub drbdmeta: Option<BString>,
    /// `-p`.
    pub drbd_proxy_ctl: Option<BString>,
    /// `-n`.
    pub sh_varname: Option<BString>,
    /// `-P`.
    pub peer: Option<BString>,
    /// Options for the backend, in order.
    pub backend_options: Vec<BString>,
    /// Resource arguments.
    pub names: Vec<BString>,
    /// `--format` of dump.
    pub format: Format,
    /// `--node-name`: the local host's name instead of the system's.
    pub node_name: Option<BString>,
}

/// What a command line comes to.
#[derive(Debug)]
pub enum Outcome {
    /// Run this.
    Run(Box<Invocation>),
    /// Print these and end with the code.
    End {
        /// For stdout.
        stdout: BString,
        /// For stderr.
        stderr: BString,
        /// Exit code.
        code: u8,
    },
    /// `-V`.
    Version,
}

fn end(stdout: impl Into<BString>, stderr: impl Into<BString>, code: u8) -> Outcome {
    Outcome::End { stdout: stdout.into(), stderr: stderr.into(), code }
}

/// A long option of getopt's table.
#[derive(Clone, Copy)]
struct Long {
    name: &'static str,
    argument: Argument,
    meaning: Meaning,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Argument {
    No,
    Required,
    Optional,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Meaning {
    General(General),
    Backend,
    Format,
    NodeName,
}

/// getopt's table: general options, then the options of each command in turn.
fn long_options() -> Vec<Long> {
    let mut table: Vec<Long> = GENERAL
        .iter()
        .map(|(meaning, _, name, argument)| Long {
            name,
            argument: if *argument { Argument::Required } else { Argument::No },
            meaning: Meaning::General(*meaning),
        })
        .collect();
    for command in OPTION_COMMANDS {
        for spec in options::command_options(command) {
            let argument = if spec.is_bool() { Argument::Optional } else { Argument::Required };
            table.push(Long { name: spec.name, argument, meaning: Meaning::Backend });
        }
    }
    table
}

/// Ours; found only by its full name, so that no abbreviation of the original becomes ambiguous.
const OURS: [Long; 11] = [
    Long { name: "json", argument: Argument::No, meaning: Meaning::Backend },
    Long { name: "watch", argument: Argument::No, meaning: Meaning::Backend },
    ours("keep"),
    ours("yes-lose-changes-of"),
    ours(check::OPTIONS[0]),
    ours(check::OPTIONS[1]),
    ours(check::OPTIONS[2]),
    ours(check::OPTIONS[3]),
    ours(check::OPTIONS[4]),
    Long { name: "format", argument: Argument::Required, meaning: Meaning::Format },
    Long { name: "node-name", argument: Argument::Required, meaning: Meaning::NodeName },
];

const fn ours(name: &'static str) -> Long {
    Long { name, argument: Argument::Required, meaning: Meaning::Backend }
}

/// Options of `status` that want everything in one call of the backend.
const WHOLE_STATUS: [&str; 2] = ["json", "watch"];

impl Invocation {
    /// `status --json` or `status --watch`?
    pub fn is_whole_status(&self) -> bool {
        let wants = |o: &BString| WHOLE_STATUS.iter().any(|name| *o == format!("--{name}"));
        self.command.name == "status" && self.backend_options.iter().any(wants)
    }
}

/// An occurrence of an option.
struct Found {
    meaning: Meaning,
    name: &'static str,
    value: Option<BString>,
}

enum Scanned {
    Option(Found),
    Word(BString),
}

/// Splits arguments as getopt_long with permutation does.
fn scan(program: &BString, args: &[BString]) -> Result<Vec<Scanned>, BString> {
    let table = long_options();
    let mut out = Vec::new();
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        if arg == "--" {
            out.extend(rest.by_ref().cloned().map(Scanned::Word));
        } else if let Some(long) = arg.strip_prefix(b"--") {
            out.push(Scanned::Option(scan_long(program, &table, long.as_bstr(), &mut rest)?));
        } else if arg.len() > 1 && arg.starts_with(b"-") {
            scan_short(program, arg, &mut rest, &mut out)?;
        } else {
            out.push(Scanned::Word(arg.clone()));
        }
    }
    Ok(out)
}

fn scan_long<'a>(
    program: &BString,
    table: &[Long],
    text: &bstr::BStr,
    rest: &mut impl Iterator<Item = &'a BString>,
) -> Result<Found, BString> {
    let (name, value) = match text.split_once_str("=") {
        Some((name, value)) => (name, Some(BString::from(value))),
        None => (text.as_bytes(), None),
    };
    let Some(long) = find_long(program, table, name, text)? else {
        return Err(format!("{program}: unrecognized option '--{}'", text).into());
    };
    let value = match (long.argument, value) {
        (Argument::No, Some(_)) => {
            let name = long.name;
            return Err(format!("{program}: option '--{name}' doesn't allow an argument").into());
        }
        (Argument::Required, None) => match rest.next() {
            Some(value) => Some(value.clone()),
            None => {
                let name = long.name;
                return Err(format!("{program}: option '--{name}' requires an argument").into());
            }
        },
        (_, value) => value,
    };
    Ok(Found { meaning: long.meaning, name: long.name, value })
}

/// Exact name, or an abbreviation that means only one thing.
fn find_long(
    program: &BString,
    table: &[Long],
    name: &[u8],
    text: &bstr::BStr,
) -> Result<Option<Long>, BString> {
    let exact = table.iter().find(|l| l.name.as_bytes() == name);
    if let Some(long) = exact {
        return Ok(Some(*long));
    }
    if let Some(long) = OURS.iter().find(|l| l.name.as_bytes() == name) {
        return Ok(Some(*long));
    }
    let mut starting = table.iter().filter(|l| l.name.as_bytes().starts_with(name));
    let Some(first) = starting.next() else { return Ok(None) };
    let differs = |l: &&Long| l.argument != first.argument || l.meaning != first.meaning;
    let others: Vec<&Long> = starting.filter(differs).collect();
    if others.is_empty() {
        return Ok(Some(*first));
    }
    let mut message = format!("{program}: option '--{text}' is ambiguous; possibilities:");
    for long in std::iter::once(&first).chain(&others) {
        message.push_str(&format!(" '--{}'", long.name));
    }
    Err(message.into())
}

fn scan_short<'a>(
    program: &BString,
    arg: &BString,
    rest: &mut impl Iterator<Item = &'a BString>,
    out: &mut Vec<Scanned>,
) -> Result<(), BString> {
    for (at, letter) in arg.iter().copied().enumerate().skip(1) {
        let Some((meaning, _, name, argument)) = GENERAL.iter().find(|g| g.1 == letter) else {
            let shown = BString::from(vec![letter]);
            return Err(format!("{program}: invalid option -- '{shown}'").into());
        };
        let mut found = Found { meaning: Meaning::General(*meaning), name, value: None };
        if *argument {
            let tail = arg.get(at + 1..).unwrap_or_default();
            let value = if tail.is_empty() { rest.next().cloned() } else { Some(tail.into()) };
            if value.is_none() {
                let letter = char::from(letter);
                return Err(format!("{program}: option requires an argument -- '{letter}'").into());
            }
            found.value = value;
            out.push(Scanned::Option(found));
            return Ok(());
        }
        out.push(Scanned::Option(found));
    }
    Ok(())
}

/// Everything that the options said, before the command is known.
struct Draft {
    invocation: Invocation,
    help: bool,
    /// Recognised backend options: name and index into `backend_options`.
    recognised: Vec<&'static str>,
}

/// Understands a command line; `args` without argv[0].
pub fn parse(program: &BString, args: &[BString]) -> Outcome {
    let outcome = understand(program, args);
    match outcome {
        // To the readers of `check` 1 is a warning.
        Outcome::End { stdout, stderr, code: 1 } if args.iter().any(|word| word == "check") => {
            end(stdout, stderr, check::UNKNOWN)
        }
        outcome => outcome,
    }
}

fn understand(program: &BString, args: &[BString]) -> Outcome {
    let scanned = match scan(program, args) {
        Ok(scanned) => scanned,
        Err(message) => return end("", format!("{message}\ntry '{program} help'\n"), 1),
    };
    let placeholder = &command::COMMANDS[0];
    let mut draft = Draft {
        invocation: empty_invocation(program, placeholder),
        help: false,
        recognised: Vec::new(),
    };
    let mut stderr = String::new();
    let mut words = Vec::new();
    for item in scanned {
        match item {
            Scanned::Word(word) => words.push(word),
            Scanned::Option(found) => {
                if let Some(outcome) = take_option(&mut draft, found, &mut stderr) {
                    return outcome;
                }
            }
        }
    }
    with_command(draft, words, stderr)
}

fn empty_invocation(program: &BString, command: &'static Command) -> Invocation {
    Invocation {
        program: program.clone(),
        command,
        stacked: false,
        dry_run: 0,
        verbose: 0,
        config_file: None,
        config_to_test: None,
        drbdsetup: None,
        drbdmeta: None,
        drbd_proxy_ctl: None,
        sh_varname: None,
        peer: None,
        backend_options: Vec::new(),
        names: Vec::new(),
        format: Format::Text,
        node_name: None,
    }
}

fn take_option(draft: &mut Draft, found: Found, stderr: &mut String) -> Option<Outcome> {
    let Draft { invocation, help, recognised } = draft;
    let value = found.value;
    match found.meaning {
        Meaning::Backend => {
            let name = found.name;
            let text = match value {
                Some(value) => bstr::concat([b"--", name.as_bytes(), b"=", &value]).into(),
                None => BString::from(format!("--{name}")),
            };
            invocation.backend_options.push(text);
            recognised.push(name);
        }
        Meaning::NodeName => invocation.node_name = value,
        Meaning::Format => match value.as_ref().map(|v| v.as_slice()) {
            Some(b"text") => invocation.format = Format::Text,
            Some(b"xml") => invocation.format = Format::Xml,
            Some(b"json") => invocation.format = Format::Json,
            _ => {
                let program = &invocation.program;
                let text = format!("{program}: --format takes text, xml or json\n");
                return Some(end("", text, 1));
            }
        },
        Meaning::General(general) => match general {
            General::Stacked => invocation.stacked = true,
            General::DryRun => invocation.dry_run += 1,
            General::Verbose => invocation.verbose += 1,
            General::ConfigFile => invocation.config_file = value,
            General::ConfigToTest => invocation.config_to_test = value,
            General::Drbdsetup => invocation.drbdsetup = value,
            General::Drbdmeta => invocation.drbdmeta = value,
            General::DrbdProxyCtl => invocation.drbd_proxy_ctl = value,
            General::Peer => invocation.peer = value,
            General::Help => *help = true,
            General::Version => return Some(Outcome::Version),
            General::SetupOption => invocation.backend_options.extend(value),
            General::ShVarname => {
                let value = value.unwrap_or_default();
                if value.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'_') {
                    invocation.sh_varname = Some(value);
                } else {
                    stderr.push_str(&format!(
                        "ignored --sh-varname={value}: contains suspect characters, allowed set \
                         is [a-zA-Z0-9_]\n"
                    ));
                }
            }
        },
    }
    None
}

fn with_command(draft: Draft, words: Vec<BString>, mut stderr: String) -> Outcome {
    let Draft { mut invocation, mut help, recognised } = draft;
    let program = invocation.program.clone();
    let mut words = words.into_iter().peekable();
    let mut command = None;
    let mut before = Vec::new();
    for word in words.by_ref() {
        if word == "help" {
            help = true;
            continue;
        }
        if let Some(found) = command::find(&word) {
            let pair = words.peek().and_then(|second| command::find_pair(found, second));
            if pair.is_some() {
                words.next();
            }
            command = pair.or(Some(found));
            break;
        }
        if let Some((old, found)) = command::find_old(&word) {
            let new = found.name;
            stderr.push_str(&format!(
                "'{program} {old}' is deprecated, use '{program} {new}' instead.\n"
            ));
            command = Some(found);
            break;
        }
        before.push(word);
    }
    if help {
        return end(usage::usage(&program, command, None), stderr, 0);
    }
    let Some(command) = command else {
        let Some(first) = before.first() else {
            return end(usage::usage(&program, None, Some("No command specified")), stderr, 1);
        };
        stderr.push_str(&format!("{program}: Unknown command '{first}'\n"));
        return end("", stderr, 1);
    };
    invocation.command = command;
    if let Some(wrong) = foreign_option(command, &recognised) {
        let name = command.name;
        stderr.push_str(&format!(
            "{program}: unrecognized option '--{wrong}'\ntry '{program} help {name}'\n"
        ));
        return end("", stderr, 1);
    }
    invocation.backend_options.extend(before);
    invocation.names = words.collect();
    if command.action == command::Action::Hidden {
        return end(usage::hidden_commands(), stderr, 0);
    }
    if let Some(outcome) = check_words(&mut invocation, &mut stderr) {
        return outcome;
    }
    if !stderr.is_empty() {
        crate::print::stderr(stderr.as_bytes());
    }
    Outcome::Run(Box::new(invocation))
}

/// A recognised option that the command does not have. create-md takes any of them.
fn foreign_option(command: &Command, recognised: &[&'static str]) -> Option<&'static str> {
    if command.name == "create-md" {
        return None;
    }
    let own: Vec<&'static OptionSpec> = options::command_options(command.name);
    let ours = command.own_options();
    let is_own = |name: &str| ours.contains(&name) || own.iter().any(|o| o.name == name);
    recognised.iter().copied().find(|name| !is_own(name))
}

fn check_words(invocation: &mut Invocation, stderr: &mut String) -> Option<Outcome> {
    let command = invocation.command;
    let takes_test = command.is_dump() || command.name == "sh-nop";
    if invocation.config_to_test.is_some() && !takes_test {
        stderr.push_str(
            "The --config-to-test (-t) option is only allowed with the dump and sh-nop commands\n",
        );
        return Some(end("", stderr.as_str(), 1));
    }
    let native = command.action == command::Action::Native;
    if command.level == command::Level::Nothing && !invocation.names.is_empty() && !native {
        stderr.push_str("This command will ignore resource names!\n");
        invocation.names.clear();
    }
    if command.needs_names() && invocation.names.is_empty() {
        let extra = Some("No resource names specified");
        let text = usage::usage(&invocation.program, Some(command), extra);
        return Some(end(text, stderr.as_str(), 1));
    }
    None
}
