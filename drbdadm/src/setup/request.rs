//! From an invocation to a request.

use std::path::Path;

use bstr::{BString, ByteSlice};
use drbd_admin::{
    DiskOperation, Effect, Fault, MetaIndex, NetStream, OptionSet, OptionValue, Reply, Request,
    Target,
};
use drbd_conf::options::{Kind, OptionSpec, Section, command_row};
use drbd_types::Failure;

use super::Failed;
use super::command::{Object, Opt};
use super::object::{address, minor, no_minor, text};
use super::parse::{Invocation, invalid};

/// Finds the minor behind a path; asks the daemon.
pub(super) type LookUp<'l> = &'l mut dyn FnMut(&Path) -> Result<Option<u32>, Failed>;

/// What the first word is about.
pub(super) fn target(i: &Invocation, look_up: LookUp<'_>) -> Result<Target, Failed> {
    let takes_all =
        matches!(i.command.object, Object::Any | Object::ResourceAny | Object::ResourceOrAll);
    let takes_minor = matches!(i.command.object, Object::Any | Object::Minor | Object::OneMinor);
    let Some(word) = i.object.first() else { return Ok(Target::All) };
    if takes_all && word == "all" {
        return Ok(Target::All);
    }
    if takes_minor {
        if let Some(minor) = minor(word) {
            return Ok(Target::Minor(minor));
        }
        if word.contains(&b'/') {
            let path = word.to_path_lossy().into_owned();
            return look_up(&path)?.map(Target::Minor).ok_or_else(|| no_minor(word));
        }
    }
    if i.command.object == Object::OneMinor || word.is_empty() {
        return Err(no_minor(word));
    }
    Ok(Target::Resource(text(word)?))
}

/// A request for a command that changes something, or that the daemon answers with text.
pub(super) fn build(i: &Invocation, look_up: LookUp<'_>) -> Result<Request, Failed> {
    match i.command.name {
        "new-resource" | "resource-options" | "del-resource" | "new-minor" => of_resource(i),
        "attach" => attach(i, look_up),
        "connect" | "net-options" | "disconnect" => of_connection(i),
        "fault-disk" | "fault-stream" | "fault-packet" | "fault-clear" => fault(i, look_up),
        name => {
            let target = target(i, look_up)?;
            of_volumes(i, name, target)
        }
    }
}

fn of_volumes(i: &Invocation, name: &str, target: Target) -> Result<Request, Failed> {
    Ok(match name {
        "primary" => Request::Primary { target, force: flag(i, "force")? },
        "secondary" => Request::Secondary { target },
        "invalidate" => Request::Invalidate { target },
        "invalidate-remote" => Request::InvalidateRemote { target },
        "outdate" => Request::Outdate { target },
        "pause-sync" => Request::PauseSync { target },
        "resume-sync" => Request::ResumeSync { target },
        "suspend-io" => Request::SuspendIo { target },
        "resume-io" => Request::ResumeIo { target },
        "detach" => Request::Detach { target, force: flag(i, "force")? },
        "down" => Request::Down { target },
        "verify" => {
            Request::Verify { target, start: number(i, "start")?, stop: number(i, "stop")? }
        }
        "new-current-uuid" => {
            Request::NewCurrentUuid { target, clear_bitmap: flag(i, "clear-bitmap")? }
        }
        "resize" => Request::Resize {
            target,
            size: number(i, "size")?.unwrap_or(0),
            assume_peer_has_space: flag(i, "assume-peer-has-space")?,
            assume_clean: flag(i, "assume-clean")?,
            al_stripes: small(i, "al-stripes")?,
            al_stripe_size_kib: small(i, "al-stripe-size-kB")?,
        },
        "disk-options" => Request::DiskOptions {
            target,
            set_defaults: i.has("set-defaults"),
            options: options(i, Section::Disk)?,
        },
        "del-minor" => match target {
            Target::Minor(minor) => Request::DelMinor { minor },
            Target::Resource(_) | Target::All => return Err(no_minor(&"".into())),
        },
        "show-stuck" => Request::ShowStuck { target },
        "why" => Request::Why { target },
        other => return Err(Failed::new(20, format!("{other}: not a command of the daemon\n"))),
    })
}

fn word(i: &Invocation, index: usize) -> Result<&BString, Failed> {
    let words = i.object.iter().chain(&i.arguments);
    words.clone().nth(index).ok_or_else(|| Failed::new(20, "Missing first argument\n"))
}

