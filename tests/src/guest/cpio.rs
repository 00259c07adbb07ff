//! The archive that becomes the guest's root file system: cpio in the "newc" form.
//!
//! Everything belongs to root there, whoever builds it. Spec: the kernel's "initramfs buffer format".

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::Path;

const DIRECTORY: u32 = 0o040_755;
const LINK: u32 = 0o120_777;
const FILE: u32 = 0o100_000;

/// Writes an archive; parents of an entry are made as needed.
pub(super) struct Archive<W> {
    out: W,
    at: usize,
    inode: u32,
    names: BTreeSet<String>,
}

impl<W: Write> Archive<W> {
    pub(super) const fn new(out: W) -> Self {
        Self { out, at: 0, inode: 0, names: BTreeSet::new() }
    }

    /// Is there an entry of this name?
    pub(super) fn has(&self, name: &str) -> bool {
        self.names.contains(name)
    }

    /// A directory.
    pub(super) fn directory(&mut self, name: &str) -> io::Result<()> {
        if name.is_empty() || self.has(name) {
            return Ok(());
        }
        self.parents(name)?;
        self.entry(name, DIRECTORY, &[])
    }

    /// A regular file; an entry that is there already stays.
    pub(super) fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        if self.has(name) {
            return Ok(());
        }
        self.parents(name)?;
        self.entry(name, FILE | mode & 0o777, content)
    }

    /// A symbolic link; an entry that is there already stays.
    pub(super) fn link(&mut self, name: &str, target: &str) -> io::Result<()> {
        if self.has(name) {
            return Ok(());
        }
        self.parents(name)?;
        self.entry(name, LINK, target.as_bytes())
    }

    /// Ends the archive.
    pub(super) fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, &[])?;
        Ok(self.out)
    }

    fn parents(&mut self, name: &str) -> io::Result<()> {
        match Path::new(name).parent().and_then(Path::to_str) {
            Some(parent) => self.directory(parent),
            None => Ok(()),
        }
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.names.insert(name.to_owned());
        self.inode += 1;
        let too_large = || io::Error::other(format!("{name} is too large for the archive"));
        let size = u32::try_from(content.len()).map_err(|_| too_large())?;
        let name_size = u32::try_from(name.len() + 1).map_err(|_| too_large())?;
        let mut head = String::from("070701");
        // inode, mode, uid, gid, links, time, size, four device numbers, name size, check sum.
        for field in [self.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0] {
            head.push_str(&format!("{field:08x}"));
        }
        self.put(head.as_bytes())?;
        self.put(name.as_bytes())?;
        self.put(&[0])?;
        self.pad()?;
        self.put(content)?;
        self.pad()
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.at += bytes.len();
        self.out.write_all(bytes)
    }

    fn pad(&mut self) -> io::Result<()> {
        let missing = self.at.next_multiple_of(4) - self.at;
        self.put(&[0; 3][..missing])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_padded_and_parents_come_first() {
        let mut archive = Archive::new(Vec::new());
        archive.file("a/b/c", 0o755, b"12345").unwrap();
        archive.link("a/l", "b/c").unwrap();
        archive.file("a/b/c", 0o600, b"second, ignored").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        let places: Vec<_> =
            ["a\0", "a/b\0", "a/b/c\0", "a/l\0", "TRAILER!!!\0"].map(|n| text.find(n)).into();
        assert!(places.is_sorted() && places[0].is_some(), "{places:?}");
        assert!(text.contains("12345") && !text.contains("ignored"));
    }
}
