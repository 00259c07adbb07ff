//! proxy-up, proxy-down. Spec: config-and-drbdadm.md §9.4.

use bstr::{BString, ByteSlice};
use drbd_conf::model::{HostSection, ProxySection, Resource};

use crate::app::{App, Exit};
use crate::backend::{Call, Program, Step};
use crate::command::TimeClass;
use crate::{print, run};

/// Both ends of a proxy connection.
pub struct ProxyPair<'r> {
    me: &'r HostSection,
    own: &'r ProxySection,
    peer: &'r ProxySection,
}

/// Runs the command on one resource.
///
/// # Errors
/// There is no usable proxy configuration (with `all` that only skips the resource).
pub fn run(app: &App, resource: &Resource, all: bool) -> Result<i32, Exit> {
    let pair = match pair(app, resource) {
        Ok(pair) => pair,
        Err(text) => {
            print::complain(text);
            return if all { Ok(0) } else { Err(Exit(10)) };
        }
    };
    let steps = if app.invocation.command.name == "proxy-up" {
        up(resource, &pair)
    } else {
        vec![down(resource, &pair)]
    };
    Ok(run::run_steps(app, &steps))
}

fn pair<'r>(app: &App, resource: &'r Resource) -> Result<ProxyPair<'r>, String> {
    let (name, node) = (&resource.name, &app.node);
    let no_config = format!("There is no proxy config for host {node} in resource {name}.");
    let me = resource.me().ok_or_else(|| no_config.clone())?;
    let own = me.proxy.as_ref().ok_or(no_config)?;
    if !own.on.contains(node) {
        return Err(format!("The proxy config in resource {name} is not for {node}."));
    }
    let peer = app
        .peer(resource)
        .ok_or_else(|| format!("Cannot determine the peer in resource {name}."))?;
    let peer = peer
        .proxy
        .as_ref()
        .ok_or_else(|| format!("There is no proxy config for the peer in resource {name}."))?;
    Ok(ProxyPair { me, own, peer })
}

fn connection_name(resource: &Resource, pair: &ProxyPair<'_>) -> BString {
    let join = |names: &[BString]| BString::from(bstr::join("_", names));
    format!("{}-{}-{}", resource.name, join(&pair.peer.on), join(&pair.own.on)).into()
}

fn ctl(resource: &Resource) -> Call {
    Call::new(Program::ProxyCtl, &resource.name, TimeClass::Short)
}

/// adjust reads the proxy's settings, as the original does. The answer's form belongs to a product
/// that is not at hand, so differences are not worked out, and that is said.
pub fn look_at_settings(app: &App, resource: &Resource) {
    let Some(me) = resource.me() else { return };
    let Some(own) = me.proxy.as_ref().filter(|p| p.on.contains(&app.node)) else { return };
    let Some(peer) = app.peer(resource).and_then(|p| p.proxy.as_ref()) else { return };
    let name = connection_name(resource, &ProxyPair { me, own, peer });
    let mut call = ctl(resource).arg("-c").arg(format!("show proxy-settings {name}"));
    call.silent = true;
    call.capture_stdout = true;
    call.stderr = crate::backend::Stderr::Discard;
    if app.backend.execute(&call).stdout.starts_with(b"proxy") {
        let resource = &resource.name;
        print::complain(format!(
            "resource {resource}: settings of DRBD Proxy are not compared; after changing them \
             use proxy-down and proxy-up"
        ));
    }
}

fn as_step(name: &'static str, call: Call) -> Step {
    Step { call, ignore_code: false, link: None, name }
}

fn up(resource: &Resource, pair: &ProxyPair<'_>) -> Vec<Step> {
    let name = connection_name(resource, pair);
    let end = |a: Option<&drbd_conf::model::Address>| {
        a.map(drbd_conf::model::Address::endpoint).unwrap_or_default()
    };
    let add = format!(
        "add connection {name} {} {} {} {}",
        end(pair.own.inside.as_ref()),
        end(pair.peer.outside.as_ref()),
        end(pair.own.outside.as_ref()),
        end(pair.me.address.as_ref())
    );
    let mut steps = vec![as_step("proxy-up", ctl(resource).arg("-c").arg(add))];
    let mut set = ctl(resource);
    let mut is_empty = true;
    for option in &pair.own.options.items {
        let value = option.value.clone().unwrap_or_default();
        set = set.arg("-c").arg(format!("set {} {name} {value}", option.spec.name));
        is_empty = false;
    }
    let plugins = &pair.own.plugins;
    if !plugins.is_empty() {
        is_empty = false;
        let end = BString::from("END");
        for (at, plugin) in plugins.iter().chain([&end]).enumerate() {
            set = set.arg("-c").arg(format!("set plugin {name} {at} {plugin}"));
        }
    }
    if !is_empty {
        steps.push(as_step("proxy-up", set));
    }
    steps
}

fn down(resource: &Resource, pair: &ProxyPair<'_>) -> Step {
    let name = connection_name(resource, pair);
    as_step("proxy-down", ctl(resource).arg("-c").arg(format!("del connection {}", name.as_bstr())))
}
