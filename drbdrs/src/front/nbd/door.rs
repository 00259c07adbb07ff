//! Where NBD clients come in: listening sockets, the list of exports, and the negotiation, which
//! may take its time on a thread of its own. A client that has chosen is handed to the thread of
//! its resource.

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags, sockopt};

use super::handshake::{Chosen, Export, Exports, Handshake, Progress, Refusal};
use super::server::Session;
use crate::plane::helpers::ring_bell;
use crate::plane::io::Fd;

/// How long a negotiation may take, from end to end.
const NEGOTIATION_MAX: Duration = Duration::from_secs(30);
/// Negotiations at the same time.
const NEGOTIATIONS_MAX: usize = 64;

/// Hands a client over to the thread of its resource. False: it is gone.
pub type HandOver = Arc<dyn Fn(Session) -> bool + Send + Sync>;

/// Promotes the volume, blocking; the error is for the client.
pub type Promote = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// One entry of the list.
#[derive(Clone)]
pub struct Entry {
    /// What is shown; its offer says whether it can be used now.
    pub export: Export,
    /// Where its clients go.
    pub hand_over: HandOver,
    /// Called when a client chooses a Secondary, if that is wanted.
    pub promote: Option<Promote>,
    /// How long a client that chooses a Secondary waits for it to become Primary.
    pub patience: Duration,
}

#[derive(Default)]
struct List {
    entries: BTreeMap<String, Entry>,
    is_over: bool,
}

/// The list of exports of the daemon.
#[derive(Clone, Default)]
pub struct Registry(Arc<(Mutex<List>, Condvar)>);

impl Registry {
    /// Adds an export, or changes it.
    pub fn set(&self, entry: Entry) {
        self.lock().entries.insert(entry.export.name.clone(), entry);
        self.0.1.notify_all();
    }

    /// Removes an export.
    pub fn remove(&self, name: &str) {
        self.lock().entries.remove(name);
        self.0.1.notify_all();
    }

