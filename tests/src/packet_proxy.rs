//! A gate in a [`crate::proxy::Proxy`] that knows packets: it holds or delays single types of them.
//!
//! Headers tell their kind by their first bytes, so nothing that was agreed must be known. TCP
//! keeps the order: what follows a held packet on its stream waits too; the other stream and the
//! other direction go on.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::net::TcpStream;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use drbd_wire::Command;

/// Who has sent a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sender {
    /// The engine.
    Own,
    /// The kernel.
    Kernel,
}

impl Sender {
    /// The peer.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::Own => Self::Kernel,
            Self::Kernel => Self::Own,
        }
    }
}

type Kind = (Sender, Command);

#[derive(Debug, Default)]
struct Inner {
    /// `None`: until the gate opens.
    rules: BTreeMap<(Sender, u16), Option<Duration>>,
    waiting: BTreeMap<(Sender, u16), u32>,
    seen: BTreeMap<(Sender, u16), u64>,
    /// Counts openings: what waited then may pass, even if the rule is there again.
    openings: u64,
}

/// What may pass.
#[derive(Debug, Default)]
pub struct Gate {
    inner: Mutex<Inner>,
}

impl Gate {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Packets of this type wait until [`Self::open`].
    pub fn hold(&self, (from, command): Kind) {
        self.inner().rules.insert((from, command.number()), None);
    }

    /// Packets of this type wait so long each.
    pub fn delay(&self, (from, command): Kind, delay: Duration) {
        self.inner().rules.insert((from, command.number()), Some(delay));
    }

    /// Lets everything pass.
    pub fn open(&self) {
        let mut inner = self.inner();
        inner.rules.clear();
        inner.openings += 1;
    }

    /// Does such a packet wait?
    pub fn is_waiting(&self, (from, command): Kind) -> bool {
        self.inner().waiting.get(&(from, command.number())).is_some_and(|n| *n > 0)
    }

    /// How many have come by so far.
    pub fn seen(&self, (from, command): Kind) -> u64 {
        self.inner().seen.get(&(from, command.number())).copied().unwrap_or(0)
    }

    /// Waits as long as the rules say; `false`: given up because of `is_over`.
    pub(crate) fn pass(&self, from: Sender, command: u16, is_over: impl Fn() -> bool) -> bool {
        let kind = (from, command);
        let start = std::time::Instant::now();
        let openings = {
            let mut inner = self.inner();
            *inner.seen.entry(kind).or_default() += 1;
            if !inner.rules.contains_key(&kind) {
                return true;
            }
            *inner.waiting.entry(kind).or_default() += 1;
            inner.openings
        };
        let passes = loop {
            if is_over() {
                break false;
            }
            {
                let inner = self.inner();
                let delay = inner.rules.get(&kind).copied();
                let waits = delay.is_some_and(|d| d.is_none_or(|d| start.elapsed() < d));
                if !waits || inner.openings != openings {
                    break true;
                }
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        if let Some(n) = self.inner().waiting.get_mut(&kind) {
            *n -= 1;
        }
        passes
    }
}

/// Reads one packet with all that belongs to it, and says which command it has; `None` at the end.
pub(crate) fn read_packet(from: &mut &TcpStream, to: &mut Vec<u8>) -> io::Result<Option<u16>> {
    to.resize(8, 0);
    match from.read(&mut to[..1])? {
        0 => return Ok(None),
        _ => from.read_exact(&mut to[1..])?,
    }
    let word = |at: usize| u16::from_be_bytes([to[at], to[at + 1]]);
    let long = |at: usize| u32::from_be_bytes([to[at], to[at + 1], to[at + 2], to[at + 3]]);
    let (command, length) = match (long(0), word(0)) {
        (0x8374_0267, _) => (word(4), u32::from(word(6))),
        (_, 0x835a) => (word(2), long(4)),
        (0x8620_ec20, _) => {
            let found = (word(6), 0);
            to.resize(16, 0);
            from.read_exact(&mut to[8..])?;
            (found.0, u32::from_be_bytes([to[8], to[9], to[10], to[11]]))
        }
        (magic, _) => return Err(io::Error::other(format!("no packet begins with {magic:#010x}"))),
    };
    let (at, length) = (to.len(), length as usize);
    if length > 2 << 20 {
        return Err(io::Error::other(format!("a packet of {length} bytes")));
    }
    to.resize(at + length, 0);
    from.read_exact(&mut to[at..])?;
    Ok(Some(command))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{Ipv4Addr, TcpListener};

    use drbd_wire::packet::Features;
    use drbd_wire::{Context, Packet, encode};

    use super::*;

    #[test]
    fn packets_are_cut_in_every_kind_of_header() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        let mut bytes = Vec::new();
        for version in [86, 95, 101] {
            let context = Context { version, features: Features::OURS, integrity: None };
            encode(&context, 0, &Packet::Ping, 0, &mut bytes);
            encode(&context, 0, &Packet::Bitmap(vec![7; 800].into()), 0, &mut bytes);
        }
        client.write_all(&bytes).unwrap();
        drop(client);
        let mut all = Vec::new();
        let mut packet = Vec::new();
        let mut commands = Vec::new();
        while let Some(command) = read_packet(&mut &server, &mut packet).unwrap() {
            commands.push(command);
            all.extend_from_slice(&packet);
        }
        assert_eq!(commands, [0x13, 4, 0x13, 4, 0x13, 4]);
        assert_eq!(all, bytes);
    }

    #[test]
    fn a_held_type_waits_until_the_gate_opens() {
        let gate = Gate::default();
        let kind = (Sender::Own, Command::Sizes);
        gate.hold(kind);
        assert!(gate.pass(Sender::Own, Command::State.number(), || false), "another type");
        assert!(gate.pass(Sender::Kernel, Command::Sizes.number(), || false), "another sender");
        std::thread::scope(|scope| {
            let held = scope.spawn(|| gate.pass(Sender::Own, Command::Sizes.number(), || false));
            while !gate.is_waiting(kind) {
                std::thread::yield_now();
            }
            gate.open();
            assert!(held.join().unwrap());
        });
        assert_eq!((gate.is_waiting(kind), gate.seen(kind)), (false, 1));
        gate.hold(kind);
        assert!(!gate.pass(Sender::Own, Command::Sizes.number(), || true), "the end");
    }
}
