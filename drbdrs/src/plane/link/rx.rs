//! The receiving half of a socket: bytes to packets, with data in buffers of its own.
//!
//! A receive takes whatever there is into a staging buffer; when data is expected, it first fills
//! the data's buffer, and what comes behind goes to the staging buffer in the same call.

use drbd_core::event::{Payload, StreamLoss};
use drbd_core::ids::BufId;
use drbd_types::ByteLen;
use drbd_wire::frame::Phase;
use drbd_wire::{Context, Incoming, Packet, PeerError, Reader, Stream, Want};

use super::super::Env;
use super::super::buf::{Writing, Zone};
use super::super::io::{Fd, Op, OpKey, Tag};

/// Staging of an established stream, bytes. Larger than any inline part.
const STAGING: [(Stream, usize); 2] = [(Stream::Data, 32 << 10), (Stream::Meta, 8 << 10)];
/// Staging during the handshake: any inline part.
const STAGING_SMALL: usize = 4096;

/// A packet, or why there is none.
#[derive(Debug)]
pub(super) enum Polled {
    /// A whole packet.
    Packet(Incoming, Option<Payload>),
    /// More bytes are on their way, or not wanted now.
    Nothing,
    /// No more packets.
    Lost(StreamLoss),
}

/// Data that is being received.
#[derive(Debug)]
struct Data {
    incoming: Incoming,
    buf: Option<BufId>,
    len: usize,
    got: usize,
}

/// The state.
#[derive(Debug)]
pub(super) struct Rx {
    reader: Reader,
    staging: Option<BufId>,
    staging_len: usize,
    /// Unread bytes in it.
    start: usize,
    end: usize,
    data: Option<Data>,
    in_flight: Option<OpKey>,
    /// Take no byte more than the reader wants: the next packet may look different.
    is_exact: bool,
    loss: Option<StreamLoss>,
    is_over: bool,
}

impl Rx {
    /// For one packet of the handshake, or for the first of a socket.
    pub(super) const fn new() -> Self {
        Self {
            reader: Reader::new(Stream::Data, Phase::Initial),
            staging: None,
            staging_len: STAGING_SMALL,
            start: 0,
            end: 0,
            data: None,
            in_flight: None,
            is_exact: true,
            loss: None,
            is_over: false,
        }
    }

    /// The next packet is one of the handshake.
    pub(super) const fn expect_one(&mut self, phase: Phase, context: Context) {
        self.reader = Reader::new(Stream::Data, phase);
        self.reader.context = context;
    }

    /// From now on it is one of the two streams. Nothing has been received beyond the handshake.
    pub(super) fn become_stream(&mut self, env: &mut Env<'_>, stream: Stream, context: Context) {
        self.reader = Reader::new(stream, Phase::Running);
        self.reader.context = context;
        self.is_exact = false;
        // The small buffer is too small to be worth keeping; nothing is in it or in flight.
        if let Some(small) = self.staging.take() {
            env.pool.release(small);
        }
        self.staging_len = STAGING.iter().find(|s| s.0 == stream).map_or(STAGING_SMALL, |s| s.1);
    }

    /// Digest of the peer's data packets from the next one on.
    pub(super) const fn expect_digest(&mut self, algorithm: Option<drbd_wire::Algorithm>) {
        self.reader.context.integrity = algorithm;
    }

    /// Is something with the kernel?
    pub(super) const fn in_flight(&self) -> Option<OpKey> {
        self.in_flight
    }

    /// The next packet. Otherwise a receive is started if `may_receive`.
    pub(super) fn poll(
        &mut self,
        env: &mut Env<'_>,
        socket: &Fd,
        tag: Tag,
        may_receive: bool,
    ) -> Polled {
        if self.in_flight.is_some() || self.is_over {
            return Polled::Nothing;
        }
        match self.next(env) {
            Ok(Some((incoming, payload))) => Polled::Packet(incoming, payload),
            Err(error) => self.lost(StreamLoss::Bad { error }),
            Ok(None) => match self.loss.take() {
                Some(loss) => self.lost(loss),
                None => {
                    if may_receive {
                        self.receive(env, socket, tag);
                    }
                    Polled::Nothing
                }
            },
        }
    }

    fn lost(&mut self, loss: StreamLoss) -> Polled {
        self.is_over = true;
        Polled::Lost(loss)
    }

