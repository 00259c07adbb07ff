//! From words to an invocation, with the original's complaints. Spec: status-and-integration.md §2.1.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bstr::{BString, ByteSlice};
use drbd_conf::options::Kind;
use drbd_conf::settings;

use super::command::{self, Command, Object, Opt};
use super::getopt::{self, Row, Takes};
use super::{Context, DEADLINE, Failed, help};
use crate::registry::SOCKET_VARIABLE;

/// A command line, understood.
#[derive(Debug)]
pub(super) struct Invocation {
    pub(super) context: Context,
    pub(super) command: &'static Command,
    /// The words that say what it is about: none, one, or two addresses.
    pub(super) object: Vec<BString>,
    /// Further words.
    pub(super) arguments: Vec<BString>,
    /// Options in the order given.
    pub(super) options: Vec<(&'static str, Option<BString>)>,
}

impl Invocation {
    /// The last value of an option; `Some(None)`: given without a value.
    pub(super) fn option(&self, name: &str) -> Option<Option<&BString>> {
        self.options.iter().rev().find(|(n, _)| *n == name).map(|(_, v)| v.as_ref())
    }

    /// Was the option given?
    pub(super) fn has(&self, name: &str) -> bool {
        self.option(name).is_some()
    }

    /// What messages about it begin with.
    pub(super) fn shown_object(&self) -> String {
        match (self.command.object, self.object.first()) {
            // The original does not know what these are about.
            (Object::Connection, _) | (_, None) => "??".into(),
            _ if self.command.name == "new-minor" => "??".into(),
            (_, Some(word)) => word.to_string(),
        }
    }
}

/// Understands a command line; `args` without argv[0].
///
/// # Errors
/// Help was asked for, or it is no command line.
pub(super) fn parse(program: &str, args: &[BString]) -> Result<Invocation, Failed> {
    let (command, rest) = find_command(program, args)?;
    let asks = |a: &BString| a == "-h" || a == "--help";
    if rest.iter().any(asks) {
        return Err(printed(0, help::usage_of(program, command)));
    }
    let (words, mut options) = getopt::split(command.name, &table(command), &rest)
        .map_err(|message| Failed { stderr: message, ..printed(20, help::usage(program)) })?;
    for (name, _) in &mut options {
        *name = command.alias(name).unwrap_or(name);
    }
    let context = context(program, &mut options)?;
    let (object, arguments) = words_of(program, command, words)?;
    Ok(Invocation { context, command, object, arguments, options })
}

fn printed(code: u8, stdout: String) -> Failed {
    Failed { code, stderr: String::new(), stdout }
}

fn find_command(
    program: &str,
    args: &[BString],
) -> Result<(&'static Command, Vec<BString>), Failed> {
    let (first, second) = (args.first(), args.get(1));
    let usage = || printed(20, help::usage(program));
    let first = first.ok_or_else(usage)?;
    let named = second.and_then(|w| command::find(w));
    if first == "help" {
        return Err(named.map_or_else(usage, |c| printed(0, help::usage_of(program, c))));
    }
    if first == "xml-help" {
        return Err(named.map_or_else(usage, |c| printed(0, help::xml_of(c))));
    }
    let rest = |from: usize| args.get(from..).unwrap_or_default().iter().cloned();
    if let Some(command) = command::find(first) {
        return Ok((command, rest(1).collect()));
    }
    // The old order: object, then command.
    let command = named.ok_or_else(usage)?;
    Ok((command, std::iter::once(first.clone()).chain(rest(2)).collect()))
}

fn table(command: &Command) -> Vec<Row> {
    let row = |name, takes| Row { name, takes, is_exact: command::OURS.contains(&name) };
    let mut table: Vec<Row> = command
        .all_options()
        .into_iter()
        .map(|option| match option {
            Opt::Flag(name) => row(name, Takes::Nothing),
            Opt::Text(name) => row(name, Takes::Value),
            Opt::Maybe(name) => row(name, Takes::Maybe),
            Opt::Row(spec) => match spec.kind {
                Kind::Bool { .. } | Kind::Flag => row(spec.name, Takes::Maybe),
                _ => row(spec.name, Takes::Value),
            },
        })
        .collect();
    let ours = |name, takes| Row { name, takes, is_exact: true };
    for old in ["overwrite-data-of-peer", "dry-run"] {
        if command.alias(old).is_some() {
            table.push(ours(old, Takes::Maybe));
        }
    }
    if command.name == "attach" {
        table.push(ours(drbd_conf::options::USE_BMBV.name, Takes::Maybe));
    }
    table.push(ours("socket", Takes::Value));
    table.push(ours("deadline", Takes::Value));
    table
}

/// Where the daemon is: `--socket`, the environment, the settings.
pub(super) fn context(
    program: &str,
    options: &mut Vec<(&'static str, Option<BString>)>,
) -> Result<Context, Failed> {
    let mut take = |name: &str| {
        let value = options.iter().rev().find(|(n, _)| *n == name).and_then(|(_, v)| v.clone());
        options.retain(|(n, _)| *n != name);
        value
    };
    let deadline = match take("deadline") {
        None => DEADLINE,
        Some(text) => {
            let seconds = text.to_str().ok().and_then(|t| t.parse::<f64>().ok());
            let span = seconds.and_then(|s| Duration::try_from_secs_f64(s).ok());
            span.ok_or_else(|| invalid("deadline", &text))?
        }
    };
    let given = take("socket").map(|w| PathBuf::from(w.to_os_str_lossy().into_owned()));
    let given = given.or_else(|| std::env::var_os(SOCKET_VARIABLE).map(PathBuf::from));
    let (socket, is_default) = match given {
        Some(socket) => (socket, false),
        None => {
            let settings = settings::load(Path::new(settings::PATH))
                .map_err(|e| Failed::new(20, format!("{e}\n")))?;
            (settings.node.admin_socket, true)
        }
    };
    Ok(Context { program: program.to_owned(), socket, is_default, deadline })
}

/// The complaint about a value.
pub(super) fn invalid(name: &str, value: &BString) -> Failed {
    Failed::new(20, format!("Option --{name}: invalid argument '{value}'\n"))
}

fn words_of(
    program: &str,
    command: &'static Command,
    words: Vec<BString>,
) -> Result<(Vec<BString>, Vec<BString>), Failed> {
    let missing = |what: &str| Failed {
        stderr: format!("Missing {what}\n"),
        ..printed(20, help::usage_of(program, command))
    };
    let (needed, optional) = match command.object {
        Object::None => (0, 0),
        Object::Any | Object::ResourceAny => (0, 1),
        Object::Connection => (2, 0),
        Object::Minor | Object::OneMinor | Object::Resource | Object::ResourceOrAll => (1, 0),
    };
    let mut words = words.into_iter();
    let object: Vec<BString> = words.by_ref().take(needed + optional).collect();
    if object.len() < needed {
        let is_address = command.object == Object::Connection && !object.is_empty();
        return Err(missing(if is_address {
            "connection endpoint argument"
        } else {
            "first argument"
        }));
    }
    let arguments: Vec<BString> = words.by_ref().take(command.arguments.len()).collect();
    if let Some(name) = command.arguments.get(arguments.len()) {
        return Err(match name.ends_with("_addr") {
            true => missing("connection endpoint argument"),
            false => missing(&format!("argument '{name}'")),
        });
    }
    let excess: Vec<BString> = words.collect();
    if !excess.is_empty() {
        let excess = BString::from(bstr::join(" ", excess));
        return Err(Failed::new(20, format!("Excess arguments: {excess}\n")));
    }
    Ok((object, arguments))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(line: &str) -> Result<Invocation, Failed> {
        let args: Vec<BString> = line.split_whitespace().map(BString::from).collect();
        parse("drbdsetup", &args)
    }

    #[test]
    fn both_orders_of_object_and_command() {
        for line in ["dstate 7", "7 dstate", "dstate -- 7"] {
            let i = run(line).unwrap();
            assert_eq!((i.command.name, i.object.as_slice()), ("dstate", &["7".into()][..]));
        }
        let i = run("attach 0 --res=1M a b internal").unwrap_err();
        assert!(i.stderr.contains("ambiguous"), "{}", i.stderr);
        let i = run("primary /dev/drbd0 --overwrite-data-of-peer").unwrap();
        assert!(i.has("force") && i.shown_object() == "/dev/drbd0");
        assert_eq!(run("disconnect a b").unwrap().shown_object(), "??");
        assert_eq!(run("new-minor r0 0 0").unwrap().shown_object(), "??");
        assert_eq!(run("status --deadline=0.5").unwrap().context.deadline.as_millis(), 500);
    }

    #[test]
    fn complaints() {
        let rows = [
            ("down", 20, "Missing first argument\n", "USAGE:\n drbdsetup down {resource}\n"),
            ("attach 0 a", 20, "Missing argument 'meta_data_dev'\n", "USAGE:\n drbdsetup attach"),
            ("connect r0 a", 20, "Missing connection endpoint argument\n", "USAGE:\n"),
            ("disconnect a", 20, "Missing connection endpoint argument\n", "USAGE:\n"),
            ("role 0 1 2", 20, "Excess arguments: 1 2\n", ""),
            ("role 0 --nosuch", 20, "role: unrecognized option '--nosuch'\n", "\nUSAGE: drbd"),
            ("nosuch", 20, "", "\nUSAGE: drbdsetup command device"),
            ("", 20, "", "\nUSAGE: drbdsetup command device"),
            ("--version", 20, "", "\nUSAGE: drbdsetup command device"),
            ("help nosuch", 20, "", "\nUSAGE: drbdsetup command device"),
            ("help role", 0, "", "USAGE:\n drbdsetup role {minor}\n"),
            ("role --help", 0, "", "USAGE:\n drbdsetup role {minor}\n"),
            ("xml-help role", 0, "", "<command name=\"role\">\n\t<argument>minor</argument>\n"),
            ("role 0 --deadline=x", 20, "Option --deadline: invalid argument 'x'\n", ""),
        ];
        for (line, code, stderr, stdout) in rows {
            let failed = run(line).unwrap_err();
            assert_eq!((failed.code, failed.stderr.as_str()), (code, stderr), "{line}");
            assert!(failed.stdout.starts_with(stdout), "{line}: {}", failed.stdout);
            assert_eq!(failed.stdout.is_empty(), stdout.is_empty(), "{line}");
        }
    }
}