    /// Refuses everything from now on.
    pub fn shut_down(&self) {
        self.lock().is_over = true;
        self.0.1.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, List> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn entry(&self, name: &str) -> Result<Entry, Refusal> {
        let list = self.lock();
        if list.is_over {
            return Err(Refusal::ShuttingDown);
        }
        list.find(name).cloned().ok_or(Refusal::Unknown)
    }

    /// Waits until the export can be used, or for as long as it takes.
    fn wait_for_primary(&self, name: &str, limit: Duration) -> Result<Entry, Refusal> {
        let end = Instant::now() + limit;
        let mut list = self.lock();
        loop {
            if list.is_over {
                return Err(Refusal::ShuttingDown);
            }
            let entry = list.find(name).cloned().ok_or(Refusal::Unknown)?;
            let left = end.saturating_duration_since(Instant::now());
            if entry.export.offer.is_primary || left.is_zero() {
                return Ok(entry);
            }
            list = self.0.1.wait_timeout(list, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl List {
    /// By its name; by its resource, if that has only one volume; or the only one of all.
    fn find(&self, name: &str) -> Option<&Entry> {
        if let Some(entry) = self.entries.get(name) {
            return Some(entry);
        }
        let prefix = if name.is_empty() { String::new() } else { format!("{name}/") };
        let mut fitting = self.entries.iter().filter(|(known, _)| known.starts_with(&prefix));
        match (fitting.next(), fitting.next()) {
            (Some((_, only)), None) => Some(only),
            _ => None,
        }
    }
}

impl Exports for Registry {
    fn list(&self) -> Vec<(String, String)> {
        let list = self.lock();
        let shown = |entry: &Entry| (entry.export.name.clone(), entry.export.description.clone());
        list.entries.values().map(shown).collect()
    }

    fn find(&self, name: &str) -> Result<Export, Refusal> {
        usable(self.entry(name)?)
    }

    fn open(&self, name: &str) -> Result<Export, Refusal> {
        let mut entry = self.entry(name)?;
        if !entry.export.offer.is_primary {
            if let Some(promote) = &entry.promote {
                promote().map_err(Refusal::NotNow)?;
            }
            // A promotion is published a moment after it has succeeded.
            let least = Duration::from_secs(if entry.promote.is_some() { 5 } else { 0 });
            entry = self.wait_for_primary(name, entry.patience.max(least))?;
        }
        usable(entry)
    }
}

fn usable(entry: Entry) -> Result<Export, Refusal> {
    if entry.export.offer.is_primary {
        return Ok(entry.export);
    }
    let name = &entry.export.name;
    Err(Refusal::NotNow(format!(
        "{name} is Secondary on this node: it can only be used where it is Primary"
    )))
}

/// An address to listen on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// TCP.
    Tcp(SocketAddr),
    /// A socket in the file system, for its owner only.
    Unix(PathBuf),
}

/// The open door; closed when dropped.
#[derive(Debug)]
pub struct Door {
    stop: Fd,
    thread: Option<JoinHandle<()>>,
    bound: Vec<SocketAddr>,
    paths: Vec<PathBuf>,
}

impl Door {
    /// Listens.
    ///
    /// # Errors
    /// An address cannot be had; the text says which.
    pub fn open(listen: &[Listen], registry: Registry) -> io::Result<Self> {
        let (mut sockets, mut bound, mut paths) = (Vec::new(), Vec::new(), Vec::new());
        for place in listen {
            match place {
                Listen::Tcp(at) => {
                    let socket = TcpListener::bind(at).map_err(|e| told(&at.to_string(), &e))?;
                    bound.push(socket.local_addr()?);
                    sockets.push(OwnedFd::from(socket));
                }
                Listen::Unix(path) => {
                    let told = |e| told(&path.display().to_string(), &e);
                    sockets.push(bind_unix(path).map_err(told)?.into());
                    paths.push(path.clone());
                }
            }
        }
        for socket in &sockets {
            rustix::io::ioctl_fionbio(socket, true)?;
        }
        let stop = Fd::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let bell = Fd::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("drbdrs-nbd".into())
            .stack_size(256 << 10)
            .spawn(move || attend(&sockets, &bell, &registry))?;
        Ok(Self { stop, thread: Some(thread), bound, paths })
    }

    /// The TCP addresses, with the ports that were chosen for port 0.
    pub fn tcp(&self) -> &[SocketAddr] {
        &self.bound
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        ring_bell(&self.stop);
        if let Some(thread) = self.thread.take() {
            // It waits for nothing but the bell.
            let _ = thread.join();
        }
        for path in &self.paths {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn told(place: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("cannot listen on {place}: {error}"))
}

/// Takes the place of a socket that nobody answers.
fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => match UnixStream::connect(path) {
            Err(gone) if gone.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path)?;
                UnixListener::bind(path)?
            }
            _ => return Err(error),
        },
        other => other?,
    };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

fn attend(sockets: &[OwnedFd], stop: &Fd, registry: &Registry) {
    let busy = Arc::new(AtomicUsize::new(0));
    loop {
        let mut polled: Vec<_> = std::iter::once(stop.as_fd())
            .chain(sockets.iter().map(AsFd::as_fd))
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        match poll(&mut polled, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return tracing::error!("NBD: poll: {errno}"),
        }
        let ready: Vec<_> = polled.iter().map(|fd| !fd.revents().is_empty()).collect();
        if ready.first() == Some(&true) {
            return;
        }
        for (socket, _) in sockets.iter().zip(&ready[1..]).filter(|(_, ready)| **ready) {
            match rustix::net::accept_with(socket, SocketFlags::CLOEXEC) {
                Ok(client) => welcome(client, registry, &busy),
                Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
                Err(errno) => {
                    tracing::warn!("NBD: accept: {errno}");
                    // Without a free descriptor the same would come at once.
                    std::thread::sleep(Duration::from_millis(200));
                }
            }
        }
    }
}

/// Negotiates on a thread of its own.
fn welcome(client: OwnedFd, registry: &Registry, busy: &Arc<AtomicUsize>) {
    if busy.fetch_add(1, Ordering::Relaxed) >= NEGOTIATIONS_MAX {
        busy.fetch_sub(1, Ordering::Relaxed);
        return tracing::warn!("NBD: too many clients at the same moment, one is sent away");
    }
    let (registry, count) = (registry.clone(), Arc::clone(busy));
    let thread = std::thread::Builder::new().name("drbdrs-nbd".into()).stack_size(256 << 10);
    let spawned = thread.spawn(move || {
        if let Err(error) = negotiate(client, &registry) {
            tracing::debug!("NBD: {error}");
        }
        count.fetch_sub(1, Ordering::Relaxed);
    });
    if let Err(error) = spawned {
        busy.fetch_sub(1, Ordering::Relaxed);
        tracing::warn!("NBD: no thread for a client: {error}");
    }
}

fn negotiate(client: OwnedFd, registry: &Registry) -> io::Result<()> {
    // Not there for sockets of the file system.
    let _ = sockopt::set_tcp_nodelay(&client, true);
    let end = Instant::now() + NEGOTIATION_MAX;
    let mut out = Vec::new();
    let mut handshake = Handshake::new(&mut out);
    let mut input = [0; 4096];
    let chosen = loop {
        send_all(&client, &out, end)?;
        out.clear();
        limit(&client, sockopt::Timeout::Recv, end)?;
        let got = match rustix::net::recv(&client, &mut input, RecvFlags::empty()) {
            Ok((0, _)) => return Ok(()),
            Ok((got, _)) => got,
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        };
        match handshake.feed(&input[..got], registry, &mut out) {
            Progress::More => {}
            Progress::Chosen(chosen) => break chosen,
            Progress::Close => return send_all(&client, &out, end),
        }
    };
    send_all(&client, &out, end)?;
    for direction in [sockopt::Timeout::Recv, sockopt::Timeout::Send] {
        sockopt::set_socket_timeout(&client, direction, None)?;
    }
    let Chosen { export, structured, contexts } = chosen;
    let (volume, rest) = (export.volume, handshake.rest());
    let session = Session { socket: client, volume, is_kernel: false, structured, contexts, rest };
    if let Ok(entry) = registry.entry(&export.name)
        && !(entry.hand_over)(session)
    {
        tracing::warn!("NBD: {} is gone", export.name);
    }
    Ok(())
}

/// Reading or writing gives up at this moment.
fn limit(socket: &OwnedFd, direction: sockopt::Timeout, end: Instant) -> io::Result<()> {
    let left = end.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    Ok(sockopt::set_socket_timeout(socket, direction, Some(left))?)
}

fn send_all(socket: &OwnedFd, mut bytes: &[u8], end: Instant) -> io::Result<()> {
    while !bytes.is_empty() {
        limit(socket, sockopt::Timeout::Send, end)?;
        match rustix::net::send(socket, bytes, SendFlags::NOSIGNAL) {
            Ok(sent) => bytes = bytes.get(sent..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}
