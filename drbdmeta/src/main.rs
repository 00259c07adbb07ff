//! The command `drbdmeta`.

#![forbid(unsafe_code)]

mod command;

use std::process::ExitCode;

fn main() -> ExitCode {
    command::main(std::env::args_os())
}
