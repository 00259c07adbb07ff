//! What the command does: arguments, devices, questions, texts, exit statuses.

mod args;
mod backup;
mod check;
mod create;
mod dump;
mod existing;
mod gi;
mod lock;
mod open;
mod resize;
mod restore;
mod store;
mod superblock;
mod talk;

use std::ffi::OsString;
use std::process::ExitCode;

use args::{Command, Invocation};
use open::Opened;

/// Status of a failure that has no number of its own.
const FAILURE: u8 = 255;

/// The end of a run that did not succeed.
#[derive(Debug)]
pub(crate) struct Exit {
    status: u8,
    /// For stderr; may be empty.
    text: String,
}

impl Exit {
    fn new(status: u8, text: impl Into<String>) -> Self {
        Self { status, text: text.into() }
    }

    fn silent(status: u8) -> Self {
        Self::new(status, "")
    }

    fn failure(text: impl Into<String>) -> Self {
        Self::new(FAILURE, text)
    }
}

/// The system's words for an error, without its number.
fn system(error: &std::io::Error) -> String {
    error.to_string().split(" (os error").next().unwrap_or_default().into()
}

impl From<drbdmeta::io::IoError> for Exit {
    fn from(error: drbdmeta::io::IoError) -> Self {
        Self::new(10, store::describe(&error))
    }
}

pub(crate) fn main(argv: impl Iterator<Item = OsString>) -> ExitCode {
    let argv: Vec<String> = argv.map(|a| a.to_string_lossy().into_owned()).collect();
    match run(&argv) {
        Ok(()) => {
            talk::flush();
            ExitCode::SUCCESS
        }
        Err(exit) => {
            if !exit.text.is_empty() {
                talk::err(&format!("{}\n", exit.text));
            }
            talk::flush();
            ExitCode::from(exit.status)
        }
    }
}

fn run(argv: &[String]) -> Result<(), Exit> {
    let run = args::parse(argv)?;
    let _lock = lock::take(&run)?;
    let is_attached = lock::is_attached(&run);
    if is_attached && run.command.modifies() {
        return Err(Exit::new(20, format!("Device '{}' is configured!", run.device)));
    }
    args::check_combination(&run)?;
    let result = dispatch(&run);
    if is_attached && let Some(minor) = run.minor {
        talk::err(&format!("# Output might be stale, since minor {minor} is attached\n"));
    }
    result
}

fn dispatch(run: &Invocation) -> Result<(), Exit> {
    if run.command == Command::VerifyDump {
        return restore::verify(run);
    }
    let mut opened = Opened::open(run)?;
    let o = &mut opened;
    match run.command {
        Command::GetGi => gi::get(o),
        Command::ShowGi => gi::show(o),
        Command::Dstate => gi::dstate(o),
        Command::SetGi => gi::set(o),
        Command::Outdate => gi::outdate(o),
        Command::Invalidate => gi::invalidate(o),
        Command::ReadDevUuid => gi::read_dev_uuid(o),
        Command::WriteDevUuid => gi::write_dev_uuid(o),
        Command::DumpMd => dump::dump(o),
        Command::RestoreMd => restore::restore(o),
        Command::WipeMd => superblock::wipe(o),
        Command::ApplyAl => superblock::apply_al(o),
        Command::CheckResize => resize::check_resize(o),
        Command::CreateMd => create::create(o),
        Command::Check => check::check(o),
        Command::ForgetPeer => Err(Exit::new(10, "forget-peer is for v09 meta-data")),
        Command::VerifyDump => Ok(()),
    }
}
