//! Differences from the original that are intended, each with a name that says why.
//!
//! conf/DIFFERENCES.md explains them. A difference that no predicate takes is an error.

use super::{Config, Did};
use crate::confcase::loosened;

/// Commands that must know the peer.
const COMMANDS_WITH_PEER: [&str; 6] =
    ["connect", "net-options", "up", "adjust", "proxy-up", "proxy-down"];

/// The reason of a difference, if it is intended.
pub fn reason(
    config: &Config,
    args: &[String],
    original: &Did,
    ours: &Did,
) -> Option<&'static str> {
    let text = config.text();
    let ours_says = |what: &str| ours.stderr.contains(what);
    let original_says = |what: &str| original.stderr.contains(what);
    if original.rc < 0 && ours.rc >= 0 {
        return Some("the original crashed");
    }
    if original_says("internal error: in ") {
        return Some("volume number given twice: refused instead of an internal error");
    }
    if ours_says("out of range [0..65535]") || ours_says("out of range [0..1048575]") {
        return Some("volume or minor number that can not exist: refused");
    }
    if ours_says("must not have a unit") {
        return Some("volume or minor number with a suffix: refused");
    }
    if ours_says("is not an IPv4 address") {
        return Some("address that can not exist: refused");
    }
    if ours_says("allow-two-primaries is not set") && text.contains("allow-two-primaries no") {
        return Some("allow-two-primaries no does not count as set");
    }
    if ours_says("option is not known.\n\tvalid nodenames")
        || ours_says("the nodename in the 'discard")
    {
        return Some("discard-node with an unknown name is noticed");
    }
    let (want, have) = (original.key(), ours.key());
    let names = args.iter().skip_while(|a| !COMMANDS_WITH_PEER.contains(&a.as_str())).skip(1);
    if (want.0, have.0 < 10) == (10, true) && want.2 == have.2 && names.count() > 1 {
        return Some("a named resource without a known peer does not stop the next");
    }
    if ours_says("DRBD 9") {
        return Some("version 9 syntax is refused by name");
    }
    // The others are about what dumps look like, and explain nothing else.
    if want.0 != have.0 || want.2 != have.2 {
        return None;
    }
    if unquoted(&loosened(&ours.stdout)) == unquoted(&loosened(&original.stdout)) {
        return Some("names that need quotes are quoted in dumps");
    }
    if without_devices(&ours.stdout) == without_devices(&original.stdout)
        && ours.stdout.len() < original.stdout.len()
    {
        return Some("a device name inherited by a host with its own minor is dropped");
    }
    let long = |text: &str| without_long_lines(&loosened(text));
    if long(&ours.stdout) == long(&original.stdout) {
        return Some("a list of host names longer than 254 bytes is not cut");
    }
    None
}

/// Lines of more than 254 bytes count as equal.
fn without_long_lines(text: &str) -> String {
    text.lines().map(|l| if l.len() > 254 { "long" } else { l }).collect::<Vec<_>>().join("\n")
}

fn unquoted(text: &str) -> String {
    text.replace('"', "")
}

/// Device lines without their names.
fn without_devices(text: &str) -> String {
    let line = |l: &str| match (l.trim_start().starts_with("device "), l.find("minor ")) {
        (true, Some(at)) => l.get(at..).unwrap_or_default().to_owned(),
        _ => l.to_owned(),
    };
    text.lines().map(line).collect::<Vec<_>>().join("\n")
}
