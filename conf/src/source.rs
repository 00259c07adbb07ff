//! Files: where configurations come from. The parser sees only [`Loader`] and [`Sources`].
//!
//! Spec: config-and-drbdadm.md §1.1, §1.4, §3.1.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bstr::{BStr, BString, ByteSlice};

use crate::model::FileId;

/// Largest configuration file, bytes. The original has no limit; this one keeps a mistaken file
/// name (a disk image, /dev/zero) from filling the memory.
pub const FILE_BYTES_MAX: u64 = 256 << 20;

/// Files that are tried without `-c`, in this order. Spec §1.1.
pub const SEARCH_PATH: [&str; 5] = [
    "/etc/drbd-84.conf",
    "/etc/drbd-83.conf",
    "/etc/drbd-82.conf",
    "/etc/drbd-08.conf",
    "/etc/drbd.conf",
];

/// How the parser reaches files.
pub trait Loader {
    /// The content of a file.
    ///
    /// # Errors
    /// Whatever keeps the file from being read.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;

    /// The content of a file that an `include` names.
    ///
    /// # Errors
    /// As [`Loader::read`], and for what is no regular file: a pipe could make it wait for ever.
    fn read_included(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.read(path)
    }

    /// The path without symbolic links and relative parts; names a file once.
    ///
    /// # Errors
    /// The file does not exist.
    fn canonical(&self, path: &Path) -> io::Result<PathBuf>;

    /// Names of the directory's entries, unsorted.
    ///
    /// # Errors
    /// The directory can not be read.
    fn list(&self, directory: &Path) -> io::Result<Vec<BString>>;
}

/// The real file system.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemLoader;

impl Loader for SystemLoader {
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let file = std::fs::File::open(path)?;
        read_limited(file)
    }

    fn read_included(&self, path: &Path) -> io::Result<Vec<u8>> {
        if !std::fs::metadata(path)?.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        self.read(path)
    }

    fn canonical(&self, path: &Path) -> io::Result<PathBuf> {
        std::fs::canonicalize(path)
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<BString>> {
        let directory = if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
        let mut names = Vec::new();
        for entry in std::fs::read_dir(directory)? {
            names.push(BString::from(entry?.file_name().as_bytes()));
        }
        Ok(names)
    }
}

/// Reads everything, but not without end.
///
/// # Errors
/// Reading fails, or there is more than [`FILE_BYTES_MAX`].
pub fn read_limited(from: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        let text = format!("larger than {FILE_BYTES_MAX} bytes: not a configuration file");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
    }
    Ok(bytes)
}

/// Files held in memory, for tests and fuzzing.
#[derive(Clone, Debug, Default)]
pub struct MemoryLoader {
    files: std::collections::BTreeMap<PathBuf, Vec<u8>>,
}

impl MemoryLoader {
    /// Adds a file.
    #[must_use]
    pub fn with(mut self, path: impl Into<PathBuf>, bytes: impl Into<Vec<u8>>) -> Self {
        self.files.insert(path.into(), bytes.into());
        self
    }
}

impl Loader for MemoryLoader {
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let found = self.files.get(path).or_else(|| self.files.get(&clean(path)));
        found.cloned().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn canonical(&self, path: &Path) -> io::Result<PathBuf> {
        let path = clean(path);
        let is_folder =
            path.as_os_str().is_empty() || self.files.keys().any(|f| f.starts_with(&path));
        if is_folder { Ok(path) } else { Err(io::ErrorKind::NotFound.into()) }
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<BString>> {
        let directory = clean(directory);
        let below = |p: &PathBuf| {
            (p.parent() == Some(&directory)).then(|| p.file_name().map(|n| n.as_bytes().into()))
        };
        Ok(self.files.keys().filter_map(below).flatten().collect())
    }
}

fn clean(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            std::path::Component::CurDir => {}
            std::path::Component::ParentDir => {
                out.pop();
            }
            other => out.push(other),
        }
    }
    out
}

/// One file of a configuration.
#[derive(Clone, Debug)]
pub struct Source {
    /// Name in messages while parsing: as given with `-c`, or as made by the include pattern.
    pub name: BString,
    /// Absolute path, for messages after parsing and for dumps.
    pub absolute: BString,
    /// Content.
    pub bytes: Arc<[u8]>,
}

/// All files of a configuration in the order in which they were opened.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    files: Vec<Source>,
    seen: HashSet<PathBuf>,
}

impl Sources {
    /// Adds a file.
    pub fn add(&mut self, source: Source) -> FileId {
        let id = FileId(u32::try_from(self.files.len()).unwrap_or(u32::MAX));
        self.files.push(source);
        id
    }

    /// Notes that the file with this real path is read now; `false` if it was before.
    pub(crate) fn first_time(&mut self, canonical: PathBuf) -> bool {
        self.seen.insert(canonical)
    }

    /// A file.
    pub fn get(&self, id: FileId) -> Option<&Source> {
        self.files.get(usize::try_from(id.0).ok()?)
    }

    /// Name while parsing.
    pub fn name(&self, id: FileId) -> &BStr {
        self.get(id).map_or_else(Default::default, |s| s.name.as_bstr())
    }

    /// Absolute path.
    pub fn absolute(&self, id: FileId) -> &BStr {
        self.get(id).map_or_else(Default::default, |s| s.absolute.as_bstr())
    }

    /// The main file's absolute path.
    pub fn main(&self) -> &BStr {
        self.absolute(FileId(0))
    }
}

