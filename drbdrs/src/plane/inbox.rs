//! The receiving half of a socket: bytes into a staging buffer, and what is known to be data into
//! its final buffer.
//!
//! A receive takes whatever there is; while data is expected, it first fills the data's buffer, and
//! what comes behind goes to the staging buffer in the same call.

use drbd_core::ids::BufId;

use super::Env;
use super::buf::{Pool, Writing, Zone};
use super::io::{Fd, Op, OpKey, Tag};

/// How a socket ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The other side closed it.
    Closed,
    /// The errno.
    Failed(i32),
}

/// Data that is being received.
#[derive(Clone, Copy, Debug)]
struct Target {
    buf: BufId,
    len: usize,
    got: usize,
}

/// The state.
#[derive(Debug)]
pub(crate) struct Inbox {
    zone: Zone,
    staging: Option<BufId>,
    capacity: usize,
    /// Unread bytes in it.
    start: usize,
    end: usize,
    target: Option<Target>,
    in_flight: Option<OpKey>,
    ended: Option<End>,
}

impl Inbox {
    /// With a staging buffer of this capacity, once something is received.
    pub(crate) const fn new(zone: Zone, capacity: usize) -> Self {
        Self {
            zone,
            staging: None,
            capacity,
            start: 0,
            end: 0,
            target: None,
            in_flight: None,
            ended: None,
        }
    }

    /// Changes the capacity of an empty inbox.
    pub(crate) fn resize(&mut self, env: &mut Env<'_>, capacity: usize) {
        assert!(self.in_flight.is_none() && self.start == self.end, "not empty");
        if let Some(old) = self.staging.take() {
            env.pool.release(old);
        }
        (self.start, self.end, self.capacity) = (0, 0, capacity);
    }

    /// What was received elsewhere. False: no memory, or too much.
    pub(crate) fn preload(&mut self, env: &mut Env<'_>, bytes: &[u8]) -> bool {
        if bytes.is_empty() {
            return true;
        }
        if self.staging.is_none() {
            self.staging = env.pool.alloc(self.zone, self.capacity);
        }
        match self.staging {
            Some(staging) if bytes.len() <= self.capacity - self.end => {
                let end = self.end + bytes.len();
                env.pool.bytes_mut(staging)[self.end..end].copy_from_slice(bytes);
                self.end = end;
                true
            }
            _ => false,
        }
    }

    /// With the kernel now?
    pub(crate) const fn in_flight(&self) -> Option<OpKey> {
        self.in_flight
    }

    /// How the socket ended. What came before can still be read.
    pub(crate) const fn ended(&self) -> Option<End> {
        self.ended
    }

    /// Unread bytes, not counting data.
    pub(crate) const fn available(&self) -> usize {
        self.end - self.start
    }

    /// The next bytes, taken.
    pub(crate) fn take<'p>(&mut self, pool: &'p Pool, len: usize) -> Option<&'p [u8]> {
        let staging = self.staging.filter(|_| self.in_flight.is_none())?;
        if self.available() < len {
            return None;
        }
        self.start += len;
        pool.bytes(staging).get(self.start - len..self.start)
    }

    /// Drops at most this many unread bytes; how many they were.
    pub(crate) fn skip(&mut self, most: usize) -> usize {
        let now = most.min(self.available());
        self.start += now;
        now
    }

    /// The next bytes belong into this buffer.
    pub(crate) const fn expect(&mut self, buf: BufId, len: usize) {
        self.target = Some(Target { buf, len, got: 0 });
    }

    /// Moves what is there to where it is expected. True: all that was expected is there.
    pub(crate) fn fill(&mut self, env: &mut Env<'_>) -> bool {
        let Some(target) = &mut self.target else { return true };
        let there = (self.end - self.start).min(target.len - target.got);
        if let (Some(staging), 1..) = (self.staging, there) {
            let lease = env.pool.lend(staging, self.start..self.start + there);
            let place = target.got..target.got + there;
            env.pool.bytes_mut(target.buf)[place].copy_from_slice(lease.bytes());
            env.pool.take_back(lease);
            self.start += there;
            target.got += there;
        }
        if target.got < target.len {
            return false;
        }
        self.target = None;
        true
    }

    /// Starts a receive. `total`: not more than so many unread bytes, else as many as fit.
    pub(crate) fn receive(
        &mut self,
        env: &mut Env<'_>,
        socket: &Fd,
        tag: Tag,
        total: Option<usize>,
    ) {
        if self.in_flight.is_some() || self.ended.is_some() {
            return;
        }
        if self.staging.is_none() {
            self.staging = env.pool.alloc(self.zone, self.capacity);
        }
        let Some(staging) = self.staging else { return };
        // What is left of an incomplete head moves to the front.
        let left = self.end - self.start;
        if self.start > 0 && left > 0 {
            env.pool.bytes_mut(staging).copy_within(self.start..self.end, 0);
        }
        (self.start, self.end) = (0, left);
        let target =
            self.target.map(|target| env.pool.lend_mut(target.buf, target.got..target.len));
        let until = total.unwrap_or(self.capacity).min(self.capacity);
        let staging = (until > left).then(|| env.pool.lend_mut(staging, left..until));
        let into = match [target, staging] {
            [None, staging] => [staging, None],
            both => both,
        };
        if into[0].is_some() {
            let op = Op::Recv { socket: Fd::clone(socket), into };
            self.in_flight = Some(env.io.submit(tag, op));
        }
    }

    /// A receive has ended.
    pub(crate) fn done(
        &mut self,
        env: &mut Env<'_>,
        into: [Option<Writing>; 2],
        result: Result<u32, i32>,
    ) {
        self.in_flight = None;
        let mut got = *result.as_ref().unwrap_or(&0) as usize;
        for lease in into.into_iter().flatten() {
            let now = got.min(lease.len());
            got -= now;
            if Some(lease.buf()) == self.staging {
                self.end += now;
            } else if let Some(target) = &mut self.target {
                target.got += now;
            }
            env.pool.take_back_mut(lease);
        }
        match result {
            Ok(0) => self.ended = Some(End::Closed),
            Ok(_) | Err(libc::EAGAIN | libc::EINTR) => {}
            Err(errno) => self.ended = Some(End::Failed(errno)),
        }
    }

    /// Nothing more is received. The buffer of expected data is the caller's.
    pub(crate) fn drop_all(&mut self, env: &mut Env<'_>) {
        self.ended = self.ended.or(Some(End::Closed));
        self.target = None;
        if let Some(staging) = self.staging.take() {
            env.pool.release(staging);
        }
        (self.start, self.end) = (0, 0);
    }
}
