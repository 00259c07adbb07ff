//! Requests of NBD clients, on the thread of their resource.
//!
//! ```text
//!   client --head--> Request --cut by the limits of the device--> pieces --Event::App--> engine
//!   client <--reply-- Request <--all pieces ended-- complete() <--Action::CompleteApp-- engine
//! ```
//!
//! Requests run side by side and are answered as they end. Memory is bounded: a piece has a buffer
//! of [`Zone::Front`], a client may have [`CLIENT_BYTES_MAX`] of them and [`CLIENT_REQUESTS_MAX`]
//! requests; whoever has more is not read from. Nobody holds a buffer while it waits for another
//! one, save a client that is in the middle of sending.

mod check;
mod issue;
mod reply;

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;

use drbd_core::action::{AppError, DeviceOffer};
use drbd_core::event::{AppOp, AppRequest, Event};
use drbd_core::ids::{AppId, BufId};
use drbd_core::slab::{Key, Slab};
use drbd_types::VolumeNr;
use zerocopy::byteorder::network_endian::U32;
use zerocopy::{FromBytes, IntoBytes};

use self::check::check;
use self::reply::{push_chunk, push_data, push_error, push_simple, reply};
use super::handshake::{CONTEXT_ALLOCATION, CONTEXT_OUT_OF_SYNC, Contexts};
use super::proto::{self, NbdError, RequestHead, chunk, cmd};
use crate::plane::Env;
use crate::plane::buf::Zone;
use crate::plane::inbox::Inbox;
use crate::plane::io::{Fd, Op, OpKey, Part, Tag};
use crate::plane::outbox::Outbox;

/// Buffers of one client, bytes: its largest request.
pub const CLIENT_BYTES_MAX: usize = proto::LENGTH_MAX as usize;
/// Requests of one client that are not answered.
pub const CLIENT_REQUESTS_MAX: u32 = 1024;
/// Clients of one resource; each needs some memory of its own.
pub const CLIENTS_MAX: usize = 100;
/// Pieces without data that one request has at a time.
const PIECES_MAX: u32 = 16;
/// Extents of one reply to block status.
pub const EXTENTS_MAX: usize = 512;
/// Staging of a client, bytes.
const STAGING: usize = 32 << 10;

/// A client that has chosen an export.
#[derive(Debug)]
pub struct Session {
    /// The connection.
    pub socket: OwnedFd,
    /// The device.
    pub volume: VolumeNr,
    /// The client is this kernel's driver: who uses the device is its business.
    pub is_kernel: bool,
    /// Replies are structured.
    pub structured: bool,
    /// For block status.
    pub contexts: Contexts,
    /// Bytes that were received already.
    pub rest: Vec<u8>,
}

/// A part of the device with one status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes.
    pub len: u64,
    /// Flags of its context.
    pub flags: u32,
}

/// Somebody wants to know what is where; answered by [`Nbd::answer_status`].
#[derive(Clone, Copy, Debug)]
pub struct Query {
    /// Names the question.
    pub key: u64,
    /// The device.
    pub volume: VolumeNr,
    /// Where it begins, bytes.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// Which contexts.
    pub contexts: Contexts,
}

struct Client {
    fd: Fd,
    volume: VolumeNr,
    is_kernel: bool,
    structured: bool,
    pub(super) contexts: Contexts,
    inbox: Inbox,
    outbox: Outbox,
    sending: Option<OpKey>,
    reading: Reading,
    /// Requests without reply.
    requests: u32,
    /// Bytes of buffers of its pieces, and of replies that wait for all of their data.
    held: usize,
    ending: Ending,
}

impl Client {
    /// Memory that it has, in buffers and in replies that it does not read.
    const fn used(&self) -> usize {
        self.held + self.outbox.waiting()
    }

    /// Is it in the middle of something, or not read from although there is something?
    const fn is_waiting(&self) -> bool {
        let is_between = matches!(self.reading, Reading::Head) && self.inbox.available() == 0;
        !is_between || matches!(self.ending, Ending::Dead)
    }

