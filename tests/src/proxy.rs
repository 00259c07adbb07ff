//! A TCP relay between two peers that can delay, hold and cut, each direction on its own.
//!
//! It forwards bytes and knows nothing of what they mean, unless it has a [`Gate`]. Holding one
//! direction makes a half-dead link; a cut resets all connections and, until [`Proxy::restore`],
//! refuses new ones.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::packet_proxy::{Gate, Sender, read_packet};

/// From whom to whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the side that connects to the proxy.
    ToTarget,
    /// Back.
    FromTarget,
}

#[derive(Debug, Default)]
struct Lane {
    is_held: AtomicBool,
    delay_us: AtomicU64,
    bytes: AtomicU64,
}

#[derive(Debug)]
struct Shared {
    target: SocketAddr,
    is_cut: AtomicBool,
    is_over: AtomicBool,
    lanes: [Lane; 2],
    /// With the sender of what goes to the target.
    gate: Option<(Arc<Gate>, Sender)>,
    open: Mutex<Vec<[TcpStream; 2]>>,
}

/// A relay; its connections end with it.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
    port: u16,
}

impl Proxy {
    /// Relays a free port of 127.0.0.1 to `target`.
    ///
    /// # Errors
    /// No port is free.
    pub fn new(target: SocketAddr) -> io::Result<Self> {
        Self::with(target, None)
    }

    /// The same for DRBD, with a gate. `connector` is who connects to the proxy.
    ///
    /// # Errors
    /// No port is free.
    pub fn gated(target: SocketAddr, gate: Arc<Gate>, connector: Sender) -> io::Result<Self> {
        Self::with(target, Some((gate, connector)))
    }

    fn with(target: SocketAddr, gate: Option<(Arc<Gate>, Sender)>) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.set_nonblocking(true)?;
        let port = listener.local_addr()?.port();
        let shared = Arc::new(Shared {
            target,
            is_cut: AtomicBool::new(false),
            is_over: AtomicBool::new(false),
            lanes: [Lane::default(), Lane::default()],
            gate,
            open: Mutex::new(Vec::new()),
        });
        let ours = Arc::clone(&shared);
        thread::spawn(move || accept(&listener, &ours));
        Ok(Self { shared, port })
    }

    /// Where to connect to.
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// Nothing passes in this direction until [`Self::release`]; nothing is lost.
    pub fn hold(&self, direction: Direction) {
        self.lane(direction).is_held.store(true, Ordering::SeqCst);
    }

    /// Passes on what was held.
    pub fn release(&self, direction: Direction) {
        self.lane(direction).is_held.store(false, Ordering::SeqCst);
    }

    /// Everything takes so much longer from now on, in this direction.
    pub fn delay(&self, direction: Direction, delay: Duration) {
        let us = u64::try_from(delay.as_micros()).unwrap_or(u64::MAX);
        self.lane(direction).delay_us.store(us, Ordering::SeqCst);
    }

    /// Bytes passed on so far.
    pub fn bytes(&self, direction: Direction) -> u64 {
        self.lane(direction).bytes.load(Ordering::SeqCst)
    }

    /// Ends all connections; new ones are refused until [`Self::restore`].
    pub fn cut(&self) {
        self.shared.is_cut.store(true, Ordering::SeqCst);
        self.close_all();
    }

    /// Cuts or mends several.
    pub fn set_cut(proxies: [&Self; 2], is_cut: bool) {
        for proxy in proxies {
            if is_cut {
                proxy.cut();
            } else {
                proxy.restore();
            }
        }
    }

    /// Accepts connections again.
    pub fn restore(&self) {
        self.shared.is_cut.store(false, Ordering::SeqCst);
    }

    fn lane(&self, direction: Direction) -> &Lane {
        &self.shared.lanes[usize::from(direction == Direction::FromTarget)]
    }

    fn close_all(&self) {
        let mut open = self.shared.open.lock().unwrap_or_else(PoisonError::into_inner);
        for stream in open.drain(..).flatten() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::SeqCst);
        self.close_all();
    }
}

const POLL: Duration = Duration::from_millis(2);

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    while !shared.is_over.load(Ordering::SeqCst) {
        match listener.accept() {
            Ok((stream, _)) => {
                // Who is refused sees the connection closed at once, or never made.
                let _ = connect(stream, shared);
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => thread::sleep(POLL),
            Err(_) => return,
        }
    }
}

