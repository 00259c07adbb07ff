//! `drbdadm dump --format json`: the effective configuration for programs.
//!
//! The schema is ours and versioned (`"schema": 1`): fields are added, never renamed or removed.
//! conf/README.md describes it. Texts that are not UTF-8 are shown with replacement characters.

use bstr::{BStr, ByteSlice};
use serde_json::{Map, Value as Json, json};

use crate::effective::{self, Effective, Origin};
use crate::model::{Address, Config, Global, HostKind, HostSection, MetaIndex, Resource, Volume};
use crate::options::{Section, Unit, Value};
use crate::parse::section_title as section_key;
use crate::source::Sources;

/// The configuration after inheritance; `only`: these resources, else all.
pub fn dump(config: &Config, sources: &Sources, node: &BStr, only: Option<&[usize]>) -> Json {
    let chosen = |i: &usize| only.is_none_or(|o| o.contains(i));
    let resources: Vec<Json> = config
        .resources
        .iter()
        .enumerate()
        .filter(|(i, _)| chosen(i))
        .map(|(_, r)| resource(r, sources))
        .collect();
    json!({
        "schema": 1,
        "file": text(sources.main()),
        "node": text(node),
        "global": global(&config.global),
        "resources": resources,
    })
}

fn text(t: &BStr) -> String {
    t.to_str_lossy().into_owned()
}

fn global(g: &Global) -> Json {
    json!({
        "minor-count": g.minor_count,
        "dialog-refresh": g.dialog_refresh.unwrap_or(1),
        "disable-ip-verification": g.disable_ip_verification,
        "udev-always-use-vnr": g.udev_always_use_vnr,
        "cmd-timeout-short": g.cmd_timeout_short.unwrap_or(5),
        "cmd-timeout-medium": g.cmd_timeout_medium.unwrap_or(600),
        "cmd-timeout-long": g.cmd_timeout_long.unwrap_or(0),
    })
}

fn resource(r: &Resource, sources: &Sources) -> Json {
    let hosts: Vec<Json> =
        r.hosts.iter().enumerate().map(|(i, h)| host(h, Some(i) == r.me, sources)).collect();
    let mut out = Map::new();
    out.insert("name".into(), text(r.name.as_bstr()).into());
    out.insert("defined-at".into(), place(sources, Origin::Written(r.span)));
    out.insert("ignored".into(), r.is_ignored().into());
    out.insert("stacked".into(), r.is_stacked().into());
    for (section, options) in effective::resource(r) {
        out.insert(section_key(section).into(), options_of(&options, sources));
    }
    let names: Vec<String> = r.become_primary_on.iter().map(|n| text(n.as_bstr())).collect();
    out.insert("become-primary-on".into(), names.into());
    out.insert("stacked-timeouts".into(), r.stacked_timeouts.into());
    out.insert("hosts".into(), hosts.into());
    Json::Object(out)
}

fn host(h: &HostSection, is_me: bool, sources: &Sources) -> Json {
    let kind = match &h.kind {
        HostKind::On => "on",
        HostKind::Floating => "floating",
        HostKind::StackedOn(_) => "stacked-on-top-of",
    };
    let names: Vec<String> = h.names.iter().map(|n| text(n.as_bstr())).collect();
    let mut out = Map::new();
    out.insert("kind".into(), kind.into());
    out.insert("names".into(), names.into());
    out.insert("this-host".into(), is_me.into());
    if let HostKind::StackedOn(lower) = &h.kind {
        out.insert("stacked-on".into(), text(lower.as_bstr()).into());
    }
    out.insert("defined-at".into(), place(sources, Origin::Written(h.span)));
    out.insert("address".into(), h.address.as_ref().map_or(Json::Null, address));
    if let Some(alternate) = &h.alternate_address {
        out.insert("alternate-link-address".into(), address(alternate));
    }
    if let Some(proxy) = &h.proxy {
        let on: Vec<String> = proxy.on.iter().map(|n| text(n.as_bstr())).collect();
        let end = |a: &Option<Address>| a.as_ref().map_or(Json::Null, address);
        out.insert(
            "proxy".into(),
            json!({ "on": on, "inside": end(&proxy.inside), "outside": end(&proxy.outside) }),
        );
    }
    if let Some(id) = h.node_id {
        out.insert("node-id".into(), id.into());
    }
    let volumes: Vec<Json> = h.volumes.iter().map(|v| volume(v, sources)).collect();
    out.insert("volumes".into(), volumes.into());
    Json::Object(out)
}

fn address(a: &Address) -> Json {
    let family = a.family.name();
    let port = a.port.to_str().ok().and_then(|p| p.parse::<u16>().ok());
    json!({ "family": family, "address": text(a.addr.as_bstr()), "port": port })
}

fn volume(v: &Volume, sources: &Sources) -> Json {
    let meta = v.meta_disk.as_ref().map_or(Json::Null, |m| match &m.index {
        MetaIndex::Internal => json!({ "kind": "internal" }),
        MetaIndex::Flexible => json!({ "kind": "flexible", "device": text(m.device.as_bstr()) }),
        MetaIndex::Indexed(index) => {
            let index = index.to_str().ok().and_then(|i| i.parse::<u32>().ok());
            json!({ "kind": "indexed", "device": text(m.device.as_bstr()), "index": index })
        }
    });
    json!({
        "volume": v.vnr,
        "implicit": v.implicit,
        "minor": v.minor,
        "device": text(v.device_name().as_bstr()),
        "disk": v.disk.as_ref().map(|d| text(d.as_bstr())),
        "meta-disk": meta,
        "disk-options": options_of(&effective::volume(v), sources),
    })
}

fn options_of(options: &[Effective], sources: &Sources) -> Json {
    let mut out = Map::new();
    for option in options {
        let is_handler = option.spec.section == Section::Handlers;
        if is_handler && option.origin == Origin::Default {
            continue;
        }
        out.insert(option.spec.name.into(), one_option(option, sources));
    }
    Json::Object(out)
}

fn one_option(option: &Effective, sources: &Sources) -> Json {
    let mut out = Map::new();
    match &option.value {
        Ok(Value::Number(n)) => {
            out.insert("value".into(), (*n).into());
            let unit = match option.spec.unit() {
                Unit::One => "1",
                Unit::Kib => "KiB",
                Unit::Sector => "sectors",
            };
            out.insert("unit".into(), unit.into());
        }
        Ok(Value::Bool(b)) => {
            out.insert("value".into(), (*b).into());
        }
        Ok(Value::Enum(e)) => {
            out.insert("value".into(), (*e).into());
        }
        // A secret is needed to run, never to be read by the next program in a pipe.
        Ok(Value::Text(_)) if option.spec.name == "shared-secret" => {
            out.insert("value".into(), "***".into());
        }
        Ok(Value::Text(t)) => {
            out.insert("value".into(), text(t.as_bstr()).into());
        }
        Ok(Value::None) => {
            out.insert("value".into(), Json::Null);
        }
        Err(e) => {
            out.insert("error".into(), e.to_string().into());
        }
    }
    out.insert("from".into(), place(sources, option.origin));
    Json::Object(out)
}

fn place(sources: &Sources, origin: Origin) -> Json {
    match origin {
        Origin::Default => "default".into(),
        Origin::Written(span) => {
            format!("{}:{}", text(sources.absolute(span.file)), span.line).into()
        }
    }
}
