//! One of the two TCP connections: bytes in, packets out, one packet at a time.
//!
//! A packet is cut only when it is asked for, because what it looks like depends on the packets
//! before it.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use drbd_wire::frame::Phase;
use drbd_wire::{Algorithm, Context, Incoming, Packet, Reader, Stream, Want, encode};

use super::Received;

/// How long the peer may leave us waiting with full buffers.
const SEND_DEADLINE: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub(super) struct Half {
    pub(super) socket: TcpStream,
    pub(super) reader: Reader,
    /// What our own packets look like.
    pub(super) context: Context,
    stream: Stream,
    buffer: Vec<u8>,
    /// A packet whose data is not complete.
    pending: Option<Incoming>,
    /// The peer has closed it, or it failed.
    pub(super) is_closed: bool,
}

impl Half {
    pub(super) fn new(socket: TcpStream, stream: Stream, phase: Phase) -> Result<Self> {
        socket.set_nodelay(true)?;
        socket.set_nonblocking(false)?;
        socket.set_write_timeout(Some(SEND_DEADLINE))?;
        Ok(Self {
            socket,
            reader: Reader::new(stream, phase),
            context: Context::FRESH,
            stream,
            buffer: Vec::new(),
            pending: None,
            is_closed: false,
        })
    }

    pub(super) fn send(&mut self, volume: u16, packet: &Packet, data: &[u8]) -> Result<()> {
        let mut bytes = Vec::with_capacity(data.len() + 128);
        encode(&self.context, volume, packet, data.len(), &mut bytes);
        bytes.extend_from_slice(data);
        self.send_bytes(&bytes)
    }

    pub(super) fn send_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.socket.write_all(bytes).with_context(|| format!("sending on {:?}", self.stream))
    }

    /// Reads once; to be called when there is something, or when waiting is wanted.
    pub(super) fn read(&mut self) -> Result<()> {
        let mut chunk = vec![0; 1 << 16];
        match self.socket.read(&mut chunk) {
            Ok(0) => self.is_closed = true,
            Ok(n) => self.buffer.extend_from_slice(&chunk[..n]),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) if e.kind() == ErrorKind::ConnectionReset => self.is_closed = true,
            Err(e) => return Err(e).with_context(|| format!("receiving on {:?}", self.stream)),
        }
        Ok(())
    }

    /// The next packet, if it is complete.
    pub(super) fn cut(&mut self) -> Result<Option<Received>> {
        loop {
            match self.reader.want() {
                Want::Inline(len) => {
                    let Some(bytes) = self.take(len) else { return Ok(None) };
                    let fed = self.reader.feed(&bytes);
                    let Some(incoming) = fed.with_context(|| format!("on {:?}", self.stream))?
                    else {
                        continue;
                    };
                    if incoming.data_len == 0 {
                        return Ok(Some(self.complete(incoming, Vec::new())));
                    }
                    self.pending = Some(incoming);
                }
                Want::Data(len) => {
                    let Some(data) = self.take(len) else { return Ok(None) };
                    self.reader.data_done();
                    let Some(incoming) = self.pending.take() else { bail!("data of no packet") };
                    return Ok(Some(self.complete(incoming, data)));
                }
            }
        }
    }

    /// Bytes that were not cut yet?
    pub(super) const fn has_bytes(&self) -> bool {
        !self.buffer.is_empty()
    }

    /// Are there enough bytes to go on?
    pub(super) const fn could_cut(&self) -> bool {
        let (Want::Inline(len) | Want::Data(len)) = self.reader.want();
        self.buffer.len() >= len
    }

    /// After the first packet of an accepted connection.
    pub(super) fn into_stream(self, stream: Stream) -> Self {
        let phase = if stream == Stream::Data { Phase::Handshake } else { Phase::Running };
        Self { reader: Reader::new(stream, phase), stream, ..self }
    }

    fn complete(&mut self, incoming: Incoming, data: Vec<u8>) -> Received {
        if let Packet::Protocol(params) | Packet::ProtocolUpdate(params) = &incoming.packet {
            // What follows carries the digest that the sender has just announced.
            self.reader.context.integrity = Algorithm::from_name(&params.integrity_alg);
        }
        Received {
            stream: self.stream,
            volume: incoming.volume,
            packet: incoming.packet,
            data,
            at: Instant::now(),
        }
    }

    fn take(&mut self, len: usize) -> Option<Vec<u8>> {
        if self.buffer.len() < len {
            return None;
        }
        let rest = self.buffer.split_off(len);
        Some(std::mem::replace(&mut self.buffer, rest))
    }
}
