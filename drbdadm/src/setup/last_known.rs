//! `check-resize`: noting where internal meta-data of an attached disk is. Spec: metadata.md §9.1.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use drbd_admin::{Backing, MetaIndex, Volume};
use drbdmeta::last_known::LastKnown;

use super::Failed;
use super::request::reason;

const DIRECTORY: &str = "/var/lib/drbd";

/// Brings the note of a volume up to date.
///
/// # Errors
/// It has no disk, the disk can not be opened, or the note can not be written: exit code 1.
pub(super) fn check_resize(volume: &Volume) -> Result<(), Failed> {
    let failed = |text: String| Failed::new(1, text);
    let Some(backing) = &volume.backing else {
        return Err(failed("Device has no disk\n".into()));
    };
    let path = Path::new(DIRECTORY).join(format!("drbd-minor-{}.lkbd", volume.minor));
    if backing.meta_index != MetaIndex::Internal {
        let _ = std::fs::remove_file(path);
        return Ok(());
    }
    let disk = &backing.disk;
    let len = File::open(disk).and_then(|mut file| file.seek(SeekFrom::End(0)));
    let len = len.map_err(|e| failed(format!("Can not open device '{disk}': {}\n", reason(&e))))?;
    update(&path, backing, len).map_err(|e| failed(format!("{}: {}\n", path.display(), reason(&e))))
}

/// Writes the note if it says something else.
fn update(path: &PathBuf, backing: &Backing, device_len: u64) -> std::io::Result<()> {
    let now = LastKnown {
        device_len,
        device: Some(backing.disk.clone()),
        device_uuid: backing.device_uuid,
    };
    let before = std::fs::read_to_string(path).ok().and_then(|text| LastKnown::parse(&text));
    if before.as_ref() == Some(&now) {
        return Ok(());
    }
    // Whole or not at all, also when the machine dies.
    let temporary = path.with_extension("lkbd.tmp");
    let mut file = File::create(&temporary)?;
    file.write_all(now.to_text().as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_note_follows_the_disk() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("drbd-minor-7.lkbd");
        let mut backing = Backing {
            disk: "/dev/vda".into(),
            meta_disk: "/dev/vda".into(),
            meta_index: MetaIndex::Internal,
            device_uuid: 0xCC3F_B016_5281_AA92,
            options: Default::default(),
        };
        update(&path, &backing, 67_108_864).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, "67108864\t/dev/vda\nuuid:\tCC3FB0165281AA92\n");
        backing.device_uuid = 0;
        update(&path, &backing, 4096).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "4096\t/dev/vda\n");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        let error = check_resize(&Volume::new(0, 7)).unwrap_err();
        assert_eq!((error.code, error.stderr.as_str()), (1, "Device has no disk\n"));
    }
}
