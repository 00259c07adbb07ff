//! `cargo xtask deb`: the Debian package, with dpkg-deb alone.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::run::{self, Failure};

/// Built programs, for /usr/sbin.
const PROGRAMS: &[&str] = &["drbdrs", "drbdadm", "drbdsetup", "drbdmeta"];

/// Files and folders of the tree, and where they go; programs among them are executable already.
const FILES: &[(&str, &str)] = &[
    ("conf/systemd", "usr/lib/systemd/system"),
    ("conf/man", "usr/share/man/man8"),
    ("conf/agents/ocf/drbd", "usr/lib/ocf/resource.d/drbdrs/drbd"),
    ("conf/agents/heartbeat/drbddisk", "etc/ha.d/resource.d/drbddisk"),
    ("conf/handlers/notify", "usr/lib/drbdrs/notify"),
    ("conf/examples/drbd.conf", "etc/drbd.conf"),
    ("conf/debian/global_common.conf", "etc/drbd.d/global_common.conf"),
    ("conf/debian/scripts", "DEBIAN"),
    ("conf/examples", "usr/share/doc/drbdrs/examples"),
    ("drbdrs/docs", "usr/share/doc/drbdrs"),
    ("README.md", "usr/share/doc/drbdrs/README.md"),
    ("CHANGELOG.md", "usr/share/doc/drbdrs/CHANGELOG.md"),
    ("LICENSE-MIT", "usr/share/doc/drbdrs/copyright"),
];

const CONFFILES: &str =
    "/etc/drbd.conf\n/etc/drbd.d/global_common.conf\n/etc/ha.d/resource.d/drbddisk\n";

/// Builds the package into a folder. A debug build is for tests.
pub(crate) fn deb(debug: bool, no_build: bool, dir: &Path, revision: u32) -> Result<(), Failure> {
    let profile = if debug { "dev" } else { "release" };
    if !no_build {
        let packages = ["-p", "drbdrs", "-p", "drbdadm", "-p", "drbdmeta", "--bins"];
        run::cargo(&[&["build", "--profile", profile], &packages[..]].concat())?;
    }
    let built = Path::new("target").join(if debug { "debug" } else { "release" });
    let root = dir.join("root");
    if root.exists() {
        fs::remove_dir_all(&root)?;
    }
    for (from, to) in FILES {
        copy(Path::new(from), &root.join(to))?;
    }
    programs(&built, &root)?;
    fs::write(root.join("DEBIAN/conffiles"), CONFFILES)?;
    let version = format!("{}-{revision}", env!("CARGO_PKG_VERSION"));
    let architecture = run::command("dpkg", &["--print-architecture"]).output()?;
    let architecture = architecture.trim();
    fs::write(root.join("DEBIAN/control"), control(&version, architecture))?;
    let package = dir.join(format!("drbdrs_{version}_{architecture}.deb")).display().to_string();
    // A package for tests need not be small.
    let effort = if debug { "-Zgzip" } else { "-Zxz" };
    let root = root.display().to_string();
    let words = [effort, "--root-owner-group", "--build", &root, &package];
    run::command("dpkg-deb", &words).run()
}

fn control(version: &str, architecture: &str) -> String {
    format!(
        "Package: drbdrs\n\
         Version: {version}\n\
         Architecture: {architecture}\n\
         Maintainer: The drbdrs developers <developers@drbdrs.invalid>\n\
         Section: admin\n\
         Priority: optional\n\
         Depends: libc6 (>= 2.34), libgcc-s1\n\
         Suggests: heartbeat | pacemaker, libnbd-bin, nbd-client\n\
         Conflicts: drbd-utils, drbd8-utils\n\
         Replaces: drbd-utils, drbd8-utils\n\
         Provides: drbd-utils, drbd8-utils\n\
         Description: replicated block devices in user space\n\
         \x20A block device mirrored synchronously to a second machine: configuration,\n\
         \x20commands, meta-data and wire protocol of DRBD 8.4, without a kernel module.\n"
    )
}

/// A file, or all of a folder.
fn copy(from: &Path, to: &Path) -> Result<(), Failure> {
    if from.is_dir() {
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            copy(&entry.path(), &to.join(entry.file_name()))?;
        }
        return Ok(());
    }
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::copy(from, to)?;
    let mode = if fs::metadata(from)?.permissions().mode() & 0o100 == 0 { 0o644 } else { 0o755 };
    Ok(fs::set_permissions(to, PermissionsExt::from_mode(mode))?)
}

fn programs(built: &Path, root: &Path) -> Result<(), Failure> {
    for name in PROGRAMS {
        let to = root.join("usr/sbin").join(name);
        copy(&built.join(name), &to)?;
        // The names of functions stay, for backtraces.
        run::command("strip", &["--strip-debug", &to.display().to_string()]).run()?;
    }
    let adm = built.join("drbdadm").display().to_string();
    for (words, to) in [
        (&["man"][..], "usr/share/man/man8/drbdadm.8"),
        (&["completion", "bash"], "usr/share/bash-completion/completions/drbdadm"),
    ] {
        let to = root.join(to);
        if let Some(folder) = to.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::write(to, run::command(&adm, words).output()?)?;
    }
    Ok(())
}
