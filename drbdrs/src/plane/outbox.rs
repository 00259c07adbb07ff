//! The sending half of a socket: a queue of messages, and one send at a time that takes as many of
//! them as fit. A message is a head of some bytes, and perhaps data that stays in its buffer.

use std::collections::VecDeque;
use std::ops::Range;

use drbd_core::action::SendData;
use drbd_core::event::Event;
use drbd_core::ids::{BufId, SendToken};
use drbd_types::Tick;
use rustix::io::Errno;

use super::buf::{Reading, Zone};
use super::io::{Fd, Op, OpKey, SEND_PARTS, Tag};
use super::{Env, ZEROES_LEN, socket};

/// Bytes of heads in one send.
const HEADS_MAX: usize = 32 << 10;

/// A message that is not completely sent.
#[derive(Debug)]
struct Item {
    /// Bytes of its head, the next ones in `Outbox::heads`.
    head: usize,
    data: Data,
    token: Option<SendToken>,
    gate: Option<Gate>,
}

/// What a fault point lets a message wait for, and all that come after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Gate {
    /// This time.
    Until(Tick),
    /// That packets of this type may pass.
    Held(u16),
}

/// What follows a head. A buffer is kept by a reference of our own.
#[derive(Clone, Copy, Debug)]
enum Data {
    None,
    Buf(BufId),
    Zeroes(usize),
}

/// The queue.
#[derive(Debug)]
pub(crate) struct Outbox {
    zone: Zone,
    heads: VecDeque<u8>,
    items: VecDeque<Item>,
    /// Bytes of the first item that are sent.
    sent: usize,
    waiting: usize,
    moved: u64,
    /// Where the heads of the send in flight are.
    chunk: Option<BufId>,
    is_sending: bool,
    /// For reuse.
    parts: Vec<Reading>,
    /// The transport took less than it was given.
    is_full: bool,
    #[cfg(test)]
    pub(super) sends: u32,
}

impl Outbox {
    /// Heads are copied into this zone to be sent.
    pub(crate) fn new(zone: Zone) -> Self {
        Self {
            zone,
            heads: VecDeque::new(),
            items: VecDeque::new(),
            sent: 0,
            waiting: 0,
            moved: 0,
            chunk: None,
            is_sending: false,
            parts: Vec::new(),
            is_full: false,
            #[cfg(test)]
            sends: 0,
        }
    }

    /// Bytes that wait here.
    pub(crate) const fn waiting(&self) -> usize {
        self.waiting
    }

    /// Bytes that the transport has taken.
    pub(crate) const fn moved(&self) -> u64 {
        self.moved
    }

    /// The transport has taken less than it was given last time.
    pub(crate) const fn is_full(&self) -> bool {
        self.is_full
    }

    /// Counts from here on.
    pub(crate) const fn start_count(&mut self) {
        self.moved = 0;
    }

    /// Appends a message. The buffer is kept by a reference of our own.
    pub(crate) fn push(
        &mut self,
        env: &mut Env<'_>,
        head: &[u8],
        data: Option<SendData>,
        token: Option<SendToken>,
    ) {
        let data = match data {
            None => Data::None,
            Some(SendData::Buf(buf)) => {
                env.pool.retain(buf);
                Data::Buf(buf)
            }
            Some(SendData::Zeroes(len)) => Data::Zeroes(usize::try_from(len.0).unwrap_or(0)),
        };
        self.heads.extend(head);
        self.waiting += head.len() + len_of(env, data);
        self.items.push_back(Item { head: head.len(), data, token, gate: None });
    }

    /// The last message has to wait.
    pub(crate) fn close_gate(&mut self, gate: Gate) {
        if let Some(item) = self.items.back_mut() {
            item.gate = Some(gate);
        }
    }

    /// Lets all messages go that need not wait any longer.
    pub(crate) fn open_gates(&mut self, keeps: impl Fn(Gate) -> bool) {
        for item in &mut self.items {
            item.gate = item.gate.filter(|gate| keeps(*gate));
        }
    }

    /// When the first message may go, if that is a matter of time.
    pub(crate) fn due(&self) -> Option<Tick> {
        match self.items.front()?.gate? {
            Gate::Until(tick) => Some(tick),
            Gate::Held(_) => None,
        }
    }

    /// Sends as much as the transport takes at once, and lets the kernel wait with the rest; then
    /// returns what it waits with. Without memory nothing is sent.
    ///
    /// # Errors
    /// The errno of the send.
    pub(crate) fn flush(
        &mut self,
        env: &mut Env<'_>,
        socket: &Fd,
        tag: Tag,
    ) -> Result<Option<OpKey>, i32> {
        while !self.is_sending && self.may_go(env.now) {
            let Some(from) = self.plan(env) else { break };
            #[cfg(test)]
            (self.sends += 1);
            let result = socket::send(socket, &from);
            if result == Err(Errno::AGAIN) {
                self.is_sending = true;
                let op = Op::Send { socket: Fd::clone(socket), from };
                return Ok(Some(env.io.submit(tag, op)));
            }
            self.done(env, from, result.map_err(Errno::raw_os_error))?;
        }
        Ok(None)
    }

