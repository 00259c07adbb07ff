//! Debian packages, without installing them and without being root.
//!
//! apt's own lists are used where they serve; where they are missing or old, lists are fetched
//! into the cache folder.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

/// Kernels to try: one that is known to have all drivers, then what the release has.
const KERNELS: &[&str] = &["linux-image-6.12-cloud-amd64", "linux-image-cloud-amd64"];

/// Programs of the guest; what they link to comes along.
const PROGRAMS: &[&str] = &[
    "busybox-static",
    "drbd-utils",
    "e2fsprogs",
    "util-linux",
    "fio",
    "nbd-client",
    "dmsetup",
    "libgcc-s1",
];

/// apt, with the system's lists or with those in the cache folder.
pub(super) struct Apt {
    cache: PathBuf,
    has_own_lists: bool,
}

impl Apt {
    /// With the system's lists.
    pub(super) fn new(cache: &Path) -> Self {
        Self { cache: cache.to_owned(), has_own_lists: false }
    }

    /// Resolves and downloads all packages. Returns their files, the kernel's first.
    ///
    /// # Errors
    /// apt can not do it.
    pub(super) fn fetch(&mut self) -> Result<Vec<PathBuf>> {
        if let Ok(files) = self.try_fetch() {
            return Ok(files);
        }
        println!("guest: the system's package lists do not serve, fetching own ones");
        self.fetch_lists()?;
        self.try_fetch()
    }

    fn try_fetch(&self) -> Result<Vec<PathBuf>> {
        let names = self.resolve()?;
        let folder = self.cache.join("packages");
        fs::create_dir_all(&folder)?;
        // Elsewhere: what is in the current folder already would not be listed.
        let listing = self.apt("apt-get", &["download", "--print-uris"], &names, &self.cache)?;
        let mut files = Vec::new();
        for name in &names {
            let start = format!("{name}_");
            let mut known = listing.lines().filter_map(|l| l.split_whitespace().nth(1));
            let file = known.find(|file| file.starts_with(&start));
            files.push(folder.join(file.with_context(|| format!("apt-get lacks {name}"))?));
        }
        let missing: Vec<&String> =
            names.iter().zip(&files).filter(|(_, file)| !file.is_file()).map(|(n, _)| n).collect();
        if !missing.is_empty() {
            println!("guest: downloading {} packages into {}", missing.len(), folder.display());
            self.apt("apt-get", &["download", "-q"], missing, &folder)?;
        }
        for file in &files {
            ensure!(file.is_file(), "{} was not downloaded", file.display());
        }
        forget_others(&folder, &files)?;
        Ok(files)
    }

    /// Names of all packages, the kernel first.
    fn resolve(&self) -> Result<Vec<String>> {
        let mut names = vec![self.kernel()?];
        names.extend(PROGRAMS.iter().map(|n| (*n).to_owned()));
        let mut libraries = BTreeSet::new();
        let hide = ["recommends", "suggests", "conflicts", "breaks", "replaces", "enhances"];
        let mut words = vec!["depends".to_owned(), "--recurse".to_owned()];
        words.extend(hide.iter().map(|word| format!("--no-{word}")));
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let listing = self.apt("apt-cache", &words, PROGRAMS, &self.cache)?;
        for line in listing.lines().filter(|l| l.starts_with("lib") || l.starts_with("zlib")) {
            let is_unwanted = ["perl", "python", "elogind"].iter().any(|word| line.contains(word));
            if !is_unwanted && !names.iter().any(|n| n == line) {
                libraries.insert(line.to_owned());
            }
        }
        names.extend(libraries);
        Ok(names)
    }

    /// The package behind the name that always means the newest.
    fn kernel(&self) -> Result<String> {
        for name in KERNELS {
            let Ok(listing) = self.apt("apt-cache", &["depends"], [name], &self.cache) else {
                continue;
            };
            let depends = listing.lines().filter_map(|l| l.trim().strip_prefix("Depends: "));
            if let Some(found) = depends.into_iter().find(|n| n.starts_with("linux-image-")) {
                return Ok(found.to_owned());
            }
        }
        bail!("apt knows none of the kernel packages {KERNELS:?}")
    }

    fn fetch_lists(&mut self) -> Result<()> {
        self.has_own_lists = true;
        for folder in ["apt/lists/partial", "apt/archives/partial"] {
            fs::create_dir_all(self.cache.join(folder))?;
        }
        self.apt("apt-get", &["update", "-q"], [""; 0], &self.cache).map(drop)
    }

    fn apt<S: AsRef<str>>(
        &self,
        program: &str,
        words: &[&str],
        packages: impl IntoIterator<Item = S>,
        folder: &Path,
    ) -> Result<String> {
        let mut command = Command::new(program);
        if self.has_own_lists {
            let at = |part: &str| self.cache.join("apt").join(part).display().to_string();
            command.args(["-o", &format!("Dir::State::lists={}", at("lists"))]);
            command.args(["-o", &format!("Dir::Cache={}", at(""))]);
        }
        if rustix::process::geteuid().is_root() {
            // apt's own user can not write into our folder.
            command.args(["-o", "APT::Sandbox::User=root"]);
        }
        command.args(words).args(packages.into_iter().map(|p| p.as_ref().to_owned()));
        let command = command.current_dir(folder).stdin(Stdio::null()).env("LC_ALL", "C");
        let output = command.output().with_context(|| format!("cannot run {program}"))?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{program} {}: {}", words.join(" "), stderr.trim());
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// Packages of older builds go.
fn forget_others(folder: &Path, keep: &[PathBuf]) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "deb") && !keep.contains(&path) {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

/// Unpacks a package.
///
/// # Errors
/// dpkg-deb can not do it.
pub(super) fn unpack(file: &Path, into: &Path) -> Result<()> {
    let output = Command::new("dpkg-deb").arg("-x").args([file, into]).output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "dpkg-deb -x {}: {stderr}", file.display());
    Ok(())
}