    /// May it have so much more? With nothing it may have anything.
    const fn may_have(&self, len: usize) -> bool {
        self.used() == 0 || self.used() + len <= CLIENT_BYTES_MAX
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    No,
    /// No more requests, but all replies.
    Politely,
    /// No replies any more.
    Dead,
}

#[derive(Clone, Copy, Debug)]
enum Reading {
    /// The head of the next request.
    Head,
    /// A request that could not be handed out completely.
    Issuing(Key<Request>),
    /// Data of a write: its next piece, once there is a buffer for it.
    Data { request: Key<Request>, piece: Option<(BufId, u32)> },
    /// Data that nobody wants, then an error.
    Skip { left: u32, cookie: [u8; 8], error: NbdError },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// In one reply (`whole`) or in chunks.
    Read {
        whole: bool,
    },
    Write,
    Flush,
    Trim,
    /// `keep`: the space.
    Zeroes {
        keep: bool,
    },
    /// Zeroes as data.
    ZeroData,
    Status {
        one: bool,
    },
}

#[derive(Debug)]
struct Request {
    client: u32,
    cookie: [u8; 8],
    kind: Kind,
    fua: bool,
    start: u64,
    /// Bytes from `start` that are handed out.
    issued: u64,
    len: u64,
    /// Pieces without answer.
    open: u32,
    error: Option<NbdError>,
    /// The flush behind it is done, or not needed.
    is_flushed: bool,
    /// Data of a reply in one piece, in order.
    whole: Vec<BufId>,
}

struct Piece {
    request: Key<Request>,
    offset: u64,
    len: u32,
    buf: Option<BufId>,
}

/// The server of a resource.
#[derive(Default)]
pub struct Nbd {
    clients: BTreeMap<u32, Client>,
    next_client: u32,
    requests: Slab<Request>,
    pieces: Slab<Piece>,
    offers: BTreeMap<u16, DeviceOffer>,
    users: BTreeMap<u16, u32>,
    queries: VecDeque<Query>,
    /// Volumes whose kernel device has lost a connection.
    lost: VecDeque<VolumeNr>,
    /// For reuse.
    ids: Vec<u32>,
    lists: Vec<Vec<BufId>>,
}

impl Nbd {
    /// Without clients.
    pub fn new() -> Self {
        Self::default()
    }

    /// What a device offers from now on.
    pub fn offer(&mut self, volume: VolumeNr, offer: DeviceOffer) {
        self.offers.insert(volume.0, offer);
    }

    /// Requests without reply, of all clients.
    pub const fn open_requests(&self) -> usize {
        self.requests.len()
    }

    /// Clients of a volume.
    pub fn users(&self, volume: VolumeNr) -> u32 {
        self.users.get(&volume.0).copied().unwrap_or(0)
    }

    /// Takes a client over. Dropped at once if there are too many.
    pub fn attach(&mut self, env: &mut Env<'_>, session: Session) {
        if self.clients.len() >= CLIENTS_MAX {
            tracing::warn!("more than {CLIENTS_MAX} NBD clients: one is refused");
            return;
        }
        let mut inbox = Inbox::new(Zone::Clients, STAGING);
        if !inbox.preload(env, &session.rest) {
            inbox.drop_all(env);
            tracing::warn!("no memory for an NBD client");
            return;
        }
        let client = Client {
            fd: Fd::new(session.socket),
            volume: session.volume,
            is_kernel: session.is_kernel,
            structured: session.structured,
            contexts: session.contexts,
            inbox,
            outbox: Outbox::new(Zone::Clients),
            sending: None,
            reading: Reading::Head,
            requests: 0,
            held: 0,
            ending: Ending::No,
        };
        let id = self.next_client;
        self.next_client = id.wrapping_add(1);
        self.clients.insert(id, client);
        if !session.is_kernel {
            self.count_users(env, session.volume, 1);
        }
    }

    /// Sends all clients of a volume away, or all of all volumes.
    pub fn detach(&mut self, env: &mut Env<'_>, volume: Option<VolumeNr>) {
        for client in self.clients.values_mut() {
            if volume.is_none_or(|volume| volume == client.volume) {
                client.ending = Ending::Dead;
            }
        }
        self.flush(env);
    }

    /// The next question about the state of blocks.
    pub fn take_query(&mut self) -> Option<Query> {
        self.queries.pop_front()
    }

    /// The next volume whose kernel device has lost a connection.
    pub fn take_lost(&mut self) -> Option<VolumeNr> {
        self.lost.pop_front()
    }

    /// An operation of a client's socket has ended.
    pub fn done(&mut self, env: &mut Env<'_>, key: u64, op: Op, result: Result<u32, i32>) {
        let id = u32::try_from(key >> 1).unwrap_or(u32::MAX);
        match (self.clients.get_mut(&id), op) {
            (Some(client), Op::Recv { into, .. }) => client.inbox.done(env, into, result),
            (Some(client), Op::Send { from, .. }) => {
                client.sending = None;
                if client.outbox.done(env, from, result).is_err() {
                    client.ending = Ending::Dead;
                }
            }
            (_, op) => op.give_back(env.pool),
        }
    }

