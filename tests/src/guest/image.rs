//! Building what a guest boots: a kernel and a root file system in memory, from Debian packages.
//!
//! Each recipe (this crate's scripts and lists) has a folder of its own below the cache folder, so
//! several clones share packages without disturbing each other. A build happens in a temporary
//! folder and appears as a whole; a lock lets parallel test programs wait for one builder.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use drbd_wire::Algorithm;

use super::cpio::Archive;
use super::modules;
use super::packages::{Apt, unpack};

const INIT: &str = include_str!("init.sh");
const AGENT: &str = include_str!("agent.sh");
/// All sources that decide about the content.
const SOURCES: &[&str] = &[
    INIT,
    AGENT,
    include_str!("image.rs"),
    include_str!("packages.rs"),
    include_str!("modules.rs"),
    include_str!("cpio.rs"),
];

/// Its time says when an image was last used.
const USED: &str = "used";
/// Images of other recipes that were not used for so long go when a new one is built.
const UNUSED_MAX: Duration = Duration::from_secs(14 * 24 * 3600);

/// Where the multi-architecture libraries are.
const LIBRARIES: &str = "lib/x86_64-linux-gnu";
/// Programs that are taken from packages of which not everything is wanted.
const PROGRAMS: &[&str] = &[
    "usr/bin/fio",
    "usr/sbin/nbd-client",
    "usr/sbin/mke2fs",
    "usr/sbin/mkfs.ext4",
    "usr/sbin/e2fsck",
    "usr/sbin/dumpe2fs",
    "usr/sbin/tune2fs",
    "usr/sbin/resize2fs",
    "usr/sbin/blkdiscard",
    "usr/sbin/dmsetup",
    "etc/mke2fs.conf",
];
/// What programs built on the host link to, even if nothing here does.
const COMMON_LIBRARIES: &[&str] = &["libgcc_s.so.1", "libm.so.6", "libdl.so.2", "libpthread.so.0"];

/// A kernel and a root file system.
#[derive(Clone, Debug)]
pub struct Image {
    /// The kernel.
    pub kernel: PathBuf,
    /// The root file system.
    pub initrd: PathBuf,
}

/// The cache folder: `$DRBDRS_GUEST_DIR`, else `drbdrs-guest` in the user's cache.
pub fn folder() -> PathBuf {
    if let Some(folder) = std::env::var_os("DRBDRS_GUEST_DIR") {
        return folder.into();
    }
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/tmp".into()));
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    cache.unwrap_or_else(|| home().join(".cache")).join("drbdrs-guest")
}

/// The image, if it has been built.
pub fn existing() -> Option<Image> {
    let place = folder().join(recipe());
    let image = Image { kernel: place.join("vmlinuz"), initrd: place.join("initrd") };
    (image.kernel.is_file() && image.initrd.is_file()).then_some(image)
}

/// The image, built now if it is not there.
///
/// # Errors
/// Packages can not be had or do not contain what is needed.
pub fn image() -> Result<Image> {
    if let Some(image) = existing() {
        // Says that this recipe is in use; a cache that is read-only does no harm.
        let _ = File::create(folder().join(recipe()).join(USED));
        return Ok(image);
    }
    let _lock = lock()?;
    match existing() {
        Some(image) => Ok(image),
        None => build(),
    }
}

/// Builds the image anew, from the newest packages that apt offers.
///
/// # Errors
/// See [`image`].
pub fn rebuild() -> Result<Image> {
    let _lock = lock()?;
    build()
}

/// Held until the value goes away.
fn lock() -> Result<File> {
    let folder = folder();
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let file = File::create(folder.join("lock"))?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)?;
    Ok(file)
}

/// Name of the folder for this recipe.
fn recipe() -> String {
    let digest = Algorithm::Sha1.digest(SOURCES.concat().as_bytes());
    digest.as_bytes().iter().take(6).map(|byte| format!("{byte:02x}")).collect()
}

