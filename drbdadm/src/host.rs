//! What this host is: its name, its addresses, its device nodes, its terminal.
//!
//! Spec: config-and-drbdadm.md §1.2, §1.5, §4.4, §6.6.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::io::IsTerminal;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use bstr::{BStr, BString, ByteSlice};
use drbd_conf::model::{Address, Family};

use crate::print;

/// Major number of DRBD's block devices.
const DRBD_MAJOR: u32 = 147;

/// The node name, and the remark that belongs to it.
pub fn node_name() -> BString {
    if let Some(name) = std::env::var_os("__DRBD_NODE__").filter(|n| !n.is_empty()) {
        let bytes = name.as_bytes();
        let name = BString::from(bytes.get(..64).unwrap_or(bytes));
        print::stderr(
            format!(
                "\n   found __DRBD_NODE__ in environment\n   PRETENDING that I am >>{name}<<\n\n"
            )
            .as_bytes(),
        );
        return name;
    }
    BString::from(rustix::system::uname().nodename().to_bytes())
}

/// stdin and stdout are terminals.
pub fn on_terminal() -> bool {
    std::io::stdin().is_terminal() && std::io::stdout().is_terminal()
}

/// A person reads what stderr says: excerpts and hints are welcome.
pub fn errors_are_read_by_a_person() -> bool {
    std::io::stderr().is_terminal()
}

/// Minor of the node of this name, if it is a DRBD device.
pub fn node_minor(name: &BStr) -> Option<u32> {
    let data = std::fs::metadata(OsStr::from_bytes(name)).ok()?;
    let device = data.rdev();
    let is_drbd = data.file_type().is_block_device() && rustix::fs::major(device) == DRBD_MAJOR;
    is_drbd.then(|| rustix::fs::minor(device))
}

/// Addresses of interfaces that are up.
#[derive(Clone, Debug, Default)]
pub struct Addresses {
    v4: HashSet<Ipv4Addr>,
    v6: HashSet<Ipv6Addr>,
}

impl Addresses {
    /// Reads them from the system.
    pub fn read() -> Self {
        let mut found = Self::default();
        for interface in if_addrs::get_if_addrs().unwrap_or_default() {
            match interface.ip() {
                std::net::IpAddr::V4(ip) => {
                    found.v4.insert(ip);
                }
                std::net::IpAddr::V6(ip) => {
                    found.v6.insert(ip);
                }
            }
        }
        found
    }

    /// Does the address exist here? Families other than ipv4 and ipv6 always do.
    pub fn has(&self, address: &Address) -> bool {
        let Ok(text) = address.addr.to_str() else { return false };
        match address.family {
            Family::Ipv4 => text.parse().is_ok_and(|ip| self.v4.contains(&ip)),
            Family::Ipv6 => {
                let bare = text.split('%').next().unwrap_or(text);
                bare.parse().is_ok_and(|ip| self.v6.contains(&ip))
            }
            Family::Ssocks | Family::Sdp => true,
        }
    }
}
