//! Devices with meta-data for tests: recorded ones, and ones made at random.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use rustix::fs::{SeekFrom, seek};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::fixtures;

/// A piece of a device.
#[derive(Clone, Debug, Deserialize)]
pub struct Extract {
    /// Compressed content.
    pub file: String,
    /// Where it lies on the device.
    pub offset: u64,
    /// Its length.
    pub length: u64,
}

/// What a recorded command did.
#[derive(Clone, Debug, Deserialize)]
pub struct Recorded {
    /// Exit status.
    pub rc: i32,
    /// Its output.
    pub stdout: String,
    /// Its messages.
    pub stderr: String,
}

/// One recorded device.
#[derive(Clone, Debug, Deserialize)]
pub struct Fixture {
    /// Its name.
    pub id: String,
    /// `internal`, `flex-external` or an index.
    pub placement: String,
    /// Length of the device in bytes.
    pub md_device_size: u64,
    /// What is on it.
    pub extract: Vec<Extract>,
    /// Commands of drbdmeta 9.22.
    pub reference: Map<String, Value>,
    /// The same by newer tools, where they differ.
    pub reference_new_differs: Map<String, Value>,
    /// Decoded values.
    pub expect: Value,
    /// Everything else.
    #[serde(flatten)]
    pub more: Map<String, Value>,
}

impl Fixture {
    /// A list of pieces under another key.
    ///
    /// # Errors
    /// It is no such list.
    pub fn pieces(&self, key: &str) -> Result<Option<Vec<Extract>>> {
        self.more.get(key).map(|v| Ok(serde_json::from_value(v.clone())?)).transpose()
    }

    /// A text file under another key.
    ///
    /// # Errors
    /// It can not be read.
    pub fn text(&self, key: &str) -> Result<Option<String>> {
        let Some(name) = self.more.get(key).and_then(Value::as_str) else { return Ok(None) };
        let path = folder().join(name);
        let bytes = std::fs::read(&path).with_context(|| path.display().to_string())?;
        let bytes = if name.ends_with(".xz") { unpack(&bytes)? } else { bytes };
        Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// Makes the device as a sparse file.
    ///
    /// # Errors
    /// No room, or a fixture is missing.
    pub fn write_device(&self, path: &Path) -> Result<()> {
        let file = File::create(path)?;
        file.set_len(self.md_device_size)?;
        for piece in &self.extract {
            file.write_all_at(&piece.bytes()?, piece.offset)?;
        }
        Ok(())
    }
}

impl Extract {
    /// The content.
    ///
    /// # Errors
    /// The fixture is missing or damaged.
    pub fn bytes(&self) -> Result<Vec<u8>> {
        let bytes = unpack(&std::fs::read(folder().join(&self.file))?)?;
        anyhow::ensure!(u64::try_from(bytes.len())? == self.length, "{} is cut", self.file);
        Ok(bytes)
    }
}

fn folder() -> PathBuf {
    fixtures().join("metadata")
}

fn unpack(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut unpacked = Vec::new();
    std::io::Read::read_to_end(&mut lzma_rust2::XzReader::new(bytes, false), &mut unpacked)?;
    Ok(unpacked)
}

/// All recorded devices.
///
/// # Errors
/// The index is missing.
pub fn read_all() -> Result<Vec<Fixture>> {
    #[derive(Deserialize)]
    struct Index {
        fixtures: Vec<Fixture>,
    }
    let text = std::fs::read_to_string(folder().join("index.json"))?;
    Ok(serde_json::from_str::<Index>(&text)?.fixtures)
}

/// Runs a program without a terminal.
///
/// # Errors
/// It can not be started.
pub fn run(program: &Path, args: &[&str]) -> Result<Recorded> {
    let output = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .with_context(|| program.display().to_string())?;
    Ok(Recorded {
        rc: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// Reads a part of a file.
///
/// # Errors
/// It ends before.
pub fn read_part(path: &Path, offset: u64, length: u64) -> Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(length)?];
    OpenOptions::new().read(true).open(path)?.read_exact_at(&mut bytes, offset)?;
    Ok(bytes)
}

/// Random numbers that come again with the same seed.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A sequence of its own for every seed.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number (splitmix64).
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `end`.
    pub const fn below(&mut self, end: u64) -> u64 {
        if end == 0 { 0 } else { self.next() % end }
    }
}

/// A loop device; it goes away with this value.
#[derive(Debug)]
pub struct Loop {
    /// Its path.
    pub name: String,
}

impl Loop {
    /// A loop device above this file.
    ///
    /// # Errors
    /// No root, or no loop devices.
    pub fn new(file: &Path) -> Result<Self> {
        let output = Command::new("losetup").args(["-f", "--show"]).arg(file).output()?;
        let told = String::from_utf8_lossy(&output.stderr);
        anyhow::ensure!(output.status.success(), "losetup: {told}");
        Ok(Self { name: String::from_utf8(output.stdout)?.trim().to_string() })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.name]).status();
    }
}

/// Something that create-md must notice at the start of a device: its name, and what lies where.
pub fn foreign_data(random: &mut Random) -> (&'static str, Vec<(u64, Vec<u8>)>) {
    // Sometimes larger than the device, sometimes zero.
    let blocks = random.below(24_000);
    let word = |n: u64| n.to_le_bytes()[..4].to_vec();
    let long = |n: u64| n.to_le_bytes().to_vec();
    match random.below(8) {
        0 => ("swap", vec![(4086, b"SWAPSPACE2".to_vec())]),
        1 => ("ext2", vec![(0x404, word(blocks)), (0x438, vec![0x53, 0xEF])]),
        2 => (
            "ext3",
            vec![
                (0x404, word(blocks / 4)),
                (0x418, word(random.below(4))),
                (0x438, vec![0x53, 0xEF]),
                (0x45C, vec![4]),
            ],
        ),
        3 => (
            "xfs",
            vec![
                (0, b"XFSB".to_vec()),
                (4, 512u32.to_be_bytes().to_vec()),
                (8, blocks.to_be_bytes().to_vec()),
            ],
        ),
        4 => ("jfs", vec![(0x8000, b"JFS1".to_vec()), (0x8008, long(blocks)), (0x8018, word(512))]),
        5 => (
            "reiser",
            vec![
                (0x1_0000, word(blocks / 8)),
                (0x1_002C, vec![0, 16]),
                (0x1_0034, b"ReIsEr2Fs".to_vec()),
            ],
        ),
        6 => ("LVM2", vec![(0x218, b"LVM2 001".to_vec())]),
        _ => ("noise", vec![(random.below(60_000), long(random.next()))]),
    }
}

/// Blocks that are not zero, by number.
pub type Blocks = BTreeMap<u64, Vec<u8>>;

/// Reads a file without its holes.
///
/// # Errors
/// It can not be read.
pub fn blocks(path: &Path) -> Result<Blocks> {
    let file = File::open(path)?;
    let len = file.metadata()?.len();
    let (mut found, mut at) = (Blocks::new(), 0);
    while let Ok(data) = seek(&file, SeekFrom::Data(at)) {
        let end = seek(&file, SeekFrom::Hole(data))?;
        at = data / 4096 * 4096;
        while at < end {
            let mut block = vec![0; usize::try_from((len - at).min(4096))?];
            file.read_exact_at(&mut block, at)?;
            if block.iter().any(|b| *b != 0) {
                found.insert(at / 4096, block);
            }
            at += 4096;
        }
    }
    Ok(found)
}
