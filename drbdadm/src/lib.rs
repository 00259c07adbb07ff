//! drbdadm: from drbd.conf to steps, printed or run.
//!
//! `cli` understands the command line, `command` is the one table of commands, `app` reads and
//! checks the configuration and chooses resources, `run` carries the command out, `lines` knows
//! the backend calls, `backend` makes them. `setup` is the other program, drbdsetup.
//! Spec: config-and-drbdadm.md §7 to §16.

#![forbid(unsafe_code)]

pub mod adjust;
pub mod app;
pub mod backend;
pub mod check;
pub mod cli;
pub mod command;
pub mod create_md;
pub mod handler;
pub mod host;
pub mod lines;
pub mod native;
pub mod print;
pub mod proxy;
pub mod registry;
pub mod run;
pub mod select;
pub mod setup;
pub mod sh;
pub mod split_brain;
pub mod stages;
pub mod usage;
pub mod version;
pub mod wait;

use bstr::{BString, ByteSlice};

/// Runs a command line, with argv[0] in front; returns the exit code.
pub fn main(args: Vec<BString>) -> i32 {
    let mut args = args.into_iter();
    let program = args.next().unwrap_or_else(|| "drbdadm".into());
    let rest: Vec<BString> = args.collect();
    if rest.first().is_some_and(|a| a == backend::BOUND) {
        return backend::exec_bound(rest.get(1..).unwrap_or_default());
    }
    let name = program.rsplit_once_str("/").map_or(program.as_slice(), |(_, name)| name);
    match cli::parse(&BString::from(name), &rest) {
        cli::Outcome::Version => {
            print::stdout(&version::text());
            0
        }
        cli::Outcome::End { stdout, stderr, code } => {
            print::stderr(&stderr);
            print::stdout(&stdout);
            code.into()
        }
        cli::Outcome::Run(invocation) => {
            let name = invocation.command.name;
            if let Some(code) = native::without_configuration(name, &invocation.names) {
                return code;
            }
            app::run(*invocation)
        }
    }
}
