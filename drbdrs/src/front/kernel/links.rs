//! Names of a device: `drbdN` and `drbd/by-res/RESOURCE/VOLUME`, links to its node.
//!
//! Only links of ours are replaced or removed: those that lead to a node of a driver that we use.
//! A real node, as the kernel's own DRBD makes it, stays.

use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

/// The links of one device; removed by [`Links::remove`], and left to a successor otherwise.
#[derive(Debug)]
pub struct Links {
    node: PathBuf,
    made: Vec<PathBuf>,
}

/// Names of nodes of the drivers that we use, without their number.
const NODES: [&str; 2] = ["nbd", "ublkb"];

impl Links {
    /// Makes them in `folder`, which is `/dev`. A name that is taken is left out; the text says why.
    pub fn make(
        folder: &Path,
        node: &Path,
        resource: &str,
        volume: u16,
        minor: u32,
    ) -> (Self, Vec<String>) {
        let wanted = names(folder, resource, volume, minor);
        let mut links = Self { node: node.to_owned(), made: Vec::new() };
        let mut problems = Vec::new();
        for path in wanted {
            match make(&path, node) {
                Ok(()) => links.made.push(path),
                Err(error) => problems.push(format!("{}: {error}", path.display())),
            }
        }
        (links, problems)
    }

    /// Those that lead to a node which another daemon has left.
    pub fn left(folder: &Path, node: &Path, resource: &str, volume: u16, minor: u32) -> Self {
        // Others are left out when they are removed.
        Self { node: node.to_owned(), made: names(folder, resource, volume, minor).into() }
    }

    /// Those that are there.
    #[must_use]
    pub fn paths(&self) -> &[PathBuf] {
        &self.made
    }

    /// Takes them away.
    pub fn remove(self) {
        for path in self.made {
            // Whoever has put something else there wants it there.
            if std::fs::read_link(&path).is_ok_and(|target| target == self.node) {
                let _ = std::fs::remove_file(&path);
            }
        }
    }
}

fn names(folder: &Path, resource: &str, volume: u16, minor: u32) -> [PathBuf; 2] {
    let by_res = folder.join("drbd/by-res").join(resource);
    [folder.join(format!("drbd{minor}")), by_res.join(volume.to_string())]
}

fn make(path: &Path, node: &Path) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return symlink(node, path),
        Err(error) => return Err(error),
        Ok(_) => {}
    }
    if !std::fs::read_link(path).is_ok_and(|target| is_ours(&target)) {
        let text = "exists and was not made by drbdrs (does the kernel's own DRBD use it?)";
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
    }
    // At no moment is there no such name.
    let fresh = path.with_extension("drbdrs-new");
    let _ = std::fs::remove_file(&fresh);
    symlink(node, &fresh)?;
    std::fs::rename(&fresh, path)
}

/// Leads to a node of a driver that we use; ours, or one that our udev rules made.
fn is_ours(target: &Path) -> bool {
    let name = target.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let number = NODES.iter().find_map(|start| name.strip_prefix(start));
    number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_come_go_and_follow_the_node() {
        let dev = tempfile::tempdir().unwrap();
        let names = ["drbd7", "drbd/by-res/r0/1"].map(|name| dev.path().join(name));
        let (old, problems) = Links::make(dev.path(), Path::new("/dev/nbd3"), "r0", 1, 7);
        assert_eq!((old.paths(), problems), (&names[..], vec![]));
        // A successor that has another node.
        let (links, problems) = Links::make(dev.path(), Path::new("/dev/ublkb12"), "r0", 1, 7);
        assert_eq!((links.paths(), problems), (&names[..], vec![]));
        for name in &names {
            assert_eq!(std::fs::read_link(name).unwrap(), Path::new("/dev/ublkb12"));
        }
        old.remove();
        Links::left(dev.path(), Path::new("/dev/nbd3"), "r0", 1, 7).remove();
        assert!(names.iter().all(|name| name.is_symlink()), "no longer the first one's to remove");
        drop(links);
        Links::left(dev.path(), Path::new("/dev/ublkb12"), "r0", 1, 7).remove();
        assert!(!names.iter().any(|name| name.is_symlink()));
    }

    #[test]
    fn what_others_made_stays() {
        let dev = tempfile::tempdir().unwrap();
        let node = dev.path().join("drbd0");
        std::fs::write(&node, "a node").unwrap();
        symlink("/dev/nbd", dev.path().join("drbd1")).unwrap();
        for minor in [0, 1] {
            let (links, problems) = Links::make(dev.path(), Path::new("/dev/nbd0"), "r0", 0, minor);
            assert_eq!(links.paths(), [dev.path().join("drbd/by-res/r0/0")]);
            let [problem] = &problems[..] else { panic!("{problems:?}") };
            assert!(
                problem.contains(&format!("drbd{minor}: exists and was not made")),
                "{problem}"
            );
            links.remove();
        }
        assert_eq!(std::fs::read_to_string(&node).unwrap(), "a node");
    }
}
