//! Real block devices: loop devices with blocks of 512 and of 4096 bytes. Needs root.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod support;

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;

use drbdmeta::layout::Placement;
use drbdrs::plane::disk::{DiskPaths, OpenDisk};
use drbdrs::plane::io::Choice;
use libtest_mimic::{Arguments, Failed, Trial};
use support::client::{Client, READ, TRIM, WRITE, ZEROES};
use support::{Node, Setup};

const BYTES: u64 = 64 << 20;

/// A loop device on a file of its own; detached when dropped.
struct Loop {
    path: PathBuf,
    dir: tempfile::TempDir,
}

impl Loop {
    fn new(block: u32) -> Option<Self> {
        let dir = tempfile::tempdir().ok()?;
        let file = dir.path().join("image");
        std::fs::File::create(&file).ok()?.set_len(BYTES).ok()?;
        let mut losetup = Command::new("losetup");
        losetup.args(["--find", "--show", "--sector-size", &block.to_string()]).arg(&file);
        let output = losetup.output().ok().filter(|output| output.status.success())?;
        let path = PathBuf::from(String::from_utf8(output.stdout).ok()?.trim());
        Some(Self { path, dir })
    }

    fn content(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(BYTES).unwrap()];
        let device = std::fs::File::open(&self.path).unwrap();
        device.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // Fails only if it is in use, and then a test has failed already.
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
    }
}

fn main() {
    let args = Arguments::from_args();
    let is_possible = Loop::new(512).is_some() && Loop::new(4096).is_some();
    let no_skip = std::env::var("DRBDRS_NO_SKIP").is_ok_and(|v| v == "1");
    let trials: Vec<Trial> = [512, 4096]
        .into_iter()
        .flat_map(|block| {
            [("ring", Choice::Auto), ("threads", Choice::Threads)].map(|(on, io)| {
                let name = format!("a_device_with_blocks_of_{block}_bytes_{on}");
                Trial::test(name, move || device(block, io))
                    .with_ignored_flag(!is_possible && !no_skip)
            })
        })
        .collect();
    libtest_mimic::run(&args, trials).exit();
}

fn device(block: u32, io: Choice) -> Result<(), Failed> {
    let device = Loop::new(block).ok_or("no loop device")?;
    let paths =
        DiskPaths { backing: device.path.clone(), meta: None, placement: Placement::Internal };
    let open = OpenDisk::open(&paths)?;
    let limits = open.opened.limits;
    assert_eq!((open.opened.backing.0, limits.logical_block), (BYTES / 512, block));
    assert!(limits.can_discard && limits.discard_granularity >= block, "{limits:?}");
    let busy = OpenDisk::open(&paths).unwrap_err();
    assert_eq!(busy.errno, libc::EBUSY);
    assert!(busy.text.contains(&format!("pid:{}", std::process::id())), "{busy}");
    drop(open);

    let node = Node::new(Setup { io, device: Some(device.path.clone()), ..Setup::default() });
    let mut client = Client::open(&node.unix(), false, &[]);
    let mut model = vec![0; 1 << 20];
    let steps: [(u16, u16, usize, usize); 9] = [
        (WRITE, 0, 0, 1 << 20),
        (WRITE, 0, 512, 512),
        (WRITE, 1, 7 * 512, 3 * 512),
        (WRITE, 1, 8192, 4096),
        (WRITE, 0, 100 * 512, 1000 * 512),
        (TRIM, 0, 65_536 + 512, 300 * 512),
        (ZEROES, 0, 33 * 512, 15 * 512),
        (ZEROES, 2, 51 * 512, 100 * 512),
        (TRIM, 1, 512 << 10, 64 << 10),
    ];
    for (n, (command, flags, at, len)) in (1_u8..).zip(steps) {
        client.request(command, flags, n.into(), at as u64, u32::try_from(len)?);
        let value = if command == WRITE { n } else { 0 };
        if command == WRITE {
            client.send(&vec![n; len]);
        }
        assert_eq!(client.simple(), (n.into(), 0), "step {n}");
        model[at..at + len].fill(value);
    }
    for (at, len) in [(0, 1 << 20), (512, 512), (7 * 512, 9 * 512)] {
        client.request(READ, 0, 0, at as u64, u32::try_from(len)?);
        assert_eq!(client.simple(), (0, 0));
        assert!(client.take(len) == model[at..at + len], "read at {at}");
    }
    drop(client);
    node.wait_for_users(0);
    drop(node);
    assert!(device.content()[..1 << 20] == model, "on the device");
    let image = std::fs::metadata(device.dir.path().join("image"))?;
    let blocks = std::os::unix::fs::MetadataExt::blocks(&image);
    assert!(blocks * 512 < 1 << 20, "space was given back: {blocks} blocks");
    Ok(())
}
