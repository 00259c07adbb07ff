//! Memory that the kernel's ublk driver reads or writes: arguments of commands to its control
//! device, and the table of requests of a queue. What it means is the business of `front::ublk`.
#![expect(unsafe_code, reason = "hands pointers to the kernel and maps its memory")]

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::time::Duration;

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use rustix::mm::{MapFlags, ProtFlags};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::front::ublk::abi::{ControlCommand, IoDesc, NO_QUEUE, QUEUE_DEPTH_MAX};
use crate::plane::buf::PAGE;

/// A command to the control device, blocking: some wait for what the queue's thread does.
///
/// # Errors
/// The driver's, or there is no `io_uring`.
pub fn control<T: FromBytes + IntoBytes>(
    driver: &OwnedFd,
    command: u32,
    device: u32,
    data: u64,
    argument: &mut T,
) -> io::Result<()> {
    let len = u16::try_from(size_of::<T>()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let head = ControlCommand {
        device,
        queue: NO_QUEUE,
        len,
        address: std::ptr::from_mut(argument).expose_provenance() as u64,
        data,
        path_len: 0,
        pad: 0,
        reserved: 0,
    };
    let mut bytes = [0; 80];
    for (to, from) in bytes.iter_mut().zip(head.as_bytes()) {
        *to = *from;
    }
    let entry = opcode::UringCmd80::new(types::Fd(driver.as_raw_fd()), command).cmd(bytes).build();
    // Rare enough for a ring of its own: what is in it can not be anything but this command.
    let mut ring = IoUring::<squeue::Entry128, cqueue::Entry>::builder().build(1)?;
    // SAFETY: the command points to `argument`, which is borrowed until this function returns, and
    // it returns only when the kernel has ended the command or never taken it. `T` may have any
    // content, without padding.
    unsafe { ring.submission().push(&entry) }.map_err(io::Error::other)?;
    loop {
        if let Some(done) = ring.completion().next() {
            return match done.result() {
                0.. => Ok(()),
                errno => Err(io::Error::from_raw_os_error(-errno)),
            };
        }
        match ring.submit_and_wait(1) {
            Err(error) if !ring.submission().is_empty() && !is_passing(&error) => {
                return Err(error);
            }
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
            Ok(_) => {}
        }
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
}

/// The requests of a queue: written by the kernel, read here.
pub struct Table {
    base: NonNull<IoDesc>,
    depth: u16,
}

// SAFETY: the mapping belongs to no thread, and nobody here writes to it.
unsafe impl Send for Table {}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Table({})", self.depth)
    }
}

impl Table {
    /// Maps the table of a queue.
    ///
    /// # Errors
    /// The device has no such queue, or its depth is another one.
    pub fn new(device: &OwnedFd, queue: u16, depth: u16) -> io::Result<Self> {
        let room = (QUEUE_DEPTH_MAX * size_of::<IoDesc>()).next_multiple_of(PAGE);
        let at = u64::from(queue) * room as u64;
        let place = std::ptr::null_mut();
        let (access, how) = (ProtFlags::READ, MapFlags::SHARED | MapFlags::POPULATE);
        // SAFETY: a new mapping at a place of the kernel's choice touches nothing else.
        let base = unsafe { rustix::mm::mmap(place, Self::len(depth), access, how, device, at) }?;
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, depth })
    }

    fn len(depth: u16) -> usize {
        (usize::from(depth) * size_of::<IoDesc>()).next_multiple_of(PAGE)
    }

    /// A request. Means something from the completion that announced it to its commit.
    pub fn get(&self, tag: u16) -> Option<IoDesc> {
        if tag >= self.depth {
            return None;
        }
        // SAFETY: inside the mapping, whose beginning is a page's.
        let place = unsafe { self.base.add(tag.into()) };
        // SAFETY: as above. The kernel changes it only while it owns the tag; and any bytes would
        // be a value of this type.
        Some(unsafe { place.as_ptr().read_volatile() })
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        let base = self.base.as_ptr().cast();
        // SAFETY: nobody else has this mapping, and `get` gives copies.
        let result = unsafe { rustix::mm::munmap(base, Self::len(self.depth)) };
        debug_assert!(result.is_ok(), "the mapping is ours");
    }
}

/// The argument of commands without one.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Nothing(u64);