fn build() -> Result<Image> {
    let folder = folder();
    let packages = Apt::new(&folder).fetch().context("the guest needs Debian packages")?;
    let work = tempfile::tempdir_in(&folder)?;
    let tree = work.path().join("tree");
    println!("guest: unpacking {} packages", packages.len());
    for package in &packages {
        unpack(package, &tree)?;
    }
    let version = kernel_version(&tree)?;
    let new = work.path().join("new");
    fs::create_dir(&new)?;
    fs::copy(tree.join("boot").join(format!("vmlinuz-{version}")), new.join("vmlinuz"))?;
    let initrd = BufWriter::new(File::create(new.join("initrd"))?);
    let entries = Entries { tree: &tree, archive: Archive::new(initrd), elf: BTreeSet::new() };
    entries.all(&version)?.flush()?;
    let place = folder.join(recipe());
    if place.exists() {
        fs::rename(&place, work.path().join("old"))?;
    }
    fs::rename(&new, &place)?;
    File::create(place.join(USED))?;
    forget_unused(&folder)?;
    let image = existing().context("the image vanished")?;
    let size = fs::metadata(&image.initrd)?.len() >> 20;
    println!("guest: Linux {version}, root file system of {size} MiB in {}", place.display());
    Ok(image)
}

fn forget_unused(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let Ok(used) = fs::metadata(path.join(USED)).and_then(|m| m.modified()) else { continue };
        if used.elapsed().is_ok_and(|age| age > UNUSED_MAX) {
            fs::remove_dir_all(&path)?;
        }
    }
    Ok(())
}

fn kernel_version(tree: &Path) -> Result<String> {
    for modules in ["lib/modules", "usr/lib/modules"] {
        if let Ok(mut entries) = fs::read_dir(tree.join(modules))
            && let Some(entry) = entries.next()
        {
            return entry?.file_name().into_string().ok().context("a name that is no text");
        }
    }
    bail!("the kernel package has no modules")
}

/// Fills the root file system. All names there are below `usr`, as in a new installation.
struct Entries<'a, W> {
    tree: &'a Path,
    archive: Archive<W>,
    /// Programs whose libraries are wanted, on the host.
    elf: BTreeSet<PathBuf>,
}

