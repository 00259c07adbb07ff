//! The command `drbdadm`.

use std::os::unix::ffi::OsStringExt;
use std::process::ExitCode;

use bstr::BString;

fn main() -> ExitCode {
    let args = std::env::args_os().map(|a| BString::from(a.into_vec())).collect();
    let code = drbdadm::main(args);
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}
