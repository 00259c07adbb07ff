//! The command `drbdsetup`, also called `drbdsetup-84`.

use std::os::unix::ffi::OsStringExt;
use std::process::ExitCode;

use bstr::BString;

fn main() -> ExitCode {
    let args = std::env::args_os().map(|a| BString::from(a.into_vec())).collect();
    ExitCode::from(drbdadm::setup::main(args))
}