fn of_resource(i: &Invocation) -> Result<Request, Failed> {
    let resource = text(word(i, 0)?)?;
    Ok(match i.command.name {
        "new-resource" => Request::NewResource { resource, options: options(i, Section::Options)? },
        "resource-options" => Request::ResourceOptions {
            resource,
            set_defaults: i.has("set-defaults"),
            options: options(i, Section::Options)?,
        },
        "del-resource" => Request::DelResource { resource },
        _ => {
            let minor_word = word(i, 1)?;
            let minor = minor(minor_word).ok_or_else(|| no_minor(minor_word))?;
            let volume_word = word(i, 2)?;
            let volume = volume_word.to_str().ok().and_then(|t| t.parse().ok());
            let volume = volume.filter(|v| *v < u16::MAX).ok_or_else(|| {
                Failed::new(20, format!("'{volume_word}' is not a volume number (0..65534)\n"))
            })?;
            Request::NewMinor { resource, minor, volume }
        }
    })
}

fn attach(i: &Invocation, look_up: LookUp<'_>) -> Result<Request, Failed> {
    let Target::Minor(minor) = target(i, look_up)? else { return Err(no_minor(word(i, 0)?)) };
    let (disk, meta_disk) = (text(word(i, 1)?)?, text(word(i, 2)?)?);
    let index = word(i, 3)?;
    let meta_index = match index.as_slice() {
        b"internal" | b"flex-internal" => MetaIndex::Internal,
        b"flexible" | b"flex-external" => MetaIndex::Flexible,
        digits => {
            let number = digits.to_str().ok().and_then(|t| t.parse().ok());
            MetaIndex::Index(number.ok_or_else(|| {
                Failed::new(20, format!("'{index}' is not internal, flexible or a number\n"))
            })?)
        }
    };
    for device in [&disk, &meta_disk] {
        std::fs::metadata(device).map_err(|e| {
            let reason = reason(&e);
            Failed::new(20, format!("Can not open device '{device}': {reason}\n"))
        })?;
    }
    let options = options(i, Section::Disk)?;
    Ok(Request::Attach { minor, disk, meta_disk, meta_index, options })
}

/// The system's words without Rust's number.
pub(super) fn reason(error: &impl std::fmt::Display) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or(&text).to_owned()
}

fn of_connection(i: &Invocation) -> Result<Request, Failed> {
    let is_connect = i.command.name == "connect";
    let first = usize::from(is_connect);
    let (local, peer) = (address(word(i, first)?)?, address(word(i, first + 1)?)?);
    for option in ["alternate-address", "alternate-peer-address"] {
        if i.has(option) {
            // Only patched kernel drivers had a second path; silently using one is worse than this.
            let message = format!("--{option}: a second path is not supported\n");
            return Err(Failed::new(20, message));
        }
    }
    Ok(match i.command.name {
        "connect" => Request::Connect {
            resource: text(word(i, 0)?)?,
            local,
            peer,
            options: options(i, Section::Net)?,
            discard_my_data: flag(i, "discard-my-data")?,
            tentative: flag(i, "tentative")?,
        },
        "net-options" => Request::NetOptions {
            local,
            peer,
            set_defaults: i.has("set-defaults"),
            options: options(i, Section::Net)?,
        },
        _ => Request::Disconnect { local, peer, force: flag(i, "force")? },
    })
}

/// All options of a section that were given, typed.
fn options(i: &Invocation, section: Section) -> Result<OptionSet, Failed> {
    let mut set = OptionSet::default();
    for (name, value) in &i.options {
        let all = i.command.all_options();
        let spec = all.iter().find_map(|o| match o {
            Opt::Row(spec) if spec.name == *name && spec.section == section => Some(*spec),
            _ => None,
        });
        if let Some(spec) = spec {
            set.set(name, typed(i, spec, value.as_ref())?);
        }
    }
    Ok(set)
}

fn typed(
    i: &Invocation,
    spec: &'static OptionSpec,
    value: Option<&BString>,
) -> Result<OptionValue, Failed> {
    let Some(value) = value else { return Ok(OptionValue::Bool(true)) };
    if let Kind::Text { max } = spec.kind
        && value.len() > max
    {
        // The original leaves this to the driver.
        let reply = Reply::failed(Failure::BadRequest, "invalid attribute value");
        return Err(Failed::new(reply.exit(), reply.message(&i.shown_object())));
    }
    let parsed = value.to_str().ok().and_then(|t| OptionValue::parse(spec, t).ok());
    parsed.ok_or_else(|| invalid(spec.name, value))
}

