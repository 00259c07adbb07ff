//! The few system calls that nobody else wraps.
#![expect(unsafe_code, reason = "ioctl numbers are paired with their types here")]

use std::io;
use std::os::fd::AsFd;

use rustix::ioctl::{Getter, Opcode, ioctl};

/// `SIOCOUTQ`.
const UNSENT: Opcode = 0x5411;

/// Bytes of a TCP socket that the other side has not acknowledged.
///
/// # Errors
/// Not a connected socket.
pub fn unsent_bytes(socket: impl AsFd) -> io::Result<u64> {
    // SAFETY: this ioctl writes one C int.
    let getter = unsafe { Getter::<UNSENT, libc::c_int>::new() };
    // SAFETY: as above; on anything but a socket it fails or, for a terminal, also writes an int.
    let bytes = unsafe { ioctl(socket, getter) }?;
    Ok(u64::try_from(bytes).unwrap_or(0))
}
