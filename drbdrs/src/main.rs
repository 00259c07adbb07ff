//! The command `drbdrs`: the daemon of a node.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use drbd_conf::settings::{self, LogFormat, LogLevel, StatusFormat};
use drbdrs::{daemon, log};

/// The daemon of a node: DRBD in user space. It is configured by drbdadm and drbdsetup.
#[derive(Parser, Debug)]
#[command(name = "drbdrs", version)]
struct Arguments {
    /// Directory for the admin socket, the NBD socket and the status file, instead of the places
    /// in the settings; makes a daemon of its own, which needs no privileges
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Settings file; one that does not exist means the defaults
    #[arg(long, value_name = "FILE", default_value = settings::PATH)]
    settings: PathBuf,
    /// Stay in the foreground: the only way it runs, accepted for the sake of init scripts
    #[arg(long)]
    foreground: bool,
    /// Form of log lines on stderr, instead of that in the settings
    #[arg(long, value_enum)]
    log_format: Option<Format>,
    /// Which log lines, instead of those in the settings
    #[arg(long, value_enum)]
    log_level: Option<Level>,
    /// Form of the status file, instead of that in the settings
    #[arg(long, value_enum)]
    status_format: Option<Status>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    Text,
    Json,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Level {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Status {
    #[value(name = "8.4")]
    V84,
    #[value(name = "8.3")]
    V83,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let mut settings = match settings::load(&arguments.settings) {
        Ok(settings) => settings,
        Err(error) => {
            eprintln!("drbdrs: {error}");
            return ExitCode::from(2);
        }
    };
    if let Some(folder) = &arguments.run_dir {
        // Handlers run elsewhere.
        let folder = std::path::absolute(folder).unwrap_or_else(|_| folder.clone());
        daemon::move_to(&mut settings, &folder);
    }
    if let Some(format) = arguments.log_format {
        settings.node.log_format = match format {
            Format::Text => LogFormat::Text,
            Format::Json => LogFormat::Json,
        };
    }
    if let Some(level) = arguments.log_level {
        settings.node.log_level = match level {
            Level::Error => LogLevel::Error,
            Level::Warn => LogLevel::Warn,
            Level::Info => LogLevel::Info,
            Level::Debug => LogLevel::Debug,
            Level::Trace => LogLevel::Trace,
        };
    }
    if let Some(format) = arguments.status_format {
        settings.node.status_format = match format {
            Status::V84 => StatusFormat::V84,
            Status::V83 => StatusFormat::V83,
        };
    }
    log::start(settings.node.log_format, settings.node.log_level);
    match daemon::run(settings) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("drbdrs: {error}");
            ExitCode::FAILURE
        }
    }
}
