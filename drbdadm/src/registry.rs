//! Which configuration file belongs to what runs: links in a directory of their own.
//!
//! Spec: config-and-drbdadm.md §1.4. Problems are reported and change no exit code.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};

use bstr::{BStr, BString, ByteSlice};

use crate::print;

/// Where the links are.
pub const DIRECTORY: &str = "/var/run/drbd";

/// What a link is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Link {
    /// A minor.
    Minor(u32),
    /// A resource.
    Resource(BString),
}

impl Link {
    fn path(&self) -> PathBuf {
        let name = match self {
            Self::Minor(minor) => BString::from(format!("drbd-minor-{minor}.conf")),
            Self::Resource(name) => {
                BString::from(bstr::concat([b"drbd-resource-".as_slice(), name, b".conf"]))
            }
        };
        Path::new(DIRECTORY).join(OsStr::from_bytes(&name))
    }
}

/// Makes the link point to the configuration file.
pub fn register(link: &Link, file: &BStr) {
    let directory = format!("{DIRECTORY}/");
    if file.starts_with(directory.as_bytes()) || file == "STDIN" {
        return;
    }
    if let Link::Resource(name) = link
        && name.contains(&b'/')
    {
        return;
    }
    let target = Path::new(OsStr::from_bytes(file));
    let path = link.path();
    if fs::read_link(&path).is_ok_and(|old| old == target) {
        return;
    }
    if !Path::new(DIRECTORY).exists()
        && let Err(e) = fs::DirBuilder::new().mode(0o700).recursive(true).create(DIRECTORY)
    {
        print::complain(format!("mkdir({DIRECTORY}): {e}"));
        return;
    }
    let _ = fs::remove_file(&path);
    if let Err(e) = symlink(target, &path) {
        print::complain(format!("symlink({}): {e}", path.display()));
    }
}

/// The file that is registered for the argument of a handler command.
pub fn lookup(argument: &BStr) -> Option<PathBuf> {
    let minor = argument.strip_prefix(b"minor-").and_then(|n| n.to_str().ok()?.parse().ok());
    let link = match minor {
        Some(minor) => Link::Minor(minor),
        None => Link::Resource(argument.into()),
    };
    let path = link.path();
    if let Ok(target) = fs::read_link(&path) {
        return Some(target);
    }
    let what = match link {
        Link::Minor(minor) => format!("minor {minor}"),
        Link::Resource(name) => format!("resource {name}"),
    };
    print::complain(format!(
        "Don't know which config file belongs to {what}, trying default ones..."
    ));
    None
}

/// Removes the link: what it stood for is gone.
pub fn unregister(link: &Link) {
    if let Link::Resource(name) = link
        && name.contains(&b'/')
    {
        return;
    }
    let _ = fs::remove_file(link.path());
}
