//! create-md. Spec: config-and-drbdadm.md §16.

use std::io::Read;

use bstr::ByteSlice;
use drbd_conf::model::Volume;

use crate::app::App;
use crate::backend::Stderr;
use crate::lines::Lines;

/// Reads the device's identifier, creates the meta-data, and writes the identifier back (or a
/// random one).
pub fn run(app: &App, lines: &Lines<'_>, volume: &Volume) -> i32 {
    let create = lines.meta(volume, "create-md");
    if app.backend.dry_run {
        return app.backend.run(&create).code;
    }
    let mut read = lines.meta(volume, "read-dev-uuid").stderr(Stderr::Discard);
    read.silent = true;
    read.capture_stdout = true;
    let known = app.backend.run(&read).stdout;
    let known = known.to_str().ok().and_then(|t| u64::from_str_radix(t.trim(), 16).ok());
    let code = app.backend.run(&create).code;
    if code != 0 {
        return code;
    }
    let uuid = known.filter(|u| *u != 0).unwrap_or_else(random);
    let plain = Lines { resource: lines.resource, extra: &[] };
    let write = plain.meta(volume, "write-dev-uuid").arg(format!("{uuid:016X}"));
    app.backend.run(&write).code
}

fn random() -> u64 {
    let mut bytes = [0u8; 8];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut bytes));
    // Without the system's source of randomness the identifier is only less unique.
    if read.is_err() {
        return u64::from(std::process::id()) << 32 | 1;
    }
    u64::from_be_bytes(bytes)
}
