//! Commands for shell scripts. Spec: config-and-drbdadm.md §14.

use std::time::Duration;

use bstr::{BString, ByteSlice};
use drbd_conf::dump::quoted;
use drbd_conf::model::{HostKind, Resource};

use crate::app::{App, Exit};
use crate::backend::{Call, Program, escape};
use crate::command::TimeClass;
use crate::lines::{meta_device, meta_index};
use crate::run::{chosen_volumes, lines};
use crate::select::{Target, volumes};
use crate::{print, version};

fn say(text: impl AsRef<[u8]>) {
    let mut line = text.as_ref().to_vec();
    line.push(b'\n');
    print::stdout(&line);
}

/// sh-nop, sh-resources, sh-mod-parms.
pub fn without_resources(app: &App) -> i32 {
    let resources = &app.loaded.config.resources;
    match app.invocation.command.name {
        "sh-resources" => {
            let stacked = app.invocation.stacked;
            let names: Vec<BString> = resources
                .iter()
                .filter(|r| !r.is_ignored() && r.is_stacked() == stacked)
                .map(|r| quoted(r.name.as_bstr()))
                .collect();
            if !names.is_empty() {
                say(bstr::join(" ", names));
            }
        }
        "sh-mod-parms" => {
            let here: usize = resources.iter().map(|r| volumes(r).len()).sum();
            let count = app.loaded.config.global.minor_count;
            let count = count.map_or_else(
                || (here + 3).clamp(32, 255),
                |n| usize::try_from(n).unwrap_or(usize::MAX),
            );
            say(format!("minor_count={count}"));
        }
        _ => {}
    }
    0
}

/// Commands that print something about a resource or its volumes.
///
/// # Errors
/// sh-lr-of outside of stacked mode.
pub fn of_resource(app: &App, resource: &Resource, target: Target) -> Result<i32, Exit> {
    match app.invocation.command.name {
        "sh-resource" => {
            say(&resource.name);
            return Ok(0);
        }
        "sh-lr-of" => return lower_resource(app, resource, target),
        "sh-udev" => return Ok(udev(app, resource, target)),
        _ => {}
    }
    let me = resource.me();
    for volume in chosen_volumes(resource, target) {
        let text: BString = match app.invocation.command.name {
            "sh-dev" => volume.device_name(),
            "sh-minor" => volume.minor.unwrap_or_default().to_string().into(),
            "sh-ll-dev" => volume.disk.clone().unwrap_or_default(),
            "sh-md-dev" => meta_device(volume),
            "sh-md-idx" => meta_index(volume),
            "sh-ip" => {
                me.and_then(|m| m.address.as_ref()).map(|a| a.addr.clone()).unwrap_or_default()
            }
            _ => BString::default(),
        };
        say(text);
    }
    Ok(0)
}

/// Once for each volume, as the original does it.
fn lower_resource(app: &App, resource: &Resource, target: Target) -> Result<i32, Exit> {
    for _ in chosen_volumes(resource, target) {
        say_lower_resource(app, resource)?;
    }
    Ok(0)
}

fn say_lower_resource(app: &App, resource: &Resource) -> Result<(), Exit> {
    if !app.invocation.stacked {
        print::complain("sh-lower-resource only available in stacked mode");
        return Err(Exit(1));
    }
    match resource.me().map(|m| &m.kind) {
        Some(HostKind::StackedOn(lower)) => {
            say(lower);
            Ok(())
        }
        _ => {
            let (name, node) = (&resource.name, &app.node);
            print::complain(format!("'{name}' is not stacked on this host ({node})"));
            Err(Exit(1))
        }
    }
}

fn udev(app: &App, resource: &Resource, target: Target) -> i32 {
    if target.volume.is_none() {
        print::complain("volume not specified");
        return 1;
    }
    for volume in chosen_volumes(resource, target) {
        let name = &resource.name;
        if volume.implicit && !app.loaded.config.global.udev_always_use_vnr {
            say(format!("RESOURCE={name}"));
        } else {
            say(format!("RESOURCE={name}/{}", volume.vnr));
        }
        let device = volume.device_name();
        let device = device.strip_prefix(b"/dev/").unwrap_or(&device).as_bstr();
        say(format!("DEVICE={device}"));
        let disk = volume.disk.clone().unwrap_or_default();
        let disk = disk.strip_prefix(b"/dev/").unwrap_or(&disk).as_bstr();
        say(format!("DISK={disk}"));
    }
    0
}

