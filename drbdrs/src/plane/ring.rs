//! The kernel through one `io_uring`.
//!
//! Invariant that all `unsafe` here rests on: what a submission points to (leases, message heads,
//! addresses) is owned by its entry in `in_flight`, lives on the heap or in the pool's mapping,
//! and is neither moved nor touched until its completion was taken. When a ring is dropped with
//! operations that do not end, their entries are leaked.
#![expect(unsafe_code, reason = "hands pointers to the kernel; see the invariant above")]

use std::io;
use std::mem::ManuallyDrop;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;
use std::time::{Duration, Instant};

use drbd_core::slab::{Key, Slab};
use io_uring::{IoUring, Probe, opcode, squeue, types};
use zerocopy::IntoBytes as _;

use super::helpers::{Finished, Helpers, allocate_flags, count};
use super::io::{Backend, Done, Op, OpKey, SEND_PARTS, Tag};

/// Submissions between two system calls; more only cost another call.
const ENTRIES: u32 = 256;
/// Threads for what blocks although there is a ring: opening, scanning.
const HELPERS_MAX: usize = 2;
/// How long a dropped ring waits for the kernel to let go of its buffers.
const DROP_LIMIT: Duration = Duration::from_secs(5);

/// `user_data` that no key of a table ever is.
const BELL: u64 = 0;
const CANCEL: u64 = u64::MAX;

/// Head of a vectored message, or an address: what the kernel reads besides the data.
struct Message {
    head: libc::msghdr,
    parts: [libc::iovec; SEND_PARTS],
    address: libc::sockaddr_storage,
}

struct InFlight {
    tag: Tag,
    op: Op,
    message: Option<Box<Message>>,
}

/// The ring.
pub struct Ring {
    ring: IoUring,
    in_flight: ManuallyDrop<Slab<InFlight>>,
    /// For reuse.
    #[expect(clippy::vec_box, reason = "the kernel knows their addresses; they must not move")]
    messages: Vec<Box<Message>>,
    helpers: Helpers,
    is_bell_armed: bool,
    finished: Vec<Finished>,
}

impl Ring {
    /// Sets a ring up.
    ///
    /// # Errors
    /// The kernel is too old, or `io_uring` is forbidden here.
    pub fn new() -> io::Result<Self> {
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_cqsize(ENTRIES * 8)
            .build(ENTRIES)
            .or_else(|_| IoUring::builder().setup_cqsize(ENTRIES * 8).build(ENTRIES))?;
        check_abilities(&ring)?;
        Ok(Self {
            ring,
            in_flight: ManuallyDrop::new(Slab::new()),
            messages: Vec::new(),
            helpers: Helpers::new(HELPERS_MAX)?,
            is_bell_armed: false,
            finished: Vec::new(),
        })
    }

    fn push(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: what the entry points to is owned by `in_flight`, or it points to nothing.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return;
            }
            // Full: let the kernel take what is there. Failures show in `wait` too.
            if let Err(error) = self.ring.submit()
                && !is_passing(&error)
            {
                tracing::error!("io_uring does not take submissions: {error}");
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }

