//! Help texts. Spec: config-and-drbdadm.md §7.6, §7.7.

use bstr::BString;
use drbd_conf::options::command_options;

use crate::cli::GENERAL;
use crate::command::{Block, COMMANDS, Command};
use crate::version;

/// The usage text; `extra` stands at the end.
pub fn usage(program: &BString, command: Option<&Command>, extra: Option<&str>) -> BString {
    let name = command.map_or("COMMAND", |c| c.name);
    let mut out =
        format!("\nUSAGE: {program} {name} [OPTION...] {{all|RESOURCE...}}\n\nGENERAL OPTIONS:\n");
    for (_, letter, long, argument) in GENERAL {
        let letter = char::from(letter);
        if argument {
            out.push_str(&format!("  --{long}=..., -{letter} ...\n"));
        } else {
            out.push_str(&format!("  --{long}, -{letter}\n"));
        }
    }
    match command {
        Some(command) => {
            let options = command_options(command.name);
            // The text of a command that the original has is the original's.
            let ours = if command.block == Block::Unlisted { command.own_options() } else { &[] };
            if !options.is_empty() || !ours.is_empty() {
                out.push_str(&format!("\nOPTIONS FOR {}:\n", command.name));
            }
            for option in options {
                let value = if option.is_bool() { "[=...]" } else { "=..." };
                out.push_str(&format!("  --{}{value}\n", option.name));
            }
            for name in ours {
                out.push_str(&format!("  --{name}=...\n"));
            }
        }
        None => {
            out.push_str("\nCOMMANDS:\n");
            two_columns(&mut out, Block::Normal);
        }
    }
    out.push_str(&format!("\nVersion: {} (api:1)\n{}\n", version::VERSION, version::BUILD_TAG));
    if let Some(extra) = extra {
        out.push_str(&format!("\n{extra}\n"));
    }
    out.into()
}

fn two_columns(out: &mut String, block: Block) {
    let names: Vec<&str> = COMMANDS.iter().filter(|c| c.block == block).map(|c| c.name).collect();
    for pair in names.chunks(2) {
        out.push(' ');
        for name in pair {
            out.push_str(&format!("{name:<35}"));
        }
        out.push('\n');
    }
}

/// The three lists of commands that the usage text leaves out.
pub fn hidden_commands() -> BString {
    let mut out = String::from("\nThese commands are meant for shell scripts:\n\n");
    two_columns(&mut out, Block::Scripts);
    out.push_str("\nThese commands are called when something happens to a device;\nthey run the configured handlers:\n\n");
    two_columns(&mut out, Block::Handlers);
    out.push_str("\nThese commands are for experts; know what you do before you use them:\n\n");
    two_columns(&mut out, Block::Experts);
    out.push('\n');
    out.into()
}
