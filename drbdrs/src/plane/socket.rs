//! What is tried on a socket without waiting.

use std::io::IoSlice;

use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags};

use super::buf::Reading;
use super::helpers::count;
use super::io::{Fd, SEND_PARTS};

/// Sends what the transport takes at once; how many bytes that was.
pub(super) fn send(socket: &Fd, from: &[Reading]) -> Result<u32, Errno> {
    let mut parts = [IoSlice::new(&[]); SEND_PARTS];
    for (place, lease) in parts.iter_mut().zip(from) {
        *place = IoSlice::new(lease.bytes());
    }
    let used = parts.get(..from.len()).ok_or(Errno::INVAL)?;
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    rustix::net::sendmsg(socket, used, &mut SendAncillaryBuffer::default(), flags).map(count)
}