    /// Reads what clients have sent. True: something was done, perhaps there is more.
    pub fn poll(&mut self, env: &mut Env<'_>) -> bool {
        let mut ids = std::mem::take(&mut self.ids);
        ids.clear();
        ids.extend(self.clients.keys());
        let mut is_busy = false;
        for id in &ids {
            is_busy |= self.read(env, *id);
        }
        self.ids = ids;
        is_busy
    }

    /// Is a client in the middle of something, or not read from although there is something?
    pub fn is_waiting(&self) -> bool {
        self.clients.values().any(Client::is_waiting)
    }

    /// Sends replies, and lets go of clients that have ended. True: memory is free again, or a client
    /// has died.
    pub fn flush(&mut self, env: &mut Env<'_>) -> bool {
        let mut gone = None;
        let mut has_moved = false;
        for (&id, client) in &mut self.clients {
            let is_sending = client.sending.is_some() || client.ending == Ending::Dead;
            if !is_sending && client.outbox.waiting() > 0 {
                let tag = Tag { part: Part::Nbd, key: u64::from(id) << 1 | 1 };
                let before = client.outbox.moved();
                match client.outbox.flush(env, &client.fd, tag) {
                    Ok(sending) => client.sending = sending,
                    Err(_) => client.ending = Ending::Dead,
                }
                has_moved |= client.outbox.moved() > before || client.ending == Ending::Dead;
            }
            let is_idle = client.requests == 0;
            let is_over = match client.ending {
                Ending::No => false,
                Ending::Politely => is_idle && client.outbox.waiting() == 0,
                Ending::Dead => is_idle && !matches!(client.reading, Reading::Issuing(_)),
            };
            if is_over {
                gone = Some(id);
            }
        }
        if let Some(id) = gone {
            self.remove(env, id);
            has_moved |= self.flush(env);
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
        let Some(piece) = self.pieces.remove(Key::from_raw(id.0)) else {
            debug_assert!(false, "{id:?} is not open");
            return;
        };
        if let (Some(from), Some(to)) = (data, piece.buf) {
            let len = env.pool.len(from).min(env.pool.len(to));
            let lease = env.pool.lend(from, 0..len);
            env.pool.bytes_mut(to)[..len].copy_from_slice(lease.bytes());
            env.pool.take_back(lease);
        }
        if let Some(from) = data {
            env.pool.release(from);
        }
        let Some(request) = self.requests.get_mut(piece.request) else { return };
        request.open -= 1;
        let Some(client) = self.clients.get_mut(&request.client) else { return };
        let is_whole = request.kind == Kind::Read { whole: true };
        if piece.buf.is_some() && !is_whole {
            client.held -= piece.len as usize;
        }
        if let Err(error) = result {
            request.error.get_or_insert_with(|| error_of(error));
        }
        if let (Kind::Read { whole: false }, Some(buf)) = (request.kind, piece.buf) {
            if result.is_ok() {
                let is_last =
                    request.open == 0 && request.issued == request.len && request.error.is_none();
                push_data(env, client, request.cookie, piece.offset, buf, is_last);
            }
            env.pool.release(buf);
        }
        self.go_on(env, piece.request);
    }

    /// Answers a question about the state of blocks. `None`: nothing is known.
    pub fn answer_status(
        &mut self,
        env: &mut Env<'_>,
        key: u64,
        allocation: Option<&[Extent]>,
        out_of_sync: Option<&[Extent]>,
    ) {
        let key = Key::from_raw(key);
        let Some(request) = self.requests.get_mut(key) else { return };
        request.open -= 1;
        let Some(client) = self.clients.get_mut(&request.client) else { return };
        let Kind::Status { one } = request.kind else { return };
        let unknown = [Extent { len: request.len, flags: 0 }];
        let answers = [
            (Contexts::ALLOCATION, CONTEXT_ALLOCATION, allocation),
            (Contexts::OUT_OF_SYNC, CONTEXT_OUT_OF_SYNC, out_of_sync),
        ];
        let mut left = client.contexts.bits().count_ones();
        for (context, number, extents) in answers {
            if !client.contexts.contains(context) {
                continue;
            }
            left -= 1;
            let most = if one { 1 } else { EXTENTS_MAX };
            let extents = extents.filter(|extents| !extents.is_empty()).unwrap_or(&unknown);
            let mut body = U32::new(number).as_bytes().to_vec();
            for extent in extents.iter().take(most) {
                let len = u32::try_from(extent.len).unwrap_or(!511);
                body.extend_from_slice([U32::new(len), U32::new(extent.flags)].as_bytes());
            }
            push_chunk(env, client, request.cookie, chunk::BLOCK_STATUS, left == 0, &body);
        }
        client.requests -= 1;
        self.requests.remove(key);
    }

    fn count_users(&mut self, env: &mut Env<'_>, volume: VolumeNr, by: i64) {
        let users = self.users.entry(volume.0).or_default();
        *users = u32::try_from(i64::from(*users) + by).unwrap_or(0);
        env.events.push(Event::OpenCount { volume, users: *users });
    }

    fn remove(&mut self, env: &mut Env<'_>, id: u32) {
        let Some(mut client) = self.clients.remove(&id) else { return };
        let _ = rustix::net::shutdown(&client.fd, rustix::net::Shutdown::Both);
        let keys = [client.sending, client.inbox.in_flight()];
        keys.into_iter().flatten().for_each(|key| env.io.cancel(key));
        client.inbox.drop_all(env);
        client.outbox.drop_all(env);
        if client.is_kernel {
            self.lost.push_back(client.volume);
        } else {
            self.count_users(env, client.volume, -1);
        }
    }

    /// Reads from one client until it has nothing more, or something is missing.
    fn read(&mut self, env: &mut Env<'_>, id: u32) -> bool {
        let mut is_busy = false;
        // Others get a turn after so many requests.
        for _ in 0..64 {
            let Some(client) = self.clients.get_mut(&id) else { return is_busy };
            match client.ending {
                Ending::No => {}
                // Said at the border of a request: there is nothing to hand out.
                Ending::Politely => return is_busy,
                Ending::Dead => {
                    self.abandon(env, id);
                    return is_busy;
                }
            }
            let has_moved = match client.reading {
                Reading::Head => self.read_head(env, id),
                Reading::Issuing(request) => self.issue(env, id, request),
                Reading::Data { request, piece } => self.read_data(env, id, request, piece),
                Reading::Skip { left, cookie, error } => self.skip(env, id, left, cookie, error),
            };
            if !has_moved {
                self.receive(env, id);
                return is_busy;
            }
            is_busy = true;
        }
        is_busy
    }

    /// Asks for more bytes, unless enough is there to go on with.
    fn receive(&mut self, env: &mut Env<'_>, id: u32) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        let needs_bytes = match client.reading {
            Reading::Head => client.inbox.available() < size_of::<RequestHead>(),
            Reading::Data { piece, .. } => piece.is_some(),
            Reading::Skip { .. } => true,
            Reading::Issuing(_) => false,
        };
        if !needs_bytes || client.inbox.in_flight().is_some() {
            return;
        }
        if client.inbox.ended().is_some() {
            // Without goodbye, perhaps in the middle of a request.
            let at_a_border =
                matches!(client.reading, Reading::Head) && client.inbox.available() == 0;
            client.ending = if at_a_border { Ending::Politely } else { Ending::Dead };
            if !at_a_border {
                self.abandon(env, id);
            }
            return;
        }
        let tag = Tag { part: Part::Nbd, key: u64::from(id) << 1 };
        client.inbox.receive(env, &client.fd, tag, None);
    }

