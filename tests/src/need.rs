//! What tests need from the machine; missing things are skips that are named, never passes.

use std::path::Path;
use std::process::{Command, Stdio};

use libtest_mimic::Trial;

use crate::guest;

/// The original drbdadm for 8.4.
pub const ORIGINAL_DRBDADM: &str = "/lib/drbd/drbdadm-84";

/// Something that a test needs.
#[derive(Clone, Copy, Debug)]
pub enum Need {
    /// A file.
    File(&'static str),
    /// A program that the shell finds.
    Program(&'static str),
    /// Private host name, network and mounts.
    Namespaces,
    /// Root that may mount, and make network namespaces.
    Root,
    /// QEMU, and an image for kernel guests or the tools that can build it.
    Guest,
}

impl Need {
    /// Is it there?
    pub fn is_met(self) -> bool {
        match self {
            Self::File(path) => Path::new(path).exists(),
            Self::Program(name) => has_program(name),
            Self::Namespaces => namespaces_work(),
            Self::Root => rustix::process::geteuid().is_root() && namespaces_work(),
            Self::Guest => {
                let can_build = has_program("apt-get") && has_program("dpkg-deb");
                has_program(guest::QEMU) && (can_build || guest::image::existing().is_some())
            }
        }
    }
}

/// Options of unshare(1): a user namespace too when not root.
pub fn unshare_options() -> &'static [&'static str] {
    if rustix::process::geteuid().is_root() {
        &["-u", "-n", "-m"]
    } else {
        &["-r", "-u", "-n", "-m"]
    }
}

fn has_program(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(name).is_file())
}

fn namespaces_work() -> bool {
    let script = "hostname drbdrs-probe && ip link set lo up && mount -t tmpfs none /run";
    Command::new("unshare")
        .args(unshare_options())
        .args(["sh", "-c", script])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|s| s.success())
}

/// A test that is reported as ignored when something is missing; with DRBDRS_NO_SKIP=1 it runs
/// all the same, and fails.
pub fn trial(
    name: &str,
    needs: &[Need],
    body: impl FnOnce() -> Result<(), libtest_mimic::Failed> + Send + 'static,
) -> Trial {
    let missing = needs.iter().any(|n| !n.is_met());
    let no_skip = std::env::var("DRBDRS_NO_SKIP").is_ok_and(|v| v == "1");
    Trial::test(name, body).with_ignored_flag(missing && !no_skip)
}

/// A test of a suite: its name, what it needs, and what it does.
pub type Case<'a> = (&'a str, &'a [Need], fn() -> anyhow::Result<()>);

/// The `main` of a suite.
pub fn suite(cases: &[Case<'_>]) -> ! {
    let args = libtest_mimic::Arguments::from_args();
    let trials = cases.iter().map(|&(name, needs, body)| {
        trial(name, needs, move || {
            body().map_err(|error| libtest_mimic::Failed::from(format!("{error:#}")))
        })
    });
    libtest_mimic::run(&args, trials.collect()).exit()
}
