//! Suites that cross crates: fixtures, oracles, fault tests.
//!
//! What the suites share: finding built programs, saying what is missing, reading fixtures.

#![forbid(unsafe_code)]

pub mod confcase;
pub mod confgen;
pub mod daemon_pair;
pub mod device_pair;
pub mod exposition;
pub mod guest;
pub mod handshake_case;
pub mod heartbeat;
pub mod interop;
pub mod kernel_life;
pub mod kernel_node;
pub mod kernel_pair;
pub mod load;
pub mod machine;
pub mod metagen;
pub mod need;
pub mod node_kills;
pub mod nodes;
pub mod ocf;
pub mod packet_proxy;
pub mod proc_status;
pub mod proxy;
pub mod replay;
pub mod scripted_peer;
pub mod statuscase;
pub mod thin_node;
pub mod wirecase;

use std::path::{Path, PathBuf};
use std::process::Command;

/// Folder of this crate's data.
pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

/// Builds a program of another package and says where it is.
///
/// # Panics
/// It can not be built.
pub fn program(package: &str) -> PathBuf {
    program_of(package, package)
}

/// The same for a package with several programs.
///
/// # Panics
/// It can not be built.
#[expect(clippy::panic, reason = "test support: without the program there is nothing to test")]
pub fn program_of(package: &str, name: &str) -> PathBuf {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(["build", "--quiet", "--package", package, "--bin", name]);
    let release = !cfg!(debug_assertions);
    if release {
        command.arg("--release");
    }
    let status = command.current_dir(env!("CARGO_MANIFEST_DIR")).status();
    assert!(status.is_ok_and(|s| s.success()), "cannot build {name}");
    // .../target/debug/deps/this-test or .../target/debug/this-bin
    let me = std::env::current_exe().unwrap_or_default();
    let found = me.ancestors().map(|dir| dir.join(name)).find(|p| p.is_file());
    found.unwrap_or_else(|| panic!("{name} is not beside {}", me.display()))
}
