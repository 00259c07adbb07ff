//! Requests of ublk devices, on the thread of their resource.
//!
//! ```text
//!   kernel --fetched--> Request --cut by the limits of the device--> pieces --Event::App--> engine
//!   kernel <--commit, fetch-- Request <--all pieces ended-- complete() <--CompleteApp-- engine
//! ```
//!
//! A tag of a queue is with the kernel (a fetch is in flight) or a request here. A piece has a
//! buffer of [`Zone::Front`], whose data is copied from and to the kernel at once: that is memory,
//! and does not wait. A request that finds no buffer waits until there is one; nobody holds one
//! while it waits for another.

use std::collections::{BTreeMap, VecDeque};

use drbd_core::action::{AppError, DeviceOffer};
use drbd_core::event::{AppOp, AppRequest, Event, WriteFlags};
use drbd_core::ids::{AppId, BufId};
use drbd_core::slab::{Key, Slab};
use drbd_types::{Sector, SectorCount, SectorRange, VolumeNr};

use super::abi::{self, IoCommand, IoDesc};
use crate::plane::Env;
use crate::plane::buf::Zone;
use crate::plane::io::{Fd, Op, Part, Tag};
use crate::plane::ublk::Table;

/// Pieces without data that one request has at a time.
const PIECES_MAX: u32 = 16;
/// Marks pieces of this front end among the requests of the engine.
const OURS: u64 = 1 << 63;
/// Every device has only this one: one thread serves it.
const QUEUE: u16 = 0;

/// The queue of a device, to be served.
#[derive(Debug)]
pub struct Queue {
    /// The volume behind it.
    pub volume: VolumeNr,
    /// The device of the queue.
    pub device: Fd,
    /// Its requests.
    pub table: Table,
    /// How many.
    pub depth: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Flush,
    Discard,
    Zeroes { may_unmap: bool },
}

#[derive(Debug)]
struct Request {
    kind: Kind,
    fua: bool,
    start: u64,
    /// Bytes from `start` that are handed out.
    issued: u64,
    len: u64,
    /// Pieces without answer.
    open: u32,
    errno: Option<i32>,
}

#[derive(Debug)]
enum Slot {
    /// The kernel has it.
    Fetching,
    Busy(Request),
    /// The kernel does not want it back.
    Over,
}

#[derive(Debug)]
struct Served {
    queue: Queue,
    slots: Vec<Slot>,
}

#[derive(Debug)]
struct Piece {
    queue: u32,
    tag: u16,
    /// From the beginning of the request.
    offset: u64,
    len: u64,
    buf: Option<BufId>,
}

/// The server of a resource.
#[derive(Debug, Default)]
pub struct Ublk {
    queues: BTreeMap<u32, Served>,
    next_queue: u32,
    pieces: Slab<Piece>,
    /// Requests that could not be handed out completely.
    waiting: VecDeque<(u32, u16)>,
    offers: BTreeMap<u16, DeviceOffer>,
}

impl Ublk {
    /// Without devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Does this request come from here?
    pub const fn owns(id: AppId) -> bool {
        id.0 & OURS != 0
    }

    /// Pieces of requests without answer.
    pub const fn open_pieces(&self) -> usize {
        self.pieces.len()
    }

    /// Does a request wait for memory?
    pub fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// What a device offers from now on.
    pub fn offer(&mut self, volume: VolumeNr, offer: DeviceOffer) {
        self.offers.insert(volume.0, offer);
    }

    /// Serves a device, until its driver sends all requests away.
    pub fn attach(&mut self, env: &mut Env<'_>, queue: Queue) {
        let id = self.next_queue;
        self.next_queue = id.wrapping_add(1);
        let slots = (0..queue.depth).map(|_| Slot::Fetching).collect();
        for tag in 0..queue.depth {
            fetch(env, &queue, id, tag, abi::io::FETCH, 0);
        }
        self.queues.insert(id, Served { queue, slots });
    }

    /// A fetch has ended: here is a request, or the device goes away.
    pub fn done(&mut self, env: &mut Env<'_>, key: u64, result: Result<u32, i32>) {
        let (id, tag) = place_of(key);
        let Some(served) = self.queues.get_mut(&id) else { return };
        let Some(slot) = served.slots.get_mut(usize::from(tag)) else { return };
        let Some(desc) = result.ok().and_then(|_| served.queue.table.get(tag)) else {
            *slot = Slot::Over;
            if served.slots.iter().all(|slot| matches!(slot, Slot::Over)) {
                self.queues.remove(&id);
            }
            return;
        };
        let offer = self.offers.get(&served.queue.volume.0);
        match request_of(&desc, offer) {
            Ok(mut request) if request.kind == Kind::Flush => {
                request.open = 1;
                *slot = Slot::Busy(request);
                let volume = served.queue.volume;
                let piece = Piece { queue: id, tag, offset: 0, len: 0, buf: None };
                self.hand_out(env, volume, piece, AppOp::Flush);
            }
            Ok(request) => {
                *slot = Slot::Busy(request);
                self.go_on(env, id, tag);
            }
            Err(errno) => {
                *slot = Slot::Fetching;
                fetch(env, &served.queue, id, tag, abi::io::COMMIT_AND_FETCH, -errno);
            }
        }
    }