    /// A dead client's request in the middle: what was handed out still ends, the rest does not
    /// happen.
    fn abandon(&mut self, env: &mut Env<'_>, id: u32) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        let key = match client.reading {
            Reading::Issuing(key) => key,
            Reading::Data { request, piece } => {
                if let Some((buf, len)) = piece {
                    // A receive that is with the kernel keeps its own reference.
                    env.pool.release(buf);
                    client.held -= len as usize;
                }
                request
            }
            Reading::Head | Reading::Skip { .. } => return,
        };
        if let Some(recv) = client.inbox.in_flight() {
            env.io.cancel(recv);
        }
        client.reading = Reading::Head;
        if let Some(request) = self.requests.get_mut(key) {
            request.error = Some(NbdError::Io);
            request.len = request.issued;
        }
        self.go_on(env, key);
    }

    fn read_head(&mut self, env: &mut Env<'_>, id: u32) -> bool {
        let Some(client) = self.clients.get_mut(&id) else { return false };
        if client.requests >= CLIENT_REQUESTS_MAX || client.used() > CLIENT_BYTES_MAX {
            return false;
        }
        let Some(bytes) = client.inbox.take(env.pool, size_of::<RequestHead>()) else {
            return false;
        };
        let head = match RequestHead::read_from_bytes(bytes) {
            Ok(head) if head.magic.get() == proto::REQUEST_MAGIC => head,
            _ => {
                // Out of step: nothing that follows can be understood.
                tracing::warn!("an NBD client sent a request without its magic number");
                client.ending = Ending::Dead;
                return true;
            }
        };
        let offer = self.offers.get(&client.volume.0).copied();
        let checked = check(&head, offer.as_ref(), client);
        match (head.command.get(), checked) {
            (cmd::DISC, _) => client.ending = Ending::Politely,
            (cmd::WRITE, Err(error)) => {
                let (left, cookie) = (head.length.get(), head.cookie);
                client.reading = Reading::Skip { left, cookie, error };
            }
            (command, Err(error)) => {
                let is_read = command == cmd::READ || command == cmd::BLOCK_STATUS;
                push_error(env, client, head.cookie, error, is_read);
            }
            (cmd::CACHE, Ok(_)) => push_simple(env, client, head.cookie, 0),
            (_, Ok((kind, fua))) => self.begin(env, id, &head, kind, fua),
        }
        true
    }

