//! The kernel through helper threads (files) and epoll (sockets), where `io_uring` is forbidden.
//!
//! A socket operation is tried at once; what would block waits for epoll, one receive and one send
//! per socket. Files go to the helper threads, since nothing else makes them not block.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use drbd_core::slab::{Key, Slab};
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SocketFlags};

use super::helpers::{Finished, Helpers, count};
use super::io::{Backend, Done, Fd, Op, OpKey, Tag};

const HELPERS_MAX: usize = 8;
const BELL: u64 = u64::MAX;

struct InFlight {
    tag: Tag,
    /// `None`: a helper thread has it.
    op: Option<Op>,
}

/// What waits for a socket.
#[derive(Clone, Copy, Default)]
struct Watch {
    readable: Option<u64>,
    writable: Option<u64>,
}

/// The backend.
pub struct Threads {
    epoll: Fd,
    helpers: Helpers,
    in_flight: Slab<InFlight>,
    watches: BTreeMap<RawFd, Watch>,
    /// Ended without waiting; given out by the next wait.
    ready: VecDeque<Done>,
    events: Vec<epoll::Event>,
    finished: Vec<Finished>,
}

impl Threads {
    /// Sets it up; threads start when they are needed.
    ///
    /// # Errors
    /// Too many open files.
    pub fn new() -> io::Result<Self> {
        let epoll = Fd::new(epoll::create(epoll::CreateFlags::CLOEXEC)?);
        let helpers = Helpers::new(HELPERS_MAX)?;
        epoll::add(&epoll, helpers.bell(), epoll::EventData::new_u64(BELL), epoll::EventFlags::IN)?;
        Ok(Self {
            epoll,
            helpers,
            in_flight: Slab::new(),
            watches: BTreeMap::new(),
            ready: VecDeque::new(),
            events: Vec::with_capacity(64),
            finished: Vec::new(),
        })
    }

    /// Tries a socket operation. `None`: it would block.
    fn attempt(&mut self, key: u64) {
        let Some(entry) = self.in_flight.get_mut(Key::from_raw(key)) else { return };
        let Some(op) = entry.op.as_mut() else { return };
        match try_socket(op) {
            Err(Errno::AGAIN | Errno::INTR | Errno::INPROGRESS | Errno::ALREADY) => {
                let (fd, is_reader) = socket_of(op);
                let watch = self.watches.entry(fd.as_raw_fd()).or_default();
                let place = if is_reader { &mut watch.readable } else { &mut watch.writable };
                *place = Some(key);
                let (fd, watch) = (Fd::clone(fd), *watch);
                if let Err(errno) = self.arm(&fd, watch) {
                    self.forget(&fd, key);
                    self.end(key, Err(errno));
                }
            }
            other => self.end(key, other),
        }
    }

    fn end(&mut self, key: u64, result: Result<u32, Errno>) {
        let Some(entry) = self.in_flight.remove(Key::from_raw(key)) else { return };
        let Some(op) = entry.op else { return };
        self.ready.push_back(Done {
            tag: entry.tag,
            op,
            result: result.map_err(Errno::raw_os_error),
        });
    }

    /// Removes what a socket waits for, and returns the rest.
    fn forget(&mut self, fd: &Fd, key: u64) {
        let raw = fd.as_raw_fd();
        let Some(watch) = self.watches.get_mut(&raw) else { return };
        for place in [&mut watch.readable, &mut watch.writable] {
            if *place == Some(key) {
                *place = None;
            }
        }
        let watch = *watch;
        if watch.readable.is_none() && watch.writable.is_none() {
            self.watches.remove(&raw);
        }
        // What is left has been armed before; then it can be armed again.
        let _ = self.arm(fd, watch);
    }

    /// One shot: whoever is woken arms again. A socket that was closed leaves epoll by itself.
    fn arm(&self, fd: &Fd, watch: Watch) -> Result<(), Errno> {
        let mut flags = epoll::EventFlags::ONESHOT;
        flags.set(epoll::EventFlags::IN, watch.readable.is_some());
        flags.set(epoll::EventFlags::OUT, watch.writable.is_some());
        let raw = u64::try_from(fd.as_raw_fd()).map_err(|_| Errno::BADF)?;
        let data = epoll::EventData::new_u64(raw);
        match epoll::modify(&self.epoll, fd, data, flags) {
            Err(Errno::NOENT) if watch.readable.is_none() && watch.writable.is_none() => Ok(()),
            Err(Errno::NOENT) => epoll::add(&self.epoll, fd, data, flags),
            other => other,
        }
    }

    /// Something happened on a socket: both directions try again.
    fn woken(&mut self, raw: u64) {
        let Some(watch) = RawFd::try_from(raw).ok().and_then(|raw| self.watches.remove(&raw))
        else {
            return;
        };
        for key in [watch.readable, watch.writable].into_iter().flatten() {
            self.attempt(key);
        }
    }

