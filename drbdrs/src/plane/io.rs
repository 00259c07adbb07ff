//! One interface to the kernel for the whole plane, with two implementations: [`super::ring`] and
//! [`super::threads`]. Nothing here ever blocks but [`Backend::wait`].
//!
//! An operation owns everything that the kernel may touch until it is given back in [`Done`]:
//! leases of buffers and a reference of the file. Completions are matched by slab key and
//! generation, so that a late one cannot hit a reused place.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use super::buf::{Pool, Reading, Writing};
use super::ring::Ring;
use super::threads::Threads;
use crate::front::ublk::abi::IoCommand;

/// An open file or socket; it stays open while an operation uses it.
pub type Fd = Arc<OwnedFd>;

/// Whom an operation belongs to; comes back with its completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag {
    /// Which part of the plane.
    pub part: Part,
    /// Whatever that part likes.
    pub key: u64,
}

/// The parts that submit operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The disk of a volume.
    Disk(u16),
    /// Sockets of the connection.
    Link,
    /// The NBD server.
    Nbd,
    /// The queues of ublk devices.
    Ublk,
    /// Questions about the state of blocks.
    Status,
    /// The channel of commands.
    Control,
}

/// Most buffers of one send.
pub const SEND_PARTS: usize = 64;

/// What the kernel, or a helper thread, is to do.
pub enum Op {
    /// Read from a file.
    Read {
        /// Which.
        file: Fd,
        /// Where, bytes.
        at: u64,
        /// Into this.
        into: Writing,
    },
    /// Write to a file.
    Write {
        /// Which.
        file: Fd,
        /// Where, bytes.
        at: u64,
        /// From this.
        from: Reading,
        /// Through volatile caches.
        durable: bool,
    },
    /// Flush a file.
    Sync {
        /// Which.
        file: Fd,
    },
    /// Change a range of a file without data.
    Allocate {
        /// Which.
        file: Fd,
        /// How.
        how: Allocate,
        /// Where, bytes.
        at: u64,
        /// How much, bytes.
        len: u64,
    },
    /// Receive into one buffer, then into the other. Result 0: the end.
    Recv {
        /// From which socket.
        socket: Fd,
        /// Into these.
        into: [Option<Writing>; 2],
    },
    /// Send from these buffers, at most [`SEND_PARTS`].
    Send {
        /// To which socket.
        socket: Fd,
        /// From these.
        from: Vec<Reading>,
    },
    /// Accept a connection.
    Accept {
        /// On which socket.
        socket: Fd,
        /// The connection.
        accepted: Option<OwnedFd>,
    },
    /// Connect.
    Connect {
        /// Which socket.
        socket: Fd,
        /// Where to.
        to: SocketAddr,
    },
    /// Wait until there is something to read.
    Readable {
        /// Where.
        file: Fd,
    },
    /// Fetch a request of a ublk queue, perhaps after ending one. Only a ring can do it.
    Ublk {
        /// The device of the queue.
        device: Fd,
        /// See `front::ublk::abi::io`.
        command: u32,
        /// What is fetched, and how the last one ended.
        request: IoCommand,
    },
    /// Run something that may block on a helper thread. It leaves its answer where the caller
    /// finds it.
    Call(Option<Box<dyn FnOnce() + Send>>),
}

/// How a range is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocate {
    /// Space is given back; the range reads as zeroes.
    Punch,
    /// The range reads as zeroes, and space stays.
    Zero,
}

impl fmt::Debug for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Read { at, into, .. } => write!(f, "Read({at}, {into:?})"),
            Self::Write { at, from, durable, .. } => write!(f, "Write({at}, {from:?}, {durable})"),
            Self::Sync { .. } => f.write_str("Sync"),
            Self::Allocate { how, at, len, .. } => write!(f, "{how:?}({at} +{len})"),
            Self::Recv { into, .. } => write!(f, "Recv({into:?})"),
            Self::Send { from, .. } => write!(f, "Send({from:?})"),
            Self::Accept { .. } => f.write_str("Accept"),
            Self::Connect { to, .. } => write!(f, "Connect({to})"),
            Self::Readable { .. } => f.write_str("Readable"),
            Self::Ublk { request, .. } => write!(f, "Ublk({request:?})"),
            Self::Call(_) => f.write_str("Call"),
        }
    }
}