impl<W: Write> Entries<'_, W> {
    fn all(mut self, version: &str) -> Result<W> {
        for name in ["bin", "sbin", "lib", "lib64"] {
            self.archive.directory(&format!("usr/{name}"))?;
            self.archive.link(name, &format!("usr/{name}"))?;
        }
        for name in ["proc", "sys", "dev", "run", "tmp", "mnt", "root", "var/lib/drbd"] {
            self.archive.directory(name)?;
        }
        self.archive.link("var/run", "/run")?;
        self.archive.link("var/lock", "/run/lock")?;
        self.archive.file("init", 0o755, INIT.as_bytes())?;
        self.archive.file("usr/sbin/guest-agent", 0o755, AGENT.as_bytes())?;
        self.archive.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n")?;
        self.archive.file("etc/group", 0o644, b"root:x:0:\n")?;
        self.archive.file("etc/hosts", 0o644, b"127.0.0.1 localhost\n")?;
        for name in PROGRAMS {
            let file = self.find(name).with_context(|| format!("no package has {name}"))?;
            self.copy(&file, name)?;
        }
        self.drbd_utils()?;
        self.busybox()?;
        self.libraries()?;
        for place in ["lib/modules", "usr/lib/modules"] {
            let folder = self.tree.join(place).join(version);
            if folder.is_dir() {
                for (name, content) in modules::collect(&folder)? {
                    let name = format!("usr/lib/modules/{version}/{name}");
                    self.archive.file(&name, 0o644, &content)?;
                }
            }
        }
        Ok(self.archive.finish()?)
    }

    /// A file of the packages, which may have it with or without `usr/`.
    fn find(&self, name: &str) -> Option<PathBuf> {
        let names = [Some(name), name.strip_prefix("usr/")];
        names.into_iter().flatten().map(|n| self.tree.join(n)).find(|p| p.is_file())
    }

    fn copy(&mut self, file: &Path, name: &str) -> Result<()> {
        let content = fs::read(file).with_context(|| file.display().to_string())?;
        let mode = fs::metadata(file)?.permissions().mode();
        if content.starts_with(b"\x7fELF") {
            self.elf.insert(file.to_owned());
        }
        Ok(self.archive.file(name, mode, &content)?)
    }

    /// The original tools, completely, except for documents.
    fn drbd_utils(&mut self) -> Result<()> {
        let folders = ["sbin", "usr/sbin", "lib/drbd", "usr/lib/drbd", "usr/lib/ocf", "etc"];
        for folder in folders {
            self.drbd_files(folder)?;
        }
        let is_there = self.archive.has("usr/lib/drbd/drbdadm-84");
        ensure!(is_there, "drbd-utils has no tools for version 8.4");
        Ok(())
    }

    fn drbd_files(&mut self, folder: &str) -> Result<()> {
        let Ok(entries) = fs::read_dir(self.tree.join(folder)) else { return Ok(()) };
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name().into_string().ok().context("a name that is no text")?;
            let name = format!("{folder}/{name}");
            let is_ours = name.contains("drbd") || name.contains("linbit");
            let path = entry.path();
            if path.is_dir() && (is_ours || folder.contains("ocf")) {
                self.drbd_files(&name)?;
            } else if path.is_file() && is_ours {
                let below = name.strip_prefix("usr/").unwrap_or(&name);
                let below = if below.starts_with("etc") { name } else { format!("usr/{below}") };
                self.copy(&path, &below)?;
            }
        }
        Ok(())
    }

    fn busybox(&mut self) -> Result<()> {
        let file = self.find("usr/bin/busybox").context("no package has busybox")?;
        self.copy(&file, "usr/bin/busybox")?;
        let list = Command::new(&file).arg("--list").output()?;
        for applet in String::from_utf8_lossy(&list.stdout).lines() {
            // What a real package brings, stays.
            let is_there = |folder: &str| self.archive.has(&format!("usr/{folder}/{applet}"));
            if !is_there("sbin") && !is_there("bin") {
                self.archive.link(&format!("usr/bin/{applet}"), "busybox")?;
            }
        }
        // The kernel and old scripts know this one by its full name.
        self.archive.link("usr/sbin/modprobe", "../bin/busybox")?;
        Ok(())
    }

    /// Asks the packages' own loader, so that the host's libraries play no role.
    fn libraries(&mut self) -> Result<()> {
        let folders: Vec<String> = ["", "usr/"]
            .iter()
            .flat_map(|usr| ["", "/ceph"].map(|sub| format!("{usr}{LIBRARIES}{sub}")))
            .collect();
        let path: Vec<String> =
            folders.iter().map(|f| self.tree.join(f).display().to_string()).collect();
        let loader = self.find(&format!("usr/{LIBRARIES}/ld-linux-x86-64.so.2"));
        let loader = loader.context("no package has the loader")?;
        let mut wanted = BTreeSet::new();
        for program in std::mem::take(&mut self.elf) {
            let mut command = Command::new(&loader);
            let output = command.args(["--library-path", &path.join(":"), "--list"]).arg(&program);
            let output = output.output()?;
            for line in String::from_utf8_lossy(&output.stdout).lines() {
                let Some((name, target)) = line.split_once(" => ") else { continue };
                let target = target.split(" (").next().unwrap_or_default().trim();
                // The loader falls back to the host's folders.
                let is_inside = Path::new(target).starts_with(self.tree);
                ensure!(is_inside, "{} lacks {} ({target})", program.display(), name.trim());
                wanted.insert(PathBuf::from(target));
            }
        }
        for library in COMMON_LIBRARIES {
            let found = self.find(&format!("usr/{LIBRARIES}/{library}"));
            wanted.insert(found.with_context(|| format!("no package has {library}"))?);
        }
        for library in wanted {
            let name = library.strip_prefix(self.tree)?.to_str().context("no text")?.to_owned();
            let name = name.strip_prefix("usr/").unwrap_or(&name);
            self.copy(&library, &format!("usr/{name}"))?;
        }
        let name = "ld-linux-x86-64.so.2";
        self.copy(&loader, &format!("usr/{LIBRARIES}/{name}"))?;
        Ok(self.archive.link(&format!("usr/lib64/{name}"), &format!("../{LIBRARIES}/{name}"))?)
    }
}
