//! TCP connections between the two nodes, as far as the shells see them: ordered messages, each an
//! encoded packet with its data beside it; an end, or a reset.
//!
//! ```text
//!   post -> pipe (in order, bounded send buffer) -> on the way -> arrived -> consumed by the node
//!                                                      \-> held while the direction is blocked
//! ```

use std::collections::VecDeque;

use drbd_core::ids::SendToken;
use drbd_core::link::HangUp;

use crate::disk::Tags;

/// One packet on its way.
#[derive(Clone, Debug)]
pub struct Message {
    /// Header and inline part.
    pub bytes: Vec<u8>,
    /// Data that follows it, one number per sector.
    pub data: Tags,
}

impl Message {
    /// Bytes on the wire.
    pub fn len(&self) -> u64 {
        (self.bytes.len() + self.data.len() * 512) as u64
    }

    /// Never.
    pub const fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

/// What travels.
#[derive(Clone, Debug)]
pub enum Item {
    /// A packet.
    Message(Message),
    /// The end of the stream.
    End(HangUp),
}

/// What one side sends to the other.
#[derive(Clone, Debug, Default)]
pub struct Pipe {
    /// Bytes sent, and bytes that arrived.
    pub sent: u64,
    /// Bytes that arrived.
    pub moved: u64,
    /// Sends that the transport has not taken: it takes them when that much has been sent.
    pub tokens: VecDeque<(u64, SendToken)>,
    /// When the last item arrives: in order.
    pub last_arrival: u64,
    /// Arrived while the direction is blocked.
    pub held: VecDeque<Item>,
    /// More than half of the send buffer is in use, as told last.
    pub was_congested: bool,
    /// A report of the send queue is due.
    pub is_reporting: bool,
}

/// One end of a connection.
#[derive(Clone, Debug, Default)]
pub struct End {
    /// Arrived and not consumed.
    pub arrived: VecDeque<Item>,
    /// Broken: nothing arrives any more.
    pub is_broken: bool,
    /// This side has closed.
    pub is_gone: bool,
    /// What this side sends.
    pub out: Pipe,
}

/// Number of a connection.
pub type ConnId = u32;

/// All connections; side 0 belongs to node 0.
#[derive(Clone, Debug, Default)]
pub struct Net {
    /// Few, in the order of their numbers.
    conns: Vec<(ConnId, [End; 2])>,
    next: ConnId,
    /// Nothing that this node sends gets through.
    pub blocked: [bool; 2],
    /// Which nodes listen.
    pub listening: [bool; 2],
}

impl Net {
    /// A new connection.
    pub fn open(&mut self) -> ConnId {
        self.next += 1;
        self.conns.push((self.next, <[End; 2]>::default()));
        self.next
    }

    /// One end.
    pub fn end(&mut self, conn: ConnId, side: usize) -> Option<&mut End> {
        let (_, ends) = self.conns.iter_mut().find(|(number, _)| *number == conn)?;
        ends.get_mut(side)
    }

    /// All connections.
    pub fn all(&self) -> Vec<ConnId> {
        self.conns.iter().map(|(conn, _)| *conn).collect()
    }

    /// One side of all connections.
    pub fn side(&mut self, side: usize) -> impl Iterator<Item = (ConnId, &mut End)> {
        self.conns.iter_mut().filter_map(move |(conn, ends)| Some((*conn, ends.get_mut(side)?)))
    }

    /// Forgets connections whose ends are both gone.
    pub fn forget_dead(&mut self) {
        self.conns.retain(|(_, ends)| !ends.iter().all(|end| end.is_gone));
    }
}
