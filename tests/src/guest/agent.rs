//! The host's side of the guest's control port: one TCP connection per request.
//!
//! The request says a random token; output ends with a line that has it and the exit status, so a
//! background process that keeps the connection open does no harm.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// What a script said and how it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Standard output and standard error, in the order of writing.
    pub out: String,
    /// Exit status.
    pub status: i32,
}

/// A script that runs in the guest.
#[derive(Debug)]
pub struct Job {
    stream: TcpStream,
    token: String,
    received: Vec<u8>,
    script: String,
}

impl Job {
    /// Starts a script with `sh`.
    pub(super) fn start(port: u16, script: &str) -> Result<Self> {
        let (stream, token) = request(port, "run", script.as_bytes(), "")?;
        Ok(Self { stream, token, received: Vec::new(), script: script.to_owned() })
    }

    /// Has it ended? Returns at once.
    ///
    /// # Errors
    /// The guest is gone.
    pub fn is_done(&mut self) -> Result<bool> {
        self.stream.set_nonblocking(true)?;
        let result = self.read_until(Instant::now());
        self.stream.set_nonblocking(false)?;
        result
    }

    /// What it has said so far.
    pub fn so_far(&self) -> String {
        String::from_utf8_lossy(&self.received).into_owned()
    }

    /// What it has said since the last call; for scripts that go on talking.
    ///
    /// # Errors
    /// The guest is gone, or the script has ended.
    pub fn take(&mut self) -> Result<String> {
        ensure!(!self.is_done()?, "ended: {}\n{}", self.script, self.so_far());
        Ok(String::from_utf8_lossy(&std::mem::take(&mut self.received)).into_owned())
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It lasts longer than the deadline, or the guest is gone.
    pub fn wait(self, deadline: Duration) -> Result<Output> {
        let (out, status) = self.wait_bytes(deadline)?;
        Ok(Output { out: String::from_utf8_lossy(&out).into_owned(), status })
    }

    pub(super) fn wait_bytes(mut self, deadline: Duration) -> Result<(Vec<u8>, i32)> {
        let end = Instant::now() + deadline;
        if !self.read_until(end)? {
            bail!("after {deadline:?} still running: {}\n{}", self.script, self.so_far());
        }
        let (at, status) = self.trailer().context("no trailer")?;
        self.received.truncate(at);
        Ok((self.received, status))
    }

    /// Reads until the trailer has come (`true`) or the time is up.
    fn read_until(&mut self, end: Instant) -> Result<bool> {
        let mut buffer = vec![0; 1 << 16];
        while self.trailer().is_none() {
            let left = end.saturating_duration_since(Instant::now());
            // Zero would mean to wait for ever.
            self.stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
            match self.stream.read(&mut buffer) {
                Ok(0) => bail!("the guest closed its control connection: {}", self.script),
                Ok(n) => self.received.extend_from_slice(&buffer[..n]),
                Err(e) if [ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&e.kind()) => {
                    if Instant::now() >= end {
                        return Ok(false);
                    }
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e).context("control connection of the guest"),
            }
        }
        Ok(true)
    }

    /// Where it begins, and the status that it says.
    fn trailer(&self) -> Option<(usize, i32)> {
        let tail = self.received.len().saturating_sub(self.token.len() + 8);
        let text = std::str::from_utf8(&self.received[tail..]).ok().or_else(|| {
            // The end of binary output may be cut inside of a character.
            let at = self.received.iter().rposition(|b| *b == b'\n')?;
            let at = self.received[..at].iter().rposition(|b| *b == b'\n')?;
            std::str::from_utf8(&self.received[at..]).ok()
        })?;
        let text = text.strip_suffix('\n')?;
        let (before, line) = text.rsplit_once('\n')?;
        let status = line.strip_prefix(self.token.as_str())?.trim().parse().ok()?;
        let _ = before;
        Some((self.received.len() - line.len() - 2, status))
    }
}

/// Writes a file in the guest.
pub(super) fn put(port: u16, path: &str, content: &[u8], deadline: Duration) -> Result<()> {
    ensure!(path.starts_with('/') && !path.contains('\n'), "{path:?} is no absolute path");
    let (stream, token) = request(port, "put", content, path)?;
    let job = Job { stream, token, received: Vec::new(), script: format!("put {path}") };
    let output = job.wait(deadline)?;
    ensure!(output.status == 0, "cannot write {path} in the guest: {}", output.out);
    Ok(())
}

fn request(port: u16, verb: &str, body: &[u8], rest: &str) -> Result<(TcpStream, String)> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))
        .context("control connection of the guest")?;
    stream.set_nodelay(true)?;
    let token = token()?;
    stream.write_all(format!("{verb} {} {token} {rest}\n", body.len()).as_bytes())?;
    stream.write_all(body)?;
    Ok((stream, token))
}

fn token() -> Result<String> {
    let mut bytes = [0; 12];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn answer(bytes: &'static [u8]) -> Job {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut peer, _) = listener.accept().unwrap();
        peer.write_all(bytes).unwrap();
        Job { stream, token: "t0".into(), received: Vec::new(), script: "x".into() }
    }

    #[test]
    fn output_ends_at_the_trailer() {
        let output = answer(b"a\nb\n\nt0 7\n").wait(Duration::from_secs(5)).unwrap();
        assert_eq!(output, Output { out: "a\nb\n".into(), status: 7 });
        let (bytes, status) =
            answer(b"\xff\xc3\nt0 0\n").wait_bytes(Duration::from_secs(5)).unwrap();
        assert_eq!((bytes.as_slice(), status), (&b"\xff\xc3"[..], 0));
        let error = answer(b"t1 0\n").wait(Duration::from_secs(5)).unwrap_err();
        assert!(error.to_string().contains("closed"), "{error}");
    }
}