impl Op {
    /// Gives all leases back to the pool.
    pub fn give_back(self, pool: &mut Pool) {
        match self {
            Self::Read { into, .. } => pool.take_back_mut(into),
            Self::Write { from, .. } => pool.take_back(from),
            Self::Recv { into, .. } => {
                into.into_iter().flatten().for_each(|lease| pool.take_back_mut(lease));
            }
            Self::Send { from, .. } => from.into_iter().for_each(|lease| pool.take_back(lease)),
            Self::Sync { .. }
            | Self::Allocate { .. }
            | Self::Accept { .. }
            | Self::Connect { .. }
            | Self::Readable { .. }
            | Self::Ublk { .. }
            | Self::Call(_) => {}
        }
    }
}

/// An operation has ended.
#[derive(Debug)]
pub struct Done {
    /// Whose it was.
    pub tag: Tag,
    /// What it was, with everything it owned.
    pub op: Op,
    /// Bytes, or the errno.
    pub result: Result<u32, i32>,
}

/// Names an operation in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpKey(pub(super) u64);

/// Who talks to the kernel. Belongs to one thread.
pub trait Backend {
    /// Its name, for the log.
    fn name(&self) -> &'static str;

    /// Starts an operation, at the latest with the next [`Self::wait`]. Exactly one [`Done`]
    /// follows.
    fn submit(&mut self, tag: Tag, op: Op) -> OpKey;

    /// Asks for an early end of an operation on a socket or of a [`Op::Readable`]; its [`Done`]
    /// says `ECANCELED` unless it was faster.
    fn cancel(&mut self, key: OpKey);

    /// Looks out for the end of an operation for so long, awake. True: the next [`Self::wait`] finds
    /// one. Where that costs a system call for each look, it is not done.
    ///
    /// # Errors
    /// As for [`Self::wait`].
    fn look_out(&mut self, limit: Duration) -> io::Result<bool> {
        let _ = limit;
        Ok(false)
    }

    /// Waits until at least one operation has ended or the time is over (`None`: without limit),
    /// and appends those that have ended.
    ///
    /// # Errors
    /// The kernel refuses to go on; the plane cannot continue.
    fn wait(&mut self, limit: Option<Duration>, done: &mut Vec<Done>) -> io::Result<()>;

    /// Operations that have not ended.
    fn in_flight(&self) -> usize;
}

/// Which implementation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// The ring where the kernel has it and allows it.
    #[default]
    Auto,
    /// The ring.
    Ring,
    /// Helper threads.
    Threads,
}

impl Choice {
    /// From the environment variable `DRBDRS_IO`: `auto`, `ring`, `threads`.
    ///
    /// # Errors
    /// Another word.
    pub fn from_env() -> io::Result<Self> {
        match std::env::var("DRBDRS_IO").as_deref() {
            Err(_) | Ok("" | "auto") => Ok(Self::Auto),
            Ok("ring") => Ok(Self::Ring),
            Ok("threads") => Ok(Self::Threads),
            Ok(other) => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("DRBDRS_IO is {other:?}; it may be auto, ring or threads"),
            )),
        }
    }
}

/// Makes one, on the thread that will use it. Says in the log, once per process, which it is.
///
/// # Errors
/// The ring was demanded and is not possible, or there are too many open files.
pub fn backend(choice: Choice) -> io::Result<Box<dyn Backend>> {
    static SAID: std::sync::Once = std::sync::Once::new();
    let ring = match choice {
        Choice::Threads => Err(io::Error::other("not wanted")),
        Choice::Ring | Choice::Auto => Ring::new(),
    };
    match ring {
        Ok(ring) => {
            SAID.call_once(|| tracing::info!("I/O through io_uring"));
            Ok(Box::new(ring))
        }
        Err(error) if choice == Choice::Ring => Err(error),
        Err(error) => {
            let threads = Threads::new()?;
            SAID.call_once(|| tracing::info!("I/O through helper threads (io_uring: {error})"));
            Ok(Box::new(threads))
        }
    }
}

#[cfg(test)]
#[path = "io_tests.rs"]
mod tests;
