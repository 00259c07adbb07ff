//! Which resources and volumes a command works on. Spec: config-and-drbdadm.md §7.4, §6.6.

use std::collections::BTreeSet;

use bstr::{BStr, BString, ByteSlice};
use drbd_conf::model::{Address, Config, Family, Resource, Volume};
use drbd_conf::options::{Unit, ValueError, parse_number};
use drbd_conf::parse::check_resource_name;
use drbd_conf::source::Sources;

use crate::command::{Command, Level};
use crate::host::Addresses;
use crate::print;

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Index of the resource.
    pub resource: usize,
    /// A volume that was named or that is meant implicitly: index in the local host section.
    pub volume: Option<usize>,
}

/// The command ends with this code; its text has been printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused(pub i32);

/// The local host's volumes.
pub fn volumes(resource: &Resource) -> &[Volume] {
    resource.me().map_or(&[], |me| &me.volumes)
}

/// All resources of the wanted kind. Spec §7.4, "all".
///
/// # Errors
/// There are none.
pub fn all(
    config: &Config,
    command: &Command,
    stacked: bool,
    node: &BStr,
) -> Result<Vec<Target>, Refused> {
    let target = |i: usize| Target { resource: i, volume: None };
    if command.is_dump() {
        return Ok((0..config.resources.len()).map(target).collect());
    }
    let wanted = |r: &Resource| !r.is_ignored() && r.is_stacked() == stacked;
    let found: Vec<Target> = config
        .resources
        .iter()
        .enumerate()
        .filter(|(_, r)| wanted(r))
        .map(|(i, _)| target(i))
        .collect();
    if !found.is_empty() {
        return Ok(found);
    }
    if stacked {
        print::complain(format!(
            "WARN: nothing stacked for this host ({node}), nothing to do in stacked mode!"
        ));
    } else {
        print::complain(format!("WARN: no normal resources defined for this host ({node})!?"));
        if config.resources.iter().any(Resource::is_ignored) {
            print::complain("Misspelled name of the local machine with the 'on' keyword ?");
            tell_names(config.resources.iter(), node);
        }
    }
    Err(Refused(1))
}

/// One name of the command line. `stacked` follows the resource for `minor-N`.
///
/// # Errors
/// The name means nothing here.
pub fn one(
    config: &Config,
    command: &Command,
    name: &BString,
    stacked: &mut bool,
    node: &BStr,
) -> Result<Target, Refused> {
    if let Err(text) = check_resource_name(name.as_bstr()) {
        print::complain(text);
        return Err(Refused(1));
    }
    let target = find(config, name, stacked)?;
    let Some(target) = target else { return Err(unknown(config, name, node)) };
    volume_rules(config, command, name, target)
}

fn unknown(config: &Config, name: &BString, node: &BStr) -> Refused {
    print::complain(format!("'{name}' not defined in your config (for this host)."));
    let base = name.split_once_str("/").map_or(name.as_slice(), |(n, _)| n);
    tell_names(config.resources.iter().filter(|r| r.name == base && r.is_ignored()), node);
    Refused(1)
}

/// Which host names the file has, and what this host is called. The original leaves it at that.
fn tell_names<'r>(resources: impl Iterator<Item = &'r Resource>, node: &BStr) {
    let names: BTreeSet<String> =
        resources.flat_map(|r| &r.hosts).flat_map(|h| &h.names).map(ToString::to_string).collect();
    if names.is_empty() {
        return;
    }
    let more = names.len().saturating_sub(NAMES_SHOWN);
    let mut list: Vec<String> = names.into_iter().take(NAMES_SHOWN).collect();
    if more > 0 {
        list.push(format!("and {more} more"));
    }
    print::complain(format!("   this host is called '{node}'; the file has: {}", list.join(" ")));
}

/// Most host names in a complaint.
const NAMES_SHOWN: usize = 20;

