//! Commands that show the state of one moment.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use bstr::ByteSlice;
use drbd_admin::render::{
    Colour, Compat, ProcOptions, ShowOptions, StatusOptions, cstate, dstate, get_gi, proc, role,
    sh_status, sh_status_unknown, show, show_gi, show_json, status, status_json, watch,
};
use drbd_admin::{Reply, Snapshot, Target, Volume};
use drbd_types::Dstate;
use serde_json::Value;

use super::parse::{Invocation, invalid};
use super::request::target;
use super::run::{Session, look_up};
use super::{Failed, help, last_known};
use crate::print;

/// Is it one of these commands?
pub(super) fn is_view(name: &str) -> bool {
    let lines = ["role", "state", "cstate", "dstate", "show-gi", "get-gi", "check-resize", "udev"];
    let pages = ["status", "show", "sh-status", "proc"];
    lines.contains(&name) || pages.contains(&name)
}

/// Shows it; returns the exit code.
pub(super) fn run(i: &Invocation) -> Result<u8, Failed> {
    let name = i.command.name;
    // Options are checked before the daemon is asked.
    let colour = colour(i)?;
    let proc_options = proc_options(i)?;
    if name == "state" {
        let program = &i.context.program;
        let remark =
            format!("'{program} ... state' is deprecated, use '{program} ... role' instead.\n");
        print::stderr(remark.repeat(2).as_bytes());
    }
    let target = target(i, &mut look_up(&i.context))?;
    let object = i.shown_object();
    if i.has("watch") {
        return watch_status(i, &target, colour);
    }
    let asked = Session::open(&i.context)?.snapshot(&object, target.clone())?;
    match name {
        "status" => show_status(i, asked, &object, colour),
        "show" => show_configuration(i, asked, &target, &object),
        "sh-status" => Ok(show_sh_status(asked, &target)),
        _ => {
            let snapshot = match asked {
                Ok(snapshot) => snapshot,
                Err(reply) => return Err(refused(&reply, &object)),
            };
            if name == "proc" {
                print::stdout(proc(&snapshot, &proc_options).as_bytes());
                return Ok(0);
            }
            for resource in &snapshot.resources {
                for volume in &resource.volumes {
                    let text = line(name, &resource.name, volume)?;
                    print::stdout(text.as_bytes());
                }
            }
            Ok(0)
        }
    }
}

fn refused(reply: &Reply, object: &str) -> Failed {
    Failed::new(reply.exit(), reply.message(object))
}

fn line(name: &str, resource: &str, volume: &Volume) -> Result<String, Failed> {
    Ok(match name {
        "role" | "state" => role(volume) + "\n",
        "cstate" => cstate(volume) + "\n",
        "dstate" => dstate(volume) + "\n",
        "check-resize" => {
            last_known::check_resize(volume)?;
            String::new()
        }
        "udev" => udev(resource, volume),
        _ => {
            if volume.is_unconfigured() {
                return Err(Failed::new(1, "Device is unconfigured\n"));
            }
            let generations = volume.generations.filter(|_| volume.disk != Dstate::Diskless);
            let Some(generations) = generations else {
                return Err(Failed::new(1, "Device has no disk\n"));
            };
            if name == "get-gi" { get_gi(&generations) } else { show_gi(&generations) }
        }
    })
}

/// Names for udev rules, as newer tools print them. Spec: status-and-integration.md §4.5.
fn udev(resource: &str, volume: &Volume) -> String {
    let mut text = format!("DEVICE=drbd{}\n", volume.minor);
    text.push_str(&format!("SYMLINK_BY_RES=drbd/by-res/{resource}/{}\n", volume.volume));
    if let Some(backing) = &volume.backing {
        let disk = backing.disk.strip_prefix("/dev/").unwrap_or(&backing.disk);
        text.push_str(&format!("SYMLINK_BY_DISK=drbd/by-disk/{disk}\n"));
    }
    text
}

fn colour(i: &Invocation) -> Result<Colour, Failed> {
    let is_on = match i.option("color").map(|v| v.map(|v| v.as_slice())) {
        None | Some(Some(b"auto")) => std::io::stdout().is_terminal(),
        Some(None | Some(b"always")) => true,
        Some(Some(b"never")) => false,
        Some(Some(_)) => {
            let stdout = help::usage(&i.context.program);
            return Err(Failed { code: 20, stderr: String::new(), stdout });
        }
    };
    Ok(if is_on { Colour::On } else { Colour::Off })
}

