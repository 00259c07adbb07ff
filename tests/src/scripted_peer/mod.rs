//! A peer that does what a test tells it, message by message: against the kernel in a
//! [`crate::guest`], or against our own daemon.
//!
//! ```no_run
//! use std::time::Duration;
//! use drbd_wire::Packet;
//! use drbdrs_tests::scripted_peer::{OFFER, Parameters, ScriptedPeer};
//! # fn main() -> anyhow::Result<()> {
//! let mut peer = ScriptedPeer::connect(7789)?; // both connections, to 127.0.0.1
//! peer.features(OFFER)?;
//! let theirs = peer.exchange(&Parameters::fresh(peer.version(), 16_304))?;
//! println!("{}", theirs.uuids.is_some());
//! let state = peer.expect("the second state", |p| match p {
//!     Packet::State(word) => Some(*word),
//!     _ => None,
//! })?;
//! peer.send(&Packet::State(state))?;
//! # Ok(()) }
//! ```
//!
//! Nothing happens behind the test's back except that pings are answered, and that
//! [`Packet::UnplugRemote`], [`Packet::PingAck`] and answered pings are not shown (see
//! [`ScriptedPeer::answers_pings`]). There are no threads: packets are received while the test
//! waits for one. What an ordinary Secondary does all the time is in [`replica::Replica`].
//! Spec: wire-protocol.md.

mod half;
mod handshake;
pub mod replica;

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Debug;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use drbd_wire::frame::Phase;
use drbd_wire::packet::{AckKind, BlockAck, BlockId};
use drbd_wire::{Packet, Stream};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use self::half::Half;
pub use self::handshake::{OFFER, Parameters, Theirs, first_state, offer};

/// How long an expected packet may take.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// A packet with its data.
#[derive(Clone, Debug)]
pub struct Received {
    /// Where it came.
    pub stream: Stream,
    /// Volume of the header.
    pub volume: u16,
    /// The packet.
    pub packet: Packet,
    /// What followed it.
    pub data: Vec<u8>,
    /// When it was taken from the stream.
    pub at: Instant,
}

/// Both connections to the node under test.
#[derive(Debug)]
pub struct ScriptedPeer {
    data: Half,
    meta: Half,
    inbox: VecDeque<Received>,
    /// Last sequence numbers, per volume. Spec §6.1.
    sequence: BTreeMap<u16, u32>,
    /// Volume that [`Self::send`] writes into headers.
    pub volume: u16,
    /// Answer pings, and do not show them.
    pub answers_pings: bool,
    ping_acks: u64,
    /// Did we accept the meta connection? Then we decide conflicts. Spec §1.1.
    pub is_resolver: bool,
    /// The last packets in both directions, for messages.
    history: VecDeque<String>,
}

impl ScriptedPeer {
    /// Opens both connections to a port of 127.0.0.1, and says which is which.
    ///
    /// # Errors
    /// Nobody listens.
    pub fn connect(port: u16) -> Result<Self> {
        let to = (Ipv4Addr::LOCALHOST, port);
        let data = TcpStream::connect(to).context("data connection")?;
        let mut data = Half::new(data, Stream::Data, Phase::Handshake)?;
        data.send(0, &Packet::InitialData, &[])?;
        let meta = TcpStream::connect(to).context("meta connection")?;
        let mut meta = Half::new(meta, Stream::Meta, Phase::Running)?;
        meta.send(0, &Packet::InitialMeta, &[])?;
        Ok(Self::new(data, meta, false))
    }

