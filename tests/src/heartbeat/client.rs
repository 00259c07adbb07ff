//! An iSCSI initiator (libiscsi in qemu-io) that writes all the time and remembers what.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::machine::Machine;

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 2000;

/// One session.
#[derive(Debug)]
pub struct Client {
    child: Child,
    input: ChildStdin,
    output: ChildStdout,
    /// The pattern of each block that was written.
    written: BTreeMap<u64, u8>,
    count: u64,
}

impl Client {
    pub(super) fn open(machine: &Machine, url: &str) -> Result<Self> {
        let mut command = machine.command("sh");
        command.args(["-c", "exec qemu-io -f raw -t none $0 2>&1", url]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn()?;
        let input = child.stdin.take().context("a pipe")?;
        let output = child.stdout.take().context("a pipe")?;
        let mut client = Self { child, input, output, written: BTreeMap::new(), count: 0 };
        client.write_one().context("the first write")?;
        Ok(client)
    }

    fn ask(&mut self, words: &str) -> Result<String> {
        self.input.write_all(format!("{words}\n").as_bytes())?;
        let mut said = Vec::new();
        let mut part = [0; 4096];
        loop {
            let n = self.output.read(&mut part)?;
            said.extend_from_slice(part.get(..n).unwrap_or_default());
            let text = String::from_utf8_lossy(&said);
            if n == 0 || text.contains("failed") || text.contains("rror") {
                bail!("{words}: {text}");
            }
            if text.contains("ops;") && text.contains("sec)") {
                return Ok(text.into_owned());
            }
        }
    }

    fn write_one(&mut self) -> Result<()> {
        self.count += 1;
        let (block, pattern) = (self.count % BLOCKS, u8::try_from(self.count % 251 + 1)?);
        self.ask(&format!("write -P {pattern} {} {BLOCK}", block * BLOCK))?;
        self.written.insert(block, pattern);
        Ok(())
    }

    /// Writes a block every 20 ms until told to stop; the longest time that one took.
    ///
    /// # Errors
    /// A write failed.
    pub fn write_until(&mut self, stop: &AtomicBool) -> Result<Duration> {
        let mut longest = Duration::ZERO;
        while !stop.load(Ordering::Relaxed) {
            let start = Instant::now();
            self.write_one()?;
            longest = longest.max(start.elapsed());
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(longest)
    }

    /// Reads everything that was written.
    ///
    /// # Errors
    /// Something else is there.
    pub fn verify(&mut self) -> Result<()> {
        ensure!(!self.written.is_empty(), "nothing was written");
        for (block, pattern) in self.written.clone() {
            let text = self.ask(&format!("read -P {pattern} {} {BLOCK}", block * BLOCK))?;
            ensure!(!text.contains("verification"), "block {block}: {text}");
        }
        Ok(())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.input.write_all(b"quit\n");
        // It ends by itself unless the server is away.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
