//! The clients at work.

use std::collections::BTreeMap;
use std::io::{Error, Result};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::content::{self, SECTOR};
use crate::journal::Journal;
use crate::ledger::{Loss, Record, Write};
use crate::nbd::{Client, Command, Reply, Server};

/// What the clients do.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Connections.
    pub clients: u64,
    /// Requests in flight on each.
    pub depth: usize,
    /// Longest request.
    pub sectors_max: u32,
    /// Decides what is random.
    pub seed: u64,
}

impl Default for Plan {
    fn default() -> Self {
        Self { clients: 4, depth: 8, sectors_max: 128, seed: 1 }
    }
}

/// What they did.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Acknowledged writes.
    pub writes: u64,
    /// Requests that were answered with an error.
    pub errors: u64,
    /// Connections that were lost with requests in flight, or could not be opened.
    pub lost: u64,
    /// Reads that saw what they may not see, in words.
    pub complaints: Vec<String>,
}

/// Clients at work.
#[derive(Debug)]
pub struct Running {
    is_over: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    shared: Arc<Mutex<Shared>>,
    threads: Vec<JoinHandle<Result<()>>>,
}

#[derive(Debug)]
struct Shared {
    journal: Journal,
    busy: Vec<bool>,
    report: Report,
}

#[derive(Debug)]
struct Request {
    command: Command,
    first: u64,
    count: u32,
    /// Of a write its number, of a flush the time when it was asked for.
    number: u64,
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }
}