    /// Goes on with requests that wait for memory. True: something was handed out.
    pub fn poll(&mut self, env: &mut Env<'_>) -> bool {
        let mut has_moved = false;
        for _ in 0..self.waiting.len() {
            let Some((id, tag)) = self.waiting.pop_front() else { break };
            let before = self.pieces.len();
            self.go_on(env, id, tag);
            has_moved |= self.pieces.len() > before;
        }
        has_moved
    }

    /// The engine has ended a piece.
    pub fn complete(
        &mut self,
        env: &mut Env<'_>,
        id: AppId,
        result: Result<(), AppError>,
        data: Option<BufId>,
    ) {
        let Some(piece) = self.pieces.remove(Key::from_raw(id.0 & !OURS)) else {
            debug_assert!(false, "{id:?} is not open");
            return;
        };
        let served = self.queues.get_mut(&piece.queue);
        let mut is_read = false;
        if let Some(Served { queue, slots }) = served
            && let Some(Slot::Busy(request)) = slots.get_mut(usize::from(piece.tag))
        {
            request.open -= 1;
            is_read = request.kind == Kind::Read;
            let mut result = result.map_err(errno_of);
            if let (true, Ok(()), Some(buf)) = (is_read, result, data.or(piece.buf)) {
                result = give(env, queue, &piece, buf);
            }
            if let Err(errno) = result {
                request.errno.get_or_insert(errno);
            }
        }
        // A write's buffer is the engine's to free.
        let own = piece.buf.filter(|_| is_read);
        data.into_iter().chain(own).for_each(|buf| env.pool.release(buf));
        self.finish(env, piece.queue, piece.tag);
    }

    /// Hands out what can be handed out; the rest waits.
    fn go_on(&mut self, env: &mut Env<'_>, id: u32, tag: u16) {
        while self.issue(env, id, tag) {}
        let request = self.busy(id, tag);
        if request.is_some_and(|request| request.issued < request.len && request.errno.is_none()) {
            self.waiting.push_back((id, tag));
        }
        self.finish(env, id, tag);
    }

    fn busy(&mut self, id: u32, tag: u16) -> Option<&mut Request> {
        match self.queues.get_mut(&id)?.slots.get_mut(usize::from(tag))? {
            Slot::Busy(request) => Some(request),
            Slot::Fetching | Slot::Over => None,
        }
    }

    /// Hands out one piece. False: nothing more is to be done now.
    fn issue(&mut self, env: &mut Env<'_>, id: u32, tag: u16) -> bool {
        let Some(Served { queue, slots }) = self.queues.get_mut(&id) else { return false };
        let Some(Slot::Busy(request)) = slots.get_mut(usize::from(tag)) else { return false };
        let volume = queue.volume;
        let is_over = request.issued >= request.len || request.errno.is_some();
        if is_over || request.open >= PIECES_MAX {
            return false;
        }
        let Some(offer) = self.offers.get(&volume.0) else { return false };
        let most = piece_max(request.kind, offer);
        let len = (request.len - request.issued).min(most);
        let offset = request.issued;
        let needs_buffer = matches!(request.kind, Kind::Read | Kind::Write);
        let mut buf = None;
        if needs_buffer {
            buf = env.pool.alloc(Zone::Front, usize::try_from(len).unwrap_or(0));
            if buf.is_none() {
                return false;
            }
        }
        let piece = Piece { queue: id, tag, offset, len, buf };
        if let (Kind::Write, Some(buf)) = (request.kind, buf)
            && let Err(errno) = take(env, queue, &piece, buf)
        {
            env.pool.release(buf);
            request.errno = Some(errno);
            return false;
        }
        let Some(op) = op_of(request, &piece) else { return false };
        request.issued += len;
        request.open += 1;
        self.hand_out(env, volume, piece, op);
        true
    }

    fn hand_out(&mut self, env: &mut Env<'_>, volume: VolumeNr, piece: Piece, op: AppOp) {
        let id = AppId(self.pieces.insert(piece).raw() | OURS);
        env.events.push(Event::App(AppRequest { id, volume, op }));
    }

    /// If all of a request has ended: tells the kernel, and waits for the next one.
    fn finish(&mut self, env: &mut Env<'_>, id: u32, tag: u16) {
        let Some(Served { queue, slots }) = self.queues.get_mut(&id) else { return };
        let Some(slot) = slots.get_mut(usize::from(tag)) else { return };
        let Slot::Busy(request) = slot else { return };
        if request.open > 0 || request.issued < request.len && request.errno.is_none() {
            return;
        }
        let result = match request.errno {
            Some(errno) => -errno,
            None => i32::try_from(request.len).unwrap_or(i32::MAX),
        };
        *slot = Slot::Fetching;
        fetch(env, queue, id, tag, abi::io::COMMIT_AND_FETCH, result);
    }
}

