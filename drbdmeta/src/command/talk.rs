//! Output and questions.

use std::io::{self, BufRead, IsTerminal, Write};

/// Text for stdout. A closed pipe is no reason to stop changing meta-data half way.
pub(super) fn out(text: &str) {
    let _ = io::stdout().lock().write_all(text.as_bytes());
}

/// Text for stderr, behind everything that went to stdout before.
pub(super) fn err(text: &str) {
    flush();
    let _ = io::stderr().lock().write_all(text.as_bytes());
}

pub(super) fn flush() {
    let _ = io::stdout().lock().flush();
}

/// Asks; only a line `yes` means yes.
/// Spec: metadata.md §8.7.
pub(super) fn is_confirmed(question: &str, force: bool) -> bool {
    err(&format!("\n{question}\n"));
    if force {
        err("*** confirmation forced via --force option ***\n");
        return true;
    }
    if !io::stdin().is_terminal() {
        err("stdin not a TTY, not waiting for confirmation\n");
        return false;
    }
    err("[need to type 'yes' to confirm] ");
    let mut line = String::new();
    let read = io::stdin().lock().read_line(&mut line);
    err("\n");
    read.is_ok() && line == "yes\n"
}
