//! Inheritance of options, in the order in which the original hands them to its backends.
//!
//! Spec: config-and-drbdadm.md §4.5, §4.7, and the translations of §6.5.

use std::collections::{HashMap, HashSet};

use bstr::{BString, ByteSlice};

use crate::model::{Config, OptionList, Resource};
use crate::options;
use crate::parse::Loaded;
use crate::resolve::place;

/// "Add missing": options whose name the child lacks are put in front of the child's list.
pub fn add_missing(child: &mut OptionList, parent: &OptionList) {
    if parent.items.is_empty() {
        return;
    }
    let mut known: HashSet<&'static str> = child.items.iter().map(|o| o.spec.name).collect();
    let fresh: Vec<_> =
        parent.items.iter().filter(|o| known.insert(o.spec.name)).cloned().collect();
    // Each one goes to the front, so the last one of the parent ends up first.
    child.items.splice(0..0, fresh.into_iter().rev());
}

/// Everything that resources and volumes inherit.
pub fn expand(config: &mut Config) {
    let Config { common, resources, .. } = config;
    for resource in resources {
        if let Some(common) = common {
            inherit_common(resource, common);
        }
        inherit_volumes(resource);
        inherit_proxies(resource);
        name_devices(resource);
    }
}

fn inherit_common(resource: &mut Resource, common: &Resource) {
    add_missing(&mut resource.net, &common.net);
    add_missing(&mut resource.disk, &common.disk);
    add_missing(&mut resource.startup, &common.startup);
    add_missing(&mut resource.proxy, &common.proxy);
    add_missing(&mut resource.handlers, &common.handlers);
    add_missing(&mut resource.options, &common.options);
    resource.stacked_timeouts = resource.stacked_timeouts.or(common.stacked_timeouts);
    if resource.become_primary_on.is_empty() {
        resource.become_primary_on.clone_from(&common.become_primary_on);
        resource.become_primary_on_span = common.become_primary_on_span;
    }
    if resource.plugins.is_empty() {
        // Each one goes to the front, as with options.
        resource.plugins = common.plugins.iter().rev().cloned().collect();
    }
}

/// Proxy sections of hosts inherit from the resource; its plugins are put in front.
fn inherit_proxies(resource: &mut Resource) {
    let Resource { hosts, proxy, plugins, .. } = resource;
    for section in hosts.iter_mut().filter_map(|h| h.proxy.as_mut()) {
        add_missing(&mut section.options, proxy);
        section.plugins.splice(0..0, plugins.iter().rev().cloned());
    }
}

/// Volumes without a device name are called after their minor. Spec §4.4.
fn name_devices(resource: &mut Resource) {
    for volume in resource.hosts.iter_mut().flat_map(|h| h.volumes.iter_mut()) {
        if volume.device.is_none() && volume.minor.is_some() {
            volume.device = Some(volume.device_name());
        }
    }
}

/// Host volume before resource before common before resource level volume.
fn inherit_volumes(resource: &mut Resource) {
    let Resource { hosts, volumes, disk, .. } = resource;
    for volume in hosts.iter_mut().flat_map(|h| h.volumes.iter_mut()) {
        add_missing(&mut volume.disk_options, disk);
    }
    for from in volumes.iter().filter(|v| !v.disk_options.items.is_empty()) {
        for volume in hosts.iter_mut().flat_map(|h| h.volumes.iter_mut()) {
            if volume.vnr == from.vnr {
                add_missing(&mut volume.disk_options, &from.disk_options);
            }
        }
    }
}

/// What a `resync-after` value stands for.
enum After {
    Minor(u32),
    Unknown,
    Ambiguous(usize),
    BadNumber(options::ValueError),
}

/// Minors by resource name, for all resources of this host.
pub struct Minors {
    by_name: HashMap<BString, Vec<(u32, Option<u32>)>>,
}

impl Minors {
    /// Collects them once per run.
    pub fn of(config: &Config) -> Self {
        let volumes = |r: &Resource| {
            r.me().map(|me| me.volumes.iter().map(|v| (v.vnr, v.minor)).collect::<Vec<_>>())
        };
        let by_name =
            config.resources.iter().filter_map(|r| Some((r.name.clone(), volumes(r)?))).collect();
        Self { by_name }
    }