fn fetch(env: &mut Env<'_>, queue: &Queue, id: u32, tag: u16, command: u32, result: i32) {
    let request = IoCommand { queue: QUEUE, tag, result, address: 0 };
    let key = u64::from(id) << 16 | u64::from(tag);
    let op = Op::Ublk { device: Fd::clone(&queue.device), command, request };
    env.io.submit(Tag { part: Part::Ublk, key }, op);
}

/// Queue and tag of a fetch.
fn place_of(key: u64) -> (u32, u16) {
    let id = u32::try_from(key >> 16).unwrap_or(u32::MAX);
    (id, u16::try_from(key & 0xFFFF).unwrap_or(u16::MAX))
}

/// What the kernel asks for, if it may.
fn request_of(desc: &IoDesc, offer: Option<&DeviceOffer>) -> Result<Request, i32> {
    let offer = offer.ok_or(libc::EIO)?;
    let kind = match u8::try_from(desc.op_flags & 0xFF) {
        Ok(abi::op::READ) => Kind::Read,
        Ok(abi::op::WRITE) => Kind::Write,
        Ok(abi::op::FLUSH) => Kind::Flush,
        Ok(abi::op::DISCARD) if offer.max_discard > 0 => Kind::Discard,
        Ok(abi::op::WRITE_ZEROES) if offer.max_write_zeroes > 0 => {
            Kind::Zeroes { may_unmap: desc.op_flags & abi::IO_NO_UNMAP == 0 }
        }
        // The kernel does without, or writes zeroes as data.
        _ => return Err(libc::EOPNOTSUPP),
    };
    let sectors = if kind == Kind::Flush { 0 } else { u64::from(desc.sectors) };
    let is_inside = desc.start.checked_add(sectors).is_some_and(|end| end <= offer.size.0);
    if kind != Kind::Flush && (!is_inside || sectors == 0) {
        return Err(libc::EIO);
    }
    let fua = desc.op_flags & abi::IO_FUA != 0;
    let (start, len) = (desc.start.saturating_mul(512), sectors * 512);
    Ok(Request { kind, fua, start, issued: 0, len, open: 0, errno: None })
}

/// Largest piece, bytes.
fn piece_max(kind: Kind, offer: &DeviceOffer) -> u64 {
    let most = match kind {
        Kind::Read | Kind::Write | Kind::Flush => offer.max_io,
        Kind::Discard => offer.max_discard,
        Kind::Zeroes { .. } => offer.max_write_zeroes,
    };
    u64::from(most / 512 * 512).max(4096)
}

fn op_of(request: &Request, piece: &Piece) -> Option<AppOp> {
    let start = Sector((request.start + piece.offset) / 512);
    let range = SectorRange::new(start, SectorCount(piece.len / 512))?;
    let flags = WriteFlags { fua: request.fua, preflush: false, sync: true };
    match (request.kind, piece.buf) {
        (Kind::Read, Some(buf)) => Some(AppOp::Read { range, buf }),
        (Kind::Write, Some(buf)) => Some(AppOp::Write { range, buf, flags }),
        (Kind::Discard, None) => Some(AppOp::Discard { range }),
        (Kind::Zeroes { may_unmap }, None) => Some(AppOp::WriteZeroes { range, may_unmap }),
        _ => None,
    }
}

/// Copies the data of a write from the kernel.
fn take(env: &mut Env<'_>, queue: &Queue, piece: &Piece, buf: BufId) -> Result<(), i32> {
    let bytes = env.pool.bytes_mut(buf);
    let want = bytes.len();
    let got = rustix::io::pread(&queue.device, bytes, place_in(piece)?);
    whole(got, want)
}

/// Copies the data of a read to the kernel.
fn give(env: &mut Env<'_>, queue: &Queue, piece: &Piece, buf: BufId) -> Result<(), i32> {
    let bytes = env.pool.bytes(buf);
    let len = usize::try_from(piece.len).unwrap_or(usize::MAX);
    let bytes = bytes.get(..len).ok_or(libc::EIO)?;
    whole(rustix::io::pwrite(&queue.device, bytes, place_in(piece)?), len)
}

fn place_in(piece: &Piece) -> Result<u64, i32> {
    let offset = u32::try_from(piece.offset).map_err(|_| libc::EINVAL)?;
    Ok(abi::data_at(QUEUE, piece.tag, offset))
}

fn whole(moved: rustix::io::Result<usize>, wanted: usize) -> Result<(), i32> {
    match moved {
        Ok(moved) if moved == wanted => Ok(()),
        Ok(_) => Err(libc::EIO),
        Err(errno) => Err(errno.raw_os_error()),
    }
}

const fn errno_of(error: AppError) -> i32 {
    match error {
        AppError::Io | AppError::ReadOnly => libc::EIO,
        AppError::Invalid => libc::EINVAL,
    }
}