    /// Opens both connections as soon as the node under test listens, and until it has spoken:
    /// a forwarded port accepts connections all the time, and a node that is about to listen
    /// again refuses them.
    ///
    /// # Errors
    /// It does not within the deadline.
    pub fn connect_within(port: u16, deadline: Duration) -> Result<Self> {
        let end = Instant::now() + deadline;
        loop {
            let attempt = Self::connect(port).and_then(|mut peer| {
                let patience = Duration::from_secs(10).min(deadline);
                let spoke =
                    peer.wait(patience, |peer| peer.data.is_closed || peer.data.has_bytes())?;
                ensure!(spoke && !peer.data.is_closed, "closed before the first packet");
                Ok(peer)
            });
            match attempt {
                Ok(peer) => return Ok(peer),
                Err(e) if Instant::now() > end => return Err(e).context("connecting"),
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    /// Lets the node under test open both connections.
    ///
    /// # Errors
    /// It does not within the deadline, or says something else first.
    pub fn accept(listener: &TcpListener, deadline: Duration) -> Result<Self> {
        let end = Instant::now() + deadline;
        let (mut data, mut meta) = (None, None);
        listener.set_nonblocking(true)?;
        while data.is_none() || meta.is_none() {
            ensure!(Instant::now() < end, "no two connections within {deadline:?}");
            let Ok((socket, _)) = listener.accept() else {
                std::thread::sleep(Duration::from_millis(10));
                continue;
            };
            let mut first = Half::new(socket, Stream::Data, Phase::Initial)?;
            let packet = loop {
                if let Some(received) = first.cut()? {
                    break received.packet;
                }
                ensure!(!first.is_closed, "closed before the first packet");
                first.socket.set_read_timeout(Some(deadline))?;
                first.read()?;
            };
            match packet {
                Packet::InitialData => data = Some(first.into_stream(Stream::Data)),
                Packet::InitialMeta => meta = Some(first.into_stream(Stream::Meta)),
                other => bail!("expected a first packet, received {other:?}"),
            }
        }
        match (data, meta) {
            (Some(data), Some(meta)) => Ok(Self::new(data, meta, true)),
            _ => bail!("no two connections"),
        }
    }

    fn new(data: Half, meta: Half, is_resolver: bool) -> Self {
        Self {
            data,
            meta,
            inbox: VecDeque::new(),
            sequence: BTreeMap::new(),
            volume: 0,
            answers_pings: true,
            ping_acks: 0,
            is_resolver,
            history: VecDeque::new(),
        }
    }

    /// Agreed version; 0 before the features were exchanged.
    pub const fn version(&self) -> u32 {
        self.data.reader.context.version
    }

    /// The next sequence number of a volume.
    pub fn next_sequence(&mut self, volume: u16) -> u32 {
        let number = self.sequence.entry(volume).or_default();
        *number = number.wrapping_add(1);
        *number
    }

    /// Sends a packet where packets of its kind belong.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn send(&mut self, packet: &Packet) -> Result<()> {
        self.send_with(packet, &[])
    }

    /// Sends a packet with data.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn send_with(&mut self, packet: &Packet, data: &[u8]) -> Result<()> {
        let stream = stream_of(packet);
        self.note(">", stream, packet, data.len());
        let volume = if is_of_connection(packet) { 0 } else { self.volume };
        self.half(stream).send(volume, packet, data)
    }

    /// Sends an acknowledgement of a block, with the next sequence number.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn acknowledge(
        &mut self,
        kind: AckKind,
        sector: drbd_types::Sector,
        id: BlockId,
        size: u32,
    ) -> Result<()> {
        let seq = self.next_sequence(self.volume);
        self.send(&Packet::Ack(kind, BlockAck { sector, id, size, seq }))
    }

