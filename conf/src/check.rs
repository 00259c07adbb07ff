//! Checks of one resource after parsing. Spec: config-and-drbdadm.md §6.5.

use std::collections::HashMap;

use bstr::{BStr, BString, ByteSlice};

use crate::expand::unknown_resync_after;
use crate::model::{Config, Opt, Resource};
use crate::parse::Loaded;
use crate::resolve::{peer, place};

/// Which resources there are, and which of them are ignored here.
pub struct Names(HashMap<BString, bool>);

impl Names {
    /// Collects them once per run.
    pub fn of(config: &Config) -> Self {
        Self(config.resources.iter().map(|r| (r.name.clone(), r.is_ignored())).collect())
    }
}

/// Checks the resource with this index; complaints are added to `loaded.diagnostics`.
///
/// `terminal`: an unknown `resync-after` is an error only there.
pub fn check_resource(
    loaded: &mut Loaded,
    at: usize,
    names: &Names,
    chosen: Option<&BStr>,
    terminal: bool,
) {
    let Some(resource) = loaded.config.resources.get(at) else { return };
    let head = place(&loaded.sources, resource);
    let span = Some(resource.span);
    let unknown = resync_after(names, resource, &head);
    for (value, text) in unknown {
        if terminal {
            loaded.diagnostics.error(text, span);
        } else {
            loaded.diagnostics.remark(text, span);
            drop_resync_after(loaded, at, &value);
        }
    }
    let Some(resource) = loaded.config.resources.get(at) else { return };
    if resource.is_ignored() {
        return;
    }
    let peer = peer(resource, chosen).ok();
    let mut texts = Vec::new();
    let both = resource.become_primary_on.iter().any(|n| n == "both");
    if both && !allows_two_primaries(resource) {
        texts.push(format!(
            "{head}:\nbecome-primary-on is set to both, but allow-two-primaries is not set."
        ));
    }
    if let (Some(peer), Some(me)) = (peer, resource.me()) {
        if me.proxy.is_some() != peer.proxy.is_some() {
            texts.push(format!(
                "{head}:\n\tEither both 'on' sections must contain a proxy subsection, or none."
            ));
        }
        for name in &resource.become_primary_on {
            let known = [me, peer].iter().any(|h| h.names.contains(name)) || name == "both";
            if !known {
                texts.push(format!(
                    "{head}:\n\tbecome-primary-on contains '{name}', which is not named with the \
                     'on' sections."
                ));
            }
        }
    }
    for text in texts {
        loaded.diagnostics.error(text, span);
    }
}

/// `allow-two-primaries` is there and not `no` (which the original takes for set).
fn allows_two_primaries(resource: &Resource) -> bool {
    let last = resource.net.items.iter().rfind(|o| o.spec.name == "allow-two-primaries");
    last.is_some_and(|o| o.value.as_ref().is_none_or(|v| v != "no"))
}

/// Values of `resync-after` on resource level that name nothing, with the complaints.
fn resync_after(names: &Names, resource: &Resource, head: &str) -> Vec<(BString, String)> {
    let options = resource.disk.items.iter().filter(|o| o.spec.name == "resync-after");
    let mut unknown = Vec::new();
    for value in options.filter_map(|o| o.value.clone()) {
        let name = value.split_once_str("/").map_or(value.as_slice(), |(name, _)| name);
        let tail = match names.0.get(name.as_bstr()) {
            None => "",
            Some(true) => " on this host",
            Some(false) => continue,
        };
        let text = unknown_resync_after(head, &value, tail);
        unknown.push((value, text));
    }
    unknown
}

fn drop_resync_after(loaded: &mut Loaded, at: usize, value: &BString) {
    if let Some(resource) = loaded.config.resources.get_mut(at) {
        let is_it = |o: &Opt| o.spec.name == "resync-after" && o.value.as_ref() == Some(value);
        resource.disk.items.retain(|o| !is_it(o));
    }
}