    /// Lets the kernel have the submissions, and waits for a completion unless there is one.
    fn enter(&mut self, limit: Option<Duration>) -> io::Result<()> {
        let has_completions = !self.ring.completion().is_empty();
        if has_completions && self.ring.submission().is_empty() {
            return Ok(());
        }
        let is_waiting = !has_completions && limit != Some(Duration::ZERO);
        let result = match limit {
            _ if !is_waiting => {
                // Asking for events lets the kernel finish what it has deferred.
                let now = types::Timespec::new();
                let args = types::SubmitArgs::new().timespec(&now);
                self.ring.submitter().submit_with_args(1, &args)
            }
            None => self.ring.submit_and_wait(1),
            Some(limit) => {
                let limit = types::Timespec::from(limit);
                let args = types::SubmitArgs::new().timespec(&limit);
                self.ring.submitter().submit_with_args(1, &args)
            }
        };
        match result {
            Err(error) if !is_passing(&error) => Err(error),
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
                // The kernel is short of memory; asking again at once would only burn time.
                std::thread::sleep(Duration::from_millis(1));
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn complete(&mut self, key: u64, result: i32, done: &mut Vec<Done>) {
        let Some(entry) = self.in_flight.remove(Key::from_raw(key)) else { return };
        let InFlight { tag, mut op, message } = entry;
        self.messages.extend(message);
        if let (Op::Accept { accepted, .. }, 0..) = (&mut op, result) {
            // SAFETY: the kernel has just made this descriptor for us; nobody else knows it.
            *accepted = Some(unsafe { OwnedFd::from_raw_fd(result) });
        }
        let result = u32::try_from(result).map_err(|_| -result);
        done.push(Done { tag, op, result });
    }

    /// Operations in flight that the kernel has memory of. Fetches of a ublk queue have none, and
    /// end only with the ring.
    fn pointing(&self) -> usize {
        self.in_flight.iter().filter(|(_, entry)| !matches!(entry.op, Op::Ublk { .. })).count()
    }

    fn collect_helpers(&mut self, done: &mut Vec<Done>) {
        let mut finished = std::mem::take(&mut self.finished);
        self.helpers.collect(&mut finished);
        for (key, op, result) in finished.drain(..) {
            if let Some(entry) = self.in_flight.remove(Key::from_raw(key)) {
                done.push(Done { tag: entry.tag, op, result });
            }
        }
        self.finished = finished;
    }
}

impl Backend for Ring {
    fn name(&self) -> &'static str {
        "io_uring"
    }

    fn submit(&mut self, tag: Tag, mut op: Op) -> OpKey {
        if matches!(op, Op::Call(_)) {
            let key = self.in_flight.insert(InFlight { tag, op: Op::Call(None), message: None });
            self.helpers.submit(key.raw(), op);
            return OpKey(key.raw());
        }
        let mut message = needs_message(&op)
            .then(|| self.messages.pop().unwrap_or_else(|| Box::new(empty_message())));
        let entry = entry(&mut op, message.as_deref_mut());
        let key = self.in_flight.insert(InFlight { tag, op, message }).raw();
        self.push(&entry.user_data(key));
        OpKey(key)
    }

    fn cancel(&mut self, key: OpKey) {
        self.push(&opcode::AsyncCancel::new(key.0).build().user_data(CANCEL));
    }

    fn look_out(&mut self, limit: Duration) -> io::Result<bool> {
        if !self.ring.submission().is_empty()
            && let Err(error) = self.ring.submit()
            && !is_passing(&error)
        {
            return Err(error);
        }
        let end = Instant::now() + limit;
        loop {
            // The kernel sets the flag when it has something that it finishes within a call.
            if !self.ring.completion().is_empty() || self.ring.submission().taskrun() {
                return Ok(true);
            }
            if Instant::now() >= end {
                return Ok(false);
            }
            std::hint::spin_loop();
        }
    }

    fn wait(&mut self, limit: Option<Duration>, done: &mut Vec<Done>) -> io::Result<()> {
        if self.helpers.pending() > 0 && !self.is_bell_armed {
            let bell = types::Fd(self.helpers.bell().as_raw_fd());
            let poll = opcode::PollAdd::new(bell, libc::POLLIN.cast_unsigned().into());
            self.push(&poll.build().user_data(BELL));
            self.is_bell_armed = true;
        }
        self.enter(limit)?;
        loop {
            let event = self.ring.completion().next();
            let Some(event) = event else { return Ok(()) };
            match event.user_data() {
                BELL => {
                    self.is_bell_armed = false;
                    self.collect_helpers(done);
                }
                CANCEL => {}
                key => self.complete(key, event.result(), done),
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.in_flight.len()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let cancel = opcode::AsyncCancel2::new(types::CancelBuilder::any()).build();
        self.push(&cancel.user_data(CANCEL));
        let end = Instant::now() + DROP_LIMIT;
        let mut done = Vec::new();
        while self.pointing() > 0 && Instant::now() < end {
            if self.wait(Some(Duration::from_millis(100)), &mut done).is_err() {
                break;
            }
            // Their leases keep the buffers from being used again; nobody will use them anyway.
            done.clear();
        }
        let pointing = self.pointing();
        if pointing == 0 {
            // SAFETY: dropped once, here; the kernel has given everything back that it points to.
            unsafe { ManuallyDrop::drop(&mut self.in_flight) };
        } else {
            tracing::warn!("{pointing} operations did not end; their memory stays");
        }
    }
}

/// Conditions under which the same call is simply made again.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::ETIME | libc::EBUSY | libc::EAGAIN))
}

/// The oldest kernel that is served by a ring is 5.11: it has all of these.
fn check_abilities(ring: &IoUring) -> io::Result<()> {
    let missing = |what: &str| io::Error::other(format!("this kernel's io_uring lacks {what}"));
    if !ring.params().is_feature_ext_arg() {
        return Err(missing("waiting with a limit"));
    }
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    let wanted = [
        ("READ", opcode::Read::CODE),
        ("WRITE", opcode::Write::CODE),
        ("FSYNC", opcode::Fsync::CODE),
        ("FALLOCATE", opcode::Fallocate::CODE),
        ("RECV", opcode::Recv::CODE),
        ("SEND", opcode::Send::CODE),
        ("RECVMSG", opcode::RecvMsg::CODE),
        ("SENDMSG", opcode::SendMsg::CODE),
        ("ACCEPT", opcode::Accept::CODE),
        ("CONNECT", opcode::Connect::CODE),
        ("POLL_ADD", opcode::PollAdd::CODE),
        ("ASYNC_CANCEL", opcode::AsyncCancel::CODE),
    ];
    match wanted.iter().find(|(_, code)| !probe.is_supported(*code)) {
        Some((name, _)) => Err(missing(name)),
        None => Ok(()),
    }
}

fn needs_message(op: &Op) -> bool {
    match op {
        Op::Recv { into, .. } => into.iter().flatten().count() > 1,
        Op::Send { from, .. } => from.len() > 1,
        Op::Connect { .. } => true,
        Op::Read { .. }
        | Op::Write { .. }
        | Op::Sync { .. }
        | Op::Allocate { .. }
        | Op::Accept { .. }
        | Op::Readable { .. }
        | Op::Ublk { .. }
        | Op::Call(_) => false,
    }
}

/// The submission. `message` is there if [`needs_message`] says so.
fn entry(op: &mut Op, message: Option<&mut Message>) -> squeue::Entry {
    match op {
        Op::Read { file, at, into } => {
            let into = into.bytes_mut();
            let read = opcode::Read::new(fd(file), into.as_mut_ptr(), count(into.len()));
            read.offset(*at).build()
        }
        Op::Write { file, at, from, durable } => {
            let flags = if *durable { libc::RWF_DSYNC } else { 0 };
            let from = from.bytes();
            let write = opcode::Write::new(fd(file), from.as_ptr(), count(from.len()));
            write.offset(*at).rw_flags(flags).build()
        }
        Op::Sync { file } => {
            opcode::Fsync::new(fd(file)).flags(types::FsyncFlags::DATASYNC).build()
        }
        Op::Allocate { file, how, at, len } => {
            let mode = allocate_flags(*how).bits().cast_signed();
            opcode::Fallocate::new(fd(file), *len).offset(*at).mode(mode).build()
        }
        Op::Recv { socket, into } => recv_entry(fd(socket), into, message),
        Op::Send { socket, from } => send_entry(fd(socket), from, message),
        Op::Accept { socket, .. } => {
            let accept = opcode::Accept::new(fd(socket), ptr::null_mut(), ptr::null_mut());
            accept.flags(libc::SOCK_CLOEXEC).build()
        }
        Op::Connect { socket, to } => {
            let message = message.expect("connects have a message");
            let len = put_address(*to, &mut message.address);
            let address = ptr::from_ref(&message.address).cast();
            opcode::Connect::new(fd(socket), address, len).build()
        }
        Op::Readable { file } => {
            opcode::PollAdd::new(fd(file), libc::POLLIN.cast_unsigned().into()).build()
        }
        Op::Ublk { device, command, request } => {
            let mut bytes = [0; 16];
            bytes.copy_from_slice(request.as_bytes());
            opcode::UringCmd16::new(fd(device), *command).cmd(bytes).build()
        }
        Op::Call(_) => opcode::Nop::new().build(),
    }
}

fn recv_entry(
    socket: types::Fd,
    into: &mut [Option<super::buf::Writing>; 2],
    message: Option<&mut Message>,
) -> squeue::Entry {
    let mut parts = into.iter_mut().flatten().map(|lease| {
        let bytes = lease.bytes_mut();
        libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }
    });
    let Some(message) = message else {
        let none = libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 };
        let part = parts.next().unwrap_or(none);
        return opcode::Recv::new(socket, part.iov_base.cast(), count(part.iov_len)).build();
    };
    put_parts(message, parts);
    opcode::RecvMsg::new(socket, &raw mut message.head).build()
}