/// sh-b-pri: Primary where the file says so, five attempts.
pub fn become_primary(app: &App, resource: &Resource, target: Target) -> i32 {
    let Some(me) = resource.me() else { return 0 };
    let wanted = resource.become_primary_on.iter().any(|n| n == "both" || me.names.contains(n));
    if !wanted {
        return 0;
    }
    let mut code = 0;
    for volume in chosen_volumes(resource, target) {
        let minor = volume.minor.unwrap_or_default();
        let call = lines(app, resource).setup_minor("primary", minor, TimeClass::Medium);
        for attempt in 0..5 {
            code = app.backend.run(&call).code;
            if code == 0 {
                break;
            }
            if attempt < 4 {
                std::thread::sleep(Duration::from_secs(1));
            }
        }
        if code != 0 {
            return code;
        }
    }
    code
}

/// sh-status. Spec §14.10.
pub fn status(app: &App) -> i32 {
    if !app.backend.dry_run {
        let file = app.config_file();
        say(format!(
            "_drbd_version={}\n_drbd_api=1\n_config_file={}\n\n",
            escape(version::VERSION.into()),
            escape(file.as_bstr())
        ));
    }
    for resource in app.loaded.config.resources.iter().filter(|r| !r.is_ignored()) {
        let code = status_of(app, resource);
        if code != 0 {
            return code;
        }
    }
    0
}

fn status_of(app: &App, resource: &Resource) -> i32 {
    let file = app.loaded.sources.absolute(resource.span.file);
    let place = format!("{file}:{}", resource.span.line);
    let lower = match resource.me().map(|m| &m.kind) {
        Some(HostKind::StackedOn(lower)) => Some(lower),
        _ => None,
    };
    let below = lower.and_then(|l| app.loaded.config.resources.iter().find(|r| &r.name == l));
    say(format!(
        "_conf_res_name={}\n_conf_file_line={}\n\n_stacked_on={}",
        escape(resource.name.as_bstr()),
        escape(place.as_bytes().as_bstr()),
        lower.map(|l| escape(l.as_bstr())).unwrap_or_default()
    ));
    if lower.is_none() {
        say("_stacked_on_device=\n_stacked_on_minor=");
    }
    for volume in volumes(resource) {
        if lower.is_some() {
            // By number: the original goes through both lists side by side and can be wrong.
            let found = below.and_then(|b| volumes(b).iter().find(|v| v.vnr == volume.vnr));
            let device = found.map(|v| v.device_name()).unwrap_or_default();
            let minor = found.and_then(|v| v.minor).map(|m| m.to_string()).unwrap_or_default();
            say(format!(
                "_stacked_on_device={}\n_stacked_on_minor={minor}",
                escape(device.as_bstr())
            ));
        }
        say(format!("_conf_volume={}", volume.vnr));
        let call = Call::new(Program::Setup, &resource.name, TimeClass::Short)
            .arg("sh-status")
            .arg(volume.minor.unwrap_or_default().to_string());
        let code = app.backend.run(&call).code;
        if code != 0 {
            return code;
        }
    }
    0
}

#[cfg(test)]
mod tests {
    use crate::lines::address;
    use drbd_conf::model::{Address, Family, Span};

    #[test]
    fn addresses_have_brackets_only_for_ipv6() {
        let make = |family, addr: &str| Address {
            family,
            addr: addr.into(),
            port: "7789".into(),
            span: Span::default(),
        };
        assert_eq!(address(&make(Family::Ipv4, "10.0.0.1")), "ipv4:10.0.0.1:7789");
        assert_eq!(address(&make(Family::Ipv6, "fd01::1")), "ipv6:[fd01::1]:7789");
        assert_eq!(make(Family::Sdp, "10.0.0.1").endpoint(), "10.0.0.1:7789");
    }
}