    /// Whether there is a first message, and nothing keeps it.
    fn may_go(&mut self, now: Tick) -> bool {
        self.items.front_mut().is_some_and(|item| {
            item.gate = item.gate.filter(|gate| match gate {
                Gate::Until(due) => *due > now,
                Gate::Held(_) => true,
            });
            item.gate.is_none()
        })
    }

    /// What the next send consists of: heads are copied side by side, data is lent.
    fn plan(&mut self, env: &mut Env<'_>) -> Option<Vec<Reading>> {
        let chunk = env.pool.alloc(self.zone, self.heads.len().min(HEADS_MAX))?;
        self.chunk = Some(chunk);
        let room = env.pool.len(chunk);
        copy_front(&self.heads, env.pool.bytes_mut(chunk));
        let mut parts = std::mem::take(&mut self.parts);
        let (mut heads, mut skip) = (0..0, self.sent);
        for item in self.items.iter().take_while(|item| item.gate.is_none()) {
            let from_head = skip.min(item.head);
            skip -= from_head;
            // Sent bytes of the first head are no longer in `heads`.
            let head = item.head - from_head;
            let take = head.min(room - heads.end);
            heads.end += take;
            if take < head {
                break;
            }
            let len = len_of(env, item.data);
            if skip < len {
                // The heads before it, the data, and one place for the heads behind it.
                if parts.len() + 3 > SEND_PARTS {
                    break;
                }
                lend_heads(env, chunk, &mut heads, &mut parts);
                if !lend_data(env, item.data, skip..len, &mut parts) {
                    break;
                }
            }
            skip = 0;
        }
        lend_heads(env, chunk, &mut heads, &mut parts);
        Some(parts)
    }

    /// A send has ended. Reports the tokens of what is completely sent.
    ///
    /// # Errors
    /// The errno of the send.
    pub(crate) fn done(
        &mut self,
        env: &mut Env<'_>,
        mut from: Vec<Reading>,
        result: Result<u32, i32>,
    ) -> Result<(), i32> {
        self.is_sending = false;
        let given: usize = from.iter().map(Reading::len).sum();
        from.drain(..).for_each(|lease| env.pool.take_back(lease));
        self.parts = from;
        if let Some(chunk) = self.chunk.take() {
            env.pool.release(chunk);
        }
        let done = match result {
            Ok(done) => done as usize,
            Err(libc::EAGAIN | libc::EINTR) => 0,
            Err(errno) => return Err(errno),
        };
        self.is_full = done < given;
        self.moved += done as u64;
        self.waiting -= done.min(self.waiting);
        self.advance(env, done);
        Ok(())
    }

    fn advance(&mut self, env: &mut Env<'_>, mut done: usize) {
        while let Some(item) = self.items.front() {
            let total = item.head + len_of(env, item.data);
            let step = done.min(total - self.sent);
            let head_left = item.head.saturating_sub(self.sent);
            self.heads.drain(..step.min(head_left));
            self.sent += step;
            done -= step;
            if self.sent < total {
                return;
            }
            self.sent = 0;
            if let Some(item) = self.items.pop_front() {
                if let Data::Buf(buf) = item.data {
                    env.pool.release(buf);
                }
                if let Some(token) = item.token {
                    env.events.push(Event::Sent { token });
                }
            }
        }
    }

    /// Nothing more is sent.
    pub(crate) fn drop_all(&mut self, env: &mut Env<'_>) {
        for item in self.items.drain(..) {
            if let Data::Buf(buf) = item.data {
                env.pool.release(buf);
            }
        }
        if let Some(chunk) = self.chunk.take() {
            env.pool.release(chunk);
        }
        self.heads.clear();
        self.waiting = 0;
    }
}

/// The first bytes, as many as fit.
fn copy_front(from: &VecDeque<u8>, to: &mut [u8]) {
    let (first, second) = from.as_slices();
    let one = first.len().min(to.len());
    to[..one].copy_from_slice(&first[..one]);
    let two = second.len().min(to.len() - one);
    to[one..one + two].copy_from_slice(&second[..two]);
}

fn lend_heads(env: &mut Env<'_>, chunk: BufId, heads: &mut Range<usize>, parts: &mut Vec<Reading>) {
    if heads.start < heads.end {
        parts.push(env.pool.lend(chunk, heads.clone()));
        heads.start = heads.end;
    }
}

/// False: not all of it found a place.
fn lend_data(env: &mut Env<'_>, data: Data, range: Range<usize>, parts: &mut Vec<Reading>) -> bool {
    match data {
        Data::None => true,
        Data::Buf(buf) => {
            parts.push(env.pool.lend(buf, range));
            true
        }
        Data::Zeroes(_) => {
            let mut left = range.len();
            while left > 0 {
                if parts.len() + 2 > SEND_PARTS {
                    return false;
                }
                let now = left.min(ZEROES_LEN);
                parts.push(env.pool.lend(env.zeroes, 0..now));
                left -= now;
            }
            true
        }
    }
}

fn len_of(env: &Env<'_>, data: Data) -> usize {
    match data {
        Data::None => 0,
        Data::Buf(buf) => env.pool.len(buf),
        Data::Zeroes(len) => len,
    }
}