fn find(config: &Config, name: &BString, stacked: &mut bool) -> Result<Option<Target>, Refused> {
    let here = |r: &Resource, n: &[u8]| r.name == n && !r.is_ignored();
    let (base, vnr) = match name.split_once_str("/") {
        Some((base, vnr)) => (base, Some(number(vnr)?)),
        None => (name.as_slice(), None),
    };
    if let Some(at) = config.resources.iter().position(|r| here(r, base)) {
        let Some(vnr) = vnr else { return Ok(Some(Target { resource: at, volume: None })) };
        let list = config.resources.get(at).map_or(&[][..], volumes);
        let volume = list.iter().position(|v| u64::from(v.vnr) == vnr);
        return Ok(volume.map(|v| Target { resource: at, volume: Some(v) }));
    }
    let Some(minor) = name.strip_prefix(b"minor-") else { return Ok(None) };
    let minor = number(minor)?;
    for (at, resource) in config.resources.iter().enumerate() {
        let found = volumes(resource).iter().position(|v| v.minor.map(u64::from) == Some(minor));
        if let Some(volume) = found {
            *stacked = resource.is_stacked();
            return Ok(Some(Target { resource: at, volume: Some(volume) }));
        }
    }
    Ok(None)
}

fn number(text: &[u8]) -> Result<u64, Refused> {
    parse_number(text, Unit::One).map_err(|e| {
        print::complain(e.to_string());
        Refused(if e == ValueError::Empty { 100 } else { 20 })
    })
}

/// May, or must, a volume be named?
fn volume_rules(
    config: &Config,
    command: &Command,
    name: &BString,
    target: Target,
) -> Result<Target, Refused> {
    let Some(resource) = config.resources.get(target.resource) else { return Ok(target) };
    let list = volumes(resource);
    let implicit = list.iter().position(|v| v.implicit);
    match (command.level, target.volume) {
        (Level::Resource, Some(volume)) if implicit != Some(volume) => {
            let command = command.name;
            print::complain(format!(
                "{command} operates on whole resources, but you specified a specific volume!"
            ));
            Err(Refused(1))
        }
        (Level::Resource, Some(_)) => Ok(Target { volume: None, ..target }),
        (Level::OneVolume, None) => match implicit {
            Some(volume) => Ok(Target { volume: Some(volume), ..target }),
            None => {
                let command = command.name;
                print::complain(format!(
                    "{command} requires a specific volume id, but none is specified.\n\
                     Try '{command} minor-<minor_number>' or '{command} {name}/<vnr>'"
                ));
                Err(Refused(1))
            }
        },
        _ => Ok(target),
    }
}

/// Is the resource of the kind that `-S` selects? Complains if not.
pub fn right_kind(resource: &Resource, stacked: bool) -> bool {
    let name = &resource.name;
    match (resource.is_stacked(), stacked) {
        (true, false) => {
            print::complain(format!(
                "'{name}' is a stacked resource, and not available in normal mode."
            ));
            false
        }
        (false, true) => {
            print::complain(format!(
                "'{name}' is a normal resource, and not available in stacked mode."
            ));
            false
        }
        _ => true,
    }
}

/// Checks that the own address exists here. Spec §6.6.
pub fn verify_address(
    resource: &Resource,
    sources: &Sources,
    addresses: &Addresses,
    stacked: bool,
) -> bool {
    let Some(me) = resource.me() else { return true };
    if resource.is_stacked() && !stacked {
        return true;
    }
    let Some(address) = &me.address else { return true };
    if exists(address, addresses) {
        return true;
    }
    let place = if resource.is_stacked() { me.span } else { address.span };
    let names = BString::from(bstr::join(" ", &me.names));
    print::complain(format!(
        "{}:{}: in resource {}, on {names}:\n\tIP {} not found on this host.",
        sources.name(place.file),
        place.line,
        resource.name,
        address.addr
    ));
    false
}

fn exists(address: &Address, addresses: &Addresses) -> bool {
    matches!(address.family, Family::Ssocks | Family::Sdp) || addresses.has(address)
}
