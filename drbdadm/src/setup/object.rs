//! Words that name things: minors, devices, addresses. Spec: status-and-integration.md §2.1.

use std::path::Path;

use bstr::{BString, ByteSlice};
use drbd_admin::{Address, Family, Snapshot};

use super::Failed;

/// Largest minor number.
const MINOR_MAX: u32 = (1 << 20) - 1;
/// Port of an address that names none.
const DEFAULT_PORT: u16 = 7788;

/// A word of digits, or `/dev/drbd` and digits.
pub(super) fn minor(word: &BString) -> Option<u32> {
    let digits = word.strip_prefix(b"/dev/drbd").unwrap_or(word);
    let plain = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    let number = digits.to_str().ok().filter(|_| plain)?.parse().ok()?;
    (number <= MINOR_MAX).then_some(number)
}

/// The volume that a path leads to: through `/dev/drbdN`, or through a front end's device node.
pub(super) fn minor_of_path(path: &Path, snapshot: &Snapshot) -> Option<u32> {
    let link = std::fs::read_link(path).ok();
    let named = link.as_ref().and_then(|l| path.parent().map(|p| p.join(l)));
    let real = std::fs::canonicalize(path).ok();
    for candidate in [named.as_deref(), real.as_deref(), Some(path)].into_iter().flatten() {
        let name = candidate.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let digits = name.strip_prefix("drbd").unwrap_or_default();
        if let Some(found) = minor(&BString::from(digits)).filter(|_| candidate.starts_with("/dev"))
        {
            return Some(found);
        }
        let is_it = |d: &String| Path::new(d) == candidate;
        let all = snapshot.by_minor();
        if let Some((_, v)) = all.iter().find(|(_, v)| v.devices.iter().any(is_it)) {
            return Some(v.minor);
        }
    }
    None
}

/// The complaint about a word that is no minor.
pub(super) fn no_minor(word: &BString) -> Failed {
    Failed::new(20, format!("Cannot determine minor device number of device '{word}'\n"))
}

/// A name as text.
pub(super) fn text(word: &BString) -> Result<String, Failed> {
    word.to_str().map(ToOwned::to_owned).map_err(|_| {
        Failed::new(20, format!("'{word}' is not UTF-8; names that are not can not be used\n"))
    })
}

/// `[af:]addr[:port]`.
pub(super) fn address(word: &BString) -> Result<Address, Failed> {
    let text = text(word)?;
    let families = [Family::Ipv4, Family::Ipv6, Family::Sdp, Family::Ssocks];
    let of = |f: &Family| text.strip_prefix(f.name()).and_then(|r| r.strip_prefix(':'));
    let named = families.iter().find_map(|f| of(f).map(|rest| (*f, rest)));
    let (family, rest) = named.unwrap_or((Family::Ipv4, &text));
    let bad = || {
        let rest = rest.rsplit_once(':').map_or(rest, |(host, _)| host);
        let reason = format!("gethostbyname({rest}): Unknown host");
        Failed::new(20, format!("can not resolve the hostname: {reason}\n"))
    };
    if family == Family::Ipv6 {
        let Some((host, port)) = rest.strip_prefix('[').and_then(|r| r.split_once(']')) else {
            return Err(Failed::new(
                20,
                format!("'{word}': an IPv6 address is written ipv6:[ADDRESS]:PORT\n"),
            ));
        };
        let plain = host.split('%').next().unwrap_or_default();
        if plain.parse::<std::net::Ipv6Addr>().is_err() {
            return Err(Failed::new(20, format!("'{host}' is not an IPv6 address\n")));
        }
        let port = port.strip_prefix(':').map_or(Ok(DEFAULT_PORT), |p| number(word, p))?;
        return Ok(Address { family, addr: host.to_owned(), port });
    }
    let (host, port) = match rest.split_once(':') {
        Some((host, port)) => (host, number(word, port)?),
        None => (rest, DEFAULT_PORT),
    };
    let addr = host.parse::<std::net::Ipv4Addr>().map_err(|_| bad())?;
    Ok(Address { family, addr: addr.to_string(), port })
}

fn number(word: &BString, text: &str) -> Result<u16, Failed> {
    let port = text.parse().ok().filter(|p| *p != 0);
    port.ok_or_else(|| Failed::new(20, format!("'{word}': the port is not one of 1..65535\n")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn minors() {
        let rows = [
            ("0", Some(0)),
            ("/dev/drbd17", Some(17)),
            ("1048575", Some(1_048_575)),
            ("1048576", None),
            ("99999999999999999999", None),
            ("r0", None),
            ("", None),
            ("-1", None),
            ("+1", None),
            ("/dev/drbd", None),
            ("/dev/drbd/by-res/r0", None),
        ];
        for (word, expected) in rows {
            assert_eq!(minor(&word.into()), expected, "{word}");
        }
    }

    #[test]
    fn addresses() {
        let show = |word: &str| address(&word.into()).map(|a| a.to_string()).map_err(|f| f.stderr);
        assert_eq!(show("10.1.1.1"), Ok("ipv4 10.1.1.1:7788".into()));
        assert_eq!(show("ipv4:10.1.1.1:7789"), Ok("ipv4 10.1.1.1:7789".into()));
        assert_eq!(show("ssocks:10.1.1.1:1"), Ok("ssocks 10.1.1.1:1".into()));
        assert_eq!(show("ipv6:[fe80::1%eth0]:7789"), Ok("ipv6 [fe80::1%eth0]:7789".into()));
        assert_eq!(show("ipv6:[::1]"), Ok("ipv6 [::1]:7788".into()));
        assert_eq!(
            show("999.1.2.3:7789"),
            Err("can not resolve the hostname: gethostbyname(999.1.2.3): Unknown host\n".into())
        );
        for bad in ["10.1.1.1:0", "10.1.1.1:65536", "10.1.1.1:x", "ipv6:::1", "ipv6:[x]:1", ""] {
            assert!(show(bad).is_err(), "{bad}");
        }
    }
}
