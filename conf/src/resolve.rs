//! Whose section is whose: the local host section of each resource, stacked resources, the peer.
//!
//! Spec: config-and-drbdadm.md §4.1 to §4.3, §6.5. Complaints are remembered by the caller.

use std::collections::HashMap;

use bstr::{BStr, BString, ByteSlice};

use crate::diag::Diagnostics;
use crate::model::{
    Address, Family, HostKind, HostSection, MetaDisk, MetaIndex, Resource, Span, Volume,
};
use crate::parse::{Loaded, section_names, volume_set_differences};
use crate::source::Sources;

/// What resolution has to know about this host.
pub struct Here<'a> {
    /// Node name, compared byte by byte.
    pub node: &'a BStr,
    /// Does this IPv4 or IPv6 address exist here?
    pub has_address: &'a dyn Fn(&Address) -> bool,
    /// Match proxy sections instead (the proxy commands).
    pub by_proxy: bool,
    /// Both stdin and stdout are terminals: some remarks are made only then.
    pub terminal: bool,
}

/// Resolves everything; complaints are added to `loaded.diagnostics`.
pub fn resolve(loaded: &mut Loaded, here: &Here<'_>) {
    let by_name: HashMap<BString, usize> =
        loaded.config.resources.iter().enumerate().map(|(i, r)| (r.name.clone(), i)).collect();
    name_stacked_sections(loaded, &by_name);
    for stacked in [false, true] {
        for at in 0..loaded.config.resources.len() {
            if has_stacked_section(loaded.config.resources.get(at)) == stacked {
                find_me(loaded, at, here, &by_name);
            }
        }
    }
    give_stacked_disks(loaded, &by_name, here.terminal);
}

fn has_stacked_section(resource: Option<&Resource>) -> bool {
    let is_stacked = |h: &HostSection| matches!(h.kind, HostKind::StackedOn(_));
    resource.is_some_and(|r| r.hosts.iter().any(is_stacked))
}

/// `file:line: in resource NAME` of a resource, as messages after parsing show it.
pub fn place(sources: &Sources, resource: &Resource) -> String {
    let file = sources.absolute(resource.span.file);
    format!("{file}:{}: in resource {}", resource.span.line, resource.name)
}

/// The stacked sections get the host names of the resource below. Spec §4.3.
fn name_stacked_sections(loaded: &mut Loaded, by_name: &HashMap<BString, usize>) {
    let Loaded { config, sources, diagnostics, uniques, end, exit, .. } = loaded;
    for at in 0..config.resources.len() {
        let Some(resource) = config.resources.get(at) else { continue };
        let mut named = Vec::new();
        for (i, host) in resource.hosts.iter().enumerate() {
            let HostKind::StackedOn(lower) = &host.kind else { continue };
            let Some(lower) = by_name.get(lower).and_then(|i| config.resources.get(*i)) else {
                let at = place(sources, resource);
                let text = format!("{at}, referenced resource '{lower}' not defined.");
                diagnostics.error(text, Some(resource.span));
                continue;
            };
            let is_plain = |h: &&HostSection| !matches!(h.kind, HostKind::StackedOn(_));
            let mut names: Vec<BString> =
                lower.hosts.iter().filter(is_plain).flat_map(|h| h.names.clone()).collect();
            if names.is_empty() {
                names.push("UNKNOWN".into());
            }
            for (volume, name) in
                host.volumes.iter().flat_map(|v| names.iter().map(move |n| (v, n)))
            {
                let Some(minor) = volume.minor else { continue };
                let key = format!("device-minor:{name}:{minor}");
                let claimed = uniques.claim(
                    "device-minor",
                    key.as_bytes().as_bstr(),
                    *end,
                    sources,
                    diagnostics,
                );
                if claimed.is_err() {
                    // As while parsing, a conflict ends the program at once.
                    *exit = Some(10);
                    return;
                }
            }
            named.push((i, names));
        }
        let Some(resource) = config.resources.get_mut(at) else { continue };
        for (i, names) in named {
            if let Some(host) = resource.hosts.get_mut(i) {
                host.names = names;
            }
        }
    }
}

fn compare_with_lower(
    resource: &BString,
    upper: &HostSection,
    lower: &HostSection,
    end: Span,
    sources: &Sources,
    diagnostics: &mut Diagnostics,
    terminal: bool,
) {
    for text in volume_set_differences(resource, upper, lower) {
        let text = format!("{}:{}: {text}", sources.name(end.file), end.line);
        // The lower resource may have more volumes.
        if text.contains("missing (present on") {
            if terminal {
                diagnostics.remark(text, None);
            }
        } else {
            diagnostics.error(text, None);
        }
    }
}

fn find_me(loaded: &mut Loaded, at: usize, here: &Here<'_>, by_name: &HashMap<BString, usize>) {
    let Some(resource) = loaded.config.resources.get(at) else { return };
    let resources = &loaded.config.resources;
    let matches = |host: &HostSection| match (&host.kind, here.by_proxy) {
        (_, true) => host.proxy.as_ref().is_some_and(|p| p.on.iter().any(|n| n == here.node)),
        (HostKind::On, _) => host.names.iter().any(|n| n == here.node || n == "_this_host"),
        (HostKind::Floating, _) => host.address.as_ref().is_some_and(|a| is_here(a, here)),
        (HostKind::StackedOn(lower), _) => {
            by_name.get(lower).and_then(|i| resources.get(*i)).is_some_and(|r| r.me.is_some())
        }
    };
    let mut me: Option<usize> = None;
    for (i, host) in resource.hosts.iter().enumerate() {
        if !matches(host) {
            continue;
        }
        let Some(first) = me.and_then(|i| resource.hosts.get(i)) else {
            me = Some(i);
            continue;
        };
        let file = loaded.sources.absolute(host.span.file);
        let text = format!(
            "{file}:{}: in resource {}, {} {{ ... }} ... {} {{ ... }}:\n\t\
             There are multiple host sections for this node.",
            host.span.line,
            resource.name,
            section_title(first),
            section_title(host)
        );
        loaded.diagnostics.error(text, Some(host.span));
    }
    if let Some(resource) = loaded.config.resources.get_mut(at) {
        resource.me = me;
    }
}