    /// Sends any bytes.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn send_bytes(&mut self, stream: Stream, bytes: &[u8]) -> Result<()> {
        self.half(stream).send_bytes(bytes)
    }

    /// The next packet on either connection; `None` when the time is up.
    ///
    /// # Errors
    /// The node under test has closed the connection and nothing is left, or broke the protocol.
    pub fn receive(&mut self, deadline: Duration) -> Result<Option<Received>> {
        if let Some(received) = self.inbox.pop_front() {
            return Ok(Some(received));
        }
        self.receive_new(Instant::now() + deadline)
    }

    /// The next packet, which must be what `pick` accepts.
    ///
    /// # Errors
    /// Another packet, none in time, or the end of the connection.
    pub fn expect<T>(
        &mut self,
        what: &str,
        mut pick: impl FnMut(&Packet) -> Option<T>,
    ) -> Result<T> {
        let received = self.receive(DEADLINE).with_context(|| self.story(what))?;
        let received = received.with_context(|| self.story(what))?;
        pick(&received.packet).with_context(|| {
            format!("received {:?} instead of {}", received.packet, self.story(what))
        })
    }

    /// Waits for a packet; those before it stay for later.
    ///
    /// # Errors
    /// None in time, or the end of the connection.
    pub fn find<T>(
        &mut self,
        what: &str,
        mut pick: impl FnMut(&Received) -> Option<T>,
    ) -> Result<T> {
        let end = Instant::now() + DEADLINE;
        let mut at = 0;
        loop {
            while let Some(received) = self.inbox.get(at) {
                if let Some(picked) = pick(received) {
                    self.inbox.remove(at);
                    return Ok(picked);
                }
                at += 1;
            }
            let received = self.receive_new(end).with_context(|| self.story(what))?;
            self.inbox.push_back(received.with_context(|| self.story(what))?);
        }
    }

    /// Waits until the node under test closes the data connection. Packets that come before stay.
    ///
    /// # Errors
    /// It stays open.
    pub fn wait_closed(&mut self, deadline: Duration) -> Result<()> {
        let end = Instant::now() + deadline;
        loop {
            match self.receive_new(end) {
                Ok(Some(received)) => self.inbox.push_back(received),
                Ok(None) => bail!("still open: {}", self.story("the end of the connection")),
                Err(_) if self.data.is_closed || self.meta.is_closed => return Ok(()),
                Err(e) => return Err(e),
            }
        }
    }

    /// Sends a ping and waits for its answer: then everything that was sent on the meta connection
    /// before has been processed. Packets that come before stay.
    ///
    /// # Errors
    /// No answer, or the end of the connection.
    pub fn ping(&mut self) -> Result<()> {
        let end = Instant::now() + DEADLINE;
        let before = self.ping_acks;
        self.send(&Packet::Ping)?;
        while self.ping_acks == before {
            // Cut off in between, so that the answer is noticed without a packet behind it.
            let slice = end.min(Instant::now() + Duration::from_millis(20));
            if let Some(received) = self.receive_new(slice)? {
                self.inbox.push_back(received);
            }
            ensure!(Instant::now() < end, "{}", self.story("no answer to a ping"));
        }
        Ok(())
    }

    /// What was sent and received last, as part of a message.
    pub fn story(&self, what: &str) -> String {
        let history: Vec<&str> = self.history.iter().map(String::as_str).collect();
        format!("{what}; last packets:\n  {}", history.join("\n  "))
    }

    fn half(&mut self, stream: Stream) -> &mut Half {
        match stream {
            Stream::Data => &mut self.data,
            Stream::Meta => &mut self.meta,
        }
    }

    fn note(&mut self, arrow: &str, stream: Stream, packet: &impl Debug, data: usize) {
        if self.history.len() == 40 {
            self.history.pop_front();
        }
        let mut text = format!("{arrow} {stream:?} {packet:?}");
        if text.len() > 300 {
            text = text.chars().take(300).chain("...".chars()).collect();
        }
        if data > 0 {
            text.push_str(&format!(" + {data} bytes"));
        }
        self.history.push_back(text);
    }

    fn receive_new(&mut self, end: Instant) -> Result<Option<Received>> {
        loop {
            // On meta nothing can be cut before it is known what headers look like.
            let streams: &[Stream] =
                if self.version() == 0 { &[Stream::Data] } else { &[Stream::Meta, Stream::Data] };
            for stream in streams {
                if let Some(received) = self.half(*stream).cut()?
                    && !self.is_hidden(&received)?
                {
                    self.note("<", *stream, &received.packet, received.data.len());
                    return Ok(Some(received));
                }
            }
            if self.data.could_cut() || self.version() > 0 && self.meta.could_cut() {
                continue;
            }
            ensure!(!self.data.is_closed, "the data connection was closed by the other side");
            ensure!(!self.meta.is_closed, "the meta connection was closed by the other side");
            if !self.poll(end)? {
                return Ok(None);
            }
        }
    }

    fn is_hidden(&mut self, received: &Received) -> Result<bool> {
        match received.packet {
            Packet::UnplugRemote => Ok(true),
            Packet::PingAck => {
                self.ping_acks += 1;
                Ok(true)
            }
            Packet::Ping if self.answers_pings => {
                self.meta.send(0, &Packet::PingAck, &[]).map(|()| true)
            }
            _ => Ok(false),
        }
    }

    /// Waits until something can be read, and reads it. `false`: the time is up.
    fn poll(&mut self, end: Instant) -> Result<bool> {
        let left = end.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left)?;
        let flags = PollFlags::IN | PollFlags::HUP | PollFlags::ERR;
        let mut polled =
            [PollFd::new(&self.data.socket, flags), PollFd::new(&self.meta.socket, flags)];
        let count = poll(&mut polled, Some(&timeout))?;
        let is_ready = [!polled[0].revents().is_empty(), !polled[1].revents().is_empty()];
        if is_ready[0] {
            self.data.read()?;
        }
        if is_ready[1] {
            self.meta.read()?;
        }
        Ok(count > 0)
    }

    /// Reads until the condition holds; `false` when the time is up.
    fn wait(&mut self, deadline: Duration, mut is_met: impl FnMut(&Self) -> bool) -> Result<bool> {
        let end = Instant::now() + deadline;
        while !is_met(self) {
            if !self.poll(end)? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Spec §4.1, column "conn.".
fn stream_of(packet: &Packet) -> Stream {
    match packet {
        Packet::Ping
        | Packet::PingAck
        | Packet::Ack(..)
        | Packet::BarrierAck(..)
        | Packet::StateChgReply(_)
        | Packet::ConnStChgReply(_)
        | Packet::InitialMeta => Stream::Meta,
        _ => Stream::Data,
    }
}

/// Spec §2: these have volume 0.
fn is_of_connection(packet: &Packet) -> bool {
    matches!(
        packet,
        Packet::Ping
            | Packet::PingAck
            | Packet::Barrier(_)
            | Packet::BarrierAck(..)
            | Packet::Protocol(_)
            | Packet::ProtocolUpdate(_)
            | Packet::AuthChallenge(_)
            | Packet::AuthResponse(_)
            | Packet::ConnStChgReq(..)
            | Packet::ConnStChgReply(_)
    )
}
