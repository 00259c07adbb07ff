//! Output that survives a reader who goes away, in the order in which it was written.

use std::io::Write;

/// Writes to stdout; a closed pipe is nobody's fault.
pub fn stdout(text: &[u8]) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text).and_then(|()| out.flush());
}

/// Writes to stderr.
pub fn stderr(text: &[u8]) {
    let mut err = std::io::stderr().lock();
    let _ = err.write_all(text).and_then(|()| err.flush());
}

/// Writes a line to stderr.
pub fn complain(text: impl AsRef<[u8]>) {
    let mut line = text.as_ref().to_vec();
    if !line.ends_with(b"\n") {
        line.push(b'\n');
    }
    stderr(&line);
}
