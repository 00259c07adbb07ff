//! TCP connections between the two nodes, as far as the shells see them: ordered messages, each an
//! encoded packet with its data beside it; an end, or a reset.

use std::collections::{BTreeMap, VecDeque};

/// One packet on its way.
#[derive(Clone, Debug)]
pub struct Message {
    /// Header and inline part.
    pub bytes: Vec<u8>,
    /// Data that follows it, one number per sector.
    pub data: Vec<u64>,
}

/// One end of a connection.
#[derive(Clone, Debug, Default)]
pub struct End {
    /// Arrived and not consumed.
    pub arrived: VecDeque<Message>,
    /// The other side has closed, or the connection is broken; after what has arrived.
    pub is_closed: bool,
    /// This side has closed.
    pub is_gone: bool,
}

/// Number of a connection.
pub type ConnId = u32;

/// All connections; side 0 belongs to node 0.
#[derive(Clone, Debug, Default)]
pub struct Net {
    conns: BTreeMap<ConnId, [End; 2]>,
    next: ConnId,
    /// Nothing gets through, in either direction.
    pub is_cut: bool,
    /// Which nodes listen.
    pub listening: [bool; 2],
}

impl Net {
    /// A new connection.
    pub fn open(&mut self) -> ConnId {
        self.next += 1;
        self.conns.insert(self.next, <[End; 2]>::default());
        self.next
    }

    /// One end.
    pub fn end(&mut self, conn: ConnId, side: usize) -> Option<&mut End> {
        self.conns.get_mut(&conn)?.get_mut(side)
    }

    /// All connections.
    pub fn all(&self) -> Vec<ConnId> {
        self.conns.keys().copied().collect()
    }

    /// Forgets a connection whose ends are both gone.
    pub fn forget_dead(&mut self) {
        self.conns.retain(|_, ends| !ends.iter().all(|end| end.is_gone));
    }
}