fn connect(client: TcpStream, shared: &Arc<Shared>) -> io::Result<()> {
    if shared.is_cut.load(Ordering::SeqCst) {
        return Ok(());
    }
    client.set_nonblocking(false)?;
    client.set_nodelay(true)?;
    let target = TcpStream::connect(shared.target)?;
    target.set_nodelay(true)?;
    let pair = [client.try_clone()?, target.try_clone()?];
    shared.open.lock().unwrap_or_else(PoisonError::into_inner).push(pair);
    let back = (target.try_clone()?, client.try_clone()?);
    for (lane, (from, to)) in [(client, target), back].into_iter().enumerate() {
        let shared = Arc::clone(shared);
        thread::spawn(move || {
            // An error is an end: the other side is told by closing.
            let _ = relay(&from, &to, &shared, lane);
            let _ = to.shutdown(Shutdown::Write);
        });
    }
    Ok(())
}

fn relay(
    mut from: &TcpStream,
    mut to: &TcpStream,
    shared: &Shared,
    index: usize,
) -> io::Result<()> {
    let lane = &shared.lanes[index];
    let is_over = || shared.is_over.load(Ordering::SeqCst) || shared.is_cut.load(Ordering::SeqCst);
    let mut buffer = Vec::new();
    loop {
        if let Some((gate, connector)) = &shared.gate {
            let Some(command) = read_packet(&mut from, &mut buffer)? else { return Ok(()) };
            let sender = if index == 0 { *connector } else { connector.other() };
            if !gate.pass(sender, command, is_over) {
                return Ok(());
            }
        } else {
            buffer.resize(1 << 16, 0);
            let n = from.read(&mut buffer)?;
            if n == 0 {
                return Ok(());
            }
            buffer.truncate(n);
        }
        let due = Instant::now() + Duration::from_micros(lane.delay_us.load(Ordering::SeqCst));
        while lane.is_held.load(Ordering::SeqCst) || Instant::now() < due {
            if is_over() {
                return Ok(());
            }
            thread::sleep(POLL);
        }
        // Before they can be seen at the other end.
        lane.bytes.fetch_add(buffer.len() as u64, Ordering::SeqCst);
        to.write_all(&buffer)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server() -> (TcpListener, Proxy) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let proxy = Proxy::new(listener.local_addr().unwrap()).unwrap();
        (listener, proxy)
    }

    fn pair(listener: &TcpListener, proxy: &Proxy) -> (TcpStream, TcpStream) {
        let client = TcpStream::connect((Ipv4Addr::LOCALHOST, proxy.port())).unwrap();
        let (target, _) = listener.accept().unwrap();
        for stream in [&client, &target] {
            stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        }
        (client, target)
    }

    #[test]
    fn holds_one_direction_and_passes_the_other() {
        let (listener, proxy) = server();
        let (mut client, mut target) = pair(&listener, &proxy);
        proxy.hold(Direction::ToTarget);
        client.write_all(b"there").unwrap();
        target.write_all(b"back").unwrap();
        let mut buffer = [0; 5];
        client.read_exact(&mut buffer[..4]).unwrap();
        assert_eq!(&buffer[..4], b"back");
        target.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        assert!(target.read(&mut buffer).is_err(), "held");
        target.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        proxy.release(Direction::ToTarget);
        target.read_exact(&mut buffer).unwrap();
        assert_eq!((&buffer, proxy.bytes(Direction::ToTarget)), (b"there", 5));
    }

    #[test]
    fn a_cut_ends_connections_and_refuses_new_ones() {
        let (listener, proxy) = server();
        let (mut client, mut target) = pair(&listener, &proxy);
        proxy.cut();
        assert_eq!(client.read(&mut [0; 1]).unwrap_or(0), 0);
        assert_eq!(target.read(&mut [0; 1]).unwrap_or(0), 0);
        let mut refused = TcpStream::connect((Ipv4Addr::LOCALHOST, proxy.port())).unwrap();
        assert_eq!(refused.read(&mut [0; 1]).unwrap_or(0), 0, "closed without a byte");
        proxy.restore();
        let (mut client, mut target) = pair(&listener, &proxy);
        client.write_all(b"x").unwrap();
        target.read_exact(&mut [0; 1]).unwrap();
    }
}