fn send_entry(
    socket: types::Fd,
    from: &[super::buf::Reading],
    message: Option<&mut Message>,
) -> squeue::Entry {
    assert!(from.len() <= SEND_PARTS, "{} parts in one send", from.len());
    let Some(message) = message else {
        let bytes = from.first().map_or(&[][..], |lease| lease.bytes());
        let send = opcode::Send::new(socket, bytes.as_ptr(), count(bytes.len()));
        return send.flags(libc::MSG_NOSIGNAL).build();
    };
    put_parts(
        message,
        from.iter().map(|lease| {
            let bytes = lease.bytes();
            // The kernel does not write through the pointers of a send.
            libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
        }),
    );
    let flags = libc::MSG_NOSIGNAL.cast_unsigned();
    opcode::SendMsg::new(socket, &raw const message.head).flags(flags).build()
}

fn put_parts(message: &mut Message, parts: impl Iterator<Item = libc::iovec>) {
    let mut used = 0;
    for (place, part) in message.parts.iter_mut().zip(parts) {
        *place = part;
        used += 1;
    }
    message.head.msg_iov = message.parts.as_mut_ptr();
    message.head.msg_iovlen = used;
}

const fn empty_message() -> Message {
    // SAFETY: all three are plain C structures of integers and pointers; zero means empty.
    unsafe { std::mem::zeroed() }
}