    fn find(&self, value: &[u8]) -> After {
        let (name, vnr) = match value.split_once_str("/") {
            Some((name, vnr)) => (name, Some(vnr)),
            None => (value, None),
        };
        if let Some(Err(e)) = vnr.map(|vnr| options::parse_number(vnr, options::Unit::One)) {
            return After::BadNumber(e);
        }
        let Some(volumes) = self.by_name.get(name.as_bstr()) else { return After::Unknown };
        let found = match vnr {
            None if volumes.len() > 1 => return After::Ambiguous(volumes.len()),
            None => volumes.first(),
            Some(vnr) => {
                let vnr = match options::parse_number(vnr, options::Unit::One) {
                    Ok(vnr) => vnr,
                    Err(e) => return After::BadNumber(e),
                };
                volumes.iter().find(|v| u64::from(v.0) == vnr)
            }
        };
        match found {
            Some((_, Some(minor))) => After::Minor(*minor),
            _ => After::Unknown,
        }
    }
}

/// Translates `resync-after` and `discard-node-…` of one resource. Spec §4.7, §6.5.
///
/// Complaints are added; on a terminal an unknown `resync-after` is an error, else it is dropped.
pub fn translate(loaded: &mut Loaded, at: usize, minors: &Minors, node: &BString, terminal: bool) {
    let Loaded { config, sources, diagnostics, exit, .. } = loaded;
    let Some(resource) = config.resources.get_mut(at) else { return };
    let mut fatal = None;
    let head = place(sources, resource);
    let mut complaints: Vec<(String, bool)> = Vec::new();
    for volume in resource.hosts.iter_mut().flat_map(|h| h.volumes.iter_mut()) {
        volume.disk_options.items.retain_mut(|option| {
            if option.spec.name != "resync-after" {
                return true;
            }
            let value = option.value.clone().unwrap_or_default();
            match minors.find(&value) {
                After::Minor(minor) => option.value = Some(minor.to_string().into()),
                After::Ambiguous(n) => complaints.push((
                    format!(
                        "{head}:\n\tresync-after contains '{value}', which is ambiguous, since it \
                         contains {n} volumes"
                    ),
                    true,
                )),
                After::BadNumber(e) => {
                    // As everywhere a malformed number ends the program at once.
                    fatal.get_or_insert(e);
                }
                After::Unknown => {
                    complaints.push((unknown_resync_after(&head, &value, ""), terminal));
                    return terminal;
                }
            }
            true
        });
    }
    complaints.extend(translate_discard_node(resource, node, &head).map(|text| (text, true)));
    if let Some(e) = fatal {
        *exit = Some(if e == options::ValueError::Empty { 100 } else { 20 });
        diagnostics.error(e.to_string(), Some(resource.span));
        return;
    }
    for (text, is_error) in complaints {
        if is_error {
            diagnostics.error(text, Some(resource.span));
        } else {
            diagnostics.remark(text, Some(resource.span));
        }
    }
}

/// The complaint about a `resync-after` that names nothing.
pub(crate) fn unknown_resync_after(head: &str, value: &BString, tail: &str) -> String {
    format!("{head}:\n\tresource '{value}' mentioned in 'resync-after' option is not known{tail}.")
}

/// `discard-node-NAME` becomes discard-local or discard-remote; an unknown name is a mistake that
/// the original does not notice.
fn translate_discard_node(resource: &mut Resource, node: &BString, head: &str) -> Option<String> {
    let Resource { hosts, net, .. } = resource;
    let mut complaint = None;
    for option in &mut net.items {
        let Some(value) = option.value.clone() else { continue };
        let Some(name) = value.strip_prefix(b"discard-node-") else { continue };
        if !option.spec.name.starts_with("after-sb-") {
            continue;
        }
        let known = hosts.iter().flat_map(|h| &h.names).any(|n| n == name);
        if !known {
            let names: Vec<String> =
                hosts.iter().flat_map(|h| &h.names).map(ToString::to_string).collect();
            complaint = Some(format!(
                "{head}:\n\tthe nodename in the '{value}' option is not known.\n\
                 \tvalid nodenames are: '{}'.",
                names.join(" ")
            ));
            continue;
        }
        let to = if name == node.as_slice() { "discard-local" } else { "discard-remote" };
        option.value = Some(to.into());
    }
    complaint
}
