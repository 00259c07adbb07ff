//! Which configuration file belongs to what runs: links in a directory of their own. A handler finds
//! the configuration there that its resource was brought up with.
//!
//! Spec: config-and-drbdadm.md §1.4. Problems are reported and change no exit code.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};

use bstr::{BStr, BString, ByteSlice};

use crate::print;

/// Names the admin socket of a daemon that is not the machine's own; backends and handlers inherit
/// it.
pub const SOCKET_VARIABLE: &str = "DRBDRS_ADMIN_SOCKET";

/// Where the links of the machine's own daemon are. Those of another one are beside its socket.
const DIRECTORY: &str = "/var/run/drbd";

/// What a link is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Link {
    /// A minor.
    Minor(u32),
    /// A resource.
    Resource(BString),
}

impl Link {
    fn name(&self) -> PathBuf {
        let name = match self {
            Self::Minor(minor) => BString::from(format!("drbd-minor-{minor}.conf")),
            Self::Resource(name) => {
                BString::from(bstr::concat([b"drbd-resource-".as_slice(), name, b".conf"]))
            }
        };
        PathBuf::from(OsStr::from_bytes(&name))
    }
}

/// The directory for this environment.
fn directory() -> PathBuf {
    let socket = std::env::var_os(SOCKET_VARIABLE).map(PathBuf::from);
    let beside = socket.as_deref().and_then(Path::parent);
    // A relative name means the working directory, which is another one for a handler.
    let beside = beside.filter(|directory| directory.is_absolute());
    beside.map_or_else(|| PathBuf::from(DIRECTORY), Path::to_path_buf)
}

/// Makes the link point to the configuration file.
pub fn register(link: &Link, file: &BStr) {
    let directory = directory();
    let target = Path::new(OsStr::from_bytes(file));
    if target.starts_with(DIRECTORY) || target.parent() == Some(&directory) || file == "STDIN" {
        return;
    }
    if let Link::Resource(name) = link
        && name.contains(&b'/')
    {
        return;
    }
    let path = directory.join(link.name());
    if fs::read_link(&path).is_ok_and(|old| old == target) {
        return;
    }
    if !directory.exists()
        && let Err(e) = fs::DirBuilder::new().mode(0o700).recursive(true).create(&directory)
    {
        print::complain(format!("mkdir({}): {e}", directory.display()));
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
    if let Ok(target) = fs::read_link(directory().join(link.name())) {
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

/// Removes the link of a daemon with this socket: what it stood for is gone. `None`: the machine's
/// own.
pub fn unregister(link: &Link, socket: Option<&Path>) {
    if let Link::Resource(name) = link
        && name.contains(&b'/')
    {
        return;
    }
    let directory = socket.and_then(Path::parent).unwrap_or_else(|| Path::new(DIRECTORY));
    let _ = fs::remove_file(directory.join(link.name()));
}