fn put_address(from: SocketAddr, into: &mut libc::sockaddr_storage) -> libc::socklen_t {
    let place = ptr::from_mut(into);
    match from {
        SocketAddr::V4(v4) => {
            let address = libc::sockaddr_in {
                sin_family: family(libc::AF_INET),
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from(*v4.ip()).to_be() },
                sin_zero: [0; 8],
            };
            // SAFETY: the storage is larger than, and aligned for, every kind of address.
            unsafe { place.cast::<libc::sockaddr_in>().write(address) };
            socklen::<libc::sockaddr_in>()
        }
        SocketAddr::V6(v6) => {
            let address = libc::sockaddr_in6 {
                sin6_family: family(libc::AF_INET6),
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: v6.flowinfo(),
                sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                sin6_scope_id: v6.scope_id(),
            };
            // SAFETY: as above.
            unsafe { place.cast::<libc::sockaddr_in6>().write(address) };
            socklen::<libc::sockaddr_in6>()
        }
    }
}

fn family(number: libc::c_int) -> libc::sa_family_t {
    libc::sa_family_t::try_from(number).unwrap_or_default()
}

fn socklen<T>() -> libc::socklen_t {
    count(size_of::<T>())
}

fn fd(file: &super::io::Fd) -> types::Fd {
    types::Fd(file.as_raw_fd())
}
