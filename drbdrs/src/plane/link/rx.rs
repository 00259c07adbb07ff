//! The receiving half of a socket: bytes to packets, with data in buffers of its own.

use drbd_core::event::{Payload, StreamLoss};
use drbd_core::ids::BufId;
use drbd_types::ByteLen;
use drbd_wire::frame::Phase;
use drbd_wire::{Context, Incoming, Packet, PeerError, Reader, Stream, Want};

use super::super::Env;
use super::super::buf::{Writing, Zone};
use super::super::inbox::{End, Inbox};
use super::super::io::{Fd, OpKey, Tag};

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

/// A packet whose data is still being received.
#[derive(Debug)]
struct Pending {
    incoming: Incoming,
    buf: Option<BufId>,
}

/// The state.
#[derive(Debug)]
pub(super) struct Rx {
    reader: Reader,
    inbox: Inbox,
    pending: Option<Pending>,
    /// Take no byte more than the reader wants: the next packet may look different.
    is_exact: bool,
    is_over: bool,
}

impl Rx {
    /// For one packet of the handshake, or for the first of a socket.
    pub(super) const fn new() -> Self {
        Self {
            reader: Reader::new(Stream::Data, Phase::Initial),
            inbox: Inbox::new(Zone::Net, STAGING_SMALL),
            pending: None,
            is_exact: true,
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
        self.inbox.resize(
            env,
            match stream {
                Stream::Data => 32 << 10,
                Stream::Meta => 8 << 10,
            },
        );
    }

    /// Digest of the peer's data packets from the next one on.
    pub(super) const fn expect_digest(&mut self, algorithm: Option<drbd_wire::Algorithm>) {
        self.reader.context.integrity = algorithm;
    }

    /// Is something with the kernel?
    pub(super) const fn in_flight(&self) -> Option<OpKey> {
        self.inbox.in_flight()
    }

    /// The next packet. Otherwise a receive is started if `may_receive`.
    pub(super) fn poll(
        &mut self,
        env: &mut Env<'_>,
        socket: &Fd,
        tag: Tag,
        may_receive: bool,
    ) -> Polled {
        if self.inbox.in_flight().is_some() || self.is_over {
            return Polled::Nothing;
        }
        match (self.next(env), self.inbox.ended()) {
            (Ok(Some((incoming, payload))), _) => return Polled::Packet(incoming, payload),
            (Err(error), _) => return self.lost(StreamLoss::Bad { error }),
            (Ok(None), None) => {}
            // For want of memory there may be more to come from what was received.
            (Ok(None), Some(_)) if self.lacks_memory() => {}
            (Ok(None), Some(End::Closed)) => return self.lost(StreamLoss::Closed),
            (Ok(None), Some(End::Failed(libc::ECONNRESET))) => return self.lost(StreamLoss::Reset),
            (Ok(None), Some(End::Failed(errno))) => {
                return self.lost(StreamLoss::ReceiveFailed(errno));
            }
        }
        if may_receive && !self.lacks_memory() {
            let total = match self.reader.want() {
                Want::Inline(len) if self.is_exact => Some(len),
                Want::Inline(_) | Want::Data(_) => None,
            };
            self.inbox.receive(env, socket, tag, total);
        }
        Polled::Nothing
    }

    fn lacks_memory(&self) -> bool {
        matches!(self.pending, Some(Pending { buf: None, .. }))
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
            if self.pending.is_some() {
                return Ok(self.fill(env));
            }
            let Want::Inline(len) = self.reader.want() else { return Ok(None) };
            let Some(bytes) = self.inbox.take(env.pool, len) else { return Ok(None) };
            match self.reader.feed(bytes)? {
                None => {}
                Some(incoming) if incoming.data_len == 0 => return Ok(Some((incoming, None))),
                Some(incoming) => self.pending = Some(Pending { incoming, buf: None }),
            }
        }
    }

    /// Moves what is there of the data into its buffer; the packet, once all is there.
    fn fill(&mut self, env: &mut Env<'_>) -> Option<(Incoming, Option<Payload>)> {
        let pending = self.pending.as_mut()?;
        let len = pending.incoming.data_len as usize;
        if pending.buf.is_none() {
            // Exhausted: reading waits until the engine lets go of something.
            let buf = env.pool.alloc(Zone::Net, len)?;
            pending.buf = Some(buf);
            self.inbox.expect(buf, len);
        }
        if !self.inbox.fill(env) {
            return None;
        }
        let Pending { incoming, buf } = self.pending.take()?;
        let buf = buf?;
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

    /// A receive has ended.
    pub(super) fn done(
        &mut self,
        env: &mut Env<'_>,
        into: [Option<Writing>; 2],
        result: Result<u32, i32>,
    ) {
        self.inbox.done(env, into, result);
    }

    /// Nothing more is received.
    pub(super) fn drop_all(&mut self, env: &mut Env<'_>) {
        self.is_over = true;
        self.inbox.drop_all(env);
        if let Some(buf) = self.pending.take().and_then(|pending| pending.buf) {
            env.pool.release(buf);
        }
    }
}
