//! Reading much meta-data: only what is not a hole, and only what is not zero. Blocks: runs on a
//! helper thread.

use std::os::fd::AsFd;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use zerocopy::{FromBytes, IntoBytes};

/// A block of meta-data, aligned for direct I/O.
#[derive(Clone, Copy, FromBytes, IntoBytes)]
#[repr(C, align(4096))]
struct Block([u8; 4096]);

/// Blocks that are read at once.
const STEP: usize = 256;

/// Blocks that are not entirely zero, by their index from `at` on.
pub(super) type Found = Vec<(u32, Box<[u8; 4096]>)>;

/// Reads `blocks` blocks from byte `at` on.
pub(super) fn scan(file: impl AsFd, at: u64, blocks: u32) -> Result<Found, i32> {
    scan_with(&file, at, blocks).map_err(Errno::raw_os_error)
}

fn scan_with(file: &impl AsFd, at: u64, blocks: u32) -> Result<Found, Errno> {
    // Behind the end is no hole: reading there has to fail.
    let end = at.checked_add(u64::from(blocks) * 4096).ok_or(Errno::INVAL)?;
    if end > seek(file, SeekFrom::End(0))? {
        return Err(Errno::IO);
    }
    let mut found = Vec::new();
    let mut some = vec![Block([0; 4096]); STEP.min(blocks as usize)];
    let mut index = 0;
    while index < blocks {
        let place = at + u64::from(index) * 4096;
        let Some(data) = next_data(file, place)? else { break };
        let skipped = u32::try_from(data.saturating_sub(place) / 4096).unwrap_or(u32::MAX);
        index = index.saturating_add(skipped);
        if index >= blocks {
            break;
        }
        let most = u32::try_from(some.len()).unwrap_or(u32::MAX);
        let count = (blocks - index).min(most);
        read(file, at + u64::from(index) * 4096, &mut some[..count as usize])?;
        for (n, block) in (index..).zip(&some[..count as usize]) {
            if !super::is_zero(&block.0) {
                found.push((n, Box::new(block.0)));
            }
        }
        index += count;
    }
    Ok(found)
}

/// The first place at or behind this one that may hold data; `None`: only holes follow.
fn next_data(file: &impl AsFd, place: u64) -> Result<Option<u64>, Errno> {
    match seek(file, SeekFrom::Data(place)) {
        Ok(data) => Ok(Some(data.max(place) / 4096 * 4096)),
        Err(Errno::NXIO) => Ok(None),
        // Block devices do not know.
        Err(_) => Ok(Some(place)),
    }
}

fn read(file: &impl AsFd, at: u64, into: &mut [Block]) -> Result<(), Errno> {
    let into = into.as_mut_bytes();
    let mut got = 0;
    while got < into.len() {
        match rustix::io::pread(file, &mut into[got..], at + got as u64) {
            Ok(0) => return Err(Errno::IO),
            Ok(n) => got += n,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn only_blocks_with_content_are_found() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(16 << 20).unwrap();
        for at in [4096_u64, 8192, 5 << 20] {
            file.write_all_at(&[1], at + 17).unwrap();
        }
        file.write_all_at(&[0; 4096], 9 << 20).unwrap();
        let found = scan(&file, 4096, 4095).unwrap();
        assert_eq!(found.iter().map(|f| f.0).collect::<Vec<_>>(), [0, 1, 1279]);
        assert_eq!((found[0].1[16], found[0].1[17]), (0, 1));
        assert_eq!(scan(&file, 6 << 20, 10).unwrap(), []);
        assert_eq!(scan(&file, (16 << 20) - 4096, 2), Err(libc::EIO), "behind the end");
    }

    #[test]
    fn a_sparse_bitmap_of_16_tib_is_read_at_once() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(600 << 20).unwrap();
        file.write_all_at(&[1], 512 << 20).unwrap();
        let before = std::time::Instant::now();
        let found = scan(&file, 1 << 20, 131_072).unwrap();
        assert_eq!(found.len(), 1);
        println!("512 MiB of holes in {:?}", before.elapsed());
    }
}