fn section_title(host: &HostSection) -> String {
    match &host.kind {
        HostKind::StackedOn(lower) => format!("stacked-on-top-of {lower}"),
        HostKind::On | HostKind::Floating => format!("on {}", section_names(host)),
    }
}

fn is_here(address: &Address, here: &Here<'_>) -> bool {
    match address.family {
        Family::Ssocks | Family::Sdp => true,
        Family::Ipv4 | Family::Ipv6 => address.addr == here.node || (here.has_address)(address),
    }
}

/// The disks of stacked volumes are the devices of the resource below, whose volumes must be the
/// same; both can be known only where that one is for this host. Spec §4.3, §6.4.
fn give_stacked_disks(loaded: &mut Loaded, by_name: &HashMap<BString, usize>, terminal: bool) {
    let Loaded { config, sources, diagnostics, end, .. } = loaded;
    for at in 0..config.resources.len() {
        let Some(resource) = config.resources.get(at) else { continue };
        let mut disks = Vec::new();
        for (i, host) in resource.hosts.iter().enumerate() {
            let HostKind::StackedOn(lower) = &host.kind else { continue };
            let Some(lower) = by_name.get(lower).and_then(|i| config.resources.get(*i)) else {
                continue;
            };
            if let Some(me) = lower.me() {
                let below = HostSection { names: vec![lower.name.clone()], ..me.clone() };
                compare_with_lower(
                    &resource.name,
                    host,
                    &below,
                    *end,
                    sources,
                    diagnostics,
                    terminal,
                );
            }
            // The lower resource may not be for this host: then the disk has no name here.
            let below = lower.me().map_or(&[][..], |me| &me.volumes);
            for (n, volume) in host.volumes.iter().enumerate() {
                let found = below.binary_search_by_key(&volume.vnr, |v| v.vnr).ok();
                let found = found.and_then(|at| below.get(at));
                disks.push((i, n, found.map(Volume::device_name).unwrap_or_default()));
            }
        }
        let Some(resource) = config.resources.get_mut(at) else { continue };
        for (i, n, disk) in disks {
            let volume = resource.hosts.get_mut(i).and_then(|h| h.volumes.get_mut(n));
            let Some(volume) = volume else { continue };
            volume.disk = Some(disk);
            let span = volume.span;
            volume.meta_disk =
                Some(MetaDisk { device: "internal".into(), index: MetaIndex::Internal, span });
        }
    }
}

/// Why a resource's peer is not known. The texts are complete, without the place in front.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoPeer {
    /// Only one host section; a dry run shows `N/A`.
    Missing,
    /// Several, and `--peer` was not given.
    Ambiguous,
    /// `--peer` names nobody.
    NoMatch(BString),
    /// `--peer` names several.
    ManyMatches(BString),
    /// `--peer` names this host.
    Myself(BString),
}

impl NoPeer {
    /// The original's complaint, with place. Spec §6.5.
    pub fn text(&self, sources: &Sources, resource: &Resource) -> String {
        let at = place(sources, resource);
        match self {
            Self::Missing => format!("{at}:\n\tMissing section 'on <PEER> {{ ... }}'."),
            Self::Ambiguous => format!(
                "{at}:\n\tThere are multiple host sections for the peer node.\n\
                 \tUse the --peer option to select which peer section to use."
            ),
            Self::NoMatch(name) => {
                format!("{at}:\n\tNo host ('on' or 'floating') section matches --peer '{name}'")
            }
            Self::ManyMatches(name) => {
                format!("{at}:\n\tInvoked with --peer '{name}', but that matches multiple times!")
            }
            Self::Myself(name) => {
                format!("{at}\n\tInvoked with --peer '{name}', but that matches myself!")
            }
        }
    }
}

/// The peer's host section. Spec §4.2.
///
/// # Errors
/// It is not known which section is the peer's.
pub fn peer<'r>(resource: &'r Resource, chosen: Option<&BStr>) -> Result<&'r HostSection, NoPeer> {
    let others: Vec<&HostSection> = resource
        .hosts
        .iter()
        .enumerate()
        .filter(|(i, _)| Some(*i) != resource.me)
        .map(|(_, h)| h)
        .collect();
    match (others.as_slice(), chosen) {
        ([], _) => Err(NoPeer::Missing),
        ([one], _) => Ok(one),
        (_, None) => Err(NoPeer::Ambiguous),
        (_, Some(name)) => {
            let named: Vec<_> = others.iter().filter(|h| is_named(h, name)).collect();
            match (named.as_slice(), resource.me()) {
                ([one], _) => Ok(one),
                ([], Some(me)) if is_named(me, name) => Err(NoPeer::Myself(name.into())),
                ([], _) => Err(NoPeer::NoMatch(name.into())),
                (_, _) => Err(NoPeer::ManyMatches(name.into())),
            }
        }
    }
}

/// `--peer` matches host names, and for floating sections also the bare address.
fn is_named(host: &HostSection, name: &BStr) -> bool {
    let by_address =
        host.kind == HostKind::Floating && host.address.as_ref().is_some_and(|a| a.addr == name);
    by_address || host.names.iter().any(|n| n == name)
}