    fn begin(&mut self, env: &mut Env<'_>, id: u32, head: &RequestHead, kind: Kind, fua: bool) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        client.requests += 1;
        let is_flush = kind == Kind::Flush;
        let needs_flush = fua && matches!(kind, Kind::Trim | Kind::Zeroes { .. });
        let key = self.requests.insert(Request {
            client: id,
            cookie: head.cookie,
            kind,
            fua,
            start: if is_flush { 0 } else { head.offset.get() },
            issued: 0,
            len: if is_flush { 0 } else { head.length.get().into() },
            open: 0,
            error: None,
            is_flushed: !needs_flush && !is_flush,
            whole: self.lists.pop().unwrap_or_default(),
        });
        match kind {
            Kind::Write => client.reading = Reading::Data { request: key, piece: None },
            Kind::Status { .. } => {
                let (volume, contexts) = (client.volume, client.contexts);
                let (start, len) = (head.offset.get(), head.length.get().into());
                if let Some(request) = self.requests.get_mut(key) {
                    (request.open, request.issued) = (1, len);
                }
                self.queries.push_back(Query { key: key.raw(), volume, start, len, contexts });
            }
            Kind::Flush => self.go_on(env, key),
            Kind::Read { .. } | Kind::Trim | Kind::Zeroes { .. } | Kind::ZeroData => {
                client.reading = Reading::Issuing(key);
            }
        }
    }

    fn skip(
        &mut self,
        env: &mut Env<'_>,
        id: u32,
        left: u32,
        cookie: [u8; 8],
        error: NbdError,
    ) -> bool {
        let Some(client) = self.clients.get_mut(&id) else { return false };
        if client.inbox.in_flight().is_some() {
            return false;
        }
        let skipped = client.inbox.skip(left as usize);
        let left = left - u32::try_from(skipped).unwrap_or(left);
        if left == 0 {
            client.reading = Reading::Head;
            push_error(env, client, cookie, error, false);
            return true;
        }
        client.reading = Reading::Skip { left, cookie, error };
        false
    }

    /// If nothing of a request is open: the flush behind it, or the reply.
    fn go_on(&mut self, env: &mut Env<'_>, key: Key<Request>) {
        let Some(request) = self.requests.get_mut(key) else { return };
        let Some(client) = self.clients.get_mut(&request.client) else { return };
        let is_cut = request.error.is_some() && request.kind != Kind::Write;
        if request.open > 0 || request.issued < request.len && !is_cut {
            return;
        }
        if !request.is_flushed && request.error.is_none() {
            request.is_flushed = true;
            request.open = 1;
            let volume = client.volume;
            let app = self.pieces.insert(Piece { request: key, offset: 0, len: 0, buf: None });
            let op = AppOp::Flush;
            env.events.push(Event::App(AppRequest { id: AppId(app.raw()), volume, op }));
            return;
        }
        // A request that is still being handed out is ended there.
        if matches!(client.reading, Reading::Issuing(other) if other == key) {
            if client.ending == Ending::Dead || request.issued < request.len {
                client.reading = Reading::Head;
            } else {
                return;
            }
        }
        let mut whole = std::mem::take(&mut request.whole);
        client.held -= whole.iter().map(|buf| env.pool.len(*buf)).sum::<usize>();
        if client.ending != Ending::Dead {
            reply(env, client, request, &whole);
        }
        whole.drain(..).for_each(|buf| env.pool.release(buf));
        self.lists.push(whole);
        client.requests -= 1;
        self.requests.remove(key);
    }
}

const fn error_of(error: AppError) -> NbdError {
    match error {
        AppError::Io => NbdError::Io,
        AppError::ReadOnly => NbdError::Perm,
        AppError::Invalid => NbdError::Inval,
    }
}
