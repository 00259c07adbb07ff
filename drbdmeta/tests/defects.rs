//! Where this command does better than the originals: one test each. Spec: metadata.md §11; the
//! table of all defects is docs/defects.md of the daemon.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use drbdmeta::al::{AlRing, Outcome, initialised_block, replay};
use drbdmeta::bitmap::Region;
use drbdmeta::io::{Memory, MetaIo};
use drbdmeta::layout::{AlGeometry, Layout, Placement};
use drbdmeta::ops::{self, ApplyPlan};
use drbdmeta::superblock::{Flags, Magic, Superblock};
use drbdmeta::units::{AlExtentNr, ByteLen, SectorCount};

const MIB: u64 = 1 << 20;

/// A device in a folder of its own, which is removed at the end.
struct Bench {
    folder: PathBuf,
}

/// How a command ended: exit status, and both outputs.
type Ended = (i32, String);

impl Bench {
    fn new(name: &str, size: u64) -> Self {
        let folder =
            std::env::temp_dir().join(format!("drbdmeta-defects-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let bench = Self { folder };
        bench.resize(size);
        bench
    }

    fn device(&self) -> PathBuf {
        self.folder.join("device")
    }

    fn resize(&self, size: u64) {
        let open = std::fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(self.device())
            .unwrap();
        open.set_len(size).unwrap();
    }

    fn run_at(&self, place: &str, command: &[&str]) -> Ended {
        let done = Command::new(env!("CARGO_BIN_EXE_drbdmeta"))
            .args(["--var-lib-drbd"])
            .arg(&self.folder)
            .args(["-", "v08"])
            .arg(self.device())
            .arg(place)
            .args(command)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = [done.stdout, done.stderr].concat();
        (done.status.code().unwrap(), String::from_utf8_lossy(&text).into_owned())
    }

    fn run(&self, command: &[&str]) -> Ended {
        self.run_at("internal", command)
    }

    fn ok(&self, command: &[&str]) -> String {
        let (status, text) = self.run(command);
        assert_eq!(status, 0, "{command:?}: {text}");
        text
    }

    fn content(&self) -> Vec<u8> {
        std::fs::read(self.device()).unwrap()
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let file = self.folder.join(name);
        std::fs::write(&file, text).unwrap();
        file
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The originals from 9.33 skip the extent whose last byte is the last of the bitmap.
#[test]
fn apply_al_marks_the_last_extent() {
    let size = 128 * MIB + (1 << 16);
    let mut memory = Memory::zeroed(usize::try_from(size).unwrap());
    let layout =
        Layout::for_new(Placement::Internal, ByteLen(size), AlGeometry::default()).unwrap();
    let mut sb = Superblock::new(&layout, 0);
    sb.la_size = SectorCount(128 * MIB / 512);
    assert!(sb.la_size <= layout.usable());
    sb.flags = Flags::PRIMARY | Flags::CONSISTENT;
    ops::create(&mut memory, &layout, &sb, false, |io, l| io.write_at(l.bitmap, &[0; 4096]))
        .unwrap();
    let mut ring = AlRing::new(layout);
    let (at, block) = ring.next(&[(0, Some(AlExtentNr(31)))], &[None; 7]).unwrap();
    memory.write_at(at, &block).unwrap();
    ring.written();
    sb.magic = Magic::Unclean;
    ops::write_superblock(&mut memory, &layout, &sb).unwrap();
    let found = replay(&mut memory, &layout, &sb).unwrap();
    assert!(matches!(&found.outcome, Outcome::Updates(extents) if extents.len() == 1));
    let ApplyPlan::Do { mark, reinitialise, .. } = ops::plan_apply(&sb, &found) else {
        panic!("there is something to do");
    };
    ops::apply(&mut memory, &layout, &mut sb, &found.outcome, mark, reinitialise).unwrap();
    let mut dirty = 0;
    Region::new(&layout, sb.la_size)
        .each_dirty_range(&mut memory, |bits| dirty += bits.end.0 - bits.start.0)
        .unwrap();
    assert_eq!(dirty, 1024, "4 MiB");
}

#[test]
fn a_dump_shows_the_real_flags() {
    let bench = Bench::new("flags", 8 * MIB);
    bench.ok(&["create-md", "--force"]);
    bench.ok(&["set-gi", "0000000000000005:0:0:0:1:1:0:1:0:0", "--force"]);
    let dump = bench.ok(&["dump-md"]);
    let flags = dump.lines().find(|line| line.trim().starts_with("flags")).unwrap().to_owned();
    assert!(!flags.contains("0x00000000"), "{flags}");
}

#[test]
fn create_md_replaces_a_log_of_another_shape() {
    let bench = Bench::new("stripes", 8 * MIB);
    bench.ok(&["create-md", "--force"]);
    let command = ["create-md", "--force", "--al-stripes", "2", "--al-stripe-size-kB", "64"];
    bench.ok(&command);
    let dump = bench.ok(&["dump-md"]);
    assert!(dump.contains("al-stripes 2;"), "{dump}");
}

#[test]
fn create_md_refuses_a_slot_with_stripes_or_without_room() {
    let bench = Bench::new("slot", 140 * MIB);
    let stripes = ["create-md", "--force", "--al-stripes", "2", "--al-stripe-size-kB", "64"];
    let (status, said) = bench.run_at("0", &stripes);
    assert_eq!(status, 10, "{said}");
    let (status, said) = bench.run_at("1", &["create-md", "--force"]);
    assert_eq!(status, 10, "{said}");
    assert!(bench.content().iter().all(|byte| *byte == 0), "nothing is written");
}

/// Meta-data at the place of a smaller device: replaced only on purpose, and not in silence.
#[test]
fn create_md_does_not_forget_meta_data_at_its_last_place() {
    let bench = Bench::new("last-place", 8 * MIB);
    bench.ok(&["create-md", "--force"]);
    bench.resize(16 * MIB);
    let (status, said) = bench.run(&["create-md"]);
    assert_eq!(status, 1, "{said}");
    let said = bench.ok(&["create-md", "--force"]);
    assert!(said.to_lowercase().contains("warning"), "{said}");
}

#[test]
fn a_dry_run_writes_nothing() {
    let bench = Bench::new("dry-run", 8 * MIB);
    std::fs::write(bench.device(), vec![0xA5; 8 << 20]).unwrap();
    let before = bench.content();
    let (_, said) = bench.run(&["create-md", "--force", "--dry-run"]);
    assert!(said.contains("DRY-RUN") || said.contains("dry-run"), "{said}");
    assert!(bench.content() == before, "{said}");
}

/// A restored device needs no create-md before: log and missing words of the bitmap are made.
#[test]
fn restore_md_makes_the_log_and_the_rest_of_the_bitmap() {
    let bench = Bench::new("restore", 8 * MIB);
    let dump = "version \"v08\";\n\
        uuid { 0x0000000000000004; 0x0000000000000000; 0x0000000000000000; 0x0000000000000000; \
        flags 0x00000000; }\n\
        la-size-sect 16000;\nbm-byte-per-bit 4096;\ndevice-uuid 0x0000000000000001;\n\
        la-peer-max-bio-size 0;\nal-stripes 1;\nal-stripe-size-4k 8;\n\
        bm { 0xFF00000000000000; }\n";
    std::fs::write(bench.device(), vec![0xA5; 8 << 20]).unwrap();
    let file = bench.file("dump", dump);
    bench.ok(&["restore-md", "--force", text(&file)]);
    let content = bench.content();
    let layout =
        Layout::for_new(Placement::Internal, ByteLen(8 * MIB), AlGeometry::default()).unwrap();
    for block in 0..layout.al_geometry.blocks() {
        let at = usize::try_from(layout.al_block(block).0).unwrap();
        assert!(content[at..at + 4096] == initialised_block()[..], "block {block} of the log");
    }
    let at = usize::try_from(layout.bitmap.0).unwrap();
    let rest = &content[at + 8..usize::try_from(layout.al_block(0).0).unwrap()];
    assert!(rest.iter().all(|byte| *byte == 0), "words that the dump lacks");
}

#[test]
fn other_block_sizes_of_the_bitmap_are_not_valid() {
    let bench = Bench::new("granularity", 8 * MIB);
    bench.ok(&["create-md", "--force"]);
    let at = usize::try_from(8 * MIB - 4096).unwrap();
    let mut content = bench.content();
    let word = 4096_u32.to_be_bytes();
    let place = content[at..].windows(4).position(|bytes| bytes == word).unwrap() + at;
    content[place..place + 4].copy_from_slice(&8192_u32.to_be_bytes());
    std::fs::write(bench.device(), content).unwrap();
    let (status, said) = bench.run(&["dump-md"]);
    assert_ne!(status, 0, "{said}");
    assert!(!said.is_empty(), "it says why");
}
