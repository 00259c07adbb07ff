//! `drbdadm dump --format json`: the effective configuration for programs.
//!
//! The schema is ours and versioned (`"schema": 1`): fields are added, never renamed or removed.
//! conf/README.md describes it. Texts that are not UTF-8 are shown with replacement characters.

use bstr::{BStr, ByteSlice};
use serde_json::{Map, Value as Json, json};

use crate::effective::{self, Effective, Origin};
use crate::model::{
    Address, Config, Global, HostKind, HostSection, MetaIndex, Resource, Span, UsageCount, Volume,
};
use crate::options::{Section, Value};
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
        "global": global(&config.global, sources),
        "resources": resources,
    })
}

fn text(t: &BStr) -> String {
    t.to_str_lossy().into_owned()
}

fn global(g: &Global, sources: &Sources) -> Json {
    let usage_count = match g.usage_count {
        UsageCount::Yes => "yes",
        UsageCount::No => "no",
        UsageCount::Ask => "ask",
    };
    let seconds = |n: u32| (Json::from(n), Some("s"));
    let plain = |value: Json| (value, None);
    let rows = [
        ("minor-count", plain(g.minor_count.into())),
        ("dialog-refresh", seconds(g.dialog_refresh.unwrap_or(1))),
        ("disable-ip-verification", plain(g.disable_ip_verification.into())),
        ("udev-always-use-vnr", plain(g.udev_always_use_vnr.into())),
        ("usage-count", plain(usage_count.into())),
        ("cmd-timeout-short", seconds(g.cmd_timeout_short.unwrap_or(5))),
        ("cmd-timeout-medium", seconds(g.cmd_timeout_medium.unwrap_or(600))),
        ("cmd-timeout-long", seconds(g.cmd_timeout_long.unwrap_or(0))),
    ];
    let mut out = Map::new();
    for (name, (value, unit)) in rows {
        let mut one = Map::new();
        one.insert("value".into(), value);
        if let Some(unit) = unit {
            one.insert("unit".into(), unit.into());
        }
        one.insert("from".into(), written(sources, g.spans.get(name).copied()));
        out.insert(name.into(), one.into());
    }
    out.into()
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
    let from = written(sources, r.become_primary_on_span);
    out.insert("become-primary-on".into(), json!({ "value": names, "from": from }));
    let from = written(sources, r.stacked_timeouts);
    let stacked_timeouts = json!({ "value": r.stacked_timeouts.is_some(), "from": from });
    out.insert("stacked-timeouts".into(), stacked_timeouts);
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
    out.insert("address".into(), h.address.as_ref().map_or(Json::Null, |a| address(a, sources)));
    if let Some(alternate) = &h.alternate_address {
        out.insert("alternate-link-address".into(), address(alternate, sources));
    }
    if let Some(proxy) = &h.proxy {
        let on: Vec<String> = proxy.on.iter().map(|n| text(n.as_bstr())).collect();
        let end = |a: &Option<Address>| a.as_ref().map_or(Json::Null, |a| address(a, sources));
        let plugins: Vec<String> = proxy.plugins.iter().map(|p| text(p.as_bstr())).collect();
        let options = effective::section(Section::Proxy, &proxy.options);
        out.insert(
            "proxy".into(),
            json!({
                "on": on,
                "inside": end(&proxy.inside),
                "outside": end(&proxy.outside),
                "options": options_of(&options, sources),
                "plugins": plugins,
            }),
        );
    }
    if let Some(id) = h.node_id {
        out.insert("node-id".into(), id.into());
    }
    let volumes: Vec<Json> = h.volumes.iter().map(|v| volume(v, sources)).collect();
    out.insert("volumes".into(), volumes.into());
    Json::Object(out)
}

fn address(a: &Address, sources: &Sources) -> Json {
    let family = a.family.name();
    let port = a.port.to_str().ok().and_then(|p| p.parse::<u16>().ok());
    json!({
        "family": family,
        "address": text(a.addr.as_bstr()),
        "port": port,
        "from": written(sources, Some(a.span)),
    })
}

fn volume(v: &Volume, sources: &Sources) -> Json {
    let meta = v.meta_disk.as_ref().map_or(Json::Null, |m| {
        let mut out = Map::new();
        let kind = match &m.index {
            MetaIndex::Internal => "internal",
            MetaIndex::Flexible => "flexible",
            MetaIndex::Indexed(_) => "indexed",
        };
        out.insert("kind".into(), kind.into());
        if m.index != MetaIndex::Internal {
            out.insert("device".into(), text(m.device.as_bstr()).into());
        }
        if let MetaIndex::Indexed(index) = &m.index {
            let index = index.to_str().ok().and_then(|i| i.parse::<u32>().ok());
            out.insert("index".into(), index.into());
        }
        out.insert("from".into(), written(sources, Some(m.span)));
        out.into()
    });
    let value = |value: Json, span| json!({ "value": value, "from": written(sources, span) });
    let disk = v.disk.as_ref().map(|d| text(d.as_bstr()));
    json!({
        "volume": v.vnr,
        "implicit": v.implicit,
        "minor": value(v.minor.into(), v.minor_span),
        // Without a name of its own it is called after its minor.
        "device": value(text(v.device_name().as_bstr()).into(), v.name_span.or(v.minor_span)),
        "disk": value(disk.into(), v.disk_span),
        "meta-disk": meta,
        "disk-options": options_of(&effective::volume(v), sources),
    })
}

fn options_of(options: &[Effective], sources: &Sources) -> Json {
    let mut out = Map::new();
    for option in options {
        // Of these sections nobody wants to see what is not there.
        let is_rare = matches!(option.spec.section, Section::Handlers | Section::Proxy);
        if is_rare && option.origin == Origin::Default {
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
            out.insert("unit".into(), option.spec.unit().symbol().into());
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

fn written(sources: &Sources, span: Option<Span>) -> Json {
    place(sources, span.map_or(Origin::Default, Origin::Written))
}

fn place(sources: &Sources, origin: Origin) -> Json {
    match origin {
        Origin::Default => "default".into(),
        Origin::Written(span) => {
            format!("{}:{}", text(sources.absolute(span.file)), span.line).into()
        }
    }
}
