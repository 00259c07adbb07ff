//! Devices with meta-data for tests: recorded ones, and ones made at random.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
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