fn command_option(i: &Invocation, name: &str) -> Result<Option<OptionValue>, Failed> {
    let Some(value) = i.option(name) else { return Ok(None) };
    let spec = command_row(name);
    let spec = spec.ok_or_else(|| Failed::new(20, format!("--{name}: unknown\n")))?;
    typed(i, spec, value).map(Some)
}

fn flag(i: &Invocation, name: &str) -> Result<bool, Failed> {
    Ok(command_option(i, name)? == Some(OptionValue::Bool(true)))
}

fn number(i: &Invocation, name: &str) -> Result<Option<u64>, Failed> {
    Ok(match command_option(i, name)? {
        Some(OptionValue::Number(n)) => Some(n),
        _ => None,
    })
}

fn small(i: &Invocation, name: &str) -> Result<Option<u32>, Failed> {
    Ok(number(i, name)?.and_then(|n| u32::try_from(n).ok()))
}

fn fault(i: &Invocation, look_up: LookUp<'_>) -> Result<Request, Failed> {
    let value = |name: &str| -> Result<Option<String>, Failed> {
        i.option(name).flatten().map(text).transpose()
    };
    let bad = |name: &str| {
        let given = i.option(name).flatten().cloned().unwrap_or_default();
        invalid(name, &given)
    };
    if i.command.name == "fault-clear" {
        let id = value("id")?.map(|t| t.parse().map_err(|_| bad("id"))).transpose()?;
        return Ok(Request::FaultClear { id });
    }
    let effect = || -> Result<Effect, Failed> {
        Ok(match value("effect")?.as_deref() {
            Some("error") => Effect::Error,
            Some("stall") => Effect::Stall,
            Some("cut") => Effect::Cut,
            Some("delay") => {
                let delay = value("delay")?.and_then(|t| t.parse().ok());
                Effect::DelayMs(delay.ok_or_else(|| bad("delay"))?)
            }
            _ => {
                let text = "--effect is error, stall, cut, or delay with --delay=MILLISECONDS\n";
                return Err(Failed::new(20, text));
            }
        })
    };
    let fault = match i.command.name {
        "fault-disk" => {
            let Target::Minor(minor) = target(i, look_up)? else {
                return Err(no_minor(word(i, 0)?));
            };
            let permille = value("permille")?.map_or(Ok(1000), |t| t.parse::<u16>());
            let permille = permille.ok().filter(|p| *p <= 1000).ok_or_else(|| bad("permille"))?;
            let range = |t: String| -> Option<(u64, u64)> {
                let (first, count) = t.split_once('+')?;
                Some((first.parse().ok()?, count.parse().ok()?))
            };
            let sectors = value("sectors")?.map(|t| range(t).ok_or_else(|| bad("sectors")));
            Fault::Disk {
                minor,
                operation: operation(value("operation")?.as_deref())
                    .ok_or_else(|| bad("operation"))?,
                sectors: sectors.transpose()?,
                permille,
                effect: effect()?,
            }
        }
        "fault-stream" => {
            let stream = match value("stream")?.as_deref() {
                Some("data") => NetStream::Data,
                Some("meta") => NetStream::Meta,
                _ => return Err(Failed::new(20, "--stream is data or meta\n")),
            };
            Fault::Stream { resource: text(word(i, 0)?)?, stream, effect: effect()? }
        }
        _ => {
            let packet = value("packet")?;
            let packet = packet.ok_or_else(|| Failed::new(20, "--packet=NAME is missing\n"))?;
            Fault::HoldPacket { resource: text(word(i, 0)?)?, packet }
        }
    };
    Ok(Request::FaultSet { fault })
}

fn operation(name: Option<&str>) -> Option<DiskOperation> {
    Some(match name {
        None | Some("any") => DiskOperation::Any,
        Some("read") => DiskOperation::Read,
        Some("write") => DiskOperation::Write,
        Some("flush") => DiskOperation::Flush,
        Some("discard") => DiskOperation::Discard,
        Some("meta-read") => DiskOperation::MetaRead,
        Some("meta-write") => DiskOperation::MetaWrite,
        Some(_) => return None,
    })
}
