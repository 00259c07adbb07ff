//! `cargo xtask test`: the whole test suite, and what it needs.

use std::path::Path;

use crate::run::{self, Failure};

/// A tool that tests compare with or run under, and the Debian package that brings it.
struct Tool {
    /// A file that shows that the tool is there: a program name, or an absolute path.
    probe: &'static str,
    /// Debian package.
    package: &'static str,
}

const TOOLS: &[Tool] = &[
    Tool { probe: "/lib/drbd/drbdadm-84", package: "drbd-utils" },
    Tool { probe: "/usr/lib/ocf/lib/heartbeat/ocf-shellfuncs", package: "resource-agents" },
    Tool { probe: "/usr/libexec/heartbeat/heartbeat", package: "heartbeat" },
    Tool { probe: "/usr/sbin/tgtd", package: "tgt" },
    Tool { probe: "/usr/sbin/ifconfig", package: "net-tools" },
    Tool { probe: "/usr/lib/x86_64-linux-gnu/qemu/block-iscsi.so", package: "qemu-block-extra" },
    Tool { probe: "unshare", package: "util-linux" },
    Tool { probe: "losetup", package: "mount" },
    Tool { probe: "ip", package: "iproute2" },
    Tool { probe: "mkfs.ext4", package: "e2fsprogs" },
    Tool { probe: "bash", package: "bash" },
    Tool { probe: "strip", package: "binutils" },
    Tool { probe: "man", package: "man-db" },
    Tool { probe: "tmux", package: "tmux" },
    Tool { probe: QEMU, package: "qemu-system-x86" },
    Tool { probe: "qemu-img", package: "qemu-utils" },
    Tool { probe: "fio", package: "fio" },
    Tool { probe: "nbdfuse", package: "libnbd-bin" },
    Tool { probe: "/usr/lib/python3/dist-packages/nbd.py", package: "python3-libnbd" },
];

const QEMU: &str = "qemu-system-x86_64";

/// Runs all tests with nextest where it is installed, else with cargo's own runner.
pub(crate) fn test(install: bool, no_skip: bool, rest: &[String]) -> Result<(), Failure> {
    let missing = missing();
    if !missing.is_empty() && install {
        install_packages(&missing)?;
    }
    // Suites call the built programs, whose packages they cannot depend on.
    run::cargo(&["build", "--workspace", "--bins"])?;
    if run::has(QEMU)
        && let Err(Failure(text)) = crate::guest(true, None)
    {
        println!("xtask: {text}: suites with kernel guests will fail");
    }
    let rest: Vec<&str> = rest.iter().map(String::as_str).collect();
    let skip = if no_skip { "1" } else { "0" };
    if run::has("cargo-nextest") {
        let mut words = vec!["nextest", "run", "--workspace", "--no-fail-fast"];
        words.extend(&rest);
        run::command("cargo", &words).env("DRBDRS_NO_SKIP", skip).run()?;
        // nextest does not run documentation examples.
        if rest.is_empty() {
            run::cargo(&["test", "--workspace", "--doc", "--quiet"])?;
        }
        report_skips()
    } else {
        let mut words = vec!["test", "--workspace", "--no-fail-fast"];
        words.extend(&rest);
        run::command("cargo", &words).env("DRBDRS_NO_SKIP", skip).run()
    }
}

fn missing() -> Vec<&'static str> {
    TOOLS
        .iter()
        .filter(|t| {
            if t.probe.starts_with('/') { !Path::new(t.probe).exists() } else { !run::has(t.probe) }
        })
        .map(|t| t.package)
        .collect()
}

fn install_packages(packages: &[&str]) -> Result<(), Failure> {
    println!("installing Debian packages: {}", packages.join(" "));
    run::command("apt-get", &["update", "-qq"]).run()?;
    let mut packages: Vec<String> = packages.iter().map(|p| (*p).to_owned()).collect();
    same_version_of_qemu(&mut packages)?;
    let mut words = vec!["install", "-y", "-qq", "--no-install-recommends", "--allow-downgrades"];
    words.extend(packages.iter().map(String::as_str));
    run::command("apt-get", &words).env("DEBIAN_FRONTEND", "noninteractive").run()
}

/// The parts of QEMU exclude other versions of each other; where one is installed from another
/// release, the missing one could not be installed, or would drive it out.
fn same_version_of_qemu(packages: &mut Vec<String>) -> Result<(), Failure> {
    let parts = ["qemu-system-x86", "qemu-utils", "qemu-block-extra"];
    let others = packages.len();
    packages.retain(|p| !parts.contains(&p.as_str()));
    if packages.len() == others {
        return Ok(());
    }
    let words = ["show", "--no-all-versions", parts[0]];
    let text = run::command("apt-cache", &words).output()?;
    let version = text.lines().find_map(|l| l.strip_prefix("Version: "));
    let version = version.ok_or_else(|| Failure(format!("apt does not know {}", parts[0])))?;
    packages.extend(parts.map(|p| format!("{p}={version}")));
    Ok(())
}

/// Lists by name what the suites marked as skipped, and why that may be.
fn report_skips() -> Result<(), Failure> {
    let words =
        ["nextest", "list", "--workspace", "--run-ignored", "only", "--message-format", "oneline"];
    let skipped = run::command("cargo", &words).output()?;
    let skipped: Vec<&str> = skipped.lines().filter(|l| !l.trim().is_empty()).collect();
    if skipped.is_empty() {
        println!("no test was skipped");
        return Ok(());
    }
    println!("skipped for want of a tool or a privilege ({}):", skipped.len());
    for line in skipped {
        println!("  {line}");
    }
    let missing = missing();
    if !missing.is_empty() {
        println!("missing Debian packages: {} (--install installs them)", missing.join(" "));
    }
    Ok(())
}
