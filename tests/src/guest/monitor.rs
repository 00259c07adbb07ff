//! QEMU's monitor: cutting links, adding port forwards, freezing the guest.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// A connection to the monitor.
#[derive(Debug)]
pub(super) struct Monitor {
    stream: BufReader<UnixStream>,
}

impl Monitor {
    /// Connects; QEMU must have made the socket.
    pub(super) fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path).context("QEMU's monitor")?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        let mut monitor = Self { stream: BufReader::new(stream) };
        monitor.line()?; // the greeting
        monitor.call("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    /// One command with its answer.
    pub(super) fn call(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.stream.get_mut().write_all(format!("{request}\n").as_bytes())?;
        loop {
            let mut answer = self.line()?;
            if let Some(error) = answer.get("error") {
                bail!("{command}: {error}");
            }
            // Events come in between.
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    /// One command of the monitor for people; returns its text.
    pub(super) fn text(&mut self, line: &str) -> Result<String> {
        let answer = self.call("human-monitor-command", &json!({ "command-line": line }))?;
        Ok(answer.as_str().unwrap_or_default().to_owned())
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        let n = self.stream.read_line(&mut line).context("QEMU's monitor")?;
        if n == 0 {
            bail!("QEMU has ended");
        }
        Ok(serde_json::from_str(&line)?)
    }
}