/// Columns of the terminal, or 80.
fn width() -> usize {
    let stdout = std::io::stdout();
    let size = rustix::termios::tcgetwinsize(&stdout).ok().filter(|_| stdout.is_terminal());
    size.map(|s| usize::from(s.ws_col)).filter(|w| *w > 0).unwrap_or(80)
}

fn show_status(
    i: &Invocation,
    asked: Result<Snapshot, Reply>,
    object: &str,
    colour: Colour,
) -> Result<u8, Failed> {
    let is_json = i.has("json");
    let Ok(snapshot) = asked else {
        let stdout = if is_json { "[]\n".into() } else { String::new() };
        return Err(Failed { code: 10, stderr: format!("{object}: No such resource\n"), stdout });
    };
    let options = StatusOptions {
        verbose: i.has("verbose"),
        statistics: i.has("statistics"),
        colour,
        width: width(),
    };
    match is_json {
        true => print_json(&status_json(&snapshot)),
        false => print::stdout(status(&snapshot, &options).as_bytes()),
    }
    Ok(0)
}

/// How often a watched status is shown anew.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// Shows the status again and again, on a terminal always in the same place.
fn watch_status(i: &Invocation, target: &Target, colour: Colour) -> Result<u8, Failed> {
    let object = i.shown_object();
    let on_terminal = std::io::stdout().is_terminal();
    let mut session = Session::open(&i.context)?;
    loop {
        let Ok(snapshot) = session.snapshot(&object, target.clone())? else {
            return Err(Failed::new(10, format!("{object}: No such resource\n")));
        };
        let options = StatusOptions {
            verbose: i.has("verbose"),
            statistics: i.has("statistics"),
            colour,
            width: width(),
        };
        let text = watch(&snapshot, &options);
        // Home, the text with the rest of each line erased, the rest of the screen erased.
        let text = match on_terminal {
            true => format!("\x1b[H{}\x1b[J", text.replace('\n', "\x1b[K\n")),
            false => text,
        };
        let mut out = std::io::stdout().lock();
        if out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err() {
            return Ok(0);
        }
        drop(out);
        std::thread::sleep(WATCH_INTERVAL);
    }
}

fn print_json(value: &Value) {
    print::stdout(format!("{value:#}\n").as_bytes());
}

fn show_configuration(
    i: &Invocation,
    asked: Result<Snapshot, Reply>,
    target: &Target,
    object: &str,
) -> Result<u8, Failed> {
    let snapshot = match (asked, target) {
        (Ok(snapshot), _) => snapshot,
        (Err(_), Target::Resource(_)) => {
            return Err(Failed::new(20, "received netlink error reply: No such device\n"));
        }
        (Err(reply), _) => return Err(refused(&reply, object)),
    };
    let options = ShowOptions { defaults: i.has("show-defaults") };
    match i.has("json") {
        true => print_json(&show_json(&snapshot, &options)),
        false => print::stdout(show(&snapshot, &options).as_bytes()),
    }
    Ok(0)
}

fn show_sh_status(asked: Result<Snapshot, Reply>, target: &Target) -> u8 {
    match (asked, target) {
        (Ok(snapshot), _) => print::stdout(sh_status(&snapshot).as_bytes()),
        (Err(_), Target::Minor(minor)) => print::stdout(sh_status_unknown(*minor).as_bytes()),
        (Err(_), _) => return 19,
    }
    0
}

fn proc_options(i: &Invocation) -> Result<ProcOptions, Failed> {
    let value = |name| i.option(name).flatten();
    let compat = match value("compat").map(|v| v.as_slice()) {
        None | Some(b"8.4") => Compat::V84,
        Some(b"8.3") => Compat::V83,
        Some(other) => return Err(invalid("compat", &other.into())),
    };
    let details = match value("details") {
        None => 0,
        Some(text) => {
            let level = text.to_str().ok().and_then(|t| t.parse().ok()).filter(|d| *d <= 2);
            level.ok_or_else(|| invalid("details", text))?
        }
    };
    Ok(ProcOptions { compat, details })
}
