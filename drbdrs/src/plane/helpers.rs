//! Helper threads for what blocks: all file I/O of [`super::threads`], opening of devices and
//! scanning of meta-data in both implementations. Started when needed, up to a limit.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::FallocateFlags;
use rustix::io::{Errno, ReadWriteFlags};

use super::io::{Allocate, Fd, Op};

/// Name of a job, its operation, its result.
pub(super) type Finished = (u64, Op, Result<u32, i32>);

struct Shared {
    work: Mutex<Work>,
    wake: Condvar,
    finished: Mutex<Vec<Finished>>,
    /// Readable while something has finished.
    bell: Fd,
}

#[derive(Default)]
struct Work {
    jobs: VecDeque<(u64, Op)>,
    threads: usize,
    idle: usize,
    is_over: bool,
}

/// The threads.
pub(super) struct Helpers {
    shared: Arc<Shared>,
    threads_max: usize,
    pending: usize,
}

impl Helpers {
    pub(super) fn new(threads_max: usize) -> io::Result<Self> {
        let bell = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let shared = Shared {
            work: Mutex::default(),
            wake: Condvar::new(),
            finished: Mutex::default(),
            bell,
        };
        Ok(Self { shared: Arc::new(shared), threads_max, pending: 0 })
    }

    /// Readable while something has finished.
    pub(super) fn bell(&self) -> &Fd {
        &self.shared.bell
    }

    /// Jobs that have not been taken back.
    pub(super) const fn pending(&self) -> usize {
        self.pending
    }

    /// Starts a job.
    pub(super) fn submit(&mut self, key: u64, op: Op) {
        self.pending += 1;
        let mut work = lock(&self.shared.work);
        work.jobs.push_back((key, op));
        if work.jobs.len() > work.idle && work.threads < self.threads_max {
            let shared = Arc::clone(&self.shared);
            let thread = std::thread::Builder::new().name("drbdrs-io".into());
            // Without a single thread nothing would ever end; with one it is only slower.
            match thread.stack_size(256 << 10).spawn(move || serve(&shared)) {
                Ok(_) => work.threads += 1,
                Err(error) if work.threads == 0 => {
                    let job = work.jobs.pop_back();
                    drop(work);
                    tracing::error!("cannot start a thread for I/O: {error}");
                    let errno = error.raw_os_error().unwrap_or(libc::EAGAIN);
                    if let Some((key, op)) = job {
                        finish(&self.shared, (key, op, Err(errno)));
                    }
                    return;
                }
                Err(_) => {}
            }
        }
        self.shared.wake.notify_one();
    }

    /// Takes back what has finished.
    pub(super) fn collect(&mut self, into: &mut Vec<Finished>) {
        let mut count = [0; 8];
        // Empty is fine: somebody was faster.
        let _ = rustix::io::read(&*self.shared.bell, &mut count);
        let before = into.len();
        into.append(&mut lock(&self.shared.finished));
        self.pending -= into.len() - before;
    }
}

impl Drop for Helpers {
    fn drop(&mut self) {
        lock(&self.shared.work).is_over = true;
        self.shared.wake.notify_all();
        // Threads that hang in a device end when it answers; waiting for them would hang too.
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Jobs that panic are caught outside of the locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn serve(shared: &Shared) {
    let mut work = lock(&shared.work);
    loop {
        if let Some((key, mut op)) = work.jobs.pop_front() {
            drop(work);
            let result = catch_unwind(AssertUnwindSafe(|| run(&mut op)));
            let result = result.unwrap_or(Err(Errno::IO));
            finish(shared, (key, op, result.map_err(Errno::raw_os_error)));
            work = lock(&shared.work);
        } else if work.is_over {
            return;
        } else {
            work.idle += 1;
            work = shared.wake.wait(work).unwrap_or_else(PoisonError::into_inner);
            work.idle -= 1;
        }
    }
}

fn finish(shared: &Shared, finished: Finished) {
    lock(&shared.finished).push(finished);
    ring_bell(&shared.bell);
}

/// Makes an eventfd readable.
#[expect(clippy::host_endian_bytes, reason = "eventfd counts in the byte order of the machine")]
pub(crate) fn ring_bell(bell: &Fd) {
    // Can only fail when the counter is full, and then it is readable.
    let _ = rustix::io::write(bell, &1_u64.to_ne_bytes());
}

/// Does it, blocking.
pub(super) fn run(op: &mut Op) -> Result<u32, Errno> {
    match op {
        Op::Read { file, at, into } => rustix::io::pread(file, into.bytes_mut(), *at).map(count),
        Op::Write { file, at, from, durable: false } => {
            rustix::io::pwrite(file, from.bytes(), *at).map(count)
        }
        Op::Write { file, at, from, durable: true } => {
            let parts = [io::IoSlice::new(from.bytes())];
            match rustix::io::pwritev2(&*file, &parts, *at, ReadWriteFlags::DSYNC) {
                // Older kernels: the slower way to the same end.
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                    let written = rustix::io::pwrite(&*file, from.bytes(), *at)?;
                    rustix::fs::fdatasync(&*file)?;
                    Ok(count(written))
                }
                other => other.map(count),
            }
        }
        Op::Sync { file } => rustix::fs::fdatasync(file).map(|()| 0),
        Op::Allocate { file, how, at, len } => {
            rustix::fs::fallocate(file, allocate_flags(*how), *at, *len).map(|()| 0)
        }
        Op::Call(work) => {
            if let Some(work) = work.take() {
                work();
            }
            Ok(0)
        }
        Op::Recv { .. }
        | Op::Send { .. }
        | Op::Accept { .. }
        | Op::Connect { .. }
        | Op::Ublk { .. }
        | Op::Readable { .. } => Err(Errno::INVAL),
    }
}

pub(super) fn allocate_flags(how: Allocate) -> FallocateFlags {
    match how {
        Allocate::Punch => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        Allocate::Zero => FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
    }
}

pub(super) fn count(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}
