//! Attach and what it leaves.

use super::rig::*;
use drbd_core::event::AppOp;
use drbd_core::ids::BufId;
use drbd_types::{Dstate, VolumeNr};

/// Pages of the bitmap that are entirely zero are not delivered by the shell: they must not stay as
/// setting the size has left them.
#[test]
fn a_clean_disk_attaches_clean() {
    let script = alone();
    assert_eq!(script.state(0).disk, Dstate::UpToDate);
    assert_eq!(script.volume(0).unwrap().out_of_sync_bits, 0);
}

#[test]
fn bits_on_disk_are_found_at_attach() {
    let mut script = without_disk(disk(&[3, 17, 2047]));
    script.attach(0, Default::default());
    assert_eq!(script.volume(0).unwrap().out_of_sync_bits, 3);
}

#[test]
fn a_write_to_no_volume_gives_its_buffer_back() {
    let mut script = alone();
    let id = script.app(VolumeNr(9), |script| {
        let buf: BufId = script.buf(4096);
        AppOp::Write { range: range(0, 8), buf, flags: Default::default() }
    });
    assert!(script.completed[&id.0].is_err());
    assert_clean(&script);
}

#[test]
fn a_secondary_does_not_write() {
    let mut script = alone();
    let id = write(&mut script, 0);
    assert_eq!(script.completed[&id.0], Err(drbd_core::action::AppError::ReadOnly));
    assert_clean(&script);
}