    fn collect_helpers(&mut self) {
        let mut finished = std::mem::take(&mut self.finished);
        self.helpers.collect(&mut finished);
        for (key, op, result) in finished.drain(..) {
            if let Some(entry) = self.in_flight.remove(Key::from_raw(key)) {
                self.ready.push_back(Done { tag: entry.tag, op, result });
            }
        }
        self.finished = finished;
    }
}

impl Backend for Threads {
    fn name(&self) -> &'static str {
        "threads"
    }

    fn submit(&mut self, tag: Tag, op: Op) -> OpKey {
        match op {
            Op::Recv { .. }
            | Op::Send { .. }
            | Op::Accept { .. }
            | Op::Connect { .. }
            | Op::Readable { .. } => {
                if let Op::Accept { socket, .. } | Op::Connect { socket, .. } = &op {
                    // Can only fail for what is no socket; that fails below too.
                    let _ = rustix::io::ioctl_fionbio(socket, true);
                }
                let key = self.in_flight.insert(InFlight { tag, op: Some(op) }).raw();
                self.attempt(key);
                OpKey(key)
            }
            Op::Ublk { .. } => {
                let key = self.in_flight.insert(InFlight { tag, op: Some(op) }).raw();
                self.end(key, Err(Errno::NOSYS));
                OpKey(key)
            }
            Op::Read { .. }
            | Op::Write { .. }
            | Op::Sync { .. }
            | Op::Allocate { .. }
            | Op::Call(_) => {
                let key = self.in_flight.insert(InFlight { tag, op: None }).raw();
                self.helpers.submit(key, op);
                OpKey(key)
            }
        }
    }

    fn cancel(&mut self, key: OpKey) {
        let Some(op) = self.in_flight.get(Key::from_raw(key.0)).and_then(|e| e.op.as_ref()) else {
            return;
        };
        let fd = Fd::clone(socket_of(op).0);
        self.forget(&fd, key.0);
        self.end(key.0, Err(Errno::CANCELED));
    }

    fn wait(&mut self, limit: Option<Duration>, done: &mut Vec<Done>) -> io::Result<()> {
        let limit = if self.ready.is_empty() { limit } else { Some(Duration::ZERO) };
        let limit = match limit.map(Timespec::try_from) {
            Some(Ok(limit)) => Some(limit),
            Some(Err(_)) | None => None,
        };
        let mut events = std::mem::take(&mut self.events);
        events.clear();
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), limit.as_ref())
        {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        for event in &events {
            match event.data.u64() {
                BELL => self.collect_helpers(),
                raw => self.woken(raw),
            }
        }
        self.events = events;
        done.extend(self.ready.drain(..));
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.in_flight.len() + self.ready.len()
    }
}

/// The socket, and whether the operation waits for something to read.
fn socket_of(op: &Op) -> (&Fd, bool) {
    match op {
        Op::Recv { socket, .. } | Op::Accept { socket, .. } => (socket, true),
        Op::Readable { file } => (file, true),
        Op::Send { socket, .. } | Op::Connect { socket, .. } => (socket, false),
        Op::Read { file, .. }
        | Op::Write { file, .. }
        | Op::Sync { file }
        | Op::Allocate { file, .. } => (file, false),
        Op::Ublk { device, .. } => (device, false),
        Op::Call(_) => unreachable!("calls belong to helper threads"),
    }
}

fn try_socket(op: &mut Op) -> Result<u32, Errno> {
    match op {
        Op::Recv { socket, into } => {
            let mut parts = into.iter_mut().flatten().map(|l| io::IoSliceMut::new(l.bytes_mut()));
            let mut parts: [io::IoSliceMut<'_>; 2] = std::array::from_fn(|_| {
                parts.next().unwrap_or_else(|| io::IoSliceMut::new(&mut []))
            });
            let mut control = rustix::net::RecvAncillaryBuffer::default();
            let got = rustix::net::recvmsg(socket, &mut parts, &mut control, RecvFlags::DONTWAIT)?;
            Ok(count(got.bytes))
        }
        Op::Send { socket, from } => super::socket::send(socket, from),
        Op::Accept { socket, accepted } => {
            let fd = rustix::net::accept_with(&*socket, SocketFlags::CLOEXEC)?;
            *accepted = Some(fd);
            Ok(0)
        }
        Op::Connect { socket, to } => match rustix::net::connect(&*socket, to) {
            // The second call of a connect that has succeeded meanwhile.
            Ok(()) | Err(Errno::ISCONN) => Ok(0),
            Err(errno) => Err(errno),
        },
        Op::Readable { file } => {
            let mut polled = [rustix::event::PollFd::new(file, rustix::event::PollFlags::IN)];
            match rustix::event::poll(&mut polled, Some(&Timespec::default()))? {
                0 => Err(Errno::AGAIN),
                _ => Ok(0),
            }
        }
        Op::Read { .. }
        | Op::Write { .. }
        | Op::Sync { .. }
        | Op::Allocate { .. }
        | Op::Ublk { .. }
        | Op::Call(_) => Err(Errno::INVAL),
    }
}