/// Starts them.
///
/// # Errors
/// The device is smaller than what the journal knows of, or can not be opened.
pub fn start(server: &Server, journal: Journal, plan: Plan) -> Result<Running> {
    let sectors = journal.ledger().len();
    let clients = (0..plan.clients).map(|_| Client::open(server)).collect::<Result<Vec<_>>>()?;
    if clients.iter().any(|client| client.size() / (SECTOR as u64) < sectors) {
        return Err(Error::other("the device is smaller than the journal's"));
    }
    let busy = vec![false; usize::try_from(sectors).unwrap_or(0)];
    let shared = Arc::new(Mutex::new(Shared { journal, busy, report: Report::default() }));
    let (is_over, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let thread = |(n, client): (u64, Client)| {
        let random = Random((plan.seed + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ ((n + 1) << 32));
        let (is_over, count) = (Arc::clone(&is_over), Arc::clone(&count));
        let shared = Arc::clone(&shared);
        let worker =
            Worker { client, shared, random, plan, in_flight: BTreeMap::new(), is_over, count };
        std::thread::spawn(move || worker.work())
    };
    let threads = (0..).zip(clients).map(thread).collect();
    Ok(Running { is_over, count, shared, threads })
}

impl Running {
    /// Acknowledged writes so far.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Are all connections lost?
    pub fn is_finished(&self) -> bool {
        self.threads.iter().all(JoinHandle::is_finished)
    }

    /// Lets them wait for what is in flight, and end.
    ///
    /// # Errors
    /// The journal could not be written.
    pub fn end(self) -> Result<(Journal, Report)> {
        self.is_over.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().map_err(|_| Error::other("a client has panicked"))??;
        }
        let shared = Arc::into_inner(self.shared).ok_or_else(|| Error::other("still in use"))?;
        let shared = shared.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok((shared.journal, shared.report))
    }
}

struct Worker {
    client: Client,
    shared: Arc<Mutex<Shared>>,
    random: Random,
    plan: Plan,
    in_flight: BTreeMap<u64, Request>,
    is_over: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
}

impl Worker {
    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Until it is over and all is answered, or the server is gone.
    fn work(mut self) -> Result<()> {
        let mut cookie = 0;
        loop {
            while self.in_flight.len() < self.plan.depth && !self.is_over.load(Ordering::Relaxed) {
                cookie += 1;
                let Some((request, data)) = self.choose()? else { break };
                let Request { command, first, count, .. } = request;
                self.in_flight.insert(cookie, request);
                let (at, len) = (first * SECTOR as u64, count as usize * SECTOR);
                if self.client.ask(command, cookie, at, len, &data).is_err() {
                    return self.lost();
                }
            }
            if self.in_flight.is_empty() {
                if self.is_over.load(Ordering::Relaxed) {
                    return Ok(());
                }
                std::thread::yield_now();
                continue;
            }
            let Ok(reply) = self.client.reply() else { return self.lost() };
            if !self.take(reply)? {
                return self.lost();
            }
        }
    }

    fn lost(&self) -> Result<()> {
        self.shared().report.lost += 1;
        Ok(())
    }

    /// The next request, in the journal; `None` if all that was tried is in use.
    fn choose(&mut self) -> Result<Option<(Request, Vec<u8>)>> {
        let fua = self.random.below(16) == 0;
        let command = match self.random.below(100) {
            0..72 => Command::Write { fua },
            72..77 => Command::Zeroes { fua },
            77..80 => Command::Flush,
            _ => Command::Read,
        };
        let shared = Arc::clone(&self.shared);
        let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
        if command == Command::Flush {
            let number = shared.journal.ledger().clock();
            return Ok(Some((Request { command, first: 0, count: 0, number }, Vec::new())));
        }
        let Some((first, count)) = (0..50).find_map(|_| self.range(&shared)) else {
            return Ok(None);
        };
        shared.mark(first, count, true);
        let mut request = Request { command, first, count, number: 0 };
        let mut data = Vec::new();
        if let Command::Write { fua } | Command::Zeroes { fua } = command {
            let number = shared.journal.ledger().clock() + 1;
            let is_zeroes = matches!(command, Command::Zeroes { .. });
            let write = Write { number, first, count, is_zeroes, fua };
            shared.journal.append(&Record::Write(write))?;
            request.number = number;
            if !is_zeroes {
                content::fill(&mut data, shared.journal.identity, first, count, number);
            }
        }
        Ok(Some((request, data)))
    }

    /// A range that nobody uses; half of them lie in a sixteenth of the device.
    fn range(&mut self, shared: &Shared) -> Option<(u64, u32)> {
        let sectors = shared.journal.ledger().len();
        let longest = 1 << self.random.below(u64::from(self.plan.sectors_max.max(1).ilog2()) + 1);
        let count = 1 + self.random.below(longest);
        let window = if self.random.below(2) == 0 { sectors } else { sectors / 16 };
        let first = self.random.below(window);
        let is_free = (first..first + count).all(|at| {
            let busy = usize::try_from(at).ok().and_then(|at| shared.busy.get(at));
            busy.is_some_and(|busy| !busy)
        });
        is_free.then_some((first, u32::try_from(count).unwrap_or(1)))
    }

    /// Takes an answer; false if the connection was lost on the way.
    fn take(&mut self, reply: Reply) -> Result<bool> {
        let Some(request) = self.in_flight.remove(&reply.cookie) else {
            let text = format!("an answer to nothing: {reply:?}");
            self.shared().report.complaints.push(text);
            return Ok(false);
        };
        let mut data = Vec::new();
        if request.command == Command::Read && reply.error == 0 {
            data.resize(request.count as usize * SECTOR, 0);
            if self.client.data(&mut data).is_err() {
                return Ok(false);
            }
        }
        let mut shared = self.shared();
        shared.mark(request.first, request.count, false);
        if reply.error != 0 {
            shared.report.errors += 1;
            return Ok(true);
        }
        match request.command {
            Command::Read => shared.check(request.first, &data),
            Command::Flush => shared.journal.append(&Record::Flushed(request.number))?,
            Command::Write { .. } | Command::Zeroes { .. } => {
                shared.journal.append(&Record::Done(request.number))?;
                shared.report.writes += 1;
                self.count.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(true)
    }
}

impl Shared {
    fn mark(&mut self, first: u64, count: u32, is_busy: bool) {
        let first = usize::try_from(first).unwrap_or(usize::MAX);
        if let Some(busy) = self.busy.get_mut(first..first.saturating_add(count as usize)) {
            busy.fill(is_busy);
        }
    }

    /// Nobody writes there now: what was acknowledged last is there, or what failed after it.
    fn check(&mut self, first: u64, data: &[u8]) {
        for (at, sector) in (first..).zip(data.chunks_exact(SECTOR)) {
            let found = content::read(self.journal.identity, at, sector);
            let ledger = self.journal.ledger();
            if ledger.which(at, found, Loss::Nothing).is_none() {
                let legal = ledger.legal(at, Loss::Nothing);
                let text = format!("sector {at} was read: {found:?}, but legal are {legal:?}");
                self.report.complaints.push(text);
            }
        }
    }
}