/// Absolute path of a configuration file: symbolic links of its directory are resolved, the file
/// itself may be a link. Spec §1.4.
pub fn absolute_path(loader: &dyn Loader, path: &Path) -> PathBuf {
    let directory = path.parent().filter(|d| !d.as_os_str().is_empty());
    let directory = directory.unwrap_or_else(|| Path::new("."));
    match (loader.canonical(directory), path.file_name()) {
        (Ok(directory), Some(name)) => directory.join(name),
        _ => loader.canonical(path).unwrap_or_else(|_| path.to_path_buf()),
    }
}

/// Does the name match the pattern of `?`, `*`, `[...]` and backslash, as in glob(3)?
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    if name.first() == Some(&b'.') && pattern.first() != Some(&b'.') {
        return false;
    }
    let (mut p, mut n) = (0, 0);
    // Where to go on if the last star has to take one more byte.
    let mut star: Option<(usize, usize)> = None;
    loop {
        let step = match (pattern.get(p), name.get(n)) {
            (None, None) => return true,
            (Some(b'*'), _) => {
                star = Some((p + 1, n));
                p += 1;
                continue;
            }
            (Some(b'?'), Some(_)) => Some(1),
            (Some(b'['), Some(byte)) => {
                match bracket(pattern.get(p..).unwrap_or_default(), *byte) {
                    Some((true, len)) => Some(len),
                    Some((false, _)) => None,
                    None => (*byte == b'[').then_some(1),
                }
            }
            (Some(b'\\'), Some(byte)) => (pattern.get(p + 1) == Some(byte)).then_some(2),
            (Some(want), Some(byte)) => (want == byte).then_some(1),
            (_, _) => None,
        };
        match (step, star) {
            (Some(len), _) => {
                p += len;
                n += 1;
            }
            (None, Some((after, taken))) if taken < name.len() => {
                star = Some((after, taken + 1));
                p = after;
                n = taken + 1;
            }
            (None, _) => return false,
        }
    }
}

/// A bracket expression: whether it takes the byte, and its length. `None`: not closed.
fn bracket(pattern: &[u8], byte: u8) -> Option<(bool, usize)> {
    let negated = matches!(pattern.get(1), Some(b'!' | b'^'));
    let mut pos = if negated { 2 } else { 1 };
    let start = pos;
    let mut found = false;
    loop {
        let low = *pattern.get(pos)?;
        if low == b']' && pos > start {
            return Some((found != negated, pos + 1));
        }
        match (pattern.get(pos + 1), pattern.get(pos + 2)) {
            (Some(b'-'), Some(high)) if *high != b']' => {
                found |= (low..=*high).contains(&byte);
                pos += 3;
            }
            _ => {
                found |= low == byte;
                pos += 1;
            }
        }
    }
}

/// Files that match a pattern, sorted; relative to `directory` if the pattern is relative.
/// The second value of each pair is the name as the pattern makes it. Spec §3.1.
pub(crate) fn glob(
    loader: &dyn Loader,
    directory: &Path,
    pattern: &BStr,
) -> Vec<(PathBuf, BString)> {
    let mut found = vec![BString::default()];
    if pattern.first() == Some(&b'/') {
        found = vec![BString::from("/")];
    }
    for part in pattern.split(|b| *b == b'/').filter(|part| !part.is_empty()) {
        let mut next = Vec::new();
        for prefix in &found {
            let at = directory.join(OsStr::from_bytes(prefix));
            let joined = |name: &[u8]| {
                let slash: &[u8] =
                    if prefix.is_empty() || prefix.ends_with(b"/") { b"" } else { b"/" };
                BString::from([prefix.as_slice(), slash, name].concat())
            };
            if part.iter().any(|b| matches!(b, b'?' | b'*' | b'[')) {
                let mut names = loader.list(&at).unwrap_or_default();
                names.retain(|name| matches(part, name));
                names.sort();
                next.extend(names.iter().map(|name| joined(name)));
            } else {
                let plain: Vec<u8> = part.iter().copied().filter(|b| *b != b'\\').collect();
                next.push(joined(&plain));
            }
        }
        found = next;
    }
    let path = |name: &BString| directory.join(OsStr::from_bytes(name));
    found
        .into_iter()
        .filter(|name| loader.canonical(&path(name)).is_ok())
        .map(|name| (path(&name), name))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        let yes = |p: &str, n: &str| assert!(matches(p.as_bytes(), n.as_bytes()), "{p} {n}");
        let no = |p: &str, n: &str| assert!(!matches(p.as_bytes(), n.as_bytes()), "{p} {n}");
        yes("*.res", "a.res");
        yes("*a*b*", "xaybz");
        yes("[a-c]?.res", "bx.res");
        yes("[!a]x", "bx");
        yes("a[", "a[");
        no("*.res", ".hidden.res");
        no("[a-c].res", "d.res");
        no("?", "");
        no(&"*a".repeat(60), &"a".repeat(59));
    }

    #[test]
    fn glob_in_memory_is_sorted_and_relative() {
        let loader =
            MemoryLoader::default().with("d/b.res", "").with("d/a.res", "").with("d/c", "");
        let found = glob(&loader, Path::new(""), "d/*.res".into());
        let names: Vec<_> = found.iter().map(|f| f.1.to_string()).collect();
        assert_eq!(names, ["d/a.res", "d/b.res"]);
    }
}