    /// A whole packet from what is there.
    fn next(
        &mut self,
        env: &mut Env<'_>,
    ) -> Result<Option<(Incoming, Option<Payload>)>, PeerError> {
        loop {
            if self.data.is_some() {
                return Ok(self.fill(env));
            }
            let Want::Inline(len) = self.reader.want() else { return Ok(None) };
            let Some(staging) = self.staging else { return Ok(None) };
            if self.end - self.start < len {
                return Ok(None);
            }
            let bytes = &env.pool.bytes(staging)[self.start..self.start + len];
            self.start += len;
            match self.reader.feed(bytes)? {
                None => {}
                Some(incoming) if incoming.data_len == 0 => return Ok(Some((incoming, None))),
                Some(incoming) => {
                    let len = incoming.data_len as usize;
                    self.data = Some(Data { incoming, buf: None, len, got: 0 });
                }
            }
        }
    }

    /// Moves what is there of the data into its buffer; the packet, once all is there.
    fn fill(&mut self, env: &mut Env<'_>) -> Option<(Incoming, Option<Payload>)> {
        let data = self.data.as_mut()?;
        if data.buf.is_none() {
            // Exhausted: reading waits until the engine lets go of something.
            data.buf = Some(env.pool.alloc(Zone::Net, data.len)?);
        }
        let buf = data.buf?;
        let there = (self.end - self.start).min(data.len - data.got);
        if let (Some(staging), 1..) = (self.staging, there) {
            let lease = env.pool.lend(staging, self.start..self.start + there);
            let place = data.got..data.got + there;
            env.pool.bytes_mut(buf)[place].copy_from_slice(lease.bytes());
            env.pool.take_back(lease);
            self.start += there;
            data.got += there;
        }
        if data.got < data.len {
            return None;
        }
        let Data { incoming, len, .. } = self.data.take()?;
        self.reader.data_done();
        let digest_ok = self.verify(env, &incoming.packet, buf);
        Some((incoming, Some(Payload { buf, len: ByteLen(len as u64), digest_ok })))
    }

    fn verify(&self, env: &Env<'_>, packet: &Packet, buf: BufId) -> Option<bool> {
        let algorithm = self.reader.context.integrity?;
        match packet {
            Packet::Data(_, digest)
            | Packet::DataReply(_, digest)
            | Packet::RsDataReply(_, digest) => {
                Some(algorithm.digest(env.pool.bytes(buf)) == *digest)
            }
            _ => None,
        }
    }

    fn receive(&mut self, env: &mut Env<'_>, socket: &Fd, tag: Tag) {
        if self.staging.is_none() {
            self.staging = env.pool.alloc(Zone::Net, self.staging_len);
        }
        let Some(staging) = self.staging else { return };
        // What is left of an incomplete head moves to the front.
        let left = self.end - self.start;
        env.pool.bytes_mut(staging).copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, left);
        let payload = match &self.data {
            Some(Data { buf: None, .. }) => return,
            Some(Data { buf: Some(buf), len, got, .. }) => {
                Some(env.pool.lend_mut(*buf, *got..*len))
            }
            None => None,
        };
        let until = match self.reader.want() {
            Want::Inline(len) if self.is_exact => len.max(left),
            _ => self.staging_len,
        };
        let into = [payload, Some(env.pool.lend_mut(staging, left..until))];
        let into = match into {
            [None, staging] => [staging, None],
            both => both,
        };
        let op = Op::Recv { socket: Fd::clone(socket), into };
        self.in_flight = Some(env.io.submit(tag, op));
    }

    /// A receive has ended.
    pub(super) fn done(
        &mut self,
        env: &mut Env<'_>,
        into: [Option<Writing>; 2],
        result: Result<u32, i32>,
    ) {
        self.in_flight = None;
        let staging = self.staging;
        let mut got = *result.as_ref().unwrap_or(&0) as usize;
        for lease in into.into_iter().flatten() {
            let now = got.min(lease.len());
            got -= now;
            if Some(lease.buf()) == staging {
                self.end += now;
            } else if let Some(data) = &mut self.data {
                data.got += now;
            }
            env.pool.take_back_mut(lease);
        }
        match result {
            Ok(0) => self.loss = Some(StreamLoss::Closed),
            Ok(_) | Err(libc::EAGAIN | libc::EINTR) => {}
            Err(libc::ECONNRESET) => self.loss = Some(StreamLoss::Reset),
            Err(errno) => self.loss = Some(StreamLoss::ReceiveFailed(errno)),
        }
    }

    /// Nothing more is received.
    pub(super) fn drop_all(&mut self, env: &mut Env<'_>) {
        self.is_over = true;
        let data = self.data.take().and_then(|data| data.buf);
        for buf in [self.staging.take(), data].into_iter().flatten() {
            env.pool.release(buf);
        }
    }
}
