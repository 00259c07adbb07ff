//! Help texts, in the form of the original.

use drbd_conf::measure;
use drbd_conf::options::{Kind, OptionSpec};

use super::command::{COMMANDS, Command, Object, Opt};

/// The list of all commands.
pub(super) fn usage(program: &str) -> String {
    let mut text = format!(
        "\nUSAGE: {program} command device arguments options\n\n\
         Device is usually /dev/drbdX or /dev/drbd/X.\n\nCommands are:\n"
    );
    columns(&mut text, COMMANDS.iter().filter(|c| !c.is_ours));
    text.push_str("\nCommands that only drbdrs has:\n");
    columns(&mut text, COMMANDS.iter().filter(|c| c.is_ours));
    text.push_str(&format!(
        "\nTo get more details about a command issue '{program} help cmd'.\n\n"
    ));
    text
}

fn columns(text: &mut String, commands: impl Iterator<Item = &'static Command>) {
    let names: Vec<&str> = commands.map(|c| c.name).collect();
    for row in names.chunks(3) {
        text.push_str("    ");
        for name in row {
            text.push_str(&format!("{name:<20}"));
        }
        text.push('\n');
    }
}

/// The usage of one command, broken after 80 columns.
pub(super) fn usage_of(program: &str, command: &Command) -> String {
    let mut words = vec![command.name.to_owned()];
    words.extend(object(command.object).into_iter().map(endpoint));
    words.extend(command.arguments.iter().map(|w| endpoint(w)));
    words.extend(command.all_options().into_iter().map(option));
    let mut text = format!("USAGE:\n {program}");
    let mut column = program.len() + 1;
    for word in words {
        if column + 1 + word.len() > 80 {
            text.push_str("\n   ");
            column = 3;
        }
        text.push(' ');
        text.push_str(&word);
        column += 1 + word.len();
    }
    text.push('\n');
    text
}

fn object(object: Object) -> Vec<&'static str> {
    match object {
        Object::Minor | Object::OneMinor => vec!["minor"],
        Object::Resource | Object::ResourceOrAll => vec!["resource"],
        Object::Connection => vec!["local_addr", "remote_addr"],
        Object::Any => vec!["resource|minor|all"],
        Object::ResourceAny => vec!["resource|all"],
        Object::None => vec![],
    }
}

fn endpoint(word: &str) -> String {
    if word.ends_with("_addr") {
        format!("[{{af}}:]{{{word}}}[:{{port}}]")
    } else {
        format!("{{{word}}}")
    }
}

fn option(option: Opt) -> String {
    match option {
        Opt::Flag(name) => format!("[--{name}]"),
        Opt::Text(name) | Opt::Maybe(name) => format!("[--{name}=...]"),
        Opt::Row(OptionSpec { name, kind, .. }) => match kind {
            Kind::Number { min, max, .. } => format!("[--{name}=({min} ... {max})]"),
            Kind::ResyncAfter => format!("[--{name}=(-1 ... 1048575)]"),
            Kind::Bool { .. } => format!("[--{name}={{yes|no}}]"),
            Kind::Enum { values, .. } => format!("[--{name}={{{}}}]", values.join("|")),
            Kind::Text { .. } => format!("[--{name}=<str>]"),
            Kind::Address => format!("[--{name}=[{{af}}:]{{local_addr}}[:{{port}}]]"),
            Kind::Flag => format!("[--{name}]"),
        },
    }
}

/// The usage of one command for programs.
pub(super) fn xml_of(command: &Command) -> String {
    let mut text = format!("<command name=\"{}\">\n", command.name);
    let objects: Vec<&str> = object(command.object);
    match objects.as_slice() {
        [one] if one.contains('|') => {
            text.push_str("\t<group>\n");
            for word in one.split('|') {
                text.push_str(&format!("\t\t<argument>{word}</argument>\n"));
            }
            text.push_str("\t</group>\n");
        }
        words => {
            for word in words {
                text.push_str(&format!("\t<argument>{word}</argument>\n"));
            }
        }
    }
    for word in command.arguments {
        text.push_str(&format!("\t<argument>{word}</argument>\n"));
    }
    for option in command.all_options() {
        xml_option(&mut text, option);
    }
    text.push_str("</command>\n");
    text
}

fn xml_option(text: &mut String, option: Opt) {
    let kind = match option {
        Opt::Flag(_) => "flag",
        Opt::Text(_) | Opt::Maybe(_) => "string",
        Opt::Row(spec) => match spec.kind {
            Kind::Number { .. } | Kind::ResyncAfter => "numeric",
            Kind::Bool { .. } => "boolean",
            Kind::Enum { .. } => "handler",
            Kind::Text { .. } => "string",
            Kind::Address => "address",
            Kind::Flag => "flag",
        },
    };
    text.push_str(&format!("\t<option name=\"{}\" type=\"{kind}\">\n", option.name()));
    if let Opt::Row(spec) = option {
        let mut line = |name: &str, value: String| {
            text.push_str(&format!("\t\t<{name}>{value}</{name}>\n"));
        };
        match spec.kind {
            Kind::Number { unit, min, max, default } => {
                line("min", min.to_string());
                line("max", max.to_string());
                line("default", default.to_string());
                let letter = unit.letter();
                line("unit_prefix", if letter.is_empty() { "1" } else { letter }.to_owned());
                if let Some(measure) = measure::of(spec) {
                    line("unit", measure.to_owned());
                }
            }
            Kind::ResyncAfter => {
                for (name, value) in
                    [("min", "-1"), ("max", "1048575"), ("default", "-1"), ("unit_prefix", "1")]
                {
                    line(name, value.to_owned());
                }
            }
            Kind::Bool { default } => {
                line("default", if default { "yes" } else { "no" }.to_owned());
            }
            Kind::Enum { values, .. } => {
                for value in values {
                    line("handler", (*value).to_owned());
                }
            }
            Kind::Text { .. } | Kind::Address | Kind::Flag => {}
        }
    }
    text.push_str("\t</option>\n");
}
